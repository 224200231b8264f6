"""A fully connected network from scratch: 784-800-800-10, ReLU, softmax, trained on the cross-entropy by SGD or Adam.

Adam: Kingma and Ba (2015), algorithm 1. Initial weights: He et al. (2015), normal with variance 2 / fan-in.
All is float32 and in place: what a batch needs is allocated once for the largest batch, and used again.
"""

import math
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.models.base import Array, BadInput, Batch, Model, Tensor

LAYERS = (784, 800, 800, 10)
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
ROWS = 256  # rows that go through the network at once; more gain nothing and leave the cache
ZERO = np.float32(0)  # NumPy would convert a Python number anew in each call
BLOCK = 2**14  # parameters that Adam works on at once, for the cache: five arrays of 64 KiB
Floats = NDArray[np.float32]
Labels = NDArray[np.int64]


class Parameters:
    """Numbers in one flat array, and views of it layer by layer: weights[i] has shape (layers[i], layers[i + 1])."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self.flat = np.zeros(sum((a + 1) * b for a, b in pairwise(layers)), dtype=np.float32)
        self.weights: list[Floats] = []
        self.biases: list[Floats] = []
        start = 0
        for a, b in pairwise(layers):
            self.weights.append(self.flat[start : start + a * b].reshape(a, b))
            self.biases.append(self.flat[start + a * b : start + (a + 1) * b])
            start += (a + 1) * b


class _Space:
    """What one pass over up to `rows` rows writes to: per layer its outputs, and for training what leads back."""

    def __init__(self, layers: Sequence[int], rows: int, training: bool) -> None:
        self.rows = rows
        self._all = [np.empty((rows, size), dtype=np.float32) for size in layers[1:]]
        self._one = np.empty((rows, 1), dtype=np.float32)
        self._deltas = [np.empty((rows, size), dtype=np.float32) for size in layers[1:]] if training else []
        self._masks = [np.empty((rows, size), dtype=np.bool_) for size in layers[1:-1]] if training else []
        self.first = [output[0] for output in self._all]
        self.use(rows)

    def use(self, rows: int) -> "_Space":
        if rows != self.rows or not hasattr(self, "outputs"):
            self.rows = rows
            self.outputs, self.one = [output[:rows] for output in self._all], self._one[:rows]
            self.deltas, self.masks = [delta[:rows] for delta in self._deltas], [mask[:rows] for mask in self._masks]
            self.counter = np.arange(rows)
        return self


class Network(Parameters):
    """Weights and biases in float32, copied from those given."""

    def __init__(self, weights: Sequence[Array], biases: Sequence[Array]) -> None:
        super().__init__([len(weights[0]), *(len(bias) for bias in biases)])
        for own, given in zip(self.weights + self.biases, [*weights, *biases], strict=True):
            own[:] = given
        self._kept = threading.local()  # a space for each thread that asks

    @classmethod
    def random(cls, seed: int, layers: Sequence[int] = LAYERS) -> "Network":
        chance = np.random.default_rng(seed)
        shapes = list(pairwise(layers))
        weights = [(chance.standard_normal(s) * np.sqrt(2.0 / s[0])).astype(np.float32) for s in shapes]
        return cls(weights, [np.zeros(size, dtype=np.float32) for size in layers[1:]])

    def probabilities(self, x: Floats) -> Floats:
        """Class probabilities, shape (rows, classes), of pixels in 0…1, shape (rows, 784).

        Only the result is allocated; the layers between take 4 × ROWS × their sizes, in bytes, once per thread.
        """
        found = np.empty((len(x), self.layers[-1]), dtype=np.float32)
        space: _Space | None = getattr(self._kept, "space", None)
        if space is None:
            space = self._kept.space = _Space(self.layers, ROWS, training=False)
        if len(x) == 1:
            self._forward_one(x[0], space.first, found[0])
            return found
        for start in range(0, len(x), ROWS):
            part = x[start : start + ROWS]
            found[start : start + ROWS] = self._forward(part, space.use(len(part)))
        return found

    def _forward(self, x: Floats, space: _Space) -> Floats:
        """Write the output of each layer, softmax last, and return that."""
        h, last = x, len(self.weights) - 1
        for layer, (weight, bias, z) in enumerate(zip(self.weights, self.biases, space.outputs, strict=True)):
            np.matmul(h, weight, out=z)
            z += bias
            h = np.maximum(z, ZERO, out=z) if layer < last else z
        h -= np.maximum.reduce(h, axis=1, keepdims=True, out=space.one)
        np.exp(h, out=h)
        h /= np.add.reduce(h, axis=1, keepdims=True, out=space.one)
        return h

    def _forward_one(self, x: Floats, outputs: Sequence[Floats], found: Floats) -> None:
        """What `_forward` does, for one row and in cheaper calls, with the result in `found`."""
        h, last = x, len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            z = outputs[layer] if layer < last else found
            h.dot(weight, out=z)
            np.add(z, bias, out=z)
            h = np.maximum(z, ZERO, out=z) if layer < last else z
        np.subtract(h, np.maximum.reduce(h), out=h)
        np.exp(h, out=h)
        np.divide(h, np.add.reduce(h), out=h)

    def gradients(self, x: Floats, labels: Labels) -> tuple[list[Floats], list[Floats], float]:
        """Gradients of the mean cross-entropy by weights and biases, and that mean, for one batch."""
        space, gradient = _Space(self.layers, len(x), training=True), Parameters(self.layers)
        loss = _loss(self._forward(x, space), labels, space)
        self._backward(x, labels, space, gradient)
        return gradient.weights, gradient.biases, loss

    def _backward(self, x: Floats, labels: Labels, space: _Space, gradient: Parameters) -> None:
        """Write the gradients of the mean cross-entropy, from what _forward left in the space."""
        delta = space.deltas[-1]
        delta[:] = space.outputs[-1]
        delta[space.counter, labels] -= 1
        delta /= len(labels)
        for layer in reversed(range(len(self.weights))):
            before = space.outputs[layer - 1] if layer else x
            np.matmul(before.T, delta, out=gradient.weights[layer])
            np.add.reduce(delta, axis=0, out=gradient.biases[layer])
            if layer:
                delta = np.matmul(delta, self.weights[layer].T, out=space.deltas[layer - 1])
                delta *= np.greater(before, 0, out=space.masks[layer - 1])


def _loss(probabilities: Floats, labels: Labels, space: _Space) -> float:
    return float(-np.log(np.maximum(probabilities[space.counter, labels], 1e-30)).mean())


class _SGD:
    """Against the gradient, by the rate."""

    def __init__(self, values: Floats, rate: float) -> None:
        self._values, self._rate = values, np.float32(rate)

    def step(self, gradient: Floats) -> None:
        gradient *= self._rate  # it is not needed any more
        self._values -= gradient


class _Adam:
    """Moments of the gradient; block by block, so that every pass over a block finds it in the cache."""

    def __init__(self, values: Floats, rate: float) -> None:
        self._rate, self._steps = rate, 0
        self._space = np.empty(min(BLOCK, len(values)), dtype=np.float32)
        first, second = np.zeros_like(values), np.zeros_like(values)
        self._blocks = []
        for start in range(0, len(values), BLOCK):
            part = slice(start, min(start + BLOCK, len(values)))
            self._blocks.append((part, values[part], first[part], second[part], self._space[: part.stop - start]))

    def step(self, gradient: Floats) -> None:
        self._steps += 1
        size = np.float32(self._rate * math.sqrt(1 - BETA2**self._steps) / (1 - BETA1**self._steps))
        b1, b2, c1, c2, epsilon = map(np.float32, (BETA1, BETA2, 1 - BETA1, 1 - BETA2, EPSILON))
        for part, value, m, v, space in self._blocks:
            g = gradient[part]
            m *= b1
            np.multiply(g, c1, out=space)
            m += space
            v *= b2
            np.multiply(g, g, out=space)
            space *= c2
            v += space
            np.sqrt(v, out=space)
            space += epsilon
            np.divide(m, space, out=space)
            space *= size
            value -= space


class Epoch(NamedTuple):
    """Mean loss and share of right answers over the rows of one epoch, each taken before its batch was learnt."""

    loss: float
    accuracy: float


def train(
    network: Network, x: Floats, labels: Labels, *, epochs: int, batch: int, seed: int, rate: float = 1e-3,
    optimiser: Literal["adam", "sgd"] = "adam", progress: Callable[[float], None] | None = None,
) -> list[Epoch]:  # fmt: skip
    """Learn from shuffled batches, in place. Raises FloatingPointError when the loss is no number any more; the
    network then is as it was before that batch."""
    chance = np.random.default_rng(seed)
    gradient = Parameters(network.layers)
    learn = (_Adam if optimiser == "adam" else _SGD)(network.flat, rate)
    batch = min(batch, len(x))
    space = _Space(network.layers, batch, training=True)
    rows = np.empty((batch, x.shape[1]), dtype=np.float32)
    done: list[Epoch] = []
    for epoch in range(epochs):
        order = chance.permutation(len(x))
        total, right = 0.0, 0
        for start in range(0, len(x), batch):
            chosen = order[start : start + batch]
            truth, here = labels[chosen], np.take(x, chosen, axis=0, out=rows[: len(chosen)], mode="clip")
            found = network._forward(here, space.use(len(chosen)))
            loss = _loss(found, truth, space)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} in epoch {epoch + 1}; lower the rate")
            total += loss * len(chosen)
            right += int((found.argmax(axis=1) == truth).sum())
            network._backward(here, truth, space, gradient)
            learn.step(gradient.flat)
            if progress is not None:
                progress((epoch + min(start + batch, len(x)) / len(x)) / epochs)
        done.append(Epoch(total / len(x), right / len(x)))
    return done


class DNN(Model):
    """The trained network on MNIST digits; rows are answered in one matrix product per layer."""

    name = "dnn"
    inputs = (Tensor("x", "FP32", (-1, 784)),)
    outputs = (Tensor("label", "INT64", (-1,)), Tensor("probabilities", "FP32", (-1, 10)))

    def load(self) -> None:
        with np.load(Path(__file__).resolve().parent / "data" / "dnn_weights.npz") as stored:
            count = len(LAYERS) - 1
            self._network = Network(
                [stored[f"w{i}"].astype(np.float32) for i in range(count)],
                [stored[f"b{i}"].astype(np.float32) for i in range(count)],
            )

    def predict(self, batch: Batch) -> dict[str, Array]:
        probabilities = self._network.probabilities(batch.inputs["x"])
        if not math.isfinite(np.add.reduce(probabilities, None)):
            raise BadInput("model dnn wants values whose products stay finite in FP32; found larger ones")
        return {"label": probabilities.argmax(axis=1), "probabilities": probabilities}
