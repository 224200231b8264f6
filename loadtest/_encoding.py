"""Tensors on the wire: as JSON numbers, or by the Open Inference Protocol's binary extension. Pure functions.

Binary: the body is JSON, then the tensors' little-endian bytes, row by row, in the order in which the JSON names them;
the header Inference-Header-Content-Length says where the JSON ends. It costs a server far less than numbers as text do.
"""

from typing import Any, NamedTuple

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

ENCODINGS = ("binary", "json")
EXTENSION = "binary_tensor_data"  # what a server's metadata list where it speaks binary
DTYPES: dict[str, type[np.generic]] = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "FP16": np.float16, "FP32": np.float32, "FP64": np.float64,
}  # fmt: skip


class Body(NamedTuple):
    """`json_size`: where the JSON ends and bytes begin; -1 where it is all JSON."""

    data: bytes
    json_size: int = -1


def encode(batch: NDArray[Any], name: str, datatype: str, encoding: str) -> Body:
    """A request for the rows `batch`, shape (n, d), as the input `name`."""
    values = np.ascontiguousarray(batch.astype(DTYPES[datatype]))
    tensor: dict[str, Any] = {"name": name, "shape": list(batch.shape), "datatype": datatype}
    if encoding == "json":
        data = values.astype(np.float32) if values.dtype == np.float16 else values  # which orjson does not write
        return Body(orjson.dumps({"inputs": [tensor | {"data": data.ravel()}]}, option=orjson.OPT_SERIALIZE_NUMPY))
    raw = values.astype(values.dtype.newbyteorder("<")).tobytes()
    tensor["parameters"] = {"binary_data_size": len(raw)}
    head = orjson.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}})
    return Body(head + raw, len(head))


class _Size(msgspec.Struct):
    binary_data_size: int = -1


class _Output(msgspec.Struct):
    name: str
    datatype: str = ""
    data: Any = None
    parameters: _Size = msgspec.field(default_factory=_Size)


class _Answer(msgspec.Struct):
    outputs: list[_Output]


_DECODER = msgspec.json.Decoder(_Answer)


def decode(body: Body, name: str) -> list[Any]:
    """The values of the output `name`, row by row. Raises ValueError for what is no answer, or has no such output."""
    text, rest = (body.data, b"") if body.json_size < 0 else (body.data[: body.json_size], body.data[body.json_size :])
    try:
        outputs = _DECODER.decode(text).outputs
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from error
    at = 0
    for output in outputs:
        size = output.parameters.binary_data_size
        if output.name == name:
            return _values(output, rest[at : at + size] if size >= 0 else None, size)
        at += max(size, 0)
    raise ValueError(f"no output {name!r}")


def _values(output: _Output, raw: bytes | None, size: int) -> list[Any]:
    if raw is None:
        values: list[Any] = np.asarray(output.data).ravel().tolist()
        return values
    if len(raw) != size or output.datatype not in DTYPES:
        raise ValueError(f"{output.name}: {len(raw)} of {size} bytes of {output.datatype!r}")
    found: list[Any] = np.frombuffer(raw, np.dtype(DTYPES[output.datatype]).newbyteorder("<")).tolist()
    return found
