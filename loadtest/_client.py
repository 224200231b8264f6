"""The few plain HTTP calls of the run itself (parity, batch jobs); load goes through the engine."""

from typing import Annotated, Any

import msgspec
import numpy as np
import requests

from hostsetup.target import Endpoint
from images.errors import TargetError
from loadtest import _encoding, _rows

INFER_ROWS = 50  # rows per parity request: an emulated guest answers within its time-out
Outputs = dict[str, np.ndarray[Any, Any]]


def session() -> requests.Session:
    """A session that takes no proxy from the environment: targets are reached directly, or not at all."""
    made = requests.Session()
    made.trust_env = False
    return made


def call(
    http: requests.Session, endpoint: Endpoint, method: str, path: str, *, timeout_s: float, body: Any = None
) -> Any:
    """One JSON call; a body of bytes is JSON already.

    Raises TargetError with the server's own words; `requests.Timeout` passes through.
    """
    try:
        if isinstance(body, bytes):
            head = {"Content-Type": "application/json"}
            answer = http.request(method, endpoint.url + path, data=body, headers=head, timeout=timeout_s)
        else:
            answer = http.request(method, endpoint.url + path, json=body, timeout=timeout_s)
        value = answer.json()
    except requests.Timeout:
        raise
    except (requests.RequestException, ValueError, RecursionError) as error:
        raise TargetError(f"{endpoint.label}: {method} {path} got no JSON answer: {error}") from error
    if answer.status_code >= 400:
        found = value.get("error", value) if isinstance(value, dict) else value
        raise TargetError(f"{endpoint.label}: {method} {path} was answered {answer.status_code}: {found}")
    return value


def infer(
    http: requests.Session, endpoint: Endpoint, model: str, rows: np.ndarray[Any, Any], *, timeout_s: float
) -> Outputs:
    """Every output of `model` for `rows` (n, d), in the order asked, asked for `INFER_ROWS` at a time.

    Raises TargetError where an answer is none of the Open Inference Protocol.
    """
    parts: list[Outputs] = []
    path = f"/v2/models/{model}/infer"
    try:
        signature = _rows.signature(call(http, endpoint, "GET", f"/v2/models/{model}", timeout_s=timeout_s))
    except ValueError as error:
        raise TargetError(f"{endpoint.label}: {model} cannot be asked: {error}") from error
    try:
        for start in range(0, len(rows), INFER_ROWS):
            body = _encoding.encode(rows[start : start + INFER_ROWS], signature.input, signature.datatype, "json").data
            answer = call(http, endpoint, "POST", path, timeout_s=timeout_s, body=body)
            parts.append({output.name: _array(output) for output in msgspec.convert(answer, _Answer).outputs})
        names = set.intersection(*map(set, parts))
        return {name: np.concatenate([part[name] for part in parts]) for name in sorted(names)}
    except (ValueError, OverflowError) as error:  # of NumPy, and msgspec.ValidationError
        raise TargetError(
            f"{endpoint.label}: POST {path} was answered with JSON that is not the Open Inference Protocol's: {error}"
        ) from error


class _Output(msgspec.Struct):
    name: str
    shape: Annotated[list[Annotated[int, msgspec.Meta(ge=0, le=2**31)]], msgspec.Meta(min_length=1)]
    data: list[Any]


class _Answer(msgspec.Struct):
    outputs: Annotated[list[_Output], msgspec.Meta(min_length=1)]


def _array(output: _Output) -> np.ndarray[Any, Any]:
    """Raises ValueError, OverflowError for what is no tensor of numbers, truth values or texts."""
    array = np.asarray(output.data)
    if array.dtype.kind not in "biufU":
        raise ValueError(f"the output {output.name!r} holds what is neither number, truth value nor text")
    return array.reshape(output.shape)
