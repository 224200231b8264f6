"""The sandbox: its own network, its own processes, and an end to all of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hostsetup import ledger as books
from hostsetup.sandbox import VARIABLE
from images.errors import UsageError

ISOLATENCY = str(Path(sys.executable).parent / "isolatency")
pytestmark = pytest.mark.skipif(
    VARIABLE in os.environ, reason="a sandbox cannot be tested inside of one; run it outside"
)


def sandbox(*command: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    argv = [ISOLATENCY, "sandbox", "--", *command]
    return subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)


def test_it_has_loopback_and_nothing_else() -> None:
    done = sandbox("ip", "-brief", "link")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["lo"]


def test_the_exit_code_and_the_streams_are_the_commands() -> None:
    done = sandbox("sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")
    assert sandbox("sh", "-c", "kill -9 $$").returncode == 128 + signal.SIGKILL


def test_a_command_that_is_not_there_is_one_line() -> None:
    done = sandbox("no-such-command-anywhere")
    assert done.returncode == 1
    assert "no-such-command-anywhere" in done.stderr and "Traceback" not in done.stderr


def test_a_sandbox_in_a_sandbox_is_refused() -> None:
    done = sandbox(ISOLATENCY, "sandbox", "--", "true")
    assert done.returncode == UsageError.exit_code
    assert "this is a sandbox already" in done.stderr


def test_what_was_left_running_ends_with_it() -> None:
    done = sandbox("sh", "-c", "sleep 54321 >/dev/null 2>&1 & echo started")
    assert done.stdout == "started\n"
    assert subprocess.run(["pgrep", "-f", "sleep 54321"], capture_output=True).stdout == b""


def test_killing_it_ends_all_of_it_and_clean_removes_the_rest(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    argv = [
        ISOLATENCY,
        "sandbox",
        "--",
        "sh",
        "-c",
        f"sleep 65432 & docker version >/dev/null 2>&1; touch {ready}; sleep 65432",
    ]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    owner = next(owner for owner in books.owners() if owner.what == "sandbox" and owner.pid == process.pid)
    folders = [Path(entry["path"]) for entry in owner.entries.values() if entry["kind"] == "dir"]
    assert folders and all(folder.exists() for folder in folders)
    process.kill()
    process.wait()
    while subprocess.run(["pgrep", "-f", "sleep 65432"], capture_output=True).stdout:
        assert time.monotonic() < end
        time.sleep(0.05)
    subprocess.run([ISOLATENCY, "clean"], check=True, capture_output=True)
    assert not any(folder.exists() for folder in folders)
    assert not owner.path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="the engine needs root; run the tests as root")
def test_the_docker_engine_is_its_own_and_starts_when_first_needed() -> None:
    script = (
        "import docker; print(docker.from_env().info()['ServerVersion'], docker.from_env().containers.list(all=True))"
    )
    assert "dockerd" not in sandbox("ps", "axo", "comm").stdout
    done = sandbox(sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[]")


def test_sigterm_ends_it(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    process = subprocess.Popen([ISOLATENCY, "sandbox", "--", "sh", "-c", f"touch {ready}; exec sleep 76543"])
    end = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
