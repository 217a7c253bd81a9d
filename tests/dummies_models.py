"""A complete preset of a few channels: diffusion folder, motion adapter, CLIP and the YAML page."""
import json
from pathlib import Path

import yaml

from dummies import _seeded, dummy_components, make_dummy_sd


def dummy_motion_adapter(seed=0, still=False):
    "MotionAdapter for `dummy_unet`; its output layers are random (a fresh one's too), or zero if `still`."
    from diffusers import MotionAdapter
    adapter = _seeded(seed + 7, lambda: MotionAdapter(block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4,
                                                      motion_num_attention_heads=2, motion_max_seq_length=32, use_motion_mid_block=False))
    if still:
        for name, p in adapter.named_parameters():
            if 'proj_out' in name: p.zero_()
    return adapter


def make_dummy_clip(folder, seed=0, size=32, **preprocess):
    "open_clip folder: a vision transformer of two layers; its text tower is a stub."
    import open_clip
    from safetensors.torch import save_file
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(model_cfg=dict(embed_dim=16, vision_cfg=dict(image_size=size, layers=2, width=32, head_width=16, patch_size=8),
                                 text_cfg=dict(context_length=4, vocab_size=4, width=8, heads=1, layers=1)),
                  preprocess_cfg={**dict(mean=[.5, .4, .3], std=[.2, .25, .3], interpolation='bicubic', resize_mode='squash'), **preprocess})
    (folder/'open_clip_config.json').write_text(json.dumps(config))
    model = _seeded(seed, lambda: open_clip.create_model(f'local-dir:{folder}', load_weights=False))
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, folder/'open_clip_model.safetensors')
    return folder


def make_dummy_preset(folder, seed=0, **page):
    "Write everything under `folder`; returns the path of its preset.yaml. `page` overrides keys of the YAML."
    folder = Path(folder)
    make_dummy_sd(folder, seed)
    dummy_motion_adapter(seed).save_pretrained(folder/'motion_adapter')
    make_dummy_clip(folder/'clip', seed)
    text = dict(name='dummy', version=1, size=64, parts=dict(diffusion='.', motion_adapter='motion_adapter', clip='clip', describer='measuring'),
                settings=dict(steps=2, lora_steps=2, strength=.5, guidance_scale=1.), tt2v=dict(context=8, share=.5), it2v={})
    (folder/'preset.yaml').write_text(yaml.safe_dump({**text, **page}))
    return folder/'preset.yaml'


def make_sd15_layout(folder, seed=0):
    "Write `sd/` and `motion/` exactly as `stable-diffusion-v1-5/stable-diffusion-v1-5` and its AnimateDiff adapter lie on the hub, in small; with their pickles."
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    folder = Path(folder)
    parts = dummy_components(seed, 'epsilon', 'kl')
    parts['scheduler'] = PNDMScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    sd = folder/'sd'
    StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(sd)
    index = json.loads((sd/'model_index.json').read_text())
    index.update(safety_checker=['stable_diffusion', 'StableDiffusionSafetyChecker'], feature_extractor=['transformers', 'CLIPImageProcessor'], requires_safety_checker=True)
    (sd/'model_index.json').write_text(json.dumps(index))
    tokenizer = parts['tokenizer']                                                        # the old files: vocab.json and merges.txt
    (sd/'tokenizer'/'tokenizer.json').unlink()
    (sd/'tokenizer'/'vocab.json').write_text(json.dumps(tokenizer.get_vocab()))
    (sd/'tokenizer'/'merges.txt').write_text('#version: 0.2\n')
    (sd/'tokenizer'/'special_tokens_map.json').write_text('{}')
    (sd/'tokenizer'/'tokenizer_config.json').write_text(json.dumps(dict(tokenizer_class='CLIPTokenizer', model_max_length=77, bos_token='<|startoftext|>',
        eos_token='<|endoftext|>', unk_token='<|endoftext|>', pad_token='<|endoftext|>', add_prefix_space=False, do_lower_case=True)))
    dummy_motion_adapter(seed).save_pretrained(folder/'motion')
    for name in ('sd/unet/diffusion_pytorch_model.bin', 'sd/v1-5-pruned.ckpt', 'motion/diffusion_pytorch_model.fp16.safetensors'):
        (folder/name).write_bytes(b'not to be opened')
    return folder
