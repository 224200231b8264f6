"""Whether KVM boots a guest: known by a trial only, remembered until the machine, a kernel or a VMM is another one."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hostsetup import doctor, kvm
from hostsetup import ledger as books
from hostsetup.guest import tsc_khz
from hostsetup.ledger import Ledger
from images import store
from images.errors import IsolatencyError, MissingError
from images.store import FILES, Images
from loadtest import _keep


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Images:
    monkeypatch.setenv("ISOLATENCY_CACHE", str(tmp_path))
    for name in FILES:
        (tmp_path / name).write_text("nothing that boots")
    return Images(tmp_path, "k", "d", False, dict.fromkeys(FILES, "0"))


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /dev/kvm that opens, which proves nothing."""
    path = tmp_path / "kvm"
    path.touch()
    monkeypatch.setattr(kvm, "DEVICE", path)
    return path


def test_without_the_device_it_boots_none(images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm, "DEVICE", tmp_path / "none")
    assert kvm.kvm_boots(images) is False


def test_before_a_trial_nothing_is_known(images: Images, device: Path) -> None:
    assert kvm.kvm_boots(images) is None


def test_a_trial_of_what_does_not_boot_says_so_once_and_leaves_nothing(images: Images, device: Path) -> None:
    with Ledger.open("test", "kvm") as ledger:
        try:
            assert kvm.trial(images, ledger) is False
        except MissingError as error:
            pytest.skip(f"no VMM to try with: {error}")
        owner = next(owner for owner in books.owners() if owner.id == ledger.id)
        assert owner.entries == {}
    assert kvm.kvm_boots(images) is False
    (record,) = images.root.glob("kvm-*.json")
    assert json.loads(record.read_text())["boots"] is False
    assert kvm.why_not(images)
    assert not list(images.root.glob("*.part"))


def test_another_kernel_is_another_question(images: Images, device: Path) -> None:
    kvm._record(images).write_text('{"boots": true}')
    assert kvm.kvm_boots(images) is True
    other = dataclasses.replace(images, digests={**images.digests, "vmlinux": "1"})
    assert kvm.kvm_boots(other) is None


@pytest.mark.parametrize("text", ["", "{", "{}", "[]"])
def test_a_record_that_cannot_be_read_is_none(text: str, images: Images, device: Path) -> None:
    kvm._record(images).write_text(text)
    assert kvm.kvm_boots(images) is None


def test_what_a_guest_said_last_is_kept(tmp_path: Path) -> None:
    """Of a VMM that ends, one that stays silent and one whose guest boots: a shell in the place of each."""
    sign = f"echo {kvm.SIGN} 1 s; sleep 60"
    said = {}
    with Ledger.open("test", "kvm") as ledger:
        for name, script in {
            "ends": "echo a; echo ' no SVM '; echo; exit 3",
            "silent": "exit 3",
            "boots": sign,
        }.items():
            said[name] = kvm._boots(["/bin/sh", "-c", script], tmp_path / name, ledger)
    assert said == {
        "ends": (False, "no SVM"), "silent": (False, "nothing, and it ended with exit code 3"), "boots": (True, ""),
    }  # fmt: skip


@pytest.fixture
def nothing_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Images:
    """The images of this machine in a cache of the test's own, where no trial is on record."""
    try:
        current = store.current()
    except MissingError as error:
        pytest.skip(str(error))
    if not kvm.opens():
        pytest.skip(f"no {kvm.DEVICE} here: nothing would be tried")
    (tmp_path / "current").symlink_to(current.root)
    monkeypatch.setenv("ISOLATENCY_CACHE", str(tmp_path))
    assert kvm.kvm_boots(current) is None
    return current


def test_up_tries_as_a_run_does(nothing_tried: Images) -> None:
    for accel in ("tcg", "auto"):  # of the two only one would use it
        with pytest.raises(IsolatencyError, match="no such file"):
            list(_keep.up([f"qemu:kernel=/no/such,accel={accel}"], [], False, print))
        assert (kvm.kvm_boots(nothing_tried) is None) == (accel == "tcg")


def test_doctor_tries_again_what_has_failed(nothing_tried: Images) -> None:
    kvm._record(nothing_tried).write_text('{"boots": false, "said": "an older kernel"}')
    assert "an older kernel" in check_kvm(doctor.examine()).found
    assert "an older kernel" not in check_kvm(doctor.examine(attempt=True)).found


def test_doctor_without_a_vmm_says_what_is_missing(nothing_tried: Images) -> None:
    script = "from hostsetup import doctor; print(doctor.examine(attempt=True).json())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PATH": "/nowhere"},
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    (found,) = [check for check in said["checks"] if check["name"] == "kvm"]
    assert found["ok"] is None and "no firecracker on PATH" in found["found"]
    assert found["fix"] == "isolatency setup"


def test_firecracker_without_qemu_is_open_until_kvm_was_tried() -> None:
    names = {name for needs in doctor._NEEDS.values() for name in needs}
    checks = {name: doctor.Check(name, name != "qemu-system-x86_64", "") for name in names}
    for boots, verdict in ((None, None), (True, True), (False, False)):
        found = doctor._kind("firecracker", checks | {"kvm": doctor.Check("kvm", boots, "")})
        assert found.ok is verdict


def check_kvm(findings: doctor.Findings) -> doctor.Check:
    return next(check for check in findings.checks if check.name == "kvm")


def test_the_rate_of_the_time_stamp_counter() -> None:
    found = [tsc_khz(0.05) for _ in range(5)]
    assert 500_000 < sorted(found)[2] < 10_000_000
