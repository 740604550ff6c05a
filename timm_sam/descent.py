"""What becomes of the two gradients: stage E for each m-batch, and what methods do once for each update."""
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from .group import Group
from .methods.stages import At, Stages
from .multi_tensor import add_, as_real, at_least_float32, by_factor, copy_, dense, global_norm
from .passes import Passes


class Descent:
    """Holds g of an m-batch until G is there, and its mean until the update is done; does nothing for empty slots.

    DDP: where stage E is used, the pass at w + eps synchronizes nothing, since the mean of the ranks' G would be too
    early; after the last m-batch the ranks' G' are averaged by one collective of the size that DDP's are together.

    Args:
        stages: The slots.
        passes: Whose parameters are trained.
        group: The ranks.
        sync: Whether g, and with it G, is averaged over all ranks before it is used.
    """

    def __init__(self, stages: Stages, passes: Passes, group: Group, sync: bool) -> None:
        self._stages = stages
        self._passes = passes
        self._group = group
        self._sync = sync
        self._averages = sync or group.averages
        self._params: list[nn.Parameter] = []
        self._g: list[Tensor] = []
        self._used: list[bool] = []
        self._scale: float | Tensor | None = None
        self._weight: Tensor | None = None
        self._mean: list[Tensor] = []
        self._unweighed = False  # the m-batch: nothing is known of its share in the update
        self._count = 0  # of such m-batches in the mean
        self._corrected: list[nn.Parameter] = []

    @property
    def needs_g(self) -> bool:
        """Whether any slot asks for g of this update after the pass at w."""
        return self._stages.full_ascent or bool(self._stages.observers)

    def keep(self, params: Sequence[nn.Parameter], grads: Sequence[Tensor | None], scale: float | Tensor | None,
             weight: Tensor | None) -> None:
        """Keeps g of an m-batch.

        Args:
            params: Whose gradients they are, the selected parameters first.
            grads: As the pass at w left them; None: zero.
            scale: Loss scale that they carry.
            weight: Share of the m-batch in the update, which G carries and they do not; None: 1.
        """
        self._params = list(params)
        self._used = [grad is not None for grad in grads]
        g = at_least_float32(as_real(
            [torch.zeros_like(p) if grad is None else grad for p, grad in zip(params, grads)]))
        if self._group.lends_gradients and self._stages.combine is None:  # else the next pass synchronizes nothing
            g = [t.clone() for t in g]
        self._unweighed = weight is None
        if self._sync:
            weight = torch.ones((), device=g[0].device) if weight is None else weight
            *g, weight = self._group.mean([*g, weight.reshape(1)])
            weight = weight.reshape(())
        self._g, self._scale, self._weight = g, scale, weight

    def weigh(self, share: Tensor | None) -> None:
        """The share of the m-batch, where it is known only after the pass at w + eps; None: it was known."""
        if share is not None and self._g:
            self._unweighed = False
            (self._weight,) = self._group.mean([share.reshape(1)]) if self._sync else (share,)
            self._weight = self._weight.reshape(())

    def alone(self, accumulate: bool = True) -> AbstractContextManager[None]:
        """The pass at w + eps: on the way out ``.grad`` holds what it held before, and G' of this m-batch.

        Args:
            accumulate: Whether what was there before stays.
        """
        return nullcontext() if self._stages.combine is None else self._alone(accumulate)

    @contextmanager
    def _alone(self, accumulate: bool) -> Iterator[None]:
        before = [p.grad for p in self._params]
        for p in self._params:
            p.grad = None
        try:
            with self._group.no_sync():
                yield
        except BaseException:
            for p, grad in zip(self._params, before):
                p.grad = grad
            raise
        self._combine(before if accumulate else [None] * len(before))

    @torch.no_grad()
    def _combine(self, before: Sequence[Tensor | None]) -> None:
        assert self._stages.combine is not None
        g = self._g if self._weight is None else by_factor(torch._foreach_mul, self._g, self._weight)
        # what neither pass used keeps having no gradient; where g was averaged, another rank may have used it
        used = [i for i, p in enumerate(self._params) if self._sync or self._used[i] or p.grad is not None]
        found = []
        for i in used:
            p = self._params[i]
            grad = torch.zeros_like(p) if p.grad is None else dense(p.grad)
            p.grad = grad
            found.append(grad)
        found = as_real(found)
        G = at_least_float32(found)
        if self._sync:
            G = self._group.mean(G)
        copy_(found, self._stages.combine([g[i] for i in used], G))
        kept = [(old, grad) for i, grad in zip(used, found) if (old := before[i]) is not None]
        add_(as_real([old for old, _ in kept]), [grad for _, grad in kept])
        for p, old in zip(self._params, before):
            if old is not None:
                p.grad = old

    def finish(self, at: At, last: bool) -> None:
        """After both passes of an m-batch; ``last`` of its update."""
        stages = self._stages
        if not stages.observers and stages.correct is None and stages.combine is None:
            self._g, self._weight = [], None
            return
        with torch.no_grad():
            self._finish(at, last)

    def _finish(self, at: At, last: bool) -> None:
        stages = self._stages
        if stages.observers or stages.correct is not None:
            self._add_to_mean()
        self._g, self._weight = [], None
        if not last:
            return
        if stages.combine is not None:
            if not self._sync:
                self._group.average_gradients(self._params)
            self._group.end_of_backward()
        if self._mean:
            if self._count > 1:  # all alike, where nobody has said what they weigh
                self._mean = list(torch._foreach_div(self._mean, self._count))
            mean = self._group.mean(self._mean) if self._averages and not self._sync else self._mean
            self.drop()
            selected = mean[:len(self._passes.params)]
            usable = torch.isfinite(global_norm(selected))
            for slot in stages.observers:
                slot.observe(selected, usable)
            self._correct(at, mean)

    @torch.no_grad()
    def finish_plain(self, at: At, last: bool) -> None:
        """After the backward pass of an m-batch of a plain update."""
        if last:
            self._correct(at, None)

    def _correct(self, at: At, mean: list[Tensor] | None) -> None:
        if self._stages.correct is None:
            return
        everything = self._passes.trainable()
        trained = [i for i, p in enumerate(everything) if p.requires_grad]  # of the selected ones some may be frozen
        params = [everything[i] for i in trained]
        if self._corrected and list(map(id, params)) != list(map(id, self._corrected)):
            self._stages.correct.restart()
        self._corrected = params
        unused = [p for p in params if p.grad is None]
        grads = []
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else dense(p.grad)
            grads.append(p.grad)
        self._stages.correct(at, None if mean is None else [mean[i] for i in trained], as_real(grads))
        for p in unused:
            if p.grad is not None and not p.grad.any():  # without a gradient, a base optimizer leaves it alone
                p.grad = None

    def _add_to_mean(self) -> None:
        self._count += self._unweighed
        share = self._g
        if self._weight is not None or self._scale is not None:
            factor = torch.ones((), device=share[0].device) if self._weight is None else self._weight
            factor = factor if self._scale is None else factor / self._scale
            share = by_factor(torch._foreach_mul, share, factor)
        if self._mean:
            add_(self._mean, share)
        else:
            self._mean = share

    def reset(self) -> None:
        """Forgets an update that was begun."""
        self._g, self._weight = [], None
        self.drop()

    def drop(self) -> None:
        """Forgets the m-batches that an update had so far, but not one whose passes are being made."""
        self._mean, self._count = [], 0
