"""What a run decides before anything starts."""

from pathlib import Path

import pytest

from hostsetup.target import Option
from images.errors import UsageError
from loadtest import _keep, _plan, _run
from loadtest._plan import Machine, Plan
from loadtest._summary import summarise
from tests.unit.run_folder import make, target


def plan(*kinds: str, **settings: object) -> Plan:
    targets: list[dict[str, Option]] = [_plan.parse_target(kind) for kind in kinds]
    return Plan(targets=tuple(targets), **settings)  # type: ignore[arg-type]


def test_a_time_is_said_in_whole_numbers() -> None:
    said = {3.0: "10 seconds", 44.0: "40 seconds", 89.0: "90 seconds", 90.0: "2 minutes", 1240.0: "21 minutes"}
    assert {seconds: _run.about(seconds) for seconds in said} == {s: f"about {words}" for s, words in said.items()}


def test_no_target_can_have_the_name_of_the_phase_of_all_that_are_not_emulated() -> None:
    for name in ("native", "_native"):
        wanted = plan("process", f"{name}=qemu")
        try:
            _plan.validate(wanted, Machine((0, 1), 4096))
        except UsageError:
            continue
        names = [phase.name for phase in _run.phases(wanted, kvm_boots=False)]
        assert len(set(names)) == len(names) == 2
    with pytest.raises(UsageError, match="target name"):
        _plan.validate(plan(f"{_run.NATIVE}=process"), Machine((0,), 4096))


def test_a_flag_of_zero_is_a_flag() -> None:
    chosen = _keep.choose(plan("process", seed=7), (), {"seed": 0, "seconds": None, "allow_difference": None}, print)
    assert chosen.seed == 0 and chosen.seconds == Plan().seconds
    with pytest.raises(UsageError, match=r"seconds is 0; wanted 0\.05 to"):
        _plan.validate(_keep.choose(plan("process"), (), {"seconds": 0.0}, print), Machine((0,), 4096))
    with pytest.raises(UsageError, match=r"seed is -1; wanted"):
        _plan.validate(_keep.choose(plan("process"), (), {"seed": -1}, print), Machine((0,), 4096))
    assert _keep.choose(plan("process", allow_difference=True), (), {"allow_difference": None}, print).allow_difference


def test_each_start_is_a_phase_of_its_own_in_shuffled_order_and_emulated_ones_run_once() -> None:
    wanted = plan("process", "docker", "b=process", "qemu", restarts=20)
    found = _run.phases(wanted, kvm_boots=False)
    native, emulated = found[:-1], found[-1]
    assert [phase.restart for phase in native] == list(range(20)) and (emulated.name, emulated.restart) == ("qemu", 0)
    assert len({phase.name for phase in found}) == 21
    orders = [tuple(spec.name for spec in phase.specs) for phase in native]
    assert all(sorted(order) == ["b", "docker", "process"] for order in orders)
    assert {order[0] for order in orders} == {"b", "docker", "process"}
    assert found == _run.phases(wanted, kvm_boots=False)
    assert orders != [
        tuple(s.name for s in p.specs)
        for p in _run.phases(plan("process", "docker", "b=process", restarts=20, seed=2), False)
    ]


def test_until_ci_goes_on_to_at_most_fifty_starts() -> None:
    found = _run.phases(plan("process", "docker", until_ci=0.02), kvm_boots=False)
    assert len(found) == _run.MOST_STARTS and len(_run.phases(plan("process", until_ci=0.02, restarts=60), False)) == 60
    with pytest.raises(UsageError, match="until_ci is 2; wanted a share"):
        _plan.validate(plan("process", until_ci=2.0), Machine((0,), 4096))


def test_the_width_is_that_of_the_primary_cells(tmp_path: Path) -> None:
    make(
        tmp_path, [target("a"), target("b")], models=("knn", "null"), restarts=4, start_sd=0.02, rounds=3, per_block=60
    )
    ratio = next(cell.ratio for cell in summarise(tmp_path).cells if cell.ratio and cell.model == "knn")
    assert ratio.p50.low is not None and ratio.p50.high is not None
    assert _run._width(tmp_path) == pytest.approx((ratio.p50.high / ratio.p50.low) ** 0.5 - 1)
    make(tmp_path / "one", [target("a"), target("b")], rounds=2)
    assert _run._width(tmp_path / "one") == 0.0


def test_the_estimate_counts_whole_quads_and_the_long_blocks_of_open_arrivals() -> None:
    def load_s(longest_s: float = 0.2, **settings: object) -> float:
        wanted = plan("url:http://127.0.0.1:1", "b=url:http://127.0.0.1:2", only="load", models=("null",), **settings)
        (phase,) = _run.phases(wanted, kvm_boots=False)
        return (_run.estimate_s(wanted, phase, longest_s) - 2 * _run.START_S["url"]) / 2

    times = {"seconds": 4.0, "warmup_s": 0.8}
    assert load_s(loads=("closed-1", "closed-4"), **times) == pytest.approx(8)
    assert load_s(5.0, loads=("closed-1",), **times) == pytest.approx(20)
    assert load_s(5.0, loads=("closed-1",), block_s=1.0, **times) == pytest.approx(4)
    assert load_s(loads=("poisson-100",), **times) == pytest.approx(20)
