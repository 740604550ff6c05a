"""Stable SAM: the step as long as the gradient at w, along the gradient at w + eps.

Tan et al., JMLR 2025 ("Stabilizing sharpness-aware minimization through a simple renormalization strategy",
https://arxiv.org/abs/2401.07250, https://github.com/cltan023/stablesam2024).

    c  = ||g|| / ||G||                   plain l2 norms over all parameters; G = 0: c = 0
    G' = c G

A base optimizer that divides by the size of the gradient, as Adam does, nearly takes the factor out again.
"""
import torch

from ..multi_tensor import by_factor, inner
from .stages import Method, Tensors


class Renormalization:
    """G at the length of g."""

    def __call__(self, g: Tensors, G: Tensors) -> Tensors:
        wanted, length = inner(g, g).sqrt(), inner(G, G).sqrt()
        c = torch.where(length > 0, wanted / length, torch.zeros_like(length))
        c = torch.where(torch.isfinite(wanted) & torch.isfinite(length), c, torch.ones_like(c))
        return by_factor(torch._foreach_mul, G, c)


def stable() -> Method:
    """Stable SAM (Tan et al., JMLR 2025), for ``SAM(..., method=stable())``.

    The pass at w computes the gradients of all parameters, whatever is perturbed.
    """
    return Method(name="stable()", combine=Renormalization())
