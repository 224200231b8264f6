"""What became of each model's requests, in Triton's form.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md
"""

import time
from typing import Any, NamedTuple


class Times(NamedTuple):
    """Nanoseconds of one request's parts."""

    compute_input: int
    compute_infer: int
    compute_output: int


class Stats:
    """Counts and sums of nanoseconds of one version of a model; of one thread, the event loop's."""

    def __init__(self) -> None:
        names = ("success", "fail", "queue", *Times._fields)
        self._sums = {name: [0, 0] for name in names}
        self._last_ms = 0

    def succeeded(self, total_ns: int, times: Times) -> None:
        self._last_ms = time.time_ns() // 1_000_000
        self._add("success", total_ns)
        self._add("queue", 0)  # nothing waits yet
        for name, ns in zip(Times._fields, times, strict=True):
            self._add(name, ns)

    def failed(self, total_ns: int) -> None:
        self._add("fail", total_ns)

    def _add(self, name: str, ns: int) -> None:
        entry = self._sums[name]
        entry[0] += 1
        entry[1] += ns

    def as_triton(self, name: str, version: str) -> dict[str, Any]:
        """An inference is a request, as Triton counts where max_batch_size is 0."""
        done = self._sums["success"][0]
        return {
            "name": name, "version": version, "last_inference": self._last_ms,
            "inference_count": done, "execution_count": done,
            "inference_stats": {key: {"count": count, "ns": ns} for key, (count, ns) in self._sums.items()},
            "batch_stats": [],
        }  # fmt: skip
