"""Lanes of a real machine: in-order queues of work, each done by a thread of its own.

A lane does one operation at a time, in the order of submission, and begins one when all that it
waits for is over. Every operation notes when it ran, on one clock for all lanes.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

Work = Callable[[], object]


class Ticket:
    """One submitted operation."""

    __slots__ = ("_over", "end_ns", "error", "lane", "start_ns")

    def __init__(self, lane: str) -> None:
        """Name the lane that does it."""
        self.lane = lane
        self.start_ns = 0
        """When it began, by `time.perf_counter_ns`; as `end_ns`, right once it is over."""
        self.end_ns = 0
        self.error: BaseException | None = None
        self._over = threading.Event()

    @property
    def done(self) -> bool:
        """Whether it is over."""
        return self._over.is_set()

    def wait(self) -> "Ticket":
        """Block until it is over; raise what it raised."""
        self._over.wait()
        if self.error is not None:
            raise self.error
        return self

    @property
    def ns(self) -> int:
        """How long it took."""
        return self.end_ns - self.start_ns

    def finish(self) -> None:
        """Let those go on that wait for it."""
        self._over.set()


class Lane:
    """A queue and its thread; `threads` are what torch's kernels may use in it."""

    def __init__(self, name: str, threads: int = 1) -> None:
        """Start the thread."""
        self.name = name
        self.threads = threads
        self._queue: queue.SimpleQueue[tuple[Ticket, Work, Sequence[Ticket]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._serve, name=f"lane-{name}", daemon=True)
        self._thread.start()

    def submit(self, work: Work, after: Sequence[Ticket] = ()) -> Ticket:
        """Queue an operation that begins when the lane is free and all of `after` is over.

        If one of those failed it is not done, and fails with the same error.
        """
        ticket = self.ticket()
        self._queue.put((ticket, work, after))
        return ticket

    def ticket(self) -> Ticket:
        """Return the ticket of an operation to be queued."""
        return Ticket(self.name)

    def do(self, ticket: Ticket, work: Work, after: Sequence[Ticket]) -> None:
        """Do one operation, when those that it waits for are over."""
        for other in after:
            other.wait()
        ticket.start_ns = time.perf_counter_ns()
        work()
        ticket.end_ns = time.perf_counter_ns()

    def finish(self, ticket: Ticket) -> None:
        """Let those go on that wait for an operation, whether it was done or failed."""
        ticket.finish()

    def close(self) -> None:
        """Finish what is queued, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def __enter__(self) -> "Lane":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def _serve(self) -> None:
        import torch

        torch.get_num_threads()  # a thread's first call takes over the process's number
        torch.set_num_threads(self.threads)
        while (item := self._queue.get()) is not None:
            ticket, work, after = item
            try:
                self.do(ticket, work, after)
            except BaseException as error:
                ticket.error = error
            self.finish(ticket)
            del item, work, after  # what it holds may be large


def overlap_ns(first: Sequence[Ticket], second: Sequence[Ticket]) -> int:
    """Return how long both lanes were busy at once, going through what each has done in order."""
    both = 0
    i = j = 0
    while i < len(first) and j < len(second):
        start = max(first[i].start_ns, second[j].start_ns)
        end = min(first[i].end_ns, second[j].end_ns)
        both += max(0, end - start)
        if first[i].end_ns <= second[j].end_ns:
            i += 1
        else:
            j += 1
    return both
