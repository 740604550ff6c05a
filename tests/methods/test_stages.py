"""The seam: what each slot of an update is given, when, and what comes of it. These methods exist for the tests."""
import pytest
import torch
import torch.nn.functional as F
from reference import loss_and_gradients, perturbation
from support.models import (
    ONLYNORM,
    OPTIMIZERS,
    BatchLoss,
    TinyNet,
    assert_identical,
    batch,
    buffers,
    one_step,
    sam_on,
    weights,
)
from support.row_loss import RowLoss
from support.slots import Noting, Residual

from timm_sam import SAM
from timm_sam.methods.stages import Method, Stages, merged

RHO = 0.5


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def by_hand(model, data, seed, eps_of, choose=None):
    """Both passes of one batch: g over all parameters, G at w + eps_of(g of the selected ones), and eps."""
    params, before = dict(model.named_parameters()), weights(model)

    def loss_fn():
        return F.cross_entropy(model(data[0]), data[1])

    torch.manual_seed(seed)
    _, g = loss_and_gradients(model, loss_fn)
    kept = buffers(model)
    eps = eps_of({name: g[name] for name in ONLYNORM})
    with torch.no_grad():
        for name in ONLYNORM:
            params[name].add_(eps[name])
    torch.manual_seed(seed)
    _, G = loss_and_gradients(model, loss_fn)
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(before[name])
        for name, b in model.named_buffers():
            b.copy_(kept[name])
    return g, G, eps


def sam_eps(model, d, rho=RHO):
    selected = {name: p.detach() for name, p in model.named_parameters() if name in ONLYNORM}
    return perturbation('sam', selected, d, rho)


def step_by_hand(model, optimizer, G):
    for name, p in model.named_parameters():
        p.grad = G[name].clone()
    optimizer.step()
    optimizer.zero_grad()


def named(tensors):
    return dict(zip(ONLYNORM, tensors, strict=True))


# Each slot

class Halving:
    """A radius that halves with every update."""

    def bind(self, rho, groups):
        self.bound = rho, groups[0]['lr']

    def __call__(self, at, rho, groups):
        return rho / 2 ** at.update


def test_radius_is_asked_for_every_update_and_sees_rho_and_the_groups():
    model, radius = TinyNet(), Halving()
    sam = sam_on(model, rho=RHO, method=Method(name='halving', radius=radius))
    assert radius.bound == (RHO, 0.1)
    norms = []
    for step in range(3):
        one_step('minimize', sam, model, step)
        norms.append(float(sam.stats.eps_norm))
    assert norms == pytest.approx([0.5, 0.25, 0.125], rel=1e-5)


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_direction_takes_the_place_of_g_and_observes_its_mean_once_an_update(optimizer):
    model, twin, direction = TinyNet().double(), TinyNet().double(), Residual()
    sam, base = sam_on(model, optimizer, method=Method(name='r', direction=direction)), OPTIMIZERS[optimizer](twin)
    m = None
    for step in range(3):
        one_step('minimize', sam, model, step)
        g, G, _ = by_hand(twin, batch(step), step, lambda g, m=m: sam_eps(
            twin, {name: g[name] - (0 if m is None else m[name]) for name in ONLYNORM}))
        m = {name: g[name] for name in ONLYNORM}
        assert_close(named(direction.m), m)
        step_by_hand(twin, base, G)
        assert_close(weights(model), weights(twin))
        # what is logged is g, not d
        assert_close(sam.stats.grad_norm, torch.cat([t.flatten() for t in m.values()]).norm())
    assert direction.usable == [True] * 3


def test_observed_mean_is_over_the_m_batches_with_their_weights_and_without_the_loss_scale():
    model, direction = TinyNet().double(), Residual()
    sam = sam_on(model, method=Method(name='r', direction=direction))
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0 ** 10)
    expected = dict.fromkeys(ONLYNORM, 0)
    for k, share in enumerate((0.25, 0.75)):
        twin = TinyNet().double()
        torch.manual_seed(k)
        _, g = loss_and_gradients(twin, BatchLoss(twin, batch(k)))
        expected = {name: expected[name] + share * g[name] for name in ONLYNORM}
        torch.manual_seed(k)
        sam.backward(BatchLoss(model, batch(k)), weigh=lambda loss, share=share: share * loss, scaler=scaler,
                     last=k == 1)
        assert (direction.m is None) == (k == 0)
    assert_close(named(direction.m), expected)


def test_update_with_a_gradient_that_is_not_finite_is_observed_as_not_usable():
    model, direction = TinyNet(), Residual()
    sam = sam_on(model, method=Method(name='r', direction=direction))
    one_step('minimize', sam, model, on_call={1: lambda loss: loss * torch.inf})
    assert direction.usable == [False] and int(sam.nonfinite) == 1


class Half:
    """Every other element; `full` says what eps is normalized by, `drawn` which tensors take part at all."""

    def __init__(self, full, drawn=None):
        self.full, self.drawn, self.prepared, self.asked = full, drawn, [], []
        self.observes, self.draws, self.samples = False, drawn is not None, 0

    def bind(self, params):
        assert [p.shape for p in params] == [p.shape for n, p in TinyNet().named_parameters() if n in ONLYNORM]

    def prepare(self, at, samples):
        self.prepared.append((at.epoch, samples))

    def draw(self, at, count):
        self.asked.append((at.update, at.m_batch, count))
        return self.drawn

    def apply(self, d):
        return [(torch.arange(t.numel()).view(t.shape) % 2 == 0) * t for t in d]

    def observe(self, mean, usable):
        pass


@pytest.mark.parametrize('full', [True, False])
def test_mask_confines_eps_and_says_what_normalizes_it(full):
    model, twin = TinyNet().double(), TinyNet().double()
    sam, base = sam_on(model, method=Method(name='half', mask=Half(full))), OPTIMIZERS['sgd'](twin)
    seen = one_step('minimize', sam, model).weights_seen

    def masked(g):
        half = {name: (torch.arange(g[name].numel()).view(g[name].shape) % 2 == 0) * g[name] for name in g}
        norm = torch.cat([t.flatten() for t in (g if full else half).values()]).norm()
        return {name: RHO * half[name] / norm for name in half}

    before = weights(twin)
    _, G, eps = by_hand(twin, batch(0), 0, masked)
    assert_close({name: seen[1][name] - seen[0][name] for name in ONLYNORM}, eps)
    assert_close(sam.stats.eps_norm, torch.cat([t.flatten() for t in eps.values()]).norm())
    assert_identical(weights(twin), before)
    step_by_hand(twin, base, G)
    assert_close(weights(model), weights(twin))


def test_tensors_that_are_not_drawn_stay_bit_identical_in_the_second_pass():
    model, mask = TinyNet(), Half(True, drawn=[True, False, True, False, True, False])
    sam = sam_on(model, method=Method(name='half', mask=mask))
    seen = one_step('minimize', sam, model).weights_seen
    moved = [name for name in seen[0] if not torch.equal(seen[0][name], seen[1][name])]
    assert moved == ONLYNORM[::2]


def test_mask_is_prepared_once_an_epoch_and_drawn_every_m_batch():
    model, mask = TinyNet(), Half(True)
    sam = sam_on(model, method=Method(name='half', mask=mask))
    offered = object()
    for epoch in range(2):
        for update in range(2):
            sam.begin(epoch, 2 * epoch + update, offered)
            for k in range(2):
                sam.backward(BatchLoss(model, batch(k, dtype=torch.float32)), last=k == 1)
            sam.step()
    assert mask.prepared == [(0, offered), (1, offered)]
    assert mask.asked == [(update, k, 6) for update in range(4) for k in range(2)]


def test_mask_is_prepared_without_begin_too():
    model, mask = TinyNet(), Half(True)
    sam = sam_on(model, method=Method(name='half', mask=mask))
    for step in range(2):
        one_step('minimize', sam, model, step)
    assert mask.prepared == [(0, None)]


class Worst:
    """The two samples whose loss rises most."""

    all_by = 'everything=1'

    def __call__(self, before, after):
        self.seen = before, after
        return (after - before).topk(2).indices.sort().values


def test_second_pass_takes_the_chosen_samples_with_the_same_random_numbers():
    model, twin, rows = TinyNet().double(), TinyNet().double(), Worst()
    sam, loss_fn = sam_on(model, method=Method(name='worst', rows=rows)), RowLoss(model, batch(0))
    torch.manual_seed(0)
    loss = sam.backward(loss_fn)
    chosen = loss_fn.rows[2]
    assert loss_fn.rows[:2] == [None, None] and chosen.shape == (2,)
    _, _, eps = by_hand(twin, batch(0), 0, lambda g: sam_eps(twin, g))
    assert_close(loss, rows.seen[0].mean())
    kept = buffers(twin)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.add_(eps.get(name, 0))
    torch.manual_seed(0)
    assert_close(RowLoss(twin, batch(0))(None).detach(), rows.seen[1])
    torch.manual_seed(0)
    RowLoss(twin, batch(0))(chosen).mean().backward()
    assert_close({name: p.grad for name, p in model.named_parameters()},
                 {name: p.grad for name, p in twin.named_parameters()})
    assert_close(buffers(model), kept)


@pytest.mark.parametrize('use', [
    lambda sam, loss_fn: sam.minimize(lambda rows: loss_fn().mean()),
    lambda sam, loss_fn: sam.step(lambda: loss_fn().mean().backward()),
    lambda sam, loss_fn: sam.minimize(loss_fn, ascent_fn=loss_fn)])
def test_choosing_samples_needs_their_losses(use):
    model = TinyNet()
    sam = sam_on(model, method=Method(name='worst', rows=Worst()))
    with pytest.raises(ValueError, match='worst'):
        use(sam, RowLoss(model, batch(0, dtype=torch.float32)))


@pytest.mark.parametrize('way', ['minimize', 'closure'])
def test_correction_acts_once_an_update_plain_ones_included_on_all_parameters(way):
    model, twin, correct = TinyNet().double(), TinyNet().double(), Noting()
    sam = sam_on(model, every=2, method=Method(name='noting', correct=correct))
    base, last = OPTIMIZERS['sgd'](twin), None
    for step in range(4):
        one_step(way, sam, model, step)
        if step % 2 == 0:
            last, G, _ = by_hand(twin, batch(step), step, lambda g: sam_eps(twin, g))
        else:
            torch.manual_seed(step)
            _, g = loss_and_gradients(twin, BatchLoss(twin, batch(step)))
            G = {name: g[name] + 0.5 * last[name] for name in g}
        step_by_hand(twin, base, G)
        assert_close(weights(model), weights(twin))
    assert correct.calls == [(0, True), (1, False), (2, True), (3, False)]


def test_correction_comes_after_the_last_micro_batch_and_before_the_step():
    model, correct = TinyNet(), Noting()
    sam = sam_on(model, method=Method(name='noting', correct=correct))
    for k in range(3):
        sam.backward(BatchLoss(model, batch(k, dtype=torch.float32)), last=k == 2)
        assert correct.calls == ([(0, True)] if k == 2 else [])


# Slots together

def test_two_methods_for_one_stage_are_refused_by_name():
    with pytest.raises(ValueError, match='method: one and two both decide the mask of an update'):
        sam_on(TinyNet(), method=[Method(name='one', mask=Half(True)), Method(name='two', mask=Half(False))])


def test_methods_for_different_stages_go_together():
    model, radius, direction = TinyNet(), Halving(), Residual()
    sam = sam_on(model, method=[Method(name='one', radius=radius), Method(name='two', direction=direction)])
    one_step('minimize', sam, model)
    assert 'one and two: perturbs' in sam.describe() and direction.usable == [True]


def test_state_of_the_slots_goes_out_and_in_under_their_names():
    model, direction = TinyNet(), Residual()
    sam = sam_on(model, method=[Method(name='two', direction=direction), Method(name='one', radius=Halving())])
    one_step('minimize', sam, model)
    state = sam.method_state_dict()
    assert state.keys() == {'direction'} and 'm' not in sam.state_dict()
    fresh = Residual()
    other = sam_on(TinyNet(), method=Method(name='two', direction=fresh))
    other.load_method_state_dict({})
    assert fresh.m is None
    other.load_method_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(fresh.m, direction.m))


def test_empty_slots_ask_for_nothing():
    stages = merged([])
    assert stages == Stages() and not stages.full_ascent and stages.observers == [] and stages.state_dict() == {}


def test_base_optimizer_that_differentiates_again_goes_with_no_method_that_changes_its_gradient():
    model = TinyNet()
    optimizer = OPTIMIZERS['sgd'](model)
    optimizer.is_second_order = True
    with pytest.raises(ValueError, match='method: noting changes the gradient that SGD differentiates again'):
        SAM(optimizer, model, rho=RHO, method=Method(name='noting', correct=Noting()))
