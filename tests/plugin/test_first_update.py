"""SAM that was built with something else than what is trained: said at construction or at the first update."""
import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.models import TinyNet, assert_identical, batch, one_step, sam_on, weights
from torch import nn

from timm_sam import SAM, methods


def tiny():
    net = TinyNet().double()
    net.drop.p = net.drop_path.drop_prob = 0.0
    return net


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def loss_of(model, seed=0):
    x, y = batch(seed)
    return F.cross_entropy(model(x), y)


def by_closure(sam, model):
    def closure():
        sam.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss
    sam.step(closure)


def by_minimize(sam, model):
    sam.minimize(lambda: loss_of(model))


WAYS = pytest.mark.parametrize('update', [by_minimize, by_closure])


@WAYS
def test_perturbed_parameters_that_the_optimizer_does_not_have_are_named_once(update):
    model = tiny()
    sam = SAM(sgd([p for n, p in model.named_parameters() if not n.startswith('gn')]), model, rho=0.5)
    with pytest.warns(UserWarning, match=r'2 of 6 perturbed .* \(gn.weight, gn.bias\) are not in the optimizer'):
        update(sam, model)
    update(sam, model)  # any warning is an error now


@WAYS
def test_what_is_added_to_the_optimizer_before_training_begins_is_nothing_to_warn_of(update):
    model = tiny()
    sam = SAM(sgd([p for n, p in model.named_parameters() if not n.startswith('gn')]), model, rho=0.5)
    sam.add_param_group({'params': list(model.gn.parameters())})
    update(sam, model)


@WAYS
def test_another_model_than_the_trained_one_is_refused(update):
    model = tiny()
    twin = copy.deepcopy(model)
    sam = SAM(sgd(model.parameters()), twin, rho=0.5)
    before = weights(model)
    with pytest.raises(ValueError, match="optimizer: it has none of the model's parameters"):
        update(sam, model)
    assert_identical(weights(model), before)


@WAYS
@pytest.mark.parametrize('replace', [
    lambda model: setattr(model, 'gn', nn.GroupNorm(2, 4).double()),
    lambda model: model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True),
], ids=['layer', 'all weights'])
def test_layers_that_are_replaced_after_construction_are_refused(replace, update):
    model = tiny()
    sam = sam_on(model)
    replace(model)
    with pytest.raises(ValueError, match=r'model: [26] of 6 perturbed .* not in it any more.*before you build'):
        update(sam, model)


@WAYS
def test_layers_that_are_unfrozen_after_construction_are_named_and_not_perturbed(update):
    model = tiny()
    model.gn.requires_grad_(False)
    sam = sam_on(model)
    model.gn.requires_grad_(True)
    with pytest.warns(UserWarning, match=r'2 parameters \(gn.weight, gn.bias\) were frozen .* build SAM after that'):
        update(sam, model)
    assert len(sam.selected) == 4
    update(sam, model)


def test_plain_updates_before_the_first_perturbed_one_say_nothing():
    model = tiny()
    sam = SAM(sgd([p for n, p in model.named_parameters() if not n.startswith('gn')]), model, rho=0.5, start=1)
    for epoch in (0, 1):
        sam.begin(epoch, epoch)
        with warnings.catch_warnings() if epoch == 0 else pytest.warns(UserWarning, match='not in the optimizer'):
            by_minimize(sam, model)


# A loss function that draws a batch

class Drawing:
    """A loss that takes the next batch at each call."""

    def __init__(self, model, sam=None, part=lambda model: model):
        self.model, self.sam, self.part, self.seeds = model, sam, part, itertools.count()

    def __call__(self):
        if self.sam:
            self.sam.zero_grad()
        x, y = batch(next(self.seeds))
        loss = F.cross_entropy(self.part(self.model)(x), y)
        if self.sam:
            loss.backward()
        return loss


@pytest.mark.parametrize('options', [{}, {'params': 'all'}, {'filter': 'norm'}])
def test_a_loss_that_draws_a_batch_per_call_is_noticed_in_the_first_update(options):
    model = tiny()
    sam = sam_on(model, **options)
    with pytest.warns(UserWarning, match='loss_fn: its second call gave the model another input'):
        sam.minimize(Drawing(model))
    sam.minimize(Drawing(model))


def test_a_closure_that_draws_a_batch_per_call_is_noticed_in_the_first_update():
    model = tiny()
    sam = sam_on(model)
    with pytest.warns(UserWarning, match='another input than the first'):
        sam.step(Drawing(model, sam))
    sam.step(Drawing(model, sam))


def test_a_drawing_loss_that_calls_a_part_of_the_model_is_noticed():
    class Trainer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny()
    model = Trainer()
    with pytest.warns(UserWarning, match='another input than the first'):
        SAM(sgd(model.parameters()), model, rho=0.5).minimize(Drawing(model, part=lambda model: model.net))


@pytest.mark.parametrize('way', ['minimize', 'closure', 'backward', 'primitives'])
def test_the_same_batch_is_no_reason_to_warn_and_leaves_no_hook(way):
    model = tiny()
    sam = sam_on(model)
    for seed in range(3):
        one_step(way, sam, model, seed)
        assert not any(m._forward_pre_hooks for m in model.modules())


def test_nan_and_random_augmentation_and_inputs_that_depend_on_the_weights_are_no_reason_to_warn():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3)).double()
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss_fn():
        noisy = x + torch.randn_like(x)
        model(torch.full_like(x, torch.nan))
        return model(model(noisy).detach()).square().mean()
    SAM(sgd(model.parameters()), model, rho=0.5).minimize(loss_fn)


def test_an_ascent_on_a_part_of_the_batch_is_no_reason_to_warn():
    model = tiny()
    x, y = batch(0)
    sam = sam_on(model)
    for _ in range(2):
        sam.minimize(lambda: F.cross_entropy(model(x), y), ascent_fn=lambda: F.cross_entropy(model(x[:3]), y[:3]))


# What functions return, and how SAM is called

@pytest.mark.parametrize('wrong, kind', [
    (lambda loss: (loss, 1), 'a tuple'), (lambda loss: {'loss': loss}, 'a dict'), (lambda loss: None, 'None'),
    (lambda loss: loss.item(), 'a float'), (lambda loss: loss.expand(3), r'a tensor of shape \(3,\)'),
])
def test_loss_functions_that_return_something_else_are_refused(wrong, kind):
    model = tiny()
    sam = sam_on(model)
    before = weights(model)
    with pytest.raises(ValueError, match=f'loss_fn returned {kind}: it must return the loss and nothing else'):
        sam.minimize(lambda: wrong(loss_of(model)))
    assert_identical(weights(model), before)


@pytest.mark.parametrize('method', [None, methods.friendly(), methods.gsam(0.4)], ids=['sam', 'friendly', 'gsam'])
def test_a_loss_of_one_element_is_one_whatever_its_shape(method):
    model, twin = tiny(), tiny()
    for m, shape in ((model, (1,)), (twin, ())):
        sam = sam_on(m, method=method)
        loss = sam.backward(lambda m=m, shape=shape: loss_of(m).reshape(shape), weigh=lambda loss: loss / 2)
        sam.step()
        assert loss.shape == sam.stats.loss.shape == ()
    assert_identical(weights(model), weights(twin))


def test_inference_mode_is_named_where_no_gradients_come_of_it():
    model = tiny()
    with torch.inference_mode(), pytest.raises(ValueError, match=r'rules out: call it outside'):
        sam_on(model).minimize(lambda: loss_of(model))


@pytest.mark.parametrize('share', [True, False])
def test_perturbed_layers_that_are_all_frozen_by_now_are_named(share):
    model = tiny()
    sam = sam_on(model, share_forward=share)
    sam.minimize(lambda: loss_of(model))
    for _, p in sam.selected:
        p.requires_grad_(False)
    with pytest.raises(ValueError, match=r'model: all 6 perturbed parameters \(bn.weight, ...\) are frozen by now'):
        sam.minimize(lambda: loss_of(model))


def test_a_loss_in_place_of_a_function_is_refused_with_the_right_call():
    model = tiny()
    with pytest.raises(ValueError, match=r'loss_fn must be a function.*minimize\(lambda: criterion\(model\(x\), y\)\)'):
        sam_on(model).minimize(loss_of(model))


@pytest.mark.parametrize('build', [
    lambda model: SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5),
    lambda model: SAM(model.parameters(), torch.optim.SGD, rho=0.5),
    lambda model: SAM(model.parameters(), base_optimizer=torch.optim.SGD, rho=0.5, adaptive=True, lr=0.1),
])
def test_the_call_of_other_packages_is_refused_with_the_right_one(build):
    with pytest.raises(ValueError, match=r'SAM\(torch.optim.SGD\(model.parameters\(\), lr=...\), model, rho') as e:
        build(tiny())
    assert '\n' not in str(e.value)


def test_arguments_in_the_wrong_order_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match=r'SAM\(optimizer, model, rho=...\)'):
        SAM(model, sgd(model.parameters()), rho=0.5)


def test_a_sam_around_a_sam_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match='it is a SAM already'):
        SAM(sam_on(model), model, rho=0.5)


class OwnLineSearch(torch.optim.SGD):
    def step(self, closure):
        closure()
        return super().step()


@pytest.mark.parametrize('optimizer', [torch.optim.LBFGS, OwnLineSearch])
def test_optimizers_that_call_a_closure_themselves_are_refused(optimizer):
    model = tiny()
    with pytest.raises(ValueError, match=f'{optimizer.__name__} calls a closure several times per step'):
        SAM(optimizer(model.parameters(), lr=0.1), model, rho=0.5)


class TwoModes(torch.optim.SGD):
    """As schedule-free optimizers have them."""

    mode = 'train'

    def train(self):
        self.mode = 'train'

    def eval(self):
        self.mode = 'eval'

    def sync_lookahead(self):
        self.mode = 'synchronized'


def test_train_and_eval_are_those_of_the_base_optimizer_if_it_has_them():
    model = tiny()
    sam = SAM(TwoModes(model.parameters(), lr=0.1), model, rho=0.5)
    sam.eval()
    assert sam.optimizer.mode == 'eval'
    sam.train()
    assert sam.optimizer.mode == 'train'
    sam.sync_lookahead()
    assert sam.optimizer.mode == 'synchronized'
    plain = sam_on(model)
    assert not any(hasattr(plain, name) for name in ('train', 'eval', 'sync_lookahead', 'anything'))
