"""GSAM: Surrogate Gap Minimization Improves Sharpness-Aware Training.

Zhuang et al., ICLR 2022, https://arxiv.org/abs/2203.08065, Algorithm 1.

    f      = clamp((lr_t - lr_min) / (lr_max - lr_min), 0, 1)
    rho_t  = rho_min + (rho - rho_min) f
    eps    = rho_t T^2 g_S / ||T g_S||
    g_perp = g - <g, G> / ||G||^2 G           over all parameters, g at w, G at w + eps
    G'     = G - alpha g_perp

The part of g that is orthogonal to G is what lowers the loss at w without the loss at w + eps: it is taken away, and
with it the gap between the two. The clamp is ours: in a warm-up from below lr_min the published codes get a radius
below rho_min, with rho_min = 0 a negative one.
"""
import math
from dataclasses import dataclass

import torch

from ..multi_tensor import by_factor, inner, zero_unless_
from .stages import At, Groups, Method, Tensors, first_rate_of, rate_of


@dataclass
class RadiusOfRate:
    """A radius that falls and rises with the learning rate.

    Args:
        rho_min: The radius at ``lr_min``.
        lr_max: Learning rate at which the radius is SAM's rho; None: the optimizer's, as it starts.
        lr_min: Learning rate at and below which it is ``rho_min``.
    """

    rho_min: float
    lr_max: float | None
    lr_min: float

    def bind(self, rho: float, groups: Groups) -> None:
        if self.rho_min > rho:
            raise ValueError(f"gsam: rho_min={self.rho_min:g} is above rho={rho:g}: lower it, or raise rho")
        if self.lr_max is None:
            self.lr_max = first_rate_of(groups)
        if self.lr_min > self.lr_max:
            raise ValueError(f"gsam: lr_min={self.lr_min:g} is above lr_max={self.lr_max:g}: lower it")

    def __call__(self, at: At, rho: float, groups: Groups) -> float:
        assert self.lr_max is not None
        f = 1.0
        if self.lr_max > self.lr_min:
            f = min(1.0, max(0.0, (rate_of(groups) - self.lr_min) / (self.lr_max - self.lr_min)))
        return self.rho_min + (rho - self.rho_min) * f


@dataclass
class Decomposition:
    """G without ``alpha`` times the part of g that is orthogonal to it."""

    alpha: float

    def __call__(self, g: Tensors, G: Tensors) -> Tensors:
        product, square = inner(g, G), inner(G, G)
        finite = torch.isfinite(product) & torch.isfinite(square)
        along = torch.where(finite & (square > 0), product / square, torch.zeros_like(square))
        result = by_factor(torch._foreach_mul, G, 1 + self.alpha * along)
        taken_away = torch._foreach_mul(g, self.alpha)
        zero_unless_(finite, taken_away)
        torch._foreach_sub_(result, taken_away)
        return result


def gsam(alpha: float, rho_min: float = 0.0, lr_max: float | None = None, lr_min: float = 0.0) -> Method:
    """GSAM (Zhuang et al., ICLR 2022, Algorithm 1), for ``SAM(..., method=gsam(alpha=0.4))``.

    SAM's rho is rho_max. The pass at w computes the gradients of all parameters, whatever is perturbed. alpha = 0 is
    the radius alone, at the cost of SAM, and goes with methods that change the gradient of the step.

    Args:
        alpha: Share of g_perp that is taken away, >= 0.
        rho_min: Radius at the lowest learning rate of the schedule, 0 to rho.
        lr_max: Highest learning rate of the schedule; None: that of the optimizer when SAM is built.
        lr_min: Its lowest.

    Raises:
        ValueError: An argument is out of range; rho_min above rho and lr_min above lr_max when SAM is built.
    """
    for name, value in {"alpha": alpha, "rho_min": rho_min, "lr_min": lr_min}.items():
        if isinstance(value, bool) or not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            raise ValueError(f"gsam: {name}={value!r} must be a finite number >= 0")
    if lr_max is not None and not (math.isfinite(lr_max) and lr_max >= 0):
        raise ValueError(f"gsam: lr_max={lr_max!r} must be a finite number >= 0")
    return Method(name=f"gsam(alpha={alpha:g}, rho_min={rho_min:g})", radius=RadiusOfRate(rho_min, lr_max, lr_min),
                  combine=Decomposition(alpha) if alpha else None)
