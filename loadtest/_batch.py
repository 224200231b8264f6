"""Batch jobs inside the targets, repeats interleaved: repeat i runs on every target before repeat i + 1."""

import csv
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import requests

from hostsetup.target import Endpoint, Target
from images.errors import TargetError
from loadtest._client import call, session
from loadtest._plan import Job, Plan

PREPARE_TIMEOUT_S = 300.0
HOLD_S = 10.0  # a held answer is asked for again after this; no gap, since the next one is held too

COLUMNS = (
    "target", "label", "emulated", "job", "repeat", "order", "rows", "epochs", "scale",
    "seconds", "host_seconds", "accuracy", "result_json",
)  # fmt: skip


class Live(NamedTuple):
    """A target that is up, and where it answers."""

    target: Target
    endpoint: Endpoint


def scale(job: Job, rows: int) -> str:
    return f"{rows} rows" if job.job == "knn" else f"{rows} rows, {job.epochs} epoch{'s' * (job.epochs > 1)}"


def run_jobs(plan: Plan, live: Sequence[Live], path: Path, progress: Callable[[str], None], restart: int = 0) -> None:
    """Run every job of the plan on `live`, those repeats that fall to this start, and append a row for each to `path`
    (batch.csv).

    The host's time goes from the receipt of the answer that says the job is running to the receipt of the held
    answer that says it is done, so the way there and back cancels. Raises TargetError when a job fails.
    """
    emulated = live[0].endpoint.emulated
    order_of = random.Random(f"{plan.seed} batch {restart}")
    new = not path.exists()
    with path.open("a", newline="") as file:
        rows = csv.writer(file)
        if new:
            rows.writerow(COLUMNS)
            file.flush()
        for job in plan.jobs:
            for repeat in (0,) if emulated else range(restart, job.repeats, plan.restarts):
                order = list(live)
                order_of.shuffle(order)
                for place, one in enumerate(order):
                    progress(f"{one.endpoint.label}: {job.job}, repeat {repeat + 1}")
                    rows.writerow(_row(plan, job, one, repeat, place))
                    file.flush()


def _row(plan: Plan, job: Job, one: Live, repeat: int, place: int) -> list[Any]:
    endpoint = one.endpoint
    count = job.emulated_rows if endpoint.emulated else job.rows
    done, host_seconds = _run_one(plan, job, one, count)
    result = done["result"]
    return [
        endpoint.name, endpoint.label, endpoint.emulated, job.job, repeat, place, count, job.epochs, scale(job, count),
        done["seconds"], host_seconds, result["accuracy"], msgspec.json.encode(result).decode(),
    ]  # fmt: skip


def _run_one(plan: Plan, job: Job, one: Live, rows: int) -> tuple[dict[str, Any], float]:
    http, endpoint = session(), one.endpoint
    body = {"job": job.job, "rows": rows, "epochs": job.epochs, "seed": plan.seed}
    try:
        begun = call(http, endpoint, "POST", "/jobs", timeout_s=PREPARE_TIMEOUT_S, body=body)
    except requests.Timeout as error:
        raise TargetError(
            f"{endpoint.label}: the job {job.job} was not ready within {PREPARE_TIMEOUT_S:g} s"
        ) from error
    start = time.monotonic_ns()
    while True:
        try:
            state = call(http, endpoint, "GET", f"/jobs/{begun['id']}?wait=1", timeout_s=HOLD_S)
        except requests.Timeout:
            one.target.check()
            continue
        if state["state"] == "done":
            return state, (time.monotonic_ns() - start) / 1e9
        raise TargetError(f"{endpoint.label}: the job {job.job} ended as {state['state']}: {state.get('error')}")
