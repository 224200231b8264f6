"""Our samples in Locust's statistics. Locust runs in a process of its own: importing it patches the process."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loadtest._tally import rounded_ns

SCRIPT = """
import json, locust.stats, numpy as np
from loadtest import _samples, _tally
from loadtest._samples import FIELDS
drawn = np.random.default_rng(1)
raw = np.zeros((3000, FIELDS), dtype=np.int64)
raw[:, _samples.SENT] = 10**12 + np.arange(3000) * 10**6
raw[:, _samples.ENDED] = raw[:, _samples.SENT] + drawn.lognormal(12, 1, 3000).astype(np.int64)
raw[:, _samples.STATUS], raw[:, _samples.BYTES_IN] = 200, 150
raw[::10, _samples.OUTCOME], raw[::10, _samples.STATUS] = _samples.WRONG_STATUS, 503
raw[::100, _samples.OUTCOME], raw[::100, _samples.STATUS] = _samples.TIMEOUT, 0

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
ms = (raw[:, _samples.ENDED] - raw[:, _samples.SENT]) / 1e6
print(json.dumps({
    "requests": entry.num_requests, "failures": entry.num_failures, "total": stats.total.num_failures,
    "per_second": dict(entry.num_reqs_per_sec), "failed_per_second": sum(entry.num_fail_per_sec.values()),
    "errors": {e.error: e.occurrences for e in stats.errors.values()},
    "percentiles": [entry.get_response_time_percentile(q) for q in (0.5, 0.9, 0.99)],
    "true": np.quantile(ms, (0.5, 0.9, 0.99), method="inverted_cdf").tolist(),
    "mean": [entry.avg_response_time, float(ms.mean())],
    "ends": [[entry.min_response_time, entry.max_response_time], [float(ms.min()), float(ms.max())]],
    "size": entry.avg_content_length, "keys": len(entry.response_times), "summary": _tally.summary(stats),
}))
# Locust's own count of the same requests, one by one, agrees but for its rounding.
theirs = locust.stats.RequestStats()
for time_ms in ms: theirs.log_request("POST", "t/knn", time_ms, 150)
assert theirs.total.num_requests == stats.total.num_requests
assert abs(theirs.total.avg_response_time - stats.total.avg_response_time) < 1e-6
"""


def test_rounding_keeps_three_digits() -> None:
    given = [1, 12, 999, 1000, 1004, 1006, 12_345, 999_499, 999_999, 123_456_789]
    wanted = [1, 12, 999, 1000, 1000, 1010, 12_300, 999_000, 1_000_000, 123_000_000]
    assert rounded_ns(np.array(given)).tolist() == wanted
    values = np.random.default_rng(1).integers(1, 10**11, 100_000)
    assert (np.abs(rounded_ns(values) / values - 1) <= 0.005).all()


def test_locusts_statistics_hold_what_we_measured() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["requests"], found["failures"], found["total"], found["failed_per_second"]) == (3000, 300, 300, 300)
    assert found["errors"] == {"wrong_status 503": 270, "timeout": 30}
    assert sum(found["per_second"].values()) == 3000 and min(map(int, found["per_second"])) == 1_700_001_000
    assert found["percentiles"] == pytest.approx(found["true"], rel=0.01)
    assert found["mean"][0] == pytest.approx(found["mean"][1])
    assert found["ends"][0] == pytest.approx(found["ends"][1])
    assert found["size"] == 150 and found["keys"] < 2000
    assert found["summary"][0].startswith("t/knn: 3000 requests, 300 failed  p50 ")
