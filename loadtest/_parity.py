"""Before anything is measured: the same tree, the same answers, the same BLAS kernel and thread count everywhere."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import requests

from hostsetup.target import SERVER_OPTIONS, Endpoint, Spec
from images.errors import TargetError
from loadtest import _rows
from loadtest._client import Outputs, infer, session

INPUTS = 200
PROBABILITY_TOLERANCE = 1e-4
OWN_PARTS = ("image", "kernel", "binary")


@dataclass(frozen=True)
class Facts:
    """What one target showed: its identity (None: not a server of ours) and its outputs for the parity inputs."""

    endpoint: Endpoint
    spec: Spec
    outputs: Mapping[str, Outputs]
    caveats: tuple[str, ...] = ()


@dataclass
class Comparison:
    """`differences` stop a run (or mark it, with allow_difference); `caveats` are written beside the figures."""

    differences: list[str] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)


def ask(endpoint: Endpoint, spec: Spec, models: Sequence[str], data: Callable[[str], Path], timeout_s: float) -> Facts:
    """The target's answers for the first 200 query rows of each model, read from `data` of it. Raises TargetError."""
    http = session()
    outputs: dict[str, Outputs] = {}
    for model in models:
        rows = _rows.load(model, data(model)).rows[:INPUTS]
        try:
            outputs[model] = infer(http, endpoint, model, rows, timeout_s=timeout_s)
        except requests.Timeout as error:
            raise TargetError(
                f"{endpoint.label}: {model} gave no answer within {timeout_s:g} s before the measurement; "
                "raise request_timeout_s in the plan, or look at its console in logs/"
            ) from error
    return Facts(endpoint, spec, outputs)


class Parity:
    """Compares each target of a run with the first one whose tree can be checked, until there is one with the first."""

    def __init__(self) -> None:
        self._reference: Facts | None = None
        self._seen = 0

    def check(self, facts: Facts) -> Comparison:
        self._seen += 1
        found = compare(self._reference or facts, facts)
        if self._reference is None or (_checkable(facts) and not _checkable(self._reference)):
            self._reference = facts
        return found

    def unchecked(self) -> list[str]:
        """A sentence where several targets ran, and no two trees could be compared for their own parts."""
        if self._seen < 2 or self._reference is None or not _own_parts(self._reference):
            return []
        return ["no digest was compared: every target has an image, kernel or binary of its own, or is unknown"]


def _own_parts(facts: Facts) -> list[str]:
    return [part for part in OWN_PARTS if part in facts.spec.options]


def _checkable(facts: Facts) -> bool:
    return facts.endpoint.identity is not None and not _own_parts(facts)


def compare(reference: Facts, other: Facts) -> Comparison:
    """What differs between two targets. A url target without our identity is compared by its answers alone."""
    found = Comparison()
    one, two = reference.endpoint, other.endpoint
    if one.identity is None or two.identity is None:
        unknown = one if one.identity is None else two
        found.caveats.append(f"{unknown.label}: an unknown server (no identity route); only its answers were compared")
    else:
        _compare_identity(reference, other, found)
    mine = [f"{key}={value}" for key, value in other.spec.options.items() if key in SERVER_OPTIONS]
    if mine:
        found.caveats.append(f"{two.label}: its server was told {', '.join(mine)}; that difference is meant")
    for model in reference.outputs.keys() & other.outputs.keys():
        _compare_answers(model, reference, other, found)
    return found


def _compare_identity(reference: Facts, other: Facts, found: Comparison) -> None:
    one, two = reference.endpoint, other.endpoint
    assert one.identity is not None and two.identity is not None
    if own := [f"{part} of its own" for part in _own_parts(other)]:
        found.caveats.append(f"{two.label}: {', '.join(own)}; the digest check does not apply to it")
    elif _own_parts(reference):
        pass  # which was said of the reference
    elif other.spec.kind == "url" and not one.identity.get("tree_sha256") and not two.identity.get("tree_sha256"):
        found.caveats.append(f"{two.label}: a server outside of any tree; what it runs is not known to be the same")
    elif one.identity.get("tree_sha256") != two.identity.get("tree_sha256") or not one.identity.get("tree_sha256"):
        found.differences.append(_differs("tree sha256", "tree_sha256", one, two))
    if one.identity.get("blas_kernel") != two.identity.get("blas_kernel"):
        text = _differs("BLAS kernel", "blas_kernel", one, two)
        if two.emulated:
            found.caveats.append(f"{text}: emulation offers another CPU")
        else:
            found.differences.append(text)
    if one.identity.get("blas_threads") != two.identity.get("blas_threads"):
        found.differences.append(_differs("BLAS threads", "blas_threads", one, two))


def _differs(what: str, key: str, one: Endpoint, two: Endpoint) -> str:
    assert one.identity is not None and two.identity is not None
    return f"{what}: {one.label} has {one.identity.get(key)}, {two.label} has {two.identity.get(key)}"


def _compare_answers(model: str, reference: Facts, other: Facts, found: Comparison) -> None:
    one, two = reference.endpoint.label, other.endpoint.label
    for name, expected in reference.outputs[model].items():
        got = other.outputs[model].get(name)
        if got is None or got.shape != expected.shape:
            found.differences.append(f"{model}: {one} gives {name} of shape {expected.shape}, {two} does not")
        elif "f" in (kinds := expected.dtype.kind + got.dtype.kind) and "U" not in kinds:
            worst = float(np.abs(expected - got).max(initial=0.0))
            if not worst <= PROBABILITY_TOLERANCE:
                found.differences.append(f"{model}: {name} of {one} and {two} differ by up to {worst:.2g}")
        elif not np.array_equal(expected, got):
            count = int((expected != got).sum())
            found.differences.append(f"{model}: {count} of {got.size} values of {name} differ between {one} and {two}")
