"""What one clip costs with Stable Diffusion 1.5: UNet rows counted by running our pipeline on a dummy, FLOPs of a row counted on the full architecture without weights.

    python benchmarks/arithmetic_sd15.py [--frames 16] [--size 512] [--lora-steps 100] [--steps 50] [--strength 1.0] [--tflops 790] [--json FILE]

A clip of `frames` frames, its two keyframes among them: LoRA fits, inversion, sampling and decoding. No GPU and no download are needed, so the seconds are FLOPs / (tflops x share): a limit at
share 1, and what is usual at lower shares. The second row is the serial way (one keyframe, one frame at a time, fp32 at an eighth of the rate), which needs the same FLOPs and many more calls."""
import argparse, json, sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]/'tests'))
from dummies import dummy_components
from cmvc_nb.it2v import DualLoRAPipeline

UNET = dict(sample_size=64, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8,
            down_block_types=('CrossAttnDownBlock2D',)*3 + ('DownBlock2D',), up_block_types=('UpBlock2D',) + ('CrossAttnUpBlock2D',)*3)
VAE = dict(down_block_types=('DownEncoderBlock2D',)*4, up_block_types=('UpDecoderBlock2D',)*4, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, norm_num_groups=32)


def flops(f):
    with FlopCounterMode(display=False) as c: f()
    return c.get_total_flops()/1e12


def full_size(size):
    "TFLOPs of one UNet row, one VAE encoding and decoding; bytes of the weights in half precision."
    from diffusers import AutoencoderKL, UNet2DConditionModel
    with torch.device('meta'), torch.no_grad():
        unet, vae, h = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE), size//8
        row = flops(lambda: unet(torch.empty(1, 4, h, h), torch.tensor([1]), encoder_hidden_states=torch.empty(1, 77, 768)))
        enc, dec = flops(lambda: vae.encode(torch.empty(1, 3, size, size)).latent_dist.mode()), flops(lambda: vae.decode(torch.empty(1, 4, h, h)))
    weights = 2*sum(p.numel() for m in (unet, vae) for p in m.parameters()) + 2*123_060_480 # the text encoder's
    return row, enc, dec, weights


def counts(frames, lora_steps, steps, strength):
    "Calls and rows of UNet (forward, backward) and VAE for one clip, by running the pipeline on a dummy of a few channels."
    pipe, n = DualLoRAPipeline(**dummy_components()), dict(calls=0, rows=0, back_calls=0, back_rows=0, enc=0, dec=0)
    def unet(m, args, kwargs, out):
        n['calls'] += 1; n['rows'] += len(out.sample)
        if out.sample.requires_grad: n['back_calls'] += 1; n['back_rows'] += len(out.sample)
    pipe.unet.register_forward_hook(unet, with_kwargs=True)
    for name in ('encode', 'decode'):
        def counted(x, f=getattr(pipe.vae, name), k=name[:3], **kw): n[k] += len(x); return f(x, **kw)
        setattr(pipe.vae, name, counted)
    a, b = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    loras = pipe.fit({0: a, 1: b}, {0: 'x', 1: 'x'}, 2, steps=lora_steps, strength=strength)
    pipe(a, b, prompt='x', loras=(loras[0], loras[1]), frames=frames-2, num_inference_steps=steps, strength=strength)
    return n


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--frames', type=int, default=16); p.add_argument('--size', type=int, default=512); p.add_argument('--lora-steps', type=int, default=100); p.add_argument('--steps', type=int, default=50)
    p.add_argument('--strength', type=float, default=1.); p.add_argument('--tflops', type=float, default=790.); p.add_argument('--json')
    a = p.parse_args()
    row, enc, dec, weights = full_size(a.size)
    n = counts(a.frames, a.lora_steps, a.steps, a.strength)
    unet, vae = row*(n['rows'] + n['back_rows']), enc*n['enc'] + dec*n['dec'] # frozen weights: a backward pass is about one more forward pass
    total = unet + vae
    print(f"one UNet row {row:.3f} TFLOP, one VAE encoding {enc:.2f}, decoding {dec:.2f}; weights in half precision {weights/1e9:.2f} GB")
    print(f"{a.frames} frames of {a.size}x{a.size}, {a.lora_steps} LoRA steps, {a.steps} sampling steps at strength {a.strength:g}: {n['rows']} UNet rows forward in {n['calls']} calls, {n['back_rows']} backward in {n['back_calls']}, {n['enc']} VAE encodings, {n['dec']} decodings")
    print(f"UNet {unet:.0f} TFLOP + VAE {vae:.0f} TFLOP = {total:.0f} TFLOP")
    for share in (1, .5, .3, .15): print(f"  batched, half precision, {share:4.0%} of {a.tflops:g} TFLOP/s: {total/(a.tflops*share):6.1f} s")
    print(f"  serial, single precision: {n['rows'] + n['back_rows']} calls; {total/(a.tflops/8):6.1f} s at all of {a.tflops/8:g} TFLOP/s")
    if a.json: Path(a.json).write_text(json.dumps(dict(n, row=row, encode=enc, decode=dec, weights=weights, tflop=total), indent=1))


if __name__ == '__main__': main()
