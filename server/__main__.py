"""python -m server --model knn --model dnn --model null [--host H --port P]: the inference server."""

import argparse
import os
import sys
from pathlib import Path

MODELS = ("knn", "dnn", "null")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m server", description="Serve models by the Open Inference Protocol v2."
    )
    parser.add_argument(
        "--model", action="append", choices=MODELS, required=True, help="a model to serve; may be repeated"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="port, 0 for any free one (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="BLAS threads (default: %(default)s)")
    parser.add_argument("--jobs", action="store_true", help="offer the batch jobs, at /jobs")
    parser.add_argument("--tree-label", type=Path, help="report the tree digest in this file instead of computing it")
    return parser.parse_args()


def main() -> int:
    chosen = arguments()
    # Before NumPy is imported: OpenBLAS reads this once.
    os.environ["OPENBLAS_NUM_THREADS"] = str(chosen.threads)
    from server import app
    from server.jobs import Jobs

    try:
        import uvloop

        models = [_make(name) for name in dict.fromkeys(chosen.model)]
        for model in models:
            model.load()
        jobs = Jobs(chosen.threads) if chosen.jobs else None
        uvloop.run(app.serve(app.Service(models, chosen.tree_label, jobs), chosen.host, chosen.port))
    except (OSError, ValueError) as error:
        app.log(f"could not start: {error}")
        return 1
    return 0


def _make(name: str):  # type: ignore[no-untyped-def]
    if name == "knn":
        from server.models.knn import KNN

        return KNN()
    if name == "dnn":
        from server.models.dnn import DNN

        return DNN()
    from server.models.null import Null

    return Null()


if __name__ == "__main__":
    sys.exit(main())
