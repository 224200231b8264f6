"""What the server grants at most: each limit is kept, is a flag, is written down, and does not disturb the others."""

import asyncio
import contextlib
import functools
import gzip
import json
import re
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from server.connection import Connections
from server.limits import Limits, flags
from server.metrics import Exposition
from tests.unit.serving import DATA, ROOT, Answer, Running, exchange, request, serving, wait_for
from tests.unit.test_server_batching import Gate, hold, own
from tests.unit.test_server_errors import parse, refused

INFER = "/v2/models/knn/infer"
HEAD = f"POST {INFER} HTTP/1.1\r\nHost: x\r\n"
GOOD = json.dumps(request(np.load(DATA / "knn.npz")["rows"][:1])).encode()
MIB = 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    arguments = ["--max-body-mib", "1", "--max-headers", "20", "--max-header-bytes", "1000", "--max-bodies-mib", "8"]
    with serving(tmp_path_factory.mktemp("server"), "--model", "knn", "--model", "null", *arguments) as running:
        yield running
        assert running.call("POST", INFER, GOOD).status == 200
        assert "error" not in running.log()


def rss_mib(running: Running) -> float:
    return float(psutil.Process(running.process.pid).memory_info().rss / MIB)


def errors(running: Running) -> dict[int, float]:
    text = running.call("GET", "/metrics").body.decode()
    return {int(status): float(n) for status, n in re.findall(r'isolatency_errors_total\{status="(\d+)"\} (\S+)', text)}


@functools.cache
def zeros_mib(count: int, coding: str) -> bytes:
    packer = zlib.compressobj(9, wbits={"gzip": 31, "deflate": 15, "bare deflate": -15}[coding])
    return b"".join([*(packer.compress(bytes(MIB)) for _ in range(count)), packer.flush()])


def test_limits_are_flags_that_help_and_the_documentation_name_with_their_defaults() -> None:
    told = subprocess.run([sys.executable, "-m", "server", "--help"], capture_output=True, text=True, cwd=ROOT).stdout
    told = " ".join(told.split())
    rows = re.findall(r"^\| `(--[a-z-]+)` \| (\S+) \| (.+) \|$", (ROOT / "docs" / "server.md").read_text(), re.M)
    known = [(f"--{name.replace('_', '-')}", str(default), text) for name, (_, default, _, text) in flags().items()]
    assert rows == known
    for flag, default, text in known:
        assert f"{flag} N {text} (default: {default})" in told


@pytest.mark.parametrize("name", list(flags()))
def test_a_limit_below_its_least_value_is_refused(name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    done = subprocess.run(
        [sys.executable, "-m", "server", "--model", "null", flag, "-0.5"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert flag in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("model", ["knn", "null", "ghost"])
def test_a_body_above_the_limit_is_read_briefly_and_answered(server: Running, model: str) -> None:
    """The client sees the answer, though it sends all before it reads."""
    answer = server.call("POST", f"/v2/models/{model}/infer", b" " * (5 * MIB))
    refused(answer, 413)
    assert answer.headers["connection"] == "close"
    refused(server.call("POST", "/v2/repository/index", b" " * MIB), 400, "32768 bytes")


def test_a_length_above_the_limit_is_refused_before_the_body(server: Running) -> None:
    answer = parse(server.raw(f"{HEAD}Content-Length: {10**15}\r\n\r\n".encode()))
    refused(answer, 413, "1 MiB")


@pytest.mark.parametrize("coding", ["gzip", "deflate", "bare deflate"])
def test_bombs(server: Running, coding: str) -> None:
    bomb = zeros_mib(1024, coding)
    assert len(bomb) < 2 * MIB
    before = rss_mib(server)
    sent = bomb if len(bomb) < MIB else bomb[: MIB - 1]
    for _ in range(5):
        refused(server.call("POST", INFER, sent, Content_Encoding=coding.split()[-1]), 413)
    assert rss_mib(server) < before + 60


def test_what_unpacks_to_the_limit_is_read_and_a_byte_more_is_not(server: Running) -> None:
    for coding, pack in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        body = GOOD + b" " * (MIB - len(GOOD))
        assert server.call("POST", INFER, pack(body), Content_Encoding=coding).status == 200
        refused(server.call("POST", INFER, pack(body + b" "), Content_Encoding=coding), 413)
    bare = zlib.compressobj(wbits=-15)
    assert server.call("POST", INFER, bare.compress(GOOD) + bare.flush(), Content_Encoding="deflate").status == 200


@pytest.mark.parametrize("body", [gzip.compress(GOOD)[:-5], gzip.compress(GOOD) * 2, GOOD, b"", b"\x1f\x8b"])
def test_what_cannot_be_unpacked_whole(server: Running, body: bytes) -> None:
    refused(server.call("POST", INFER, body, Content_Encoding="gzip"), 400, "gzip")


def test_a_coding_that_is_not_known(server: Running) -> None:
    for coding in ("br", "zstd", "gzip, gzip", "x"):
        refused(server.call("POST", INFER, GOOD, Content_Encoding=coding), 415, coding)
    assert server.call("POST", INFER, GOOD, Content_Encoding="identity").status == 200


def test_all_bodies_together_are_bounded(server: Running) -> None:
    """Ten clients hold back the last byte of a large body: some are told to come again, the rest are answered."""
    body = GOOD + b" " * (MIB - len(GOOD))
    before = rss_mib(server)
    with contextlib.ExitStack() as kept:
        lines = [kept.enter_context(socket.create_connection(server.address, timeout=60)) for _ in range(10)]
        for line in lines:
            with contextlib.suppress(OSError):
                line.sendall(f"{HEAD}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body[:-1])
        assert server.call("POST", INFER, GOOD).status == 200
        found = []
        for line in lines:
            with contextlib.suppress(OSError):
                line.sendall(body[-1:])
            found.append(parse(b"".join(iter(lambda line=line: line.recv(65536), b""))))
    assert sorted(one.status for one in found) == [200] * 8 + [503] * 2 or sorted(
        one.status for one in found) == [200] * 7 + [503] * 3  # fmt: skip
    for one in found:
        if one.status == 503:
            refused(one, 503, "8 MiB")
            assert int(one.headers["retry-after"]) >= 1
    assert rss_mib(server) < before + 60
    for _ in range(10):  # they are given back
        assert server.call("POST", INFER, body).status == 200


def test_answers_that_nobody_takes_are_bounded_together_with_the_bodies(tmp_path: Path) -> None:
    """Small requests of answers of 17 MiB each, of which nobody reads more than the first bytes."""
    rows = np.resize(np.load(DATA / "knn.npz")["rows"], (2000, 30))
    said = {"inputs": [{"name": "x", "shape": [2000, 30], "datatype": "FP32", "parameters": {"binary_data_size": rows.nbytes}}], "outputs": [{"name": "neighbours"}, {"name": "distances"}], "parameters": {"k": 569, "binary_data_output": True}}  # fmt: skip
    head = json.dumps(said).encode()
    fields = f"Inference-Header-Content-Length: {len(head)}\r\nContent-Length: {len(head) + rows.nbytes}\r\n\r\n"
    with serving(tmp_path, "--model", "knn", "--max-bodies-mib", "64", "--send-timeout", "600") as running:
        with contextlib.ExitStack() as kept:
            statuses = []
            for _ in range(10):
                line = kept.enter_context(socket.create_connection(running.address, timeout=60))
                line.sendall((HEAD + fields).encode() + head + rows.tobytes())
                statuses.append(line.recv(12)[-3:])
            assert statuses == [b"200"] * 3 + [b"503"] * 7
            assert rss_mib(running) < 250

        def again() -> Answer:
            return running.call("POST", INFER, head + rows.tobytes(), Inference_Header_Content_Length=str(len(head)))

        wait_for(lambda: again().status == 200, "the memory to be given back")
        assert [again().status for _ in range(10)] == [200] * 10


def test_header_fields_are_bounded_in_number_and_size(server: Running) -> None:
    def ask(*fields: str) -> Answer:
        return parse(
            server.raw("\r\n".join(["GET /v2 HTTP/1.1", "Host: x", "Connection: close", *fields, "", ""]).encode())
        )

    assert ask(*(f"F{i}: x" for i in range(15))).status == 200
    refused(ask(*(f"F{i}: x" for i in range(30))), 400)
    refused(ask(*(f"F{i}: x" for i in range(10_000))), 400)
    assert ask("F: " + "x" * 900).status == 200
    refused(ask("F: " + "x" * 1100), 400)
    refused(ask("x" * 1100 + ": x"), 400)
    refused(parse(server.raw(f"GET /{'x' * 1100} HTTP/1.1\r\nHost: x\r\n\r\n".encode())), 400)


def test_malformed_requests_are_counted(server: Running) -> None:
    before = errors(server)
    server.raw(b"no HTTP\r\n\r\n")
    server.call("GET", "/nowhere")
    after = errors(server)
    assert after[400] == before.get(400, 0) + 1
    assert after[404] == before.get(404, 0) + 1


def test_connections_are_bounded(tmp_path: Path) -> None:
    with serving(tmp_path, "--model", "knn", "--max-connections", "20") as running, contextlib.ExitStack() as kept:
        lines = [kept.enter_context(contextlib.closing(running.connect())) for _ in range(20)]
        for line in lines:
            assert exchange(line, "POST", INFER, GOOD).status == 200
        for _ in range(5):
            with socket.create_connection(running.address, timeout=60) as more:
                answer = parse(b"".join(iter(lambda more=more: more.recv(65536), b"")))
                refused(answer, 503, "20 connections")
                assert answer.headers["connection"] == "close"
        for line in lines:
            assert exchange(line, "POST", INFER, GOOD).status == 200
        lines.pop().close()
        deadline = time.monotonic() + 60
        while True:  # as soon as it has seen that one is gone
            with contextlib.suppress(OSError):
                if running.call("POST", INFER, GOOD).status == 200:
                    break
            assert time.monotonic() < deadline
        lines.pop().close()
        assert errors(running)[503] >= 5


def test_a_thousand_connections_and_more_at_the_default(tmp_path: Path) -> None:
    with serving(tmp_path, "--model", "knn") as running, contextlib.ExitStack() as kept:
        lines = [kept.enter_context(socket.create_connection(running.address, timeout=60)) for _ in range(1200)]
        for _ in range(2):
            for line in lines:
                line.sendall(f"{HEAD}Content-Length: {len(GOOD)}\r\n\r\n".encode() + GOOD)
            for line in lines:
                assert line.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_open_files_are_raised_as_far_as_they_may_be_and_else_there_are_fewer_connections(tmp_path: Path) -> None:
    def asked(running: Running, count: int, kept: contextlib.ExitStack) -> list[Answer]:
        lines = [kept.enter_context(contextlib.closing(running.connect())) for _ in range(count)]
        return [exchange(line, "GET", "/v2/health/ready", None) for line in lines]

    def files(bound: str) -> list[str]:
        return ["sh", "-c", f'ulimit {bound}; exec "$@"', "sh"]

    with (
        serving(tmp_path / "soft", "--model", "null", prefix=files("-Sn 100")) as running,
        contextlib.ExitStack() as kept,
    ):
        assert {one.status for one in asked(running, 300, kept)} == {200}
    with (
        serving(tmp_path / "hard", "--model", "null", prefix=files("-n 200")) as running,
        contextlib.ExitStack() as kept,
    ):
        assert "at most 136 connections" in running.log().splitlines()[0]
        assert {one.status for one in asked(running, 136, kept)} == {200}
        for one in asked(running, 20, kept):
            refused(one, 503, "136 connections")


class SlowSenders:
    """Connections that send one byte a second of a request: every second one of the head, the others of the body."""

    def __init__(self, address: tuple[str, int], count: int) -> None:
        self.ends: list[bytes] = []
        self.lasted: list[float] = []
        self._address, self._count = address, count
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()))

    async def _all(self) -> None:
        await asyncio.gather(*map(self._one, range(self._count)))

    async def _one(self, number: int) -> None:
        reader, writer = await asyncio.open_connection(*self._address)
        start = time.monotonic()
        head = f"{HEAD}Content-Length: 1000\r\n\r\n".encode()
        if number % 2:
            writer.write(head)
        reading = asyncio.create_task(reader.read(-1))
        for byte in head + b" " * 1000:
            writer.write(bytes([byte]))
            await asyncio.wait([reading], timeout=1)
            if reading.done():
                break
        with contextlib.suppress(ConnectionError):
            self.ends.append(reading.result())
        self.lasted.append(time.monotonic() - start)
        writer.close()

    def __enter__(self) -> "SlowSenders":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    def over(self) -> bool:
        return not self._thread.is_alive()


def test_a_slow_sender_is_nobody_to_share_a_call_with() -> None:
    book, now = Connections(Limits(), Exposition()), time.monotonic_ns()
    slow, fast = object(), object()
    assert not book.others(now)
    book.arriving[slow] = now - 10**9  # type: ignore[index]
    assert not book.others(now)
    book.arriving[fast] = now - 10**5  # type: ignore[index]
    assert book.others(now)


def test_slow_senders_are_cut_and_disturb_nobody(tmp_path: Path) -> None:
    with serving(tmp_path, "--model", "knn", "--request-timeout", "3") as running:
        with SlowSenders(running.address, 200) as slow, contextlib.closing(running.connect()) as line:
            good = 0
            while not slow.over():
                assert exchange(line, "POST", INFER, GOOD).status == 200
                good += 1
        assert good > 50
        assert len(slow.lasted) == 200
        assert len(slow.ends) > 150  # a byte that crosses the close resets some
        for end in slow.ends:
            refused(parse(end), 408, "3 s")
        assert min(slow.lasted) > 2.5
        assert max(slow.lasted) < 15  # five times the bound
        assert errors(running)[408] == 200


def test_the_time_of_a_request_that_was_pipelined_begins_when_it_can_be_read(tmp_path: Path) -> None:
    """Neither is a whole request cut because one before it takes long, nor may half of one stay for ever."""
    gate = Gate(tmp_path)
    with serving(tmp_path, *gate.model, "--request-timeout", "1") as running, contextlib.ExitStack() as kept:
        hold(running, "gate", kept)
        gate.begun()
        body = json.dumps(request(np.ones((1, 2)))).encode()
        line = kept.enter_context(socket.create_connection(running.address, timeout=60))
        line.sendall(
            (f"POST /v2/models/gate/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n").encode() + body
        )
        time.sleep(0.2)
        line.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\nGET /v2 H")
        time.sleep(2)
        gate.open()
        wait_for(lambda: gate.seen == [7, 1], "both to be computed")
        line.sendall(b"T")
        found = b"".join(iter(lambda: line.recv(65536), b""))
        assert re.findall(rb"HTTP/1\.1 (\d+)", found) == [b"200", b"200", b"408"]


def test_half_a_body_that_came_with_the_request_before_it_has_its_time_too(tmp_path: Path) -> None:
    with serving(tmp_path, "--model", "knn", "--request-timeout", "1") as running:
        found = running.raw(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n" + f"{HEAD}Content-Length: 1000\r\n\r\n{{".encode())
        assert re.findall(rb"HTTP/1\.1 (\d+)", found) == [b"200", b"408"]


def test_an_idle_connection_is_closed(tmp_path: Path) -> None:
    with serving(tmp_path, "--model", "knn", "--idle-timeout", "1") as running:
        with contextlib.closing(running.connect()) as line:
            for _ in range(5):
                assert exchange(line, "GET", "/v2/health/live", None).status == 200
                time.sleep(0.3)
            assert line.sock.recv(100) == b""
        with socket.create_connection(running.address, timeout=60) as silent:
            assert silent.recv(100) == b""


def test_answers_that_nobody_takes_hold_no_connection(tmp_path: Path) -> None:
    """However many: what the kernel has no room for any more may be little."""
    rows = np.load(DATA / "knn.npz")["rows"][:26]
    body = json.dumps(request(rows, parameters={"k": 569}, outputs=[{"name": "neighbours"}])).encode()  # of 56 KiB
    ask = f"{HEAD}Accept-Encoding: identity\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    with (
        serving(tmp_path, "--model", "knn", "--send-timeout", "1", "--idle-timeout", "1") as running,
        contextlib.ExitStack() as kept,
    ):
        for count in range(1, 61):
            line = kept.enter_context(socket.socket())
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.settimeout(60)
            line.connect(running.address)
            threading.Thread(target=_send_all, args=(line, ask * count), daemon=True).start()
        wait_for(
            lambda: "isolatency_connections 1.0\n" in running.call("GET", "/metrics").body.decode(),
            "all others to be closed",
        )


def _send_all(line: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        line.sendall(data)


def test_slow_receivers_are_cut(tmp_path: Path) -> None:
    """Whoever asks and does not read holds neither memory nor connections."""
    rows = np.zeros((20_000, 2), np.float32)
    head = json.dumps({"inputs": [{"name": "x", "shape": [20_000, 2], "datatype": "FP32", "parameters": {"binary_data_size": rows.nbytes}}]}).encode()  # fmt: skip
    body = head + rows.tobytes()
    ask = (
        f"POST /v2/models/calls/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: {len(head)}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    with serving(tmp_path, *own("Calls"), "--send-timeout", "1", "--max-queue", "1000000") as running:
        lines = []
        for _ in range(20):
            line = socket.socket()
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.settimeout(60)
            line.connect(running.address)
            lines.append(line)

        def send(line: socket.socket) -> None:
            with contextlib.suppress(OSError):
                for _ in range(500):  # 80 MiB of answers, more than its buffers take
                    line.sendall(ask)

        senders = [threading.Thread(target=send, args=(line,)) for line in lines]
        for one in senders:
            one.start()
        with contextlib.closing(running.connect()) as good:
            while any(one.is_alive() for one in senders):
                assert exchange(good, "GET", "/v2/health/ready", None).status == 200
                time.sleep(0.01)
        wait_for(
            lambda: "isolatency_connections 1.0\n" in running.call("GET", "/metrics").body.decode(),
            "all others to be closed",
        )
        assert rss_mib(running) < 400
        for line in lines:
            line.close()
