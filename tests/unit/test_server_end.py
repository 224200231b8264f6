"""The end at SIGTERM: nothing accepted is dropped, everybody is told, and it comes within the grace."""

import contextlib
import http.client
import json
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.own_models import STUBBORN
from tests.unit.serving import DATA, Running, exchange, request, serving, wait_for
from tests.unit.test_server_batching import Gate, held, hold, own, pair
from tests.unit.test_server_errors import parse

KNN = request(np.load(DATA / "knn.npz")["rows"][:3])
BOUND_S = 60.0  # for what takes a second or two


def ended(running: Running) -> None:
    assert running.process.wait(BOUND_S) == 0
    lines = running.log().splitlines()
    assert [line.split(": ")[1].split(" ")[0] for line in lines] == ["listening", "stopping", "stopped"], lines


def stopping(running: Running) -> None:
    running.process.terminate()
    wait_for(lambda: "stopping" in running.log(), "the end to begin")


def refuses(running: Running) -> bool:
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(running.address, timeout=BOUND_S):
        return False
    return True


class Client(threading.Thread):
    """Asks on one connection, one request after the other, until an answer says close."""

    def __init__(self, running: Running, model: str, body: Any) -> None:
        super().__init__()
        self._line, self._path, self._body = running.connect(), f"/v2/models/{model}/infer", body
        self.statuses: list[int] = []
        self.closed = False
        self.wrong: Exception | None = None

    def run(self) -> None:
        try:
            while not self.closed:
                answer = exchange(self._line, "POST", self._path, self._body)
                self.statuses.append(answer.status)
                self.closed = answer.headers.get("connection") == "close"
            assert self._line.sock is None  # http.client has closed it, as it was told
        except (OSError, http.client.HTTPException, AssertionError) as error:
            self.wrong = error


@pytest.mark.parametrize("model", ["knn", "slow", "single"])
def test_16_busy_connections_lose_nothing(tmp_path: Path, model: str) -> None:
    with serving(tmp_path, "--model", "knn", *own("Slow", "Single")) as running:
        clients = [Client(running, model, KNN if model == "knn" else pair(1)) for _ in range(16)]
        for one in clients:
            one.start()
        wait_for(lambda: all(one.statuses for one in clients), "an answer for each")
        start = time.monotonic()
        stopping(running)
        for one in clients:
            one.join(BOUND_S)
        ended(running)
        took = time.monotonic() - start
    assert [one.wrong for one in clients] == [None] * 16
    assert all(one.closed for one in clients)
    assert {status for one in clients for status in one.statuses} == {200}
    assert took < 50  # five times the grace


def test_who_is_in_the_accept_queue_is_answered(tmp_path: Path) -> None:
    """40 connections, each with a request, that the server sees together with the signal, in either order: an answer
    made before it saw that says nothing of a close."""
    body = json.dumps(KNN).encode()
    asked = b"POST /v2/models/knn/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with serving(tmp_path, "--model", "knn") as running, contextlib.ExitStack() as kept:
        with held(running):
            running.process.terminate()
            lines = [kept.enter_context(socket.create_connection(running.address, timeout=BOUND_S)) for _ in range(40)]
            for line in lines:
                line.sendall(asked)
        for line in lines:
            answer = parse(b"".join(iter(lambda line=line: line.recv(65536), b"")))
            assert answer.status == 200
        ended(running)


def test_ready_is_503_at_once_and_nobody_new_is_let_in(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with serving(tmp_path, *gate.model) as running, contextlib.ExitStack() as kept:
        lines = [kept.enter_context(contextlib.closing(running.connect())) for _ in range(3)]
        for line in lines:
            assert exchange(line, "GET", "/v2/health/ready", None).status == 200
        busy = hold(running, "gate", kept)
        gate.begun()
        stopping(running)
        answer = exchange(lines[0], "GET", "/v2/health/ready", None)
        assert answer.status == 503
        assert answer.json.keys() == {"error"}
        assert answer.headers["connection"] == "close"
        assert exchange(lines[1], "GET", "/v2/health/live", None).status == 200
        assert refuses(running)
        gate.open()
        told = busy.getresponse()
        assert told.status == 200
        assert told.getheader("Connection") == "close"
        ended(running)


def test_half_a_request_may_still_become_whole(tmp_path: Path) -> None:
    with (
        serving(tmp_path, "--model", "knn") as running,
        socket.create_connection(running.address, timeout=BOUND_S) as line,
    ):
        body = json.dumps(KNN).encode()
        whole = b"POST /v2/models/knn/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        line.sendall(whole[:-10])
        assert running.call("GET", "/v2/health/live").status == 200
        stopping(running)
        line.sendall(whole[-10:])
        answer = parse(b"".join(iter(lambda: line.recv(65536), b"")))
        assert answer.status == 200
        assert answer.headers["connection"] == "close"
        ended(running)


def test_a_large_answer_is_taken_slowly_to_its_end(tmp_path: Path) -> None:
    rows = np.resize(np.load(DATA / "knn.npz")["rows"], (1000, 30))
    body = json.dumps(request(rows, parameters={"k": 569}, outputs=[{"name": "distances"}])).encode()
    asked = b"POST /v2/models/knn/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with serving(tmp_path, "--model", "knn", "--grace", "120") as running, contextlib.ExitStack() as kept:
        line = kept.enter_context(socket.create_connection(running.address, timeout=BOUND_S))
        line.sendall(asked)
        found = [line.recv(100)]  # it is there, and most of it has no room in the kernel
        running.process.terminate()
        for _ in range(20):
            time.sleep(0.15)  # all in all longer than a server without work waits
            found.append(line.recv(2**16))
        answer = parse(b"".join([*found, *iter(lambda: line.recv(2**20), b"")]))
        assert answer.status == 200 and len(answer.body) == int(answer.headers["content-length"]) > 8 * 2**20
        ended(running)


def test_idle_connections_do_not_keep_it(tmp_path: Path) -> None:
    with serving(tmp_path, "--model", "knn", "--grace", "600") as running, contextlib.ExitStack() as kept:
        lines = [kept.enter_context(contextlib.closing(running.connect())) for _ in range(50)]
        for line in lines[10:]:
            assert exchange(line, "POST", "/v2/models/knn/infer", KNN).status == 200
        for line in lines[:10]:
            line.connect()
        running.process.terminate()
        ended(running)  # long before the grace is over
        assert all(line.sock.recv(10) == b"" for line in lines)


@pytest.mark.parametrize("grace", ["0", "1"])
def test_the_grace_bounds_it(tmp_path: Path, grace: str) -> None:
    gate = Gate(tmp_path)
    with (
        serving(tmp_path, *gate.model, *own("FailsInThread"), "--grace", grace) as running,
        contextlib.ExitStack() as kept,
    ):
        hold(running, "gate", kept)
        gate.begun()
        line = kept.enter_context(contextlib.closing(running.connect()))
        line.request("POST", "/v2/models/fails-in-thread/infer", json.dumps(pair(STUBBORN)))
        dripping = kept.enter_context(socket.create_connection(running.address, timeout=BOUND_S))
        over = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                dripping.sendall(b"POST /v2/models/gate/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
                while not over.wait(0.1):
                    dripping.sendall(b" ")

        thread = threading.Thread(target=drip)
        thread.start()
        running.process.terminate()
        ended(running)
        over.set()
        thread.join()


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with serving(tmp_path, *gate.model, "--grace", "600") as running, contextlib.ExitStack() as kept:
        hold(running, "gate", kept)
        gate.begun()
        stopping(running)
        assert running.process.poll() is None
        running.process.send_signal(signal.SIGTERM)
        ended(running)
