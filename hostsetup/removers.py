"""How each kind of resource is removed, for the ledger, which alone decides when.

A remover gets the resource as it was written down and its owner's id. It returns a sentence on what was removed, None
where it was gone already, and raises IsolatencyError where it is there and cannot be removed.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from hostsetup.namespaces import in_netns
from images import shell
from images.errors import IsolatencyError

Entry = dict[str, Any]
Remover = Callable[[Entry, str], str | None]

MARK = "ISOLATENCY_MARK"
CGROUPS = Path("/sys/fs/cgroup")
GONE_S = 5.0
EXEC_S = 0.05  # a process that is just being executed has no environment to be read for a moment
ENGINE_S = 10


def words(entry: Entry) -> str:
    """A resource as the user reads it."""
    what = entry.get("name") or entry.get("path") or " ".join(entry.get("delete", []))
    return f"{entry['kind']} {what}"


def processes(mark: str) -> list[int]:
    """Processes that carry the mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parts[2]))
    return found


def _process(entry: Entry, owner: str) -> str | None:
    def look() -> list[int]:
        return processes(entry["mark"])

    found = _kill_all(look, f"the process {entry['name']}")
    time.sleep(EXEC_S)
    found += _kill_all(look, f"the process {entry['name']}")
    return words(entry) if found else None


def _kill_all(look: Callable[[], list[int]], what: str) -> list[int]:
    """SIGKILL what `look` finds until it finds nothing, forks of the killed included; returns what was killed.

    Each process is looked for again once its pidfd is held, so that one with a reused number is never hit.
    """
    killed: set[int] = set()
    end = time.monotonic() + GONE_S
    while pids := look():
        for pid in set(pids) - killed:
            with contextlib.suppress(ProcessLookupError):
                handle = os.pidfd_open(pid)
                try:
                    if pid in look():
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
                finally:
                    os.close(handle)
            killed.add(pid)
        if time.monotonic() > end:
            raise IsolatencyError(f"{what} is still there {GONE_S:g} s after it was killed (pid {pids[0]})")
        time.sleep(0.01)
    return sorted(killed)


def _cgroup(entry: Entry, owner: str) -> str | None:
    name = entry["name"]
    folders = cgroup_folders(name)
    for top in folders:
        if (top / "cgroup.kill").exists():  # version 2, Linux 5.14
            shell.write(top / "cgroup.kill", "1")
    _kill_all(lambda: cgroup_pids(folders), f"a process in the cgroup {name}")
    for top in folders:
        below = sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True)
        for path in (*below, top):
            _until(partial(_rmdir, path), f"the cgroup {path}")
    return words(entry) if folders else None


def cgroup_folders(name: str) -> list[Path]:
    """The folder of that name in each hierarchy (there is one of cgroup v2)."""
    return [path for path in (CGROUPS / name, *CGROUPS.glob(f"*/{name}")) if path.is_dir() and not path.is_symlink()]


def cgroup_pids(folders: Iterable[Path]) -> list[int]:
    """The processes in these cgroups and below, as seen from this PID namespace (0 is one that is not)."""
    pids: set[int] = set()
    for top in folders:
        for path in top.rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                pids |= {int(word) for word in path.read_text().split()}
    return sorted(pids - {0})


def _rmdir(path: Path) -> str:
    """Empty when it is gone; it is busy for some milliseconds after its last process."""
    try:
        path.rmdir()
    except FileNotFoundError:
        return ""
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _until(attempt: Callable[[], str], what: str) -> None:
    """Try until `attempt` has nothing more to say. Raises IsolatencyError with what it said last."""
    end = time.monotonic() + GONE_S
    while said := attempt():
        if time.monotonic() > end:
            raise IsolatencyError(f"{what} could not be removed within {GONE_S:g} s: {said}")
        time.sleep(0.01)


def _dir(entry: Entry, owner: str) -> str | None:
    path = Path(entry["path"])
    if owner not in path.name:
        raise IsolatencyError(
            f"the folder {path} in the ledger does not carry its owner's id {owner}; remove it by hand"
        )
    if not os.path.lexists(path):
        return None
    _until(lambda: _remove_tree(path), f"the folder {path}")
    return words(entry)


def _remove_tree(path: Path) -> str:
    """Empty when it is gone; files may come and go in it while its last user is ending."""
    for point in mounts_below(path):
        shell.run(["umount", "--lazy", point])
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path)
    except OSError as error:
        return "" if not os.path.lexists(path) else f"{error.strerror} ({error.filename})"
    return ""


def mounts_below(path: Path) -> list[str]:
    """Mount points at this path and below, innermost first."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    points = [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split()[1]) for line in lines]
    return sorted((point for point in points if point == str(path) or point.startswith(f"{path}/")), reverse=True)


def _mountpoint(entry: Entry, owner: str) -> str | None:
    """A folder that others may use by now: whoever has something in it keeps it."""
    try:
        Path(entry["path"]).rmdir()
    except OSError:
        return None
    return words(entry)


def _container(entry: Entry, owner: str) -> str | None:
    import docker  # heavy, and few removals need it
    import requests

    host, wanted = entry["docker_host"], {"label": f"isolatency={owner}", "name": entry["name"]}
    try:
        with contextlib.closing(docker.DockerClient(base_url=host, timeout=ENGINE_S)) as engine:
            found = engine.containers.list(all=True, filters=wanted)
            for container in found:
                with contextlib.suppress(docker.errors.APIError):  # gone, or somebody else is removing it
                    container.remove(force=True, v=True)
            _until(lambda: "it is still listed" * bool(engine.containers.list(all=True, filters=wanted)), words(entry))
    except (docker.errors.DockerException, requests.RequestException) as error:
        socket = Path(host.removeprefix("unix://"))
        if socket.parent.name.startswith("sandbox-") and not socket.exists():  # all of it ended with its sandbox
            return words(entry)
        raise IsolatencyError(
            f"the {words(entry)} could not be removed, since no Docker engine answers at {host}; start that engine, "
            "and run `isolatency clean`"
        ) from error
    return words(entry) if found else None


def alias(owner: str) -> str:
    """What an interface of ours carries, so that another one of the same name is left alone."""
    return f"isolatency-{owner}"


def _tap(entry: Entry, owner: str) -> str | None:
    inside = in_netns(entry["netns"])
    if inside is None:  # a namespace takes its interfaces with it
        return None
    for name, wanted in ((entry["name"], alias(owner)), (entry["made_as"], None)):
        shown = shell.run([*inside, "ip", "-json", "link", "show", "dev", name], changes=False, check=False).stdout
        if any(link.get("ifalias") == wanted or wanted is None for link in json.loads(shown or "[]")):
            shell.run([*inside, "ip", "link", "del", "dev", name])
            return words(entry)
    return None


def _rule(entry: Entry, owner: str) -> str | None:
    inside = in_netns(entry["netns"])
    delete: list[str] = entry["delete"]
    look = ["-C" if word == "-D" else word for word in delete]
    if inside is None or shell.run([*inside, *look], changes=False, check=False).returncode:
        return None
    shell.run([*inside, *delete])
    return words(entry)


def _sysctl(entry: Entry, owner: str) -> str | None:
    inside = in_netns(entry["netns"])
    if inside is None:
        return None
    file = Path("/proc/sys") / entry["name"].replace(".", "/")
    shell.run([*inside, "/bin/sh", "-c", 'echo "$1" > "$2"', "sh", entry["value"], file])
    return f"{words(entry)} (is {entry['value']} again)"


REMOVERS: dict[str, Remover] = {
    "process": _process,
    "cgroup": _cgroup,
    "dir": _dir,
    "mountpoint": _mountpoint,
    "container": _container,
    "tap": _tap,
    "rule": _rule,
    "sysctl": _sysctl,
}
# What several owners may have in common, in the same words.
SHARED = ("mountpoint", "sysctl")
