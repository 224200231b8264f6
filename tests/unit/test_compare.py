"""Two runs through their own baselines, and gates: by folders whose truth is known."""

import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from images.errors import NotComparableError, UsageError
from loadtest import _compare, _gate, _plan
from loadtest._schema import Ratio
from loadtest._summary import summarise
from tests.unit.run_folder import make, target

ISOLATENCY = str(Path(sys.executable).parent / "isolatency")


def run(path: Path, b: float = 1.0, *, speed: float = 1.0, seed: int = 1, name: str = "a", **more: object) -> Path:
    """A run of a baseline and b, on a machine that is `speed` times slower."""
    targets = [target(name), target("b", kind="docker")]
    return make(path, targets, factors={name: speed, "b": b * speed}, restarts=6, start_sd=0.003, rounds=3, seed=seed,
                per_block=600, **more)  # type: ignore[arg-type]  # fmt: skip


def test_a_slower_machine_is_no_change_and_a_slower_target_is(tmp_path: Path) -> None:
    old, same, slower = (
        run(tmp_path / "old", 1.1),
        run(tmp_path / "same", 1.1, speed=3, seed=2),
        run(tmp_path / "new", 1.32),
    )
    alike = _compare.compare(old, same).changes["b", "knn", "closed-1"]
    assert (alike.p50.verdict, alike.p99.verdict) == ("no difference seen", "no difference seen")
    changed = _compare.compare(old, slower).changes["b", "knn", "closed-1"]
    assert changed.p50.verdict == "slower" and changed.p50.estimate == pytest.approx(1.2, rel=0.01)
    back = _compare.compare(slower, old).changes["b", "knn", "closed-1"]
    assert back.p50.verdict == "faster" and back.p50.estimate == pytest.approx(1 / changed.p50.estimate)  # type: ignore[operator]


def test_the_interval_of_a_change_holds_what_both_runs_scatter_by(tmp_path: Path) -> None:
    old, new = run(tmp_path / "old"), run(tmp_path / "new", seed=2)
    change = _compare.compare(old, new).changes["b", "knn", "closed-1"].p50
    parts = [summarise(path).cells[1].ratio.p50.log_se or 0 for path in (old, new)]  # type: ignore[union-attr]
    assert change.log_se == pytest.approx((parts[0] ** 2 + parts[1] ** 2) ** 0.5)
    assert change.df is not None and 5 <= change.df <= 10 and change.of == "starts"


def test_what_falls_among_failures_in_one_run_alone_is_a_change(tmp_path: Path) -> None:
    old, new = run(tmp_path / "old"), run(tmp_path / "new", failures={"b": 12}, seed=2)
    change = _compare.compare(old, new).changes["b", "knn", "closed-1"]
    assert (change.p99.infinite, change.p99.verdict, change.p50.verdict) == (1, "slower", "no difference seen")
    back = _compare.compare(new, old).changes["b", "knn", "closed-1"].p99
    assert (back.infinite, back.verdict) == (-1, "faster")
    both = _compare.compare(new, new).changes["b", "knn", "closed-1"].p99
    assert (both.infinite, both.verdict) == (0, "can't tell") and "in both runs" in str(both.reason)
    gate = _gate.parse("b:knn:closed-1:p99>+10%")
    assert [one.code for one in _compare.gates([gate], _compare.compare(old, new))] == [3]


def test_a_run_whose_client_could_not_keep_up_is_no_verdict_on_another(tmp_path: Path) -> None:
    old, new = run(tmp_path / "old"), run(tmp_path / "new", 1.3, seed=2)
    text = (new / "blocks.csv").read_text()
    head, *lines = text.splitlines()
    assert head.endswith(",client_limited") and all(line.endswith(",0") for line in lines)
    (new / "blocks.csv").write_text("\n".join([head, *(line[:-1] + "1" for line in lines)]) + "\n")
    found = _compare.compare(old, new)
    change = found.changes["b", "knn", "closed-1"]
    assert change.p50.verdict == "can't tell" and "client-limited" in str(change.p50.blocked)
    gates = [_gate.parse(f"b:knn:closed-1:{end}") for end in ("p50>+10%", "p50>+90%", "throughput<-50%")]
    assert [one.code for one in _compare.gates(gates, found)] == [5, 5, 5]


def test_iterations_that_each_run_counts_are_no_other_plan(tmp_path: Path) -> None:
    old, new = run(tmp_path / "old"), run(tmp_path / "new", seed=2)

    def counted(path: Path, iterations: int) -> None:
        plan = _plan.read(path / "plan.toml")
        _plan.save(replace(plan, models=("knn", "work"), work_iterations=iterations), path / "plan.toml")

    counted(old, 10_000)
    for iterations, said in ((10_500, []), (13_000, ["work: 10,000 and 13,000 iterations"])):
        counted(new, iterations)
        assert [text for text in _compare.compare(old, new).caveats if text.startswith("work")] == said


def test_no_baseline_in_common_and_another_plan_are_no_comparison(tmp_path: Path) -> None:
    old, other = run(tmp_path / "old"), run(tmp_path / "other", name="c")
    with pytest.raises(NotComparableError, match="the baselines are a and c"):
        _compare.compare(old, other)
    plan = tmp_path / "plan" / "plan.toml"
    run(tmp_path / "plan")
    _plan.save(replace(_plan.read(plan), rows=8, block_s=0.2, seed=9), plan)
    with pytest.raises(NotComparableError, match=r"block_s is 0\.0 and 0\.2; rows is 1 and 8$"):
        _compare.compare(old, tmp_path / "plan")
    make(tmp_path / "shape", [target("a"), target("b", kind="docker", cpus=2)])
    with pytest.raises(NotComparableError, match="b: cpus is 1 and 2"):
        _compare.compare(old, tmp_path / "shape")
    make(tmp_path / "alone", [target("a")])
    with pytest.raises(NotComparableError, match="no target, model and load has a ratio in both"):
        _compare.compare(old, tmp_path / "alone")


def test_another_tree_and_processor_are_caveats_that_strict_refuses(tmp_path: Path) -> None:
    old = run(tmp_path / "old")
    targets = [target("a"), target("b", kind="docker", identity={"tree_sha256": "cd" * 32}, options={"image": "x"})]
    new = make(tmp_path / "new", targets, rounds=4, machine={"cpu_model": "another", "threads": 2, "kernel": "6.1"})
    found = _compare.compare(old, new)
    assert found.caveats == [
        "the processor: CPU and another", "b: the tree is abababababab and cdcdcdcdcdcd",
        "b: its options are {} and {'image': 'x'}",
    ]  # fmt: skip
    assert _compare.grid(found).notes[0].startswith("NOTE: the processor")
    with pytest.raises(NotComparableError, match="strict"):
        _compare.compare(old, new, strict=True)


@pytest.mark.parametrize(
    ("low", "high", "text", "code"),
    [
        (1.11, 1.2, "b:knn:closed-1:p99>+10%", 3), (1.0, 1.09, "b:knn:closed-1:p99>+10%", 0),
        (1.05, 1.15, "b:knn:closed-1:p99>+10%", 5), (0.7, 0.8, "b:knn:closed-1:throughput<-10%", 3),
        (0.95, 1.0, "b:knn:closed-1:throughput<-10%", 0), (0.85, 0.95, "b:knn:closed-1:throughput < -10%", 5),
        (None, None, "b:knn:closed-1:p50>0%", 5),
    ],
)  # fmt: skip
def test_a_gate_goes_by_the_whole_interval(low: float | None, high: float | None, text: str, code: int) -> None:
    found = _gate.check([_gate.parse(text)], lambda gate: Ratio(1.0, low, high, reason="too few"))
    assert [outcome.code for outcome in found] == [code] and _gate.worst(found) == code


def test_exceeded_beats_open_beats_kept() -> None:
    outcomes = {code: _gate.Outcome(code, "") for code in (0, 3, 5)}
    assert _gate.worst([outcomes[0], outcomes[5], outcomes[3]]) == 3
    assert _gate.worst([outcomes[0], outcomes[5]]) == 5 and _gate.worst([outcomes[0]]) == 0 and _gate.worst([]) == 0


def test_a_gate_on_a_figure_that_is_not_there_is_open() -> None:
    assert _gate.check([_gate.parse("x:knn:closed-1:p50>1%")], lambda gate: None)[0].code == 5


@pytest.mark.parametrize(
    "text",
    ["", "docker", "docker:knn:p99>1%", "d:knn:closed-1:p90>1%", "d:knn:closed-1:p99>1", "d:knn:closed-1:p99>-100%"],
)
def test_a_gate_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--fail-if is"):
        _gate.parse(text)


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ISOLATENCY, *map(str, words)], capture_output=True, text=True, timeout=120)


def test_the_commands_tell_and_exit(tmp_path: Path) -> None:
    old, new, other = run(tmp_path / "old"), run(tmp_path / "new", 1.2, seed=2), run(tmp_path / "other", name="c")
    done = command("compare", old, new)
    assert done.returncode == 0, done.stderr
    assert "new against old, each over its own a" in done.stdout and "slower" in done.stdout
    gate = "b:knn:closed-1:p50>+10%"
    both = command("compare", old, new, old, "--fail-if", gate, "--fail-if", "b:dnn:closed-1:p50>+10%")
    assert both.returncode == 3 and "exceeded: b:knn:closed-1:p50>+10%: it is +" in both.stderr
    assert "kept: b:knn" in both.stderr and "can't tell: b:dnn" in both.stderr
    assert command("compare", old, old, "--fail-if", gate).returncode == 0
    assert command("compare", old, new, "--fail-if", "b:dnn:closed-1:p50>+10%").returncode == 5
    refused = command("compare", old, other)
    assert refused.returncode == 4 and "the baselines are a and c" in refused.stderr
    assert command("compare", old, new, "--fail-if", "nonsense").returncode == 2
    assert command("report", new, "--fail-if", gate).returncode == 3
    assert "can't tell" in command("report", new, "--margin", "20%").stdout
    assert command("report", new, "--margin", "much").returncode == 2
