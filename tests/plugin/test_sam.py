"""What SAM must leave alone, restore and refuse."""
import math
import random

import numpy as np
import pytest
import torch
from support.models import (
    ALL,
    ONLYNORM,
    OPTIMIZERS,
    SELECTIONS,
    WAYS,
    BatchLoss,
    KeptForBackward,
    TinyNet,
    assert_identical,
    batch,
    buffers,
    flops,
    one_plain_step,
    one_step,
    sam_on,
    storage,
    weights,
)
from torch import nn

from timm_sam import SAM, VARIANTS, select_parameters

WAYS_WITH_STEP = ['minimize', 'closure', 'backward']


def net(dtype=torch.float64):
    return TinyNet().to(dtype)


# Weights

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('params', SELECTIONS)
def test_second_pass_changes_selected_parameters_only(params, variant, way):
    model = net(torch.float32)
    first, second = one_step(way, sam_on(model, params=params, variant=variant), model).weights_seen
    changed = [name for name in ALL if not torch.equal(first[name], second[name])]
    assert sorted(changed) == sorted(SELECTIONS[params])


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('params', SELECTIONS)
def test_weights_are_bitwise_restored_after_the_second_pass(params, variant):
    model = net(torch.float32)
    sam = sam_on(model, params=params, variant=variant)
    before, addresses = weights(model), storage(model)
    loss_fn = BatchLoss(model, batch(0, dtype=torch.float32))
    sam.backward(loss_fn)
    assert_identical(weights(model), before)
    assert loss_fn.storage_seen == [addresses, addresses]
    assert storage(model) == addresses


def test_perturbed_restores_weights_when_its_block_raises():
    model = net(torch.float32)
    sam = sam_on(model, params='all')
    before = weights(model)
    with sam.ascent():
        BatchLoss(model, batch(0, dtype=torch.float32))().backward()
    with pytest.raises(RuntimeError, match='stop'), sam.perturbed():
        assert not torch.equal(model.stem.weight, before['stem.weight'])
        raise RuntimeError('stop')
    assert_identical(weights(model), before)


@pytest.mark.parametrize('variant', ['elementwise_l2', 'elementwise_linf', 'layerwise_l2'])
def test_zero_weights_are_not_perturbed_by_variants_that_scale_with_them(variant):
    model = net()
    with torch.no_grad():
        for name in ONLYNORM:
            model.get_parameter(name).zero_()
    sam = sam_on(model, variant=variant)
    first, second = one_step('backward', sam, model).weights_seen
    assert_identical(first, second)
    assert sam.stats.eps_norm == 0
    assert sam.nonfinite == 0
    assert all(torch.isfinite(w).all() for w in weights(model).values())


# Exceptions

def raise_error(loss):
    raise RuntimeError('stop')


def raise_interrupt(loss):
    raise KeyboardInterrupt('stop')


def raise_in_backward(loss):
    loss = loss * 1
    loss.register_hook(raise_error)
    return loss


def settings(model):
    """requires_grad of every parameter, and what a BatchNorm holds besides tensors."""
    plain = (bool, int, float, str, type(None))
    return {
        'requires_grad': [p.requires_grad for p in model.parameters()],
        'training': [m.training for m in model.modules()],
        'bn': {key: value for key, value in vars(model.bn).items() if isinstance(value, plain)},
        'hooks': [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        'forwards': ['forward' in vars(m) for m in model.modules()],
    }


def partly_frozen_net():
    model = net(torch.float32)
    model.stem.weight.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    return model


@pytest.mark.parametrize('failure', [raise_error, raise_interrupt, raise_in_backward])
@pytest.mark.parametrize('call', [1, 2])
@pytest.mark.parametrize('way', WAYS)
class TestAfterAnException:
    def failed(self, way, call, failure, model, sam):
        with pytest.raises((RuntimeError, KeyboardInterrupt), match='stop'):
            one_step(way, sam, model, on_call={call: failure})

    def test_weights_are_bitwise_restored(self, way, call, failure):
        model = net(torch.float32)
        before = weights(model)
        self.failed(way, call, failure, model, sam_on(model, params='all'))
        assert_identical(weights(model), before)

    def test_flags_and_modules_are_as_before(self, way, call, failure):
        model = partly_frozen_net()
        sam = sam_on(model)
        before = settings(model)
        self.failed(way, call, failure, model, sam)
        assert settings(model) == before

    def test_no_gradient_is_left_behind(self, way, call, failure):
        model = net(torch.float32)
        self.failed(way, call, failure, model, sam_on(model, params='all'))
        left = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
        assert not left

    def test_running_statistics_have_seen_one_pass_at_most(self, way, call, failure):
        model, plain, untouched = net(torch.float32), net(torch.float32), net(torch.float32)
        self.failed(way, call, failure, model, sam_on(model, params='all'))
        one_plain_step(plain)
        if call == 1 and model.bn.num_batches_tracked == 0:
            assert_identical(buffers(model), buffers(untouched))
        else:
            assert_identical(buffers(model), buffers(plain))

    def test_next_step_is_that_of_a_fresh_start(self, way, call, failure):
        model, fresh = net(torch.float32), net(torch.float32)
        sam = sam_on(model, 'adamw')
        self.failed(way, call, failure, model, sam)
        fresh.load_state_dict(model.state_dict())
        one_step(way, sam, model, seed=1)
        one_step(way, sam_on(fresh, 'adamw'), fresh, seed=1)
        assert_identical(weights(model), weights(fresh))
        assert_identical(buffers(model), buffers(fresh))


@pytest.mark.parametrize('failure', [raise_error, raise_in_backward])
@pytest.mark.parametrize('call', [1, 2])
def test_failing_micro_batch_leaves_accumulated_gradients_alone(call, failure):
    model = net(torch.float32)
    sam = sam_on(model)
    sam.backward(BatchLoss(model, batch(0, dtype=torch.float32)))
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match='stop'):
        sam.backward(BatchLoss(model, batch(1, dtype=torch.float32), on_call={call: failure}))
    assert_identical({name: p.grad for name, p in model.named_parameters()}, before)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('params', SELECTIONS)
def test_step_leaves_flags_and_modules_as_they_were(params, way):
    model = partly_frozen_net()
    sam = sam_on(model, params=params)
    before = settings(model)
    one_step(way, sam, model)
    assert settings(model) == before


def test_frozen_parameters_are_neither_selected_nor_changed():
    model = partly_frozen_net()
    before = weights(model)
    sam = sam_on(model, params='all')
    frozen = ['stem.weight', 'norm.bias']
    assert sorted(name for name, _ in sam.selected) == sorted(set(ALL) - set(frozen))
    first, second = one_step('minimize', sam, model).weights_seen
    for name in frozen:
        assert torch.equal(first[name], second[name])
        assert torch.equal(model.get_parameter(name), before[name])


# BatchNorm

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize('params', SELECTIONS)
def test_clean_running_statistics_are_those_of_a_plain_step(params, momentum, way):
    model, plain = net(torch.float32), net(torch.float32)
    model.bn.momentum = plain.bn.momentum = momentum
    one_step(way, sam_on(model, params=params, bn_stats='clean'), model)
    one_plain_step(plain)
    assert_identical(buffers(model), buffers(plain))


@pytest.mark.parametrize('way', WAYS)
def test_running_statistics_of_both_passes_are_those_of_two_plain_forwards(way):
    model, plain = net(torch.float32), net(torch.float32)
    loss_fn = one_step(way, sam_on(model, params='all', bn_stats='both'), model)
    torch.manual_seed(0)
    plain(loss_fn.x)
    after_one = buffers(plain)
    plain.load_state_dict(loss_fn.weights_seen[1], strict=False)
    plain(loss_fn.x)
    assert_identical(buffers(model), buffers(plain))
    assert model.bn.num_batches_tracked == 2
    assert not torch.equal(model.bn.running_mean, after_one['bn.running_mean'])


@pytest.mark.parametrize('bn_stats', ['clean', 'both'])
def test_batchnorm_in_eval_mode_keeps_its_running_statistics(bn_stats):
    model = net(torch.float32)
    model.bn.eval()
    before = buffers(model)
    one_step('minimize', sam_on(model, bn_stats=bn_stats), model)
    assert_identical(buffers(model), before)
    assert not model.bn.training


# Randomness

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('params', SELECTIONS)
def test_dropout_and_drop_path_masks_are_the_same_in_both_passes(params, way):
    model = net()
    masks = {'drop': [], 'drop_path': []}
    for name, seen in masks.items():
        model.get_submodule(name).register_forward_hook(lambda m, args, out, seen=seen: seen.append(out == 0))
    sam = sam_on(model, params=params)
    one_step(way, sam, model, seed=0)
    one_step(way, sam, model, seed=1)
    for first, second, third, fourth in masks.values():
        assert torch.equal(first, second) and first.any()
        assert torch.equal(third, fourth)
        assert not torch.equal(second, third)


@pytest.mark.parametrize('way', WAYS)
def test_random_state_after_a_step_is_that_after_a_plain_step(way):
    model, plain = net(), net()
    one_step(way, sam_on(model), model)
    after_sam = torch.get_rng_state()
    one_plain_step(plain)
    assert torch.equal(after_sam, torch.get_rng_state())


def test_python_and_numpy_draw_the_same_in_both_passes():
    model = net()
    drawn = []

    def draw(loss):
        drawn.append((random.random(), np.random.rand()))
        return loss

    one_step('minimize', sam_on(model), model, on_call={1: draw, 2: draw})
    assert drawn[0] == drawn[1]
    assert drawn[1] != (random.random(), np.random.rand())


# Cost

class Layers(nn.Sequential):
    """Three layers of one size with a norm after each of the first two: every product costs the same."""

    def __init__(self, layer, norm):
        super().__init__(layer(), norm(), layer(), norm(), layer())


class SumOfSquares:
    def __init__(self, model, x):
        self.model, self.x = model, x

    def __call__(self):
        return self.model(self.x).square().sum()


LAYERS = {
    'linear': (lambda: Layers(lambda: nn.Linear(4, 4), lambda: nn.LayerNorm(4)), (8, 4)),
    'conv': (lambda: Layers(lambda: nn.Conv2d(4, 4, 3, padding=1), lambda: nn.BatchNorm2d(4)), (8, 4, 5, 5)),
}


@pytest.mark.parametrize('kind', LAYERS)
class TestCost:
    """In forward passes of one of the three equal layers."""
    FORWARD = 3
    WEIGHT_GRADIENTS = 3
    INPUT_GRADIENTS = 2  # the first layer needs none

    def build(self, kind, **options):
        make, shape = LAYERS[kind]
        model = make()
        loss_fn = SumOfSquares(model, torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        sam = SAM(torch.optim.SGD(model.parameters(), lr=0.01), model, rho=0.1, **options)
        one_layer = flops(lambda: model[0](loss_fn.x))
        return sam, loss_fn, lambda function: flops(function) / one_layer

    @pytest.mark.parametrize('filter, input_gradients', [(None, 2), (r'^3\.', 1)])
    def test_ascent_computes_no_weight_gradients_and_stops_at_the_first_perturbed_layer(
            self, kind, filter, input_gradients):
        sam, loss_fn, cost = self.build(kind, filter=filter)

        def ascent():
            with sam.ascent():
                loss_fn().backward()

        assert cost(ascent) == self.FORWARD + input_gradients

    @pytest.mark.parametrize('way', WAYS_WITH_STEP)
    def test_whole_step_is_the_ascent_and_a_plain_pass_at_most(self, kind, way):
        sam, loss_fn, cost = self.build(kind)
        ascent = self.FORWARD + self.INPUT_GRADIENTS
        plain = self.FORWARD + self.INPUT_GRADIENTS + self.WEIGHT_GRADIENTS
        assert cost(lambda: WAYS[way](sam, loss_fn)) <= ascent + plain


@pytest.mark.parametrize('way', WAYS)
def test_graph_of_the_first_pass_is_freed_before_the_second(way):
    model = net()
    alive = []
    with KeptForBackward() as kept:
        model.register_forward_pre_hook(lambda m, args: alive.append(kept.alive))
        one_step(way, sam_on(model, share_forward=False), model)
    assert kept.boxes
    assert alive == [0, 0]


@pytest.mark.parametrize('accumulated', [False, True])
def test_ascent_leaves_gradients_outside_the_selection_as_they_were(accumulated):
    model = net()
    sam = sam_on(model)
    outside = {name: p for name, p in model.named_parameters() if name not in ONLYNORM}
    if accumulated:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    with sam.ascent():
        BatchLoss(model, batch(0))().backward()
    for p in outside.values():
        assert torch.equal(p.grad, torch.ones_like(p)) if accumulated else p.grad is None


# Errors

@pytest.mark.parametrize('options, argument, shown, remedy', [
    ({'variant': 'asam'}, 'variant', 'asam', 'elementwise_l2_orig'),
    ({'variant': None}, 'variant', 'None', 'elementwise_l2_orig'),
    ({'params': 'norm'}, 'params', 'norm', 'onlynorm'),
    ({'rho': None}, 'rho', 'None', '>= 0'),
    ({'rho': -0.1}, 'rho', '-0.1', '>= 0'),
    ({'rho': math.nan}, 'rho', 'nan', '>= 0'),
    ({'rho': math.inf}, 'rho', 'inf', '>= 0'),
    ({'rho': '0.1'}, 'rho', '0.1', '>= 0'),
    ({'eta': -0.01, 'variant': 'elementwise_l2'}, 'eta', '-0.01', '>= 0'),
    ({'eta': math.nan, 'variant': 'fisher'}, 'eta', 'nan', '>= 0'),
    ({'eta': 'small', 'variant': 'fisher'}, 'eta', 'small', '>= 0'),
    ({'bn_stats': 'perturbed'}, 'bn_stats', 'perturbed', 'clean'),
])
def test_wrong_argument_is_named_with_its_value_and_a_remedy(options, argument, shown, remedy):
    model = net()
    with pytest.raises(ValueError) as caught:
        SAM(OPTIMIZERS['sgd'](model), model, **{'rho': 0.1} | options)
    message = str(caught.value)
    assert argument in message and shown in message and remedy in message
    assert '\n' not in message


def test_unknown_variant_is_answered_with_all_variants():
    model = net()
    with pytest.raises(ValueError) as caught:
        sam_on(model, variant='asam')
    assert all(name in str(caught.value) for name in VARIANTS)


def test_empty_selection_is_refused():
    model = net()
    with pytest.raises(ValueError, match='layer9') as caught:
        sam_on(model, filter='layer9')
    assert '\n' not in str(caught.value)


def test_selection_is_that_of_select_parameters():
    model = net()
    for params in SELECTIONS:
        expected = select_parameters(model, params=params, filter='weight')
        actual = sam_on(model, params=params, filter='weight').selected
        assert [name for name, _ in actual] == [name for name, _ in expected]
        assert all(p is model.get_parameter(name) for name, p in actual)


@pytest.mark.parametrize('way', ['backward', 'contexts'])
def test_parameters_of_the_optimizer_alone_get_the_gradient_at_the_perturbed_point_once(way):
    """As a scale in the loss that is no part of the model."""
    model, scale = net(), nn.Parameter(torch.ones((), dtype=torch.float64))
    sam = SAM(torch.optim.SGD([*model.parameters(), scale], lr=0.1), model, rho=0.5)
    losses, batch_loss = [], BatchLoss(model, batch(0))

    def loss_fn():
        loss = batch_loss()
        losses.append(float(loss.detach()))
        return loss * scale

    if way == 'backward':
        sam.backward(loss_fn)
    else:
        with sam.ascent():
            loss_fn().backward()
        assert scale.grad is None
        with sam.perturbed():
            loss_fn().backward()
    assert float(scale.grad) == losses[1] != losses[0]
