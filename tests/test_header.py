"Header: round trips, legal ranges, one spelling for each value."
import io
from dataclasses import replace
from fractions import Fraction
import pytest
from hypothesis import given, settings, strategies as st
from cmvc_nb.errors import CmvcError, BitstreamError
from cmvc_nb.header import Cursor, Header, RATES, SETTINGS, crc16, header_bytes, read_header, varint

side, coded = st.integers(1, 16384), st.integers(1, 2048).map(lambda n: 8*n)
rates = st.one_of(st.sampled_from([Fraction(r) for r in RATES if r]), st.fractions(min_value=Fraction(1, 1000), max_value=4000, max_denominator=10**6))

@st.composite
def headers(draw, frames=1):
    opts = {k: draw(st.one_of(st.none(), st.integers(k in ('steps', 'group_size'), top*unit).map(lambda v, u=unit: v/u if u > 1 else v))) for k,(unit,_,_,top) in SETTINGS.items()}
    return Header(draw(side), draw(side), draw(coded), draw(coded), frames, draw(rates), draw(st.sampled_from(['it2v', 'tt2v'])),
                  draw(st.sampled_from(['pair', 'led'])), draw(st.binary(min_size=4, max_size=4)), **opts)

def read(b, frames=1): return Header(frames=frames, **read_header(Cursor(io.BytesIO(b)))[0])

@given(st.lists(st.integers(0, 2**62), max_size=8))
def test_varints_come_back(vs):
    c = Cursor(io.BytesIO(varint(*vs)))
    assert [c.varint('v', 0, 2**63) for _ in vs] == vs and c.raw == varint(*vs)

@pytest.mark.parametrize('bad', [b'', b'\x80', b'\x80\x00', b'\xff\x00', b'\xff'*9+b'\x01', varint(101)])
def test_illegal_varints(bad):
    with pytest.raises(BitstreamError): Cursor(io.BytesIO(bad)).varint('v', 0, 100)

def test_negative_varint():
    with pytest.raises(CmvcError): varint(3, -1)

def test_crc_check_value(): assert crc16(b'123456789') == bytes.fromhex('29b1')

@given(headers())
def test_headers_come_back(h):
    b = header_bytes(h)
    assert read(b) == h and header_bytes(read(b)) == b

@given(headers(), st.data())
def test_a_cut_header_raises(h, data):
    b = header_bytes(h)
    with pytest.raises(BitstreamError): read(b[:data.draw(st.integers(0, len(b)-1))])

def test_known_layout():
    "Computed by hand from the documented layout."
    h = Header(256, 256, 256, 256, 1, 30, preset=b'abcd')
    assert header_bytes(h) == b'CMV\x01\x00' + b'\x80\x02'*2 + b'\x03abcd\x00'
    h = Header(1920, 1080, 320, 192, 1, Fraction(30000, 1001), 'tt2v', 'led', b'abcd', seed=300, steps=8)
    assert header_bytes(h) == b'CMV\x01' + bytes([1|4|8]) + b'\x80\x0f\xb8\x08' + bytes([40, 24, 7]) + b'abcd' + bytes([1|8, 8]) + b'\xac\x02'

def test_defaults_cost_nothing_and_settings_come_back_on_their_grid():
    h = Header(256, 256, 256, 256, 1, 30)
    for k,(unit,it,tt,top) in SETTINGS.items():
        assert getattr(h, k) == it and getattr(replace(h, mode='tt2v', **{k: None}), k) == tt
        assert header_bytes(replace(h, **{k: it})) == header_bytes(h)
        assert getattr(read(header_bytes(replace(h, **{k: top}))), k) == top
    assert read(header_bytes(replace(h, strength=.3))).strength == replace(h, strength=.3).strength == 19/64

def test_newer_version_names_both():
    b = bytearray(header_bytes(Header(256, 256, 256, 256, 1, 30))); b[3] = 9
    with pytest.raises(BitstreamError, match='version 9.*version 1.*update'): read(bytes(b))
    with pytest.raises(BitstreamError, match='not a .cmvc'): read(b'RIFF' + bytes(40))

@pytest.mark.parametrize('bad', [dict(width=0), dict(height=16385), dict(coded_width=12), dict(coded_height=0), dict(fps=0), dict(fps=-1), dict(fps=2**33), dict(mode='x'),
    dict(topology='ring'), dict(preset=b'abc'), dict(steps=-1), dict(steps=1001), dict(strength=1.1), dict(strength=float('nan')), dict(group_size=0), dict(seed=2**32)])
def test_bad_headers(bad):
    with pytest.raises(CmvcError): replace(Header(256, 256, 256, 256, 33, 30), **bad)
