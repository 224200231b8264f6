"""What the engine drives: where a server listens, what is sent to it, and the state of one connection."""

import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from images.errors import UsageError
from loadtest._http1 import AnswerReader
from loadtest._rows import Checker, Queries, request

CLOSED, CONNECTING, IDLE, BUSY = range(4)


@dataclass(frozen=True)
class Address:
    """Where a server listens, resolved once: nothing is looked up while time is measured."""

    authority: str
    path: str
    family: int
    sockaddr: Any


def resolve(url: str) -> Address:
    """Raises UsageError for anything but http://host[:port][/prefix], or a host that cannot be resolved."""
    parts = urlsplit(url)
    try:
        port = parts.port or 80
    except ValueError:
        port = 0
    if not url.isascii() or parts.scheme != "http" or not parts.hostname or not port or parts.query or parts.fragment:
        raise UsageError(f"the host is {url!r}; wanted http://ADDRESS:PORT (plain HTTP only)")
    try:
        family, _, _, _, sockaddr = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UsageError(f"the host {parts.hostname!r} of {url!r} was not found: {error.strerror}") from error
    return Address(parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), family, sockaddr)


class Work:
    """What a connection sends: request bytes made beforehand, and how every `check`-th answer is compared (0: none)."""

    __slots__ = ("check", "checker", "requests")

    def __init__(self, address: Address, queries: Queries, check: int) -> None:
        path = f"{address.path}/v2/models/{queries.model}/infer"
        self.requests = [request(address.authority, path, body) for body in queries.bodies]
        self.checker = Checker(queries)
        self.check = check if self.checker.possible else 0


class Connection:
    """One keep-alive connection to one server, and the request that is under way on it."""

    __slots__ = (
        "active", "address", "broken", "check_in", "down_ns", "fd", "fresh", "intended_ns", "number", "query",
        "reader", "rested", "resting", "retry_ns", "sent_ns", "sock", "stamp", "state", "unsent", "work",
    )  # fmt: skip

    def __init__(self, address: Address, number: int, work: Work | None = None) -> None:
        self.address = address
        self.number = number
        self.work = work
        self.query = 0  # which request comes next, or is under way
        self.check_in = 1  # so many answers until one is compared
        self.state = CLOSED
        self.active = False  # sends again as soon as it can
        self.fresh = False  # has not finished a request in this block
        self.sock: Any = None
        self.fd = -1
        self.reader = AnswerReader()
        self.unsent: memoryview | None = None
        self.intended_ns = self.sent_ns = 0
        self.stamp: bytes | None = None  # the kernel's, of the first bytes of the answer; None until they came
        self.retry_ns = 0  # not opened again before
        self.broken = 0  # how often in a row
        self.down_ns = 0  # since when it has been broken; 0 where it is not
        self.resting = False  # a user that was asked to stop:
        self.rested: Any = None  # gevent's Event, set when it has its last answer
