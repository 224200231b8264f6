"""End to end: the command as a user types it, inside a sandbox of its own, on whatever kinds this machine can run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ISOLATENCY = str(Path(sys.executable).parent / "isolatency")
Command = Callable[..., subprocess.CompletedProcess[str]]
INSTALL_S = 300.0


def bring(name: str, *commands: Sequence[str | Path]) -> None:
    """Install another program to test with; where that cannot be, the test is skipped and says so."""
    for argv in commands:
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=INSTALL_S)
        except subprocess.TimeoutExpired:
            pytest.skip(f"{name} was not there within {INSTALL_S:g} s; a package index makes it run")
        if done.returncode:
            pytest.skip(f"{name} cannot be installed; a package index makes it run: {done.stderr.strip()[-300:]}")


@pytest.fixture(scope="session")
def isolatency() -> Command:
    """Run `isolatency ARGS…` and return what it said; `sandboxed` puts it into a sandbox of its own."""

    def call(*words: str | Path, sandboxed: bool = False, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
        argv = [ISOLATENCY, *map(str, words)]
        if sandboxed:
            argv = [ISOLATENCY, "sandbox", "--", *argv]
        return subprocess.run(
            argv, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, env=dict(os.environ)
        )

    return call


@pytest.fixture(scope="session")
def able(isolatency: Command) -> dict[str, str]:
    """Kind → "yes" or why not, as the doctor says; a kind that has not been tried yet counts as able."""
    found = json.loads(isolatency("doctor", "--json").stdout)
    return {kind: "yes" if verdict["ok"] is not False else verdict["why"] for kind, verdict in found["kinds"].items()}
