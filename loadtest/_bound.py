"""A bound on a quantile of latency, such as p99<=5ms. Pure."""

import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from images.errors import UsageError
from loadtest import _stats

UNITS_NS = {"us": 1e3, "µs": 1e3, "ms": 1e6, "s": 1e9}
_BOUND = re.compile(r"p(\d{1,2}(?:\.\d+)?)\s*<=\s*(\d+(?:\.\d+)?)\s*(us|µs|ms|s)")


class Bound(NamedTuple):
    """Quantile `q` of the latencies, failed requests as +∞ among them, is at most `limit_ns`."""

    text: str
    q: float
    limit_ns: float


def parse(text: str) -> Bound:
    """Raises UsageError for what is no bound."""
    found = _BOUND.fullmatch(text.strip())
    limit_ns = float(found[2]) * UNITS_NS[found[3]] if found else 0.0
    if found is None or limit_ns == 0 or not 0 < float(found[1]) < 100:
        raise UsageError(f"the bound {text!r} cannot be read; wanted a quantile and a time, such as p99<=5ms")
    return Bound(f"p{found[1]}<={found[2]}{found[3]}", float(found[1]) / 100, limit_ns)


def holds(latencies_ns: NDArray[np.float64], bound: Bound) -> bool:
    """latencies_ns: shape (n,), +inf for what failed."""
    return len(latencies_ns) > 0 and _stats.quantiles(latencies_ns, [bound.q])[0] <= bound.limit_ns
