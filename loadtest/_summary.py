"""From a run folder to figures: every number of the report is computed here, from the raw samples alone."""

import json
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa

from images.errors import IsolatencyError, UsageError
from loadtest import _samples, _stats
from loadtest._stats import Interval

SCHEMA = 1
QUANTILES = {"p50_us": 0.5, "p90_us": 0.9, "p99_us": 0.99, "p999_us": 0.999}
CLOCK_TOLERANCE = 0.01
REFERENCE = {
    "source": "the 2023 report (mean of 100 runs for knn, of 10 for dnn)",
    "knn": {"docker_s": 1.8965, "firecracker_s": 2.0842},
    "dnn": {"docker_s": 122.1339, "firecracker_s": 167.3205},
}


class Ratio(msgspec.Struct, frozen=True):
    """A target's figure over the baseline's, with its 95 % interval; no interval where the samples do not give one."""

    estimate: float
    low: float | None
    high: float | None
    verdict: str | None = None


class Ratios(msgspec.Struct, frozen=True):
    p50: Ratio | None
    p99: Ratio | None
    throughput: Ratio | None


class Cell(msgspec.Struct, frozen=True):
    """One target × model × load. A quantile is null where `samples_needed` says how many it would take, or where it
    falls among the failures, which count as +∞."""

    target: str
    label: str
    emulated: bool
    model: str
    load: str
    requests: int
    failures: int
    failures_by_kind: dict[str, int]
    warmup_requests: int
    seconds: float
    blocks: int
    throughput_rps: float
    mean_us: float | None
    p50_us: float | None
    p90_us: float | None
    p99_us: float | None
    p999_us: float | None
    samples_needed: dict[str, int]
    max_us: float | None
    host_cpu_us_per_request: float | None
    client_cpu_us_per_request: float | None
    ratio: Ratios | None


class Batch(msgspec.Struct, frozen=True):
    """One target × job. `host_clock_difference` is the host's time over the target's own, less 1, largest of all."""

    target: str
    label: str
    emulated: bool
    job: str
    scale: str
    n: int
    mean_s: float
    median_s: float
    stdev_s: float | None
    min_s: float
    ci95_s: tuple[float, float] | None
    ratio: Ratio | None
    accuracy: float
    host_clock_difference: float


class Summary(msgspec.Struct, frozen=True):
    """summary.json. `direct` is firecracker over docker where both ran unemulated: the 2023 report's question."""

    schema: int
    run: str
    partial: bool
    baseline: str | None
    allow_difference: bool
    targets: list[dict[str, Any]]
    cells: list[Cell]
    batch: list[Batch]
    direct: list[dict[str, Any]]
    caveats: list[str]
    errors: list[str]
    report_reference: dict[str, Any]
    machine: dict[str, Any]


class _Folder(msgspec.Struct):
    """What a run folder holds, as read."""

    path: Path
    plan: dict[str, Any]
    manifest: dict[str, Any]
    targets: list[dict[str, Any]]


def summarise(run: Path, baseline: str | None = None) -> Summary:
    """Compute everything from the run folder. Raises IsolatencyError for a folder that is none, or of another schema,
    UsageError for an unknown baseline."""
    folder = _read(run)
    native = [target["name"] for target in folder.targets if not target["emulated"]]
    if baseline is not None and baseline not in native:
        raise UsageError(f"no target {baseline!r} to compare against; there are: {', '.join(native) or 'none'}")
    base = baseline or (native[0] if native else None)
    caveats = list(folder.manifest["caveats"])
    for target in folder.targets:
        caveats += [
            text if text.startswith(target["label"]) else f"{target['label']}: {text}" for text in target["caveats"]
        ]
        caveats += [f"{target['label']}: not comparable: {text}" for text in target["parity"]["differences"]]
    cells = _cells(folder, base, caveats)
    batch = _batch(folder, base, caveats)
    return Summary(
        schema=SCHEMA, run=run.resolve().name, partial=bool(folder.manifest["partial"]), baseline=base,
        allow_difference=bool(folder.plan.get("allow_difference")), targets=folder.targets, cells=cells, batch=batch,
        direct=_direct(folder, caveats), caveats=list(dict.fromkeys(caveats)), errors=folder.manifest["errors"],
        report_reference=REFERENCE, machine=folder.manifest["machine"],
    )  # fmt: skip


def _read(run: Path) -> _Folder:
    try:
        manifest = json.loads((run / "manifest.json").read_text())
        targets = json.loads((run / "targets.json").read_text())
        plan = tomllib.loads((run / "plan.toml").read_text())
    except FileNotFoundError as error:
        raise IsolatencyError(f"{run} is no run folder: {Path(error.filename).name} is missing") from error
    except (OSError, ValueError) as error:
        raise IsolatencyError(f"the run folder {run} could not be read: {error}") from error
    if manifest.get("schema") != SCHEMA:
        raise IsolatencyError(
            f"{run} has schema {manifest.get('schema')}, this version reads {SCHEMA}: use the version that made it "
            f"({manifest.get('versions', {}).get('isolatency', 'unknown')})"
        )
    return _Folder(run, plan, manifest, targets)


def _requests(folder: _Folder) -> pd.DataFrame | None:
    path = folder.path / "samples.parquet"
    if not path.exists():
        return None
    columns = ["target", "model", "load", "round", "block", "sent_ns", "received_ns", "outcome", "warmup"]
    try:
        frame = pd.read_parquet(path, columns=columns)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise IsolatencyError(
            f"{path} could not be read: {error}; the rest of the folder may still be of use"
        ) from error
    frame["us"] = np.where(frame["outcome"] == "ok", (frame["received_ns"] - frame["sent_ns"]) / 1e3, np.inf)
    return frame.drop(columns=["sent_ns"])


def _cells(folder: _Folder, base: str | None, caveats: list[str]) -> list[Cell]:
    samples = _requests(folder)
    if samples is None:
        return []
    try:
        # "null" is a model's name here, and only an empty field is a missing value.
        blocks = pd.read_csv(
            folder.path / "blocks.csv",
            usecols=list(_samples.BLOCK_COLUMNS),
            keep_default_na=False,
            na_values={"host_cpu_us": [""]},
        )
    except (OSError, ValueError) as error:
        raise IsolatencyError(f"{folder.path / 'blocks.csv'} could not be read: {error}") from error
    cells = []
    for model in folder.plan["models"]:
        for load in folder.plan["loads"]:
            chosen = samples[(samples["model"] == model) & (samples["load"] == load)]
            timed = blocks[(blocks["model"] == model) & (blocks["load"] == load) & ~blocks["warmup"].astype(bool)]
            rounds = {}
            for name in (target["name"] for target in folder.targets):
                rounds[name] = _rounds(chosen[chosen["target"] == name], timed[timed["target"] == name])
            for target in folder.targets:
                name = target["name"]
                ours = chosen[chosen["target"] == name]
                if len(ours):
                    against = None if base is None or name == base or target["emulated"] else rounds[base]
                    ratio = None if against is None or not len(against) else _ratios(rounds[name], against)
                    cells.append(_cell(target, model, load, ours, timed[timed["target"] == name], ratio, caveats))
    dropped = int(samples["warmup"].sum())
    caveats.append(f"warm-up: the first seconds of each cell, {dropped} of {len(samples)} requests, are in no figure")
    return cells


def _cell(
    target: dict[str, Any], model: str, load: str, ours: pd.DataFrame, blocks: pd.DataFrame, ratio: Ratios | None,
    caveats: list[str],
) -> Cell:  # fmt: skip
    kept = ours[~ours["warmup"]]
    us = kept["us"].to_numpy()
    good = us[np.isfinite(us)]
    seconds = float((blocks["end_ns"] - blocks["start_ns"]).sum()) / 1e9
    in_time = _in_time(kept, blocks)
    values, needed = _quantiles(us)
    failed = kept["outcome"][kept["outcome"] != "ok"]
    by_kind = {str(kind): int(n) for kind, n in failed.value_counts().items() if n}
    where = f"{target['label']}, {model}, {load}"
    if len(failed):
        caveats.append(f"{where}: {len(failed)} of {len(us)} requests failed; they count as +∞ in the quantiles")
    return Cell(
        target=target["name"], label=target["label"], emulated=target["emulated"], model=model, load=load,
        requests=len(us), failures=len(failed), failures_by_kind=by_kind,
        warmup_requests=len(ours) - len(kept), seconds=round(seconds, 3), blocks=len(blocks),
        throughput_rps=int(in_time.sum()) / seconds if seconds else 0.0,
        mean_us=float(good.mean()) if len(good) else None, **values, samples_needed=needed,
        max_us=float(good.max()) if len(good) else None,
        host_cpu_us_per_request=_per_request(blocks["host_cpu_us"], len(us)),
        client_cpu_us_per_request=_per_request(blocks["client_cpu_us"], len(us)), ratio=ratio,
    )  # fmt: skip


def _in_time(requests: pd.DataFrame, blocks: pd.DataFrame) -> "pd.Series[bool]":
    """Which requests were answered before their block's end: what comes in the drain is nobody's throughput."""
    ends = requests["block"].map(blocks.set_index("block")["end_ns"])
    return (requests["outcome"] == "ok") & (requests["received_ns"] <= ends)


def _quantiles(us: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[dict[str, float | None], dict[str, int]]:
    values: dict[str, float | None] = {}
    needed: dict[str, int] = {}
    for name, q in QUANTILES.items():
        values[name] = None
        if len(us) < _stats.samples_needed(q):
            needed[name.removesuffix("_us")] = _stats.samples_needed(q)
        elif math.isfinite(value := _stats.quantiles(us, [q])[0]):
            values[name] = value
    return values, needed


def _per_request(cpu_us: "pd.Series[float]", requests: int) -> float | None:
    return float(cpu_us.sum()) / requests if requests and len(cpu_us) and cpu_us.notna().all() else None


def _rounds(ours: pd.DataFrame, blocks: pd.DataFrame) -> pd.DataFrame:
    """Per round, the mean over the target's blocks of the log of p50, p99 and throughput of each block."""
    rows = []
    kept = ours[~ours["warmup"]]
    in_time = _in_time(kept, blocks).groupby(kept["block"]).sum()
    us_of = {block: group.to_numpy() for block, group in kept.groupby("block")["us"]}
    for block in blocks[["block", "round", "start_ns", "end_ns"]].to_dict("records"):
        us = us_of.get(block["block"])
        if us is None:
            continue
        good = int(in_time[block["block"]])
        row: dict[str, Any] = {"round": block["round"], "p50": np.nan, "p99": np.nan, "throughput": np.nan}
        for name, q in (("p50", 0.5), ("p99", 0.99)):
            if len(us) >= _stats.MIN_BLOCK[q] and math.isfinite(value := _stats.quantiles(us, [q])[0]):
                row[name] = math.log(value)
        if good:
            row["throughput"] = math.log(good / ((block["end_ns"] - block["start_ns"]) / 1e9))
        rows.append(row)
    frame = pd.DataFrame(rows, columns=["round", "p50", "p99", "throughput"])
    return frame.groupby("round").mean()


def _ratios(ours: pd.DataFrame, base: pd.DataFrame) -> Ratios:
    """Paired within a round, so that what drifts slowly cancels; an interval needs three rounds."""

    def one(name: str) -> Ratio | None:
        differences = (ours[name] - base[name]).dropna().to_numpy(dtype=float)
        if len(differences) >= _stats.MIN_PAIRS:
            return _as_ratio(_stats.geometric_ratio(differences))
        return Ratio(math.exp(float(differences.mean())), None, None) if len(differences) else None

    return Ratios(one("p50"), one("p99"), one("throughput"))


def _as_ratio(found: Interval | None) -> Ratio | None:
    return None if found is None else Ratio(found.estimate, found.low, found.high)


def _batch_frame(folder: _Folder) -> pd.DataFrame | None:
    path = folder.path / "batch.csv"
    if not path.exists():
        return None
    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise IsolatencyError(f"{path} could not be read: {error}") from error


def _batch(folder: _Folder, base: str | None, caveats: list[str]) -> list[Batch]:
    frame = _batch_frame(folder)
    if frame is None:
        return []
    found = []
    for job, of_job in frame.groupby("job", sort=False):
        for _, of_scale in of_job.groupby("scale"):
            shown = of_scale.groupby("label")["accuracy"].agg(lambda values: values.iloc[0])
            if of_scale["accuracy"].nunique() > 1:
                listed = ", ".join(f"{label} {value:g}" for label, value in shown.items())
                caveats.append(f"batch {job}: accuracy differs at equal scale: {listed}")
        for target in folder.targets:
            ours = of_job[of_job["target"] == target["name"]].set_index("repeat")
            if len(ours):
                against = of_job[of_job["target"] == base].set_index("repeat")["seconds"] if base else None
                against = None if target["name"] == base or target["emulated"] else against
                found.append(_batch_row(target, str(job), ours, against, caveats))
    return found


def _batch_row(
    target: dict[str, Any], job: str, ours: pd.DataFrame, base: "pd.Series[float] | None", caveats: list[str]
) -> Batch:
    seconds = ours["seconds"].to_numpy(dtype=float)
    differences = ours["host_seconds"].to_numpy(dtype=float) / seconds - 1
    worst = float(differences[np.abs(differences).argmax()])
    if abs(worst) > CLOCK_TOLERANCE:
        caveats.append(f"batch {job}, {target['label']}: the host's clock gives {worst:+.1%} against the target's own")
    interval = _stats.mean_interval(seconds) if len(seconds) >= 2 else None
    return Batch(
        target=target["name"], label=target["label"], emulated=target["emulated"], job=job,
        scale=str(ours["scale"].iloc[0]), n=len(seconds), mean_s=float(seconds.mean()),
        median_s=float(np.median(seconds)), stdev_s=float(seconds.std(ddof=1)) if len(seconds) >= 2 else None,
        min_s=float(seconds.min()), ci95_s=(interval.low, interval.high) if interval else None,
        ratio=_batch_ratio(ours["seconds"], base), accuracy=float(ours["accuracy"].iloc[0]),
        host_clock_difference=worst,
    )  # fmt: skip


def _batch_ratio(ours: "pd.Series[float]", base: "pd.Series[float] | None") -> Ratio | None:
    """Ratio of means, paired by repeat, since repeat i ran everywhere before repeat i + 1."""
    if base is None:
        return None
    pairs = pd.concat([ours, base], axis=1, join="inner").to_numpy(dtype=float)
    if not len(pairs):
        return None
    found = _stats.ratio_of_means(pairs[:, 0], pairs[:, 1]) if len(pairs) >= _stats.MIN_PAIRS else None
    return _as_ratio(found) or Ratio(float(pairs[:, 0].mean() / pairs[:, 1].mean()), None, None)


def _direct(folder: _Folder, caveats: Sequence[str]) -> list[dict[str, Any]]:
    """firecracker over docker, in each cell and job, where both ran unemulated."""
    native = {target["kind"]: target["name"] for target in reversed(folder.targets) if not target["emulated"]}
    if not {"docker", "firecracker"} <= native.keys():
        return []
    both = [target for target in folder.targets if target["name"] in (native["docker"], native["firecracker"])]
    only = _Folder(folder.path, folder.plan, folder.manifest, both)
    found: list[dict[str, Any]] = []
    for cell in _cells(only, native["docker"], []):
        if cell.target == native["firecracker"]:
            found.append({"model": cell.model, "load": cell.load, "ratio": msgspec.to_builtins(cell.ratio)})
    for row in _batch(only, native["docker"], []):
        if row.target == native["firecracker"]:
            found.append({"job": row.job, "scale": row.scale, "ratio": msgspec.to_builtins(row.ratio)})
    return found
