"""What the three guests share: a tap, a root file system, the kernel's command line, a console, one VMM process."""

import base64
import ctypes
import mmap
import re
import signal
import subprocess
import time
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hostsetup import network
from hostsetup.ledger import folder
from hostsetup.lifecycle import Lifecycle, bare_environment, in_words, private_folder, shell_code_in_words, tree_of
from hostsetup.target import PORT
from images import shell
from images.errors import MissingError, UsageError
from images.ext4 import make_ext4

STOP_S = 10.0


class Guest(Lifecycle):
    """A VMM in a cpuset on the target's cores; its memory is the guest's, and its own on top."""

    def _start(self) -> str:
        ledger = self.context.ledger
        self.slot = slot = self._stack.enter_context(network.guest_slot(ledger))
        # Told, not asked for: the kernel repeats an unanswered question after a second, which would blur `ready_s`.
        neighbour = [slot.guest_ip, "lladdr", slot.mac, "nud", "permanent", "dev", slot.tap]
        shell.run(["ip", "neighbour", "replace", *neighbour])
        if self.context.internet:
            self._stack.enter_context(network.internet(ledger, self.slot))
        self.scratch = private_folder(self.spec.name, ledger.id, self._scratch_parent())
        self._stack.callback(ledger.remove, ledger.folder(self.scratch))
        self.rootfs = self._rootfs()
        self._boot()
        return f"http://{self.slot.guest_ip}:{PORT}"

    def _scratch_parent(self) -> Path:
        return folder()

    @abstractmethod
    def _boot(self) -> None:
        """Start the VMM, and the guest in it."""

    def _rootfs(self) -> Path:
        size = self.spec.options.get("rootfs_mib")
        if size is None:
            return self.images.ext4
        # A file of gigabytes, though a sparse one, belongs on a disk and not into memory.
        place = private_folder(f"{self.spec.name}-root", self.context.ledger.id, self.images.root.parent.parent)
        self._stack.callback(self.context.ledger.remove, self.context.ledger.folder(place))
        if shell.dry_run():
            shell.say(f"make a root file system of {size} MiB")
        else:
            make_ext4(self.images.tree, place / "root.ext4", int(size))
        return place / "root.ext4"

    def _option_file(self, key: str, default: Path) -> Path:
        """The file that an option names, made absolute. Raises MissingError where it is not there."""
        named = self.spec.options.get(key)
        path = Path(str(named)).absolute() if named else default
        if not path.is_file():
            raise MissingError(f"{self.spec.name}: {key}={named}: no such file")
        return path

    def guest_words(self) -> list[str]:
        """What guest-init reads from the kernel's command line, and the user's boot_args."""
        argv = base64.b64encode("\n".join(self.server_args()).encode()).decode()
        words = [
            f"isolatency.ip={self.slot.guest_ip}/24",
            f"isolatency.gw={self.slot.host_ip}",
            f"isolatency.argv={argv}",
        ]
        if self.context.internet and (server := network.nameserver()):
            words.append(f"isolatency.dns={server}")
        return words + str(self.spec.options.get("boot_args", "")).split()

    def _launch(self, argv: Sequence[str | Path], *, input_fd: int = subprocess.DEVNULL, **environment: str) -> None:
        """Start the VMM, marked and on its cores; its output is the console where it is not told another place."""
        place = self._placed(None)
        mark = self._mark()
        self.started = time.monotonic()
        with self._output() as console:
            self.process = shell.spawn(
                place.argv(argv), env=bare_environment(mark, **environment), stdout=console, stdin=input_fd
            )
        self._stack.callback(self._stop)

    def _ended(self) -> str | None:
        code = self.process.poll()
        if code is None:
            return None
        server = self._server_code()
        return (
            self._exit_words(code) if server is None else f"ended with its server, which {shell_code_in_words(server)}"
        )

    def _server_code(self) -> int | None:
        """What guest-init said of the server's end, if it did."""
        found = re.findall(r"guest-init: server ended with (\d+)", self._said())
        return int(found[-1]) if found else None

    def _exit_words(self, code: int) -> str:
        return in_words(code)

    def pids(self) -> list[int]:
        return tree_of(self.process.pid)

    def _stop(self) -> None:
        """SIGTERM, and SIGKILL after a while; the ledger makes sure."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=STOP_S)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def tsc_khz(seconds: float = 0.2) -> int:
    """The rate of this machine's time stamp counter: a microVM without HPET or PIT cannot measure it, so it is told."""
    code = bytes.fromhex("0f3148c1e2204809d0c3")  # rdtsc; shl rdx, 32; or rax, rdx; ret
    with mmap.mmap(-1, len(code), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(code)
        anchor = ctypes.c_char.from_buffer(page)
        read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(anchor))
        first, start = int(read()), time.monotonic_ns()
        time.sleep(seconds)
        second, end = int(read()), time.monotonic_ns()
        del anchor
    return round((second - first) * 1e6 / (end - start))


def refuse_long(words: Sequence[str], limit: int = 2047) -> str:
    """The kernel's command line. Raises UsageError where the kernel would cut it."""
    line = " ".join(words)
    if len(line) > limit:
        raise UsageError(f"the kernel's command line takes {limit} characters; found {len(line)}: shorten boot_args")
    return line
