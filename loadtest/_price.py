"""The price of isolation: added µs = a + b × compute, fitted per target on models that are not the one predicted.

a is the price of a request, b that of compute: two numbers that a reader can carry to a model of their own.
"""

import numpy as np
import pandas as pd

from loadtest import _starts, _stats
from loadtest._folder import Folder
from loadtest._schema import Price, Span, Stages

FIT = ("null", "work", "knn")
PREDICT = "dnn"
LEAST_US = 10.0  # by which the models' compute must differ, or there is no line
Logs = dict[tuple[str, str, str], pd.DataFrame]


def prices(folder: Folder, base: str | None, logs: Logs, stages: list[Stages]) -> list[Price]:
    """One per native target but the baseline, at the plan's first load; none where fewer than two models can be
    fitted, or not all of them were measured."""
    load = folder.plan.loads[0]
    fit = [model for model in FIT if model in folder.plan.models]
    models = [*fit, *([PREDICT] if PREDICT in folder.plan.models else [])]
    if base is None or len(fit) < 2:
        return []
    levels = {
        (target.name, model): _starts.levels(logs[target.name, model, load], "p50")
        for target in folder.targets
        for model in models
        if not target.emulated and (target.name, model, load) in logs
    }
    compute = _compute(base, load, models, levels, stages)
    found = []
    for target in folder.targets:
        mine = [levels.get((target.name, model)) for model in models]
        theirs = [levels.get((base, model)) for model in models]
        if target.name == base or target.emulated or compute is None or None in mine or None in theirs:
            continue
        if np.ptp(compute[0][: len(fit)]) < LEAST_US:
            continue
        restarts = sorted(set.intersection(*(set(level) for level in [*mine, *theirs] if level is not None)))
        if restarts:
            added = np.array(
                [[a[r] - b[r] for a, b in zip(mine, theirs, strict=True) if a and b] for r in restarts]
            )  # (starts, models), µs
            found.append(_fit(target.name, target.label, load, models, len(fit), compute, added))
    return found


def _compute(
    base: str, load: str, models: list[str], levels: dict[tuple[str, str], dict[int, float]], stages: list[Stages]
) -> tuple[list[float], str] | None:
    """The baseline's µs of compute per model: by its own stage stamps, else by how much longer than null it takes."""
    stamped = {
        one.model: float(np.mean(one.compute_us))
        for one in stages
        if (one.target, one.load, one.band) == (base, load, "p50") and one.compute_us
    }
    if stamped.keys() >= set(models):
        return [stamped[model] for model in models], "the baseline's stage compute"
    if not all(levels.get((base, model)) for model in [*models, "null"]):
        return None
    means = {model: float(np.mean(list(levels[base, model].values()))) for model in [*models, "null"]}
    return [means[model] - means["null"] for model in models], "the baseline's p50 less that of null"


def _fit(
    target: str, label: str, load: str, models: list[str], n: int, compute: tuple[list[float], str],
    added: _stats.Floats,
) -> Price:  # fmt: skip
    """Ordinary least squares in each start; what is said is the mean over starts with its t interval."""
    x, source = np.array(compute[0]), compute[1]
    design = np.column_stack([np.ones(n), x[:n]])
    (a, b), *_ = np.linalg.lstsq(design, added[:, :n].T, rcond=None)
    points = [(model, float(x[i]), _span(added[:, i])) for i, model in enumerate(models)]
    predicted = error = None
    if len(models) > n:
        forecast = a + b * x[n]
        predicted, error = _span(forecast), _span(forecast - added[:, n])
    return Price(
        target=target, label=label, load=load, fitted=models[:n], compute_source=source, points=points,
        per_request_us=_span(a), per_compute=_span(b), predicted=PREDICT if predicted else None,
        predicted_us=predicted, error_us=error,
    )  # fmt: skip


def _span(values: _stats.Floats) -> Span:
    if len(values) < _stats.MIN_PAIRS:
        return Span(float(np.mean(values)))
    return Span(*_stats.interval(_stats.location(values)))
