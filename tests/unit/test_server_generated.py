"""10,000 generated requests and more: valid ones, nearly valid ones, garbage; in JSON and bytes, in any pieces, many at
once. Each valid one gets what plain NumPy says; none gets a 5xx that is not meant; nothing hangs or grows."""

import contextlib
import copy
import functools
import gzip
import json
import socket
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.unit.serving import DATA, Running, request, serving
from tests.unit.test_server_batching import own
from tests.unit.wire import Line, http, in_order, opened

EXAMPLES, TOGETHER = 850, 12  # requests of one example are on their way at the same time
MIB = 2**20
KNN = {name: np.load(DATA / "breast_cancer.npz")[name] for name in ("rows", "labels")}
POINTS = KNN["rows"].astype(np.float64)
MEAN, SCALE = POINTS.mean(axis=0), 1.0 / POINTS.std(axis=0)
WEIGHTS = {name: values.astype(np.float64) for name, values in np.load(DATA / "dnn_weights.npz").items()}
PIXELS = np.load(DATA / "dnn.npz")["rows"]


class Sent(NamedTuple):
    """A request in pieces; `wanted` are the outputs that it must get, None where it may be refused. `ends`: nothing
    follows it on its connection, since what it says of its length is not so."""

    pieces: list[bytes]
    wanted: dict[str, NDArray[Any]] | None
    ends: bool = False


def knn(x: NDArray[Any], k: int) -> dict[str, NDArray[Any]]:
    """Every distance in float64, sorted with ties by index, a vote with ties by the lower label."""
    scaled = (POINTS - MEAN) * SCALE
    asked = (x.astype(np.float64) - MEAN) * SCALE
    squares = ((scaled[None] - asked[:, None]) ** 2).sum(axis=2)
    nearest = np.argsort(squares, axis=1, kind="stable")[:, :k]
    counts = np.stack([np.bincount(one, minlength=2) for one in KNN["labels"][nearest].astype(int)])
    distances = np.sqrt(np.take_along_axis(squares, nearest, axis=1))
    return {"label": counts.argmax(axis=1), "votes": counts.max(axis=1), "neighbours": nearest, "distances": distances}


def dnn(x: NDArray[Any]) -> dict[str, NDArray[Any]]:
    layers = len(WEIGHTS) // 2
    h = x.astype(np.float64)
    for layer in range(layers):
        h = h @ WEIGHTS[f"w{layer}"] + WEIGHTS[f"b{layer}"]
        h = np.maximum(h, 0) if layer < layers - 1 else h
    h = np.exp(h - h.max(axis=1, keepdims=True))
    return {"label": h.argmax(axis=1), "probabilities": h / h.sum(axis=1, keepdims=True)}


def several(x: NDArray[Any], y: NDArray[Any], z: NDArray[Any]) -> dict[str, NDArray[Any]]:
    return {"sum": x.sum(axis=1, dtype=np.float64) + y, "any": z.any(axis=1)}


@st.composite
def valid(draw: st.DrawFn) -> tuple[str, dict[str, Any], dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """Model, the JSON of a request without its inputs' data, the inputs, the outputs that all of them must be."""
    model = draw(st.sampled_from(["knn", "knn", "dnn", "null", "several"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = draw(st.integers(1, 5))
    parameters: dict[str, Any] = {}
    if model == "knn":
        noise = rng.choice([0.0, 1e-3, 1.0])
        x = (POINTS[rng.integers(0, 569, rows)] * (1 + noise * rng.standard_normal((rows, 30)))).astype(np.float32)
        k = draw(st.sampled_from([None, 1, 2, 5, 30]))
        parameters = {} if k is None else {"k": k}
        inputs, all_outputs = {"x": x}, knn(x, k or 5)
        default = ["label", "votes"]
    elif model == "dnn":
        x = PIXELS[rng.integers(0, len(PIXELS), rows)]
        inputs, all_outputs = {"x": x}, dnn(x)
        default = list(all_outputs)
    elif model == "null":
        x = rng.standard_normal((rows, int(rng.integers(1, 40)))).astype(np.float32)
        inputs, all_outputs = {"x": x}, {"rows": np.ones(rows, np.int64)}
        default = ["rows"]
    else:
        x = rng.integers(-100, 100, (rows, 2)).astype(rng.choice(["<f4", "i1", "<i2"]))
        y, z = rng.integers(-(2**62), 2**62, rows) // 2**12, rng.random((rows, 3)) > 0.7
        inputs = {"x": x, "y": y, "z": z}
        all_outputs = several(x, y, z)
        default = list(all_outputs)
    message: dict[str, Any] = {}
    if draw(st.booleans()):
        message["id"] = draw(st.text(max_size=5))
    asked = draw(st.lists(st.sampled_from(sorted(all_outputs)), unique=True, max_size=4))
    if asked:
        message["outputs"] = [
            {"name": name} | ({"parameters": {"binary_data": bool(rng.integers(2))}} if rng.integers(2) else {})
            for name in asked
        ]
    if draw(st.booleans()):
        parameters["binary_data_output"] = draw(st.booleans())
    if parameters:
        message["parameters"] = parameters
    return model, message, inputs, {name: all_outputs[name] for name in asked or default}


DATATYPES = {"<f4": "FP32", "|i1": "INT8", "<i2": "INT16", "<i8": "INT64", "|b1": "BOOL"}


def written(
    message: dict[str, Any], inputs: dict[str, NDArray[Any]], binary: int, nested: bool
) -> tuple[dict[str, Any], bytes]:
    """The request's JSON and its bytes; bit i of `binary` says whether input i is in bytes."""
    listed, tail = [], b""
    for number, (name, values) in enumerate(inputs.items()):
        one: dict[str, Any] = {"name": name, "datatype": DATATYPES[values.dtype.str], "shape": list(values.shape)}
        if binary >> number & 1:
            one["parameters"] = {"binary_data_size": values.nbytes}
            tail += values.tobytes()
        else:
            one["data"] = values.tolist() if nested else values.reshape(-1).tolist()
        listed.append(one)
    return {"inputs": listed, **message}, tail


def enclosed(draw: st.DrawFn, model: str, body: bytes, length: int | None, *more: str) -> bytes:
    fields = list(more)
    if length is not None:
        fields.append(f"Inference-Header-Content-Length: {length}")
    coding = draw(st.sampled_from([None, None, None, "gzip", "deflate"]))
    if coding is not None:
        fields.append(f"Content-Encoding: {coding}")
        body = {"gzip": functools.partial(gzip.compress, mtime=0), "deflate": zlib.compress}[coding](body)
    if draw(st.booleans()):
        fields.append(
            f"Accept-Encoding: {draw(st.sampled_from(['gzip', 'deflate', 'gzip;q=0, deflate', 'br', '*', '']))}"
        )
    if draw(st.integers(0, 5)) == 0:
        size = draw(st.integers(1, 50))
        chunks = [body[i : i + size * 10] for i in range(0, len(body), size * 10)]
        chunked = b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in chunks) + b"0\r\n\r\n"
        head = "\r\n".join(
            [f"POST /v2/models/{model}/infer HTTP/1.1", "Host: x", "Transfer-Encoding: chunked", *fields, "", ""]
        )
        return head.encode() + chunked
    return http(f"/v2/models/{model}{draw(st.sampled_from(['', '/versions/1']))}/infer", body, *fields)


def cut(draw: st.DrawFn, whole: bytes) -> list[bytes]:
    places = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=4)))
    return [whole[a:b] for a, b in zip([0, *places], [*places, len(whole)], strict=True)]


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ODD = st.sampled_from([
    [], {}, "", "x" * 5000, 2**63, 2**64, -1, 1e308, [2**31, 2**33], [2**62, 4], [0, 30], [1, 30, 1], [-1, 30], "FP32", "BYTES", "x",
    json.loads("[" * 300 + "]" * 300), [[1], [2, 3]], [None], [True], ["1"], [["x" * 1000] + [""] * 1000], {"binary_data_size": 2**70},
    {"binary_data_size": -1}, {"shared_memory_region": "r"}, {"classification": 3}, {"timeout": 1}, {"timeout": 10**30},
])  # fmt: skip


def spoilt(draw: st.DrawFn, message: dict[str, Any]) -> Any:
    """The same with something left out, replaced or said twice, somewhere."""
    message = copy.deepcopy(message)
    for _ in range(draw(st.integers(1, 2))):
        at: Any = message
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(min(3, len(at))))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], dict | list) and at[key] and draw(st.integers(0, 2)):
                at = at[key]
                continue
            what = draw(st.integers(0, 3))
            if what == 0:
                del at[key]
            elif what == 1 and isinstance(at, list):
                at.append(at[key])
            else:
                at[key] = copy.deepcopy(draw(ODD if what == 2 else JUNK))
            break
    return message


@st.composite
def sent(draw: st.DrawFn) -> Sent:
    kind = draw(st.sampled_from(["valid"] * 5 + ["spoilt"] * 4 + ["lying"] * 2 + ["torn", "garbage", "garbage"]))
    if kind == "garbage":
        return Sent(
            cut(draw, draw(st.binary(max_size=60)) + draw(st.sampled_from([b"", b"\r\n\r\n", b" HTTP/1.1\r\n\r\n"]))),
            None,
            True,
        )
    model, message, inputs, wanted = draw(valid())
    whole, tail = written(message, inputs, draw(st.integers(0, 7)), draw(st.booleans()))
    if kind == "spoilt":
        whole = spoilt(draw, whole)
    head = json.dumps(whole).encode()
    length = len(head) if tail or draw(st.booleans()) else None
    if kind in ("valid", "spoilt"):
        return Sent(cut(draw, enclosed(draw, model, head + tail, length)), wanted if kind == "valid" else None)
    if kind == "torn":
        body = head + tail
        place = draw(st.integers(0, len(body)))
        body = body[:place] + draw(st.binary(max_size=5)) + body[place + draw(st.integers(0, 5)) :]
        return Sent(cut(draw, enclosed(draw, model, body, length)), None)
    lie = draw(st.sampled_from(["json", "content", "coding", "twice", "size"]))
    if lie == "size":
        head = head.replace(
            b'"binary_data_size": ', draw(st.sampled_from([b'"binary_data_size": 1', b'"binary_data_size": -']))
        )
    raw = enclosed(draw, model, head + tail, draw(st.integers(-5, 10**6)) if lie == "json" else length)
    old, new = {
        "content": (
            b"Content-Length: ",
            [b"Content-Length: " + one for one in (b"1", b"-", b"0x", b"+", b"9" * 30, b" ")],
        ),
        "coding": (
            b"Host: x",
            [b"Host: x\r\nContent-Encoding: " + one for one in (b"gzip", b"deflate", b"br", b"gzip, gzip")],
        ),
        "twice": (b"Host: x", [b"Content-Length: 5\r\nHost: x", b"Content-Length: 5\r\nTransfer-Encoding: chunked"]),
    }.get(lie, (b"", [b""]))
    raw = raw.replace(old, draw(st.sampled_from(new)), 1)
    return Sent(cut(draw, raw), None, lie in ("content", "twice"))


class Lines:
    """Connections that are kept, as many as are on their way at once."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._free: list[Line] = []

    def take(self) -> Line:
        return self._free.pop() if self._free else Line(self._running)

    def give_back(self, line: Line) -> None:
        self._free.append(line)

    def close(self) -> None:
        for line in self._free:
            line.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    arguments = ["--model", "knn", "--model", "dnn", "--model", "null", *own("Several")]
    with serving(tmp_path_factory.mktemp("server"), *arguments) as running:
        yield running
        log = running.log()
        assert "error" not in log, log
        assert "Warning" not in log, log


def agree(found: dict[str, NDArray[Any]], wanted: dict[str, NDArray[Any]]) -> None:
    assert list(found) == list(wanted)
    for name, values in wanted.items():
        if values.dtype.kind == "f":
            assert found[name] == pytest.approx(values, rel=1e-4, abs=1e-5)
        else:
            assert np.array_equal(found[name], values), name


def test_generated_requests(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    process, lines = psutil.Process(server.process.pid), Lines(server)
    told: Counter[str] = Counter()
    early: list[int] = []

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(sent(), min_size=TOGETHER, max_size=TOGETHER))
    def ask(asked: list[Sent]) -> None:
        taken = [Line(server) if one.ends else lines.take() for one in asked]
        for one, line in zip(asked, taken, strict=True):
            line.send(one.pieces)
        for one, line in zip(asked, taken, strict=True):
            if one.ends:
                with contextlib.suppress(OSError):  # which the server may have closed
                    line.socket.shutdown(socket.SHUT_WR)  # nothing more comes, so it is not waited for
                replies = line.replies()
                line.close()
            else:
                reply = line.reply()
                assert reply is not None
                replies = [reply]
                if reply.headers.get("connection") == "close":
                    line.close()
                else:
                    lines.give_back(line)
            for each in replies:
                in_order(each)
                told[str(each.status)] += 1
            told["asked"] += 1
            if one.wanted is not None:
                assert replies[0].status == 200, replies[0]
                agree(opened(replies[0]), one.wanted)
                told["valid"] += 1
        if told["asked"] > 2000 and not early:
            early.append(process.memory_info().rss)

    ask()
    grown = (process.memory_info().rss - early[0]) / MIB
    lines.close()
    with capsys.disabled():
        print(
            f"\ngenerated requests: {dict(sorted(told.items()))}; the server grew by {grown:.1f} MiB after the first 2,000"
        )
    assert told["asked"] >= 10_000
    assert told["valid"] > 2000
    assert told["400"] > 2000
    assert grown < 64


def test_generated_requests_one_behind_the_other(server: Running) -> None:
    """On one connection, sent without waiting, in pieces that end anywhere: as many answers, in that order."""

    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(sent().filter(lambda one: not one.ends), min_size=40, max_size=60))
    def ask(asked: list[Sent]) -> None:
        line = Line(server)
        sending = threading.Thread(target=line.send, args=([piece for one in asked for piece in one.pieces],))
        sending.start()
        for one in asked:
            reply = line.reply()
            assert reply is not None
            in_order(reply)
            if one.wanted is not None:
                assert reply.status == 200, reply
                agree(opened(reply), one.wanted)
            if reply.headers.get("connection") == "close":
                break
        sending.join()
        line.close()

    ask()


@pytest.mark.parametrize("binary", [0, 1])
def test_a_request_in_two_pieces_at_every_boundary(server: Running, binary: int) -> None:
    """All first pieces are read before any second one is sent."""
    rows = POINTS[:1].astype(np.float32)
    message, tail = written({"id": "a", "parameters": {"k": 3}}, {"x": rows}, binary, False)
    head = json.dumps(message).encode()
    whole = http(
        "/v2/models/knn/infer", head + tail, *([f"Inference-Header-Content-Length: {len(head)}"] if binary else [])
    )
    for start in range(1, len(whole), 200):
        places = range(start, min(start + 200, len(whole)))
        lines = [Line(server) for _ in places]
        for line, place in zip(lines, places, strict=True):
            line.send([whole[:place]])
        assert server.call("GET", "/v2/health/live").status == 200
        for line, place in zip(lines, places, strict=True):
            line.send([whole[place:]])
        for line in lines:
            reply = line.reply()
            assert reply is not None
            agree(opened(reply), {name: knn(rows, 3)[name] for name in ("label", "votes")})
            line.close()


def test_requests_a_byte_at_a_time(server: Running) -> None:
    rows = np.zeros((1, 1), np.float32)
    whole = http("/v2/models/null/infer", json.dumps(request(rows)).encode())
    lines = [Line(server) for _ in range(20)]
    with_ping = Line(server)
    for place in range(len(whole)):
        for line in lines:
            line.send([whole[place : place + 1]])
        with_ping.send([http("/v2/health/live", b"", method="GET")])
        assert with_ping.reply() is not None
    for line in [*lines, with_ping]:
        if line is not with_ping:
            reply = line.reply()
            assert reply is not None
            assert opened(reply)["rows"].tolist() == [1]
        line.close()
