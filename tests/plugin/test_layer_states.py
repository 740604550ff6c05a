"""What layers keep beside running statistics: spectral normalization's vectors, averages of a codebook.

With `bn_stats='clean'` it comes from the pass at w, whatever layer it is in and however the forward writes it.
"""
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
