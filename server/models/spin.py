"""A model that is busy for a stated time by the clock, whatever the target: a known truth for the statistics."""

import random
import time

import numpy as np

from server.models.base import Array, Batch, Model, Tensor


class Spin(Model):
    """Answers like null, after `us` microseconds of a busy processor; a share `tail_p` of the calls, chosen by `seed`,
    takes `tail_us` in place of `us`. The n-th call is a long one everywhere or nowhere."""

    name = "spin"
    inputs = (Tensor("x", "FP32", (-1, -1)),)
    outputs = (Tensor("rows", "INT64", (-1,)),)
    batches = False  # its time is one of calls

    def __init__(self, us: float = 200.0, tail_us: float = 400.0, tail_p: float = 0.0, seed: int = 1) -> None:
        """Raises ValueError for a time below 0 or not finite, or a share outside 0…1."""
        if not (0 <= us < float("inf") and 0 <= tail_us < float("inf") and 0 <= tail_p <= 1):
            raise ValueError(
                f"model spin wants times of 0 µs or more and a share from 0 to 1; found {us}, {tail_us} and {tail_p}"
            )
        self._ns, self._tail_ns, self._tail_p = round(us * 1000), round(tail_us * 1000), tail_p
        self.settings = {"us": us, "tail_us": tail_us, "tail_p": tail_p}
        self._chance = random.Random(seed)

    def predict(self, batch: Batch) -> dict[str, Array]:
        end = time.monotonic_ns()
        end += self._tail_ns if self._chance.random() < self._tail_p else self._ns
        while time.monotonic_ns() < end:
            pass
        return {"rows": np.ones(len(batch.inputs["x"]), dtype=np.int64)}
