"""KTransformers, SOSP 2025: the CPU computes the experts, but for a fixed set on the GPU."""

from typing import Literal, NamedTuple

import numpy as np

from moesim.policies.api import (
    Placement,
    Plan,
    Setting,
    View,
    layer_caches,
    run_on_cpu,
    run_on_gpu,
    run_shared,
)
from moesim.policies.parts.placement import across_layers, by_popularity, resident
from moesim.types import NONE, IntArray

SEED = 42


class KTransformers(NamedTuple):
    """A fixed mask of experts runs on the GPU, the CPU computes the others beside it.

    Released code (`kvcache-ai/ktransformers`), and what a layer does: the CPU's experts are
    submitted first, as one queue; shared experts and the GPU's experts run meanwhile; the CPU's
    output is copied back and added. Nothing is ever loaded. Masks: `uniform`, equally many experts
    per layer (the default); `frequency`, the most used pairs of all layers by recorded counts;
    `front-loading`, layer after layer from the first one; `random`, with seed 42.

    Expert deferral (code; `deferred` of each token's k, default 0) changes the model's results:
    protected are the k - `deferred` highest-ranked experts of every token, one set for the whole
    batch; what is not in it and not on the GPU is computed after the others and added one layer
    later. A rank on the GPU counts, too.

    Inferred: the lowest ids of each layer; counts are of the part of the trace that is not
    replayed, and equal ones go to the lower layer and id; without any, `frequency` places as
    `uniform`; the last layer never defers. Left out: the update of the mask in a long prefill. The
    choice between AMX and AVX-512 kernels is a matter of the machine's table.
    """

    parts: IntArray
    """(layers, experts): what is resident."""
    deferred: int
    immediate: IntArray
    """(experts,): scratch space; 1 for an expert that is protected from deferral."""
    notices: tuple[str, ...]

    @classmethod
    def new(
        cls,
        setting: Setting,
        mask: Literal["uniform", "frequency", "front-loading", "random"] = "uniform",
        deferred: int = 0,
    ) -> "KTransformers":
        """Fill the budget: it takes the place of the code's ratio of experts on the GPU."""
        notices = []
        if mask == "front-loading":
            wanted = np.arange(setting.layers * setting.experts)
        elif mask == "random":
            pairs = setting.layers * setting.experts
            wanted = np.random.default_rng(SEED).permutation(pairs)
        elif mask == "frequency" and setting.popularity.any():
            wanted = by_popularity(setting)
        else:
            wanted = across_layers(setting)
            if mask == "frequency":
                notices.append(
                    "ktransformers: mask=frequency counts on the part of the trace that is not "
                    "replayed, and nothing is left of it: the mask is uniform"
                )
        if deferred > 0:
            notices.append(
                f"ktransformers: deferred={deferred} adds up to {min(deferred, setting.top_k)} of "
                f"each token's {setting.top_k} experts one layer late, which changes the model's "
                "results"
            )
        return cls(
            parts=resident(setting, wanted[: setting.slots]),
            deferred=deferred,
            immediate=np.zeros(setting.experts, np.int64),
            notices=tuple(notices),
        )

    def place(self, setting: Setting) -> Placement:
        """Fill exactly the slots that are used."""
        return layer_caches(
            setting,
            cached=self.parts,
            slots=(self.parts > 0).sum(axis=1),
            staging_slots=0,
            notices=self.notices,
        )

    def dispatch(self, view: View, plan: Plan) -> None:
        """Submit what the CPU computes, what may be late last; then what the GPU does."""
        last = view.layer == len(view.cached) - 1
        protect(view, 0 if last else self.deferred, self.immediate)
        for late in range(2):
            for i in range(view.n_active):
                expert = view.active[i]
                if view.cached[view.layer, expert] == 0 and self.immediate[expert] != late:
                    run_on_cpu(plan, expert, late)
        run_shared(plan)
        for i in range(view.n_active):
            if view.cached[view.layer, view.active[i]] > 0:
                run_on_gpu(plan, view.active[i])


def protect(view: View, deferred: int, immediate: IntArray) -> None:
    """Mark the experts that no token may defer: all but the last `deferred` of each one's list."""
    immediate[:] = 0
    for token in range(view.tokens):
        for rank in range(view.ids.shape[1] - deferred):
            if view.ids[token, rank] != NONE:
                immediate[view.ids[token, rank]] = 1
