"""What the codec reaches on a folder of clips: sizes, overheads, seconds, memory, and what each part of IT2V is worth, and whether TT2V shows what it was told.

    python benchmarks/bench_clips.py FOLDER [sizes] [it2v] [tt2v] [threads] [length]      # all five if none is named

Each clip is taken at 256 x 256, 33 frames at most, with 3 keyframes, on the embedded models. Nothing is written but the table on standard output.
"""
import os, resource, subprocess, sys, time
from pathlib import Path
import numpy as np
from cmvc_nb.bitstream import frame_bits, line_bytes, open_cmvc
from cmvc_nb.codec import Codec, Player
from cmvc_nb.keyframes import psnr
from cmvc_nb.search import ablate
from cmvc_nb.representation import agreement, describe_keyframe
from cmvc_nb.tt2v import frame_steps
from cmvc_nb.video import read_video
from cmvc_nb.geometry import Geometry

SIZE = 256


def clips(folder, least=2):
    "Name and square frames of every video in `folder` with enough frames."
    for p in sorted(Path(folder).glob('*.m[pk][4v]')):
        f = read_video(p, 33)[0]
        if len(f) >= least: yield p.stem, Geometry(f.shape[2], f.shape[1], SIZE, SIZE).to_coded(f)


def sizes(codec, folder):
    "Bytes of both modes, of header and framing; seconds; the PSNR of the generated frames."
    print(f"{'clip':36} {'it2v':>6} {'images':>7} {'tt2v':>5} {'header':>7} {'framing/clip':>13} {'dB':>6} {'enc s':>6} {'dec s':>6} {'tt2v dec s':>10}")
    rows = []
    for name, f in clips(folder, 33):
        t0 = time.time(); e = codec.encode(f, keyframes=3); t1 = time.time(); codec.decode(e.data); t2 = time.time()
        w = codec.encode(f, mode='tt2v', keyframes=3); t3 = time.time(); codec.decode(w.data); t4 = time.time()
        head, frame = overhead(e.data)
        rows.append((len(e.data), e.rate.to_dict()['kinds']['keyframe images']/8, len(w.data), head, frame, np.mean(e.psnr), t1-t0, t2-t1, t4-t3))
        print(f'{name:36} {rows[-1][0]:6d} {rows[-1][1]:7.0f} {rows[-1][2]:5d} {head:7d} {frame:13.1f} {rows[-1][5]:6.2f} {t1-t0:6.1f} {t2-t1:6.1f} {t4-t3:10.1f}', flush=True)
    m = np.mean(rows, 0)
    print(f"{'mean':36} {m[0]:6.0f} {m[1]:7.0f} {m[2]:5.0f} {m[3]:7.0f} {m[4]:13.1f} {m[5]:6.2f} {m[6]:6.1f} {m[7]:6.1f} {m[8]:10.1f}")
    print(f'largest tt2v file {max(r[2] for r in rows)} bytes; peak memory of all this {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20:.2f} GiB')


def overhead(data):
    "Bytes before the first payload without the clips' lines of the table of contents, and those lines per clip."
    with open_cmvc(data) as r:
        own = [s for s in r.sections if s.track == 1]
        lines = sum(len(line_bytes(s, frame_bits(own))) + len(s.crc) for s in own)
        return min(s.offset for s in r.sections)-lines, lines/len(own)


def it2v(codec, folder):
    "What generating is worth: the blend, the blend with the file's w_i, the full path, and the full path with one part off; generated frames only."
    tables = []
    for name, f in clips(folder, 5):
        e = codec.encode(f, keyframes=3, score=False); parts = []
        with open_cmvc(e.data) as r:
            p = Player.of(codec.models, r)
            for j, n in enumerate(r.lengths):
                if n < 2: continue
                a = e.keyframes[j]
                rows = ablate(codec.models.it2v, f[a+1:a+n], p.keyframe(j), p.keyframe(j+1), p.steps(j, n), p.motion(j), p.loras(j), r.header.lora_steps, **p.sampling())
                parts.append((n-1, rows))
        names = [row['row'] for row in parts[0][1]]
        total = sum(n for n, _ in parts)
        table = np.array([[sum(n*rows[i][k] for n, rows in parts)/total for k in ('mse', 'perceptual')] + [sum(rows[i]['evaluations'] for _, rows in parts)] for i in range(len(names))])
        tables.append(table)
        print(f'{name} ({len(e.data)} bytes): ' + '; '.join(f'{n[:24]} {m:.1f}, {q:.4f}' for n, (m, q, _) in zip(names, table)), flush=True)
    T = np.array(tables)
    print(f"\nmean of {len(T)} clips{'':16} {'MSE':>8} {'MS-SSIM':>8} {'UNet rows':>9}   lower MSE than (a), (b); higher MS-SSIM than (a), (b): clips")
    for i, n in enumerate(names):
        wins = [(T[:, i, 0] < T[:, k, 0]).sum() for k in (0, 1)] + [(T[:, i, 1] > T[:, k, 1]).sum() for k in (0, 1)]
        print(f'{n:32} {T[:, i, 0].mean():8.2f} {T[:, i, 1].mean():8.4f} {T[:, i, 2].mean():9.0f}   {wins[0]}, {wins[1]}; {wins[2]}, {wins[3]}')


def tt2v(codec, folder):
    "Do the words come back? Describe decoded TT2V keyframes and find each one's source among all by colours and places; and the step at joins. With the seed that the encoder chose by this very measure, and with seed 0."
    for title, seed in (('the seed chosen from eight', None), ('seed 0', 0)):
        names, said, seen, ratios = [], [], [], []
        for name, f in clips(folder):
            e = codec.encode(f, mode='tt2v', keyframes=3, seed=seed); d, k = codec.decode(e.data).frames, e.keyframes
            names.append(name); said.append([describe_keyframe(f[i]) for i in k]); seen.append([describe_keyframe(d[i]) for i in k])
            s = frame_steps(d); ratios.append(max(s[k[1]-1+j]/max(np.median(s[k[j]:k[j+1]]), .02) for j in (0, 1) if k[j+1]-k[j] > 2)) # each in its own clip's pace
        A = np.array([[np.mean([agreement(a, b) for a, b in zip(x, y)]) for y in said] for x in seen])
        for i, n in enumerate(names): print(f'{n:36} agreement with its source {A[i, i]:.2f}, mean with others {(A[i].sum()-A[i, i])/(len(A)-1):.2f}, best {names[A[i].argmax()]}; step at the join / median {ratios[i]:.2f}', flush=True)
        print(f'{title}: right source first: {(A.argmax(1) == np.arange(len(A))).sum()} of {len(A)}; largest step at a join {max(ratios):.2f} of the median step')


def threads(codec, folder):
    "The same file decoded with one and with two threads, each in its own process."
    import tempfile
    name, f = next(clips(folder, 33))
    with tempfile.TemporaryDirectory() as d:
        for mode in ('it2v', 'tt2v'):
            codec.encode(f, Path(d)/'a.cmvc', mode, keyframes=3, score=False); out = {}
            for n in (1, 2, 2):
                subprocess.run([sys.executable, '-c', f'import torch; torch.set_num_threads({n})\nfrom cmvc_nb.codec import Codec\nCodec.from_pretrained("tiny", "cpu").decode("a.cmvc", "a.mkv")'],
                               cwd=d, check=True, env=os.environ | {'OMP_NUM_THREADS': str(n)}, stderr=subprocess.DEVNULL)
                out.setdefault(n, []).append(read_video(Path(d)/'a.mkv')[0])
            a, b, c = out[1][0], *out[2]
            print(f'{name} {mode}: 1 against 2 threads {"identical" if (a == b).all() else f"{psnr(a, b):.1f} dB"}; twice with 2 threads {"identical" if (b == c).all() else "DIFFERENT"}')


def length(codec, folder):
    "A video ten times as long, at 128 x 128, each in its own process: seconds and peak memory."
    code = '''
import sys, time, resource
from cmvc_nb.codec import Codec, Player
from cmvc_nb.world import video
import numpy as np
n, mode = int(sys.argv[1]), sys.argv[2]
c = Codec.from_pretrained('tiny', 'cpu')
def frames():
    v = video(0, 17, 256, kind='pan')[0]; v = np.concatenate([v, v[-2:0:-1]])
    for t in range(n): yield v[t % len(v)]
t0 = time.time(); e = c.encode(frames(), mode=mode, size=128, score=False); t1 = time.time(); c.decode(e.data, '/dev/shm/length.y4m'); t2 = time.time()
print(f'{mode} {n:4d} frames: encode {t1-t0:6.1f} s, decode {t2-t1:6.1f} s, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20:.2f} GiB, {len(e.data)} bytes')
'''
    for mode in ('it2v', 'tt2v'):
        for n in (33, 330): print(subprocess.run([sys.executable, '-c', code, str(n), mode], capture_output=True, text=True, check=True).stdout.strip(), flush=True)


if __name__ == '__main__':
    if len(sys.argv) < 2: sys.exit(__doc__)
    codec = Codec.from_pretrained('tiny', 'cpu')
    for what in sys.argv[2:] or ['sizes', 'it2v', 'tt2v', 'threads', 'length']: print(f'\n== {what}'); globals()[what](codec, sys.argv[1])
