"""Metrics with learned weights: seeded random weights in the published layouts, independent computations, what is said when there are none."""
import hashlib, json, os, socket, stat, sys, textwrap

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from skimage import data

from cmvc_nb import video_metrics as vm
from cmvc_nb.errors import CmvcError
from cmvc_nb.metrics import Meter, NotAvailable, metrics_of
from cmvc_nb.models import load_models
from cmvc_nb.video_metrics import (GROUPS, LEARNED, NETS, Spread, consistency, dino_vit, dists, fid_inception, find_weights, frechet,
                                   kernel_distance, read_weights)
from dummies import _seeded
from dummies_models import make_dummy_clip, make_dummy_preset

torch.set_num_threads(1)
FILM = np.stack([data.astronaut()[60:124, 180+3*i:244+3*i] for i in range(5)])
BLUR = np.stack([cv2.GaussianBlur(f, (0, 0), 1.5) for f in FILM])
NOISE = np.clip(FILM + np.random.default_rng(0).normal(0, 25, FILM.shape), 0, 255).round().astype(np.uint8)


def planes(v): return torch.from_numpy(v).permute(0, 3, 1, 2).float()

def random_state(module, seed=0):
    "Seeded weights of the right sizes for a module on the meta device."
    g, out = torch.Generator().manual_seed(seed), {}
    for k, v in module.state_dict().items():
        if not v.is_floating_point(): out[k] = torch.zeros(v.shape, dtype=v.dtype)
        elif k.endswith('running_var') or v.ndim == 1 and k.endswith('weight'): out[k] = .5 + torch.rand(v.shape, generator=g)
        elif v.ndim < 2: out[k] = .1*torch.randn(v.shape, generator=g)
        else: out[k] = torch.randn(v.shape, generator=g)*(2/v[0].numel())**.5
    return out

def meta(make):
    with torch.device('meta'): return make()


@pytest.fixture(scope='session')
def weights(tmp_path_factory):
    "Files for all four networks; VGG and Inception in half precision."
    from timm.models.vision_transformer import VisionTransformer
    from torchvision.models import Inception3, alexnet, vgg16
    folder, files = tmp_path_factory.mktemp('weights'), {}
    nets = dict(alexnet=lambda: alexnet(weights=None).features, vgg16=lambda: vgg16(weights=None).features,
                inception=lambda: Inception3(num_classes=1008, aux_logits=False, init_weights=False),
                dino=lambda: VisionTransformer(32, 8, num_classes=0, embed_dim=128, depth=2, num_heads=2))
    for i, (name, make) in enumerate(nets.items()):
        state = random_state(meta(make), i)
        if name in ('alexnet', 'vgg16'): state = {f'features.{k}': v for k, v in state.items()} | {'classifier.0.bias': torch.zeros(3)} # the file holds the classifier too
        if name == 'dino': state = {k: .5*v for k, v in state.items()}
        files[name] = folder/f'{name}.safetensors'
        save_file({k: v.half() if name in ('vgg16', 'inception') and v.is_floating_point() else v for k, v in state.items()}, files[name])
    return files


@pytest.fixture
def bare(monkeypatch, tmp_path):
    "A machine without weights, network or ffmpeg."
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path/'hub'))
    monkeypatch.delenv('CMVC_WEIGHTS', raising=False)
    monkeypatch.delenv('CMVC_FFMPEG', raising=False)
    monkeypatch.setenv('PATH', str(tmp_path))
    def no(*a, **k): raise AssertionError('asked the network')
    monkeypatch.setattr(socket, 'socket', no)
    monkeypatch.setattr(socket, 'create_connection', no)
    return tmp_path


# ---- what is missing

def test_missing_weights_are_a_reason(bare):
    s = metrics_of(FILM, BLUR, 'all', device='cpu')
    for name, net in [('lpips', 'alexnet'), ('dists', 'vgg16'), ('fid', 'inception'), ('kid', 'inception'), ('subject', 'dino')]:
        assert s[name].value is None and NETS[net][0] in s[name].why and NETS[net][1] in s[name].why and f"weights={{'{net}'" in s[name].why
        assert str(bare/'hub/checkpoints') in s[name].why.replace('~', os.path.expanduser('~'))
        with pytest.raises(NotAvailable): float(s[name])
    assert 'CMVC_FFMPEG' in s['vmaf'].why and 'drawn scenes' in s['clip_iqa'].why and '176' in s['ms_ssim'].why
    assert all(s[n].value is not None for n in ('psnr', 'clip_sim', 'background', 'flicker'))
    json.dumps(s.to_dict(), allow_nan=False)

def test_where_weights_are_looked_for(bare, monkeypatch, weights):
    hub = bare/'hub/checkpoints'
    hub.mkdir(parents=True)
    with pytest.raises(NotAvailable): find_weights('alexnet')
    (hub/NETS['alexnet'][0]).write_bytes(b'x')
    assert find_weights('alexnet') == hub/NETS['alexnet'][0]
    monkeypatch.setenv('CMVC_WEIGHTS', str(weights['alexnet'].parent))
    assert find_weights('alexnet') == weights['alexnet']
    assert find_weights('alexnet', hub/NETS['alexnet'][0]) == hub/NETS['alexnet'][0]
    with pytest.raises(CmvcError, match='is not a file') as e: find_weights('alexnet', bare/'nowhere')
    assert not isinstance(e.value, NotAvailable) # a wrong argument is a mistake, not an absence

def test_published_pickles(bare, monkeypatch, weights):
    state, _ = read_weights('alexnet', weights['alexnet'])
    def publish(obj, digits=None):
        torch.save(obj, bare/'raw')
        sha = hashlib.sha256((bare/'raw').read_bytes()).hexdigest()
        path = bare/f'alexnet-owt-{digits or sha[:8]}.pth'
        (bare/'raw').rename(path)
        monkeypatch.setitem(NETS, 'alexnet', (path.name, 'https://example.org'))
        return path
    good, sha = read_weights('alexnet', publish(state))
    assert len(sha) == 16 and all(torch.equal(good[k], state[k]) for k in state)
    with pytest.raises(CmvcError, match='its name promises 00000000'): read_weights('alexnet', publish(state, '00000000'))
    ran = bare/'ran'
    class Bad:
        def __reduce__(self): return open, (str(ran), 'w')
    with pytest.raises(CmvcError, match='cannot be read'): read_weights('alexnet', publish({'features.0.weight': Bad()}))
    assert not ran.exists()
    other = bare/'mine.pth'
    torch.save(state, other)
    with pytest.raises(CmvcError, match='convert it to safetensors'): read_weights('alexnet', other)

def test_damaged_and_foreign_weights(bare, weights):
    (bare/'alexnet.safetensors').write_bytes(weights['alexnet'].read_bytes()[:1000])
    with pytest.raises(CmvcError, match='cannot be read'): metrics_of(FILM, FILM, ['lpips'], device='cpu', weights=dict(alexnet=bare/'alexnet.safetensors'))
    for name, net, file in [('lpips', 'alexnet', 'vgg16'), ('dists', 'vgg16', 'alexnet'), ('fid', 'inception', 'alexnet'), ('subject', 'dino', 'alexnet')]:
        with pytest.raises(CmvcError, match=f'weights of {net}'): metrics_of(FILM, FILM, [name], device='cpu', weights={net: weights[file]})


# ---- LPIPS and DISTS

def test_lpips(bare, weights):
    import lpips
    from pathlib import Path
    state, sha = read_weights('alexnet', weights['alexnet'])
    heads = torch.load(Path(lpips.__file__).parent/'weights/v0.1/alex.pth', map_location='cpu', weights_only=True)
    def maps(v):
        h, out = (v/127.5 - 1 - torch.tensor([-.030, -.088, -.188])[:, None, None])/torch.tensor([.458, .448, .450])[:, None, None], []
        conv = lambda h, i, **k: F.relu(F.conv2d(h, state[f'features.{i}.weight'], state[f'features.{i}.bias'], **k))
        for i, k in [(0, dict(stride=4, padding=2)), (3, dict(padding=2)), (6, dict(padding=1)), (8, dict(padding=1)), (10, dict(padding=1))]:
            h = conv(F.max_pool2d(h, 3, 2) if i in (3, 6) else h, i, **k)
            out.append(h/(h.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return out
    want = sum((heads[f'lin{i}.model.1.weight']*(p - q).square()).sum(1).mean((1, 2)) for i, (p, q) in enumerate(zip(maps(planes(FILM)), maps(planes(BLUR)))))
    before = torch.get_rng_state()
    s = metrics_of(FILM, BLUR, ['lpips'], device='cpu', weights=weights)['lpips']
    assert s.frames == pytest.approx(want.numpy(), rel=1e-4) and s.value > 0 and s.better == 'lower'
    assert (s.net, s.sha256, s.version) == ('alex v0.1', sha, 'lpips 0.1.4') and sha == hashlib.sha256(weights['alexnet'].read_bytes()).hexdigest()[:16]
    assert torch.equal(before, torch.get_rng_state()) # the package draws random weights; not at our cost

def test_dists(bare, weights, monkeypatch):
    import torchmetrics.functional.image.dists as theirs, torchvision
    state, _ = read_weights('vgg16', weights['vgg16'])
    net = meta(lambda: torchvision.models.vgg16(weights=None))
    net.features.load_state_dict({k[9:]: v for k, v in state.items() if k.startswith('features')}, assign=True)
    monkeypatch.setattr(theirs, 'vgg16', lambda weights: net)
    with torch.inference_mode(): want = theirs.DISTSNetwork()(planes(FILM[:2])/255, planes(BLUR[:2])/255)
    s = metrics_of(FILM[:2], BLUR[:2], ['dists'], device='cpu', weights=weights)['dists']
    assert s.frames == pytest.approx(want.numpy(), abs=1e-5) and s.value > .001

@pytest.mark.parametrize('names', [['lpips', 'dists', 'clip_sim'], ['fid', 'kid']])
def test_sense(bare, weights, names):
    same, bad = (metrics_of(FILM[:2], v[:2], names, device='cpu', weights=weights) for v in (FILM, NOISE))
    for n in names:
        assert same[n].value == pytest.approx(same[n].perfect, abs=1e-4)
        assert bad[n].value > same[n].value + 1e-5 if same[n].better == 'lower' else bad[n].value < same[n].value - 1e-5


# ---- FID and KID

def test_inception_is_the_published_one(weights):
    "Names and shapes of the file of 2015; pooling leaves out the border, the last block takes a maximum."
    state, _ = read_weights('inception', weights['inception'])
    lines = '\n'.join(sorted(f'{k} {tuple(v.shape)}' for k, v in state.items() if not k.endswith('num_batches_tracked')))
    assert hashlib.sha256(lines.encode()).hexdigest() == 'd84f693f2abd7fea61cb31c87d3b2f268bf707c1bae1db219afdad3363959cb0'
    net = fid_inception({k: v for k, v in state.items() if not k.endswith('num_batches_tracked')})
    inside, top = lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), lambda x: F.max_pool2d(x, 3, 1, 1)
    for name, width, pool, last in [('Mixed_5b', 192, inside, 32), ('Mixed_6c', 768, inside, 192), ('Mixed_7b', 1280, inside, 192), ('Mixed_7c', 2048, top, 192)]:
        m, x = getattr(net, name), torch.rand(1, width, 7, 7, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            got = m(x)[:, -last:]
            want = F.relu(F.batch_norm(F.conv2d(pool(x), m.branch_pool.conv.weight), m.branch_pool.bn.running_mean, m.branch_pool.bn.running_var, m.branch_pool.bn.weight, m.branch_pool.bn.bias, eps=.001))
        assert torch.allclose(got, want, atol=1e-4), name

def test_spread_and_frechet():
    from scipy.linalg import sqrtm
    rng = np.random.default_rng(0)
    for n, d in [(40, 6), (5, 6), (6, 6), (7, 6)]:
        a, b = rng.normal(0, 1, (n, d)) @ rng.normal(0, 1, (d, d)), rng.normal(.5, 2, (n, d))
        p, q = Spread(), Spread()
        for i in range(0, n, 4): p.add(a[i:i+4]); q.add(b[i:i+4])
        assert p.mean == pytest.approx(a.mean(0)) and p.root.T @ p.root == pytest.approx(np.cov(a.T)) and p.r.shape[0] <= d + 1
        root = sqrtm(np.cov(a.T) @ np.cov(b.T) + 1e-12*np.eye(d))
        want = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2*root.real)
        assert frechet(p, q) == pytest.approx(want, abs=1e-4*want + 1e-4) and frechet(p, p) == pytest.approx(0, abs=1e-9)

def test_fid_is_torchmetrics_fid():
    from torchmetrics.image.fid import _compute_fid
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, (200, 8)), rng.normal(.3, 1.5, (200, 8))
    p, q = Spread(), Spread()
    p.add(a); q.add(b)
    t = torch.from_numpy
    assert frechet(p, q) == pytest.approx(float(_compute_fid(t(a.mean(0)), t(np.cov(a.T)), t(b.mean(0)), t(np.cov(b.T)))), rel=1e-6)

def test_kernel_distance():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (6, 4)), rng.normal(.5, 1, (6, 4))
    k = lambda a, b: (a @ b/4 + 1)**3
    want = sum(k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i in range(6) for j in range(6) if i != j)/30
    assert kernel_distance(x, y) == pytest.approx(want) and kernel_distance(x, x) == 0
    from torchmetrics.image.kid import poly_mmd
    x, y = rng.normal(0, 1, (400, 4)), rng.normal(.5, 1, (400, 4)) # theirs, with the partners in the cross term, comes near for many
    assert kernel_distance(x, y) == pytest.approx(float(poly_mmd(torch.from_numpy(x), torch.from_numpy(y))), rel=.05)

def test_fid_and_kid_of_a_stream(bare, weights):
    calls, m = [], Meter(['fid', 'kid'], device='cpu', weights=weights)
    f, sha = m.setup.shared['inception']
    for g in m.gauges.values(): g.f = lambda v: (calls.append(len(v)), f(v))[1]
    for i, j in [(0, 1), (1, 3)]: m.feed(FILM[i:j], BLUR[i:j])
    assert calls == [1, 1, 2, 2] # once for both metrics
    s, (a, b) = m.finish(), (f(v[:3]) for v in (FILM, BLUR))
    p, q = Spread(), Spread()
    p.add(a); q.add(b)
    assert a.shape == (3, 2048) and s['fid'].value == pytest.approx(frechet(p, q), rel=1e-3) and s['kid'].value == pytest.approx(kernel_distance(a, b), rel=1e-3, abs=1e-6)
    assert all('2015' in s[n].net and s[n].sha256 == sha for n in ('fid', 'kid'))

def test_kid_keeps_a_bounded_seeded_sample():
    class G(vm._Sets):
        def __init__(self): self.kind, self.most, self.n, self.kept, self.rng, self.f = 'kid', 50, 0, [], np.random.default_rng(0), None
    class P:
        def __init__(self, i): self.v = np.full((10, 1), i) + np.arange(10)[:, None]/10
        def both(self, key, f): return self.v, -self.v
    a, b = G(), G()
    for g in (a, b):
        for i in range(100): g.feed(P(i))
    kept = np.array(a.kept)[:, 0, 0]
    assert len(kept) == 50 and len(set(kept)) == 50 and np.array_equal(a.kept, b.kept) and 35 < kept.mean() < 65
    assert all(np.array_equal(x, -y) for x, y in a.kept)


# ---- CLIP, DINO

def test_consistency():
    f = np.random.default_rng(0).normal(0, 1, (6, 4))
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    want = [(max(0, f[t] @ f[t-1]) + max(0, f[t] @ f[0]))/2 for t in range(1, 6)]
    see = consistency()
    assert see(f[:1]) + see(f[1:3]) + see(f[3:]) == pytest.approx(want)

def test_clip_of_a_preset(bare):
    models = load_models(make_dummy_preset(bare/'p'), 'cpu')
    a, b = models.clip_embed(FILM), models.clip_embed(BLUR)
    s = metrics_of(FILM, BLUR, ['clip_sim', 'background', 'clip_iqa'], models=models)
    assert s['clip_sim'].frames == pytest.approx((a*b).sum(1), abs=1e-5) and 'preset dummy' in s['clip_sim'].net
    file = (bare/'p/clip/open_clip_model.safetensors').read_bytes()
    assert s['clip_sim'].sha256 == hashlib.sha256(hashlib.sha256(file).digest()).hexdigest()[:16]
    assert s['background'].frames == pytest.approx(consistency()(b), abs=1e-5) and s['background'].source == pytest.approx(np.mean(consistency()(a)), abs=1e-5)
    assert 'cannot read' in s['clip_iqa'].why # the dummy's text tower knows four words
    assert 'tiny' in metrics_of(FILM, BLUR, ['clip_sim'], device='cpu')['clip_sim'].net

def test_clip_that_is_not_on_the_disk(bare):
    models = load_models(make_dummy_preset(bare/'p', parts=dict(diffusion='.', clip='nobody/no-such-clip')), 'cpu')
    s = metrics_of(FILM, BLUR, ['clip_sim', 'psnr'], models=models)
    assert 'not downloaded' in s['clip_sim'].why and 'cmvc models pull' in s['clip_sim'].why and s['psnr'].value

def test_clip_iqa(bare):
    import open_clip
    folder = bare/'p/clip'
    models = load_models(make_dummy_preset(bare/'p'), 'cpu')
    config = json.loads((folder/'open_clip_config.json').read_text())
    config['model_cfg']['text_cfg'] = dict(context_length=77, vocab_size=49408, width=8, heads=1, layers=1)
    (folder/'open_clip_config.json').write_text(json.dumps(config))
    net = _seeded(0, lambda: open_clip.create_model(f'local-dir:{folder}', load_weights=False))
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, folder/'open_clip_model.safetensors')
    tokens = open_clip.tokenizer.SimpleTokenizer(context_length=77)(['Good photo.', 'Bad photo.'])
    with torch.inference_mode():
        logits = 100*torch.from_numpy(models.clip_embed(NOISE)) @ models.clip.encode_text(tokens, normalize=True).T
    s = metrics_of(FILM, NOISE, ['clip_iqa'], models=models)['clip_iqa']
    assert s.frames == pytest.approx(logits.softmax(1)[:, 0].numpy(), abs=1e-4) and 0 < s.value < 1 and s.source is not None

def test_dino_is_the_transformer_that_was_published(weights):
    "Against the blocks written out, with the tensors by their published names."
    state, _ = read_weights('dino', weights['dino'])
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    norm = lambda h, n: F.layer_norm(h, (128,), state[f'{n}.weight'], state[f'{n}.bias'], 1e-6)
    lin = lambda h, n: F.linear(h, state[f'{n}.weight'], state[f'{n}.bias'])
    h = F.conv2d(x, state['patch_embed.proj.weight'], state['patch_embed.proj.bias'], stride=8).flatten(2).transpose(1, 2)
    h = torch.cat([state['cls_token'].expand(2, -1, -1), h], 1) + state['pos_embed']
    for i in range(2):
        q, k, v = lin(norm(h, f'blocks.{i}.norm1'), f'blocks.{i}.attn.qkv').reshape(2, 17, 3, 2, 64).permute(2, 0, 3, 1, 4)
        h = h + lin(((q @ k.transpose(-1, -2)/8).softmax(-1) @ v).transpose(1, 2).reshape(2, 17, 128), f'blocks.{i}.attn.proj')
        h = h + lin(F.gelu(lin(norm(h, f'blocks.{i}.norm2'), f'blocks.{i}.mlp.fc1')), f'blocks.{i}.mlp.fc2')
    with torch.inference_mode(): assert torch.allclose(dino_vit(state)(x), norm(h, 'norm')[:, 0], atol=1e-4)

def test_subject(bare, weights):
    s = metrics_of(FILM[:, :, :60], NOISE[:, :, :60], ['subject'], device='cpu', weights=weights)['subject']
    assert 0 < s.value < 1 and 0 < s.source < 1 and s.value != s.source and 'width 128, patch 8' in s.net and len(s.frames) == 4
    still = np.repeat(NOISE[:1], 3, 0)
    assert metrics_of(FILM[:3], still, ['subject'], device='cpu', weights=weights)['subject'].value == pytest.approx(1, abs=1e-5)


# ---- VMAF

FAKE = '''
import json, os, sys
if '-filters' in sys.argv: print(' ..C libvmaf           VV->V'); sys.exit()
if '-version' in sys.argv: print('ffmpeg version 7.1 Copyright'); sys.exit()
a = sys.argv
assert a[a.index('-lavfi') + 1].endswith('log_fmt=json:log_path=log.json') and a[a.index('-s') + 1] == '64x64'
assert [a[i+1] for i, v in enumerate(a) if v == '-i'] == ['decoded.rgb', 'source.rgb'] # the first is the distorted one
d, s = (open(n, 'rb').read() for n in ('decoded.rgb', 'source.rgb'))
n = 64*64*3
json.dump({'frames': [{'metrics': {'vmaf': 100 - 10*(d[i:i+n] != s[i:i+n])}} for i in range(0, len(s), n)]}, open('log.json', 'w'))
'''

@pytest.fixture
def program(bare):
    def make(text):
        path = bare/f'ffmpeg{len(list(bare.iterdir()))}'
        path.write_text(f'#!{sys.executable}\n' + textwrap.dedent(text))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)
    return make

def test_vmaf_hands_over_both_clips(bare, program, monkeypatch):
    monkeypatch.setenv('CMVC_FFMPEG', program(FAKE))
    m = Meter(['vmaf'], device='cpu')
    m.feed(FILM[:2], np.concatenate([FILM[:1], BLUR[1:2]])); m.feed(FILM[2:], BLUR[2:])
    s = m.finish()['vmaf']
    assert s.frames.tolist() == [100, 90, 90, 90, 90] and s.value == 92 and 'ffmpeg version 7.1' in s.net

def test_ffmpeg_that_cannot(bare, program, monkeypatch):
    monkeypatch.setenv('CMVC_FFMPEG', program('print("nothing")'))
    assert 'has no libvmaf' in metrics_of(FILM, FILM, ['vmaf'], device='cpu')['vmaf'].why
    monkeypatch.setenv('CMVC_FFMPEG', program(FAKE.replace('json.dump', 'sys.exit("no memory") or json.dump')))
    with pytest.raises(CmvcError, match='no memory'): metrics_of(FILM, FILM, ['vmaf'], device='cpu')

def test_vmaf_for_real():
    s = {n: metrics_of(FILM, v, ['vmaf'], device='cpu')['vmaf'] for n, v in dict(same=FILM, blur=BLUR).items()}
    if s['same'].value is None: pytest.skip(s['same'].why)
    assert s['same'].value > 95 > s['blur'].value and len(s['blur'].frames) == 5


def test_groups():
    from cmvc_nb.metrics import all_metrics
    assert all(set(g) <= set(all_metrics()) for g in GROUPS.values()) and len(GROUPS['vbench']) == 5 and len(LEARNED) == 9
    assert Meter('vbench', device='cpu').names == GROUPS['vbench']

def test_meters_share_networks(bare, weights, monkeypatch):
    read, real = [], vm.read_weights
    monkeypatch.setattr(vm, 'read_weights', lambda net, path: (read.append(net), real(net, path))[1])
    names = ['lpips', 'dists', 'subject', 'clip_sim']
    first = Meter(names, device='cpu', weights=weights)
    second = metrics_of(FILM[:2], BLUR[:2], names, setup=first.setup)
    first.feed(FILM[:2], BLUR[:2])
    assert sorted(read) == ['alexnet', 'dino', 'vgg16'] and all(s.value == second[n].value for n, s in first.finish().items())
