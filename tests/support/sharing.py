"""A network of which each layer counts its calls, perturbed in its last norm layer."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_sam import SAM


class Counted(nn.Sequential):
    """Norm layers between linear ones, and how often each child runs its forward."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 8),
                         nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.calls = [0] * len(self)
        for i, child in enumerate(self):
            forward = child.forward

            def count(x: Tensor, i: int = i, forward=forward) -> Tensor:
                self.calls[i] += 1
                return forward(x)

            child.forward = count


DATA = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


def late(model: nn.Module, **options) -> SAM:
    return SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5, filter='^5', **options)


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(DATA[0]), DATA[1])
