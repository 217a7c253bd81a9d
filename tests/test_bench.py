"The bench measures each point once, in processes that may die; the report draws what is there."
import csv, json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest
from cmvc_nb import bench
from cmvc_nb.bench import Job, measure, our_point, plan, run_jobs, saved, source_frames
from cmvc_nb.errors import CmvcError
from cmvc_nb.report import bd_table, compare_videos, curve, good, matched, one_each, plot_curves, write_csv, write_report
from cmvc_nb.video import read_video, write_video
from cmvc_nb.world import video
from dummies_models import make_dummy_preset

FEW = ('psnr', 'gmsd')


@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    d = tmp_path_factory.mktemp('clips')
    for i, name in enumerate(('one', 'two')): write_video(d/f'{name}.mkv', video(i, 6, 96, kind='pan')[0], 25)
    return [d/'one.mkv', d/'two.mkv']

def jobs_of(clips, codecs=('x264', 'x265'), **points): return plan(clips, codecs, points or {c: (51, 40, 30) for c in codecs}, 5, '64x64', FEW)

@pytest.fixture(scope='module')
def run(clips, tmp_path_factory):
    out = tmp_path_factory.mktemp('bench'); said = []
    jobs = jobs_of(clips)
    return out, jobs, run_jobs(jobs, out, 2, lambda *a: said.append(a)), said


def test_a_row_says_everything(run, clips):
    out, jobs, rows, said = run
    assert len(rows) == 12 and not any('error' in r for r in rows) and [d for d, _, _ in said] == list(range(1, 13))
    r = rows[0]; frames, fps = source_frames(jobs[0])
    assert frames.shape == (5, 64, 64, 3) and (r['clip'], r['codec'], r['point'], r['frames'], r['width']) == ('one', 'x264', '51', 5, 64)
    assert r['bpp'] == 8*r['bytes']/(5*64*64) and r['kbps'] == 8*r['bytes']*25/5/1000
    from cmvc_nb.anchors import get_anchor
    data = get_anchor('x264').encode(frames, fps, 51)
    e = np.square(get_anchor('x264').decode(data, 5, 64, 64).astype(float) - frames).mean()
    assert r['bytes'] == len(data) and abs(r['metrics']['psnr']['value'] - 10*np.log10(255**2/e)) < 1e-4 # on the very same pixels
    assert {'version', 'better', 'value'} <= set(r['metrics']['gmsd']) and len(saved(out)) == 12

def test_nothing_is_measured_twice(run):
    out, jobs, rows, _ = run
    stamps = {p: p.stat().st_mtime_ns for p in out.glob('points/*/*.json')}
    said = []
    assert run_jobs(jobs, out, tell=lambda *a: said.append(a)) == rows and not said
    assert stamps == {p: p.stat().st_mtime_ns for p in out.glob('points/*/*.json')}
    (out/'points'/f'{jobs[0].name}.json').write_text('{"clip": "o')                   # a kill in the middle of a disk's work
    assert len(saved(out)) == 11 and run_jobs(jobs, out)[0]['bytes'] == rows[0]['bytes']

def test_other_settings_are_other_points(clips):
    a = Job(str(clips[0]), 'x265', '40', metrics=FEW)
    assert len({a.name, *(Job(str(clips[0]), 'x265', '40', **{'metrics': FEW} | k).name for k in (dict(frames=9), dict(size='64x64'), dict(metrics=()), dict(preset='sd15')))}) == 5
    assert Job('x/one.mkv', 'x265', '40').name != Job('y/one.mkv', 'x265', '40').name

def test_a_child_that_dies_takes_one_point_with_it(clips, tmp_path, monkeypatch):
    code = bench._CHILD.replace('; work', '''
import cmvc_nb.bench as b, os
real = b.measure
def measure(job):
    if job.point == '40': print('a codec crashed', file=sys.stderr, flush=True); os._exit(9)
    return real(job)
b.measure = measure
work''')
    monkeypatch.setattr(bench, '_CHILD', code)
    rows = run_jobs(jobs_of(clips[:1]), tmp_path, 1)
    assert [r['point'] for r in rows if 'error' in r] == ['40', '40'] and len(good(rows)) == 4
    assert all('status 9' in r['error'] and 'a codec crashed' in r['error'] for r in rows if 'error' in r)
    monkeypatch.setattr(bench, '_CHILD', bench._CHILD.split('\n')[0].rstrip('; ') + '; work(*json.load(sys.stdin))')
    assert not any('error' in r for r in run_jobs(jobs_of(clips[:1]), tmp_path, 1)) # what failed is tried again

def test_failures_have_reasons(clips, tmp_path):
    rows = run_jobs([Job(str(clips[0]), 'x264', '51', 99, '64x64', FEW), Job(str(clips[0]), 'x264', '51', 5, 'big', FEW), Job(str(clips[0]), 'cmvc-it2v', 'k9', 5, '64x64', FEW), Job(str(clips[0]), 'cmvc-it2v', 'k2', 5, '66x64', FEW)], tmp_path)
    for r, say in zip(rows, ('6 frames, 99 wanted', 'width x height', '9 keyframes', 'multiples of 64')): assert say in r['error']

@pytest.mark.parametrize('bad', [dict(codecs=['h267']), dict(codecs=['x265'], points={'x264': ['51']}), dict(codecs=['cmvc-it2v'], points={'cmvc-it2v': ['q5']}), dict(codecs=['cmvc-tt2v+flow']),
                                 dict(codecs=['cmvc-it2v+magic']), dict(codecs=['x265'], metrics=['beauty']), dict(codecs=['x265'], points={'x265': ['abc']}), dict(codecs=['x265'], points={'x265': ['99']}),
                                 dict(codecs=['x265'], size='64'), dict(codecs=['x265'], size='0x0'), dict(codecs=['cmvc-it2v'], size='66x64'), dict(codecs=['cmvc-it2v'], preset='nosuch'), dict(codecs=['x265'], size='64x64', metrics=['ms_ssim'])])
def test_plans_that_cannot_be(clips, bad):
    with pytest.raises(CmvcError): plan(clips, **bad)

def test_the_same_point_twice_is_one(clips): assert len(plan([clips[0]]*2, ['x264']*2, {'x264': [51]})) == 1

def test_missing_clips():
    with pytest.raises(CmvcError, match='no such file'): plan(['no.mp4'], ['x265'])

@pytest.mark.parametrize('word,want', [('k3', (3, 0, None)), ('k5q20', (5, 20, None)), ('k2q-10t60', (2, -10, 60)), ('k4t9', (4, 0, 9))])
def test_our_points(word, want): assert tuple(our_point(word).values()) == want

def test_our_own_modes(clips, tmp_path, monkeypatch):
    preset = str(make_dummy_preset(tmp_path/'p', 0)); monkeypatch.setenv('OMP_NUM_THREADS', '1')
    job = lambda codec, point: Job(str(clips[0]), codec, point, 5, '64x64', FEW, preset)
    it2v, flow, tt2v = (measure(job(c, p)) for c, p in (('cmvc-it2v', 'k3q0t40'), ('cmvc-it2v+flow', 'k3q0'), ('cmvc-tt2v', 'k2')))
    assert it2v['notes']['keyframes'] == flow['notes']['keyframes'] and sum(it2v['notes']['kinds'].values()) == 8*it2v['bytes'] and tt2v['bytes'] < it2v['bytes']
    assert it2v['metrics']['psnr']['value'] != flow['metrics']['psnr']['value']
    bench._codec.cache_clear(); first, other, again = (measure(job('cmvc-it2v', p)) for p in ('k3q0t40', 'k2', 'k3q0t40')) # a process keeps its models, and nothing else
    assert all(r.pop('seconds') for r in (it2v, first, again)) and it2v == first == again and bench._codec.cache_info().hits == 2


def test_clips_without_a_name(tmp_path, monkeypatch):
    from PIL import Image
    (tmp_path/'in').mkdir(); [Image.fromarray(f).save(tmp_path/'in'/f'{i}.png') for i, f in enumerate(video(0, 5, 64, kind='pan')[0])]
    monkeypatch.chdir(tmp_path/'in')
    (job,) = plan(['.'], ['x264'], {'x264': [51]}, 5, '64x64', FEW)
    assert job.name.startswith('in/') and 'error' not in run_jobs([job], tmp_path/'out')[0] and len(saved(tmp_path/'out')) == 1

def test_children_stop_with_their_parent(clips, tmp_path):
    bench.work(tmp_path, [vars(j) for j in jobs_of(clips[:1])], parent=1)
    assert not list(tmp_path.rglob('*.json'))

def endless(folder):
    "A `vvencapp` that never ends in a folder for the PATH; the file in which it says its process."
    folder.mkdir(exist_ok=True); (folder/'vvencapp').write_text(f"#!/bin/sh\necho $$ > {folder}/.pid && mv {folder}/.pid {folder}/pid && exec sleep 600\n"); (folder/'vvencapp').chmod(0o755)
    return folder/'pid'

@pytest.mark.parametrize('how,status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_all_at_once(clips, tmp_path, how, status):
    pid = endless(tmp_path/'bin'); (tmp_path/'tmp').mkdir()
    p = subprocess.Popen([sys.executable, '-c', 'from cmvc_nb.cli import main; main()', 'bench', str(clips[0]), '-o', str(tmp_path/'out'), '--codecs', 'x264,vvenc-ra', '--points', 'x264=51', '--points', 'vvenc-ra=63', '--frames', '5',
                          '--size', '64x64', '--metrics', 'psnr', '--json'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(PATH=f"{tmp_path/'bin'}:{os.environ['PATH']}", TMPDIR=str(tmp_path/'tmp')),
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # which a shell takes from what it starts in the background
    for _ in range(1200):
        if pid.exists() or p.poll() is not None: break
        time.sleep(.05)
    assert p.poll() is None and pid.exists(), p.communicate()
    child = int((Path('/proc')/pid.read_text().strip()/'stat').read_text().rsplit(')', 1)[1].split()[1]); assert child != p.pid
    p.send_signal(how); out, err = p.communicate(timeout=20)
    assert p.returncode == status and not out and 'Traceback' not in err, (p.returncode, out, err)
    assert not Path(f'/proc/{child}').exists() and not Path(f'/proc/{pid.read_text().strip()}').exists() # the child, and the encoder that it ran
    assert len(saved(tmp_path/'out')) == 1 and not list((tmp_path/'tmp').iterdir()) and {p.suffix for p in (tmp_path/'out').rglob('*.*')} == {'.json', '.webp'}


# ---- report

def test_clips_of_one_name_stay_apart(clips, tmp_path):
    import shutil
    for d, c in zip('ab', clips): (tmp_path/d).mkdir(); shutil.copy(c, tmp_path/d/'c.mkv')
    run_jobs(plan([tmp_path/'a/c.mkv', tmp_path/'b/c.mkv'], ['x264', 'x265'], {c: [51, 40] for c in ('x264', 'x265')}, 5, '64x64', FEW), tmp_path/'out')
    rows = saved(tmp_path/'out')
    assert {r['clip'] for r in rows} == {'a/c.mkv', 'b/c.mkv'} and len(curve(rows, 'a/c.mkv', 'x264', 'psnr')[0]) == 2
    assert write_report(tmp_path/'out', 'x264').read_text().count('<img') == 2*2 + 2*3 # each has its own source

def test_what_is_not_ours_is_passed_over_and_kinds_are_not_mixed(run, clips, tmp_path):
    import shutil
    shutil.copytree(run[0], tmp_path/'out'); (tmp_path/'out/points/one/odd.json').write_text('{"a": 1}'); (tmp_path/'out/points/one/odder.json').write_text('[1]')
    assert len(saved(tmp_path/'out')) == 12 and write_report(tmp_path/'out', 'x264')
    run_jobs(plan(clips[:1], ['x264'], {'x264': [51]}, 5, '64x64', ('ssim',)), tmp_path/'out')
    (both,) = [r for r in one_each(saved(tmp_path/'out')) if (r['clip'], r['codec'], r['point']) == ('one', 'x264', '51')]
    assert set(both['metrics']) == {'psnr', 'gmsd', 'ssim'}
    run_jobs(plan(clips[:1], ['x264'], {'x264': [51]}, 4, '64x64', FEW), tmp_path/'out')
    with pytest.raises(CmvcError, match='4 frames of 64x64.*5 frames of 64x64.*a folder for each'): write_report(tmp_path/'out', 'x264')
    with pytest.raises(CmvcError, match='no such folder'): write_report(tmp_path/'nowhere')

def test_curves(run):
    out, jobs, rows, _ = run
    pts, line = curve(rows, 'one', 'x265', 'psnr')
    assert (np.diff(pts[:, 0]) > 0).all() and (pts == line).all() and len(pts) == 3
    ax = plot_curves(rows, 'gmsd', 'one'); assert ax.yaxis_inverted() and ax.get_xscale() == 'log' and len(ax.get_legend().get_texts()) == 2
    assert not plot_curves(rows, 'psnr', 'one').yaxis_inverted()

def test_bd_table_is_bd_rate(run):
    from cmvc_nb.bdrate import bd_rate
    rows = run[2]
    table = {(r['codec'], r['metric']): r for r in bd_table(rows, 'x264')}
    assert set(table) == {('x265', 'psnr'), ('x265', 'gmsd')}
    sides = [[(r['bpp'], r['metrics']['gmsd']['value']) for r in rows if (r['clip'], r['codec']) == ('one', c)] for c in ('x264', 'x265')]
    assert table['x265', 'gmsd']['clips']['one'] == str(bd_rate(*sides, 'gmsd', lower=True, clean='hull'))
    with pytest.raises(CmvcError, match="anchor 'vp9'"): bd_table(rows, 'vp9')

def test_no_overlap_is_said():
    row = lambda codec, point, size, psnr: dict(clip='a', codec=codec, point=point, bytes=size, bpp=size/1e5, metrics=dict(psnr=dict(value=psnr, better='higher')))
    rows = [row('x', i, 100*2**i, 20+i) for i in range(4)] + [row('y', i, 900*2**i, 40+i) for i in range(4)]
    (r,) = bd_table(rows, 'x')
    assert r['mean'] is None and r['counted'] == 0 and 'no overlap' in r['clips']['a'] and 'no overlap' in r['mean_curve']
    assert [r['bytes'] for r in matched(rows, 'a', 820)] == [800, 900]

def test_the_page(run, tmp_path):
    out, jobs, rows, _ = run
    page = write_report(out, 'x264'); text = page.read_text()
    assert text.count('<img') == 2*2 + 2*3 and 'BD-rate against x264' in text and 'http' not in text.replace('http-equiv', '') # curves, strips; nothing from elsewhere
    lines = list(csv.DictReader((out/'report.csv').open()))
    assert len(lines) == 12 and {'psnr', 'gmsd', 'bytes', 'error'} <= set(lines[0]) and float(lines[0]['bytes']) > 0
    with pytest.raises(CmvcError, match='no points measured'): write_report(tmp_path)
    with pytest.raises(CmvcError, match='no values of beauty'): write_report(out, 'x264', ['beauty'])

def test_failures_are_on_the_page(run, tmp_path):
    rows = run[2] + [dict(clip='<one>', codec='x', point='1', frames=5, size='64x64', error='it burst & died')]
    write_csv(rows, tmp_path/'r.csv')
    assert list(csv.DictReader((tmp_path/'r.csv').open()))[-1]['error'] == 'it burst & died'


# ---- two videos

def test_compare(clips, tmp_path):
    s = compare_videos(clips[0], clips[0], ['psnr', 'gmsd'], tmp_path/'s.png')
    assert float(s['gmsd']) == 0 and float(s['psnr']) > 78 and (tmp_path/'s.png').stat().st_size > 1000
    a = read_video(clips[0])[0]; b = np.roll(a, 2, 2)
    from cmvc_nb.metrics import metrics_of
    assert float(compare_videos(a, b, ['psnr'])['psnr']) == pytest.approx(float(metrics_of(a, b, ['psnr'])['psnr']), abs=1e-6)
    with pytest.raises(CmvcError, match='64x96|96x96'): compare_videos(a, a[:, :64])
    with pytest.raises(CmvcError, match='ends after 4 frames'): compare_videos(a, a[:4])
