"""Where normalization shows in two dimensions: a quadratic, and a curve of minima.

After Sections 3 and 4 of Dai, Ahn and Sra, "The Crucial Role of Normalization in Sharpness-Aware Minimization",
NeurIPS 2023, https://arxiv.org/abs/2305.15287. Many runs are rows of one tensor; that a row moves as ``timm_sam.SAM``
moves a module is tested (`tests/project/test_normalization.py`).
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

METHODS = ("gd", "sam", "usam")
Gradient = Callable[[Tensor], Tensor]


def step(w: Tensor, gradient: Gradient, lr: Tensor | float, rho: Tensor | float, method: str) -> Tensor:
    """One update of each row: gradient descent, SAM or USAM, each with its own norm.

    Args:
        w: Points, (rows, n).
        gradient: Of points of this shape.
        lr, rho: Numbers, or (rows, 1).
        method: One of ``METHODS``.

    Returns:
        The next points.
    """
    if method == "gd":
        return w - lr * gradient(w)
    g = gradient(w)
    if method == "sam":
        norm = torch.linalg.vector_norm(g, dim=-1, keepdim=True)
        g = g / torch.where(norm > 0, norm, torch.ones_like(norm))  # a gradient of 0 has no direction: eps = 0
    return w - lr * gradient(w + rho * g)


# ---- stability on a quadratic

CURVATURES = (1.0, 0.1)
LEARNING_RATES = (0.5, 1.0, 1.5, 1.9)
START = (1.0, 1.0)
STEPS = 2000


def threshold(lr: float, beta: float = CURVATURES[0]) -> float:
    """The rho above which USAM diverges on a quadratic of this curvature: (2 / lr - beta) / beta^2."""
    return (2 / lr - beta) / beta ** 2


def cycle(lr: float, rho: float, beta: float = CURVATURES[0]) -> float:
    """Distance from the minimum of the two points between which SAM ends: lr rho beta / (2 - lr beta)."""
    return lr * rho * beta / (2 - lr * beta)


def radii(lr: float) -> list[float]:
    """Those that are tried with a learning rate: a grid, and both sides of the threshold."""
    return sorted({*(2.0 ** k for k in range(-7, 4)), 0.98 * threshold(lr), 1.02 * threshold(lr)})


@dataclass(frozen=True)
class Stability:
    """Where one run on the quadratic ended.

    Attributes:
        lr, rho, method: The run.
        norm: ||w|| after the last step; infinite where it overflowed.
    """

    lr: float
    rho: float
    method: str
    norm: float

    @property
    def diverged(self) -> bool:
        """Whether it is farther away than it began: growth just above the threshold is slow."""
        return self.norm > math.hypot(*START)


def quadratic(cases: list[tuple[float, float]], method: str, steps: int = STEPS,
              curvatures: tuple[float, ...] = CURVATURES, start: tuple[float, ...] = START) -> list[Stability]:
    """Runs on ``w' diag(curvatures) w / 2`` in float64.

    Args:
        cases: (lr, rho) of each.
        method: One of ``METHODS``.
        steps: Of each.
        curvatures, start: (n,), of the quadratic and its first point.
    """
    h = torch.tensor(curvatures, dtype=torch.float64)
    w = torch.tensor([start] * len(cases), dtype=torch.float64)
    lr, rho = (torch.tensor(column, dtype=torch.float64)[:, None] for column in zip(*cases))
    for _ in range(steps):
        w = step(w, lambda w: h * w, lr, rho, method)
    norms = torch.linalg.vector_norm(w, dim=-1).nan_to_num(nan=math.inf).tolist()  # inf - inf
    return [Stability(lr, rho, method, norm) for (lr, rho), norm in zip(cases, norms)]


# ---- drift along minima

# l of L(x, y) = l(xy): convex, even, 1-Lipschitz, l''(0) = 1; here l'
SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "sqrt(1 + s^2) - 1": lambda s: s / torch.sqrt(1 + s * s),
    "log cosh s": torch.tanh,
}


@dataclass(frozen=True)
class Neuron:
    """A single neuron, L(x, y) = l(xy): its minima are the axes, and the sharpness at (0, y) is y^2.

    Attributes:
        loss: A key of ``SLOPES``.
        start: (x, y).
        lr, rho: Of all three methods.
    """

    loss: str
    start: tuple[float, float]
    lr: float
    rho: float

    @property
    def name(self) -> str:
        return f"l(s) = {self.loss}, from ({self.start[0]:g}, {self.start[1]:.3g}), lr {self.lr:g}, rho {self.rho:g}"

    @property
    def bounds(self) -> dict[str, float]:
        """The y^2 below which gradient descent and USAM stop: y^2 < 2 / lr, and y^2 (1 + rho y^2) < 2 / lr."""
        return {"gd": 2 / self.lr, "usam": (math.sqrt(1 + 8 * self.rho / self.lr) - 1) / (2 * self.rho)}

    def gradient(self, w: Tensor) -> Tensor:
        """Of L at points (rows, 2)."""
        return SLOPES[self.loss](w.prod(-1, keepdim=True)) * w.flip(-1)

    def path(self, method: str, steps: int) -> Tensor:
        """All points from the start on, (steps + 1, 2), in float64."""
        w = torch.tensor([self.start], dtype=torch.float64)
        points = [w]
        for _ in range(steps):
            points.append(step(points[-1], self.gradient, self.lr, self.rho, method))
        return torch.cat(points)


NEURONS = (*(Neuron(loss, (2.0, math.sqrt(40.0)), 0.4, 0.1) for loss in SLOPES),
           Neuron("sqrt(1 + s^2) - 1", (0.2, 5.0), 0.05, 0.1))
