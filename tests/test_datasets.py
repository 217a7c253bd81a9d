"""Data sets: manifests as published, raw files of a folder, what is missing, means by class."""
import numpy as np, pytest
from cmvc_nb.datasets import Dataset, class_means, datasets, load_dataset, near_multiple
from cmvc_nb.errors import CmvcError
from cmvc_nb.geometry import Geometry
from cmvc_nb.video import raw_format, write_video

D = [s['file'] for s in datasets()['hevc_d']['sequences']]
FRAME = 416*240*3//2


def test_manifests_are_as_published():
    "Numbers of sequences and frames; frames are five seconds in MCL-JCV, ten in HEVC; names agree with sizes and rates."
    m = datasets()
    assert {k: (len(v['sequences']), v['width'], v['height']) for k, v in m.items()} == dict(
        hevc_b=(5, 1920, 1080), hevc_c=(4, 832, 480), hevc_d=(4, 416, 240), hevc_e=(3, 1280, 720), uvg=(7, 1920, 1080), mcl_jcv=(30, 1920, 1080))
    for k, v in m.items():
        assert v['title'] and v['source'] and v['unsure'] and len({s['file'] for s in v['sequences']}) == len(v['sequences'])
        for s in v['sequences']:
            assert raw_format(s['file']) == (v['width'], v['height'], s['fps'], v['pix_fmt'])
            if k == 'mcl_jcv': assert s['frames'] == 5*s['fps']
            elif k != 'uvg': assert s['frames'] == 10*s['fps']
    assert {s['frames'] for s in m['uvg']['sequences']} == {600, 300}
    assert [s['file'].split('_')[0] for s in m['hevc_b']['sequences']] == 'Kimono1 ParkScene Cactus BasketballDrive BQTerrace'.split()


@pytest.fixture
def class_d(tmp_path):
    "Five frames of each sequence, in folders as people have them."
    rng = np.random.default_rng(0)
    for i, n in enumerate(D):
        p = tmp_path/('deep/er' if i % 2 else '.')/n; p.parent.mkdir(parents=True, exist_ok=True)
        p.write_bytes(rng.integers(16, 235, 5*FRAME, dtype=np.uint8).tobytes())
    return tmp_path


def test_load_and_read(class_d):
    d = load_dataset('hevc_d', class_d, frames=3)
    assert [s.name for s in d] == ['BasketballPass', 'BQSquare', 'BlowingBubbles', 'RaceHorses'] and not d.skipped and d.name == 'hevc_d'
    f, fps = d[1].read()
    assert f.shape == (3, 240, 416, 3) and fps == 60 and d[1].size == (416, 240)
    grey = np.fromfile(d[1].path, np.uint8)[:416*240].reshape(240, 416)
    assert np.corrcoef(f[0].mean(-1).ravel(), grey.ravel())[0, 1] > .8  # the right samples, in their places
    f, _ = load_dataset('hevc_d', class_d, frames=2, resize=64)[0].read()
    assert f.shape == (2, 256, 448, 3)
    assert load_dataset('hevc_d', class_d, frames=1, resize=(128, 64))[0].read()[0].shape == (1, 64, 128, 3)


def test_all_that_is_missing_is_said_at_once(class_d):
    (class_d/D[0]).unlink()
    (class_d/'deep/er'/D[1]).write_bytes(bytes(FRAME + 1))
    with pytest.raises(CmvcError) as e: load_dataset('hevc_d', class_d, frames=4)
    assert all(x in str(e.value) for x in (D[0], 'no such file', D[1], 'not whole', 'partial=True')) and D[2] not in str(e.value)
    d = load_dataset('hevc_d', class_d, frames=4, partial=True)
    assert [s.name for s in d] == ['BlowingBubbles', 'RaceHorses'] and list(d.skipped) == D[:2] and '2 skipped' in repr(d)
    with pytest.raises(CmvcError, match='5 frames, 500 needed'): load_dataset('hevc_d', class_d)      # as many as published
    with pytest.raises(CmvcError, match='301 frames asked for, the sequence has 300'): load_dataset('hevc_d', class_d, frames=301)
    for n in D: next(class_d.rglob(n), class_d/'x').unlink(missing_ok=True)
    with pytest.raises(CmvcError, match='no such file'): load_dataset('hevc_d', class_d, frames=1, partial=True)


def test_lossless_copies_serve(class_d):
    (class_d/D[0]).unlink()
    f = np.random.default_rng(1).integers(0, 255, (3, 240, 416, 3), dtype=np.uint8)
    write_video(class_d/D[0].replace('.yuv', '.mkv'), f, 50)
    d = load_dataset('hevc_d', class_d, frames=3)
    assert np.array_equal(d[0].read()[0], f)
    with pytest.raises(CmvcError, match='3 frames, expected at least 4'): load_dataset('hevc_d', class_d, frames=4)[0].read()
    write_video(class_d/D[0].replace('.yuv', '.mkv'), f[:, :64, :64], 50)
    with pytest.raises(CmvcError, match='64x64 pixels, expected 416x240'): load_dataset('hevc_d', class_d, frames=3)[0].read()


def test_any_folder(tmp_path):
    f = np.zeros((4, 48, 80, 3), np.uint8)
    for p in ('one/b.mkv', 'one/a.mp4', 'two/c.y4m'): (tmp_path/p).parent.mkdir(exist_ok=True); write_video(tmp_path/p, f, 24)
    (tmp_path/'two/notes.txt').write_text('no clip')
    d = load_dataset(tmp_path, resize=64)
    assert isinstance(d, Dataset) and [(s.name, s.dataset, s.size, s.fps) for s in d] == [('a', 'one', (64, 64), 24), ('b', 'one', (64, 64), 24), ('c', 'two', (64, 64), 24)]
    assert d[0].read()[0].shape == (4, 64, 64, 3) and load_dataset(tmp_path, frames=2)[1].read()[0].shape == (2, 48, 80, 3)
    (tmp_path/'two/broken.mkv').write_bytes(b'nonsense')
    with pytest.raises(CmvcError, match='two/broken.mkv'): load_dataset(tmp_path)
    d = load_dataset(tmp_path, partial=True)
    assert len(d) == 3 and list(d.skipped) == ['two/broken.mkv']
    with pytest.raises(CmvcError, match='b.mkv: 4 frames, 9 needed'): load_dataset(tmp_path, frames=9)


@pytest.mark.parametrize('args,kw,said', [(('hevc_d',), {}, 'say where its files are'), (('hevc_x', '.'), {}, "no data set 'hevc_x'"), (('nowhere',), {}, 'no such folder'),
    (('hevc_d', 'nowhere'), {}, 'no such folder'), (('hevc_d', '.'), dict(frames=0), 'frames=0'), (('FOLDER',), {}, 'no clips in it'), (('hevc_d', 'FOLDER'), {}, 'no such file')])
def test_bad_calls(tmp_path, args, kw, said):
    with pytest.raises(CmvcError, match=said): load_dataset(*[str(tmp_path) if a == 'FOLDER' else a for a in args], **kw)


def test_bad_resize(class_d):
    for r in ('64', 0, (64,), 1.5):
        with pytest.raises(CmvcError, match='resize'): load_dataset('hevc_d', class_d, frames=1, resize=r)


def test_near_multiple():
    assert near_multiple(1920, 1080) == Geometry(1920, 1080, 1920, 1088) and near_multiple(1280, 720).coded_height == 704
    assert near_multiple(96, 32).coded_width == 128 and near_multiple(1, 1).coded_height == 64 and near_multiple(100, 100, 8).coded_width == 104


def test_class_means():
    row = lambda d, c, p, b, q: dict(dataset=d, clip=c, codec='x', point=p, bytes=b, psnr=q, ok=True, note='n')
    rows = [row('B', 'a', 1, 10, 30.), row('B', 'b', 1, 30, 34.), row('B', 'a', 2, 50, 40.), row('C', 'c', 1, 7, None)]
    got = class_means(rows)
    assert got == [dict(dataset='B', codec='x', point=1, bytes=20., psnr=32., clips=2), dict(dataset='B', codec='x', point=2, bytes=50., psnr=40., clips=1),
                   dict(dataset='C', codec='x', point=1, bytes=7., psnr=None, clips=1)]
    assert class_means([rows[0], rows[1] | dict(psnr=float('nan'))])[0]['psnr'] is None
    assert class_means([rows[0], {k: v for k, v in rows[1].items() if k != 'psnr'}])[0]['psnr'] is None
    assert [r['bytes'] for r in class_means(rows, by=('dataset',))] == [30., 7.] and class_means([]) == []
    with pytest.raises(CmvcError, match='a row without dataset'): class_means([dict(codec='x', point=1)])
