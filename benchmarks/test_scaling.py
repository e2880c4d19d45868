"""What a layer step costs as models, batches and traces grow, and how much memory a replay takes.

Counts are asserted. Times are printed with the exponent of a power law fitted to each axis, and
plotted in scaling.png beside this file. As a script, `test_scaling.py MACHINE TOKENS` prints the
peak memory of one replay in bytes.
"""

import subprocess
import sys
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest

import moesim.testing as lab
from moesim.model import load_model
from moesim.policies.registry import choose
from moesim.profile import load_profile
from moesim.run import Prepared, prepare
from moesim.sim.replay import replay
from moesim.traces.format import Trace
from moesim.traces.workload import cut

pytestmark = pytest.mark.bench


class Shape(NamedTuple):
    """One point of the benchmark; the defaults are where all axes meet."""

    experts: int = 128
    top_k: int = 8
    batch: int = 1
    layers: int = 48
    tokens: int = 256
    """Forward passes: each sequence has a prompt of one token."""


AXES = {
    "experts": (8, 16, 32, 64, 128, 256, 512),
    "top_k": (1, 2, 4, 8, 16, 32),
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "layers": (4, 12, 24, 48, 96),
    "tokens": (256, 1024, 4096, 16384),
}
UNITS = {
    "experts": "experts per layer",
    "top_k": "experts per token (top-k)",
    "batch": "sequences in the batch",
    "layers": "MoE layers",
    "tokens": "trace length (tokens per sequence)",
}
SERIES = (
    ("compiled", "dali:predictor=oracle"),  # free to prepare, and about as good as recorded gates
    ("compiled", "lru"),
    ("compiled", "static:by=expert"),
    ("simpy", "dali:predictor=oracle"),
)
SIMPY_TOKENS = {"tokens": (64, 256, 512)}
"""SimPy takes some 80 times as long, so it has shorter traces; 8 tokens on all other axes."""
REPETITIONS = {"compiled": 3, "simpy": 1}
PICTURE = Path(__file__).with_name("scaling.png")


@cache
def routing(shape: Shape) -> Trace:
    """Return random routing: a random first expert and an odd stride, so that a token's differ."""
    assert shape.experts & (shape.experts - 1) == 0
    rng = np.random.default_rng(0)
    cells = (shape.batch * shape.tokens, shape.layers, 1)
    first = rng.integers(shape.experts, size=cells)
    stride = 2 * rng.integers(shape.experts // 2, size=cells) + 1
    ids = (first + stride * np.arange(shape.top_k)) % shape.experts
    return lab.make_trace(ids, shape.experts, prompts=(1,) * shape.batch)


def prepared(policy: str, shape: Shape) -> Prepared:
    """Return a replay on Qwen3's experts and the default preset, a quarter of them cached."""
    trace = routing(shape)
    model = msgspec.structs.replace(
        load_model("qwen3-30b-a3b"), experts=shape.experts, top_k=shape.top_k,
        hidden_layers=shape.layers, layer_ids=tuple(range(shape.layers)),
    )  # fmt: skip
    profile, _ = load_profile("rtx3090-pcie4-ddr4")
    budget_bytes = shape.layers * shape.experts // 4 * 9437184
    workload = cut(trace, shape.batch)
    return prepare(trace, workload, model, profile, choose(policy), budget_bytes=budget_bytes)


def measure(axis: str, machine: str, policy: str) -> dict[int, float]:
    """Return the median ns of a layer step by the value on an axis."""
    base, values = Shape(), AXES[axis]
    if machine == "simpy":
        base, values = Shape(tokens=8), SIMPY_TOKENS.get(axis, values)
    spent: dict[int, list[float]] = {value: [] for value in values}
    operations: dict[int, set[int]] = {value: set() for value in values}
    for _ in range(REPETITIONS[machine]):
        for value in values:
            shape = base._replace(**{axis: value})
            run = replay(prepared(policy, shape), machine=machine)
            assert len(run.heads) == shape.tokens
            spent[value].append(run.wall_s * 1e9 / (shape.tokens * shape.layers))
            operations[value].add(run.operations)
    assert all(len(counts) == 1 and min(counts) > 0 for counts in operations.values())
    return {value: median(each) for value, each in spent.items()}


def exponent(costs_ns: dict[int, float]) -> float:
    """Return b of the power law a x^b, by least squares of the logarithms."""
    return float(np.polyfit(np.log(list(costs_ns)), np.log(list(costs_ns.values())), 1)[0])


def test_cost_of_a_layer_step() -> None:
    results: dict[str, dict[str, dict[int, float]]] = {}
    for axis in AXES:
        print(f"\nns per layer step by {UNITS[axis]}")
        results[axis] = {}
        for machine, policy in SERIES:
            costs_ns = results[axis][f"{policy.split(':')[0]}, {machine}"] = measure(
                axis, machine, policy
            )
            row = "".join(f"{value:>8}: {ns:<9,.0f}" for value, ns in costs_ns.items())
            print(f"{policy:22} {machine:9} exponent {exponent(costs_ns):5.2f} {row}")
        routing.cache_clear()
    plot(results)


def plot(results: dict[str, dict[str, dict[int, float]]]) -> None:
    """Draw one panel per axis, cost over value, both logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(15, 9), sharey=True, layout="constrained")
    for (axis, series), panel in zip(results.items(), panels.flat, strict=False):
        for (name, costs_ns), marker in zip(series.items(), "os^D", strict=True):
            draw(panel, name, costs_ns, marker)
        panel.set(
            xscale="log", yscale="log", xlabel=UNITS[axis], ylabel="cost of a layer step (µs)"
        )
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.tick_params(labelleft=True)
        panel.grid(alpha=0.3)
        panel.legend(title="policy, machine: exponent", fontsize="small")
    panels.flat[-1].axis("off")
    shape = ", ".join(f"{value} {name}" for name, value in Shape()._asdict().items())
    panels.flat[-1].text(0, 0.5, f"All else equal:\n{shape}\n(8 tokens on SimPy)", fontsize="large")
    figure.savefig(PICTURE, dpi=80)
    pyplot.close(figure)


def draw(panel: Any, name: str, costs_ns: dict[int, float], marker: str) -> None:
    """Draw one line and name its exponent."""
    costs_us = [ns / 1e3 for ns in costs_ns.values()]
    style = "--" if name.endswith("simpy") else "-"
    label = f"{name}: {exponent(costs_ns):.2f}"
    panel.plot(list(costs_ns), costs_us, style, marker=marker, label=label)


@pytest.mark.parametrize(("machine", "lengths"), [("simpy", (64, 512)), ("compiled", (512, 8192))])
def test_memory(machine: str, lengths: tuple[int, int]) -> None:
    peaks = []
    for tokens in lengths:
        command = [sys.executable, __file__, machine, str(tokens)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout))
    per_token = (peaks[1] - peaks[0]) / (lengths[1] - lengths[0])
    print(
        f"\npeak memory, {machine}: {peaks[0] / 1e6:.0f} MB for {lengths[0]} tokens, "
        f"{peaks[1] / 1e6:.0f} MB for {lengths[1]}: {per_token:,.0f} bytes per token, "
        f"{per_token / Shape().layers:,.0f} per layer step"
    )
    assert min(peaks) > 0


def peak_bytes() -> int:
    """Return this process's peak memory; ru_maxrss would be its parent's, if that was larger."""
    status = Path("/proc/self/status").read_text("utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    replay(prepared(SERIES[0][1], Shape(tokens=int(sys.argv[2]))), machine=sys.argv[1])
    print(peak_bytes())
