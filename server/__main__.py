"""python -m server --model knn --model dnn --model null [--host H --port P]: the inference server."""

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from server import catalogue
from server.limits import Limits, as_the_system_allows, flags

SWITCH_S = 0.0005  # how long a model's thread may keep the event loop from the interpreter; Python's default is 5 ms


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m server", description="Serve models by the Open Inference Protocol v2."
    )
    add = parser.add_argument
    catalogue.add_arguments(add)
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=_whole(0, 65535), default=8080, help="port, 0 for any free one (default: %(default)s)")
    add("--threads", type=_whole(1, 1024), default=1, help="BLAS threads (default: %(default)s)")
    add("--jobs", action="store_true", help="offer the batch jobs, at /jobs")
    add("--tree-label", type=Path, metavar="FILE", help="report the tree's digest in FILE instead of computing it")
    add("--timing", action=argparse.BooleanOptionalAction, default=True, help="send the header Server-Timing")
    add("--log-format", choices=("text", "json"), default="text", help="of the lines on standard error")
    add("--access-log", action="store_true", help="a line for every request, too")
    limits = parser.add_argument_group("limits")
    for name, (kind, default, least, text) in flags().items():
        convert = _whole(int(least), 2**31) if kind is int else _number(least)
        flag = f"--{name.replace('_', '-')}"
        limits.add_argument(flag, type=convert, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    return parser.parse_args()


@contextlib.contextmanager
def _no_certificates() -> Iterator[None]:
    """aiohttp's client reads the system's certificates when it is imported, which takes a fifth of the start; there is
    no client here. OpenSSL is shown an empty file for so long."""
    name, before = "SSL_CERT_FILE", os.environ.get("SSL_CERT_FILE")
    os.environ[name] = os.devnull
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _whole(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"wanted a whole number from {least} to {most}; found {text!r}")
        return int(text)

    return parse


def _number(least: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least <= value < math.inf):
            raise argparse.ArgumentTypeError(f"wanted a number of {least:g} or more; found {text!r}")
        return value

    return parse


def main() -> int:
    chosen = arguments()
    os.environ["OPENBLAS_NUM_THREADS"] = str(chosen.threads)  # OpenBLAS reads it once, when NumPy is imported
    import uvloop

    with _no_certificates():
        from server import app, identity, life
    from server.jobs import Jobs
    from server.log import access, in_lines, log

    in_lines(chosen.log_format)
    limits = as_the_system_allows(Limits(**{name: getattr(chosen, name) for name in flags()}))
    if limits.max_connections < chosen.max_connections:
        log(f"at most {limits.max_connections} connections: no more open files are allowed (ulimit -n)", "warning")
    try:
        label = identity.read_label(chosen.tree_label) if chosen.tree_label else None
        models = catalogue.load(chosen.model, chosen)
    except (OSError, ValueError) as error:
        log(f"could not start: {error}", "error")
        return 1
    sys.setswitchinterval(SWITCH_S)
    service = app.Service(models, limits, label=label, jobs=Jobs() if chosen.jobs else None, timing=chosen.timing)
    service.warm_up()
    try:
        uvloop.run(life.serve(service, chosen.host, chosen.port, access() if chosen.access_log else None))
    except OSError as error:
        log(f"could not serve on {chosen.host}:{chosen.port}: {error}", "error")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
