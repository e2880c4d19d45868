"""Draw what a profile says an expert and a copy take."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from moesim.costs import Costs, build_costs, copy_ns
from moesim.model import ModelSpec
from moesim.profile import ExpertTable, HardwareProfile, Tables
from moesim.real.plots import check_picture, save
from moesim.types import BITS, D2H, H2D, FloatArray

MOST_TOKENS = 1024
COPIES = np.geomspace(4 << 10, 1 << 30, 60).astype(np.int64)
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")


def draw_profile(profile: HardwareProfile, model: ModelSpec, path: Path) -> None:
    """Draw the times of one expert of a model on GPU and CPU by tokens, and of copies by bytes.

    Points are measured; full lines are what a simulation uses, dotted ones the roofline over the
    rates of the section. Where nothing is measured the two are one. The file appears whole or not.

    Raises InputError without matplotlib, or for a file name that is no picture's.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    tables = profile.tables
    own = [
        t.points[-1][0]
        for t in (*tables.expert_gpu, *tables.expert_cpu)
        if (t.hidden, t.width) == (model.hidden, model.expert_width)
    ]
    most = max([MOST_TOKENS, *own])
    used = build_costs(model, profile, most, 1)
    roof = build_costs(model, msgspec.structs.replace(profile, tables=Tables()), most, 1)

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    gpu, cpu, link = figure.subplots(1, 3)
    origin = profile.provenance
    for axes, name, measured, source, curve, plain in (
        (gpu, "GPU", tables.expert_gpu, origin.gpu.source, used.expert_gpu_ns, roof.expert_gpu_ns),
        (cpu, "CPU", tables.expert_cpu, origin.cpu.source, used.expert_cpu_ns, roof.expert_cpu_ns),
    ):
        draw_expert(axes, model, measured, curve, plain, source)
        axes.set_title(f"One expert on the {name}")
    draw_copies(link, used, profile)
    figure.suptitle(f"{profile.name}: {model.name}, expert {model.hidden} x {model.expert_width}")
    save(figure, path)


def draw_expert(
    axes: Any,
    model: ModelSpec,
    measured: tuple[ExpertTable, ...],
    curves: Any,
    roofs: Any,
    source: str,
) -> None:
    """Draw one precision if none is measured, else those that are."""
    own = {t.bits: t for t in measured if (t.hidden, t.width) == (model.hidden, model.expert_width)}
    tokens = np.arange(1, curves.shape[1])
    for colour, bits in zip(COLOURS, sorted(own, reverse=True) or (16,), strict=False):
        precision = BITS.index(bits)
        if bits in own:
            at, ns = np.array(own[bits].points, np.float64).T
            where = own[bits].provenance.source
            axes.plot(at, ns / 1e3, "o", color=colour, label=f"{bits} bit, {where}")
            axes.plot(tokens, curves[precision, 1:] / 1e3, "-", color=colour, label="simulated")
        label = f"{'' if bits in own else f'{bits} bit, '}roofline of {source} rates"
        axes.plot(tokens, roofs[precision, 1:] / 1e3, ":", color=colour, label=label)
    finish(axes, "tokens", "µs")


def draw_copies(axes: Any, costs: Costs, profile: HardwareProfile) -> None:
    """Draw both directions, the points that were measured and what a simulation uses."""
    for colour, name, lane, channel in (
        (COLOURS[0], "to the GPU", H2D, profile.link.h2d),
        (COLOURS[1], "from the GPU", D2H, profile.link.d2h),
    ):
        ns: FloatArray = np.array([copy_ns(costs, lane, int(size)) for size in COPIES], np.float64)
        rate = f"{channel.latency_ns / 1e3:.3g} µs + {channel.bytes_per_s / 1e9:.3g} GB/s"
        if channel.points:
            at, measured = np.array(channel.points, np.float64).T
            axes.plot(at / 1e6, measured / 1e3, "o", color=colour, markersize=4)
        style = "-" if lane == H2D else "--"
        axes.plot(COPIES / 1e6, ns / 1e3, style, color=colour, label=f"{name}: {rate}")
    axes.set_title(f"One copy ({profile.provenance.link.source})")
    finish(axes, "MB", "µs")


def finish(axes: Any, x: str, y: str) -> None:
    """Label a panel with logarithmic axes."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
