"Rate: the table's bits are the file's, to the bit; damage has its own kind; the byte map has no gaps."
import json, re
from fractions import Fraction
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from cmvc_nb.bitstream import Clip, ClipContent, CmvcFile, Group, Track, open_cmvc, pack_clip, to_bytes
from cmvc_nb.errors import CmvcError, BitstreamError
from cmvc_nb.header import Header
from cmvc_nb.rate import COLOURS, OVERHEAD, R_K, R_M, apportion, byte_map, hex_dump, inspect_widget, plot_rate, rate_table

def file(mode='it2v', topology='pair', tracks=(), words='green', lengths=(15, 17), **kw):
    rng = np.random.default_rng(0); pair = topology == 'pair'
    cs = [ClipContent(f'A {words} area, {j}.', f'The {words} camera.', 'The end.' if pair and j == len(lengths)-1 else None,
                      rng.integers(-2, 3, (n-1, 2)) if mode == 'it2v' else None) for j,n in enumerate(lengths)]
    h = Header(250, 200, 256, 192, sum(lengths) + pair, Fraction(30000, 1001), mode, topology, group_size=2, **kw)
    n_groups = -(-(len(lengths) + pair)//2) if mode == 'it2v' else 0
    return CmvcFile(h, [Group(0, rng.bytes(99+i)) for i in range(n_groups)], [Clip(n, pack_clip(c)) for n,c in zip(lengths, cs)], list(tracks))

FILES = [file(), file('tt2v'), file(topology='led'), file('tt2v', 'led', seed=7), file(tracks=[Track(3, 1, [b'flow', b'']), Track(9, 0, [bytes(50)])]),
         file(lengths=[1]*9), file(words='')]

@pytest.mark.parametrize('f', FILES)
def test_bits_sum_to_the_file(f):
    b = to_bytes(f); r = rate_table(b)
    assert sum(x for *_,x in r.rows) == sum(Fraction(x) for *_,x in reversed(r.rows)) == 8*len(b) == r.bits
    assert all(x > 0 for *_,x in r.rows) and not r.problems and r.rows == rate_table(f).rows == rate_table(open_cmvc(f)).rows
    assert r.sum(*R_K) + r.sum(*R_M) + r.sum(*OVERHEAD) == r.bits == sum(r.sum(k) for k in r.kinds) == sum(r.sum(where=w) for w in r.places)

def test_known_parts():
    "Counted by hand: header 19 bytes, number of clips 1; group 3 + 2, clip 2 + 2."
    f = file(); r = rate_table(f)
    assert [r.sum(k, where='file')/8 for k in ('header', 'framing', 'checksums')] == [19, 1, 2]
    assert [r.sum(k, where='group 1')/8 for k in ('keyframe images', 'framing', 'checksums')] == [100, 2, 2]
    assert [r.sum(k, where='clip 1')/8 for k in ('framing', 'checksums')] == [2, 2]
    for j,c in enumerate(f.clips): assert r.sum('keyframe text', 'motion text', 'weights', 'padding', where=f'clip {j}') == 8*len(c.payload)
    assert r.sum('weights', where='clip 0') > 14 and r.sum('padding') < 3*16

def test_bpp_and_kbps_are_of_the_original():
    f = file(); r = rate_table(f); bits = 8*len(to_bytes(f))
    assert r.bpp == bits/(250*200*33) and r.kbps == pytest.approx(bits/1000/(33*1001/30000))

def test_text_costs_its_own_kind():
    a, b = rate_table(file()), rate_table(file(words='green and an unusually purple zigzag'))
    assert b.sum('motion text') > a.sum('motion text') and b.sum('keyframe text') > a.sum('keyframe text') and b.sum('keyframe images') == a.sum('keyframe images')

@given(st.lists(st.floats(0, 3000), max_size=6), st.integers(0, 2000))
def test_apportion(bits, n):
    out = apportion([(str(i), b) for i,b in enumerate(bits)], 8*n)
    assert sum(Fraction(b) for _,b in out) == 8*n and all(b >= 0 and Fraction(b).denominator <= 1024 for _,b in out) and out[-1][0] == 'padding'
    if sum(bits) <= 8*n: assert all(abs(b-x) <= 1/1024 for (_,b),x in zip(out, bits))
    else: assert out[-1][1] < 1/64

def test_to_dict_is_json():
    d = json.loads(json.dumps(rate_table(file()).to_dict()))
    assert d['bits'] == 8*d['bytes'] == sum(d['kinds'].values()) == sum(sum(p.values()) for p in d['parts'].values()) == d['R_k'] + d['R_m'] + d['overhead']

@pytest.mark.parametrize('f', FILES)
def test_byte_map_has_no_gaps(f):
    b = to_bytes(f); m = byte_map(b)
    assert m[0][0] == 0 and m[-1][1] == len(b) and all(x[1] == y[0] for x,y in zip(m, m[1:])) and {x[2] for x in m} <= set(COLOURS)
    shown = bytes.fromhex(''.join(re.findall(r'>([0-9a-f ]+)</span>', hex_dump(b, limit=10**6).split('</p>', 1)[1])))
    assert shown == b

def test_damage():
    f = file(); b = to_bytes(f); r = open_cmvc(f)
    for s in r.sections:
        bad = bytearray(b); bad[s.offset] ^= 4; x = rate_table(bytes(bad))
        assert x.bits == 8*len(b) and x.sum('damaged') == x.sum('damaged', where=s.name) == 8*s.length and len(x.problems) == 1 and s.name in x._repr_html_()
    for bad in b[:-5], b+b'tail', b[:r.bytes_read+1]:
        x = rate_table(bad)
        assert x.bits == 8*len(bad) and x.problems and byte_map(bad)[-1][1] == len(bad)
    with pytest.raises(BitstreamError): rate_table(b[:9])

def test_html_is_escaped():
    f = file(); f.clips[0] = Clip(15, pack_clip(ClipContent('<script>', '"\'><b>', None, np.zeros((14, 2), int))))
    assert '<script>' not in hex_dump(f) and '&lt;script&gt;' in hex_dump(f) and '<b>' not in hex_dump(f)

def test_plot_and_widget(tmp_path):
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    f = file(); ax = plt.subplots()[1]
    assert plot_rate(rate_table(f), ax) is ax and sum(p.get_width() for p in ax.patches) == pytest.approx(len(to_bytes(f)))
    p = tmp_path/'a.cmvc'; p.write_bytes(to_bytes(f)); box = inspect_widget(p)
    pick, view = box.children; last = len(byte_map(f))-1
    pick.value = last
    assert 'outline' in view.value and byte_map(f)[last][3].split(',')[0] in view.value and len(pick.options) == last+1
    plt.close('all')
