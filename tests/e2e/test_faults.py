"""Real faults under open arrivals and many connections: each is marked, and no request is silently missing."""

import signal
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.e2e import raw
from tests.e2e.raw import Raw
from tests.e2e.test_locust import our_server, plain


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return raw.write_rows(folder)


def complete(frame: pd.DataFrame, rate: float) -> bool:
    """Whether every arrival of a constant rate is there, none of them twice."""
    gaps = np.diff(np.sort(frame.intended_ns))
    return len(frame) > rate and bool((np.abs(gaps - 1e9 / rate) <= 1).all())


def test_a_server_that_stops_for_five_seconds(tmp_path: Path) -> None:
    with our_server("null") as (url, process):

        def stop_and_go_on() -> None:
            time.sleep(6)
            process.send_signal(signal.SIGSTOP)
            time.sleep(5)
            process.send_signal(signal.SIGCONT)

        threading.Thread(target=stop_and_go_on, daemon=True).start()
        words = ("--scenario", "constant", "--rate", 100, "--model", "null", "--samples", "s.parquet", "--csv", "st")
        done = plain(tmp_path, url, *words, users=8, seconds=18)
    assert done.returncode == 0, done.stderr
    frame = pd.read_parquet(tmp_path / "s.parquet")
    assert complete(frame, 100) and set(frame.outcome) == {"ok"}
    waited_s = (frame.received_ns - frame.intended_ns) / 1e9
    # 500 requests were meant to start in the stop; half of them waited for more than half of it.
    assert waited_s.max() == pytest.approx(5, abs=1) and 200 < (waited_s > 2.5).sum() < 320
    assert pd.read_csv(tmp_path / "st_stats.csv")["99%"][0] == pytest.approx(waited_s.quantile(0.99) * 1000, rel=0.02)


def test_a_stop_that_is_longer_than_the_time_out(tmp_path: Path) -> None:
    with our_server("null") as (url, process):

        def stop() -> None:
            time.sleep(5)
            process.send_signal(signal.SIGSTOP)

        threading.Thread(target=stop, daemon=True).start()
        words = ("--scenario", "constant", "--rate", 100, "--model", "null", "--samples", "s.parquet", "--csv", "st")
        done = plain(tmp_path, url, *words, "--request-timeout", 2, users=8, seconds=12)
        process.send_signal(signal.SIGCONT)
    assert done.returncode == 1
    frame = pd.read_parquet(tmp_path / "s.parquet")
    assert complete(frame, 100) and set(frame.outcome) == {"ok", "timeout"}
    late = frame[frame.outcome == "timeout"]
    assert len(late) > 300 and late.sent_ns.isna().sum() > 100  # those that no connection could take were never sent
    stats = pd.read_csv(tmp_path / "st_stats.csv").iloc[0]
    assert stats["Failure Count"] == len(late) and stats["99%"] == np.inf and stats["Request Count"] == len(frame)
    assert pd.read_csv(tmp_path / "st_failures.csv")[["Error", "Occurrences"]].to_numpy().tolist() == [
        ["timeout", len(late)]
    ]


def test_a_server_that_closes_each_connection_after_one_request(tmp_path: Path, data: Path) -> None:
    def once(connection: raw.socket.socket, body: bytes, n: int) -> None:
        raw.well(connection, body, n)
        connection.close()

    server = Raw(once)
    words = ("--scenario", "constant", "--rate", 50, "--samples", "s.parquet", "--data", data)
    done = plain(tmp_path, server.url, *words, users=4, seconds=6)
    frame = pd.read_parquet(tmp_path / "s.parquet")
    assert complete(frame, 50) and set(frame.outcome) == {"ok"}, done.stderr  # each was closed while idle
    assert server.connections >= len(frame)
    assert "gaps: connections ended and came back" in done.stderr


@pytest.mark.parametrize(
    ("behave", "outcome"), [(raw.every_third_reset, "reset"), (raw.every_third_garbled, "garbled")]
)
def test_failures_leave_no_arrival_out(tmp_path: Path, data: Path, behave: raw.Behaviour, outcome: str) -> None:
    words = ("--scenario", "constant", "--rate", 90, "--samples", "s.parquet", "--csv", "st", "--data", data)
    done = plain(tmp_path, Raw(behave).url, *words, users=8, seconds=6)
    assert done.returncode == 1
    frame = pd.read_parquet(tmp_path / "s.parquet")
    assert complete(frame, 90)
    assert (frame.outcome == outcome).mean() == pytest.approx(1 / 3, abs=0.02)
    assert pd.read_csv(tmp_path / "st_stats.csv")["75%"][0] == np.inf  # a third of all, and it counts
    assert "gaps: connections ended and came back" in done.stderr


def test_what_an_overloaded_server_does_not_answer_is_waited_for_and_times_out(tmp_path: Path, data: Path) -> None:
    """20 requests a second at most, 60 are meant to start: at the end of the test two of three are still waiting."""
    turn = threading.Lock()

    def one_at_a_time(connection: raw.socket.socket, body: bytes, n: int) -> None:
        with turn:
            time.sleep(0.05)
        raw.well(connection, body, n)

    words = ("--scenario", "constant", "--rate", 60, "--request-timeout", 8, "--samples", "s.parquet", "--data", data)
    done = plain(tmp_path, Raw(one_at_a_time).url, *words, users=4, seconds=6)
    frame = pd.read_parquet(tmp_path / "s.parquet")
    assert complete(frame, 60) and set(frame.outcome) == {"ok", "timeout"}
    assert done.returncode == 1 and "unanswered" not in done.stderr
    assert (frame.received_ns - frame.intended_ns).max() > 6e9  # answers came that were waited for after the end


def test_a_thousand_connections(tmp_path: Path) -> None:
    with our_server("null") as (url, _):
        words = ("--model", "null", "--samples", "s.parquet", "--check", 1)
        done = plain(tmp_path, url, *words, users=1000, seconds=12)
    frame = pd.read_parquet(tmp_path / "s.parquet")
    assert done.returncode == 0, done.stderr
    assert set(frame.connection) == set(range(1000)) and set(frame.outcome) == {"ok"}


@pytest.mark.parametrize(("name", "place"), [("s.csv", "s.csv"), ("s.parquet", "s.parquet.parts")])
def test_the_disk_is_full_under_open_arrivals(tmp_path: Path, data: Path, name: str, place: str) -> None:
    from tests.e2e.test_locust import last_line, on_a_small_disk

    server = Raw()
    words = ("--headless", "-u", 4, "-t", "60s", "--host", server.url, "--data", data, "--scenario", "poisson")
    done = on_a_small_disk(tmp_path, *words, "--rate", 500, "--samples", f"small/{name}")
    assert done.returncode == 1
    assert last_line(done).startswith(f"error: could not write small/{place}: No space left on device; ")
    frame = pd.read_csv(tmp_path / place) if name == "s.csv" else pd.read_parquet(tmp_path / place)
    assert set(frame.outcome) == {"ok"} and len(frame) > 500
