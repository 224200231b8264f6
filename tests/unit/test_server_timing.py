"""Where the time of a request goes: in its own header, in /metrics and in Triton's statistics, and all three agree."""

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from tests.unit import own_models
from tests.unit.serving import DATA, Answer, Running, exchange, request, serving, wait_for
from tests.unit.test_server_batching import at_once, own, pair, stats
from tests.unit.test_server_errors import parse

STAGES = ["read", "parse", "queue", "batch", "compute", "serialise"]
ROWS = np.load(DATA / "knn.npz")["rows"]
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    arguments = ["--model", "knn", "--model", "dnn", *own("Slow", "Sleepy")]
    with serving(tmp_path_factory.mktemp("server"), *arguments) as running:
        yield running


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Running]:
    arguments = ["--model", "knn", "--model", "null", *own("Fails", "Slow"), "--model-timeout", "1", "--max-queue", "8"]
    with serving(tmp_path, *arguments) as running:
        yield running


def timing(answer: Answer) -> dict[str, int]:
    """Nanoseconds by stage, total last."""
    found = re.findall(r"(\w+);dur=(\d+\.\d{6})(?:, |$)", answer.headers["server-timing"])
    assert [name for name, _ in found] == [*STAGES, "total"]
    return {name: round(float(ms) * 1e6) for name, ms in found}


def fits(answer: Answer, took_ns: float) -> dict[str, int]:
    assert answer.status == 200, answer.body
    found = timing(answer)
    assert abs(sum(found[name] for name in STAGES) - found["total"]) <= 1000
    assert found["total"] <= took_ns
    return found


def timed(running: Running, model: str, body: Any, **headers: str) -> dict[str, int]:
    with contextlib.closing(running.connect()) as line:
        line.connect()
        start = time.monotonic_ns()
        answer = exchange(line, "POST", f"/v2/models/{model}/infer", body, **headers)
        return fits(answer, time.monotonic_ns() - start)


def test_stages_sum_to_the_total_which_is_less_than_the_clients(server: Running) -> None:
    for rows in (1, 7, 400, 4000):  # the last ones by way of a thread
        found = timed(server, "knn", request(np.resize(ROWS, (rows, 30))))
        assert found["compute"] > 0
        head = json.dumps({"inputs": [{"name": "x", "shape": [rows, 30], "datatype": "FP32", "parameters": {"binary_data_size": rows * 120}}], "parameters": {"binary_data_output": True}}).encode()  # fmt: skip
        body = head + np.resize(ROWS, (rows, 30)).astype("<f4").tobytes()
        timed(server, "knn", body, Inference_Header_Content_Length=str(len(head)), Accept_Encoding="gzip")
    assert timed(server, "sleepy", pair(1))["compute"] > 40_000_000


def test_waiting_for_the_model_is_the_queue(server: Running) -> None:
    start = time.monotonic_ns()
    answers = at_once(server, [("slow", pair(1)), *[("slow", pair(2))] * 3, ("sleepy", pair(3)), ("sleepy", pair(4))])
    took = time.monotonic_ns() - start
    for answer in answers:
        found = fits(answer, took)
        assert found["compute"] > 40_000_000
        assert found["queue"] < 4_000_000_000
    assert sum(timing(one)["total"] for one in answers) > sum(timing(one)["compute"] for one in answers)


def test_reading_is_from_the_first_byte_to_the_last(server: Running) -> None:
    body = json.dumps(request(ROWS[:1])).encode()
    head = b"POST /v2/models/knn/infer HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(
        body
    )
    with socket.create_connection(server.address, timeout=60) as line:
        start = time.monotonic_ns()
        for piece in (head[:9], head[9:], body[:50], body[50:]):
            line.sendall(piece)
            time.sleep(0.05)
        answer = parse(b"".join(iter(lambda: line.recv(65536), b"")))
        found = fits(answer, time.monotonic_ns() - start)
    assert found["read"] > 100_000_000


def test_no_stage_is_negative_where_requests_are_pipelined(server: Running) -> None:
    body = json.dumps(request(ROWS[:1])).encode()
    one = b"POST /v2/models/knn/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    start = time.monotonic_ns()
    last = one.replace(b"Host: x", b"Host: x\r\nConnection: close")
    raw = server.raw(one * 30 + last)
    took = time.monotonic_ns() - start
    headers = re.findall(rb"Server-Timing: (.*)\r\n", raw)
    assert len(headers) == 31
    for header in headers:
        fits(Answer(200, {"server-timing": header.decode()}, b""), took)


def test_it_can_be_left_out(tmp_path: Path) -> None:
    with serving(tmp_path, "--model", "knn", "--no-timing") as running:
        answer = running.infer("knn", ROWS[:1])
        assert answer.status == 200
        assert "server-timing" not in answer.headers
        assert stats(running, "knn")["inference_stats"]["success"]["ns"] > 0


def samples(running: Running, accept: str = "") -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    answer = running.call("GET", "/metrics", Accept=accept) if accept else running.call("GET", "/metrics")
    assert answer.status == 200
    wanted = "application/openmetrics-text" if accept else "text/plain"
    assert answer.headers["content-type"].startswith(wanted)
    families = (openmetrics.text_string_to_metric_families if accept else text_string_to_metric_families)(
        answer.body.decode()
    )
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_prometheus_own_parser_reads_what_was_sent(fresh: Running, accept: str) -> None:
    knn = (("model", "knn"), ("version", "1"))
    found = [timed(fresh, "knn", request(ROWS[:rows])) for rows in (1, 2, 3) for _ in range(10)]
    for body in (b"{", b"{}", b"[]"):
        assert fresh.call("POST", "/v2/models/knn/infer", body).status == 400
    assert fresh.infer("ghost", ROWS).status == 404
    assert fresh.call("GET", "/v2/models/knn/infer").status == 405
    assert fresh.call("GET", "/v2/trace/setting").status == 501
    assert fresh.infer("fails", np.full((1, 2), own_models.RAISE)).status == 500
    assert {one.status for one in at_once(fresh, [("slow", pair(1, rows=4))] * 4)} == {200, 503}
    fresh.raw(b"nonsense\r\n\r\n")
    told = samples(fresh, accept)

    def value(name: str, *labels: tuple[str, str]) -> float:
        return told[f"isolatency_{name}", tuple(sorted(labels))]

    assert value("request_seconds_count", *knn) == value("requests_total", *knn, ("status", "200")) == 30
    assert value("request_seconds_sum", *knn) == pytest.approx(sum(one["total"] for one in found) / 1e9, abs=1e-6)
    for stage in STAGES:
        assert value("stage_seconds_count", *knn, ("stage", stage)) == 30
        total = sum(one[stage] for one in found) / 1e9
        assert value("stage_seconds_sum", *knn, ("stage", stage)) == pytest.approx(total, abs=1e-6)
    assert value("stage_seconds_count", *knn, ("stage", "write")) == 30
    assert value("rows_total", *knn) == 60
    assert value("requests_total", *knn, ("status", "400")) == 3
    assert value("requests_total", ("model", "fails"), ("version", "1"), ("status", "500")) == 1
    by_status = {
        status: value("errors_total", ("status", status)) for status in ("400", "404", "405", "500", "501", "503")
    }
    slow = value("requests_total", ("model", "slow"), ("version", "1"), ("status", "503"))
    assert by_status == {"400": 4, "404": 1, "405": 1, "500": 1, "501": 1, "503": slow}
    assert value("queue_rows", ("model", "slow")) == 0
    assert value("connections") >= 1
    assert value("batch_rows_count", ("model", "knn")) == 30
    assert value("batch_rows_sum", ("model", "knn")) == 60
    assert told[("process_resident_memory_bytes", ())] > 0
    for name, labels in [("request_seconds", knn), ("batch_rows", knn[:1]), ("event_loop_lag_seconds", ())]:
        of = [
            (float(dict(key)["le"]), count)
            for (one, key), count in told.items()
            if one == f"isolatency_{name}_bucket" and set(labels) <= set(key)
        ]
        bounds, counts = [le for le, _ in of], [count for _, count in of]
        assert bounds == sorted(bounds)
        assert counts == sorted(counts)
        assert counts[-1] == value(f"{name}_count", *labels)
    lag = ("isolatency_event_loop_lag_seconds_count", ())
    wait_for(lambda: samples(fresh, accept)[lag] > 5, "a look at the event loop ten times a second")


def test_a_bucket_has_what_it_says(fresh: Running) -> None:
    found = [timed(fresh, "null", request(ROWS[:1]))["total"] for _ in range(50)]
    told = samples(fresh)
    for (name, labels), count in told.items():
        of = dict(labels)
        if name == "isolatency_request_seconds_bucket" and of["model"] == "null":
            assert count == sum(one <= float(of["le"]) * 1e9 * (1 + 1e-9) for one in found)


def test_bounds_are_from_10_us_to_10_s(fresh: Running) -> None:
    bounds = {dict(labels)["le"] for name, labels in samples(fresh) if name == "isolatency_request_seconds_bucket"}
    finite = sorted(float(one) for one in bounds)
    assert finite[0] == 1e-05
    assert finite[-2:] == [10.0, float("inf")]


def test_tritons_form_has_the_same_sums(fresh: Running) -> None:
    found = [timed(fresh, "knn", request(ROWS[:rows])) for rows in (1, 5, 40)]
    for _ in range(2):
        assert fresh.call("POST", "/v2/models/knn/infer", b"{").status == 400
    one = stats(fresh, "knn")
    told = one["inference_stats"]
    assert one["name"] == "knn"
    assert one["version"] == "1"
    assert one["inference_count"] == one["execution_count"] == 3
    assert abs(one["last_inference"] - time.time() * 1000) < 60_000
    sums = {name: sum(each[name] for each in found) for name in (*STAGES, "total")}
    wanted = {
        "success": sums["total"], "queue": sums["queue"], "compute_input": sums["parse"] + sums["batch"],
        "compute_infer": sums["compute"], "compute_output": sums["serialise"],
    }  # fmt: skip
    assert {name: told[name] for name in wanted} == {name: {"count": 3, "ns": ns} for name, ns in wanted.items()}
    assert told["fail"]["count"] == 2
    assert told["fail"]["ns"] > 0
    assert [(each["batch_size"], each["compute_infer"]["count"]) for each in one["batch_stats"]] == [
        (1, 1),
        (5, 1),
        (40, 1),
    ]
    assert sum(each["compute_infer"]["ns"] for each in one["batch_stats"]) == sums["compute"]
    everything = fresh.call("GET", "/v2/models/stats").json["model_stats"]
    assert one in everything
    assert [each["name"] for each in everything] == ["knn", "null", "fails", "slow"]
    assert stats(fresh, "null")["inference_count"] == 0
    assert fresh.call("GET", "/v2/models/knn/versions/1/stats").json["model_stats"] == [one]


def test_clients_that_are_gone_are_counted_apart(fresh: Running) -> None:
    body = json.dumps(pair(1)).encode()
    head = b"POST /v2/models/slow/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    fresh.hang_up_after(head + body)
    gone = ("isolatency_requests_total", (("model", "slow"), ("status", "499"), ("version", "1")))
    wait_for(lambda: samples(fresh).get(gone) == 1, "a request whose client is gone")


def test_lag_is_what_a_held_up_event_loop_has(fresh: Running) -> None:
    def late() -> float:
        """How often it was later than 100 ms."""
        told = samples(fresh)
        bucket = next(n for (name, labels), n in told.items() if name.endswith("lag_seconds_bucket") and float(dict(labels)["le"]) == pytest.approx(0.1))  # fmt: skip
        return told["isolatency_event_loop_lag_seconds_count", ()] - bucket

    before = late()
    assert fresh.infer("fails", np.full((1, 2), own_models.LOOP)).status == 500
    assert late() > before
