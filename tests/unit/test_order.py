"""Block orders: every target as often, and on average at the same time, as every other."""

import itertools
from collections import Counter

import pytest

from loadtest._arrivals import parse
from loadtest._order import (
    LEAST_BLOCK_S,
    MOST_BLOCK_S,
    OPEN_BLOCK_S,
    block_length,
    length_of,
    longest,
    rounds,
    rounds_of,
)


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
    ("seconds", "warmup_s", "block_s", "targets", "wanted"),
    [
        (10, 2, 1, 3, (2, 10)),
        (10, 1, 1, 3, (2, 10)),  # whole quads of warm-up,
        (2.5, 0, 0.5, 2, (0, 6)),  # and of the rest
        (0.3, 0.1, 0.1, 2, (2, 4)),
        (4.0, 0.8, 5, 2, (2, 4)),  # a quad is left, however long a block is
        (4.0, 0, 5, 2, (0, 2)),
        (0.3, 0.1, 0.1, 1, (1, 3)),  # one target has no quads
        (1, 0.25, 3, 1, (1, 2)),
        (1, 0, 3, 1, (0, 1)),
    ],
)
def test_a_cell_has_whole_quads_and_at_least_the_seconds_asked_for(
    seconds: float, warmup_s: float, block_s: float, targets: int, wanted: tuple[int, int]
) -> None:
    assert rounds_of(seconds, warmup_s, block_s, targets) == wanted


def test_a_block_holds_the_requests_of_a_p99_with_a_reserve() -> None:
    assert block_length(1250) == 0.5 and block_length(1251) == 0.5 and block_length(1249) == 0.51
    assert block_length(1e6) == LEAST_BLOCK_S == 0.2
    assert block_length(125) == block_length(0.1) == MOST_BLOCK_S == 5.0


def test_open_arrivals_have_long_blocks_and_a_plan_may_say_otherwise() -> None:
    given = {
        name: length_of(parse(name), 0.0) for name in ("closed-4", "single", "poisson-20", "constant-20", "offline")
    }
    assert given == {"closed-4": 0, "single": 0} | dict.fromkeys(("poisson-20", "constant-20", "offline"), OPEN_BLOCK_S)
    assert OPEN_BLOCK_S >= 5 and length_of(parse("poisson-20"), 0.5) == length_of(parse("closed-1"), 0.5) == 0.5


def test_a_quick_run_keeps_to_its_seconds_however_slow_a_target_is() -> None:
    assert longest(20, False) == MOST_BLOCK_S and longest(1.0, True) == LEAST_BLOCK_S
    assert block_length(10, longest(2.8, True)) == pytest.approx(0.35)
    assert rounds_of(2.8, 0.4, longest(2.8, True), 3) == (2, 8)
