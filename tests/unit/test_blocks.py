"""The table on lengths of blocks, from folders of known ratio: runs that differ are told from those that do not."""

from pathlib import Path

from loadtest._schema import Ratio, Summary
from loadtest._summary import summarise
from tests.bench import blocks
from tests.unit.run_folder import make, target


def measured(out: Path, factor: float, seed: int, *, per_block: int = 520) -> Summary:
    make(out, [target("a"), target("b")], factors={"b": factor}, models=("knn", "spin"), restarts=4, start_sd=0.01, rounds=3,
         per_block=per_block, seed=seed, load_before=[0.5, 0, 0])  # fmt: skip
    return summarise(out)


def test_what_agrees_what_differs_and_what_has_no_figure(tmp_path: Path) -> None:
    found = {
        "0.2 s": measured(tmp_path / "1", 1.05, 1),
        "1 s": measured(tmp_path / "2", 1.05, 2),
        "5 s": measured(tmp_path / "3", 1.25, 3),
        "few": measured(tmp_path / "4", 1.05, 4, per_block=100),
    }
    rows = blocks.rows(found)
    assert [row[0] for row in rows[::4]] == ["knn, p50", "knn, p99", "spin, p50", "spin, p99"]
    assert [row[5] for row in rows] == [
        "", "agrees", "**differs**", "agrees", "", "agrees", "**differs**", "no interval",
    ] * 2  # fmt: skip
    assert rows[7][2:5] == ("– (blocks hold fewer than 500 requests)", "–", "–")
    low, _, high = rows[2][3].partition(" (")[2].removesuffix(")").partition(" to ")
    assert float(low) < 50 < float(high)  # a quarter of 200 µs
    told = blocks.text(found)
    assert "4 starts each; load average before a run 0.5 to 0.5" in told and "| model | blocks |" in told


def test_one_over_the_other_has_welchs_interval() -> None:
    one = Ratio(1.02, log_se=0.01, df=3)
    assert blocks.against(one, one) == ("0.0 % (−3.4 to +3.5 %)", "agrees")
    assert blocks.against(Ratio(1.12, log_se=0.01, df=3), one)[1] == "**differs**"
    assert blocks.against(Ratio(1.12), one) == ("–", "no interval")
