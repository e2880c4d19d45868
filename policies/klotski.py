"""Klotski, arXiv 2502.06888: groups of batches share each expert; hot ones are copied ahead."""

from typing import Literal, NamedTuple

import numpy as np

from moesim.errors import InputError, PolicyError
from moesim.jit import compiled_as
from moesim.policies.api import (
    Placement,
    Plan,
    Setting,
    Table,
    View,
    arriving_ns,
    cancel,
    fetch,
    gate_after,
    layer_caches,
    read,
    run_on_gpu,
)
from moesim.policies.klotski_plan import (
    Group,
    Home,
    Planner,
    group,
    home,
    mean_shares,
    notices,
    tables,
)
from moesim.types import NONE, WHOLE, IntArray

MOST_AHEAD = 6
"""Layers read ahead from disk: what one plan has room for before the first layer."""


class Klotski(NamedTuple):
    """All on the GPU: batches walk through a layer together, so that each expert is copied once.

    P: the paper; C: the released code (MindSpore port); I: inferred.

    * Group: n batches of `bs` sequences, n being the fewest that hide the copies of a block [P]
      (`klotski_plan.py`). A run is one group of all its sequences, so that n follows from `bs` or
      `bs` from n, and a notice says which n it would take [I].
    * Prefetch: when attention begins, the K experts that most often followed what the group's
      tokens chose in the block before: successor counts summed over tokens [P], or votes for two
      successors each (`vote=port`) [C], of which there are K [I]; for block 0 those most often
      chosen [C]. K is top_k [P]. Equals: the lower id [C].
    * Table: counts of pairs one block apart, from the part of the trace that is not replayed; all
      pairs of every token are added after each block, of prompts too, without decay [P, C].
    * The gate waits for the hot experts, which in the code are on its weights' stream [C].
    * Requests: after each batch's gate, what is new in it, in order of first appearance [C].
    * Order: hot ones first, the likeliest ahead, then the others as requested [P]; one GEMM per
      batch [C]. Weights leave as soon as their tokens are done [P]; unused hot ones too [I].
    * Placement: one layer of experts under way, then the first layers' experts for good, weights
      outside the experts, keys and values; the rest in host memory, then on disk [C], which is read
      a window of layers ahead [P].

    Deviations: copies for a block may begin while the last experts of the block before still run,
    if the link is idle, and not with attention only; keys and values, and the next attention's
    weights, go before experts on the link; keys and values are on the GPU wholly or not at all, and
    are never on disk; the code prefetches the whole layer where n = 1, here that is `hot`; staging
    is what the budget leaves, at most two layers' experts.
    """

    table: IntArray
    """(layers, experts, experts): how often the last expert followed the second, one block before.
    Block 0 follows one expert, number 0, so that its row 0 counts choices."""
    followed: IntArray
    """(experts,): tokens of the block before, by the expert that they chose."""
    previous: IntArray
    """(tokens, top_k): what each token chose in the block before; -1: missing."""
    score: IntArray
    best: IntArray
    """(experts,): scratch space of one prediction."""
    hot: IntArray
    """(K,): of this block, the likeliest first."""
    asked: IntArray
    """(1,): active experts that were requested, or found there."""
    ran: IntArray
    """(experts,): scratch, 1 for the hot experts whose run is ordered."""
    by_vote: int
    by_id: int
    waits: int
    merge_gemm: int
    window: int
    home: Home
    split: Group

    @classmethod
    def new(
        cls,
        setting: Setting,
        n: int = 0,
        bs: int = 0,
        hot: int = 0,
        order: Literal["hot", "id"] = "hot",
        vote: Literal["paper", "port"] = "paper",
        gate_waits_for_hot: bool = True,
        merge_gemm: bool = False,
        dense: Literal["auto", "gpu", "host"] = "auto",
        kv: Literal["auto", "gpu", "host"] = "auto",
        window: int = 2,
    ) -> "Klotski":
        """`n` batches in the group, or batches of `bs` sequences; 0 for both: up to 64 in each.

        `hot`: experts prefetched per block, 0: top_k; all of them is what systems without a table
        do. `order=id`: experts run by id. `dense` and `kv`: where other weights, and keys and
        values, are; auto: on the GPU if the memory outside the budget holds them. `window`: layers
        that disk reads run ahead.
        """
        if setting.slots == 0:
            raise PolicyError(
                f"a budget of {setting.budget_bytes} bytes holds no expert: one takes "
                f"{setting.expert_bytes} bytes, and Klotski computes none on the CPU"
            )
        if window > MOST_AHEAD:
            raise InputError(
                f"policy klotski: window={window} is not legal; 0 to {MOST_AHEAD} layers are"
            )
        layers, experts, tokens = setting.layers, setting.experts, setting.step_tokens
        window = min(window, layers - 1)
        hot = min(hot or setting.top_k, experts)
        at = home(setting, dense, kv, window)
        share = mean_shares(setting)
        planner = Planner(setting, at, hot, merge_gemm, gate_waits_for_hot, share)
        policy = cls(
            table=observed(setting.offline().ids, layers, experts),
            followed=np.zeros(experts, np.int64),
            previous=np.zeros((tokens, setting.top_k), np.int64),
            score=np.zeros(experts, np.int64),
            best=np.zeros(hot, np.int64),
            hot=np.zeros(hot, np.int64),
            asked=np.zeros(1, np.int64),
            ran=np.zeros(experts, np.int64),
            by_vote=int(vote == "port"),
            by_id=int(order == "id"),
            waits=int(gate_waits_for_hot),
            merge_gemm=int(merge_gemm),
            window=window,
            home=at,
            split=group(planner, n, bs),
        )
        begin(policy.previous, policy.followed)
        return policy

    def place(self, setting: Setting) -> Placement:
        """Fill the first layers, and leave the rest of the budget to experts under way."""
        at = self.home
        shape = (setting.layers, setting.experts)
        cached, on_disk = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        cached[: at.resident_layers] = WHOLE
        on_disk[at.host_layers :] = 1
        return layer_caches(
            setting,
            cached=cached,
            slots=(cached > 0).sum(axis=1),
            staging_slots=at.staging,
            batches=self.split.n,
            gemm_per_batch=self.merge_gemm == 0,
            kv_on_host=at.kv_on_host,
            dense_on_host=at.dense_on_host,
            on_disk=on_disk,
            notices=notices(planner_of(self, setting), self.split),
        )

    def plan(self, setting: Setting) -> tuple[Table, ...]:
        """Show the planner's conditions and the placement."""
        return tables(planner_of(self, setting), self.split)

    def before_attention(self, view: View, plan: Plan) -> None:
        """Predict the hot experts and copy them ahead; read a later layer from disk."""
        layer = view.layer
        self.asked[0] = 0
        if self.by_vote == 1 and layer > 0:
            count_votes(self.table[layer], self.followed, self.score, self.best)
        else:
            add_successors(self.table[layer], self.followed, self.score)
        largest(self.score, self.hot)
        for i in range(len(self.hot)):
            if view.cached[layer, self.hot[i]] == 0:
                fetch(plan, layer, self.hot[i])
        if self.window > 0:
            layers = len(self.table)
            first = 0 if view.step == 0 and layer == 0 else self.window
            for target in range(layer + first, layer + self.window + 1):
                to_come = target < layers or view.last_step == 0
                if to_come and target % layers >= self.home.host_layers:
                    for expert in range(len(self.score)):
                        read(plan, target, expert)

    def before_gate(self, view: View, plan: Plan) -> None:
        """Let the gates wait for the last hot expert on its way: copies arrive in order."""
        if self.waits == 0:
            return
        for i in range(len(self.hot) - 1, -1, -1):
            if view.staged[view.layer, self.hot[i]] > 0:
                gate_after(plan, self.hot[i])
                return

    def routed(self, view: View, plan: Plan) -> None:
        """Request what one batch needs and no batch before it did."""
        for i in range(self.asked[0], view.n_active):
            expert = view.active[i]
            if view.cached[view.layer, expert] == 0 and view.staged[view.layer, expert] == 0:
                fetch(plan, view.layer, expert)
        self.asked[0] = view.n_active

    def dispatch(self, view: View, plan: Plan) -> None:
        """Give up what was prefetched in vain; run the hot experts, then the others."""
        layer = view.layer
        for i in range(len(self.hot)):
            expert = self.hot[i]
            there = view.staged[layer, expert] > 0 and arriving_ns(view, layer, expert) == 0
            if there and view.loads[expert] == 0:
                cancel(plan, layer, expert)
        if self.by_id == 1:
            for expert in range(len(self.score)):
                if view.loads[expert] > 0:
                    run_on_gpu(plan, expert)
            return
        self.ran[:] = 0
        for i in range(len(self.hot)):
            if view.loads[self.hot[i]] > 0:
                run_on_gpu(plan, self.hot[i])
                self.ran[self.hot[i]] = 1
        for i in range(view.n_active):
            if self.ran[view.active[i]] == 0:
                run_on_gpu(plan, view.active[i])

    def after_layer(self, view: View, plan: Plan) -> None:
        """Learn the true successors, and keep this block's choice for the next one."""
        count_pairs(self.table[view.layer], self.previous, view.ids, view.tokens)
        if view.layer == len(self.table) - 1:
            begin(self.previous, self.followed)
        else:
            self.previous[: view.tokens] = view.ids[: view.tokens]
            self.followed[:] = view.loads


def planner_of(policy: Klotski, setting: Setting) -> Planner:
    """Return what the policy was planned with."""
    return Planner(
        setting, policy.home, len(policy.hot), bool(policy.merge_gemm), bool(policy.waits),
        mean_shares(setting),
    )  # fmt: skip


def begin(previous: IntArray, followed: IntArray) -> None:
    """Let every token come from expert 0 of a block before the first one."""
    previous[:, 0] = 0
    previous[:, 1:] = NONE
    followed[:] = 0
    followed[0] = 1


def observed(ids: IntArray, layers: int, experts: int) -> IntArray:
    """Return the table after tokens that were observed beforehand (tokens, layers, top_k)."""
    table = np.zeros((layers, experts, experts), np.int64)
    if len(ids) > 0:
        previous = np.full(ids[:, 0].shape, NONE, np.int64)
        previous[:, 0] = 0
        for layer in range(layers):
            count_pairs(table[layer], previous, ids[:, layer].astype(np.int64), len(ids))
            previous = ids[:, layer].astype(np.int64)
    return table


def count_pairs_compiled(
    successors: IntArray, previous: IntArray, ids: IntArray, tokens: int
) -> None:
    """Do what `count_pairs` does, token by token."""
    for token in range(tokens):
        for i in range(previous.shape[1]):
            before = previous[token, i]
            if before != NONE:
                for j in range(ids.shape[1]):
                    if ids[token, j] != NONE:
                        successors[before, ids[token, j]] += 1


@compiled_as(count_pairs_compiled)
def count_pairs(successors: IntArray, previous: IntArray, ids: IntArray, tokens: int) -> None:
    """Count every pair of a token's choices in two blocks, k x k for each of the first `tokens`."""
    before, after = previous[:tokens, :, None], ids[:tokens, None, :]
    known = (before != NONE) & (after != NONE)
    pairs = (before * len(successors) + after)[known]
    successors += np.bincount(pairs, minlength=successors.size).reshape(successors.shape)


def add_successors_compiled(successors: IntArray, followed: IntArray, score: IntArray) -> None:
    """Do what `add_successors` does, without a product of matrices."""
    score[:] = 0
    for before in range(len(followed)):
        if followed[before] > 0:
            for expert in range(len(score)):
                score[expert] += followed[before] * successors[before, expert]


@compiled_as(add_successors_compiled)
def add_successors(successors: IntArray, followed: IntArray, score: IntArray) -> None:
    """Sum the successor counts of all tokens' experts, counting tokens by expert first [P]."""
    score[:] = followed @ successors


def count_votes(successors: IntArray, followed: IntArray, score: IntArray, best: IntArray) -> None:
    """Give the most frequent successors of each expert a vote per token that chose it [C]."""
    score[:] = 0
    for before in range(len(followed)):
        if followed[before] > 0:
            largest(successors[before], best)
            for i in range(len(best)):
                score[best[i]] += followed[before]


def largest_compiled(keys: IntArray, best: IntArray) -> None:
    """Do what `largest` does, by insertion among the largest so far."""
    n = 0
    for item in range(len(keys)):
        at = n
        while at > 0 and keys[best[at - 1]] < keys[item]:
            at -= 1
        if n < len(best):
            n += 1
        for i in range(n - 1, at, -1):
            best[i] = best[i - 1]
        if at < n:
            best[at] = item


@compiled_as(largest_compiled)
def largest(keys: IntArray, best: IntArray) -> None:
    """Fill `best` with the items of the largest keys, the largest first, equal ones by id."""
    best[:] = np.argsort(-keys, kind="stable")[: len(best)]
