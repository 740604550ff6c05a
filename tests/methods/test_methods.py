"""The other methods against their transcriptions in `reference_methods.py`, in float64, after every step."""
import math

import pytest
import reference_methods as papers
import torch
import torch.nn.functional as F
from support.models import (
    ALL,
    ONLYNORM,
    OPTIMIZERS,
    SELECTIONS,
    BatchLoss,
    TinyNet,
    assert_identical,
    batch,
    buffers,
    flops,
    one_step,
    sam_on,
    weights,
)
from support.states import differences

from timm_sam import SAM, methods

METHODS = {  # ours, the transcription
    'usam': (lambda: methods.usam(), lambda: papers.Usam(0)),
    'usam 0.3': (lambda: methods.usam(lam=0.3), lambda: papers.Usam(0.3)),
    'usam 1-1/t': (lambda: methods.usam(lam='1-1/t'), lambda: papers.Usam('1-1/t')),
    'friendly': (lambda: methods.friendly(sigma=1, lam=0.9), lambda: papers.Friendly(1, 0.9)),
    'friendly 0.5 0': (lambda: methods.friendly(sigma=0.5, lam=0), lambda: papers.Friendly(0.5, 0)),
    'stable': (lambda: methods.stable(), lambda: papers.Stable()),
    'looksam': (lambda: methods.looksam(k=3, alpha=0.7), lambda: papers.Looksam(3, 0.7)),
    'msam': (lambda: methods.msam(), lambda: papers.Msam()),
}
RHO = {'sam': 0.5, 'elementwise_l2': 0.5, 'layerwise_l2': 0.2, 'fisher': 0.5}


def assert_close(actual, expected, rtol=1e-11, atol=1e-13):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def follow(ours, paper, optimizer, selection, variant, way='minimize', steps=5):
    model, twin = TinyNet().double(), TinyNet().double()
    sam = sam_on(model, optimizer, params=selection, variant=variant, rho=RHO[variant], method=ours)
    base = OPTIMIZERS[optimizer](twin)
    for step in range(steps):
        loss_fn = one_step(way, sam, model, step)
        torch.manual_seed(step)
        loss = paper.step(twin, base, BatchLoss(twin, batch(step)), SELECTIONS[selection], variant, RHO[variant])
        assert_close(sam.stats.loss, loss)
        assert_close(weights(model), weights(twin))
        assert_close(buffers(model), buffers(twin))
        mine, theirs = sam.optimizer.state_dict(), base.state_dict()
        assert_close(mine['state'], theirs['state'])
        assert mine['param_groups'] == theirs['param_groups'] and mine.keys() == theirs.keys()
    return sam, loss_fn


@pytest.mark.parametrize('variant', ['sam', 'elementwise_l2'])
@pytest.mark.parametrize('selection', SELECTIONS)
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('name', METHODS)
def test_update_is_that_of_the_transcription_after_every_step(name, optimizer, selection, variant):
    ours, paper = METHODS[name]
    follow(ours(), paper(), optimizer, selection, variant)


@pytest.mark.parametrize('variant', ['layerwise_l2', 'fisher'])
@pytest.mark.parametrize('name', METHODS)
def test_other_variants_go_with_every_method(name, variant):
    ours, paper = METHODS[name]
    follow(ours(), paper(), 'sgd', 'onlynorm', variant)


@pytest.mark.parametrize('way', ['closure', 'backward'])
@pytest.mark.parametrize('name', METHODS)
def test_every_way_to_step_is_the_same_update(name, way):
    ours, paper = METHODS[name]
    follow(ours(), paper(), 'sgd', 'onlynorm', 'sam', way)


LIMITS = {
    'usam 1': lambda: methods.usam(lam=1), 'friendly 0': lambda: methods.friendly(sigma=0),
    'looksam k 1': lambda: methods.looksam(k=1, alpha=0.7), 'looksam 0': lambda: methods.looksam(k=2, alpha=0),
    'random_mask 0 masked': lambda: methods.random_mask(sparsity=0),
    'random_mask 0 full': lambda: methods.random_mask(sparsity=0, norm='full'),
    'ssam_dynamic 0 full': lambda: methods.ssam_dynamic(sparsity=0, total_epochs=4),
    'ssam_dynamic 0 masked': lambda: methods.ssam_dynamic(sparsity=0, total_epochs=4, norm='masked'),
    'ssam_dynamic drop 1': lambda: methods.ssam_dynamic(sparsity=0, total_epochs=4, drop=1),
    'ssam_fisher 0 full': lambda: methods.ssam_fisher(sparsity=0, samples=2),
    'ssam_fisher 0 masked': lambda: methods.ssam_fisher(sparsity=0, samples=2, norm='masked'),
    'gsam': lambda: methods.gsam(alpha=0, rho_min=0.5),
    'esam': lambda: methods.esam(beta=1, gamma=1), 'late': lambda: methods.late(start=1, ramp=False),
}
LIMIT_OF = {'looksam 0': dict(every=2), 'late': dict(start=1)}  # otherwise SAM in every update


def samples_of(model):
    """Losses of one sample, as a loop offers them."""
    x, y = batch(0, 1, model.head.weight.dtype)
    return lambda n: [lambda: F.cross_entropy(model(x), y)] * n


@pytest.mark.parametrize('selection', SELECTIONS)
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('name', LIMITS)
def test_limit_is_sam_bit_for_bit(name, optimizer, selection):
    model, twin = TinyNet(), TinyNet()
    sam, plain = (sam_on(m, optimizer, params=selection, **more) for m, more in (
        (model, dict(method=LIMITS[name]())), (twin, LIMIT_OF.get(name, {}))))
    for step in range(4):
        sam.begin(step // 2, step, samples_of(model))
        plain.begin(step // 2, step)
        one_step('minimize', sam, model, step)
        one_step('minimize', plain, twin, step)
        assert_identical(weights(model), weights(twin))
        assert_identical(buffers(model), buffers(twin))
    assert differences(sam.optimizer.state_dict(), plain.optimizer.state_dict()) == []


# Defining properties

def test_eps_of_usam_halves_with_the_loss_and_that_of_sam_does_not():
    norms = {}
    for name, method in {'usam': methods.usam(), 'sam': None}.items():
        for factor in (1.0, 0.5):
            model = TinyNet().double()
            sam = sam_on(model, method=method)
            one_step('minimize', sam, model, on_call=dict.fromkeys((1, 2), lambda loss, f=factor: f * loss))
            norms[name, factor] = float(sam.stats.eps_norm)
    assert norms['usam', 0.5] == pytest.approx(norms['usam', 1.0] / 2, rel=1e-12)
    assert norms['sam', 0.5] == pytest.approx(norms['sam', 1.0], rel=1e-12)


def test_eps_of_usam_is_linear_in_lam():
    norms = {}
    for lam in (0, 0.25, 1):
        model = TinyNet().double()
        sam = sam_on(model, method=methods.usam(lam=lam))
        one_step('minimize', sam, model)
        norms[lam] = float(sam.stats.eps_norm)
    assert norms[1] == pytest.approx(0.5, rel=1e-12) and norms[0] != pytest.approx(0.5, rel=1e-2)
    assert norms[0.25] == pytest.approx(0.75 * norms[0] + 0.25 * norms[1], rel=1e-12)


def test_usam_on_a_quadratic_is_the_step_that_algebra_gives():
    H = torch.tensor([[1.0, 0.3], [0.3, 0.2]], dtype=torch.float64)
    model = torch.nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0]]))
    w, lr, rho = model.weight.detach().clone().flatten(), 0.1, 0.4
    sam = SAM(torch.optim.SGD(model.parameters(), lr=lr), model, params='all', rho=rho, method=methods.usam())
    sam.minimize(lambda: model.weight.flatten() @ H @ model.weight.flatten() / 2)
    assert_close(model.weight.flatten(), w - lr * H @ (w + rho * H @ w))


def test_stable_step_is_as_long_as_that_of_the_gradient_at_w():
    model, twin = TinyNet().double(), TinyNet().double()
    torch.manual_seed(0)
    sam = sam_on(model, method=methods.stable())
    sam.backward(BatchLoss(model, batch(0)))
    torch.manual_seed(0)
    BatchLoss(twin, batch(0))().backward()
    ours, plain = (papers.lengths(p.grad for p in m.parameters()) for m in (model, twin))
    assert ours == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_stable_without_a_radius_is_plain_training_to_rounding(optimizer):
    model, twin = TinyNet().double(), TinyNet().double()
    sam, alone = sam_on(model, optimizer, rho=0.0, method=methods.stable()), OPTIMIZERS[optimizer](twin)
    for step in range(4):
        one_step('minimize', sam, model, step)
        torch.manual_seed(step)
        alone.zero_grad()
        BatchLoss(twin, batch(step))().backward()
        alone.step()
        assert_close(weights(model), weights(twin))


def test_what_looksam_keeps_is_a_unit_vector_orthogonal_to_g_and_what_it_adds_has_the_length_asked_for():
    model = TinyNet().double()
    sam = sam_on(model, method=methods.looksam(k=2, alpha=0.7))
    one_step('minimize', sam, model, 0)
    u = sam.method_state_dict()['correct']['u']
    twin = TinyNet().double()
    torch.manual_seed(0)
    BatchLoss(twin, batch(0))().backward()
    order = [*ONLYNORM, *(name for name in ALL if name not in ONLYNORM)]  # the selected ones first
    g = [twin.get_parameter(name).grad for name in order]
    assert papers.lengths(u) == pytest.approx(1, rel=1e-12)
    assert abs(sum(float((a * b).sum()) for a, b in zip(u, g))) < 1e-12 * papers.lengths(g)

    twin.load_state_dict(model.state_dict())
    twin.zero_grad()
    torch.manual_seed(1)
    BatchLoss(twin, batch(1))().backward()
    torch.manual_seed(1)
    sam.zero_grad()
    sam.backward(BatchLoss(model, batch(1)))
    added = [model.get_parameter(name).grad - twin.get_parameter(name).grad for name in order]
    assert papers.lengths(added) == pytest.approx(0.7 * papers.lengths(p.grad for p in twin.parameters()), rel=1e-10)


def passes(sam, model, step):
    return len(one_step('minimize', sam, model, step).weights_seen)


def test_passes_of_each_method():
    looksam = TinyNet()
    sam = sam_on(looksam, method=methods.looksam(k=3, alpha=0.1))
    assert [passes(sam, looksam, k) for k in range(6)] == [2, 1, 1, 2, 1, 1]
    msam = TinyNet()
    sam = sam_on(msam, method=methods.msam())
    assert [passes(sam, msam, k) for k in range(3)] == [1, 1, 1]
    assert sam.sharing == 'one forward per update: the method has no pass at w'


def test_msam_perturbs_away_from_the_momentum_after_the_first_update_and_restores_w():
    model = TinyNet().double()
    sam = sam_on(model, method=methods.msam(), rho=3.0)
    first = one_step('minimize', sam, model, 0)
    assert sam.stats.eps_norm is None
    before = weights(model)
    assert_identical(first.weights_seen[0], weights(TinyNet().double()))
    second = one_step('minimize', sam, model, 1)
    assert float(sam.stats.eps_norm) == pytest.approx(3.0, rel=1e-12)
    moved = {name: second.weights_seen[0][name] - before[name] for name in ONLYNORM}
    assert papers.lengths(moved.values()) == pytest.approx(3.0, rel=1e-10)
    assert_identical({name: second.weights_seen[0][name] for name in ALL if name not in ONLYNORM},
                     {name: before[name] for name in ALL if name not in ONLYNORM})


def test_msam_without_a_radius_is_plain_training_bit_for_bit():
    model, twin = TinyNet(), TinyNet()
    sam, alone = sam_on(model, method=methods.msam(), rho=0.0), OPTIMIZERS['sgd'](twin)
    for step in range(3):
        one_step('minimize', sam, model, step)
        torch.manual_seed(step)
        alone.zero_grad()
        BatchLoss(twin, batch(step, dtype=torch.float32))().backward()
        alone.step()
        assert_identical(weights(model), weights(twin))
        assert_identical(buffers(model), buffers(twin))


@pytest.mark.parametrize('optimizer', [
    lambda model: torch.optim.SGD(model.parameters(), lr=0.1), lambda model: torch.optim.Adagrad(model.parameters())])
def test_msam_needs_a_first_moment(optimizer):
    model = TinyNet()
    with pytest.raises(ValueError, match='^msam: .* keeps no first moment'):
        SAM(optimizer(model), model, rho=1, method=methods.msam())


def test_pass_at_w_of_msam_and_methods_that_need_one_are_refused():
    model = TinyNet()
    with pytest.raises(ValueError, match=r'msam\(\) has no pass at w, which stable\(\) needs'):
        sam_on(model, method=[methods.msam(), methods.stable()])
    sam = sam_on(model, method=methods.msam())
    with pytest.raises(ValueError, match='has no pass at w: use SAM.minimize'), sam.ascent():
        pass


@pytest.mark.parametrize('pair, message', [
    (('gsam', 'stable'), 'both decide the combine'), (('gsam', 'looksam'), 'both change the gradient of the step'),
    (('random_mask', 'ssam_dynamic'), 'both decide the mask')])
def test_methods_that_exclude_each_other_are_refused(pair, message):
    made = {'gsam': methods.gsam(alpha=0.1), 'stable': methods.stable(), 'looksam': methods.looksam(k=2, alpha=0.1),
            'random_mask': methods.random_mask(0.5), 'ssam_dynamic': methods.ssam_dynamic(0.5, total_epochs=2)}
    with pytest.raises(ValueError, match=message):
        sam_on(TinyNet(), method=[made[name] for name in pair])


def test_methods_of_different_stages_train_together():
    model = TinyNet()
    sam = sam_on(model, method=[methods.usam(lam=0.5), methods.friendly(), methods.random_mask(0.5), methods.stable()])
    for step in range(3):
        one_step('minimize', sam, model, step)
    assert all(torch.isfinite(w).all() for w in weights(model).values())


def test_usam_with_signs_is_refused():
    with pytest.raises(ValueError, match='whose eps has no norm in it'):
        sam_on(TinyNet(), variant='elementwise_linf', method=methods.usam())


# State, overflow, loss scale

STATEFUL = {'friendly': lambda: methods.friendly(), 'looksam': lambda: methods.looksam(k=2, alpha=0.5)}


@pytest.mark.parametrize('name', STATEFUL)
def test_overflow_leaves_state_alone(name):
    model = TinyNet()
    sam = sam_on(model, method=STATEFUL[name]())
    one_step('minimize', sam, model, 0)
    (slot, state), = sam.method_state_dict().items()
    key = {'direction': 'm', 'correct': 'u'}[slot]
    before = [t.clone() for t in state[key]]
    sam.begin(0, 2)
    one_step('backward', sam, model, 2, on_call={1: lambda loss: loss * math.inf})
    after = sam.method_state_dict()[slot][key]
    assert int(sam.nonfinite) == 1 and all(torch.equal(a, b) for a, b in zip(before, after))


def test_first_update_with_overflow_leaves_friendly_as_new():
    model, twin = TinyNet().double(), TinyNet().double()
    sam = sam_on(model, method=methods.friendly())
    sam.backward(BatchLoss(model, batch(0), on_call={1: lambda loss: loss * math.inf}))
    sam.zero_grad()
    plain = sam_on(twin)
    twin.load_state_dict(model.state_dict())
    one_step('minimize', sam, model, 1)
    one_step('minimize', plain, twin, 1)
    assert_identical(weights(model), weights(twin))


SCALED = {name: ours for name, (ours, _) in METHODS.items()} | {
    'random_mask': lambda: methods.random_mask(0.5), 'ssam_dynamic': lambda: methods.ssam_dynamic(0.5, total_epochs=4),
    'ssam_fisher': lambda: methods.ssam_fisher(0.5, samples=2), 'late': lambda: methods.late(start=1, lr_min=0.0),
}


@pytest.mark.parametrize('name', SCALED)
def test_loss_scale_does_not_matter(name):
    ours = SCALED[name]
    model, twin = TinyNet().double(), TinyNet().double()
    scaled, plain = sam_on(model, method=ours()), sam_on(twin, method=ours())
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0 ** 12)
    for step in range(4):
        for sam, one in ((scaled, model), (plain, twin)):
            sam.begin(step // 2, step, samples_of(one))
        torch.manual_seed(step)
        scaled.zero_grad()
        scaled.backward(BatchLoss(model, batch(step)), scaler=scaler)
        scaler.step(scaled)
        scaler.update()
        one_step('minimize', plain, twin, step)
        assert_close(weights(model), weights(twin))


@pytest.mark.parametrize('name', STATEFUL)
def test_training_goes_on_from_the_state_bit_for_bit(name):
    def train(sam, model, steps):
        for step in steps:
            one_step('minimize', sam, model, step)

    model = TinyNet()
    whole = sam_on(model, method=STATEFUL[name]())
    train(whole, model, range(3))
    twin = TinyNet()
    first = sam_on(twin, method=STATEFUL[name]())
    train(first, twin, range(3))
    again = TinyNet()
    again.load_state_dict(twin.state_dict())
    second = sam_on(again, method=STATEFUL[name]())
    second.load_state_dict(first.state_dict())
    second.load_method_state_dict(first.method_state_dict())
    second.begin(0, 3)
    train(whole, model, range(3, 6))
    train(second, again, range(3, 6))
    assert_identical(weights(model), weights(again))


# Cost: tests/plugin/test_cost.py has large networks, test_esam.py the draws of ESAM

WHOLE = {  # name -> the method, updates of a round, passes at w + eps, at w, and whether those are of all parameters
    'usam': (lambda: methods.usam(), 1, 1, 1, False), 'friendly': (lambda: methods.friendly(), 1, 1, 1, False),
    'random_mask': (lambda: methods.random_mask(0.5), 1, 1, 1, False),
    'ssam_dynamic': (lambda: methods.ssam_dynamic(0.5, total_epochs=9), 1, 1, 1, False),
    'ssam_fisher': (lambda: methods.ssam_fisher(0.5, samples=2), 1, 1, 1, False),
    'gsam radius': (lambda: methods.gsam(alpha=0), 1, 1, 1, False),
    'gsam': (lambda: methods.gsam(alpha=0.4), 1, 1, 1, True), 'stable': (lambda: methods.stable(), 1, 1, 1, True),
    'looksam': (lambda: methods.looksam(k=3, alpha=0.1), 3, 3, 1, True),
    'msam': (lambda: methods.msam(), 2, 2, 0, False),
    'late': (lambda: methods.late(start=0.75, ramp=False, total_updates=4), 4, 4, 1, False),
}


@pytest.mark.parametrize('params', ['all', 'onlynorm'])
@pytest.mark.parametrize('name', WHOLE)
def test_flops_are_those_of_the_passes(name, params):
    """A pass over all parameters is a plain update; without gradients of weights it is two thirds of one."""
    make, updates, descents, ascents, full = WHOLE[name]
    model = TinyNet()
    loss = BatchLoss(model, batch(0, dtype=torch.float32))
    plain = flops(lambda: loss().backward())
    model.requires_grad_(False)
    for p_name in SELECTIONS[params]:
        model.get_parameter(p_name).requires_grad_(True)
    at_w = plain if full else flops(lambda: loss().backward())
    model.requires_grad_(True)
    model.zero_grad()
    sam = sam_on(model, params=params, share_forward=False, method=make())

    def round_of_updates():
        for update in range(updates):
            sam.begin(0, update, samples_of(model))
            sam.minimize(loss)

    round_of_updates()  # a mask is estimated, and MSAM has a momentum afterwards
    assert flops(round_of_updates) == descents * plain + ascents * at_w
    assert params == 'all' or at_w < plain or full


def test_radius_of_gsam_alone_follows_the_rate_and_goes_with_another_change_of_the_step():
    model = TinyNet()
    sam = sam_on(model, method=[methods.gsam(alpha=0, rho_min=0.1, lr_max=0.1, lr_min=0.0), methods.stable()])
    norms = []
    for step, lr in enumerate((0.1, 0.05, 0.0)):
        sam.param_groups[0]['lr'] = lr
        one_step('minimize', sam, model, step)
        norms.append(float(sam.stats.eps_norm))
    assert norms == pytest.approx([0.5, 0.3, 0.1], rel=1e-5)


@pytest.mark.parametrize('make, message', [
    (lambda: methods.usam(lam=1.5), 'usam: lam=1.5 must be a number from 0 to 1'),
    (lambda: methods.usam(lam='half'), "usam: lam='half' must be"), (lambda: methods.usam(lam=True), 'usam: lam=True'),
    (lambda: methods.friendly(sigma=-1), 'friendly: sigma=-1'), (lambda: methods.friendly(lam=2), 'friendly: lam=2'),
    (lambda: methods.looksam(k=0, alpha=1), 'looksam: k=0'),
    (lambda: methods.looksam(k=2.0, alpha=1), 'looksam: k=2.0'),
    (lambda: methods.looksam(k=2, alpha=math.inf), 'looksam: alpha=inf'),
    (lambda: methods.late(start=0), 'late: start=0'), (lambda: methods.late(start=1.5), 'late: start=1.5'),
    (lambda: methods.late(start=3), 'late: lr_min=None: the ramp needs'),
    (lambda: methods.late(start=0.5, ramp=False), 'late: start=0.5 is a share of total_updates'),
    (lambda: methods.random_mask(1), 'random_mask: sparsity=1 must'),
    (lambda: methods.random_mask(0.5, every=0), 'random_mask: every=0'),
    (lambda: methods.random_mask(0.5, norm='l2'), "random_mask: norm='l2'"),
    (lambda: methods.ssam_dynamic(0.5), 'ssam_dynamic: total_epochs=None'),
    (lambda: methods.ssam_dynamic(0.5, drop=2, total_epochs=2), 'ssam_dynamic: drop=2')])
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
