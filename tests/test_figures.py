"The measures of what was asked of the embedded models."
import json

import numpy as np
import pytest
from hypothesis import given, strategies as st

from cmvc_nb.figures import camera_kind, camera_prompts, card, compare_words, cut_drop, linear_psnr, named, square, summary, time_correlation, top1
from cmvc_nb.models import PRESETS
from cmvc_nb.representation import Motion, motion_sentence, parse_camera

A = 'A dim scene in soft light with a large plain blue area across the top, and a small rough red area on the left.'


def test_named_counts_colour_and_place_together():
    assert named(A, A) == 1 and named(A, 'nothing') == 0 and named('', A) == 0
    assert named(A, A.replace('plain', 'rough').replace('small', 'huge')) == 1                          # sizes and textures are not asked here
    assert named(A, A.replace('on the left', 'on the right')) == .5 and named(A, A.replace('blue', 'red').replace('red area on', 'blue area on')) == 0
    w = compare_words([A]*8, [A]*8)
    assert w['named'] == w['named, other texts'] == 1 and abs(w['agreement'] - 1) < 1e-6


def test_retrieval_against_a_plain_count():
    rng = np.random.default_rng(0); v = rng.normal(size=(40, 6)); v /= np.linalg.norm(v, axis=1, keepdims=True)
    t = v + .8*rng.normal(size=v.shape); t /= np.linalg.norm(t, axis=1, keepdims=True)
    assert top1(v, v) == 1 and top1(v, t, 40) == np.mean((v @ t.T).argmax(1) == np.arange(40)) and top1(v, t, 2) > top1(v, t, 40)
    assert abs(top1(v, rng.permutation(t), 4, 50) - .25) < .12                                          # chance


def test_time_and_cuts():
    a = np.stack([np.cos(np.arange(12)/12), np.sin(np.arange(12)/12)], 1); b = -a
    assert time_correlation(a) < -.99 and abs(time_correlation(np.random.default_rng(0).normal(size=(60, 8)))) < .1
    assert cut_drop(a, b) > 100 and abs(cut_drop(a[:6], a[6:]) - 1) < .01


@given(st.sampled_from([.1, .2, .33]), st.sampled_from([-1, 1]))
def test_the_kind_of_a_move_is_the_largest(v, sign):
    assert camera_kind(Motion(sign*v, .02, 1.02, 1)) == ('pans right' if sign > 0 else 'pans left') and camera_kind(Motion(.01, sign*v, 1, 0)) == ('tilts up' if sign > 0 else 'tilts down')
    assert camera_kind(Motion(0, 0, (1+v)**sign, 0)) == ('zooms in' if sign > 0 else 'zooms out') and camera_kind(Motion(0, 0, 1, sign*100*v)) == ('rotates clockwise' if sign > 0 else 'rotates anticlockwise')
    assert camera_kind(Motion(.01, -.01, 1.01, .5)) == 'is still'


def test_prompts_ask_for_every_kind_and_say_so():
    kinds = [camera_kind(m) for m in camera_prompts(100)]
    assert len(set(kinds)) == 9 and kinds.count('is still') == 20 and camera_prompts(100) == camera_prompts(100)
    assert [camera_kind(parse_camera(motion_sentence(m))) for m in camera_prompts(100)] == kinds         # the sentences name them


def test_the_linear_line_is_the_least_error_of_any_projection():
    f = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    assert linear_psnr(f, 8) < linear_psnr(f, 16) < linear_psnr(f, 64) and linear_psnr(f, 192) > 100
    b = f.reshape(2, 4, 8, 4, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 16, 192).astype(float); u = np.linalg.svd((b-b.mean((0, 1))).reshape(32, 192), full_matrices=False)[2][:8]
    x = b-b.mean((0, 1)); assert abs(linear_psnr(f, 8) - np.mean([10*np.log10(255**2/((e - e @ u.T @ u)**2).mean()) for e in x])) < 1e-6


@pytest.mark.parametrize('h,w', [(300, 500), (256, 256), (512, 300), (100, 90)])
def test_square_takes_the_middle(h, w):
    im = np.zeros((h, w, 3), np.uint8); im[h//2-2:h//2+2, w//2-2:w//2+2] = 255; s = square(im, 128)
    assert s.shape == (128, 128, 3) and s[60:68, 60:68].max() > 150 and s[:40].max() == 0


def test_the_shipped_figures_are_in_the_shipped_card():
    f, log = (json.loads((PRESETS/'tiny'/n).read_text()) for n in ('figures.json', 'training.json'))
    told = (PRESETS/'tiny/README.md').read_text(encoding='utf-8')
    for row in summary(f): assert all(x in told for x in row)
    assert card('x', f, log, 'y').splitlines()[2:] != told.splitlines()[2:] and set(log) == {'vae', 'text', 'unet', 'motion', 'clip'} and len(summary(f)) == 14
    assert f['kodak_psnr'] > 25.5 and f['clip_top1'] > .6 and f['words']['named'] > 3*f['words']['named, other texts']
