"""A model of the user's own in the tree: one Python file, and the wheels that it lists as `requirements`.

The file is read, never imported here. The tree is the base's with the file and the wheels added; every other part of
the images stays the base's. It lies in the cache under a name that follows from all that it is made of.
"""

import ast
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from images import shell, store, tree
from images.errors import ShellError, UsageError
from images.ext4 import default_mib, make_ext4
from images.pins import pins
from images.store import FILES, Images
from server.identity import write_canonical_tar

FOLDER = "opt/app/model"
RECIPE = 1  # to be raised where the same inputs make another tree
KEPT = 3
TAKEN_OVER = [name for name in FILES if name not in ("tree.tar", "root.ext4")]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Own:
    """`word` is FILE.py:CLASS, `name` that under which it is served."""

    file: Path
    class_name: str
    name: str
    requirements: tuple[str, ...]

    @property
    def word(self) -> str:
        return f"{self.file}:{self.class_name}"

    @property
    def inside(self) -> str:
        """What the server in the tree is told."""
        return f"/{FOLDER}/{self.file.name}:{self.class_name}"


def is_file(word: str) -> bool:
    """Whether a model is named by its file: exactly when the part before the last colon ends in .py."""
    return word.rpartition(":")[0].endswith(".py")


def read(word: str) -> Own:
    """What FILE.py:CLASS is. Raises UsageError for a file or a class that is not there, or says too little."""
    file, _, wanted = word.rpartition(":")
    path = Path(file).absolute()
    try:
        module = ast.parse(path.read_bytes(), filename=file)
    except OSError as error:
        raise UsageError(f"the model's file {file} could not be read: {error.strerror}") from error
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"the model's file {file} is no Python: {error}") from error
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    if wanted not in classes:
        raise UsageError(f"{file} has no class {wanted!r}; its classes are: {', '.join(classes) or 'none'}")
    name = _literal(classes[wanted].body, "name", file)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(f'{word} wants a name = "…" of letters, digits, ".", "_" or "-" in its class; found {name!r}')
    listed = _literal(module.body, "requirements", file) or []
    if not isinstance(listed, list | tuple) or not all(
        isinstance(one, str) and _PINNED.fullmatch(one) for one in listed
    ):
        raise UsageError(f'{file} wants requirements = ["NAME==VERSION", …]; found {listed!r}')
    return Own(path, wanted, name, tuple(listed))


_PINNED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[A-Za-z0-9,._-]+\])?==[A-Za-z0-9.!+_-]+")


def _literal(body: Sequence[ast.stmt], name: str, file: str) -> Any:
    """The value that is assigned to `name` in this body; None where it is not."""
    for node in body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign)
            try:
                return node.value and ast.literal_eval(node.value)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
                raise UsageError(
                    f"{file}:{node.lineno}: {name} wants to be written out, so that it can be read"
                ) from error
    return None


def derive(base: Images, own: Own, say: Say) -> Images:
    """The base's images with this model in the tree, held, made where they are not yet there.

    Raises ShellError with pip's last words where its wheels cannot be had, IsolatencyError for a full disk.
    """
    recipe = [RECIPE, base.key, base.tree_sha256, own.file.name, store.sha256(own.file), *own.requirements]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    place = store.cache_dir() / "models" / key[:24]
    if (ready := store.read(place)) is None:
        with store.disk_errors(), store.scratch(say) as scratch:
            if (ready := store.read(place)) is None:  # also made by the one that was waited for
                ready = _make(base, own, scratch, place, say)
                store.forget_old(place.parent, KEPT)
    os.utime(place)  # the least lately used ones are forgotten
    return store.hold(ready)


def _make(base: Images, own: Own, scratch: Path, place: Path, say: Say) -> Images:
    made, wheels = scratch / "made", scratch / "wheels"
    made.mkdir()
    wheels.mkdir()
    if own.requirements:
        say(f"fetching {', '.join(own.requirements)}")
        _fetch(own, wheels, scratch)
    say(f"making a tree with the model {own.name}")
    root = made / "tree"
    shell.run(["cp", "-a", "--reflink=auto", base.tree, root], timeout_s=300)
    (root / FOLDER).mkdir()
    shutil.copyfile(own.file, root / FOLDER / own.file.name)
    added = sorted(wheels.iterdir())  # some may be there already, but without the parts that the server never imports
    for wheel in added:
        tree.install_wheel(wheel, root / tree.SITE, whole=True)
    tree.compile_bytecode(root, (FOLDER, tree.SITE) if added else (FOLDER,))
    tree.finish(root)
    with (made / "tree.tar").open("wb") as out:
        write_canonical_tar(root, out)
    digest = store.sha256(made / "tree.tar")
    tree.label(root, digest)
    make_ext4(root, made / "root.ext4", default_mib(root))
    for name in TAKEN_OVER:
        os.link(base.root / name, made / name)
    facts = {
        "name": own.name, "class": own.class_name, "file": own.file.name, "sha256": store.sha256(own.file),
        "requirements": own.requirements, "wheels": {wheel.name: store.sha256(wheel) for wheel in added},
        "base_tree_sha256": base.tree_sha256,
    }  # fmt: skip
    (made / "model.json").write_text(json.dumps(facts, indent=1) + "\n")
    digests = base.digests | {name: store.sha256(made / name) for name in ("tree.tar", "root.ext4")}
    return store.put(made, place, base.key, digest, loaded=base.loaded, digests=digests)


def record(images: Images) -> Any:
    """What a derived tree has of the user's: file, digest, wheels."""
    return json.loads((images.root / "model.json").read_text())


def _fetch(own: Own, folder: Path, scratch: Path) -> None:
    """Bring the wheels and all that they need, for the tree's interpreter; what the base has stays at its version."""
    kept = scratch / "constraints.txt"
    kept.write_text("".join(f"{wheel.requirement}\n" for wheel in pins().wheels))
    done = shell.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:",
         "--implementation=cp", f"--python-version={pins().python}", *tree.PLATFORMS, f"--dest={folder}",
         f"--constraint={kept}", *own.requirements],
        timeout_s=900, check=False,
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise ShellError(
            f"the wheels of {own.word} could not be fetched ({said[-1]}); a sandbox has no way out: "
            f"run `isolatency images build --model {own.word}` outside of it first",
            detail=done.stderr,
        )
