"""One clip on the full-size architecture of Stable Diffusion 1.5 with random weights: seconds and peak memory of our batched way, and the ratio to the serial fp32 way, in one run.

    python benchmarks/bench_sd15.py [--device cuda] [--dtype bfloat16] [--frames 16] [--size 512] [--lora-steps 100] [--steps 50] [--strength 1.0] [--batch 14] [--compile] [--no-serial] [--json FILE]

Nothing is downloaded: pictures mean nothing, time and memory do. The serial way fits one LoRA after the other, inverts one keyframe and samples one frame at a time, all in float32, as the nearest
public code does. On a CPU give small numbers: --lora-steps 1 --steps 2 --frames 4 --size 256."""
import argparse, json, resource, sys, time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]/'tests')); sys.path.insert(0, str(Path(__file__).parent))
from arithmetic_sd15 import UNET, VAE
from dummies import dummy_scheduler, dummy_tokenizer
from cmvc_nb.it2v import DualLoRAPipeline


def full_size(device, dtype, seed=0):
    "The five parts of Stable Diffusion 1.5, random, made on the device."
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    torch.manual_seed(seed)
    tokenizer = dummy_tokenizer()
    with torch.device(device):
        unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408, bos_token_id=0, eos_token_id=1, pad_token_id=1))
    pipe = DualLoRAPipeline(vae.to(dtype), text.to(dtype), tokenizer, unet.to(dtype), dummy_scheduler('epsilon'))
    return pipe.to(device)


def clip(pipe, a, batch):
    "Seconds of each phase for one clip; `batch` frames at a time, LoRAs together if it is more than one."
    x, y = np.random.default_rng(0).integers(0, 256, (2, a.size, a.size, 3), np.uint8)
    cuda, t = a.device.startswith('cuda'), {}
    def phase(name, f):
        if cuda: torch.cuda.synchronize()
        s = time.perf_counter(); out = f()
        if cuda: torch.cuda.synchronize()
        t[name] = time.perf_counter() - s
        return out
    pipe.loras.clear()
    one = lambda frames, total: pipe.fit(frames, {k: 'x' for k in frames}, total, steps=a.lora_steps, strength=a.strength)
    if batch > 1: fitted = phase('LoRA fits', lambda: one({0: x, 1: y}, 2))
    else: fitted = phase('LoRA fits', lambda: one({0: x}, 1) | {1: one({0: y}, 1)[0]})
    options = dict(prompt='x', loras=(fitted[0], fitted[1]), num_inference_steps=a.steps, strength=a.strength)
    with torch.no_grad():
        held = phase('inversion', lambda: pipe.clip(x, y, **options))
        c = phase('inversion', held.__enter__)
        c.batch_size = batch
        w = np.linspace(1, 0, a.frames)[1:-1]
        out = phase('sampling and decoding', lambda: c.frames(w, w))
        held.__exit__(None, None, None)
    assert out.shape == (a.frames-2, a.size, a.size, 3)
    return t, c.evaluations


def measured(pipe, a, batch):
    cuda = a.device.startswith('cuda')
    if cuda: torch.cuda.reset_peak_memory_stats()
    t, rows = clip(pipe, a, batch)
    peak = torch.cuda.max_memory_allocated()/2**30 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
    return dict(seconds=t, total=sum(t.values()), rows=rows, peak_gib=peak)


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu'); p.add_argument('--dtype', default='bfloat16')
    p.add_argument('--frames', type=int, default=16); p.add_argument('--size', type=int, default=512); p.add_argument('--lora-steps', type=int, default=100); p.add_argument('--steps', type=int, default=50)
    p.add_argument('--strength', type=float, default=1.); p.add_argument('--batch', type=int, default=14); p.add_argument('--compile', action='store_true'); p.add_argument('--no-serial', action='store_true'); p.add_argument('--json')
    a = p.parse_args(); result = {}
    def row(name, pipe, batch):
        result[name] = r = measured(pipe, a, batch)
        print(f"{name}: {r['total']:.1f} s (" + ', '.join(f'{k} {v:.1f}' for k, v in r['seconds'].items()) + f"), {r['rows']} rows for inversion and sampling, peak {r['peak_gib']:.2f} GiB", flush=True)
    pipe = full_size(a.device, getattr(torch, a.dtype))
    if a.compile:
        pipe.unet.forward = torch.compile(pipe.unet.forward); s = time.perf_counter(); clip(pipe, a, a.batch)
        print(f'compiling, with one clip: {time.perf_counter()-s:.0f} s', flush=True)
    elif a.device.startswith('cuda'): clip(pipe, a, a.batch) # warm up
    row(f'batched, {a.dtype}' + (', compiled' if a.compile else ''), pipe, a.batch)
    del pipe
    if not a.no_serial:
        row('serial, float32', full_size(a.device, torch.float32), 1)
        x, y = (r['total'] for r in result.values()); print(f'ratio {y/x:.2f}')
    if a.json: Path(a.json).write_text(json.dumps(dict(vars(a), result=result), indent=1))


if __name__ == '__main__': main()
