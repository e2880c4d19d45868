"""Open a device by a text such as `emulated:memory=4GiB`; results state its defaults, too."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moesim.errors import CalibrationError
from moesim.real.device import Device
from moesim.real.emulated import Emulated, Throttle
from moesim.real.lanes import Lane
from moesim.sizes import parse_size

OPTIONS = {
    "cuda": ("cpu_threads",),
    "cpu": ("cpu_threads",),
    "emulated": ("memory", "bandwidth", "latency_ns", "gpu_threads", "cpu_threads"),
}
"""Of every kind of device."""
KINDS = tuple(OPTIONS)
MEMORY_BYTES = 2 << 30
"""Of an emulated device."""
LINK = Throttle(latency_ns=20_000, bytes_per_s=2.0e9)
"""Of an emulated device: below what one thread copies, so that it is the link that limits."""
CPUINFO = Path("/proc/cpuinfo")
CPUS = Path("/sys/devices/system/cpu")


def usable_threads() -> int:
    """Return how many hardware threads this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_cores() -> int:
    """Return on how many physical cores those threads are; their number where that is not told."""
    if not hasattr(os, "sched_getaffinity"):
        return usable_threads()
    try:
        return len(
            {
                (CPUS / f"cpu{thread}" / "topology" / "thread_siblings_list").read_text("ascii")
                for thread in os.sched_getaffinity(0)
            }
        )
    except OSError:
        return usable_threads()


def available_bytes() -> int:
    """Return the host memory that is free for use; 1 GiB where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError):
        pass
    return 1 << 30


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


def processor_name() -> str:
    """Return the processor as it calls itself, or its architecture where that is not told."""
    import platform

    try:
        for line in CPUINFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown processor"


class Processor:
    """A machine without a device: its experts are computed and read, and nothing is copied."""

    label = "cpu"
    memory_bytes = 0

    def __init__(self, threads: int) -> None:
        """Start the lanes."""
        self.name = processor_name()
        self.lanes = {"cpu": Lane("cpu", threads), "disk": Lane("disk")}

    def empty(self, *shape: int, dtype: Any) -> Any:
        """Raise CalibrationError: there is no device memory."""
        raise CalibrationError("a machine without a device has no device memory")

    def host(self, *shape: int, dtype: Any, pinned: bool = True) -> Any:
        """Return a tensor in host memory; pinning it would change nothing."""
        import torch

        return torch.empty(shape, dtype=dtype)

    def copy(self, target: Any, source: Any) -> None:
        """Raise CalibrationError: there is nothing to copy to."""
        raise CalibrationError("a machine without a device has no link to copy over")

    def free(self, tensor: Any) -> None:
        """Do nothing: no device memory was handed out."""

    taken_bytes = 0

    def free_all(self, but: int = 0) -> None:
        """Do nothing: no device memory was handed out."""

    def close(self) -> None:
        """Finish what is queued."""
        for lane in self.lanes.values():
            lane.close()


def parse_device(text: str) -> tuple[str, dict[str, float]]:
    """Return kind and options of a device as in `emulated:memory=4GiB,bandwidth=2e9`.

    `memory` is in bytes, or has a unit; `bandwidth` in bytes/s.

    Raises CalibrationError for an unknown kind, an option that it has not, and a value that is not
    legal, naming what is.
    """
    kind, _, given = text.partition(":")
    if kind not in OPTIONS:
        raise CalibrationError(f"no device {kind!r}; there are: {', '.join(KINDS)}")
    found: dict[str, float] = {}
    for item in filter(None, given.split(",")):
        key, equals, value = item.partition("=")
        if not equals or key not in OPTIONS[kind]:
            legal = ", ".join(OPTIONS[kind])
            raise CalibrationError(f"device {kind}: no option {item!r}; there are: {legal}")
        if key in found:
            raise CalibrationError(f"device {kind}: {key} is given twice; once is legal")
        found[key] = parse_value(kind, key, value)
    return kind, found


def parse_value(kind: str, key: str, text: str) -> float:
    """Return the value of a device's option; raise CalibrationError naming what is legal."""
    value: float | None
    if key == "memory":
        low, high = 1 << 20, host_memory_bytes() or 1 << 50
        legal = f"a size from 1MiB to the host's {high / 2**30:.1f}GiB, as 4GiB,"
        value = parse_size(text)
    elif key == "bandwidth":
        low, high, legal = 10**6, 10**12, "bytes per second from 1e6 to 1e12, as 2e9,"
        value = number(text, float)
    else:
        low, high = (0, 10**9) if key == "latency_ns" else (1, usable_threads())
        legal = f"a whole number from {low} to {high}"
        value = number(text, int)
    if value is None or not low <= value <= high:
        raise CalibrationError(f"device {kind}: {key}={text!r} is not legal; {legal} is")
    return value


def number(text: str, kind: Callable[[str], float]) -> float | None:
    """Return the number that a text is, None if it is none."""
    try:
        return kind(text)
    except ValueError:
        return None


def open_runner(text: str | None) -> Device:
    """Return a device that runs policies: CUDA if there is one and none is named, else emulated.

    Raises CalibrationError as `open_device` does, without PyTorch, and for one without a link.
    """
    try:
        import torch
    except ImportError:
        raise CalibrationError("running needs PyTorch: pip install 'moesim[torch]'") from None
    device = open_device(text or ("cuda" if torch.cuda.is_available() else "emulated"))
    if "h2d" not in device.lanes:
        device.close()
        raise CalibrationError(
            f"device {device.label} copies nothing, and runs no policy; legal are cuda and emulated"
        )
    return device


def host_room_bytes() -> int:
    """Return the host memory that experts may take: half of what is free."""
    return available_bytes() // 2


def open_device(text: str) -> Device:
    """Return the device that a text names; see `parse_device`.

    The emulated device's lanes `gpu` and `cpu` share the host's physical cores: each gets half of
    them as threads, or what is left by the other if that is given, and at least one. The lanes of
    copies have a thread each, which takes from them. With a real device, or without any, the
    processor computes with a thread per core: those that share one wait for the same memory.

    Raises CalibrationError for a device that is unknown, not there, or has not what it should.
    """
    kind, given = parse_device(text)
    cores = usable_cores()
    if kind == "cpu":
        return Processor(int(given.get("cpu_threads", cores)))
    if kind == "emulated":
        asked = given.get("cpu_threads", cores - cores // 2)
        gpu_threads = int(given.get("gpu_threads", max(1, cores - asked)))
        cpu_threads = int(given.get("cpu_threads", max(1, cores - gpu_threads)))
        memory_bytes = int(given.get("memory", MEMORY_BYTES))
        link = Throttle(
            int(given.get("latency_ns", LINK.latency_ns)),
            float(given.get("bandwidth", LINK.bytes_per_s)),
        )
        return Emulated(memory_bytes, link, gpu_threads=gpu_threads, cpu_threads=cpu_threads)
    import torch

    if not torch.cuda.is_available():
        raise CalibrationError(
            f"device cuda: PyTorch {torch.__version__} sees none here; there are: cpu, emulated"
        )
    from moesim.real.cuda import Cuda

    return Cuda(cpu_threads=int(given.get("cpu_threads", cores)))
