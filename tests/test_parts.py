"Parts on the disk and on a hub that a test pretends: what is fetched, what is refused, what each failure says."
import json, shutil
from pathlib import Path
import pytest, yaml
from cmvc_nb.errors import CmvcError
from cmvc_nb.models import Preset, list_presets, load_models, load_preset
from cmvc_nb.parts import ROLES, components, is_hub_id, part_folder, part_state, pull
from dummies_models import make_dummy_clip, make_dummy_preset, make_sd15_layout


@pytest.fixture
def folder(tmp_path): return make_dummy_preset(tmp_path/'p').parent

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A hub whose cache is a folder: owner--name. `fails` raises instead; `asked` lists what was asked for."
    import huggingface_hub
    class Hub: root, fails, asked, here = tmp_path/'hub', None, [], set()
    def snapshot(repo, allow_patterns=None, ignore_patterns=None, local_files_only=False):
        Hub.asked.append((repo, local_files_only))
        at = Hub.root/repo.replace('/', '--')
        if local_files_only and repo not in Hub.here: raise FileNotFoundError('not in the cache')
        if Hub.fails: raise Hub.fails
        if not at.is_dir(): raise OSError('404: no such repository')
        Hub.here.add(repo)
        return str(at)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', lambda repo, name, local_files_only=False: str(Path(snapshot(repo, local_files_only=local_files_only))/name))
    Hub.root.mkdir()
    return Hub


@pytest.mark.parametrize('name,is_one', [('a/b', True), ('a/b/c.safetensors', True), ('a/b/c', False), ('./a/b', False), ('/a/b', False), ('~/a', False), ('a', False), ('', False), ('../b', False)])
def test_hub_ids(name, is_one): assert is_hub_id(name) == is_one

def test_pull_and_state(hub, tmp_path):
    make_sd15_layout(tmp_path/'made'); shutil.move(tmp_path/'made'/'sd', hub.root/'x--sd'); shutil.move(tmp_path/'made'/'motion', hub.root/'x--motion')
    p = Preset('mine', dict(diffusion='x/sd', motion_adapter='x/motion', describer='measuring'))
    assert [part_state(p, r) for r in p.parts] == [('not downloaded', 0), ('not downloaded', 0), ('embedded', 0)] and all(local for _, local in hub.asked)
    told = []
    assert pull(p, lambda *a: told.append(a)) == dict(told) == {'diffusion': hub.root/'x--sd', 'motion_adapter': hub.root/'x--motion'}
    state, size = part_state(p, 'diffusion')
    assert state == 'on disk' and 0 < size < sum(f.stat().st_size for f in (hub.root/'x--sd').rglob('*') if f.is_file()) # the checkpoint beside the folders does not count
    assert load_models(p, 'cpu').tt2v.pipe

@pytest.mark.parametrize('error', [OSError('403 Client Error: gated'), ConnectionError('Name or service not known'), OSError(28, 'No space left on device'), RuntimeError('the connection was cut\nafter 3 GB')])
def test_a_download_that_fails_says_what_to_do(hub, error):
    hub.fails = error
    with pytest.raises(CmvcError, match="cannot download diffusion 'x/sd'.*what has arrived is kept.*hf auth login.*local folder") as e: part_folder(Preset('mine', {'diffusion': 'x/sd'}), 'diffusion')
    assert '\n' not in str(e.value)

def test_a_motion_adapter_in_one_file(folder, hub, tmp_path, monkeypatch):
    "As AnimateDiff-Lightning is published: a file with the names of a MotionAdapter, whose configuration is the usual one."
    import diffusers
    from dummies_models import dummy_motion_adapter
    made = dummy_motion_adapter(0); usual = dict(made.config)
    (hub.root/'x--fast').mkdir(); shutil.copy(folder/'motion_adapter'/'diffusion_pytorch_model.safetensors', hub.root/'x--fast'/'four.safetensors')
    page = yaml.safe_load((folder/'preset.yaml').read_text()); page['parts']['motion_adapter'] = 'x/fast/four.safetensors'
    (folder/'preset.yaml').write_text(yaml.safe_dump(page))
    whole = diffusers.MotionAdapter
    class Usual(whole):
        def __new__(cls): return whole(**{k: v for k, v in usual.items() if not k.startswith('_')})
    monkeypatch.setattr(diffusers, 'MotionAdapter', Usual)
    a = load_models(folder, 'cpu').tt2v.pipe.unet.state_dict()
    monkeypatch.setattr(diffusers, 'MotionAdapter', whole)
    page['parts']['motion_adapter'] = 'motion_adapter'; (folder/'preset.yaml').write_text(yaml.safe_dump(page))
    b = load_models(folder, 'cpu').tt2v.pipe.unet.state_dict()
    assert any('motion' in k for k in a) and all((a[k] == b[k]).all() for k in b)

def test_clip_by_open_clips_name(hub, monkeypatch):
    "Model and tag become the hub id where their safetensors are; a tag that is only a pickle somewhere is refused."
    import open_clip
    make_dummy_clip(hub.root/'timm--vit')
    monkeypatch.setattr(open_clip, 'get_pretrained_cfg', lambda m, t: {('ViT-X', 'tag'): dict(hf_hub='timm/vit/'), ('ViT-X', 'old'): dict(url='https://somewhere/x.pt')}.get((m, t)))
    p = lambda name: Preset('mine', dict(diffusion='x/sd', clip=name))
    assert part_folder(p('ViT-X:tag'), 'clip') == hub.root/'timm--vit'
    for name in ('ViT-X:old', 'ViT-X:none'):
        with pytest.raises(CmvcError, match='open_clip knows no weights'): part_folder(p(name), 'clip')

def test_real_names_of_open_clip_have_safetensors_on_the_hub():
    import open_clip
    for model, tag in (('ViT-B-32', 'laion2b_s34b_b79k'), ('ViT-B-32', 'openai'), ('ViT-L-14', 'openai')): assert '/' in open_clip.get_pretrained_cfg(model, tag)['hf_hub']

@pytest.mark.parametrize('role', ['text_to_video', 'image_to_video'])
def test_layout_of_whole_pipelines(tmp_path, role, monkeypatch):
    d = tmp_path/'v'; p = Preset('mine', {role: str(d)})
    for sub in ('transformer', 'tokenizer', 'scheduler', 'image_processor'): (d/sub).mkdir(parents=True)
    (d/'model_index.json').write_text(json.dumps(dict(_class_name='SomePipeline', transformer=['diffusers', 'X'], tokenizer=['transformers', 'Y'], scheduler=['diffusers', 'Z'], image_processor=['transformers', 'W'], none=[None, None])))
    (d/'scheduler'/'scheduler_config.json').write_text('{}'); (d/'tokenizer'/'spiece.model').write_bytes(b'x'); (d/'transformer'/'config.json').write_text('{}'); (d/'image_processor'/'preprocessor_config.json').write_text('{}')
    import transformers.utils
    monkeypatch.setattr(transformers.utils, 'is_sentencepiece_available', lambda: True); monkeypatch.setattr(transformers.utils, 'is_protobuf_available', lambda: True)
    with pytest.raises(CmvcError, match='no safetensors in .*transformer'): part_folder(p, role)
    (d/'transformer'/'diffusion_pytorch_model.bin').write_bytes(b'x')
    with pytest.raises(CmvcError, match='pickle, which is never opened'): part_folder(p, role)
    (d/'transformer'/'diffusion_pytorch_model-00001-of-00002.safetensors').write_bytes(b'x')
    assert part_folder(p, role) == d and components(d, role) == ['image_processor', 'scheduler', 'tokenizer', 'transformer']
    one = p.fingerprint(); (d/'transformer'/'diffusion_pytorch_model-00001-of-00002.safetensors').write_bytes(b'y')
    assert Preset('mine', {role: str(d)}).fingerprint() != one
    (d/'model_index.json').write_text('{"a": 1}')
    with pytest.raises(CmvcError, match='_class_name'): part_folder(p, role)

def test_every_role_has_a_layout_and_no_preset_another_role():
    for p in list_presets(): assert set(p.parts) <= set(ROLES)
    with pytest.raises(CmvcError, match='has no describer'): part_folder(Preset('x', {'diffusion': 'a/b'}), 'describer')

def test_pages_with_unknown_roles(tmp_path):
    for parts in ('{diffusion: a, colour: b}', '{clip: a}', '{motion_adapter: a, describer: b}'):
        (tmp_path/'p.yaml').write_text(f'name: x\nparts: {parts}')
        with pytest.raises(CmvcError, match='p.yaml.*text_to_video'): load_preset(tmp_path/'p.yaml')

@pytest.mark.parametrize('error', [MemoryError(), RuntimeError('[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate memory')])
def test_too_little_memory_is_not_called_damage(folder, error, monkeypatch):
    from diffusers import StableDiffusionPipeline
    def fail(*a, **k): raise error
    monkeypatch.setattr(StableDiffusionPipeline, 'from_pretrained', fail)
    with pytest.raises(CmvcError, match='not enough memory to load diffusion'): load_models(folder, 'cpu').tt2v


# ---- one file

@pytest.fixture
def single(tmp_path, monkeypatch):
    from dummies import dummy_components, make_dummy_sd
    from dummies_single import make_single_file
    monkeypatch.setenv('CMVC_CACHE', str(tmp_path/'cache'))
    parts = dummy_components(3, 'epsilon', 'kl')
    make_dummy_sd(tmp_path/'config', 7, 'epsilon', 'kl') # other weights: only its configurations count
    for f in (tmp_path/'config').rglob('*.safetensors'): f.unlink()
    return make_single_file(tmp_path/'mine.safetensors', **parts), tmp_path/'config', parts

def test_a_model_in_one_file(single, tmp_path):
    file, config, parts = single
    (tmp_path/'p.yaml').write_text(f'name: one\nparts: {{diffusion: mine.safetensors}}\nconfig: config\nsettings: {{steps: 2, lora_steps: 2, strength: 0.5, guidance_scale: 1.0}}\nsize: 64')
    m = load_models(tmp_path/'p.yaml', 'cpu'); at = part_folder(m.preset, 'diffusion')
    assert at.parent == tmp_path/'cache'/'imported' and (at/'unet/diffusion_pytorch_model.safetensors').exists()
    for name in ('unet', 'vae', 'text_encoder'):
        have, want = getattr(m.it2v, name).state_dict(), parts[name].state_dict()
        assert set(want) <= set(have) and all((have[k] - want[k]).abs().max() <= 1e-3*max(1, want[k].abs().max()) for k in want), name
    stamp = (at/'model_index.json').stat().st_mtime_ns
    assert part_folder(load_preset(tmp_path/'p.yaml'), 'diffusion') == at and (at/'model_index.json').stat().st_mtime_ns == stamp # once
    assert m.preset.fingerprint() == load_preset(tmp_path/'p.yaml').fingerprint()

def test_a_single_file_is_a_preset(single, hub):
    file, config, _ = single
    shutil.copytree(config, hub.root/'stable-diffusion-v1-5--stable-diffusion-v1-5')
    p = load_preset(file)
    assert p.name == 'mine' and (part_folder(p, 'diffusion')/'vae/config.json').exists() and hub.asked[-1][0] == 'stable-diffusion-v1-5/stable-diffusion-v1-5'

def test_files_that_hold_no_model(single, tmp_path):
    from safetensors.torch import save_file
    import torch
    file, config, _ = single
    for name, make in (('noise', lambda f: f.write_bytes(b'x'*99)), ('lora', lambda f: save_file({'lora_up.weight': torch.zeros(2, 2)}, f))):
        bad = tmp_path/f'{name}.safetensors'; make(bad)
        with pytest.raises(CmvcError, match=f'{name}.safetensors: cannot be taken apart') as e: part_folder(Preset('x', {'diffusion': str(bad)}, config=str(config)), 'diffusion')
        assert '\n' not in str(e.value) and not list((tmp_path/'cache').rglob('*.tmp'))
