"""Triton's perf_analyzer measures this server, and the server-side split that it prints is the server's own.

Its wheel wants a glibc that Debian 12 has not, so it runs in a small tree of Debian 13, by chroot.
"""

import csv
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import bring
from tests.unit.serving import ALL, Running, serving

VERSION = "2.60.0"
RUN_S = 300.0
REQUESTS = 400


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root folder in which /bin/perf_analyzer runs."""
    if os.getuid() != 0:
        pytest.skip("perf_analyzer runs in a chroot here; root makes it run")
    if shutil.which("mmdebstrap") is None:
        pytest.skip(
            "perf_analyzer runs in a tree of Debian 13; the package mmdebstrap makes it run (`isolatency setup`)"
        )
    folder = tmp_path_factory.mktemp("perf_analyzer")
    root = folder / "tree"
    wheel = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--platform",
             "manylinux_2_38_x86_64", "--dest", folder, f"perf-analyzer=={VERSION}"]  # fmt: skip
    debian = ["mmdebstrap", "--quiet", "--variant=extract", "--include=base-files,libc6,libstdc++6,libssl3t64,zlib1g", "trixie", root]  # fmt: skip
    bring("perf_analyzer's wheel", wheel)
    bring("a tree of Debian 13 for perf_analyzer", debian)
    (found,) = folder.glob("*.whl")
    with zipfile.ZipFile(found) as unpacked, (root / "usr" / "bin" / "perf_analyzer").open("wb") as out:
        out.write(unpacked.read("perf_analyzer/bin/perf_analyzer"))
    (root / "usr" / "bin" / "perf_analyzer").chmod(0o755)
    return root


def measured(running: Running, tree: Path, model: str, width: int, connections: int) -> dict[str, str]:
    """What perf_analyzer says of REQUESTS requests."""
    argv = [
        "chroot", str(tree), "/usr/bin/perf_analyzer", "-m", model, "-u", running.url.removeprefix("http://"), "-i", "http",
        "--shape", f"x:1,{width}", "--input-data", "zero", "--request-count", str(REQUESTS), "--concurrency-range", str(connections), "-f", "/found.csv",
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, timeout=RUN_S)
    assert done.returncode == 0, done.stdout + done.stderr + running.log()
    (found,) = csv.DictReader((tree / "found.csv").read_text().splitlines())
    return found


@pytest.mark.parametrize(("model", "width", "connections"), [("knn", 30, 1), ("dnn", 784, 4), ("null", 3, 8)])
def test_its_split_of_the_servers_time_is_ours(
    tree: Path, tmp_path: Path, model: str, width: int, connections: int
) -> None:
    with serving(tmp_path, *ALL) as running:
        found = measured(running, tree, model, width, connections)
        told: dict[str, Any] = running.call("GET", f"/v2/models/{model}/stats").json["model_stats"][0][
            "inference_stats"
        ]
        assert "error" not in running.log()
    assert told["success"]["count"] == REQUESTS
    assert told["fail"]["count"] == 0
    columns = {
        "Server Queue": "queue", "Server Compute Input": "compute_input", "Server Compute Infer": "compute_infer",
        "Server Compute Output": "compute_output",
    }  # fmt: skip
    for column, stage in columns.items():  # it counts in whole microseconds, window by window
        assert int(found[column]) == pytest.approx(told[stage]["ns"] / told[stage]["count"] / 1000, abs=1.01)
    assert float(found["Inferences/Second"]) > 0
