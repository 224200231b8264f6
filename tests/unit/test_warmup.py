"""What comes before targets have settled is in no figure, for all targets alike; what never settles is said."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loadtest._samples import SCHEMA
from loadtest._schema import Summary
from loadtest._summary import summarise
from tests.unit.run_folder import make, target, with_stages

TARGETS = [target("a"), target("b"), target("c")]
QUADS = 8  # and one more, of the plan's warm-up


def slowed(run: Path, factors: Mapping[int, float], only: str = "b", **settings: object) -> Summary:
    """A run in which `only`'s requests take so many times as long, by quad after the plan's warm-up."""
    make(run, TARGETS, rounds=QUADS + 1, per_block=520, start_sd=0.01, **{"restarts": 3, **settings})  # type: ignore[arg-type]
    samples = pd.read_parquet(run / "samples.parquet")
    factor = (samples["round"] // 2 - 1).map(factors).fillna(1.0).where(samples["target"] == only, 1.0)
    took = samples["received_ns"] - samples["sent_ns"]
    samples["received_ns"] = samples["sent_ns"] + (took.astype(float) * factor).round().astype("Int64")
    pq.write_table(pa.Table.from_pandas(samples, preserve_index=False).cast(SCHEMA), run / "samples.parquet")
    return summarise(run)


def test_nothing_more_is_left_out_of_what_is_steady(tmp_path: Path) -> None:
    found = slowed(tmp_path, {})
    assert [(one.model, one.load, one.quads, one.left_out) for one in found.warmups] == [("knn", "closed-1", QUADS, 0)]
    assert {cell.requests for cell in found.cells} == {3 * QUADS * 2 * 520}
    assert not any("change point" in text or "steady" in text for text in found.caveats)


@pytest.mark.parametrize("settings", [{}, {"restarts": 1}])
def test_what_comes_before_a_target_has_settled_is_left_out_for_all_in_whole_quads(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    steady, found = slowed(tmp_path / "steady", {}, **settings), slowed(tmp_path / "warm", {0: 1.5, 1: 1.5}, **settings)
    restarts = found.restarts
    assert [(one.quads, one.left_out) for one in found.warmups] == [(QUADS, 2)]
    assert {(cell.requests, cell.blocks) for cell in found.cells} == {
        (restarts * (QUADS - 2) * 2 * 520, restarts * (QUADS - 2) * 2)
    }
    assert {cell.warmup_requests for cell in found.cells} == {restarts * 3 * 2 * 520}
    for ours, theirs in zip(found.cells, steady.cells, strict=True):
        assert ours.p50_us == pytest.approx(theirs.p50_us, rel=0.01) and ours.seconds == restarts * (QUADS - 2) * 2
        assert ours.max_us is not None and theirs.max_us is not None and ours.max_us <= theirs.max_us
        if ours.ratio and theirs.ratio:
            assert ours.ratio.p50.estimate == pytest.approx(theirs.ratio.p50.estimate, rel=1e-3)
    assert "warm-up: in knn closed-1 2 of 8 more quads, up to a change point" in found.run_caveats


def test_the_baseline_may_be_the_one_that_warms_up_and_the_cut_does_not_depend_on_who_is_it(tmp_path: Path) -> None:
    found = slowed(tmp_path, {0: 0.8, 1: 0.8, 2: 0.8}, only="a")
    assert [one.left_out for one in found.warmups] == [3]
    other = summarise(tmp_path, "c")
    assert [cell.requests for cell in other.cells] == [cell.requests for cell in found.cells]


def test_a_late_change_is_no_warm_up_but_no_steady_state(tmp_path: Path) -> None:
    found = slowed(tmp_path, {6: 1.1, 7: 1.1})
    assert [one.left_out for one in found.warmups] == [0]
    told = (
        "b, knn, closed-1: no steady state: from quad 7 of 8 on its p50 over a's is another one by +10 %; measure for "
        "longer (seconds)"
    )
    assert [cell.caveats for cell in found.cells] == [[], [told], []]
    # Beyond the margin only.
    assert not any("steady" in text for text in summarise(tmp_path, margin="20%").caveats)


def test_failed_requests_are_never_left_out(tmp_path: Path) -> None:
    found = slowed(tmp_path, {0: 1.5, 1: 1.5}, failures={"c": 3})
    assert [one.left_out for one in found.warmups] == [0]
    assert {cell.requests for cell in found.cells} == {3 * QUADS * 2 * 520}


def test_a_target_alone_and_an_emulated_one(tmp_path: Path) -> None:
    """Alone it has no other to be compared with; an emulated one's times say nothing."""
    make(tmp_path, [target("b"), target("q", kind="qemu", accel="tcg")], rounds=QUADS + 1, per_block=520)
    samples = pd.read_parquet(tmp_path / "samples.parquet")
    slow = (samples["round"] < 6).to_numpy()
    samples.loc[slow, "received_ns"] += 10**6
    pq.write_table(pa.Table.from_pandas(samples, preserve_index=False).cast(SCHEMA), tmp_path / "samples.parquet")
    found = summarise(tmp_path)
    assert [one.left_out for one in found.warmups] == [2]
    assert [cell.requests for cell in found.cells] == [(QUADS - 2) * 2 * 520, QUADS * 2 * 520]


def test_stages_leave_the_same_out(tmp_path: Path) -> None:
    slowed(tmp_path, {0: 1.5, 1: 1.5})
    with_stages(tmp_path, {"knn": {"compute": 50.0}})
    found = summarise(tmp_path)
    cells = {cell.target: cell for cell in found.cells}
    assert [one.left_out for one in found.warmups] == [2] and found.stages
    for one in found.stages:
        if one.band == "p50":
            assert one.total_us.estimate == pytest.approx(cells[one.target].p50_us, rel=0.02)
            assert one.requests < 0.05 * cells[one.target].requests


def test_a_cell_that_did_not_come_to_its_end_of_warm_up_has_nothing_to_settle(tmp_path: Path) -> None:
    """The run was killed there."""
    make(tmp_path, TARGETS, rounds=5, models=("knn", "null"))
    blocks, samples = (
        pd.read_csv(tmp_path / "blocks.csv", keep_default_na=False),
        pd.read_parquet(tmp_path / "samples.parquet"),
    )
    kept = blocks[(blocks["model"] == "knn") | ((blocks["round"] == 0) & (blocks["target"] == "a"))]
    kept.to_csv(tmp_path / "blocks.csv", index=False)
    samples = samples[samples["block"].isin(kept["block"])]
    pq.write_table(pa.Table.from_pandas(samples, preserve_index=False).cast(SCHEMA), tmp_path / "samples.parquet")
    found = summarise(tmp_path)
    assert [(one.model, one.quads, one.left_out) for one in found.warmups] == [("knn", 4, 0), ("null", 0, 0)]
    assert [(cell.target, cell.requests > 0) for cell in found.cells] == [
        ("a", True), ("b", True), ("c", True), ("a", False),
    ]  # fmt: skip
