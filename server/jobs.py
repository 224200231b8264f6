"""Batch jobs, the 2023 report's experiment, each in a subprocess of the server: `python -m server.jobs` is that one.

The subprocess imports, writes its CSV files and says that it is ready; none of that is timed. It starts at a byte on
its standard input, and writes one line of JSON per step of progress and a last one with its seconds and its result.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

JOBS = ("knn", "dnn")
KEEP = 100  # ended jobs that can still be asked for
READY_S = 600.0
REPORT_ROWS = {"knn": 569, "dnn": 5000}
LIMITS = {"rows": 1_000_000, "epochs": 1000, "seed": 2**31}
Progress = Callable[[float], None]


class BadJob(Exception):
    """A job that cannot be started: `status` is the HTTP status that says so."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Job:
    """One job, from ready to its end."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.ended = asyncio.Event()
        self._name = name
        self._process = process
        self._progress = 0.0
        self._done: dict[str, Any] | None = None
        self._error: str | None = None
        self._reader = asyncio.create_task(self._read())

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")

    def state(self) -> dict[str, Any]:
        done = self._done or {"seconds": None, "result": None}
        state = "failed" if self._error else "done" if self._done else "running"
        return {
            "id": self.id, "job": self._name, "state": state, "progress": 1.0 if self._done else self._progress,
            "seconds": done["seconds"], "result": done["result"], "error": self._error,
        }  # fmt: skip

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            message = json.loads(line)
            if "seconds" in message:
                self._done = message
                self.ended.set()  # the end of its process is no part of the job
            else:
                self._progress = message["progress"]
        code = await self._process.wait()
        if self._done is None:
            self._error = f"the job's process ended with {code}" + (f", by signal {-code}" if code < 0 else "")
        self.ended.set()

    async def stop(self) -> None:
        if not self.ended.is_set():
            self._process.kill()
            await self._reader


class Jobs:
    """One job at a time; ended ones stay to be asked for."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._jobs: dict[str, Job] = {}
        self._starting = False

    async def prepare(self, wanted: Any) -> Job:
        """Start the subprocess and wait until it is ready. Raises BadJob."""
        name, settings = _settings(wanted)
        if self._starting or any(not job.ended.is_set() for job in self._jobs.values()):
            raise BadJob(409, "a job is running already; wait for its end")
        self._starting = True
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "server.jobs", name, json.dumps(settings),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                env=os.environ | {"OPENBLAS_NUM_THREADS": str(self._threads)},
            )  # fmt: skip
            assert process.stdout is not None
            ready = await asyncio.wait_for(process.stdout.readline(), READY_S)
            if ready != b"ready\n":
                raise BadJob(500, f"the job's process ended with {await process.wait()} before it was ready")
            job = Job(name, process)
            self._jobs[job.id] = job
            while len(self._jobs) > KEEP:
                self._jobs.pop(next(iter(self._jobs)))
            return job
        finally:
            self._starting = False

    def find(self, identifier: str) -> Job | None:
        return self._jobs.get(identifier)

    async def stop(self) -> None:
        for job in self._jobs.values():
            await job.stop()


def _settings(wanted: Any) -> tuple[str, dict[str, int]]:
    if not isinstance(wanted, dict) or wanted.get("job") not in JOBS:
        raise BadJob(400, f"wanted an object with job, one of {', '.join(JOBS)}; found {wanted!r}"[:300])
    name = wanted["job"]
    settings = {"rows": REPORT_ROWS[name], "epochs": 10, "seed": 1}
    for key, value in wanted.items():
        if key == "job":
            continue
        if key not in settings:
            raise BadJob(400, f"a job takes {', '.join(settings)}; found {key!r}")
        least = 10 if key == "rows" else 0 if key == "seed" else 1
        if type(value) is not int or not least <= value <= LIMITS[key]:
            raise BadJob(400, f"wanted a whole number from {least} to {LIMITS[key]} for {key}; found {value!r}"[:300])
        settings[key] = value
    if name == "knn" and settings["rows"] > REPORT_ROWS["knn"]:
        raise BadJob(400, f"the knn job has {REPORT_ROWS['knn']} rows; found {settings['rows']}")
    return name, settings


def _main() -> int:
    from server.experiment import JOBS as EXPERIMENTS

    name, settings = sys.argv[1], json.loads(sys.argv[2])
    experiment = EXPERIMENTS[name]

    def say(value: Any) -> None:
        print(json.dumps(value), flush=True)

    with tempfile.TemporaryDirectory(prefix="job-") as folder:
        experiment.prepare(Path(folder), **settings)
        print("ready", flush=True)
        if not sys.stdin.buffer.readline():
            return 1  # the server is gone
        start = time.monotonic_ns()
        result = experiment.run(Path(folder), progress=lambda share: say({"progress": share}), **settings)
        say({"seconds": (time.monotonic_ns() - start) / 1e9, "result": result})
    return 0


if __name__ == "__main__":
    sys.exit(_main())
