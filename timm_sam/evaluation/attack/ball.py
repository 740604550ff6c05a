"""The set that an attack searches: a ball around each clean image, cut to [0, 1], and where in it a search starts."""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .apgd import Points

NORMS = ("linf", "l2")


@dataclass(frozen=True)
class Radius:
    """The size of a ball around an image, and how it was written.

    Attributes:
        norm: One of ``NORMS``.
        value: In units of [0, 1], > 0.
        text: As on the command line, e.g. ``0.25/255``.
    """

    norm: str
    value: float
    text: str

    def __str__(self) -> str:
        return f"{self.norm} {self.text}"


class Ball:
    """Images within ``radius`` of ``center`` and in [0, 1]: the ``Space`` of attacks.

    Attributes:
        center: The clean images in [0, 1], first dimension the samples.
        norm: "linf" or "l2", over all other dimensions.
        radius: In units of [0, 1].
    """

    def __init__(self, center: Tensor, norm: str, radius: float) -> None:
        self.center, self.norm, self.radius = center, norm, radius

    def project(self, points: Points) -> Points:
        x = points[0]
        if self.norm == "linf":
            x = x.clamp(self.center - self.radius, self.center + self.radius)
        else:
            delta = x - self.center
            length = vector_length(delta, 2)
            x = torch.where(length > self.radius, self.center + delta * (self.radius / length), x)
        # cutting to the box, which holds the center, does not lead out of the ball again
        return [x.clamp(0, 1)]

    def direction(self, grads: Points) -> Points:
        # a nan says nothing about its pixel, an infinity still has its sign
        grad = grads[0].nan_to_num(nan=0.0)
        if self.norm == "linf":
            return [grad.sign()]
        # first to a largest element of 1: squares of small gradients underflow
        grad = grad / _nonzero(vector_length(grad, torch.inf))
        return [grad / _nonzero(vector_length(grad, 2))]

    def per_sample(self, values: Tensor) -> Points:
        return [values.view(-1, *[1] * (self.center.ndim - 1))]

    def surface(self, noise: Tensor) -> Points:
        """The points of the ball's surface in the directions ``noise``, cut to [0, 1]."""
        length = vector_length(noise, torch.inf if self.norm == "linf" else 2)
        return self.project([self.center + self.radius * noise / length])


def noise(norm: str, shape: Sequence[int], seed: int, indices: Sequence[int], stage: int) -> Tensor:
    """Directions of random starts, (len(indices), *shape) on the CPU: U(-1, 1) for linf, N(0, 1) for l2.

    A sample's own depend on ``seed``, its index in the data set and the stage, and on nothing else: neither on its
    batch nor on the device.
    """
    values = np.empty((len(indices), *shape), dtype=np.float32)
    for row, index in zip(values, indices):
        generator = np.random.default_rng((seed, index, stage))
        if norm == "linf":
            generator.random(out=row, dtype=np.float32)
        else:
            generator.standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(values * 2 - 1 if norm == "linf" else values)


def vector_length(t: Tensor, order: float) -> Tensor:
    """The norm of each sample, (n, ...) -> (n, 1, ...)."""
    return torch.linalg.vector_norm(t, order, dim=tuple(range(1, t.ndim)), keepdim=True)


def _nonzero(length: Tensor) -> Tensor:
    return torch.where(length > 0, length, 1.0)
