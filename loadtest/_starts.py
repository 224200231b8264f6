"""From blocks to starts: what one start of a target says, and what its starts say together.

Two fresh starts of one program differ, so the start is the unit. Within it, blocks are paired with the baseline's in
the same quad: an order of the targets and its mirror, over which a linear drift cancels. Pure functions on frames.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from loadtest import _stats
from loadtest._folder import Requests
from loadtest._schema import Ratio, Ratios, Span

QUANTILES = {"p50": 0.5, "p99": 0.99}
KERNEL = {f"{name}_kernel": q for name, q in QUANTILES.items()}  # by the kernel's stamps
EVERY = QUANTILES | KERNEL
LOST = 0.01  # of a block's stamps, as when somebody sets the clock: the others still tell its quantiles
TOO_FEW = f"fewer than {_stats.MIN_PAIRS} quads"


class Units(NamedTuple):
    """`quads`: one value per quad, `starts`: one per start, of a log or of a difference of logs; both shape (n,)."""

    quads: _stats.Floats
    starts: _stats.Floats


def block_logs(found: Requests, blocks: pd.DataFrame) -> pd.DataFrame:
    """Per (restart, round) of one cell: its block's log p50 and log p99, of the requests after the first moments that
    follow a switch; how many answers came in time; seconds; and when it began.

    NaN where the cell's blocks have too few requests for the quantile, or too few of the kernel's stamps; +inf where
    failures reach it, and where a block has so few in a cell that has enough that it must be a slow one.
    """
    rows = found.rows
    counts = rows.groupby(["restart", "block"])["us"].size().to_dict()
    median = float(
        np.median([counts.get(key, 0) for key in zip(blocks["restart"], blocks["block"], strict=True)] or [0])
    )
    settled = dict(iter(rows[rows["settled"]].groupby(["restart", "block"])))
    in_time = rows.groupby(["restart", "block"])["in_time"].sum().to_dict()
    out = []
    for block in blocks[["restart", "round", "block", "start_ns", "end_ns"]].to_dict("records"):
        key = (block["restart"], block["block"])
        of_block = settled.get(key)
        row = {"restart": block["restart"], "round": block["round"], "start_ns": block["start_ns"]}
        for names, column in ((QUANTILES, "us"), (KERNEL, "kernel_us")):
            us = np.array(of_block[column], dtype=float) if of_block is not None and column in of_block else np.empty(0)
            lost = float(np.isnan(us).mean()) if len(us) else 0.0
            us = us[~np.isnan(us)]
            for name, q in names.items():
                row[name] = math.nan
                if median >= _stats.MIN_MEDIAN[q] and (column == "us" or column in rows) and lost <= LOST:
                    enough = len(us) > 0 and counts.get(key, 0) >= _stats.MIN_BLOCK[q]
                    row[name] = math.log(_stats.quantiles(us, [q])[0]) if enough else math.inf
        seconds = (block["end_ns"] - block["start_ns"]) / 1e9
        out.append(row | {"answers": in_time.get(key, 0), "seconds": seconds})
    frame = pd.DataFrame(out, columns=["restart", "round", *EVERY, "answers", "seconds", "start_ns"])
    return frame.set_index(["restart", "round"]).sort_index()


def typical(logs: pd.DataFrame, name: str) -> Span | None:
    """The typical quantile in µs: the trimmed mean over quads of the blocks' own log-quantiles, and the mean of that
    over starts, with its interval where there are starts enough. None where a block has none, or it is infinite."""
    units = _units(_quads(logs)[name])
    if not len(units.starts) or not np.isfinite(units.starts).all():
        return None
    if len(units.starts) < _stats.MIN_PAIRS:
        return Span(math.exp(float(units.starts.mean())))
    return Span(*(math.exp(value) for value in _stats.interval(_stats.location(units.starts))))


def levels(logs: pd.DataFrame, name: str) -> dict[int, float]:
    """The typical quantile of each start, in µs, by restart; those that have none are left out."""
    by_start = _quads(logs)[name].groupby("restart")
    found = {int(str(restart)): math.exp(_stats.trimmed(np.array(values, dtype=float))) for restart, values in by_start}
    return {restart: level for restart, level in found.items() if math.isfinite(level)}


def drift(logs: pd.DataFrame, began_ns: int, most: int = 100) -> list[tuple[float, float | None]]:
    """Minutes since `began_ns` and the block's p50 in µs; neighbours are taken together, by their median, where there
    are more than `most`. Blocks without a p50 are left out; one among failures has None."""
    known = logs[logs["p50"].notna()].sort_values("start_ns")
    size = -(-len(known) // most)
    out: list[tuple[float, float | None]] = []
    for at in range(0, len(known), size or 1):
        part = known.iloc[at : at + size]
        middle = float(np.median(part["p50"]))
        minutes = round((float(part["start_ns"].mean()) - began_ns) / 60e9, 4)
        out.append((minutes, round(math.exp(middle), 2) if math.isfinite(middle) else None))
    return out


def stalled(logs: pd.DataFrame, p99_us: float, times: float) -> float:
    """The share of the blocks' time in blocks whose own p99 is more than `times` that of `p99_us`."""
    slow = logs["p99"] > math.log(times * p99_us)
    return float(logs.loc[slow, "seconds"].sum() / logs["seconds"].sum())


def costs(values: _stats.Floats) -> Span:
    """The median of one figure per start, with its interval where there are starts enough."""
    return Span(*(_stats.median_interval(values) or (float(np.median(values)),)))


def ratio_of_starts(ours: dict[int, float], base: dict[int, float]) -> Ratio:
    """The ratio of one figure per start, both by restart, all above 0."""
    both = sorted(ours.keys() & base.keys())
    if not both:
        return Ratio(None, reason="no start that both went through")
    logs = np.array([math.log(ours[restart] / base[restart]) for restart in both])
    if len(both) < _stats.MIN_PAIRS:
        return Ratio(math.exp(float(logs.mean())), reason=f"fewer than {_stats.MIN_PAIRS} starts")
    return _ratio(Units(np.empty(0), logs), trim=False)


def ratios(ours: pd.DataFrame, base: pd.DataFrame | None) -> Ratios:
    """A cell's figures over the baseline's. Never from a part of the rounds: those in which a block was too small are
    the slow ones."""
    if base is None:
        none = Ratio(None, reason="the baseline has no such requests")
        return Ratios(none, none, none)
    both = _quads(ours).join(_quads(base).add_suffix("_base"), how="inner")
    kernel = [_of_quantile(both, name) for name in KERNEL]
    stamped = kernel if kernel[0].estimate is not None else [None, None]
    return Ratios(_of_quantile(both, "p50"), _of_quantile(both, "p99"), _of_throughput(both), *stamped)


def unsteady(ours: pd.DataFrame, base: pd.DataFrame, name: str, margin: float) -> str | None:
    """Why there is no steady state: over all starts, the second half of a start has another ratio than its first.

    Paired with the baseline, so that what drifts in both is none; over starts, at 1 %, and only beyond the margin.
    """
    both = _quads(ours).join(_quads(base).add_suffix("_base"), how="inner")
    halves = []
    with np.errstate(invalid="ignore"):
        for _, values in (both[name] - both[f"{name}_base"]).groupby("restart"):
            middle = len(values) // 2
            if middle >= 2:
                halves.append(np.median(values[-middle:]) - np.median(values[:middle]))
    changes = np.array(halves)
    if len(changes) < _stats.MIN_PAIRS or not np.isfinite(changes).all():
        return None
    at = _stats.location(changes)
    if _stats.p_value(at) >= 0.01 or abs(at.mean) <= math.log1p(margin):
        return None
    change = f"{100 * math.expm1(at.mean):+.1f} %".replace("-", "−")
    return f"no steady state: within a start it goes by {change}; warm up for longer"


def by_quad(logs: pd.DataFrame) -> pd.DataFrame:
    """The log p50 of each start (rows) in each whole quad (columns) that every start went through."""
    return _quads(logs)["p50"].unstack("quad").dropna(axis="columns")


def _quads(logs: pd.DataFrame) -> pd.DataFrame:
    """Per (restart, quad), of quads with both their rounds: means of the logs, sums of the rest. NaN and inf stay."""
    quad = pd.Index(logs.index.get_level_values("round") // 2, name="quad")
    groups = logs.groupby([logs.index.get_level_values("restart"), quad])
    found = groups.agg(
        {name: lambda values: float(np.mean(values.to_numpy())) for name in EVERY}
        | {"answers": "sum", "seconds": "sum"}
    )
    return found[groups.size() == 2]


def _units(values: "pd.Series[float]") -> Units:
    starts = [_stats.trimmed(np.array(of_start, dtype=float)) for _, of_start in values.groupby("restart")]
    return Units(np.array(values, dtype=float), np.array(starts))


def differences(ours: pd.DataFrame, base: pd.DataFrame, name: str) -> "pd.Series[float]":
    """One log-ratio per start, by restart: ±inf where more quads than are trimmed are infinitely slow, NaN where there
    is no figure."""
    both = _quads(ours).join(_quads(base).add_suffix("_base"), how="inner")
    return _differences(both, name).groupby("restart").agg(lambda values: _of_start(np.array(values, dtype=float)))


def _differences(both: pd.DataFrame, name: str) -> "pd.Series[float]":
    with np.errstate(invalid="ignore"):
        found: pd.Series[float] = both[name] - both[f"{name}_base"]
    return found


def _of_start(quads: _stats.Floats) -> float:
    """Where both targets are infinitely slow, neither is the slower one: such a quad says nothing, if they are few."""
    said = quads[~np.isnan(quads)]
    return _stats.trimmed(said) if len(said) and len(said) >= (1 - _stats.TRIM) * len(quads) else math.nan


def _of_quantile(both: pd.DataFrame, name: str) -> Ratio:
    ours, base = both[name], both[f"{name}_base"]
    if not len(both):
        return Ratio(None, reason="no quad that both went through")
    if ours.isna().any() or base.isna().any():
        return Ratio(None, reason=f"blocks hold fewer than {_stats.MIN_MEDIAN[EVERY[name]]} requests")
    quads = _differences(both, name)
    starts = np.array([_of_start(np.array(values, dtype=float)) for _, values in quads.groupby("restart")])
    if not np.isfinite(starts).all():
        return _infinite(Units(np.array(quads, dtype=float), starts))
    said = quads.notna()
    found = _ratio(Units(np.array(quads[said], dtype=float), starts), trim=True)
    levels = np.exp([_stats.trimmed(np.array(level, dtype=float)) for _, level in base[said].groupby("restart")])
    return _added(found, levels, starts)


def _infinite(units: Units) -> Ratio:
    """Where some differences are infinite: all of them in one direction, which is a result, or no figure."""
    over_starts = len(units.starts) >= _stats.MIN_PAIRS
    over = units.starts if over_starts else units.quads
    if len(over) >= _stats.MIN_PAIRS and np.isinf(over).all() and (over == over[0]).all():
        return Ratio(
            None, of="starts" if over_starts else "instances", n=len(over), infinite=1 if over[0] > 0 else -1
        )  # fmt: skip
    return Ratio(None, reason="it falls among failed requests, or none was answered")


def _of_throughput(both: pd.DataFrame) -> Ratio:
    """All answers of a start over all its seconds: nothing is cut away, since a stall costs answers."""
    if not len(both):
        return Ratio(None, reason="no quad that both went through")

    def logs(sums: pd.DataFrame) -> _stats.Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            ours, base = sums["answers"] / sums["seconds"], sums["answers_base"] / sums["seconds_base"]
            return np.asarray(np.log(ours.to_numpy(dtype=float)) - np.log(base.to_numpy(dtype=float)))

    units = Units(logs(both), logs(both.groupby("restart").sum()))
    if not np.isfinite(units.starts).all() or not np.isfinite(units.quads).all():
        return Ratio(None, reason="in a quad none was answered in time")
    return _ratio(units, trim=False)


def _ratio(units: Units, *, trim: bool) -> Ratio:
    """With starts enough, the interval is over starts; else over quads, and then it is about these instances only."""
    per_start = [math.exp(value) for value in units.starts]
    over_starts = len(units.starts) >= _stats.MIN_PAIRS
    of = "starts" if over_starts else "instances"
    if over_starts:
        at = _stats.location(units.starts)
    elif len(units.quads) >= _stats.MIN_PAIRS:
        at = _stats.trimmed_location(units.quads) if trim else _stats.location(units.quads)
    if not over_starts and (len(units.quads) < _stats.MIN_PAIRS or not math.isfinite(at.se)):
        return Ratio(math.exp(float(units.starts.mean())), reason=TOO_FEW, of=of, per_start=per_start)
    estimate, low, high = (math.exp(value) for value in _stats.interval(at))
    return Ratio(
        estimate, low, high, of=of, n=len(units.starts) if over_starts else len(units.quads),
        per_start=per_start, log_se=at.se, df=at.df,
    )  # fmt: skip


def _added(found: Ratio, base_us: _stats.Floats, differences: _stats.Floats) -> Ratio:
    """With what the ratio comes to in µs: per start the baseline's own level times the ratio less 1, over starts."""
    if found.low is None or found.high is None or found.estimate is None:
        return found
    if found.of == "starts":
        span = Span(*_stats.interval(_stats.location(base_us * np.expm1(differences))))
    else:
        level = float(np.mean(base_us))
        span = Span(*(level * (value - 1) for value in (found.estimate, found.low, found.high)))
    return found.replace(added_us=span)
