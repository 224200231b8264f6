"""Where the time goes, and the price of isolation, of folders whose truth is known."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loadtest._schema import Stages
from loadtest._summary import summarise
from tests.unit.run_folder import make, target, with_stages

SERVER = {
    "null": {"read": 10.0, "parse": 5.0, "serialise": 15.0},
    "work": {"read": 10.0, "parse": 5.0, "compute": 60.0, "serialise": 15.0},
    "knn": {"read": 12.0, "parse": 8.0, "queue": 2.0, "batch": 1.0, "compute": 100.0, "serialise": 17.0},
    "dnn": {"read": 12.0, "parse": 8.0, "compute": 300.0, "serialise": 17.0},
}


def parts(one: Stages) -> dict[str, float]:
    return {part.name: part.us.estimate for part in one.parts}


def test_the_parts_are_those_put_in_and_sum_to_the_total(tmp_path: Path) -> None:
    with_stages(make(tmp_path, [target("a"), target("b")], factors={"b": 1.5}), SERVER)
    found = summarise(tmp_path).stages
    assert [(one.target, one.band) for one in found] == [("a", "p50"), ("a", "p99"), ("b", "p50"), ("b", "p99")]
    for one in found:
        got = parts(one)
        assert sum(got.values()) == pytest.approx(one.total_us.estimate, abs=1e-6)
        assert {name: got[name] for name in SERVER["knn"]} == pytest.approx(SERVER["knn"])
        assert got["client_receive"] == pytest.approx(5.0) and got["client_queue"] == 0 and got["server_rest"] == 0
    cells = {cell.target: cell for cell in summarise(tmp_path).cells}
    assert found[0].total_us.estimate == pytest.approx(cells["a"].p50_us, rel=0.01)  # type: ignore[arg-type]
    assert found[3].total_us.estimate == pytest.approx(cells["b"].p99_us, rel=0.03)  # type: ignore[arg-type]
    assert found[0].requests == pytest.approx(0.02 * 10_000, rel=0.1)


def test_time_before_it_is_sent_is_the_clients(tmp_path: Path) -> None:
    with_stages(make(tmp_path, [target("a")]), SERVER)
    samples = pd.read_parquet(tmp_path / "samples.parquet")
    samples["intended_ns"] -= 40_000
    pq.write_table(pa.Table.from_pandas(samples, preserve_index=False), tmp_path / "samples.parquet")
    summary = summarise(tmp_path)
    assert parts(summary.stages[0])["client_queue"] == pytest.approx(40.0)
    assert summary.cells[0].p50_us == pytest.approx(240, rel=0.02)


def test_what_is_not_known_is_left_out_and_falls_to_the_residual(tmp_path: Path) -> None:
    """One server of ours, one unknown; no stamps for either."""
    make(tmp_path, [target("a"), target("shop", kind="url", identity=None)])
    with_stages(tmp_path, SERVER, server=["a"])
    samples = pd.read_parquet(tmp_path / "samples.parquet")
    samples["first_byte_ns"] = pd.Series(pd.NA, index=samples.index, dtype="Int64")
    pq.write_table(pa.Table.from_pandas(samples, preserve_index=False), tmp_path / "samples.parquet")
    a, _ = (one for one in summarise(tmp_path).stages if one.target == "a")
    assert "client_receive" not in parts(a) and parts(a)["residual"] == pytest.approx(
        a.total_us.estimate - 140, abs=0.1
    )
    assert sum(parts(a).values()) == pytest.approx(a.total_us.estimate)
    shop, _ = (one for one in summarise(tmp_path).stages if one.target == "shop")
    assert parts(shop) == pytest.approx({"client_queue": 0.0, "residual": shop.total_us.estimate})


def test_where_requests_have_unlike_parts_those_that_are_most_count(tmp_path: Path) -> None:
    """Every fourth stamp is lost, and every fifth answer does not tell its stages: 12 in 20 have both."""
    make(tmp_path, [target("a")], models=("null", "knn"), restarts=3, rounds=3, per_block=600)
    with_stages(tmp_path, SERVER, residual_us={"a": 50.0})
    samples = pd.read_parquet(tmp_path / "samples.parquet")
    samples.loc[samples.index % 4 == 0, "first_byte_ns"] = pd.NA
    stated = [name for name in samples.columns if name.startswith("server_")]
    samples.loc[samples.index % 5 == 0, stated] = pd.NA
    # Their latencies differ, so that a mean of one part over other requests than those of the total would show.
    samples["received_ns"] += (samples.index % 4 == 0) * 3
    pq.write_table(pa.Table.from_pandas(samples, preserve_index=False), tmp_path / "samples.parquet")
    summary = summarise(tmp_path)
    (knn,) = (one for one in summary.stages if (one.model, one.band) == ("knn", "p50"))
    assert sum(parts(knn).values()) == pytest.approx(knn.total_us.estimate, abs=1e-6)
    assert {name: parts(knn)[name] for name in SERVER["knn"]} == pytest.approx(SERVER["knn"])
    assert parts(knn)["client_receive"] == pytest.approx(5.0) and parts(knn)["residual"] == pytest.approx(50.0)
    answered = sum(cell.requests for cell in summary.cells if cell.model == "knn")
    assert 0 < knn.requests < answered
    assert summary.stage_caveats == []


def test_a_folder_without_stages_has_none(tmp_path: Path) -> None:
    make(tmp_path, [target("a")])
    summary = summarise(tmp_path)
    assert summary.stages == [] and summary.prices == []


def test_a_server_that_says_more_than_the_client_saw_is_named(tmp_path: Path) -> None:
    with_stages(make(tmp_path, [target("a")]), {"knn": {"compute": 190.0}})
    assert any("by the server's clock" in text and "a, knn, closed-1 (" in text for text in summarise(tmp_path).caveats)
    with_stages(make(tmp_path / "b", [target("a")]), {"knn": {"compute": 20.0}})
    assert summarise(tmp_path / "b").stage_caveats == []


def test_a_client_that_is_much_of_p50_is_a_caveat(tmp_path: Path) -> None:
    with_stages(make(tmp_path, [target("a")]), SERVER, kernel_us=60.0)
    assert any(
        "own share is above 20%" in text and "a, knn, closed-1 (30%)" in text for text in summarise(tmp_path).caveats
    )


def test_a_residual_that_depends_on_the_model_is_said(tmp_path: Path) -> None:
    make(tmp_path, [target("a")], models=("null", "knn"), restarts=4, rounds=3, per_block=600)
    with_stages(tmp_path, SERVER, residual_us={"a": 50.0})
    assert summarise(tmp_path).stage_caveats == []
    samples = pd.read_parquet(tmp_path / "samples.parquet")
    samples.loc[samples["model"] == "knn", ["received_ns", "first_byte_ns"]] += 9_000
    pq.write_table(pa.Table.from_pandas(samples, preserve_index=False), tmp_path / "samples.parquet")
    (caveat,) = summarise(tmp_path).stage_caveats
    assert "does not meet that of null, in µs: a, knn (59.0 and 50.0)" in caveat


@pytest.mark.parametrize("stages", [True, False])
def test_the_price_is_the_line_put_in_and_predicts_the_dnn(tmp_path: Path, stages: bool) -> None:
    """Every request pays 40 µs, and compute takes a tenth longer; the truth is in each start with its own error."""
    models = ("null", "work", "knn", "dnn")
    make(tmp_path, [target("a"), target("b")], models=models, restarts=6, rounds=3, per_block=500)
    with_stages(tmp_path, SERVER, residual_us={"a": 50.0, "b": 50.0})
    chance = np.random.default_rng(2)
    samples = pd.read_parquet(tmp_path / "samples.parquet")
    compute = samples["model"].map({model: of.get("compute", 0.0) for model, of in SERVER.items()}).astype(float)
    noise = samples["restart"].map(dict(enumerate(chance.normal(0, 1.0, 6))))
    extra = ((40 + 0.1 * compute + noise) * 1e3).where(samples["target"] == "b", 0.0).round().astype("int64")
    samples["received_ns"] += extra
    if not stages:
        samples = samples[[name for name in samples.columns if not name.startswith("server_")]]
    pq.write_table(pa.Table.from_pandas(samples, preserve_index=False), tmp_path / "samples.parquet")
    (price,) = summarise(tmp_path).prices
    assert price.fitted == ["null", "work", "knn"] and price.predicted == "dnn"
    assert price.per_request_us.low is not None and price.per_request_us.high is not None
    assert price.per_request_us.low < 40 < price.per_request_us.high
    # Without stages, compute is what a model takes longer than null, parsing included: b is a little less.
    assert price.per_compute.estimate == pytest.approx(0.1, abs=0.0001 if stages else 0.01)
    assert price.predicted_us is not None and price.error_us is not None and price.error_us.low is not None
    assert price.predicted_us.estimate == pytest.approx(70, abs=1.5 if stages else 3.0)
    assert price.error_us.estimate == pytest.approx(0, abs=0.05 if stages else 3.0)
    assert ("stage compute" in price.compute_source) == stages


def test_a_line_that_fails_says_by_how_much(tmp_path: Path) -> None:
    models = ("null", "work", "knn", "dnn")
    make(tmp_path, [target("a"), target("b")], models=models, restarts=4, rounds=3, per_block=500)
    with_stages(tmp_path, SERVER, residual_us={"a": 50.0, "b": 90.0})
    samples = pd.read_parquet(tmp_path / "samples.parquet")
    samples.loc[(samples["target"] == "b") & (samples["model"] == "dnn"), "received_ns"] += 25_000
    pq.write_table(pa.Table.from_pandas(samples, preserve_index=False), tmp_path / "samples.parquet")
    (price,) = summarise(tmp_path).prices
    assert price.error_us is not None and price.error_us.estimate == pytest.approx(-25.0, abs=0.1)


def test_one_model_makes_no_line(tmp_path: Path) -> None:
    with_stages(make(tmp_path, [target("a"), target("b")], models=("knn", "dnn")), SERVER)
    assert summarise(tmp_path).prices == []


def test_by_the_kernels_stamps_the_clients_share_is_in_no_ratio(tmp_path: Path) -> None:
    """The client takes 30 µs of each answer: 200 and 250 µs look like 230 and 280 to it."""
    make(tmp_path, [target("a"), target("b")], factors={"b": 1.25}, restarts=3, rounds=3, per_block=600)
    assert summarise(tmp_path).cells[1].ratio.p50_kernel is None  # type: ignore[union-attr]
    with_stages(tmp_path, SERVER, kernel_us=0.0)
    samples = pd.read_parquet(tmp_path / "samples.parquet")
    samples["received_ns"] += 30_000
    pq.write_table(pa.Table.from_pandas(samples, preserve_index=False), tmp_path / "samples.parquet")
    ratio = summarise(tmp_path).cells[1].ratio
    assert ratio is not None and ratio.p50_kernel is not None and ratio.p99_kernel is not None
    assert ratio.p50_kernel.estimate == pytest.approx(1.25, rel=1e-3) and ratio.p99_kernel.estimate == pytest.approx(
        1.25, rel=1e-3
    )
    assert ratio.p50.estimate == pytest.approx(280 / 230, rel=0.01)
    for every, there in ((200, True), (50, False)):  # of a few lost stamps the others still tell
        samples.loc[samples.index % every == 0, "first_byte_ns"] = pd.NA
        pq.write_table(pa.Table.from_pandas(samples, preserve_index=False), tmp_path / "samples.parquet")
        found = summarise(tmp_path).cells[1].ratio
        assert found is not None and (found.p50_kernel is not None) == there
        if there:
            assert found.p50_kernel.estimate == pytest.approx(1.25, rel=1e-3)  # type: ignore[union-attr]
