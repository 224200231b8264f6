"""Firecracker, the real one, driven through its API socket; on this machine's KVM, or nested in an emulated host.

The API: Firecracker's own swagger, https://github.com/firecracker-microvm/firecracker (src/firecracker/swagger).
"""

import re
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import requests
import requests_unixsocket

from hostsetup import kvm
from hostsetup.guest import Guest, refuse_long
from hostsetup.lifecycle import TAIL_LINES, DeathError, shell_code_in_words
from hostsetup.target import Endpoint
from images import shell, vmm
from images.errors import MissingError, TargetError

TIMEOUT_S = 60.0
SOCKET_S = 10.0
HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
GRACE_S = {"kvm": 5.0, "nested": 25.0}
EXITS = {
    0: "ended because its guest did (0)", 1: "ended with a general error (1)",
    2: "ended with an error of its arguments or its configuration (2)",
    148: "made a system call that its seccomp filter forbids (148)", 149: "was ended by SIGBUS (149)",
    150: "was ended by SIGSEGV (150)", 151: "hit its file size limit, SIGXFSZ (151)",
    152: "found its configuration bad (152)", 153: "found its arguments bad (153)",
    154: "hit its CPU time limit, SIGXCPU (154)", 155: "was ended by SIGPIPE (155)", 156: "was ended by SIGHUP (156)",
    157: "was ended by SIGILL (157)",
}  # fmt: skip


class RefusedError(TargetError):
    """Firecracker does not want what was asked of it; the message carries its own words."""


class BrokenError(TargetError):
    """Firecracker's API broke off."""


class Api:
    """One Firecracker's API. `base` is a URL that `session` understands: http+unix://…, or http:// of the relay."""

    def __init__(self, session: requests.Session, base: str) -> None:
        session.trust_env = False
        self._session = session
        self._base = base

    @classmethod
    def of_socket(cls, socket: Path) -> "Api":
        return cls(requests_unixsocket.Session(), f"http+unix://{quote(str(socket), safe='')}")

    def get(self, path: str) -> Any:
        return self._call("GET", path, None)

    def put(self, path: str, body: dict[str, Any]) -> None:
        """Raises RefusedError with Firecracker's own words, BrokenError where there is no answer."""
        if shell.dry_run():
            shell.say(f"PUT {path} {body}")
        else:
            self._call("PUT", path, body)

    def answers(self) -> bool:
        try:
            return bool(self._session.get(self._base + "/", timeout=2).ok)
        except requests.RequestException:
            return False

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        try:
            answer = self._session.request(method, self._base + path, json=body, timeout=TIMEOUT_S)
        except requests.RequestException as error:
            raise BrokenError(f"Firecracker's API broke off at {method} {path}: {error}") from error
        if answer.status_code == 204:
            return None
        try:
            value = answer.json()
        except ValueError:
            value = {"fault_message": answer.text}
        if answer.status_code >= 400:
            found = value.get("fault_message") or value.get("error") or value
            raise RefusedError(f"Firecracker refused {method} {path} ({answer.status_code}): {found}")
        return value


class Place(Protocol):
    """Where the VMM process lives: `start` returns its API once that answers, `path` is a host file as it sees it."""

    @property
    def boot_words(self) -> tuple[str, ...]: ...

    def start(self) -> Api: ...

    def path(self, file: Path) -> str: ...

    @property
    def tap(self) -> str: ...


class Here:
    """On this machine, with its KVM."""

    boot_words = ("swiotlb=noforce",)  # no bounce buffers are wanted of it: they cost boot time

    def __init__(self, target: "Firecracker") -> None:
        self._target = target

    def start(self) -> Api:
        self._target.want_huge_pages()
        socket = self._target.scratch / "api.sock"
        name = re.sub("[^A-Za-z0-9-]", "-", self._target.spec.name)  # all that Firecracker takes
        self._target.launch([self._target.binary, "--api-sock", socket, "--id", name])
        api = Api.of_socket(socket)
        self._target.await_api(api, SOCKET_S)
        return api

    def path(self, file: Path) -> str:
        return str(file)

    @property
    def tap(self) -> str:
        return self._target.slot.tap


class Firecracker(Guest):
    bound_s = 60.0

    def __enter__(self) -> Endpoint:
        """Now and then (1 of 24 boots, measured) QEMU's emulation of SVM lets a guest's kernel panic early.

        So a nested start in which something died is repeated, once; not where it was the server that ended.
        """
        try:
            return super().__enter__()
        except (DeathError, BrokenError) as error:
            if self.accel != "nested" or self._server_code() is not None:
                raise
            self.caveats = [f"{self.spec.name}: its first start failed and was repeated: {error}"]
            return super().__enter__()

    def _boot(self) -> None:
        from hostsetup.nested import Nested

        if not shell.dry_run():
            self.log.unlink(missing_ok=True)  # an earlier start's
        options = self.spec.options
        named = options.get("binary")
        self.binary, version, digest = vmm.find_firecracker(str(named) if named else None)
        self.kernel = self._option_file("kernel", self.images.vmlinux)
        self.initrd = self.images.initrd
        self.accel = "kvm" if kvm.kvm_boots(self.images) else "nested"
        self.bound_s = 60.0 if self.accel == "kvm" else 300.0
        if named:
            self.caveats.append(f"{self.spec.name}: a binary of its own, Firecracker {version}, sha256 {digest}")
        place: Place = Here(self) if self.accel == "kvm" else Nested(self)
        self._api = place.start()
        self._configure(place)
        self._api.put("/actions", {"action_type": "InstanceStart"})

    def _configure(self, place: Place) -> None:
        """Everything before the start: logger and metrics first, as the API wants them."""
        spec, options = self.spec, self.spec.options
        metrics = self.scratch / "fc.metrics"
        if self.accel == "kvm" and not shell.dry_run():  # Firecracker wants both to be there
            self.log.touch()
            metrics.touch()
        self._api.put("/logger", {"log_path": place.path(self.log), "level": "Warning"})
        self._api.put("/metrics", {"metrics_path": place.path(metrics)})
        machine = {"vcpu_count": spec.cpus, "mem_size_mib": spec.mem_mib, "smt": False}
        if "huge_pages" in options:
            machine["huge_pages"] = options["huge_pages"]  # type: ignore[assignment]
        self._api.put("/machine-config", machine)
        console = ["console=ttyS0", "quiet"] if options.get("console", True) else ["8250.nr_uarts=0"]
        keyboard = ["i8042.noaux", "i8042.nomux", "i8042.dumbkbd"]
        words = [*console, "reboot=k", "panic=1", *keyboard, *place.boot_words, *self.guest_words()]
        boot = {
            "kernel_image_path": place.path(self.kernel), "initrd_path": place.path(self.initrd),
            "boot_args": refuse_long(words),
        }  # fmt: skip
        self._api.put("/boot-source", boot)
        drive = {
            "drive_id": "rootfs", "path_on_host": place.path(self.rootfs), "is_root_device": True, "is_read_only": True,
        }  # fmt: skip
        self._api.put("/drives/rootfs", drive | {k: options[k] for k in ("io_engine", "cache_type") if k in options})
        interface = {"iface_id": "eth0", "guest_mac": self.slot.mac, "host_dev_name": place.tap}
        self._api.put("/network-interfaces/eth0", interface)

    @property
    def huge_pages(self) -> int:
        """How many pages of 2 MiB the guest's memory takes; 0 where they were not asked for."""
        return -(-self.spec.mem_mib // 2) if self.spec.options.get("huge_pages") == "2M" else 0

    def want_huge_pages(self) -> None:
        """Raises MissingError where this machine has too few free: Firecracker would blame the kernel image."""
        if not self.huge_pages or shell.dry_run():
            return
        there = {
            name: int((HUGE_PAGES / name).read_text()) if HUGE_PAGES.is_dir() else 0
            for name in ("nr_hugepages", "free_hugepages")
        }
        if (lacking := self.huge_pages - there["free_hugepages"]) > 0:
            raise MissingError(
                f"{self.spec.name} wants {self.huge_pages} pages of 2 MiB for huge_pages=2M, "
                f"{there['free_hugepages']} are free; set more aside: "
                f"sysctl vm.nr_hugepages={there['nr_hugepages'] + lacking}"
            )

    def launch(self, argv: list[str | Path]) -> None:
        self._launch(argv)

    def await_api(self, api: Api, bound_s: float) -> None:
        """Until the API answers. Raises TargetError after the bound, or when the VMM ends."""
        end = time.monotonic() + bound_s
        while not shell.dry_run() and not api.answers():
            self.check()
            if time.monotonic() > end:
                raise TargetError(f"{self.spec.name}: Firecracker's API did not answer within {bound_s:g} s")
            time.sleep(0.05)

    @property
    def log(self) -> Path:
        """Firecracker's own log; a nested one's stands in the console."""
        return self.context.logs / f"{self.spec.name}.firecracker.log"

    def _tail(self) -> str:
        try:
            log = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        except OSError:
            log = []
        return "\n".join([*super()._tail().splitlines(), *log])

    def _exit_words(self, code: int) -> str:
        if self.accel == "kvm":
            return EXITS.get(code) or super()._exit_words(code)
        # What ended is the emulated host; why Firecracker ended in it stands in the console.
        found = re.findall(r"nested-init: firecracker ended with (\d+)", self._said())
        if not found:
            return f"went down with its emulated host, which {super()._exit_words(code)}"
        inner = int(found[-1])
        return EXITS.get(inner) or shell_code_in_words(inner)

    def _stop(self) -> None:
        """Ask the guest by Ctrl-Alt-Del (it reboots, which ends Firecracker), then SIGTERM, then SIGKILL."""
        clean = False
        if self.process.poll() is None and hasattr(self, "_api") and not shell.dry_run():
            with suppress(TargetError, subprocess.TimeoutExpired):
                self._api.put("/actions", {"action_type": "SendCtrlAltDel"})
                clean = self.process.wait(timeout=GRACE_S[self.accel or "kvm"]) == 0
        super()._stop()
        if clean:
            self.console.unlink(missing_ok=True)
            self.log.unlink(missing_ok=True)
