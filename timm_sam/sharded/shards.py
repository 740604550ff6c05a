"""Sharded models of which most is perturbed: each rank computes eps of its parts, from norms of the whole.

    g     arrives as the mean over the ranks, in parts, as any gradient does
    norms |g|, |T g| and |T^2 g| by one collective of three numbers; layerwise_l2: of two numbers a tensor
    eps   added to the parts; they are copied back
"""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..multi_tensor import at_least_float32, constants_like, widest
from ..perturbation import VARIANTS, of_length
from ..store import Store, version_of
from .units import Units

UNSYNCED = ("model: params='all' and 'nonorm' take g from the gradients that fully_shard reduces over the ranks: leave "
            "set_requires_gradient_sync(True) in every micro-batch, or use params='onlynorm'")


class Shards(Store):
    """Parameters of which each rank keeps a part.

    Args:
        params: The selected parameters.
        group: Of the model.
    """

    averages = True

    def __init__(self, params: Sequence[nn.Parameter], group: Units) -> None:
        super().__init__(params, group)
        self._units = group
        self._held: tuple[Tensor, int] | None = None

    @contextmanager
    def at_w(self) -> Iterator[None]:
        if not self._units.synchronizes_all:
            raise ValueError(UNSYNCED)
        yield
        self.tensors = [_part(p) for p in self.params]

    def backward(self, loss: Tensor, wanted: Sequence[nn.Parameter]) -> None:
        loss.backward()

    def grads(self, wanted: Sequence[nn.Parameter]) -> list[Tensor | None]:
        return [None if p.grad is None else _part(p.grad) for p in wanted]

    def arrived(self, but: nn.Parameter | None) -> bool:
        if super().arrived(but):
            return True
        if but is None or self._held is None or but.grad is None:
            return False
        held, version = self._held
        return but.grad is not held or version_of(held) != version

    @contextmanager
    def watched(self, p: nn.Parameter, look: Callable[[nn.Parameter], None]) -> Iterator[None]:
        """Afterwards, as no hook of the parameter runs where its part of the mean is put into ``.grad``."""
        assert p.grad is not None
        self._held = p.grad, version_of(p.grad)
        try:
            yield
            if self.arrived(p):
                look(p)
        finally:
            self._held = None

    def _sums(self, squares: Sequence[Tensor]) -> Tensor:
        """0-dim tensors, each as the sum over the parts of a tensor that ranks keep."""
        sums = torch.stack(list(squares))
        torch.distributed.all_reduce(sums, group=self._units.process_group)
        return sums

    def _norm(self, tensors: Sequence[Tensor]) -> Tensor:
        return self._sums([_squares(tensors).sum()])[0].sqrt()

    @torch.no_grad()
    def eps(self, variant: str, g: Sequence[Tensor], rho: float, eta: float | None, is_weight: Sequence[bool],
            normalized: float = 1.0, **how: Any) -> tuple[list[Tensor], Tensor]:
        definition = VARIANTS[variant]
        w, g = at_least_float32(self.tensors), at_least_float32(g)
        eta = definition.eta if eta is None else eta
        t: list[Tensor] | None
        if definition.by_tensor:
            of_w, of_g = self._sums([*_squares(w), *_squares(g)]).chunk(2)
            t = constants_like([s.sqrt().to(v.dtype) for s, v in zip(of_w, w)], w)
            squares = torch.stack([of_g.sum(), (of_w * of_g).sum(), (of_w.square() * of_g).sum()])
            scaled = list(torch._foreach_mul(g, list(t)))
        else:
            t = definition.normalizer(w, g, 0.0 if eta is None else eta, is_weight)
            scaled = g if definition.p == 2 else list(torch._foreach_sign(g))
            if t is not None and definition.p == 2:
                scaled = list(torch._foreach_mul(scaled, t))
            direction = scaled if t is None else torch._foreach_mul(scaled, t)  # of eps
            squares = self._sums([_squares(x).sum() for x in (g, scaled, direction)])
        grad_norm, norm, length = squares.sqrt()
        if definition.p == 2:
            usable = torch.isfinite(norm) & (norm > 0)
            length = length * (1 - normalized + normalized / norm)
        else:
            usable = torch.isfinite(grad_norm)
        self._length = torch.where(usable, abs(rho) * length, torch.zeros_like(length))
        return of_length(scaled, t, norm if definition.p == 2 else None, usable, rho, normalized), grad_norm

    def add(self, eps: list[Tensor]) -> Tensor:
        return self._rounding.add(self.tensors, eps, self._weights.values, self._norm, self._length)


@torch.no_grad()
def _part(t: Any) -> Tensor:
    """What this rank keeps; with gradients off it is the tensor itself, so that writing to it writes there."""
    return t.to_local()


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of each tensor, (n,), of the widest type."""
    return torch.stack(torch._foreach_norm(list(tensors), 2, widest(tensors[0].device))).square()
