"""python -m server --model knn --model dnn --model null [--host H --port P]: the inference server."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from server import catalogue


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
    return parser.parse_args()


def _whole(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"wanted a whole number from {least} to {most}; found {text!r}")
        return int(text)

    return parse


def main() -> int:
    chosen = arguments()
    os.environ["OPENBLAS_NUM_THREADS"] = str(chosen.threads)  # OpenBLAS reads it once, when NumPy is imported
    import uvloop

    from server import app, identity
    from server.jobs import Jobs

    app.log_in_lines()
    try:
        label = identity.read_label(chosen.tree_label) if chosen.tree_label else None
        models = catalogue.load(chosen.model, chosen)
    except (OSError, ValueError) as error:
        app.log(f"could not start: {error}")
        return 1
    service = app.Service(models, label, Jobs() if chosen.jobs else None)
    try:
        uvloop.run(app.serve(service, chosen.host, chosen.port))
    except OSError as error:
        app.log(f"could not serve on {chosen.host}:{chosen.port}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
