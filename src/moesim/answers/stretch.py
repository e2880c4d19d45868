"""A machine of which a section takes longer, or less: to see how far a result rests on it."""

from collections.abc import Mapping

import msgspec

from moesim.costs import Costs, stretched
from moesim.errors import InputError
from moesim.profile import HardwareProfile
from moesim.types import (
    ATTENTION,
    ATTENTION_CPU,
    COMBINE,
    COPY_IN,
    DISK_READ,
    EXPERT_CPU,
    EXPERT_GPU,
    GATE,
    HEAD,
    MOVE,
    SEND,
    SHARED,
)

HOST = "host"
KINDS_OF = {
    "gpu": (ATTENTION, GATE, SHARED, EXPERT_GPU, COMBINE, HEAD, MOVE),
    "cpu": (EXPERT_CPU, ATTENTION_CPU),
    "link": (COPY_IN, SEND),
    "disk": (DISK_READ,),
}
"""Kinds that stand for all numbers of a section; those of the host are not in `Costs`."""
SECTIONS = (*KINDS_OF, HOST)


def check_sections(factors: Mapping[str, float]) -> None:
    """Raise InputError for what is no section, or no factor."""
    for section, factor in factors.items():
        if section not in SECTIONS:
            raise InputError(f"no section {section!r} to stretch; there are: {', '.join(SECTIONS)}")
        if not 0.01 <= factor <= 100:
            raise InputError(f"stretch of {section}: {factor} is not in 0.01..100")


def stretched_costs(costs: Costs, factors: Mapping[str, float]) -> Costs:
    """Return costs in which all operations of a section take so many times as long.

    Raises InputError as `check_sections` does.
    """
    check_sections(factors)
    for section, factor in factors.items():
        for kind in KINDS_OF.get(section, ()):
            costs = stretched(costs, kind, factor)
    return costs


def stretched_host(profile: HardwareProfile, factors: Mapping[str, float]) -> HardwareProfile:
    """Return the machine with the host program's times stretched, if they are to be."""
    check_sections(factors)
    factor = factors.get(HOST, 1.0)
    if factor == 1:
        return profile
    host = profile.host
    by_policy = {name: round(ns * factor) for name, ns in host.decision_ns_by_policy.items()}
    slower = msgspec.structs.replace(
        host,
        per_layer_ns=round(host.per_layer_ns * factor),
        per_launch_ns=round(host.per_launch_ns * factor),
        per_sync_ns=round(host.per_sync_ns * factor),
        decision_ns=round(host.decision_ns * factor),
        decision_ns_by_policy=by_policy,
    )
    return msgspec.structs.replace(profile, host=slower)
