"Studies: points with options, searches of one weight, tables beside the paper's."
from dataclasses import replace
import numpy as np, pytest, torch
from cmvc_nb import bench
from cmvc_nb.bench import Job, measure, our_point, plan
from cmvc_nb.cli import app
from cmvc_nb.codec import Codec
from cmvc_nb.errors import CmvcError
from cmvc_nb.it2v import DualLoRAPipeline
from cmvc_nb.search import METHODS, batched, gradient, method_of, search_weights
from cmvc_nb.study import Row, anchor_row, measure_rows, mini_clips, missing_parts, paper_sets, pick_metric, preset_page, study_table, with_options
from cmvc_nb.video import frame_rate, write_video
from cmvc_nb.world import video
from dummies import dummy_components, moving_disc
from dummies_models import make_dummy_preset

torch.set_num_threads(1)
FEW = ('psnr', 'gmsd')


@pytest.fixture(scope='module')
def clip(tmp_path_factory): return write_clip(tmp_path_factory.mktemp('clip')/'pan.mkv', 0)

def write_clip(path, seed): write_video(path, video(seed, 7, 96, kind='pan')[0], 25); return path

@pytest.fixture(scope='module')
def preset(tmp_path_factory): return str(make_dummy_preset(tmp_path_factory.mktemp('preset'), 0))


# ---- points with options

@pytest.mark.parametrize('word,want', [
    ('k3q0,selection=mse', dict(selection='mse')), ('k3q0,both=no', dict(both=False)), ('k3,search=none,seed=7', dict(search=None, seed=7)), ('k3q0,search=gradient-50', dict(search='gradient-50')),
    ('k3q0,strength=0.25,steps=20', dict(strength=.25, steps=20)), ('k3q0,lora_steps=0,motion_budget=0', dict(lora_steps=0, motion_budget=0)), ('k3q0,codec=webp,settings=paper', dict(codec='webp', settings='paper')),
    ('k3,guidance=7.5,tries=2', dict(guidance=7.5, tries=2))])
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
    assert bench._codec(preset, 'it2v') is bench._codec(preset, 'it2v')

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


# ---- tables

@pytest.fixture(scope='module')
def mini(tmp_path_factory):
    d = tmp_path_factory.mktemp('mini'); on = mini_clips(d)
    rows = [replace(on.anchor, name='again'), Row('low', -1., ('51', '42'), 'x264'), Row('rife', 6., ('k2q0',), 'cmvc-it2v+rife'), Row('no weights', -10., note='not available: nobody has them'), Row('one point', None, ('42',), 'x264')]
    return d, on, rows, measure_rows(rows, on, d/'bench', 0)

def test_rows_share_points_and_keep_reasons(mini):
    d, on, rows, got = mini
    assert list(got) == ['x264', *(r.name for r in rows)] and len(list(d.glob('bench/points/*/*.json'))) == 4 # of 4 + 4 + 2 + 1
    assert got['again'] == got['x264'] and 'rife-ncnn-vulkan' in got['rife'] and got['no weights'] == rows[3].note
    with pytest.raises(CmvcError, match="two rows are called 'low'"): measure_rows([rows[1], rows[1]], on, d/'bench', 0)

def test_the_table(mini):
    d, on, rows, got = mini
    t = {r['row']: r for r in study_table(got, rows, 'T', 'Table 9')}
    assert t['again']['here'] == 0 and t['again']['shared'] == '100%' and t['low']['counted'] == 1 and t['low']['paper'] == -1
    assert t['one point']['here'] is None and '1 of 1 points left' in t['one point']['note'] and t['one point']['bytes'] == f"{got['one point'][0]['bytes']:,}"
    assert t['rife']['clips'] == 0 and t['rife']['note'].startswith('not available')
    text = study_table(got, rows, 'T', 'Table 9')
    assert text.metric == 'haarpsi' and not text.lower and 'paper, Table 9' in repr(text) and text._repr_html_().count('<tr>') == 6 and '+6.0 %' in repr(text)

def test_rates_are_those_of_bdrate(mini):
    from cmvc_nb.bdrate import bd_rate
    got = dict(mini[3]); fake = [r | dict(bytes=r['bytes']//2, bpp=r['bpp']/2) for r in got['x264']]
    t = study_table(dict(got, half=fake), [Row('half')], metric='psnr')
    points = lambda rs: [(r['bpp'], r['metrics']['psnr']['value']) for r in rs]
    assert t[0]['here'] == pytest.approx(-50) == pytest.approx(bd_rate(points(got['x264']), points(fake), 'psnr', clean='hull').percent)

def test_missing_overlap_is_said(mini):
    x = mini[3]['x264']
    t = study_table(dict(fine=x[2:], coarse=x[:2]), [Row('coarse', -20.)], metric='psnr')
    assert t[0]['here'] is None and t[0]['clips'] == 1 and t[0]['counted'] == 0 and t[0]['shared'] == '' and ' none ' in repr(t) and '-20.0 %' in repr(t)

def test_the_metric_is_dists_where_it_was_had(mini):
    x = [dict(r, metrics=r['metrics'] | dict(dists=dict(value=.5 - .1*i, better='lower'))) for i, r in enumerate(mini[3]['x264'])]
    assert pick_metric(dict(a=x)) == 'dists' and study_table(dict(a=x, b=x), [Row('b')]).lower
    with pytest.raises(CmvcError, match='no point was measured: a: because'): pick_metric(dict(a='because'))
    with pytest.raises(CmvcError, match='anchor a: because'): study_table(dict(a='because', b=x), [Row('b')])

def test_failed_points_are_named(mini):
    d, on, rows, _ = mini
    got = measure_rows([Row('ours', None, ('k9q0',))], on, d/'bench', 0)
    t = study_table(got, [Row('ours')])
    assert 'k9q0: ' in t[0]['note'] and '9 keyframes' in t[0]['note'] and t[0]['here'] is None

def test_anchors(monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert anchor_row().codec == 'x265@1/2'
    (tmp_path/'vvencapp').write_text('#!/bin/sh\n'); (tmp_path/'vvencapp').chmod(0o755)
    assert anchor_row() == Row('vvenc-ld', points=('63', '52', '47', '42'), codec='vvenc-ld') # the paper's QPs
    assert with_options(('k2q0',), 'steps=2', 'seed=1') == ('k2q0,steps=2,seed=1',) and with_options(('k2q0',)) == ('k2q0',)

def test_pages_of_presets(preset, tmp_path):
    from cmvc_nb.models import load_preset
    page = load_preset(preset_page(preset, tmp_path/'deep/slerp.yaml', it2v=dict(init='slerp', attention=.6, adain=True)))
    old = load_preset(preset)
    assert page.name == 'slerp' and page.it2v == dict(init='slerp', attention=.6, adain=True) and page.settings == old.settings and page.fingerprint() != old.fingerprint() and missing_parts(page) == ''
    assert 'diffusion' in missing_parts('sd15') and 'clip' not in missing_parts('tiny')
    with pytest.raises(CmvcError, match='expected name and parts'): preset_page(preset, tmp_path/'bad.yaml', colour='red')

def test_the_published_sets(tmp_path):
    from cmvc_nb.bench import source_frames
    from cmvc_nb.datasets import datasets
    from cmvc_nb.video import raw_format
    for name, m in datasets().items(): # the bench knows a raw sequence by its name
        for s in m['sequences']: assert raw_format(s['file']) == (m['width'], m['height'], frame_rate(str(s['fps'])), m['pix_fmt']), (name, s['file'])
    for s in datasets()['hevc_d']['sequences']: (tmp_path/s['file']).write_bytes(bytes(416*240*3//2*2))
    (on,) = paper_sets(tmp_path, 2, 'tiny', partial=True)
    assert (on.title, on.size, on.frames, len(on.paths)) == ('HEVC Class D', '448x256', 2, 4)
    frames, fps = source_frames(Job(on.paths[0], 'x265', '51', 2, on.size)); assert frames.shape == (2, 256, 448, 3) and fps == 50
    with pytest.raises(CmvcError, match='no such file'): paper_sets(tmp_path, 2, 'tiny')


def test_a_report_keeps_options_apart(mini):
    from cmvc_nb.report import apart
    rows = [dict(codec='cmvc-it2v', point=p) for p in ('k2q0', 'k3q0,selection=mse,steps=2')]
    assert apart(rows) == [rows[0], dict(codec='cmvc-it2v selection=mse,steps=2', point='k3q0')] and rows[1]['point'].startswith('k3q0,')
