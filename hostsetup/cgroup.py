"""CPUs and memory of a target on the host: a cpuset and a memory limit, in cgroup v1 or v2; never a quota.

A quota throttles, which has no counterpart in a guest; a cpuset gives whole cores, as a VMM pinned to them has.
"""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hostsetup.ledger import CGROUPS, Ledger
from hostsetup.namespaces import host_root
from images import shell
from images.errors import IsolatencyError, ShellError, TargetError


@dataclass(frozen=True)
class Placed:
    """Where a process is started: put `prefix` before its command. `folders` is empty where there is no cgroup.

    `wanted` is what a file of the cgroup's must say, as far as the kernel has one of that name.
    """

    prefix: tuple[str, ...]
    folders: tuple[Path, ...] = ()
    wanted: Mapping[Path, str] = field(default_factory=dict)
    caveats: tuple[str, ...] = ()

    def argv(self, command: Sequence[str | Path]) -> list[str | Path]:
        return [*self.prefix, *command]

    def check(self, name: str) -> None:
        """Raise TargetError where the kernel does not say what was asked of it, or says it no longer.

        Who manages the machine's cgroups (systemd) may take a controller away at any time, and its settings with it.
        """
        for file, wanted in self.wanted.items():
            try:
                found = file.read_text().strip()
            except OSError as error:
                found = f"nothing ({error.strerror})"
            if found != wanted:
                raise TargetError(
                    f"{name} wants {wanted} in {file}, found {found}: another program has changed the cgroups of this "
                    "machine; end it, or let it leave cpuset and memory on, and start again"
                )


@contextmanager
def placed(ledger: Ledger, name: str, cores: Sequence[int], mem_mib: int | None) -> Iterator[Placed]:
    """A cgroup with these cores, and `mem_mib` where given (a VMM's memory is its guest's); CPU affinity without root.

    Raises IsolatencyError with the kernel's reason where cgroups cannot be written although we are root, TargetError as
    `Placed.check` does.
    """
    listed = ",".join(map(str, cores))
    if not writable():
        caveat = f"{name}: without cgroups it has CPU affinity only" + (
            ", and its memory is unlimited" if mem_mib else ""
        )
        yield Placed(("taskset", "-c", listed), caveats=(caveat,))
        return
    group = f"isolatency-{ledger.id}-{name}"
    entry = ledger.add("cgroup", name=group)
    try:
        folders, wanted = _make(group, cores, mem_mib)
        joins = "".join(f"echo 0 > {shlex.quote(str(folder / 'cgroup.procs'))} && " for folder in folders)
        place = Placed(("/bin/sh", "-c", f'{joins}exec "$@"', "sh"), folders, {} if shell.dry_run() else wanted)
        place.check(name)
        yield place
    finally:
        ledger.remove(entry)


def ranges(cores: Sequence[int]) -> str:
    """A list of cores in the kernel's words: 0-2,5."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def version() -> int:
    """1 or 2: which kind of cgroups holds the cpuset and memory controllers."""
    return 2 if (CGROUPS / "cgroup.controllers").exists() else 1


def writable() -> bool:
    """False in a user namespace, where root is not the host's root."""
    wanted = [CGROUPS] if version() == 2 else [CGROUPS / "cpuset", CGROUPS / "memory"]
    return host_root() and all(os.access(path, os.W_OK) for path in wanted)


def _make(group: str, cores: Sequence[int], mem_mib: int | None) -> tuple[tuple[Path, ...], dict[Path, str]]:
    """The folders, and what files in them must say from then on."""
    listed = ",".join(map(str, cores))
    limit = None if mem_mib is None else str(mem_mib * 2**20)
    try:
        if version() == 2:
            folder = _make_v2(CGROUPS / group, listed, limit)
            wanted = {folder / "cpuset.cpus.effective": ranges(cores)}
            return (folder,), wanted | ({folder / "memory.max": limit} if limit else {})
        folders = _make_v1(group, listed, limit)
        wanted = {folders[0] / "cpuset.effective_cpus": ranges(cores)}
        return folders, wanted | ({folders[1] / "memory.limit_in_bytes": limit} if limit else {})
    except (OSError, ShellError) as error:
        raise IsolatencyError(
            f"the cgroup {group} with cores {listed} could not be made: {error}; "
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
