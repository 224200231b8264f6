"""An emulated host in which the real Firecracker runs where this machine's KVM boots no guest.

QEMU emulates an AMD CPU with SVM in software; a small Linux in it loads kvm_amd and runs the unmodified binary. Its
tap and the machine's tap are one link layer, so the guest has its usual address. Always marked emulated.

Disks of the nested host: vda is the one tree, vdb holds the VMM and the guest's kernel, vdc is the guest's root.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import requests

from hostsetup import qemu
from images import shell, store
from images.ext4 import make_ext4, tree_mib

if TYPE_CHECKING:
    from hostsetup.firecracker import Api, Firecracker

HOST_MIB = 1536
API_PORT = 7000
API_S = 120.0
MODULES = "irqbypass,kvm,kvm-amd,tun,llc,stp,bridge"
HERE = Path(store.__file__).parent


class Nested:
    """Firecracker in an emulated host; its API comes over a relay on a link-local address of the tap."""

    boot_words = ("mitigations=off",)
    tap = "vm0"

    def __init__(self, target: "Firecracker") -> None:
        self._target = target
        index = target.slot.index
        self._ours, self._theirs = f"169.254.{index}.1", f"169.254.{index}.2"

    def start(self) -> "Api":
        from hostsetup.firecracker import Api

        target = self._target
        shell.run(["ip", "address", "add", f"{self._ours}/30", "dev", target.slot.tap])
        words = [
            "console=ttyS0", "quiet", "reboot=t", "panic=-1", *qemu.tcg_words("tcg"), f"isolatency.modules={MODULES}",
            "isolatency.init=/mnt/nested-init", f"isolatency.relay={self._theirs}/30",
            *([f"hugepages={target.huge_pages}"] if target.huge_pages else []),
        ]  # fmt: skip
        spec, images = target.spec, target.images
        argv = qemu.command(
            "tcg", spec.cpus, spec.mem_mib + HOST_MIB, target.console, images.vmlinux, images.initrd, words
        )
        # The nested host's own address: the guest's must stay the guest's.
        mac = f"06:00:A9:FE:{target.slot.index:02X}:02"
        target.launch(argv + qemu.disks(images.ext4, self._tools(), target.rootfs) + qemu.nic(target.slot.tap, mac))
        api = Api(requests.Session(), f"http://{self._theirs}:{API_PORT}")
        target.await_api(api, API_S)
        return api

    def path(self, file: Path) -> str:
        target = self._target
        if file == target.rootfs:
            return "/dev/vdc"
        if file in (target.kernel, target.initrd):
            return f"/mnt/{'vmlinux' if file == target.kernel else file.name}"
        return f"/run/fc{file.suffix}"  # its log, its metrics

    def _tools(self) -> Path:
        target = self._target
        folder, out = target.scratch / "tools", target.scratch / "tools.ext4"
        if shell.dry_run():
            shell.say(f"make {out} of Firecracker, kernel and initramfs")
            return out
        folder.mkdir()
        files = {
            "firecracker": target.binary, "vmlinux": target.kernel, target.initrd.name: target.initrd,
            "relay.py": HERE / "relay.py", "nested-init": HERE / "nested-init",
        }  # fmt: skip
        for name, source in files.items():
            shutil.copyfile(source, folder / name)
            (folder / name).chmod(0o755)
        make_ext4(folder, out, tree_mib(folder) + 8)
        shutil.rmtree(folder)
        return out
