"""Our samples in Locust's statistics. Locust runs in a process of its own: importing it patches the process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest import _tally

SCRIPT = """
import json, locust.stats, numpy as np
from loadtest import _samples, _tally
drawn = np.random.default_rng(1)
raw = _samples.blank(3000)
raw[:, _samples.INTENDED] = 10**12 + np.arange(3000) * 10**6
raw[:, _samples.ENDED] = raw[:, _samples.INTENDED] + drawn.lognormal(12, 1, 3000).astype(np.int64)
raw[:, _samples.STATUS], raw[:, _samples.BYTES_IN] = 200, 150
raw[::10, _samples.OUTCOME], raw[::10, _samples.STATUS] = _samples.WRONG_STATUS, 503
raw[::100, _samples.OUTCOME], raw[::100, _samples.STATUS] = _samples.TIMEOUT, 0
raw[50, _samples.ENDED] = raw[50, _samples.INTENDED] + 1000  # refused at once, which is no fast answer

def tally(pieces):
    stats = locust.stats.RequestStats()
    for piece in np.array_split(raw, pieces):
        _tally.add(stats, "t/knn", piece, 1_700_000_000 * 10**9)
    return stats

stats = tally(7)
entry = stats.entries["t/knn", "POST"]
whole = tally(1)
assert whole.entries["t/knn", "POST"].response_times == entry.response_times
assert stats.total.response_times == entry.response_times
ms = (raw[:, _samples.ENDED] - raw[:, _samples.INTENDED]) / 1e6
good = raw[:, _samples.OUTCOME] == _samples.OK
counted = np.where(good, ms, np.inf)
_tally.show_truth(locust.stats)
print(json.dumps({
    "requests": entry.num_requests, "failures": entry.num_failures, "total": stats.total.num_failures,
    "per_second": dict(entry.num_reqs_per_sec), "failed_per_second": sum(entry.num_fail_per_sec.values()),
    "errors": {e.error: e.occurrences for e in stats.errors.values()},
    "percentiles": [entry.get_response_time_percentile(q) for q in (0.5, 0.8, 0.95)],
    "true": np.quantile(counted, (0.5, 0.8), method="inverted_cdf").tolist(),
    "mean": [entry.avg_response_time, float(ms[good].mean())],
    "ends": [[entry.min_response_time, entry.max_response_time], [float(ms[good].min()), float(ms[good].max())]],
    "size": entry.avg_content_length, "keys": len(entry.response_times), "summary": _tally.summary(stats),
}))
# Locust's own count of the same requests, one by one, agrees but for its rounding.
theirs = locust.stats.RequestStats()
for time_ms, ok in zip(ms, good): theirs.log_request("POST", "t/knn", time_ms if ok else None, 150)
assert theirs.total.num_requests == stats.total.num_requests
assert abs(theirs.total.avg_response_time - stats.total.avg_response_time) < 1e-6
"""


def test_locusts_statistics_hold_what_we_measured() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["requests"], found["failures"], found["total"], found["failed_per_second"]) == (3000, 300, 300, 300)
    assert found["errors"] == {"wrong_status 503": 270, "timeout": 30}
    assert sum(found["per_second"].values()) == 3000 and min(map(int, found["per_second"])) == 1_700_001_000
    assert found["percentiles"][:2] == pytest.approx(found["true"], rel=0.0005)
    assert found["percentiles"][2] == _tally.NEVER_MS  # one in ten failed
    assert found["mean"][0] == pytest.approx(found["mean"][1])
    assert found["ends"][0] == pytest.approx(found["ends"][1])
    assert found["size"] == 150 and found["keys"] < 3000
    assert found["summary"][0].startswith("t/knn: 3000 requests, 300 failed  p50 ")
    assert found["summary"][0].endswith("p99 ∞ µs  p99.9 ∞ µs")
