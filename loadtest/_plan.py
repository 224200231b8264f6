"""The frozen Plan: a TOML file and flags, validated once; nothing inside the run reads either again."""

import csv
import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from hostsetup.kinds import KINDS, check_options
from hostsetup.target import Option, Spec
from images import own
from images.errors import UsageError
from loadtest import _arrivals, _models, _peak, _rows
from loadtest._encoding import ENCODINGS

PLANS = Path(__file__).resolve().parent.parent / "plans"
MODELS = ("knn", "dnn", "null")  # where a plan names none
EMULATED_TIMEOUT_S = 60.0
EMULATED_BLOCK_S = 1.0  # at most half of its seconds: it has no ratio, for which a length would matter
MOST = 10**6  # of anything that a plan counts: more is a slip of the keyboard, which would fill a disk
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,30}")


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One batch job: `repeats` of `rows` rows on every target; an emulated one runs once, at `emulated_rows`."""

    job: str
    repeats: int
    rows: int
    epochs: int = 1
    emulated_rows: int = 60


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is run. `seconds` is per cell (target × model × load) and start, which goes on until it has `min_requests`;
    loads that are no closed loop have `open_connections` per target. Times in seconds, memory in MiB.

    `quick`: blocks whose length is measured are so short that `seconds` hold three quads after one of warm-up.
    `block_s` 0: a closed loop's blocks are as long as the slowest target that is not emulated takes for 500 requests,
    from 0.2 to 5 s, the same for all targets in all starts; those of open arrivals last 5 s. `warmup_s` is made up to
    whole quads, and where what is left of `seconds` is less than one, the cell is longer.
    `restarts`: so often is every target started, but for emulated ones; the repeats of a job are spread over them.
    `until_ci`: more starts, until the intervals of p50 in the primary cells are no wider than ± this share; 0: none.

    A file may give loads as lists: `connections = [1, 16]` and `rates = [200]` are closed-1, closed-16, poisson-200;
    `arrivals = "constant"` makes the rates constant ones.
    `primary`: the cells that verdicts are about, each MODEL:LOAD (none: knn:closed-1); `margin`: the difference that
    matters at p50 and at p99.
    `work_iterations` 0: as many as take `work_us` on the first target's cores, counted before the targets are up.
    `model_file`: FILE.py:CLASS, a model of the user's own, whose name stands in `models`; `data`: its rows, as .npz.
    `bound`, as p99<=5ms: search each target's highest Poisson rate that holds it, in every start.
    `encoding`: of the load's tensors, binary or json; parity always asks by JSON.
    `client_spin_us`: so long before each intended start the client is awake.
    `keep_awake`: idle processors poll while the load runs, so that no request waits until one is awake.
    """

    schema: int = 1
    seed: int = 1
    quick: bool = False
    restarts: int = 1
    until_ci: float = 0.0
    models: tuple[str, ...] = MODELS
    loads: tuple[str, ...] = ("closed-1", "closed-16")
    block_s: float = 0.0
    seconds: float = 20.0
    min_requests: int = 0
    open_connections: int = 16
    client_spin_us: float = 0.0
    keep_awake: bool = False
    encoding: str = "binary"
    bound: str = ""
    emulated_seconds: float = 5.0
    warmup_s: float = 2.0
    rows: int = 1
    check: int = 10
    threads: int = 1
    boot_timeout_s: float = 0.0
    request_timeout_s: float = 10.0
    spin_us: float = 200.0
    spin_tail_us: float = 400.0
    spin_tail_p: float = 0.0
    work_us: float = 200.0
    work_iterations: int = 0
    model_file: str = ""
    data: str = ""
    internet: bool = False
    allow_difference: bool = False
    only: str = ""
    primary: tuple[str, ...] = ()
    margin: str = "2%,5%"
    targets: tuple[dict[str, Option], ...] = ()
    jobs: tuple[Job, ...] = ()

    def specs(self) -> list[Spec]:
        return [_spec(target) for target in self.targets]

    @property
    def own(self) -> str | None:
        """The name of the user's own model."""
        return next((model for model in self.models if model not in _models.NAMES), None) if self.model_file else None

    def rows_of(self, model: str) -> Path:
        """Where its query rows are: a file, or the folder of all of ours."""
        return Path(self.data) if model == self.own else _models.DATA

    def server_args(self) -> list[str]:
        """What the servers of all targets are told about their models."""
        words = [own.read(self.model_file).inside if model == self.own else model for model in self.models]
        told = [part for word in words for part in ("--model", word)] + ["--threads", str(self.threads)]
        if "spin" in self.models:
            told += [
                f"--spin-us={self.spin_us}",
                f"--spin-tail-us={self.spin_tail_us}",
                f"--spin-tail-p={self.spin_tail_p}",
            ]
        if "work" in self.models:
            told += [f"--work-us={self.work_us}", f"--work-iterations={self.work_iterations}"]
        return told

    def for_engine(
        self, phase: str, emulated: bool, restart: int = 0, lengths: Mapping[str, float] | None = None
    ) -> dict[str, Any]:
        """The plan as one Locust process reads it: one phase of one start, its seconds and its time-out.

        `lengths`: of blocks, in seconds, by MODEL:LOAD, as far as they are known."""
        values: dict[str, Any] = msgspec.to_builtins(self)
        values |= {"phase": phase, "restart": restart, "lengths": dict(lengths or {})}
        values["data"] = {} if self.own is None else {self.own: self.data}
        if emulated:
            values["seconds"] = self.emulated_seconds
            values["block_s"] = min(self.block_s or EMULATED_BLOCK_S, self.emulated_seconds / 2)
            values["warmup_s"] = min(self.warmup_s, self.emulated_seconds / 4)
            values["request_timeout_s"] = max(self.request_timeout_s, EMULATED_TIMEOUT_S)
        return values

    def toml(self) -> str:
        return tomli_w.dumps(msgspec.to_builtins(self))


@dataclass(frozen=True)
class Machine:
    """What the targets have to fit into: host cores this process may use, memory in MiB."""

    cores: tuple[int, ...]
    mem_mib: int


def read(path: Path | None, *, quick: bool = False) -> Plan:
    """Read a plan file, or the plan that comes with isolatency. Raises UsageError with the line of what is wrong."""
    if path is None:
        path = PLANS / ("quick.toml" if quick else "full.toml")
    try:
        text = path.read_bytes().decode()
        values = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"the plan {path} could not be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and TOMLDecodeError are ValueErrors
        raise UsageError(f"the plan {path} is not TOML: {error}") from error
    _check_keys(path, text, values)
    _expand_loads(path, values)
    try:
        return msgspec.convert(values, Plan)
    except msgspec.ValidationError as error:
        raise UsageError(f"the plan {path} has a value of the wrong form: {error}") from error


def _expand_loads(path: Path, values: dict[str, Any]) -> None:
    """`connections` and `rates` as `loads`, in place."""
    lists = {key: values.pop(key) for key in ("connections", "rates") if key in values}
    arrivals = values.pop("arrivals", "poisson")
    if not lists:
        return
    if "loads" in values:
        raise UsageError(f"the plan {path} has loads beside {' and '.join(lists)}; wanted the one or the others")
    if arrivals not in ("constant", "poisson"):
        raise UsageError(f"the plan {path} has arrivals = {arrivals!r}; wanted constant or poisson")
    if not all(isinstance(found, list) for found in lists.values()):
        raise UsageError(f"the plan {path} wants {' and '.join(lists)} as a list of numbers")
    values["loads"] = [f"closed-{n}" for n in lists.get("connections", [])]
    values["loads"] += [f"{arrivals}-{rate}" for rate in lists.get("rates", [])]


def _check_keys(path: Path, text: str, values: Mapping[str, Any]) -> None:
    _check_table(path, text, "", values, (*Plan.__struct_fields__, "connections", "rates", "arrivals"))
    for number, job in enumerate(_tables(path, values, "jobs")):
        _check_table(path, text, "jobs", job, Job.__struct_fields__, number)
    for number, target in enumerate(_tables(path, values, "targets")):
        kind = str(target.get("kind", ""))
        options = KINDS[kind].options if kind in KINDS else ()
        _check_table(path, text, "targets", target, ("name", "kind", "cpus", "mem_mib", *options), number)


def _tables(path: Path, values: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    tables = values.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"the plan {path} wants {key} as [[{key}]] tables, found {type(tables).__name__}")
    return tables


def _check_table(
    path: Path, text: str, table: str, values: Mapping[str, Any], known: Iterable[str], number: int = 0
) -> None:
    known = list(known)
    for key in values:
        if key not in known:
            line = _line_of(text, table, number, key)
            raise UsageError(f"{path}:{line}: unknown key {key!r}{_nearest(key, known)}")


def _line_of(text: str, table: str, number: int, key: str) -> int:
    """The line of `key` in the `number`-th [[table]] (the top of the file for an empty name); 1 where not found."""
    inside, seen = table == "", -1
    for count, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[\[?\s*([A-Za-z0-9_.-]+)", line)
        if header:
            if table == "" and header[1] == key:
                return count
            seen += header[1] == table
            inside = header[1] == table and seen == number
        elif inside and re.match(rf"""\s*["']?{re.escape(key)}["']?\s*=""", line):
            return count
    return 1


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; the nearest known one is {near[0]!r}" if near else f"; known are {', '.join(known)}"


def parse_target(text: str) -> dict[str, Option]:
    """`[NAME=]KIND[:option=value,…]`, or `[NAME=]url:http://host:port`; a value with a comma goes in double quotes.

    Raises UsageError naming the part that cannot be read.
    """
    head, _, tail = text.partition(":")
    name, equals, kind = head.rpartition("=")
    if equals and not name:
        raise UsageError(f"the target {text!r} has an empty name; wanted [NAME=]KIND[:option=value,…]")
    if kind not in KINDS:
        raise UsageError(f"the target {text!r} has an unknown kind {kind!r}{_nearest(kind, list(KINDS))}")
    target: dict[str, Option] = {"name": name or kind, "kind": kind}
    if kind == "url":
        return target | {"url": tail}
    types: dict[str, type] = {"cpus": int, "mem_mib": int, **KINDS[kind].options}
    for part in next(csv.reader([tail], quotechar='"'), []) if tail else []:
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"the target {text!r} wants option=value, found {part!r}")
        if key not in types:
            raise UsageError(f"the target {text!r} has an unknown option {key!r}{_nearest(key, list(types))}")
        if key in target:
            raise UsageError(f"the target {text!r} gives {key} twice")
        target[key] = _convert(text, key, value.strip('"'), types[key])
    return target


def _convert(text: str, key: str, value: str, wanted: type) -> Option:
    if wanted is bool:
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise UsageError(f"the target {text!r} wants {key}=true or {key}=false, found {value!r}")
    if wanted is float:
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
            return float(value)
        raise UsageError(f"the target {text!r} wants a number for {key}, found {value!r}")
    if wanted is int:
        if re.fullmatch(r"[0-9]{1,9}", value):
            return int(value)
        raise UsageError(f"the target {text!r} wants a whole number for {key}, found {value!r}")
    return value


def _spec(target: Mapping[str, Option]) -> Spec:
    own = {key: value for key, value in target.items() if key not in ("name", "kind", "cpus", "mem_mib")}
    kind = str(target.get("kind", ""))
    name = str(target.get("name", kind))
    cpus, mem_mib = target.get("cpus", 1), target.get("mem_mib", 512)
    if kind not in KINDS:
        raise UsageError(f"the target {name!r} has an unknown kind {kind!r}{_nearest(kind, list(KINDS))}")
    for key, value in (("cpus", cpus), ("mem_mib", mem_mib)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"the target {name!r} wants a whole number of at least 1 for {key}, found {value!r}")
    assert isinstance(cpus, int) and isinstance(mem_mib, int)
    spec = Spec(name=name, kind=kind, cpus=cpus, mem_mib=mem_mib, options=own)
    check_options(spec)
    return spec


def validate(plan: Plan, machine: Machine, *, asked: bool = True) -> None:
    """Refuse, before anything starts, what cannot be run here. Raises UsageError; the message names the remedy."""
    _validate_own(plan, asked)
    _validate_values(plan)
    specs = plan.specs()
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two targets are called {name!r}; give one a name: NAME=KIND")
        if not _NAME.fullmatch(name):
            raise UsageError(f"the target name {name!r} wants letters, digits, '.', '_' or '-', 31 at most")
    ours = [spec for spec in specs if spec.kind != "url"]
    for spec in ours:
        if spec.cpus > len(machine.cores):
            raise UsageError(
                f"the target {spec.name!r} asks for {spec.cpus} CPUs; this machine gives {len(machine.cores)} at most"
            )
        if spec.mem_mib > machine.mem_mib:
            raise UsageError(
                f"the target {spec.name!r} asks for {spec.mem_mib} MiB; the largest that fits is {machine.mem_mib}"
            )
    if len({(spec.cpus, spec.mem_mib) for spec in ours}) > 1 and not plan.allow_difference:
        found = ", ".join(f"{spec.name}: {spec.cpus} CPU, {spec.mem_mib} MiB" for spec in ours)
        raise UsageError(f"the targets have unequal CPUs or memory ({found}); --allow-difference runs them, marked")


def _validate_values(plan: Plan) -> None:
    if plan.schema != 1:
        raise UsageError(f"the plan has schema {plan.schema}; this version reads schema 1")
    for model in plan.models:
        if model not in (*_models.NAMES, plan.own):
            raise UsageError(f"unknown model {model!r}{_nearest(model, _models.NAMES)}")
    if len(set(plan.models)) < len(plan.models):
        raise UsageError(f"the plan names a model twice: {', '.join(plan.models)}")
    for key in ("spin_us", "spin_tail_us", "work_us"):
        if not 0 <= getattr(plan, key) <= 1e9:
            raise UsageError(f"{key} is {getattr(plan, key):g}; wanted 0 to 1e9 µs")
    if not 0 <= plan.spin_tail_p <= 1:
        raise UsageError(f"spin_tail_p is {plan.spin_tail_p:g}; wanted 0 to 1")
    if plan.work_us == 0 or plan.work_iterations < 0:
        raise UsageError("work wants work_us above 0 and work_iterations of 0 or more")
    for load in plan.loads:
        _arrivals.parse(load)
    if len(set(plan.loads)) < len(plan.loads):
        raise UsageError(f"the plan names a load twice: {', '.join(plan.loads)}")
    for job in plan.jobs:
        if job.job not in ("knn", "dnn"):
            raise UsageError(f"unknown job {job.job!r}{_nearest(job.job, ('knn', 'dnn'))}")
    for cell in plan.primary:
        model, _, load = cell.partition(":")
        if model not in plan.models or load not in plan.loads:
            raise UsageError(f"the primary cell {cell!r} is not in the plan; wanted MODEL:LOAD of its models and loads")
    if not 0 <= plan.until_ci < 1:
        raise UsageError(f"until_ci is {plan.until_ci:g}; wanted a share from 0 to 1, such as 0.02 for 2 %")
    if not re.fullmatch(r"[0-9.]+%(,[0-9.]+%)?", plan.margin):
        raise UsageError(f"margin is {plan.margin!r}; wanted a share, or two for p50 and p99: 2%,5%")
    if plan.only not in ("", "batch", "load"):
        raise UsageError(f"only is {plan.only!r}; wanted batch or load")
    if not 0 <= plan.seed < 2**63:
        raise UsageError(f"seed is {plan.seed}; wanted a whole number from 0 to 2**63 - 1")
    counts = {"rows": plan.rows, "threads": plan.threads, "restarts": plan.restarts}
    counts["open_connections"] = plan.open_connections
    for job in plan.jobs:
        counts |= {f"{job.job}.{key}": getattr(job, key) for key in ("repeats", "rows", "epochs", "emulated_rows")}
    for key, count in counts.items():
        if not 1 <= count <= MOST:
            raise UsageError(f"{key} is {count}; wanted 1 to {MOST}")
    for key in ("block_s", "seconds", "emulated_seconds", "request_timeout_s"):
        value = getattr(plan, key)
        if not (key == "block_s" and value == 0) and not 0.05 <= value <= 86400:
            raise UsageError(f"{key} is {value:g}; wanted 0.05 to 86400 seconds")
    if not 0 <= plan.warmup_s < plan.seconds:
        raise UsageError(f"warmup_s is {plan.warmup_s:g}; wanted 0 or more, and less than seconds ({plan.seconds:g})")
    if not 0 <= plan.boot_timeout_s <= 86400:
        raise UsageError(f"boot_timeout_s is {plan.boot_timeout_s:g}; wanted 0 (each kind's own) to 86400 seconds")
    for key in ("check", "min_requests"):
        if getattr(plan, key) < 0:
            raise UsageError(f"{key} is {getattr(plan, key)}; wanted 0 (never) or more")
    if plan.bound:
        _peak.parse(plan.bound)
    if plan.encoding not in ENCODINGS:
        raise UsageError(f"encoding is {plan.encoding!r}; wanted {' or '.join(ENCODINGS)}")
    if not 0 <= plan.client_spin_us <= 10_000:
        raise UsageError(f"client_spin_us is {plan.client_spin_us:g}; wanted microseconds, 0 to 10,000")
    if not plan.models or not plan.loads:
        raise UsageError("the plan names no model or no load; wanted at least one of each")


def _validate_own(plan: Plan, asked: bool) -> None:
    """`asked`: the model is, so it wants rows."""
    if not plan.model_file:
        if plan.data:
            raise UsageError(
                f"data is {plan.data}, and no model is the user's own; wanted --model FILE.py:CLASS as well"
            )
        return
    name = own.read(plan.model_file).name
    if name in _models.NAMES:
        raise UsageError(f"{plan.model_file} is called {name!r}, as one of ours is; give it another name")
    if name not in plan.models:
        raise UsageError(f"{plan.model_file} is called {name!r}; wanted that name in models")
    if not asked:
        return
    if not plan.data:
        raise UsageError(
            f"the model {name!r} wants rows to be asked: --data ROWS.npz with `rows`, and `labels` if known"
        )
    _rows.load(name, Path(plan.data))


def save(plan: Plan, path: Path) -> None:
    path.write_text(plan.toml())
