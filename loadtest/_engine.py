"""The engine: all connections of one Locust process in one epoll, in a closed loop, on non-blocking sockets.

gevent's hub watches the epoll descriptor and calls `_poll` when a socket is ready; nothing here blocks, no request
switches a greenlet, and no object is made per request but the bytes received. Each connection has at most one request
under way: as soon as its answer is there it is checked and recorded, and the next one is sent.

A request's time starts right before its first byte is sent and ends right after its last byte is received. What it
takes to open a connection is no part of it. A connection that breaks is opened again, after a pause that doubles from
10 ms to 1 s as long as no answer comes.
"""

import _socket  # gevent replaces socket.socket by its own class; this is the plain one
import errno
import socket
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import gevent  # type: ignore[import-untyped]
import numpy as np
from gevent import monkey
from gevent.event import Event  # type: ignore[import-untyped]

from images.errors import IsolatencyError
from loadtest._connection import BUSY, CLOSED, CONNECTING, IDLE, Connection
from loadtest._http1 import AnswerReader, Garbled
from loadtest._samples import ENDED, FIELDS, GARBLED, OK, REFUSED, RESET, TIMEOUT, WRONG_ANSWER, WRONG_STATUS, Raw

RECEIVE_BYTES = 32 * 1024
TICK_S = 0.02  # time-outs, pauses and the end of a block that nothing else notices are looked for this often
FIRST_PAUSE_NS = 10_000_000
LONGEST_PAUSE_NS = 1_000_000_000
FOREVER_NS = 1 << 62
EPOLLIN, EPOLLOUT = 1, 4  # gevent hides select.epoll and its constants

_now = time.monotonic_ns


@dataclass(frozen=True)
class Block:
    """`raw` are the requests, shape (n, FIELDS), that ended between start and drain.

    Requests are sent from `start_ns` to before `end_ns`; at `drained_ns` the last one was answered or given up.
    """

    start_ns: int
    end_ns: int
    drained_ns: int
    raw: Raw


class Engine:
    """Drives connections. `failed` is called once, in the hub, if the engine itself cannot go on."""

    def __init__(self, timeout_s: float, failed: Callable[[Exception], None]) -> None:
        self._timeout_ns = round(timeout_s * 1e9)
        self._failed = failed
        self._connections: dict[int, Connection] = {}  # by file descriptor
        self._members: dict[Connection, None] = {}  # in the loop: the time-out and the pause of these are watched
        self._raw = array("q")
        self._busy = 0  # requests under way
        self._until_ns = FOREVER_NS  # no request is sent after that,
        self._unserved = 0  # except while so many connections have not finished one in this block,
        self._limit_ns = FOREVER_NS  # but not later than this
        self._served_ns = 0  # when the last of them had
        self._over = Event()
        self.cut = False
        self.error: Exception | None = None
        self._epoll = monkey.get_original("select", "epoll")()
        loop = gevent.get_hub().loop
        self._watcher = loop.io(self._epoll.fileno(), 1)
        self._watcher.start(self._guarded, self._poll)
        self._timer = loop.timer(TICK_S, TICK_S)
        self._timer.start(self._guarded, self._tick)

    def close(self) -> None:
        """Close every connection; whatever is under way is dropped unrecorded. May be called again."""
        self._timer.stop()
        self._watcher.stop()
        for connection in list(self._connections.values()):
            self._close(connection)
        self._members.clear()
        self._epoll.close()

    def take(self) -> Raw:
        """The requests recorded since the last call, int64 of shape (n, FIELDS)."""
        raw, self._raw = self._raw, array("q")
        return np.frombuffer(raw, dtype=np.int64).reshape(-1, FIELDS)

    # A Locust user of its own: joins, and runs until it leaves.

    def join(self, connection: Connection) -> None:
        """Open the connection and send on it without pause until `rest` or `leave`."""
        connection.active, connection.rested = True, Event()
        self._members[connection] = None
        self._guarded(lambda: self._open(connection))

    def rest(self, connection: Connection) -> None:
        """Send no more; `connection.rested` is set when the request under way is over."""
        connection.active = False
        if connection.state != BUSY:
            connection.rested.set()

    def leave(self, connection: Connection) -> None:
        """Close at once; a request under way is dropped unrecorded."""
        connection.active = False
        self._members.pop(connection, None)
        self._close(connection)

    # A block: some connections run for a time, together.

    def run_block(self, connections: Sequence[Connection], seconds: float) -> Block:
        """Run `connections` (work and query set by the caller) for a block; blocks the calling greenlet only.

        They are all opened first. The block lasts until every one of them has finished a request, even if that takes
        longer than `seconds`, up to the request time-out; then the requests under way are waited for. Raises
        IsolatencyError if the engine failed. After `cut_short` the block holds what was measured until then.
        """
        self._prepare(connections)
        self._over.clear()
        self._members = dict.fromkeys(connections)
        self._unserved = len(connections)
        self._served_ns = start_ns = _now()
        self._until_ns = start_ns + round(seconds * 1e9)
        self._limit_ns = max(self._until_ns, start_ns + self._timeout_ns)
        for connection in connections:
            connection.active = connection.fresh = True
            connection.check_in = 1
            if connection.state == IDLE:
                self._send(connection)
            elif connection.state == CONNECTING:
                connection.sent_ns = start_ns
        if not self.cut:
            self._over.wait()
        end_ns = _now() if self.cut else max(self._until_ns, self._served_ns)
        for connection in connections:
            connection.active = False
            if connection.state == BUSY:  # only when cut short
                self._close(connection)
        self._members = {}
        self._until_ns = FOREVER_NS
        if self.error is not None:
            raise self.error
        raw = self.take()
        return Block(start_ns, end_ns, max(end_ns, int(raw[:, ENDED].max(initial=0))), raw)

    def cut_short(self) -> None:
        """End the block under way now, and every later one at once."""
        self.cut = True
        self._over.set()

    def _prepare(self, connections: Sequence[Connection]) -> None:
        """Open what is closed, and wait; one that cannot be opened is tried again, and counted, in the block."""
        for connection in connections:
            if connection.state == CLOSED and connection.retry_ns <= _now():
                self._open(connection)
        end_ns = _now() + min(self._timeout_ns, 3_000_000_000)
        while any(one.state == CONNECTING for one in connections) and _now() < end_ns and not self.cut:
            gevent.sleep(0.001)

    # In the hub.

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self.error = error
            self._timer.stop()
            self._watcher.stop()
            self.cut_short()
            self._failed(error)

    def _poll(self) -> None:
        connections = self._connections
        for fd, events in self._epoll.poll(0, 256):
            connection = connections[fd]
            if connection.state == CONNECTING:
                self._connected(connection)
            elif events & EPOLLOUT and connection.unsent is not None:
                self._send_rest(connection)
            else:
                self._receive(connection)

    def _tick(self) -> None:
        now = _now()
        if self._unserved and now >= self._limit_ns:
            self._unserved, self._served_ns = 0, now
        late = now - self._timeout_ns
        for connection in list(self._members):
            state = connection.state
            if state in (BUSY, CONNECTING) and connection.sent_ns <= late:
                self._break(connection, TIMEOUT, now)
            elif state == CLOSED and self._may_send(connection, now) and connection.retry_ns <= now:
                self._open(connection)
        if not self._busy and not self._unserved and now >= self._until_ns:
            self._over.set()

    def _may_send(self, connection: Connection, now: int) -> bool:
        return connection.active and (now < self._until_ns or self._unserved > 0)

    def _open(self, connection: Connection) -> None:
        connection.sent_ns = _now()  # of the attempt, for the case that it fails
        try:
            sock = _socket.socket(connection.address.family, socket.SOCK_STREAM)
        except OSError as error:
            raise IsolatencyError(f"no socket for connection {connection.number}: {error.strerror}") from error
        sock.setblocking(False)
        failure = sock.connect_ex(connection.address.sockaddr)
        connection.sock, connection.fd, connection.state = sock, sock.fileno(), CONNECTING
        self._connections[connection.fd] = connection
        self._epoll.register(connection.fd, EPOLLOUT)
        if failure not in (0, errno.EINPROGRESS):
            self._break(connection, REFUSED, _now())

    def _connected(self, connection: Connection) -> None:
        failure = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failure:
            self._break(connection, TIMEOUT if failure == errno.ETIMEDOUT else REFUSED, _now())
            return
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._epoll.modify(connection.fd, EPOLLIN)
        connection.reader = AnswerReader()
        connection.state = IDLE
        if connection.active:
            self._send(connection)

    def _send(self, connection: Connection) -> None:
        """Send the next request, unless the block is over."""
        assert connection.work is not None
        data = connection.work.requests[connection.query]
        now = _now()
        if now >= self._until_ns and not self._unserved:
            if not self._busy:
                self._over.set()
            return
        connection.state = BUSY
        connection.first_ns = 0
        self._busy += 1
        connection.sent_ns = now
        try:
            sent = connection.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._break(connection, RESET, _now())
            return
        if sent < len(data):
            connection.unsent = memoryview(data)[sent:]
            self._epoll.modify(connection.fd, EPOLLIN | EPOLLOUT)

    def _send_rest(self, connection: Connection) -> None:
        assert connection.unsent is not None
        try:
            connection.unsent = connection.unsent[connection.sock.send(connection.unsent) :]
        except BlockingIOError:
            return
        except OSError:
            self._receive(connection)  # an answer may be there that says why the server takes no more
            if connection.state == BUSY:
                self._break(connection, RESET, _now())
            return
        if not connection.unsent:
            connection.unsent = None
            self._epoll.modify(connection.fd, EPOLLIN)

    def _receive(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        now = _now()
        reader = connection.reader
        if connection.state != BUSY:
            self._close(connection)  # idle connections end, and that is no failure of any request
            return
        if data and not connection.first_ns:
            connection.first_ns = now
        try:
            if not (reader.feed(data) if data else reader.end()):
                if not data:
                    self._break(connection, RESET, now)
                return
        except Garbled:
            self._break(connection, GARBLED, now)
            return
        work = connection.work
        assert work is not None
        status = reader.status
        outcome = OK
        if status != 200:
            outcome = WRONG_STATUS
        elif work.check:
            connection.check_in -= 1
            if not connection.check_in:
                connection.check_in = work.check
                if not work.checker.right(connection.query, reader.body):
                    outcome = WRONG_ANSWER
        connection.broken = 0
        connection.state = IDLE
        self._busy -= 1
        self._record(connection, now, outcome, status, reader.size)
        if reader.close or connection.unsent is not None:
            self._close(connection)
            if self._may_send(connection, now):
                self._open(connection)
        elif connection.active:
            self._send(connection)

    def _record(self, connection: Connection, now: int, outcome: int, status: int, size: int) -> None:
        """One row for a request that is over; the next query is up."""
        assert connection.work is not None
        requests = connection.work.requests
        query = connection.query
        bytes_out = len(requests[query])
        if connection.unsent is not None:
            bytes_out -= len(connection.unsent)
        number, sent_ns, first_ns = connection.number, connection.sent_ns, connection.first_ns
        self._raw.extend((number, sent_ns, first_ns, now, outcome, status, bytes_out, size))
        query += 1
        connection.query = query if query < len(requests) else 0
        if connection.fresh:
            connection.fresh = False
            self._unserved -= 1
            self._served_ns = now
        if not self._busy and not self._unserved and now >= self._until_ns:
            self._over.set()
        if not connection.active and connection.rested is not None:
            connection.rested.set()

    def _break(self, connection: Connection, outcome: int, now: int) -> None:
        """A request, or the attempt to open a connection for one, has failed: record it, and pause."""
        assert connection.work is not None
        received = 0
        if connection.state == BUSY:
            received = connection.reader.received
            connection.state = IDLE
            self._busy -= 1
        else:
            connection.first_ns = 0
            connection.unsent = memoryview(connection.work.requests[connection.query])
        if connection.active or connection.state == IDLE:
            self._record(connection, now, outcome, 0, received)
        self._close(connection)
        connection.retry_ns = now + min(FIRST_PAUSE_NS << min(connection.broken, 10), LONGEST_PAUSE_NS)
        connection.broken += 1

    def _close(self, connection: Connection) -> None:
        if connection.state == CLOSED:
            return
        del self._connections[connection.fd]
        if connection.state == BUSY:
            self._busy -= 1
        connection.sock.close()  # which takes it out of the epoll
        connection.sock, connection.fd, connection.state, connection.unsent = None, -1, CLOSED, None


def in_thread(call: Callable[..., None], *args: object) -> None:
    """Run `call` in a native thread and wait for it; the hub, and with it the load, goes on meanwhile."""
    gevent.get_hub().threadpool.apply(call, args)
