"""The search for w_i and w_l: closed form, trellis, closed loop, price, both methods, the table."""
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cmvc_nb.entropy import LEVELS, dequantise_weights
from cmvc_nb.errors import CmvcError
from cmvc_nb.it2v import DualLoRAPipeline, to_uint8, uniform_schedule
from cmvc_nb.search import (ablate, batched, best_blend, best_start, blends, gradient, mse, paraboloid, search_weights, step_bits, trellis,
                            true_bits, weights_grid, weights_widget)
from dummies import dummy_components, moving_disc

torch.set_num_threads(1)
FILM = moving_disc(9)
ENDS, TRUE = (FILM[0], FILM[-1]), FILM[1:-1]
SMALL = dict(num_inference_steps=5, strength=.4)


@pytest.fixture(scope='module')
def pipe(): return DualLoRAPipeline(**dummy_components(), lora_rank=2, lora_lr=2e-2, batch_size=4, init='sdedit')


@pytest.fixture(scope='module')
def loras(pipe):
    f = pipe.fit({0: ENDS[0], 1: ENDS[1]}, {0: 'a', 1: 'a'}, 2, steps=4)
    return f[0], f[1]


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(-.5, 1.5), min_size=1, max_size=6))
def test_best_blend_finds_the_blend(w):
    a, b = np.full((4, 4, 3), 60, np.uint8), np.full((4, 4, 3), 160, np.uint8)
    target = blends(w, a, b)
    assert np.abs(best_blend(target, a, b) - w).max() <= .006          # half a level of a hundred
    assert np.array_equal(best_blend(target, a, a), uniform_schedule(len(w)))

def test_best_blend_beats_every_other():
    star = best_blend(TRUE, *ENDS)
    for w in [star + .05, star - .05, uniform_schedule(7)]: assert (mse(blends(star, *ENDS), TRUE) <= mse(blends(w, *ENDS), TRUE) + .3).all()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.floats(0, 3))
def test_trellis_is_optimal(seed, price):
    rng = np.random.default_rng(seed)
    cost, q = rng.random((4, 3))*4, rng.integers(-5, 6, (4, 3, 2))
    def J(path): return sum(cost[f, k] for f, k in enumerate(path)) + price*sum(
        step_bits(q[f, k] - (q[f-1, path[f-1]] if f else q[f, k])).sum() for f, k in enumerate(path) if f) + price*step_bits(q[0, path[0]]).sum()
    assert J(trellis(cost, q, price)) == pytest.approx(min(J(p) for p in itertools.product(range(3), repeat=4)))

def test_paraboloid_is_exact_on_a_plane():
    rng = np.random.default_rng(0)
    base, i, l = (rng.integers(0, 60, (3, 4, 4, 3)) for _ in range(3))
    frame = lambda q: (base + q[:, 0, None, None, None]*i + q[:, 1, None, None, None]*l).astype(np.uint8)
    zero, one = np.zeros((3, 2), int), np.ones(3, int)
    target = rng.integers(0, 255, base.shape).astype(np.uint8)
    e = paraboloid(target, frame(zero), [(frame(zero), frame(zero + [1, 0]), one), (frame(zero), frame(zero + [0, 1]), one)])
    for q in [(0, 0), (2, 0), (1, 1), (0, 3)]:
        q = np.tile(q, (3, 1))
        assert np.allclose(e(q[:, None])[:, 0], mse(frame(q), target), rtol=1e-4)


def test_closed_loop_and_never_worse_than_uniform(pipe, loras):
    found = search_weights(pipe, TRUE, *ENDS, 'a', loras, **SMALL)
    base = pipe(*ENDS, frames=7, prompt='a', loras=loras, **SMALL).frames
    assert found.q.shape == (7, 2) and found.q.dtype == np.int64 and (np.abs(found.q) <= LEVELS).all()
    assert np.array_equal(found.w, dequantise_weights(found.q, uniform_schedule(7)))
    again = pipe(*ENDS, *found.w.T, 'a', loras, **SMALL).frames
    assert np.array_equal(again, found.frames) and np.array_equal(mse(again, TRUE), found.mse)
    assert found.mse.mean() <= mse(base, TRUE).mean()
    assert found.evaluations == len(found.history)*7*2                    # sdedit: two of five steps, nothing else

def test_weights_that_made_the_target_are_found(pipe, loras):
    q = np.array([[8, 0]]*7)
    target = pipe(*ENDS, *dequantise_weights(q, uniform_schedule(7)).T, 'a', loras, **SMALL).frames
    found = search_weights(pipe, target, *ENDS, 'a', loras, **SMALL)
    base = mse(pipe(*ENDS, frames=7, prompt='a', loras=loras, **SMALL).frames, target).mean()
    assert found.mse.mean() < .1*base and np.abs(found.q[:, 0] - 8).max() <= 2

def test_negligible_gain_costs_nothing(pipe, loras):
    target = pipe(*ENDS, frames=7, prompt='a', loras=loras, **SMALL).frames
    found = search_weights(pipe, target, *ENDS, 'a', loras, **SMALL)
    assert not found.q.any() and true_bits(found.q) < 4
    dear = search_weights(pipe, TRUE, *ENDS, 'a', loras, search=dict(price=1e3), **SMALL)
    assert not dear.q.any()
    cheap = search_weights(pipe, TRUE, *ENDS, 'a', loras, search=dict(price=0), **SMALL)
    fair = search_weights(pipe, TRUE, *ENDS, 'a', loras, **SMALL)
    assert cheap.mse.mean() <= fair.mse.mean() and true_bits(fair.q) <= true_bits(cheap.q)

def test_one_pass_no_lora_one_frame_no_frame(pipe):
    for passes in (1, 2, 3, 6):
        f = search_weights(pipe, TRUE[:1], *ENDS, search=dict(passes=passes), **SMALL)
        assert f.q.shape == (1, 2) and not f.q[:, 1].any() and len(f.history) <= passes
    assert search_weights(pipe, TRUE[:0], *ENDS, **SMALL).frames.shape == (0, 64, 64, 3)
    same = search_weights(pipe, FILM[:1], ENDS[0], ENDS[0], **SMALL)                     # equal keyframes: w_i does nothing
    assert not same.q.any()


@pytest.mark.parametrize('optimiser,scale', [('adam', 'sum'), ('gd', 'sum'), ('gd', 'mean')])
def test_gradient_descends(pipe, loras, optimiser, scale):
    f = search_weights(pipe, TRUE[:3], *ENDS, 'a', loras, 'gradient', dict(steps=4, optimiser=optimiser, scale=scale, lr=.02 if optimiser == 'adam' else 1e-4), **SMALL)
    assert f.history[-1] < f.history[0] and np.array_equal(pipe(*ENDS, *f.w.T, 'a', loras, **SMALL).frames, f.frames)

def test_gradient_is_the_finite_difference(pipe, loras):
    true = torch.zeros(2, 3, 64, 64)
    with pipe.clip(*ENDS, 'a', loras, **SMALL | dict(init='ddim')) as c:
        w = torch.tensor([[.6, .3], [.2, .7]], requires_grad=True)
        D = lambda w: (c.batch(*w.T) - true).square().mean((1, 2, 3))
        D(w).sum().backward()
        for j in (0, 1):
            e = torch.zeros(2, 2); e[:, j] = 1e-2
            with torch.no_grad(): slope = (D(w + e) - D(w - e))/2e-2
            torch.testing.assert_close(w.grad[:, j], slope, rtol=.05, atol=1e-4)


def test_table(pipe, loras):
    found = search_weights(pipe, TRUE, *ENDS, 'a', loras, **SMALL)
    rows = ablate(pipe, TRUE, *ENDS, found.q, 'a', loras, lora_steps=2, perceptual=lambda a, b: float(np.abs(a.astype(float) - b).mean()), **SMALL)
    by = {r['row']: r for r in rows}
    assert len(by) == 7 and by['(c) full path']['mse'] == pytest.approx(found.mse.mean())
    assert by['(a) linear blend']['mse'] == pytest.approx(mse(blends(uniform_schedule(7), *ENDS), TRUE).mean())
    assert by['(a) linear blend']['evaluations'] == 0 and by['(c) full path']['evaluations'] == 14
    assert by['(c) without LoRA']['mse'] != by['(c) full path']['mse'] and by['(c) without motion text']['mse'] != by['(c) full path']['mse']

def test_perceptual_metric_runs():
    from cmvc_nb.search import ms_ssim
    big = np.repeat(np.repeat(TRUE[:2], 3, 1), 3, 2)
    assert ms_ssim(big, big) == pytest.approx(1) and ms_ssim(big, 255 - big) < .9

def test_grid_and_widget(pipe, loras):
    with pipe.clip(*ENDS, 'a', loras, **SMALL) as c: assert weights_grid(c, [0, 1], [0, .5, 1]).shape == (192, 128, 3)
    assert len(weights_widget(pipe, *ENDS, 'a', loras, **SMALL).children) == 3

@pytest.mark.parametrize('change,message', [(dict(target=TRUE[:, :32]), 'target'), (dict(target=TRUE.astype(float)), 'target'), (dict(method='magic'), 'magic'),
                                            (dict(method='gradient', search=dict(optimiser='lbfgs')), 'lbfgs')])
def test_refusals(pipe, change, message):
    with pytest.raises(CmvcError, match=message): search_weights(**dict(pipe=pipe, target=TRUE, image_0=ENDS[0], image_1=ENDS[1], **SMALL) | change)


def test_search_along_the_flow(pipe, loras):
    "It starts from the best blend that moves, and the table has rows for what that alone would show."
    options = SMALL | dict(init='flow')
    with pipe.clip(*ENDS, 'a', loras, **options) as c:
        uniform = uniform_schedule(7)
        at = lambda w: mse(to_uint8(c.start(torch.tensor(w, dtype=torch.float32))[0].detach()), TRUE)
        star = best_start(c, TRUE)
        grid = np.array([at(uniform + d) for d in np.linspace(-.25, .25, 21)])
        assert (at(star) <= np.quantile(grid, .25, axis=0) + 1).all() and at(star).mean() < at(uniform).mean()
        true = uniform + .1*np.sin(np.arange(7))                       # frames that are such blends: their weights come back
        made = to_uint8(c.start(torch.tensor(true, dtype=torch.float32))[0].detach())
        assert np.abs(best_start(c, made) - true).max() < .05
    found = search_weights(pipe, TRUE, *ENDS, 'a', loras, **options)
    assert found.mse.mean() <= found.history[0] and np.array_equal(found.frames, pipe(*ENDS, *found.w.T, 'a', loras, **options).frames)
    by = {r['row']: r['mse'] for r in ablate(pipe, TRUE, *ENDS, found.q, 'a', loras, lora_steps=2, perceptual=lambda a, b: 0., **options)}
    assert len(by) == 9 and by['(d) moving blend'] == pytest.approx(at(uniform).mean(), rel=1e-4) and by['(c) full path'] == pytest.approx(found.mse.mean())
