"""Whole-video pipelines of diffusers behind `TextToVideo`: real classes of a few channels, saved as they are published and loaded as a user loads them."""
import json
import shutil
import types
import warnings

import numpy as np
import pytest
import torch

import dummies_video
from cmvc_nb.codec import Codec
from cmvc_nb.errors import CmvcError
from cmvc_nb.models import load_models
from cmvc_nb.pipelines import PromptPipeline, VideoPipeline, check_generator, legal_length, pipeline_class, pipeline_parts, put_ends, resample
from dummies import moving_disc
from dummies_models import make_dummy_preset

A, B, C, M = 'a red sky', 'a green field', 'a blue sea', 'pans left'
PRESETS = dict( # the presets' `tt2v`, in small
    modelscope=dict(frames=8, multiple=8, scheduler=dict(name='DPMSolverMultistepScheduler')),
    wan=dict(frames=17, stride=4, multiple=16, float32=['vae'], scheduler=dict(flow_shift=3.), call=dict(negative_prompt='blurred')),
    cog=dict(frames=17, stride=8, least=10, multiple=16, call=dict(max_sequence_length=32)),
    ltx=dict(frames=17, stride=8, multiple=32, call=dict(max_sequence_length=64)))


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp('video')
    return {n: dummies_video.save(getattr(dummies_video, n), top/n) for n in PRESETS}


@pytest.fixture(scope='module')
def loaded(folders): return {n: PromptPipeline.from_pretrained(folders[n], torch_dtype=torch.float32, use_safetensors=True, local_files_only=True, **o).to('cpu') for n, o in PRESETS.items()}


@pytest.fixture(params=PRESETS)
def tv(request, loaded): return loaded[request.param]


def make(tv, ends=(A, B), motion=M, n=5, h=64, w=64, **kwargs): return tv.generate(ends, motion, n, h, w, **{'steps': 2, **kwargs})


def seen(tv, monkeypatch):
    "The arguments of every call of the pipeline from now on."
    calls, pipe = [], tv.pipe
    class Spy:
        def __getattr__(self, k): return getattr(pipe, k)
        def __call__(self, **args): calls.append(args); return pipe(**args)
    monkeypatch.setattr(tv, 'pipe', Spy())
    tv._anchors.clear()
    return calls


# ---- every promise, of every adapter

def test_every_promise(tv): check_generator(tv, 64, 64, (2, 5), steps=2, guidance_scale=3.)


def test_animatediff_keeps_them_too(tmp_path):
    models = load_models(make_dummy_preset(tmp_path).parent, 'cpu')
    check_generator(models.tt2v, 32, 64, steps=3, guidance_scale=6.)
    models.tt2v.pipe.set_progress_bar_config(disable=True)
    check_generator(PromptPipeline(models.tt2v.pipe, frames=8), 32, 64)


@pytest.mark.parametrize('n,h,w', [(2, 64, 128), (5, 192, 64), (17, 64, 128), (33, 192, 64)])
def test_any_length_and_size(tv, n, h, w):
    x = make(tv, n=n, h=h, w=w)
    assert x.shape == (n, h, w, 3) and x.dtype == np.uint8 and x.std() > 1


def test_clips_join_without_a_jump(tv):
    one, two = make(tv, (A, B), n=9), make(tv, (B, C), 'zooms in', n=9)
    assert (one[-1] == two[0]).all() and (one[0] == tv.anchor(A, 64, 64, 0, 2)).all() and (one[0] != one[-1]).any()
    steps = np.abs(np.diff(np.concatenate([one, two[1:]]).astype(int), axis=0)).mean((1, 2, 3))
    assert steps[7:9].max() <= 2*np.median(steps) + .5


def test_a_fresh_decoder_makes_the_same(folders, loaded):
    for n, o in PRESETS.items():
        make(loaded[n], (B, C), 'other', n=3)
        assert (make(loaded[n]) == make(PromptPipeline.from_pretrained(folders[n], **o))).all()


def test_guidance_steps_and_texts_matter(tv):
    base = make(tv)
    for other in (make(tv, guidance_scale=6.), make(tv, steps=3), make(tv, motion='zooms in a lot'), make(tv, (A, C)), make(tv, seed=7)): assert (other != base).any()


# ---- what the pipeline is called with

@pytest.mark.parametrize('name,lengths', [('modelscope', {3: 3, 8: 8, 20: 8}), ('wan', {3: 5, 6: 9, 17: 17, 40: 17}), ('ltx', {3: 9, 10: 17, 40: 17}), ('cog', {3: 17, 9: 17, 40: 17})])
def test_the_model_is_asked_for_lengths_that_it_makes(loaded, monkeypatch, name, lengths):
    calls = seen(loaded[name], monkeypatch)
    for n, asked in lengths.items():
        make(loaded[name], n=n)
        assert calls[-1]['num_frames'] == asked and all(c['num_frames'] == 1 for c in calls[:2])
    assert len(calls) == 2 + len(lengths)                               # and each picture once


def test_the_call_of_a_preset_reaches_the_pipeline(loaded, monkeypatch):
    calls = seen(loaded['wan'], monkeypatch)
    make(loaded['wan'], seed=5, guidance_scale=3.5)
    assert [c['prompt'] for c in calls] == [A, B, f'{A} {M}'] and all(c['negative_prompt'] == 'blurred' and c['guidance_scale'] == 3.5 for c in calls)
    assert all(c['generator'].device.type == 'cpu' and c['generator'].initial_seed() == 5 for c in calls) and len({id(c['generator']) for c in calls}) == 3


def test_a_fixed_argument_changes_the_frames(folders, loaded):
    other = PromptPipeline.from_pretrained(folders['wan'], **PRESETS['wan'] | dict(call=dict(negative_prompt='a dark wood at night')))
    assert (make(other, guidance_scale=4.) != make(loaded['wan'], guidance_scale=4.)).any()


def test_scheduler_and_precision_are_data(folders, loaded):
    assert type(loaded['modelscope'].pipe.scheduler).__name__ == 'DPMSolverMultistepScheduler' and loaded['modelscope'].pipe.scheduler.config.beta_end == .012
    other = PromptPipeline.from_pretrained(folders['wan'], **PRESETS['wan'] | dict(scheduler=dict(flow_shift=8.), torch_dtype=torch.bfloat16))
    assert other.pipe.vae.dtype == torch.float32 and other.pipe.transformer.dtype == torch.bfloat16 and other.pipe.scheduler.config.flow_shift == 8
    assert (make(other) != make(loaded['wan'])).any()


def test_the_motion_survives_a_long_text(loaded, monkeypatch):
    for name, most in (('modelscope', 77), ('cog', 32), ('ltx', 64)):
        calls, tv = seen(loaded[name], monkeypatch), loaded[name]
        with pytest.warns(UserWarning, match='cut'): make(tv, ('A red ball lies here. ' + 'More words come. '*30, A), 'Pans left.', n=3)
        assert calls[-1]['prompt'].endswith('Pans left.') and all(len(tv.pipe.tokenizer(c['prompt']).input_ids) <= most for c in calls)


def test_progress_goes_by_steps(tv):
    calls = []
    tv._anchors.clear()
    make(tv, n=5, steps=3, progress=lambda *a: calls.append(a))
    assert calls[0] == (1, 9) and calls[-1] == (9, 9) and {d for d, _ in calls} == set(range(1, 10)) and [d for d, _ in calls] == sorted(d for d, _ in calls)
    calls.clear(); make(tv, n=5, steps=3, progress=lambda *a: calls.append(a))
    assert calls[-1] == (3, 3)                                           # both pictures are known


def test_pictures_are_kept_and_not_for_ever(folders):
    tv, made = PromptPipeline.from_pretrained(folders['ltx'], keep=3, **PRESETS['ltx']), []
    whole = tv.make
    tv.make = lambda prompt, *a, **k: made.append(prompt) or whole(prompt, *a, **k)
    for pair in ((A, B), (B, C), (A, B)): make(tv, pair, n=2)
    assert made == [A, B, C]
    for i in range(6): make(tv, (A, str(i)), n=2)
    assert len(tv._anchors) == 3 and made.count(A) == 1 and len(made) == 9


def test_a_still_as_long_as_the_clip_starts_from_its_noise(folders):
    "The clip's own beginning is nearer to such a picture."
    off = {}
    for still in (1, 9):
        tv = PromptPipeline.from_pretrained(folders['ltx'], **PRESETS['ltx'] | dict(still=still, frames=9))
        own = tv.make(tv.text(A, M), 9, 64, 64, 0, 4, guidance_scale=2.)[0]
        off[still] = np.abs(own - tv.anchor(A, 64, 64, 0, 4)).mean()
    assert off[9] < .8*off[1]


def test_tiling(folders, loaded):
    for name in PRESETS:
        tv = PromptPipeline.from_pretrained(folders[name], tiling=True, **PRESETS[name])
        assert tv.pipe.vae.use_slicing and tv.pipe.vae.use_tiling and make(tv).shape == (5, 64, 64, 3)
        assert not loaded[name].pipe.vae.use_tiling
        if name != 'modelscope': assert (make(tv) == make(loaded[name])).all() # one tile; that dummy's tiles are 32 pixels


def test_between(loaded):
    "What is given both pictures makes the frames between them."
    class Ends:
        def __call__(self, first, last, prompt, frames, num_inference_steps, generator, progress=None):
            self.got = prompt, frames, num_inference_steps, generator
            if progress: progress(num_inference_steps)
            return types.SimpleNamespace(frames=np.full((frames, *first.shape), 7, np.uint8))
    tv = PromptPipeline(loaded['ltx'].pipe, frames=17, stride=8, multiple=32, between=Ends())
    calls = []
    x = make(tv, n=6, seed=3, progress=lambda *a: calls.append(a))
    assert calls[-1] == (6, 6) and tv.between.got == (M, 4, 2, 3) and (x[1:-1] == 7).all() and (x[0] == tv.anchor(A, 64, 64, 3, 2)).all() and (x[-1] == tv.anchor(B, 64, 64, 3, 2)).all()


def test_the_layout_of_wan_as_published(loaded, tmp_path):
    "Weights in shards, an index from before there was a second transformer, the fast tokenizer's old name, other files beside."
    dummies_video.wan().save_pretrained(tmp_path, max_shard_size='10KB')
    old = json.loads((tmp_path/'model_index.json').read_text())
    for k in ('transformer_2', 'boundary_ratio', 'expand_timesteps'): del old[k]
    (tmp_path/'model_index.json').write_text(json.dumps(old | dict(_diffusers_version='0.33.0.dev0', tokenizer=['transformers', 'T5TokenizerFast'])))
    (tmp_path/'assets').mkdir(); (tmp_path/'README.md').write_text('x'); (tmp_path/'transformer/old.bin').write_bytes(b'not to be opened')
    assert len(list(tmp_path.glob('transformer/*-of-*.safetensors'))) > 1 and len(list(tmp_path.glob('text_encoder/*-of-*.safetensors'))) > 1
    assert (make(PromptPipeline.from_pretrained(tmp_path, **PRESETS['wan'])) == make(loaded['wan'])).all()


# ---- bad folders and bad options

def broken(folder, tmp_path, change):
    shutil.copytree(folder, tmp_path/'p')
    change(tmp_path/'p')
    return tmp_path/'p'


def index(**more):
    def change(p):
        old = json.loads((p/'model_index.json').read_text())
        (p/'model_index.json').write_text(json.dumps(old | more))
    return change


@pytest.mark.parametrize('change,words', [
    (lambda p: (p/'transformer/diffusion_pytorch_model.safetensors').rename(p/'transformer/diffusion_pytorch_model.bin'), 'no safetensors in .*transformer, and diffusion_pytorch_model.bin is a pickle'),
    (lambda p: (p/'text_encoder/model.safetensors').unlink(), 'no safetensors in .*text_encoder: download'),
    (lambda p: shutil.rmtree(p/'vae'), 'vae is missing: download'),
    (lambda p: (p/'scheduler/scheduler_config.json').unlink(), 'scheduler has no configuration'),
    (lambda p: (p/'model_index.json').unlink(), 'model_index.json: .*expected a JSON file'),
    (lambda p: (p/'model_index.json').write_text('[1'), 'expected a JSON file'),
    (lambda p: (p/'model_index.json').write_text('[1]'), 'expected the parts and _class_name'),
    (lambda p: (p/'vae/diffusion_pytorch_model.safetensors').write_bytes(b'\xff'*99), 'does not load'),
    (index(_class_name='WanNextPipeline'), 'diffusers [0-9.]* has no WanNextPipeline; install'),
    (index(_class_name='UNet2DModel'), 'has no UNet2DModel'),
    (index(_class_name=['evil', 'Pipeline']), 'never run'),
    (index(vae=['evil', 'Vae']), "vae comes from 'evil'"),
])
def test_bad_folders(folders, tmp_path, change, words):
    p = broken(folders['wan'], tmp_path, change)
    for part in ('evil.py', 'vae/evil.py', 'None.py', 'pipeline.py'):
        if (p/part).parent.exists(): (p/part).write_text('raise SystemExit("ran code from a folder")')
    with pytest.raises(CmvcError, match=words) as e: PromptPipeline.from_pretrained(p, **PRESETS['wan'])
    assert '\n' not in str(e.value)


def test_sentencepiece_is_asked_for_by_name(folders, tmp_path, monkeypatch):
    p = broken(folders['ltx'], tmp_path, lambda p: (p/'tokenizer/tokenizer.json').rename(p/'tokenizer/spiece.model'))
    import transformers.utils
    monkeypatch.setattr(transformers.utils, 'is_sentencepiece_available', lambda: False)
    with pytest.raises(CmvcError, match=r'cmvc_nb\[pipelines\]'): pipeline_parts(p)
    for name in ('is_sentencepiece_available', 'is_protobuf_available'): monkeypatch.setattr(transformers.utils, name, lambda: True)
    assert set(pipeline_parts(p)[1]) == {'scheduler', 'text_encoder', 'tokenizer', 'transformer', 'vae'}


def test_modelscope_may_leave_diffusers(folders, monkeypatch):
    import diffusers
    real = type(diffusers).__getattr__
    def gone(self, name):
        if name == 'TextToVideoSDPipeline': raise AttributeError(name)
        return real(self, name)
    monkeypatch.setattr(type(diffusers), '__getattr__', gone)
    monkeypatch.delitem(vars(diffusers), 'TextToVideoSDPipeline', raising=False)
    with pytest.raises(CmvcError, match='has no TextToVideoSDPipeline; install one that has it .*name another class as `pipeline`'): PromptPipeline.from_pretrained(folders['modelscope'])


@pytest.mark.parametrize('options,words', [
    (dict(call=dict(fps=8, num_frame=3)), 'WanPipeline does not take fps, num_frame; it takes prompt, negative_prompt'),
    (dict(call=dict(generator=1)), 'call has generator, which the codec gives itself'),
    (dict(frames=16), 'frames is 16: expected 4k'),
    (dict(still=2), 'still is 2: expected 4k'), (dict(still=21), 'still is 21'), (dict(still=True), 'still is True'),
    (dict(stride=0), 'stride is 0'), (dict(least=0), 'least is 0'), (dict(multiple=1.5), 'multiple is 1.5'),
    (dict(frame=16), "unexpected keyword argument 'frame'; it has the options frames, stride"),
    (dict(pipeline='Nonsense'), 'has no Nonsense'),
])
def test_bad_options_are_refused_before_the_weights_are_read(folders, monkeypatch, options, words):
    monkeypatch.setattr('cmvc_nb.pipelines.load_pipeline', lambda *a: pytest.fail('read the weights'))
    with pytest.raises(CmvcError, match=words): PromptPipeline.from_pretrained(folders['wan'], **PRESETS['wan'] | options)


def test_what_a_pipeline_swallows_is_refused_too():
    "AnimateDiff's call has **kwargs, for names of old; what is not of diffusers may mean them."
    from diffusers import AnimateDiffPipeline
    with pytest.raises(CmvcError, match='AnimateDiffPipeline does not take fps;'): PromptPipeline(AnimateDiffPipeline, call=dict(fps=8))
    class Open(Prompted):
        def __call__(self, **options): return Prompted.__call__(self, **{k: v for k, v in options.items() if k != 'fps'})
    assert make(PromptPipeline(Open(), call=dict(fps=8))).shape == (5, 64, 64, 3)


def test_moving_forgets_the_pictures(folders):
    "Another device makes them a little differently."
    tv = PromptPipeline.from_pretrained(folders['ltx'], **PRESETS['ltx'])
    make(tv, n=2)
    assert tv._anchors and not tv.to('cpu')._anchors


@pytest.mark.parametrize('scheduler,words', [(dict(flow_shit=3.), 'flow_shit, which diffusers.* UniPC'), (dict(name='Nonsense'), 'Nonsense')])
def test_bad_scheduler(folders, scheduler, words):
    with pytest.raises(CmvcError, match=words): PromptPipeline.from_pretrained(folders['wan'], **PRESETS['wan'] | dict(scheduler=scheduler))


@pytest.mark.parametrize('kwargs', [dict(n=1), dict(n=2.5), dict(h=40), dict(w=0), dict(steps=0), dict(ends=(A,)), dict(ends=(A, None)), dict(motion=None)])
def test_bad_requests(loaded, kwargs):
    with pytest.raises(CmvcError): make(loaded['ltx'], **kwargs)


def test_wrong_lengths_are_found_out(folders):
    "CogVideoX makes 8 frames where 5 are asked for, although it says 4k+1."
    tv = PromptPipeline.from_pretrained(folders['cog'], **PRESETS['cog'] | dict(stride=4, least=1))
    with pytest.raises(CmvcError, match=r'made \(8, 64, 64, 3\) where \(5, 64, 64, 3\) was asked for: correct stride'): make(tv, n=5)


def test_values_that_are_no_numbers(folders):
    tv = PromptPipeline.from_pretrained(folders['ltx'], **PRESETS['ltx'])
    with torch.no_grad(): next(tv.pipe.vae.decoder.parameters()).fill_(np.nan)
    with pytest.raises(CmvcError, match='no numbers'): make(tv, n=2)


def test_the_pipelines_own_refusals_are_one_line(loaded):
    class Refuses:
        def __call__(self, prompt, num_frames, height, width, num_inference_steps, generator, output_type, guidance_scale): raise ValueError('too wide\nfor me')
    with pytest.raises(CmvcError, match='^Refuses fails at 1 frames of 64×64 in 2 steps: too wide$'): make(PromptPipeline(Refuses()))
    with pytest.raises(CmvcError, match='LTXPipeline fails .* in 1 steps'): make(loaded['ltx'], steps=1) # its schedule divides by zero


@pytest.mark.parametrize('text', ['', ' ', '日本語のテキスト', '🎈🎈', 'word '*2000, '\x00\n\t'])
def test_any_text_generates(tv, text):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert make(tv, (text, A), text, n=3).shape == (3, 64, 64, 3)


# ---- what is not of diffusers, and the smaller parts

class Prompted:
    "A pipeline that knows only prompts."
    def __call__(self, prompt, num_frames, height, width, num_inference_steps, guidance_scale, generator, output_type):
        g = torch.rand(num_frames, height, width, 3, generator=generator) + sum(prompt.encode()) % 7/10
        return types.SimpleNamespace(frames=g.clamp(0, 1)[None].numpy())


@pytest.mark.parametrize('n', [2, 3, 16, 40])
def test_any_pipeline_fits_behind_the_protocol(n):
    p = PromptPipeline(Prompted(), frames=8)
    one, two = p.generate((A, B), M, n, 16, 24), p.generate((B, C), 'up', n, 16, 24)
    assert one.shape == (n, 16, 24, 3) and one.dtype == np.uint8 and (one[-1] == two[0]).all()
    assert (one == p.generate((A, B), M, n, 16, 24)).all() and (one != p.generate((A, B), M, n, 16, 24, seed=1)).any()
    with pytest.raises(CmvcError): p.generate((A, B), M, 1)


@pytest.mark.parametrize('sin,words', [
    ('dtype', 'made float32'), ('length', 'made uint8'), ('random', 'asked again|another picture'), ('deaf', 'does not read the motion'), ('seedless', 'keyframes of every seed'), ('anchorless', 'another picture'), ('kind', 'accepts')])
def test_check_generator_finds_each_sin(sin, words):
    good = PromptPipeline(Prompted(), frames=8)
    def generate(ends, motion, n, h, w, seed=0, **options):
        if sin == 'kind' and (motion is None or len(ends) < 2 or n < 2): return None
        x = good.generate(ends, M if sin == 'deaf' else motion, n, h, w, seed=0 if sin == 'seedless' else seed)
        if sin == 'random': x[1:-1] = np.random.default_rng().integers(0, 255, x[1:-1].shape)
        if sin == 'anchorless': x[-1] = 0
        return x.astype(np.float32) if sin == 'dtype' else x[:-1] if sin == 'length' else x
    check_generator(good, 16, 16)
    with pytest.raises(CmvcError, match=words): check_generator(types.SimpleNamespace(generate=generate), 16, 16)


def test_lengths():
    for stride in (1, 4, 8):
        for n in range(1, 60):
            got = legal_length(n, 8*stride + 1, stride)
            assert (got - 1) % stride == 0 and got <= 8*stride + 1 and (got == 8*stride + 1 or n <= got < n + stride)
            assert legal_length(n, 8*stride + 1, stride, 3*stride) == max(got, 3*stride + 1 if stride > 1 else 3)


def test_put_ends_rounds_once_and_in_bands():
    rng = np.random.default_rng(1)
    x, (a, b) = rng.uniform(-20, 280, (5, 30, 8, 3)).astype(np.float32), rng.integers(0, 256, (2, 30, 8, 3), np.uint8)
    y = put_ends(x, 11, a, b, 7)
    assert (y[0] == a).all() and (y[-1] == b).all() and (y == put_ends(x, 11, a, b, 999)).all()
    t = .5*1                                                              # frame 5 of 0…10 is halfway
    assert np.abs(y[5] - np.clip(x[2] + (1 - t)*(a - x[0]) + t*(b - x[4]), 0, 255)).max() <= .5 + 1e-3
    assert (resample(np.arange(3.)[:, None], 5)[:, 0] == [0, .5, 1, 1.5, 2]).all() and (resample(np.ones((1, 2)), 3) == 1).all()


def test_the_class_decides(folders):
    assert pipeline_class(folders['wan']).__name__ == 'WanPipeline' and pipeline_class(folders['wan'], 'WanImageToVideoPipeline').__name__ == 'WanImageToVideoPipeline'
    assert VideoPipeline(pipeline_class(folders['ltx']), 9, 8).name == 'LTXPipeline'


@pytest.mark.filterwarnings('ignore:text of')
def test_the_codec_speaks_through_it(folders, tmp_path):
    "Encode and decode in text mode; the decoder is another program with the same folder."
    page, clip = make_dummy_preset(tmp_path).parent, moving_disc(9, 64)
    def codec():
        models = load_models(page, 'cpu')
        models.__dict__['tt2v'] = PromptPipeline.from_pretrained(folders['ltx'], **PRESETS['ltx'])
        return Codec(models)
    made = codec().encode(clip, mode='tt2v', keyframes=3, tries=2, selection='uniform')
    one, two = codec().decode(made.data).frames, codec().decode(made.data).frames
    assert one.shape == clip.shape and (one == two).all() and (one == codec().decode(made.data).frames).all()
