"""What is known of this machine without measuring: what a result has to be read with."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from statistics import median

import msgspec

from moesim import __version__
from moesim.real.devices import (
    CPUINFO,
    host_memory_bytes,
    processor_name,
    usable_cores,
    usable_threads,
)

BUSY = 0.25
"""Load per thread from which a machine is called busy: somebody else's work is measured, too."""


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A machine at one moment."""

    cpu: str
    cores: int
    """Physical ones that the process may use."""
    threads: int
    """Of the hardware, on those cores."""
    memory_bytes: int
    load: float
    """Runnable threads, mean over a minute; below 0 where the system does not tell."""
    mhz: float
    """The processor's clock at this moment; 0 where the system does not tell."""

    @property
    def busy(self) -> bool:
        """Whether others are at work."""
        return self.load > BUSY * self.threads


def machine_facts() -> Facts:
    """Return what the system says."""
    return Facts(
        cpu=processor_name(),
        cores=usable_cores(),
        threads=usable_threads(),
        memory_bytes=host_memory_bytes(),
        load=load_average(),
        mhz=clock_mhz(),
    )


def load_average() -> float:
    """Return the runnable threads of the last minute, -1 where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return -1.0


def clock_mhz() -> float:
    """Return the median clock of the processor's threads; 0 where the system does not tell."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
        found = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    except (OSError, ValueError):
        return 0.0
    return median(found) if found else 0.0


def versions() -> dict[str, str]:
    """Return the versions that decide what is measured."""
    found = {"moesim": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found
