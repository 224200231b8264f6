"""`isolatency images save` and `load`: everything of one build in one file, for another machine.

    bundle.json                     schema, key, tree_sha256, and the sha256 of every other file
    tree.tar root.ext4 vmlinux …    store.FILES; the folder tree/ is unpacked from tree.tar again
    firecracker checked.txt         the VMM and the sentence on its check, where the cache holds one

A tar, plain or compressed by the file's name: .tar, .tar.gz or .tgz, .tar.xz, .tar.zst (with the program zstd).
"""

import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from images import shell, store, tree, vmm
from images.errors import IsolatencyError, ShellError, UsageError
from images.store import FILES, Images

SCHEMA = 1
VMM_FILES = ("firecracker", "checked.txt")
TIMEOUT_S = 900
Say = Callable[[str], None]


def quiet(_: str) -> None:
    """No progress."""


def save(file: Path, say: Say = quiet) -> Images:
    """Write the current images to `file`, and return them. Raises MissingError where there are none.

    A file that could not be written whole is removed; one that stood there before stays until the new one is whole.
    """
    mode = _mode(file)
    images = store.current()
    files = {name: images.root / name for name in FILES}
    files |= {name: path for name in VMM_FILES if (path := vmm.cached().parent / name).is_file()}
    record = {
        "schema": SCHEMA,
        "key": images.key,
        "tree_sha256": images.tree_sha256,
        "digests": images.digests | {name: store.sha256(files[name]) for name in VMM_FILES if name in files},
    }
    partial = file.with_name(f".{file.name}.part")
    plain = file.with_name(f".{file.name}.tar") if file.suffix == ".zst" else partial
    say(f"writing {file}")
    try:
        with tarfile.open(plain, mode, format=tarfile.GNU_FORMAT) as tar:
            _add(tar, "bundle.json", json.dumps(record, indent=1).encode())
            for name, path in files.items():
                tar.add(path, name, filter=_anonymous)
        if plain != partial:
            shell.run(["zstd", "--quiet", "--force", "-T0", plain, "-o", partial], timeout_s=TIMEOUT_S)
        partial.rename(file)
    except OSError as error:
        raise IsolatencyError(f"{file} could not be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
        plain.unlink(missing_ok=True)
    return images


def load(file: Path, say: Say = quiet) -> Images:
    """Take images from a file that `save` wrote and make them current, after checking every digest.

    Raises UsageError, in one line, for a file that is no such bundle or is damaged; nothing of it is left then, and
    what was current stays so. The same for a full disk.
    """
    if not file.is_file():
        raise UsageError(f"{file} was not found; `isolatency images save` on another machine writes such a file")
    with store.disk_errors(), store.scratch(say) as scratch:
        made = scratch / "made"
        made.mkdir()
        say(f"reading {file}")
        plain = file
        if file.suffix == ".zst":
            plain = scratch / "plain.tar"
            done = shell.run(["zstd", "--quiet", "-d", file, "-o", plain], check=False, timeout_s=TIMEOUT_S)
            if done.returncode:
                kind = ShellError if "No space left" in done.stderr else UsageError
                raise kind(f"{file} is no bundle of images, or a damaged one: {' '.join(done.stderr.split())}")
        try:
            with tarfile.open(plain) as tar:
                _take(tar, made)
            record = _verified(made)
            say("unpacking the tree")
            (made / "tree").mkdir()
            tree.unpack(made / "tree.tar", made / "tree")
        except (tarfile.TarError, EOFError, ValueError, KeyError, TypeError) as error:
            reason = (str(error) or "it is cut short").splitlines()[0].rstrip(":")  # tarfile goes on with what it tried
            raise UsageError(f"{file} is no bundle of images, or a damaged one: {reason}") from error
        tree.finish(made / "tree")
        tree.label(made / "tree", record["tree_sha256"])
        if (made / "firecracker").is_file():
            vmm.install((made / "firecracker").read_bytes(), (made / "checked.txt").read_text().strip(), scratch)
        for name in ("bundle.json", *VMM_FILES):
            (made / name).unlink(missing_ok=True)
        digests = {name: record["digests"][name] for name in FILES}
        images = store.publish(made, record["key"], record["tree_sha256"], loaded=True, digests=digests)
        store.forget_old_builds()
    return images


def _take(tar: tarfile.TarFile, made: Path) -> None:
    """Write the bundle's files into `made`; anything that does not belong into a bundle is refused by its name."""
    for member in tar:
        if member.name not in ("bundle.json", *FILES, *VMM_FILES) or not member.isreg():
            raise ValueError(f"{member.name!r} does not belong into one")
        source = tar.extractfile(member)
        assert source is not None
        with (made / member.name).open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
        (made / member.name).chmod(0o755 if member.mode & 0o100 else 0o644)


def _verified(made: Path) -> dict[str, Any]:
    """The bundle's record, once every file has been found to be what it says. Raises ValueError or KeyError."""
    path = made / "bundle.json"
    if not path.is_file():
        raise ValueError("bundle.json is not in it")
    record: dict[str, Any] = json.loads(path.read_text())
    if record["schema"] != SCHEMA:
        raise ValueError(f"it is of schema {record['schema']}, this isolatency reads {SCHEMA}")
    if not re.fullmatch("[0-9a-f]{64}", record["key"]):
        raise ValueError("its key is no digest")
    digests = record["digests"]
    for name in {*FILES, *(path.name for path in made.iterdir())} - {"bundle.json"}:
        if not (made / name).is_file():
            raise ValueError(f"{name} is not in it")
        if store.sha256(made / name) != digests[name]:
            raise ValueError(f"{name} has another digest than bundle.json says")
    if digests["tree.tar"] != record["tree_sha256"]:
        raise ValueError("tree.tar is not the tree that bundle.json names")
    return record


def _mode(file: Path) -> Literal["w", "w:gz", "w:xz"]:
    kinds: dict[str, Literal["w", "w:gz", "w:xz"]] = {
        ".gz": "w:gz",
        ".tgz": "w:gz",
        ".xz": "w:xz",
        ".tar": "w",
        ".zst": "w",
    }
    if file.suffix not in kinds:
        raise UsageError(f"{file} should end in one of .tar, .tar.gz, .tar.xz, .tar.zst")
    return kinds[file.suffix]


def _add(tar: tarfile.TarFile, name: str, body: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(body)
    tar.addfile(member, io.BytesIO(body))


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Nothing of who saved it, or when."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member
