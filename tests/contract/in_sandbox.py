"""Outside of a sandbox, plain `pytest` runs the contract suite in one: an inner pytest runs each test, and tells.

The suite makes taps and starts Docker's engine, which belong into a network namespace of their own. Each test stands
in the outer pytest under its own name, with the inner one's outcome, reason and traceback.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from hostsetup import doctor

REPORT = "ISOLATENCY_CONTRACT_REPORT"  # the file to which the inner pytest writes a JSON line for each step of a test
ISOLATENCY = Path(sys.executable).parent / "isolatency"
POLL_S = 0.1


class InnerError(Exception):
    """A test failed in the sandbox; the message is its own report."""


class Inner:
    """The inner pytest. It starts when the first outcome is asked for, and runs the tests in its own order."""

    def __init__(self, folder: Path) -> None:
        self._report, self._output = folder / "report", folder / "output"
        self._process: subprocess.Popen[bytes] | None = None

    def outcome(self, name: str, session: pytest.Session) -> tuple[str, str]:
        """Whether a test of the session passed, skipped or failed, and why; waits until it has ended."""
        process = self._process or self._start(session)
        while True:
            ended = process.poll() is not None
            steps = [step for step in self._steps() if step["name"] == name]
            if steps and steps[-1]["when"] == "teardown":
                return next(((s["outcome"], s["why"]) for s in steps if s["outcome"] != "passed"), ("passed", ""))
            if ended:
                return self._silent()
            time.sleep(POLL_S)

    def stop(self) -> None:
        """What runs in the sandbox ends with it."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def _start(self, session: pytest.Session) -> subprocess.Popen[bytes]:
        self._report.touch()
        names = [item.nodeid for item in session.items if isinstance(item, InSandbox)]
        outer = ["setpriv", "--pdeathsig", "TERM", ISOLATENCY, "sandbox", "--"]  # with this pytest, if it is killed
        inner = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *names]
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [*outer, *inner], cwd=session.config.rootpath,
                env=os.environ | {REPORT: str(self._report)},
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        return self._process

    def _steps(self) -> list[dict[str, str]]:
        lines = self._report.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def _silent(self) -> tuple[str, str]:
        """The inner pytest has ended without the end of a test: no sandbox here, or something broke."""
        if self._rights.ok is False:
            return "skipped", f"no sandbox can be made: {self._rights.found}; {self._rights.fix}"
        return "failed", "the pytest in the sandbox ended before this test did:\n" + self._output.read_text()

    @cached_property
    def _rights(self) -> doctor.Check:
        return next(check for check in doctor.examine().checks if check.name == "rights")


class InSandbox(pytest.Item):
    """Takes the place of a test of the suite."""

    def __init__(self, inner: Inner, **more: Any) -> None:
        super().__init__(**more)
        self._inner = inner

    def runtest(self) -> None:
        outcome, why = self._inner.outcome(self.nodeid, self.session)
        if outcome == "skipped":
            pytest.skip(why)
        if outcome == "failed":
            raise InnerError(why)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        return str(excinfo.value) if isinstance(excinfo.value, InnerError) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name


def replace(config: pytest.Config, items: list[pytest.Item], folder: Path) -> None:
    """Have the tests of the suite in `folder` run in one sandbox, which ends at the latest with this pytest."""
    place = tempfile.TemporaryDirectory(prefix="isolatency-test-")
    inner = Inner(Path(place.name))
    config.add_cleanup(place.cleanup)
    config.add_cleanup(inner.stop)  # the last one added goes first
    for at, item in enumerate(items):
        if folder in item.path.parents:
            assert item.parent is not None
            items[at] = InSandbox.from_parent(item.parent, name=item.name, inner=inner)


def tell(report: pytest.TestReport) -> None:
    """In the sandbox: write down a step of a test for the pytest outside."""
    why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
    captured = "".join(f"\n--- {title}\n{text}" for title, text in report.sections) if report.failed else ""
    step = {
        "name": report.nodeid, "when": report.when, "outcome": report.outcome,
        "why": why.removeprefix("Skipped: ") + captured,
    }  # fmt: skip
    with Path(os.environ[REPORT]).open("a") as file:
        file.write(json.dumps(step) + "\n")
