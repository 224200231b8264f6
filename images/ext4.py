"""A folder as an ext4 file system: without root, without a mount, the same bytes for the same folder."""

import os
from pathlib import Path

from images import shell
from images.errors import IsolatencyError, ShellError
from images.tree import EPOCH_S

UUID = "a1150000-0000-4000-8000-000000000001"
SEED = "a1150000-0000-4000-8000-000000000002"
OPTIONS = {"LC_ALL": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "E2FSPROGS_FAKE_TIME": str(EPOCH_S)}


def make_ext4(tree: Path, out: Path, size_mib: int) -> None:
    """Write a sparse file system of `size_mib` that holds `tree`, everything owned by root. A file `out` is replaced.

    No journal, since guests mount it read-only. Raises IsolatencyError where the tree does not fit, ShellError with
    e2fsprogs' own words for anything else; nothing of `out` is left then.
    """
    needed, inodes = tree_mib(tree), max(16384, 2 * _entries(tree))
    if size_mib < needed:
        raise IsolatencyError(f"a root file system of {size_mib} MiB is too small for {tree}; give at least {needed}")
    out.unlink(missing_ok=True)
    try:
        with out.open("wb") as file:
            file.truncate(size_mib << 20)
        shell.run(
            ["mkfs.ext4", "-q", "-F", "-d", tree, "-b", "4096", "-m", "0", "-N", str(inodes), "-L", "isolatency",
             "-U", UUID, "-O", "^has_journal,^metadata_csum,^64bit",
             "-E", f"lazy_itable_init=0,nodiscard,hash_seed={SEED}", out],
            env=OPTIONS,
            timeout_s=300,
        )  # fmt: skip
        _settle(tree, out)
    except BaseException:
        out.unlink(missing_ok=True)
        raise


def tree_mib(tree: Path) -> int:
    """The smallest file system that holds the tree: its blocks, and what ext4 keeps for itself."""
    blocks = 0
    for folder, folders, files in os.walk(tree):
        blocks += 1 + sum((os.lstat(Path(folder, name)).st_size + 4095) // 4096 for name in files)
        blocks += sum(Path(folder, name).is_symlink() for name in folders)
    more = max(0, 2 * _entries(tree) - 16384) * 256  # bytes of inodes beyond the usual number
    return (blocks * 4096 * 101 // 100 + more) // (1 << 20) + 8


def _entries(tree: Path) -> int:
    return sum(len(folders) + len(files) for _, folders, files in os.walk(tree))


def default_mib(tree: Path) -> int:
    """The size where none is asked for: what the tree needs, rounded up to 64 MiB."""
    return -(-tree_mib(tree) // 64) * 64


def _settle(tree: Path, out: Path) -> None:
    """Give every inode root as owner and one fixed time: mkfs copies the builder's uid and the day of the build."""
    paths = ["/"]
    for folder, folders, files in os.walk(tree):
        paths += [f"/{Path(folder, name).relative_to(tree)}" for name in (*folders, *files)]
    values = {"uid": "0", "gid": "0"}
    for time in ("atime", "ctime", "mtime", "crtime"):
        values |= {time: f"@{EPOCH_S}", f"{time}_extra": "0"}
    commands = [f'sif "{path}" {field} {value}' for path in sorted(paths) for field, value in values.items()]
    done = shell.run(["debugfs", "-w", "-f", "/dev/stdin", out], stdin="\n".join(commands) + "\n", env=OPTIONS)
    wrong = [line for line in (done.stdout + done.stderr).splitlines() if line and not line.startswith("debugfs")]
    if wrong:
        raise ShellError(f"debugfs could not settle the owners in {out}: {wrong[0]}")
