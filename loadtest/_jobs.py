"""Batch jobs from a run folder: each target's times, and their ratios, paired by repeat."""

import numpy as np
import pandas as pd

from loadtest import _stats
from loadtest._folder import Folder, Target
from loadtest._schema import Batch, Ratio
from loadtest._verdict import could_be

CLOCK_TOLERANCE = 0.01


def batch(folder: Folder, base: str | None) -> tuple[list[Batch], list[str]]:
    """The rows, and sentences on accuracies that differ where they must not."""
    found: list[Batch] = []
    differences = []
    for job, of_job in folder.batch.groupby("job", sort=False) if len(folder.batch) else []:
        for _, of_scale in of_job.groupby("scale", sort=False):
            if of_scale["accuracy"].nunique() > 1:
                shown = of_scale.groupby("label", sort=False)["accuracy"].unique()
                listed = ", ".join(f"{label} {'/'.join(f'{v:g}' for v in values)}" for label, values in shown.items())
                differences.append(f"batch {job}: accuracy differs at equal scale, so the work did: {listed}")
        for target in folder.targets:
            ours = of_job[of_job["target"] == target.name].set_index("repeat")
            if len(ours):
                compared = base is not None and target.name != base and not target.emulated
                against = of_job[of_job["target"] == base].set_index("repeat")
                found.append(_row(target, str(job), ours, ratio_of_jobs(ours, against) if compared else None))
    return found, differences


def _row(target: Target, job: str, ours: pd.DataFrame, ratio: Ratio | None) -> Batch:
    seconds = ours["seconds"].to_numpy(dtype=float)
    differences = ours["host_seconds"].to_numpy(dtype=float) / seconds - 1
    worst = float(differences[np.abs(differences).argmax()])
    caveats = []
    if abs(worst) > CLOCK_TOLERANCE:
        caveats.append(f"batch {job}, {target.label}: by the host's clock {worst:+.1%} against the target's own")
    interval = _stats.interval(_stats.location(seconds)) if len(seconds) >= 2 else None
    return Batch(
        target=target.name, label=target.label, emulated=target.emulated, job=job,
        scale=str(ours["scale"].iloc[0]), n=len(seconds), mean_s=float(seconds.mean()),
        median_s=float(np.median(seconds)), stdev_s=float(seconds.std(ddof=1)) if len(seconds) >= 2 else None,
        min_s=float(seconds.min()), ci95_s=(interval.low, interval.high) if interval else None, ratio=ratio,
        accuracy=float(ours["accuracy"].iloc[0]) if ours["accuracy"].nunique() == 1 else None,
        host_clock_difference=worst, repeats_s=seconds.tolist(), caveats=caveats,
    )  # fmt: skip


def ratio_of_jobs(ours: pd.DataFrame, base: pd.DataFrame) -> Ratio:
    """Ratio of means, paired by repeat, since repeat i ran everywhere before repeat i + 1."""
    if set(ours["scale"]) != set(base["scale"]):
        return Ratio(None, reason="the baseline did not run it at this scale")
    pairs = pd.concat([ours["seconds"], base["seconds"]], axis=1, join="inner").to_numpy(dtype=float)
    if not len(pairs):
        return Ratio(None, reason="no repeat that both ran")
    plain = float(pairs[:, 0].mean() / pairs[:, 1].mean())
    if len(pairs) < _stats.MIN_PAIRS:
        return Ratio(plain, reason=f"fewer than {_stats.MIN_PAIRS} repeats")
    found = _stats.ratio_of_means(pairs[:, 0], pairs[:, 1])
    if found is None or found.low <= 0:
        return Ratio(plain, reason="the baseline's repeats scatter too much to divide by")
    n = len(pairs)
    ratio = Ratio(*found, of="repeats", n=n, log_se=_stats.log_se(found, n - 1), df=n - 1)
    return ratio.replace(could_be=could_be(ratio))
