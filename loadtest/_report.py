"""The report of a run folder: terminal table, report.md, summary.json. Made again at any time from the folder alone."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.box import SIMPLE_HEAD
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


RATIO_COLUMNS = ("what", "target", "p50 ×", "p99 ×", "req/s ×", "mean time ×")


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
    """Print the tables and what has to be known to read them; 100 columns wide where that is not a terminal."""
    if not console.is_terminal:
        console.width = 100
    for line in _head(summary):
        console.print(escape(line))
    for grid in _grids(summary):
        table = Table(title=grid.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, column in enumerate(grid.columns):
            table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
        before = ""
        for first, *others in grid.rows:
            table.add_row("" if first == before else escape(first), *map(escape, others))
            before = first
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
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


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
    grids = [_overview(summary, f"Serving and batch side by side{mark}")]
    for emulated in (False, True):
        cells = [cell for cell in summary.cells if cell.emulated is emulated]
        batch = [row for row in summary.batch if row.emulated is emulated]
        note = " (emulated, which says nothing about the real thing)" if emulated else ""
        if cells:
            grids.append(_serving(f"Serving{note}{mark}", cells))
        if batch:
            grids.append(_jobs(f"Batch jobs{note}{mark}", batch, emulated))
        if not emulated and (ratios := _ratios(cells, batch)):
            grids.append(Grid(f"Over {summary.baseline}, with 95 % intervals{mark}", RATIO_COLUMNS, ratios))
    if summary.direct:
        grids.append(_direct(summary, mark))
    return grids


def _overview(summary: Summary, title: str) -> Grid:
    """One row per target: p50 with one connection, requests per second with the most, and the batch jobs' means."""
    models = [model for model in ("knn", "dnn", "null") if any(cell.model == model for cell in summary.cells)]
    loads = sorted({cell.load for cell in summary.cells}, key=lambda load: int(load.rpartition("-")[2]))
    jobs = list(dict.fromkeys(row.job for row in summary.batch))
    columns = ["target", ""]
    if loads:
        columns += [f"{model}\np50 µs" for model in models] + [f"{model}\nreq/s" for model in models]
    columns += [f"batch\n{job} s" for job in jobs]
    rows = []
    for target in summary.targets:
        row = [target["label"], "emulated" if target["emulated"] else ""]
        cells = {(cell.model, cell.load): cell for cell in summary.cells if cell.target == target["name"]}
        if loads:
            few = [cells.get((model, loads[0])) for model in models]
            many = [cells.get((model, loads[-1])) for model in models]
            row += [_figure(cell.p50_us if cell else None) for cell in few]
            row += [_figure(cell.throughput_rps if cell else None) for cell in many]
        means = {found.job: found.mean_s for found in summary.batch if found.target == target["name"]}
        rows.append(tuple(row + [_figure(means.get(job)) for job in jobs]))
    note = f": p50 at {loads[0]}, req/s at {loads[-1]}" if loads else ""
    return Grid(title + note, tuple(columns), rows)


def _serving(title: str, cells: Sequence[Cell]) -> Grid:
    columns = ("model, load", "target", "requests", "p50 µs", "p90 µs", "p99 µs", "req/s", "CPU µs")
    rows = []
    for cell in cells:
        failed = f" ({cell.failures} FAILED)" if cell.failures else ""
        figures = (cell.p50_us, cell.p90_us, cell.p99_us, cell.throughput_rps, cell.host_cpu_us_per_request)
        rows.append((f"{cell.model}, {cell.load}", cell.label, f"{cell.requests}{failed}", *map(_figure, figures)))
    return Grid(title, columns, rows)


def _jobs(title: str, batch: Sequence[Batch], emulated: bool) -> Grid:
    """An emulated target runs each job once, so it has a time and nothing around it."""
    if emulated:
        few = [
            (f"{row.job}, {row.scale}", row.label, str(row.n), _figure(row.mean_s), f"{row.accuracy:.3f}")
            for row in batch
        ]
        return Grid(title, ("job, scale", "target", "n", "seconds", "accuracy"), few)
    rows = []
    for row in batch:
        interval = "–" if row.ci95_s is None else f"{_figure(row.ci95_s[0])}–{_figure(row.ci95_s[1])}"
        figures = map(_figure, (row.mean_s, row.median_s, row.stdev_s, row.min_s))
        rows.append((f"{row.job}, {row.scale}", row.label, str(row.n), *figures, interval, f"{row.accuracy:.3f}"))
    columns = ("job, scale", "target", "n", "mean s", "median", "sd", "min", "95 % interval", "accuracy")
    return Grid(title, columns, rows)


def _ratios(cells: Sequence[Cell], batch: Sequence[Batch]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for cell in cells:
        if cell.ratio:
            found = map(_ratio, (cell.ratio.p50, cell.ratio.p99, cell.ratio.throughput))
            rows.append((f"{cell.model}, {cell.load}", cell.label, *found, "–"))
    rows += [(f"batch {row.job}", row.label, "–", "–", "–", _ratio(row.ratio)) for row in batch if row.ratio]
    return rows


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
        return f"{ratio.estimate:.2f} (–)"
    return f"{ratio.estimate:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


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
