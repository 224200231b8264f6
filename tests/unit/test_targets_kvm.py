"""Whether KVM boots a guest: known by a trial only, remembered until the machine, a kernel or a VMM is another one."""

import dataclasses
import json
from pathlib import Path

import pytest

from hostsetup import kvm
from hostsetup import ledger as books
from hostsetup.guest import tsc_khz
from hostsetup.ledger import Ledger
from images.errors import MissingError
from images.store import FILES, Images


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


def test_the_rate_of_the_time_stamp_counter() -> None:
    found = [tsc_khz(0.05) for _ in range(5)]
    assert 500_000 < sorted(found)[2] < 10_000_000
