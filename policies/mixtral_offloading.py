"""Mixtral-offloading, arXiv 2312.17238: an LRU cache per layer, and loads from a guess."""

from typing import NamedTuple

import numpy as np

from moesim.policies.api import (
    CACHE,
    Placement,
    Plan,
    Prediction,
    Setting,
    View,
    admit,
    even_split,
    evict,
    fetch,
    layer_caches,
    run_on_gpu,
)
from moesim.policies.dali import rank_guesses
from moesim.policies.parts.cache import lru_use, order_leave, order_oldest
from moesim.policies.parts.loading import LruCache, new_lru_cache
from moesim.types import WHOLE, IntArray


class MixtralOffloading(NamedTuple):
    """GPU only: each layer keeps the experts used last; guessed ones of the next are loaded early.

    Paper: an LRU cache of k experts per layer (2 for a GPU of 12 GB, 4 for 16 GB, of Mixtral's 8);
    the next layer's gate, applied to what this layer's gate saw, names one or two likely experts,
    which are loaded once this layer's own loads are issued, into buffers apart, where they displace
    nothing; one that is used takes the place of its layer's least recently used expert. Released
    code, which has no speculative loads: caches begin with the first experts; cached experts run
    first, then the others as they are loaded; all active experts count as used before any is
    loaded; the victim is the least recently used one, even if this step has just used it.

    Inferred: k is what the budget holds; of the guesses the most likely are taken first and left
    out if they are cached then; with several tokens those guessed for most of them are the most
    likely; guesses are made for prompts too, and not across tokens, from the last layer to the
    first; experts that arrive early run before those that are copied now.

    Deviations: `predictor=auto` takes a corrected guess if the trace holds one (`gate1` is the
    paper's); the released code copies victims back to the host, which is not simulated.
    """

    cache: LruCache
    speculative: int
    staging: int
    resident: IntArray
    """(layers, experts): at the start."""
    nobody: IntArray
    """(experts,): zeros; no expert is safe from being the victim."""
    candidates: IntArray
    listed: IntArray
    """(experts,): scratch space."""
    predictor: str
    recall: float

    @classmethod
    def new(
        cls,
        setting: Setting,
        cached: int = 0,
        speculative: int = 2,
        predictor: str = "auto",
        recall: float = 0.9,
    ) -> "MixtralOffloading":
        """`cached`: the most per layer, 0 being what the budget holds; `recall`: of noisy-oracle.

        A buffer is taken out of the budget for each speculative load.
        """
        staging = min(speculative, setting.slots)
        if setting.slots - staging < setting.layers:
            staging = max(1, staging)
        capacity = np.minimum(
            even_split(max(0, setting.slots - staging), setting.layers),
            min(cached, setting.experts) or setting.experts,
        )
        shape = (setting.layers, setting.experts)
        cache = new_lru_cache(*shape, capacity)
        resident = np.zeros(shape, np.int64)
        for layer in range(setting.layers):
            for expert in range(capacity[layer]):
                resident[layer, expert] = WHOLE
                lru_use(cache.order, layer, expert)
        cache.kept[:] = capacity
        return cls(
            cache=cache,
            speculative=speculative,
            staging=staging,
            resident=resident,
            nobody=np.zeros(setting.experts, np.int64),
            candidates=np.zeros(setting.experts, np.int64),
            listed=np.zeros(setting.experts, np.int64),
            predictor=predictor,
            recall=recall,
        )

    def place(self, setting: Setting) -> Placement:
        """Fill the caches with the first experts of each layer."""
        prediction = Prediction(self.predictor, recall=self.recall)
        return layer_caches(
            setting,
            cached=self.resident,
            slots=self.cache.capacity,
            staging_slots=self.staging,
            predictions=(prediction,) if self.speculative > 0 else (),
        )

    def dispatch(self, view: View, plan: Plan) -> None:
        """Run what is cached, then what was guessed, then what must be loaded; then guess."""
        layer = view.layer
        for i in range(view.n_active):
            if view.cached[layer, view.active[i]] == WHOLE:
                lru_use(self.cache.order, layer, view.active[i])
                run_on_gpu(plan, view.active[i])
        keeps = self.cache.capacity[layer] > 0
        for i in range(view.n_active):
            expert = view.active[i]
            if view.cached[layer, expert] < WHOLE and view.staged[layer, expert] == WHOLE:
                if keeps:
                    replace_oldest(view, plan, self.cache, self.nobody)
                    admit(plan, layer, expert)
                    lru_use(self.cache.order, layer, expert)
                run_on_gpu(plan, expert)
        for i in range(view.n_active):
            expert = view.active[i]
            if view.cached[layer, expert] < WHOLE and view.staged[layer, expert] < WHOLE:
                if keeps:
                    replace_oldest(view, plan, self.cache, self.nobody)
                    fetch(plan, layer, expert, into=CACHE, urgent=1)
                    lru_use(self.cache.order, layer, expert)
                run_on_gpu(plan, expert)
        if self.speculative > 0 and layer < len(view.cached) - 1:
            speculate(view, plan, self.speculative, self.candidates, self.listed)


def replace_oldest(view: View, plan: Plan, cache: LruCache, nobody: IntArray) -> None:
    """Give up the expert of this layer that was used least recently: its cache is always full."""
    victim = order_oldest(cache.order, view.layer, nobody)
    order_leave(cache.order, view.layer, victim)
    evict(plan, view.layer, victim)


def speculate(view: View, plan: Plan, size: int, candidates: IntArray, listed: IntArray) -> None:
    """Fetch those of the `size` likeliest experts of the next layer that are not cached there."""
    n = rank_guesses(view, candidates, listed)
    for i in range(min(size, n)):
        if view.cached[view.layer + 1, candidates[i]] == 0:
            fetch(plan, view.layer + 1, candidates[i])
