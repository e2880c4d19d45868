"""How far the numbers of a machine may be off, section by section, and a result with them."""

import math
from collections.abc import Iterable

from moesim.answers.stretch import SECTIONS
from moesim.profile import HardwareProfile

UNMEASURED = 0.15
"""For numbers of datasheets and those derived from others: an assumption, not a measurement."""
LEAST = 0.03
"""No calibration is better than so much, whatever its spread."""


def uncertainty_of(profile: HardwareProfile) -> dict[str, float]:
    """Return, for each of `stretch.SECTIONS`, the share by which its times may be off.

    A measured section by the spread of its measurements, at least `LEAST` and at most as one that
    was not measured, `UNMEASURED`.
    """
    found = {}
    for section in SECTIONS:
        origin = getattr(profile.provenance, section)
        spread = origin.spread_pct / 100 if origin.source == "measured" else UNMEASURED
        found[section] = min(UNMEASURED, max(LEAST, spread))
    return found


def combined(differences: Iterable[float]) -> float:
    """Return what independent differences make together: the root of the sum of their squares."""
    return math.hypot(*differences)
