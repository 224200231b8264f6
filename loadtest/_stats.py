"""Quantiles, intervals and sample-size rules: pure functions on arrays, each with its source. No I/O, no units."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

LEVEL = 0.95
TRIM = 0.2  # of each end: rare stalls are cut away, and the typical figure is left
MIN_PAIRS = 3  # with two, the t quantile is 12.7: an interval that tells nothing
# Requests that half of a cell's blocks must hold for a quantile of a block's own; and below what a block, in a cell
# whose others hold enough, is so slow that it counts as infinitely slow.
MIN_MEDIAN = {0.5: 11, 0.99: 500}
MIN_BLOCK = {0.5: 11, 0.99: 100}


class Interval(NamedTuple):
    estimate: float
    low: float
    high: float


class Location(NamedTuple):
    """Where a sample lies: its mean or trimmed mean, the standard error of that, and its degrees of freedom."""

    mean: float
    se: float
    df: float


@lru_cache
def samples_needed(q: float, confidence: float = 0.99) -> int:
    """The fewest samples that say something about quantile `q` (0 < q < 1).

    MLPerf Inference's early-stopping rule with margin 0: the smallest n at which at most one sample above the
    quantile has a probability of no more than 1 - confidence; 64 for p90, 662 for p99, 6,636 for p99.9.
    """

    def enough(n: int) -> bool:
        return bool(stats.binom.cdf(1, n, 1 - q) <= 1 - confidence)

    high = 2
    while not enough(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def quantiles(values: Floats, qs: Sequence[float]) -> list[float]:
    """The quantiles `qs` of `values`, shape (n,), n ≥ 1, by nearest rank: each is a value that occurred.

    Hyndman and Fan's definition 1 (the inverse of the empirical distribution). Nothing is interpolated, so values of
    +inf, which stand for failed requests, give +inf or nothing.
    """
    # The small slack keeps 0.99 × 100 at rank 99, though the product in binary is a little more.
    ranks = [min(max(math.ceil(q * len(values) - 1e-9), 1), len(values)) - 1 for q in qs]
    ordered = np.partition(values, sorted(set(ranks)))
    return [float(ordered[rank]) for rank in ranks]


def mean_interval(values: Floats, level: float = LEVEL) -> Interval:
    """The mean of `values`, shape (n,), n ≥ 2, with Student's t interval."""
    mean = float(np.mean(values))
    half = _t(len(values), level) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def trimmed(values: Floats, share: float = TRIM) -> float:
    """The mean of `values`, shape (n,), n ≥ 1, without the floor(share · n) smallest and as many of the largest; from
    three values on at least one at each end, so that of three and four it is the median.

    Values of ±inf take part by their rank; where one is left after trimming, the result is infinite or NaN.
    """
    cut = max(int(share * len(values) + 1e-9), int(len(values) >= 3))
    kept = np.sort(values)[cut : len(values) - cut]
    with np.errstate(invalid="ignore"):
        return float(np.mean(kept))


def location(values: Floats) -> Location:
    """The mean of `values`, shape (n,), n ≥ 2, all finite, with Student's standard error."""
    n = len(values)
    return Location(float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(n), n - 1)


def trimmed_location(values: Floats, share: float = TRIM) -> Location:
    """The trimmed mean of `values`, shape (n,), n ≥ 2, which may hold ±inf as long as trimming cuts them away.

    Tukey and McLaughlin (1963): the winsorised standard deviation over (1 - 2·share)·√n, with n - 2·cut - 1 degrees
    of freedom.
    """
    n, cut = len(values), int(share * len(values) + 1e-9)
    ordered = np.sort(values)
    ordered[:cut], ordered[n - cut :] = ordered[cut], ordered[n - cut - 1]
    se = float(np.std(ordered, ddof=1)) / ((1 - 2 * cut / n) * math.sqrt(n))
    return Location(float(np.mean(np.sort(values)[cut : n - cut])), se, n - 2 * cut - 1)


def interval(at: Location, level: float = LEVEL) -> Interval:
    half = float(stats.t.ppf((1 + level) / 2, at.df)) * at.se
    return Interval(at.mean, at.mean - half, at.mean + half)


def log_se(of: Interval, df: float) -> float:
    """The standard error of a ratio's logarithm, from the ends of its interval, both above 0."""
    return math.log(of.high / of.low) / (2 * float(stats.t.ppf((1 + LEVEL) / 2, df)))


def p_value(at: Location) -> float:
    """Two-sided, of the hypothesis that the location is 0."""
    if at.se == 0:
        return 0.0 if at.mean else 1.0
    return float(2 * stats.t.sf(abs(at.mean) / at.se, at.df))


def difference(ours: Location, theirs: Location) -> Location:
    """ours - theirs of two independent samples: Welch (1947), with Satterthwaite's degrees of freedom."""
    a, b = ours.se**2, theirs.se**2
    df = (a + b) ** 2 / (a**2 / ours.df + b**2 / theirs.df) if a + b else ours.df + theirs.df
    return Location(ours.mean - theirs.mean, math.sqrt(a + b), df)


def median_interval(values: Floats, level: float = LEVEL) -> Interval | None:
    """The median of `values`, shape (n,), with an interval between order statistics (Conover, 1999, section 3.2).

    None where there are too few for one: fewer than 6 at 95 %.
    """
    n = len(values)
    cut = int(stats.binom.ppf((1 - level) / 2, n, 0.5))
    if stats.binom.cdf(cut, n, 0.5) > (1 - level) / 2:
        cut -= 1
    if n == 0 or cut < 0:
        return None
    ordered = np.sort(values)
    return Interval(float(np.median(values)), float(ordered[cut]), float(ordered[n - 1 - cut]))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family of tests, in their order. Holm (1979), "A simple sequentially rejective…"."""
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = worst
    return adjusted


def units_needed(sd: float, wanted: float, tests: int = 1, most: int = 1000) -> int | None:
    """How many units of standard deviation `sd` make the t interval's half-width less than `wanted`; None above `most`.

    `tests`: as many share the error rate (Bonferroni, Holm's first step). The interval is taken at its expected
    width, so about half of such runs decide.
    """
    level = 1 - (1 - LEVEL) / tests
    ns = np.arange(MIN_PAIRS, most + 1)
    inside = stats.t.ppf((1 + level) / 2, ns - 1) * sd / np.sqrt(ns) < wanted
    return int(ns[np.argmax(inside)]) if inside.any() else None


def ratio_of_means(ours: Floats, base: Floats, level: float = LEVEL) -> Interval | None:
    """mean(ours) / mean(base) of paired values, both of shape (n,), n ≥ 2, with Fieller's interval.

    Fieller (1954), "Some problems in interval estimation": all ratios r for which the mean of ours - r·base is not
    significantly different from 0. None where that set is unbounded: the base scatters too much to divide by it.
    """
    n = len(ours)
    x, y = float(np.mean(base)), float(np.mean(ours))
    (syy, sxy), (_, sxx) = np.cov(ours, base, ddof=1) / n
    t2 = _t(n, level) ** 2
    a, b, c = x * x - t2 * sxx, x * y - t2 * sxy, y * y - t2 * syy
    if a <= 0:
        return None
    root = math.sqrt(max(b * b - a * c, 0.0))
    return Interval(float(y / x), float((b - root) / a), float((b + root) / a))


def _t(n: int, level: float) -> float:
    return float(stats.t.ppf((1 + level) / 2, n - 1))


def change_point(values: Floats, level: float = 0.01) -> int:
    """The column, 1 to n - 1, from which on the rows of `values`, shape (m, n), all finite, lie elsewhere than before;
    0 where there is none.

    One step at the same place in all rows, by least squares on rows less their own means. Hawkins (1977), "Testing a
    sequence of observations for a shift in location": the largest of n - 1 values of t, here with m·(n - 1) - 1 degrees
    of freedom, is held against Bonferroni's bound, so that where there is no step one is found in at most `level` of
    all cases.
    """
    m, n = values.shape
    df = m * (n - 1) - 1
    if df < 1:
        return 0
    centred = values - values.mean(axis=1, keepdims=True)
    total = float((centred**2).sum())
    if total < 1e-18:  # nothing but rounding
        return 0
    before = np.arange(1, n)
    explained = np.cumsum(centred.sum(axis=0))[:-1] ** 2 * n / (m * before * (n - before))
    best = int(np.argmax(explained))
    rest = total - float(explained[best])
    t = math.sqrt(float(explained[best]) * df / rest) if rest > 0 else math.inf
    return int(before[best]) if 2 * float(stats.t.sf(t, df)) * (n - 1) < level else 0
