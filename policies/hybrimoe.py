"""HybriMoE, arXiv 2504.05897: both devices by a simulated timeline, prefetch by its effect, MRS."""

from typing import Literal, NamedTuple

import numpy as np

from moesim.costs import copy_ns
from moesim.errors import InputError
from moesim.policies.api import (
    CACHE,
    Placement,
    Plan,
    Prediction,
    Setting,
    View,
    even_split,
    evict,
    fetch,
    gate_after,
    layer_caches,
    promote,
    queued_ns,
    run_on_cpu,
    run_on_gpu,
    run_shared,
    transfer_ns,
)
from moesim.policies.dali import rank_guesses
from moesim.policies.parts.assign import apart, hss, line_up
from moesim.policies.parts.cache import lowest, mrs_update
from moesim.policies.parts.guesses import predictions
from moesim.types import D2H, DECODE, H2D, H2D_BACKGROUND, NONE, WHOLE, FloatArray, IntArray

HSS, THRESHOLD, RESIDENT, ALL_GPU, ALL_CPU = range(5)
ASSIGN = ("hss", "threshold", "resident")
IMPACT, SCORE, NO_PREFETCH = range(3)
PREFETCHES = ("impact", "score", "none")
COSTS = ("measured", "deepseek", "mixtral", "qwen2")

CODE_CPU_NS = (0, 1_000_000, 200_000, 800_000)
CODE_FIRST_NS, CODE_GPU_NS, CODE_COPY_NS = 790_000, 500_000, 417_910
"""Of the released code, which marks them as to be tuned: per token of an expert on the CPU (by
`COSTS`), for the first expert there, for an expert on the GPU, and for a copy."""


class Sheet(NamedTuple):
    """Scratch space of one decision, (experts,) each: of the experts of one layer."""

    cpu_ns: IntArray
    gpu_ns: IntArray
    arrival_ns: IntArray
    """Of the weights; 0: they are there; NONE: a copy would have to be ordered."""
    on_gpu: IntArray
    queue: IntArray
    guessed: IntArray


class HybriMoE(NamedTuple):
    """Devices share experts by a simulated timeline; what was loaded stays while its score is high.

    P: the paper, second-hand; C: the released code (`PKU-SEC-Lab/HybriMoE`); I: inferred.

    * Assignment: `parts.assign.hss` [C]. The paper states the same priorities, and that an idle CPU
      may take cached experts, which this rule lets it do. Costs are measured [P]; the first expert
      on the CPU also pays for the activations' way there and back, as what the code calls the
      intercept, and copies that are queued delay the link [I]. `cost=mixtral`, `deepseek`, `qwen2`:
      the code's constants. `assign=threshold` is what DALI's paper takes HybriMoE for.
    * When: always [P, both stages; with true loads, I], or only for one row of tokens: any other
      step runs on the GPU, absent experts pass through staging and are not kept [C].
    * Cache: MRS, S = alpha * s + (1 - alpha) * S, from the first row's scores [C], or the mean over
      all rows, the same for one row [I, the default]. What is loaded enters, the lowest S leaves,
      even if this step has just used it [C]. Initially the lowest ids [C].
    * Prefetch, `impact` [P]: the next `ahead` layers' gates on this state; again and again the
      expert whose residency shortens its layer's simulated time most. Rounds go on while the copy
      can begin before this layer's experts are done, and while there is a gain; the lowest S of
      those not guessed leaves [I]. Residents that a guess is about to use are safe [I].
      `score` [C]: the highest S of the next layer, behind the layer's own copies, in decode only
      and only if the GPU computes an expert; the next layer waits for it. Both enter the cache.
    * Order: the CPU's experts first, lowest load first; shared experts; the GPU's, resident ones
      first, by falling load, in the router's order for one row [C].

    Deviations: a trace holds the scores of the k experts chosen, where the code takes those of the
    best 2k; the code's buffer for streaming holds a whole layer, here `staging` slots are enough;
    in prefill the code copies ahead what it then drops, which is left out. `predictor=auto` takes a
    corrected guess if the trace has one; `gate` is the paper's.
    """

    assign: int
    prefetch: int
    prefetch_size: int
    ahead: int
    always: int
    by_recency: int
    first_row: int
    alpha: float
    cost: int
    score: FloatArray
    """(layers, experts): S, or the step of the latest use."""
    kept: IntArray
    """(layers, experts): 1 for what is cached when this hook's orders are carried out."""
    latest: IntArray
    """(layers,): the expert prefetched last, for which the layer waits; NONE for none."""
    sheet: Sheet
    nobody: IntArray
    """(experts,): zeros; no expert is safe from being the victim."""
    resident: IntArray
    """(layers, experts): at the start."""
    slots: IntArray
    """(layers,): of the cache."""
    staging: int
    predictions: tuple[Prediction, ...]
    link: str

    @classmethod
    def new(
        cls,
        setting: Setting,
        assign: Literal["hss", "threshold", "resident"] = "hss",
        when: Literal["always", "one-row"] = "always",
        prefetch: Literal["impact", "score", "none"] = "impact",
        prefetch_size: int = 0,
        ahead: int = 3,
        cache: Literal["mrs", "lru"] = "mrs",
        rows: Literal["all", "first"] = "all",
        alpha: float = 0.5,
        cost: Literal["measured", "deepseek", "mixtral", "qwen2"] = "measured",
        predictor: str = "auto",
        recall: float = 0.9,
        staging: int = 2,
        link: Literal["priority", "fifo"] = "priority",
    ) -> "HybriMoE":
        """`prefetch_size` is the most per layer, 0: what there is time for; or half of k by score.

        `ahead` is of `impact`; `recall` is of predictor=noisy-oracle.
        """
        if alpha > 1:
            raise InputError(f"policy hybrimoe: alpha={alpha} is not legal; 0 to 1 is")
        if prefetch == "score":
            prefetch_size = prefetch_size or max(1, setting.top_k // 2)
        staging = min(max(1, staging), setting.slots)
        slots = np.minimum(even_split(setting.slots - staging, setting.layers), setting.experts)
        resident = np.where(np.arange(setting.experts) < slots[:, np.newaxis], WHOLE, 0)
        ahead = min(ahead, setting.layers - 1) if prefetch == "impact" else 0
        return cls(
            assign=ASSIGN.index(assign),
            prefetch=PREFETCHES.index(prefetch),
            # A plan has no room for more, beside the run and the load of every expert.
            prefetch_size=min(prefetch_size or 2 * setting.experts, 2 * setting.experts),
            ahead=ahead,
            always=int(when == "always"),
            by_recency=int(cache == "lru"),
            first_row=int(rows == "first"),
            alpha=alpha,
            cost=COSTS.index(cost),
            score=np.zeros((setting.layers, setting.experts)),
            kept=(resident > 0).astype(np.int64),
            latest=np.full(setting.layers, NONE),
            sheet=Sheet(*(np.zeros(setting.experts, np.int64) for _ in Sheet._fields)),
            nobody=np.zeros(setting.experts, np.int64),
            resident=resident,
            slots=slots,
            staging=staging,
            predictions=predictions(predictor, ahead, recall),
            link=link,
        )

    def place(self, setting: Setting) -> Placement:
        """Cache the first experts of each layer, equally many."""
        return layer_caches(
            setting,
            cached=self.resident,
            slots=self.slots,
            staging_slots=self.staging,
            predictions=self.predictions,
            link=self.link,
        )

    def before_gate(self, view: View, plan: Plan) -> None:
        """Wait for what was prefetched by score."""
        if self.latest[view.layer] != NONE:
            gate_after(plan, self.latest[view.layer])
            self.latest[view.layer] = NONE

    def dispatch(self, view: View, plan: Plan) -> None:
        """Score, share out, run everything, then prefetch behind it."""
        layer = view.layer
        sheet = self.sheet
        if self.by_recency == 1:
            for i in range(view.n_active):
                self.score[layer, view.active[i]] = view.step + 1.0
        else:
            rows = min(1, view.tokens) if self.first_row == 1 else view.tokens
            mrs_update(self.score, layer, view.ids, view.weights, rows, self.alpha)
        hybrid = self.always == 1 or view.tokens == 1
        rule = self.assign if hybrid else ALL_GPU
        if self.staging == 0:
            rule = ALL_CPU
        end_ns = decide(view, rule, self.cost, sheet)
        runs, loads = run_all(view, plan, self.score, self.kept, hybrid, self.nobody, sheet)
        if self.prefetch == IMPACT and hybrid:
            prefetch_by_impact(
                view, plan, self.cost, self.score, self.kept, self.prefetch_size, self.ahead,
                end_ns, loads, sheet,
            )  # fmt: skip
        if self.prefetch == SCORE and view.phase == DECODE and runs > 0:
            prefetch_by_score(
                plan, self.score, self.kept, self.latest, layer + 1, self.prefetch_size, self.nobody
            )


def decide(view: View, rule: int, cost: int, sheet: Sheet) -> int:
    """Give every active expert a device; return how long that should take.

    `sheet.queue` has them in the order of `parts.assign.line_up` then.
    """
    n = view.n_active
    apart(view, sheet.cpu_ns, sheet.gpu_ns, sheet.arrival_ns)
    if cost > 0:
        for i in range(n):
            expert = view.active[i]
            sheet.cpu_ns[expert] = CODE_CPU_NS[cost] * view.loads[expert]
            sheet.gpu_ns[expert] = CODE_GPU_NS
    line_up(view.active, n, view.loads, sheet.arrival_ns, sheet.on_gpu, sheet.queue)
    if rule == HSS:
        return share_out(view, cost, view.tokens, queued_ns(view, H2D), n, sheet)
    gpu_end = 0
    cpu_end = 0
    for i in range(n):
        expert = sheet.queue[i]
        gpu_ns = sheet.gpu_ns[expert]
        if sheet.arrival_ns[expert] == NONE:
            gpu_ns += load_ns(view, cost)
        sheet.on_gpu[expert] = 0
        if (
            rule == ALL_GPU
            or (rule == THRESHOLD and gpu_ns <= sheet.cpu_ns[expert])
            or (rule == RESIDENT and sheet.arrival_ns[expert] != NONE)
        ):
            sheet.on_gpu[expert] = 1
            gpu_end += gpu_ns
        else:
            cpu_end += sheet.cpu_ns[expert]
    return max(gpu_end, cpu_end)


def share_out(view: View, cost: int, tokens: int, link_ns: int, n: int, sheet: Sheet) -> int:
    """Apply `hss` to the queue; return when both devices are done.

    The first expert on the CPU brings the activations there and back.
    """
    size_bytes = tokens * view.costs.token_bytes
    first_ns = copy_ns(view.costs, D2H, size_bytes) + copy_ns(view.costs, H2D, size_bytes)
    if cost > 0:
        link_ns, first_ns = 0, CODE_FIRST_NS
    gpu_end, cpu_end = hss(
        sheet.queue, n, sheet.cpu_ns, sheet.gpu_ns, sheet.arrival_ns, load_ns(view, cost), link_ns,
        first_ns, sheet.on_gpu,
    )  # fmt: skip
    return max(gpu_end, cpu_end)


def load_ns(view: View, cost: int) -> int:
    """Return what the copy of an absent expert counts."""
    return CODE_COPY_NS if cost > 0 else transfer_ns(view)


def run_all(
    view: View, plan: Plan, score: FloatArray, kept: IntArray, admits: bool, nobody: IntArray,
    sheet: Sheet,
) -> tuple[int, int]:  # fmt: skip
    """Run every expert of the queue; return how many on the GPU, and how many of them were absent.

    With `admits` those enter the cache.
    """
    for i in range(view.n_active - 1, -1, -1):
        if sheet.on_gpu[sheet.queue[i]] == 0:
            run_on_cpu(plan, sheet.queue[i])
    run_shared(plan)
    runs = 0
    loads = 0
    for i in range(view.n_active):
        expert = sheet.queue[i]
        if sheet.on_gpu[expert] == 1:
            runs += 1
            if sheet.arrival_ns[expert] > 0:
                promote(plan, view.layer, expert)
            elif sheet.arrival_ns[expert] == NONE:
                loads += 1
                if admits:
                    bring_in(plan, score, kept, view.layer, expert, nobody, 1)
            run_on_gpu(plan, expert)
    return runs, loads


def bring_in(
    plan: Plan, score: FloatArray, kept: IntArray, layer: int, expert: int, protected: IntArray,
    urgent: int,
) -> bool:  # fmt: skip
    """Copy an expert into its layer's cache, in place of the lowest score; say if there is one."""
    victim = lowest(score, kept, layer, protected)
    if victim == NONE:
        return False
    evict(plan, layer, victim)
    fetch(plan, layer, expert, into=CACHE, urgent=urgent)
    kept[layer, victim] = 0
    kept[layer, expert] = 1
    return True


def prefetch_by_score(
    plan: Plan, score: FloatArray, kept: IntArray, latest: IntArray, target: int, size: int,
    nobody: IntArray,
) -> None:  # fmt: skip
    """Copy in those of the `size` highest scores of a layer that it has not got."""
    if target >= len(kept):
        return
    before = NONE
    for _ in range(min(size, score.shape[1])):
        best = NONE
        for expert in range(score.shape[1]):
            if before != NONE and (
                score[target, expert] > score[target, before]
                or (score[target, expert] == score[target, before] and expert <= before)
            ):
                continue
            if best == NONE or score[target, expert] > score[target, best]:
                best = expert
        before = best
        if kept[target, best] == 0 and bring_in(plan, score, kept, target, best, nobody, 0):
            latest[target] = best


def prefetch_by_impact(
    view: View, plan: Plan, cost: int, score: FloatArray, kept: IntArray, size: int, ahead: int,
    end_ns: int, loads: int, sheet: Sheet,
) -> None:  # fmt: skip
    """Copy in what shortens a coming layer most, as long as a copy can begin within `end_ns`.

    `loads` are the copies that this layer has just ordered.
    """
    one_ns = load_ns(view, cost)
    busy_ns = max(queued_ns(view, H2D), queued_ns(view, H2D_BACKGROUND)) + loads * one_ns
    for _ in range(size):
        if busy_ns >= end_ns:
            return
        best = NONE
        best_ns = 0
        where = 0
        for which in range(min(ahead, len(kept) - 1 - view.layer)):
            target = view.layer + 1 + which
            if lowest(score, kept, target, view.predicted_loads[which]) != NONE:
                expert, gain_ns = most_useful(view, which, cost, kept, sheet)
                if gain_ns > best_ns:
                    best, best_ns, where = expert, gain_ns, which
        if best == NONE:
            return
        guesses = view.predicted_loads[where]
        bring_in(plan, score, kept, view.layer + 1 + where, best, guesses, 0)
        busy_ns += one_ns


def most_useful(view: View, which: int, cost: int, kept: IntArray, sheet: Sheet) -> tuple[int, int]:
    """Return the absent expert that a guessed layer would gain most from, and how much.

    Equal gains: most tokens, then the better guess. Experts with equally many tokens gain equally,
    so that one of them is enough to try.
    """
    target = view.layer + 1 + which
    n = rank_guesses(view, sheet.guessed, sheet.on_gpu, which)
    for i in range(n):
        expert = sheet.guessed[i]
        load = view.predicted_loads[which, expert]
        sheet.cpu_ns[expert] = CODE_CPU_NS[cost] * load
        sheet.gpu_ns[expert] = CODE_GPU_NS
        if cost == 0:
            sheet.cpu_ns[expert] = view.costs.expert_cpu_ns[view.precision, load]
            sheet.gpu_ns[expert] = view.costs.expert_gpu_ns[view.precision, load]
        sheet.arrival_ns[expert] = 0 if kept[target, expert] > 0 else NONE
    as_is_ns = guessed_ns(view, which, cost, n, sheet)
    best = NONE
    best_ns = 0
    tried = 0
    for i in range(n):
        expert = sheet.guessed[i]
        load = view.predicted_loads[which, expert]
        if sheet.arrival_ns[expert] == NONE and load != tried:
            tried = load
            sheet.arrival_ns[expert] = 0
            gain_ns = as_is_ns - guessed_ns(view, which, cost, n, sheet)
            sheet.arrival_ns[expert] = NONE
            if gain_ns > best_ns:
                best, best_ns = expert, gain_ns
    return best, best_ns


def guessed_ns(view: View, which: int, cost: int, n: int, sheet: Sheet) -> int:
    """Return how long a guessed layer's experts would take, its link being free."""
    loads = view.predicted_loads[which]
    line_up(sheet.guessed, n, loads, sheet.arrival_ns, sheet.on_gpu, sheet.queue)
    return share_out(view, cost, view.predicted_tokens[which], 0, n, sheet)
