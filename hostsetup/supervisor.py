"""Targets that are kept running: one detached process holds the context of each, until it is told to end.

`python -m hostsetup.supervisor ORDER` is that process, ORDER a JSON object. It says one line of JSON on its standard
output once the target answers or has failed, and from then on writes to its log only. Its ledger entry is how `ps` and
`down` find it. A target that fails or dies leaves that entry, with the reason and its logs, until `down` or `clean`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import IO, Any

from hostsetup import ledger as books
from hostsetup.kinds import make
from hostsetup.ledger import Ledger, Owner
from hostsetup.lifecycle import in_words
from hostsetup.target import Context, Spec
from images import own, shell, store
from images.errors import IsolatencyError, TargetError, UsageError

CHECK_S = 1.0


def start(
    spec: Spec, *, cores: Sequence[int], server_args: Sequence[str], internet: bool, model: str = "",
    boot_timeout_s: float | None = None,
) -> Owner:  # fmt: skip
    """Start a target under a supervisor of its own and return its ledger entry (notes: url, label) once it answers.

    `model`: FILE.py:CLASS, a user's own that its tree is to hold.

    Raises UsageError when the name is taken, TargetError with the target's words when it does not come up.
    """
    order = {"spec": asdict(spec), "cores": list(cores), "server_args": list(server_args), "internet": internet}
    order |= {"boot_timeout_s": boot_timeout_s, "model": model}
    argv = [sys.executable, "-P", "-m", "hostsetup.supervisor", json.dumps(order)]
    environment = {key: value for key, value in os.environ.items() if key != books.MARK}
    process = shell.spawn(argv, env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        answer, noise = _answer(process.stdout)
    except BaseException:  # Ctrl-C does not reach a session of its own
        process.terminate()
        raise
    if answer is None:
        last = (noise.strip().splitlines() or ["nothing"])[-1]
        how = in_words(process.wait())
        raise TargetError(f"{spec.name}: what starts and keeps it {how}; the last that it said: {last}", detail=noise)
    if "error" in answer:
        process.wait()
        failure = UsageError if answer.get("usage") else TargetError
        raise failure(answer["error"], detail="\n".join(filter(None, [noise.strip(), answer.get("detail", "")])))
    owner = next((owner for owner in kept() if owner.id == answer["id"]), None)
    if owner is None:
        raise TargetError(f"{spec.name} answered and has ended since; `isolatency ps` says why")
    return owner


def _answer(output: IO[bytes]) -> tuple[dict[str, Any] | None, str]:
    """The supervisor's line, and what was said before it by others (a warning of a library's); None where it ended."""
    noise: list[str] = []
    for line in output:
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and found.keys() & {"id", "error"}:
                return found, "".join(noise)
        noise.append(line.decode(errors="replace"))
    return None, "".join(noise)


def kept() -> list[Owner]:
    """The targets that are kept running in this network namespace."""
    return [owner for owner in _here() if owner.alive]


def ended() -> list[tuple[Owner, str]]:
    """Those that were kept in this network namespace and have failed or died, each with the reason."""
    killed = "its supervisor was killed; `isolatency clean` removes the rest"
    return [(owner, str(owner.notes.get("ended", killed))) for owner in _here() if not owner.alive]


def elsewhere() -> list[Owner]:
    """Those kept in other network namespaces (sandboxes), which only a command in there reaches."""
    return [owner for owner in books.owners() if owner.alive and owner.what == "kept" and owner.netns != books.netns()]


def stop(names: Sequence[str]) -> list[str]:
    """End the named targets, or all; returns the names. Raises UsageError for a name that is not kept here."""
    here = {owner.name: owner for owner in _here()}
    for name in names:
        if name not in here:
            raise UsageError(f"no target {name!r} is kept here; kept are: {', '.join(here) or 'none'}")
    chosen = [here[name] for name in names] or list(here.values())
    stubborn = [owner.name for owner, gone in zip(chosen, books.end(chosen), strict=True) if not gone]
    for owner in books.owners():
        if not owner.alive and owner.id in {one.id for one in chosen}:
            books.remove_dead(owner)
    if stubborn:
        raise IsolatencyError(f"{', '.join(stubborn)} did not end; run `isolatency down` again")
    return [owner.name for owner in chosen]


def _here() -> list[Owner]:
    return [owner for owner in books.owners() if owner.what == "kept" and owner.netns == books.netns()]


def _open(name: str) -> Ledger:
    """The target's ledger; a dead one of that name makes room. Raises UsageError when a living one has the name."""
    with books.locked("kept.lock"):
        for owner in _here():
            if owner.name == name and owner.alive:
                raise UsageError(f"a target {name!r} is kept already; `isolatency down {name}`, or give NAME=KIND")
            if owner.name == name:
                books.remove_dead(owner)
        return Ledger.open("kept", name)


def _hold(order: dict[str, Any]) -> None:
    """Keep the target until SIGTERM. Raises IsolatencyError when it does not come up, or when it dies."""
    spec = Spec(**order["spec"])
    ledger = _open(spec.name)
    try:
        logs = books.folder() / f"kept-{ledger.id}"
        ledger.folder(logs)
        images = None if spec.kind == "url" else store.current()
        if images is not None and order["model"]:
            images = own.derive(images, own.read(order["model"]), lambda step: None)
        context = Context(
            ledger=ledger,
            images=images,
            cores=tuple(order["cores"]),
            server_args=tuple(order["server_args"]),
            logs=logs,
            boot_timeout_s=order["boot_timeout_s"],
            internet=order["internet"],
        )
        target = make(spec, context)
        with target as endpoint:
            ledger.note(
                url=endpoint.url, label=endpoint.label, kind=endpoint.kind, ready_s=endpoint.ready_s,
                cpus=spec.cpus, mem_mib=spec.mem_mib, logs=str(logs),
            )  # fmt: skip
            _say({"id": ledger.id})
            _detach(logs / "supervisor.log")
            while True:
                time.sleep(CHECK_S)
                target.check()
    except TargetError as error:
        ledger.note(ended=str(error), kind=spec.kind)
        ledger.abandon()
        raise
    except BaseException:
        ledger.__exit__(None, None, None)
        raise


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def _detach(log: Path) -> None:
    """From here on the output goes to the log, and nobody waits for the end of it."""
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), sys.stdout.fileno())
        os.dup2(stream.fileno(), sys.stderr.fileno())


def _main() -> int:
    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _hold(json.loads(sys.argv[1]))
    except (IsolatencyError, OSError) as error:
        detail = error.detail if isinstance(error, IsolatencyError) else ""
        _say({"error": str(error), "detail": detail, "usage": isinstance(error, UsageError)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
