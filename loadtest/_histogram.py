"""Counts of times in log-linear buckets, which can be added up wherever they were counted. Pure functions.

Up to 2,048 ns a bucket is one nanosecond, above that each power of two has 1,024 of them (as in HdrHistogram), so a
bucket's middle is at most 0.05 % away from any value in it. A time is represented by that middle.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BITS = 10
LONGEST_NS = 2**53  # 104 days; what is longer counts as this, and so does what never came


def middles_ns(elapsed_ns: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each time, of any shape, as the middle of its bucket; negative ones count as 0."""
    clipped = np.clip(elapsed_ns, 0, LONGEST_NS)
    _, exponent = np.frexp(clipped.astype(np.float64))  # exact below 2**53
    shift = np.maximum(exponent.astype(np.int64) - _BITS - 1, 0)
    low = clipped >> shift << shift
    middles: NDArray[np.float64] = np.minimum(low + ((1 << shift) - 1) / 2, LONGEST_NS)
    return middles


def counts(times: NDArray[Any]) -> list[tuple[Any, int]]:
    """The distinct values and how often each is there, ascending."""
    found, numbers = np.unique(times, return_counts=True)
    return list(zip(found.tolist(), numbers.tolist(), strict=True))


def quantile(counted: Mapping[float, int], q: float) -> float:
    """The value of nearest rank: the least one that at least a share `q` of all does not exceed. NaN for no values."""
    total = sum(counted.values())
    rank, seen = max(math.ceil(q * total - 1e-9), 1), 0
    for value in sorted(counted):
        seen += counted[value]
        if seen >= rank:
            return value
    return math.nan
