"""From a run folder to figures: every number of the report is computed here, from the raw samples alone."""

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from images.errors import UsageError
from loadtest import _cells, _folder, _jobs, _price, _stages, _starts, _stats, _verdict, _warmup, _words
from loadtest._cells import Logs
from loadtest._folder import Folder, Target
from loadtest._schema import REFERENCE, SCHEMA, Cell, Direct, DirectCell, DirectJob, Peak, Span, StartCost, Summary
from loadtest._verdict import Margins

PRIMARY = ("knn", "closed-1")
STOLEN_TOLERANCE = 0.01


def summarise(run: Path, baseline: str | None = None, margin: str | None = None) -> Summary:
    """Compute everything from the run folder. `margin`: other ones than the plan's, such as "2%,5%".

    Raises UsageError for a folder that is none, is damaged or of another schema, and for a baseline that is not among
    its targets."""
    folder = _folder.read(run)
    base, notes = _baseline(folder, baseline)
    margins = _verdict.margins(margin or folder.plan.margin)
    primary = _primary(folder)
    logs, warmups = _warmup.settle(folder, _cells.logs(folder), margins.p50)
    restarts = _restarts(folder)
    targets = [msgspec.structs.replace(target, caveats=_of_target(target, restarts)) for target in folder.targets]
    cells = _cells.cells(folder, base, logs, primary, margins)
    batch, differences = _jobs.batch(folder, base)
    stages, unsound = _stages.stages(folder)
    run_caveats = [*folder.manifest.get("caveats", []), *notes, *folder.gaps, *differences, *_stolen(folder.manifest)]
    run_caveats += _lengths(folder, cells)
    if cells:
        dropped = sum(cell.warmup_requests for cell in cells)
        total = dropped + sum(cell.requests for cell in cells)
        run_caveats.append(f"warm-up: the first blocks of each cell, {dropped} of {total} requests, are in no figure")
        run_caveats += [
            f"warm-up: in {one.model} {one.load} {one.left_out} of {one.quads} more quads, up to a change point"
            for one in warmups
            if one.left_out
        ]
    parts = [run_caveats, unsound, *(target.caveats for target in targets)]
    parts += [cell.caveats for cell in cells] + [row.caveats for row in batch]
    manifest = folder.manifest
    direct = _direct(folder, base, logs, primary, margins)
    return Summary(
        schema=SCHEMA, run=run.resolve().name, started=manifest.get("started"), ended=manifest.get("ended"),
        command=manifest.get("command", []), seed=folder.plan.seed,
        restarts=restarts, primary=[":".join(cell) for cell in primary], margins=margins._asdict(),
        answer=_words.answer(targets, cells, direct, base, primary),
        partial=bool(manifest.get("partial", True)) or bool(folder.gaps), baseline=base,
        allow_difference=folder.plan.allow_difference, targets=targets, cells=cells, warmups=warmups, batch=batch,
        starts=_start_costs(targets, base),
        stages=stages, stage_caveats=unsound,
        prices=_price.prices(folder, base, logs, stages), peaks=_peaks(folder), direct=direct,
        caveats=list(dict.fromkeys(text for part in parts for text in part)),
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


def _lengths(folder: Folder, cells: list[Cell]) -> list[str]:
    """How long blocks were; and where they are too short for a p99 of their own."""
    by_length: dict[float, list[str]] = {}
    for name, seconds in folder.manifest.get("block_s", {}).items():
        by_length.setdefault(seconds, []).append(name.replace(":", " "))
    if not by_length:
        return []
    found = ["blocks: " + "; ".join(f"{seconds:g} s ({', '.join(names)})" for seconds, names in by_length.items())]
    wanted = _stats.MIN_MEDIAN[0.99]
    small = {f"{one.model} {one.load}" for one in cells if not one.emulated and one.requests < wanted * one.blocks}
    few = ", ".join(name for names in by_length.values() for name in names if name in small)
    if few:
        found.append(f"{few}: blocks do not hold {wanted} requests of each target: p99 is described, not judged")
    return found


def _stolen(manifest: dict[str, Any]) -> list[str]:
    before, after = manifest.get("cpu_time_before"), manifest.get("cpu_time_after")
    if not before or not after or after["total_s"] <= before["total_s"]:
        return []
    share = (after["stolen_s"] - before["stolen_s"]) / (after["total_s"] - before["total_s"])
    text = f"all figures: the hypervisor under this machine gave {share:.1%} of its CPU time to others during the run"
    return [text] if share > STOLEN_TOLERANCE else []


def _of_target(target: Target, restarts: int) -> list[str]:
    named = [f"{target.label}: {text.removeprefix(f'{target.name}: ')}" for text in target.caveats]
    differences = target.parity.get("differences", [])
    if target.kind == "url" and restarts > 1:
        named.append(f"{target.label}: cannot be started again: what is said of it is of this instance")
    return [*named, *(f"{target.label}: not comparable: {text}" for text in differences)]


def _primary(folder: Folder) -> list[tuple[str, str]]:
    """The cells that verdicts are about: the plan's, else knn at closed-1, else the first that there is."""
    plan = folder.plan
    if plan.primary:
        return [_verdict.primary(text) for text in plan.primary]
    there = [(model, load) for model in plan.models for load in plan.loads]
    return [PRIMARY] if PRIMARY in there else there[:1]


def _restarts(folder: Folder) -> int:
    """How many times each target was started; at least once."""
    return max(1, int(folder.blocks["restart"].nunique()) if len(folder.blocks) else 0)


def _start_costs(targets: list[Target], base: str | None) -> list[StartCost]:
    """Where targets were started more than once; a server given by URL was started by nobody here."""

    def of(target: Target | None, name: str) -> dict[int, float]:
        starts = target.starts if target else []
        return {start.restart: value for start in starts if (value := getattr(start, name))}

    against = next((target for target in targets if target.name == base and target.kind != "url"), None)
    found = []
    for target in targets:
        if len(target.starts) > 1 and target.kind != "url":
            compared = target.name != base and not target.emulated and against is not None and against.starts
            ready, first = of(target, "ready_s"), of(target, "first_prediction_ms")
            ratios = [
                _starts.ratio_of_starts(ours, of(against, name)) if compared else None
                for ours, name in ((ready, "ready_s"), (first, "first_prediction_ms"))
            ]
            spans = [_starts.costs(np.array(list(ours.values()))) if ours else None for ours in (ready, first)]
            if spans[0] is not None:
                found.append(
                    StartCost(
                        target.name, target.label, target.emulated, len(target.starts), spans[0], spans[1], *ratios
                    )
                )
    return found


def _peaks(folder: Folder) -> list[Peak]:
    """Over starts where there are enough; else the search's own bracket, which holds nothing that starts differ by."""
    found: list[Peak] = []
    if not len(folder.peaks):
        return found
    for (model, bound), rows in folder.peaks.groupby(["model", "bound"], sort=False):
        for target in folder.targets:
            mine = rows[rows["target"] == target.name]
            rates = mine["rate_rps"].dropna()
            span = None
            if len(rates) >= _stats.MIN_PAIRS:
                span = Span(*_stats.interval(_stats.location(np.array(rates, dtype=float))))
            elif len(rates):
                high = float(mine["high_rps"].max())  # NaN: no rate that was tried was too high
                span = Span(float(rates.mean()), float(mine["low_rps"].min()), None if math.isnan(high) else high)
            if len(mine):
                reason = "; ".join(text for text in dict.fromkeys(mine["reason"]) if text) or None
                found.append(Peak(target.name, target.label, target.emulated, str(model), str(bound), span, reason))
    return found


def _direct(
    folder: Folder, base: str | None, logs: Logs, primary: list[tuple[str, str]], margins: Margins
) -> Direct | None:
    """The first firecracker over the first docker."""
    pair = _cells.direct(folder)
    if pair is None:
        return None
    ours, over = pair
    others = _cells.tests(ours, base, logs, primary) if base not in (None, ours, over) else []
    keys = [(m, ld) for m in folder.plan.models for ld in folder.plan.loads if (over, m, ld) in logs]
    found = _cells.judged(ours, over, keys, logs, primary, margins, _cells.limited(folder), others)
    cells = [DirectCell(model, load, ratios) for (_, model, load), ratios in found.items()]
    batch = []
    for job, of_job in folder.batch.groupby("job", sort=False) if len(folder.batch) else []:
        mine, theirs = (of_job[of_job["target"] == name].set_index("repeat") for name in (ours, over))
        if len(mine) and len(theirs):
            batch.append(DirectJob(str(job), str(mine["scale"].iloc[0]), _jobs.ratio_of_jobs(mine, theirs)))
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
