"""Small servers on raw sockets that speak just enough of the protocol, and misbehave as told. For tests only."""

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from loadtest._timing import STAGES

Behaviour = Callable[[socket.socket, bytes, int], None]  # connection, the right answer's body, how many came before
WIDTH = 30


def write_rows(folder: Path, n: int = 300) -> Path:
    """MODEL.npz for `--data`: random rows, whose label is whether the first value is above one half."""
    rows = np.random.default_rng(3).random((n, WIDTH), dtype=np.float32)
    np.savez(folder / "knn.npz", rows=rows, labels=(rows[:, 0] > 0.5).astype(np.int64))
    np.savez(folder / "null.npz", rows=rows)
    return folder


def whole(body: bytes, *, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body


def well(connection: socket.socket, body: bytes, n: int) -> None:
    connection.sendall(whole(body))


def reset(connection: socket.socket) -> None:
    """Close so that the other side gets a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


class Raw:
    """Listens on loopback, one thread per connection. `behave` answers infer requests; all others are answered well."""

    def __init__(self, behave: Behaviour = well, *, idle_s: float | None = None) -> None:
        self.behave = behave
        self.idle_s = idle_s
        self.connections = self.requests = 0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self.port = 0
        self.listen()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def listen(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", self.port), backlog=64)
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._socket,), daemon=True).start()

    def stop(self) -> None:
        """Refuse new connections and reset the open ones; `listen` brings it back."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._open.clear()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            self.connections += 1
            with self._lock:
                self._open.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(self.idle_s)
        with contextlib.suppress(OSError):
            for path, body in _requests(connection):
                if path.endswith("/infer"):
                    with self._lock:
                        n, self.requests = self.requests, self.requests + 1
                    self.behave(connection, _answer(path, body), n)
                elif path in ("/v2/models/knn", "/v2/models/null"):
                    inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, WIDTH]}]
                    output = {"name": "rows" if "null" in path else "label", "datatype": "INT64", "shape": [-1]}
                    told = {"name": "knn", "inputs": inputs, "outputs": [output]}
                    connection.sendall(whole(json.dumps(told).encode()))
                elif path == "/v2/health/ready":
                    connection.sendall(whole(b"{}"))
                elif path == "/v2":
                    connection.sendall(whole(b'{"name":"raw","extensions":["binary_tensor_data"]}'))
                else:
                    connection.sendall(whole(b'{"error":"unknown"}', status="404 Not Found"))
        with self._lock:
            self._open.discard(connection)
        connection.close()


def _requests(connection: socket.socket) -> Iterator[tuple[str, bytes]]:
    data = b""
    while True:
        while (head := data.find(b"\r\n\r\n") + 4) < 4:
            if not (piece := connection.recv(65536)):
                return
            data += piece
        at = data.lower().find(b"\r\ncontent-length:", 0, head)
        size = int(data[at + 17 : data.find(b"\r", at + 2)]) if at >= 0 else 0
        while len(data) < head + size:
            if not (piece := connection.recv(65536)):
                return
            data += piece
        yield data.split(b" ", 2)[1].decode(), data[head : head + size]
        data = data[head + size :]


def _answer(path: str, body: bytes) -> bytes:
    """The right answer: labels for knn, 1 for each row for null."""
    asked, end = json.JSONDecoder().raw_decode(body.decode("latin-1"))
    tensor = asked["inputs"][0]
    rows = np.asarray(tensor["data"]) if "data" in tensor else np.frombuffer(body[end:], "<f4")
    rows = rows.reshape(tensor["shape"])
    output: dict[str, Any] = {"name": "label", "data": (rows[:, 0] > 0.5).astype(int).tolist()}
    if "/null/" in path:
        output = {"name": "rows", "data": [1] * len(rows)}
    return json.dumps({"outputs": [output | {"datatype": "INT64", "shape": [len(output["data"])]}]}).encode()


# Behaviours


def byte_by_byte(connection: socket.socket, body: bytes, n: int) -> None:
    for byte in whole(body):
        connection.sendall(bytes([byte]))


def chunked(connection: socket.socket, body: bytes, n: int) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for at in range(0, len(body), 7):
        piece = body[at : at + 7]
        connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
    connection.sendall(b"0\r\n\r\n")


def interim(connection: socket.socket, body: bytes, n: int) -> None:
    connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    connection.sendall(whole(body))


def saying_close(connection: socket.socket, body: bytes, n: int) -> None:
    connection.sendall(whole(body, more="Connection: close\r\n"))
    connection.close()


def until_close(connection: socket.socket, body: bytes, n: int) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + body)
    connection.close()


def every_third_503(connection: socket.socket, body: bytes, n: int) -> None:
    connection.sendall(whole(body) if n % 3 else whole(b'{"error":"full"}', status="503 Service Unavailable"))


def every_third_wrong(connection: socket.socket, body: bytes, n: int) -> None:
    connection.sendall(whole(body if n % 3 else body.replace(b"[1]", b"[7]").replace(b"[0]", b"[8]")))


def every_third_no_json(connection: socket.socket, body: bytes, n: int) -> None:
    connection.sendall(whole(body if n % 3 else b"<html>"))


def every_third_reset(connection: socket.socket, body: bytes, n: int) -> None:
    if n % 3:
        well(connection, body, n)
    else:
        reset(connection)


def every_third_cut(connection: socket.socket, body: bytes, n: int) -> None:
    if n % 3:
        well(connection, body, n)
    else:
        connection.sendall(whole(body)[:-5])
        connection.close()


def every_third_garbled(connection: socket.socket, body: bytes, n: int) -> None:
    connection.sendall(whole(body) if n % 3 else b"\x00\x01 nothing like HTTP\r\n\r\n")


def every_third_silent(connection: socket.socket, body: bytes, n: int) -> None:
    if n % 3:
        well(connection, body, n)


STALL_S, EVERY_S = 0.12, 0.9


def stalling(connection: socket.socket, body: bytes, n: int) -> None:
    """Whatever comes in the first 120 ms of every 0.9 s is answered after them."""
    if (phase := time.monotonic() % EVERY_S) < STALL_S:
        time.sleep(STALL_S - phase)
    well(connection, body, n)


def timed(connection: socket.socket, body: bytes, n: int) -> None:
    """Says so in Server-Timing, but for every third answer."""
    stages = ", ".join(f"{name};dur={(n % 3) * 0.001 + place:.6f}" for place, name in enumerate(STAGES))
    connection.sendall(whole(body, more=f"Server-Timing: {stages}\r\n" if n % 3 else ""))


def slow(connection: socket.socket, body: bytes, n: int) -> None:
    time.sleep(0.5)
    well(connection, body, n)
