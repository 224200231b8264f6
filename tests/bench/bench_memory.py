"""What ten million requests take in memory: engine's rows, table, histogram, Parquet parts and file, as in a run.

    python -m tests.bench.bench_memory [--rows 10000000]

Prints the process's memory at the start, at its largest, and the file's size. The aim is at most 200 MiB in all.
"""

import argparse
import resource
import tempfile
from pathlib import Path

import numpy as np
import psutil

from loadtest import _histogram, _samples
from loadtest._samples import ParquetWriter, Where, table

PIECE = 20_000  # what half a second of a fast run holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**7)
    given = parser.parse_args()
    drawn, counted = np.random.default_rng(1), dict[float, int]()
    start_mib = psutil.Process().memory_info().rss / 2**20
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.parquet"
        writer = ParquetWriter(path)
        for at in range(0, given.rows, PIECE):
            raw = _samples.blank(min(PIECE, given.rows - at))
            raw[:, _samples.INTENDED] = raw[:, _samples.SENT] = 10**15 + (at + np.arange(len(raw))) * 10_000
            raw[:, _samples.ENDED] = raw[:, _samples.SENT] + drawn.lognormal(12, 0.5, len(raw)).astype(np.int64)
            raw[:, _samples.FIRST] = raw[:, _samples.ENDED] - 5000
            raw[:, _samples.STAGES_AT :] = drawn.integers(0, 10**5, (len(raw), len(raw[0]) - _samples.STAGES_AT))
            for value, n in _histogram.counts(_histogram.middles_ns(raw[:, _samples.ENDED] - raw[:, _samples.SENT])):
                counted[value] = counted.get(value, 0) + n
            writer.add(table(raw, Where("process", "knn", "closed-16")))
        writer.close()
        size_mib = path.stat().st_size / 2**20
    most_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{given.rows:,} requests: {start_mib:.0f} MiB at the start, {most_mib:.0f} MiB at most; "
        f"{len(counted):,} buckets; the file has {size_mib:.0f} MiB"
    )


if __name__ == "__main__":
    main()
