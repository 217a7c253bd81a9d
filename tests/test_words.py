"A page of words: written, edited by hand, read, and obeyed by the codec."
import numpy as np, pytest, yaml
from hypothesis import given, settings, strategies as st
from cmvc_nb.bitstream import content, keyframe_text, open_cmvc
from cmvc_nb.codec import Codec
from cmvc_nb.errors import CmvcError
from cmvc_nb.words import Words, load_words, save_words
from cmvc_nb.world import video
from dummies_models import make_dummy_preset

SAID = Words([0, 5, 11], ['A red barn.', 'a: b # no comment, "quoted"', 'Größe 雪 🎬'], ['- not a list', ''], 'clip.mp4')


@pytest.fixture(scope='module')
def codec(tmp_path_factory): return Codec.from_pretrained(make_dummy_preset(tmp_path_factory.mktemp('m'), 0), 'cpu')

@pytest.fixture(scope='module')
def clip(): return video(0, 12, 64, kind='pan')[0]


def test_a_page_comes_back(tmp_path): assert load_words(save_words(SAID, tmp_path/'w.yaml')) == SAID == load_words(SAID)

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=80), st.text(max_size=80)), min_size=2, max_size=6), st.lists(st.integers(1, 90), min_size=5, max_size=5))
def test_any_text_comes_back(tmp_path_factory, texts, steps):
    k = [0, *np.cumsum(steps)[:len(texts)-1].tolist()]
    w = Words(k, [a for a, _ in texts], [b for _, b in texts[1:]], texts[0][1])
    assert load_words(save_words(w, tmp_path_factory.getbasetemp()/'any.yaml')) == w

@pytest.mark.parametrize('page,say', [
    ('', 'expected keyframes'), ('- a', 'expected keyframes'), ('keyframes: {0: a}\nmotions: {}', 'two or more'), ('keyframes: {0: a, 4: b}', 'expected keyframes'),
    ('keyframes: {0: a, 4: b}\nmotions: {0-4: c}\nextra: 1', 'expected keyframes'), ('keyframes: {0: a, 4: b}\nmotions: {0-5: c}', '0-4'), ('keyframes: {1: a, 4: b}\nmotions: {1-4: c}', 'ascending from 0'),
    ('keyframes: {0: a, 4: b, 2: c}\nmotions: {0-4: d, 4-2: e}', 'ascending'), ('keyframes: {0: a, 4: 17}\nmotions: {0-4: c}', '17 is not a text'), ('keyframes: {0: a, x: b}\nmotions: {0-x: c}', 'frame numbers'),
    ('keyframes: {0: a, 0: b, 4: c}\nmotions: {0-4: d}', '0 is there twice'), ('keyframes: {0: a, 4: 2024-13-45}\nmotions: {0-4: c}', 'YAML'), ('a: [', 'YAML'), ('keyframes: !!python/object/apply:os.system [ls]', 'YAML'), ('[' * 5000, 'YAML')])
def test_bad_pages(tmp_path, page, say):
    (tmp_path/'w.yaml').write_text(page)
    with pytest.raises(CmvcError, match='w.yaml') as e: load_words(tmp_path/'w.yaml')
    assert say in str(e.value) and '\n' not in str(e.value)

def test_no_page(tmp_path):
    with pytest.raises(CmvcError, match='no such file'): load_words(tmp_path/'none.yaml')
    with pytest.raises(CmvcError, match='folder'): save_words(SAID, tmp_path)


@pytest.mark.parametrize('mode', ['it2v', 'tt2v'])
def test_the_codec_says_what_it_is_told(codec, clip, mode):
    fast = dict(size=64, steps=2, seed=0) | (dict(lora_steps=2, strength=.5, search=None) if mode == 'it2v' else {})
    e = codec.encode(clip, mode=mode, words=SAID, texts=True, **fast)
    with open_cmvc(e.data) as r:
        assert e.keyframes == r.keyframes == [0, 5, 11]
        assert [keyframe_text(r, k) for k in range(3)] == SAID.texts and [content(r, j).motion_text for j in range(2)] == SAID.motions
    assert codec.decode(e.data).frames.shape == clip.shape
    if mode == 'it2v':
        with open_cmvc(codec.encode(clip, mode=mode, words=SAID, **fast).data) as r: assert content(r, 0).keyframe_text == '' and content(r, 0).motion_text == '- not a list'

def test_described_words_are_what_encode_would_say(codec, clip, tmp_path):
    how = dict(keyframes=3, size=64)
    w = codec.describe(clip, **how)
    page = save_words(w, tmp_path/'w.yaml')
    fast = dict(mode='tt2v', size=64, steps=2, seed=0)
    assert codec.encode(clip, words=page, **fast).data == codec.encode(clip, keyframes=3, **fast).data
    with open_cmvc(codec.encode(clip, keyframes=3, **fast).data) as r:
        assert r.keyframes == w.keyframes and [keyframe_text(r, k) for k in range(3)] == w.texts and [content(r, j).motion_text for j in range(2)] == w.motions
    short = codec.describe(clip, text_budget=60, motion_budget=40, **how)
    assert max(map(len, short.texts)) <= 60 and max(map(len, short.motions)) <= 40 and min(map(len, short.texts)) > 10

def test_words_choose_the_seed(codec, clip, monkeypatch):
    "By what they say themselves where they name regions; where they name none there is nothing to choose by."
    from cmvc_nb import tt2v
    asked, choose = [], tt2v.choose_seed
    monkeypatch.setattr(tt2v, 'choose_seed', lambda tv, texts, words, *a, **k: asked.append((texts, words)) or choose(tv, texts, words, *a, **k))
    red = 'A dim scene in soft light with a large plain red area on the left.'
    codec.encode(clip, mode='tt2v', words=Words([0, 11], [red, red], ['']), size=64, steps=2, tries=2)
    codec.encode(clip, mode='tt2v', words=Words([0, 11], ['A barn.', 'A dog.'], ['']), size=64, steps=2, tries=2)
    assert asked == [([red, red], [red, red])]

def test_words_of_another_clip(codec, clip):
    with pytest.raises(CmvcError, match="last keyframe is frame 11.*last frame is 7"): codec.encode(clip[:8], words=SAID)
    for more in (dict(keyframes=3), dict(interval=4), dict(text_budget=9), dict(motion_budget=0)):
        with pytest.raises(CmvcError, match='leave (keyframes and interval|budgets) out'): codec.encode(clip, words=SAID, **more)

def test_a_describer_may_take_several_clips_at_once(codec, clip, monkeypatch):
    asked, d = [], codec.models.describer
    class Three:
        batch_size = 3
        def describe_keyframes(self, frames, budget=None): asked.append(len(frames)); return d.describe_keyframes(frames, budget)
        def describe_motions(self, clips, budget=None): asked.append([len(c) for c in clips]); return d.describe_motions(clips, budget)
    how = dict(mode='tt2v', interval=3, selection='uniform', size=64, steps=2, seed=0)
    one = codec.encode(clip, **how)
    monkeypatch.setitem(codec.models.__dict__, 'describer', Three())
    many, w = codec.encode(clip, **how), codec.describe(clip, interval=3, selection='uniform', size=64)
    assert many.data == one.data and len(one.keyframes) == 5
    sizes = np.diff(one.keyframes) + 1
    assert asked == [3, list(sizes[:3]), 2, list(sizes[3:])]*2 # the last keyframe goes with the last clips
    with open_cmvc(one.data) as r: assert w.texts == [keyframe_text(r, k) for k in range(5)]
