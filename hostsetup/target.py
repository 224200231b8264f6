"""What a target is: a context manager that yields an Endpoint. One implementation per kind, one file each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from hostsetup.ledger import Ledger
from images.store import Images

Option = str | int | float | bool
PORT = 8080


@dataclass(frozen=True)
class Spec:
    """What the user asked for. `options` holds the kind's own options only; cpus and mem_mib are every kind's."""

    name: str
    kind: str
    cpus: int = 1
    mem_mib: int = 512
    options: Mapping[str, Option] = field(default_factory=dict)


# What the server of one target may be told in place of what all are told: a difference that is known beforehand.
SERVER_OPTIONS: dict[str, type] = {"spin_us": float, "spin_tail_us": float, "spin_tail_p": float}


@dataclass(frozen=True)
class Context:
    """What a target may use. `cores` are the host's core numbers for targets, the same for all of them.

    `boot_timeout_s` takes the place of every kind's own bound, whether it is shorter or longer: process and docker
    30 s, uml 60, qemu and firecracker 60 with KVM, 150 and 300 where they are emulated, url 10.
    """

    ledger: Ledger
    images: Images | None
    cores: tuple[int, ...]
    server_args: tuple[str, ...]
    logs: Path
    boot_timeout_s: float | None = None
    internet: bool = False


@dataclass(frozen=True)
class Endpoint:
    """A target that has answered. `identity` is its GET /identity, None where that is no identity of ours.

    `accel` is None (process, docker, uml, url), "kvm", "tcg" or "nested"; the last two are emulated. `ready_s` is
    the time from the start to the first ready answer, `first_prediction_ms` that of the first infer request.
    """

    name: str
    kind: str
    url: str
    accel: str | None
    emulated: bool
    identity: Mapping[str, Any] | None
    ready_s: float
    first_prediction_ms: float | None = None
    caveats: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name as printed: an emulated result carries that in its name."""
        return label(self.name, self.kind, self.accel)


def label(name: str, kind: str, accel: str | None) -> str:
    if accel not in ("tcg", "nested"):
        return name
    return f"qemu-{accel}" if name == kind == "qemu" else f"{name} ({accel})"


class Target(Protocol):
    """Start on enter, stop on exit; what it makes on the host stands in the ledger before it is made.

    `__enter__` raises TargetError (with the console's tail) when the target does not answer within its bound,
    MissingError when something that it needs is not there; nothing is left behind in either case.
    """

    spec: Spec

    def __enter__(self) -> Endpoint: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def check(self) -> None:
        """Raise TargetError with the tail of the console if the target is no longer running."""

    def pids(self) -> list[int]:
        """The host's processes that make up this target, VMM and proxies included; empty for `url`."""


__all__ = ["PORT", "SERVER_OPTIONS", "Context", "Endpoint", "Option", "Self", "Spec", "Target", "label"]
