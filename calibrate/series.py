"""What a calibration measures: series of points, one task each, which can be stored and resumed."""

from collections.abc import Callable
from typing import NamedTuple

import msgspec

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
    facts: dict[str, float | str] = {}
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
