"""The peak: the highest Poisson rate at which a bound such as p99<=5ms holds.

Bracket, bisect, confirm; one target after the other, since two at their peak would share the machine.

Each probe is a load of its own on one target, recorded as any load is, in the folder peak/ of the run; peak.csv has a
line for each search: what it found, from the highest rate that held to the lowest that did not.
"""

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow.parquet as pq

from loadtest import _stats
from loadtest._batch import Live
from loadtest._bound import Bound, holds, parse
from loadtest._plan import Plan

COLUMNS = ("restart", "target", "model", "bound", "rate_rps", "low_rps", "high_rps", "reason")
FIRST_RPS = 100.0
LEAST_RPS, MOST_RPS = 1.0, 200_000.0
WIDTH = 1.08  # the bracket is narrowed until its ends are so close
LEAST_S = 2.0  # of a probe; a queue that grows takes some time to show
CONFIRM = 3  # times the requests of a probe
ATTEMPTS = 3  # of a probe in which the client could not keep up
TRIES = 4  # so often may a rate that a short probe held fail in the long one


class Probe(NamedTuple):
    """What a load at one rate gave. `limited`: it did not hold, and the client could not keep up, so that this says
    nothing of the target; a rate that a late client holds is held, since latency counts from the intended start."""

    held: bool
    limited: bool = False


class Peak(NamedTuple):
    """The search's bracket, and why it has an open end; no rate where the bound never held."""

    low_rps: float | None
    high_rps: float | None
    reason: str = ""


Drive = Callable[[Plan, str, Live, Path], object]  # puts a plan's load on a target, for a phase, into a folder
Try = Callable[[float, float], Probe]  # rate in requests/s, times the usual number of requests


def search(attempt: Try, first_rps: float = FIRST_RPS) -> Peak:
    """The bracket around the highest rate that holds, its lower end confirmed by a longer load."""
    low, high, why = _bracket(attempt, first_rps)
    if low is None:
        return Peak(None, high, why)
    for _ in range(TRIES):
        while high is not None and not why and high / low > WIDTH:
            middle = math.sqrt(low * high)
            tried = attempt(middle, 1)
            if tried.limited:
                why = f"client-limited at {middle:.0f}/s"
            elif tried.held:
                low = middle
            else:
                high = middle
        if attempt(low, CONFIRM).held:
            return Peak(low, None if why else high, why)
        high, low, why = low, low / WIDTH**2, ""
    return Peak(None, high, f"no rate near {high:.0f}/s held twice")


def _bracket(attempt: Try, first_rps: float) -> tuple[float | None, float | None, str]:
    """The last rate that held, the first that did not, and why one of them is missing."""
    low: float | None = None
    high: float | None = None
    rate = first_rps
    while True:
        tried = attempt(rate, 1)
        if tried.limited:
            return low, None, f"client-limited at {rate:.0f}/s"
        if tried.held:
            low = rate
        else:
            high = rate
        if low is not None and high is not None:
            return low, high, ""
        if tried.held and 2 * rate > MOST_RPS:
            return low, None, f"held at {rate:.0f}/s, the most that is tried"
        if not tried.held and rate == LEAST_RPS:
            return None, high, f"not even {rate:g}/s held it"
        rate = rate * 2 if tried.held else max(rate / 4, LEAST_RPS)


def probe(plan: Plan, bound: Bound, model: str, rate_rps: float, times: float) -> Plan:
    """The plan of one probe: one block of open arrivals, long enough for the bound's quantile."""
    seconds = max(LEAST_S, math.ceil(times * _stats.samples_needed(bound.q) / rate_rps))
    return msgspec.structs.replace(
        plan, models=(model,), loads=(f"poisson-{rate_rps:.3f}",), seconds=seconds, emulated_seconds=seconds,
        block_s=seconds, warmup_s=0.0, min_requests=0, only="load", primary=(),
    )  # fmt: skip


def outcome(folder: Path, phase: str, bound: Bound) -> Probe:
    """What the files of a probe say."""
    found = pq.read_table(folder / f"samples-{phase}.parquet", columns=["intended_ns", "received_ns", "outcome"])
    took = (found["received_ns"].to_numpy() - found["intended_ns"].to_numpy()).astype(float)
    took[np.asarray(found["outcome"].to_pylist()) != "ok"] = np.inf
    with (folder / f"blocks-{phase}.csv").open(newline="") as file:
        limited = any(line["client_limited"] not in ("", "0") for line in csv.DictReader(file))
    held = holds(took, bound)
    return Probe(held, limited and not held)


def find(
    plan: Plan, live: Sequence[Live], folder: Path, restart: int, drive: Drive, step: Callable[[str], None]
) -> None:
    """Search on each target and add the lines to peak.csv; `drive` puts a plan's load on a target.

    Raises TargetError when one dies under its load, with the lines of those before it kept.
    """
    bound = parse(plan.bound)
    (folder / "peak" / "logs").mkdir(parents=True, exist_ok=True)
    file = folder / "peak.csv"
    fresh = not file.exists()
    with file.open("a", newline="") as stream:
        lines = csv.writer(stream, lineterminator="\n")
        if fresh:
            lines.writerow(COLUMNS)
        for one in live:
            for model in models(plan):
                found = _on(plan, bound, one, model, folder / "peak", restart, drive, step)
                rate = None if found.low_rps is None else round(found.low_rps, 3)
                lines.writerow(
                    [restart, one.endpoint.name, model, bound.text, rate, rate, found.high_rps, found.reason]
                )
                stream.flush()


def models(plan: Plan) -> list[str]:
    """Those of the primary cells; the first one where the plan names none and has no knn."""
    named = list(dict.fromkeys(cell.partition(":")[0] for cell in plan.primary))
    return named or ["knn" if "knn" in plan.models else plan.models[0]]


def _on(
    plan: Plan,
    bound: Bound,
    one: Live,
    model: str,
    folder: Path,
    restart: int,
    drive: Drive,
    step: Callable[[str], None],
) -> Peak:
    count = 0

    def attempt(rate_rps: float, times: float) -> Probe:
        nonlocal count
        count += 1
        step(f"peak of {one.endpoint.label}, {model}, {bound.text}: {rate_rps:.4g}/s")
        for again in range(ATTEMPTS):
            phase = f"{one.endpoint.name}-{model}-{restart}-{count}" + f"-{again}" * (again > 0)
            drive(probe(plan, bound, model, rate_rps, times), phase, one, folder)
            found = outcome(folder, phase, bound)
            if not found.limited:
                break
        return found

    return search(attempt)
