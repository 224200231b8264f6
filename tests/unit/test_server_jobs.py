"""Batch jobs over HTTP: their life, their results, and what is left of them: nothing."""

import contextlib
import http.client
import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.unit.serving import STOP_S, Running, serving, wait_for

FAST = {"job": "knn", "rows": 60}
LONG = {"job": "dnn", "rows": 2000, "epochs": 500}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with serving(tmp_path, "--model", "null", "--jobs") as running:
        yield running


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    return tmp_path / "tmp"


def begin(server: Running, **job: Any) -> str:
    answer = server.call("POST", "/jobs", job)
    assert answer.status == 201, answer.body
    assert answer.json["state"] == "running"
    identifier = answer.json["id"]
    assert isinstance(identifier, str)
    return identifier


def end(server: Running, identifier: str) -> dict[str, Any]:
    answer = server.call("GET", f"/jobs/{identifier}?wait=1")
    assert answer.status == 200
    state: dict[str, Any] = answer.json
    assert state.keys() == {"id", "job", "state", "progress", "seconds", "result", "error"}
    assert state["id"] == identifier
    return state


def children(server: Running) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def gone(server: Running, temporary: Path) -> None:
    """No process and no file is left of any job."""
    wait_for(lambda: not children(server), "the job's process to end")
    wait_for(lambda: not list(temporary.iterdir()), f"{temporary} to be empty again")


def test_knn_is_the_reports_experiment(server: Running, temporary: Path) -> None:
    state = end(server, begin(server, job="knn", rows=569, seed=1))
    assert state["job"] == "knn"
    assert state["state"] == "done"
    assert state["progress"] == 1
    assert state["error"] is None
    assert state["seconds"] > 0
    result = state["result"]
    by_k = next(value for value in result.values() if isinstance(value, dict))
    assert [int(k) for k in by_k] == [1, 3, 5, 7, 9]
    assert result["accuracy"] == by_k["5"]
    assert all(0.85 < accuracy <= 1 for accuracy in by_k.values())
    assert 0.85 < result["precision"] <= 1
    assert 0.85 < result["recall"] <= 1
    gone(server, temporary)


def test_dnn_learns(server: Running, temporary: Path) -> None:
    state = end(server, begin(server, job="dnn", rows=1000, epochs=2, seed=3))
    assert state["state"] == "done"
    assert 0.7 < state["result"]["accuracy"] <= 1
    gone(server, temporary)


def test_more_digits_than_there_are_is_said(server: Running) -> None:
    result = end(server, begin(server, job="dnn", rows=5100, epochs=1))["result"]
    assert 5000 in result.values()


def test_a_seed_gives_the_same_result_again(server: Running) -> None:
    found = [end(server, begin(server, job=job, rows=64, epochs=1, seed=7))["result"] for job in ("dnn", "knn") * 2]
    assert found[0] == found[2]
    assert found[1] == found[3]


def test_few_rows_hold_both_classes(server: Running) -> None:
    for seed in range(3):
        result = end(server, begin(server, **FAST, seed=seed))["result"]
        assert result["recall"] is not None


def test_one_job_at_a_time(server: Running) -> None:
    identifier = begin(server, **LONG)
    second = server.call("POST", "/jobs", FAST)
    assert second.status == 409
    assert second.json.keys() == {"error"}
    (child,) = children(server)
    child.kill()
    assert end(server, identifier)["state"] == "failed"
    assert end(server, begin(server, **FAST))["state"] == "done"


def test_two_asked_for_at_once_are_one_and_a_409(server: Running) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: server.call("POST", "/jobs", FAST), range(4)))
    begun = [one for one in answers if one.status == 201]
    assert len(begun) >= 1
    assert {one.status for one in answers} <= {201, 409}
    assert end(server, begun[-1].json["id"])["state"] == "done"


def test_progress_is_seen_while_it_runs_and_the_server_serves(server: Running) -> None:
    identifier = begin(server, job="dnn", rows=2000, epochs=40)
    shares = []

    def further() -> bool:
        state = server.call("GET", f"/jobs/{identifier}").json
        assert state["state"] == "running"
        assert state["seconds"] is None
        assert state["result"] is None
        assert 0 <= state["progress"] < 1
        shares.append(state["progress"])
        return bool(shares[-1] > 0)

    wait_for(further, "progress", 300)
    assert shares == sorted(shares)
    assert server.call("GET", "/v2/health/ready").status == 200


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_job_that_is_killed_has_failed_and_says_how(server: Running, temporary: Path, number: signal.Signals) -> None:
    identifier = begin(server, **LONG)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(end, server, identifier)
        (child,) = children(server)
        os.kill(child.pid, number)
        state = held.result(60)
    assert state["state"] == "failed"
    assert state["result"] is None
    assert str(number.value) in state["error"] or number.name in state["error"]
    gone(server, temporary)
    assert end(server, identifier) == state
    assert end(server, begin(server, **FAST))["state"] == "done"


def test_a_job_that_runs_out_of_disk_says_so(tmp_path: Path) -> None:
    with serving(tmp_path, "--model", "null", "--jobs", prefix=["prlimit", "--fsize=100000"]) as running:
        answer = running.call("POST", "/jobs", {"job": "dnn", "rows": 5000, "epochs": 1})
        assert answer.status >= 500
        assert answer.json.keys() == {"error"}
        assert "File too large" in answer.json["error"]
        gone(running, tmp_path / "tmp")
        assert running.call("POST", "/jobs", {"job": "knn", "rows": 60}).status == 201


def test_a_client_that_goes_away_before_its_job_is_ready_blocks_nobody(server: Running, temporary: Path) -> None:
    server.hang_up_after(
        b"POST /jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 25\r\n\r\n"
        b'{"job": "knn", "rows":60}'
    )
    wait_for(lambda: server.call("POST", "/jobs", FAST).status == 201, "a job after the one that was left behind", 120)


def test_the_servers_end_ends_the_job(server: Running, temporary: Path) -> None:
    identifier = begin(server, **LONG)
    (child,) = children(server)
    with contextlib.closing(server.connect()) as connection:
        connection.request("GET", f"/jobs/{identifier}?wait=1")
        assert server.call("GET", f"/jobs/{identifier}").json["state"] == "running"  # so the one before has arrived
        server.process.terminate()
        held = connection.getresponse()
        assert json.loads(held.read())["state"] == "failed"
    assert server.process.wait(STOP_S) == 0
    assert not child.is_running()
    assert not list(temporary.iterdir())
    assert "Traceback" not in server.log()


def test_the_servers_end_ends_a_job_that_gets_ready(server: Running, temporary: Path) -> None:
    asking = threading.Thread(target=_quietly, args=(server, {"job": "dnn", "rows": 100_000, "epochs": 1}))
    asking.start()
    (child,) = wait_for(lambda: children(server), "the job's process")
    server.process.terminate()
    assert server.process.wait(STOP_S) == 0
    asking.join(STOP_S)
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the job's process to end")
    wait_for(lambda: not list(temporary.iterdir()), f"{temporary} to be empty")


def test_a_server_that_is_killed_takes_its_job_along(server: Running) -> None:
    begin(server, **LONG)
    (child,) = children(server)
    server.process.kill()
    server.process.wait(STOP_S)
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the job's process to end")


DEEP = b"[" * 1000 + b"]" * 1000


def _quietly(server: Running, job: dict[str, Any]) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        server.call("POST", "/jobs", job)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"1", b"{}", {"job": "fly"}, {"job": None}, {"job": ["knn"]}, {"job": {}},
        {"job": "knn", "rows": 0}, {"job": "knn", "rows": -5}, {"job": "knn", "rows": 570},
        {"job": "knn", "rows": 60.5}, {"job": "knn", "rows": "60"}, {"job": "knn", "rows": True},
        {"job": "knn", "rows": None}, {"job": "dnn", "rows": 64, "epochs": 0}, {"job": "dnn", "epochs": "1"},
        {"job": "knn", "seed": -1}, {"job": "knn", "seed": 1.5}, {"job": "knn", "unknown": 1},
        {"job": "dnn", "rows": 10**12}, DEEP, b'{"job": %s}' % DEEP, b'{"job": "knn", "rows": %s}' % DEEP,
    ],
)  # fmt: skip
def test_jobs_that_cannot_be(server: Running, body: Any) -> None:
    answer = server.call("POST", "/jobs", body)
    assert answer.status == 400
    assert answer.json.keys() == {"error"}
    assert not children(server)


def test_a_job_that_was_never_begun(server: Running) -> None:
    for path in ("/jobs/nothing", "/jobs/nothing?wait=1"):
        answer = server.call("GET", path)
        assert answer.status == 404
        assert answer.json.keys() == {"error"}


def test_without_jobs_there_are_none(tmp_path: Path) -> None:
    with serving(tmp_path, "--model", "null") as running:
        for answer in (running.call("POST", "/jobs", FAST), running.call("GET", "/jobs/1")):
            assert answer.status in (404, 501)
            assert "--jobs" in answer.json["error"]
