"""Gates: `docker:knn:closed-16:p99>+10%` is exceeded, kept, or open, by the whole interval and not by the estimate."""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from images.errors import UsageError
from loadtest._schema import Ratio
from loadtest._verdict import INFINITE, span

EXCEEDED, KEPT, OPEN = 3, 0, 5
METRICS = ("p50", "p99", "throughput")
_GATE = re.compile(r"([^:<>]+):([^:<>]+):([^:<>]+):([a-z0-9]+)([<>])([+-]?\d+(?:\.\d+)?)%")


class Gate(NamedTuple):
    """`sign` is ">" or "<"; `limit` the ratio that must not be passed: 1.1 for +10%."""

    text: str
    target: str
    model: str
    load: str
    metric: str
    sign: str
    limit: float


class Outcome(NamedTuple):
    code: int
    line: str


def parse(text: str) -> Gate:
    """Raises UsageError for anything but TARGET:MODEL:LOAD:METRIC>+X% (or <-X%)."""
    found = _GATE.fullmatch(text.replace(" ", ""))
    if not found or found[4] not in METRICS or float(found[6]) <= -100:
        raise UsageError(
            f"--fail-if is {text!r}; wanted TARGET:MODEL:LOAD:METRIC>+X%, such as docker:knn:closed-16:p99>+10%, with "
            f"one of {', '.join(METRICS)}, and < for what must not fall"
        )
    return Gate(text, found[1], found[2], found[3], found[4], found[5], 1 + float(found[6]) / 100)


def check(gates: Iterable[Gate], ratio: Callable[[Gate], Ratio | None]) -> list[Outcome]:
    """One outcome per gate; `ratio` finds the figure that a gate is about, None where there is none."""
    return [_one(gate, ratio(gate)) for gate in gates]


def worst(outcomes: Iterable[Outcome]) -> int:
    """The exit code of all: exceeded beats open, open beats kept."""
    codes = {outcome.code for outcome in outcomes}
    return EXCEEDED if EXCEEDED in codes else OPEN if OPEN in codes else KEPT


def _one(gate: Gate, ratio: Ratio | None) -> Outcome:
    if ratio is None:
        return Outcome(OPEN, f"can't tell: {gate.text}: there is no such figure")
    if ratio.blocked:
        return Outcome(OPEN, f"can't tell: {gate.text}: {ratio.blocked}")
    if ratio.infinite:
        exceeded = (ratio.infinite > 0) == (gate.sign == ">")
        shown = f"{gate.text}: it is {INFINITE[ratio.infinite]}, one of the two falls among failed requests throughout"
        return Outcome(EXCEEDED, f"exceeded: {shown}") if exceeded else Outcome(KEPT, f"kept: {shown}")
    if ratio.low is None or ratio.high is None:
        return Outcome(OPEN, f"can't tell: {gate.text}: no interval ({ratio.reason})")
    beyond, within = ratio.low > gate.limit, ratio.high < gate.limit
    if gate.sign == "<":
        beyond, within = ratio.high < gate.limit, ratio.low > gate.limit
    shown = f"{gate.text}: it is {span(ratio.low, ratio.high)}"
    if beyond:
        return Outcome(EXCEEDED, f"exceeded: {shown}")
    if within:
        return Outcome(KEPT, f"kept: {shown}")
    return Outcome(OPEN, f"can't tell: {shown}")
