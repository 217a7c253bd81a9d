"""The blend that moves: against a computation of its own in float64, on motion that is known, at its ends, and where flow must not be believed."""
import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.ndimage import map_coordinates, uniform_filter

from cmvc_nb.flow import NEAR, SLACK, Flow, both_ways, warp
from dummies import moving_disc

CLIP = moving_disc(9)
ENDS = np.stack([CLIP[0], CLIP[-1]])
PIXELS = torch.from_numpy(ENDS).permute(0, 3, 1, 2).float()/127.5 - 1


def reference(images, pair, w):
    "One moment by formula, float64: both of `pair` (2,C,H,W) pulled there, and how far they are believed; `images` say how things move."
    there, back = np.float64(both_ways(images)).transpose(0, 2, 3, 1)
    H, W, _ = there.shape
    y, x = np.mgrid[:H, :W].astype(float)
    s, x0, x1 = 1 - w, *np.asarray(pair, np.float64)
    pull = lambda v, f: np.stack([map_coordinates(c, [y + f[..., 1], x + f[..., 0]], order=1, mode='nearest') for c in v])
    a, b = pull(x0, -(1-s)*s*there + s*s*back), pull(x1, (1-s)**2*there - s*(1-s)*back)
    apart = lambda d: uniform_filter((d**2).mean(0), NEAR, mode='mirror') + SLACK
    still, moving = apart(x0 - x1), apart(a - b)
    return a, b, np.clip(4*still/(still + moving) - 1.5, 0, 1)

def reference_blend(images, pair, w):
    "The moving blend (C,H,W) and the trust (H,W)."
    a, b, m = reference(images, pair, w)
    eq5 = w*pair[0] + (1-w)*pair[1]
    return eq5 + m*(w*a + (1-w)*b - eq5), m

def textured(shift, side=128, seed=0):
    "A smooth random field, moved by whole pixels."
    rng = np.random.default_rng(seed)
    field = cv2.GaussianBlur(rng.uniform(0, 255, (2*side, 2*side, 3)).astype(np.float32), (0, 0), 4)
    field = np.clip((field - field.mean())*6 + 128, 0, 255).astype(np.uint8)
    dx, dy = shift
    return np.ascontiguousarray(field[side//2-dy:side//2-dy+side, side//2-dx:side//2-dx+side])


@pytest.mark.parametrize('w', [1., .8, .5, .13, 0., 1.4, -.3])
def test_equals_the_formula(w):
    ours, m = Flow(ENDS).blend(torch.tensor([w]), PIXELS)
    own, trust = reference_blend(ENDS, PIXELS.numpy().astype(float), w)
    assert np.abs(ours[0].numpy() - own).max() < 1e-3 and np.abs(m[0, 0].numpy() - trust).max() < 1e-3


def test_known_motion_is_followed():
    a, b = textured((0, 0)), textured((6, -4))
    flow = both_ways([a, b])[:, :, 16:-16, 16:-16]
    assert np.abs(np.median(flow, (2, 3)) - [[6, -4], [-6, 4]]).max() < .2
    pair = torch.from_numpy(np.stack([a, b])).permute(0, 3, 1, 2).float()/127.5 - 1
    made, m = Flow([a, b]).blend(torch.tensor([.5]), pair)
    true = torch.from_numpy(textured((3, -2))).permute(2, 0, 1).float()/127.5 - 1
    error = lambda x: float((x - true)[:, 16:-16, 16:-16].square().mean())
    assert error(made[0]) < .02*error(pair.mean(0)) and m[..., 16:-16, 16:-16].mean() > .9


def test_the_ends_are_the_pictures():
    made, _ = Flow(ENDS).blend(torch.tensor([1., 0.]), PIXELS)
    assert (made - PIXELS).abs().max() < 1e-4


def test_where_nothing_moves_it_is_the_blend_of_eq_5():
    same = np.stack([ENDS[0], ENDS[0]])
    pair = torch.stack([PIXELS[0], PIXELS[0]*.5])                  # the pictures do not move, what they carry differs
    assert Flow(same).ways.abs().max() < .05
    made, _ = Flow(same).blend(torch.tensor([.3]), pair)
    assert (made[0] - (.3*pair[0] + .7*pair[1])).abs().max() < .02


def test_what_disagrees_is_not_believed():
    a, b = textured((0, 0)), textured((0, 0), seed=1)
    pair = torch.from_numpy(np.stack([a, b])).permute(0, 3, 1, 2).float()/127.5 - 1
    f = Flow([a, b])
    worse = torch.stack([pair[:1], pair[1:] + 1])                  # a warp that makes it worse
    assert f.trust(pair, worse).mean() < .2 < .9 < f.trust(pair, torch.stack([pair[:1], pair[:1]])).mean()


def test_threads_do_not_matter_and_are_left_as_they_were():
    before, made = cv2.getNumThreads(), []
    try:
        for n in (1, 2, 7):
            cv2.setNumThreads(n)
            made.append(both_ways(ENDS)); assert cv2.getNumThreads() == n
    finally: cv2.setNumThreads(before)
    assert np.array_equal(made[0], made[1]) and np.array_equal(made[0], made[2])


def test_a_moment_depends_on_its_own_weight_only():
    f, w = Flow(ENDS), torch.tensor([.9, .4, .1])
    all_at_once = f.blend(w, PIXELS)[0]
    assert all(torch.equal(all_at_once[i:i+1], f.blend(w[i:i+1], PIXELS)[0]) for i in range(3))


@given(st.floats(.05, .95))
@settings(deadline=None, max_examples=8)
def test_gradient_in_the_weight(w):
    f, target = Flow(ENDS), torch.from_numpy(CLIP[4]).permute(2, 0, 1).double()/127.5 - 1
    f.ways = f.ways.double()
    cost = lambda v: (f.blend(v, PIXELS.double())[0][0] - target).square().mean()
    v = torch.tensor([w], dtype=torch.double, requires_grad=True)
    slope, = torch.autograd.grad(cost(v), v)
    numeric = (cost(torch.tensor([w+1e-5]).double()) - cost(torch.tensor([w-1e-5]).double()))/2e-5
    assert abs(float(slope) - float(numeric)) < .02*abs(float(numeric)) + 1e-4


def test_warp_of_whole_pixels_and_beyond_the_border():
    x = torch.rand(1, 2, 8, 8)
    right = torch.tensor([1., 0]).reshape(1, 2, 1, 1).expand(1, 2, 8, 8)
    assert torch.allclose(warp(x, right)[..., :-1], x[..., 1:], atol=1e-6) and torch.allclose(warp(x, right)[..., -1], x[..., -1], atol=1e-6)
    assert torch.allclose(warp(x, 0*right), x, atol=1e-6)
