"""How long a sweep takes, compiling included. Points are counted; times are printed."""

import os
import time
from pathlib import Path

import pytest

from moesim.answers.grid import grid_of
from moesim.answers.store import Store
from moesim.answers.sweep import plan_of, sweep
from moesim.real.devices import usable_cores
from moesim.traces.format import write_trace
from moesim.traces.synthetic import synthesize

pytestmark = pytest.mark.bench

POINTS = int(os.environ.get("MOESIM_BENCH_POINTS", "1000"))
"""A multiple of 100."""
MOST_S = 300
"""What 1000 points may take on two cores."""


def test_a_sweep_of_a_thousand_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays of 64 prompt + 64 generated tokens, 48 layers, as on a machine new to moesim."""
    monkeypatch.setenv("MOESIM_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "qwen3.npz"
    write_trace(synthesize("qwen3-30b", sequences=1, prompt=64, generate=65, distances=1), path)
    policies = ["dali", "fate", "fiddler", "hybrimoe", "lru"]
    grid = {
        "trace": str(path),
        "grid": {
            "policy": policies,
            "hardware": ["rtx3090-pcie4-ddr4", "rtx4090-pcie4-ddr5"],
            "hardware.link.h2d.bytes_per_s": ["x0.5", "x1"],
            "cache_ratio": [0.1, 0.2, 0.3, 0.4, 0.5],
            "seed": list(range(POINTS // 100)),
        },
    }
    began = time.perf_counter()
    swept = sweep(grid, tmp_path / "r.parquet")
    took_s = time.perf_counter() - began
    began = time.perf_counter()
    plan = plan_of(grid_of(grid), Store(tmp_path / "r.parquet.points"))
    planned_s = time.perf_counter() - began

    assert (len(swept.good), len(swept.failed)) == (POINTS, 0)
    assert (plan.done, plan.tasks) == (POINTS, [])
    machines = {row["run.machine"] for row in swept.rows()}
    assert machines == {"compiled"}
    print(
        f"\n{POINTS} points on {usable_cores()} cores in {took_s:.1f} s, compiling "
        f"{len(policies)} policies included; {1000 * took_s / POINTS:.0f} ms a point (below "
        f"{MOST_S} s for 1000); finding out that all are done {1000 * planned_s:.0f} ms"
    )
