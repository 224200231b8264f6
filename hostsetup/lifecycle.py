"""What every target does in the same way: start within a bound, wait for the first answer, say who it is, go."""

import http.client
import json
import math
import os
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.parse import urlsplit

import psutil

from hostsetup.cgroup import Placed, placed
from hostsetup.target import SERVER_OPTIONS, Context, Endpoint, Spec
from images import shell
from images.errors import IsolatencyError, MissingError, TargetError
from images.store import Images

POLL_S = 0.02
TAIL_LINES = 15
IDENTITY_TIMEOUT_S = 120.0
ATTEMPT_S = 2.0
FIRST_VALUES = 10**6  # in the first infer request: a server that wants more is an odd one


class DeathError(TargetError):
    """The target ended by itself."""


class Lifecycle(ABC):
    """A target but for its kind: subclasses say how it starts, whether it lives, and which processes it is.

    `_start` puts every way to undo what it did on `_stack`; the stack is unwound on exit and when the start fails.
    """

    bound_s = 30.0
    # Bound of an attempt to connect: what is sent to a guest before its network is up is lost, and only a second
    # later sent again, so a new attempt finds it sooner.
    connect_s = 0.2
    accel: str | None = None

    def __init__(self, spec: Spec, context: Context) -> None:
        self.spec = spec
        self.context = context
        self.caveats: list[str] = []
        self._stack = ExitStack()
        self._place: Placed | None = None
        self._running: list[int] = []  # what the ledger has of its processes and containers
        self.console = context.logs / f"{spec.name}.console"
        self.started = 0.0  # where `ready_s` and the bound begin; `_start` sets it anew after making images
        self.console_from = 0  # an earlier start of the same name may have written before

    @abstractmethod
    def _start(self) -> str:
        """Start it and return the URL at which it will answer."""

    @abstractmethod
    def _ended(self) -> str | None:
        """In words, how the target ended; None while it runs."""

    @abstractmethod
    def pids(self) -> list[int]: ...

    def _own(self, number: int) -> None:
        """Have an entry of the ledger removed with the target, and before all else when its start is interrupted."""
        self._running.append(number)
        self._stack.callback(self.context.ledger.remove, number)

    def _mark(self) -> dict[str, str]:
        """Write down a process that is about to be started; the environment that marks it."""
        number, mark = self.context.ledger.mark(self.spec.name)
        self._own(number)
        return mark

    def _placed(self, mem_mib: int | None) -> Placed:
        """Its cgroup on its cores, for as long as it is up."""
        cores = self.context.cores[-self.spec.cpus :]
        self._place = self._stack.enter_context(placed(self.context.ledger, self.spec.name, cores, mem_mib))
        self.caveats += self._place.caveats
        return self._place

    def _output(self) -> IO[bytes]:
        """Where the console goes."""
        return Path(os.devnull if shell.dry_run() else self.console).open("ab")

    def _said(self) -> str:
        """What the console says since the start."""
        try:
            return self.console.read_bytes()[self.console_from :].decode(errors="replace")
        except OSError:
            return ""

    def _tail(self) -> str:
        """The last lines of the console."""
        return "\n".join([line for line in self._said().splitlines() if line.strip()][-TAIL_LINES:])

    @property
    def emulated(self) -> bool:
        return self.accel in ("tcg", "nested")

    @property
    def images(self) -> Images:
        if self.context.images is None:
            raise MissingError(f"{self.spec.name} needs the images; run `isolatency images build`")
        return self.context.images

    def server_args(self) -> list[str]:
        """The server's arguments, the target's own after those of all, which they replace. Hashing the tree takes
        minutes under emulation, so the built-in label is told."""
        mine = {key: value for key, value in self.spec.options.items() if key in SERVER_OPTIONS}
        own = [f"--{key.replace('_', '-')}={value}" for key, value in mine.items()]
        return [*self.context.server_args, *own, *(["--tree-label", "/.tree-sha256"] if self.emulated else [])]

    def __enter__(self) -> Endpoint:
        self.started = time.monotonic()
        self.console_from = self.console.stat().st_size if self.console.exists() else 0
        try:
            url = self._start()
            if shell.dry_run():
                return self._endpoint(url, None, 0.0, None)
            self._await(url, self.started + (self.context.boot_timeout_s or self.bound_s))
            ready_s = time.monotonic() - self.started
            return self._endpoint(url, identity(url), ready_s, self._first_prediction(url))
        except IsolatencyError as error:
            self._give_up(error)
            raise
        except OSError as error:  # a full disk, for one
            where = f" at {error.filename}" if error.filename else ""
            failure = TargetError(f"{self.spec.name} could not be started: {error.strerror or error}{where}")
            self._give_up(failure)
            raise failure from error
        except BaseException:  # Ctrl-C, for one: nobody is asked to end, which may take a guest half a minute
            with suppress(IsolatencyError), self._stack:  # what stays is in the ledger
                for number in reversed(self._running):
                    self.context.ledger.remove(number)
            raise

    def _give_up(self, error: IsolatencyError) -> None:
        """Take down what was started; the user reads why it failed first, and then what could not be removed."""
        error.detail = error.detail or self._tail()
        try:
            self._stack.close()
        except IsolatencyError as left:  # it stays in the ledger, for `clean`
            error.detail += f"\n{left}"

    def _endpoint(self, url: str, found: Any, ready_s: float, first_ms: float | None) -> Endpoint:
        return Endpoint(
            self.spec.name,
            self.spec.kind,
            url,
            self.accel,
            self.emulated,
            found,
            ready_s,
            first_ms,
            tuple(self.caveats),
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def check(self) -> None:
        if (ended := self._ended()) is not None:
            raise DeathError(f"{self.spec.name} {ended}; the end of its console is in the log", detail=self._tail())
        if self._place is not None:
            self._place.check(self.spec.name)

    def _await(self, url: str, end: float) -> None:
        """Until GET /v2/health/ready is answered 200. Raises TargetError after the bound, DeathError when it dies."""
        said = "nothing"
        connect_s = ATTEMPT_S if self.emulated else self.connect_s
        while time.monotonic() < end:
            self.check()
            try:
                status, _ = get(url, "/v2/health/ready", timeout_s=ATTEMPT_S, connect_s=connect_s)
                if status == 200:
                    return
                said = f"status {status}"
            except OSError as error:
                said = error.strerror or str(error)
            except http.client.HTTPException as error:
                said = f"no HTTP ({error})"
            time.sleep(POLL_S)
        bound_s = self.context.boot_timeout_s or self.bound_s
        raise TargetError(
            f"{self.spec.name} did not answer at {url} within {bound_s:g} s (last: {said}); {self._advice()}",
            detail=self._tail(),
        )

    def _advice(self) -> str:
        return f"boot_timeout_s in the plan raises the bound, {self.console} has its console"

    def _first_prediction(self, url: str) -> float | None:
        """Milliseconds that the first infer request takes, with one row of zeros; None where it cannot be asked so.

        That is a server without such a model, or an unknown one that describes its models in another way.
        """
        args = self.context.server_args
        name = args[args.index("--model") + 1] if "--model" in args else "null"
        try:
            if ".py:" in name:  # a user's own, whose name its server knows
                name = json.loads(get(url, "/v2/repository/index", timeout_s=IDENTITY_TIMEOUT_S, body="{}")[1])[0][
                    "name"
                ]
            status, meta = get(url, f"/v2/models/{name}", timeout_s=IDENTITY_TIMEOUT_S)
            if status != 200:
                return None
            tensor = json.loads(meta)["inputs"][0]
            shape = [1 if size == -1 else size for size in tensor["shape"]]
            if math.prod(shape) > FIRST_VALUES:
                return None
            body = {"inputs": [tensor | {"shape": shape, "data": [0.0] * math.prod(shape)}]}
            start = time.monotonic()
            status, _ = get(url, f"/v2/models/{name}/infer", timeout_s=IDENTITY_TIMEOUT_S, body=json.dumps(body))
        except (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError):
            return None
        except (OSError, http.client.HTTPException) as error:
            raise TargetError(f"{self.spec.name} answered, but not its first infer request: {error}") from error
        return (time.monotonic() - start) * 1e3 if status == 200 else None


def get(
    url: str, path: str, *, timeout_s: float, body: str | None = None, connect_s: float | None = None
) -> tuple[int, bytes]:
    """One request (a POST where there is a body) on a connection of its own. Raises OSError, HTTPException.

    `connect_s` bounds the connection where it is shorter than `timeout_s`, which bounds every wait for data.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=connect_s or timeout_s)
    try:
        connection.connect()
        connection.sock.settimeout(timeout_s)
        connection.request("POST" if body else "GET", path, body, {"Content-Type": "application/json"} if body else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def identity(url: str) -> dict[str, Any] | None:
    """What GET /identity says; None where that is no identity of ours (no `schema`), which makes an unknown server.

    Raises TargetError when the connection breaks.
    """
    try:
        status, body = get(url, "/identity", timeout_s=IDENTITY_TIMEOUT_S)
        found = json.loads(body) if status == 200 else None
    except (ValueError, RecursionError):
        return None
    except (OSError, http.client.HTTPException) as error:
        raise TargetError(f"{url}/identity broke off: {error}") from error
    return found if isinstance(found, dict) and "schema" in found else None


def tree_of(pid: int) -> list[int]:
    """A process and all its descendants; empty when it is gone."""
    try:
        top = psutil.Process(pid)
        return [pid, *(child.pid for child in top.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def in_words(code: int) -> str:
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def shell_code_in_words(code: int) -> str:
    """The same where it was a shell that saw the end: it says 128 + n for signal n."""
    return in_words(128 - code if code > 128 else code)


def bare_environment(mark: dict[str, str], **more: str) -> dict[str, str]:
    """What a launcher or a VMM gets: a path and its mark, nothing of the user's."""
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", **mark, **more}


def private_folder(name: str, ledger_id: str, parent: Path) -> Path:
    return parent / f"isolatency-{ledger_id}-{name}"
