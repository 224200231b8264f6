"""k nearest neighbours against a slow and obvious version of it."""

import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from server.models.base import BadInput, Batch
from server.models.knn import GROUP, KNN, SCORES_MIB, Neighbours
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
    found = model.predict(Batch({"x": queries}, {"k": k}))
    for number, query in enumerate(queries):
        apart = [sum(((point - query) / deviation) ** 2) for point in points]
        nearest = sorted(range(len(points)), key=lambda index: (apart[index], index))[:k]
        votes = Counter(int(labels[index]) for index in nearest)
        winner = min(votes, key=lambda label: (-votes[label], label))
        assert found["label"][number] == winner
        assert found["votes"][number] == votes[winner]


def test_a_known_row_is_its_own_neighbour(model: KNN, known: tuple[Any, Any]) -> None:
    rows, labels = known
    found = model.predict(Batch({"x": rows}, {"k": 1}))
    assert np.array_equal(found["label"], labels)
    assert set(found["votes"]) == {1}


def plain(points: Any, queries: Any, k: int) -> tuple[Any, Any]:
    """One pair of rows at a time, in float64."""
    found, apart = [], []
    for query in queries.astype(np.float64):
        distances = np.array([np.einsum("j,j->", point - query, point - query) for point in points.astype(np.float64)])
        order = np.lexsort((np.arange(len(points)), distances))[:k]
        found.append(order)
        apart.append(np.sqrt(distances[order]))
    return np.array(found), np.array(apart)


def sets() -> dict[str, tuple[Any, Any]]:
    """Points and queries that are hard: each a way for float32 to be wrong or for ties to be many."""
    chance = np.random.default_rng(11)
    normal = chance.standard_normal((700, 9)).astype(np.float32)
    asked = chance.standard_normal((40, 9)).astype(np.float32)
    whole = chance.integers(0, 3, (700, 4)).astype(np.float32)
    near = (1 + 1e-7 * normal).astype(np.float64)
    outlier = normal.copy()
    outlier[350] = 1e6
    return {
        "normal": (normal, asked),
        "offset": (normal + np.float32(1e4), asked + np.float32(1e4)),
        "ties": (whole, whole[:40]),
        "equal points": (np.ones((700, 3), np.float32), chance.standard_normal((40, 3))),
        "duplicates": (np.tile(normal[:70], (10, 1)), normal[:40]),
        "near ties": (near, near[::20] + 1e-9),
        "outlier": (outlier, asked),
        "far": (normal, asked * np.float32(1e37)),
        **{f"{size:g} away": (normal, asked * np.float32(size)) for size in (1e3, 1e5, 1e7, 1e8, 1e9, 1e12, 1e15)},
        "huge": (normal.astype(np.float64) * 1e100, asked.astype(np.float64) * 1e100),
        "tiny": (normal * np.float32(1e-42), asked * np.float32(1e-42)),
        "denormal": (normal.astype(np.float64) * 1e-310, asked.astype(np.float64) * 1e-310),
        "almost denormal": (normal.astype(np.float64) * 1e-140, asked.astype(np.float64) * 1e-120),
        "one point": (normal[:1], asked),
        "one column": (normal[:, :1], asked[:, :1]),
        "15": (normal[:15], asked),
        "16": (normal[:16], asked),
        "17": (normal[:17], asked),
    }


@pytest.mark.parametrize("name", sets())
def test_hard_sets_are_answered_as_by_float64_in_any_batch(name: str) -> None:
    points, queries = sets()[name]
    n = len(points)
    model = Neighbours(points, np.arange(n))
    border = -(-n // GROUP) // 4  # the k up to which groups are used
    alone = -(-n // GROUP) * GROUP // 32  # and for one query
    truth, apart = plain(points, queries, n)
    ks = {
        k for k in (1, 2, 5, GROUP - 1, GROUP, GROUP + 1, border, border + 1, alone, alone + 1, n - 1, n) if 1 <= k <= n
    }
    for k in sorted(ks):
        found, distances = model.nearest(queries, k)
        assert np.array_equal(found, truth[:, :k])
        assert np.array_equal(distances, apart[:, :k])
        for size in (1, 7, 33):
            parts = [model.nearest(queries[i : i + size], k) for i in range(0, len(queries), size)]
            assert np.array_equal(np.concatenate([part[0] for part in parts]), found)
            assert np.array_equal(np.concatenate([part[1] for part in parts]), distances)


def test_one_query_with_more_candidates_than_are_held_at_once() -> None:
    model = Neighbours(np.ones((30_000, 3), np.float32), np.zeros(30_000, dtype=np.int64))
    for queries in (np.zeros((1, 3)), np.full((1, 3), 1e38)):
        found, distances = model.nearest(queries, 7)
        assert found.tolist() == [[*range(7)]]
        assert distances == pytest.approx(np.sqrt(3) * abs(1 - queries[0, 0]))


def test_every_k_and_every_size_up_to_some_groups() -> None:
    chance = np.random.default_rng(2)
    for n in (*range(1, 20), 63, 64, 65, 130, 257):
        points = chance.integers(0, 4, (n, 3)).astype(np.float32)
        queries = points[chance.integers(n, size=5)]
        truth, _ = plain(points, queries, n)
        model = Neighbours(points, np.zeros(n, dtype=np.int64))
        for k in range(1, n + 1):
            assert np.array_equal(model.nearest(queries, k)[0], truth[:, :k])


@pytest.mark.parametrize("width", [3, 64, 784])
def test_a_large_set_in_float32(width: int) -> None:
    chance = np.random.default_rng(width)
    points = (chance.standard_normal((5000, width)) + 100).astype(np.float32)
    queries = (chance.standard_normal((300, width)) + 100).astype(np.float32)
    model = Neighbours(points, np.zeros(5000, dtype=np.int64))
    found, distances = model.nearest(queries, 5)
    truth, apart = plain(points, queries[::60], 5)
    assert np.array_equal(found[::60], truth)
    assert np.array_equal(distances[::60], apart)
    for row in range(0, 300, 7):
        one, away = model.nearest(queries[row : row + 1], 5)
        assert np.array_equal(one[0], found[row])
        assert np.array_equal(away[0], distances[row])


@pytest.mark.parametrize(("kind", "k"), [("normal", 5), ("normal", 400), ("ties", 5), ("far", 5), ("normal", 20000)])
def test_working_memory_has_its_bound(kind: str, k: int) -> None:
    chance = np.random.default_rng(0)
    points = chance.standard_normal((20000, 8)).astype(np.float32)
    queries = chance.standard_normal((2000 if k == 5 else 60, 8)).astype(np.float32)
    if kind == "ties":
        points[:] = 1
        queries = queries[:40]
    elif kind == "far":
        queries = queries[:40] * np.float32(1e37)
    model = Neighbours(points, np.zeros(20000, dtype=np.int64))
    tracemalloc.start()
    found = model.nearest(queries, k)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - sum(part.nbytes for part in found) < 4 * SCORES_MIB * 2**20


def test_votes_are_the_labels_own_and_a_tie_goes_to_the_lower() -> None:
    model = Neighbours(np.arange(6.0)[:, None], np.array([7, -3, 7, -3, 40, 40]))
    labels, votes = model.vote(np.array([[0, 1, 2], [0, 1, 4], [5, 4, 0], [3, 0, 5]]))
    assert labels.tolist() == [7, -3, 40, -3]
    assert votes.tolist() == [2, 1, 2, 1]


def test_no_queries_have_no_neighbours() -> None:
    found, distances = Neighbours(np.zeros((3, 2)), np.zeros(3, dtype=np.int64)).nearest(np.zeros((0, 2)), 2)
    assert found.shape == distances.shape == (0, 2)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        Neighbours(np.array([[np.nan]]), np.zeros(1, dtype=np.int64))
    with pytest.raises(ValueError, match="labels"):
        Neighbours(np.zeros((3, 2)), np.zeros(2, dtype=np.int64))
    model = Neighbours(np.zeros((3, 2)), np.zeros(3, dtype=np.int64))
    for queries, k in ((np.zeros((1, 3)), 1), (np.zeros((1, 2)), 0), (np.zeros((1, 2)), 4)):
        with pytest.raises(ValueError, match="from 1 to 3"):
            model.nearest(queries, k)


def test_an_answer_does_not_depend_on_its_batch(model: KNN, known: tuple[Any, Any]) -> None:
    queries = near(known[0], 7, 200)
    whole = model.predict(Batch({"x": queries}, {"k": 9}))
    order = np.random.default_rng(1).permutation(200)
    shuffled = model.predict(Batch({"x": queries[order]}, {"k": 9}))
    for name, values in whole.items():
        assert np.array_equal(shuffled[name], values[order])
        for size in (1, 3, 17):
            parts = [model.predict(Batch({"x": queries[i : i + size]}, {"k": 9}))[name] for i in range(0, 200, size)]
            assert np.array_equal(np.concatenate(parts), values)


def test_many_rows_with_every_neighbour_stay_within_memory(model: KNN, known: tuple[Any, Any]) -> None:
    queries = near(known[0], 8, 30_000)
    tracemalloc.start()
    try:
        found = model.predict(Batch({"x": queries}, {"k": 569}, ("label", "votes")))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 150 * 2**20  # all places and distances at once would take 260 MiB
    part = model.predict(Batch({"x": queries[5000:5050]}, {"k": 569}))
    assert np.array_equal(found["label"][5000:5050], part["label"])
    assert np.array_equal(found["votes"][5000:5050], part["votes"])
    with pytest.raises(BadInput, match="neighbours of at most 3685 rows"):
        model.predict(Batch({"x": queries}, {"k": 569}, ("neighbours",)))


def test_huge_and_far_rows_have_answers(model: KNN) -> None:
    rows = np.array([np.full(30, 3e38), np.full(30, -3e38), np.zeros(30), np.full(30, 1e-40)], dtype=np.float32)
    found = model.predict(Batch({"x": rows}))
    assert found["label"].dtype == found["votes"].dtype == np.int64
    assert ((found["votes"] >= 3) & (found["votes"] <= 5)).all()


@pytest.mark.parametrize("k", [0, -1, 570, 2.5, "5", True, None, [5]])
def test_k_must_be_possible(model: KNN, k: Any) -> None:
    with pytest.raises(BadInput, match="1 to 569"):
        model.check({"k": k})


def test_other_parameters_are_refused(model: KNN) -> None:
    with pytest.raises(BadInput, match="neighbours"):
        model.check({"neighbours": 5})
