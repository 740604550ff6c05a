"""SAM as an optimizer that is its base's: groups, states, schedulers, copies."""
import copy
import pickle

import pytest
import torch
from reference import plain_step
from support.models import (
    OPTIMIZERS,
    WAYS,
    BatchLoss,
    TinyNet,
    assert_identical,
    batch,
    one_step,
    sam_on,
    weights,
)
from torch import nn

from timm_sam import SAM

WAYS_WITH_STEP = ['minimize', 'closure', 'backward']


def net(dtype=torch.float64):
    return TinyNet().to(dtype)


def test_is_an_optimizer_around_the_base():
    model = net()
    base = OPTIMIZERS['lion'](model)
    sam = SAM(base, model, rho=0.5)
    assert isinstance(sam, torch.optim.Optimizer)
    assert sam.optimizer is base
    assert sam.param_groups is base.param_groups
    assert sam.state is base.state
    assert sam.defaults is base.defaults


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_checkpoints_move_between_sam_and_the_plain_optimizer(optimizer):
    model, plain, flat = net(torch.float32), net(torch.float32), net(torch.float32)
    sam = sam_on(model, optimizer)
    for seed in range(2):
        one_step('minimize', sam, model, seed)

    base, flat_sam = OPTIMIZERS[optimizer](plain), sam_on(flat, optimizer, rho=0.0)
    for other, other_optimizer in (plain, base), (flat, flat_sam):
        other.load_state_dict(model.state_dict())
        other_optimizer.load_state_dict(copy.deepcopy(sam.state_dict()))
    torch.manual_seed(7)
    plain_step(plain, base, BatchLoss(plain, batch(7, dtype=torch.float32)))
    one_step('minimize', flat_sam, flat, seed=7)
    assert_identical(weights(flat), weights(plain))
    assert_same_state(flat_sam.state_dict(), base.state_dict())

    sam.load_state_dict(base.state_dict())
    assert_same_state(sam.state_dict(), base.state_dict())


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys() == {'state', 'param_groups'}
    assert actual['param_groups'] == expected['param_groups']
    assert actual['state']
    torch.testing.assert_close(actual['state'], expected['state'], rtol=0, atol=0)


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_state_dict_is_that_of_the_base(optimizer):
    model = net()
    sam = sam_on(model, optimizer)
    one_step('minimize', sam, model)
    assert_same_state(sam.state_dict(), sam.optimizer.state_dict())


def test_param_groups_and_state_stay_shared_after_loading():
    model = net()
    sam = sam_on(model)
    one_step('minimize', sam, model)
    sam.load_state_dict(copy.deepcopy(sam.state_dict()))
    assert sam.param_groups is sam.optimizer.param_groups
    assert sam.state is sam.optimizer.state
    sam.optimizer.load_state_dict(copy.deepcopy(sam.state_dict()))
    assert sam.param_groups is sam.optimizer.param_groups
    assert sam.state is sam.optimizer.state


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('way', WAYS_WITH_STEP)
@pytest.mark.parametrize('loaded', [False, True])
def test_torch_schedulers_act_on_sam_and_base(loaded, way):
    model = net()
    sam = sam_on(model)
    if loaded:
        sam.load_state_dict(copy.deepcopy(sam.state_dict()))
    scheduler = torch.optim.lr_scheduler.StepLR(sam, 1, gamma=0.5)
    for step in range(1, 4):
        one_step(way, sam, model)
        scheduler.step()
        assert sam.param_groups[0]['lr'] == sam.optimizer.param_groups[0]['lr'] == 0.1 * 0.5 ** step


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('way', WAYS)
def test_torch_schedulers_of_the_base_act_on_sam(way):
    model = net()
    sam = sam_on(model)
    scheduler = torch.optim.lr_scheduler.StepLR(sam.optimizer, 1, gamma=0.5)
    one_step(way, sam, model)
    scheduler.step()
    assert sam.param_groups[0]['lr'] == 0.05


def test_zero_grad_clears_all_gradients():
    model = net()
    sam = sam_on(model)
    sam.backward(BatchLoss(model, batch(0)))
    assert model.head.weight.grad.any()
    sam.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_added_group_is_the_base_optimizers():
    model = net()
    sam = sam_on(model)
    extra = nn.Parameter(torch.ones(1))
    sam.add_param_group({'params': [extra], 'lr': 0.3})
    assert sam.optimizer.param_groups[-1]['params'] == [extra]
    assert sam.param_groups[-1]['lr'] == 0.3


@pytest.mark.parametrize('way', WAYS_WITH_STEP)
def test_a_step_needs_no_enabled_gradients_around_it(way):
    model, other = net(), net()
    with torch.no_grad():
        one_step(way, sam_on(model), model)
    one_step(way, sam_on(other), other)
    assert_identical(weights(model), weights(other))


@pytest.mark.parametrize('way', [None, *WAYS_WITH_STEP])
def test_step_without_a_closure_or_a_backward_before_it_is_refused(way):
    model = net()
    sam = sam_on(model)
    if way:
        one_step(way, sam, model)
    before = weights(model)
    with pytest.raises(ValueError, match='closure') as caught:
        sam.step()
    assert 'backward' in str(caught.value) and '\n' not in str(caught.value)
    assert_identical(weights(model), before)


def test_base_without_a_learning_rate_is_refused_a_plain_step_in_words():
    class Fixed(torch.optim.Optimizer):
        def step(self, closure=None):
            raise AssertionError

    model = net()
    with pytest.raises(ValueError, match='would be a plain step'):
        SAM(Fixed(model.parameters(), {}), model, rho=0.5).step()


def test_hooks_of_states_are_those_of_the_base():
    sam, seen = sam_on(net()), []
    sam.register_state_dict_pre_hook(lambda optimizer: seen.append(optimizer is sam.optimizer))
    sam.register_state_dict_post_hook(lambda optimizer, state: seen.append('saved'))
    sam.register_load_state_dict_pre_hook(lambda optimizer, state: seen.append('loading'))
    sam.register_load_state_dict_post_hook(lambda optimizer: seen.append('loaded'))
    sam.load_state_dict(sam.state_dict())
    assert seen == [True, 'saved', 'loading', 'loaded']


def test_copies_of_a_sam_with_a_scheduler_are_optimizers_of_their_own():
    model = net()
    sam = sam_on(model)
    torch.optim.lr_scheduler.StepLR(sam, 1)
    twin_model, twin = copy.deepcopy((model, sam))
    assert pickle.loads(pickle.dumps(sam)).describe() == sam.describe()
    before = weights(model)
    torch.manual_seed(0)
    twin.minimize(BatchLoss(twin_model, batch(0)))
    assert_identical(weights(model), before)
    assert not any(torch.equal(w, before[name]) for name, w in weights(twin_model).items())
