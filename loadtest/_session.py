"""Run mode: one Locust process takes every cell (model × load) in blocks that go round the targets of a phase.

Reads PLAN.json and ENDPOINTS.json, writes samples-PHASE.parquet and blocks-PHASE.csv, and prints one line of JSON per
finished block: {"done_s", "total_s", "model", "load", "target", "block_s"}; block_s is 0 where it is being measured.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import gevent  # type: ignore[import-untyped]
import msgspec
import numpy as np
from numpy.typing import NDArray

from images.errors import IsolatencyError, TargetError, UsageError
from loadtest import _arrivals, _cpu, _order, _peak, _preflight, _rows, _samples, _tally
from loadtest._arrivals import FOREVER_NS, Load, Schedule
from loadtest._connection import Connection, Work, resolve
from loadtest._engine import Block, Engine
from loadtest._pace import Effort
from loadtest._samples import ENDED, INTENDED, OK, OUTCOME, OUTCOMES, REFUSED, RESET, TIMEOUT, Raw, Where

PATIENCE_S = 3.0  # a target that only refuses or resets for longer than this has died
TIMEOUTS_PATIENCE = 3  # one that only times out is given so many time-outs, and this long at least:
TIMEOUTS_PATIENCE_S = 15.0
EXTENSION = 10  # a cell that has too few requests goes on for up to so many times its seconds
SPILL_S = 0.25  # so often are a long block's requests looked at, and written where they fill a row group

_T = TypeVar("_T")
Floats = NDArray[np.float64]


class Target(msgspec.Struct, frozen=True):
    """A target as ENDPOINTS.json names it; keys that are not needed here are passed over."""

    name: str
    label: str
    url: str
    pids: tuple[int, ...] = ()


class Plan(msgspec.Struct, frozen=True):
    """The part of PLAN.json that the load needs. Each target has `seconds` in each cell, and goes on there until it has
    `min_requests`. Loads that are no closed loop have `open_connections` per target.

    `block_s` 0: as long as a load wants. A closed loop's is measured where `lengths`, by MODEL:LOAD, has none."""

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
    quick: bool = False
    lengths: dict[str, float] = {}
    data: dict[str, str] = {}  # where the rows of a model do not come with isolatency
    open_connections: int = 16
    min_requests: int = 0
    client_spin_us: float = 0.0
    encoding: str = "binary"
    bound: str = ""
    primary: tuple[str, ...] = ()


class _Targets(msgspec.Struct, frozen=True):
    targets: tuple[Target, ...]


class _Turn(NamedTuple):
    """One block to run. `block` counts over the phase, `round` within the cell, from -2 where its blocks' length is
    being measured. Of the load offline `seconds` says nothing: such a block lasts until its last answer."""

    target: Target
    model: str
    load: Load
    round: int
    block: int
    seconds: float
    warmup: bool


def read(plan_file: Path, endpoints_file: Path) -> tuple[Plan, tuple[Target, ...]]:
    """Raises UsageError naming the file and what is wrong in it."""
    plan = _decode(plan_file, Plan)
    targets = _decode(endpoints_file, _Targets).targets
    if not targets or not plan.models or not plan.loads:
        raise UsageError(f"{plan_file} and {endpoints_file} want at least one target, one model and one load")
    for load in plan.loads:
        _arrivals.parse(load)
    return plan, targets


def _decode(path: Path, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise UsageError(f"{path} could not be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise UsageError(f"{path} is not what a run writes: {error}") from error


class Session:
    """One phase. `done`: all blocks were run; `failures` counts what was not ok by (label, model, outcome).

    Raises IsolatencyError while it is made if a target does not answer or does not know a model of the plan.
    """

    def __init__(self, plan: Plan, targets: tuple[Target, ...], out: Path, data: Path, stats: Any) -> None:
        self.plan = plan
        self.requests = 0
        self.failures: Counter[tuple[str, str, str]] = Counter()
        self.done = False
        self._block = 0
        self._loads = [_arrivals.parse(load) for load in plan.loads]
        self.users = max(self._connections_of(load) for load in self._loads)
        if plan.bound:
            self.users = max(self.users, plan.open_connections)
        self._by_name = {target.name: target for target in targets}
        self._stats = stats
        self._silent_since_ns: dict[str, int] = {}
        self._rate_rps = 0.0  # requests per second of the last block, with its drain
        addresses = {target.name: resolve(target.url) for target in targets}
        self._work: dict[tuple[str, str, bool], Work] = {}
        for model in dict.fromkeys(plan.models):
            rows = _rows.load(model, Path(plan.data.get(model, data)))
            width, timeout_s = rows.rows.shape[1], max(plan.request_timeout_s, 10.0)
            found = [
                _preflight.check(addresses[target.name], model, width, plan.encoding, timeout_s) for target in targets
            ]
            for offline in dict.fromkeys(load.scenario == "offline" for load in self._loads):
                queries = _rows.prepare(rows, plan.rows, plan.seed, found[0], encoding=plan.encoding, all_rows=offline)
                for target in targets:
                    self._work[target.name, model, offline] = Work(addresses[target.name], queries, plan.check)
        self._connections = {
            target.name: [Connection(addresses[target.name], number) for number in range(self.users)]
            for target in targets
        }
        self._out = out

    def _connections_of(self, load: Load) -> int:
        return load.connections or self.plan.open_connections

    def run(self, engine: Engine) -> None:
        """Block the calling greenlet to the end of the phase, or until the engine is cut short.

        Raises TargetError when a target dies, IsolatencyError when a file cannot be written; files are closed always.
        """
        self._samples = _samples.ParquetWriter(self._out / f"samples-{self.plan.phase}.parquet")
        self._blocks = _samples.BlockWriter(self._out / f"blocks-{self.plan.phase}.csv")
        try:
            for turn in self._turns():
                self._run_block(engine, turn)
                if engine.cut:
                    return
                self._progress(turn)
            if self.plan.bound:
                self._find_peaks(engine)
            self.done = not engine.cut
        finally:
            self._blocks.close()
            self._samples.close(partial=not self.done)

    def _turns(self) -> Iterator[_Turn]:
        """Every block, in its order; how long they are, and how many, depends on what came of those before."""
        plan, names = self.plan, list(self._by_name)
        cells = [(model, load) for model in plan.models for load in self._loads]
        self._done_s, self._total_s = 0.0, len(cells) * len(names) * plan.seconds
        for cell, (model, load) in enumerate(cells):
            seed = [plan.seed, cell]
            block_s = _order.length_of(load, plan.block_s) or plan.lengths.get(f"{model}:{load.name}")
            if not block_s:
                block_s = yield from self._calibration(model, load, _order.rounds(names, 2, seed))
            warmup, rounds = _order.rounds_of(plan.seconds, plan.warmup_s, block_s, len(names))
            self._total_s += len(names) * (rounds * block_s - plan.seconds)
            self._counted: Counter[str] = Counter()
            for number, order in enumerate(_order.rounds(names, rounds * EXTENSION, seed)):
                whole = number % 2 == 0 or len(names) == 1  # an order and its mirror
                if number >= rounds and whole and self._enough():
                    break
                self._total_s += len(names) * block_s * (number >= rounds)
                for name in order:
                    yield self._turn(name, model, load, number, block_s, number < warmup)

    def _calibration(self, model: str, load: Load, rounds: list[tuple[str, ...]]) -> Generator[_Turn, None, float]:
        """Two short rounds, which are in no figure, and what they say of how long the cell's blocks have to be: what
        the slowest target wants, at the better of its two, since its very first requests are slow."""
        rates: dict[str, float] = {}
        for number, order in enumerate(rounds, -len(rounds)):
            for name in order:
                self._total_s += _order.LEAST_BLOCK_S
                yield self._turn(name, model, load, number, _order.LEAST_BLOCK_S, True)
                rates[name] = max(rates.get(name, 0.0), self._rate_rps)
        return _order.block_length(min(rates.values()), _order.longest(self.plan.seconds, self.plan.quick))

    def _turn(self, name: str, model: str, load: Load, number: int, seconds: float, warmup: bool = False) -> _Turn:
        self._block += 1
        return _Turn(self._by_name[name], model, load, number, self._block - 1, seconds, warmup)

    def _find_peaks(self, engine: Engine) -> None:
        """One target after the other: the highest Poisson rate that holds the bound, written into peak.csv."""
        plan = self.plan
        bound = _peak.parse(plan.bound)
        for model in _peak.models(plan.primary, plan.models):
            for name in self._by_name:
                search, number = _peak.Search(bound), 0
                while search.trial is not None:
                    rate, seconds, _ = search.trial
                    load = Load(f"peak-{rate:g}", "poisson", rate=rate)
                    turn = self._turn(name, model, load, number, seconds)
                    latency_ns, limited = self._run_block(engine, turn, trial=True)
                    if engine.cut:
                        return
                    search.add(_peak.holds(bound, latency_ns), limited)
                    number += 1
                row = (plan.restart, name, model, plan.bound, *search.found())
                _samples.add_peak(self._out / "peak.csv", row)

    def _enough(self) -> bool:
        return all(self._counted[name] >= self.plan.min_requests for name in self._by_name)

    def _run_block(self, engine: Engine, turn: _Turn, *, trial: bool = False) -> tuple[Floats, bool]:
        """Of a trial: the latencies in ns, those of failed requests +inf, and whether the client could not keep up."""
        load = turn.load
        work = self._work[turn.target.name, turn.model, load.scenario == "offline"]
        active = self._connections[turn.target.name][: self._connections_of(load)]
        for connection in active:
            connection.work = work
            # The same queries at the same places of a round for every target; connections do not ask in step.
            connection.query = (turn.round * 97 + connection.number * 37) % len(work.requests)
        where = Where(
            turn.target.name, turn.model, load.name, self.plan.restart, turn.round, turn.block, 0, turn.warmup
        )
        outcomes: Counter[int] = Counter()
        self._latency_ns: list[Floats] | None = [] if trial else None  # all of a plan's block need not be held
        seconds = 0.0 if load.scenario == "offline" else turn.seconds
        spill = gevent.spawn(self._spill, engine, turn, where, outcomes)
        host_before, cpu_ns, wall_ns = _cpu.read(turn.target.pids), time.process_time_ns(), time.monotonic_ns()
        try:
            block = engine.run_block(active, seconds, self._schedule(turn, work, seconds) if load.open else None)
        finally:
            spill.kill()
        cpu_ns, wall_ns = time.process_time_ns() - cpu_ns, time.monotonic_ns() - wall_ns
        host_us = _cpu.between_us(host_before, _cpu.read(turn.target.pids))
        effort = Effort()
        effort.add(engine.take_pace())
        effort.end(cpu_ns, wall_ns)
        self._absorb(engine.take(), turn, where, outcomes)
        if not outcomes and engine.cut:
            return np.empty(0), False
        self._rate_rps = outcomes.total() * 1e9 / (block.drained_ns - block.start_ns)
        client_us = round(cpu_ns / 1000)
        self._samples.flush()  # what blocks-PHASE.csv names has all its requests, whenever this is killed
        self._blocks.add(where, block.start_ns, block.end_ns, block.drained_ns, host_us, client_us, effort)
        if not turn.warmup:
            self._counted[turn.target.name] += outcomes.total()
        if not engine.cut:
            self._check_alive(turn.target, block, set(outcomes))
        return np.concatenate(self._latency_ns) if self._latency_ns else np.empty(0), bool(effort.limited)

    def _schedule(self, turn: _Turn, work: Work, seconds: float) -> Callable[[int], Schedule]:
        """The arrivals of a block: the same in each round for every target."""
        made = _arrivals.pieces(turn.load, (self.plan.seed, self.plan.restart, turn.round), len(work.requests))
        before_ns = round(seconds * 1e9) or FOREVER_NS
        timed = turn.load.scenario != "offline"
        return lambda start_ns: Schedule(made, start_ns, before_ns=before_ns, timed=timed)

    def _spill(self, engine: Engine, turn: _Turn, where: Where, outcomes: Counter[int]) -> None:
        """Write a long block's requests while it goes on, so that memory does not grow with it."""
        while True:
            gevent.sleep(SPILL_S)
            if engine.recorded >= _samples.ROW_GROUP:
                try:
                    self._absorb(engine.take(), turn, where, outcomes)
                except IsolatencyError as error:
                    engine.error = error
                    engine.cut_short()
                    return

    def _absorb(self, raw: Raw, turn: _Turn, where: Where, outcomes: Counter[int]) -> None:
        if self._latency_ns is not None:
            self._latency_ns.append(np.where(raw[:, OUTCOME] == OK, raw[:, ENDED] - raw[:, INTENDED], np.inf))
        self._samples.add(_samples.table(raw, where))
        if not turn.warmup:
            _tally.add(self._stats, f"{turn.target.label}/{turn.model}", raw, time.time_ns() - time.monotonic_ns())
        self.requests += len(raw)
        for outcome, n in enumerate(np.bincount(raw[:, OUTCOME]).tolist()):
            if n:
                outcomes[outcome] += n
            if n and outcome != OK:
                self.failures[turn.target.label, turn.model, OUTCOMES[outcome]] += n

    def _check_alive(self, target: Target, block: Block, outcomes: set[int]) -> None:
        if outcomes - {REFUSED, RESET, TIMEOUT}:
            self._silent_since_ns.pop(target.name, None)
            return
        silent_s = (block.drained_ns - self._silent_since_ns.setdefault(target.name, block.start_ns)) / 1e9
        patience_s = PATIENCE_S
        if TIMEOUT in outcomes:
            patience_s = max(TIMEOUTS_PATIENCE_S, TIMEOUTS_PATIENCE * self.plan.request_timeout_s)
        if outcomes and silent_s > patience_s:
            kinds = ", ".join(OUTCOMES[outcome] for outcome in sorted(outcomes))
            raise TargetError(
                f"{target.label} at {target.url} gave no answer for {silent_s:.0f} s ({kinds}): it has died under "
                "load; what was measured until then is kept, its console is in logs/"
            )

    def _progress(self, turn: _Turn) -> None:
        self._done_s += turn.seconds
        line = {
            "done_s": round(self._done_s, 3), "total_s": round(self._total_s, 3),
            "model": turn.model, "load": turn.load.name, "target": turn.target.name,
            "block_s": turn.seconds if turn.round >= 0 else 0.0,
        }  # fmt: skip
        print(json.dumps(line), flush=True)

    def failed_line(self) -> str:
        """What failed, in one line; empty where nothing did."""
        if not self.failures:
            return ""
        parts = ", ".join(f"{target}/{model} {kind} {n}" for (target, model, kind), n in self.failures.most_common())
        return f"{self.failures.total()} of {self.requests} requests failed: {parts}"
