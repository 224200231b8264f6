"""Firecracker's API, asked of the real binary on the machine itself: before InstanceStart it needs no KVM guest."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostsetup import kvm
from hostsetup import ledger as books
from hostsetup.firecracker import Api, BrokenError, Firecracker, RefusedError
from hostsetup.ledger import Ledger
from hostsetup.target import Context, Option, Spec
from images import store, vmm
from images.errors import IsolatencyError, TargetError


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    try:
        binary = vmm.find_firecracker()[0]
    except IsolatencyError as error:
        pytest.skip(f"no Firecracker binary: {error}")
    if not Path("/dev/kvm").exists():
        pytest.skip("Firecracker opens /dev/kvm at its start, and this machine has none")
    socket = tmp_path / "api.sock"
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen([binary, "--api-sock", socket], stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        try:
            found = Api.of_socket(socket)
            end = time.monotonic() + 50
            while not found.answers():
                assert process.poll() is None and time.monotonic() < end, (tmp_path / "out").read_text()
                time.sleep(0.02)
            yield found
        finally:
            process.kill()
            process.wait()


def test_it_says_what_it_is_before_the_start(api: Api) -> None:
    assert api.get("/")["state"] == "Not started"
    assert api.get("/version")["firecracker_version"] == vmm.find_firecracker()[1]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/machine-config", {"vcpu_count": 0, "mem_size_mib": 512}, "number of vCPUs"),
        ("/machine-config", {"vcpu_count": 33, "mem_size_mib": 512}, "number of vCPUs"),
        ("/machine-config", {"vcpu_count": 3, "mem_size_mib": 512, "smt": True}, "even number if SMT"),
        ("/machine-config", {"vcpu_count": 1}, "missing field `mem_size_mib`"),
        ("/machine-config", {"vcpu_count": 1, "mem_size_mib": 512, "memory": 1}, "unknown field `memory`"),
        ("/boot-source", {"kernel_image_path": "/no/such/kernel"}, "kernel file cannot be opened"),
        (
            "/drives/rootfs",
            {"drive_id": "other", "path_on_host": "/etc/hostname", "is_root_device": True},
            "id from the path does not match",
        ),
        (
            "/drives/rootfs",
            {"drive_id": "rootfs", "path_on_host": "/no/such/disk", "is_root_device": True},
            "Unable to create the virtio block device",
        ),
        (
            "/network-interfaces/eth0",
            {"iface_id": "eth0", "guest_mac": "no-mac", "host_dev_name": "tap0"},
            "MAC address is invalid",
        ),
        (
            "/snapshot/create",
            {"snapshot_type": "Full", "snapshot_path": "s", "mem_file_path": "m"},
            "not supported before starting",
        ),
        ("/nope", {"a": 1}, "Invalid request method and/or path"),
    ],
)
def test_a_refusal_carries_firecrackers_own_words(api: Api, path: str, body: dict[str, object], words: str) -> None:
    with pytest.raises(TargetError) as caught:
        api.put(path, body)
    assert words in str(caught.value) and f"PUT {path}" in str(caught.value)


def test_a_body_that_is_too_large_is_refused_in_words(api: Api) -> None:
    with pytest.raises(TargetError, match="larger than the limit"):
        api.put("/boot-source", {"kernel_image_path": "k" * 60_000})


def test_the_order_that_the_driver_uses_is_accepted(api: Api, tmp_path: Path) -> None:
    """Everything up to InstanceStart, with this project's own kernel, initramfs and root."""
    images = store.current()
    for name in ("log", "metrics"):
        (tmp_path / name).touch()
    api.put("/logger", {"log_path": str(tmp_path / "log"), "level": "Warning"})
    api.put("/metrics", {"metrics_path": str(tmp_path / "metrics")})
    api.put("/machine-config", {"vcpu_count": 1, "mem_size_mib": 512, "smt": False})
    api.put(
        "/boot-source",
        {"kernel_image_path": str(images.vmlinux), "initrd_path": str(images.initrd), "boot_args": "quiet"},
    )
    api.put(
        "/drives/rootfs",
        {"drive_id": "rootfs", "path_on_host": str(images.ext4), "is_root_device": True, "is_read_only": True,
         "io_engine": "Sync", "cache_type": "Unsafe"},
    )  # fmt: skip
    api.put(
        "/network-interfaces/eth0", {"iface_id": "eth0", "guest_mac": "06:00:AC:10:00:02", "host_dev_name": "tap77"}
    )
    found = api.get("/vm/config")
    assert found["machine-config"]["mem_size_mib"] == 512
    assert found["drives"][0]["is_read_only"] is True
    assert found["network-interfaces"][0]["guest_mac"].lower() == "06:00:ac:10:00:02"


def test_the_driver_on_the_machine_itself_up_to_what_needs_kvm(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole order of the driver, as where KVM boots guests; the kernel is refused before a vCPU would run."""
    monkeypatch.setattr(kvm, "kvm_boots", lambda images: True)
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"no kernel" * 1000)
    options: dict[str, Option] = {"kernel": str(kernel), "io_engine": "Sync", "cache_type": "Unsafe", "console": False}
    with Ledger.open("test", "driver") as ledger:
        cores = (max(os.sched_getaffinity(0)),)
        context = Context(ledger, store.current(), cores, ("--model", "null"), tmp_path)
        target = Firecracker(Spec("a.b_c", "firecracker", options=options), context)
        with pytest.raises(RefusedError, match=r"refused PUT /actions .*Invalid Elf magic number") as caught:
            target.__enter__()
        assert "Running Firecracker" in caught.value.detail
        owner = next(owner for owner in books.owners() if owner.id == ledger.id)
        assert owner.entries == {}
    assert target.process.poll() is not None
    assert not target.scratch.exists()


def test_a_driver_whose_firecracker_is_gone_says_so(api: Api, tmp_path: Path) -> None:
    with pytest.raises(BrokenError, match="API broke off at PUT /machine-config"):
        Api.of_socket(tmp_path / "no.sock").put("/machine-config", {"vcpu_count": 1, "mem_size_mib": 512})


def test_a_kernel_that_is_no_elf_is_only_found_at_the_start(api: Api, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"no kernel" * 1000)
    api.put("/boot-source", {"kernel_image_path": str(kernel)})
    with pytest.raises(TargetError, match="Kernel Loader"):
        api.put("/actions", {"action_type": "InstanceStart"})
