"""Where the selected parameters are, and what the two passes do to them there."""
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .group import Group
from .multi_tensor import Backup, dense
from .perturbation import with_length
from .rounding import Rounding


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; one of which ranks keep parts, by its own operations or to the part."""
    part = getattr(tensor, "_local_tensor", None)
    return tensor._version + (0 if part is None else part._version)


class Store:
    """Parameters that are whole on each rank. ``sharded/`` has those of models whose ranks keep parts of them.

    Args:
        params: The selected parameters.
        group: The ranks.

    Attributes:
        params: They.
        tensors: What formulas are computed of: w_S, at least from the pass at w on.
        averages: Whether g arrives as the mean over the ranks.
        version: By how much :func:`version_of` a gradient rises when one is added.
    """

    averages = False
    version = 1

    def __init__(self, params: Sequence[nn.Parameter], group: Group) -> None:
        self.params = list(params)
        self.tensors: list[Tensor] = list(params)
        self._group = group
        self._weights = Backup()
        self._length: Tensor | None = None  # of eps, where no norm has to be taken to know it
        self._rounding = Rounding()

    def at_w(self) -> AbstractContextManager[None]:
        """Around the forward and backward pass at w: gradients are not averaged over the ranks."""
        return self._group.no_sync()

    def backward(self, loss: Tensor, wanted: Sequence[nn.Parameter]) -> None:
        """The backward pass at w, to ``wanted``.

        It leaves the graph of what both passes share alone, and DDP's hooks on the parameters asleep.
        """
        some = [p for p in wanted if p.requires_grad]
        for p, grad in zip(some, torch.autograd.grad(loss, some, allow_unused=True)):
            p.grad = grad

    def grads(self, wanted: Sequence[nn.Parameter]) -> list[Tensor | None]:
        """What arrived at w, None where nothing did; sparse gradients of embeddings made dense."""
        return [None if p.grad is None else dense(p.grad) for p in wanted]

    def arrived(self, but: nn.Parameter | None) -> bool:
        """Whether a gradient is there, of any selected parameter but one."""
        return any(p.grad is not None for p in self.params if p is not but)

    @contextmanager
    def watched(self, p: nn.Parameter, look: Callable[[nn.Parameter], None]) -> Iterator[None]:
        """Has ``look`` called when gradients arrive inside, with the parameter."""
        handle = p.register_post_accumulate_grad_hook(look)
        try:
            yield
        finally:
            handle.remove()

    def eps(self, variant: str, g: Sequence[Tensor], rho: float, eta: float | None, is_weight: Sequence[bool],
            **how: Any) -> tuple[list[Tensor], Tensor]:
        """eps and the norm of g, of g as :meth:`grads` gave it; see :func:`perturbation`."""
        eps, norm, self._length = with_length(variant, self.tensors, g, rho, eta, is_weight, **how)
        return eps, norm

    def save(self) -> None:
        """Keeps w."""
        self._weights.save(self.tensors)

    def add(self, eps: list[Tensor]) -> Tensor:
        """Moves the weights, after :meth:`save`.

        Args:
            eps: One tensor per parameter; emptied, so that its memory is free.

        Returns:
            The l2 norm of the change.
        """
        return self._rounding.add(self.tensors, eps, self._weights.values, length=self._length)

    def restore(self) -> None:
        """Back at w, bit by bit."""
        self._weights.restore()
