"""Intervals: closed forms, another implementation, and how often they hold what they should."""
import math

import numpy as np
import pytest

from timm_sam.report.statistics import (
    Interval,
    kendall_tau,
    paired_bootstrap,
    t_quantile,
    tau_interval,
    welch,
    welch_of_moments,
)

pytestmark = pytest.mark.full

DRAWN = 200  # simulated experiments
# of 95 % intervals 190 hold the truth on average, give or take 3.1
HELD = range(180, 199)


@pytest.mark.parametrize('freedom', [1, 1.3, 2, 3.7, 10, 1000, 1e6])
@pytest.mark.parametrize('p', [0.5, 0.9, 0.975, 0.999])
def test_quantiles_of_t_are_those_of_scipy(p, freedom):
    stats = pytest.importorskip('scipy.stats')
    assert t_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-4 if p > 0.99 else 1e-6, abs=1e-9)


def test_quantiles_of_t_by_closed_forms():
    assert t_quantile(0.975, 1) == pytest.approx(math.tan(math.pi * 0.475))
    assert t_quantile(0.975, 2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95 ** 2)))
    for wrong in ((0.4, 3), (1, 3), (0.9, 0.5)):
        with pytest.raises(ValueError, match='freedom'):
            t_quantile(*wrong)


def test_welch_is_that_of_scipy():
    stats = pytest.importorskip('scipy.stats')
    ours, theirs = [71.2, 71.5, 71.9, 70.8], [70.1, 70.9, 69.0]
    interval = welch(ours, theirs)
    expected = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-5)
    assert interval.difference == pytest.approx(np.mean(ours) - np.mean(theirs))
    moments = [f(x) for x in (ours, theirs) for f in (np.mean, lambda v: np.std(v, ddof=1), len)]
    again = welch_of_moments(*moments)
    assert (again.low, again.high) == pytest.approx((interval.low, interval.high))


def test_nothing_is_said_of_single_seeds_and_of_numbers_that_do_not_scatter():
    assert welch([1.0], [2.0, 3.0]) is None and welch([1.0, 2.0], [3.0]) is None
    assert welch([1.0, 1.0], [2.0, 2.0]) is None
    assert welch([1.0, 1.0], [2.0, 2.5]) is not None


def test_zero_at_the_end_of_an_interval_is_inside():
    assert not Interval(1, 0, 2).tells_apart and not Interval(-1, -2, 0).tells_apart
    assert Interval(1, 0.1, 2).tells_apart and Interval(-1, -2, -0.1).tells_apart


@pytest.mark.parametrize('seeds, spreads', [((3, 3), (1, 1)), ((3, 5), (0.2, 2))])
def test_intervals_over_seeds_hold_the_true_difference_as_often_as_they_say(seeds, spreads):
    generator, held = np.random.default_rng(0), 0
    for _ in range(DRAWN):
        ours, theirs = (generator.normal(mean, spread, n) for mean, spread, n in zip((75, 74), spreads, seeds))
        interval = welch(ours.tolist(), theirs.tolist())
        held += interval.low <= 1 <= interval.high
    assert held in HELD


def pairs(generator, images):
    """Two models that are right on 70 % and on 65 % of images, mostly on the same ones."""
    both = generator.random(images)
    return (both < 0.7).astype(float), ((both < 0.6) | (both > 0.95)).astype(float)


def test_intervals_over_images_hold_the_true_difference_as_often_as_they_say():
    generator, held, widths = np.random.default_rng(1), 0, []
    for _ in range(DRAWN):
        ours, theirs = pairs(generator, 400)
        interval = paired_bootstrap(ours, theirs, draws=2000)
        held += interval.low <= 0.05 <= interval.high
        widths.append(interval.high - interval.low)
    assert held in HELD
    # what they would be without the pairs: twice as wide
    unpaired = 2 * 1.96 * math.sqrt((0.7 * 0.3 + 0.65 * 0.35) / 400)
    assert np.mean(widths) == pytest.approx(2 * 1.96 * math.sqrt((0.15 - 0.05 ** 2) / 400), rel=0.05)
    assert np.mean(widths) < 0.65 * unpaired


def test_bootstrap_is_that_of_drawing_images_one_by_one():
    generator = np.random.default_rng(2)
    ours, theirs = (np.mean([pairs(generator, 100)[i] for _ in range(3)], axis=0) for i in (0, 1))  # three seeds
    drawn = [np.mean((ours - theirs)[generator.integers(100, size=100)]) for _ in range(20_000)]
    interval = paired_bootstrap(ours, theirs)
    assert interval.difference == pytest.approx(np.mean(ours - theirs))
    assert (interval.low, interval.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.005)
    assert paired_bootstrap(ours, theirs) == interval != paired_bootstrap(ours, theirs, seed=1)
    assert paired_bootstrap(ours, ours) == Interval(0, 0, 0)
    with pytest.raises(ValueError, match='one number per image'):
        paired_bootstrap(ours, theirs[:-1])


def test_tau_is_that_of_scipy_ties_included():
    stats = pytest.importorskip('scipy.stats')
    generator = np.random.default_rng(0)
    for n in (2, 3, 10, 40):
        x = generator.integers(0, 6, n).astype(float)
        y = np.round(x + generator.normal(size=n), 0)
        if len(set(x)) > 1 and len(set(y)) > 1:
            assert kendall_tau(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)


def test_tau_by_hand_and_where_there_is_none():
    assert kendall_tau([1, 2, 3], [10, 20, 90]) == 1 and kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    assert kendall_tau([1, 1, 1], [1, 2, 3]) is None and tau_interval([1, 1, 1], [1, 2, 3]) is None
    assert tau_interval(range(7), range(7)) is None and tau_interval(range(8), range(8)) == (1, 1)
    with pytest.raises(ValueError, match='lengths 2 and 3'):
        kendall_tau([1, 2], [1, 2, 3])


def test_interval_of_tau_holds_it_as_often_as_it_says():
    generator, r, held = np.random.default_rng(1), 0.6, 0
    truth = 2 / math.pi * math.asin(r)  # of normal numbers with correlation r
    for _ in range(DRAWN):
        x = generator.normal(size=40)
        y = r * x + math.sqrt(1 - r * r) * generator.normal(size=40)
        low, high = tau_interval(x, y, draws=400)
        held += low <= truth <= high
    assert held in HELD
