"""The set that worst-case sharpness searches: all selected weights of a network as one point in one box or ball."""
import torch
from torch import Tensor

from ..evaluation.attack.apgd import Points

# of the steps, in percent, as in the table of checkpoints of APGD's paper
_CHECKPOINTS = (22, 41, 57, 70, 80, 87, 93, 99)


class WeightBall:
    """Points u, lists of tensors, with ||u|| <= ``radius`` over all tensors together: a ``Space`` of one sample.

    Attributes:
        norm: "linf" or "l2".
        radius: > 0.
        count: Number of tensors of a point.
    """

    def __init__(self, norm: str, radius: float, count: int) -> None:
        self.norm, self.radius, self.count = norm, radius, count

    def project(self, points: Points) -> Points:
        if self.norm == "linf":
            return [x.clamp(-self.radius, self.radius) for x in points]
        length = total_length(points)
        scale = torch.where(length > self.radius, self.radius / length, 1.0)
        return [x * scale.to(x.dtype) for x in points]

    def direction(self, grads: Points) -> Points:
        # a nan says nothing about its weight, an infinity still has its sign
        grads = [g.nan_to_num(nan=0.0) for g in grads]
        if self.norm == "linf":
            return [g.sign() for g in grads]
        # first to a largest element of 1: squares of small gradients underflow
        largest = torch.stack([g.abs().amax() if g.numel() else g.new_zeros(()) for g in grads]).amax()
        grads = [g / torch.where(largest > 0, largest, 1.0) for g in grads]
        length = total_length(grads)
        scale = torch.where(length > 0, 1 / length, 0.0)
        return [g * scale.to(g.dtype) for g in grads]

    def per_sample(self, values: Tensor) -> Points:
        # without a dimension, so that a loss in float64 does not make the weights such
        return [values.view(())] * self.count


def total_length(points: Points) -> Tensor:
    """The Euclidean norm over all tensors together, 0-dim, accumulated in float64 where the device has it."""
    dtype = None if points[0].device.type == "mps" else torch.float64
    squares = [torch.linalg.vector_norm(x, dtype=dtype).square() for x in points]
    return torch.stack(squares).sum().sqrt()


def checkpoints(steps: int) -> tuple[int, ...]:
    """After how many of ``steps`` steps APGD looks at its step size: the paper's shares of them, rounded up.

    20 steps: 5, 9, 12, 14, 16, 18, 19, 20. In integers: 0.7 * 20 is more than 14 in floats.
    """
    return tuple(sorted({-(-percent * steps // 100) for percent in _CHECKPOINTS}))
