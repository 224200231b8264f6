"""The unmodified tritonclient[http], in an environment of its own, makes every call that it has."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import bring
from tests.unit.serving import ALL, DATA, serving

CALLS = Path(__file__).with_name("triton_calls.py")
CALLS_S = 300.0


@pytest.fixture(scope="session")
def tritons_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tritonclient")
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--retries", "1", "tritonclient[http]==2.73.0"]
    bring("tritonclient", [sys.executable, "-m", "venv", folder], install)
    return python


def test_every_call_of_tritonclient(tritons_python: Path, tmp_path: Path) -> None:
    with serving(tmp_path, *ALL) as running:
        address = running.url.removeprefix("http://")
        done = subprocess.run(
            [str(tritons_python), str(CALLS), address, str(DATA)], capture_output=True, text=True, timeout=CALLS_S,
            cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr + running.log()
        assert "Traceback" not in running.log()
        assert "error" not in running.log()
