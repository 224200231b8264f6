"""What a run folder holds, as read: one line of complaint for what cannot be used, a sentence for each gap.

A run that was killed leaves the phases' own files (samples-PHASE.parquet or its folder of parts, blocks-PHASE.csv) and
perhaps half a line; what of it can be read is used, and the gaps say that it is not all.
"""

import io
import json
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from images.errors import UsageError
from loadtest import _batch, _samples
from loadtest._plan import Plan

SCHEMA = 1
# Columns of blocks.csv that an older folder does not have.
LATER = ("arrivals", "late_p50_ns", "late_p99_ns", "late_max_ns", "queued", "reconnects", "gap_ns", "client_limited")
ROWS = _samples.ROW_GROUP  # read at a time
SETTLE_NS = 20_000_000  # after a switch caches are cold: p99 was 2.4 to 2.7 % higher in a block's first 10 to 20 ms
_COLUMNS = ["restart", "block", "target", "model", "load", "intended_ns", "received_ns", "outcome", "warmup"]

Key = tuple[str, str, str]  # target, model, load


class Start(msgspec.Struct, frozen=True):
    """One start of a target; null where something was not measured."""

    restart: int
    ready_s: float
    first_prediction_ms: float | None = None
    host_memory_mib: float | None = None


class Target(msgspec.Struct, frozen=True):
    """One entry of targets.json. `first_prediction_ms` and `host_memory_mib` are null where they were not measured.

    They and `ready_s` are of the first start; `starts` has every one, and is empty where there was only that.
    """

    name: str
    label: str
    kind: str
    accel: str | None
    emulated: bool
    cpus: int
    mem_mib: int
    cores: list[int]
    identity: dict[str, Any] | None
    ready_s: float
    first_prediction_ms: float | None
    host_memory_mib: float | None
    options: dict[str, Any]
    caveats: list[str]
    parity: dict[str, list[str]]
    starts: list[Start] = []


class Requests(NamedTuple):
    """The requests of one target × model × load. `rows` has one row per request that is not warm-up: restart, block,
    us (from the intended start to the last byte, +inf if it failed), in_time (answered before its block's end), settled
    (sent when its block's first moments were over), kernel_us (from the intended start to the kernel's stamp of the
    answer's first byte, +inf if it failed, NaN where there is no stamp; the column is missing in an older folder)."""

    rows: pd.DataFrame
    failed: dict[str, int]
    warmup: int


@dataclass
class Folder:
    """`blocks` and `batch` are empty frames where there are none; `gaps` are sentences on what is not there."""

    path: Path
    plan: Plan
    manifest: dict[str, Any]
    targets: list[Target]
    requests: dict[Key, Requests] = field(default_factory=dict)
    blocks: pd.DataFrame = field(default_factory=pd.DataFrame)
    batch: pd.DataFrame = field(default_factory=pd.DataFrame)
    peaks: pd.DataFrame = field(default_factory=pd.DataFrame)
    gaps: list[str] = field(default_factory=list)
    settled: dict[Key, int] = field(default_factory=dict)  # the round from which on a cell counts, where a rule says so
    unsettled: dict[Key, str] = field(default_factory=dict)  # why a cell has no steady state

    def leave_out(self, key: Key, before: int) -> None:
        """Make warm-up of what a cell did in the rounds before that one, in every start."""
        target, model, load = key
        blocks = self.blocks
        here = (blocks["target"] == target) & (blocks["model"] == model) & (blocks["load"] == load)
        blocks.loc[here & (blocks["round"] < before), "warmup"] = True
        found = self.requests[key]
        kept = blocks.loc[here & ~blocks["warmup"], ["restart", "block"]]
        kept = kept.astype({"restart": np.int16, "block": np.int32})
        rows = found.rows.merge(kept, on=["restart", "block"])
        self.requests[key] = found._replace(rows=rows, warmup=found.warmup + len(found.rows) - len(rows))
        self.settled[key] = before


def read(run: Path) -> Folder:
    """Raises UsageError for a folder that is no run folder, is of another schema, or is damaged."""
    folder = _head(run)
    columns = list(dict.fromkeys((*_samples.BLOCK_COLUMNS, *LATER)))
    blocks = [_table(path, columns, folder.gaps) for path in parts(run, "blocks", ".csv")]
    if blocks:
        # A join that was killed leaves the parts beside the whole.
        folder.blocks = pd.concat(blocks).drop_duplicates(["restart", "block", "target"])
        # All requests of an offline block start at once: it lasts until the last is answered.
        offline = folder.blocks["load"] == "offline"
        folder.blocks.loc[offline, "end_ns"] = folder.blocks.loc[offline, "drained_ns"]
        folder.blocks["warmup"] = folder.blocks["warmup"].map({"True": True, "False": False}).astype(bool)
        folder.requests = _requests(folder)
    if (run / "batch.csv").exists():
        folder.batch = _table(run / "batch.csv", _batch.COLUMNS, folder.gaps)
    if (run / "peak.csv").exists():
        folder.peaks = _table(run / "peak.csv", _samples.PEAK_COLUMNS, folder.gaps)
    folder.gaps += _missing(folder)
    return folder


def _head(run: Path) -> Folder:
    try:
        manifest = json.loads((run / "manifest.json").read_bytes())
        if not isinstance(manifest, dict) or not isinstance(manifest.get("versions", {}), dict):
            raise ValueError("manifest.json is none of ours")
        found = manifest.get("schema")
        if found != SCHEMA:
            made_by = manifest.get("versions", {}).get("isolatency") or "unknown"
            raise UsageError(
                f"{run} has schema {found!r}, this version reads {SCHEMA}: use the version that made it ({made_by})"
            )
        targets = msgspec.json.decode((run / "targets.json").read_bytes(), type=list[Target])
        plan = msgspec.convert(tomllib.loads((run / "plan.toml").read_text()), Plan)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{run} is no run folder: {Path(error.filename).name} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"the run folder {run} is damaged: {_one_line(error)}") from error
    return Folder(run, plan, manifest, targets)


def plan_of(run: Path) -> Plan:
    """The plan alone. Raises UsageError as `read` does."""
    return _head(run).plan


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def parts(run: Path, stem: str, ending: str) -> list[Path]:
    """The whole file, where there is one, and the parts of it that were never joined."""
    whole = run / f"{stem}{ending}"
    return [*([whole] if whole.exists() else []), *_samples.parts(run, stem, ending)]


def _table(path: Path, columns: Sequence[str], gaps: list[str]) -> pd.DataFrame:
    """A CSV file of ours; the half line of a writer that was killed is left out and noted in `gaps`."""
    texts = {"target", "label", "emulated", "job", "scale", "model", "load", "warmup", "bound", "reason"}
    try:
        text = path.read_text()
        whole, _, torn = text.rpartition("\n")
        if torn:
            gaps.append(f"{path.name}: its last line is torn and left out")
        # "null" is a model's name here, and only an empty field is a missing value.
        there = whole.partition("\n")[0].split(",")
        wanted = [name for name in columns if name != "result_json" and (name in there or name not in LATER)]
        frame = pd.read_csv(io.StringIO(whole), usecols=wanted, dtype=str, keep_default_na=False)
        for name in set(wanted) - texts:
            frame[name] = pd.to_numeric(frame[name])
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} could not be read: {_one_line(error)}") from error
    return frame


def sample_columns(folder: Folder) -> list[list[str]]:
    """The columns of each samples file."""
    return [source.schema_arrow.names for source in _sources(folder, quiet=True)]


def samples(folder: Folder, columns: Sequence[str]) -> Iterator[pd.DataFrame]:
    """All samples once more, by pieces, with those of `columns` that the files have. Raises UsageError."""
    for source in _sources(folder, quiet=True):
        there = [name for name in columns if name in source.schema_arrow.names]
        try:
            for batch in source.iter_batches(batch_size=ROWS, columns=there):
                # Whole numbers stay whole where some are null: as floats these clocks would lose a tenth of a µs.
                yield batch.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype(), pa.int32(): pd.Int32Dtype()}.get)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UsageError(f"{folder.path / 'samples.parquet'} could not be read: {_one_line(error)}") from error


def _sources(folder: Folder, *, quiet: bool = False) -> Iterator[pq.ParquetFile]:
    """samples.parquet, else those of its parts that can be read, one open at a time; what is wrong with them is noted
    unless `quiet`."""
    gaps: list[str] = [] if quiet else folder.gaps
    for path in parts(folder.path, "samples", ".parquet"):
        whole, readable = path.name == "samples.parquet", False
        for file in _samples.files(path):
            try:
                source = pq.ParquetFile(file)
            except (OSError, pa.ArrowException) as error:
                if whole and not _samples.parts(folder.path, "samples", ".parquet"):
                    raise UsageError(f"{path} could not be read: {_one_line(error)}") from error
                gaps.append(f"{file.relative_to(folder.path)}: could not be read, its requests are in no figure")
                continue
            readable = True
            with source:
                yield source
        if readable and _samples.is_partial(path):
            gaps.append(f"{path.name}: was cut short")
        if readable and whole:
            return
        if not whole:
            gaps.append(f"{path.name}: was never joined into samples.parquet; the run was killed")


def _requests(folder: Folder) -> dict[Key, Requests]:
    """Read by batches and by columns: 16 bytes are kept of each request."""
    timed = folder.blocks.loc[
        ~folder.blocks["warmup"], ["restart", "block", "target", "model", "load", "start_ns", "end_ns"]
    ]
    ends = dict(iter(timed.groupby(["target", "model", "load"])))
    pieces: dict[Key, list[pd.DataFrame]] = defaultdict(list)
    failed: dict[Key, Counter[str]] = defaultdict(Counter)
    warmup: Counter[Key] = Counter()
    stray = 0
    for source in _sources(folder):
        try:
            stamped = "server_total_ns" in source.schema_arrow.names  # else first_byte_ns is not the kernel's
            for batch in source.iter_batches(batch_size=ROWS, columns=[*_COLUMNS, *["first_byte_ns"] * stamped]):
                for key, part in batch.to_pandas().groupby(["target", "model", "load"], observed=True):
                    cell: Key = key
                    kept = part[~part["warmup"]]
                    warmup[cell] += len(part) - len(kept)
                    rows, kinds = _timed(kept, ends.get(cell), 0 if cell[2] == "offline" else SETTLE_NS)
                    stray += len(kept) - len(rows)
                    pieces[cell].append(rows)
                    failed[cell].update(kinds)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise UsageError(f"{folder.path / 'samples.parquet'} could not be read: {_one_line(error)}") from error
    if stray:
        folder.gaps.append(f"samples: {stray} requests of blocks that did not end are in no figure")
    return {
        cell: Requests(pd.concat(pieces.pop(cell), ignore_index=True), dict(failed[cell]), warmup[cell])
        for cell in list(pieces)
    }


def _timed(kept: pd.DataFrame, ends: pd.DataFrame | None, settle_ns: int) -> tuple[pd.DataFrame, Counter[str]]:
    """The rows of one cell with their times, less those whose block has no end; and what failed of them, by kind."""
    if ends is None:
        ends = pd.DataFrame({"restart": [], "block": [], "start_ns": [], "end_ns": []}, dtype=np.int64)
    kept = kept.merge(ends[["restart", "block", "start_ns", "end_ns"]], on=["restart", "block"])
    good = (kept["outcome"] == "ok").to_numpy()
    received = kept["received_ns"].to_numpy(dtype=float)
    us = np.where(good, (received - kept["intended_ns"].to_numpy()) / 1e3, np.inf)
    kernel: dict[str, Any] = {}
    if "first_byte_ns" in kept:
        stamp = kept["first_byte_ns"].to_numpy(dtype=float)
        since = np.where(good, (stamp - kept["intended_ns"].to_numpy()) / 1e3, np.inf)
        kernel["kernel_us"] = since.astype(np.float32)
    rows = pd.DataFrame(
        {
            "restart": kept["restart"].to_numpy(dtype=np.int16),
            "block": kept["block"].to_numpy(dtype=np.int32),
            "us": us,
            "in_time": good & (received <= kept["end_ns"].to_numpy()),
            "settled": (kept["intended_ns"] >= kept["start_ns"] + settle_ns).to_numpy(),
        }
        | kernel
    )
    return rows, Counter(kept.loc[~good, "outcome"].astype(str).tolist())


def planned(plan: Plan) -> list[str]:
    """The names of the plan's targets, in its order."""
    return [str(target.get("name", target.get("kind"))) for target in plan.targets]


def _missing(folder: Folder) -> list[str]:
    """What the plan wanted and the folder does not hold."""
    plan = folder.plan
    found: list[str] = []
    here = {target.name for target in folder.targets}
    found += [f"{name}: was not measured" for name in planned(plan) if name not in here]
    for target in folder.targets:
        if plan.only != "batch":
            lost = [
                f"{model} {load}"
                for model in plan.models
                for load in plan.loads
                if (target.name, model, load) not in folder.requests
            ]
            found += [f"{target.label}: no requests of {', '.join(lost)}"] if lost else []
        if plan.only != "load" and target.kind != "url":
            for job in plan.jobs:
                wanted = 1 if target.emulated else job.repeats
                done = 0
                if len(folder.batch):
                    done = int(((folder.batch["target"] == target.name) & (folder.batch["job"] == job.job)).sum())
                found += [f"batch {job.job}, {target.label}: {done} of {wanted} repeats"] if done < wanted else []
    return found
