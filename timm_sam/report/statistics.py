"""Whether two results can be told apart: differences with 95 % intervals.

Over images: the paired bootstrap, percentiles of the mean difference over resampled images (Efron & Tibshirani, An
Introduction to the Bootstrap, 1993): what other images of the same kind would do to these very models. Over seeds:
Welch's interval for two means of unequal variances (Biometrika 34, 1947): what other seeds would do.

And whether two measures put runs in the same order: Kendall's tau-b (Biometrika 33, 1945), with an interval by the
bootstrap over runs.
"""
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
DRAWS = 10_000  # of the bootstrap
SEED = 0  # of its draws: the same report each time
_FEWEST_RUNS = 8
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


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b of two measures of the same runs: 1 where they put them in the same order, -1 in the reverse.

    Args:
        first, second: Finite numbers, one per run each.

    Returns:
        None where one of them says the same of all runs.

    Raises:
        ValueError: They are not of one length.
    """
    together, one, other = _pairs(first, second)
    counts = np.ones(len(first))
    found = _tau(together, one, other, counts[None])[0]
    return None if math.isnan(found) else float(found)


def tau_interval(first: Sequence[float], second: Sequence[float], level: float = LEVEL, draws: int = DRAWS,
                 seed: int = SEED) -> tuple[float, float] | None:
    """The ends of the percentile bootstrap interval of :func:`kendall_tau`, over resampled runs.

    Args:
        first, second: As of :func:`kendall_tau`.
        level: As of :func:`welch`.
        draws: Resampled sets of runs; those of which a measure says the same throughout are left out.
        seed: Of the resampling.

    Returns:
        None where one of the measures says the same of all, or there are less than eight runs: of fewer, resampling
        shows too little of what other runs would do, and where all agree it would show no doubt at all.
    """
    if len(first) < _FEWEST_RUNS or kendall_tau(first, second) is None:
        return None
    n = len(first)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)
    found = _tau(*_pairs(first, second), counts)
    low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _pairs(first: Sequence[float], second: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each pair of runs, (n, n): whether both measures agree (1, -1, 0), and whether each tells it apart (1, 0)."""
    if len(first) != len(second):
        raise ValueError(f"lengths {len(first)} and {len(second)}: one number per run is needed of both")
    x, y = (np.asarray(values, dtype=np.float64) for values in (first, second))
    s, t = (np.sign(values[:, None] - values[None, :]) for values in (x, y))
    return s * t, s * s, t * t


def _tau(together: np.ndarray, one: np.ndarray, other: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """tau-b of sets that have each run so many times, (sets, n); NaN where a measure says the same throughout."""
    agree, first, second = (((counts @ matrix) * counts).sum(axis=1) for matrix in (together, one, other))
    told = first * second
    return np.where(told > 0, agree / np.sqrt(np.where(told > 0, told, 1.0)), np.nan)
