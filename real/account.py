"""What a real run adds up to: the simulator's totals, from the log and from how the host waited.

The time of the lane `gpu` is split as the simulated machines split it (`sim.rules`): what it did by
kind, and what it waited for when it did nothing. Until the next operation is submitted that is the
host, or what the host waited for; from then on it is what that operation waited for; and if it
waited for nothing any more, the host again, whose thread had yet to wake up.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moesim.real.torch_machine import Waited
from moesim.sim.rules import TIMES, WAIT_CPU, WAIT_HOST, WAIT_WEIGHTS, Totals, wait_of
from moesim.types import GPU, HEAD, KINDS, LANE_OF_QUEUE, LANES, MEASURED, RETURN, SOURCES


def totals(operations: Any, segments: Any, waited: Sequence[Waited]) -> tuple[Totals, ...]:
    """Return the totals at the end of each HEAD, and last those when everything was over.

    `operations` and `segments` are a log's, `waited` the host's waits in order. All of its numbers
    count as measured.
    """
    segments = segments[segments["ticket"] > 0]  # 0: the host's own pauses
    spans = span_of(segments, len(operations))
    end_ns = int(segments["end_ns"].max())
    lanes = np.array(LANE_OF_QUEUE)[operations["queue"]]
    time_ns = np.zeros(TIMES, np.int64)
    moments, found = [], []
    charged = 0
    on_gpu = sorted(segments[lanes[segments["ticket"] - 1] == GPU].tolist(), key=lambda s: s[1])
    idle = waits_by_end(operations, waited)
    for ticket, start_ns, stop_ns, _ in on_gpu:
        operation = operations[ticket - 1]
        for what, until_ns in gap(operation, start_ns, operations, spans, idle):
            reached = min(until_ns, start_ns)
            time_ns[what] += max(0, reached - charged)
            charged = max(charged, reached)
        time_ns[int(operation["kind"])] += stop_ns - charged
        charged = stop_ns
        if operation["kind"] == HEAD:
            moments.append((stop_ns, tuple(map(int, time_ns))))
    moments.append((end_ns, tuple(map(int, time_ns))))
    for at, (now_ns, spent) in enumerate(moments):
        # What ends in the same instant as a HEAD, on a later lane, ends after it.
        over = spans[:, 1] < now_ns + (at == len(moments) - 1)
        copied = np.zeros((len(KINDS), 4), np.int64)
        done = operations[over & (lanes != GPU) & (operations["cancel_ns"] < 0)]
        np.add.at(copied, (done["kind"], done["cause"]), done["amount"])
        inside = np.minimum(segments["end_ns"], now_ns) - np.minimum(segments["start_ns"], now_ns)
        busy = np.bincount(lanes[segments["ticket"] - 1], inside, len(LANES))
        busy_ns = tuple(int(ns) for ns in busy)
        source_ns = tuple(sum(busy_ns) * (source == MEASURED) for source in range(len(SOURCES)))
        found.append(Totals(now_ns, spent, busy_ns, copied, source_ns))
    return tuple(found)


def span_of(segments: Any, count: int) -> Any:
    """Return (operations, 2): when each began and ended; -1 and the largest int for those that
    never did."""
    spans = np.full((count, 2), -1, np.int64)
    spans[:, 1] = np.iinfo(np.int64).max
    for ticket, start_ns, stop_ns, done in segments.tolist():
        if spans[ticket - 1, 0] < 0:
            spans[ticket - 1, 0] = start_ns
        if done:
            spans[ticket - 1, 1] = stop_ns
    return spans


def waits_by_end(operations: Any, waited: Sequence[Waited]) -> list[tuple[int, int, int]]:
    """Return (start, end, what it is to wait for it) of the host's waits for other lanes."""
    return [
        (one.start_ns, one.end_ns, wait_of(int(operations["kind"][one.ticket - 1])))
        for one in waited
        if LANE_OF_QUEUE[operations["queue"][one.ticket - 1]] != GPU
    ]


def gap(
    operation: Any, start_ns: int, operations: Any, spans: Any, waits: list[tuple[int, int, int]]
) -> list[tuple[int, int]]:
    """Return what the GPU waited for before an operation, and until when, in order."""
    submit_ns = int(operation["submit_ns"])
    found = []
    while waits and waits[0][1] <= submit_ns:
        begin_ns, end_ns, what = waits.pop(0)
        found += [(WAIT_HOST, begin_ns), (what, end_ns)]
    found.append((WAIT_HOST, submit_ns))
    blockers = [int(t) for t in operation["after"] if t and spans[t - 1, 1] > submit_ns]
    if blockers:
        last = max(blockers, key=lambda t: spans[t - 1, 1])
        kind, over_ns = int(operations["kind"][last - 1]), int(spans[last - 1, 1])
        if kind == RETURN:
            ready_ns = max(
                [submit_ns, *(int(spans[t - 1, 1]) for t in operations["after"][last - 1] if t)]
            )
            found += [(WAIT_CPU, ready_ns), (WAIT_WEIGHTS, int(spans[last - 1, 0]))]
        found.append((wait_of(kind), over_ns))
    found.append((WAIT_HOST, start_ns))
    return found
