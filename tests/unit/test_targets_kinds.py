"""Kinds of target: which options each takes, what is refused and in which words, what is emulated."""

from pathlib import Path

import pytest

from hostsetup.kinds import KINDS, check_options, make
from hostsetup.ledger import Ledger
from hostsetup.target import Context, Endpoint, Option, Spec
from images.errors import UsageError

SPIN: dict[str, Option] = {"spin_us": 210, "spin_tail_us": 400.5, "spin_tail_p": 0.03}
GOOD: dict[str, dict[str, Option]] = {
    "process": {"port": 8123, **SPIN},
    "docker": {"image": "mine:1", "runtime": "runsc", **SPIN},
    "firecracker": {
        "binary": "/b", "kernel": "/k", "boot_args": "a b=c", "huge_pages": "2M", "io_engine": "Async",
        "cache_type": "Writeback", "console": False, "rootfs_mib": 5120, **SPIN,
    },
    "qemu": {"kernel": "/k", "boot_args": "a", "rootfs_mib": 5120, "accel": "tcg", **SPIN},
    "uml": {"kernel": "/k", "boot_args": "a", "rootfs_mib": 5120, **SPIN},
    "url": {"url": "http://127.0.0.1:8080"},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_takes_its_own_options_and_no_other_kinds(kind: str) -> None:
    assert set(GOOD[kind]) == set(KINDS[kind].options)
    check_options(Spec("t", kind, options=GOOD[kind]))
    for key in {key for other in GOOD.values() for key in other} - set(GOOD[kind]):
        value = next(other[key] for other in GOOD.values() if key in other)
        with pytest.raises(UsageError, match=f"'t' has an unknown option '{key}'"):
            check_options(Spec("t", kind, options={**GOOD[kind], key: value}))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (Spec("t", "dokcer"), "unknown kind 'dokcer'; the nearest known one is 'docker'"),
        (Spec("t", "zzz"), "unknown kind 'zzz'; known are process, docker"),
        (Spec("t", "firecracker", options={"hugepages": "2M"}), "the nearest known one is 'huge_pages'"),
        (Spec("t", "firecracker", options={"zzz": "2M"}), "known are kernel, boot_args"),
        (Spec("t", "firecracker", options={"huge_pages": "1G"}), "None or 2M for huge_pages; found '1G'"),
        (Spec("t", "firecracker", options={"io_engine": "sync"}), "Sync or Async for io_engine; found 'sync'"),
        (Spec("t", "firecracker", options={"cache_type": ""}), "Unsafe or Writeback for cache_type; found ''"),
        (Spec("t", "firecracker", options={"console": "no"}), "wants bool for console; found 'no'"),
        (Spec("t", "firecracker", options={"console": 1}), "wants bool for console; found 1"),
        (Spec("t", "qemu", options={"accel": "hvf"}), "auto or kvm or tcg for accel; found 'hvf'"),
        (Spec("t", "docker", options={"spin_tail_p": 1.5}), "wants 0 to 1 for spin_tail_p; found 1.5"),
        (Spec("t", "docker", options={"spin_us": "many"}), "wants float for spin_us; found 'many'"),
        (Spec("t", "qemu", options={"rootfs_mib": True}), "wants int for rootfs_mib; found True"),
        (Spec("t", "qemu", options={"rootfs_mib": 0}), "64 to 1048576 for rootfs_mib; found 0"),
        (Spec("t", "process", options={"port": 65536}), "1 to 65535 for port; found 65536"),
        (Spec("t", "process", options={"port": -1}), "1 to 65535 for port; found -1"),
        (Spec("t", "process", cpus=0), "at least 1 CPU and 1 MiB; found cpus=0"),
        (Spec("t", "process", mem_mib=0), "found cpus=1, mem_mib=0"),
        (Spec("t", "uml", cpus=2), "'t' is of kind uml, which has one CPU; found cpus=2"),
        (Spec("t", "firecracker", cpus=33), "33 vCPUs; Firecracker gives 32 at most"),
    ],
)
def test_what_cannot_be_is_refused_in_words(spec: Spec, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        check_options(spec)
    assert words in str(caught.value)
    with Ledger.open("test", "kinds") as ledger, pytest.raises(UsageError):
        make(spec, Context(ledger, None, (0,), (), tmp_path))


@pytest.mark.parametrize(
    "url", ["http://h:1", "http://h", "http://127.0.0.1:65535/", "http://[::1]:80", "http://a-b.c"]
)
def test_an_address_that_can_be_driven(url: str) -> None:
    check_options(Spec("t", "url", options={"url": url}))


@pytest.mark.parametrize(
    "url",
    ["", "h:80", "https://h:80", "http://", "http://h:0", "http://h:65536", "http://h:x", "http://h/v2", "http://h?a=b",
     "http://u@h", "http://a b", "http://[::1", "http://h#f", "http://h\r\nX: y"],
)  # fmt: skip
def test_an_address_that_cannot_be_driven(url: str) -> None:
    with pytest.raises(UsageError, match="wants url:http://host:port; found"):
        check_options(Spec("t", "url", options={"url": url}))


def test_what_is_emulated_where_kvm_boots_a_guest_and_where_not() -> None:
    for kvm_boots in (True, False):
        found = {kind for kind in KINDS if KINDS[kind].emulated(Spec("t", kind), kvm_boots)}
        assert found == (set() if kvm_boots else {"qemu", "firecracker"})
    assert KINDS["qemu"].emulated(Spec("t", "qemu", options={"accel": "tcg"}), kvm_boots=True)


@pytest.mark.parametrize(
    ("name", "kind", "accel", "label"),
    [
        ("qemu", "qemu", "tcg", "qemu-tcg"),
        ("qemu", "qemu", "kvm", "qemu"),
        ("small", "qemu", "tcg", "small (tcg)"),
        ("firecracker", "firecracker", "nested", "firecracker (nested)"),
        ("firecracker", "firecracker", "kvm", "firecracker"),
        ("qemu", "docker", None, "qemu"),
    ],
)
def test_an_emulated_target_carries_that_in_its_label(name: str, kind: str, accel: str | None, label: str) -> None:
    emulated = accel in ("tcg", "nested")
    assert Endpoint(name, kind, "http://h:1", accel, emulated, None, 1.0).label == label
