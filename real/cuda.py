"""Lanes of a CUDA device: a stream each, and a thread that issues to it.

CUDA takes nothing back and reorders nothing, and waiting for an event that nobody has recorded is
no waiting. So a lane keeps its own queue: its thread issues an operation when every operation that
it waits for has been issued to the device, or, on the host, is over; the stream then waits for
their events. Times come from events, on the clock of the host.
"""

import threading
import time
from typing import Any

from moesim.real.lanes import Lane, Ticket, Work

IN_DRIVER = 2
"""Pieces of an operation that are issued and not over, at most."""
FAR_MS = 8.0
"""In single precision, 8 to 16 ms come in steps of 2**-20 ms, which is 0.95 ns."""


class CudaTicket(Ticket):
    """An operation on a stream: it lets others go when it is issued, and is over when its last
    event is."""

    __slots__ = ("clock", "marks")

    def __init__(self, lane: str, clock: "CudaClock") -> None:
        """Nothing is recorded yet."""
        super().__init__(lane)
        self.clock = clock
        self.marks: list[tuple[Any, Any]] = []
        """Events around each stretch."""

    @property
    def done(self) -> bool:
        """Whether it is over, on the device too."""
        if not super().done:
            return False
        return self.error is not None or self.cancelled or bool(self.marks[-1][1].query())

    def wait(self) -> "CudaTicket":
        """Block until it is over on the device; raise what issuing it raised."""
        super().wait()
        if self.marks and self.end_ns == 0:
            self.marks[-1][1].synchronize()
            for began, ended in self.marks:
                start_ns = self.clock.ns(began)
                # From event to event: the clock's own steps are coarser over long gaps.
                self.stretches.append((start_ns, start_ns + round(began.elapsed_time(ended) * 1e6)))
            self.start_ns, self.end_ns = self.stretches[0][0], self.stretches[-1][1]
        return self


class CudaClock:
    """Turns events of the device into the host's nanoseconds.

    The device tells milliseconds between two events in single precision, so that d seconds are off
    by up to d / 2**24, which is 0.06 µs for each of them: an hour after the base, neighbours would
    be a quarter of a millisecond apart or not at all. So the base follows: an event that is
    `FAR_MS` after it becomes the base. Over less than twice that, single precision has steps of
    less than a nanosecond, and rounding repairs it. What is left is at most 0.1 µs for each second
    that lies in longer gaps between the events asked for, or between an event and a base that is
    later. How far the oscillators of host and device drift apart is not corrected.
    """

    def __init__(self, cuda: Any) -> None:
        """Record where both clocks are the same, to within the time of a synchronisation."""
        self._lock = threading.Lock()
        self._base = cuda.Event(enable_timing=True)
        self._base.record()
        self._base.synchronize()
        self._base_ns = time.perf_counter_ns()

    def ns(self, event: Any) -> int:
        """Return when an event that is over happened; any thread may ask, in any order."""
        with self._lock:
            ms: float = self._base.elapsed_time(event)
            ns = self._base_ns + round(ms * 1e6)
            if ms >= FAR_MS:
                self._base, self._base_ns = event, ns
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

    def begin(self, ticket: Ticket) -> None:
        """Let the stream wait for those that it waits for."""
        assert isinstance(ticket, CudaTicket)
        for other in ticket.after:
            if not isinstance(other, CudaTicket):
                other.wait()
            elif other.error is not None:
                raise other.error
            elif other.lane != self.name:  # a stream is in order by itself
                self._stream.wait_event(other.marks[-1][1])
        ticket.marks.append((self._record(), None))
        self._pieces: list[Any] = []

    def do(self, ticket: Ticket, piece: Work) -> object:
        """Issue one piece, so few of many at once that others can still go before the rest."""
        with self._cuda.stream(self._stream):
            more = piece()
        if ticket.pieces:
            self._pieces.append(self._record())
            if len(self._pieces) == IN_DRIVER:
                self._pieces.pop(0).synchronize()
        return more

    def end(self, ticket: Ticket) -> None:
        """Note where the operation ends on the stream, or is interrupted."""
        assert isinstance(ticket, CudaTicket)
        ticket.marks[-1] = (ticket.marks[-1][0], self._record())

    def _record(self) -> Any:
        event = self._cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event


class Cuda:
    """The current CUDA device; `cpu` and `disk` are the host's, other lanes have a stream each."""

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
        self.lanes |= {"cpu": Lane("cpu", cpu_threads), "disk": Lane("disk")}

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

    def free(self, tensor: Any) -> None:
        """Do nothing: PyTorch takes back what nobody holds."""

    taken_bytes = 0
    """PyTorch counts itself."""

    def free_all(self, but: int = 0) -> None:
        """Give back what PyTorch keeps of tensors that nobody holds any more."""
        import torch

        torch.cuda.empty_cache()

    def close(self) -> None:
        """Finish what is queued."""
        for lane in self.lanes.values():
            lane.close()
