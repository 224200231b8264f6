"""What this machine can run: each check with what was found and what mends it; each kind with yes, no or not tried."""

import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from hostsetup import kvm
from hostsetup.kinds import KINDS
from hostsetup.ledger import Ledger
from images import shell, store, vmm
from images.errors import IsolatencyError

SETUP = "isolatency setup"
BUILD = "isolatency images build"
TUN = Path("/dev/net/tun")
DISK_MIB = 3000
MEMORY_MIB = 4096


@dataclass(frozen=True)
class Check:
    """One look at the machine. `ok` is None where it was not tried; `fix` is a command, or empty where none helps."""

    name: str
    ok: bool | None
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether a kind can run here; None: not tried yet, and `fix` is the command that tries."""

    ok: bool | None
    why: str
    fix: str = ""


@dataclass(frozen=True)
class Findings:
    checks: tuple[Check, ...]
    kinds: dict[str, Verdict]

    @property
    def able(self) -> bool:
        return any(verdict.ok is not False for kind, verdict in self.kinds.items() if kind != "url")

    def json(self) -> str:
        kinds = {kind: asdict(verdict) for kind, verdict in self.kinds.items()}
        return json.dumps({"schema": 1, "checks": [asdict(check) for check in self.checks], "kinds": kinds}, indent=2)

    def text(self) -> str:
        signs = {True: "yes", False: "no", None: "not tried yet"}
        lines = [f"{signs[c.ok]:<14}{c.name}: {c.found}" + (f"   → {c.fix}" if c.fix else "") for c in self.checks]
        lines += ["", "targets"]
        for kind, verdict in self.kinds.items():
            lines.append(
                f"{signs[verdict.ok]:<14}{kind}: {verdict.why}" + (f"   → {verdict.fix}" if verdict.fix else "")
            )
        return "\n".join(lines)


def examine(*, attempt: bool = False) -> Findings:
    """Look at everything; with `attempt`, also try (10 s at most) whether KVM boots a guest."""
    images = _images()
    if attempt and isinstance(images, store.Images) and kvm.kvm_boots(images) is None:
        with Ledger.open("run", "doctor") as ledger:
            kvm.trial(images, ledger)
    checks = (_processor(), _python(), _rights(), _tun(), _memory(), _disk(), _cores(), *_programs(), _engine(),
              _images_check(images), _firecracker(), _kvm(images))  # fmt: skip
    return Findings(checks, _kinds({check.name: check for check in checks}))


def able_kinds() -> dict[str, Verdict]:
    """Kind → verdict, for those that a run takes by default, in the order of a run."""
    found = examine().kinds
    return {kind: found[kind] for kind in ("process", "docker", "firecracker", "qemu", "uml")}


def _processor() -> Check:
    found = platform.machine()
    return Check("processor", found == "x86_64", f"{found} (isolatency runs on x86-64 only)")


def _python() -> Check:
    return Check("python", sys.version_info >= (3, 11), f"{platform.python_version()} (3.11 or later)")


def _rights() -> Check:
    if os.geteuid() == 0:
        return Check("rights", True, "root")
    done = shell.run(["unshare", "--user", "--map-root-user", "--net", "true"], changes=False, check=False)
    if done.returncode == 0:
        return Check("rights", True, "an ordinary user, with user namespaces: process, uml and qemu, in a sandbox")
    return Check("rights", False, "an ordinary user, and user namespaces are not allowed", "run as root")


def _tun() -> Check:
    try:
        os.close(os.open(TUN, os.O_RDWR))
    except OSError as error:
        fix = "modprobe tun" if not TUN.exists() else f"chmod 666 {TUN}"
        return Check("tun", False, f"{TUN}: {error.strerror}", fix)
    return Check("tun", True, f"{TUN} opens")


def _memory() -> Check:
    found = psutil.virtual_memory().total // 2**20
    return Check("memory", found >= MEMORY_MIB, f"{found} MiB ({MEMORY_MIB} MiB for five targets at 512 MiB)")


def _disk() -> Check:
    place = store.cache_dir()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free // 2**20
    fix = "" if free >= DISK_MIB else "export ISOLATENCY_CACHE=… (a folder with more room)"
    return Check("disk", free >= DISK_MIB, f"{free} MiB free for {store.cache_dir()} ({DISK_MIB} wanted)", fix)


def _cores() -> Check:
    count = len(os.sched_getaffinity(0))
    found = f"{count}" if count > 1 else "1: targets and load client share it, which the result will say"
    return Check("cores", True, found)


def _programs() -> list[Check]:
    wanted = {
        "ip": "iproute2", "unshare": "util-linux", "mkfs.ext4": "e2fsprogs", "mmdebstrap": "mmdebstrap",
        "qemu-system-x86_64": "qemu-system-x86", "iptables": "iptables",
    }  # fmt: skip
    found = {name: shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") for name in wanted}
    return [
        Check(name, path is not None, path or f"not found (Debian package {wanted[name]})", "" if path else SETUP)
        for name, path in found.items()
    ]


def _engine() -> Check:
    path = shutil.which("dockerd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        return Check("dockerd", False, "no Docker engine (a client alone is not enough)", SETUP)
    if os.geteuid() != 0:
        return Check("dockerd", False, f"{path}, but a sandbox starts it as root only", "run as root")
    return Check("dockerd", True, path)


def _images() -> store.Images | IsolatencyError:
    try:
        return store.current()
    except IsolatencyError as error:
        return error


def _images_check(images: store.Images | IsolatencyError) -> Check:
    if isinstance(images, IsolatencyError):
        return Check("images", False, str(images), BUILD)
    return Check("images", True, f"tree {images.tree_sha256[:12]}…" + (", loaded" if images.loaded else ""))


def _firecracker() -> Check:
    try:
        path, version, _ = vmm.find_firecracker(None)
    except IsolatencyError as error:
        return Check("firecracker", False, str(error), SETUP)
    return Check("firecracker", True, f"{path} ({version})")


def _kvm(images: store.Images | IsolatencyError) -> Check:
    if not Path("/dev/kvm").exists():
        return Check("kvm", False, "no /dev/kvm: guests run emulated, and are marked so")
    known = None if isinstance(images, IsolatencyError) else kvm.kvm_boots(images)
    if known is None:
        return Check("kvm", None, "/dev/kvm is there, which proves nothing", "isolatency doctor --try")
    said = "a guest boots on it" if known else "/dev/kvm is there, but no guest boots on it: they run emulated, marked"
    return Check("kvm", known, said)


_NEEDS = {
    "process": ("processor", "rights", "unshare", "images"),
    "docker": ("processor", "dockerd", "images"),
    "firecracker": ("processor", "rights", "tun", "ip", "images", "firecracker", "mkfs.ext4"),
    "qemu": ("processor", "rights", "tun", "ip", "images", "qemu-system-x86_64"),
    "uml": ("processor", "rights", "tun", "ip", "images"),
    "url": (),
}


def _kinds(checks: dict[str, Check]) -> dict[str, Verdict]:
    return {kind: _kind(kind, checks) for kind in KINDS}


def _kind(kind: str, checks: dict[str, Check]) -> Verdict:
    lacking = [checks[name] for name in _NEEDS[kind] if checks[name].ok is False]
    boots = checks["kvm"].ok
    if kind == "firecracker" and boots is not True and checks["qemu-system-x86_64"].ok is False:
        lacking.append(checks["qemu-system-x86_64"])
    if lacking:
        return Verdict(False, "; ".join(f"{check.name}: {check.found}" for check in lacking), lacking[0].fix)
    if kind not in ("qemu", "firecracker"):
        return Verdict(True, "a server that is already there" if kind == "url" else "everything is there")
    if boots is None:
        return Verdict(None, "emulated or with KVM: that is known once it was tried", "isolatency doctor --try")
    how = "with KVM" if boots else ("emulated (tcg)" if kind == "qemu" else "nested in an emulated host")
    return Verdict(True, how)
