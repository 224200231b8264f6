"""The server beside a bare aiohttp handler, FastAPI and MLServer with the same models, under wrk.

    python -m tests.bench.bench_server [--peers PYTHON] [--rounds 9] [--seconds 1] [--write]

One interleaved run: in every round each contestant has its turn, in another order each; a ratio is that of one round.
Servers have one core, wrk another. CPU is the server's own, user and system. PYTHON is an interpreter that has the
packages of tests/bench/peers.txt; without it the table says that those did not run. --write puts the table into
docs/performance.md.
"""

import argparse
import contextlib
import http.client
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

import numpy as np
import psutil

from loadtest import _cpu
from server import protocol
from tests.bench.bare_server import Work
from tests.bench.tables import show, spread, table

ROOT = Path(__file__).resolve().parents[2]
PORT = 9_100
READY_S = 60.0
KNN_10K = "tests/bench/knn_10k.py:Knn10k"


class Shot(NamedTuple):
    rps: float
    p50_us: float
    cpu_us: float


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")}
    return kept | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def started(commands: dict[str, list[str]], core: int, ports: dict[str, int]) -> Iterator[dict[str, psutil.Process]]:
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            argv = ["taskset", "-c", str(core), *command]
            processes[name] = subprocess.Popen(
                argv, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        yield {name: psutil.Process(process.pid) for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def answers(url: str, body: bytes) -> bytes:
    """The answer to the first request that is answered. Raises OSError after READY_S."""
    end = time.monotonic() + READY_S
    while True:
        try:
            with urlopen(Request(url, body, {"Content-Type": "application/json"}), timeout=10) as found:
                return bytes(found.read())
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def shoot(url: str, script: Path, connections: int, seconds: float, core: int, server: psutil.Process) -> Shot:
    before = _cpu.read([server.pid])
    argv = [
        "taskset",
        "-c",
        str(core),
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds:g}s",
        "--latency",
        "-s",
        str(script),
    ]
    said = subprocess.run([*argv, url], capture_output=True, text=True, check=True, timeout=seconds * 5 + 30).stdout
    cpu_us = _cpu.between_us(before, _cpu.read([server.pid]))
    if "Non-2xx" in said or "Socket errors" in said:
        raise RuntimeError(f"wrk saw errors at {url}: {said}")
    count = re.search(r"(\d+) requests in ([\d.]+)s", said)
    p50 = re.search(r"50%\s+([\d.]+)(us|ms|s)\b", said)
    assert count and p50 and cpu_us is not None, said
    requests, took_s = int(count[1]), float(count[2])
    unit = {"us": 1.0, "ms": 1e3, "s": 1e6}[p50[2]]
    return Shot(requests / took_s, float(p50[1]) * unit, cpu_us / requests)


def body(width: int) -> bytes:
    row = [round(float(value), 4) for value in np.random.default_rng(2).standard_normal(width)]
    tensor = {"name": "x", "shape": [1, width], "datatype": "FP32", "data": row}
    return json.dumps({"inputs": [tensor]}).encode()


def contest(
    word: str, width: int, connections: int, commands: dict[str, list[str]], args: argparse.Namespace
) -> dict[str, list[Shot]]:
    """Rounds of shots by contestant. `PORT` in a command is replaced by its port."""
    cores = sorted(os.sched_getaffinity(0))
    ports = {name: PORT + number for number, name in enumerate(commands)}
    commands = {name: [part.replace("PORT", str(ports[name])) for part in parts] for name, parts in commands.items()}
    name = "knn_10k" if word == KNN_10K else word
    urls = {one: f"http://127.0.0.1:{port}/v2/models/{name}/versions/1/infer" for one, port in ports.items()}
    sent = body(width)
    shots: dict[str, list[Shot]] = {one: [] for one in commands}
    with tempfile.TemporaryDirectory() as folder, started(commands, cores[-1], ports) as servers:
        script = Path(folder) / "post.lua"
        script.write_text(
            f'wrk.method="POST"\nwrk.headers["Content-Type"]="application/json"\nwrk.body=[[{sent.decode()}]]\n'
        )
        found = {one: json.loads(answers(url, sent))["outputs"] for one, url in urls.items()}
        data = {one: [output["data"] for output in outputs] for one, outputs in found.items()}
        if len({json.dumps(values) for values in data.values()}) > 1:
            raise RuntimeError(f"the servers answer differently: {data}")
        order = list(commands)
        for round_ in range(args.rounds + 1):
            random.Random(round_).shuffle(order)
            for one in order:
                shot = shoot(urls[one], script, connections, args.seconds, cores[0], servers[one])
                if round_:  # the first warms up
                    shots[one].append(shot)
    return shots


def ratios(shots: dict[str, list[Shot]], over: str, under: str, field: str) -> str:
    pairs = zip(shots[over], shots[under], strict=True)
    return spread([getattr(a, field) / getattr(b, field) for a, b in pairs])


def parse_ratio(rounds: int) -> str:
    model = Work("dnn").model
    row = np.random.default_rng(3).random((1, 784), dtype=np.float32)
    tensor = {"name": "x", "shape": [1, 784], "datatype": "FP32"}
    plain = json.dumps({"inputs": [tensor | {"data": row.ravel().tolist()}]}).encode()
    head = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": row.nbytes}}]}).encode()
    binary, length = head + row.tobytes(), str(len(head))

    def took(content: bytes, json_bytes: str | None) -> float:
        start = time.perf_counter()
        for _ in range(200):
            protocol.parse(content, model, json_bytes)
        return time.perf_counter() - start

    return spread([took(binary, length) / took(plain, None) for _ in range(rounds)])


def start_s(core: int) -> tuple[float, float]:
    """Seconds from the start of the null model's server to its first answer, and its resident MiB then."""
    port = PORT + 50
    start = time.monotonic()
    argv = ["taskset", "-c", str(core), sys.executable, "-m", "server", "--model", "null", "--port", str(port)]
    with started({"one": argv[3:]}, core, {}) as servers:
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5).read()
                return time.monotonic() - start, servers["one"].memory_info().rss / 2**20
            except OSError:
                if time.monotonic() - start > READY_S:
                    raise
                time.sleep(0.002)


def health_ms(core: int, asked: int = 300) -> float:
    """The p99 of answers to a health check, beside a model that is busy for 50 ms in every call, without pause."""
    port, over = PORT + 51, threading.Event()
    command = [sys.executable, "-m", "server", "--model", "spin", "--spin-us", "50000", "--port", str(port)]

    def load() -> None:
        while not over.is_set():
            answers(f"http://127.0.0.1:{port}/v2/models/spin/infer", body(1))

    with started({"one": command}, core, {}):
        answers(f"http://127.0.0.1:{port}/v2/models/spin/infer", body(1))
        loading = [threading.Thread(target=load) for _ in range(2)]
        for one in loading:
            one.start()
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        took = []
        for _ in range(asked):
            time.sleep(0.005)
            start = time.monotonic()
            line.request("GET", "/v2/health/ready")
            line.getresponse().read()
            took.append((time.monotonic() - start) * 1e3)
        over.set()
        for one in loading:
            one.join()
        line.close()
    return float(np.quantile(took, 0.99))


def numpy_mib() -> float:
    code = "import numpy, psutil; print(psutil.Process().memory_info().rss / 2**20)"
    return float(
        subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, check=True).stdout
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", help="a Python that has FastAPI, uvicorn and MLServer")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    ours = [sys.executable, "-m", "server", "--port", "PORT", "--model"]
    bare = [sys.executable, "-m", "tests.bench.bare_server"]

    commands = {"ours": [*ours, "null"], "bare": [*bare, "null", "PORT"]}
    null = contest("null", 30, 1, commands, args)
    rows = [["null, JSON, 1 connection: p50 over the bare handler's", "≤ 1.2", ratios(null, "ours", "bare", "p50_us")]]

    # With one connection what it takes to wake up, which varies, would be a part of the difference.
    commands = {"ours": [*ours, "null"], "untimed": [*ours, "null", "--no-timing"]}
    timed = contest("null", 30, 16, commands, args)
    pairs = zip(timed["ours"], timed["untimed"], strict=True)
    rows.append(["null, 16 connections: CPU µs per request that Server-Timing adds", "≤ 4",
                 spread([a.cpu_us - b.cpu_us for a, b in pairs], ".1f")])  # fmt: skip

    commands = {"ours": [*ours, "knn"], "bare": [*bare, "knn", "PORT"]}
    if args.peers:
        commands["fastapi"] = [args.peers, "-m", "tests.bench.peer_fastapi", "knn", "PORT"]
        commands["mlserver"] = [args.peers, "-m", "tests.bench.peer_mlserver", "knn", "PORT"]
    knn = contest("knn", 30, 16, commands, args)
    what = "knn, JSON, 16 connections: CPU per request"
    rows.append([f"{what}, over the bare handler's", "≤ 1.15", ratios(knn, "ours", "bare", "cpu_us")])
    for peer, aim in (("fastapi", "≥ 1.3"), ("mlserver", "≥ 3")):
        rows.append(
            [f"{what}, {peer}'s over ours", aim, ratios(knn, peer, "ours", "cpu_us") if args.peers else "not run"]
        )

    commands = {"ours": [*ours, KNN_10K], "single": [*ours, KNN_10K, "--max-batch", "1"]}
    if args.peers:
        commands["mlserver"] = [args.peers, "-m", "tests.bench.peer_mlserver", KNN_10K, "PORT"]
    large = contest(KNN_10K, 64, 16, commands, args)
    what = "KNN of 10,000 × 64, 16 connections: requests/s"
    rows.append([f"{what}, batched over unbatched", "≥ 1.4", ratios(large, "ours", "single", "rps")])
    rows.append(
        [f"{what}, over MLServer's", "≥ 5", ratios(large, "ours", "mlserver", "rps") if args.peers else "not run"]
    )

    rows.append(["784 numbers: parsing binary over parsing JSON", "≤ 0.1", parse_ratio(args.rounds * 3)])
    core, base_mib = sorted(os.sched_getaffinity(0))[-1], numpy_mib()
    starts = [start_s(core) for _ in range(args.rounds)]
    rows.append(["null: start to ready, ms", "≤ 350", spread([start * 1e3 for start, _ in starts], ".0f")])
    rows.append(["null: resident at the start beyond NumPy's own, MiB", "≤ 60",
                 spread([mib - base_mib for _, mib in starts], ".0f")])  # fmt: skip
    rows.append(
        ["health beside a model of 50 ms a call: p99, ms", "≤ 5", spread([health_ms(core) for _ in range(3)], ".1f")]
    )
    text = table(["what", "aim", "measured, median and quartiles"], rows)
    shots = [
        [f"{model}, {one}", *(spread([getattr(shot, field) for shot in found], ".0f") for field in Shot._fields)]
        for model, contested in (
            ("null, 1 connection", null),
            ("null, 16", timed),
            ("knn, 16", knn),
            ("KNN 10k, 16", large),
        )
        for one, found in contested.items()
    ]
    text += "\n\n" + table(["model, connections, server", "requests/s", "p50 µs", "CPU µs per request"], shots)
    text += (
        f"\n\n{args.rounds} rounds of {args.seconds:g} s each, {platform.processor() or platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}."
    )
    show("server", text, args.write)


if __name__ == "__main__":
    main()
