"""The dual-LoRA pipeline: layouts, eq. 5, timelines, inversion, batching, determinism, refusals. Dummy components of a few channels."""
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cmvc_nb.errors import CmvcError
from cmvc_nb.it2v import INITS, ROUNDS, DualLoRAPipeline, blend, denoise, invert, likeness, shares, slerp, timeline, to_pixels, to_uint8, uniform_schedule
from cmvc_nb.lora import attach, lora_layers, lora_weights, split, write_lora
from dummies import dummy_components, dummy_scheduler, make_dummy_sd, moving_disc
from test_flow import reference, reference_blend

torch.set_num_threads(1)
CLIP = moving_disc(9)
ENDS = CLIP[0], CLIP[-1]
SMALL = dict(num_inference_steps=5, strength=.6)


@pytest.fixture(scope='module')
def pipe(): return DualLoRAPipeline(**dummy_components(), lora_rank=2, lora_lr=2e-2, batch_size=4)


@pytest.fixture(scope='module')
def loras(pipe):
    fitted = pipe.fit({0: ENDS[0], 1: ENDS[1]}, {0: 'a', 1: 'a'}, 2, steps=8)
    return fitted[0], fitted[1]


@pytest.mark.parametrize('vae', ['tiny', 'kl'])
def test_any_sd_folder_and_round_trip(tmp_path, vae):
    folder = make_dummy_sd(tmp_path/'sd', seed=1, vae=vae)
    index = json.loads((folder/'model_index.json').read_text())
    assert index['_class_name'] == 'StableDiffusionPipeline'
    index |= {'safety_checker': ['stable_diffusion', 'StableDiffusionSafetyChecker'], 'feature_extractor': ['transformers', 'CLIPImageProcessor']}
    (folder/'model_index.json').write_text(json.dumps(index))          # as in SD 1.5, whose checker nobody needs here
    first = DualLoRAPipeline.from_pretrained(folder, lora_rank=3, init='sdedit')
    frames = first(*ENDS, prompt='hello', frames=2, **SMALL).frames
    first.save_pretrained(tmp_path/'own')
    second = DualLoRAPipeline.from_pretrained(tmp_path/'own')
    assert second.config.lora_rank == 3 and second.config.init == 'sdedit'
    assert np.array_equal(frames, second(*ENDS, prompt='hello', frames=2, **SMALL).frames)
    assert frames.shape == (2, 64, 64, 3) and frames.dtype == np.uint8


def test_schedule_blend_and_rounding():
    assert np.allclose(uniform_schedule(3), [.75, .5, .25]) and len(uniform_schedule(0)) == 0
    a, b = (to_pixels(f) for f in ENDS)
    own = np.rint(.25*ENDS[0].astype(float) + .75*ENDS[1])
    assert np.abs(to_uint8(blend([1., 0., .25], a, b)).astype(float) - np.stack([ENDS[0], ENDS[1], own])).max() <= 1
    assert np.array_equal(to_uint8(blend([1., 0.], a, b)), np.stack(ENDS))
    assert to_uint8(torch.tensor([-3., 3, 0])[None, :, None, None]).flatten().tolist() == [0, 255, 128]


@given(st.integers(1, 60), st.floats(.002, 1))
@settings(deadline=None, max_examples=40)
def test_timeline(steps, strength):
    t = timeline(dummy_scheduler(), steps, strength)
    assert t[0] == -1 and t == sorted(set(t)) and t[-1] == round(strength*1000) - 1
    assert len(t) - 1 == min(max(round(steps*strength), 1), round(strength*1000))


def exact_predictor(sched, z, e):
    "What a perfect UNet says about z under noise e: an ODE whose solution is known."
    def predict(x, t):
        return z.expand_as(x), (x - level(sched)(t)[0]*z)/level(sched)(t)[1].clamp(min=1e-12)
    return predict

def level(sched):
    from cmvc_nb.lora import _levels
    return lambda t: _levels(sched, [t], torch.zeros(1, dtype=torch.float64))

@pytest.mark.parametrize('solver', ['ddim', 'dpm++'])
def test_denoise_walks_home(solver):
    sched, (z, e) = dummy_scheduler(), torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    times = timeline(sched, 10, .7)
    a, s = level(sched)(times[-1])
    torch.testing.assert_close(denoise(exact_predictor(sched, z, e), a*z + s*e, times, level(sched), solver), z)

def test_ddim_equals_diffusers():
    "Our two lines against DDIMScheduler.step, on the trailing timeline that both can express."
    sched = dummy_scheduler(timestep_spacing='trailing', set_alpha_to_one=True)
    sched.set_timesteps(10)
    times = [-1] + [100*i - 1 for i in range(1, 11)]
    assert sched.timesteps.tolist() == times[:0:-1]
    net = lambda x, t: torch.sin(3*x + t/500)
    x = y = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    for t in sched.timesteps: y = sched.step(net(y, t), t, y).prev_sample
    x = denoise(lambda x, t: split('v_prediction', net(x, t), x, *level(sched)(t)), x, times, level(sched))
    torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)

def test_dpm_equals_diffusers():
    from diffusers import DPMSolverMultistepScheduler
    ours = dummy_scheduler()
    sched = DPMSolverMultistepScheduler.from_config(ours.config, timestep_spacing='trailing', final_sigmas_type='zero', lower_order_final=True)
    times = [-1] + [50*i - 1 for i in range(1, 21)]
    sched.set_timesteps(20)
    assert sched.timesteps.tolist() == times[:0:-1]
    net = lambda x, t: torch.sin(2*x + t/500)
    x = y = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    for t in sched.timesteps: y = sched.step(net(y, t), t, y).prev_sample
    x = denoise(lambda x, t: split('v_prediction', net(x, t), x, *level(ours)(t)), x, times, level(ours), 'dpm++')
    torch.testing.assert_close(x, y.double(), atol=1e-4, rtol=1e-4)

def test_more_rounds_invert_better(pipe):
    z = pipe.to_latents(torch.stack([to_pixels(f) for f in ENDS]))
    text = pipe.encode_prompt('a').expand(2, -1, -1)
    def predict(x, t): return split('v_prediction', pipe.unet(x, t, text).sample, x, *pipe.level(t))
    times = timeline(pipe.scheduler, 8, .6)
    error = [float((denoise(predict, invert(predict, z, times, pipe.level, rounds=r), times, pipe.level) - z).square().mean()) for r in (1, 3, 8)]
    assert error[0] > error[1] > error[2]

def test_slerp_keeps_length_and_ends():
    p, q = torch.randn(2, 4, 8, 8)
    mid = slerp([1., .5, 0.], p, q)
    torch.testing.assert_close(mid[0], p, atol=1e-5, rtol=1e-4); torch.testing.assert_close(mid[2], q, atol=1e-5, rtol=1e-4)
    assert float(mid[1].norm()) == pytest.approx(float((p.norm() + q.norm())/2), rel=.03)
    assert slerp([.5], p, p).isfinite().all()


def test_likeness_and_shares():
    a, b = torch.randn(2, 3, 64, 64)
    assert likeness(torch.stack([a, a])).min() > .99 and likeness(torch.stack([a, -a])).max() == 0 and likeness(torch.stack([a, b])).mean() < .1
    assert likeness(torch.stack([a, a + 5])).min() > .99                                           # of structure, not of brightness
    rho = likeness(torch.stack([a, torch.cat([a[..., :32], b[..., :32]], -1)]))
    assert rho[..., 0].min() > .9 and rho[..., -1].max() < .3                                      # local
    w = torch.tensor([1., .9, .5, .1, 1.3])
    gamma, m = shares(rho, rho, w, .6, .5)
    assert (gamma[[0, 4]] == 1).all() and (gamma[2] <= gamma[1]).all() and gamma[2].min() < .75 and gamma.min() >= .5
    torch.testing.assert_close(gamma[1], gamma[3])
    assert m.min() >= 0 and m.max() <= .5 and m[..., -1].min() > .4 and m[..., 0].max() < .1
    assert (shares(rho, rho, w, 0., .5)[0] == 1).all()                                              # no noise: all the detail
    assert (shares(rho, torch.ones_like(rho), w, .6, .5)[0] == 1).all()                             # alike in what is kept: all the detail


@pytest.mark.parametrize('init', INITS)
def test_frames_match_a_serial_reference(pipe, loras, init):
    "One batch against the formulas, one frame at a time, LoRAs set by peft's own floats."
    w_i, w_l = np.array([.9, .5, .1]), np.array([1., .3, .2])
    ours = pipe(*ENDS, w_i, w_l, 'a', loras, init=init, generator=3, **SMALL).frames
    x = torch.stack([to_pixels(f) for f in ENDS])
    times, text = timeline(pipe.scheduler, 5, .6), pipe.encode_prompt('a')
    e = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), attach(pipe.unet, '01', 2):
        for n, s in zip('01', loras): write_lora(pipe.unet, n, s)
        def predict(x, t): return split('v_prediction', pipe.unet(x, t, text).sample, x, *pipe.level(t))
        ends = []
        for i, w in enumerate([(1., 0.), (0., 1.)]):
            pipe.unet.set_adapters(['0', '1'], list(w))
            ends.append(invert(predict, pipe.to_latents(x[i:i+1]), times, pipe.level, rounds=ROUNDS)[0])
        kept = pipe.to_image(pipe.to_latents(x))
        alike = likeness(x - kept), likeness(kept)
        for f, wi, wl in zip(ours, w_i, w_l):
            pipe.unet.set_adapters(['0', '1'], [wl, 1-wl])
            mixed, near = wi*x[:1] + (1-wi)*x[1:], alike
            if init == 'flow':
                single = lambda v: torch.from_numpy(np.asarray(v)).float()[None]
                mixed, trust = map(single, reference_blend(np.stack(ENDS), x.numpy().astype(float), wi))
                near = [old + trust*(likeness(torch.stack([single(v)[0] for v in reference(np.stack(ENDS), p, wi)[:2]])) - old) for old, p in zip(alike, (x - kept, kept))]
            z = pipe.to_latents(mixed)
            through, (a, s) = pipe.to_image(z), pipe.level(times[-1])
            gamma, m = shares(*near, torch.tensor([wi]), s, .5)
            own_noise = [n - a*k for n, k in zip(ends, pipe.to_latents(x))]
            z = a*z + wi*own_noise[0] + (1-wi)*own_noise[1] if init == 'flow' else a*z + s*e if init == 'sdedit' else invert(predict, z, times, pipe.level) if init == 'ddim' else slerp([wi], *ends) if init == 'slerp' else wi*ends[0][None] + (1-wi)*ends[1][None]
            own = to_uint8((1-m)*through + m*pipe.to_image(denoise(predict, z, times, pipe.level)) + gamma*(mixed - through))[0]
            assert np.abs(own.astype(int) - f).max() <= 1


def test_strength_zero_is_the_blend(pipe, loras):
    w = np.array([.75, .25])
    out = pipe(*ENDS, w, w, 'a', loras, num_inference_steps=5, strength=0)
    assert out.evaluations == 0 and np.array_equal(out.frames, to_uint8(blend(w, *map(to_pixels, ENDS))))
    moving = pipe(*ENDS, w, w, 'a', loras, num_inference_steps=5, strength=0, init='flow').frames
    for f, wi in zip(moving, w):
        own = to_uint8(torch.from_numpy(reference_blend(np.stack(ENDS), np.stack([to_pixels(e).numpy() for e in ENDS]).astype(float), wi)[0])[None])[0]
        assert np.abs(own.astype(int) - f).max() <= 1


def test_each_input_matters(pipe, loras):
    w = uniform_schedule(3)
    make = lambda w_i=w, w_l=w, prompt='a', loras=loras, **k: pipe(*ENDS, w_i, w_l, prompt, loras, **{**SMALL, 'init': 'sdedit', **k}).frames
    base = make()
    for other in [make(w_i=w/2), make(w_l=1-w), make(prompt='zebra'), make(loras=None), make(generator=1), make(strength=.8), make(init='ddim'), make(init='slerp'), make(init='lerp'), make(init='flow')]:
        assert not np.array_equal(base, other)
    assert np.array_equal(base, make()) and np.array_equal(base, make(generator=torch.Generator().manual_seed(0)))


def test_bytes_of_a_frame_depend_on_its_own_weights_only(pipe, loras):
    "The search may therefore pick each frame from a different pass."
    w = uniform_schedule(7)
    one, two = np.stack([w, w]), np.stack([w/2, 1-w])
    mixed = np.where(np.arange(7) % 2, one, two)
    f = [pipe(*ENDS, *v, 'a', loras, **SMALL).frames for v in (one, two, mixed)]
    assert all(np.array_equal(f[2][i], f[0 if i % 2 else 1][i]) for i in range(7))


def test_evaluations_are_counted_truly(pipe, loras):
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, a, k: seen.append(len(a[0])), with_kwargs=True)
    for init, expected in [('ddim', 5*6), ('sdedit', 5*3), ('slerp', 5*3 + 2*3*ROUNDS), ('lerp', 5*3 + 2*3*ROUNDS), ('flow', 5*3 + 2*3*ROUNDS)]:
        seen.clear()
        out = pipe(*ENDS, frames=5, loras=loras, init=init, **SMALL)
        assert out.evaluations == sum(seen) == expected
    hook.remove()


def test_fit_is_cached_and_leaves_nothing(pipe):
    pipe.loras.clear()
    calls = []
    frames, text = {0: CLIP[0], 1: CLIP[4], 2: CLIP[8]}, {0: 'a', 1: 'b', 2: 'b'}
    first = pipe.fit(frames, text, 3, steps=3, log=lambda *a: calls.append(a))
    assert len(calls) == 6 and sorted(first) == [0, 1, 2] and not lora_layers(pipe.unet)     # a pair and a single, three steps each
    again = pipe.fit(frames, text, 3, steps=3, log=lambda *a: calls.append(a))
    assert len(calls) == 6 and all(again[i] is first[i] for i in first)
    pipe.loras.clear()
    part = pipe.fit({1: CLIP[4]}, {1: 'b'}, 3, steps=3)
    assert all(torch.equal(part[1][k], first[1][k]) for k in part[1])
    other = pipe.fit({1: CLIP[4]}, {1: 'c'}, 3, steps=3)
    assert any(not torch.equal(part[1][k], other[1][k]) for k in part[1])
    for n in range(30): pipe.fit({0: CLIP[n % 9]}, {0: str(n)}, 1, steps=1)
    assert len(pipe.loras) <= 16


def test_gradients_reach_both_weights(pipe, loras):
    w = torch.full((2,), .5, requires_grad=True), torch.full((2,), .5, requires_grad=True)
    with pipe.clip(*ENDS, 'a', loras, **SMALL) as c: c.batch(*w).square().mean().backward()
    for v in w: assert (v.grad != 0).all()
    assert not any(p.requires_grad or p.grad is not None for p in pipe.unet.parameters())


def test_output_types_and_half_precision(pipe, loras):
    a = pipe(*ENDS, frames=2, output_type='np', **SMALL).frames
    b = pipe(*ENDS, frames=2, output_type='pt', **SMALL).frames
    c = pipe(*ENDS, frames=2, output_type='pil', **SMALL).frames
    assert np.array_equal(a, to_uint8(b)) and np.array_equal(a, np.stack([np.asarray(i) for i in c]))
    half = DualLoRAPipeline(**dummy_components(), lora_rank=2).to(torch.bfloat16)
    f = half(*ENDS, frames=2, prompt='a', loras=loras, **SMALL).frames
    assert np.abs(f.astype(float) - pipe(*ENDS, frames=2, prompt='a', loras=loras, **SMALL).frames).mean() < 8
    assert len(pipe(*ENDS, frames=0, **SMALL).frames) == 0
    assert len(pipe.encode_prompt('long text ' * 100)) == 1


@pytest.mark.parametrize('change,message', [
    (dict(image_1=CLIP[8][:32]), 'differ in size'), (dict(image_0=CLIP[0].astype(float)), 'uint8'), (dict(image_0=torch.zeros(64, 64, 3)), 'tensor'),
    (dict(strength=1.5), 'strength'), (dict(num_inference_steps=0), 'steps'), (dict(init='magic'), 'magic'), (dict(solver='heun'), 'heun'),
    (dict(w_i=[.5], w_l=[.5, .5]), 'one finite number'), (dict(w_i=[float('nan')]), 'finite'), (dict(w_i=None), 'number of frames'),
    (dict(output_type='gif'), 'gif'), (dict(loras=[{}]), 'two LoRAs'), (dict(image_0=CLIP[0][:60, :60], image_1=CLIP[0][:60, :60]), 'multiple')])
def test_refusals(pipe, change, message):
    options = dict(image_0=ENDS[0], image_1=ENDS[1], w_i=[.5]) | SMALL | change
    with pytest.raises(CmvcError, match=message): pipe(**options)
    assert not lora_layers(pipe.unet)


def test_other_schedulers_and_models_are_refused():
    from diffusers import FlowMatchEulerDiscreteScheduler
    from dummies import dummy_unet
    with pytest.raises(CmvcError, match='alphas_cumprod'): DualLoRAPipeline(**dummy_components() | {'scheduler': FlowMatchEulerDiscreteScheduler()})
    unet = dummy_unet(); unet.register_to_config(in_channels=9)
    with pytest.raises(CmvcError, match='9 channels'): DualLoRAPipeline(**dummy_components() | {'unet': unet})


def test_tiling():
    "An option of both generators: tiles that meet in overlaps, nearly the same frames; refused where diffusers has none for the autoencoder."
    from cmvc_nb.tt2v import tile
    big = moving_disc(5, 128)
    whole, tiled = (DualLoRAPipeline(**dummy_components(vae='kl'), tiling=t) for t in (False, True))
    assert tiled.config.tiling and tiled.vae.use_tiling and tiled.vae.use_slicing and not whole.vae.use_tiling
    tiled.vae.tile_sample_min_size, tiled.vae.tile_latent_min_size = 64, 8 # a dummy's picture of 128 pixels then has four tiles and more
    a, b = (p(big[0], big[-1], frames=3, **SMALL).frames.astype(int) for p in (whole, tiled))
    gap, far = np.abs(a - b).mean(), np.abs(a[::-1, ::-1] - b).mean()
    assert (a != b).any() and gap < .5*far # not another picture
    tile(dummy_components()['vae'])
    from diffusers import AutoencoderTiny
    with pytest.raises(CmvcError, match='4 latent channels, this one has 8'): tile(AutoencoderTiny(latent_channels=8, encoder_block_out_channels=(8,)*4, decoder_block_out_channels=(8,)*4))
