"""The verbs of `moesim.machine` on lanes that really work.

The host program runs in the caller's thread and the lanes in theirs. What an operation does is
another's business (`Doer`): here it gets a queue, what it waits for, and its line in the log, which
has the simulator's form. Pauses are no operations: the host is busy anyway.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from moesim.errors import DeadlockError, RealError
from moesim.log import OPERATION, SEGMENT
from moesim.real.device import Device
from moesim.real.lanes import BACKGROUND, URGENT, Lane, Ticket, Work
from moesim.run import Feed
from moesim.types import (
    H2D_BACKGROUND,
    KINDS,
    LANE_OF_QUEUE,
    LANES,
    QUEUES,
    FloatArray,
    IntArray,
)

PATIENCE_S = 5.0
"""After so long without anything under way on any lane, what is waited for will never come."""


class Operation(NamedTuple):
    """What was submitted; see `machine.Machine.submit`."""

    step: int
    phase: int
    queue: int
    kind: int
    layer: int
    expert: int
    batch: int
    amount: int
    context: int
    part: int
    precision: int
    slot: int
    cause: int


class Doer(Protocol):
    """What operations do, with tensors."""

    def begin(self, step: int) -> None:
        """Take up a step's tokens; on lane `gpu`."""

    def pieces(self, operation: Operation) -> Sequence[Work]:
        """Return the work of an operation, in pieces between which it may be interrupted."""

    def choice(self, step: int, layer: int, batch: int) -> tuple[Any, Any] | None:
        """Return ids and weights (tokens, top_k) that the router chose, or None to force those of
        the trace."""

    def route(self, layer: int, batch: int, ids: Any, weights: Any) -> None:
        """Take ids and weights (tokens, top_k) of a batch as the choice that counts."""

    def guess(self, guess: int, layer: int) -> tuple[Any, Any] | None:
        """Return what a predictor guesses of a layer, or None to force that of the trace."""


class Waited(NamedTuple):
    """A stretch in which the host waited for an operation."""

    ticket: int
    start_ns: int
    end_ns: int


class TorchMachine:
    """A machine of real lanes; see `machine.Machine`."""

    def __init__(self, device: Device, feed: Feed, doer: Doer) -> None:
        """Begin the clock; the lanes of the device must be idle."""
        self.lanes = device.lanes
        self.feed = feed
        self.doer = doer
        self.step = self.phase = 0
        self.tickets: list[Ticket] = []
        self.operations: list[tuple[Any, ...]] = []
        self.promoted: dict[int, int] = {}
        self.cancelled: dict[int, int] = {}
        self.waited: list[Waited] = []
        self.waited_for: set[int] = set()
        self.begin_ns = time.perf_counter_ns()

    def now_ns(self) -> int:
        """Return the time since the beginning."""
        return time.perf_counter_ns() - self.begin_ns

    def begin(self, step: int, phase: int) -> None:
        """See `Machine.begin`."""
        self.step, self.phase = step, phase
        self.check()
        self.lanes["gpu"].submit(lambda: self.doer.begin(step)).wait()

    def submit(
        self, queue: int, kind: int, layer: int, expert: int, batch: int, amount: int, context: int,
        part: int, precision: int, slot: int, cause: int, after0: int, after1: int, after2: int,
    ) -> int:  # fmt: skip
        """See `Machine.submit`."""
        operation = Operation(
            self.step, self.phase, queue, kind, layer, expert, batch, amount, context, part,
            precision, slot, cause,
        )  # fmt: skip
        number = len(self.tickets) + 1
        after = []
        for other in (after0, after1, after2):
            if other and not self.tickets[other - 1].done:
                after.append(self.tickets[other - 1])
                self.waited_for.add(other)
        self.operations.append(
            (
                number, amount, context, 0, self.now_ns(), -1, -1, (after0, after1, after2),
                self.step, slot, layer, expert, batch, part, queue, kind, precision, cause,
            )
        )  # fmt: skip
        lane = self.lanes[LANES[LANE_OF_QUEUE[queue]]]
        behind = BACKGROUND if queue == H2D_BACKGROUND else URGENT
        self.tickets.append(lane.submit(self.doer.pieces(operation), after, behind))
        return number

    def wait(self, ticket: int) -> None:
        """See `Machine.wait`."""
        if ticket == 0:
            return
        start_ns = self.now_ns()
        if ticket > len(self.tickets):
            raise DeadlockError(f"ticket {ticket} was never submitted, and cannot end")
        self.await_over(ticket)
        self.waited.append(Waited(ticket, start_ns, self.now_ns()))
        self.check()

    def await_over(self, ticket: int) -> None:
        """Block until an operation is over; raise DeadlockError when nothing moves any more."""
        waited = self.tickets[ticket - 1]
        while not waited.over_within(PATIENCE_S):
            self.check()
            if not any(lane.busy for lane in self.lanes.values()):
                raise DeadlockError(self.why_stuck(ticket))
        waited.wait()

    def check(self) -> None:
        """Raise what went wrong on a lane, as soon as anybody looks."""
        for name, lane in self.lanes.items():
            if lane.error is not None:
                raise explained(name, lane)

    def why_stuck(self, ticket: int) -> str:
        """Say what a wait without end waits for."""
        row = self.operations[ticket - 1]
        _, _, _, _, _, _, _, after, _, _, layer, expert, _, _, queue, kind, _, _ = row
        open_ones = [other for other in after if other and not self.tickets[other - 1].done]
        return (
            f"ticket {ticket} ({KINDS[kind]}, layer {layer}, expert {expert}) on queue "
            f"{QUEUES[queue]} never came: no lane does anything, and it waits for "
            f"{f'tickets {open_ones}' if open_ones else 'its lane'}"
        )

    def done(self, ticket: int) -> bool:
        """See `Machine.done`."""
        return ticket == 0 or self.tickets[ticket - 1].done

    def pause(self, ns: int) -> None:
        """Do nothing: what the pause stands for took its time."""

    def cancel(self, ticket: int) -> bool:
        """See `Machine.cancel`."""
        if ticket == 0 or ticket in self.waited_for:
            return False
        own = self.tickets[ticket - 1]
        if not self.lanes[own.lane].cancel(own):
            return False
        self.cancelled[ticket] = self.now_ns()
        return True

    def promote(self, ticket: int) -> bool:
        """See `Machine.promote`."""
        if ticket == 0:
            return False
        own = self.tickets[ticket - 1]
        if not self.lanes[own.lane].promote(own):
            return False
        self.promoted[ticket] = self.now_ns()
        return True

    def route(
        self, step: int, layer: int, batch: int, first: int, ids: IntArray, weights: FloatArray
    ) -> int:
        """See `Machine.route`."""
        begin, end = self.feed.steps.offset[step, batch : batch + 2]
        n = int(end - begin)
        chosen = self.doer.choice(step, layer, batch)
        if chosen is None:
            forced = self.feed.weights
            chosen = (
                self.feed.chosen[begin:end, layer],
                None if forced is None else forced[begin:end, layer],
            )
        else:
            self.feed.chosen[begin:end, layer], self.feed.weights[begin:end, layer] = chosen
        np.asarray(ids)[first : first + n] = chosen[0]
        if chosen[1] is not None:
            np.asarray(weights)[first : first + n] = chosen[1]
        rows = slice(first, first + n)
        self.doer.route(layer, batch, np.asarray(ids)[rows].copy(), np.asarray(weights)[rows])
        return n

    def predict(self, guess: int, step: int, layer: int, ids: IntArray, scores: FloatArray) -> int:
        """See `Machine.predict`."""
        offset = self.feed.steps.offset[step]
        begin, end = offset[0], offset[-1]
        guessed = self.doer.guess(guess, layer)
        if guessed is None:
            all_ids, all_scores = self.feed.guesses[guess]
            guessed = (
                all_ids[begin:end, layer],
                None if all_scores is None else all_scores[begin:end, layer],
            )
        else:
            width = guessed[0].shape[1]
            self.feed.guesses[guess][0][begin:end, layer, :width] = guessed[0]
        n, width = map(int, guessed[0].shape)
        np.asarray(ids)[guess, :n, :width] = guessed[0]
        if guessed[1] is not None:
            np.asarray(scores)[guess, :n, :width] = guessed[1]
        return n

    def drain(self) -> None:
        """Let everything submitted finish."""
        for number in range(1, len(self.tickets) + 1):
            self.await_over(number)
        self.check()

    def logged(self) -> tuple[Any, Any]:
        """Return operations and segments as `log.OPERATION` and `log.SEGMENT`, once all is over."""
        operations = np.array(self.operations, OPERATION)
        segments = []
        for number, ticket in enumerate(self.tickets, 1):
            ticket.wait()
            stretches = [(a - self.begin_ns, b - self.begin_ns) for a, b in ticket.stretches]
            operations["duration_ns"][number - 1] = sum(end - start for start, end in stretches)
            last = len(stretches) - 1
            segments += [(number, a, b, int(i == last)) for i, (a, b) in enumerate(stretches)]
        for field, times in (("promote_ns", self.promoted), ("cancel_ns", self.cancelled)):
            for number, at_ns in times.items():
                operations[field][number - 1] = at_ns
        found = np.array(segments, SEGMENT)
        return operations, found[np.argsort(found["end_ns"], kind="stable")]


def explained(name: str, lane: Lane) -> RealError:
    """Return what an operation raised, as one line."""
    text = " ".join(str(lane.error).split())
    return RealError(f"lane {name}: {type(lane.error).__name__}: {text}")
