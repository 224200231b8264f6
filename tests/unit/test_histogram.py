"""Log-linear counts: how far a bucket's middle is from what it stands for, and that sums do not depend on the order."""

import math
from collections import Counter

import numpy as np
import pytest

from loadtest._histogram import LONGEST_NS, counts, middles_ns, quantile


def test_a_middle_is_within_a_twentieth_of_a_percent() -> None:
    drawn = np.random.default_rng(1)
    values = np.concatenate(
        [np.exp(drawn.uniform(0, 36, 200_000)).astype(np.int64), 2 ** np.arange(53), 2 ** np.arange(53) - 1]
    )
    middles = middles_ns(values)
    assert (np.abs(middles - values) <= 0.0005 * values).all()
    small = np.arange(2048)
    assert (middles_ns(small) == small).all()


def test_middles_keep_the_order_and_are_middles_of_themselves() -> None:
    values = np.sort(np.random.default_rng(2).integers(0, 10**10, 100_000))
    middles = middles_ns(values)
    assert (np.diff(middles) >= 0).all()
    assert (middles_ns(middles.astype(np.int64)) == middles).all()


def test_ends() -> None:
    assert middles_ns(np.array([-5, 0, LONGEST_NS, 2**62])).tolist() == [0, 0, LONGEST_NS, LONGEST_NS]


def test_counts_added_up_in_any_order_are_the_counts_of_all() -> None:
    values = np.random.default_rng(3).lognormal(12, 1, 30_000).astype(np.int64)
    whole = dict(counts(middles_ns(values)))
    merged: Counter[float] = Counter()
    for part in np.array_split(np.random.default_rng(4).permutation(values), 7):
        merged.update(dict(counts(middles_ns(part))))
    assert merged == whole  # the same floats, bit for bit


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99, 0.999, 1.0])
def test_quantiles_are_those_of_the_values(q: float) -> None:
    values = np.random.default_rng(5).lognormal(12, 1, 10_007).astype(np.int64)
    true = np.quantile(values, q, method="inverted_cdf")
    assert quantile(dict(counts(middles_ns(values))), q) == pytest.approx(true, rel=0.0005)


def test_quantiles_of_little() -> None:
    assert math.isnan(quantile({}, 0.5))
    assert quantile({3.0: 1}, 0.01) == quantile({3.0: 1}, 1.0) == 3.0
    assert [quantile({1.0: 5, 2.0: 5}, q) for q in (0.5, 0.51)] == [1.0, 2.0]
