"""Tensors of the Open Inference Protocol: data types, shapes, values in JSON or as bytes, little-endian, row-major."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from server.models.base import Array, BadInput, Tensor

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(code)
    for name, code in {
        "BOOL": "|b1", "UINT8": "|u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "|i1",
        "INT16": "<i2", "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
    }.items()
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def taken(datatype: str) -> list[str]:
    """The data types that become `datatype` without loss, whatever the values."""
    wanted = DTYPES[datatype]

    def fits(found: np.dtype[Any]) -> bool:
        if wanted.kind == "f" and found.kind in "iu" and found.itemsize >= wanted.itemsize:
            return False  # NumPy calls INT64 to FP64 safe, but 2**53 + 1 is lost
        return np.can_cast(found, wanted, "safe")

    return [name for name, found in DTYPES.items() if fits(found)]


NUMBERS = {int, float}
# Of values in JSON, as NumPy reads them, by the kind of what they become.
KINDS = {"b": "b", "f": "iuf", "i": "iu", "u": "iu"}
TAKEN = {datatype: taken(datatype) for datatype in DTYPES}


def no_warnings() -> None:
    """NumPy warns of values that become infinity here, and of their sums; clients are told. Once per thread: a context
    manager around each conversion would take longer than that."""
    np.seterr(over="ignore", invalid="ignore")


def datatype(value: Any, wanted: Tensor) -> np.dtype[Any]:
    if not isinstance(value, str) or value not in TAKEN[wanted.datatype]:
        raise BadInput(
            f"input {wanted.name!r} wants the datatype {' or '.join(TAKEN[wanted.datatype])}; found {short(value)}"
        )
    return DTYPES[value]


def shape(value: Any, wanted: Tensor, empty: bool = False) -> tuple[int, ...]:
    """The shape that a request says; `empty`: whether it may be one without rows."""
    if isinstance(value, list) and len(value) == len(wanted.shape):
        least = 0 if empty else 1
        for size, known in zip(value, wanted.shape, strict=True):
            if type(size) is not int or size < least or (size != known and known != -1):
                break
            least = 1  # only rows may be none
        else:
            return tuple(value)
    more = "" if empty else ", 1 row or more"
    raise BadInput(f"input {wanted.name!r} wants a shape like {list(wanted.shape)}{more}; found {short(value)}")


def fits(found: Sequence[int], wanted: tuple[int, ...]) -> bool:
    """Whether `found` is one of the shapes that `wanted` stands for."""
    if len(found) != len(wanted):
        return False
    for size, known in zip(found, wanted, strict=True):  # noqa: SIM110 (a generator takes twice as long)
        if known not in (-1, size):
            return False
    return True


def from_json(data: Any, dtype: np.dtype[Any], size: tuple[int, ...], wanted: Tensor, finite: bool = True) -> Array:
    """Values of `dtype`, flat or nested, as the data type that the model wants, and finite where that is asked for."""
    name, count = wanted.name, math.prod(size)
    try:
        values = np.asarray(data, dtype if _types(data) == {float} and dtype.kind == "f" else None)
        if dtype == DTYPES["UINT64"] and values.dtype.kind == "f":
            values = _whole(data, values)
    except ValueError:
        raise BadInput(f"input {name!r} wants numbers, in rows of equal length; found other data") from None
    if count == 0 and values.size == 0:
        values = np.zeros(size, dtype)
    if values.shape not in ((count,), size):
        raise BadInput(f"input {name!r} of shape {list(size)} wants {count} values, flat or in that shape; found "
                       f"data of shape {list(values.shape)}")  # fmt: skip
    if values.dtype.kind not in KINDS[dtype.kind]:
        noun = {"b": "true or false", "f": "numbers"}.get(dtype.kind, "whole numbers")
        raise BadInput(f"input {name!r} of {NAMES[dtype]} wants {noun}; found other values among its data")
    if dtype.kind in "iu" and count:
        bounds = np.iinfo(dtype)
        if int(values.min()) < bounds.min or int(values.max()) > bounds.max:
            raise BadInput(f"input {name!r} wants values from {bounds.min} to {bounds.max}; found others")
    # What is too large becomes infinity, of which NumPy would warn, and is refused in the next step.
    return _as_wanted(values.astype(dtype, copy=False), size, wanted, finite)


def _types(data: Any) -> set[type]:
    """Of the numbers in a list, nested or not. Raises ValueError for anything else, of which NumPy would make an array
    all the same: of strings one that gives each the room of the longest."""
    while isinstance(data, list):
        found = set(map(type, data))
        if list not in found:
            if found <= NUMBERS or found == {bool}:
                return found
            break
        if len(found) > 1:
            break
        data = list(itertools.chain.from_iterable(data))
    raise ValueError


def _whole(data: Any, values: Array) -> Array:
    """Whole numbers below and above 2**63 in one list, which NumPy would read as FP64; anything else as it was."""
    exact = np.asarray(data, dtype=object)
    found = exact.ravel().tolist()
    fits = all(type(value) is int for value in found) and min(found) >= 0 and max(found) < 2**64
    return exact.astype(np.uint64) if fits else values


def from_bytes(data: bytes, dtype: np.dtype[Any], size: tuple[int, ...], wanted: Tensor, finite: bool = True) -> Array:
    if len(data) != math.prod(size) * dtype.itemsize:
        raise BadInput(f"input {wanted.name!r} of {NAMES[dtype]} and shape {list(size)} wants "
                       f"{math.prod(size) * dtype.itemsize} bytes; found {len(data)}")  # fmt: skip
    if dtype.kind == "b" and max(data, default=0) > 1:
        raise BadInput(f"input {wanted.name!r} of BOOL wants bytes that are 0 or 1; found others")
    return _as_wanted(np.frombuffer(data, dtype), size, wanted, finite)


def _as_wanted(values: NDArray[Any], size: tuple[int, ...], wanted: Tensor, finite: bool = True) -> Array:
    if finite and values.dtype.kind == "f":
        flat = values if values.ndim == 1 else values.ravel()
        # The sum of squares is finite only where all values are, and takes BLAS less time than a look at each.
        if not (math.isfinite(flat.dot(flat)) or np.isfinite(flat).all()):
            raise BadInput(f"input {wanted.name!r} wants values that are finite in {NAMES[values.dtype]}; found others")
    return values.astype(DTYPES[wanted.datatype], copy=False).reshape(size)


def kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "nothing"}
    return names.get(type(value), "a number")


def short(value: Any) -> str:
    """The value as a client would recognise it, of a length that fits into one line."""
    try:
        text = orjson.dumps(value).decode()
    except TypeError:  # it is nested deeper than orjson writes, though it reads that
        return kind(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
