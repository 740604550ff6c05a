"""The loss along SAM's own direction: L(w + t eps), where eps is SAM's perturbation for the same batch.

At t = 1 it is the loss that SAM's second gradient is taken of; how far the curve is a parabola up to there says whether
rho is small for these weights. eps: Eq. (5) and Table 9 of the SAM-ON paper, https://arxiv.org/abs/2306.04226.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..perturbation import is_named_weight, perturbation
from .objective import Loss, Objective, Points

TIMES = tuple(k / 5 for k in range(-10, 11))  # -2, ..., 2; in fifths 1 is exactly 1


@dataclass(frozen=True)
class Line:
    """One direction.

    Attributes:
        variant: A key of ``timm_sam.perturbation.VARIANTS``.
        params: What is perturbed, a selection of training.
        rho: Radius, > 0.
        eta: eta of Table 9; None: the variant's default.
    """

    variant: str
    params: str
    rho: float
    eta: float | None = None

    def __str__(self) -> str:
        eta = "" if self.eta is None else f" eta={self.eta:g}"
        return f"{self.variant}-{self.params} rho={self.rho:g}{eta}"


def measure_line(loss: Loss, weights: Points, names: Sequence[str], lines: Sequence[Line],
                 selected: Mapping[str, set[str]]) -> dict[Line, dict[str, Any]]:
    """The loss of one batch along several directions; its gradient at w is computed once.

    Args:
        loss: Of weights, see :func:`timm_sam.analyze.objective.batch_loss`.
        weights: w, detached, of all parameters that any direction moves; not written to.
        names: Of the same parameters.
        lines: The directions.
        selected: Selection -> names of the parameters that it perturbs.

    Returns:
        For each line: ``losses`` at w + t eps for t in ``TIMES``; ``grad_norm`` of the selected parameters;
        ``non_finite``: number of losses that are not.
    """
    objective = Objective(loss, weights)
    found = {}
    for line in lines:
        places = [i for i, name in enumerate(names) if name in selected[line.params]]
        eps, norm = perturbation(
            line.variant, [weights[i] for i in places], [objective.start_grads[i] for i in places], line.rho, line.eta,
            [is_named_weight(names[i]) for i in places])
        losses = []
        with torch.no_grad():
            for t in TIMES:
                moved = list(weights)
                for i, e in zip(places, eps):
                    moved[i] = weights[i] + t * e
                losses.append(loss(moved))
        values = torch.stack(losses).tolist()
        found[line] = dict(losses=values, grad_norm=float(norm),
                           non_finite=sum(not abs(value) < float("inf") for value in values))
    return found
