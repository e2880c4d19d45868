"""What the machine draws meanwhile, where it tells: energy counters, read before and after.

Packages of the processor count in /sys/class/powercap, which often only root may read. A CUDA
device counts by NVML, if the package pynvml is installed.
"""

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from moesim.real.device import Device

POWERCAP = Path("/sys/class/powercap")
LEAST_S = 0.5
"""Counters of devices advance every tenth of a second: less than this says nothing."""


class Counter(NamedTuple):
    """What a source has taken since some time."""

    joules: float
    wraps_joules: float = 0.0
    """Where it begins at 0 again; 0 where that is not told."""


class Reading(NamedTuple):
    """All counters at one moment; a source that tells nothing is not among them."""

    seconds: float
    counters: dict[str, Counter]


def reading(
    device: Device, powercap: Path = POWERCAP, clock: Callable[[], float] = time.monotonic
) -> Reading:
    """Read what counters there are: `package-0` and so on, and `gpu` on a CUDA device."""
    found = packages(powercap)
    if device.label == "cuda" and (gpu := cuda_counter()) is not None:
        found["gpu"] = gpu
    return Reading(clock(), found)


def packages(powercap: Path) -> dict[str, Counter]:
    """Return the counters of the processor's packages, by name."""
    found: dict[str, Counter] = {}
    for zone in sorted(powercap.glob("intel-rapl:*")):  # AMD's are called that, too
        try:
            name = (zone / "name").read_text(encoding="ascii").strip()
            # Zones within a package have two colons; psys is all of the board.
            if zone.name.count(":") == 1 and name.startswith("package"):
                joules, wraps = (
                    int((zone / file).read_text(encoding="ascii")) / 1e6
                    for file in ("energy_uj", "max_energy_range_uj")
                )
                found[name] = Counter(joules, wraps)
        except (OSError, ValueError):
            continue
    return found


def cuda_counter() -> Counter | None:
    """Return the counter of the current CUDA device, None where it is not told."""
    try:
        import torch

        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        number = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{number}")
        return Counter(nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)
    except Exception:
        return None  # whatever a driver's library does, a measurement goes on


def watts(before: Reading, after: Reading) -> dict[str, float]:
    """Return the mean power by source; of less than `LEAST_S`, nothing.

    A counter may have wrapped around once.
    """
    seconds = after.seconds - before.seconds
    found: dict[str, float] = {}
    for name, start in before.counters.items():
        end = after.counters.get(name)
        if end is None or seconds < LEAST_S:
            continue
        joules = end.joules - start.joules
        if joules < 0:
            joules += end.wraps_joules
        if joules >= 0:
            found[name] = joules / seconds
    return found
