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
    assert _stats.interval(_stats.location(values)) == pytest.approx((values.mean(), *wanted))


def test_the_interval_over_starts_holds_the_truth_as_often_as_it_says() -> None:
    chance = np.random.default_rng(3)
    found = [_stats.interval(_stats.location(chance.normal(0.1, 0.02, 8))) for _ in range(2000)]
    assert 0.935 < np.mean([one.low <= 0.1 <= one.high for one in found]) < 0.965


def test_the_trimmed_mean_is_scipys_and_its_interval_holds_the_truth_in_spite_of_stalls() -> None:
    chance = np.random.default_rng(4)
    held, plain = 0, 0
    for _ in range(2000):
        values = chance.normal(0.1, 0.02, 20)
        values[chance.random(20) < 0.04] = 3.0  # a stall of the machine: no property of the target
        assert _stats.trimmed(values) == pytest.approx(stats.trim_mean(values, 0.2))
        found = _stats.interval(_stats.trimmed_location(values))
        held += found.low <= 0.1 <= found.high
        plain += abs(float(np.mean(values)) - 0.1) < 0.01
    assert 0.93 < held / 2000 < 0.975 and plain < 1500


def test_a_trimmed_mean_cuts_failures_away_by_their_rank_and_no_more_of_them_than_its_share() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, math.inf])
    assert _stats.trimmed(values) == 3.0 and math.isfinite(_stats.trimmed_location(values).se)
    assert _stats.trimmed(np.array([1.0, 2.0, 3.0, math.inf, math.inf])) == math.inf
    assert _stats.trimmed(np.array([1.0, math.inf])) == math.inf
    assert _stats.trimmed(np.array([1.0, 3.0, math.inf])) == 3.0 == _stats.trimmed(np.array([1.0, 2.0, 4.0, math.inf]))


def test_p_values_are_scipys() -> None:
    values = np.random.default_rng(5).normal(0.3, 1, 12)
    assert _stats.p_value(_stats.location(values)) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    ours, theirs = values, np.random.default_rng(6).normal(0, 3, 7)
    welch = stats.ttest_ind(ours, theirs, equal_var=False)
    at = _stats.difference(_stats.location(ours), _stats.location(theirs))
    assert _stats.p_value(at) == pytest.approx(welch.pvalue)
    assert tuple(_stats.interval(at))[1:] == pytest.approx(tuple(welch.confidence_interval(0.95)))
    assert _stats.p_value(_stats.Location(0.0, 0.0, 4)) == 1.0 and _stats.p_value(_stats.Location(0.1, 0.0, 4)) == 0.0


def test_holms_adjusted_values_are_those_of_the_books_example() -> None:
    assert _stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert _stats.holm([0.9, 0.8]) == [1.0, 1.0] and _stats.holm([]) == []


def test_as_many_units_as_are_needed_and_no_more() -> None:
    n = _stats.units_needed(0.013, 0.01)
    assert n is not None and n > 3
    for count, inside in ((n, True), (n - 1, False)):
        assert (stats.t.ppf(0.975, count - 1) * 0.013 / math.sqrt(count) < 0.01) == inside
    assert (_stats.units_needed(0.013, 0.01, tests=4) or 0) > n
    assert _stats.units_needed(0.0, 0.01) == 3 and _stats.units_needed(1.0, 0.001) is None


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


def test_a_change_point_is_where_the_level_changes_in_all_rows() -> None:
    steps = np.array([5.0, 5.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    chance = np.random.default_rng(8)
    rows = steps + chance.normal(0, 0.1, (3, 7)) + np.array([[0.0], [100.0], [-7.0]])  # rows have levels of their own
    assert _stats.change_point(rows) == 2 and _stats.change_point(rows[:, ::-1]) == 5
    assert _stats.change_point(rows[:, 2:]) == 0
    assert _stats.change_point(steps[None]) == 2  # without any noise
    mirrored = np.concatenate([rows, -rows])  # up in some, down in others: no step that all have
    assert _stats.change_point(mirrored) == 0


@pytest.mark.parametrize("shape", [(0, 5), (1, 0), (1, 1), (1, 2), (5, 1)])
def test_too_few_values_have_no_change_point_and_constant_ones_neither(shape: tuple[int, int]) -> None:
    assert _stats.change_point(np.random.default_rng(9).random(shape)) == 0
    assert _stats.change_point(np.full((3, 10), 0.1)) == 0 == _stats.change_point(0.1 + np.eye(10)[:2] * 1e-12)


def test_the_step_is_tested_by_scipys_t() -> None:
    values = np.array([3.1, 2.9, 3.3, 1.0, 1.4, 1.1, 0.9])
    t = stats.ttest_ind(values[:3], values[3:])
    bound = t.pvalue * 6
    assert (
        _stats.change_point(values[None], bound * 1.001) == 3 and _stats.change_point(values[None], bound * 0.999) == 0
    )


@pytest.mark.parametrize("shape", [(1, 6), (1, 20), (10, 5)])
def test_where_nothing_changes_a_change_point_is_found_no_more_often_than_it_says(shape: tuple[int, int]) -> None:
    chance = np.random.default_rng(10)
    found = np.mean([_stats.change_point(chance.normal(size=shape), 0.05) > 0 for _ in range(4000)])
    assert 0.02 < found < 0.06
