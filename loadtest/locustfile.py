"""What `locust -f loadtest/` runs: InferenceUser, one keep-alive connection in a closed loop, and our options.

Two ways in: plain Locust (its page, its command line, `--processes`) drives one target, given as the host; run mode
(`--plan`, as `isolatency run` starts it) takes all cells of a plan in blocks that go round several targets.
"""

import gc
import logging
import signal
import sys
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
from loadtest import _models, _plain, _session, _tally
from loadtest._connection import Connection
from loadtest._engine import Engine

FLUSH_S = 0.5
CUT_BOUND_S = 1.5  # a run that is interrupted has closed its files by then
TROUBLE = "isolatency_trouble"  # from a worker to its master: the test cannot go on, and why

logger = logging.getLogger("isolatency")


def add_options(parser: Any) -> None:
    add = parser.add_argument
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
    """One keep-alive connection that sends its next request as soon as the last one is answered."""

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

    def stop(self) -> None: ...

    def quitting(self) -> None: ...

    def last_words(self) -> list[str]:
        return [f"error: {self.error}"] if self.error is not None else []

    def new_engine(self, timeout_s: float) -> Engine:
        gc.collect()
        gc.freeze()  # a collection that walks all of Locust's modules takes tens of ms, in the middle of a request
        return Engine(timeout_s, self.fail)

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
        runner = environment.runner
        if isinstance(runner, MasterRunner):  # its workers know whether they reach the target
            runner.register_message(
                TROUBLE, lambda msg, **_: self.fail(_Trouble(msg.data["message"], msg.data["code"]))
            )
        elif self.options.headless and not isinstance(runner, WorkerRunner):
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
        if isinstance(self.environment.runner, MasterRunner):
            return
        try:
            self._load = self._load or self._new_load()
        except IsolatencyError as error:
            self.fail(error)
            return
        self.engine = self.new_engine(self.options.request_timeout)
        self._ended = Event()
        self._flusher = gevent.spawn(self._flush_now_and_then)

    def add_user(self) -> Connection | None:
        if self._load is None or self.engine is None:
            return None  # the test could not be started: the user waits until it is ended
        connection = self._load.add_user()
        self.engine.join(connection)
        return connection

    def rest_user(self, connection: Connection) -> None:
        if self.engine is not None:
            self.engine.rest(connection)

    def remove_user(self, connection: Connection) -> None:
        if self.engine is not None and self._load is not None:
            self.engine.leave(connection)
            self._load.remove_user(connection)

    def spawned(self) -> None:
        if self.environment.reset_stats and self._load is not None and self.engine is not None:
            self._load.flush(self.engine, count=False)

    def _flush_now_and_then(self) -> None:
        while not self._ended.wait(FLUSH_S):
            try:
                assert self._load is not None and self.engine is not None
                self._load.flush(self.engine)
            except IsolatencyError as error:
                self.fail(error)
                return

    def stop(self) -> None:
        if self.engine is not None:
            self._ended.set()
            self._flusher.join()  # it may be in the middle of writing the samples
        load, engine = self._load, self.engine
        self._load = self.engine = None
        if load is None or engine is None:
            return
        try:
            load.flush(engine)
            load.close()
        except IsolatencyError as error:
            self.fail(error)
        engine.close()

    def quitting(self) -> None:
        self.stop()  # before Locust decides on its exit code

    def last_words(self) -> list[str]:
        if isinstance(self.environment.runner, WorkerRunner):
            return []
        return _tally.summary(self.environment.stats) + super().last_words()


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
        self.engine = self.new_engine(self._session.plan.request_timeout_s)

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
        _tally.show_fractions(locust.stats)
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
hooks.test_stop.add_listener(lambda **_: mode.stop())
hooks.quitting.add_listener(lambda **_: mode.quitting())
hooks.quit.add_listener(on_quit)
