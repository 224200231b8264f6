"""A model that costs nothing: it answers the number of rows, so what is left is the server and the isolation."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.models.base import Array, Tensor, no_parameters


class Null:
    name = "null"
    versions: tuple[str, ...] = ("1",)
    inputs: tuple[Tensor, ...] = (Tensor("x", "FP32", (-1, -1)),)
    outputs: tuple[Tensor, ...] = (Tensor("rows", "INT64", (1,)),)

    def load(self) -> None: ...

    def predict(self, x: NDArray[np.float32], parameters: Mapping[str, Any]) -> dict[str, Array]:
        no_parameters(self.name, parameters)
        return {"rows": np.array([len(x)])}
