"""What layers keep beside running statistics: spectral normalization's vectors, averages of a codebook.

With `bn_stats='clean'` it comes from the pass at w, whatever layer it is in and however the forward writes it.
"""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from timm_sam import SAM


class Codebook(nn.Module):
    """Averages of what passes through, written in one of the ways that there are."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer('mean', torch.zeros(6, dtype=torch.float64))
        self.register_buffer('fixed', torch.ones(6, dtype=torch.float64))
        self.register_buffer('calls', torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        now = x.detach().mean(0)
        if self.how == 'in place':
            self.mean.lerp_(now, 0.3)
        elif self.how == 'data':
            self.mean.data.lerp_(now, 0.3)
        elif self.how == 'new data':
            self.mean.data = self.mean.lerp(now, 0.3)
        else:
            self.mean = self.mean.lerp(now, 0.3)
        return x - self.mean * self.fixed


def network(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(6, 6).double()) if kind == 'spectral' else Codebook(kind)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), layer, nn.ReLU(), nn.Linear(6, 3)).double()


DATA = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}


def step(kind: str, **options) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The states after an update of SAM, and after one forward pass at the same weights."""
    model, plain = network(kind), network(kind)
    plain.train()(DATA[0])
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=2.0, params='all', share_forward=False, **options)
    sam.minimize(lambda: F.cross_entropy(model(DATA[0]), DATA[1]))
    return states(model), states(plain)


@pytest.mark.parametrize('kind', ['in place', 'data', 'new data', 'new tensor', 'spectral'])
def test_state_of_any_layer_comes_from_the_pass_at_w(kind):
    found, expected = step(kind)
    assert found.keys() == expected.keys() and len(found) >= 4
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize('kind', ['in place', 'data', 'new data', 'new tensor', 'spectral'])
def test_both_passes_update_it_if_asked_to(kind):
    found, expected = step(kind, bn_stats='both')
    changed = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert any('running' in name for name in changed) and any('running' not in name for name in changed)


def test_state_goes_on_over_updates_as_in_training_at_w():
    """Two updates, with the weights put back in between: as two passes at w."""
    model, plain = network('spectral'), network('spectral')
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=2.0, params='all', share_forward=False)
    for _ in range(2):
        plain.train()(DATA[0])
        sam.minimize(lambda: F.cross_entropy(model(DATA[0]), DATA[1]))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(weights[name])
    for name, value in states(plain).items():
        assert torch.equal(states(model)[name], value), name


class Following(nn.Module):
    """A momentum encoder: frozen, and moved towards the trained one in each forward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.trained = nn.Linear(6, 6)
        self.following = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for p, w in zip(self.following.parameters(), self.trained.parameters()):
            if self.how == 'in place':
                with torch.no_grad():
                    p.lerp_(w, 0.3)
            else:
                p.data = p.data * 0.7 + w.data * 0.3
        with torch.no_grad():
            target = self.following(x)
        return self.trained(x) - target


@pytest.mark.parametrize('share', [False, True])
@pytest.mark.parametrize('how', ['in place', 'new data'])
def test_frozen_parameters_that_the_forward_moves_are_those_of_the_pass_at_w(how, share):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), Following(how), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()

    for params in ('all', 'onlynorm'):
        model, plain = network(), network()
        sam = SAM(torch.optim.SGD(model.parameters(), lr=0.0), model, rho=2.0, params=params, share_forward=share)
        for _ in range(3):
            plain.train()(DATA[0])
            sam.minimize(lambda model=model: F.cross_entropy(model(DATA[0]), DATA[1]))
            for p, expected in zip(model[1].following.parameters(), plain[1].following.parameters(), strict=True):
                assert torch.equal(p, expected)
        both = SAM(torch.optim.SGD(model.parameters(), lr=0.0), model, rho=2.0, params=params, bn_stats='both')
        plain(DATA[0])
        both.minimize(lambda model=model: F.cross_entropy(model(DATA[0]), DATA[1]))
        assert not torch.equal(model[1].following.weight, plain[1].following.weight)


class OwnNorm(nn.BatchNorm1d):
    """Written by hand: puts a new tensor in the place of the old mean, and counts in another way than torch."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(0)
        self.running_mean = self.running_mean.lerp(mean.detach(), 0.1)
        self.num_batches_tracked += 1
        return (x - mean) * self.weight + self.bias


class Counter(nn.Identity):
    """Counts batches in a buffer of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('batches', torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.batches += 1
        return x


def test_norm_layers_that_replace_their_statistics_and_counters_of_others_keep_those_of_the_pass_at_w():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), OwnNorm(6), Counter(), nn.Linear(6, 3)).double()
    plain = copy.deepcopy(model)
    plain(DATA[0])
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=2.0, params='all', share_forward=False)
    sam.minimize(lambda: F.cross_entropy(model(DATA[0]), DATA[1]))
    assert torch.equal(model[2].running_mean, plain[2].running_mean)
    assert model[2].num_batches_tracked == model[3].batches == 1


def inference(values: Tensor) -> Tensor:
    with torch.inference_mode():
        return values.clone()


@pytest.mark.parametrize('buffer', [
    torch.ones(1).expand(5), torch.ones(1, 3).expand(2, 3), inference(torch.ones(3)), torch.eye(3).to_sparse(),
    torch.eye(3)[:, 1], torch.empty(0, 3),
], ids=['expanded', 'expanded rows', 'inference', 'sparse', 'column', 'empty'])
def test_buffers_that_nothing_can_be_written_to_are_left_alone(buffer):
    model = network('in place')
    model.register_buffer('constant', buffer)
    before = buffer.to_dense().clone()
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=2.0)
    sam.minimize(lambda: F.cross_entropy(model(DATA[0]), DATA[1]))
    assert model.constant is buffer and torch.equal(buffer.to_dense(), before)


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.register_buffer('mean', torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean += 0.1 * x.detach().mean(0)
        return self.norm(x)


@pytest.mark.filterwarnings('ignore:.*torch.jit.*')
def test_states_of_scripted_models_come_from_the_pass_at_w():
    model, plain = torch.jit.script(Scripted()), Scripted()
    plain(DATA[0].float())
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=2.0)
    sam.minimize(lambda: model(DATA[0].float()).square().mean())
    assert torch.equal(model.mean, plain.mean)
