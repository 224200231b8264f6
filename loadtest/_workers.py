"""A master and its workers: who takes which share of the arrivals, whose clock shows what, who was lost on the way.

Messages, beside Locust's own: CLOCK, a worker's question and the master's answer; BEGIN, from the master when all users
are connected, with the worker's share and the moment to begin at; END, from the master, to drain; ENDED, the worker's
answer, with its Effort. Runners are handed in: Locust itself is not imported.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gevent  # type: ignore[import-untyped]
from gevent.event import Event  # type: ignore[import-untyped]

from loadtest._pace import Effort

CLOCK, BEGIN, END, ENDED = (f"isolatency_{word}" for word in ("clock", "begin", "end", "ended"))
QUESTIONS = 20
APART_S = 0.01
LEAD_NS = 500_000_000  # from the message to begin to the begin
DRAIN_BOUND_S = 60.0  # what is under way is answered, and a long test's samples are made one file


class Offset:
    """How far a worker's clocks are ahead of the master's, from questions and answers: the one that came back fastest
    says it best, to half of the time it took. Until an answer came, both are 0 and the error is unknown (-1)."""

    def __init__(self) -> None:
        self.monotonic_ns = self.wall_ns = 0
        self.error_ns = -1

    def answer(self, asked_ns: int, master_ns: int, master_wall_ns: int) -> None:
        now, wall = time.monotonic_ns(), time.time_ns()
        error_ns = (now - asked_ns + 1) // 2
        if self.error_ns < 0 or error_ns < self.error_ns:
            self.error_ns = error_ns
            self.monotonic_ns = (asked_ns + now) // 2 - master_ns
            self.wall_ns = wall - error_ns - master_wall_ns


@dataclass
class Share:
    """One worker in a test: arrivals `index`, `index` + `workers`, …."""

    index: int
    heard_ns: int
    over: bool = False
    words: str = ""


class Master:
    """The master's side of one test after another. `finished` is called when all workers have ended by themselves."""

    def __init__(self, environment: Any, finished: Callable[[], None]) -> None:
        self._runner = environment.runner
        self._finished, self._ending = finished, False
        self.effort = Effort()
        self._shares: dict[str, Share] = {}
        self._begun_ns = 0
        self._changed = Event()
        self._runner.register_message(CLOCK, self._tell)
        self._runner.register_message(ENDED, self._ended)
        environment.events.worker_report.add_listener(self._heard)

    def start(self) -> None:
        self.effort, self._shares, self._begun_ns, self._ending = Effort(), {}, 0, False

    def begin(self) -> None:
        """All users are connected: give those that have some their shares. Once per test."""
        if self._shares:
            return
        ready = [node.id for node in self._runner.clients.all if sum(node.user_classes_count.values())]
        ready.sort(key=self._runner.get_worker_index)
        self._begun_ns = time.monotonic_ns() + LEAD_NS
        for index, name in enumerate(ready):
            self._shares[name] = Share(index, self._begun_ns)
            data = {"start_ns": self._begun_ns, "worker": index, "workers": len(ready)}
            self._runner.send_message(BEGIN, data, name)

    def end(self) -> None:
        """Let every worker drain and report, and wait for those that are still there."""
        self._ending = True
        end = time.monotonic() + DRAIN_BOUND_S
        for name in self._waited_for():
            self._runner.send_message(END, {}, name)
        while self._waited_for() and time.monotonic() < end:
            self._changed.clear()
            self._changed.wait(0.2)

    def words(self) -> list[str]:
        """Of each worker its clock, or that it was lost."""
        lines = []
        for name, share in self._shares.items():
            if share.over:
                lines.append(f"worker {share.index} ({name}): {share.words}")
            else:
                after_s = max(share.heard_ns - self._begun_ns, 0) / 1e9
                lines.append(
                    f"lost: worker {share.index} ({name}) was last heard of {after_s:.1f} s after the begin; from then "
                    f"on its share, 1 of {len(self._shares)} of what was to be sent, is missing: the test is partial"
                )
        return lines

    @property
    def lost(self) -> bool:
        return any(not share.over for share in self._shares.values())

    def _waited_for(self) -> list[str]:
        there = {node.id for node in self._runner.clients.all if node.state != "missing"}
        return [name for name, share in self._shares.items() if not share.over and name in there]

    def _tell(self, msg: Any, **_: Any) -> None:
        data = msg.data | {"master_ns": time.monotonic_ns(), "wall_ns": time.time_ns()}
        self._runner.send_message(CLOCK, data, msg.node_id)

    def _heard(self, client_id: str, **_: Any) -> None:
        if client_id in self._shares:
            self._shares[client_id].heard_ns = time.monotonic_ns()

    def _ended(self, msg: Any, **_: Any) -> None:
        share = self._shares.get(msg.node_id)
        if share is not None and not share.over:
            share.over, share.words = True, msg.data["words"]
            self.effort.merge(msg.data["effort"])
        self._changed.set()
        if not self._ending and not self._waited_for():
            self._ending = True
            gevent.spawn(self._finished)


class Worker:
    """A worker's side. `begin(start_ns, worker, workers)` and `end()` are what the master asks for, each in a greenlet
    of its own; `end` says what this process did."""

    def __init__(self, environment: Any, begin: Any, end: Any) -> None:
        self._runner = environment.runner
        self._begin, self._end = begin, end
        self.offset = Offset()
        self._runner.register_message(CLOCK, self._answered)
        self._runner.register_message(BEGIN, self._asked_to_begin, concurrent=True)
        self._runner.register_message(END, self._asked_to_end, concurrent=True)

    def start(self) -> None:
        """Ask the master what its clocks show."""
        self.offset = Offset()
        self._asking = gevent.spawn(self._ask)

    def report(self, effort: Effort) -> None:
        """Hand over the last statistics, then what this process did."""
        self._runner._send_stats()  # as Locust does when it quits: then the master has all of them before it goes on
        self._runner.send_message(ENDED, {"effort": effort.packed(), "words": self._words()})

    def _ask(self) -> None:
        for _ in range(QUESTIONS):
            self._runner.send_message(CLOCK, {"asked_ns": time.monotonic_ns()})
            gevent.sleep(APART_S)

    def _answered(self, msg: Any, **_: Any) -> None:
        self.offset.answer(msg.data["asked_ns"], msg.data["master_ns"], msg.data["wall_ns"])

    def _asked_to_begin(self, msg: Any, **_: Any) -> None:
        self._asking.join(timeout=LEAD_NS / 2e9)
        data = msg.data
        self._begin(data["start_ns"] + self.offset.monotonic_ns, data["worker"], data["workers"])

    def _asked_to_end(self, msg: Any, **_: Any) -> None:
        self._end()

    def _words(self) -> str:
        offset = self.offset
        if offset.error_ns < 0:
            return "its clocks could not be compared with the master's"
        return (
            f"its wall clock is {offset.wall_ns / 1e6:+.3f} ms from the master's, its monotonic clock "
            f"{offset.monotonic_ns / 1e6:+.3f} ms, both ± {offset.error_ns / 1e6:.3f} ms"
        )
