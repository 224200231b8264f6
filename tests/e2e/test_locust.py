"""The real `locust` command: against the project's server on loopback, and against servers that misbehave."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pandas as pd
import pytest

from loadtest._arrivals import parse, pieces
from loadtest._order import block_length
from loadtest._samples import is_partial
from loadtest._timing import STAGES
from tests.e2e import raw
from tests.e2e.raw import Raw

ROOT = Path(__file__).resolve().parents[2]
LOCUST = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest")]
BOUND_S = 120  # for what takes five seconds
Done = subprocess.CompletedProcess[str]


def locust(folder: Path, *words: object, bound_s: float = BOUND_S) -> Done:
    argv = [*LOCUST, *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=bound_s, cwd=folder, stdin=subprocess.DEVNULL)


def plain(folder: Path, url: str, *words: object, users: int = 4, seconds: float = 2) -> Done:
    return locust(folder, "--headless", "-u", users, "-r", users, "-t", f"{seconds}s", "--host", url, *words)


def last_line(done: Done) -> str:
    return done.stderr.strip().splitlines()[-1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def our_server(*models: str, host: str = "127.0.0.1") -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`python -m server` on loopback, once it is ready."""
    port = free_port()
    argv = [sys.executable, "-m", "server", "--host", host, "--port", str(port)]
    process = subprocess.Popen([*argv, *(word for model in models for word in ("--model", model))], cwd=ROOT)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://{host}:{port}/v2/health/ready", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, "the server did not get ready"
                time.sleep(0.05)
        yield f"http://{host}:{port}", process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with our_server("knn", "dnn", "null") as (url, _):
        yield url


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return raw.write_rows(folder)


# Plain Locust, the project's own server


@pytest.mark.parametrize(
    ("model", "rows", "encoding"),
    [("knn", 1, "binary"), ("knn", 32, "binary"), ("dnn", 1, "json"), ("dnn", 5, "binary"), ("null", 5, "json")],
)
def test_plain_locust_as_the_readme_calls_it(tmp_path: Path, server: str, model: str, rows: int, encoding: str) -> None:
    done = plain(
        tmp_path, server, "--model", model, "--rows", rows, "--check", 1, "--csv", "st", "--samples", "s.parquet",
        "--encoding", encoding,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    frame = pd.read_parquet(tmp_path / "s.parquet")
    assert len(frame) > 20
    assert set(frame.outcome) == {"ok"} and set(frame.status) == {200}
    assert set(frame.model) == {model} and set(frame.connection) == {0, 1, 2, 3}
    stamped = frame[frame.first_byte_ns.notna()]
    assert len(stamped) > 0.9 * len(frame)  # by the kernel
    assert (stamped.sent_ns <= stamped.first_byte_ns).all() and (stamped.first_byte_ns <= stamped.received_ns).all()
    assert (frame.server_total_ns < frame.received_ns - frame.sent_ns).all()  # the server says what it took
    for _, own in frame.groupby("connection"):  # one request at a time on each connection
        assert (own.sent_ns.to_numpy()[1:] >= own.received_ns.to_numpy()[:-1]).all()
    stats = pd.read_csv(tmp_path / "st_stats.csv")
    assert stats.Name.tolist() == [f"{server.removeprefix('http://')}/{model}", "Aggregated"]
    assert 0 < stats["Request Count"][0] <= len(frame) and stats["Failure Count"][0] == 0
    # Locust's own figures are whole milliseconds; ours carry three digits of the true ones.
    true_ms = (frame.received_ns - frame.sent_ns).quantile(0.5) / 1e6
    shown = re.search(rf"/{model}: {len(frame)} requests, 0 failed  p50 (\S+) µs", done.stderr)
    assert shown and float(shown[1]) / 1000 == pytest.approx(true_ms, rel=0.02)


def test_csv_samples(tmp_path: Path, server: str) -> None:
    done = plain(tmp_path, server, "--samples", "s.csv")
    assert done.returncode == 0, done.stderr
    frame = pd.read_csv(tmp_path / "s.csv")
    assert len(frame) > 20 and set(frame.outcome) == {"ok"}


def test_several_processes(tmp_path: Path, server: str) -> None:
    done = plain(tmp_path, server, "--processes", 2, "--csv", "st", "--samples", "s.parquet", seconds=6)
    assert done.returncode == 0, done.stderr
    frame = pd.concat([pd.read_parquet(tmp_path / f"s-{worker}.parquet") for worker in (0, 1)])
    assert set(frame.worker) == {0, 1}
    shown = re.search(r"/knn: (\d+) requests, 0 failed", done.stderr)
    assert shown and int(shown[1]) == len(frame)  # nothing is lost on the way to the master


def test_what_comes_before_all_users_are_there_is_warm_up_where_locust_resets_its_statistics(
    tmp_path: Path, server: str
) -> None:
    words = ("--headless", "-u", 4, "-r", 1, "-t", "8s", "--host", server, "--csv", "st", "--samples", "s.parquet")
    done = locust(tmp_path, *words, "--reset-stats")
    assert done.returncode == 0, done.stderr
    frame = pd.read_parquet(tmp_path / "s.parquet")
    assert set(frame.connection[frame.warmup]) >= {0, 1, 2} and set(frame.connection[~frame.warmup]) == {0, 1, 2, 3}
    assert pd.read_csv(tmp_path / "st_stats.csv")["Request Count"][0] == (~frame.warmup).sum()
    done = locust(tmp_path, *words)
    frame = pd.read_parquet(tmp_path / "s.parquet")
    assert not frame.warmup.any() and pd.read_csv(tmp_path / "st_stats.csv")["Request Count"][0] == len(frame)


def test_what_cannot_be_tested_is_one_line_and_no_success(tmp_path: Path, data: Path) -> None:
    other = Raw()
    cases = [
        ([], 2, "no host was given"),
        (["--host", "https://127.0.0.1:1"], 2, "plain HTTP only"),
        (["--host", other.url, "--rows", "0"], 2, "--rows is 0"),
        (["--host", other.url, "--samples", "s.xlsx"], 2, ".parquet or .csv"),
        (["--host", other.url, "--samples", "no/such/s.csv"], 1, "could not write"),
        (["--host", other.url, "--model", "bert"], 2, "known are knn, null"),
        (["--host", f"http://127.0.0.1:{free_port()}"], 1, "no server answers"),
        (["--host", f"{other.url}/elsewhere"], 1, "does not speak the Open Inference Protocol"),
    ]
    for words, code, text in cases:
        for more in ([], ["--processes", "2"]) if text in ("no host was given", "could not write") else ([],):
            done = locust(tmp_path, "--headless", "-t", "5s", "--data", data, *words, *more)
            assert done.returncode == code, (words, done.stderr)
            (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
            assert text in line
            assert "Traceback" not in done.stderr


def test_a_model_that_the_server_does_not_know(tmp_path: Path) -> None:
    with our_server("knn") as (url, _):
        done = plain(tmp_path, url, "--model", "dnn")
    assert done.returncode == 1
    assert f"the server at {url} does not know the model 'dnn'" in last_line(done)


# The page


@pytest.fixture
def page(tmp_path: Path) -> Iterator[str]:
    port = free_port()
    process = subprocess.Popen(
        [*LOCUST, "--web-host", "127.0.0.1", "--web-port", str(port)],
        cwd=tmp_path, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: "window.templateArgs" in ask(url + "/"), "the page")
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def ask(url: str, form: dict[str, Any] | None = None) -> str:
    try:
        with urllib.request.urlopen(url, None if form is None else urlencode(form).encode(), timeout=30) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def wait_for(met: Any, what: str, bound_s: float = 60) -> None:
    end = time.monotonic() + bound_s
    while not met():
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.2)


def test_the_page_takes_host_and_options_and_shows_failures(page: str, server: str, tmp_path: Path) -> None:
    front = ask(page + "/")
    for option in ("model", "rows", "check", "seed", "samples", "request_timeout", "data"):
        assert re.search(
            rf'"{option}": {{"choices": null, "default_value": [^}}]*"help_text": "[A-Z][^}}]+[.)]"', front
        ), option
    assert "whole milliseconds" in front
    assert '"endpoints"' not in front  # run mode is no business of the page
    form = {"user_count": 3, "spawn_rate": 3, "host": server, "check": 1, "request_timeout": 20}

    ask(page + "/swarm", form | {"model": "bert"})  # cannot be tested: the page says why, and stays
    wait_for(lambda: "no query rows for the model 'bert'" in ask(page + "/exceptions"), "the reason")
    wait_for(lambda: json.loads(ask(page + "/stats/requests"))["state"] == "stopped", "the stop")

    ask(page + "/swarm", form | {"model": "null", "samples": "page.parquet"})
    wait_for(lambda: json.loads(ask(page + "/stats/requests"))["stats"][0]["num_requests"] > 50, "fifty requests")
    entry = json.loads(ask(page + "/stats/requests"))["stats"][0]
    assert entry["name"].endswith("/null") and entry["num_failures"] == 0
    assert 0 < entry["min_response_time"] <= entry["median_response_time"] <= entry["max_response_time"]
    assert entry["median_response_time"] != round(entry["median_response_time"])  # fractions of a millisecond
    ask(page + "/stop", {})
    wait_for(lambda: json.loads(ask(page + "/stats/requests"))["state"] == "stopped", "the stop")
    assert len(pd.read_parquet(tmp_path / "page.parquet")) >= 50

    ask(page + "/swarm", form | {"model": "knn", "samples": ""})  # and a second test, of another model
    wait_for(lambda: json.loads(ask(page + "/stats/requests"))["stats"][0]["name"].endswith("/knn"), "another row")


# Servers that misbehave


def outcomes(folder: Path, url: str, data: Path, *words: object, users: int = 3) -> tuple[pd.DataFrame, Done]:
    done = plain(
        folder, url, "--data", data, "--check", 1, "--samples", "s.parquet", "--csv", "st", *words, users=users
    )
    frame = pd.read_parquet(folder / "s.parquet")
    assert (frame.received_ns.isna() == (frame.outcome != "ok")).all()
    return frame, done


@pytest.mark.parametrize("behave", [raw.byte_by_byte, raw.chunked, raw.interim, raw.saying_close, raw.until_close])
def test_unusual_answers_are_no_failures(tmp_path: Path, data: Path, behave: raw.Behaviour) -> None:
    server = Raw(behave)
    frame, done = outcomes(tmp_path, server.url, data)
    assert done.returncode == 0, done.stderr
    assert len(frame) > 20 and set(frame.outcome) == {"ok"}
    if behave in (raw.saying_close, raw.until_close):
        assert server.connections >= len(frame)
    else:
        assert server.connections <= 5  # three users, and the questions beforehand


@pytest.mark.parametrize(
    ("behave", "outcome", "status"),
    [
        (raw.every_third_503, "wrong_status", 503),
        (raw.every_third_wrong, "wrong_answer", 200),
        (raw.every_third_no_json, "wrong_answer", 200),
        (raw.every_third_reset, "reset", 0),
        (raw.every_third_cut, "reset", 0),
        (raw.every_third_garbled, "garbled", 0),
    ],
)
def test_failures_are_counted_by_kind(
    tmp_path: Path, data: Path, behave: raw.Behaviour, outcome: str, status: int
) -> None:
    server = Raw(behave)
    frame, done = outcomes(tmp_path, server.url, data)
    assert done.returncode == 1
    assert set(frame.outcome) == {"ok", outcome}
    failed = frame[frame.outcome == outcome]
    assert set(failed.status) == {status}
    assert len(failed) == pytest.approx(len(frame) / 3, abs=4)  # none is lost, the rest goes on
    failures = pd.read_csv(tmp_path / "st_failures.csv")
    assert set(failures.Error) == {f"{outcome} {status}" if outcome == "wrong_status" else outcome}
    shown = re.search(r"knn: (\d+) requests, (\d+) failed", done.stderr)
    assert shown and (int(shown[1]), int(shown[2])) == (len(frame), len(failed))


def test_large_requests_go_out_in_parts(tmp_path: Path, data: Path) -> None:
    frame, done = outcomes(tmp_path, Raw().url, data, "--rows", 20_000, "--encoding", "json", users=2)
    assert done.returncode == 0, done.stderr
    assert set(frame.outcome) == {"ok"} and len(frame) >= 2 and frame.bytes_out.min() > 5_000_000


def test_an_answer_that_comes_before_the_request_is_sent(tmp_path: Path, data: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = Raw()

        def too_large() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return  # the test is over
                head = connection.recv(100)
                if head.startswith(b"POST"):
                    connection.sendall(raw.whole(b"{}", status="413 Content Too Large"))
                    time.sleep(0.2)  # so that the answer is read before the reset that follows it
                    raw.reset(connection)
                else:  # the questions beforehand are the other server's to answer
                    with socket.create_connection(("127.0.0.1", server.port)) as other:
                        other.sendall(head + connection.recv(65536) if b"\r\n\r\n" not in head else head)
                        connection.sendall(other.recv(65536))
                    connection.close()

        threading.Thread(target=too_large, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        frame, done = outcomes(tmp_path, url, data, "--rows", 20_000, "--encoding", "json", users=1)
    assert done.returncode == 1
    assert set(frame.outcome) <= {"wrong_status", "reset"} and set(frame.status) <= {413, 0}
    assert 413 in set(frame.status) and (frame.bytes_out < 5_000_000).all()


def test_an_answer_that_does_not_come_is_a_timeout(tmp_path: Path, data: Path) -> None:
    server = Raw(raw.every_third_silent)
    more = ("--request-timeout", 2, "--samples", "s.parquet", "--csv", "st")
    done = plain(tmp_path, server.url, "--data", data, *more, seconds=7)
    assert done.returncode == 1
    frame = pd.read_parquet(tmp_path / "s.parquet")
    assert set(frame.outcome) == {"ok", "timeout"} and (frame.outcome == "timeout").sum() >= 4
    assert pd.read_csv(tmp_path / "st_failures.csv").Error.tolist() == ["timeout"]
    for _, own in frame.groupby("connection"):  # two seconds were waited for it
        gaps_s = np.diff(own.sent_ns)[(own.outcome == "timeout").to_numpy()[:-1]] / 1e9
        assert (gaps_s >= 2).all()


def away_for_two_seconds(after: int) -> Raw:
    """A server that stops once it has had so many requests, and comes back two seconds later."""
    server = Raw()

    def go_and_come_back() -> None:
        wait_for(lambda: server.requests > after, f"{after} requests")
        server.stop()
        time.sleep(2)
        server.listen()

    threading.Thread(target=go_and_come_back, daemon=True).start()
    return server


def test_a_server_that_goes_and_comes_back(tmp_path: Path, data: Path) -> None:
    server = away_for_two_seconds(after=100)
    done = plain(tmp_path, server.url, "--data", data, "--samples", "s.parquet", seconds=12)
    frame = pd.read_parquet(tmp_path / "s.parquet")
    assert done.returncode == 1
    assert set(frame.outcome) <= {"ok", "reset", "refused"}
    refused = frame[frame.outcome == "refused"]
    # The pause doubles from 10 ms up to 1 s: in the two seconds each of four connections tried a handful of times.
    assert 4 <= len(refused) <= 4 * 12
    gap_s = np.diff(frame.sent_ns[frame.outcome == "ok"].sort_values()).max() / 1e9
    assert gap_s > 1.5
    last_ok = frame.received_ns[frame.outcome == "ok"].max()
    assert last_ok > refused.sent_ns.max()  # it came back


def test_not_every_answer_is_compared(tmp_path: Path, data: Path) -> None:
    server = Raw(lambda connection, body, n: connection.sendall(raw.whole(b'{"outputs":[]}')))
    frame, _ = outcomes(tmp_path, server.url, data, "--check", 10)
    wrong = (frame.outcome == "wrong_answer").sum()
    assert wrong == pytest.approx(len(frame) / 10, abs=4)
    frame, done = outcomes(tmp_path, server.url, data, "--check", 0)
    assert set(frame.outcome) == {"ok"} and done.returncode == 0


def test_ctrl_c_keeps_the_samples(tmp_path: Path, data: Path) -> None:
    server = Raw()
    argv = [
        *LOCUST,
        "--headless",
        "-u",
        "2",
        "-r",
        "2",
        "--host",
        server.url,
        "--data",
        str(data),
        "--samples",
        "s.parquet",
    ]
    process = subprocess.Popen(argv, cwd=tmp_path, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: server.requests > 100, "a hundred requests")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert len(pd.read_parquet(tmp_path / "s.parquet")) >= 100


def test_a_stopping_user_gets_its_last_answer(tmp_path: Path, data: Path) -> None:
    server = Raw(raw.slow)
    done = plain(tmp_path, server.url, "--data", data, "--samples", "s.parquet", "--stop-timeout", 20, users=2)
    frame = pd.read_parquet(tmp_path / "s.parquet")
    assert done.returncode == 0, done.stderr
    assert len(frame) == server.requests


def test_a_full_disk_ends_the_test_and_names_the_file(tmp_path: Path, data: Path) -> None:
    done = on_a_small_disk(
        tmp_path, "--headless", "-u", 4, "-t", "60s", "--host", Raw().url, "--data", data, "--samples", "small/s.csv"
    )
    assert done.returncode == 1
    assert re.fullmatch(r"error: could not write small/s\.csv: No space left on device; .*", last_line(done))
    assert set(pd.read_csv(tmp_path / "s.csv").outcome) == {"ok"}


def on_a_small_disk(folder: Path, *words: object) -> Done:
    """Run locust with `small/`, a file system of 256 KiB; what it wrote there lies in `folder` afterwards."""
    (folder / "small").mkdir()
    script = 'mount -t tmpfs -o size=256k none small && "$@"; code=$?; cp -r small/. .; exit $code'
    own = ["unshare", "--mount", *(["--user", "--map-root-user"] if os.getuid() else [])]
    if subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here; root, or unprivileged user namespaces, would make this run")
    argv = [*own, "sh", "-c", script, "sh", *LOCUST, *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=BOUND_S, cwd=folder, stdin=subprocess.DEVNULL)


# Loads with an intended start


@pytest.mark.parametrize("users", [1, 32])
def test_a_stall_is_seen_by_all_requests_that_were_meant_to_start_in_it(tmp_path: Path, data: Path, users: int) -> None:
    """120 ms of every 0.9 s: an eighth of the requests waits, evenly from 0 to 120 ms, so that p99 is known."""
    server = Raw(raw.stalling)
    words = ("--scenario", "constant", "--rate", 350, "--samples", "s.parquet", "--csv", "st", "--data", data)
    done = plain(tmp_path, server.url, *words, users=users, seconds=12)
    assert done.returncode == 0, done.stderr
    frame = pd.read_parquet(tmp_path / "s.parquet")
    assert set(frame.load) == {"constant-350"} and set(frame.connection) <= set(range(users))
    intended = np.sort(frame.intended_ns)
    assert (np.abs(np.diff(intended) - 1e9 / 350) <= 1).all()  # every one of them is there
    stalled = raw.STALL_S / raw.EVERY_S
    true_ms = raw.STALL_S * 1000 * (1 - 0.01 / stalled)
    ms = (frame.received_ns - frame.intended_ns) / 1e6
    assert ms.quantile(0.99) == pytest.approx(true_ms, rel=0.06)
    assert pd.read_csv(tmp_path / "st_stats.csv")["99%"][0] == pytest.approx(true_ms, rel=0.06)
    shown = re.search(r"arrivals: (\d+), woken for late by", done.stderr)
    assert shown and int(shown[1]) == len(frame) == server.requests


@pytest.mark.parametrize("processes", [0, 2])
def test_poisson_arrivals_are_one_seeded_schedule_over_all_workers(tmp_path: Path, data: Path, processes: int) -> None:
    words = ("--scenario", "poisson", "--rate", 400, "--seed", 5, "--samples", "s.parquet", "--data", data)
    words += ("--processes", processes) if processes else ()
    done = plain(tmp_path, Raw().url, *words, users=4, seconds=8)
    assert done.returncode == 0, done.stderr
    frame = pd.concat([pd.read_parquet(path) for path in sorted(tmp_path.glob("s*.parquet"))])
    assert frame.worker.nunique() == max(processes, 1)
    offsets = np.concatenate(list(itertools.islice(pieces(parse("poisson-400"), 5), 2)))
    for worker, own in frame.groupby("worker"):
        share = offsets[worker :: max(processes, 1)]
        gaps = np.diff(np.sort(own.intended_ns))
        assert (np.abs(gaps - np.diff(share)[: len(gaps)]) <= 1).all() and len(gaps) > 500
    # Beginnings of workers on one machine agree, by what they worked out of the master's clock.
    begins = [own.intended_ns.min() - offsets[worker] for worker, own in frame.groupby("worker")]
    assert np.ptp(begins) < 5e6


def test_offline_sends_every_row_once_and_ends_by_itself(tmp_path: Path, data: Path) -> None:
    for more in ((), ("--processes", 2)):
        server = Raw()
        words = ("--scenario", "offline", "--rows", 7, "--check", 1, "--samples", "s.parquet", "--data", data, *more)
        done = plain(tmp_path, server.url, *words, users=4, seconds=100)
        assert done.returncode == 0, done.stderr
        frame = pd.concat([pd.read_parquet(path) for path in tmp_path.glob("s*.parquet")])
        assert len(frame) == server.requests == 43  # 300 rows
        assert set(frame.outcome) == {"ok"} and frame.groupby("worker").intended_ns.nunique().max() == 1
        for path in tmp_path.glob("s*.parquet"):
            path.unlink()


def test_single_is_one_connection(tmp_path: Path, data: Path) -> None:
    done = plain(tmp_path, Raw().url, "--scenario", "single", "--samples", "s.parquet", "--data", data, users=1)
    frame = pd.read_parquet(tmp_path / "s.parquet")
    assert done.returncode == 0 and set(frame.load) == {"single"} and set(frame.connection) == {0}
    assert (frame.intended_ns == frame.sent_ns).all()
    done = plain(tmp_path, Raw().url, "--scenario", "single", "--data", data, users=2)
    assert done.returncode == 2 and "-u 2" in last_line(done)


def test_spinning_wakes_up_earlier_than_not_spinning(tmp_path: Path, data: Path) -> None:
    late_us = {}
    for spin in (0, 500):
        words = ("--scenario", "poisson", "--rate", 200, "--spin-us", spin, "--samples", "s.parquet", "--data", data)
        done = plain(tmp_path, Raw().url, *words, seconds=5)
        assert done.returncode == 0, done.stderr
        frame = pd.read_parquet(tmp_path / "s.parquet")
        late_us[spin] = (frame.sent_ns - frame.intended_ns).median() / 1000
    assert late_us[500] < late_us[0]


def test_kernel_stamps_and_the_servers_stages_are_recorded(tmp_path: Path, data: Path) -> None:
    frame, done = outcomes(tmp_path, Raw(raw.timed).url, data)
    assert done.returncode == 0, done.stderr
    stamped = frame[frame.first_byte_ns.notna()]
    assert len(stamped) > 0.9 * len(frame)
    assert (stamped.sent_ns < stamped.first_byte_ns).all() and (stamped.first_byte_ns < stamped.received_ns).all()
    for place, stage in enumerate(STAGES):
        column = frame[f"server_{stage}_ns"]
        assert set(column.dropna()) == {place * 10**6 + 1000, place * 10**6 + 2000}
        assert column.isna().mean() == pytest.approx(1 / 3, abs=0.1)


def test_a_server_that_is_away_makes_the_arrivals_late_or_failed_and_none_is_missing(
    tmp_path: Path, data: Path
) -> None:
    server = away_for_two_seconds(after=300)
    words = ("--scenario", "constant", "--rate", 200, "--samples", "s.parquet", "--data", data)
    done = plain(tmp_path, server.url, *words, users=8, seconds=12)
    assert done.returncode == 1
    frame = pd.read_parquet(tmp_path / "s.parquet")
    assert (np.abs(np.diff(np.sort(frame.intended_ns)) - 5e6) <= 1).all()
    assert {"ok", "refused"} <= set(frame.outcome) <= {"ok", "reset", "refused"}
    ok = frame[frame.outcome == "ok"]
    assert ((ok.received_ns - ok.intended_ns) > 1e9).sum() > 50  # those that waited for the server to come back
    assert re.search(r"gaps: connections ended and came back \d+ times, ", done.stderr)


# Run mode


def write_plan(folder: Path, urls: dict[str, tuple[str, list[int]]], **changed: Any) -> list[object]:
    """PLAN.json and ENDPOINTS.json in `folder`; returns the command line's words."""
    plan = {
        "schema": 1, "seed": 1, "quick": True, "models": ["knn", "null"], "loads": ["closed-1", "closed-4"],
        "block_s": 0.2, "seconds": 0.8, "emulated_seconds": 1, "rows": 1, "check": 1, "warmup_s": 0.2, "threads": 1,
        "request_timeout_s": 10.0, "phase": "native", "targets": [], "jobs": [],
    } | changed  # fmt: skip
    targets = [
        {"name": name, "label": name, "kind": "url", "url": url, "accel": None, "emulated": False, "pids": pids}
        for name, (url, pids) in urls.items()
    ]
    (folder / "PLAN.json").write_text(json.dumps(plan))
    (folder / "ENDPOINTS.json").write_text(json.dumps({"targets": targets}))
    (folder / "out").mkdir(exist_ok=True)
    return ["--headless", "--plan", "PLAN.json", "--endpoints", "ENDPOINTS.json", "--out", "out"]


def measured(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The samples and blocks of a phase that came to its end, or of one that did not, which leaves a folder."""
    # pandas takes the word "null", which is a model here, for a missing value unless told otherwise.
    blocks = pd.read_csv(folder / "blocks-native.csv", keep_default_na=False, na_values=[""])
    (path,) = folder.glob("samples-native.parquet*")
    return pd.read_parquet(path), blocks


def test_a_phase_of_two_targets(tmp_path: Path) -> None:
    with our_server("knn", "dnn", "null") as (a, one), our_server("knn", "dnn", "null") as (b, two):
        words = write_plan(tmp_path, {"a": (a, [one.pid]), "b": (b, [two.pid])}, models=["knn", "dnn", "null"])
        done = locust(tmp_path, *words, "--csv", "st")
    assert done.returncode == 0, done.stderr
    samples, blocks = measured(tmp_path / "out")
    assert (tmp_path / "out" / "samples-native.parquet").is_file()
    assert set(samples.outcome) == {"ok"}
    cells = [(model, load) for model in ("knn", "dnn", "null") for load in ("closed-1", "closed-4")]
    assert list(dict.fromkeys(zip(blocks.model, blocks.load, strict=True))) == cells
    assert blocks.block.tolist() == list(range(8 * len(cells)))
    for _, cell in blocks.groupby(["model", "load"]):
        assert "".join(cell.target) == "abbabaab"
        assert cell["round"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert cell.warmup.tolist() == [True] * 4 + [False] * 4  # 0.2 s, made up to a quad
    assert (blocks.start_ns.to_numpy()[1:] >= blocks.drained_ns.to_numpy()[:-1]).all()  # one target at a time
    assert (blocks.end_ns - blocks.start_ns >= 0.2e9).all() and (blocks.drained_ns >= blocks.end_ns).all()
    assert (blocks.host_cpu_us > 0).all() and (blocks.client_cpu_us > 0).all()
    joined = samples.merge(blocks, on="block", suffixes=("", "_block"))
    assert len(joined) == len(samples)
    assert (joined.target == joined.target_block).all() and (joined.warmup == joined.warmup_block).all()
    assert (joined.sent_ns >= joined.start_ns).all() and (joined.sent_ns < joined.end_ns).all()
    assert (joined.received_ns <= joined.drained_ns).all()
    for load, own in samples.groupby("load", observed=True):
        assert set(own.connection) == set(range(int(load.removeprefix("closed-"))))
    shown = pd.read_csv(tmp_path / "st_stats.csv").set_index("Name")["Request Count"].drop("Aggregated")
    counted = samples[~samples.warmup].groupby(["target", "model"], observed=True).size()
    assert shown.to_dict() == {f"{target}/{model}": n for (target, model), n in counted.items()}
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["target"] for line in lines] == blocks.target.tolist()
    assert lines[-1]["done_s"] == lines[-1]["total_s"] == pytest.approx(len(blocks) * 0.2)


def test_blocks_are_as_long_as_the_slowest_target_takes_for_its_requests(tmp_path: Path, data: Path) -> None:
    def two_ms(connection: socket.socket, body: bytes, n: int) -> None:
        time.sleep(0.002)
        raw.well(connection, body, n)

    servers = {"a": Raw(), "b": Raw(two_ms)}
    words = write_plan(
        tmp_path, {name: (server.url, []) for name, server in servers.items()},
        models=["knn"], loads=["closed-1", "closed-4"], quick=False, block_s=0, seconds=1.0, lengths={"knn:closed-4": 0.3},
    )  # fmt: skip
    done = locust(tmp_path, *words, "--data", data)
    assert done.returncode == 0, done.stderr
    samples, blocks = measured(tmp_path / "out")
    blocks["requests"] = samples.groupby("block").size().reindex(blocks.block).to_numpy()
    first = blocks[blocks["round"] < 0]
    assert first[["load", "target", "round", "warmup"]].to_numpy().tolist() == [
        ["closed-1", "a", -2, True], ["closed-1", "b", -2, True], ["closed-1", "b", -1, True], ["closed-1", "a", -1, True],
    ]  # fmt: skip
    rates = (first.requests * 1e9 / (first.drained_ns - first.start_ns)).groupby(first.target).max()
    length = block_length(rates.min())
    assert 1.25 < length <= 5  # 500 requests of more than 2 ms, and a quarter more
    told = {line["load"]: line["block_s"] for line in map(json.loads, done.stdout.splitlines())}
    assert told == {"closed-1": length, "closed-4": 0.3}
    for load, cell in blocks[blocks["round"] >= 0].groupby("load"):
        assert ((cell.end_ns - cell.start_ns) / 1e9 >= told[str(load)]).all()
        assert "".join(cell.target) == "abbabaab"
        assert cell.warmup.tolist() == [True] * 4 + [False] * 4
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["block_s"] for line in lines[:4]] == [0.0] * 4
    assert lines[-1]["done_s"] == lines[-1]["total_s"] == pytest.approx(4 * 0.2 + 8 * length + 8 * 0.3)


def test_open_loads_have_the_same_arrivals_and_queries_for_every_target(tmp_path: Path, data: Path) -> None:
    seen: dict[str, list[bytes]] = {"a": [], "b": []}

    def noting(name: str) -> raw.Behaviour:
        def behave(connection: socket.socket, body: bytes, n: int) -> None:
            seen[name].append(body)
            raw.well(connection, body, n)

        return behave

    servers = {name: Raw(noting(name)) for name in seen}
    words = write_plan(
        tmp_path, {name: (server.url, []) for name, server in servers.items()}, models=["knn"],
        loads=["poisson-300", "constant-100", "single", "offline"], block_s=0.5, seconds=1.0, warmup_s=0.0, rows=5,
        open_connections=6,
    )  # fmt: skip
    done = locust(tmp_path, *words, "--data", data)
    assert done.returncode == 0, done.stderr
    samples, blocks = measured(tmp_path / "out")
    assert list(dict.fromkeys(blocks.load)) == ["poisson-300", "constant-100", "single", "offline"]
    merged = samples.merge(blocks[["block", "start_ns", "end_ns", "drained_ns"]], on="block")
    merged["offset"] = merged.intended_ns - merged.start_ns
    assert (merged.offset >= 0).all() and (merged.received_ns <= merged.drained_ns).all()
    for (load, _), round_ in merged.groupby(["load", "round"], observed=True):
        if load == "single":
            continue
        a, b = (np.sort(round_.offset[round_.target == name]) for name in "ab")
        assert len(a) == len(b) and (np.abs(a - b) <= 1).all()
        if load == "poisson-300":
            assert 100 < len(a) < 200
        else:
            assert len(a) == {"constant-100": 50, "offline": 60}[str(load)]
    assert set(samples.connection[samples.load != "single"]) <= set(range(6))
    assert (blocks.arrivals > 0).tolist() == blocks.load.isin(["poisson-300", "constant-100"]).tolist()
    assert (blocks.late_p99_ns[blocks.arrivals > 0] > 0).all() and set(blocks.client_limited) <= {0, 1}
    assert sorted(seen["a"]) == sorted(seen["b"]) or len(seen["a"]) != len(
        seen["b"]
    )  # single sends what it has time for


def test_a_cell_goes_on_until_it_has_its_requests(tmp_path: Path, data: Path) -> None:
    servers = {name: Raw(raw.slow if name == "a" else raw.well) for name in "ab"}
    words = write_plan(
        tmp_path, {name: (server.url, []) for name, server in servers.items()},
        models=["knn"], loads=["closed-4"], block_s=0.2, seconds=0.2, warmup_s=0.0, min_requests=20,
    )  # fmt: skip
    done = locust(tmp_path, *words, "--data", data)
    assert done.returncode == 0, done.stderr
    samples, blocks = measured(tmp_path / "out")
    assert samples.groupby("target", observed=True).size().min() >= 20
    rounds = blocks["round"].max() + 1
    assert rounds > 2 and rounds % 2 == 0 and len(blocks) == 2 * rounds  # an order and its mirror


def test_every_target_gets_the_same_queries(tmp_path: Path, data: Path) -> None:
    seen: dict[str, list[int]] = {"a": [], "b": [], "c": []}

    def noting(name: str) -> raw.Behaviour:
        def behave(connection: socket.socket, body: bytes, n: int) -> None:
            seen[name].append(hash(body))
            time.sleep(0.02)
            raw.well(connection, body, n)

        return behave

    servers = {name: Raw(noting(name)) for name in seen}
    words = write_plan(
        tmp_path, {name: (server.url, []) for name, server in servers.items()},
        models=["knn"], loads=["closed-1"], seconds=0.4, rows=20,
    )  # fmt: skip
    done = locust(tmp_path, *words, "--data", data)
    assert done.returncode == 0, done.stderr
    _, blocks = measured(tmp_path / "out")
    assert blocks.host_cpu_us.isna().all()  # nothing is known of their processes
    assert sorted(blocks.target[:3]) == sorted(blocks.target[3:6]) == ["a", "b", "c"]
    assert blocks.target[:3].tolist() == blocks.target[3:6].tolist()[::-1]
    assert seen["a"][:3] == seen["b"][:3] == seen["c"][:3]


def test_idle_connections_that_the_server_closes_are_no_failures(tmp_path: Path, data: Path) -> None:
    servers = {name: Raw(idle_s=0.6) for name in "ab"}  # far above what a busy machine holds up a request for
    words = write_plan(
        tmp_path, {name: (server.url, []) for name, server in servers.items()},
        models=["knn"], loads=["closed-4"], block_s=1.2, seconds=4.8,
    )  # fmt: skip
    done = locust(tmp_path, *words, "--data", data)
    assert done.returncode == 0, done.stderr
    samples, _ = measured(tmp_path / "out")
    assert set(samples.outcome) == {"ok"}
    assert servers["a"].connections > 8  # four of them, and again after each pause


def test_a_block_waits_for_one_request_of_every_connection(tmp_path: Path, data: Path) -> None:
    server = Raw(raw.slow)
    words = write_plan(
        tmp_path, {"a": (server.url, [os.getpid()])}, models=["knn"], loads=["closed-4"], seconds=0.2, warmup_s=0
    )
    done = locust(tmp_path, *words, "--data", data)
    assert done.returncode == 0, done.stderr
    samples, blocks = measured(tmp_path / "out")
    assert len(blocks) == 1 and set(samples.connection) == {0, 1, 2, 3}
    assert blocks.end_ns[0] - blocks.start_ns[0] >= 0.5e9  # longer than its 0.2 s
    ends = samples.groupby("connection").received_ns.min()
    assert blocks.end_ns[0] == ends.max()


def test_failed_requests_are_exit_code_1_and_one_line(tmp_path: Path, data: Path) -> None:
    words = write_plan(tmp_path, {"a": (Raw(raw.every_third_503).url, []), "b": (Raw().url, [])}, models=["knn"])
    done = locust(tmp_path, *words, "--data", data)
    assert done.returncode == 1
    samples, blocks = measured(tmp_path / "out")
    failed = int((samples.outcome != "ok").sum())
    assert last_line(done) == f"error: {failed} of {len(samples)} requests failed: a/knn wrong_status {failed}"
    assert len(blocks) == 16  # the run went on to its end


def test_a_target_that_dies_ends_the_run_and_keeps_what_was_measured(tmp_path: Path) -> None:
    with our_server("knn", "null") as (a, _), our_server("knn", "null") as (b, dies):
        words = write_plan(tmp_path, {"a": (a, []), "b": (b, [])}, seconds=30, loads=["closed-4"])
        process = subprocess.Popen(
            [*LOCUST, *map(str, words)], cwd=tmp_path, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        for _ in range(6):
            process.stdout.readline()
        dies.kill()
        _, errors = process.communicate(timeout=BOUND_S)
    assert process.returncode == 1
    line = errors.strip().splitlines()[-1]
    assert line.startswith(f"error: b at {b} gave no answer for ") and "refused" in line
    samples, blocks = measured(tmp_path / "out")
    assert is_partial(tmp_path / "out" / "samples-native.parquet.parts")
    assert set(samples.target[samples.outcome == "ok"]) == {"a", "b"}
    assert set(samples.target[samples.outcome != "ok"]) == {"b"}
    assert set(blocks.block) == set(samples.block)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("behave", [raw.well, raw.slow])
def test_an_interrupted_run_keeps_its_files(
    tmp_path: Path, data: Path, number: signal.Signals, behave: raw.Behaviour
) -> None:
    server = Raw(behave)
    words = write_plan(tmp_path, {"a": (server.url, []), "b": (server.url, [])}, seconds=60)
    process = subprocess.Popen(
        [*LOCUST, *map(str, words), "--data", str(data)], cwd=tmp_path, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    time.sleep(0.05)  # into the middle of a block
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    samples, blocks = measured(tmp_path / "out")
    assert is_partial(tmp_path / "out" / "samples-native.parquet.parts")
    assert set(samples.outcome) == {"ok"} and len(blocks) >= 3
    if number == signal.SIGKILL:
        assert set(samples.block) >= set(blocks.block)  # a block that is noted has all its requests
        return
    assert set(samples.block) == set(blocks.block)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("error: interrupted")


def test_a_full_disk_ends_the_run_with_files_that_can_be_read(tmp_path: Path, data: Path) -> None:
    words = write_plan(tmp_path, {"a": (Raw().url, [])}, seconds=60, block_s=0.05)
    words[words.index("out")] = "small"
    done = on_a_small_disk(tmp_path, *words, "--data", data)
    assert done.returncode == 1
    assert "could not write small/" in last_line(done) and "No space left" in last_line(done)
    assert "Traceback" not in done.stderr


def test_what_a_run_cannot_begin_with(tmp_path: Path, data: Path) -> None:
    words = write_plan(tmp_path, {"a": (f"http://127.0.0.1:{free_port()}", [])})
    done = locust(tmp_path, *words, "--data", data)
    assert done.returncode == 1 and "no server answers" in last_line(done)
    assert not list((tmp_path / "out").iterdir())
    done = locust(tmp_path, *words[:-2])
    assert done.returncode == 2 and "--out" in last_line(done)
    done = locust(tmp_path, *words, "--processes", "2")
    assert done.returncode == 2 and "--processes" in last_line(done)
    (tmp_path / "PLAN.json").write_text('{"phase": 1}')
    done = locust(tmp_path, *words)
    assert done.returncode == 2 and "PLAN.json" in last_line(done)


def test_the_peak_rate_of_a_server_whose_capacity_is_known(tmp_path: Path, data: Path) -> None:
    """One request at a time, 10 ms each: 100 a second at most, and fewer within a bound on the wait."""
    turn = threading.Lock()

    def one_at_a_time(connection: socket.socket, body: bytes, n: int) -> None:
        with turn:
            time.sleep(0.01)
        raw.well(connection, body, n)

    words = write_plan(
        tmp_path, {"a": (Raw(one_at_a_time).url, [])}, models=["knn"], loads=["closed-1"], bound="p50<=40ms", primary=[]
    )
    done = locust(tmp_path, *words, "--data", data, bound_s=400)
    assert done.returncode == 0, done.stderr
    (row,) = pd.read_csv(tmp_path / "out" / "peak.csv").to_dict("records")
    assert (row["target"], row["model"], row["bound"]) == ("a", "knn", "p50<=40ms")
    assert 50 < row["rate_rps"] < 105 and row["rate_rps"] == row["low_rps"] < row["high_rps"] < 160
    samples, blocks = measured(tmp_path / "out")
    trials = blocks[blocks.load.str.startswith("peak-")]
    assert (trials.end_ns - trials.start_ns >= 4.9e9).all() and len(trials) > 4
    assert set(samples.block) == set(blocks.block)  # their requests are kept, under names that no cell has
