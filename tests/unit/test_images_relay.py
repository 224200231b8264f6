"""The relay of the nested host: bytes both ways, an end of one direction, a socket that comes late."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

RELAY = Path(__file__).parents[2] / "images/relay.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    port, path = free_port(), tmp_path / "api.sock"
    process = subprocess.Popen([sys.executable, "-I", "-S", RELAY, "127.0.0.1", str(port), path])
    yield port, path
    process.kill()
    process.wait()


def connect(port: int) -> socket.socket:
    for _ in range(600):
        try:
            return socket.create_connection(("127.0.0.1", port), 30)
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise AssertionError("the relay does not listen")


def serve_upper_case(path: Path) -> threading.Thread:
    """A server that reads to the end, then answers; so it needs the relay to pass on the end of one direction."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def serve() -> None:
        with server, server.accept()[0] as peer:
            body = b"".join(iter(lambda: peer.recv(65536), b""))
            peer.sendall(body.upper())

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


@pytest.mark.parametrize("late_s", [0, 0.5])
def test_bytes_and_the_end_of_a_stream_pass(relay: tuple[int, Path], late_s: float) -> None:
    port, path = relay
    with connect(port) as client:
        time.sleep(late_s)
        server = serve_upper_case(path)
        client.sendall(b"abc" * 100_000)
        client.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    server.join(30)
    assert answer == b"ABC" * 100_000
