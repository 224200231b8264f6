"""The report of a run folder: terminal table, report.md, summary.json. Made again at any time from the folder alone."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loadtest._summary import Batch, Cell, Ratio, Summary, summarise

__all__ = ["summarise", "terminal", "write"]

HOW_TO_READ = (
    "A ratio is a target's figure over the baseline's, with its 95 % interval: over 1.00 it is slower (or, for "
    "requests per second, faster), and an interval that holds 1.00 shows no difference. The intervals are about these "
    "started instances only: two fresh starts of one program differ by about 1 % at p50. The cost of Docker's bridge "
    "and of a guest's tap counts as isolation; the process is reached over loopback."
)
REFERENCE = (
    "The 2023 report (8 vCPU, 16,384 MiB; different sources on each side, one system after the other): "
    "knn docker 1.8965 s, firecracker 2.0842 s (+9.9 %); dnn docker 122.1339 s, firecracker 167.3205 s (+37 %). "
    "It timed knn on all 569 rows, and dnn training for 10 epochs on a CSV whose length it does not give; compare with "
    "the scale and the CPUs of each row here."
)


class Grid(NamedTuple):
    """One table: its title, its columns, its rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def write(run: Path, baseline: str | None = None) -> Summary:
    """Make summary.json and report.md of a run folder. Raises as `summarise` does."""
    summary = summarise(run, baseline)
    _replace(run / "summary.json", msgspec.json.format(msgspec.json.encode(summary), indent=2))
    _replace(run / "report.md", _markdown(summary).encode())
    return summary


def _replace(path: Path, content: bytes) -> None:
    fresh = path.with_name(path.name + ".part")
    try:
        with fresh.open("wb") as file:
            file.write(content)
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def terminal(summary: Summary, console: Console) -> None:
    """Print the tables and what has to be known to read them."""
    for line in _head(summary):
        console.print(escape(line), style="bold")
    for grid in _grids(summary):
        table = Table(*grid.columns, title=grid.title, title_justify="left", box=SIMPLE, pad_edge=False)
        for number, column in enumerate(table.columns):
            column.justify = "left" if number < 2 else "right"
            column.overflow = "fold"
        for row in grid.rows:
            table.add_row(*map(escape, row))
        console.print(table)
    for line in _foot(summary):
        console.print(escape(line))


def _markdown(summary: Summary) -> str:
    parts = [f"# isolatency: {summary.run}", *_head(summary)]
    for grid in _grids(summary):
        lines = [
            f"## {grid.title}",
            "",
            _line(grid.columns),
            _line("---" if n < 2 else "---:" for n in range(len(grid.columns))),
        ]
        parts.append("\n".join([*lines, *map(_line, grid.rows)]))
    return "\n\n".join([*parts, *_foot(summary)]) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _head(summary: Summary) -> list[str]:
    lines = []
    if summary.partial:
        lines.append("PARTIAL: this run did not go to its end; the figures are of what was measured until then.")
    lines += [f"ERROR: {error}" for error in summary.errors]
    machine = summary.machine
    lines.append(
        f"{machine.get('cpu_model')}, {machine.get('threads')} CPUs, {machine.get('memory_mib')} MiB, "
        f"{machine.get('system')}, kernel {machine.get('kernel')}"
        + (", itself a guest" if machine.get("nested") else "")
    )
    for target in summary.targets:
        identity = target["identity"] or {}
        memory = "" if target["host_memory_mib"] is None else f", {target['host_memory_mib']:.0f} MiB on the host"
        tree = (identity.get("tree_sha256") or "unknown")[:12]
        lines.append(
            f"{target['label']}: {target['cpus']} CPU, {target['mem_mib']} MiB, "
            f"ready after {target['ready_s']:.2f} s{memory}, BLAS kernel {identity.get('blas_kernel')}, tree {tree}"
        )
    return lines


def _grids(summary: Summary) -> list[Grid]:
    mark = " (UNEQUAL TARGETS: --allow-difference)" if summary.allow_difference else ""
    grids = []
    for emulated in (False, True):
        cells = [cell for cell in summary.cells if cell.emulated is emulated]
        batch = [row for row in summary.batch if row.emulated is emulated]
        note = ", emulated: says nothing about the real thing" if emulated else f", against {summary.baseline}"
        if cells:
            grids.append(_serving(f"Serving{note}{mark}", cells, emulated))
        if batch:
            grids.append(_jobs(f"Batch jobs{note}{mark}", batch, emulated))
    if summary.direct:
        grids.append(_direct(summary, mark))
    return grids


def _serving(title: str, cells: Sequence[Cell], emulated: bool) -> Grid:
    columns = ["model, load", "target", "requests", "p50 µs", "p90", "p99", "req/s", "CPU µs"]
    columns += [] if emulated else ["p50 ×", "p99 ×", "req/s ×"]
    rows = []
    for cell in cells:
        failed = f" ({cell.failures} failed)" if cell.failures else ""
        row = [
            f"{cell.model}, {cell.load}", cell.label, f"{cell.requests}{failed}", _figure(cell.p50_us),
            _figure(cell.p90_us), _figure(cell.p99_us), _figure(cell.throughput_rps),
            _figure(cell.host_cpu_us_per_request),
        ]  # fmt: skip
        if not emulated:
            ratio = cell.ratio
            row += [_ratio(r) for r in ((ratio.p50, ratio.p99, ratio.throughput) if ratio else (None, None, None))]
        rows.append(tuple(row))
    return Grid(title, tuple(columns), rows)


def _jobs(title: str, batch: Sequence[Batch], emulated: bool) -> Grid:
    columns = ["job, scale", "target", "n", "mean s", "median", "sd", "min", "95 % interval", "accuracy"]
    columns += [] if emulated else ["mean ×"]
    rows = []
    for row in batch:
        interval = "" if row.ci95_s is None else f"{_figure(row.ci95_s[0])} to {_figure(row.ci95_s[1])}"
        cells = [
            f"{row.job}, {row.scale}", row.label, str(row.n), _figure(row.mean_s), _figure(row.median_s),
            _figure(row.stdev_s), _figure(row.min_s), interval, f"{row.accuracy:.3f}",
        ]  # fmt: skip
        rows.append(tuple(cells + ([] if emulated else [_ratio(row.ratio)])))
    return Grid(title, tuple(columns), rows)


def _direct(summary: Summary, mark: str) -> Grid:
    rows = []
    for found in summary.direct:
        ratio = found["ratio"]
        if "job" in found:
            rows.append((f"batch {found['job']}, {found['scale']}", "mean", _ratio(_as_ratio(ratio))))
        elif ratio:
            what = f"{found['model']}, {found['load']}"
            rows += [(what, name, _ratio(_as_ratio(ratio[name]))) for name in ("p50", "p99", "throughput")]
    return Grid(f"Firecracker over Docker, the 2023 report's question{mark}", ("what", "figure", "×"), rows)


def _as_ratio(value: dict[str, float] | None) -> Ratio | None:
    return msgspec.convert(value, Ratio) if value else None


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return "–"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.estimate:.3f}"
    return f"{ratio.estimate:.3f} ({ratio.low:.3f}–{ratio.high:.3f})"


def _figure(value: float | None) -> str:
    """Three significant digits, whole numbers in full; – where there is no figure."""
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _foot(summary: Summary) -> list[str]:
    lines = []
    if any(cell.samples_needed for cell in summary.cells):
        needed = sorted({(name, n) for cell in summary.cells for name, n in cell.samples_needed.items()})
        lines.append(
            "No quantile without the samples for it: " + ", ".join(f"{name} needs {n}" for name, n in needed) + "."
        )
    lines += [f"- {caveat}" for caveat in summary.caveats]
    return [*lines, HOW_TO_READ, *([REFERENCE] if summary.batch else [])]
