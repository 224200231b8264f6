"""The engine by itself, on real sockets: what its connections go through between blocks. The rest is in tests/e2e."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtest import _rows
from loadtest._connection import Connection, Work, resolve
from loadtest._engine import Engine
from loadtest._samples import OK, OUTCOME
from tests.e2e import raw
from tests.e2e.raw import Raw


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(10.0, lambda error: None)
    yield made
    made.close()


def connections(server: Raw, folder: Path, n: int) -> list[Connection]:
    rows = _rows.load("null", raw.write_rows(folder))
    address = resolve(server.url)
    work = Work(address, _rows.prepare(rows, 1, 1, _rows.Signature(output="rows")), 1)
    return [Connection(address, number, work) for number in range(n)]


def test_what_the_server_closed_just_before_a_block_is_opened_again_and_no_failure(
    engine: Engine, tmp_path: Path
) -> None:
    server = Raw()
    three = connections(server, tmp_path, 3)
    engine.run_block(three, 0.05)
    assert set(engine.take()[:, OUTCOME]) == {OK}
    before = server.connections
    server.stop()
    server.listen()
    time.sleep(0.2)  # meanwhile the hub does not run, as while blocks are written to disk
    engine.run_block(three, 0.05)
    assert set(engine.take()[:, OUTCOME]) == {OK} and server.connections == before + 3
    pace = engine.take_pace()
    assert (pace.reconnects, pace.gap_ns) == (0, 0)  # it was no gap in a block


def test_connections_that_the_server_ends_are_counted_with_the_time_without_them(
    engine: Engine, tmp_path: Path
) -> None:
    (one,) = connections(Raw(raw.saying_close), tmp_path, 1)
    for _ in range(2):
        block = engine.run_block([one], 0.3)
        requests, pace = len(engine.take()), engine.take_pace()
        assert requests > 1 and pace.reconnects in (requests - 1, requests)  # the last may find that its time is over
        assert 0 < pace.gap_ns < block.drained_ns - block.start_ns  # not the pause between the blocks
        time.sleep(1)
