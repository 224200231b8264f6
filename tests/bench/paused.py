"""`isolatency` with every target stopped by a signal while it is not the one that is asked.

    python tests/bench/paused.py run PLAN …       (as root, in a sandbox)

A run that is made so has Locust read this file in place of loadtest/locustfile.py.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from loadtest import _drive

if __name__ == "__main__":
    from loadtest import _cli

    _drive.LOCUSTFILE = Path(__file__).resolve()
    sys.exit(_cli.main())

from loadtest import _session
from loadtest.locustfile import *  # noqa: F403


class Paused(_session.Session):
    def run(self, engine: Any) -> None:
        try:
            for target in self._by_name.values():
                self._send(target, signal.SIGSTOP)
            super().run(engine)
        finally:
            for target in self._by_name.values():
                self._send(target, signal.SIGCONT)

    def _run_block(self, engine: Any, turn: Any, **more: Any) -> Any:
        self._send(turn.target, signal.SIGCONT)
        try:
            return super()._run_block(engine, turn, **more)
        finally:
            self._send(turn.target, signal.SIGSTOP)

    @staticmethod
    def _send(target: Any, number: signal.Signals) -> None:
        for pid in target.pids:
            os.kill(pid, number)


_session.Session = Paused  # type: ignore[misc]
