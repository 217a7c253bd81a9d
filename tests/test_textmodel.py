"The text model's keys, counts and files."
import shutil
from pathlib import Path
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
import cmvc_nb.textmodel as tm
from cmvc_nb.errors import CmvcError
from cmvc_nb.textmodel import EOS, Context, Prior, TextModel, context_keys, level, prior

texts = st.lists(st.binary(max_size=30).map(lambda b: b.replace(b'\0', b' ')), min_size=1, max_size=5)

@settings(max_examples=60, deadline=None)
@given(texts)
def test_both_ways_to_the_keys(t):
    "All positions at once and byte by byte: one rule."
    b, c = np.frombuffer(b'\0'.join(t) + b'\0', np.uint8), Context()
    for row, s in zip(zip(*context_keys(b)), b):
        assert [int(x) for x in row] == c.keys()
        c.push(int(s))

def test_counts_are_counts():
    "What the sorted tables say is what a plain search of the corpus finds."
    t = [b'a cat sat', b'the cat ran', b'a catapult']
    p = Prior(t, b'', np.zeros((22, 24, 24), np.int16)); m = TextModel(p)
    for s in b'The cat': m.push(s)
    found = {row: {chr(s) if s != EOS else '': int(n) for s, n in enumerate(p.counts(table, a, z)) if n} for row, table, a, z in m.found(m.context.keys())}
    assert found[0] == {c: ' '.join(x.decode() for x in t).count(c) - (2 if c == ' ' else 0) for c in set('acthesrnpul ')} | {'': 3}
    assert found[3] == found[4] == {' ': 2, 'a': 1}      # after 'cat', ' cat'
    assert 7 not in found                                # eight bytes were never seen
    assert found[8] == {' ': 2, 'a': 1} and found[9] == {' ': 1}   # the word; the word after 'the', in either case
    assert found[13] == {' ': 1, 'a': 1}                 # among the words known: cat, catapult

def test_level():
    v = np.arange(6000)
    assert level(0) == 0 and level(1) == 1 and level(10**9) == 23 and (np.diff(level(v)) >= 0).all() and set(level(v)) == set(range(24))

@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=60))
def test_nothing_is_impossible(b):
    m = TextModel(prior())
    for s in [*b, EOS]:
        c = m.counts()
        assert c.shape == (257,) and c.dtype == np.int64 and c.min() > 0 and c.sum() < 1 << 38
        m.push(s)

def test_learning_is_pushing():
    a, b = TextModel(prior()), TextModel(prior())
    a.learn(b'A fox.')
    for s in [*b'A fox.', EOS]: b.push(s)
    assert (a.counts() == b.counts()).all() and a.history == b.history

def test_cache_does_not_matter():
    m = TextModel(prior()); m.learn(b'A red car.'); first = m.counts()
    prior().cache.clear()
    assert (m.counts() == first).all()

@pytest.mark.parametrize('damage', ['change', 'missing', 'pickle'])
def test_damaged_installation(damage, tmp_path, monkeypatch):
    shutil.copytree(Path(tm.__file__).parent/'data/text1', tmp_path/'cmvc_nb/data/text1')
    f = tmp_path/'cmvc_nb/data/text1'/('votes.npy' if damage == 'pickle' else 'captions.txt')
    if damage == 'change': f.write_bytes(f.read_bytes().replace(b'grey', b'gray', 1))
    elif damage == 'missing': f.unlink()
    else: np.save(f, np.array([{}], object), allow_pickle=True)
    monkeypatch.setattr(tm, 'files', lambda name: tmp_path/name)
    with pytest.raises(CmvcError, match='install'): prior.__wrapped__()

def test_line_ends_do_not_matter(tmp_path, monkeypatch):
    "A checkout may have changed them."
    shutil.copytree(Path(tm.__file__).parent/'data/text1', tmp_path/'cmvc_nb/data/text1')
    for f in (tmp_path/'cmvc_nb/data/text1').glob('*.txt'): f.write_bytes(f.read_bytes().replace(b'\n', b'\r\n'))
    monkeypatch.setattr(tm, 'files', lambda name: tmp_path/name)
    assert prior.__wrapped__().find(0, 0, 2**64-1) == prior().find(0, 0, 2**64-1)
