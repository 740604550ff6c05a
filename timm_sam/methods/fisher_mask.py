"""SSAM-F: the sparse mask of Sparse SAM that takes the elements with the largest Fisher information.

Mi et al., NeurIPS 2022, https://arxiv.org/abs/2210.05177, https://github.com/Mi-Peng/Sparse-SAM; the formula stands in
``masks.py``. The authors' code estimates after the first update of an epoch and starts from an empty mask, shifts the
running statistics, and squares gradients that are averaged over ranks; here the estimate comes before the update and
leaves nothing behind, and squares are summed over samples and ranks.
"""
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..group import in_group
from .masks import Sparse, check_mask, packed, unpacked
from .stages import At, Method, Samples, Timing


class Fisher(Sparse):
    """The mask of the K elements with the largest sum of squared gradients of single samples.

    Args:
        sparsity, every, norm: As for :class:`Sparse`.
        samples: How many, over all ranks.
    """

    def __init__(self, sparsity: float, every: int, samples: int, norm: str) -> None:
        super().__init__(sparsity, every, norm)
        self.samples = samples

    def bind(self, params: Sequence[Tensor]) -> None:
        super().bind(params)
        self.params = list(params)

    def prepare(self, at: At, samples: Samples | None) -> None:
        if self.drawn_for == self.period(at.epoch):
            return
        if samples is None:
            raise ValueError("ssam_fisher: it estimates on training samples: call SAM.begin(epoch, update, samples) "
                             "before each update; samples(n) gives n functions, each computes the loss of one sample")
        squares = self.squares(samples)
        flat = torch.zeros(self.size, dtype=torch.bool, device=squares.device)
        flat[squares.topk(self.live).indices] = True
        self.take(flat)
        self.drawn_for = self.period(at.epoch)

    def squares(self, samples: Samples) -> Tensor:
        """The sum over samples and ranks of squared gradients, flat; an element that is not finite counts as zero."""
        ranks = torch.distributed.get_world_size() if in_group() else 1
        dtype = torch.promote_types(self.params[0].dtype, torch.float32)
        total = torch.zeros(self.size, device=self.device, dtype=dtype)
        with torch.enable_grad():
            for loss in samples(math.ceil(self.samples / ranks)):
                grads = torch.autograd.grad(loss(), self.params, allow_unused=True)
                total += torch.cat([
                    (torch.zeros_like(p) if grad is None else grad).detach().reshape(-1).to(dtype)
                    for p, grad in zip(self.params, grads)]).square()
        if in_group():
            torch.distributed.all_reduce(total)
        return torch.where(torch.isfinite(total), total, torch.zeros_like(total))

    def state_dict(self) -> dict[str, Any]:
        return {"mask": packed(self.flat()) if self.mask else None, "drawn_for": self.drawn_for}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["mask"] is not None:
            self.take(unpacked(state["mask"], self.size))
        self.drawn_for = state["drawn_for"]


def ssam_fisher(sparsity: float, every: int = 1, samples: int = 128, norm: str = "full") -> Method:
    """SSAM-F (Mi et al., NeurIPS 2022), for ``SAM(..., params="all", method=ssam_fisher(sparsity=0.5))``.

    The loop has to call ``sam.begin(epoch, update, samples)``. One byte an element of S is kept.

    Args:
        sparsity: Share of the elements that are not perturbed, >= 0 and < 1; 0 is SAM.
        every: Estimate the mask every so many epochs.
        samples: Training samples of an estimate, over all ranks, each a forward and a backward pass.
        norm: full: SAM's eps with zeros, as the authors have it; masked: eps has length rho.

    Raises:
        ValueError: An argument is out of range.
    """
    check_mask("ssam_fisher", sparsity, every, norm)
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"ssam_fisher: samples={samples!r} must be an integer >= 1")
    return Method(name=f"ssam_fisher(sparsity={sparsity:g}, every={every}, samples={samples}, norm={norm})",
                  mask=Fisher(sparsity, every, samples, norm), timing=Timing(by_epoch=True))
