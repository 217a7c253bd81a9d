import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cmvc_nb.errors import CmvcError
from cmvc_nb.models import load_models
from cmvc_nb.pipelines import resample
from cmvc_nb.tt2v import AnimateDiffTT2V, fit_text, frame_steps, step_noise, straighten, windows
from dummies import dummy_tokenizer
from dummies_models import make_dummy_preset

A, B, C, M = 'a red sky', 'a green field', 'a blue sea', 'pans left'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_dummy_preset(tmp_path_factory.mktemp('tt2v')).parent


@pytest.fixture(scope='module')
def tv(folder):
    return load_models(folder, 'cpu').tt2v


def make(tv, ends=(A, B), motion=M, n=6, h=32, w=32, **kwargs):
    return tv.generate(ends, motion, n, h, w, **{'steps': 2, **kwargs})


@pytest.mark.parametrize('n', [2, 3, 5, 8, 9, 17, 33, 160])
def test_any_length(tv, n):
    x = make(tv, n=n, h=32, w=64)
    assert x.shape == (n, 32, 64, 3) and x.dtype == np.uint8


@pytest.mark.parametrize('n', [2, 3, 9, 33])
def test_clips_join_on_their_anchors(tv, n):
    one, two = make(tv, (A, B), n=n), make(tv, (B, C), 'zooms in', n=n)
    assert (one[-1] == two[0]).all() and (one[0] == tv.anchor(A, 32, 32, 0, 2)[1]).all()
    assert (one[0] != one[-1]).any()


def test_a_join_does_not_stand_out(tv):
    "The step at a join is made like the steps beside it: noise and drift know nothing of the ends."
    one, two = make(tv, (A, B), n=17), make(tv, (B, C), n=17)
    steps = frame_steps(np.concatenate([one, two[1:]]))
    assert steps[15:17].max() <= 1.5*np.median(steps) + .5                 # half a grey level: rounding


def test_a_clip_depends_on_its_own_texts_and_the_seed_only(folder, tv):
    make(tv, (B, C), 'other', n=5)                                         # what was decoded before does not matter
    fresh = load_models(folder, 'cpu').tt2v
    assert (make(tv) == make(fresh)).all() and (make(tv) == make(tv)).all()


def test_everything_named_changes_the_frames(tv):
    base = make(tv)
    for other in (make(tv, (C, B)), make(tv, (A, C)), make(tv, motion='zooms in a lot'), make(tv, seed=1), make(tv, steps=3), make(tv, guidance_scale=4.)):
        assert (other[1:-1] != base[1:-1]).any()
    assert (make(tv, motion='zooms in a lot')[[0, -1]] == base[[0, -1]]).all()      # anchors know nothing of the motion
    assert (make(tv, (A, C))[0] == base[0]).all()


def test_frames_move_and_are_not_a_blend_of_the_ends(tv):
    x = make(tv, n=9).astype(np.float32)
    blend = resample(x[[0, -1]], 9)
    assert np.abs(x - blend)[1:-1].mean() > .2


def test_the_motion_module_and_every_frames_text_are_used(folder, tv):
    "Independent computation: one step, one window, straight through the UNet."
    tv1 = load_models(folder, 'cpu').tt2v
    got = tv1._sample((torch.zeros(4, 8, 8), torch.zeros(4, 8, 8)), (A, B), 8, 3, 1, 1., None)
    e = torch.cat([tv1._embed(A), tv1._embed(B)])
    text = torch.stack([e[0] + (e[1] - e[0])*w/7 for w in range(8)])
    s = tv1._schedule(1)
    z = s.add_noise(torch.zeros(8, 4, 8, 8), step_noise(3, 8, (4, 8, 8), .5)[1], s.timesteps[:1])
    with torch.no_grad(): v = tv1.pipe.unet(z.movedim(0, 1)[None], s.timesteps[0], encoder_hidden_states=text).sample[0].movedim(0, 1)
    assert torch.allclose(got, s.step(v, s.timesteps[0], z).prev_sample, atol=1e-5)
    still = torch.stack([tv1.image_unet(z[w:w+1], s.timesteps[0], encoder_hidden_states=text[w:w+1]).sample[0] for w in range(8)])
    assert (still - v).abs().max() > 1e-3                                  # the motion module does something


def test_the_batch_of_windows_does_not_matter(folder):
    one = load_models(folder, 'cpu').tt2v
    two = AnimateDiffTT2V(one.pipe, one.image_unet, context=one.context, share=one.share, max_batch=1, chunk=1)
    a, b = make(one, n=20, steps=3).astype(int), make(two, n=20, steps=3).astype(int)
    assert np.abs(a - b).max() <= 1


def test_guidance_and_strength(folder):
    one = load_models(folder, 'cpu').tt2v
    low = AnimateDiffTT2V(one.pipe, one.image_unet, context=8, share=1., strength=.01)
    ends, calls = make(low, n=9, steps=4), []
    assert (ends[0] == make(one, n=9, steps=4)[0]).all()
    make(low, n=9, steps=4, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] == 2 and len(calls) <= 2           # one step, two windows
    for bad in (dict(strength=0), dict(strength=2), dict(share=-1)):
        with pytest.raises(CmvcError): AnimateDiffTT2V(one.pipe, one.image_unet, **bad)


@pytest.mark.parametrize('kwargs', [dict(n=1), dict(n=0), dict(n=-3), dict(n=2.5), dict(h=60), dict(w=0), dict(steps=0), dict(steps=10**9), dict(ends=(A,)), dict(ends=(A, None)), dict(motion=None)])
def test_bad_requests(tv, kwargs):
    with pytest.raises(CmvcError): make(tv, **kwargs)


@pytest.mark.parametrize('text', ['', ' ', '.', '日本語のテキスト', '🎈🎈', 'x'*10_000, 'word '*5000, 'A. '*500, '\x00\n\t'])
def test_any_text_generates(tv, text):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert make(tv, (text, A), text, n=3, steps=1).shape == (3, 32, 32, 3)


@settings(max_examples=40)
@given(st.text(max_size=400), st.text(max_size=120), st.integers(12, 77))
def test_fitted_text_fits(text, after, limit):
    tok = dummy_tokenizer()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        out = fit_text(tok, text, after, limit)
    assert len(tok(out).input_ids) <= limit
    if not told: assert out == ' '.join(filter(None, (text.strip(), after.strip())))


def test_text_is_cut_at_a_sentence_and_the_motion_stays():
    tok = dummy_tokenizer()
    with pytest.warns(UserWarning, match='cut'): out = fit_text(tok, 'A red ball lies here. It is big, and it is near. ' + 'And more words come. '*9, 'Pans left.')
    assert out.endswith('. Pans left.') and out.startswith('A red ball lies here.') and len(tok(out).input_ids) <= 77
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert fit_text(tok, 'A ball.', 'Pans.') == 'A ball. Pans.' and fit_text(tok, ' A ball. ') == 'A ball.'


@given(st.integers(2, 400), st.integers(6, 32), st.booleans())
def test_windows_cover(frames, context, wide):
    w = windows(frames, context, wide)
    assert max(map(len, w)) <= context and set(np.concatenate(w)) == set(range(frames)) and all((np.diff(i) > 0).all() for i in w)
    if wide: assert len(np.concatenate(w)) == frames
    elif len(w) > 1: assert all(len(set(a) & set(b)) >= 3 for a, b in zip(w, w[1:]))


@given(st.integers(2, 50), st.integers(0, 5))
def test_straighten_puts_the_ends_and_keeps_the_bends(n, seed):
    x = np.random.default_rng(seed).normal(size=(n, 3, 2)).astype(np.float32)
    a, b = np.ones((3, 2), np.float32), np.full((3, 2), -2, np.float32)
    y = straighten(x, a, b)
    assert np.allclose(y[0], a, atol=1e-5) and np.allclose(y[-1], b, atol=1e-5)
    assert np.allclose(np.diff(y, 2, axis=0), np.diff(x, 2, axis=0), atol=1e-4)
    assert np.allclose(straighten(torch.tensor(x), torch.tensor(a), torch.tensor(b)), y, atol=1e-5)


def test_noise_has_unit_variance_and_the_share_asked_for():
    common, each = step_noise(1, 6, (4, 32, 32), .7)
    assert torch.equal(common, step_noise(1, 0, (4, 32, 32))[0]) and torch.equal(each[:3], step_noise(1, 3, (4, 32, 32), .7)[1])
    assert abs(each.var() - 1) < .05 and abs((each[0]*each[1]).mean() - .7) < .05 and (step_noise(2, 0, (4, 32, 32))[0] != common).any()


def test_memory_does_not_grow_with_a_clip(tv):
    "Latents and frames grow; the UNet's and the VAE's work, which is far larger, does not."
    sizes = []
    hook = tv.pipe.unet.register_forward_pre_hook(lambda m, args: sizes.append(args[0].shape[0]*args[0].shape[2]))
    decoded = []
    decode = tv.pipe.vae.decode
    tv.pipe.vae.decode = lambda z, *args, **kwargs: decoded.append(len(z)) or decode(z, *args, **kwargs)
    try: make(tv, n=120, h=16, w=16, steps=2)
    finally:
        hook.remove()
        del tv.pipe.vae.decode
    assert max(sizes) <= tv.max_batch and max(decoded) <= 8 and len(tv._anchors) <= 4


def test_the_autoencoder_takes_what_fits(monkeypatch, capsys):
    "On a GPU eight frames at a time, fewer of large ones, by the memory there is and not by what is free; said once."
    from types import SimpleNamespace
    from cmvc_nb.tt2v import vae_batch
    class Latents(np.ndarray): # on a GPU that is not here
        device = SimpleNamespace(type='cuda')
        def numel(self): return self.size
    memory = SimpleNamespace(total_memory=8e9)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(total_memory=int(memory.total_memory)))
    on_gpu = lambda side: vae_batch(np.zeros((1, 4, side, side)).view(Latents))
    assert [on_gpu(s) for s in (8, 32, 64, 256)] == [8, 3, 1, 1]
    assert '3 frames of this size' in (said := capsys.readouterr().err) and '1 frame of' in said and '8 frames' not in said
    memory.total_memory = 140e9
    assert [on_gpu(s) for s in (32, 64, 128)] == [8, 8, 4]
    assert vae_batch(torch.zeros(1, 4, 8, 8)) == 1 and vae_batch(torch.zeros(1, 4, 8, 8, device='meta')) == 8
