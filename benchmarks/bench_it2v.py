"""IT2V on two cores: what batching gains, as ratios measured in one run.

    python benchmarks/bench_it2v.py [--preset tiny] [--size 256] [--frames 15] [--gradient-steps 4] [--json FILE]

Prints frames of a clip in one batch against one by one, both LoRAs in one batch against in turn, and the batched
search against gradient descent, each with the times in seconds and the largest difference of the results."""
import argparse, json, time

import numpy as np
import torch

from cmvc_nb.geometry import Geometry
from cmvc_nb.it2v import uniform_schedule
from cmvc_nb.keyframes import decode_group, encode_group
from cmvc_nb.models import load_models
from cmvc_nb.search import search_weights, true_bits
from cmvc_nb.video import demo_clip, read_video


def timed(f):
    t = time.perf_counter()
    out = f()
    return out, time.perf_counter() - t


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--preset', default='tiny'); p.add_argument('--size', type=int, default=256); p.add_argument('--frames', type=int, default=15)
    p.add_argument('--gradient-steps', type=int, default=4); p.add_argument('--lora-steps', type=int, default=30)
    p.add_argument('--threads', type=int, default=2); p.add_argument('--json')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    pipe, prompt = load_models(a.preset).it2v, 'The camera pans left slowly.'
    film, _ = read_video(demo_clip(), max_frames=a.frames + 2)
    film = Geometry(film.shape[2], film.shape[1], a.size, a.size).to_coded(film)
    ends = decode_group(encode_group(film[[0, -1]], quality=0), 'av1', 2, a.size, a.size)
    target, w, rows = film[1:-1], uniform_schedule(a.frames), []

    def row(name, fast, slow, t_fast, t_slow, note):
        rows.append(dict(name=name, fast=fast, slow=slow, seconds_fast=t_fast, seconds_slow=t_slow, ratio=t_slow/t_fast, note=note))
        print(f'{name}: {fast} {t_fast:.1f} s, {slow} {t_slow:.1f} s, ratio {t_slow/t_fast:.2f}; {note}', flush=True)

    frames, texts = dict(enumerate(ends)), {0: prompt, 1: prompt}
    fit = lambda i: (pipe.loras.clear(), pipe.fit({k: frames[k] for k in i}, texts, len(i), steps=a.lora_steps, strength=.3))[1]
    pipe.fit(frames, texts, 2, steps=1)                                                     # warm up
    together, t_fast = timed(lambda: fit([0, 1]))
    alone, t_slow = timed(lambda: [fit([0]), pipe.fit({0: ends[1]}, texts, 1, steps=a.lora_steps, strength=.3)])
    gap = max(float((together[i][k] - alone[i][0][k]).abs().max()) for i in (0, 1) for k in together[i])
    row('two LoRAs', 'one batch', 'in turn', t_fast, t_slow, f'largest difference of a parameter {gap:.1e}')

    loras = together[0], together[1]
    with pipe.clip(*ends, prompt, loras) as c:
        c.frames(w[:1], w[:1])
        c.batch_size = a.frames
        many, t_fast = timed(lambda: c.frames(w, w))
        c.batch_size = pipe.config.batch_size
        chunks, t_chunk = timed(lambda: c.frames(w, w))
        c.batch_size = 1
        single, t_slow = timed(lambda: c.frames(w, w))
    note = lambda x: f'largest difference {np.abs(x.astype(int) - single).max()} of 255'
    row(f'{a.frames} frames', 'one batch', 'one by one', t_fast, t_slow, note(many))
    row(f'{a.frames} frames', f'batches of {pipe.config.batch_size}', 'one by one', t_chunk, t_slow, note(chunks))

    fast, t_fast = timed(lambda: search_weights(pipe, target, *ends, prompt, loras))
    slow, t_slow = timed(lambda: search_weights(pipe, target, *ends, prompt, loras, 'gradient', dict(steps=a.gradient_steps)))
    per_step = t_slow/a.gradient_steps
    say = lambda f: f'squared error {f.history[0]:.1f} to {f.mse.mean():.1f}, {true_bits(f.q):.0f} bits, {f.evaluations} evaluations'
    row('search', f'batched ({say(fast)})', f'{a.gradient_steps} gradient steps ({say(slow)})', t_fast, t_slow,
        f'a gradient step takes {per_step:.1f} s, so 100 would be {100*per_step/t_fast:.0f} times the batched search')
    if a.json: json.dump(dict(threads=a.threads, size=a.size, rows=rows), open(a.json, 'w'), indent=1)


if __name__ == '__main__': main()
