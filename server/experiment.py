"""What the two timings of the 2023 report cover, step by step; slow where the report was slow, on purpose."""

import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from server.models import dnn as network
from server.models.knn import DATA

KS = (1, 3, 5, 7, 9)
REPORTED_K = 5
TRAIN_SHARE = 0.8
BATCH = 32
DIGITS = 5000  # different ones that there are; a file of more rows repeats them
PROGRESS_STEP = 0.05
Progress = Callable[[float], None]


class Experiment(Protocol):
    """`prepare` writes the CSV files and is not timed; `run` is what a timing covers, and returns its result."""

    def prepare(self, folder: Path, *, rows: int, epochs: int, seed: int) -> None: ...

    def run(self, folder: Path, *, rows: int, epochs: int, seed: int, progress: Progress) -> dict[str, Any]: ...


class _Neighbours:
    """Parse two CSV files; for each k classify the last 20 % of the rows by the first 80 %, one norm per pair."""

    def prepare(self, folder: Path, *, rows: int, epochs: int, seed: int) -> None:
        with np.load(DATA / "breast_cancer.npz") as stored:
            order = np.random.default_rng(seed).permutation(len(stored["rows"]))[:rows]
            points, signs = stored["rows"][order], np.where(stored["labels"][order] == 1, 1, -1)
        with (folder / "rows.csv").open("w", newline="") as file:
            csv.writer(file).writerows(points.astype(str))  # the shortest form: 17.99, as published
        with (folder / "labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([sign] for sign in signs.tolist())

    def run(self, folder: Path, *, rows: int, epochs: int, seed: int, progress: Progress) -> dict[str, Any]:
        with (folder / "rows.csv").open(newline="") as file:
            points = np.array([[float(cell) for cell in row] for row in csv.reader(file)])
        with (folder / "labels.csv").open(newline="") as file:
            signs = np.array([int(row[0]) for row in csv.reader(file)])
        cut = int(len(points) * TRAIN_SHARE)
        accuracies: dict[str, float] = {}
        reported: dict[str, Any] = {}
        for number, k in enumerate(KS, 1):
            predicted = np.array([self._vote(points[:cut], signs[:cut], query, k) for query in points[cut:]])
            accuracies[str(k)] = float((predicted == signs[cut:]).mean())
            if k == REPORTED_K:
                reported = self._quality(predicted, signs[cut:]) | {"accuracy": accuracies[str(k)]}
            progress(number / len(KS))
        return reported | {"accuracy_by_k": accuracies, "tested": len(points) - cut}

    def _vote(self, points: Any, signs: Any, query: Any, k: int) -> int:
        distances = np.empty(len(points))
        for row in range(len(points)):
            distances[row] = np.linalg.norm(points[row] - query)
        nearest = np.argsort(distances, kind="stable")[:k]
        return 1 if signs[nearest].sum() > 0 else -1

    def _quality(self, predicted: Any, signs: Any) -> dict[str, float | None]:
        """Precision and recall of +1, benign; null where a denominator is 0."""
        counts = Counter(zip(predicted.tolist(), signs.tolist(), strict=True))
        found, wanted = counts[1, 1] + counts[1, -1], counts[1, 1] + counts[-1, 1]
        return {
            "precision": counts[1, 1] / found if found else None,
            "recall": counts[1, 1] / wanted if wanted else None,
        }


class _Training:
    """Read a CSV in MNIST's shape (label, 784 pixels of 0…255) and train 784-800-800-10 with Adam, batches of 32.

    The accuracy is that of the last epoch, as training went, over the rows trained on: a test on other rows would be
    a part of the time that the report's timing does not have. It says that the work was done and that it is the same
    work everywhere, not how good the network is.
    """

    def prepare(self, folder: Path, *, rows: int, epochs: int, seed: int) -> None:
        with np.load(DATA / "mnist_5000.npz") as stored:
            pixels, labels = stored["rows"], stored["labels"]
        with (folder / "digits.csv").open("w") as file:
            for row in range(rows):
                chosen = row % len(pixels)
                file.write(f"{labels[chosen]}," + ",".join(map(str, pixels[chosen].tolist())) + "\n")

    def run(self, folder: Path, *, rows: int, epochs: int, seed: int, progress: Progress) -> dict[str, Any]:
        table = np.loadtxt(folder / "digits.csv", dtype=np.uint8, delimiter=",", ndmin=2)
        x, labels = table[:, 1:].astype(np.float32) / np.float32(255), table[:, 0].astype(np.int64)
        last = 0.0

        def step(share: float) -> None:
            nonlocal last
            if share - last >= PROGRESS_STEP or share == 1:
                last = share
                progress(share)

        net = network.Network.random(seed)
        *_, end = network.train(net, x, labels, epochs=epochs, batch=BATCH, seed=seed, progress=step)
        distinct = min(rows, DIGITS)
        return {
            "accuracy": end.accuracy, "accuracy_of": "the rows trained on, during the last epoch", "loss": end.loss,
            "distinct_rows": distinct, "repeated_rows": rows - distinct,
        }  # fmt: skip


JOBS: dict[str, Experiment] = {"knn": _Neighbours(), "dnn": _Training()}
