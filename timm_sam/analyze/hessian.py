"""The Hessian H of the mean loss: its largest eigenvalue by Lanczos' iteration, its trace by Hutchinson's estimate.

Both need products H v only, which cost a forward and two backward passes. C. Lanczos, J. Res. Natl. Bur. Stand. 45
(1950); M. F. Hutchinson, Commun. Stat. Simul. Comput. 18 (1989).

"Largest" is meant with its sign. Lanczos' iteration comes to the largest eigenvalue of a symmetric matrix whatever the
signs of the others are; power iteration would first find the one of largest size, and have to shift. Its vectors are
not kept, so they lose their orthogonality in time, which leads to copies of eigenvalues that have been found, and not
to wrong ones (C. C. Paige, J. Inst. Math. Appl. 18 (1976)).
"""
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..methods.stages import seed_of
from .objective import Loss, Points

PRODUCT = 7  # forward passes that a product of one batch takes as long as: a forward and two backward passes
Multiply = Callable[[Tensor], Tensor]  # v -> H v, both (n,), in float64 where there is


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Attention without fused kernels, which have no second derivative; restored after."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def product(loss: Loss, weights: Points, vector: Points) -> Points:
    """H v of one batch.

    Args:
        loss: Of weights, see :func:`timm_sam.analyze.objective.batch_loss`.
        weights: w, detached; not written to.
        vector: v, of the same shapes and types.

    Returns:
        H v, zero for weights of which the gradient does not depend on w.
    """
    with torch.enable_grad(), twice_differentiable():
        leaves = [w.detach().requires_grad_() for w in weights]
        grads = torch.autograd.grad(loss(leaves), leaves, create_graph=True, allow_unused=True)
        pairs = [(g, v) for g, v in zip(grads, vector) if g is not None and g.requires_grad]
        if not pairs:
            return [torch.zeros_like(w) for w in weights]
        found = torch.autograd.grad([g for g, _ in pairs], leaves, [v for _, v in pairs], allow_unused=True)
    return [torch.zeros_like(w) if x is None else x for w, x in zip(weights, found)]


def flat(points: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All numbers in one row, (n,)."""
    return torch.cat([p.detach().reshape(-1).to(dtype) for p in points])


def shaped(row: Tensor, like: Points) -> Points:
    """The reverse of :func:`flat`, in the shapes and types of ``like``."""
    parts = row.split([p.numel() for p in like])
    return [part.view(p.shape).to(p.dtype) for part, p in zip(parts, like)]


@dataclass(frozen=True)
class Top:
    """The largest eigenvalue.

    Attributes:
        value: It, or what was known of it in the end; NaN if a product was not finite.
        residual: ||H x - value x|| of the unit vector x that belongs to it: an eigenvalue is at most so far away.
        change: How much the last step changed it, relative to it.
        steps: Products with H.
        converged: Whether both were below the tolerance, or nothing was left to look at.
    """

    value: float
    residual: float
    change: float
    steps: int
    converged: bool


def top_eigenvalue(multiply: Multiply, start: Tensor, tolerance: float, limit: int) -> Top:
    """The largest eigenvalue, with its sign, of a symmetric matrix.

    Args:
        multiply: v -> H v; called up to ``limit`` times.
        start: Where the search begins, (n,), not 0: what is orthogonal to it is not found.
        tolerance: Of the last change and of the residual, relative to the value.
        limit: Most products.
    """
    if not float(start.norm()):
        raise ValueError("start must not be 0")
    vector, before = start / start.norm(), torch.zeros_like(start)
    diagonal: list[float] = []
    beside: list[float] = []  # the tridiagonal matrix of H in the space of start, H start, H H start, ...
    value, change, residual, norm = math.nan, math.inf, math.inf, 0.0
    for step in range(1, limit + 1):
        image = multiply(vector)
        alpha = float(image @ vector)
        if not math.isfinite(alpha):
            return Top(math.nan, math.nan, math.nan, step, False)
        image -= alpha * vector
        if beside:
            image -= beside[-1] * before
        diagonal.append(alpha)
        beta = float(image.norm())
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        earlier, value = value, float(values[-1])
        norm = max(norm, float(values.abs().max()))
        residual = beta * abs(float(vectors[-1, -1]))
        change = abs(value - earlier) if step > 1 else math.inf
        # nothing but rounding is left: the space holds all that start has a part of
        if beta <= 1e-12 * norm or step == len(start):
            return Top(value, residual, change, step, True)
        if max(change, residual) <= tolerance * abs(value):
            return Top(value, residual, change, step, True)
        beside.append(beta)
        before, vector = vector, image / beta
    return Top(value, residual, change, limit, False)


def _tridiagonal(diagonal: Sequence[float], beside: Sequence[float]) -> Tensor:
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        off = torch.tensor(beside, dtype=torch.float64)
        matrix += torch.diag(off, 1) + torch.diag(off, -1)
    return matrix


def start_vector(n: int, seed: int) -> Tensor:
    """Where the search begins: normal numbers, (n,), the same on every device."""
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probe(n: int, seed: int, number: int) -> Tensor:
    """The ``number``-th vector of Hutchinson's estimate: +1 and -1, (n,), float64, the same on every device."""
    generator = torch.Generator().manual_seed(seed_of(seed, number))
    return torch.randint(0, 2, (n,), generator=generator).mul_(2).sub_(1).double()


def trace(multiply: Multiply, vector: Tensor) -> float:
    """v^T H v: its mean over probes is the trace of H."""
    return float(multiply(vector) @ vector)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of at least two values, and its standard error; NaN if one of them is not finite."""
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
