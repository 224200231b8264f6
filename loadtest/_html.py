"""report.html: one static file with everything in it, made from a Summary alone; nothing is fetched."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined

from loadtest import _plots, _tables
from loadtest._schema import Batch, Cell, Stages, Summary
from loadtest._tables import NOTHING, Grid, significant
from loadtest._verdict import FASTER, NONE, OPEN, SLOWER

MARKS = {SLOWER: ("▲", "slower"), FASTER: ("▼", "faster"), NONE: ("=", "none"), OPEN: ("?", "open")}
_T = TypeVar("_T")


class Section(NamedTuple):
    """A heading, sentences, pictures, tables that are open, and tables that are folded: the pictures' numbers."""

    title: str
    words: Sequence[str] = ()
    pictures: Sequence[str] = ()
    tables: Sequence[Grid] = ()
    folded: Sequence[Grid] = ()
    emulated: bool = False


def render(summary: Summary, head: Sequence[str], how_to_read: Sequence[str]) -> str:
    """`head`: lines on the run as a whole. The same summary gives the same page."""
    environment = Environment(
        loader=PackageLoader("loadtest", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    template = environment.get_template("report.html.j2")
    return template.render(
        summary=summary, head=head, answers=_answers(summary), sections=_sections(summary), how_to_read=how_to_read
    )


def _answers(summary: Summary) -> list[tuple[str, str, str]]:
    """Each sentence of the answer with the mark and the class of its verdict at p50."""
    verdicts = [
        cell.ratio.p50.verdict
        for primary in summary.primary
        for cell in summary.cells
        if cell.ratio is not None and f"{cell.model}:{cell.load}" == primary
    ]
    found = []
    for number, sentence in enumerate(summary.answer):
        verdict = _verdict_of(sentence) if len(verdicts) != len(summary.answer) else verdicts[number]
        mark, name = MARKS.get(verdict or "", ("", "plain"))
        found.append((re.sub(r" (?=%|µs)", "\N{NO-BREAK SPACE}", sentence), mark, name))
    return found


def _verdict_of(sentence: str) -> str | None:
    """The first verdict that a sentence names, which is that at p50."""
    places = {verdict: sentence.find(f": {verdict}") for verdict in MARKS}
    named = {verdict: place for verdict, place in places.items() if place >= 0}
    return min(named, key=lambda verdict: named[verdict]) if named else None


def _sections(summary: Summary) -> list[Section]:
    native = [cell for cell in summary.cells if not cell.emulated]
    jobs = [row for row in summary.batch if not row.emulated]
    stages = [one for one in summary.stages if not one.emulated]
    found = []
    if any(cell.ratio for cell in native):
        found.append(Section("Verdicts", tables=[_tables.verdicts(summary)]))
    if native or jobs:
        found.append(Section("Serving and batch side by side", tables=[_tables.overview(summary, native, jobs)]))
    found += _measured(summary, native, jobs, stages)
    for target in summary.targets:
        if target.emulated:
            found += _emulated(summary, target.name, target.label)
    found.append(Section("Targets", tables=[_tables.targets(summary)]))
    if summary.batch:
        found.append(Section("The report of 2023", tables=[_tables.reference(summary, jobs)]))
    if summary.allow_difference:
        found = [one._replace(title=f"{one.title} (UNEQUAL TARGETS: --allow-difference)") for one in found]
    return found


def _measured(
    summary: Summary, native: Sequence[Cell], jobs: Sequence[Batch], stages: Sequence[Stages]
) -> list[Section]:
    """What was measured of targets that are not emulated, each with its pictures and their numbers."""
    labels = [target.label for target in summary.targets if not target.emulated]
    base = str(summary.baseline)
    found = []
    if native:
        pictures = _each(native, _cell_key, lambda cells: _plots.latency(cells, labels), _has_curve)
        grids = [_tables.serving("Serving", native), *_tables.typical(native)]
        found.append(Section("Latency by quantile", pictures=pictures, tables=grids,
                             folded=[_curves(native)]))  # fmt: skip
    compared = [cell for cell in native if cell.ratio and (cell.ratio.p50.estimate or cell.ratio.p99.estimate)]
    if compared:
        margin = summary.margins["p50"]
        pictures = _each(compared, lambda c: c.model, lambda cells: _plots.forest(cells, labels, base, margin))
        grids = [_tables.ratios(f"Serving, over {base}, with 95 % intervals", native), _tables.could_be(base, native)]
        grids += _tables.stamped(base, native)
        if summary.direct and summary.direct.cells:
            grids.append(_tables.direct(summary.direct))
        found.append(Section(f"Ratios over {base}", pictures=pictures, folded=grids))
    several = [cell for cell in native if len({one.load for one in native}) > 1 and cell.throughput_rps]
    if several:
        pictures = _each(several, lambda c: c.model, lambda cells: _plots.throughput(cells, labels))
        found.append(Section("Latency against throughput", pictures=pictures, folded=[_loads(several)]))
    if stages:
        pictures = _each(stages, lambda s: (s.model, s.load), _plots.stacked)
        found.append(Section("Where the time goes", pictures=pictures, folded=_tables.stages(summary, emulated=False)))
    if summary.prices:
        found.append(Section("The price of isolation", tables=[_tables.prices(summary)]))
    if summary.starts:
        found.append(Section("What a cold start costs", tables=[_tables.starts(summary)]))
    drifting = [cell for cell in native if cell.drift and cell.load == native[0].load]
    if drifting:
        pictures = _each(drifting, _cell_key, lambda cells: _plots.drift(cells, labels))
        found.append(Section("Drift over the run", pictures=pictures, folded=[_drift(drifting)]))
    peaks = [row for row in summary.peaks if not row.emulated]
    if peaks:
        pictures = _each(peaks, lambda p: (p.model, p.bound), lambda rows: _plots.peak(rows, labels))
        found.append(Section("Peak", pictures=pictures, tables=[_tables.peaks("Peak", peaks)]))
    if jobs:
        pictures = _each(jobs, lambda row: (row.job, row.scale), lambda rows: _plots.repeats(rows, labels))
        grids = [_tables.jobs("Batch jobs", jobs)]
        if any(row.ratio for row in jobs):
            grids.append(_tables.job_ratios(f"Batch jobs, over {base}, with 95 % intervals", jobs))
        found.append(Section("Batch jobs", pictures=pictures, tables=grids, folded=[_repeats(jobs)]))
    return found


def _emulated(summary: Summary, name: str, label: str) -> list[Section]:
    """One emulated target by itself: no axis and no table that a real one stands in."""
    cells = [cell for cell in summary.cells if cell.target == name]
    jobs = [row for row in summary.batch if row.target == name]
    words = [
        "Emulated: no figure here says anything about the real thing. What it shows is that images, network, life "
        "cycle and answers are right."
    ]
    pictures = _each(cells, _cell_key, lambda of_cell: _plots.latency(of_cell, [label]), _has_curve)
    tables = [_tables.serving("Serving, emulated", cells)] if cells else []
    tables += [_tables.jobs("Batch jobs, emulated", jobs)] if jobs else []
    if peaks := [row for row in summary.peaks if row.target == name]:
        tables.append(_tables.peaks("Peak, emulated", peaks))
    folded = [_curves(cells)] if cells else []
    folded += _tables.stages(summary, emulated=True, target=name)
    return [Section(f"{label}, emulated", words, pictures, tables, folded, True)] if tables else []


def _cell_key(cell: Cell) -> Any:
    return cell.model, cell.load


def _has_curve(cells: Sequence[Cell]) -> bool:
    return any(us is not None and q >= 0.1 for cell in cells for q, us in cell.curve)


def _each(
    rows: Iterable[_T], key: Callable[[_T], Any], draw: Callable[[Sequence[_T]], str],
    wanted: Callable[[Sequence[_T]], bool] = lambda rows: True,
) -> list[str]:  # fmt: skip
    """A picture per group of rows, in their order."""
    groups: dict[Any, list[_T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return [draw(group) for group in groups.values() if wanted(group)]


def _curves(cells: Sequence[Cell]) -> Grid:
    shown = [q for q, _ in max((cell.curve for cell in cells), key=len)]
    shown = [q for q in shown if q in (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)]
    rows = []
    for cell in cells:
        known = {q: "∞" if us is None else significant(us) for q, us in cell.curve}
        rows.append((f"{cell.model}, {cell.load}", cell.label, *(known.get(q, NOTHING) for q in shown)))
    return Grid("Latency by quantile, µs", ("model, load", "target", *(f"{100 * q:.5g} %" for q in shown)), rows)


def _loads(cells: Sequence[Cell]) -> Grid:
    rows = [
        (
            cell.model,
            f"{cell.label}, {cell.load}",
            significant(cell.throughput_rps),
            significant(cell.p50_us),
            significant(cell.p99_us),
        )
        for cell in cells
    ]
    return Grid("Latency against throughput", ("model", "target, load", "req/s", "p50 µs", "p99 µs"), rows)


def _drift(cells: Sequence[Cell]) -> Grid:
    rows = [
        (f"{cell.model}, {cell.load}", cell.label, f"{minutes:.2f}", "∞" if us is None else significant(us))
        for cell in cells
        for minutes, us in cell.drift
    ]
    return Grid("p50 of blocks over the run", ("model, load", "target", "minutes", "p50 µs"), rows)


def _repeats(batch: Sequence[Batch]) -> Grid:
    rows = [
        (f"{row.job}, {row.scale}", row.label, str(number + 1), significant(seconds, 4))
        for row in batch
        for number, seconds in enumerate(row.repeats_s)
    ]
    return Grid("Every repeat", ("job, scale", "target", "repeat", "seconds"), rows)
