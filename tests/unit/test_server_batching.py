"""Requests share calls of their model where they may, and nobody can tell from the answers."""

import contextlib
import json
import signal
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.serving import DATA, Answer, Running, exchange, outputs, request, serving, wait_for

OWN = Path(__file__).with_name("own_models.py")
ROWS = np.load(DATA / "knn.npz")["rows"]


def own(*names: str) -> list[str]:
    return [word for name in names for word in ("--model", f"{OWN}:{name}")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    arguments = ("--model", "knn", "--model", "dnn", *own("Slow", "Single", "Calls"))
    with serving(tmp_path_factory.mktemp("server"), *arguments) as running:
        yield running
        assert "error" not in running.log()


@contextlib.contextmanager
def held(running: Running) -> Iterator[None]:
    """What is sent meanwhile arrives at once, when the server goes on."""
    running.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        running.process.send_signal(signal.SIGCONT)


def at_once(running: Running, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[Answer]:
    """Each (model, request) on a connection of its own, all of them there before the server looks."""
    with contextlib.ExitStack() as kept:
        lines = [kept.enter_context(contextlib.closing(running.connect())) for _ in asked]
        for line in lines:
            assert exchange(line, "GET", "/v2/health/live", None).status == 200
        with held(running):
            for line, (model, body) in zip(lines, asked, strict=True):
                line.request("POST", f"/v2/models/{model}/infer", json.dumps(body))
        found = [line.getresponse() for line in lines]
        return [Answer(one.status, {k.lower(): v for k, v in one.getheaders()}, one.read()) for one in found]


def stats(running: Running, model: str) -> Any:
    return running.call("GET", f"/v2/models/{model}/stats").json["model_stats"][0]


def pair(first: float, rows: int = 1, **more: Any) -> dict[str, Any]:
    return request(np.full((rows, 2), first, np.float32), **more)


def mixed(rng: np.random.Generator) -> list[dict[str, Any]]:
    """48 requests of different rows, k and outputs, of which many may share a call."""
    names = ["label", "votes", "neighbours", "distances"]
    found = []
    for number in range(48):
        rows = ROWS[rng.integers(0, len(ROWS), int(rng.integers(1, 9)))]
        wanted = [{"name": str(name)} for name in rng.permutation(names)[: rng.integers(1, 5)]]
        more = {"parameters": {"k": int(rng.choice([1, 5, 7]))}} if number % 3 else {}
        found.append(request(rows, outputs=wanted, **more))
    return found


def test_those_that_share_a_call_are_answered_as_if_alone_bit_for_bit(server: Running) -> None:
    before = stats(server, "knn")
    asked = [body for seed in range(4) for body in mixed(np.random.default_rng(seed))]
    together = [
        answer for i in range(0, len(asked), 48) for answer in at_once(server, [("knn", b) for b in asked[i : i + 48]])
    ]
    after = stats(server, "knn")
    made = after["inference_count"] - before["inference_count"]
    assert made == len(asked)
    assert after["execution_count"] - before["execution_count"] < made / 2
    rows = [(one["batch_size"], one["compute_infer"]["count"]) for one in after["batch_stats"]]
    assert sum(count for _, count in rows) == after["execution_count"]
    assert max(size for size, _ in rows) > 16
    for body, answer in zip(asked, together, strict=True):
        assert answer.status == 200
        assert answer.body == server.call("POST", "/v2/models/knn/infer", body).body


def test_dnn_gives_close_probabilities_and_the_same_labels(server: Running) -> None:
    rows = np.load(DATA / "dnn.npz")["rows"][:32]
    bodies = [request(rows[i : i + 1 + i % 3]) for i in range(0, 32, 3)]
    for body, answer in zip(bodies, at_once(server, [("dnn", body) for body in bodies]), strict=True):
        alone = outputs(server.call("POST", "/v2/models/dnn/infer", body))
        assert np.array_equal(outputs(answer)["label"], alone["label"])
        assert np.allclose(outputs(answer)["probabilities"], alone["probabilities"], atol=1e-5)


def test_rows_and_calls_are_in_the_metrics(server: Running) -> None:
    at_once(server, [("calls", pair(1))] * 16)
    text = server.call("GET", "/metrics").body.decode()
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    told = stats(server, "calls")
    assert float(lines['isolatency_batch_rows_count{model="calls"}']) == told["execution_count"]
    assert float(lines['isolatency_batch_rows_sum{model="calls"}']) == sum(
        one["batch_size"] * one["compute_infer"]["count"] for one in told["batch_stats"]
    )
    assert float(lines['isolatency_rows_total{model="calls",version="1"}']) >= 16


def sizes(answers: Sequence[Answer]) -> list[int]:
    return [int(outputs(answer)["y"][0]) for answer in answers]


def test_as_many_as_came_share_a_call_up_to_max_batch(tmp_path: Path) -> None:
    with serving(tmp_path, *own("Calls"), "--max-batch", "10", "--max-delay-us", "500000") as running:
        assert sizes(at_once(running, [("calls", pair(1, rows=2))] * 15)) == [10] * 15
        assert sizes(at_once(running, [("calls", pair(1, rows=40)), ("calls", pair(1))])) == [40, 1]


def test_parameters_apart_are_not_joined(tmp_path: Path) -> None:
    with serving(tmp_path, *own("Calls"), "--max-delay-us", "200000") as running:
        tags = ["a", "b", 1, True, 1.0, "1"]
        asked = [("calls", pair(1, parameters={"tag": tags[i % len(tags)]})) for i in range(12)]
        asked += [("calls", pair(1)) for _ in range(3)]
        assert sizes(at_once(running, asked)) == [2] * 12 + [3] * 3
        order = [{"a": 1, "b": 2}, {"b": 2, "a": 1}]
        assert sizes(at_once(running, [("calls", pair(1, parameters=one)) for one in order])) == [2, 2]


@pytest.mark.parametrize(("arguments", "model"), [(["--max-batch", "1"], "slow"), ([], "single")])
def test_batching_is_off_by_flag_and_by_the_model(tmp_path: Path, arguments: list[str], model: str) -> None:
    with serving(tmp_path, *own("Slow", "Single"), *arguments) as running:
        assert [outputs(one)["y"].tolist() for one in at_once(running, [(model, pair(i)) for i in range(8)])] == [
            [i] for i in range(8)
        ]
        told = stats(running, model)
        assert told["execution_count"] == told["inference_count"] == 8
        config = running.call("GET", f"/v2/models/{model}/config").json
        assert config["parameters"]["max_batch"]["string_value"] == "1"


def test_what_waits_for_a_busy_model_goes_together(server: Running) -> None:
    before = stats(server, "slow")["execution_count"]
    with ThreadPoolExecutor(16) as pool:
        found = list(
            pool.map(lambda i: outputs(server.infer("slow", np.full((1 + i % 3, 2), i)))["y"].tolist(), range(48))
        )
    assert found == [[i] * (1 + i % 3) for i in range(48)]
    assert stats(server, "slow")["execution_count"] - before < 24


def test_a_delay_lets_others_join_and_a_full_batch_does_not_wait(tmp_path: Path) -> None:
    with (
        serving(tmp_path, *own("Calls"), "--max-batch", "4", "--max-delay-us", "20000000") as running,
        contextlib.ExitStack() as kept,
    ):
        lines = [kept.enter_context(contextlib.closing(running.connect())) for _ in range(4)]
        for line in lines[:3]:
            line.request("POST", "/v2/models/calls/infer", json.dumps(pair(1)))
        wait_for(lambda: "isolatency_queue_rows{model=\"calls\"} 3" in running.call("GET", "/metrics").body.decode(), "3 in the queue")  # fmt: skip
        start = time.monotonic()
        lines[3].request("POST", "/v2/models/calls/infer", json.dumps(pair(1)))
        found = [line.getresponse() for line in lines]
        assert [json.loads(one.read())["outputs"][0]["data"] for one in found] == [[4.0]] * 4
        assert time.monotonic() - start < 10  # of the 20 s that they might have waited


def hold(running: Running, model: str, stack: contextlib.ExitStack) -> Any:
    """A connection whose request is being computed."""
    line = stack.enter_context(contextlib.closing(running.connect()))
    line.request("POST", f"/v2/models/{model}/infer", json.dumps(pair(7)))
    return line


HANG = """
import time, pathlib
import numpy as np
class Gate:
    name = "gate"
    inputs = (("x", "FP32", (-1, 2)),)
    outputs = (("y", "FP32", (-1,)),)
    batches = False
    def predict(self, batch):
        x = batch.inputs["x"]
        if x[0, 0] == 7:  # until the file is there
            open("BEGUN", "w").close()
            while not pathlib.Path("GO").exists():
                time.sleep(0.01)
        with open("SEEN", "a") as seen:
            seen.write(f"{int(x[0, 0])} ")
        return {"y": x[:, 0].copy()}
"""


class Gate:
    """A model that a test holds: its call of a row of 7 ends when the test says so; `seen` are the rows computed."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "gate.py"
        self._begun, self._go, self._seen = (folder / name for name in ("begun", "go", "seen"))
        code = HANG.replace("BEGUN", str(self._begun)).replace("GO", str(self._go)).replace("SEEN", str(self._seen))
        self.file.write_text(code)

    @property
    def model(self) -> tuple[str, str]:
        return "--model", f"{self.file}:Gate"

    @property
    def seen(self) -> list[int]:
        text = self._seen.read_text() if self._seen.exists() else ""
        return [int(one) for one in text.split() if int(one)]

    def begun(self) -> None:
        wait_for(self._begun.exists, "the model to be called")

    def open(self) -> None:
        self._go.touch()


def queued(running: Running, rows: int) -> None:
    line = f'isolatency_queue_rows{{model="gate"}} {rows}.0\n'
    wait_for(lambda: line in running.call("GET", "/metrics").body.decode(), f"{rows} rows in the queue")


def test_a_full_queue_refuses_at_once(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with serving(tmp_path, *gate.model, "--max-queue", "4") as running, contextlib.ExitStack() as kept:
        lines = [hold(running, "gate", kept)]
        gate.begun()
        for number in range(2):
            lines.append(kept.enter_context(contextlib.closing(running.connect())))
            lines[-1].request("POST", "/v2/models/gate/infer", json.dumps(pair(number + 1, rows=2)))
        queued(running, 4)
        for _ in range(3):
            refused = running.infer("gate", np.full((1, 2), 9))
            assert refused.status == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json.keys() == {"error"}
            assert "4 rows" in refused.json["error"]
        gate.open()
        assert [line.getresponse().status for line in lines] == [200] * 3
        assert gate.seen == [7, 1, 2]
        assert running.infer("gate", np.full((1, 2), 9)).status == 200
        text = running.call("GET", "/metrics").body.decode()
        assert 'isolatency_requests_total{model="gate",status="503",version="1"} 3.0' in text


def test_a_request_whose_timeout_passed_in_the_queue_is_not_computed(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with serving(tmp_path, *gate.model) as running, contextlib.ExitStack() as kept:
        lines = [hold(running, "gate", kept)]
        gate.begun()
        for number, timeout_us in enumerate((1000, 0, 1000, 600_000_000), 1):
            lines.append(kept.enter_context(contextlib.closing(running.connect())))
            lines[-1].request(
                "POST", "/v2/models/gate/infer", json.dumps(pair(number, parameters={"timeout": timeout_us}))
            )
        queued(running, 4)
        time.sleep(0.05)
        gate.open()
        found = [line.getresponse() for line in lines]
        assert [one.status for one in found] == [200, 503, 200, 503, 200]
        assert "1000 µs" in json.loads(found[1].read())["error"]
        assert gate.seen == [7, 2, 4]


def test_rows_of_clients_that_are_gone_are_not_computed(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with serving(tmp_path, *gate.model) as running, contextlib.ExitStack() as kept:
        first = hold(running, "gate", kept)
        gate.begun()
        left = [kept.enter_context(socket.create_connection(running.address)) for _ in range(10)]
        for number, line in enumerate(left, 1):
            body = json.dumps(pair(number)).encode()
            line.sendall(
                b"POST /v2/models/gate/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
        queued(running, 10)
        for line in left[1:5]:
            line.close()
        for line in left[5:]:  # which nobody can tell from those
            line.shutdown(socket.SHUT_WR)
            assert line.recv(100) == b""
        queued(running, 1)
        gate.open()
        assert left[0].recv(100).startswith(b"HTTP/1.1 200")
        assert first.getresponse().status == 200
        assert gate.seen == [7, 1]


@pytest.mark.parametrize("name", ["Busy", "Sleepy"])
def test_health_is_answered_beside_a_model_of_50_ms(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(tmp_path, *own(name)) as running, contextlib.ExitStack() as kept:
        over = threading.Event()

        def load() -> None:
            with contextlib.closing(running.connect()) as line:
                while not over.is_set():
                    assert exchange(line, "POST", f"/v2/models/{name.lower()}/infer", pair(1)).status == 200

        asking = [threading.Thread(target=load) for _ in range(2)]
        for one in asking:
            one.start()
        line = kept.enter_context(contextlib.closing(running.connect()))
        took = []
        for _ in range(200):
            start = time.monotonic()
            assert exchange(line, "GET", "/v2/health/ready", None).status == 200
            took.append((time.monotonic() - start) * 1000)
            time.sleep(0.005)
        over.set()
        for one in asking:
            one.join()
    p50, p99 = statistics.median(took), sorted(took)[-3]
    with capsys.disabled():
        print(
            f"\nhealth beside a model that is {name.lower()} for 50 ms: p50 {p50:.2f} ms, p99 {p99:.2f} ms; goal 5 ms p99"
        )
    assert p50 < 25
