"""Calls of a model that must not hold up the event loop, and the end of calls that do not return."""

import contextlib
import ctypes
import queue
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
LOOK_S = 0.1
INLINE_S = 0.25  # everybody waits for a call in the event loop's thread; one that stays is made again in its own


class Overdue(BaseException):
    """Raised inside a call that takes too long; no Exception, so that a model's own handlers let it pass."""


class Worker:
    """One thread that does one piece of work after the other."""

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        # A daemon: a call that never returns must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], object]) -> None:
        self._work.put(work)

    def abandon(self) -> None:
        """Leave the thread to itself. What it runs in Python is ended; what it runs in C cannot be."""
        self._work.put(None)
        ident = ctypes.c_ulong(self._thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(Overdue))

    def _run(self) -> None:
        with contextlib.suppress(Overdue):
            while (work := self._work.get()) is not None:
                work()


class Watch:
    """Ends a call in the main thread that takes longer than INLINE_S, by a signal, which ends a sleep, too."""

    def __init__(self) -> None:
        self._since_ns = 0  # when the call that runs there began, 0 while there is none
        signal.signal(signal.SIGUSR2, self._raise)
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def run(self, call: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
        """Make the call. Raises Overdue, which may also come when it has just returned."""
        self._since_ns = time.monotonic_ns()
        try:
            return call(*args, **more)
        finally:
            self._since_ns = 0

    def _late(self) -> bool:
        since = self._since_ns
        return since > 0 and time.monotonic_ns() - since > INLINE_S * 1e9

    def _look(self) -> None:
        while True:
            time.sleep(LOOK_S)
            if self._late():
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self._late():
            self._since_ns = 0
            raise Overdue
