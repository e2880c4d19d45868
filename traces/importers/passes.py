"""Sequences, rebuilt from the positions that an engine's forward passes computed."""

from collections import defaultdict, deque
from typing import NamedTuple

import numpy as np

from moesim.errors import TraceError
from moesim.types import DECODE, PREFILL, IntArray

EXTEND, DECODING, MIXED, IDLE, VERIFY = 1, 2, 3, 4, 5
MODES = {
    EXTEND: "extend",
    DECODING: "decode",
    MIXED: "mixed",
    IDLE: "idle",
    VERIFY: "target-verify",
}
"""SGLang's `ForwardMode`, of the target model."""


class Pass(NamedTuple):
    """One forward pass: positions of its tokens, and how many of them each sequence extends by.

    Without lengths it decodes: one token per sequence, or to verify drafts equally many of each,
    in consecutive positions. The next pass shows how many of those were accepted.
    """

    name: str
    mode: int
    positions: list[int]
    lengths: list[int]


class Part(NamedTuple):
    """Consecutive positions of one sequence in one pass, the first in row `row` of all passes."""

    row: int
    start: int
    length: int
    phase: int
    drafts: bool


Queues = defaultdict[int, deque[int]]
"""Sequences by the position at which they may go on."""


def follow(passes: list[Pass]) -> tuple[IntArray, IntArray, IntArray]:
    """Return the rows that count, by number among all rows, and the sequence and phase of each.

    A sequence goes on where its next position is computed: by decoding if it was in the last
    decoding pass or was extended since, by extending if it has not decoded yet. A batch keeps its
    order: of equals it is the first behind the sequence found before, if there is one. Whoever is
    missing from a decoding pass has ended, or waits for more of its prompt. Anything else begins a
    sequence. Rows come sequence by sequence.
    """
    drafts = _draft_tokens(passes)
    every: list[list[Part]] = []
    running: list[int] = []
    extended: list[int] = []
    waiting: Queues = defaultdict(deque)
    row = 0
    for one in passes:
        ready: Queues = defaultdict(deque)
        passed: Queues = defaultdict(deque)
        place = {number: i for i, number in enumerate(running + extended)}
        last = -1
        if one.mode != EXTEND:
            for number in running + extended:
                for position in _next(every[number][-1]):
                    ready[position].append(number)
            running, extended = [], []
        taken: set[int] = set()
        for start, length in _spans(one, drafts):
            phase, number = PREFILL if one.lengths else DECODE, -1
            if phase == DECODE or (one.mode == MIXED and length == 1):
                while ready[start] and place[ready[start][0]] <= last:
                    passed[start].append(ready[start].popleft())
                number = _first(ready[start], taken)
                number = number if number >= 0 else _first(passed[start], taken)
                last = max(last, place.get(number, -1))
                phase = DECODE if number >= 0 else phase
            if phase == PREFILL:
                number = _first(waiting[start], taken)
                while number >= 0 and not _waits(every[number], start):
                    number = _first(waiting[start], taken)
            if number < 0:
                number = len(every)
                every.append([])
            every[number].append(Part(row, start, length, phase, one.mode == VERIFY))
            (running if phase == DECODE else extended).append(number)
            taken.add(number)
            row += length
        for number in sorted(taken):
            waiting[every[number][-1].start + every[number][-1].length].append(number)
    return _accepted(every)


def _next(part: Part) -> range:
    """Return where a sequence may go on; of drafts, only the first is sure to be accepted."""
    end = part.start + part.length
    return range(part.start + 1 if part.drafts else end, end + 1)


def _waits(parts: list[Part], position: int) -> bool:
    """Tell whether a sequence's prompt is known up to a position, and nothing after it."""
    return parts[-1].phase == PREFILL and parts[-1].start + parts[-1].length == position


def _first(queue: deque[int], taken: set[int]) -> int:
    """Return who stands first and has no tokens in this pass yet; -1 if there is nobody."""
    while queue:
        if (number := queue.popleft()) not in taken:
            return number
    return -1


def _spans(one: Pass, drafts: int) -> list[tuple[int, int]]:
    """Return the first position and the length of each sequence's part in a pass."""
    lengths = one.lengths
    if not lengths:
        each = drafts if one.mode == VERIFY else 1
        lengths = [each] * (len(one.positions) // each)
    ends = np.cumsum(lengths)
    inside = np.ones(len(one.positions), np.bool_)
    inside[0] = False
    inside[ends[:-1]] = False
    jumps = inside & (np.diff(one.positions, prepend=0) != 1)
    if jumps.any():
        at = int(jumps.argmax())
        raise TraceError(
            f"{one.name}.positions[{at}] is {one.positions[at]} after {one.positions[at - 1]}; "
            "inside a sequence they must count up, also those of drafts (no tree of drafts)"
        )
    starts = [one.positions[end - length] for end, length in zip(ends, lengths, strict=True)]
    return list(zip(starts, lengths, strict=True))


def _draft_tokens(passes: list[Pass]) -> int:
    """Return how many tokens per sequence verify drafts: no run of positions is shorter."""
    shortest = 0
    for one in passes:
        if one.mode == VERIFY:
            breaks = np.flatnonzero(np.diff(one.positions) != 1) + 1
            runs = np.diff([0, *breaks, len(one.positions)])
            shortest = int(min(runs.min(), shortest or runs.min()))
            if (runs % shortest).any():
                raise TraceError(
                    f"{one.name}.positions run on for {runs.tolist()[:8]} tokens; drafts are "
                    f"equally many of every sequence, {shortest} here"
                )
    return shortest


def _accepted(every: list[list[Part]]) -> tuple[IntArray, IntArray, IntArray]:
    """Return the rows of every sequence without the drafts that its next part computes again."""
    rows: list[int] = []
    sequence: list[int] = []
    phase: list[int] = []
    for number, parts in enumerate(every):
        for i, part in enumerate(parts):
            kept = part.length
            if part.drafts:
                kept = parts[i + 1].start - part.start if i + 1 < len(parts) else 1
            rows += range(part.row, part.row + kept)
            sequence += [number] * kept
            phase += [part.phase] * kept
    return np.array(rows), np.array(sequence), np.array(phase)
