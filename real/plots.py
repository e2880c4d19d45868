"""Draw how far simulated runs are from measured ones; what all pictures share."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from moesim.colours import look_of
from moesim.errors import InputError

SUFFIXES = (".png", ".svg", ".pdf")
DPI = 110
BAND = 0.1
"""The errors inside the band of the picture."""


def check_picture(path: Path) -> None:
    """Raise InputError for a file name that is no picture's, or without matplotlib."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: a picture's name ends in {', '.join(SUFFIXES)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError(
            "plots need matplotlib: pip install 'moesim[plots]'; --json has the numbers"
        ) from None


def draw_validation(result: Mapping[str, Any], path: Path) -> None:
    """Draw measured against simulated TPOT of each policy, or makespan where nothing is decoded.

    Bars reach from the fastest to the slowest repeat, the band from 10 % below to 10 % above.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    key = result["ranked_by"]
    unit, name = (1e6, "makespan") if key == "makespan_ns" else (1.0, "time per token")
    figure = Figure(figsize=(6.6, 5.6), layout="constrained")
    axes = figure.subplots()
    rows = sorted(result["policies"], key=lambda row: row[key]["simulated"])
    every = [
        value / unit for row in rows for value in (*row[key]["repeats"], row[key]["simulated"])
    ]
    line = np.array([min(every) / 1.25, max(every) * 1.25])
    axes.fill_between(
        line, line * (1 - BAND), line * (1 + BAND), color="0.88", label=f"within {BAND:.0%}"
    )
    axes.plot(line, line, "-", color="0.5", linewidth=1, label="simulated = measured")
    for row in rows:
        own, look = row[key], look_of(row["policy"])
        middle, repeats = own["measured"] / unit, np.array(own["repeats"]) / unit
        axes.errorbar(
            middle, own["simulated"] / unit,
            xerr=[[middle - repeats.min()], [repeats.max() - middle]],
            fmt=look.marker, capsize=3, color=look.colour,
            label=f"{row['policy']}  {own['simulated'] / own['measured'] - 1:+.1%}",
        )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlim=line, ylim=line, aspect="equal",
        xlabel=f"measured {name} in ms", ylabel=f"simulated {name} in ms",
    )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small", loc="upper left")
    axes.set_title(
        f"{result['device']} device, {result['model']}, {result['repeats']} repeats",
        fontsize="medium",
    )
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a picture, which appears whole or not."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(unfinished, format=path.suffix[1:].lower(), dpi=DPI)
        unfinished.replace(path)
    finally:
        with suppress(OSError):
            unfinished.unlink()
