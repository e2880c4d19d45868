"""FlexGen, arXiv 2303.06865: whole layers stream through the GPU, each for a block of batches."""

from typing import Literal, NamedTuple

import numpy as np

from moesim.costs import copy_ns, duration_ns
from moesim.errors import InputError, PolicyError
from moesim.policies.api import (
    Placement,
    Plan,
    Setting,
    Table,
    View,
    even_split,
    layer_caches,
)
from moesim.policies.parts.streaming import (
    await_layer,
    buffer_notices,
    mean_lengths,
    pass_ns,
    run_by_id,
    stream_ahead,
    stream_layer,
)
from moesim.types import ATTENTION, ATTENTION_CPU, D2H, DECODE, H2D, PREFILL, WHOLE, IntArray

SEQUENCES, BATCHES = 4, 19
"""The paper's search tries batches of so many sequences, or a multiple, and at most so many."""


class FlexGen(NamedTuple):
    """The next layer's weights, all of them, are copied while a block of batches computes this one.

    Paper: a block of batches walks through each layer together, so that its weights serve them all;
    meanwhile the whole next layer is copied, the keys and values of one batch are loaded and those
    of another stored; nothing is predicted or cached beyond the share of each layer's weights that
    stays on the GPU (the paper's layer granularity). In decode the CPU may attend to keys and
    values in host memory. Released code (`flex_opt.py`): attention and feed-forward part are layers
    of their own, so that the experts are copied while the same block's attention computes; the copy
    starts with the first batch, and every batch ends with a full synchronisation. That is
    `form=released`; the default is the paper's ideal, without these synchronisations, one whole
    layer ahead.

    As ported to experts by others: all experts of a layer are copied once per block, whatever the
    router chooses, and each batch computes on its own, expert by expert.

    Inferred: the share follows from the budget: what two layers of buffers leave (`released`: one
    layer of experts), as evenly over the layers as whole experts allow, the first ids. A layer's
    gates wait for its last copy. By default batches have at least 4 sequences and a block at
    most 19 of them, the bounds of the paper's search. Deviations: the nine percentages are not
    searched for, nothing is on disk, activations stay on the GPU. In the ideal form a copy starts
    when its slot is free, which may be before the layer in front of it ends, and all batches attend
    before the first one meets the experts. The synchronisations between the batches inside the
    experts' layer, during which nothing is copied but attention weights, are left out. Buffers for
    less than a layer stream through the slots there are; what the router has not chosen is then
    left out, unless its copy came first.
    """

    resident: IntArray
    """(layers, experts)."""
    staging: int
    batches: int
    released: int
    kv_on_host: int
    cpu_attention: int
    dense_on_host: int

    @classmethod
    def new(
        cls,
        setting: Setting,
        form: Literal["ideal", "released"] = "ideal",
        batches: int = 0,
        kv: Literal["gpu", "host"] = "gpu",
        cpu_attention: bool = False,
        dense: Literal["gpu", "host"] = "gpu",
    ) -> "FlexGen":
        """`batches`: of a block, at most one per sequence; 0: batches of 4 sequences or more.

        `kv` and `dense`: where keys and values, and the weights outside the experts, are.
        """
        if setting.slots < 1:
            raise PolicyError(
                f"a budget of {setting.budget_bytes} bytes holds no expert: one takes "
                f"{setting.expert_bytes} bytes, and FlexGen computes none on the CPU"
            )
        if cpu_attention and kv == "gpu":
            raise InputError(
                "policy flexgen: cpu_attention=true is not legal with kv=gpu; kv=host is"
            )
        wanted = batches or min(BATCHES, setting.sequences // SEQUENCES)
        depth = 2 if form == "ideal" else 1
        counts = resident_experts(setting.slots, setting.layers, setting.experts, depth)
        resident = np.zeros((setting.layers, setting.experts), np.int64)
        for layer in range(setting.layers):
            resident[layer, : counts[layer]] = WHOLE
        buffers = buffer_experts(setting.experts - counts, depth)
        return cls(
            resident=resident,
            staging=min(buffers, setting.slots - int(counts.sum())),
            batches=max(1, min(wanted, setting.sequences)),
            released=int(form == "released"),
            kv_on_host=int(kv == "host"),
            cpu_attention=int(cpu_attention),
            dense_on_host=int(dense == "host"),
        )

    def place(self, setting: Setting) -> Placement:
        """Leave the same share of every layer on the GPU, and buffers for the rest."""
        streamed = (self.resident == 0).sum(axis=1).max()
        return layer_caches(
            setting,
            cached=self.resident,
            slots=(self.resident > 0).sum(axis=1),
            staging_slots=self.staging,
            batches=self.batches,
            gemm_per_batch=True,
            kv_on_host=self.kv_on_host == 1,
            attention_on_cpu=self.cpu_attention == 1,
            dense_on_host=self.dense_on_host == 1,
            sync_batches=self.released == 1,
            notices=buffer_notices("flexgen", self.staging, int(streamed)),
        )

    def plan(self, setting: Setting) -> tuple[Table, ...]:
        """Show the placement, and both forms of the cost model with their terms."""
        prompt, generate = mean_lengths(setting)
        terms = layer_terms(self, setting, prompt, generate)
        seconds = {
            name: total_ns(terms, setting.layers, generate, by_code=by_code) / 1e9
            for name, by_code in (("paper", False), ("released code", True))
        }
        tokens = setting.sequences * generate
        return (
            Table(
                "Placement and what the cost model expects of it",
                ("setting", "value"),
                (
                    ("batches of a block", self.batches),
                    ("sequences of the largest batch", -(-setting.sequences // self.batches)),
                    ("experts on the GPU", int((self.resident > 0).sum())),
                    ("of all experts", self.resident.size),
                    ("buffers, in experts", self.staging),
                    *((f"s, {name}", value) for name, value in seconds.items()),
                    *((f"tokens/s, {name}", tokens / value) for name, value in seconds.items()),
                ),
                f"A prompt has {prompt:g} tokens and {generate:g} are generated, on average.",
            ),
            Table(
                "One layer of a block, ms",
                ("term", "prefill", "decode"),
                tuple((name, pre / 1e6, gen / 1e6) for name, (pre, gen) in terms.items()),
                "paper: the largest; released code: prefill max(to_gpu, to_host, compute), decode "
                "to_gpu + max(to_host, compute).",
            ),
        )

    def before_attention(self, view: View, plan: Plan) -> None:
        """Copy the experts of the next layer, or those of this one behind its own attention."""
        if self.released:
            stream_layer(view, plan, view.layer)
        else:
            stream_ahead(view, plan)

    def before_gate(self, view: View, plan: Plan) -> None:
        """Wait for the whole layer."""
        await_layer(view, plan)

    def dispatch(self, view: View, plan: Plan) -> None:
        """Compute what was chosen."""
        run_by_id(view, plan)


def resident_experts(slots: int, layers: int, experts: int, depth: int) -> IntArray:
    """Return (layers,): the most experts on the GPU for which the buffers still find room."""
    for total in range(min(slots, layers * experts), 0, -1):
        counts = even_split(total, layers)
        if total + buffer_experts(experts - counts, depth) <= slots:
            return counts
    return np.zeros(layers, np.int64)


def buffer_experts(streamed: IntArray, depth: int) -> int:
    """Return the most experts that are streamed for `depth` layers in a row (layers,)."""
    rows = [np.roll(streamed, -at) for at in range(min(depth, len(streamed)))]
    return int(np.sum(rows, axis=0).max())


Terms = dict[str, tuple[float, float]]


def layer_terms(policy: FlexGen, setting: Setting, prompt: float, generate: float) -> Terms:
    """Return what each link and the GPU need for one layer of a block, in prefill and decode (ns).

    Routing is taken to be even and the context that of half of the generated tokens. If the CPU
    attends, its time counts as computing, as in the released cost model.
    """
    costs = setting.costs
    streamed = (policy.resident == 0).sum(axis=1).max()
    weights = int(streamed) * setting.expert_bytes
    weights += policy.dense_on_host * int(costs.attention_bytes.max())
    context = prompt + generate / 2
    kv_bytes = int(costs.kv_bytes.max()) * policy.kv_on_host
    size = -(-setting.sequences // policy.batches)
    state_bytes = setting.sequences * costs.token_bytes * policy.cpu_attention
    used_bytes = int(setting.sequences * context) * kv_bytes
    if policy.cpu_attention:
        used_bytes = state_bytes
    last = setting.layers - 1

    def compute_ns(phase: int, total: int, tokens: int, attended: float) -> int:
        own = duration_ns(costs, phase, ATTENTION, last, tokens, int(attended), WHOLE, 0)
        own += int(costs.gate_ns[tokens])
        own += pass_ns(costs, setting.precision, setting.experts, setting.top_k, tokens)
        return policy.batches * own + int(costs.combine_ns[total] + costs.shared_ns[total])

    total = setting.step_tokens
    tokens = min(max(1, round(size * prompt)), total)
    attended = size * context
    by_cpu = duration_ns(costs, DECODE, ATTENTION_CPU, last, size, int(attended), WHOLE, 0)
    by_cpu *= policy.batches * policy.cpu_attention
    on_gpu = attended * (1 - policy.cpu_attention)
    return {
        "to_gpu": (copy_ns(costs, H2D, weights), copy_ns(costs, H2D, weights + used_bytes)),
        "to_host": (
            copy_ns(costs, D2H, round(setting.sequences * prompt) * kv_bytes),
            copy_ns(costs, D2H, setting.sequences * kv_bytes + state_bytes),
        ),
        "compute": (
            compute_ns(PREFILL, total, tokens, size * prompt * (prompt + 1) / 2),
            compute_ns(DECODE, setting.sequences, size, on_gpu) + by_cpu,
        ),
    }


def total_ns(terms: Terms, layers: int, generate: float, *, by_code: bool) -> float:
    """Return the whole run's time by one of the two forms; nothing is on disk."""
    to_gpu, to_host, compute = terms["to_gpu"], terms["to_host"], terms["compute"]
    prefill = max(to_gpu[0], to_host[0], compute[0])
    decode = max(to_gpu[1], to_host[1], compute[1])
    if by_code:
        decode = to_gpu[1] + max(to_host[1], compute[1])
    return layers * (prefill + (generate - 1) * decode)
