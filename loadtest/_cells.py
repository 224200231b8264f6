"""The cells of a summary: what one target did with one model under one load."""

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import pandas as pd

from loadtest import _arrivals, _starts, _stats, _verdict
from loadtest._folder import Folder, Key, Requests, Target
from loadtest._schema import Cell, Lateness, Ratios
from loadtest._verdict import Margins

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
CURVE = (0.01, 0.05, *(n / 10 for n in range(1, 10)), 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 0.99999)
LIMITED = 0.05  # a share of blocks
STALLS = 1.25  # a pooled p99 so many times the typical one is made by stalls
STALLED = 1.5  # so many times the typical p99 makes a block a stalled one

Logs = dict[Key, pd.DataFrame]


def logs(folder: Folder) -> Logs:
    return {key: _starts.block_logs(found, blocks(folder, key)) for key, found in folder.requests.items()}


def cells(folder: Folder, base: str | None, logs: Logs, primary: list[tuple[str, str]], margin: Margins) -> list[Cell]:
    """In the plan's order, with ratios over `base` and the verdicts of each target."""
    keys = [(model, load) for model in folder.plan.models for load in folder.plan.loads]
    began_ns = int(folder.blocks["start_ns"].min()) if len(folder.blocks) else 0
    ratios: dict[Key, Ratios] = {}
    busy = limited(folder)
    given = {target.name for target in folder.targets if target.kind == "url"}
    pair = direct(folder)
    for target in folder.targets:
        if base is not None and target.name != base and not target.emulated:
            others = tests(*pair, logs, primary) if pair and target.name == pair[0] and base != pair[1] else []
            instances = bool({target.name, base} & given)
            ratios |= judged(target.name, base, keys, logs, primary, margin, busy, others, instances)
    return [
        _cell(
            target,
            key,
            folder.requests[key],
            blocks(folder, key),
            logs[key],
            ratios.get(key),
            began_ns,
            busy.get(key, 0.0),
            folder.plan.min_requests,
            folder.unsettled.get(key),
        )
        for model, load in keys
        for target in folder.targets
        if (key := (target.name, model, load)) in folder.requests
    ]


def judged(
    ours: str, base: str, keys: list[tuple[str, str]], logs: Logs, primary: list[tuple[str, str]], margin: Margins,
    limited: dict[Key, float], others: Sequence[float], instances: bool = False,
) -> dict[Key, Ratios]:  # fmt: skip
    """The ratios of one target over another in every cell that it has, with verdicts where the cell is primary.

    `limited`: the share of each cell's blocks in which the load client could not keep up.
    `others`: p-values of the same target over another one, see judge.
    `instances`: one of the two cannot be started again, so that whatever is found is about this instance of it.
    """
    found: dict[Key, tuple[Ratios, bool]] = {}
    blocked: dict[tuple[int, str], str] = {}
    for key in keys:
        mine, theirs = logs.get((ours, *key)), logs.get((base, *key))
        if mine is None:
            continue
        for name in ("p50", "p99", "throughput"):
            if max(limited.get((ours, *key), 0), limited.get((base, *key), 0)) > LIMITED:
                blocked[len(found), name] = "client-limited, the load client could not keep up"
            elif (
                name != "throughput"
                and theirs is not None
                and (why := _starts.unsteady(mine, theirs, name, getattr(margin, name)))
            ):
                blocked[len(found), name] = why
        ratios = _starts.ratios(mine, theirs)
        if instances:
            ratios = Ratios(
                *(one and one.replace(of=one.of and "instances") for one in msgspec.structs.astuple(ratios))
            )
        found[ours, *key] = (ratios, key in primary)
    return dict(zip(found, _verdict.judge(list(found.values()), margin, blocked, others), strict=True))


def direct(folder: Folder) -> tuple[str, str] | None:
    """The first firecracker and the first docker: the one is compared with the other, too."""
    native = {target.kind: target.name for target in reversed(folder.targets) if not target.emulated}
    return (native["firecracker"], native["docker"]) if {"docker", "firecracker"} <= native.keys() else None


def tests(ours: str, over: str, logs: Logs, primary: list[tuple[str, str]]) -> list[float]:
    """The p-values of one target over another in the primary cells."""
    both = [_starts.ratios(logs[ours, *key], logs.get((over, *key))) for key in primary if (ours, *key) in logs]
    return [p for ratios in both for one in (ratios.p50, ratios.p99) if (p := _verdict.p_value(one)) is not None]


def limited(folder: Folder) -> dict[Key, float]:
    """The share of each cell's blocks in which the load client could not keep up; 0 where that was not looked at."""
    if "client_limited" not in folder.blocks:
        return {}
    return {key: float(blocks(folder, key)["client_limited"].fillna(0).mean()) for key in folder.requests}


def _lateness(of_cell: pd.DataFrame) -> Lateness | None:
    if "late_p50_ns" not in of_cell or not (timed := of_cell[of_cell["arrivals"] > 0]).size:
        return None
    return Lateness(
        float(timed["late_p50_ns"].median()) / 1e3, float(timed["late_p99_ns"].median()) / 1e3,
        float(timed["late_max_ns"].max()) / 1e3, int(timed["queued"].sum()),
    )  # fmt: skip


def _cell(
    target: Target, key: Key, found: Requests, blocks: pd.DataFrame, logs: pd.DataFrame, ratio: Ratios | None,
    began_ns: int, busy: float, wanted: int, unsettled: str | None,
) -> Cell:  # fmt: skip
    us = found.rows["us"].to_numpy()
    good = us[np.isfinite(us)]
    seconds = float((blocks["end_ns"] - blocks["start_ns"]).sum()) / 1e9
    failures = sum(found.failed.values())
    caveats = [unsettled] if unsettled else []
    if failures:
        kinds = ", ".join(f"{kind} {n}" for kind, n in found.failed.items())
        caveats.append(
            f"{target.label}, {key[1]}, {key[2]}: {failures} of {len(us)} requests failed ({kinds}); they count as +∞"
        )
    caveats += [f"{target.label}, {key[1]}, {key[2]}: {text}" for text in _gaps(blocks, key[2])]
    caveats += [f"{target.label}, {key[1]}, {key[2]}: {text}" for text in _few(found.rows, wanted)]
    if busy > LIMITED:
        caveats.append(
            f"{target.label}, {key[1]}, {key[2]}: client-limited in {busy:.0%} of its blocks: the figures are the "
            "client's own as much as the server's"
        )
    values, needed, infinite = _quantiles(us)
    typical = {name: _starts.typical(logs, name) for name in ("p50", "p99")}
    if typical["p99"] and (pooled := values["p99_us"]) and pooled > STALLS * typical["p99"].estimate:
        times, share = pooled / typical["p99"].estimate, _starts.stalled(logs, typical["p99"].estimate, STALLED)
        caveats.append(
            f"{target.label}, {key[1]}, {key[2]}: there are stalls: p99 of all requests is {times:.1f} times that of a "
            f"typical block; in {share:.0%} of the time a block's own is more than {STALLED:g} times it"
        )
    return Cell(
        target=target.name, label=target.label, emulated=target.emulated, model=key[1], load=key[2],
        requests=len(us), failures=failures, failures_by_kind=found.failed, warmup_requests=found.warmup,
        seconds=round(seconds, 3), blocks=len(blocks),
        throughput_rps=float(found.rows["in_time"].sum()) / seconds if seconds else None,
        mean_us=float(good.mean()) if len(good) else None, **values, samples_needed=needed, infinite=infinite,
        max_us=float(good.max()) if len(good) else None,
        host_cpu_us_per_request=_per_request(blocks["host_cpu_us"], len(us)),
        client_cpu_us_per_request=_per_request(blocks["client_cpu_us"], len(us)),
        lateness=_lateness(blocks), client_limited=busy, curve=_curve(us), drift=_starts.drift(logs, began_ns),
        typical_p50_us=typical["p50"], typical_p99_us=typical["p99"],
        ratio=ratio, caveats=caveats,
    )  # fmt: skip


def _gaps(of_cell: pd.DataFrame, load: str) -> list[str]:
    """That connections ended, whoever ended them, and were opened again."""
    if "reconnects" not in of_cell or not (times := int(of_cell["reconnects"].fillna(0).sum())):
        return []
    text = f"connections ended and were opened again {times:,} times, {of_cell['gap_ns'].sum() / 1e9:.3g} s in all"
    return [text + ("" if _arrivals.parse(load).open else ", which in a closed loop is in no latency")]


def _few(rows: pd.DataFrame, wanted: int) -> list[str]:
    """That a start ended with fewer requests than the plan wants of a cell."""
    least = int(rows.groupby("restart").size().min()) if len(rows) else 0
    return [f"{least:,} requests in a start, where the plan wants {wanted:,} (min_requests)"] if least < wanted else []


def _quantiles(us: _stats.Floats) -> tuple[dict[str, float | None], dict[str, int], list[str]]:
    """The quantiles for which there are samples; how many the others need; which of them fall among failures."""
    values: dict[str, float | None] = {f"{name}_us": None for name in QUANTILES}
    needed = {name: n for name, q in QUANTILES.items() if len(us) < (n := _stats.samples_needed(q))}
    given = [name for name in QUANTILES if name not in needed]
    found = dict(zip(given, _stats.quantiles(us, [QUANTILES[name] for name in given]) if given else [], strict=True))
    values |= {f"{name}_us": value for name, value in found.items() if math.isfinite(value)}
    return values, needed, [name for name, value in found.items() if not math.isfinite(value)]


def _curve(us: _stats.Floats) -> list[tuple[float, float | None]]:
    qs = [q for q in CURVE if len(us) >= _stats.samples_needed(max(q, 0.5))]
    found = _stats.quantiles(us, qs) if qs else []
    return [(q, round(value, 2) if math.isfinite(value) else None) for q, value in zip(qs, found, strict=True)]


def _per_request(cpu_us: "pd.Series[float]", requests: int) -> float | None:
    """CPU time is read from the block's start to the end of its drain: over all requests, late ones included."""
    return float(cpu_us.sum()) / requests if requests and len(cpu_us) and cpu_us.notna().all() else None


def blocks(folder: Folder, key: Key) -> pd.DataFrame:
    """The blocks of a cell, those of its warm-up left out."""
    target, model, load = key
    blocks = folder.blocks
    chosen = (blocks["target"] == target) & (blocks["model"] == model) & (blocks["load"] == load) & ~blocks["warmup"]
    return blocks[chosen]
