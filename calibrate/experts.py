"""How long one expert takes, by tokens, on the lanes `gpu` and `cpu`: from gathering its rows until
its results are where they belong.

Series are named `expert/<lane>/<hidden>x<width>/<precision>`. The last part is the bits of a
weight; `16` is bfloat16, `16-fp16` the other one. `8` and `4` are PyTorch's own kernels; `8-packed`
and so on is what `moesim real` does: weights packed in groups are restored to bfloat16 first.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from moesim.calibrate.fit import Fit, fit_floor
from moesim.calibrate.series import Bench, Point, Series, Task, tabled
from moesim.calibrate.sweeps import (
    Call,
    Size,
    copies,
    grid,
    lane_of,
    noise,
    placed,
    provenance,
    sweep,
    sweep_seconds,
)
from moesim.errors import CalibrationError
from moesim.model import ModelSpec
from moesim.profile import ExpertTable
from moesim.real.device import Device
from moesim.real.operations import expert, int4, int8
from moesim.real.stream import Stream
from moesim.real.weights import Shape, expert_whole, pack
from moesim.traces.workload import Workload, steps_of
from moesim.types import NONE, FloatArray

PRECISIONS = {
    "bf16": "16",
    "fp16": "16-fp16",
    "fp32": "32",
    "int8": "8",
    "int4": "4",
    "packed8": "8-packed",
    "packed4": "4-packed",
    "packed2": "2-packed",
}
"""Names of series by precision; below 16 bits it is that of weights, activations being bfloat16."""
TABLED = ("16", "8", "4", "2")
"""Bits of which profiles have tables."""
LANES = ("gpu", "cpu")
TOKENS = grid([1 << k for k in range(13)], [3, 12, 48, 192, 768, 3072])
QUICK_TOKENS = grid([1, 4, 16, 64, 256], [8, 128])


class Judged(NamedTuple):
    """What became of an expert's series."""

    table: ExpertTable | None
    """Of the points that were not held out; None for a precision that profiles do not know."""
    table_error: float | None
    """The largest relative error at a held-out point, read from the table; None without any."""
    fit: Fit | None
    """`max(floor, a + b n)`, for display; None for fewer than three points."""


def tasks(
    bench: Bench,
    models: Sequence[ModelSpec],
    precisions: Sequence[str] = ("bf16",),
    lanes: Sequence[str] = LANES,
) -> list[Task]:
    """Return what is to be measured for these models, each shape once, on lanes that are there.

    Raises CalibrationError for an unknown precision.
    """
    for precision in precisions:
        if precision not in PRECISIONS:
            raise CalibrationError(
                f"no precision {precision!r}; there are: {', '.join(PRECISIONS)}"
            )
    shapes = sorted({(model.hidden, model.expert_width) for model in models})
    seconds = sweep_seconds(bench, len(QUICK_TOKENS if bench.quick else TOKENS))
    return [
        Task(
            f"expert/{lane}/{hidden}x{width}/{PRECISIONS[precision]}",
            seconds,
            partial(series, lane=lane, hidden=hidden, width=width, precision=precision),
        )
        for lane in lanes
        if lane in bench.device.lanes
        for hidden, width in shapes
        for precision in dict.fromkeys(precisions)
    ]


def series(
    bench: Bench, lane: str, hidden: int, width: int, precision: str, sizes: Sequence[Size] = ()
) -> Series:
    """Return the times of one expert by tokens; `sizes` are those of the house unless given.

    Where PyTorch has no kernel for the precision, the series has no points and a fact
    `unsupported` that says what it answered.
    """
    sizes = sizes or (QUICK_TOKENS if bench.quick else TOKENS)
    points, facts = measured(bench, lane, hidden, width, precision, sizes)
    return Series(
        name=f"expert/{lane}/{hidden}x{width}/{PRECISIONS[precision]}",
        unit="tokens",
        points=points,
        facts={
            "hidden": hidden,
            "width": width,
            "precision": precision,
            "flops_per_token": 6 * hidden * width,
            **facts,
        },
    )


def measured(
    bench: Bench, lane: str, hidden: int, width: int, precision: str, sizes: Sequence[Size]
) -> tuple[tuple[Point, ...], dict[str, float | str]]:
    """Return points and facts of a series."""
    import torch

    dtype = {"fp16": torch.float16, "fp32": torch.float32}.get(precision, torch.bfloat16)
    plain = (
        noise(2 * width, hidden, dtype=dtype, scale=hidden**-0.5),
        noise(hidden, width, dtype=dtype, scale=width**-0.5),
    )
    most = max(size.at for size in sizes)
    rows = placed(bench, lane, noise(most, hidden, dtype=dtype))
    dtype_fact: dict[str, float | str] = {"dtype": str(dtype).removeprefix("torch.")}
    fused = {"int8": int8, "int4": int4}.get(precision)
    bits = int(precision.removeprefix("packed")) if precision.startswith("packed") else 0
    shape = Shape(hidden, width)

    def compute(rows: Any, weights: Any) -> Any:
        return expert_whole(rows, weights, shape, bits) if bits else expert(rows, *weights)

    try:
        weights: Any = plain if fused is None else tuple(map(fused, plain))
        if bits:
            gate, up = plain[0].chunk(2)
            weights = pack(gate, up, plain[1], bits)
        buffers = copies(bench, lane, weights)
        lane_of(bench, lane).submit(lambda: compute(rows[:1], buffers(0))).wait()
    except (AttributeError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        why = " ".join(str(error).split())[:200]
        return (), {**dtype_fact, "unsupported": f"{type(error).__name__}: {why}"}

    def prepare(tokens: int) -> Call:
        stream = stream_of(bench, lane, tokens, rows)

        def on_gpu(k: int) -> None:
            stream.put(0, 0, NONE, compute(stream.inputs(0, 0), buffers(k)))

        def on_cpu(k: int) -> None:
            stream.cpu_put(0, 0, compute(stream.cpu_inputs(0, 0), buffers(k)))

        return on_gpu if lane == "gpu" else on_cpu

    points, facts = sweep(bench, lane, sizes, prepare)
    return points, {**dtype_fact, **buffers.facts, **facts}


def stream_of(bench: Bench, lane: str, tokens: int, rows: Any) -> Stream:
    """Return the stream of a run's step in which all of so many tokens go to expert 0.

    `rows` (at least so many, hidden) lie where the lane computes.
    """
    device: Any = bench.device if lane == "gpu" else OnHost(bench.device)
    ends, prompts = np.array([0, tokens]), np.array([tokens])
    workload = Workload(rows=np.arange(tokens), starts=ends, prompts=prompts)
    stream = Stream(device, steps_of(workload), rows.shape[1], 1, 1, rows.dtype)
    stream.route(0, 0, np.zeros((tokens, 1), np.int64), None)
    target = stream.normed(0) if lane == "gpu" else stream.exchange.sent(0, tokens)
    lane_of(bench, lane).submit(lambda: target.copy_(rows[:tokens])).wait()
    return stream


class OnHost:
    """Host memory in the place of a device's, for what happens on the host only."""

    def __init__(self, device: Device) -> None:
        """Work on its lane `cpu`."""
        self.host = self.empty = partial(device.host, pinned=False)
        self.lanes = dict.fromkeys(LANES, device.lanes["cpu"])


def out_of_memory(error: Exception) -> bool:
    """Return whether that is what PyTorch reports, which has many words for it."""
    return "out of memory" in str(error) or "allocate" in str(error)


def judged(series: Series, date: str = "", versions: Mapping[str, str] | None = None) -> Judged:
    """Return an expert's table for a profile, and how far it and a fit are off at held-out points.

    A series that stopped early may have too few points for a fit; its table is as good as others.

    Raises CalibrationError for a series without points.
    """
    kept = [point for point in series.points if not point.held_out]
    if not kept:
        raise CalibrationError(f"{series.name} has no points: {series.facts.get('unsupported')}")
    at, ns = columns([(point.at, point.ns) for point in kept])
    inside = [p for p in series.points if p.held_out and at[0] <= p.at <= at[-1]]
    apart, truth = columns([(point.at, point.ns) for point in inside])
    fit = fit_floor(at, ns, (apart, truth) if len(apart) else None) if len(at) >= 3 else None
    points, table_error = tabled(series)
    bits = series.name.rpartition("/")[2].partition("-")[0]
    table = None
    if bits in TABLED:
        lane, dtype = series.name.split("/")[1], series.facts["dtype"]
        note = f"one expert on lane {lane}, weights {series.facts['precision']}, rows {dtype}"
        if "stopped" in series.facts:
            note += f"; stopped {series.facts['stopped']}"
        if table_error is not None:
            note += f"; {100 * table_error:.1f} % off at held-out points"
        table = ExpertTable(
            hidden=int(series.facts["hidden"]),
            width=int(series.facts["width"]),
            bits=int(bits),  # type: ignore[arg-type]
            points=points,
            provenance=provenance([series], note, date, versions or {}),
        )
    return Judged(table, table_error, fit)


def remarks(found: Sequence[Series]) -> list[str]:
    """Return a line for each expert that no table is made of: what it takes, or why nothing."""
    lines = []
    names = {one.name for one in found if one.points}
    for one in found:
        if not one.name.startswith("expert/"):
            continue
        if "unsupported" in one.facts:
            lines.append(f"{one.name}: no kernel for it: {one.facts['unsupported']}")
            continue
        plain = one.name.removesuffix("-fp16")
        if one.name.endswith("/32"):
            why = "profiles have no table of 32 bits"
        elif plain != one.name and plain in names:
            why = "the table of 16 bits is that of bf16"
        else:
            continue
        ends = dict.fromkeys((one.points[0], one.points[-1]))
        times = ", ".join(f"{p.ns / 1e6:.3g} ms at n = {p.at:.0f}" for p in ends)
        lines.append(f"{one.name}: {times}; {why}")
    return lines


def columns(pairs: Sequence[tuple[float, float]]) -> tuple[FloatArray, FloatArray]:
    """Return both columns as arrays."""
    both = np.array(pairs, np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]
