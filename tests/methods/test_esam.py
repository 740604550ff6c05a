"""ESAM: drawn tensors, chosen samples, against its transcription in float64 and by its defining properties."""
import math

import pytest
import reference_methods as papers
import timm
import torch
import torch.nn.functional as F
from support.models import (
    ALL,
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
from support.row_loss import RowLoss
from torch import nn

from timm_sam import SAM, methods
from timm_sam.methods.esam import DrawnTensors, MostSensitive
from timm_sam.methods.stages import At

RHO = 0.5


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


def drawn_by(method, sam, update):
    """Names of the tensors of an update."""
    names = [name for name, _ in sam.selected]
    if method.mask is None:
        return names
    return [name for name, taken in zip(names, method.mask.draw(At(0, update, 0, 0, 0), len(names))) if taken]


@pytest.mark.parametrize('variant', ['sam', 'elementwise_l2'])
@pytest.mark.parametrize('selection', SELECTIONS)
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('beta, gamma', [(0.6, 0.5), (0.5, 1), (1, 0.4)])
def test_update_is_that_of_the_transcription_after_every_step(beta, gamma, optimizer, selection, variant):
    model, twin, method = TinyNet().double(), TinyNet().double(), methods.esam(beta=beta, gamma=gamma)
    sam = sam_on(model, optimizer, params=selection, variant=variant, rho=RHO, method=method)
    base = OPTIMIZERS[optimizer](twin)
    for step in range(5):
        paper = papers.Esam(beta, gamma, lambda step=step: drawn_by(method, sam, step))
        if gamma < 1:
            torch.manual_seed(step)
            sam.minimize(RowLoss(model, batch(step)))
        else:
            one_step('minimize', sam, model, step)
        torch.manual_seed(step)
        loss = paper.step(twin, base, RowLoss(twin, batch(step)), SELECTIONS[selection], variant, RHO)
        assert_close(sam.stats.loss, loss)
        assert_close(weights(model), weights(twin))
        assert_close(buffers(model), buffers(twin))
        assert_close(sam.optimizer.state_dict()['state'], base.state_dict()['state'])


@pytest.mark.parametrize('selection', SELECTIONS)
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_limit_is_sam_bit_for_bit_and_has_two_passes(optimizer, selection):
    model, twin = TinyNet(), TinyNet()
    sam = sam_on(model, optimizer, params=selection, method=methods.esam(beta=1, gamma=1))
    plain = sam_on(twin, optimizer, params=selection)
    for step in range(4):
        assert len(one_step('minimize', sam, model, step).weights_seen) == 2
        one_step('minimize', plain, twin, step)
        assert_identical(weights(model), weights(twin))


# Stochastic weight perturbation

@pytest.mark.parametrize('way', ['minimize', 'closure', 'backward', 'primitives'])
def test_tensors_outside_the_draw_stay_bit_identical_and_eps_has_length_rho_over_beta(way):
    model, method = TinyNet().double(), methods.esam(beta=0.4, gamma=1)
    sam, counts = sam_on(model, params='all', method=method), []
    for step in range(6):
        sam.begin(0, step)
        seen = one_step(way, sam, model, step).weights_seen
        moved = [name for name in ALL if not torch.equal(seen[0][name], seen[1][name])]
        assert moved == drawn_by(method, sam, step)
        assert float(sam.stats.eps_norm) == pytest.approx(RHO / 0.4, rel=1e-12)
        counts.append(len(moved))
    assert len(set(counts)) > 1 and max(counts) < len(ALL)


def test_every_tensor_is_drawn_with_probability_beta():
    mask, count, draws = DrawnTensors(0.3), 20, 10_000
    drawn = [mask.draw(At(0, update, 0, 0, 0), count) for update in range(draws)]
    mean = sum(map(sum, drawn)) / draws
    expected = 0.3 * count + 0.7 ** count  # one where there is none
    assert abs(mean - expected) < 5 * math.sqrt(0.3 * 0.7 * count / draws)
    each = torch.tensor(drawn, dtype=torch.float64).mean(0)
    assert float((each - 0.3).abs().max()) < 5 * math.sqrt(0.21 / draws)


def test_at_least_one_tensor_is_drawn():
    mask = DrawnTensors(1e-6)
    drawn = [mask.draw(At(0, update, 0, 0, 0), 5) for update in range(200)]
    assert all(sum(taken) == 1 for taken in drawn)
    assert {taken.index(True) for taken in drawn} == set(range(5))


def test_draws_are_a_function_of_seed_and_place_and_move_no_random_numbers():
    mask = DrawnTensors(0.5)
    before = torch.get_rng_state()
    first = mask.draw(At(1, 7, 2, 3, 0), 40)
    torch.manual_seed(5)
    assert first == DrawnTensors(0.5).draw(At(1, 7, 2, 3, 0), 40)
    others = [At(1, 7, 2, 4, 0), At(1, 8, 2, 3, 0), At(1, 7, 1, 3, 0), At(1, 7, 2, 3, 1, 4)]
    assert all(first != mask.draw(at, 40) for at in others)
    torch.set_rng_state(before)


def test_ranks_draw_as_the_chunks_of_one_process_do():
    assert [At(0, 3, m_batch, 0, 0, 1).number for m_batch in range(6)] == [
        At(0, 3, m_batch, 0, rank, 2).number for m_batch in range(3) for rank in range(2)]


def test_draw_that_misses_all_used_tensors_gives_no_perturbation():
    class Unused(TinyNet):
        def __init__(self):
            super().__init__()
            self.others = nn.ModuleList(nn.LayerNorm(2) for _ in range(50))

    model = Unused()
    sam = sam_on(model, method=methods.esam(beta=1e-6, gamma=1))
    for step in range(8):
        one_step('minimize', sam, model, step)
    assert all(torch.isfinite(w).all() for w in weights(model).values()) and int(sam.nonfinite) == 0


def test_nothing_is_known_of_tensors_that_are_not_drawn_so_friendly_is_refused():
    with pytest.raises(ValueError, match=r'friendly\(.*needs the gradients of all perturbed tensors, of which esam'):
        sam_on(TinyNet(), method=[methods.esam(beta=0.5, gamma=1), methods.friendly()])
    sam_on(TinyNet(), method=[methods.esam(beta=1, gamma=0.5), methods.friendly()])


def test_a_mask_and_a_draw_are_refused():
    with pytest.raises(ValueError, match='both decide the mask'):
        sam_on(TinyNet(), method=[methods.esam(beta=0.5, gamma=1), methods.random_mask(0.5)])


# Sharpness-sensitive data selection

@pytest.mark.parametrize('gamma, m, count', [(0.5, 6, 3), (0.5, 7, 3), (0.1, 5, 1), (0.29, 100, 29), (0.7, 10, 7)])
def test_as_many_samples_are_chosen_as_asked_for_those_whose_loss_rises_most(gamma, m, count):
    generator = torch.Generator().manual_seed(m)
    before, after = torch.rand(2, m, generator=generator, dtype=torch.float64)
    rises = (after - before).tolist()
    by_hand = sorted(sorted(range(m), key=lambda i: -rises[i])[:count])
    assert MostSensitive(gamma)(before, after).tolist() == by_hand


def test_ties_go_by_position_and_lose_nobody():
    assert MostSensitive(0.5)(torch.zeros(6), torch.zeros(6)).tolist() == [0, 1, 2]
    assert MostSensitive(0.5)(torch.zeros(6), torch.tensor([0, 1, 0, 1, 0, 1.0])).tolist() == [1, 3, 5]


def test_gradient_is_the_plain_one_of_the_chosen_samples_at_w_plus_eps():
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)).double()

    model, twin = net(), net()
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=RHO, method=methods.esam(beta=1, gamma=0.5))
    loss_fn = RowLoss(model, batch(0))
    sam.backward(loss_fn)
    chosen = loss_fn.rows[-1]
    assert len(chosen) == 3 and loss_fn.rows[:-1] == [None, None]
    F.cross_entropy(twin(loss_fn.x), loss_fn.y).backward()
    g = {name: p.grad.clone() for name, p in twin.named_parameters() if name.startswith('2.')}
    with torch.no_grad():
        for name, value in g.items():
            twin.get_parameter(name).add_(RHO * value / papers.lengths(g.values()))
    twin.zero_grad()
    F.cross_entropy(twin(loss_fn.x[chosen]), loss_fn.y[chosen]).backward()
    assert_close({name: p.grad for name, p in model.named_parameters()},
                 {name: p.grad for name, p in twin.named_parameters()})


def test_autocast_around_both_passes_does_not_lose_the_gradient():
    model = TinyNet()
    sam = sam_on(model, params='all', method=methods.esam(beta=1, gamma=0.5))
    with torch.autocast('cpu', torch.bfloat16):
        sam.backward(RowLoss(model, batch(0, dtype=torch.float32)))
    assert all(p.grad is not None for p in model.parameters())


def test_mean_loss_is_refused_and_the_remedy_named():
    model = TinyNet()
    sam = sam_on(model, method=methods.esam(beta=1, gamma=0.5))
    with pytest.raises(ValueError, match=r'shape \(m,\), not a tensor of shape \(\); or take all of them by gamma=1'):
        sam.minimize(lambda rows: BatchLoss(model, batch(0, dtype=torch.float32))())


@pytest.mark.parametrize('params, late', [('all', None), ('onlynorm', None), ('onlynorm', 'norm')])
@pytest.mark.parametrize('beta, gamma', [(0.5, 1), (0.5, 0.5), (1, 0.5)])
def test_training_goes_on_from_an_update_with_the_same_draws(beta, gamma, params, late):
    def train(sam, model, steps):
        for step in steps:
            sam.begin(0, step)
            torch.manual_seed(step)
            loss_fn = RowLoss(model, batch(step, dtype=torch.float32))
            sam.minimize(loss_fn if gamma < 1 else lambda loss_fn=loss_fn: loss_fn().mean())

    def make(model):
        return sam_on(model, params=params, filter=late, method=methods.esam(beta=beta, gamma=gamma))

    model, again = TinyNet(), TinyNet()
    whole = make(model)
    train(whole, model, range(5))
    first = make(again)
    train(first, again, range(3))
    assert first.method_state_dict() == {}
    second = make(again)
    second.load_state_dict(first.state_dict())
    train(second, again, range(3, 5))
    assert_identical(weights(model), weights(again))


@pytest.mark.parametrize('selection', ['all', 'onlynorm'])
def test_loss_scale_does_not_matter_and_overflow_changes_nothing(selection):
    model, twin = TinyNet().double(), TinyNet().double()
    scaled, plain = (sam_on(m, params=selection, method=methods.esam(beta=0.5, gamma=0.5)) for m in (model, twin))
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0 ** 12)
    for step in range(3):
        for sam, one, scale in ((scaled, model, scaler), (plain, twin, None)):
            sam.begin(0, step)
            torch.manual_seed(step)
            sam.zero_grad()
            sam.backward(RowLoss(one, batch(step)), scaler=scale)
            if scale is None:
                sam.step()
            else:
                scaler.step(sam)
                scaler.update()
        assert_close(weights(model), weights(twin))
    before = weights(twin)
    bad = batch(9)
    plain.zero_grad()
    plain.backward(RowLoss(twin, (bad[0] * math.inf, bad[1])), scaler=None)
    assert int(plain.nonfinite) == 1
    assert_identical(weights(twin), before)


@pytest.mark.full
@pytest.mark.parametrize('beta, gamma', [(1, 0.5), (0.5, 1), (0.5, 0.5)])
def test_flops_are_those_of_the_formula(beta, gamma):
    """3 + beta + 3 gamma units, 5 + beta for gamma 1, beta the share that is drawn; linear layers of one size."""
    torch.manual_seed(0)
    layers = 24
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(layers)))
    x, y = torch.randn(8, 16, requires_grad=True), torch.zeros(8, dtype=torch.int64)

    def losses(rows=None):
        return F.cross_entropy(model(x if rows is None else x[rows]), y if rows is None else y[rows], reduction='none')

    method = methods.esam(beta=beta, gamma=gamma)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.0), model, params='all', rho=0.05, method=method)
    unit = flops(lambda: losses())
    for update in range(4):
        sam.begin(0, update)
        drawn = [True] * layers if method.mask is None else method.mask.draw(sam.at, layers)
        counted = flops(lambda: sam.minimize(losses if gamma < 1 else lambda: losses().mean())) / unit
        # the pass at w goes down to the lowest drawn layer only
        below = (drawn.index(True) + 1) / layers
        table = 3 + sum(drawn) / layers + 3 * gamma if gamma < 1 else 5 + sum(drawn) / layers
        assert counted == pytest.approx(table - below, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize('beta, gamma, params, units', [
    (1, 0.5, 'all', 5.5), (0.6, 0.5, 'all', 5.1), (0.5, 0.5, 'all', 5), (0.6, 1, 'all', 5.6), (0.5, 1, 'all', 5.5),
    (0.5, 0.5, 'onlynorm', 4.5), (0.5, 1, 'onlynorm', 5)])
@pytest.mark.parametrize('name', ['resnet50', 'vit_small_patch32_224'])
def test_flops_of_large_networks_are_those_of_the_table(name, beta, gamma, params, units):
    """Over a plain update of three units, on average over draws; counted on torch's meta device: about 20 s."""
    with torch.device('meta'):
        model = timm.create_model(name).train()
        x, y = torch.empty(4, 3, 224, 224), torch.zeros(4, dtype=torch.int64)

    def losses(rows=None):
        return F.cross_entropy(model(x if rows is None else x[rows]), y if rows is None else y[rows], reduction='none')

    def mean():
        return losses().mean()

    plain = flops(lambda: mean().backward())
    model.zero_grad()
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.0), model, params=params, rho=0.05, share_forward=False,
              method=methods.esam(beta=beta, gamma=gamma))
    counted = []
    for update in range(4 if beta < 1 and params == 'all' else 1):
        sam.begin(0, update)
        # another function for the pass at w: whether one sees the same input twice cannot be told without numbers
        options = dict(loss_fn=losses) if gamma < 1 else dict(loss_fn=mean, ascent_fn=lambda: mean())
        counted.append(flops(lambda options=options: sam.minimize(**options)) / plain)
    assert sum(counted) / len(counted) == pytest.approx(units / 3, abs=0.02)


@pytest.mark.parametrize('make, message', [
    (lambda: methods.esam(beta=0, gamma=1), 'esam: beta=0 must be a number > 0 and <= 1'),
    (lambda: methods.esam(beta=1.5, gamma=1), 'esam: beta=1.5'),
    (lambda: methods.esam(beta=1, gamma=0), 'esam: gamma=0'),
    (lambda: methods.esam(beta=1, gamma=math.nan), 'esam: gamma=nan'),
    (lambda: methods.esam(beta=True, gamma=1), 'esam: beta=True')])
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
