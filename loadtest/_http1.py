"""One HTTP/1.1 answer at a time, from bytes as they arrive in pieces of any size. No I/O here. RFC 9112.

The client that uses this sends POST requests without Accept-Encoding, TE or Upgrade, one at a time per connection;
whatever such a request cannot be answered with is Garbled rather than guessed at.
"""

import re
from functools import lru_cache
from typing import NamedTuple

MAX_HEAD_BYTES = 64 * 1024
MAX_BODY_BYTES = 256 * 1024 * 1024

# What a head says about its body where that is no number of bytes.
CHUNKED = -1
UNTIL_CLOSE = -2
INTERIM = -3  # a 1xx answer: the real one follows

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\r\n]*)?\r\n")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n]*?)[ \t]*\r\n")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_PROTOCOL = b"HTTP/1."


class Garbled(Exception):
    """The bytes are no HTTP/1.1 answer to what was asked; the connection cannot be used any more."""


class Head(NamedTuple):
    """`length` is the body's bytes, or CHUNKED, UNTIL_CLOSE, INTERIM; `close`: the server ends the connection.
    `json_size`: what Inference-Header-Content-Length says, -1 where it is not there."""

    status: int
    length: int
    close: bool
    json_size: int = -1


def without_timing(head: bytes) -> tuple[bytes, bytes]:
    """The head without its first field Server-Timing, which differs from answer to answer, and that field's value."""
    at = head.find(b"\r\nServer-Timing:")
    if at < 0:
        at = head.find(b"\r\nserver-timing:")
        if at < 0:
            return head, b""
    end = head.find(b"\r\n", at + 2)
    return head[:at] + head[end:], head[at + 16 : end].strip(b" \t")


@lru_cache(maxsize=512)  # heads of one server repeat but for Date: with the cache a head costs a hash, not a parse
def parse_head(head: bytes) -> Head:
    """Parse status line and fields, up to and including the empty line. Raises Garbled."""
    line = _STATUS_LINE.match(head)
    if line is None:
        raise Garbled(f"no HTTP/1.1 status line: {head[:40]!r}")
    status = int(line[2])
    length: int | None = None
    chunked, connection, json_size = False, b"", -1
    at, end = line.end(), len(head) - 2
    while at < end:
        field = _FIELD.match(head, at)
        if field is None:
            raise Garbled(f"no header field: {head[at : at + 40]!r}")
        at = field.end()
        name, value = field[1].lower(), field[2]
        if name == b"content-length":
            if not value.isdigit() or len(value) > 18 or length not in (None, int(value)):
                raise Garbled(f"a Content-Length of {value[:40]!r}")
            length = int(value)
        elif name == b"transfer-encoding":
            if value.lower() != b"chunked" or chunked:
                raise Garbled(f"a Transfer-Encoding of {value[:40]!r}, which was not asked for")
            chunked = True
        elif name == b"inference-header-content-length":
            if not value.isdigit() or len(value) > 18:
                raise Garbled(f"an Inference-Header-Content-Length of {value[:40]!r}")
            json_size = int(value)
        elif name == b"connection":
            connection += b"," + value.lower()
    tokens = {token.strip() for token in connection.split(b",")}
    close = b"close" in tokens or (line[1] == b"0" and b"keep-alive" not in tokens)
    return Head(status, _length(status, length, chunked), close, json_size)


def _length(status: int, length: int | None, chunked: bool) -> int:
    """How the body ends, RFC 9112 section 6.3."""
    if status == 101:
        raise Garbled("101 Switching Protocols, which was not asked for")
    if status < 200:
        return INTERIM
    if status in (204, 304):
        return 0
    if chunked:
        if length is not None:
            raise Garbled("both Content-Length and Transfer-Encoding")
        return CHUNKED
    if length is None:
        return UNTIL_CLOSE
    if length > MAX_BODY_BYTES:
        raise Garbled(f"a body of {length} bytes; {MAX_BODY_BYTES} is the most that is read")
    return length


class AnswerReader:
    """Reads one answer after the other from one connection.

    After `feed` or `end` returned True, the answer is in `status`, `body`, `close`, `size` (its bytes on the wire,
    interim answers included), `timing` (what its field Server-Timing says) and `json_size` (see Head) until the next
    `feed`.
    """

    __slots__ = ("_at", "_body", "_buffer", "_head", "_left", "body", "close", "json_size", "size", "status", "timing")

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self.close = False
        self.size = 0
        self.timing = b""
        self.json_size = -1
        self._reset()

    def _reset(self) -> None:
        self._buffer = bytearray()
        self._at = 0  # how much of the buffer is used up
        self._head: Head | None = None
        self._body = bytearray()  # chunks, joined
        self._left: int | None = None  # of the current chunk; None between chunks, 0 in the trailer

    @property
    def received(self) -> int:
        """Bytes of an answer that is not complete yet."""
        return len(self._buffer)

    def feed(self, data: bytes) -> bool:
        """Take the next bytes; True when they complete an answer. Raises Garbled."""
        if not self._buffer:
            # An answer usually arrives in one piece; the rest of this class is for when it does not.
            end = data.find(b"\r\n\r\n") + 4
            if end > 3:
                fields, self.timing = without_timing(data[:end])
                head = parse_head(fields)
                if head.length == len(data) - end:
                    self.status, _, self.close, self.json_size = head
                    self.body = data[end:]
                    self.size = len(data)
                    return True
        self._buffer += data
        while self._head is None:
            if not self._take_head():
                return False
        return self._take_body(self._head)

    def end(self) -> bool:
        """The server has closed the connection; True when that is what ends the answer."""
        if self._head is None or self._head.length != UNTIL_CLOSE:
            return False
        return self._done(self._head, bytes(self._buffer[self._at :]))

    def _take_head(self) -> bool:
        buffer = self._buffer
        end = buffer.find(b"\r\n\r\n", self._at) + 4
        if end < 4:
            begun = bytes(buffer[self._at : self._at + len(_PROTOCOL)])
            if begun != _PROTOCOL[: len(begun)] or _BARE_LF.search(buffer, self._at):
                raise Garbled(f"no HTTP/1.1 answer: {bytes(buffer[self._at : self._at + 40])!r}")
            if len(buffer) - self._at > MAX_HEAD_BYTES:
                raise Garbled(f"a head of more than {MAX_HEAD_BYTES} bytes")
            return False
        fields, self.timing = without_timing(bytes(buffer[self._at : end]))
        head = parse_head(fields)
        self._at = end
        if head.length != INTERIM:
            self._head = head
        elif end > MAX_HEAD_BYTES:
            raise Garbled("interim answers without end")
        return True

    def _take_body(self, head: Head) -> bool:
        if head.length == CHUNKED:
            return self._take_chunks(head)
        have = len(self._buffer) - self._at
        if head.length == UNTIL_CLOSE:
            if have > MAX_BODY_BYTES:
                raise Garbled(f"a body of more than {MAX_BODY_BYTES} bytes")
            return False
        if have < head.length:
            return False
        if have > head.length:
            raise Garbled(f"{have - head.length} bytes more than the answer has")
        return self._done(head, bytes(self._buffer[self._at :]))

    def _take_chunks(self, head: Head) -> bool:
        buffer = self._buffer
        while True:
            if self._left is None:
                end = buffer.find(b"\n", self._at) + 1
                size = _CHUNK_SIZE.match(buffer, self._at)
                if size is None:
                    if end or len(buffer) - self._at > 1024:
                        raise Garbled(f"no chunk size: {bytes(buffer[self._at : self._at + 40])!r}")
                    return False
                self._left, self._at = int(size[1], 16), size.end()
                if len(self._body) + self._left > MAX_BODY_BYTES:
                    raise Garbled(f"a body of more than {MAX_BODY_BYTES} bytes")
            elif self._left == 0:
                return self._take_trailer(head)
            else:
                end = self._at + self._left
                if len(buffer) < end + 2:
                    return False
                if buffer[end : end + 2] != b"\r\n":
                    raise Garbled("a chunk longer than its size")
                self._body += memoryview(buffer)[self._at : end]
                self._left, self._at = None, end + 2

    def _take_trailer(self, head: Head) -> bool:
        while True:
            end = self._buffer.find(b"\r\n", self._at)
            if end < 0:
                if len(self._buffer) - self._at > MAX_HEAD_BYTES:
                    raise Garbled(f"a trailer of more than {MAX_HEAD_BYTES} bytes")
                return False
            empty = end == self._at
            self._at = end + 2
            if empty:
                break
        if len(self._buffer) > self._at:
            raise Garbled(f"{len(self._buffer) - self._at} bytes more than the answer has")
        return self._done(head, bytes(self._body))

    def _done(self, head: Head, body: bytes) -> bool:
        self.status, self.json_size = head.status, head.json_size
        self.close = head.close or head.length == UNTIL_CLOSE
        self.body = body
        self.size = len(self._buffer)
        self._reset()
        return True
