"""Targets that are kept running: one detached process holds the context of each, until it is told to end.

`python -m hostsetup.supervisor SPEC.json` is that process. Its ledger entry is how `ps` and `down` find it.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from hostsetup import ledger as books
from hostsetup.kinds import make
from hostsetup.ledger import Ledger, Owner
from hostsetup.target import Context, Spec
from images import shell, store
from images.errors import IsolatencyError, TargetError, UsageError

START_S = 600.0  # longer than any kind's own bound, which is what normally decides
CHECK_S = 1.0


def start(
    spec: Spec, *, cores: Sequence[int], server_args: Sequence[str], internet: bool, boot_timeout_s: float | None = None
) -> Owner:
    """Start a target under a supervisor of its own and return its ledger entry (notes: url, label) once it answers.

    Raises UsageError when the name is taken, TargetError with the supervisor's words when it does not come up.
    """
    if any(owner.name == spec.name for owner in kept()):
        raise UsageError(f"a target {spec.name!r} is kept already; `isolatency down {spec.name}`, or give NAME=KIND")
    logs = books.folder() / "kept" / spec.name
    logs.mkdir(parents=True, exist_ok=True)
    order = {"spec": asdict(spec), "cores": list(cores), "server_args": list(server_args), "internet": internet}
    order |= {"boot_timeout_s": boot_timeout_s, "logs": str(logs)}
    file = logs / "order.json"
    file.write_text(json.dumps(order))
    log = logs / "supervisor.log"
    with log.open("wb") as stream:
        process = shell.spawn([sys.executable, "-m", "hostsetup.supervisor", file], env=os.environ, stdout=stream)
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        for owner in kept():
            if owner.name == spec.name and "url" in owner.notes:
                return owner
        if process.poll() is not None:
            said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise TargetError(said[-1], detail="\n".join(said[:-1][-20:]))
        time.sleep(0.02)
    process.terminate()
    raise TargetError(f"{spec.name} did not come up within {START_S:g} s; its log is {log}")


def kept() -> list[Owner]:
    """The targets that are kept running in this network namespace."""
    return [owner for owner in books.owners() if owner.alive and owner.what == "kept" and owner.netns == books.netns()]


def elsewhere() -> list[Owner]:
    """Those kept in other network namespaces (sandboxes), which only a command in there reaches."""
    return [owner for owner in books.owners() if owner.alive and owner.what == "kept" and owner.netns != books.netns()]


def stop(names: Sequence[str]) -> list[str]:
    """End the named targets, or all; returns the names. Raises UsageError for a name that is not kept here."""
    here = {owner.name: owner for owner in kept()}
    for name in names:
        if name not in here:
            raise UsageError(f"no target {name!r} is kept here; kept are: {', '.join(here) or 'none'}")
    chosen = list(names) or list(here)
    for name in chosen:
        books.end_owner(here[name])
    return chosen


def _hold(order: dict[str, Any]) -> None:
    spec = Spec(**order["spec"])
    images = None if spec.kind == "url" else store.current()
    with Ledger.open("kept", spec.name) as ledger:
        context = Context(
            ledger=ledger,
            images=images,
            cores=tuple(order["cores"]),
            server_args=tuple(order["server_args"]),
            logs=Path(order["logs"]),
            boot_timeout_s=order["boot_timeout_s"],
            internet=order["internet"],
        )
        target = make(spec, context)
        with target as endpoint:
            ledger.note(
                url=endpoint.url, label=endpoint.label, kind=endpoint.kind, ready_s=endpoint.ready_s,
                cpus=spec.cpus, mem_mib=spec.mem_mib,
            )  # fmt: skip
            while True:
                time.sleep(CHECK_S)
                target.check()


def _main() -> int:
    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _hold(json.loads(Path(sys.argv[1]).read_text()))
    except IsolatencyError as error:
        print(error.detail, str(error), sep="\n", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main())
