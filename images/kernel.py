"""Kernels out of Debian's packages: an ELF vmlinux, an initramfs with the modules for virtio, User-mode Linux."""

import gzip
import io
import lzma
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import lz4.block

from images import shell
from images.errors import IsolatencyError
from images.store import HERE

# In the order in which insmod must see them. The second group is for the host of a nested Firecracker only.
VIRTIO = ("virtio_ring", "virtio", "virtio_mmio", "virtio_blk", "failover", "net_failover", "virtio_net")
NESTED = ("irqbypass", "kvm", "kvm-amd", "tun", "llc", "stp", "bridge")


def make_kernel(package: Path, busybox: Path, scratch: Path, vmlinux: Path, initrd: Path) -> None:
    """From a linux-image package write the ELF `vmlinux` and the initramfs `initrd`."""
    shell.run(["dpkg-deb", "--extract", package, scratch], timeout_s=300)
    vmlinux.write_bytes(elf_of(next((scratch / "boot").glob("vmlinuz-*")).read_bytes()))
    modules = {path.name.split(".")[0]: path for path in scratch.rglob("*.ko*")}
    members = [Member(name, None, 0o755) for name in ("bin", "dev", "modules", "newroot", "proc")]
    members += [
        Member("init", (HERE / "initramfs-init").read_bytes(), 0o755),
        Member("bin/busybox", busybox.read_bytes(), 0o755),
    ]
    for name in (*VIRTIO, *NESTED):
        if name not in modules:
            raise IsolatencyError(f"the kernel module {name} is needed and {package.name} does not hold it")
        members.append(Member(f"modules/{name}.ko", _plain(modules[name]), 0o644))
    initrd.write_bytes(b"".join(cpio(members)))


def make_uml(package: Path, scratch: Path, out: Path) -> None:
    """From a user-mode-linux package take the kernel, which is an ordinary program."""
    shell.run(["dpkg-deb", "--extract", package, scratch], timeout_s=300)
    out.write_bytes((scratch / "usr/bin/linux.uml").read_bytes())
    out.chmod(0o755)


def elf_of(vmlinuz: bytes) -> bytes:
    """The ELF kernel inside a bzImage (Linux' Documentation/arch/x86/boot.rst: setup_sects, payload_offset, _length).

    Handles the compressions that Python or the lz4 package know: gzip, xz, lzma, bzip2 is not used by Debian. Raises
    IsolatencyError for anything else.
    """
    if vmlinuz[0x202:0x206] != b"HdrS":
        raise IsolatencyError("the kernel package's vmlinuz is no bzImage (no HdrS header)")
    offset, length = struct.unpack_from("<II", vmlinuz, 0x248)
    start = (1 + (vmlinuz[0x1F1] or 4)) * 512 + offset
    payload = vmlinuz[start : start + length]
    if payload.startswith(b"\x02\x21\x4c\x18"):
        elf = _lz4_legacy(payload)
    elif payload.startswith(b"\x1f\x8b"):
        elf = gzip.GzipFile(fileobj=io.BytesIO(payload)).read(1 << 30)
    elif payload.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
        elf = lzma.LZMADecompressor().decompress(payload)
    else:
        raise IsolatencyError(f"the kernel is compressed in a way not known here (it begins {payload[:6].hex()})")
    if not elf.startswith(b"\x7fELF"):
        raise IsolatencyError("the kernel package's vmlinuz does not hold an ELF kernel")
    return elf


def _lz4_legacy(payload: bytes) -> bytes:
    """LZ4's legacy frame: a magic number, then blocks of 8 MiB each preceded by its compressed size.

    The kernel's build appends the size of the whole (4 bytes, little-endian), which ends the list of blocks.
    """
    (total,) = struct.unpack("<I", payload[-4:])
    out = bytearray()
    at = 4
    while len(out) < total and at + 4 < len(payload):
        (size,) = struct.unpack_from("<I", payload, at)
        out += lz4.block.decompress(payload[at + 4 : at + 4 + size], uncompressed_size=8 << 20)
        at += 4 + size
    return bytes(out)


def _plain(module: Path) -> bytes:
    raw = module.read_bytes()
    return lzma.decompress(raw) if module.suffix == ".xz" else raw


class Member(NamedTuple):
    """One entry of a cpio archive; a folder has no `data`."""

    name: str
    data: bytes | None
    mode: int


def cpio(members: Iterable[Member]) -> Iterator[bytes]:
    """A newc cpio archive (Linux' Documentation/driver-api/early-userspace/buffer-format.rst), the same for the same
    members: owners and times are 0, inode numbers count up.
    """
    for number, (name, data, mode) in enumerate([*members, Member("TRAILER!!!", b"", 0)], 1):
        kind = 0o040000 if data is None else 0o100000 if mode else 0
        body = data or b""
        path = name.encode() + b"\0"
        fields = (number, kind | mode, 0, 0, 2 if data is None else 1, 0, len(body), 0, 0, 0, 0, len(path), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + path
        yield header + bytes(-len(header) % 4)
        yield body + bytes(-len(body) % 4)
