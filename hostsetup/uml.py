"""User-mode Linux: a guest kernel of its own as a host process, at native compute speed, without KVM. One CPU."""

import os
import shutil
from pathlib import Path

from hostsetup.guest import Guest, refuse_long
from images import shell

SHM = Path("/dev/shm")
SPARE_MIB = 64


class Uml(Guest):
    bound_s = 60.0

    def _scratch_parent(self) -> Path:
        """The guest's memory is a file, which belongs on a tmpfs that is not noexec (as /run is)."""
        wanted = (self.spec.mem_mib + SPARE_MIB) * 2**20
        noexec = SHM.is_dir() and os.statvfs(SHM).f_flag & os.ST_NOEXEC
        if SHM.is_dir() and not noexec and shutil.disk_usage(SHM).free >= wanted:
            return SHM
        self.caveats.append(
            f"{self.spec.name}: {SHM} is too small for its memory, or noexec: it is a file on disk instead"
        )
        return Path("/tmp")

    def _boot(self) -> None:
        root = self.scratch / "root.ext4"  # the command line is cut at spaces, which a path of the user's may hold
        if not shell.dry_run():
            root.symlink_to(self.rootfs)
        # ubd0rc: read-only, and not locked (c), since other guests have the same root.
        words = [
            f"mem={self.spec.mem_mib}M", f"ubd0rc={root}", "root=/dev/ubda", "ro", "rootfstype=ext4",
            "init=/sbin/guest-init", "con=null", "con0=null,fd:1", "console=tty0", "quiet", "panic=1",
            f"vec0:transport=tap,ifname={self.slot.tap},mac={self.slot.mac},depth=128,gro=1",
            f"uml_dir={self.scratch}", "umid=guest", *self.guest_words(),
        ]  # fmt: skip
        refuse_long(words, 4000)
        kernel = self._option_file("kernel", self.images.uml)
        # Its guest's processes are processes of the host's, traced; a PID namespace ends them all with the first.
        inside = ["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--"]
        self._launch([*inside, kernel, *words], TMPDIR=str(self.scratch))

    def _stop(self) -> None:
        """At once: the root is read-only, so nothing can be lost, and a signal would not reach the guest."""
        self.process.kill()
        self.process.wait()
