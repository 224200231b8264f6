"""CPUs and memory of a target on the host: a cpuset and a memory limit, in cgroup v1 or v2; never a quota.

A quota throttles, which has no counterpart in a guest; a cpuset gives whole cores, as a VMM pinned to them has.
"""

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hostsetup.ledger import CGROUPS, Ledger
from hostsetup.namespaces import host_root
from images import shell
from images.errors import IsolatencyError, ShellError


@dataclass(frozen=True)
class Placed:
    """Where a process is started: put `prefix` before its command. `folders` is empty where there is no cgroup."""

    prefix: tuple[str, ...]
    folders: tuple[Path, ...]
    caveats: tuple[str, ...] = ()

    def argv(self, command: Sequence[str | Path]) -> list[str | Path]:
        return [*self.prefix, *command]


@contextmanager
def placed(ledger: Ledger, name: str, cores: Sequence[int], mem_mib: int | None) -> Iterator[Placed]:
    """A cgroup with these cores, and `mem_mib` where given (a VMM's memory is its guest's); CPU affinity without root.

    Raises IsolatencyError with the kernel's reason where cgroups cannot be written although we are root.
    """
    listed = ",".join(map(str, cores))
    if not writable():
        caveat = f"{name}: without cgroups it has CPU affinity only" + (
            ", and its memory is unlimited" if mem_mib else ""
        )
        yield Placed(("taskset", "-c", listed), (), (caveat,))
        return
    group = f"isolatency-{ledger.id}-{name}"
    entry = ledger.add("cgroup", name=group)
    try:
        folders = _make(group, listed, mem_mib)
        joins = "".join(f"echo 0 > {shlex.quote(str(folder / 'cgroup.procs'))} && " for folder in folders)
        yield Placed(("/bin/sh", "-c", f'{joins}exec "$@"', "sh"), folders)
    finally:
        ledger.remove(entry)


def version() -> int:
    """1 or 2: which kind of cgroups holds the cpuset and memory controllers."""
    return 2 if (CGROUPS / "cgroup.controllers").exists() else 1


def writable() -> bool:
    """False in a user namespace, where root is not the host's root."""
    wanted = [CGROUPS] if version() == 2 else [CGROUPS / "cpuset", CGROUPS / "memory"]
    return host_root() and all(os.access(path, os.W_OK) for path in wanted)


def _make(group: str, cores: str, mem_mib: int | None) -> tuple[Path, ...]:
    limit = None if mem_mib is None else str(mem_mib * 2**20)
    try:
        if version() == 2:
            return (_make_v2(CGROUPS / group, cores, limit),)
        return _make_v1(group, cores, limit)
    except (OSError, ShellError) as error:
        raise IsolatencyError(
            f"the cgroup {group} with cores {cores} could not be made: {error}; "
            "run as root on the host itself, or in a container that may write /sys/fs/cgroup"
        ) from error


def _make_v2(folder: Path, cores: str, limit: str | None) -> Path:
    control = CGROUPS / "cgroup.subtree_control"
    if missing := {"cpuset", "memory"} - set(control.read_text().split()):
        # Not undone: by the time that we go, others may count on these controllers too.
        shell.write(control, " ".join(f"+{name}" for name in sorted(missing)))
    _mkdir(folder)
    shell.write(folder / "cpuset.cpus", cores)
    if limit is not None:
        shell.write(folder / "memory.max", limit)
        if (folder / "memory.swap.max").exists():
            shell.write(folder / "memory.swap.max", "0")
    return folder


def _make_v1(group: str, cores: str, limit: str | None) -> tuple[Path, ...]:
    cpuset = CGROUPS / "cpuset" / group
    _mkdir(cpuset)
    shell.write(cpuset / "cpuset.cpus", cores)
    shell.write(cpuset / "cpuset.mems", (CGROUPS / "cpuset" / "cpuset.mems").read_text().strip())
    if limit is None:
        return (cpuset,)
    memory = CGROUPS / "memory" / group
    _mkdir(memory)
    shell.write(memory / "memory.limit_in_bytes", limit)
    if (memory / "memory.memsw.limit_in_bytes").exists():
        shell.write(memory / "memory.memsw.limit_in_bytes", limit)
    return cpuset, memory


def _mkdir(folder: Path) -> None:
    if shell.dry_run():
        shell.say(f"make the cgroup {folder}")
    else:
        folder.mkdir()
