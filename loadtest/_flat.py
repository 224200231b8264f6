"""The figures of a Summary as flat rows, one per figure, for a spreadsheet: `isolatency report --format csv`."""

import csv
import io
from collections.abc import Iterator

from loadtest._schema import Ratio, Span, Summary

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
            for name in ("p50", "p99", "throughput"):
                yield from _ratio(where, f"{name} over {summary.baseline}", getattr(cell.ratio, name))
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


def _ratio(where: Row, name: str, ratio: Ratio) -> Iterator[Row]:
    yield (*where, name, "ratio", ratio.estimate, ratio.low, ratio.high, ratio.verdict)
    if ratio.added_us is not None:
        yield (*where, f"{name}, added", "µs", *_ends(ratio.added_us), None)


def _ends(span: Span | None) -> tuple[float | None, float | None, float | None]:
    return (span.estimate, span.low, span.high) if span else (None, None, None)
