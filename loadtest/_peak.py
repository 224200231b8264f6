"""The highest rate at which a target still holds a bound such as p99<=5ms: the search, as pure logic.

Bracket by doubling or halving, bisect on a log scale until the bracket is narrow, then confirm the lower end with a
longer trial. Trials on a noisy machine contradict each other: a rate that does not hold when it is confirmed becomes
the new upper end, and the search goes on below it. A failed request counts as +∞.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

from images.errors import UsageError
from loadtest._stats import quantiles, samples_needed

FIRST_RPS = 100.0
LEAST_RPS, MOST_RPS = 1.0, 200_000.0
NARROW = 1.05  # upper over lower end
TRIAL_S, CONFIRM_S = 5.0, 10.0  # queues have a memory: nothing shorter says whether a rate holds
LONGEST_S = 120.0
TRIALS = 30

_BOUND = re.compile(r"p(50|90|95|99|99\.9|99\.99)<=([0-9]+(?:\.[0-9]+)?)(us|µs|ms|s)")
_UNIT_NS = {"us": 1e3, "µs": 1e3, "ms": 1e6, "s": 1e9}


class Bound(NamedTuple):
    """At most `limit_ns` at quantile `q`."""

    q: float
    limit_ns: float


def parse(text: str) -> Bound:
    """Raises UsageError for anything but p99<=5ms and the like."""
    found = _BOUND.fullmatch(text.replace(" ", ""))
    if found is None or not float(found[2]):
        raise UsageError(f"the bound {text!r} cannot be read; wanted p50, p90, p95, p99, p99.9 or p99.99, as p99<=5ms")
    return Bound(float(found[1]) / 100, float(found[2]) * _UNIT_NS[found[3]])


def models(primary: Sequence[str], served: Sequence[str]) -> list[str]:
    """Those whose peak is searched: of the primary cells, MODEL:LOAD each, or the first that is served."""
    return list(dict.fromkeys(cell.partition(":")[0] for cell in primary)) or list(served[:1])


def holds(bound: Bound, latency_ns: NDArray[Any]) -> bool:
    """Whether requests, the failed ones as +inf, hold the bound; their quantile is of nearest rank."""
    if not len(latency_ns):
        return False
    return quantiles(latency_ns, [bound.q])[0] <= bound.limit_ns


class Trial(NamedTuple):
    """`confirming`: the lower end of a narrow bracket, once more and for longer."""

    rate_rps: float
    seconds: float
    confirming: bool


class Found(NamedTuple):
    """`rate_rps`: the highest rate that was confirmed, NaN where none was; the first that did not hold lies at
    `high_rps`. `reason` says what else there is to know."""

    rate_rps: float
    low_rps: float
    high_rps: float
    reason: str


class Search:
    """`trial` is what to try next, None when it is over; then `found` has the result."""

    def __init__(self, bound: Bound) -> None:
        self._needed = samples_needed(bound.q)
        self._low, self._high = 0.0, math.inf
        self._tried = 0
        self._confirmed = False
        self._limited = 0.0
        self.trial: Trial | None = None
        self._go_to(FIRST_RPS)

    def add(self, held: bool, client_limited: bool = False) -> None:
        """The outcome of `trial`. A bound that holds though the client could not keep up holds; one that does not may
        be the client's doing."""
        assert self.trial is not None
        rate, confirming = self.trial.rate_rps, self.trial.confirming
        self._tried += 1
        if held:
            self._low = max(self._low, rate)
            self._confirmed = confirming
        else:
            self._limited = rate if client_limited else self._limited
            self._high = min(self._high, rate)
            if self._low >= rate:  # it held in a shorter trial
                self._low = 0.0
        self._next()

    def found(self) -> Found:
        reasons = []
        if not self._confirmed:
            reasons.append(f"no rate was confirmed in {self._tried} trials")
        if self._limited and self._high >= self._limited:
            reasons.append(f"client-limited at {self._limited:g}/s: the target may hold more")
        if self._confirmed and math.isinf(self._high):
            reasons.append(f"it held the highest rate that is tried, {MOST_RPS:g}/s")
        rate = self._low if self._confirmed else math.nan
        return Found(rate, rate, self._high if math.isfinite(self._high) else math.nan, "; ".join(reasons))

    def _next(self) -> None:
        low, high = self._low, self._high
        self.trial = None
        if self._tried >= TRIALS or (self._confirmed and (high <= low * NARROW or low >= MOST_RPS)):
            return
        if not low:
            if high > LEAST_RPS:
                self._go_to(max(high / 2, LEAST_RPS))
        elif math.isinf(high):
            self._go_to(min(low * 2, MOST_RPS), confirming=low >= MOST_RPS)
        elif high <= low * NARROW:
            self._go_to(low, confirming=True)
        else:
            self._go_to(math.sqrt(low * high))

    def _go_to(self, rate: float, confirming: bool = False) -> None:
        rate = float(f"{rate:.3g}") if not confirming else rate
        if rate in (self._low, self._high) and not confirming:  # rounded onto an end: as narrow as it gets
            rate, confirming = self._low, True
        seconds = max(CONFIRM_S if confirming else TRIAL_S, (2 if confirming else 1) * self._needed / rate)
        self.trial = Trial(rate, min(seconds, LONGEST_S), confirming)
