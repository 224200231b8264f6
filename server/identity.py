"""What this target is: the tree that it runs, kernel, CPU, BLAS kernel, versions. Imports only the standard library."""

import contextlib
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
APP = Path("/opt/app")  # where the server lies in a tree of ours, beside the file `env`
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

    What a runtime mounts over or puts in (see MOUNTED, REPLACED, LEFT_OUT) has one fixed form, there or not, or is
    left out, so that a chroot, a container and a guest see the same tree. POSIX.1-2001 (pax) format, entries sorted by
    the bytes of their paths. Raises OSError for a file that cannot be read.
    """
    found = dict.fromkeys([*MOUNTED, *REPLACED], root) | dict(_walk(root, ""))
    with tarfile.open(
        fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as tar:  # type: ignore[call-overload]
        for name in sorted(found, key=os.fsencode):
            _add(tar, name, found[name])


def tree_sha256(root: Path) -> str:
    """sha256 of the canonical tar of the tree below `root`, in hex."""
    sink = _Hash()
    write_canonical_tar(root, sink)
    return sink.digest.hexdigest()


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    """Every entry below `folder` as (name, path)."""
    with os.scandir(folder) as entries:
        listed = list(entries)
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
    if name in MOUNTED:
        info.type, info.mode = tarfile.DIRTYPE, MOUNTED[name]
        tar.addfile(info)
        return
    if name in REPLACED:
        info.mode = 0o644
        tar.addfile(info)
        return
    found = path.lstat()
    info.mode = stat.S_IMODE(found.st_mode)
    if stat.S_ISREG(found.st_mode):
        info.size = found.st_size
        with path.open("rb") as content:
            tar.addfile(info, content)
    elif stat.S_ISDIR(found.st_mode):
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    elif stat.S_ISLNK(found.st_mode):
        # os.readlink, since Path.readlink gives the link's text in another spelling
        info.type, info.mode, info.linkname = tarfile.SYMTYPE, 0o777, os.readlink(path)  # noqa: PTH115
        tar.addfile(info)
    # else a device, a pipe or a socket, which belong to no tree


def read_label(file: Path) -> str:
    """The digest in a label file. Raises OSError, or ValueError for a file that holds something else."""
    text = file.read_text().strip()
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise ValueError(f"{file}: wanted a sha256 in hex; found {text[:80]!r}")
    return text


def digest_of_this_tree(label: str | None) -> tuple[str | None, str]:
    """The digest of the tree that this process runs in, and where it comes from: computed, label or none.

    Emulated targets give the label that was built in, since hashing 150 MB there takes minutes. Raises OSError for a
    file that cannot be read.
    """
    if label is not None:
        return label, "label"
    if not Path(__file__).is_relative_to(APP) or not (APP / "env").exists():
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
        "cpu_flags": cpu["flags"].split() if "flags" in cpu else None,
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


def _packages() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # its description was left out of the tree
            found[name] = version(name)
    return found


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
