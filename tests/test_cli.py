"The command: every mistake of a user is one line and exit status 2; results can be read by a script."
import json, os, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from cmvc_nb import cli
from cmvc_nb.video import read_video, write_video
from cmvc_nb.world import video
from dummies_models import make_dummy_preset

FAST = '--size 64 --steps 3 --lora-steps 2 --strength 0.5 --device cpu --quiet'.split()


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    d = tmp_path_factory.mktemp('cli')
    make_dummy_preset(d/'models', 0)
    write_video(d/'clip.mkv', video(1, 9, 64, kind='pan')[0], 25)
    assert run(d, 'encode', 'clip.mkv', '-o', 'clip.cmvc', '--texts', '--interval', '4', '--preset', 'models', *FAST)[0] == 0
    return d

def run(where, *args):
    "Status, standard output, standard error of `cmvc args` in folder `where`, in this process."
    import contextlib, io
    out, err, old, argv = io.StringIO(), io.StringIO(), os.getcwd(), sys.argv
    os.chdir(where); sys.argv = ['cmvc', *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try: cli.main(); code = 0
            except SystemExit as e: code = e.code or 0
    finally: os.chdir(old); sys.argv = argv
    return code, out.getvalue(), err.getvalue()

def complaint(where, *args):
    "The one line that a failing command prints; nothing may be left behind."
    before = sorted(p.name for p in Path(where).iterdir())
    code, out, err = run(where, *args)
    assert code == 2 and 'Traceback' not in err + out, (code, out, err)
    assert len([l for l in err.splitlines() if l.startswith('cmvc: ') and 'computing on' not in l]) == 1, err
    assert sorted(p.name for p in Path(where).iterdir()) == before
    return err.strip().splitlines()[-1]


def test_the_file_alone_decodes_alike_in_other_processes_and_folders(place, tmp_path):
    frames = []
    for name in ('a', 'b'):
        (tmp_path/name).mkdir(); (tmp_path/name/'f.cmvc').write_bytes((place/'clip.cmvc').read_bytes())
        r = subprocess.run([sys.executable, '-c', 'from cmvc_nb.cli import main; main()', 'decode', 'f.cmvc', '-o', 'f.mkv', '--preset', str(place/'models'), '--device', 'cpu', '-q'],
                           cwd=tmp_path/name, capture_output=True, text=True)
        assert r.returncode == 0, r.stderr
        frames.append(read_video(tmp_path/name/'f.mkv')[0])
    assert (frames[0] == frames[1]).all() and frames[0].shape == (9, 64, 64, 3)

def test_info_json_sums_to_the_file(place):
    code, out, _ = run(place, 'info', 'clip.cmvc', '--json')
    d = json.loads(out)
    assert code == 0 and d['bytes'] == (place/'clip.cmvc').stat().st_size and sum(d['rate']['kinds'].values()) == 8*d['bytes']
    assert d['frames'] == 9 and d['keyframes'][0] == 0 and d['keyframes'][-1] == 8 and 'scene' in d['texts'][0]
    assert run(place, 'info', 'clip.cmvc')[0] == 0

def test_convert(place):
    code, out, err = run(place, 'convert', 'clip.cmvc', '-o', 'words.cmvc', '--mode', 'tt2v', '--preset', 'models', '--json')
    assert code == 0, err
    assert json.loads(out)['bytes'] == (place/'words.cmvc').stat().st_size < (place/'clip.cmvc').stat().st_size
    assert run(place, 'decode', 'words.cmvc', '-o', 'words.mkv', '--preset', 'models', '--device', 'cpu', '-q')[0] == 0
    assert 'tt2v already' in complaint(place, 'convert', 'words.cmvc', '-o', 'x.cmvc', '--preset', 'models')

def test_pipes(place):
    me = [sys.executable, '-c', 'from cmvc_nb.cli import main; main()']
    write_video(place/'in.y4m', read_video(place/'clip.mkv')[0], 25)
    r = subprocess.run([*me, 'encode', '-', '-o', 'p.cmvc', '--preset', 'models', *FAST], cwd=place, stdin=open(place/'in.y4m', 'rb'), capture_output=True)
    assert r.returncode == 0, r.stderr
    r = subprocess.run([*me, 'decode', 'p.cmvc', '-o', '-', '--preset', 'models', '--device', 'cpu'], cwd=place, capture_output=True)
    assert r.returncode == 0 and r.stdout.startswith(b'YUV4MPEG2')
    (place/'back.y4m').write_bytes(r.stdout)
    assert len(read_video(place/'back.y4m')[0]) == 9

def test_clips(place):
    assert run(place, 'decode', 'clip.cmvc', '-o', 'part.mkv', '--clips', '1:2', '--preset', 'models', '--device', 'cpu', '-q')[0] == 0
    k = json.loads(run(place, 'info', 'clip.cmvc', '--json')[1])['keyframes']; assert len(k) > 2 and len(read_video(place/'part.mkv')[0]) == k[2]-k[1]+1
    assert '0:2' in complaint(place, 'decode', 'clip.cmvc', '-o', 'x.mkv', '--clips', '1:9', '--preset', 'models')
    assert 'clips' in complaint(place, 'decode', 'clip.cmvc', '-o', 'x.mkv', '--clips', 'one', '--preset', 'models')

def test_models():
    code, out, _ = run('.', 'models', '--json')
    ps = {p['name']: p for p in json.loads(out)}
    assert code == 0 and {'tiny', 'sd15'} <= set(ps) and {d['state'] for d in ps['tiny']['parts'].values()} == {'embedded'} and all('licence' in d for p in ps.values() for d in p['parts'].values())
    code, out, _ = run('.', 'models')
    assert code == 0 and all(name + ': ' in out for name in ps)

def test_models_pull(place, monkeypatch):
    code, out, _ = run(place, 'models', 'pull', 'models', '--json')
    assert code == 0 and set(json.loads(out)) == {'diffusion', 'motion_adapter', 'clip'}
    import huggingface_hub
    def no_network(*a, **k): raise OSError('Name or service not known')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', no_network)
    assert 'Name or service not known' in complaint(place, 'models', 'pull', 'sd15') and 'preset' in complaint(place, 'models', 'pull', 'nonsense')

def test_describe_edit_encode(place):
    code, out, _ = run(place, 'describe', 'clip.mkv', '-o', 'words.yaml', '--interval', '4', '--preset', 'models', '--device', 'cpu', '--size', '64', '--json')
    said = json.loads(out)
    assert code == 0 and said['keyframes'][0] == 0 and said['keyframes'][-1] == 8 and len(said['motions']) == len(said['texts'])-1
    page = (place/'words.yaml').read_text(); (place/'words.yaml').write_text(page.replace('The camera', 'At dusk, the camera'))
    assert run(place, 'encode', 'clip.mkv', '-o', 'told.cmvc', '--words', 'words.yaml', '--preset', 'models', *FAST)[0] == 0
    code, out, _ = run(place, 'info', 'told.cmvc', '--json')
    assert code == 0 and json.loads(out)['keyframes'] == said['keyframes'] and any('At dusk' in t for t in json.loads(out)['texts'])
    assert 'words' in complaint(place, 'encode', 'clip.mkv', '-o', 'x.cmvc', '--words', 'words.yaml', '--keyframes', '3', '--preset', 'models', *FAST)
    assert 'no.yaml' in complaint(place, 'encode', 'clip.mkv', '-o', 'x.cmvc', '--words', 'no.yaml', '--preset', 'models', *FAST)
    complaint(place, 'describe', 'clip.mkv', '-o', 'no/such/w.yaml', '--preset', 'models', '--device', 'cpu')

@pytest.mark.parametrize('command', [[], ['encode'], ['decode'], ['info'], ['convert'], ['describe'], ['models'], ['models', 'pull'], ['compare'], ['bench'], ['report'], ['demo']])
def test_help(command):
    code, out, err = run('.', *command, '--help')
    assert code == 0 and 'Usage' in out
    assert not command or 'Example' in out

def test_help_imports_nothing_heavy():
    r = subprocess.run([sys.executable, '-c', 'import sys; sys.argv=["cmvc","--help"]\nfrom cmvc_nb.cli import main\ntry: main()\nexcept SystemExit: pass\n'
                        'assert not {"torch", "numpy", "av", "cv2"} & set(sys.modules), "heavy"'], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr


def test_bad_videos(place):
    (place/'empty.mp4').write_bytes(b''); (place/'noise.mp4').write_bytes(bytes(range(256))*40)
    (place/'cut.mkv').write_bytes((place/'clip.mkv').read_bytes()[:200])
    enc = lambda clip, *a: complaint(place, 'encode', clip, '-o', 'x.cmvc', '--preset', 'models', *FAST, *a)
    for clip in ('missing.mp4', 'empty.mp4', 'noise.mp4', 'cut.mkv', '.'): assert clip in enc(clip)
    import av
    with av.open(str(place/'sound.wav'), 'w') as c:
        s = c.add_stream('pcm_s16le', rate=8000); f = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout='mono'); f.rate = 8000
        c.mux(s.encode(f)); c.mux(s.encode())
    assert 'sound.wav' in enc('sound.wav')
    write_video(place/'one.mkv', np.zeros((1, 64, 64, 3), np.uint8), 25)
    assert 'one frame' in enc('one.mkv')
    assert 'keyframes' in enc('clip.mkv', '--keyframes', '10')
    assert 'size' in enc('clip.mkv', '--size', 'big')

def test_bad_output(place):
    for out in ('no/such/x.cmvc', '.'): complaint(place, 'encode', 'clip.mkv', '-o', out, '--preset', 'models', *FAST)
    for out in ('no/such/x.mp4', 'x.xyz', 'x'): complaint(place, 'decode', 'clip.cmvc', '-o', out, '--preset', 'models')

def test_bad_options(place):
    for args in (['encode', 'clip.mkv', '-o', 'x.cmvc', '--mode', 'x'], ['encode', 'clip.mkv'], ['nonsense'], ['decode', 'clip.cmvc', '-o', 'x.mkv', '--clip', '1']):
        code, out, err = run(place, *args); assert code == 2 and 'Traceback' not in err
    assert 'preset' in complaint(place, 'decode', 'clip.cmvc', '-o', 'x.mkv', '--preset', 'no-such')
    assert 'models' in complaint(place, 'decode', 'clip.cmvc', '-o', 'x.mkv')      # made with other weights
    assert 'device' in complaint(place, 'decode', 'clip.cmvc', '-o', 'x.mkv', '--preset', 'models', '--device', 'cuda:7')
    assert 'offload' in complaint(place, 'decode', 'clip.cmvc', '-o', 'x.mkv', '--preset', 'models', '--device', 'cpu', '--offload', 'model')
    for part, say in (('diffusion', 'role=where'), ('colour=x', "part 'colour'"), ('=x', "part ''"), ('diffusion=no/such/folder', 'does not exist')):
        assert say in complaint(place, 'decode', 'clip.cmvc', '-o', 'x.mkv', '--preset', 'models', '--device', 'cpu', '--part', part)

@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_any_byte_changed_or_cut(place, at, flip, cut):
    data = bytearray((place/'clip.cmvc').read_bytes()); i = int(at*len(data))
    if cut: data = data[:i]
    else: data[i] ^= flip
    (place/'bad.cmvc').write_bytes(data)
    complaint(place, 'info', 'bad.cmvc')

def test_damaged_file_does_not_decode(place):
    data = bytearray((place/'clip.cmvc').read_bytes()); data[-3] ^= 1
    (place/'bad.cmvc').write_bytes(data)
    assert 'clip' in complaint(place, 'decode', 'bad.cmvc', '-o', 'x.mkv', '--preset', 'models')
    code, out, err = run(place, 'decode', 'bad.cmvc', '-o', 'saved.mkv', '--salvage', '--preset', 'models', '--device', 'cpu', '-q')
    assert code == 0 and 'checksum' in err and len(read_video(place/'saved.mkv')[0]) == 9

def test_compare_bench_report(place):
    code, out, _ = run(place, 'compare', 'clip.mkv', 'clip.mkv', '--metrics', 'psnr,gmsd', '--sheet', 'sheet.png', '--json')
    assert code == 0 and json.loads(out)['gmsd']['value'] == 0 and (place/'sheet.png').exists()
    write_video(place/'short.mkv', read_video(place/'clip.mkv', 4)[0], 25)
    assert 'ends after 4' in complaint(place, 'compare', 'clip.mkv', 'short.mkv') and 'no metric' in complaint(place, 'compare', 'clip.mkv', 'clip.mkv', '--metrics', 'beauty,psnr')
    args = ['bench', 'clip.mkv', '-o', 'results', '--codecs', 'x264,x265', '--frames', '5', '--size', '64x64', '--metrics', 'psnr,gmsd', '--json']
    code, out, _ = run(place, *args, '--points', 'x264=51,40', '--points', 'x265=51,40')
    assert code == 0 and json.loads(out) == dict(points=4, failed=[])
    assert run(place, 'report', 'results', '--anchor', 'x264')[0] == 0 and (place/'results/report.html').exists()
    code, out, _ = run(place, 'bench', 'clip.mkv', 'short.mkv', *args[2:], '--points', 'x264=51', '--points', 'x265=51')
    assert code == 1 and {'4 frames, 5 wanted' in f['error'] for f in json.loads(out)['failed']} == {True} and json.loads(out)['points'] == 4 # the others went on, and the status tells
    assert 'crf from 51' in complaint(place, *args, '--points', 'x264=400')
    assert 'x267' in complaint(place, 'bench', 'clip.mkv', '-o', 'results', '--codecs', 'x267') and 'rate' in complaint(place, 'report', 'results', '--rate', 'bananas')

def test_inputs_are_not_overwritten(place):
    before = {n: (place/n).read_bytes() for n in ('clip.mkv', 'clip.cmvc')}
    for args in (['encode', 'clip.mkv', '-o', 'clip.mkv', *FAST], ['describe', 'clip.mkv', '-o', 'clip.mkv', '--device', 'cpu'], ['decode', 'clip.cmvc', '-o', 'clip.cmvc'], ['convert', 'clip.cmvc', '-o', './clip.cmvc']):
        assert 'overwritten' in complaint(place, *args, '--preset', 'models')
    assert 'overwritten' in complaint(place, 'compare', 'clip.mkv', 'clip.mkv', '--sheet', 'clip.mkv')
    assert before == {n: (place/n).read_bytes() for n in before}
    assert 'CODEC=POINT' in complaint(place, 'bench', 'clip.mkv', '-o', 'r', '--codecs', 'x264', '--points', 'x264=')


@pytest.mark.parametrize('kind', ['MemoryError', 'OutOfMemoryError', 'RuntimeError'])
def test_memory_that_runs_out_anywhere_is_one_line(monkeypatch, capsys, kind):
    "Inside a describer, a generator or a search: what a GPU, the CPU's allocator and Python say of it."
    import torch
    from cmvc_nb import cli
    error = {'MemoryError': MemoryError(), 'OutOfMemoryError': torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.'),
             'RuntimeError': RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")}[kind]
    def app(**options): raise error
    monkeypatch.setattr(cli, 'app', app)
    with pytest.raises(SystemExit) as e: cli.main()
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.count('\n') == 1 and 'not enough memory' in said and '--offload' in said
    error = RuntimeError('another bug')
    with pytest.raises(RuntimeError): cli.main()
