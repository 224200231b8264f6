"""In which order blocks go round the targets, so that drift hits all of them alike. Pure functions."""

import math
from collections.abc import Sequence

import numpy as np


def rounds(targets: Sequence[str], blocks: int, seed: Sequence[int]) -> list[tuple[str, ...]]:
    """`blocks` rounds, each naming every target once; an even number of rounds where there are several targets.

    Rounds come in pairs: an order, then its mirror, so that over a pair every target sits on average at the same
    time and a linear drift cancels. The orders of n pairs are a Williams design: every target takes every place, and
    follows every other equally often, so that what one leaves behind in caches hits all alike (E. J. Williams, 1949).
    Two targets give ABBA BAAB; more start from an order drawn by `seed`.
    """
    if len(targets) == 1:
        return [tuple(targets)] * blocks
    base = list(targets)
    if len(base) > 2:
        base = [base[i] for i in np.random.default_rng(list(seed)).permutation(len(base))]
    n = len(base)
    steps = [(place + 1) // 2 if place % 2 else (n - place // 2) % n for place in range(n)]  # 0, 1, n-1, 2, n-2, …
    found: list[tuple[str, ...]] = []
    for pair in range(math.ceil(blocks / 2)):
        order = tuple(base[(step + pair) % n] for step in steps)
        found += [order, order[::-1]]
    return found


def blocks_per_target(seconds: float, block_s: float) -> int:
    """How many blocks of `block_s` make at least `seconds`, at least one."""
    return max(1, math.ceil(seconds / block_s - 1e-9))


def warmup_blocks(warmup_s: float, block_s: float, blocks: int) -> int:
    """How many of a target's first blocks in a cell are warm-up: whole blocks, and never all of them."""
    return min(math.ceil(warmup_s / block_s - 1e-9), blocks - 1)
