"""The answer in words: one sentence per target and primary cell, as a person would say it."""

from collections.abc import Sequence

from loadtest._folder import Target
from loadtest._schema import Cell, Direct, Ratio
from loadtest._verdict import OPEN, in_words, percent, span

PLACES = {
    "process": "As a process on the host",
    "docker": "In a Docker container",
    "uml": "In User-mode Linux",
    "qemu": "In a QEMU microVM",
    "firecracker": "In a Firecracker microVM",
    "url": "On the given server",
}
MODELS = {"knn": "a KNN", "dnn": "a DNN", "null": "an empty"}


def answer(
    targets: Sequence[Target], cells: Sequence[Cell], direct: Direct | None, base: str | None,
    primary: Sequence[tuple[str, str]],
) -> list[str]:  # fmt: skip
    """What the run says about its primary cells, with intervals; why nothing, where it says nothing."""
    by_name = {target.name: target for target in targets}
    found = []
    for model, load in primary:
        for cell in cells:
            if (cell.model, cell.load) == (model, load) and cell.ratio is not None and base is not None:
                where, over = _place(by_name[cell.target]), by_name[base].label
                found.append(_sentence(where, model, load, over, cell.ratio.p50, cell.ratio.p99))
        for one in direct.cells if direct else []:
            if (one.model, one.load) == (model, load) and direct and direct.over != base:
                where, over = _place(by_name[direct.target]), by_name[direct.over].label
                found.append(_sentence(where, model, load, over, one.ratio.p50, one.ratio.p99))
    native = [target for target in targets if not target.emulated]
    if not found and cells:
        found = [
            "Nothing was compared: fewer than two targets that are not emulated were measured."
            if len(native) < 2
            else "Nothing was compared: no target has requests in a primary cell beside the baseline."
        ]
    return found


def _place(target: Target) -> str:
    place = PLACES.get(target.kind, f"On {target.kind}")
    return place if target.label == target.kind else f"{place} ({target.label})"


def _sentence(where: str, model: str, load: str, over: str, p50: Ratio, p99: Ratio) -> str:
    """`In a Docker container, a KNN request at closed-1 takes 61 µs longer than process at p50 (+38 %…): slower; …`."""
    request = f"{MODELS.get(model, f'a {model}')} request at {load}"
    halves = [_half(p50, f" than {over} at p50", "takes "), _half(p99, " at p99")]
    instances = "instances" in (p50.of, p99.of)
    return f"{where}, {request} {'; '.join(halves)}.{' All of these instances only.' * instances}"


def _half(ratio: Ratio, where: str, verb: str = "") -> str:
    """`61 µs longer than process at p50 (+38 %, 95 % interval +36 to +41 %): slower`."""
    if ratio.infinite:
        falls = "falls among failed requests" if ratio.infinite > 0 else "is answered"
        return f"{falls}{where.replace(' than', ' unlike')}: {in_words(ratio)}"
    if ratio.estimate is None:
        return f"has no figure{where.replace(' than', ' over')} ({ratio.reason})"
    if ratio.low is None or ratio.high is None or ratio.added_us is None:
        return (
            f"{verb}{_more(ratio.estimate - 1, percent(ratio.estimate))}{where}, without an interval ({ratio.reason})"
        )
    added = ratio.added_us.estimate
    amount = f"{abs(added):,.0f} µs" if abs(added) >= 9.5 else f"{abs(added):.1f} µs"
    interval = f"{percent(ratio.estimate)}, 95 % interval {span(ratio.low, ratio.high)}"
    text = f"{verb}{_more(added, amount)}{where} ({interval}): {in_words(ratio)}"
    return text + (f", {ratio.could_be}" if ratio.verdict == OPEN and ratio.could_be else "")


def _more(added: float, amount: str) -> str:
    return f"{amount.lstrip('+−')} {'longer' if added >= 0 else 'less'}"
