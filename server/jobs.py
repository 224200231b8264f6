"""Batch jobs, the 2023 report's experiment, each in a subprocess of the server: `python -m server.jobs` is that one.

The subprocess imports, writes its CSV files and says that it is ready; none of that is timed. It starts at a byte on
its standard input. On its standard output it says one JSON object a line: {"ready"}, {"progress"}, and last {"seconds",
"result"} or {"error"}.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from server.tensors import short

JOBS = ("knn", "dnn")
KEEP = 100  # ended jobs that can still be asked for
READY_S = 600.0
REPORT_ROWS = {"knn": 569, "dnn": 5000}
LIMITS = {"rows": 1_000_000, "epochs": 1000, "seed": 2**31}


class BadJob(Exception):
    """A job that cannot be started: `status` is the HTTP status that says so."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Job:
    """One job and its subprocess. `ended` is set when the result is known; the process takes a moment longer to end,
    which is no part of the job's time. The folder is the server's, so that no way of dying leaves files behind."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, folder: Path) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()
        self.error: str | None = None
        self._name = name
        self._process = process
        self._folder = folder
        self._progress = 0.0
        self._seconds: float | None = None
        self._result: dict[str, Any] | None = None
        self._reader = asyncio.create_task(self._read())

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")

    def state(self) -> dict[str, Any]:
        state = "running" if not self.ended.is_set() else "failed" if self.error else "done"
        return {
            "id": self.id, "job": self._name, "state": state, "progress": self._progress,
            "seconds": self._seconds, "result": self._result, "error": self.error,
        }  # fmt: skip

    async def stop(self) -> None:
        """Kill the subprocess, if it still lives, and wait until nothing is left of it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self.gone()

    async def gone(self) -> None:
        await asyncio.wait([self._reader])

    async def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            async for line in self._process.stdout:
                self._hear(json.loads(line))
        except ValueError as error:
            self.error = f"the job's process said what is no message: {error}"
            self._process.kill()
        code = await self._process.wait()
        if not self.ended.is_set():
            self.error = self.error or _end_in_words(code)
            self.ready.set()
            self.ended.set()
        shutil.rmtree(self._folder)

    def _hear(self, message: dict[str, Any]) -> None:
        if "ready" in message:
            self.ready.set()
        elif "progress" in message:
            self._progress = message["progress"]
        elif "error" in message:
            self.error = message["error"]
        else:
            self._seconds, self._result, self._progress = message["seconds"], message["result"], 1.0
            self.ended.set()


def _end_in_words(code: int) -> str:
    if code >= 0:
        return f"the job's process ended with {code} before its result"
    name = signal.Signals(-code).name
    hint = "; the system kills so when memory runs out" if name == "SIGKILL" else ""
    return f"the job's process was ended by signal {-code} ({name}) before its result{hint}"


class Jobs:
    """One job at a time; ended ones stay to be asked for."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._starting = False

    async def prepare(self, wanted: Any) -> Job:
        """Start the subprocess and wait until it is ready. Raises BadJob."""
        name, settings = _settings(wanted)
        if self._starting or any(not job.ended.is_set() for job in self._jobs.values()):
            raise BadJob(409, "a job is running already; wait for its end")
        self._starting = True
        try:
            for ended in self._jobs.values():
                await ended.gone()
            job = await _start(name, settings)
            self._jobs[job.id] = job
        finally:
            self._starting = False
        while len(self._jobs) > KEEP:
            self._jobs.pop(next(iter(self._jobs)))
        try:
            await asyncio.wait_for(job.ready.wait(), READY_S)
        except TimeoutError:
            await job.stop()
            raise BadJob(500, f"the job's files were not written within {READY_S:g} s") from None
        if job.error is not None:
            raise BadJob(500, f"the job could not be prepared: {job.error}")
        return job

    def find(self, identifier: str) -> Job | None:
        return self._jobs.get(identifier)

    async def stop(self) -> None:
        for job in self._jobs.values():
            await job.stop()


async def _start(name: str, settings: dict[str, int]) -> Job:
    folder = Path(tempfile.mkdtemp(prefix="job-"))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "server.jobs", name, json.dumps(settings), str(folder),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    return Job(name, process, folder)


def _settings(wanted: Any) -> tuple[str, dict[str, int]]:
    if not isinstance(wanted, dict) or wanted.get("job") not in JOBS:
        raise BadJob(400, f"wanted an object with job, one of {', '.join(JOBS)}; found {short(wanted)}")
    name = wanted["job"]
    settings = {"rows": REPORT_ROWS[name], "epochs": 10, "seed": 1}
    for key, value in wanted.items():
        if key == "job":
            continue
        if key not in settings:
            raise BadJob(400, f"a job takes {', '.join(settings)}; found {key!r}")
        least = 10 if key == "rows" else 0 if key == "seed" else 1
        if type(value) is not int or not least <= value <= LIMITS[key]:
            raise BadJob(400, f"wanted a whole number from {least} to {LIMITS[key]} for {key}; found {short(value)}")
        settings[key] = value
    if name == "knn" and settings["rows"] > REPORT_ROWS["knn"]:
        raise BadJob(400, f"the knn job has {REPORT_ROWS['knn']} rows; found {settings['rows']}")
    return name, settings


def _main(name: str, settings: dict[str, int], folder: Path) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at a terminal it reaches the whole group; the server ends its job
    go = threading.Event()
    threading.Thread(target=_listen, args=(go, folder), daemon=True).start()
    from server.experiment import JOBS as EXPERIMENTS

    experiment = EXPERIMENTS[name]
    try:
        experiment.prepare(folder, **settings)
        _say({"ready": True})
        go.wait()
        start = time.monotonic_ns()
        result = experiment.run(folder, progress=lambda share: _say({"progress": share}), **settings)
        _say({"seconds": (time.monotonic_ns() - start) / 1e9, "result": result})
    except Exception as error:
        _say({"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def _listen(go: threading.Event, folder: Path) -> None:
    """Wait for the byte that says go, then for the server's end, however it came, which ends the job, too.

    By os.read, since a thread that waits in sys.stdin would hold its lock when the interpreter ends.
    """
    if os.read(0, 1):
        go.set()
        os.read(0, 1)
    shutil.rmtree(folder, ignore_errors=True)  # nobody is left to be told
    os._exit(1)


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])))
