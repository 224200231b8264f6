"""What is printed of a Summary: the golden report.md, the terminal, the marks, and what cannot be read or written.

`UPDATE_GOLDEN=1 pytest tests/unit/test_report.py` writes the golden file anew; look at the difference before a commit.
"""

import csv
import io
import json
import os
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from images.errors import IsolatencyError, UsageError
from loadtest import _report
from loadtest._plan import Job, read, save
from loadtest._summary import summarise
from loadtest._tables import significant
from tests.unit.run_folder import make, target, with_stages

GOLDEN = Path(__file__).parent / "golden" / "report.md"
LONG = "a-firecracker-of-a-long-name-31"


def everything(run: Path) -> Path:
    """A run with all that a report may hold: five kinds, failures, a clock that lies, too few samples, caveats."""
    targets = [
        target("process"),
        target("docker", kind="docker"),
        target("firecracker", kind="firecracker", accel="kvm"),
        target("shop", kind="url", identity=None, host_memory_mib=None, caveats=["an unknown server"]),
        target("qemu", kind="qemu", accel="tcg", label="qemu-tcg", identity={"tree_sha256": "ab" * 32,
               "tree_sha256_source": "label", "blas_kernel": "Katmai"}, caveats=["BLAS kernel: another CPU"]),
    ]  # fmt: skip
    slow = {"process": 1.0, "docker": 1.02, "firecracker": 1.1, "qemu": 12.0}
    jobs = [
        (name, job, r, seconds * factor * (1 + r / 50), seconds * factor * (1 + r / 50) * (1.03 if name == "qemu" else 1.001),
         accuracy)
        for job, seconds, accuracy in (("knn", 0.62, 0.939), ("dnn", 1.234, 0.81))
        for r in range(4)
        for name, factor in slow.items()
        if r == 0 or name != "qemu"
    ]  # fmt: skip
    make(
        run, targets, factors=slow | {"shop": 3.0}, failures={"shop": 20}, per_block=700, models=("knn", "null"),
        jobs=jobs, command=["isolatency", "run", "plan.toml"], started="2026-11-24T10:15:00+00:00",
        load_before=[0.3, 0.2, 0.1], load_after=[1.9, 1.0, 0.5],
        caveats=["the load client shares the targets' cores: this machine has 1 in all"],
    )  # fmt: skip
    plan = read(run / "plan.toml")
    names = tuple({"name": one["name"], "kind": one["kind"]} for one in targets)
    wanted = (Job("knn", 4, 569), Job("dnn", 4, 1000))
    save(type(plan)(**{**{f: getattr(plan, f) for f in plan.__struct_fields__}, "targets": names, "jobs": wanted}),
         run / "plan.toml")  # fmt: skip
    return run


def text_of(run: Path) -> str:
    _report.write(run)
    return (run / "report.md").read_text()


def test_the_report_is_the_golden_one(tmp_path: Path) -> None:
    text = text_of(everything(tmp_path / "run"))
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_the_report_is_the_same_again_and_nothing_else_is_left(tmp_path: Path) -> None:
    everything(tmp_path)
    _report.write(tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    _report.write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    assert not [name for name in first if name.endswith(".part")]


def test_summary_json_has_the_fields_of_its_schema_and_no_value_that_json_has_not(tmp_path: Path) -> None:
    _report.write(everything(tmp_path))
    text = (tmp_path / "summary.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["schema"] == 2 and found["baseline"] == "process"
    assert found["report_reference"]["knn"]["docker_s"] == 1.8965
    cell = next(cell for cell in found["cells"] if cell["target"] == "firecracker")
    assert {"estimate", "low", "high", "verdict", "reason", "per_start", "could_be"} <= set(cell["ratio"]["p50"])
    assert {name: ratio["verdict"] for name, ratio in cell["ratio"].items() if ratio} == (
        {"p50": "slower", "p99": "slower", "throughput": None}
        if cell["model"] == "knn"
        else dict.fromkeys(("p50", "p99", "throughput"))
    )
    shop = next(cell for cell in found["cells"] if cell["target"] == "shop")
    assert (shop["p99_us"], shop["infinite"]) == (None, ["p99", "p999"])
    qemu = [cell for cell in found["cells"] if cell["target"] == "qemu"]
    assert qemu and all(cell["ratio"] is None for cell in qemu)
    assert all(isinstance(caveat, str) for caveat in found["caveats"])


def test_an_emulated_target_is_marked_wherever_it_stands_and_in_no_table_with_ratios(tmp_path: Path) -> None:
    text = text_of(everything(tmp_path))
    sections = text.split("\n## ")
    for section in sections:
        if "qemu" in section and not section.startswith(("Targets", "# ")):
            assert "emulated" in section.splitlines()[0]
            assert "| process" not in section and "×" not in section
        assert section.count("qemu") == section.count("qemu-tcg")


def test_an_allowed_difference_marks_every_table(tmp_path: Path) -> None:
    targets = [target("a"), target("q", kind="qemu", accel="tcg", parity={"differences": ["BLAS threads: 1 and 2"]})]
    make(tmp_path, targets, jobs=[(n, "knn", r, 1.0 + r, 1.0 + r, 0.9) for r in range(3) for n in ("a", "q")],
         allow_difference=True, partial=True, errors=["q died"])  # fmt: skip
    text = text_of(tmp_path)
    assert "PARTIAL" in text and "ERROR: q died" in text and "q (tcg): not comparable: BLAS threads" in text
    titles = [line for line in text.splitlines() if line.startswith("## ") and line != "## How to read it"]
    assert titles and all("UNEQUAL TARGETS" in title for title in titles)
    tables = [line for line in text.splitlines() if line.startswith("| ---")]
    assert len(tables) == len(titles)


def printed(run: Path, width: int = 100) -> list[str]:
    with (run / "printed").open("w") as file:
        console = Console(record=True, file=file, width=width)
        _report.terminal(summarise(run), console)
    (run / "printed").unlink()
    return console.export_text().splitlines()


def titles(text: str) -> list[str]:
    return [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]


def test_a_run_of_batch_jobs_alone_is_whole_and_has_no_table_of_serving(tmp_path: Path) -> None:
    jobs = [(name, "knn", r, 1.0 + r, 1.0 + r, 0.9) for r in range(3) for name in ("a", "b")]
    make(tmp_path, [target("a"), target("b")], jobs=jobs, load=False, only="batch")
    text = text_of(tmp_path)
    assert "PARTIAL" not in text and "warm-up" not in text and "NOTE" not in text
    assert titles(text) == [
        "Targets", "Serving and batch side by side", "Batch jobs", "Batch jobs, over a, with 95 % intervals",
        "The report of 2023 (mean of 100 runs, of 10 for dnn)", "How to read it",
    ]  # fmt: skip
    assert "| b | 2.000 |" in text and "PARTIAL" not in "\n".join(printed(tmp_path))


def test_a_run_of_load_alone_is_whole_and_has_no_table_of_jobs(tmp_path: Path) -> None:
    make(tmp_path, [target("a"), target("b")], only="load")
    text = text_of(tmp_path)
    assert "PARTIAL" not in text and "batch" not in text.partition("## Targets")[0]
    assert titles(text) == [
        "Verdicts", "Targets", "Serving and batch side by side", "Serving",
        "Typical latency, beside that of all requests", "Serving, over a, with 95 % intervals",
        "How large a difference to a could still be, at 95 %", "How to read it",
    ]  # fmt: skip
    assert "2023" not in text


def test_the_terminal_says_what_the_report_says_of_the_whole_run(tmp_path: Path) -> None:
    make(tmp_path, [target("a"), target("b")], allow_difference=True, partial=True, errors=["b died"])
    lines = printed(tmp_path)
    assert lines[0].startswith("PARTIAL") and lines[1] == "ERROR: b died"
    wanted = titles(text_of(tmp_path))[:-1]
    assert all("UNEQUAL TARGETS" in title for title in wanted) and set(wanted) <= set(lines)


def test_the_terminal_fits_a_hundred_columns(tmp_path: Path) -> None:
    lines = printed(everything(tmp_path))
    assert max(len(line.rstrip()) for line in lines) <= 100
    assert not any("…" in line for line in lines)
    assert any("qemu-tcg" in line for line in lines) and any("∞" in line for line in lines)


def test_a_label_is_folded_and_never_cut(tmp_path: Path) -> None:
    """With every column in use and the longest name, an emulated target keeps its mark."""
    targets = [target(name) for name in ("process", "docker", "uml")]
    targets.append(target(LONG, kind="firecracker", accel="nested"))
    jobs = [
        (one["name"], job, r, 123.4 + r, 123.4 + r, 0.9) for r in range(3) for one in targets for job in ("knn", "dnn")
    ]
    make(tmp_path, targets, models=("knn", "dnn", "null"), jobs=jobs, factors={LONG: 400.0}, per_block=700)
    lines = printed(tmp_path)
    assert max(len(line.rstrip()) for line in lines) <= 100
    together = "".join(line.replace(" ", "") for line in lines)
    assert "(nested)" in together and "…" not in together


@pytest.mark.parametrize("name", ["plan.toml", "manifest.json", "targets.json", "samples.parquet", "blocks.csv"])
def test_a_damaged_folder_is_one_line_that_names_the_place(tmp_path: Path, name: str) -> None:
    make(tmp_path, [target("a")])
    (tmp_path / name).write_bytes(b"\x00torn")
    with pytest.raises(UsageError) as caught:
        _report.write(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert not (tmp_path / "report.md").exists() and not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("name", ["plan.toml", "manifest.json", "targets.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    make(tmp_path, [target("a")])
    (tmp_path / name).unlink()
    with pytest.raises(UsageError, match=f"is no run folder: {name} is missing"):
        _report.write(tmp_path)


def test_another_schema_is_refused_and_the_version_that_made_it_named(tmp_path: Path) -> None:
    make(tmp_path, [target("a")], schema=7, versions={"isolatency": "3.2"})
    with pytest.raises(UsageError, match=r"schema 7, this version reads 1: use the version that made it \(3\.2\)"):
        _report.write(tmp_path)


def test_an_unknown_or_emulated_baseline_is_refused_and_the_others_named(tmp_path: Path) -> None:
    everything(tmp_path)
    with pytest.raises(UsageError, match="no target 'nobody' to compare against; there are: process, docker"):
        _report.write(tmp_path, "nobody")
    with pytest.raises(UsageError, match="'qemu' is emulated: no baseline"):
        _report.write(tmp_path, "qemu")
    assert _report.write(tmp_path, "docker").baseline == "docker"
    assert "Serving, over docker" in (tmp_path / "report.md").read_text()


def test_a_run_that_measured_nothing_says_so(tmp_path: Path) -> None:
    make(tmp_path, [], load=False, partial=True, errors=["process: no answer within 30 s"])
    text = text_of(tmp_path)
    assert "PARTIAL" in text and "ERROR: process: no answer within 30 s" in text


def test_a_folder_that_cannot_be_written_keeps_its_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything(tmp_path)
    _report.write(tmp_path)
    before = (tmp_path / "report.md").read_bytes(), (tmp_path / "summary.json").read_bytes()
    (tmp_path / "summary.json.part").mkdir()  # for root a read-only folder is none
    with pytest.raises((OSError, IsolatencyError)):
        _report.write(tmp_path, "docker")
    assert ((tmp_path / "report.md").read_bytes(), (tmp_path / "summary.json").read_bytes()) == before


def test_a_report_that_cannot_be_replaced_leaves_no_half_one(tmp_path: Path) -> None:
    make(tmp_path, [target("a")])
    (tmp_path / "report.md").mkdir()
    with pytest.raises(OSError, match="directory"):
        _report.write(tmp_path)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (None, 3, "–"), (0.0, 3, "0"), (1.8965, 4, "1.897"), (1.9, 3, "1.90"), (0.0768, 3, "0.0768"), (95.31, 3, "95.3"),
        (142.33, 3, "142"), (1234.5, 3, "1,234"), (122.1339, 4, "122.1"), (-0.0234, 3, "-0.0234"), (999.9, 3, "1,000"),
        (9.999, 3, "10.0"),
    ],
)  # fmt: skip
def test_digits_that_mean_something(value: float | None, digits: int, text: str) -> None:
    assert significant(value, digits) == text


def test_stages_and_prices_are_tables_of_their_own_and_emulated_ones_apart(tmp_path: Path) -> None:
    targets = [
        target("process"),
        target("docker", kind="docker"),
        target("qemu", kind="qemu", accel="tcg", label="qemu-tcg"),
    ]
    make(tmp_path, targets, models=("null", "knn", "dnn"), restarts=3, rounds=3, per_block=700)
    server = {"null": {"read": 30.0}, "knn": {"read": 30.0, "compute": 60.0}, "dnn": {"read": 30.0, "compute": 200.0}}
    with_stages(tmp_path, server, residual_us={"process": 40.0, "docker": 55.0, "qemu": 900.0})
    text = text_of(tmp_path)
    assert "| knn, closed-1 | docker | 150.0 | 0.0 | 30.0 | 0.0 | 60.0 | 0.0 | 55.0 | 5.0 |" in text
    assert "| docker | +15.0 (+15.0 to +15.0) | " in text and "what the line predicts for dnn" in text
    sections = text.split("\n## ")
    (emulated,) = (one for one in sections if one.startswith("Where the time goes at p50, µs, emulated"))
    assert "| qemu-tcg | 9" in emulated and "docker" not in emulated
    assert "How large a difference to process" in text and "Each target was started 3 times" in text


def test_every_format_holds_the_figures(tmp_path: Path) -> None:
    summary = _report.write(everything(tmp_path))
    rows = list(csv.DictReader(io.StringIO(_report.formatted(summary, "csv"))))
    by_key = {(row["target"], row["model_or_job"], row["figure"]): row for row in rows}
    ours = next(cell for cell in summary.cells if (cell.target, cell.model) == ("docker", "knn"))
    assert ours.ratio is not None
    ratio = by_key["docker", "knn", "p50 over process"] | {}
    assert [float(ratio[name]) for name in ("value", "low", "high")] == list(msgspec.structs.astuple(ours.ratio.p50))[
        :3
    ]
    assert ratio["verdict"] == ours.ratio.p50.verdict
    assert (
        by_key["shop", "knn", "p99_us"]["value"] == "inf" and by_key["qemu-tcg", "knn", "p50_us"]["emulated"] == "True"
    )
    assert float(by_key["docker", "dnn", "mean_s"]["low"]) < float(by_key["docker", "dnn", "mean_s"]["value"])
    assert json.loads(_report.formatted(summary, "json")) == json.loads((tmp_path / "summary.json").read_text())
    assert _report.formatted(summary, "md") == (tmp_path / "report.md").read_text()
    assert _report.formatted(summary, "html") == (tmp_path / "report.html").read_text()


def test_the_csv_holds_starts_peaks_prices_and_firecracker_over_docker(tmp_path: Path) -> None:
    starts = [{"restart": n, "ready_s": 1.0 + n, "first_prediction_ms": 2.0 + n} for n in range(3)]
    kinds = {"process": None, "docker": None, "firecracker": "kvm", "qemu": "tcg"}
    targets = [target(kind, kind=kind, accel=accel, starts=starts) for kind, accel in kinds.items()]
    make(tmp_path, targets, models=("null", "knn", "dnn"), factors={"docker": 2.0, "firecracker": 3.0}, restarts=3,
         rounds=3, per_block=700, failures={"firecracker": 20})  # fmt: skip
    server = {"null": {"read": 30.0}, "knn": {"read": 30.0, "compute": 60.0}, "dnn": {"read": 30.0, "compute": 90.0}}
    with_stages(tmp_path, server)
    head = "restart,target,model,bound,rate_rps,low_rps,high_rps,reason"
    lines = [
        f"0,{name},knn,p99<=5ms,{rate},{rate},{rate * 1.05}," for name, rate in (("docker", 900.0), ("qemu", 40.0))
    ]
    (tmp_path / "peak.csv").write_text("\n".join([head, *lines]) + "\n")
    summary = summarise(tmp_path)
    rows = list(csv.DictReader(io.StringIO(_report.formatted(summary, "csv"))))
    assert len({tuple(row.values())[:6] for row in rows}) == len(rows)  # a figure has one row
    value = {(row["what"], row["target"], row["model_or_job"], row["figure"]): row["value"] for row in rows}
    assert float(value["starts", "docker", "", "ready_s"]) == 2.0
    assert float(value["starts", "docker", "", "ready over process"]) == pytest.approx(1.0)
    assert float(value["peak", "docker", "knn", "rate_rps"]) == 900.0
    price = next(one for one in summary.prices if one.target == "docker")
    assert float(value["price", "docker", "dnn", "per_request_us"]) == pytest.approx(price.per_request_us.estimate)
    assert float(value["serving", "firecracker", "knn", "p50 over docker"]) == pytest.approx(1.5, rel=0.01)
    assert value["serving", "firecracker", "knn", "p99 over docker"] == "inf"
    assert value["serving", "docker", "knn", "p50_kernel over process"]
    page = _report.formatted(summary, "html")
    emulated = page.partition('class="emulated"')[2]
    assert "Peak, emulated" in emulated and "<td>40.0 (40.0–42.0)</td>" in emulated
    apart = page.partition('class="emulated"')[0]
    assert "Typical latency, beside that of all requests" in apart and "qemu" not in apart.partition("<h2>Peak")[2]


def test_what_a_name_holds_is_text_on_the_page(tmp_path: Path) -> None:
    make(tmp_path, [target("a", caveats=["<script>alert(1)</script>"]), target("b")], errors=["<b>died</b> & more"])
    page = _report.formatted(summarise(tmp_path), "html")
    assert "<script" not in page and "<b>died" not in page and "&lt;script&gt;alert(1)" in page
