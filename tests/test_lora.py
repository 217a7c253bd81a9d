"""LoRAs on a UNet: a weight per row (eq. 6), the fit (eq. 4), reproducibility, refusals."""
import copy

import pytest
import torch
from hypothesis import Phase, given, settings, strategies as st

from cmvc_nb.errors import CmvcError
from cmvc_nb import lora
from cmvc_nb.lora import attach, check_targets, fit_keyframes, fit_loras, lora_layers, lora_weights, read_lora, split, target, write_lora
from dummies import dummy_scheduler, dummy_unet

torch.set_num_threads(1)


@pytest.fixture(scope='module')
def unet(): return dummy_unet()


def random_states(unet, names, rank=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    with attach(unet, names, rank):
        return {n: {k: torch.randn(v.shape, generator=g)/2 for k, v in read_lora(unet, n).items()} for n in names}


def inputs(batch=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 8, 8, generator=g), torch.tensor(300), torch.randn(batch, 6, 16, generator=g)


def explicit(unet, states, weights):
    "A copy of `unet` whose weights are θ + Σ w·BA, computed without peft."
    out = copy.deepcopy(unet)
    modules = dict(out.named_modules())
    for name, w in weights.items():
        for key, A in states[name].items():
            if key.endswith('lora_A.weight'):
                layer = modules[key.removesuffix('.lora_A.weight')]
                layer.weight.data += w*(states[name][key.replace('lora_A', 'lora_B')].double() @ A.double()).to(layer.weight)
    return out


DOUBLE = dummy_unet().double()              # in fp64 rounding cannot hide a wrong formula
STATES = random_states(DOUBLE, 'ab')

@settings(max_examples=5, deadline=None, phases=[Phase.generate, Phase.explicit])
@given(st.lists(st.floats(-1, 2, width=32), min_size=1, max_size=4))
def test_weight_per_row_is_eq_6(w):
    x, t, text = (v.double() for v in inputs(len(w)))
    with torch.no_grad():
        own = torch.cat([explicit(DOUBLE, STATES, {'a': v, 'b': 1-v})(x[i:i+1], t, text[i:i+1]).sample for i, v in enumerate(w)])
        with attach(DOUBLE, 'ab', 2):
            for n, s in STATES.items(): write_lora(DOUBLE, n, s)
            with lora_weights(DOUBLE, {'a': torch.tensor(w).double(), 'b': 1-torch.tensor(w).double()}): ours = DOUBLE(x, t, text).sample
    torch.testing.assert_close(ours, own, atol=1e-6, rtol=1e-5)


def test_alpha_scales_the_update(unet):
    states, (x, t, text) = random_states(unet, ['a']), inputs(2)
    with torch.no_grad():
        own = explicit(unet, states, {'a': .5*6/2})(x, t, text).sample
        with attach(unet, ['a'], rank=2, alpha=6):
            write_lora(unet, 'a', states['a'])
            with lora_weights(unet, {'a': torch.full((2,), .5)}): ours = unet(x, t, text).sample
    torch.testing.assert_close(ours, own, atol=2e-5, rtol=1e-4)


def test_three_loras_and_gradients(unet):
    states, (x, t, text) = random_states(unet, 'abc'), inputs(3)
    w = torch.rand(3, 3, requires_grad=True)
    with attach(unet, 'abc', 2):
        for n in 'abc': write_lora(unet, n, states[n])
        with lora_weights(unet, dict(zip('abc', w))): y = unet(x, t, text).sample
    (g,) = torch.autograd.grad(y[1].square().sum(), w)
    assert (g[:, 1] != 0).all() and (g[:, [0, 2]] == 0).all()       # row 1 depends on the weights of row 1 only


def test_everything_is_restored(unet):
    x, t, text = inputs(2)
    flags = [p.requires_grad for p in unet.parameters()]
    before, state = unet(x, t, text).sample, torch.random.get_rng_state()
    with pytest.raises(RuntimeError, match='mine'):
        with attach(unet, 'ab', 2):
            with lora_weights(unet, {n: torch.ones(2)/3 for n in 'ab'}): raise RuntimeError('mine')
    assert torch.equal(unet(x, t, text).sample, before) and not lora_layers(unet)
    assert flags == [p.requires_grad for p in unet.parameters()] and torch.equal(state, torch.random.get_rng_state())
    with attach(unet, 'ab', 2):
        with pytest.raises(RuntimeError, match='mine'):
            with lora_weights(unet, {n: torch.ones(2)/3 for n in 'ab'}): raise RuntimeError('mine')
        assert all(v == 1 for m in lora_layers(unet).values() for v in m.scaling.values())


def test_refusals(unet):
    from peft import LoraConfig
    x, t, text = inputs(3)
    with attach(unet, 'ab', 2):
        with pytest.raises(CmvcError, match='already'):
            with attach(unet, 'c'): pass
        with pytest.raises(CmvcError, match='active LoRAs'):
            with lora_weights(unet, {'a': torch.ones(3)}): pass
        with pytest.raises(CmvcError, match='one weight per row'):
            with lora_weights(unet, {'a': torch.ones(3), 'b': torch.ones(2)}): pass
        with lora_weights(unet, {'a': torch.ones(2), 'b': torch.ones(2)}):
            with pytest.raises(CmvcError, match='got 3'): unet(x, t, text)
        with lora_weights(unet, {'a': torch.ones(2), 'b': torch.ones(2)}):      # peft alone would broadcast this in silence
            with pytest.raises(CmvcError, match='got 1'): unet(x[:1], t, text[:1])
        with pytest.raises(CmvcError, match='does not fit'): write_lora(unet, 'a', {})
    unet.add_adapter(LoraConfig(r=2, target_modules=['conv1']), 'a')
    with pytest.raises(CmvcError, match='linear'): check_targets(unet)
    unet.unload_lora()
    with pytest.raises(CmvcError, match='linear'): check_targets(unet)


def test_a_changed_peft_is_noticed(monkeypatch):
    from peft.tuners.lora.layer import Linear
    lora.check_peft.cache_clear(); lora.check_peft()
    real = Linear.forward
    def other(self, x, *args, **kwargs):        # a peft that averages the scale over the batch
        self.scaling = {k: float(v.mean()) if torch.is_tensor(v) else v for k, v in self.scaling.items()}
        return real(self, x, *args, **kwargs)
    monkeypatch.setattr(Linear, 'forward', other)
    lora.check_peft.cache_clear()
    with pytest.raises(CmvcError, match='peft'): lora.check_peft()
    monkeypatch.undo(); lora.check_peft.cache_clear()


@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction', 'sample'])
def test_split_inverts_target(kind):
    z, e = torch.randn(2, 4, 4, 8, 8, dtype=torch.float64)
    a, s = lora._levels(dummy_scheduler(), [0, 100, 600, 999], z)
    zz, ee = split(kind, target(kind, z, e, a, s), a*z + s*e, a, s)
    torch.testing.assert_close(zz, z); torch.testing.assert_close(ee, e)


def test_target_is_diffusers_velocity_and_clean_is_clean():
    sched, (z, e) = dummy_scheduler(), torch.randn(2, 3, 4, 8, 8)
    t = torch.tensor([3, 500, 999])
    a, s = lora._levels(sched, t, z)
    torch.testing.assert_close(target('v_prediction', z, e, a, s), sched.get_velocity(z, e, t))
    torch.testing.assert_close(a*z + s*e, sched.add_noise(z, e, t))
    a, s = lora._levels(sched, [-1], z)
    assert float(a) == 1 and float(s) == 0
    zero = dummy_scheduler(rescale_betas_zero_snr=True)
    a, s = lora._levels(zero, [999], z)
    for kind in ['epsilon', 'v_prediction']: assert all(v.isfinite().all() for v in split(kind, e, e, a, s))
    with pytest.raises(CmvcError, match='prediction type'): target('flow', z, e, a, s)


def fit_loss(unet, sched, z, text, state, rank):
    "Loss of eq. 4 on noise that the fit has not seen."
    g = torch.Generator().manual_seed(123)
    t = torch.arange(5, 1000, 50)
    e = torch.randn(len(t), *z.shape, generator=g)
    a, s = lora._levels(sched, t, e)
    with torch.no_grad(), attach(unet, ['a'], rank):
        if state: write_lora(unet, 'a', state)
        with lora_weights(unet, {'a': torch.ones(len(t)) if state else torch.zeros(len(t))}):
            out = unet(a*z + s*e, t, text.expand(len(t), -1, -1)).sample
    return float((out - target(sched.config.prediction_type, z.expand_as(e), e, a, s)).square().mean())


@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction', 'sample'])
def test_a_fit_lowers_its_own_loss(unet, kind):
    sched, (x, _, text) = dummy_scheduler(kind), inputs(2, seed=4)
    fitted = fit_loras(unet, sched, x, text, steps=40, lr=1e-2, rank=2, draws=4)
    for z, c, s in zip(x, text, fitted): assert fit_loss(unet, sched, z, c[None], s, 2) < .99*fit_loss(unet, sched, z, c[None], None, 2)


def test_together_is_as_alone(unet):
    sched, (x, _, text) = dummy_scheduler(), inputs(3, seed=5)
    together = fit_loras(unet, sched, x, text, steps=5, rank=2, draws=2)
    for i, s in enumerate(together):
        for k, v in fit_loras(unet, sched, x[i:i+1], text[i:i+1], steps=5, rank=2, draws=2)[0].items():
            torch.testing.assert_close(v, s[k], atol=1e-4, rtol=1e-3)


def test_pairs_make_random_access_exact(unet):
    sched, (x, _, text) = dummy_scheduler(), inputs(5, seed=6)
    z, c = dict(enumerate(x)), dict(enumerate(text))
    full = fit_keyframes(unet, sched, z, c, 5, steps=6, lr=1e-2, rank=2)
    assert sorted(full) == [0, 1, 2, 3, 4]
    for wanted in [{3, 4}, {0}, {1, 2}, {4}]:
        part = fit_keyframes(unet, sched, {i: z[i] for i in wanted}, {i: c[i] for i in wanted}, 5, steps=6, lr=1e-2, rank=2)
        assert set(part) == wanted
        assert all(torch.equal(part[i][k], full[i][k]) for i in wanted for k in full[i])
    again = fit_keyframes(unet, sched, z, c, 5, steps=6, lr=1e-2, rank=2)
    assert all(torch.equal(again[i][k], full[i][k]) for i in z for k in full[i])
    other = fit_keyframes(unet, sched, z, c, 5, steps=6, lr=1e-2, rank=2, seed=1)
    assert any(not torch.equal(other[0][k], full[0][k]) for k in full[0])
    with pytest.raises(CmvcError, match='keyframe 5'): fit_keyframes(unet, sched, {5: x[0]}, {5: text[0]}, 5)


def test_half_precision_unet_keeps_fp32_loras():
    unet, sched, (x, _, text) = dummy_unet().bfloat16(), dummy_scheduler(), inputs(2)
    fitted = fit_loras(unet, sched, x.bfloat16(), text.bfloat16(), steps=2, rank=2)
    assert all(v.dtype == torch.float32 for s in fitted for v in s.values())
    assert any((v.bfloat16().float() != v).any() for v in fitted[0].values())     # finer than bf16 could hold
    with torch.no_grad(), attach(unet, ['0', '1'], 2):
        for n, s in zip('01', fitted): write_lora(unet, n, s)
        with lora_weights(unet, {'0': torch.rand(2), '1': torch.rand(2)}):
            assert unet(x.bfloat16(), 5, text.bfloat16()).sample.dtype == torch.bfloat16


def test_stratified_timesteps_cover_the_reach():
    t, _ = lora.draw_plan(20, 2, 400)
    assert t.shape == (20, 2) and sorted((t.flatten()//10).tolist()) == list(range(40))
