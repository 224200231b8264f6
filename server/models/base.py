"""What a model is: a name, tensors in, tensors out."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Tensor(NamedTuple):
    """A tensor as metadata names it: −1 stands for a dimension that varies, rows first."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class BadInput(ValueError):
    """What a client sent cannot be used; the text says what was wanted and what was found."""


class Model(Protocol):
    """`predict` takes the input tensor x, shape (rows, width), and the request's parameters; it returns one array per
    output, rows first. Raises BadInput for parameters that it does not take."""

    name: str
    versions: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def load(self) -> None: ...

    def predict(self, x: NDArray[np.float32], parameters: Mapping[str, Any]) -> dict[str, Array]: ...


def no_parameters(name: str, parameters: Mapping[str, Any], known: tuple[str, ...] = ()) -> None:
    """Raise BadInput for a parameter that the model does not know."""
    for key in parameters:
        if key not in known:
            raise BadInput(f"model {name} takes {', '.join(known) or 'no parameters'}; found the parameter {key!r}")
