"""Our samples in Locust's statistics, in batches: `events.request` costs 7 to 8 µs, more than a request does.

Locust rounds response times to whole milliseconds as it counts them. Here they are counted as the middles of log-linear
buckets (`_histogram`), in ms with all their digits, and Locust adds up the counts of its workers exactly: its page, its
JSON and, with `show_truth`, its quantiles and CSV files are then right to 0.05 %. A failed request counts as infinitely
slow: as NEVER_MS, since JSON has no infinity. Locust's terminal tables stay in whole milliseconds. Locust itself is not
imported: the caller hands its objects in.
"""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from loadtest import _histogram
from loadtest._samples import BYTES_IN, ENDED, INTENDED, OK, OUTCOME, OUTCOMES, STATUS, WRONG_STATUS, Raw

NEVER_MS = _histogram.LONGEST_NS / 1e6  # 9007199254.740992
METHOD = "POST"


def add(stats: Any, name: str, raw: Raw, epoch_ns: int) -> None:
    """Add requests, shape (n, FIELDS), to Locust's RequestStats under the row `name`.

    `epoch_ns` is what the wall clock shows when the monotonic one shows 0. The mean, the least and the most are of the
    requests that were answered: to Locust, a failed one has no time (a "none request").
    """
    if not len(raw):
        return
    elapsed_ns, good = raw[:, ENDED] - raw[:, INTENDED], raw[:, OUTCOME] == OK
    times = _histogram.counts(np.where(good, _histogram.middles_ns(elapsed_ns) / 1e6, NEVER_MS))
    seconds = _histogram.counts((raw[:, ENDED] + epoch_ns) // 1_000_000_000)
    last = (int(raw[:, ENDED].max()) + epoch_ns) / 1e9
    answered_ms = elapsed_ns[good] / 1e6
    for entry in (stats.total, stats.entries[(name, METHOD)]):
        if entry.use_response_times_cache and int(last) > int(entry.last_request_timestamp or last):
            entry._cache_response_times(int(last) - 1)  # what Locust's own log() does once a second
        entry.num_requests += len(raw)
        entry.num_none_requests += len(raw) - len(answered_ms)
        entry.total_response_time += float(answered_ms.sum())
        entry.total_content_length += int(raw[:, BYTES_IN].sum())
        entry.last_request_timestamp = last
        if len(answered_ms):
            entry.max_response_time = max(entry.max_response_time, float(answered_ms.max()))
            least_ms, least_before = float(answered_ms.min()), entry.min_response_time
            entry.min_response_time = least_ms if least_before is None else min(least_before, least_ms)
        for second, n in seconds:
            entry.num_reqs_per_sec[second] += n
        for time_ms, n in times:
            entry.response_times[time_ms] += n
    failed = raw[~good]
    for kind, n in _histogram.counts(
        failed[:, OUTCOME] * 1000 + failed[:, STATUS] * (failed[:, OUTCOME] == WRONG_STATUS)
    ):
        _add_error(stats, name, _describe(kind // 1000, kind % 1000), n)


def _describe(outcome: int, status: int) -> str:
    return f"{OUTCOMES[outcome]} {status}" if outcome == WRONG_STATUS else OUTCOMES[outcome]


def _add_error(stats: Any, name: str, error: str, n: int) -> None:
    stats.log_error(METHOD, name, error)  # makes the row of the error where there is none yet
    for known in stats.errors.values():
        if (known.method, known.name, known.error) == (METHOD, name, error):
            known.occurrences += n - 1
    for entry in (stats.total, stats.entries[(name, METHOD)]):
        entry.num_failures += n - 1
        entry.num_fail_per_sec[max(entry.num_fail_per_sec)] += n - 1


def summary(stats: Any) -> list[str]:
    """One line per row of Locust's statistics, in µs: what its own tables round away."""
    lines = []
    for (name, _), entry in sorted(stats.entries.items()):
        if not entry.num_requests:
            continue
        shown = "  ".join(
            f"p{q * 100:g} {_shown_us(entry.get_response_time_percentile(q))} µs" for q in (0.5, 0.9, 0.99, 0.999)
        )
        lines.append(f"{name}: {entry.num_requests} requests, {entry.num_failures} failed  {shown}")
    return lines


def _shown_us(time_ms: float) -> str:
    us = time_ms * 1000
    return "∞" if time_ms >= NEVER_MS else f"{us:.4g}" if us < 1000 else f"{us:.0f}"


def show_truth(locust_stats: Any) -> None:
    """Let Locust's quantiles be of nearest rank, and its CSV files and its page show what is counted: `int()` and
    rounding to whole numbers replaced."""

    def percentile(counted: dict[float, int], _: int, q: float) -> float:
        found = _histogram.quantile(counted, q)
        return 0.0 if math.isnan(found) else found

    def percentile_fields(self: Any, entry: Any, use_current: bool = False) -> list[Any]:
        if not entry.num_requests:
            return list(self.percentiles_na)
        current = use_current and entry.use_response_times_cache
        ask = entry.get_current_response_time_percentile if current else entry.get_response_time_percentile
        found = [ask(q) or 0 for q in self.percentiles_to_report]
        return ["inf" if value >= NEVER_MS else round(value, 7) for value in found]

    def close_files(self: Any) -> None:
        """What came after Locust wrote them last belongs in them, too."""
        handle, failures = self.requests_csv_filehandle, self.failures_csv_filehandle
        for file, write in ((handle, self.requests_csv), (failures, self.failures_csv)):
            file.seek(0)
            file.truncate()
            write(csv.writer(file))
        close(self)

    def as_json(stats: Any) -> str:
        """As Locust writes it; but it also empties the rows, which are still to go into the CSV files."""
        return json.dumps([entry.serialize() for entry in stats.entries.values() if entry.num_requests], indent=4)

    close = locust_stats.StatsCSVFileWriter.close_files
    locust_stats.print_stats_json = lambda stats: print(as_json(stats))
    locust_stats.save_stats_json = lambda stats, name: Path(f"{name}.json").write_text(as_json(stats))
    locust_stats.StatsCSVFileWriter.close_files = close_files
    locust_stats.calculate_response_time_percentile = percentile
    locust_stats.StatsEntry.median_response_time = property(lambda entry: entry.get_response_time_percentile(0.5))
    locust_stats.StatsCSV._percentile_fields = percentile_fields
    locust_stats.proper_round = lambda value, digits=0: round(value, max(digits, 6))
