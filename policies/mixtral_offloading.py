"""Mixtral-offloading, arXiv 2312.17238: an LRU cache per layer, and loads from a guess."""

from typing import NamedTuple

import numpy as np

from moesim.policies.api import (
    Placement,
    Plan,
    Prediction,
    Setting,
    View,
    even_split,
    fetch,
    layer_caches,
)
from moesim.policies.dali import rank_guesses
from moesim.policies.parts.loading import DemandCache, full_demand_cache, run_replacing
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

    cache: DemandCache
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
        resident = np.where(np.arange(setting.experts) < capacity[:, np.newaxis], WHOLE, 0)
        return cls(
            cache=full_demand_cache(resident),
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
        run_replacing(view, plan, self.cache, self.nobody)
        if self.speculative > 0 and view.layer < len(view.cached) - 1:
            speculate(view, plan, self.speculative, self.candidates, self.listed)


def speculate(view: View, plan: Plan, size: int, candidates: IntArray, listed: IntArray) -> None:
    """Fetch those of the `size` likeliest experts of the next layer that are not cached there."""
    n = rank_guesses(view, candidates, listed)
    for i in range(min(size, n)):
        if view.cached[view.layer + 1, candidates[i]] == 0:
            fetch(plan, view.layer + 1, candidates[i])
