"""SAM against the slow transcription in `reference.py`, in float64, after every step."""
import math

import pytest
import torch
from reference import base_step, perturbation, plain_step, sam_gradients, sam_step
from support.models import (
    OPTIMIZERS,
    SELECTIONS,
    WAYS,
    BatchLoss,
    TinyNet,
    assert_identical,
    batch,
    buffers,
    one_plain_step,
    one_step,
    sam_on,
    weights,
)

from timm_sam import SAM, VARIANTS

RHO = {
    'sam': 0.5,
    'elementwise_l2': 0.5,
    'elementwise_l2_orig': 0.5,
    'elementwise_linf': 0.1,
    'layerwise_l2': 0.2,
    'fisher': 0.5,
}


def twins(optimizer='sgd', *, dtype=torch.float64, seed=0, **sam_options):
    """The same network twice: with SAM, and with the bare base optimizer for the reference."""
    model, twin = TinyNet(seed).to(dtype), TinyNet(seed).to(dtype)
    sam = SAM(OPTIMIZERS[optimizer](model), model, **sam_options)
    return model, sam, twin, OPTIMIZERS[optimizer](twin)


def assert_close(actual, expected, rtol=1e-12, atol=1e-14):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def assert_same_training(model, sam, twin, optimizer):
    assert_close(weights(model), weights(twin))
    assert_close(buffers(model), buffers(twin))
    assert_close(sam.optimizer.state_dict()['state'], optimizer.state_dict()['state'])
    assert sam.optimizer.state_dict()['param_groups'] == optimizer.state_dict()['param_groups']


def assert_follows_reference(way, model, sam, twin, optimizer, selected, variant, rho, eta=None, steps=5):
    for step in range(steps):
        data = batch(seed=100 + step)
        torch.manual_seed(step)
        loss = WAYS[way](sam, BatchLoss(model, data))
        torch.manual_seed(step)
        expected = sam_step(twin, optimizer, BatchLoss(twin, data), selected, variant, rho, eta)

        assert_close(loss, expected.loss)
        assert not loss.requires_grad
        assert_same_training(model, sam, twin, optimizer)
        yield expected


def test_there_are_six_variants():
    assert sorted(VARIANTS) == sorted(RHO)


@pytest.mark.parametrize('way', ['minimize', 'closure'])
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('params', SELECTIONS)
@pytest.mark.parametrize('variant', RHO)
def test_every_step_is_that_of_the_reference(variant, params, optimizer, way):
    model, sam, twin, base = twins(optimizer, variant=variant, params=params, rho=RHO[variant])
    selected = SELECTIONS[params]
    assert sorted(name for name, _ in sam.selected) == sorted(selected)
    for _ in assert_follows_reference(way, model, sam, twin, base, selected, variant, RHO[variant]):
        pass


@pytest.mark.parametrize('way', ['backward', 'primitives'])
@pytest.mark.parametrize('params', SELECTIONS)
@pytest.mark.parametrize('variant', RHO)
def test_passes_and_base_step_called_apart_make_the_same_update(variant, params, way):
    model, sam, twin, base = twins('adamw', variant=variant, params=params, rho=RHO[variant])
    for _ in assert_follows_reference(way, model, sam, twin, base, SELECTIONS[params], variant, RHO[variant]):
        pass


@pytest.mark.parametrize('variant, eta', [
    ('elementwise_l2', 0.1),
    ('elementwise_l2_orig', 0.3),
    ('elementwise_l2_orig', 0.0),
    ('elementwise_linf', 0.1),
    ('fisher', 50.0),
    ('fisher', 0.0),
])
def test_eta_given_replaces_that_of_the_variant(variant, eta):
    model, sam, twin, base = twins(variant=variant, params='all', rho=0.2, eta=eta)
    for _ in assert_follows_reference('minimize', model, sam, twin, base, SELECTIONS['all'], variant, 0.2, eta):
        pass


@pytest.mark.parametrize('variant', RHO)
def test_channels_last_weights_are_perturbed_alike(variant):
    model, sam, twin, base = twins(variant=variant, params='all', rho=RHO[variant])
    model.to(memory_format=torch.channels_last)
    assert not model.conv.weight.is_contiguous()
    for _ in assert_follows_reference('minimize', model, sam, twin, base, SELECTIONS['all'], variant, RHO[variant]):
        pass


def test_filter_keeps_the_names_that_match():
    model, sam, twin, base = twins(params='onlynorm', filter=r'^(gn|norm)\.', rho=0.5)
    selected = ['gn.weight', 'gn.bias', 'norm.weight', 'norm.bias']
    assert sorted(name for name, _ in sam.selected) == sorted(selected)
    for _ in assert_follows_reference('minimize', model, sam, twin, base, selected, 'sam', 0.5):
        pass


@pytest.mark.parametrize('way', ['minimize', 'closure', 'backward'])
@pytest.mark.parametrize('variant', RHO)
def test_stats_are_losses_and_norms_of_the_last_batch(variant, way):
    model, sam, twin, base = twins(variant=variant, params='onlynorm', rho=RHO[variant])
    args = way, model, sam, twin, base, SELECTIONS['onlynorm'], variant, RHO[variant]
    for expected in assert_follows_reference(*args, steps=2):
        assert_close(sam.stats.loss, expected.loss)
        assert_close(sam.stats.loss_perturbed, expected.loss_perturbed)
        assert_close(sam.stats.grad_norm, total_norm(expected.ascent))
        assert_close(sam.stats.eps_norm, total_norm(expected.eps))
        assert sam.nonfinite.ndim == 0 and sam.nonfinite == 0


def total_norm(tensors):
    return torch.cat([t.flatten() for t in tensors.values()]).norm()


def observed_eps(loss_fn, selected):
    """eps as the weights show it: those of the second forward less those of the first."""
    first, second = loss_fn.weights_seen
    return {name: second[name] - first[name] for name in selected}


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('params', SELECTIONS)
def test_perturbation_of_sam_has_norm_rho(params, way):
    model, sam, _, _ = twins(params=params, rho=0.37)
    loss_fn = BatchLoss(model, batch(1))
    WAYS[way](sam, loss_fn)
    eps = observed_eps(loss_fn, SELECTIONS[params])
    assert_close(total_norm(eps), torch.tensor(0.37, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize('params', SELECTIONS)
def test_perturbation_of_linf_moves_every_entry_by_rho_times_its_size(params):
    model, sam, _, _ = twins(variant='elementwise_linf', params=params, rho=0.1)
    loss_fn = BatchLoss(model, batch(1))
    sam.minimize(loss_fn)
    for name, eps in observed_eps(loss_fn, SELECTIONS[params]).items():
        assert_close(eps.abs(), 0.1 * loss_fn.weights_seen[0][name].abs())


@pytest.mark.parametrize('variant', RHO)
def test_perturbation_increases_the_loss(variant):
    model, sam, _, _ = twins(variant=variant, params='all', rho=0.01)
    sam.minimize(BatchLoss(model, batch(1)))
    assert sam.stats.loss_perturbed > sam.stats.loss


@pytest.mark.parametrize('variant', RHO)
def test_two_micro_batches_average_two_sam_gradients(variant):
    rho, selected = RHO[variant], SELECTIONS['onlynorm']
    model, sam, twin, base = twins('adamw', variant=variant, rho=rho)
    for step in range(3):
        data = [batch(10 * step), batch(10 * step + 1)]
        sam.zero_grad()
        losses, expected = [], []
        for k in range(2):
            torch.manual_seed(k)
            losses.append(sam.backward(BatchLoss(model, data[k]), weigh=lambda loss: loss / 2))
            torch.manual_seed(k)
            expected.append(sam_gradients(twin, BatchLoss(twin, data[k]), selected, variant, rho))
        sam.step()
        one, two = (result.descent for result in expected)
        base_step(twin, base, {name: (one[name] + two[name]) / 2 for name in one})

        assert_close(losses, [result.loss for result in expected])
        assert_same_training(model, sam, twin, base)


@pytest.mark.parametrize('params', SELECTIONS)
@pytest.mark.parametrize('variant', RHO)
def test_backward_adds_to_gradients_it_does_not_look_at(variant, params):
    model, sam, twin, _ = twins(variant=variant, params=params, rho=RHO[variant])
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    torch.manual_seed(0)
    sam.backward(BatchLoss(model, batch(1)))
    torch.manual_seed(0)
    expected = sam_gradients(twin, BatchLoss(twin, batch(1)), SELECTIONS[params], variant, RHO[variant])
    for name, p in model.named_parameters():
        assert_close(p.grad - 100, expected.descent[name], atol=1e-12)
    assert_identical(weights(model), before)


@pytest.mark.parametrize('variant', RHO)
def test_weight_of_a_micro_batch_leaves_its_perturbation_alone(variant):
    model, sam, twin, _ = twins(variant=variant, rho=RHO[variant])
    loss_fn = BatchLoss(model, batch(1))
    torch.manual_seed(0)
    sam.backward(loss_fn, weigh=lambda loss: loss / 8)
    torch.manual_seed(0)
    expected = sam_gradients(twin, BatchLoss(twin, batch(1)), SELECTIONS['onlynorm'], variant, RHO[variant])
    assert_close(observed_eps(loss_fn, SELECTIONS['onlynorm']), expected.eps)
    for name, p in model.named_parameters():
        assert_close(p.grad, expected.descent[name] / 8)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('power', [0, 8, 16])
@pytest.mark.parametrize('variant, eta', [(variant, None) for variant in RHO] + [('fisher', 100.0)])
def test_loss_scale_does_not_change_the_update(variant, eta, power, dtype):
    model, sam, twin, base = twins(dtype=dtype, variant=variant, params='all', rho=RHO[variant], eta=eta)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0 ** power)
    for step in range(3):
        torch.manual_seed(step)
        sam.zero_grad()
        loss = sam.backward(BatchLoss(model, batch(step, dtype=dtype)), scaler=scaler)
        scaler.step(sam)
        scaler.update()
        torch.manual_seed(step)
        expected = sam_step(
            twin, base, BatchLoss(twin, batch(step, dtype=dtype)), SELECTIONS['all'], variant, RHO[variant], eta)
        rtol, atol = (1e-12, 1e-14) if dtype == torch.float64 else (1e-4, 1e-6)
        assert_close(loss, expected.loss, rtol, atol)
        assert_close(sam.stats.grad_norm, total_norm(expected.ascent).double(), rtol, atol)
        assert_close(sam.stats.loss_perturbed, expected.loss_perturbed, rtol, atol)
        assert_close(weights(model), weights(twin), rtol, atol)


def test_scaled_and_weighed_micro_batches_average_two_sam_gradients():
    selected = SELECTIONS['onlynorm']
    model, sam, twin, base = twins(variant='fisher', eta=100.0, rho=0.5)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0 ** 12)
    sam.zero_grad()
    gradients = []
    for k in range(2):
        torch.manual_seed(k)
        sam.backward(BatchLoss(model, batch(k)), weigh=lambda loss: loss / 2, scaler=scaler)
        torch.manual_seed(k)
        result = sam_gradients(twin, BatchLoss(twin, batch(k)), selected, 'fisher', 0.5, 100.0)
        gradients.append(result.descent)
    scaler.step(sam)
    scaler.update()
    base_step(twin, base, {name: (gradients[0][name] + gradients[1][name]) / 2 for name in gradients[0]})
    assert_same_training(model, sam, twin, base)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('variant', RHO)
def test_rho_zero_is_bitwise_plain_training(variant, optimizer, way):
    model, sam, twin, base = twins(optimizer, dtype=torch.float32, variant=variant, params='all', rho=0.0)
    for step in range(5):
        data = batch(step, dtype=torch.float32)
        torch.manual_seed(step)
        loss = WAYS[way](sam, BatchLoss(model, data))
        torch.manual_seed(step)
        plain_loss = plain_step(twin, base, BatchLoss(twin, data))
        assert torch.equal(loss, plain_loss)
        assert_identical(weights(model), weights(twin))
        assert_identical(buffers(model), buffers(twin))


def test_a_selected_parameter_without_gradient_is_left_alone():
    model, twin = TinyNet().double(), TinyNet().double()
    for net in (model, twin):
        net.unused = torch.nn.LayerNorm(4).double()
    base = OPTIMIZERS['adamw'](twin)
    sam = SAM(OPTIMIZERS['adamw'](model), model, rho=0.5)
    assert 'unused.weight' in dict(sam.selected)
    for _ in assert_follows_reference('minimize', model, sam, twin, base, SELECTIONS['onlynorm'], 'sam', 0.5):
        assert torch.equal(model.unused.weight, torch.ones_like(model.unused.weight))


def test_transcription_of_orig_keeps_biases_and_bare_parameters_unnormalised():
    w = {'norm.weight': torch.tensor([2.0]), 'norm.bias': torch.tensor([2.0]), 'cls_token': torch.tensor([2.0])}
    g = {name: torch.tensor([1.0]) for name in w}
    eps = perturbation('elementwise_l2_orig', w, g, rho=1.0, eta=1.0)
    norm = (3.0 ** 2 + 1 + 1) ** 0.5
    assert_close(eps['norm.weight'], torch.tensor([9 / norm]), rtol=1e-6)
    assert_close(eps['norm.bias'], torch.tensor([1 / norm]), rtol=1e-6)
    assert_close(eps['cls_token'], torch.tensor([1 / norm]), rtol=1e-6)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('params', SELECTIONS)
@pytest.mark.parametrize('variant', RHO)
def test_zero_gradient_gives_no_perturbation(variant, params, way):
    model = TinyNet()
    sam = sam_on(model, variant=variant, params=params)
    first, second = one_step(way, sam, model, on_call={1: lambda loss: loss * 0}).weights_seen
    assert_identical(first, second)
    assert all(torch.isfinite(w).all() for w in weights(model).values())
    assert sam.nonfinite == 0


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('variant', RHO)
def test_one_nonfinite_entry_of_the_gradient_gives_no_perturbation_and_is_counted(variant, value, way):
    model, plain = TinyNet(), TinyNet()
    sam = sam_on(model, variant=variant)
    poison = {1: lambda loss: loss + value * model.norm.bias[1]}
    first, second = one_step(way, sam, model, on_call=poison).weights_seen
    assert_identical(first, second)
    assert sam.nonfinite == 1
    one_plain_step(plain)
    assert_identical(weights(model), weights(plain))

    first, second = one_step(way, sam, model, seed=1).weights_seen
    assert not torch.equal(first['norm.weight'], second['norm.weight'])
    assert sam.nonfinite == 1


@pytest.mark.parametrize('factor', [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize('variant', RHO)
def test_gradients_whose_squares_leave_float32_never_make_weights_nonfinite(variant, factor):
    model = TinyNet()
    sam = sam_on(model, variant=variant, params='all')
    _, second = one_step('backward', sam, model, on_call={1: lambda loss: loss * factor}).weights_seen
    assert all(torch.isfinite(w).all() for w in second.values())


def test_overflow_of_the_loss_scale_is_counted_and_skips_the_base_step():
    model = TinyNet()
    sam = sam_on(model)
    before = weights(model)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0 ** 120)
    loss_fn = BatchLoss(model, batch(0, dtype=torch.float32), on_call=dict.fromkeys([1, 2], lambda loss: loss * 1e9))
    sam.backward(loss_fn, scaler=scaler)
    scaler.step(sam)
    scaler.update()
    assert sam.nonfinite == 1
    assert_identical(loss_fn.weights_seen[1], before)
    assert_identical(weights(model), before)
    assert scaler.get_scale() < 2.0 ** 120


def test_weights_are_what_has_weight_in_the_last_part_of_its_name():
    """nn.MultiheadAttention's in_proj_weight is one; biases are none."""
    def moved(variant):
        torch.manual_seed(0)
        model = torch.nn.MultiheadAttention(4, 2).double()
        x = torch.randn(3, 2, 4, dtype=torch.float64)
        sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, params='all', variant=variant, rho=0.5, eta=0.0)
        before = weights(model)
        sam.zero_grad()
        with sam.ascent():
            model(x, x, x)[0].square().mean().backward()
        with sam.perturbed():
            after = weights(model)
        return {name: after[name] - before[name] for name in before}, before

    eps, w = moved('elementwise_l2_orig')
    # w^2 g and g are in the same ratio in all elements of a weight only if it has T = |w|
    assert (eps['in_proj_weight'] / w['in_proj_weight'] ** 2).isfinite().all()
    sam_like, _ = moved('elementwise_l2')
    ratio = eps['in_proj_weight'] / sam_like['in_proj_weight']
    assert_close(ratio, torch.full_like(ratio, float(ratio.flatten()[0])), rtol=1e-8)
