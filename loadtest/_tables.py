"""The Summary as tables of text, the same for terminal and Markdown, each with what has to be known beside it."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

from loadtest._schema import Batch, Cell, Direct, Peak, Ratio, Ratios, Span, Summary
from loadtest._verdict import INFINITE, in_words, percent

NOTHING = "–"
RATIOS = ("p50 ×", "p99 ×", "req/s ×")
_T = TypeVar("_T")


class Grid(NamedTuple):
    """One table: title, columns (the first `words` of them are text), rows, and the notes that stand under it."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str] = ()
    words: int = 2


def grids(summary: Summary) -> list[Grid]:
    """All tables in their order; emulated targets come last, in tables of their own, and are in no ratio."""
    native = [cell for cell in summary.cells if not cell.emulated]
    batch = [row for row in summary.batch if not row.emulated]
    found = [verdicts(summary)] if any(cell.ratio for cell in native) else []
    found.append(targets(summary))
    if native or batch:
        found.append(overview(summary, native, batch))
    found += [serving("Serving", native)] if native else []
    found += typical(native)
    found += [jobs("Batch jobs", batch)] if batch else []
    if any(cell.ratio for cell in native):
        found.append(ratios(f"Serving, over {summary.baseline}, with 95 % intervals", native))
        found.append(could_be(str(summary.baseline), native))
        found += stamped(str(summary.baseline), native)
    if any(row.ratio for row in batch):
        found.append(job_ratios(f"Batch jobs, over {summary.baseline}, with 95 % intervals", batch))
    if summary.direct and summary.direct.cells:
        found.append(direct(summary.direct))
    found += stages(summary, emulated=False)
    if summary.prices:
        found.append(prices(summary))
    if summary.starts:
        found.append(starts(summary))
    if real := [row for row in summary.peaks if not row.emulated]:
        found.append(peaks("Peak", real))
    if summary.batch:
        found.append(reference(summary, batch))
    emulated = "emulated: no figure here says anything about the real thing"
    cells = [cell for cell in summary.cells if cell.emulated]
    slow = [row for row in summary.batch if row.emulated]
    found += [serving(f"Serving, {emulated}", cells)] if cells else []
    found += [jobs(f"Batch jobs, {emulated}", slow)] if slow else []
    found += stages(summary, emulated=True)
    if slow_peaks := [row for row in summary.peaks if row.emulated]:
        found.append(peaks(f"Peak, {emulated}", slow_peaks))
    if summary.allow_difference:
        found = [grid._replace(title=f"{grid.title} (UNEQUAL TARGETS: --allow-difference)") for grid in found]
    return found


def verdicts(summary: Summary) -> Grid:
    """p50 and p99 of the primary cells, over the baseline, and firecracker over docker."""
    labels = {target.name: target.label for target in summary.targets}
    given = [
        (cell.model, cell.load, cell.label, str(summary.baseline), cell.ratio) for cell in summary.cells if cell.ratio
    ]
    if summary.direct and summary.direct.over != summary.baseline:
        ours, over = labels[summary.direct.target], labels[summary.direct.over]
        given += [(cell.model, cell.load, ours, over, cell.ratio) for cell in summary.direct.cells]
    rows: list[tuple[str, ...]] = []
    for model, load, ours, over, ratios in given:
        if f"{model}:{load}" in summary.primary:
            for name in ("p50", "p99"):
                ratio: Ratio = getattr(ratios, name)
                where = f"{model}, {load}, {name}"
                verdict = in_words(ratio) + ", of these instances" * (ratio.of == "instances" and not ratio.reason)
                rows.append((where, f"{ours} over {over}", verdict, _difference(ratio), _added(ratio)))
    rows.sort(key=lambda row: row[0])
    margins = ", ".join(f"{100 * share:g} % at {name}" for name, share in summary.margins.items())
    notes = [f"a difference counts from {margins} on; p-values are Holm-corrected within a target"]
    if any(ratio.of == "instances" for *_, both in given for ratio in (both.p50, both.p99)):
        notes.append(
            "of these instances: fewer than 3 starts of each, or a server that cannot be started again; and two starts "
            "of one program differ too"
        )
    notes += _endless(ratio for *_, both in given for ratio in (both.p50, both.p99))
    return Grid("Verdicts", ("where", "what", "verdict", "difference", "µs"), rows, notes, words=3)


def _difference(ratio: Ratio) -> str:
    if ratio.estimate is None:
        return INFINITE.get(ratio.infinite, NOTHING)
    if ratio.low is None or ratio.high is None:
        return f"{percent(ratio.estimate)} ({NOTHING})"
    return f"{percent(ratio.estimate)} ({percent(ratio.low)[:-2]} to {percent(ratio.high)[:-2]})"


def _added(ratio: Ratio) -> str:
    span = ratio.added_us
    if span is None or span.low is None or span.high is None:
        return NOTHING
    return _signed(span, 1)


def could_be(base: str, cells: Sequence[Cell]) -> Grid:
    rows = [
        (
            f"{cell.model}, {cell.load}",
            cell.label,
            *((ratio.could_be or NOTHING).removeprefix("no more than ") for ratio in _three(cell.ratio)),
        )
        for cell in cells
        if cell.ratio
    ]
    title = f"How large a difference to {base} could still be, at 95 %"
    return Grid(title, ("model, load", "target", "p50", "p99", "req/s"), rows, ["each: no more than"])


def stamped(base: str, cells: Sequence[Cell]) -> list[Grid]:
    """The same by the kernel's stamps, beside what the client saw; none where there are none."""
    rows = [
        (f"{cell.model}, {cell.load}", cell.label, *map(_ratio, (both.p50, both.p50_kernel, both.p99, both.p99_kernel)))
        for cell in cells
        if (both := cell.ratio) and both.p50_kernel
    ]
    columns = ("model, load", "target", "p50 ×", "by stamps", "p99 ×", "by stamps")
    notes = ["by stamps: to the kernel's receipt of the answer's first byte, without what the client itself takes"]
    return [Grid(f"Serving, over {base}, by the kernel's stamps", columns, rows, notes)] if rows else []


def starts(summary: Summary) -> Grid:
    """What a cold start costs: medians over starts, with ratios to the baseline's of the same start."""
    rows = [
        (
            row.label,
            str(row.n),
            *(NOTHING if span is None else _span(span) for span in (row.ready_s, row.first_prediction_ms)),
            _ratio(row.ready_ratio),
            _ratio(row.first_prediction_ratio),
        )
        for row in summary.starts
    ]
    columns = ("target", "starts", "ready s", "first\nprediction ms", "ready ×", "first\nprediction ×")
    return Grid(f"Starts: median, and ratio to {summary.baseline}", columns, rows, words=1)


STAGES = {
    "client,\nbefore": ("client_queue",),
    "read,\nparse": ("read", "parse"),
    "queue,\nbatch": ("queue", "batch"),
    "compute": ("compute",),
    "serialise,\nrest": ("serialise", "server_rest"),
    "residual": ("residual",),
    "client,\nafter": ("client_receive",),
}


def stages(summary: Summary, *, emulated: bool, target: str | None = None) -> list[Grid]:
    """One table per quantile: µs by stage of the requests ranked around it."""
    found = []
    for band, ranks in (("p50", "49 to 51 %"), ("p99", "98.5 to 99.5 %")):
        rows = []
        for one in summary.stages:
            if one.band == band and one.emulated == emulated and target in (None, one.target):
                us = {part.name: part.us.estimate for part in one.parts}
                columns = [[us[name] for name in names if name in us] for names in STAGES.values()]
                shown = [f"{sum(known):,.1f}" if known else NOTHING for known in columns]
                rows.append((f"{one.model}, {one.load}", one.label, f"{one.total_us.estimate:,.1f}", *shown))
        notes = [
            f"mean µs of the requests ranked {ranks}, which sum to the total; read to serialise by the server's own "
            "clock; client, after: from the kernel's stamp of the first byte to the last byte in the client; residual: "
            "what is left, network, isolation and the server's write"
        ]
        notes += summary.stage_caveats if not emulated else []
        title = f"Where the time goes at {band}, µs" + ", emulated: no figure here says anything" * emulated
        if rows:
            found.append(Grid(title, ("model, load", "target", "total", *STAGES), rows, notes))
    return found


def prices(summary: Summary) -> Grid:
    """Two numbers to carry to another model, and how well they predict one that they do not know."""
    rows = []
    notes = [f"added µs = price of a request + price of compute × µs of compute; over {summary.baseline}"]
    for price in summary.prices:
        measured = next((span for model, _, span in price.points if model == price.predicted), None)
        rows.append(
            (
                price.label,
                _signed(price.per_request_us, 1),
                _signed(price.per_compute, 3),
                *(
                    NOTHING if span is None else _signed(span, 1)
                    for span in (price.predicted_us, measured, price.error_us)
                ),
            )
        )
        if price.error_us and price.error_us.low is not None and price.error_us.high is not None:
            holds = price.error_us.low <= 0 <= price.error_us.high
            told = "agrees with" if holds else "is not"
            failed = "" if holds else ": the line fails here"
            notes.append(
                f"{price.label}: what the line predicts for {price.predicted} {told} what was measured{failed}"
            )
    first = summary.prices[0]
    notes.append(f"fitted at {first.load} on {', '.join(first.fitted)}; compute is {first.compute_source}")
    columns = ("target", "µs per request", "µs per µs of compute", "predicted µs", "measured", "error")
    return Grid(
        f"The price of isolation: what {first.predicted or 'a model'} should cost", columns, rows, notes, words=1
    )


def _signed(span: Span, decimals: int) -> str:
    def one(value: float) -> str:
        text = f"{value:+,.{decimals}f}"
        return text.lstrip("+-") if not float(text.replace(",", "")) else text.replace("-", "−")

    if span.low is None or span.high is None:
        return one(span.estimate)
    return f"{one(span.estimate)} ({one(span.low)} to {one(span.high)})"


def peaks(title: str, found: Sequence[Peak]) -> Grid:
    """The highest rate of open arrivals that held a bound."""
    rows = [
        (
            f"{row.model}, {row.bound}",
            row.label,
            NOTHING if row.rate_rps is None else _span(row.rate_rps),
            row.reason or "",
        )
        for row in found
    ]
    return Grid(title, ("model, bound", "target", "req/s", ""), rows, ["the highest Poisson rate that held the bound"])


def _span(span: Span) -> str:
    if span.low is None or span.high is None:
        return significant(span.estimate)
    return f"{significant(span.estimate)} ({significant(span.low)}–{significant(span.high)})"


def targets(summary: Summary) -> Grid:
    rows = []
    for target in summary.targets:
        identity = target.identity or {}
        size = NOTHING if target.kind == "url" else f"{target.cpus} × {target.mem_mib:,}"
        rows.append(
            (
                target.label,
                target.accel or NOTHING,
                (identity.get("tree_sha256") or "unknown")[:12] + "*" * (identity.get("tree_sha256_source") == "label"),
                identity.get("blas_kernel") or "unknown",
                size,
                NOTHING if target.kind == "url" else significant(target.ready_s),
                significant(target.first_prediction_ms),
                significant(target.host_memory_mib),
            )
        )
    notes = [text for target in summary.targets for text in target.caveats]
    if any(row[2].endswith("*") for row in rows):
        notes.insert(0, "* the label built into the image; an emulated target does not compute its tree's digest")
    columns = ("target", "accel", "tree", "BLAS kernel", "CPU × MiB", "ready s", "first\nprediction ms", "host\nMiB")
    return Grid("Targets", columns, rows, notes, words=4)


def overview(summary: Summary, cells: Sequence[Cell], batch: Sequence[Batch]) -> Grid:
    """One row per target: p50 and throughput of each model at the plan's first and last load, and the jobs' means."""
    models, loads = _unique(cell.model for cell in cells), _unique(cell.load for cell in cells)
    scales = _unique((row.job, row.scale) for row in batch)
    by_key = {(cell.target, cell.model, cell.load): cell for cell in cells}
    means = {(row.target, row.job): row.mean_s for row in batch}
    rows: list[tuple[str, ...]] = []
    columns = ["target"]
    columns += [f"{model}\np50 µs" for model in models] + [f"{model}\nreq/s" for model in models]
    columns += [f"batch\n{job} s" for job, _ in scales]
    for target in summary.targets:
        if not target.emulated:
            few = [by_key.get((target.name, model, loads[0])) for model in models]
            many = [by_key.get((target.name, model, loads[-1])) for model in models]
            row = [_quantile(cell, "p50") if cell else NOTHING for cell in few]
            row += [significant(cell.throughput_rps) if cell else NOTHING for cell in many]
            row += [significant(means.get((target.name, job)), 4) for job, _ in scales]
            rows.append((target.label, *row))
    where = [f"p50 at {loads[0]}", f"req/s at {loads[-1]}"] if loads else []
    where += [f"batch {job}: mean, {scale}" for job, scale in scales]
    return Grid("Serving and batch side by side", tuple(columns), rows, ["; ".join(where)], words=1)


def serving(title: str, cells: Sequence[Cell]) -> Grid:
    shown = [name for name in ("p50", "p90", "p99", "p999") if any(_has(cell, name) for cell in cells)]
    quantiles = [f"{name.replace('p999', 'p99.9')} µs" for name in shown]
    columns = ("model, load", "target", "requests", *quantiles, "req/s", "CPU µs")
    rows: list[tuple[str, ...]] = []
    for cell in cells:
        failed = f" ({cell.failures:,} FAILED)" if cell.failures else ""
        rest = (significant(cell.throughput_rps), significant(cell.host_cpu_us_per_request))
        rows.append(
            (
                f"{cell.model}, {cell.load}",
                cell.label,
                f"{cell.requests:,}{failed}",
                *[_quantile(cell, name) for name in shown],
                *rest,
            )
        )
    notes = ["CPU µs: of the host, per request, the target's whole process tree (VMM and proxies included)"]
    needed = sorted({(n, name) for cell in cells for name, n in cell.samples_needed.items()})
    if needed:
        listed = ", ".join(f"{n:,} for {name.replace('p999', 'p99.9')}" for n, name in needed)
        notes.append(f"{NOTHING} or left out: too few requests for that quantile; needed are {listed}")
    late = [
        f"{cell.label}, {cell.model}, {cell.load} {one.p50_us:.0f}, {one.p99_us:.0f} and {one.max_us:,.0f}"
        for cell in cells
        if (one := cell.lateness)
    ]
    if late:
        notes.append(f"the client woke late for arrivals by p50, p99 and at most, µs: {'; '.join(late)}")
    if any(cell.infinite for cell in cells):
        notes.append("∞: the quantile falls among failed requests")
    return Grid(title, columns, rows, notes + [text for cell in cells for text in cell.caveats])


def typical(cells: Sequence[Cell]) -> list[Grid]:
    """What a block typically has, on which ratios rest, beside what all requests together have; none where no block has
    a quantile of its own."""
    rows = [
        (f"{cell.model}, {cell.load}", cell.label, *_beside(cell, "p50"), *_beside(cell, "p99"))
        for cell in cells
        if cell.typical_p50_us or cell.typical_p99_us
    ]
    columns = ("model, load", "target", "typical\np50 µs", "of all", "typical\np99 µs", "of all")
    notes = [
        "typical: of blocks less the lowest and the highest fifth, over starts, with its 95 % interval; ratios rest on "
        "it; of all: all requests together, with the stalls"
    ]
    return [Grid("Typical latency, beside that of all requests", columns, rows, notes)] if rows else []


def _beside(cell: Cell, name: str) -> tuple[str, str]:
    span: Span | None = getattr(cell, f"typical_{name}_us")
    return _span(span) if span else NOTHING, _quantile(cell, name)


def jobs(title: str, batch: Sequence[Batch]) -> Grid:
    """A job that ran once has a time and nothing around it."""
    rows: list[tuple[str, ...]] = []
    for row in batch:
        interval = NOTHING
        if row.ci95_s is not None:
            interval = f"{significant(row.ci95_s[0])} to {significant(row.ci95_s[1])}"
        accuracy = "differs" if row.accuracy is None else f"{row.accuracy:.3f}"
        mean = significant(row.mean_s, 4) + "*" * bool(row.caveats)
        figures = (significant(row.median_s), significant(row.stdev_s), significant(row.min_s), interval)
        rows.append((f"{row.job}, {row.scale}", row.label, str(row.n), mean, *figures, accuracy))
    columns: tuple[str, ...] = (
        "job, scale",
        "target",
        "n",
        "mean s",
        "median",
        "sd",
        "min",
        "95 % interval",
        "accuracy",
    )
    if all(row.n == 1 for row in batch):
        rows = [(*row[:4], row[-1]) for row in rows]
        columns = (*columns[:3], "seconds", "accuracy")
    notes = [text for row in batch for text in row.caveats]
    return Grid(title, columns, rows, [f"* {text}" for text in notes])


def ratios(title: str, cells: Sequence[Cell]) -> Grid:
    given = [(cell, _three(cell.ratio)) for cell in cells if cell.ratio]
    rows = [(f"{cell.model}, {cell.load}", cell.label, *map(_ratio, three)) for cell, three in given]
    return Grid(
        title, ("model, load", "target", *RATIOS), rows, _reasons(ratio for _, three in given for ratio in three)
    )


def job_ratios(title: str, batch: Sequence[Batch]) -> Grid:
    rows = [(f"{row.job}, {row.scale}", row.label, _ratio(row.ratio)) for row in batch if row.ratio]
    return Grid(title, ("job, scale", "target", "mean time ×"), rows, _reasons(row.ratio for row in batch if row.ratio))


def direct(direct: Direct) -> Grid:
    given = [(cell, _three(cell.ratio)) for cell in direct.cells]
    rows = [(f"{cell.model}, {cell.load}", *map(_ratio, three)) for cell, three in given]
    notes = _reasons(ratio for _, three in given for ratio in three)
    title = f"Serving, {direct.target} over {direct.over}, with 95 % intervals: the 2023 report's question"
    return Grid(title, ("model, load", *RATIOS), rows, notes, words=1)


def reference(summary: Summary, batch: Sequence[Batch]) -> Grid:
    """The report's own figures, this run's beside them where it has any, and what differs."""
    rows: list[tuple[str, ...]] = []
    kinds = {target.kind: target.name for target in reversed(summary.targets)}
    means = {(row.target, row.job): row.mean_s for row in batch}
    ratios = {job.job: job.ratio for job in summary.direct.batch} if summary.direct else {}
    for job in ("knn", "dnn"):
        docker, firecracker = (float(summary.report_reference[job][f"{kind}_s"]) for kind in ("docker", "firecracker"))
        rows.append((job, "the report", f"{docker:.4f}", f"{firecracker:.4f}", f"{firecracker / docker:.2f}"))
        here = (means.get((kinds.get(kind, ""), job)) for kind in ("docker", "firecracker"))
        rows.append((job, "this run", *(significant(mean, 4) for mean in here), _ratio(ratios.get(job))))
    columns = ("job", "whose", "docker s", "firecracker s", "firecracker over docker")
    notes = list(summary.report_reference["differs"])
    return Grid("The report of 2023 (mean of 100 runs, of 10 for dnn)", columns, rows, notes)


def _three(ratios: Ratios) -> list[Ratio]:
    return [ratios.p50, ratios.p99, ratios.throughput]


def _reasons(ratios: Iterable[Ratio]) -> list[str]:
    every = list(ratios)
    reasons = _unique(ratio.reason for ratio in every if ratio.reason and not ratio.blocked)
    blocked = _unique(ratio.blocked for ratio in every if ratio.blocked)
    found = [f"{NOTHING}, or no interval, where: {'; '.join(reasons)}"] if reasons else []
    found += [f"no verdict and no gate rests on some of these: {'; '.join(blocked)}"] if blocked else []
    return found + _endless(every)


def _endless(ratios: Iterable[Ratio]) -> list[str]:
    told = "∞: it falls among failed requests throughout, and the baseline's does not; −100 %, 0: the other way round"
    return [told] if any(ratio.infinite for ratio in ratios) else []


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None or ratio.estimate is None:
        return {1: "∞", -1: "0"}.get(ratio.infinite if ratio else 0, NOTHING)
    decimals = 3 if max(ratio.estimate, ratio.high or 0) < 10 else 1
    if ratio.low is None or ratio.high is None:
        return f"{ratio.estimate:.{decimals}f} ({NOTHING})"
    return f"{ratio.estimate:.{decimals}f} ({ratio.low:.{decimals}f}–{ratio.high:.{decimals}f})"


def _quantile(cell: Cell, name: str) -> str:
    return "∞" if name in cell.infinite else significant(getattr(cell, f"{name}_us"))


def _has(cell: Cell, name: str) -> bool:
    return _quantile(cell, name) != NOTHING


def _unique(values: Iterable[_T]) -> list[_T]:
    return list(dict.fromkeys(values))


def significant(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, whole numbers in full; – where there is no figure."""
    if value is None:
        return NOTHING
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2]) if value else digits  # of the rounded value
    decimals = max(0, digits - 1 - exponent)
    return f"{value:,.{decimals}f}"
