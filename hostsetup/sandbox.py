"""A private network namespace with a Docker engine of its own; whatever is started in it ends with it.

Outside, `run` is the parent of `unshare` with network, mount and PID namespaces (and a user namespace without root).
Inside, `_Inner` is process 1: it brings loopback up, starts the engine at the first connection to its socket (the
protocol of sd_listen_fds(3)), runs the command and reaps. When process 1 ends, by whatever cause, the kernel ends
everything else; when `run` is killed, its death signal ends `unshare`, and that ends process 1.
"""

import contextlib
import os
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import psutil

from hostsetup import ledger as books
from hostsetup.ledger import Ledger
from images import shell, store
from images.errors import IsolatencyError, UsageError

VARIABLE = "ISOLATENCY_SANDBOX"
COMMAND_STOP_S = 15.0
ENGINE_STOP_S = 10.0


def inside() -> bool:
    """Whether this process runs in a sandbox."""
    return VARIABLE in os.environ


def run(command: Sequence[str]) -> int:
    """Run a command in a sandbox; returns its exit code (128 + n for signal n). Raises UsageError inside of one."""
    if inside():
        raise UsageError("this is a sandbox already; run the command as it is")
    with Ledger.open("sandbox", command[0]) as ledger:
        runtime = _folder(ledger, books.folder())  # sockets: their paths must stay below 108 bytes
        data = _folder(ledger, store.cache_dir())
        ledger.add("cgroup", name=_cgroup(ledger.id))
        environment = os.environ | {VARIABLE: ledger.id, "DOCKER_HOST": f"unix://{runtime / 'docker.sock'}"}
        argv = [*_unshare(), sys.executable, "-m", "hostsetup.sandbox", ledger.id, runtime, data, *command]
        process = shell.spawn(argv, env=environment, stdin=None, stdout=None, stderr=None, new_session=False)
        with _passing_signals(process.pid):
            code = process.wait()
    return code if code >= 0 else 128 - code


def _folder(ledger: Ledger, parent: Path) -> Path:
    path = parent / f"sandbox-{ledger.id}"
    ledger.add("dir", path=str(path))
    path.mkdir(parents=True)
    return path


def _unshare() -> list[str | Path]:
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    namespaces = ["--net", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
    return ["setpriv", "--pdeathsig", "KILL", "unshare", *user, *namespaces, "--"]


def _cgroup(owner: str) -> str:
    return f"isolatency-{owner}-engine"


@contextlib.contextmanager
def _passing_signals(unshare: int) -> Iterator[None]:
    """A terminal's Ctrl-C reaches the command by itself; SIGTERM and SIGHUP go to process 1 of the sandbox."""

    def forward(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(unshare).children():
                child.send_signal(signal.SIGTERM)

    handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: forward, signal.SIGHUP: forward}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Inner:
    """Process 1 of the sandbox."""

    def __init__(self, owner: str, runtime: Path, data: Path, command: Sequence[str]) -> None:
        self._owner = owner
        self._runtime = runtime
        self._data = data
        self._command = command
        self._engine = 0
        self._listener: socket.socket | None = None
        self._wake, wake = socket.socketpair()
        self._wake.setblocking(False)
        wake.setblocking(False)
        self._wakes = wake
        signal.set_wakeup_fd(wake.fileno())

    def run(self) -> int:
        # A handler, not SIG_IGN: an ignored signal would stay ignored in the command.
        for number in (signal.SIGINT, signal.SIGCHLD, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        shell.run(["ip", "link", "set", "dev", "lo", "up"])
        self._listen()
        process = shell.spawn(self._command, env=os.environ, stdin=None, stdout=None, stderr=None, new_session=False)
        signal.signal(signal.SIGTERM, lambda *_: self._terminate(process.pid))
        status = self._serve_until(process.pid, None)
        self._end_kept()
        if self._engine:
            self._signal(self._engine, signal.SIGTERM)
            self._serve_until(self._engine, ENGINE_STOP_S)
        code = os.waitstatus_to_exitcode(status) if status is not None else 1
        return code if code >= 0 else 128 - code

    def _listen(self) -> None:
        """The engine's socket. Without dockerd or without root it does not exist, so nobody reaches another engine."""
        if shutil.which("dockerd") is None or not _is_root():
            return
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._runtime / "docker.sock"))
        self._listener.listen(64)

    def _serve_until(self, pid: int, patience_s: float | None) -> int | None:
        """Start the engine when it is wanted, and reap, until `pid` has ended; its wait status, None if it has not."""
        end = None if patience_s is None else time.monotonic() + patience_s
        while True:
            while (reaped := self._reap()) is not None:
                if reaped[0] == pid:
                    return reaped[1]
                if reaped[0] == self._engine:
                    self._engine_died()
            left = None if end is None else max(end - time.monotonic(), 0)
            if left == 0:
                return None
            waiting = [self._wake] if self._listener is None else [self._wake, self._listener]
            ready = select.select(waiting, [], [], left)[0]
            if self._wake in ready:
                with contextlib.suppress(BlockingIOError):
                    self._wake.recv(4096)
            if self._listener is not None and self._listener in ready:
                self._start_engine()

    def _reap(self) -> tuple[int, int] | None:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        return (pid, status) if pid else None

    def _start_engine(self) -> None:
        assert self._listener is not None
        arguments: list[str | Path] = [
            "-H", "fd://", "--data-root", self._data / "docker", "--exec-root", self._runtime / "exec",
            "--pidfile", self._runtime / "docker.pid", "--cgroup-parent", f"/{_cgroup(self._owner)}",
            "--exec-opt", "native.cgroupdriver=cgroupfs", "--userland-proxy=false", "--log-level", "warn",
        ]  # fmt: skip
        # The socket comes in as standard input and has to be descriptor 3; LISTEN_PID has to be the engine's own.
        activate = 'exec 3<&0 </dev/null; export LISTEN_FDS=1 LISTEN_PID=$$; exec dockerd "$@"'
        with self._log().open("wb") as log:
            process = shell.spawn(
                ["/bin/sh", "-c", activate, "sh", *arguments], env=os.environ, stdin=self._listener.fileno(), stdout=log
            )
        self._engine = process.pid
        self._listener.close()
        self._listener = None

    def _log(self) -> Path:
        return self._data / "dockerd.log"

    def _engine_died(self) -> None:
        """Say why; the socket's end goes with the engine, so whoever waits for an answer gets an error."""
        self._engine = 0
        tail = self._log().read_text(errors="replace").splitlines()[-5:]
        print("isolatency: the sandbox's Docker engine has ended:", *tail, sep="\n  ", file=sys.stderr, flush=True)

    def _terminate(self, pid: int) -> None:
        """Ask the command to end; process 1 ends, and all with it, when it has not after a while."""
        self._signal(pid, signal.SIGTERM)
        signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + signal.SIGTERM))
        signal.alarm(int(COMMAND_STOP_S))

    def _end_kept(self) -> None:
        """Targets kept by `up` are taken down in order, so that they leave nothing; then the kernel ends the rest."""
        for owner in books.owners():
            if owner.alive and owner.what == "kept" and owner.netns == books.netns():
                with contextlib.suppress(IsolatencyError):
                    books.end_owner(owner)

    def _signal(self, pid: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _is_root() -> bool:
    """Root of the machine: in a user namespace the engine could not do its work."""
    return Path("/proc/self/uid_map").read_text().split()[:2] == ["0", "0"] and os.geteuid() == 0


def _main() -> int:
    owner, runtime, data, *command = sys.argv[1:]
    try:
        return _Inner(owner, Path(runtime), Path(data), command).run()
    except IsolatencyError as error:
        print(f"isolatency: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(_main())
