"""Locks on files (flock): they show who lives, in any PID namespace, and end with whoever holds them."""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from images.errors import IsolatencyError

RUN = Path("/run/lock/isolatency.lock")


def take(file: int, patience_s: float) -> bool:
    """Lock an open file; False where another still has it after that time."""
    end_s = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end_s:
                return False
            time.sleep(0.02)
        else:
            return True


def held(path: Path) -> bool:
    """Whether anybody has a lock on the folder; so it is too where that cannot be known."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False


def holders(path: Path) -> list[int]:
    """Processes that hold the lock on a file, by /proc: right in any PID namespace. Mere readers are not."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.path.samestat(link.stat(), path.stat()):
                about = (link.parents[1] / "fdinfo" / link.name).read_text()
                if re.search(r"^lock:.* FLOCK .* WRITE ", about, re.MULTILINE):
                    found.add(int(link.parts[2]))
    return sorted(found - {os.getpid()})


@contextlib.contextmanager
def run_lock() -> Iterator[None]:
    """One run at a time on a machine: two would disturb each other. Raises IsolatencyError when one is under way."""
    RUN.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(RUN, os.O_CREAT | os.O_EXCL | os.O_RDONLY, 0o666))
        RUN.chmod(0o666)
    with RUN.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise IsolatencyError(
                "another run is under way on this machine and would disturb this one; "
                "wait for it, or end it: `isolatency clean --all`"
            ) from None
        yield
