"""What half-precision weights take of a perturbation.

bfloat16 keeps 8 bits: an entry of eps that is less than 2^-9 of its weight changes nothing, others change it by more.
"""
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .multi_tensor import add_, converted
from .perturbation import global_norm

TOLERANCE = 0.1


class Rounding:
    """Adds perturbations to weights, and measures what the weights took.

    Warns once if that is off by more than ``TOLERANCE``. To find out takes a second norm and reads from the device, so
    it is done in the updates 2, 4, 8, ... only.

    Args:
        params: The perturbed parameters.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = list(params)
        self._rounds = any(p.dtype in (torch.float16, torch.bfloat16) for p in params)
        self._count = 0
        self._warned = False

    @torch.no_grad()
    def add(self, eps: list[Tensor], before: Sequence[Tensor]) -> Tensor:
        """Adds eps to the parameters.

        Args:
            eps: One tensor per parameter; emptied, so that its memory is free.
            before: Copies of the parameters.

        Returns:
            l2 norm of the change, 0-dim: that of eps, where nothing is rounded away.
        """
        self._count += 1
        looks = self._rounds and not self._warned and self._count > 1 and self._count & (self._count - 1) == 0
        asked = global_norm(eps) if looks or not self._rounds else None
        add_(self._params, converted(eps, [p.dtype for p in self._params]))
        eps.clear()
        if not self._rounds:
            assert asked is not None
            return asked
        norm = global_norm(torch._foreach_sub(self._params, list(before)))
        if asked is not None:
            self._compare(float(norm), float(asked))
        return norm

    def _compare(self, norm: float, asked: float) -> None:
        if abs(norm - asked) <= TOLERANCE * asked:
            return
        self._warned = True
        kinds = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in self._params}))
        warnings.warn(
            f"the perturbation's norm is {asked:.3g}, and {norm:.3g} once it is added to {kinds} weights, which round "
            f"small changes away: keep the weights in float32 and use autocast, or take a larger rho", stacklevel=2)
