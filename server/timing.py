"""Where a request's time goes: stamps of one clock, and the stages between them."""

from typing import NamedTuple

STAGES = ("read", "parse", "queue", "batch", "compute", "serialise")
_HEADER = ", ".join(f"{stage};dur=%.6f" for stage in (*STAGES, "total"))


class Stages(NamedTuple):
    """Nanoseconds. `queue` is all waiting for a turn, before the model and after it; the six parts sum to `total`."""

    read: int
    parse: int
    queue: int
    batch: int
    compute: int
    serialise: int
    total: int


def stages(
    arrived: int, read: int, parsed: int, started: int, joined: int, computed: int, resumed: int, serialised: int
) -> Stages:
    """From time.monotonic_ns at: the first byte in user space, the whole body in the handler's hands, its tensors, the
    start of the batch, its inputs joined, its outputs, the handler's turn to go on, the answer's body."""
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
    read, parse, queue, batch, compute, serialise, total = of
    return _HEADER % (read / 1e6, parse / 1e6, queue / 1e6, batch / 1e6, compute / 1e6, serialise / 1e6, total / 1e6)
