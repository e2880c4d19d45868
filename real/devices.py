"""Open a device by its kind; what is not given is a default that the results state."""

import os
from pathlib import Path
from typing import Any

from moesim.errors import CalibrationError
from moesim.real.device import Device
from moesim.real.emulated import Emulated, Throttle
from moesim.real.lanes import Lane

KINDS = ("cuda", "cpu", "emulated")
MEMORY_BYTES = 2 << 30
"""Of an emulated device."""
LINK = Throttle(latency_ns=20_000, bytes_per_s=2.0e9)
"""Of an emulated device: below what one thread copies, so that it is the link that limits."""


def usable_threads() -> int:
    """Return how many hardware threads this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_name() -> str:
    """Return the processor as it calls itself, or its architecture where that is not told."""
    import platform

    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown processor"


class Processor:
    """A machine without a device: its experts are computed, and nothing is copied."""

    label = "cpu"
    memory_bytes = 0

    def __init__(self, threads: int) -> None:
        """Start the one lane."""
        self.name = processor_name()
        self.lanes = {"cpu": Lane("cpu", threads)}

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

    def free_all(self) -> None:
        """Do nothing: no device memory was handed out."""

    def close(self) -> None:
        """Finish what is queued."""
        for lane in self.lanes.values():
            lane.close()


def open_device(
    kind: str,
    *,
    memory_bytes: int = MEMORY_BYTES,
    link: Throttle = LINK,
    gpu_threads: int | None = None,
    cpu_threads: int | None = None,
) -> Device:
    """Return a device of a kind of `KINDS`; all but `cpu_threads` concerns the emulated one.

    The emulated device's lanes `gpu` and `cpu` share the host's cores: by default each gets half
    of the threads, at least one. The lanes of copies have a thread each, which takes from them.
    With a real device, or without any, the processor computes with all threads.

    Raises CalibrationError for a kind that is unknown or not there, or sizes that are none.
    """
    threads = usable_threads()
    for name, value in (
        ("memory_bytes", memory_bytes),
        ("link.bytes_per_s", link.bytes_per_s),
        ("gpu_threads", gpu_threads),
        ("cpu_threads", cpu_threads),
    ):
        if value is not None and not 1 <= value < float("inf"):
            raise CalibrationError(f"{name} must be at least 1, not {value}")
    if link.latency_ns < 0:
        raise CalibrationError(f"link.latency_ns must be at least 0, not {link.latency_ns}")
    if kind == "cpu":
        return Processor(cpu_threads or threads)
    if kind == "emulated":
        half = max(1, threads // 2)
        return Emulated(
            memory_bytes,
            link,
            gpu_threads=gpu_threads or half,
            cpu_threads=cpu_threads or max(1, threads - half),
        )
    if kind != "cuda":
        raise CalibrationError(f"no device {kind!r}; there are: {', '.join(KINDS)}")
    import torch

    if not torch.cuda.is_available():
        raise CalibrationError(
            f"device cuda: PyTorch {torch.__version__} sees none here; there are: cpu, emulated"
        )
    from moesim.real.cuda import Cuda

    return Cuda(cpu_threads=cpu_threads or threads)
