"""Connections: when a request's first byte came, who is slow, how many there may be."""

import asyncio
import sys
import time
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

from aiohttp import web

from server.answers import Answer, refusal
from server.batcher import Busy, Call
from server.limits import Limits
from server.metrics import Exposition

T = TypeVar("T")
SWEEP_S = 0.1
TURN_NS = 10_000_000  # a request that began to arrive before that is not one of the event loop's turn
LINGER_S = 2.0  # how long a refused body is drained, so that its sender sees the answer and no reset


class _InPlace:
    """The event loop as aiohttp's handler of a connection uses it, but that each request is handled in the connection's
    own task: a task for each, which has to wait for its turn, takes some microseconds."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.time, self.call_at, self.create_future = loop.time, loop.call_at, loop.create_future

    def create_task(self, request: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        return request


class Connections:
    """All that are open, and those among them whose request has begun to arrive and is not whole, oldest first."""

    def __init__(self, limits: Limits, metrics: Exposition) -> None:
        self.limits, self.metrics = limits, metrics
        self.open: set[Connection] = set()
        self.arriving: dict[Connection, int] = {}
        self.last_byte_ns = 0
        self.held = 0  # bytes of large bodies and answers
        self.stopping = False

    def others(self, now_ns: int) -> bool:
        """Whether more requests than the one that is handled arrive just now; slow senders do not count."""
        return bool(self.arriving) and next(reversed(self.arriving.values())) > now_ns - TURN_NS

    async def sweep(self) -> None:
        """Cut senders that are slow, for ever; how late this wakes up is the event loop's lag."""
        bound_ns = int(self.limits.request_timeout * 1e9)
        while True:
            due = time.monotonic_ns() + int(SWEEP_S * 1e9)
            await asyncio.sleep(SWEEP_S)
            now = time.monotonic_ns()
            self.metrics.lag.add(max(0, now - due))
            for connection, begun in list(self.arriving.items()):
                if begun > now - bound_ns:
                    break
                if connection.at_work:  # on the request before; the time of the next one begins after it
                    connection.begin()
                    continue
                connection.cut(408, f"wanted a whole request within {self.limits.request_timeout:g} s; found a part")


class Connection(web.RequestHandler):
    """One client's connection. What is no HTTP reaches no route, so its refusal is made here."""

    __slots__ = ("_begun_ns", "_book", "held", "waiting")

    def __init__(self, book: Connections, server: web.Server, access_log: object) -> None:
        limits = book.limits
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=limits.idle_timeout,
            access_log=access_log,  # type: ignore[arg-type]
            max_line_size=limits.max_header_bytes,
            max_field_size=limits.max_header_bytes,
            max_headers=limits.max_headers,
            lingering_time=LINGER_S,
            auto_decompress=False,
        )
        # aiohttp's parser counts a request twice whose body came after its header, and then stops one request before
        # the queue of those that were pipelined is full, which alone is what makes it go on.
        self._max_msg_queue_size -= 1
        self._book = book
        self._begun_ns = 0
        self.held = 0  # bytes of a large body or answer
        self.waiting: Call | None = None  # the request that is on its way through a model

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if sys.version_info < (3, 12):  # from there on tasks begin at once
            self._loop = cast(asyncio.AbstractEventLoop, _InPlace(self._loop))
        self._book.open.add(self)
        if len(self._book.open) > self._book.limits.max_connections:
            self.cut(503, f"wanted at most {self._book.limits.max_connections} connections; found one more")

    def connection_lost(self, error: BaseException | None) -> None:
        self._book.open.discard(self)
        self._book.arriving.pop(self, None)
        if self.waiting is not None and self.waiting.future is not None:
            self.waiting.future.cancel()  # its rows need not be computed
        self.release()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        if data:  # aiohttp calls it with nothing to go on where it had paused
            now = self._book.last_byte_ns = time.monotonic_ns()
            if not self._begun_ns:
                self._begun_ns = self._book.arriving[self] = now
        super().data_received(data)

    @property
    def under_way(self) -> bool:
        """A request is being read or answered, or its answer taken."""
        unsent = self.transport is not None and self.transport.get_write_buffer_size() > 0
        return self._request_in_progress or unsent

    @property
    def at_work(self) -> bool:
        """A whole request is being answered."""
        return self._current_request is not None and self._current_request.content.is_eof()

    def begin(self) -> None:
        """Give the request that is arriving its time from now on."""
        self._book.arriving.pop(self, None)
        self._begun_ns = self._book.arriving[self] = time.monotonic_ns()

    def expect_more(self) -> None:
        """What is missing of the request that is handled has its time from now on, where it has none yet, since its
        beginning came together with the request before it."""
        if not self._begun_ns:
            self.begin()

    def resume_reading(self, resume_parser: bool = True) -> None:
        if self._reading_paused:  # aiohttp asks after every body, and would parse nothing once more
            super().resume_reading(resume_parser)

    def whole(self) -> int:
        """The request that is handled has arrived; returns when its first byte did (now, if that came with the
        request before it)."""
        begun, self._begun_ns = self._begun_ns or time.monotonic_ns(), 0
        self._book.arriving.pop(self, None)
        return begun

    def hold(self, size: int) -> None:
        """Count bytes of the request that is handled, or of its answer, until that is taken. Raises Busy where all of
        them together are too many."""
        self.held += size
        self._book.held += size
        if self._book.held > self._book.limits.max_bodies_mib * 2**20:
            most = self._book.limits.max_bodies_mib
            raise Busy(f"wanted at most {most} MiB of large bodies and answers at once; found more")

    def release(self) -> None:
        if self.held:
            self._book.held -= self.held
            self.held = 0

    @property
    def stopping(self) -> bool:
        return self._book.stopping

    @property
    def send_timeout(self) -> float:
        return self._book.limits.send_timeout

    def cut(self, status: int, text: str) -> None:
        """Say why, and close."""
        self._book.arriving.pop(self, None)
        if self.transport is not None:
            self.transport.write(self._last(status, text).whole())
        self.force_close()

    def _last(self, status: int, text: str) -> Answer:
        """A refusal after which the connection is closed; counted here, since it passes no route."""
        refused = refusal(status, text)
        refused.force_close()
        self._book.metrics.errors[status] += 1
        return refused

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        self.whole()
        if request.writer.output_size > 0:
            raise ConnectionError("the connection broke in the middle of an answer")
        return self._last(status, f"the request could not be read: {message or exc or 'no reason was given'}")
