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
        self._first = selected[0][0]
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

    def check(self, loss: Tensor) -> None:
        """Looks at the loss at w.

        Raises:
            ValueError: Nothing can be differentiated.
        """
        if torch.is_inference_mode_enabled():
            raise ValueError("SAM computes gradients, which torch.inference_mode() rules out: call it outside of that")
        if not any(p.requires_grad for p in self.params):
            raise ValueError(f"model: all {len(self.params)} perturbed parameters ({self._first}, ...) are frozen by "
                             f"now: unfreeze them, or build SAM anew, with another selection")
        if not loss.requires_grad:
            raise ValueError(
                f"the loss does not depend on any of the {len(self.params)} perturbed parameters "
                f"({self._first}, ...): select others by params or filter")

    def of_selected(self, wanted: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of the selected parameters, None where none arrived or none was asked for.

        Raises:
            ValueError: None arrived at all.
        """
        if wanted is self.params:
            found = list(grads)
        else:
            arrived = {id(p): grad for p, grad in zip(wanted, grads)}
            taken = [True] * len(self.params) if self._drawn is None else self._drawn
            found = [arrived.get(id(p)) if some else None for p, some in zip(self.params, taken)]
        if self._drawn is None and all(grad is None for grad in found):  # a draw may miss all that have one
            raise ValueError(
                f"no gradient reached any of the {len(self.params)} perturbed parameters ({self._first}, ...): the "
                f"closure must call backward(), on a loss that depends on them")
        return found

    def true(self, grads: Sequence[Tensor | None], scale: Scale, sync: bool) -> list[Tensor]:
        """g, true to scale; without gradients, as :meth:`eps`.

        Args:
            grads: Of the selected parameters, None: zero.
            scale: What they carry as a factor; None: nothing.
            sync: Whether g is the mean over all ranks.
        """
        g = [torch.zeros_like(w) if grad is None else grad for w, grad in zip(self._store.tensors, grads)]
        if scale is not None:
            g = by_factor(torch._foreach_mul, at_least_float32(g), torch.as_tensor(1.0 / scale))
        return self._group.mean(g) if sync and not self._store.averages else g

    def eps(self, variant: str, g: list[Tensor], rho: float, groups: Groups, eta: float | None, at: At,
            away: bool = False) -> tuple[list[Tensor], Tensor]:
        """eps of an m-batch, or with ``away`` its opposite, and the norm of g.

        Args:
            variant, eta: As of :class:`SAM`.
            g: Of the selected parameters.
            rho: SAM's, of which a method may make another radius.
            groups: The base optimizer's.
            at: Where training is.
            away: Whether eps points the other way.
        """
        stages = self._stages
        if stages.radius is not None:
            rho = stages.radius(at, rho, groups)
        d = None if stages.direction is None else stages.direction(at_least_float32(g))
        masked = None if stages.mask is None else stages.mask.apply(at_least_float32(g if d is None else d))
        return self._store.eps(
            variant, g, -rho if away else rho, eta, self._is_weight, direction=d, masked=masked,
            full_norm=stages.mask is None or stages.mask.full,
            normalized=1.0 if stages.normalization is None else stages.normalization(at))
