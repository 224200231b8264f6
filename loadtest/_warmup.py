"""Warm-up by rule: what of a cell comes before its targets have settled is in no figure.

The plan's own warm-up is always left out. What is left is a series of quads, in every start: each target's log p50 less
the first target's, the mean of its two blocks, in which what drifts for all alike is not seen (of a single target: its
log p50). A change point in the first half of a series ends the warm-up there, for all targets in all starts. One in the
second half is none: there is no steady state to be measured.
"""

import math

import numpy as np

from loadtest import _starts, _stats
from loadtest._cells import Logs
from loadtest._folder import Folder, Key
from loadtest._schema import WarmUp
from loadtest._verdict import percent


def settle(folder: Folder, logs: Logs, margin: float) -> tuple[Logs, list[WarmUp]]:
    """The logs without what the rule makes warm-up, which is taken out of the folder's figures, too, and what it found
    in each cell. A late change beyond `margin`, a share, is noted in the folder beside its target's figures.

    Nothing is left out where requests failed, since that is what they would be missing from.
    """
    found = []
    for model in folder.plan.models:
        for load in folder.plan.loads:
            keys = [(one.name, model, load) for one in folder.targets if not one.emulated]
            keys = [key for key in keys if key in logs]
            if keys:
                found.append(_settle(folder, logs, keys, margin))
    rounds = {key: frame.index.get_level_values("round") for key, frame in logs.items()}
    return {key: frame[rounds[key] >= folder.settled.get(key, 0)] for key, frame in logs.items()}, found


def _settle(folder: Folder, logs: Logs, keys: list[Key], margin: float) -> WarmUp:
    series = [_starts.by_quad(logs[key]) for key in keys]
    quads = sorted(set.intersection(*(set(one.columns) for one in series)))
    starts = sorted(set.intersection(*(set(one.index) for one in series)))
    p50 = [np.array(one.loc[starts, quads], dtype=float) for one in series]
    with np.errstate(invalid="ignore"):
        differences = [one - p50[0] for one in p50[1:]] or p50
    places = [_stats.change_point(one) if np.isfinite(one).all() else 0 for one in differences]
    half = len(quads) // 2
    early = max((place for place in places if place <= half), default=0)
    if any(folder.requests[key].failed for key in keys):
        early = 0
    for key in keys if early else ():
        folder.leave_out(key, before=2 * int(quads[early]))
    labels = {target.name: target.label for target in folder.targets}
    over = f" over {labels[keys[0][0]]}'s" if len(keys) > 1 else ""
    for key, place, one in zip(keys[1:] or keys, places, differences, strict=True):
        step = float(one[:, place:].mean() - one[:, :place].mean()) if place > half else 0.0
        if abs(step) > math.log1p(margin):
            folder.unsettled[key] = (
                f"{labels[key[0]]}, {key[1]}, {key[2]}: no steady state: from quad {place + 1} of {len(quads)} on its "
                f"p50{over} is another one by {percent(math.exp(step))}; measure for longer (seconds)"
            )
    return WarmUp(model=keys[0][1], load=keys[0][2], quads=len(quads), left_out=early)
