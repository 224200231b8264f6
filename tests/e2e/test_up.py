"""`up` and `locust -f loadtest/` as the README shows them, for every kind that this machine can run."""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.e2e.conftest import ISOLATENCY, ROOT

LOCUST = str(Path(sys.executable).parent / "locust")
SCRIPT = """
set -e
url=$({isolatency} up {kind})
echo "url $url"
{locust} -f loadtest/ --headless -u 4 -r 4 -t 6s --host $url --model knn --check 5 --request-timeout 60 \
    --csv {place}/st --samples {place}/s.parquet
{isolatency} down {kind}
"""


@pytest.mark.parametrize("kind", ["process", "docker", "uml", "qemu", "firecracker"])
def test_locust_drives_a_kept_target_without_a_failure(kind: str, able: dict[str, str], tmp_path: Path) -> None:
    if able[kind] != "yes":
        pytest.skip(f"{kind} cannot run here: {able[kind]}")
    script = SCRIPT.format(isolatency=ISOLATENCY, locust=LOCUST, kind=kind, place=tmp_path)
    done = subprocess.run(
        [ISOLATENCY, "sandbox", "--", "sh", "-c", script], capture_output=True, text=True, timeout=600, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    url = next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("url "))
    assert url.startswith("http://172.16.0.2:8080" if kind in ("uml", "qemu", "firecracker") else "http://1")
    label = re.search(rf"^(qemu-tcg|{kind}(?: \(nested\))?) answers after [0-9.]+ s$", done.stderr, re.MULTILINE)
    assert label, done.stderr
    assert label[1] == kind or kind in ("qemu", "firecracker")
    totals = pd.read_csv(tmp_path / "st_stats.csv").iloc[-1]
    assert totals["Request Count"] > 20 and totals["Failure Count"] == 0
    samples = pd.read_parquet(tmp_path / "s.parquet")
    assert set(samples["outcome"]) == {"ok"} and len(samples) >= totals["Request Count"]
