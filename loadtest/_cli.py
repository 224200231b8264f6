"""The commands: each parses, calls one function, prints what came back. No logic."""

import errno
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from images import shell
from images.errors import IsolatencyError

EXIT_CODES = """\b
Exit codes: 0 done, 1 failed, 2 usage or plan, 3 a gate is exceeded,
4 not comparable or parity broken, 5 can't tell, 130 interrupted."""
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
errors = Console(stderr=True, highlight=False, soft_wrap=True)


@click.group(context_settings=CONTEXT, epilog=EXIT_CODES)
@click.version_option(package_name="isolatency")
def cli() -> None:
    """What does isolation cost a served model? One server, as a process, in a container, in a microVM."""


def _dry_run(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--dry-run", is_flag=True, callback=lambda _c, _p, on: shell.set_dry_run(on), expose_value=False,
        help="Print what would be done, and do nothing.",
    )(function)  # fmt: skip


target_option = click.option(
    "--target", "targets", multiple=True, metavar="[NAME=]KIND[:option=value,…]",
    help="A target; may be repeated, the first is the baseline. Default: every kind that this machine can run.",
)  # fmt: skip


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--try", "attempt", is_flag=True, help="Try, with a boot bounded at 10 s, whether KVM boots a guest.")
def doctor(as_json: bool, attempt: bool) -> None:
    """Check this machine: what each kind of target needs, what was found, what mends it."""
    from hostsetup import doctor as checks

    found = checks.examine(attempt=attempt)
    print(found.json() if as_json else found.text())
    sys.exit(0 if found.able else 1)


@cli.command()
@click.option("--yes", is_flag=True, help="Install without asking.")
@_dry_run
def setup(yes: bool) -> None:
    """Show the Debian packages that are missing, ask, and install them; then fetch Firecracker."""
    from hostsetup import setup as packages

    packages.setup(yes=yes, ask=_ask, say=print)


def _ask(question: str) -> bool | None:
    """None where there is no terminal to ask at."""
    return click.confirm(question, default=False) if sys.stdin.isatty() else None


@cli.group()
def images() -> None:
    """The one tree, as image tar, ext4, kernels and initramfs."""


@images.command()
@click.option("--locked", is_flag=True, help="Refuse a Debian package that differs from the current images' lock.")
@click.option("--refresh", is_flag=True, help="Take Debian's packages anew instead of those in the cache.")
@click.option("--model", metavar="FILE.py:CLASS", help="Make the tree with this model, too, which is fetched here.")
def build(locked: bool, refresh: bool, model: str | None) -> None:
    """Build what is not yet built; the last line on stdout is the tree's sha256."""
    from images import build as building
    from images import own

    wanted = own.read(model) if model else None
    made = building.build(_step, locked=locked, refresh=refresh)
    print((own.derive(made, wanted, _step) if wanted else made).tree_sha256)


@images.command("save")
@click.argument("file", type=click.Path(path_type=Path))
def save_images(file: Path) -> None:
    """Write all of the current images to FILE."""
    from images import bundle

    bundle.save(file, _step)
    print(file)


@images.command("load")
@click.argument("file", type=click.Path(path_type=Path))
def load_images(file: Path) -> None:
    """Take images from FILE, made by `images save` here or on another machine."""
    from images import bundle

    print(bundle.load(file, _step).tree_sha256)


@cli.command()
@click.argument("targets", nargs=-1, required=True, metavar="TARGET…")
@click.option("--model", "models", multiple=True, help="A model to serve; may be repeated. Default: all.")
@click.option("--internet", is_flag=True, help="Let guests reach the outside through this machine (NAT).")
@_dry_run
def up(targets: Sequence[str], models: Sequence[str], internet: bool) -> None:
    """Start targets and keep them running; each URL on a line of its own once it answers."""
    from loadtest import _keep

    for url in _keep.up(targets, models, internet, _step):
        print(url, flush=True)


@cli.command()
def ps() -> None:
    """List the targets that are kept running."""
    from loadtest import _keep

    _keep.table(Console())


@cli.command()
@click.argument("names", nargs=-1, metavar="[NAME…]")
def down(names: Sequence[str]) -> None:
    """Stop kept targets: those named, or all."""
    from hostsetup import supervisor

    for name in supervisor.stop(names):
        print(f"stopped {name}")


def _share(text: str | None) -> float | None:
    try:
        return None if text is None else float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise click.BadParameter(f"{text!r}; wanted a share such as 2%") from None


def _one_process(function: Callable[..., Any]) -> Callable[..., Any]:
    """Locust's options for several processes, refused in words that help."""

    def refuse(_context: Any, option: Any, given: Any) -> None:
        if given:
            raise click.UsageError(
                f"a comparison is driven by one Locust process; {option.opts[0]} is for `locust -f loadtest/` "
                "on one target"
            )

    for name in ("--processes", "--master", "--worker"):
        is_flag = name != "--processes"
        function = click.option(name, is_flag=is_flag, hidden=True, expose_value=False, callback=refuse)(function)
    return function


fail_if_option = click.option(
    "--fail-if", "gates", multiple=True, metavar="TARGET:MODEL:LOAD:METRIC>+X%",
    help="Exit 3 where the interval lies wholly beyond, 5 where that cannot be told; may be repeated.",
)  # fmt: skip
margin_option = click.option(
    "--margin", metavar="2%,5%", help="The difference that matters, at p50 and at p99; default: the plan's."
)


@cli.command()
@click.argument("plan", required=False, type=click.Path(path_type=Path), metavar="[PLAN.toml]")
@click.option("--quick", is_flag=True, help="The short plan, under 3 minutes with five targets.")
@target_option
@click.option("--only", type=click.Choice(["batch", "load"]), help="Leave the other half out.")
@click.option(
    "--out", type=click.Path(path_type=Path), default="results", show_default=True, help="Parent of run folders."
)
@click.option("--allow-difference", is_flag=True, help="Measure unequal targets all the same; every table is marked.")
@click.option(
    "--model",
    "models",
    multiple=True,
    help="A model to serve and to load: knn, knn:data=digits, knn:data=mnist, dnn, null, spin, work, or "
    "MY_FILE.py:CLASS, which goes into every target's tree; may be repeated.",
)
@click.option(
    "--data", metavar="ROWS.npz", help="For MY_FILE.py:CLASS: `rows` (n, d), and `labels` where answers are known."
)
@click.option("--spin-us", type=float, help="The model spin: µs by the clock of a call; a target may have its own.")
@click.option("--spin-tail-us", type=float, help="The model spin: µs of a long call.")
@click.option("--spin-tail-p", type=float, help="The model spin: share of long calls.")
@click.option("--work-us", type=float, help="The model work: as many iterations as take so long on the first target.")
@click.option(
    "--bound",
    metavar="p99<=5ms",
    help="Also search, for each target, the highest rate of Poisson arrivals that holds it.",
)
@click.option("--keep-awake", is_flag=True, help="Idle processors poll, so that no request waits for one to wake up.")
@click.option("--encoding", type=click.Choice(["binary", "json"]), help="Of the tensors sent; default: binary.")
@click.option("--seed", type=int, help="Seed of every order and choice in the run.")
@click.option("--seconds", type=float, help="Seconds of load per target, model, load and start.")
@click.option("--restarts", type=int, help="Start every target so often: then intervals hold what starts differ by.")
@click.option(
    "--until-ci", metavar="2%", callback=lambda _c, _p, text: _share(text),
    help="More starts, 10 to 50, until the intervals of p50 in the primary cells are no wider than ± this.",
)  # fmt: skip
@click.option("--resume", type=click.Path(path_type=Path), metavar="DIR", help="Go on with this interrupted run.")
@margin_option
@fail_if_option
@_one_process
@_dry_run
def run(
    plan: Path | None, quick: bool, targets: Sequence[str], out: Path, gates: Sequence[str], resume: Path | None,
    **flags: Any,
) -> None:  # fmt: skip
    """Run a plan: start targets, compare them, load them in turn, run the batch jobs, report."""
    from loadtest import _compare, _gate, _keep, _plan, _report, _run

    wanted = [_gate.parse(text) for text in gates]
    command = ["isolatency", *sys.argv[1:]]
    if plan is not None and quick:
        raise click.UsageError("--quick is a plan of its own; give it or PLAN.toml")
    if resume is not None and (plan or quick or targets or any(flags.values())):
        raise click.UsageError("--resume goes on with the plan that is in DIR; give no other plan, target or setting")
    with _Display() as display:
        show = _run.Show(_say, display.step, display.progress)
        if resume is not None:
            path, code = _run.resume(resume.resolve(), command=command, show=show)
        else:
            chosen = _keep.choose(_plan.read(plan, quick=quick), targets, flags, _step)
            path, code = _run.run(chosen, out, command=command, show=show)
    if path is not None:
        if (path / "summary.json").exists():
            summary = _report.summarise(path)
            _report.terminal(summary, Console())
            told = _tell(_compare.of_run(wanted, summary))
            code = code or told
        _say(f"run folder: {path}")
    sys.exit(code)


class _Display:
    """Progress on stderr: a bar on a terminal, below the lines that stay; a line per step elsewhere."""

    def __enter__(self) -> "_Display":
        self._bar: Progress | None = None
        if errors.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=errors, transient=True)
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        return self

    def step(self, text: str) -> None:
        if self._bar is None:
            _step(text)
        else:
            self._bar.update(self._task, description=escape(text), total=None, completed=0)

    def progress(self, done_s: float, total_s: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done_s, total=total_s)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _say(text: str) -> None:
    errors.print(escape(text))


def _step(text: str) -> None:
    errors.print(escape(text), style="dim")


@cli.command()
@click.argument("run_folder", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--baseline", metavar="NAME", help="Compare against this target instead of the first.")
@margin_option
@fail_if_option
@click.option(
    "--format", "form", type=click.Choice(["html", "md", "json", "csv"]), help="Print this in place of the tables."
)
def report(run_folder: Path, baseline: str | None, margin: str | None, gates: Sequence[str], form: str | None) -> None:
    """Make report.html, report.md, summary.json and the tables again from a run folder alone."""
    from loadtest import _compare, _gate, _report

    wanted = [_gate.parse(text) for text in gates]
    summary = _report.write(run_folder, baseline, margin)
    if form:
        print(_report.formatted(summary, form), end="")
    else:
        _report.terminal(summary, Console())
    sys.exit(_tell(_compare.of_run(wanted, summary)))


@cli.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="NEW…")
@click.option("--baseline", metavar="NAME", help="The target that both runs' ratios are over; default: their first.")
@margin_option
@click.option("--strict", is_flag=True, help="Refuse runs of another tree or on another processor.")
@fail_if_option
def compare(
    old: Path, new: Sequence[Path], baseline: str | None, margin: str | None, strict: bool, gates: Sequence[str]
) -> None:
    """Compare runs, each through its ratio to its own baseline: machines and days differ."""
    from loadtest import _compare, _gate, _report

    wanted = [_gate.parse(text) for text in gates]
    found = [_compare.compare(old, one, baseline=baseline, margin=margin, strict=strict) for one in new]
    for one in found:
        _report.table(_compare.grid(one), Console())
    sys.exit(_tell([outcome for one in found for outcome in _compare.gates(wanted, one)]))


def _tell(outcomes: Sequence[Any]) -> int:
    from loadtest import _gate

    for outcome in outcomes:
        errors.print(escape(outcome.line))
    return _gate.worst(outcomes)


@cli.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, metavar="-- CMD…", type=click.UNPROCESSED)
def sandbox(command: Sequence[str]) -> None:
    """Run CMD in a private network namespace with a Docker engine of its own; all of it ends with CMD."""
    from hostsetup import sandbox as private

    sys.exit(private.run(list(command)))


@cli.command()
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="End live runs, kept targets and sandboxes too; remove our images from Docker.",
)
@_dry_run
def clean(everything: bool) -> None:
    """Remove whatever a killed run left behind, by the ledger, and say what."""
    from hostsetup import ledger, sandbox
    from images import build as building

    removed, left = ledger.clean(everything)
    removed += building.sweep()
    if everything and not sandbox.inside():
        from hostsetup import container

        removed += container.forget_images()
    for line in removed:
        print(f"removed {line}")
    for line in left:
        print(f"left alone: {line}")
    if not removed:
        print("nothing to remove")


def main() -> NoReturn:
    """The entry point: every error becomes one line on stderr and the exit code of EXIT_CODES."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.Abort:
        code = 130
    except click.ClickException as error:
        error.show()
        code = 2
    except IsolatencyError as error:
        _complain(str(error), error.detail)
        code = error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted")
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        where = f" at {error.filename}" if error.filename else ""
        hint = "; free some space, or choose another --out or ISOLATENCY_CACHE" if error.errno == errno.ENOSPC else ""
        _complain(f"{shlex.join(sys.argv[1:2])}: {error.strerror or error}{where}{hint}")
        code = 1
    else:
        code = 0
    sys.exit(code)


def _complain(message: str, detail: str = "") -> None:
    if detail:
        errors.print(escape(detail), style="dim")
    errors.print(f"[bold red]isolatency:[/] {escape(message)}")
