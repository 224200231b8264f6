"""What no client of good will sends, on raw sockets, beside 200 senders of a byte a second: each is answered or closed
within its bound, good requests are answered all the while, and memory stays bounded."""

import asyncio
import contextlib
import gzip
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest

from tests.unit.serving import DATA, Running, exchange, request, serving
from tests.unit.test_server_limits import zeros_mib
from tests.unit.wire import Line, http, in_order

MIB = 2**20
ROW = np.load(DATA / "knn.npz")["rows"][:1]
GOOD = json.dumps(request(ROW)).encode()
INFER = "/v2/models/knn/infer"
TIMEOUT_S = 4
BOUND_S = 60.0  # for what ends within TIMEOUT_S
ASK = b"GET /v2 HTTP/1.1\r\nHost: x\r\n"
POST = f"POST {INFER} HTTP/1.1\r\nHost: x\r\n".encode()
SMUGGLED = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


class Crowd(threading.Thread):
    """200 connections that send one byte a second, each opened again when it is cut."""

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__()
        self.cut = 0
        self._address, self._over = address, threading.Event()

    def run(self) -> None:
        asyncio.run(self._all())

    async def _all(self) -> None:
        await asyncio.gather(*map(self._one, range(200)))

    async def _one(self, number: int) -> None:
        while not self._over.is_set():
            reader, writer = await asyncio.open_connection(*self._address)
            writer.write((POST + b"Content-Length: 900\r\n\r\n")[: 10 if number % 2 else None])
            reading = asyncio.create_task(reader.read(-1))
            while not reading.done() and not self._over.is_set():
                writer.write(b"x")
                await asyncio.wait([reading], timeout=1)
            self.cut += reading.done()
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await reading
            writer.close()

    def end(self) -> None:
        self._over.set()
        self.join()


class Good(threading.Thread):
    """Asks as it should all the while, and looks at the server's memory."""

    def __init__(self, running: Running) -> None:
        super().__init__()
        self.statuses: list[int] = []
        self.most_mib = 0.0
        self._running, self._over = running, threading.Event()

    def run(self) -> None:
        process = psutil.Process(self._running.process.pid)
        with contextlib.closing(self._running.connect()) as line:
            while not self._over.wait(0.01):
                self.statuses.append(exchange(line, "POST", INFER, GOOD).status)
                self.most_mib = max(self.most_mib, process.memory_info().rss / MIB)

    def end(self) -> None:
        self._over.set()
        self.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    arguments = ["--model", "knn", "--model", "null", "--request-timeout", str(TIMEOUT_S)]
    with serving(tmp_path_factory.mktemp("server"), *arguments) as running:
        crowd, good = Crowd(running.address), Good(running)
        crowd.start()
        good.start()
        yield running
        good.end()
        crowd.end()
        assert len(good.statuses) > 10
        assert set(good.statuses) == {200}
        assert good.most_mib < 900, good.most_mib
        assert "error" not in running.log(), running.log()
        assert "Traceback" not in running.log()
        assert running.call("GET", "/v2/health/ready").status == 200
        print(
            f"{len(good.statuses)} good requests answered, {crowd.cut} slow senders cut, at most {good.most_mib:.0f} MiB"
        )


def tensor(**change: Any) -> bytes:
    body = request(ROW)
    body["inputs"][0] |= change
    return http(INFER, json.dumps(body).encode())


def headers(count: int, size: int = 1) -> bytes:
    return ASK + b"".join(b"F%d: %s\r\n" % (i, b"x" * size) for i in range(count)) + b"\r\n"


HOSTILE: dict[str, tuple[bytes, int, int]] = {
    # name: bytes, the status of the first answer, how many answers there may be
    "both lengths": (POST + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED, 400, 1),
    "both lengths, the other way": (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\n" + SMUGGLED, 400, 1),
    "lengths that disagree": (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{    " + SMUGGLED, 400, 1),
    "a length twice": (POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n{    " + SMUGGLED, 400, 1),
    "a list of lengths": (POST + b"Content-Length: 5, 5\r\n\r\n{    " + SMUGGLED, 400, 1),
    "length +5": (POST + b"Content-Length: +5\r\n\r\n{    " + SMUGGLED, 400, 1),
    "length -5": (POST + b"Content-Length: -5\r\n\r\n{    " + SMUGGLED, 400, 1),
    "length 0x5": (POST + b"Content-Length: 0x5\r\n\r\n{    " + SMUGGLED, 400, 1),
    "length 5 5": (POST + b"Content-Length: 5 5\r\n\r\n{    " + SMUGGLED, 400, 1),
    "length 5_0": (POST + b"Content-Length: 5_0\r\n\r\n{    " + SMUGGLED, 400, 1),
    "length in wide digits": (POST + "Content-Length: ５\r\n\r\n{    ".encode() + SMUGGLED, 400, 1),
    "no length at all": (POST + b"Content-Length: \r\n\r\n" + SMUGGLED, 400, 1),
    "a length beyond 64 bits": (POST + b"Content-Length: 18446744073709551621\r\n\r\n{    " + SMUGGLED, 400, 1),
    "a length of 63 bits": (POST + b"Content-Length: 9223372036854775807\r\n\r\n{", 413, 1),
    "chunked twice": (POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n" + SMUGGLED, 400, 1),
    "chunked in two fields": (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED, 400, 1),
    "xchunked": (POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED, 400, 1),
    "chunked and identity": (POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SMUGGLED, 400, 1),
    "space before the colon": (POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SMUGGLED, 400, 1),
    "a folded field": (ASK + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n" + SMUGGLED, 400, 1),
    "a vertical tab before chunked": (POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n" + SMUGGLED, 400, 1),
    "chunk size zz": (CHUNKED + b"zz\r\n\r\n", 400, 1),
    "chunk size -1": (CHUNKED + b"-1\r\n\r\n", 400, 1),
    "chunk size 0x5": (CHUNKED + b"0x5\r\n12345\r\n0\r\n\r\n", 400, 1),
    "chunk size with spaces": (CHUNKED + b" 5\r\n12345\r\n0\r\n\r\n", 400, 1),
    "chunk size beyond 64 bits": (CHUNKED + b"1000000000000000f\r\n12345\r\n0\r\n\r\n", 400, 1),
    "a chunk longer than it says": (CHUNKED + b"3\r\n12345\r\n0\r\n\r\n", 400, 1),
    "a chunk's extension of 1 MiB": (CHUNKED + b"5;" + b"x" * MIB + b"\r\n12345\r\n0\r\n\r\n", 400, 1),
    "20,000 chunks of a byte": (CHUNKED + b"1\r\n \r\n" * 20_000 + b"0\r\n\r\n", 400, 1),
    "20 MiB in chunks": (CHUNKED + (b"100000\r\n" + b" " * MIB + b"\r\n") * 20 + b"0\r\n\r\n", 413, 1),
    "10,000 trailers": (CHUNKED + b"0\r\n" + b"T: x\r\n" * 10_000 + b"\r\n", 400, 1),
    "lines that end in LF alone": (b"GET /v2 HTTP/1.1\nHost: x\n\n" + SMUGGLED, 400, 1),
    "CR in a field": (ASK + b"F: a\rb\r\n\r\n", 400, 1),
    "NUL in a field": (ASK + b"F: a\0b\r\n\r\n", 400, 1),
    "NUL in the path": (b"GET /v2\0 HTTP/1.1\r\nHost: x\r\n\r\n", 400, 1),
    "a space in a field's name": (ASK + b"F F: x\r\n\r\n", 400, 1),
    "a field without a name": (ASK + b": x\r\n\r\n", 400, 1),
    "a field without a colon": (ASK + b"F\r\n\r\n", 400, 1),
    "10,000 fields": (headers(10_000), 400, 1),
    "129 fields": (headers(129), 400, 1),
    "a field of 1 MiB": (headers(1, MIB), 400, 1),
    "a field's name of 1 MiB": (ASK + b"x" * MIB + b": x\r\n\r\n", 400, 1),
    "a field that never ends": (ASK + b"F: " + b"x" * (8 * MIB), 400, 1),
    "HTTP/0.9": (b"GET /v2\r\n\r\n", 200, 1),
    "HTTP/2.0 in the form of 1.1": (b"GET /v2 HTTP/2.0\r\nHost: x\r\n\r\n", 200, 1),
    "HTTP/1.1.1": (b"GET /v2 HTTP/1.1.1\r\nHost: x\r\n\r\n", 400, 1),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), 400, 1),
    "TLS": (bytes.fromhex("1603010200010001fc0303") + bytes(range(256)) * 2, 400, 1),
    "SSH": (b"SSH-2.0-OpenSSH_9.2\r\n", 400, 1),
    "bytes from 0 to 255": (bytes(range(256)), 400, 1),
    "a method of 100,000 letters": (b"G" * 100_000 + b" /v2 HTTP/1.1\r\nHost: x\r\n\r\n", 400, 1),
    "a method in small letters": (b"get /v2 HTTP/1.1\r\nHost: x\r\n\r\n", 400, 1),
    "a path of 1 MiB": (b"GET /" + b"x" * MIB + b" HTTP/1.1\r\nHost: x\r\n\r\n", 400, 1),
    "CONNECT": (b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n", 404, 1),
    "OPTIONS *": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 404, 1),
    "TRACE": (b"TRACE /v2 HTTP/1.1\r\nHost: x\r\n\r\n", 405, 1),
    "a way up": (b"GET /v2/../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", 404, 1),
    "a way up in percents": (b"GET /v2/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd HTTP/1.1\r\nHost: x\r\n\r\n", 404, 1),
    "NUL in percents": (b"GET /v2/models/knn%00 HTTP/1.1\r\nHost: x\r\n\r\n", 404, 1),
    "a line's end in percents": (b"GET /v2%0d%0aX:%20y HTTP/1.1\r\nHost: x\r\n\r\n", 404, 1),
    "percents that are none": (b"GET /v2%zz%f HTTP/1.1\r\nHost: x\r\n\r\n", 404, 1),
    "a path that is no UTF-8": (b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", 400, 1),
    "another host's URL": (b"GET http://example.org/nowhere HTTP/1.1\r\nHost: x\r\n\r\n", 404, 1),
    "a URL with a bad port": (b"GET http://example.org:99999999/v2 HTTP/1.1\r\nHost: x\r\n\r\n", 400, 1),
    "load a file": (b"POST /v2/repository/models/..%2f..%2fetc%2fpasswd/load HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 404, 1),
    "an expectation": (POST + b"Expect: tea\r\nContent-Length: 5\r\n\r\n{    ", 417, 1),
    "an upgrade to WebSocket": (ASK + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n", 200, 1),
    "an upgrade to HTTP/2 and garbage": (ASK + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: \r\n\r\n" + bytes(100), 200, 2),
    "deep JSON": (http(INFER, b"[" * 10**6), 400, 1),
    "deep objects": (http(INFER, b'{"a":' * 10**5 + b"1" + b"}" * 10**5), 400, 1),
    "8 MiB of empty objects": (http(INFER, b'{"inputs": [' + b"{}," * (8 * MIB // 3) + b"{}]}"), 400, 1),
    "16 MiB of zeros in brackets": (http(INFER, b'{"inputs": [{"name":"x","datatype":"FP32","shape":[4000000,30],"data":[' + b"[0]," * (4 * MIB - 100) + b"[0]]}]}"), 400, 1),
    "UTF-16": (http(INFER, GOOD.decode().encode("utf-16")), 400, 1),
    "UTF-8 with a mark": (http(INFER, b"\xef\xbb\xbf" + GOOD), 400, 1),
    "Latin-1": (http(INFER, b'{"id": "\xe9"}'), 400, 1),
    "half a surrogate": (http(INFER, b'{"id": "\\ud800"}'), 400, 1),
    "a shape of 2**124": (tensor(shape=[2**62, 2**62]), 400, 1),
    "a shape whose product is 0 in 64 bits": (http("/v2/models/null/infer", json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [2**32, 2**32], "data": []}]}).encode()), 400, 1),
    "a shape whose product is 1 in 64 bits": (http("/v2/models/null/infer", json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [641, 6700417 * (2**64 // (2**32 + 1) + 1)], "data": [1]}]}).encode()), 400, 1),
    "a shape of 2**60 in bytes": (http(INFER, json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [2**60, 30], "parameters": {"binary_data_size": 0}}]}).encode(), "Inference-Header-Content-Length: 118"), 400, 1),
    "a shape of 500,000 dimensions": (tensor(shape=[1] * 500_000), 400, 1),
    "a string among numbers": (tensor(shape=[10**6 + 1], data=["x" * 10**6, *[1] * 10**6]), 400, 1),
    "a length of its JSON beyond the body": (http(INFER, GOOD, f"Inference-Header-Content-Length: {10**18}"), 400, 1),
    "an id of 10 MiB": (http(INFER, json.dumps(request(ROW) | {"id": "x" * 10 * MIB}).encode()), 200, 1),
    "br": (http(INFER, b"\x0b\x02\x80", "Content-Encoding: br"), 415, 1),
    "a member after the first": (http(INFER, gzip.compress(GOOD) * 2, "Content-Encoding: gzip"), 400, 1),
    "garbage after a good request": (http(INFER, GOOD) + b"\0garbage\r\n\r\n", 400, 1),
}  # fmt: skip


def packed(body: bytes, coding: str = "gzip") -> bytes:
    return http(INFER, body, f"Content-Encoding: {coding}")


def in_chunks(body: bytes) -> bytes:
    pieces = [body[i : i + 65536] for i in range(0, len(body), 65536)]
    head = CHUNKED.replace(b"Transfer", b"Content-Encoding: gzip\r\nTransfer")
    return head + b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in pieces) + b"0\r\n\r\n"


BOMBS: dict[str, tuple[Callable[[], bytes], int]] = {
    "1 GiB": (lambda: packed(zeros_mib(1024, "gzip")), 413),
    "1 GiB in deflate": (lambda: packed(zeros_mib(1024, "deflate"), "deflate"), 413),
    "1 GiB in chunks": (lambda: in_chunks(zeros_mib(1024, "gzip")), 413),
    "a bomb in a bomb": (lambda: packed(gzip.compress(zeros_mib(1024, "gzip"))), 400),
    "a bomb in a bomb, to be unpacked twice": (
        lambda: packed(gzip.compress(zeros_mib(1024, "gzip")), "gzip, gzip"),
        415,
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(server: Running, name: str) -> None:
    make, status = BOMBS[name]
    hostile(server, make(), status)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request(server: Running, name: str) -> None:
    hostile(server, *HOSTILE[name])


def hostile(server: Running, sent: bytes, status: int, most: int = 1) -> None:
    with contextlib.closing(Line(server)) as line:
        sending = threading.Thread(target=line.send, args=([sent],))
        sending.start()
        first = line.reply()
        assert first is not None, "closed without an answer"
        in_order(first)
        assert first.status == status, first
        line.send([SMUGGLED.replace(b"Host: x", b"Host: x\r\nConnection: close")])
        rest = line.replies()
        sending.join(BOUND_S)
        for one in rest:
            in_order(one)
    if first.headers.get("connection") == "close":
        assert not rest
    else:  # then its end was understood, and only what this test asked at the end is answered, and what is listed
        assert len(rest) <= most, rest
    assert len(first.body) < 1000 or len(sent) > MIB > len(first.body) or status == 200


PARTS = [
    b"G", ASK, b"\r\n", POST + b"Content-Length: 5\r\n\r\n", POST + b"Content-Length: 5\r\n\r\n{", CHUNKED, CHUNKED + b"5\r\n123",
    CHUNKED + b"0\r\n", POST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("part", [b"", *PARTS])
def test_who_half_closes_before_the_end_is_closed(server: Running, part: bytes) -> None:
    with contextlib.closing(Line(server)) as line:
        line.send([part])
        line.socket.shutdown(socket.SHUT_WR)
        assert [one.status for one in line.replies() if one.status != 100] == []


def test_who_sends_a_part_and_no_more_is_told_so_in_time(server: Running) -> None:
    lines = [Line(server) for _ in PARTS]
    start = time.monotonic()
    for line, part in zip(lines, PARTS, strict=True):
        line.send([part])
    for line in lines:
        assert [one.status for one in line.replies() if one.status != 100] == [408]
        assert time.monotonic() - start < 5 * TIMEOUT_S
        line.close()


def test_who_resets_disturbs_nobody(server: Running) -> None:
    for part in [*PARTS, http(INFER, GOOD)] * 10:
        with contextlib.closing(Line(server)) as line:
            line.send([part])
            line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_a_thousand_pipelined_requests(server: Running) -> None:
    with contextlib.closing(Line(server)) as line:
        sending = threading.Thread(target=line.send, args=([SMUGGLED * 500 + http(INFER, GOOD) * 500],))
        sending.start()
        for _ in range(1000):
            reply = line.reply()
            assert reply is not None
            assert reply.status == 200
        sending.join()


@pytest.mark.parametrize("before", [0, 1, 40])
def test_pipelined_requests_after_some_that_came_in_two_pieces(server: Running, before: int) -> None:
    whole = http(INFER, GOOD)
    with contextlib.closing(Line(server)) as line:
        for _ in range(before):
            line.send([whole[:-9]])
            assert server.call("GET", "/v2/health/live").status == 200  # so that the first piece has been read
            line.send([whole[-9:]])
            reply = line.reply()
            assert reply is not None and reply.status == 200
        for one in (SMUGGLED, whole):
            line.send([one * 200])
            replies = [line.reply() for _ in range(200)]
            assert {reply.status for reply in replies if reply is not None} == {200} and None not in replies


def test_a_storm_of_connections_that_send_nothing(server: Running) -> None:
    for _ in range(2000):
        with socket.create_connection(server.address, timeout=BOUND_S):
            pass
    assert server.call("POST", INFER, GOOD).status == 200


def test_head_and_old_http(server: Running) -> None:
    assert server.raw(b"HEAD /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").endswith(b"\r\n\r\n")
    assert server.raw(b"GET /v2/health/live HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    kept = server.raw(
        b"GET /v2/health/live HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /v2/health/live HTTP/1.0\r\n\r\n"
    )
    assert kept.count(b"HTTP/1.1 200 ") == 2


def test_many_bombs_and_large_bodies_at_once(server: Running) -> None:
    bomb = zeros_mib(15, "gzip")  # below the limit: each is unpacked whole, and is no JSON
    large = http(INFER, b" " * (15 * MIB))
    asked = [http(INFER, bomb, "Content-Encoding: gzip"), large, packed(zeros_mib(1024, "gzip"))] * 20
    lines = [Line(server) for _ in asked]
    sending = [threading.Thread(target=line.send, args=([one],)) for line, one in zip(lines, asked, strict=True)]
    for one in sending:
        one.start()
    found = []
    for line in lines:
        reply = line.reply()
        if reply is not None:
            in_order(reply)
            found.append(reply.status)
    for each, line in zip(sending, lines, strict=True):
        each.join()
        line.close()
    assert len(found) > 40
    assert set(found) <= {400, 413, 503}
