"""A model for the benchmarks: KNN among 10,000 random points of 64 numbers."""

import numpy as np

from server.models.base import Array, Batch, Model, Tensor
from server.models.knn import Neighbours

POINTS, WIDTH, K = 10_000, 64, 5


def points() -> Array:
    return np.random.default_rng(1).standard_normal((POINTS, WIDTH), dtype=np.float32)


class Knn10k(Model):
    name = "knn_10k"
    inputs = (Tensor("x", "FP32", (-1, WIDTH)),)
    outputs = (Tensor("label", "INT64", (-1,)), Tensor("votes", "INT64", (-1,)))

    def load(self) -> None:
        self._neighbours = Neighbours(points(), np.arange(POINTS) % 10)

    def predict(self, batch: Batch) -> dict[str, Array]:
        found, _ = self._neighbours.nearest(batch.inputs["x"], K)
        labels, votes = self._neighbours.vote(found)
        return {"label": labels, "votes": votes}
