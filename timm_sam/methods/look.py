"""LookSAM: SAM every k updates, and in between what of it stays the same for a while.

Liu et al., CVPR 2022, https://arxiv.org/abs/2203.02714, Algorithm 1.

    every k-th update   SAM's, with g over all parameters; means over m-batches and ranks
                        v = G - <G, g> / ||g||^2 g;  u = v / ||v||        v = 0: u = 0
    other updates       g + alpha ||g|| u, g the plain gradient

u is a unit vector over all parameters: the term that is added is linear in ||g||, whatever loss scale g carries. An
update with a gradient that is not finite leaves u as it is. Nothing is added before the first u.
"""
import math
from typing import Any

import torch

from ..multi_tensor import by_factor, inner, zero_unless_
from .stages import At, Method, Tensors, Timing


class Reuse:
    """Keeps the part of G that is orthogonal to g, and adds it to the gradients of plain updates."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.u: Tensors | None = None

    def __call__(self, at: At, mean: Tensors | None, grads: Tensors) -> None:
        if mean is not None:
            self._keep(mean, grads)
        elif self.u is not None and self.alpha != 0:
            length = inner(grads, grads).sqrt()
            torch._foreach_add_(grads, by_factor(torch._foreach_mul, self.u, self.alpha * length))

    def _keep(self, g: Tensors, grads: Tensors) -> None:
        G = [t.to(u.dtype) for t, u in zip(grads, g)]
        product, square = inner(G, g), inner(g, g)
        share = torch.where(square > 0, product / square, torch.zeros_like(square))
        v = list(torch._foreach_sub(G, by_factor(torch._foreach_mul, g, share)))
        length = inner(v, v).sqrt()
        usable = torch.isfinite(length)
        u = by_factor(torch._foreach_div, v, torch.where(usable & (length > 0), length, torch.ones_like(length)))
        zero_unless_(usable, u)
        if self.u is None:
            self.u = u
            return
        zero_unless_(~usable, self.u)
        torch._foreach_add_(self.u, u)

    def restart(self) -> None:
        self.u = None

    def state_dict(self) -> dict[str, Any]:
        return {"u": self.u}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.u = state["u"]


def looksam(k: int, alpha: float) -> Method:
    """LookSAM (Liu et al., CVPR 2022, Algorithm 1), for ``SAM(..., method=looksam(k=5, alpha=0.7))``.

    One float32 copy of all parameters is kept. With ``variant="layerwise_l2"`` it is close to the paper's
    Look-LayerSAM.

    Args:
        k: Every k-th update is SAM's, >= 1; 1 is SAM.
        alpha: Length of what is added in between, as a share of ||g||, >= 0; 0 is SAM every k-th update.

    Raises:
        ValueError: An argument is out of range.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"looksam: k={k!r} must be an integer >= 1")
    if isinstance(alpha, bool) or not (isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"looksam: alpha={alpha!r} must be a finite number >= 0")
    return Method(name=f"looksam(k={k}, alpha={alpha:g})", correct=Reuse(alpha), timing=Timing(every=k))
