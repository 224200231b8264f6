"""`isolatency run` on models whose times are known, and on a model of the user's own."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pandas as pd

from tests.e2e.conftest import Command


def only_folder(out: Path) -> Path:
    return (out / "latest").resolve()


def test_spin_takes_its_times_and_work_does_as_many_iterations_everywhere(
    isolatency: Command, able: dict[str, str], tmp_path: Path
) -> None:
    other = "docker" if able["docker"] == "yes" else "process"
    done = isolatency(
        "run", "--quick", "--only", "load", "--seconds", "1", "--out", tmp_path, "--model", "spin", "--model", "work",
        "--spin-us", "1000", "--spin-tail-us", "1500", "--spin-tail-p", "0.2", "--work-us", "300",
        "--target", "a=process", "--target", f"b={other}:spin_us=3000,spin_tail_p=0",
        sandboxed=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = only_folder(tmp_path)
    plan = tomllib.loads((folder / "plan.toml").read_text())
    assert plan["models"] == ["spin", "work"] and plan["work_iterations"] > 0
    targets: dict[str, Any] = {one["name"]: one for one in json.loads((folder / "targets.json").read_text())}
    assert targets["b"]["options"] == {"spin_us": 3000.0, "spin_tail_p": 0.0}
    assert any("spin_us=3000.0" in caveat for caveat in targets["b"]["caveats"])
    assert not any(one["parity"]["differences"] for one in targets.values())
    samples = pd.read_parquet(folder / "samples.parquet")
    spin = samples[(samples.model == "spin") & (samples.load == "closed-1")]
    took_us = {name: (group.received_ns - group.sent_ns) / 1000 for name, group in spin.groupby("target")}
    assert took_us["a"].min() >= 1000 and took_us["b"].min() >= 3000
    assert (took_us["a"] >= 1500).mean() > 0.05  # a fifth, and those that something else made longer
    again = isolatency("run", folder / "plan.toml", "--dry-run", sandboxed=True)
    assert f"--work-iterations={plan['work_iterations']}" in again.stdout, again.stderr
