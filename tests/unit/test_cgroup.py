"""Cores and memory by cgroup, and what is done where there is none."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostsetup import cgroup
from hostsetup import ledger as books
from hostsetup.cgroup import placed
from hostsetup.ledger import Ledger
from hostsetup.removers import cgroup_folders
from images.errors import TargetError
from loadtest._run import on_cores

needs_cgroups = pytest.mark.skipif(not cgroup.writable(), reason="cgroups cannot be written; run the tests as root")
EAT = "import sys; block = bytearray(b'x') * (int(sys.argv[1]) * 2**20); print(len(block))"
ONE = (max(os.sched_getaffinity(0)),)


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    monkeypatch.setattr(books, "folder", lambda: tmp_path)
    with Ledger.open("test", "cgroup") as opened:
        yield opened


def output(argv: list[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


@needs_cgroups
def test_what_is_started_in_it_has_its_cores_and_memory(ledger: Ledger) -> None:
    ask = "import os; print(sorted(os.sched_getaffinity(0)))"
    with placed(ledger, "t", ONE, 64) as place:
        assert place.folders and place.caveats == ()
        assert output(place.argv([sys.executable, "-c", ask])).stdout == f"{list(ONE)}\n"
        assert output(place.argv([sys.executable, "-c", EAT, "8"])).stdout == f"{8 * 2**20}\n"
        assert output(place.argv([sys.executable, "-c", EAT, "256"])).returncode == -signal.SIGKILL
    assert cgroup_folders(f"isolatency-{ledger.id}-t") == []


@needs_cgroups
def test_without_a_limit_only_the_cores_are_given(ledger: Ledger) -> None:
    with placed(ledger, "t", ONE, None) as place:
        assert output(place.argv([sys.executable, "-c", EAT, "256"])).returncode == 0
        assert not [folder for folder in place.folders if (folder / "memory.limit_in_bytes").exists()]


@needs_cgroups
def test_a_process_that_keeps_to_other_cores_starts_it_on_its_own(ledger: Ledger) -> None:
    """As a run does, which leaves the targets' cores to them."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("this machine has one core")
    ask = [sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"]
    stop = threading.Event()
    threading.Thread(target=stop.wait).start()
    try:
        with on_cores(cores[:1]), placed(ledger, "t", cores[1:], None) as place:
            assert {frozenset(os.sched_getaffinity(int(p.name))) for p in Path("/proc/self/task").iterdir()} == {
                frozenset(cores[:1])
            }
            assert output(ask).stdout == f"{cores[:1]}\n"
            assert output(place.argv(ask)).stdout == f"{cores[1:]}\n"
            assert output(["taskset", "-c", str(cores[1]), *ask]).stdout == f"{cores[1:2]}\n"
    finally:
        stop.set()
    assert sorted(os.sched_getaffinity(0)) == cores


@needs_cgroups
def test_what_another_program_changes_is_noticed(ledger: Ledger) -> None:
    with placed(ledger, "t", ONE, 64) as place:
        place.check("t")
        limit = next(file for file in place.wanted if "memory" in file.name)
        limit.write_text(str(32 * 2**20))
        with pytest.raises(TargetError, match=f"t wants {64 * 2**20} in {limit}, found {32 * 2**20}: another program"):
            place.check("t")
        limit.write_text(str(64 * 2**20))
        place.check("t")
    with pytest.raises(TargetError, match=r"found nothing \(No such file or directory\)"):
        place.check("t")


def test_cores_in_the_kernels_words() -> None:
    assert [cgroup.ranges(cores) for cores in ((0,), (0, 1), (3, 1, 2, 5), (0, 2, 4))] == ["0", "0-1", "1-3,5", "0,2,4"]


@needs_cgroups
def test_whoever_is_still_in_it_is_killed_with_it(ledger: Ledger) -> None:
    """Its own cgroups included, and a process that has left every group and session."""
    with placed(ledger, "t", ONE, 64) as place:
        process = subprocess.Popen(place.argv(["setsid", "sleep", "300"]))
        while not any("sleep" in Path(f"/proc/{pid}/cmdline").read_text() for pid in pids(place)):
            assert process.poll() is None
        (place.folders[0] / "below").mkdir()
    assert process.wait(timeout=10) == -signal.SIGKILL
    assert cgroup_folders(f"isolatency-{ledger.id}-t") == []


def pids(place: cgroup.Placed) -> list[int]:
    return [int(word) for word in (place.folders[0] / "cgroup.procs").read_text().split()]


VICTIM = """
import subprocess, sys, time
from pathlib import Path
from hostsetup import cgroup, ledger as books
books.folder = lambda: Path(sys.argv[1])
ledger = books.Ledger.open("test", "victim")
with cgroup.placed(ledger, "t", (int(sys.argv[2]),), 64) as place:
    process = subprocess.Popen(place.argv(["sh", "-c", "echo here; exec sleep 300"]), stdout=subprocess.PIPE)
    process.stdout.readline()
    print(ledger.id, process.pid, flush=True)
    time.sleep(300)
"""


@needs_cgroups
def test_clean_removes_that_of_a_killed_owner(tmp_path: Path, ledger: Ledger) -> None:
    argv = [sys.executable, "-c", VICTIM, str(tmp_path), str(ONE[0])]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        owner, pid = victim.stdout.readline().split()
        victim.kill()
    assert Path(f"/proc/{pid}").exists() and cgroup_folders(f"isolatency-{owner}-t")
    removed, _ = books.clean()
    assert removed == [f"cgroup isolatency-{owner}-t"]
    assert cgroup_folders(f"isolatency-{owner}-t") == []


def test_without_cgroups_it_is_affinity_and_said(tmp_path: Path) -> None:
    """In a user namespace nobody may write cgroups, not even its root."""
    script = f"""
import subprocess, sys
from pathlib import Path
from hostsetup import cgroup, ledger as books
books.folder = lambda: Path({str(tmp_path)!r})
with books.Ledger.open("test", "t") as ledger, cgroup.placed(ledger, "t", {ONE}, 64) as place:
    print(place.folders, *place.caveats, flush=True)
    subprocess.run(place.argv([sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"]), check=True)
"""
    done = output(["unshare", "--user", "--map-root-user", sys.executable, "-c", script])
    if done.returncode and "unshare" in done.stderr:
        pytest.skip(f"this machine allows no user namespaces: {done.stderr.strip()}")
    assert done.stdout.splitlines() == [
        "() t: without cgroups it has CPU affinity only, and its memory is unlimited",
        str(set(ONE)),
    ], done.stderr
