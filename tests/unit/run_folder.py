"""Run folders with known truth, for the tests of what is computed from them."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from loadtest import _plan, _samples
from loadtest._batch import COLUMNS
from loadtest._samples import OK, BlockWriter, ParquetWriter, Where, table

BLOCK_NS = 1_000_000_000
LATENCY_US = 200.0
STAGES = ("read", "parse", "queue", "batch", "compute", "serialise")


def target(name: str, *, kind: str = "process", accel: str | None = None, **more: Any) -> dict[str, Any]:
    emulated = accel in ("tcg", "nested")
    return {
        "name": name, "label": f"{name} ({accel})" if emulated else name, "kind": kind, "accel": accel,
        "emulated": emulated, "cpus": 1, "mem_mib": 512, "cores": [1], "identity": {"tree_sha256": "ab" * 32, "blas_kernel": "Zen"},
        "ready_s": 0.5, "first_prediction_ms": 1.5, "host_memory_mib": 70.0, "options": {}, "caveats": [],
        "parity": {"differences": []},
    } | more  # fmt: skip


def make(
    run: Path,
    targets: Sequence[dict[str, Any]],
    *,
    factors: Mapping[str, float] | None = None,
    failures: Mapping[str, int] | None = None,
    per_block: int = 1000,
    rounds: int = 6,
    models: Sequence[str] = ("knn",),
    jobs: Sequence[tuple[str, str, int, float, float, float]] = (),
    load: bool = True,
    only: str = "",
    restarts: int = 1,
    start_sd: float = 0.0,
    seed: int = 1,
    **manifest: Any,
) -> Path:
    """A run folder: `rounds` quads per start, each with one block per target and its mirror; a target's latencies are
    `factors` times the same draws, times its own factor in each start (log-normal of `start_sd`). The first quad is
    warm-up, ten times slower. `jobs`: (target, job, repeat, seconds, host, accuracy)."""
    run.mkdir(parents=True, exist_ok=True)
    plan = _plan.Plan(
        models=tuple(models),
        loads=("closed-1",),
        allow_difference=manifest.pop("allow_difference", False),
        only=only,
        seed=seed,
    )
    _plan.save(plan, run / "plan.toml")
    facts = {
        "schema": 1, "partial": False, "caveats": [], "errors": [], "versions": {"isolatency": "0.1.0"},
        "machine": {"cpu_model": "CPU", "threads": 2, "memory_mib": 4096, "system": "Debian", "kernel": "6.1", "nested": False},
    }  # fmt: skip
    (run / "manifest.json").write_text(json.dumps(facts | manifest))
    (run / "targets.json").write_text(json.dumps(list(targets)))
    if load:
        chance = np.random.default_rng(seed)
        files = ParquetWriter(run / "samples.parquet"), BlockWriter(run / "blocks.csv")
        for restart in range(restarts):
            drawn = {one["name"]: float(np.exp(start_sd * chance.standard_normal())) for one in targets}
            of_start = {name: factor * (factors or {}).get(name, 1.0) for name, factor in drawn.items()}
            _load(*files, restart, targets, of_start, failures or {}, per_block, rounds, models, chance)
        for writer in files:
            writer.close()
    if jobs:
        with (run / "batch.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(COLUMNS)
            by_name = {one["name"]: one for one in targets}
            for name, job, repeat, seconds, host, accuracy in jobs:
                one = by_name[name]
                rows.writerow(
                    [
                        name,
                        one["label"],
                        one["emulated"],
                        job,
                        repeat,
                        0,
                        569,
                        1,
                        "569 rows",
                        seconds,
                        host,
                        accuracy,
                        "{}",
                    ]
                )
    return run


def with_stages(
    run: Path, stages: Mapping[str, Mapping[str, float]], *, residual_us: Mapping[str, float] | None = None,
    kernel_us: float = 5.0, server: Sequence[str] | None = None,
) -> Path:  # fmt: skip
    """Give the samples of `server` (all targets where None) stages in µs, by model, and stamps of the kernel; what is
    left of the latency goes to the residual, or, where `residual_us` says how much by target, into the latency."""
    samples = pd.read_parquet(run / "samples.parquet")
    given = samples["target"].isin(server if server is not None else samples["target"].unique())
    total = sum(pd.Series(0.0, index=samples.index) + samples["model"].map({m: of.get(name, 0.0) for m, of in stages.items()}).astype(float)
                for name in STAGES)  # fmt: skip
    assert not isinstance(total, int)
    for name in STAGES:
        us = samples["model"].map({m: of.get(name, 0.0) for m, of in stages.items()}).astype(float)
        samples[f"server_{name}_ns"] = (us * 1e3).round().astype("Int32").where(given)
    samples["server_total_ns"] = (total * 1e3).round().astype("Int32").where(given)
    if residual_us is not None:
        extra = samples["target"].map(dict(residual_us)).astype(float)
        samples["received_ns"] = samples["sent_ns"] + ((total + extra + kernel_us) * 1e3).round().astype("Int64")
    samples["first_byte_ns"] = samples["received_ns"] - round(kernel_us * 1e3)
    pq.write_table(pa.Table.from_pandas(samples, preserve_index=False), run / "samples.parquet")
    return run


def _load(
    samples: ParquetWriter, blocks: BlockWriter, restart: int, targets: Sequence[dict[str, Any]],
    factors: Mapping[str, float], failures: Mapping[str, int], per_block: int, quads: int, models: Sequence[str],
    chance: np.random.Generator,
) -> None:  # fmt: skip
    block = 0
    at = 1_000_000_000 + restart * len(models) * quads * 2 * len(targets) * BLOCK_NS
    for model in models:
        for quad in range(quads):
            draws = LATENCY_US * np.exp(0.2 * chance.standard_normal(per_block))
            for place, one in enumerate([*targets, *reversed(targets)]):
                warm = quad == 0
                us = draws * factors[one["name"]] * (10 if warm else 1)
                raw = _samples.blank(per_block)
                raw[:, _samples.INTENDED] = at + np.arange(per_block) * (BLOCK_NS * 9 // 10 // per_block)
                raw[:, _samples.SENT] = raw[:, _samples.INTENDED]
                raw[:, _samples.ENDED] = raw[:, _samples.SENT] + (us * 1e3).astype(np.int64)
                raw[:, _samples.STATUS] = 200
                raw[:, _samples.OUTCOME] = OK
                if not warm:
                    raw[per_block - failures.get(one["name"], 0) :, _samples.OUTCOME] = _samples.TIMEOUT
                round_ = 2 * quad + (place >= len(targets))
                where = Where(one["name"], model, "closed-1", restart=restart, round=round_, block=block, warmup=warm)
                samples.add(table(raw, where))
                blocks.add(where, at, at + BLOCK_NS, at + BLOCK_NS, per_block * 100, per_block * 20)
                at, block = at + BLOCK_NS, block + 1
