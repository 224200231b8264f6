"""Cores and memory by cgroup version 2, which most machines have: in an emulated guest, whichever this machine has."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hostsetup import qemu
from hostsetup.sandbox import VARIABLE
from images import store
from images.errors import MissingError
from images.ext4 import make_ext4, tree_mib
from tests.e2e.conftest import ISOLATENCY

BOUND_S = 300  # it takes about 25 s under emulation
INIT = """#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sys /sys
$B mount -t devtmpfs dev /dev
$B mount -t tmpfs tmpfs /tmp
$B mount -t tmpfs tmpfs /run
$B mount -t cgroup2 cgroup2 /sys/fs/cgroup
export PATH=/usr/bin:/bin PYTHONPATH=/mnt PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
/usr/bin/python3.11 /mnt/inside.py
$B reboot -f
"""
INSIDE = """
import subprocess, sys, time
from hostsetup import cgroup, ledger as books
from hostsetup.removers import cgroup_folders
from images.errors import TargetError

def ask(place, code, *arguments):
    return subprocess.run(place.argv([sys.executable, "-c", code, *arguments]), capture_output=True, text=True)

EAT = "import sys; print(len(bytearray(b'x') * (int(sys.argv[1]) * 2**20)))"
print("SAID version", cgroup.version(), cgroup.writable())
with books.Ledger.open("test", "v2") as ledger:
    with cgroup.placed(ledger, "t", (1,), 64) as place:
        print("SAID folders", len(place.folders), (place.folders[0] / "memory.max").read_text().strip())
        print("SAID cores", ask(place, "import os; print(os.sched_getaffinity(0))").stdout.strip())
        print("SAID fits", ask(place, EAT, "8").returncode, "not", ask(place, EAT, "256").returncode)
        process = subprocess.Popen(place.argv(["/bin/busybox", "sleep", "300"]))
        time.sleep(1)
        (place.folders[0] / "below").mkdir()
        cgroup.shell.write(cgroup.CGROUPS / "cgroup.subtree_control", "-cpuset")  # as systemd may at any time
        try:
            place.check("t")
        except TargetError as error:
            print("SAID", error)
    print("SAID killed", process.wait(), "left", cgroup_folders(place.folders[0].name))
dead = books.Ledger.open("test", "dead")
context = cgroup.placed(dead, "t", (0,), None)
place = context.__enter__()
process = subprocess.Popen(place.argv(["/bin/busybox", "sleep", "300"]))
time.sleep(1)
dead.abandon()
removed, left = books.clean()
print("SAID clean", len(removed), len(left), process.wait(), any(folder.exists() for folder in place.folders), flush=True)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="runs in a sandbox as root; run the tests as root")
@pytest.mark.skipif(VARIABLE in os.environ, reason="starts a sandbox of its own; run it outside of one")
def test_version_2_gives_cores_and_memory_and_takes_all_back(tmp_path: Path) -> None:
    try:
        images = store.current()
    except MissingError as error:
        pytest.skip(str(error))
    if shutil.which(qemu.BINARY) is None:
        pytest.skip(f"needs {qemu.BINARY}; isolatency setup brings it")
    files = tmp_path / "files"
    root = Path(__file__).parents[2]
    found = importlib.util.find_spec("psutil")
    assert found is not None and found.origin is not None
    if not list(Path(found.origin).parent.glob("*abi3*")):
        pytest.skip("the psutil of this Python cannot be loaded by the one in the guest")
    for folder in (root / "hostsetup", root / "images", Path(found.origin).parent):
        shutil.copytree(folder, files / folder.name, ignore=shutil.ignore_patterns("__pycache__", "tests"))
    (files / "inside.py").write_text(INSIDE)
    (files / "init").write_text(INIT)
    (files / "init").chmod(0o755)
    disk, console = tmp_path / "disk.ext4", tmp_path / "console"
    make_ext4(files, disk, tree_mib(files) + 8)
    words = ["console=ttyS0", "quiet", "reboot=t", "panic=-1", *qemu.tcg_words("tcg"), "isolatency.init=/mnt/init"]
    argv = qemu.command("tcg", 2, 1024, console, images.vmlinux, images.initrd, words) + qemu.disks(images.ext4, disk)
    subprocess.run([ISOLATENCY, "sandbox", "--", *map(str, argv)], check=True, timeout=BOUND_S)
    text = console.read_text(errors="replace")
    text = re.sub("isolatency-[0-9a-f]{8}-t", "isolatency-ID-t", text)
    said = [line.partition("SAID ")[2] for line in text.splitlines() if "SAID " in line]
    assert said == [
        "version 2 True",
        f"folders 1 {64 * 2**20}",
        "cores {1}",
        "fits 0 not -9",
        "t wants 1 in /sys/fs/cgroup/isolatency-ID-t/cpuset.cpus.effective, found nothing (No such file or directory): "
        "another program has changed the cgroups of this machine; end it, or let it leave cpuset and memory on, and "
        "start again",
        "killed -9 left []",
        "clean 1 0 -9 False",
    ], text
