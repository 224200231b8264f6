"""What is sent and what must come back: query rows, request bytes made before the run, expected answers.

Rows and expected labels are read from `server/models/data/MODEL.npz` by path; no model is ever imported here.
"""

import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from images.errors import UsageError
from loadtest._models import LIKE_NULL, NAMES

DATA = Path(__file__).resolve().parent.parent / "server" / "models" / "data"
QUERIES = 256  # distinct requests: enough that no cache of the server's holds just one row
MAX_PREPARED_BYTES = 64 * 1024 * 1024
JSON_BYTES_PER_VALUE = 11  # "0.12345678," at most, about


@dataclass(frozen=True)
class Rows:
    """`rows` is float32 of shape (n, d); `labels` int64 of shape (n,), None where there is nothing to compare with."""

    model: str
    rows: NDArray[np.float32]
    labels: NDArray[np.int64] | None


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
            rows = np.ascontiguousarray(found["rows"], dtype=np.float32)
            labels = np.asarray(found["labels"]).astype(np.int64) if "labels" in found else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is no .npz file with an array `rows`: {error}") from error
    if rows.ndim != 2 or not rows.size or not np.isfinite(rows).all():
        raise UsageError(f"{path} wants `rows` of shape (n, d), all finite; found shape {rows.shape}")
    if labels is not None and labels.shape != (len(rows),):
        raise UsageError(f"{path} wants `labels` of shape ({len(rows)},); found {labels.shape}")
    return Rows(model, rows, labels)


@dataclass(frozen=True)
class Queries:
    """The distinct requests of a run, as JSON bodies, the same for every target, and what each must be answered.

    `expected[i]` are the values of the output `output` for `bodies[i]`; None where the data names no answer.
    """

    model: str
    width: int
    bodies: tuple[bytes, ...]
    output: str
    expected: tuple[tuple[int, ...], ...] | None


def prepare(rows: Rows, batch: int, seed: int) -> Queries:
    """Draw `batch` rows per request, seeded, each row as often as any other; fewer requests where batches are large."""
    count, width = rows.rows.shape
    number = max(1, min(QUERIES, MAX_PREPARED_BYTES // (batch * width * JSON_BYTES_PER_VALUE)))
    drawn = np.random.default_rng([seed, batch])
    passes = math.ceil(number * batch / count)
    picks = np.concatenate([drawn.permutation(count) for _ in range(passes)])[: number * batch].reshape(number, batch)
    expected: tuple[tuple[int, ...], ...] | None = None
    output = "label"
    if rows.labels is not None:
        expected = tuple(tuple(rows.labels[pick].tolist()) for pick in picks)
    elif rows.model in LIKE_NULL:
        output, expected = "rows", ((1,) * batch,) * number
    return Queries(rows.model, width, tuple(_body(rows.rows[pick]) for pick in picks), output, expected)


def _body(batch: NDArray[np.float32]) -> bytes:
    tensor = {"name": "x", "shape": list(batch.shape), "datatype": "FP32", "data": batch.ravel()}
    return orjson.dumps({"inputs": [tensor]}, option=orjson.OPT_SERIALIZE_NUMPY)


def request(authority: str, path: str, body: bytes) -> bytes:
    """One POST as it goes over the wire. `authority` is host:port as in the URL."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {authority}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode("ascii") + body


class _Output(msgspec.Struct):
    name: str
    data: Any


class _Answer(msgspec.Struct):
    outputs: list[_Output]


class Checker:
    """Compares answers with the expected ones. Bytes that were right once are right again, without a parse."""

    def __init__(self, queries: Queries) -> None:
        self.possible = queries.expected is not None
        self._output = queries.output
        self._expected: Sequence[tuple[int, ...]] = queries.expected or ()
        self._right: list[bytes | None] = [None] * len(queries.bodies)
        self._decoder = msgspec.json.Decoder(_Answer)

    def right(self, query: int, body: bytes) -> bool:
        """Whether `body` is the right answer to request number `query`."""
        if body == self._right[query]:
            return True
        try:
            answer = self._decoder.decode(body)
            found = next(output.data for output in answer.outputs if output.name == self._output)
            values = np.asarray(found).ravel().tolist()
        except (msgspec.DecodeError, StopIteration, ValueError, TypeError):
            return False
        if tuple(values) != self._expected[query]:
            return False
        self._right[query] = body
        return True
