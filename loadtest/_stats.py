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
MIN_PAIRS = 3  # with two, the t quantile is 12.7: an interval that tells nothing
MIN_BLOCK = {0.5: 11, 0.99: 500}  # requests that a block must hold for a quantile of its own


class Interval(NamedTuple):
    estimate: float
    low: float
    high: float


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


def geometric_ratio(differences: Floats, level: float = LEVEL) -> Interval:
    """The ratio exp(mean) from log differences, shape (rounds,), rounds ≥ 2, with the t interval carried over.

    Each difference pairs two targets within one round, so that what drifts slowly cancels.
    """
    return Interval(*(math.exp(value) for value in mean_interval(differences, level)))


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
