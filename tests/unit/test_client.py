"""The run's own calls to a server that answers anything at all: an error of one line, or outputs."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from hostsetup.lifecycle import identity
from hostsetup.target import Context, Endpoint, Spec
from hostsetup.url import Url
from images.errors import TargetError
from loadtest import _client


class Anything(BaseHTTPRequestHandler):
    """Answers every request with the server's `body`, and what is asked about the model with its `about`, if it has one."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = self.server.body  # type: ignore[attr-defined]
        if self.path == "/v2/models/knn":
            body = getattr(self.server, "about", body)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    made = ThreadingHTTPServer(("127.0.0.1", 0), Anything)
    threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def output(**parts: Any) -> bytes:
    return json.dumps({"outputs": [{"name": "label", "shape": [2], "data": [0, 1], **parts}]}).encode()


ABOUT = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}], "outputs": [{"name": "label"}]}'
ODD = [
    b"", b"no JSON", b"null", b"[]", b"3", b'"text"', b"NaN", b"{}", b"[" * 100_000, b"\xff\xfe",
    b'{"outputs": null}', b'{"outputs": 7}', b'{"outputs": {}}', b'{"outputs": []}', b'{"outputs": [null]}',
    b'{"outputs": [{}]}', b'{"outputs": [{"name": 1, "shape": [2], "data": [0, 1]}]}',
    output(shape=None), output(shape="2"), output(shape=[]), output(shape=[3]), output(shape=[-1]), output(shape=[1e300]),
    output(shape=[10**30]), output(shape=[2**31, 2**31, 2**31]), output(shape=[2.5]), output(data=None), output(data="01"),
    output(data=[0]), output(data=[[0], [1, 2]]), output(data=[0, None]), output(data=[0, {}]), output(data=[0, 10**400]),
]  # fmt: skip


@pytest.mark.parametrize("body", ODD)
def test_an_odd_answer_is_one_line(server: ThreadingHTTPServer, body: bytes) -> None:
    endpoint = Endpoint("shop", "url", f"http://127.0.0.1:{server.server_port}", None, False, None, 0.1)
    for about, words in ((ABOUT, "POST /v2/models/knn/infer "), (body, "(knn cannot be asked|GET /v2/models/knn)")):
        server.body, server.about = body, about  # type: ignore[attr-defined]
        with pytest.raises(TargetError, match=f"^shop: {words}") as error:
            _client.infer(_client.session(), endpoint, "knn", np.zeros((60, 3), np.float32), timeout_s=60)
        assert "\n" not in str(error.value)


def test_what_is_an_answer_is_taken(server: ThreadingHTTPServer) -> None:
    server.body, server.about = output(data=[float("nan"), 1e300]), ABOUT  # type: ignore[attr-defined]
    endpoint = Endpoint("shop", "url", f"http://127.0.0.1:{server.server_port}", None, False, None, 0.1)
    found = _client.infer(_client.session(), endpoint, "knn", np.zeros((60, 3), np.float32), timeout_s=60)
    np.testing.assert_array_equal(found["label"], [np.nan, 1e300] * 2)


METADATA = [
    {"inputs": [{"name": "x", "shape": shape}]}
    for shape in (None, "3", [None], ["a"], [10**12], [10**30, 10**30], [-7], [2.5], [float("inf")], {}, [[1]])
] + [{"inputs": one} for one in (None, {}, [], [[]], [None], "x")]  # fmt: skip


@pytest.mark.parametrize("body", [*ODD, *(json.dumps(one).encode() for one in METADATA)])
def test_a_url_target_that_answers_anything_is_an_unknown_server(
    server: ThreadingHTTPServer, body: bytes, tmp_path: Any
) -> None:
    server.body = body  # type: ignore[attr-defined]
    url = f"http://127.0.0.1:{server.server_port}"
    assert identity(url) is None
    context = Context(None, None, (0,), ("--model", "knn"), tmp_path)  # type: ignore[arg-type]
    with Url(Spec("shop", "url", options={"url": url}), context) as endpoint:
        assert endpoint.identity is None
