"""The search of the published code for worst-case sharpness, which is not APGD: for numbers beside published ones.

Code: https://github.com/tml-epfl/sharpness-vs-generalization. What differs: a step goes to 0.75 z + 0.25 of the point
two steps back, without momentum, and so the first one 0.75 of the way to the border; the direction for l2 is g, not
T g, in u; the projection for l2 is Euclidean in T u; new best losses are counted, not rises; and where the step is
halved, only the weights at which the next gradient is taken go back to the best.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from ..evaluation.attack.apgd import Points
from .ball import total_length

_CHECKPOINTS = (0.22, 0.41, 0.57, 0.7, 0.8, 0.87, 0.93, 0.99)
_BISECTIONS = 200


@torch.no_grad()
def released(at: Callable[[Points], tuple[Tensor, Points]], weights: Points, adaptive: bool, norm: str, radius: float,
             steps: int) -> Tensor:
    """The largest loss found, (1,).

    Weights that are 0 stay where they are with ``adaptive``: there the published code's norm is nan, and it projects
    nothing.

    Args:
        at: Weights -> loss, (1,), and its gradient by them.
        weights: w.
        adaptive: T = abs(w), else 1.
        norm: "linf" or "l2".
        radius: Of the ball.
        steps: Number of steps, >= 1.
    """
    scales = [w.abs() if adaptive else torch.ones_like(w) for w in weights]
    looks = {int(-(-share * steps // 1)) for share in _CHECKPOINTS}  # indices from 0
    before = delta = best = [torch.zeros_like(w) for w in weights]
    loss, grads = at(weights)
    best_loss = best_then = loss
    size, found, looked, halved = 2 * radius, 0, 0, True
    for k in range(steps):
        ahead = _project([d + size * v for d, v in zip(delta, _direction(grads, scales, norm))], scales, norm, radius)
        before, delta = delta, [0.75 * z + 0.25 * d for z, d in zip(ahead, before)]
        loss, grads = at([w + d for w, d in zip(weights, delta)])
        if loss > best_loss:
            best, best_loss, found = delta, loss, found + 1
        if k in looks:
            halved = found < 0.75 * (k - looked) or (not halved and bool(best_loss == best_then))
            if halved:
                size /= 2
                _, grads = at([w + d for w, d in zip(weights, best)])
            found, looked, best_then = 0, k, best_loss
    return best_loss


def _direction(grads: Points, scales: Points, norm: str) -> Points:
    if norm == "linf":
        return [t * g.sign() for t, g in zip(scales, grads)]
    length = total_length(grads) + 1e-12
    return [t * (g / length).to(g.dtype) for t, g in zip(scales, grads)]


def _project(delta: Points, scales: Points, norm: str, radius: float) -> Points:
    if norm == "linf":
        return [torch.minimum(torch.maximum(d, -radius * t), radius * t) for d, t in zip(delta, scales)]

    def length(multiplier: float) -> float:
        moved = [torch.where(t > 0, d / t / (1 + 2 * multiplier / t ** 2), 0.0) for d, t in zip(delta, scales)]
        return float(total_length(moved))

    if length(0.0) <= radius:
        return delta
    low, high = 0.0, 1.0
    while length(high) > radius:
        high *= 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if length(middle) > radius else (low, middle)
    return [torch.where(t > 0, d / (1 + 2 * high / t ** 2), 0.0) for d, t in zip(delta, scales)]
