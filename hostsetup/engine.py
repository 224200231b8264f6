"""The Docker engine of a sandbox: how it is started, and what of the machine's own is hidden from it.

Decided outside of the sandbox, where the ledger is; done inside, where it stays.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from hostsetup import ledger as books
from hostsetup import machine
from hostsetup.cgroup import placed
from hostsetup.ledger import Ledger
from hostsetup.namespaces import host_root
from images import shell, store

CONFIG = Path("/etc/docker/daemon.json")
# dockerd and containerd use these whatever they are told. A containerd of the machine's would start containers outside
# of the sandbox; keys, sockets and folders of ours would stay when it ends.
HIDDEN = tuple(map(Path, ("/run/containerd", "/run/docker", "/etc/docker", "/opt/containerd")))


@dataclass(frozen=True)
class Engine:
    """`argv` starts it once `hide` was called; empty without dockerd or without root: nobody shall reach another."""

    argv: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str) -> Self:
        return cls(**{key: tuple(value) for key, value in json.loads(text).items()})

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    def hide(self) -> None:
        """Cover the machine's places in this mount namespace."""
        for place in self.hidden:
            Path(place).mkdir(parents=True, exist_ok=True)
            shell.run(["mount", "-t", "tmpfs", "tmpfs", place])


@contextmanager
def engine(ledger: Ledger, runtime: Path) -> Iterator[Engine]:
    """The engine for a sandbox with this folder; its control group is there for as long as this is.

    It has the first core, which is the load client's wherever that has one of its own: what it does there while
    targets are measured is not taken from them.
    """
    if not machine.find("dockerd") or not host_root():
        yield Engine()
        return
    hidden = _make(ledger)
    data = store.cache_dir() / runtime.name  # on a disk
    ledger.folder(data)
    ledger.add("cgroup", name=(parent := f"isolatency-{ledger.id}-engine"))
    config = runtime / "daemon.json"
    config.write_text(json.dumps(_settings()))
    command: list[str | Path] = [
        "dockerd", "--config-file", config, "-H", "fd://", "--data-root", data,
        "--exec-root", runtime / "exec", "--pidfile", runtime / "docker.pid", "--cgroup-parent", f"/{parent}",
        "--exec-opt", "native.cgroupdriver=cgroupfs", "--userland-proxy=false", "--log-level", "warn",
    ]  # fmt: skip
    cores = sorted(os.sched_getaffinity(0))
    with placed(ledger, "dockerd", cores[:1], None) as place:
        argv = place.argv(command) if len(cores) > 1 else command
        yield Engine(tuple(map(str, argv)), hidden)


def _make(ledger: Ledger) -> tuple[str, ...]:
    """The places to hide; those that are not there are made, and go with the last sandbox."""
    hidden = []
    with books.locked("mountpoints.lock"):
        others = [entry for owner in books.owners() for entry in owner.entries.values()]
        for place in map(str, HIDDEN):
            ours = {"kind": "mountpoint", "path": place}
            if ours in others or not os.path.lexists(place):
                entry = ledger.add(**ours)
                try:
                    Path(place).mkdir(parents=True, exist_ok=True)
                except OSError:  # a read-only system, where the engine cannot make it either
                    ledger.remove(entry)
                    continue
            hidden.append(place)
    return tuple(hidden)


def _settings() -> dict[str, Any]:
    """The machine's own runtimes (gVisor says there where it is); all else is this engine's, as its flags say it."""
    try:
        found = json.loads(CONFIG.read_text())
        return {"runtimes": found["runtimes"]} if isinstance(found.get("runtimes"), dict) else {}
    except (OSError, ValueError, AttributeError, KeyError):
        return {}
