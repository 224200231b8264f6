"""Pictures of a Summary as inline SVG: colours are CSS variables, so that the page's light and dark are theirs too.

Every line has its own colour (after Okabe and Ito, told apart by the colour-blind), marker and dash.
"""

import hashlib
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from loadtest._schema import Batch, Cell, Peak, Stages

# Stand-ins that are replaced by the page's variables in the SVG.
INK, RULE, BAND = "#0a0b0c", "#0d0e0f", "#1a1b1c"
LINES = ("#a10001", "#a10002", "#a10003", "#a10004", "#a10005", "#a10006", "#a10007", "#a10008")
PARTS = ("#b20001", "#b20002", "#b20003", "#b20004", "#b20005", "#b20006", "#b20007")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1)), "-", "--", ":")
VARIABLES = {INK: "--ink", RULE: "--rule", BAND: "--band"}
VARIABLES |= {color: f"--c{number}" for number, color in enumerate(LINES)}
VARIABLES |= {color: f"--p{number}" for number, color in enumerate(PARTS)}
STACK = (
    ("client, before", ("client_queue",), ""), ("read, parse", ("read", "parse"), ""),
    ("queue, batch", ("queue", "batch"), ""), ("compute", ("compute",), ""),
    ("serialise, rest", ("serialise", "server_rest"), ""), ("residual", ("residual",), "//"),
    ("client, after", ("client_receive",), ""),
)  # fmt: skip
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "isolatency", "font.size": 9, "axes.titlesize": 9.5,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "text.color": INK, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": RULE, "axes.linewidth": 0.8, "grid.color": RULE,
    "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "figure.facecolor": "none", "axes.facecolor": "none", "legend.frameon": False,
    "legend.fontsize": 8.5, "hatch.linewidth": 0.7, "hatch.color": INK, "lines.linewidth": 1.6,
    "lines.markersize": 4.5, "xtick.major.size": 3, "ytick.major.size": 0,
}  # fmt: skip
WIDTH = 4.2  # inches: 302 pt, so that text is readable where the page is 400 px wide
Labels = Sequence[str]  # all targets of the page, in order: a target keeps its colour in every picture


def latency(cells: Sequence[Cell], labels: Labels) -> str:
    """Latency by quantile, of one model and load: the quantile on an axis of nines, the latency on a log axis."""
    figure, axes = _figure(2.9)
    for cell in cells:
        points = [(q, us) for q, us in cell.curve if us is not None and q >= 0.1]
        x = [-np.log10(1 - q) for q, _ in points]
        axes.plot(x, [us for _, us in points], **_look(cell.label, labels), markevery=_nines(points))
    most = max((q for cell in cells for q, _ in cell.curve), default=0.9)
    ticks = [q for q in (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999) if q <= most]
    axes.xaxis.set_major_locator(FixedLocator([-np.log10(1 - q) for q in ticks]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * (1 - 10**-x):.5g} %"))
    _log(axes.yaxis)
    axes.set(title=f"{cells[0].model}, {cells[0].load}", xlabel="share of requests", ylabel="latency, µs")
    _legend(axes)
    return _svg(figure, f"Latency by quantile, {cells[0].model}, {cells[0].load}")


def _nines(points: Sequence[tuple[float, float]]) -> list[int]:
    return [number for number, (q, _) in enumerate(points) if round(q, 5) in (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)]


def forest(cells: Sequence[Cell], labels: Labels, base: str, margin: float) -> str:
    """Ratios of one model with their intervals, as differences in per cent; the band is the margin at p50."""
    rows = [cell for cell in cells if cell.ratio is not None]
    figure, axes = _figure(0.9 + 0.36 * len(rows))
    axes.axvspan(-100 * margin, 100 * margin, color=BAND, lw=0)
    axes.axvline(0, color=INK, lw=0.8)
    for place, cell in enumerate(rows):
        assert cell.ratio is not None
        color = LINES[labels.index(cell.label) % len(LINES)]
        for name, up, filled in (("p50", 0.14, True), ("p99", -0.14, False)):
            ratio = getattr(cell.ratio, name)
            if ratio.estimate is not None:
                y = -place + up
                if ratio.low is not None and ratio.high is not None:
                    axes.plot([100 * (ratio.low - 1), 100 * (ratio.high - 1)], [y, y], color=color, lw=1.6)
                axes.plot(
                    100 * (ratio.estimate - 1), y, "o" if filled else "s", color=color, markersize=5,
                    markerfacecolor=color if filled else "none", label="_",
                )  # fmt: skip
    axes.plot([], [], "o", color=INK, label="p50", markersize=5)
    axes.plot([], [], "s", color=INK, label="p99", markersize=5, markerfacecolor="none")
    axes.set_yticks([-n for n in range(len(rows))], [f"{cell.label}\n{cell.load}" for cell in rows])
    axes.set_ylim(-len(rows) + 0.45, 0.55)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+g}".replace("-", "−") if x else "0"))
    axes.grid(axis="y", visible=False)
    axes.set(title=rows[0].model, xlabel=f"% longer than {base}")
    _legend(axes)
    return _svg(figure, f"Ratios of {rows[0].model} over {base}, with 95 % intervals")


def throughput(cells: Sequence[Cell], labels: Labels) -> str:
    """Latency against throughput of one model: a point per load."""
    figure, axes = _figure(2.9)
    for label in dict.fromkeys(cell.label for cell in cells):
        mine = [cell for cell in cells if cell.label == label and cell.throughput_rps]
        mine.sort(key=lambda cell: cell.throughput_rps or 0)
        look = _look(label, labels)
        for name, filled in (("p50_us", True), ("p99_us", False)):
            points = [(c.throughput_rps, us) for c in mine if (us := getattr(c, name)) is not None]
            if points:
                fill = {} if filled else {"markerfacecolor": "none", "alpha": 0.75, "label": "_"}
                axes.plot([x for x, _ in points], [y for _, y in points], **(look | fill))
    axes.set_xscale("log")
    _log(axes.xaxis)
    _log(axes.yaxis)
    axes.set(title=cells[0].model, xlabel="requests per second", ylabel="p50 (filled), p99 (open), µs")
    _legend(axes)
    return _svg(figure, f"Latency against throughput, {cells[0].model}")


def stacked(stages: Sequence[Stages]) -> str:
    """Where the time goes, of one model and load: a bar per target and quantile."""
    figure, axes = _figure(1.3 + 0.3 * len(stages))
    left = np.zeros(len(stages))
    y = -np.arange(len(stages)) * 1.0
    for (name, parts, hatch), color in zip(STACK, PARTS, strict=True):
        us = np.array([sum(part.us.estimate for part in one.parts if part.name in parts) for one in stages])
        if us.any():
            axes.barh(y, us, left=left, height=0.66, color=color, hatch=hatch, label=name, lw=0)
            left += us
    axes.set_yticks(y, [f"{one.label} {one.band}" for one in stages])
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set(title=f"{stages[0].model}, {stages[0].load}", xlabel="µs")
    axes.set_xlim(0, max(left) * 1.02)
    _legend(axes, below=True)
    return _svg(figure, f"Where the time goes: {stages[0].model}, {stages[0].load}")


def drift(cells: Sequence[Cell], labels: Labels) -> str:
    """p50 of blocks over the run, of one model and load."""
    figure, axes = _figure(2.5)
    for cell in cells:
        points = [(minutes, us) for minutes, us in cell.drift if us is not None]
        look = _look(cell.label, labels) | {"linestyle": "none", "markersize": 2.6}
        axes.plot([x for x, _ in points], [y for _, y in points], **look)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set(title=f"{cells[0].model}, {cells[0].load}", xlabel="minutes of the run", ylabel="p50 of a block, µs")
    _legend(axes)
    return _svg(figure, f"Drift: p50 of blocks over time, {cells[0].model}, {cells[0].load}")


def repeats(batch: Sequence[Batch], labels: Labels) -> str:
    """The repeats of one job, a dot each, and their mean with its interval."""
    figure, axes = _figure(0.95 + 0.36 * len(batch))
    for place, row in enumerate(batch):
        color = LINES[labels.index(row.label) % len(LINES)]
        lift = 0.22 * np.linspace(-1, 1, len(row.repeats_s)) if len(row.repeats_s) > 1 else np.zeros(1)
        axes.plot(row.repeats_s, -place + lift, "o", color=color, markersize=3.2, alpha=0.55, label="_")
        if row.ci95_s:
            axes.plot(row.ci95_s, [-place, -place], color=INK, lw=1.4)
        axes.plot(row.mean_s, -place, "D", color=INK, markersize=4.2)
    axes.set_yticks([-n for n in range(len(batch))], [row.label for row in batch])
    axes.set_ylim(-len(batch) + 0.4, 0.6)
    axes.set_xlim(0, 1.06 * max(max(row.repeats_s) for row in batch))
    axes.grid(axis="y", visible=False)
    axes.set(title=f"{batch[0].job}, {batch[0].scale}", xlabel="seconds, and their mean")
    return _svg(figure, f"Batch repeats: {batch[0].job}, {batch[0].scale}")


def peak(peaks: Sequence[Peak], labels: Labels) -> str:
    """The highest rate that holds a bound, of one model."""
    figure, axes = _figure(0.95 + 0.36 * len(peaks))
    for place, row in enumerate(peaks):
        color = LINES[labels.index(row.label) % len(LINES)]
        if row.rate_rps is not None:
            if row.rate_rps.low is not None and row.rate_rps.high is not None:
                axes.plot([row.rate_rps.low, row.rate_rps.high], [-place, -place], color=color)
            axes.plot(row.rate_rps.estimate, -place, "o", color=color)
    axes.set_yticks([-n for n in range(len(peaks))], [row.label for row in peaks])
    axes.set_ylim(-len(peaks) + 0.4, 0.6)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.set(title=f"{peaks[0].model}, {peaks[0].bound}", xlabel="requests per second")
    return _svg(figure, f"Peak: highest rate that holds {peaks[0].bound}, {peaks[0].model}")


def _figure(height: float) -> tuple[Figure, Any]:
    mpl.rcParams.update(STYLE)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _look(label: str, labels: Labels) -> dict[str, Any]:
    number = labels.index(label)
    color = LINES[number % len(LINES)]
    return {
        "label": label, "color": color, "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number % len(DASHES)],
    }  # fmt: skip


def _log(axis: Any) -> None:
    """A log axis with plain numbers at 1, 2 and 5."""
    axis._set_axes_scale("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _legend(axes: Any, *, below: bool = False) -> None:
    handles, names = axes.get_legend_handles_labels()
    if names:
        place = "outside lower center" if below else "outside upper center"
        axes.figure.legend(
            handles, names, loc=place, ncols=3 if below else min(len(names), 3), handlelength=2.2, columnspacing=1.2
        )


def _svg(figure: Figure, what: str) -> str:
    """The picture alone: no XML head, ids of its own, and the page's colours."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    # Short, and ids of its own: several pictures stand on one page, and only what is referred to needs one.
    text = re.sub(r"font-family: [^;\"]+; ?", "", text)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    prefix = hashlib.sha256(text.encode()).hexdigest()[:6]
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", text)
    text = re.sub(r">\s+<", "><", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    # The width is the page's; role and label are for those who do not see it.
    text = re.sub(r' width="[\d.]+pt"', "", re.sub(r' height="[\d.]+pt"', "", text, count=1), count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{what.replace("&", "and")}" ', 1)
