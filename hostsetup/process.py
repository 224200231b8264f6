"""The server as a host process: a chroot of the same tree, the host's own network, one cgroup."""

import os
import signal
import socket
import subprocess
from contextlib import suppress

from hostsetup.ledger import folder
from hostsetup.lifecycle import Lifecycle, bare_environment, private_folder, shell_code_in_words, tree_of
from hostsetup.namespaces import host_root
from images import shell, store
from images.errors import IsolatencyError

STOP_S = 5.0
HOST = "127.0.0.1"

# Runs in mount and PID namespaces of its own. $1: the tree, $2: where it is mounted; the rest is the server's command.
# The tree is read-only; /tmp and /run are in memory, as in a container and in a guest.
_ENTER = """set -e
tree=$1 root=$2; shift 2
mount --bind "$tree" "$root"
mount -o remount,bind,ro "$root"
mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
# Without what is mounted below it (cgroups), as in a guest; a user namespace may bind it with all of that only.
mount --bind /sys "$root/sys" 2>/dev/null || mount --rbind /sys "$root/sys"
mount -o remount,bind,ro,nosuid,nodev,noexec "$root/sys"
mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o nosuid,nodev,mode=755 tmpfs "$root/run"
mount -t tmpfs -o nosuid,noexec,mode=755 tmpfs "$root/dev"
for device in null zero full random urandom; do
    : >"$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
# Not exec: the first process of the namespace stays, as root, with the signal that it gets at the launcher's death. The
# server loses that signal where it becomes user 1000.
"$@"
exit 0
"""


class Process(Lifecycle):
    """In PID and mount namespaces: whoever kills the launcher kills all of it, and its mounts go with it."""

    bound_s = 30.0

    def _start(self) -> str:
        ledger, spec = self.context.ledger, self.spec
        root = private_folder(spec.name, ledger.id, folder())
        self._stack.callback(ledger.remove, ledger.folder(root))
        port = _free_port(int(spec.options.get("port", 0)))
        place = self._placed(spec.mem_mib)
        if not host_root():
            self.caveats.append(f"{spec.name}: its server runs as the namespace's only user, not as user 1000")
        argv = place.argv(
            [*_unshare(), "/bin/sh", "-c", _ENTER, "sh", self.images.tree, root, *self._server(root, port)]
        )
        mark = self._mark()
        with self._output() as console:
            self._process = shell.spawn(argv, env=bare_environment(mark), stdout=console)
        self._stack.callback(self._stop)
        return f"http://{HOST}:{port}"

    def _server(self, root: object, port: int) -> list[str]:
        user = ["--userspec=1000:1000", "--groups="] if host_root() else []
        environment = [f"{key}={value}" for key, value in store.server_env().items()]
        enter = ["/usr/sbin/chroot", *user, str(root)]
        # The tree's own shell, for the working directory: a chroot begins at its root. A shell adds to the environment.
        inside = ["/bin/busybox", "sh", "-c", 'cd /tmp && exec "$@"', "sh", "/bin/busybox", "env", "-i", *environment]
        server = ["/usr/bin/python3.11", "-m", "server", "--host", HOST, "--port", str(port), *self.server_args()]
        return [*enter, *inside, *server]

    def _ended(self) -> str | None:
        code = self._process.poll()
        return None if code is None else shell_code_in_words(code)

    def pids(self) -> list[int]:
        return tree_of(self._process.pid)

    def _stop(self) -> None:
        """SIGTERM to the server (the first process of a namespace takes none); the ledger's SIGKILL follows."""
        for pid in self.pids()[1:]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=STOP_S)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def _unshare() -> list[str]:
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *user, "--mount", "--pid", "--fork", "--kill-child=KILL", "--"]


def _free_port(wanted: int) -> int:
    """The port, or any free one for 0. Another server at it would answer in the place of ours, so it is refused."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, wanted))
        except OSError as error:
            said = (error.strerror or str(error)).lower()
            raise IsolatencyError(
                f"the server cannot have port {wanted} of {HOST} ({said}); name another one, or leave `port` out"
            ) from error
        port: int = listener.getsockname()[1]
        return port
