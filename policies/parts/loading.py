"""Load missing experts on demand into a layer's cache, in place of one that its rule gives up."""

from typing import NamedTuple

import numpy as np

from moesim.policies.api import CACHE, Plan, View, admit, evict, fetch, run_on_gpu
from moesim.policies.parts.cache import (
    FIFO,
    LFU,
    LRU,
    Order,
    fifo_use,
    lfu_use,
    lru_use,
    new_order,
    order_append,
    order_least,
    order_leave,
    order_oldest,
)
from moesim.types import NONE, WHOLE, IntArray


class DemandCache(NamedTuple):
    """Which experts each layer keeps of those that it copied on demand, and how many it may."""

    order: Order
    uses: IntArray
    """(layers, experts): since an expert was admitted; 0 where the rule does not count."""
    kept: IntArray
    """(layers,)."""
    capacity: IntArray
    """(layers,)."""
    rule: int
    """LRU, FIFO or LFU of `parts.cache`."""


def new_demand_cache(layers: int, experts: int, capacity: IntArray, rule: int = LRU) -> DemandCache:
    """Return caches that keep nothing yet."""
    order = new_order(layers, experts)
    uses = np.zeros((layers, experts), np.int64)
    return DemandCache(order, uses, np.zeros(layers, np.int64), capacity, rule)


def full_demand_cache(resident: IntArray) -> DemandCache:
    """Return LRU caches that hold these experts (layers, experts), the lowest id as the oldest."""
    layers, experts = resident.shape
    capacity = (resident > 0).sum(axis=1)
    cache = new_demand_cache(layers, experts, capacity)
    cache.kept[:] = capacity
    for layer, expert in np.argwhere(resident > 0).tolist():
        lru_use(cache.order, layer, expert)
    return cache


def note_use(cache: DemandCache, layer: int, expert: int) -> None:
    """Note a hit."""
    if cache.rule == LFU:
        lfu_use(cache.order, cache.uses, layer, expert)
    elif cache.rule == FIFO:
        fifo_use(cache.order, layer, expert)
    else:
        lru_use(cache.order, layer, expert)


def load(view: View, plan: Plan, cache: DemandCache, expert: int) -> None:
    """Run an expert that is not cached, and keep it if that is possible.

    Experts active in this step are not evicted: the GPU is about to read them. If there is no
    other, the expert passes through staging and is not kept.
    """
    layer = view.layer
    if cache.kept[layer] < cache.capacity[layer]:
        cache.kept[layer] += 1
    else:
        victim = order_least(cache.order, cache.uses, layer, view.loads)
        if victim == NONE:
            run_on_gpu(plan, expert)
            return
        order_leave(cache.order, layer, victim)
        cache.uses[layer, victim] = 0
        evict(plan, layer, victim)
    fetch(plan, layer, expert, into=CACHE, urgent=1)
    run_on_gpu(plan, expert)
    if cache.rule == LFU:
        lfu_use(cache.order, cache.uses, layer, expert)
    else:
        order_append(cache.order, layer, expert)


def run_replacing(view: View, plan: Plan, cache: DemandCache, nobody: IntArray) -> None:
    """Run a layer of an LRU cache that is full from the start, as Mixtral-offloading does.

    First what is cached, then what was staged ahead, then what must be loaded; each of the latter
    takes the place of the expert used least recently, even if this step has just used it. `nobody`
    is (experts,) zeros.
    """
    layer = view.layer
    for i in range(view.n_active):
        if view.cached[layer, view.active[i]] == WHOLE:
            lru_use(cache.order, layer, view.active[i])
            run_on_gpu(plan, view.active[i])
    keeps = cache.capacity[layer] > 0
    for i in range(view.n_active):
        expert = view.active[i]
        if view.cached[layer, expert] < WHOLE and view.staged[layer, expert] == WHOLE:
            if keeps:
                replace_oldest(plan, cache, layer, expert, nobody)
                admit(plan, layer, expert)
            run_on_gpu(plan, expert)
    for i in range(view.n_active):
        expert = view.active[i]
        if view.cached[layer, expert] < WHOLE and view.staged[layer, expert] < WHOLE:
            if keeps:
                replace_oldest(plan, cache, layer, expert, nobody)
                fetch(plan, layer, expert, into=CACHE, urgent=1)
            run_on_gpu(plan, expert)


def replace_oldest(
    plan: Plan, cache: DemandCache, layer: int, expert: int, nobody: IntArray
) -> None:
    """Give up the expert that was used least recently, and note the one that takes its place."""
    victim = order_oldest(cache.order, layer, nobody)
    order_leave(cache.order, layer, victim)
    evict(plan, layer, victim)
    lru_use(cache.order, layer, expert)
