"""Whether KVM boots a guest here. /dev/kvm does not say it, nor does a VMM's word: only a guest that boots does."""

import hashlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from hostsetup.ledger import Ledger, folder
from hostsetup.lifecycle import bare_environment, in_words, private_folder
from images import shell, store, vmm
from images.store import Images

DEVICE = Path("/dev/kvm")
BOUND_S = 10.0
SIGN = "guest-init: up after"
_QEMU = "qemu-system-x86_64"
_FIRECRACKER = "firecracker"


def opens() -> bool:
    """Whether there is a /dev/kvm for this user, which proves nothing."""
    return os.access(DEVICE, os.R_OK | os.W_OK)


def kvm_boots(images: Images) -> bool | None:
    """What a trial since this machine's start has found; None where there was none. Without /dev/kvm it is False."""
    return _recorded(images).get("boots") if opens() else False


def why_not(images: Images) -> str:
    """What the trial saw last of a guest that did not boot."""
    return str(_recorded(images).get("said", ""))


def settled(images: Images, ledger: Ledger) -> bool:
    """Whether KVM boots a guest, tried now where nobody has; a dry run tries nothing. Raises as `trial` does."""
    known = kvm_boots(images)
    return trial(images, ledger) if known is None and not shell.dry_run() else bool(known)


def trial(images: Images, ledger: Ledger) -> bool:
    """Boot a guest with KVM, for 10 s at most, and remember the outcome until the machine is started again.

    Raises MissingError where there is no VMM to try with.
    """
    from hostsetup import qemu

    scratch = private_folder("kvm", ledger.id, folder())
    entry = ledger.folder(scratch)
    console = scratch / "console"
    words = ["console=ttyS0", "reboot=t", "panic=-1"]
    try:
        if shutil.which(_QEMU):
            argv = qemu.command("kvm", 1, 256, console, images.vmlinux, images.initrd, words) + qemu.disks(images.ext4)
        else:
            argv = _firecracker(images, scratch, words)
        boots, said = _boots(argv, console, ledger)
    finally:
        ledger.remove(entry)
    record = _record(images)
    for old in record.parent.glob("kvm-*.json"):
        old.unlink(missing_ok=True)
    fresh = record.with_suffix(f".{ledger.id}.part")  # two may try at once
    fresh.write_text(json.dumps({"boots": boots, "said": said, "with": Path(str(argv[0])).name}))
    fresh.replace(record)
    return boots


def _recorded(images: Images) -> dict[str, Any]:
    try:
        found = json.loads(_record(images).read_text())
        return found if isinstance(found["boots"], bool) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _record(images: Images) -> Path:
    """One file for this start of the machine, this guest's kernel and these VMMs."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    named = shutil.which(_FIRECRACKER)
    vmms = [_version_of(shutil.which(_QEMU)), _version_of(named or str(vmm.cached()))]
    key = hashlib.sha256(" ".join([boot, images.digests["vmlinux"], *vmms]).encode()).hexdigest()
    return store.cache_dir() / f"kvm-{key[:16]}.json"


def _version_of(program: str | None) -> str:
    """Another word for another file; to hash it would take longer than all else that a look at the record does."""
    try:
        about = Path(program or "").stat()
    except OSError:
        return "none"
    return f"{program} {about.st_size} {about.st_mtime_ns}" if program else "none"


def _firecracker(images: Images, scratch: Path, words: list[str]) -> list[str | Path]:
    root = {"drive_id": "rootfs", "path_on_host": str(images.ext4), "is_root_device": True, "is_read_only": True}
    boot = {"kernel_image_path": str(images.vmlinux), "initrd_path": str(images.initrd), "boot_args": " ".join(words)}
    settings = {"boot-source": boot, "drives": [root], "machine-config": {"vcpu_count": 1, "mem_size_mib": 256}}
    file = scratch / "vm.json"
    file.write_text(json.dumps(settings))
    return [vmm.find_firecracker()[0], "--no-api", "--config-file", file]


def _boots(argv: list[str | Path], console: Path, ledger: Ledger) -> tuple[bool, str]:
    """Whether the guest says its sign within the bound, and if not, what was said last."""
    entry, mark = ledger.mark("kvm")
    process: subprocess.Popen[bytes] | None = None
    ended: int | None = None
    try:
        with console.open("wb") as output:
            process = shell.spawn(argv, env=bare_environment(mark), stdout=output)
        end = time.monotonic() + BOUND_S
        while ended is None and time.monotonic() < end:
            ended = process.poll()  # looked at before the console: nothing is said afterwards
            if SIGN in console.read_text(errors="replace"):
                return True, ""
            time.sleep(0.05)
        lines = [line.strip() for line in console.read_text(errors="replace").splitlines() if line.strip()]
        how = f"nothing for {BOUND_S:g} s" if ended is None else f"nothing, and it {in_words(ended)}"
        return False, lines[-1] if lines else how
    finally:
        ledger.remove(entry)
        if process is not None:
            process.wait()
