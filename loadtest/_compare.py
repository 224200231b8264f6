"""Two runs side by side: only through each run's ratio to its own baseline, since machines and days differ."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from images.errors import NotComparableError
from loadtest import _folder, _gate, _stats, _verdict
from loadtest._folder import Target
from loadtest._gate import Gate, Outcome
from loadtest._plan import Plan
from loadtest._schema import Cell, Ratio, Ratios, Summary
from loadtest._summary import summarise
from loadtest._tables import Grid
from loadtest._verdict import Margins

# What a plan may have otherwise: it makes intervals narrower or leaves something out, and changes no figure's meaning.
FREE = ("seed", "quick", "seconds", "emulated_seconds", "restarts", "until_ci", "only", "targets", "jobs", "primary",
        "margin", "boot_timeout_s", "models", "loads", "allow_difference", "bound", "work_iterations")  # fmt: skip
COUNTED_APART = 0.1  # as a share of iterations of the model work: each run counts how many take its `work_us`
Key = tuple[str, str, str]  # target, model, load


class Run(NamedTuple):
    summary: Summary
    plan: Plan


class Comparison(NamedTuple):
    """`changes`: per target, model and load, NEW's ratio to its baseline over OLD's."""

    old: Summary
    new: Summary
    changes: dict[Key, Ratios]
    caveats: list[str]


def compare(
    old: Path, new: Path, *, baseline: str | None = None, margin: str | None = None, strict: bool = False
) -> Comparison:
    """Raises NotComparableError where the runs have no baseline in common or another plan; where the tree or the
    processor is another one, with `strict`. UsageError where a folder is none."""
    first, second = (Run(summarise(path, baseline, margin), _folder.plan_of(path)) for path in (old, new))
    differs = _differences(first, second)
    if differs:
        raise NotComparableError(f"{old} and {new} cannot be compared: {'; '.join(differs)}")
    caveats = [*_caveats(first.summary, second.summary), *_work(first.plan, second.plan)]
    if caveats and strict:
        raise NotComparableError(f"{old} and {new} are not alike (--strict): {'; '.join(caveats)}")
    margins = Margins(**second.summary.margins)
    return Comparison(first.summary, second.summary, _changes(first.summary, second.summary, margins), caveats)


def _differences(old: Run, new: Run) -> list[str]:
    """Why the runs say nothing about each other."""
    found = []
    if old.summary.baseline is None or old.summary.baseline != new.summary.baseline:
        found.append(f"the baselines are {old.summary.baseline or 'none'} and {new.summary.baseline or 'none'}")
    first, second = (msgspec.to_builtins(run.plan) for run in (old, new))
    for name in Plan.__struct_fields__:
        if name not in FREE and first[name] != second[name]:
            found.append(f"{name} is {_shown(first[name])} and {_shown(second[name])}")
    ours = {target.name: target for target in old.summary.targets}
    for target in new.summary.targets:
        if target.name in ours:
            found += _unlike(ours[target.name], target)
    if not found and not _cells(old.summary).keys() & _cells(new.summary).keys():
        found.append("no target, model and load has a ratio in both")
    return found


def _unlike(old: Target, new: Target) -> list[str]:
    """The shape of a target is the plan's; its image, kernel or binary may be just what is compared."""
    return [
        f"{new.name}: {name} is {getattr(old, name)} and {getattr(new, name)}"
        for name in ("kind", "cpus", "mem_mib", "accel")
        if getattr(old, name) != getattr(new, name)
    ]


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _caveats(old: Summary, new: Summary) -> list[str]:
    found = []
    for name, key in (("the processor", "cpu_model"), ("the host's kernel", "kernel"), ("CPUs", "threads")):
        first, second = old.machine.get(key), new.machine.get(key)
        if first != second:
            found.append(f"{name}: {first or 'unknown'} and {second or 'unknown'}")
    ours = {target.name: target for target in old.targets}
    for target in new.targets:
        if target.name in ours:
            first, second = ((one.identity or {}).get("tree_sha256") for one in (ours[target.name], target))
            if first != second:
                found.append(f"{target.label}: the tree is {_short(first)} and {_short(second)}")
            if ours[target.name].options != target.options:
                found.append(f"{target.label}: its options are {ours[target.name].options} and {target.options}")
    found += [f"{run.run}: is partial" for run in (old, new) if run.partial]
    return found


def _work(old: Plan, new: Plan) -> list[str]:
    first, second = old.work_iterations, new.work_iterations
    if (
        "work" not in old.models
        or "work" not in new.models
        or abs(first - second) <= COUNTED_APART * max(first, second)
    ):
        return []
    return [f"work: {first:,} and {second:,} iterations"]


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "unknown"


def _cells(summary: Summary) -> dict[Key, Cell]:
    return {(cell.target, cell.model, cell.load): cell for cell in summary.cells if cell.ratio is not None}


def _changes(old: Summary, new: Summary, margin: Margins) -> dict[Key, Ratios]:
    ours, theirs = _cells(new), _cells(old)
    changes: dict[Key, Ratios] = {}
    for target in dict.fromkeys(target for target, _, _ in ours):
        keys = [key for key in ours if key[0] == target and key in theirs]
        pairs = [(ours[key].ratio, theirs[key].ratio) for key in keys]
        found = [(_change(*pair), f"{key[1]}:{key[2]}" in new.primary) for key, pair in zip(keys, pairs, strict=True)]
        blocked = {
            (number, name): why
            for number, pair in enumerate(pairs)
            for name in _gate.METRICS
            for one in pair
            if (why := getattr(one, name).blocked)
        }
        changes |= dict(zip(keys, _verdict.judge(found, margin, blocked), strict=True))
    return changes


def _change(new: Ratios | None, old: Ratios | None) -> Ratios:
    assert new is not None and old is not None
    return Ratios(over(new.p50, old.p50), over(new.p99, old.p99), over(new.throughput, old.throughput))


def over(new: Ratio, old: Ratio) -> Ratio:
    """The ratio of two independent ratios: Welch's interval for the difference of their logarithms.

    What falls among failed requests in one run alone is infinitely more, or less, than in the other."""
    of = "starts" if new.of == old.of == "starts" else "instances"
    there = [one.infinite or one.estimate is not None for one in (new, old)]
    if all(there) and new.infinite != old.infinite:
        return Ratio(None, infinite=new.infinite or -old.infinite, of=of, n=min(new.n, old.n))
    if new.estimate is None or old.estimate is None:
        return Ratio(None, reason=new.reason or old.reason or "in both runs it falls among failed requests")
    estimate = new.estimate / old.estimate
    if new.log_se is None or old.log_se is None or new.df is None or old.df is None:
        return Ratio(estimate, reason=new.reason or old.reason)
    at = _stats.difference(
        _stats.Location(math.log(new.estimate), new.log_se, new.df),
        _stats.Location(math.log(old.estimate), old.log_se, old.df),
    )
    middle, low, high = (math.exp(value) for value in _stats.interval(at))
    return Ratio(middle, low, high, of=of, n=min(new.n, old.n), log_se=at.se, df=at.df)


def gates(gates: Iterable[Gate], comparison: Comparison) -> list[Outcome]:
    return _gate.check(gates, lambda gate: _find(gate, comparison.changes.get((gate.target, gate.model, gate.load))))


def of_run(gates: Iterable[Gate], summary: Summary) -> list[Outcome]:
    """Gates of one run: on its ratios to its own baseline."""
    cells = _cells(summary)
    return _gate.check(gates, lambda gate: _ratio_of(gate, cells.get((gate.target, gate.model, gate.load))))


def _ratio_of(gate: Gate, cell: Cell | None) -> Ratio | None:
    return _find(gate, cell.ratio) if cell else None


def _find(gate: Gate, ratios: Ratios | None) -> Ratio | None:
    found: Ratio | None = getattr(ratios, gate.metric) if ratios else None
    return found


def grid(comparison: Comparison) -> Grid:
    """The changes as a table, with verdicts on the primary cells."""
    labels = {target.name: target.label for target in comparison.new.targets}
    rows: list[tuple[str, ...]] = []
    for (target, model, load), ratios in comparison.changes.items():
        for name in ("p50", "p99"):
            ratio: Ratio = getattr(ratios, name)
            verdict = _verdict.in_words(ratio) + ", of these instances" * (ratio.of == "instances" and not ratio.reason)
            rows.append((f"{model}, {load}, {name}", labels[target], verdict, *_columns(ratio)))
    title = f"{comparison.new.run} against {comparison.old.run}, each over its own {comparison.new.baseline}"
    columns = ("where", "target", "verdict", "change", "no more than")
    return Grid(title, columns, rows, [f"NOTE: {text}" for text in comparison.caveats], words=3)


def _columns(ratio: Ratio) -> Sequence[str]:
    if ratio.infinite:
        return _verdict.INFINITE[ratio.infinite], _verdict.INFINITE[ratio.infinite]
    if ratio.estimate is None:
        return "–", "–"
    if ratio.low is None or ratio.high is None:
        return _verdict.percent(ratio.estimate), "–"
    low, high = (_verdict.percent(value).removesuffix(" %") for value in (ratio.low, ratio.high))
    return f"{_verdict.percent(ratio.estimate)} ({low} to {high})", (ratio.could_be or "–").removeprefix(
        "no more than "
    )
