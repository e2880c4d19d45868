"""What a layer step costs as models, batches and traces grow, and how much memory a replay takes.

Counts are asserted. Times are printed with the exponent of a power law fitted to each axis, and
plotted in scaling.png beside this file. As a script, `test_scaling.py MACHINE TOKENS` prints the
peak memory of one replay in bytes.
"""

import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec
import numpy as np
import pytest

import moesim.policies.testing as lab
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
LABELS = (
    "experts per layer",
    "experts per token",
    "sequences",
    "MoE layers",
    "tokens per sequence",
)
DALI = "dali:predictor=oracle"  # costs nothing to prepare, and is about as good as recorded gates
SERIES = (
    ("compiled", DALI),
    ("compiled", "lru"),
    ("compiled", "static:by=expert"),
    ("simpy", DALI),
)
SIMPY_TOKENS = (64, 256, 512)
"""SimPy takes some 80 times as long, so its traces are shorter; 8 tokens on all other axes."""
STYLES = ("o-", "s-", "^-", "D--")
REPETITIONS = 3
Costs = dict[int, float]
"""Median ns of a layer step by the value on an axis."""


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


def points(axis: str, machine: str) -> list[tuple[int, Shape]]:
    """Return the values on an axis and the shapes that have them."""
    simpy = machine == "simpy"
    values = SIMPY_TOKENS if simpy and axis == "tokens" else AXES[axis]
    base = Shape(tokens=8) if simpy else Shape()
    return [(value, base._replace(**{axis: value})) for value in values]


def measure(axis: str) -> list[Costs]:
    """Return the costs of each series; one round takes all in turn, SimPy in the first alone."""
    spent_ns: list[dict[int, list[float]]] = [defaultdict(list) for _ in SERIES]
    operations: dict[tuple[str, Shape], int] = {}
    for repetition in range(REPETITIONS):
        for (machine, policy), spent in zip(SERIES, spent_ns, strict=True):
            if machine == "simpy" and repetition > 0:
                continue
            for value, shape in points(axis, machine):
                run = replay(prepared(policy, shape), machine=machine)
                assert len(run.heads) == shape.tokens
                assert operations.setdefault((policy, shape), run.operations) == run.operations > 0
                spent[value].append(run.wall_s * 1e9 / (shape.tokens * shape.layers))
    routing.cache_clear()
    return [{value: median(each) for value, each in spent.items()} for spent in spent_ns]


def exponent(costs: Costs) -> float:
    """Return b of the power law a x^b, by least squares of the logarithms."""
    return float(np.polyfit(np.log(list(costs)), np.log(list(costs.values())), 1)[0])


def test_cost_of_a_layer_step() -> None:
    for machine, policy in SERIES:
        replay(prepared(policy, Shape(tokens=1)), machine=machine)  # compiles, if need be
    results = [measure(axis) for axis in AXES]
    for label, series in zip(LABELS, results, strict=True):
        print(f"\nns per layer step, by {label}")
        for (machine, policy), costs in zip(SERIES, series, strict=True):
            row = "".join(f"{value:>8}: {ns:<9,.0f}" for value, ns in costs.items())
            print(f"{policy:22} {machine:9} exponent {exponent(costs):5.2f} {row}")
    plot(results)


def plot(results: list[list[Costs]]) -> None:
    """Draw one panel per axis, cost over value, both logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(15, 9), sharey=True, layout="constrained")
    *panels, note = panels.flat
    for panel, label, series in zip(panels, LABELS, results, strict=True):
        for (machine, policy), costs, style in zip(SERIES, series, STYLES, strict=True):
            name = f"{policy.split(':')[0]}, {machine}: {exponent(costs):.2f}"
            panel.loglog(list(costs), [ns / 1e3 for ns in costs.values()], style, label=name)
        panel.set(xlabel=label, ylabel="cost of a layer step (µs)")
        panel.set_xticks(sorted({*series[0], *series[-1]}))
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.minorticks_off()
        panel.tick_params(labelleft=True)
        panel.grid(alpha=0.3)
        panel.legend(title="policy, machine: exponent", fontsize="small")
    note.axis("off")
    base = "\n".join(f"{name} {value}" for name, value in Shape()._asdict().items())
    text = f"Where it is not varied:\n\n{base}\n\n(8 tokens on SimPy)"
    note.text(0.3, 0.3, text, fontsize="large", transform=note.transAxes)
    figure.savefig(Path(__file__).with_name("scaling.png"), dpi=80)
    pyplot.close(figure)


@pytest.mark.parametrize(("machine", "lengths"), [("simpy", (64, 512)), ("compiled", (512, 8192))])
def test_memory(machine: str, lengths: tuple[int, int]) -> None:
    peaks = []
    for tokens in lengths:
        command = [sys.executable, __file__, machine, str(tokens)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout))
    per_layer_step = (peaks[1] - peaks[0]) / (lengths[1] - lengths[0]) / Shape().layers
    print(
        f"\npeak memory, {machine}: {peaks[0] / 1e6:.0f} MB for {lengths[0]} tokens, "
        f"{peaks[1] / 1e6:.0f} MB for {lengths[1]}: {per_layer_step:,.0f} bytes per layer step"
    )
    assert min(peaks) > 0


def peak_bytes() -> int:
    """Return this process's peak memory; ru_maxrss would be its parent's, if that was larger."""
    status = Path("/proc/self/status").read_text("utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    replay(prepared(DALI, Shape(tokens=int(sys.argv[2]))), machine=sys.argv[1])
    print(peak_bytes())
