"""The canonical tar and its digest; GET /identity where all is there, and where much is missing."""

import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from server.identity import tree_sha256, write_canonical_tar
from tests.unit.serving import ALL, ROOT, serving

FIELDS = {
    "schema", "tree_sha256", "tree_sha256_source", "blas_library", "blas_kernel", "blas_threads", "kernel",
    "cpu_model", "cpu_flags", "clocksource", "hypervisor", "python", "packages",
}  # fmt: skip
MOUNTED = {"dev": 0o755, "proc": 0o755, "sys": 0o755, "run": 0o755, "tmp": 0o1777, "mnt": 0o755}
REPLACED = ("etc/hosts", "etc/hostname", "etc/resolv.conf")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree as `isolatency images build` makes them: every mount point and replaced file is there."""
    root = tmp_path / "tree"
    for folder in [*MOUNTED, "etc", "usr/lib", "opt/app"]:
        (root / folder).mkdir(parents=True)
        (root / folder).chmod(0o755)
    (root / "tmp").chmod(0o1777)
    for name in REPLACED:
        (root / name).write_text("")
    (root / "etc/passwd").write_text("root:x:0:0\n")
    (root / "usr/lib/tool").write_bytes(bytes(range(256)) * 300)
    (root / "usr/lib/tool").chmod(0o755)
    (root / "usr/lib/link").symlink_to("tool")
    (root / "usr/lib/away").symlink_to("/nowhere/at/all")
    (root / "lib").symlink_to("usr/lib")
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.name != "tool":
            path.chmod(0o644)
    return root


def tar(root: Path) -> bytes:
    out = io.BytesIO()
    write_canonical_tar(root, out)
    return out.getvalue()


def members(root: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(tar(root))) as archive:
        return {member.name: member for member in archive}


def test_the_digest_is_that_of_the_tar(tree: Path) -> None:
    assert tree_sha256(tree) == hashlib.sha256(tar(tree)).hexdigest()


def test_the_tar_can_be_written_to_a_pipe(tree: Path) -> None:
    code = f"import sys; from server.identity import *; write_canonical_tar(Path({str(tree)!r}), sys.stdout.buffer)"
    done = subprocess.run([sys.executable, "-c", f"from pathlib import Path; {code}"], stdout=subprocess.PIPE, cwd=ROOT)
    assert done.stdout == tar(tree)


def test_other_programs_unpack_it(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "tree.tar").write_bytes(tar(tree))
    subprocess.run(["tar", "-xpf", tmp_path / "tree.tar", "-C", tmp_path / "out"], check=True)
    assert (tmp_path / "out/usr/lib/tool").read_bytes() == (tree / "usr/lib/tool").read_bytes()
    assert tree_sha256(tmp_path / "out") == tree_sha256(tree)


def test_entries_are_plain_and_sorted_by_the_bytes_of_their_paths(tree: Path) -> None:
    for name in ("a/x", "a-b", "a.b/y", "a0", "A", "ä", "ab"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text(name)
    found = members(tree)
    assert list(found) == sorted(found, key=os.fsencode)
    assert list(found).index("a-b") < list(found).index("a/x")
    for name, member in found.items():
        assert not name.startswith(("/", "./"))
        assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", "")
        assert member.mtime == next(iter(found.values())).mtime
        assert member.isdir() or member.isreg() or member.issym()
    assert found["usr/lib/tool"].mode == 0o755
    assert found["etc/passwd"].mode == 0o644
    assert found["usr/lib/away"].linkname == "/nowhere/at/all"
    assert found["lib"].issym()
    assert "lib/tool" not in found


def test_what_every_target_mounts_or_writes_has_one_form(tree: Path) -> None:
    before = tar(tree)
    for folder in MOUNTED:
        (tree / folder / "deep").mkdir()
        (tree / folder / "deep/file").write_text("of a running system")
        (tree / folder).chmod(0o700)
    for name in REPLACED:
        (tree / name).write_text("127.0.0.1 localhost\n")
        (tree / name).chmod(0o600)
    for name in (".dockerenv", ".tree-sha256", "etc/mtab"):
        (tree / name).write_text("left out")
    (tree / "lost+found").mkdir(mode=0o700)
    assert tar(tree) == before
    found = members(tree)
    for folder, mode in MOUNTED.items():
        assert found[folder].isdir()
        assert found[folder].mode == mode
    for name in REPLACED:
        assert found[name].isreg()
        assert (found[name].mode, found[name].size) == (0o644, 0)


def test_it_is_the_same_whether_they_are_there_or_not(tree: Path) -> None:
    before = tar(tree)
    for folder in MOUNTED:
        (tree / folder).rmdir()
    for name in REPLACED:
        (tree / name).unlink()
    assert tar(tree) == before
    (tree / "etc/resolv.conf").symlink_to("../run/resolv.conf")  # as some hosts have it
    assert tar(tree) == before


def test_only_the_tree_itself_has_these_places(tree: Path) -> None:
    before = tree_sha256(tree)
    (tree / "usr/proc").mkdir()
    (tree / "usr/proc/file").write_text("an ordinary file")
    assert "usr/proc/file" in members(tree)
    assert tree_sha256(tree) != before


def _touch(tree: Path) -> None:
    os.utime(tree / "etc/passwd", (1, 1))
    os.utime(tree / "usr", (1, 1))


def _rewrite(tree: Path) -> None:
    path = tree / "etc/passwd"
    text = path.read_text()
    path.unlink()
    path.write_text(text)
    path.chmod(0o644)


def _device(tree: Path) -> None:
    os.mkfifo(tree / "etc/pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        before = Path.cwd()
        os.chdir(tree)  # a socket's path has 107 bytes at most
        try:
            bound.bind("etc/socket")
        finally:
            os.chdir(before)


def _attribute(tree: Path) -> None:
    try:
        os.setxattr(tree / "etc/passwd", "user.note", b"1")
    except OSError:
        pytest.skip("this file system has no extended attributes; set TMPDIR to one that has")


def _owner(tree: Path) -> None:
    if os.getuid():
        pytest.skip("giving a file to another user takes root")
    os.chown(tree / "etc/passwd", 1234, 1234)


@pytest.mark.parametrize("change", [_touch, _rewrite, _device, _attribute, _owner])
def test_what_does_not_count(tree: Path, change: Callable[[Path], None]) -> None:
    before = tar(tree)
    change(tree)
    assert tar(tree) == before


def _content(tree: Path) -> None:
    (tree / "etc/passwd").write_text("root:x:0:1\n")


def _mode(tree: Path) -> None:
    (tree / "etc/passwd").chmod(0o755)


def _new_file(tree: Path) -> None:
    (tree / "etc/more").write_text("")


def _new_folder(tree: Path) -> None:
    (tree / "empty").mkdir()


def _rename(tree: Path) -> None:
    (tree / "etc/passwd").rename(tree / "etc/passwe")


def _link(tree: Path) -> None:
    (tree / "usr/lib/link").unlink()
    (tree / "usr/lib/link").symlink_to("away")


def _file_for_link(tree: Path) -> None:
    (tree / "usr/lib/link").unlink()
    (tree / "usr/lib/link").write_text("tool")


@pytest.mark.parametrize("change", [_content, _mode, _new_file, _new_folder, _rename, _link, _file_for_link])
def test_what_counts(tree: Path, change: Callable[[Path], None]) -> None:
    before = tree_sha256(tree)
    change(tree)
    assert tree_sha256(tree) != before


def test_hard_links_are_files_of_their_own(tree: Path) -> None:
    (tree / "usr/lib/twin").hardlink_to(tree / "usr/lib/tool")
    linked = tar(tree)
    assert members(tree)["usr/lib/twin"].isreg()
    (tree / "usr/lib/twin").unlink()
    (tree / "usr/lib/twin").write_bytes((tree / "usr/lib/tool").read_bytes())
    (tree / "usr/lib/twin").chmod(0o755)
    assert tar(tree) == linked


def test_names_of_any_length_and_any_bytes(tree: Path) -> None:
    deep = tree / "/".join(["d" * 60] * 5)
    deep.mkdir(parents=True)
    for name in ("n" * 200, "Ünïcødé ✓", os.fsdecode(b"raw\xff\xfe"), "new\nline", " space "):
        (deep / name).write_text(name.encode("utf-8", "surrogateescape").hex())
    (deep / "link").symlink_to("t" * 300)
    found = members(tree)
    assert sum(member.isreg() and name.startswith("ddd") for name, member in found.items()) == 5
    code = f"from pathlib import Path; from server.identity import tree_sha256 as f; print(f(Path({str(tree)!r})))"
    for env in ({"LC_ALL": "C"}, {"LC_ALL": "C.UTF-8"}, {"LC_ALL": "POSIX", "TZ": "Asia/Tokyo"}):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
        assert done.stdout.strip() == tree_sha256(tree), done.stderr


def test_a_file_that_cannot_be_read_is_an_error_not_a_digest(tree: Path) -> None:
    if os.getuid() == 0:
        pytest.skip("root reads everything; run as an ordinary user")
    (tree / "etc/passwd").chmod(0)
    with pytest.raises(OSError, match="passwd"):
        tree_sha256(tree)


def test_identity_of_a_server_that_runs_from_no_tree(tmp_path: Path) -> None:
    with serving(tmp_path, *ALL) as running:
        facts = running.call("GET", "/identity").json
        again = running.call("GET", "/identity").json
    assert facts.keys() == FIELDS
    assert facts == again
    assert facts["schema"] == 1
    assert (facts["tree_sha256"], facts["tree_sha256_source"]) == (None, "none")
    assert facts["kernel"] == os.uname().release
    assert facts["python"] == sys.version.split()[0]
    assert facts["packages"].keys() == {"numpy", "aiohttp", "orjson", "uvloop", "threadpoolctl"}
    assert "openblas" in facts["blas_library"].lower()
    assert facts["blas_kernel"]
    assert facts["blas_threads"] == 1
    assert isinstance(facts["cpu_flags"], list)
    assert facts["cpu_model"] in Path("/proc/cpuinfo").read_text()


def test_a_label_is_reported_as_one(tmp_path: Path) -> None:
    (tmp_path / "label").write_text("f" * 64 + "\n")
    with serving(tmp_path, "--model", "null", "--tree-label", str(tmp_path / "label")) as running:
        facts = running.call("GET", "/identity").json
    assert (facts["tree_sha256"], facts["tree_sha256_source"]) == ("f" * 64, "label")


def test_identity_without_sys_and_cpuinfo(tmp_path: Path) -> None:
    """As a guest may be: nothing in /sys, no /proc/cpuinfo. What cannot be known is null."""
    hide = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
    script = 'mount -t tmpfs none /sys && mount --bind /dev/null /proc/cpuinfo && exec "$@"'
    prefix = [*hide, "sh", "-c", script, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("this system allows no mount namespace; run as root, or allow user namespaces")
    with serving(tmp_path, *ALL, prefix=prefix) as running:
        facts = running.call("GET", "/identity").json
    assert facts.keys() == FIELDS
    for name in ("clocksource", "cpu_model", "cpu_flags", "hypervisor"):
        assert facts[name] is None, name
    assert facts["kernel"]
    json.dumps(facts)


def test_identity_without_the_packages_descriptions(tmp_path: Path) -> None:
    """Their versions are null where the folders that hold them were left out; the rest is there."""
    import numpy

    site = tmp_path / "site"
    site.mkdir()
    for path in Path(numpy.__file__).parents[1].iterdir():
        if not path.name.endswith((".dist-info", ".pth")):
            (site / path.name).symlink_to(path)
    env = {"PYTHONPATH": f"{ROOT}:{site}", "PYTHONDONTWRITEBYTECODE": "1"}
    python = str(Path(sys.executable).resolve())
    code = (
        "import json, sys; sys.path = [p for p in sys.path if 'site-packages' not in p and 'dist-packages' not in p];"
        "from server.identity import facts; print(json.dumps(facts((None, 'none'))))"
    )
    done = subprocess.run([python, "-S", "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["packages"].values()) == {None}
