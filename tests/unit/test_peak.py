"""The search for the highest rate, against targets whose truth is known."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from images.errors import UsageError
from loadtest import _peak
from loadtest._peak import Bound, Found, Search, Trial, holds, parse

P99 = Bound(0.99, 5e6)


def search(outcome: Callable[[Trial], tuple[bool, bool]]) -> tuple[Found, list[Trial]]:
    made, trials = Search(P99), []
    while made.trial is not None:
        trials.append(made.trial)
        made.add(*outcome(made.trial))
    return made.found(), trials


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("p99<=5ms", P99),
        ("p50 <= 300us", Bound(0.5, 3e5)),
        ("p99.9<=1.5s", Bound(0.999, 1.5e9)),
        ("p90<=2µs", Bound(0.9, 2e3)),
    ],
)
def test_bounds_in_words(text: str, bound: Bound) -> None:
    assert parse(text) == pytest.approx(bound)


@pytest.mark.parametrize("text", ["", "p99", "p98<=5ms", "p99<5ms", "p99<=5", "p99<=0ms", "mean<=5ms", "p99<=-1ms"])
def test_what_is_no_bound(text: str) -> None:
    with pytest.raises(UsageError, match="as p99<=5ms"):
        parse(text)


@pytest.mark.parametrize("true", [1.5, 37, 99, 101, 1234, 56_789])
def test_a_clear_limit_is_found_and_confirmed(true: float) -> None:
    found, trials = search(lambda trial: (trial.rate_rps <= true, False))
    assert found.rate_rps <= true < found.high_rps and found.high_rps / found.rate_rps <= 1.06
    assert found.reason == "" and len(trials) < 25
    assert trials[-1].confirming and trials[-1].rate_rps == found.rate_rps
    for trial in trials:  # long enough for the quantile, but where that takes too long
        assert trial.seconds >= (10 if trial.confirming else 5)
        assert trial.seconds * trial.rate_rps >= min(662, 120 * trial.rate_rps)


def test_noisy_trials_end_in_a_rate_that_was_confirmed() -> None:
    for seed in range(200):
        chance = np.random.default_rng(seed)

        def noisy(trial: Trial, chance: np.random.Generator = chance) -> tuple[bool, bool]:
            return bool(trial.rate_rps * chance.lognormal(0, 0.1) <= 1000), False

        found, trials = search(noisy)
        assert len(trials) <= _peak.TRIALS
        if not math.isnan(found.rate_rps):
            assert 650 < found.rate_rps < 1400 and found.rate_rps <= found.high_rps
            last = [trial for trial in trials if trial.confirming][-1]
            assert last.rate_rps == found.rate_rps


def test_ends() -> None:
    found, trials = search(lambda trial: (False, False))
    assert math.isnan(found.rate_rps) and found.high_rps == _peak.LEAST_RPS and "no rate was confirmed" in found.reason
    assert len(trials) < 12
    found, trials = search(lambda trial: (True, False))
    assert found.rate_rps == _peak.MOST_RPS and math.isnan(found.high_rps) and "highest rate" in found.reason


def test_a_client_that_does_not_keep_up_bounds_the_search_and_is_named() -> None:
    found, _ = search(lambda trial: (trial.rate_rps <= 5000, trial.rate_rps > 2000))
    assert 4700 < found.rate_rps <= 5000 and "client-limited at" in found.reason
    found, _ = search(lambda trial: (trial.rate_rps <= 2000, trial.rate_rps > 9000))
    assert 1900 < found.rate_rps <= 2000 and not found.reason  # the end that matters was the target's


def test_failed_requests_are_infinitely_slow() -> None:
    latency = np.full(1000, 1e6)
    assert holds(P99, latency)
    latency[:10] = np.inf
    assert holds(P99, latency)
    latency[:11] = np.inf
    assert not holds(P99, latency)
    assert not holds(P99, np.empty(0))
