"""Tensors on the wire: what is sent is what the server's own parser reads, and what it writes is read back."""

import json

import numpy as np
import pytest

from loadtest._encoding import DTYPES, Body, decode, encode
from loadtest._http1 import AnswerReader, Garbled
from loadtest._rows import request


@pytest.mark.parametrize("datatype", sorted(DTYPES))
def test_binary_tensors_are_rows_of_little_endian_bytes_after_the_json(datatype: str) -> None:
    batch = np.arange(6).reshape(2, 3)
    body = encode(batch, "q", datatype, "binary")
    asked = json.loads(body.data[: body.json_size])
    tensor = asked["inputs"][0]
    assert asked["parameters"] == {"binary_data_output": True}
    assert (tensor["name"], tensor["datatype"], tensor["shape"]) == ("q", datatype, [2, 3])
    values = np.frombuffer(body.data[body.json_size :], np.dtype(DTYPES[datatype]).newbyteorder("<"))
    assert tensor["parameters"]["binary_data_size"] == values.nbytes
    assert (values == batch.ravel().astype(DTYPES[datatype])).all()
    head = request("h:1", "/p", body).partition(b"\r\n\r\n")[0]
    assert b"Inference-Header-Content-Length: %d" % body.json_size in head
    assert b"Content-Length: %d" % len(body.data) in head


def test_json_has_no_such_header() -> None:
    body = encode(np.ones((1, 2)), "q", "FP16", "json")
    assert body.json_size == -1 and json.loads(body.data)["inputs"][0]["data"] == [1.0, 1.0]
    assert b"Inference-Header" not in request("h:1", "/p", body)


def answer(*outputs: tuple[str, str, np.ndarray, bool]) -> Body:
    told, raw = [], b""
    for name, datatype, values, binary in outputs:
        told.append({"name": name, "datatype": datatype, "shape": list(values.shape)})
        if binary:
            told[-1]["parameters"] = {"binary_data_size": values.nbytes}
            raw += values.tobytes()
        else:
            told[-1]["data"] = values.tolist()
    head = json.dumps({"model_name": "m", "outputs": told}).encode()
    return Body(head + raw, len(head))


def test_answers_may_mix_both_forms() -> None:
    label, share = np.array([3, -1], np.int64), np.array([[0.25, 0.75], [1, 0]], np.float32)
    for first, second in ((True, True), (True, False), (False, True)):
        found = answer(("p", "FP32", share, first), ("label", "INT64", label, second))
        assert decode(found, "label") == [3, -1]
        assert decode(found, "p") == [0.25, 0.75, 1, 0]
    plain = answer(("label", "INT64", label, False))
    assert decode(Body(plain.data), "label") == [3, -1]  # JSON without the header


def test_what_is_no_answer() -> None:
    good = answer(("label", "INT64", np.array([3, -1], np.int64), True))
    for bad in (
        Body(good.data),  # bytes after the JSON
        Body(good.data, 5),
        Body(good.data, len(good.data) + 9),
        Body(good.data[:-1], good.json_size),  # a byte is missing
        Body(b"{}", 2),
        Body(b"", 0),
        Body(good.data.replace(b"INT64", b"WORDS"), good.json_size),
    ):
        with pytest.raises(ValueError):
            decode(bad, "label")
    with pytest.raises(ValueError, match="no output 'other'"):
        decode(good, "other")


@pytest.mark.parametrize("size", [1, 4096])
def test_the_parser_tells_where_the_json_ends(size: int) -> None:
    reader = AnswerReader()
    data = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nInference-Header-Content-Length: 2\r\n\r\n{}abcd"
    for at in range(0, len(data), size):
        done = reader.feed(data[at : at + size])
    assert done and reader.json_size == 2
    assert reader.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") and reader.json_size == -1
    with pytest.raises(Garbled):
        reader.feed(data.replace(b"Length: 2", b"Length: x"))
