"""What this target is: the tree that it runs, kernel, CPU, BLAS kernel, versions. Imports only the standard library."""

import hashlib
import os
import platform
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

SCHEMA = 1
MTIME = 1_700_000_000  # every entry's; a fixed moment, so that only content counts
TREE_MARK = Path("/opt/app/env")
MOUNTED = {"dev": 0o755, "proc": 0o755, "sys": 0o755, "run": 0o755, "tmp": 0o1777, "mnt": 0o755}
REPLACED = {"etc/hosts", "etc/hostname", "etc/resolv.conf"}
LEFT_OUT = {".dockerenv", ".tree-sha256", "lost+found", "etc/mtab"}
PACKAGES = ("aiohttp", "numpy", "orjson", "threadpoolctl", "uvloop")


class _Sink(Protocol):
    def write(self, data: bytes, /) -> object: ...


class _Hash:
    """A file that only counts and hashes what is written to it."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._at = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self._at += len(data)
        return len(data)

    def tell(self) -> int:
        return self._at


def write_canonical_tar(root: Path, out: _Sink | BinaryIO) -> None:
    """Write the tree below `root` as a tar that depends on names, types, modes and contents alone.

    What a runtime mounts over or puts in (see MOUNTED, REPLACED, LEFT_OUT) has one fixed form or is left out, so that
    a chroot, a container and a guest see the same tree. POSIX.1-2001 (pax) format, entries sorted by the bytes of
    their paths. Raises OSError for a file that cannot be read.
    """
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
        for name, path in _walk(root, ""):
            _add(tar, name, path)


def tree_sha256(root: Path) -> str:
    """sha256 of the canonical tar of the tree below `root`, in hex."""
    sink = _Hash()
    write_canonical_tar(root, sink)
    return sink.digest.hexdigest()


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    """Every entry below `folder` as (name, path), a folder before its content, siblings by the bytes of their names."""
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: os.fsencode(entry.name))
    for entry in listed:
        name = prefix + entry.name
        if name in LEFT_OUT:
            continue
        yield name, Path(entry.path)
        if entry.is_dir(follow_symlinks=False) and name not in MOUNTED:
            yield from _walk(Path(entry.path), f"{name}/")


def _add(tar: tarfile.TarFile, name: str, path: Path) -> None:
    info = tarfile.TarInfo(name)
    info.mtime = MTIME
    found = path.lstat()
    info.mode = stat.S_IMODE(found.st_mode)
    if name in MOUNTED:
        info.type, info.mode = tarfile.DIRTYPE, MOUNTED[name]
    elif name in REPLACED:
        info.mode = 0o644
    elif stat.S_ISDIR(found.st_mode):
        info.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(found.st_mode):
        info.type, info.mode, info.linkname = tarfile.SYMTYPE, 0o777, str(path.readlink())
    elif stat.S_ISREG(found.st_mode):
        info.size = found.st_size
        with path.open("rb") as content:
            tar.addfile(info, content)
        return
    else:
        return  # devices and sockets belong to no tree
    tar.addfile(info)


def digest_of_this_tree(label: Path | None) -> tuple[str | None, str]:
    """The digest of the tree that this process runs in, and where it comes from: computed, label or none.

    Emulated targets give the label that was built in, since hashing 150 MB there takes minutes.
    """
    if label is not None:
        return label.read_text().strip(), "label"
    if not TREE_MARK.exists():
        return None, "none"
    return tree_sha256(Path("/")), "computed"


def facts(digest: tuple[str | None, str]) -> dict[str, Any]:
    """The answer of GET /identity; a field that cannot be known here is null."""
    cpu = _cpuinfo()
    return {
        "schema": SCHEMA,
        "tree_sha256": digest[0],
        "tree_sha256_source": digest[1],
        **_blas(),
        "kernel": platform.release(),
        "cpu_model": cpu.get("model name"),
        "cpu_flags": (cpu.get("flags") or "").split(),
        "clocksource": _read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "hypervisor": _hypervisor(cpu),
        "python": platform.python_version(),
        "packages": _packages(),
    }


def _blas() -> dict[str, Any]:
    from threadpoolctl import threadpool_info

    for library in threadpool_info():
        if library.get("user_api") == "blas":
            return {
                "blas_library": f"{library['internal_api']} {library.get('version')}",
                "blas_kernel": library.get("architecture"),
                "blas_threads": library["num_threads"],
            }
    return {"blas_library": None, "blas_kernel": None, "blas_threads": None}


def _packages() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in PACKAGES}


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _cpuinfo() -> dict[str, str]:
    first = (_read("/proc/cpuinfo") or "").split("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _hypervisor(cpu: dict[str, str]) -> str | None:
    """What the kernel says that it runs on; "unknown" for a hypervisor that only shows in the CPU's flags."""
    if "User Mode Linux" in (cpu.get("vendor_id") or "") or cpu.get("mode"):
        return "uml"
    named = _read("/sys/hypervisor/type") or _read("/sys/class/dmi/id/sys_vendor")
    if "hypervisor" in (cpu.get("flags") or "").split():
        return named or "unknown"
    return None
