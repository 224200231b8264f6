"""Answers: a whole one of known length, written in one piece with nothing that it does not need."""

import asyncio
import zlib
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, Protocol, cast

import orjson
from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.helpers import rfc822_formatted_time

from server.models.base import BadInput

PACK_FROM = 1024  # bytes; a smaller answer fits into one packet anyway
WBITS = {"gzip": 31, "deflate": 15}
JSON = "application/json"
LONGEST = 500  # characters of an error's text, which may quote what was sent
UNSENT = 64 * 2**10  # bytes that the kernel has not taken; from there on the client is waited for
REASONS = {status.value: status.phrase for status in HTTPStatus}


class Line(Protocol):
    """What an answer wants to know of its connection."""

    @property
    def stopping(self) -> bool:
        """The server ends, so that this answer is the last."""

    @property
    def send_timeout(self) -> float: ...

    def release(self) -> None:
        """The answer has been taken, or never will be."""


class Answer(web.StreamResponse):
    """aiohttp's own response builds its header from parts that may still change, for about a third of what a request
    costs in all. `written` is called when the answer has been handed to the kernel."""

    def __init__(
        self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None, *, media: str = JSON
    ) -> None:
        # Not StreamResponse's own __init__: nothing that it makes is used.
        self._code, self._content, self._media = status, body, media
        self._more = headers or {}
        self._close = False
        self.written: Callable[[], None] | None = None

    @property
    def status(self) -> int:
        return self._code

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
        self._line = cast(Line, request.protocol)
        if self._line.stopping or not request.keep_alive:
            self._close = True
        return None

    def whole(self, *, headless: bool = False, old: bool = False) -> bytes:
        """As bytes; `headless`: without its body, `old`: for a client of HTTP/1.0."""
        more = "".join([f"{name}: {value}\r\n" for name, value in self._more.items()])
        if self._close or old:
            more += f"Connection: {'close' if self._close else 'keep-alive'}\r\n"
        head = (
            f"HTTP/1.1 {self._code} {REASONS.get(self._code, '')}\r\nContent-Type: {self._media}\r\n"
            f"Content-Length: {len(self._content)}\r\nDate: {rfc822_formatted_time()}\r\n{more}\r\n"
        )
        return head.encode() if headless else head.encode() + self._content

    async def write_eof(self, data: bytes = b"") -> None:
        """Raises ConnectionResetError when the client is gone, or does not receive within the bound."""
        request = self._asked
        transport = request.transport
        try:
            if transport is None or transport.is_closing():
                raise ConnectionResetError("the client is gone")
            headless, old = request.method == "HEAD", request.version < HttpVersion11
            if len(self._content) > UNSENT and not headless:  # too much to be copied behind its header
                transport.writelines((self.whole(headless=True, old=old), self._content))
            else:
                transport.write(self.whole(headless=headless, old=old))
            if self.written is not None:
                self.written()
            if transport.get_write_buffer_size() > UNSENT:
                try:
                    async with asyncio.timeout(self._line.send_timeout):
                        await request.writer.drain()
                except TimeoutError:
                    transport.abort()
                    raise ConnectionResetError("the client does not receive") from None
        finally:
            self._line.release()


def answer(value: Any, status: int = 200) -> Answer:
    return Answer(orjson.dumps(value), status)


def refusal(status: int, text: str, headers: Mapping[str, str] | None = None) -> Answer:
    line = " ".join(text.split())
    return Answer(orjson.dumps({"error": line if len(line) <= LONGEST else f"{line[:LONGEST]}…"}), status, headers)


class TooLarge(Exception):
    """A body is larger than the server takes."""


def unpacked(body: bytes, coding: str, most: int) -> bytes:
    """A body that came as gzip or deflate. Raises TooLarge as soon as it has more than `most` bytes, BadInput."""
    bare = coding == "deflate" and body[:1] and body[0] & 15 != 8  # some send it without zlib's header
    opener = zlib.decompressobj(-15 if bare else WBITS[coding])
    try:
        found = opener.decompress(body, most + 1)
    except zlib.error as error:
        raise BadInput(f"wanted a body in {coding}; it could not be unpacked: {error}") from None
    if len(found) > most:
        raise TooLarge
    if not opener.eof or opener.unused_data:
        raise BadInput(f"wanted a body in {coding}; found {'more after its end' if opener.eof else 'a part of one'}")
    return found


def packed(body: bytes, accepted: str) -> tuple[bytes, str | None]:
    """The body as gzip or deflate, where the header Accept-Encoding takes one of them."""
    for one in accepted.lower().split(",") if len(body) >= PACK_FROM else ():
        name, _, weight = one.replace(" ", "").partition(";q=")
        if name in WBITS and (not weight or weight.strip("0.")):
            packer = zlib.compressobj(1, wbits=WBITS[name])
            return packer.compress(body) + packer.flush(), name
    return body, None
