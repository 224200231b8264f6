"""Plans: what is read, what is refused, and in which words."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from images.errors import UsageError
from loadtest import _plan
from loadtest._plan import Machine, Plan

HERE = Machine(cores=(0, 1), mem_mib=4096)


def plan(*targets: str, **values: object) -> Plan:
    made = Plan(targets=tuple(_plan.parse_target(text) for text in targets))
    return msgspec.structs.replace(made, **values)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("process", {"name": "process", "kind": "process"}),
        ("a=docker:cpus=1,mem_mib=512", {"name": "a", "kind": "docker", "cpus": 1, "mem_mib": 512}),
        ("docker:runtime=runsc", {"name": "docker", "kind": "docker", "runtime": "runsc"}),
        ("firecracker:console=false", {"name": "firecracker", "kind": "firecracker", "console": False}),
        ("fc116=firecracker:binary=/opt/fc-1.16", {"name": "fc116", "kind": "firecracker", "binary": "/opt/fc-1.16"}),
        ("old=docker:image=shop/a:1.2", {"name": "old", "kind": "docker", "image": "shop/a:1.2"}),
        ('firecracker:"boot_args=quiet,x"', {"name": "firecracker", "kind": "firecracker", "boot_args": "quiet,x"}),
        (
            "process:spin_us=210,spin_tail_p=0.03",
            {"name": "process", "kind": "process", "spin_us": 210.0, "spin_tail_p": 0.03},
        ),
        ("prod=url:http://127.0.0.1:8080", {"name": "prod", "kind": "url", "url": "http://127.0.0.1:8080"}),
        ("url:http://127.0.0.1/?a=b", {"name": "url", "kind": "url", "url": "http://127.0.0.1/?a=b"}),
    ],
)
def test_a_target_in_words(text: str, expected: dict[str, object]) -> None:
    assert _plan.parse_target(text) == expected


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("dokcer", "nearest known one is 'docker'"),
        ("=docker", "empty name"),
        ("docker:cpu=1", "nearest known one is 'cpus'"),
        ("docker:cpus=1,cpus=2", "gives cpus twice"),
        ("docker:cpus", "wants option=value, found 'cpus'"),
        ("docker:cpus=two", "whole number for cpus, found 'two'"),
        ("docker:spin_us=long", "wants a number for spin_us, found 'long'"),
        ("firecracker:console=maybe", "console=true or console=false"),
    ],
)
def test_a_target_that_cannot_be_read(text: str, found: str) -> None:
    with pytest.raises(UsageError, match=found):
        _plan.parse_target(text)


def test_the_plans_that_come_with_it_can_be_read() -> None:
    for path in _plan.PLANS.glob("*.toml"):
        assert _plan.read(path).schema == 1
    assert _plan.read(None, quick=True).quick
    report = _plan.read(_plan.PLANS / "report.toml")
    assert [(spec.kind, spec.cpus, spec.mem_mib) for spec in report.specs()] == [
        ("process", 8, 16384),
        ("docker", 8, 16384),
        ("firecracker", 8, 16384),
    ]
    assert [(job.job, job.repeats) for job in report.jobs] == [("knn", 100), ("dnn", 10)]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("seed = 1\nsecond = 2\n", 2, "'second'; the nearest known one is 'seconds'"),
        (
            '[[targets]]\nkind = "docker"\n[[targets]]\nkind = "uml"\nmem_mb = 1\n',
            5,
            "'mem_mb'; the nearest known one is 'mem_mib'",
        ),
        ('[[targets]]\nkind = "docker"\nhuge_pages = "2M"\n', 3, "unknown key 'huge_pages'"),
        ('seed = 1\n\n[[job]]\njob = "knn"\n', 3, "'job'; the nearest known one is 'jobs'"),
        ('[[jobs]]\njob = "knn"\nrepeat = 3\n', 3, "'repeat'; the nearest known one is 'repeats'"),
    ],
)
def test_an_unknown_key_is_named_with_its_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        _plan.read(path)
    assert f"p.toml:{line}: unknown key" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "text", ["seed = ", "seed = 'one'", "jobs = 3", "targets = [1]", "\udcff\udcfe", "x = " + "[" * 5000, "seed = 1\0"]
)
def test_nonsense_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError) as caught:
        _plan.read(path)
    assert "\n" not in str(caught.value)


def test_a_plan_written_is_read_back_the_same(tmp_path: Path) -> None:
    before = plan("process", "a=docker:mem_mib=256", "firecracker:console=false", jobs=(_plan.Job("knn", 2, 100),))
    _plan.save(before, tmp_path / "plan.toml")
    assert _plan.read(tmp_path / "plan.toml") == before


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (plan("process", "process"), "two targets are called 'process'"),
        (plan("process:cpus=3"), "gives 2 at most"),
        (plan("process:mem_mib=9999"), "largest that fits is 4096"),
        (plan("uml:cpus=2"), "uml"),
        (plan("process", "docker:mem_mib=256"), "--allow-difference"),
        (plan("process", loads=("open-1",)), "closed-N"),
        (plan("process", loads=("closed-0",)), "closed-N"),
        (plan("process", models=("knm",)), "nearest known one is 'knn'"),
        (plan("process", models=()), "no model"),
        (plan("process", models=("knn", "knn")), "names a model twice"),
        (plan("process", spin_tail_p=2.0), "spin_tail_p is 2; wanted 0 to 1"),
        (plan("process", spin_us=-1.0), "spin_us is -1; wanted 0"),
        (plan("process", work_us=0.0), "work_us above 0"),
        (plan("process", seconds=-1.0), "seconds"),
        (plan("process", seconds=1.0, warmup_s=1.0), "warmup_s"),
        (plan("process", block_s=0.01), "block_s is 0.01; wanted 0.05"),
        (plan("process", schema=2), "schema"),
        (plan("process", jobs=(_plan.Job("knn", 0, 10),)), "knn.repeats is 0"),
        (plan("process", jobs=(_plan.Job("knn", 1, 10**12),)), "knn.rows is 1000000000000; wanted 1 to 1000000"),
        (plan("process", loads=("closed-1", "closed-1")), "names a load twice"),
        (plan("process", boot_timeout_s=float("nan")), "boot_timeout_s is nan; wanted 0"),
        (plan("process", check=-1), "check is -1; wanted 0"),
        (plan("process", only="serve"), "batch or load"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(bad: Plan, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        _plan.validate(bad, HERE)


@pytest.mark.parametrize(
    ("text", "loads"),
    [
        ("connections = [1, 4, 16]", ("closed-1", "closed-4", "closed-16")),
        ("rates = [200, 12.5]", ("poisson-200", "poisson-12.5")),
        ('connections = [2]\nrates = [200]\narrivals = "constant"', ("closed-2", "constant-200")),
        ('loads = ["single", "offline", "constant-50"]', ("single", "offline", "constant-50")),
        ("", Plan().loads),
    ],
)
def test_loads_as_lists(tmp_path: Path, text: str, loads: tuple[str, ...]) -> None:
    (tmp_path / "p.toml").write_text(text + '\n[[targets]]\nkind = "process"\n')
    made = _plan.read(tmp_path / "p.toml")
    assert made.loads == loads
    _plan.validate(made, HERE)
    _plan.save(made, tmp_path / "plan.toml")
    assert _plan.read(tmp_path / "plan.toml") == made


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('loads = ["single"]\nrates = [1]', "loads beside rates"),
        ('rates = [1]\narrivals = "uniform"', "wanted constant or poisson"),
        ("connections = 4", "as a list of numbers"),
        ("rates = [0]", "unknown load 'poisson-0'"),
        ("connections = [0]", "unknown load 'closed-0'"),
        ("open_connections = 0", "open_connections is 0"),
        ("min_requests = -1", "min_requests is -1"),
        ("client_spin_us = 20000.0", "client_spin_us is 20000"),
    ],
)
def test_loads_that_cannot_be(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "p.toml").write_text(text + '\n[[targets]]\nkind = "process"\n')
    with pytest.raises(UsageError, match=words):
        _plan.validate(_plan.read(tmp_path / "p.toml"), HERE)


def test_what_can_run_is_not_refused() -> None:
    _plan.validate(plan("process", "b=process", "docker", "uml", "qemu:cpus=1"), HERE)
    _plan.validate(plan("process", "docker:mem_mib=256", allow_difference=True), HERE)


def test_an_emulated_phase_has_its_own_seconds_and_patience() -> None:
    made = plan("qemu", seconds=20.0, emulated_seconds=4.0, warmup_s=2.0, request_timeout_s=10.0)
    native, emulated = made.for_engine("native", False), made.for_engine("qemu", True)
    assert (native["seconds"], native["warmup_s"], native["request_timeout_s"]) == (20.0, 2.0, 10.0)
    assert (emulated["seconds"], emulated["warmup_s"], emulated["request_timeout_s"]) == (4.0, 1.0, 60.0)
    assert (native["block_s"], emulated["block_s"], native["lengths"]) == (0.0, 1.0, {})
    assert plan("qemu", emulated_seconds=1.0).for_engine("qemu", True)["block_s"] == 0.5
    assert plan("qemu", block_s=0.3).for_engine("qemu", True)["block_s"] == 0.3
    assert made.for_engine("native", False, lengths={"knn:closed-1": 0.25})["lengths"] == {"knn:closed-1": 0.25}


def test_what_the_servers_are_told() -> None:
    assert plan("process", models=("knn-digits",), threads=2).server_args() == [
        "--model",
        "knn-digits",
        "--threads",
        "2",
    ]
    told = plan("process", models=("spin", "work"), spin_us=50.0, spin_tail_p=0.25, work_iterations=7).server_args()
    assert told[4:] == [
        "--threads", "1", "--spin-us=50.0", "--spin-tail-us=400.0", "--spin-tail-p=0.25",
        "--work-us=200.0", "--work-iterations=7",
    ]  # fmt: skip


def test_a_model_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text('class Mine:\n name = "mine"')
    np.savez(tmp_path / "rows.npz", rows=np.ones((3, 2)))
    word, data = f"{tmp_path}/mine.py:Mine", str(tmp_path / "rows.npz")
    made = plan("process", models=("mine", "null"), model_file=word, data=data)
    _plan.validate(made, HERE)
    assert made.server_args()[:4] == ["--model", "/opt/app/model/mine.py:Mine", "--model", "null"]
    assert made.rows_of("mine") == tmp_path / "rows.npz" and made.rows_of("null").is_dir()
    assert made.for_engine("native", False)["data"] == {"mine": data}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"data": ""}, "wants rows to be asked"),
        ({"data": str(tmp_path / "no.npz")}, "no.npz is missing"),
        ({"models": ("null",)}, "wanted that name in models"),
        ({"model_file": ""}, "no model is the user's own"),
        ({"models": ("mine", "other")}, "unknown model 'other'"),
    ]
    for change, words in changes:
        with pytest.raises(UsageError, match=words):
            _plan.validate(msgspec.structs.replace(made, **change), HERE)
    (tmp_path / "mine.py").write_text('class Mine:\n name = "knn"')
    with pytest.raises(UsageError, match="as one of ours is"):
        _plan.validate(msgspec.structs.replace(made, models=("knn",)), HERE)
