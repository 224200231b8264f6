"""Builds in the cache: which one is current, how one is published, locked, swept, saved and loaded."""

import fcntl
import io
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from subprocess import PIPE

import pytest

from images import bundle, store, vmm
from images.errors import IsolatencyError, MissingError, UsageError
from images.store import FILES, Images
from server.identity import write_canonical_tar
from tests.unit.serving import ROOT


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISOLATENCY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def say(_: str) -> None:
    pass


def publish(key: str = "", loaded: bool = False, word: str = "x") -> Images:
    """A build as small as can be: a tree with one file, and a few bytes for everything else."""
    with store.scratch(say) as scratch:
        made = scratch / "made"
        (made / "tree/bin").mkdir(parents=True)
        (made / "tree/tmp").mkdir()
        (made / "tree/bin/word").write_text(word)
        for name in FILES[1:]:
            (made / name).write_text(name)
        with (made / "tree.tar").open("wb") as out:
            write_canonical_tar(made / "tree", out)
        digests = {name: store.sha256(made / name) for name in FILES}
        return store.publish(made, key or store.source_key(), digests["tree.tar"], loaded=loaded, digests=digests)


def left(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "tmp").iterdir())


def test_without_a_build_the_command_is_named() -> None:
    with pytest.raises(MissingError, match="isolatency images build"):
        store.current()


def test_the_published_build_is_current() -> None:
    made = publish()
    assert store.current() == made
    assert made.root.is_dir() and made.digests["tree.tar"] == made.tree_sha256


def test_a_build_of_other_sources_is_not_current() -> None:
    publish(key="0" * 64)
    with pytest.raises(MissingError, match="older than"):
        store.current()


def test_a_loaded_build_of_other_sources_is_current_and_says_so() -> None:
    publish(key="0" * 64, loaded=True)
    assert store.current().loaded
    assert store.current().key != store.source_key()


def test_a_build_that_lost_a_file_is_none() -> None:
    publish().vmlinux.unlink()
    with pytest.raises(MissingError):
        store.current()


def test_every_source_that_shapes_the_images_exists() -> None:
    assert all((store.HERE / name).is_file() for name in store.SHAPING)


def test_the_key_follows_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "server"
    (here / "__pycache__").mkdir(parents=True)
    (here / "app.py").write_text("1")
    monkeypatch.setattr(store, "SERVER", here)
    monkeypatch.setattr(store, "HERE", tmp_path / "images")
    (tmp_path / "images").mkdir()
    for name in store.SHAPING:
        (tmp_path / "images" / name).write_text(name)
    before = store.source_key()
    (here / "__pycache__/app.pyc").write_text("2")
    (here / ".app.py.swp").write_text("2")
    assert store.source_key() == before
    (here / "app.py").write_text("2")
    assert store.source_key() != before


def test_a_killed_build_is_swept(cache: Path) -> None:
    publish()
    (cache / "tmp/12345/made/tree").mkdir(parents=True)
    assert [line.split()[:3] for line in store.sweep()] == [["the", "unfinished", "build"]]
    assert left(cache) == [] and store.sweep() == []
    assert store.current()


def test_a_build_under_way_is_left_alone_and_waited_for(cache: Path) -> None:
    publish()
    told: list[str] = []
    entered = threading.Event()

    def second() -> None:
        with store.scratch(told.append):
            entered.set()

    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (cache / "tmp/12345").mkdir()
        assert store.sweep() == [] and left(cache) == ["12345"]
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.2)
    thread.join(30)
    assert entered.is_set() and "waiting" in told[0]


def test_only_the_newest_builds_are_kept(cache: Path) -> None:
    builds = [publish(word=str(number)) for number in range(5)]
    for number, one in enumerate(builds):
        os.utime(one.root, (number, number))
    store.switch(builds[0].root)
    store.forget_old_builds(keep=2)
    assert sorted(cache.joinpath("builds").iterdir()) == sorted(one.root for one in (builds[0], *builds[3:]))


def test_builds_that_a_process_uses_are_kept_until_it_ends(cache: Path) -> None:
    """A run of hours starts its targets again and again from the build that it began with."""
    first = publish(word="first")
    code = "import sys; from images import store; print(store.current().root, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, text=True, cwd=ROOT) as user:
        assert user.stdin is not None and user.stdout is not None
        assert user.stdout.readline().strip() == str(first.root)
        os.utime(first.root, (0, 0))
        for number in range(1, 4):
            os.utime(publish(word=f"later {number}").root, (number, number))
        store.forget_old_builds(keep=1)
        assert first.tree.is_dir() and len(list((cache / "builds").iterdir())) == 2
        user.stdin.close()
    store.forget_old_builds(keep=1)
    assert not first.root.exists()


def test_a_full_disk_is_one_line() -> None:
    with pytest.raises(IsolatencyError, match="is full"), store.disk_errors():
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz", ".tar.zst"])
def test_save_and_load_bring_back_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    made = publish()
    vmm.cached().parent.mkdir(parents=True)
    vmm.cached().write_text("a vmm")
    (vmm.cached().parent / "checked.txt").write_text("a sentence\n")
    file = tmp_path / f"images{suffix}"
    bundle.save(file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", file.name]
    monkeypatch.setenv("ISOLATENCY_CACHE", str(tmp_path / "other"))
    taken = bundle.load(file)
    assert taken == store.current() and taken.loaded
    assert (taken.key, taken.tree_sha256, taken.digests) == (made.key, made.tree_sha256, made.digests)
    assert (taken.tree / "bin/word").read_text() == "x"
    assert (taken.tree / ".tree-sha256").read_text().strip() == made.tree_sha256
    assert vmm.cached().read_text() == "a vmm" and vmm.checked() == "a sentence"
    assert left(tmp_path / "other") == []


def repack(file: Path, change: object) -> None:
    """Write the bundle anew; `change` gets name and content and returns both, or None to leave the file out."""
    assert callable(change)
    with tarfile.open(file) as tar:
        members = [(one.name, stream.read()) for one in tar if (stream := tar.extractfile(one))]
    with tarfile.open(file, "w") as tar:
        for name, body in filter(None, (change(*one) for one in members)):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))


DAMAGES = {
    "vmlinux has another digest": lambda name, body: (name, body + b"!" if name == "vmlinux" else body),
    "vmlinux is not in it": lambda name, body: None if name == "vmlinux" else (name, body),
    "bundle.json is not in it": lambda name, body: None if name == "bundle.json" else (name, body),
    "of schema 9": lambda name, body: (name, body.replace(b'"schema": 1', b'"schema": 9')),
    "does not belong": lambda name, body: ("../evil" if name == "vmlinux" else name, body),
    "key is no digest": lambda name, body: (name, body.replace(b'"key": "', b'"key": "../')),
    "is not the tree": lambda name, body: (name, body.replace(b'"tree_sha256": "', b'"tree_sha256": "0')),
}


@pytest.mark.parametrize("words", DAMAGES)
def test_a_damaged_bundle_is_refused_and_leaves_nothing(tmp_path: Path, cache: Path, words: str) -> None:
    made = publish()
    file = tmp_path / "images.tar"
    bundle.save(file)
    repack(file, DAMAGES[words])
    with pytest.raises(UsageError, match=words) as raised:
        bundle.load(file)
    assert "\n" not in str(raised.value)
    assert left(cache) == [] and store.current() == made
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["images.tar", "images.tar.zst", "images.tar.gz"])
@pytest.mark.parametrize("body", [b"", b"not an archive", bytes(4096)])
def test_a_foreign_file_is_refused_and_leaves_nothing(tmp_path: Path, cache: Path, name: str, body: bytes) -> None:
    (tmp_path / name).write_bytes(body)
    with pytest.raises(UsageError, match="no bundle of images") as raised:
        bundle.load(tmp_path / name)
    assert "\n" not in str(raised.value)
    assert left(cache) == []


def test_half_a_bundle_is_refused(tmp_path: Path) -> None:
    publish()
    file = tmp_path / "images.tar"
    bundle.save(file)
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(UsageError, match="no bundle of images"):
        bundle.load(file)


def test_a_file_that_is_not_there_and_a_name_that_says_no_format(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="was not found"):
        bundle.load(tmp_path / "none.tar")
    publish()
    with pytest.raises(UsageError, match=r"should end in one of \.tar"):
        bundle.save(tmp_path / "images.zip")
    with pytest.raises(IsolatencyError, match="could not be written"):
        bundle.save(tmp_path / "no/such/folder/images.tar")


def test_the_dockerfile_and_the_environment_of_every_target_agree() -> None:
    env, *rest = store.dockerfile_instructions()
    assert env == "ENV " + " ".join(f"{name}={value}" for name, value in store.server_env().items())
    assert rest[:2] == ["USER 1000:1000", "WORKDIR /tmp"]
    assert rest[2].startswith('ENTRYPOINT ["/usr/bin/python3.11", "-m", "server"')
