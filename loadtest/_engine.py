"""The engine: all connections of one Locust process in one epoll, on non-blocking sockets.

gevent's hub watches the epoll descriptor and calls `_poll` when a socket or the timer is ready; nothing here blocks, no
request switches a greenlet, and no object is made per request but the bytes received. Each connection has at most one
request under way.

Closed loop: as soon as a connection's answer is there it is checked and recorded, and the next request is sent. Open
arrivals: a schedule says when requests start; each takes the connection that has been free for longest, or waits in a
queue for one. Then its time starts when it was meant to start, whatever made it late.

A request's time ends right after its last byte is received. A connection that breaks is opened again, after a pause
that doubles from 10 ms to 1 s as long as no answer comes.
"""

import _socket  # gevent replaces socket.socket by its own class; this is the plain one
import errno
import socket
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import gevent  # type: ignore[import-untyped]
import numpy as np
from gevent import monkey
from gevent.event import Event  # type: ignore[import-untyped]

from images.errors import IsolatencyError
from loadtest import _clock, _samples, _timing
from loadtest._arrivals import FOREVER_NS, Schedule
from loadtest._clock import NO_STAMP, SO_TIMESTAMPNS, STAMP_SPACE
from loadtest._connection import BUSY, CLOSED, CONNECTING, IDLE, Connection
from loadtest._http1 import AnswerReader, Garbled
from loadtest._pace import Pace
from loadtest._samples import FIELDS, GARBLED, OK, REFUSED, RESET, TIMEOUT, WRONG_ANSWER, WRONG_STATUS, Raw

RECEIVE_BYTES = 32 * 1024
TICK_S = 0.02  # time-outs, pauses and the end of a block that nothing else notices are looked for this often
FIRST_PAUSE_NS = 10_000_000
LONGEST_PAUSE_NS = 1_000_000_000
LEAD_NS = 2_000_000  # from the call to the first arrival of a block
SPIN_AT_A_TIME_NS = 5_000_000  # then gevent's other greenlets have their turn
EPOLLIN, EPOLLOUT = 1, 4  # gevent hides select.epoll and its constants
_PLAIN = 8  # what a row holds before stamps and stages are worked out

_now = time.monotonic_ns


class Block(NamedTuple):
    """Requests start from `start_ns` to before `end_ns`; at `drained_ns` the last one was answered or given up."""

    start_ns: int
    end_ns: int
    drained_ns: int


class Engine:
    """Drives connections. `failed` is called once, in the hub, if the engine itself cannot go on.

    `spin_ns`: so long before each arrival the engine wakes up and waits for it awake, which costs CPU.
    """

    def __init__(self, timeout_s: float, failed: Callable[[Exception], None], spin_ns: int = 0) -> None:
        self._timeout_ns = round(timeout_s * 1e9)
        self._failed = failed
        self._spin_ns = spin_ns
        self._connections: dict[int, Connection] = {}  # by file descriptor
        self._members: dict[Connection, None] = {}  # in the loop: the time-out and the pause of these are watched
        self._rows, self._stamps, self._timings = array("q"), list[bytes](), list[bytes]()
        self._busy = 0  # requests under way
        self._until_ns = FOREVER_NS  # closed loop: no request is sent after that,
        self._unserved = 0  # except while so many connections have not finished one in this block,
        self._limit_ns = FOREVER_NS  # but not later than this
        self._served_ns = 0  # when the last of them had
        self._schedule: Schedule | None = None  # open arrivals; None: a closed loop
        self._free: deque[Connection] = deque()
        self._queue: deque[tuple[int, int]] = deque()  # arrivals without a connection: intended_ns, their number
        self._last_ns = 0  # when the last request was over
        self._late = array("q")
        self._queued = self._unanswered = self._reconnects = self._gap_ns = 0
        self._over = Event()
        self.cut = False
        self.error: Exception | None = None
        self._timer, self._clock = _clock.Timer(), _clock.Stamps()
        self._epoll = monkey.get_original("select", "epoll")()
        self._epoll.register(self._timer.fd, EPOLLIN)
        loop = gevent.get_hub().loop
        self._watcher = loop.io(self._epoll.fileno(), 1)
        self._watcher.start(self._guarded, self._poll)
        self._ticker = loop.timer(TICK_S, TICK_S)
        self._ticker.start(self._guarded, self._tick)

    def close(self) -> None:
        """Close every connection; whatever is under way is dropped, and counted as unanswered. May be called again."""
        if self._epoll.closed:
            return
        self._ticker.stop()
        self._watcher.stop()
        for connection in list(self._connections.values()):
            self._close(connection)
        self._members.clear()
        self._epoll.close()
        self._timer.close()
        self._clock.close()

    @property
    def recorded(self) -> int:
        """How many requests the next `take` holds."""
        return len(self._rows) // _PLAIN

    def take(self) -> Raw:
        """The requests recorded since the last call, int64 of shape (n, FIELDS)."""
        rows, stamps, timings = self._rows, self._stamps, self._timings
        self._rows, self._stamps, self._timings = array("q"), [], []
        plain = np.frombuffer(rows, dtype=np.int64).reshape(-1, _PLAIN)
        raw = np.empty((len(plain), FIELDS), dtype=np.int64)
        raw[:, : _samples.FIRST] = plain[:, : _samples.FIRST]
        raw[:, _samples.ENDED : _samples.STAGES_AT] = plain[:, _samples.FIRST :]
        raw[:, _samples.FIRST] = self._clock.monotonic(stamps, raw[:, _samples.SENT], raw[:, _samples.ENDED])
        raw[:, _samples.STAGES_AT :] = _timing.parse(timings)
        return raw

    def take_pace(self) -> Pace:
        """What was noted since the last call."""
        late, self._late = self._late, array("q")
        steps, self._clock.steps = self._clock.steps, 0
        late_ns = np.frombuffer(late, dtype=np.int64)
        found = Pace(late_ns, self._queued, self._unanswered, self._reconnects, self._gap_ns, steps)
        self._queued = self._unanswered = self._reconnects = self._gap_ns = 0
        return found

    # A Locust user of its own: joins, and runs until it leaves.

    def join(self, connection: Connection, *, active: bool) -> None:
        """Open the connection; where it is `active`, send on it without pause until `rest` or `leave`."""
        connection.active, connection.rested = active, Event()
        self._members[connection] = None
        self._guarded(lambda: self._open(connection))

    @property
    def connected(self) -> int:
        """How many connections that have joined are open."""
        return sum(one.state in (IDLE, BUSY) for one in self._members)

    @property
    def finished(self) -> bool:
        """Whether the schedule of open arrivals is used up, and nothing is under way."""
        schedule = self._schedule
        return schedule is not None and schedule.next_ns == FOREVER_NS and not self._queue and not self._busy

    def begin(self, schedule: Schedule) -> None:
        """Open arrivals over all that have joined, and those that join later."""
        self._schedule = schedule
        self._free.extend(one for one in self._members if one.state == IDLE)
        self._timer.arm(max(schedule.next_ns - self._spin_ns, 1))

    def drain(self, bound_s: float) -> None:
        """Start nothing more, and wait, so long at most, until what is under way or queued is over."""
        self._over.clear()
        if self._schedule is not None:
            self._schedule.end()
        for connection in self._members:
            connection.active = False
        if self._busy or self._queue:
            self._until_ns = 0
            self._over.wait(bound_s)
        self._unanswered += len(self._queue)
        self._queue.clear()
        for connection in list(self._members):
            if connection.state == BUSY:
                self._close(connection)

    def rest(self, connection: Connection) -> None:
        """Send no more; `connection.rested` is set when the request under way is over."""
        connection.active = False
        if self._schedule is not None:  # its place in the pool is gone
            self._members.pop(connection, None)
            if connection in self._free:
                self._free.remove(connection)
        connection.resting = True
        if connection.state != BUSY:
            connection.rested.set()

    def leave(self, connection: Connection) -> None:
        """Close at once; a request under way is dropped, and counted as unanswered."""
        connection.active = False
        self._members.pop(connection, None)
        self._close(connection)

    # A block: some connections run for a time, together.

    def run_block(
        self, connections: Sequence[Connection], seconds: float, schedule: Callable[[int], Schedule] | None = None
    ) -> Block:
        """Run `connections` (work and query set by the caller) for a block; blocks the calling greenlet only.

        They are all opened first. In a closed loop the block lasts until every one of them has finished a request, even
        if that takes longer than `seconds`, up to the request time-out. `schedule` is called with the block's start and
        makes it one of open arrivals, which ends after `seconds`, or for `seconds` 0 with its last answer. Then the
        requests under way are waited for. Raises IsolatencyError if the engine failed. After `cut_short` the block
        holds what was measured until then. What was measured is there to be taken, also before the block is over.
        """
        self._prepare(connections)
        self._over.clear()
        self._members = dict.fromkeys(connections)
        for connection in connections:
            connection.check_in = 1
        if schedule is not None:
            start_ns = _now() + LEAD_NS
            self._until_ns = end_ns = start_ns + round(seconds * 1e9)
            self.begin(schedule(start_ns))
        else:
            start_ns = self._start_closed(connections, seconds)
        if not self.cut:
            self._over.wait()
        if schedule is None:
            end_ns = max(self._until_ns, self._served_ns)
        elif not seconds:
            end_ns = self._last_ns
        if self.cut:
            end_ns = min(end_ns, _now()) if seconds else _now()
        self._stop_block(connections)
        if self.error is not None:
            raise self.error
        return Block(start_ns, max(end_ns, start_ns + 1), max(end_ns, self._last_ns, start_ns + 1))

    def cut_short(self) -> None:
        """End the block under way now, and every later one at once."""
        self.cut = True
        self._over.set()

    def _start_closed(self, connections: Sequence[Connection], seconds: float) -> int:
        self._unserved = len(connections)
        self._served_ns = start_ns = _now()
        self._until_ns = start_ns + round(seconds * 1e9)
        self._limit_ns = max(self._until_ns, start_ns + self._timeout_ns)
        for connection in connections:
            connection.active = connection.fresh = True
            if connection.state == IDLE:
                self._send(connection)
            elif connection.state == CONNECTING:
                connection.intended_ns = connection.sent_ns = start_ns
        return start_ns

    def _stop_block(self, connections: Sequence[Connection]) -> None:
        for connection in connections:
            connection.active = connection.fresh = False
            if connection.state == BUSY:  # only when cut short
                self._close(connection)
        self._unanswered += len(self._queue)
        self._queue.clear()
        self._free.clear()
        self._members, self._schedule, self._until_ns, self._unserved = {}, None, FOREVER_NS, 0
        self._timer.arm(0)

    def _prepare(self, connections: Sequence[Connection]) -> None:
        """Open what is closed, and wait; one that cannot be opened is tried again, and counted, in the block."""
        self._poll()  # what the server closed a moment ago
        for connection in connections:
            if connection.state == CLOSED:
                now = _now()
                connection.down_ns = now if connection.retry_ns > now else 0  # a gap is one within a block
                if connection.retry_ns <= now:
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
            self._ticker.stop()
            self._watcher.stop()
            self.cut_short()
            self._failed(error)

    def _poll(self) -> None:
        connections, timer = self._connections, self._timer.fd
        for fd, events in self._epoll.poll(0, 256):
            if fd == timer:
                self._arrive()
                continue
            connection = connections.get(fd)
            if connection is None:
                continue  # closed by what came before it
            if connection.state == CONNECTING:
                self._connected(connection)
            elif events & EPOLLOUT and connection.unsent is not None:
                self._send_rest(connection)
            else:
                self._receive(connection)

    def _arrive(self) -> None:
        """Start what is due; then arm the timer for what comes next."""
        schedule = self._schedule
        if schedule is None:
            self._timer.arm(0)
            return
        now = _now()
        give_up_ns = now + SPIN_AT_A_TIME_NS
        self._timer.arm(0)  # while this spins, only sockets are polled
        while True:
            while schedule.next_ns <= now:
                intended_ns, number = schedule.pop()
                if schedule.timed:
                    self._late.append(now - intended_ns)
                if self._free:
                    self._start(self._free.popleft(), intended_ns, number)
                    now = _now()
                else:
                    self._queued += 1
                    self._queue.append((intended_ns, number))
            if schedule.next_ns - now > self._spin_ns or now > give_up_ns:
                break
            self._poll()
            now = _now()
        if schedule.next_ns < FOREVER_NS:
            self._timer.arm(schedule.next_ns - self._spin_ns)
        else:
            self._look_for_the_end(now)

    def _start(self, connection: Connection, intended_ns: int, number: int) -> None:
        assert connection.work is not None
        connection.query = number % len(connection.work.requests)
        connection.intended_ns = intended_ns
        self._write(connection, _now())

    def _next(self, connection: Connection, now: int) -> None:
        """What a connection does that has become free."""
        if self._schedule is None:
            if connection.active:
                self._send(connection)
        elif self._queue:
            self._start(connection, *self._queue.popleft())
        elif connection in self._members:
            self._free.append(connection)
            self._look_for_the_end(now)

    def _look_for_the_end(self, now: int) -> None:
        """Set `_over` where nothing is under way and nothing will be."""
        if self._busy or now < self._until_ns or self._unserved:
            return
        if self._schedule is None or (self._schedule.next_ns == FOREVER_NS and not self._queue):
            self._over.set()

    def _tick(self) -> None:
        now = _now()
        self._clock.look()
        if self._unserved and now >= self._limit_ns:
            self._unserved, self._served_ns = 0, now
        late = now - self._timeout_ns
        while self._queue and self._queue[0][0] <= late:
            self._give_up(self._queue.popleft(), TIMEOUT, now)
        for connection in list(self._members):
            state = connection.state
            if (state == BUSY and connection.intended_ns <= late) or (
                state == CONNECTING and connection.sent_ns <= late
            ):
                self._break(connection, TIMEOUT, now)
            elif state == CLOSED and connection.retry_ns <= now and self._may_open(connection, now):
                self._open(connection)
        self._look_for_the_end(now)

    def _may_open(self, connection: Connection, now: int) -> bool:
        if self._schedule is not None:
            return self._schedule.next_ns < FOREVER_NS or bool(self._queue)
        return connection.active and (now < self._until_ns or self._unserved > 0)

    def _open(self, connection: Connection) -> None:
        connection.intended_ns = connection.sent_ns = _now()  # of the attempt, for the case that it fails
        try:
            sock = _socket.socket(connection.address.family, socket.SOCK_STREAM)
        except OSError as error:
            raise IsolatencyError(f"no socket for connection {connection.number}: {error.strerror}") from error
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
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
        now = _now()
        if connection.down_ns:
            self._reconnects += 1
            self._gap_ns += now - connection.down_ns
            connection.down_ns = 0
        self._next(connection, now)

    def _send(self, connection: Connection) -> None:
        """Send the next request of a closed loop, unless the block is over."""
        now = _now()
        if now >= self._until_ns and not self._unserved:
            self._look_for_the_end(now)
            return
        connection.intended_ns = now
        self._write(connection, now)

    def _write(self, connection: Connection, now: int) -> None:
        assert connection.work is not None
        data = connection.work.requests[connection.query]
        connection.state = BUSY
        connection.stamp = None
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
            data, notes, _, _ = connection.sock.recvmsg(RECEIVE_BYTES, STAMP_SPACE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        now = _now()
        reader = connection.reader
        if connection.state != BUSY:
            self._lost_idle(connection, now)
            return
        if connection.stamp is None and data:
            connection.stamp = notes[0][2] if notes else NO_STAMP
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
                if not work.checker.right(connection.query, reader.body, reader.json_size):
                    outcome = WRONG_ANSWER
        connection.broken = 0
        connection.state = IDLE
        self._busy -= 1
        self._record(connection, now, outcome, status, reader.size, reader.timing)
        if reader.close or connection.unsent is not None:
            self._close(connection)
            connection.down_ns = now
            if self._may_open(connection, now):
                self._open(connection)
            else:
                self._look_for_the_end(now)
        else:
            self._next(connection, now)

    def _lost_idle(self, connection: Connection, now: int) -> None:
        """Idle connections end, and that is no failure of any request; it is opened again at once, or after a pause
        where that happens again and again."""
        self._close(connection)
        if connection.broken:
            connection.retry_ns = now + min(FIRST_PAUSE_NS << min(connection.broken, 10), LONGEST_PAUSE_NS)
        connection.broken += 1
        if connection in self._members:
            connection.down_ns = connection.down_ns or now
            if connection.retry_ns <= now and self._may_open(connection, now):
                self._open(connection)

    def _record(
        self, connection: Connection, now: int, outcome: int, status: int, size: int, timing: bytes = b""
    ) -> None:
        """One row for a request that is over; the next query is up."""
        assert connection.work is not None
        requests = connection.work.requests
        query = connection.query
        bytes_out = len(requests[query])
        if connection.unsent is not None:
            bytes_out -= len(connection.unsent)
        number, intended_ns, sent_ns = connection.number, connection.intended_ns, connection.sent_ns
        self._rows.extend((number, intended_ns, sent_ns, now, outcome, status, bytes_out, size))
        self._stamps.append(connection.stamp or NO_STAMP)
        self._timings.append(timing)
        self._last_ns = now
        query += 1
        connection.query = query if query < len(requests) else 0
        if connection.fresh:
            connection.fresh = False
            self._unserved -= 1
            self._served_ns = now
        if now >= self._until_ns:
            self._look_for_the_end(now)
        if connection.resting:
            connection.rested.set()

    def _give_up(self, arrival: tuple[int, int], outcome: int, now: int) -> None:
        """Record an arrival that no connection took; a row of its own, which was never sent."""
        self._rows.extend((0, arrival[0], 0, now, outcome, 0, 0, 0))
        self._stamps.append(NO_STAMP)
        self._timings.append(b"")
        self._last_ns = now

    def _break(self, connection: Connection, outcome: int, now: int) -> None:
        """A request, or the attempt to open a connection for one, has failed: record it, and pause."""
        assert connection.work is not None
        if connection.state == BUSY:
            received = connection.reader.received
            connection.state = IDLE
            self._busy -= 1
            self._record(connection, now, outcome, 0, received)
        elif self._schedule is not None:
            if self._queue:  # the attempt was for the arrival that has waited for longest
                self._give_up(self._queue.popleft(), outcome, now)
        elif connection.active:
            connection.stamp = None
            connection.unsent = memoryview(connection.work.requests[connection.query])
            self._record(connection, now, outcome, 0, 0)
        self._close(connection)
        connection.down_ns = connection.down_ns or now
        connection.retry_ns = now + min(FIRST_PAUSE_NS << min(connection.broken, 10), LONGEST_PAUSE_NS)
        connection.broken += 1
        self._look_for_the_end(now)

    def _close(self, connection: Connection) -> None:
        if connection.state == CLOSED:
            return
        del self._connections[connection.fd]
        if connection.state == BUSY:
            self._busy -= 1
            self._unanswered += 1
        elif connection in self._free:
            self._free.remove(connection)
        connection.sock.close()  # which takes it out of the epoll
        connection.sock, connection.fd, connection.state, connection.unsent = None, -1, CLOSED, None


def in_thread(call: Callable[..., None], *args: object) -> None:
    """Run `call` in a native thread and wait for it; the hub, and with it the load, goes on meanwhile."""
    gevent.get_hub().threadpool.apply(call, args)
