"""Does the measurement tell the truth? Runs whose answer is known, and how often it comes out.

    python -m tests.bench.truth measure OUT [--only aa] [--starts 20]    (as root: it makes sandboxes)
    python -m tests.bench.truth table OUT [--write]

`measure` makes ordinary runs of `isolatency run` on process targets, in OUT/EXPERIMENT/, until each experiment has its
starts, and goes on where it was interrupted. `table` computes the table anew from those folders alone; with --write it
goes into docs/measurement.md between its markers. A row fails only where its interval excludes what it must show.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tomli_w
from scipy import stats

from loadtest import _cells, _folder, _starts, _stats, _verdict, _warmup
from loadtest._schema import Summary
from loadtest._summary import summarise
from tests.bench.tables import show

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "measurement.md"
ISOLATENCY = Path(sys.executable).parent / "isolatency"
PER_RUN = 10  # starts of the runs that are drawn
DRAWS = 4000
MODEL = "spin"
SHORT_US = 50.0  # of a call: so short that a busy machine's block still holds the requests that its p99 needs
TAIL = {"spin_tail_p": 0.03, "spin_tail_us": 250.0}  # 3 % of long calls hold p99, and leave p50 alone

# Written to do something now and then: bursts and pauses of random length, as a neighbour on a shared machine has them.
NEIGHBOUR = """
import os, random, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
parent = os.getppid()
while os.getppid() == parent:
    end = time.monotonic() + random.expovariate(1 / 0.004)
    while time.monotonic() < end: pass
    time.sleep(random.expovariate(1 / 0.03))
"""


@dataclass(frozen=True)
class Experiment:
    """`seconds` and `block_s` per target and start; `own`: what the second target is told for itself."""

    starts: int
    seconds: float
    block_s: float
    own: str = ""
    spin_us: float = SHORT_US
    tail: bool = False
    noisy: bool = False


EXPERIMENTS = {
    "aa-quiet": Experiment(60, 2.0, 0.25),
    "aa-noisy": Experiment(60, 2.0, 0.25, noisy=True),
    "p50-plus-2": Experiment(30, 6.0, 0.2, own="spin_us={p50_plus}"),
    "p99-plus-5": Experiment(20, 3.0, 0.25, own="spin_tail_us={p99_plus}", tail=True),
    "spin-200-210": Experiment(10, 4.0, 0.25, own="spin_us=210", spin_us=200.0),
}
WARMUP_ROUNDS = 2
STALLS = {"stall-1": 1, "stall-32": 32}  # connections
STALL_S, EVERY_S, RATE, STALLING_S = 0.12, 0.9, 350, 30


def measure(out: Path, names: Sequence[str], most: int) -> None:
    """Runs of at most `most` starts each, until every experiment has its own number."""
    for name in names:
        if name in STALLS:
            stall(out, name)
            continue
        wanted = EXPERIMENTS[name]
        while (left := wanted.starts - _starts_of(out, name)) > 0:
            count = min(left, most)
            print(f"{name}: {count} of {left} starts that are left", flush=True)
            with _neighbour(wanted.noisy):
                _run(out, name, wanted, count, seed=1 + len(_runs(out / name)))


def _run(out: Path, name: str, wanted: Experiment, starts: int, seed: int) -> None:
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    warmup_s = WARMUP_ROUNDS * wanted.block_s
    plan = {
        "schema": 1, "seed": seed, "only": "load", "models": [MODEL], "loads": ["closed-1"], "restarts": starts,
        "spin_us": wanted.spin_us, "keep_awake": True,  # what waking takes is noise here: it is no part of the truth
        "seconds": wanted.seconds + warmup_s, "warmup_s": warmup_s, "block_s": wanted.block_s,
        **(TAIL if wanted.tail else {}),
    }  # fmt: skip
    own = wanted.own.format(**_sizes(out)) if "{" in wanted.own else wanted.own
    before = set(_runs(folder))
    run_pair(folder, plan, own, timeout_s=120 + 60 * starts)
    if len(set(_runs(folder)) - before) != 1:
        raise SystemExit(f"{name}: the run left no folder of its own in {folder}")


def run_pair(
    folder: Path, plan: dict[str, object], own: str, *, timeout_s: float, program: Sequence[str | Path] = (ISOLATENCY,)
) -> None:
    """An ordinary run, in a sandbox, of two processes, of which the second is told `own`."""
    (folder / "plan.toml").write_text(tomli_w.dumps(plan))
    argv = [
        ISOLATENCY, "sandbox", "--", *program, "run", folder / "plan.toml", "--target", "a=process",
        "--target", f"b=process:{own}" if own else "b=process", "--out", folder,
    ]  # fmt: skip
    done = subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=timeout_s)
    if done.returncode:
        raise SystemExit(f"the run in {folder} ended with {done.returncode}: {done.stderr[-2000:]}")


def stall(out: Path, name: str) -> None:
    """Plain Locust, open arrivals, on the real server, which is stopped by a signal for 120 ms every 0.9 s."""
    folder = out / name
    if (folder / "st_stats.csv").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    port, users = 18090, STALLS[name]
    cores = sorted(os.sched_getaffinity(0))
    server = subprocess.Popen(
        ["taskset", "-c", str(cores[-1]), sys.executable, "-m", "server", "--model", "null", "--port", str(port)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    over = threading.Event()
    try:
        _wait(f"http://127.0.0.1:{port}/v2/health/ready")
        threading.Thread(target=_stop_and_go, args=(server.pid, over), daemon=True).start()
        argv = [
            "taskset", "-c", str(cores[0]), ISOLATENCY.with_name("locust"), "-f", ROOT / "loadtest", "--headless",
            "-u", str(users), "-r", str(users), "-t", f"{STALLING_S}s", "--host", f"http://127.0.0.1:{port}",
            "--model", "null", "--scenario", "constant", "--rate", str(RATE),
            "--samples", folder / "s.parquet", "--csv", folder / "st",
        ]  # fmt: skip
        done = subprocess.run(argv, capture_output=True, text=True, timeout=10 * STALLING_S, cwd=folder)
        if done.returncode:
            raise SystemExit(f"{name}: Locust ended with {done.returncode}: {done.stderr[-2000:]}")
    finally:
        over.set()
        os.killpg(server.pid, signal.SIGCONT)
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def _stop_and_go(group: int, over: threading.Event) -> None:
    begin = time.monotonic()
    for number in range(10 * STALLING_S):
        at = begin + number * EVERY_S
        if over.wait(max(0.0, at - time.monotonic())):
            return
        os.killpg(group, signal.SIGSTOP)
        time.sleep(max(0.0, at + STALL_S - time.monotonic()))
        os.killpg(group, signal.SIGCONT)


def _wait(url: str) -> None:
    for _ in range(300):
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"{url} did not answer within 30 s")


def _sizes(out: Path) -> dict[str, str]:
    """What makes 2 % of p50, and 5 % of p99, from what was measured without: so the truth is known before it is looked
    for. Needs a run of the quiet A/A pairs; the tail's p99 is its long calls' time and what a request takes besides."""
    p50 = pairs(out, "aa-quiet").base_us
    if math.isnan(p50):
        raise SystemExit("measure aa-quiet first: the size of the other effects comes from it")
    p99 = p50 - SHORT_US + TAIL["spin_tail_us"]
    return {"p50_plus": f"{SHORT_US + 0.02 * p50:.1f}", "p99_plus": f"{TAIL['spin_tail_us'] + 0.05 * p99:.1f}"}


@contextmanager
def _neighbour(wanted: bool) -> Iterator[None]:
    """A process that disturbs the targets' core while the run goes on."""
    if not wanted:
        yield
        return
    core = max(os.sched_getaffinity(0))
    process = subprocess.Popen([sys.executable, "-c", NEIGHBOUR, str(core)])
    try:
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _runs(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("2*/targets.json"))


def _starts_of(out: Path, name: str) -> int:
    return sum(summarise(run).restarts for run in _runs(out / name))


@dataclass(frozen=True)
class Pairs:
    """Per start of b over a: the log-ratios at p50 and p99, infinite where a start was starved and the report would give
    no figure; added µs at p50; and the typical p50 of a."""

    p50: _stats.Floats
    p99: _stats.Floats
    added_us: _stats.Floats
    base_us: float


def pairs(out: Path, *names: str) -> Pairs:
    logs: dict[str, list[float]] = {"p50": [], "p99": []}
    added: list[float] = []
    bases: list[float] = []
    for run in (run for name in names for run in _runs(out / name)):
        folder = _folder.read(run)
        cells, _ = _warmup.settle(folder, _cells.logs(folder), _verdict.Margins().p50)
        a, b = (next(log for key, log in cells.items() if key[0] == target) for target in "ab")
        for quantile, found in logs.items():
            found += _starts.differences(b, a, quantile).tolist()
        levels = _starts.levels(a, "p50")
        bases += levels.values()
        ratios = _starts.differences(b, a, "p50")
        added += [levels[restart] * math.expm1(ratios[restart]) for restart in levels]
    return Pairs(
        np.array(logs["p50"]), np.array(logs["p99"]), np.array(added), float(np.mean(bases)) if bases else math.nan
    )


def differs(values: _stats.Floats) -> bool:
    """What a run of these starts says, as the report does: the interval leaves 0 out. Without a figure it says nothing."""
    if not np.isfinite(values).all():
        return False
    found = _stats.interval(_stats.location(values))
    return not found.low <= 0 <= found.high


def seen(values: _stats.Floats) -> bool:
    return bool(np.isfinite(values).all()) and _stats.interval(_stats.location(values)).low > 0


def drawn(values: _stats.Floats, what: object, *, seed: int = 1) -> float:
    """The share of runs of PER_RUN starts, drawn without putting back, of which `what` holds."""
    chance = np.random.default_rng(seed)
    assert callable(what)
    runs = (chance.choice(values, PER_RUN, replace=False) for _ in range(DRAWS))
    return float(np.mean([what(run) for run in runs]))


def disjoint(values: _stats.Floats, what: object) -> tuple[int, int, float, float]:
    """How many of the runs of PER_RUN starts one after the other, and the binomial interval (Clopper and Pearson)."""
    assert callable(what)
    runs = [values[at : at + PER_RUN] for at in range(0, len(values) - PER_RUN + 1, PER_RUN)]
    hits = sum(bool(what(run)) for run in runs)
    ends = stats.binomtest(hits, len(runs)).proportion_ci(0.95)
    return hits, len(runs), float(ends.low), float(ends.high)


@dataclass(frozen=True)
class Row:
    experiment: str
    must: str
    found: str
    holds: bool | None
    enough: bool = True  # runs, that is: with too few a row that does not fail is open

    def text(self) -> str:
        verdict = {True: "holds", False: "**FAILS**", None: "not measured"}[self.holds]
        if self.holds and not self.enough:
            verdict = "open: too few runs to fail, or to hold"
        return f"| {self.experiment} | {self.must} | {self.found} | {verdict} |"


def table(out: Path) -> list[Row]:
    rows: list[Row] = []
    for label, names in (
        ("A/A", ("aa-quiet", "aa-noisy")),
        ("A/A, quiet", ("aa-quiet",)),
        ("A/A, noisy", ("aa-noisy",)),
    ):
        found = pairs(out, *names)
        for quantile, values in (("p50", found.p50), ("p99", found.p99)):
            if len(values) < 2 * PER_RUN:
                rows.append(Row(f"{label}, {quantile}", "5 % called different", f"{len(values)} starts only", None))
                continue
            wanted = sum(EXPERIMENTS[name].starts for name in names)
            rows += _alike(f"{label}, {quantile}", values, wanted)
    return rows + _effects(out) + stalls(out)


def _alike(label: str, values: _stats.Floats, wanted: int) -> list[Row]:
    shuffled = np.random.default_rng(7).permutation(values)  # disjoint runs mix quiet and noisy pairs
    rate = drawn(values, differs)
    hits, runs, low, high = disjoint(shuffled, differs)
    said = f"{rate:.1%} of {DRAWS:,} redrawn runs; {hits} of {runs} disjoint ones ({low:.0%} to {high:.0%})"
    label, enough = f"{label}: {len(values)} of {wanted} pairs", len(values) >= wanted
    covered = f"{1 - rate:.1%}; {runs - hits} of {runs} ({1 - high:.0%} to {1 - low:.0%})"
    known = values[np.isfinite(values)]
    at = _stats.location(known)
    z = at.mean / at.se
    sd = float(np.std(known, ddof=1))
    starved = f"; {len(values) - len(known)} starts were starved" * (len(known) < len(values))
    return [
        Row(label, "5 % called different", said, low <= 0.05 <= high, enough),
        Row(f"{label}, coverage", "95 %", covered, low <= 0.05 <= high, enough),
        Row(f"{label}, bias by order", "mean within 3 standard errors of 0",
            f"{at.mean:+.3%}, {z:+.1f} standard errors; standard deviation over starts {sd:.2%}{starved}", abs(z) <= 3, enough),
    ]  # fmt: skip


def _effects(out: Path) -> list[Row]:
    rows = []
    for name, quantile, must, label in (
        ("p50-plus-2", "p50", 0.95, "+2 % at p50 (spin), 10 starts × 12 s"),
        ("p99-plus-5", "p99", 0.90, "+5 % at p99 (spin_tail_us), 10 starts × 6 s"),
    ):
        values = getattr(pairs(out, name), quantile)
        wanted = f"seen in ≥ {must:.0%}"
        if len(values) < PER_RUN:
            rows.append(Row(label, wanted, f"{len(values)} starts only", None))
            continue
        rate = drawn(values, seen)
        hits, runs, low, high = disjoint(values, seen)
        known = values[np.isfinite(values)]
        mean, sd = float(known.mean()), float(known.std(ddof=1))
        said = (
            f"{rate:.1%} of redrawn runs of {len(values)} starts; {hits} of {runs} disjoint ones ({low:.0%} to "
            f"{high:.0%}); mean {math.expm1(mean):+.2%}, standard deviation over starts {sd:.2%}"
        )
        rows.append(Row(label, wanted, said, high >= must, rate >= must and runs > 1))
    ten = pairs(out, "spin-200-210")
    label, wanted = "spin 200 against 210 µs, 10 starts", "interval holds +10 µs, half-width ≤ 3 µs"
    if len(ten.added_us) < PER_RUN:
        return [*rows, Row(label, wanted, f"{len(ten.added_us)} starts only", None)]
    found = _stats.interval(_stats.location(ten.added_us[:PER_RUN]))
    half = (found.high - found.low) / 2
    said = f"{found.estimate:+.2f} µs ({found.low:+.2f} to {found.high:+.2f}), half-width {half:.2f} µs"
    return [*rows, Row(label, wanted, said, found.low <= 10 <= found.high and half <= 3)]


def stalls(out: Path) -> list[Row]:
    """A request that comes t after a stall's begin waits for its end, and for those before it: D - t(1 - ρ) at a load of
    ρ. A share p of all waits longer than D - p·T·(1 - ρ), T the period; an answer takes its own time besides."""
    rows = []
    for name, users in STALLS.items():
        label = f"stalls of 120 ms every 0.9 s, 350/s, {users} connection{'s' * (users > 1)}"
        must = "p99 within 6 % of theory, in the samples and in Locust's CSV"
        if not (out / name / "st_stats.csv").exists():
            rows.append(Row(label, must, "", None))
            continue
        samples = pd.read_parquet(out / name / "s.parquet")
        samples = samples[~samples["warmup"]]
        good = samples["outcome"] == "ok"
        ms = np.where(good, (samples["received_ns"] - samples["intended_ns"]).astype(float) / 1e6, math.inf)
        p50, p99 = _stats.quantiles(ms, [0.5, 0.99])
        theory = 1e3 * (STALL_S - 0.01 * EVERY_S * (1 - RATE * p50 / 1e3)) + p50
        told = pd.read_csv(out / name / "st_stats.csv")
        csv = float(told[told["Name"] == "Aggregated"]["99%"].iloc[0])
        rate = good.sum() / ((samples["intended_ns"].max() - samples["intended_ns"].min()) / 1e9)
        found = f"theory {theory:.1f} ms; samples {p99:.1f} ({p99 / theory - 1:+.1%}), CSV {csv:.1f} ({csv / theory - 1:+.1%}); {rate:.1f}/s"
        rows.append(Row(label, must, found, max(abs(p99 / theory - 1), abs(csv / theory - 1)) <= 0.06))
    return rows


def markdown(rows: Sequence[Row]) -> str:
    lines = ["| experiment | must show | found | |", "|---|---|---|---|", *(row.text() for row in rows)]
    return "\n".join(lines)


def conditions(out: Path) -> str:
    """Where and when, and how busy the machine was with other things."""
    found = [summarise(run) for name in EXPERIMENTS for run in _runs(out / name)]
    if not found:
        return "No run yet."
    days = sorted({str(one.started)[:10] for one in found})
    return f"{len(found)} runs, {' and '.join(days)}, {machine(found[0])}; {load(found)}:"


def machine(one: Summary) -> str:
    nested = ", itself a guest" * bool(one.machine.get("nested"))
    return f"{one.machine.get('cpu_model')}, {one.machine.get('threads')} CPUs{nested}"


def load(found: Iterable[Summary]) -> str:
    loads = [one.load_average["before"][0] for one in found if one.load_average["before"]]  # type: ignore[index]
    return f"load average before a run {min(loads):.1f} to {max(loads):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["measure", "table"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", action="append", choices=[*EXPERIMENTS, *STALLS])
    parser.add_argument("--starts", type=int, default=20, help="the most that one run does")
    parser.add_argument("--write", action="store_true", help="into docs/measurement.md")
    given = parser.parse_args()
    if given.command == "measure":
        measure(given.out.absolute(), given.only or [*EXPERIMENTS, *STALLS], given.starts)
        return
    out = given.out.absolute()
    text = f"{conditions(out)}\n\n{markdown(table(out))}"
    show("truth", text, given.write, DOCUMENT)


if __name__ == "__main__":
    main()
