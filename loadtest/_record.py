"""The run folder while a run goes on: what was found is on disk at every moment, marked partial until the end."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

from hostsetup.target import Endpoint, Spec
from images import own
from images.errors import IsolatencyError, NotComparableError
from images.store import Images
from loadtest import _manifest, _plan, _samples
from loadtest._batch import Live
from loadtest._parity import Comparison, Facts
from loadtest._plan import Plan

RESERVED = 2**20  # bytes kept free for the end of a run: the manifest and the report of a disk that is full by then


class Record:
    """Writes targets.json and manifest.json; `close` joins the phases' samples and blocks into one file each.

    Raises OSError where the folder cannot take what a run needs at least. `say` is told every error.
    """

    def __init__(
        self,
        path: Path,
        plan: Plan,
        command: Sequence[str],
        cores: Sequence[int],
        client_cores: Sequence[int],
        images: Images | None,
        say: Callable[[str], None],
    ) -> None:
        self.path = path
        self.client_cores = tuple(client_cores)
        self.caveats: list[str] = []
        self.errors: list[str] = []
        self.partial = True
        self.incomplete = False
        self.restart = 0  # of what is noted from now on
        self.lengths: dict[str, float] = {}  # of blocks, in seconds, by MODEL:LOAD: the first that were told
        self._plan = plan
        self._cores = tuple(cores)
        self._targets: list[dict[str, Any]] = []
        self._manifest = _manifest.begin(command=command, seed=plan.seed, images=images, client_cores=client_cores)
        if images is not None and plan.model_file:
            self._manifest["model"] = own.record(images)
        self._say = say
        if images is not None and images.loaded:
            self.caveats.append("the images were loaded (images load), not built from this checkout")
        self._reserve = path / ".reserve"
        with self._reserve.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, RESERVED)
        _plan.save(plan, path / "plan.toml")
        self.save()

    def go_on(self, targets: list[dict[str, Any]], starts: int, lengths: dict[str, float]) -> None:
        """Keep what an interrupted run noted of its targets and blocks."""
        self._targets, self.lengths = targets, lengths
        self.caveats.append(f"resumed: the first {starts} starts were measured before, by another call")
        self.save()

    def error(self, error: IsolatencyError, *, partial: bool = True) -> None:
        """Note and say an error; `partial` says that something was not measured because of it.

        Never raises: a full disk cannot take the note, and `close` then does, in the space that was reserved.
        """
        self.errors.append(str(error))
        self.incomplete = self.incomplete or partial
        self._say(f"error: {error}")
        with contextlib.suppress(OSError):
            if error.detail:
                with (self.path / "logs" / "errors.log").open("a") as file:
                    file.write(f"{error}\n{error.detail}\n\n")
            self.save()

    def target(self, one: Live, facts: Facts, parity: Comparison) -> None:
        """Note a target that answered. Raises NotComparableError where it differs and the plan does not allow it."""
        spec, endpoint = facts.spec, facts.endpoint
        if own := _manifest.own_parts(spec.options):
            self._manifest.setdefault("own_parts", {})[endpoint.name] = own
        start = {
            "restart": self.restart, "ready_s": endpoint.ready_s, "first_prediction_ms": endpoint.first_prediction_ms,
            "host_memory_mib": None,
        }  # fmt: skip
        known = next((target for target in self._targets if target["name"] == endpoint.name), None)
        if known is not None:
            known["starts"].append(start)
            self._add(known["caveats"], [*endpoint.caveats, *parity.caveats])
            self._add(known["parity"]["differences"], parity.differences)
        else:
            self._targets.append(self._described(spec, endpoint, parity) | {"starts": [start]})
            places = {one.name: place for place, one in enumerate(self._plan.specs())}
            self._targets.sort(key=lambda target: places.get(target["name"], len(places)))
        self.save()
        if parity.differences and not self._plan.allow_difference:
            raise NotComparableError(
                f"parity is broken, nothing was compared: {'; '.join(parity.differences)}; "
                "--allow-difference measures all the same and marks every table"
            )

    @staticmethod
    def _add(known: list[str], more: Sequence[str]) -> None:
        known += [text for text in more if text not in known]

    def _described(self, spec: Spec, endpoint: Endpoint, parity: Comparison) -> dict[str, Any]:
        return {
            "name": endpoint.name, "label": endpoint.label, "kind": endpoint.kind, "accel": endpoint.accel,
            "emulated": endpoint.emulated, "cpus": spec.cpus, "mem_mib": spec.mem_mib,
            "cores": [] if endpoint.kind == "url" else list(self._cores[-spec.cpus :]),
            "identity": endpoint.identity, "ready_s": endpoint.ready_s,
            "first_prediction_ms": endpoint.first_prediction_ms, "host_memory_mib": None,
            "options": dict(spec.options),
            "caveats": [*endpoint.caveats, *parity.caveats],
            "parity": {"differences": list(parity.differences)},
        }  # fmt: skip

    def length(self, at: Mapping[str, Any]) -> None:
        """Note how long a cell's blocks are, as the load tells with its progress; written with the next save."""
        if at["block_s"]:
            self.lengths.setdefault(f"{at['model']}:{at['load']}", at["block_s"])

    def has(self, name: str) -> bool:
        """Whether the target of that name has answered in this run."""
        return any(target["name"] == name for target in self._targets)

    def memory(self, one: Live) -> None:
        """Sum of PSS over the target's processes on the host, in MiB; shared memory counts once in all.

        Null where none lives, and where this user may not read it of all of them: a part would be a wrong figure.
        """
        shares: list[int] = []
        unread = False
        for pid in one.target.pids():
            try:
                shares.append(psutil.Process(pid).memory_full_info().pss)
            except psutil.NoSuchProcess:
                continue
            except psutil.AccessDenied:
                unread = True
        for target in self._targets:
            if target["name"] == one.endpoint.name:
                mib = round(sum(shares) / 2**20, 1) if shares and not unread else None
                target["starts"][-1]["host_memory_mib"] = mib
                if len(target["starts"]) == 1:
                    target["host_memory_mib"] = mib
                if unread:
                    self._add(
                        target["caveats"],
                        ["host memory unknown: this user may not read it of all its processes; run as root"],
                    )
        self.save()

    def save(self) -> None:
        values = {
            **self._manifest, "block_s": self.lengths,
            "caveats": self.caveats, "errors": self.errors, "partial": self.partial,
        }  # fmt: skip
        _write(self.path / "targets.json", self._targets)
        _write(self.path / "manifest.json", values)

    def close(self) -> None:
        """Join the phases' files, note the end. Where the disk is full, the phases' files stay as they are, which the
        report reads too, and that is noted as an error. Raises OSError where not even the manifest can be written."""
        try:
            self.caveats += _samples.join(self.path)
        except IsolatencyError as error:
            self.partial = True
            self.error(error)
        self._reserve.unlink(missing_ok=True)
        self._manifest |= _manifest.end()
        self.save()

    def measured(self) -> bool:
        return any(any(self.path.glob(name)) for name in ("samples*.parquet*", "batch.csv"))


def _write(path: Path, value: Any) -> None:
    fresh = path.with_suffix(".part")
    try:
        with fresh.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(value), indent=2))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
