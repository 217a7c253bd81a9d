"Texts, weights and whole numbers come back from one stream, and damage is told."
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from cmvc_nb.entropy import Encoder, Decoder
from cmvc_nb.errors import BitstreamError

@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=4), st.lists(st.integers(0, 2**62), max_size=4))
def test_round_trip(texts, ints):
    e = Encoder()
    for t in texts: e.text(t)
    for v in ints: e.uint(v, 3)
    b = e.finish()
    d = Decoder(b)
    assert [d.text() for _ in texts] == texts and [d.uint(3) for _ in ints] == ints
    assert 8*len(b) <= sum(x for _, x in e.bits) + 9

@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80))
def test_hostile(data):
    d = Decoder(data)
    try:
        for _ in range(3): d.text(); d.weights(20); d.uint(2)
    except BitstreamError: pass
