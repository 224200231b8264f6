"""The table of truth, computed from folders of known effect: what it must show, it can miss."""

from pathlib import Path

import pytest

from tests.bench import truth
from tests.unit.run_folder import make, target


def measured(out: Path, name: str, starts: int, factor: float = 1.0, *, bias: float = 1.0, sd: float = 0.01) -> None:
    """Run folders as `measure` leaves them, in two pieces; `bias` is what the second place of a pair costs."""
    for piece in range(2):
        make(out / name / f"2026112{piece}", [target("a"), target("b")], factors={"b": factor * bias}, restarts=starts // 2,
             start_sd=sd, rounds=3, per_block=520, seed=piece + 10 * len(name))  # fmt: skip


def rows(out: Path) -> dict[str, truth.Row]:
    return {row.experiment: row for row in truth.table(out)}


def test_a_measurement_that_is_true_holds_in_every_row(tmp_path: Path) -> None:
    measured(tmp_path, "aa-quiet", 60)
    measured(tmp_path, "aa-noisy", 60)
    measured(tmp_path, "p50-plus-2", 20, 1.02)
    measured(tmp_path, "p99-plus-5", 20, 1.05)
    measured(tmp_path, "spin-200-210", 10, 1.05, sd=0.005)
    found = rows(tmp_path)
    assert {name: row.holds for name, row in found.items()} == dict.fromkeys(found, True)
    called = found["A/A, p50: 120 pairs"].found
    share = float(called.partition("%")[0])
    assert 2 < share < 9 and "of 12 disjoint ones" in called


def test_a_bias_by_order_and_an_effect_that_is_missed_fail(tmp_path: Path) -> None:
    measured(tmp_path, "aa-quiet", 60, bias=1.01)
    measured(tmp_path, "p50-plus-2", 20, 1.02, sd=0.05)
    measured(tmp_path, "spin-200-210", 10, 1.0, sd=0.005)
    found = rows(tmp_path)
    assert found["A/A, quiet, p50: bias by order"].holds is False
    assert found["+2 % at p50 (spin), 10 starts × 12 s"].holds is not None
    assert found["spin 200 against 210 µs, 10 starts"].holds is False
    assert "**FAILS**" in truth.markdown(list(found.values()))


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    found = rows(tmp_path)
    assert {row.holds for row in found.values()} == {None}
    with pytest.raises(SystemExit, match="measure aa-quiet first"):
        truth._sizes(tmp_path)
    measured(tmp_path, "aa-quiet", 4)
    assert truth._sizes(tmp_path)["p50_plus"].startswith("54.")  # 2 % of 200
