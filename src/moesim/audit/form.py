"""What is needed to read a log at all: tickets, segments, queues, places."""

import math
from collections import defaultdict
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple

from moesim.errors import AuditError
from moesim.log import OPERATION, Log
from moesim.types import (
    ATTENTION,
    ATTENTION_CPU,
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
    RESIZE,
    RETURN,
    SEND,
    SHARED,
    WHOLE,
)

KINDS_OF_QUEUE = {
    GPU: {ATTENTION, GATE, PREDICT, SHARED, EXPERT_GPU, COMBINE, HEAD, MOVE, RESIZE},
    CPU: {EXPERT_CPU, PREDICT, ATTENTION_CPU},
    H2D: {COPY_IN, RETURN, KV_IN, DENSE_IN},
    H2D_BACKGROUND: {COPY_IN},
    D2H: {SEND, KV_OUT},
    DISK: {DISK_READ},
}

LAYER_KINDS = {ATTENTION, GATE, SHARED, EXPERT_GPU, COMBINE, EXPERT_CPU, RETURN, SEND}
LAYER_KINDS |= {KV_IN, KV_OUT, DENSE_IN, ATTENTION_CPU}
"""What belongs to one layer step. Copies, disk reads and guesses may be meant for a later one."""


FOREVER = math.inf


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
    if operation.kind == RESIZE:
        legal = legal and 0 <= operation.slot < len(log.slot_bytes) and operation.amount >= 0
    if operation.kind in {EXPERT_GPU, COPY_IN, MOVE}:
        first, behind = operation.parts
        legal = legal and 0 <= first < behind <= WHOLE
        legal = legal and 0 <= operation.slot < len(log.slot_bytes)
        legal = legal and operation.precision < log.expert_bytes.shape[1]
    require(legal, "form: step, layer, expert, batch, slot, precision and parts exist", operation)
