"""Matrix sensing with timm_sam's own SAM and USAM.

After Section 1 of Dai, Ahn and Sra, NeurIPS 2023, https://arxiv.org/abs/2305.15287. A matrix X* = U* U*' of rank r is
sought from m products with Gaussian matrices A_i:

    b_i = <A_i, X*>,    L(U) = mean_i (<A_i, U U'> - b_i)^2 / 2,    full batch

U* has Gaussian columns of length 1. What the methods do depends on the start of U, its shape and the learning rate.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from timm_sam import SAM, methods

UNIT = "unit columns"
SMALL = "0.01 x Gaussian"


class Sensing(nn.Module):
    """The loss as a module, whose only parameter is U.

    Args:
        d, r: Side and rank of X*.
        m: How many matrices A_i.
        seed: Of A_i and U*.
        dtype: Of everything.
    """

    def __init__(self, d: int = 100, r: int = 5, m: int | None = None, seed: int = 0,
                 dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.r = r
        # drawn in float32, so that the problem is the same one in float64
        self.A = torch.randn(m or 5 * d * r, d * d, generator=generator).to(dtype)
        solution = nn.functional.normalize(torch.randn(d, r, generator=generator).to(dtype), dim=0)
        self.b = self.A @ (solution @ solution.T).flatten()
        self.U = nn.Parameter(torch.empty(d, d, dtype=dtype))

    def forward(self) -> Tensor:
        return (self.A @ (self.U @ self.U.T).flatten() - self.b).square().mean() / 2

    def restart(self, columns: int, start: str, seed: int = 0) -> None:
        """Puts U where a run begins.

        Args:
            columns: Of U.
            start: ``UNIT`` or ``SMALL``.
            seed: Of the start.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(len(self.U), columns, generator=generator).to(self.U.dtype)
        self.U = nn.Parameter(nn.functional.normalize(drawn, dim=0) if start == UNIT else 0.01 * drawn)


@dataclass(frozen=True)
class Setting:
    """Runs that are compared.

    Attributes:
        wide: Whether U is d x d; else it is d x r.
        start: ``UNIT`` or ``SMALL``.
        lr, lr_gd: Of SAM and USAM, and of gradient descent.
        steps: Of each run.
        radii: Of SAM and USAM.
    """

    wide: bool
    start: str
    lr: float
    lr_gd: float
    steps: int
    radii: tuple[float, ...]

    @property
    def name(self) -> str:
        gd = "" if self.lr_gd == self.lr else f" (gd {self.lr_gd:g})"
        return f"U d x {'d' if self.wide else 'r'}, {self.start}, lr {self.lr:g}{gd}, {self.steps} steps"

    @property
    def runs(self) -> list[tuple[str, float]]:
        """Method and radius of each."""
        return [("gd", 0.0), *((method, rho) for method in ("sam", "usam") for rho in self.radii)]


SETTINGS = (
    Setting(True, UNIT, 0.05, 0.05, 150, (0.001, 0.01, 0.1, 1.0)),
    Setting(False, UNIT, 0.05, 0.05, 150, (0.1, 1.0)),
    Setting(False, UNIT, 0.5, 0.05, 10, (0.1, 1.0)),
    Setting(True, SMALL, 0.05, 0.05, 150, (2.0,)),
)


def losses(problem: Sensing, setting: Setting, method: str, rho: float) -> tuple[list[float], float]:
    """The loss before each step and after the last; ends with the first that is not finite.

    Args:
        problem: Whose U is moved.
        setting: Where it starts, how many steps.
        method: ``gd``, ``sam`` or ``usam``.
        rho: Radius.

    Returns:
        The losses, and ||dL/dU|| at the start.
    """
    problem.restart(problem.r if not setting.wide else len(problem.U), setting.start)
    (gradient,) = torch.autograd.grad(problem(), problem.U)
    lr = setting.lr_gd if method == "gd" else setting.lr
    optimizer = torch.optim.SGD(problem.parameters(), lr=lr)
    sam = None if method == "gd" else SAM(
        optimizer, problem, params="all", rho=rho, method=methods.usam() if method == "usam" else None)
    found = []
    for _ in range(setting.steps):
        if sam is None:
            optimizer.zero_grad()
            loss = problem()
            loss.backward()
            optimizer.step()
        else:
            loss = sam.minimize(problem)
        found.append(loss.item())
        if not math.isfinite(found[-1]):
            return found, gradient.norm().item()
    with torch.no_grad():
        found.append(problem().item())
    return found, gradient.norm().item()
