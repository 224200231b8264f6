"""What this machine can run: each check with what was found and what mends it; each kind with yes, no or not tried."""

import contextlib
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from hostsetup import cgroup, kvm, machine
from hostsetup.kinds import KINDS
from hostsetup.ledger import Ledger
from hostsetup.namespaces import host_root
from hostsetup.sandbox import inside
from images import shell, store, vmm
from images.errors import IsolatencyError

SETUP = "isolatency setup"
BUILD = "isolatency images build"
TRY = "isolatency doctor --try"
SANDBOX = "isolatency sandbox -- …"
DOCKER = "unix:///var/run/docker.sock"
TUN = Path("/dev/net/tun")
APPARMOR = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
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
    """Look at everything; with `attempt`, also try (10 s at most) whether KVM boots a guest, unless it did before."""
    images = _images()
    tried = _try_kvm(images) if attempt and isinstance(images, store.Images) else ""
    checks = (
        _processor(), _python(), _rights(), _tun(), _cgroups(), _memory(), _disk(), _cores(), *_programs(), _engine(),
        _images_check(images), _firecracker(), _kvm(images, tried),
    )  # fmt: skip
    return Findings(checks, _kinds({check.name: check for check in checks}))


def able_kinds() -> dict[str, Verdict]:
    """Kind → verdict, for those that a run takes by default, in the order of a run: what can run right here.

    `examine` says what this machine can run, in a sandbox if need be.
    """
    found = examine().kinds
    if found["docker"].ok and not inside() and not engine_answers():
        found["docker"] = Verdict(False, "no Docker engine answers here; a sandbox has its own", SANDBOX)
    for kind in ("firecracker", "qemu", "uml"):
        if found[kind].ok is not False and os.geteuid() != 0:
            found[kind] = Verdict(False, "a tap needs root here; in a sandbox it does not", SANDBOX)
    return {kind: found[kind] for kind in ("process", "docker", "firecracker", "qemu", "uml")}


def engine_answers() -> bool:
    """Whether a Docker engine answers at DOCKER_HOST. In a sandbox that starts its engine, so do not ask there."""
    import docker  # heavy
    import requests

    try:
        with contextlib.closing(docker.DockerClient(os.environ.get("DOCKER_HOST", DOCKER), timeout=5)) as engine:
            return bool(engine.ping())
    except (docker.errors.DockerException, requests.RequestException, OSError):
        return False


def _processor() -> Check:
    found = platform.machine()
    return Check("processor", found == "x86_64", f"{found} (isolatency runs on x86-64 only)")


def _python() -> Check:
    return Check("python", sys.version_info >= (3, 11), f"{platform.python_version()} (3.11 or later)")


def _rights() -> Check:
    """Tried, not guessed: namespaces as a target and a sandbox have them."""
    who = "root" if host_root() else "root of a user namespace" if os.geteuid() == 0 else "an ordinary user"
    if said := _fails([*_unshare(), "--mount", "--pid", "--fork", "--mount-proc", "true"]):
        fix = allow_namespaces() if os.geteuid() else "run on the machine itself, or in a privileged container"
        return Check("rights", False, f"{who}, who may not make namespaces ({said})", fix)
    if os.geteuid() == 0:
        return Check("rights", True, who)
    return Check("rights", True, f"{who}, with user namespaces: process, and uml and qemu in a sandbox")


def allow_namespaces(switch: Path = APPARMOR) -> str:
    """Ubuntu 24.04 has AppArmor forbid them to ordinary users, by a switch that holds until the next start."""
    restricted = switch.exists() and switch.read_text().strip() != "0"
    return "run as root" + f", or allow them: sudo sysctl kernel.{switch.name}=0" * restricted


def _unshare() -> list[str]:
    return ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "--net"]


def _tun() -> Check:
    """Tried too: a tap in a network namespace of its own."""
    try:
        os.close(os.open(TUN, os.O_RDWR))
    except OSError as error:
        fix = "modprobe tun" if not TUN.exists() else f"chmod 666 {TUN}"
        return Check("tun", False, f"{TUN}: {error.strerror}", fix)
    if said := _fails([*_unshare(), "ip", "tuntap", "add", "dev", "tap0", "mode", "tap"]):
        return Check("tun", False, f"{TUN} opens, but no tap can be made ({said})", "run as root")
    return Check("tun", True, f"{TUN} opens, and a tap can be made")


def _fails(argv: list[str]) -> str:
    """Why a command fails, in its own last words; empty where it does not."""
    try:
        shell.run(argv, changes=False, env=os.environ | {"PATH": machine.search_path()})
    except IsolatencyError as error:
        return str(error)
    return ""


def _cgroups() -> Check:
    found = f"version {cgroup.version()}"
    if cgroup.writable():
        return Check("cgroups", True, found)
    fix = "run on the machine itself" if os.geteuid() == 0 else "run as root"
    return Check("cgroups", False, f"{found}, not to be written: CPU affinity only, memory unlimited", fix)


def _memory() -> Check:
    found = psutil.virtual_memory().total // 2**20
    return Check("memory", found >= MEMORY_MIB, f"{found} MiB ({MEMORY_MIB} MiB for five targets at 512 MiB)")


def _disk() -> Check:
    place = store.cache_dir()
    while not os.path.exists(place):  # noqa: PTH110 (Path.exists raises where a folder above is closed to us)
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
    found = {name: machine.find(name) for name in wanted}
    return [
        Check(name, path is not None, path or f"not found (Debian package {wanted[name]})", "" if path else SETUP)
        for name, path in found.items()
    ]


def _engine() -> Check:
    path = machine.find("dockerd")
    if path is None:
        return Check("dockerd", False, "no Docker engine (a client alone is not enough)", SETUP)
    if not host_root():
        return Check("dockerd", False, f"{path}, but a sandbox starts it for root only", "run as root")
    if machine.lacks_apparmor_parser():
        return Check("dockerd", False, f"{path}, but it starts no container without apparmor_parser here", SETUP)
    return Check("dockerd", True, f"{path}; a sandbox starts its own")


def _images() -> store.Images | IsolatencyError:
    try:
        return store.current()
    except IsolatencyError as error:
        return error
    except OSError as error:
        return IsolatencyError(f"{error.filename}: {error.strerror}")


def _images_check(images: store.Images | IsolatencyError) -> Check:
    if isinstance(images, IsolatencyError):
        return Check("images", False, str(images), BUILD)
    return Check("images", True, f"tree {images.tree_sha256[:12]}…" + (", loaded" if images.loaded else ""))


def _firecracker() -> Check:
    try:
        path, version, _ = vmm.find_firecracker(None)
    except IsolatencyError as error:
        return Check("firecracker", False, str(error), SETUP)
    except OSError as error:
        return Check("firecracker", False, f"{error.filename}: {error.strerror}", SETUP)
    return Check("firecracker", True, f"{path} ({version})")


def _try_kvm(images: store.Images) -> str:
    """Why it could not be tried; empty where it was, or is known to boot. A failed trial may have mended itself."""
    if not kvm.opens() or kvm.kvm_boots(images):
        return ""
    try:
        with Ledger.open("run", "doctor") as ledger:
            kvm.trial(images, ledger)
    except IsolatencyError as error:
        return str(error)
    return ""


def _kvm(images: store.Images | IsolatencyError, untried: str) -> Check:
    """Not whether guests can run, but whether they run on KVM; `untried` is why a trial was not possible."""
    if not kvm.DEVICE.exists():
        return Check("kvm", False, f"no {kvm.DEVICE}: guests run emulated, and are marked so")
    if not kvm.opens():
        return Check("kvm", False, f"{kvm.DEVICE} is not open to you: guests run emulated", "usermod -aG kvm USER")
    if isinstance(images, IsolatencyError):
        return Check("kvm", None, f"{kvm.DEVICE} is there, which proves nothing; trying it takes images", BUILD)
    known = kvm.kvm_boots(images)
    if untried or known is None:
        found = f"it could not be tried: {untried}" if untried else "which proves nothing"
        return Check("kvm", None, f"{kvm.DEVICE} is there, {found}", SETUP if untried else TRY)
    if known:
        return Check("kvm", True, f"{kvm.DEVICE} is there, a guest boots on it")
    said = f"the guest's last word: {kvm.why_not(images)}"
    found = f"but no guest boots on it ({said}): they run emulated, and are marked so"
    return Check("kvm", False, f"{kvm.DEVICE} is there, {found}")


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
    if kind == "firecracker" and boots is False and checks["qemu-system-x86_64"].ok is False:
        lacking.append(checks["qemu-system-x86_64"])
    if lacking:
        return Verdict(False, "; ".join(f"{check.name}: {check.found}" for check in lacking), lacking[0].fix)
    if kind not in ("qemu", "firecracker"):
        why = {"url": "a server that is already there", "docker": "everything is there; a sandbox starts the engine"}
        return Verdict(True, why.get(kind, "everything is there"))
    if boots is None:
        return Verdict(None, "emulated or with KVM: that is known once it was tried", TRY)
    how = "with KVM" if boots else ("emulated (tcg)" if kind == "qemu" else "nested in an emulated host")
    return Verdict(True, how)
