"""A model that does a fixed amount of arithmetic: what a unit of computing costs inside a target."""

import time

import numpy as np

from server.models.base import Array, Batch, Model, Tensor

NUMBERS = 4096  # 16 KiB, which every first-level cache holds
ROUNDS = 9
ROUND_NS = 5_000_000


class Work(Model):
    """Answers like null, after `iterations` of x → x / 2 + 1 over 4,096 float32 numbers, in place.

    Without `iterations`, `load` finds how many take `us` microseconds here: the fastest of nine rounds of 5 ms counts,
    since what disturbs a round only makes it slower.
    """

    name = "work"
    inputs = (Tensor("x", "FP32", (-1, -1)),)
    outputs = (Tensor("rows", "INT64", (-1,)),)
    batches = False  # its work is one of calls

    def __init__(self, us: float = 200.0, iterations: int = 0) -> None:
        """Raises ValueError for a time or a number below 0, or not finite."""
        if not (0 < us < float("inf") and iterations >= 0):
            raise ValueError(f"model work wants a time above 0 µs and 1 iteration or more; found {us} and {iterations}")
        self._us, self.iterations = us, iterations

    def load(self) -> None:
        self._numbers = np.ones(NUMBERS, dtype=np.float32)
        self._half, self._one = np.float32(0.5), np.float32(1)
        if not self.iterations:
            self.iterations = max(1, round(self._us * 1000 / self._iteration_ns()))
        self.settings = {"iterations": self.iterations}

    def _iteration_ns(self) -> float:
        best, count = float("inf"), 1000
        for _ in range(ROUNDS):
            start = time.monotonic_ns()
            self._compute(count)
            best = min(best, (time.monotonic_ns() - start) / count)
            count = max(1, round(ROUND_NS / best))
        return best

    def _compute(self, iterations: int) -> None:
        x, half, one = self._numbers, self._half, self._one
        for _ in range(iterations):
            np.multiply(x, half, out=x)
            np.add(x, one, out=x)

    def predict(self, batch: Batch) -> dict[str, Array]:
        self._compute(self.iterations)
        return {"rows": np.ones(len(batch.inputs["x"]), dtype=np.int64)}
