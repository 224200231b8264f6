"""Figures against folders whose truth is known."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

from images.errors import IsolatencyError, UsageError
from loadtest import _samples
from loadtest._plan import Job, read, save
from loadtest._report import markdown
from loadtest._samples import SCHEMA
from loadtest._schema import Ratio
from loadtest._summary import summarise
from tests.unit.run_folder import LATENCY_US, make, target


def test_a_target_that_is_a_tenth_slower_has_the_ratio_1_10(tmp_path: Path) -> None:
    make(tmp_path, [target("a"), target("b")], factors={"b": 1.1})
    a, b = summarise(tmp_path).cells
    assert a.ratio is None
    assert b.ratio is not None and b.ratio.p50 is not None and b.ratio.p99 is not None
    for ratio in (b.ratio.p50, b.ratio.p99):
        assert ratio.estimate == pytest.approx(1.1, rel=1e-4)
        assert ratio.estimate is not None and ratio.low is not None and ratio.high is not None
        assert ratio.low <= ratio.estimate <= ratio.high
        assert ratio.verdict == "slower" and ratio.of == "instances"
    assert a.p50_us is not None and a.p50_us == pytest.approx(LATENCY_US, rel=0.02)
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


@pytest.mark.parametrize("requests", [661, 662])
def test_the_last_sample_that_p99_needs(tmp_path: Path, requests: int) -> None:
    """Two blocks, of which the second was cut short."""
    make(tmp_path, [target("a")], per_block=600, rounds=2)
    samples = pd.read_parquet(tmp_path / "samples.parquet")
    kept = samples[(samples["block"] < 3) | (samples.groupby("block").cumcount() < requests - 600)]
    pq.write_table(pa.Table.from_pandas(kept, preserve_index=False).cast(SCHEMA), tmp_path / "samples.parquet")
    cell = summarise(tmp_path).cells[0]
    assert cell.requests == requests
    if requests < 662:
        assert cell.p99_us is None and cell.samples_needed["p99"] == 662
    else:
        assert cell.p99_us is not None and set(cell.samples_needed) == {"p999"}


def test_failures_count_as_infinitely_slow(tmp_path: Path) -> None:
    make(tmp_path, [target("a"), target("b")], per_block=1000, failures={"b": 30})
    a, b = summarise(tmp_path).cells
    assert a.failures == 0 and a.p99_us is not None
    assert b.failures == 300 and b.failures_by_kind == {"timeout": 300}
    assert b.p90_us is not None and b.p99_us is None and "p99" not in b.samples_needed
    assert a.infinite == [] and b.infinite == ["p99", "p999"]
    assert any("300 of 10000 requests failed" in caveat for caveat in summarise(tmp_path).caveats)


@pytest.mark.parametrize(
    ("load", "told"), [("closed-1", ", which in a closed loop is in no latency"), ("poisson-9", "")]
)
def test_connections_that_ended_are_said(tmp_path: Path, load: str, told: str) -> None:
    make(tmp_path, [target("a")], per_block=100, rounds=4)
    assert summarise(tmp_path).cells[0].caveats == []
    samples, blocks = pd.read_parquet(tmp_path / "samples.parquet"), pd.read_csv(tmp_path / "blocks.csv")
    blocks.loc[~blocks["warmup"], ["reconnects", "gap_ns"]] = 200, 5_000_000
    samples["load"] = blocks["load"] = load
    blocks.to_csv(tmp_path / "blocks.csv", index=False)
    pq.write_table(pa.Table.from_pandas(samples, preserve_index=False), tmp_path / "samples.parquet")
    save(replace(read(tmp_path / "plan.toml"), loads=(load,)), tmp_path / "plan.toml")
    assert summarise(tmp_path).cells[0].caveats == [
        f"a, knn, {load}: connections ended and were opened again 1,200 times, 0.03 s in all{told}"
    ]


def test_a_cell_with_fewer_requests_than_the_plan_wants_says_so(tmp_path: Path) -> None:
    make(tmp_path, [target("a")], per_block=100, rounds=4, restarts=2)
    for wanted, told in ((600, []), (601, ["a, knn, closed-1: 600 requests in a start, where the plan wants 601"])):
        save(replace(read(tmp_path / "plan.toml"), min_requests=wanted), tmp_path / "plan.toml")
        assert [text.partition(" (min")[0] for text in summarise(tmp_path).cells[0].caveats] == told


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
    assert ratio.p50.reason == "fewer than 3 quads"


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
        "batch knn, b: by the host's clock +1.4% against the target's own"
    ]


@pytest.mark.parametrize(("host", "said"), [(1.009, None), (1.011, "+1.1%"), (0.991, None), (0.989, "-1.1%")])
def test_a_clock_is_named_from_a_hundredth_on(tmp_path: Path, host: float, said: str | None) -> None:
    """The worst of all repeats counts, not their mean."""
    make(tmp_path, [target("a")], jobs=[("a", "knn", r, 1.0, 1.0 if r else host, 0.9) for r in range(5)], load=False)
    found = summarise(tmp_path)
    assert found.batch[0].host_clock_difference == pytest.approx(host - 1)
    told = f"batch knn, a: by the host's clock {said} against the target's own"
    assert found.batch[0].caveats == ([told] if said else []) and (told in found.caveats) == bool(said)


def test_accuracy_that_differs_at_equal_scale_is_a_caveat(tmp_path: Path) -> None:
    make(
        tmp_path, [target("a"), target("b")], jobs=[("a", "knn", 0, 1, 1, 0.9), ("b", "knn", 0, 1, 1, 0.8)], load=False
    )
    assert any(
        "accuracy differs at equal scale, so the work did: a 0.9, b 0.8" in caveat
        for caveat in summarise(tmp_path).caveats
    )


def test_accuracy_that_differs_between_repeats_is_no_figure(tmp_path: Path) -> None:
    make(tmp_path, [target("a")], jobs=[("a", "knn", r, 1, 1, 0.9 - r / 10) for r in range(2)], load=False)
    found = summarise(tmp_path)
    assert found.batch[0].accuracy is None
    assert "batch knn: accuracy differs at equal scale, so the work did: a 0.9/0.8" in found.run_caveats


def test_repeats_that_only_one_target_ran_are_in_no_ratio(tmp_path: Path) -> None:
    """The run ended within the third repeat: what is left are two pairs, too few for an interval."""
    make(tmp_path, [target("a"), target("b")], jobs=JOBS[:5], load=False)
    a, b = summarise(tmp_path).batch
    assert (a.n, b.n) == (3, 2) and b.ratio is not None
    assert b.ratio.estimate == pytest.approx(1.2) and b.ratio.low is None
    assert b.ratio.reason == "fewer than 3 repeats"


def test_jobs_of_unlike_scale_have_no_ratio(tmp_path: Path) -> None:
    make(tmp_path, [target("a"), target("b")], jobs=JOBS, load=False)
    rows = pd.read_csv(tmp_path / "batch.csv")
    rows.loc[rows["target"] == "b", "scale"] = "60 rows"
    rows.to_csv(tmp_path / "batch.csv", index=False)
    ratio = summarise(tmp_path).batch[1].ratio
    assert ratio is not None and (ratio.estimate, ratio.reason) == (
        None,
        "the baseline did not run it at this scale",
    )


def test_a_round_that_only_one_target_went_through_is_in_no_ratio(tmp_path: Path) -> None:
    """The run ended within its last round, in which a is slow: b has no block beside it."""
    make(tmp_path, [target("a"), target("b")], factors={"b": 1.5})
    samples, blocks = pd.read_parquet(tmp_path / "samples.parquet"), pd.read_csv(tmp_path / "blocks.csv")
    last = (samples["round"] == 5).to_numpy()
    samples.loc[last, "received_ns"] += 10**6
    samples = samples[~(last & (samples["target"] == "b").to_numpy())]
    pq.write_table(pa.Table.from_pandas(samples, preserve_index=False).cast(SCHEMA), tmp_path / "samples.parquet")
    blocks[~((blocks["round"] == 5) & (blocks["target"] == "b"))].to_csv(tmp_path / "blocks.csv", index=False)
    ratio = summarise(tmp_path).cells[1].ratio
    assert ratio is not None and ratio.p50.estimate == pytest.approx(1.5, rel=1e-4)
    assert ratio.p50.low == pytest.approx(1.5, rel=1e-4)


def test_of_several_dockers_and_firecrackers_the_first_are_compared(tmp_path: Path) -> None:
    names = {"d1": 1.0, "d2": 4.0, "f1": 2.0, "f2": 6.0}
    targets = [target(name, kind="docker" if name[0] == "d" else "firecracker") for name in names]
    make(tmp_path, targets, factors=names)
    direct = summarise(tmp_path).direct
    assert direct is not None and (direct.target, direct.over) == ("f1", "d1")
    assert direct.cells[0].ratio.p50.estimate == pytest.approx(2.0, rel=1e-4)


def test_firecracker_over_docker_where_both_ran_unemulated(tmp_path: Path) -> None:
    targets = [target("p"), target("d", kind="docker"), target("f", kind="firecracker", accel="kvm")]
    jobs = [
        (name, "knn", r, took * (1 + r), took * (1 + r), 0.9)
        for r in range(3)
        for name, took in (("d", 1.0), ("f", 1.1))
    ]
    make(tmp_path, targets, factors={"d": 2.0, "f": 3.0}, jobs=jobs)
    direct = summarise(tmp_path).direct
    assert direct is not None and (direct.target, direct.over) == ("f", "d")
    assert [cell.ratio.p50.estimate for cell in direct.cells] == [pytest.approx(1.5, rel=1e-4)]
    assert [job.job for job in direct.batch] == ["knn"]
    assert direct.batch[0].ratio.estimate == pytest.approx(1.1)
    targets[2] = target("f", kind="firecracker", accel="nested")
    make(tmp_path / "emulated", targets)
    assert summarise(tmp_path / "emulated").direct is None


@pytest.mark.parametrize("name", ["plan.toml", "manifest.json", "targets.json", "samples.parquet", "blocks.csv"])
def test_a_damaged_folder_is_one_line(tmp_path: Path, name: str) -> None:
    make(tmp_path, [target("a")])
    (tmp_path / name).write_bytes(b"\x00torn")
    with pytest.raises(IsolatencyError) as caught:
        summarise(tmp_path)
    assert ("\n" not in str(caught.value).strip() and name.split(".")[0] in str(caught.value)) or str(tmp_path) in str(
        caught.value
    )


@pytest.mark.parametrize("text", ["null", "[]", "3", '{"schema": 1, "versions": 3}', "[" * 100_000, '{"schema": "1"}'])
def test_a_manifest_of_another_form_is_one_line(tmp_path: Path, text: str) -> None:
    make(tmp_path, [target("a")])
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UsageError) as caught:
        summarise(tmp_path)
    assert "\n" not in str(caught.value) and "object has no attribute" not in str(caught.value)


def test_another_schema_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IsolatencyError, match="is no run folder"):
        summarise(tmp_path)
    make(tmp_path, [target("a")], schema=7)
    with pytest.raises(IsolatencyError, match="schema 7, this version reads 1"):
        summarise(tmp_path)


def test_a_ratio_is_never_of_the_better_part_of_the_rounds(tmp_path: Path) -> None:
    """Blocks in which requests failed are the slow ones: without them the ratio would flatter."""
    make(tmp_path, [target("a"), target("b")], per_block=1000, failures={"b": 20})
    ratio = summarise(tmp_path).cells[1].ratio
    assert ratio is not None and ratio.p99.estimate is None and ratio.p99.infinite == 1
    assert ratio.p50.estimate is not None and ratio.throughput.estimate == pytest.approx(0.98)
    make(tmp_path / "small", [target("a"), target("b")], per_block=499)
    ratio = summarise(tmp_path / "small").cells[1].ratio
    assert ratio is not None and ratio.p50.low is not None
    assert ratio.p99.estimate is None and ratio.p99.reason == "blocks hold fewer than 500 requests"


@pytest.mark.parametrize("requests", [400, 99, 0])
def test_one_slow_block_is_no_reason_for_no_p99(tmp_path: Path, requests: int) -> None:
    """It counts as slow, by its rank: of five quads one is trimmed at each end."""
    make(tmp_path, [target("a"), target("b")], per_block=600, factors={"b": 1.2})
    samples = pd.read_parquet(tmp_path / "samples.parquet")
    last = samples["block"].max()
    kept = samples[(samples["block"] != last) | (samples.groupby("block").cumcount() < requests)]
    pq.write_table(pa.Table.from_pandas(kept, preserve_index=False).cast(SCHEMA), tmp_path / "samples.parquet")
    ratio = summarise(tmp_path).cells[1].ratio
    assert ratio is not None and ratio.p50.estimate == pytest.approx(1.2, rel=1e-3)
    assert ratio.p99.estimate == pytest.approx(1.2, rel=1e-3)


def test_many_slow_blocks_are_and_those_in_which_both_are_slow_favour_nobody(tmp_path: Path) -> None:
    make(tmp_path, [target("a"), target("b")], per_block=600, factors={"b": 1.2}, rounds=11)
    samples = pd.read_parquet(tmp_path / "samples.parquet")

    def starved(blocks: set[int]) -> Ratio:
        kept = samples[~samples["block"].isin(blocks) | (samples.groupby("block").cumcount() < 5)]
        pq.write_table(pa.Table.from_pandas(kept, preserve_index=False).cast(SCHEMA), tmp_path / "samples.parquet")
        found = summarise(tmp_path).cells[1].ratio
        assert found is not None
        return found.p50

    # Four blocks make a quad: a, b, b, a.
    assert starved({4, 5, 8, 9}).estimate == pytest.approx(1.2, rel=1e-3)
    assert starved({4, 5, 8, 9, 12, 13}).estimate is None
    assert starved({5, 9}).estimate == pytest.approx(1.2, rel=1e-3)
    assert starved({5, 9, 13}).estimate is None


def test_what_comes_in_the_drain_is_nobodys_throughput(tmp_path: Path) -> None:
    """Latencies of 200 µs, blocks that are made to end after the first of them: the rest came in the drain."""
    make(tmp_path, [target("a")], per_block=500, rounds=4)
    samples = pd.read_parquet(tmp_path / "samples.parquet").set_index("block")["received_ns"]
    blocks = pd.read_csv(tmp_path / "blocks.csv")
    blocks["end_ns"] = samples.groupby("block").quantile(0.25, interpolation="lower").astype("int64").to_numpy()
    blocks.to_csv(tmp_path / "blocks.csv", index=False)
    cell = summarise(tmp_path).cells[0]
    assert cell.requests == 3000 and cell.throughput_rps is not None
    timed = blocks[~blocks["warmup"]]
    assert cell.throughput_rps * (timed["end_ns"] - timed["start_ns"]).sum() / 1e9 == pytest.approx(6 * 125, abs=6)


def test_a_killed_runs_parts_are_read_and_the_rest_is_named(tmp_path: Path) -> None:
    """One phase's file is damaged, its blocks have half a line, and nothing was joined."""
    make(tmp_path, [target("a"), target("b")], jobs=JOBS, partial=True)
    (tmp_path / "samples.parquet").rename(tmp_path / "samples-native.parquet")
    (tmp_path / "blocks.csv").rename(tmp_path / "blocks-native.csv")
    (tmp_path / "samples-qemu.parquet").write_bytes(b"PAR1 and no footer")
    header = (tmp_path / "blocks-native.csv").read_text().splitlines()[0]
    (tmp_path / "blocks-qemu.csv").write_text(f"{header}\n0,0,0,qemu,knn,clos")
    (tmp_path / "batch.csv").write_text((tmp_path / "batch.csv").read_text() + 'a,a,False,dnn,0,0,1000,1,"1000 ro')
    found = summarise(tmp_path)
    assert found.partial and [cell.target for cell in found.cells] == ["a", "b"]
    assert [(row.job, row.n) for row in found.batch] == [("knn", 3), ("knn", 3)]
    text = "\n".join(found.caveats)
    assert "samples-qemu.parquet: could not be read" in text and "samples-native.parquet: was never joined" in text
    assert "blocks-qemu.csv: its last line is torn" in text and "batch.csv: its last line is torn" in text


def test_the_phase_in_which_a_run_was_killed_is_in_the_figures(tmp_path: Path) -> None:
    """Its samples lie in their parts; requests of the block that was under way are in no figure."""
    make(tmp_path, [target("a"), target("b")], jobs=JOBS, partial=True)
    whole = summarise(tmp_path)
    writer = _samples.ParquetWriter(tmp_path / "samples-native.parquet")
    for rows in _samples.read(tmp_path / "samples.parquet"):
        writer.add(rows)
    writer.close(partial=True)
    (tmp_path / "samples.parquet").unlink()
    *lines, _ = (tmp_path / "blocks.csv").read_text().splitlines(keepends=True)
    (tmp_path / "blocks.csv").unlink()
    (tmp_path / "blocks-native.csv").write_text("".join(lines))
    found = summarise(tmp_path)
    assert found.partial and [cell.target for cell in found.cells] == ["a", "b"]
    assert 0 < sum(cell.requests for cell in found.cells) < sum(cell.requests for cell in whole.cells)
    text = "\n".join(found.caveats)
    assert "samples-native.parquet.parts: was cut short" in text
    assert re.search(r"samples: \d+ requests of blocks that did not end are in no figure", text)
    _samples.join(tmp_path)
    assert summarise(tmp_path).cells == found.cells and _samples.is_partial(tmp_path / "samples.parquet")


def test_what_the_plan_wanted_and_did_not_get_is_named(tmp_path: Path) -> None:
    make(tmp_path, [target("a"), target("b")], jobs=JOBS[:3])
    plan = read(tmp_path / "plan.toml")
    wanted = ({"name": "gone", "kind": "docker"}, {"name": "a", "kind": "process"}, {"name": "b", "kind": "process"})
    loads = ("closed-1", "closed-16")
    save(replace(plan, targets=wanted, loads=loads, jobs=(Job("knn", 2, 569),)), tmp_path / "plan.toml")
    found = summarise(tmp_path)
    assert found.partial and found.baseline == "a"
    for text in (
        "gone: was not measured",
        "a: no requests of knn closed-16",
        "batch knn, b: 1 of 2 repeats",
        "ratios are over a: gone, the plan's first target, is emulated or was not measured",
    ):
        assert text in found.run_caveats


def test_requests_of_a_block_that_did_not_end_are_in_no_figure_and_said(tmp_path: Path) -> None:
    make(tmp_path, [target("a")], per_block=100, rounds=4)
    lines = (tmp_path / "blocks.csv").read_text().splitlines(keepends=True)
    (tmp_path / "blocks.csv").write_text("".join(lines[:-1]))
    found = summarise(tmp_path)
    assert found.cells[0].requests == 500 and found.cells[0].host_cpu_us_per_request == pytest.approx(100)
    assert "samples: 100 requests of blocks that did not end are in no figure" in found.caveats


def test_a_run_that_ended_in_its_warm_up_has_no_figure(tmp_path: Path) -> None:
    make(tmp_path, [target("a"), target("b")], rounds=1, partial=True)
    found = summarise(tmp_path)
    assert [(cell.requests, cell.warmup_requests, cell.p50_us, cell.throughput_rps) for cell in found.cells] == [
        (0, 2000, None, None)
    ] * 2
    ratio = found.cells[1].ratio
    assert ratio is not None and ratio.p50.estimate is None and ratio.p50.reason == "no quad that both went through"


def test_an_unknown_cpu_time_gives_no_figure(tmp_path: Path) -> None:
    make(tmp_path, [target("a")], per_block=100, rounds=4)
    blocks = pd.read_csv(tmp_path / "blocks.csv")
    blocks["host_cpu_us"] = blocks["host_cpu_us"].astype("Int64")
    blocks.loc[blocks.index[-1], "host_cpu_us"] = pd.NA
    blocks.to_csv(tmp_path / "blocks.csv", index=False)
    cell = summarise(tmp_path).cells[0]
    assert cell.host_cpu_us_per_request is None and cell.client_cpu_us_per_request == pytest.approx(20)


def test_an_emulated_job_of_another_scale_is_not_held_against_the_others(tmp_path: Path) -> None:
    targets = [target("a"), target("q", kind="qemu", accel="tcg")]
    make(tmp_path, targets, jobs=[("a", "knn", 0, 1, 1, 0.9), ("q", "knn", 0, 9, 9, 0.5)], load=False)
    text = (tmp_path / "batch.csv").read_text()
    (tmp_path / "batch.csv").write_text(text.replace("0,0,569,1,569 rows,9", "0,0,40,1,40 rows,9"))
    found = summarise(tmp_path)
    assert [row.scale for row in found.batch] == ["569 rows", "40 rows"]
    assert found.batch[1].ratio is None and not any("accuracy" in caveat for caveat in found.caveats)


def test_memory_does_not_grow_with_the_samples_read(tmp_path: Path) -> None:
    """3 million requests, far more than are held at a time: what is kept of each is less than 40 bytes."""
    make(tmp_path, [target("a")], per_block=250_000, rounds=7)
    script = f"""
import resource
from pathlib import Path
from loadtest._plan import Job, read, save
from loadtest._report import markdown
from loadtest._samples import SCHEMA
from loadtest._schema import Ratio
from loadtest._summary import summarise
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cell = summarise(Path({str(tmp_path)!r})).cells[0]
print(cell.requests, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    requests, grown_kib = map(int, done.stdout.split())
    assert requests == 3_000_000 and grown_kib * 1024 / requests < 120


def test_cpu_time_that_the_hypervisor_took_is_a_caveat(tmp_path: Path) -> None:
    before, after = {"total_s": 100.0, "stolen_s": 1.0}, {"total_s": 300.0, "stolen_s": 6.0}
    make(tmp_path, [target("a")], rounds=3, cpu_time_before=before, cpu_time_after=after)
    assert any("gave 2.5% of its CPU time to others" in caveat for caveat in summarise(tmp_path).run_caveats)
    make(tmp_path, [target("a")], rounds=3, cpu_time_before=before, cpu_time_after=after | {"stolen_s": 1.5})
    assert not any("CPU time" in caveat for caveat in summarise(tmp_path).run_caveats)


def test_an_offline_block_lasts_until_its_last_answer_and_none_of_it_is_left_out(tmp_path: Path) -> None:
    """All requests of a block start at once, and the block that the client noted ends there."""
    make(tmp_path, [target("a"), target("b")], factors={"b": 2.0}, per_block=600)
    samples, blocks = pd.read_parquet(tmp_path / "samples.parquet"), pd.read_csv(tmp_path / "blocks.csv")
    samples["received_ns"] -= samples["intended_ns"] - samples.groupby("block")["intended_ns"].transform("min")
    samples["intended_ns"] = samples.groupby("block")["intended_ns"].transform("min")
    samples["load"] = blocks["load"] = "offline"
    pq.write_table(pa.Table.from_pandas(samples, preserve_index=False), tmp_path / "samples.parquet")
    blocks["drained_ns"] = blocks["start_ns"] + 300_000_000
    blocks["end_ns"] = blocks["start_ns"]
    blocks.to_csv(tmp_path / "blocks.csv", index=False)
    save(replace(read(tmp_path / "plan.toml"), loads=("offline",)), tmp_path / "plan.toml")
    a, b = summarise(tmp_path).cells
    assert a.throughput_rps == pytest.approx(2000) and b.ratio is not None
    assert b.ratio.p50.estimate == pytest.approx(2.0, rel=1e-3)


def test_peaks_over_starts_by_one_search_and_with_an_open_end(tmp_path: Path) -> None:
    make(tmp_path, [target("a"), target("b"), target("c")])
    lines = [f"{n},a,knn,p99<=5ms,{rate},{rate},{rate * 1.05}," for n, rate in enumerate((900.0, 1000.0, 1100.0))]
    lines += ["0,b,knn,p99<=5ms,500.0,500.0,520.0,", "0,c,knn,p99<=5ms,200.0,200.0,,client-limited at 400/s"]
    head = "restart,target,model,bound,rate_rps,low_rps,high_rps,reason"
    (tmp_path / "peak.csv").write_text("\n".join([head, *lines]) + "\n")
    a, b, c = summarise(tmp_path).peaks
    assert a.rate_rps is not None and a.rate_rps.low is not None and a.rate_rps.high is not None
    assert a.rate_rps.low < 900 < a.rate_rps.estimate < 1100 < a.rate_rps.high  # t over three starts is wide
    assert b.rate_rps is not None and (b.rate_rps.low, b.rate_rps.high) == (500.0, 520.0)
    assert c.rate_rps is not None and c.rate_rps.high is None and c.reason == "client-limited at 400/s"
    assert "client-limited at 400/s" in markdown(summarise(tmp_path))


@pytest.mark.parametrize(("per_block", "length", "judged"), [(499, 5.0, False), (500, 5.0, True), (499, 0.35, False)])
def test_blocks_that_are_too_short_for_a_p99_are_named(
    tmp_path: Path, per_block: int, length: float, judged: bool
) -> None:
    make(tmp_path, [target("a"), target("b")], per_block=per_block, block_s={"knn:closed-1": length})
    told = "knn closed-1: blocks do not hold 500 requests of each target: p99 is described, not judged"
    assert (told in summarise(tmp_path).run_caveats) != judged
    make(tmp_path / "emulated", [target("a"), target("q", kind="qemu", accel="tcg")], per_block=600, failures={})
    assert not any(text.startswith("blocks: ") for text in summarise(tmp_path / "emulated").run_caveats)
