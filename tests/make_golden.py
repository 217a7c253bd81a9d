"""Write the golden files: small .cmvc files with hand-built content, and what they say, for every later version to read.

    python tests/make_golden.py [folder]      # tests/golden by default

A file that is there is never written again: a golden file is made once, by the version that first writes its format. A new format adds new names.
"""
import json, sys
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
import numpy as np
from PIL import Image
from cmvc_nb.bitstream import Clip, ClipContent, CmvcFile, Group, Track, keyframe_indices, pack_clip, to_bytes
from cmvc_nb.header import Header
from cmvc_nb.keyframes import CODECS, decode_group, encode_group

KEYS = ['A bright scene in soft light: a large smooth green area at the bottom, a medium rough dark brown area on the left, a small plain sky blue area at the top right.',
        'A dim scene in hard light: a large rough grey area in the centre, a small plain red area on the right, a medium smooth black area at the top.',
        'Ein Fuß 🦶 im Schnee, 雪の中の足, and a line\nbreak.', 'The same place at night.']
MOVES = ['The camera pans left slowly and zooms in; a small object in the centre moves right by a tenth of the frame.', '', 'The camera is still.']

def pictures(n, width=128, height=64):
    "Discs on gradients, the same on every machine: integers only."
    y, x = np.mgrid[:height, :width]
    out = np.empty((n, height, width, 3), np.uint8)
    for i in range(n):
        out[i] = np.stack([x*3, y*4, (x+y)*2 + 20*i], -1).clip(0, 255)
        out[i][(x-20-6*i)**2 + (y-24)**2 < 15**2] = (200, 60+30*i, 40)
    return out

def content(mode, topology, lengths, seed=0):
    rng = np.random.default_rng(seed); last = len(lengths)-1
    return [ClipContent(KEYS[j], MOVES[j], KEYS[-1] if topology == 'pair' and j == last else None,
                        None if mode == 'tt2v' else np.zeros((n-1, 2), np.int64) if j == 1 else rng.integers((-32, -8), (33, 9), (n-1, 2)) if j else rng.integers(-2, 3, (n-1, 2)))
            for j,n in enumerate(lengths)]

def build(mode='it2v', topology='pair', lengths=(5, 1, 12), codecs=('av1', 'av1'), tracks=(), **settings):
    cs, n_keys = content(mode, topology, lengths), len(lengths) + (topology == 'pair')
    h = Header(127, 63, 128, 64, sum(lengths) + (topology == 'pair'), Fraction(30000, 1001), mode, topology, preset=b'gold', group_size=2, **settings)
    keys = pictures(n_keys)
    groups = [Group(CODECS[c], encode_group(keys[2*g:2*g+2], c, 40.)) for g,c in enumerate(codecs)] if mode == 'it2v' else []
    return CmvcFile(h, groups, [Clip(n, pack_clip(c)) for n,c in zip(lengths, cs)], list(tracks)), cs

FILES = {
    'v1_it2v': lambda: build(seed=7),
    'v1_tt2v': lambda: build('tt2v'),
    'v1_it2v_led': lambda: build(topology='led', tracks=[Track(3, 1, [b'flow', b'']), Track(1000, 0, [bytes(9)])]),
    'v1_settings': lambda: build('tt2v', steps=25, strength=.75, lora_steps=100, seed=2**32-1, guidance=7.5, init=1),
    'v1_codecs': lambda: build(codecs=('webp', 'jpeg')),
    'v1_codecs2': lambda: build(codecs=('avif', 'x265')),
}

def says(f, cs):
    "What the file must be read as."
    h = asdict(f.header) | dict(fps=str(f.header.fps), preset=f.header.preset.hex())
    return dict(header=h, keyframes=keyframe_indices([c.frames for c in f.clips], f.header.topology),
                clips=[asdict(replace(c, weights=None)) | dict(weights=None if c.weights is None else c.weights.tolist()) for c in cs],
                codecs=[g.codec for g in f.groups], tracks=[dict(type=t.type, codec=t.codec, sections=[s.hex() for s in t.sections]) for t in f.tracks])

def keyframes(f):
    "Decoded keyframes, one above the other."
    name, n = {v: k for k,v in CODECS.items()}, len(f.keyframes)
    return np.concatenate([decode_group(g.payload, name[g.codec], min(2, n-2*i), 128, 64).reshape(-1, 128, 3) for i,g in enumerate(f.groups)])

def make_golden(folder):
    "Write the files that are not there yet; their names."
    made = []
    for name,fn in FILES.items():
        if (folder/f'{name}.cmvc').exists(): continue
        f, cs = fn()
        (folder/f'{name}.json').write_text(json.dumps(says(f, cs), ensure_ascii=False, indent=1) + '\n', encoding='utf-8')
        if f.groups: Image.fromarray(keyframes(f)).save(folder/f'{name}.png', optimize=True)
        (folder/f'{name}.cmvc').write_bytes(to_bytes(f)); made.append(name)
    return made

if __name__ == '__main__':
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent/'golden'); folder.mkdir(exist_ok=True)
    print('made', make_golden(folder) or 'nothing: every golden file is there')
