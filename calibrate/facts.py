"""What is known of this machine without measuring: what a result has to be read with."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from moesim import __version__
from moesim.real.devices import processor_name, usable_threads

BUSY = 0.25
"""Load per thread from which a machine is called busy: somebody else's work is measured, too."""


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A machine at one moment."""

    cpu: str
    threads: int
    memory_bytes: int
    load: float
    """Runnable threads, mean over a minute; below 0 where the system does not tell."""

    @property
    def busy(self) -> bool:
        """Whether others are at work."""
        return self.load > BUSY * self.threads


def machine_facts() -> Facts:
    """Return what the system says."""
    return Facts(
        cpu=processor_name(),
        threads=usable_threads(),
        memory_bytes=host_memory_bytes(),
        load=load_average(),
    )


def load_average() -> float:
    """Return the runnable threads of the last minute, -1 where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return -1.0


def host_memory_bytes() -> int:
    """Return the host's memory, or what a container may use of it; 0 where it is not told."""
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        limit = "max"
    return min(whole, int(limit)) if limit.isdigit() else whole


def versions() -> dict[str, str]:
    """Return the versions that decide what is measured."""
    found = {"moesim": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found
