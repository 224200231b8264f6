"""What a model is: a name, tensors in, tensors out. docs/models.md shows how to write one."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from numpy.typing import NDArray

Array = NDArray[Any]
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Tensor(NamedTuple):
    """A tensor as metadata names it: −1 stands for a dimension that varies, rows first. An output that is `on_request`
    is left out of answers whose requests do not name it."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    on_request: bool = False


class Batch(NamedTuple):
    """What one call of a model gets: every input, rows first, as many rows in each; parameters that `check` took; the
    names of the outputs that are wanted."""

    inputs: Mapping[str, Array]
    parameters: Mapping[str, Any] = NOTHING
    outputs: tuple[str, ...] = ()


class BadInput(ValueError):
    """What a client sent cannot be used; the text says what was wanted and what was found."""


class Model:
    """Required: name, inputs, outputs, predict. The rest is optional, and here are its defaults."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    versions: tuple[str, ...] = ("1",)

    #: Rows of several requests with equal parameters may share one call: every output has one row for each row of the
    #: inputs, and it depends on that row alone.
    batches: bool = True
    #: NaN and infinity are values like others; requests without rows are requests like others.
    takes_nonfinite: bool = False
    takes_empty: bool = False
    #: What it was told at the start, for the model's configuration.
    settings: Mapping[str, Any] = NOTHING
    #: Parts of the last call of predict, in nanoseconds, by name.
    stages: Mapping[str, int] = NOTHING

    def load(self) -> None:
        """Read what predict needs: once, before the server listens, and again when a client loads it again."""

    def warm_up(self) -> None:
        """Do what makes the first call slow; after load."""

    def check(self, parameters: Mapping[str, Any]) -> None:
        """Raise BadInput for parameters of a request that cannot be used, so that it is answered 400."""
        known(self.name, parameters, ())

    def predict(self, batch: Batch) -> Mapping[str, Array]:
        """At least the outputs that are wanted, in the data types and shapes that `outputs` says. The next call may
        come before they are read, so they are no buffers that are used again. Inputs are read-only."""
        raise NotImplementedError


def known(name: str, parameters: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Raise BadInput for a parameter that is not one of `names`."""
    for key in parameters:
        if key not in names:
            raise BadInput(f"model {name} takes {', '.join(names) or 'no parameters'}; found the parameter {key!r}")
