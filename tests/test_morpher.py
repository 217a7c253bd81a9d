"""DiffMorpher's parts: statistics of the noise, shared attention against a slow serial computation, even steps."""
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from cmvc_nb import world
from cmvc_nb.entropy import dequantise_weights, quantise_weights
from cmvc_nb.errors import CmvcError
from cmvc_nb.it2v import INITS, DualLoRAPipeline, denoise, invert, shares, slerp, timeline, to_pixels, uniform_schedule
from cmvc_nb.lora import attach, lora_layers, split, write_lora
from cmvc_nb.morpher import KeyframeAttention, adain, even_weights, keyframe_attention, self_attentions, shared_levels, spacing
from cmvc_nb.search import search_weights
from dummies import dummy_components, make_dummy_sd, moving_disc
from test_flow import reference_blend

torch.set_num_threads(1)
CLIP = moving_disc(9)
ENDS = tuple(np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)) # as unlike as can be
SMALL = dict(num_inference_steps=10, strength=.5)
W_I, W_L = torch.tensor([.9, .5, .1]), torch.tensor([1., .3, .2])


@pytest.fixture(scope='module')
def pipe(): return DualLoRAPipeline(**dummy_components(), lora_rank=2, lora_lr=2e-2, batch_size=4)

@pytest.fixture(scope='module')
def loras(pipe):
    f = pipe.fit({0: ENDS[0], 1: ENDS[1]}, {0: 'a', 1: 'a'}, 2, steps=8)
    for s in f.values(): # a few steps move little: make them matter
        for k in s: s[k] = s[k]*(8 if 'lora_B' in k else 1)
    return f[0], f[1]

@contextmanager
def switched(pipe, **options):
    "Options of the pipeline for a while."
    was = {k: pipe.config[k] for k in options}
    pipe.register_to_config(**options)
    try: yield pipe
    finally: pipe.register_to_config(**was)


# ---- statistics of the noise

@pytest.mark.parametrize('w', [[1., .5, .25, 0.], [1.2, -.3]])
def test_adain_statistics_are_exact(w):
    g = torch.Generator().manual_seed(0)
    ends = torch.randn(2, 4, 8, 8, generator=g, dtype=torch.float64)*torch.tensor([1., 2.])[:, None, None, None] + torch.arange(4.)[:, None, None]
    w = torch.tensor(w, dtype=torch.float64)
    z = slerp(w, *ends)
    out = adain(w, z, ends)
    mean, std = lambda v: v.mean((2, 3)), lambda v: v.std((2, 3))
    for f in (mean, std): torch.testing.assert_close(f(out), w[:, None]*f(ends)[0] + (1-w[:, None])*f(ends)[1])
    flat = lambda v: (v - mean(v)[..., None, None])/std(v)[..., None, None]
    torch.testing.assert_close(flat(out), flat(z))                       # the pattern itself is untouched
    torch.testing.assert_close(adain(w, ends[:1].expand(len(w), -1, -1, -1), ends[[0, 0]]), ends[:1].expand(len(w), -1, -1, -1))

def test_adain_of_flat_noise_is_finite():
    z = torch.ones(1, 4, 8, 8, requires_grad=True)
    out = adain([.5], z, torch.zeros(2, 4, 8, 8))
    out.sum().backward()
    assert out.isfinite().all() and z.grad.isfinite().all()


# ---- shared attention

@contextmanager
def hooked(unet, hook):
    "`hook(name, output)` on every to_k and to_v of self-attention; what it returns replaces the output."
    on = [(n, m) for n, m in unet.named_modules() if n.endswith(('attn1.to_k', 'attn1.to_v'))]
    assert len(on) == 2*len(self_attentions(unet)) > 4
    handles = [m.register_forward_hook(lambda m, a, out, n=n: hook(n, out)) for n, m in on]
    try: yield
    finally: [h.remove() for h in handles]

def serial(pipe, loras, init, part, solver='ddim', norm=False):
    "The frames' latents one at a time: each keyframe's own pass writes its keys and values down, each frame's pass reads them. LoRAs by peft's floats."
    x, text = torch.stack([to_pixels(f) for f in ENDS]), pipe.encode_prompt('a')
    times = timeline(pipe.scheduler, SMALL['num_inference_steps'], SMALL['strength'])
    first = times[:0:-1][:int(np.ceil(part*(len(times)-1)))]
    a, s = pipe.level(times[-1])
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    def predict(x, t): now[0] = t; return split('v_prediction', pipe.unet(x, t, text).sample, x, *pipe.level(t))
    def keys(n, out): book[i, now[0], n] = out
    def read(n, out): return w*book[0, now[0], n] + (1-w)*book[1, now[0], n] if now[0] in first else out
    now, book, ends, made = [None], {}, [], []
    with torch.no_grad(), attach(pipe.unet, '01', 2):
        for n, state in zip('01', loras): write_lora(pipe.unet, n, state)
        z = pipe.to_latents(x)
        for i in range(2):
            pipe.unet.set_adapters(['0', '1'], [1. - i, float(i)])
            ends.append(a*z[i:i+1] + s*noise if init == 'sdedit' else invert(predict, z[i:i+1], times, pipe.level, rounds=3))
            with hooked(pipe.unet, keys): denoise(predict, ends[-1], times, pipe.level, solver)
        for w, l in zip(W_I.tolist(), W_L.tolist()):
            pipe.unet.set_adapters(['0', '1'], [l, 1-l])
            v = pipe.to_latents(torch.from_numpy(reference_blend(np.stack(ENDS), x.numpy().astype(float), w)[0]).float()[None] if init == 'flow' else w*x[:1] + (1-w)*x[1:])
            v = {'sdedit': lambda: a*v + s*noise, 'ddim': lambda: invert(predict, v, times, pipe.level), 'slerp': lambda: slerp([w], ends[0][0], ends[1][0]), 'lerp': lambda: w*ends[0] + (1-w)*ends[1],
                 'flow': lambda: a*v + w*(ends[0] - a*z[:1]) + (1-w)*(ends[1] - a*z[1:])}[init]()
            if norm:
                m, d = ([f(e) for e in ends] for f in (lambda e: e.mean((2, 3), keepdim=True), lambda e: e.std((2, 3), keepdim=True)))
                v = (v - v.mean((2, 3), keepdim=True))/v.std((2, 3), keepdim=True)*(w*d[0] + (1-w)*d[1]) + w*m[0] + (1-w)*m[1]
            with hooked(pipe.unet, read): made.append(denoise(predict, v, times, pipe.level, solver))
    return torch.cat(made)

def latents(pipe, loras, init, solver='ddim', w_i=W_I, w_l=W_L):
    "What `Clip.batch` hands to the VAE last, and rows that went through the UNet for sampling."
    seen, show = [], pipe.to_image
    with pipe.clip(*ENDS, 'a', loras, init=init, solver=solver, generator=3, **SMALL) as c, torch.no_grad():
        before, pipe.to_image = c.evaluations, lambda z: seen.append(z) or show(z)
        try: c.batch(w_i, w_l)
        finally: del pipe.to_image
        return seen[-1], c.evaluations - before

@pytest.mark.parametrize('init,solver,part', [('lerp', 'ddim', 1.), ('slerp', 'ddim', .6), ('slerp', 'dpm++', .5), ('sdedit', 'ddim', .2), ('ddim', 'dpm++', .6)])
def test_batched_attention_is_the_serial_computation(pipe, loras, init, solver, part):
    with switched(pipe, attention=part): ours, rows = latents(pipe, loras, init, solver)
    torch.testing.assert_close(ours, serial(pipe, loras, init, part, solver), atol=1e-5, rtol=1e-5)
    assert rows == 3*5*(2 if init == 'ddim' else 1) + 2*np.ceil(part*5)
    assert (ours - latents(pipe, loras, init, solver)[0]).abs().max() > 1e-3          # and it is not what happens without

@pytest.mark.parametrize('init', INITS)
def test_adain_in_the_pipeline(pipe, loras, init):
    with switched(pipe, adain=True, attention=.4): ours, _ = latents(pipe, loras, init)
    torch.testing.assert_close(ours, serial(pipe, loras, init, .4, norm=True), atol=1e-5, rtol=1e-5)
    with switched(pipe, attention=.4): assert (ours - latents(pipe, loras, init)[0]).abs().max() > 1e-4

def test_adain_alone(pipe, loras):
    with switched(pipe, adain=True): ours, rows = latents(pipe, loras, 'slerp')
    torch.testing.assert_close(ours, serial(pipe, loras, 'slerp', 0, norm=True), atol=1e-5, rtol=1e-5)
    assert rows == 15

def test_the_levels_that_share():
    times = timeline(dummy_components()['scheduler'], 10, .5)
    for part, n in [(0, 0), (.01, 1), (.2, 1), (.4, 2), (.6, 3), (.61, 4), (1, 5)]: assert shared_levels(times, part) == set(times[:0:-1][:n])
    assert shared_levels([-1], 1.) == set() and shared_levels(range(-1, 100), .07) == set(range(93, 100))


def test_off_changes_nothing(pipe, loras, monkeypatch):
    "Not a bit: the same rows through the same processors, and none of the machinery is entered."
    for name in ('with_keyframes', 'adain', 'self_attentions'): monkeypatch.setattr(f'cmvc_nb.it2v.{name}', lambda *a: pytest.fail(f'{name} was called'))
    with switched(pipe, attention=0.): out = pipe(*ENDS, W_I, W_L, 'a', loras, **SMALL)
    assert out.evaluations == 2*5*3 + 3*5

@pytest.mark.parametrize('init', ['slerp', 'lerp', 'sdedit'])
def test_a_keyframe_itself_sees_no_difference(pipe, loras, init):
    "One keyframe given as both, and a frame at w = 1: its own keys and values are those it is given."
    one, w = (ENDS[0], ENDS[0]), np.ones(1)
    for ends, pair, w_i in [(one, (loras[0], loras[0]), W_I.numpy()), (ENDS, loras, w), (ENDS, loras, 0*w)]:
        def make():
            with pipe.clip(*ends, 'a', pair, init=init, **SMALL) as c, torch.no_grad(): return c.batch(*torch.tensor(np.stack([w_i, w_i])))
        off = make()
        with switched(pipe, attention=1.): torch.testing.assert_close(make(), off, atol=2e-5, rtol=1e-5)

@pytest.mark.parametrize('init', ['slerp', 'ddim'])
def test_bytes_of_a_frame_depend_on_its_own_weights_only(pipe, loras, init):
    w = uniform_schedule(7)
    one, two = np.stack([w, w]), np.stack([w/2, 1-w])
    mixed = np.where(np.arange(7) % 2, one, two)
    with switched(pipe, attention=.6, adain=True):
        f = [pipe(*ENDS, *v, 'a', loras, init=init, **SMALL).frames for v in (one, two, mixed)]
    assert not np.array_equal(f[0], f[1]) and all(np.array_equal(f[2][i], f[0 if i % 2 else 1][i]) for i in range(7))

def test_gradients_reach_both_weights_and_are_right(pipe, loras):
    true = torch.stack([to_pixels(f) for f in CLIP[[2, 5]]])
    with switched(pipe, attention=.6, adain=True, share=1.), pipe.clip(*ENDS, 'a', loras, init='slerp', **SMALL) as c:
        w = torch.tensor([[.6, .3], [.2, .7]], requires_grad=True)
        D = lambda w: (c.batch(*w.T) - true).square().mean((1, 2, 3))
        D(w).sum().backward()
        for j in (0, 1):
            e = torch.zeros(2, 2); e[:, j] = 1e-2
            with torch.no_grad(): slope = (D(w + e) - D(w - e))/2e-2
            torch.testing.assert_close(w.grad[:, j], slope, rtol=.05, atol=2e-4)
    assert (w.grad != 0).all()
    with switched(pipe, attention=.6, adain=True):
        f = search_weights(pipe, CLIP[2:4], *ENDS, 'a', loras, 'gradient', dict(steps=3, lr=.02), init='slerp', **SMALL)
        assert f.history[-1] < f.history[0] and np.array_equal(pipe(*ENDS, *f.w.T, 'a', loras, init='slerp', **SMALL).frames, f.frames)

def test_gradient_of_the_attention_alone(pipe):
    "w reaches the keys and values, not only the noise that the frames start from."
    w, x, text = torch.tensor([.3], requires_grad=True), torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), pipe.encode_prompt('a').expand(3, -1, -1)
    with keyframe_attention(pipe.unet, w): pipe.unet(x, 500, text).sample[2].square().sum().backward()
    assert w.grad.abs() > 1e-4


def test_processors_come_back(pipe, loras):
    before, layers = pipe.unet.attn_processors, self_attentions(pipe.unet)
    with pytest.raises(RuntimeError, match='stop'), keyframe_attention(pipe.unet, W_I):
        assert [n for n, p in pipe.unet.attn_processors.items() if type(p) is KeyframeAttention] == [f'{n}.processor' for n in layers]
        raise RuntimeError('stop')
    same = lambda: all(a is b for a, b in zip(before.values(), pipe.unet.attn_processors.values(), strict=True))
    assert same()
    hook = pipe.unet.conv_out.register_forward_pre_hook(lambda m, a: (_ for _ in ()).throw(RuntimeError('deep')) if len(a[0]) == 5 else None)
    with switched(pipe, attention=1.), pytest.raises(RuntimeError, match='deep'): pipe(*ENDS, W_I, W_L, 'a', loras, **SMALL)
    hook.remove()
    assert same() and not lora_layers(pipe.unet)

def test_half_precision_and_options_of_a_folder(tmp_path, loras):
    folder = make_dummy_sd(tmp_path/'sd')
    options = dict(lora_rank=2, attention=.6, adain=True, init='slerp')
    a = DualLoRAPipeline.from_pretrained(folder, use_safetensors=True, **options)
    a.save_pretrained(tmp_path/'own')
    b = DualLoRAPipeline.from_pretrained(tmp_path/'own', use_safetensors=True)
    assert (b.config.attention, b.config.adain) == (.6, True)
    made = [p(*ENDS, W_I, W_L, 'a', loras, **SMALL).frames for p in (a, b)]
    plain = DualLoRAPipeline.from_pretrained(folder, use_safetensors=True, lora_rank=2, init='slerp')
    assert np.array_equal(*made) and not np.array_equal(made[0], plain(*ENDS, W_I, W_L, 'a', loras, **SMALL).frames)
    half = a.to(torch.bfloat16)(*ENDS, W_I, W_L, 'a', loras, **SMALL).frames
    assert np.abs(half.astype(float) - made[0]).mean() < 8


class Strange:
    "A processor that does something of its own."
    def __call__(self, attn, hidden_states, **k): return hidden_states

def test_refusals(pipe):
    from diffusers import UNet2DConditionModel, UNet2DModel
    from diffusers.models.attention_processor import AttnProcessor
    with pytest.raises(CmvcError, match='attention 1.5'): DualLoRAPipeline(**dummy_components(), attention=1.5)
    assert len(self_attentions(pipe.unet)) == 4 and all(n.endswith('attn1') for n in self_attentions(pipe.unet))
    parts = dummy_components()
    parts['unet'].set_attn_processor(Strange())
    ran = parts['unet'].register_forward_pre_hook(lambda *a: pytest.fail('too late'))
    odd = DualLoRAPipeline(**parts, attention=.5)
    with pytest.raises(CmvcError, match='Strange.*set_attn_processor'): odd(*ENDS, frames=1, **SMALL)
    parts['unet'].set_attn_processor(AttnProcessor()); self_attentions(parts['unet'])
    ran.remove()
    with pytest.raises(CmvcError, match='UNet2DModel'): self_attentions(UNet2DModel(block_out_channels=(8,), down_block_types=('DownBlock2D',), up_block_types=('UpBlock2D',), norm_num_groups=4))
    make = lambda down, up, **k: UNet2DConditionModel(block_out_channels=(8,), layers_per_block=1, down_block_types=(down,), up_block_types=(up,), cross_attention_dim=8, norm_num_groups=4, attention_head_dim=2, **k)
    for unet in [make('CrossAttnDownBlock2D', 'CrossAttnUpBlock2D', only_cross_attention=True), make('AttnDownBlock2D', 'AttnUpBlock2D'), make('DownBlock2D', 'UpBlock2D', mid_block_type=None)]:
        with pytest.raises(CmvcError, match='plain self-attention'): self_attentions(unet)
    with pytest.raises(CmvcError, match='3 rows for 3 weights'), keyframe_attention(pipe.unet, W_I): pipe.unet(torch.zeros(3, 4, 8, 8), 1, torch.zeros(3, 77, 16))


# ---- even steps

def test_spacing():
    f = np.zeros((3, 18, 20, 3), np.uint8)
    f[1], f[2] = 10, 40
    assert np.allclose(spacing(f), [10, 30])
    f[:, ::2, ::2] += 100
    checks = np.indices((16, 16)).sum(0) % 2*200
    fine = np.stack([checks, 200 - checks])[..., None].repeat(3, -1)
    assert spacing(fine)[0] == 0 and spacing(np.stack([fine[0], fine[0]*0]))[0] == 100   # detail that averages out does not count

@pytest.fixture(scope='module')
def tiny():
    from cmvc_nb.models import load_models
    return load_models('tiny', 'cpu').it2v

def test_even_weights_make_even_steps(tiny):
    "On a drawn pan, where much is generated: steps from keyframe to keyframe, before and after rounding to the file's grid."
    film, n = world.video(3, 11, 64, 'pan')[0], 9
    ends, options, uniform = (film[0], film[-1]), dict(num_inference_steps=10, strength=.7, init='slerp'), uniform_schedule(n)
    uneven = lambda frames: (lambda d: d.std()/d.mean())(spacing(np.concatenate([film[:1], frames, film[-1:]])))
    with switched(tiny, share=1.):
        with tiny.clip(*ends, **options) as c:
            before = c.evaluations
            w = even_weights(c, n)
            assert c.evaluations - before == 8*2 and len(c.times) == 8                     # few frames, few steps; the clip is as it was
            assert w.shape == (n,) and w.dtype == np.float64 and (np.diff(w) < 0).all() and 0 < w.min() and w.max() < 1
            was, now = uneven(c.frames(uniform, uniform)), uneven(c.frames(w, w))
        found = search_weights(tiny, film[1:-1], *ends, method='even', **options)
        assert np.array_equal(found.q, quantise_weights(np.stack([w, w], 1), uniform)) and found.q.any() and found.evaluations == 8*2 + n*7
        assert np.array_equal(found.frames, tiny(*ends, *dequantise_weights(found.q, uniform).T, **options).frames)
    assert was > .2 and now < .5*was and uneven(found.frames) < .6*was

def test_even_weights_where_nothing_differs(pipe):
    with pipe.clip(ENDS[0], ENDS[0], strength=0) as c: assert np.allclose(even_weights(c, 3), uniform_schedule(3))
    with pipe.clip(*ENDS, strength=0) as c: assert np.allclose(even_weights(c, 5), uniform_schedule(5), atol=.01) and c.evaluations == 0   # a blend is even
    with pipe.clip(*ENDS, num_inference_steps=3, strength=.3) as c: assert np.allclose(even_weights(c, 1, probes=2, steps=9), .5) and c.evaluations == 2*3 + 2
    assert search_weights(pipe, CLIP[:0], *ENDS, method='even', **SMALL).frames.shape == (0, 64, 64, 3)
