"""Run mode: one Locust process takes every cell (model × load) in blocks that go round the targets of a phase.

Reads PLAN.json and ENDPOINTS.json, writes samples-PHASE.parquet and blocks-PHASE.csv, and prints one line of JSON per
finished block: {"done_s", "total_s", "model", "load", "target"}.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from images.errors import TargetError, UsageError
from loadtest import _cpu, _order, _preflight, _rows, _samples, _tally
from loadtest._connection import Connection, Work, resolve
from loadtest._engine import Block, Engine
from loadtest._samples import OK, OUTCOME, OUTCOMES, REFUSED, RESET, TIMEOUT, Where

PATIENCE_S = 3.0  # a target that only refuses or resets for longer than this has died
TIMEOUTS_PATIENCE = 3  # one that only times out is given so many time-outs, and this long at least:
TIMEOUTS_PATIENCE_S = 15.0

_T = TypeVar("_T")


class Target(msgspec.Struct, frozen=True):
    """A target as ENDPOINTS.json names it; keys that are not needed here are passed over."""

    name: str
    label: str
    url: str
    pids: tuple[int, ...] = ()


class Plan(msgspec.Struct, frozen=True):
    """The part of PLAN.json that the load needs; `seconds` is per target in each cell."""

    phase: str
    seed: int
    models: tuple[str, ...]
    loads: tuple[str, ...]
    block_s: float
    seconds: float
    rows: int
    check: int
    warmup_s: float
    request_timeout_s: float
    restart: int = 0
    data: dict[str, str] = {}  # where the rows of a model do not come with isolatency


class _Targets(msgspec.Struct, frozen=True):
    targets: tuple[Target, ...]


class _Turn(NamedTuple):
    """One block to run. `block` counts over the phase, `round` within the cell."""

    target: Target
    model: str
    load: str
    round: int
    block: int
    warmup: bool


def read(plan_file: Path, endpoints_file: Path) -> tuple[Plan, tuple[Target, ...]]:
    """Raises UsageError naming the file and what is wrong in it."""
    plan = _decode(plan_file, Plan)
    targets = _decode(endpoints_file, _Targets).targets
    if not targets or not plan.models or not plan.loads:
        raise UsageError(f"{plan_file} and {endpoints_file} want at least one target, one model and one load")
    for load in plan.loads:
        connections(load)
    return plan, targets


def _decode(path: Path, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise UsageError(f"{path} could not be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise UsageError(f"{path} is not what a run writes: {error}") from error


def connections(load: str) -> int:
    """The number of connections of a load: 16 for closed-16. Raises UsageError."""
    kind, _, number = load.partition("-")
    if kind != "closed" or not number.isdigit() or not int(number):
        raise UsageError(f"unknown load {load!r}; wanted closed-N, N connections")
    return int(number)


class Session:
    """One phase. `done`: all blocks were run; `failures` counts what was not ok by (label, model, outcome).

    Raises IsolatencyError while it is made if a target does not answer or does not know a model of the plan.
    """

    def __init__(self, plan: Plan, targets: tuple[Target, ...], out: Path, data: Path, stats: Any) -> None:
        self.plan = plan
        self.users = max(connections(load) for load in plan.loads)
        self.requests = 0
        self.failures: Counter[tuple[str, str, str]] = Counter()
        self.done = False
        self._targets = targets
        self._stats = stats
        self._silent_since_ns: dict[str, int] = {}
        addresses = {target.name: resolve(target.url) for target in targets}
        queries = {}
        for model in dict.fromkeys(plan.models):
            rows = _rows.load(model, Path(plan.data.get(model, data)))
            width, timeout_s = rows.rows.shape[1], max(plan.request_timeout_s, 10.0)
            found = [_preflight.check(addresses[target.name], model, width, timeout_s) for target in targets]
            queries[model] = _rows.prepare(rows, plan.rows, plan.seed, found[0])
        self._work = {
            (target.name, model): Work(addresses[target.name], query, plan.check)
            for target in targets
            for model, query in queries.items()
        }
        self._connections = {
            target.name: [Connection(addresses[target.name], number) for number in range(self.users)]
            for target in targets
        }
        self._out = out

    def run(self, engine: Engine) -> None:
        """Block the calling greenlet to the end of the phase, or until the engine is cut short.

        Raises TargetError when a target dies, IsolatencyError when a file cannot be written; files are closed always.
        """
        turns = list(self._turns())
        self._samples = _samples.ParquetWriter(self._out / f"samples-{self.plan.phase}.parquet")
        self._blocks = _samples.BlockWriter(self._out / f"blocks-{self.plan.phase}.csv")
        try:
            for turn in turns:
                self._run_block(engine, turn)
                if engine.cut:
                    return
                self._progress(turn, len(turns))
            self.done = True
        finally:
            self._blocks.close()
            self._samples.close(partial=not self.done)

    def _turns(self) -> Iterator[_Turn]:
        plan = self.plan
        by_name = {target.name: target for target in self._targets}
        count = _order.blocks_per_target(plan.seconds, plan.block_s)
        warmup = _order.warmup_blocks(plan.warmup_s, plan.block_s, count)
        block = 0
        for cell, (model, load) in enumerate((model, load) for model in plan.models for load in plan.loads):
            for number, names in enumerate(_order.rounds(list(by_name), count, [plan.seed, cell])):
                for name in names:
                    yield _Turn(by_name[name], model, load, number, block, number < warmup)
                    block += 1

    def _run_block(self, engine: Engine, turn: _Turn) -> None:
        work = self._work[turn.target.name, turn.model]
        active = self._connections[turn.target.name][: connections(turn.load)]
        for connection in active:
            connection.work = work
            # The same queries at the same places of a round for every target; connections do not ask in step.
            connection.query = (turn.round * 97 + connection.number * 37) % len(work.requests)
        host_before, client_before = _cpu.read(turn.target.pids), time.process_time_ns()
        block = engine.run_block(active, self.plan.block_s)
        client_us = round((time.process_time_ns() - client_before) / 1000)
        host_us = _cpu.between_us(host_before, _cpu.read(turn.target.pids))
        if not len(block.raw) and engine.cut:
            return
        where = Where(
            turn.target.name, turn.model, turn.load, self.plan.restart, turn.round, turn.block, 0, turn.warmup
        )
        self._blocks.add(where, block.start_ns, block.end_ns, block.drained_ns, host_us, client_us)
        self._samples.add(_samples.table(block.raw, where))
        self._count(turn, block)
        if not engine.cut:
            self._check_alive(turn.target, block)

    def _count(self, turn: _Turn, block: Block) -> None:
        name = f"{turn.target.label}/{turn.model}"
        _tally.add(self._stats, name, block.raw, time.time_ns() - time.monotonic_ns())
        self.requests += len(block.raw)
        for outcome, n in enumerate(np.bincount(block.raw[:, OUTCOME]).tolist()):
            if outcome != OK and n:
                self.failures[turn.target.label, turn.model, OUTCOMES[outcome]] += n

    def _check_alive(self, target: Target, block: Block) -> None:
        outcomes = set(block.raw[:, OUTCOME].tolist())
        if outcomes - {REFUSED, RESET, TIMEOUT}:
            self._silent_since_ns.pop(target.name, None)
            return
        silent_s = (block.drained_ns - self._silent_since_ns.setdefault(target.name, block.start_ns)) / 1e9
        patience_s = PATIENCE_S
        if TIMEOUT in outcomes:
            patience_s = max(TIMEOUTS_PATIENCE_S, TIMEOUTS_PATIENCE * self.plan.request_timeout_s)
        if silent_s > patience_s:
            kinds = ", ".join(OUTCOMES[outcome] for outcome in sorted(outcomes)) or "nothing"
            raise TargetError(
                f"{target.label} at {target.url} gave no answer for {silent_s:.0f} s ({kinds}): it has died under "
                "load; what was measured until then is kept, its console is in logs/"
            )

    def _progress(self, turn: _Turn, turns: int) -> None:
        line = {
            "done_s": round((turn.block + 1) * self.plan.block_s, 3), "total_s": round(turns * self.plan.block_s, 3),
            "model": turn.model, "load": turn.load, "target": turn.target.name,
        }  # fmt: skip
        print(json.dumps(line), flush=True)

    def failed_line(self) -> str:
        """What failed, in one line; empty where nothing did."""
        if not self.failures:
            return ""
        parts = ", ".join(f"{target}/{model} {kind} {n}" for (target, model, kind), n in self.failures.most_common())
        return f"{self.failures.total()} of {self.requests} requests failed: {parts}"
