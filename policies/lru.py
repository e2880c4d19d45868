"""Load on demand: every expert runs on the GPU, each layer keeps those used last."""

from typing import Literal, NamedTuple

import numpy as np

from moesim.policies.api import (
    Placement,
    Plan,
    Setting,
    View,
    even_split,
    layer_caches,
    run_on_gpu,
)
from moesim.policies.parts.cache import FIFO, LFU, LRU
from moesim.policies.parts.loading import DemandCache, load, new_demand_cache, note_use
from moesim.types import WHOLE

RULES = {"lru": LRU, "fifo": FIFO, "lfu": LFU}


class Lru(NamedTuple):
    """GPU only: misses are copied on demand into a per-layer LRU cache, which starts empty.

    The cache of Mixtral-offloading (arXiv 2312.17238) without its speculative loads and without
    swapping victims back. Experts active in a step are not evicted in it. Other rules: `fifo`
    evicts what was admitted first; `lfu` what was used in the fewest steps since its admission, of
    equals what was used least recently.
    """

    cache: DemandCache
    staging: int

    @classmethod
    def new(
        cls, setting: Setting, staging: int = 2, rule: Literal["lru", "fifo", "lfu"] = "lru"
    ) -> "Lru":
        """`staging`: slots for experts that find no place in the cache."""
        staging = max(1, min(staging, setting.slots))
        capacity = np.minimum(
            even_split(max(0, setting.slots - staging), setting.layers), setting.experts
        )
        cache = new_demand_cache(setting.layers, setting.experts, capacity, RULES[rule])
        return cls(cache, staging)

    def place(self, setting: Setting) -> Placement:
        """Split what staging leaves evenly over the layers."""
        return layer_caches(
            setting,
            cached=np.zeros((setting.layers, setting.experts), np.int64),
            slots=self.cache.capacity,
            staging_slots=self.staging,
        )

    def dispatch(self, view: View, plan: Plan) -> None:
        """Run the hits, then load and run the misses in the order in which tokens ask for them."""
        for i in range(view.n_active):
            expert = view.active[i]
            if view.cached[view.layer, expert] == WHOLE:
                note_use(self.cache, view.layer, expert)
                run_on_gpu(plan, expert)
        for i in range(view.n_active):
            expert = view.active[i]
            if view.cached[view.layer, expert] < WHOLE:
                load(view, plan, self.cache, expert)
