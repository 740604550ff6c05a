"""What an update measures."""
from typing import NamedTuple

import torch
from torch import Tensor

UNKNOWN = torch.full((), torch.nan)


class Stats(NamedTuple):
    """What the last passes measured, as 0-dim tensors on the device of the model (reading one synchronises).

    Attributes:
        loss: Loss at w; nan after ``ascent()`` and ``perturbed()``, which are not told, as the next.
        loss_perturbed: Loss at w + eps; like what follows it, None after a plain update.
        grad_norm: l2 norm of g over the selected parameters, loss scale divided out.
        eps_norm: l2 norm of eps, as it was added to the weights: half-precision ones round it.
    """

    loss: Tensor
    loss_perturbed: Tensor | None = None
    grad_norm: Tensor | None = None
    eps_norm: Tensor | None = None
