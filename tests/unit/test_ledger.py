"""The ledger: what is written down before it is made is removed, by its owner or by clean after a kill."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostsetup import ledger as books
from hostsetup.ledger import Ledger
from hostsetup.locks import run_lock
from hostsetup.namespaces import SANDBOX
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


def test_a_folder_is_let_go_when_it_is_removed(tmp_path: Path) -> None:
    """A run may start its targets hundreds of times."""
    with Ledger.open("test", "t") as ledger:
        before = len(list(Path("/proc/self/fd").iterdir()))
        for number in range(3):
            entry = ledger.folder(tmp_path / f"{number}-{ledger.id}")
            assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
            ledger.remove(entry)
        assert len(list(Path("/proc/self/fd").iterdir())) == before


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
    books.clean()


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


def test_a_write_that_fails_leaves_no_half_line(tmp_path: Path) -> None:
    """The disk is full (here: the file may not grow) in the middle of a line; the next line is read all the same."""
    script = """
import resource, signal, sys
from pathlib import Path
from hostsetup import ledger as books
books.folder = lambda: Path(sys.argv[1])
ledger = books.Ledger.open("test", "full")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = ledger.path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
try:
    ledger.add("dir", path=f"/nowhere/{ledger.id}-a")
except OSError as error:
    print("refused", error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
ledger.add("dir", path=f"/nowhere/{ledger.id}-b")
ledger.abandon()
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("refused"), done.stderr
    (owner,) = books.owners()
    assert [entry["path"] for entry in owner.entries.values()] == [f"/nowhere/{owner.id}-b"]


def test_a_new_owner_is_never_taken_for_a_dead_one(tmp_path: Path) -> None:
    """A clean that comes between the making of a file and its lock must not lose the file."""
    cleaner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from hostsetup import ledger as books\n"
            "books.folder = lambda: Path(sys.argv[1])\n"
            "print('on', flush=True)\nwhile True: books.clean()",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert cleaner.stdout is not None and cleaner.stdout.readline() == b"on\n"
        for _ in range(300):
            with Ledger.open("test", "new") as ledger:
                assert ledger.path.exists()
        assert cleaner.poll() is None
    finally:
        cleaner.kill()
        cleaner.wait()


def test_two_cleans_at_once_share_the_work(tmp_path: Path, victim: tuple[subprocess.Popen[str], int, Path]) -> None:
    process, _, made = victim
    process.kill()
    process.wait()
    script = (
        "import sys; from pathlib import Path; from hostsetup import ledger as books\n"
        "books.folder = lambda: Path(sys.argv[1])\nremoved, left = books.clean()\nprint(len(removed), len(left))"
    )
    argv = [sys.executable, "-c", script, str(tmp_path)]
    cleans = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = sorted(clean.communicate(timeout=60)[0].strip() for clean in cleans)
    assert said == ["0 0", "0 0", "2 0"]
    assert not made.exists()


def test_what_cannot_be_removed_is_named_and_kept_and_the_rest_removed(tmp_path: Path) -> None:
    ledger = Ledger.open("test", "t")
    made = tmp_path / f"x-{ledger.id}"
    ledger.add("dir", path=str(made))
    made.mkdir()
    ledger.add("dir", path=str(tmp_path / "precious"))
    (tmp_path / "precious").mkdir()
    with ledger.path.open("a") as file:
        file.write('{"add": 99, "kind": "portal", "name": "of a later version"}\n')
    ledger.abandon()
    for _ in range(2):
        with pytest.raises(IsolatencyError, match="2 could not be removed") as caught:
            books.clean()
        assert "precious" in caught.value.detail and "portal of a later version" in caught.value.detail
    assert not made.exists() and (tmp_path / "precious").exists()


def test_a_mark_is_found_whatever_forks_meanwhile(tmp_path: Path) -> None:
    """A process that makes another one at every moment must not get away."""
    with Ledger.open("test", "t") as ledger:
        number, mark = ledger.mark("hydra")
        script = "sh -c 'for i in $(seq 900); do (exec sleep 0.01) & wait $!; (exec sleep 20) & done' & wait"
        process = subprocess.Popen(["sh", "-c", script], env={"PATH": os.environ["PATH"], **mark})
        time.sleep(0.5)
        ledger.remove(number)
        time.sleep(0.2)
        assert books.processes(mark[books.MARK]) == []
        process.wait(timeout=10)


def test_processes_in_another_pid_namespace_are_found() -> None:
    if os.geteuid() != 0:
        pytest.skip("a PID namespace is made as root here; run the tests as root")
    with Ledger.open("test", "t") as ledger:
        number, mark = ledger.mark("inside")
        argv = ["unshare", "--pid", "--fork", "--mount-proc", "sleep", "300"]
        process = subprocess.Popen(argv, env={"PATH": os.environ["PATH"], **mark})
        end = time.monotonic() + 20
        while len(books.processes(mark[books.MARK])) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
        ledger.remove(number)
        assert process.wait(timeout=10) is not None
        assert books.processes(mark[books.MARK]) == []


def test_ending_an_owner_spares_who_merely_reads_its_file(victim: tuple[subprocess.Popen[str], int, Path]) -> None:
    process, _, _ = victim
    (owner,) = books.owners()
    reader = subprocess.Popen(["sleep", "300"], stdin=owner.path.open())
    try:
        books.end_owner(owner)
        assert process.wait(timeout=10) is not None
        assert reader.poll() is None
    finally:
        reader.kill()
        reader.wait()


def test_inside_a_sandbox_what_lives_outside_is_left_alone(
    victim: tuple[subprocess.Popen[str], int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From inside its processes cannot be seen, so they would be taken for gone."""
    process, child, made = victim
    process.kill()
    process.wait()
    with monkeypatch.context() as inside:
        inside.setenv(SANDBOX, "0123abcd")
        removed, left = books.clean(everything=True)
        assert removed == [] and "not of this sandbox" in left[0]
    assert made.exists() and Path(f"/proc/{child}").exists()
    assert len(books.clean()[0]) == 2


def test_our_folders_that_nobody_holds_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger is in memory and does not outlive the machine's start; what lies in the cache does.

    Nor is there a word in this ledger of what another user's owners hold in a cache that both share. No clock says
    which is which: it may be set at any time.
    """
    cache = tmp_path / "cache"
    monkeypatch.setenv("ISOLATENCY_CACHE", str(cache))
    for name in ("sandbox-0123abcd/docker", "isolatency-0123abcd-uml-root", "sandbox-notes", "builds"):
        (cache / name).mkdir(parents=True)
    other = tmp_path / "other"
    other.mkdir()
    with Ledger(other / "89abcdef.jsonl", "sandbox", "another user's") as held, Ledger.open("test", "ours") as ours:
        live = [cache / f"sandbox-{ledger.id}" for ledger in (held, ours)]
        for ledger, path in zip((held, ours), live, strict=True):
            ledger.folder(path)
        removed, _ = books.clean()
        assert len(removed) == 2
        assert {path.name for path in cache.iterdir()} == {"builds", "sandbox-notes", *(path.name for path in live)}
    assert {path.name for path in cache.iterdir()} == {"builds", "sandbox-notes"}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts; run the tests as root")
def test_a_folder_is_unmounted_before_it_is_removed(tmp_path: Path) -> None:
    """What is mounted below it must not be deleted with it."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    script = """
import subprocess, sys
from pathlib import Path
from hostsetup import ledger as books
place = Path(sys.argv[1])
books.folder = lambda: place
with books.Ledger.open("test", "t") as ledger:
    made = place / f"x y-{ledger.id}"
    ledger.add("dir", path=str(made))
    (made / "mnt").mkdir(parents=True)
    subprocess.run(["mount", "--bind", place / "precious", made / "mnt"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", made / "mnt"], check=True)
print(made.exists(), (place / "precious/file").read_text())
"""
    argv = ["unshare", "--mount", sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False kept\n", done.stderr


def test_the_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("gives a folder to another user; run the tests as root")
    monkeypatch.undo()
    monkeypatch.setattr(books, "host_root", lambda: False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "isolatency").mkdir()
    os.chown(tmp_path / "isolatency", 12345, 12345)
    with pytest.raises(IsolatencyError, match="belongs to another user"):
        books.folder()


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
            "from hostsetup.locks import run_lock\nimport time\nwith run_lock():\n print('held', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != "held\n":
            pytest.skip("a run of isolatency is under way on this machine and holds the lock")
        with pytest.raises(IsolatencyError, match="another run is under way"), run_lock():
            pytest.fail("a second run got the lock")
    finally:
        holder.kill()
        holder.wait()
    end = time.monotonic() + 10
    while True:
        try:
            with run_lock():
                break
        except IsolatencyError:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_a_container_stays_written_down_while_its_engine_does_not_answer(tmp_path: Path) -> None:
    """Its engine may be started again, and with it the container; a sandbox's engine is not, once its folder is gone."""
    for number, host in enumerate((tmp_path / "docker.sock", tmp_path / "sandbox-0123abcd/docker.sock")):
        ledger = Ledger(tmp_path / f"{number:08}.jsonl", "test", "t")  # the one that stays is looked at first
        ledger.add("container", name=f"isolatency-{ledger.id}-t", docker_host=f"unix://{host}")
        ledger.abandon()
    with pytest.raises(
        IsolatencyError, match=f"1 could not be removed.* no Docker engine answers at unix://{tmp_path}"
    ):
        books.clean()
    (left,) = books.owners()
    (entry,) = left.entries.values()
    assert entry["docker_host"] == f"unix://{tmp_path}/docker.sock"


def test_a_sandbox_is_cleaned_before_what_ran_in_it(tmp_path: Path) -> None:
    sandbox = Ledger(tmp_path / "ffffffff.jsonl", "sandbox", "s")
    folder = tmp_path / f"sandbox-{sandbox.id}"
    sandbox.add("dir", path=str(folder))
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "docker.sock"))  # and nobody listens any longer
    run = Ledger(tmp_path / "00000000.jsonl", "run", "r")
    run.add("container", name="isolatency-00000000-t", docker_host=f"unix://{folder}/docker.sock")
    for ledger in (sandbox, run):
        ledger.abandon()
    books.clean()
    assert books.owners() == []


def test_a_folder_in_common_goes_with_the_last_who_needs_it(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    first, second = Ledger.open("test", "1"), Ledger.open("test", "2")
    for ledger in (first, second):
        ledger.add("mountpoint", path=str(place))
    first.__exit__(None, None, None)
    assert place.exists()
    second.__exit__(None, None, None)
    assert not place.exists()


def test_a_folder_in_common_that_others_use_by_now_is_theirs(tmp_path: Path) -> None:
    with Ledger.open("test", "t") as ledger:
        ledger.add("mountpoint", path=str(tmp_path / "place"))
        (tmp_path / "place/theirs").mkdir(parents=True)
    assert (tmp_path / "place/theirs").exists()
