"""The kinds of target: which options each takes, and how one is made. Imports nothing heavy until a target is made."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from hostsetup.target import SERVER_OPTIONS, Context, Spec, Target
from images.errors import UsageError

_CHOICES = {
    "accel": ("auto", "kvm", "tcg"),
    "huge_pages": ("None", "2M"),
    "io_engine": ("Sync", "Async"),
    "cache_type": ("Unsafe", "Writeback"),
}
_RANGES: dict[str, tuple[float, float]] = {
    "port": (1, 65535), "rootfs_mib": (64, 2**20), "spin_us": (0, 1e9), "spin_tail_us": (0, 1e9), "spin_tail_p": (0, 1),
}  # fmt: skip
_GUEST = {"kernel": str, "boot_args": str, "rootfs_mib": int}


@dataclass(frozen=True)
class Kind:
    """`options` are the kind's own, besides cpus and mem_mib; `wants_kvm`: emulated where KVM boots no guest."""

    options: dict[str, type] = field(default_factory=dict)
    wants_kvm: bool = False

    def emulated(self, spec: Spec, kvm_boots: bool) -> bool:
        return self.wants_kvm and (not kvm_boots or spec.options.get("accel") == "tcg")


KINDS: dict[str, Kind] = {
    "process": Kind({"port": int, **SERVER_OPTIONS}),
    "docker": Kind({"image": str, "runtime": str, **SERVER_OPTIONS}),
    "firecracker": Kind(
        {
            **_GUEST,
            "binary": str,
            "huge_pages": str,
            "io_engine": str,
            "cache_type": str,
            "console": bool,
            **SERVER_OPTIONS,
        },
        wants_kvm=True,
    ),
    "qemu": Kind({**_GUEST, "accel": str, **SERVER_OPTIONS}, wants_kvm=True),
    "uml": Kind({**_GUEST, **SERVER_OPTIONS}),
    "url": Kind({"url": str}),
}


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a refusal: which word of the known ones may have been meant."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"the nearest known one is {near[0]!r}" if near else f"known are {', '.join(known) or 'none'}"


def check_options(spec: Spec) -> None:
    """Raises UsageError for an unknown kind, an option that the kind does not take, or a value that it cannot have."""
    if spec.kind not in KINDS:
        raise UsageError(f"the target {spec.name!r} has an unknown kind {spec.kind!r}; {nearest(spec.kind, KINDS)}")
    if spec.cpus < 1 or spec.mem_mib < 1:
        found = f"cpus={spec.cpus}, mem_mib={spec.mem_mib}"
        raise UsageError(f"the target {spec.name!r} wants at least 1 CPU and 1 MiB; found {found}")
    options = KINDS[spec.kind].options
    for key, value in spec.options.items():
        if key not in options:
            raise UsageError(f"the target {spec.name!r} has an unknown option {key!r}; {nearest(key, options)}")
        if type(value) is not options[key] and not (options[key] is float and type(value) is int):
            raise UsageError(f"the target {spec.name!r} wants {options[key].__name__} for {key}; found {value!r}")
        if key in _CHOICES and value not in _CHOICES[key]:
            raise UsageError(f"the target {spec.name!r} wants {' or '.join(_CHOICES[key])} for {key}; found {value!r}")
        low, high = _RANGES.get(key, (0, 0))
        if key in _RANGES and not low <= float(value) <= high:
            raise UsageError(f"the target {spec.name!r} wants {low:.10g} to {high:.10g} for {key}; found {value!r}")
    if spec.kind == "uml" and spec.cpus > 1:
        raise UsageError(f"the target {spec.name!r} is of kind uml, which has one CPU; found cpus={spec.cpus}")
    if spec.kind == "firecracker" and spec.cpus > 32:
        raise UsageError(f"the target {spec.name!r} asks for {spec.cpus} vCPUs; Firecracker gives 32 at most")
    if spec.kind == "url" and not _is_address(str(spec.options.get("url", ""))):
        raise UsageError(f"the target {spec.name!r} wants url:http://host:port; found {spec.options.get('url', '')!r}")


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    host = re.fullmatch("[A-Za-z0-9.:_-]+", parts.hostname or "")
    more = parts.path not in ("", "/") or any((parts.username, parts.query, parts.fragment))
    return parts.scheme == "http" and host is not None and port != 0 and not more


def make(spec: Spec, context: Context) -> Target:
    """The target of this kind, not yet started. Raises UsageError as `check_options` does."""
    check_options(spec)
    if spec.kind == "process":
        from hostsetup.process import Process

        return Process(spec, context)
    if spec.kind == "docker":
        from hostsetup.container import Container

        return Container(spec, context)
    if spec.kind == "qemu":
        from hostsetup.qemu import Qemu

        return Qemu(spec, context)
    if spec.kind == "uml":
        from hostsetup.uml import Uml

        return Uml(spec, context)
    if spec.kind == "firecracker":
        from hostsetup.firecracker import Firecracker

        return Firecracker(spec, context)
    from hostsetup.url import Url

    return Url(spec, context)
