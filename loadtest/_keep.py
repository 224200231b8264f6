"""What the commands choose before they call: the targets of a run, and the ones that `up` keeps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hostsetup import doctor, supervisor
from hostsetup.ledger import Ledger
from hostsetup.target import Context
from images import own, shell, store
from images.errors import IsolatencyError, UsageError
from loadtest import _models, _plan, _run
from loadtest._plan import MODELS, Plan

Say = Callable[[str], None]


def choose(plan: Plan, targets: Sequence[str], flags: Mapping[str, Any], say: Say) -> Plan:
    """The plan with the flags over it, and with every kind that this machine can run where it names no target.

    Raises IsolatencyError when no kind can run.
    """
    given = {key: value for key, value in flags.items() if value is not None and value is not False and value != ()}
    if "models" in given:
        given |= _named(given["models"])
    if given.get("data"):
        given["data"] = str(Path(given["data"]).absolute())
    if "seconds" in given and plan.warmup_s >= given["seconds"]:
        given["warmup_s"] = given["seconds"] / 4
    if targets:
        given["targets"] = tuple(_plan.parse_target(text) for text in targets)
    elif not plan.targets:
        given["targets"] = tuple(_able(say))
    return msgspec.structs.replace(plan, **given)


def _named(words: Sequence[str]) -> dict[str, Any]:
    """A plan's `models` and `model_file`, by what --model says. Raises UsageError."""
    files = {word: own.read(word) for word in words if own.is_file(word)}
    if len(files) > 1:
        raise UsageError(f"one model of the user's own at a time; found {', '.join(files)}")
    names = dict.fromkeys(files[word].name if word in files else _models.name(word) for word in words)
    return {"models": tuple(names), "model_file": next((one.word for one in files.values()), "")}


def _able(say: Say) -> Iterator[dict[str, Any]]:
    able = doctor.able_kinds()
    found = False
    for kind, verdict in able.items():
        if verdict.ok is False:
            say(f"{kind} is left out: {verdict.why}" + (f" ({verdict.fix})" if verdict.fix else ""))
        else:
            found = True
            yield {"name": kind, "kind": kind}
    if not found:
        raise IsolatencyError("this machine can run no kind of target; `isolatency doctor` says what mends it")


def up(targets: Sequence[str], models: Sequence[str], internet: bool, say: Say) -> Iterator[str]:
    """Start each target and yield its URL once it answers. Raises what the first that fails raises."""
    plan = Plan(
        targets=tuple(_plan.parse_target(text) for text in targets),
        allow_difference=True,
        **(_named(models) if models else {"models": MODELS}),
    )
    here = _run.machine()
    _plan.validate(plan, here, asked=False)
    args = [*plan.server_args(), "--jobs"]
    if plan.model_file and not shell.dry_run():
        own.derive(store.current(), own.read(plan.model_file), say)  # here, where its steps are seen
    with Ledger.open("run", "up") as ledger:
        _run.settle_kvm(plan.specs(), ledger)
    for spec in plan.specs():
        cores = _run.split_cores(here.cores, spec.cpus)[0]
        if shell.dry_run():
            with Ledger.open("run", "dry run") as ledger:
                context = Context(ledger, store.current(), cores, tuple(args), Path("logs"), internet=internet)
                _run.dry_run_target(spec, context)
            continue
        say(f"starting {spec.name}")
        notes = supervisor.start(spec, cores=cores, server_args=args, internet=internet, model=plan.model_file).notes
        say(f"{notes['label']} answers after {notes['ready_s']:.1f} s")
        yield str(notes["url"])


def table(console: Console) -> None:
    """The kept targets, one line each."""
    shown = Table("NAME", "KIND", "CPUS", "MIB", "URL", box=None)
    for owner in supervisor.kept():
        notes = owner.notes
        shown.add_row(
            notes.get("label", owner.name), notes.get("kind", "starting"), str(notes.get("cpus", "")),
            str(notes.get("mem_mib", "")), notes.get("url", ""),
        )  # fmt: skip
    for owner, reason in supervisor.ended():
        shown.add_row(owner.name, "ended", "", "", escape(reason))
    console.print(shown)
    others = supervisor.elsewhere()
    if others:
        console.print(f"in sandboxes, out of reach from here: {', '.join(owner.name for owner in others)}")
