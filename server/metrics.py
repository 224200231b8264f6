"""What became of each model's requests: counters and histograms, shown in Triton's form and in Prometheus'.

Triton's form: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md
All of it belongs to the event loop's thread. prometheus-client is imported when /metrics is asked for the first time:
its own histograms would take some microseconds of every request, so these are handed to it when it asks.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from server.timing import STAGES, Stages

if TYPE_CHECKING:
    from prometheus_client.core import Metric

BOUNDS_NS = (*(step * 10**power for power in range(4, 10) for step in (1, 2, 5)), 10**10)
BOUNDS_ROWS = tuple(2**power for power in range(13))


class Histogram:
    """Counts of values up to and including each bound, and of those above all."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[int] = BOUNDS_NS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0

    def add(self, value: int) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)

    def buckets(self, scale: float) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus wants them."""
        total, found = 0, []
        for bound, count in zip((*self.bounds, None), self.counts, strict=True):
            total += count
            found.append(("+Inf" if bound is None else repr(bound * scale), float(total)))
        return found


class Calls:
    """The calls of a model, whatever the version: how many rows each had, and what calls of that size took."""

    def __init__(self) -> None:
        self.rows = Histogram(BOUNDS_ROWS)
        self.by_rows: dict[int, list[int]] = {}  # calls, ns of joining, ns of computing
        self.stages: Counter[str] = Counter()  # ns of parts of its calls, as the model says

    def add(self, rows: int, join_ns: int, compute_ns: int) -> None:
        self.rows.add(rows)
        sums = self.by_rows.get(rows)
        if sums is None:
            if len(self.by_rows) >= 256:  # rows of one large request may be any number
                return
            sums = self.by_rows[rows] = [0, 0, 0]
        sums[0] += 1
        sums[1] += join_ns
        sums[2] += compute_ns


class Requests:
    """The infer requests to one version of a model."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.total = Histogram()
        self.write = Histogram()
        self.stages = tuple(Histogram() for _ in STAGES)
        self._all = (*self.stages, self.total)
        self.rows = 0
        self.statuses: Counter[int] = Counter()
        self._failed_ns = 0
        self._last_ms = 0

    def succeeded(self, rows: int, of: Stages) -> None:
        for histogram, ns in zip(self._all, of, strict=True):
            histogram.counts[bisect_left(BOUNDS_NS, ns)] += 1  # as `add` does, which would be a call for each
            histogram.sum += ns
        self.rows += rows
        self.statuses[200] += 1
        self._last_ms = time.time_ns() // 1_000_000

    def failed(self, status: int, total_ns: int) -> None:
        self.statuses[status] += 1
        self._failed_ns += total_ns

    def as_triton(self, name: str, version: str) -> dict[str, Any]:
        """An inference is a request, as Triton counts where max_batch_size is 0; an execution is a call."""
        done = self.total.count
        _, parse, queue, batch, compute, serialise = (histogram.sum for histogram in self.stages)
        sums = {
            "success": self.total.sum, "queue": queue, "compute_input": parse + batch,
            "compute_infer": compute, "compute_output": serialise,
        }  # fmt: skip
        inference = {key: {"count": done, "ns": ns} for key, ns in sums.items()}
        inference["fail"] = {"count": self.statuses.total() - done, "ns": self._failed_ns}
        return {
            "name": name, "version": version, "last_inference": self._last_ms,
            "inference_count": done, "execution_count": self.calls.rows.count, "inference_stats": inference,
            "batch_stats": [
                {
                    "batch_size": rows,
                    "compute_input": {"count": count, "ns": join_ns},
                    "compute_infer": {"count": count, "ns": compute_ns},
                    "compute_output": {"count": 0, "ns": 0},
                }
                for rows, (count, join_ns, compute_ns) in sorted(self.calls.by_rows.items())
            ],
        }  # fmt: skip


class Exposition:
    """A collector of prometheus-client over the counters above."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, str], Requests] = {}
        self.calls: dict[str, Calls] = {}
        self.waiting: dict[str, int] = {}
        self.connections = 0
        self.errors: Counter[int] = Counter()
        self.lag = Histogram()

    def collect(self) -> Iterator["Metric"]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        who = ["model", "version"]

        def histogram(
            name: str, text: str, labels: list[str], of: Iterable[tuple[list[str], Histogram]], scale: float
        ) -> "Metric":
            family = HistogramMetricFamily(name, text, labels=labels)
            for values, one in of:
                family.add_metric(values, one.buckets(scale), one.sum * scale)
            return family

        totals = [([*key], one.total) for key, one in self.requests.items()]
        stages = [
            ([*key, stage], found)
            for key, one in self.requests.items()
            for stage, found in zip((*STAGES, "write"), (*one.stages, one.write), strict=True)
        ]
        batches = [([name], one.rows) for name, one in self.calls.items()]
        yield histogram("isolatency_request_seconds", "First byte to serialised answer, of requests answered 200.",
                        who, totals, 1e-9)  # fmt: skip
        yield histogram("isolatency_stage_seconds", "The parts of isolatency_request_seconds, and the write after it.",
                        [*who, "stage"], stages, 1e-9)  # fmt: skip
        yield histogram("isolatency_batch_rows", "Rows of each call of a model.", ["model"], batches, 1)
        yield histogram("isolatency_event_loop_lag_seconds", "How late the event loop wakes up, ten times a second.",
                        [], [([], self.lag)], 1e-9)  # fmt: skip
        requests = CounterMetricFamily("isolatency_requests", "Infer requests answered.", labels=[*who, "status"])
        rows = CounterMetricFamily("isolatency_rows", "Rows of infer requests answered 200.", labels=who)
        for key, one in self.requests.items():
            rows.add_metric(key, one.rows)
            for status, count in one.statuses.items():
                requests.add_metric([*key, str(status)], count)
        yield requests
        yield rows
        parts = CounterMetricFamily("isolatency_model_stage_seconds", "Parts of a model's calls, as the model says.",
                                    labels=["model", "stage"])  # fmt: skip
        for name, of in self.calls.items():
            for stage, ns in of.stages.items():
                parts.add_metric([name, stage], ns * 1e-9)
        yield parts
        errors = CounterMetricFamily("isolatency_errors", "Answers with a status from 400.", labels=["status"])
        for status, count in self.errors.items():
            errors.add_metric([str(status)], count)
        yield errors
        waiting = GaugeMetricFamily("isolatency_queue_rows", "Rows that wait for a model.", labels=["model"])
        for name, count in self.waiting.items():
            waiting.add_metric([name], count)
        yield waiting
        yield GaugeMetricFamily("isolatency_connections", "Open connections.", value=self.connections)

    def text(self, accepted: str) -> tuple[bytes, str]:
        """The exposition and its media type, in the format that the header Accept asks for."""
        from prometheus_client import CollectorRegistry, ProcessCollector
        from prometheus_client.exposition import choose_encoder

        registry = CollectorRegistry()
        registry.register(self)
        ProcessCollector(registry=registry)
        try:
            encode, media = choose_encoder(accepted)
        except (TypeError, ValueError):  # it asks for a version that is none
            encode, media = choose_encoder("")
        return encode(registry), media
