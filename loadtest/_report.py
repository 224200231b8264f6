"""The report of a run folder: terminal, report.md, summary.json. Made again at any time from the folder alone."""

import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from loadtest import _flat
from loadtest._schema import Summary
from loadtest._summary import summarise
from loadtest._tables import Grid, grids

__all__ = ["summarise", "terminal", "write"]

WIDTH = 100
RATIOS = (
    "A ratio is a target's figure over the baseline's, so that 1.10 is a tenth more time (or, for req/s, a tenth more "
    "requests), and the brackets hold its 95 % interval; one that holds 1.00 leaves open whether there is a difference."
)
ONE_START = (
    "The intervals are about these started instances only, and two fresh starts of one program differ too, which no "
    "interval here contains."
)
MANY_STARTS = (
    "Each target was started {} times, and the intervals are over starts: they contain what two fresh starts of one "
    "program differ by."
)
GIVEN = "A server given by URL is one instance, asked as often: what is said of it is about that instance only."
LOOPBACK = "The process is reached over loopback, so what Docker's bridge and a guest's tap cost counts as isolation."


def _how_to_read(summary: Summary) -> tuple[str, str]:
    starts = MANY_STARTS.format(summary.restarts) if summary.restarts > 2 else ONE_START
    if summary.restarts > 2 and any(target.kind == "url" for target in summary.targets):
        starts = f"{starts} {GIVEN}"
    return f"{RATIOS} {starts}", LOOPBACK


def write(run: Path, baseline: str | None = None, margin: str | None = None) -> Summary:
    """Make summary.json, report.md and report.html of a run folder.

    Raises UsageError as `summarise` does, OSError where the folder cannot be written."""
    summary = summarise(run, baseline, margin)
    _replace(run / "summary.json", encoded(summary))
    _replace(run / "report.md", markdown(summary).encode())
    _replace(run / "report.html", html(summary).encode())
    return summary


def formatted(summary: Summary, form: str) -> str:
    """The report as one text: html, md, json or csv."""
    if form == "json":
        return encoded(summary).decode() + "\n"
    return {"html": html, "md": markdown, "csv": _flat.text}[form](summary)


def encoded(summary: Summary) -> bytes:
    return msgspec.json.format(msgspec.json.encode(summary), indent=2)


def html(summary: Summary) -> str:
    from loadtest import _html  # brings matplotlib, which takes a second

    return _html.render(summary, _head(summary, answer=False), _how_to_read(summary))


def _replace(path: Path, content: bytes) -> None:
    fresh = path.with_name(path.name + ".part")
    try:
        with fresh.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def terminal(summary: Summary, console: Console) -> None:
    """Print the tables and what has to be known to read them; 100 columns wide where that is not a terminal."""
    _widen(console)
    for line in _head(summary):
        console.print(escape(line), highlight=False)
    for grid in grids(summary):
        table(grid, console)
    console.print("\nHow to read it", style="bold")
    for line in _how_to_read(summary):
        console.print(escape(line), highlight=False)


def _widen(console: Console) -> None:
    if not console.is_terminal:
        console.width = WIDTH


def table(grid: Grid, console: Console) -> None:
    """Print one table with its title and its notes."""
    _widen(console)
    console.print(f"\n[bold]{escape(grid.title)}[/]", highlight=False)
    console.print(_table(grid))
    for note in grid.notes:
        console.print(Padding(Text(note, style="dim"), (0, 0, 0, 2)))


def _table(grid: Grid) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, column in enumerate(grid.columns):
        # A label is folded where it is long, never cut: its end may be the mark of an emulated target.
        words = number < grid.words
        table.add_column(column, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    before = ""
    for first, *others in grid.rows:
        table.add_row("" if first == before else escape(first), *map(escape, others))
        before = first
    return table


def markdown(summary: Summary) -> str:
    parts = [f"# isolatency: {summary.run}", *_head(summary)]
    for grid in grids(summary):
        rule = ["---" if number < grid.words else "---:" for number in range(len(grid.columns))]
        parts += [f"## {grid.title}", "\n".join(map(_line, [grid.columns, rule, *grid.rows]))]
        if grid.notes:
            parts.append("\n".join("- " + note.replace("*", "\\*") for note in grid.notes))
    return "\n\n".join([*parts, "## How to read it", *_how_to_read(summary)]) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _head(summary: Summary, *, answer: bool = True) -> list[str]:
    """What touches every figure: that the run is partial, its errors, the machine, what was odd in the whole run; and
    the answer."""
    lines = []
    if summary.partial:
        lines.append("PARTIAL: this run did not go to its end; the figures are of what was measured until then.")
    lines += [f"ERROR: {error}" for error in summary.errors]
    lines.append(f"{shlex.join(summary.command) or 'isolatency'}, begun {summary.started or 'at an unknown time'}")
    lines.append(_machine(summary.machine) + _busy(summary))
    return [*lines, *(f"NOTE: {text}" for text in summary.run_caveats), *(summary.answer if answer else [])]


def _machine(machine: dict[str, Any]) -> str:
    def known(key: str) -> str:
        value = machine.get(key)
        return "unknown" if value is None else {True: "on", False: "off"}.get(value, str(value))

    guest = {True: "itself a guest", False: "no guest", None: "a guest or not: unknown"}[machine.get("nested")]
    return (
        f"{known('cpu_model')}, {known('threads')} CPUs, {known('memory_mib')} MiB, {known('system')}, kernel "
        f"{known('kernel')}, {guest}; governor {known('governor')}, turbo {known('turbo')}, SMT {known('smt')}"
    )


def _busy(summary: Summary) -> str:
    before, after = summary.load_average.get("before"), summary.load_average.get("after")
    return "" if not before or not after else f"; load average {before[0]:.1f} before, {after[0]:.1f} after"
