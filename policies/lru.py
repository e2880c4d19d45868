"""Load on demand: every expert runs on the GPU, each layer keeps those used last."""

from typing import NamedTuple

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
from moesim.policies.parts.cache import lru_use
from moesim.policies.parts.loading import LruCache, load, new_lru_cache
from moesim.types import WHOLE


class Lru(NamedTuple):
    """GPU only: misses are copied on demand into a per-layer LRU cache, which starts empty.

    The cache of Mixtral-offloading (arXiv 2312.17238) without its speculative loads and without
    swapping victims back. Experts active in a step are not evicted in it.
    """

    cache: LruCache
    staging: int

    @classmethod
    def new(cls, setting: Setting, staging: int = 2) -> "Lru":
        """`staging`: slots for experts that find no place in the cache."""
        staging = max(1, min(staging, setting.slots))
        capacity = np.minimum(
            even_split(max(0, setting.slots - staging), setting.layers), setting.experts
        )
        return cls(new_lru_cache(setting.layers, setting.experts, capacity), staging)

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
                lru_use(self.cache.order, view.layer, expert)
                run_on_gpu(plan, expert)
        for i in range(view.n_active):
            expert = view.active[i]
            if view.cached[view.layer, expert] < WHOLE:
                load(view, plan, self.cache, expert)
