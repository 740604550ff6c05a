"""Sharpness by closed forms, golden values of the published code, and what leaves it as it is."""
import copy
import math

import numpy as np
import pytest
import reference_analysis as reference
import torch
from torch import nn

from timm_sam.analyze.ball import WeightBall, checkpoints
from timm_sam.analyze.objective import Objective, batch_loss, loss_range, normalized_logits
from timm_sam.analyze.released import released
from timm_sam.analyze.sharpness import Measured, batch_sharpness, noise, summary
from timm_sam.selection import select_parameters

pytestmark = pytest.mark.full

DOUBLE = torch.float64
NORMS = ('linf', 'l2')


def split(values):
    values = torch.as_tensor(values, dtype=DOUBLE)
    half = len(values) // 2
    return [values[:half].clone(), values[half:].clone()]


def quadratic(curvatures):
    h = torch.as_tensor(curvatures, dtype=DOUBLE)
    return lambda w: 0.5 * (h * torch.cat(w) ** 2).sum()


def oscillating(w):
    flat = torch.cat(w)
    c, k = torch.tensor([1, 2, 0.5, 1], dtype=DOUBLE), torch.tensor([3, 4, 5, 6], dtype=DOUBLE)
    return (c * torch.sin(k * flat)).sum() + 0.3 * torch.sin(7 * flat.sum())


LOSSES = {'quadratic': quadratic(reference.CURVATURES), 'oscillating': oscillating}


def sharpness(loss, weights, kind, norm, radius, raw=False, **options):
    measure = Measured(kind, norm, raw, radius)
    return batch_sharpness(loss, weights, [measure], 0, **options)[measure]['sharpness']


@pytest.mark.parametrize('zeros', [False, True])
@pytest.mark.parametrize('raw', [False, True])
@pytest.mark.parametrize('norm', NORMS)
def test_linear_loss_rises_by_the_dual_norm(norm, raw, zeros):
    generator = np.random.default_rng(0)
    slopes, values = generator.normal(size=10), generator.normal(size=10)
    if zeros:
        values[[1, 7]] = 0
    a = torch.tensor(slopes)
    expected = reference.linear_rise(slopes, np.ones(10) if raw else np.abs(values), norm, 0.3)
    for kind in ('worst', 'step'):
        found = sharpness(lambda w: (a * torch.cat(w)).sum(), split(values), kind, norm, 0.3, raw)
        assert found == pytest.approx(expected, abs=1e-12)


def test_quadratic_loss_in_a_box():
    loss, w = LOSSES['quadratic'], split(reference.WEIGHTS)
    start = float(loss(w))
    for radius in (0.01, 0.1, 0.7):
        found = sharpness(loss, w, 'worst', 'linf', radius)
        assert found == pytest.approx((2 * radius + radius ** 2) * start, abs=1e-12)
        expected = reference.quadratic_box(reference.CURVATURES, reference.WEIGHTS, np.ones(4), radius)
        assert sharpness(loss, w, 'worst', 'linf', radius, raw=True) == pytest.approx(expected, abs=1e-12)


def test_quadratic_loss_in_a_ball():
    values, n, a, radius = np.array([0.5, -1.0, 2.0, 0.1]), 4, 0.7, 0.2
    found = sharpness(quadratic(a / values ** 2), split(values), 'worst', 'l2', radius)
    assert found == pytest.approx(a * (radius * math.sqrt(n) + radius ** 2 / 2), abs=1e-12)
    # curvature without spread: the gradient's direction is the best one
    w = split(values)
    expected = radius * 3 * np.linalg.norm(values) + 3 * radius ** 2 / 2
    assert sharpness(quadratic([3.0] * 4), w, 'worst', 'l2', radius, raw=True) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize('seed', range(8))
def test_badly_conditioned_quadratic_is_nearly_maximised_and_never_exceeded(seed):
    generator = np.random.default_rng(seed)
    h, values = 10 ** generator.uniform(-1, 1, 20), generator.normal(size=20)
    largest = reference.quadratic_ball(h, h * values, 0.5)
    found = sharpness(quadratic(h), split(values), 'worst', 'l2', 0.5, raw=True)
    assert 0.95 * largest <= found <= largest * (1 + 1e-12)


@pytest.mark.parametrize('norm, share', [('l2', 1 / 2), ('linf', 1 / 6)])
def test_average_of_a_quadratic_loss(norm, share):
    loss, w, draws, radius = LOSSES['quadratic'], split(reference.WEIGHTS), 2000, 0.3
    expected = radius ** 2 * share * (reference.CURVATURES * reference.WEIGHTS ** 2).sum()
    singles = torch.stack([loss([x + x.abs() * radius * n for x, n in zip(w, noise(w, norm, (42, 0, draw)))]) - loss(w)
                           for draw in range(draws)])
    found = sharpness(loss, w, 'average', norm, radius, draws=draws)
    assert found == pytest.approx(float(singles.mean()), abs=1e-12)
    assert abs(found - expected) < 4 * float(singles.std()) / math.sqrt(draws)


@pytest.mark.parametrize('case', reference.RELEASED)
def test_released_search_gives_what_the_published_code_gives_and_apgd_more_or_less(case):
    name, norm, adaptive, radius = case
    loss, w = LOSSES[name], split(reference.WEIGHTS)
    assert float(oscillating(w)) == pytest.approx(reference.oscillating(reference.WEIGHTS))
    # bisection in the published code ends at 1e-5
    tolerance = 1e-6 if norm == 'linf' or not adaptive else {'quadratic': 2e-4, 'oscillating': 1e-2}[name]
    for kind, golden, other in zip(('step', 'worst'), reference.RELEASED[case], reference.APGD[case]):
        found = sharpness(loss, w, kind, norm, radius, not adaptive, protocol='released')
        assert found == pytest.approx(golden, rel=tolerance, abs=1e-6)
        assert sharpness(loss, w, kind, norm, radius, not adaptive) == pytest.approx(other, rel=1e-6, abs=1e-6)


def test_released_search_on_a_linear_loss_gets_closer_every_other_step():
    a, w = torch.tensor([1.0, -2, 3, 4], dtype=DOUBLE), split(reference.WEIGHTS)
    objective = Objective(lambda x: (a * torch.cat(x)).sum(), w)
    largest = reference.linear_rise(a.numpy(), np.abs(reference.WEIGHTS), 'linf', 0.1)
    for steps in range(1, 8):
        found = float(released(objective.at, w, True, 'linf', 0.1, steps) - objective.start_loss)
        assert found / largest == pytest.approx(1 - 4.0 ** -math.ceil(steps / 2), abs=1e-12)


def test_released_search_leaves_a_weight_that_is_zero_and_stays_in_the_ball():
    a, values = torch.tensor([1.0, -2, 3, 4], dtype=DOUBLE), np.array([0.5, 0.0, 2.0, 0.1])
    objective = Objective(lambda x: (a * torch.cat(x)).sum(), split(values))
    found = float(released(objective.at, objective.weights, True, 'l2', 0.1, 20) - objective.start_loss)
    assert 0 < found <= reference.linear_rise(a.numpy(), np.abs(values), 'l2', 0.1) * (1 + 1e-6)


def test_checkpoints_are_the_papers_shares_rounded_up():
    assert checkpoints(20) == (5, 9, 12, 14, 16, 18, 19, 20)
    assert checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)
    assert checkpoints(1) == (1,)


def test_ball_takes_one_norm_over_all_tensors_and_every_gradient():
    ball = WeightBall('l2', 1.0, 2)
    points = ball.project([torch.tensor([3.0]), torch.tensor([4.0])])
    assert [float(p) for p in points] == pytest.approx([0.6, 0.8])
    tiny = ball.direction([torch.tensor([3e-30]), torch.tensor([4e-30, float('nan')])])
    assert torch.cat(tiny).tolist() == pytest.approx([0.6, 0.8, 0.0])
    assert torch.cat(ball.direction([torch.zeros(2), torch.zeros(1)])).tolist() == [0, 0, 0]
    assert [v.shape for v in ball.per_sample(torch.ones(1, dtype=DOUBLE))] == [(), ()]


@pytest.mark.parametrize('classes', [2, 10, 100, 1000])
def test_range_of_normalized_losses(classes):
    assert loss_range(classes) == pytest.approx(reference.largest_normalized_loss_difference(classes), abs=1e-12)


def test_range_of_normalized_losses_of_three_data_sets():
    assert [round(loss_range(k), 4) for k in (10, 100, 1000)] == [1.8694, 1.9865, 1.9987]


def test_normalized_logits_of_no_length_are_zero():
    assert normalized_logits(torch.full((2, 5), 3.0)).tolist() == torch.zeros(2, 5).tolist()


# ---- networks

def relu_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 5)).eval()


def conv_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    with torch.no_grad():
        net(torch.randn(64, 3, 8, 8))
    net[1].eps = 0.0
    return net.eval()


def batch(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, *shape, generator=generator), torch.randint(5, (16,), generator=generator)


def of_net(net, data, measures, normalize=True, params='all', **options):
    selected = dict(select_parameters(net, params))
    loss = batch_loss(net, list(selected), *data, normalize)
    found = batch_sharpness(loss, [p.detach() for p in selected.values()], measures, 0, **options)
    return [found[m]['sharpness'] for m in measures]


ADAPTIVE = [Measured(kind, norm, False, 0.05) for kind in ('worst', 'step', 'average') for norm in NORMS]
RAW = [Measured('worst', norm, True, 0.05) for norm in NORMS]


def test_adaptive_sharpness_does_not_see_a_scale_moved_between_layers():
    data = batch(6)
    first = of_net(relu_net(), data, ADAPTIVE + RAW)
    for factor in (2.0, 3.0):
        net = relu_net()
        with torch.no_grad():
            net[0].weight *= factor
            net[0].bias *= factor
            net[2].weight /= factor
        scaled = of_net(net, data, ADAPTIVE + RAW)
        n = len(ADAPTIVE)
        if factor == 2.0:
            assert scaled[:n] == first[:n]
        # rounding of losses near 1; what noise raises is a thousandth of that
        assert scaled[:n] == pytest.approx(first[:n], rel=1e-5, abs=5e-8)
        assert all(abs(a / b - 1) > 0.05 for a, b in zip(scaled[n:], first[n:]))


def test_adaptive_sharpness_does_not_see_a_scale_that_batchnorm_removes():
    data = batch(3, 8, 8)
    first = of_net(conv_net(), data, ADAPTIVE)
    net = conv_net()
    with torch.no_grad():
        net[0].weight *= 2
        net[0].bias *= 2
        net[1].running_mean *= 2
        net[1].running_var *= 4
    assert of_net(net, data, ADAPTIVE) == first


def test_normalized_logits_do_not_see_the_scale_of_the_last_layer():
    data, net = batch(6), relu_net()
    measures = [Measured('worst', norm, False, 0.05) for norm in NORMS]
    plain = [of_net(net, data, measures, normalize) for normalize in (True, False)]
    with torch.no_grad():
        net[2].weight *= 1000
        net[2].bias *= 1000
    scaled = [of_net(net, data, measures, normalize) for normalize in (True, False)]
    assert scaled[0] == pytest.approx(plain[0], abs=1e-4)
    assert all(a > 10 * b for a, b in zip(scaled[1], plain[1]))


def test_worst_is_at_least_one_step_and_at_most_the_range():
    data = batch(3, 8, 8)
    for radius in (0.001, 0.05, 0.5, 5.0):
        measures = [Measured(kind, norm, raw, radius) for norm in NORMS for raw in (False, True)
                    for kind in ('step', 'worst')]
        found = of_net(conv_net(), data, measures)
        for step, worst in zip(found[::2], found[1::2]):
            assert 0 <= step <= worst <= loss_range(5)


def test_selected_parameters_alone_move():
    data, net = batch(3, 8, 8), conv_net()
    measures = [Measured('step', norm, False, 1e-4) for norm in NORMS]
    loss = batch_loss(net, list(dict(net.named_parameters())), *data, True)
    weights = {name: p.detach() for name, p in net.named_parameters()}
    grads = dict(zip(weights, Objective(loss, list(weights.values())).start_grads))
    for params in ('all', 'onlynorm', 'nonorm'):
        slopes = np.concatenate([grads[n].double().flatten().numpy() for n, _ in select_parameters(net, params)])
        scales = np.concatenate([weights[n].abs().flatten().numpy() for n, _ in select_parameters(net, params)])
        expected = [reference.linear_rise(slopes, scales, norm, 1e-4) for norm in NORMS]
        assert of_net(net, data, measures, params=params) == pytest.approx(expected, rel=0.02)


def test_gradient_that_is_zero_is_said():
    net = relu_net()
    with torch.no_grad():
        net[2].weight.zero_()
        net[2].bias.zero_()
    loss = batch_loss(net, ['0.weight'], *batch(6), True)
    found = batch_sharpness(loss, [net[0].weight.detach()], ADAPTIVE[:4], 0)
    assert all(value['sharpness'] == 0 and value['no_gradient'] for value in found.values())
    assert summary(list(found.values()), 1.0)['no_gradient'] == 4


def test_losses_that_are_not_finite_are_counted_and_never_the_largest():
    w = split([1.0, 1.0, 1.0, 1.0])
    measure = Measured('worst', 'linf', True, 3.0)
    value = batch_sharpness(lambda x: -torch.log(2.3 - torch.cat(x)[0]), w, [measure], 0)[measure]
    assert value['non_finite'] > 0 and math.isfinite(value['sharpness'])


def test_nothing_of_the_model_changes():
    net, data = conv_net(), batch(3, 8, 8)
    net.eval()
    net[4].weight.grad = torch.ones_like(net[4].weight)
    net[0].bias.requires_grad_(False)
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    random_state = torch.get_rng_state()
    of_net(net, data, [*ADAPTIVE, *RAW])
    of_net(net, data, ADAPTIVE, protocol='released')
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ['4.weight']
    assert torch.equal(net[4].weight.grad, torch.ones_like(net[4].weight))
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ['0.bias']


def test_order_of_measures_changes_nothing():
    data = batch(3, 8, 8)
    found = of_net(conv_net(), data, [*ADAPTIVE, *RAW])
    assert of_net(conv_net(), data, [*RAW[::-1], *ADAPTIVE[::-1]]) == found[::-1]


def test_summary_of_batches():
    one = dict(loss=1.0, no_gradient=False, non_finite=0)
    found = summary([dict(one, sharpness=v) for v in (0.2, 0.4, 0.95, 0.45)], 1.0)
    assert found['mean'] == pytest.approx(0.5) and found['saturated'] == 0.25
    assert found['standard_error'] == pytest.approx(np.std([0.2, 0.4, 0.95, 0.45], ddof=1) / 2)
    assert summary([dict(one, sharpness=0.2)], None)['standard_error'] is None
