"""QEMU's microvm machine: with KVM where a guest really boots with it, else with its software emulation (TCG)."""

from collections.abc import Sequence
from pathlib import Path

from hostsetup import kvm
from hostsetup.guest import Guest, refuse_long, tsc_khz
from images import shell
from images.errors import MissingError

BINARY = "qemu-system-x86_64"


class Qemu(Guest):
    bound_s = 60.0

    def _boot(self) -> None:
        if self._accel() == "tcg":
            self.bound_s = 150.0
        kernel = self._option_file("kernel", self.images.vmlinux)
        words = ["console=ttyS0", "quiet", "reboot=t", "panic=-1", *tcg_words(self.accel), *self.guest_words()]
        spec = self.spec
        self._launch(
            command(self.accel or "tcg", spec.cpus, spec.mem_mib, self.console, kernel, self.images.initrd, words)
            + disks(self.rootfs)
            + nic(self.slot.tap, self.slot.mac)
        )

    def _accel(self) -> str:
        wanted = self.spec.options.get("accel", "auto")
        boots = kvm.kvm_boots(self.images) is True if wanted == "auto" else wanted == "kvm"
        if wanted == "kvm" and kvm.kvm_boots(self.images) is False:
            raise MissingError(
                f"{self.spec.name} wants accel=kvm, and KVM boots no guest here; see `isolatency doctor`"
            )
        self.accel = "kvm" if boots else "tcg"
        return self.accel


def tcg_words(accel: str | None) -> list[str]:
    """Only under emulation: no mitigations for a CPU that is not there, and the clock rate that it cannot find."""
    if accel == "kvm":
        return []
    rate = "HOST_TSC_KHZ" if shell.dry_run() else tsc_khz()
    return ["mitigations=off", f"tsc_early_khz={rate}", "tsc=reliable"]


def command(
    accel: str, cpus: int, mem_mib: int, console: Path, kernel: Path, initrd: Path, words: Sequence[str]
) -> list[str | Path]:
    return [
        BINARY, "-M", "microvm,acpi=on,auto-kernel-cmdline=off",
        "-accel", "kvm" if accel == "kvm" else "tcg,thread=multi", "-cpu", "host" if accel == "kvm" else "max",
        "-smp", str(cpus), "-m", str(mem_mib), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-chardev", f"file,id=c0,append=on,path={_quoted(console)}", "-serial", "chardev:c0",
        "-kernel", kernel, "-initrd", initrd, "-append", refuse_long(words),
    ]  # fmt: skip


def _quoted(file: Path) -> str:
    """As a value of an option of QEMU's, where a comma ends one."""
    return str(file).replace(",", ",,")


def disks(*files: Path) -> list[str | Path]:
    """Read-only raw disks, vda first; not locked, since other guests have the same root."""
    words: list[str | Path] = []
    for number, file in enumerate(files):
        words += [
            "-drive",
            f"id=d{number},if=none,format=raw,readonly=on,file.locking=off,file={_quoted(file)}",
        ]
        words += ["-device", f"virtio-blk-device,drive=d{number}"]
    return words


def nic(tap: str, mac: str) -> list[str | Path]:
    return [
        "-netdev", f"tap,id=n0,ifname={tap},script=no,downscript=no",
        "-device", f"virtio-net-device,netdev=n0,mac={mac}",
    ]  # fmt: skip
