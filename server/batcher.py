"""Micro-batches that wait for nothing: what has arrived by the event loop's next turn shares a call of the model, where
that costs less than a call for each."""

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from server import protocol
from server.limits import Limits
from server.metrics import Calls
from server.models.base import Array, BadInput, Batch, Model
from server.tensors import DTYPES
from server.worker import Overdue, Watch, Worker

INLINE_NS = 500_000  # a longer call is worth the way to a thread and back, some 15 to 20 µs
EXPLORE = 64  # one of so many choices goes against the estimates, which would never change otherwise
WARM_UP_S = 0.1


class Busy(Exception):
    """Too many rows wait already."""


class Expired(Exception):
    """The request's timeout passed while it waited."""


class Failed(Exception):
    """The model raised, gave what it should not, or did not return; the text says which."""


class Call:
    """The rows of one request on their way through the model; at the end it has `results`, or an `error`: BadInput
    where the model raised that, Expired or Failed."""

    __slots__ = ("alone", "computed_ns", "error", "future", "joined_ns", "key", "parsed_ns", "request", "results",
                 "rows", "started_ns")  # fmt: skip

    def __init__(self, request: protocol.Request, parsed_ns: int) -> None:
        self.request = request
        self.parsed_ns = parsed_ns
        self.rows = len(next(iter(request.inputs.values())))
        self.key: object = repr(sorted(request.parameters.items())) if request.parameters else ""
        self.alone = False  # its call did not return soon, so it is made by itself, in a thread
        self.future: asyncio.Future[None] | None = None
        self.results: Mapping[str, Array] = {}
        self.error: Exception | None = None
        self.started_ns = self.joined_ns = self.computed_ns = 0

    def expired(self, now_ns: int) -> bool:
        return 0 < self.request.timeout_us * 1000 < now_ns - self.parsed_ns

    def wake(self) -> None:
        if self.future is not None and not self.future.done():
            self.future.set_result(None)


class Costs:
    """What a call takes by its number of rows, in powers of two: exponentially weighted, and slow to believe an
    outlier, which mostly is another process that had the core."""

    def __init__(self) -> None:
        self._ns: dict[int, float] = {}

    def seen(self, rows: int, ns: float) -> None:
        of = rows.bit_length()
        old = self._ns.get(of)
        self._ns[of] = ns if old is None else old + (min(ns, 4 * old) - old) / 8

    def ns(self, rows: int) -> float | None:
        return self._ns.get(rows.bit_length())

    def as_us(self) -> dict[int, float]:
        """Microseconds by the least number of rows of each power of two."""
        return {(1 << of) >> 1: round(ns / 1000, 1) for of, ns in sorted(self._ns.items())}


class Batcher:
    """One model's queue. Calls of a model never overlap; all but `_call` belongs to the event loop's thread."""

    def __init__(self, model: Model, limits: Limits, watch: Watch, calls: Calls) -> None:
        self.costs = Costs()
        self.waiting_rows = 0
        self.joins = model.batches and limits.max_batch > 1
        self._model, self._limits, self._watch, self._calls = model, limits, watch, calls
        self._delay_s = limits.max_delay_us / 1e6 if self.joins else 0.0
        self._waiting: deque[Call] = deque()
        self._turn: asyncio.Handle | None = None
        self._running: Sequence[Call] = ()  # in the worker
        self._worker = Worker(model.name)
        self._choices = 0

    def warm_up(self) -> str | None:
        """Let the model make its first calls and learn what they take; returns what went wrong, in words, which is no
        reason not to serve it."""
        over = threading.Event()
        said: list[str | None] = []

        def work() -> None:
            try:
                self._model.warm_up()
                if self.joins:
                    self._learn()
            except BaseException as error:  # SystemExit and all: a model does not end the server
                said.append(f"{type(error).__name__}: {error}")
            finally:
                over.set()

        self._worker.submit(work)
        if not over.wait(self._limits.model_timeout):
            self._replace_worker()
            return self._no_return()
        return said[0] if said else None

    def _learn(self) -> None:
        end = time.monotonic() + WARM_UP_S
        rows = 1
        while rows <= self._limits.max_batch:
            blank = {
                tensor.name: np.zeros([rows, *(abs(size) for size in tensor.shape[1:])], DTYPES[tensor.datatype])
                for tensor in self._model.inputs
            }
            batch = _sealed(Batch(blank, outputs=tuple(one.name for one in self._model.outputs if not one.on_request)))
            took: list[int] = []
            while len(took) < 3 and time.monotonic() < end:
                start = time.monotonic_ns()
                self._model.predict(batch)
                took.append(time.monotonic_ns() - start)
            if not took:
                return
            self.costs.seen(rows, min(took))
            rows *= 2

    def inline(self, rows: int) -> bool:
        """Whether a call of so many rows is made in the event loop's own thread."""
        cost = self.costs.ns(rows)
        return cost is not None and cost < INLINE_NS

    def at_once(self, call: Call, others: bool) -> bool:
        """Make the call, where nothing is gained by waiting; `others` says that more requests are arriving."""
        if self._waiting or self._running or self._delay_s or (others and self.joins) or not self.inline(call.rows):
            return False
        error = self._call_inline((call,))
        if isinstance(error, Overdue):
            call.alone = True
            return False
        self._finish((call,), error)
        return True

    async def wait(self, call: Call) -> None:
        """Queue the call until it has been made. Raises Busy."""
        idle = not self._waiting and not self._running
        if not idle and self.waiting_rows + call.rows > self._limits.max_queue:
            raise Busy(f"model {self._model.name} has at most {self._limits.max_queue} rows waiting; "
                       f"{self.waiting_rows} wait already")  # fmt: skip
        call.future = asyncio.get_running_loop().create_future()
        self._waiting.append(call)
        self.waiting_rows += call.rows
        self._schedule()
        try:
            await call.future
        except asyncio.CancelledError:
            if call in self._waiting:
                self._leave((call,))
            raise

    def _schedule(self) -> None:
        """See to it that what waits is looked at: in the next turn, or when the delay is over or a batch is full."""
        if self._running or not self._waiting:
            return
        loop = asyncio.get_running_loop()
        soon = not self._delay_s or self.waiting_rows >= self._limits.max_batch
        if self._turn is not None and self._delay_s and soon:
            self._turn.cancel()
            self._turn = None
        if self._turn is None:
            self._turn = loop.call_soon(self._flush) if soon else loop.call_later(self._delay_s, self._flush)

    def _flush(self) -> None:
        self._turn = None
        calls = self._take()
        if not calls:
            return
        if not calls[0].alone and self.inline(sum(call.rows for call in calls)):
            self._finish(calls, self._call_inline(calls))
            return
        loop = asyncio.get_running_loop()
        self._running = calls
        overdue = loop.call_later(self._limits.model_timeout, self._overdue, calls)

        def done(error: BaseException | None) -> None:
            if self._running is calls:  # it was not given up before
                overdue.cancel()
                self._running = ()
                self._finish(calls, error)

        self._worker.submit(lambda: loop.call_soon_threadsafe(done, self._call(calls)))

    def _take(self) -> Sequence[Call]:
        """The calls that are made next, as one: the oldest, and those that may join it where that costs less."""
        now = time.monotonic_ns()
        while self._waiting and self._waiting[0].expired(now):
            call = self._waiting[0]
            call.error = Expired(f"the request's timeout of {call.request.timeout_us} µs passed while it waited")
            self._leave((call,))
            call.wake()
        if not self._waiting:
            return ()
        first = self._waiting[0]
        rows, calls = first.rows, [first]
        for call in itertools.islice(self._waiting, 1, None) if self.joins else ():
            if rows >= self._limits.max_batch:
                break
            if call.key == first.key and rows + call.rows <= self._limits.max_batch and not call.expired(now):
                calls.append(call)
                rows += call.rows
        if len(calls) < 2 or not self._better_joined(calls, rows):
            calls = [first]
        self._leave(calls)
        return calls

    def _better_joined(self, calls: Sequence[Call], rows: int) -> bool:
        joined, single = self.costs.ns(rows), [self.costs.ns(call.rows) for call in calls]
        if joined is None or None in single:
            return True
        self._choices += 1
        return (joined < sum(ns for ns in single if ns)) != (self._choices % EXPLORE == 0)

    def _leave(self, calls: Sequence[Call]) -> None:
        for call in calls:
            self._waiting.remove(call)
            self.waiting_rows -= call.rows

    def _call_inline(self, calls: Sequence[Call]) -> BaseException | None:
        try:
            return self._watch.run(self._call, calls)
        except Overdue as late:  # after the model had returned
            return late

    def _call(self, calls: Sequence[Call]) -> BaseException | None:
        """One call of the model for all of them; returns what it raised."""
        started = time.monotonic_ns()
        try:
            batch = _sealed(calls[0].request.batch() if len(calls) == 1 else _joined([call.request for call in calls]))
            joined = time.monotonic_ns()
            results = self._model.predict(batch)
            computed = time.monotonic_ns()
            protocol.check_results(self._model, batch, results)
            for stage, ns in self._model.stages.items():
                self._calls.stages[stage] += ns
        except BaseException as error:  # SystemExit and all: a model does not end the server
            return error
        row = 0
        for call in calls:
            call.started_ns, call.joined_ns, call.computed_ns = started, joined, computed
            call.results = {name: results[name] for name, _ in call.request.outputs}
            if len(calls) > 1:
                call.results = {name: values[row : row + call.rows] for name, values in call.results.items()}
                row += call.rows
        return None

    def _finish(self, calls: Sequence[Call], error: BaseException | None) -> None:
        if error is None:
            one = calls[0]
            rows = one.rows if len(calls) == 1 else sum(call.rows for call in calls)
            self.costs.seen(rows, one.computed_ns - one.joined_ns)
            self._calls.add(rows, one.joined_ns - one.started_ns, one.computed_ns - one.joined_ns)
        elif len(calls) > 1 or isinstance(error, Overdue):  # each by itself, so that only the culprit fails
            for call in reversed(calls):
                call.key, call.alone = call, len(calls) == 1
                self._waiting.appendleft(call)
                self.waiting_rows += call.rows
            calls = ()
        elif isinstance(error, BadInput | Failed):
            calls[0].error = error
        else:
            calls[0].error = Failed(f"{type(error).__name__}: {error}")
        for call in calls:
            call.wake()
        self._schedule()

    def _overdue(self, calls: Sequence[Call]) -> None:
        if self._running is calls:
            self._running = ()
            self._replace_worker()
            self._finish(calls, Failed(self._no_return()))

    async def aside(self, work: Callable[[], object]) -> None:
        """Have the model do something in a thread of its own. Raises BadInput where it did, Failed for all else."""
        loop = asyncio.get_running_loop()
        over: asyncio.Future[BaseException | None] = loop.create_future()

        def done(error: BaseException | None) -> None:
            if not over.done():
                over.set_result(error)

        def run() -> None:
            error = None
            try:
                work()
            except BaseException as raised:
                error = raised
            loop.call_soon_threadsafe(done, error)

        worker = Worker(f"aside {self._model.name}")
        worker.submit(run)
        try:
            async with asyncio.timeout(self._limits.model_timeout):
                error = await over
        except TimeoutError:
            error = Failed(self._no_return())
        finally:
            worker.abandon()
        if error is not None:
            raise error if isinstance(error, BadInput | Failed) else Failed(f"{type(error).__name__}: {error}")

    def _replace_worker(self) -> None:
        self._worker.abandon()
        self._worker = Worker(self._model.name)

    def _no_return(self) -> str:
        return f"model {self._model.name} did not return within {self._limits.model_timeout:g} s"


def _joined(requests: Sequence[protocol.Request]) -> Batch:
    inputs = {name: np.concatenate([one.inputs[name] for one in requests]) for name in requests[0].inputs}
    wanted = dict.fromkeys(output.name for one in requests for output in one.outputs)
    return Batch(inputs, requests[0].parameters, tuple(wanted))


def _sealed(batch: Batch) -> Batch:
    """A model may not write to its inputs: the call may have to be made again with the same."""
    for values in batch.inputs.values():
        values.flags.writeable = False
    return batch
