"""The network from scratch: its gradients against differences, Adam against its paper, the weights by their accuracy."""

import itertools
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from server.models.base import BadInput, Batch
from server.models.dnn import DNN, LAYERS, Network, train
from tests.unit.serving import DATA

SMALL = (6, 5, 4, 3)


@pytest.fixture(scope="module")
def model() -> DNN:
    made = DNN()
    made.load()
    return made


def digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    with np.load(DATA / "mnist_5000.npz") as stored:
        return stored["rows"].astype(np.float32) / np.float32(255), stored["labels"].astype(np.int64)


def small(seed: int) -> tuple[Network, NDArray[np.float32], NDArray[np.int64]]:
    chance = np.random.default_rng(seed)
    return (
        Network.random(seed, SMALL),
        chance.standard_normal((7, SMALL[0])).astype(np.float32),
        chance.integers(SMALL[-1], size=7),
    )


def loss(network: Network, x: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The mean cross-entropy, layer by layer in float64, apart from the code under test."""
    h = x.astype(np.float64)
    for number, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True), 1):
        h = h @ weight.astype(np.float64) + bias
        h = np.maximum(h, 0) if number < len(network.weights) else h
    log_sum = np.log(np.exp(h - h.max(1, keepdims=True)).sum(1)) + h.max(1)
    return float((log_sum - h[np.arange(len(h)), labels]).mean())


def test_gradients_are_those_of_the_loss() -> None:
    network, x, labels = small(3)
    by_weight, by_bias, found = network.gradients(x, labels)
    assert found == pytest.approx(loss(network, x, labels), rel=1e-5)
    network.weights, network.biases = ([v.astype(float) for v in vs] for vs in (network.weights, network.biases))
    step = 1e-6
    for values, gradients in ((network.weights, by_weight), (network.biases, by_bias)):
        for value, gradient in zip(values, gradients, strict=True):
            assert value.shape == gradient.shape
            for index in np.ndindex(value.shape):
                kept = value[index]
                value[index] = kept + step
                above = loss(network, x, labels)
                value[index] = kept - step
                below = loss(network, x, labels)
                value[index] = kept
                assert gradient[index] == pytest.approx((above - below) / (2 * step), abs=1e-5)


def test_one_step_of_adam_is_the_papers() -> None:
    """After one step m̂ is the gradient and v̂ its square: every weight moves by the rate, against the gradient."""
    network, x, labels = small(5)
    before = [value.copy() for value in network.weights]
    by_weight, _, _ = network.gradients(x, labels)
    train(network, x, labels, epochs=1, batch=len(x), seed=0, rate=0.01)
    for old, new, gradient in zip(before, network.weights, by_weight, strict=True):
        clear = np.abs(gradient) > 1e-4
        assert clear.any()
        assert (new - old)[clear] == pytest.approx(-0.01 * np.sign(gradient[clear]), rel=0.02)


def test_many_steps_of_adam_are_the_papers() -> None:
    network, x, labels = small(6)
    plain = Network([w.copy() for w in network.weights], [b.copy() for b in network.biases])
    values = plain.weights + plain.biases
    m = [np.zeros(value.shape) for value in values]
    v = [np.zeros(value.shape) for value in values]
    for step in range(1, 21):
        by_weight, by_bias, _ = plain.gradients(x, labels)
        for number, gradient in enumerate(by_weight + by_bias):
            m[number] = 0.9 * m[number] + 0.1 * gradient
            v[number] = 0.999 * v[number] + 0.001 * gradient.astype(np.float64) ** 2
            m_hat, v_hat = m[number] / (1 - 0.9**step), v[number] / (1 - 0.999**step)
            values[number] -= (0.003 * m_hat / (np.sqrt(v_hat) + 1e-8)).astype(np.float32)
    train(network, x, labels, epochs=20, batch=len(x), seed=0, rate=0.003)
    for one, two in zip(network.weights + network.biases, values, strict=True):
        assert one == pytest.approx(two, abs=2e-4)


def test_training_lowers_the_loss_and_is_repeatable() -> None:
    x, labels = digits()
    losses, weights = [], []
    for _ in range(2):
        network = Network.random(1, (784, 40, 10))
        losses.append(train(network, x[:600], labels[:600], epochs=4, batch=32, seed=2))
        weights.append(network.weights[0].copy())
    assert losses[0] == losses[1]
    assert np.array_equal(weights[0], weights[1])
    assert all(later < earlier for earlier, later in itertools.pairwise(losses[0]))
    found = network.probabilities(x[:600]).argmax(axis=1)
    assert (found == labels[:600]).mean() > 0.8


def test_progress_ends_at_one_and_never_goes_back() -> None:
    network, x, labels = small(8)
    shares: list[float] = []
    train(network, x, labels, epochs=3, batch=2, seed=1, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(shares) == 3 * 4


def test_a_loss_that_is_no_number_is_an_error() -> None:
    network, x, labels = small(9)
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match="epoch"):
        train(network, x * np.float32(np.nan), labels, epochs=1, batch=4, seed=1)


def test_such_a_loss_stops_before_the_weights_are_spoilt() -> None:
    network, x, labels = small(9)
    before = network.flat.copy()
    x[0] = np.inf
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match="epoch 1"):
        train(network, x, labels, epochs=1, batch=7, seed=1, optimiser="sgd")
    assert np.array_equal(network.flat, before)


def test_sgd_goes_against_the_gradient_by_the_rate() -> None:
    network, x, labels = small(4)
    plain = Network(network.weights, network.biases)
    for _ in range(5):
        by_weight, by_bias, _ = plain.gradients(x, labels)
        for value, gradient in zip(plain.weights + plain.biases, by_weight + by_bias, strict=True):
            value -= np.float32(0.1) * gradient
    train(network, x, labels, epochs=5, batch=len(x), seed=0, rate=0.1, optimiser="sgd")
    assert network.flat == pytest.approx(plain.flat, abs=1e-6)


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_seeds_give_the_same_weights_again(optimiser: Literal["adam", "sgd"]) -> None:
    x, labels = digits()
    found = []
    for seed in (5, 5, 6):
        network = Network.random(seed, (784, 30, 10))
        train(network, x[:210], labels[:210], epochs=2, batch=32, seed=seed, rate=0.01, optimiser=optimiser)
        found.append(network.flat)
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_inference_allocates_its_result_only() -> None:
    network, x = Network.random(1), digits()[0][:600]
    network.probabilities(x)  # makes the buffers
    for rows in (1, 64, 600):
        tracemalloc.start()
        found = network.probabilities(x[:rows])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < found.nbytes + 65536  # numpy's own buffers for broadcasting; a layer of 64 rows has 204,800


def test_a_step_of_training_allocates_no_layer() -> None:
    """Four epochs take no more memory than one."""
    x, labels = digits()
    peaks = []
    for epochs in (1, 4):
        network = Network.random(1, (784, 100, 10))
        tracemalloc.start()
        train(network, x[:256], labels[:256], epochs=epochs, batch=64, seed=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 20_000  # weights: 317,000; a layer of a batch: 25,600


def test_answers_do_not_share_memory_and_threads_do_not_share_buffers() -> None:
    network, x = Network.random(2, (784, 50, 10)), digits()[0][:400]
    one = network.probabilities(x[:3])
    kept = one.copy()
    network.probabilities(x[3:6])
    assert np.array_equal(one, kept)
    parts = [x[i : i + 40] for i in range(0, 400, 40)] * 20
    truth = [network.probabilities(part) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(network.probabilities, parts), truth, strict=True):
            assert np.array_equal(found, wanted)


def test_no_rows_have_no_probabilities() -> None:
    assert Network.random(2, SMALL).probabilities(np.zeros((0, 6), dtype=np.float32)).shape == (0, 3)


def test_the_network_is_the_reports() -> None:
    assert LAYERS == (784, 800, 800, 10)
    network = Network.random(0)
    assert [weight.shape for weight in network.weights] == [(784, 800), (800, 800), (800, 10)]
    assert all(weight.dtype == np.float32 for weight in network.weights + network.biases)


def test_the_committed_weights_reach_their_stated_accuracy(model: DNN) -> None:
    """On the digits that make_data.py held out: 94 % at least, and what data/README.md states."""
    from server.models.make_data import TRAIN

    x, labels = digits()
    held_out, truth = x[TRAIN:], labels[TRAIN:]
    assert len(held_out) >= 1000
    accuracy = float((model.predict(Batch({"x": held_out}))["label"] == truth).mean())
    assert accuracy >= 0.94
    assert f"{100 * accuracy:.1f} %" in (DATA / "README.md").read_text()


def test_probabilities_stay_probabilities(model: DNN) -> None:
    chance = np.random.default_rng(0)
    for scale in (0, 1, 1e4):
        x = (chance.random((20, 784)) * scale).astype(np.float32)
        found = model.predict(Batch({"x": x}))
        assert found["probabilities"].dtype == np.float32
        assert found["label"].dtype == np.int64
        assert np.isfinite(found["probabilities"]).all()
        assert found["probabilities"].sum(axis=1) == pytest.approx(np.ones(20), abs=1e-5)
        assert np.array_equal(found["label"], found["probabilities"].argmax(axis=1))


def test_a_batch_changes_probabilities_by_rounding_only(model: DNN) -> None:
    x = digits()[0][-64:]
    whole = model.predict(Batch({"x": x}))
    for size in (1, 5):
        parts = [model.predict(Batch({"x": x[i : i + size]})) for i in range(0, 64, size)]
        assert np.array_equal(np.concatenate([part["label"] for part in parts]), whole["label"])
        assert np.concatenate([part["probabilities"] for part in parts]) == pytest.approx(
            whole["probabilities"], abs=1e-5
        )


def test_the_input_is_left_as_it_was(model: DNN) -> None:
    x = digits()[0][:8]
    before = x.copy()
    model.predict(Batch({"x": x}))
    assert np.array_equal(x, before)


def test_parameters_are_refused(model: DNN) -> None:
    with pytest.raises(BadInput, match="dnn"):
        model.check({"k": 5})
