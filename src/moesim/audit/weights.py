"""Laws of the weights: what a run computes with was there, whole, and stays until it is done."""

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from typing import cast

from moesim.audit.form import FOREVER, Operation, Run, require, require_after
from moesim.log import Log
from moesim.types import (
    COPY_IN,
    DISK_READ,
    EXPERT_CPU,
    EXPERT_GPU,
    MOVE,
    NONE,
    RESIZE,
    WHOLE,
    IntArray,
)


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
    sizes = run.log.slot_bytes.copy()
    check_budget(run.log, sizes)
    holdings = initial_holdings(run.log)
    writes: dict[int, list[Operation]] = defaultdict(list)
    moves = []
    for operation in run.live:
        if operation.kind == EXPERT_GPU:
            check_read(holdings.get(operation.slot), operation)
        elif operation.kind == RESIZE:
            sizes[operation.slot] = operation.amount
            check_budget(run.log, sizes, operation)
            resized(holdings, operation)
        elif operation.kind in {COPY_IN, MOVE}:
            if operation.kind == MOVE:
                moves.append((operation, list(holdings.values())))
            size_bytes = range_bytes(run.log, operation.weights, *operation.parts)
            law = f"weights: {operation.amount} bytes are copied of {size_bytes}"
            require(operation.amount == size_bytes, law, operation)
            write(run.log, sizes, holdings, operation)
            writes[operation.slot].append(operation)
    for line in writes.values():
        for before, after in pairwise(sorted(line, key=attrgetter("start_ns", "end_ns"))):
            require_after(after, before, "weights: a slot is filled by one copy at a time")
    for move, sources in moves:
        check_move(move, sources)


def check_budget(log: Log, sizes: IntArray, *resize: Operation) -> None:
    """All slots together stay within the budget, from the start and after every change."""
    law = f"weights: slots of {sizes.sum()} bytes, a budget of {log.budget_bytes}"
    require(int(sizes.sum()) <= log.budget_bytes, law, *resize)


def resized(holdings: dict[int, Holding], resize: Operation) -> None:
    """A slot changes its size after its last use, and is filled after that."""
    holding = holdings.get(resize.slot)
    if holding:
        holding.replaced_ns = resize.start_ns
        if holding.last:
            require_after(resize, holding.last, "weights: a slot is resized after its last use")
    holdings[resize.slot] = Holding((NONE, NONE, NONE), 0, 0)
    holdings[resize.slot].use(resize)


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


def write(log: Log, sizes: IntArray, holdings: dict[int, Holding], copy: Operation) -> None:
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
    law = f"weights: a slot of {sizes[copy.slot]} bytes cannot hold {size_bytes}"
    require(size_bytes <= sizes[copy.slot], law, copy)


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
