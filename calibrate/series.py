"""What a calibration measures: series of points, one task each, which can be stored and resumed."""

from collections.abc import Callable
from typing import NamedTuple

import msgspec
import numpy as np

from moesim.calibrate.timing import Limits, Timed
from moesim.real.device import Device


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One operation's time; see `timing.Timed`."""

    at: float
    """Tokens, bytes, or tokens attended to: the series' unit says which."""
    ns: float
    median_ns: float
    spread: float
    repetitions: int
    settled: bool
    outliers: int
    held_out: bool = False
    """Measured to judge a fit, and never fitted."""


class Series(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The times of one kind of operation over one quantity."""

    name: str
    """As `copy/h2d/pinned` or `expert/cpu/2048x768/16`: unique within a calibration."""
    unit: str
    points: tuple[Point, ...]
    facts: dict[str, int | float | str] = {}  # int too: what is kept must read back as 1, not 1.0
    """Whatever else is to be known: shapes, threads, sizes of rotating buffers."""


class Bench(NamedTuple):
    """What measurements run on, and for how long."""

    device: Device
    limits: Limits
    quick: bool
    """Fewer points."""


class Task(NamedTuple):
    """A series to be measured."""

    name: str
    """That of the series."""
    seconds: float
    """About how long it takes."""
    run: Callable[[Bench], Series]


def point(at: float, timed: Timed, *, held_out: bool = False) -> Point:
    """Return a measurement as a point of a series."""
    return Point(at=at, held_out=held_out, **timed._asdict())


def tabled(series: Series) -> tuple[tuple[tuple[int, float], ...], float | None]:
    """Return the points of a table, and how far lines between them are off at points held out.

    That is the largest relative error, of held-out points among the others; None without any.
    """
    kept = [p for p in series.points if not p.held_out]
    at, ns = [p.at for p in kept], [p.ns for p in kept]
    errors = [
        abs(float(np.interp(p.at, at, ns)) / p.ns - 1)
        for p in series.points
        if p.held_out and kept and at[0] <= p.at <= at[-1]
    ]
    points = tuple((int(p.at), p.ns) for p in kept)
    return points, max(errors, default=None)
