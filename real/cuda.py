"""Lanes of a CUDA device: a stream each, and a thread that issues to it.

CUDA takes nothing back and reorders nothing, and waiting for an event that nobody has recorded is
no waiting. So a lane keeps its own queue: its thread issues an operation when every operation that
it waits for has been issued to the device, or, on the host, is over; the stream then waits for
their events. Times come from events, on the clock of the host.
"""

import threading
import time
from collections.abc import Sequence
from typing import Any

from moesim.real.lanes import Lane, Ticket, Work


class CudaTicket(Ticket):
    """An operation on a stream: issued by the lane's thread, over when its event is."""

    __slots__ = ("began", "clock", "ended", "issued")

    def __init__(self, lane: str, clock: "CudaClock") -> None:
        """Nothing is recorded yet."""
        super().__init__(lane)
        self.clock = clock
        self.began: Any = None
        self.ended: Any = None
        self.issued = threading.Event()

    @property
    def done(self) -> bool:
        """Whether it is over, on the device too."""
        return super().done and (self.error is not None or bool(self.ended.query()))

    def wait(self) -> "CudaTicket":
        """Block until it is over on the device; raise what issuing it raised."""
        super().wait()
        self.ended.synchronize()
        if self.end_ns == 0:
            # From event to event: milliseconds since the clock's start come in single precision.
            self.start_ns = self.clock.ns(self.began)
            self.end_ns = self.start_ns + round(self.began.elapsed_time(self.ended) * 1e6)
        return self


class CudaClock:
    """Turns events of the device into the host's nanoseconds."""

    def __init__(self, cuda: Any) -> None:
        """Record where both clocks are the same, to within the time of a synchronisation."""
        self._base = cuda.Event(enable_timing=True)
        self._base.record()
        self._base.synchronize()
        self._base_ns = time.perf_counter_ns()

    def ns(self, event: Any) -> int:
        """Return when an event that is over happened."""
        ns: int = self._base_ns + round(self._base.elapsed_time(event) * 1e6)
        return ns


class CudaLane(Lane):
    """A lane whose work is kernels and copies on a stream of its own; `cuda` is `torch.cuda`."""

    def __init__(self, name: str, cuda: Any, clock: CudaClock) -> None:
        """Make the stream and start the thread."""
        self._cuda = cuda
        self._clock = clock
        self._stream = cuda.Stream()
        super().__init__(name)

    def ticket(self) -> Ticket:
        """Return the ticket of an operation to be queued."""
        return CudaTicket(self.name, self._clock)

    def do(self, ticket: Ticket, work: Work, after: Sequence[Ticket]) -> None:
        """Issue one operation, behind those that it waits for."""
        assert isinstance(ticket, CudaTicket)
        for other in after:
            if isinstance(other, CudaTicket):
                other.issued.wait()
                if other.error is not None:
                    raise other.error
                if other.lane != self.name:  # a stream is in order by itself
                    self._stream.wait_event(other.ended)
            else:
                other.wait()
        ticket.began = self._cuda.Event(enable_timing=True)
        ticket.ended = self._cuda.Event(enable_timing=True)
        with self._cuda.stream(self._stream):
            ticket.began.record(self._stream)
            work()
            ticket.ended.record(self._stream)

    def finish(self, ticket: Ticket) -> None:
        """Let those go on that wait for it to be issued, or to be over."""
        assert isinstance(ticket, CudaTicket)
        ticket.issued.set()
        super().finish(ticket)


class Cuda:
    """The current CUDA device; `cpu` is the host's lane, the others have a stream each."""

    label = "cuda"

    def __init__(self, *, cpu_threads: int) -> None:
        """Start the lanes."""
        import torch

        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.name = str(properties.name)
        self.memory_bytes = int(properties.total_memory)
        clock = CudaClock(torch.cuda)
        self.lanes: dict[str, Lane] = {
            lane: CudaLane(lane, torch.cuda, clock) for lane in ("gpu", "h2d", "d2h")
        }
        self.lanes["cpu"] = Lane("cpu", cpu_threads)

    def empty(self, *shape: int, dtype: Any) -> Any:
        """Return a tensor in device memory."""
        import torch

        return torch.empty(shape, dtype=dtype, device="cuda")

    def host(self, *shape: int, dtype: Any, pinned: bool = True) -> Any:
        """Return a tensor in host memory."""
        import torch

        return torch.empty(shape, dtype=dtype, pin_memory=pinned)

    def copy(self, target: Any, source: Any) -> None:
        """Enqueue a copy on the lane's stream; pageable memory makes the lane's thread wait."""
        target.copy_(source, non_blocking=True)

    def free_all(self) -> None:
        """Give back what PyTorch keeps of tensors that nobody holds any more."""
        import torch

        torch.cuda.empty_cache()

    def close(self) -> None:
        """Finish what is queued."""
        for lane in self.lanes.values():
            lane.close()
