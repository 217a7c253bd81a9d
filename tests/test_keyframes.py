import hashlib, resource, subprocess, sys
import numpy as np, pytest
from PIL import Image
from hypothesis import given, settings, strategies as st
from cmvc_nb import keyframes as K
from cmvc_nb.errors import CmvcError, BitstreamError

def drawn(n=3, h=64, w=64, seed=0):
    "A smooth random ground, slightly noisy, with a disc that moves."
    g = np.random.default_rng(seed)
    ground = Image.fromarray(g.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((w, h), Image.BICUBIC)
    bg = np.asarray(ground).astype(int) + g.normal(0, 4, (h, w, 1)).round().astype(int)
    y, x = np.mgrid[:h, :w]
    discs = [(x - w*(.3 + .4*i/max(n-1, 1)))**2 + (y - h/2)**2 < (h/5)**2 for i in range(n)]
    return np.stack([np.where(d[..., None], (230, 40, 30), bg) for d in discs]).clip(0, 255).astype(np.uint8)

ONE = {c: K.encode_group(drawn(), c, 30) for c in K.CODECS}

def decode(p, codec='av1', n=3, size=(64, 64)): return K.decode_group(p, codec, n, *size)

def test_codec_numbers_never_change():
    assert K.CODECS == {'av1': 0, 'avif': 1, 'webp': 2, 'jpeg': 3, 'x265': 4}

@pytest.mark.parametrize('codec', K.CODECS)
@pytest.mark.parametrize('n,h,w', [(1, 64, 64), (3, 64, 128), (2, 192, 64)])
def test_round_trip(codec, n, h, w):
    f = drawn(n, h, w)
    d = decode(K.encode_group(f, codec, 60), codec, n, (w, h))
    assert d.shape == f.shape and d.dtype == np.uint8
    assert all(K.psnr(a, b) > 26 for a, b in zip(f, d))        # each frame in its own place

def test_large_and_odd_shapes():
    f = drawn(1, 64, 4096)
    assert K.psnr(f, decode(K.encode_group(f, quality=10), n=1, size=(4096, 64))) > 20
    f = drawn(2, 66, 70)
    assert decode(K.encode_group(f, quality=10), n=2, size=(70, 66)).shape == f.shape

@pytest.mark.parametrize('n', range(1, 10))
def test_stripping_changes_no_pixel(n):
    f = drawn(n, 64, 64, seed=n)
    for preset, crf, size in ((1, 60, (64, 64)), (4, 20, (64, 64)), (4, 60, (320, 256)), (6, 66, (80, 96)), (8, 50, (320, 256)), (10, 50, (64, 64))):
        s = K.svt_encode(f, crf, size, preset)
        p = K.strip_av1(s, n, size)
        assert (p[0] < 240 and len(s) - len(p) >= 11 + 5*n) == (n < 9 and preset < 10)
        a, b = K.decode_units('libdav1d', [s], n, size), K.decode_units('libdav1d', K.unstrip_av1(p, n, size), n, size)
        assert np.array_equal(a, b)

def test_stream_of_an_unknown_encoder_is_kept_whole(monkeypatch):
    f = drawn()
    want = decode(p := K.strip_av1(K.svt_encode(f, 55, (64, 64)), 3, (64, 64)))
    monkeypatch.setattr(K, 'TAILS', ['1'])
    q = K.strip_av1(K.svt_encode(f, 55, (64, 64)), 3, (64, 64))
    monkeypatch.undo()
    assert q[0] == 240 and len(q) > len(p) and np.array_equal(decode(q), want)

def test_planes_are_bt601_full_range():
    rgb = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    y = K.to_planes(rgb, (64, 64))[:64]
    assert np.abs(y - rgb @ [.299, .587, .114]).max() < 1.01
    flat = np.full((64, 64, 3), (200, 90, 30), np.uint8)
    assert np.abs(K.from_planes(K.to_planes(flat, (32, 48)), (64, 64)).astype(int) - flat).max() <= 2

def test_bytes_and_decibels_grow_with_quality():
    f = drawn(2, 128, 128, seed=3)
    points = K.rd_points(f, 'av1', (-40, -20, -10, 0, 5, 10, 20, 35, 50, 75, 100))
    assert all(a[1] < b[1] and a[2] < b[2] + .05 for a, b in zip(points, points[1:]))
    sizes = dict((q, n) for q, n, _ in points)
    assert sizes[5] < 1.5*sizes[0] and sizes[-40] < .8*sizes[0]       # no gap at the low end
    for codec in ('avif', 'webp', 'jpeg', 'x265'):
        sizes = [p[1] for p in K.rd_points(f, codec, (0, 25, 50, 75, 100))]
        assert sizes == sorted(set(sizes))

def test_quality_zero_is_near_plain_crf_63_and_smaller():
    from cmvc_nb.video import Video, demo_clip
    f = np.stack([np.asarray(Image.fromarray(x).resize((256, 256))) for i, x in zip(range(33), Video(demo_clip('carphone'))) if i % 16 == 0])
    plain = K.svt_encode(f, 63, (256, 256), params='tune=1')
    shown = [K.from_planes(p, (256, 256)) for p in K.decode_units('libdav1d', [plain], 3, (256, 256))]
    p = K.encode_group(f)
    d = decode(p, size=(256, 256))
    assert K.psnr(f, d) > K.psnr(f, shown) - .3
    assert len(p) < .9*len(plain)

def test_same_bytes_and_pixels_in_another_process():
    code = 'import hashlib, test_keyframes as t\nfor c, p in t.ONE.items(): print(hashlib.sha256(p).hexdigest(), hashlib.sha256(t.decode(p, c).tobytes()).hexdigest())'
    out = subprocess.run([sys.executable, '-c', code], cwd=__file__.rsplit('/', 1)[0], capture_output=True, text=True, check=True)
    assert out.stdout.split() == [hashlib.sha256(x).hexdigest() for c, p in ONE.items() for x in (p, decode(p, c).tobytes())]
    assert not out.stderr                                       # no encoder's chatter

def test_groups_do_not_depend_on_each_other():
    a, b = (K.encode_group(drawn(3, seed=s)) for s in (1, 2))
    first = decode(b)
    decode(a)
    assert np.array_equal(decode(b), first) and not np.array_equal(decode(a), first)

GOLDEN = [ # never to be changed: files of this version must keep their keyframes
    ('av1', 3, 64, 64, '003d28f6822080000312e2369544c94975670a3edc903982197f874352668c3dfa27e3ce6c8fc77bf292d87b444eca1d57b59e0c81ab330c5d64f993118341761df802080000313e38001c02aaa43012c96dee93a20486a2ae8b077f0769e76b52a8da2c33267fb03bf6000006000780009fc0', 'a4c749d7eeeb7a75'),
    ('av1', 1, 128, 96, '109f808618c380c0bc80052d01c712455ea17b8fdb0a7ded804f8bcace3e8b25bac00619aa9610f4c3c40db6d5941a0f301dab8d7c2318940e1f425932fb1222c15283b6eefc7ee0a1d6c01628f9c3aa', '7afa60c69f2cde42'),
    ('av1', 2, 128, 128, '045f9e008820e000cdf480831d9ea78f54b54c7f3398403eb77eebacd3238aa468b38674bdc64f58e6b6220f5ec154b62ebf97913012db05e1b5986a2819cbf4df150b987ce55c7ca216ad1fed439d7606a1a666cc2badfe25f72e93e5a1d659673a7d81861c0019a71400ab0736bdb501198cb8c3ddba952f98dcbd27b67614d74120', '37ae36d31d99fa33'),
    ('avif', 1, 64, 64, '12000a0918157ffdb2021a0d083285011f97878515d248fce2ceba02db29eb550207764e18177f9eccc65a2a20977764be5f524ac8a1316b32d8279a46eb5a3bd462dea5aeb0a34bd836a9090d6ace1bbefbfa559fd767b1b5271ce39737aeeaafaae132b09ac6aab1fab17fb5d8c3ee4de32c229826fd769bb313c9badee13413cd6b2b64e084be98da41f9e39f7ba9edabfc0b40', 'c1e100fe51a7988e'),
    ('webp', 1, 64, 64, '1006009d012a400040003ffdfeff7fbfbfbfbbae16dd53f03f896c00aff9ccd91e677579faf6ea3b5acb66a0c5442e4c3f972cd9fb05fde8a000cca9027b9c9143336c2bf927b1a8c047844de2e738205a1663c26056d6189a668cc2b04c418d31449500fe149d83e2087d24ee12bf452979c75b534dbd42c998a5c2464415faf7c25632826c28266be0b4c8771d861ae556b03050930adb8e0662148a657680c8e8c62c0000', 'f3102bff5569f5bb'),
    ('x265', 2, 64, 64, '99010000000140010c01ffff01600000030090000003000003001e9598090000000142010101600000030090000003000003001ea020810596566924cae68080000003008000000c84000000014401c172b422400000012801af0658fdfc60a11ee01c621e6adcfa14f03edb1dfef2564c914f00d0ed557e825725ed86dfa227362cd8bbbd4e529708c8bea8b618f39d911b6d95240a8d441cd578000000010201d0097e10c60cb0fde034bffe6a13c157b6c98d34c97d726489adb505fca9bc5e71b8974dc354769b63fddf0a8b334a94e8', '43a5ad6de1ab5114'),
]

@pytest.mark.parametrize('codec,n,w,h,payload,digest', GOLDEN)
def test_old_payloads_keep_their_pixels(codec, n, w, h, payload, digest):
    assert hashlib.sha256(decode(bytes.fromhex(payload), codec, n, (w, h)).tobytes()).hexdigest()[:16] == digest

def hostile(payload, codec, n=3, size=(64, 64)):
    try: d = K.decode_group(payload, codec, n, *size)
    except BitstreamError: return
    assert d.shape == (n, size[1], size[0], 3) and d.dtype == np.uint8

@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(K.CODECS)), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6), st.integers(0, 10**6), st.booleans())
def test_mutated_payloads(codec, changes, cut, whole):
    p = bytearray(ONE[codec])
    for i, v in changes: p[i % len(p)] = v
    hostile(bytes(p if whole else p[:cut % len(p)]), codec)

@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(K.CODECS)), st.binary(max_size=200), st.integers(0, 12))
def test_random_payloads(codec, data, n): hostile(data, codec, max(n, 1)) if n else pytest.raises(BitstreamError, K.decode_group, data, codec, 0, 64, 64)

@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=80), st.integers(0, 12))
def test_random_bytes_after_a_good_header(data, scale):
    hostile(bytes([scale + 240]) + K.obu(1, K.sequence_header(K.coded_size(64, 64, scale), K.TAILS[1])) + K.obu(6, b'\x10\0' + data), 'av1', 1)
    hostile(bytes([scale + 16]) + data, 'av1', 1)

def test_every_cut_of_every_codec():
    for codec, p in ONE.items():
        for i in range(0, len(p), 1 + len(p)//60): hostile(p[:i], codec)

def test_huge_claims_allocate_nothing():
    def claim(size): return bytes([240]) + K.obu(1, K.sequence_header(size, K.TAILS[1])) + b''.join(K.obu(6, u[1]) for u in K.obus(K.svt_encode(drawn(1), 55, (64, 64))) if u[0] == 6)
    vp8 = K.encode_group(drawn(1), 'webp', 5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in ((65536, 65536), (8192, 4096), (64, 66), (128, 64)):
        with pytest.raises(BitstreamError): K.decode_group(claim(size), 'av1', 1, 64, 64)
        with pytest.raises(BitstreamError): K.decode_group(claim(size)[1:], 'avif', 1, 64, 64)
    with pytest.raises(BitstreamError): K.decode_group(vp8[:6] + b'\xff?\xff?' + vp8[10:], 'webp', 1, 64, 64)
    j = ONE['jpeg'].replace(b'\0\x11\x08\0\x40\0\x40', b'\0\x11\x08\xff\xff\xff\xff')
    assert j != ONE['jpeg']
    with pytest.raises(BitstreamError): decode(j, 'jpeg')
    with pytest.raises(BitstreamError): K.decode_group(ONE['av1'], 'av1', 10**12, 64, 64)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000   # kB

def test_more_pictures_than_promised():
    whole = bytes([240]) + b''.join(K.obu(*u) for u in K.obus(K.svt_encode(drawn(), 55, (64, 64))) if u[0] != 2)
    assert decode(whole).shape == (3, 64, 64, 3)
    for n in (1, 2, 4):
        with pytest.raises(BitstreamError): decode(whole, n=n)

@pytest.mark.parametrize('frames', [np.zeros((2, 64, 64), np.uint8), np.zeros((0, 64, 64, 3), np.uint8), np.zeros((1, 64, 64, 3)), np.zeros((1, 65, 64, 3), np.uint8), np.zeros((1, 32, 64, 3), np.uint8)])
def test_bad_frames(frames):
    with pytest.raises(CmvcError, match='keyframes: '): K.encode_group(frames)

@pytest.mark.parametrize('codec,quality', [('av1', 101), ('av1', -51), ('av1', float('nan')), ('jpeg', -1), ('gif', 10)])
def test_bad_options(codec, quality):
    with pytest.raises(CmvcError, match='quality|codec'): K.encode_group(drawn(1), codec, quality)

def test_flat_frames():
    for v in (0, 255):
        f = np.full((3, 64, 64, 3), v, np.uint8)
        for q in (-50, 0, 100): assert np.abs(decode(K.encode_group(f, quality=q)).astype(int) - f).max() <= 3
