"""Where the time of a typical and of a slow request goes: client, server by its stages, and what is left between.

The parts are means over the same requests, those ranked around the quantile, so that they sum to their total. Columns
may be absent: an unknown server says nothing of its stages, and an older folder has no stamps of the kernel.
"""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pandas as pd

from loadtest import _folder, _stats
from loadtest._folder import Folder, Key
from loadtest._schema import Part, Span, Stages

BANDS = {"p50": (0.49, 0.51), "p99": (0.985, 0.995)}
STAGES = ("read", "parse", "queue", "batch", "compute", "serialise")
SERVER = [f"server_{stage}_ns" for stage in (*STAGES, "total")]
COLUMNS = ["intended_ns", "sent_ns", "first_byte_ns", "received_ns"]
CLIENT_SHARE = 0.2
NAMES = {
    "client_queue": "client, before it is sent",
    **{stage: f"server, {stage}" for stage in STAGES},
    "server_rest": "server, the rest",
    "client_receive": "client, kernel to user space",
    "residual": "residual: network, isolation, the server's write",
}
Cut = dict[tuple[Key, int], dict[str, tuple[float, float]]]  # (cell, restart) → band → µs from, to
Means = dict[tuple[Key, str], dict[int, "pd.Series[float]"]]  # (cell, band) → restart → means in µs


def stages(folder: Folder) -> tuple[list[Stages], list[str]]:
    """All cells in the plan's order, and sentences on what does not add up. Empty where no server said its stages."""
    if not any(SERVER[-1] in names for names in _folder.sample_columns(folder)):
        return [], []
    cuts = _cuts(folder)
    means, negative = _means(folder, cuts)
    found = []
    for model in folder.plan.models:
        for load in folder.plan.loads:
            for target in folder.targets:
                for band in BANDS:
                    of_band = means.get(((target.name, model, load), band))
                    if of_band:
                        found.append(_one(target.name, target.label, target.emulated, model, load, band, of_band))
    if all(len(one.parts) == 2 for one in found):
        return [], _client(found)  # neither a server nor the kernel said anything: all is residual
    return found, [*_negative(negative, folder), *_client(found), *_unlike(found, folder.plan.loads[0])]


def _cuts(folder: Folder) -> Cut:
    cuts: Cut = {}
    for key, requests in folder.requests.items():
        for restart, us in requests.rows.groupby("restart")["us"]:
            values = us.to_numpy()
            bands: dict[str, tuple[float, float]] = {}
            for band, (low, high) in BANDS.items():
                if len(values) >= _stats.samples_needed(0.5 if band == "p50" else 0.99):
                    ends = _stats.quantiles(values, [low, high])
                    if np.isfinite(ends).all():
                        bands[band] = (ends[0], ends[1])
            cuts[key, int(str(restart))] = bands
    return cuts


def _means(folder: Folder, cuts: Cut) -> tuple[Means, dict[Key, tuple[int, int]]]:
    """Means in µs per cell, band and restart; and per cell how many residuals are below 0, of how many requests.

    Where not all requests of a cell and band have the same parts (a stamp that was lost, a server that tells its stages
    now and then), the means are of those that are most: so they sum to their total.
    """
    sums: dict[tuple[Key, str], dict[int, dict[int, pd.Series[float]]]] = defaultdict(lambda: defaultdict(dict))
    negative: dict[Key, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for key, restart, parts in _groups(folder):
        told = parts["server_rest"].notna()
        below, seen = negative[key]
        negative[key] = below + int((parts.loc[told, "residual"] < 0).sum()), seen + int(told.sum())
        for band, (low, high) in cuts.get((key, restart), {}).items():
            chosen = parts[(parts["total"] >= low) & (parts["total"] <= high)]
            known = chosen.notna().to_numpy() @ (1 << np.arange(len(chosen.columns)))  # a bit for each part
            for pattern, rows in chosen.groupby(known):
                of_pattern = sums[key, band][int(str(pattern))]
                added = pd.concat([rows.sum(min_count=1), pd.Series({"requests": float(len(rows))})])
                of_pattern[restart] = of_pattern[restart] + added if restart in of_pattern else added
    means: Means = defaultdict(dict)
    for place, patterns in sums.items():
        most = max(patterns.values(), key=lambda starts: sum(one["requests"] for one in starts.values()))
        for restart, one in most.items():
            means[place][restart] = pd.concat([one.drop("requests") / one["requests"], one[["requests"]]])
    return means, dict(negative)


def _groups(folder: Folder) -> Iterator[tuple[Key, int, pd.DataFrame]]:
    """The answered requests that are not warm-up, piece by piece, as parts in µs; NaN where a part is not known."""
    wanted = ["restart", "target", "model", "load", "round", "outcome", "warmup", *COLUMNS, *SERVER]
    for frame in _folder.samples(folder, wanted):
        good = frame[(frame["outcome"] == "ok") & ~frame["warmup"]]
        for (target, model, load, restart), part in good.groupby(["target", "model", "load", "restart"], observed=True):
            key = (str(target), str(model), str(load))
            if before := folder.settled.get(key):
                part = part[part["round"] >= before]
            yield key, int(str(restart)), _parts(part)


def _parts(part: pd.DataFrame) -> pd.DataFrame:
    def us(name: str) -> "pd.Series[float]":
        return part[name].astype(float) / 1e3 if name in part else pd.Series(np.nan, index=part.index)

    # Differences of whole ns first: these clocks are too large for a float to hold a tenth of a µs.
    whole = {name: part[name] - part["intended_ns"] for name in COLUMNS if name in part}
    since = {name: values.astype(float) / 1e3 for name, values in whole.items()}
    nothing = pd.Series(np.nan, index=part.index)
    total, sent, first = since["received_ns"], since["sent_ns"], since.get("first_byte_ns", nothing)
    server = us(SERVER[-1])
    parts = {"total": total, "client_queue": sent}
    parts |= {stage: us(f"server_{stage}_ns").where(server.notna()) for stage in STAGES}
    parts["server_rest"] = server - pd.DataFrame({stage: parts[stage] for stage in STAGES}).sum(axis=1)
    parts["client_receive"] = total - first
    # What is not known is in the residual.
    parts["residual"] = total - sent - server.fillna(0.0) - parts["client_receive"].fillna(0.0)
    return pd.DataFrame(parts)


def _one(
    target: str, label: str, emulated: bool, model: str, load: str, band: str, means: dict[int, "pd.Series[float]"]
) -> Stages:
    frame = pd.DataFrame(means).T
    return Stages(
        target=target, label=label, emulated=emulated, model=model, load=load, band=band,
        requests=int(frame["requests"].sum()), total_us=_span(frame["total"]),
        parts=[Part(name, _span(frame[name])) for name in NAMES if frame[name].notna().all()],
        compute_us=frame["compute"].tolist() if frame["compute"].notna().all() else [],
    )  # fmt: skip


def _span(values: "pd.Series[float]") -> Span:
    if len(values) < _stats.MIN_PAIRS:
        return Span(float(values.mean()))
    return Span(*_stats.interval(_stats.location(np.array(values, dtype=float))))


def _negative(counts: dict[Key, tuple[int, int]], folder: Folder) -> list[str]:
    labels = {target.name: target.label for target in folder.targets}
    below = [
        f"{labels[target]}, {model}, {load} ({below:,} of {seen:,})"
        for (target, model, load), (below, seen) in counts.items()
        if below
    ]
    if not below:
        return []
    return [f"requests that took longer by the server's clock than by the client's: {'; '.join(below)}"]


def _client(found: list[Stages]) -> list[str]:
    """Where the load client itself is more than a fifth of a p50: it draws ratios towards 1."""
    large = []
    for one in found:
        parts = {part.name: part.us.estimate for part in one.parts}
        share = (parts.get("client_queue", 0.0) + parts.get("client_receive", 0.0)) / one.total_us.estimate
        if one.band == "p50" and share > CLIENT_SHARE:
            large.append(f"{one.label}, {one.model}, {one.load} ({share:.0%})")
    return [f"the load client's own share is above {CLIENT_SHARE:.0%} of p50: {'; '.join(large)}"] if large else []


def _unlike(found: list[Stages], load: str) -> list[str]:
    """What lies between the two ends should not depend on the model, but for the size of what is sent.

    At the first load only: with more connections a request waits for others, and the residual holds that. And only
    where the server's part is known: else the residual holds the model."""
    residuals = {
        (one.label, one.model): part.us
        for one in found
        for part in one.parts
        if (one.band, one.load, part.name) == ("p50", load, "residual") and _told(one)
    }
    apart = []
    for (label, model), span in residuals.items():
        null = residuals.get((label, "null"))
        if null and None not in (span.low, span.high, null.low, null.high) and not _meet(span, null):
            apart.append(f"{label}, {model} ({span.estimate:.1f} and {null.estimate:.1f})")
    if not apart:
        return []
    return [f"residuals at {load} whose interval does not meet that of null, in µs: {'; '.join(apart)}"]


def _told(one: Stages) -> bool:
    return any(part.name == "server_rest" for part in one.parts)


def _meet(one: Span, other: Span) -> bool:
    assert one.low is not None and one.high is not None and other.low is not None and other.high is not None
    return one.low <= other.high and other.low <= one.high
