"Workers of a Ray cluster that is this machine's: some die, drivers die, and each point is measured once."
import os, signal, socket, subprocess, sys, threading, time
from pathlib import Path
import numpy as np, pytest
from cmvc_nb import ray_bench
from cmvc_nb.bench import Job, plan, run_jobs, saved, source_frames
from cmvc_nb.errors import CmvcError
from cmvc_nb.ray_bench import ray_jobs, room
from cmvc_nb.video import write_video
from cmvc_nb.world import video
from test_bench import endless
ray = pytest.importorskip('ray') # the extra [ray]; [dev] has it

FEW = ('psnr', 'gmsd')


def below(top=None):
    "Process → its title, of all that descend from process `top` (this one)."
    parents, titles = {}, {}
    for p in Path('/proc').glob('[0-9]*'):
        try: parents[int(p.name)] = parent(p.name); titles[int(p.name)] = (p/'cmdline').read_bytes().replace(b'\0', b' ').decode().strip()
        except OSError: pass
    found, more = set(), {top or os.getpid()}
    while more: found |= more; more = {p for p, q in parents.items() if q in more} - found
    return {p: t for p, t in titles.items() if p in found and p != top}

def parent(pid): return int(Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[1])

def wait(what, why, seconds=60):
    until = time.time() + seconds
    while not (got := what()):
        assert time.time() < until, why
        time.sleep(.02)
    return got

def gone(pids): return not [p for p in pids if Path(f'/proc/{p}').exists() and ') Z ' not in Path(f'/proc/{p}/stat').read_text()]

@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    at = tmp_path_factory.mktemp('clips')/'one.mkv'
    write_video(at, video(0, 6, 96, kind='pan')[0], 25)
    return at

@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    "A cluster of two CPU cores, on which `vvencapp` never ends; its address, and the file with that program's process."
    from ray.cluster_utils import Cluster
    patch, pid = pytest.MonkeyPatch(), endless(tmp_path_factory.mktemp('endless'))
    patch.setenv('PATH', f"{pid.parent}:{os.environ['PATH']}"); patch.delenv('RAY_ADDRESS', raising=False); patch.setenv('RAY_AUTH_MODE', 'disabled') # and no token in the home
    c = Cluster(initialize_head=True, head_node_args=dict(num_cpus=2, include_dashboard=False, _system_config=dict(worker_niceness=0)))
    yield c.address, pid
    ray.shutdown(); c.shutdown(); patch.undo()

@pytest.fixture
def joined(cluster):
    "This process in the cluster."
    if not ray.is_initialized(): ray.init(cluster[0], log_to_driver=False, logging_level=40)

@pytest.fixture
def kept(monkeypatch):
    "The names of the points that are written."
    names, keep = [], ray_bench._keep
    monkeypatch.setattr(ray_bench, '_keep', lambda out, job, row: (names.append(job.name), keep(out, job, row)))
    return names

def jobs_of(clip, *points, codecs=('x264',)): return plan([clip], codecs, {c: points for c in codecs}, 5, '64x64', FEW)

def same(rows): return [{k: v for k, v in r.items() if k != 'seconds'} for r in rows]

def kill(times, killed):
    "End so many workers of ours in the middle of a point."
    def go():
        while len(killed) < times:
            for p, title in below().items():
                if title.startswith('ray::Worker.point') and p not in killed: os.kill(p, signal.SIGKILL); killed.append(p)
            time.sleep(.02)
    threading.Thread(target=go, daemon=True).start()


def test_a_worker_dies_and_nothing_is_lost(joined, clip, kept, tmp_path, monkeypatch):
    monkeypatch.chdir(clip.parent) # workers are elsewhere
    jobs, said, killed = [*jobs_of(clip.name, 51, 40, codecs=('x264', 'x265')), Job(clip.name, 'x264', '51', 99, '64x64', FEW)], [], []
    kill(1, killed)
    rows = ray_jobs(jobs, tmp_path/'ray', tell=lambda *a: said.append(a))
    assert killed and sorted(kept) == sorted(j.name for j in jobs) and [d for d, *_ in said] == [1, 2, 3, 4, 5]
    assert same(rows) == same(run_jobs(jobs, tmp_path/'here')) and ['error' in r for r in rows] == [False]*4 + [True] and '6 frames, 99 wanted' in rows[4]['error']
    files = lambda d: {p.relative_to(d): p.read_bytes() if p.suffix == '.webp' else 0 for p in d.rglob('*.*')}
    assert files(tmp_path/'ray') == files(tmp_path/'here') # pictures too, and no other file
    kept.clear(); assert same(ray_jobs(jobs[:4], tmp_path/'here')) == same(rows[:4]) and not kept

def test_a_point_that_kills_twice_has_a_reason_and_the_others_go_on(joined, clip, kept, tmp_path):
    jobs, killed = jobs_of(clip, 51, 40, 30), []
    kill(2, killed)
    rows = ray_jobs(jobs, tmp_path, workers=1)
    assert len(killed) == 2 and ['error' in r for r in rows] == [True, False, False] and 'two workers failed at it' in rows[0]['error'] and 'process has died' in rows[0]['error']
    assert len(kept) == 3 and len(saved(tmp_path)) == 3
    assert not any('error' in r for r in ray_jobs(jobs, tmp_path)) and len(kept) == 4 # what failed is tried again

def test_who_stops_leaves_nobody_at_work(joined, cluster, clip, tmp_path):
    pid = cluster[1]; pid.unlink(missing_ok=True)
    def stop(*_): wait(pid.exists, 'no second point'); raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): ray_jobs([*jobs_of(clip, 51), *jobs_of(clip, 63, codecs=('vvenc-ra',))], tmp_path, tell=stop)
    wait(lambda: gone([int(pid.read_text())]), 'the encoder lives on', 20)
    assert ray.is_initialized() and len(saved(tmp_path)) == 1 # the connection is ours

def test_a_mistake_of_ours_has_its_line(clip):
    row = ray_bench.Worker().point(job := Job(str(clip), 'x264', 'abc', 5, '64x64', FEW), source_frames(job)) # `plan` refuses it
    assert 'ValueError' in row['error'] and 'abc' in row['error']

def test_other_versions_and_too_few_machines(joined, clip, tmp_path, monkeypatch):
    with pytest.raises(CmvcError, match='no machine of the cluster has a CPU core and 1 GPUs'): ray_jobs(jobs_of(clip, 51), tmp_path, workers=2, gpus=1)
    monkeypatch.setattr('cmvc_nb.__version__', '9.9')
    with pytest.raises(CmvcError, match='has cmvc_nb .*, this machine 9.9'): ray_jobs(jobs_of(clip, 51), tmp_path)
    wait(lambda: not [t for t in below().values() if t.startswith('ray::Worker')], 'the workers live on') # and nothing holds the cluster's cores

def test_a_worker_that_cannot_start(joined, clip, tmp_path, monkeypatch):
    class Ill:
        def __init__(self): raise RuntimeError('no library of that name')
        def hello(self): pass
    monkeypatch.setattr(ray_bench, 'Worker', Ill)
    with pytest.raises(CmvcError, match='Ray cannot start a worker: .*no library of that name'): ray_jobs(jobs_of(clip, 51), tmp_path)

def bench(clip, out, *more): return subprocess.Popen([sys.executable, '-c', 'from cmvc_nb.cli import main; main()', 'bench', str(clip), '-o', str(out), '--codecs', 'x264,vvenc-ra', '--points', 'x264=51,40', '--points', 'vvenc-ra=63',
                                                      '--frames', '5', '--size', '64x64', '--metrics', ','.join(FEW), '-j', '1', '--json', *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(RAY_worker_niceness='0'))

def test_a_driver_is_killed_and_another_goes_on(cluster, clip, kept, tmp_path):
    address, pid = cluster; pid.unlink(missing_ok=True)
    p = bench(clip, tmp_path, '--ray', address)
    wait(lambda: pid.exists() or p.poll() is not None, 'no third point'); assert p.poll() is None, p.communicate()
    p.kill(); p.communicate()
    wait(lambda: gone([int(pid.read_text())]), 'the encoder lives on')
    assert len(saved(tmp_path)) == 2
    assert not any('error' in r for r in ray_jobs(jobs_of(clip, 51, 40, 30), tmp_path, address)) and len(kept) == 1

def test_sigterm_ends_a_cluster_of_our_own(cluster, clip, tmp_path):
    pid = cluster[1]; pid.unlink(missing_ok=True)
    p = bench(clip, tmp_path, '--ray', 'local')
    wait(lambda: pid.exists() or p.poll() is not None, 'no third point'); assert p.poll() is None, p.communicate()
    first = int(pid.read_text()); pid.unlink(); os.kill(parent(first), signal.SIGKILL); wait(pid.exists, 'no second try') # Ray says something about it: not where results go
    ours = [*below(p.pid), first, int(pid.read_text())]; assert len(ours) > 4
    p.terminate(); out, err = p.communicate(timeout=60)
    assert p.returncode == 143 and not out and 'Traceback' not in err, (p.returncode, out, err)
    wait(lambda: gone(ours), 'processes live on', 10)
    assert len(saved(tmp_path)) == 2 and {p.suffix for p in tmp_path.rglob('*.*')} == {'.json', '.webp'}


def test_clusters_that_are_not_there(clip, tmp_path, monkeypatch):
    if ray.is_initialized(): ray.shutdown()
    from test_cli import complaint
    args = ['bench', clip, '-o', 'out', '--codecs', 'x264', '--frames', '5', '--size', '64x64', '--ray']
    for bad, say in (('bananas', 'not an address'), ('127.0.0.1:1', 'refused'), ('', 'not an address'), ('localhost:99999', 'not an address')): assert say in complaint(tmp_path, *args, bad) and not ray.is_initialized()
    monkeypatch.setenv('RAY_ADDRESS', '127.0.0.1:2'); assert "'127.0.0.1:2'" in complaint(tmp_path, *args, 'auto')
    monkeypatch.setattr(ray_bench, 'PATIENCE', 4)
    with socket.create_server(('127.0.0.1', 0)) as mute: assert 'did not answer as Ray within 4 s' in complaint(tmp_path, *args, f'127.0.0.1:{mute.getsockname()[1]}')
    assert 'goes with --ray' in complaint(tmp_path, *args[:-1], '--gpus-per-worker', '1') and 'GPUs a worker' in complaint(tmp_path, *args, 'local', '--gpus-per-worker', '1.5')

def test_without_ray(clip, tmp_path, monkeypatch):
    from test_cli import complaint
    monkeypatch.setitem(sys.modules, 'ray', None)
    assert "pip install 'cmvc_nb[ray]'" in complaint(tmp_path, 'bench', clip, '-o', 'out', '--codecs', 'x264', '--frames', '5', '--size', '64x64', '--ray', 'local')

@pytest.mark.parametrize('gpus,want', [(0, 40), (.1, 24), (.3, 10), (.4, 8), (.5, 8), (1, 6), (2, 3), (4, 1), (8, 0)])
def test_room(gpus, want):
    node = lambda alive=True, **have: dict(Alive=alive, Resources={k: float(v) for k, v in have.items()} | {'memory': 1e9})
    assert room([node(CPU=4, GPU=4), node(CPU=32, GPU=2), node(CPU=4), node(GPU=8), node(False, CPU=8, GPU=8)], gpus) == want

@pytest.mark.parametrize('bad', [-1, 1.5, 2.25])
def test_shares_that_cannot_be(bad):
    with pytest.raises(CmvcError, match='GPUs a worker'): room([], bad)

def test_a_preset_in_a_folder_is_told_from_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); (tmp_path/'mine').mkdir(); (tmp_path/'tiny').mkdir()
    assert [ray_bench._afar(Job('a', 'x264', '1', preset=p)).preset for p in ('mine', 'tiny', 'owner/name')] == [str(tmp_path/'mine'), 'tiny', 'owner/name']
