"""What is sent and what must come back: query rows, request bytes made before the run, expected answers.

Rows and expected labels are read from `server/models/data/MODEL.npz` by path; no model is ever imported here.
"""

import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from images.errors import UsageError
from loadtest._encoding import DTYPES, Body, decode, encode
from loadtest._models import DATA, LIKE_NULL, NAMES

QUERIES = 256  # distinct requests: enough that no cache of the server's holds just one row
MAX_PREPARED_BYTES = 64 * 1024 * 1024
JSON_BYTES_PER_VALUE = 11  # "0.12345678," at most, about


@dataclass(frozen=True)
class Rows:
    """`rows` is float32 or float64 of shape (n, d); `labels`, int64 or float64 of shape (n, …), are what the first
    output must be for each, None where there is nothing to compare with."""

    model: str
    rows: NDArray[Any]
    labels: NDArray[Any] | None


@dataclass(frozen=True)
class Signature:
    """What a model's metadata say of its one input and of the output that is compared."""

    input: str = "x"
    datatype: str = "FP32"
    width: int = -1
    output: str = "label"


SIGNATURE = Signature()


def signature(metadata: Any) -> Signature:
    """Of GET /v2/models/MODEL's answer; the output `label` where there is one, else the first. Raises ValueError."""
    try:
        (tensor,) = metadata["inputs"]
        outputs = [output["name"] for output in metadata["outputs"]]
        width = int(tensor["shape"][-1])
        output = "label" if "label" in outputs else outputs[0]
        if len(tensor["shape"]) != 2 or tensor["datatype"] not in DTYPES:
            raise ValueError
        return Signature(tensor["name"], tensor["datatype"], width, output)
    except (TypeError, KeyError, IndexError, ValueError):
        found = metadata.get("inputs") if isinstance(metadata, dict) else metadata
        raise ValueError(
            f"wanted one input of numbers, of shape [-1, width], and outputs; found {found}"[:300]
        ) from None


def load(model: str, data: Path = DATA) -> Rows:
    """Read the rows of `model` from the .npz file `data`, or from MODEL.npz in the folder `data`. Raises UsageError."""
    own = data / f"{'null' if model in LIKE_NULL else model}.npz"
    path = own if data.is_dir() else data
    if not path.is_file():
        known = [name for name in NAMES if (data / f"{name}.npz").is_file()]
        raise UsageError(
            f"there are no query rows for the model {model!r}: {path} is missing; "
            f"known are {', '.join(known) or 'none'}, and --data takes rows of your own"
        )
    try:
        with np.load(path, allow_pickle=False) as found:
            rows = np.ascontiguousarray(found["rows"], np.float64 if found["rows"].dtype == np.float64 else np.float32)
            labels = found.get("labels")
            if labels is not None:
                labels = labels.astype(np.float64 if labels.dtype.kind == "f" else np.int64)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is no .npz file with an array `rows`: {error}") from error
    if rows.ndim != 2 or not rows.size or not np.isfinite(rows).all():
        raise UsageError(f"{path} wants `rows` of shape (n, d), all finite; found shape {rows.shape}")
    if labels is not None and labels.shape[:1] != (len(rows),):
        raise UsageError(f"{path} wants `labels` of shape ({len(rows)}, …); found {labels.shape}")
    return Rows(model, rows, labels)


@dataclass(frozen=True)
class Queries:
    """The distinct requests of a run, the same for every target, and what each must be answered.

    `expected[i]` are the values of the output `output` for `bodies[i]`; None where the data names no answer.
    """

    model: str
    width: int
    bodies: tuple[Body, ...]
    output: str
    expected: tuple[tuple[float, ...], ...] | None


def prepare(
    rows: Rows,
    batch: int,
    seed: int,
    signature: Signature = SIGNATURE,
    *,
    encoding: str = "binary",
    all_rows: bool = False,
) -> Queries:
    """Draw `batch` rows per request, seeded, each row as often as any other; fewer requests where batches are large.

    `all_rows`: as many requests as it takes to hold every row; where `batch` does not divide them, some rows twice.
    """
    count, width = rows.rows.shape
    number = max(1, min(QUERIES, MAX_PREPARED_BYTES // (batch * width * JSON_BYTES_PER_VALUE)))
    if all_rows:
        number = math.ceil(count / batch)
    drawn = np.random.default_rng([seed, batch])
    passes = math.ceil(number * batch / count)
    picks = np.concatenate([drawn.permutation(count) for _ in range(passes)])[: number * batch].reshape(number, batch)
    expected: tuple[tuple[float, ...], ...] | None = None
    if rows.labels is not None:
        expected = tuple(tuple(rows.labels[pick].ravel().tolist()) for pick in picks)
    elif rows.model in LIKE_NULL:
        expected = ((1,) * batch,) * number
    bodies = tuple(encode(rows.rows[pick], signature.input, signature.datatype, encoding) for pick in picks)
    return Queries(rows.model, width, bodies, signature.output, expected)


def request(authority: str, path: str, body: Body) -> bytes:
    """One POST as it goes over the wire. `authority` is host:port as in the URL."""
    kind = "Content-Type: application/json"
    if body.json_size >= 0:
        kind = f"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: {body.json_size}"
    head = f"POST {path} HTTP/1.1\r\nHost: {authority}\r\n{kind}\r\nContent-Length: {len(body.data)}\r\n\r\n"
    return head.encode("ascii") + body.data


class Checker:
    """Compares answers with the expected ones. Bytes that were right once are right again, without a parse."""

    def __init__(self, queries: Queries) -> None:
        self.possible = queries.expected is not None
        self._output = queries.output
        self._expected: Sequence[tuple[float, ...]] = queries.expected or ()
        self._right: list[bytes | None] = [None] * len(queries.bodies)

    def right(self, query: int, body: bytes, json_size: int = -1) -> bool:
        """Whether `body` is the right answer to request number `query`; its JSON ends after `json_size` bytes."""
        if body == self._right[query]:
            return True
        try:
            values = decode(Body(body, json_size), self._output)
        except (ValueError, TypeError):
            return False
        expected = self._expected[query]
        if tuple(values) != expected and not _close(values, expected):
            return False
        self._right[query] = body
        return True


def _close(values: Sequence[Any], expected: tuple[float, ...]) -> bool:
    """Whether numbers that are not whole differ by their rounding alone."""
    if len(values) != len(expected) or not any(isinstance(value, float) for value in expected):
        return False
    return all(isinstance(value, int | float) for value in values) and np.allclose(
        values, expected, rtol=1e-4, atol=1e-6
    )
