"""Sharpness: how much the loss of a batch rises within a radius around the weights.

    s(B) = max over ||u||_p <= rho of L(w + T u) - L(w)          T = abs(w) elementwise, or 1; one norm over all weights

Averaged over batches, each with a maximum of its own. Adaptive sharpness (T = abs(w)): J. Kwon et al., ICML 2021,
https://arxiv.org/abs/2102.11600. As a measure with normalized logits: M. Andriushchenko et al., "A modern look at the
relationship between sharpness and generalization", ICML 2023, https://arxiv.org/abs/2302.07011; Section 5.2 and B.10 of
the SAM-ON paper, https://arxiv.org/abs/2306.04226.
"""
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..evaluation.attack.apgd import apgd
from .ball import WeightBall, checkpoints
from .objective import Loss, Objective, Points
from .released import released

KINDS = ("worst", "step", "average")


@dataclass(frozen=True)
class Measured:
    """One measure: a column of Tables 6, 18 and 19.

    Attributes:
        kind: ``worst``: the maximum, searched in many steps; ``step``: after one; ``average``: under noise.
        norm: ``linf`` or ``l2``; of ``average`` uniform or normal noise.
        raw: Whether T is 1, not abs(w).
        radius: rho, > 0.
    """

    kind: str
    norm: str
    raw: bool
    radius: float

    @property
    def family(self) -> str:
        """All but the radius."""
        return f"{self.kind}-{self.norm}{'-raw' if self.raw else ''}"

    def __str__(self) -> str:
        return f"{self.family} {self.radius:g}"


def batch_sharpness(loss: Loss, weights: Points, measures: Sequence[Measured], place: int, *, steps: int = 20,
                    draws: int = 20, seed: int = 42, protocol: str = "apgd") -> dict[Measured, dict[str, Any]]:
    """Sharpness of one batch, by each measure; the loss and its gradient at w are computed once.

    Args:
        loss: Of weights, see :func:`timm_sam.analyze.objective.batch_loss`.
        weights: w, detached; not written to.
        measures: What is asked for.
        place: Number of the batch: noise depends on it, the seed and the draw, and on nothing else.
        steps: Of ``worst``.
        draws: Of ``average``.
        seed: Of the noise.
        protocol: ``apgd``, or ``released`` for the search of the published code.

    Returns:
        For each measure: ``sharpness``; ``loss`` at w; ``no_gradient``: whether the gradient at w is 0 or not finite;
        ``non_finite``: number of losses that were not finite. If the loss at w is not, sharpness is NaN.
    """
    objective = Objective(loss, weights)
    start = float(objective.start_loss)
    lengths = torch.stack([torch.linalg.vector_norm(g) for g in objective.start_grads]).sum()
    no_gradient = not 0 < float(lengths) < float("inf")
    found = {}
    for measure in measures:
        objective.non_finite = torch.zeros((), dtype=torch.int64, device=weights[0].device)
        if measure.kind == "average":
            value = _average(objective, measure, place, draws, seed)
        else:
            value = _largest(objective, measure, steps if measure.kind == "worst" else 1, protocol) - start
        found[measure] = dict(sharpness=value, loss=start, no_gradient=no_gradient,
                              non_finite=int(objective.non_finite))
    return found


def _largest(objective: Objective, measure: Measured, steps: int, protocol: str) -> float:
    weights = objective.weights
    if protocol == "released":
        return float(released(objective.at, weights, not measure.raw, measure.norm, measure.radius, steps))
    zero = [torch.zeros_like(w) for w in weights]
    # one step alone goes to the first point that many steps look at
    return float(apgd(
        objective.in_u(objective.scales(not measure.raw)), WeightBall(measure.norm, measure.radius, len(weights)), zero,
        2 * measure.radius, steps, checkpoints(steps) if steps > 1 else ()).loss)


@torch.no_grad()
def _average(objective: Objective, measure: Measured, place: int, draws: int, seed: int) -> float:
    scales, rises = objective.scales(not measure.raw), []
    for draw in range(draws):
        u = [measure.radius * x for x in noise(objective.weights, measure.norm, (seed, place, draw))]
        loss = objective.loss(objective.moved(scales, u))
        objective.non_finite += ~loss.isfinite()
        rises.append(loss - objective.start_loss[0])
    return float(torch.stack(rises).mean())


def noise(like: Points, norm: str, seeds: tuple[int, ...]) -> Points:
    """N(0, 1) for ``l2`` and U(-1, 1) for ``linf``, by a generator of its own on the device of ``like``."""
    digest = hashlib.blake2b("/".join(map(str, seeds)).encode(), digest_size=8).digest()
    generator = torch.Generator(like[0].device).manual_seed(int.from_bytes(digest, "little") >> 1)
    if norm == "linf":
        return [torch.empty_like(x).uniform_(-1, 1, generator=generator) for x in like]
    return [torch.empty_like(x).normal_(generator=generator) for x in like]


def summary(batches: Sequence[Mapping[str, Any]], largest: float | None) -> dict[str, Any]:
    """What is kept of a measure: per batch and over batches.

    Args:
        batches: Of :func:`batch_sharpness`, in order.
        largest: Largest value that there can be; None: there is none.
    """
    values = torch.tensor([batch["sharpness"] for batch in batches], dtype=torch.float64)
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return dict(
        mean=float(values.mean()), standard_error=error, batches=values.tolist(),
        loss=float(torch.tensor([batch["loss"] for batch in batches], dtype=torch.float64).mean()),
        no_gradient=sum(batch["no_gradient"] for batch in batches),
        non_finite=sum(batch["non_finite"] for batch in batches),
        saturated=None if largest is None else float((values > 0.9 * largest).double().mean()))
