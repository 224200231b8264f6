"""The kernel's stamps on the monotonic clock, and a timer."""

import select
import time
import types

import numpy as np
import pytest

from loadtest import _clock
from loadtest._clock import NO_STAMP, Stamps, Timer, pack


def test_a_stamp_becomes_monotonic() -> None:
    stamps = Stamps()
    before, real, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
    (found,) = stamps.monotonic([pack(real)], np.array([before - 10_000]), np.array([after + 10_000]))
    assert before - 5000 <= found <= after + 5000
    assert stamps.steps == 0
    stamps.close()


def test_no_stamp_and_impossible_stamps_are_none() -> None:
    stamps = Stamps()
    now, real = time.monotonic_ns(), time.time_ns()
    found = stamps.monotonic(
        [NO_STAMP, pack(real - 10**9), pack(real + 10**9)], np.full(3, now - 10**6), np.full(3, now + 10**6)
    )
    assert found.tolist() == [0, 0, 0]
    assert stamps.monotonic([], np.empty(0, np.int64), np.empty(0, np.int64)).shape == (0,)
    stamps.close()


@pytest.mark.parametrize("step_s", [3600, -3600])
def test_a_step_of_the_clock_is_noticed_and_stamps_before_and_after_it_are_right(
    monkeypatch: pytest.MonkeyPatch, step_s: int
) -> None:
    """A clock that is really set: tests/e2e/test_clock.py."""
    ahead = [0]
    clock = types.SimpleNamespace(time_ns=lambda: time.time_ns() + ahead[0], monotonic_ns=time.monotonic_ns)
    monkeypatch.setattr(_clock, "time", clock)
    stamps = Stamps()
    before = time.monotonic_ns(), clock.time_ns()
    ahead[0] = step_s * 10**9
    after = time.monotonic_ns(), clock.time_ns()
    at = np.array([before[0], after[0]])
    found = stamps.monotonic([pack(before[1]), pack(after[1])], at - 10**6, at + 10**6)
    assert stamps.steps == 1
    assert (np.abs(found - at) < 10**6).all() and (found > 0).all()
    stamps.close()


def test_slow_readings_are_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """In an emulated guest each reading may take tens of µs, now before and now after the one between."""
    chance = np.random.default_rng(1)
    now = [10**15]

    def read(ahead_ns: int) -> int:
        now[0] += int(chance.integers(10_000, 90_000))
        return now[0] + ahead_ns

    clock = types.SimpleNamespace(time_ns=lambda: read(10**18), monotonic_ns=lambda: read(0))
    monkeypatch.setattr(_clock, "time", clock)
    stamps = Stamps()
    for _ in range(500):
        stamps.look()
    assert stamps.steps == 0
    clock.time_ns = lambda: read(10**18 + 10**6)
    stamps.look()
    assert stamps.steps == 1
    stamps.close()


def test_a_timer_fires_when_it_is_armed_for_and_not_before() -> None:
    timer = Timer()
    readable = lambda bound_s: bool(select.select([timer.fd], [], [], bound_s)[0])  # noqa: E731
    assert not readable(0)
    at_ns = time.monotonic_ns() + 30_000_000
    timer.arm(at_ns)
    assert readable(5) and time.monotonic_ns() >= at_ns
    timer.arm(0)
    assert not readable(0.01)
    timer.arm(1)  # long over
    assert readable(5)
    timer.close()
