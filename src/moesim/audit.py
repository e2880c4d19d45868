"""Check a log against the laws of the machine and of a forward pass, from the log alone.

Two machines that agree can both be wrong, so this file shares no code with what it judges. Each law
is a function whose docstring states it; `audit` runs them in order and raises at the first breach.
An operation may always start in the very instant in which what it waits for ends.
"""

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import merge
from itertools import pairwise
from operator import attrgetter, itemgetter
from typing import NamedTuple, cast

from moesim.errors import AuditError
from moesim.log import OPERATION, Log
from moesim.types import (
    ATTENTION,
    COMBINE,
    COPY_IN,
    CPU,
    D2H,
    DENSE_IN,
    DISK,
    DISK_READ,
    EXPERT_CPU,
    EXPERT_GPU,
    GATE,
    GPU,
    H2D,
    H2D_BACKGROUND,
    HEAD,
    KINDS,
    KV_IN,
    KV_OUT,
    LANE_OF_QUEUE,
    LANES,
    MOVE,
    NONE,
    PREDICT,
    RETURN,
    SEND,
    SHARED,
    WHOLE,
)

KINDS_OF_QUEUE = {
    GPU: {ATTENTION, GATE, PREDICT, SHARED, EXPERT_GPU, COMBINE, HEAD, MOVE},
    CPU: {EXPERT_CPU, PREDICT},
    H2D: {COPY_IN, RETURN, KV_IN, DENSE_IN},
    H2D_BACKGROUND: {COPY_IN},
    D2H: {SEND, KV_OUT},
    DISK: {DISK_READ},
}

LAYER_KINDS = {ATTENTION, GATE, SHARED, EXPERT_GPU, COMBINE, EXPERT_CPU, RETURN, SEND}
LAYER_KINDS |= {KV_IN, KV_OUT, DENSE_IN}
"""What belongs to one layer step. Copies, disk reads and guesses may be meant for a later one."""

FULL_SPEED = 1024
"""Work is counted in ns x 1024: what a lane does in 1 ns when no other lane slows it down."""

FOREVER = math.inf

Moment = tuple[float, float]
"""An instant in ns, and a rank in it: 0 for what ends before the host goes on, the ticket for what
the host submits then, `FOREVER` where the log cannot tell."""


class Segment(NamedTuple):
    """A row of `Log.segments`."""

    ticket: int
    start_ns: int
    end_ns: int
    done: int


class Operation(NamedTuple):
    """A row of `Log.operations` with its segments."""

    ticket: int
    amount: int
    context: int
    duration_ns: int
    submit_ns: int
    promote_ns: int
    cancel_ns: int
    after: list[int]
    step: int
    slot: int
    layer: int
    expert: int
    batch: int
    part: int
    queue: int
    kind: int
    precision: int
    cause: int
    segments: tuple[Segment, ...]

    @property
    def start_ns(self) -> int:
        """Return when a lane first worked on it."""
        return self.segments[0].start_ns

    @property
    def end_ns(self) -> int:
        """Return when it was done."""
        return self.segments[-1].end_ns

    @property
    def weights(self) -> tuple[int, int, int]:
        """Return which weights it copies or computes with."""
        return self.layer, self.expert, self.precision

    @property
    def parts(self) -> tuple[int, int]:
        """Return the first part of the expert and the one behind the last; the CPU computes all."""
        if self.kind == EXPERT_CPU:
            return 0, WHOLE
        return self.context, self.context + self.part


class Run(NamedTuple):
    """A log made easy to look things up in."""

    log: Log
    operations: list[Operation]
    live: list[Operation]
    """All that was not cancelled, in ticket order."""
    by_layer: dict[tuple[int, int, int], list[Operation]]
    """By kind, step and layer; a HEAD has layer -1."""
    lanes: list[list[Segment]]
    """The segments of each lane by start."""

    def find(self, kind: int, step: int, layer: int = NONE) -> list[Operation]:
        """Return the operations of one kind in a layer step, in ticket order."""
        return self.by_layer.get((kind, step, layer), [])

    def only(self, kind: int, step: int, layer: int = NONE) -> Operation:
        """Return the operation that must be there exactly once."""
        found = self.find(kind, step, layer)
        law = f"completeness: step {step}, layer {layer} has {len(found)} {KINDS[kind]}, not one"
        require(len(found) == 1, law, *found)
        return found[0]

    def of(self, segment: Segment) -> Operation:
        """Return the operation that a segment belongs to."""
        return self.operations[segment.ticket - 1]


def audit(log: Log) -> None:
    """Raise AuditError, in one line, at the first law that a log breaks."""
    run = read(log)
    check_lanes(run)
    check_starts(run)
    work = measure(run)
    check_queues(run, work)
    check_work(run, work)
    check_weights(run)
    check_disk(run)
    for step in range(log.loads.shape[0]):
        check_head(run, step)
        for layer in range(log.loads.shape[1]):
            check_attention(run, step, layer)
            check_experts(run, step, layer)
            check_cpu_results(run, step, layer)
            check_combine(run, step, layer)
            check_dense(run, step, layer)
    check_kv(run)


def describe(operation: Operation) -> str:
    """Return what identifies an operation, for a message."""
    kind = KINDS[operation.kind] if operation.kind < len(KINDS) else f"kind {operation.kind}"
    times = ", ".join(f"{s.start_ns}..{s.end_ns}" for s in operation.segments) or "never"
    return (
        f"ticket {operation.ticket} ({kind}, step {operation.step}, layer {operation.layer}, "
        f"expert {operation.expert}, batch {operation.batch}, slot {operation.slot}) ran {times} ns"
    )


def require(holds: object, law: str, *operations: Operation) -> None:
    """Raise AuditError that states the law and names the operations, unless the law holds."""
    if not holds:
        raise AuditError("; ".join([law, *map(describe, operations)]))


def require_after(later: Operation, earlier: Operation, law: str) -> None:
    """Raise AuditError if one operation starts before another has ended."""
    require(later.start_ns >= earlier.end_ns, law, later, earlier)


# Form: what is needed to read the log at all.


def read(log: Log) -> Run:
    """Every segment belongs to an operation, or, with ticket 0, to the host being busy."""
    segments: dict[int, list[Segment]] = defaultdict(list)
    for row in log.segments.tolist():
        segments[row[0]].append(Segment(*row))
    columns = [log.operations[name].tolist() for name in OPERATION.names or ()]
    operations = [
        Operation._make((*row, tuple(segments.pop(row[0], ()))))
        for row in zip(*columns, strict=True)
    ]
    segments.pop(0, None)
    check_tickets(operations)
    require(not segments, f"form: segments of unknown tickets {sorted(segments)[:3]}")
    for operation in operations:
        check_segments(operation)
        check_queue(operation, log.fifo_link)

    live = [operation for operation in operations if operation.segments]
    by_layer: dict[tuple[int, int, int], list[Operation]] = defaultdict(list)
    lanes: list[list[Segment]] = [[] for _ in LANES]
    for operation in live:
        check_place(operation, log)
        layer = NONE if operation.kind == HEAD else operation.layer
        by_layer[operation.kind, operation.step, layer].append(operation)
        lanes[LANE_OF_QUEUE[operation.queue]] += operation.segments
    for lane in lanes:
        lane.sort(key=attrgetter("start_ns", "end_ns"))
    return Run(log, operations, live, by_layer, lanes)


def check_tickets(operations: list[Operation]) -> None:
    """Tickets are 1, 2, 3 ... in order of submission; nobody waits for what was taken back."""
    now_ns = operations[0].submit_ns if operations else 0
    for ticket, operation in enumerate(operations, start=1):
        require(operation.ticket == ticket, f"form: this should be ticket {ticket}", operation)
        require(operation.submit_ns >= now_ns, "form: submit times never decrease", operation)
        now_ns = operation.submit_ns
        for earlier in operation.after:
            law = f"form: it waits for ticket {earlier}, which is not an earlier one"
            require(0 <= earlier < ticket, law, operation)
            if earlier and operations[earlier - 1].cancel_ns != NONE:
                law = "form: nothing waits for what was cancelled"
                require(False, law, operation, operations[earlier - 1])


def check_segments(operation: Operation) -> None:
    """What was cancelled never runs; all else runs to its end, and only the last segment is done.

    Only a background copy can be preempted and so have several segments.
    """
    segments = operation.segments
    if operation.cancel_ns != NONE:
        require(not segments, "form: what was cancelled never runs", operation)
        require(operation.cancel_ns >= operation.submit_ns, "form: cancelled too early", operation)
        return
    require(segments, "form: what was not cancelled runs", operation)
    require(segments[-1].done, "form: an operation runs to its end", operation)
    require(not any(s.done for s in segments[:-1]), "form: an operation ends once", operation)
    require(all(s.start_ns <= s.end_ns for s in segments), "form: a segment ends late", operation)
    law = "form: the segments of an operation follow each other"
    require(all(a.end_ns <= b.start_ns for a, b in pairwise(segments)), law, operation)
    whole = len(segments) == 1 or operation.queue == H2D_BACKGROUND
    require(whole, "lanes: only a background copy is ever preempted", operation)


def check_queue(operation: Operation, fifo_link: bool) -> None:
    """Every kind has its queue; a FIFO link has no background queue; only a background copy can be
    promoted.
    """
    fits = operation.kind in KINDS_OF_QUEUE.get(operation.queue, ())
    require(fits, f"form: no such kind in queue {operation.queue}", operation)
    background = operation.queue == H2D_BACKGROUND
    require(not (background and fifo_link), "form: a FIFO link has one queue", operation)
    if operation.promote_ns != NONE:
        legal = background and operation.promote_ns >= operation.submit_ns
        require(legal, "form: only a waiting background copy is promoted", operation)


def check_place(operation: Operation, log: Log) -> None:
    """What belongs to a layer step belongs to one of the run; parts lie within an expert."""
    steps, layers, batches, experts = log.loads.shape
    legal = 0 <= operation.step < steps and NONE <= operation.batch < batches
    if operation.kind in LAYER_KINDS:
        legal = legal and 0 <= operation.layer < layers
    if operation.kind in {EXPERT_GPU, EXPERT_CPU, COPY_IN, MOVE, DISK_READ}:
        legal = legal and 0 <= operation.layer < layers and 0 <= operation.expert < experts
    if operation.kind in {EXPERT_GPU, COPY_IN, MOVE}:
        first, behind = operation.parts
        legal = legal and 0 <= first < behind <= WHOLE
        legal = legal and 0 <= operation.slot < len(log.slot_bytes)
        legal = legal and operation.precision < log.expert_bytes.shape[1]
    require(legal, "form: step, layer, expert, batch, slot, precision and parts exist", operation)


# Lanes: one operation at a time, no sooner than it may.


def check_lanes(run: Run) -> None:
    """A lane works on one operation at a time."""
    for lane in run.lanes:
        for before, after in pairwise(lane):
            law = "lanes: a lane works on one operation at a time"
            require(before.end_ns <= after.start_ns, law, run.of(before), run.of(after))


def check_starts(run: Run) -> None:
    """An operation starts after it was submitted and after all it waits for has ended."""
    for operation in run.live:
        law = f"lanes: an operation starts after its submission, at {operation.submit_ns} ns"
        require(operation.start_ns >= operation.submit_ns, law, operation)
        for ticket in filter(None, operation.after):
            law = "lanes: an operation starts after what it waits for"
            require_after(operation, run.operations[ticket - 1], law)


# Work: how much was done in the time.


class Work(NamedTuple):
    """How much work each lane could have done since the beginning, in ns x 1024."""

    times_ns: list[int]
    """When the set of busy lanes changes."""
    rates: list[list[int]]
    """(times, lanes): from then on; 0 for idle lanes."""
    sums: list[list[int]]
    """(times, lanes): until then."""

    def until(self, lane: int, time_ns: int) -> int:
        """Return the work of a lane until an instant."""
        i = bisect_right(self.times_ns, time_ns) - 1
        if i < 0:
            return 0
        return self.sums[i][lane] + self.rates[i][lane] * (time_ns - self.times_ns[i])


def measure(run: Run) -> Work:
    """Return the work of all lanes, each slowed down by the lanes that are busy with it."""
    changes: dict[int, int] = defaultdict(int)
    for lane, segments in enumerate(run.lanes):
        for segment in segments:
            changes[segment.start_ns] ^= 1 << lane  # twice, where one segment follows another
            changes[segment.end_ns] ^= 1 << lane
    table = run.log.rates.tolist()
    work = Work([], [], [])
    busy, sums, rates, now_ns = 0, [0] * len(LANES), [0] * len(LANES), 0
    for time_ns in sorted(changes):
        sums = [s + r * (time_ns - now_ns) for s, r in zip(sums, rates, strict=True)]
        busy ^= changes[time_ns]
        rates = [table[busy][lane] if busy >> lane & 1 else 0 for lane in range(len(LANES))]
        now_ns = time_ns
        work.times_ns.append(time_ns)
        work.rates.append(rates)
        work.sums.append(sums)
    return work


def progress(operation: Operation, segment: Segment, time_ns: int, work: Work) -> int:
    """Return the work done on an operation until an instant of one of its segments."""
    lane = LANE_OF_QUEUE[operation.queue]
    done = work.until(lane, time_ns) - work.until(lane, segment.start_ns)
    for earlier in operation.segments[: operation.segments.index(segment)]:
        done += work.until(lane, earlier.end_ns) - work.until(lane, earlier.start_ns)
    return done


def check_work(run: Run, work: Work) -> None:
    """On a simulated machine an operation ends in the first ns in which its work is done.

    Each preemption before may have cost up to 1 ns, since it was rounded up as well.
    """
    for operation in run.live if run.log.exact else ():
        total, last = operation.duration_ns * FULL_SPEED, operation.segments[-1]
        law = f"work: too little for {operation.duration_ns} ns at full speed"
        require(progress(operation, last, last.end_ns, work) >= total, law, operation)
        if last.start_ns < last.end_ns:
            rounding = FULL_SPEED * (len(operation.segments) - 1)
            law = f"work: too much for {operation.duration_ns} ns at full speed"
            enough = progress(operation, last, last.end_ns - 1, work) >= total + rounding
            require(not enough, law, operation)


# Queues: in order, and without delay.


class Stay(NamedTuple):
    """The time that an operation spends in one queue; a promoted copy spends some in two."""

    operation: Operation
    enter: Moment
    leave: Moment | None
    """When it was promoted or cancelled; else it ends here."""
    segments: tuple[Segment, ...]

    @property
    def first_ns(self) -> float:
        """Return when it stops being just one of those who wait."""
        return self.segments[0].start_ns if self.segments else self.gone[0]

    @property
    def gone(self) -> Moment:
        """Return from when on the next in the queue is its head."""
        return self.leave or ended(self.segments[-1])


def ended(segment: Segment) -> Moment:
    """Return when a segment ended; what takes no time ends at an unknown point of its instant."""
    return segment.end_ns, 0 if segment.start_ns < segment.end_ns else FOREVER


def check_queues(run: Run, work: Work) -> None:
    """A queue is served in order, and on a simulated machine without delay."""
    lines = line_up(run)
    for line in lines.values():
        check_order(line, run.log.exact)
    if run.log.exact:
        for queue, line in lines.items():
            check_prompt(run, queue, line)
        check_urgent_first(run, lines, work)
        check_preemptions(run, lines, work)


def line_up(run: Run) -> dict[int, list[Stay]]:
    """Return who stood in which queue, in order of entry.

    Who is promoted in the same instant in which another is submitted may stand before or behind it.
    """
    lines: dict[int, list[Stay]] = {queue: [] for queue in KINDS_OF_QUEUE}
    promoted = []
    for operation in run.operations:
        enter: Moment = (operation.submit_ns, operation.ticket)
        leave = None if operation.segments else (operation.cancel_ns, FOREVER)
        segments = operation.segments
        if operation.promote_ns != NONE:
            moment = (operation.promote_ns, FOREVER)
            before = tuple(s for s in segments if s.start_ns < operation.promote_ns)
            lines[operation.queue].append(Stay(operation, enter, moment, before))
            check_promotion(run, operation, before)
            segments = segments[len(before) :]
            if segments or leave:
                promoted.append(Stay(operation, moment, leave, segments))
        else:
            lines[operation.queue].append(Stay(operation, enter, leave, segments))

    def by_entry(stay: Stay) -> tuple[float, float, float]:
        # What was promoted could run at once. If cancelled later, it delayed nobody.
        never = stay.leave and stay.operation.promote_ns != NONE
        return stay.enter[0], FOREVER if never else stay.first_ns, stay.gone[0]

    lines[H2D] = list(merge(lines[H2D], sorted(promoted, key=by_entry), key=by_entry))
    return lines


def check_promotion(run: Run, operation: Operation, before: tuple[Segment, ...]) -> None:
    """Promoted is only what is queued or preempted and waits for nothing; then it runs unbroken."""
    if not run.log.exact:
        return
    promote_ns = operation.promote_ns
    idle = all(s.end_ns <= promote_ns for s in before)
    law = f"queues: promoted at {promote_ns} ns, it is not queued or preempted"
    require(idle and (not before or not before[-1].done), law, operation)
    law = "queues: an urgent copy is not preempted"
    require(len(operation.segments) <= len(before) + 1, law, operation)
    for ticket in filter(None, operation.after):
        law = f"queues: promoted at {promote_ns} ns, it still waits"
        earlier = run.operations[ticket - 1]
        require(earlier.end_ns <= promote_ns, law, operation, earlier)


def check_order(line: list[Stay], exact: bool) -> None:
    """In a queue nobody starts before all who entered earlier have ended, or left.

    When somebody left is known to the host's clock only: of a real machine this is not asked.
    """
    front: Stay | None = None
    for stay in line:
        if front and stay.segments:
            law = "queues: a queue is served in order"
            in_order = front.gone[0] <= stay.first_ns
            require(in_order, law, stay.operation, front.operation)
        if (exact or not stay.leave) and (front is None or stay.gone >= front.gone):
            front = stay


def ready_moments(run: Run, line: list[Stay]) -> Iterator[tuple[Stay, Moment]]:
    """Yield from when on each could run: head of its queue, with nothing left to wait for."""
    head: Moment = (-FOREVER, 0)
    for stay in line:
        waits = (run.operations[ticket - 1] for ticket in stay.operation.after if ticket)
        yield stay, max([stay.enter, head, *(ended(w.segments[-1]) for w in waits)])
        head = max(head, stay.gone)


def check_prompt(run: Run, queue: int, line: list[Stay]) -> None:
    """A lane is never idle while one of its operations could run."""
    lane = run.lanes[LANE_OF_QUEUE[queue]]
    idle_from = [-FOREVER, *(s.end_ns for s in lane)]
    idle_to = [*(s.start_ns for s in lane), FOREVER]
    gaps = [gap for gap in zip(idle_from, idle_to, strict=True) if gap[0] < gap[1]]

    def check_busy(start_ns: float, end_ns: float, operation: Operation) -> None:
        idle_ns, until_ns = gaps[bisect_right(gaps, start_ns, key=itemgetter(1))]
        idle_ns = max(idle_ns, start_ns)
        law = f"queues: a lane is idle from {idle_ns} to {until_ns} ns, while this could run"
        require(end_ns <= idle_ns, law, operation)

    for stay, (ready_ns, _) in ready_moments(run, line):
        since_ns = ready_ns
        for segment in stay.segments:
            check_busy(since_ns, segment.start_ns, stay.operation)
            since_ns = segment.end_ns
        if stay.leave:
            check_busy(since_ns, stay.leave[0], stay.operation)


def check_urgent_first(run: Run, lines: dict[int, list[Stay]], work: Work) -> None:
    """While an urgent copy could run, no background copy starts or passes a chunk border."""
    chunks = [s for stay in lines[H2D_BACKGROUND] for s in stay.segments]
    chunks.sort(key=attrgetter("start_ns", "end_ns"))
    starts = [s.start_ns for s in chunks]
    for stay, (ready_ns, rank) in ready_moments(run, lines[H2D]):
        for chunk in chunks[bisect_left(starts, ready_ns) : bisect_left(starts, stay.first_ns)]:
            copy = run.of(chunk)
            # Within one instant the order of host calls decides, where the log shows it.
            earliest = copy.ticket if copy.submit_ns == chunk.start_ns else 0
            could_know = chunk.start_ns > ready_ns or rank <= earliest
            law = f"queues: a background copy starts while an urgent one could, since {ready_ns} ns"
            require(not could_know, law, copy, stay.operation)
        running = bisect_right(starts, ready_ns) - 1
        if running >= 0 and chunks[running].end_ns > ready_ns and stay.first_ns > ready_ns:
            check_border(run, chunks[running], int(ready_ns), stay, work)


def check_border(run: Run, chunk: Segment, ready_ns: int, urgent: Stay, work: Work) -> None:
    """A background copy stops at the first chunk border after an urgent copy became ready."""
    copy = run.of(chunk)
    last_ns = int(min(chunk.end_ns, urgent.first_ns)) - 1
    if last_ns <= ready_ns:
        return
    total = copy.duration_ns * FULL_SPEED
    count = chunk_count(copy, run.log.chunk_bytes)
    border = borders_reached(copy, progress(copy, chunk, ready_ns, work), count) + 1
    # Every earlier preemption was rounded up to the next ns.
    rounding = copy.segments.index(chunk) * FULL_SPEED
    passed = progress(copy, chunk, last_ns, work) * count >= border * total + rounding * count
    law = f"queues: a chunk border is passed while an urgent copy could run, since {ready_ns} ns"
    require(border >= count or not passed, law, copy, urgent.operation)


def check_preemptions(run: Run, lines: dict[int, list[Stay]], work: Work) -> None:
    """A copy is preempted at a new chunk border, by an urgent copy that starts in that instant."""
    urgent_starts = {stay.first_ns for stay in lines[H2D] if stay.segments}
    for stay in lines[H2D_BACKGROUND]:
        copy = stay.operation
        total, count = copy.duration_ns * FULL_SPEED, chunk_count(copy, run.log.chunk_bytes)
        for number, chunk in enumerate(copy.segments[:-1], start=1):
            law = f"queues: preempted at {chunk.end_ns} ns, but by nobody"
            require(chunk.end_ns in urgent_starts, law, copy)
            done = progress(copy, chunk, chunk.end_ns, work)
            border = borders_reached(copy, done, count)
            rounding = number * FULL_SPEED
            at_border = border and done * count <= border * total + rounding * count
            law = f"queues: preempted at {chunk.end_ns} ns, which is no chunk border"
            require(at_border, law, copy)
            before = borders_reached(copy, progress(copy, chunk, chunk.start_ns, work), count)
            tiny = total < rounding * count  # one ns may then pass several borders
            require(border > before or tiny, "queues: preempted without progress", copy)


def chunk_count(copy: Operation, chunk_bytes: int) -> int:
    """Return into how many equal chunks a copy is divided."""
    return max(1, -(-copy.amount // chunk_bytes)) if chunk_bytes > 0 else 1


def borders_reached(copy: Operation, done: int, count: int) -> int:
    """Return how many chunk borders a copy has reached; borders may be rounded down."""
    return min(count - 1, (done + 1) * count // max(1, copy.duration_ns * FULL_SPEED))


# Weights: what a run computes with.


@dataclass
class Holding:
    """What a slot holds: adjoining parts of one expert."""

    weights: tuple[int, int, int]
    first: int
    behind: int
    writes: list[Operation] = field(default_factory=list)
    last: Operation | None = None
    """The read or write that ends last."""
    replaced_ns: float = FOREVER

    def has(self, operation: Operation, parts: tuple[int, int]) -> bool:
        """Return whether it includes these parts of the expert that the operation names."""
        inside = self.first <= parts[0] and parts[1] <= self.behind
        return inside and self.weights == operation.weights

    def writers(self, parts: tuple[int, int]) -> list[Operation]:
        """Return who wrote these parts; what was there from the start nobody wrote."""
        return [w for w in self.writes if w.parts[0] < parts[1] and parts[0] < w.parts[1]]

    def use(self, operation: Operation) -> None:
        """Note a read or write."""
        if self.last is None or operation.end_ns >= self.last.end_ns:
            self.last = operation


def check_weights(run: Run) -> None:
    """Replay the slots in order of submission: a run reads exactly its weights, and all of them."""
    require(
        int(run.log.slot_bytes.sum()) <= run.log.budget_bytes,
        f"weights: slots of {run.log.slot_bytes.sum()} bytes, a budget of {run.log.budget_bytes}",
    )
    holdings = initial_holdings(run.log)
    writes: dict[int, list[Operation]] = defaultdict(list)
    moves = []
    for operation in run.live:
        if operation.kind == EXPERT_GPU:
            check_read(holdings.get(operation.slot), operation)
        elif operation.kind in {COPY_IN, MOVE}:
            if operation.kind == MOVE:
                moves.append((operation, list(holdings.values())))
            size_bytes = range_bytes(run.log, operation.weights, *operation.parts)
            law = f"weights: {operation.amount} bytes are copied of {size_bytes}"
            require(operation.amount == size_bytes, law, operation)
            write(run.log, holdings, operation)
            writes[operation.slot].append(operation)
    for line in writes.values():
        for before, after in pairwise(sorted(line, key=attrgetter("start_ns", "end_ns"))):
            require_after(after, before, "weights: a slot is filled by one copy at a time")
    for move, sources in moves:
        check_move(move, sources)


def initial_holdings(log: Log) -> dict[int, Holding]:
    """No slot begins with two contents, or with more than it can hold."""
    holdings: dict[int, Holding] = {}
    for layer, expert, slot, part, precision in log.initial:
        require(slot not in holdings, f"weights: slot {slot} begins with two contents")
        holdings[slot] = Holding((layer, expert, precision), 0, part)
        fits = range_bytes(log, (layer, expert, precision), 0, part) <= log.slot_bytes[slot]
        require(fits, f"weights: slot {slot} begins with more than it can hold")
    return holdings


def range_bytes(log: Log, weights: tuple[int, int, int], first: int, behind: int) -> int:
    """Return the bytes of a range of parts, so that adjoining ranges sum to the whole."""
    layer, _, precision = weights
    whole_bytes = int(log.expert_bytes[layer, precision])
    return whole_bytes * behind // WHOLE - whole_bytes * first // WHOLE


def check_read(holding: Holding | None, run: Operation) -> None:
    """A run starts after the end of the copies that put exactly its weights into its slot."""
    there = holding is not None and holding.has(run, run.parts)
    require(there, f"weights: the slot does not hold parts {run.parts} at this precision", run)
    holding = cast("Holding", holding)
    for writer in holding.writers(run.parts):
        require_after(run, writer, "weights: a run starts after its weights have arrived")
    holding.use(run)


def write(log: Log, holdings: dict[int, Holding], copy: Operation) -> None:
    """A copy goes on where the same weights end, or replaces what was there once all is done with
    it; a slot never holds more than its size.
    """
    holding = holdings.get(copy.slot)
    first, behind = copy.parts
    if holding and first == holding.behind and holding.weights == copy.weights:
        holding.behind = behind
    else:
        if holding:
            holding.replaced_ns = copy.start_ns
            if holding.last:
                require_after(copy, holding.last, "weights: a slot is reused after its last use")
        holding = holdings[copy.slot] = Holding(copy.weights, first, behind)
    holding.writes.append(copy)
    holding.use(copy)
    size_bytes = range_bytes(log, copy.weights, holding.first, behind)
    law = f"weights: a slot of {log.slot_bytes[copy.slot]} bytes cannot hold {size_bytes}"
    require(size_bytes <= log.slot_bytes[copy.slot], law, copy)


def check_move(move: Operation, sources: list[Holding]) -> None:
    """What is moved inside GPU memory is there from the start of the move to its end."""
    there = any(
        source.has(move, move.parts)
        and all(writer.end_ns <= move.start_ns for writer in source.writers(move.parts))
        and source.replaced_ns >= move.end_ns
        for source in sources
    )
    require(there, "weights: no slot holds what is moved, all the time", move)


def check_disk(run: Run) -> None:
    """An expert on disk is copied or computed after a read that is newer than the last step's runs
    of its layer.
    """
    reads: dict[tuple[int, int], list[Operation]] = defaultdict(list)
    last_run: dict[tuple[int, int], int] = {}
    for operation in run.live:
        place = operation.layer, operation.expert
        if operation.kind in {EXPERT_CPU, EXPERT_GPU}:
            last_run[operation.step, operation.layer] = operation.ticket
        if operation.kind == DISK_READ:
            reads[place].append(operation)
        elif operation.kind in {COPY_IN, EXPERT_CPU} and run.log.on_disk[place]:
            oldest = last_run.get((operation.step - 1, operation.layer), 0)
            first = bisect_right(reads[place], oldest, key=attrgetter("ticket"))
            fresh = any(r.end_ns <= operation.start_ns for r in reads[place][first:])
            law = "weights: an expert on disk is read anew in each step that uses it"
            require(fresh, law, operation, *reads[place][-1:])


# Completeness: a forward pass, whole and in order.


def check_head(run: Run, step: int) -> None:
    """A step ends with one HEAD, after the last layer's COMBINE."""
    head = run.only(HEAD, step)
    last = run.only(COMBINE, step, run.log.loads.shape[1] - 1)
    require_after(head, last, "completeness: HEAD starts after the last COMBINE")


def check_attention(run: Run, step: int, layer: int) -> None:
    """Each batch has one ATTENTION over its new tokens, after the layer or step before has ended,
    and then one GATE. A batch without tokens may lack both.
    """
    before = run.only(COMBINE, step, layer - 1) if layer else None
    if step and not layer:
        before = run.only(HEAD, step - 1)
    attentions, gates = run.find(ATTENTION, step, layer), run.find(GATE, step, layer)
    for batch, tokens in enumerate(run.log.batch_tokens[step].tolist()):
        mine = [a for a in attentions if a.batch == batch]
        its_gates = [g for g in gates if g.batch == batch]
        counts_fit = len(mine) == len(its_gates) == 1 or not (mine or its_gates or tokens)
        where = f"step {step}, layer {layer}, batch {batch}"
        law = f"completeness: {where} has not one ATTENTION and one GATE"
        require(counts_fit, law, *mine, *its_gates)
        for attention, gate in zip(mine, its_gates, strict=True):
            law = f"completeness: ATTENTION over {attention.amount} tokens of {tokens}"
            require(attention.amount == tokens, law, attention)
            require_after(gate, attention, "completeness: GATE starts after its ATTENTION")
            if before:
                law = "completeness: a layer starts after the one before has ended"
                require_after(attention, before, law)
    stray = [operation for operation in (*attentions, *gates) if operation.batch == NONE]
    require(not stray, "completeness: ATTENTION and GATE are of one batch", *stray)


def check_experts(run: Run, step: int, layer: int) -> None:
    """Each token routed to an expert is computed once by all of it, on one device, after the GATEs;
    nothing else is computed.
    """
    loads = run.log.loads[step, layer].tolist()
    gates = {gate.batch: gate for gate in run.find(GATE, step, layer)}
    on_gpu, on_cpu = run.find(EXPERT_GPU, step, layer), run.find(EXPERT_CPU, step, layer)
    for operation in on_cpu:
        others = [o for o in (*on_gpu, *on_cpu) if o.expert == operation.expert]
        law = "completeness: an expert runs once, on one device"
        require(others == [operation], law, *others)
    pieces: dict[tuple[int, int], list[Operation]] = defaultdict(list)
    for operation in (*on_gpu, *on_cpu):
        tokens = {b: row[operation.expert] for b, row in enumerate(loads) if row[operation.expert]}
        if operation.batch != NONE:
            tokens = {b: count for b, count in tokens.items() if b == operation.batch}
        law = f"completeness: a run over {operation.amount} tokens of {sum(tokens.values())} routed"
        require(tokens and operation.amount == sum(tokens.values()), law, operation)
        for batch in tokens:
            require(batch in gates, f"completeness: no GATE for batch {batch}", operation)
            require_after(operation, gates[batch], "completeness: a run starts after its GATEs")
            pieces[operation.expert, batch].append(operation)
    for batch, row in enumerate(loads):
        for expert, tokens_count in enumerate(row):
            if tokens_count:
                where = f"step {step}, layer {layer}, batch {batch}, expert {expert}"
                check_tiling(pieces[expert, batch], where)


def check_tiling(pieces: list[Operation], where: str) -> None:
    """The pieces in which an expert runs are all of it, once."""
    behind = 0
    for piece in sorted(pieces, key=attrgetter("parts")):
        law = f"completeness: {where} runs part {min(behind, piece.parts[0])} not exactly once"
        require(piece.parts[0] == behind, law, *pieces)
        behind = piece.parts[1]
    law = f"completeness: {where} has tokens, but parts from {behind} do not run"
    require(behind == WHOLE, law, *pieces)


def check_cpu_results(run: Run, step: int, layer: int) -> None:
    """One SEND, after all ATTENTIONs, precedes the CPU's experts; one RETURN carries their results
    to this layer's COMBINE, and one the deferred results to the next layer's.
    """
    experts, returns = run.find(EXPERT_CPU, step, layer), run.find(RETURN, step, layer)
    sends = run.find(SEND, step, layer)
    where = f"step {step}, layer {layer}"
    law = f"completeness: {where} has {len(experts)} experts on the CPU and {len(sends)} SENDs"
    require(len(sends) == bool(experts), law, *sends)
    for send in sends:
        for attention in run.find(ATTENTION, step, layer):
            require_after(send, attention, "completeness: SEND starts after the ATTENTIONs")
        for expert in experts:
            require_after(expert, send, "completeness: a CPU expert starts after SEND")
    for operation in (*experts, *returns):
        require(operation.context in {0, 1}, "completeness: context is 0 or 1", operation)
    for deferred in (0, 1):
        results = [expert for expert in experts if expert.context == deferred]
        carriers = [carrier for carrier in returns if carrier.context == deferred]
        law = f"completeness: {where} has {len(carriers)} RETURNs of {len(results)} CPU results"
        require(len(carriers) == bool(results), law, *results, *carriers)
        if not results:
            continue
        last = layer + deferred == run.log.loads.shape[1]
        require(not last, "completeness: the last layer defers nothing", *results)
        for result in results:
            require_after(carriers[0], result, "completeness: RETURN starts after its results")
        combine = run.only(COMBINE, step, layer + deferred)
        require_after(combine, carriers[0], "completeness: COMBINE starts after RETURN")


def check_combine(run: Run, step: int, layer: int) -> None:
    """One COMBINE ends a layer step, after all GPU runs and SHARED, which runs at most once."""
    combine, shared = run.only(COMBINE, step, layer), run.find(SHARED, step, layer)
    require(len(shared) <= 1, "completeness: SHARED runs at most once", *shared)
    for operation in shared:
        for attention in run.find(ATTENTION, step, layer):
            require_after(operation, attention, "completeness: SHARED starts after the ATTENTIONs")
    for operation in (*shared, *run.find(EXPERT_GPU, step, layer)):
        require_after(combine, operation, "completeness: COMBINE starts after all runs")


# Offloaded state.


def check_dense(run: Run, step: int, layer: int) -> None:
    """If attention weights are on the host, one DENSE_IN precedes the ATTENTIONs of a layer."""
    copies = run.find(DENSE_IN, step, layer)
    law = f"offload: step {step}, layer {layer} has {len(copies)} DENSE_IN"
    require(len(copies) == run.log.dense_on_host, law, *copies)
    for copy in copies:
        for attention in run.find(ATTENTION, step, layer):
            require_after(attention, copy, "offload: ATTENTION starts after DENSE_IN")


def check_kv(run: Run) -> None:
    """If keys and values are on the host, each ATTENTION has one KV_IN before it (except in step 0,
    where there is nothing yet) and one KV_OUT after it, and there are two buffers for them.
    """
    copies: dict[tuple[int, int, int, int], list[Operation]] = defaultdict(list)
    attentions = []
    for operation in run.live:
        if operation.kind in {KV_IN, KV_OUT}:
            require(run.log.kv_on_host, "offload: keys and values are on the GPU", operation)
            place = operation.step, operation.layer, operation.batch
            copies[operation.kind, *place].append(operation)
        elif operation.kind == ATTENTION:
            attentions.append(operation)
    if not run.log.kv_on_host:
        return
    outs: dict[tuple[int, int], Operation] = {}
    for number, attention in enumerate(attentions):
        place = attention.step, attention.layer, attention.batch
        ins, out = copies.pop((KV_IN, *place), []), copies.pop((KV_OUT, *place), [])
        require(len(out) == 1, f"offload: {len(out)} KV_OUT of an ATTENTION", attention, *out)
        require_after(out[0], attention, "offload: KV_OUT starts after its ATTENTION")
        if attention.step == 0:
            empty = len(ins) <= 1 and not any(copy.amount for copy in ins)
            require(empty, "offload: step 0 has no keys and values to copy in", *ins)
        else:
            require(len(ins) == 1, f"offload: {len(ins)} KV_IN of an ATTENTION", attention, *ins)
            require_after(attention, ins[0], "offload: ATTENTION starts after its KV_IN")
            if place[1:] in outs:
                law = "offload: KV_IN starts after the KV_OUT of the step before"
                require_after(ins[0], outs[place[1:]], law)
            if number >= 2:
                law = "offload: KV_IN starts after the ATTENTION before the last, with two buffers"
                require_after(ins[0], attentions[number - 2], law)
        outs[place[1:]] = out[0]
    for stray in copies.values():
        require(not stray, "offload: KV_IN and KV_OUT belong to an ATTENTION", *stray)
