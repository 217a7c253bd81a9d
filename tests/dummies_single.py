"A Stable Diffusion in one file, as they are passed around: the original's names for the weights of `dummies.dummy_components`."
import re

from safetensors.torch import save_file

RES = dict(norm1='in_layers.0', conv1='in_layers.2', time_emb_proj='emb_layers.1', norm2='out_layers.0', conv2='out_layers.3', conv_shortcut='skip_connection')
TOP = {'conv_in': 'input_blocks.0.0', 'conv_norm_out': 'out.0', 'conv_out': 'out.2', 'time_embedding.linear_1': 'time_embed.0', 'time_embedding.linear_2': 'time_embed.2'}


def unet_name(k, layers, attends):
    "`layers` a block; `attends(i)`: whether up block i has attention."
    if m := re.match(r'(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)', k):
        way, i, what, j, rest = m[1], int(m[2]), m[3], int(m[4]), m[5]
        at = f'input_blocks.{1 + i*(layers+1) + (layers if what == "downsamplers" else j)}' if way == 'down' else f'output_blocks.{i*(layers+1) + (layers if what == "upsamplers" else j)}'
        if what == 'downsamplers': return f'{at}.0.op.{rest.removeprefix("conv.")}'
        if what == 'upsamplers': return f'{at}.{1 + attends(i)}.{rest}'
        return f'{at}.1.{rest}' if what == 'attentions' else f'{at}.0.{_res(rest)}'
    if m := re.match(r'mid_block\.(resnets|attentions)\.(\d+)\.(.*)', k): return f'middle_block.1.{m[3]}' if m[1] == 'attentions' else f'middle_block.{2*int(m[2])}.{_res(m[3])}'
    return next(k.replace(a, b, 1) for a, b in TOP.items() if k.startswith(a + '.'))

def _res(rest): part, _, leaf = rest.partition('.'); return f'{RES[part]}.{leaf}'

def vae_name(k, levels):
    k = k.replace('mid_block.attentions.0', 'mid.attn_1').replace('conv_norm_out', 'norm_out').replace('conv_shortcut', 'nin_shortcut')
    k = re.sub(r'mid_block\.resnets\.(\d)', lambda m: f'mid.block_{int(m[1])+1}', k)
    k = re.sub(r'down_blocks\.(\d+)\.', r'down.\1.', k); k = re.sub(r'up_blocks\.(\d+)\.', lambda m: f'up.{levels-1-int(m[1])}.', k)
    k = k.replace('resnets.', 'block.').replace('downsamplers.0', 'downsample').replace('upsamplers.0', 'upsample')
    for a, b in (('group_norm', 'norm'), ('to_q', 'q'), ('to_k', 'k'), ('to_v', 'v'), ('to_out.0', 'proj_out')): k = k.replace(f'attn_1.{a}.', f'attn_1.{b}.')
    return k


def make_single_file(path, vae, text_encoder, unet, **_):
    "Write the three in one file, in half precision as usual."
    attends = [hasattr(b, 'attentions') for b in unet.up_blocks]
    out = {'model.diffusion_model.' + unet_name(k, unet.config.layers_per_block, attends.__getitem__): v for k, v in unet.state_dict().items()}
    for k, v in vae.state_dict().items():
        name = vae_name(k, len(vae.config.block_out_channels))
        out['first_stage_model.' + name] = v[..., None, None] if 'attn_1' in name and v.ndim == 2 else v
    for k, v in text_encoder.state_dict().items(): out['cond_stage_model.transformer.' + (k if k.startswith('text_model.') else f'text_model.{k}')] = v
    save_file({k: v.half().contiguous() for k, v in out.items()}, path)
    return path
