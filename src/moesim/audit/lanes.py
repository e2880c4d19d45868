"""Laws of the lanes: one operation at a time, in order, at once, and for as long as it takes."""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator
from heapq import merge
from itertools import pairwise
from operator import attrgetter, itemgetter
from typing import NamedTuple

from moesim.audit.form import (
    FOREVER,
    KINDS_OF_QUEUE,
    Operation,
    Run,
    Segment,
    require,
    require_after,
)
from moesim.types import (
    H2D,
    H2D_BACKGROUND,
    LANE_OF_QUEUE,
    LANES,
    NONE,
)

FULL_SPEED = 1024
"""Work is counted in ns x 1024: what a lane does in 1 ns when no other lane slows it down."""

Moment = tuple[float, float]
"""An instant in ns, and a rank in it: 0 for what ends before the host goes on, the ticket for what
the host submits then, `FOREVER` where the log cannot tell."""


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
    """Return into how many equal chunks a copy is divided: so few that 64 bits count its work."""
    if chunk_bytes <= 0:
        return 1
    work = copy.duration_ns * FULL_SPEED
    return max(1, min(-(-copy.amount // chunk_bytes), (1 << 62) // max(1, work)))


def borders_reached(copy: Operation, done: int, count: int) -> int:
    """Return how many chunk borders a copy has reached; borders may be rounded down."""
    return min(count - 1, (done + 1) * count // max(1, copy.duration_ns * FULL_SPEED))
