"""Cache rules: who leaves a layer's cache when another expert enters.

A rule is told what happens (`..._enter`, `..._use`, `..._leave`) and names a victim; it holds no
slots and moves nothing. LRU and FIFO are one order of experts per layer, oldest first.
"""

from typing import NamedTuple

import numpy as np

from moesim.types import NONE, IntArray


class Order(NamedTuple):
    """A doubly linked list per layer; entry `experts` is both its front and its end."""

    after: IntArray
    """(layers, experts + 1)."""
    before: IntArray
    """(layers, experts + 1); NONE for an expert that is not in the list."""


def new_order(layers: int, experts: int) -> Order:
    """Return empty lists."""
    order = Order(np.full((layers, experts + 1), NONE), np.full((layers, experts + 1), NONE))
    order.after[:, experts] = experts
    order.before[:, experts] = experts
    return order


def order_leave(order: Order, layer: int, expert: int) -> None:
    """Take an expert out of its layer's list; nothing happens if it is not there."""
    before = order.before[layer, expert]
    if before != NONE:
        after = order.after[layer, expert]
        order.after[layer, before] = after
        order.before[layer, after] = before
        order.before[layer, expert] = NONE


def order_append(order: Order, layer: int, expert: int) -> None:
    """Put an expert at the young end of its layer's list, wherever it was."""
    order_leave(order, layer, expert)
    end = order.after.shape[1] - 1
    last = order.before[layer, end]
    order.after[layer, last] = expert
    order.before[layer, expert] = last
    order.after[layer, expert] = end
    order.before[layer, end] = expert


def order_oldest(order: Order, layer: int, protected: IntArray) -> int:
    """Return the oldest expert of a layer's list that has no tokens in `protected`, or NONE."""
    end = order.after.shape[1] - 1
    expert: int = order.after[layer, end]
    while expert != end:
        if protected[expert] == 0:
            return expert
        expert = order.after[layer, expert]
    return NONE


def lru_use(order: Order, layer: int, expert: int) -> None:
    """Least recently used: a hit makes an expert the youngest."""
    order_append(order, layer, expert)


def fifo_use(order: Order, layer: int, expert: int) -> None:
    """First in, first out: a hit changes nothing."""


class Window(NamedTuple):
    """DALI's workload-aware cache (arXiv 2602.03495, section 4.3 and Algorithm 2)."""

    score: IntArray
    """(layers, experts): tokens routed in this window."""
    steps: IntArray
    """(layers,): steps counted, since the start."""


def new_window(layers: int, experts: int) -> Window:
    """Return a window in which nothing was counted yet."""
    return Window(np.zeros((layers, experts), np.int64), np.zeros(layers, np.int64))


def window_count(
    window: Window, layer: int, active: IntArray, n_active: int, loads: IntArray
) -> None:
    """Add one step's loads to the layer's scores."""
    for i in range(n_active):
        window.score[layer, active[i]] += loads[active[i]]
    window.steps[layer] += 1


def window_due(window: Window, layer: int, size: int, early: int) -> bool:
    """Say whether the layer swaps now: after each full window.

    With `early` as Algorithm 2 has it, `i mod size == 0` counted from step 0: after the first step
    already, and then every `size` steps.
    """
    done: int = window.steps[layer]
    return (done - 1 if early else done) % size == 0


COUNTER, LRU, FIFO = range(3)
"""What a hit does to its way: counts up, makes it the youngest, or nothing."""


class Ways(NamedTuple):
    """A set of numbered places per layer, as Huang et al. have it (arXiv 2512.16473).

    Under every rule the way with the lowest count is filled next, of equals the lowest number, and
    then gets more than all others; the rules differ in what a hit does.
    """

    tag: IntArray
    """(layers, ways): the expert that is there or on its way, or NONE."""
    counts: IntArray
    """(layers, ways)."""


def new_ways(layers: int, ways: int) -> Ways:
    """Return empty sets."""
    return Ways(np.full((layers, ways), NONE), np.zeros((layers, ways), np.int64))


def way_of(ways: Ways, layer: int, expert: int) -> int:
    """Return the way that holds an expert, or NONE."""
    for way in range(ways.tag.shape[1]):
        if ways.tag[layer, way] == expert:
            return way
    return NONE


def way_youngest(ways: Ways, layer: int, way: int) -> None:
    """Let a way count more than all ways of its layer."""
    most = 0
    for other in range(ways.tag.shape[1]):
        most = max(most, ways.counts[layer, other])
    ways.counts[layer, way] = most + 1


def way_use(ways: Ways, layer: int, way: int, rule: int) -> None:
    """Note a hit: the "LRU" of Huang's released code counts up, which is tinted by frequency."""
    if rule == COUNTER:
        ways.counts[layer, way] += 1
    elif rule == LRU:
        way_youngest(ways, layer, way)


def way_victim(ways: Ways, layer: int, protected: IntArray) -> int:
    """Return the way to fill next: empty or its expert at 0 in `protected`; or NONE."""
    victim = NONE
    for way in range(ways.tag.shape[1]):
        expert = ways.tag[layer, way]
        if (expert == NONE or protected[expert] == 0) and (
            victim == NONE or ways.counts[layer, way] < ways.counts[layer, victim]
        ):
            victim = way
    return victim


def way_fill(ways: Ways, layer: int, way: int, expert: int) -> None:
    """Put an expert into a way, instead of what was there."""
    ways.tag[layer, way] = expert
    way_youngest(ways, layer, way)
