"Studies: points with options, searches of one weight, tables beside the paper's."
import numpy as np, pytest, torch
from cmvc_nb import bench
from cmvc_nb.bench import Job, measure, our_point, plan
from cmvc_nb.cli import app
from cmvc_nb.codec import Codec
from cmvc_nb.errors import CmvcError
from cmvc_nb.it2v import DualLoRAPipeline
from cmvc_nb.search import METHODS, batched, gradient, method_of, search_weights
from cmvc_nb.video import write_video
from cmvc_nb.world import video
from dummies import dummy_components, moving_disc
from dummies_models import make_dummy_preset

torch.set_num_threads(1)
FEW = ('psnr', 'gmsd')


@pytest.fixture(scope='module')
def clip(tmp_path_factory): return write_clip(tmp_path_factory.mktemp('clip')/'pan.mkv', 0)

def write_clip(path, seed): write_video(path, video(np.random.default_rng(seed), 7, 96, kind='pan')[0], 25); return path

@pytest.fixture(scope='module')
def preset(tmp_path_factory): return str(make_dummy_preset(tmp_path_factory.mktemp('preset'), 0))


# ---- points with options

@pytest.mark.parametrize('word,want', [
    ('k3q0,selection=mse', dict(selection='mse')), ('k3q0,both=no', dict(both=False)), ('k3,search=none,seed=7', dict(search=None, seed=7)), ('k3q0,search=gradient-50', dict(search='gradient-50')),
    ('k3q0,strength=0.25,steps=20', dict(strength=.25, steps=20)), ('k3q0,lora_steps=0,motion_budget=0', dict(lora_steps=0, motion_budget=0)), ('k3q0,codec=webp,settings=paper', dict(codec='webp', settings='paper')),
    ('k3,describer=owner/name,tries=2', dict(describer='owner/name', tries=2))])
def test_options_of_a_point(word, want):
    got = our_point(word)
    assert {k: got[k] for k in want} == want and set(got) == {'keyframes', 'quality', 'text_budget', *want} and all(type(got[k]) is type(v) for k, v in want.items())

@pytest.mark.parametrize('word,say', [('k3q0,colour=red', 'no option'), ('k3q0,steps', 'no option'), ('k3q0,', 'no option'), ('k3q0,steps=2,steps=3', 'twice'), ('k3q0,selection=best', 'cosine, mse'), ('k3q0,steps=few', 'whole number from 1'),
                                      ('k3q0,steps=0', 'whole number from 1'), ('k3q0,strength=-1', 'number from 0'), ('k3q0,search=hard', 'batched-i'), ('k3q0,search=gradient-0', 'batched-i'), ('k3q0,both=maybe', 'yes, no'), ('steps=3', 'expected k<keyframes>')])
def test_bad_options_give_one_line(word, say, clip):
    with pytest.raises(CmvcError, match=say) as e: plan([clip], ['cmvc-it2v'], {'cmvc-it2v': [word]}, 5, '64x64')
    assert '\n' not in str(e.value)

def test_options_reach_the_codec(clip, preset, monkeypatch):
    from cmvc_nb.bitstream import open_cmvc
    seen, real = [], Codec.encode
    monkeypatch.setattr(Codec, 'encode', lambda self, *a, **kw: seen.append((real(self, *a, **kw), kw)) or seen[-1][0])
    rows = [measure(Job(str(clip), 'cmvc-it2v', p, 7, '64x64', FEW, preset)) for p in ('k3q0,search=none', 'k3q0,selection=random,seed=3,steps=4,lora_steps=3,strength=0.75,codec=webp,motion_budget=0,search=none')]
    (plain, _), (e, kw) = seen
    with open_cmvc(e.data) as r:
        h = r.header
        assert (h.steps, h.lora_steps, h.strength, h.seed) == (4, 3, .75, 3) and r.group(0).codec == 2
        from cmvc_nb.codec import Player
        assert Player.of(None, r).motion(0) == ''
    with open_cmvc(plain.data) as r: assert Player.of(None, r).motion(0) and r.group(0).codec == 0
    assert kw['selection'] == 'random' and kw['search'] is None and rows[1]['point'].startswith('k3q0,selection=random') and rows[0]['bytes'] != rows[1]['bytes']

def test_models_are_loaded_once(preset):
    bench._codec.cache_clear()
    assert bench._codec(preset, None) is bench._codec(preset, None) is not bench._codec(preset, 'measuring')

def test_names_of_points_without_options_are_as_ever():
    assert Job('/nowhere/a.mp4', 'cmvc-it2v', 'k3q0', 17, '192x192', FEW).name == 'a/cmvc-it2v_k3q0_3779ee'
    assert len({Job('a.mp4', 'cmvc-it2v', p).name for p in ('k3q0', 'k3q0,steps=2', 'k3q0,steps=20', 'k3q0,seed=2')}) == 4

def test_options_on_the_command_line(clip, preset, tmp_path, monkeypatch):
    from typer.testing import CliRunner
    seen = {}
    def jobs(clips, codecs, points, *a): seen.update(points); raise CmvcError('enough')
    monkeypatch.setattr(bench, 'plan', jobs)
    CliRunner().invoke(app, ['bench', str(clip), '-o', str(tmp_path), '--points', 'cmvc-it2v=k3q0,selection=mse,steps=2, k5q0', '--points', 'cmvc-it2v=k2q0,seed=1'])
    assert seen == {'cmvc-it2v': ['k3q0,selection=mse,steps=2', 'k5q0', 'k2q0,seed=1']}
    said = ' '.join(CliRunner().invoke(app, ['bench', '--help'], env={'COLUMNS': '400'}).output.split())
    assert 'k3q0,selection=mse,steps=20' in said


# ---- searches of one weight

@pytest.fixture(scope='module')
def found():
    pipe, film = DualLoRAPipeline(**dummy_components(), lora_rank=2, lora_lr=2e-2, batch_size=4, init='sdedit'), moving_disc(9)
    f = pipe.fit({0: film[0], 1: film[-1]}, {0: 'a', 1: 'a'}, 2, steps=4)
    # frames that uneven weights made: both weights have something to find
    uniform = np.linspace(1, 0, 9)[1:-1]
    target = pipe(film[0], film[-1], np.clip(uniform + .2, 0, 1), np.clip(uniform - .4, 0, 1), 'a', (f[0], f[1]), num_inference_steps=5, strength=.9).frames
    return {m: search_weights(pipe, target, film[0], film[-1], 'a', (f[0], f[1]), m, dict(price=0.) if m.startswith('batched') else None, num_inference_steps=5, strength=.9) for m in ('batched', 'batched-i', 'batched-l', 'gradient-2')}

def test_one_weight_stays_uniform(found):
    assert found['batched-i'].q[:, 0].any() and not found['batched-i'].q[:, 1].any()
    assert found['batched-l'].q[:, 1].any() and not found['batched-l'].q[:, 0].any()
    assert found['batched'].q.any(0).all()

def test_one_weight_is_better_than_none_and_worse_than_both(found):
    start = found['batched'].history[0]
    assert all(found[m].mse.mean() <= start and found[m].history[0] == start for m in ('batched-i', 'batched-l'))
    assert found['batched'].mse.mean() <= min(found[m].mse.mean() for m in ('batched-i', 'batched-l')) < start

def test_steps_in_the_name(found):
    assert len(found['gradient-2'].history) == 2 and method_of('gradient-150').keywords == dict(steps=150) and method_of('gradient') is gradient and method_of('batched') is batched
    assert set(METHODS) == {'batched', 'batched-i', 'batched-l', 'gradient', 'even'}
    for bad in ('gradient-', 'gradient-0', 'gradient--5', 'batched-7', 'best', 7):
        with pytest.raises(CmvcError, match='expected one of batched'): method_of(bad)

def test_the_codec_takes_and_refuses_searches(clip, preset):
    c = Codec.from_pretrained(preset)
    e = c.encode(clip, keyframes=2, search='batched-i', size=64, score=False)
    from cmvc_nb.bitstream import content, open_cmvc
    with open_cmvc(e.data) as r: assert not content(r, 0).weights[:, 1].any()
    with pytest.raises(CmvcError, match="search 'hard'"): c.encode(clip, search='hard')
