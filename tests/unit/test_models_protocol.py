"""What a model may say of itself, and what becomes of requests and of results because of it."""

import json
from typing import Any

import numpy as np
import pytest

from server import protocol
from server.models.base import Array, BadInput, Batch, Model, Tensor


class Sum(Model):
    """Adds two inputs; its second output is only given to those who name it."""

    name = "sum"
    inputs = (Tensor("a", "FP32", (-1, 2)), Tensor("b", "INT64", (-1,)))
    outputs = (Tensor("sum", "FP64", (-1,)), Tensor("half", "FP32", (-1, 2), on_request=True))

    def predict(self, batch: Batch) -> dict[str, Array]:
        total = batch.inputs["a"].sum(axis=1, dtype=np.float64) + batch.inputs["b"]
        return {"sum": total, "half": batch.inputs["a"] / np.float32(2)}


class Tolerant(Sum):
    takes_nonfinite = True
    takes_empty = True


def tensor(name: str, datatype: str, values: Any, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": values}


def parse(model: Model, *inputs: dict[str, Any], **more: Any) -> protocol.Request:
    return protocol.parse(json.dumps({"inputs": inputs, **more}).encode(), model)


A, B = tensor("a", "FP32", [1, 2, 3, 4], [2, 2]), tensor("b", "UINT8", [5, 6], [2])


def answered(model: Model, request: protocol.Request) -> dict[str, Any]:
    batch = request.batch()
    results = model.predict(batch)
    protocol.check_results(model, batch, results)
    return {
        one["name"]: one["data"] for one in json.loads(protocol.response(model, "1", request, results).body)["outputs"]
    }


def test_several_inputs_in_any_order_each_in_the_models_type() -> None:
    for sent in ((A, B), (B, A)):
        request = parse(Sum(), *sent)
        assert [values.dtype for values in request.inputs.values()] == [np.float32, np.int64]
        assert answered(Sum(), request) == {"sum": [8, 13]}


def test_an_output_on_request_is_given_to_those_who_name_it() -> None:
    assert answered(Sum(), parse(Sum(), A, B, outputs=[{"name": "half"}])) == {"half": [0.5, 1, 1.5, 2]}
    assert list(answered(Sum(), parse(Sum(), A, B, outputs=[{"name": "half"}, {"name": "sum"}]))) == ["half", "sum"]
    assert [one["name"] for one in protocol.metadata(Sum())["outputs"]] == ["sum", "half"]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ((A,), "a, b"),
        ((A, A), "each once"),
        ((A, tensor("b", "UINT8", [5], [1])), "2 of 'a', 1 of 'b'"),
        ((A, tensor("b", "FP32", [5, 6], [2])), "'b' wants the datatype"),
        ((A, tensor("c", "UINT8", [5, 6], [2])), '"c"'),
        ((tensor("a", "FP32", [], [0, 2]), tensor("b", "UINT8", [], [0])), "1 row or more"),
        ((tensor("a", "FP32", [1e39, 2, 3, 4], [2, 2]), B), "finite"),
    ],
)
def test_inputs_that_do_not_fit_are_named(inputs: tuple[dict[str, Any], ...], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        parse(Sum(), *inputs)


def test_a_model_may_take_no_rows_and_no_finite_numbers() -> None:
    empty = parse(Tolerant(), tensor("a", "FP32", [], [0, 2]), tensor("b", "UINT8", [], [0]))
    assert [values.shape for values in empty.inputs.values()] == [(0, 2), (0,)]
    assert answered(Tolerant(), empty) == {"sum": []}
    head = json.dumps({"inputs": [{"name": "a", "datatype": "FP32", "shape": [0, 2], "parameters": {"binary_data_size": 0}},
                                  tensor("b", "BOOL", [], [0])]}).encode()  # fmt: skip
    assert protocol.parse(head, Tolerant(), str(len(head))).inputs["a"].shape == (0, 2)
    huge = parse(Tolerant(), tensor("a", "FP32", [1e39, 2, 3, 4], [2, 2]), B)
    assert huge.inputs["a"][0, 0] == np.inf
    with pytest.raises(BadInput, match="shape like"):
        parse(Tolerant(), tensor("a", "FP32", [], [2, 0]), B)


def test_a_model_takes_no_parameters_unless_it_says_so() -> None:
    asked = parse(Sum(), A, B, parameters={"k": 1, "timeout": 5, "priority": 1, "binary_data_output": True})
    with pytest.raises(BadInput, match="sum takes no parameters; found the parameter 'k'"):
        Sum().check(asked.parameters)


@pytest.mark.parametrize(
    "results",
    [
        {}, {"sum": None}, {"sum": [1.0, 2.0]}, {"sum": np.zeros(3)}, {"sum": np.zeros((2, 1))}, {"sum": np.float64(1)},
        {"sum": np.zeros(2, np.float32)}, {"sum": np.zeros(2, object)}, {"sum": np.zeros(2, ">f8")},
    ],
)  # fmt: skip
def test_results_that_are_not_as_the_model_says(results: Any) -> None:
    batch = parse(Sum(), A, B).batch()
    with pytest.raises(protocol.BadOutput, match=r"sum as FP64 \[2\]; found"):
        protocol.check_results(Sum(), batch, results)


def test_an_output_that_nobody_wants_is_not_looked_at() -> None:
    batch = parse(Sum(), A, B).batch()
    protocol.check_results(Sum(), batch, {"sum": np.zeros(2), "half": "nothing"})  # type: ignore[dict-item]
