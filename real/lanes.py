"""Lanes of a real machine: queues of work, each done by a thread of its own.

A lane does one operation at a time and begins one when all that it waits for is over. A queue is in
order of submission. A lane may have two: what is ready in the urgent one goes first, and an
operation of the background one that consists of several pieces makes way between two of them.
Every operation notes when it ran, on one clock for all lanes.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType

from moesim.errors import RealError

Work = Callable[[], object]
"""A piece of an operation. If it returns a list, that holds more pieces, which are done next."""

URGENT, BACKGROUND = 0, 1
"""Queues of a lane."""


class Ticket:
    """One submitted operation."""

    __slots__ = (
        "_over", "after", "cancelled", "end_ns", "error", "lane", "pieces", "queue", "start_ns",
        "stretches", "waiting",
    )  # fmt: skip

    def __init__(self, lane: str) -> None:
        """Name the lane that does it."""
        self.lane = lane
        self.start_ns = 0
        """When it began, by `time.perf_counter_ns`; as `end_ns`, right once it is over."""
        self.end_ns = 0
        self.stretches: list[tuple[int, int]] = []
        """From when to when it was worked on, as often as it was taken up; right once it is over.
        """
        self.error: BaseException | None = None
        self.cancelled = False
        self.queue = URGENT
        self.pieces: list[Work] = []
        """What is left to be done."""
        self.after: Sequence[Ticket] = ()
        self.waiting: list[Lane] = []
        """Lanes on which something waits for this."""
        self._over = threading.Event()

    @property
    def done(self) -> bool:
        """Whether it is over."""
        return self._over.is_set()

    @property
    def let_go(self) -> bool:
        """Whether what waits for it may be taken up; a device keeps the order from there on."""
        return self._over.is_set()

    @property
    def ready(self) -> bool:
        """Whether all that it waits for lets it go."""
        return all(other.let_go for other in self.after)

    def wait(self) -> "Ticket":
        """Block until it is over; raise what it raised."""
        self._over.wait()
        if self.error is not None:
            raise self.error
        return self

    def over_within(self, seconds: float) -> bool:
        """Block until others may be taken up behind it, but not for longer; say if it came."""
        return self._over.wait(seconds)

    @property
    def ns(self) -> int:
        """How long it took, from its beginning to its end."""
        return self.end_ns - self.start_ns

    def finish(self) -> None:
        """Let those go on that wait for it."""
        self.after = ()  # else each would hold all that ever went before it
        self._over.set()
        for lane in tuple(self.waiting):
            lane.look()


class Lane:
    """Queues and their thread; `threads` are what torch's kernels may use in it."""

    def __init__(self, name: str, threads: int = 1) -> None:
        """Start the thread."""
        self.name = name
        self.threads = threads
        self.error: BaseException | None = None
        """The first that an operation raised."""
        self.busy = False
        """Whether an operation is under way."""
        self._queues: tuple[deque[Ticket], ...] = (deque(), deque())
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name=f"lane-{name}", daemon=True)
        self._thread.start()

    def submit(
        self, work: Work | Sequence[Work], after: Sequence[Ticket] = (), queue: int = URGENT
    ) -> Ticket:
        """Queue an operation, of one piece or several, that begins when all of `after` is over.

        If one of those failed it is not done, and fails with the same error. Raises RealError once
        the lane is closed.
        """
        ticket = self.ticket()
        ticket.queue = queue
        ticket.pieces = [work] if callable(work) else list(work)
        ticket.after = after
        for other in after:
            if not other.let_go:
                other.waiting.append(self)
        with self._changed:
            if self._closing:
                raise RealError(f"lane {self.name} is closed and takes no more operations")
            self._queues[queue].append(ticket)
            self._changed.notify()
        return ticket

    def ticket(self) -> Ticket:
        """Return the ticket of an operation to be queued."""
        return Ticket(self.name)

    def cancel(self, ticket: Ticket) -> bool:
        """Take back an operation that has not begun, which then counts as over; say if it did."""
        with self._changed:
            queue = self._queues[ticket.queue]
            if ticket not in queue or ticket.stretches:
                return False
            queue.remove(ticket)
            ticket.cancelled = True
            self._changed.notify()
        ticket.finish()
        return True

    def promote(self, ticket: Ticket) -> bool:
        """Put a background operation that is not under way behind the urgent ones; say if it did.

        Not one that waits for something, nor while an urgent one does.
        """
        with self._changed:
            urgent, background = self._queues
            if ticket not in background or not ticket.ready:
                return False
            if not all(other.ready for other in urgent):
                return False
            background.remove(ticket)
            ticket.queue = URGENT
            urgent.append(ticket)
            self._changed.notify()
        return True

    def drop(self) -> None:
        """Take back all that has not begun, wait for what is under way, and forget errors."""
        while True:
            with self._changed:
                open_ones = [ticket for queue in self._queues for ticket in queue]
                for queue in self._queues:
                    queue.clear()
            for ticket in open_ones:
                ticket.cancelled = True
                ticket.finish()
            if not open_ones and not self.busy:
                break
            time.sleep(0.001)
        self.error = None

    def look(self) -> None:
        """See whether something can begin; to be called when something is over on another lane."""
        with self._changed:
            self._changed.notify()

    def begin(self, ticket: Ticket) -> None:
        """Begin an operation, or go on with it, when those that it waits for are over."""
        for other in ticket.after:
            other.wait()
        start_ns = time.perf_counter_ns()
        ticket.start_ns = ticket.start_ns or start_ns
        ticket.stretches.append((start_ns, start_ns))

    def do(self, ticket: Ticket, piece: Work) -> object:
        """Do one piece of an operation, and return what it returns."""
        return piece()

    def end(self, ticket: Ticket) -> None:
        """End an operation, or interrupt it."""
        ticket.end_ns = time.perf_counter_ns()
        ticket.stretches[-1] = (ticket.stretches[-1][0], ticket.end_ns)

    def close(self) -> None:
        """Finish what is queued, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
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
        while (ticket := self._next()) is not None:
            try:
                self.begin(ticket)
                while ticket.pieces:
                    more = self.do(ticket, ticket.pieces.pop(0))
                    if isinstance(more, list):
                        ticket.pieces[:0] = more
                    if ticket.pieces and self._overtaken(ticket):
                        break
                self.end(ticket)
            except BaseException as error:
                ticket.error = error
                ticket.pieces = []
                self.error = self.error or error
            if ticket.pieces:
                with self._changed:
                    self._queues[ticket.queue].appendleft(ticket)
            else:
                ticket.finish()
            self.busy = False
            del ticket  # what it holds may be large

    def _next(self) -> Ticket | None:
        """Return what to do next, when there is something; None at the end."""
        with self._changed:
            while True:
                for queue in self._queues:
                    if queue and queue[0].ready:
                        self.busy = True
                        return queue.popleft()
                if self._closing and not any(self._queues):
                    return None
                self._changed.wait()

    def _overtaken(self, ticket: Ticket) -> bool:
        """Return whether an urgent operation is ready while a background one is under way."""
        if ticket.queue == URGENT:
            return False
        with self._changed:
            urgent = self._queues[URGENT]
            return bool(urgent) and urgent[0].ready


def back_to_back(lane: Lane, works: Sequence[Work]) -> list[Ticket]:
    """Do operations on a lane that has all of them queued before it begins the first."""
    go = threading.Event()
    lane.submit(go.wait)
    try:
        tickets = [lane.submit(work) for work in works]
    finally:
        go.set()
    # The last one first: a thread that woke up after each would take Python from the lane.
    tickets[-1].wait()
    return [ticket.wait() for ticket in tickets]


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
