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
    parameters = message.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise BadInput(f"wanted an object for parameters; found {_kind(parameters)}")
    x, outputs = _input(message.get("inputs"), model), _outputs(message.get("outputs"), model)
    return Request(identifier, x, parameters or {}, outputs)


def _input(inputs: Any, model: Model) -> NDArray[np.float32]:
    wanted = model.inputs[0]
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        found = f"{len(inputs)} of them" if isinstance(inputs, list) else _kind(inputs)
        raise BadInput(f"model {model.name} wants one input, {wanted.name!r}, in the list inputs; found {found}")
    tensor = inputs[0]
    if tensor.get("name") != wanted.name:
        raise BadInput(f"model {model.name} wants the input {wanted.name!r}; found {_short(tensor.get('name'))}")
    if tensor.get("datatype") != wanted.datatype:
        raise BadInput(
            f"input {wanted.name!r} wants the datatype {wanted.datatype}; found {_short(tensor.get('datatype'))}"
        )
    shape = _shape(tensor.get("shape"), wanted)
    if "data" not in tensor:
        raise BadInput(f"input {wanted.name!r} has no data; tensors are taken in JSON")
    return _values(tensor["data"], shape, wanted.name)


def _values(data: Any, shape: tuple[int, ...], name: str) -> NDArray[np.float32]:
    try:
        values = np.asarray(data)
    except ValueError:
        raise BadInput(f"input {name!r} wants numbers, in rows of equal length; found other data") from None
    size = math.prod(shape)
    if values.shape not in ((size,), shape):
        raise BadInput(f"input {name!r} of shape {list(shape)} wants {size} values, flat or in that shape; found "
                       f"data of shape {list(values.shape)}")  # fmt: skip
    if values.dtype.kind not in "iuf":
        raise BadInput(f"input {name!r} wants numbers; found other values among its data")
    with np.errstate(over="ignore"):  # becomes infinity, which is refused below
        x = values.astype(np.float32).reshape(shape)
    if not np.isfinite(x).all():
        raise BadInput(f"input {name!r} wants values that are finite in FP32; found others")
    return x


def _shape(shape: Any, wanted: Tensor) -> tuple[int, ...]:
    fits = (
        isinstance(shape, list)
        and len(shape) == len(wanted.shape)
        and all(type(size) is int and size >= 1 for size in shape)
        and all(known in (-1, size) for size, known in zip(shape, wanted.shape, strict=True))
    )
    if not fits:
        raise BadInput(
            f"input {wanted.name!r} wants a shape like {list(wanted.shape)}, 1 row or more; found {_short(shape)}"
        )
    return tuple(shape)


def _outputs(outputs: Any, model: Model) -> tuple[str, ...]:
    known = tuple(tensor.name for tensor in model.outputs)
    if outputs is None or outputs == []:
        return known
    if not isinstance(outputs, list) or not all(isinstance(output, dict) for output in outputs):
        raise BadInput(f"wanted a list of objects for outputs; found {_kind(outputs)}")
    names = [output.get("name") for output in outputs]
    for name in names:
        if name not in known:
            raise BadInput(f"model {model.name} gives {', '.join(known)}; the output {_short(name)} is unknown")
    if len(set(names)) < len(names):
        raise BadInput(f"wanted each output once; found {', '.join(names)}")
    return tuple(names)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "nothing"}
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    """The value as a client would recognise it, of a length that fits into one line."""
    text = orjson.dumps(value).decode()
    return text if len(text) <= 100 else f"{text[:100]}…"


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
