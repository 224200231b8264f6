"""Requests as bytes on raw sockets: written in pieces, answered or closed within a bound."""

import gzip
import json
import socket
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.unit.serving import Running

BOUND_S = 60.0


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Line:
    """A connection that keeps what it has read beyond an answer."""

    def __init__(self, running: Running) -> None:
        self.socket = socket.create_connection(running.address, timeout=BOUND_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._had = b""

    def send(self, pieces: Sequence[bytes]) -> None:
        try:
            for piece in pieces:
                self.socket.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the answer says why

    def reply(self) -> Reply | None:
        """The next whole answer, or None where the server closes without one. Raises TimeoutError, AssertionError."""
        while b"\r\n\r\n" not in self._had:
            if not self._more():
                assert not self._had, self._had
                return None
        head, _, self._had = self._had.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        length = int(headers.get("content-length", "0"))
        while len(self._had) < length and self._more():
            pass
        body, self._had = self._had[:length], self._had[length:]
        assert first.startswith("HTTP/1.1 "), first
        assert len(body) == length
        return Reply(int(first.split()[1]), headers, body)

    def replies(self) -> list[Reply]:
        """All answers until the server closes."""
        found = []
        while (one := self.reply()) is not None:
            found.append(one)
        return found

    def _more(self) -> bool:
        try:
            piece = self.socket.recv(65536)
        except ConnectionResetError:
            return False
        self._had += piece
        return bool(piece)

    def close(self) -> None:
        self.socket.close()


def http(path: str, body: bytes, *fields: str, method: str = "POST") -> bytes:
    return (
        "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *fields, "", ""]).encode()
        + body
    )


def opened(reply: Reply) -> dict[str, NDArray[Any]]:
    """The outputs of an infer answer, in JSON or bytes, packed or not."""
    body = {"gzip": gzip.decompress, "deflate": zlib.decompress}.get(reply.headers.get("content-encoding", ""), bytes)(
        reply.body
    )
    length = int(reply.headers.get("inference-header-content-length", len(body)))
    kinds = {"INT64": "<i8", "FP32": "<f4", "FP64": "<f8", "BOOL": "?", "UINT8": "u1"}
    found, tail = {}, body[length:]
    for one in json.loads(body[:length])["outputs"]:
        dtype = np.dtype(kinds[one["datatype"]])
        if "data" in one:
            values = np.array(one["data"], dtype)
        else:
            size = one["parameters"]["binary_data_size"]
            values, tail = np.frombuffer(tail[:size], dtype), tail[size:]
        found[one["name"]] = values.reshape(one["shape"])
    assert not tail
    return found


def in_order(reply: Reply) -> None:
    """An answer that a client may get for anything at all."""
    assert reply.status in (200, 501, 503) or 400 <= reply.status < 500, reply
    if reply.status != 200:
        told = json.loads(reply.body)
        assert told.keys() == {"error"}
        assert told["error"].strip()
        assert "\n" not in told["error"]
        assert "Traceback" not in told["error"]
