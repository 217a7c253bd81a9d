"""BD-rate against an integration of our own, over published curves; clean-up, overlap, and the two means."""
import math, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from scipy.interpolate import PchipInterpolator
from cmvc_nb import bdrate as B
from cmvc_nb.bdrate import as_points, bd_rate, bd_summary, convex_hull, lower_is_better, monotone
from cmvc_nb.errors import CmvcError

# VTM-17.0, low delay B, all frames with one intra frame, QP 31 to 49: bits a pixel, PSNR, MS-SSIM. From the anchors of microsoft/DCVC (MIT)
VTM = dict(
    BQSquare=[(.036227, 33.920543, .980254), (.022249, 32.407897, .973123), (.01403, 31.051991, .966279), (.008966, 29.644962, .957017), (.005986, 28.281653, .945875), (.004127, 26.854486, .930159), (.003083, 25.441266, .906606)],
    BlowingBubbles=[(.059994, 32.715989, .976992), (.03668, 31.036347, .964258), (.022449, 29.654347, .948928), (.013452, 28.301279, .925887), (.008181, 27.038274, .894051), (.005092, 25.793211, .847103), (.003371, 24.649341, .789922)],
    RaceHorses=[(.077769, 33.510136, .966359), (.050119, 31.899884, .947777), (.032717, 30.568044, .924612), (.021267, 29.27454, .897362), (.013878, 28.018806, .865901), (.009067, 26.710246, .826273), (.006039, 25.422969, .77989)],
    PartyScene=[(.060123, 33.050516, .979461), (.037446, 31.375619, .968765), (.022547, 29.87582, .954037), (.013123, 28.425603, .931214), (.007468, 27.117576, .901506), (.004154, 25.853632, .858082), (.002365, 24.715175, .802524)])
PAIRS = [(a, b) for a in VTM for b in VTM if a != b]


def curve(name, column=1, take=slice(None)): return [(p[0], p[column]) for p in VTM[name][take]]


def integral(anchor, test):
    "The same by hand: monotone cubics of ln(rate) over quality, each piece by Gauss-Legendre, which is exact for cubics."
    fs, lo, hi = [], -math.inf, math.inf
    for p in (anchor, test):
        q, r = np.array(sorted((q, math.log(r)) for r, q in p)).T
        fs.append(PchipInterpolator(q, r)); lo, hi = max(lo, q[0]), min(hi, q[-1])
    knots = sorted({lo, hi, *(x for f in fs for x in f.x if lo < x < hi)})
    x, w = np.polynomial.legendre.leggauss(4)
    area = sum((b-a)/2*sum(wi*float(fs[1](m) - fs[0](m)) for xi, wi in zip(x, w) for m in [(a+b)/2 + (b-a)/2*xi]) for a, b in zip(knots, knots[1:]))
    return (math.exp(area/(hi - lo)) - 1)*100


@pytest.mark.parametrize('a,b', PAIRS)
def test_equals_an_independent_integration(a, b):
    for column, metric in ((1, 'psnr'), (2, 'ms-ssim')):
        got, want = bd_rate(curve(a, column), curve(b, column), metric), integral(curve(a, column), curve(b, column))
        assert float(got) == pytest.approx(want, abs=1e-6) and got.dropped == (0, 0) and got.points == (7, 7)
    assert float(bd_rate(curve(a, take=slice(0, 7, 2)), curve(b, take=slice(1, 7, 2)))) == pytest.approx(integral(curve(a, take=slice(0, 7, 2)), curve(b, take=slice(1, 7, 2))), abs=1e-6)


def test_numbers_that_can_be_said_beforehand():
    c = curve('BQSquare')
    assert float(bd_rate(c, c)) == pytest.approx(0, abs=1e-9)
    half = [(r/2, q) for r, q in c]
    assert float(bd_rate(c, half)) == pytest.approx(-50, abs=1e-9) and float(bd_rate(half, c)) == pytest.approx(100, abs=1e-9)
    assert float(bd_rate(c, c[::-1])) == pytest.approx(0, abs=1e-9)  # order does not matter
    straight = [(1, 30), (2, 31), (4, 32), (8, 33)]                  # one octave a decibel
    assert float(bd_rate(straight, [(r, q + 1) for r, q in straight])) == pytest.approx(-50, abs=1e-9)


def test_lower_is_better():
    a, b = curve('BQSquare'), curve('RaceHorses')
    turned = [[(r, 60 - q) for r, q in c] for c in (a, b)]
    for metric in ('LPIPS', 'dists', 'FID'): assert float(bd_rate(*turned, metric)) == pytest.approx(float(bd_rate(a, b)), abs=1e-9)
    assert float(bd_rate(*turned, 'mine', lower=True)) == pytest.approx(float(bd_rate(a, b)), abs=1e-9)
    got = bd_rate(*turned, 'lpips')
    assert got.overlap == (60 - 33.510136, 60 - 25.441266) and got.overlap[0] < got.overlap[1]
    assert not lower_is_better('PSNR-Y') and not lower_is_better('MS_SSIM') and lower_is_better('kid')
    with pytest.raises(CmvcError, match='say lower=True'): bd_rate(a, b, 'mine')
    assert not set(B.LOWER) & set(B.HIGHER)


def test_the_ground_is_stated():
    a, b = [(1, 30), (2, 32), (4, 34), (8, 36)], [(1, 31), (2, 33), (4, 35), (8, 37), (9, 36.5)]
    got = bd_rate(a, b)
    assert got.overlap == (31, 36) and got.shares == (5/6, 5/6) and got.dropped == (0, 1) and got.points == (4, 4) and got.spans == ((30, 36), (31, 37))
    assert '-29.29 %' in str(got) and '83%' in str(got) and 'dropped 0 and 1' in str(got) and 'only' not in str(got)
    assert 'only 2 points' in str(bd_rate(a[:2], b[:2]))


def test_no_overlap_is_no_number():
    for test in ([(1, 20), (2, 25)], [(1, 25), (2, 30)], [(1, 36), (2, 40)]):   # also where only an end is shared
        got = bd_rate([(1, 30), (2, 33), (4, 36)], test)
        assert got.percent is None and got.overlap is None and math.isnan(float(got)) and 'no overlap' in str(got)


def test_nothing_is_extrapolated():
    "A point beyond the overlap changes the number only through the piece that reaches into it."
    a = [(1, 30), (2, 31), (4, 32), (8, 33)]
    far = bd_rate(a, [(1, 31), (2, 32), (4, 33), (8, 34), (1e6, 60)])
    assert far.overlap == (31, 33) and float(far) == pytest.approx(integral(a, [(1, 31), (2, 32), (4, 33), (8, 34), (1e6, 60)]), abs=1e-6)


def test_clean_up():
    p = [(3, 33), (1, 30), (2, 29), (3, 32), (4, 33), (5, 35)]
    assert monotone(p).tolist() == [[1, 30], [3, 33], [5, 35]]
    assert monotone([(r, -q) for r, q in p], lower=True).tolist() == [[1, -30], [3, -33], [5, -35]]
    assert monotone([(1, 30)]).tolist() == [[1, 30]]
    clean, noisy = [(1, 30), (3, 33), (5, 35)], bd_rate(curve('BQSquare'), [(r/200, q - 4) for r, q in p])
    assert float(noisy) == pytest.approx(float(bd_rate(curve('BQSquare'), [(r/200, q - 4) for r, q in clean])), abs=1e-9) and noisy.dropped == (0, 3)


def test_convex_hull():
    g = np.random.default_rng(0)
    p = np.stack([g.uniform(1, 9, 60), g.uniform(20, 40, 60)], 1)
    h = convex_hull(p)
    assert set(map(tuple, h)) <= set(map(tuple, p)) and (np.diff(h, axis=0) > 0).all()
    slopes = np.diff(h[:, 1])/np.diff(h[:, 0])
    assert (np.diff(slopes) < 0).all()
    assert (np.interp(p[:, 0], h[:, 0], h[:, 1], left=h[0, 1]) >= p[:, 1] - 1e-9)[p[:, 0] >= h[0, 0]].all()  # nothing lies above it
    assert h[0, 0] == p[:, 0].min() and h[-1, 1] == p[:, 1].max()
    assert convex_hull([(1, 3), (2, 2), (3, 1)], lower=True).tolist() == [[1, 3], [3, 1]]     # on a line only its ends
    assert float(bd_rate(curve('BQSquare'), curve('PartyScene'), clean='hull')) == pytest.approx(float(bd_rate(curve('BQSquare'), curve('PartyScene'))), abs=1)


def test_rows_and_pairs():
    rows = [dict(bpp=r, kbps=100*r, psnr=q, codec='x') for r, q in curve('BQSquare')]
    assert as_points(rows).tolist() == sorted(map(list, curve('BQSquare')))
    assert float(bd_rate(rows, curve('RaceHorses'))) == float(bd_rate(curve('BQSquare'), curve('RaceHorses')))
    assert float(bd_rate(rows, rows, rate='kbps')) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize('bad,said', [([(1, 30), (0, 31)], 'rates above 0'), ([(1, 30), (2, float('nan'))], 'finite'), ([dict(bpp=1)], "without 'psnr'"), ([(1, None), (2, 3)], 'finite'), ([(1, 2, 3), (2, 3)], 'pairs'), (['ab', 'cd'], 'pairs'),
    ([], '0 of 0 points'), ([(1, 30)], '1 of 1 points'), ([(1, 30), (2, 29)], '1 of 2 points left that rise in psnr')])
def test_bad_points(bad, said):
    for pair in ((curve('BQSquare'), bad), (bad, curve('BQSquare'))):
        with pytest.raises(CmvcError, match=said): bd_rate(*pair)
    with pytest.raises(CmvcError, match='clean='): bd_rate(curve('BQSquare'), curve('BQSquare'), clean='all')


def rows(name, clip, factor=1.): return [dict(clip=clip, point=i, bpp=r*factor, psnr=q) for i, (r, q) in enumerate(curve(name))]


def test_summary_gives_both_means():
    a = rows('BQSquare', 'a') + rows('RaceHorses', 'b', 10)
    t = rows('BQSquare', 'a', .5) + rows('RaceHorses', 'b', 9)
    s = bd_summary(a, t)
    assert [float(s['clips'][c]) for c in 'ab'] == pytest.approx([-50, -10], abs=1e-6)
    assert s['mean'] == pytest.approx(-30, abs=1e-6) and s['counted'] == 2
    both = [[((x[0]*f + y[0]*g)/2, (x[1] + y[1])/2) for x, y in zip(curve('BQSquare'), curve('RaceHorses'))] for f, g in ((1, 10), (.5, 9))]
    assert float(s['mean_curve']) == pytest.approx(integral(*both), abs=1e-6) and -12 < float(s['mean_curve']) < -10  # the large clip decides


def test_summary_with_a_clip_without_overlap():
    a = rows('BQSquare', 'a') + rows('BQSquare', 'b')
    t = rows('BQSquare', 'a', .5) + [r | dict(psnr=r['psnr'] - 20) for r in rows('BQSquare', 'b')]
    s = bd_summary(a, t)
    assert s['counted'] == 1 and s['mean'] == pytest.approx(-50, abs=1e-6) and s['clips']['b'].percent is None
    s = bd_summary(rows('BQSquare', 'b'), t[7:])
    assert s['counted'] == 0 and s['mean'] is None and s['mean_curve'].percent is None


def test_summary_refuses_unequal_sides():
    a = rows('BQSquare', 'a')
    with pytest.raises(CmvcError, match='only one has b'): bd_summary(a + rows('RaceHorses', 'b'), a)
    with pytest.raises(CmvcError, match='no mean curve'): bd_summary(a + rows('RaceHorses', 'b')[:5], a + rows('RaceHorses', 'b'))
    with pytest.raises(CmvcError, match="without 'clip' or 'point'"): bd_summary([dict(bpp=1, psnr=2)], a)
    with pytest.raises(CmvcError, match='same clips'): bd_summary([], [])


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'bjontegaard', None)
    with pytest.raises(CmvcError, match=r'cmvc_nb\[bench\]'): bd_rate(curve('BQSquare'), curve('RaceHorses'))


def test_light_imports():
    code = "import sys, cmvc_nb.anchors, cmvc_nb.datasets, cmvc_nb.bdrate; print({m.split('.')[0] for m in sys.modules} & {'torch', 'diffusers', 'transformers', 'matplotlib', 'scipy', 'bjontegaard'})"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=Path(B.__file__).parents[1]).stdout.strip() == 'set()'
