"""What a result was measured on: machine, versions, digests, seed, times. What could not be read is null, and `unread`
says why, by "machine.FIELD" or "versions.NAME".

/proc and /sys as in Linux' Documentation/ABI/testing/sysfs-devices-system-cpu and admin-guide/pm/cpufreq.rst.
"""

import contextlib
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import docker
import psutil

from hostsetup import machine as programs
from images import shell, vmm
from images.errors import IsolatencyError
from images.store import Images, sha256

CHECKOUT = Path(__file__).resolve().parent.parent
TOOLS = {
    "qemu": ("qemu-system-x86_64", "--version"), "dockerd": ("dockerd", "--version"), "runc": ("runc", "--version"),
    "iptables": ("iptables", "--version"), "iproute2": ("ip", "-V"), "mmdebstrap": ("mmdebstrap", "--version"),
}  # fmt: skip
Facts = tuple[dict[str, Any], dict[str, str]]  # values, and for each null one its reason


class _Unreadable(Exception):
    """The reason why a fact is null."""


def begin(*, command: Sequence[str], seed: int, images: Images | None, client_cores: Sequence[int]) -> dict[str, Any]:
    """The manifest as it stands when a run begins."""
    (here, unread_here), (installed, unread_installed) = machine(), versions()
    unread = {f"machine.{name}": why for name, why in unread_here.items()}
    unread |= {f"versions.{name}": why for name, why in unread_installed.items()}
    return {
        "schema": 1,
        "started": _now(),
        "ended": None,
        "command": list(command),
        "seed": seed,
        "client_cores": list(client_cores),
        "machine": here,
        "versions": installed,
        "unread": unread,
        "images": None if images is None else {
            "tree_sha256": images.tree_sha256, "key": images.key, "loaded": images.loaded, "digests": images.digests,
        },
        "firecracker_checked": vmm.checked() or None,
        "load_before": list(os.getloadavg()),
        "cpu_time_before": cpu_time(),
    }  # fmt: skip


def end() -> dict[str, Any]:
    """What is added when the run has ended, well or not."""
    return {"ended": _now(), "load_after": list(os.getloadavg()), "cpu_time_after": cpu_time()}


def own_parts(options: Mapping[str, Any]) -> dict[str, dict[str, str | None]]:
    """A target's own image, kernel and binary: what was given, and the sha256 (for a Docker image, of its id)."""
    readers = {"binary": _digest, "kernel": _digest, "image": _image_digest}
    given = {part: str(options[part]) for part in readers if part in options}
    values, unread = _ask({part: _asking(readers[part], name) for part, name in given.items()})
    return {
        part: {"given": name, "sha256": values[part], **({"unread": unread[part]} if part in unread else {})}
        for part, name in given.items()
    }


def _digest(path: str) -> str:
    try:
        return sha256(Path(path))
    except OSError as error:
        raise _Unreadable(f"{path}: {error.strerror}") from error


def _image_digest(name: str) -> str:
    """Of the image that the engine in reach has by that name."""
    try:
        with contextlib.closing(docker.from_env(timeout=30)) as engine:
            return str(engine.images.get(name).id).removeprefix("sha256:")
    except (docker.errors.DockerException, OSError) as error:
        raise _Unreadable(f"Docker does not tell of the image {name}: {error}") from error


def cpu_time() -> dict[str, float]:
    """CPU time of all cores since the machine's start, in s, and how much of it a hypervisor gave to others."""
    times = psutil.cpu_times()
    return {"total_s": round(sum(times) - times.guest - times.guest_nice, 2), "stolen_s": times.steal}


def machine(root: Path = Path("/")) -> Facts:
    """The machine's facts by the files under `root`; counts of cores and memory are always this machine's."""
    cpu = root / "sys/devices/system/cpu"
    readers: dict[str, Callable[[], Any]] = {
        "cpu_model": lambda: _cpuinfo(root, "model name"),
        "microcode": lambda: _cpuinfo(root, "microcode"),
        "cores": lambda: psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count,
        "usable_cores": lambda: sorted(os.sched_getaffinity(0)),
        "isolated_cores": lambda: _read(cpu / "isolated"),
        "memory_mib": lambda: psutil.virtual_memory().total // 2**20,
        "governor": lambda: _governor(cpu),
        "turbo": lambda: _turbo(cpu),
        "smt": lambda: _read(cpu / "smt/active") == "1",
        "mitigations": lambda: _mitigations(cpu),
        "nested": lambda: "hypervisor" in _cpuinfo(root, "flags").split(),
        "hypervisor": lambda: _hypervisor(root),
        "clocksource": lambda: _read(root / "sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "huge_pages": lambda: _chosen(_read(root / "sys/kernel/mm/transparent_hugepage/enabled")),
        "kernel": platform.release,
        "kernel_build": platform.version,
        "system": lambda: _system(root),
    }
    return _ask(readers)


def versions() -> Facts:
    """Versions of isolatency, of the Python packages that it requires, and of the host's programs."""
    readers: dict[str, Callable[[], Any]] = {"python": platform.python_version, "commit": _commit}
    readers |= {name: _asking(_package, name) for name in _packages()}
    readers |= {name: _asking(_tool, *argv) for name, argv in TOOLS.items()}
    return _ask(readers | {"firecracker": _firecracker})


def _ask(readers: Mapping[str, Callable[[], Any]]) -> Facts:
    values: dict[str, Any] = {}
    unread: dict[str, str] = {}
    for name, reader in readers.items():
        try:
            values[name] = reader()
        except _Unreadable as error:
            values[name], unread[name] = None, str(error)
        else:
            if values[name] is None:
                unread[name] = "the system does not tell"
    return values, unread


def _asking(reader: Callable[..., str], *arguments: str) -> Callable[[], str]:
    return lambda: reader(*arguments)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError as error:
        raise _Unreadable(f"{path} is not there: this kernel, or the hypervisor under it, does not show it") from error
    except OSError as error:
        raise _Unreadable(f"{path}: {error.strerror}") from error


def _cpuinfo(root: Path, key: str) -> str:
    for line in _read(root / "proc/cpuinfo").partition("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    raise _Unreadable(f"{root / 'proc/cpuinfo'} has no {key!r}")


def _governor(cpu: Path) -> str:
    """All that are in use, as one word where every core has the same."""
    paths = sorted(cpu.glob("cpu[0-9]*/cpufreq/scaling_governor"))
    return ", ".join(sorted({_read(path) for path in paths or [cpu / "cpu0/cpufreq/scaling_governor"]}))


def _turbo(cpu: Path) -> bool:
    if (cpu / "intel_pstate/no_turbo").exists():
        return _read(cpu / "intel_pstate/no_turbo") == "0"
    return _read(cpu / "cpufreq/boost") == "1"


def _mitigations(cpu: Path) -> dict[str, str]:
    paths = sorted((cpu / "vulnerabilities").glob("*"))
    if not paths:
        raise _Unreadable(f"{cpu / 'vulnerabilities'} is not there or empty")
    return {path.name: _read(path) for path in paths}


def _hypervisor(root: Path) -> str:
    """What the machine says that it runs on: Xen's name, or the maker and product of a guest's firmware."""
    if "hypervisor" not in _cpuinfo(root, "flags").split():
        return "none"
    kind = root / "sys/hypervisor/type"
    return _read(kind) if kind.exists() else " ".join(_read(root / f"sys/class/dmi/id/{name}") for name in _FIRMWARE)


_FIRMWARE = ("sys_vendor", "product_name")


def _chosen(text: str) -> str:
    """The word in brackets of `always [madvise] never`."""
    found = re.search(r"\[(\w+)\]", text)
    return found[1] if found else text


def _system(root: Path) -> str:
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', _read(root / "etc/os-release"), re.MULTILINE)
    if not found:
        raise _Unreadable(f"{root / 'etc/os-release'} has no PRETTY_NAME")
    return found[1]


def _packages() -> list[str]:
    try:
        required = requires("isolatency") or []
    except PackageNotFoundError:
        required = []
    names = [re.split(r"[^A-Za-z0-9._-]", line)[0] for line in required if "extra ==" not in line]
    return ["isolatency", *names, "gevent"]


def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError as error:
        raise _Unreadable("not installed as a package") from error


def _tool(program: str, option: str) -> str:
    path = programs.find(program)
    if path is None:
        raise _Unreadable(f"{program} is not installed")
    return _first_line([path, option])


def _first_line(argv: Sequence[str | Path]) -> str:
    try:
        done = shell.run(argv, changes=False, timeout_s=10)
    except IsolatencyError as error:
        raise _Unreadable(str(error)) from error
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    if not lines:
        raise _Unreadable(f"{argv[0]} said nothing")
    return lines[0]


def _firecracker() -> str:
    """Of the binary that a target without `binary=` gets. Its digest names the bytes, whatever its version says."""
    try:
        _, number, digest = vmm.find_firecracker()
    except IsolatencyError as error:
        raise _Unreadable(str(error)) from error
    return f"{number}, sha256 {digest}"


def _commit() -> str:
    """The checkout's commit, with a + where files differ from it."""
    git = ["git", "-C", str(CHECKOUT)]
    head = _first_line([*git, "rev-parse", "HEAD"])
    changed = shell.run([*git, "status", "--porcelain", "--untracked-files=no"], changes=False, check=False).stdout
    return head + "+" * bool(changed.strip())
