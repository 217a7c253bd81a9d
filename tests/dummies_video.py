"""diffusers' whole-video pipelines of a few channels, saved in the published layouts."""
import json
from pathlib import Path

from dummies import _seeded, dummy_scheduler, dummy_text_encoder, dummy_tokenizer, dummy_vae


def dummy_t5_tokenizer(length=512):
    "T5Tokenizer over single letters, digits and punctuation."
    from transformers import T5Tokenizer
    pieces = ['▁'] + [chr(c) for c in range(33, 127)]
    return T5Tokenizer(vocab=[('<pad>', 0.), ('</s>', 0.), ('<unk>', 0.)] + [(p, -2.) for p in pieces], extra_ids=0, model_max_length=length)


def dummy_t5(tokenizer, kind='T5', seed=0, width=16):
    "T5EncoderModel (kind 'T5') or UMT5EncoderModel ('UMT5'), one layer."
    import transformers
    config = getattr(transformers, f'{kind}Config')(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2*width, num_layers=1, num_heads=2, feed_forward_proj='gated-gelu')
    return _seeded(seed, lambda: getattr(transformers, f'{kind}EncoderModel')(config))


def _louder(model, by=3.):
    "Untrained layers hardly speak: let what the model says outweigh its noise, and let it listen to the text."
    for n, p in model.named_parameters():
        if n.endswith('weight') and any(s in n for s in ('proj_out', 'proj_in', 'patch_embedding', 'text_embedder', 'text_proj', 'caption_projection', 'attn2.to_v', 'attn2.to_out')): p.mul_(by)
    return model


def _wan_vae(seed):
    from diffusers import AutoencoderKLWan
    return _seeded(seed, lambda: AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.]*4, latents_std=[1.]*4))


def _wan_transformer(seed, channels, **options):
    from diffusers import WanTransformer3DModel
    return _louder(_seeded(seed, lambda: WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, in_channels=channels, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
                                                               num_layers=1, rope_max_seq_len=64, **options)))


def _wan_scheduler():
    from diffusers import UniPCMultistepScheduler
    return UniPCMultistepScheduler(prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=3.)


def wan(seed=0, expand_timesteps=False):
    "WanPipeline as Wan2.1-T2V-1.3B-Diffusers: 4k+1 frames, multiples of 16; with `expand_timesteps` as Wan2.2-TI2V-5B-Diffusers, which takes a first picture too."
    from diffusers import WanPipeline
    t = dummy_t5_tokenizer()
    return WanPipeline(tokenizer=t, text_encoder=dummy_t5(t, 'UMT5', seed), vae=_wan_vae(seed), scheduler=_wan_scheduler(), transformer=_wan_transformer(seed, 4), expand_timesteps=expand_timesteps)


def wan_ti2v(seed=0): return wan(seed, True)


def wan_ends(seed=0):
    "WanImageToVideoPipeline as Wan2.1-FLF2V-14B-720P-diffusers: first and last picture, both seen by a CLIP too."
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel
    t = dummy_t5_tokenizer()
    eye = CLIPVisionConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8, projection_dim=8)
    return WanImageToVideoPipeline(tokenizer=t, text_encoder=dummy_t5(t, 'UMT5', seed), vae=_wan_vae(seed), scheduler=_wan_scheduler(),
        transformer=_wan_transformer(seed, 12, image_dim=8, added_kv_proj_dim=24, pos_embed_seq_len=2*5), image_encoder=_seeded(seed, lambda: CLIPVisionModel(eye)),
        image_processor=CLIPImageProcessor(size=dict(height=16, width=16), crop_size=dict(height=16, width=16)))


def wan_vace(seed=0):
    "WanVACEPipeline as Wan2.1-VACE-1.3B-diffusers: a whole clip, grey where it is to be made, and a mask."
    from diffusers import WanVACEPipeline, WanVACETransformer3DModel
    t = dummy_t5_tokenizer()
    transformer = _louder(_seeded(seed, lambda: WanVACETransformer3DModel(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
                                                                          num_layers=1, rope_max_seq_len=64, vace_layers=[0], vace_in_channels=2*4 + 64)))
    transformer.vace_patch_embedding.weight.mul_(30) # an untrained autoencoder's latents are small
    return WanVACEPipeline(tokenizer=t, text_encoder=dummy_t5(t, 'UMT5', seed), vae=_wan_vae(seed), scheduler=_wan_scheduler(), transformer=transformer)


def _cog_parts(seed, channels):
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
    t = dummy_t5_tokenizer()
    vae = _seeded(seed, lambda: AutoencoderKLCogVideoX(block_out_channels=(4, 4, 4, 4), down_block_types=('CogVideoXDownBlock3D',)*4, up_block_types=('CogVideoXUpBlock3D',)*4,
                                                       latent_channels=4, layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4))
    transformer = _louder(_seeded(seed, lambda: CogVideoXTransformer3DModel(num_attention_heads=2, attention_head_dim=16, in_channels=channels, out_channels=4, time_embed_dim=8, text_embed_dim=16,
        num_layers=1, sample_width=8, sample_height=8, sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=32)))
    return dict(tokenizer=t, text_encoder=dummy_t5(t, 'T5', seed), vae=vae, transformer=transformer,
                scheduler=CogVideoXDDIMScheduler(prediction_type='v_prediction', rescale_betas_zero_snr=True, timestep_spacing='trailing', beta_start=.00085, beta_end=.012,
                                                 beta_schedule='scaled_linear', snr_shift_scale=3., clip_sample=False, set_alpha_to_one=True))


def cog(seed=0):
    "CogVideoXPipeline as CogVideoX-2b: 4k+1 frames, and 32 tokens where that has 226."
    from diffusers import CogVideoXPipeline
    return CogVideoXPipeline(**_cog_parts(seed, 4))


def cog_first(seed=0):
    "CogVideoXImageToVideoPipeline: a first picture only."
    from diffusers import CogVideoXImageToVideoPipeline
    return CogVideoXImageToVideoPipeline(**_cog_parts(seed, 8))


def ltx(seed=0, name='LTXPipeline'):
    "LTXPipeline as LTX-Video: 8k+1 frames, multiples of 32; its image-to-video pipelines load from the same folder."
    import diffusers
    from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel
    t = dummy_t5_tokenizer(128)
    vae = _seeded(seed, lambda: AutoencoderKLLTXVideo(latent_channels=4, block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(4, 4, 4, 4), layers_per_block=(1,)*5,
                                                      decoder_layers_per_block=(1,)*5))
    transformer = _louder(_seeded(seed, lambda: LTXVideoTransformer3DModel(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=1,
                                                                           caption_channels=16)))
    return getattr(diffusers, name)(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=.1), vae=vae, text_encoder=dummy_t5(t, 'T5', seed), tokenizer=t,
                                    transformer=transformer)


def modelscope(seed=0):
    "TextToVideoSDPipeline as text-to-video-ms-1.7b: any number of frames, 77 tokens, multiples of 8."
    from diffusers import TextToVideoSDPipeline, UNet3DConditionModel
    t = dummy_tokenizer()
    unet = _louder(_seeded(seed, lambda: UNet3DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, down_block_types=('CrossAttnDownBlock3D', 'DownBlock3D'),
        up_block_types=('UpBlock3D', 'CrossAttnUpBlock3D'), cross_attention_dim=16, attention_head_dim=4, norm_num_groups=2)), 2.)
    return TextToVideoSDPipeline(vae=dummy_vae(seed, 'kl'), text_encoder=dummy_text_encoder(t, seed), tokenizer=t, unet=unet, scheduler=dummy_scheduler('epsilon'))


def save(make, folder, seed=0, **options):
    "Save what `make` makes; the folder."
    make(seed, **options).save_pretrained(Path(folder))
    return Path(folder)
