"""The fast machine: the rules of `moesim.machine` over lanes held in arrays.

It does, to the nanosecond, what the SimPy machine does. It is plain Python in the subset that Numba
compiles: `sim.engine` compiles it together with the host program, and the tests run it as it
stands, too.

An instant is: completions in lane order, then one pass that starts what can start, repeated until
nothing changes, then the host. Operations are rows of one table; queues, and the lists of what
waits for an operation, are links between rows.
"""

from typing import Any, NamedTuple

import numpy as np

from moesim.costs import Costs, duration_ns, source_of
from moesim.errors import DeadlockError
from moesim.log import OPERATION, SEGMENT
from moesim.machine import wait
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
    CAUSES,
    GPU,
    H2D,
    H2D_BACKGROUND,
    HEAD,
    KINDS,
    LANE_OF_QUEUE,
    LANES,
    NONE,
    QUEUES,
    RETURN,
    SOURCES,
    FloatArray,
    IntArray,
)

NEVER = 1 << 62
"""When an idle lane is done."""
LANE_COUNT = len(LANES)

(
    NOW,
    STEP,
    PHASE,
    TICKETS,  # submitted so far
    CHARGED,  # until when the time of the GPU lane is accounted for
    BUSY_SET,
    SPEED,  # row of `rates` in force
    BORDER,  # work left where the running copy will be preempted; below 0: not known
    PREEMPTIONS,
    PAUSED_NS,
    FREE,  # first row given back; 0 for none
    ROWS,  # rows ever used; row 0 is nobody's
    HEADS,
    SEGMENTS,
    STUCK,  # the ticket of a wait without end
    STATES,
) = range(16)

RUNNING, END, SINCE, STARTED, BUSY = range(5)
"""Of a lane: its row of `ops`, when that ends or is preempted, since when it has its speed."""

FIRST, LAST = 0, 1
"""Of a queue."""

(
    TICKET,  # 0: nobody's row
    QUEUE,
    KIND,
    LAYER,
    EXPERT,
    AMOUNT,
    CAUSE,
    SOURCE,
    WORK,  # ns x 1024 in all, and what is left of it
    LEFT,
    CHUNKS,
    BLOCKERS,  # operations that it still waits for
    READY_NS,  # when it waited for nothing any more, and when it began
    START_NS,
    HELD_UP_KIND,  # of the operation that it waited for and that ended last; NONE for none
    HELD_UP_READY_NS,
    HELD_UP_START_NS,
    BEHIND,  # the next row of its queue, or of the free rows
    BEFORE,
    WAITING,  # the first link of those that wait for it
    AFTER,  # three tickets, and for each the next link of those that wait for the same
    AFTER_2,
    AFTER_3,
    LINK,
    LINK_2,
    LINK_3,
    COLUMNS,
) = range(27)
"""Of an operation. The link of row r to its i-th ticket is 3 r + i + 1; 0 ends a list."""

LOGGED = (
    "ticket", "amount", "context", "duration_ns", "submit_ns", "promote_ns", "cancel_ns", "after",
    "after_2", "after_3", "step", "slot", "layer", "expert", "batch", "part", "queue", "kind",
    "precision", "cause",
)  # fmt: skip
PROMOTE_NS, CANCEL_NS = LOGGED.index("promote_ns"), LOGGED.index("cancel_ns")

OPS, RING, OPERATIONS, SEGMENT_ROWS = range(4)
GROWING = ("ops", "ring", "operations", "segments")
"""Tables that grow."""


class Lanes(NamedTuple):
    """Lanes, queues and a clock; see `moesim.machine.Machine` for its verbs."""

    costs: Costs
    offset: IntArray
    """(steps, batches + 1): rows of the feed."""
    chosen: Any
    """(rows, layers, top_k) int16."""
    weights: Any
    """(rows, layers, top_k) uint16: the bits of float16; no rows if all are equal."""
    halves: FloatArray
    """(65536,): what each pattern of 16 bits means."""
    guessed: Any
    """(predictions, rows, layers, width) int16."""
    guess_scores: Any
    """(predictions, rows, layers, width) float32."""
    state: IntArray
    lanes: IntArray
    """(lanes, 5)."""
    queues: IntArray
    """(queues, 2): rows of `ops`; 0 for none."""
    ops: IntArray
    """(rows, COLUMNS): operations that are open."""
    ring: IntArray
    """(a power of 2,): the row of each open ticket, by its last bits."""
    rates: IntArray
    """(32, lanes): progress in 1/1024 of each lane for each bit set of busy lanes."""
    same_rates: IntArray
    """(32,): the first of the rows of `rates` that are equal."""
    time_ns: IntArray
    """(TIMES,)."""
    source_ns: IntArray
    """(sources,)."""
    copied: IntArray
    """(kinds, causes)."""
    heads: IntArray
    """(steps, ...): the totals at the end of each HEAD, one after another as in `Totals`."""
    operations: IntArray
    """(operations, LOGGED): the log, if it is kept."""
    segments: IntArray
    """(segments, 4): as in `log.SEGMENT`."""
    chunk_bytes: int
    jitter: int
    seed: int
    record: int
    callback: int
    """Where compiled code finds `grow`."""

    def begin(self, step: int, phase: int) -> None:
        """See `Machine.begin`."""
        self.state[STEP] = step
        self.state[PHASE] = phase

    def submit(
        self, queue: int, kind: int, layer: int, expert: int, batch: int, amount: int, context: int,
        part: int, precision: int, slot: int, cause: int, after0: int, after1: int, after2: int,
    ) -> int:  # fmt: skip
        """See `Machine.submit`."""
        s = self.state
        ticket: int = s[TICKETS] + 1
        s[TICKETS] = ticket
        now = s[NOW]
        ns = duration_ns(self.costs, s[PHASE], kind, layer, amount, context, part, precision)
        ns = jittered_ns(ns, self.jitter, self.seed, ticket)
        row = new_row(self, ticket)
        op = self.ops[row]
        op[TICKET] = ticket
        op[QUEUE] = queue
        op[KIND] = kind
        op[LAYER] = layer
        op[EXPERT] = expert
        op[AMOUNT] = amount
        op[CAUSE] = cause
        op[SOURCE] = source_of(self.costs, kind, amount, precision)
        op[WORK] = ns * FULL_SPEED
        op[LEFT] = ns * FULL_SPEED
        op[CHUNKS] = chunk_count(queue, amount, self.chunk_bytes, ns * FULL_SPEED)
        op[READY_NS] = now
        op[HELD_UP_KIND] = NONE
        op[WAITING] = 0
        op[BLOCKERS] = 0
        wait_for(self, row, 0, after0)
        wait_for(self, row, 1, after1)
        wait_for(self, row, 2, after2)
        if self.record:
            log_operation(
                self, ticket, amount, context, ns, after0, after1, after2, slot, layer, expert,
                batch, part, queue, kind, precision, cause,
            )  # fmt: skip
        append(self, queue, row)
        if op[BLOCKERS] == 0 and self.queues[queue, FIRST] == row:
            start_what_can(self, LANE_OF_QUEUE[queue])
        return ticket

    def wait(self, ticket: int) -> None:
        """See `Machine.wait`."""
        s = self.state
        row = row_of(self, ticket)
        if row == 0:
            if ticket > s[TICKETS]:
                fail_stuck(self, ticket)
            return
        kind = self.ops[row, KIND]
        while self.ops[row, TICKET] == ticket:
            end = next_end(self)
            if end == NEVER:
                fail_stuck(self, ticket)
            pass_instant(self, end)
        if gpu_has_nothing(self):
            charge(self, wait_of(kind), s[NOW])

    def done(self, ticket: int) -> bool:
        """See `Machine.done`."""
        return row_of(self, ticket) == 0

    def pause(self, ns: int) -> None:
        """See `Machine.pause`."""
        s = self.state
        begun = s[NOW]
        until = begun + ns
        end = next_end(self)
        while end <= until:
            pass_instant(self, end)
            end = next_end(self)
        s[NOW] = until
        s[PAUSED_NS] += ns
        if self.record and ns > 0:
            log_segment(self, 0, begun, until, 1)
        if gpu_has_nothing(self):
            charge(self, WAIT_HOST, until)

    def cancel(self, ticket: int) -> bool:
        """See `Machine.cancel`."""
        row = row_of(self, ticket)
        if row == 0:
            return False
        op = self.ops[row]
        lane = LANE_OF_QUEUE[op[QUEUE]]
        if op[WAITING] > 0 or op[LEFT] < op[WORK] or self.lanes[lane, RUNNING] == row:
            return False
        remove(self, row)
        for i in range(3):
            forget_wait(self, row, i)
        give_back(self, row)
        if self.record:
            self.operations[ticket - 1, CANCEL_NS] = self.state[NOW]
        start_what_can(self, lane)
        return True

    def promote(self, ticket: int) -> bool:
        """See `Machine.promote`."""
        row = row_of(self, ticket)
        if row == 0:
            return False
        op = self.ops[row]
        if op[QUEUE] != H2D_BACKGROUND or op[BLOCKERS] > 0 or self.lanes[H2D, RUNNING] == row:
            return False
        ahead = self.queues[H2D, FIRST]
        while ahead > 0:
            if self.ops[ahead, BLOCKERS] > 0:
                return False  # It would wait behind a copy that may itself wait for it.
            ahead = self.ops[ahead, BEHIND]
        remove(self, row)
        op[QUEUE] = H2D
        append(self, H2D, row)
        if self.record:
            self.operations[ticket - 1, PROMOTE_NS] = self.state[NOW]
        start_what_can(self, H2D)
        return True

    def route(
        self, step: int, layer: int, batch: int, first: int, ids: IntArray, weights: FloatArray
    ) -> int:
        """See `Machine.route`."""
        begin = self.offset[step, batch]
        tokens: int = self.offset[step, batch + 1] - begin
        for t in range(tokens):
            for k in range(self.chosen.shape[2]):
                ids[first + t, k] = self.chosen[begin + t, layer, k]
                if len(self.weights) > 0:
                    weights[first + t, k] = self.halves[self.weights[begin + t, layer, k]]
        return tokens

    def predict(self, guess: int, step: int, layer: int, ids: IntArray, scores: FloatArray) -> int:
        """See `Machine.predict`."""
        begin = self.offset[step, 0]
        tokens: int = self.offset[step, self.offset.shape[1] - 1] - begin
        for t in range(tokens):
            for k in range(self.guessed.shape[3]):
                ids[guess, t, k] = self.guessed[guess, begin + t, layer, k]
                scores[guess, t, k] = self.guess_scores[guess, begin + t, layer, k]
        return tokens


def new_row(machine: Lanes, ticket: int) -> int:
    """Return a free row of `ops`, under which a new ticket is found from now on."""
    s = machine.state
    row: int = s[FREE]
    if row > 0:
        s[FREE] = machine.ops[row, BEHIND]
    else:
        row = s[ROWS]
        if row == len(machine.ops):
            enlarge(machine, OPS)
        s[ROWS] = row + 1
    bits = len(machine.ring) - 1
    other = machine.ops[machine.ring[ticket & bits], TICKET]
    if other > 0 and (other & bits) == (ticket & bits):
        enlarge(machine, RING)
        bits = len(machine.ring) - 1
    machine.ring[ticket & bits] = row
    return row


def give_back(machine: Lanes, row: int) -> None:
    """Let a row be used again."""
    machine.ops[row, TICKET] = 0
    machine.ops[row, BEHIND] = machine.state[FREE]
    machine.state[FREE] = row


def row_of(machine: Lanes, ticket: int) -> int:
    """Return the row of an open operation; 0 for one that is done, was taken back, or never was."""
    row: int = machine.ring[ticket & (len(machine.ring) - 1)]
    return row if machine.ops[row, TICKET] == ticket and ticket > 0 else 0


def enlarge(machine: Lanes, table: int) -> None:
    """Double a table that is full."""
    if grow(machine, table) == 0:
        raise MemoryError


def grow(machine: Lanes, table: int) -> int:
    """Double a table where it is; return 1. Compiled code calls back for this.

    A longer ring is filled anew, and doubled until no two open tickets share a place.
    """
    found = getattr(machine, GROWING[table])
    found.resize((2 * len(found), *found.shape[1:]), refcheck=False)
    if table == RING:
        opened = np.flatnonzero(machine.ops[:, TICKET])
        places = machine.ops[opened, TICKET] & (len(found) - 1)
        if len(np.unique(places)) < len(places):
            return grow(machine, table)
        found[:] = 0
        found[places] = opened
    return 1


# What waits for what, and what is behind what.


def wait_for(machine: Lanes, row: int, i: int, ticket: int) -> None:
    """Let an operation wait for the i-th of its tickets."""
    op = machine.ops[row]
    op[AFTER + i] = ticket
    other = row_of(machine, ticket)
    if other > 0:
        op[LINK + i] = machine.ops[other, WAITING]
        machine.ops[other, WAITING] = 3 * row + i + 1
        op[BLOCKERS] += 1


def forget_wait(machine: Lanes, row: int, i: int) -> None:
    """Take an operation out of the list of those that wait for the i-th of its tickets."""
    other = row_of(machine, machine.ops[row, AFTER + i])
    if other == 0:
        return
    gone = 3 * row + i + 1
    link = machine.ops[other, WAITING]
    if link == gone:
        machine.ops[other, WAITING] = machine.ops[row, LINK + i]
    while link > 0 and link != gone:
        at, j = (link - 1) // 3, (link - 1) % 3
        link = machine.ops[at, LINK + j]
        if link == gone:
            machine.ops[at, LINK + j] = machine.ops[row, LINK + i]


def append(machine: Lanes, queue: int, row: int) -> None:
    """Put an operation at the end of a queue."""
    last = machine.queues[queue, LAST]
    machine.ops[row, BEFORE] = last
    machine.ops[row, BEHIND] = 0
    if last > 0:
        machine.ops[last, BEHIND] = row
    else:
        machine.queues[queue, FIRST] = row
    machine.queues[queue, LAST] = row


def prepend(machine: Lanes, queue: int, row: int) -> None:
    """Put an operation at the front of a queue."""
    first = machine.queues[queue, FIRST]
    machine.ops[row, BEFORE] = 0
    machine.ops[row, BEHIND] = first
    if first > 0:
        machine.ops[first, BEFORE] = row
    else:
        machine.queues[queue, LAST] = row
    machine.queues[queue, FIRST] = row


def remove(machine: Lanes, row: int) -> None:
    """Take an operation out of its queue."""
    queue = machine.ops[row, QUEUE]
    before = machine.ops[row, BEFORE]
    behind = machine.ops[row, BEHIND]
    if before > 0:
        machine.ops[before, BEHIND] = behind
    else:
        machine.queues[queue, FIRST] = behind
    if behind > 0:
        machine.ops[behind, BEFORE] = before
    else:
        machine.queues[queue, LAST] = before


def ready(machine: Lanes, queue: int) -> int:
    """Return the head of a queue if it waits for nothing, else 0."""
    row: int = machine.queues[queue, FIRST]
    return row if row > 0 and machine.ops[row, BLOCKERS] == 0 else 0


def gpu_has_nothing(machine: Lanes) -> bool:
    """Say whether the GPU neither runs anything nor has anything in its queue."""
    running: int = machine.lanes[GPU, RUNNING]
    first: int = machine.queues[GPU, FIRST]
    return running == 0 and first == 0


# The lanes.


def next_end(machine: Lanes) -> int:
    """Return when the next lane is done, or preempted; NEVER if all are idle."""
    end: int = machine.lanes[0, END]
    for lane in range(1, LANE_COUNT):
        end = min(end, machine.lanes[lane, END])
    return end


def pass_instant(machine: Lanes, now: int) -> None:
    """Let everything happen that is due at an instant."""
    machine.state[NOW] = now
    ended = True
    while ended:
        ended = False
        for lane in range(LANE_COUNT):
            while machine.lanes[lane, END] == now:
                ended = True
                if lane == H2D and machine.state[BORDER] > 0:
                    settle(machine, lane)
                    pass_border(machine)
                else:
                    complete(machine, lane)
        if ended:
            for lane in range(LANE_COUNT):
                if machine.queues[lane, FIRST] > 0 or lane == H2D:
                    start_what_can(machine, lane)


def start_what_can(machine: Lanes, lane: int) -> None:
    """Start the next operation of a lane, or aim at the border where it will be preempted."""
    running = machine.lanes[lane, RUNNING]
    if running == 0:
        row = ready(machine, lane)
        if row == 0 and lane == H2D:
            row = ready(machine, H2D_BACKGROUND)
        if row > 0:
            start(machine, lane, row)
    elif (
        lane == H2D
        and machine.state[BORDER] < 0
        and machine.ops[running, QUEUE] == H2D_BACKGROUND
        and ready(machine, H2D) > 0
    ):
        settle(machine, H2D)
        op = machine.ops[running]
        just_started = machine.lanes[H2D, STARTED] == machine.state[NOW]
        border = border_left(op[WORK], op[LEFT], op[CHUNKS], just_started)
        machine.state[BORDER] = border
        if border > 0:
            aim(machine, H2D)


def start(machine: Lanes, lane: int, row: int) -> None:
    """Put an operation on its lane."""
    s = machine.state
    now = s[NOW]
    remove(machine, row)
    if lane == GPU:
        charge_wait(machine, row)
    machine.ops[row, START_NS] = now
    machine.lanes[lane, RUNNING] = row
    machine.lanes[lane, STARTED] = now
    machine.lanes[lane, SINCE] = now
    if lane == H2D:
        s[BORDER] = -1
    s[BUSY_SET] |= 1 << lane
    change_rates(machine)
    aim(machine, lane)


def stop(machine: Lanes, lane: int, finished: int) -> None:
    """Take an operation off its lane, done or preempted."""
    s = machine.state
    started = machine.lanes[lane, STARTED]
    machine.lanes[lane, BUSY] += s[NOW] - started
    if machine.record:
        ticket = machine.ops[machine.lanes[lane, RUNNING], TICKET]
        log_segment(machine, ticket, started, s[NOW], finished)
    machine.lanes[lane, RUNNING] = 0
    machine.lanes[lane, END] = NEVER
    s[BUSY_SET] &= ~(1 << lane)
    change_rates(machine)


def settle(machine: Lanes, lane: int) -> None:
    """Count the work done since the rate last changed."""
    now = machine.state[NOW]
    spent_ns = now - machine.lanes[lane, SINCE]
    if spent_ns > 0:
        rate = machine.rates[machine.state[SPEED], lane]
        machine.ops[machine.lanes[lane, RUNNING], LEFT] -= spent_ns * rate
        machine.lanes[lane, SINCE] = now


def change_rates(machine: Lanes) -> None:
    """Let every lane go on at the speed that the lanes now busy leave it."""
    s = machine.state
    before = s[SPEED]
    after = machine.same_rates[s[BUSY_SET]]
    if before == after:
        return
    for lane in range(LANE_COUNT):
        if changes(machine, lane, before, after):
            settle(machine, lane)
    s[SPEED] = after
    for lane in range(LANE_COUNT):
        if changes(machine, lane, before, after):
            aim(machine, lane)


def changes(machine: Lanes, lane: int, before: int, after: int) -> bool:
    """Say whether a lane is at work, and at another speed than before."""
    slower: int = machine.rates[after, lane] - machine.rates[before, lane]
    return slower != 0 and machine.lanes[lane, END] != NEVER


def aim(machine: Lanes, lane: int) -> None:
    """Note when a lane will be done, or at the border at which it is preempted."""
    s = machine.state
    left = machine.ops[machine.lanes[lane, RUNNING], LEFT]
    if lane == H2D and s[BORDER] > 0:
        left -= s[BORDER]
    rate = machine.rates[s[SPEED], lane]
    machine.lanes[lane, END] = s[NOW] + (max(0, left) + rate - 1) // rate


def pass_border(machine: Lanes) -> None:
    """Preempt a background copy, unless nobody urgent is ready any more."""
    s = machine.state
    border = s[BORDER]
    s[BORDER] = -1
    if ready(machine, H2D) == 0:
        aim(machine, H2D)
        return
    row = machine.lanes[H2D, RUNNING]
    machine.ops[row, LEFT] = border
    s[PREEMPTIONS] += 1
    stop(machine, H2D, 0)
    prepend(machine, H2D_BACKGROUND, row)


def complete(machine: Lanes, lane: int) -> None:
    """Finish an operation and release what waits for it."""
    s = machine.state
    ops = machine.ops
    row = machine.lanes[lane, RUNNING]
    kind = ops[row, KIND]
    link = ops[row, WAITING]
    while link > 0:
        other = (link - 1) // 3
        ops[other, BLOCKERS] -= 1
        ops[other, READY_NS] = s[NOW]
        ops[other, HELD_UP_KIND] = kind
        ops[other, HELD_UP_READY_NS] = ops[row, READY_NS]
        ops[other, HELD_UP_START_NS] = ops[row, START_NS]
        link = ops[other, LINK + (link - 1) % 3]
    machine.source_ns[ops[row, SOURCE]] += ops[row, WORK] // FULL_SPEED
    if lane == GPU:
        charge(machine, kind, s[NOW])
    else:
        machine.copied[kind, ops[row, CAUSE]] += ops[row, AMOUNT]
    stop(machine, lane, 1)
    give_back(machine, row)
    if kind == HEAD:
        add_up(machine, machine.heads[s[HEADS]])
        s[HEADS] += 1


# What it adds up to.


def charge(machine: Lanes, what: int, until: int) -> None:
    """Account for the time of the GPU lane since it was last accounted for."""
    s = machine.state
    if until > s[CHARGED]:
        machine.time_ns[what] += until - s[CHARGED]
        s[CHARGED] = until


def charge_wait(machine: Lanes, row: int) -> None:
    """Account for the time in which the GPU waited for an operation, which has just ended.

    Results of the CPU may be ready and queue for the link behind copies of weights: that is
    waiting for weights.
    """
    op = machine.ops[row]
    kind = op[HELD_UP_KIND]
    if kind == NONE:
        charge(machine, WAIT_HOST, machine.state[NOW])
        return
    if kind == RETURN:
        charge(machine, WAIT_CPU, op[HELD_UP_READY_NS])
        charge(machine, WAIT_WEIGHTS, op[HELD_UP_START_NS])
    charge(machine, wait_of(kind), machine.state[NOW])


def add_up(machine: Lanes, into: IntArray) -> None:
    """Write the sums so far, one after another as in `Totals`."""
    now = machine.state[NOW]
    into[0] = now
    at = 1
    for i in range(len(machine.time_ns)):
        into[at + i] = machine.time_ns[i]
    at += len(machine.time_ns)
    for lane in range(LANE_COUNT):
        into[at + lane] = machine.lanes[lane, BUSY]
        if machine.lanes[lane, RUNNING] > 0:
            into[at + lane] += now - machine.lanes[lane, STARTED]
    at += LANE_COUNT
    for i in range(len(machine.source_ns)):
        into[at + i] = machine.source_ns[i]
    at += len(machine.source_ns)
    for kind in range(machine.copied.shape[0]):
        for cause in range(machine.copied.shape[1]):
            into[at] = machine.copied[kind, cause]
            at += 1


def drain(machine: Lanes) -> None:
    """Let everything submitted finish, oldest first; what cannot is a deadlock."""
    while True:
        oldest = NEVER
        for row in range(1, machine.state[ROWS]):
            ticket = machine.ops[row, TICKET]
            if 0 < ticket < oldest:
                oldest = ticket
        if oldest == NEVER:
            return
        wait(machine, oldest)


def fail_stuck(machine: Lanes, ticket: int) -> None:
    """Note a wait without end; `deadlock` says more."""
    machine.state[STUCK] = ticket
    raise RuntimeError("deadlock")


def log_operation(
    machine: Lanes, ticket: int, amount: int, context: int, ns: int, after0: int, after1: int,
    after2: int, slot: int, layer: int, expert: int, batch: int, part: int, queue: int, kind: int,
    precision: int, cause: int,
) -> None:  # fmt: skip
    """Write an operation down."""
    if ticket > len(machine.operations):
        enlarge(machine, OPERATIONS)
    row = machine.operations[ticket - 1]
    s = machine.state
    values = (
        ticket, amount, context, ns, s[NOW], NONE, NONE, after0, after1, after2, s[STEP], slot,
        layer, expert, batch, part, queue, kind, precision, cause,
    )  # fmt: skip
    for at in range(len(values)):
        row[at] = values[at]


def log_segment(machine: Lanes, ticket: int, begin: int, end: int, finished: int) -> None:
    """Write down a stretch of work."""
    at = machine.state[SEGMENTS]
    if at == len(machine.segments):
        enlarge(machine, SEGMENT_ROWS)
    machine.segments[at, 0] = ticket
    machine.segments[at, 1] = begin
    machine.segments[at, 2] = end
    machine.segments[at, 3] = finished
    machine.state[SEGMENTS] = at + 1


# What plain Python does before and after.


def new_lanes(
    costs: Costs, feed: Feed, rates: IntArray, chunk_bytes: int, *, jitter: int = 0, seed: int = 0,
    record: bool = False,
) -> Lanes:  # fmt: skip
    """Make an idle machine at time 0; see `simpy_machine.SimpyMachine` for the arguments.

    The arrays of the feed are shared, not copied, unless several predictions must be put together.
    """
    first_equal: dict[tuple[int, ...], int] = {}
    same = [first_equal.setdefault(tuple(row), i) for i, row in enumerate(rates.tolist())]
    steps = len(feed.steps.phase)
    patterns = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(all="ignore"):
        halves = patterns.view(np.float16).astype(np.float64)
    weights = np.empty((0, 0, 0), np.float16) if feed.weights is None else feed.weights
    guessed, scores = side_by_side(feed)
    rows = 64 if record else 0
    lanes = np.zeros((LANE_COUNT, 5), np.int64)
    lanes[:, END] = NEVER
    state = np.zeros(STATES, np.int64)
    state[BORDER] = -1
    state[ROWS] = 1
    total = 1 + TIMES + LANE_COUNT + len(SOURCES) + len(KINDS) * len(CAUSES)
    return Lanes(
        costs=costs,
        offset=np.ascontiguousarray(feed.steps.offset),
        chosen=np.ascontiguousarray(feed.chosen),
        weights=np.ascontiguousarray(weights).view(np.uint16),
        halves=halves,
        guessed=guessed,
        guess_scores=scores,
        state=state,
        lanes=lanes,
        queues=np.zeros((len(QUEUES), 2), np.int64),
        ops=np.zeros((64, COLUMNS), np.int64),
        ring=np.zeros(1 << 12, np.int64),
        rates=np.ascontiguousarray(rates, np.int64),
        same_rates=np.array(same),
        time_ns=np.zeros(TIMES, np.int64),
        source_ns=np.zeros(len(SOURCES), np.int64),
        copied=np.zeros((len(KINDS), len(CAUSES)), np.int64),
        heads=np.zeros((steps, total), np.int64),
        operations=np.zeros((rows, len(LOGGED)), np.int64),
        segments=np.zeros((rows, 4), np.int64),
        chunk_bytes=chunk_bytes,
        jitter=jitter,
        seed=seed,
        record=int(record),
        callback=0,
    )


def side_by_side(feed: Feed) -> tuple[Any, Any]:
    """Return all predictions' ids and scores as one array each, narrow ones padded with NONE, 0."""
    if len(feed.guesses) == 1 and feed.guesses[0][1] is not None:
        ids, scores = feed.guesses[0]
        return np.ascontiguousarray(ids)[None], np.ascontiguousarray(scores, np.float32)[None]
    rows, layers, _ = feed.chosen.shape
    width = max((ids.shape[2] for ids, _ in feed.guesses), default=0)
    shape = (len(feed.guesses), rows, layers, width)
    guessed = np.full(shape, NONE, np.int16)
    guess_scores = np.zeros(shape, np.float32)
    for p, (ids, scores) in enumerate(feed.guesses):
        guessed[p, ..., : ids.shape[2]] = ids
        if scores is not None:
            guess_scores[p, ..., : ids.shape[2]] = scores
    return guessed, guess_scores


def totals(row: IntArray) -> Totals:
    """Return the sums that `add_up` wrote."""
    sizes = (1, TIMES, LANE_COUNT, len(SOURCES))
    now, time_ns, busy_ns, source_ns, copied = np.split(row, np.cumsum(sizes))
    return Totals(
        int(now[0]), tuple(time_ns.tolist()), tuple(busy_ns.tolist()),
        copied.reshape(len(KINDS), len(CAUSES)), tuple(source_ns.tolist()),
    )  # fmt: skip


def totals_now(machine: Lanes) -> Totals:
    """Return the sums so far."""
    row = np.zeros(machine.heads.shape[1], np.int64)
    add_up(machine, row)
    return totals(row)


def logged(machine: Lanes) -> tuple[Any, Any]:
    """Return the recorded operations and segments as arrays of `log.OPERATION`, `SEGMENT`."""
    count = machine.state[TICKETS]
    operations = np.zeros(count, OPERATION)
    for column, name in enumerate(LOGGED):
        after = name.startswith("after")
        values = machine.operations[:count, column]
        if after:
            operations["after"][:, column - LOGGED.index("after")] = values
        else:
            operations[name] = values
    segments = np.zeros(machine.state[SEGMENTS], SEGMENT)
    for column, name in enumerate(SEGMENT.names or ()):
        segments[name] = machine.segments[: len(segments), column]
    return operations, segments


def deadlock(machine: Lanes) -> DeadlockError:
    """Return the error that says what the wait without end waits for."""
    ticket = int(machine.state[STUCK])
    if ticket > machine.state[TICKETS]:
        return DeadlockError(f"ticket {ticket} was never submitted, and cannot end")
    op = machine.ops[row_of(machine, ticket)].tolist()
    waits = sorted({t for t in op[AFTER:LINK] if row_of(machine, t) > 0})
    head = machine.ops[machine.queues[op[QUEUE], FIRST]].tolist()
    return DeadlockError(
        stuck(ticket, op[KIND], op[LAYER], op[EXPERT], op[QUEUE], waits, (head[TICKET], head[KIND]))
    )
