"""Cache rules: who leaves a layer's cache when another expert enters.

A rule is told what happens (`..._enter`, `..._use`, `..._leave`) and names a victim; it holds no
slots and moves nothing. LRU, FIFO and LFU are one order of experts per layer, oldest first.
"""

from typing import NamedTuple

import numpy as np

from moesim.types import NONE, FloatArray, IntArray


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


def lfu_use(order: Order, uses: IntArray, layer: int, expert: int) -> None:
    """Least frequently used: count, from admission on; of equals the youngest stays longest."""
    uses[layer, expert] += 1
    order_append(order, layer, expert)


def order_least(order: Order, uses: IntArray, layer: int, protected: IntArray) -> int:
    """Return the oldest of the experts used least that have no tokens in `protected`, or NONE.

    `uses` (layers, experts) are 1 or more where they are counted, and 0 where they are not.
    """
    end = order.after.shape[1] - 1
    victim = NONE
    expert: int = order.after[layer, end]
    while expert != end:
        if protected[expert] == 0 and (victim == NONE or uses[layer, expert] < uses[layer, victim]):
            victim = expert
            if uses[layer, expert] <= 1:
                return victim
        expert = order.after[layer, expert]
    return victim


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


COUNTER, LRU, FIFO, LFU = range(4)
"""What a hit does: counts up, makes its expert the youngest, nothing, or both of the first two."""


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


def mrs_update(
    score: FloatArray, layer: int, ids: IntArray, weights: FloatArray, rows: int, alpha: float
) -> None:
    """HybriMoE's "minus recent score" (arXiv 2504.05897): S = alpha * s + (1 - alpha) * S.

    s is the mean of an expert's router weights over the first `rows` rows of `ids` and `weights`
    (tokens, top_k), 0 where it was not chosen.
    """
    for expert in range(score.shape[1]):
        score[layer, expert] *= 1.0 - alpha
    for row in range(rows):
        for rank in range(ids.shape[1]):
            if ids[row, rank] != NONE:
                score[layer, ids[row, rank]] += alpha * weights[row, rank] / rows


def lowest(score: FloatArray, kept: IntArray, layer: int, protected: IntArray) -> int:
    """Return the layer's expert with the lowest score, of equals the lowest id, or NONE.

    Of those that are `kept` (layers, experts), and have no tokens in `protected`.
    """
    victim = NONE
    for expert in range(score.shape[1]):
        if (
            kept[layer, expert] > 0
            and protected[expert] == 0
            and (victim == NONE or score[layer, expert] < score[layer, victim])
        ):
            victim = expert
    return victim


class Lcp(NamedTuple):
    """Least cache priority (MoEpic, arXiv 2509.08342): uses, which count for less as time goes by.

    An expert's priority is `uses * rho ** (idle / omega)`, idle being the tokens since it was last
    active. It counts cached or not.
    """

    uses: IntArray
    """(layers, experts): tokens that chose it so far."""
    last: IntArray
    """(layers, experts): clock of its layer at the last of them."""
    clock: IntArray
    """(layers,): tokens of a prompt one by one; a step of decoding is one, however many tokens."""
    held: IntArray
    """(layers, experts): 1 for what is cached."""
    since: IntArray
    """(layers, experts): when it was cached, in order."""
    entries: IntArray
    """(1,)."""
    decay: FloatArray
    """(idle,): tabulated, so that compiled and plain code have the same last bits."""


def new_lcp(layers: int, experts: int, rho: float = 0.25, omega: int = 128) -> Lcp:
    """Return a cache of nothing, before the first token."""
    shape = (layers, experts)
    return Lcp(
        uses=np.zeros(shape, np.int64),
        last=np.zeros(shape, np.int64),
        clock=np.zeros(layers, np.int64),
        held=np.zeros(shape, np.int64),
        since=np.zeros(shape, np.int64),
        entries=np.zeros(1, np.int64),
        decay=rho ** (np.arange(1 << 16) / omega),
    )


def lcp_count(lcp: Lcp, layer: int, ids: IntArray, tokens: int, one_by_one: int) -> None:
    """Count a layer step's tokens, before anything is evicted."""
    start = lcp.clock[layer]
    for token in range(tokens):
        for k in range(ids.shape[1]):
            expert = ids[token, k]
            if expert != NONE:
                lcp.uses[layer, expert] += 1
                lcp.last[layer, expert] = start + (token if one_by_one else 0) + 1
    lcp.clock[layer] = start + (tokens if one_by_one else 1)


def lcp_priority(lcp: Lcp, layer: int, expert: int) -> float:
    """Return an expert's priority; 0 if it was never active, or too long ago."""
    idle = lcp.clock[layer] - lcp.last[layer, expert]
    if idle >= len(lcp.decay):
        return 0.0
    priority: float = lcp.uses[layer, expert] * lcp.decay[idle]
    return priority


def lcp_victim(lcp: Lcp, layer: int, protected: IntArray) -> int:
    """Return the cached expert of the lowest priority, of equals the one cached first, or NONE."""
    victim = NONE
    lowest = 0.0
    for expert in range(lcp.held.shape[1]):
        if lcp.held[layer, expert] == 1 and protected[expert] == 0:
            priority = lcp_priority(lcp, layer, expert)
            if (
                victim == NONE
                or priority < lowest
                or (priority == lowest and lcp.since[layer, expert] < lcp.since[layer, victim])
            ):
                victim = expert
                lowest = priority
    return victim


def lcp_enter(lcp: Lcp, layer: int, expert: int) -> None:
    """Note that an expert is cached from now on."""
    lcp.held[layer, expert] = 1
    lcp.since[layer, expert] = lcp.entries[0]
    lcp.entries[0] += 1
