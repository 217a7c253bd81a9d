"The codec from end to end, on seeded dummy models of a few channels: the true code path in seconds."
from dataclasses import replace
from fractions import Fraction
import numpy as np, pytest
from cmvc_nb.bitstream import open_cmvc, parse, to_bytes, drop_images, verify
from cmvc_nb.codec import Codec, Player
from cmvc_nb.errors import BitstreamError, CmvcError
from cmvc_nb.video import read_video
from cmvc_nb.world import video
from dummies_models import make_dummy_preset

FAST = dict(size=64, steps=4, lora_steps=3, strength=.5)
TALK = dict(size=64, steps=3)


@pytest.fixture(scope='module')
def clip(): return video(np.random.default_rng(0), 23, 96, kind='pan')[0][:, :66, :90].copy()

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return make_dummy_preset(tmp_path_factory.mktemp('models')/'a', 0)

@pytest.fixture(scope='module')
def codec(folder): return Codec.from_pretrained(folder, 'cpu')

@pytest.fixture(scope='module')
def it2v(codec, clip): return codec.encode(clip, interval=4, texts=True, **FAST)

@pytest.fixture(scope='module')
def tt2v(codec, clip): return codec.encode(clip, mode='tt2v', interval=8, **TALK)


def test_geometry_count_and_rate(codec, clip, it2v, tt2v):
    for e in (it2v, tt2v):
        d = codec.decode(e.data)
        assert d.frames.shape == clip.shape and d.frames.dtype == np.uint8 and d.count == len(clip)
        assert d.fps == open_cmvc(e.data).header.fps == Fraction(25)

def test_twice_is_identical(codec, clip, it2v, tt2v):
    assert codec.encode(clip, interval=4, texts=True, **FAST).data == it2v.data
    for e in (it2v, tt2v): assert (codec.decode(e.data).frames == codec.decode(e.data).frames).all()

def test_another_process_of_models_decodes_the_same(folder, codec, it2v, tt2v):
    other = Codec.from_pretrained(folder, 'cpu')
    for e in (it2v, tt2v): assert (other.decode(e.data).frames == codec.decode(e.data).frames).all()

@pytest.mark.parametrize('search', ['batched', 'gradient', None])
def test_the_frames_scored_are_the_frames_decoded(codec, clip, search, monkeypatch):
    from cmvc_nb import codec as module
    scored, played, play, psnr = [], [], Player.play, module.psnr
    monkeypatch.setattr(module, 'psnr', lambda made, true: scored.append(made) or psnr(made, true))
    e = codec.encode(clip, interval=6, search=search, **FAST)
    monkeypatch.setattr(Player, 'play', lambda self, j, n, progress=None: played.append(play(self, j, n, progress)) or played[-1])
    codec.decode(e.data)
    inner = [f[1:-1] for f in played if len(f) > 2]
    assert len(inner) == len(scored) == len(e.psnr) and all((a == b).all() for a, b in zip(inner, scored))

def test_keyframes_are_shown_as_decoded(codec, it2v):
    from cmvc_nb.codec import _group
    with open_cmvc(it2v.data) as r:
        keys = np.concatenate([_group(r, g, len(r.lengths)) for g in range(-(-len(r.keyframes)//8))])
        frames = codec.decode(it2v.data).frames
        from cmvc_nb.video import Geometry
        shown = Geometry(90, 66, r.header.coded_width, r.header.coded_height).to_original(keys)
        assert (frames[r.keyframes] == shown).all()

@pytest.mark.parametrize('which', ['it2v', 'tt2v'])
def test_random_access_is_exact(codec, which, request):
    e = request.getfixturevalue(which)
    whole, k = codec.decode(e.data).frames, e.keyframes
    for a, b in ((0, 1), (1, len(k)-1), (len(k)-2, len(k)-1)):
        assert (codec.decode(e.data, clips=(a, b)).frames == whole[k[a]:k[b]+1]).all()

def test_random_access_reads_only_what_it_needs(codec, clip):
    e = codec.encode(np.concatenate([clip, clip[::-1]]), interval=4, **FAST)
    with open_cmvc(e.data) as r:
        assert sum(s.track == 0 for s in r.sections) > 1
        codec.decode(r, clips=(0, 1))
    asked = []
    read = type(r).read
    try:
        type(r).read = lambda self, t, i: asked.append((t, i)) or read(self, t, i)
        codec.decode(e.data, clips=(0, 1))
    finally: type(r).read = read
    assert {i for t, i in asked if t == 0} == {0} and max(i for t, i in asked if t == 1) <= 1

def test_damage_stays_local(codec, it2v):
    whole, k = codec.decode(it2v.data).frames, it2v.keyframes
    with open_cmvc(it2v.data) as r: s = r.toc[1, 1]
    bad = bytearray(it2v.data); bad[s.offset] ^= 255; bad = bytes(bad)
    with pytest.raises(BitstreamError, match='clip 1'): codec.decode(bad)
    d = codec.decode(bad, salvage=True)
    assert d.frames.shape == whole.shape and any('clip 1' in p for p in d.problems)
    last = len(k)-2
    assert (d.frames[k[last]:] == whole[k[last]:]).all()

def test_damaged_group(codec, it2v):
    with open_cmvc(it2v.data) as r: s = r.toc[0, 0]
    bad = bytearray(it2v.data); bad[s.offset+s.length//2] ^= 1
    with pytest.raises(BitstreamError, match='group 0'): codec.decode(bytes(bad))
    d = codec.decode(bytes(bad), salvage=True)
    assert d.count == 23 and d.problems

def test_other_weights_refuse(codec, it2v, tmp_path):
    other = Codec.from_pretrained(make_dummy_preset(tmp_path/'b', 1), 'cpu')
    mine, theirs = codec.models.preset.fingerprint().hex(), other.models.preset.fingerprint().hex()
    with pytest.raises(CmvcError, match=f'{mine}.*{theirs}'): other.decode(it2v.data)
    assert other.decode(it2v.data, force=True).count == 23

def test_convert_needs_no_source(codec, clip, it2v):
    words = to_bytes(drop_images(it2v.data, steps=3))
    assert len(words) < len(it2v.data) and not verify(words)
    assert codec.decode(words).frames.shape == clip.shape

def test_every_bit_is_accounted_for(it2v, tt2v):
    for e in (it2v, tt2v): assert sum(e.rate.to_dict()['kinds'].values()) == 8*len(e.data)

def test_seed_and_words_change_tt2v(codec, clip, tt2v):
    a = codec.decode(tt2v.data).frames
    b = codec.decode(codec.encode(clip, mode='tt2v', interval=8, seed=1, **TALK).data).frames
    c = codec.decode(codec.encode(255-clip, mode='tt2v', interval=8, **TALK).data).frames
    assert (a != b).any() and (a != c).any()

def test_two_frames_and_neighbouring_keyframes(codec, clip):
    for mode, o in (('it2v', FAST), ('tt2v', TALK)):
        e = codec.encode(clip[:2], mode=mode, **o); assert codec.decode(e.data).frames.shape == clip[:2].shape
        e = codec.encode(clip[:4], mode=mode, keyframes=4, **o); assert e.keyframes == [0, 1, 2, 3] and codec.decode(e.data).count == 4

def test_files(codec, clip, tmp_path):
    e = codec.encode(clip, tmp_path/'a.cmvc', interval=8, score=False, **FAST)
    assert (tmp_path/'a.cmvc').read_bytes() == e.data
    d = codec.decode(tmp_path/'a.cmvc', tmp_path/'a.mkv')
    assert d.frames is None and (read_video(tmp_path/'a.mkv')[0] == codec.decode(e.data).frames).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.cmvc', 'a.mkv']

@pytest.mark.parametrize('bad, why', [
    (dict(mode='x'), 'it2v or tt2v'), (dict(selection='x'), 'cosine'), (dict(search='x'), 'gradient'), (dict(codec='x'), 'av1'), (dict(keyframes=99), 'keyframe'), (dict(keyframes=1), 'keyframe'),
    (dict(settings='x'), 'paper'), (dict(path='/no/such/folder/a.cmvc'), 'does not exist'), (dict(quality=1e9), 'quality'), (dict(strength=7.), 'strength')])
def test_bad_arguments(codec, clip, bad, why):
    with pytest.raises(CmvcError, match=why): codec.encode(clip[:5], **{**FAST, **bad})

def test_bad_input(codec, clip, it2v):
    with pytest.raises(CmvcError, match='one frame'): codec.encode(clip[:1], **FAST)
    with pytest.raises(CmvcError): codec.decode(it2v.data, clips=(3, 99))
    with pytest.raises(BitstreamError): codec.decode(it2v.data[:-5])

def test_one_pixel_video(codec):
    e = codec.encode(np.zeros((3, 1, 1, 3), np.uint8), keyframes=2, **FAST)
    assert codec.decode(e.data).frames.shape == (3, 1, 1, 3)
