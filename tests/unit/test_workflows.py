"""The workflows' own scripts, run as they stand."""

import json
import re
import subprocess
import textwrap
from pathlib import Path

import pytest

WORKFLOWS = Path(__file__).parents[2] / ".github" / "workflows"


@pytest.mark.parametrize(
    ("accel", "code"),
    [
        ({"process": None, "firecracker": "kvm", "qemu": "kvm"}, 0),
        ({"process": None, "firecracker": "nested", "qemu": "kvm"}, 1),
        ({"process": None, "firecracker": "kvm", "qemu": "tcg"}, 1),
        ({"process": None, "firecracker": "kvm"}, 1),
        ({}, 1),
    ],
)
def test_emulated_figures_fail_the_benchmark(accel: dict[str, str | None], code: int, tmp_path: Path) -> None:
    steps = re.split(r"^      - ", (WORKFLOWS / "bench.yml").read_text(), flags=re.MULTILINE)
    [step] = [step for step in steps if step.startswith("name: Only figures at native speed count")]
    script = textwrap.dedent(step.partition("run: |\n")[2])
    (tmp_path / "results" / "latest").mkdir(parents=True)
    targets = [{"name": name, "accel": found} for name, found in accel.items()]
    (tmp_path / "results" / "latest" / "summary.json").write_text(json.dumps({"targets": targets}))
    done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert ("wanted firecracker and qemu with KVM" in done.stderr) == bool(code)
