"""Fit latency models to measured times, and say how far off they are.

Times are fitted by relative error, since a copy of 4 KB matters to a model as much as one of 1 GB,
and with a loss that grows only linearly beyond a few percent (`soft_l1`), so that a stray point
bends nothing. No parameter is below zero. What was held out is never fitted.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moesim.errors import CalibrationError
from moesim.types import FloatArray, IntArray

USUAL = 0.02
"""A relative error that noise explains; larger ones count linearly."""
MISSES = 0.10
"""A fit that misses held-out points by more is not used; the table of points is."""
FAR = 0.25
"""A point that the fit misses by more is reported as an outlier."""


def worst(residuals: FloatArray, held_out: FloatArray) -> float:
    """Return the largest relative error of a held-out point; of a fitted one if there is none."""
    return float(np.abs(held_out if len(held_out) else residuals).max())


class Fit(NamedTuple):
    """A model of times, and how well it fits."""

    model: str
    """`line` or `floor`."""
    parameters: FloatArray
    residuals: FloatArray
    """(points,): (fitted - measured) / measured."""
    held_out: FloatArray
    """(held-out points,): likewise."""

    @property
    def error(self) -> float:
        """The largest relative error of a held-out point; of a fitted one if none was held out."""
        return worst(self.residuals, self.held_out)

    @property
    def misses(self) -> bool:
        """Whether it is too far off to be used."""
        return self.error > MISSES

    @property
    def outliers(self) -> IntArray:
        """Which fitted points lie far from it."""
        return np.flatnonzero(np.abs(self.residuals) > FAR)

    def __call__(self, at: FloatArray) -> FloatArray:
        """Return the times that the model gives."""
        return MODELS[self.model](self.parameters, np.asarray(at, np.float64))


def line_ns(parameters: FloatArray, sizes: FloatArray) -> FloatArray:
    """Return `t0 + size / rate`, the parameters being t0 in ns and 1 / rate in ns per byte."""
    ns: FloatArray = parameters[0] + parameters[1] * sizes
    return ns


def floor_ns(parameters: FloatArray, tokens: FloatArray) -> FloatArray:
    """Return `max(floor, a + b * tokens)`: weights are read once, however few tokens there are."""
    ns: FloatArray = np.maximum(parameters[0], parameters[1] + parameters[2] * tokens)
    return ns


MODELS: dict[str, Callable[[FloatArray, FloatArray], FloatArray]] = {
    "line": line_ns,
    "floor": floor_ns,
}


def fit_line(
    sizes: FloatArray, ns: FloatArray, held_out: tuple[FloatArray, FloatArray] | None = None
) -> Fit:
    """Fit `t0 + bytes / rate` to copies; `held_out` are sizes and times that only judge it.

    Raises CalibrationError for fewer than two different sizes.
    """
    sizes, ns = checked(sizes, ns, 2)
    start = np.linalg.lstsq(np.stack([1 / ns, sizes / ns], axis=1), np.ones(len(ns)), rcond=None)[0]
    return fitted("line", [np.maximum(start, 0)], sizes, ns, held_out)


def fit_floor(
    tokens: FloatArray, ns: FloatArray, held_out: tuple[FloatArray, FloatArray] | None = None
) -> Fit:
    """Fit `max(floor, a + b n)` to an expert's times by tokens; `held_out` only judge it.

    Raises CalibrationError for fewer than three different numbers of tokens.
    """
    tokens, ns = checked(tokens, ns, 3)
    order = np.argsort(tokens, kind="stable")
    tokens, ns = tokens[order], ns[order]
    starts = []
    for first in range(len(tokens) - 1):  # of those on the slope
        slope, base = np.polyfit(tokens[first:], ns[first:], 1, w=1 / ns[first:])
        starts.append(np.maximum([np.median(ns[: first + 1]), base, slope], 0))
    return fitted("floor", starts, tokens, ns, held_out)


def checked(at: FloatArray, ns: FloatArray, different: int) -> tuple[FloatArray, FloatArray]:
    """Return both as floats; raise CalibrationError for what nothing can be fitted to."""
    at, ns = np.asarray(at, np.float64), np.asarray(ns, np.float64)
    if not (np.isfinite(at).all() and np.isfinite(ns).all() and (ns > 0).all()):
        raise CalibrationError("times to fit must be above 0 ns")
    if len(np.unique(at)) < different:
        raise CalibrationError(f"a fit needs {different} different sizes, not {len(np.unique(at))}")
    return at, ns


def fitted(
    model: str, starts: list[FloatArray], at: FloatArray, ns: FloatArray,
    held_out: tuple[FloatArray, FloatArray] | None,
) -> Fit:  # fmt: skip
    """Return the best of the fits from these starts."""
    from scipy.optimize import least_squares

    of = MODELS[model]

    def residuals(parameters: FloatArray) -> FloatArray:
        return of(parameters * scale, at) / ns - 1

    best = None
    for start in starts:
        # Parameters differ by orders of magnitude; each is searched for in units of its start.
        scale = np.where(start > 0, start, ns.min() / max(1.0, at.max()))
        found = least_squares(
            residuals, start / scale, bounds=(0, np.inf), loss="soft_l1", f_scale=USUAL
        )
        if best is None or found.cost < best[0]:
            best = found.cost, found.x * scale
    assert best is not None
    apart = np.zeros(0)
    if held_out is not None:
        there, truth = checked(*held_out, 0)
        apart = of(best[1], there) / truth - 1
    return Fit(model, best[1], of(best[1], at) / ns - 1, apart)
