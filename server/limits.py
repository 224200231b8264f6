"""What the server grants at most: each limit is a flag with a default."""

import resource
from dataclasses import dataclass, field, fields, replace
from typing import Any

OWN_FILES = 64  # open files of the server that are no connections
BURST = 1024  # connections beyond the limit, until they have had their answer


def _limit(default: float, help: str, least: float = 0) -> Any:
    return field(default=default, metadata={"help": help, "least": least})


@dataclass(frozen=True)
class Limits:
    max_batch: int = _limit(64, "rows that may share one call of a model; 1 turns batching off", 1)
    max_delay_us: int = _limit(0, "microseconds that a request may wait for others to share a call with")
    max_queue: int = _limit(4096, "rows that may wait for a model; a request beyond them is answered 503", 1)
    max_body_mib: int = _limit(16, "MiB of a request's body, after decompression", 1)
    max_bodies_mib: int = _limit(256, "MiB of large bodies and answers at once; the next one is answered 503", 1)
    max_headers: int = _limit(128, "header fields of a request", 16)
    max_header_bytes: int = _limit(8190, "bytes of a request line, and of a header field", 256)
    max_connections: int = _limit(4000, "open connections; the next one is answered 503 and closed", 1)
    request_timeout: float = _limit(10, "seconds from a request's first byte to its last; then 408", 0.1)
    send_timeout: float = _limit(30, "seconds that a client may take to receive an answer", 0.1)
    idle_timeout: float = _limit(75, "seconds that a connection may be idle", 0.1)
    model_timeout: float = _limit(60, "seconds that a call of a model may take; then 500", 0.1)
    grace: float = _limit(10, "seconds after SIGTERM in which open connections get their next answer")


def flags() -> dict[str, tuple[type, Any, float, str]]:
    """For each limit its flag: type, default, least value, help."""
    return {
        one.name: (float if one.type is float else int, one.default, one.metadata["least"], one.metadata["help"])
        for one in fields(Limits)
    }


def as_the_system_allows(limits: Limits) -> Limits:
    """With the bound of open files raised as far as these connections need it; with fewer connections where that cannot
    be: beyond its files a process can accept nobody, and whoever comes would be closed without an answer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < limits.max_connections + BURST:
        soft = min(limits.max_connections + BURST, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return replace(limits, max_connections=max(1, min(limits.max_connections, soft - OWN_FILES)))
