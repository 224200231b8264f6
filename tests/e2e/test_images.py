"""Images as a user builds them: twice the same, without a download the second time, killed, on a full disk, in Docker.

Every build runs in a process of its own, from a copy of the sources, with a cache of its own.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from server.identity import tree_sha256

ROOT = Path(__file__).resolve().parents[2]
IS_ROOT = os.geteuid() == 0
TIMEOUT_S = 600
SCRIPT = """
import json, sys
from pathlib import Path
from images import build, store
from images.errors import IsolatencyError
options = json.loads(sys.argv[1])
if isinstance(options.get("locked"), str):
    options["locked"] = Path(options["locked"])
if "needed_mib" in options:
    build.NEEDED_MIB = options.pop("needed_mib")
def say(step):
    print(json.dumps({"step": step}), flush=True)
try:
    made = build.build(say, **options)
    print(json.dumps({"tree_sha256": made.tree_sha256, "digests": made.digests, "root": str(made.root)}))
except IsolatencyError as error:
    print(json.dumps({"error": str(error)}))
"""


@dataclass
class Result:
    steps: list[str] = field(default_factory=list)
    error: str = ""
    tree_sha256: str = ""
    digests: dict[str, str] = field(default_factory=dict)
    root: Path = Path()


@dataclass
class Place:
    """A copy of the sources, and a cache."""

    folder: Path
    prefix: Sequence[str] = ()

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def env(self) -> dict[str, str]:
        python = {"PYTHONPATH": str(self.folder / "sources"), "PYTHONDONTWRITEBYTECODE": "1"}
        return os.environ | python | {"ISOLATENCY_CACHE": str(self.cache), "HOME": str(self.folder)}

    def argv(self, prefix: Sequence[str] = (), **options: Any) -> list[str]:
        return [*prefix, *self.prefix, sys.executable, "-c", SCRIPT, json.dumps(options)]

    def build(self, prefix: Sequence[str] = (), **options: Any) -> Result:
        done = subprocess.run(
            self.argv(prefix, **options), env=self.env, cwd="/", capture_output=True, text=True, timeout=TIMEOUT_S
        )
        assert done.returncode == 0, done.stderr
        said = [json.loads(line) for line in done.stdout.splitlines()]
        last = said[-1]
        return Result(
            steps=[line["step"] for line in said if "step" in line],
            error=last.get("error", ""),
            tree_sha256=last.get("tree_sha256", ""),
            digests=last.get("digests", {}),
            root=Path(last.get("root", "")),
        )

    def change_server(self, word: str) -> None:
        (self.folder / "sources/server/note.txt").write_text(word)

    def left(self) -> list[str]:
        return [path.name for path in (self.cache / "tmp").iterdir()]


@pytest.fixture(scope="module")
def open_folder() -> Iterator[Path]:
    """A temporary folder that other users may enter, unlike pytest's."""
    path = Path(tempfile.mkdtemp(prefix="isolatency-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def place(folder: Path, prefix: Sequence[str] = ()) -> Place:
    for room in ("images", "server"):
        shutil.copytree(ROOT / room, folder / "sources" / room, ignore=shutil.ignore_patterns("__pycache__"))
    return Place(folder, prefix)


@pytest.fixture(scope="module")
def first(open_folder: Path) -> tuple[Place, Result]:
    here = place(open_folder / "first")
    made = here.build()
    assert not made.error
    return here, made


@pytest.fixture(scope="module")
def second(open_folder: Path) -> tuple[Place, Result]:
    """The same elsewhere: another path, another umask, and another user where this one may be another."""
    prefix = ["sh", "-c", 'umask 077; exec "$@"', "sh"]
    as_user = ["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups"]
    # By way of a shell: setpriv's own exec still has root's rights.
    tried = [*as_user, "sh", "-c", 'exec "$0" -c ""', sys.executable]
    if IS_ROOT and subprocess.run(tried, capture_output=True).returncode == 0:
        prefix += as_user
    there = place(open_folder / "quite another/folder", prefix)
    if IS_ROOT:
        subprocess.run(["chown", "-R", "1000:1000", there.folder], check=True)
    made = there.build()
    assert not made.error
    return there, made


def test_two_builds_in_two_places_are_the_same(first: tuple[Place, Result], second: tuple[Place, Result]) -> None:
    assert first[1].tree_sha256 == second[1].tree_sha256
    assert first[1].digests == second[1].digests
    assert first[0].left() == second[0].left() == []


def test_the_digest_is_that_of_the_tree(first: tuple[Place, Result]) -> None:
    root = first[1].root
    assert tree_sha256(root / "tree") == first[1].tree_sha256 == first[1].digests["tree.tar"]
    assert (root / "tree/.tree-sha256").read_text().strip() == first[1].tree_sha256


def test_the_tree_is_small_readable_and_knows_nothing_of_the_host(first: tuple[Place, Result]) -> None:
    tree = first[1].root / "tree"
    size = 0
    for path in tree.rglob("*"):
        found = path.lstat()
        if not path.is_symlink():
            assert found.st_mode & 0o444 == 0o444 and not found.st_mode & 0o6000, path
            size += found.st_size
    assert size < 180 << 20
    assert not (tree / "etc/apt").exists() and not (tree / "etc/hostname").read_bytes()
    private = str(first[0].folder).encode()
    for path in [*tree.glob("etc/**/*"), *tree.rglob("*.pyc")]:
        if path.is_file() and not path.is_symlink():
            assert private not in path.read_bytes(), path
    compiled = {path.parent.parent / f"{path.name.split('.')[0]}.py" for path in tree.rglob("*.pyc")}
    assert set(tree.joinpath("opt").rglob("*.py")) <= compiled


def test_a_second_build_does_nothing(first: tuple[Place, Result]) -> None:
    again = first[0].build()
    assert again.steps == [] and again.root == first[1].root


def no_network() -> list[str]:
    user = [] if IS_ROOT else ["--user", "--map-current-user"]
    prefix = ["unshare", *user, "--net"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("this system lets an ordinary user make no namespaces; run the tests as root")
    return prefix


def test_a_changed_server_is_built_without_any_download(first: tuple[Place, Result]) -> None:
    here, made = first
    here.change_server("other")
    other = here.build(no_network())
    assert not other.error and other.tree_sha256 != made.tree_sha256
    assert (other.root / "tree/opt/app/server/note.txt").read_text() == "other"
    assert other.digests["packages.lock"] == made.digests["packages.lock"]
    (here.folder / "sources/server/note.txt").unlink()
    assert here.build(no_network()).root == made.root


def test_locked_accepts_the_same_and_refuses_a_difference(first: tuple[Place, Result], tmp_path: Path) -> None:
    here, made = first
    assert here.build(locked=True).root == made.root
    text = (made.root / "packages.lock").read_text()
    lock = tmp_path / "packages.lock"
    lock.write_text(text)
    assert here.build(locked=str(lock)).root == made.root
    lock.write_text(text.replace("zlib1g 1:", "zlib1g 0:"))
    refused = here.build(locked=str(lock))
    assert "zlib1g 0:" in refused.error and "isolatency images load" in refused.error and "\n" not in refused.error
    assert here.left() == [] and here.build().root == made.root


def test_locked_without_anything_to_compare_with(tmp_path: Path) -> None:
    assert "give a lock file" in place(tmp_path).build(locked=True).error


@pytest.mark.parametrize("step", ["making the tree", "making the ext4", "taking the kernels"])
def test_a_killed_build_leaves_only_what_the_next_one_removes(first: tuple[Place, Result], step: str) -> None:
    here, made = first
    here.change_server(step)
    with subprocess.Popen(here.argv(), env=here.env, cwd="/", stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if step in line:
                break
        process.send_signal(signal.SIGKILL)
    (here.folder / "sources/server/note.txt").unlink()
    assert (here.cache / "current").resolve() == made.root
    assert len(here.left()) == 1
    assert here.build().root == made.root
    sweep = [sys.executable, "-c", "from images import build; print(*build.sweep(), sep='\\n')"]
    said = subprocess.run(sweep, env=here.env, cwd="/", capture_output=True, text=True, check=True).stdout
    assert said.startswith("the unfinished build") and here.left() == []


def test_two_builds_at_once_wait_for_each_other(first: tuple[Place, Result]) -> None:
    here, _ = first
    here.change_server("two at once")
    with subprocess.Popen(here.argv(), env=here.env, cwd="/", stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "step" in process.stdout.readline()
        other = here.build()
        one = json.loads(process.stdout.read().splitlines()[-1])
    (here.folder / "sources/server/note.txt").unlink()
    assert other.steps == ["waiting for another build or load of images to end"]
    assert one["root"] == str(other.root) and not other.error


@pytest.mark.skipif(not IS_ROOT, reason="a small disk is a tmpfs, which root can mount; run the tests as root")
@pytest.mark.parametrize("options", [{}, {"needed_mib": 0}], ids=["before", "midway"])
@pytest.mark.parametrize("size_mib", [60, 400])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    first: tuple[Place, Result], tmp_path: Path, options: dict[str, int], size_mib: int
) -> None:
    small = place(tmp_path)
    small.cache.mkdir()
    after = (
        'mount -t tmpfs -o size="$1" tmpfs "$2"; cp -r "$3" "$2"; a="$2"; shift 3; "$@"; ls -A "$a/tmp" "$a/builds" >&2'
    )
    argv = ["unshare", "--mount", "sh", "-c", after, "sh", f"{size_mib}m", str(small.cache)]
    downloads = first[0].cache / ("debian" if size_mib > 200 else "wheels")  # both kinds of step run out of space
    done = subprocess.run(
        small.argv([*argv, str(downloads)], **options),
        env=small.env, cwd="/", capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert "free" in error if not options else "is full" in error, error
    assert "\n" not in error
    left = [
        line for line in done.stderr.splitlines() if "cannot access" not in line and not line.endswith(":") and line
    ]
    assert left == []


DOCKER = """
import io, json, sys, tarfile
from pathlib import Path
import docker
from images import store
root, out = Path(sys.argv[1]), Path(sys.argv[2])
client = docker.from_env(timeout=300)
context = io.BytesIO()
with tarfile.open(fileobj=context, mode="w") as tar:
    tar.add(store.HERE / "Dockerfile", "Dockerfile")
    tar.add(root / "tree.tar", "tree.tar")
context.seek(0)
built, _ = client.images.build(fileobj=context, custom_context=True, tag="isolatency-test:built", network_mode="none")
client.api.import_image_from_file(
    str(root / "tree.tar"), repository="isolatency-test", tag="imported", changes=store.dockerfile_instructions()
)
configs = {}
for kind in ("built", "imported"):
    image = client.images.get(f"isolatency-test:{kind}")
    found = image.attrs["Config"]
    configs[kind] = {name: found[name] for name in ("Env", "User", "WorkingDir", "Entrypoint")}
    container = client.containers.create(image, ["--help"], network_mode="none")
    with (out / f"{kind}.tar").open("wb") as file:
        for chunk in container.export():
            file.write(chunk)
print(json.dumps(configs))
"""


@pytest.mark.skipif(not IS_ROOT, reason="a Docker engine of the test's own needs root; run the tests as root")
@pytest.mark.skipif(shutil.which("dockerd") is None, reason="no Docker engine; apt-get install docker.io")
def test_the_dockerfile_gives_the_image_that_is_imported(first: tuple[Place, Result], tmp_path: Path) -> None:
    made = first[1]
    isolatency = Path(sys.executable).parent / "isolatency"
    done = subprocess.run(
        [isolatency, "sandbox", "--", sys.executable, "-c", DOCKER, made.root, tmp_path],
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    configs = json.loads(done.stdout.splitlines()[-1])
    assert configs["built"] == configs["imported"]
    assert configs["built"]["User"] == "1000:1000"
    for kind in ("built", "imported"):
        root = tmp_path / kind
        root.mkdir()
        subprocess.run(["tar", "-xpf", tmp_path / f"{kind}.tar", "-C", root], check=True)
        assert tree_sha256(root) == made.tree_sha256
