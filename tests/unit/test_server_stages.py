"""Parts of a call that a model tells of are in /metrics, and no part is longer than the whole."""

from pathlib import Path

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.serving import DATA, Running, serving


def seconds(server: Running) -> dict[tuple[str, ...], float]:
    text = server.call("GET", "/metrics").body.decode()
    return {
        (sample.name, sample.labels.get("model", ""), sample.labels.get("stage", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_knn_tells_what_scores_and_decisions_took(tmp_path: Path) -> None:
    rows = np.load(DATA / "knn.npz")["rows"]
    with serving(tmp_path, "--model", "knn", "--model", "null") as server:
        for size in (1, 40):
            before = seconds(server)
            assert server.infer("knn", rows[:size]).status == server.infer("null", rows[:size]).status == 200
            after = seconds(server)

            def grown(
                name: str,
                stage: str,
                now: dict[tuple[str, ...], float] = after,
                then: dict[tuple[str, ...], float] = before,
            ) -> float:
                return now[name, "knn", stage] - then.get((name, "knn", stage), 0.0)

            parts = [grown("isolatency_model_stage_seconds_total", stage) for stage in ("score", "decide")]
            assert min(parts) > 0
            assert sum(parts) <= grown("isolatency_stage_seconds_sum", "compute") + 1e-9
        assert not any(name == "isolatency_model_stage_seconds_total" and model == "null" for name, model, _ in after)
