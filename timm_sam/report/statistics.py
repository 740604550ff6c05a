"""Whether two results can be told apart: differences with 95 % intervals.

Over images: the paired bootstrap, percentiles of the mean difference over resampled images (Efron & Tibshirani, An
Introduction to the Bootstrap, 1993): what other images of the same kind would do to these very models. Over seeds:
Welch's interval for two means of unequal variances (Biometrika 34, 1947): what other seeds would do.
"""
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
DRAWS = 10_000  # of the bootstrap
SEED = 0  # of its draws: the same report each time
_GRID = 200_001  # points of the integral of the t distribution: four digits of any quantile, more of those in use


@dataclass(frozen=True)
class Interval:
    """A difference and the ends of its interval, in the unit of what differs."""

    difference: float
    low: float
    high: float

    @property
    def tells_apart(self) -> bool:
        """Whether 0 lies outside."""
        return self.low > 0 or self.high < 0


def welch(ours: Sequence[float], theirs: Sequence[float], level: float = LEVEL) -> Interval | None:
    """The difference of two means, ``ours`` minus ``theirs``.

    Args:
        ours, theirs: One number per seed each.
        level: Share of experiments whose interval holds the true difference.

    Returns:
        None where there are less than two numbers on a side, or none of them scatter: then nothing says how they would.
    """
    if min(len(ours), len(theirs)) < 2:
        return None
    return welch_of_moments(statistics.fmean(ours), statistics.stdev(ours), len(ours), statistics.fmean(theirs),
                            statistics.stdev(theirs), len(theirs), level)


def welch_of_moments(mean: float, std: float, n: int, other_mean: float, other_std: float, other_n: int,
                     level: float = LEVEL) -> Interval | None:
    """:func:`welch` of means, sample standard deviations and numbers of seeds (two or more on both sides)."""
    parts = std ** 2 / n, other_std ** 2 / other_n
    variance = sum(parts)
    if variance == 0:
        return None
    freedom = variance ** 2 / (parts[0] ** 2 / (n - 1) + parts[1] ** 2 / (other_n - 1))
    width = t_quantile((1 + level) / 2, freedom) * math.sqrt(variance)
    difference = mean - other_mean
    return Interval(difference, difference - width, difference + width)


def t_quantile(p: float, freedom: float) -> float:
    """The quantile of Student's t distribution.

    Args:
        p: 0.5 to below 1.
        freedom: Degrees of freedom, 1 or more; need not be whole.

    Raises:
        ValueError: A number is out of range.
    """
    if not (0.5 <= p < 1 and freedom >= 1):
        raise ValueError(f"p={p}, freedom={freedom}: 0.5 <= p < 1 and freedom >= 1 are needed")
    # with t = sqrt(freedom) tan(angle) the density is a power of the cosine
    # of many degrees of freedom nothing is left beyond 40
    angles = np.linspace(0, min(math.pi / 2, 40 / math.sqrt(freedom)), _GRID)
    density = np.cos(angles) ** (freedom - 1)
    summed = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = float(np.interp((2 * p - 1) * summed[-1], summed, angles))
    return math.sqrt(freedom) * math.tan(angle)


def paired_bootstrap(ours: np.ndarray, theirs: np.ndarray, level: float = LEVEL, draws: int = DRAWS,
                     seed: int = SEED) -> Interval:
    """The mean difference over images, ``ours`` minus ``theirs``.

    Args:
        ours, theirs: (N,), N >= 1: what the two come to on the same images, in the same order; for several seeds the
            mean over these.
        level: As of :func:`welch`.
        draws: Resampled sets of images.
        seed: Of the resampling.

    Raises:
        ValueError: The arrays are not of one length, or empty.
    """
    if ours.shape != theirs.shape or ours.ndim != 1 or not len(ours):
        raise ValueError(f"shapes {ours.shape} and {theirs.shape}: one number per image is needed for both")
    # drawing images with replacement draws so many of each value that a difference has: the same, but fast
    values, counts = np.unique(ours.astype(np.float64) - theirs, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(ours), counts / len(ours), size=draws)
    means = drawn @ values / len(ours)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values @ counts / len(ours)), float(low), float(high))
