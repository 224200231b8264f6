"""Which user and network namespace this process is in, and how a command gets into another one."""

import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

from images import shell

SANDBOX = "ISOLATENCY_SANDBOX"  # in the environment of everything that runs in a sandbox: its id
_SO_NETNS_COOKIE = 71
_ALL_IDS = ["0", "0", "4294967295"]
_ASK_COOKIE = (
    "import socket as s, sys; any_socket = s.socket(s.AF_INET, s.SOCK_DGRAM); "
    f"print(int.from_bytes(any_socket.getsockopt(s.SOL_SOCKET, {_SO_NETNS_COOKIE}, 8), sys.byteorder))"
)


def host_root() -> bool:
    """Root of the machine. In a user namespace root may be anybody outside, and has no cgroups and no devices."""
    return os.geteuid() == 0 and _uid_map() == _ALL_IDS


def outer_uid() -> int:
    """This user's number outside of the user namespace, if it is in one: the same inside a sandbox as around it."""
    found = _uid_map()
    return os.geteuid() - int(found[0]) + int(found[1]) if found else os.geteuid()


def _uid_map() -> list[str]:
    return Path("/proc/self/uid_map").read_text().split()[:3]


def netns() -> int:
    """This process's network namespace, by its cookie. Before Linux 5.14 there is none: by its inode.

    An inode number is given to the next namespace as soon as the last one has gone, so that what a dead owner wrote
    down would be taken for something in a living namespace; a cookie is never used twice.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            return int.from_bytes(any_socket.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), sys.byteorder)
        except OSError:
            return Path("/proc/self/ns/net").stat().st_ino


def in_netns(wanted: int) -> list[str] | None:
    """The words that put a command into that network namespace: none if it is ours, None if it is there no longer.

    One that has a name (ip-netns(8)) is there, even if nobody lives in it.
    """
    if wanted == netns():
        return []
    seen = {Path("/proc/self/ns/net").stat().st_ino}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile, or another user's
            inode = (process / "ns/net").stat().st_ino
            if inode not in seen:
                seen.add(inode)
                words = ["nsenter", f"--net={process}/ns/net"]
                if os.geteuid() != 0:
                    words += [f"--user={process}/ns/user", "--preserve-credentials"]
                if _netns_of(words, inode) == wanted:
                    return words
    for name in Path("/run/netns").glob("*"):
        words = ["nsenter", f"--net={name}"]
        with suppress(OSError):
            if _netns_of(words, name.stat().st_ino) == wanted:
                return words
    return None


def _netns_of(words: list[str], inode: int) -> int:
    asked = shell.run([*words, sys.executable, "-ISc", _ASK_COOKIE], changes=False, check=False).stdout.strip()
    return int(asked) if asked else inode
