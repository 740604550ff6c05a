"""From the gradient at w to eps: stages B and C."""
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .group import Group
from .methods.stages import At, Groups, Samples, Stages
from .multi_tensor import at_least_float32, by_factor
from .passes import Passes
from .perturbation import is_named_weight
from .store import Store

Scale = float | Tensor | None


class Ascent:
    """Turns gradients into perturbations.

    Args:
        selected: The names and parameters of w_S.
        stages: What methods change.
        group: The ranks.
        store: Where w_S is.
    """

    def __init__(self, selected: Sequence[tuple[str, nn.Parameter]], stages: Stages, group: Group,
                 store: Store) -> None:
        self.params = store.params
        self._is_weight = [is_named_weight(name) for name, _ in selected]
        self._stages = stages
        self._group = group
        self._store = store
        if stages.mask is not None:
            stages.mask.bind(self.params)
        self._prepared: int | None = None
        self._drawn: Sequence[bool] | None = None

    def prepare(self, at: At, samples: Samples | None, passes: Passes) -> None:
        """Before the first update of an epoch."""
        if self._stages.mask is not None and self._prepared != at.epoch:
            with passes.aside() if samples is not None and self._stages.mask.samples else nullcontext():
                self._stages.mask.prepare(at, samples)
            self._prepared = at.epoch

    def draw(self, at: At) -> list[nn.Parameter]:
        """The selected parameters that take part in an m-batch."""
        self._drawn = None if self._stages.mask is None else self._stages.mask.draw(at, len(self.params))
        if self._drawn is None:
            return self.params
        return [p for p, taken in zip(self.params, self._drawn) if taken]

    def of_selected(self, wanted: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of the selected parameters, None where none arrived or none was asked for."""
        if wanted is self.params:
            return list(grads)
        found = {id(p): grad for p, grad in zip(wanted, grads)}
        taken = [True] * len(self.params) if self._drawn is None else self._drawn
        return [found.get(id(p)) if some else None for p, some in zip(self.params, taken)]

    @torch.no_grad()
    def true(self, grads: Sequence[Tensor | None], scale: Scale, sync: bool) -> list[Tensor]:
        """g, true to scale.

        Args:
            grads: Of the selected parameters, None: zero.
            scale: What they carry as a factor; None: nothing.
            sync: Whether g is the mean over all ranks.
        """
        g = [torch.zeros_like(w) if grad is None else grad for w, grad in zip(self._store.tensors, grads)]
        if scale is not None:
            g = by_factor(torch._foreach_mul, at_least_float32(g), torch.as_tensor(1.0 / scale))
        return self._group.mean(g) if sync and not self._store.averages else g

    def radius(self, at: At, rho: float, groups: Groups) -> float:
        """The radius of an update."""
        return rho if self._stages.radius is None else self._stages.radius(at, rho, groups)

    @torch.no_grad()
    def eps(self, variant: str, g: list[Tensor], rho: float, eta: float | None, at: At,
            away: bool = False) -> tuple[list[Tensor], Tensor]:
        """eps of an m-batch, or with ``away`` its opposite, and the norm of g."""
        stages = self._stages
        d = None if stages.direction is None else stages.direction(at_least_float32(g))
        masked = None if stages.mask is None else stages.mask.apply(at_least_float32(g if d is None else d))
        eps, norm = self._store.eps(
            variant, g, rho, eta, self._is_weight, direction=d, masked=masked,
            full_norm=stages.mask is None or stages.mask.full,
            normalized=1.0 if stages.normalization is None else stages.normalization(at))
        if away:
            torch._foreach_neg_(eps)
        return eps, norm
