"""A master and its workers: what the master shows is what the workers measured, to the last bit; who is lost is named."""

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from loadtest._arrivals import parse, pieces
from loadtest._histogram import counts, middles_ns
from tests.e2e import raw
from tests.e2e.raw import Raw
from tests.e2e.test_locust import BOUND_S, LOCUST, ROOT, free_port, plain, wait_for

OWN_NETWORKS = """
mount -t tmpfs none /run && mkdir /run/netns && ip link set lo up
ip link add name br0 type bridge && ip addr add 10.9.0.1/24 dev br0 && ip link set br0 up
for i in 1 2; do
  ip netns add w$i && ip link add v$i type veth peer name e$i netns w$i && ip link set v$i master br0 up
  ip -n w$i addr add 10.9.0.1$i/24 dev e$i && ip -n w$i link set e$i up && ip -n w$i link set lo up
done
exec "$@"
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return raw.write_rows(folder)


def shown(folder: Path) -> dict[float, int]:
    """Locust's histogram of the one row that it shows."""
    (entry,) = json.loads((folder / "st.json").read_text())
    return {float(ms): n for ms, n in entry["response_times"].items()}


def measured(frames: list[pd.DataFrame]) -> dict[float, int]:
    found: Counter[float] = Counter()
    for frame in frames:
        ok = frame[frame.outcome == "ok"]
        found.update(dict(counts(middles_ns((ok.received_ns - ok.intended_ns).to_numpy(np.int64)) / 1e6)))
    return dict(found)


@contextlib.contextmanager
def distributed(
    folder: Path, url: str, *words: object, prefixes: tuple[tuple[str, ...], ...] = ((), ()), host: str = "127.0.0.1"
) -> Iterator[tuple[Any, list[Any]]]:
    """A master that drives `url`, and its workers, each behind the words that put it into its network."""
    port = free_port()
    common = {"cwd": folder, "stdin": subprocess.DEVNULL, "text": True}
    argv = [*LOCUST, "--headless", "--master", "--master-bind-host", host, "--master-bind-port", str(port)]
    argv += ["--expect-workers", str(len(prefixes)), "--host", url, *map(str, words)]
    master = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **common)
    workers = []
    try:
        for prefix in prefixes:
            argv = [*prefix, *LOCUST, "--worker", "--master-host", host, "--master-port", str(port)]
            workers.append(subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **common))
        yield master, workers
    finally:
        for process in (*workers, master):
            process.kill()
            process.wait()


@pytest.mark.parametrize("processes", [2, 4])
def test_merged_histograms_are_those_of_all_samples_bit_for_bit(tmp_path: Path, data: Path, processes: int) -> None:
    words = ("--processes", processes, "--samples", "s.parquet", "--json-file", "st", "--csv", "st", "--data", data)
    done = plain(tmp_path, Raw().url, *words, users=5, seconds=6)
    assert done.returncode == 0, done.stderr
    frames = [pd.read_parquet(path) for path in tmp_path.glob("s-*.parquet")]
    assert len(frames) == processes
    assert shown(tmp_path) == measured(frames)
    every = pd.concat(frames)
    stats = pd.read_csv(tmp_path / "st_stats.csv").iloc[0]
    assert stats["Request Count"] == len(every)
    ms = ((every.received_ns - every.intended_ns) / 1e6).to_numpy(float)
    for column, q in (("50%", 0.5), ("99%", 0.99), ("99.9%", 0.999), ("100%", 1.0)):
        assert stats[column] == pytest.approx(np.quantile(ms, q, method="inverted_cdf"), rel=0.0005)


NETWORKS = f"""
import sys
from pathlib import Path
from tests.e2e.test_locust import our_server
from tests.e2e.test_workers import distributed
folder = Path(sys.argv[1])
prefixes = (("ip", "netns", "exec", "w1"), ("ip", "netns", "exec", "w2"))
with our_server("knn", host="10.9.0.1") as (url, _):
    words = ("-u", 4, "-r", 4, "-t", "8s", "--scenario", "poisson", "--rate", 300, "--seed", 9)
    words += ("--samples", "s.parquet", "--json-file", "st")
    with distributed(folder, url, *words, prefixes=prefixes, host="10.9.0.1") as (master, workers):
        _, said = master.communicate(timeout={BOUND_S})
        for worker in workers:
            worker.wait(timeout=60)
print(said, file=sys.stderr)
sys.exit(master.returncode)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="makes network namespaces: run as root")
def test_a_master_and_two_workers_in_networks_of_their_own(tmp_path: Path) -> None:
    argv = ["unshare", "--net", "--mount", "sh", "-ec", OWN_NETWORKS, "sh", sys.executable, "-c", NETWORKS, tmp_path]
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, timeout=2 * BOUND_S, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    frames = [pd.read_parquet(tmp_path / f"s-{worker}.parquet") for worker in (0, 1)]
    assert shown(tmp_path) == measured(frames)
    offsets = np.concatenate(list(itertools.islice(pieces(parse("poisson-300"), 9), 1)))
    for worker, frame in enumerate(frames):
        gaps, share = np.diff(np.sort(frame.intended_ns)), np.diff(offsets[worker::2])
        assert (np.abs(gaps - share[: len(gaps)]) <= 1).all() and len(gaps) > 500
    for worker in (0, 1):
        facts = pq.read_metadata(tmp_path / f"s-{worker}.parquet").metadata
        assert facts[b"isolatency.encoding"] == b"binary" and facts[b"isolatency.load"] == b"poisson-300"
        ahead_ns, error_ns = (int(facts[b"isolatency.ahead_of_master" + end]) for end in (b"_ns", b"_error_ns"))
        assert 0 < error_ns < 10**9 and abs(ahead_ns) <= error_ns + 50_000
        found = re.search(
            rf"worker {worker} \(\S+\): its wall clock is (\S+) ms from the master's, .* ± (\S+) ms", done.stderr
        )
        assert found and abs(float(found[1])) <= float(found[2]) + 0.05  # one machine has one clock


@pytest.mark.parametrize("samples", ["s.csv", "s.parquet"])
def test_a_worker_that_dies_is_named_with_its_share_and_the_others_go_on(
    tmp_path: Path, data: Path, samples: str
) -> None:
    server = Raw()
    words = (
        "-u",
        4,
        "-r",
        4,
        "-t",
        "20s",
        "--scenario",
        "constant",
        "--rate",
        100,
        "--samples",
        samples,
        "--data",
        data,
    )
    with distributed(tmp_path, server.url, *words) as (master, workers):
        wait_for(lambda: server.requests > 600, "six hundred requests")
        workers[0].kill()
        _, said = master.communicate(timeout=BOUND_S)
    assert master.returncode == 1
    (line,) = (line for line in said.splitlines() if line.startswith("lost: "))
    assert re.match(r"lost: worker [01] \(\S+\) was last heard of \d+\.\d s after the begin", line)
    assert "its share, 1 of 2" in line
    read = pd.read_csv if samples == "s.csv" else pd.read_parquet
    frames = sorted((read(path) for path in tmp_path.glob("s-*")), key=len)
    assert len(frames) == 2
    assert len(frames[0]) > 100 and len(frames[1]) > 1.5 * len(frames[0])  # what the dead one wrote can be read
    gaps = [np.abs(np.diff(np.sort(frame.intended_ns)) - 20e6) for frame in frames]
    assert (gaps[0][:-10] <= 1).all()  # its last requests may have been answered in another order
    assert (gaps[1] <= 1).all()  # the other's share, without a gap
    assert set(frames[1].outcome) == {"ok"}
