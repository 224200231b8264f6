"""The raw samples: one row per request, streamed to Parquet or CSV, and one CSV row per block.

Columns `intended_ns`, `sent_ns`, `first_byte_ns` (by the kernel's stamp) and `received_ns` (by the engine's own clock)
are CLOCK_MONOTONIC of the machine that sent the requests; in a closed loop a request is intended when it is sent.
Columns `server_…_ns` are durations that the server stated. A failed request keeps its row: it has an `outcome` other
than "ok" and no `received_ns`, and no `sent_ns` where no connection took it. `pandas.read_parquet` is enough.
"""

import contextlib
import csv
import errno
import io
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from images.errors import IsolatencyError, UsageError
from loadtest._pace import Effort
from loadtest._timing import ABSENT, STAGES

OUTCOMES = ("ok", "wrong_status", "wrong_answer", "timeout", "reset", "refused", "garbled")
OK, WRONG_STATUS, WRONG_ANSWER, TIMEOUT, RESET, REFUSED, GARBLED = range(len(OUTCOMES))

# The columns of a raw row, as the engine writes them: int64 of shape (n, FIELDS). ENDED is when the outcome was known;
# SENT and FIRST are 0 where there is none, the server's stages, from STAGES_AT on, ABSENT.
CONNECTION, INTENDED, SENT, FIRST, ENDED, OUTCOME, STATUS, BYTES_OUT, BYTES_IN, STAGES_AT = range(10)
FIELDS = STAGES_AT + len(STAGES)
Raw = NDArray[np.int64]

_NAME = pa.dictionary(pa.int16(), pa.string())
SCHEMA = pa.schema(
    [
        ("restart", pa.int16()),
        ("round", pa.int32()),
        ("block", pa.int32()),
        ("target", _NAME),
        ("model", _NAME),
        ("load", _NAME),
        ("worker", pa.int16()),
        ("connection", pa.int16()),
        ("intended_ns", pa.int64()),
        ("sent_ns", pa.int64()),  # null where it was never sent
        ("first_byte_ns", pa.int64()),  # null where no byte came, or the kernel gave no stamp
        ("received_ns", pa.int64()),  # null where the request failed
        ("status", pa.int16()),  # 0 where none came
        ("outcome", _NAME),
        ("bytes_out", pa.int32()),
        ("bytes_in", pa.int32()),
        *((f"server_{stage}_ns", pa.int32()) for stage in STAGES),  # null where the server did not say
        ("warmup", pa.bool_()),
    ]
)
BLOCK_COLUMNS = (
    "restart", "round", "block", "target", "model", "load",
    "start_ns", "end_ns", "drained_ns", "warmup", "host_cpu_us", "client_cpu_us",
    "arrivals", "late_p50_ns", "late_p99_ns", "late_max_ns", "queued", "reconnects", "gap_ns", "client_limited",
)  # fmt: skip
PEAK_COLUMNS = ("restart", "target", "model", "bound", "rate_rps", "low_rps", "high_rps", "reason")

ROW_GROUP = 65_536  # 9 MB in memory: what a run holds at most, however long it is
PART_S = 2.0  # what was recorded longer ago is on the disk
_PARTIAL = b"isolatency.partial"
# A dictionary of times that are all different costs half of the time to write, memory, and a fifth of the file.
_HOW: dict[str, Any] = {
    "compression": "lz4",
    "use_dictionary": [one.name for one in SCHEMA if pa.types.is_dictionary(one.type)],
}


def blank(n: int) -> Raw:
    """`n` rows of zeros, without stamps and stages."""
    raw = np.zeros((n, FIELDS), dtype=np.int64)
    raw[:, STAGES_AT:] = ABSENT
    return raw


class Where(NamedTuple):
    """What the requests of one block have in common. Plain Locust has just one block."""

    target: str
    model: str
    load: str
    restart: int = 0
    round: int = 0
    block: int = 0
    worker: int = 0
    warmup: bool = False


def table(raw: Raw, where: Where) -> pa.Table:
    """Raw rows, shape (n, FIELDS), as a table of SCHEMA."""
    n = len(raw)
    failed = raw[:, OUTCOME] != OK
    outcome = pa.DictionaryArray.from_arrays(pa.array(raw[:, OUTCOME].astype(np.int16)), pa.array(OUTCOMES))
    columns = [
        _same(n, where.restart, pa.int16()),
        _same(n, where.round, pa.int32()),
        _same(n, where.block, pa.int32()),
        _same_name(n, where.target),
        _same_name(n, where.model),
        _same_name(n, where.load),
        _same(n, where.worker, pa.int16()),
        pa.array(raw[:, CONNECTION].astype(np.int16)),
        pa.array(raw[:, INTENDED]),
        pa.array(raw[:, SENT], mask=raw[:, SENT] == 0),
        pa.array(raw[:, FIRST], mask=raw[:, FIRST] == 0),
        pa.array(raw[:, ENDED], mask=failed),
        pa.array(raw[:, STATUS].astype(np.int16)),
        outcome,
        pa.array(raw[:, BYTES_OUT].astype(np.int32)),
        pa.array(raw[:, BYTES_IN].astype(np.int32)),
        *(pa.array(column.astype(np.int32), mask=column == ABSENT) for column in raw.T[STAGES_AT:]),
        _same(n, where.warmup, pa.bool_()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _same(n: int, value: object, kind: pa.DataType) -> pa.Array:
    return pa.repeat(pa.scalar(value, kind), n)


def _same_name(n: int, value: str) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, dtype=np.int16)), pa.array([value]))


# pyarrow brings in pandas where it first sees an array, half a second in which the load would stand still: so now.
table(blank(1), Where("", "", ""))


class ParquetWriter:
    """Streams tables of SCHEMA to the disk, where they can be read whatever becomes of the writer.

    A Parquet file has its footer at its end, so one that is not closed cannot be read. Until `close` makes one file of
    them the rows lie in the folder PATH.parts, in files that are whole from the moment they have their names, for each
    row group one and at least every PART_S; `pandas.read_parquet` reads such a folder as it reads a file. A writer that
    is killed, or whose disk is full, leaves it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, _folder_of(path)
        self.facts: dict[str, str] = {}  # go into the file's metadata, under isolatency.NAME
        self._waiting: list[pa.Table] = []
        self._rows = self._parts = 0
        self._flushed_s = time.monotonic()
        self._closed = False
        with _naming(path):
            path.unlink(missing_ok=True)
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir()

    def add(self, rows: pa.Table) -> None:
        """Raises IsolatencyError when the disk cannot take it; what was written before stays readable."""
        self._waiting.append(rows)
        self._rows += len(rows)
        if self._rows >= ROW_GROUP or time.monotonic() - self._flushed_s >= PART_S:
            self.flush()

    def flush(self) -> None:
        """All that was added is on the disk. Raises IsolatencyError."""
        if self._rows:
            rows = _one(self._waiting)
            with _naming(self.folder), _whole(self.folder / f"{self._parts:06}.parquet") as fresh:
                pq.write_table(rows, fresh, row_group_size=len(rows), **_HOW)
            self._waiting, self._rows, self._parts = [], 0, self._parts + 1
        self._flushed_s = time.monotonic()

    def close(self, *, partial: bool = False) -> None:
        """Make one file of the parts; where it is `partial` they stay as they are, and so tell. May be called again.

        Raises IsolatencyError; the parts stay then.
        """
        if self._closed:
            return
        self._closed = True
        self.flush()
        if not partial:
            told = {f"isolatency.{name}".encode(): value.encode() for name, value in self.facts.items()}
            write(self.path, read(self.folder), f"what was measured is in {self.folder}", told)
            shutil.rmtree(self.folder, ignore_errors=True)


def write(path: Path, tables: Iterable[pa.Table], kept: str, told: dict[bytes, bytes] | None = None) -> None:
    """One Parquet file of all `tables`, in row groups, with `told` as its metadata; memory does not grow with it.

    Raises IsolatencyError, which says with `kept` where the rows are, and leaves no half file.
    """
    with _naming(path, kept), _whole(path) as fresh, pq.ParquetWriter(fresh, SCHEMA, **_HOW) as writer:
        for rows in _groups(tables):
            writer.write_table(rows, row_group_size=len(rows))
        writer.add_key_value_metadata(told or {})


def _groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, ROW_GROUP of them at least in each table but the last."""
    waiting, rows = list[pa.Table](), 0
    for more in tables:
        waiting.append(more)
        rows += len(more)
        if rows >= ROW_GROUP:
            yield _one(waiting)
            waiting, rows = [], 0
    if rows:
        yield _one(waiting)


def _one(tables: list[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables).unify_dictionaries()


def _folder_of(path: Path) -> Path:
    return path.with_name(path.name + ".parts")


def files(path: Path) -> list[Path]:
    """The Parquet files that `path` is: itself, or what lies in a writer's folder."""
    return sorted(path.glob("[0-9]*.parquet")) if path.is_dir() else [path]


def read(path: Path) -> Iterator[pa.Table]:
    """A samples file, or a writer's folder, by row groups. Raises OSError or pa.ArrowException."""
    for file in files(path):
        with pq.ParquetFile(file) as source:
            for group in range(source.num_row_groups):
                yield source.read_row_group(group, use_threads=False).cast(SCHEMA)  # each thread would hold memory


class CsvWriter:
    """The same rows as CSV; a full disk leaves whole lines only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _naming(path):
            self._file = path.open("wb", buffering=0)
        self._append(",".join(SCHEMA.names).encode() + b"\n")

    def add(self, rows: pa.Table) -> None:
        """Raises IsolatencyError when the file cannot take it."""
        text = io.BytesIO()
        plain = rows.cast(
            pa.schema([pa.field(f.name, pa.string() if pa.types.is_dictionary(f.type) else f.type) for f in SCHEMA])
        )
        pa_csv.write_csv(plain, text, pa_csv.WriteOptions(include_header=False, quoting_style="none"))
        self._append(text.getvalue())

    def close(self, *, partial: bool = False) -> None:
        """A CSV file has no place for a mark: the exit code and the log say that it is partial."""
        self._file.close()

    def _append(self, data: bytes) -> None:
        _append(self._file, self.path, data)


def open_writer(path: Path) -> ParquetWriter | CsvWriter:
    """A writer by the file's ending. Raises UsageError for another one than .parquet and .csv."""
    if path.suffix == ".parquet":
        return ParquetWriter(path)
    if path.suffix == ".csv":
        return CsvWriter(path)
    raise UsageError(f"samples are written as .parquet or .csv; found {path.name!r}")


class BlockWriter:
    """blocks-PHASE.csv: one line per block, on disk as soon as the block is over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _naming(path):
            self._file = path.open("wb", buffering=0)
        self._line(BLOCK_COLUMNS)

    def add(
        self,
        where: Where,
        start_ns: int,
        end_ns: int,
        drained_ns: int,
        host_cpu_us: int | None,
        client_cpu_us: int,
        effort: Effort | None = None,
    ) -> None:
        """`host_cpu_us` None: unknown, an empty field. Raises IsolatencyError when the file cannot take it."""
        did = effort or Effort()
        self._line(
            (where.restart, where.round, where.block, where.target, where.model, where.load,
             start_ns, end_ns, drained_ns, where.warmup, host_cpu_us, client_cpu_us,
             sum(did.late.values()), *did.lateness, did.queued, did.reconnects, did.gap_ns, did.limited)
        )  # fmt: skip

    def close(self) -> None:
        self._file.close()

    def _line(self, values: Iterable[object]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(values)
        _append(self._file, self.path, text.getvalue().encode())


def add_peak(path: Path, values: Iterable[object]) -> None:
    """One line of peak.csv, NaN as an empty field, on disk at once; the header comes with the first line. Raises
    IsolatencyError."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    with _naming(path):
        file = path.open("ab", buffering=0)
        try:
            if not file.tell():
                rows.writerow(PEAK_COLUMNS)
            rows.writerow("" if value != value else value for value in values)
            _append(file, path, text.getvalue().encode())
        finally:
            file.close()


def _append(file: FileIO, path: Path, data: bytes) -> None:
    """Write lines past Python's buffers; where that fails, take back the line that was written in part."""
    start = file.tell()
    with _naming(path):
        done = 0
        try:
            while done < len(data):
                done += file.write(memoryview(data)[done:])
        except OSError:
            file.truncate(start + data.rfind(b"\n", 0, done) + 1)
            file.seek(0, os.SEEK_END)
            raise


class _naming:
    """Turns an OSError into the one line that names the file, and says where what was measured is (`kept`): in that
    file, unless another place is given."""

    def __init__(self, path: Path, kept: str = "") -> None:
        self._path, self._kept = path, kept

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            reason = os.strerror(error.errno) if error.errno else str(error)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "free some space" if full else "choose another place"
            kept = self._kept or "what was measured before is in it" * self._path.exists()
            raise IsolatencyError(
                f"could not write {self._path}: {reason}{'; ' * bool(kept)}{kept}: {remedy}"
            ) from error


def parts(run: Path, stem: str, ending: str) -> list[Path]:
    """The phases' own files, which were never joined. A phase whose writer was ended early has a folder instead."""
    found = sorted(run.glob(f"{stem}-*{ending}*"))
    return [path for path in found if path.suffix == ending or path.with_suffix("") not in found]


def join(run: Path) -> list[str]:
    """Make samples.parquet and blocks.csv of the phases' own files, and remove those.

    Row groups are copied one by one, so that memory does not grow. What cannot be read stays where it is; the sentences
    returned name it. Nothing is written where there are no parts. Raises IsolatencyError where the whole cannot be
    written; the parts stay then.
    """
    sentences: list[str] = []
    found: list[Path] = []
    kept = "the phases' own files stay, and the report reads those"
    for path in parts(run, "samples", ".parquet"):
        try:
            for file in files(path):
                pq.read_metadata(file)
        except (OSError, pa.ArrowException) as error:
            sentences.append(f"{path.name} could not be read and is left as it is: {error}")
        else:
            found.append(path)
    if found:
        told = {_PARTIAL: b"true"} if any(is_partial(path) for path in found) else {}
        write(run / "samples.parquet", chain.from_iterable(map(read, found)), kept, told)
        for path in found:
            remove(path)
    blocks = parts(run, "blocks", ".csv")
    if blocks:
        with _naming(run / "blocks.csv", kept), _whole(run / "blocks.csv") as fresh, fresh.open("w") as out:
            out.write(",".join(BLOCK_COLUMNS) + "\n")
            for path in blocks:
                out.writelines(path.read_text().splitlines(keepends=True)[1:])
        for path in blocks:
            path.unlink()
    return sentences


def remove(path: Path) -> None:
    """A phase's file or folder of samples, and what a writer that was killed while it joined has left beside it."""
    for one in (path, _folder_of(path)):
        if one.is_dir():
            shutil.rmtree(one)
        else:
            one.unlink(missing_ok=True)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` once all is written: half a file never has its name."""
    fresh = path.with_name(f".{path.name}.part")
    try:
        yield fresh
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def is_partial(path: Path) -> bool:
    """Whether the samples in the Parquet file or folder `path` were cut short. Raises OSError or pa.ArrowException."""
    if path.is_dir():
        return True
    metadata: dict[bytes, bytes] | None = pq.read_metadata(path).metadata
    return metadata is not None and metadata.get(_PARTIAL) == b"true"
