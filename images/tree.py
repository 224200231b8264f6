"""The one tree that every target runs: Debian's packages, the wheels, the server, bytecode. Nothing of the host.

No step needs root. Modes are reduced to what is readable by everybody and writable by the owner, owners are left to
the canonical tar and to the file system's maker, so that the same inputs give the same tree whoever builds it.
"""

import fnmatch
import os
import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from images import shell
from images.errors import IsolatencyError
from images.pins import Pins, Wheel
from images.store import HERE, SERVER, server_files, sha256

EPOCH_S = 1_700_000_000  # any fixed time will do; after 1980, since zip files know none before
PYTHON = "usr/bin/python3.11"
SITE = "opt/app/site"
PLATFORMS = [tag for glibc in (17, 27, 28) for tag in ("--platform", f"manylinux_2_{glibc}_x86_64")]

# Left out of Debian's packages: what only apt, dpkg or a reader of manuals uses, and parts of the standard library
# that a server never imports. Licences (usr/share/doc/*/copyright) stay: the tree is passed on by `images save`.
DROPPED = (
    "etc/apt", "etc/cron*", "etc/debconf*", "etc/dpkg", "etc/fstab", "etc/logrotate.d", "etc/mtab", "etc/update-motd.d",
    "usr/bin/c_rehash", "usr/bin/debconf*", "usr/bin/dpkg*", "usr/bin/update-alternatives", "usr/games",
    "usr/include", "usr/lib/dpkg", "usr/libexec/dpkg", "usr/sbin",
    "usr/lib/python3.11/ensurepip", "usr/lib/python3.11/idlelib", "usr/lib/python3.11/lib2to3",
    "usr/lib/python3.11/pydoc_data", "usr/lib/python3.11/test", "usr/lib/python3.11/turtledemo",
    "usr/share/bash-completion", "usr/share/binfmts", "usr/share/bug", "usr/share/debconf", "usr/share/dpkg",
    "usr/share/gcc", "usr/share/gdb", "usr/share/info", "usr/share/initramfs-tools", "usr/share/lintian",
    "usr/share/locale", "usr/share/man", "usr/share/perl5", "usr/share/pixmaps", "usr/share/polkit-1",
    "var/backups", "var/cache/*", "var/lib/apt", "var/lib/dpkg", "var/log/*", "var/mail", "var/spool",
)  # fmt: skip

# What the canonical form of the tree shows as empty (server/identity.py): each target mounts or writes its own.
EMPTY_FOLDERS = ("dev", "mnt", "proc", "run", "sys", "tmp")
EMPTY_FILES = ("etc/hosts", "etc/hostname", "etc/resolv.conf")


def unpack(archive: Path, tree: Path, dropped: Sequence[str] = ()) -> None:
    """Unpack a tar of files, folders and links into `tree`, without what the patterns `dropped` match, and all below.

    Hard links become files of their own, devices are left out. Raises IsolatencyError for a name that leads out of
    the tree (an archive may come from elsewhere), tarfile.TarError and OSError as they come.
    """
    root = tree.resolve()
    forms = [form for path in dropped for form in (path, f"{path}/*")]
    unwanted = re.compile("|".join(map(fnmatch.translate, forms)) or "(?!)")
    with tarfile.open(archive) as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts:
                raise IsolatencyError(f"{archive} holds the name {member.name!r}, which leads out of the tree")
            if not name.parts or unwanted.match(str(name)):
                continue
            path = root / name
            if not path.parent.resolve().is_relative_to(root):
                raise IsolatencyError(f"{archive} holds {member.name!r} below a link that leads out of the tree")
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
                path.chmod(0o755)
            elif member.issym():
                path.symlink_to(member.linkname)
            elif member.isreg() or member.islnk():
                source = tar.extractfile(member)
                assert source is not None
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
                path.chmod(0o755 if member.mode & 0o111 else 0o644)


def make(base: Path, wheels: Path, pins: Pins, tree: Path) -> None:
    """Make the tree in the new folder `tree` from Debian's tar and the folder of wheels."""
    tree.mkdir()
    tree.chmod(0o755)
    unpack(base, tree, DROPPED)
    _prune_documents(tree)
    _add(tree, "etc/passwd", "root:x:0:0:root:/:/bin/sh\nserver:x:1000:1000:server:/tmp:/bin/sh\n")
    _add(tree, "etc/group", "root:x:0:\nserver:x:1000:\n")
    (tree / "bin/sh").symlink_to("busybox")  # for people who look inside; nothing of ours uses it
    _add(tree, "sbin/guest-init", (HERE / "guest-init").read_text(), 0o755)
    _add(tree, "opt/app/env", (HERE / "server.env").read_text())
    for wheel in pins.wheels:
        install_wheel(wheels / wheel.file, tree / SITE)
    for name in server_files():
        target = tree / "opt/app/server" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SERVER / name, target)
    for folder in EMPTY_FOLDERS:
        shutil.rmtree(tree / folder, ignore_errors=True)
        (tree / folder).mkdir()
    for file in EMPTY_FILES:
        _add(tree, file, "")
    compile_bytecode(tree)
    finish(tree)


def finish(tree: Path) -> None:
    """Set what unpacking cannot: modes without the host's umask, one fixed time for everything."""
    for folder, folders, files in os.walk(tree, topdown=False):
        for name in [*files, *folders]:
            path = Path(folder, name)
            if not path.is_symlink():
                executable = path.is_dir() or path.stat().st_mode & 0o100
                path.chmod(0o755 if executable else 0o644)
            os.utime(path, (EPOCH_S, EPOCH_S), follow_symlinks=False)
    (tree / "tmp").chmod(0o1777)
    os.utime(tree, (EPOCH_S, EPOCH_S))


def label(tree: Path, tree_sha256: str) -> None:
    """Write the tree's digest into it, for targets too slow to compute it; the canonical form leaves this file out."""
    _add(tree, ".tree-sha256", tree_sha256 + "\n")
    os.utime(tree / ".tree-sha256", (EPOCH_S, EPOCH_S))
    os.utime(tree, (EPOCH_S, EPOCH_S))


def fetch_wheels(wheels: Sequence[Wheel], python: str, folder: Path) -> None:
    """Bring the missing ones of the pinned wheels into `folder`; pip checks their hashes.

    Raises ShellError with pip's own words where the index cannot be reached or a file has another hash.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [one for one in wheels if not _is(folder / one.file, one.sha256)]
    if not missing:
        return
    for one in missing:
        (folder / one.file).unlink(missing_ok=True)
    wanted = folder / "requirements.txt"
    wanted.write_text("".join(f"{one.requirement} --hash=sha256:{one.sha256}\n" for one in missing))
    shell.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
         "--require-hashes", "--only-binary=:all:", "--implementation=cp", f"--python-version={python}", *PLATFORMS,
         f"--dest={folder}", f"--requirement={wanted}"],
        timeout_s=900,
    )  # fmt: skip


def install_wheel(wheel: Path, site: Path, whole: bool = False) -> None:
    """Unzip a wheel into `site`, unless it is to be `whole` without tests, type stubs and what is there to build
    extensions against.

    Not by pip, which would write this machine's paths into the tree (scripts' first lines, RECORD). The wheels that
    are pinned have no data folder (PEP 427), so that unpacking is all of it. Of one that has, its modules are taken,
    and scripts and headers are left out.
    """
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            name = PurePosixPath(info.filename)
            if name.parts[0].endswith(".data"):
                if name.parts[1] not in ("purelib", "platlib"):
                    continue
                name = PurePosixPath(*name.parts[2:])
            if name.is_absolute() or ".." in name.parts:
                raise IsolatencyError(f"{wheel.name} holds the name {info.filename!r}, which leads out of the tree")
            if info.is_dir() or not (whole or _wanted(name)):
                continue
            target = site / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
            target.chmod(0o755 if info.external_attr >> 16 & 0o100 else 0o644)


def compile_bytecode(tree: Path, folders: Sequence[str] = ("usr/lib/python3.11", "opt/app")) -> None:
    """Compile the standard library and the app (or other folders) with the tree's own interpreter, as if the tree were
    the root.

    The interpreter is started by the tree's own dynamic loader, which needs neither a chroot nor a right to one; `-s`
    and `-p` make the paths in the bytecode those inside the tree, `-B` keeps the interpreter's own imports from
    writing theirs. Unchecked hashes: the sources' times are not in it, and no target looks at the sources again.
    """
    loader = tree / "lib64/ld-linux-x86-64.so.2"
    libraries = ":".join(str(tree / place / "x86_64-linux-gnu") for place in ("lib", "usr/lib"))
    shell.run(
        ["setpriv", "--pdeathsig", "KILL", tree / loader.readlink().relative_to("/"),
         "--library-path", libraries, tree / PYTHON,
         "-I", "-S", "-B", "-m", "compileall", "-q", "-f", "-s", tree, "-p", "/",
         "--invalidation-mode", "unchecked-hash", *(tree / folder for folder in folders)],
        env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
        timeout_s=300,
    )  # fmt: skip


def _wanted(name: PurePosixPath) -> bool:
    unused = {"tests", "f2py", "include", "__pycache__"}
    return not unused & set(name.parts[1:-1]) and name.suffix not in {".pyi", ".pxd", ".pyx", ".a", ".c", ".h"}


def _prune_documents(tree: Path) -> None:
    """Of usr/share/doc only the licences stay."""
    documents = tree / "usr/share/doc"
    for path in sorted(documents.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.name != "copyright":
            path.unlink()


def _add(tree: Path, name: str, text: str, mode: int = 0o644) -> None:
    path = tree / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(mode)


def _is(file: Path, digest: str) -> bool:
    return file.is_file() and sha256(file) == digest
