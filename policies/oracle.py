"""A reference that knows the future: Belady's cache, perfect prefetch, the best assignment."""

from typing import NamedTuple

import numpy as np

from moesim.policies.api import (
    CACHE,
    Placement,
    Plan,
    Setting,
    View,
    admit,
    arriving_ns,
    fetch,
    layer_caches,
    queued_ns,
    run_on_cpu,
    run_on_gpu,
    sees_future,
    transfer_ns,
)
from moesim.policies.belady import (
    FutureCache,
    keep,
    make_room,
    new_future_cache,
    pass_by,
)
from moesim.policies.dali import estimate_costs
from moesim.policies.parts.assign import exact, greedy
from moesim.policies.parts.order import sort_by
from moesim.types import GPU, H2D, H2D_BACKGROUND, WHOLE, IntArray

FEW = 10
"""Up to so many active experts are assigned exactly, more of them greedily."""


@sees_future
class Oracle(NamedTuple):
    """Knows what the routers will choose: caches, prefetches and assigns accordingly.

    Cache: each layer starts with the experts used first; one enters where another is used again
    later, and of those not active that used again latest leaves (Belady). Prediction: what the next
    layer will choose is known, and what is missing of it is copied ahead, what the CPU would take
    longest for first, as long as the copy can start before that layer's gate. Assignment: of the
    least later end of both devices, as DALI's cost model has it (arXiv 2602.03495, Eq. 3-9): exact
    for few experts, greedy for many. A reference and not a bound: each rule looks at its own
    matter, and no further than one layer ahead.
    """

    cache: FutureCache
    first: IntArray
    """(steps * layers + 1,): where each layer step's activations begin."""
    expert: IntArray
    tokens: IntArray
    """(activations,)."""
    cpu_cost_ns: IntArray
    gpu_cost_ns: IntArray
    on_gpu: IntArray
    candidates: IntArray
    wanted: IntArray
    """(experts,): scratch space of one decision."""
    staging: int

    @classmethod
    def new(cls, setting: Setting, staging: int = 4) -> "Oracle":
        """`staging`: slots for experts that find no place in the cache."""
        staging = max(1, min(staging, setting.slots))
        cache = new_future_cache(setting, staging)
        soonest = np.argsort(cache.uses.steps[cache.uses.at], axis=1, kind="stable")
        for layer, capacity in enumerate(cache.capacity):
            cache.inside[layer, soonest[layer, :capacity]] = 1
            cache.kept[layer] = capacity
        future = setting.future
        cells = future[:, 0] * setting.layers + future[:, 1]
        steps = int(future[-1, 0]) + 1 if len(future) else 0

        def scratch() -> IntArray:
            return np.zeros(setting.experts, np.int64)

        return cls(
            cache=cache,
            first=np.searchsorted(cells, np.arange(steps * setting.layers + 1)),
            expert=np.ascontiguousarray(future[:, 2]),
            tokens=np.ascontiguousarray(future[:, 3]),
            cpu_cost_ns=scratch(),
            gpu_cost_ns=scratch(),
            on_gpu=scratch(),
            candidates=scratch(),
            wanted=scratch(),
            staging=staging,
        )

    def place(self, setting: Setting) -> Placement:
        """Split what staging leaves evenly over the layers, and cache what is used first."""
        return layer_caches(
            setting,
            cached=self.cache.inside * WHOLE,
            slots=self.cache.capacity,
            staging_slots=self.staging,
        )

    def dispatch(self, view: View, plan: Plan) -> None:
        """Assign and start every active expert: what is there first, then what arrives."""
        layer = view.layer
        uses = self.cache.uses
        pass_by(uses, view)
        estimate_costs(view, self.cpu_cost_ns, self.gpu_cost_ns)
        if view.n_active <= FEW:
            exact(view.active, view.n_active, self.cpu_cost_ns, self.gpu_cost_ns, self.on_gpu)
        else:
            greedy(view.active, view.n_active, self.cpu_cost_ns, self.gpu_cost_ns, self.on_gpu)
        for i in range(view.n_active):
            if self.on_gpu[view.active[i]] == 0:
                run_on_cpu(plan, view.active[i])
        for turn in range(3):
            for i in range(view.n_active):
                expert = view.active[i]
                if self.on_gpu[expert] == 0 or turn_of(view, expert) != turn:
                    continue
                if view.cached[layer, expert] < WHOLE:
                    later = uses.steps[uses.at[layer, expert]]
                    enters = enter(plan, self.cache, layer, expert, view.loads, later)
                    if enters and view.staged[layer, expert] == WHOLE:
                        admit(plan, layer, expert)
                    elif enters:
                        fetch(plan, layer, expert, into=CACHE, urgent=1)
                run_on_gpu(plan, expert)

    def after_layer(self, view: View, plan: Plan) -> None:
        """Copy ahead for the next layer, or the first one of the next step."""
        target = view.step * len(view.cached) + view.layer + 1
        if target < len(self.first) - 1:
            copy_ahead(
                view, plan, self.cache, self.expert, self.tokens, self.first[target],
                self.first[target + 1], self.staging, self.candidates, self.wanted,
                self.cpu_cost_ns,
            )  # fmt: skip


def turn_of(view: View, expert: int) -> int:
    """Return when an expert runs: 0 what is there, 1 what is on its way, 2 what is missing."""
    if view.cached[view.layer, expert] < WHOLE and view.staged[view.layer, expert] < WHOLE:
        return 2
    return 1 if arriving_ns(view, view.layer, expert) > 0 else 0


def enter(
    plan: Plan, cache: FutureCache, layer: int, expert: int, protected: IntArray, later: int
) -> bool:
    """Let an expert, which is used again at step `later`, into the cache if that is of use."""
    if make_room(plan, cache, layer, protected, later):
        keep(cache, layer, expert)
        return True
    return False


def copy_ahead(
    view: View, plan: Plan, cache: FutureCache, expert_of: IntArray, tokens_of: IntArray,
    first: int, end: int, staging: int, candidates: IntArray, wanted: IntArray, saved_ns: IntArray,
) -> None:  # fmt: skip
    """Copy what the next layer step lacks, as far as copies start before its gate.

    Its activations are `first` to `end`. The last three arguments are scratch space (experts,).
    """
    layer = (view.layer + 1) % len(view.cached)
    wanted[:] = 0
    n = 0
    for i in range(first, end):
        expert = expert_of[i]
        wanted[expert] = 1
        if cache.inside[layer, expert] == 0 and view.staged[layer, expert] == 0:
            saved_ns[expert] = view.costs.expert_cpu_ns[view.precision, tokens_of[i]]
            candidates[n] = expert
            n += 1
    if n == 0:
        return
    sort_by(candidates, n, n, saved_ns, -1)
    copy_ns = transfer_ns(view)
    start_ns = max(queued_ns(view, H2D), queued_ns(view, H2D_BACKGROUND))
    gate_ns = queued_ns(view, GPU) + view.window_ns
    for i in range(n):
        expert = candidates[i]
        if start_ns >= gate_ns:
            return
        at = cache.uses.at[layer, expert]
        if enter(plan, cache, layer, expert, wanted, cache.uses.steps[at + 1]):
            fetch(plan, layer, expert, into=CACHE)
        elif staging > 0:
            fetch(plan, layer, expert)
            staging -= 1
        else:
            return
        start_ns += copy_ns
