"""A model that is busy for a stated time by the clock, whatever the target: a known truth for the statistics."""

import random
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.models.base import Array, Tensor, no_parameters


class Spin:
    """Answers like null, after `us` microseconds of a busy processor; a share `tail_p` of the calls, chosen by `seed`,
    takes `tail_us` in place of `us`. The n-th call is a long one everywhere or nowhere."""

    name = "spin"
    versions: tuple[str, ...] = ("1",)
    inputs: tuple[Tensor, ...] = (Tensor("x", "FP32", (-1, -1)),)
    outputs: tuple[Tensor, ...] = (Tensor("rows", "INT64", (1,)),)

    def __init__(self, us: float = 200.0, tail_us: float = 400.0, tail_p: float = 0.0, seed: int = 1) -> None:
        """Raises ValueError for a time below 0 or not finite, or a share outside 0…1."""
        if not (0 <= us < float("inf") and 0 <= tail_us < float("inf") and 0 <= tail_p <= 1):
            raise ValueError(
                f"model spin wants times of 0 µs or more and a share from 0 to 1; found {us}, {tail_us} and {tail_p}"
            )
        self._ns, self._tail_ns, self._tail_p = round(us * 1000), round(tail_us * 1000), tail_p
        self._chance = random.Random(seed)

    def load(self) -> None: ...

    def predict(self, x: NDArray[np.float32], parameters: Mapping[str, Any]) -> dict[str, Array]:
        end = time.monotonic_ns()
        no_parameters(self.name, parameters)
        end += self._tail_ns if self._chance.random() < self._tail_p else self._ns
        while time.monotonic_ns() < end:
            pass
        return {"rows": np.array([len(x)])}
