"The drawn world: seeded, the same in every batch, like photographs, and captioned with what really moves."
import cv2, numpy as np, pytest, torch
from skimage import data

from cmvc_nb.representation import measure_motion, motion_sentence
from cmvc_nb.world import (Dice, FAR, KINDS, NEAR, blur, camera, gradients, layer, picture_shard, pictures, seeded, spectral_slope, stamp, textures, video, video_shard, videos)

KODAK = 2.31 # mean spectral slope of kodim01 to kodim08, Lanczos to 256 pixels on the short side, cropped to 256 x 256
DRAWN = pictures(60, generator=seeded(3)).numpy()


def slope(ims): return np.mean([spectral_slope(f) for f in ims])


def test_numbers_are_even_and_seeds_strangers():
    u = Dice(torch.arange(8))(20000)
    assert u.shape == (8, 20000) and 0 <= u.min() and u.max() < 1
    assert (u.mean(1)-.5).abs().max() < .01 and (u.var(1)-1/12).abs().max() < .002
    assert (torch.corrcoef(u) - torch.eye(8)).abs().max() < .03
    h = torch.stack([torch.histc(r, 50, 0, 1) for r in u]); assert ((h-400)**2/400).sum(1).max() < 100 # chi squared, 49 degrees of freedom


def test_numbers_do_not_depend_on_how_they_are_asked_for():
    a, b = Dice(torch.tensor([7, 8])), Dice(torch.tensor([8]))
    whole = a(9000)
    assert (torch.cat([b(5), b(4000), b(4995)], 1) == whole[1:]).all()
    d = Dice(torch.arange(500)); p = d.pick([1., 2., 4.], [1., 2., 1.], 40)
    assert all(abs(float((p == v).float().mean())-w) < .02 for v, w in ((1, .25), (2, .5), (4, .25)))


def test_same_seed_same_pictures_whatever_the_batch():
    a, b, c = pictures(5, 64, seeded(1), batch=1), pictures(5, 64, seeded(1), batch=5), pictures(3, 64, seeded(1), batch=2)
    assert a.dtype == torch.uint8 and a.shape == (5, 64, 64, 3)
    assert (a == b).all() and (a[:3] == c).all()
    assert not (a == pictures(5, 64, seeded(2))).all() and all(not (a[i] == a[j]).all() for i in range(5) for j in range(i))


def test_same_seed_same_videos_whatever_the_batch():
    (a, m), (b, q) = videos(3, 4, 64, generator=seeded(1), batch=1), videos(3, 4, 64, generator=seeded(1), batch=3)
    assert a.dtype == torch.uint8 and a.shape == (3, 4, 64, 64, 3) and (a == b).all()
    assert list(map(motion_sentence, m)) == list(map(motion_sentence, q))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_same_world_on_the_gpu():
    a, b = pictures(8, 128, seeded(1)), pictures(8, 128, seeded(1), 'cuda').cpu()
    assert (a.int()-b.int()).abs().float().mean() < .2 # an edge's pixel may fall to the other side


@pytest.mark.parametrize('side', [16, 40, 256, 330])
def test_any_side(side): assert pictures(1, side, seeded(0)).shape == (1, side, side, 3)


def test_one_frame_and_one_picture_of_a_clip():
    v, m = video(3, 1, 48, 'pan'); assert v.shape == (1, 48, 48, 3) and isinstance(v, np.ndarray)
    assert pictures(1, 48, seeded(0)).shape[0] == 1


def test_spectrum_and_gradients_of_photographs():
    photos = [cv2.resize(i, (256, 256), interpolation=cv2.INTER_AREA) for i in (data.astronaut(), data.coffee(), data.chelsea(), data.rocket())]
    assert abs(slope(DRAWN)-KODAK) < .3 and abs(slope(DRAWN)-slope(photos)) < .35
    p, q = gradients(photos)+1e-6, gradients(DRAWN)+1e-6
    assert (p*np.log(p/q)).sum() < .1 # nats; a Gaussian of the same variance is at 1.0
    d = np.arange(-255, 256); g = np.exp(-d**2/2/(p*d**2).sum()); g = g/g.sum()+1e-6
    assert (p*np.log(p/g)).sum() > .5


def test_colours_are_plausible():
    f = DRAWN/255.; light = f@[.299, .587, .114]
    assert (abs(f.mean((0, 1, 2))-.42) < .12).all() and .12 < light.std((1, 2)).mean() < .22 and .04 < light.mean((1, 2)).std() < .16
    assert .2 < ((f.max(-1)-f.min(-1))/np.maximum(f.max(-1), 1e-3)).mean() < .5


def test_a_higher_leaf_hides_a_lower_one():
    one = lambda *v: torch.tensor([v]); ids = torch.zeros(1, 40, 40, dtype=torch.int32)
    stamp(ids, one(15., 25., 20.), one(20., 20., 38.), one(10., 10., 6.), one(0., 0., 0.), one(1., 1., .5), one(0., 0., 0.), torch.tensor([[3, 2, 1]], dtype=torch.int32), 10)
    assert ids[0, 20, 20] == 3 and ids[0, 20, 30] == 2 and ids[0, 38, 20] == 1 and ids[0, 0, 0] == 0
    y, x = torch.meshgrid(torch.arange(40), torch.arange(40), indexing='ij')
    assert abs(int((ids == 3).sum()) - np.pi*100) < 12 and ((ids[0] == 3) == ((x-15)**2 + (y-20)**2 < 100)).all()
    before = ids.clone(); stamp(ids, one(20.), one(20.), one(9.), one(0.), one(1.), one(0.), torch.zeros(1, 1, dtype=torch.int32), 9)
    assert (ids == before).all() # number 0 is not drawn


def test_layers_cover_and_let_through():
    far, near = layer(Dice(torch.arange(4)), 96, 1, FAR), layer(Dice(torch.arange(4)), 96, 1, NEAR)
    assert (far[:, 3] == 1).all() and 0 < near[:, 3].mean() < .6 and set(near[:, 3].unique().tolist()) == {0., 1.}
    assert (near[:, :3][(near[:, 3:] == 0).expand(-1, 3, -1, -1)] == 0).all()


def test_blur_has_its_variance_and_each_picture_its_own():
    x = torch.zeros(4, 2, 61, 61); x[..., 30, 30] = 1; want = torch.tensor([0., .3, 5., 30.]); y = blur(x.clone(), want)
    for dim in (1, 2): assert torch.allclose((y[:, 0].sum(dim)*(torch.arange(61)-30)**2).sum(1), want, atol=1e-3)
    assert (y[0] == x[0]).all() and torch.allclose(y.sum((2, 3)), torch.ones(4, 2), atol=1e-4)
    edge = (torch.arange(32) > 15).float().expand(1, 1, 32, 32).clone(); assert blur(edge, torch.tensor([-.12])).max() > 1.05 # sharpened


def test_camera_keeps_to_its_convention():
    x = torch.rand(2, 3, 3, 20, 30); y = camera(x.clone(), Dice(torch.arange(2)))
    assert y.shape == (2, 3, 20, 30, 3) and y.dtype == torch.uint8
    grey = camera(torch.full((64, 2, 3, 32, 32), .5), Dice(torch.arange(64))).float()
    noise = (grey[:, 0]-grey[:, 1]).std((1, 2, 3))/2**.5; assert (noise < .5).sum() > 3 and noise.max() > 1.5 and noise.max() < 6


@pytest.mark.parametrize('kind,allowed', [('pan', (.03, .02, 1.)), ('zoom', (.02, .03, 1.)), ('rotate', (.02, .03, 1.)), ('still', (.01, .01, .3))])
def test_captions_say_what_is_measured(kind, allowed):
    v, ms = videos(7, 12, 160, kind, seeded(5)); off = []
    for f, m in zip(v.numpy(), ms): q = measure_motion(f); off.append((abs(q.pan-m.pan)+abs(q.tilt-m.tilt), abs(q.zoom/m.zoom-1), abs(q.rotation-m.rotation)))
    assert (np.median(off, 0) < allowed).all()
    moved = {'pan': lambda m: abs(m.pan)+abs(m.tilt) > .03, 'zoom': lambda m: m.zoom != 1, 'rotate': lambda m: m.rotation != 0, 'still': lambda m: m.pan == m.tilt == m.rotation == 0 and m.zoom == 1}[kind]
    assert all(map(moved, ms)) # and no caption of another kind is given
    assert kind == 'pan' or all(m.pan == m.tilt == 0 for m in ms); assert kind == 'zoom' or all(m.zoom == 1 for m in ms); assert kind == 'rotate' or all(m.rotation == 0 for m in ms)


def test_still_is_still_but_for_noise():
    v, ms = videos(12, 3, 64, 'still', seeded(2)); v = v.numpy().astype(float); quiet = [not m.place for m in ms]
    assert 4 <= sum(quiet) < 12
    change = [abs(cv2.GaussianBlur(a[2]-a[0], (0, 0), 3)).max() for a in v]
    assert all((c < 8) == q for c, q in zip(change, quiet)), (change, quiet) # what moves has a caption, and nothing else changes


def test_parallax_moves_layers_differently():
    v, ms = videos(12, 2, 160, 'pan', seeded(11)); found = 0
    for f, m in zip(v.numpy(), ms):
        if abs(m.pan)+abs(m.tilt) < .08 or not m.place: continue
        if abs(m.dx*m.tilt + m.dy*m.pan) < 1e-6 and abs(m.dx)+abs(m.dy) > .02: found += 1 # a layer moves along the pan, against the largest one
    assert found >= 2


def test_a_thing_moves_by_itself():
    v, ms = videos(14, 12, 160, 'still', seeded(4)); pairs = [(m, measure_motion(f)) for f, m in zip(v.numpy(), ms) if m.place and m.size != 'tiny']
    assert len(pairs) >= 2 and np.median([np.hypot(m.dx-q.dx, m.dy-q.dy) for m, q in pairs]) < .05 and all(np.hypot(m.dx, m.dy) > .05 for m, _ in pairs)


def test_kinds_come_in_all_sorts_and_may_be_chosen():
    ms = videos(150, 2, 16, generator=seeded(0), batch=150)[1]
    kinds = [(abs(m.pan)+abs(m.tilt) > 0, m.zoom != 1, m.rotation != 0) for m in ms]
    assert {(False, False, False), (True, False, False), (False, True, False), (False, False, True), (True, True, True)} == set(kinds)
    assert .25 < np.mean([k == (True, False, False) for k in kinds]) < .55
    with pytest.raises(ValueError): videos(1, 2, 16, kind='dolly')
    assert KINDS == ('still', 'pan', 'zoom', 'rotate', 'mixed')


def test_textures_are_normal_and_go_from_smooth_to_rough():
    t = textures(); assert t.mean((1, 2)).abs().max() < 1e-3 and (t.std((1, 2))-1).abs().max() < 1e-3
    rough = (t[:, 1:]-t[:, :-1]).abs().mean((1, 2)); assert (rough[1:8] > rough[:7]).all()


def test_shards_have_captions():
    ims, said = picture_shard([0, 1], 2); assert ims.shape == (2, 256, 256, 3) and len(said) == 2 and all(len(s) == 2 for s in said)
    again, _ = picture_shard([0, 1], 2); other, _ = picture_shard([0, 2], 2); assert (again == ims).all() and not (other == ims).all()
    (v, texts, motion), = video_shard(3, 1, 2); assert v.shape == (2, 256, 256, 3) and len(texts) == 3 and motion.zoom > 0 and 'camera' in texts[2]
