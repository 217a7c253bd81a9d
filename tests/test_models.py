import json
import shutil
import sys

import numpy as np
import pytest
import torch

from cmvc_nb.errors import CmvcError
from cmvc_nb.models import Preset, list_presets, load_models, load_preset, part_folder, pick_device
from dummies_models import make_dummy_clip, make_dummy_preset, make_sd15_layout


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_dummy_preset(tmp_path_factory.mktemp('preset')).parent


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path/'copy')


def frames(n=5, h=48, w=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), dtype=np.uint8)


def test_listing_needs_no_torch():
    import subprocess
    code = "import sys; from cmvc_nb.models import list_presets; assert {'tiny', 'sd15'} <= {p.name for p in list_presets()}; assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('preset', list_presets(), ids=lambda p: p.name)
def test_embedded_pages_are_complete(preset):
    assert set(preset.licences) >= set(preset.parts) and preset.about and preset.good_for and preset.memory
    assert {'steps', 'lora_steps', 'strength', 'guidance_scale'} <= set(preset.settings)
    assert preset.size % 64 == 0


def test_four_ways_to_a_preset(folder, tmp_path):
    by_folder, by_file = load_preset(folder), load_preset(folder/'preset.yaml')
    assert by_folder == by_file == load_preset(by_file) and by_folder.fingerprint() == by_file.fingerprint()
    assert load_preset('sd15').parts['diffusion'] == 'stable-diffusion-v1-5/stable-diffusion-v1-5'
    assert load_preset('someone/some-model').parts['diffusion'] == 'someone/some-model'


def test_a_bare_diffusers_folder_is_a_preset(copy):
    (copy/'preset.yaml').unlink()
    p = load_preset(copy)
    assert {'diffusion', 'motion_adapter', 'clip'} <= set(p.parts) and part_folder(p, 'motion_adapter') == copy/'motion_adapter'


@pytest.mark.parametrize('text', ['', '- a', 'name: x', 'name: x\nparts: y', 'name: x\nparts: {clip: a}', 'name: x\nparts: {diffusion: a}\nsteps: 3', 'a: [', 'a: \t', 'name: x\nversion: 2024-13-45', '[' * 3000,
    *('name: x\nparts: {diffusion: a}\n' + k for k in ('size: abc', 'size: 0', 'size: null', 'settings: [1]', 'settings: {steps: many}', 'tt2v: null', 'it2v: x', 'memory: 8', 'licences: [1]', 'config: 3')),
    'name: x\nparts: {diffusion: 5}', 'name: [a]\nparts: {diffusion: a}'])
def test_bad_pages(tmp_path, text):
    (tmp_path/'p.yaml').write_text(text)
    with pytest.raises(CmvcError, match='p.yaml'): load_preset(tmp_path/'p.yaml')


@pytest.mark.parametrize('name', ['nothing', './no/where', 'a/b/c', '', 'none.yaml'])
def test_unknown_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CmvcError): load_preset(name)


def test_fingerprint_follows_the_decoder(folder, copy):
    one = load_preset(folder).fingerprint()
    assert len(one) == 4 and load_preset(copy).fingerprint() == one      # wherever it lies
    clip = copy/'clip'/'open_clip_model.safetensors'
    clip.write_bytes(clip.read_bytes() + b' ')
    assert load_preset(copy).fingerprint() == one                        # CLIP is the encoder's
    for at in ('unet/diffusion_pytorch_model.safetensors', 'motion_adapter/config.json', 'scheduler/scheduler_config.json', 'tokenizer/tokenizer.json'):
        old = (copy/at).read_bytes()
        (copy/at).write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
        assert load_preset(copy).fingerprint() != one, at
        (copy/at).write_bytes(old)
    assert load_preset(copy).fingerprint() == one
    p = load_preset(copy)
    p.tt2v = {**p.tt2v, 'share': .25}
    assert p.fingerprint() != one                                         # options change the frames too


def test_fingerprint_is_read_once(folder, monkeypatch):
    one = load_preset(folder).fingerprint()
    monkeypatch.setattr('hashlib.file_digest', lambda *a: 1/0)
    assert load_preset(folder).fingerprint() == one


def test_everything_loads_by_one_road(folder, capsys):
    m = load_models(folder, 'cpu')
    m.describer, m.tt2v, m.it2v
    assert capsys.readouterr().err == 'cmvc: computing on cpu in float32\n'    # once, when the first weights load
    assert m.tt2v.pipe.unet.dtype == torch.float32 and not m.tt2v.pipe.unet.training
    assert m.describer.describe_keyframes(frames(1))[0]
    assert type(m.it2v).__name__ == 'DualLoRAPipeline' and m.it2v.unet is not m.tt2v.image_unet     # LoRAs of one never reach the other
    names = dict(m.tt2v.image_unet.named_parameters())
    shared = [n for n, p in m.tt2v.pipe.unet.named_parameters() if n in names and p.data_ptr() == names[n].data_ptr()]
    assert set(shared) == set(names)                                      # one copy of the image weights


def test_models_are_lazy(copy):
    shutil.rmtree(copy/'clip')
    m = load_models(copy, 'cpu')
    m.tt2v
    with pytest.raises(CmvcError, match='clip'): m.clip_embed(frames())


def test_half_precision_files_load_as_float32(folder, copy):
    from safetensors.torch import load_file, save_file
    at = copy/'unet'/'diffusion_pytorch_model.safetensors'
    save_file({k: v.half() for k, v in load_file(at).items()}, at, metadata={'format': 'pt'})
    unet = load_models(copy, 'cpu').tt2v.image_unet
    assert unet.dtype == torch.float32
    ref = load_models(folder, 'cpu').tt2v.image_unet
    assert 0 < max((a - b).abs().max() for a, b in zip(unet.parameters(), ref.parameters())) < 1e-3


def test_autoencoder_kl_loads_too(tmp_path):
    from dummies import make_dummy_sd
    make_dummy_preset(tmp_path)
    make_dummy_sd(tmp_path, vae='kl')
    assert load_models(tmp_path, 'cpu').tt2v.generate(('a', 'b'), 'c', 3, 16, 16, steps=1).shape == (3, 16, 16, 3)


@pytest.mark.parametrize('mode,h,w', [('squash', 48, 64), ('shortest', 48, 80), ('shortest', 31, 30), ('longest', 40, 64)])
def test_clip_matches_open_clips_own_preprocessing(tmp_path, mode, h, w):
    import open_clip
    from PIL import Image
    m = load_models(make_dummy_preset(tmp_path), 'cpu')
    make_dummy_clip(tmp_path/'clip', resize_mode=mode, fill_color=128)
    x = np.kron(frames(3, h//4 + 1, w//4 + 1), np.ones((1, 4, 4, 1), np.uint8))[:, :h, :w]     # smooth enough for two resamplers to agree
    model, _, pre = open_clip.create_model_and_transforms(f'local-dir:{tmp_path}/clip')
    with torch.no_grad(): ref = model.eval().encode_image(torch.stack([pre(Image.fromarray(f)) for f in x]), normalize=True).numpy()
    got = m.clip_embed(x)
    assert got.shape == ref.shape and got.dtype == np.float32 and (got*ref).sum(1).min() > .999
    assert np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)


def test_clip_batches_do_not_matter(folder):
    m, x = load_models(folder, 'cpu'), frames(7)
    assert np.allclose(m.clip_embed(x), m.clip_embed(x, batch_size=2), atol=1e-5)
    assert m.clip_embed(x[:0]).shape == (0, 16)
    for bad in (x[0], x.astype(np.float32), x[..., :1], None):
        with pytest.raises(CmvcError): m.clip_embed(bad)


@pytest.mark.parametrize('damage,word', [
    (lambda d: (d/'model_index.json').write_text('{"_class_name": "FluxPipeline"}'), 'StableDiffusionPipeline'),
    (lambda d: (d/'model_index.json').write_text('[]'), 'StableDiffusionPipeline'),
    (lambda d: (d/'model_index.json').write_text('{'), 'JSON'),
    (lambda d: (d/'model_index.json').unlink(), 'model_index.json'),
    (lambda d: (d/'unet'/'diffusion_pytorch_model.safetensors').rename(d/'unet'/'diffusion_pytorch_model.bin'), 'pickle'),
    (lambda d: (d/'text_encoder'/'model.safetensors').unlink(), 'safetensors'),
    (lambda d: (d/'unet'/'diffusion_pytorch_model.safetensors').write_bytes(b'x'*100), 'damaged'),
    (lambda d: (d/'unet'/'config.json').write_text('{}'), 'damaged|expected'),
    (lambda d: shutil.rmtree(d/'motion_adapter'), 'motion_adapter'),
    (lambda d: shutil.rmtree(d/'vae'), 'safetensors|vae'),
    (lambda d: shutil.rmtree(d/'tokenizer'), 'tokenizer is missing'),
    (lambda d: (d/'tokenizer'/'tokenizer.json').unlink(), 'tokenizer.json'),
    (lambda d: (d/'scheduler'/'scheduler_config.json').unlink(), 'scheduler_config.json'),
])
def test_wrong_folders_say_what_is_wrong(copy, damage, word):
    damage(copy)
    with pytest.raises(CmvcError, match=word) as e: load_models(copy/'preset.yaml', 'cpu').tt2v
    assert '\n' not in str(e.value) and len(str(e.value)) < 900


def test_clip_without_weights_is_not_random(copy):
    (copy/'clip'/'open_clip_model.safetensors').rename(copy/'clip'/'open_clip_pytorch_model.bin')
    with pytest.raises(CmvcError, match='pickle'): load_models(copy, 'cpu').clip


def test_stable_diffusion_15_loads_by_its_preset(tmp_path, monkeypatch):
    "The page sd15, the hub's layout and names; only the download is replaced by a copy of what the patterns ask for."
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects
    make_sd15_layout(tmp_path)
    def download(repo, allow_patterns, ignore_patterns, **kwargs):
        at = tmp_path/{'stable-diffusion-v1-5/stable-diffusion-v1-5': 'sd', 'guoyww/animatediff-motion-adapter-v1-5-2': 'motion'}[repo]
        names = [str(p.relative_to(at)) for p in at.rglob('*') if p.is_file()]
        for n in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (to := tmp_path/'cache'/at.name/n).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(at/n, to)
        return str(tmp_path/'cache'/at.name)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    m = load_models('sd15', 'cpu')
    assert m.tt2v.generate(('a', 'b'), 'c', 3, 16, 16, steps=2).shape == (3, 16, 16, 3)
    assert m.tt2v.pipe.scheduler.config.beta_schedule == 'linear' and m.tt2v.pipe.scheduler.config.prediction_type == 'epsilon'
    assert len(load_preset('sd15').fingerprint()) == 4
    assert m.it2v.multiple % 8 == 0 and m.it2v.unet.dtype == torch.float32
    got = [p.name for p in (tmp_path/'cache').rglob('*') if p.is_file()]
    assert not [n for n in got if n.endswith(('.bin', '.ckpt')) or 'fp16' in n] and 'vocab.json' in got and 'merges.txt' in got


@pytest.mark.parametrize('error', [OSError('no network'), ValueError('bad'), RuntimeError('x\ny'), Exception()])
def test_a_failed_download_says_what_to_do(monkeypatch, error):
    import huggingface_hub
    def download(*args, **kwargs): raise error
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    with pytest.raises(CmvcError, match='some/sd.*network.*local folder') as e: load_models('some/sd', 'cpu').it2v
    assert '\n' not in str(e.value)


def test_devices(capsys):
    assert pick_device('cpu') == pick_device('cpu', 'float32') == (torch.device('cpu'), torch.float32)
    assert capsys.readouterr().err == ''
    assert pick_device('cpu', 'bf16')[1] == pick_device('cpu', torch.bfloat16)[1] == torch.bfloat16
    for bad in (('cuda:99',), ('quantum',), ('cpu', 'int3')):
        with pytest.raises(CmvcError): pick_device(*bad)


def test_a_describer_that_is_not_there(copy):
    p = load_preset(copy)
    p.parts['describer'] = 'video-llava'
    with pytest.raises(CmvcError, match='describer'): load_models(p, 'cpu').describer


def test_offload(folder, monkeypatch):
    "diffusers' own switches are thrown, on a GPU only; chosen where the page asks for more memory than there is."
    from types import SimpleNamespace
    from cmvc_nb import models
    gpu, p = SimpleNamespace(type='cuda'), load_preset(folder)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda d: SimpleNamespace(total_memory=8e9))
    for memory, want in (('24 GB', 'model'), ('6 GB', 'none'), ('12.5 GB of VRAM', 'model'), ('', 'none')):
        p.memory = memory
        assert models.pick_offload(p, gpu) == want and models.pick_offload(p, gpu, 'sequential') == 'sequential'
    assert models.pick_offload(p, torch.device('cpu')) == 'none'
    for bad in (('cpu', 'model'), ('cpu', 'disk')):
        with pytest.raises(CmvcError, match='offload'): load_models(folder, bad[0], offload=bad[1])
    thrown = []
    pipe = SimpleNamespace(enable_model_cpu_offload=lambda device: thrown.append(('model', device)), enable_sequential_cpu_offload=lambda device: thrown.append(('sequential', device)), to=lambda d: thrown.append(('to', d)))
    wrap = SimpleNamespace(pipe=pipe, offloads=True, to=lambda d: thrown.append(('wrap', d)))
    for part, how in ((pipe, 'model'), (pipe, 'sequential'), (wrap, 'model'), (wrap, 'none'), (SimpleNamespace(pipe=pipe, to=lambda d: thrown.append(('wrap', d))), 'model')): models._place(part, 'gpu', how)
    assert thrown == [('model', 'gpu'), ('sequential', 'gpu'), ('model', 'gpu'), ('wrap', 'gpu'), ('wrap', 'gpu')]


def test_a_part_in_place_of_the_presets(folder, tmp_path, monkeypatch):
    from dummies import make_dummy_sd
    make_dummy_sd(tmp_path/'other', seed=5); monkeypatch.chdir(tmp_path)
    a, b = load_models(folder, 'cpu'), load_models(folder, 'cpu', parts={'diffusion': 'other'})
    assert part_folder(b.preset, 'diffusion') == tmp_path/'other' and b.preset.fingerprint() != a.preset.fingerprint() and load_preset(folder).parts['diffusion'] == '.'
    with pytest.raises(CmvcError, match="part 'colour'"): load_models(folder, 'cpu', parts={'colour': 'x'})
