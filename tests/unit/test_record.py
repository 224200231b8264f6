"""What a run leaves on disk at each moment: real processes, real files, and the report that reads them again."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest

from hostsetup.target import Endpoint, Spec
from images.errors import NotComparableError, TargetError
from images.store import Images
from loadtest import _samples
from loadtest._batch import Live
from loadtest._parity import Comparison, Facts
from loadtest._plan import Plan
from loadtest._record import Record
from loadtest._samples import BlockWriter, ParquetWriter, Where, table
from loadtest._summary import summarise

ROOT = Path(__file__).parents[2]
NOBODY = 65534


class Processes:
    """A target that is up: the host's processes that make it up."""

    def __init__(self, spec: Spec, pids: Sequence[int] = ()) -> None:
        self.spec = spec
        self._pids = list(pids)

    def __enter__(self) -> Endpoint:
        raise NotImplementedError

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def check(self) -> None: ...

    def pids(self) -> list[int]:
        return self._pids


def live(name: str, pids: Sequence[int] = (), *, kind: str = "process", cpus: int = 1, **more: Any) -> Live:
    facts: dict[str, Any] = {"accel": None, "emulated": False, "identity": {"schema": 1}, "ready_s": 0.5, **more}
    return Live(Processes(Spec(name, kind, cpus), pids), Endpoint(name, kind, "http://127.0.0.1:8080", **facts))


def note(record: Record, one: Live, parity: Comparison | None = None) -> None:
    record.target(one, Facts(one.endpoint, one.target.spec, {}), parity or Comparison())


def recorder(run: Path, images: Images | None = None, cores: Sequence[int] = (0, 1), **plan: Any) -> Record:
    (run / "logs").mkdir(parents=True)
    settings: dict[str, Any] = {"models": ("knn",), "loads": ("closed-1",), "only": "load", **plan}
    return Record(run, Plan(**settings), ["isolatency", "run"], cores, cores[:-1] or cores, images, print)


def phase(run: Path, name: str, target: str, blocks: int = 6, rows: int = 100) -> None:
    """The two files that the load leaves of a phase."""
    samples, times = ParquetWriter(run / f"samples-{name}.parquet"), BlockWriter(run / f"blocks-{name}.csv")
    for block in range(blocks):
        start = (block + 1) * 10**9
        raw = _samples.blank(rows)
        raw[:, _samples.INTENDED] = raw[:, _samples.SENT] = start + np.arange(rows) * 1000
        raw[:, _samples.ENDED] = raw[:, _samples.FIRST] = raw[:, _samples.SENT] + 200_000
        where = Where(target, "knn", "closed-1", round=block, block=block, warmup=block == 0)
        samples.add(table(raw, where))
        times.add(where, start, start + 10**9, start + 10**9, 100 * rows, 20 * rows)
    samples.close()
    times.close()


def manifest(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return found


def targets(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "targets.json").read_text())
    return found


def test_what_is_recorded_is_what_the_report_reads(tmp_path: Path) -> None:
    record = recorder(tmp_path, seed=7)
    note(record, live("a", caveats=("memory unlimited",)), Comparison(caveats=["an unknown server"]))
    note(record, live("q", kind="qemu", accel="tcg", emulated=True))
    phase(tmp_path, "native", "a")
    phase(tmp_path, "q", "q")
    record.partial = False
    record.close()
    assert record.measured()
    found = summarise(tmp_path)
    assert not found.partial and found.seed == 7 and found.command == ["isolatency", "run"]
    assert [(target.name, target.label) for target in found.targets] == [("a", "a"), ("q", "q (tcg)")]
    assert [(cell.label, cell.requests) for cell in found.cells] == [("a", 500), ("q (tcg)", 500)]
    assert found.targets[0].caveats == ["a: memory unlimited", "a: an unknown server"]
    assert found.ended is not None and found.started is not None and found.started <= found.ended
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "blocks.csv", "logs", "manifest.json", "plan.toml", "samples.parquet", "targets.json",
    ]  # fmt: skip


def test_a_run_that_is_killed_at_any_moment_has_left_a_partial_folder(tmp_path: Path) -> None:
    """Nothing is closed here: what lies on disk is what a kill leaves."""
    record = recorder(tmp_path)
    record.save()
    assert manifest(tmp_path)["partial"] and manifest(tmp_path)["ended"] is None and targets(tmp_path) == []
    note(record, live("a"))
    phase(tmp_path, "native", "a")
    found = summarise(tmp_path)
    assert found.partial and [(cell.target, cell.requests) for cell in found.cells] == [("a", 500)]


def test_a_run_that_was_interrupted_stays_partial(tmp_path: Path) -> None:
    record = recorder(tmp_path)
    note(record, live("a"))
    record.close()
    assert not record.measured()
    assert manifest(tmp_path)["partial"] and manifest(tmp_path)["ended"]


def test_broken_parity_stops_after_it_was_written_down(tmp_path: Path) -> None:
    record = recorder(tmp_path)
    note(record, live("a"))
    with pytest.raises(NotComparableError, match=r"BLAS threads: a has 1, b has 2; --allow-difference"):
        note(record, live("b"), Comparison(differences=["BLAS threads: a has 1, b has 2"]))
    assert [one["parity"]["differences"] for one in targets(tmp_path)] == [[], ["BLAS threads: a has 1, b has 2"]]


def test_an_allowed_difference_is_a_caveat_of_its_target(tmp_path: Path) -> None:
    record = recorder(tmp_path, allow_difference=True)
    note(record, live("b"), Comparison(differences=["BLAS threads: a has 1, b has 2"]))
    record.close()
    found = summarise(tmp_path)
    assert found.allow_difference and "b: not comparable: BLAS threads: a has 1, b has 2" in found.caveats


def test_an_error_is_one_line_and_a_targets_console_is_in_the_log(tmp_path: Path) -> None:
    record = recorder(tmp_path)
    record.error(TargetError("native: 3 of 9 requests failed"), partial=False)
    assert not record.incomplete
    record.error(TargetError("b did not answer", detail="Kernel panic\nnot syncing"))
    record.error(TargetError("uml: 1 of 9 requests failed"), partial=False)
    assert record.incomplete
    assert manifest(tmp_path)["errors"] == [
        "native: 3 of 9 requests failed", "b did not answer", "uml: 1 of 9 requests failed",
    ]  # fmt: skip
    assert (tmp_path / "logs" / "errors.log").read_text() == "b did not answer\nKernel panic\nnot syncing\n\n"


def test_each_target_has_the_last_cores_and_a_url_none(tmp_path: Path) -> None:
    record = recorder(tmp_path, cores=(0, 1, 2, 3))
    note(record, live("one"))
    note(record, live("two", cpus=2))
    note(record, live("shop", kind="url", identity=None))
    assert [one["cores"] for one in targets(tmp_path)] == [[3], [2, 3], []]


def test_loaded_images_are_said(tmp_path: Path) -> None:
    record = recorder(tmp_path, Images(tmp_path, "key1", "ab" * 32, True, {}))
    record.close()
    assert "the images were loaded (images load), not built from this checkout" in summarise(tmp_path).run_caveats


HOLD = """
import os, sys
held = b"x" * (96 << 20)
child = os.fork()
if child:
    print(os.getpid(), child, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def pair() -> Iterator[list[int]]:
    """A process that holds 96 MiB, and its child, which shares them."""
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        yield [int(word) for word in process.stdout.readline().split()]
        process.stdin.close()


def test_memory_that_is_shared_counts_once(tmp_path: Path, pair: list[int]) -> None:
    record = recorder(tmp_path)
    one = live("a", pair)
    note(record, one)
    assert targets(tmp_path)[0]["host_memory_mib"] is None
    record.memory(one)
    assert 96 <= targets(tmp_path)[0]["host_memory_mib"] < 160


def test_a_process_that_has_just_ended_is_passed_over(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    record = recorder(tmp_path)
    one = live("a", [os.getpid(), ended.pid])
    note(record, one)
    record.memory(one)
    assert targets(tmp_path)[0]["host_memory_mib"] > 0


def test_no_process_is_no_figure(tmp_path: Path) -> None:
    record = recorder(tmp_path)
    for one in (live("gone"), live("shop", kind="url")):
        note(record, one)
        record.memory(one)
    assert [one["host_memory_mib"] for one in targets(tmp_path)] == [None, None]


def test_memory_that_may_not_be_read_is_no_figure_and_ends_no_run() -> None:
    """An ordinary user may drive Docker, whose processes are root's: the kernel does not show their memory to him."""
    before = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        record = recorder(run / "run")
        if before == 0:
            for path in (run, run / "run"):
                os.chown(path, NOBODY, NOBODY)
            try:
                os.seteuid(NOBODY)
            except OSError:
                pytest.skip("this user namespace has no second user; run the tests as root or outside of it")
        try:
            if _shown(1):
                pytest.skip("this kernel shows every process's memory to everyone")
            one = live("a", [os.getpid(), 1], kind="docker")
            note(record, one)
            record.memory(one)
        finally:
            if before == 0:
                os.seteuid(0)
        found = targets(run / "run")[0]
        assert found["host_memory_mib"] is None
        assert found["caveats"] == ["host memory unknown: this user may not read it of all its processes; run as root"]


def _shown(pid: int) -> bool:
    try:
        Path(f"/proc/{pid}/smaps_rollup").read_bytes()
    except OSError:
        return False
    return True


def test_a_phase_that_cannot_be_read_stays_and_is_named(tmp_path: Path) -> None:
    record = recorder(tmp_path)
    note(record, live("a"))
    phase(tmp_path, "native", "a")
    (tmp_path / "samples-uml.parquet").write_bytes(b"PAR1 and no footer")
    record.close()
    assert (tmp_path / "samples-uml.parquet").exists() and not (tmp_path / "samples-native.parquet").exists()
    assert any("samples-uml.parquet could not be read" in caveat for caveat in manifest(tmp_path)["caveats"])
    assert summarise(tmp_path).cells[0].requests == 500


def test_a_file_that_cannot_be_replaced_leaves_no_half_one(tmp_path: Path) -> None:
    record = recorder(tmp_path)
    (tmp_path / "targets.json").unlink()
    (tmp_path / "targets.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        record.save()
    assert not list(tmp_path.glob("*.part"))


SMALL_DISK = """
import sys
from pathlib import Path
from tests.unit.test_record import live, note, phase, recorder
run = Path(sys.argv[1]) / "run"
record = recorder(run)
note(record, live("a"))
phase(run, "native", "a", blocks=80, rows=5000)
(run / "logs" / "filler").write_bytes(b"x" * int(sys.argv[2]))
record.partial = False
record.close()
assert record.measured()
"""


def test_a_disk_that_is_full_at_the_end_costs_no_figure(tmp_path: Path) -> None:
    """Joining the phases takes their size again; where that is not there, they stay, and the report reads them."""
    small = tmp_path / "small"
    small.mkdir()
    size, filler = 32, 19  # the samples take 8 MiB, and 1 is reserved
    script = f'mount -t tmpfs -o size={size}m none "$2" && {sys.executable} -c "$1" "$2" {filler << 20} && cp -r "$2/run" "$3"'
    argv = ["unshare", "--mount", *(["--map-root-user", "--user"] if os.getuid() else [])]
    if subprocess.run([*argv, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here; root, or unprivileged user namespaces, would make this run")
    done = subprocess.run(
        [*argv, "sh", "-c", script, "sh", SMALL_DISK, str(small), str(tmp_path)],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "samples.parquet: No space left on device" in done.stdout and done.stdout.count("\n") == 1
    run = tmp_path / "run"
    assert not (run / "samples.parquet").exists() and not list(run.glob("*.part"))
    found = manifest(run)
    assert found["ended"] and found["partial"] and f"error: {found['errors'][0]}\n" == done.stdout
    again = summarise(run)
    assert again.partial and again.cells[0].requests == 79 * 5000


def test_every_start_is_noted_and_the_plans_order_stays(tmp_path: Path) -> None:
    record = recorder(
        tmp_path, targets=({"name": "a", "kind": "process"}, {"name": "b", "kind": "process"}), restarts=2
    )
    for restart, names in enumerate(("ba", "ab")):
        record.restart = restart
        for name in names:
            note(record, live(name, caveats=("memory unlimited",)))
            record.memory(live(name))
    a, b = targets(tmp_path)
    assert (a["name"], b["name"]) == ("a", "b") and record.has("a") and not record.has("c")
    assert [start["restart"] for start in a["starts"]] == [0, 1] and a["caveats"] == ["memory unlimited"]
    assert a["ready_s"] == a["starts"][0]["ready_s"]


def test_the_first_length_of_a_cells_blocks_is_kept_and_told(tmp_path: Path) -> None:
    record = recorder(tmp_path)
    for load, seconds in (("closed-1", 0.0), ("closed-1", 0.25), ("closed-4", 5.0), ("closed-1", 0.5)):
        record.length({"model": "knn", "load": load, "block_s": seconds})
    note(record, live("a"))
    phase(tmp_path, "native", "a")
    record.close()
    assert manifest(tmp_path)["block_s"] == {"knn:closed-1": 0.25, "knn:closed-4": 5.0}
    assert "blocks: 0.25 s (knn closed-1); 5 s (knn closed-4)" in summarise(tmp_path).run_caveats
