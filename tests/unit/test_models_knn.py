"""k nearest neighbours against a slow and obvious version of it."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from server.models.base import BadInput
from server.models.knn import KNN
from tests.unit.serving import DATA


@pytest.fixture(scope="module")
def model() -> KNN:
    made = KNN()
    made.load()
    return made


@pytest.fixture(scope="module")
def known() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    with np.load(DATA / "breast_cancer.npz") as stored:
        return stored["rows"], stored["labels"].astype(np.int64)


def near(rows: NDArray[np.float32], seed: int, count: int) -> NDArray[np.float32]:
    """Rows between known ones, so that their neighbours are many and close."""
    chance = np.random.default_rng(seed)
    one, two = rows[chance.integers(len(rows), size=(2, count))]
    share = chance.random((count, 1), dtype=np.float32)
    between: NDArray[np.float32] = share * one + (1 - share) * two
    return between


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9, 100, 569])
def test_the_obvious_version_says_the_same(model: KNN, known: tuple[Any, Any], k: int) -> None:
    rows, labels = known
    points = rows.astype(np.float64)
    deviation = points.std(axis=0)
    queries = near(rows, k, 60)
    found = model.predict(queries, {"k": k})
    for number, query in enumerate(queries):
        apart = [sum(((point - query) / deviation) ** 2) for point in points]
        nearest = sorted(range(len(points)), key=lambda index: (apart[index], index))[:k]
        votes = Counter(int(labels[index]) for index in nearest)
        winner = min(votes, key=lambda label: (-votes[label], label))
        assert found["label"][number] == winner
        assert found["votes"][number] == votes[winner]


def test_a_known_row_is_its_own_neighbour(model: KNN, known: tuple[Any, Any]) -> None:
    rows, labels = known
    found = model.predict(rows, {"k": 1})
    assert np.array_equal(found["label"], labels)
    assert set(found["votes"]) == {1}


def test_equal_distances_go_by_index() -> None:
    from server.models import knn

    distances = np.array([3.0, 1.0, 2.0, 1.0, 2.0, 1.0, 0.0])
    assert knn._smallest(distances, 1).tolist() == [6]
    assert knn._smallest(distances, 2).tolist() == [6, 1]
    assert knn._smallest(distances, 3).tolist() == [6, 1, 3]
    assert knn._smallest(distances, 5).tolist() == [6, 1, 3, 5, 2]
    assert knn._smallest(distances, 7).tolist() == [6, 1, 3, 5, 2, 4, 0]
    assert knn._smallest(np.zeros(5), 3).tolist() == [0, 1, 2]


def test_an_answer_does_not_depend_on_its_batch(model: KNN, known: tuple[Any, Any]) -> None:
    queries = near(known[0], 7, 200)
    whole = model.predict(queries, {"k": 9})
    order = np.random.default_rng(1).permutation(200)
    shuffled = model.predict(queries[order], {"k": 9})
    for name, values in whole.items():
        assert np.array_equal(shuffled[name], values[order])
        for size in (1, 3, 17):
            parts = [model.predict(queries[i : i + size], {"k": 9})[name] for i in range(0, 200, size)]
            assert np.array_equal(np.concatenate(parts), values)


def test_huge_and_far_rows_have_answers(model: KNN) -> None:
    rows = np.array([np.full(30, 3e38), np.full(30, -3e38), np.zeros(30), np.full(30, 1e-40)], dtype=np.float32)
    found = model.predict(rows, {})
    assert found["label"].dtype == found["votes"].dtype == np.int64
    assert ((found["votes"] >= 3) & (found["votes"] <= 5)).all()


@pytest.mark.parametrize("k", [0, -1, 570, 2.5, "5", True, None, [5]])
def test_k_must_be_possible(model: KNN, k: Any) -> None:
    with pytest.raises(BadInput, match="1 to 569"):
        model.predict(np.zeros((1, 30), dtype=np.float32), {"k": k})


def test_other_parameters_are_refused(model: KNN) -> None:
    with pytest.raises(BadInput, match="neighbours"):
        model.predict(np.zeros((1, 30), dtype=np.float32), {"neighbours": 5})
