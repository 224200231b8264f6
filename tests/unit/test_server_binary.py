"""Tensors as bytes, mixed with JSON, packed, of every data type; headers and sizes that lie are answered by 400."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from server import protocol, tensors
from server.models.base import BadInput, Tensor
from server.models.null import Null
from tests.unit.serving import ALL, DATA, Answer, Running, serving

INFER = "/v2/models/knn/infer"
STORED = np.load(DATA / "knn.npz")
ROWS, LABELS = STORED["rows"], STORED["labels"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("server"), *ALL) as running:
        yield running
        assert "error" not in running.log()
        assert running.infer("knn", ROWS[:1]).status == 200


class Pair(Null):
    """Two inputs, so that one may be JSON and the other bytes."""

    inputs = (Tensor("x", "FP32", (-1, 2)), Tensor("y", "INT64", (-1,)))


def body(rows: NDArray[Any], change: Mapping[str, Any] | None = None, **more: Any) -> tuple[bytes, str]:
    """A request with x in bytes, and the length of its JSON."""
    size = {"binary_data_size": rows.nbytes}
    tensor = {"name": "x", "shape": list(rows.shape), "datatype": "FP32", "parameters": size} | dict(change or {})
    head = json.dumps({"inputs": [tensor], **more}).encode()
    return head + rows.tobytes(), str(len(head))


def ask(server: Running, sent: bytes, length: str, path: str = INFER, **headers: str) -> Answer:
    return server.call("POST", path, sent, Inference_Header_Content_Length=length, **headers)


def unpacked(answer: Answer) -> dict[str, list[int]]:
    """INT64 outputs of an answer, each in JSON or in bytes."""
    assert answer.status == 200, answer.body
    length = int(answer.headers.get("inference-header-content-length", len(answer.body)))
    found, tail = {}, answer.body[length:]
    for one in json.loads(answer.body[:length])["outputs"]:
        if "data" in one:
            found[one["name"]] = one["data"]
        else:
            size = one["parameters"]["binary_data_size"]
            found[one["name"]], tail = np.frombuffer(tail[:size], "<i8").tolist(), tail[size:]
    assert not tail
    return found


def test_bytes_in_and_json_out(server: Running) -> None:
    answer = ask(server, *body(ROWS[:20]))
    assert answer.headers["content-type"].startswith("application/json")
    assert "inference-header-content-length" not in answer.headers
    assert unpacked(answer)["label"] == LABELS[:20].tolist()


def test_bytes_out_for_all_but_one(server: Running) -> None:
    outputs = [{"name": "votes"}, {"name": "label", "parameters": {"binary_data": False}}]
    answer = ask(server, *body(ROWS[:20], outputs=outputs, parameters={"binary_data_output": True, "k": 1}))
    found = unpacked(answer)
    assert list(found) == ["votes", "label"]
    assert found["votes"] == [1] * 20
    assert len(json.loads(answer.body[: int(answer.headers["inference-header-content-length"])])["outputs"]) == 2


def test_a_body_of_bytes_alone(server: Running) -> None:
    assert unpacked(ask(server, ROWS[:9].tobytes(), "0"))["label"] == LABELS[:9].tolist()
    assert ask(server, ROWS[:9].tobytes()[1:], "0").status == 400
    assert ask(server, b"", "0").status == 400
    assert ask(server, ROWS[:9].tobytes(), "0", "/v2/models/null/infer").status == 400


@pytest.mark.parametrize("length", ["", "-1", "+5", "1.0", "x", "99999", "9" * 5000, "1", "٣"])
def test_a_length_that_lies(server: Running, length: str) -> None:
    sent, _ = body(ROWS[:1])
    answer = ask(server, sent, length.encode().decode("latin1"))
    assert answer.status == 400
    assert answer.json.keys() == {"error"}


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": {"binary_data_size": 119}}, {"parameters": {"binary_data_size": 121}},
        {"parameters": {"binary_data_size": -120}}, {"parameters": {"binary_data_size": "120"}},
        {"parameters": {"binary_data_size": True}}, {"parameters": {"binary_data_size": 2**70}}, {"parameters": {}},
        {"parameters": []}, {"data": [0.0] * 30}, {"shape": [2**62, 30]}, {"shape": [2, 30]}, {"datatype": "FP16"},
        {"datatype": "FP64"}, {"datatype": "INT32"}, {"datatype": "BYTES"}, {"datatype": "BOOL"},
    ],
)  # fmt: skip
def test_bytes_that_do_not_fit(server: Running, change: dict[str, Any]) -> None:
    answer = ask(server, *body(ROWS[:1], change))
    assert answer.status == 400
    assert answer.json.keys() == {"error"}


@pytest.mark.parametrize("more", [{"parameters": {"binary_data_output": 1}}, {"parameters": {"timeout": -1}},
                                  {"outputs": [{"name": "label", "parameters": {"binary_data": "yes"}}]}])  # fmt: skip
def test_flags_that_are_none(server: Running, more: dict[str, Any]) -> None:
    assert ask(server, *body(ROWS[:1], **more)).status == 400


def test_bytes_beyond_the_inputs_and_bytes_without_a_header(server: Running) -> None:
    sent, length = body(ROWS[:1])
    assert ask(server, sent + b"more", length).status == 400
    assert server.call("POST", INFER, sent[: int(length)]).status == 400
    for value in (np.nan, np.inf):
        assert ask(server, *body(np.full((1, 30), value, np.float32))).status == 400


@pytest.mark.parametrize(("coding", "pack", "open_"), [("gzip", gzip.compress, gzip.decompress),
                                                       ("deflate", zlib.compress, zlib.decompress)])  # fmt: skip
def test_packed_both_ways(server: Running, coding: str, pack: Any, open_: Any) -> None:
    sent, length = body(ROWS[:400])
    answer = ask(server, pack(sent), length, Content_Encoding=coding, Accept_Encoding=coding)
    assert answer.headers["content-encoding"] == coding
    assert unpacked(Answer(200, {}, open_(answer.body)))["label"] == LABELS[:400].tolist()
    for never in (f"{coding};q=0", f"{coding}; q=0.0", "identity", "br"):
        assert "content-encoding" not in ask(server, sent, length, Accept_Encoding=never).headers
    assert "content-encoding" in ask(server, sent, length, Accept_Encoding=f"br, {coding};q=0.5").headers
    bomb = pack(b" " * (64 * 2**20))
    assert ask(server, bomb, "2", Content_Encoding=coding).status == 413


def test_an_unknown_packing_is_named(server: Running) -> None:
    answer = ask(server, *body(ROWS[:1]), Content_Encoding="rot13")
    assert answer.status == 415
    assert "rot13" in answer.json["error"]


def test_one_input_in_json_and_one_in_bytes() -> None:
    y = np.array([2**53 + 1, -1], "<i8")
    for order in (1, -1):
        inputs = [
            {"name": "x", "shape": [2, 2], "datatype": "UINT8", "data": [1, 2, 3, 255]},
            {"name": "y", "shape": [2], "datatype": "INT64", "parameters": {"binary_data_size": 16}},
        ][::order]
        head = json.dumps({"inputs": inputs}).encode()
        found = protocol.parse(head + y.tobytes(), Pair(), str(len(head)))
        assert list(found.inputs) == ["x", "y"]
        assert found.inputs["x"].dtype == np.float32
        assert found.inputs["x"].tolist() == [[1, 2], [3, 255]]
        assert np.array_equal(found.inputs["y"], y)


def test_what_converts_without_loss() -> None:
    assert tensors.TAKEN["FP32"] == ["BOOL", "UINT8", "UINT16", "INT8", "INT16", "FP16", "FP32"]
    assert tensors.TAKEN["FP64"] == [name for name in tensors.DTYPES if name not in ("UINT64", "INT64")]
    assert tensors.TAKEN["INT64"] == ["BOOL", "UINT8", "UINT16", "UINT32", "INT8", "INT16", "INT32", "INT64"]


def test_whole_numbers_around_2_to_the_63_in_one_list() -> None:
    tensor, uint64 = Tensor("x", "UINT64", (-1,)), tensors.DTYPES["UINT64"]
    values = [0, 2**63, 2**53 + 1, 2**64 - 1]
    assert tensors.from_json(values, uint64, (4,), tensor).tolist() == values
    for wrong in ([-1, 2**63], [0.0, 2**63], [0, 2**64]):
        with pytest.raises(BadInput):
            tensors.from_json(wrong, uint64, (2,), tensor)


@settings(max_examples=4000, deadline=None)
@given(st.data())
def test_values_of_every_type_arrive_as_they_are(data: st.DataObject) -> None:
    wanted = data.draw(st.sampled_from(list(tensors.DTYPES)))
    sent = tensors.DTYPES[data.draw(st.sampled_from(tensors.TAKEN[wanted]))]
    one = {"b": st.booleans(), "f": st.floats(width=8 * max(sent.itemsize, 2), allow_nan=False, allow_infinity=False)}  # type: ignore[arg-type]
    if sent.kind in "iu":
        one[sent.kind] = st.integers(int(np.iinfo(sent).min), int(np.iinfo(sent).max))  # type: ignore[assignment]
    values = np.array(data.draw(st.lists(one[sent.kind], min_size=1, max_size=9)), sent)
    tensor = Tensor("x", wanted, (-1,))
    for found in (
        tensors.from_bytes(values.tobytes(), sent, values.shape, tensor),
        tensors.from_json(values.tolist(), sent, values.shape, tensor),
    ):
        assert found.dtype == tensors.DTYPES[wanted]
        assert found.tolist() == values.tolist()


@settings(max_examples=2000, deadline=None)
@given(st.binary(max_size=60), st.integers(-5, 200), st.integers(-5, 200), st.sampled_from([*tensors.DTYPES, "BYTES"]))
def test_near_requests_are_read_or_refused(tail: bytes, size: int, slip: int, datatype: str) -> None:
    tensor = {"name": "x", "shape": [size, 1], "datatype": datatype, "parameters": {"binary_data_size": len(tail)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    try:
        found = protocol.parse(head + tail, Null(), str(len(head) + (slip if slip < 5 else 0)))
    except BadInput as error:
        assert str(error)
    else:
        assert found.inputs["x"].shape == (size, 1)


def test_stats_config_and_the_repository_take_nonsense(server: Running) -> None:
    for path in ("/v2/repository/index", "/v2/repository/models/knn/load", "/v2/repository/models/knn/unload"):
        for sent in (b"[]", b"{", b"1"):
            assert server.call("POST", path, sent).status == 400
    assert server.call("GET", "/v2/models/knn/ready").status == 200
    assert server.call("GET", "/v2/models/knn/versions/9/stats").status == 404
    assert server.call("GET", "/v2/models/knn/versions/1/config").json["max_batch_size"] == 0
    for path in ("/v2/systemsharedmemory/status", "/v2/cudasharedmemory/region/r/register", "/v2/trace/setting",
                 "/v2/models/knn/trace/setting", "/v2/logging"):  # fmt: skip
        for method in ("GET", "POST"):
            answer = server.call(method, path)
            assert answer.status == 501
            assert answer.json.keys() == {"error"}
