"""ARC: a cache that balances recency against frequency by what it recently gave up.

One instance serves all layers. Nothing is allocated after the start.
"""

from typing import NamedTuple

import numpy as np

from moesim.policies.parts.cache import Order, new_order, order_append, order_leave
from moesim.types import NONE, FloatArray, IntArray

T1, T2, B1, B2 = range(4)
"""Cached and used once lately, cached and used again; given up of the former, of the latter."""
LISTS = 4


class Arc(NamedTuple):
    """Four lists per layer, oldest first; list `t` of a layer is row `LISTS * layer + t`."""

    order: Order
    size: IntArray
    """(LISTS * layers,)."""
    where: IntArray
    """(layers, experts): the list that an expert is in, or NONE."""
    target: FloatArray
    """(layers,): p, how long T1 should be; whole numbers unless it is the textbook's."""
    capacity: IntArray
    """(layers,)."""
    textbook: int


def new_arc(layers: int, experts: int, capacity: IntArray, textbook: int = 0) -> Arc:
    """Return caches that hold nothing yet."""
    return Arc(
        new_order(LISTS * layers, experts),
        np.zeros(LISTS * layers, np.int64),
        np.full((layers, experts), NONE),
        np.zeros(layers),
        capacity,
        textbook,
    )


def arc_holds(arc: Arc, layer: int, expert: int) -> bool:
    """Say whether an expert is cached; one in a ghost list is not."""
    at: int = arc.where[layer, expert]
    return at in (T1, T2)


def arc_access(arc: Arc, layer: int, expert: int) -> int:
    """Note one use of an expert, which is cached from now on; return who leaves, or NONE.

    As Fate's released code has it (`expert_ARC_cache.py`). The textbook (Megiddo and Modha, FAST
    2003, Fig. 4) differs in three places. A ghost hit moves p by the ratio of the ghost lists, at
    least 1, where Fate takes the length of T1 or T2. A hit in B2 takes the victim from T1 also if
    T1 is just as long as p. Of full ghost lists B2 loses its oldest, where Fate takes it from B1.
    The capacity must be 1 or more.
    """
    row = LISTS * layer
    size = arc.size
    capacity = arc.capacity[layer]
    at = arc.where[layer, expert]
    victim = NONE
    if at in (T1, T2):
        arc_move(arc, layer, expert, T2)
    elif at == B1:
        step = float(min(size[row + T1], capacity))
        if arc.textbook == 1:
            step = max(1.0, size[row + B2] / size[row + B1])
        arc.target[layer] = min(arc.target[layer] + step, float(capacity))
        victim = arc_replace(arc, layer, 0)
        arc_move(arc, layer, expert, T2)
    elif at == B2:
        step = float(min(size[row + T2], capacity))
        if arc.textbook == 1:
            step = max(1.0, size[row + B1] / size[row + B2])
        arc.target[layer] = max(arc.target[layer] - step, 0.0)
        victim = arc_replace(arc, layer, arc.textbook)
        arc_move(arc, layer, expert, T2)
    else:
        victim = arc_make_room(arc, layer)
        arc_move(arc, layer, expert, T1)
    return victim


def arc_make_room(arc: Arc, layer: int) -> int:
    """Make room for an expert that no list knows; return who leaves, or NONE."""
    row = LISTS * layer
    size = arc.size
    capacity = arc.capacity[layer]
    in_all = size[row + T1] + size[row + T2] + size[row + B1] + size[row + B2]
    if size[row + T1] + size[row + B1] == capacity:
        if size[row + T1] == capacity:
            victim = arc_oldest(arc, layer, T1)
            arc_move(arc, layer, victim, NONE)
            return victim
        arc_move(arc, layer, arc_oldest(arc, layer, B1), NONE)
        return arc_replace(arc, layer, 0)
    if in_all < capacity:
        return NONE
    if in_all >= 2 * capacity:
        from_b1 = size[row + B1] > 0 and arc.textbook == 0
        arc_move(arc, layer, arc_oldest(arc, layer, B1 if from_b1 else B2), NONE)
    return arc_replace(arc, layer, 0)


def arc_replace(arc: Arc, layer: int, at_target: int) -> int:
    """Turn the oldest of T1 or T2 into a ghost and return it.

    T1 gives one up if it is longer than p, with `at_target` also if it is just as long.
    """
    in_t1 = arc.size[LISTS * layer + T1]
    target = arc.target[layer]
    from_t1 = in_t1 > 0 and (in_t1 > target or (at_target == 1 and in_t1 == target))
    if from_t1 or arc.size[LISTS * layer + T2] == 0:
        victim = arc_oldest(arc, layer, T1)
        arc_move(arc, layer, victim, B1)
    else:
        victim = arc_oldest(arc, layer, T2)
        arc_move(arc, layer, victim, B2)
    return victim


def arc_oldest(arc: Arc, layer: int, at: int) -> int:
    """Return the head of a list that is not empty."""
    order = arc.order
    expert: int = order.after[LISTS * layer + at, order.after.shape[1] - 1]
    return expert


def arc_move(arc: Arc, layer: int, expert: int, to: int) -> None:
    """Put an expert at the tail of a list, or with NONE forget it."""
    row = LISTS * layer
    at = arc.where[layer, expert]
    if at != NONE:
        order_leave(arc.order, row + at, expert)
        arc.size[row + at] -= 1
    if to != NONE:
        order_append(arc.order, row + to, expert)
        arc.size[row + to] += 1
    arc.where[layer, expert] = to
