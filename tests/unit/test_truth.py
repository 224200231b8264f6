"""The table of truth, computed from folders of known effect: what it must show, it can miss."""

from pathlib import Path

import numpy as np
import pandas as pd
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
    found = {name: row for name, row in rows(tmp_path).items() if not name.startswith("stalls")}
    assert {name: row.holds for name, row in found.items()} == dict.fromkeys(found, True)
    called = found["A/A, p50: 120 of 120 pairs"].found
    share = float(called.partition("%")[0])
    assert 2 < share < 9 and "of 12 disjoint ones" in called


def test_a_bias_by_order_and_an_effect_that_is_missed_fail(tmp_path: Path) -> None:
    measured(tmp_path, "aa-quiet", 60, bias=1.01)
    measured(tmp_path, "p50-plus-2", 20, 1.02, sd=0.05)
    measured(tmp_path, "spin-200-210", 10, 1.0, sd=0.005)
    found = rows(tmp_path)
    assert found["A/A, quiet, p50: 60 of 60 pairs, bias by order"].holds is False
    assert found["+2 % at p50 (spin), 10 starts × 12 s"].holds is False
    assert found["spin 200 against 210 µs, 10 starts"].holds is False
    assert "**FAILS**" in truth.markdown(list(found.values()))


def test_too_few_runs_neither_hold_nor_fail(tmp_path: Path) -> None:
    measured(tmp_path, "aa-quiet", 20)
    measured(tmp_path, "p50-plus-2", 10, 1.02)
    found = rows(tmp_path)
    assert found["A/A, quiet, p50: 20 of 60 pairs"].text().endswith("open: too few runs to fail, or to hold |")
    assert "1 of 1 disjoint" in found["+2 % at p50 (spin), 10 starts × 12 s"].found
    assert "open" in found["+2 % at p50 (spin), 10 starts × 12 s"].text()


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    found = rows(tmp_path)
    assert {row.holds for row in found.values()} == {None}
    with pytest.raises(SystemExit, match="measure aa-quiet first"):
        truth._sizes(tmp_path)
    measured(tmp_path, "aa-quiet", 4)
    assert truth._sizes(tmp_path)["p50_plus"].startswith("54.")  # 2 % of 200


def test_a_client_that_does_not_see_what_a_stall_delays_fails(tmp_path: Path) -> None:
    """At 350/s with 0.4 ms of service, theory says 112.6 ms at p99. Latency from the sending instead is far from it."""
    (tmp_path / "stall-1").mkdir()
    intended = np.arange(10_500) * 1e9 / 350
    since_stall = intended % 0.9e9
    wait = np.maximum(0, 0.12e9 - since_stall * (1 - 350 * 0.0004))
    samples = pd.DataFrame({"intended_ns": intended.astype("int64"), "warmup": False, "outcome": "ok"})
    for p99, held in ((112.0, True), (9.0, False)):
        samples["received_ns"] = (intended + 0.4e6 + (wait if held else wait / 13)).astype("int64")
        samples.to_parquet(tmp_path / "stall-1" / "s.parquet")
        (tmp_path / "stall-1" / "st_stats.csv").write_text(f"Type,Name,99%\n,Aggregated,{p99}\n")
        row = next(row for name, row in rows(tmp_path).items() if name.endswith("1 connection"))
        assert row.holds is held, row.found
