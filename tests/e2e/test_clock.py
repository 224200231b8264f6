"""The wall clock is set while a load runs: really, in a guest of its own, since this machine's clock is everyone's.

User-mode Linux has the host's files as its root (hostfs, read-only), so the guest runs this very checkout.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from images import store
from tests.e2e.conftest import ROOT

BOUND_S = 900  # for what takes one minute
INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin PYTHONDONTWRITEBYTECODE=1 HOME=/run PYTHONPATH={root}
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs -o mode=1777 tmpfs /run
mkdir -p /dev/shm; mount -t tmpfs tmpfs /dev/shm
ip link set lo up
cd {root}
TMPDIR=/run {python} -m tests.e2e.clock_steps /run 2>&1
{python} -c 'import ctypes; ctypes.CDLL(None).reboot(0x4321FEDC)' # power off
"""


@pytest.fixture(scope="module")
def found(able: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests.e2e.clock_steps printed in the guest."""
    if able["uml"] != "yes":
        pytest.skip(f"no guest whose clock may be set: {able['uml']}")
    folder = tmp_path_factory.mktemp("clock")
    init = folder / "init"
    init.write_text(INIT.format(root=ROOT, python=sys.executable))
    init.chmod(0o755)
    argv = [
        "unshare", *(["--map-root-user", "--user"] if os.getuid() else []), "--pid", "--fork", "--kill-child=KILL",
        "--mount-proc", "--", store.current().uml, "mem=1024M", "root=/dev/root", "rootfstype=hostfs", "ro",
        f"init={init}", "con=null", "con0=null,fd:1", "console=tty0", "quiet", "panic=1", f"uml_dir={folder}",
        "umid=guest",
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, argv)), capture_output=True, text=True, timeout=BOUND_S, stdin=subprocess.DEVNULL,
        env=dict(os.environ) | {"TMPDIR": str(folder)},
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stdout + done.stderr
    told: dict[str, Any] = json.loads(lines[-1])
    assert told["code"] == 0, told["said"]
    return told


def test_every_request_is_there_and_answered(found: dict[str, Any]) -> None:
    assert set(found["outcomes"]) == {"ok"} and found["outcomes"]["ok"] > 1000
    assert all(abs(gap - 10_000_000) <= 1 for gap in found["gaps_ns"])


def test_stamps_go_on_after_each_step_and_are_right(found: dict[str, Any]) -> None:
    assert found["in_order"]
    for requests, stamped in found["stamped"]:  # before, an hour ahead, an hour behind, while the clock is slewed
        assert requests > 100 and stamped > 0.9 * requests


def test_each_step_is_said_and_slewing_is_none(found: dict[str, Any]) -> None:
    assert "clock: the wall clock was set 2 times" in found["said"], found["said"]
