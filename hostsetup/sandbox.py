"""A private network namespace with a Docker engine of its own; whatever is started in it ends with it.

Outside, `run` is the parent of `unshare` with network, mount and PID namespaces (and a user namespace without root).
Inside, `_Inner` is process 1: it brings loopback up, starts the engine at the first connection to its socket (the
protocol of sd_listen_fds(3)), runs the command and reaps. When process 1 ends, by whatever cause, the kernel ends
everything else; when `run` is killed, its death signal ends `unshare`, and that ends process 1.
"""

import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from hostsetup import ledger as books
from hostsetup import machine
from hostsetup.engine import Engine, engine
from hostsetup.ledger import Ledger
from hostsetup.namespaces import SANDBOX as VARIABLE
from images import shell
from images.errors import IsolatencyError, UsageError

SOCKET = "docker.sock"
COMMAND_STOP_S = 15.0
_INTERRUPT = signal.SIGUSR1  # from `run` to process 1: a SIGINT that was sent to `run` alone
_OUTSIDE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
_INSIDE = (*_OUTSIDE, _INTERRUPT)
_FROM_KERNEL = 0x80  # SI_KERNEL: the terminal's own, which its whole foreground group gets


def inside() -> bool:
    """Whether this process runs in a sandbox."""
    return VARIABLE in os.environ


def run(command: Sequence[str]) -> int:
    """Run a command in a sandbox; returns its exit code (128 + n for signal n). Raises UsageError inside of one."""
    if inside():
        raise UsageError("this is a sandbox already; run the command as it is")
    # Blocked here, they stay so in what is started, until process 1 can handle them: it would lose them before.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _INSIDE)
    try:
        with Ledger.open("sandbox", " ".join(shlex.join(command).split())[:60]) as ledger:
            runtime = books.folder() / f"sandbox-{ledger.id}"  # sockets: their paths must stay below 108 bytes
            entry = ledger.folder(runtime)
            with engine(ledger, runtime) as docker:
                _, mark = ledger.mark("sandbox")
                host = {"DOCKER_HOST": f"unix://{runtime / SOCKET}"}
                environment = os.environ | {VARIABLE: ledger.id} | host | mark
                inner: list[str | Path] = [sys.executable, "-P", "-m", "hostsetup.sandbox", runtime, str(docker)]
                argv = [*_unshare(), *inner, *command]
                process = shell.spawn(argv, env=environment, stdin=None, stdout=None, stderr=None, new_session=False)
                code = _wait(process)
            ledger.remove(entry)  # with the engine's socket, which shows that its containers are gone
            _remove_what_ended_in(ledger.id)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return code if code >= 0 else 128 - code


def but_ignored(numbers: Sequence[signal.Signals]) -> list[signal.Signals]:
    """Without the terminal's end where nohup, or who else began this, wants it to be ignored."""
    return [one for one in numbers if one != signal.SIGHUP or signal.getsignal(one) is not signal.SIG_IGN]


def _unshare() -> list[str | Path]:
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    namespaces = ["--net", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
    return ["setpriv", "--pdeathsig", "KILL", "unshare", *user, *namespaces, "--"]


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Until the sandbox has ended, passing on what only this process was sent."""
    awaited = but_ignored(_OUTSIDE)
    while True:
        received = signal.sigwaitinfo(awaited)
        if received.si_signo == signal.SIGCHLD:
            if (code := process.poll()) is not None:
                return code
        elif received.si_signo != signal.SIGINT:
            _tell(process, signal.SIGTERM)
        elif received.si_code != _FROM_KERNEL:
            _tell(process, _INTERRUPT)


def _tell(unshare: subprocess.Popen[bytes], number: int) -> None:
    """Signal process 1 of the sandbox; where there is none yet, nothing has begun, and it need not."""
    try:
        children = psutil.Process(unshare.pid).children()
        if not children:
            unshare.kill()
        for child in children:
            child.send_signal(number)
    except psutil.NoSuchProcess:
        return  # it has ended meanwhile, which the next SIGCHLD says


def _remove_what_ended_in(sandbox: str) -> None:
    """Kept targets and runs that ended with the sandbox: their cgroups and folders lie outside of its namespaces."""
    for owner in books.owners():
        if owner.sandbox == sandbox and not owner.alive:
            books.remove_dead(owner)


class _Inner:
    """Process 1 of the sandbox."""

    def __init__(self, runtime: Path, docker: Engine, command: Sequence[str]) -> None:
        self._runtime = runtime
        self._docker = docker
        self._command = command
        self._engine = 0
        self._listener: socket.socket | None = None
        self._interrupted_s = 0.0
        self._deadline_s = float("inf")

    def run(self) -> int:
        self._wake, wake = socket.socketpair()
        self._wake.setblocking(False)
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno())
        for number in but_ignored(_INSIDE):
            signal.signal(number, lambda *_: None)  # not SIG_IGN, which the command would inherit
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _INSIDE)
        os.environ.pop(books.MARK)  # it is this process's, with which all others end
        shell.run(["ip", "link", "set", "dev", "lo", "up"])
        self._listen()
        process = shell.spawn(self._command, env=os.environ, stdin=None, stdout=None, stderr=None, new_session=False)
        code = self._serve(process.pid)
        return code if code >= 0 else 128 - code

    def _listen(self) -> None:
        """The engine's socket, where there is an engine."""
        if self._docker.argv:
            self._docker.hide()
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(self._runtime / SOCKET))
            self._listener.listen(64)

    def _serve(self, command: int) -> int:
        """Start the engine when it is wanted, pass signals on, and reap, until the command ends; its exit code."""
        while True:
            for pid, status in self._reap():
                if pid == command:
                    return os.waitstatus_to_exitcode(status)
                if pid == self._engine:
                    self._engine_died()
            left_s = self._deadline_s - time.monotonic()
            if left_s <= 0:
                return -signal.SIGTERM
            waiting = [self._wake] if self._listener is None else [self._wake, self._listener]
            ready = select.select(waiting, [], [], min(left_s, 3600.0))[0]
            if self._wake in ready:
                for number in self._wake.recv(4096):
                    self._received(number, command)
            if self._listener is not None and self._listener in ready:
                self._start_engine(self._listener)
                self._listener = None

    def _reap(self) -> list[tuple[int, int]]:
        ended: list[tuple[int, int]] = []
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return ended
            if not pid:
                return ended
            ended.append((pid, status))

    def _received(self, number: int, command: int) -> None:
        now_s = time.monotonic()
        if number == signal.SIGINT:
            self._interrupted_s = now_s  # sent to the whole group, so the command has it already
        elif number == _INTERRUPT and now_s - self._interrupted_s > 1:
            os.kill(command, signal.SIGINT)
        elif number in (signal.SIGTERM, signal.SIGHUP):
            os.kill(command, signal.SIGTERM)
            self._deadline_s = min(self._deadline_s, now_s + COMMAND_STOP_S)

    def _start_engine(self, listener: socket.socket) -> None:
        # The socket comes in as standard input and has to be descriptor 3; LISTEN_PID has to be the engine's own.
        activate = 'exec 3<&0 </dev/null; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"'
        environment = os.environ | {"PATH": machine.search_path()}
        with self._log().open("wb") as log:
            argv = ["/bin/sh", "-c", activate, "sh", *self._docker.argv]
            process = shell.spawn(argv, env=environment, stdin=listener.fileno(), stdout=log)
        self._engine = process.pid
        listener.close()

    def _log(self) -> Path:
        return self._runtime / "dockerd.log"

    def _engine_died(self) -> None:
        """Say why; the socket's end goes with the engine, so whoever waits for an answer gets an error."""
        self._engine = 0
        tail = self._log().read_text(errors="replace").splitlines()[-5:]
        print("isolatency: the sandbox's Docker engine has ended:", *tail, sep="\n  ", file=sys.stderr, flush=True)


def _main() -> int:
    runtime, docker, *command = sys.argv[1:]
    try:
        return _Inner(Path(runtime), Engine.of(docker), command).run()
    except IsolatencyError as error:
        print(f"isolatency: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"isolatency: {error.filename or command[0]}: {error.strerror}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(_main())
