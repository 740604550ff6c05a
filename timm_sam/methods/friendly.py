"""Friendly SAM: perturb along what a batch's gradient does not share with the others.

Li et al., CVPR 2024, https://arxiv.org/abs/2403.12350, https://github.com/nblt/F-SAM (whose form of the average this
is: paper and code agree for sigma = 1).

    d   = g - sigma m                    no m yet: d = g
    eps = rho T^2 d / ||T d||
    m  <- mean of g, if there is no m yet, else lam m + (1 - lam) mean of g       once an update

The mean is over the m-batches of the update and over all ranks, so m is the same on all of them; an update with a
gradient that is not finite leaves m as it is.
"""
import math
from typing import Any

import torch
from torch import Tensor

from ..multi_tensor import times_, widest, zero_unless_
from .stages import Method, Tensors


class Residual:
    """g without ``sigma`` times the running mean of the gradients of earlier updates."""

    def __init__(self, sigma: float, lam: float) -> None:
        self.sigma, self.lam = sigma, lam
        self.m: Tensors | None = None
        self.started: Tensor | None = None  # whether any update has gone into m; on the device, to be read by nobody

    def __call__(self, g: Tensors) -> Tensors:
        if self.m is None or self.sigma == 0:
            return g
        return list(torch._foreach_sub(g, self.m, alpha=self.sigma))

    def observe(self, mean: Tensors, usable: Tensor) -> None:
        if self.m is None or self.started is None:
            self.m = [torch.zeros_like(t) for t in mean]
            self.started = torch.zeros((), dtype=torch.bool, device=usable.device)
        first, later = (torch.full((), x, dtype=widest(usable.device), device=usable.device) for x in (1, 1 - self.lam))
        share = torch.where(self.started, later, first)
        change = list(torch._foreach_sub(mean, self.m))
        times_(change, share)
        zero_unless_(usable, change)
        torch._foreach_add_(self.m, change)
        self.started = self.started | usable

    def state_dict(self) -> dict[str, Any]:
        return {"m": self.m, "started": self.started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.m, self.started = state["m"], state["started"]


def friendly(sigma: float = 1.0, lam: float = 0.9) -> Method:
    """Friendly SAM (Li et al., CVPR 2024), for ``SAM(..., method=friendly())``; one float32 copy of S is kept.

    Args:
        sigma: Share of the running mean that is taken away from g, >= 0; 0 is SAM.
        lam: Share of the old running mean in the new one, 0 to 1.

    Raises:
        ValueError: An argument is out of range.
    """
    if isinstance(sigma, bool) or not (isinstance(sigma, (int, float)) and math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"friendly: sigma={sigma!r} must be a finite number >= 0")
    if isinstance(lam, bool) or not (isinstance(lam, (int, float)) and 0 <= lam <= 1):
        raise ValueError(f"friendly: lam={lam!r} must be a number from 0 to 1")
    return Method(name=f"friendly(sigma={sigma:g}, lam={lam:g})", direction=Residual(sigma, lam))
