"""Runs that start their targets several times: what they say, how they are interrupted and go on, and are compared."""

import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.e2e.conftest import ISOLATENCY, Command

PLAN = """
schema = 1
restarts = 3
models = ["null"]
loads = ["closed-1"]
seconds = 2.4
warmup_s = 0.6
[[targets]]
kind = "process"
[[targets]]
name = "b"
kind = "process"
[[jobs]]
job = "knn"
repeats = 3
rows = 100
"""


def interrupted(plan: str, out: Path, moment: str) -> None:
    """Run the plan until a file of that name is in the run folder, then end it as Ctrl-C does."""
    (out / "plan.toml").write_text(plan)
    argv = [ISOLATENCY, "sandbox", "--", ISOLATENCY, "run", out / "plan.toml", "--out", out]
    running = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    end = time.monotonic() + 600
    while not list(out.glob(f"2*/{moment}")) and running.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGINT)
    said, _ = running.communicate(timeout=120)
    assert running.returncode == 130, said


@pytest.fixture(scope="module")
def resumed(
    tmp_path_factory: pytest.TempPathFactory, isolatency: Command
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run that was interrupted in its second start, and went on."""
    out = tmp_path_factory.mktemp("results")
    interrupted(PLAN, out, "samples-_native-001*")
    return out, isolatency("run", "--resume", out / "latest", sandboxed=True)


def test_a_run_goes_on_where_it_was_interrupted(resumed: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = resumed
    assert done.returncode == 0, done.stderr
    (folder,) = out.glob("2*")
    assert "start 1" not in done.stderr and "start 2" in done.stderr and "start 3" in done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["restarts"] == 3 and not summary["partial"] and summary["errors"] == []
    assert any(text.startswith("resumed: the first 1 starts") for text in summary["run_caveats"])
    samples = pd.read_parquet(folder / "samples.parquet", columns=["restart", "target"])
    counts = samples.groupby(["restart", "target"], observed=True).size()
    assert len(counts) == 6 and counts.min() > 100
    assert pd.read_csv(folder / "batch.csv").groupby("target")["repeat"].apply(sorted).to_dict() == {
        "b": [0, 1, 2], "process": [0, 1, 2],
    }  # fmt: skip
    assert not list(folder.glob("*-_*")) and not list(folder.glob("*.fresh"))


def test_blocks_are_measured_in_the_first_start_and_as_long_in_all(resumed: tuple[Path, Any]) -> None:
    folder = resumed[0] / "latest"
    told = json.loads((folder / "manifest.json").read_text())["block_s"]
    assert list(told) == ["null:closed-1"]
    blocks = pd.read_csv(folder / "blocks.csv", keep_default_na=False)
    measuring = blocks[blocks["round"] < 0]
    assert measuring["restart"].tolist() == [0] * 4 and set(measuring["warmup"]) == {True}
    lasted_s = (blocks["end_ns"] - blocks["start_ns"])[blocks["round"] >= 0] / 1e9
    assert (lasted_s >= told["null:closed-1"] - 1e-6).all() and lasted_s.median() == pytest.approx(
        told["null:closed-1"]
    )
    assert blocks.groupby(["restart", "target"])["round"].max().nunique() == 1
    assert f"blocks: {told['null:closed-1']:g} s (null closed-1)" in (folder / "report.md").read_text()


def test_starts_are_the_unit_and_are_described(resumed: tuple[Path, Any]) -> None:
    summary = json.loads((resumed[0] / "latest" / "summary.json").read_text())
    ratio = next(cell["ratio"] for cell in summary["cells"] if cell["target"] == "b")
    assert (ratio["p50"]["of"], ratio["p50"]["n"], len(ratio["p50"]["per_start"])) == ("starts", 3, 3)
    assert ratio["p50"]["verdict"] in ("slower", "faster", "no difference seen", "can't tell")
    assert [(row["target"], row["n"]) for row in summary["starts"]] == [("process", 3), ("b", 3)]
    assert all(row["ready_s"]["estimate"] > 0 for row in summary["starts"])
    assert "of these instances" not in (resumed[0] / "latest" / "report.md").read_text()


def test_a_whole_run_is_not_gone_on_with(resumed: tuple[Path, Any], isolatency: Command) -> None:
    again = isolatency("run", "--resume", resumed[0] / "latest")
    assert again.returncode == 2 and "went to its end" in again.stderr
    mixed = isolatency("run", "--resume", resumed[0] / "latest", "--restarts", "4")
    assert mixed.returncode == 2 and "--resume goes on with the plan" in mixed.stderr


def test_a_run_is_compared_with_itself_and_gated(resumed: tuple[Path, Any], isolatency: Command) -> None:
    latest = resumed[0] / "latest"
    same = isolatency("compare", latest, latest, "--fail-if", "b:null:closed-1:p50>+900%")
    assert same.returncode == 0 and "kept: b:null:closed-1:p50>+900%" in same.stderr
    assert isolatency("report", latest, "--fail-if", "b:null:closed-1:p50>-99%").returncode == 3
    assert isolatency("compare", latest, latest, "--baseline", "nobody").returncode == 2


UNTIL = """
schema = 1
restarts = 2
until_ci = {}
only = "load"
models = ["null"]
loads = ["closed-1"]
seconds = 0.6
warmup_s = 0.2
block_s = 0.2
[[targets]]
kind = "process"
[[targets]]
name = "b"
kind = "process"
"""


def starts(run: Path) -> list[int]:
    """The starts whose blocks came to their end."""
    return sorted(pd.concat(pd.read_csv(path) for path in run.glob("blocks*.csv"))["restart"].unique())


def test_until_ci_takes_ten_starts_at_least_also_where_it_was_interrupted(isolatency: Command, tmp_path: Path) -> None:
    """An interval of 90 % is narrow enough at the first look, which is after ten starts and not after two."""
    interrupted(UNTIL.format(0.9), tmp_path, "samples-_native-003*")
    assert starts(tmp_path / "latest")[:3] == [0, 1, 2]
    done = isolatency("run", "--resume", tmp_path / "latest", sandboxed=True)
    assert done.returncode == 0, done.stderr
    assert "start 3" not in done.stderr and "start 4" in done.stderr
    assert starts(tmp_path / "latest") == list(range(10))
    summary = json.loads((tmp_path / "latest" / "summary.json").read_text())
    [ratio] = [cell["ratio"]["p50"] for cell in summary["cells"] if cell["ratio"]]
    assert not summary["partial"] and summary["restarts"] == ratio["n"] == 10
    assert math.sqrt(ratio["high"] / ratio["low"]) - 1 <= 0.9


def test_until_ci_adds_starts_as_long_as_the_interval_is_wider(tmp_path: Path) -> None:
    """No interval is as narrow as that; where this would end (after 50 starts) takes too long for a test."""
    interrupted(UNTIL.format(0.000_001), tmp_path, "samples-_native-011*")
    assert starts(tmp_path / "latest")[:11] == list(range(11))
