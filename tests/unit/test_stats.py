"""The statistics against published values, against simulation, and against simple sums."""

import math

import numpy as np
import pytest
from scipy import stats

from loadtest import _stats


@pytest.mark.parametrize(("q", "n"), [(0.9, 64), (0.95, 130), (0.99, 662), (0.999, 6636), (0.9999, 66381)])
def test_samples_needed_as_mlperf_publishes_them(q: float, n: int) -> None:
    assert _stats.samples_needed(q) == n


def test_samples_needed_is_the_first_count_that_suffices() -> None:
    n = _stats.samples_needed(0.5)
    assert stats.binom.cdf(1, n, 0.5) <= 0.01 < stats.binom.cdf(1, n - 1, 0.5)


def test_quantiles_are_values_that_occurred() -> None:
    values = np.random.default_rng(1).permutation(np.arange(1.0, 101.0))
    assert _stats.quantiles(values, [0.5, 0.99, 1.0]) == [50.0, 99.0, 100.0]
    assert _stats.quantiles(np.array([7.0]), [0.01, 0.5, 0.999]) == [7.0, 7.0, 7.0]


@pytest.mark.parametrize("n", [1, 2, 11, 64, 999, 1000, 1001])
def test_quantiles_agree_with_numpys_inverse_of_the_distribution(n: int) -> None:
    values = np.random.default_rng(n).lognormal(size=n)
    qs = [0.5, 0.9, 0.99, 0.999]
    assert _stats.quantiles(values, qs) == [float(np.quantile(values, q, method="inverted_cdf")) for q in qs]


def test_failed_requests_make_a_quantile_infinite_or_leave_it_alone() -> None:
    values = np.append(np.arange(1.0, 100.0), math.inf)  # 99 answered, 1 failed
    assert _stats.quantiles(values, [0.5, 0.99, 0.999]) == [50.0, 99.0, math.inf]


def test_the_t_interval_is_scipys() -> None:
    values = np.array([1.0, 2.0, 4.0, 8.0])
    wanted = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    assert _stats.mean_interval(values) == pytest.approx((values.mean(), *wanted))


def test_a_geometric_ratio_is_symmetric() -> None:
    differences = np.log([1.1, 1.2, 1.15, 1.05])
    forth, back = _stats.geometric_ratio(differences), _stats.geometric_ratio(-differences)
    assert forth.estimate == pytest.approx((1.1 * 1.2 * 1.15 * 1.05) ** 0.25)
    assert (back.estimate, back.low, back.high) == pytest.approx((1 / forth.estimate, 1 / forth.high, 1 / forth.low))


def test_the_paired_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    """What drifts alike in both targets of a round does not widen the interval, nor does it make it miss."""
    chance = np.random.default_rng(3)
    held, widths = 0, []
    for _ in range(2000):
        drift = np.cumsum(chance.normal(0, 0.3, 8))
        ours, base = drift + math.log(1.1) + chance.normal(0, 0.02, 8), drift + chance.normal(0, 0.02, 8)
        found = _stats.geometric_ratio(ours - base)
        held += found.low <= 1.1 <= found.high
        widths.append(found.high - found.low)
    assert 0.935 < held / 2000 < 0.965 and np.median(widths) < 0.07


def test_fiellers_interval_holds_the_true_ratio_of_means_as_often_as_it_says() -> None:
    chance = np.random.default_rng(7)
    held = 0
    for _ in range(2000):
        base = chance.normal(10, 1, 8)
        ours = 1.3 * base + chance.normal(0, 0.5, 8)
        found = _stats.ratio_of_means(ours, base)
        held += found is not None and found.low <= 1.3 <= found.high
    assert 0.935 < held / 2000 < 0.965


def test_fiellers_interval_of_an_exact_multiple_is_a_point() -> None:
    base = np.array([10.0, 11.0, 12.0])
    assert _stats.ratio_of_means(2.5 * base, base) == pytest.approx((2.5, 2.5, 2.5))


def test_a_base_that_scatters_around_nothing_gives_no_interval() -> None:
    assert _stats.ratio_of_means(np.array([1.0, 2.0, 3.0]), np.array([1.0, 0.01, -0.9])) is None
