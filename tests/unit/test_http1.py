"""The answer parser: however an answer is cut into pieces, it is read the same, or refused."""

import itertools
import random

import pytest

from loadtest._http1 import MAX_BODY_BYTES, MAX_HEAD_BYTES, AnswerReader, Garbled

LENGTH = b"HTTP/1.1 200 OK\r\nServer: x\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3\r\nhel\r\n00A;name=value\r\nlo, world!\r\n0\r\nTrailer: yes\r\n\r\n"
)
# bytes, status, body, close
ANSWERS = {
    "length": (LENGTH, 200, b"hello", False),
    "chunked": (CHUNKED, 200, b"hello, world!", False),
    "chunked, empty": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n0\r\n\r\n", 200, b"", False),
    "empty body": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200, b"", False),
    "no reason": (b"HTTP/1.1 503\r\ncontent-length:2\r\n\r\n{}", 503, b"{}", False),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", False),
    "304 with a length": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n", 304, b"", False),
    "close": (b"HTTP/1.1 200 OK\r\nConnection: foo , Close\r\nContent-Length: 1\r\n\r\nx", 200, b"x", True),
    "1.0 closes": (b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx", 200, b"x", True),
    "1.0 stays": (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 1\r\n\r\nx", 200, b"x", False),
    "interim": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + LENGTH, 200, b"hello", False,
    ),
    "same length twice": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx", 200, b"x", False,
    ),
    "line ends in the body": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n\r\n\r\n\r\n\r\n", 200, b"\r\n\r\n\r\n\r\n", False,
    ),
}  # fmt: skip


def read(reader: AnswerReader, pieces: list[bytes]) -> None:
    """Feed all pieces; the last one, and only that, completes the answer."""
    for piece in pieces[:-1]:
        assert not reader.feed(piece)
    assert reader.feed(pieces[-1])


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("name", ANSWERS)
def test_every_answer_in_one_piece_byte_by_byte_and_cut_anywhere(name: str) -> None:
    data, status, body, close = ANSWERS[name]
    drawn = random.Random(name)
    cuts = [[], list(range(1, len(data)))]
    cuts += [[place] for place in range(1, len(data))]
    cuts += [drawn.sample(range(1, len(data)), drawn.randrange(1, len(data) - 1)) for _ in range(50)]
    reader = AnswerReader()
    for places in cuts:  # one reader for all: nothing of an answer may stay behind
        read(reader, cut(data, places))
        assert (reader.status, reader.body, reader.close, reader.size) == (status, body, close, len(data))


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    for size in (1, 7, 1000):
        data = b"HTTP/1.1 200 OK\r\n\r\nwhatever comes"
        reader = AnswerReader()
        for at in range(0, len(data), size):
            assert not reader.feed(data[at : at + size])
        assert reader.end()
        assert (reader.status, reader.body, reader.close) == (200, b"whatever comes", True)


@pytest.mark.parametrize("data", [b"", LENGTH[:10], LENGTH[:-1], CHUNKED[:-1], CHUNKED[:-20]])
def test_a_connection_that_ends_early_ends_no_answer(data: bytes) -> None:
    reader = AnswerReader()
    if data:
        assert not reader.feed(data)
    assert not reader.end()
    assert reader.received == len(data)


GARBLED = {
    "not HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "another version": b"HTTP/2 200 OK\r\nContent-Length: 0\r\n\r\n",
    "status of two digits": b"HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n",
    "bare line feeds": b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
    "a space before the colon": b"HTTP/1.1 200 OK\r\nContent-Length : 0\r\n\r\n",
    "a folded line": b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 0\r\n\r\n",
    "negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    "no number": b"HTTP/1.1 200 OK\r\nContent-Length: five\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "length and chunks": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    "unknown coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    "a switch": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n",
    "too large": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1),
    "more than the answer": LENGTH + b"!",
    "more than the chunks": CHUNKED + b"!",
    "no chunk size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nhello\r\n",
    "a chunk too long": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhello\r\n0\r\n\r\n",
    "an endless head": b"HTTP/1.1 200 OK\r\nX: " + b"y" * (MAX_HEAD_BYTES + 1),
    "an endless trailer": CHUNKED[:-2] + b"X: " + b"y" * (MAX_HEAD_BYTES + 1),
}


@pytest.mark.parametrize("name", GARBLED)
@pytest.mark.parametrize("size", [1, 4096])
def test_what_is_no_answer_is_refused(name: str, size: int) -> None:
    if size == 1 and len(GARBLED[name]) > 1000:
        size = 997
    data, reader = GARBLED[name], AnswerReader()
    with pytest.raises(Garbled):
        for at in range(0, len(data), size):
            # Where an answer is complete before the garbage comes, the next one begins with the garbage.
            reader.feed(data[at : at + size])


def test_a_second_answer_in_the_same_piece_was_not_asked_for() -> None:
    with pytest.raises(Garbled):
        AnswerReader().feed(LENGTH + LENGTH)


def test_garbage_is_told_by_its_first_bytes() -> None:
    with pytest.raises(Garbled):
        AnswerReader().feed(b"HTTQ")


def test_a_large_body_in_small_pieces() -> None:
    body = random.Random(1).randbytes(300_000)
    plain = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    pieces = [body[at : at + 1777] for at in range(0, len(body), 1777)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    for data in (plain, chunked):
        reader = AnswerReader()
        read(reader, [data[at : at + 1460] for at in range(0, len(data), 1460)])
        assert reader.body == body
