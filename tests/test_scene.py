"What the words fix: the sketch, the camera's path, and clips that follow it."
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cmvc_nb.models import load_models
from cmvc_nb.representation import Motion, PALETTE, PLACES, agreement, describe_keyframe, motion_sentence, parse_camera
from cmvc_nb.scene import FINE, camera_path, camera_step, carry, scene_noise, see_noise, sketch
from cmvc_nb.tt2v import choose_seed, frame_steps, step_noise
from dummies_models import make_dummy_preset

LEFT, RIGHT, STILL = 'The camera pans left by a fifth of the frame; nothing else moves.', 'The camera pans right by a fifth of the frame; nothing else moves.', 'The camera is still; nothing else moves.'
WORDS = 'A bright scene in soft light with a large plain blue area across the top, a large rough green area across the bottom, and a small plain red area on the left.'
moves = st.builds(Motion, pan=st.floats(-1.2, 1.2), tilt=st.floats(-1.2, 1.2), zoom=st.floats(.6, 1.7), rotation=st.floats(-80, 80))


@given(moves)
def test_a_sentence_that_is_read_back_says_the_same(m):
    said = motion_sentence(m)
    assert motion_sentence(parse_camera(said)).split(';')[0] == said.split(';')[0]


@pytest.mark.parametrize('text,want', [('The camera pans to the left.', (-.1, 0, 1, 0)), ('the camera slowly moves towards the right', (.1, 0, 1, 0)), ('The camera tilts up slightly and zooms in.', (0, .035, 1.1, 0)),
                                       ('The camera rotates counterclockwise by 20 degrees', (0, 0, 1, -20)), ('A man pans for gold on the left', (0, 0, 1, 0)), ('', (0, 0, 1, 0)), ('The camera is still; a boat moves left', (0, 0, 1, 0))])
def test_free_english(text, want):
    m = parse_camera(text)
    assert np.allclose((m.pan, m.tilt, m.zoom, m.rotation), want)


@pytest.mark.parametrize('text', ['camera ' + 'pan '*50000, 'camera zooms in by ' + '9'*50000, 'camera rotates '*20000, 'a large '*30000, 'a red area '*20000])
def test_hostile_texts_are_read_quickly(text):
    t = time.perf_counter(); m = parse_camera(text); sketch(text, 32, 32)
    assert time.perf_counter() - t < 2 and .5 <= m.zoom <= 2 and abs(m.rotation) < 100 and abs(m.pan) <= 1


@given(moves, st.floats(0, 1))
def test_a_step_is_a_similarity_and_grows_from_nothing(m, s):
    p = camera_step(m, s, 24, 40)
    assert np.allclose(camera_step(m, 0, 24, 40), np.eye(3)) and np.allclose(p[2], (0, 0, 1))
    assert np.allclose(p[:2, :2] @ p[:2, :2].T, np.eye(2)*m.zoom**(-2*s))


def test_directions_are_the_describers():
    "What is in the frame's middle later lies right of it at first after a pan to the right; above it after a tilt up."
    at = lambda text: (camera_path([text], 100, 200)[1] @ (0, 0, 1))[:2]
    assert np.allclose(at(RIGHT), (40, 0)) and np.allclose(at(LEFT), (-40, 0)) and np.allclose(at('The camera tilts up by half the frame'), (0, -55))
    turned = camera_path(['The camera rotates clockwise by 90 degrees'], 100, 100)[1] @ (0, -1, 1)      # what is seen at the top then
    assert np.allclose(turned[:2], (1, 0))                                                              # was on the right
    assert np.allclose((camera_path(['The camera zooms in by 40 percent'], 100, 100)[1] @ (50, 0, 1))[0], 50/1.4)


@settings(max_examples=30)
@given(st.lists(moves.map(motion_sentence), max_size=12))
def test_the_path_is_the_product_of_its_steps_and_its_zoom_is_bounded(texts):
    p = camera_path(texts, 16, 16)
    zoom = 1/np.sqrt(np.linalg.det(p[:, :2, :2]))
    assert p.shape == (len(texts)+1, 3, 3) and np.allclose(p[0], np.eye(3)) and (zoom < 2.0001).all() and (zoom > .4999).all()
    assert (camera_path(texts[:-1], 16, 16) == p[:max(1, len(texts))]).all()                            # a prefix has a prefix
    assert np.allclose(camera_path([LEFT, RIGHT]*4, 16, 16)[-1], np.eye(3))


@settings(max_examples=15, deadline=None)
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(.5, 2), st.floats(-180, 180), st.integers(0, 2**32))
def test_noise_stays_white_wherever_it_is_seen_from(pan, tilt, zoom, rotation, seed):
    x = see_noise(scene_noise(seed, (8, 32, 48)), camera_step(Motion(pan, tilt, zoom, rotation), 1, 32, 48))
    assert x.shape == (8, 32, 48) and abs(x.var() - 1) < .08 and abs(x.mean()) < .05
    assert abs((x[..., 1:]*x[..., :-1]).mean()) < .2 and abs((x[:, 1:]*x[:, :-1]).mean()) < .2 and abs((x[0]*x[1]).mean()) < .1


def test_noise_moves_with_the_scene_and_comes_back():
    n = scene_noise(1, (4, 16, 24)); first = see_noise(n, np.eye(3))
    for dx, dy in ((3, 0), (0, -2), (-5, 4)):                                                           # whole pixels: the same values elsewhere
        x = see_noise(n, np.array([[1, 0, dx], [0, 1, dy], [0, 0, 1.]]))
        a, b = slice(max(0, dx), 24+min(0, dx)), slice(max(0, -dx), 24+min(0, -dx)); c, d = slice(max(0, dy), 16+min(0, dy)), slice(max(0, -dy), 16+min(0, -dy))
        assert torch.equal(x[:, d, b], first[:, c, a])
    assert torch.equal(see_noise(n, camera_path([LEFT, RIGHT], 16, 24)[-1]), first) and torch.equal(see_noise(n, np.array([[1, 0, 48], [0, 1, 32], [0, 0, 1.]])), first) # a torus
    near = [(see_noise(n, camera_step(Motion(d/24, 0, 1, 0), 1, 16, 24))*first).mean().item() for d in (0, .25, .5, 1)]
    assert near == sorted(near, reverse=True) and abs(near[2] - .5) < .15                               # part of a pixel: part of the noise
    assert not torch.equal(scene_noise(2, (4, 16, 24)), n)


def test_carry_is_its_own_inverse_where_both_see():
    y, x = torch.meshgrid(torch.arange(32.), torch.arange(48.), indexing='ij'); z = torch.stack([torch.sin(x/5), torch.cos(y/4), x*y/500])
    a, b = np.eye(3), camera_step(Motion(.1, -.1, 1.2, 8), 1, 32, 48)
    there, seen = carry(z, a, b); back, known = carry(there, b, a)
    assert torch.allclose(carry(z, b, b)[0], z, atol=1e-4) and carry(z, b, b)[1].min() == 1 and 0 < seen.mean() < 1
    assert (back-z).abs()[:, known[0] > 0].mean() < .05 < (there-z).abs().mean()


@pytest.mark.parametrize('place', PLACES)
def test_a_sketch_has_its_colours_in_their_places(place):
    for ragged in (None, torch.randn(8, 32, 32, generator=torch.Generator().manual_seed(0))):
        text = f'A bright scene in soft light with a large plain {"yellow"} area {place}, a medium plain dark blue area {"in the centre" if place not in ("in the centre", "across the middle", "everywhere") else "at the bottom left"}.'
        found = describe_keyframe(sketch(text, 256, 256, ragged))
        assert agreement(text, found) > .45, found


def test_a_sketch_of_every_colour_and_of_nothing():
    for c, rgb in PALETTE.items(): assert (sketch(f'a huge plain {c} area everywhere', 64, 96)[::8, ::8] == rgb).all()
    assert sketch('', 64, 64) is None and sketch('A dog runs over a green field.', 64, 64) is None and sketch(WORDS, 8, 8).shape == (8, 8, 3)
    noise = torch.randn(8, 16, 24, generator=torch.Generator().manual_seed(0)); a = sketch(WORDS, 128, 192, noise)
    assert (a == sketch(WORDS, 128, 192, noise)).all() and (a != sketch(WORDS, 128, 192, noise.flip(1))).any()


@pytest.fixture(scope='module')
def tv(tmp_path_factory):
    tv = load_models(make_dummy_preset(tmp_path_factory.mktemp('scene')).parent, 'cpu').tt2v
    tv.moving, tv.sketch = True, .5
    return tv


def make(tv, ends=(WORDS, 'a green field'), motion=LEFT, n=6, **kwargs): return tv.generate(ends, motion, n, 32, 48, **{'steps': 2, **kwargs})


@pytest.mark.parametrize('n', [2, 3, 9, 20])
def test_clips_join_where_the_camera_stands(tv, n):
    one, two = make(tv, n=n), make(tv, ('a green field', WORDS), RIGHT, n=n, before=(LEFT,))
    assert one.shape == (n, 32, 48, 3) and (one[-1] == two[0]).all()
    assert (make(tv, ('a green field', WORDS), RIGHT, n=n)[0] != two[0]).any()                          # elsewhere, another picture
    assert (make(tv, (WORDS, WORDS), n=2, before=(LEFT, RIGHT))[0] == one[0]).all()                     # back again, the same picture


def test_a_still_camera_has_one_noise_and_a_moving_one_has_not(tv):
    still, (common, each) = camera_path([STILL]*2, 8, 8), step_noise(3, 3, (4, 8, 8), .9, camera_path([STILL]*2, 8, 8))
    assert torch.equal(common[0], common[2]) and common.shape == each.shape == (3, 4, 8, 8) and (still == np.eye(3)).all()
    assert not torch.equal(*step_noise(3, 2, (4, 8, 8), 1., camera_path([LEFT], 8, 8))[0])
    assert frame_steps(make(tv, (WORDS, WORDS), STILL)).mean() < frame_steps(make(tv, (WORDS, WORDS), LEFT)).mean()


def test_switches_change_what_they_say(tv):
    a, free = make(tv), make(tv, ('a sea', 'a green field'), STILL)
    tv.sketch = 0.
    try: b, other = make(tv), make(tv, ('a sea', 'a green field'), STILL)
    finally: tv.sketch = .5
    assert (a[0] != b[0]).any() and (free == other).all() and (make(tv) == a).all()                     # free words have no sketch


def test_the_seed_is_judged_where_the_camera_stands(tv):
    asked = []
    class Spy:
        def generate(self, ends, motion, *a, before=(), **k): asked.append((ends, motion, before)); return np.zeros((2, 32, 32, 3), np.uint8)
    choose_seed(Spy(), ['a', 'b'], [WORDS]*2, 32, 32, range(2), before=[(), (LEFT,)])
    assert asked == [(('a', 'a'), '', ()), (('b', 'b'), '', (LEFT,))]*2
