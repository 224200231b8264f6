"""CPU per request of the engine beside Locust's FastHttpUser, in one interleaved run of a few seconds.

    python tests/bench/bench_client.py [--connections 16] [--seconds 0.5] [--rounds 4]

The floor server (floor_server.py, beside this) answers at once, so that what is seen is the client; put it on another
core with taskset where there is one. Prints figures and asserts nothing: they depend on the machine and its load.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gevent
import numpy as np
from locust import FastHttpUser, constant, task
from locust.env import Environment

from loadtest._connection import Connection, Work, resolve
from loadtest._engine import Engine
from loadtest._rows import Queries, Rows, prepare

Client = Callable[[float], int]  # seconds -> requests answered


def with_engine(url: str, queries: Queries, connections: int, check: int) -> Client:
    address = resolve(url)
    work = Work(address, queries, check)
    engine = Engine(10, lambda error: None)
    ours = [Connection(address, number, work) for number in range(connections)]
    return lambda seconds: len(engine.run_block(ours, seconds).raw)


def with_fast_http_user(url: str, queries: Queries, connections: int) -> Client:
    class Fast(FastHttpUser):
        host = url
        wait_time = constant(0)

        @task
        def infer(self) -> None:
            self.client.post("/v2/models/null/infer", data=queries.bodies[0])

    environment = Environment(user_classes=[Fast])
    runner = environment.create_local_runner()

    def run(seconds: float) -> int:
        runner.start(connections, connections)
        gevent.sleep(seconds)
        count = int(environment.stats.total.num_requests)
        runner.stop()
        return count

    return run


def measure(client: Client, seconds: float) -> tuple[float, float]:
    """CPU in µs per request, and requests per second."""
    cpu_s, start_s = time.process_time(), time.monotonic()
    count = max(client(seconds), 1)
    return (time.process_time() - cpu_s) / count * 1e6, count / (time.monotonic() - start_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=0.5, help="per client and round")
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("floor_server.py")], stdout=subprocess.PIPE, text=True
    )
    os.sched_setaffinity(server.pid, {cores[-1]})
    os.sched_setaffinity(0, {cores[0]})
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        queries = prepare(Rows("null", np.random.default_rng(1).random((500, 30), dtype=np.float32), None), 1, 1)
        clients = {
            "engine, every answer compared": with_engine(url, queries, given.connections, 1),
            "engine, every tenth": with_engine(url, queries, given.connections, 10),
            "FastHttpUser, none": with_fast_http_user(url, queries, given.connections),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in clients}
        for turn in range(given.rounds):
            for name in list(clients)[:: 1 if turn % 2 == 0 else -1]:
                found[name].append(measure(clients[name], given.seconds))
    finally:
        server.kill()
        server.wait()
    base = float(np.median(found["FastHttpUser, none"], axis=0)[0])
    print(f"{given.connections} connections, median of {given.rounds} rounds of {given.seconds:g} s each")
    for name, values in found.items():
        cpu_us, rate = np.median(values, axis=0)
        print(f"{name:32} {cpu_us:7.2f} µs CPU per request ({base / cpu_us:4.1f}×)   {rate:8.0f} requests/s")


if __name__ == "__main__":
    main()
