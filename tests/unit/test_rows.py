"""Queries made beforehand, and the comparison of answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from images.errors import UsageError
from loadtest import _models
from loadtest._encoding import Body
from loadtest._rows import Checker, Rows, Signature, load, prepare, request, signature


def rows(n: int = 100, width: int = 5, model: str = "knn") -> Rows:
    values = np.random.default_rng(1).random((n, width), dtype=np.float32)
    return Rows(model, values, np.arange(n))


def sent(body: Body) -> np.ndarray:
    if body.json_size < 0:
        tensor = json.loads(body.data)["inputs"][0]
        values = np.asarray(tensor["data"], dtype=np.float32)
    else:
        tensor = json.loads(body.data[: body.json_size])["inputs"][0]
        values = np.frombuffer(body.data[body.json_size :], "<f4")
        assert tensor["parameters"] == {"binary_data_size": values.nbytes}
    assert (tensor["name"], tensor["datatype"]) == ("x", "FP32")
    return values.reshape(tensor["shape"])


@pytest.mark.parametrize("encoding", ["binary", "json"])
@pytest.mark.parametrize("batch", [1, 7, 150])
def test_queries_hold_the_rows_exactly_and_their_labels(batch: int, encoding: str) -> None:
    data = rows()
    assert data.labels is not None
    made = prepare(data, batch, seed=1, encoding=encoding)
    assert len(made.bodies) == 256 and len(set(made.bodies)) > 90 and made.width == 5
    assert made.expected is not None and made.output == "label"
    counts = np.zeros(100, dtype=int)
    for body, labels in zip(made.bodies, made.expected, strict=True):
        assert np.array_equal(sent(body), data.rows[list(labels)])  # to the last bit of a float32
        np.add.at(counts, list(labels), 1)
    assert counts.max() - counts.min() <= 1  # every row as often as any other


def test_queries_are_drawn_by_the_seed() -> None:
    assert prepare(rows(), 2, 1) == prepare(rows(), 2, 1)
    assert prepare(rows(), 2, 1).bodies != prepare(rows(), 2, 2).bodies


def test_large_batches_are_fewer() -> None:
    made = prepare(rows(width=784), 2000, 1)
    assert 1 <= len(made.bodies) < 10 and sum(len(body.data) for body in made.bodies) < 100e6


def test_the_null_model_answers_1_for_each_row() -> None:
    made = prepare(Rows("null", rows().rows, None), 3, 1, Signature(output="rows"))
    assert made.output == "rows" and made.expected is not None and set(made.expected) == {(1, 1, 1)}


def test_rows_without_labels_are_not_compared() -> None:
    made = prepare(Rows("mine", rows().rows, None), 3, 1)
    assert made.expected is None and not Checker(made).possible


def answer(*labels: int, name: str = "label") -> bytes:
    output = {"name": name, "datatype": "INT64", "shape": [len(labels)], "data": list(labels)}
    return json.dumps({"model_name": "knn", "outputs": [{"name": "votes", "data": [5]}, output]}).encode()


def test_answers_are_compared() -> None:
    made = prepare(rows(), 2, 1)
    assert made.expected is not None
    checker = Checker(made)
    for _ in range(2):
        for query, right in enumerate(made.expected):
            assert checker.right(query, answer(*right))
            assert checker.right(query, answer(*right).replace(b" ", b"  "))  # other bytes, the same answer
            assert not checker.right(query, answer(*(label + 1 for label in right)))
            assert not checker.right(query, answer(right[0]))
            assert not checker.right(query, answer(*right, name="rows"))
    for body in (b"", b"{}", b'{"error":"no"}', b"\xff", b'{"outputs":[{"name":"label","data":[[1],[2,3]]}]}'):
        assert not checker.right(0, body)
    nested = json.dumps({"outputs": [{"name": "label", "data": [[label] for label in made.expected[0]]}]}).encode()
    assert checker.right(0, nested)


def test_a_request_as_it_goes_over_the_wire() -> None:
    assert request("10.0.0.1:8080", "/v2/models/knn/infer", Body(b"{}")) == (
        b"POST /v2/models/knn/infer HTTP/1.1\r\nHost: 10.0.0.1:8080\r\n"
        b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    )


def test_rows_of_ones_own(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", rows=np.ones((3, 4)), labels=np.array([1, 0, 1], dtype=np.uint8))
    for place in (tmp_path, tmp_path / "mine.npz"):
        found = load("mine", place)
        assert found.rows.shape == (3, 4) and found.labels is not None and found.labels.tolist() == [1, 0, 1]


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no query rows for the model 'x'"):
        load("x", tmp_path)
    (tmp_path / "x.npz").write_bytes(b"PK nothing")
    with pytest.raises(UsageError, match=r"x\.npz is no \.npz file"):
        load("x", tmp_path)
    for arrays in (
        {"rows": np.ones(3)},
        {"rows": np.full((2, 2), np.nan)},
        {"rows": np.ones((2, 2)), "labels": [1]},
        {"x": [1]},
    ):
        np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=r"x\.npz"):
            load("x", tmp_path)


@pytest.mark.parametrize("model", _models.NAMES)
def test_the_projects_own_rows(model: str) -> None:
    found = load(model)
    assert len(found.rows) >= 200
    assert (found.labels is None) == (model in _models.LIKE_NULL)


def described(*inputs: tuple[str, str, list[int]], outputs: tuple[str, ...] = ("y",)) -> Any:
    return {
        "inputs": [dict(zip(("name", "datatype", "shape"), one, strict=True)) for one in inputs],
        "outputs": [{"name": name} for name in outputs],
    }


def test_a_signature_is_what_the_metadata_say() -> None:
    assert signature(described(("q", "FP64", [-1, 4]))) == Signature("q", "FP64", 4, "y")
    assert signature(described(("q", "FP64", [-1, 4]), outputs=("votes", "label"))).output == "label"
    for metadata in (
        None, {}, {"inputs": []}, described(), described(("a", "FP32", [-1, 2]), ("b", "FP32", [-1, 2])),
        described(("q", "BYTES", [-1, 4])), described(("q", "FP32", [-1])), described(("q", "FP32", [-1, 4]), outputs=()),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="wanted one input"):
            signature(metadata)


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64", "INT64", "UINT8"])
def test_requests_are_in_the_models_own_type(datatype: str) -> None:
    whole = Rows("mine", np.arange(12.0).reshape(4, 3), np.arange(4))
    made = prepare(whole, 2, 1, Signature("q", datatype, 3, "y"), encoding="json")
    tensor = json.loads(made.bodies[0].data)["inputs"][0]
    assert (tensor["name"], tensor["datatype"], tensor["shape"]) == ("q", datatype, [2, 3])
    kind = float if datatype.startswith("FP") else int
    assert all(type(value) is kind for value in tensor["data"])


def test_answers_that_are_not_whole_may_differ_by_rounding() -> None:
    made = prepare(Rows("mine", rows().rows, np.linspace(0, 1, 200).reshape(100, 2)), 2, 1, Signature(output="y"))
    assert made.expected is not None and len(made.expected[0]) == 4
    checker = Checker(made)

    def given(by: float) -> bool:
        assert made.expected is not None
        values = [value + by for value in made.expected[1]]
        return checker.right(1, json.dumps({"outputs": [{"name": "y", "data": values}]}).encode())

    assert given(1e-7) and not given(1e-2)
    assert not checker.right(1, b'{"outputs":[{"name":"y","data":["a","b","c","d"]}]}')


def test_rows_keep_the_precision_that_they_have(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", rows=np.full((3, 4), 0.1), labels=np.full((3, 2), 0.5))
    found = load("mine", tmp_path)
    assert found.rows[0, 0] == 0.1 and found.labels is not None and found.labels.dtype == np.float64


def test_offline_holds_every_row() -> None:
    made = prepare(rows(), 7, 1, all_rows=True)
    assert len(made.bodies) == 15 and made.expected is not None
    assert {label for labels in made.expected for label in labels} == set(range(100))
