"""Samples on disk: what a row holds, writers that are killed or cut short, files that are joined."""

import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from images.errors import IsolatencyError, UsageError
from loadtest import _samples
from loadtest._samples import (
    ROW_GROUP,
    BlockWriter,
    CsvWriter,
    ParquetWriter,
    Raw,
    Where,
    blank,
    is_partial,
    join,
    table,
)
from loadtest._timing import STAGES

ROOT = Path(__file__).parents[2]
WHERE = Where("docker", "knn", "closed-16", restart=0, round=3, block=17, worker=2, warmup=True)


def raw(n: int, start: int = 0) -> Raw:
    """`n` requests, of which every tenth timed out after one byte and every hundredth was refused."""
    rows = blank(n)
    number = np.arange(start, start + n)
    rows[:, _samples.CONNECTION] = number % 16
    rows[:, _samples.INTENDED] = 10**15 + number * 1000 - 50
    rows[:, _samples.SENT] = 10**15 + number * 1000
    rows[:, _samples.FIRST] = rows[:, _samples.SENT] + 400
    rows[:, _samples.ENDED] = rows[:, _samples.SENT] + 500
    rows[:, _samples.STATUS] = 200
    rows[:, _samples.BYTES_OUT] = 300
    rows[:, _samples.BYTES_IN] = 150
    rows[number % 10 == 0, _samples.OUTCOME] = _samples.TIMEOUT
    rows[number % 10 == 0, _samples.STATUS] = 0
    rows[number % 100 == 0, _samples.OUTCOME] = _samples.REFUSED
    rows[number % 100 == 0, _samples.FIRST] = 0
    rows[number % 200 == 0, _samples.SENT] = 0
    rows[number % 2 == 1, _samples.STAGES_AT :] = 7_000 + np.arange(len(STAGES))
    return rows


def check(frame: pd.DataFrame, n: int) -> None:
    number = np.arange(n)
    assert list(frame.columns) == _samples.SCHEMA.names
    assert (frame.intended_ns == 10**15 + number * 1000 - 50).all()
    sent = frame.sent_ns.notna()
    assert (~sent == (number % 200 == 0)).all()  # what was never sent
    assert (frame.sent_ns[sent] == (10**15 + number * 1000)[sent]).all()
    ok = frame.outcome == "ok"
    assert (~ok == (number % 10 == 0)).all()
    assert (frame.received_ns[ok] == frame.sent_ns[ok] + 500).all()
    assert frame.received_ns[~ok].isna().all()  # a failure has no time of receipt, and is there all the same
    assert (frame.first_byte_ns.isna() == (number % 100 == 0)).all()
    assert set(frame.outcome) == {"ok", "timeout", "refused"}
    for place, stage in enumerate(STAGES):  # half of the answers had none
        assert (frame[f"server_{stage}_ns"].isna() == (number % 2 == 0)).all()
        assert set(frame[f"server_{stage}_ns"].dropna()) == {7_000 + place}
    first = frame.iloc[1]
    assert (first.target, first.model, first.load) == ("docker", "knn", "closed-16")
    assert (first.restart, first["round"], first.block, first.worker, first.connection) == (0, 3, 17, 2, 1)
    assert (first.status, first.bytes_out, first.bytes_in, first.warmup) == (200, 300, 150, True)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_pandas_reads_back_what_was_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"s{suffix}"
    writer = _samples.open_writer(path)
    for start in range(0, 1000, 250):
        writer.add(table(raw(250, start), WHERE))
    writer.close()
    writer.close()
    check(pd.read_parquet(path) if suffix == ".parquet" else pd.read_csv(path), 1000)


def test_nanoseconds_are_exact(tmp_path: Path) -> None:
    rows = raw(2, 1)
    rows[:, _samples.ENDED] = 2**62 + 1  # no float holds that
    writer = ParquetWriter(tmp_path / "s.parquet")
    writer.add(table(rows, WHERE))
    writer.close()
    assert pq.read_table(tmp_path / "s.parquet")["received_ns"].to_pylist() == [2**62 + 1] * 2


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.parquet or \.csv"):
        _samples.open_writer(tmp_path / "s.xlsx")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    for maker in (ParquetWriter, CsvWriter, BlockWriter):
        with pytest.raises(IsolatencyError, match=r"no/such/folder.*No such file"):
            maker(tmp_path / "no/such/folder")


def test_row_groups_are_bounded_and_memory_does_not_grow(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    writer = ParquetWriter(path)
    piece = table(raw(20_000), WHERE)

    def grow(pieces: int) -> int:
        for _ in range(pieces):
            writer.add(piece)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = grow(20)
    after = grow(100)
    writer.close()
    assert after - before < 40 * 1024  # KiB; the 2,000,000 rows are 180 MB
    groups = pq.ParquetFile(path).metadata
    assert groups.num_rows == 120 * 20_000
    assert all(groups.row_group(i).num_rows <= ROW_GROUP + 20_000 for i in range(groups.num_row_groups))


def test_a_writer_that_is_ended_early_leaves_its_parts_which_a_new_one_removes(tmp_path: Path) -> None:
    for partial, left in ((True, "s.parquet.parts"), (False, "s.parquet"), (True, "s.parquet.parts")):
        writer = ParquetWriter(tmp_path / "s.parquet")
        writer.add(table(raw(0), WHERE))
        writer.flush()
        writer.add(table(raw(10), WHERE))
        writer.close(partial=partial)
        assert [path.name for path in tmp_path.iterdir()] == [left]
        assert is_partial(tmp_path / left) == partial
        assert len(pd.read_parquet(tmp_path / left)) == 10


def test_what_is_older_than_two_seconds_is_on_the_disk_however_little_it_is(tmp_path: Path) -> None:
    writer = ParquetWriter(tmp_path / "s.parquet")
    end = time.monotonic() + 60
    written = 0
    while not _samples.files(writer.folder):
        assert time.monotonic() < end
        writer.add(table(raw(10, written), WHERE))
        written += 10
        time.sleep(0.05)
    assert len(pd.read_parquet(writer.folder)) == written


KILLED = """
import sys
from pathlib import Path
from loadtest._samples import ParquetWriter, table
from tests.unit.test_samples import WHERE, raw
writer = ParquetWriter(Path(sys.argv[1]))
for written in range(0, int(sys.argv[2]), 2_000):
    writer.add(table(raw(2_000, written), WHERE))
    writer.flush()
    print(written + 2_000, flush=True)
writer.close()
"""


@pytest.mark.parametrize("parts", [1, 7, 50])
def test_a_writer_that_is_killed_leaves_what_was_written(tmp_path: Path, parts: int) -> None:
    argv = [sys.executable, "-c", KILLED, str(tmp_path / "s.parquet"), str(10**9)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT) as writing:
        assert writing.stdout is not None
        said = [int(writing.stdout.readline()) for _ in range(parts)]
        writing.kill()
    assert not (tmp_path / "s.parquet").exists()
    frame = pd.read_parquet(tmp_path / "s.parquet.parts")
    assert len(frame) >= said[-1] == parts * 2_000
    check(frame, len(frame))


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.03, 0.1, 0.3])
def test_a_writer_that_is_killed_while_it_joins_its_parts_loses_none(tmp_path: Path, delay_s: float) -> None:
    argv = [sys.executable, "-c", KILLED, str(tmp_path / "s.parquet"), "400000"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT) as writing:
        assert writing.stdout is not None
        assert any(int(line) == 400_000 for line in writing.stdout)
        time.sleep(delay_s)
        writing.kill()
    whole = tmp_path / "s.parquet"
    check(pd.read_parquet(whole if whole.exists() else tmp_path / "s.parquet.parts"), 400_000)


FULL_DISK = """
import sys
from pathlib import Path
from images.errors import IsolatencyError
from tests.unit.test_samples import WHERE, raw
from loadtest._samples import BlockWriter, CsvWriter, ParquetWriter, table
kind, folder = sys.argv[1], Path(sys.argv[2])
writer = {"parquet": ParquetWriter, "csv": CsvWriter}[kind](folder / f"s.{kind}")
blocks = BlockWriter(folder / "blocks.csv")
def fill():
    for written in range(0, 10**9, 20_000):
        writer.add(table(raw(20_000, written), WHERE))
def fill_rest():
    while True:
        blocks.add(WHERE, 1, 2, 3, None, 4)
for call in (fill, writer.close, fill_rest):
    try:
        call()
    except IsolatencyError as error:
        print(error)
"""


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_full_disk_leaves_files_that_can_be_read(tmp_path: Path, kind: str) -> None:
    small = tmp_path / "small"
    small.mkdir()
    script = f'mount -t tmpfs -o size=24m none {small} && {sys.executable} -c "$1" {kind} {small} && cp -r {small}/. {tmp_path}'
    argv = [
        "unshare",
        "--mount",
        *(["--map-root-user", "--user"] if os.getuid() else []),
        "sh",
        "-c",
        script,
        "sh",
        FULL_DISK,
    ]
    if subprocess.run([*argv[: argv.index("sh")], "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here; root, or unprivileged user namespaces, would make this run")
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    place = "s.csv" if kind == "csv" else "s.parquet.parts"
    first, *again, last = done.stdout.splitlines()
    assert f"{place}: No space left on device; what was measured before is in it: free some space" in first
    assert again == ([first] if kind == "parquet" else [])  # what was still in memory did not fit when it was closed
    assert "blocks.csv: No space left on device" in last
    frame = pd.read_csv(tmp_path / place) if kind == "csv" else pd.read_parquet(tmp_path / place)
    assert len(frame) > 20_000
    check(frame, len(frame))
    lines = (tmp_path / "blocks.csv").read_text()
    assert lines.endswith("0,3,17,docker,knn,closed-16,1,2,3,True,,4,0,0,0,0,0,0,0,0\n")


def test_blocks_are_on_disk_at_once(tmp_path: Path) -> None:
    writer = BlockWriter(tmp_path / "blocks-native.csv")
    writer.add(WHERE, 1, 2, 3, 12, 34)
    writer.add(WHERE._replace(block=18, warmup=False), 4, 5, 6, None, 35)
    frame = pd.read_csv(tmp_path / "blocks-native.csv")
    assert list(frame.columns) == list(_samples.BLOCK_COLUMNS)
    assert frame.host_cpu_us.isna().tolist() == [False, True]
    assert frame.warmup.tolist() == [True, False]
    writer.close()


def test_join_makes_one_file_of_the_phases(tmp_path: Path) -> None:
    for phase, target in (("native", "docker"), ("qemu", "qemu")):
        where = WHERE._replace(target=target)
        writer = ParquetWriter(tmp_path / f"samples-{phase}.parquet")
        writer.add(table(raw(70_000), where))
        writer.add(table(raw(100), where))
        writer.close(partial=phase == "qemu")
        blocks = BlockWriter(tmp_path / f"blocks-{phase}.csv")
        blocks.add(where, 1, 2, 3, 12, 34)
        blocks.close()
    assert sorted(path.name for path in tmp_path.glob("samples*")) == [
        "samples-native.parquet", "samples-qemu.parquet.parts",
    ]  # fmt: skip
    assert join(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocks.csv", "samples.parquet"]
    frame = pd.read_parquet(tmp_path / "samples.parquet")
    assert frame.target.value_counts().to_dict() == {"docker": 70_100, "qemu": 70_100}
    assert is_partial(tmp_path / "samples.parquet")
    assert pd.read_csv(tmp_path / "blocks.csv").target.tolist() == ["docker", "qemu"]


def test_join_of_nothing_makes_nothing(tmp_path: Path) -> None:
    assert join(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_join_leaves_what_it_cannot_read_and_says_so(tmp_path: Path) -> None:
    writer = ParquetWriter(tmp_path / "samples-native.parquet")
    writer.add(table(raw(100), WHERE))
    writer.close()
    (tmp_path / "samples-qemu.parquet").write_bytes(b"PAR1" + bytes(1000))
    (sentence,) = join(tmp_path)
    assert "samples-qemu.parquet" in sentence
    assert (tmp_path / "samples-qemu.parquet").exists()
    assert len(pd.read_parquet(tmp_path / "samples.parquet")) == 100


def test_every_column_is_in_the_document_in_its_order() -> None:
    text = (Path(__file__).parents[2] / "docs" / "measurement.md").read_text()
    table = text.partition("<!-- columns -->")[2].partition("<!-- /columns -->")[0]
    named = [re.findall(r"`([a-z_]+)`", line.split(" | ")[0]) for line in table.splitlines() if line.startswith("| `")]
    assert [name for names in named for name in names] == _samples.SCHEMA.names


def test_nothing_is_imported_while_the_load_runs(tmp_path: Path) -> None:
    """Pyarrow imported pandas at the first table, for which the client of a running load stood still."""
    code = (
        "import sys; from pathlib import Path; from loadtest import _samples\n"
        "writer, before = _samples.open_writer(Path(sys.argv[1])), set(sys.modules)\n"
        "writer.add(_samples.table(_samples.blank(9), _samples.Where('a', 'b', 'c'))); writer.flush()\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "s.parquet")]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []
