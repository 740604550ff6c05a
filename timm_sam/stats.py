"""What an update measures."""
from typing import NamedTuple

import torch
from torch import Tensor

UNKNOWN = torch.full((), torch.nan)
_MANY = 64


class Stats(NamedTuple):
    """What the last passes measured, as 0-dim tensors on the device of the model (reading one synchronises).

    Attributes:
        loss: Loss at w; nan after ``ascent()`` and ``perturbed()``, which are not told the losses. Of a method with one
            pass: that at w + eps.
        loss_perturbed: Loss at w + eps, or nan likewise; None after a plain update, as are the norms.
        grad_norm: l2 norm of g over the selected parameters, loss scale divided out.
        eps_norm: l2 norm of eps, as it was added to the weights: half-precision ones round it.
    """

    loss: Tensor
    loss_perturbed: Tensor | None = None
    grad_norm: Tensor | None = None
    eps_norm: Tensor | None = None


class NonFinite:
    """Counts norms that are not finite: all of them at once, when somebody asks, without reading the device.

    Args:
        device: Of the count.
    """

    def __init__(self, device: torch.device) -> None:
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._norms: list[Tensor] = []

    def add(self, norm: Tensor) -> None:
        """Takes a 0-dim tensor that nobody writes to."""
        if self._norms and (len(self._norms) == _MANY or self._norms[0].device != norm.device):
            self.count()
        self._norms.append(norm)

    def count(self) -> Tensor:
        """How many so far, 0-dim."""
        if self._norms:
            norms = torch.stack(self._norms)
            self._count = self._count.to(norms.device) + (~torch.isfinite(norms)).sum()
            self._norms = []
        return self._count
