"""Load missing experts on demand into a layer's cache, in place of the one used least recently."""

from typing import NamedTuple

import numpy as np

from moesim.policies.api import CACHE, Plan, View, evict, fetch, run_on_gpu
from moesim.policies.parts.cache import Order, lru_use, new_order, order_leave, order_oldest
from moesim.types import NONE, IntArray


class LruCache(NamedTuple):
    """Which experts each layer keeps, oldest first, and how many it may."""

    order: Order
    kept: IntArray
    """(layers,)."""
    capacity: IntArray
    """(layers,)."""


def new_lru_cache(layers: int, experts: int, capacity: IntArray) -> LruCache:
    """Return caches that keep nothing yet."""
    return LruCache(new_order(layers, experts), np.zeros(layers, np.int64), capacity)


def load(view: View, plan: Plan, cache: LruCache, expert: int) -> None:
    """Run an expert that is not cached, and keep it if that is possible.

    Experts active in this step are not evicted: the GPU is about to read them. If there is no
    other, the expert passes through staging and is not kept.
    """
    layer = view.layer
    if cache.kept[layer] < cache.capacity[layer]:
        cache.kept[layer] += 1
    else:
        victim = order_oldest(cache.order, layer, view.loads)
        if victim == NONE:
            run_on_gpu(plan, expert)
            return
        order_leave(cache.order, layer, victim)
        evict(plan, layer, victim)
    fetch(plan, layer, expert, into=CACHE, urgent=1)
    run_on_gpu(plan, expert)
    lru_use(cache.order, layer, expert)
