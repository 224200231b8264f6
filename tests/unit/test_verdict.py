"""Starts and verdicts, against folders and draws whose truth is known."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from images.errors import UsageError
from loadtest import _compare, _gate, _stats, _verdict
from loadtest._folder import LATER
from loadtest._report import markdown
from loadtest._samples import SCHEMA
from loadtest._schema import Ratio, Ratios
from loadtest._summary import summarise
from loadtest._verdict import Margins, judge
from tests.unit.run_folder import make, target


def ratio(estimate: float, half: float, n: int = 10) -> Ratio:
    """A ratio with an interval of ± `half`, a share, over `n` starts."""
    se = math.log1p(half) / float(_stats.stats.t.ppf(0.975, n - 1))
    ends = _stats.interval(_stats.Location(math.log(estimate), se, n - 1))
    return Ratio(*(math.exp(value) for value in ends), of="starts", n=n, log_se=se, df=n - 1)


def verdicts(*cells: tuple[Ratio, Ratio]) -> list[str | None]:
    found = judge([(Ratios(p50, p99, Ratio(1.0)), True) for p50, p99 in cells], Margins(0.02, 0.05))
    return [one.verdict for ratios in found for one in (ratios.p50, ratios.p99)]


@pytest.mark.parametrize(
    ("estimate", "half", "said"),
    [
        (1.10, 0.01, "slower"), (0.90, 0.01, "faster"), (1.00, 0.01, "no difference seen"), (1.00, 0.03, "can't tell"),
        (1.015, 0.01, "can't tell"),  # certainly a difference, perhaps one that matters
        (1.01, 0.005, "no difference seen"),  # a difference, none that matters
        (1.04, 0.05, "can't tell"), (1.021, 0.03, "can't tell"),
    ],
)  # fmt: skip
def test_a_verdict_needs_the_interval_and_the_margin(estimate: float, half: float, said: str) -> None:
    assert verdicts((ratio(estimate, half), ratio(1.0, 0.001)))[0] == said


def test_the_tests_of_a_target_share_the_error_rate() -> None:
    """3 % with an interval that just leaves 1 out: enough alone, not as one of four."""
    edge, open_ = ratio(1.03, 0.028), ratio(1.0, 0.2)
    alone = judge([(Ratios(edge, Ratio(None, reason="none"), Ratio(1.0)), True)], Margins())[0].p50
    assert alone.verdict == "slower" and alone.p_holm == alone.p_value
    among = judge([(Ratios(edge, open_, Ratio(1.0)), True), (Ratios(open_, open_, Ratio(1.0)), True)], Margins())[0].p50
    assert (
        among.verdict == "can't tell" and among.p_value is not None and among.p_holm == pytest.approx(4 * among.p_value)
    )


def test_only_primary_cells_are_judged_and_all_say_how_large_a_difference_could_be() -> None:
    found = judge([(Ratios(ratio(1.1, 0.01), ratio(1.0, 0.04), ratio(0.95, 0.01)), False)], Margins())[0]
    assert found.p50.verdict is None and found.p99.verdict is None
    assert found.p50.could_be == "no more than +11 %"
    assert found.p99.could_be == "no more than 4.0 % either way"
    assert found.throughput.could_be == "no more than −5.9 %"


def test_as_many_starts_as_are_said_would_tell() -> None:
    seen = judge([(Ratios(ratio(1.03, 0.04), ratio(1.0, 0.2), Ratio(1.0)), True)], Margins())[0].p50
    assert seen.verdict == "can't tell" and seen.starts_needed is not None and seen.log_se is not None
    sd = seen.log_se * math.sqrt(seen.n)
    level = 1 - 0.05 / 2  # two tests
    half = float(_stats.stats.t.ppf((1 + level) / 2, seen.starts_needed - 1)) * sd / math.sqrt(seen.starts_needed)
    assert half < math.log(1.03) < half * 1.2
    near = judge([(Ratios(ratio(1.0195, 0.04), ratio(1.0, 0.2), Ratio(1.0)), True)], Margins())[0].p50
    assert near.starts_needed is None and "too near the margin" in _verdict.in_words(near)


def test_no_figure_is_no_verdict_but_says_why() -> None:
    none = Ratio(None, reason="blocks hold fewer than 500 requests")
    found = judge([(Ratios(ratio(1.0, 0.01), none, none), True)], Margins())[0].p99
    assert (
        found.verdict == "can't tell" and _verdict.in_words(found) == "can't tell: blocks hold fewer than 500 requests"
    )


def test_the_interval_is_over_starts_and_holds_what_they_differ_by(tmp_path: Path) -> None:
    """One start of each is 3 % off; its own blocks say so to a hundredth of that. Ten starts say that it is nothing."""
    make(tmp_path / "one", [target("a"), target("b")], factors={"b": 1.03})
    one = summarise(tmp_path / "one").cells[1].ratio
    assert one is not None and one.p50.of == "instances" and one.p50.low is not None and one.p50.low > 1.029
    make(tmp_path / "ten", [target("a"), target("b")], restarts=10, start_sd=0.02, rounds=4, per_block=600)
    summary = summarise(tmp_path / "ten")
    ten = summary.cells[1].ratio
    assert summary.restarts == 10 and ten is not None and (ten.p50.of, ten.p50.n) == ("starts", 10)
    assert ten.p50.low is not None and ten.p50.high is not None and ten.p50.low < 1 < ten.p50.high
    logs = np.log(ten.p50.per_start)
    assert 0.015 < np.std(logs, ddof=1) < 0.05
    assert tuple(np.log([ten.p50.low, ten.p50.high])) == pytest.approx(_stats.interval(_stats.location(logs))[1:])


def test_what_is_added_in_microseconds_goes_with_the_ratio(tmp_path: Path) -> None:
    make(tmp_path, [target("a"), target("b")], factors={"b": 1.1}, restarts=4, rounds=3, per_block=600)
    cells = summarise(tmp_path).cells
    base, ratio_ = cells[0].typical_p50_us, cells[1].ratio
    assert base is not None and ratio_ is not None and ratio_.p50.added_us is not None
    assert ratio_.p50.added_us.estimate == pytest.approx(0.1 * base.estimate, rel=1e-3)
    assert base.low is not None and base.high is not None and base.low < base.estimate < base.high


def test_false_alarms_are_as_rare_as_said() -> None:
    """A/A with starts that differ by 1 %: with five per cent for both quantiles of a target, whatever the blocks say."""
    chance = np.random.default_rng(3)
    called = 0
    for _ in range(3000):
        pair = []
        for _ in range(2):
            at = _stats.location(chance.normal(0, 0.014, 10))
            ends = [math.exp(value) for value in _stats.interval(at)]
            pair.append(Ratio(*ends, of="starts", n=10, log_se=at.se, df=at.df))
        found = judge([(Ratios(pair[0], pair[1], Ratio(1.0)), True)], Margins(0.0001, 0.0001))[0]
        called += any(one.verdict in ("slower", "faster") for one in (found.p50, found.p99))
    assert 0.04 < called / 3000 < 0.06


@pytest.mark.parametrize(("text", "wanted"), [("2%", (0.02, 0.02)), ("1%,7.5%", (0.01, 0.075)), ("3", (0.03, 0.03))])
def test_margins(text: str, wanted: tuple[float, float]) -> None:
    assert _verdict.margins(text) == pytest.approx(wanted)


@pytest.mark.parametrize("text", ["", "much", "0%", "-2%", "1%,2%,3%", "100%", "nan%"])
def test_margins_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="wanted a share"):
        _verdict.margins(text)


def test_another_margin_makes_another_verdict(tmp_path: Path) -> None:
    make(tmp_path, [target("a"), target("b")], factors={"b": 1.03}, restarts=4, rounds=3, per_block=600)
    assert [summarise(tmp_path, margin=text).cells[1].ratio.p50.verdict for text in ("2%", "4%")] == [  # type: ignore[union-attr]
        "slower", "no difference seen",
    ]  # fmt: skip


def test_the_answer_says_it_in_words(tmp_path: Path) -> None:
    targets = [target("process"), target("fast", kind="docker"), target("firecracker", kind="firecracker", accel="kvm")]
    make(tmp_path, targets, factors={"fast": 0.9, "firecracker": 1.385}, restarts=4, rounds=3, per_block=600)
    docker, firecracker, direct = summarise(tmp_path).answer
    assert docker.startswith(
        "In a Docker container (fast), a KNN request at closed-1 takes 20 µs less than process at p50 (−10 %"
    )
    assert "longer than process at p50 (+39 %, 95 % interval +38 to +39 %): slower;" in firecracker
    assert firecracker.startswith("In a Firecracker microVM, ") and "instances" not in firecracker
    assert "longer than fast at p50 (+54 %" in direct


def test_an_answer_of_one_start_says_so_and_no_answer_says_why(tmp_path: Path) -> None:
    make(tmp_path / "one", [target("a"), target("b")])
    assert summarise(tmp_path / "one").answer[0].endswith("All of these instances only.")
    make(tmp_path / "alone", [target("a"), target("q", kind="qemu", accel="tcg")])
    assert summarise(tmp_path / "alone").answer == [
        "Nothing was compared: fewer than two targets that are not emulated were measured."
    ]


def test_stalls_are_said_where_the_pooled_p99_is_not_the_typical_one(tmp_path: Path) -> None:
    """In two of ten blocks an eighth of the requests is held up: the typical p99 is not, the pooled one is."""
    make(tmp_path, [target("a")], rounds=11, per_block=1000)
    samples = pd.read_parquet(tmp_path / "samples.parquet")
    samples.loc[samples["block"].isin([6, 15]) & (samples.index % 8 == 0), "received_ns"] += 50_000_000
    pq.write_table(pa.Table.from_pandas(samples, preserve_index=False).cast(SCHEMA), tmp_path / "samples.parquet")
    cell = summarise(tmp_path).cells[0]
    assert cell.p99_us is not None and cell.p99_us > 50_000
    assert cell.typical_p99_us is not None and cell.typical_p99_us.estimate < 500
    assert len(cell.caveats) == 1 and "there are stalls" in cell.caveats[0] and "in 10% of the time" in cell.caveats[0]


def test_what_starts_cost_is_a_median_with_an_interval_and_a_ratio(tmp_path: Path) -> None:
    def starts(times: float) -> list[dict[str, float]]:
        return [
            {"restart": n, "ready_s": times * (1 + n / 10), "first_prediction_ms": times * (2 + n)} for n in range(8)
        ]

    make(tmp_path, [target("a", starts=starts(1.0)), target("b", starts=starts(3.0))])
    a, b = summarise(tmp_path).starts
    assert (a.n, a.ready_ratio) == (8, None) and b.ready_ratio is not None and b.first_prediction_ratio is not None
    assert a.ready_s.estimate == pytest.approx(1.35) and (a.ready_s.low, a.ready_s.high) == pytest.approx((1.0, 1.7))
    assert b.ready_ratio.estimate == pytest.approx(3.0) and b.first_prediction_ratio.estimate == pytest.approx(3.0)


def test_a_client_that_could_not_keep_up_gives_no_verdict(tmp_path: Path) -> None:
    make(tmp_path, [target("a"), target("b")], factors={"b": 1.5}, restarts=3, rounds=3, per_block=600)
    blocks = pd.read_csv(tmp_path / "blocks.csv", keep_default_na=False)
    for name in LATER:
        blocks[name] = 0
    blocks["arrivals"], blocks["late_p50_ns"], blocks["late_p99_ns"] = 100, 20_000, 90_000
    blocks.to_csv(tmp_path / "blocks.csv", index=False)
    fine = summarise(tmp_path).cells[1]
    assert fine.ratio is not None and fine.ratio.p50.verdict == "slower"
    assert fine.lateness is not None and (fine.lateness.p50_us, fine.lateness.p99_us) == (20, 90)
    blocks["client_limited"] = (blocks["target"] == "a").astype(int)
    blocks.to_csv(tmp_path / "blocks.csv", index=False)
    a, b = summarise(tmp_path).cells
    assert (
        b.ratio is not None
        and b.ratio.p50.verdict == "can't tell"
        and b.ratio.p50.estimate == pytest.approx(1.5, rel=1e-3)
    )
    assert "client-limited" in str(b.ratio.p50.reason) and "client-limited in 100% of its blocks" in a.caveats[0]


def test_a_ratio_that_changes_within_every_start_is_no_steady_state(tmp_path: Path) -> None:
    """b settles late: in each start it is a tenth faster in the last third, which is too late for a warm-up."""
    make(tmp_path, [target("a"), target("b")], restarts=5, rounds=7, per_block=600, start_sd=0.003)
    assert summarise(tmp_path).cells[1].ratio.p50.verdict == "no difference seen"  # type: ignore[union-attr]
    samples = pd.read_parquet(tmp_path / "samples.parquet")
    slow = (samples["target"] == "b") & (samples["round"] < 10)
    samples.loc[slow, "received_ns"] += 20_000
    pq.write_table(pa.Table.from_pandas(samples, preserve_index=False), tmp_path / "samples.parquet")
    ratio = summarise(tmp_path).cells[1].ratio
    assert ratio is not None and ratio.p50.verdict == "can't tell"
    assert "no steady state: within a start it goes by −" in str(ratio.p50.reason)


def gated(run: Path, *ends: str, baseline: str | None = None) -> list[int]:
    """The outcomes of gates on p99 (or what else `ends` name) of the target that is not the baseline."""
    summary = summarise(run, baseline)
    name = "a" if baseline == "b" else "b"
    return [
        outcome.code
        for outcome in _compare.of_run([_gate.parse(f"{name}:knn:closed-1:{end}") for end in ends], summary)
    ]


def test_what_falls_among_failures_in_every_start_is_slower_and_beyond_every_limit(tmp_path: Path) -> None:
    make(tmp_path, [target("a"), target("b")], failures={"b": 20}, restarts=3, rounds=3, per_block=1000)
    summary = summarise(tmp_path)
    ratio = summary.cells[1].ratio
    assert ratio is not None and (ratio.p99.estimate, ratio.p99.infinite, ratio.p99.verdict) == (None, 1, "slower")
    assert ratio.p50.verdict == "no difference seen" and ratio.p99.of == "starts"
    assert "falls among failed requests at p99: slower" in summary.answer[0] and "instances" not in summary.answer[0]
    assert "| b over a | slower | ∞ | – |" in markdown(summary)
    assert gated(tmp_path, "p99>+10%", "p99<-10%", "p50>+10%") == [3, 0, 0]
    turned = summarise(tmp_path, "b").cells[0].ratio
    assert turned is not None and (turned.p99.infinite, turned.p99.verdict) == (-1, "faster")
    assert gated(tmp_path, "p99>+10%", "p99<-10%", baseline="b") == [0, 3]


def test_what_falls_among_failures_in_one_start_of_three_is_open(tmp_path: Path) -> None:
    make(tmp_path, [target("a"), target("b")], failures={"b": 20}, restarts=3, rounds=3, per_block=1000)
    samples = pd.read_parquet(tmp_path / "samples.parquet")
    kept = samples[(samples["restart"] == 0) | (samples["outcome"] == "ok")]
    pq.write_table(pa.Table.from_pandas(kept, preserve_index=False), tmp_path / "samples.parquet")
    ratio = summarise(tmp_path).cells[1].ratio
    assert ratio is not None and (ratio.p99.infinite, ratio.p99.verdict) == (0, "can't tell")
    assert gated(tmp_path, "p99>+10%") == [5]


def test_no_gate_rests_on_a_client_that_could_not_keep_up(tmp_path: Path) -> None:
    make(tmp_path, [target("a"), target("b")], factors={"b": 1.5}, restarts=3, rounds=3, per_block=600)
    assert gated(tmp_path, "p50>+10%", "p50>+90%", "throughput<-10%") == [3, 0, 0]
    blocks = pd.read_csv(tmp_path / "blocks.csv", keep_default_na=False)
    blocks["client_limited"] = 1
    blocks.to_csv(tmp_path / "blocks.csv", index=False)
    assert gated(tmp_path, "p50>+10%", "p50>+90%", "throughput<-10%") == [5, 5, 5]
    assert "no verdict and no gate rests on some of these: client-limited" in markdown(summarise(tmp_path))


def test_a_server_that_cannot_be_started_again_is_judged_as_this_instance(tmp_path: Path) -> None:
    starts = [{"restart": n, "ready_s": 1.0, "first_prediction_ms": 2.0} for n in range(4)]
    targets = [target("a", starts=starts), target("shop", kind="url", starts=starts), target("b", starts=starts)]
    make(tmp_path, targets, factors={"shop": 1.5}, restarts=4, rounds=3, per_block=600)
    summary = summarise(tmp_path)
    shop, b = (cell.ratio for cell in summary.cells[1:])
    assert shop is not None and b is not None and (shop.p50.of, b.p50.of) == ("instances", "starts")
    assert shop.p50.verdict == "slower" and shop.p50.low is not None
    told = {sentence.split(",")[0]: sentence.endswith("All of these instances only.") for sentence in summary.answer}
    assert told == {"On the given server (shop)": True, "As a process on the host (b)": False}
    assert [row.target for row in summary.starts] == ["a", "b"]
    assert "A server given by URL is one instance" in markdown(summary)
    assert summarise(tmp_path, "shop").cells[2].ratio.p50.of == "instances"  # type: ignore[union-attr]


def test_a_target_that_is_compared_with_two_others_has_one_error_rate(tmp_path: Path) -> None:
    """Firecracker over the process and over docker: four tests. Where docker is the baseline it is one comparison."""
    targets = [target("process"), target("docker", kind="docker"), target("firecracker", kind="firecracker")]
    make(tmp_path, targets, restarts=6, start_sd=0.02, rounds=3, per_block=600)
    summary = summarise(tmp_path)
    assert summary.direct is not None
    over = [cell.ratio for cell in summary.cells if cell.target == "firecracker"] + [summary.direct.cells[0].ratio]
    every = [one for ratios in over if ratios is not None for one in (ratios.p50, ratios.p99)]
    assert len(every) == 4
    wanted = _stats.holm([one.p_value for one in every if one.p_value is not None])
    assert [one.p_holm for one in every] == pytest.approx(wanted)
    docker = summarise(tmp_path, "docker")
    (alone,) = (cell.ratio for cell in docker.cells if cell.target == "firecracker")
    assert alone is not None and alone.p50.p_value is not None and alone.p99.p_value is not None
    assert [alone.p50.p_holm, alone.p99.p_holm] == pytest.approx(_stats.holm([alone.p50.p_value, alone.p99.p_value]))
