"Golden files of earlier versions are read as they were: header, texts, weights, keyframe pixels, and the same bytes when written again."
import json
from dataclasses import asdict, replace
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from cmvc_nb.bitstream import content, open_cmvc, parse, to_bytes, verify
from cmvc_nb.rate import rate_table
from make_golden import FILES, keyframes, make_golden, says

GOLDEN = sorted((Path(__file__).parent/'golden').glob('*.cmvc'))

def check(path):
    b, want = path.read_bytes(), json.loads(path.with_suffix('.json').read_text(encoding='utf-8'))
    f = parse(b)
    with open_cmvc(b) as r: cs = [content(r, j) for j in range(len(r.lengths))]
    assert says(f, cs) == want and to_bytes(f) == b and verify(b) == [] and rate_table(b).bits == 8*len(b)
    if not f.groups: return
    a, exact = keyframes(f).astype(int), set(want['codecs']) <= {0}
    b = np.asarray(Image.open(path.with_suffix('.png'))).astype(int)
    assert a.shape == b.shape and (np.array_equal(a, b) if exact else abs(a-b).max() <= 3) # AV1 is exact; Pillow's codecs may round otherwise in another build

@pytest.mark.parametrize('path', GOLDEN, ids=lambda p: p.stem)
def test_golden_files_stay_readable(path): check(path)

def test_golden_files_are_made_once_and_say_what_they_should(tmp_path):
    assert make_golden(tmp_path) == list(FILES) and make_golden(tmp_path) == []
    for name in FILES: check(tmp_path/f'{name}.cmvc')
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 150_000
