"""Keyframe selection: eq. 1 against an independent computation, properties of every method, M3-CVC's decision, bad input."""
import subprocess, sys, tracemalloc
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from cmvc_nb.errors import CmvcError
from cmvc_nb.selection import (METHODS, distances, flow_magnitude, frame_features, grey_thumbnail, intervals, keyframe_count,
                               m3_keyframes, moving_distance, plot_selection, select_keyframes, selection_widget)

quick = settings(max_examples=60, deadline=None)

def embed(frames):
    "Means over a 4×4 grid, without their mean: enough to tell frames apart."
    b, h, w, _ = frames.shape
    x = frames[:, :h//4*4, :w//4*4].reshape(b, 4, h//4, 4, w//4, 3).astype(np.float32).mean((2, 4)).reshape(b, -1)
    return x - x.mean(1, keepdims=True)

def noise(T, h=48, w=64, seed=0): return np.random.default_rng(seed).integers(0, 256, (T, h, w, 3), np.uint8)

@st.composite
def vectors_and_n(draw):
    T = draw(st.integers(2, 40)); n = draw(st.integers(2, T))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return rng.normal(size=(T, draw(st.integers(2, 16)))).astype(np.float32), n

def brute(V, n, unlike):
    "Eq. 1 in scalar loops: exact fractions for the intervals, no code shared with the module."
    from fractions import Fraction
    T = len(V); keys = [0]
    for k in range(n-2):
        lo, hi = 1 + Fraction(k*(T-2), n-2), 1 + Fraction((k+1)*(T-2), n-2)
        best, where = -1.0, None
        for j in range(T):
            if int(lo) <= j < int(hi):
                d = unlike(V[keys[-1]], V[j])
                if d > best: best, where = d, j
        keys.append(where)
    return keys + [T-1]

def by_cosine(a, b):
    dot = sum(float(x)*float(y) for x, y in zip(a, b))
    return 1 - dot / (sum(float(x)**2 for x in a)*sum(float(y)**2 for y in b))**.5

def by_mse(a, b): return sum((float(x)-float(y))**2 for x, y in zip(a, b))/len(a)

@quick
@given(vectors_and_n())
def test_equation_1_agrees_with_brute_force(case):
    V, n = case
    assert select_keyframes(V, n=n) == brute(V, n, by_cosine)

@quick
@given(vectors_and_n())
def test_mse_agrees_with_explicit(case):
    V, n = case
    assert select_keyframes(V, n=n, method='mse') == brute(V, n, by_mse)

def test_mse_features_are_pictures():
    "On frames of 32×32 the thumbnails are the frames, so the distance is the frames' own MSE."
    f = noise(9, 32, 32); F = frame_features(f, 'mse')
    assert F.shape == (9, 3072) and F.dtype == np.float32
    want = [((f[0].astype(float) - g)**2).mean()/255**2 for g in f]
    np.testing.assert_allclose(distances(F, 0, range(9), 'mse'), want, rtol=1e-5)

def test_reference_moves():
    "With a fixed reference the second choice would be 3, the opposite of frame 0; the moving one takes 4, the opposite of frame 2."
    a, b = np.array([1., 0]), np.array([0., 1])
    V = np.stack([a, .9*a+.1*b, -b+.1*a, -a+.2*b, b, a]).astype(np.float32)
    assert select_keyframes(V, n=4) == [0, 2, 4, 5]

def test_both_looks_at_the_end_too():
    t = np.linspace(0, 1, 31); V = np.stack([np.cos(t), np.sin(t)], 1).astype(np.float32)
    assert select_keyframes(V, n=3) == [0, 29, 30]
    assert select_keyframes(V, n=3, both=True) == [0, 15, 30]

@quick
@given(vectors_and_n(), st.sampled_from(['cosine', 'mse', 'uniform', 'random']), st.integers(0, 9), st.booleans())
def test_properties(case, method, seed, both):
    V, n = case; T = len(V)
    keys = select_keyframes(V, n=n, method=method, seed=seed, both=both)
    assert keys == sorted(set(keys)) and len(keys) == n and keys[0] == 0 and keys[-1] == T-1
    assert all(type(k) is int for k in keys)
    assert keys == select_keyframes(V.copy(), n=n, method=method, seed=seed, both=both)
    if method in ('cosine', 'mse'): assert all(a <= k < b for (a, b), k in zip(intervals(T, n), keys[1:-1]))
    if method == 'uniform': assert np.ptp(np.diff(keys)) <= 1

@quick
@given(st.integers(2, 500).flatmap(lambda T: st.tuples(st.just(T), st.integers(2, T))))
def test_intervals_tile_the_inner_frames(case):
    T, n = case; cells = intervals(T, n)
    assert len(cells) == n-2 and [j for a, b in cells for j in range(a, b)] == (list(range(1, T-1)) if n > 2 else [])
    assert not cells or np.ptp([b-a for a, b in cells]) <= 1

@quick
@given(st.integers(2, 500), st.integers(1, 600))
def test_interval_bounds_uniform_clips(T, interval):
    n = keyframe_count(T, interval=interval)
    assert 2 <= n <= T
    assert np.diff(select_keyframes(T, interval=interval, method='uniform')).max() <= interval
    if n > 2: assert np.diff(select_keyframes(T, n=n-1, method='uniform')).max() > interval   # no fewer would do

@quick
@given(hnp.arrays(np.float32, st.tuples(st.integers(3, 20), st.just(3)), elements=st.sampled_from([0, 1, -1])), st.data())
def test_ties_and_zero_vectors_are_harmless(V, data):
    n = data.draw(st.integers(2, len(V)))
    keys = select_keyframes(V, n=n)
    assert len(keys) == n and keys == sorted(set(keys))
    d = moving_distance(V, keys)
    assert np.isfinite(d).all() and (-1e-9 <= d).all() and (d <= 2 + 1e-9).all()

def test_still_video_takes_the_middles():
    for V in (np.ones((33, 4)), np.zeros((33, 4)), np.ones((33, 4)) + np.random.default_rng(0).normal(size=(33, 4))*1e-8):
        assert select_keyframes(V.astype(np.float32), n=3) == [0, 16, 32]
        assert select_keyframes(V, n=3, method='mse') == [0, 16, 32]
    assert select_keyframes(np.ones((34, 4)), n=3) == [0, 16, 33]   # of two middles, the earlier

def test_zero_vector_is_unlike_others_but_like_itself():
    V = np.array([[0, 0], [0, 0], [1, 0]], np.float32)
    np.testing.assert_allclose(distances(V, 0, [0, 1, 2]), [0, 0, 1])
    np.testing.assert_allclose(distances(V, 2, [0, 1, 2]), [1, 1, 0])

def test_cosine_ignores_length():
    V = np.random.default_rng(1).normal(size=(30, 8)); S = V*np.random.default_rng(2).uniform(.1, 10, (30, 1))
    assert select_keyframes(V, n=6) == select_keyframes(S, n=6)

def test_random_is_seeded():
    a = [select_keyframes(100, n=8, method='random', seed=s) for s in range(20)]
    assert a == [select_keyframes(100, n=8, method='random', seed=s) for s in range(20)]
    assert len(set(map(tuple, a))) > 15
    assert {k for x in [select_keyframes(10, n=4, method='random', seed=s) for s in range(200)] for k in x[1:-1]} == set(range(1, 9))

def test_features_stream_in_batches():
    f, sizes = noise(23), []
    def spy(b): sizes.append(len(b)); assert b.dtype == np.uint8 and b.shape[1:] == (48, 64, 3); return embed(b)
    F = frame_features((x for x in f), 'cosine', spy, batch_size=8)
    assert sizes == [8, 8, 7] and F.dtype == np.float32
    np.testing.assert_array_equal(F, embed(f))
    M = frame_features(iter(f), 'm3', spy, batch_size=5)
    assert len(M) == 23 and M['grey'].dtype == np.uint8
    np.testing.assert_array_equal(M['embedding'], F)
    assert frame_features(f, 'uniform').shape == (23, 0)
    assert len(frame_features(list(f), 'cosine', embed, progress=True)) == 23

def test_memory_does_not_grow_with_length():
    def peak(T):
        tracemalloc.start()
        try: frame_features((np.full((360, 640, 3), i % 256, np.uint8) for i in range(T)), 'cosine', embed, batch_size=4); return tracemalloc.get_traced_memory()[1]
        finally: tracemalloc.stop()
    assert peak(60) < 1.2*peak(10)

def test_large_frames_make_smaller_batches():
    sizes = []
    frame_features((np.zeros((2160, 3840, 3), np.uint8) for _ in range(4)), 'cosine', lambda b: sizes.append(len(b)) or np.ones((len(b), 2)))
    assert sum(sizes) == 4 and max(sizes)*2160*3840*3 <= 2**26

def scene(T, seed=0, step=0, size=16):
    "A textured still picture with a bright square that moves `step` pixels a frame."
    base = np.kron(np.random.default_rng(seed).integers(0, 160, (12, 16, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    f = np.repeat(base[None], T, 0)
    for t in range(T): x = 4 + t*step; f[t, 40:40+size, x:x+size] = (250, 240, 60)
    return f

def test_m3_finds_a_cut():
    f = np.concatenate([scene(17, 0), scene(16, 5)])
    assert select_keyframes(frame_features(f, 'm3', embed), method='m3') == [0, 17, 32]
    # by meaning alone and by motion alone too
    F = frame_features(f, 'm3', embed)
    assert 17 in m3_keyframes(F, lambda2=0) and 17 in m3_keyframes(F, lambda1=0, lambda2=4, threshold=.05)

def test_m3_detects_a_moving_square():
    still, moving = (frame_features(scene(25, step=s, size=40), 'm3', embed) for s in (0, 2))
    blind = dict(lambda1=0, lambda2=1, threshold=.02)   # motion only
    assert m3_keyframes(still, **blind) == [0, 24]
    keys = m3_keyframes(moving, **blind)
    assert len(keys) > 2
    for k in keys[1:-1]:
        l = keys[keys.index(k)-1]
        assert flow_magnitude(moving['grey'][l], moving['grey'][k]) > .02 >= max(
            [flow_magnitude(moving['grey'][l], moving['grey'][j]) for j in range(l+4, k)], default=0)   # the first one that passes, against the last keyframe

def test_m3_distance_is_the_weighted_sum():
    F = frame_features(scene(6, step=3), 'm3', embed)
    d = distances(F, 0, [5], 'm3', lambda1=2, lambda2=3)[0]
    assert d == pytest.approx(2*by_cosine(F['embedding'][0], F['embedding'][5]) + 3*flow_magnitude(F['grey'][0], F['grey'][5]))

@quick
@given(st.integers(1, 40), st.integers(1, 8), st.none() | st.integers(8, 20), st.booleans(), st.floats(0, 1))
def test_m3_gaps(T, min_gap, max_gap, last, threshold):
    F = np.empty(T, [('embedding', 'f4', (6,)), ('grey', 'u1', (16, 16))])
    F['embedding'], F['grey'] = np.random.default_rng(T).normal(size=(T, 6)), 9
    keys = m3_keyframes(F, threshold=threshold, min_gap=min_gap, max_gap=max_gap, last=last)
    assert keys == sorted(set(keys)) and keys[0] == 0 and (not last or keys[-1] == T-1)
    gaps = np.diff(keys)
    if max_gap: assert (gaps <= max_gap).all() and (last or T-1-keys[-1] < max_gap)
    if len(gaps): assert (gaps[:-1] >= min_gap).all()
    if len(keys) > 2 and not max_gap: assert gaps[-1] >= min_gap

def test_m3_by_number_shares_the_moving_reference():
    F = frame_features(scene(20, step=3), 'm3', embed)
    keys = select_keyframes(F, n=5, method='m3', lambda1=0, lambda2=1)
    assert len(keys) == 5 and all(a <= k < b for (a, b), k in zip(intervals(20, 5), keys[1:-1]))
    for (a, b), l, k in zip(intervals(20, 5), keys, keys[1:]):
        d = [flow_magnitude(F['grey'][l], F['grey'][j]) for j in range(a, b)]
        assert d[k-a] >= max(d) - 1e-6

def test_flow_measures_a_shift():
    import cv2
    big = cv2.GaussianBlur(noise(1, 96, 160)[0], (0, 0), 4)
    big = cv2.normalize(big, None, 0, 255, cv2.NORM_MINMAX)
    a, b = (grey_thumbnail(np.ascontiguousarray(big[:, x:x+96])) for x in (0, 6))
    assert a.shape == (96, 96)
    assert flow_magnitude(a, b)*np.hypot(96, 96) == pytest.approx(6, rel=.15)
    assert flow_magnitude(a, a) < 1e-3

@pytest.mark.parametrize('shape', [(1, 1), (2, 1920), (1080, 3), (7, 5), (17, 33)])
def test_odd_sizes(shape):
    F = frame_features(noise(4, *shape), 'm3', lambda b: np.ones((len(b), 2), np.float32))
    assert min(F['grey'].shape[1:]) >= 16 and max(F['grey'].shape[1:]) == 96
    assert np.isfinite(distances(F, 0, range(4), 'm3')).all()
    assert len(select_keyframes(frame_features(noise(4, *shape), 'mse'), n=3, method='mse')) == 3

def test_one_and_two_frames():
    for m in METHODS:
        F = frame_features(noise(1), m, embed)
        assert select_keyframes(F, n=1, method=m) == select_keyframes(F, interval=8, method=m) == [0]
        F = frame_features(noise(2), m, embed)
        assert select_keyframes(F, n=2, method=m) == select_keyframes(F, interval=8, method=m) == [0, 1]
    assert m3_keyframes(F := frame_features(noise(1), 'm3', embed)) == [0] and len(F) == 1
    assert m3_keyframes(frame_features(noise(2), 'm3', embed)) == [0, 1]

V = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
@pytest.mark.parametrize('args,words', [
    (dict(n=11), '11 keyframes wanted'), (dict(n=1), 'at least 2'), (dict(n=0), 'above 0'), (dict(n=-3), 'above 0'), (dict(n=2.5), 'whole number'),
    (dict(n=True), 'whole number'), (dict(interval=0), 'above 0'), (dict(interval='4'), 'whole number'), (dict(), 'one of the two'),
    (dict(n=3, interval=3), 'one of the two'), (dict(n=3, method='clip'), 'unknown method'), (dict(n=3, method='m3'), 'do not suit'),
    (dict(n=3, threshold=.1), 'does not apply'), (dict(n=3, method='uniform', lambda1=1), 'does not apply')])
def test_bad_selection(args, words):
    with pytest.raises(CmvcError, match=words): select_keyframes(V, **args)

def test_bad_features():
    nan = V.copy(); nan[3, 1] = np.nan
    for bad in (nan, V[0], frame_features(noise(10), 'uniform'), frame_features(noise(10), 'm3', embed), 10):
        with pytest.raises(CmvcError): select_keyframes(bad, n=3)
    for empty in (V[:0], 0):
        with pytest.raises(CmvcError, match='no frames'): select_keyframes(empty, n=3, method='uniform')
    with pytest.raises(CmvcError, match='does not apply'): select_keyframes(frame_features(noise(10), 'm3', embed), n=3, method='m3', threshold=.2)
    for gaps in (dict(min_gap=0), dict(min_gap=5, max_gap=4)):
        with pytest.raises(CmvcError, match='gap'): m3_keyframes(frame_features(noise(10), 'm3', embed), **gaps)

@pytest.mark.parametrize('frames,words', [
    ([], 'no frames'), (np.zeros((4, 8, 8, 3)), 'uint8'), (np.zeros((8, 8, 3), np.uint8), 'frame 0'), (np.zeros((2, 8, 8, 4), np.uint8), 'RGB'),
    ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], 'equal sizes'), (np.zeros((2, 0, 8, 3), np.uint8), 'frame 0')])
def test_bad_frames(frames, words):
    with pytest.raises(CmvcError, match=words): frame_features(frames, 'mse')

def test_bad_embed():
    f = noise(4)
    with pytest.raises(CmvcError, match='needs embed'): frame_features(f, 'cosine')
    with pytest.raises(CmvcError, match='unknown method'): frame_features(f, 'flow', embed)
    with pytest.raises(CmvcError, match='batch_size'): frame_features(f, 'mse', batch_size=0)
    for wrong in (lambda b: np.ones(len(b)), lambda b: np.ones((len(b)+1, 3)), lambda b: np.full((len(b), 3), np.nan), lambda b: np.ones((len(b), 0))):
        with pytest.raises(CmvcError, match='embed gave'): frame_features(f, 'cosine', wrong)

def test_moving_distance_and_plot():
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    f = noise(14); F = frame_features(f, 'cosine', embed); keys = select_keyframes(F, n=4)
    d = moving_distance(F, keys)
    assert d[0] == 0
    for j in range(1, 14):
        ref = max(k for k in keys if k < j)
        assert d[j] == pytest.approx(by_cosine(F[ref], F[j]), abs=1e-6)
    ax = plot_selection(F, keys, frames=f)
    red = [l for l in ax.lines if l.get_color() == 'red'][0]
    np.testing.assert_array_equal(red.get_xdata(), keys); np.testing.assert_allclose(red.get_ydata(), 1 - d[keys])
    assert len(ax.child_axes) == 4   # one picture a keyframe
    own = plt.subplots()[1]; assert plot_selection(F, keys, ax=own) is own
    plt.close('all')

def test_widget_moves():
    pytest.importorskip('ipywidgets')
    import matplotlib; matplotlib.use('Agg')
    f = noise(20); F = {m: frame_features(f, m, embed) for m in METHODS}
    box = selection_widget(f, F, n=5); controls, said, image = box.children; slider, choice = controls.children
    seen = set()
    for n, m in ((2, 'cosine'), (4, 'mse'), (3, 'uniform'), (3, 'm3')):
        choice.value, slider.value = m, n
        assert said.value == 'keyframes ' + ', '.join(map(str, select_keyframes(F[m], n=n, method=m)))
        seen.add(bytes(image.value))
    assert len(seen) == 4 and all(s[:2] == b'\xff\xd8' for s in seen)

def test_real_clip():
    from cmvc_nb.video import Video, demo_clip
    try: clip = demo_clip('carphone')
    except CmvcError as e: pytest.skip(str(e))
    F = frame_features((f for _, f in zip(range(40), Video(clip))), 'cosine', embed)
    keys = select_keyframes(F, interval=10)
    assert keys == brute(F, 5, by_cosine)

def test_import_is_light():
    code = "import sys, cmvc_nb.selection; print([m for m in ('torch', 'matplotlib', 'ipywidgets', 'av') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'
