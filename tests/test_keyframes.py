import os, resource
import numpy as np, pytest
from PIL import Image
from hypothesis import given, settings, strategies as st, HealthCheck
from cmvc_nb import keyframes as K
from cmvc_nb.errors import CmvcError, BitstreamError

def drawn(n=3, h=64, w=64, seed=0):
    "A smooth random ground with a disc that moves."
    g = np.random.default_rng(seed)
    bg = np.asarray(Image.fromarray(g.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((w, h), Image.BICUBIC)).astype(int)
    y, x = np.mgrid[:h, :w]
    out = []
    for i in range(n):
        f = bg + g.normal(0, 4, (h, w, 1)).round().astype(int)
        f[(x - w*(.3+.4*i/max(n, 2)))**2 + (y - h/2)**2 < (h/5)**2] = g.integers(60, 90)
        out.append(f.clip(0, 255))
    return np.array(out, np.uint8)

@pytest.mark.parametrize('codec', K.CODECS)
@pytest.mark.parametrize('n,h,w', [(1, 64, 64), (3, 64, 128), (2, 128, 64)])
def test_round_trip(codec, n, h, w):
    f = drawn(n, h, w)
    d = K.decode_group(K.encode_group(f, codec, 60), codec, n, w, h)
    assert d.shape == f.shape and d.dtype == np.uint8
    assert all(K.psnr(a, b) > 24 for a, b in zip(f, d))       # each in its own place
