"""The figures of a Summary as flat rows, one per figure, for a spreadsheet: `isolatency report --format csv`."""

import csv
import io
from collections.abc import Iterator

from loadtest._schema import Ratio, Ratios, Span, Summary

COLUMNS = (
    "what", "target", "emulated", "model_or_job", "load_or_scale", "figure", "unit", "value", "low", "high", "verdict",
)  # fmt: skip
Row = tuple[object, ...]
CELL = {
    "requests": "", "failures": "", "throughput_rps": "1/s", "mean_us": "µs", "p50_us": "µs", "p90_us": "µs",
    "p99_us": "µs", "p999_us": "µs", "max_us": "µs", "host_cpu_us_per_request": "µs", "client_cpu_us_per_request": "µs",
}  # fmt: skip


def text(summary: Summary) -> str:
    """An empty field where there is no figure; `inf` where it falls among failed requests."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(COLUMNS)
    rows.writerows(_rows(summary))
    return out.getvalue()


def _rows(summary: Summary) -> Iterator[Row]:
    for cell in summary.cells:
        where = ("serving", cell.label, cell.emulated, cell.model, cell.load)
        for name, unit in CELL.items():
            value = "inf" if name.removesuffix("_us") in cell.infinite else getattr(cell, name)
            yield (*where, name, unit, value, None, None, None)
        for name in ("typical_p50_us", "typical_p99_us"):
            yield (*where, name, "µs", *_ends(getattr(cell, name)), None)
        if cell.ratio is not None:
            yield from _ratios(where, str(summary.baseline), cell.ratio)
    for row in summary.batch:
        where = ("batch", row.label, row.emulated, row.job, row.scale)
        low, high = row.ci95_s or (None, None)
        yield (*where, "mean_s", "s", row.mean_s, low, high, None)
        if row.ratio is not None:
            yield from _ratio(where, f"mean over {summary.baseline}", row.ratio)
    for one in summary.stages:
        for part in one.parts:
            where = ("stages", one.label, one.emulated, one.model, one.load)
            yield (*where, f"{part.name} at {one.band}", "µs", *_ends(part.us), None)
    yield from _direct(summary)
    yield from _of_targets(summary)


def _direct(summary: Summary) -> Iterator[Row]:
    """The target over another than the baseline."""
    if summary.direct is None:
        return
    labels = {target.name: target.label for target in summary.targets}
    ours, over = labels[summary.direct.target], labels[summary.direct.over]
    for cell in summary.direct.cells:
        yield from _ratios(("serving", ours, False, cell.model, cell.load), over, cell.ratio)
    for job in summary.direct.batch:
        yield from _ratio(("batch", ours, False, job.job, job.scale), f"mean over {over}", job.ratio)


def _of_targets(summary: Summary) -> Iterator[Row]:
    """What is no figure of one cell or job: starts, peaks, the price of isolation."""
    for start in summary.starts:
        where: Row = ("starts", start.label, start.emulated, None, None)
        yield (*where, "ready_s", "s", *_ends(start.ready_s), None)
        yield (*where, "first_prediction_ms", "ms", *_ends(start.first_prediction_ms), None)
        for name, ratio in (("ready", start.ready_ratio), ("first_prediction", start.first_prediction_ratio)):
            if ratio is not None:
                yield from _ratio(where, f"{name} over {summary.baseline}", ratio)
    for peak in summary.peaks:
        yield (
            "peak",
            peak.label,
            peak.emulated,
            peak.model,
            peak.bound,
            "rate_rps",
            "1/s",
            *_ends(peak.rate_rps),
            None,
        )
    for price in summary.prices:
        where = ("price", price.label, False, price.predicted, price.load)
        for name, unit in (
            ("per_request_us", "µs"),
            ("per_compute", "µs/µs"),
            ("predicted_us", "µs"),
            ("error_us", "µs"),
        ):
            yield (*where, name, unit, *_ends(getattr(price, name)), None)


def _ratios(where: Row, over: str, ratios: Ratios) -> Iterator[Row]:
    for name in ("p50", "p99", "throughput", "p50_kernel", "p99_kernel"):
        ratio: Ratio | None = getattr(ratios, name)
        if ratio is not None:
            yield from _ratio(where, f"{name} over {over}", ratio)


def _ratio(where: Row, name: str, ratio: Ratio) -> Iterator[Row]:
    estimate = {1: "inf", -1: 0}.get(ratio.infinite, ratio.estimate)
    yield (*where, name, "ratio", estimate, ratio.low, ratio.high, ratio.verdict)
    if ratio.added_us is not None:
        yield (*where, f"{name}, added", "µs", *_ends(ratio.added_us), None)


def _ends(span: Span | None) -> tuple[float | None, float | None, float | None]:
    return (span.estimate, span.low, span.high) if span else (None, None, None)
