"""Inside a guest, as its root: Locust drives a server while the guest's wall clock is set. Prints one line of JSON."""

import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from tests.e2e.raw import Raw, write_rows

RATE = 100
BETWEEN_S = 3


def step(seconds: float) -> None:
    """Set the wall clock, forward or back."""
    time.clock_settime_ns(time.CLOCK_REALTIME, time.time_ns() + round(seconds * 1e9))


def slew(seconds: float) -> None:
    """Let the kernel bring the wall clock there bit by bit (adjtime(3))."""
    delta = (ctypes.c_long * 2)(*divmod(round(seconds * 1e6), 10**6))
    assert ctypes.CDLL(None).adjtime(delta, None) == 0


def main() -> None:
    folder = Path(sys.argv[1])
    server = Raw()
    argv = [
        sys.executable, "-m", "locust", "-f", "loadtest", "--headless", "-u", "2", "-r", "2", "-t", f"{5 * BETWEEN_S}s",
        "--scenario", "constant", "--rate", str(RATE), "--host", server.url, "--samples", folder / "s.parquet",
        "--data", write_rows(folder),
    ]  # fmt: skip
    with subprocess.Popen(list(map(str, argv)), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as locust:
        end = time.monotonic() + 300
        while server.requests < RATE and locust.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        moments_ns = []
        for change, seconds in ((step, 3600.0), (step, -7200.0), (slew, 0.5)):
            time.sleep(BETWEEN_S)
            change(seconds)
            moments_ns.append(time.monotonic_ns())
        _, said = locust.communicate(timeout=300)
    frame = pd.read_parquet(folder / "s.parquet")
    first, sent, received = (frame[f"{name}_ns"] for name in ("first_byte", "sent", "received"))
    found = {
        "code": locust.returncode,
        "said": said,
        "outcomes": frame.outcome.astype(str).value_counts().to_dict(),
        "gaps_ns": sorted(set(frame.intended_ns.sort_values().diff().dropna().astype(int).tolist())),
        # Between the changes: how many requests, and how many of them have a stamp of the kernel.
        "stamped": [
            [int(during.sum()), int(first[during].notna().sum())]
            for start, end in zip([0, *moments_ns], [*moments_ns, 1 << 62], strict=True)
            for during in [(sent > start) & (sent <= end)]
        ],
        "in_order": bool(((sent <= first) & (first <= received))[first.notna()].all()),
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
