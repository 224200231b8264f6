"""summary.json: its fields and their units. Times in µs or s as named; null where there is no figure."""

from typing import Any

import msgspec

from loadtest._folder import Target

SCHEMA = 2
REFERENCE = {
    "source": "the 2023 report (mean of 100 runs for knn, of 10 for dnn; 8 vCPU, 16,384 MiB)",
    "knn": {"docker_s": 1.8965, "firecracker_s": 2.0842},
    "dnn": {"docker_s": 122.1339, "firecracker_s": 167.3205},
}


class Span(msgspec.Struct, frozen=True):
    """A figure with its 95 % interval, null where there is none."""

    estimate: float
    low: float | None = None
    high: float | None = None


class Ratio(msgspec.Struct, frozen=True):
    """A target's figure over the baseline's with its 95 % interval; `reason` says why a part of it is null.

    `of`: the interval is over "starts", `n` of them, or over the `n` quads of these "instances". `log_se` and `df`:
    standard error and degrees of freedom of its logarithm. `verdict` stands for p50 and p99 of primary cells only:
    slower, faster, no difference seen, or can't tell, by `p_holm` and `margin`; `starts_needed` is about how many
    starts would tell (null: unknown, or above 1,000). `could_be` is how large a difference could still be.
    `infinite`: 1 where the figure falls among failed requests in every start (or quad) and the baseline's in none, -1
    the other way round; there is no estimate then. `blocked`: why neither a verdict nor a gate rests on it.
    """

    estimate: float | None
    low: float | None = None
    high: float | None = None
    verdict: str | None = None
    reason: str | None = None
    of: str | None = None
    n: int = 0
    per_start: list[float] = []
    log_se: float | None = None
    df: float | None = None
    added_us: Span | None = None
    p_value: float | None = None
    p_holm: float | None = None
    margin: float | None = None
    starts_needed: int | None = None
    could_be: str | None = None
    infinite: int = 0
    blocked: str | None = None

    def replace(self, **changes: Any) -> "Ratio":
        return msgspec.structs.replace(self, **changes)


class Ratios(msgspec.Struct, frozen=True):
    """`…_kernel`: of times to the kernel's stamp of the answer, without the client's own share; null without stamps."""

    p50: Ratio
    p99: Ratio
    throughput: Ratio
    p50_kernel: Ratio | None = None
    p99_kernel: Ratio | None = None


class Lateness(msgspec.Struct, frozen=True):
    """How late the load client woke up for arrivals: medians over blocks, and the latest; how many found no connection
    free."""

    p50_us: float
    p99_us: float
    max_us: float
    queued: int


class Cell(msgspec.Struct, frozen=True):
    """One target × model × load; `seconds` is the time of its blocks, warm-up is in no figure but `warmup_requests`.

    A quantile is null where `samples_needed` says how many it would take, or where `infinite` says that it falls among
    the failed requests, which count as +∞. `mean_us` and `max_us` are of the requests that were answered. The quantiles
    are pooled; `typical_…` is the mean over starts of what a block of a start typically has, without its stalls.
    `client_limited`: the share of blocks in which the load client could not keep up. `curve`: (quantile, µs), as far as
    there are samples; `drift`: (minutes since the run's first block, p50 in µs) of blocks, several together where there
    are more than 100; null in both where failures reach it.
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
    lateness: Lateness | None
    client_limited: float
    curve: list[tuple[float, float | None]]
    drift: list[tuple[float, float | None]]
    typical_p50_us: Span | None
    typical_p99_us: Span | None
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
    repeats_s: list[float]
    caveats: list[str]


class DirectCell(msgspec.Struct, frozen=True):
    model: str
    load: str
    ratio: Ratios


class DirectJob(msgspec.Struct, frozen=True):
    job: str
    scale: str
    ratio: Ratio


class StartCost(msgspec.Struct, frozen=True):
    """What starts of a target cost, over `n` of them: medians with intervals, and ratios paired by start."""

    target: str
    label: str
    emulated: bool
    n: int
    ready_s: Span
    first_prediction_ms: Span | None
    ready_ratio: Ratio | None
    first_prediction_ratio: Ratio | None


class Part(msgspec.Struct, frozen=True):
    name: str
    us: Span


class Stages(msgspec.Struct, frozen=True):
    """Where the time of the requests ranked around a quantile (`band`) goes: `parts` in order, which sum to the total.

    Means over starts. A part that is not known (an unknown server, no stamps of the kernel) is left out, and the
    residual holds it. `compute_us`: per start.
    """

    target: str
    label: str
    emulated: bool
    model: str
    load: str
    band: str
    requests: int
    total_us: Span
    parts: list[Part]
    compute_us: list[float]


class Price(msgspec.Struct, frozen=True):
    """added µs = `per_request_us` + `per_compute` × µs of compute, fitted on `fitted`; `points`: (model, compute µs,
    added µs). `error_us` is what was predicted for the model that is not in the fit, less what was measured."""

    target: str
    label: str
    load: str
    fitted: list[str]
    compute_source: str
    points: list[tuple[str, float, Span]]
    per_request_us: Span
    per_compute: Span
    predicted: str | None
    predicted_us: Span | None
    error_us: Span | None


class Peak(msgspec.Struct, frozen=True):
    """The highest rate that held `bound`, such as p99<=5ms: over starts, or what one search bracketed."""

    target: str
    label: str
    emulated: bool
    model: str
    bound: str
    rate_rps: Span | None
    reason: str | None


class WarmUp(msgspec.Struct, frozen=True):
    """What of a model and load comes before its targets have settled: `left_out` of `quads`, beyond the plan's warm-up,
    in every start of every target that is not emulated."""

    model: str
    load: str
    quads: int
    left_out: int


class Direct(msgspec.Struct, frozen=True):
    """firecracker over docker, the 2023 report's question, where both ran unemulated."""

    target: str
    over: str
    cells: list[DirectCell]
    batch: list[DirectJob]


class Summary(msgspec.Struct, frozen=True):
    """summary.json. `answer` is the result in words; `caveats` has all sentences: those of the run, of the targets, of
    the cells, of the stages and of batch jobs."""

    schema: int
    run: str
    started: str | None
    ended: str | None
    command: list[str]
    seed: int | None
    restarts: int
    primary: list[str]
    margins: dict[str, float]
    answer: list[str]
    partial: bool
    baseline: str | None
    allow_difference: bool
    targets: list[Target]
    cells: list[Cell]
    warmups: list[WarmUp]
    batch: list[Batch]
    starts: list[StartCost]
    stages: list[Stages]
    stage_caveats: list[str]
    prices: list[Price]
    peaks: list[Peak]
    direct: Direct | None
    caveats: list[str]
    run_caveats: list[str]
    errors: list[str]
    report_reference: dict[str, Any]
    machine: dict[str, Any]
    load_average: dict[str, list[float] | None]
