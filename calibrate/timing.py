"""Time an operation again and again, until its time is known or there is no more time."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moesim.types import FloatArray


class Limits(NamedTuple):
    """When to stop."""

    warm_ups: int = 3
    least: int = 7
    """Repetitions that count."""
    most: int = 500
    seconds: float = 1.0
    spread: float = 0.03
    """Enough when the middle is no farther above the low quantile, relative to it."""


DEFAULT = Limits()


class Timed(NamedTuple):
    """What an operation took, in ns."""

    ns: float
    """The low quartile: what it takes where nothing else disturbs it."""
    median_ns: float
    spread: float
    """How far the median is above the low quartile, relative to it."""
    repetitions: int
    settled: bool
    """Whether the spread was small in the end; else time or repetitions ran out."""
    outliers: int
    """Repetitions of more than twice the median."""


LOW = 0.25
ENOUGH_NS = 500_000
"""Operations are done in a row until it takes about as long as this."""
MOST_CALLS = 16
"""In a row."""


def calls_for(trial_ns: int) -> int:
    """Return how many operations that take so many ns, above 0, are done in a row."""
    return max(1, min(MOST_CALLS, ENOUGH_NS // trial_ns))


def summary(samples: FloatArray, limits: Limits) -> Timed:
    """Return what some repetitions say."""
    low, middle = np.quantile(samples, [LOW, 0.5])
    spread = float(middle / low - 1) if low > 0 else 0.0
    return Timed(
        ns=float(low),
        median_ns=float(middle),
        spread=spread,
        repetitions=len(samples),
        settled=len(samples) >= limits.least and spread <= limits.spread,
        outliers=int((samples > 2 * middle).sum()),
    )


def measure(
    once: Callable[[], int], limits: Limits = DEFAULT, clock: Callable[[], float] = time.monotonic
) -> Timed:
    """Repeat an operation, which returns the ns that it took, until its times agree.

    The time limit ends it after `least` repetitions at the earliest, warm-ups not counted.
    """
    for _ in range(limits.warm_ups):
        once()
    end = clock() + limits.seconds
    samples: list[int] = []
    while True:
        samples.append(once())
        if len(samples) < limits.least:
            continue
        found = summary(np.array(samples, np.float64), limits)
        if found.settled or len(samples) >= limits.most or clock() >= end:
            return found
