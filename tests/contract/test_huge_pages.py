"""The option huge_pages=2M of Firecracker: memory that the host must have set aside."""

from pathlib import Path

import pytest

from hostsetup import firecracker, kvm
from images import store
from images.errors import MissingError
from tests.contract.conftest import Maker


def test_an_emulated_host_sets_them_aside(new: Maker) -> None:
    if kvm.kvm_boots(store.current()):
        pytest.skip("KVM boots guests here, so Firecracker is not nested")
    with new("firecracker", huge_pages="2M", mem_mib=300) as endpoint:
        assert endpoint.identity is not None


def test_too_few_on_this_machine_are_named_with_the_command(
    new: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nr_hugepages").write_text("200\n")
    (tmp_path / "free_hugepages").write_text("149\n")
    monkeypatch.setattr(firecracker, "HUGE_PAGES", tmp_path)
    target = new("firecracker", huge_pages="2M", mem_mib=300)
    monkeypatch.setattr(kvm, "kvm_boots", lambda images: True)
    with pytest.raises(MissingError, match=r"150 pages .* 149 are free; .* sysctl vm.nr_hugepages=201"):
        target.__enter__()
