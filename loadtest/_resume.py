"""An interrupted run's folder, taken back to its last whole start, so that the run can go on from there."""

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa

from images.errors import UsageError
from loadtest import _folder
from loadtest._plan import Plan
from loadtest._samples import SCHEMA, read, remove, write

BEFORE = "_before"  # names the part that holds what is kept; no target's name begins so
Keep = Callable[[str, int], bool]  # target, restart


class Before(NamedTuple):
    """What is kept: whole starts, 0 to `starts` - 1, of native targets, emulated targets by name, and the lengths of
    blocks by MODEL:LOAD."""

    plan: Plan
    targets: list[dict[str, Any]]
    starts: int
    emulated: frozenset[str]
    lengths: dict[str, float]

    def has(self, name: str, emulated: bool, restart: int) -> bool:
        return name in self.emulated if emulated else restart < self.starts


def take_back(run: Path) -> Before:
    """Leave what the interrupted start measured out of the folder, and what the interrupted emulated target did.

    Raises UsageError for a folder that is none, is damaged, or went to its end.
    """
    folder = _folder.read(run)
    made = [names for names in _folder.sample_columns(folder) if names != SCHEMA.names]
    if made:
        raise UsageError(f"the samples of {run} are of another version, which this one cannot add to; start a new run")
    if not folder.manifest.get("partial", True):
        raise UsageError(f"the run {run} went to its end; there is nothing to go on with")
    names = [target.name for target in folder.targets if target.emulated]
    native = [target for target in folder.targets if not target.emulated]
    starts = max((len(target.starts) for target in native), default=0)
    # Emulated targets come last: where one was begun, all starts before it are whole.
    whole = starts if names else max(starts - 1, 0)
    lengths = folder.manifest.get("block_s", {}) if whole else {}
    before = Before(folder.plan, [], whole, frozenset(names[:-1]), lengths)
    emulated = {target.name: target.emulated for target in folder.targets}

    def keep(name: str, restart: int) -> bool:
        return before.has(name, emulated.get(name, False), restart)

    _samples(run, keep)
    _blocks(run, keep)
    _batch(run, keep, folder.plan)
    _peaks(run, keep)
    targets = json.loads((run / "targets.json").read_bytes())
    kept = [target for target in targets if keep(target["name"], 0)]
    for target in kept:
        target["starts"] = [start for start in target.get("starts", []) if keep(target["name"], start["restart"])]
    (run / "targets.json").write_bytes(msgspec.json.encode(kept))
    return before._replace(targets=kept)


def _samples(run: Path, keep: Keep) -> None:
    parts = _folder.parts(run, "samples", ".parquet")
    if not parts:
        return
    write(run / "samples.fresh", _kept(parts, keep), "the run folder is as it was")
    for path in parts:
        remove(path)
    (run / "samples.fresh").replace(run / f"samples-{BEFORE}.parquet")


def _kept(parts: list[Path], keep: Keep) -> Iterator[pa.Table]:
    for path in parts:
        with suppress(OSError, pa.ArrowException):  # a file that is damaged
            for rows in read(path):
                pairs = zip(rows["target"].to_pylist(), rows["restart"].to_pylist(), strict=True)
                yield rows.filter(pa.array([keep(*pair) for pair in pairs]))


def _blocks(run: Path, keep: Keep) -> None:
    lines: list[dict[str, str]] = []
    parts = _folder.parts(run, "blocks", ".csv")
    for path in parts:
        whole = path.read_text().rpartition("\n")[0]
        lines += [row for row in csv.DictReader(whole.splitlines()) if keep(row["target"], int(row["restart"]))]
    for path in parts:
        path.unlink()
    _write(run / f"blocks-{BEFORE}.csv", lines)


def _batch(run: Path, keep: Keep, plan: Plan) -> None:
    path = run / "batch.csv"
    if path.exists():
        whole = path.read_text().rpartition("\n")[0]
        rows = csv.DictReader(whole.splitlines())
        kept = [row for row in rows if keep(row["target"], int(row["repeat"]) % plan.restarts)]
        path.unlink()
        _write(path, kept)


def _peaks(run: Path, keep: Keep) -> None:
    path = run / "peak.csv"
    if path.exists():
        rows = csv.DictReader(path.read_text().rpartition("\n")[0].splitlines())
        kept = [row for row in rows if keep(row["target"], int(row["restart"]))]
        path.unlink()
        _write(path, kept)


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    if rows:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
