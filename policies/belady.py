"""Belady's rule: the expert used again latest leaves a layer's cache. It knows the future."""

from typing import NamedTuple

import numpy as np

from moesim.policies.api import (
    CACHE,
    Placement,
    Plan,
    Setting,
    View,
    even_split,
    evict,
    fetch,
    layer_caches,
    run_on_gpu,
    sees_future,
)
from moesim.types import NONE, WHOLE, IntArray

NEVER = 1 << 62


class NextUse(NamedTuple):
    """When each expert is used, as far as that is still to come."""

    steps: IntArray
    """Steps of use of each expert of each layer in turn, rising, `NEVER` behind its last one."""
    at: IntArray
    """(layers, experts): where each expert's next use is."""


def new_next_use(future: IntArray, layers: int, experts: int) -> NextUse:
    """Return all uses of a run, from `Setting.future`."""
    pairs = np.concatenate((future[:, 1] * experts + future[:, 2], np.arange(layers * experts)))
    steps = np.concatenate((future[:, 0], np.full(layers * experts, NEVER)))
    order = np.lexsort((steps, pairs))
    first = np.searchsorted(pairs[order], np.arange(layers * experts))
    return NextUse(steps[order], first.reshape(layers, experts))


def pass_by(uses: NextUse, view: View) -> None:
    """Count the uses of this layer step as past."""
    for i in range(view.n_active):
        expert = view.active[i]
        if uses.steps[uses.at[view.layer, expert]] == view.step:
            uses.at[view.layer, expert] += 1


class FutureCache(NamedTuple):
    """Which experts each layer keeps, and how many it may."""

    inside: IntArray
    """(layers, experts): 1 or 0."""
    kept: IntArray
    """(layers,)."""
    capacity: IntArray
    """(layers,)."""
    uses: NextUse


def new_future_cache(setting: Setting, staging: int) -> FutureCache:
    """Return empty caches that share evenly what staging leaves of the budget."""
    shape = (setting.layers, setting.experts)
    capacity = np.minimum(
        even_split(max(0, setting.slots - staging), setting.layers), setting.experts
    )
    return FutureCache(
        np.zeros(shape, np.int64),
        np.zeros(setting.layers, np.int64),
        capacity,
        new_next_use(setting.future, *shape),
    )


def latest(cache: FutureCache, layer: int, protected: IntArray) -> int:
    """Return the kept expert used again latest, of equals the lowest id, or NONE.

    Those that have tokens in `protected` are left out.
    """
    victim = NONE
    last = -1
    for expert in range(len(protected)):
        if cache.inside[layer, expert] == 1 and protected[expert] == 0:
            step = cache.uses.steps[cache.uses.at[layer, expert]]
            if step > last:
                victim = expert
                last = step
    return victim


def make_room(plan: Plan, cache: FutureCache, layer: int, protected: IntArray, limit: int) -> bool:
    """Free a place if there is none, by giving up an expert used again after step `limit`.

    Say whether there is a place now.
    """
    if cache.kept[layer] < cache.capacity[layer]:
        return True
    victim = latest(cache, layer, protected)
    if victim == NONE or cache.uses.steps[cache.uses.at[layer, victim]] <= limit:
        return False
    cache.inside[layer, victim] = 0
    cache.kept[layer] -= 1
    evict(plan, layer, victim)
    return True


def keep(cache: FutureCache, layer: int, expert: int) -> None:
    """Note that an expert takes a free place."""
    cache.inside[layer, expert] = 1
    cache.kept[layer] += 1


@sees_future
class Belady(NamedTuple):
    """GPU only: misses are copied on demand, in place of the expert that is used again latest.

    The policy `lru` with Belady's rule (1966), by step: all experts of a step are needed at once
    and none of them leaves in it; ties go to the lowest id. A missing expert is always kept if
    another may leave. Which experts the routers will choose is known: a reference, not a bound;
    fewest misses is not least time.
    """

    cache: FutureCache
    staging: int

    @classmethod
    def new(cls, setting: Setting, staging: int = 2) -> "Belady":
        """`staging`: slots for experts that find no place in the cache."""
        staging = max(1, min(staging, setting.slots))
        return cls(new_future_cache(setting, staging), staging)

    def place(self, setting: Setting) -> Placement:
        """Split what staging leaves evenly over the layers, and cache nothing yet."""
        return layer_caches(
            setting,
            cached=np.zeros((setting.layers, setting.experts), np.int64),
            slots=self.cache.capacity,
            staging_slots=self.staging,
        )

    def dispatch(self, view: View, plan: Plan) -> None:
        """Run the hits, then load and run the misses in the order in which tokens ask for them."""
        pass_by(self.cache.uses, view)
        for i in range(view.n_active):
            if view.cached[view.layer, view.active[i]] == WHOLE:
                run_on_gpu(plan, view.active[i])
        for i in range(view.n_active):
            expert = view.active[i]
            if view.cached[view.layer, expert] < WHOLE:
                if make_room(plan, self.cache, view.layer, view.loads, -1):
                    keep(self.cache, view.layer, expert)
                    fetch(plan, view.layer, expert, into=CACHE, urgent=1)
                run_on_gpu(plan, expert)
