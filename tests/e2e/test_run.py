"""`isolatency run` as a user calls it: every kind that can run here, and what a run leaves."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from tests.e2e.conftest import ISOLATENCY, ROOT, Command

KINDS = ("process", "docker", "firecracker", "qemu", "uml")


@pytest.fixture(scope="module")
def quick(
    isolatency: Command, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("results")
    done = isolatency("run", "--quick", "--out", out, sandboxed=True, timeout_s=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "latest", done


@pytest.fixture(scope="module")
def summary(quick: tuple[Path, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((quick[0] / "summary.json").read_text())
    return found


def test_every_kind_that_can_run_is_measured(summary: dict[str, Any], able: dict[str, str]) -> None:
    wanted = {kind for kind in KINDS if able[kind] == "yes"}
    assert {target["kind"] for target in summary["targets"]} == wanted
    cells = {(cell["target"], cell["model"], cell["load"]) for cell in summary["cells"]}
    assert cells == {(k, m, load) for k in wanted for m in ("knn", "dnn", "null") for load in ("closed-1", "closed-16")}
    assert {(row["target"], row["job"]) for row in summary["batch"]} == {
        (k, job) for k in wanted for job in ("knn", "dnn")
    }


def test_no_request_failed_and_there_were_many(summary: dict[str, Any]) -> None:
    assert sum(cell["failures"] for cell in summary["cells"]) == 0
    assert sum(cell["requests"] for cell in summary["cells"]) > 1000


def test_one_tree_everywhere_and_each_blas_kernel_is_named(summary: dict[str, Any]) -> None:
    identities = [target["identity"] for target in summary["targets"]]
    assert len({identity["tree_sha256"] for identity in identities}) == 1
    assert len(identities[0]["tree_sha256"]) == 64
    assert all(identity["blas_kernel"] for identity in identities)


def test_emulated_targets_are_marked_and_have_no_ratio(quick: tuple[Path, Any], summary: dict[str, Any]) -> None:
    emulated = {target["name"]: target for target in summary["targets"] if target["emulated"]}
    for cell in summary["cells"]:
        if cell["target"] in emulated:
            assert cell["ratio"] is None or not any(cell["ratio"].values())
    text = (quick[0] / "report.md").read_text() + quick[1].stdout
    for target in emulated.values():
        label = {"tcg": "qemu-tcg", "nested": "firecracker (nested)"}[target["accel"]]
        assert label in text


def test_figures_are_of_a_plausible_size(summary: dict[str, Any]) -> None:
    for cell in summary["cells"]:
        assert 0 < cell["mean_us"] < 60e6
        assert cell["p50_us"] is None or 0 < cell["p50_us"] <= cell["max_us"]
        assert 0 < cell["throughput_rps"] < 1e6


def test_no_connection_was_busy_for_longer_than_its_block(quick: tuple[Path, Any]) -> None:
    """A connection has one request in flight, so what was answered within a block fits into connections × block."""
    samples = pd.read_parquet(quick[0] / "samples.parquet", columns=["block", "target", "sent_ns", "received_ns"])
    blocks = pd.read_csv(quick[0] / "blocks.csv", keep_default_na=False)
    blocks["connections"] = blocks["load"].str.removeprefix("closed-").astype(int)
    both = samples.merge(blocks[["block", "target", "start_ns", "end_ns", "connections"]], on=["block", "target"])
    in_time = both[both["received_ns"] <= both["end_ns"]]
    assert (in_time["sent_ns"] >= in_time["start_ns"]).all()
    busy_ns = (in_time["received_ns"] - in_time["sent_ns"]).groupby([in_time["block"], in_time["target"]]).sum()
    limits = blocks.set_index(["block", "target"])
    limit_ns = ((limits["end_ns"] - limits["start_ns"]) * limits["connections"])[busy_ns.index]
    assert (busy_ns <= limit_ns).all()


def test_the_run_folder_holds_what_the_readme_names(quick: tuple[Path, Any], summary: dict[str, Any]) -> None:
    folder = quick[0]
    for name in (
        "plan.toml",
        "manifest.json",
        "targets.json",
        "samples.parquet",
        "blocks.csv",
        "batch.csv",
        "report.md",
    ):
        assert (folder / name).stat().st_size > 0, name
    samples = pd.read_parquet(folder / "samples.parquet", columns=["target", "outcome", "warmup"])
    reported = pd.DataFrame(summary["cells"]).groupby("target")[["requests", "warmup_requests"]].sum()
    assert samples.groupby("target", observed=True).size().to_dict() == reported.sum(axis=1).to_dict()
    # A rule may make more of them warm-up than were marked so while they were measured.
    marked = samples[samples["warmup"]].groupby("target", observed=True).size()
    assert (marked.reindex(reported.index) <= reported["warmup_requests"]).all()
    assert not list(folder.glob("*.part")) and not list(folder.glob("samples-*")) and not list(folder.glob("plan-*"))
    plan = tomllib.loads((folder / "plan.toml").read_text())
    assert [target["kind"] for target in plan["targets"]] == [t["kind"] for t in plan["targets"] if t["kind"] in KINDS]


def test_the_report_is_made_again_from_the_folder_alone(
    isolatency: Command, quick: tuple[Path, Any], summary: dict[str, Any]
) -> None:
    folder = quick[0]
    (folder / "summary.json").unlink()
    text = (folder / "report.md").read_text()
    again = isolatency("report", folder)
    assert again.returncode == 0, again.stderr
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert (folder / "report.md").read_text() == text
    other = isolatency("report", folder, "--baseline", "nobody")
    assert other.returncode == 2 and "process" in other.stderr


def test_the_plan_of_a_run_runs_again(isolatency: Command, quick: tuple[Path, Any], tmp_path: Path) -> None:
    plan = tomllib.loads((quick[0] / "plan.toml").read_text())
    again = isolatency(
        "run", quick[0] / "plan.toml", "--target", "process", "--only", "load", "--seconds", "1.5", "--out", tmp_path,
        sandboxed=True,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    written = tomllib.loads((tmp_path / "latest" / "plan.toml").read_text())
    assert [target["name"] for target in written["targets"]] == ["process"]
    assert written["seed"] == plan["seed"] and written["only"] == "load"
    assert not (tmp_path / "latest" / "batch.csv").exists()


def test_two_runs_at_once_are_refused(isolatency: Command, tmp_path: Path) -> None:
    argv = [ISOLATENCY, "sandbox", "--", ISOLATENCY, "run", "--quick", "--target", "process", "--out", tmp_path / "a"]
    first = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while not list(tmp_path.glob("a/2*/targets.json")) and time.monotonic() < end:
            time.sleep(0.1)
        second = isolatency("run", "--quick", "--target", "process", "--out", tmp_path / "b", sandboxed=True)
        assert second.returncode == 1
        assert "another run" in second.stderr
    finally:
        first.kill()
        first.wait()
        isolatency("clean")


def _lines(out: Path, name: str) -> int:
    return sum(len(path.read_text().splitlines()) for path in out.glob(f"2*/{name}"))


@pytest.mark.parametrize("moment", ["starting process", "load on process", "process: knn, repeat 2"])
def test_ctrl_c_at_any_moment_ends_it_soon_and_marks_it(isolatency: Command, moment: str, tmp_path: Path) -> None:
    argv = [ISOLATENCY, "run", "--quick", "--seconds", "1.5", "--target", "process", "--out", tmp_path]
    with subprocess.Popen(
        [ISOLATENCY, "sandbox", "--", *argv], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        assert running.stderr is not None
        assert any(line.startswith(moment) for line in running.stderr)
        end = time.monotonic() + 120
        while moment.startswith("load") and _lines(tmp_path, "blocks-*.csv") < 4 and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(0.3)
        os.killpg(running.pid, signal.SIGINT)
        _, said = running.communicate(timeout=25)
    assert running.returncode == 130, said
    assert "error: interrupted; what was measured until then is kept" in said and "Traceback" not in said
    [folder] = tmp_path.glob("2*")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["partial"] and manifest["ended"] and "interrupted" in manifest["errors"][0]
    assert not list(folder.glob("*.part")) and not (folder / ".reserve").exists()
    if moment != "starting process":
        assert json.loads((folder / "summary.json").read_text())["partial"]
        assert (folder / "report.md").read_text().count("PARTIAL") == 1
    assert isolatency("clean").stdout.startswith(("nothing to remove", "left alone"))


def test_ctrl_c_keeps_what_was_measured(isolatency: Command, tmp_path: Path) -> None:
    argv = [
        ISOLATENCY,
        "sandbox",
        "--",
        ISOLATENCY,
        "run",
        "--quick",
        "--target",
        "process",
        "--target",
        "uml",
        "--out",
        tmp_path,
    ]
    running = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    end = time.monotonic() + 120
    while not list(tmp_path.glob("2*/samples-_native*")) and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(4)
    os.killpg(running.pid, signal.SIGINT)
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 130, said
    folder = next(tmp_path.glob("2*"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["partial"] and "interrupted" in manifest["errors"][0]
    assert len(pd.read_parquet(folder / "samples.parquet")) > 0
    assert "partial" in (folder / "report.md").read_text().lower()
    assert isolatency("clean").stdout.startswith(("nothing to remove", "left alone"))


@pytest.mark.parametrize("victim", ["load", "run"])
def test_killed_under_load_it_keeps_the_requests_of_every_block(
    isolatency: Command, victim: str, tmp_path: Path
) -> None:
    """With -9: Locust, which the run outlives, or the run itself."""
    argv = [ISOLATENCY, "run", "--quick", "--only", "load", "--seconds", "20", "--target", "process", "--out", tmp_path]
    with subprocess.Popen(
        [ISOLATENCY, "sandbox", "--", *argv], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        end = time.monotonic() + 120
        while _lines(tmp_path, "blocks-*.csv") < 10:
            assert running.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        [locust] = [one for one in psutil.Process(running.pid).children(recursive=True) if "--plan" in one.cmdline()]
        process = locust if victim == "load" else locust.parent()
        assert process is not None
        process.kill()
        _, said = running.communicate(timeout=120)
    assert running.returncode, said
    isolatency("clean")
    [folder] = tmp_path.glob("2*")
    if victim == "run":
        assert isolatency("report", folder).returncode == 0
    else:
        assert "error: the load was ended by signal 9" in said
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["partial"] and summary["cells"][0]["requests"] > 0
    [samples] = folder.glob("samples*.parquet*")
    [blocks] = folder.glob("blocks*.csv")
    assert set(pd.read_parquet(samples)["block"]) >= set(pd.read_csv(blocks)["block"])
    assert samples.name == ("samples.parquet" if victim == "load" else "samples-_native.parquet.parts")


def test_a_target_that_cannot_start_is_an_error_and_the_others_are_measured(
    isolatency: Command, tmp_path: Path
) -> None:
    done = isolatency(
        "run", "--quick", "--only", "load", "--seconds", "1.5", "--target", "process",
        "--target", "bad=docker:image=no-such-image-anywhere", "--out", tmp_path, sandboxed=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no-such-image-anywhere" in done.stderr
    found = json.loads((tmp_path / "latest" / "summary.json").read_text())
    assert {cell["target"] for cell in found["cells"]} == {"process"}


ODD = """
import subprocess, sys, threading
from http.server import ThreadingHTTPServer
from tests.unit.test_client import Anything
server = ThreadingHTTPServer(("127.0.0.1", 0), Anything)
server.body = b'{"outputs": [{"name": "label", "data": [0]}]}'
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"odd=url:http://127.0.0.1:{server.server_port}"
sys.exit(subprocess.run([*sys.argv[1:], "--target", url, "--target", "process"]).returncode)
"""


def test_a_server_that_answers_oddly_is_an_error_and_the_others_are_measured(tmp_path: Path) -> None:
    argv = [ISOLATENCY, "run", "--quick", "--only", "load", "--seconds", "1.5", "--out", str(tmp_path)]
    done = subprocess.run(
        [ISOLATENCY, "sandbox", "--", sys.executable, "-c", ODD, *argv],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: odd: knn cannot be asked: wanted one input of numbers")
    found = json.loads((tmp_path / "latest" / "summary.json").read_text())
    assert found["errors"] == [line.removeprefix("error: ")] and found["partial"]
    assert {cell["target"] for cell in found["cells"]} == {"process"}


URLS = """
import subprocess, sys
from tests.e2e.raw import Raw, every_third_503
def mostly_503(connection, body, n):
    every_third_503(connection, body, (n + 1) % 3 // 2 if b'"data": [1]' in body else 1)  # questions have more rows
urls = [f"--target={name}=url:{server.url}" for name, server in (("good", Raw()), ("bad", Raw(mostly_503)))]
sys.exit(subprocess.run([*sys.argv[1:], *urls]).returncode)
"""


def test_servers_given_by_url_are_compared_as_these_instances_and_gated_though_requests_failed(tmp_path: Path) -> None:
    argv = [ISOLATENCY, "run", "--only", "load", "--model", "null", "--seconds", "2", "--restarts", "3"]
    argv += ["--encoding", "json", "--fail-if", "bad:null:closed-1:p50>+10%", "--out", str(tmp_path)]
    (tmp_path / ".locust.conf").write_text("processes = 2\nonly-summary = false\n")  # of Locust's own, for other tests
    done = subprocess.run(
        [ISOLATENCY, "sandbox", "--", sys.executable, "-c", URLS, *argv],
        capture_output=True, text=True, timeout=400, cwd=ROOT, env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "exceeded: bad:null:closed-1:p50>+10%: it is ∞" in done.stderr
    found = json.loads((tmp_path / "latest" / "summary.json").read_text())
    (bad,) = (cell for cell in found["cells"] if (cell["target"], cell["load"]) == ("bad", "closed-1"))
    assert (bad["ratio"]["p50"]["verdict"], bad["ratio"]["p50"]["infinite"]) == ("slower", 1)
    assert bad["failures_by_kind"].keys() == {"wrong_status"} and found["starts"] == []
    assert found["answer"][0].endswith("All of these instances only.")
    assert tomllib.loads((tmp_path / "latest" / "plan.toml").read_text())["encoding"] == "json"


OWN_IMAGE = """
import docker, subprocess, sys
from images import store
engine = docker.from_env()
engine.api.import_image_from_file(str(store.current().tar), repository="mine", changes=store.dockerfile_instructions())
print("id", engine.images.get("mine").id, flush=True)
sys.exit(subprocess.run(sys.argv[1:]).returncode)
"""


def test_an_image_of_ones_own_may_be_the_first_target_and_its_digest_is_kept(
    able: dict[str, str], tmp_path: Path
) -> None:
    if able["docker"] != "yes":
        pytest.skip(f"docker cannot run here: {able['docker']}")
    argv = [ISOLATENCY, "run", "--quick", "--only", "load", "--seconds", "1.5", "--out", str(tmp_path)]
    argv += ["--target", "own=docker:image=mine", "--target", "process", "--target", "b=process"]
    done = subprocess.run(
        [ISOLATENCY, "sandbox", "--", sys.executable, "-c", OWN_IMAGE, *argv],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "latest" / "manifest.json").read_text())["own_parts"]
    assert found == {"own": {"image": {"given": "mine", "sha256": done.stdout.split()[1].removeprefix("sha256:")}}}
    summary = json.loads((tmp_path / "latest" / "summary.json").read_text())
    assert any("own: image of its own" in caveat for caveat in summary["caveats"])


def test_a_dry_run_prints_and_makes_nothing(isolatency: Command, tmp_path: Path) -> None:
    done = isolatency("run", "--quick", "--dry-run", "--target", "process", "--target", "uml", "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert "would run: ip tuntap add" in done.stdout or "would run: ip" in done.stdout
    assert not (tmp_path / "r").exists()
