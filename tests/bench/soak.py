"""python -m tests.bench.soak [--requests 1000000] [--write]: does the server grow?

Mixed requests at full rate over 16 connections, each of which is closed after some and opened again, some in the middle
of a request; the server's file descriptors and memory are looked at 20 times. Prints them; asserts nothing. --write
puts them into docs/performance.md.
"""

import argparse
import asyncio
import gzip
import itertools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import psutil
import uvloop

from tests.bench.tables import show, table
from tests.unit.serving import DATA, Running, request, serving

CONNECTIONS = 16
PER_CONNECTION = 97  # requests, so that a connection ends at another kind each time
LOOKS = 20
BOUND_S = 300.0  # from one look to the next
MIB = 2**20


class Look(NamedTuple):
    """`fds` once all connections are closed; RSS in MiB."""

    requests: int
    seconds: float
    fds: int
    rss_mib: float


def whole(path: str, body: bytes = b"", *fields: str) -> bytes:
    method = "POST" if body else "GET"
    return (
        "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *fields, "", ""]).encode()
        + body
    )


def mixed() -> list[tuple[bytes, int]]:
    """Requests, and the status that each gets: of several models and sizes, in JSON and bytes, packed, and wrong ones."""
    knn, dnn = (np.load(DATA / f"{name}.npz")["rows"] for name in ("knn", "dnn"))

    def infer(model: str, body: bytes, *fields: str) -> bytes:
        return whole(f"/v2/models/{model}/infer", body, *fields)

    def as_json(rows: np.ndarray, **more: object) -> bytes:
        return json.dumps(request(rows, **more)).encode()

    size = {"binary_data_size": 4 * 30 * 120}
    head = json.dumps({"inputs": [{"name": "x", "shape": [120, 30], "datatype": "FP32", "parameters": size}], "parameters": {"binary_data_output": True}}).encode()  # fmt: skip
    found = [(infer("knn", as_json(knn[i : i + 1 + i % 3], id=str(i))), 200) for i in range(20)]
    found += [(infer("knn", as_json(knn[i : i + 2], parameters={"k": 3 + i % 4})), 200) for i in range(6)]
    found += [(infer("null", as_json(np.ones((1, 1 + i)))), 200) for i in range(10)]
    found += [(infer("dnn", as_json(dnn[i : i + 1])), 200) for i in range(2)]
    found += [(infer("knn", head + knn[:120].tobytes(), f"Inference-Header-Content-Length: {len(head)}"), 200)]
    found += [(infer("knn", gzip.compress(as_json(knn[:50])), "Content-Encoding: gzip", "Accept-Encoding: gzip"), 200)]
    found += [
        (infer("knn", b"{"), 400),
        (infer("ghost", b"{}"), 404),
        (whole("/v2/health/ready"), 200),
        (whole("/v2/models/knn"), 200),
    ]
    found += [(infer("knn", as_json(knn[:1], parameters={"k": 0})), 400), (whole("/v2/models/knn/infer"), 405)]
    return found


class _Client(asyncio.Protocol):
    """Asks what it is given, one after the other, and counts what is answered otherwise than it should be."""

    def __init__(self, asked: Iterator[tuple[bytes, int]], told: Counter[str], count: int, leave: bool) -> None:
        self._asked, self._told, self._left, self._leave = asked, told, count, leave
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._had = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._next()

    def _next(self) -> None:
        sent, self._wanted = next(self._asked)
        self._left -= 1
        if self._left < 0:
            if self._leave:
                self._transport.write(sent[: len(sent) // 2])
            self._transport.close()
            return
        self._transport.write(sent)

    def data_received(self, data: bytes) -> None:
        self._had += data
        end = self._had.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        at = self._had.find(b"Content-Length: ", 0, end) + 16
        if len(self._had) < end + int(self._had[at : self._had.find(b"\r", at)]):
            return
        status = int(self._had[9:12])
        self._told["right" if status == self._wanted else f"{status} for {self._wanted}"] += 1
        self._had = b""
        self._next()

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None or self._left > -1:
            self._told["connections lost"] += 1
        self.over.set_result(None)


async def _ask(running: Running, count: int, told: Counter[str]) -> None:
    """`count` requests over CONNECTIONS at a time."""
    loop = asyncio.get_running_loop()
    asked = itertools.cycle(mixed())
    todo = [PER_CONNECTION] * (count // PER_CONNECTION) + [count % PER_CONNECTION]

    async def line(number: int) -> None:
        while todo:
            _, client = await loop.create_connection(
                lambda: _Client(asked, told, todo.pop(), leave=len(todo) % 10 == number % 10), *running.address
            )
            await client.over

    async with asyncio.timeout(BOUND_S):
        await asyncio.gather(*map(line, range(CONNECTIONS)))


def soak(running: Running, requests: int, looks: int = LOOKS) -> tuple[list[Look], Counter[str]]:
    """What the server held after each part of so many requests, and what became of them."""
    process, told, start = psutil.Process(running.process.pid), Counter(), time.monotonic()
    found = []
    for _ in range(looks):
        uvloop.run(_ask(running, requests // looks, told))
        time.sleep(0.2)  # the server has seen that all are closed
        found.append(
            Look(sum(told.values()), time.monotonic() - start, process.num_fds(), process.memory_info().rss / MIB)
        )
    return found, told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    models = ["--model", "knn", "--model", "dnn", "--model", "null"]
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), *models) as running:
        looks, told = soak(running, chosen.requests)
    rows = [(f"{one.requests:,}", f"{one.seconds:.0f}", str(one.fds), f"{one.rss_mib:.1f}") for one in looks]
    text = table(("requests", "s", "file descriptors", "RSS MiB"), rows)
    text += (
        f"\n\nAnswered as they should be: {told['right']:,} of {told.total():,}. "
        f"From the first look to the last RSS grew by {looks[-1].rss_mib - looks[0].rss_mib:.1f} MiB; the aim is 2."
    )
    show("soak", text, chosen.write)


if __name__ == "__main__":
    main()
