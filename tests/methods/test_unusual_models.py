"""Methods where a model or its loop is not as usual: complex, unused, frozen, unfrozen parameters, a second SAM."""
import collections
import copy

import pytest
import torch
import torch.nn.functional as F
from support.models import assert_identical, weights
from torch import nn

from timm_sam import SAM, methods

FULL = {  # of the gradients of all parameters
    'gsam': lambda: methods.gsam(alpha=0.4, lr_max=0.1), 'stable': methods.stable,
    'looksam': lambda: methods.looksam(k=2, alpha=0.5)}


class Net(nn.Module):
    """Two layers of which either may be frozen, around a normalization layer, and one that nothing calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm, self.head = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.unused = nn.Linear(2, 2)
        self.double()

    def forward(self, x):
        return self.head(F.gelu(self.norm(self.stem(x))))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def loss_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 4, dtype=torch.float64, generator=generator)
    y = torch.randint(3, (8,), generator=generator)
    return lambda: F.cross_entropy(model(x), y)


class Fourier(nn.Module):
    """The same function of complex weights, or of their real and imaginary parts."""

    def __init__(self, is_complex):
        super().__init__()
        torch.manual_seed(0)
        w = torch.randn(4, 6, dtype=torch.complex128) * 0.3
        self.w = nn.Parameter(w if is_complex else torch.view_as_real(w).clone())
        self.norm, self.head = nn.LayerNorm(6).double(), nn.Linear(6, 3).double()

    def forward(self, x):
        w = self.w if self.w.is_complex() else torch.view_as_complex(self.w)
        return self.head(self.norm((x.to(w.dtype) @ w.conj()).abs()))


@pytest.mark.parametrize('name', FULL)
def test_complex_parameters_that_are_not_perturbed_are_as_their_parts(name):
    model, twin = Fourier(True), Fourier(False)
    for m in (model, twin):
        sam = SAM(sgd(m), m, rho=0.5, method=FULL[name]())
        for step in range(2):
            for k in range(2):
                sam.backward(loss_of(m, 2 * step + k), weigh=lambda loss: loss / 2, last=k == 1)
            sam.step()
            sam.zero_grad()
    torch.testing.assert_close(torch.view_as_real(model.w), twin.w, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(model.head.weight, twin.head.weight, rtol=1e-11, atol=1e-13)
    assert not torch.equal(model.w, Fourier(True).w)


@pytest.mark.parametrize('alpha', [0.0, 0.5])
def test_looksam_leaves_parameters_alone_that_nothing_uses(alpha):
    model = Net()
    before = weights(model)
    sam = SAM(torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5), model, rho=0.5,
              method=methods.looksam(k=2, alpha=alpha))
    for step in range(3):
        sam.minimize(loss_of(model, step))
        assert model.unused.weight.grad is None
    unchanged = [name for name, w in weights(model).items() if torch.equal(w, before[name])]
    assert unchanged == ['unused.weight', 'unused.bias']


def test_looksam_adds_to_a_layer_that_is_not_used_this_time():
    model = Net()
    sam = SAM(sgd(model), model, rho=0.5, method=methods.looksam(k=2, alpha=0.5))
    sam.minimize(loss_of(model))
    u, = (u for u in sam.methods[0].correct.u if u.shape == model.stem.weight.shape)
    x = torch.randn(8, 6, dtype=torch.float64)
    sam.minimize(lambda: model.head(model.norm(x)).square().mean())
    assert float(u.norm()) > 0
    assert float(F.cosine_similarity(model.stem.weight.grad.flatten(), u.flatten(), dim=0)) == pytest.approx(1)


def test_looksam_begins_anew_where_other_layers_are_trained_than_before():
    """Blocks of one shape that take turns: what was kept of one is not added to the other."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)).double()
    model[2].requires_grad_(False)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5, method=methods.looksam(k=3, alpha=0.5))
    sam.minimize(loss_of(model))
    assert sam.methods[0].correct.u is not None
    model[0].requires_grad_(False), model[2].requires_grad_(True)
    twin = copy.deepcopy(model)
    sam.minimize(loss_of(model, 1))
    loss_of(twin, 1)().backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert_identical(weights(model), weights(twin))


def test_looksam_leaves_normalization_layers_alone_that_are_frozen_in_the_meantime():
    model = Net()
    sam = SAM(sgd(model), model, rho=0.5, method=methods.looksam(k=3, alpha=0.5))
    sam.minimize(loss_of(model))
    model.norm.requires_grad_(False)
    before = weights(model)
    sam.minimize(loss_of(model, 1))
    assert [name for name, w in weights(model).items() if 'norm' in name and not torch.equal(w, before[name])] == []
    assert not torch.equal(model.stem.weight, before['stem.weight'])


@pytest.mark.parametrize('make', [
    lambda: methods.random_mask(0.5), lambda: methods.ssam_dynamic(0.5, total_epochs=2)], ids=['random', 'dynamic'])
def test_masks_are_drawn_alike_under_another_default_device(make):
    model, twin = Net(), Net()
    for m, device in ((model, 'cpu'), (twin, 'meta')):
        sam = SAM(sgd(m), m, params='all', rho=0.5, method=make())
        losses = [loss_of(m, epoch) for epoch in range(2)]
        with torch.device(device):
            for epoch, loss in enumerate(losses):
                sam.begin(epoch, epoch)
                sam.minimize(loss)
    assert_identical(weights(model), weights(twin))


# One SAM, one state

@pytest.mark.parametrize('make', [
    methods.friendly, lambda: methods.looksam(2, 0.5), lambda: methods.gsam(0.4, rho_min=0.1),
    lambda: methods.ssam_dynamic(0.5, total_epochs=2)], ids=['friendly', 'looksam', 'gsam', 'dynamic'])
def test_a_method_that_was_given_to_an_earlier_sam_is_as_new(make):
    method, ends = make(), []
    for lr, given in ((0.5, method), (0.3, method), (0.1, method), (0.1, make())):
        model = Net()
        sam = SAM(torch.optim.SGD(model.parameters(), lr=lr), model, params='all', rho=0.5, method=given)
        for step in range(3):
            sam.begin(0, step)
            sam.minimize(loss_of(model, step))
        ends.append(weights(model))
    assert_identical(ends[2], ends[3])


@pytest.mark.parametrize('method, shown', [
    ('gsam', "'gsam' is none"), (methods.friendly, '<function friendly'), ([methods.stable], '<function stable')])
def test_what_is_no_method_is_refused(method, shown):
    model = Net()
    with pytest.raises(ValueError, match=f'method: {shown}.* call one of timm_sam.methods'):
        SAM(sgd(model), model, rho=0.5, method=method)


# The mean of g over the m-batches of an update

def mean_of_friendly(*micro_batches, weigh=None):
    model = Net()
    sam = SAM(sgd(model), model, params='all', rho=0.5, method=methods.friendly())
    for k, seed in enumerate(micro_batches):
        sam.backward(loss_of(model, seed), weigh=weigh, last=k + 1 == len(micro_batches))
    return sam.methods[0].direction.m


@pytest.mark.parametrize('way', ['backward', 'halves'])
def test_micro_batches_that_nobody_weighs_count_alike(way):
    expected = mean_of_friendly(0, 1, 2, weigh=lambda loss: loss / 3)
    if way == 'backward':
        found = mean_of_friendly(0, 1, 2)
    else:
        model = Net()
        sam = SAM(sgd(model), model, params='all', rho=0.5, method=methods.friendly())
        for k in range(3):
            for half in (sam.ascent(grad_scale=1 / 3), sam.perturbed(last=k == 2)):
                with half:
                    (loss_of(model, k)() / 3).backward()
        found = sam.methods[0].direction.m
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_micro_batches_of_an_update_that_is_given_up_do_not_count():
    model = Net()
    sam = SAM(sgd(model), model, params='all', rho=0.5, method=methods.friendly())
    sam.backward(loss_of(model, 5), last=False)
    sam.minimize(loss_of(model, 0))
    for a, b in zip(sam.methods[0].direction.m, mean_of_friendly(0)):
        assert torch.equal(a, b)


def test_msam_refuses_a_loss_for_a_pass_that_it_does_not_make():
    model = Net()
    sam = SAM(sgd(model), model, rho=0.5, method=methods.msam())
    with pytest.raises(ValueError, match=r'ascent_fn: msam\(\) has no pass at w'):
        sam.minimize(loss_of(model), ascent_fn=loss_of(model))


class Elsewhere(torch.optim.SGD):
    """Keeps its state in another place than `state`, as ZeroRedundancyOptimizer does."""

    def step(self, closure=None):
        shown = self.state
        self.state = self.__dict__.setdefault('inside', collections.defaultdict(dict))
        super().step()
        self.state = shown


def test_msam_says_that_nothing_is_perturbed_where_the_first_moment_is_elsewhere():
    model = Net()
    sam = SAM(Elsewhere(model.parameters(), lr=0.1, momentum=0.9), model, rho=0.5, method=methods.msam())
    sam.backward(loss_of(model))
    sam.minimize(loss_of(model))  # no step before: as one that a GradScaler leaves out
    with pytest.warns(UserWarning, match='msam: Elsewhere has moved the perturbed parameters.*updates are plain'):
        sam.minimize(loss_of(model))
    sam.minimize(loss_of(model))  # said once
