"""What the models cost over the matrix products that they cannot do without, and beside faiss and scikit-learn.

    python tests/bench/bench_models.py [--rounds 15] [--only knn|inference|training]

Prints a table of ratios. All contestants of a line run in every round, in another order each; a ratio is that of one
round, and the table has its median and quartiles, so that what the machine does besides touches all alike. faiss-cpu
and scikit-learn are no dependencies: where they are missing, the table says so. One thread; times are of this machine.
"""

# ruff: noqa: E402  (the environment comes before NumPy)
import os

for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(name, None)  # they would choose another kernel than the processor's own
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # read as NumPy is imported

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from server.models.dnn import LAYERS, Network, train
from server.models.knn import Neighbours

K = 5
SMALL = (784, 256, 128, 10)
AT_LEAST_S = 0.002  # a faster call is repeated, so that the clock and a cold cache do not tell
Call = Callable[[], Any]
Line = tuple[str, dict[str, Call]]


def optional(name: str) -> Any:
    try:
        return __import__(name, fromlist=["x"])
    except ImportError:
        return None


FAISS, NEIGHBOURS, PERCEPTRON = optional("faiss"), optional("sklearn.neighbors"), optional("sklearn.neural_network")


def knn() -> Iterator[Line]:
    """The floor is one sgemm of queries and points into memory that is there."""
    chance = np.random.default_rng(0)
    for n, d, rows in ((569, 30, 64), (10_000, 64, 1), (10_000, 64, 64), (10_000, 64, 512), (10_000, 784, 64),
                       (10_000, 784, 512)):  # fmt: skip
        points = chance.standard_normal((n, d), dtype=np.float32)
        queries = chance.standard_normal((rows, d), dtype=np.float32)
        model, scores = Neighbours(points, np.zeros(n, dtype=np.int64)), np.empty((rows, n), dtype=np.float32)
        calls: dict[str, Call] = {
            "floor": lambda q=queries, p=points, s=scores: np.matmul(q, p.T, out=s),
            "ours": lambda m=model, q=queries: m.nearest(q, K),
        }
        if FAISS:
            index = FAISS.IndexFlatL2(d)
            index.add(points)
            calls["faiss"] = lambda i=index, q=queries: i.search(q, K)
        if NEIGHBOURS:
            brute = NEIGHBOURS.NearestNeighbors(n_neighbors=K, algorithm="brute").fit(points)
            calls["scikit-learn"] = lambda b=brute, q=queries: b.kneighbors(q)
        yield f"KNN, {n:,} × {d}, {rows} queries", calls


def products(layers: tuple[int, ...], rows: int, training: bool) -> Call:
    """The matrix products of one pass over a batch, and nothing else."""
    weights = [np.ones(shape, dtype=np.float32) for shape in pairwise(layers)]
    gradients = [np.empty_like(weight) for weight in weights]
    outputs = [np.zeros((rows, size), dtype=np.float32) for size in layers]
    deltas = [np.zeros((rows, size), dtype=np.float32) for size in layers]

    def run() -> None:
        for layer, weight in enumerate(weights):
            np.matmul(outputs[layer], weight, out=outputs[layer + 1])
        for layer in reversed(range(len(weights))) if training else ():
            np.matmul(outputs[layer].T, deltas[layer + 1], out=gradients[layer])
            if layer:
                np.matmul(deltas[layer + 1], weights[layer].T, out=deltas[layer])

    return run


def inference() -> Iterator[Line]:
    for layers in (SMALL, LAYERS):
        for rows in (1, 64):
            x = np.random.default_rng(1).random((rows, layers[0]), dtype=np.float32)
            network = Network.random(1, layers)
            yield (
                f"inference, {'-'.join(map(str, layers))}, batch {rows}",
                {
                    "floor": products(layers, rows, training=False),
                    "ours": lambda n=network, x=x: n.probabilities(x),
                },
            )


def training() -> Iterator[Line]:
    """One epoch each; scikit-learn's is a whole call of fit, with what it checks at the start."""
    chance = np.random.default_rng(2)
    cases: tuple[tuple[tuple[int, ...], int, Literal["adam", "sgd"]], ...] = (
        (SMALL, 128, "adam"), (SMALL, 128, "sgd"), (SMALL, 512, "adam"), (SMALL, 512, "sgd"), (LAYERS, 128, "adam"),
    )  # fmt: skip
    for layers, batch, optimiser in cases:
        count = 8192 if layers == SMALL else 2048
        x, labels = chance.random((count, layers[0]), dtype=np.float32), chance.integers(layers[-1], size=count)
        network, once = Network.random(1, layers), products(layers, batch, training=True)

        def floor(once: Call = once, times: int = count // batch) -> None:
            for _ in range(times):
                once()

        calls: dict[str, Call] = {
            "floor": floor,
            "ours": lambda n=network, x=x, y=labels, b=batch, o=optimiser: train(
                n, x, y, epochs=1, batch=b, seed=1, rate=1e-4, optimiser=o
            ),
        }
        if PERCEPTRON:
            peer = PERCEPTRON.MLPClassifier(layers[1:-1], solver=optimiser, batch_size=batch, max_iter=1)
            calls["scikit-learn"] = lambda p=peer, x=x, y=labels: p.fit(x, y)
        yield f"training, {optimiser}, {'-'.join(map(str, layers))}, batch {batch}", calls


def measure(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds per call, by contestant, one value per round."""
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(AT_LEAST_S / (time.perf_counter() - start)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    chance = np.random.default_rng(3)
    for _ in range(rounds):
        for name in chance.permutation(list(calls)).tolist():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                calls[name]()
            found[name].append((time.perf_counter() - start) / repeats[name])
    return found


def ratio(one: list[float], other: list[float]) -> str:
    low, middle, high = np.quantile(np.divide(one, other), (0.25, 0.5, 0.75))
    return f"{middle:.2f} ({low:.2f}…{high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("knn", "inference", "training"))
    given = parser.parse_args()
    threadpool_limits(1)
    if FAISS:
        FAISS.omp_set_num_threads(1)
    blas = [library for library in threadpool_info() if library["user_api"] == "blas"]
    for library in blas:
        file = library["filepath"].rpartition("/")[2]
        print(f"BLAS: {library['internal_api']} {library['version']}, kernel {library.get('architecture')}: {file}")
    if len({library.get("architecture") for library in blas}) > 1:
        print("These kernels differ: a ratio to a peer is one of libraries and kernels together.")
    for name, there in (("faiss-cpu", FAISS), ("scikit-learn", NEIGHBOURS)):
        if not there:
            print(f"{name} is not installed; its columns stay empty (pip install {name})")
    print(f"\nMedian of {given.rounds} rounds (quartiles).\n")
    print("| what | floor, µs | ours, µs | ours / floor | faiss / ours | scikit-learn / ours |")
    print("|---|---|---|---|---|---|")
    for group in (knn, inference, training):
        if given.only not in (None, group.__name__):
            continue
        for what, calls in group():
            found = measure(calls, given.rounds)
            times = [f"{1e6 * np.median(found[name]):,.1f}" for name in ("floor", "ours")]
            peers = [ratio(found[name], found["ours"]) if name in found else "" for name in ("faiss", "scikit-learn")]
            print("|", " | ".join([what, *times, ratio(found["ours"], found["floor"]), *peers]), "|", flush=True)


if __name__ == "__main__":
    main()
