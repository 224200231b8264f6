"""The tree's parts: what unpacking accepts, what of a wheel stays, that file systems and archives are reproducible."""

import gzip
import io
import lzma
import os
import shutil
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path

import lz4.block
import pytest

from images import tree
from images.errors import IsolatencyError
from images.ext4 import make_ext4, tree_mib
from images.kernel import Member, cpio, elf_of


def archive(path: Path, *members: tuple[str, object]) -> Path:
    """A tar of (name, content): bytes are a file, None a folder, a str a symbolic link, a tuple a hard link."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o700
            elif isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            elif isinstance(content, tuple):
                info.type, info.linkname = tarfile.LNKTYPE, content[0]
            elif isinstance(content, bytes):
                info.size, info.mode = len(content), 0o4751
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def test_unpack_keeps_content_and_settles_modes(tmp_path: Path) -> None:
    source = archive(
        tmp_path / "a.tar",
        ("./", None),
        ("./bin", None),
        ("./bin/x", b"1"),
        ("./bin/y", "x"),
        ("./bin/z", ("./bin/x",)),
    )
    root = tmp_path / "tree"
    root.mkdir()
    old = os.umask(0o077)
    try:
        tree.unpack(source, root)
    finally:
        os.umask(old)
    assert (root / "bin/x").read_bytes() == (root / "bin/z").read_bytes() == b"1"
    assert (root / "bin/z").stat().st_nlink == 1
    assert (root / "bin/y").readlink() == Path("x")
    assert (root / "bin").stat().st_mode & 0o7777 == 0o755
    assert (root / "bin/x").stat().st_mode & 0o7777 == 0o755


def test_unpack_leaves_out_what_is_dropped(tmp_path: Path) -> None:
    source = archive(
        tmp_path / "a.tar", ("usr/man", None), ("usr/man/1", b""), ("usr/manual", b""), ("bin/dpkg-x", b"")
    )
    root = tmp_path / "tree"
    root.mkdir()
    tree.unpack(source, root, ("usr/man", "bin/dpkg*"))
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*")) == ["usr", "usr/manual"]


@pytest.mark.parametrize(
    "members", [[("../x", b"")], [("/etc/x", b"")], [("out", "/"), ("out/x", b"")], [("a", ".."), ("a/x", b"")]]
)
def test_unpack_refuses_what_leads_out(tmp_path: Path, members: list[tuple[str, object]]) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    with pytest.raises(IsolatencyError, match="leads out of the tree"):
        tree.unpack(archive(tmp_path / "a.tar", *members), root)
    assert not (tmp_path / "x").exists()


def wheel(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, name)
    return path


def test_a_wheel_keeps_code_and_metadata_only(tmp_path: Path) -> None:
    made = wheel(
        tmp_path / "p-1-py3-none-any.whl",
        "p/__init__.py", "p/_core.so", "p/lib/io.py", "p/tests/test_io.py", "p/py.pyi", "p/include/p.h", "p/lib/p.a",
        "p.libs/blas.so", "p-1.dist-info/METADATA",
    )  # fmt: skip
    tree.install_wheel(made, tmp_path / "site")
    site = tmp_path / "site"
    assert {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()} == {
        "p.libs/blas.so", "p/__init__.py", "p/_core.so", "p/lib/io.py", "p-1.dist-info/METADATA",
    }  # fmt: skip


def test_of_a_wheels_data_folder_only_modules_are_taken(tmp_path: Path) -> None:
    made = wheel(tmp_path / "p-1-py3-none-any.whl", "p-1.data/scripts/p", "p-1.data/purelib/p/a.py", "p/tests/t.py")
    tree.install_wheel(made, tmp_path / "site", whole=True)
    found = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*") if path.is_file()}
    assert found == {"p/a.py", "p/tests/t.py"}


@pytest.mark.parametrize("name", ["../p.py", "p-1.data/purelib/../../p.py", "/p.py", "p/../../p.py"])
def test_a_wheel_that_leads_out_of_the_tree_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(IsolatencyError, match="leads out of the tree"):
        tree.install_wheel(wheel(tmp_path / "p-1-py3-none-any.whl", name), tmp_path / "site")
    assert not (tmp_path / "p.py").exists()


def bzimage(payload: bytes) -> bytes:
    head = bytearray(0x300)
    head[0x1F1] = 1  # setup sectors
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", head, 0x248, 16, len(payload))
    return bytes(head).ljust(1024, b"\0") + bytes(16) + payload + b"trailing"


def lz4_legacy(data: bytes) -> bytes:
    blocks = [lz4.block.compress(data[at : at + (8 << 20)], store_size=False) for at in range(0, len(data), 8 << 20)]
    body = b"".join(struct.pack("<I", len(block)) + block for block in blocks)
    return b"\x02\x21\x4c\x18" + body + struct.pack("<I", len(data))


ELF = b"\x7fELF" + bytes(range(256)) * (9 << 12)  # more than one block of LZ4's


@pytest.mark.parametrize("compress", [lz4_legacy, gzip.compress, lzma.compress])
def test_the_elf_kernel_is_found_in_a_bzimage(compress: object) -> None:
    assert callable(compress)
    assert elf_of(bzimage(compress(ELF))) == ELF


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (bytes(2048), "no bzImage"),
        (bzimage(b"\x28\xb5\x2f\xfd" + bytes(64)), "compressed in a way not known"),
        (bzimage(gzip.compress(b"no kernel")), "does not hold an ELF"),
    ],
)
def test_a_kernel_of_another_kind_is_named(image: bytes, words: str) -> None:
    with pytest.raises(IsolatencyError, match=words):
        elf_of(image)


def test_the_initramfs_is_what_cpio_reads_and_always_the_same(tmp_path: Path) -> None:
    members = [Member("bin", None, 0o755), Member("bin/x", b"12345", 0o755), Member("init", b"", 0o644)]
    made = b"".join(cpio(members))
    assert made == b"".join(cpio(members))
    reader = shutil.which("busybox")
    if reader is None:
        pytest.skip("busybox is not installed (busybox-static), nothing else here reads cpio")
    subprocess.run([reader, "cpio", "-i"], cwd=tmp_path, input=made, check=True, capture_output=True)
    assert (tmp_path / "bin/x").read_bytes() == b"12345"
    assert (tmp_path / "bin/x").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o644


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    root = tmp_path / "small"
    (root / "etc").mkdir(parents=True)
    (root / "etc/name with a space").write_text("x" * 10_000)
    (root / "etc/link").symlink_to("nowhere")
    return root


def debugfs(command: str, image: Path) -> str:
    done = subprocess.run(["/sbin/debugfs", "-R", command, image], capture_output=True, text=True, check=True)
    return done.stdout


def test_a_file_system_is_the_same_wherever_and_whenever_it_is_made(small_tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(small_tree, copy, symlinks=True)
    os.utime(copy / "etc", (1, 1))
    if os.geteuid() == 0:
        os.chown(copy / "etc/name with a space", 1234, 1234)
    make_ext4(small_tree, tmp_path / "a.ext4", 32)
    make_ext4(copy, tmp_path / "b.ext4", 32)
    assert (tmp_path / "a.ext4").read_bytes() == (tmp_path / "b.ext4").read_bytes()
    assert "User:     0   Group:     0" in debugfs('stat "/etc/name with a space"', tmp_path / "a.ext4")
    check = subprocess.run(["/sbin/e2fsck", "-fn", tmp_path / "a.ext4"], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout


def test_a_large_file_system_is_sparse(small_tree: Path, tmp_path: Path) -> None:
    make_ext4(small_tree, tmp_path / "big.ext4", 6 * 1024)
    found = (tmp_path / "big.ext4").stat()
    assert found.st_size == 6 << 30
    assert found.st_blocks * 512 < 64 << 20


def test_a_file_system_too_small_is_refused_with_the_size_that_fits(small_tree: Path, tmp_path: Path) -> None:
    (small_tree / "large").write_bytes(bytes(24 << 20))
    with pytest.raises(IsolatencyError, match=f"give at least {tree_mib(small_tree)}"):
        make_ext4(small_tree, tmp_path / "a.ext4", 24)
    assert not (tmp_path / "a.ext4").exists()
    make_ext4(small_tree, tmp_path / "a.ext4", tree_mib(small_tree))
