"""Verdicts: slower, faster, no difference seen, can't tell; and how large a difference could still be."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from images.errors import UsageError
from loadtest import _stats
from loadtest._schema import Ratio, Ratios

SLOWER, FASTER, NONE, OPEN = "slower", "faster", "no difference seen", "can't tell"
NO_VERDICT = "described, not judged"
VERDICTS = (SLOWER, FASTER, NONE, OPEN)
INFINITE = {1: "∞", -1: "−100 %"}  # a difference, where one of the two falls among failed requests throughout


class Margins(NamedTuple):
    """Differences smaller than these do not matter to the reader; shares, 0.02 is 2 %."""

    p50: float = 0.02
    p99: float = 0.05


def margins(text: str) -> Margins:
    """`2%` for both, or `2%,5%` for p50 and p99. Raises UsageError."""
    try:
        parts = [float(part.strip().removesuffix("%")) / 100 for part in text.split(",")]
    except ValueError:
        parts = []
    if len(parts) not in (1, 2) or not all(0 < part < 1 for part in parts):
        raise UsageError(f"--margin is {text!r}; wanted a share such as 2%, or two, for p50 and p99: 2%,5%")
    return Margins(parts[0], parts[-1])


def judge(
    cells: Sequence[tuple[Ratios, bool]], margin: Margins, blocked: Mapping[tuple[int, str], str] | None = None,
    others: Sequence[float] = (),
) -> list[Ratios]:  # fmt: skip
    """The ratios of one target, each with whether its cell is primary, with their verdicts.

    `blocked`: by a cell's number and p50, p99 or throughput, why no verdict and no gate rests on it.
    `others`: p-values of the same target's tests against another one, with which these share the error rate.

    The primary p50 and p99 are one family of tests: a difference counts when Holm's correction leaves its p-value below
    5 % and its estimate exceeds the margin. "No difference seen" needs the 95 % interval inside the margin: two
    one-sided tests at 2.5 % each (Schuirmann, 1987).
    """
    family = [
        (number, name)
        for number, (ratios, primary) in enumerate(cells)
        for name in ("p50", "p99")
        if primary and getattr(ratios, name).estimate is not None
    ]
    tested = {place: p_value(getattr(cells[place[0]][0], place[1])) for place in family}
    known = {place: p for place, p in tested.items() if p is not None}
    adjusted = dict(zip(known, _stats.holm([*known.values(), *others]), strict=False))
    out = []
    for number, (ratios, primary) in enumerate(cells):
        changed: dict[str, Ratio] = {}
        for name in ("p50", "p99", "throughput"):
            why = (blocked or {}).get((number, name))
            ratio = getattr(ratios, name).replace(could_be=could_be(getattr(ratios, name)), blocked=why)
            if primary and name != "throughput":
                place = (number, name)
                ratio = ratio.replace(p_value=tested.get(place), p_holm=adjusted.get(place))
                ratio = _decide(ratio, getattr(margin, name), len(family) + len(others))
                if why:
                    ratio = ratio.replace(verdict=OPEN, reason=why, starts_needed=None)
            changed[name] = ratio
        out.append(msgspec.structs.replace(ratios, **changed))
    return out


def p_value(ratio: Ratio) -> float | None:
    """Of the hypothesis that there is no difference; None where there is no interval."""
    if ratio.estimate is None or ratio.log_se is None or ratio.df is None:
        return None
    return _stats.p_value(_stats.Location(math.log(ratio.estimate), ratio.log_se, ratio.df))


def _decide(ratio: Ratio, margin: float, tests: int) -> Ratio:
    ratio = ratio.replace(margin=margin)
    if ratio.infinite:
        return ratio.replace(verdict=SLOWER if ratio.infinite > 0 else FASTER)
    if ratio.estimate is None or ratio.low is None or ratio.high is None or ratio.p_holm is None:
        return ratio.replace(verdict=OPEN)
    if 1 / (1 + margin) < ratio.low and ratio.high < 1 + margin:
        return ratio.replace(verdict=NONE)
    if ratio.p_holm < 1 - _stats.LEVEL and not 1 / (1 + margin) <= ratio.estimate <= 1 + margin:
        return ratio.replace(verdict=SLOWER if ratio.estimate > 1 else FASTER)
    return ratio.replace(verdict=OPEN, starts_needed=_needed(ratio, margin, tests))


def _needed(ratio: Ratio, margin: float, tests: int) -> int | None:
    """About how many starts would tell, if the estimate stays where it is; None where starts do not say, or too many.

    Beyond the margin the interval has to leave 1 out, inside it has to fit in.
    """
    if ratio.of != "starts" or ratio.log_se is None or ratio.estimate is None:
        return None
    sd = ratio.log_se * math.sqrt(ratio.n)
    away, edge = abs(math.log(ratio.estimate)), math.log1p(margin)
    if away > edge:
        return _stats.units_needed(sd, away, tests)
    return _stats.units_needed(sd, edge - away)


def span(low: float, high: float) -> str:
    """The ends of a ratio's interval as differences: `+1.6 to +2.3 %`."""
    return f"{percent(low).removesuffix(' %')} to {percent(high)}"


def could_be(ratio: Ratio) -> str | None:
    """How large a difference the interval still allows, in words; None where there is no interval."""
    if ratio.infinite:
        return f"no more than {INFINITE[ratio.infinite]}"
    if ratio.low is None or ratio.high is None:
        return None
    if ratio.low > 1:
        return f"no more than {percent(ratio.high)}"
    if ratio.high < 1:
        return f"no more than {percent(ratio.low)}"
    return f"no more than {percent(1 + max(ratio.high - 1, 1 - ratio.low)).removeprefix('+')} either way"


def percent(ratio: float) -> str:
    """A ratio as a difference: +3.1 %; two significant digits, none below a tenth of a percent."""
    value = 100 * (ratio - 1)
    size = abs(value)
    decimals = 0 if size >= 9.95 else 1
    return f"{value:+,.{decimals}f} %".replace("-", "−").replace("+0.0 %", "0.0 %").replace("−0.0 %", "0.0 %")


def in_words(ratio: Ratio) -> str:
    """The verdict; with what would tell where it is open, and the margin where no difference was seen."""
    text = ratio.verdict or NO_VERDICT
    if ratio.verdict == NONE and ratio.margin is not None:
        return f"{text} above {100 * ratio.margin:g} %"
    if ratio.verdict != OPEN:
        return text
    if ratio.reason:
        return f"{text}: {ratio.reason}"
    if ratio.of != "starts":
        return f"{text} from so few starts"
    if ratio.starts_needed is None:
        return f"{text} with {ratio.n} starts, being too near the margin"
    return f"{text} with {ratio.n} starts, about {_rounded(max(ratio.starts_needed, ratio.n + 1))} would"


def _rounded(count: int) -> int:
    """Up to two significant digits: an estimate of an estimate."""
    step: int = 10 ** max(0, len(str(count)) - 2)
    return -(-count // step) * step


def primary(text: str) -> tuple[str, str]:
    """`knn:closed-1` as model and load. Raises UsageError."""
    model, colon, load = text.partition(":")
    if not colon or not model or not load:
        raise UsageError(f"the primary cell {text!r} is none; wanted MODEL:LOAD, such as knn:closed-1")
    return model, load
