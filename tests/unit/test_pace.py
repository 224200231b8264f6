"""What is said of the client: how late it woke up, and whether it kept up."""

import numpy as np
import pytest

from loadtest._pace import Effort, Lateness, Pace


def effort(late_us: float = 10, *, cpu: float = 0.3, **more: int) -> Effort:
    made = Effort()
    late_ns = (np.full(1000, late_us) * 1000).astype(np.int64)
    made.add(
        Pace(late_ns, *(more.get(name, 0) for name in ("queued", "unanswered", "reconnects", "gap_ns", "clock_steps")))
    )
    made.end(round(cpu * 1e9), 10**9)
    return made


def test_lateness() -> None:
    made = Effort()
    assert made.lateness == Lateness(0, 0, 0) and made.words() == []
    made.add(Pace(np.arange(1, 101) * 1000, 0, 0, 0, 0, 0))
    assert made.lateness == pytest.approx(Lateness(50_000, 99_000, 100_000), rel=0.0005)


@pytest.mark.parametrize(("late_us", "cpu", "limited"), [(10, 0.3, 0), (900, 0.9, 0), (1100, 0.3, 1), (10, 0.96, 1)])
def test_a_client_that_does_not_keep_up_says_so(late_us: float, cpu: float, limited: int) -> None:
    made = effort(late_us, cpu=cpu)
    assert made.limited == limited
    assert any(line.startswith("client-limited: ") for line in made.words()) == bool(limited)


def test_one_in_ten_may_be_late() -> None:
    late_ns = np.full(1000, 5000)
    for n, limited in ((100, 0), (101, 1)):
        late_ns[:n] = 20_000_000
        made = Effort()
        made.add(Pace(late_ns, 0, 0, 0, 0, 0))
        made.end(1, 10**9)
        assert made.limited == limited


def test_a_master_adds_up_its_workers() -> None:
    one = effort(10, queued=3, unanswered=1, reconnects=2, gap_ns=5, clock_steps=1)
    two = effort(2000, queued=4)
    both = Effort()
    for each in (one, two):
        both.merge(each.packed())
    assert (both.queued, both.unanswered, both.reconnects, both.gap_ns, both.clock_steps) == (7, 1, 2, 5, 1)
    assert (both.processes, both.limited, sum(both.late.values())) == (2, 1, 2000)
    said = "\n".join(both.words())
    for text in (
        "arrivals: 2000",
        "7 waited",
        "1 of 2 clients",
        "2 times",
        "unanswered: 1 ",
        "wall clock was set 1 times",
    ):
        assert text in said
