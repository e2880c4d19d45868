"""The reference machine: lanes on a SimPy clock, with the rules of `moesim.machine`.

At each instant, SimPy's priorities give the order that every simulated machine keeps: completions
in lane order, then one pass that starts what can start, repeated until nothing changes, then the
host. Work is counted in ns x 1024 and done at `rate`/1024 of full speed while several lanes are
busy; time is rounded up only at the end of an operation or at a preemption.
"""

from collections import deque
from typing import Any

import numpy as np
import simpy

from moesim.costs import Costs, duration_ns, source_of
from moesim.errors import DeadlockError
from moesim.log import OPERATION, SEGMENT
from moesim.run import Feed
from moesim.sim.rules import (
    FULL_SPEED,
    TIMES,
    WAIT_CPU,
    WAIT_HOST,
    WAIT_WEIGHTS,
    Totals,
    border_left,
    chunk_count,
    jittered_ns,
    stuck,
    wait_of,
)
from moesim.types import (
    GPU,
    H2D,
    H2D_BACKGROUND,
    HEAD,
    KINDS,
    LANE_OF_QUEUE,
    LANES,
    QUEUES,
    RETURN,
    SOURCES,
    FloatArray,
    IntArray,
    as_scalars,
)

START_PASS = len(LANES)
HOST = START_PASS + 1


class Operation:
    """One submitted operation, while it is open."""

    __slots__ = (
        "after", "amount", "blockers", "cause", "chunks", "dependents", "expert", "held_up_by",
        "kind", "layer", "left", "queue", "ready_ns", "source", "start_ns", "ticket", "work",
    )  # fmt: skip

    ticket: int
    queue: int
    kind: int
    layer: int
    expert: int
    amount: int
    cause: int
    source: int
    work: int
    """ns x 1024 in all, and what is left of it."""
    left: int
    chunks: int
    """Into how many equal stretches a copy may be cut."""
    after: tuple[int, int, int]
    blockers: int
    """Operations that it still waits for."""
    held_up_by: "Operation | None"
    """The operation that it waited for and that ended last."""
    ready_ns: int
    """When it waited for nothing any more, and when it began."""
    start_ns: int
    dependents: "list[Operation]"


class Wakeup(simpy.Event):
    """An event that has its value already and waits only for its time, and its turn in it."""

    def __init__(self, machine: "SimpyMachine", lane: int, priority: int, delay: int) -> None:
        self.env = machine.env
        self.callbacks: Any = [] if lane == HOST else [machine.woken]
        self._value = None
        self._ok = True
        self.lane = lane
        machine.env.schedule(self, priority, delay)


class Clock(simpy.Environment):
    """SimPy's environment; the host passes most of its time while nothing is due."""

    def skip(self, ns: int) -> None:
        """Let so much time pass, in which and at the end of which no event is due."""
        self._now += ns


class SimpyMachine:
    """Lanes, queues and a clock; see `moesim.machine.Machine` for its verbs."""

    def __init__(
        self, costs: Costs, feed: Feed, rates: IntArray, chunk_bytes: int, *, jitter: int = 0,
        seed: int = 0, record: bool = False,
    ) -> None:  # fmt: skip
        """Make an idle machine at time 0.

        `rates` is (32, lanes): progress in 1/1024 of each lane for each bit set of busy lanes.
        `jitter` stretches each operation by up to so many 1024ths, drawn from (seed, ticket).
        `record` keeps the full log.
        """
        self.env: Any = Clock(initial_time=0)  # all delays are int, and so is its clock
        self.costs = costs
        self.feed = feed
        shared: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.rates = [shared.setdefault(row, row) for row in map(tuple, rates.tolist())]
        self.rate = self.rates[0]
        self.chunk_bytes = chunk_bytes
        self.jitter = jitter
        self.seed = seed
        self.record = record
        self.step = 0
        self.phase = 0
        self.tickets = 0
        self.open: dict[int, Operation] = {}
        self.queues: list[deque[Operation]] = [deque() for _ in QUEUES]
        self.running: list[Operation | None] = [None for _ in LANES]
        self.events: list[Wakeup | None] = [None for _ in LANES]
        self.since = [0 for _ in LANES]
        self.started = [0 for _ in LANES]
        self.border = -1
        self.busy_set = 0
        self.passing = False
        self.charged = 0
        self.time_ns = [0] * TIMES
        self.busy_ns = [0 for _ in LANES]
        self.source_ns = [0 for _ in SOURCES]
        self.copied = np.zeros((len(KINDS), 4), np.int64)
        self.copied_items = as_scalars(self.copied)
        self.heads: list[Totals] = []
        self.preemptions = 0
        self.paused_ns = 0
        self.operations: dict[int, list[Any]] = {}
        self.segments: list[tuple[int, int, int, int]] = []

    # The verbs.

    def begin(self, step: int, phase: int) -> None:
        """See `Machine.begin`."""
        self.step = step
        self.phase = phase

    def submit(
        self, queue: int, kind: int, layer: int, expert: int, batch: int, amount: int, context: int,
        part: int, precision: int, slot: int, cause: int, after0: int, after1: int, after2: int,
    ) -> int:  # fmt: skip
        """See `Machine.submit`."""
        self.tickets = ticket = self.tickets + 1
        ns = self.alone_ns(ticket, kind, layer, amount, context, part, precision)
        op = Operation()
        op.ticket = ticket
        op.queue = queue
        op.kind = kind
        op.layer = layer
        op.expert = expert
        op.amount = amount
        op.cause = cause
        op.source = source_of(self.costs, kind, amount, precision)
        ns = jittered_ns(ns, self.jitter, self.seed, ticket)
        op.work = op.left = ns * FULL_SPEED
        op.chunks = chunk_count(queue, amount, self.chunk_bytes, op.work)
        op.after = (after0, after1, after2)
        op.blockers = 0
        op.held_up_by = None
        op.ready_ns = self.env.now
        op.dependents = []
        for after in op.after:
            blocker = self.open.get(after) if after else None
            if blocker is not None:
                blocker.dependents.append(op)
                op.blockers += 1
        self.open[ticket] = op
        if self.record:
            self.operations[ticket] = [
                ticket, amount, context, ns, self.env.now, -1, -1,
                (after0, after1, after2), self.step, slot, layer, expert, batch, part, queue, kind,
                precision, cause,
            ]  # fmt: skip
        waiting = self.queues[queue]
        waiting.append(op)
        if op.blockers == 0 and len(waiting) == 1:
            self.start_what_can(LANE_OF_QUEUE[queue])
        return ticket

    def alone_ns(
        self, ticket: int, kind: int, layer: int, amount: int, context: int, part: int,
        precision: int,
    ) -> int:  # fmt: skip
        """Return how long an operation takes when nothing else is busy, and without jitter."""
        return duration_ns(self.costs, self.phase, kind, layer, amount, context, part, precision)

    def wait(self, ticket: int) -> None:
        """See `Machine.wait`."""
        op = self.open.get(ticket)
        if op is None:
            if ticket > self.tickets:
                raise DeadlockError(f"ticket {ticket} was never submitted, and cannot end")
            return
        env = self.env
        step = env.step
        opened = self.open
        try:
            while ticket in opened:
                step()
        except simpy.core.EmptySchedule:
            raise DeadlockError(self.why_stuck(op)) from None
        while env.peek() == env.now:
            step()
        if self.running[GPU] is None and not self.queues[GPU]:
            self.charge(wait_of(op.kind))

    def done(self, ticket: int) -> bool:
        """See `Machine.done`."""
        return ticket not in self.open

    def pause(self, ns: int) -> None:
        """See `Machine.pause`."""
        env = self.env
        begun = env.now
        if env.peek() > begun + ns:
            env.skip(ns)
        else:
            event = Wakeup(self, HOST, HOST, ns)
            while event.callbacks is not None:
                env.step()
        self.paused_ns += ns
        if self.record and ns > 0:
            self.segments.append((0, begun, env.now, 1))
        if self.running[GPU] is None and not self.queues[GPU]:
            self.charge(WAIT_HOST)

    def cancel(self, ticket: int) -> bool:
        """See `Machine.cancel`."""
        op = self.open.get(ticket)
        if op is None or op.dependents or op.left < op.work or op in self.running:
            return False
        self.queues[op.queue].remove(op)
        for after in op.after:
            if after in self.open:
                self.open[after].dependents.remove(op)
        del self.open[ticket]
        if self.record:
            self.operations[ticket][6] = self.env.now
        self.start_what_can(LANE_OF_QUEUE[op.queue])
        return True

    def promote(self, ticket: int) -> bool:
        """See `Machine.promote`."""
        op = self.open.get(ticket)
        if op is None or op.queue != H2D_BACKGROUND or op.blockers or op is self.running[H2D]:
            return False
        if any(ahead.blockers for ahead in self.queues[H2D]):
            return False  # It would wait behind a copy that may itself wait for it.
        self.queues[H2D_BACKGROUND].remove(op)
        op.queue = H2D
        self.queues[H2D].append(op)
        if self.record:
            self.operations[ticket][5] = self.env.now
        self.start_what_can(H2D)
        return True

    def route(
        self, step: int, layer: int, batch: int, first: int, ids: IntArray, weights: FloatArray
    ) -> int:
        """See `Machine.route`."""
        begin, end = self.feed.steps.offset[step, batch : batch + 2]
        n = int(end - begin)
        np.asarray(ids)[first : first + n] = self.feed.chosen[begin:end, layer]
        if self.feed.weights is not None:
            np.asarray(weights)[first : first + n] = self.feed.weights[begin:end, layer]
        return n

    def predict(self, guess: int, step: int, layer: int, ids: IntArray, scores: FloatArray) -> int:
        """See `Machine.predict`."""
        guessed, score = self.feed.guesses[guess]
        offset = self.feed.steps.offset[step]
        begin, end = offset[0], offset[-1]
        n = int(end - begin)
        width = guessed.shape[2]
        np.asarray(ids)[guess, :n, :width] = guessed[begin:end, layer]
        if score is not None:
            np.asarray(scores)[guess, :n, :width] = score[begin:end, layer]
        return n

    # The lanes.

    def ready(self, queue: int) -> Operation | None:
        """Return the head of a queue if it waits for nothing."""
        waiting = self.queues[queue]
        return waiting[0] if waiting and waiting[0].blockers == 0 else None

    def start_pass(self) -> None:
        """Start what can start, in lane order, once all that ends in this instant has ended."""
        queues = self.queues
        for lane, op in enumerate(self.running):
            if (op is None and queues[lane]) or (
                lane == H2D and (queues[lane] or queues[H2D_BACKGROUND])
            ):
                self.start_what_can(lane)

    def start_what_can(self, lane: int) -> None:
        """Start the next operation of a lane, or aim at the border where it will be preempted."""
        running = self.running[lane]
        if running is None:
            waiting = self.queues[lane]
            if waiting and waiting[0].blockers == 0:
                self.start(lane, waiting[0])
            elif lane == H2D and (background := self.ready(H2D_BACKGROUND)) is not None:
                self.start(lane, background)
        elif (
            lane == H2D
            and self.border < 0
            and running.queue == H2D_BACKGROUND
            and self.ready(H2D) is not None
        ):
            self.settle(H2D)
            just_started = self.started[H2D] == self.env.now
            self.border = border_left(running.work, running.left, running.chunks, just_started)
            if self.border > 0:
                self.aim(H2D)

    def start(self, lane: int, op: Operation) -> None:
        """Put an operation on its lane."""
        now = self.env.now
        self.queues[op.queue].popleft()
        if lane == GPU:
            self.charge_wait(op.held_up_by)
        op.held_up_by = None  # else a chain of operations that are done stays in memory
        op.start_ns = now
        self.running[lane] = op
        self.started[lane] = self.since[lane] = now
        self.busy_set |= 1 << lane
        if lane == H2D:
            self.border = -1
        if self.rates[self.busy_set] is not self.rate:
            self.change_rates()
        self.events[lane] = Wakeup(self, lane, lane, -(-op.left // self.rate[lane]))

    def stop(self, lane: int, op: Operation, done: int) -> None:
        """Take an operation off its lane, done or preempted."""
        now = self.env.now
        self.busy_ns[lane] += now - self.started[lane]
        if self.record:
            self.segments.append((op.ticket, self.started[lane], now, done))
        self.running[lane] = None
        self.events[lane] = None
        self.busy_set &= ~(1 << lane)
        if self.rates[self.busy_set] is not self.rate:
            self.change_rates()
        if self.env.peek() > now:
            self.start_pass()
        elif not self.passing:
            self.passing = True
            Wakeup(self, START_PASS, START_PASS, 0)

    def settle(self, lane: int) -> None:
        """Count the work done since the rate last changed."""
        op = self.running[lane]
        now = self.env.now
        if op is not None and now > self.since[lane]:
            op.left -= (now - self.since[lane]) * self.rate[lane]
        self.since[lane] = now

    def change_rates(self) -> None:
        """Let every lane go on at the speed that the lanes now busy leave it."""
        rates = self.rates[self.busy_set]
        before = self.rate
        changed = [
            lane
            for lane in range(len(LANES))
            if rates[lane] != before[lane] and self.events[lane] is not None
        ]
        for lane in changed:
            self.settle(lane)
        self.rate = rates
        for lane in changed:
            self.aim(lane)

    def aim(self, lane: int) -> None:
        """Schedule the end of what a lane does, or the border at which it is preempted."""
        op = self.running[lane]
        if op is not None:
            target = self.border if lane == H2D and self.border > 0 else 0
            delay = -(-max(0, op.left - target) // self.rate[lane])
            self.events[lane] = Wakeup(self, lane, lane, delay)

    def woken(self, event: Any) -> None:
        """Handle an event of the clock: a completion, a border, or the start pass."""
        lane = event.lane
        if lane == START_PASS:
            self.passing = False
            self.start_pass()
        elif event is self.events[lane]:
            op = self.running[lane]
            if op is None:
                return
            if lane == H2D and self.border > 0:
                self.settle(lane)
                self.pass_border(op)
            else:
                self.complete(lane, op)

    def pass_border(self, op: Operation) -> None:
        """Preempt a background copy, unless nobody urgent is ready any more."""
        border = self.border
        self.border = -1
        if self.ready(H2D) is None:
            self.aim(H2D)
            return
        op.left = border
        self.preemptions += 1
        self.queues[H2D_BACKGROUND].appendleft(op)
        self.stop(H2D, op, 0)

    def complete(self, lane: int, op: Operation) -> None:
        """Finish an operation and release what waits for it."""
        op.left = 0
        now = self.env.now
        del self.open[op.ticket]
        for dependent in op.dependents:
            dependent.blockers -= 1
            dependent.held_up_by = op
            dependent.ready_ns = now
        self.source_ns[op.source] += op.work // FULL_SPEED
        if lane == GPU:
            self.charge(op.kind)
        else:
            self.copied_items[op.kind, op.cause] += op.amount
        self.stop(lane, op, 1)
        if op.kind == HEAD:
            self.heads.append(self.totals())

    # What it adds up to.

    def charge(self, what: int, until: int = -1) -> None:
        """Account for the time of the GPU lane since it was last accounted for."""
        now = self.env.now if until < 0 else until
        if now > self.charged:
            self.time_ns[what] += now - self.charged
            self.charged = now

    def charge_wait(self, blocker: Operation | None) -> None:
        """Account for the time in which the GPU waited for an operation, which has just ended.

        Results of the CPU may be ready and queue for the link behind copies of weights: that is
        waiting for weights.
        """
        if blocker is None:
            self.charge(WAIT_HOST)
            return
        if blocker.kind == RETURN:
            self.charge(WAIT_CPU, blocker.ready_ns)
            self.charge(WAIT_WEIGHTS, blocker.start_ns)
        self.charge(wait_of(blocker.kind))

    def totals(self) -> Totals:
        """Return the sums so far."""
        now = self.env.now
        busy = tuple(
            self.busy_ns[lane] + (now - self.started[lane] if self.running[lane] else 0)
            for lane in range(len(LANES))
        )
        return Totals(now, tuple(self.time_ns), busy, self.copied.copy(), tuple(self.source_ns))

    def drain(self) -> None:
        """Let everything submitted finish; what cannot is a deadlock."""
        while self.open:
            self.wait(next(iter(self.open)))

    def why_stuck(self, op: Operation) -> str:
        """Say what a wait without end waits for."""
        waits = [t for t, other in self.open.items() if op in other.dependents]
        head = self.queues[op.queue][0]
        return stuck(
            op.ticket, op.kind, op.layer, op.expert, op.queue, waits, (head.ticket, head.kind)
        )

    def logged(self) -> tuple[Any, Any]:
        """Return the recorded operations and segments as arrays of `log.OPERATION`, `SEGMENT`."""
        operations = np.array([tuple(row) for row in self.operations.values()], OPERATION)
        return operations, np.array(self.segments, SEGMENT)
