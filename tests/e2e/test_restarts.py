"""Runs that start their targets several times: what they say, how they are interrupted and go on, and are compared."""

import json
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
block_s = 0.3
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


@pytest.fixture(scope="module")
def resumed(
    tmp_path_factory: pytest.TempPathFactory, isolatency: Command
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run that was interrupted in its second start, and went on."""
    out = tmp_path_factory.mktemp("results")
    (out / "plan.toml").write_text(PLAN)
    argv = [ISOLATENCY, "sandbox", "--", ISOLATENCY, "run", out / "plan.toml", "--out", out]
    running = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    end = time.monotonic() + 300
    while not list(out.glob("2*/samples-_native-001*")) and running.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGINT)
    said, _ = running.communicate(timeout=120)
    assert running.returncode == 130, said
    done = isolatency("run", "--resume", out / "latest", sandboxed=True)
    return out, done


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
