"""Where built images lie: `ISOLATENCY_CACHE` (default ~/.cache/isolatency), and which ones are current.

builds/NAME/        one build each; images.json says what it is
models/KEY/         the current build with a model of the user's own in the tree (own.py), likewise
current             symlink to one of them, switched in one step
debian/ wheels/ firecracker/    what was downloaded
tmp/                what is being made; whatever a killed build left there is removed by the next one
lock                held by the build, load or sweep under way
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
from pathlib import Path

from images.errors import IsolatencyError, MissingError, ShellError

HERE = Path(__file__).parent
SERVER = HERE.parent / "server"
SHAPING = (
    "pins.toml", "server.env", "guest-init", "initramfs-init", "debian.py", "ext4.py", "kernel.py", "tree.py",
)  # fmt: skip
FILES = ("tree.tar", "root.ext4", "vmlinux", "initrd.cpio", "linux.uml", "packages.lock")
NEEDED_MIB = 1200
BUILD = "`isolatency images build`"
_held: dict[Path, int] = {}  # images that this process uses, and the open folders whose locks say so


@dataclass(frozen=True)
class Images:
    """One build: the same tree in every form that a target needs. All paths exist.

    `key` is the digest of what the build was made from (pins, server/, guest-init, the modules that shape the tree),
    `tree_sha256` that of the canonical tar, `loaded` says that it came by `images load` and may be of other sources
    than this checkout. `digests` holds the sha256 of every file of FILES, by name.
    """

    root: Path
    key: str
    tree_sha256: str
    loaded: bool
    digests: dict[str, str]

    @property
    def tree(self) -> Path:
        return self.root / "tree"

    @property
    def tar(self) -> Path:
        return self.root / "tree.tar"

    @property
    def ext4(self) -> Path:
        return self.root / "root.ext4"

    @property
    def vmlinux(self) -> Path:
        return self.root / "vmlinux"

    @property
    def initrd(self) -> Path:
        return self.root / "initrd.cpio"

    @property
    def uml(self) -> Path:
        return self.root / "linux.uml"

    @property
    def lock(self) -> Path:
        return self.root / "packages.lock"


def cache_dir() -> Path:
    """All that is built or downloaded lies below this folder."""
    named = os.environ.get("ISOLATENCY_CACHE")
    return Path(named).absolute() if named else Path.home() / ".cache" / "isolatency"


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def server_files() -> list[Path]:
    """The server's files that go into the tree, relative to server/: all but bytecode and hidden ones, sorted."""

    def goes(path: Path) -> bool:
        return not any(part == "__pycache__" or part.startswith(".") for part in path.parts) and path.suffix != ".pyc"

    found = (path.relative_to(SERVER) for path in SERVER.rglob("*") if path.is_file())
    return sorted(path for path in found if goes(path))


def source_key() -> str:
    """The digest of everything in this checkout that shapes the images: a changed server needs a build."""
    digest = hashlib.sha256()
    files = [HERE / name for name in SHAPING] + [SERVER / path for path in server_files()]
    for path in files:
        digest.update(f"{path.relative_to(HERE.parent)} {sha256(path)}\n".encode())
    return digest.hexdigest()


def server_env() -> dict[str, str]:
    """The one explicit environment of every target, as it stands in the tree's /opt/app/env."""
    lines = (HERE / "server.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line)


def dockerfile_instructions() -> list[str]:
    """What `docker import` must be told (its `changes`) to give the image that images/Dockerfile builds."""
    text = (HERE / "Dockerfile").read_text().replace("\\\n", " ")
    config = ("ENV ", "USER ", "WORKDIR ", "ENTRYPOINT ")
    return [" ".join(line.split()) for line in text.splitlines() if line.startswith(config)]


def read(root: Path) -> Images | None:
    """The build in this folder; None where there is none, or not a whole one."""
    try:
        record = json.loads((root / "images.json").read_text())
        images = Images(root, record["key"], record["tree_sha256"], bool(record["loaded"]), dict(record["digests"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = images.tree.is_dir() and all((root / name).is_file() for name in FILES)
    return images if whole else None


def hold(images: Images) -> Images:
    """Keep these from being forgotten for as long as this process lives."""
    if images.root not in _held:
        _held[images.root] = os.open(images.root, os.O_RDONLY)
        flock(_held[images.root], LOCK_SH)
    return images


def current() -> Images:
    """The current images, held. Raises MissingError, naming the command, where there are none or they are of older
    sources.

    Loaded ones are returned whatever they were made from: whoever loads an older build means it.
    """
    link = cache_dir() / "current"
    images = read(link.resolve()) if link.is_symlink() else None
    if images is None:
        raise MissingError(f"no images are built yet below {cache_dir()}; run {BUILD}")
    if not images.loaded and images.key != source_key():
        raise MissingError(f"the images are older than server/ and images/ of this checkout; run {BUILD}")
    return hold(images)


def put(made: Path, place: Path, key: str, tree_sha256: str, loaded: bool, digests: dict[str, str]) -> Images:
    """Move finished images from tmp/ to their place in one step. Hold the lock."""
    record = {"schema": 1, "key": key, "tree_sha256": tree_sha256, "loaded": loaded, "digests": digests}
    (made / "images.json").write_text(json.dumps(record, indent=1) + "\n")
    (made / ".dockerignore").write_text("*\n!tree.tar\n")  # so that `docker build` of images/Dockerfile reads only it
    place.parent.mkdir(exist_ok=True)
    if place.exists():  # the same thing again, or what is left of it
        place.rename(made.parent / f"old-{place.name}")
    made.rename(place)
    images = read(place)
    assert images is not None
    return images


def publish(made: Path, key: str, tree_sha256: str, loaded: bool, digests: dict[str, str]) -> Images:
    """Move a finished build from tmp/ to its place and make it current, each in one step. Hold the lock.

    Two builds of the same sources may differ in Debian's packages, so the tree's digest is part of the name.
    """
    kind = "loaded" if loaded else "built"
    place = cache_dir() / "builds" / f"{kind}-{key[:12]}-{tree_sha256[:12]}"
    images = put(made, place, key, tree_sha256, loaded, digests)
    switch(place)
    return images


def switch(place: Path) -> None:
    """Make the build in `place` the current one."""
    new = cache_dir() / "tmp" / "current"
    new.unlink(missing_ok=True)
    new.symlink_to(Path("builds") / place.name)
    new.rename(cache_dir() / "current")


def forget_old_builds(keep: int = 3) -> None:
    """Remove all but the newest builds: each takes half a gigabyte."""
    forget_old(cache_dir() / "builds", keep)


def forget_old(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` folders of images in this one, and never the current ones or any in use."""
    places = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in places[keep:]:
        if path != (cache_dir() / "current").resolve() and not _in_use(path):
            shutil.rmtree(path, ignore_errors=True)


def _in_use(folder: Path) -> bool:
    number = os.open(folder, os.O_RDONLY)
    try:
        flock(number, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(number)
    return False


@contextmanager
def scratch(say: Callable[[str], None]) -> Iterator[Path]:
    """A temporary folder in tmp/ while the cache's lock is held; waits, saying so, while another holds it."""
    root = cache_dir()
    (root / "tmp").mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        try:
            flock(lock, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            say("waiting for another build or load of images to end")
            flock(lock, LOCK_EX)
        _empty_tmp()
        path = root / "tmp" / f"{os.getpid()}"
        path.mkdir()
        try:
            yield path
        finally:
            _empty_tmp()


@contextmanager
def disk_errors() -> Iterator[None]:
    """Say what a full disk or a folder that cannot be written means for images, in one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full() from error
        raise IsolatencyError(f"images below {cache_dir()} could not be written: {error}") from error
    except ShellError as error:
        if any(words in f"{error}\n{error.detail}" for words in ("No space left on device", "Disk quota exceeded")):
            raise _full() from error
        raise


def _full() -> IsolatencyError:
    return IsolatencyError(
        f"the disk below {cache_dir()} is full, a build needs {NEEDED_MIB} MiB; nothing half-made was left; "
        "make room, or set ISOLATENCY_CACHE to a folder on another disk"
    )


def sweep() -> list[str]:
    """Remove what a killed build left; returns sentences of what was removed. A build under way is left alone.

    So is a cache of another user's, which one may use and not change.
    """
    root = cache_dir()
    if not os.access(root / "tmp", os.W_OK):
        return []
    with (root / "lock").open("w") as lock:
        try:
            flock(lock, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            return []
        return [f"the unfinished build {path}" for path in _empty_tmp()]


def _empty_tmp() -> list[Path]:
    left = list((cache_dir() / "tmp").iterdir())
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return left
