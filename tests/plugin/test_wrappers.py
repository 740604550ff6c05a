"""Wrappers of trainers around SAM: they imitate its class, give step() a closure that does nothing, own backward()."""
import functools

import pytest
import torch
import torch.nn.functional as F
from support.models import TinyNet, assert_identical, batch, sam_on, weights

from timm_sam import SAM, methods


def tiny():
    net = TinyNet().double()
    net.drop.p = net.drop_path.drop_prob = 0.0
    return net


class Imitating:
    """As Lightning's and Fabric's optimizers are: of a class made from both, stepping with a closure of its own."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.steps = 0
        self.__class__ = type('Imitating', (self.__class__, type(optimizer)), {})

    @property
    def optimizer(self):
        return self._optimizer

    def step(self, closure=lambda: None):
        self.steps += 1
        return self._optimizer.step(closure=functools.partial(closure))

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class Copying(Imitating):
    """As those of earlier versions: with a copy of what the optimizer had at first."""

    def __init__(self, optimizer):
        self.__dict__.update({k: v for k, v in vars(optimizer).items() if k != 'step'})
        super().__init__(optimizer)


WRAPPERS = pytest.mark.parametrize('wrapper', [Imitating, Copying])
EXTRAS = pytest.mark.parametrize('options', [{}, {'every': 2}, {'method': methods.gsam(alpha=0.4, rho_min=0.1)},
                                             {'method': methods.msam()}], ids=['sam', 'every', 'gsam', 'msam'])


def loss_fn_of(model, seed):
    x, y = batch(seed)
    return lambda: F.cross_entropy(model(x), y)


def by_minimize(sam, model, loss_fn):
    sam.minimize(loss_fn)


def by_backward(sam, model, loss_fn):
    sam.zero_grad()
    sam.backward(loss_fn)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
    sam.step()


def by_closure(sam, model, loss_fn):
    def closure():
        sam.zero_grad()
        loss = loss_fn()
        loss.backward()
        return loss
    sam.step(closure)


WAYS = {'minimize': by_minimize, 'backward': by_backward, 'closure': by_closure}


def after(updates, way, wrapper=lambda sam: sam, model=None, **options):
    model = tiny() if model is None else model
    sam = sam_on(model, **options)
    wrapped = wrapper(sam)
    for seed in range(updates):
        WAYS[way](wrapped, model, loss_fn_of(model, seed))
    return weights(model), sam, wrapped


@WRAPPERS
@EXTRAS
@pytest.mark.parametrize('way', WAYS)
def test_updates_through_a_wrapper_are_those_of_sam(way, options, wrapper):
    expected, plain, _ = after(4, way, **options)
    actual, sam, wrapped = after(4, way, wrapper, **options)
    assert_identical(actual, expected)
    assert wrapped.steps == 4 and isinstance(wrapped, SAM)
    assert sam.stats == plain.stats
    with pytest.raises(ValueError, match='would be a plain step'):
        sam.step()


@WRAPPERS
def test_schedulers_act_through_a_wrapper(wrapper):
    model = tiny()
    sam = sam_on(model)
    wrapped = wrapper(sam)
    scheduler = torch.optim.lr_scheduler.StepLR(sam, 1, gamma=0.5)
    by_minimize(wrapped, model, loss_fn_of(model, 0))
    scheduler.step()
    assert wrapped.param_groups[0]['lr'] == sam.optimizer.param_groups[0]['lr'] == 0.05


@WRAPPERS
def test_the_halves_through_a_wrapper_are_those_of_sam(wrapper):
    model = tiny()
    wrapped = wrapper(sam_on(model))
    for seed in range(3):
        loss_fn = loss_fn_of(model, seed)
        wrapped.zero_grad()
        with wrapped.ascent():
            loss_fn().backward()
        with wrapped.perturbed():
            loss_fn().backward()
        wrapped.step()
    assert_identical(weights(model), after(3, 'minimize')[0])


def test_the_halves_are_followed_by_a_step_whose_loss_is_not_known():
    model = tiny()
    sam = sam_on(model)
    for seed in range(3):
        loss_fn = loss_fn_of(model, seed)
        sam.zero_grad()
        with sam.ascent():
            loss_fn().backward()
        with pytest.raises(ValueError, match='would be a plain step'):
            sam.step()
        with sam.perturbed():
            loss_fn().backward()
        assert sam.step().isnan()
    assert_identical(weights(model), after(3, 'minimize')[0])
    assert sam.stats.loss.isnan() and sam.stats.loss_perturbed.isnan()
    assert sam.stats.eps_norm == pytest.approx(0.5)


def test_a_closure_that_computes_something_after_backward_is_refused():
    model = tiny()
    sam = sam_on(model)
    sam.backward(loss_fn_of(model, 0))
    with pytest.raises(ValueError, match='nothing for it to compute; call step\\(\\) without it'):
        sam.step(loss_fn_of(model, 0))


# Closures without a loss

def without_loss(sam, zeroes):
    def closure():
        if zeroes:
            sam.zero_grad()
    return closure


@EXTRAS
@pytest.mark.parametrize('stepped', [False, True])
def test_a_closure_that_zeroes_and_has_no_loss_leaves_the_batch_out(stepped, options):
    # as Lightning's of a training step that returned None
    model = tiny()
    _, sam, _ = after(2 if stepped else 0, 'closure', model=model, **options)
    before, state = weights(model), sam.state_dict()
    assert sam.step(without_loss(sam, zeroes=True)) is None
    assert_identical(weights(model), before)
    assert sam.state_dict()['state'].keys() == state['state'].keys()
    by_closure(sam, model, loss_fn_of(model, 2))
    twin = tiny()
    _, other, _ = after(2 if stepped else 0, 'closure', model=twin, **options)
    by_closure(other, twin, loss_fn_of(twin, 2))
    assert_identical(weights(model), weights(twin))


@pytest.mark.parametrize('done', [1, 2], ids=['plain', 'perturbed'])
def test_a_batch_is_left_out_as_well_where_gradients_are_zeroed_in_place(done):
    model = tiny()
    _, sam, _ = after(done, 'closure', model=model, every=2)
    before = weights(model)
    assert sam.perturbs == (done == 2) and model.head.weight.grad is not None
    assert sam.step(lambda: sam.zero_grad(set_to_none=False)) is None
    assert_identical(weights(model), before)


def test_a_closure_without_backward_leaves_the_batch_out_if_others_before_it_had_one():
    # as Lightning's last epoch of stochastic weight averaging, for running statistics
    model = tiny()
    _, sam, _ = after(2, 'closure', model=model)
    before = weights(model)
    assert sam.step(loss_fn_of(model, 2)) is None
    assert_identical(weights(model), before)
    with pytest.raises(ValueError, match=r'no gradient reached any .*must call backward\(\)'):
        sam_on(model).step(loss_fn_of(model, 2))


def test_a_closure_that_does_nothing_after_a_backward_without_sam_is_refused():
    # as of manual optimization that calls loss.backward() in place of sam.backward(loss_fn)
    model = tiny()
    sam = sam_on(model)
    loss_fn_of(model, 0)().backward()
    before = weights(model)
    with pytest.raises(ValueError, match='would be a plain step'):
        Imitating(sam).step()
    assert_identical(weights(model), before)


def test_a_closure_that_forgets_to_return_its_loss_is_refused():
    model = tiny()
    sam = sam_on(model)

    def closure():
        sam.zero_grad()
        loss_fn_of(model, 0)().backward()
    with pytest.raises(ValueError, match='closure returned None: it must return the loss'):
        sam.step(closure)


def test_a_closure_may_return_a_number():
    model = tiny()
    sam = sam_on(model)

    def closure():
        sam.zero_grad()
        loss = loss_fn_of(model, 0)()
        loss.backward()
        return loss.item()
    assert sam.step(closure) == pytest.approx(loss_fn_of(tiny(), 0)().item())
    assert_identical(weights(model), after(1, 'minimize')[0])


# Loops that own the backward call

class Owner:
    """Scales and divides the loss, as Fabric and Accelerate do."""

    def __init__(self, scale=1.0, parts=1):
        self.scale, self.parts, self.calls = scale, parts, 0

    def __call__(self, loss):
        self.calls += 1
        (loss / self.parts * self.scale).backward()


@EXTRAS
@pytest.mark.parametrize('params', ['onlynorm', 'all'])
def test_backward_fn_takes_the_place_of_backward_at_the_perturbed_weights(params, options):
    model, own, expected = tiny(), Owner(), 0
    sam = sam_on(model, params=params, **options)
    for seed in range(4):
        expected += 2 if sam.perturbs and 'msam' not in str(options) else 1
        sam.zero_grad()
        sam.backward(loss_fn_of(model, seed), backward_fn=own)
        sam.step()
    assert own.calls == expected  # at w on a stand-in
    assert_identical(weights(model), after(4, 'minimize', params=params, **options)[0])


@pytest.mark.parametrize('method', [lambda: None, lambda: methods.gsam(alpha=0.4, rho_min=0.1),
                                    lambda: methods.friendly(sigma=1.0, lam=0.9)], ids=['sam', 'gsam', 'friendly'])
def test_backward_fn_that_scales_and_divides_is_as_a_scaler_and_weigh(method):
    results = []
    for owned in (False, True):
        model = tiny()
        sam = sam_on(model, method=method())
        scaler = torch.amp.GradScaler('cpu', init_scale=2.0 ** 8)
        for update in range(3):
            for part in range(2):
                loss_fn = loss_fn_of(model, 2 * update + part)
                how = dict(backward_fn=Owner(2.0 ** 8, 2)) if owned else dict(weigh=lambda loss: loss / 2)
                sam.backward(loss_fn, scaler=scaler, last=part == 1, **how)
            scaler.unscale_(sam)
            scaler.step(sam)
            scaler.update()
            sam.zero_grad()
        results.append(weights(model))
    for (name, a), b in zip(results[0].items(), results[1].values()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=name)


def test_backward_fn_that_runs_no_backward_is_refused_and_the_weights_are_as_before():
    model = tiny()
    before = weights(model)
    with pytest.raises(ValueError, match='backward_fn: .* did not call its backward'):
        sam_on(model).backward(loss_fn_of(model, 0), backward_fn=lambda loss: None)
    assert_identical(weights(model), before)
