"""From a run folder to figures: every number of the report is computed here, from the raw samples alone."""

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from images.errors import UsageError
from loadtest import _folder, _stats
from loadtest._folder import Folder, Key, Requests, Target
from loadtest._schema import (
    REFERENCE,
    SCHEMA,
    Batch,
    Cell,
    Direct,
    DirectCell,
    DirectJob,
    Ratio,
    Ratios,
    Summary,
)

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
CLOCK_TOLERANCE = 0.01
STOLEN_TOLERANCE = 0.01


def summarise(run: Path, baseline: str | None = None) -> Summary:
    """Compute everything from the run folder. Raises UsageError for a folder that is none, is damaged or of another
    schema, and for a baseline that is not among its targets."""
    folder = _folder.read(run)
    base, notes = _baseline(folder, baseline)
    logs = {key: _block_logs(found, _blocks(folder, key)) for key, found in folder.requests.items()}
    targets = [msgspec.structs.replace(target, caveats=_of_target(target)) for target in folder.targets]
    cells = _cells(folder, base, logs)
    batch, differences = _batch(folder, base)
    run_caveats = [*folder.manifest.get("caveats", []), *notes, *folder.gaps, *differences, *_stolen(folder.manifest)]
    if cells:
        dropped = sum(cell.warmup_requests for cell in cells)
        total = dropped + sum(cell.requests for cell in cells)
        run_caveats.append(f"warm-up: the first blocks of each cell, {dropped} of {total} requests, are in no figure")
    parts = [run_caveats, *(target.caveats for target in targets)]
    parts += [cell.caveats for cell in cells] + [row.caveats for row in batch]
    manifest = folder.manifest
    return Summary(
        schema=SCHEMA, run=run.resolve().name, started=manifest.get("started"), ended=manifest.get("ended"),
        command=manifest.get("command", []), seed=folder.plan.seed,
        partial=bool(manifest.get("partial", True)) or bool(folder.gaps), baseline=base,
        allow_difference=folder.plan.allow_difference, targets=targets, cells=cells, batch=batch,
        direct=_direct(folder, logs), caveats=list(dict.fromkeys(text for part in parts for text in part)),
        run_caveats=run_caveats, errors=manifest.get("errors", []),
        report_reference=REFERENCE | {"differs": _differs(folder)}, machine=manifest.get("machine", {}),
        load_average={"before": manifest.get("load_before"), "after": manifest.get("load_after")},
    )  # fmt: skip


def _baseline(folder: Folder, wanted: str | None) -> tuple[str | None, list[str]]:
    """The target to compare against: the one named, else the first that is not emulated; and what is to be said."""
    native = [target.name for target in folder.targets if not target.emulated]
    if wanted is not None and wanted not in native:
        emulated = any(target.name == wanted for target in folder.targets)
        why = f"{wanted!r} is emulated: no baseline" if emulated else f"no target {wanted!r} to compare against"
        raise UsageError(f"{why}; there are: {', '.join(native) or 'none'}")
    base = wanted or (native[0] if native else None)
    planned = next(iter(_folder.planned(folder.plan)), base)
    if wanted is None and base is not None and planned != base:
        return base, [f"ratios are over {base}: {planned}, the plan's first target, is emulated or was not measured"]
    return base, []


def _stolen(manifest: dict[str, Any]) -> list[str]:
    before, after = manifest.get("cpu_time_before"), manifest.get("cpu_time_after")
    if not before or not after or after["total_s"] <= before["total_s"]:
        return []
    share = (after["stolen_s"] - before["stolen_s"]) / (after["total_s"] - before["total_s"])
    text = f"all figures: the hypervisor under this machine gave {share:.1%} of its CPU time to others during the run"
    return [text] if share > STOLEN_TOLERANCE else []


def _of_target(target: Target) -> list[str]:
    named = [f"{target.label}: {text.removeprefix(f'{target.name}: ')}" for text in target.caveats]
    differences = target.parity.get("differences", [])
    return [*named, *(f"{target.label}: not comparable: {text}" for text in differences)]


def _blocks(folder: Folder, key: Key) -> pd.DataFrame:
    """The blocks of a cell, those of its warm-up left out."""
    target, model, load = key
    blocks = folder.blocks
    chosen = (blocks["target"] == target) & (blocks["model"] == model) & (blocks["load"] == load) & ~blocks["warmup"]
    return blocks[chosen]


def _cells(folder: Folder, base: str | None, logs: dict[Key, pd.DataFrame]) -> list[Cell]:
    found = []
    for model in folder.plan.models:
        for load in folder.plan.loads:
            for target in folder.targets:
                key = (target.name, model, load)
                if key in folder.requests:
                    compared = base is not None and target.name != base and not target.emulated
                    ratio = _ratios(logs[key], logs.get((str(base), model, load))) if compared else None
                    found.append(_cell(target, key, folder.requests[key], _blocks(folder, key), ratio))
    return found


def _cell(target: Target, key: Key, found: Requests, blocks: pd.DataFrame, ratio: Ratios | None) -> Cell:
    us = found.rows["us"].to_numpy()
    good = us[np.isfinite(us)]
    seconds = float((blocks["end_ns"] - blocks["start_ns"]).sum()) / 1e9
    failures = sum(found.failed.values())
    caveats = []
    if failures:
        kinds = ", ".join(f"{kind} {n}" for kind, n in found.failed.items())
        caveats.append(
            f"{target.label}, {key[1]}, {key[2]}: {failures} of {len(us)} requests failed ({kinds}); they count as +∞"
        )
    values, needed, infinite = _quantiles(us)
    return Cell(
        target=target.name, label=target.label, emulated=target.emulated, model=key[1], load=key[2],
        requests=len(us), failures=failures, failures_by_kind=found.failed, warmup_requests=found.warmup,
        seconds=round(seconds, 3), blocks=len(blocks),
        throughput_rps=float(found.rows["in_time"].sum()) / seconds if seconds else None,
        mean_us=float(good.mean()) if len(good) else None, **values, samples_needed=needed, infinite=infinite,
        max_us=float(good.max()) if len(good) else None,
        host_cpu_us_per_request=_per_request(blocks["host_cpu_us"], len(us)),
        client_cpu_us_per_request=_per_request(blocks["client_cpu_us"], len(us)), ratio=ratio, caveats=caveats,
    )  # fmt: skip


def _quantiles(us: _stats.Floats) -> tuple[dict[str, float | None], dict[str, int], list[str]]:
    """The quantiles for which there are samples; how many the others need; which of them fall among failures."""
    values: dict[str, float | None] = {f"{name}_us": None for name in QUANTILES}
    needed = {name: n for name, q in QUANTILES.items() if len(us) < (n := _stats.samples_needed(q))}
    given = [name for name in QUANTILES if name not in needed]
    found = dict(zip(given, _stats.quantiles(us, [QUANTILES[name] for name in given]) if given else [], strict=True))
    values |= {f"{name}_us": value for name, value in found.items() if math.isfinite(value)}
    return values, needed, [name for name, value in found.items() if not math.isfinite(value)]


def _per_request(cpu_us: "pd.Series[float]", requests: int) -> float | None:
    """CPU time is read from the block's start to the end of its drain: over all requests, late ones included."""
    return float(cpu_us.sum()) / requests if requests and len(cpu_us) and cpu_us.notna().all() else None


def _block_logs(found: Requests, blocks: pd.DataFrame) -> pd.DataFrame:
    """Per (restart, round), the mean over its blocks of each block's own log p50, log p99 and log throughput.

    NaN where a block has too few requests for the quantile, ±inf where failures leave none or no answer came in time.
    """
    by_block = found.rows.groupby(["restart", "block"])
    us_of = {key: group.to_numpy() for key, group in by_block["us"]}
    in_time = by_block["in_time"].sum().to_dict()
    rows = []
    for block in blocks[["restart", "round", "block", "start_ns", "end_ns"]].to_dict("records"):
        key = (block["restart"], block["block"])
        us, seconds = us_of.get(key, np.empty(0)), (block["end_ns"] - block["start_ns"]) / 1e9
        row = {"restart": block["restart"], "round": block["round"]}
        for name, q in (("p50", 0.5), ("p99", 0.99)):
            row[name] = math.log(_stats.quantiles(us, [q])[0]) if len(us) >= _stats.MIN_BLOCK[q] else math.nan
        rate = in_time.get(key, 0) / seconds
        rows.append(row | {"throughput": math.log(rate) if rate else -math.inf})
    frame = pd.DataFrame(rows, columns=["restart", "round", "p50", "p99", "throughput"])
    # Plain means would pass over NaN, and with it over the blocks that decide whether there is a figure at all.
    return frame.groupby(["restart", "round"]).mean(skipna=False)


def _ratios(ours: pd.DataFrame, base: pd.DataFrame | None) -> Ratios:
    """Paired within a round, so that what drifts slowly cancels. Never from a part of the rounds: those in which a
    block was too small or requests failed are the slow ones."""

    def one(name: str) -> Ratio:
        if base is None:
            return Ratio(None, reason="the baseline has no such requests")
        pairs = pd.concat([ours[name], base[name]], axis=1, join="inner").to_numpy(dtype=float)
        if not len(pairs):
            return Ratio(None, reason="no round that both went through")
        if np.isnan(pairs).any():
            return Ratio(None, reason=f"a block holds fewer than {_stats.MIN_BLOCK[QUANTILES[name]]} requests")
        if np.isinf(pairs).any():
            return Ratio(None, reason="in a block it falls among failed requests, or none was answered")
        differences = pairs[:, 0] - pairs[:, 1]
        if len(differences) < _stats.MIN_PAIRS:
            return Ratio(math.exp(float(differences.mean())), reason=f"fewer than {_stats.MIN_PAIRS} rounds")
        return Ratio(*_stats.geometric_ratio(differences))

    return Ratios(one("p50"), one("p99"), one("throughput"))


def _batch(folder: Folder, base: str | None) -> tuple[list[Batch], list[str]]:
    """The rows, and sentences on accuracies that differ where they must not."""
    found: list[Batch] = []
    differences = []
    for job, of_job in folder.batch.groupby("job", sort=False) if len(folder.batch) else []:
        for _, of_scale in of_job.groupby("scale", sort=False):
            if of_scale["accuracy"].nunique() > 1:
                shown = of_scale.groupby("label", sort=False)["accuracy"].unique()
                listed = ", ".join(f"{label} {'/'.join(f'{v:g}' for v in values)}" for label, values in shown.items())
                differences.append(f"batch {job}: accuracy differs at equal scale, so the work did: {listed}")
        for target in folder.targets:
            ours = of_job[of_job["target"] == target.name].set_index("repeat")
            if len(ours):
                compared = base is not None and target.name != base and not target.emulated
                against = of_job[of_job["target"] == base].set_index("repeat")
                found.append(_batch_row(target, str(job), ours, _batch_ratio(ours, against) if compared else None))
    return found, differences


def _batch_row(target: Target, job: str, ours: pd.DataFrame, ratio: Ratio | None) -> Batch:
    seconds = ours["seconds"].to_numpy(dtype=float)
    differences = ours["host_seconds"].to_numpy(dtype=float) / seconds - 1
    worst = float(differences[np.abs(differences).argmax()])
    caveats = []
    if abs(worst) > CLOCK_TOLERANCE:
        caveats.append(f"batch {job}, {target.label}: by the host's clock {worst:+.1%} against the target's own")
    interval = _stats.mean_interval(seconds) if len(seconds) >= 2 else None
    return Batch(
        target=target.name, label=target.label, emulated=target.emulated, job=job,
        scale=str(ours["scale"].iloc[0]), n=len(seconds), mean_s=float(seconds.mean()),
        median_s=float(np.median(seconds)), stdev_s=float(seconds.std(ddof=1)) if len(seconds) >= 2 else None,
        min_s=float(seconds.min()), ci95_s=(interval.low, interval.high) if interval else None, ratio=ratio,
        accuracy=float(ours["accuracy"].iloc[0]) if ours["accuracy"].nunique() == 1 else None,
        host_clock_difference=worst, caveats=caveats,
    )  # fmt: skip


def _batch_ratio(ours: pd.DataFrame, base: pd.DataFrame) -> Ratio:
    """Ratio of means, paired by repeat, since repeat i ran everywhere before repeat i + 1."""
    if set(ours["scale"]) != set(base["scale"]):
        return Ratio(None, reason="the baseline did not run it at this scale")
    pairs = pd.concat([ours["seconds"], base["seconds"]], axis=1, join="inner").to_numpy(dtype=float)
    if not len(pairs):
        return Ratio(None, reason="no repeat that both ran")
    plain = float(pairs[:, 0].mean() / pairs[:, 1].mean())
    if len(pairs) < _stats.MIN_PAIRS:
        return Ratio(plain, reason=f"fewer than {_stats.MIN_PAIRS} repeats")
    found = _stats.ratio_of_means(pairs[:, 0], pairs[:, 1])
    return Ratio(*found) if found else Ratio(plain, reason="the baseline's repeats scatter too much to divide by")


def _direct(folder: Folder, logs: dict[Key, pd.DataFrame]) -> Direct | None:
    """The first firecracker over the first docker."""
    native = {target.kind: target.name for target in reversed(folder.targets) if not target.emulated}
    if not {"docker", "firecracker"} <= native.keys():
        return None
    over, ours = native["docker"], native["firecracker"]
    cells = [
        DirectCell(model, load, _ratios(logs[ours, model, load], logs[over, model, load]))
        for model in folder.plan.models
        for load in folder.plan.loads
        if (ours, model, load) in logs and (over, model, load) in logs
    ]
    batch = []
    for job, of_job in folder.batch.groupby("job", sort=False) if len(folder.batch) else []:
        mine, theirs = (of_job[of_job["target"] == name].set_index("repeat") for name in (ours, over))
        if len(mine) and len(theirs):
            batch.append(DirectJob(str(job), str(mine["scale"].iloc[0]), _batch_ratio(mine, theirs)))
    return Direct(ours, over, cells, batch)


def _differs(folder: Folder) -> list[str]:
    """What this run does otherwise than the 2023 report did."""
    sizes = sorted({f"{target.cpus} CPU and {target.mem_mib} MiB" for target in folder.targets if target.kind != "url"})
    found = [
        f"each target has {' or '.join(sizes)}; the report's microVM had 8 vCPU and 16,384 MiB",
        "one tree in every target, and repeats go round the targets; the report ran different sources, one system "
        "after the other, on another machine with other versions of Python and NumPy",
    ]
    for job in folder.plan.jobs:
        if job.job == "knn":
            found.append(f"knn: {job.repeats} repeats of {job.rows} rows; there 100 of 569")
        else:
            found.append(
                f"dnn: {job.repeats} repeats of {job.rows} rows and {job.epochs} epoch{'s' * (job.epochs > 1)}; "
                "there 10 of 10 epochs on a CSV whose length the report does not give"
            )
    return found
