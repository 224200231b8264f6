"""Open Inference Protocol v2 over REST, tensors in JSON: requests to arrays, arrays to responses, errors.

The protocol: https://github.com/open-inference/open-inference-protocol. The binary extension is not offered yet.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from server.models.base import BadInput, Model, Tensor

NUMPY = {"BOOL": "?", "UINT8": "u1", "UINT16": "u2", "INT8": "i1", "INT16": "i2", "FP16": "f2", "FP32": "f4"}
NAMES = {"i8": "INT64", "f4": "FP32"}


class Request(NamedTuple):
    """A request that fits its model: `x` of shape (rows, width), `outputs` the names wanted, in order."""

    id: str | None
    x: NDArray[np.float32]
    parameters: Mapping[str, Any]
    outputs: tuple[str, ...]


def parse(body: bytes, model: Model) -> Request:
    """Read an infer request for `model`. Raises BadInput with what was wanted and what was found."""
    try:
        message = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadInput(f"wanted a JSON body; it could not be parsed: {error}") from None
    if not isinstance(message, dict):
        raise BadInput(f"wanted a JSON object; found {_kind(message)}")
    identifier = message.get("id")
    if identifier is not None and not isinstance(identifier, str):
        raise BadInput(f"wanted a string for id; found {_kind(identifier)}")
    parameters = message.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise BadInput(f"wanted an object for parameters; found {_kind(parameters)}")
    return Request(
        identifier, _input(message.get("inputs"), model), parameters, _outputs(message.get("outputs"), model)
    )


def _input(inputs: Any, model: Model) -> NDArray[np.float32]:
    wanted = model.inputs[0]
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        found = f"{len(inputs)} of them" if isinstance(inputs, list) else _kind(inputs)
        raise BadInput(f"model {model.name} wants one input, {wanted.name!r}, in the list inputs; found {found}")
    tensor = inputs[0]
    if tensor.get("name") != wanted.name:
        raise BadInput(f"model {model.name} wants the input {wanted.name!r}; found {tensor.get('name')!r}")
    datatype = tensor.get("datatype")
    if datatype not in NUMPY:
        raise BadInput(f"input {wanted.name!r} wants the datatype {', '.join(reversed(NUMPY))}; found {datatype!r}")
    shape = _shape(tensor.get("shape"), wanted)
    if "data" not in tensor:
        raise BadInput(f"input {wanted.name!r} has no data; tensors are taken in JSON")
    try:
        values = np.asarray(tensor["data"])
        if values.dtype.kind not in "biuf":
            raise ValueError
        exact = values.astype(NUMPY[datatype])
    except (ValueError, OverflowError):
        raise BadInput(f"input {wanted.name!r} wants numbers, in rows of equal length; found something else") from None
    if values.size != math.prod(shape):
        raise BadInput(
            f"input {wanted.name!r} of shape {list(shape)} wants {math.prod(shape)} values; found {values.size}"
        )
    if datatype[0] != "F" and not np.array_equal(exact, values):
        raise BadInput(f"input {wanted.name!r} has values that are no {datatype}")
    x = exact.astype(np.float32).reshape(shape)
    if not np.isfinite(x).all():
        raise BadInput(f"input {wanted.name!r} wants finite values; found NaN or infinity")
    return x


def _shape(shape: Any, wanted: Tensor) -> tuple[int, ...]:
    whole = isinstance(shape, list) and all(type(size) is int and size >= 1 for size in shape)
    if not whole or len(shape) != len(wanted.shape):
        raise BadInput(f"input {wanted.name!r} wants a shape like {list(wanted.shape)}, 1 row or more; found {shape!r}")
    for size, known in zip(shape, wanted.shape, strict=True):
        if known not in (-1, size):
            raise BadInput(f"input {wanted.name!r} wants the shape {list(wanted.shape)}; found {shape!r}")
    return tuple(shape)


def _outputs(outputs: Any, model: Model) -> tuple[str, ...]:
    known = tuple(tensor.name for tensor in model.outputs)
    if not outputs:
        return known
    if not isinstance(outputs, list) or not all(isinstance(output, dict) for output in outputs):
        raise BadInput(f"wanted a list of objects for outputs; found {_kind(outputs)}")
    for output in outputs:
        if output.get("name") not in known:
            raise BadInput(f"model {model.name} gives {', '.join(known)}; the output {output.get('name')!r} is unknown")
    return tuple(output["name"] for output in outputs)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "nothing"}
    return names.get(type(value), "a number")


def response(model: Model, version: str, request: Request, results: Mapping[str, NDArray[Any]]) -> bytes:
    """The body of an answer, in the order of the outputs asked for."""
    message: dict[str, Any] = {"model_name": model.name, "model_version": version}
    if request.id is not None:
        message["id"] = request.id
    message["outputs"] = [
        {
            "name": name,
            "shape": list(results[name].shape),
            "datatype": NAMES[results[name].dtype.str[1:]],
            "data": np.ascontiguousarray(results[name]).reshape(-1),
        }
        for name in request.outputs
    ]
    return orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY)


def metadata(model: Model) -> dict[str, Any]:
    def listed(tensors: tuple[Tensor, ...]) -> list[dict[str, Any]]:
        return [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in tensors]

    return {
        "name": model.name, "versions": list(model.versions), "platform": "numpy",
        "inputs": listed(model.inputs), "outputs": listed(model.outputs),
    }  # fmt: skip
