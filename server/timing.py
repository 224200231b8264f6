"""Where a request's time goes: stamps of one clock, and the stages between them."""

from typing import NamedTuple

STAGES = ("read", "parse", "queue", "batch", "compute", "serialise")
_HEADER = ", ".join(f"{stage};dur=%.6f" for stage in (*STAGES, "total"))


class Stamps(NamedTuple):
    """time.monotonic_ns at: the first byte in user space, the whole body in the handler's hands, its tensors, the start
    of the batch, its inputs joined, its outputs, the handler's turn to go on, the answer's body."""

    arrived: int
    read: int
    parsed: int
    started: int
    joined: int
    computed: int
    resumed: int
    serialised: int


class Stages(NamedTuple):
    """Nanoseconds. `queue` is all waiting for a turn, before the model and after it; the six parts sum to `total`."""

    read: int
    parse: int
    queue: int
    batch: int
    compute: int
    serialise: int
    total: int


def stages(at: Stamps) -> Stages:
    arrived, read, parsed, started, joined, computed, resumed, serialised = at
    return Stages(
        read - arrived,
        parsed - read,
        started - parsed + resumed - computed,
        joined - started,
        computed - joined,
        serialised - resumed,
        serialised - arrived,
    )


def header(of: Stages) -> str:
    """The value of Server-Timing, in milliseconds (https://www.w3.org/TR/server-timing/)."""
    return _HEADER % tuple(ns / 1e6 for ns in of)
