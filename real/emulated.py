"""A device without a GPU: memory of its own, a thread that computes, and copies at a stated rate.

It is slow and honest: real GEMMs, real copies, real concurrency, on the host's own cores. What is
measured on it is true of it, and every result says that it is emulated.
"""

import ctypes
import math
import sys
import threading
import time
from typing import Any, NamedTuple

from moesim.errors import CalibrationError
from moesim.real.lanes import Lane, Ticket

SPIN_NS = 40_000
"""Sleeping overshoots by some 20 us; the rest is waited for in a loop."""
NEXT_NS = 5_000
"""What a lane needs at most to take up a copy that was queued behind another one."""
PR_SET_TIMERSLACK = 29
"""Of prctl(2): for the calling thread, in ns."""


class Throttle(NamedTuple):
    """What a copy takes at least: `latency_ns` and its bytes over the rate."""

    latency_ns: int
    bytes_per_s: float

    def ns(self, size_bytes: int) -> int:
        """Return that time."""
        return self.latency_ns + round(size_bytes * 1e9 / self.bytes_per_s)


class Link(Lane):
    """A direction of the link. An operation is one transfer, whatever pieces it is copied in.

    It begins when the one before is over, not when the lane has noticed that, and its copies are
    over when the link has passed their bytes. Between two pieces the lane need not be on time: what
    it hands over a little early or late, the link has in a queue.
    """

    def __init__(self, name: str, throttle: Throttle) -> None:
        """Start the thread."""
        self.throttle = throttle
        self.over_ns = 0
        """When all that was handed to it is over."""
        self._start_ns = 0
        self._new = self._resumed = False
        super().__init__(name)

    def begin(self, ticket: Ticket) -> None:
        """See `Lane`."""
        _here.link = self
        self._new, self._resumed = True, bool(ticket.stretches)
        super().begin(ticket)
        self._start_ns = ticket.stretches[-1][0]

    def passed(self, size_bytes: int) -> None:
        """Note that bytes were copied, and sleep until shortly before the link is done.

        The first ones of an operation begin with it, and have a latency unless it was interrupted.
        """
        if self._new:
            if self._start_ns - self.over_ns >= NEXT_NS:
                self.over_ns = self._start_ns
            if not self._resumed:
                self.over_ns += self.throttle.latency_ns
            self._new = False
        self.over_ns += self.throttle.ns(size_bytes) - self.throttle.latency_ns
        wake_precisely()
        if (left := self.over_ns - SPIN_NS - time.perf_counter_ns()) > 0:
            time.sleep(left / 1e9)

    def end(self, ticket: Ticket) -> None:
        """See `Lane`; not before the link is done."""
        wait_until(self.over_ns)
        super().end(ticket)


class Emulated:
    """The device; `link` throttles copies in both directions, each on a lane of its own.

    Raises CalibrationError when more is allocated than `memory_bytes`.
    """

    label = "emulated"
    name = "host processor as a device"

    def __init__(
        self, memory_bytes: int, link: Throttle, *, gpu_threads: int = 1, cpu_threads: int = 1
    ) -> None:
        """Start the lanes."""
        self.link = link
        self.memory_bytes = memory_bytes
        self.lanes = {
            "gpu": Lane("gpu", gpu_threads),
            "cpu": Lane("cpu", cpu_threads),
            "h2d": Link("h2d", link),
            "d2h": Link("d2h", link),
            "disk": Lane("disk"),
        }
        self.taken_bytes = 0

    def empty(self, *shape: int, dtype: Any) -> Any:
        """Return a tensor in device memory."""
        import torch

        size_bytes = dtype.itemsize * math.prod(shape)
        if self.taken_bytes + size_bytes > self.memory_bytes:
            raise CalibrationError(
                f"{size_bytes} bytes do not fit into the {self.memory_bytes} of the emulated "
                f"device, of which {self.taken_bytes} are taken"
            )
        # Written to, since the system gives a page its memory only then, and takes its time.
        tensor = torch.empty(shape, dtype=dtype).zero_()
        self.taken_bytes += size_bytes
        return tensor

    def free(self, tensor: Any) -> None:
        """Give back a tensor that `empty` returned and that nobody uses any more."""
        self.taken_bytes -= tensor.numel() * tensor.element_size()

    def host(self, *shape: int, dtype: Any, pinned: bool = True) -> Any:
        """Return a tensor in host memory; pinning it would change nothing."""
        import torch

        return torch.empty(shape, dtype=dtype)

    def free_all(self, but: int = 0) -> None:
        """Give back everything but the first so many bytes; see `device.Device`."""
        self.taken_bytes = min(self.taken_bytes, but)

    def copy(self, target: Any, source: Any) -> None:
        """Copy between host and device memory; takes its time on a lane of the link only."""
        target.copy_(source)
        if (link := getattr(_here, "link", None)) is not None:
            link.passed(source.numel() * source.element_size())

    def close(self) -> None:
        """Finish what is queued."""
        for lane in self.lanes.values():
            lane.close()


def wait_until(deadline_ns: int) -> None:
    """Block until a moment of `time.perf_counter_ns`, to within a few microseconds."""
    wake_precisely()
    while (left := deadline_ns - time.perf_counter_ns()) > 0:
        if left > SPIN_NS:
            time.sleep((left - SPIN_NS) / 1e9)


def wake_precisely() -> None:
    """Let the system wake this thread when it asks for it; by default it is up to 50 us late.

    It then need not spin for long, in which others could have neither Python nor the processor.
    """
    if not getattr(_precise, "done", False):
        _precise.done = True
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)


_precise = threading.local()
_here = threading.local()
