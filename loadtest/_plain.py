"""Plain Locust: one target, one model, as many connections as there are Locust users, until the test is stopped."""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from images.errors import UsageError
from loadtest import _arrivals, _models, _preflight, _rows, _samples, _tally
from loadtest._arrivals import Schedule
from loadtest._connection import Connection, Work, resolve
from loadtest._encoding import ENCODINGS
from loadtest._engine import Engine, in_thread
from loadtest._samples import Where


@dataclass(frozen=True)
class Options:
    """What the command line or the page gave, checked."""

    host: str
    load: _arrivals.Load
    model: str
    rows: int
    check: int
    seed: int
    samples: Path | None
    request_timeout_s: float
    spin_ns: int
    encoding: str
    data: Path


def options(host: str | None, parsed: Any) -> Options:
    """From Locust's host and its parsed options. Raises UsageError naming the option."""
    if not host:
        raise UsageError("no host was given; wanted --host http://ADDRESS:PORT (`isolatency ps` lists what is up)")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", parsed.model):
        raise UsageError(f"--model is {parsed.model!r}; wanted a model's name: letters, digits, '.', '_' and '-'")
    for name, value, least in (("rows", parsed.rows, 1), ("check", parsed.check, 0), ("seed", parsed.seed, 0)):
        if value < least:
            raise UsageError(f"--{name} is {value}; wanted at least {least}")
    if not 0 < parsed.request_timeout <= 86400:
        raise UsageError(f"--request-timeout is {parsed.request_timeout:g}; wanted seconds, more than 0")
    samples = Path(parsed.samples) if parsed.samples else None
    if samples is not None and samples.suffix not in (".parquet", ".csv"):
        raise UsageError(f"--samples is {parsed.samples!r}; wanted a name that ends in .parquet or .csv")
    if parsed.encoding not in ENCODINGS:
        raise UsageError(f"--encoding is {parsed.encoding!r}; wanted {' or '.join(ENCODINGS)}")
    if not 0 <= parsed.spin_us <= 10_000:
        raise UsageError(f"--spin-us is {parsed.spin_us:g}; wanted microseconds, 0 to 10,000")
    return Options(
        host=host.rstrip("/"), load=_load(parsed), model=parsed.model, rows=parsed.rows, check=parsed.check,
        seed=parsed.seed, samples=samples, request_timeout_s=parsed.request_timeout,
        spin_ns=round(parsed.spin_us * 1000), encoding=parsed.encoding,
        data=Path(parsed.data) if parsed.data else _models.DATA,
    )  # fmt: skip


def _load(parsed: Any) -> _arrivals.Load:
    scenario, rate = parsed.scenario, parsed.rate
    if scenario not in _arrivals.SCENARIOS:
        raise UsageError(f"--scenario is {scenario!r}; wanted one of {', '.join(_arrivals.SCENARIOS)}")
    if scenario in ("constant", "poisson"):
        if not 0.001 <= rate < 1e6:
            raise UsageError(f"--scenario {scenario} wants --rate, requests per second in all, 0.001 to 999,999")
        return _arrivals.Load(f"{scenario}-{rate:g}", scenario, rate=rate)
    if rate:
        raise UsageError(f"--rate is for --scenario constant and poisson; found --scenario {scenario}")
    if scenario == "single" and (parsed.num_users or 1) > 1:
        raise UsageError(f"--scenario single is one connection; found -u {parsed.num_users}")
    return _arrivals.Load(scenario, scenario, connections=scenario == "single")


class Load:
    """One test, from its start to its stop. Raises IsolatencyError while it is made if the test cannot be run."""

    def __init__(self, wanted: Options, stats: Any, worker: int | None) -> None:
        self._address = resolve(wanted.host)
        self.load, self._seed, self.spin_ns = wanted.load, wanted.seed, wanted.spin_ns
        rows = _rows.load(wanted.model, wanted.data)
        signature = _preflight.check(self._address, wanted.model, rows.rows.shape[1], wanted.encoding)
        offline = wanted.load.scenario == "offline"
        queries = _rows.prepare(rows, wanted.rows, wanted.seed, signature, encoding=wanted.encoding, all_rows=offline)
        self._work = Work(self._address, queries, wanted.check)
        self._stats = stats
        self._where = Where(self._address.authority, wanted.model, wanted.load.name, worker=worker or 0)
        self._name = f"{self._address.authority}/{wanted.model}"
        self._numbers: set[int] = set()
        self._writer: _samples.ParquetWriter | _samples.CsvWriter | None = None
        if wanted.samples is not None:
            path = wanted.samples
            if worker is not None:  # one file per process
                path = path.with_name(f"{path.stem}-{worker}{path.suffix}")
            self._writer = _samples.open_writer(path)
            self.note(model=wanted.model, rows=wanted.rows, encoding=wanted.encoding, check=wanted.check)
            self.note(load=wanted.load.name, seed=wanted.seed, worker=worker or 0)
        self.unchecked = bool(wanted.check) and not self._work.checker.possible

    def note(self, **facts: object) -> None:
        """Into the samples' own metadata, where they are Parquet."""
        if isinstance(self._writer, _samples.ParquetWriter):
            self._writer.facts |= {name: str(value) for name, value in facts.items()}

    def add_user(self) -> Connection:
        """A connection for one more user, with the lowest number that is free."""
        number = next(n for n in range(len(self._numbers) + 1) if n not in self._numbers)
        self._numbers.add(number)
        made = Connection(self._address, number, self._work)
        made.query = number * 37 % len(self._work.requests)
        return made

    def schedule(self, start_ns: int, worker: int, workers: int) -> Schedule:
        """This worker's share of the arrivals."""
        made = _arrivals.pieces(self.load, self._seed, len(self._work.requests))
        timed = self.load.scenario != "offline"
        return Schedule(made, start_ns, worker=worker, workers=workers, timed=timed)

    def remove_user(self, connection: Connection) -> None:
        self._numbers.discard(connection.number)

    def flush(self, engine: Engine, *, count: bool = True) -> None:
        """Hand what was recorded to Locust's statistics and to the samples; unless `count`, to these alone, as warm-up.

        The file is written in a thread of its own: meanwhile the load goes on. Raises IsolatencyError.
        """
        raw = engine.take()
        if not len(raw):
            return
        if count:
            _tally.add(self._stats, self._name, raw, time.time_ns() - time.monotonic_ns())
        if self._writer is not None:
            in_thread(self._write, self._writer, raw, self._where._replace(warmup=not count))

    @staticmethod
    def _write(writer: _samples.ParquetWriter | _samples.CsvWriter, raw: _samples.Raw, where: Where) -> None:
        writer.add(_samples.table(raw, where))

    def close(self) -> None:
        """Raises IsolatencyError when the samples cannot be written to their end."""
        if self._writer is not None:
            self._writer.close()
