"""k nearest neighbours, exact, from scratch: Euclidean distance, majority vote, ties by the lower index."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.models.base import Array, BadInput, Tensor, no_parameters

DATA = Path(__file__).resolve().parent / "data"


class KNN:
    """The Wisconsin breast cancer data, standardised; every row of a request is answered by itself, in float64, so
    that an answer does not depend on the batch that it was in."""

    name = "knn"
    versions: tuple[str, ...] = ("1",)
    inputs: tuple[Tensor, ...] = (Tensor("x", "FP32", (-1, 30)),)
    outputs: tuple[Tensor, ...] = (Tensor("label", "INT64", (-1,)), Tensor("votes", "INT64", (-1,)))

    def load(self) -> None:
        with np.load(DATA / "breast_cancer.npz") as stored:
            rows, self._labels = stored["rows"].astype(np.float64), stored["labels"].astype(np.int64)
        self._mean, scale = rows.mean(axis=0), rows.std(axis=0)
        self._scale = 1.0 / scale
        self._points = (rows - self._mean) * self._scale

    def predict(self, x: NDArray[np.float32], parameters: Mapping[str, Any]) -> dict[str, Array]:
        no_parameters(self.name, parameters, ("k",))
        k = parameters.get("k", 5)
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= len(self._points):
            raise BadInput(f"model knn wants a whole number from 1 to {len(self._points)} for k; found {k!r}")
        labels, votes = np.empty(len(x), dtype=np.int64), np.empty(len(x), dtype=np.int64)
        for row, query in enumerate((x.astype(np.float64) - self._mean) * self._scale):
            difference = self._points - query
            nearest = _smallest(np.einsum("ij,ij->i", difference, difference), k)
            counts = np.bincount(self._labels[nearest])
            labels[row] = counts.argmax()
            votes[row] = counts[labels[row]]
        return {"label": labels, "votes": votes}


def _smallest(distances: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Indices of the k smallest distances, ties by the lower index."""
    bound = np.partition(distances, k - 1)[k - 1]
    candidates = np.flatnonzero(distances <= bound)
    return candidates[np.argsort(distances[candidates], kind="stable")[:k]]
