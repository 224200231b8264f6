"""A real server over loopback for the tests of server/: started, asked, stopped."""

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "server" / "models" / "data"
T = TypeVar("T")
ALL = ("--model", "knn", "--model", "dnn", "--model", "null")
START_S = 60.0
ANSWER_S = 60.0
STOP_S = 30.0


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Running:
    """A server that listens. `log()` is all that it has written so far."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, url: str) -> None:
        self.process, self._log, self.url = process, log, url
        self.address = (urlsplit(url).hostname or "", urlsplit(url).port or 0)

    def log(self) -> str:
        return self._log.read_text()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self.address, timeout=ANSWER_S)

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """One request on a connection of its own; a body that is neither bytes nor None goes out as JSON."""
        with contextlib.closing(self.connect()) as connection:
            return exchange(connection, method, path, body, **headers)

    def infer(self, model: str, rows: NDArray[Any], **more: Any) -> Answer:
        return self.call("POST", f"/v2/models/{model}/infer", request(rows, **more))

    def raw(self, *pieces: bytes) -> bytes:
        """Send bytes as they are and return all that comes back until the server closes."""
        with socket.create_connection(self.address, timeout=ANSWER_S) as line:
            for piece in pieces:
                line.sendall(piece)
            return b"".join(iter(lambda: line.recv(65536), b""))

    def hang_up_after(self, piece: bytes) -> None:
        """Send bytes and go away without reading anything."""
        with socket.create_connection(self.address, timeout=ANSWER_S) as line:
            line.sendall(piece)


def exchange(connection: http.client.HTTPConnection, method: str, path: str, body: Any, **headers: str) -> Answer:
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())


def request(rows: NDArray[Any], **more: Any) -> dict[str, Any]:
    tensor = {"name": "x", "shape": list(rows.shape), "datatype": "FP32", "data": rows.ravel().tolist()}
    return {"inputs": [tensor], **more}


def outputs(answer: Answer) -> dict[str, NDArray[Any]]:
    """The outputs of an infer answer by name, in their shape."""
    assert answer.status == 200, answer.body
    return {one["name"]: np.array(one["data"]).reshape(one["shape"]) for one in answer.json["outputs"]}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "server", "--port", "0", *arguments]


@contextlib.contextmanager
def serving(
    folder: Path, *arguments: str, env: Mapping[str, str] | None = None, prefix: Sequence[str] = ()
) -> Iterator[Running]:
    """Start `python -m server --port 0 ARGUMENTS`, with its log and temporary files in `folder`; end it afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*prefix, *command(*arguments)], stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=ROOT,
            env={**(os.environ if env is None else env), "TMPDIR": str(temporary)},
        )  # fmt: skip
    try:
        yield Running(process, log, _url(process, log))
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_S)
            finally:
                process.kill()
                process.wait()


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    def listening() -> str | None:
        found = re.search(r'listening on (http://[^\s"]+)', log.read_text())
        if found is None and process.poll() is not None:
            raise AssertionError(f"the server ended with {process.returncode}: {log.read_text()}")
        return found and found[1]

    return wait_for(listening, "the line that says where the server listens", START_S)


def wait_for(look: Callable[[], T | None], what: str, bound_s: float = 60.0) -> T:
    """Look until there is something; fail after a bound that no working system comes near."""
    end = time.monotonic() + bound_s
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < end, f"waited {bound_s:g} s for {what}"
        time.sleep(0.02)
