"""Server-Timing: read together where it has the usual form, one by one where it has not, and to the nanosecond."""

import numpy as np
import pytest

from loadtest._http1 import AnswerReader
from loadtest._timing import ABSENT, LONGEST_NS, STAGES, parse


def usual(ns: list[int]) -> bytes:
    return ", ".join(f"{stage};dur={n / 1e6:.6f}" for stage, n in zip(STAGES, ns, strict=True)).encode()


def test_the_usual_form_is_exact() -> None:
    drawn = np.random.default_rng(1)
    ns = np.exp(drawn.uniform(0, 21, (5000, len(STAGES)))).astype(np.int64)
    ns[0] = 0
    found = parse([usual(row) for row in ns.tolist()])
    assert (found == ns).all()


def test_answers_without_it_are_absent_and_stay_in_their_rows() -> None:
    row = [1, 2, 3, 4, 5, 6, 7]
    found = parse([b"", usual(row), b"", usual(row)])
    assert found.tolist() == [[ABSENT] * 7, row, [ABSENT] * 7, row]
    assert parse([]).shape == (0, 7)
    assert (parse([b"", b""]) == ABSENT).all()


@pytest.mark.parametrize(
    ("value", "stages"),
    [
        (b"compute;dur=1.5", {"compute": 1_500_000}),
        (b"compute;dur=2", {"compute": 2_000_000}),
        (b'cache;desc="hit";dur=23.2, db;dur=53, total;dur=47.2', {"total": 47_200_000}),
        (b'queue;desc="of one";dur="0.25",total; dur = 1', {"queue": 250_000, "total": 1_000_000}),
        (b"miss, compute;dur=0.000001", {"compute": 1}),
        (b"compute;dur=99999999", {"compute": LONGEST_NS}),
        (b"compute;dur=-1, total;dur=x", {}),
        (b"\xff\xfe;;;=,", {}),
    ],
)
def test_other_forms(value: bytes, stages: dict[str, int]) -> None:
    ordinary = [1, 2, 3, 4, 5, 6, 7]
    found = parse([usual(ordinary), value])  # one unusual value does not spoil the others
    assert found[0].tolist() == ordinary
    assert found[1].tolist() == [stages.get(stage, ABSENT) for stage in STAGES]


def test_a_value_of_the_usual_names_without_digits_is_absent() -> None:
    value = b", ".join(b"%s;dur=." % stage.encode() for stage in STAGES)
    assert (parse([value]) == ABSENT).all()


@pytest.mark.parametrize("name", [b"Server-Timing", b"server-timing"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("size", [1, 4096])
def test_the_parser_takes_it_out_of_the_head(name: bytes, last: bool, size: int) -> None:
    fields = [b"Content-Length: 2", name + b":  total;dur=1.5 "]
    head = b"\r\n".join([b"HTTP/1.1 200 OK", *(fields if last else fields[::-1])])
    data = head + b"\r\n\r\n{}"
    reader = AnswerReader()
    for at in range(0, len(data), size):
        done = reader.feed(data[at : at + size])
    assert done and (reader.status, reader.body, reader.timing) == (200, b"{}", b"total;dur=1.5")
    assert reader.size == len(data)
    assert reader.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") and reader.timing == b""
