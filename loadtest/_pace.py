"""How well the client kept up with what it was to send; where it did not, no figure is the server's alone. Pure."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loadtest import _histogram

LATE_NS = 1_000_000  # more than one in ten arrivals later than this: the client did not keep up,
BUSY = 0.95  # nor did it where it used so much of one core


class Pace(NamedTuple):
    """What one engine noted. `late_ns`, (n,): by how much later than intended it woke up for each arrival. `queued`
    arrivals found no free connection; `unanswered` requests were under way, or waiting, when the load was cut off.
    Connections that broke, or that the server closed, came back `reconnects` times, after `gap_ns` in total. The wall
    clock was set `clock_steps` times."""

    late_ns: NDArray[np.int64]
    queued: int
    unanswered: int
    reconnects: int
    gap_ns: int
    clock_steps: int


class Lateness(NamedTuple):
    """Quantiles; all 0 where nothing had an intended start."""

    p50_ns: int = 0
    p99_ns: int = 0
    max_ns: int = 0


@dataclass
class Effort:
    """What one Locust process, or several together, did for a load. `late` counts ns; `limited` of `processes` could
    not keep up."""

    late: dict[float, int] = field(default_factory=dict)
    queued: int = 0
    unanswered: int = 0
    reconnects: int = 0
    gap_ns: int = 0
    clock_steps: int = 0
    cpu_ns: int = 0
    wall_ns: int = 0
    processes: int = 0
    limited: int = 0

    def add(self, pace: Pace) -> None:
        for value, n in _histogram.counts(_histogram.middles_ns(pace.late_ns)):
            self.late[value] = self.late.get(value, 0) + n
        self.queued += pace.queued
        self.unanswered += pace.unanswered
        self.reconnects += pace.reconnects
        self.gap_ns += pace.gap_ns
        self.clock_steps += pace.clock_steps

    def end(self, cpu_ns: int, wall_ns: int) -> None:
        """Of one process: the CPU time it used, in what time."""
        self.cpu_ns, self.wall_ns, self.processes = cpu_ns, wall_ns, 1
        self.limited = int(
            cpu_ns > BUSY * wall_ns or (bool(self.late) and _histogram.quantile(self.late, 0.9) > LATE_NS)
        )

    @property
    def lateness(self) -> Lateness:
        if not self.late:
            return Lateness()
        return Lateness(*(round(_histogram.quantile(self.late, q)) for q in (0.5, 0.99, 1.0)))

    def packed(self) -> dict[str, Any]:
        """For a message to the master."""
        return asdict(self) | {"late": list(self.late.items())}

    def merge(self, packed: Mapping[str, Any]) -> None:
        """Add another process's."""
        for value, n in packed["late"]:
            self.late[value] = self.late.get(value, 0) + n
        for name in set(packed) - {"late"}:
            setattr(self, name, getattr(self, name) + packed[name])

    def words(self) -> list[str]:
        """What a reader has to know of the client, a line each."""
        lines = []
        if self.late:
            p50, p99, most = (_us(ns) for ns in self.lateness)
            lines.append(
                f"arrivals: {sum(self.late.values())}, woken for late by p50 {p50}, p99 {p99}, at most {most}; "
                f"{self.queued} waited for a free connection"
            )
        if self.limited:
            which = "the client" if self.processes == 1 else f"{self.limited} of {self.processes} clients"
            lines.append(
                f"client-limited: {which} could not keep up (CPU {self.cpu_ns / max(self.wall_ns, 1):.0%} of a core): "
                "the figures are the client's own as much as the server's"
            )
        if self.reconnects:
            lines.append(
                f"gaps: connections ended and came back {self.reconnects} times, "
                f"{self.gap_ns / 1e9:.3g} s without one in all"
            )
        if self.unanswered:
            lines.append(
                f"unanswered: {self.unanswered} requests were under way or waiting at the end, and are in no figure"
            )
        if self.clock_steps:
            lines.append(
                f"clock: the wall clock was set {self.clock_steps} times; times are monotonic, "
                "only the kernel's stamps at that moment are left out"
            )
        return lines


def _us(ns: int) -> str:
    us = ns / 1000
    return f"{us:.3g} µs" if us < 1000 else f"{us:,.0f} µs"
