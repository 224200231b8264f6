"""A fully connected network from scratch: 784-800-800-10, ReLU, softmax, trained with Adam on the cross-entropy.

Adam: Kingma and Ba (2015), algorithm 1. Initial weights: He et al. (2015), normal with variance 2 / fan-in.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.models.base import Array, Tensor, no_parameters

LAYERS = (784, 800, 800, 10)
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
Floats = NDArray[np.float32]
Labels = NDArray[np.int64]


class Network:
    """Weights and biases in float32, layer by layer: weights[i] has shape (LAYERS[i], LAYERS[i + 1])."""

    def __init__(self, weights: Sequence[Floats], biases: Sequence[Floats]) -> None:
        self.weights = list(weights)
        self.biases = list(biases)

    @classmethod
    def random(cls, seed: int, layers: Sequence[int] = LAYERS) -> "Network":
        chance = np.random.default_rng(seed)
        shapes = list(pairwise(layers))
        weights = [(chance.standard_normal(s) * np.sqrt(2.0 / s[0])).astype(np.float32) for s in shapes]
        return cls(weights, [np.zeros(size, dtype=np.float32) for size in layers[1:]])

    def probabilities(self, x: Floats) -> Floats:
        """Class probabilities, shape (rows, classes), of pixels in 0…1, shape (rows, 784)."""
        return self._forward(x)[-1]

    def _forward(self, x: Floats) -> list[Floats]:
        """The output of each layer, the input first, softmax last."""
        outputs = [x]
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            z = outputs[-1] @ weight
            z += bias
            outputs.append(np.maximum(z, 0, out=z))
        z = outputs[-1] @ self.weights[-1]
        z += self.biases[-1]
        z -= z.max(axis=1, keepdims=True)
        np.exp(z, out=z)
        z /= z.sum(axis=1, keepdims=True)
        return [*outputs, z]

    def gradients(self, x: Floats, labels: Labels) -> tuple[list[Floats], list[Floats], float]:
        """Gradients of the mean cross-entropy by weights and biases, and that mean, for one batch."""
        outputs = self._forward(x)
        return *self._backward(outputs, labels), _loss(outputs[-1], labels)

    def _backward(self, outputs: Sequence[Floats], labels: Labels) -> tuple[list[Floats], list[Floats]]:
        """Gradients of the mean cross-entropy by weights and biases, from what _forward gave."""
        delta = outputs[-1].copy()
        delta[np.arange(len(labels)), labels] -= 1
        delta /= len(labels)
        by_weight: list[Floats] = []
        by_bias: list[Floats] = []
        for layer in reversed(range(len(self.weights))):
            by_weight.append(outputs[layer].T @ delta)
            by_bias.append(delta.sum(axis=0))
            if layer:
                delta = delta @ self.weights[layer].T
                delta *= outputs[layer] > 0
        return by_weight[::-1], by_bias[::-1]


def _loss(probabilities: Floats, labels: Labels) -> float:
    return float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-30)).mean())


class Epoch(NamedTuple):
    """Mean loss and share of right answers over the rows of one epoch, each taken before its batch was learnt."""

    loss: float
    accuracy: float


def train(
    network: Network, x: Floats, labels: Labels, *, epochs: int, batch: int, seed: int, rate: float = 1e-3,
    progress: Callable[[float], None] | None = None,
) -> list[Epoch]:  # fmt: skip
    """Adam on shuffled batches, in place. Raises FloatingPointError when the loss is no number any more."""
    chance = np.random.default_rng(seed)
    values = network.weights + network.biases
    first = [np.zeros_like(value) for value in values]
    second = [np.zeros_like(value) for value in values]
    scratch = [np.empty_like(value) for value in values]
    done: list[Epoch] = []
    step = 0
    for epoch in range(epochs):
        order = chance.permutation(len(x))
        loss, right = 0.0, 0
        for start in range(0, len(x), batch):
            chosen = order[start : start + batch]
            truth = labels[chosen]
            outputs = network._forward(x[chosen])
            loss += _loss(outputs[-1], truth) * len(chosen)
            right += int((outputs[-1].argmax(axis=1) == truth).sum())
            by_weight, by_bias = network._backward(outputs, truth)
            step += 1
            size = np.float32(rate * np.sqrt(1 - BETA2**step) / (1 - BETA1**step))
            for value, gradient, m, v, space in zip(values, by_weight + by_bias, first, second, scratch, strict=True):
                m *= np.float32(BETA1)
                np.multiply(gradient, np.float32(1 - BETA1), out=space)
                m += space
                v *= np.float32(BETA2)
                np.multiply(gradient, gradient, out=space)
                space *= np.float32(1 - BETA2)
                v += space
                np.sqrt(v, out=space)
                space += np.float32(EPSILON)
                np.divide(m, space, out=space)
                space *= size
                value -= space
            if progress is not None:
                progress((epoch + min(start + batch, len(x)) / len(x)) / epochs)
        done.append(Epoch(loss / len(x), right / len(x)))
        if not np.isfinite(done[-1].loss):
            raise FloatingPointError(f"the loss of epoch {epoch + 1} is {done[-1].loss}; lower the rate")
    return done


class DNN:
    """The trained network on MNIST digits; rows are answered in one matrix product per layer."""

    name = "dnn"
    versions: tuple[str, ...] = ("1",)
    inputs: tuple[Tensor, ...] = (Tensor("x", "FP32", (-1, 784)),)
    outputs: tuple[Tensor, ...] = (Tensor("label", "INT64", (-1,)), Tensor("probabilities", "FP32", (-1, 10)))

    def load(self) -> None:
        with np.load(Path(__file__).resolve().parent / "data" / "dnn_weights.npz") as stored:
            count = len(LAYERS) - 1
            self._network = Network(
                [stored[f"w{i}"].astype(np.float32) for i in range(count)],
                [stored[f"b{i}"].astype(np.float32) for i in range(count)],
            )

    def predict(self, x: NDArray[np.float32], parameters: Mapping[str, Any]) -> dict[str, Array]:
        no_parameters(self.name, parameters)
        probabilities = self._network.probabilities(x)
        return {"label": probabilities.argmax(axis=1), "probabilities": probabilities}
