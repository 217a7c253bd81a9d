"""Metrics without learned weights: each against its definition, its sense under damage, streams, errors."""
import json, math

import av, cv2
import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from cmvc_nb import keyframes, search
from cmvc_nb.errors import CmvcError
from cmvc_nb.metrics import (METRICS, Meter, NotAvailable, Pair, Score, Scores, all_metrics, between, decibels, metrics_of, ms_ssim, yuv)

torch.set_num_threads(1)


def film(n=5, size=176, step=3):
    "A window that moves over a photograph, uint8 (n,size,size,3)."
    picture = data.astronaut()
    return np.stack([picture[40:40+size, 60+step*i:60+step*i+size] for i in range(n)])

FILM = film()
RNG = np.random.default_rng(0)
DAMAGE = {'blur': np.stack([cv2.GaussianBlur(f, (0, 0), 2) for f in FILM]),
          'noise': np.clip(FILM + RNG.normal(0, 20, FILM.shape), 0, 255).round().astype(np.uint8),
          'shift': np.roll(FILM, 4, 2),
          'frozen': np.repeat(FILM[:1], len(FILM), 0)}
BAD = DAMAGE['noise']
GRAY = [.299, .587, .114]


@pytest.fixture(scope='module')
def scores(): return {n: metrics_of(FILM, v, device='cpu') for n, v in {'same': FILM, **DAMAGE}.items()}


# ---- against the definitions

def test_psnr(scores):
    s = scores['noise']
    each = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(FILM, BAD)]
    assert s['psnr'].value == pytest.approx(peak_signal_noise_ratio(FILM, BAD, data_range=255), abs=1e-4)
    assert s['psnr_frames'].value == pytest.approx(np.mean(each), abs=1e-4) == pytest.approx(keyframes.psnr(FILM, BAD), abs=1e-4)
    assert s['psnr'].frames == pytest.approx(each, abs=1e-4)

def test_psnr_of_a_clip_is_not_the_mean_of_frames():
    half = np.concatenate([FILM[:1], BAD[1:]])
    s = metrics_of(FILM, half, ['psnr', 'psnr_frames'], device='cpu')
    assert s['psnr_frames'].value > s['psnr'].value + 5
    assert s['psnr'].value == pytest.approx(peak_signal_noise_ratio(FILM, half, data_range=255), abs=1e-4)

@pytest.mark.parametrize('size, matrix', [(64, 5), (720, 1)]) # the scaler's codes of BT.601 and BT.709
def test_yuv_planes_are_those_of_a_video_file(size, matrix):
    f = cv2.GaussianBlur(np.ascontiguousarray(data.astronaut()[:, :64]), (0, 0), 3)
    f = np.ascontiguousarray(cv2.resize(f, (64, size)))
    frame = av.VideoFrame.from_ndarray(f, 'rgb24').reformat(format='yuv420p', dst_colorspace=matrix, src_color_range=2, dst_color_range=1)
    planes = [np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, :p.width].astype(float) for p in frame.planes]
    for p, q, low in zip(planes, yuv(torch.from_numpy(f).permute(2, 0, 1)[None].float()), (16, 128, 128)):
        assert np.abs(p - low - q[0].numpy()).mean() < 1

def test_psnr_yuv(scores):
    def planes(f):
        kr, kb = .299, .114
        r, g, b = f.astype(float).transpose(2, 0, 1)
        y = kr*r + (1 - kr - kb)*g + kb*b
        small = lambda v: v.reshape(v.shape[0]//2, 2, v.shape[1]//2, 2).mean((1, 3))
        return y*219/255, small((b - y)/1.772)*224/255, small((r - y)/1.402)*224/255
    want = [sum(w*10*np.log10(255**2/np.square(p - q).mean()) for w, p, q in zip((6, 1, 1), planes(a), planes(b)))/8 for a, b in zip(FILM, BAD)]
    assert scores['noise']['psnr_yuv'].frames == pytest.approx(want, abs=1e-3)

def test_ssim(scores):
    want = [structural_similarity(a, b, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False) for a, b in zip(FILM, BAD)]
    assert scores['noise']['ssim'].frames == pytest.approx(want, abs=1e-5)

def _window(v, size, sigma): # (C,H,W), Gaussian, only where it fits
    g = np.exp(-np.square(np.arange(size) - size//2)/(2*sigma**2)); g /= g.sum()
    c = size//2
    return correlate1d(correlate1d(v, g, -1), g, -2)[..., c:v.shape[-2]-c, c:v.shape[-1]-c]

def test_ms_ssim(scores):
    def one(a, b):
        a, b, out = a.transpose(2, 0, 1).astype(float), b.transpose(2, 0, 1).astype(float), 1
        for i, w in enumerate([.0448, .2856, .3001, .2363, .1333]):
            g = lambda v: _window(v, 11, 1.5)
            ma, mb = g(a), g(b)
            va, vb, cov = g(a*a) - ma*ma, g(b*b) - mb*mb, g(a*b) - ma*mb
            cs, l = (2*cov + (.03*255)**2)/(va + vb + (.03*255)**2), (2*ma*mb + (.01*255)**2)/(ma*ma + mb*mb + (.01*255)**2)
            out *= (cs*l if i == 4 else cs).mean()**w
            a, b = (v.reshape(3, v.shape[1]//2, 2, v.shape[2]//2, 2).mean((2, 4)) for v in (a, b)) if i < 4 else (a, b)
        return out
    assert scores['noise']['ms_ssim'].frames == pytest.approx([one(a, b) for a, b in zip(FILM, BAD)], abs=1e-3)
    assert ms_ssim(FILM, BAD) == pytest.approx(scores['noise']['ms_ssim'].value, abs=1e-5) and search.ms_ssim is ms_ssim

def test_vif(scores):
    def one(a, b):
        num = den = 0
        for scale in range(4):
            n = 2**(4 - scale) + 1
            g = lambda v: _window(v, n, n/5)
            if scale: a, b = g(a)[::2, ::2], g(b)[::2, ::2]
            va, vb, cov = g(a*a) - g(a)**2, g(b*b) - g(b)**2, g(a*b) - g(a)*g(b)
            gain = np.maximum(cov/(va + 1e-10), 0)
            left = np.where(cov < 0, vb, np.maximum(vb - gain*cov, 1e-10))
            num, den = num + np.log10(1 + gain**2*va/(left + 2)).sum(), den + np.log10(1 + va/2).sum()
        return num/den
    assert scores['noise']['vif'].frames == pytest.approx([one(a @ GRAY, b @ GRAY) for a, b in zip(FILM, BAD)], abs=1e-3)

def _half(v): return v[..., :v.shape[-2]//2*2, :v.shape[-1]//2*2].reshape(*v.shape[:-2], v.shape[-2]//2, 2, v.shape[-1]//2, 2).mean((-3, -1))

def _correlate(v, k, before): # v (H,W) with zeros around, by hand
    n = len(k)
    p = np.pad(v, (before, n - 1 - before))
    return sum(k[i, j]*p[i:i+v.shape[0], j:j+v.shape[1]] for i in range(n) for j in range(n))

def test_haarpsi(scores):
    def one(a, b):
        m = np.array([[.299, .587, .114], [.596, -.274, -.322], [.211, -.523, .312]])
        a, b = (_half((v.astype(float) @ m.T).transpose(2, 0, 1)) for v in (a, b))
        sim = lambda p, q: (2*p*q + 30)/(p*p + q*q + 30)
        def waves(y, turn):
            out = []
            for s in (2, 4, 8):
                k = np.full((s, s), 1/s); k[:s//2] = -1/s
                out.append(np.abs(_correlate(y, k.T if turn else k, s//2 - 1)))
            return out
        S, W = [], []
        for turn in (False, True):
            p, q = waves(a[0], turn), waves(b[0], turn)
            S.append((sim(p[0], q[0]) + sim(p[1], q[1]))/2); W.append(np.maximum(p[2], q[2]))
        chroma = [[np.abs(_correlate(v[i], np.full((2, 2), .25), 0)) for i in (1, 2)] for v in (a, b)]
        S.append((sim(chroma[0][0], chroma[1][0]) + sim(chroma[0][1], chroma[1][1]))/2); W.append((W[0] + W[1])/2)
        v = sum((w/(1 + np.exp(-4.2*s))).sum() for s, w in zip(S, W))/sum(w.sum() for w in W)
        return (math.log(v/(1 - v))/4.2)**2
    for n in ('noise', 'blur'): assert scores[n]['haarpsi'].frames == pytest.approx([one(a, b) for a, b in zip(FILM, DAMAGE[n])], abs=1e-4)

def test_gmsd_and_detail(scores):
    def one(a, b):
        k = np.array([[1, 0, -1]]*3)/3
        g = [np.hypot(_correlate(v, k, 1), _correlate(v, k.T, 1)) for v in (_half(a @ GRAY), _half(b @ GRAY))]
        return ((2*g[0]*g[1] + 170)/(g[0]**2 + g[1]**2 + 170)).std()
    assert scores['noise']['gmsd'].frames == pytest.approx([one(a, b) for a, b in zip(FILM, BAD)], abs=1e-5)
    energy = lambda v: np.square(np.diff(v @ GRAY, axis=0)).mean() + np.square(np.diff(v @ GRAY, axis=1)).mean()
    assert scores['noise']['detail'].frames == pytest.approx([energy(a)/energy(b) for a, b in zip(FILM, BAD)], abs=1e-4)
    assert scores['blur']['detail'].frames == pytest.approx([energy(b)/energy(a) for a, b in zip(FILM, DAMAGE['blur'])], abs=1e-4)

def test_flicker_and_smoothness(scores):
    f = BAD.astype(float)
    assert scores['noise']['flicker'].value == pytest.approx((255 - np.abs(np.diff(f, axis=0)).mean())/255)
    odd = [np.abs(f[i] - between(BAD[i-1], BAD[i+1])).mean() for i in (1, 3)]
    assert scores['noise']['smoothness'].frames == pytest.approx([(255 - v)/255 for v in odd])
    assert scores['noise']['smoothness'].source == scores['same']['smoothness'].value

def test_between_finds_the_middle_of_a_pan():
    a, b, c = film(3, step=4)
    inner = (slice(12, -12),)*2
    made = np.abs(between(a, c)[inner].astype(float) - b[inner]).mean()
    blend = np.abs((a[inner].astype(float) + c[inner])/2 - b[inner]).mean()
    assert made < blend/3 and np.array_equal(between(a, a), a)


# ---- sense

@pytest.mark.parametrize('name', METRICS)
def test_identical_clips_are_perfect(scores, name):
    s = scores['same'][name]
    if s.source is None: assert s.value == pytest.approx(s.perfect, abs=1e-4) and s.frames == pytest.approx(np.full(5, s.perfect), abs=1e-4)
    else: assert s.value == s.source < 1

def worse(s, a, b): return a < b if s.better == 'higher' else a > b

# what a metric is blind to: `detail` knows no places, and no reference sees what has been moved
BLIND = {('detail', 'shift'), ('detail', 'frozen'), ('flicker', 'shift'), ('smoothness', 'shift')}

@pytest.mark.parametrize('name', METRICS)
@pytest.mark.parametrize('kind', DAMAGE)
def test_damage_moves_it_the_right_way(scores, name, kind):
    same, s = scores['same'][name], scores[kind][name]
    if (name, kind) in BLIND: assert s.value == pytest.approx(same.value, abs=.15)
    elif s.source is not None and kind in ('blur', 'frozen'): assert s.value > same.value       # they like what does not move
    else: assert worse(s, s.value, same.value - .01*(s.better == 'higher'))
    if kind == 'frozen' and s.source is not None: assert s.value == 1

@pytest.mark.parametrize('name', [n for n in METRICS if n not in ('flicker', 'smoothness')])
def test_more_noise_is_worse(name):
    noise = RNG.normal(0, 1, FILM[:1].shape)
    v = [metrics_of(FILM[:1], np.clip(FILM[:1] + k*noise, 0, 255).round().astype(np.uint8), [name], device='cpu')[name] for k in (4, 10, 25)]
    assert worse(v[1], v[1].value, v[0].value) and worse(v[2], v[2].value, v[1].value)

def test_flat_pictures():
    black, grey = np.zeros((3, 176, 176, 3), np.uint8), np.full((3, 176, 176, 3), 90, np.uint8)
    for s in metrics_of(black, black, device='cpu').values(): assert s.value == pytest.approx(s.perfect, abs=1e-4)
    for n, s in metrics_of(black, grey, device='cpu').items(): assert s.value is None and s.why or np.isfinite(s.value), n
    one = metrics_of(np.concatenate([black, FILM[:1]]), np.concatenate([grey, FILM[:1]]), ['vif'], device='cpu')
    json.dumps(one.to_dict(), allow_nan=False)


# ---- streams

@pytest.mark.parametrize('cut', [(1, 2), (3,), (1, 2, 3, 4)])
def test_a_stream_equals_the_whole(scores, cut):
    m, at = Meter(device='cpu'), (0, *cut, 5)
    for i, j in zip(at, at[1:]): m.feed(FILM[i:j], BAD[i:j])
    for n, s in m.finish().items():
        assert s.value == pytest.approx(scores['noise'][n].value, abs=1e-4) and s.frames == pytest.approx(scores['noise'][n].frames, abs=1e-4)

def test_iterables_of_frames(scores):
    s = metrics_of(iter(FILM), (f for f in BAD), ['psnr', 'flicker'], device='cpu')
    assert s['psnr'].value == scores['noise']['psnr'].value and s['flicker'].value == scores['noise']['flicker'].value

def test_long_chunks_are_split(monkeypatch):
    sizes, init = [], Pair.__init__
    monkeypatch.setattr(Pair, '__init__', lambda self, a, b, d: (sizes.append(len(a)), init(self, a, b, d))[1])
    wide = np.zeros((3, 1000, 1100, 3), np.uint8)
    Meter(['psnr'], device='cpu').feed(wide, wide)
    assert sizes == [1, 1, 1]
    sizes.clear()
    tiny = np.zeros((70, 16, 16, 3), np.uint8)
    Meter(['psnr'], device='cpu').feed(tiny, tiny)
    assert sizes == [32, 32, 6]

def test_nothing_of_the_frames_is_kept():
    m, held = Meter(device='cpu'), []
    for k in range(6):
        m.feed(FILM[:, :48, :48], BAD[:, :48, :48])
        state = [c.cell_contents for g in m.gauges.values() for side in getattr(g, 'sides', ()) for c in side.__closure__]
        held.append(sum(len(v) for v in state))
    assert max(held) <= 6 # at most one frame of flicker and two of smoothness, for each side
    assert m.finish()['psnr'].frames.shape == (30,)

def test_it_can_be_asked_on_the_way():
    m = Meter(['psnr', 'smoothness'], device='cpu')
    m.feed(FILM[:2], BAD[:2])
    first = m.finish()
    assert 'needs 3 frames' in first['smoothness'].why and first['smoothness'].value is None and first['psnr'].frames.shape == (2,)
    m.feed(FILM[2:], BAD[2:])
    assert m.finish()['smoothness'].value < 1


# ---- errors

@pytest.mark.parametrize('a, b, what', [
    (FILM, FILM[:, :-2], 'one size'), (FILM, FILM[:-1], 'one length'), (FILM.astype(float), FILM, 'uint8'), (FILM[0], FILM[0], 'uint8'),
    (iter(FILM), iter(FILM[:-1]), 'before the other'), (iter(FILM), iter(FILM[:, :-2]), 'one size'), (FILM[:0], FILM[:0], 'no frames'),
    ([FILM[0], FILM[1][:-2]], [FILM[0], FILM[1][:-2]], 'after chunks')])
def test_clips_that_do_not_match(a, b, what):
    with pytest.raises(CmvcError, match=what): metrics_of(a, b, ['psnr'], device='cpu')

def test_a_stream_keeps_its_size():
    m = Meter(['psnr'], device='cpu')
    m.feed(FILM, FILM)
    with pytest.raises(CmvcError, match='174x176 pixels after chunks of 176x176'): m.feed(FILM[:, :, :-2], FILM[:, :, :-2])

@pytest.mark.parametrize('names', [['psnr', 'pnsr'], 'pnsr', [], ['']])
def test_unknown_names(names):
    with pytest.raises(CmvcError, match='expected some of psnr'): Meter(names, device='cpu')

def test_small_pictures():
    small = FILM[:, :40, :48]
    with pytest.raises(CmvcError, match='ms_ssim needs 176 pixels each way, the pictures have 48x40'): metrics_of(small, small, ['psnr', 'ms_ssim'], device='cpu')
    s = metrics_of(small, small, device='cpu')
    assert s['ms_ssim'].value is None and '176' in s['ms_ssim'].why and s['ssim'].value == pytest.approx(1)

@pytest.mark.parametrize('name', METRICS)
def test_least_sizes_are_enough_and_odd_ones_work(name):
    m = METRICS[name]
    for h, w in [(m.least, m.least + 3), (m.least + 3, m.least)]:
        a, b = FILM[:, :h, :w], BAD[:, :h, :w]
        if min(a.shape[1:3]) >= m.least: assert metrics_of(a, b, [name], device='cpu')[name].value is not None or (name == 'detail')

def test_device_is_checked():
    with pytest.raises(CmvcError, match='expected cpu'): Meter(['psnr'], device='abacus')

def test_missing_package_is_a_reason(monkeypatch):
    def gone(module, extra): raise CmvcError(f"{module} is not installed: pip install 'cmvc_nb[{extra}]'")
    monkeypatch.setattr('cmvc_nb.metrics.need', gone)
    s = metrics_of(FILM, BAD, ['psnr', 'ssim'], device='cpu')
    assert s['psnr'].value and s['ssim'].value is None and 'pip install' in s['ssim'].why


# ---- results

def test_scores_say_how_they_came_about(scores):
    import torchmetrics
    s = scores['noise']
    assert s['ssim'].version == f'torchmetrics {torchmetrics.__version__}' and s['haarpsi'].version.startswith('cmvc_nb ') and 'opencv' in s['smoothness'].version
    d = json.loads(json.dumps(s.to_dict(), allow_nan=False))
    assert d['gmsd']['better'] == 'lower' and d['gmsd']['perfect'] == 0 and len(d['psnr']['frames']) == 5 and d['flicker']['source'] < 1 and 'net' not in d['psnr']

def test_not_available_is_no_number():
    s = Score('dists', None, 'lower', 0., why='no <weights> & so on')
    with pytest.raises(NotAvailable, match='no <weights>'): float(s)
    page = Scores(dists=s)._repr_html_()
    assert 'not available: no &lt;weights&gt; &amp; so on' in page and 'not available' in repr(Scores(dists=s)) and s.to_dict()['value'] is None

def test_table(scores):
    page = scores['noise']._repr_html_()
    assert page.count('<tr>') == len(METRICS) + 1 and 'gmsd ↓' in page and 'psnr ↑' in page

def test_register():
    known = all_metrics()
    assert set(METRICS) < set(known) and all(m.better in ('higher', 'lower') and m.name == n and m.what for n, m in known.items())
    assert METRICS['psnr'].perfect == pytest.approx(float(decibels(np.zeros(1))[0]))
