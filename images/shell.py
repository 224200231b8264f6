"""The only caller of subprocess: every host command of isolatency passes here, so that a dry run can print it.

It lies in the lowest room because images/build.py needs it too.
"""

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from images.errors import MissingError, ShellError

_dry = False


def set_dry_run(on: bool) -> None:
    """From now on print commands that change something instead of running them."""
    global _dry
    _dry = on


def dry_run() -> bool:
    return _dry


def say(line: str) -> None:
    """Print what a dry run would have done where that is no command (an API call, a file written)."""
    print(f"would {line}", flush=True)


def run(
    argv: Sequence[str | Path],
    *,
    changes: bool = True,
    check: bool = True,
    stdin: str | None = None,
    timeout_s: float = 60,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return it with its text output.

    `changes=False` marks a mere look, which a dry run performs too. Raises ShellError with the command's own words
    on a non-zero exit (unless `check` is false) and after `timeout_s`; MissingError where the program is not there.
    """
    words = [str(word) for word in argv]
    if _dry and changes:
        say(f"run: {shlex.join(words)}")
        return subprocess.CompletedProcess(words, 0, "", "")
    try:
        done = subprocess.run(
            words,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=env,
            cwd=cwd,
        )
    except FileNotFoundError as error:
        raise MissingError(
            f"the program {words[0]} is needed and was not found; `isolatency doctor` says what brings it"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ShellError(f"`{shlex.join(words)}` did not end within {timeout_s:g} s") from error
    if check and done.returncode:
        found = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise ShellError(
            f"`{shlex.join(words)}` ended with {done.returncode}: {found[-1]}", detail="\n".join(found[-20:])
        )
    return done


def spawn(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    stdout: IO[bytes] | int | None = subprocess.DEVNULL,
    stderr: IO[bytes] | int | None = subprocess.STDOUT,
    stdin: IO[bytes] | int | None = subprocess.DEVNULL,
    cwd: Path | None = None,
    new_session: bool = True,
) -> subprocess.Popen[bytes]:
    """Start a long-running command. Mark it in the ledger first: `ledger.mark()` gives the environment for it.

    A stream of None is the caller's own. A session of its own keeps the terminal's Ctrl-C away from the command: the
    run takes its targets down itself.
    """
    words = [str(word) for word in argv]
    if _dry:
        say(f"start: {shlex.join(words)}")
        words = ["true"]
    try:
        return subprocess.Popen(
            words, env=env, stdin=stdin, stdout=stdout, stderr=stderr, cwd=cwd, start_new_session=new_session
        )
    except FileNotFoundError as error:
        raise MissingError(
            f"the program {words[0]} is needed and was not found; `isolatency doctor` says what brings it"
        ) from error


def write(path: Path, text: str) -> None:
    """Write to a file of the kernel's (/proc, /sys). Raises ShellError with the kernel's reason."""
    if _dry:
        say(f"write {text!r} to {path}")
        return
    try:
        path.write_text(text)
    except OSError as error:
        raise ShellError(f"could not write {text!r} to {path}: {os.strerror(error.errno or 0)}") from error
