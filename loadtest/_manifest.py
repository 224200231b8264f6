"""What a result was measured on: machine, versions, digests, seed, times. What cannot be read is null."""

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from images import shell, vmm
from images.errors import IsolatencyError
from images.store import Images

PACKAGES = (
    "isolatency",
    "numpy",
    "aiohttp",
    "locust",
    "gevent",
    "pyarrow",
    "pandas",
    "scipy",
    "docker",
    "requests-unixsocket",
)
_CPU = Path("/sys/devices/system/cpu")


def begin(*, command: Sequence[str], seed: int, images: Images | None, client_cores: Sequence[int]) -> dict[str, Any]:
    """The manifest as it stands when a run begins."""
    return {
        "schema": 1,
        "started": _now(),
        "ended": None,
        "command": list(command),
        "seed": seed,
        "client_cores": list(client_cores),
        "machine": machine(),
        "versions": versions(),
        "images": None if images is None else {
            "tree_sha256": images.tree_sha256, "key": images.key, "loaded": images.loaded, "digests": images.digests,
        },
        "firecracker_checked": vmm.checked() or None,
        "load_before": list(os.getloadavg()),
    }  # fmt: skip


def end() -> dict[str, Any]:
    return {"ended": _now(), "load_after": list(os.getloadavg())}


def machine() -> dict[str, Any]:
    """The machine, by /proc and /sys (Linux, Documentation/admin-guide/cputopology.rst and abi/testing)."""
    cpu = _cpuinfo()
    return {
        "cpu_model": cpu.get("model name"),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "usable_cores": sorted(os.sched_getaffinity(0)),
        "memory_mib": psutil.virtual_memory().total // 2**20,
        "governor": _read(_CPU / "cpu0/cpufreq/scaling_governor"),
        "turbo": _turbo(),
        "smt": _flag(_read(_CPU / "smt/active")),
        "mitigations": _mitigations(),
        "nested": "hypervisor" in (cpu.get("flags") or "").split(),
        "clocksource": _read(Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")),
        "kernel": platform.release(),
        "system": _system(),
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    for name, argv in (("qemu", ["qemu-system-x86_64", "--version"]), ("dockerd", ["dockerd", "--version"])):
        found[name] = _first_line(argv)
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _flag(text: str | None) -> bool | None:
    return None if text is None else text == "1"


def _cpuinfo() -> dict[str, str]:
    first = (_read(Path("/proc/cpuinfo")) or "").split("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _turbo() -> bool | None:
    boost = _flag(_read(_CPU / "cpufreq/boost"))
    without = _flag(_read(_CPU / "intel_pstate/no_turbo"))
    return boost if without is None else not without


def _mitigations() -> dict[str, str]:
    folder = _CPU / "vulnerabilities"
    return {path.name: _read(path) or "" for path in sorted(folder.glob("*"))}


def _system() -> str | None:
    for line in (_read(Path("/etc/os-release")) or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"')
    return None


def _first_line(argv: list[str]) -> str | None:
    try:
        return shell.run(argv, changes=False, timeout_s=10).stdout.splitlines()[0]
    except (IsolatencyError, IndexError):
        return None
