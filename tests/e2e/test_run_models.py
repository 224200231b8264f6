"""`isolatency run` on models whose times are known, and on a model of the user's own."""

import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from images.pins import pins
from tests.e2e.conftest import ISOLATENCY, ROOT, Command


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


OWN = """
import numpy as np

class Sum:
    name = "sum"
    inputs = (("q", "FP64", (-1, 3)),)
    outputs = (("total", "FP64", (-1,)),)

    def predict(self, batch):
        return {"total": batch.inputs["q"].sum(axis=1)}
"""


def test_a_model_of_ones_own_goes_into_every_tree(isolatency: Command, able: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    rows = np.random.default_rng(1).random((300, 3))
    np.savez(tmp_path / "rows.npz", rows=rows, labels=rows.sum(axis=1))
    kinds = [kind for kind in ("process", "docker", "uml") if able[kind] == "yes"]

    def run(data: str) -> Any:
        return isolatency(
            "run", "--quick", "--only", "load", "--seconds", "1", "--out", tmp_path, "--model", f"{tmp_path}/mine.py:Sum",
            "--model", "null", "--data", tmp_path / data, *(word for kind in kinds for word in ("--target", kind)),
            sandboxed=True,
        )  # fmt: skip

    done = run("rows.npz")
    assert done.returncode == 0, done.stderr
    folder = only_folder(tmp_path)
    told = json.loads((folder / "manifest.json").read_text())
    targets = json.loads((folder / "targets.json").read_text())
    assert {one["identity"]["tree_sha256"] for one in targets} == {told["images"]["tree_sha256"]}
    assert all(one["first_prediction_ms"] > 0 for one in targets)
    assert told["model"]["base_tree_sha256"] != told["images"]["tree_sha256"]
    samples = pd.read_parquet(folder / "samples.parquet")
    assert set(samples.target) == set(kinds) and set(samples.model) == {"sum", "null"}
    assert set(samples.outcome) == {"ok"}
    np.savez(tmp_path / "wrong.npz", rows=rows, labels=rows.sum(axis=1) + 1)
    wrong = run("wrong.npz")
    assert wrong.returncode == 1 and "making a tree" not in wrong.stderr  # it is kept, by its content
    errors = json.loads((only_folder(tmp_path) / "manifest.json").read_text())["errors"]
    assert all(f"{kind}/sum" in errors[0] for kind in kinds) and "/null" not in errors[0]


def test_a_model_that_cannot_be_run_is_refused_before_anything_starts(isolatency: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    np.savez(tmp_path / "rows.npz", rows=np.ones((3, 3)))
    for words, said in (
        (["--model", f"{tmp_path}/nowhere.py:Sum", "--data", tmp_path / "rows.npz"], "nowhere.py could not be read"),
        (["--model", f"{tmp_path}/mine.py:Sun", "--data", tmp_path / "rows.npz"], "has no class 'Sun'"),
        (["--model", f"{tmp_path}/mine.py:Sum"], "--data ROWS.npz"),
        (["--model", f"{tmp_path}/mine.py:Sum", "--data", tmp_path / "none.npz"], "none.npz is missing"),
        (["--data", tmp_path / "rows.npz"], "wanted --model FILE.py:CLASS"),
    ):
        done = isolatency("run", "--quick", "--target", "process", "--out", tmp_path / "r", *words)
        assert done.returncode == 2 and said in done.stderr, done.stderr
        assert not (tmp_path / "r").exists()


def test_the_example_with_scikit_learn(isolatency: Command, tmp_path: Path) -> None:
    made = isolatency("images", "build", "--model", ROOT / "docs/examples/iris.py:Iris", timeout_s=1500)
    assert made.returncode == 0, made.stderr  # here, since a sandbox reaches no package index
    done = isolatency(
        "run", "--quick", "--only", "load", "--seconds", "1", "--out", tmp_path, "--target", "process",
        "--model", ROOT / "docs/examples/iris.py:Iris", "--data", ROOT / "docs/examples/iris.npz", sandboxed=True,
        timeout_s=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = only_folder(tmp_path)
    told = json.loads((folder / "manifest.json").read_text())["model"]
    assert told["requirements"] == ["scikit-learn==1.9.1"]
    assert any(name.startswith("scikit_learn-1.9.1-cp311") for name in told["wheels"])
    numpy = next(wheel.file for wheel in pins().wheels if wheel.file.startswith("numpy-"))
    assert numpy in told["wheels"]  # at the version that the server has
    assert set(pd.read_parquet(folder / "samples.parquet").outcome) == {"ok"}


def test_a_target_with_a_model_of_ones_own_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    script = f"url=$({ISOLATENCY} up process --model {tmp_path}/mine.py:Sum) && curl -sf $url/v2/models/sum && {ISOLATENCY} down"
    done = subprocess.run(
        [ISOLATENCY, "sandbox", "--", "sh", "-c", script],
        capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"total"' in done.stdout and "stopped process" in done.stdout
