"""The engine beside wrk, Locust's own users, hey, vegeta and oha, against nginx with a fixed answer.

    python -m tests.bench.bench_client [--rounds 7] [--seconds 1] [--connections 16] [--write]

Wants wrk and nginx (Debian: wrk, nginx-light). hey (Debian: hey), vegeta and oha take part where they are on the PATH, or
in .peers/bin, where `make peers-load` puts the last two. One interleaved run: in every round each client has its turn, in
another order each, and a ratio is that of one round. nginx has one core, the client another. All send the same request;
the engine compares every answer, records every request and takes the kernel's stamps, the others do none of that. CPU is
the client's own, user and system, while it sends.
--write puts the table into docs/performance.md.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.bench.tables import show, spread, table

ROOT = Path(__file__).resolve().parents[2]
PATH = "/v2/models/null/infer"
ROW = ", ".join(f"{value:.7f}" for value in np.random.default_rng(1).random(30))
BODY = f'{{"inputs":[{{"name":"x","shape":[1,30],"datatype":"FP32","data":[{ROW}]}}]}}'
ANSWER = '{"model_name":"null","outputs":[{"name":"rows","datatype":"INT64","shape":[1],"data":[1]}]}'
RATE = 2000
PEERS = ("hey", "vegeta", "oha")
NGINX = """
daemon off; master_process off; error_log %(folder)s/log; pid %(folder)s/pid; events { worker_connections 4096; }
http {
  access_log off; keepalive_requests 1000000000; keepalive_timeout 3600;
  client_body_temp_path %(folder)s/1; proxy_temp_path %(folder)s/2; fastcgi_temp_path %(folder)s/3;
  uwsgi_temp_path %(folder)s/4; scgi_temp_path %(folder)s/5;
  server {
    listen 127.0.0.1:%(port)d; default_type application/json;
    location / { return 200 '%(answer)s'; }
  }
}
"""


class Shot(NamedTuple):
    """`p50_us` is NaN where the client does not say it."""

    cpu_us: float
    rps: float
    p50_us: float


# Clients that are Python: each shot is a process of its own, which says what it did.


def engine(url: str, connections: int, seconds: float, rate: float, spin_us: float) -> dict[str, Any]:
    import gc

    from loadtest import _arrivals, _samples
    from loadtest._arrivals import Load, Schedule
    from loadtest._connection import Connection, Work, resolve
    from loadtest._encoding import Body
    from loadtest._engine import Engine
    from loadtest._rows import Queries

    address = resolve(url)
    work = Work(address, Queries("null", 30, (Body(BODY.encode()),), "rows", ((1,),)), 1)
    driver = Engine(10, lambda error: None, round(spin_us * 1000))
    ours = [Connection(address, number, work) for number in range(connections)]
    gc.collect()
    gc.freeze()
    driver.run_block(ours, 0.2)
    driver.take()
    driver.take_pace()
    made = _arrivals.pieces(Load("", "poisson", rate=rate), 1) if rate else None
    cpu_s, start_s = time.process_time(), time.monotonic()
    driver.run_block(ours, seconds, (lambda at: Schedule(made, at, before_ns=round(seconds * 1e9))) if made else None)
    raw = driver.take()  # the working out of stamps and stages belongs to the engine's cost
    cpu_s, took_s = time.process_time() - cpu_s, time.monotonic() - start_s
    assert (raw[:, _samples.OUTCOME] == _samples.OK).all()
    sent, first, ended = (raw[:, column] for column in (_samples.SENT, _samples.FIRST, _samples.ENDED))
    late = driver.take_pace().late_ns
    return {
        "requests": len(raw), "cpu_s": cpu_s, "took_s": took_s, "p50_us": float(np.median(ended - sent)) / 1000,
        "own_share": float(np.median((ended - first)[first > 0]) / np.median(ended - sent)),
        "late_us": (np.quantile(late, (0.5, 0.99)) / 1000).tolist() if len(late) else [],
    }  # fmt: skip


def locust_user(kind: str, url: str, connections: int, seconds: float) -> dict[str, Any]:
    import gevent
    import locust
    from locust import constant, task
    from locust.env import Environment

    class Asking(getattr(locust, kind)):  # type: ignore[misc]
        host = url
        wait_time = constant(0)

        @task
        def infer(self) -> None:
            self.client.post(PATH, data=BODY, headers={"Content-Type": "application/json"})

    environment = Environment(user_classes=[Asking])
    runner = environment.create_local_runner()
    runner.start(connections, connections)
    gevent.sleep(0.5)
    before, cpu_s, start_s = environment.stats.total.num_requests, time.process_time(), time.monotonic()
    gevent.sleep(seconds)
    cpu_s, took_s = time.process_time() - cpu_s, time.monotonic() - start_s
    total = environment.stats.total
    found = {"requests": total.num_requests - before, "cpu_s": cpu_s, "took_s": took_s}
    assert not total.num_failures
    runner.quit()
    return found | {"p50_us": float("nan")}


# The other side: what starts them, and the servers' and peers' own words.


@contextlib.contextmanager
def nginx(core: int) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        conf = Path(folder) / "conf"
        conf.write_text(NGINX % {"folder": folder, "port": port, "answer": ANSWER})
        process = subprocess.Popen(["taskset", "-c", str(core), "nginx", "-p", folder, "-c", conf])
        try:
            end = time.monotonic() + 30
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(10)


def python(name: str, url: str, connections: int, seconds: float, core: int, *more: str) -> dict[str, Any]:
    argv = [
        "taskset", "-c", str(core), sys.executable, "-m", "tests.bench.bench_client", "--client", name, "--url", url,
        "--connections", str(connections), "--seconds", str(seconds), *more,
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60 + 5 * seconds, cwd=ROOT)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def peer(name: str, url: str, connections: int, seconds: float, folder: Path) -> tuple[list[str], str, str, float]:
    """The command; patterns of the number of requests and of p50; how many µs its unit has (0: stands beside it)."""
    (folder / "body").write_text(BODY)
    lua = f'wrk.method="POST"\nwrk.headers["Content-Type"]="application/json"\nwrk.body=[[{BODY}]]\n'
    (folder / "post.lua").write_text(lua)
    (folder / "target").write_text(f"POST {url}{PATH}\nContent-Type: application/json\n@{folder}/body\n")
    n, s = str(connections), f"{seconds:g}s"
    kind = ["-H", "Content-Type: application/json"]
    return {
        "wrk": (
            ["wrk", "-t1", f"-c{n}", f"-d{s}", "--latency", "-s", f"{folder}/post.lua", url + PATH],
            r"(\d+) requests in", r"50%\s+([\d.]+)(us|ms|s)\b", 0.0,
        ),
        "hey": (
            ["hey", "-z", s, "-c", n, "-cpus", "1", "-m", "POST", "-T", "application/json", "-D", f"{folder}/body",
             url + PATH],
            r"\[200\]\s+(\d+) responses", r"50% in ([\d.]+) secs", 1e6,
        ),
        "vegeta": (
            ["sh", "-c", f"vegeta -cpus 1 attack -targets {folder}/target -rate 0 -max-workers {n} -workers {n} "
             f"-duration {s} | vegeta report"],
            r"Requests\s+\[[^]]*\]\s+(\d+),", r"Latencies.*\]\s+[^,]+, [^,]+, ([\d.]+)(µs|ms|s)", 0.0,
        ),
        "oha": (
            ["oha", "--no-tui", "-z", s, "-c", n, "-m", "POST", *kind, "-D", f"{folder}/body", url + PATH],
            r"\[200\]\s+(\d+) responses", r"50\.00% in ([\d.]+) (ns|us|ms|sec)", 0.0,
        ),
    }[name]  # fmt: skip


def shoot_peer(name: str, url: str, connections: int, seconds: float, core: int, folder: Path) -> Shot:
    argv, count, p50, unit_us = peer(name, url, connections, seconds, folder)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start_s = time.monotonic()
    done = subprocess.run(
        ["taskset", "-c", str(core), *argv], capture_output=True, text=True, check=True, timeout=60 + 5 * seconds
    )
    took_s, after = time.monotonic() - start_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    requests, middle = re.search(count, done.stdout), re.search(p50, done.stdout)
    if requests is None or "Non-2xx" in done.stdout or "Socket errors" in done.stdout:
        raise RuntimeError(f"{name} said: {done.stdout}{done.stderr}")
    if middle is not None and not unit_us:
        unit_us = {"ns": 1e-3, "us": 1.0, "µs": 1.0, "ms": 1e3, "s": 1e6, "sec": 1e6}[middle[2]]
    value_us = float(middle[1]) * unit_us if middle else float("nan")
    return Shot(cpu_s * 1e6 / int(requests[1]), int(requests[1]) / min(took_s, seconds + 0.1), value_us)


def shoot(name: str, url: str, connections: int, seconds: float, core: int, folder: Path) -> Shot:
    if name in ("engine", "FastHttpUser", "HttpUser"):
        found = python(name, url, connections, seconds, core)
        requests = max(found["requests"], 1)
        return Shot(found["cpu_s"] * 1e6 / requests, requests / found["took_s"], found["p50_us"])
    return shoot_peer(name, url, connections, seconds, core, folder)


def contest(args: argparse.Namespace, folder: Path) -> str:
    cores = sorted(os.sched_getaffinity(0))
    names = ["wrk", "engine", "FastHttpUser", "HttpUser"]
    names += [name for name in PEERS if shutil.which(name)]
    many: dict[str, list[Shot]] = {name: [] for name in names}
    alone: dict[str, list[Shot]] = {name: [] for name in names if name not in ("FastHttpUser", "HttpUser")}
    timed: dict[int, list[dict[str, Any]]] = {0: [], 200: []}
    own: dict[int, list[float]] = {1: [], args.connections: []}
    with nginx(cores[-1]) as url:
        for round_ in range(args.rounds):
            order = list(names)
            random.Random(round_).shuffle(order)
            for name in order:
                many[name].append(shoot(name, url, args.connections, args.seconds, cores[0], folder))
                if name in alone:
                    alone[name].append(shoot(name, url, 1, args.seconds, cores[0], folder))
            for spin_us, found in timed.items():
                more = ("--rate", str(RATE), "--spin-us", str(spin_us))
                found.append(python("engine", url, args.connections, args.seconds, cores[0], *more))
            for connections, shares in own.items():
                shares.append(python("engine", url, connections, args.seconds, cores[0])["own_share"])
    rows = []
    for name, shots in many.items():
        ratios = [
            spread([getattr(a, field) / getattr(b, field) for a, b in zip(shots, many["wrk"], strict=True)])
            for field in ("cpu_us", "rps")
        ]
        one = spread([shot.p50_us for shot in alone[name]], ".0f") if name in alone else ""
        middle = np.median(shots, axis=0)
        rows.append([name, f"{middle[0]:.1f}", ratios[0], f"{middle[1]:,.0f}", ratios[1], one])
    head = [
        "client",
        "CPU, µs per request",
        "CPU / wrk's",
        "requests/s",
        "requests/s / wrk's",
        "p50 at 1 connection, µs",
    ]
    fast = spread([a.cpu_us / b.cpu_us for a, b in zip(many["FastHttpUser"], many["engine"], strict=True)], ".1f")
    bound = spread([a.cpu_us / b.cpu_us for a, b in zip(many["FastHttpUser"], many["wrk"], strict=True)], ".1f")
    lines = [
        table(head, rows),
        "",
        f"FastHttpUser's CPU per request over the engine's: {fast}. Aims: the engine's CPU at most 2.0 × wrk's, "
        "FastHttpUser's at least 12 × the engine's, the engine's requests/s at least 0.5 × wrk's. A client as cheap as "
        f"wrk would reach {bound} here: most of what both cost is the kernel's.",
        "",
        *(
            f"Poisson arrivals, {RATE}/s, spin {spin_us} µs: woken late by p50 "
            f"{spread([one['late_us'][0] for one in found], '.1f')} µs, p99 "
            f"{spread([one['late_us'][1] for one in found], '.0f')} µs."
            for spin_us, found in timed.items()
        ),
        "",
        "The client's own share of p50, from the kernel's stamp to user space: "
        + ", ".join(f"{spread(values)} at {n} connections" for n, values in own.items())
        + ".",
        "",
        f"{args.connections} connections unless said; {args.rounds} rounds of {args.seconds:g} s; median and quartiles; "
        f"{platform.machine()}, {len(cores)} cores, Python {platform.python_version()}. Not installed: "
        f"{', '.join(name for name in PEERS if name not in names) or 'none'}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--seconds", type=int, default=1, help="per client and round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    for name, kind in (("client", str), ("url", str), ("rate", float), ("spin-us", float)):
        parser.add_argument(f"--{name}", type=kind, default=kind(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["PATH"] += f":{ROOT}/.peers/bin"
    if args.client == "engine":
        print(json.dumps(engine(args.url, args.connections, args.seconds, args.rate, args.spin_us)))
    elif args.client:
        print(json.dumps(locust_user(args.client, args.url, args.connections, args.seconds)))
    else:
        missing = [name for name in ("wrk", "nginx", "taskset") if not shutil.which(name)]
        if missing:
            sys.exit(f"bench_client wants {', '.join(missing)}: apt-get install wrk nginx-light util-linux")
        with tempfile.TemporaryDirectory() as folder:
            text = contest(args, Path(folder))
        show("engine", text, args.write)


if __name__ == "__main__":
    main()
