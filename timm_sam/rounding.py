"""What half-precision weights take of a perturbation.

bfloat16 keeps 8 bits: an entry of eps that is less than 2^-9 of its weight changes nothing, others change it by more.
"""
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .perturbation import global_norm

TOLERANCE = 0.1


class Rounding:
    """Measures what was added to weights, where they are float16 or bfloat16.

    Warns once if its norm is off by more than ``TOLERANCE``. That reads from the device, so it is looked at in the
    updates 1, 2, 4, 8, ... only.

    Args:
        params: The perturbed parameters.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._concerned = any(p.dtype in (torch.float16, torch.bfloat16) for p in params)
        self._count = 0
        self._warned = False

    @torch.no_grad()
    def applied(self, params: Sequence[Tensor], before: Sequence[Tensor], asked: Tensor) -> Tensor:
        """l2 norm of what ``params`` changed by, 0-dim; ``asked``, the norm of eps, where nothing is rounded away."""
        if not self._concerned:
            return asked
        norm = global_norm(torch._foreach_sub(list(params), list(before)))
        self._count += 1
        if not self._warned and self._count & (self._count - 1) == 0:
            self._compare(float(norm), float(asked), params)
        return norm

    def _compare(self, norm: float, asked: float, params: Sequence[Tensor]) -> None:
        if abs(norm - asked) <= TOLERANCE * asked or asked == 0:
            return
        self._warned = True
        kinds = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in params}))
        warnings.warn(
            f"the perturbation's norm is {asked:.3g}, and {norm:.3g} once it is added to {kinds} weights, which round "
            f"small changes away: keep the weights in float32 and use autocast, or take a larger rho", stacklevel=2)
