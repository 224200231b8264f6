"""Starting a target: waiting for its first answer, saying who it is, and what is left when that fails."""

import errno
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hostsetup import ledger as books
from hostsetup.ledger import Ledger
from hostsetup.lifecycle import DeathError, Lifecycle, bare_environment, get, in_words, tree_of
from hostsetup.target import Context, Spec
from hostsetup.url import Url
from images import shell
from images.errors import IsolatencyError, MissingError, TargetError

Answers = dict[str, tuple[int, bytes]]
Serve = Callable[[Answers], str]
READY = {"/v2/health/ready": (200, b"{}")}
BOUND_S = 60.0


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A server that gives these answers by path, 404 for any other; a status of 0 breaks the connection off."""
    servers = []

    def start(answers: Answers) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = answers.get(self.path, (404, b""))
                if not status:
                    self.wfile.write(body)
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.do_GET()

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    with Ledger.open("test", "lifecycle") as ledger:
        yield Context(ledger, None, (0,), ("--model", "knn"), tmp_path, boot_timeout_s=BOUND_S)


def url_target(context: Context, url: str, bound_s: float = BOUND_S) -> Url:
    bounded = Context(context.ledger, None, (0,), context.server_args, context.logs, boot_timeout_s=bound_s)
    return Url(Spec("prod", "url", options={"url": url}), bounded)


def entries(context: Context) -> list[object]:
    return list(next(owner for owner in books.owners() if owner.id == context.ledger.id).entries.values())


class Command(Lifecycle):
    """A host command as a target: what every kind shares, with nothing of a kind."""

    def __init__(self, context: Context, script: str, url: str) -> None:
        super().__init__(Spec("cmd", "process"), context)
        self._script, self._url = script, url

    def _start(self) -> str:
        mark = self._mark()
        with self._output() as console:
            self._process = shell.spawn(["/bin/sh", "-c", self._script], env=bare_environment(mark), stdout=console)
        self._stack.callback(self._process.wait)
        self._stack.callback(self._process.kill)
        return self._url

    def _ended(self) -> str | None:
        code = self._process.poll()
        return None if code is None else in_words(code)

    def pids(self) -> list[int]:
        return tree_of(self._process.pid)


def test_a_server_of_ours_says_who_it_is(serve: Serve, context: Context) -> None:
    identity = {"schema": 1, "tree_sha256": "ab"}
    meta = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 30]}]}
    url = serve(
        READY
        | {
            "/identity": (200, json.dumps(identity).encode()),
            "/v2/models/knn": (200, json.dumps(meta).encode()),
            "/v2/models/knn/infer": (200, b"{}"),
        }
    )
    target = url_target(context, url + "/")
    with target as endpoint:
        assert endpoint.url == url and endpoint.identity == identity and endpoint.accel is None
        assert endpoint.ready_s > 0 and endpoint.first_prediction_ms is not None and endpoint.first_prediction_ms > 0
        assert target.pids() == []
        target.check()


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"/identity": (200, b'{"service": "other"}')},
        {"/identity": (200, b"hello")},
        {"/identity": (200, b'["schema"]')},
        {"/identity": (500, b"{}")},
        {"/v2/models/knn": (200, b"{}")},
        {"/v2/models/knn": (200, b"no JSON")},
        {"/v2/models/knn": (200, b'{"inputs": []}')},
        {"/v2/models/knn": (200, b'{"inputs": [{"name": "x", "shape": ["?"]}]}')},
        {"/v2/models/knn": (200, b'{"inputs": ["x"]}')},
        {"/v2/models/knn": (200, b'{"inputs": [{"name": "x", "shape": [-1, 2]}]}'), "/v2/models/knn/infer": (400, b"")},
    ],
)
def test_an_unknown_server_is_still_a_target(more: Answers, serve: Serve, context: Context) -> None:
    with url_target(context, serve(READY | more)) as endpoint:
        assert endpoint.identity is None and endpoint.first_prediction_ms is None


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"/v2/health/ready": (503, b"")}, "status 503"),
        ({}, "status 404"),
        ({"/v2/health/ready": (0, b"garbage\r\n\r\n")}, "no HTTP"),
        ({"/v2/health/ready": (0, b"")}, "last: "),
    ],
)
def test_no_ready_answer_within_the_bound(answers: Answers, said: str, serve: Serve, context: Context) -> None:
    url = serve(answers)
    with pytest.raises(TargetError) as caught, url_target(context, url, bound_s=0.3):
        pytest.fail("it counts as ready")
    assert f"prod did not answer at {url} within 0.3 s" in str(caught.value) and said in str(caught.value)


def test_nobody_there_is_said_with_what_to_do(context: Context) -> None:
    with pytest.raises(TargetError, match=r"last: Connection refused\); start that server, or give its address"):
        url_target(context, "http://127.0.0.1:9", bound_s=0.3).__enter__()


def test_a_break_after_the_first_answer_is_an_error(serve: Serve, context: Context) -> None:
    with pytest.raises(TargetError, match="/identity broke off"):
        url_target(context, serve(READY | {"/identity": (0, b"")})).__enter__()


def test_a_death_at_the_start_is_an_error_with_the_console_of_this_start(context: Context) -> None:
    for number in (1, 2):
        target = Command(context, f"echo start {number}; echo; echo bad >&2; exit {number}", "http://127.0.0.1:9")
        with pytest.raises(DeathError, match=f"cmd ended with exit code {number}") as caught:
            target.__enter__()
        assert caught.value.detail == f"start {number}\nbad"
        assert entries(context) == []
    assert (context.logs / "cmd.console").read_text().count("start") == 2


def test_a_death_later_is_an_error_of_check(serve: Serve, context: Context) -> None:
    target = Command(context, "printf '%s\\n' $(seq 99); exec sleep 600", serve(READY))
    with target:
        while "99" not in (context.logs / "cmd.console").read_text():
            time.sleep(0.01)
        target.check()
        (pid,) = target.pids()
        subprocess.run(["kill", "-9", str(pid)], check=True)
        target._process.wait()
        with pytest.raises(TargetError, match="cmd was ended by signal 9") as caught:
            target.check()
        assert caught.value.detail.splitlines() == [str(number) for number in range(85, 100)]
        assert target.pids() == []
    assert entries(context) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (ValueError("what"), ValueError),
        (TargetError("what"), TargetError),
        (OSError(errno.ENOSPC, "No space left on device", "/f"), TargetError),
    ],
)
def test_whatever_ends_the_start_takes_everything_down(
    error: BaseException, said: type[BaseException], serve: Serve, context: Context
) -> None:
    class Interrupted(Command):
        def _first_prediction(self, url: str) -> float | None:
            raise error

    target = Interrupted(context, "exec sleep 600", serve(READY))
    with pytest.raises(said) as caught:
        target.__enter__()
    if isinstance(error, OSError):
        assert str(caught.value) == "cmd could not be started: No space left on device at /f"
    assert target._process.returncode == -9
    assert entries(context) == []


def test_an_interrupted_start_asks_nobody_to_end(serve: Serve, context: Context) -> None:
    """What takes its time when it is asked (a nested guest) is ended first, and only then taken down in order."""
    alive: list[bool] = []

    class Slow(Command):
        def _first_prediction(self, url: str) -> float | None:
            self._stack.callback(lambda: alive.append(self._process.poll() is None))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Slow(context, "exec sleep 600", serve(READY)).__enter__()
    assert alive == [False]
    assert entries(context) == []


def test_what_cannot_be_removed_does_not_hide_why_the_start_failed(context: Context) -> None:
    class Stubborn(Command):
        def _start(self) -> str:
            def refuse() -> None:
                raise IsolatencyError("the engine does not answer")

            self._stack.callback(refuse)
            return super()._start()

    with pytest.raises(DeathError, match="ended with exit code 3") as caught:
        Stubborn(context, "echo bad; exit 3", "http://127.0.0.1:9").__enter__()
    assert caught.value.detail == "bad\nthe engine does not answer"
    assert entries(context) == []


def test_a_kind_that_needs_images_names_the_command(context: Context) -> None:
    with pytest.raises(MissingError, match="cmd needs the images; run `isolatency images build`"):
        print(Command(context, "true", "").images)


def test_a_connection_has_a_bound_of_its_own(serve: Serve) -> None:
    """A bound for the connection, however short, does not cut the answer off."""
    ready = threading.Event()

    class Slow(dict[str, tuple[int, bytes]]):
        def get(self, key: str, default: object = None) -> tuple[int, bytes]:  # type: ignore[override]
            ready.wait(1.5)
            return 200, b"late"

    assert get(serve(Slow()), "/", timeout_s=60, connect_s=1.0) == (200, b"late")


def test_a_tree_of_processes(context: Context) -> None:
    process = subprocess.Popen(["/bin/sh", "-c", "sleep 600 & sleep 600 & echo up; wait"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        found = tree_of(process.pid)
        assert found[0] == process.pid and len(found) == 3
    finally:
        for pid in tree_of(process.pid):
            subprocess.run(["kill", "-9", str(pid)], check=True)
        process.communicate()
    assert tree_of(process.pid) == []
