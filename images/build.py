"""`isolatency images build`: one tree, and from it every form that a target needs. `_make` reads top to bottom."""

import hashlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from images import debian, store, tree
from images.debian import Base
from images.errors import IsolatencyError, MissingError, UsageError
from images.ext4 import default_mib, make_ext4
from images.kernel import make_kernel, make_uml
from images.pins import pins
from images.store import FILES, NEEDED_MIB, Images, cache_dir, sha256, source_key, sweep
from server.identity import write_canonical_tar

__all__ = ["build", "sweep"]

Say = Callable[[str], None]


def build(say: Say, *, locked: bool | Path = False, refresh: bool = False) -> Images:
    """Build what is not yet built and make it current; `say` is told each step.

    Debian's packages are downloaded once and kept: a changed server is rebuilt without a download. `refresh` asks for
    the release's newest packages. `locked` refuses packages that differ, in any version or digest, from those of the
    current images (True) or from a packages.lock file.

    Raises IsolatencyError with one line for a difference from the lock, a full disk, an archive that cannot be
    reached; what was current before stays current, and no half-made build is left.
    """
    wanted = _lock(locked)
    place = (cache_dir() / "current").resolve()
    if not refresh and (ready := _ready(wanted, [place])):
        return ready
    with store.disk_errors(), store.scratch(say) as scratch:
        earlier = sorted((cache_dir() / "builds").glob(f"built-{source_key()[:12]}-*"))
        if not refresh and (ready := _ready(wanted, earlier)):  # also by the one that was waited for
            store.switch(ready.root)
            return ready
        free_mib = shutil.disk_usage(scratch).free >> 20
        if free_mib < NEEDED_MIB:
            raise IsolatencyError(
                f"a build needs {NEEDED_MIB} MiB below {cache_dir()} and {free_mib} are free; "
                "make room, or set ISOLATENCY_CACHE to a folder on another disk"
            )
        base = _base(say, scratch, wanted, refresh)
        images = _make(say, scratch, base)
        store.forget_old_builds()
    return images


def _make(say: Say, scratch: Path, base: Base) -> Images:
    wheels, made = cache_dir() / "wheels", scratch / "made"
    made.mkdir()
    say("fetching wheels")
    tree.fetch_wheels(pins().wheels, pins().python, wheels)
    say("making the tree")
    tree.make(base.tar, wheels, pins(), made / "tree")
    with (made / "tree.tar").open("wb") as out:
        write_canonical_tar(made / "tree", out)
    tree_sha256 = sha256(made / "tree.tar")
    tree.label(made / "tree", tree_sha256)
    say("making the ext4 file system")
    make_ext4(made / "tree", made / "root.ext4", default_mib(made / "tree"))
    say("taking the kernels out of their packages")
    make_kernel(base.kernel, made / "tree/bin/busybox", scratch / "kernel", made / "vmlinux", made / "initrd.cpio")
    make_uml(base.uml, scratch / "uml", made / "linux.uml")
    shutil.copyfile(base.lock, made / "packages.lock")
    digests = {name: sha256(made / name) for name in FILES}
    return store.publish(made, source_key(), tree_sha256, loaded=False, digests=digests)


def _base(say: Say, scratch: Path, wanted: Path | None, refresh: bool) -> Base:
    """What comes from Debian, from the cache where it is there and as wanted, else downloaded anew."""
    pinned = f"{pins().debian} {debian.FORMAT}"
    place = cache_dir() / "debian" / hashlib.sha256(pinned.encode()).hexdigest()[:16]
    if place.is_dir() and not refresh and not (wanted and debian.differences(wanted, Base(place).lock)):
        return Base(place)
    say(f"fetching packages of Debian {pins().debian.version}")
    fetched = scratch / "debian"
    fetched.mkdir()
    base = debian.fetch(pins().debian, fetched, scratch)
    if wanted:
        debian.check_lock(wanted, base.lock)
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        place.rename(scratch / "old-debian")
    fetched.rename(place)
    return Base(place)


def _ready(wanted: Path | None, places: Iterable[Path]) -> Images | None:
    """The first of these folders that holds a finished build of these sources, with the packages that are wanted."""
    for images in filter(None, map(store.read, places)):
        if images.key == source_key() and not (wanted and debian.differences(wanted, images.lock)):
            return images
    return None


def _lock(locked: bool | Path) -> Path | None:
    if locked is False:
        return None
    if locked is True:
        found = store.read((cache_dir() / "current").resolve())
        if found is None:
            raise MissingError("--locked compares with the current images, and there are none; give a lock file")
        return found.lock
    if not locked.is_file():
        raise UsageError(f"the lock file {locked} was not found")
    return locked
