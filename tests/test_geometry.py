"Sizes there and back."
import numpy as np, pytest
from hypothesis import given, strategies as st
from cmvc_nb.errors import CmvcError
from cmvc_nb.geometry import Geometry, contact_sheet, resize
from cmvc_nb import video

side = st.integers(1, 8192)


def test_video_offers_it(): assert video.Geometry is Geometry and video.contact_sheet is contact_sheet


@given(side, side, st.sampled_from([64, 128, 256, 384, 512]))
def test_fit(w, h, size):
    g = Geometry.fit(w, h, size)
    assert (g.width, g.height) == (w, h) and g.coded_width % 64 == g.coded_height % 64 == 0
    assert 64*64 <= g.coded_width*g.coded_height <= 1.25*size**2
    t = Geometry.fit(h, w, size)   # turning the video turns the coded size, but for ties
    assert t.coded_width*t.coded_height == pytest.approx(g.coded_width*g.coded_height, rel=.5)


@pytest.mark.parametrize('w, h, want', [(1280, 720, (320, 192)), (1920, 1080, (320, 192)), (640, 480, (256, 192)), (512, 512, (256, 256)), (1, 1, (256, 256)), (720, 1280, (192, 320))])
def test_fit_known(w, h, want):
    g = Geometry.fit(w, h)
    assert (g.coded_width, g.coded_height) == want


@given(st.integers(1, 1024), st.integers(1, 1024))
def test_fit_shape_is_near(w, h):
    "Ordinary shapes are kept within a fifth; no allowed pair of like area is better by more than the area's share."
    if not 1/2.5 < w/h < 2.5: return
    g = Geometry.fit(w, h)
    assert abs(np.log(g.coded_width/g.coded_height*h/w)) < .25 and g.coded_width*g.coded_height >= .5*256**2


def test_fit_exact_and_bad():
    assert Geometry.fit(100, 50, (448, 256)) == Geometry(100, 50, 448, 256)
    for args in [(0, 5), (5, -1), (5, 5, 32), (5, 5, (100, 64)), (5, 5, (64, 64, 64)), (5, 5, (0, 64))]:
        with pytest.raises(CmvcError): Geometry.fit(*args)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_there_and_back_keeps_shape(w, h, t, seed):
    g, f = Geometry.fit(w, h, 64), np.random.default_rng(seed).integers(0, 256, (t, h, w, 3), dtype=np.uint8)
    c = g.to_coded(f)
    assert c.shape == (t, g.coded_height, g.coded_width, 3) and c.dtype == np.uint8
    assert g.to_original(c).shape == f.shape
    if t: assert (g.to_coded(f[0]) == c[0]).all()


def test_quality():
    "Same size: the same bytes. Flat stays flat. A smooth picture survives, and shrinking averages instead of picking."
    f = np.random.default_rng(0).integers(0, 256, (2, 64, 128, 3), dtype=np.uint8)
    assert (Geometry.fit(128, 64, (128, 64)).to_coded(f) == f).all()
    assert (resize(np.full((50, 70, 3), 77, np.uint8), (70, 50), (64, 64)) == 77).all()
    y, x = np.mgrid[:90, :160]
    s = np.stack([x*255//160, y*255//90, (x + y)], -1).astype(np.uint8)
    g = Geometry.fit(160, 90, 128)
    assert np.abs(g.to_original(g.to_coded(s)).astype(int) - s).mean() < 1.5
    stripes = np.zeros((60, 60, 3), np.uint8); stripes[:, ::2] = 255
    assert np.abs(resize(stripes, (60, 60), (10, 10)).astype(int) - 127).max() < 30


@pytest.mark.parametrize('bad', [np.zeros((4, 5, 3)), np.zeros((5, 5, 3), np.uint8), np.zeros((4, 5), np.uint8), np.zeros((1, 1, 4, 5, 3), np.uint8)], ids=['float', 'size', 'grey', 'rank'])
def test_wrong_frames(bad):
    with pytest.raises(CmvcError, match='expected uint8'): Geometry.fit(5, 4, 64).to_coded(bad)


def test_contact_sheet():
    "One row a video; each picture is the frame at its moment."
    a = np.repeat(np.arange(0, 170, 10, dtype=np.uint8), 48*3*64).reshape(17, 48, 64, 3)
    s = contact_sheet({'a': a, 'b, other size': a[:5, :24]}, n=5, width=32)
    assert s.dtype == np.uint8 and s.shape == (24 + 18 + 12 + 18, 5*34 - 2, 3)
    assert [s[28, 16 + 34*i, 0] for i in range(5)] == [0, 40, 80, 120, 160]
    assert [s[42 + 22, 16 + 34*i, 0] for i in range(5)] == [0, 10, 20, 30, 40]
    with pytest.raises(CmvcError): contact_sheet({'none': a[:0]})
