"""Does a ratio depend on how long blocks are, or on what the idle target does meanwhile?

    python -m tests.bench.blocks [--out DIR] [--only "1 s"] [--write]       (as root: it makes sandboxes)

Ordinary runs of `isolatency run` on two process targets, one per length: knn, the same in both, and spin, which takes
SPIN_US longer in the second; in the last run a target is stopped by a signal while it is not asked. What lies in DIR
already is not measured again. With --write the table goes into docs/measurement.md.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest import _verdict
from loadtest._compare import over
from loadtest._schema import Ratio, Summary
from loadtest._summary import summarise
from tests.bench.tables import show, table
from tests.bench.truth import DOCUMENT, ISOLATENCY, load, machine, run_pair

PAUSED = Path(__file__).with_name("paused.py")
STARTS, SECONDS = 4, 4.0  # per target, model and start; blocks of 5 s make a quad of 10
SPIN_US, MORE_US = 200.0, 20.0


@dataclass(frozen=True)
class Condition:
    block_s: float
    paused: bool = False


CONDITIONS = {
    "0.2 s": Condition(0.2),
    "1 s": Condition(1.0),
    "5 s": Condition(5.0),
    "0.2 s, the idle one stopped": Condition(0.2, paused=True),
}
FIRST = next(iter(CONDITIONS))


def measure(folder: Path, wanted: Condition) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    plan = {
        "schema": 1, "only": "load", "models": ["knn", "spin"], "loads": ["closed-1"], "restarts": STARTS,
        "seconds": SECONDS, "warmup_s": 0.0, "block_s": wanted.block_s, "spin_us": SPIN_US,
    }  # fmt: skip
    program = [sys.executable, PAUSED] if wanted.paused else [ISOLATENCY]
    run_pair(folder, plan, f"spin_us={SPIN_US + MORE_US}", timeout_s=600, program=program)


def rows(found: dict[str, Summary]) -> list[Sequence[str]]:
    """By model and quantile: the ratio of each condition, what it is over that of the first, and whether they agree."""
    out = []
    for model in ("knn", "spin"):
        for quantile in ("p50", "p99"):
            first: Ratio | None = None
            for name, summary in found.items():
                cell = next(cell for cell in summary.cells if (cell.target, cell.model) == ("b", model))
                assert cell.ratio is not None
                ratio: Ratio = getattr(cell.ratio, quantile)
                first = first or ratio
                over, agrees = ("–", "") if ratio is first else against(ratio, first)
                out.append((f"{model}, {quantile}", name, shown(ratio), added(ratio), over, agrees))
    return out


def against(ratio: Ratio, first: Ratio) -> tuple[str, str]:
    """The one over the other with its 95 % interval (Welch), and whether that holds 1."""
    found = over(ratio, first)
    if found.low is None or found.high is None:
        return "–", "no interval"
    return shown(found), "agrees" if found.low <= 1 <= found.high else "**differs**"


def shown(ratio: Ratio) -> str:
    if ratio.estimate is None or ratio.low is None or ratio.high is None:
        return f"– ({ratio.reason})"
    return f"{_verdict.percent(ratio.estimate)} ({_verdict.span(ratio.low, ratio.high)})"


def added(ratio: Ratio) -> str:
    span = ratio.added_us
    if span is None or span.low is None or span.high is None:
        return "–"
    middle, low, high = (f"{round(value):+,}".replace("-", "−") for value in (span.estimate, span.low, span.high))
    return f"{middle} ({low} to {high})"


def text(found: dict[str, Summary]) -> str:
    one = next(iter(found.values()))
    head = f"{str(one.started)[:10]}, {machine(one)}; {one.restarts} starts each; {load(found.values())}:"
    columns = ("model", "blocks", "b over a", "µs", f"over that of {FIRST}", "")
    return f"{head}\n\n{table(columns, rows(found))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the run folders stay; default: nowhere")
    parser.add_argument("--only", action="append", choices=[*CONDITIONS])
    parser.add_argument("--write", action="store_true", help="into docs/measurement.md")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as nowhere:
        out = (given.out or Path(nowhere)).absolute()
        found = {}
        for name in given.only or CONDITIONS:
            folder = out / name.replace(" ", "-").replace(",", "")
            if not (folder / "latest" / "targets.json").exists():
                print(f"blocks of {name}", flush=True)
                measure(folder, CONDITIONS[name])
            found[name] = summarise(folder / "latest")
    show("blocks", text(found), given.write, DOCUMENT)


if __name__ == "__main__":
    main()
