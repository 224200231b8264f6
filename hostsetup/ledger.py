"""Every host resource is written down, and flushed to disk, before it is made; clean removes by it, and only by it.

One file per owner (a run, a kept target, a sandbox) in the ledger's folder. The owner holds an flock on its file for
as long as it lives, so liveness needs no process id and works across PID namespaces. Lines are JSON:
{"owner": {...}} first, then {"add": n, "kind": ..., ...}, {"drop": n}, {"note": {...}}. A torn line is a resource
that was not yet made.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from hostsetup import locks
from hostsetup.namespaces import SANDBOX, host_root, netns, outer_uid
from hostsetup.removers import CGROUPS, MARK, REMOVERS, SHARED, Entry, processes, words
from images import shell
from images.errors import IsolatencyError
from images.store import cache_dir

What = Literal["run", "kept", "sandbox", "test"]
TERM_S = 30.0  # a nested guest takes its time
KILL_S = 5.0
READERS_S = 2.0  # others look at a file for milliseconds


def folder() -> Path:
    """The ledger's folder, made where it is not there: one for root, one per user, the same in and around a sandbox.

    Raises IsolatencyError where the place is somebody else's.
    """
    if host_root():
        path = Path("/run/isolatency")
    elif (runtime := os.environ.get("XDG_RUNTIME_DIR")) and os.access(runtime, os.W_OK):
        path = Path(runtime) / "isolatency"
    else:
        path = Path(tempfile.gettempdir()) / f"isolatency-{outer_uid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.lstat().st_uid != os.geteuid():
        raise IsolatencyError(f"the ledger's folder {path} belongs to another user; remove it, or set XDG_RUNTIME_DIR")
    return path


@dataclass(frozen=True)
class Owner:
    """One ledger file as read: who made what is in `entries` (n → kind and fields), and whether it still lives.

    `netns` is the network namespace that it was in, `sandbox` the sandbox, empty outside of one.
    """

    id: str
    what: str
    name: str
    pid: int
    netns: int
    alive: bool
    path: Path
    sandbox: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    entries: dict[int, Entry] = field(default_factory=dict)

    @property
    def in_reach(self) -> bool:
        """False inside a sandbox for what lives outside of it: its processes cannot be seen from there."""
        return os.environ.get(SANDBOX, "") in ("", self.sandbox)

    def __str__(self) -> str:
        return f"{self.what} {self.name} ({self.id})"


class Ledger:
    """The open ledger of one owner; a context manager that removes on exit whatever is still written down."""

    def __init__(self, path: Path, what: What, name: str) -> None:
        self.id = path.stem
        self.path = path
        self._file = _create(path)
        self._entries: dict[int, Entry] = {}
        self._held: dict[int, int] = {}  # open folders by their entries
        self._next = 0
        sandbox = os.environ.get(SANDBOX, "")
        self._write({"owner": {"what": what, "name": name, "pid": os.getpid(), "netns": netns(), "sandbox": sandbox}})

    @classmethod
    def open(cls, what: What, name: str) -> Self:
        return cls(folder() / f"{secrets.token_hex(4)}.jsonl", what, name)

    def add(self, kind: str, **fields: Any) -> int:
        """Write a resource down, flushed to disk. Call it before the resource is made."""
        if kind not in REMOVERS:
            raise ValueError(f"no remover for {kind}")
        self._next += 1
        entry = {"kind": kind, **fields}
        self._write({"add": self._next, **entry})
        self._entries[self._next] = entry
        return self._next

    def folder(self, path: Path) -> int:
        """Make a folder, written down. The lock on it shows that its owner lives, to a ledger that does not know it."""
        number = self.add("dir", path=str(path))
        if not shell.dry_run():
            path.mkdir(parents=True)
            self._held[number] = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._held[number], fcntl.LOCK_SH)
        return number

    def mark(self, name: str) -> tuple[int, dict[str, str]]:
        """Write a process down by the mark that it will carry, and return the environment that marks it."""
        number = self.add("process", name=name, mark=f"{self.id}.{self._next + 1}")
        return number, {MARK: self._entries[number]["mark"]}

    def remove(self, number: int) -> None:
        """Remove a resource (one that is gone already is fine) and strike it out.

        Raises IsolatencyError where it cannot be removed; it then stays written down, for `clean`.
        """
        entry = self._entries.get(number)
        if entry is not None:
            _remove(entry, self.id, number)
            self._write({"drop": number})
            self._entries.pop(number, None)
            if number in self._held:
                os.close(self._held.pop(number))

    def remove_all(self) -> list[str]:
        """Remove everything still written down, newest first; returns a sentence for each.

        Raises the first IsolatencyError, once all the others are removed.
        """
        said = []
        failed: IsolatencyError | None = None
        for number in sorted(self._entries, reverse=True):
            said.append(words(self._entries[number]))
            try:
                self.remove(number)
            except IsolatencyError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return said

    def note(self, **fields: Any) -> None:
        self._write({"note": fields})

    def _write(self, line: dict[str, Any]) -> None:
        """The whole line or nothing: after a full disk the next line must not grow onto half of this one."""
        if shell.dry_run():
            return
        text = json.dumps(line).encode() + b"\n"
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, text) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.remove_all()
            self.path.unlink(missing_ok=True)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of the file as it is: what it still names is a dead owner's from now on, for `clean`."""
        for file in (*self._held.values(), self._file):
            os.close(file)


def _create(path: Path) -> int:
    """A new file, locked. A clean that comes between the two takes it for a dead owner's and removes it: again then."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file).st_nlink:
            return file
        os.close(file)


def owners() -> list[Owner]:
    """Every owner that has a ledger file. An owner is alive while the flock on its file is held."""
    found = []
    for path in sorted(folder().glob("*.jsonl")):
        with contextlib.suppress(FileNotFoundError):
            found.append(_read(path))
    return found


def _read(path: Path) -> Owner:
    with path.open(encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            alive = False
        except BlockingIOError:
            alive = True
        lines = file.read().splitlines()
    owner: dict[str, Any] = {"what": "run", "name": "?", "pid": 0, "netns": 0}
    notes: dict[str, Any] = {}
    entries: dict[int, Entry] = {}
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # torn: written while the owner was killed, so what it names was not yet made
        if "owner" in line:
            owner |= {key: value for key, value in line["owner"].items() if key in (*owner, "sandbox")}
        elif "add" in line:
            entries[line.pop("add")] = line
        elif "drop" in line:
            entries.pop(line["drop"], None)
        elif "note" in line:
            notes |= line["note"]
    return Owner(path.stem, alive=alive, path=path, notes=notes, entries=entries, **owner)


def clean(everything: bool = False) -> tuple[list[str], list[str]]:
    """Remove what dead owners left; with `everything`, end live ones first. Returns what was removed, and what not.

    Raises IsolatencyError when something could not be removed, once all the rest was; it stays written down.
    """
    removed: list[str] = []
    left: list[str] = []
    failed: list[str] = []
    with locked("clean.lock"):  # two at once would take each other for live owners
        found = owners()
        if everything and not shell.dry_run():
            living = [owner for owner in found if owner.alive and owner.in_reach]
            for owner, ended in zip(living, end(living), strict=True):
                (removed if ended else failed).append(f"{owner}" if ended else f"{owner} does not end")
            found = owners()
        # A sandbox goes first: with its engine's socket, which shows that containers of runs in it are gone.
        for owner in sorted(found, key=lambda one: one.what != "sandbox"):
            if not owner.in_reach:
                left.append(f"{owner}, which is not of this sandbox")
            elif owner.alive and everything and shell.dry_run():
                shell.say(f"end {owner} and remove what it has made")
            elif owner.alive:
                left.append(f"{owner}, which is alive")
            else:
                _remove_dead(owner, removed, failed)
        removed += _forgotten(found)
    if failed:
        raise IsolatencyError(
            f"{len(failed)} could not be removed, the first: {failed[0]}; run `isolatency clean` again",
            detail="\n".join([*(f"removed {line}" for line in removed), *(f"not removed: {line}" for line in failed)]),
        )
    return removed, left


def remove_dead(owner: Owner) -> None:
    """Remove what one dead owner left. Raises IsolatencyError when something could not be removed."""
    failed: list[str] = []
    _remove_dead(owner, [], failed)
    if failed:
        raise IsolatencyError(f"{failed[0]}; run `isolatency clean`")


def _remove_dead(owner: Owner, removed: list[str], failed: list[str]) -> None:
    with contextlib.suppress(FileNotFoundError), owner.path.open("a", encoding="utf-8") as file:
        if not locks.take(file.fileno(), READERS_S):
            return  # another one is at it
        failed_before = len(failed)
        for number in sorted(owner.entries, reverse=True):
            entry = owner.entries[number]
            if shell.dry_run():
                shell.say(f"remove {words(entry)}")
                continue
            try:
                said = _remove(entry, owner.id, number)
            except IsolatencyError as error:
                failed.append(str(error))
                continue
            removed += [said] if said else []
            file.write(json.dumps({"drop": number}) + "\n")
            file.flush()
        if len(failed) == failed_before and not shell.dry_run():
            owner.path.unlink(missing_ok=True)


def _remove(entry: Entry, owner: str, number: int) -> str | None:
    """Remove one resource; a sentence on it, None where it was gone already."""
    remover = REMOVERS.get(entry["kind"])
    if remover is None:
        raise IsolatencyError(f"{words(entry)} is of a kind that this version does not know; clean with a newer one")
    if entry["kind"] in SHARED and _wanted_by_another(entry, owner, number):
        return None
    return remover(entry, owner)


def _wanted_by_another(entry: Entry, owner: str, number: int) -> bool:
    """Whether the same was set or made for something else: the last one to go restores it."""
    found = [(other.id, n, wanted) for other in owners() for n, wanted in other.entries.items()]
    return any((other, n) != (owner, number) and wanted == entry for other, n, wanted in found)


def _forgotten(known: Sequence[Owner]) -> list[str]:
    """Our folders in the cache that nobody holds and no ledger names: the machine was started anew since."""
    removed = []
    own = re.compile(r"(?:sandbox|isolatency)-([0-9a-f]{8})(?:-.*)?")
    for path in cache_dir().glob("*-*"):
        named = own.fullmatch(path.name)
        if named is None or any(owner.id == named[1] for owner in known) or locks.held(path):
            continue
        entry = {"kind": "dir", "path": str(path)}
        if shell.dry_run():
            shell.say(f"remove {words(entry)}")
        elif said := REMOVERS["dir"](entry, named[1]):
            removed.append(said)
    return removed


def end(living: Sequence[Owner]) -> list[bool]:
    """Ask live owners to end, all at once, then make those that have not; for each, whether it has ended."""
    left = list(living)
    for number, patience_s in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, KILL_S)):
        for owner in left:
            for pid in locks.holders(owner.path):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        until = time.monotonic() + patience_s
        while (left := [owner for owner in left if _is_alive(owner)]) and time.monotonic() < until:
            time.sleep(0.05)
    return [owner not in left for owner in living]


def end_owner(owner: Owner) -> None:
    """End one live owner. Raises IsolatencyError when it does not end."""
    if not all(end([owner])):
        raise IsolatencyError(f"the {owner} did not end; end its process by hand")


def _is_alive(owner: Owner) -> bool:
    try:
        return _read(owner.path).alive
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time; the next one waits."""
    with (folder() / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


__all__ = ["CGROUPS", "MARK", "Ledger", "Owner", "clean", "end", "end_owner", "folder", "netns", "owners", "processes"]
