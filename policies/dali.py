"""DALI, arXiv 2602.03495: greedy assignment, residual prefetch, workload-aware cache."""

from typing import Literal, NamedTuple

import numpy as np

from moesim.policies.api import (
    CACHE,
    Placement,
    Plan,
    Prediction,
    Setting,
    View,
    arriving_ns,
    even_split,
    evict,
    fetch,
    layer_caches,
    run_on_cpu,
    run_on_gpu,
    transfer_ns,
)
from moesim.policies.parts.assign import all_on, apart, exact, greedy, hss, line_up, threshold
from moesim.policies.parts.cache import LFU, LRU, Window, new_window, window_count, window_due
from moesim.policies.parts.loading import DemandCache, load, new_demand_cache, note_use
from moesim.policies.parts.order import sort_by
from moesim.types import DECODE, NONE, WHOLE, IntArray

GREEDY, EXACT, THRESHOLD, HSS, RESIDENT_ELSE_CPU, ALL_GPU = range(6)
ASSIGN = ("greedy", "exact", "threshold", "hss", "resident", "gpu")
WINDOW, LRU_CACHE, LFU_CACHE, STATIC_CACHE = range(4)
CACHES = ("window", "lru", "lfu", "static")
PREDICTED, RANDOM, NO_PREFETCH = range(3)
PREFETCHES = ("predicted", "random", "none")

COARSE_EXPERTS = 16
"""Up to so many experts per layer the paper's settings for Mixtral are the default."""


class Dali(NamedTuple):
    """Greedy CPU-GPU assignment, prefetch of the next layer's busiest experts, swaps by workload.

    Rules from the paper (arXiv 2602.03495): assignment Eq. 3-9 and Algorithm 1, prefetch section
    4.2, cache Algorithm 2. Inferred, the paper being silent: ties go to the lower id, and among
    guesses to the better one; prefetched weights have slots of their own and leave after their
    layer; experts that are resident are skipped when choosing what to prefetch; weights still on
    their way cost their remaining time; the prompt does not count towards the window; copies share
    one FIFO link in the order demand, prefetch, swap. `assign=hss` keeps copy and computation
    apart, as HybriMoE does; the link is free and activations travel in no time, as for other rules.
    The default evicts the lowest scores (the prose), not the highest (line 11 of Algorithm 2), and
    swaps without asking whether it is worth it.
    """

    prefetch_size: int
    w_size: int
    u_size: int
    assign: int
    cache: int
    prefetch: int
    guarded: int
    literal: int
    early: int
    count_prefill: int
    window: Window
    demand: DemandCache
    cpu_cost_ns: IntArray
    gpu_cost_ns: IntArray
    on_gpu: IntArray
    candidates: IntArray
    listed: IntArray
    """(experts,): scratch space of one decision."""
    resident: IntArray
    """(layers, experts): at the start."""
    staging: int
    prediction: Prediction
    link: str

    @classmethod
    def new(
        cls,
        setting: Setting,
        prefetch_size: int = 0,
        w_size: int = 4,
        u_size: int = 0,
        assign: Literal["greedy", "exact", "threshold", "hss", "resident", "gpu"] = "greedy",
        cache: Literal["window", "lru", "lfu", "static"] = "window",
        prefetch: Literal["predicted", "random", "none"] = "predicted",
        predictor: str = "auto",
        recall: float = 0.9,
        swap: Literal["strict", "guarded"] = "strict",
        evict: Literal["lowest", "literal"] = "lowest",
        first_swap: Literal["after_window", "after_step0"] = "after_window",
        count_prefill: bool = False,
        staging: int = 2,
        link: Literal["fifo", "priority"] = "fifo",
    ) -> "Dali":
        """A size of 0 is the paper's setting: prefetch 1, update 1 for coarse experts, else 4, 8.

        `staging` are slots for demand copies, beside one for each prefetch; `recall` is of
        predictor=noisy-oracle.
        """
        coarse = setting.experts <= COARSE_EXPERTS
        prefetch_size = prefetch_size or (1 if coarse else 4)
        if prefetch == "none":
            prefetch_size = 0
        staging = max(1, min(staging + prefetch_size, setting.slots))
        capacity = np.minimum(
            even_split(max(0, setting.slots - staging), setting.layers), setting.experts
        )
        shape = (setting.layers, setting.experts)
        resident = np.zeros(shape, np.int64)
        random = np.random.default_rng(setting.seed)
        if cache not in ("lru", "lfu"):
            for layer in range(setting.layers):
                resident[layer, random.permutation(setting.experts)[: capacity[layer]]] = WHOLE
        return cls(
            prefetch_size=prefetch_size,
            w_size=w_size or 4,
            u_size=u_size or (1 if coarse else 8),
            assign=ASSIGN.index(assign),
            cache=CACHES.index(cache),
            prefetch=PREFETCHES.index(prefetch),
            guarded=int(swap == "guarded"),
            literal=int(evict == "literal"),
            early=int(first_swap == "after_step0"),
            count_prefill=int(count_prefill),
            window=new_window(*shape),
            demand=new_demand_cache(*shape, capacity, LFU if cache == "lfu" else LRU),
            cpu_cost_ns=np.zeros(setting.experts, np.int64),
            gpu_cost_ns=np.zeros(setting.experts, np.int64),
            on_gpu=np.zeros(setting.experts, np.int64),
            candidates=np.zeros(setting.experts, np.int64),
            listed=np.zeros(setting.experts, np.int64),
            resident=resident,
            staging=staging,
            prediction=Prediction(predictor, recall=recall),
            link=link,
        )

    def place(self, setting: Setting) -> Placement:
        """Draw the cached experts at random, equally many per layer, as the paper does."""
        predicts = self.prefetch == PREDICTED and self.prefetch_size > 0
        return layer_caches(
            setting,
            cached=self.resident,
            slots=self.demand.capacity,
            staging_slots=self.staging,
            predictions=(self.prediction,) if predicts else (),
            link=self.link,
        )

    def dispatch(self, view: View, plan: Plan) -> None:
        """Assign and start every active expert, then fetch for the next layer behind them."""
        estimate_costs(view, self.cpu_cost_ns, self.gpu_cost_ns)
        decide(
            self.assign, view, self.cpu_cost_ns, self.gpu_cost_ns, self.on_gpu, self.candidates,
            self.listed,
        )  # fmt: skip
        on_demand = self.cache in (LRU_CACHE, LFU_CACHE)
        for i in range(view.n_active):
            if self.on_gpu[view.active[i]] == 0:
                run_on_cpu(plan, view.active[i])
        for i in range(view.n_active):
            expert = view.active[i]
            if self.on_gpu[expert] == 1 and view.cached[view.layer, expert] == WHOLE:
                run_on_gpu(plan, expert)
                if on_demand:
                    note_use(self.demand, view.layer, expert)
        for i in range(view.n_active):
            expert = view.active[i]
            if self.on_gpu[expert] == 1 and view.cached[view.layer, expert] < WHOLE:
                if on_demand and view.staged[view.layer, expert] == 0:
                    load(view, plan, self.demand, expert)
                else:
                    run_on_gpu(plan, expert)
        if self.prefetch != NO_PREFETCH:
            fetch_ahead(view, plan, self.prefetch, self.prefetch_size, self.candidates, self.listed)

    def after_layer(self, view: View, plan: Plan) -> None:
        """Count the step's workload, and swap when the window is full (Algorithm 2)."""
        if self.cache != WINDOW or (view.phase != DECODE and self.count_prefill == 0):
            return
        window = self.window
        window_count(window, view.layer, view.active, view.n_active, view.loads)
        if window_due(window, view.layer, self.w_size, self.early):
            swap(
                view, plan, window, self.u_size, self.guarded, self.literal, self.candidates,
                self.listed,
            )  # fmt: skip
            window.score[view.layer, :] = 0


def estimate_costs(view: View, cpu_cost_ns: IntArray, gpu_cost_ns: IntArray) -> None:
    """Fill in what each active expert costs on either device.

    The copy of absent weights and the computation are pipelined: the longer of both (Eq. 5).
    """
    copy_ns = transfer_ns(view)
    for i in range(view.n_active):
        expert = view.active[i]
        cpu_cost_ns[expert] = view.cpu_ns[expert]
        ns = view.gpu_ns[expert]
        if view.cached[view.layer, expert] == WHOLE or view.staged[view.layer, expert] == WHOLE:
            ns = max(ns, arriving_ns(view, view.layer, expert))
        else:
            ns = max(ns, copy_ns)
        gpu_cost_ns[expert] = ns


def decide(
    rule: int, view: View, cpu_cost_ns: IntArray, gpu_cost_ns: IntArray, on_gpu: IntArray,
    arrival_ns: IntArray, queue: IntArray,
) -> None:  # fmt: skip
    """Apply an assignment rule; the last two arguments are scratch space (experts,) of `hss`."""
    if rule == GREEDY:
        greedy(view.active, view.n_active, cpu_cost_ns, gpu_cost_ns, on_gpu)
    elif rule == EXACT:
        exact(view.active, view.n_active, cpu_cost_ns, gpu_cost_ns, on_gpu)
    elif rule == THRESHOLD:
        threshold(view.active, view.n_active, cpu_cost_ns, gpu_cost_ns, on_gpu)
    elif rule == HSS:
        apart(view, cpu_cost_ns, gpu_cost_ns, arrival_ns)
        line_up(view.active, view.n_active, view.loads, arrival_ns, on_gpu, queue)
        hss(
            queue, view.n_active, cpu_cost_ns, gpu_cost_ns, arrival_ns, transfer_ns(view), 0, 0,
            on_gpu,
        )  # fmt: skip
    else:
        all_on(view.active, view.n_active, on_gpu, 1 if rule == ALL_GPU else 0)
        for i in range(view.n_active):
            expert = view.active[i]
            if view.cached[view.layer, expert] + view.staged[view.layer, expert] >= WHOLE:
                on_gpu[expert] = 1


def fetch_ahead(
    view: View, plan: Plan, rule: int, size: int, candidates: IntArray, listed: IntArray
) -> None:
    """Fetch the `size` experts of the next layer that most tokens are guessed to choose.

    What is there or on its way is skipped. Equally many tokens: the better guess first. The last
    two arguments are scratch space (experts,).
    """
    layers = len(view.cached)
    if view.layer == layers - 1 and view.last_step:
        return
    if rule == RANDOM:
        # A hash of place and time: a generator inside a hook would not repeat when compiled.
        first = view.step * 7919 + view.layer * 104729
        for i in range(len(candidates)):
            candidates[i] = (first + i * 104723) % len(candidates)
        n = len(candidates)
    else:
        n = rank_guesses(view, candidates, listed)
    target = (view.layer + 1) % layers
    for i in range(n):
        expert = candidates[i]
        if size == 0:
            return
        if view.cached[target, expert] == 0 and view.staged[target, expert] == 0:
            fetch(plan, target, expert)
            size -= 1


def rank_guesses(view: View, candidates: IntArray, listed: IntArray, which: int = 0) -> int:
    """List the experts of one of the predictions; return how many.

    Most tokens first, then the better rank. The last two arrays are scratch space (experts,).
    """
    listed[:] = 0
    n = 0
    for rank in range(view.ids.shape[1]):
        for token in range(view.predicted_tokens[which]):
            expert = view.predicted_ids[which, token, rank]
            if expert != NONE and listed[expert] == 0:
                # Each token more counts for more than all places in the list.
                tokens = view.predicted_loads[which, expert]
                listed[expert] = tokens * len(listed) + len(listed) - n
                candidates[n] = expert
                n += 1
    sort_by(candidates, n, n, listed, -1)
    return n


def swap(
    view: View, plan: Plan, window: Window, size: int, guarded: int, literal: int, absent: IntArray,
    resident: IntArray,
) -> None:  # fmt: skip
    """Replace the `size` cached experts with the lowest scores by the absent ones with the highest.

    Pairs are formed from both ends; `guarded` leaves out pairs that gain nothing, `literal` evicts
    the highest scores as line 11 of Algorithm 2 has it. The last two arguments are scratch space
    (experts,).
    """
    layer = view.layer
    score = window.score[layer]
    n_absent = 0
    n_resident = 0
    for expert in range(len(score)):
        if view.cached[layer, expert] > 0:
            resident[n_resident] = expert
            n_resident += 1
        else:
            absent[n_absent] = expert
            n_absent += 1
    pairs = min(size, n_absent, n_resident)
    if pairs == 0:
        return
    sort_by(absent, n_absent, pairs, score, -1)
    sort_by(resident, n_resident, pairs, score, -1 if literal else 1)
    for i in range(pairs):
        if not guarded or score[absent[i]] > score[resident[i]]:
            evict(plan, layer, resident[i])
            fetch(plan, layer, absent[i], into=CACHE)
