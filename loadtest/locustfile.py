"""What `locust -f loadtest/` runs: InferenceUser, one keep-alive connection of the engine's, and our options.

Two ways in: plain Locust (its page, its command line, `--processes`) drives one target, given as the host; run mode
(`--plan`, as `isolatency run` starts it) takes all cells of a plan in blocks that go round several targets.
"""

import gc
import logging
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gevent  # type: ignore[import-untyped]
import locust.stats
from gevent.event import Event  # type: ignore[import-untyped]
from locust import User, constant, events, task
from locust.runners import MasterRunner, WorkerRunner

from images.errors import IsolatencyError, UsageError
from loadtest import _arrivals, _models, _plain, _session, _tally, _workers
from loadtest._connection import Connection
from loadtest._encoding import ENCODINGS
from loadtest._engine import Engine, in_thread
from loadtest._pace import Effort

FLUSH_S = 0.5
CUT_BOUND_S = 1.5  # a run that is interrupted has closed its files by then
DRAIN_S = 15.0  # so long at most are answers waited for at the end of a test; with a shorter time-out none is left open
DRAIN_MARGIN_S = 0.5  # time-outs are noticed a moment after they are due
CONNECT_S = 3.0  # arrivals wait so long at most until all users are connected
LEAD_NS = 20_000_000  # from the moment when all are connected to the first arrival
TROUBLE = "isolatency_trouble"  # from a worker to its master: the test cannot go on, and why

logger = logging.getLogger("isolatency")


def add_options(parser: Any) -> None:
    add = parser.add_argument
    add(
        "--scenario", default="closed", choices=_arrivals.SCENARIOS,
        help="When requests start. Closed and single: when the last one was answered. Constant and poisson: --rate per "
        "second, however long answers take; latency counts from the intended start. Offline: all rows at once.",
    )  # fmt: skip
    add(
        "--rate", type=float, default=0.0,
        help="Requests per second over all users and workers, from when all are connected (constant, poisson).",
    )  # fmt: skip
    add(
        "--spin-us", type=float, default=0.0,
        help="Be awake for so long before each intended start: less lateness for more CPU.",
    )  # fmt: skip
    add("--model", default="knn", help="The model to ask: knn, dnn or null (null costs nothing: isolation alone).")
    add("--rows", type=int, default=1, help="Rows per request, a batch; real rows of the model's data set, varied.")
    add(
        "--check", type=int, default=10,
        help="Compare every n-th answer of a connection with the stored one; a wrong one is a failure. 0: never.",
    )  # fmt: skip
    add("--seed", type=int, default=1, help="Which rows are sent, and in which order, is drawn from this number.")
    add(
        "--samples", default="",
        help="Write one row per request, with times in nanoseconds, to this .parquet or .csv file, anew for each test "
        "(with --processes: FILE-0.parquet and so on). Locust's own terminal tables round to whole milliseconds.",
    )  # fmt: skip
    add(
        "--encoding", default="binary", choices=ENCODINGS,
        help="Tensors as bytes (the protocol's binary extension), or as JSON numbers, which cost the server more.",
    )  # fmt: skip
    add("--request-timeout", type=float, default=10.0, help="Seconds after which a request without answer has failed.")
    add(
        "--data", default="", help="Query rows of your own: an .npz file with rows (n, d) and, for --check, labels (n)."
    )
    for name, what in (("plan", "PLAN.json"), ("endpoints", "ENDPOINTS.json"), ("out", "the run folder")):
        add(
            f"--{name}", default="", include_in_web_ui=False,
            help=f"Run mode, as `isolatency run` starts it: {what}. The three go together, with --headless.",
        )  # fmt: skip


class InferenceUser(User):
    """One keep-alive connection; in a closed loop it sends its next request as soon as the last one is answered."""

    wait_time = constant(0)
    _connection: Connection | None = None

    def on_start(self) -> None:
        self._connection = mode.add_user()

    @task
    def infer(self) -> None:
        """The engine does the work; a user is a connection's place in it."""
        (Event() if self._connection is None else self._connection.rested).wait()

    def stop(self, force: bool = False) -> bool:
        if not force and self._connection is not None:
            mode.rest_user(self._connection)
        return bool(super().stop(force))

    def on_stop(self) -> None:
        if self._connection is not None:
            mode.remove_user(self._connection)


class Mode:
    """What the two modes share. `error` ends the test; its one line is the last one that is printed."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment
        self.options = environment.parsed_options
        self.engine: Engine | None = None
        self.error: Exception | None = None
        if not isinstance(environment.runner, MasterRunner):
            # Python would raise KeyboardInterrupt wherever it is, which is mostly inside the engine.
            gevent.signal_handler(signal.SIGINT, gevent.get_hub().handle_system_error, KeyboardInterrupt, None)

    def add_user(self) -> Connection | None:
        return None

    def rest_user(self, connection: Connection) -> None: ...

    def remove_user(self, connection: Connection) -> None: ...

    def start(self) -> None: ...

    def spawned(self) -> None: ...

    def stopping(self) -> None: ...

    def stop(self) -> None: ...

    def quitting(self) -> None: ...

    def last_words(self) -> list[str]:
        return [f"error: {self.error}"] if self.error is not None else []

    def new_engine(self, timeout_s: float, spin_ns: int) -> Engine:
        gc.collect()
        gc.freeze()  # a collection that walks all of Locust's modules takes tens of ms, in the middle of a request
        return Engine(timeout_s, self.fail, spin_ns)

    def fail(self, error: Exception) -> None:
        """End the test; called from anywhere, also from the hub."""
        if self.error is not None:
            return
        self.error = error
        if not isinstance(error, IsolatencyError):
            logger.error("".join(traceback.format_exception(error)))
        self.environment.process_exit_code = getattr(error, "exit_code", 1)
        gevent.spawn(self._end)

    def _end(self) -> None:
        runner = self.environment.runner
        if isinstance(runner, WorkerRunner):
            code = self.environment.process_exit_code
            runner.send_message(TROUBLE, {"message": str(self.error), "code": code})  # the master ends it everywhere
        elif self.options.headless:
            runner.quit()
        else:
            logger.error(str(self.error))
            runner.log_exception("local", str(self.error), "")  # which the page shows
            runner.stop()
            self.error = self.environment.process_exit_code = None


class _Trouble(IsolatencyError):
    """What a worker ran into."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Plain(Mode):
    """One target, as Locust users know it."""

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self._load: _plain.Load | None = None
        self._flusher: Any = None
        self._master: _workers.Master | None = None
        self._worker: _workers.Worker | None = None
        self._effort = Effort()
        runner = environment.runner
        if isinstance(runner, MasterRunner):  # its workers know whether they reach the target
            runner.register_message(
                TROUBLE, lambda msg, **_: self.fail(_Trouble(msg.data["message"], msg.data["code"]))
            )
            self._master = _workers.Master(environment, self._finished)
        elif isinstance(runner, WorkerRunner):
            self._worker = _workers.Worker(environment, self._begin, self._finish)
        elif self.options.headless:
            self._load = self._new_load()

    def _wanted(self) -> _plain.Options:
        return _plain.options(self.environment.host, self.options)

    def _new_load(self) -> _plain.Load:
        runner = self.environment.runner
        worker = runner.worker_index if isinstance(runner, WorkerRunner) else None
        load = _plain.Load(self._wanted(), self.environment.stats, worker)
        if load.unchecked:
            logger.warning("the query rows come without labels: no answer is compared (--check)")
        return load

    def start(self) -> None:
        if self._master is not None:
            self._master.start()
            return
        try:
            self._load = self._load or self._new_load()
        except IsolatencyError as error:
            self.fail(error)
            return
        self.engine = self.new_engine(self.options.request_timeout, self._load.spin_ns)
        self._effort, self._begun = Effort(), False
        self._warming = bool(self.environment.reset_stats)  # what comes before all users are there is warm-up then
        self._ended, self._finishing, self._finish_done = Event(), False, Event()
        self._mark = (time.process_time_ns(), time.monotonic_ns())
        self._flusher = gevent.spawn(self._flush_now_and_then)
        if self._worker is not None:
            self._worker.start()

    def add_user(self) -> Connection | None:
        if self._load is None or self.engine is None:
            return None  # the test could not be started: the user waits until it is ended
        connection = self._load.add_user()
        self.engine.join(connection, active=not self._load.load.open)
        return connection

    def rest_user(self, connection: Connection) -> None:
        if self.engine is not None:
            self.engine.rest(connection)

    def remove_user(self, connection: Connection) -> None:
        if self.engine is not None and self._load is not None:
            self.engine.leave(connection)
            self._load.remove_user(connection)

    def spawned(self) -> None:
        if self._master is not None:
            self._master.begin()
        elif self._load is not None and self.engine is not None:
            if self.environment.reset_stats:
                self._load.flush(self.engine, count=False)
                self._warming = False
            if self._worker is None:
                gevent.spawn(self._begin_when_connected, self.engine)

    def _begin_when_connected(self, engine: Engine) -> None:
        end_s = time.monotonic() + CONNECT_S
        while engine.connected < self.environment.runner.user_count and time.monotonic() < end_s:
            gevent.sleep(0.005)
        self._begin(time.monotonic_ns() + LEAD_NS, 0, 1)

    def _begin(self, start_ns: int, worker: int, workers: int) -> None:
        """All users of all workers are connected."""
        if self.engine is None or self._load is None or self._begun or self._finishing:
            return
        self._begun = True
        self._mark = (time.process_time_ns(), time.monotonic_ns())
        if self._load.load.open:
            self.engine.begin(self._load.schedule(start_ns, worker, workers))

    def _flush_now_and_then(self) -> None:
        while not self._ended.wait(FLUSH_S):
            try:
                assert self._load is not None and self.engine is not None
                self._load.flush(self.engine, count=not self._warming)
                self._effort.add(self.engine.take_pace())
            except IsolatencyError as error:
                self.fail(error)
                return
            if self.engine.finished:
                gevent.spawn(self._finished if self._worker is None else self._finish)
                return

    def _finished(self) -> None:
        """The load has come to its end by itself."""
        runner = self.environment.runner
        (runner.quit if self.options.headless else runner.stop)()

    def stopping(self) -> None:
        if self._master is not None:
            self._master.end()
        else:
            self._finish()

    def _finish(self) -> None:
        """Wait for the answers that are due; then nothing more is recorded. Once per test."""
        load, engine = self._load, self.engine
        if load is None or engine is None:
            return
        if self._finishing:
            self._finish_done.wait(timeout=2 * DRAIN_S)
            return
        self._finishing = True
        engine.drain(min(self.options.request_timeout + DRAIN_MARGIN_S, DRAIN_S))
        self._ended.set()
        self._flusher.join()  # it may be in the middle of writing the samples
        try:
            load.flush(engine)
            if self._worker is not None:
                offset = self._worker.offset
                load.note(ahead_of_master_ns=offset.monotonic_ns, ahead_of_master_error_ns=offset.error_ns)
            in_thread(load.close)  # joining many parts takes seconds, and Locust's heartbeat goes on
        except IsolatencyError as error:
            self.fail(error)
        self._effort.add(engine.take_pace())
        cpu_ns, wall_ns = self._mark
        self._effort.end(time.process_time_ns() - cpu_ns, time.monotonic_ns() - wall_ns)
        if self._worker is not None:
            self._worker.report(self._effort)
        self._finish_done.set()

    def stop(self) -> None:
        if self._master is not None or self.engine is None:
            return
        self._finish()
        self.engine.close()
        self._load = self.engine = None

    def quitting(self) -> None:
        self.stopping()  # before Locust decides on its exit code
        self.stop()
        if self._master is not None and self._master.lost:
            self.environment.process_exit_code = self.environment.process_exit_code or 1

    def last_words(self) -> list[str]:
        if self._worker is not None:
            return []
        words = _tally.summary(self.environment.stats)
        if self._master is not None:
            words += self._master.effort.words() + self._master.words()
        else:
            words += self._effort.words()
        return words + super().last_words()


class Run(Mode):
    """All cells of one phase of a plan; as many users as the largest load has connections."""

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        given = self.options
        if not (given.plan and given.endpoints and given.out and given.headless):
            raise UsageError("run mode wants --headless, --plan FILE, --endpoints FILE and --out DIR together")
        plan, targets = _session.read(Path(given.plan), Path(given.endpoints))
        data = Path(given.data) if given.data else _models.DATA
        self._session = _session.Session(plan, targets, Path(given.out), data, environment.stats)
        self._greenlet: Any = None
        self._interrupted = False
        given.num_users = given.spawn_rate = self._session.users
        given.run_time, given.only_summary = None, True
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))  # until Locust puts its own handler there

    def start(self) -> None:
        plan = self._session.plan
        self.engine = self.new_engine(plan.request_timeout_s, round(plan.client_spin_us * 1000))

    def spawned(self) -> None:
        if self._greenlet is None:
            self._greenlet = gevent.spawn(self._run)

    def _run(self) -> None:
        assert self.engine is not None
        try:
            self._session.run(self.engine)
        except Exception as error:
            self.fail(error)
        if not self._interrupted and self.error is None:
            self.environment.process_exit_code = 1 if self._session.failures else 0
            self.environment.runner.quit()

    def quitting(self) -> None:
        if not self._session.done and self.error is None:
            self._interrupted = True
            self.environment.process_exit_code = 130
            if self.engine is not None and self._greenlet is not None:
                self.engine.cut_short()
                self._greenlet.join(timeout=CUT_BOUND_S)

    def last_words(self) -> list[str]:
        words = [f"error: {self._session.failed_line()}"] if self._session.failures else []
        words += ["error: interrupted; what was measured until then is kept, marked partial"] * self._interrupted
        return words + super().last_words()


mode: Mode


def on_init(environment: Any, **_: Any) -> None:
    global mode
    given = environment.parsed_options
    try:
        _tally.show_truth(locust.stats)
        mode = (Run if given.plan or given.endpoints or given.out else Plain)(environment)
    except IsolatencyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def on_quit(**_: Any) -> None:
    for line in mode.last_words():
        print(line, file=sys.stderr)


def refuse_many_processes(words: Sequence[str]) -> None:
    """A run is one process. Said while this file is imported: after that Locust forks, and waits for its children."""
    several = ("--processes", "--master", "--worker")
    if any(word.startswith("--plan") for word in words) and any(word.startswith(several) for word in words):
        print("error: run mode takes one Locust process; leave --processes, --master and --worker out", file=sys.stderr)
        sys.exit(2)


refuse_many_processes(sys.argv[1:])
hooks: Any = events  # Locust's are not typed
hooks.init_command_line_parser.add_listener(add_options)
hooks.init.add_listener(on_init)
hooks.test_start.add_listener(lambda **_: mode.start())
hooks.spawning_complete.add_listener(lambda **_: mode.spawned())
hooks.test_stopping.add_listener(lambda **_: mode.stopping())
hooks.test_stop.add_listener(lambda **_: mode.stop())
hooks.quitting.add_listener(lambda **_: mode.quitting())
hooks.quit.add_listener(on_quit)
