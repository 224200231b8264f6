"""The ledger: what is written down before it is made is removed, by its owner or by clean after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostsetup import ledger as books
from hostsetup.ledger import Ledger
from images.errors import IsolatencyError


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A ledger folder of the test's own, so that no other run's is touched."""
    monkeypatch.setattr(books, "folder", lambda: tmp_path)
    yield


def sleeper(mark: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "300"], env={"PATH": os.environ["PATH"], **mark})


def test_a_resource_stands_in_the_file_before_it_is_made(tmp_path: Path) -> None:
    with Ledger.open("test", "t") as ledger:
        number = ledger.add("dir", path=str(tmp_path / f"x-{ledger.id}"))
        lines = [json.loads(line) for line in (tmp_path / f"{ledger.id}.jsonl").read_text().splitlines()]
        assert lines[0]["owner"]["what"] == "test"
        assert lines[1] == {"add": number, "kind": "dir", "path": str(tmp_path / f"x-{ledger.id}")}
        ledger.remove(number)
        assert json.loads((tmp_path / f"{ledger.id}.jsonl").read_text().splitlines()[2]) == {"drop": number}
    assert list(tmp_path.glob("*.jsonl")) == []


def test_leaving_removes_what_is_still_there(tmp_path: Path) -> None:
    with Ledger.open("test", "t") as ledger:
        made = tmp_path / f"x-{ledger.id}"
        ledger.add("dir", path=str(made))
        (made / "deep").mkdir(parents=True)
        _, mark = ledger.mark("sleeper")
        process = sleeper(mark)
    assert not made.exists()
    assert process.wait(timeout=10) == -signal.SIGKILL


def test_only_marked_processes_are_killed() -> None:
    other = subprocess.Popen(["sleep", "300"], env={"PATH": os.environ["PATH"], books.MARK: "ffffffff.1"})
    try:
        with Ledger.open("test", "t") as ledger:
            number, mark = ledger.mark("sleeper")
            process = sleeper(mark)
            ledger.remove(number)
            assert process.wait(timeout=10) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_clean_leaves_the_living_alone_and_names_them(tmp_path: Path) -> None:
    with Ledger.open("test", "alive") as ledger:
        made = tmp_path / f"x-{ledger.id}"
        ledger.add("dir", path=str(made))
        made.mkdir()
        removed, left = books.clean()
        assert removed == [] and len(left) == 1 and "alive" in left[0]
        assert made.exists()


OWNER = """
import sys, time, subprocess, os
from pathlib import Path
from hostsetup import ledger as books
place = Path(sys.argv[1])
books.folder = lambda: place
ledger = books.Ledger.open("run", "victim")
made = place / f"x-{ledger.id}"
ledger.add("dir", path=str(made))
made.mkdir()
_, mark = ledger.mark("sleeper")
child = subprocess.Popen(["sleep", "300"], env={"PATH": os.environ["PATH"], **mark})
print(child.pid, made, flush=True)
time.sleep(300)
"""


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int, Path]]:
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid, made = process.stdout.readline().split()
    yield process, int(pid), Path(made)
    process.kill()
    process.wait()


def test_after_a_kill_clean_removes_everything_and_twice_is_fine(
    victim: tuple[subprocess.Popen[str], int, Path],
) -> None:
    process, child, made = victim
    process.kill()
    process.wait()
    assert made.exists() and Path(f"/proc/{child}").exists()
    removed, left = books.clean()
    assert left == [] and len(removed) == 2
    assert not made.exists() and books.processes(f"{made.name.removeprefix('x-')}.2") == []
    assert books.clean() == ([], [])


def test_clean_all_ends_the_living(victim: tuple[subprocess.Popen[str], int, Path]) -> None:
    process, _, made = victim
    removed, left = books.clean(everything=True)
    assert process.wait(timeout=30) is not None
    assert left == [] and any("victim" in line for line in removed)
    assert not made.exists()


def test_a_torn_last_line_is_a_resource_that_was_not_made(victim: tuple[subprocess.Popen[str], int, Path]) -> None:
    process, _, made = victim
    process.kill()
    process.wait()
    file = next(made.parent.glob("*.jsonl"))
    with file.open("a") as torn:
        torn.write('{"add": 3, "kind": "dir", "pa')
    removed, _ = books.clean()
    assert len(removed) == 2 and not made.exists()


def test_a_folder_without_the_owners_id_is_refused(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    ledger = Ledger.open("test", "t")
    ledger.add("dir", path=str(precious))
    with pytest.raises(IsolatencyError, match="does not carry its owner's id"):
        ledger.remove_all()
    assert precious.exists()


def test_two_runs_at_once_are_refused() -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from hostsetup.ledger import run_lock\nimport time\nwith run_lock():\n print('held', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != "held\n":
            pytest.skip("a run of isolatency is under way on this machine and holds the lock")
        with pytest.raises(IsolatencyError, match="another run is under way"), books.run_lock():
            pytest.fail("a second run got the lock")
    finally:
        holder.kill()
        holder.wait()
    end = time.monotonic() + 10
    while True:
        try:
            with books.run_lock():
                break
        except IsolatencyError:
            assert time.monotonic() < end
            time.sleep(0.05)
