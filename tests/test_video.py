"Everything that comes in, and what goes out; clips are made here, colours are computed a second time."
import gc, io, os, subprocess, sys, types, weakref
from fractions import Fraction
from pathlib import Path

import av, numpy as np, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from cmvc_nb import video as V
from cmvc_nb.errors import CmvcError
from cmvc_nb.video import (Video, VideoWriter, as_frames, constant_rate, demo_clip, frame_rate, orientation, raw_format, read_video, to_rgb, upright, write_video)

ROOT = Path(__file__).parent.parent


def drawn(w=64, h=48, n=12):
    "A moving gradient: every frame differs from its mirror images and from the other frames."
    y, x = np.mgrid[:h, :w]
    return np.stack([np.stack([(x*3 + i*5) % 256, np.minimum(y*4, 255), np.full_like(x, i*19 % 256)], -1) for i in range(n)]).astype(np.uint8)


def make(path, frames=None, codec='libx264', pix='yuv420p', fps=25, form=None, pts=None, base=None, audio=False, options={}, container={}, prepare=None, tag={}):
    "A clip by PyAV alone, without the code under test."
    with av.open(str(path), 'w', format=form, options=container) as o:
        if frames is not None:
            s = o.add_stream(codec, rate=fps, options=options)
            s.height, s.width, s.pix_fmt = *frames.shape[1:3], pix
            for k, v in tag.items(): setattr(s.codec_context, k, v)
            if base: s.codec_context.time_base = base
            if prepare: prepare(s)
        if audio: a = o.add_stream('aac', rate=44100)
        for i, f in enumerate(frames if frames is not None else ()):
            v = av.VideoFrame.from_ndarray(f, format='rgba' if f.shape[-1] == 4 else 'rgb24').reformat(format=pix, threads=1)
            v.pts, v.time_base = i if pts is None else pts[i], base or 1/Fraction(fps)
            o.mux(s.encode(v))
        if frames is not None: o.mux(s.encode())
        if audio:
            f = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format='fltp', layout='mono'); f.sample_rate = 44100
            o.mux(a.encode(f)); o.mux(a.encode())
    return path


def near(a, b): return float(np.abs(a.astype(int) - b).mean())
def order(got, want): return [min(range(len(want)), key=lambda j: near(f, want[j])) for f in got]


# ---- colour, against the formula

WEIGHTS = {'bt601': (.299, .114, 6), 'bt470bg': (.299, .114, 5), 'bt709': (.2126, .0722, 1), 'bt2020': (.2627, .0593, 9), 'smpte240m': (.212, .087, 7)}


def formula(yuv, kr, kb, full, bits=8):
    unit, top = 2**(bits - 8), 2**bits - 1
    y, u, v = yuv[0].astype(float), yuv[1] - 128.*unit, yuv[2] - 128.*unit
    y, u, v = (y/top, u/top, v/top) if full else ((y/unit - 16)/219, u/unit/224, v/unit/224)
    r, b = y + 2*(1 - kr)*v, y + 2*(1 - kb)*u
    return np.clip(np.stack([r, (y - kr*r - kb*b)/(1 - kr - kb), b], -1)*255, 0, 255)


def planes(yuv, pix):
    "A frame with exactly these samples; chroma is taken at every other one for 4:2:0."
    f = av.VideoFrame(yuv.shape[2], yuv.shape[1], pix)
    for p, a in zip(f.planes, (yuv[0], *(yuv[1:, ::2, ::2] if '420' in pix else yuv[1:]))):
        rows = np.zeros((p.height, p.line_size), np.uint8)
        b = np.ascontiguousarray(a).view(np.uint8); rows[:, :b.shape[1]] = b; p.update(rows)
    return f


@pytest.mark.parametrize('pix, bits', [('yuv420p', 8), ('yuv444p', 8), ('yuv420p10le', 10)])
@pytest.mark.parametrize('full', [False, True], ids=['limited', 'full'])
@pytest.mark.parametrize('name', WEIGHTS)
def test_declared_colour(tmp_path, name, full, pix, bits):
    "Through a file: flat blocks of random samples come out as the formula says, within rounding."
    kr, kb, code = WEIGHTS[name]
    lo, hi = (0, 2**bits) if full else (16 << bits - 8, (235 << bits - 8) + 1)
    yuv = np.random.default_rng(1).integers(lo, hi, (3, 6, 8)).astype(np.uint8 if bits == 8 else np.uint16).repeat(16, 1).repeat(16, 2)
    with av.open(str(tmp_path/'c.mkv'), 'w') as o:
        s = o.add_stream('ffv1', rate=25); s.width, s.height, s.pix_fmt = 128, 96, pix
        s.codec_context.colorspace, s.codec_context.color_range = code, 1 + full
        f = planes(yuv, pix); f.colorspace, f.color_range, f.pts, f.time_base = code, 1 + full, 0, Fraction(1, 25)
        o.mux(s.encode(f)); o.mux(s.encode())
    v = Video(tmp_path/'c.mkv')
    assert v.info.full_range is full and v.info.matrix == {'bt470bg': 'bt601'}.get(name, name)
    e = (next(iter(v)) - formula(yuv, kr, kb, full, bits))[8::16, 8::16]
    assert np.abs(e).max() < (1.3 if full and bits == 10 else .6) and abs(e.mean()) < (.5 if full and bits == 10 else .12)


@pytest.mark.parametrize('height, name', [(48, 'bt601'), (718, 'bt601'), (720, 'bt709'), (1080, 'bt709')])
def test_undeclared_colour(height, name):
    "By custom, the number of lines decides; the other matrix would be far off."
    yuv = np.random.default_rng(2).integers(40, 200, (3, 1, 4), dtype=np.uint8).repeat(height, 1).repeat(16, 2)
    f = planes(yuv, 'yuv444p')
    other = dict(bt601='bt709', bt709='bt601')[name]
    assert np.abs(to_rgb(f) - formula(yuv, *WEIGHTS[name][:2], False)).max() < .6
    assert np.abs(to_rgb(f) - formula(yuv, *WEIGHTS[other][:2], False)).max() > 3


def test_odd_declarations_do_not_fail():
    "Reserved and unusual codes, and a frame whose size changes, still give a picture."
    f = planes(np.full((3, 48, 64), 128, np.uint8), 'yuv444p')
    for code in 0, 2, 3, 8, 10, 11, 14:
        f.colorspace = code
        assert np.abs(to_rgb(f).astype(int) - 130).max() <= 1
    assert to_rgb(f, size=(32, 24)).shape == (24, 32, 3)


@pytest.mark.parametrize('pix', ['gray', 'gbrp', 'bgr0', 'rgb24', 'yuv444p16le', 'gray16le', 'gbrp10le', 'yuvj420p', 'nv12', 'yuv411p'])
def test_pixel_formats(pix):
    grey = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (32, 1))[..., None].repeat(3, -1)
    f = av.VideoFrame.from_ndarray(grey, format='rgb24').reformat(format=pix, threads=1, dst_color_range=2 if pix.startswith(('yuvj', 'gray')) else 1)
    assert np.abs(to_rgb(f).astype(int) - grey).max() <= 2


def test_alpha_over_black(tmp_path):
    rgba = np.random.default_rng(3).integers(0, 256, (3, 32, 40, 4), dtype=np.uint8)
    want = np.rint(rgba[..., :3]*(rgba[..., 3:]/255))
    f, _ = read_video(make(tmp_path/'a.mkv', rgba, 'ffv1', 'bgra'))
    assert np.abs(f - want).max() <= .5
    Image.fromarray(rgba[0]).save(tmp_path/'a.png')
    assert np.abs(read_video(tmp_path/'a.png')[0][0] - want[0]).max() <= .5
    flat = np.full((2, 32, 32, 4), 255, np.uint8); flat[..., 1] = 60; flat[..., 3] = 128
    f, _ = read_video(make(tmp_path/'y.mkv', flat, 'ffv1', 'yuva420p'))
    assert np.abs(f[0, 16, 16].astype(int) - [128, 30, 128]).max() <= 3


# ---- containers

@pytest.mark.parametrize('file, codec, pix, kw', [
    ('a.mp4', 'libx264', 'yuv420p', {}), ('a.mkv', 'libx264', 'yuv420p10le', {}), ('a.webm', 'libvpx-vp9', 'yuv420p', {}), ('a.h264', 'libx264', 'yuv420p', dict(form='h264')),
    ('a.265', 'libx265', 'yuv420p10le', dict(form='hevc', options={'x265-params': 'log-level=none:pools=none'})), ('a.y4m', 'rawvideo', 'yuv444p', {}),
    ('a.avi', 'mpeg4', 'yuv420p', dict(options=dict(bf='2'))), ('a.mov', 'prores_ks', 'yuv422p10le', {}), ('a.ts', 'libx264', 'yuv420p', {}), ('a.mpg', 'mpeg2video', 'yuv420p', dict(options=dict(b='4000000')))])
def test_containers(tmp_path, file, codec, pix, kw):
    "All frames, in order, at the rate, twice the same."
    F = drawn()
    v = Video(make(tmp_path/file, F, codec, pix, **kw))
    assert v.info.frames in (None, len(F))
    a = np.stack(list(v))
    assert v.info.frames == len(F)
    assert a.shape == F.shape and order(a, F) == list(range(len(F))) and near(a, F) < 12
    assert v.info.fps == 25 and not v.info.has_audio
    assert all((x == y).all() for x, y in zip(a, v))


@pytest.mark.parametrize('w, h', [(33, 17), (1, 1), (1, 9), (40, 31)])
@pytest.mark.parametrize('pix', ['yuv420p', 'yuv420p10le', 'yuv444p'])
def test_odd_sizes(tmp_path, w, h, pix):
    F = np.full((3, h, w, 3), 90, np.uint8)
    f, _ = read_video(make(tmp_path/'o.mkv', F, 'ffv1', pix, options=dict(slices='1')))
    assert f.shape == F.shape and np.abs(f.astype(int) - 90).max() <= 2


@pytest.mark.parametrize('fps', ['25', '30000/1001', '60000/1001', '12.5', '120', '1/2'])
@pytest.mark.parametrize('n', [1, 5])
@pytest.mark.parametrize('kind', ['mkv', 'mp4', 'y4m'])
def test_rates_survive(tmp_path, fps, n, kind):
    write_video(tmp_path/f'r.{kind}', drawn(32, 32, n), fps)
    v = Video(tmp_path/f'r.{kind}')
    assert (v.info.fps, v.info.frames, sum(1 for _ in v)) == (frame_rate(fps), n, n)


@pytest.mark.parametrize('degrees, turns', [(0, 0), (90, 1), (180, 2), (-90, 3)])
def test_rotation(tmp_path, degrees, turns):
    F = drawn(64, 32, 3)
    v = Video(make(tmp_path/'r.mp4', F, pix='yuv444p', options=dict(crf='0'), prepare=lambda s: s.set_display_rotation(degrees)))
    f = np.stack(list(v)); want = np.rot90(F, turns, (1, 2))
    assert f.shape == want.shape and near(f, want) < 2 and (v.info.height, v.info.width) == want.shape[1:3]


def test_mirrors(tmp_path):
    "The eight symmetries: the corner of the source goes where the matrix sends it."
    F = drawn(64, 32, 1)
    for flip in 'hflip', 'vflip':
        f, _ = read_video(make(tmp_path/'m.mp4', F, pix='yuv444p', options=dict(crf='0'), prepare=lambda s: s.set_display_rotation(0, **{flip: True})))
        assert near(f, F[:, :, ::-1] if flip == 'hflip' else F[:, ::-1]) < 2
    for a, b, c, d in [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1), (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, 1, 0), (0, -1, -1, 0)]:
        m = (np.array([a, b, 0, c, d, 0, 0, 0, 0]) << 16).astype(np.int32)
        side = type('S', (), dict(type=types.SimpleNamespace(name='DISPLAYMATRIX'), __bytes__=lambda s: m.tobytes()))()
        src = F[0]; h, w = src.shape[:2]
        out = upright(src, orientation(types.SimpleNamespace(side_data=[side])))
        where = {}
        for q, p in (0, 0), (h - 1, 0), (0, w - 1), (5, 9):
            x, y = a*p + c*q, b*p + d*q
            x, y = x + (w - 1 if a < 0 else h - 1 if c < 0 else 0), y + (w - 1 if b < 0 else h - 1 if d < 0 else 0)
            assert (out[y, x] == src[q, p]).all()


# ---- rate

@given(st.integers(1, 200), st.sampled_from([Fraction(25), Fraction(30000, 1001), Fraction(120)]), st.floats(0, .49), st.integers(-5, 5), st.randoms())
def test_jitter_changes_nothing(n, fps, jitter, start, rnd):
    stamps = [start + (i + (rnd.uniform(-jitter, jitter) if i else 0))/float(fps) for i in range(n)]
    assert list(constant_rate(zip(stamps, range(n)), fps)) == list(range(n))


@given(st.lists(st.floats(0, 3), min_size=1, max_size=60))
def test_any_gaps(steps):
    "At each tick stands the frame nearest in time among those before the next one; the length is right."
    stamps = np.cumsum(steps); stamps = list(stamps - stamps[0])
    out = list(constant_rate(zip(stamps, range(len(stamps))), Fraction(10)))
    assert out == sorted(out) and len(out) == round(stamps[-1]*10) + 1 and out[-1] == len(stamps) - 1
    assert all(out[round(t*10)] >= i for i, t in enumerate(stamps))


def test_clock_restarts():
    "A splice, backwards or far ahead, neither ends the stream nor fills a day with repeats; no stamps at all: one tick each."
    assert list(constant_rate([(0, 'a'), (.1, 'b'), (-5, 'c'), (-4.9, 'd'), (90_000, 'e'), (90_000.1, 'f')], Fraction(10))) == list('abcdef')
    assert list(constant_rate([(None, i) for i in range(5)], Fraction(25))) == list(range(5))
    assert list(constant_rate([], Fraction(25))) == []


@pytest.mark.parametrize('kind', ['mkv', 'mp4'])
def test_variable_rate_file(tmp_path, kind):
    F = drawn(n=11)
    ms = [0, 40, 80, 120, 500, 540, 580, 1000, 1040, 1080, 1120]
    v = Video(make(tmp_path/f'v.{kind}', F, 'libx264', 'yuv444p', pts=ms, base=Fraction(1, 1000), options=dict(crf='0')))
    f = np.stack(list(v)); seen = order(f, F)
    assert len(f) == pytest.approx(float(1.16*v.info.fps), abs=1.5) == v.info.frames   # the clip lasts as long as before
    ticks = [max(i for i, t in enumerate(ms) if t/1000 <= k/v.info.fps + 1/v.info.fps/2 + Fraction(1, 1000)) for k in range(len(f))]
    assert seen == sorted(seen) and max(abs(a - b) for a, b in zip(seen, ticks)) <= 1


@pytest.mark.parametrize('text, want', [('25', 25), (29.97, Fraction(30000, 1001)), ('23.976', Fraction(24000, 1001)), (Fraction(19001, 317), Fraction(60000, 1001)), (12.5, Fraction(25, 2)), ('24', 24), ('30', 30), ('1/3000', Fraction(1, 3000))])
def test_frame_rate(text, want): assert frame_rate(text) == want


@pytest.mark.parametrize('bad', ['0', '-3', 'fast', '1/0', None, float('nan'), float('inf'), ''])
def test_bad_frame_rate(bad):
    with pytest.raises(CmvcError, match='frame rate'): frame_rate(bad)


# ---- raw samples, pipes, pictures, arrays

@pytest.mark.parametrize('name, want', [
    ('BasketballPass_416x240_50.yuv', (416, 240, 50, 'yuv420p')), ('BQMall_832x480_60.yuv', (832, 480, 60, 'yuv420p')),
    ('Tango2_4096x2176_60fps_10bit_420.yuv', (4096, 2176, 60, 'yuv420p10le')), ('Beauty_3840x2160_120fps_420_10bit_YUV.yuv', (3840, 2160, 120, 'yuv420p10le')),
    ('clip_416x240_10bit_50fps.yuv', (416, 240, 50, 'yuv420p10le')), ('x_352x288_29.97.yuv', (352, 288, Fraction(30000, 1001), 'yuv420p')),
    ('x_352x288_30_444.yuv', (352, 288, 30, 'yuv444p')), ('a_1920x1080p50_10b.yuv', (1920, 1080, 50, 'yuv420p10le')), ('x-64x48-yuv422p10le.yuv', (64, 48, 25, 'yuv422p10le')),
    ('foreman_cif.yuv', (352, 288, 25, 'yuv420p')), ('akiyo_qcif_30.yuv', (176, 144, 30, 'yuv420p')),
    ('1920x1080@50:yuv420p10le', (1920, 1080, 50, 'yuv420p10le')), ('64x48', (64, 48, 25, 'yuv420p')), ('64x48@30000/1001:nv12', (64, 48, Fraction(30000, 1001), 'nv12')), ('8x8@10', (8, 8, 10, 'yuv420p'))])
def test_raw_format(name, want): assert raw_format(name) == want


@pytest.mark.parametrize('bad', ['holiday.yuv', '', '0x48', '64x48:yuv999', '64x48@0', '64x48@25:bogus', '99999x0:rgb24'])
def test_bad_raw_format(bad):
    with pytest.raises(CmvcError): raw_format(bad)


@pytest.mark.parametrize('pix, size', [('yuv420p', (64, 48)), ('yuv420p10le', (66, 50)), ('yuv422p', (33, 17)), ('nv12', (64, 48)), ('gray', (31, 5))])
def test_raw_file(tmp_path, pix, size):
    "The samples that PyAV would pack are read as the frames they came from, by raw= and by name."
    w, h = size; F = drawn(w, h, 4); data = b''
    for f in F:
        with av.open(buf := io.BytesIO(), 'w', format='rawvideo') as o:
            s = o.add_stream('rawvideo', rate=25); s.width, s.height, s.pix_fmt = w, h, pix
            v = av.VideoFrame.from_ndarray(f, format='rgb24').reformat(format=pix, threads=1); v.pts, v.time_base = 0, Fraction(1, 25)
            o.mux(s.encode(v)); o.mux(s.encode())
        data += buf.getvalue()
    (tmp_path/'samples').write_bytes(data); (tmp_path/f's_{w}x{h}_50_{pix}.yuv').write_bytes(data)
    f, fps = read_video(tmp_path/'samples', raw=f'{w}x{h}@50:{pix}')
    g, again = read_video(tmp_path/f's_{w}x{h}_50_{pix}.yuv')
    assert f.shape == F.shape and fps == again == 50 and (f == g).all() and (pix == 'gray' or near(f, F) < 12)
    (tmp_path/'samples').write_bytes(data[:-1])
    with pytest.raises(CmvcError, match='not whole'): read_video(tmp_path/'samples', raw=f'{w}x{h}@50:{pix}')


def run(code, stdin=None, **kw):
    return subprocess.run([sys.executable, '-c', 'import sys\nfrom cmvc_nb.video import *\nfrom cmvc_nb.errors import CmvcError\n' + code], input=stdin, capture_output=True, cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS='1'), **kw)


def test_pipes(tmp_path):
    "y4m on standard input and on standard output; the input can be read twice; nothing else goes to standard output."
    F = drawn(34, 18, 6); write_video(tmp_path/'p.y4m', F, 50)
    r = run("v = Video('-'); list(v); write_video('-', v, v.info.fps)", (tmp_path/'p.y4m').read_bytes())
    assert r.returncode == 0 and r.stdout.startswith(b'YUV4MPEG2 W34 H18 F50:1') and r.stderr == b''
    (tmp_path/'q.y4m').write_bytes(r.stdout)
    (f, fps), (g, _) = read_video(tmp_path/'q.y4m'), read_video(tmp_path/'p.y4m')
    assert f.shape == F.shape and fps == 50 and near(f, g) < 3
    for bad in b'', b'hello', b'YUV4MPEG2 W34 H18 F50:1 C420\nFRAME\nshort':
        r = run("try: list(Video('-'))\nexcept CmvcError as e: sys.exit(f'E {e}')", bad)
        assert r.returncode == 1 and r.stderr.startswith(b'E standard input') and r.stderr.count(b'\n') == 1
    assert 'C420' in (tmp_path/'p.y4m').read_bytes()[:80].decode('latin1')


def test_fifo(tmp_path):
    write_video(tmp_path/'p.y4m', drawn(34, 18, 6), 50); os.mkfifo(tmp_path/'pipe')
    p = subprocess.Popen(['sh', '-c', f'cat "{tmp_path}/p.y4m" > "{tmp_path}/pipe"'])
    with Video(tmp_path/'pipe') as v: assert len(list(v)) == len(list(v)) == 6
    p.wait()


def test_pictures(tmp_path):
    F = drawn(20, 10, 12); d = tmp_path/'shots'; d.mkdir()
    for i, f in enumerate(F): Image.fromarray(f).save(d/f'shot{i}.png')
    (d/'notes.txt').write_text('not a picture')
    v = Video(d, fps=10)
    assert (np.stack(list(v)) == F).all() and v.info.fps == 10 and v.info.frames == 12 and read_video(str(d))[1] == 25
    Image.fromarray(F[0, :, :5]).save(d/'shot99.png')
    with pytest.raises(CmvcError, match='shot99.png: 5x10'): list(v.__class__(d))
    (d/'shot99.png').write_bytes(b'\x89PNG broken')
    with pytest.raises(CmvcError, match='shot99.png'): list(Video(d))


def test_strange_names(tmp_path):
    "Names that FFmpeg would take for patterns, protocols or options."
    for name in 'a%03d.png', '100%.png', 'http:x.png', '-x.png', 'a b\n.png', 'ü.png':
        Image.fromarray(drawn(8, 6, 1)[0]).save(tmp_path/name)
        assert (read_video(tmp_path/name)[0] == drawn(8, 6, 1)).all()


def test_arrays():
    F = drawn(20, 10, 3)
    assert (read_video(F)[0] == F).all() and (read_video(F[0])[0] == F[:1]).all() and read_video(F, fps='29.97')[1] == Fraction(30000, 1001)
    assert (as_frames(F.transpose(0, 3, 1, 2)) == F).all() and (as_frames(F/255) == F).all() and (as_frames(F/127.5 - 1) == F).all()
    assert (as_frames(F[..., :1]) == F[..., :1]).all() and as_frames(np.concatenate([F, F[..., :1]*0], -1)).max() == 0
    for bad in np.zeros((3, 4)), np.zeros((0, 5, 5, 3)), np.full((1, 2, 2, 3), 255.), np.zeros((1, 2, 2, 5)), np.zeros((1, 2, 2, 3), np.int64), np.full((1, 2, 2, 3), np.nan), np.array('x'):
        with pytest.raises(CmvcError): as_frames(bad)


def test_tensors():
    torch = pytest.importorskip('torch')
    F = drawn(20, 10, 3); t = torch.from_numpy(F)
    x = t.permute(0, 3, 1, 2).float()/127.5 - 1
    for a in t, t.permute(0, 3, 1, 2), x, x.half().requires_grad_(), x.bfloat16(): assert np.abs(as_frames(a).astype(int) - F).max() <= (0 if a.dtype in (torch.uint8, torch.float32, torch.float16) else 1)


def test_iterables(tmp_path):
    "A generator can be read twice, exactly; what was put aside goes with the video."
    F = drawn(20, 10, 60)
    with Video(iter(list(F)), fps=50) as v:
        assert (np.stack(list(v)) == F).all() and (np.stack(list(v)) == F).all() and v.info.fps == 50 and v.info.frames == 60
        folder = Path(v._folder.name); assert folder.exists()
    assert not folder.exists()
    for bad in [], iter(()), [F[0], F[0, :5]], ['frame'], [None]:
        with pytest.raises(CmvcError): Video(bad)


def test_iterables_of_floats():
    "One scale for all frames: a bright frame of a video in [-1, 1] has no negative value. And no message names the folder where they were put aside."
    F = drawn(20, 10, 3); F[1] = F[1]//4 + 191
    with Video(iter(F/127.5 - 1)) as v: assert (np.stack(list(v)) == F).all()
    with Video(iter(F/255)) as v: assert (np.stack(list(v)) == F).all()
    with pytest.raises(CmvcError, match='frame 1 has values below 0'): Video([F[0]/255, F[0]/255 - 1])
    with pytest.raises(CmvcError, match='^frames: '): Video([F[0], F[0, :5]])


def test_pixels_that_are_not_square(tmp_path, capfd):
    "Taken as square, and it is said."
    with av.open(str(tmp_path/'n.mp4'), 'w') as c:
        s = c.add_stream('libx264', rate=25); s.width, s.height, s.pix_fmt, s.codec_context.sample_aspect_ratio = 64, 48, 'yuv420p', Fraction(16, 15)
        for f in drawn(): c.mux(s.encode(av.VideoFrame.from_ndarray(f, 'rgb24')))
        c.mux(s.encode())
    assert (Video(tmp_path/'n.mp4').info.width, Video(tmp_path/'n.mp4').info.aspect) == (64, Fraction(16, 15))
    assert capfd.readouterr().err == 'cmvc: n.mp4: pixels are 16/15 as wide as high, and are taken as square\n'


def test_reading_holds_few_frames(tmp_path):
    "Memory does not grow with length: of 300 frames read one after another, a handful lives at any time."
    path = make(tmp_path/'l.mp4', drawn(64, 48, 300))
    def most_alive():
        refs, most = [], 0
        for f in Video(path):
            refs.append(weakref.ref(f)); refs = [r for r in refs if r() is not None]; most = max(most, len(refs))
        return most
    assert most_alive() <= 3
    code = f"import resource\nfor _ in range({{}}):\n  for f in Video({str(path)!r}): pass\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    one, ten = (int(run(code.format(n)).stdout) for n in (1, 8))
    assert ten < one + 30_000


def test_early_stop_closes_the_file(tmp_path):
    "Taking two frames of many, thirty times, leaves no file open."
    path = make(tmp_path/'l.mp4', drawn()); gc.collect()
    before = len(os.listdir('/proc/self/fd')) if os.path.exists('/proc/self/fd') else 0
    for _ in range(30): assert len(read_video(path, max_frames=2)[0]) == 2
    assert not before or len(os.listdir('/proc/self/fd')) <= before + 2


def test_audio_is_dropped_with_one_line(tmp_path, capfd):
    v = Video(make(tmp_path/'s.mp4', drawn(), audio=True)); list(v); list(v); repr(v); v._repr_html_()
    out, err = capfd.readouterr()
    assert out == '' and err == 'cmvc: s.mp4: audio is dropped, CMVC codes pictures only\n' and v.info.has_audio


def test_video_of_a_video(): assert Video(v := Video(drawn(), fps=50)).info == v.info and (np.stack(list(Video(v))) == drawn()).all()


def test_shows_itself(tmp_path):
    v = Video(drawn()); assert '64×48' in repr(v) and '12 frames' in repr(v)
    v = Video(make(tmp_path/'s.mp4', drawn())); assert v._repr_html_().startswith('<img src="data:image/jpeg;base64,') and 'h264' in repr(v)


# ---- bad input

def fails(source, **kw):
    "The one line that comes instead of frames."
    with pytest.raises(CmvcError) as e: list(Video(source, **kw))
    assert '\n' not in str(e.value) and e.value.__suppress_context__ | (e.value.__cause__ is None)
    return str(e.value)


def test_bad_files(tmp_path):
    put = lambda name, data: (tmp_path/name).write_bytes(data) and tmp_path/name
    assert 'no such file' in fails(tmp_path/'missing.mp4')
    (tmp_path/'empty.mp4').touch(); assert 'empty' in fails(tmp_path/'empty.mp4')
    assert 'not a video' in fails(put('text.mp4', b'hello world\n'*100)) and 'not a video' in fails(put('notes.txt', b'hello world\n'*100))
    assert 'not a video' in fails(put('noise.mkv', np.random.default_rng(0).bytes(50_000)))
    assert 'only audio' in fails(make(tmp_path/'song.m4a', audio=True, form='mp4'))
    (tmp_path/'folder').mkdir(); assert 'no pictures' in fails(tmp_path/'folder')
    assert 'size' in fails(put('clip.yuv', b'123'))
    fails(put('huge.y4m', b'YUV4MPEG2 W100000 H100000 F25:1 C420\nFRAME\n' + bytes(1000)))
    fails(put('big.y4m', b'YUV4MPEG2 W16000 H16000 F25:1 C420\nFRAME\n' + bytes(1000)))
    assert fails('/dev/null').endswith('expected a video') and fails('http://example.org/a.mp4').endswith('no such file')


def test_unreadable(tmp_path):
    "Neither a file nor a folder that may not be read gives a traceback (root may read everything: then the system is asked to refuse)."
    p = make(tmp_path/'p.mp4', drawn(n=2)); d = tmp_path/'d'; d.mkdir(); p.chmod(0); d.chmod(0)
    try:
        if os.access(p, os.R_OK): pytest.skip('running as root')
        assert 'permission' in fails(p) and 'permission' in fails(d)
    finally: p.chmod(0o600); d.chmod(0o700)


def test_unreadable_folder(tmp_path, monkeypatch):
    def refuse(self): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(Path, 'iterdir', refuse)
    assert 'cannot be listed (permission denied)' in fails(tmp_path)


def test_playlists_are_not_followed(tmp_path):
    "A file that names other files or hosts is not a video."
    make(tmp_path/'real.ts', drawn())
    (tmp_path/'list.m3u8').write_text('#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nreal.ts\n#EXT-X-ENDLIST\n'); fails(tmp_path/'list.m3u8')
    (tmp_path/'list.ffconcat').write_text('ffconcat version 1.0\nfile real.ts\n'); fails(tmp_path/'list.ffconcat')


@pytest.mark.parametrize('file, codec, pix, kw', [('t.mp4', 'libx264', 'yuv420p', dict(container={'movflags': 'faststart'})), ('u.mp4', 'libx264', 'yuv420p', {}), ('t.mkv', 'libx264', 'yuv420p', {}),
    ('t.webm', 'libvpx-vp9', 'yuv420p', {}), ('t.y4m', 'rawvideo', 'yuv420p', {}), ('f.mkv', 'ffv1', 'bgr0', {}), ('a.mp4', 'libx264', 'yuv420p', dict(container={'movflags': 'faststart'}, audio=True))])
@pytest.mark.parametrize('keep', [.02, .5, .9])
def test_truncated(tmp_path, file, codec, pix, kw, keep):
    "Wherever it is cut: an error, never a shorter video."
    p = make(tmp_path/file, drawn(n=40), codec, pix, **kw); data = p.read_bytes()
    p.write_bytes(data[:int(keep*len(data))]); fails(p)


@settings(max_examples=40)
@given(st.data())
def test_damaged_bytes(tmp_path_factory, data):
    "Any damage: frames of the right size, or one line."
    global _CLIP
    if '_CLIP' not in globals(): _CLIP = {k: make(tmp_path_factory.mktemp('d')/f'c.{k}', drawn(n=6)).read_bytes() for k in ('mp4', 'mkv')}
    kind = data.draw(st.sampled_from(['mp4', 'mkv'])); b = bytearray(_CLIP[kind])
    for i, v in data.draw(st.lists(st.tuples(st.integers(0, len(b) - 1), st.integers(0, 255)), min_size=1, max_size=20)): b[i] = v
    p = tmp_path_factory.mktemp('x')/f'x.{kind}'; p.write_bytes(b)
    try:
        for n, f in enumerate(Video(p)):
            assert f.dtype == np.uint8 and f.ndim == 3
            if n > 100: break
    except CmvcError as e: assert '\n' not in str(e)


# ---- writing

@settings(max_examples=15)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_lossless(tmp_path_factory, w, h, n, seed):
    F = np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), dtype=np.uint8)
    p = tmp_path_factory.mktemp('w')/'x.mkv'; write_video(p, F, 25)
    assert (read_video(p)[0] == F).all() and os.listdir(p.parent) == ['x.mkv']


@pytest.mark.parametrize('kind', ['mp4', 'y4m'])
@pytest.mark.parametrize('w, h', [(64, 48), (63, 47), (1, 1), (2, 1), (1, 2), (1280, 720)])
def test_sizes_out(tmp_path, kind, w, h):
    "Original width × height whatever they are, colours without a shift."
    F = np.full((2, h, w, 3), 0, np.uint8); F[:] = 200, 90, 30
    p = tmp_path/f'x.{kind}'; write_video(p, F, 25); f, fps = read_video(p)
    assert f.shape == F.shape and fps == 25 and np.abs(f.astype(int) - F).max() <= 2


def test_mp4_is_for_everybody(tmp_path):
    "H.264 4:2:0, declared matrix and range, good quality; the same bytes twice."
    F = drawn(96, 64, 10)//2 + 60
    for n in 'ab': write_video(tmp_path/f'{n}.mp4', F, '29.97')
    assert (tmp_path/'a.mp4').read_bytes() == (tmp_path/'b.mp4').read_bytes()
    with av.open(str(tmp_path/'a.mp4')) as c:
        f = next(c.decode(video=0)); s = c.streams.video[0]
        assert (s.codec_context.name, f.format.name, f.colorspace, f.color_range, s.average_rate) == ('h264', 'yuv420p', 6, 1, Fraction(30000, 1001))
    write_video(tmp_path/'c.mp4', F, 25, crf=40)
    assert (tmp_path/'c.mp4').stat().st_size < .75*(tmp_path/'a.mp4').stat().st_size


def test_written_colour_by_formula(tmp_path):
    "What other programs see: the planes of the y4m are the formula's inverse."
    rgb = np.random.default_rng(5).integers(0, 256, (4, 6, 3)).astype(np.uint8).repeat(16, 0).repeat(16, 1)
    write_video(tmp_path/'x.y4m', rgb[None], 25)
    with av.open(str(tmp_path/'x.y4m')) as c: f = next(c.decode(video=0))
    yuv = [np.frombuffer(bytes(p), np.uint8).reshape(p.height, p.line_size)[:, :p.width] for p in f.planes]
    r, g, b = (rgb[8::16, 8::16, i]/255. for i in range(3)); y = .299*r + .587*g + .114*b
    for got, want in (yuv[0][8::16, 8::16], 16 + 219*y), (yuv[1][4::8, 4::8], 128 + 224*(b - y)/1.772), (yuv[2][4::8, 4::8], 128 + 224*(r - y)/1.402): assert np.abs(got - want).max() < 1.1


def test_nothing_left_on_failure(tmp_path):
    old = tmp_path/'x.mp4'; old.write_bytes(b'precious')
    for kind in 'mp4', 'mkv', 'y4m':
        p = tmp_path/f'x.{kind}'
        with pytest.raises(KeyboardInterrupt):
            with VideoWriter(p, 64, 48, 25) as w: w.write(drawn()); raise KeyboardInterrupt
        with pytest.raises(CmvcError, match='expected uint8'):
            with VideoWriter(p, 64, 48, 25) as w: w.write(drawn()); w.write(drawn(32, 32))
        with pytest.raises(CmvcError, match='no frames'): VideoWriter(p, 64, 48, 25).close()
        with pytest.raises(CmvcError, match='no frames'): write_video(p, [], 25)
        with pytest.raises(RuntimeError): write_video(p, (f if i < 5 else (_ for _ in ()).throw(RuntimeError()) for i, f in enumerate(drawn())), 25)
    assert os.listdir(tmp_path) == ['x.mp4'] and old.read_bytes() == b'precious'
    write_video(old, drawn(), 25); assert len(read_video(old)[0]) == 12 and os.listdir(tmp_path) == ['x.mp4']


@pytest.mark.parametrize('where, say', [('none/x.mp4', 'does not exist'), ('', 'folder|cannot write'), ('x', 'without suffix'), ('x.gif', 'cannot write .gif'), ('file.txt/x.mkv', 'does not exist'), ('d.mkv', 'is a folder')])
def test_unwritable(tmp_path, where, say):
    (tmp_path/'file.txt').write_text('x'); (tmp_path/'d.mkv').mkdir(); before = sorted(os.listdir(tmp_path))
    with pytest.raises(CmvcError, match=say): write_video(tmp_path/where, drawn(), 25)
    assert sorted(os.listdir(tmp_path)) == before


def test_disk_full(tmp_path):
    "The system refuses in the middle: one line, and nothing left."
    F = tmp_path/'big.mkv'
    r = run(f"""import resource, numpy as np
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
rng = np.random.default_rng(0)
try: write_video({str(F)!r}, (rng.integers(0, 256, (128, 128, 3), dtype=np.uint8) for _ in range(100)), 25)
except CmvcError as e: sys.exit(f'E {{e}}')""")
    assert r.returncode == 1 and r.stderr.decode().splitlines()[-1].startswith('E ') and 'cannot be written' in r.stderr.decode() and os.listdir(tmp_path) == []


def test_reader_of_standard_output_goes_away():
    r = run("import os, numpy as np\nr, w = os.pipe(); os.dup2(w, 1); os.close(r)\ntry: write_video('-', np.zeros((50, 128, 128, 3), np.uint8), 25)\nexcept CmvcError as e: sys.stderr.write(f'E {e}'); sys.stderr.flush(); os._exit(2)")
    assert r.returncode == 2 and b'E -: cannot be written' in r.stderr


# ---- real footage

def test_demo_clips():
    assert [tuple(getattr(Video(demo_clip(n)).info, k) for k in ('width', 'height', 'frames')) for n in ('bigbuckbunny', 'carphone')] == [(1280, 720, 132), (176, 144, 120)]
    with pytest.raises(CmvcError, match='bigbuckbunny'): demo_clip('casablanca')


def test_demo_clip_missing(monkeypatch):
    monkeypatch.setattr(V.importlib.util, 'find_spec', lambda n: None)
    with pytest.raises(CmvcError, match=r'cmvc_nb\[demo\]'): demo_clip()


@pytest.mark.parametrize('clip, name', [('bigbuckbunny', 'bt709'), ('carphone', 'bt601')])
def test_real_colour(clip, name):
    "Decoded planes, nearest chroma, floating point: no shift against it, and small differences at edges only."
    with av.open(str(demo_clip(clip))) as c: f = next(c.decode(video=0))
    y, u, v = (np.frombuffer(bytes(p), np.uint8).reshape(p.height, p.line_size)[:, :p.width] for p in f.planes)
    want = formula(np.stack([y, u.repeat(2, 0).repeat(2, 1), v.repeat(2, 0).repeat(2, 1)]), *WEIGHTS[name][:2], False)
    e = next(iter(Video(demo_clip(clip)))) - want
    assert np.abs(e.mean((0, 1))).max() < .1 and np.abs(e).mean() < 1.5


def test_real_round_trip(tmp_path):
    f, fps = read_video(demo_clip('carphone'), max_frames=9)
    assert fps == Fraction(30000, 1001)
    write_video(tmp_path/'c.mkv', f, fps); write_video(tmp_path/'c.mp4', f, fps)
    assert (read_video(tmp_path/'c.mkv')[0] == f).all()
    g = read_video(tmp_path/'c.mp4')[0].astype(float)
    assert 10*np.log10(255**2/((g - f)**2).mean()) > 37


@pytest.mark.skipif(not os.environ.get('CMVC_CLIPS'), reason='CMVC_CLIPS names no folder of clips')
def test_short_clips():
    paths = sorted((Path(os.environ['CMVC_CLIPS'])/'short').glob('*.y4m'))
    assert paths and any(Video(p).info.pix_fmt.endswith('10le') for p in paths)
    for p in paths:
        v = Video(p); n = v.info.frames; f = np.stack(list(v))
        assert len(f) == n and f.shape[1:3] == (v.info.height, v.info.width) and f.std() > 10
