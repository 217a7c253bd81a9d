"""Image-to-video pipelines of diffusers where the dual-LoRA pipeline stands: real classes of a few channels, loaded from the published layouts."""
import types

import numpy as np
import pytest
import torch
from PIL import Image

import dummies_video
from cmvc_nb.codec import Codec
from cmvc_nb.ends import EndFramesPipeline, given_pictures
from cmvc_nb.errors import CmvcError
from cmvc_nb.models import load_models
from cmvc_nb.pipelines import PromptPipeline, check_generator, put_ends
from dummies import moving_disc
from dummies_models import make_dummy_preset

STATIC = dict(use_dynamic_shifting=False, shift_terminal=None)           # as LTX-Video-0.9.5
PRESETS = dict( # name → (folder, the preset's `it2v` in small, whether it sees the last keyframe)
    wan=('wan_ends', dict(frames=17, stride=4, multiple=16, first='image', last='last_image', float32=['vae', 'image_encoder'], call=dict(guidance_scale=3.)), True),
    vace=('wan_vace', dict(frames=17, stride=4, multiple=16, clip='video', mask='mask'), True),
    ltx_condition=('ltx', dict(pipeline='LTXConditionPipeline', frames=17, stride=8, multiple=32, last='image', at='frame_index', scheduler=STATIC, call=dict(video=[None, None])), True),
    ltx=('ltx', dict(pipeline='LTXImageToVideoPipeline', frames=17, stride=8, multiple=32), False),
    cog=('cog_first', dict(frames=17, stride=8, multiple=16, call=dict(max_sequence_length=32)), False),
    ti2v=('wan_ti2v', dict(pipeline='WanImageToVideoPipeline', frames=17, stride=4, multiple=16), False))
A, B, M = *moving_disc(9, 64)[[0, 8]], 'the disc moves right'


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp('ends')
    return {n: dummies_video.save(getattr(dummies_video, n), top/n) for n in {f for f, _, _ in PRESETS.values()}}


@pytest.fixture(scope='module')
def loaded(folders): return {n: EndFramesPipeline.from_pretrained(folders[f], torch_dtype=torch.float32, use_safetensors=True, local_files_only=True, **o).to('cpu') for n, (f, o, _) in PRESETS.items()}


@pytest.fixture(params=PRESETS)
def ends(request, loaded): return loaded[request.param]


def play(ends, a=A, b=B, n=3, prompt=M, **kwargs): return ends(a, b, frames=n, prompt=prompt, **{'num_inference_steps': 2, **kwargs}).frames


@pytest.mark.parametrize('n,h,w', [(0, 64, 128), (1, 192, 64), (3, 64, 128), (15, 192, 64), (31, 64, 128)])
def test_any_length_and_size(ends, n, h, w):
    a, b = np.random.default_rng(0).integers(0, 256, (2, h, w, 3), np.uint8)
    x = play(ends, a, b, n)
    assert x.shape == (n, h, w, 3) and x.dtype == np.uint8


def test_the_same_request_gives_the_same_frames(folders, loaded):
    for n, (f, o, _) in PRESETS.items():
        x = play(loaded[n])
        play(loaded[n], B, A, 2, 'other')
        assert (x == play(loaded[n])).all() and (x == play(EndFramesPipeline.from_pretrained(folders[f], **o))).all()
        assert (x == play(loaded[n], generator=torch.Generator('cpu').manual_seed(0))).all()


@pytest.mark.filterwarnings('ignore:text of')
def test_everything_named_changes_the_frames(ends):
    x = play(ends)
    for other in (play(ends, B, A), play(ends, prompt='a storm comes up and night falls'), play(ends, generator=5), play(ends, num_inference_steps=3)): assert (other != x).any()


@pytest.mark.parametrize('name', PRESETS)
def test_which_keyframes_the_model_sees(loaded, name):
    e, sees_last = loaded[name], PRESETS[name][2]
    def raw(a, b): return e.make(e.text(M), 9, 64, 64, 0, 2, **given_pictures(Image.fromarray(a), Image.fromarray(b), 9, e.names))
    x = raw(A, B)
    assert (play(e, n=7) == put_ends(x, 9, A, B)[1:-1]).all()
    assert (raw(255 - A, B) != x).any() and (raw(A, 255 - B) != x).any() == sees_last


def test_frames_begin_and_end_beside_their_keyframes(ends):
    "The nearer to a keyframe, the nearer its picture: the correction there is whole."
    x = np.concatenate([A[None], play(ends, n=15), B[None]]).astype(int)
    steps = np.abs(np.diff(x, axis=0)).mean((1, 2, 3))
    assert steps[[0, -1]].max() <= 2*np.median(steps) + .5


def test_lengths_and_pictures_that_reach_the_model(loaded, monkeypatch):
    calls = []
    for name, n, asked in (('wan', 3, 5), ('wan', 9, 13), ('wan', 40, 17), ('ltx_condition', 3, 9), ('cog', 8, 17), ('vace', 3, 5)):
        pipe = loaded[name].pipe
        class Spy:
            def __getattr__(self, k): return getattr(pipe, k)
            def __call__(self, **args): calls.append(args); return pipe(**args)
        monkeypatch.setattr(loaded[name], 'pipe', Spy())
        play(loaded[name], n=n, generator=4)
        monkeypatch.undo()
        c = calls[-1]
        assert c['num_frames'] == asked and c['prompt'] == M and c['generator'].initial_seed() == 4 and c['generator'].device.type == 'cpu'
    same = lambda image, x: (np.asarray(image) == x).all()
    assert same(calls[0]['image'], A) and same(calls[0]['last_image'], B) and calls[0]['guidance_scale'] == 3
    assert same(calls[3]['image'][0], A) and same(calls[3]['image'][1], B) and calls[3]['frame_index'] == [0, 8] and calls[3]['video'] == [None, None]
    assert same(calls[4]['image'], A) and 'last_image' not in calls[4]
    clip, mask = calls[5]['video'], calls[5]['mask']
    assert same(clip[0], A) and same(clip[4], B) and all(same(c, 128) for c in clip[1:4]) and [np.asarray(m).min() for m in mask] == [0, 255, 255, 255, 0] == [np.asarray(m).max() for m in mask]


def test_strength_0_generates_nothing(loaded, monkeypatch):
    monkeypatch.setattr(loaded['ltx'], 'make', lambda *a, **k: pytest.fail('generated'))
    x = play(loaded['ltx'], n=4, strength=0.)
    assert (x == [np.round(A + (B.astype(float) - A)*w/5) for w in range(1, 5)]).all()


def test_weights_give_the_number_only(loaded):
    x = play(loaded['ltx'], n=4)
    assert (loaded['ltx'](A, B, np.ones(4), np.zeros(4), M, (None, None), num_inference_steps=2, init='lerp', strength=.5).frames == x).all()
    assert (loaded['ltx'](Image.fromarray(A), Image.fromarray(B), frames=4, prompt=M, num_inference_steps=2).frames == x).all()


def test_nothing_to_fit_and_nothing_to_search(ends):
    assert EndFramesPipeline.searches is False and ends.fit({3: A, 4: B}, {3: M, 4: M}, 9, steps=3, strength=.5, seed=1, log=None) == {3: None, 4: None}


def test_progress(ends):
    done = []
    play(ends, num_inference_steps=3, progress=done.append)
    assert set(done) == {1, 2, 3} and done == sorted(done)


def test_a_file_goes_round(folders, tmp_path):
    "Encode with uniform weights, decode by another program: the keyframes as decoded, between them what the pipeline makes."
    page, clip = make_dummy_preset(tmp_path).parent, moving_disc(9, 64)
    def codec():
        models = load_models(page, 'cpu')
        f, o, _ = PRESETS['wan']
        models.__dict__['it2v'] = EndFramesPipeline.from_pretrained(folders[f], **o)
        return Codec(models)
    made = codec().encode(clip, keyframes=3, selection='uniform', search=None, quality=50)
    one, two = codec().decode(made.data).frames, codec().decode(made.data).frames
    assert one.shape == clip.shape and (one == two).all() and len(made.psnr) == 2
    still = codec().encode(clip, keyframes=3, selection='uniform', search=None, quality=50, strength=0.)
    blend = codec().decode(still.data).frames
    assert (blend[[0, 4, 8]] == one[[0, 4, 8]]).all() and (blend[2] != one[2]).any()
    assert np.abs(blend[2] - (blend[0].astype(int) + blend[4])/2).max() <= .5


def test_text_to_video_in_two_stages(folders, loaded):
    tv = PromptPipeline.from_pretrained(folders['ltx'], frames=17, stride=8, multiple=32, between=loaded['wan'])
    check_generator(tv, lengths=(2, 5), steps=2)
    calls = []
    tv.generate(('a', 'b'), M, 5, 64, 64, steps=2, progress=lambda *a: calls.append(a))
    assert calls[-1] == (6, 6)


@pytest.mark.parametrize('options,words', [
    (dict(last='last_picture'), 'WanImageToVideoPipeline does not take last_picture'), (dict(first='frame'), 'does not take frame'), (dict(last='image'), 'expected first'),
    (dict(clip='video'), 'expected first'), (dict(mask='mask'), 'expected first'), (dict(first=None), 'expected first'), (dict(clip='video', mask='mask'), 'does not take video, mask'),
    (dict(call=dict(image=1)), 'call has image'), (dict(frames=18), 'frames is 18'), (dict(still=1), "unexpected keyword argument 'still'")])
def test_bad_options(folders, monkeypatch, options, words):
    monkeypatch.setattr('cmvc_nb.pipelines.load_pipeline', lambda *a: pytest.fail('read the weights'))
    with pytest.raises(CmvcError, match=words): EndFramesPipeline.from_pretrained(folders['wan_ends'], **PRESETS['wan'][1] | options)


def test_a_folder_that_has_not_all_parts(folders):
    with pytest.raises(CmvcError, match='does not load'): EndFramesPipeline.from_pretrained(folders['ltx'], pipeline='WanImageToVideoPipeline')


@pytest.mark.parametrize('a,b,kwargs,words', [
    (A[:32], B, {}, 'one size'), (A.astype(float), B, {}, 'uint8'), (A[..., 0], B[..., 0], {}, 'uint8'), (A[:40], B[:40], {}, 'multiples of 32'), (A, B, dict(n=None), 'number of frames')])
def test_bad_requests(loaded, a, b, kwargs, words):
    with pytest.raises(CmvcError, match=words): play(loaded['ltx'], a, b, **kwargs)


def test_given_pictures_by_name():
    a, b = Image.new('RGB', (8, 8)), Image.new('RGB', (8, 8), 'red')
    assert given_pictures(a, b, 5, dict(first='image', last=None)) == dict(image=a)
    assert given_pictures(a, b, 5, dict(first='x', last='y')) == dict(x=a, y=b)
    assert given_pictures(a, b, 5, dict(first='x', last='x', at='i')) == dict(x=[a, b], i=[0, 4])
