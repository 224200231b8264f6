"""k nearest neighbours, exact, from scratch: Euclidean distance, majority vote, ties by the lower index."""

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.models.base import Array, BadInput, Batch, Model, Tensor, known

DATA = Path(__file__).resolve().parent / "data"
MOST_NEIGHBOURS = 2**21  # that are held at once: 32 MiB of places and distances
SCORES_MIB = 32  # the most that is scored at once; fewer where the sgemm gains nothing and the cache is left
PAIRS = 2**18  # candidates that are decided at once, unless one query has more
BLOCK = 2**16  # float64 numbers of differences that are held at once: half a MiB, for the cache
GROUP = 16
FAR = 1e15  # of a query, in units of the points' reach: before float32 overflows
K = 5  # where a request names none
UNIT, UNIT_64 = 2.0**-24, 2.0**-53  # rounding of float32 and, which tells for a query far from all, of float64
LEAST = 2.0**-120  # rounding of tiny float32 numbers, with room
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]


class Neighbours:
    """The nearest of n points of d finite numbers each, found in float32, decided in float64.

    One sgemm of [q, 1] and [x, −½‖x‖²]ᵀ scores every point by q·x − ½‖x‖², the larger the nearer. Its error has a bound
    (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), so every point that could be one of the k
    nearest is a candidate, and float64 decides among those, each pair by itself: an answer is that of float64 over all
    points, bit for bit, whatever BLAS and whatever the batch. Points are centred and scaled by a power of two first,
    since an offset would use up the digits of float32 and huge values its range.

    Working memory beyond the results stays below 4 × SCORES_MIB, or 80 (n + d) bytes where that is more.
    """

    def __init__(self, points: Array, labels: Array) -> None:
        """points: shape (n, d), float32 or float64, kept as they are; labels: whole numbers, shape (n,)."""
        if points.ndim != 2 or not len(points) or labels.shape != (len(points),):
            raise ValueError(f"wanted n × d points and n labels; found shapes {points.shape} and {labels.shape}")
        if not (np.abs(points) < np.float64(1e150)).all():  # so that squares are finite, too
            raise ValueError("wanted points that are finite and below 1e150; found others")
        self.points = points
        self.classes, self._class = np.unique(labels, return_inverse=True)
        self._centre = points.mean(axis=0, dtype=np.float64)
        n, d = points.shape
        self._groups = -(-n // GROUP)
        # Transposed: for few queries BLAS reads it so at twice the speed.
        self._scorer = np.zeros((d + 1, self._groups * GROUP), dtype=np.float32)
        self._scorer[d, n:] = -np.inf  # fills the last group, and is never near
        reach = max((float(np.abs(part - self._centre).max(initial=0)) for _, part in self._parts()), default=0.0)
        self._scale = float(np.ldexp(1.0, min(400, -int(np.frexp(reach)[1]))))
        squares = np.empty(n)
        for rows, part in self._parts():
            moved = (part - self._centre) * self._scale
            squares[rows] = np.einsum("ij,ij->i", moved, moved)
            self._scorer[:d, rows] = moved.T
        self._scorer[d, :n] = -0.5 * squares
        self._radius = float(np.sqrt(squares.max()))
        self.scored_ns = 0  # of the last call of `nearest`, what went into scores

    def _parts(self) -> Iterator[tuple[slice, Array]]:
        """The points a few at a time, so that their float64 form is never whole."""
        for rows in _slices(len(self.points), max(1, BLOCK // max(1, self.points.shape[1]))):
            yield rows, self.points[rows]

    def nearest(self, queries: Array, k: int) -> tuple[Integers, Doubles]:
        """Indices and Euclidean distances of the k nearest points, nearest first, both of shape (rows, k).

        queries: shape (rows, d), finite; k from 1 to n, else ValueError.
        """
        n, d = self.points.shape
        if queries.ndim != 2 or queries.shape[1] != d or not 1 <= k <= n:
            raise ValueError(f"wanted rows × {d} queries and k from 1 to {n}; found shape {queries.shape} and k = {k}")
        self.scored_ns = 0
        if len(queries) == 1 and (one := self._one(queries[0], k)) is not None:
            return one[0][None], np.sqrt(one[1])[None]
        found, distances = np.empty((len(queries), k), dtype=np.int64), np.empty((len(queries), k))
        most = min(SCORES_MIB, max(8, d // 16)) * 2**18 // (self._groups * GROUP + 4 * d)
        parts = -(-len(queries) // max(1, min(most, PAIRS // (2 * GROUP * k))))
        for rows in _slices(len(queries), -(-len(queries) // max(1, parts)) or 1):
            self._decide(queries[rows], k, found[rows], distances[rows])
        return found, np.sqrt(distances, out=distances)

    def _one(self, query: Array, k: int) -> tuple[Integers, Doubles] | None:
        """What `_decide` writes, for one query and in fewer steps; None where its candidates are too many for that."""
        start = time.monotonic_ns()
        d = len(query)
        moved = np.subtract(query, self._centre, dtype=np.float64)
        moved *= self._scale
        length = math.sqrt(moved.dot(moved))
        if not length < FAR:
            return None
        asked = np.empty(d + 1, dtype=np.float32)
        asked[:d] = moved
        asked[d] = 1
        scores = asked.dot(self._scorer)
        # A value that k scores reach: the k-th best of groups' maxima, as many groups as cost least.
        group = math.isqrt(len(scores) // (2 * k))
        if group >= 4:
            groups = len(scores) // group
            near = np.maximum.reduce(scores[: group * groups].reshape(group, groups), axis=0)
        else:
            near = scores.copy()
        near.partition(len(near) - k)
        point = (scores >= float(near[-k]) - self._slack(length)).nonzero()[0]
        self.scored_ns += time.monotonic_ns() - start
        if len(point) * d > BLOCK:
            return None
        difference = np.subtract(self.points.take(point, axis=0), query, dtype=np.float64)
        apart = np.einsum("ij,ij->i", difference, difference)
        best = apart.argsort(kind="stable")[:k]  # points are in order, so a tie goes to the lower index
        return point[best], apart[best]

    def _slack(self, length: Any) -> Any:
        """Twice the most that a score is wrong by, of a query that far from the centre, and what is then decided."""
        reach = length + self._radius
        d = len(self._centre)
        return 2 * (d + 8) * (UNIT * self._radius * reach + UNIT_64 * reach**2 + LEAST * (length + 1))

    def _decide(self, queries: Array, k: int, found: Integers, distances: Doubles) -> None:
        """Write the k nearest of each query and their squared distances."""
        candidates = self._candidates(queries, k)
        if candidates is None:
            half = len(queries) // 2
            self._decide(queries[:half], k, found[:half], distances[:half])
            self._decide(queries[half:], k, found[half:], distances[half:])
            return
        row, point = candidates
        apart = np.empty(len(row))
        for pairs in _slices(len(row), max(1, BLOCK // max(1, queries.shape[1]))):
            of = self.points.take(point[pairs], axis=0)
            difference = np.subtract(of, queries.take(row[pairs], axis=0), dtype=np.float64)
            np.einsum("ij,ij->i", difference, difference, out=apart[pairs])
        order = np.lexsort((apart, row))  # stable, and points are in order, so a tie goes to the lower index
        first = row.searchsorted(np.arange(len(queries)))  # rows are in order before and after
        best = order[first[:, None] + np.arange(k)]
        found[:], distances[:] = point[best], apart[best]

    def _candidates(self, queries: Array, k: int) -> tuple[Integers, Integers] | None:
        """Pairs of a query and a point that may be one of its k nearest, by query; None where they are too many."""
        start = time.monotonic_ns()
        rows, d = queries.shape
        moved = np.subtract(queries, self._centre, dtype=np.float64)
        moved *= self._scale
        length = np.sqrt(np.einsum("ij,ij->i", moved, moved))
        slack = self._slack(length)
        far = ~(length < FAR)  # then every point is a candidate
        moved[far], slack[far] = 0, 1e30
        asked = np.ones((rows, d + 1), dtype=np.float32)
        asked[:, :d] = moved
        scores = asked @ self._scorer
        near = scores.reshape(rows, GROUP, self._groups).max(axis=1) if 4 * k <= self._groups else scores
        bound = _reached(near, k) - slack.astype(np.float32)
        hits = (scores >= bound[:, None]).reshape(-1).nonzero()[0]
        self.scored_ns += time.monotonic_ns() - start
        if rows > 1 and len(hits) > PAIRS:
            return None
        return np.divmod(hits, scores.shape[1])

    def vote(self, neighbours: Integers) -> tuple[Integers, Integers]:
        """The label that most of each row's neighbours have, a tie by the lower label, and how many have it."""
        if len(neighbours) == 1:
            counts = np.bincount(self._class[neighbours[0]])
            winner = counts.argmax()
            return self.classes[winner : winner + 1].copy(), counts[winner : winner + 1]
        labels, votes = np.empty(len(neighbours), dtype=np.int64), np.empty(len(neighbours), dtype=np.int64)
        size = len(self.classes)
        for rows in _slices(len(neighbours), max(1, PAIRS // (size + neighbours.shape[1]))):
            of = self._class[neighbours[rows]]
            of += size * np.arange(len(of))[:, None]
            counts = np.bincount(of.reshape(-1), minlength=size * len(of)).reshape(-1, size)
            labels[rows], votes[rows] = self.classes[counts.argmax(axis=1)], counts.max(axis=1)
        return labels, votes


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _reached(scores: Floats, k: int) -> Floats:
    """A value for each row that at least k of its scores reach, and hardly more: the k-th best of groups' maxima."""
    while 4 * k <= (groups := scores.shape[1] // GROUP):
        scores = scores[:, : groups * GROUP].reshape(-1, GROUP, groups).max(axis=1)
    kth: Floats = np.partition(scores, scores.shape[1] - k, axis=1)[:, -k]
    return kth


class _Set(NamedTuple):
    """A data set: the name under which it is served, its file, columns, and what its rows are divided by, None where
    each column is standardised."""

    model: str
    file: str
    columns: int
    unit: float | None


SETS = {
    "cancer": _Set("knn", "breast_cancer.npz", 30, None),
    "digits": _Set("knn-digits", "digits.npz", 64, 1.0),
    "mnist": _Set("knn-mnist", "mnist_5000.npz", 784, 255.0),  # pixels of 0…1, as dnn takes them
}


class KNN(Model):
    """What is near in one of SETS."""

    outputs = (
        Tensor("label", "INT64", (-1,)),
        Tensor("votes", "INT64", (-1,)),
        Tensor("neighbours", "INT64", (-1, -1), on_request=True),
        Tensor("distances", "FP64", (-1, -1), on_request=True),
    )

    def __init__(self, data: str = "cancer") -> None:
        self._set = SETS[data]
        self.name = self._set.model
        self.settings = {"data": data, "k": K, "metric": "l2"}
        self.inputs = (Tensor("x", "FP32", (-1, self._set.columns)),)

    def load(self) -> None:
        with np.load(DATA / self._set.file) as stored:
            rows, labels = stored["rows"], stored["labels"].astype(np.int64)
        if self._set.unit is None:
            rows = rows.astype(np.float64)
            self._mean, self._scale = rows.mean(axis=0), 1.0 / rows.std(axis=0)
            rows = (rows - self._mean) * self._scale
        else:
            rows = rows.astype(np.float32) / np.float32(self._set.unit)
        self._neighbours = Neighbours(rows, labels)

    def check(self, parameters: Mapping[str, Any]) -> None:
        known(self.name, parameters, ("k", "metric"))
        k, most = parameters.get("k", K), len(self._neighbours.points)
        if type(k) is not int or not 1 <= k <= most:
            raise BadInput(f"model {self.name} wants a whole number from 1 to {most} for k; found {k!r}")
        if parameters.get("metric", "l2") != "l2":
            raise BadInput(f"model {self.name} has the metric 'l2'; found {parameters['metric']!r}")

    def predict(self, batch: Batch) -> dict[str, Array]:
        """Of neighbours, their places in the data set and their distances, nearest first: shape (rows, k)."""
        asked, k = batch.inputs["x"], batch.parameters.get("k", K)
        step = max(1, MOST_NEIGHBOURS // k)
        if len(asked) <= step:
            return self._part(asked, k)
        if {"neighbours", "distances"} & set(batch.outputs):
            raise BadInput(f"model {self.name} gives neighbours of at most {step} rows at once where k is {k}; found "
                           f"{len(asked)} rows")  # fmt: skip
        results = {name: np.empty(len(asked), dtype=np.int64) for name in ("label", "votes")}
        for first in range(0, len(asked), step):
            part = self._part(asked[first : first + step], k)
            for name, values in results.items():
                values[first : first + step] = part[name]
        return results

    def _part(self, asked: Array, k: int) -> dict[str, Array]:
        if self._set.unit is None:
            asked = (asked.astype(np.float64) - self._mean) * self._scale
        start = time.monotonic_ns()
        found, distances = self._neighbours.nearest(asked, k)
        labels, votes = self._neighbours.vote(found)
        scored = self._neighbours.scored_ns
        self.stages = {"score": scored, "decide": time.monotonic_ns() - start - scored}
        return {"label": labels, "votes": votes, "neighbours": found, "distances": distances}
