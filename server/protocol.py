"""Open Inference Protocol v2 over REST: requests to arrays, arrays to responses, errors; tensors in JSON or binary.

The protocol: https://github.com/open-inference/open-inference-protocol. Binary tensors, Triton's extension:
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from server import tensors
from server.models.base import Array, BadInput, Batch, Model, Tensor
from server.tensors import kind, short

# Hints to a scheduler that tritonclient sends. Every request here has the same priority.
LARGE = 2**15
MOST = ((b"{", 10_000, "objects"), (b"[", 1_000_000, "lists"))  # of which each takes some 100 bytes, and time
HINTS = ("timeout", "priority")


class BadOutput(Exception):
    """A model gave what it does not say that it gives."""


class NotOffered(Exception):
    """Something of Triton's that this server does not do; the text names it."""


class Output(NamedTuple):
    name: str
    binary: bool


class Request(NamedTuple):
    """A request that fits its model: arrays in the model's data types and shapes, `outputs` in the order wanted. Only
    the model itself knows whether it takes the parameters."""

    id: str | None
    inputs: Mapping[str, Array]
    parameters: Mapping[str, Any]
    outputs: tuple[Output, ...]
    timeout_us: int = 0  # 0 is none

    def batch(self) -> Batch:
        return Batch(self.inputs, self.parameters, tuple(output.name for output in self.outputs))


class _Known(NamedTuple):
    """What a model says of itself, as requests need it."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    plain: tuple[Output, ...]  # wanted where a request names none: in JSON, or in binary
    binary: tuple[Output, ...]


@lru_cache
def _known(model: Model) -> _Known:
    named = [tensor.name for tensor in model.outputs if not tensor.on_request]
    return _Known(
        {tensor.name: tensor for tensor in model.inputs},
        {tensor.name: tensor for tensor in model.outputs},
        tuple(Output(name, False) for name in named),
        tuple(Output(name, True) for name in named),
    )


class Response(NamedTuple):
    """A body; `json_bytes` of it are JSON and the rest are tensors, or it is None and all is JSON."""

    body: bytes
    json_bytes: int | None


def parse(body: bytes, model: Model, json_bytes: str | None = None) -> Request:
    """Read an infer request for `model`; `json_bytes` is the header Inference-Header-Content-Length.

    Raises BadInput with what was wanted and what was found, NotOffered for shared memory and classification.
    """
    length = _length(json_bytes, len(body))
    if length == 0:
        return _bare(body, model)
    for opens, most, what in MOST if len(body) > LARGE else ():
        if body.count(opens, 0, length) > most:
            raise BadInput(f"wanted at most {most:,} {what} in a request; found more")
    try:
        message = orjson.loads(body if length is None else body[:length])
    except orjson.JSONDecodeError as error:
        raise BadInput(f"wanted a JSON body; it could not be parsed: {error}") from None
    if not isinstance(message, dict):
        raise BadInput(f"wanted a JSON object; found {kind(message)}")
    identifier = message.get("id")
    if identifier is not None and not isinstance(identifier, str):
        raise BadInput(f"wanted a string for id; found {kind(identifier)}")
    parameters = _object(message, "parameters")
    all_binary, timeout_us = False, 0
    if parameters:
        parameters = dict(parameters)
        all_binary = _flag(parameters.pop("binary_data_output", False), "binary_data_output")
        hints = [parameters.pop(name, 0) for name in HINTS]
        for name, value in zip(HINTS, hints, strict=True):
            if type(value) is not int or value < 0:
                raise BadInput(f"wanted a whole number, 0 or more, for {name}; found {short(value)}")
        timeout_us = hints[0]
        for name, value in parameters.items():
            if not isinstance(value, str | int | float):
                raise BadInput(
                    f"wanted a string, a number or a boolean for parameter {short(name)}; found {kind(value)}"
                )
    outputs = _outputs(message.get("outputs"), model, all_binary)
    inputs = _inputs(message.get("inputs"), model, body, length)
    return Request(identifier, inputs, parameters, outputs, timeout_us)


def _length(header: str | None, most: int) -> int | None:
    if header is None:
        return None
    if not (header.isascii() and header.isdecimal() and len(header) < 20 and int(header) <= most):
        raise BadInput(f"Inference-Header-Content-Length wants the length of the JSON, at most the body's {most} "
                       f"bytes; found {short(header)}")  # fmt: skip
    return int(header)


def _bare(body: bytes, model: Model) -> Request:
    """A body without JSON is the one input's bytes; its rows follow from its length."""
    if len(model.inputs) != 1 or model.inputs[0].shape.count(-1) > 1:
        raise BadInput(f"model {model.name} wants its inputs described in JSON; found a body of bytes alone")
    wanted = model.inputs[0]
    dtype = tensors.DTYPES[wanted.datatype]
    row = dtype.itemsize * math.prod(size for size in wanted.shape if size != -1)
    if not body or len(body) % row:
        raise BadInput(f"input {wanted.name!r} wants a multiple of {row} bytes; found {len(body)}")
    size = tuple(len(body) // row if known == -1 else known for known in wanted.shape)
    inputs = {wanted.name: tensors.from_bytes(body, dtype, size, wanted, not model.takes_nonfinite)}
    return Request(None, inputs, {}, _outputs(None, model, all_binary=True))


def _inputs(inputs: Any, model: Model, body: bytes, at: int | None) -> dict[str, Array]:
    """The tensors; those that are bytes begin in the body `at` there, if it has any."""
    known = _known(model).inputs
    if not isinstance(inputs, list):
        raise BadInput(f"model {model.name} wants a list of objects for inputs; found {kind(inputs)}")
    if len(inputs) != len(known):
        raise BadInput(f"model {model.name} wants the inputs {', '.join(known)}; found {len(inputs)} of them")
    found: dict[str, Array] = {}
    start = at or 0
    for tensor in inputs:
        if not isinstance(tensor, dict):
            raise BadInput(f"model {model.name} wants objects for inputs; found {kind(tensor)}")
        name = tensor.get("name")
        if not isinstance(name, str) or name not in known or name in found:
            raise BadInput(f"model {model.name} wants the inputs {', '.join(known)}, each once; found {short(name)}")
        wanted = known[name]
        dtype, size = (
            tensors.datatype(tensor.get("datatype"), wanted),
            tensors.shape(tensor.get("shape"), wanted, model.takes_empty),
        )
        parameters = _object(tensor, "parameters")
        if parameters:
            _no_shared_memory(parameters)
        if "binary_data_size" not in parameters:
            if "data" not in tensor:
                raise BadInput(f"input {name!r} has neither data nor the parameter binary_data_size")
            found[name] = tensors.from_json(tensor["data"], dtype, size, wanted, not model.takes_nonfinite)
            continue
        count = parameters["binary_data_size"]
        if "data" in tensor or at is None:
            other = "data as well" if "data" in tensor else "no header Inference-Header-Content-Length"
            raise BadInput(f"input {name!r} has the parameter binary_data_size; found {other}")
        if type(count) is not int or not 0 <= count <= len(body) - start:
            raise BadInput(f"input {name!r} wants a binary_data_size of at most the {len(body) - start} bytes that "
                           f"are left in the body; found {short(count)}")  # fmt: skip
        data = body[start : start + count]
        found[name] = tensors.from_bytes(data, dtype, size, wanted, not model.takes_nonfinite)
        start += count
    if at is not None and start != len(body):
        raise BadInput(f"the inputs take {start - at} bytes after the JSON; found {len(body) - at}")
    if len(known) == 1:
        return found
    rows = {name: len(found[name]) for name, tensor in known.items() if tensor.shape[0] == -1}
    if len(set(rows.values())) > 1:
        counts = ", ".join(f"{count} of {name!r}" for name, count in rows.items())
        raise BadInput(f"model {model.name} wants as many rows in every input; found {counts}")
    return {name: found[name] for name in known}


def _outputs(outputs: Any, model: Model, all_binary: bool) -> tuple[Output, ...]:
    known = _known(model).outputs
    if outputs is None or outputs == []:
        return _known(model).binary if all_binary else _known(model).plain
    if not isinstance(outputs, list) or not all(isinstance(output, dict) for output in outputs):
        raise BadInput(f"wanted a list of objects for outputs; found {kind(outputs)}")
    wanted: dict[str, Output] = {}
    for output in outputs:
        name, parameters = output.get("name"), _object(output, "parameters")
        if not isinstance(name, str) or name not in known:
            raise BadInput(f"model {model.name} gives {', '.join(known)}; the output {short(name)} is unknown")
        if name in wanted:
            raise BadInput(f"wanted each output once; found {name} twice")
        _no_shared_memory(parameters)
        if parameters.get("classification"):
            raise NotOffered("classification is not offered; ask for the output itself")
        wanted[name] = Output(name, _flag(parameters.get("binary_data", all_binary), "binary_data"))
    return tuple(wanted.values())


def _object(message: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = message.get(key)
    if value is not None and not isinstance(value, dict):
        raise BadInput(f"wanted an object for {key}; found {kind(value)}")
    return value or {}


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise BadInput(f"wanted true or false for {name}; found {short(value)}")
    return value


def _no_shared_memory(parameters: Mapping[str, Any]) -> None:
    for key in parameters:
        if key.startswith("shared_memory"):
            raise NotOffered("shared memory is not offered; send tensors in the body")


def check_results(model: Model, batch: Batch, results: Mapping[str, Array]) -> None:
    """Raise BadOutput where an output that is wanted is missing, or has not the data type and shape that it should."""
    rows = len(next(iter(batch.inputs.values())))
    known = _known(model).outputs
    for name in batch.outputs:
        values, (_, datatype, shape, _) = results.get(name), known[name]
        wanted = (rows, *shape[1:]) if shape[0] == -1 else shape
        if not isinstance(values, np.ndarray):
            found = type(values).__name__
        elif values.dtype == tensors.DTYPES[datatype] and tensors.fits(values.shape, wanted):
            continue
        else:
            found = f"{values.dtype} {list(values.shape)}"
        raise BadOutput(f"model {model.name} should give {name} as {datatype} {list(wanted)}; found {found}")


def response(model: Model, version: str, request: Request, results: Mapping[str, NDArray[Any]]) -> Response:
    """The answer, with the outputs asked for, in that order. Raises BadInput where JSON cannot hold them."""
    message: dict[str, Any] = {"model_name": model.name, "model_version": version}
    if request.id is not None:
        message["id"] = request.id
    described: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for name, binary in request.outputs:
        values = results[name]
        output: dict[str, Any] = {"name": name, "shape": list(values.shape), "datatype": tensors.NAMES[values.dtype]}
        if binary:
            tail.append(values.tobytes())
            output["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise BadInput(f"output {name!r} has values that are not finite, which JSON cannot hold; ask for it "
                               "with binary_data")  # fmt: skip
            output["data"] = np.ascontiguousarray(values).reshape(-1)
        described.append(output)
    message["outputs"] = described
    head = orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(b"".join([head, *tail]), len(head)) if tail else Response(head, None)


def metadata(model: Model) -> dict[str, Any]:
    def listed(described: tuple[Tensor, ...]) -> list[dict[str, Any]]:
        return [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in described]

    return {
        "name": model.name, "versions": list(model.versions), "platform": "numpy",
        "inputs": listed(model.inputs), "outputs": listed(model.outputs),
    }  # fmt: skip


def config(model: Model) -> dict[str, Any]:
    """Triton's model configuration. Rows are a dimension like others here, so max_batch_size is 0."""

    def listed(described: tuple[Tensor, ...]) -> list[dict[str, Any]]:
        return [{"name": t.name, "data_type": f"TYPE_{t.datatype}", "dims": list(t.shape)} for t in described]

    return {
        "name": model.name, "platform": "numpy", "backend": "python", "max_batch_size": 0,
        "input": listed(model.inputs), "output": listed(model.outputs),
        "parameters": {key: {"string_value": str(value)} for key, value in model.settings.items()},
    }  # fmt: skip
