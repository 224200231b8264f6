"""What the models cost over the matrix products that they cannot do without, and beside libraries that do the same.

    python -m tests.bench.bench_models [--rounds 15] [--only knn|inference|training] [--write]

Prints a table of ratios, and with --write puts it into docs/performance.md. All contestants of a line run in every round, in another order each; a ratio is that of one
round, and the table has its median and quartiles, so that what the machine does besides touches all alike. faiss-cpu,
scikit-learn, onnxruntime (with onnx) and torch are no dependencies: where they are missing, the table says so. One
thread; times are of this machine.
"""

# ruff: noqa: E402  (the environment comes before NumPy)
import os

for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(name, None)  # they would choose another kernel than the processor's own
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # read as NumPy is imported

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from server.models.dnn import LAYERS, Network, train
from server.models.knn import DATA, Neighbours
from server.models.make_data import TRAIN
from tests.bench.tables import show, spread, table

K = 5
SMALL = (784, 256, 128, 10)
EPOCHS = 20
AT_LEAST_S = 0.002  # a faster call is repeated, so that the clock and a cold cache do not tell
Call = Callable[[], Any]
Line = tuple[str, str, dict[str, Call]]  # what, what it must reach, contestants


def optional(name: str) -> Any:
    try:
        return __import__(name, fromlist=["x"])
    except ImportError:
        return None


FAISS, NEIGHBOURS, PERCEPTRON = optional("faiss"), optional("sklearn.neighbors"), optional("sklearn.neural_network")
ONNX, ONNXRUNTIME, TORCH = optional("onnx.helper"), optional("onnxruntime"), optional("torch")
PEERS = {"faiss-cpu": FAISS, "scikit-learn": NEIGHBOURS, "onnxruntime": ONNX and ONNXRUNTIME, "torch": TORCH}


def knn() -> Iterator[Line]:
    """The floor is one sgemm of queries and points into memory that is there."""
    chance = np.random.default_rng(0)
    cases = (
        (569, 30, 1, ""), (569, 30, 64, ""), (10_000, 64, 1, "faiss-cpu ≥ 1"), (10_000, 64, 64, "≤ 1.5 floors"),
        (10_000, 64, 512, ""), (10_000, 784, 64, "≤ 1.10 floors"), (10_000, 784, 512, "≤ 1.10 floors"),
    )  # fmt: skip
    for n, d, rows, aim in cases:
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
            calls["faiss-cpu"] = lambda i=index, q=queries: i.search(q, K)
        if NEIGHBOURS:
            brute = NEIGHBOURS.NearestNeighbors(n_neighbors=K, algorithm="brute").fit(points)
            calls["scikit-learn"] = lambda b=brute, q=queries: b.kneighbors(q)
        yield f"KNN, {n:,} × {d}, {rows} {'query' if rows == 1 else 'queries'}", aim, calls


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
        for rows, aim in ((1, "onnxruntime ≥ 0.77"), (64, "onnxruntime ≥ 0.69")):
            x = np.random.default_rng(1).random((rows, layers[0]), dtype=np.float32)
            network = Network.random(1, layers)
            calls: dict[str, Call] = {
                "floor": products(layers, rows, training=False),
                "ours": lambda n=network, x=x: n.probabilities(x),
            }
            if PEERS["onnxruntime"]:
                session = onnx_session(network)
                calls["onnxruntime"] = lambda s=session, x=x: s.run(None, {"x": x})[0]
            if TORCH:
                calls["torch"] = torch_inference(network, x)
            for name, call in calls.items():
                assert name == "floor" or np.allclose(np.asarray(call()).reshape(rows, -1), calls["ours"](), atol=1e-4)
            yield f"inference, {'-'.join(map(str, layers))}, batch {rows}", aim if layers == SMALL else "", calls


def onnx_session(network: Network) -> Any:
    """The same network: Gemm, Relu, …, Softmax, on one thread."""
    nodes, numbers, here = [], [], "x"
    last = len(network.weights) - 1
    for layer, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        for name, value in ((f"w{layer}", weight), (f"b{layer}", bias)):
            numbers.append(ONNX.make_tensor(name, 1, value.shape, value.tobytes(), raw=True))
        nodes.append(ONNX.make_node("Gemm", [here, f"w{layer}", f"b{layer}"], [f"z{layer}"]))
        here = "y" if layer == last else f"h{layer}"
        kind = {"axis": 1} if layer == last else {}
        nodes.append(ONNX.make_node("Softmax" if layer == last else "Relu", [f"z{layer}"], [here], **kind))
    ends = [
        ONNX.make_tensor_value_info(name, 1, ["rows", size]) for name, size in (("x", network.layers[0]), ("y", 10))
    ]
    graph = ONNX.make_graph(nodes, "network", ends[:1], ends[1:], numbers)
    model = ONNX.make_model(graph, opset_imports=[ONNX.make_opsetid("", 17)], ir_version=9)
    options = ONNXRUNTIME.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ONNXRUNTIME.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def torch_network(layers: tuple[int, ...]) -> Any:
    parts: list[Any] = []
    for a, b in pairwise(layers):
        parts += [TORCH.nn.Linear(a, b), TORCH.nn.ReLU()]
    return TORCH.nn.Sequential(*parts[:-1])


def torch_inference(network: Network, x: Any) -> Call:
    same, asked = torch_network(network.layers), TORCH.from_numpy(x)
    linear = [part for part in same if isinstance(part, TORCH.nn.Linear)]
    for part, weight, bias in zip(linear, network.weights, network.biases, strict=True):
        part.weight.data, part.bias.data = TORCH.from_numpy(weight.T.copy()), TORCH.from_numpy(bias.copy())

    def run() -> Any:
        with TORCH.inference_mode():
            return TORCH.softmax(same(asked), 1)

    return run


def torch_epoch(layers: tuple[int, ...], x: Any, labels: Any, batch: int, optimiser: str) -> Call:
    network, rows, truth = torch_network(layers), TORCH.from_numpy(x), TORCH.from_numpy(labels)
    learn = {"adam": TORCH.optim.Adam, "sgd": TORCH.optim.SGD}[optimiser](network.parameters(), lr=1e-4)

    def run() -> None:
        order = TORCH.randperm(len(rows))
        for start in range(0, len(rows), batch):
            chosen = order[start : start + batch]
            learn.zero_grad()
            TORCH.nn.functional.cross_entropy(network(rows[chosen]), truth[chosen]).backward()
            learn.step()

    return run


def training() -> Iterator[Line]:
    """One epoch each; scikit-learn's is a whole call of fit, with what it checks at the start."""
    chance = np.random.default_rng(2)
    cases: tuple[tuple[tuple[int, ...], int, Literal["adam", "sgd"], str], ...] = (
        (SMALL, 128, "adam", "≤ 1.6 floors; scikit-learn ≥ 2"), (SMALL, 128, "sgd", ""),
        (SMALL, 512, "adam", "≤ 1.35 floors; scikit-learn ≥ 2"), (SMALL, 512, "sgd", ""), (LAYERS, 128, "adam", ""),
    )  # fmt: skip
    for layers, batch, optimiser, aim in cases:
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
        if TORCH:
            calls["torch"] = torch_epoch(layers, x, labels, batch, optimiser)
        yield f"training, {optimiser}, {'-'.join(map(str, layers))}, batch {batch}", aim, calls


def accuracies() -> str:
    """How well networks of five seeds know held-out digits, ours and scikit-learn's of the same layers and training."""
    with np.load(DATA / "mnist_5000.npz") as stored:
        x, labels = stored["rows"] / np.float32(255), stored["labels"].astype(np.int64)
    learn, held = slice(0, TRAIN), slice(TRAIN, None)

    def ours(seed: int) -> float:
        network = Network.random(seed, SMALL)
        train(network, x[learn], labels[learn], epochs=EPOCHS, batch=128, seed=seed)
        return float((network.probabilities(x[held]).argmax(axis=1) == labels[held]).mean())

    def peers(seed: int) -> float:
        peer = PERCEPTRON.MLPClassifier(
            SMALL[1:-1], alpha=0, batch_size=128, max_iter=EPOCHS, random_state=seed, n_iter_no_change=EPOCHS
        )
        with warnings.catch_warnings(action="ignore"):  # it would go on
            return float(peer.fit(x[learn], labels[learn]).score(x[held], labels[held]))

    found = {"ours": [ours(seed) for seed in range(5)]}
    if PERCEPTRON:
        found["scikit-learn"] = [peers(seed) for seed in range(5)]
    words = [f"{name} {100 * min(of):.1f} to {100 * max(of):.1f} %" for name, of in found.items()]
    return (
        f"Right answers on 1,000 held-out digits after {EPOCHS} epochs of Adam, five seeds of the small network: "
        f"{', '.join(words)}."
    )


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
    return spread(np.divide(one, other).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("knn", "inference", "training"))
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    given = parser.parse_args()
    threadpool_limits(1)
    if TORCH:
        TORCH.set_num_threads(1)
    if FAISS:
        FAISS.omp_set_num_threads(1)
    blas = [library for library in threadpool_info() if library["user_api"] == "blas"]
    notes = [f"{one['internal_api']} {one['version']} with the kernel {one.get('architecture')}" for one in blas]
    rows = []
    for group in (knn, inference, training):
        if given.only not in (None, group.__name__):
            continue
        for what, aim, calls in group():
            found = measure(calls, given.rounds)
            times = [f"{1e6 * np.median(found[name]):,.1f}" for name in ("floor", "ours")]
            peers = "; ".join(f"{name} {ratio(found[name], found['ours'])}" for name in PEERS if name in found)
            rows.append([what, aim, *times, ratio(found["ours"], found["floor"]), peers])
            print(*rows[-1], sep=" | ", flush=True)
    missing = [name for name, there in PEERS.items() if not there]
    text = table(["what", "aim", "floor, µs", "ours, µs", "ours / floor", "peers' times / ours"], rows)
    text += f"\n\nMedian (quartiles) of {given.rounds} rounds. One thread each; BLAS: {'; '.join(notes)}."
    text += " Where kernels differ, a ratio to a peer is one of libraries and kernels together." * (len(set(notes)) > 1)
    text += f" Not installed and not in the table: {', '.join(missing)}." * bool(missing)
    if given.only in (None, "training"):
        text += f"\n\n{accuracies()}"
    show("models", text, given.write)


if __name__ == "__main__":
    main()
