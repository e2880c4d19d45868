import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.policies.parts.arc import (
    B1,
    B2,
    LISTS,
    T1,
    T2,
    Arc,
    arc_access,
    arc_holds,
    arc_move,
    new_arc,
)
from moesim.traces.synthetic import synthesize
from moesim.types import NONE

Lists = tuple[list[int], list[int], list[int], list[int]]


def lists(arc: Arc, layer: int = 0) -> Lists:
    """Return T1, T2, B1 and B2, oldest first; check that sizes and places agree with them."""
    found: list[list[int]] = []
    end = arc.where.shape[1]
    for at in (T1, T2, B1, B2):
        row = LISTS * layer + at
        inside: list[int] = []
        expert = int(arc.order.after[row, end])
        while expert != end:
            inside.append(expert)
            expert = int(arc.order.after[row, expert])
        assert len(inside) == arc.size[row]
        assert all(arc.where[layer, expert] == at for expert in inside)
        found.append(inside)
    assert sum(map(len, found)) == int((arc.where[layer] != NONE).sum())
    return found[0], found[1], found[2], found[3]


def filled(capacity: int, experts: int, *, textbook: int = 0, layers: int = 1) -> Arc:
    """Return caches that hold the ids below their capacity, as Fate starts."""
    arc = new_arc(layers, experts, np.full(layers, capacity), textbook)
    for layer in range(layers):
        for expert in range(capacity):
            assert arc_access(arc, layer, expert) == NONE
    return arc


def test_fate_spec_example() -> None:
    """Capacity 3 with 0, 1, 2: victims 0, none, 2, 1, none, 2, none, and p is 2 at the end."""
    arc = filled(3, 5)
    victims = [arc_access(arc, 0, expert) for expert in (3, 1, 0, 2, 3, 4, 0)]
    assert victims == [0, NONE, 2, 1, NONE, 2, NONE]
    assert arc.target[0] == 2


class Step(NamedTuple):
    access: int
    victim: int
    p: float
    lists: Lists


def check_steps(arc: Arc, steps: list[Step]) -> None:
    for step in steps:
        assert arc_access(arc, 0, step.access) == step.victim
        assert (step.access, float(arc.target[0]), lists(arc)) == (step.access, step.p, step.lists)


def test_fate_step_by_step() -> None:
    check_steps(
        filled(3, 7),
        [
            # T1 alone is full: its head goes, and leaves no ghost.
            Step(3, 0, 0, ([1, 2, 3], [], [], [])),
            Step(1, NONE, 0, ([2, 3], [1], [], [])),
            # Forgotten, so new. T1 has 2 > p = 0.
            Step(0, 2, 0, ([3, 0], [1], [2], [])),
            # In B1: p = 0 + |T1| = 2, and T1 is not longer than that.
            Step(2, 1, 2, ([3, 0], [2], [], [1])),
            Step(3, NONE, 2, ([0], [2, 3], [], [1])),
            Step(4, 2, 2, ([0, 4], [3], [], [1, 2])),
            Step(0, NONE, 2, ([4], [3, 0], [], [1, 2])),
            # In B2: p = 2 - |T2| = 0, so that T1 gives one up.
            Step(1, 4, 0, ([], [3, 0, 1], [4], [2])),
            # T1 is empty: T2 must give one up.
            Step(5, 3, 0, ([5], [0, 1], [4], [2, 3])),
            # 6 are remembered, twice the capacity: the oldest of B1 is forgotten.
            Step(6, 5, 0, ([6], [0, 1], [5], [2, 3])),
            # p = 0 - 2 stays 0.
            Step(3, 6, 0, ([], [0, 1, 3], [5, 6], [2])),
            # p = 0 + |T1| = 0.
            Step(5, 0, 0, ([], [1, 3, 5], [6], [2, 0])),
        ],
    )


def test_the_textbook_step_by_step() -> None:
    """The same accesses: p moves by 1, not by 2, so that 2 takes the place of 3 and not of 1."""
    check_steps(
        filled(3, 7, textbook=1),
        [
            Step(3, 0, 0, ([1, 2, 3], [], [], [])),
            Step(1, NONE, 0, ([2, 3], [1], [], [])),
            Step(0, 2, 0, ([3, 0], [1], [2], [])),
            # p = 0 + max(1, 0/1).
            Step(2, 3, 1, ([0], [1, 2], [3], [])),
            Step(3, 1, 2, ([0], [2, 3], [], [1])),
            Step(4, 2, 2, ([0, 4], [3], [], [1, 2])),
            # p = 2 - max(1, 0/2) = 1 < |T1|.
            Step(1, 0, 1, ([4], [3, 1], [0], [2])),
            # p = 1 - max(1, 1/1) = 0.
            Step(2, 4, 0, ([], [3, 1, 2], [0, 4], [])),
            Step(5, 3, 0, ([5], [1, 2], [0, 4], [3])),
            # |T1| + |B1| = 3: the oldest of B1 goes, then T1 has more than p.
            Step(6, 5, 0, ([6], [1, 2], [4, 5], [3])),
        ],
    )


def holding(held: Lists, p: float, textbook: int) -> Arc:
    """Return a cache of capacity 3 in a given state."""
    arc = new_arc(1, 7, np.array([3]), textbook)
    for at, inside in enumerate(held):
        for expert in inside:
            arc_move(arc, 0, expert, at)
    arc.target[0] = p
    return arc


@pytest.mark.parametrize(
    ("textbook", "after"),
    [(0, ([6], [0, 1], [5], [2, 3])), (1, ([6], [0, 1], [4, 5], [3]))],
)
def test_full_ghost_lists_forget_in_b1_or_in_the_textbook_in_b2(
    textbook: int, after: Lists
) -> None:
    arc = holding(([5], [0, 1], [4], [2, 3]), 0, textbook)
    assert arc_access(arc, 0, 6) == 5
    assert lists(arc) == after


@pytest.mark.parametrize(("textbook", "p", "victim"), [(0, 3, 0), (1, 2, 5)])
def test_a_hit_in_b2_with_t1_as_long_as_p(textbook: int, p: float, victim: int) -> None:
    """3 - |T2| or 2 - max(1, 0/1) is 1 = |T1|: enough for the textbook to take from T1."""
    arc = holding(([5], [0, 1], [], [2]), p, textbook)
    assert arc_access(arc, 0, 2) == victim
    assert arc.target[0] == 1


def reference(
    capacity: int, accesses: list[int], *, textbook: bool
) -> list[tuple[int, float, Lists]]:
    """Return victim, p and lists of each access: the rules over Python lists, from empty ones."""
    t1: list[int] = []
    t2: list[int] = []
    b1: list[int] = []
    b2: list[int] = []
    p = 0.0
    found = []

    def replace(in_b2: bool) -> int:
        if t1 and (len(t1) > p or (textbook and in_b2 and len(t1) == p)):
            b1.append(t1.pop(0))
            return b1[-1]
        if not t2:
            b1.append(t1.pop(0))
            return b1[-1]
        b2.append(t2.pop(0))
        return b2[-1]

    for x in accesses:
        victim = NONE
        if x in t1 or x in t2:
            (t1 if x in t1 else t2).remove(x)
            t2.append(x)
        elif x in b1:
            p = min(p + (max(1, len(b2) / len(b1)) if textbook else len(t1)), capacity)
            victim = replace(in_b2=False)
            b1.remove(x)
            t2.append(x)
        elif x in b2:
            p = max(p - (max(1, len(b1) / len(b2)) if textbook else len(t2)), 0)
            victim = replace(in_b2=True)
            b2.remove(x)
            t2.append(x)
        else:
            in_all = len(t1 + t2 + b1 + b2)
            if len(t1) + len(b1) == capacity:
                if len(t1) < capacity:
                    b1.pop(0)
                    victim = replace(in_b2=False)
                else:
                    victim = t1.pop(0)
            elif in_all >= capacity:
                if in_all >= 2 * capacity:
                    (b1 if b1 and not textbook else b2).pop(0)
                victim = replace(in_b2=False)
            t1.append(x)
        found.append((victim, float(p), (t1[:], t2[:], b1[:], b2[:])))
    return found


@given(
    capacity=st.integers(1, 5),
    accesses=st.lists(st.integers(0, 8), max_size=120),
    textbook=st.booleans(),
)
@settings(max_examples=400)
def test_arc_does_what_lists_do(capacity: int, accesses: list[int], textbook: bool) -> None:
    """In its layer alone, and never with more than the capacity cached, or twice it remembered."""
    arc = new_arc(3, 9, np.array([9, capacity, 9]), int(textbook))
    for expert, (victim, p, held) in zip(
        accesses, reference(capacity, accesses, textbook=textbook), strict=True
    ):
        assert arc_access(arc, 1, expert) == victim
        assert arc.target[1] == p
        assert lists(arc, 1) == held
        t1, t2, b1, b2 = map(len, held)
        assert t1 + t2 <= capacity
        assert t1 + b1 <= capacity
        assert t1 + t2 + b1 + b2 <= 2 * capacity
        assert arc_holds(arc, 1, expert)
        assert not arc_holds(arc, 1, victim) or victim == NONE
    assert lists(arc, 0) == lists(arc, 2) == ([], [], [], [])


def hits(accesses: list[int], capacity: int, experts: int, textbook: int) -> list[bool]:
    arc = new_arc(1, experts, np.array([capacity]), textbook)
    found = []
    for expert in accesses:
        found.append(arc_holds(arc, 0, expert))
        arc_access(arc, 0, expert)
    return found


def libcachesim_hits(accesses: list[int], capacity: int) -> list[bool]:
    import libcachesim

    cache: Any = libcachesim.ARC(cache_size=capacity)
    return [bool(cache.get(libcachesim.Request(obj_id=e, obj_size=1))) for e in accesses]


@pytest.mark.skipif(sys.platform != "linux", reason="libcachesim is for Linux")
@pytest.mark.parametrize("capacity", [1, 2, 3, 8, 13, 20, 31, 32])
def test_the_textbook_equals_libcachesim_access_by_access(capacity: int) -> None:
    trace = synthesize(layers=2, experts=32, top_k=4, sequences=3, prompt=50, generate=150, seed=3)
    accesses = trace.experts[:, 1].ravel().astype(int).tolist()
    mine = hits(accesses, capacity, 32, textbook=1)
    assert mine == libcachesim_hits(accesses, capacity)
    differing = sum(a != b for a, b in zip(mine, hits(accesses, capacity, 32, 0), strict=True))
    # With one slot there is nothing to choose from, with 31 of 32 hardly a miss to learn from.
    assert (differing > 0) == (1 < capacity < 31)


@pytest.mark.skipif(sys.platform != "linux", reason="libcachesim is for Linux")
def test_where_fate_and_libcachesim_part() -> None:
    """At the second 3: p moved by |T1| = 2 under Fate, which let 1 go, and by 1 there, which let 3.

    See the two step-by-step tests.
    """
    accesses = [0, 1, 2, 3, 1, 0, 2, 3, 4, 0]
    fate = hits(accesses, 3, 5, textbook=0)
    theirs = libcachesim_hits(accesses, 3)
    assert fate == [False] * 4 + [True, False, False, True, False, True]
    assert theirs == [False] * 4 + [True, False, False, False, False, True]
