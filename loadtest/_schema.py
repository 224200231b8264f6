"""summary.json: its fields and their units. Times in µs or s as named; null where there is no figure."""

from typing import Any

import msgspec

from loadtest._folder import Target

SCHEMA = 1
REFERENCE = {
    "source": "the 2023 report (mean of 100 runs for knn, of 10 for dnn; 8 vCPU, 16,384 MiB)",
    "knn": {"docker_s": 1.8965, "firecracker_s": 2.0842},
    "dnn": {"docker_s": 122.1339, "firecracker_s": 167.3205},
}


class Ratio(msgspec.Struct, frozen=True):
    """A target's figure over the baseline's with its 95 % interval; `reason` says why a part of it is null."""

    estimate: float | None
    low: float | None = None
    high: float | None = None
    verdict: str | None = None
    reason: str | None = None


class Ratios(msgspec.Struct, frozen=True):
    p50: Ratio
    p99: Ratio
    throughput: Ratio


class Cell(msgspec.Struct, frozen=True):
    """One target × model × load; `seconds` is the time of its blocks, warm-up is in no figure but `warmup_requests`.

    A quantile is null where `samples_needed` says how many it would take, or where `infinite` says that it falls among
    the failed requests, which count as +∞. `mean_us` and `max_us` are of the requests that were answered.
    """

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
    throughput_rps: float | None
    mean_us: float | None
    p50_us: float | None
    p90_us: float | None
    p99_us: float | None
    p999_us: float | None
    samples_needed: dict[str, int]
    infinite: list[str]
    max_us: float | None
    host_cpu_us_per_request: float | None
    client_cpu_us_per_request: float | None
    ratio: Ratios | None
    caveats: list[str]


class Batch(msgspec.Struct, frozen=True):
    """One target × job, by the target's own clock. `host_clock_difference` is the host's time over that, less 1: the
    largest of all repeats. `accuracy` is null where repeats differ in it."""

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
    accuracy: float | None
    host_clock_difference: float
    caveats: list[str]


class DirectCell(msgspec.Struct, frozen=True):
    model: str
    load: str
    ratio: Ratios


class DirectJob(msgspec.Struct, frozen=True):
    job: str
    scale: str
    ratio: Ratio


class Direct(msgspec.Struct, frozen=True):
    """firecracker over docker, the 2023 report's question, where both ran unemulated."""

    target: str
    over: str
    cells: list[DirectCell]
    batch: list[DirectJob]


class Summary(msgspec.Struct, frozen=True):
    """summary.json. `caveats` has all sentences: those of the run, of the targets, of the cells and of batch jobs."""

    schema: int
    run: str
    started: str | None
    ended: str | None
    command: list[str]
    seed: int | None
    partial: bool
    baseline: str | None
    allow_difference: bool
    targets: list[Target]
    cells: list[Cell]
    batch: list[Batch]
    direct: Direct | None
    caveats: list[str]
    run_caveats: list[str]
    errors: list[str]
    report_reference: dict[str, Any]
    machine: dict[str, Any]
    load_average: dict[str, list[float] | None]
