"""Seeded components of a few channels in the published layouts, so that the true code path is tested in seconds."""
from pathlib import Path

import numpy as np
import torch


def _seeded(seed, make):
    "`make()` with torch's global generator at `seed`, restored afterwards; in evaluation mode."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval().requires_grad_(False)


def dummy_unet(seed=0, cross=16, channels=4):
    "UNet2DConditionModel, two levels (8, 16), attention at the lower one."
    from diffusers import UNet2DConditionModel
    return _seeded(seed, lambda: UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
        cross_attention_dim=cross, attention_head_dim=2, norm_num_groups=4))


def dummy_vae(seed=0, kind='tiny'):
    "AutoencoderTiny (kind 'tiny') or AutoencoderKL (kind 'kl'): 8 pixels a latent, 4 channels."
    from diffusers import AutoencoderKL, AutoencoderTiny
    if kind == 'tiny':
        return _seeded(seed, lambda: AutoencoderTiny(encoder_block_out_channels=(8,)*4, decoder_block_out_channels=(8,)*4,
                                                     num_encoder_blocks=(1,)*4, num_decoder_blocks=(1,)*4))
    return _seeded(seed, lambda: AutoencoderKL(block_out_channels=(4,)*4, down_block_types=('DownEncoderBlock2D',)*4,
        up_block_types=('UpDecoderBlock2D',)*4, layers_per_block=1, norm_num_groups=2, latent_channels=4, scaling_factor=.5))


def dummy_tokenizer(length=77):
    "CLIPTokenizer over single letters, digits and punctuation: every ASCII text has tokens."
    from transformers import CLIPTokenizer
    letters = [chr(c) for c in range(33, 127)]
    words = ['<|startoftext|>', '<|endoftext|>'] + letters + [c + '</w>' for c in letters]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=length)


def dummy_text_encoder(tokenizer, seed=0, width=16):
    "CLIPTextModel, one layer."
    from transformers import CLIPTextConfig, CLIPTextModel
    config = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2*width, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=width)
    return _seeded(seed, lambda: CLIPTextModel(config))


def dummy_scheduler(prediction_type='v_prediction', **kwargs):
    "DDIMScheduler with Stable Diffusion's schedule."
    from diffusers import DDIMScheduler
    options = dict(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return DDIMScheduler(**{**options, 'prediction_type': prediction_type, **kwargs})


def dummy_components(seed=0, prediction_type='v_prediction', vae='tiny'):
    "The five parts of a Stable-Diffusion-like pipeline, by their diffusers names."
    tokenizer = dummy_tokenizer()
    return dict(vae=dummy_vae(seed, vae), text_encoder=dummy_text_encoder(tokenizer, seed), tokenizer=tokenizer,
                unet=dummy_unet(seed), scheduler=dummy_scheduler(prediction_type))


def make_dummy_sd(folder, seed=0, prediction_type='v_prediction', vae='tiny'):
    "Write a complete StableDiffusionPipeline folder (safety_checker and feature_extractor null, as SD 1.5 without them) and return its path."
    from diffusers import StableDiffusionPipeline
    StableDiffusionPipeline(**dummy_components(seed, prediction_type, vae), safety_checker=None, feature_extractor=None,
                            requires_safety_checker=False).save_pretrained(Path(folder))
    return Path(folder)


def moving_disc(frames=9, size=64, seed=0):
    "Drawn clip, uint8 (frames, size, size, 3): a disc crosses a graded background."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    low, high, colour = rng.integers(0, 256, (3, 3))
    out = []
    for t in np.linspace(.25, .75, frames):
        picture = low*(1 - y[..., None]) + high*y[..., None]
        picture[(x - t)**2 + (y - .5)**2 < .03] = colour
        out.append(picture.round())
    return np.stack(out).astype(np.uint8)
