"""The search for the highest rate that holds a bound, on servers whose peak is known."""

import math
from pathlib import Path

import numpy as np
import pytest

from images.errors import UsageError
from loadtest import _bound, _peak
from loadtest._peak import CONFIRM, WIDTH, Peak, Probe
from loadtest._plan import Plan
from loadtest._report import markdown
from loadtest._summary import summarise
from tests.unit.run_folder import make, target


@pytest.mark.parametrize("peak", [1.5, 7.0, 99.0, 100.0, 101.0, 850.0, 12_345.0, 90_000.0])
def test_a_known_peak_lies_in_the_bracket_and_its_lower_end_is_confirmed(peak: float) -> None:
    tried: list[tuple[float, float]] = []

    def attempt(rate: float, times: float) -> Probe:
        tried.append((rate, times))
        return Probe(rate <= peak)

    found = _peak.search(attempt)
    assert found.low_rps is not None and found.high_rps is not None
    assert found.low_rps <= peak <= found.high_rps <= found.low_rps * WIDTH
    assert tried[-1] == (found.low_rps, CONFIRM)
    assert len(tried) < 25


def test_a_rate_that_only_a_short_load_held_is_not_the_peak() -> None:
    found = _peak.search(lambda rate, times: Probe(rate <= (1000 if times == 1 else 900)))
    assert found.low_rps is not None and found.low_rps <= 900 <= found.high_rps * WIDTH  # type: ignore[operator]


def test_a_client_that_cannot_keep_up_ends_the_search_with_what_held() -> None:
    found = _peak.search(lambda rate, times: Probe(rate < 5000, limited=rate > 5000))
    assert found == Peak(3200.0, None, "client-limited at 6400/s")


def test_no_rate_holds() -> None:
    found = _peak.search(lambda rate, times: Probe(False))
    assert found.low_rps is None and "not even" in found.reason


def test_a_bound_that_no_load_breaks() -> None:
    found = _peak.search(lambda rate, times: Probe(True))
    assert found.low_rps is not None and found.high_rps is None and "most that is tried" in found.reason


def test_noise_near_the_peak_ends() -> None:
    chance = np.random.default_rng(1)

    def attempt(rate: float, times: float) -> Probe:
        return Probe(bool(rate * chance.normal(1, 0.1) <= 500))

    for _ in range(50):
        found = _peak.search(attempt)
        assert found.low_rps is None or 300 < found.low_rps < 700


@pytest.mark.parametrize(
    ("text", "q", "limit_ns"),
    [("p99<=5ms", 0.99, 5e6), ("p50 <= 200us", 0.5, 2e5), ("p99.9<=1.5s", 0.999, 1.5e9), ("p90<=80µs", 0.9, 8e4)],
)
def test_bounds(text: str, q: float, limit_ns: float) -> None:
    found = _bound.parse(text)
    assert math.isclose(found.q, q) and math.isclose(found.limit_ns, limit_ns)


@pytest.mark.parametrize(
    "text", ["", "p99", "p99<5ms", "p100<=5ms", "p0<=5ms", "p99<=0ms", "p99<=5", "mean<=5ms", "p99<=-1ms"]
)
def test_what_is_no_bound_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="such as p99<=5ms"):
        _bound.parse(text)


def test_failures_are_infinite() -> None:
    bound = _bound.parse("p99<=5ms")
    good = np.full(990, 1e6)
    assert _bound.holds(np.append(good, np.full(10, np.inf)), bound)
    assert not _bound.holds(np.append(good, np.full(11, np.inf)), bound)
    assert not _bound.holds(np.array([]), bound)


def test_a_probe_lasts_as_long_as_its_quantile_needs() -> None:
    plan = _peak.probe(Plan(), _bound.parse("p99<=5ms"), "knn", 100.0, 1)
    assert plan.loads == ("poisson-100.000",) and plan.models == ("knn",)
    assert plan.seconds == plan.block_s == math.ceil(662 / 100)
    assert _peak.probe(Plan(), _bound.parse("p99<=5ms"), "knn", 50_000.0, 1).seconds == _peak.LEAST_S


def test_peaks_in_the_summary_over_starts_by_one_search_and_with_an_open_end(tmp_path: Path) -> None:
    make(tmp_path, [target("a"), target("b"), target("c")])
    lines = [f"{n},a,knn,p99<=5ms,{rate},{rate},{rate * 1.05}," for n, rate in enumerate((900.0, 1000.0, 1100.0))]
    lines += ["0,b,knn,p99<=5ms,500.0,500.0,520.0,", "0,c,knn,p99<=5ms,200.0,200.0,,client-limited at 400/s"]
    (tmp_path / "peak.csv").write_text("\n".join([",".join(_peak.COLUMNS), *lines]) + "\n")
    a, b, c = summarise(tmp_path).peaks
    assert a.rate_rps is not None and a.rate_rps.low is not None and a.rate_rps.high is not None
    assert a.rate_rps.low < 900 < a.rate_rps.estimate < 1100 < a.rate_rps.high  # t over three starts is wide
    assert b.rate_rps is not None and (b.rate_rps.low, b.rate_rps.high) == (500.0, 520.0)
    assert c.rate_rps is not None and c.rate_rps.high is None and c.reason == "client-limited at 400/s"
    assert "200" in markdown(summarise(tmp_path)) and "client-limited at 400/s" in markdown(summarise(tmp_path))
