"""Feature rank: how many directions hold most of the variance of a layer's activations.

Phi: n x d, a row per image; s_1 >= s_2 >= ... its singular values after centring.

    rank_q = #{j : s_1^2 + ... + s_j^2 <= q sum s^2} + 1          at most min(n, d); 0 if nothing is left of Phi

``feature`` centring subtracts the mean of each feature over images: principal components, as papers say. ``sample``
centring subtracts the mean of each image over its features, which the published code does: the largest component is
then mostly the mean image. Papers: M. Andriushchenko et al., "Sharpness-aware minimization leads to low-rank features",
NeurIPS 2023, https://arxiv.org/abs/2305.16292; Table 6 of the SAM-ON paper, https://arxiv.org/abs/2306.04226. Code:
https://github.com/tml-epfl/sam-low-rank-features.

Both come from one Gram matrix, of the smaller side, in float64: in float32, or with TF32, the last percent of the
variance, which is thousands of tiny eigenvalues, would be noise.
"""
from collections.abc import Sequence

import torch
from torch import Tensor

CENTRINGS = ("feature", "sample")
SLAB = 1024  # rows or columns that are added at once: sums have the same order whatever they come in
_NOTHING = 1e-12  # of the sum of squares: what centring leaves of equal numbers is rounding


class Gram:
    """The Gram matrix of features, which come in parts.

    Args:
        n: Number of images.
        d: Number of features of each.
        device: Where it is computed.

    Attributes:
        wide: Whether d > n: then the matrix is Phi Phi^T, and parts are columns (n, c); else it is Phi^T Phi, and parts
            are rows (b, d). The last part alone may leave less than ``SLAB`` of them over.

    Raises:
        torch.OutOfMemoryError: There is no place for it.
    """

    def __init__(self, n: int, d: int, device: torch.device) -> None:
        self.n, self.d, self.wide = n, d, d > n
        size = min(n, d)
        try:
            self._matrix = torch.zeros(size, size, dtype=torch.float64, device=device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # of the CPU
            raise torch.OutOfMemoryError(
                f"the products of {size:,} by {size:,} need {8e-9 * size ** 2:.1f} GB") from None
        self._sums = torch.zeros(size, dtype=torch.float64, device=device)  # of the rows, if wide, else of the columns
        self._squares = 0.0
        self._waiting: list[Tensor] = []
        self._count = 0

    @property
    def complete(self) -> bool:
        """Whether all of Phi has come."""
        return self._count == (self.d if self.wide else self.n)

    def add(self, part: Tensor) -> None:
        """Takes the next columns (n, c) or rows (b, d), in order, on any device."""
        along = 1 if self.wide else 0
        self._count += part.shape[along]
        self._waiting.append(part)
        waiting = torch.cat(self._waiting, along) if len(self._waiting) > 1 else part
        whole = waiting.shape[along] if self.complete else waiting.shape[along] // SLAB * SLAB
        for start in range(0, whole, SLAB):
            slab = waiting.narrow(along, start, min(SLAB, whole - start))
            self._add(slab if self.wide else slab.T)
        left = waiting.narrow(along, whole, waiting.shape[along] - whole)
        self._waiting = [left.clone()] if left.numel() else []  # not a view of what was a large part

    def _add(self, slab: Tensor) -> None:
        """Of one slab (size, c) its products with itself, those on and above the diagonal."""
        x = slab.to(self._matrix.device, torch.float64)
        self._sums += x.sum(dim=1)
        self._squares += float((x * x).sum())
        for i in range(0, len(x), SLAB):
            self._matrix[i:i + SLAB, i:] += x[i:i + SLAB] @ x[i:].T

    @property
    def squares(self) -> float:
        """The sum of squares of Phi; NaN or infinite if a feature is."""
        return self._squares

    def centred(self, centring: str) -> Tensor:
        """The matrix of the centred Phi, whose eigenvalues are s^2 (and zeros)."""
        k = self._matrix
        for i in range(0, len(k), SLAB):  # what was left out lies below the diagonal
            k[i:, i:i + SLAB] = k[i:i + SLAB, i:].T.clone()
        if (centring == "feature") == self.wide:  # means over the dimension that the matrix has
            means = k.mean(dim=0)
            return (k - means).sub_((means - means.mean())[:, None])
        return torch.addr(k, self._sums, self._sums, alpha=-1 / (self.d if self.wide else self.n))


def eigenvalues(gram: Gram, centring: str) -> Tensor:
    """s^2, from the largest on, (min(n, d),), on the CPU; all 0 if nothing but rounding is left."""
    found = torch.linalg.eigvalsh(gram.centred(centring)).clamp_min(0).flip(0).cpu()
    return found if float(found.sum()) > _NOTHING * gram.squares else torch.zeros_like(found)


def ranks(squares: Tensor, shares: Sequence[float]) -> list[int]:
    """rank_q for several q.

    Args:
        squares: s^2, descending, (min(n, d),).
        shares: q, each in (0, 1).
    """
    total, sums = squares.sum(), squares.cumsum(0)
    if float(total) == 0:
        return [0] * len(shares)
    return [min(int((sums <= q * total).sum()) + 1, len(squares)) for q in shares]
