"""One suite over every kind of target that this machine can run."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from hostsetup import doctor
from hostsetup import ledger as books
from hostsetup.ledger import Ledger
from hostsetup.lifecycle import get
from hostsetup.target import Endpoint, Target
from images import shell, store
from images.errors import TargetError
from loadtest._client import infer, session
from loadtest._parity import ask, compare
from tests.contract.conftest import KINDS, Maker, maker

MODELS = ("knn", "dnn", "null")
TIMEOUT_S = 300.0


class Live(NamedTuple):
    target: Target
    endpoint: Endpoint


@pytest.fixture(scope="module", params=KINDS)
def live(
    request: pytest.FixtureRequest,
    able: dict[str, doctor.Verdict],
    ledger: Ledger,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Live]:
    target = maker(able, ledger, tmp_path_factory.mktemp("logs"))(request.param)
    with target as endpoint:
        yield Live(target, endpoint)


@pytest.fixture(scope="module")
def process(
    able: dict[str, doctor.Verdict], ledger: Ledger, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Live]:
    target = maker(able, ledger, tmp_path_factory.mktemp("reference"))("process")
    with target as endpoint:
        yield Live(target, endpoint)


def test_it_answers_and_says_what_it_is(live: Live) -> None:
    endpoint = live.endpoint
    live.target.check()
    assert endpoint.ready_s > 0 and endpoint.first_prediction_ms is not None and endpoint.first_prediction_ms > 0
    assert endpoint.identity is not None
    assert endpoint.identity["tree_sha256"] == store.current().tree_sha256
    assert endpoint.identity["tree_sha256_source"] == ("label" if endpoint.emulated else "computed")
    assert endpoint.identity["blas_threads"] == 1 and endpoint.identity["blas_kernel"]
    assert endpoint.emulated == (endpoint.accel in ("tcg", "nested"))
    assert endpoint.label == endpoint.name or endpoint.accel in endpoint.label


def test_a_guest_has_the_documented_address(live: Live) -> None:
    if live.endpoint.kind in ("qemu", "uml", "firecracker"):
        assert live.endpoint.url == "http://172.16.0.2:8080"
        shown = json.loads(shell.run(["ip", "-json", "address", "show", "dev", "tap0"], changes=False).stdout)
        assert ("172.16.0.1", 24) in [
            (a["local"], a["prefixlen"]) for a in shown[0]["addr_info"] if a["family"] == "inet"
        ]


def test_the_same_answers_as_the_process(live: Live, process: Live) -> None:
    reference = ask(process.endpoint, process.target.spec, MODELS, TIMEOUT_S)
    found = compare(reference, ask(live.endpoint, live.target.spec, MODELS, TIMEOUT_S))
    assert found.differences == []


def test_it_serves_many_requests(live: Live) -> None:
    rows = np.load(Path(__file__).parents[2] / "server/models/data/knn.npz")
    http = session()
    for number in range(200 if live.endpoint.emulated else 1000):
        at = number % len(rows["rows"])
        assert (
            infer(http, live.endpoint, "knn", rows["rows"][at : at + 1], timeout_s=TIMEOUT_S)["label"]
            == rows["labels"][at]
        )


def test_it_is_pinned_and_its_processes_are_known(live: Live) -> None:
    pids = live.target.pids()
    assert pids
    wanted = set(live.target.context.cores)  # type: ignore[attr-defined]
    pinned = [pid for pid in pids if os.sched_getaffinity(pid) == wanted]
    assert pinned, "no process of the target is on its cores"
    assert len(pids) - len(pinned) <= 1  # Docker's shim belongs to the target, but is not the server


def test_a_batch_job_runs_inside(live: Live) -> None:
    rows = 12 if live.endpoint.emulated else 100
    status, body = get(live.endpoint.url, "/jobs", timeout_s=TIMEOUT_S, body=json.dumps({"job": "knn", "rows": rows}))
    assert status == 201, body
    _, body = get(live.endpoint.url, f"/jobs/{json.loads(body)['id']}?wait=1", timeout_s=TIMEOUT_S)
    job = json.loads(body)
    assert job["state"] == "done" and job["seconds"] > 0 and 0 <= job["result"]["accuracy"] <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_it_stops_and_leaves_nothing(kind: str, new: Maker, ledger: Ledger) -> None:
    before = _host(ledger)
    target = new(kind)
    with target as endpoint:
        assert endpoint.url
        pids = target.pids()
        assert _host(ledger) != before
    assert _host(ledger) == before
    assert [pid for pid in pids if Path(f"/proc/{pid}/exe").exists() and _is_marked(pid, ledger)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_death_is_an_error_with_the_end_of_the_console(kind: str, new: Maker, ledger: Ledger) -> None:
    before = _host(ledger)
    target = new(kind)
    with target as endpoint:
        target.check()
        for pid in reversed(target.pids()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        end = time.monotonic() + 50
        while time.monotonic() < end:
            try:
                target.check()
            except TargetError as error:
                assert endpoint.name in str(error)
                assert "listening on" in error.detail
                break
            time.sleep(0.1)
        else:
            pytest.fail("the death of the target was not noticed")
    assert _host(ledger) == before


@pytest.mark.parametrize("kind", ["process", "docker"])
def test_memory_arrives(kind: str, new: Maker) -> None:
    """Allocating far more than the target has must end a job (or the target), not succeed."""
    with new(kind, mem_mib=160) as endpoint:
        body = json.dumps({"job": "dnn", "rows": 60000, "epochs": 1})
        try:
            status, answer = get(endpoint.url, "/jobs", timeout_s=TIMEOUT_S, body=body)
            if status == 201:
                _, answer = get(endpoint.url, f"/jobs/{json.loads(answer)['id']}?wait=1", timeout_s=TIMEOUT_S)
                assert json.loads(answer)["state"] == "failed"
            else:
                assert status == 500
        except OSError:
            pass  # the server itself was the one that ran out of memory


def test_a_start_that_fails_leaves_nothing(new: Maker, ledger: Ledger, tmp_path: Path) -> None:
    before = _host(ledger)
    bad = tmp_path / "kernel"
    bad.write_bytes(b"no kernel at all" * 100)
    target = new("qemu", kernel=str(bad))
    with pytest.raises(TargetError, match="t-qemu"), target:
        pytest.fail("it came up")
    assert _host(ledger) == before


def _host(ledger: Ledger) -> dict[str, object]:
    """What a target may leave on the host: interfaces, mounts, cgroups, folders, ledger entries."""
    owner = next(owner for owner in books.owners() if owner.id == ledger.id)
    links = json.loads(shell.run(["ip", "-json", "link", "show"], changes=False).stdout)
    return {
        "links": sorted(link["ifname"] for link in links if link["ifname"].startswith("tap")),
        "mounts": sorted(
            line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines() if ledger.id in line
        ),
        "cgroups": sorted(str(path) for path in Path("/sys/fs/cgroup").glob(f"**/isolatency-{ledger.id}*")),
        "folders": sorted(
            str(p) for place in (books.folder(), Path("/dev/shm")) for p in place.glob(f"*{ledger.id}-*")
        ),
        "entries": sorted(entry["kind"] for entry in owner.entries.values()),
    }


def _is_marked(pid: int, ledger: Ledger) -> bool:
    try:
        return f"{books.MARK}={ledger.id}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def test_a_root_of_five_gib_is_sparse_and_goes_with_its_guest(new: Maker) -> None:
    target = new("uml", rootfs_mib=5120)
    with target as endpoint:
        file = target.rootfs  # type: ignore[attr-defined]
        assert endpoint.identity is not None and endpoint.identity["tree_sha256"] == store.current().tree_sha256
        assert file.stat().st_size == 5 * 2**30
        assert file.stat().st_blocks * 512 < 400 * 2**20
    assert not file.exists()


def test_guests_of_unlike_kinds_share_the_one_root(new: Maker) -> None:
    """QEMU and User-mode Linux lock the file of their root in ways that shut each other out, unless told not to."""
    with new("uml") as first, new("qemu") as second:
        for endpoint in (first, second):
            assert get(endpoint.url, "/v2/health/ready", timeout_s=TIMEOUT_S)[0] == 200


def test_two_guests_at_once_have_each_their_own_tap(new: Maker) -> None:
    with new("uml") as first, new("uml") as second:
        indexes = [int(endpoint.url.split(".")[2]) for endpoint in (first, second)]
        assert indexes[1] == indexes[0] + 1  # which of them is 0 depends on the guest of the suite, which may be up
        for endpoint in (first, second):
            assert get(endpoint.url, "/v2/health/ready", timeout_s=TIMEOUT_S)[0] == 200
