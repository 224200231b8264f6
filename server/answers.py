"""Answers: a whole one of known length, written in one piece with nothing that it does not need."""

import asyncio
import zlib
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

import orjson
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.helpers import rfc822_formatted_time

PACK_FROM = 1024  # bytes; a smaller answer fits into one packet anyway
WBITS = {"gzip": 31, "deflate": 15}
JSON = "application/json"
UNSENT = 64 * 2**10  # bytes that the kernel has not taken; from there on the client is waited for
REASONS = {status.value: status.phrase for status in HTTPStatus}


class Answer(web.StreamResponse):
    """aiohttp's own response builds its header from parts that may still change, for about a third of what a request
    costs in all. `written` is called when the answer has been handed to the kernel."""

    def __init__(
        self,
        body: bytes,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        *,
        media: str = JSON,
    ) -> None:
        super().__init__(status=status)
        more = "".join(f"{name}: {value}\r\n" for name, value in headers.items()) if headers else ""
        self._head = (
            f"HTTP/1.1 {status} {REASONS.get(status, '')}\r\nContent-Type: {media}\r\n"
            f"Content-Length: {len(body)}\r\nDate: {rfc822_formatted_time()}\r\n{more}"
        )
        self._content = body
        self._close = False
        self.send_timeout = 30.0
        self.written: Callable[[], None] | None = None

    @property
    def body_length(self) -> int:
        return len(self._content)

    @property
    def keep_alive(self) -> bool:
        return not self._close

    def force_close(self) -> None:
        self._close = True

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        self._asked = request
        if not request.keep_alive:
            self._close = True
        return None

    def whole(self, *, headless: bool = False) -> bytes:
        end = "Connection: close\r\n\r\n" if self._close else "\r\n"
        return f"{self._head}{end}".encode() + (b"" if headless else self._content)

    async def write_eof(self, data: bytes = b"") -> None:
        """Raises ConnectionResetError when the client is gone, or does not receive within the bound."""
        request = self._asked
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client is gone")
        transport.write(self.whole(headless=request.method == "HEAD"))
        if self.written is not None:
            self.written()
        if transport.get_write_buffer_size() > UNSENT:
            try:
                async with asyncio.timeout(self.send_timeout):
                    await request.writer.drain()
            except TimeoutError:
                transport.abort()
                raise ConnectionResetError("the client does not receive") from None


def answer(value: Any, status: int = 200) -> Answer:
    return Answer(orjson.dumps(value), status)


def refusal(status: int, text: str, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(orjson.dumps({"error": " ".join(text.split())}), status, headers)


def packed(body: bytes, accepted: str) -> tuple[bytes, str | None]:
    """The body as gzip or deflate, where the header Accept-Encoding takes one of them."""
    for one in accepted.lower().split(",") if len(body) >= PACK_FROM else ():
        name, _, weight = one.replace(" ", "").partition(";q=")
        if name in WBITS and (not weight or weight.strip("0.")):
            packer = zlib.compressobj(1, wbits=WBITS[name])
            return packer.compress(body) + packer.flush(), name
    return body, None
