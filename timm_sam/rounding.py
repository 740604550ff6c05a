"""What half-precision weights take of a perturbation.

bfloat16 keeps 8 bits: an entry of eps that is less than 2^-9 of its weight changes nothing, others change it by more.
"""
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .multi_tensor import add_, converted, global_norm, is_half

TOLERANCE = 0.1


class Rounding:
    """Adds perturbations to weights, and measures what the weights took.

    Warns once if that is off by more than ``TOLERANCE``. To find out takes a second norm and reads from the device, so
    it is done in the updates 2, 4, 8, ... only.
    """

    def __init__(self) -> None:
        self._count = 0
        self._warned = False

    def add(self, params: Sequence[Tensor], eps: list[Tensor], before: Sequence[Tensor],
            norm_of: Callable[[Sequence[Tensor]], Tensor] = global_norm, length: Tensor | None = None) -> Tensor:
        """Adds eps to the weights, without gradients.

        Args:
            params: The weights.
            eps: One tensor per parameter; emptied, so that its memory is free.
            before: Copies of the weights.
            norm_of: Computes the l2 norm over all elements.
            length: That of eps, if it is known, 0-dim.

        Returns:
            l2 norm of the change, 0-dim: that of eps, where nothing is rounded away.
        """
        self._count += 1
        rounds = is_half(params)
        looks = rounds and not self._warned and self._count > 1 and self._count & (self._count - 1) == 0
        if length is None and (looks or not rounds):
            length = norm_of(eps)
        add_(params, converted(eps, [p.dtype for p in params]) if rounds else eps)
        eps.clear()
        if not rounds:
            assert length is not None
            return length
        norm = norm_of(torch._foreach_sub(list(params), list(before)))
        if looks and length is not None:
            self._compare(float(norm), float(length), params)
        return norm

    def _compare(self, norm: float, asked: float, params: Sequence[Tensor]) -> None:
        if abs(norm - asked) <= TOLERANCE * asked:
            return
        self._warned = True
        kinds = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in params}))
        warnings.warn(
            f"the perturbation's norm is {asked:.3g}, and {norm:.3g} once it is added to {kinds} weights, which round "
            f"small changes away: keep the weights in float32 and use autocast, or take a larger rho", stacklevel=2)
