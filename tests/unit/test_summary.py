"""Figures against folders whose truth is known."""

import json
from pathlib import Path

import numpy as np
import pytest

from images.errors import IsolatencyError, UsageError
from loadtest import _report, _stats
from loadtest._summary import summarise
from tests.unit.run_folder import LATENCY_US, make, target


def test_a_target_that_is_a_tenth_slower_has_the_ratio_1_10(tmp_path: Path) -> None:
    make(tmp_path, [target("a"), target("b")], factors={"b": 1.1})
    a, b = summarise(tmp_path).cells
    assert a.ratio is None
    assert b.ratio is not None and b.ratio.p50 is not None and b.ratio.p99 is not None
    for ratio in (b.ratio.p50, b.ratio.p99):
        assert ratio.estimate == pytest.approx(1.1, rel=1e-4)
        assert ratio.low is not None and ratio.high is not None and ratio.low <= ratio.estimate <= ratio.high
        assert ratio.verdict is None
    assert a.p50_us == pytest.approx(LATENCY_US, rel=0.02)
    assert b.p50_us == pytest.approx(1.1 * a.p50_us, rel=1e-4)


def test_another_baseline_turns_the_ratio_round(tmp_path: Path) -> None:
    make(tmp_path, [target("a"), target("b")], factors={"b": 1.25})
    found = summarise(tmp_path, "b")
    ratio = next(cell.ratio for cell in found.cells if cell.target == "a")
    assert found.baseline == "b" and ratio is not None and ratio.p50 is not None
    assert ratio.p50.estimate == pytest.approx(0.8, rel=1e-4)
    with pytest.raises(UsageError, match="there are: a, b"):
        summarise(tmp_path, "c")


def test_warm_up_is_in_no_figure_and_said(tmp_path: Path) -> None:
    make(tmp_path, [target("a")], per_block=100, rounds=3)
    found = summarise(tmp_path)
    assert (found.cells[0].requests, found.cells[0].warmup_requests) == (400, 200)
    assert found.cells[0].max_us is not None and found.cells[0].max_us < 10 * LATENCY_US
    assert any("200 of 600 requests" in caveat for caveat in found.caveats)


def test_throughput_and_cpu_are_per_block_second_and_per_request(tmp_path: Path) -> None:
    make(tmp_path, [target("a")], per_block=500, rounds=4)
    cell = summarise(tmp_path).cells[0]
    assert cell.seconds == 6.0
    assert cell.throughput_rps == pytest.approx(500)
    assert cell.host_cpu_us_per_request == pytest.approx(100)
    assert cell.client_cpu_us_per_request == pytest.approx(20)


def test_no_quantile_without_the_samples_for_it(tmp_path: Path) -> None:
    make(tmp_path, [target("a")], per_block=100, rounds=4)
    cell = summarise(tmp_path).cells[0]
    assert cell.p50_us is not None and cell.p90_us is not None
    assert cell.p99_us is None and cell.p999_us is None
    assert cell.samples_needed == {"p99": 662, "p999": 6636}


def test_failures_count_as_infinitely_slow(tmp_path: Path) -> None:
    make(tmp_path, [target("a"), target("b")], per_block=1000, failures={"b": 30})
    a, b = summarise(tmp_path).cells
    assert a.failures == 0 and a.p99_us is not None
    assert b.failures == 300 and b.failures_by_kind == {"timeout": 300}
    assert b.p90_us is not None and b.p99_us is None and "p99" not in b.samples_needed
    assert any("300 of 10000 requests failed" in caveat for caveat in summarise(tmp_path).caveats)


def test_a_model_may_be_called_null(tmp_path: Path) -> None:
    make(tmp_path, [target("a"), target("b")], models=("null", "knn"), factors={"b": 2.0})
    cells = {(cell.target, cell.model): cell for cell in summarise(tmp_path).cells}
    assert len(cells) == 4
    null = cells["b", "null"]
    assert null.seconds > 0 and null.ratio is not None and null.ratio.p50 is not None
    assert null.ratio.p50.estimate == pytest.approx(2.0, rel=1e-4)


def test_an_emulated_target_has_no_ratio_and_is_no_baseline(tmp_path: Path) -> None:
    make(tmp_path, [target("q", kind="qemu", accel="tcg"), target("a")])
    found = summarise(tmp_path)
    assert found.baseline == "a"
    assert [cell.ratio for cell in found.cells] == [None, None]
    with pytest.raises(UsageError):
        summarise(tmp_path, "q")


def test_too_few_rounds_give_no_interval(tmp_path: Path) -> None:
    make(tmp_path, [target("a"), target("b")], rounds=3, factors={"b": 1.5})
    ratio = summarise(tmp_path).cells[1].ratio
    assert ratio is not None and ratio.p50 is not None
    assert ratio.p50.estimate == pytest.approx(1.5, rel=1e-4) and ratio.p50.low is None


JOBS = [
    ("a", "knn", 0, 1.0, 1.0, 0.9), ("b", "knn", 0, 1.2, 1.2, 0.9), ("a", "knn", 1, 2.0, 2.0, 0.9),
    ("b", "knn", 1, 2.4, 2.4, 0.9), ("a", "knn", 2, 3.0, 3.0, 0.9), ("b", "knn", 2, 3.6, 3.65, 0.9),
]  # fmt: skip


def test_batch_jobs_are_described_and_paired_by_repeat(tmp_path: Path) -> None:
    make(tmp_path, [target("a"), target("b")], jobs=JOBS, load=False)
    found = summarise(tmp_path)
    a, b = found.batch
    assert found.cells == []
    assert (a.n, a.mean_s, a.median_s, a.min_s, a.stdev_s, a.ratio) == (3, 2.0, 2.0, 1.0, 1.0, None)
    assert b.ratio is not None and b.ratio.estimate == pytest.approx(1.2)
    assert a.ci95_s == pytest.approx((2 - 4.302653 / np.sqrt(3), 2 + 4.302653 / np.sqrt(3)), rel=1e-6)
    assert b.host_clock_difference == pytest.approx(3.65 / 3.6 - 1)
    assert [caveat for caveat in found.caveats if "clock" in caveat] == [
        "batch knn, b: the host's clock gives +1.4% against the target's own"
    ]


def test_accuracy_that_differs_at_equal_scale_is_a_caveat(tmp_path: Path) -> None:
    make(
        tmp_path, [target("a"), target("b")], jobs=[("a", "knn", 0, 1, 1, 0.9), ("b", "knn", 0, 1, 1, 0.8)], load=False
    )
    assert any("accuracy differs at equal scale: a 0.9, b 0.8" in caveat for caveat in summarise(tmp_path).caveats)


def test_firecracker_over_docker_where_both_ran_unemulated(tmp_path: Path) -> None:
    targets = [target("p"), target("d", kind="docker"), target("f", kind="firecracker", accel="kvm")]
    make(tmp_path, targets, factors={"d": 2.0, "f": 3.0})
    direct = summarise(tmp_path).direct
    assert len(direct) == 1 and direct[0]["ratio"]["p50"]["estimate"] == pytest.approx(1.5, rel=1e-4)
    targets[2] = target("f", kind="firecracker", accel="nested")
    make(tmp_path / "emulated", targets)
    assert summarise(tmp_path / "emulated").direct == []


@pytest.mark.parametrize("name", ["plan.toml", "manifest.json", "targets.json", "samples.parquet", "blocks.csv"])
def test_a_damaged_folder_is_one_line(tmp_path: Path, name: str) -> None:
    make(tmp_path, [target("a")])
    (tmp_path / name).write_bytes(b"\x00torn")
    with pytest.raises(IsolatencyError) as caught:
        summarise(tmp_path)
    assert ("\n" not in str(caught.value).strip() and name.split(".")[0] in str(caught.value)) or str(tmp_path) in str(
        caught.value
    )


def test_another_schema_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IsolatencyError, match="is no run folder"):
        summarise(tmp_path)
    make(tmp_path, [target("a")], schema=7)
    with pytest.raises(IsolatencyError, match="schema 7, this version reads 1"):
        summarise(tmp_path)


def test_the_report_is_the_same_again_and_marks_what_must_be_marked(tmp_path: Path) -> None:
    targets = [target("a"), target("q", kind="qemu", accel="tcg", caveats=["BLAS kernel: another CPU"])]
    make(tmp_path, targets, jobs=[(n, "knn", r, 1.0 + r, 1.0 + r, 0.9) for r in range(3) for n in ("a", "q")],
         allow_difference=True, partial=True, errors=["q died"])  # fmt: skip
    _report.write(tmp_path)
    first, summary = (tmp_path / "report.md").read_bytes(), json.loads((tmp_path / "summary.json").read_text())
    _report.write(tmp_path)
    assert (tmp_path / "report.md").read_bytes() == first
    text = first.decode()
    assert "PARTIAL" in text and "ERROR: q died" in text and "q (tcg): BLAS kernel: another CPU" in text
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles and all("UNEQUAL TARGETS" in title for title in titles)
    assert "1.8965" in text and "167.3205" in text
    assert summary["schema"] == 1 and summary["report_reference"]["knn"]["docker_s"] == 1.8965
    for line in text.splitlines():
        if line.startswith("| ") and " q " in line:
            assert "q (tcg)" in line


def test_the_terminal_fits_a_hundred_columns(tmp_path: Path) -> None:
    from rich.console import Console

    names = ["process", "docker", "uml"]
    targets = [target(name) for name in names] + [target("firecracker", kind="firecracker", accel="nested")]
    jobs = [
        (one["name"], job, r, 1.234 + r, 1.234 + r, 0.9) for r in range(3) for one in targets for job in ("knn", "dnn")
    ]
    make(tmp_path, targets, models=("knn", "dnn", "null"), jobs=jobs, factors={"firecracker": 400.0}, per_block=700)
    console = Console(record=True, file=(tmp_path / "out").open("w"))
    _report.terminal(summarise(tmp_path), console)
    lines = console.export_text().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 100
    assert not any("…" in line for line in lines)
    assert any("firecracker (nested)" in line for line in lines)


@pytest.mark.parametrize(("q", "n"), [(0.9, 64), (0.95, 130), (0.99, 662), (0.999, 6636), (0.9999, 66381)])
def test_samples_needed_as_mlperf_publishes_them(q: float, n: int) -> None:
    assert _stats.samples_needed(q) == n


def test_quantiles_are_values_that_occurred() -> None:
    values = np.arange(1.0, 101.0)
    assert _stats.quantiles(values, [0.5, 0.99, 1.0]) == [50.0, 99.0, 100.0]
    assert _stats.quantiles(np.append(values, [np.inf] * 2), [0.99])[0] == 101.0 or np.isinf(
        _stats.quantiles(np.append(values, [np.inf] * 2), [0.99])[0]
    )


def test_fiellers_interval_covers_the_true_ratio() -> None:
    """By simulation: 95 % of the intervals of paired samples hold the true ratio of means."""
    chance = np.random.default_rng(7)
    held = 0
    for _ in range(2000):
        base = chance.normal(10, 1, 8)
        ours = 1.3 * base + chance.normal(0, 0.5, 8)
        found = _stats.ratio_of_means(ours, base)
        held += found is not None and found.low <= 1.3 <= found.high
    assert 0.93 < held / 2000 < 0.97
