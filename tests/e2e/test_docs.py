"""Every command in the documents is run: here, or by the test named in ELSEWHERE."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import ISOLATENCY, ROOT

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/measurement.md", "docs/models.md")
ELSEWHERE = {
    "make bench": "tests/e2e/test_run.py::test_every_kind_that_can_run_is_measured",
    "make test": "tests/e2e/test_docs.py::test_the_commands_of_a_block_work",
    "isolatency images save": "tests/e2e/test_images.py",
    "isolatency images load": "tests/e2e/test_images.py",
    "docs/examples/iris": "tests/e2e/test_run_models.py::test_the_example_with_scikit_learn",
}


def blocks() -> list[tuple[str, list[str]]]:
    found = []
    for name in DOCUMENTS:
        if (ROOT / name).exists():
            for block in re.findall(r"```sh\n(.*?)```", (ROOT / name).read_text(), re.DOTALL):
                lines = [re.sub(r"\s+# .*", "", line).strip() for line in block.splitlines()]
                found.append((name, [line for line in lines if line and not line.startswith("#")]))
    return found


def elsewhere(line: str) -> str | None:
    return next((test for command, test in ELSEWHERE.items() if command in line), None)


def test_there_are_commands_and_those_run_elsewhere_are_tested_there() -> None:
    assert len(blocks()) >= 4
    for test in ELSEWHERE.values():
        file, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / file).read_text()


@pytest.mark.parametrize(("document", "lines"), [block for block in blocks() if not all(map(elsewhere, block[1]))])
def test_the_commands_of_a_block_work(document: str, lines: list[str], tmp_path: Path) -> None:
    """In a folder like the checkout, where results/ is the test's own; in a sandbox unless the block makes its own."""
    for path in ROOT.iterdir():
        if path.name not in ("results", ".git"):
            (tmp_path / path.name).symlink_to(path)
    script = ["set -ex"]
    for line in lines:
        if elsewhere(line):
            continue
        background = " -m server " in line
        script.append(f"{line} &" if background else line)
        if background:
            script.append(
                "for n in $(seq 300); do curl -sf http://127.0.0.1:8080/v2/health/ready && break; sleep 0.1; done"
            )
        elif line.startswith("curl"):
            script.append(f"{line} | grep -v error")
    argv = ["sh", "-c", "\n".join(script)]
    if not any(" sandbox -- " in line for line in lines):
        argv = [ISOLATENCY, "sandbox", "--", *argv]
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=900, cwd=tmp_path, stdin=subprocess.DEVNULL, env=dict(os.environ)
    )
    assert done.returncode == 0, f"{document}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
