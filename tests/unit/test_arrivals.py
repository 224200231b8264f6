"""Schedules: what a seed gives, and that the shares of the workers are the whole."""

import itertools

import numpy as np
import pytest

from images.errors import UsageError
from loadtest import _arrivals
from loadtest._arrivals import FOREVER_NS, Load, Schedule, parse, pieces

POISSON = parse("poisson-2000")


def walk(schedule: Schedule, most: int = 10**6) -> list[tuple[int, int]]:
    found = []
    while schedule.next_ns < FOREVER_NS and len(found) < most:
        upcoming = schedule.next_ns
        found.append(schedule.pop())
        assert found[-1][0] == upcoming
    return found


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("closed-16", Load("closed-16", "closed", connections=16)),
        ("constant-350", Load("constant-350", "constant", rate=350)),
        ("poisson-12.5", Load("poisson-12.5", "poisson", rate=12.5)),
        ("single", Load("single", "single", connections=1)),
        ("offline", Load("offline", "offline")),
    ],
)
def test_loads_by_name(name: str, load: Load) -> None:
    assert parse(name) == load
    assert load.open == (load.scenario in ("constant", "poisson", "offline"))


@pytest.mark.parametrize(
    "name", ["", "closed", "closed-0", "closed-1.5", "poisson", "poisson-0", "poisson-0.0", "open-1"]
)
def test_what_is_no_load(name: str) -> None:
    with pytest.raises(UsageError, match="wanted closed-N, constant-RATE"):
        parse(name)


def test_constant_arrivals_are_evenly_spaced_without_drift() -> None:
    offsets = np.concatenate(list(itertools.islice(pieces(parse("constant-300"), 1), 100)))
    assert (offsets == np.rint(np.arange(len(offsets)) * 1e9 / 300)).all()


def test_poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    offsets = np.concatenate(list(itertools.islice(pieces(POISSON, 1), 50)))
    assert (np.diff(offsets) >= 0).all() and offsets[0] > 0
    n = len(offsets)
    assert n / (offsets[-1] / 1e9) == pytest.approx(2000, rel=4 / n**0.5)
    gaps = np.diff(offsets)
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.02)
    per_10_ms = np.bincount(offsets // 10_000_000)
    assert per_10_ms.var() / per_10_ms.mean() == pytest.approx(1, abs=0.05)


def test_a_seed_is_one_schedule_and_another_seed_another() -> None:
    one, same, other = (next(pieces(POISSON, seed)) for seed in (7, 7, 8))
    assert (one == same).all() and (one != other).any()
    # However much of it is used: the first second is the same in a run of one and of five.
    short = walk(Schedule(pieces(POISSON, 7), 0, before_ns=10**9))
    long = walk(Schedule(pieces(POISSON, 7), 0, before_ns=5 * 10**9))
    assert long[: len(short)] == short and len(long) > 4 * len(short)
    assert short[-1][0] < 10**9 <= long[len(short)][0]


@pytest.mark.parametrize("workers", [1, 2, 3, 5000])
def test_the_shares_of_all_workers_are_the_whole(workers: int) -> None:
    start_ns = 10**15
    whole = walk(Schedule(pieces(POISSON, 3), start_ns, before_ns=6 * 10**9))
    assert [number for _, number in whole] == list(range(len(whole)))
    shares = [
        walk(Schedule(pieces(POISSON, 3), start_ns, worker=worker, workers=workers, before_ns=6 * 10**9))
        for worker in range(workers)
    ]
    assert sorted(itertools.chain(*shares), key=lambda arrival: arrival[1]) == whole
    for worker, share in enumerate(shares):
        assert all(number % workers == worker for _, number in share)


def test_offline_is_everything_at_once() -> None:
    found = walk(Schedule(pieces(parse("offline"), 1, 10_000), 5))
    assert found == [(5, number) for number in range(10_000)]
    halves = [walk(Schedule(pieces(parse("offline"), 1, 9), 5, worker=w, workers=2)) for w in (0, 1)]
    assert [len(half) for half in halves] == [5, 4]


def test_a_schedule_that_is_ended_is_over() -> None:
    schedule = Schedule(pieces(POISSON, 3), 0)
    walk(schedule, 10_000)
    schedule.end()
    assert schedule.next_ns == FOREVER_NS


def test_no_arrival_at_all() -> None:
    assert Schedule(pieces(parse("poisson-0.001"), 1), 0, before_ns=1000).next_ns == FOREVER_NS
    assert _arrivals.FOREVER_NS > 10**18
