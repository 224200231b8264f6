"""Block orders: every target as often, and on average at the same time, as every other."""

import itertools
from collections import Counter

import pytest

from loadtest._order import blocks_per_target, rounds, warmup_blocks


def test_two_targets_go_abba_baab() -> None:
    assert ["".join(one) for one in rounds(["A", "B"], 4, [1])] == ["AB", "BA", "BA", "AB"]


def test_one_target_needs_no_order() -> None:
    assert rounds(["A"], 3, [1]) == [("A",)] * 3


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_each_pair_of_rounds_cancels_a_linear_drift(count: int) -> None:
    names = [f"t{i}" for i in range(count)]
    found = rounds(names, 2 * count, [7, 3])
    for first, mirror in zip(found[::2], found[1::2], strict=True):
        assert sorted(first) == names
        assert mirror == first[::-1]
        places = [*first, *mirror]
        means = {name: sum(i for i, one in enumerate(places) if one == name) / 2 for name in names}
        assert len(set(means.values())) == 1
    # Over as many pairs as there are targets, each is as often in each place.
    assert set(Counter((place, name) for one in found for place, name in enumerate(one)).values()) == {2}
    # And follows each other one as often, within a round.
    follows = Counter(pair for one in found for pair in itertools.pairwise(one))
    assert len(follows) == count * (count - 1) and set(follows.values()) == {2}


def test_an_odd_number_of_rounds_gets_its_mirror() -> None:
    assert len(rounds(["A", "B", "C"], 5, [1])) == 6


def test_the_order_is_the_seeds() -> None:
    names = ["A", "B", "C", "D"]
    assert rounds(names, 8, [1, 0]) == rounds(names, 8, [1, 0])
    assert len({tuple(rounds(names, 2, [seed])) for seed in range(30)}) > 5


@pytest.mark.parametrize(
    ("seconds", "block_s", "blocks"), [(10, 1, 10), (2.5, 0.5, 5), (0.3, 0.1, 3), (1, 3, 1), (1.1, 0.5, 3)]
)
def test_blocks_make_at_least_the_seconds_asked_for(seconds: float, block_s: float, blocks: int) -> None:
    assert blocks_per_target(seconds, block_s) == blocks


def test_warm_up_is_whole_blocks_and_never_all_of_them() -> None:
    assert warmup_blocks(0, 1, 10) == 0
    assert warmup_blocks(2, 1, 10) == 2
    assert warmup_blocks(0.3, 0.1, 10) == 3
    assert warmup_blocks(0.5, 1, 10) == 1
    assert warmup_blocks(5, 1, 3) == 2
    assert warmup_blocks(5, 1, 1) == 0
