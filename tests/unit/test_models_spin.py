"""Spin is busy for at least its time, and its long calls are the same ones for the same seed."""

import random
import time

import numpy as np
import pytest

from server.models.base import BadInput, Batch
from server.models.spin import Spin

X = np.zeros((3, 2), dtype=np.float32)


def took_ns(model: Spin) -> int:
    start = time.monotonic_ns()
    assert model.predict(Batch({"x": X}))["rows"].tolist() == [1, 1, 1]
    return time.monotonic_ns() - start


def test_it_takes_its_time_and_spends_it_on_the_processor() -> None:
    model = Spin(us=20_000)
    before = time.process_time_ns()
    assert took_ns(model) >= 20_000_000
    assert time.process_time_ns() > before


def test_the_tail_has_its_share_and_its_calls() -> None:
    long = [[took_ns(model) >= 500_000 for _ in range(200)] for model in [Spin(0, 500, 0.25, seed=4) for _ in range(2)]]
    chance = random.Random(4)
    wanted = [chance.random() < 0.25 for _ in range(200)]
    for found in long:
        assert all(not want or got for got, want in zip(found, wanted, strict=True))  # a short one may be disturbed
    assert 25 <= sum(wanted) <= 75


def test_what_is_no_time_or_no_share_is_refused() -> None:
    for us, tail_us, tail_p in ((-1, 0, 0), (float("nan"), 0, 0), (1, float("inf"), 0), (1, 1, 1.5), (1, 1, -0.1)):
        with pytest.raises(ValueError, match="spin wants"):
            Spin(us, tail_us, tail_p)
    with pytest.raises(BadInput, match="spin"):
        Spin(0).check({"k": 1})
