"""Anchors: round trips, what is counted, programs on the PATH by stand-ins, rivals between keyframes."""
import hashlib, subprocess, sys, tempfile
from fractions import Fraction
from pathlib import Path
import numpy as np, pytest
from cmvc_nb.anchors import ANCHORS, RIVALS, between, best_within, get_anchor, nal_units, pack, rd_curve, unpack
from cmvc_nb.errors import CmvcError
from cmvc_nb.keyframes import obus, psnr
from test_keyframes import drawn

QUICK = {'x264': 'fast', 'x264-zerolatency': 'fast', 'x265': 'fast', 'x265-zerolatency': 'fast', 'svtav1': '8', 'vp9': '4'}

# nine frames of `drawn(9)` at 64x64 by VVenC 1.15 (low delay, faster, QP 52), as `pack` writes them
VVC = bytes.fromhex('690079000b0210800080820411a802fffd6109b2b1820413821a2e2222225f11112ea22225dc4444b9222225cb11112e68888973c44456fc9f97fcbfa97f72fe497f2cbf9a5fcf2fe225f5112fb8897c9112f96225f3444be788a198231e28000003000800000300c9880b0081000041020884206080320041c40101918017541c3c277d5825737173ef8c357c061ff13efc55acd4986d9c0ca6ea9a16d068fb6b7fec5b0613e6b7f80a00019405d5002218a7800a00019409d53c0423a3800a0001940dd55c0443a7800a00019411d57c0423a3800a00019415d59c0443a7801000019419d5bc0423ece8fe2f2ea181f00a0001941dd5dc0443a7801500019421d5fc0e8cec933e0422f7cfea9e78bbeafe')


# ---- the encoders of PyAV

@pytest.mark.parametrize('name', QUICK)
def test_round_trip(name):
    "A worse point takes fewer bytes and shows less; each frame is in its place; the same bytes again."
    f, a = drawn(9), get_anchor(name, QUICK[name])
    files = [a.encode(f, 25, p) for p in a.points[::5]]
    shown = [a.decode(d, 9, 64, 64) for d in files]
    assert len(files[0]) < len(files[1]) and psnr(f, shown[0]) + 2 < psnr(f, shown[1])
    assert all(s.shape == f.shape and s.dtype == np.uint8 for s in shown)
    assert all(psnr(x, y) > 24 for x, y in zip(f, shown[1])) and psnr(f[:-1], shown[1][1:]) < psnr(f, shown[1]) - 1
    assert a.encode(f, 25, a.points[0]) == files[0]


@pytest.mark.parametrize('name', QUICK)
@pytest.mark.parametrize('n,h,w,scale', [(2, 65, 71, ''), (1, 64, 64, ''), (3, 90, 130, '@1/2'), (9, 64, 64, '@0.75'), (9, 5, 7, ''), (3, 200, 66, '@1/4')])
def test_odd_sizes_short_clips_and_scales(name, n, h, w, scale):
    f, a = drawn(n, max(h, 64), max(w, 64))[:, :h, :w], get_anchor(name + scale, QUICK[name])
    d = a.encode(f, 30000/1001, a.points[-1])
    assert (x := a.decode(d, n, w, h)).shape == f.shape and psnr(f, x) > 20


def test_same_bytes_in_another_process():
    code = "import hashlib, test_anchors as t\nfor n, p in t.QUICK.items(): print(hashlib.sha256(t.get_anchor(n, p).encode(t.drawn(9), 25, 45)).hexdigest())"
    out = subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    assert out.stdout.split() == [hashlib.sha256(get_anchor(n, p).encode(drawn(9), 25, 45)).hexdigest() for n, p in QUICK.items()]
    assert not out.stderr                                       # no encoder's chatter


def test_points_lie_on_the_knob_from_small_to_large():
    for a in ANCHORS.values():
        if not a.points: continue
        _, worst, best, step = a.knob
        assert list(a.points) == sorted(a.points, reverse=worst > best) and all(min(worst, best) <= p <= max(worst, best) for p in a.points) and step > 0


def test_a_smaller_picture_costs_less():
    f = drawn(5, 128, 128)
    sizes = [len(get_anchor(n, 'fast').encode(f, 25, 40)) for n in ('x265', 'x265@1/2', 'x265@1/4')]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.5*sizes[2]


def test_what_is_counted():
    "Every unit with its length: no options, no start codes, no delimiters; and all of it is needed."
    f = drawn(4)
    d = get_anchor('x264', 'fast').encode(f, 25, 45)
    assert {u[0] & 31 for u in unpack(d)} == {7, 8, 5, 1} and b'x264' not in d
    assert {u[0] >> 1 for u in unpack(get_anchor('x265', 'fast').encode(f, 25, 45))} >= {32, 33, 34}
    d = get_anchor('svtav1', '8').encode(f, 25, 60)
    assert len(unpack(d)) == 1 and 2 not in {k for k, _ in obus(unpack(d)[0])}
    assert len(unpack(get_anchor('vp9', '4').encode(f, 25, 60))) == 4


def test_units_and_lengths():
    stream = b'\0\0\0\1\x67ab\0\0\1\x06secret\0\0\1\x65cd\0\0\0\1\x41e'
    assert nal_units(stream, 'h264') == [b'\x67ab', b'\x65cd', b'\x41e']
    assert nal_units(b'\0\0\1\x40\1v\0\0\1\x4e\1sei\0\0\1\x46\1', 'hevc') == [b'\x40\1v']
    assert nal_units(b'\0\0\1\0\x79s\0\0\1\0\xb9sei\0\0\1\0\xa1', 'vvc') == [b'\0\x79s']
    for n in (0, 1, 127, 128, 16383, 16384): assert unpack(pack([bytes(n), b'x'])) == [bytes(n), b'x'] and len(pack([bytes(n)])) == n + 1 + (n > 127) + (n > 16383)
    for bad in (b'\5abc', b'\x80', b'\xff\xff\xff\xff'):
        with pytest.raises(CmvcError, match='cut off'): unpack(bad)


# ---- what goes wrong

@pytest.mark.parametrize('call,said', [
    (lambda f: get_anchor('x266'), "no anchor 'x266'.*x265@1/2"),
    (lambda f: get_anchor('x265@2'), 'scale above 0 and up to 1'),
    (lambda f: get_anchor('x265@half'), 'scale above 0'),
    (lambda f: get_anchor('x265').encode(f, 25, 52), 'x265: crf 52 given; 51'),
    (lambda f: get_anchor('x264', 'warp').encode(f, 25, 40), 'x264 at crf 40: .*warp'),
    (lambda f: get_anchor('svtav1', 99).encode(f, 25, 60), 'svtav1 at crf 60: .*99'),
    (lambda f: get_anchor('x265').encode(f[..., 0], 25, 40), 'frames of shape'),
    (lambda f: get_anchor('vp9').encode(f, 0, 60), 'frame rate'),
    (lambda f: get_anchor('dcvc').encode(f, 25, 0), 'dcvc: not available'),
])
def test_bad_input(call, said):
    with pytest.raises(CmvcError, match=said): call(drawn(2))


@pytest.mark.parametrize('name', QUICK)
def test_damage_and_wrong_clips(name):
    f, a = drawn(4), get_anchor(name, QUICK[name])
    d = a.encode(f, 25, a.points[2])
    for args in ((d, 3, 64, 64), (d, 5, 64, 64), (d, 4, 128, 64), (d[:len(d)//3], 4, 64, 64), (b'', 4, 64, 64), (bytes(90), 4, 64, 64)):
        with pytest.raises(CmvcError, match=name): a.decode(*args)


# ---- curves and budgets

def test_best_within():
    f, a = drawn(5), get_anchor('x265', 'fast')
    p, d = best_within(a, f, 25, 600)
    assert len(d) <= 600 and a.encode(f, 25, p) == d
    assert len(d) > .85*600 or len(a.encode(f, 25, round(p - .1, 1))) > 600
    assert best_within(a, f, 25, 10)[0] == 51 and best_within(get_anchor('svtav1', '10'), f, 25, 10)[0] == 70  # even the floor is above it
    class Steps: # more than a knob's ends can be reached
        knob = 'q', 0, 10, 1
        def encode(self, f, fps, p): return bytes(100*p + 1)
    assert best_within(Steps(), f, 25, 730)[0] == 7 and best_within(Steps(), f, 25, 9999)[0] == 10


def test_rd_curve():
    f, a = drawn(9, 64, 96), get_anchor('x264@1/2', 'fast')
    rows = rd_curve(a, f, 30, (51, 40, 30), dict(psnr=psnr, worst=lambda x, y: np.abs(x.astype(int) - y).max()))
    assert [r['point'] for r in rows] == [51, 40, 30] and rows[0]['codec'] == 'x264@1/2' and rows[0]['preset'] == 'fast'
    for r in rows:
        assert r['bpp'] == 8*r['bytes']/(9*64*96) and r['kbps'] == pytest.approx(8*r['bytes']/.3/1000)  # pixels as shown, not as coded
        assert r['psnr'] == pytest.approx(psnr(f, a.decode(a.encode(f, 30, r['point']), 9, 96, 64))) and 0 < r['worst'] <= 255
    assert [r['bytes'] for r in rows] == sorted(r['bytes'] for r in rows) and rows[0]['psnr'] < rows[2]['psnr']


# ---- programs on the PATH, by stand-ins

def program(folder, name, body):
    folder.mkdir(exist_ok=True, parents=True)
    (folder/name).write_text(f'#!{sys.executable}\nimport sys, pathlib\na = sys.argv[1:]\n{body}')
    (folder/name).chmod(0o755)


@pytest.fixture
def path(tmp_path, monkeypatch):
    "A PATH with nothing but a folder of our own, and a temporary folder that can be looked into."
    (tmp_path/'tmp').mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path/'tmp'))
    monkeypatch.setenv('PATH', str(tmp_path/'vtm/bin')); monkeypatch.delenv('CMVC_VTM_CFG', raising=False)
    yield tmp_path/'vtm/bin'
    assert not list((tmp_path/'tmp').iterdir()), 'something is left in the temporary folder'


ANNEX_B = b''.join(b'\0\0\0\1' + u for u in [b'\0\xb9a message', *unpack(VVC)])
WRITE = f"out = a[a.index('-b' if '-b' in a else '-o') + 1]\npathlib.Path(out).write_bytes(bytes.fromhex('{ANNEX_B.hex()}'))\n"


def test_vvc_is_decoded():
    shown = get_anchor('vvenc-ld').decode(VVC, 9, 64, 64)  # needs no encoder
    assert psnr(drawn(9), shown) == pytest.approx(18.739, abs=.01)


@pytest.mark.parametrize('app', ['vvencapp', 'vvencFFapp'])
@pytest.mark.parametrize('mode', ['ra', 'ld'])
def test_vvenc(path, app, mode):
    a, f = get_anchor(f'vvenc-{mode}'), drawn(9)
    assert a.missing().startswith('not available: put vvencapp')
    with pytest.raises(CmvcError, match='vvenc-.*not available'): a.encode(f, 25, 63)
    look = '''
yuv = pathlib.Path(a[a.index('-i') + 1])
assert yuv.stat().st_size == 9*64*64*3//2 and a[a.index('-s') + 1] == '64x64' and a[a.index('-q') + 1] == '52' and a[a.index('--fps') + 1] == '24000/1001'
said = ' '.join(a)
'''
    low = "assert 'GOPSize' in said and 'PicReordering' in said" if mode == 'ld' else "assert 'cra' in said and 'GOPSize' not in said"
    program(path, app, look + low + "\nassert 'IntraPeriod' in said and ('--qpa 0' in said or '--PerceptQPA 0' in said)\n" + WRITE)
    assert not a.missing() and a.encode(f, 23.976, 52) == VVC  # start codes and messages are gone
    assert a.decode(VVC, 9, 64, 64).shape == f.shape and a.points[0] == 63 and 'vtm' not in a.name


@pytest.mark.parametrize('body,said', [
    ("print('warming up'); print('Error: qp is odd', file=sys.stderr); print('bye', file=sys.stderr); sys.exit(3)", 'Error: qp is odd'),
    ("sys.exit(3)", 'failed: code 3'), ("print('all is well')", 'vvencapp wrote nothing')])
def test_a_failing_program(path, body, said):
    program(path, 'vvencapp', body)
    with pytest.raises(CmvcError, match=f'vvenc-ra at qp 63: .*{said}'): get_anchor('vvenc-ra').encode(drawn(2), 25, 63)


def test_a_program_that_cannot_run(path):
    program(path, 'vvencapp', ''); (path/'vvencapp').write_bytes(b'\x7fELF nonsense')
    with pytest.raises(CmvcError, match='vvenc-ra at qp 63'): get_anchor('vvenc-ra').encode(drawn(2), 25, 63)


@pytest.mark.parametrize('name,kind', [('vtm-ldb', 'lowdelay'), ('vtm-ldp', 'lowdelay_P')])
def test_vtm(path, tmp_path, monkeypatch, name, kind):
    a = get_anchor(name)
    assert 'EncoderApp' in a.missing()
    program(path, 'EncoderApp', f'''
cfg = pathlib.Path(a[a.index('-c') + 1])
assert cfg.read_text() == 'cfg' and cfg.name == 'encoder_{kind}_vtm.cfg'
for x in '--QP=57 --IntraPeriod=-1 --SourceWidth=64 --SourceHeight=64 --FrameRate=24 --FramesToBeEncoded=9 --InputBitDepth=8 --Level=6.2'.split(): assert x in a, x
''' + WRITE)
    assert 'CMVC_VTM_CFG' in a.missing()
    (tmp_path/'vtm/cfg').mkdir(); cfg = tmp_path/f'vtm/cfg/encoder_{kind}_vtm.cfg'; cfg.write_text('cfg')
    assert a.encode(drawn(9), 23.976, 57) == VVC        # cfg beside bin
    cfg.rename(tmp_path/cfg.name); assert a.missing()
    monkeypatch.setenv('CMVC_VTM_CFG', str(tmp_path))
    assert a.encode(drawn(9), 23.976, 57) == VVC        # or where the variable says


# ---- rivals between keyframes

def test_hold_and_blend_are_what_numpy_says():
    k = np.stack([np.full((16, 16, 3), v, np.uint8) for v in (0, 100, 255)])
    assert between(k, [0, 4, 6], 'hold')[:, 0, 0, 0].tolist() == [0, 0, 0, 0, 100, 100, 255]
    assert between(k, [0, 4, 6], 'blend')[:, 0, 0, 0].tolist() == [0, 25, 50, 75, 100, 178, 255]  # 177.5 to even
    k = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3), dtype=np.uint8)
    want = [np.rint(k[0]*(1 - t/5) + k[1]*(t/5)) for t in range(6)]
    assert np.abs(between(k, [0, 5], 'blend') - np.stack(want)).max() <= 1  # rounding of a tie


@pytest.mark.parametrize('rival', ['hold', 'blend', 'flow'])
def test_keyframes_stay_as_they_are(rival):
    k = drawn(4, 48, 64)
    x = between(k, [0, 1, 5, 12], rival)
    assert x.shape == (13, 48, 64, 3) and np.array_equal(x[[0, 1, 5, 12]], k) and np.array_equal(x, between(k, [0, 1, 5, 12], rival))
    assert np.array_equal(between(k[:1], [0], rival), k[:1])


def test_flow_follows_what_moves():
    "A texture that shifts by 8 pixels: half way it has shifted by 4, where a blend shows it twice."
    big = drawn(1, 96, 160, 3)[0].astype(int) + np.random.default_rng(1).normal(0, 40, (24, 40, 1)).repeat(4, 0).repeat(4, 1)
    f = np.stack([big[16:80, 16+i:144+i] for i in range(9)]).clip(0, 255).astype(np.uint8)
    got = {r: psnr(f[4, 8:-8, 16:-16], between(f[[0, 8]], [0, 8], r)[4, 8:-8, 16:-16]) for r in ('hold', 'blend', 'flow')}
    assert got['flow'] > got['blend'] + 5 > got['hold'] + 5


def test_flow_does_not_depend_on_threads():
    import cv2
    k, n = drawn(2, 128, 128), cv2.getNumThreads()
    try:
        cv2.setNumThreads(1); one = between(k, [0, 4], 'flow')
        cv2.setNumThreads(4); assert np.array_equal(between(k, [0, 4], 'flow'), one) and cv2.getNumThreads() == 4
    finally: cv2.setNumThreads(n)


@pytest.mark.parametrize('k,at,rival,said', [(2, [0], 'hold', '2 keyframes at'), (2, [1, 4], 'hold', 'the first 0'), (3, [0, 4, 4], 'flow', 'rising'),
    (2, [0, 4], 'dain', "no rival 'dain'"), (2, [0, 4], 'amt', 'amt: not available')])
def test_bad_keyframes(k, at, rival, said):
    with pytest.raises(CmvcError, match=said): between(drawn(k), at, rival)


def test_flow_needs_a_few_pixels():
    with pytest.raises(CmvcError, match='flow: .*>= 12'): between(drawn(2, 8, 8), [0, 2], 'flow')


def test_rife_by_its_program(path):
    "The program gets both pictures and the time; what it writes is shown; what it says is reported."
    k = drawn(2)
    with pytest.raises(CmvcError, match='rife: not available: put rife-ncnn-vulkan'): between(k, [0, 2], 'rife')
    program(path, 'rife-ncnn-vulkan', '''
from PIL import Image
o = dict(zip(a[::2], a[1::2])); assert o['-m'].startswith('rife-v4')
Image.blend(Image.open(o['-0']), Image.open(o['-1']), float(o['-s'])).save(o['-o'])''')
    assert np.abs(between(k, [0, 4], 'rife').astype(int) - between(k, [0, 4], 'blend')).max() <= 1
    program(path, 'rife-ncnn-vulkan', "print('vkCreateInstance failed', file=sys.stderr); sys.exit(1)")
    with pytest.raises(CmvcError, match='rife-ncnn-vulkan failed: vkCreateInstance'): between(k, [0, 2], 'rife')


def test_own_rivals_and_codecs(monkeypatch):
    monkeypatch.setitem(RIVALS, 'amt', (lambda a, b, times: [b for _ in times], lambda: ''))
    k = drawn(2)
    assert np.array_equal(between(k, [0, 3], 'amt'), k[[0, 1, 1, 1]])
    monkeypatch.setitem(RIVALS, 'amt', (lambda a, b, times: [b], lambda: ''))
    with pytest.raises(CmvcError, match='amt: frames'): between(k, [0, 3], 'amt')


def test_a_preset_in_the_name():
    f = drawn(9)
    a = get_anchor('x265:ultrafast@1/2')
    assert (a.name, a.preset, a.scale) == ('x265:ultrafast@1/2', 'ultrafast', Fraction(1, 2))
    assert a.encode(f, 25, 40) == get_anchor('x265@1/2', 'ultrafast').encode(f, 25, 40) and get_anchor('x265:fast', 'medium').preset == 'medium'
    with pytest.raises(CmvcError, match='warp'): get_anchor('x265:warp').encode(f, 25, 40)
    with pytest.raises(CmvcError, match='no anchor'): get_anchor('x266:fast')
