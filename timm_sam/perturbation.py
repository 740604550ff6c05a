"""The perturbations of SAM and its variants: ``(params, grads, rho, eta) -> eps``.

Paper: M. Mueller, T. Vlaar, D. Rolnick, M. Hein, "Normalization Layers Are All That Sharpness-Aware Minimization
Needs", NeurIPS 2023, https://arxiv.org/abs/2306.04226: Eq. (5) and Table 9 (Appendix A.3).

    p = 2    eps = rho * T^2 g / ||T g||_2     one norm over all tensors together
    p = inf  eps = rho * T sign(g)

``T`` is diagonal. ``sam`` is Foret et al. (ICLR 2021), ``elementwise_l2_orig`` is ASAM (Kwon et al., ICML 2021),
``fisher`` is Fisher-SAM (Kim et al., ICML 2022). Everything here is pure multi-tensor arithmetic on lists of tensors:
no module, no optimizer, no host synchronisation.
"""
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .multi_tensor import (
    at_least_float32,
    by_factor,
    constants_like,
    flat,
    global_norm,
    parts,
    together,
    zero_unless_,
)

Tensors = list[Tensor]


def _identity(params: Sequence[Tensor], grads: Sequence[Tensor], eta: float, is_weight: Sequence[bool]) -> None:
    return None


def _elementwise(params: Sequence[Tensor], grads: Sequence[Tensor], eta: float, is_weight: Sequence[bool]) -> Tensors:
    t = list(torch._foreach_abs(list(params)))
    torch._foreach_add_(t, eta)
    return t


def _elementwise_orig(
        params: Sequence[Tensor], grads: Sequence[Tensor], eta: float, is_weight: Sequence[bool]) -> Tensors:
    # Table 9 prints 1 + eta for biases; Section 3.2, the ASAM paper and both reference codes have 1
    t = list(torch._foreach_abs(list(params)))
    torch._foreach_mul_(t, [float(weight) for weight in is_weight])
    torch._foreach_add_(t, [eta if weight else 1.0 for weight in is_weight])
    return t


def _layerwise(params: Sequence[Tensor], grads: Sequence[Tensor], eta: float, is_weight: Sequence[bool]) -> Tensors:
    return constants_like(torch._foreach_norm(list(params)), params)


def _fisher(params: Sequence[Tensor], grads: Sequence[Tensor], eta: float, is_weight: Sequence[bool]) -> Tensors:
    t = list(torch._foreach_mul(list(grads), list(grads)))
    torch._foreach_mul_(t, eta)
    torch._foreach_add_(t, 1.0)
    torch._foreach_sqrt_(t)
    torch._foreach_reciprocal_(t)
    return t


@dataclass(frozen=True)
class Variant:
    """One row of Table 9.

    Attributes:
        normalizer: Gives the diagonal of T, one tensor per parameter; None means T = 1.
        p: Norm of the perturbation model, 2 or inf.
        eta: Default of eta, or None where T has no eta.
        title: The name used in the paper's tables.
        by_tensor: Whether T is the l2 norm of each whole tensor.
    """

    normalizer: Callable[[Sequence[Tensor], Sequence[Tensor], float, Sequence[bool]], Tensors | None]
    p: float
    eta: float | None
    title: str
    by_tensor: bool = False


VARIANTS: Mapping[str, Variant] = {
    "sam": Variant(_identity, 2, None, "SAM"),
    "elementwise_l2": Variant(_elementwise, 2, 0.0, "elem. l2"),
    "elementwise_l2_orig": Variant(_elementwise_orig, 2, 0.01, "elem. l2 orig."),
    "elementwise_linf": Variant(_elementwise, math.inf, 0.0, "elem. l-inf"),
    "layerwise_l2": Variant(_layerwise, 2, None, "layer l2", by_tensor=True),
    "fisher": Variant(_fisher, 2, 1.0, "Fisher-SAM"),
}


def is_named_weight(name: str) -> bool:
    """Whether a parameter of this name is a weight for ``elementwise_l2_orig``: ``in_proj_weight`` is one, too."""
    return "weight" in name.rsplit(".", 1)[-1]


@torch.no_grad()
def perturbation(
        variant: str,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        rho: float,
        eta: float | None = None,
        is_weight: Sequence[bool] | None = None,
        direction: Sequence[Tensor] | None = None,
        masked: Sequence[Tensor] | None = None,
        full_norm: bool = True,
        normalized: float = 1.0,
) -> tuple[Tensors, Tensor]:
    """The perturbation of one m-batch (Eq. (5), Table 9).

    Args:
        variant: A key of :data:`VARIANTS`.
        params: The selected parameters w_S, any shapes.
        grads: g, the gradient of the mean loss of the batch at w, same shapes, in true scale (no loss scale in it).
        rho: Radius, >= 0.
        eta: eta of Table 9; None takes the variant's default.
        is_weight: Per parameter, whether the last part of its name contains ``weight``; only ``elementwise_l2_orig``
            treats the others differently. None means all.
        direction: d, what eps points along instead of g; T stays that of g.
        masked: d with zeros where nothing is perturbed; None: all of d.
        full_norm: Whether ||T d|| normalizes masked directions, too; else ||T masked||.
        normalized: lam: eps = rho ((1 - lam) + lam / ||T d||) T^2 d, for p = 2 only.

    Returns:
        ``eps``, one tensor per parameter (shape of the parameter, float32 or wider), and ``||g||_2`` over all of them
        as a 0-dim tensor. ``eps`` is exactly zero where ``||T g||`` is zero or g is not finite.
    """
    is_weight = [True] * len(params) if is_weight is None else is_weight
    return with_length(variant, params, grads, rho, eta, is_weight, direction, masked, full_norm, normalized)[:2]


@torch.no_grad()
def with_length(
        variant: str,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        rho: float,
        eta: float | None,
        is_weight: Sequence[bool],
        direction: Sequence[Tensor] | None = None,
        masked: Sequence[Tensor] | None = None,
        full_norm: bool = True,
        normalized: float = 1.0,
) -> tuple[Tensors, Tensor, Tensor | None]:
    """As :func:`perturbation`, and ``||eps||_2`` where it is known without taking another norm, else None.

    With a negative radius eps is the opposite of that of its absolute value.
    """
    definition = VARIANTS[variant]
    eta = definition.eta if eta is None else eta
    # half-precision tensors are widened: squares of half-precision gradients under- and overflow
    params, grads = at_least_float32(params), at_least_float32(grads)
    t = definition.normalizer(params, grads, 0.0 if eta is None else eta, is_weight)
    d = grads if direction is None else at_least_float32(direction)
    along = d if masked is None else at_least_float32(masked)
    packed = all(map(together, {id(x): x for x in (grads, d, along, grads if t is None else t)}.values()))
    if packed:
        whole = [flat(grads)]
        d, along = (whole if x is grads else [flat(x)] for x in (d, along))
        grads, t = whole, None if t is None else [flat(t)]
    grad_norm = global_norm(grads)
    norm: Tensor | None = None
    if packed and definition.p == 2 and direction is None and masked is None and normalized == 1:
        length = _length(grad_norm, (grad_norm > 0) & (grad_norm < math.inf), rho) if t is None else None
        return parts(_of_one(grads[0], grad_norm, rho, None if t is None else t[0]), params), grad_norm, length
    if definition.p == 2:
        scaled = along if t is None else list(torch._foreach_mul(along, t))
        if masked is not None and full_norm:
            norm = global_norm(d if t is None else torch._foreach_mul(d, t))
        else:
            norm = grad_norm if scaled is grads else global_norm(scaled)
        usable = (norm > 0) & (norm < math.inf)
    else:
        usable = grad_norm < math.inf
        scaled = list(torch._foreach_sign(along))
    if direction is not None:
        usable = usable & (grad_norm < math.inf)
        if norm is None or scaled is not d:  # else that is looked at already
            usable = usable & (global_norm(d) < math.inf)
    # lengths of a mask's part are not those of what is normalized
    known = None if norm is None or t is not None or masked is not None else _length(norm, usable, rho, normalized)
    eps = of_length(scaled, t, norm, usable, rho, normalized)
    return parts(eps[0], params) if packed else eps, grad_norm, known


def _length(norm: Tensor, usable: Tensor, rho: float, normalized: float = 1.0) -> Tensor:
    """``||eps||`` of T = 1 and a direction with this norm."""
    if normalized == 1:
        return torch.full_like(norm, abs(rho)).mul_(usable)
    return torch.where(usable, abs(rho) * (normalized + (1 - normalized) * norm), torch.zeros_like(norm))


def _of_one(g: Tensor, grad_norm: Tensor, rho: float, t: Tensor | None) -> Tensor:
    """As the general way, in fewest operations: what makes it zero there leaves nothing but nan and inf here."""
    scaled = g if t is None else g * t
    norm = grad_norm if t is None else global_norm([scaled])
    eps = torch.div(scaled, norm).mul_(rho)
    return (eps if t is None else eps.mul_(t)).nan_to_num_(0.0, 0.0, 0.0)


def of_length(scaled: Sequence[Tensor], t: Tensors | None, norm: Tensor | None, usable: Tensor, rho: float,
              normalized: float) -> Tensors:
    """eps = rho s T scaled, with s = 1 - lam + lam / norm; zero where it is not usable.

    Args:
        scaled: T d, or sign(d) for p = inf, float32 or wider.
        t: T; None: 1.
        norm: 0-dim; None: s = 1, and ``scaled`` becomes eps in place.
        usable: 0-dim, whether eps is not zero.
        rho: Radius.
        normalized: lam.
    """
    if norm is not None and normalized == 0:
        eps = list(torch._foreach_mul(list(scaled), rho))
    else:
        eps = list(scaled)
        if norm is not None:
            # in this order no factor overflows: Tg / norm is at most 1; rho / norm is infinite for a subnormal norm
            eps = by_factor(torch._foreach_div, eps, torch.where(usable, norm, 1.0))
            if normalized != 1:
                torch._foreach_mul_(eps, normalized)
                torch._foreach_add_(eps, list(scaled), alpha=1 - normalized)
        torch._foreach_mul_(eps, rho)
    if t is not None:
        torch._foreach_mul_(eps, t)
    zero_unless_(usable, eps)
    return eps
