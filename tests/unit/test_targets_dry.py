"""What a dry run of each kind prints: every command and API call, in their order, and nothing is made."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostsetup import kvm
from hostsetup import ledger as books
from hostsetup.kinds import make
from hostsetup.ledger import Ledger
from hostsetup.target import Context, Option, Spec
from images import shell, store, vmm
from images.errors import IsolatencyError, UsageError
from images.store import FILES, Images

ARGS = ("--model", "knn")


@pytest.fixture
def images(tmp_path: Path) -> Images:
    root = tmp_path / "images, these"
    (root / "tree").mkdir(parents=True)
    for name in FILES:
        (root / name).touch()
    return Images(root, "k" * 64, "d" * 64, False, dict.fromkeys(FILES, "0"))


@pytest.fixture
def context(images: Images, tmp_path: Path) -> Iterator[Context]:
    shell.set_dry_run(True)
    try:
        with Ledger.open("test", "dry") as ledger:
            yield Context(ledger, images, (4, 5, 6), ARGS, tmp_path / "logs")
    finally:
        shell.set_dry_run(False)


def printed(
    context: Context, kind: str, capsys: pytest.CaptureFixture[str], cpus: int = 1, **options: Option
) -> tuple[list[str], str]:
    """The lines that it prints, and its URL. Skips where this machine's network already has what a guest wants."""
    try:
        with make(Spec("my.one", kind, cpus, 300, options), context) as endpoint:
            assert endpoint.identity is None and endpoint.ready_s == 0
    except IsolatencyError as error:
        if kind in ("qemu", "uml", "firecracker") and "the guest wants" in str(error):
            pytest.skip(f"not in this network: {error}; isolatency sandbox -- pytest runs it")
        raise
    found = capsys.readouterr().out
    owner = next(owner for owner in books.owners() if owner.id == context.ledger.id)
    assert owner.entries == {} and not context.logs.exists()
    return found.splitlines(), endpoint.url


def test_the_process_has_exactly_the_one_environment(context: Context, capsys: pytest.CaptureFixture[str]) -> None:
    lines, url = printed(context, "process", capsys, port=18_765)
    assert url == "http://127.0.0.1:18765"
    last = next(line for line in lines if "/usr/bin/python3.11" in line)
    environment = " ".join(f"{key}={value}" for key, value in store.server_env().items())
    server = "/usr/bin/python3.11 -m server --host 127.0.0.1 --port 18765 --model knn"
    assert last.endswith(f"/bin/busybox env -i {environment} {server}")
    if os.geteuid() == 0:
        assert "--userspec=1000:1000" in last
    else:
        assert any("taskset -c 6" in line for line in lines)


def test_the_container_by_its_settings(context: Context, capsys: pytest.CaptureFixture[str]) -> None:
    (imported, run), url = printed(context, "docker", capsys, cpus=2, runtime="runsc")
    assert url == "http://CONTAINER:8080"
    assert f"isolatency:{'d' * 32}" in imported
    for words in (
        "'cpuset_cpus': '5,6'", "'mem_limit': '300m'", "'memswap_limit': '300m'", "'read_only': True", "'use_config_proxy': False",
        "'runtime': 'runsc'", f"'labels': {{'isolatency': '{context.ledger.id}'}}", "'command': ['--model', 'knn']",
    ):  # fmt: skip
        assert words in run
    assert "ports" not in run and "cpu_quota" not in run and "nano_cpus" not in run


def test_a_foreign_image_keeps_its_own_entry_point(context: Context, capsys: pytest.CaptureFixture[str]) -> None:
    (run,), _ = printed(context, "docker", capsys, image="mine:1")
    assert "entrypoint" not in run


def test_qemu_by_its_command_line(context: Context, images: Images, capsys: pytest.CaptureFixture[str]) -> None:
    lines, url = printed(context, "qemu", capsys, cpus=2, accel="tcg", boot_args="loglevel=7  x=y")
    assert url == "http://172.16.0.2:8080"
    command = lines[-1]
    assert "-accel tcg,thread=multi -cpu max -smp 2 -m 300" in command
    assert "'console=ttyS0 quiet reboot=t panic=-1 mitigations=off tsc_early_khz=" in command
    assert " loglevel=7 x=y'" in command
    assert f"file={str(images.ext4).replace(',', ',,')}'" in command and "readonly=on,file.locking=off" in command
    assert "ifname=tap0" in command and "mac=06:00:AC:10:00:02" in command
    assert any("neighbour replace 172.16.0.2 lladdr 06:00:AC:10:00:02" in line for line in lines)


def test_uml_by_its_command_line(context: Context, capsys: pytest.CaptureFixture[str]) -> None:
    lines, _ = printed(context, "uml", capsys)
    assert "mem=300M" in lines[-1] and "vec0:transport=tap,ifname=tap0,mac=06:00:AC:10:00:02" in lines[-1]


@pytest.mark.parametrize("boots", [True, False])
def test_firecrackers_calls_in_their_order(
    boots: bool, context: Context, images: Images, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        vmm.find_firecracker()
    except IsolatencyError as error:
        pytest.skip(f"no Firecracker binary: {error}")
    monkeypatch.setattr(kvm, "kvm_boots", lambda images: boots)
    lines, url = printed(
        context,
        "firecracker",
        capsys,
        cpus=2,
        io_engine="Async",
        cache_type="Writeback",
        huge_pages="2M",
        console=False,
    )
    assert url == "http://172.16.0.2:8080"
    calls = [line.removeprefix("would PUT ").partition(" ") for line in lines if line.startswith("would PUT ")]
    assert [path for path, _, _ in calls] == [
        "/logger", "/metrics", "/machine-config", "/boot-source", "/drives/rootfs", "/network-interfaces/eth0", "/actions",
    ]  # fmt: skip
    bodies = {path: json.loads(body.replace("'", '"').replace("True", "true").replace("False", "false"))
              for path, _, body in calls}  # fmt: skip
    assert bodies["/machine-config"] == {"vcpu_count": 2, "mem_size_mib": 300, "smt": False, "huge_pages": "2M"}
    drive = {"drive_id": "rootfs", "is_root_device": True, "is_read_only": True}
    drive |= {"io_engine": "Async", "cache_type": "Writeback"}
    assert bodies["/drives/rootfs"] == drive | {"path_on_host": str(images.ext4) if boots else "/dev/vdc"}
    interface = {"iface_id": "eth0", "guest_mac": "06:00:AC:10:00:02", "host_dev_name": "tap0" if boots else "vm0"}
    assert bodies["/network-interfaces/eth0"] == interface
    assert bodies["/actions"] == {"action_type": "InstanceStart"}
    boot = bodies["/boot-source"]
    assert boot["boot_args"].startswith("8250.nr_uarts=0 reboot=k panic=1") and "console=" not in boot["boot_args"]
    assert boot["kernel_image_path"] == (str(images.vmlinux) if boots else "/mnt/vmlinux")
    log = bodies["/logger"]["log_path"]
    assert log == (str(context.logs / "my.one.firecracker.log") if boots else "/run/fc.log")
    start = next(line for line in lines if line.startswith("would start:"))
    assert ("--id my-one" in start and "qemu" not in start) if boots else "qemu-system-x86_64" in start


def test_a_command_line_that_the_kernel_would_cut_is_refused(context: Context) -> None:
    with pytest.raises(UsageError, match=r"2047 characters; found 2[0-9]{3}: shorten boot_args"):
        make(Spec("q", "qemu", options={"accel": "tcg", "boot_args": "x" * 2000}), context).__enter__()


def test_a_kernel_that_is_not_there_is_named(context: Context) -> None:
    for kind in ("qemu", "uml", "firecracker"):
        with pytest.raises(IsolatencyError, match=r"kernel=/no/such: no such file|no firecracker on PATH"):
            make(Spec("q", kind, options={"kernel": "/no/such"}), context).__enter__()
