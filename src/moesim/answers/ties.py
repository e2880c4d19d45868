"""Which policy is faster, and whether that is certain.

Policies are compared by the logarithm of the ratio of their times. What is not known about that has
two parts, taken as independent:

* **The machine's numbers.** A section of the machine that takes longer makes every policy slower,
  each by a share of its own, which is found by simulating it. What is uncertain is the same
  machine for all of them, so that for two policies the *difference* of these shares counts. The
  sections are independent of each other; how lanes slow each other down is taken as it is.
* **The trace.** The same workload is cut from it several times; the logarithm of the ratio varies
  from one of these windows to the next, and its standard error over windows counts. With one window
  it is unknown, and counts as nothing; from few it is rough: of differences that are nothing but
  the spread of three windows, two standard errors hold 82 % (Student's t), not 95 %.

A difference of less than `CERTAIN` standard deviations is a tie. Ties are not transitive: a may tie
with b and b with c, while a is certainly faster than c.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moesim.answers.uncertainty import combined

CERTAIN = 2.0
"""Standard deviations from which on a difference is certain."""


class Timed(NamedTuple):
    """How long a policy takes, and what that rests on."""

    ns: tuple[int, ...]
    """Makespan of each window of the trace."""
    tokens: tuple[int, ...]
    """Generated in each window."""
    shifts: Mapping[str, float]
    """By section of the machine: what the logarithm of the makespan grows by if the section takes
    longer by as much as it may be off."""

    @property
    def tokens_per_s(self) -> float:
        """Of all windows together."""
        return sum(self.tokens) * 1e9 / sum(self.ns)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean; 0 where fewer than two values tell nothing."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def lead(first: Timed, second: Timed) -> float:
    """Return the logarithm of how many times as long the second takes; above 0 if it is slower."""
    return math.log(sum(second.ns) / sum(first.ns))


def doubt(first: Timed, second: Timed) -> float:
    """Return the standard deviation of `lead`."""
    sections = {*first.shifts, *second.shifts}
    apart = [first.shifts.get(name, 0.0) - second.shifts.get(name, 0.0) for name in sections]
    by_window = [math.log(b / a) for a, b in zip(first.ns, second.ns, strict=True)]
    return combined([*apart, standard_error(by_window)])


def own_doubt(timed: Timed) -> float:
    """Return the standard deviation of the logarithm of a policy's own speed."""
    by_window = [math.log(ns / n) for ns, n in zip(timed.ns, timed.tokens, strict=True)]
    return combined([*timed.shifts.values(), standard_error(by_window)])


def faster(first: Timed, second: Timed) -> bool:
    """Say whether the first is certainly faster."""
    return lead(first, second) > CERTAIN * doubt(first, second)


class Place(NamedTuple):
    """Where a policy stands among others."""

    rank: int
    """1 + how many are certainly faster."""
    tied: tuple[str, ...]
    """Those that are certainly neither faster nor slower, the fastest first."""


def places(timed: Mapping[str, Timed]) -> dict[str, Place]:
    """Return where each policy stands, the fastest first; the same speed, by name."""
    order = sorted(timed, key=lambda name: (-timed[name].tokens_per_s, name))
    found = {}
    for name in order:
        others = [other for other in order if other != name]
        above = [other for other in others if faster(timed[other], timed[name])]
        tied = [o for o in others if o not in above and not faster(timed[name], timed[o])]
        found[name] = Place(1 + len(above), tuple(tied))
    return found
