"""Models that raise, answer what they should not, or never return: 500 for that request alone, and the server lives."""

import contextlib
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from tests.unit import own_models
from tests.unit.serving import Answer, Running, outputs, serving, wait_for
from tests.unit.test_server_batching import at_once, own, pair, stats

WRONG = {
    "RAISE": "cannot be divided", "EXIT": "SystemExit", "SHORT": "FP32", "TYPE": "float64", "MISSING": "y",
    "NOTHING": "NoneType",
}  # fmt: skip
HANGS = ("SLEEP", "LOOP", "STUBBORN")
MODELS = ("fails", "fails-in-thread")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    names = own(
        "Fails",
        "FailsInThread",
        "LoadsOnce",
        "LoadHangs",
        "CheckExits",
        "CheckHangs",
        "CheckSlow",
        "NotFinite",
        "Writes",
    )
    with serving(tmp_path_factory.mktemp("server"), "--model", "knn", *names, "--model-timeout", "1") as running:
        yield running
        assert "Traceback" not in running.log()


def ask(running: Running, model: str, first: float) -> Answer:
    return running.infer(model, np.full((1, 2), first))


def failed(running: Running, answer: Answer, word: str = "") -> None:
    """One 500 with an error id, and one line of the log with the same."""
    assert answer.status == 500, answer.body
    assert answer.json.keys() == {"error"}
    mark = re.search(r"error ([0-9a-f]{8})$", answer.json["error"])
    assert mark
    (line,) = (line for line in running.log().splitlines() if mark[1] in line)
    assert word in line


@pytest.mark.parametrize("rows", [1, 2000])
def test_a_check_that_does_not_return(server: Running, rows: int) -> None:
    """Neither in the event loop nor in the thread that reads large requests, which others want, too."""
    failed(server, server.infer("check-hangs", np.zeros((rows, 2)), parameters={"k": 1}), "did not return within 1 s")
    assert outputs(server.infer("check-hangs", np.full((rows, 2), 4)))["y"].tolist() == [4] * rows
    assert server.infer("knn", np.zeros((2000, 30))).status == 200


def test_a_check_that_takes_long_is_no_failure(tmp_path: Any) -> None:
    with serving(tmp_path, *own("CheckSlow")) as running:
        answer = running.infer("check-slow", np.zeros((1, 2)), parameters={"k": 1})
        assert answer.status == 400 and answer.json == {"error": "such parameters take long"}


def test_what_json_cannot_hold_goes_out_as_bytes_alone(server: Running) -> None:
    answer = ask(server, "not-finite", 0)
    assert answer.status == 400 and "binary_data" in answer.json["error"]
    rows = np.zeros((1, 2))
    told = server.infer("not-finite", rows, outputs=[{"name": "y", "parameters": {"binary_data": True}}])
    assert told.status == 200
    tail = told.body[int(told.headers["inference-header-content-length"]) :]
    assert np.frombuffer(tail, "<f4").tolist() == [np.inf]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("wrong", WRONG)
def test_one_that_fails_fails_alone(server: Running, model: str, wrong: str) -> None:
    value = getattr(own_models, wrong)
    failed(server, ask(server, model, value), WRONG[wrong])
    before = len(server.log().splitlines())
    values = [1, 2, value, 3, value, *range(4, 15)]
    answers = at_once(server, [(model, pair(one)) for one in values])
    for one, answer in zip(values, answers, strict=True):
        if one < 0:
            failed(server, answer, WRONG[wrong])
        else:
            assert outputs(answer)["y"].tolist() == [one]
    assert len(server.log().splitlines()) == before + 2


def test_inputs_cannot_be_written_to_however_they_came(server: Running) -> None:
    rows = np.ones((1, 2), "<f4")
    failed(server, server.infer("writes", rows), "read-only")
    failed(server, server.infer("writes", rows.astype(np.int64)), "read-only")
    failed(server, server.call("POST", "/v2/models/writes/infer", rows.tobytes(), Inference_Header_Content_Length="0"))
    asked = [("writes", pair(one)) for one in (0, 1, 0, 2, 0)]
    assert [one.status for one in at_once(server, asked)] == [200, 500, 200, 500, 200]


@pytest.mark.parametrize("model", MODELS)
def test_outputs_that_nobody_knows_do_no_harm(server: Running, model: str) -> None:
    values = [1, own_models.MORE, *range(2, 12)]
    answers = at_once(server, [(model, pair(one)) for one in values])
    assert [outputs(one)["y"].tolist() for one in answers] == [[one] for one in values]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("wrong", HANGS)
def test_one_that_never_returns_fails_alone(server: Running, model: str, wrong: str) -> None:
    values = [1, 2, getattr(own_models, wrong), *range(3, 8)]
    answers = at_once(server, [(model, pair(one)) for one in values])
    for one, answer in zip(values, answers, strict=True):
        if one < 0:
            failed(server, answer, "1 s")
        else:
            assert outputs(answer)["y"].tolist() == [one]
    assert outputs(ask(server, model, 9))["y"].tolist() == [9]
    assert server.call("GET", "/v2/health/ready").status == 200
    assert server.call("GET", f"/v2/models/{model}/ready").status == 200


def test_a_call_that_stays_does_not_hold_the_server_up(tmp_path: Any) -> None:
    """A fast model that hangs is tried again in a thread, so others wait a fraction of a second, not the model's bound."""
    with (
        serving(tmp_path, "--model", "knn", *own("Fails"), "--model-timeout", "30") as running,
        contextlib.ExitStack() as kept,
    ):
        assert ask(running, "fails", 1).status == 200
        hanging = kept.enter_context(contextlib.closing(running.connect()))
        hanging.request("POST", "/v2/models/fails/infer", json.dumps(pair(own_models.SLEEP)))
        time.sleep(0.05)
        start = time.monotonic()
        assert running.call("GET", "/v2/health/ready").status == 200
        assert time.monotonic() - start < 10
        hanging.close()


def test_errors_are_in_the_counters(server: Running) -> None:
    def count() -> tuple[int, int]:
        found = stats(server, "fails")["inference_stats"]
        text = server.call("GET", "/metrics").body.decode()
        told = re.search(r'isolatency_requests_total\{model="fails",status="500",version="1"\} (\d+)', text)
        return found["fail"]["count"], int(told[1]) if told else 0

    before = count()
    failed(server, ask(server, "fails", own_models.RAISE))
    assert count() == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize("name", ["WarmUpRaises", "WarmUpExits", "WarmUpHangs"])
def test_a_warm_up_that_fails_is_one_line_and_the_model_is_served(tmp_path: Any, name: str) -> None:
    with serving(tmp_path, *own(name), "--model-timeout", "1") as running:
        model = re.sub("(?<=.)([A-Z])", r"-\1", name).lower()
        line, _ = running.log().splitlines()
        assert model in line
        assert ("no fire" in line) or ("1 s" in line)
        assert outputs(ask(running, model, 4))["y"].tolist() == [4]


@pytest.mark.parametrize("model", ["loads-once", "load-hangs"])
def test_a_model_that_cannot_be_loaded_again(server: Running, model: str) -> None:
    path = f"/v2/repository/models/{model}"
    assert server.call("POST", f"{path}/unload").status == 200
    failed(server, server.call("POST", f"{path}/load"))
    assert server.call("GET", f"/v2/models/{model}/ready").status == 503
    large = np.zeros((2000, 30))  # which is read in the thread beside the event loop
    assert server.infer("knn", large).status == 200


def test_parameters_on_which_a_models_check_ends_the_program(server: Running) -> None:
    failed(server, server.infer("check-exits", np.zeros((1, 2)), parameters={"k": 1}), "SystemExit")
    assert outputs(ask(server, "check-exits", 4))["y"].tolist() == [4]


def test_the_end_comes_though_a_model_never_returns(tmp_path: Any) -> None:
    with serving(tmp_path, *own("FailsInThread"), "--grace", "1") as running, contextlib.ExitStack() as kept:
        for _ in range(3):
            line = kept.enter_context(contextlib.closing(running.connect()))
            line.request("POST", "/v2/models/fails-in-thread/infer", json.dumps(pair(own_models.STUBBORN)))
        wait_for(lambda: "} 2.0" in running.call("GET", "/metrics").body.decode(), "two that wait")
        running.process.terminate()
        assert running.process.wait(30) == 0
        assert "Traceback" not in running.log()


def test_failing_and_good_requests_from_many_at_once(server: Running) -> None:
    wrong = [getattr(own_models, name) for name in WRONG]

    def one(number: int) -> bool:
        value = wrong[number // 4 % len(wrong)] if number % 4 == 0 else number
        answer = ask(server, MODELS[number % 2], value)
        return answer.status == 500 if value < 0 else outputs(answer)["y"].tolist() == [value]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(400)))
