"""What is left of an interrupted run when it goes on, and what is measured anew."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

from images.errors import UsageError
from loadtest import _plan, _resume, _run
from loadtest._samples import SCHEMA, ParquetWriter, write
from loadtest._summary import summarise
from tests.unit.run_folder import make, target


def interrupted(run: Path, *, emulated: int = 0, restarts: int = 3) -> Path:
    """A run of five starts that ended within its third; or, with emulated targets, within the last of these."""
    starts: list[dict[str, Any]] = [{"restart": n, "ready_s": 0.5} for n in range(restarts)]
    targets = [target(name, starts=starts) for name in ("a", "b")]
    targets += [target(f"q{n}", kind="qemu", accel="tcg", starts=starts[:1]) for n in range(emulated)]
    jobs = [(name, "knn", repeat, 1.0, 1.0, 0.9) for repeat in range(restarts) for name in ("a", "b")]
    make(run, targets, restarts=restarts, rounds=3, per_block=60, jobs=jobs, partial=True, errors=["interrupted"])
    plan = _plan.read(run / "plan.toml")
    given = tuple({"name": one["name"], "kind": one["kind"]} for one in targets)
    _plan.save(replace(plan, restarts=5, targets=given, jobs=(_plan.Job("knn", 5, 569),)), run / "plan.toml")
    # Emulated targets are asked in one start only.
    for name, read, to in (
        ("samples.parquet", pd.read_parquet, "to_parquet"),
        ("blocks.csv", pd.read_csv, "to_csv"),
    ):
        frame = read(run / name)
        frame = frame[(frame["restart"] == 0) | ~frame["target"].astype(str).str.startswith("q")]
        getattr(frame, to)(run / name, index=False)
    whole = pa.Table.from_pandas(pd.read_parquet(run / "samples.parquet"), preserve_index=False)
    pq.write_table(whole.cast(SCHEMA), run / "samples.parquet")
    return run


def test_whole_starts_are_kept_and_the_interrupted_one_is_not(tmp_path: Path) -> None:
    interrupted(tmp_path)
    facts = json.loads((tmp_path / "manifest.json").read_text()) | {"block_s": {"knn:closed-1": 0.25}}
    (tmp_path / "manifest.json").write_text(json.dumps(facts))
    before = _resume.take_back(tmp_path)
    assert before.lengths == {"knn:closed-1": 0.25}
    assert (before.starts, before.emulated, before.plan.restarts) == (2, frozenset(), 5)
    samples = pd.read_parquet(tmp_path / "samples-_before.parquet")
    assert sorted(samples["restart"].unique()) == [0, 1] and not (tmp_path / "samples.parquet").exists()
    assert sorted(pd.read_csv(tmp_path / "blocks-_before.csv")["restart"].unique()) == [0, 1]
    assert sorted(pd.read_csv(tmp_path / "batch.csv")["repeat"].unique()) == [0, 1]
    assert [len(one["starts"]) for one in json.loads((tmp_path / "targets.json").read_text())] == [2, 2]
    cells = summarise(tmp_path).cells
    assert len(cells) == 2 and summarise(tmp_path).restarts == 2
    todo = [
        phase
        for phase in _run.phases(before.plan, False)
        if not before.has(phase.specs[0].name, phase.emulated, phase.restart)
    ]
    assert [phase.restart for phase in todo] == [2, 3, 4]


def test_an_interruption_in_an_emulated_target_keeps_all_starts(tmp_path: Path) -> None:
    before = _resume.take_back(interrupted(tmp_path, emulated=2, restarts=5))
    assert (before.starts, before.emulated) == (5, frozenset({"q0"}))
    samples = pd.read_parquet(tmp_path / "samples-_before.parquet")
    assert set(samples["target"].astype(str)) == {"a", "b", "q0"}
    todo = [
        phase
        for phase in _run.phases(before.plan, False)
        if not before.has(phase.specs[0].name, phase.emulated, phase.restart)
    ]
    assert [phase.name for phase in todo] == ["q1"]


def test_a_run_that_goes_on_may_be_interrupted_again(tmp_path: Path) -> None:
    """A run that goes on may be interrupted again; one that did not come to its next start loses the last one."""
    _resume.take_back(interrupted(tmp_path))
    first = pd.read_parquet(tmp_path / "samples-_before.parquet")
    before = _resume.take_back(tmp_path)
    assert before.starts == 1
    again = pd.read_parquet(tmp_path / "samples-_before.parquet")
    assert sorted(again["restart"].unique()) == [0] and len(again) < len(first)


def test_the_parts_of_a_killed_writer_go_with_its_start(tmp_path: Path) -> None:
    interrupted(tmp_path)
    rows = pq.read_table(tmp_path / "samples.parquet").cast(SCHEMA)
    starts = rows["restart"].to_numpy()
    write(tmp_path / "samples-_native-000.parquet", [rows.filter(pa.array(starts < 2))], "")
    writer = ParquetWriter(tmp_path / "samples-_native-002.parquet")
    writer.add(rows.filter(pa.array(starts == 2)))
    writer.close(partial=True)
    (tmp_path / "samples.parquet").unlink()
    _resume.take_back(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("samples*")) == ["samples-_before.parquet"]
    kept = pd.read_parquet(tmp_path / "samples-_before.parquet")
    assert len(kept) == (starts < 2).sum() and sorted(kept["restart"].unique()) == [0, 1]


def test_a_run_that_went_to_its_end_is_refused(tmp_path: Path) -> None:
    make(tmp_path, [target("a")], rounds=2)
    with pytest.raises(UsageError, match="went to its end"):
        _resume.take_back(tmp_path)
    with pytest.raises(UsageError, match="is no run folder"):
        _resume.take_back(tmp_path / "nowhere")


def test_samples_of_another_version_are_refused_and_left_alone(tmp_path: Path) -> None:
    interrupted(tmp_path)
    samples = pd.read_parquet(tmp_path / "samples.parquet").drop(columns="worker")
    samples.to_parquet(tmp_path / "samples.parquet")
    with pytest.raises(UsageError, match="of another version"):
        _resume.take_back(tmp_path)
    assert len(pd.read_parquet(tmp_path / "samples.parquet")) == len(samples)


def test_a_run_that_is_done_anew_measures_anew_how_long_its_blocks_are(tmp_path: Path) -> None:
    interrupted(tmp_path, restarts=1)
    facts = json.loads((tmp_path / "manifest.json").read_text()) | {"block_s": {"knn:closed-1": 0.25}}
    (tmp_path / "manifest.json").write_text(json.dumps(facts))
    before = _resume.take_back(tmp_path)
    assert (before.starts, before.lengths) == (0, {})
