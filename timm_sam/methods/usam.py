"""USAM: SAM without, or with a part of, the normalization of the gradient.

Andriushchenko and Flammarion, ICML 2022, https://arxiv.org/abs/2206.06232 (rho times g itself); the blend with SAM and
its schedule: Oikonomou and Loizou, ICLR 2025, https://github.com/dimitris-oik/unifiedsam.

    s   = 1 - lam + lam / ||T g||        lam = 1: SAM; lam = 0: USAM; ||T g|| = 0: eps = 0
    eps = rho s T^2 g
    G   = dL/dw at w + eps

With lam below 1 rho has the unit of an inverse curvature: start from SAM's rho over a typical ||g|| of its log.
"""
import math
from dataclasses import dataclass

from .stages import At, Method

SCHEDULE = "1-1/t"


@dataclass(frozen=True)
class Blend:
    """lam of each update: a number, or ``1 - 1/t`` with t = 1, 2, ... counting updates."""

    lam: float | None

    def __call__(self, at: At) -> float:
        return 1 - 1 / (at.update + 1) if self.lam is None else self.lam


def usam(lam: float | str = 0.0) -> Method:
    """USAM, and what lies between it and SAM, for ``SAM(..., method=usam())``.

    Args:
        lam: Share of SAM's normalization, 0 (none) to 1 (SAM), or "1-1/t", t counting updates from 1.

    Raises:
        ValueError: lam is neither.
    """
    if lam == SCHEDULE:
        return Method(name="usam(lam=1-1/t)", normalization=Blend(None), note=_NOTE)
    try:
        number = float(lam)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(lam, bool) or not 0 <= number <= 1:
        raise ValueError(f"usam: lam={lam!r} must be a number from 0 to 1, or {SCHEDULE}")
    return Method(name=f"usam(lam={number:g})", normalization=Blend(number), note="" if number == 1 else _NOTE)


_NOTE = "rho multiplies g itself, not its direction: |eps| is rho |g|, and SAM's values of rho do not carry over"
