"""One suite over every kind of target that this machine can run."""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest

from hostsetup import doctor, kvm
from hostsetup import ledger as books
from hostsetup.ledger import Ledger
from hostsetup.lifecycle import get
from hostsetup.namespaces import host_root
from hostsetup.target import Endpoint, Target
from images import shell, store
from images.errors import IsolatencyError, TargetError
from loadtest._client import infer, session
from loadtest._models import DATA
from loadtest._parity import ask, compare
from tests.contract.conftest import KINDS, Maker, maker

MODELS = ("knn", "dnn", "null")
TIMEOUT_S = 300.0
BUSY = 18_765
BAD = "bad-kernel"


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
    reference, found = (
        ask(one.endpoint, one.target.spec, MODELS, lambda model: DATA, TIMEOUT_S) for one in (process, live)
    )
    assert compare(reference, found).differences == []


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


@pytest.mark.parametrize("kind", ["process", "uml"])
def test_the_death_of_the_launcher_is_the_servers(kind: str, new: Maker) -> None:
    """Without the ledger's and the cgroup's help, which nobody gives after a kill of everything else."""
    target = new(kind)
    with target:
        launcher, *others = target.pids()
        assert others
        os.kill(launcher, signal.SIGKILL)
        end = time.monotonic() + 50
        while any(_lives(pid) for pid in others):
            assert time.monotonic() < end, "the server outlives its launcher"
            time.sleep(0.02)


def _lives(pid: int) -> bool:
    """Running, and not merely waiting to be reaped."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("kind", ["process", "docker"])
def test_memory_arrives(kind: str, new: Maker) -> None:
    """Allocating far more than the target has must end a job (or the target), not succeed."""
    with new(kind, mem_mib=160) as endpoint:
        if not host_root():
            assert any("its memory is unlimited" in caveat for caveat in endpoint.caveats)
            return
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


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qemu", {"mem_mib": 300, "cpus": 2}),
        ("uml", {"mem_mib": 300}),
        ("firecracker", {"mem_mib": 300, "cpus": 2, "io_engine": "Async", "cache_type": "Writeback"}),
    ],
)
def test_a_guest_has_the_cpus_and_the_memory_that_were_asked_for(
    kind: str, options: dict[str, object], new: Maker
) -> None:
    """By what its kernel says, which `boot_args` lets speak."""
    cpus, mem_mib = int(str(options.get("cpus", 1))), int(str(options["mem_mib"]))
    if cpus > len(os.sched_getaffinity(0)):
        pytest.skip(f"needs {cpus} cores")
    target = new(kind, boot_args="loglevel=7", **options)
    with target:
        said = target.console.read_text(errors="replace")  # type: ignore[attr-defined]
    available = re.findall(r"Memory: (\d+)K/\d+K available", said)  # less what the kernel itself takes
    assert available and 0.6 * mem_mib < int(available[-1]) / 1024 < mem_mib
    if cpus > 1:
        assert f"Brought up 1 node, {cpus} CPUs" in said


@pytest.mark.parametrize("kind", ["process", "docker"])
def test_the_server_has_exactly_the_one_environment(kind: str, new: Maker) -> None:
    target = new(kind)
    with target:
        server = [pid for pid in target.pids() if b"\0-m\0server\0" in Path(f"/proc/{pid}/cmdline").read_bytes()][-1]
        found = Path(f"/proc/{server}/environ").read_bytes().split(b"\0")
        assert {line.decode() for line in found if line} == {f"{k}={v}" for k, v in store.server_env().items()}
        status = Path(f"/proc/{server}/status").read_text()
        assert "Uid:\t1000\t1000\t1000\t1000" in status or not host_root()
        inside = Path(f"/proc/{server}/cwd").readlink()
        assert inside.name == "tmp"


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("process", {"port": BUSY}, f"port {BUSY} of 127.0.0.1 \\(address already in use\\); name another one"),
        ("docker", {"image": "isolatency-nowhere:1"}, "does not have; bring it there: docker load"),
        ("docker", {"runtime": "nowhere"}, "Docker would not start the container: .*nowhere"),
        ("qemu", {"kernel": BAD}, "ended with exit code"),
        ("uml", {"kernel": BAD}, "ended with exit code 126"),
        ("uml", {"rootfs_mib": 64}, "too small .* give at least"),
        ("firecracker", {"kernel": BAD}, "refused PUT /actions .*Invalid Elf magic number"),
    ],
)
def test_a_start_that_fails_says_why_and_leaves_nothing(
    kind: str, options: dict[str, object], words: str, new: Maker, ledger: Ledger, tmp_path: Path
) -> None:
    before = _host(ledger)
    if options.get("kernel") == BAD:
        (tmp_path / BAD).write_bytes(b"no kernel at all" * 100)
        options = options | {"kernel": str(tmp_path / BAD)}
    with socket.socket() as listener:  # somebody else's server
        listener.bind(("127.0.0.1", BUSY))
        listener.listen()
        with pytest.raises(IsolatencyError, match=words), new(kind, **options):
            pytest.fail("it came up")
    assert _host(ledger) == before


def test_an_image_by_name_is_run_as_it_is(new: Maker) -> None:
    """Ours under its own tag, in the place of a foreign one."""
    with new("docker") as first:
        image = f"isolatency:{store.current().tree_sha256[:32]}"
        with new("docker", image=image) as second:
            assert first.identity is not None and second.identity is not None
            assert second.identity["tree_sha256"] == first.identity["tree_sha256"]


def test_the_word_on_kvm_is_that_of_a_guest(ledger: Ledger) -> None:
    """Whatever it is here: it takes a boot, is remembered, and leaves nothing."""
    before, images = _host(ledger), store.current()
    assert kvm.trial(images, ledger) == kvm.kvm_boots(images)
    assert _host(ledger) == before


def test_a_nested_start_in_which_the_emulated_host_dies_is_repeated_once(new: Maker, ledger: Ledger) -> None:
    if kvm.kvm_boots(store.current()):
        pytest.skip("KVM boots guests here, so Firecracker is not nested")
    before, target = _host(ledger), new("firecracker")
    killed: list[int] = []

    def kill_the_first() -> None:
        while not hasattr(target, "process"):
            time.sleep(0.01)
        time.sleep(0.5)
        killed.append(target.process.pid)
        os.kill(target.process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    with target as endpoint:
        killer.join()
        assert killed and target.pids()[0] != killed[0]
        (caveat,) = endpoint.caveats
        assert "its first start failed and was repeated" in caveat and "signal 9" in caveat
    assert _host(ledger) == before


@pytest.mark.parametrize("kind", ["docker", "uml", "qemu", "firecracker"])
def test_an_interrupted_start_is_ended_by_force(kind: str, new: Maker, ledger: Ledger) -> None:
    """Ctrl-C while it starts, in a nested Firecracker while its guest boots: asked to end, that takes half a minute."""
    before, target = _host(ledger), new(kind)

    def interrupt() -> None:
        begun = {"docker": "_running", "firecracker": "_api"}.get(kind, "process")
        while not getattr(target, begun, None):
            time.sleep(0.01)
        time.sleep({"docker": 0, "firecracker": 2}.get(kind, 0.2))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        target.__enter__()
    if kind != "docker":
        assert target.process.returncode == -signal.SIGKILL  # type: ignore[attr-defined]
    assert _host(ledger) == before


@pytest.mark.skipif(not host_root(), reason="makes a network namespace for the outside; run as root")
def test_internet_leads_a_guest_out_and_goes_with_it(new: Maker, ledger: Ledger) -> None:
    """A second namespace is the outside: what the guest answers to it goes by its default route and is forwarded here.

    The outside begins, which our rules do not allow, so the test does; Docker, where it runs, drops all other forwards.
    """
    outside = f"outside-{ledger.id}"
    inside, there = ["ip", "-n", outside], ["ip", "netns", "exec", outside]
    ask = "import socket, sys; socket.create_connection((sys.argv[1], 8080), 60).close()"
    begin = ["FORWARD", "-i", "out0", "-j", "ACCEPT"]
    forwarding = Path("/proc/sys/net/ipv4/ip_forward").read_text()
    shell.run(["ip", "netns", "add", outside])
    try:
        shell.run(["ip", "link", "add", "out0", "type", "veth", "peer", "name", "out1", "netns", outside])
        shell.run(["ip", "address", "add", "192.0.2.1/24", "dev", "out0"])
        shell.run(["ip", "link", "set", "dev", "out0", "up"])
        shell.run([*inside, "address", "add", "192.0.2.2/24", "dev", "out1"])
        shell.run([*inside, "link", "set", "dev", "out1", "up"])
        shell.run([*inside, "route", "add", "172.16.0.0/16", "via", "192.0.2.1"])
        shell.run(["ip", "route", "add", "default", "via", "192.0.2.2"])
        shell.run(["iptables", "-I", *begin])
        with new("uml", internet=True) as endpoint:
            address = endpoint.url.removeprefix("http://").removesuffix(":8080")
            shell.run([*there, sys.executable, "-c", ask, address], timeout_s=TIMEOUT_S)
            rules = shell.run(["iptables", "-t", "nat", "-S", "POSTROUTING"], changes=False).stdout
            assert f"{address.rpartition('.')[0]}.0/24 -o out0" in rules
        assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == forwarding
        assert "-o out0" not in shell.run(["iptables", "-t", "nat", "-S", "POSTROUTING"], changes=False).stdout
    finally:
        shell.run(["iptables", "-D", *begin], check=False)
        shell.run(["ip", "netns", "delete", outside])
        shell.run(["ip", "route", "del", "default", "via", "192.0.2.2"], check=False)


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
