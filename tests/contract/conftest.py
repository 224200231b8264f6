"""What the suite's tests share. Outside of a sandbox they are run in one by an inner pytest: see in_sandbox.py."""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostsetup import doctor, kvm
from hostsetup.kinds import make
from hostsetup.ledger import Ledger
from hostsetup.sandbox import VARIABLE
from hostsetup.target import Context, Spec, Target
from images import store
from tests.contract import in_sandbox

KINDS = ("process", "docker", "uml", "qemu", "firecracker")
SERVER_ARGS = ("--model", "knn", "--model", "dnn", "--model", "null", "--jobs")
Maker = Callable[..., Target]
_numbers = itertools.count(1)  # cgroups and containers carry the name, so it is used once


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if VARIABLE not in os.environ and not config.option.collectonly:
        in_sandbox.replace(config, items, Path(__file__).parent)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if in_sandbox.REPORT in os.environ:
        in_sandbox.tell(report)


@pytest.fixture(scope="session")
def able() -> dict[str, doctor.Verdict]:
    """What can run here, after KVM was tried."""
    images = store.current()
    if kvm.kvm_boots(images) is None:
        with Ledger.open("test", "kvm") as ledger:
            kvm.trial(images, ledger)
    return doctor.able_kinds()


@pytest.fixture(scope="session")
def ledger() -> Iterator[Ledger]:
    with Ledger.open("test", "contract") as opened:
        yield opened


@pytest.fixture
def new(able: dict[str, doctor.Verdict], ledger: Ledger, tmp_path: Path) -> Maker:
    """Make a target of a kind, not yet started; skips, saying why, where the machine cannot run it."""
    return maker(able, ledger, tmp_path)


def maker(able: dict[str, doctor.Verdict], ledger: Ledger, logs: Path) -> Maker:
    def make_one(kind: str, **options: object) -> Target:
        if able[kind].ok is False:
            pytest.skip(f"{kind} cannot run here: {able[kind].why}; {able[kind].fix}")
        cores = tuple(sorted(os.sched_getaffinity(0)))
        cpus, mem_mib = int(str(options.pop("cpus", 1))), int(str(options.pop("mem_mib", 512)))
        internet = bool(options.pop("internet", False))
        context = Context(ledger, store.current(), cores[-cpus:], SERVER_ARGS, logs, internet=internet)
        return make(Spec(f"t-{kind}-{next(_numbers)}", kind, cpus, mem_mib, options), context)  # type: ignore[arg-type]

    return make_one
