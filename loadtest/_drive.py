"""Starts Locust on one phase of a run, reads its progress, and ends it with the run, whatever happens."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from hostsetup.ledger import Ledger
from hostsetup.lifecycle import in_words
from images import shell
from images.errors import IsolatencyError
from loadtest._batch import Live
from loadtest._plan import Plan

LOCUSTFILE = Path(__file__).resolve().parent / "locustfile.py"
STOP_S = 3.0  # within the five seconds that a Ctrl-C may take
_REQUESTS_FAILED = re.compile(r"error: \d+ of \d+ requests failed: ")
Progress = Callable[[dict[str, Any]], None]


def drive(
    plan: Plan,
    phase: str,
    live: Sequence[Live],
    *,
    folder: Path,
    ledger: Ledger,
    cores: Sequence[int],
    bound_s: float,
    progress: Progress,
    restart: int = 0,
    lengths: Mapping[str, float] | None = None,
) -> str:
    """Run `locust -f loadtest/locustfile.py` over `live`; it writes samples-PHASE.parquet and blocks-PHASE.csv.

    Returns in words which requests failed, if any did; they are figures of the run, and no reason to stop it.
    Raises TargetError when a target dies under load, IsolatencyError when Locust fails or takes longer than `bound_s`.
    """
    emulated = live[0].endpoint.emulated
    plan_file, endpoints_file = folder / f"plan-{phase}.json", folder / f"endpoints-{phase}.json"
    entry, marked = ledger.mark("locust")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LOCUST_")} | marked
    environment["HOME"] = str(folder / "logs")  # nor does the user's ~/.locust.conf change a run
    argv: list[str | Path] = [
        "taskset", "-c", ",".join(map(str, cores)), sys.executable, "-m", "locust", "-f", LOCUSTFILE, "--headless",
        "--plan", plan_file, "--endpoints", endpoints_file, "--out", folder,
    ]  # fmt: skip
    log = folder / "logs" / f"locust-{phase}.log"
    try:
        plan_file.write_bytes(msgspec.json.encode(plan.for_engine(phase, emulated, restart, lengths)))
        endpoints_file.write_bytes(msgspec.json.encode({"targets": [_endpoint(one) for one in live]}))
        with log.open("wb") as errors:
            process = shell.spawn(argv, env=environment, stdout=subprocess.PIPE, stderr=errors, cwd=folder / "logs")
        try:
            return _watch(process, live, bound_s, progress, log)
        finally:
            _end(process)
    finally:
        ledger.remove(entry)
        plan_file.unlink(missing_ok=True)
        endpoints_file.unlink(missing_ok=True)


def _endpoint(one: Live) -> dict[str, Any]:
    endpoint = one.endpoint
    return {
        "name": endpoint.name, "label": endpoint.label, "kind": endpoint.kind, "url": endpoint.url,
        "accel": endpoint.accel, "emulated": endpoint.emulated, "pids": one.target.pids(),
    }  # fmt: skip


def _watch(
    process: subprocess.Popen[bytes], live: Sequence[Live], bound_s: float, progress: Progress, log: Path
) -> str:
    assert process.stdout is not None
    reader = threading.Thread(target=_read, args=(process.stdout, progress), daemon=True)
    reader.start()
    end = time.monotonic() + bound_s
    while True:
        try:
            code = process.wait(timeout=1)
            break
        except subprocess.TimeoutExpired:
            for one in live:
                one.target.check()
            if time.monotonic() > end:
                raise IsolatencyError(f"the load did not end within {bound_s:.0f} s; its log is {log}") from None
    reader.join(timeout=5)
    for one in live:
        one.target.check()
    last = (log.read_text(errors="replace").strip() or "it said nothing").splitlines()[-1]
    if code == 1 and _REQUESTS_FAILED.match(last):
        return last.removeprefix("error: ")
    if code:
        raise IsolatencyError(f"the load {in_words(code)}: {last} (log: {log})")
    return ""


def _read(stream: IO[bytes], progress: Progress) -> None:
    for line in stream:
        if line.startswith(b"{"):
            try:
                progress(json.loads(line))
            except ValueError:
                continue  # a line of Locust's own; all of its words are in the log


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
