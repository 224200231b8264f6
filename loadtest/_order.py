"""In which order blocks go round the targets, so that drift hits all of them alike, and how long they are. Pure."""

import math
from collections.abc import Sequence

import numpy as np

from loadtest import _stats
from loadtest._arrivals import Load

LEAST_BLOCK_S, MOST_BLOCK_S = 0.2, 5.0  # short blocks see the least of a drift; longer ones leave too few quads
OPEN_BLOCK_S = 5.0  # of open arrivals: queues have a memory
RESERVE = 1.25  # a block that is slower than the calibration still holds its requests


def rounds(targets: Sequence[str], blocks: int, seed: Sequence[int]) -> list[tuple[str, ...]]:
    """`blocks` rounds, each naming every target once; an even number of rounds where there are several targets.

    Rounds come in pairs: an order, then its mirror, so that over a pair every target sits on average at the same
    time and a linear drift cancels. The orders of n pairs are a Williams design: every target takes every place, and
    follows every other equally often, so that what one leaves behind in caches hits all alike (E. J. Williams, 1949).
    Two targets give ABBA BAAB; more start from an order drawn by `seed`.
    """
    if len(targets) == 1:
        return [tuple(targets)] * blocks
    base = list(targets)
    if len(base) > 2:
        base = [base[i] for i in np.random.default_rng(list(seed)).permutation(len(base))]
    n = len(base)
    steps = [(place + 1) // 2 if place % 2 else (n - place // 2) % n for place in range(n)]  # 0, 1, n-1, 2, n-2, …
    found: list[tuple[str, ...]] = []
    for pair in range(math.ceil(blocks / 2)):
        order = tuple(base[(step + pair) % n] for step in steps)
        found += [order, order[::-1]]
    return found


def rounds_of(seconds: float, warmup_s: float, block_s: float, targets: int) -> tuple[int, int]:
    """How many of a cell's first rounds are warm-up, and how many there are in all: as few as make at least `warmup_s`
    and `seconds` per target, in whole quads where there are several targets. However long a block is, a quad (of one
    target: a block) is left after the warm-up."""
    unit = 2 if targets > 1 else 1

    def whole(wanted_s: float) -> int:
        return unit * math.ceil(wanted_s / (unit * block_s) - 1e-9)

    warmup = whole(warmup_s)
    return warmup, max(whole(seconds), warmup + unit)


def block_length(rate_rps: float, most_s: float = MOST_BLOCK_S) -> float:
    """Seconds in which there are, at `rate_rps` > 0, the requests that a block's own p99 wants, and a reserve;
    LEAST_BLOCK_S at least, `most_s` at most."""
    wanted = RESERVE * _stats.MIN_MEDIAN[0.99] / rate_rps
    return min(max(math.ceil(100 * wanted - 1e-9) / 100, LEAST_BLOCK_S), most_s)


def longest(seconds: float, quick: bool) -> float:
    """Of a block whose length is measured. `seconds` bound a cell of a quick run: they hold a quad of warm-up, and as
    many more as an interval wants."""
    return max(seconds / (2 + 2 * _stats.MIN_PAIRS), LEAST_BLOCK_S) if quick else MOST_BLOCK_S


def length_of(load: Load, block_s: float) -> float:
    """Seconds of a block under `load`: `block_s` where the plan gives one; 0 where it has to be measured first."""
    return block_s or (OPEN_BLOCK_S if load.open else 0.0)
