"""Loads by name, and when their requests are meant to start: seeded schedules, made beforehand as arrays. Pure.

`closed-N`: N connections, each sends its next request when the last one was answered. `single`: one such connection
(MLPerf's SingleStream). `constant-R` and `poisson-R`: R requests per second, whether or not answers come. `offline`:
all requests at once (MLPerf's Offline).
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from images.errors import UsageError

SCENARIOS = ("closed", "constant", "poisson", "single", "offline")
PIECE = 4096  # arrivals made at a time: well under a millisecond of work
FOREVER_NS = 1 << 62

Offsets = NDArray[np.int64]  # ns from the begin of the load, ascending, shape (n,)
_NAME = re.compile(r"closed-([1-9][0-9]{0,3})|(constant|poisson)-([0-9]{1,6}(?:\.[0-9]{1,3})?)|single|offline")


class Load(NamedTuple):
    """`connections` is 0 where the name does not say how many; `rate` is requests per second, 0 where there is none."""

    name: str
    scenario: str
    connections: int = 0
    rate: float = 0.0

    @property
    def open(self) -> bool:
        """Whether requests have an intended start that does not wait for answers."""
        return self.scenario in ("constant", "poisson", "offline")


def parse(name: str) -> Load:
    """Raises UsageError for what is no load's name."""
    found = _NAME.fullmatch(name)
    if found is None or (found[3] and not float(found[3])):
        raise UsageError(f"unknown load {name!r}; wanted closed-N, constant-RATE, poisson-RATE, single or offline")
    if found[1]:
        return Load(name, "closed", connections=int(found[1]))
    if found[2]:
        return Load(name, found[2], rate=float(found[3]))
    return Load(name, name, connections=1 if name == "single" else 0)


def pieces(load: Load, seed: int | tuple[int, ...], number: int = 0) -> Iterator[Offsets]:
    """The schedule in pieces of PIECE arrivals: endless, but for `offline`, which has `number` arrivals, all at 0.

    One seed is one schedule, however much of it is used.
    """
    if load.scenario == "offline":
        yield np.zeros(number, dtype=np.int64)
        return
    drawn = np.random.default_rng(seed)
    gap_ns, at_ns, count = 1e9 / load.rate, 0.0, 0
    while True:
        if load.scenario == "constant":
            offsets = (count + np.arange(PIECE)) * gap_ns
        else:
            offsets = at_ns + np.cumsum(drawn.exponential(gap_ns, PIECE))
            at_ns = float(offsets[-1])
        count += PIECE
        yield np.rint(offsets).astype(np.int64)


class Schedule:
    """One worker's arrivals, walked through by the engine: `next_ns` is the next one, FOREVER_NS after the last.

    Of all arrivals, worker w of W takes w, w + W, …. `before_ns` counts from the begin, as offsets do: no arrival at or
    after it. Not `timed`: all at once, so that lateness means nothing.
    """

    def __init__(
        self,
        made: Iterator[Offsets],
        start_ns: int,
        *,
        worker: int = 0,
        workers: int = 1,
        before_ns: int = FOREVER_NS,
        timed: bool = True,
    ) -> None:
        self._made = made
        self.timed = timed
        self._start_ns = start_ns
        self._before_ns = before_ns
        self._workers = workers
        self._skip = worker  # arrivals of others before the next one of ours
        self._index = worker - workers
        self._waiting: list[int] = []  # descending
        self.next_ns = FOREVER_NS
        self._fill()

    def pop(self) -> tuple[int, int]:
        """The next arrival: when, and its number among the arrivals of all workers."""
        intended_ns = self._waiting.pop()
        self._index += self._workers
        if self._waiting:
            self.next_ns = self._waiting[-1]
        else:
            self._fill()
        return intended_ns, self._index

    def end(self) -> None:
        """Nothing more arrives."""
        self._waiting, self.next_ns, self._before_ns = [], FOREVER_NS, 0

    def _fill(self) -> None:
        self.next_ns = FOREVER_NS
        for offsets in self._made:
            ours = offsets[self._skip :: self._workers]
            self._skip = (self._skip - len(offsets)) % self._workers
            in_time = ours[ours < self._before_ns]
            self._waiting = (in_time[::-1] + self._start_ns).tolist()
            if self._waiting:
                self.next_ns = self._waiting[-1]
            if self._waiting or len(in_time) < len(ours):
                return
