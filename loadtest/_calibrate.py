"""What is found out once before a run, so that all targets are told the same."""

import tempfile
from dataclasses import replace
from pathlib import Path

from hostsetup.kinds import make
from hostsetup.target import Context, Spec
from images.errors import TargetError
from loadtest._client import call, session

TIMEOUT_S = 30.0


def work_iterations(baseline: Spec, context: Context, us: float) -> int:
    """How many iterations of the model `work` take `us` microseconds in the tree as a process, on the cores and in the
    memory of the baseline. Its server counts them as it starts. Raises what a target raises that does not start."""
    spec = Spec("work-count", "process", baseline.cpus, baseline.mem_mib)
    with tempfile.TemporaryDirectory(prefix="isolatency-") as logs:
        args = ("--model", "work", f"--work-us={us}")
        with make(spec, replace(context, server_args=args, logs=Path(logs))) as endpoint:
            config = call(session(), endpoint, "GET", "/v2/models/work/config", timeout_s=TIMEOUT_S)
    try:
        return int(config["parameters"]["iterations"]["string_value"])
    except (KeyError, TypeError, ValueError) as error:
        raise TargetError(f"the model work does not say its iterations; found {config!r}"[:300]) from error
