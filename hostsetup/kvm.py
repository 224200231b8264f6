"""Whether KVM boots a guest here. /dev/kvm does not say it, nor does a VMM's word: only a guest that boots does."""

import hashlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

from hostsetup.ledger import Ledger, folder
from hostsetup.lifecycle import bare_environment, private_folder
from images import shell, store, vmm
from images.errors import IsolatencyError
from images.store import Images

DEVICE = Path("/dev/kvm")
BOUND_S = 10.0
SIGN = "guest-init: up after"
_QEMU = "qemu-system-x86_64"


def kvm_boots(images: Images) -> bool | None:
    """What a trial since this machine's start has found; None where there was none. Without /dev/kvm it is False."""
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return False
    try:
        return bool(json.loads(_record(images).read_text())["boots"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def trial(images: Images, ledger: Ledger) -> bool:
    """Boot a guest with KVM, for 10 s at most, and remember the outcome until the machine is started again.

    Raises MissingError where there is no VMM to try with.
    """
    from hostsetup import qemu

    scratch = private_folder("kvm", ledger.id, folder())
    entry = ledger.add("dir", path=str(scratch))
    scratch.mkdir()
    console = scratch / "console"
    words = ["console=ttyS0", "reboot=t", "panic=-1"]
    try:
        if shutil.which(_QEMU):
            argv = qemu.command("kvm", 1, 256, console, images.vmlinux, images.initrd, words) + qemu.disks(images.ext4)
        else:
            argv = _firecracker(images, scratch, words)
        boots = _boots(argv, console, ledger)
    finally:
        ledger.remove(entry)
    record = _record(images)
    for old in record.parent.glob("kvm-*.json"):
        old.unlink()
    fresh = record.with_suffix(".part")
    fresh.write_text(json.dumps({"boots": boots, "with": Path(str(argv[0])).name, "tried": time.time()}))
    fresh.replace(record)
    return boots


def _record(images: Images) -> Path:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    qemu = shutil.which(_QEMU)
    vmms = [store.sha256(Path(qemu)) if qemu else "none"]
    try:
        vmms.append(vmm.find_firecracker()[2])
    except IsolatencyError:
        vmms.append("none")
    key = hashlib.sha256(" ".join([boot, images.digests["vmlinux"], *vmms]).encode()).hexdigest()
    return store.cache_dir() / f"kvm-{key[:16]}.json"


def _firecracker(images: Images, scratch: Path, words: list[str]) -> list[str | Path]:
    root = {"drive_id": "rootfs", "path_on_host": str(images.ext4), "is_root_device": True, "is_read_only": True}
    boot = {"kernel_image_path": str(images.vmlinux), "initrd_path": str(images.initrd), "boot_args": " ".join(words)}
    settings = {"boot-source": boot, "drives": [root], "machine-config": {"vcpu_count": 1, "mem_size_mib": 256}}
    file = scratch / "vm.json"
    file.write_text(json.dumps(settings))
    return [vmm.find_firecracker()[0], "--no-api", "--config-file", file]


def _boots(argv: list[str | Path], console: Path, ledger: Ledger) -> bool:
    entry, mark = ledger.mark("kvm")
    process: subprocess.Popen[bytes] | None = None
    try:
        with console.open("wb") as output:
            process = shell.spawn(argv, env=bare_environment(mark), stdout=output)
        end = time.monotonic() + BOUND_S
        while time.monotonic() < end and process.poll() is None:
            if SIGN in console.read_text(errors="replace"):
                return True
            time.sleep(0.05)
        return SIGN in console.read_text(errors="replace")
    finally:
        ledger.remove(entry)
        if process is not None:
            process.wait()
