"""Firecracker, the real one, driven through its API socket; on this machine's KVM, or nested in an emulated host.

The API: Firecracker's own swagger, https://github.com/firecracker-microvm/firecracker (src/firecracker/swagger).
"""

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
from images import shell, vmm
from images.errors import TargetError

TIMEOUT_S = 60.0
SOCKET_S = 10.0
GRACE_S = {"kvm": 5.0, "nested": 25.0}
EXITS = {
    0: "ended", 1: "ended with a general error (1)", 2: "ended with an error of its arguments or its configuration (2)",
    148: "made a system call that its seccomp filter forbids (148)", 149: "was ended by SIGBUS (149)",
    150: "was ended by SIGSEGV (150)", 151: "hit its file size limit, SIGXFSZ (151)",
    152: "found its configuration bad (152)", 153: "found its arguments bad (153)",
    154: "hit its CPU time limit, SIGXCPU (154)", 155: "was ended by SIGPIPE (155)", 156: "was ended by SIGHUP (156)",
    157: "was ended by SIGILL (157)",
}  # fmt: skip


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
        """Raises TargetError with Firecracker's own words where it refuses."""
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
            raise TargetError(f"Firecracker's API broke off at {method} {path}: {error}") from error
        if answer.status_code == 204:
            return None
        try:
            value = answer.json()
        except ValueError:
            value = {"fault_message": answer.text}
        if answer.status_code >= 400:
            found = value.get("fault_message") or value.get("error") or value
            raise TargetError(f"Firecracker refused {method} {path} ({answer.status_code}): {found}")
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

    boot_words = ("swiotlb=noforce",)

    def __init__(self, target: "Firecracker") -> None:
        self._target = target

    def start(self) -> Api:
        socket = self._target.scratch / "api.sock"
        self._target.launch([self._target.binary, "--api-sock", socket, "--id", self._target.spec.name])
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

    def _boot(self) -> None:
        from hostsetup.nested import Nested

        options = self.spec.options
        named = options.get("binary")
        self.binary, version, digest = vmm.find_firecracker(str(named) if named else None)
        self.kernel = self._option_file("kernel", self.images.vmlinux)
        self.initrd = self.images.initrd
        self.accel = "kvm" if kvm.kvm_boots(self.images) else "nested"
        self.bound_s = 60.0 if self.accel == "kvm" else 300.0
        self.caveats.append(f"{self.spec.name}: Firecracker {version}, sha256 {digest[:16]}…")
        place: Place = Here(self) if self.accel == "kvm" else Nested(self)
        self._api = place.start()
        self._configure(place)
        self._api.put("/actions", {"action_type": "InstanceStart"})

    def _configure(self, place: Place) -> None:
        """Everything before the start: logger and metrics first, as the API wants them."""
        spec, options = self.spec, self.spec.options
        for name in ("fc.log", "fc.metrics"):
            if self.accel == "kvm" and not shell.dry_run():
                (self.scratch / name).touch()
        self._api.put("/logger", {"log_path": place.path(self.scratch / "fc.log"), "level": "Warning"})
        self._api.put("/metrics", {"metrics_path": place.path(self.scratch / "fc.metrics")})
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

    def _exit_words(self, code: int) -> str:
        if self.accel == "kvm" and code in EXITS:
            return EXITS[code]
        return super()._exit_words(code)

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
