"""Every host resource is written down, and flushed to disk, before it is made; clean removes by it, and only by it.

One file per owner (a run, a kept target, a sandbox) in the ledger's folder. The owner holds an flock on its file for
as long as it lives, so liveness needs no process id and works across PID namespaces. Lines are JSON:
{"owner": {...}} first, then {"add": n, "kind": ..., ...}, {"drop": n}, {"note": {...}}. A torn last line is a
resource that was not yet made.
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import docker
import requests

from images import shell
from images.errors import IsolatencyError, ShellError

What = Literal["run", "kept", "sandbox", "test"]
MARK = "ISOLATENCY_MARK"
GONE_S = 5.0
EXEC_S = 0.05  # a process that is just being executed has no environment to be read for a moment
CGROUPS = Path("/sys/fs/cgroup")
RUN_LOCK = Path("/run/lock/isolatency.lock")


def folder() -> Path:
    """The ledger's folder, made where it is not there: one for root, one per user."""
    if os.geteuid() == 0:
        path = Path("/run/isolatency")
    elif runtime := os.environ.get("XDG_RUNTIME_DIR"):
        path = Path(runtime) / "isolatency"
    else:
        path = Path(tempfile.gettempdir()) / f"isolatency-{os.geteuid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


@dataclass(frozen=True)
class Owner:
    """One ledger file as read: who made what is in `entries` (n → kind and fields), and whether it still lives."""

    id: str
    what: str
    name: str
    pid: int
    netns: int
    alive: bool
    path: Path
    notes: dict[str, Any] = field(default_factory=dict)
    entries: dict[int, dict[str, Any]] = field(default_factory=dict)


class Ledger:
    """The open ledger of one owner; a context manager that removes on exit whatever is still written down."""

    def __init__(self, path: Path, what: What, name: str) -> None:
        self.id = path.stem
        self._file = path.open("x", encoding="utf-8")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._entries: dict[int, dict[str, Any]] = {}
        self._next = 0
        self._path = path
        self._write({"owner": {"what": what, "name": name, "pid": os.getpid(), "netns": netns()}})

    @classmethod
    def open(cls, what: What, name: str) -> Self:
        return cls(folder() / f"{secrets.token_hex(4)}.jsonl", what, name)

    def add(self, kind: str, **fields: Any) -> int:
        """Write a resource down, flushed to disk. Call it before the resource is made."""
        if kind not in _REMOVERS:
            raise ValueError(f"no remover for {kind}")
        self._next += 1
        entry = {"kind": kind, **fields}
        self._write({"add": self._next, **entry})
        self._entries[self._next] = entry
        return self._next

    def mark(self, name: str) -> tuple[int, dict[str, str]]:
        """Write a process down by the mark that it will carry, and return the environment that marks it."""
        number = self.add("process", name=name, mark=f"{self.id}.{self._next + 1}")
        return number, {MARK: self._entries[number]["mark"]}

    def remove(self, number: int) -> None:
        """Remove a resource (one that is gone already is fine) and strike it out."""
        entry = self._entries.get(number)
        if entry is not None:
            _remove(entry, self.id)
            self._write({"drop": number})
            self._entries.pop(number, None)

    def remove_all(self) -> list[str]:
        """Remove everything still written down, newest first; returns a sentence for each."""
        said = []
        for number in sorted(self._entries, reverse=True):
            said.append(_words(self._entries[number]))
            self.remove(number)
        return said

    def note(self, **fields: Any) -> None:
        self._write({"note": fields})

    def _write(self, line: dict[str, Any]) -> None:
        if shell.dry_run():
            return
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.remove_all()
            self._path.unlink(missing_ok=True)
        finally:
            self._file.close()


def owners() -> list[Owner]:
    """Every owner that has a ledger file. An owner is alive while the flock on its file is held."""
    found = []
    for path in sorted(folder().glob("*.jsonl")):
        with contextlib.suppress(FileNotFoundError):
            found.append(_read(path))
    return found


def _read(path: Path) -> Owner:
    with path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            alive = False
        except BlockingIOError:
            alive = True
        owner: dict[str, Any] = {"what": "run", "name": "?", "pid": 0, "netns": 0}
        notes: dict[str, Any] = {}
        entries: dict[int, dict[str, Any]] = {}
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue  # torn: written while the owner was killed, so what it names was not yet made
            if "owner" in line:
                owner |= line["owner"]
            elif "add" in line:
                entries[line.pop("add")] = line
            elif "drop" in line:
                entries.pop(line["drop"], None)
            elif "note" in line:
                notes |= line["note"]
    return Owner(path.stem, alive=alive, path=path, notes=notes, entries=entries, **owner)


def clean(everything: bool = False) -> tuple[list[str], list[str]]:
    """Remove what dead owners left; with `everything`, end live ones first. Returns what was removed, and what not."""
    removed: list[str] = []
    left: list[str] = []
    for owner in owners():
        if owner.alive and everything:
            end_owner(owner)
            removed.append(f"{owner.what} {owner.name} ({owner.id})")
            with contextlib.suppress(FileNotFoundError):
                owner = _read(owner.path)
        if owner.alive:
            left.append(f"{owner.what} {owner.name} ({owner.id}), which is alive")
            continue
        if owner.path.exists():
            removed += _remove_dead(owner)
    return removed, left


def _remove_dead(owner: Owner) -> list[str]:
    said = []
    with contextlib.suppress(FileNotFoundError), owner.path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return []  # another clean is at it
        for number in sorted(owner.entries, reverse=True):
            entry = owner.entries[number]
            if shell.dry_run():
                shell.say(f"remove {_words(entry)}")
                continue
            if _remove(entry, owner.id):
                said.append(_words(entry))
            file.write(json.dumps({"drop": number}) + "\n")
            file.flush()
        if not shell.dry_run():
            owner.path.unlink(missing_ok=True)
    return said


def end_owner(owner: Owner) -> None:
    """Ask a live owner to end, then make it: its file's lock tells when it is gone."""
    for number, patience_s in ((signal.SIGTERM, 20.0), (signal.SIGKILL, GONE_S)):
        for pid in _holders(owner.path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            if not owner.path.exists() or not _read(owner.path).alive:
                return
            time.sleep(0.05)
    raise IsolatencyError(f"the {owner.what} {owner.name} ({owner.id}) did not end; end its process by hand")


def _holders(path: Path) -> list[int]:
    """Processes that have the ledger file open, by /proc: right in any PID namespace."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.path.samestat(link.stat(), path.stat()) and int(link.parts[2]) != os.getpid():
                found.append(int(link.parts[2]))
    return sorted(set(found))


@contextlib.contextmanager
def run_lock() -> Iterator[None]:
    """One run at a time on a machine: two would disturb each other. Raises IsolatencyError when one is under way."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open(RUN_LOCK, os.O_CREAT | os.O_EXCL | os.O_RDONLY, 0o666))
        RUN_LOCK.chmod(0o666)
    with RUN_LOCK.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise IsolatencyError(
                "another run is under way on this machine and would disturb this one; "
                "wait for it, or end it: `isolatency clean --all`"
            ) from None
        yield


def netns() -> int:
    """The inode of this process's network namespace."""
    return Path("/proc/self/ns/net").stat().st_ino


def in_netns(inode: int) -> list[str] | None:
    """The words that put a command into the namespace `inode`: none if it is ours, None if nobody lives in it."""
    if inode == netns():
        return []
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        with contextlib.suppress(OSError):
            if link.stat().st_ino == inode:
                return ["nsenter", f"--net={link}"]
    return None


def processes(mark: str) -> list[int]:
    """Processes that carry the mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parts[2]))
    return found


def _words(entry: dict[str, Any]) -> str:
    kind = entry["kind"]
    what = entry.get("name") or entry.get("path") or " ".join(entry.get("delete", []))
    return f"{kind} {what}"


def _remove(entry: dict[str, Any], owner: str) -> bool:
    """Remove one resource; False where it was gone already."""
    return _REMOVERS[entry["kind"]](entry, owner)


def _kill(pids: list[int], still: Any) -> None:
    """SIGKILL each process that is `still` ours once its pidfd is held, so that a reused pid is never hit."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(pid)
            try:
                if pid in still():
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                os.close(handle)


def _until_gone(look: Any, what: str) -> None:
    end = time.monotonic() + GONE_S
    while look():
        if time.monotonic() > end:
            raise IsolatencyError(
                f"{what} is still there {GONE_S:g} s after it was killed; run `isolatency clean` again"
            )
        time.sleep(0.01)


def _remove_process(entry: dict[str, Any], owner: str) -> bool:
    def look() -> list[int]:
        return processes(entry["mark"])

    found = look()
    if not found:
        time.sleep(EXEC_S)
        found = look()
    if not found:
        return False
    _kill(found, look)
    _until_gone(look, f"the process {entry['name']}")
    return True


def _cgroup_folders(name: str) -> list[Path]:
    """The folder of that name in each hierarchy (one for cgroup v2)."""
    return [path for path in (CGROUPS / name, *CGROUPS.glob(f"*/{name}")) if path.is_dir() and not path.is_symlink()]


def _cgroup_pids(name: str) -> list[int]:
    pids: set[int] = set()
    for top in _cgroup_folders(name):
        for path in top.rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                pids |= {int(word) for word in path.read_text().split()}
    return sorted(pids - {0})


def _remove_cgroup(entry: dict[str, Any], owner: str) -> bool:
    name = entry["name"]
    folders = _cgroup_folders(name)
    if not folders:
        return False
    _kill(_cgroup_pids(name), lambda: _cgroup_pids(name))
    _until_gone(lambda: _cgroup_pids(name), f"a process in the cgroup {name}")
    for top in folders:
        below = sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True)
        for path in (*below, top):
            _until_gone(lambda path=path: not _rmdir(path), f"the cgroup {path}")
    return True


def _rmdir(path: Path) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False  # busy for some milliseconds after its last process
    return True


def _mounts_below(path: Path) -> list[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    points = [line.split()[1].replace("\\040", " ") for line in lines]
    return sorted((p for p in points if p == str(path) or p.startswith(f"{path}/")), reverse=True)


def _remove_dir(entry: dict[str, Any], owner: str) -> bool:
    path = Path(entry["path"])
    if owner not in path.name:
        raise IsolatencyError(
            f"the folder {path} in the ledger does not carry its owner's id {owner}; remove it by hand"
        )
    if not path.exists():
        return False
    for point in _mounts_below(path):
        shell.run(["umount", "--lazy", point])
    shutil.rmtree(path)
    return True


def _remove_mount(entry: dict[str, Any], owner: str) -> bool:
    if not _mounts_below(Path(entry["path"])):
        return False
    shell.run(["umount", "--lazy", entry["path"]])
    return True


def _remove_container(entry: dict[str, Any], owner: str) -> bool:
    try:
        with contextlib.closing(docker.DockerClient(base_url=entry["docker_host"], timeout=10)) as engine:
            found = engine.containers.list(all=True, filters={"label": f"isolatency={owner}", "name": entry["name"]})
            for container in found:
                container.remove(force=True, v=True)
            return bool(found)
    except (docker.errors.DockerException, requests.RequestException):
        return False  # the engine is gone, and its containers with it


def _remove_tap(entry: dict[str, Any], owner: str) -> bool:
    inside = in_netns(entry["netns"])
    if inside is None:
        return False
    if shell.run([*inside, "ip", "link", "show", "dev", entry["name"]], changes=False, check=False).returncode:
        return False
    shell.run([*inside, "ip", "link", "del", "dev", entry["name"]])
    return True


def _remove_rule(entry: dict[str, Any], owner: str) -> bool:
    inside = in_netns(entry["netns"])
    if inside is None:
        return False
    return shell.run([*inside, *entry["delete"]], check=False).returncode == 0


def _remove_sysctl(entry: dict[str, Any], owner: str) -> bool:
    """Restore the old value, unless another owner in the same namespace still needs the new one."""
    inside = in_netns(entry["netns"])
    if inside is None:
        return False
    for other in owners():
        if other.id != owner and any(
            (found["kind"], found.get("name"), found.get("netns")) == ("sysctl", entry["name"], entry["netns"])
            for found in other.entries.values()
        ):
            return False
    shell.run([*inside, "sysctl", "-q", "-w", f"{entry['name']}={entry['value']}"])
    return True


def _remove_netns(entry: dict[str, Any], owner: str) -> bool:
    if not (Path("/run/netns") / entry["name"]).exists():
        return False
    try:
        shell.run(["ip", "netns", "del", entry["name"]])
    except ShellError:
        return False
    return True


_REMOVERS = {
    "process": _remove_process,
    "cgroup": _remove_cgroup,
    "dir": _remove_dir,
    "mount": _remove_mount,
    "container": _remove_container,
    "tap": _remove_tap,
    "rule": _remove_rule,
    "sysctl": _remove_sysctl,
    "netns": _remove_netns,
}
