"""What a client does wrong is answered by a fitting 4xx and {"error": "…"}, nothing else; the server lives on."""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.serving import DATA, Answer, Running, exchange, request, serving

INFER = "/v2/models/knn/infer"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("server"), "--model", "knn", "--model", "dnn", "--model", "null") as running:
        yield running
        assert server_still_answers(running)
        assert "Traceback" not in running.log()
        assert "Warning" not in running.log()


def server_still_answers(running: Running) -> bool:
    return running.infer("knn", good()).status == 200


def good(rows: int = 1) -> Any:
    return np.load(DATA / "knn.npz")["rows"][:rows]


def refused(answer: Answer, status: int, *words: str) -> None:
    assert answer.status == status, answer.body
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.json.keys() == {"error"}
    text = answer.json["error"]
    assert isinstance(text, str)
    assert text.strip()
    assert "\n" not in text
    assert "Traceback" not in text
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v2/", 404),
        ("GET", "/v2/nowhere", 404),
        ("GET", "/v2/models", 404),
        ("GET", "/v2/models/unknown", 404),
        ("GET", "/v2/models/unknown/ready", 404),
        ("GET", "/v2/models/knn/versions/99", 404),
        ("GET", "/v2/models/knn/versions/99/ready", 404),
        ("GET", "/v2/models/%2e%2e/ready", 404),
        ("POST", "/v2/models/unknown/infer", 404),
        ("POST", "/v2/models/knn/versions/99/infer", 404),
        ("POST", "/v2/models/knn/infer/more", 404),
        ("GET", INFER, 405),
        ("PUT", INFER, 405),
        ("DELETE", "/v2", 405),
        ("POST", "/v2/health/live", 405),
        ("POST", "/identity", 405),
        ("OPTIONS", INFER, 405),
    ],
)
def test_routes_that_are_not_there(server: Running, method: str, path: str, status: int) -> None:
    answer = server.call(method, path, b"{}" if method == "POST" else None)
    refused(answer, status)
    assert ("allow" in answer.headers) == (status == 405)


def test_an_unknown_model_is_answered_with_the_known_ones(server: Running) -> None:
    refused(server.infer("ghost", good()), 404, "ghost", "knn", "dnn", "null")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nonsense", b"\xff\xfe", b"[]", b"1", b"null", b'"text"', b"{}", b'{"inputs": null}',
     b'{"inputs": []}', b'{"inputs": {}}', b'{"inputs": [1]}', b'{"inputs": [NaN]}', b"[" * 100_000],
)  # fmt: skip
def test_a_body_that_is_no_request(server: Running, body: bytes) -> None:
    refused(server.call("POST", INFER, body), 400)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "y"}, {"name": None}, {"name": ["x"]}, {"datatype": "FP64"}, {"datatype": "INT8"},
        {"datatype": "BYTES"}, {"datatype": None}, {"datatype": []}, {"datatype": {}}, {"shape": None}, {"shape": []},
        {"shape": [30]}, {"shape": [1, 29]}, {"shape": [2, 30]}, {"shape": [-1, 30]}, {"shape": [1.0, 30]},
        {"shape": [True, 30]}, {"shape": ["1", 30]}, {"shape": [1, 1, 30]}, {"shape": [2**62, 30]},
        {"shape": [10**30, 30]}, {"shape": "1,30"}, {"data": None}, {"data": 1}, {"data": "1"}, {"data": {}},
        {"data": []}, {"data": [0.0] * 29}, {"data": [0.0] * 31}, {"data": ["1"] * 30}, {"data": [None] * 30},
        {"data": [True] * 30}, {"data": [[0.0] * 29]}, {"data": [[0.0] * 30, [0.0]]}, {"data": [{}] * 30},
        {"data": [True, *[1] * 29]}, {"data": [[0.0] * 29 + ["1"]]}, {"data": [[1], *[1] * 29]},
        {"data": [1e39] * 30}, {"data": [-1e300] * 30}, {"data": [[[0.0] * 30]]},
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit(server: Running, change: dict[str, Any]) -> None:
    body = request(good())
    body["inputs"][0] |= change
    refused(server.call("POST", INFER, body), 400)


DEEP = json.loads("[" * 900 + "]" * 900)


@pytest.mark.parametrize("part", ["name", "datatype", "shape", "data", "parameters"])
def test_a_tensor_whose_parts_are_nested_deeply(server: Running, part: str) -> None:
    body = request(good())
    body["inputs"][0][part] = DEEP
    refused(server.call("POST", INFER, body), 400)


@pytest.mark.parametrize(
    "more",
    [{"id": DEEP}, {"outputs": DEEP}, {"outputs": [{"name": DEEP}]}, {"parameters": {"k": DEEP, "timeout": DEEP}}],
)
def test_a_request_whose_parts_are_nested_deeply(server: Running, more: dict[str, Any]) -> None:
    refused(server.infer("knn", good(), **more), 400)


def test_strings_among_numbers_take_no_memory(server: Running) -> None:
    """NumPy would give each of a million strings the room of the longest, 4 TB."""
    body = request(good())
    body["inputs"][0]["data"] = ["", "x" * 1_000_000, *[1] * 1_000_000]
    refused(server.call("POST", INFER, body), 400)
    body["inputs"][0]["data"] = [[""] * 1_000_000, ["x" * 1_000_000]]
    refused(server.call("POST", INFER, body), 400)


def test_infinity_of_both_signs_and_nan_in_bytes(server: Running) -> None:
    for values in ([np.inf, -np.inf], [np.nan, 1.0], [3e38, 3e38]):
        rows = np.resize(np.array(values, "<f4"), (1, 30))
        head = json.dumps(
            {"inputs": [{"name": "x", "shape": [1, 30], "datatype": "FP32", "parameters": {"binary_data_size": 120}}]}
        ).encode()
        answer = server.call("POST", INFER, head + rows.tobytes(), Inference_Header_Content_Length=str(len(head)))
        assert answer.status == (200 if np.isfinite(rows).all() else 400)


def test_nested_data_must_have_the_shape_it_says(server: Running) -> None:
    body = request(np.zeros((2, 30)))
    body["inputs"][0]["data"] = np.zeros((30, 2)).tolist()
    refused(server.call("POST", INFER, body), 400)


@pytest.mark.parametrize("left_out", ["name", "shape", "datatype", "data"])
def test_a_tensor_without_a_part(server: Running, left_out: str) -> None:
    body = request(good())
    del body["inputs"][0][left_out]
    refused(server.call("POST", INFER, body), 400)


def test_inputs_that_are_too_many(server: Running) -> None:
    body = request(good())
    body["inputs"] *= 2
    refused(server.call("POST", INFER, body), 400, "x")


@pytest.mark.parametrize(
    "more",
    [
        {"id": 1}, {"id": []}, {"parameters": 1}, {"parameters": []}, {"parameters": "k"},
        {"parameters": {"unknown": 1}}, {"parameters": {"k": 0}}, {"parameters": {"k": -1}},
        {"parameters": {"k": 570}}, {"parameters": {"k": 2.5}}, {"parameters": {"k": "5"}},
        {"parameters": {"k": [5]}}, {"parameters": {"k": {"k": 5}}}, {"parameters": {"k": True}}, {"parameters": {"k": None}}, {"parameters": {"k": 10**30}}, {"parameters": {"metric": "cosine"}},
        {"parameters": {"metric": None}}, {"outputs": 1},
        {"outputs": "label"}, {"outputs": ["label"]}, {"outputs": [{"name": "nothing"}]}, {"outputs": [{}]},
        {"outputs": [{"name": ["label"]}]}, {"outputs": [{"name": "label"}, {"name": "label"}]},
    ],
)  # fmt: skip
def test_the_rest_of_a_request(server: Running, more: dict[str, Any]) -> None:
    refused(server.infer("knn", good(), **more), 400)


@pytest.mark.parametrize("model", ["dnn", "null"])
def test_a_parameter_that_a_model_does_not_know_is_named(server: Running, model: str) -> None:
    rows = np.load(DATA / f"{model}.npz")["rows"][:1]
    refused(server.infer(model, rows, parameters={"k": 5}), 400, model, "k")


def test_errors_quote_a_part_of_what_is_long(server: Running) -> None:
    long = "x" * 10**6
    for parameters in ({"k": long}, {long: 1}, {"metric": long}):
        answer = server.infer("knn", good(), parameters=parameters)
        refused(answer, 400, "xxx")
        assert len(answer.json["error"]) < 600
    answer = server.call("GET", f"/{long[:8000]}")
    refused(answer, 404, "xxx")
    assert len(answer.json["error"]) < 600


def test_a_body_above_the_limit(server: Running) -> None:
    refused(server.call("POST", INFER, b" " * (16 * 2**20 + 1)), 413)
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode()
    refused(parse(server.raw(head, *[chunk] * 17, b"0\r\n\r\n")), 413)


def test_a_body_above_the_limit_once_it_is_unpacked(server: Running) -> None:
    packed = gzip.compress(b" " * (17 * 2**20))
    refused(server.call("POST", INFER, packed, Content_Encoding="gzip"), 413)


def test_a_body_that_cannot_be_unpacked(server: Running) -> None:
    refused(server.call("POST", INFER, b"this is not gzip", Content_Encoding="gzip"), 400)


def test_a_body_just_below_the_limit_is_read(server: Running) -> None:
    body = json.dumps(request(good())).encode()
    assert server.call("POST", INFER, body + b" " * (16 * 2**20 - len(body))).status == 200


@pytest.mark.parametrize(
    "head",
    [
        b"nonsense\r\n\r\n",
        b"GET /v2 HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nHost: x\r\nBad header\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nHost: x\r\nLong: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
    ],
    ids=["no HTTP", "version", "header", "long header", "long path", "length", "chunk"],
)
def test_what_is_no_http(server: Running, head: bytes) -> None:
    answer = parse(server.raw(head))
    assert 400 <= answer.status < 500
    refused(answer, answer.status)


def test_expectations(server: Running) -> None:
    """curl asks so before it sends a large body."""
    body = json.dumps(request(good())).encode()
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    met = server.raw(f"{head}Expect: 100-continue\r\n\r\n".encode(), body)
    assert met.startswith(b"HTTP/1.1 100 ")
    assert parse(met.partition(b"\r\n\r\n")[2]).status == 200
    refused(parse(server.raw(f"{head}Expect: the-unexpected\r\n\r\n".encode(), body)), 417, "100-continue")
    met = server.raw(f"{head}Expect: 100-continue\r\n\r\n".replace("knn", "ghost").encode(), body)
    refused(parse(met.partition(b"\r\n\r\n")[2] if b" 100 " in met[:20] else met), 404, "ghost")
    large = head.replace(f"Length: {len(body)}", f"Length: {10**9}")
    refused(parse(server.raw(f"{large}Expect: 100-continue\r\n\r\n".encode())), 413, "16 MiB")


def test_a_client_that_goes_away_in_its_body_disturbs_nobody(server: Running) -> None:
    server.hang_up_after(b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    assert server_still_answers(server)


def test_an_error_does_not_end_the_connection(server: Running) -> None:
    connection = server.connect()
    for _ in range(3):
        assert exchange(connection, "POST", INFER, b"{").status == 400
        assert exchange(connection, "GET", "/nowhere", None).status == 404
        assert exchange(connection, "POST", INFER, request(good())).status == 200
    connection.close()


def parse(raw: bytes) -> Answer:
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return Answer(int(lines[0].split()[1]), headers, body)


def test_too_many_objects_are_refused_before_they_are_made(server: Running) -> None:
    body = b'{"inputs":[{"name":"x","shape":[1,30],"datatype":"FP32","data":[' + b'{"":0},' * 20_000 + b"0]}]}"
    refused(server.call("POST", INFER, body), 400, "10,000 objects")


@pytest.mark.parametrize("part", [b"[0],", b"[],", b"[[0]],"])
def test_too_many_lists_are_refused_before_they_are_made(tmp_path: Path, part: bytes) -> None:
    """16 MiB of them would take a target of 512 MiB."""
    head, end = b'{"inputs":[{"name":"x","shape":[1,30],"datatype":"FP32","data":[', b"0]}]}"
    with serving(tmp_path, "--model", "knn") as running:
        refused(running.call("POST", INFER, head + part * (15 * 2**20 // len(part)) + end), 400, "1,000,000 lists")
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{running.process.pid}/status").read_text())
        assert peak and int(peak[1]) / 1024 < 256


def test_finite_values_whose_products_are_not(server: Running) -> None:
    refused(server.infer("dnn", np.full((1, 784), 3e38)), 400, "dnn", "finite")


def test_a_version_of_the_exposition_that_is_none(server: Running) -> None:
    answer = server.call("GET", "/metrics", Accept="application/openmetrics-text;version=q")
    assert answer.status == 200 and answer.body.startswith(b"# HELP")
