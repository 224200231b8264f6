"""The pipeline of a run, top to bottom: targets up, parity, load, batch, targets down, run folder, report."""

import errno
import math
import os
import random
import secrets
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import psutil

from hostsetup import kvm
from hostsetup.kinds import KINDS, make
from hostsetup.ledger import Ledger
from hostsetup.locks import run_lock
from hostsetup.sandbox import but_ignored
from hostsetup.target import Context, Spec
from images import own, shell, store
from images.errors import IsolatencyError, NotComparableError
from loadtest import _arrivals, _batch, _calibrate, _order, _parity, _peak, _report, _resume
from loadtest._awake import CAVEAT, awake
from loadtest._batch import Live
from loadtest._drive import drive
from loadtest._plan import Machine, Plan, validate
from loadtest._record import Record

ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SPARE_MIB = 1024  # what the host itself and the load client keep
NESTED_MIB = 2048  # the emulated host around a nested Firecracker
START_S = {"process": 2, "docker": 3, "uml": 4, "qemu": 10, "firecracker": 30, "url": 1}
LEAST_STARTS, MOST_STARTS = 10, 50  # with --until-ci: before they are looked at, and where it ends
FULL = (errno.ENOSPC, errno.EDQUOT)
NATIVE = "_native"  # a phase names its files, and no target's name begins so
PEAK_S = 90  # a search for the peak rate: some fifteen trials
SLOW_S = {"knn": 5, "dnn": 5}  # an emulated batch job, very roughly; said as "about"


@dataclass(frozen=True)
class Phase:
    """Targets that are up together: all that are not emulated, in one of their starts, or an emulated one by itself."""

    name: str
    specs: tuple[Spec, ...]
    emulated: bool
    restart: int = 0


@dataclass(frozen=True)
class Show:
    """What the run tells: lines that stay (`say`), what it does just now (`step`), and the share done of the load."""

    say: Callable[[str], None]
    step: Callable[[str], None]
    progress: Callable[[float, float], None]


def machine() -> Machine:
    """What this machine can give to a target: the cores this process may use, and memory less what the host keeps."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    return Machine(cores, max(psutil.virtual_memory().total // 2**20 - SPARE_MIB, 64))


def split_cores(cores: Sequence[int], cpus: int) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """Cores for the targets (the last `cpus`), those for the load client, and a caveat where they are shared."""
    targets, client = tuple(cores[-cpus:]), tuple(cores[:-cpus])
    if client:
        return targets, client, ""
    return targets, tuple(cores), f"the load client shares the targets' cores: this machine has {len(cores)} in all"


def phases(plan: Plan, kvm_boots: bool) -> list[Phase]:
    """Emulated targets load the machine even when idle, so each is measured by itself, after the others are down."""
    emulated = [spec for spec in plan.specs() if KINDS[spec.kind].emulated(spec, kvm_boots)]
    native = [spec for spec in plan.specs() if spec not in emulated]
    found = []
    starts = max(plan.restarts, MOST_STARTS) if plan.until_ci else plan.restarts
    for restart in range(starts if native else 0):
        # Shuffled: who starts first, and whose block comes first, is no property of a target.
        order = random.Random(f"{plan.seed} start {restart}").sample(native, len(native)) if restart else native
        found.append(Phase(f"{NATIVE}-{restart:03}" if starts > 1 else NATIVE, tuple(order), False, restart))
    return found + [Phase(spec.name, (spec,), True) for spec in emulated]


def estimate_s(plan: Plan, phase: Phase, block_s: float = _order.LEAST_BLOCK_S) -> float:
    """About how long a phase takes, in seconds, where blocks whose length is measured have `block_s`: what the run says
    at its start, and what its bound is made of."""
    peak = PEAK_S * len(_peak.models(plan.primary, plan.models)) if plan.bound else 0.0
    load = 0.0 if plan.only == "batch" else len(plan.models) * _cells_s(plan, phase, block_s)
    batch = 0.0
    if plan.only != "load":
        for job in plan.jobs:
            cost = 0.7 * job.rows / 569 if job.job == "knn" else 0.0008 * job.rows * job.epochs
            batch += SLOW_S[job.job] if phase.emulated else (cost + 0.5) * job.repeats / plan.restarts
    return sum(START_S[spec.kind] + load + peak + batch for spec in phase.specs)


def _cells_s(plan: Plan, phase: Phase, block_s: float) -> float:
    """Of one model, under all loads."""
    if phase.emulated:
        return len(plan.loads) * plan.emulated_seconds * 1.5
    total = 0.0
    for load in plan.loads:
        length = _order.length_of(_arrivals.parse(load), plan.block_s)
        rounds = _order.rounds_of(plan.seconds, plan.warmup_s, length or block_s, len(phase.specs))[1]
        total += rounds * (length or block_s)
    return total


def about(seconds: float) -> str:
    """A time in words, no finer than an estimate is."""
    if seconds < 90:
        return f"about {max(round(seconds, -1), 10):.0f} seconds"
    return f"about {seconds / 60:.0f} minutes"


def resume(folder: Path, *, command: Sequence[str], show: Show) -> tuple[Path | None, int]:
    """Go on with an interrupted run at the start in which it was interrupted. Raises IsolatencyError as `run` does."""
    with nullcontext() if shell.dry_run() else run_lock():
        before = _resume.take_back(folder)
    return run(before.plan, folder, command=command, show=show, before=before)


def run(
    plan: Plan, out: Path, *, command: Sequence[str], show: Show, before: _resume.Before | None = None
) -> tuple[Path | None, int]:
    """Run the plan and return the run folder and the exit code; what was measured is kept in every case.

    `before`: what the run folder `out` holds already; else a new one is made in `out`.

    Raises IsolatencyError only before anything was started. A dry run prints what it would do, and has no folder.
    """
    here = machine()
    validate(plan, here)
    out = out.absolute()  # Locust runs in another folder
    targets = [spec for spec in plan.specs() if spec.kind != "url"]
    images = store.current() if targets else None
    dry = shell.dry_run()
    with (
        nullcontext() if dry else run_lock(),
        awake() if plan.keep_awake else nullcontext(),
        _terminated_as_interrupted(),
        Ledger.open("run", " ".join(spec.name for spec in plan.specs())) as ledger,
    ):
        cores, client, shared = split_cores(here.cores, max((spec.cpus for spec in targets), default=1))
        todo = phases(plan, settle_kvm(targets, ledger))
        if before:
            todo = [phase for phase in todo if not before.has(phase.specs[0].name, phase.emulated, phase.restart)]
        for phase in todo:
            _check_memory(phase, here)
        named = f"{len(plan.targets)} target{'s' * (len(plan.targets) > 1)}"
        show.say(f"{named}, {about(sum(estimate_s(plan, phase) for phase in todo))}")
        if images is not None and plan.model_file and not dry:
            images = own.derive(images, own.read(plan.model_file), show.step)
        context = Context(ledger, images, cores, (), out, plan.boot_timeout_s or None, plan.internet)
        if targets and "work" in plan.models and not (plan.work_iterations or dry):
            show.step(f"counting how many iterations of work take {plan.work_us:g} µs")
            count = _calibrate.work_iterations(targets[0], context, plan.work_us)
            plan = msgspec.structs.replace(plan, work_iterations=count)
        args = [*plan.server_args(), *([] if plan.only == "load" else ["--jobs"])]
        context = replace(context, server_args=tuple(args))
        if dry:
            _dry_run(todo, context)
            return None, 0
        if before:
            record = Record(out, plan, command, cores, client, images, show.say)
            record.go_on(before.targets, before.starts, before.lengths)
        else:
            record = _begin(out, lambda path: Record(path, plan, command, cores, client, images, show.say))
        record.caveats += [shared] * bool(shared) + [CAVEAT] * plan.keep_awake
        with on_cores(client):
            return record.path, _run_phases(plan, todo, replace(context, logs=record.path / "logs"), record, show)


def settle_kvm(specs: Sequence[Spec], ledger: Ledger) -> bool:
    """Whether KVM boots a guest here; tried once where some target would use it."""
    wanted = any(KINDS[spec.kind].wants_kvm and not KINDS[spec.kind].emulated(spec, True) for spec in specs)
    return wanted and kvm.settled(store.current(), ledger)


def _check_memory(phase: Phase, here: Machine) -> None:
    wanted = sum(spec.mem_mib for spec in phase.specs if spec.kind != "url")
    wanted += NESTED_MIB if phase.emulated and phase.specs[0].kind == "firecracker" else 0
    if wanted > here.mem_mib:
        raise IsolatencyError(
            f"the targets that are up together ({', '.join(spec.name for spec in phase.specs)}) need {wanted} MiB; "
            f"{here.mem_mib} MiB is the most that fits: lower mem_mib, or run fewer targets"
        )


def _dry_run(todo: Sequence[Phase], context: Context) -> None:
    for phase in todo:
        for spec in phase.specs:
            dry_run_target(spec, context)


def dry_run_target(spec: Spec, context: Context) -> None:
    """Print every command that would start and end this target."""
    shell.say(f"start the target {spec.name} ({spec.kind}), {spec.cpus} CPU, {spec.mem_mib} MiB:")
    with make(spec, context):
        shell.say(f"use {spec.name}, then take it down:")


def _begin(out: Path, record: Callable[[Path], Record]) -> Record:
    """The record in a run folder of its own. Raises IsolatencyError where that cannot be made, with nothing left."""
    path = out / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
    try:
        (path / "logs").mkdir(parents=True)
        return record(path)
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)
        remedy = "free some space, or choose another --out" if error.errno in FULL else "choose another --out"
        raise IsolatencyError(f"the run folder {path} could not be made: {error.strerror}; {remedy}") from error


def _run_phases(plan: Plan, todo: Sequence[Phase], context: Context, record: Record, show: Show) -> int:
    code = 0
    narrow = False
    parity = _parity.Parity()
    try:
        for phase in todo:
            if plan.until_ci and not phase.emulated and phase.restart >= max(plan.restarts, LEAST_STARTS):
                narrow = narrow or _width(record.path) <= plan.until_ci
                if narrow:
                    continue
            try:
                _run_phase(plan, phase, context, record, parity, show)
            except NotComparableError:
                raise
            except IsolatencyError as error:
                record.error(error)
        record.caveats += parity.unchecked()
        code = 1 if record.errors else 0
        record.partial = record.incomplete
    except KeyboardInterrupt:
        record.error(IsolatencyError("interrupted; what was measured until then is kept"))
        code = 130
    except IsolatencyError as error:
        record.error(error)
        code = error.exit_code
    except OSError as error:
        record.error(_unwritten(error, record.path))
        code = 1
    ended = _finish(record)
    return code or ended


def _width(folder: Path) -> float:
    """The largest half-width of the intervals of p50 in the primary cells so far, a share; 0 where there is none."""
    summary = _report.summarise(folder)
    ratios = [cell.ratio.p50 for cell in summary.cells if cell.ratio and f"{cell.model}:{cell.load}" in summary.primary]
    return max((math.sqrt(ratio.high / ratio.low) - 1 for ratio in ratios if ratio.low and ratio.high), default=0.0)


def _finish(record: Record) -> int:
    """Close the record and write the report of what was measured; 1 where that met an error."""
    before = len(record.errors)
    try:
        record.close()
        if record.measured():
            _report.write(record.path)
            _point_latest(record.path.resolve())
    except IsolatencyError as error:
        record.error(error)
    except OSError as error:
        record.error(_unwritten(error, record.path))
    return int(len(record.errors) > before)


def _unwritten(error: OSError, folder: Path) -> IsolatencyError:
    """A full disk, for one: what stands in the folder can be reported once there is room again."""
    remedy = "free some space, then " * (error.errno in FULL) + f"`isolatency report {folder}` tells what was kept"
    return IsolatencyError(f"could not write {error.filename or folder}: {error.strerror or error}; {remedy}")


def _run_phase(plan: Plan, phase: Phase, context: Context, record: Record, parity: _parity.Parity, show: Show) -> None:
    with ExitStack() as stack:
        try:
            _measure(plan, phase, context, record, parity, show, stack)
        except KeyboardInterrupt:
            # Nothing is asked nicely now: all goes at once, before the targets are taken down in their own way.
            context.ledger.remove_all()
            raise


def _measure(
    plan: Plan, phase: Phase, context: Context, record: Record, parity: _parity.Parity, show: Show, stack: ExitStack
) -> None:
    live: list[Live] = []
    record.restart = phase.restart
    for spec in phase.specs:
        if phase.restart and not record.has(spec.name):
            continue  # it did not start the first time
        show.step(f"starting {spec.name}" + f", start {phase.restart + 1}" * (plan.restarts > 1 or plan.until_ci > 0))
        target = make(spec, context)
        try:
            live.append(Live(target, stack.enter_context(target)))
        except IsolatencyError as error:
            record.error(error)
    timeout_s = float(plan.for_engine(phase.name, phase.emulated)["request_timeout_s"])
    for one in list(live):
        show.step(f"comparing the answers of {one.endpoint.label}")
        try:
            facts = _ask(one, plan, timeout_s)
        except IsolatencyError as error:
            record.error(error)
            live.remove(one)
        else:
            record.target(one, facts, parity.check(facts))
    if not live:
        return
    if plan.only != "batch":
        show.step(f"load on {', '.join(one.endpoint.label for one in live)}")
        bound_s = 120 + 5 * estimate_s(plan, phase, _order.longest(plan.seconds, plan.quick))

        def told(at: dict[str, Any]) -> None:
            if not phase.emulated:
                record.length(at)
            show.progress(at["done_s"], at["total_s"])

        failed = drive(
            plan, phase.name, live, folder=record.path, ledger=context.ledger, cores=record.client_cores,
            bound_s=bound_s, progress=told, restart=phase.restart, lengths=record.lengths,
        )  # fmt: skip
        if failed:
            record.error(IsolatencyError(f"{phase.name}: {failed}"), partial=False)
    for one in live:
        record.memory(one)
    if plan.only != "load":
        with_jobs = [one for one in live if one.endpoint.identity is not None and one.endpoint.kind != "url"]
        if with_jobs:
            _batch.run_jobs(plan, with_jobs, record.path / "batch.csv", show.step, phase.restart)
    show.step(f"taking down {', '.join(one.endpoint.label for one in live)}")


def _ask(one: Live, plan: Plan, timeout_s: float) -> _parity.Facts:
    try:
        return _parity.ask(one.endpoint, one.target.spec, plan.models, plan.rows_of, timeout_s)
    except IsolatencyError:
        one.target.check()  # that it has ended says more
        raise


@contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """All threads of this process run on these cores, and what they start, unless it is placed elsewhere (targets)."""
    before = os.sched_getaffinity(0)
    _pin(cores)
    try:
        yield
    finally:
        _pin(before)


def _pin(cores: Iterable[int]) -> None:
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has just ended
            os.sched_setaffinity(int(thread.name), cores)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Each of ENDINGS ends a run in the same way, once: a second one must not cut the way down short. The end of the
    terminal is none where nohup has it ignored."""

    def interrupt(number: int, frame: Any) -> None:
        for ending in ENDINGS:
            signal.signal(ending, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {ending: signal.signal(ending, interrupt) for ending in but_ignored(ENDINGS)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _point_latest(path: Path) -> None:
    latest = path.parent / "latest"
    fresh = path.parent / f".latest-{path.name}"
    fresh.symlink_to(path.name)
    fresh.replace(latest)
