"""What operations cost: a model on a machine, as dense tables of integer nanoseconds.

`duration_ns` is the one place that says how long an operation takes; every simulated machine calls
it, and the host's own forecast does. Calibrated floats become ns here, once, rounded up.
"""

from typing import NamedTuple

from moesim.types import (
    ATTENTION,
    COMBINE,
    DISK,
    DISK_READ,
    EXPERT_CPU,
    EXPERT_GPU,
    GATE,
    GPU,
    H2D,
    D2H,
    HEAD,
    KV_OUT,
    MOVE,
    PREDICT,
    SEND,
    SHARED,
    WHOLE,
    IntArray,
)

CONTEXT_UNIT = 1 << 20
"""Time per attended token is kept in ns / 2**20."""


class Costs(NamedTuple):
    """Cost tables of one model on one machine; precisions are indices into `types.BITS`.

    Tables over tokens start at 0 tokens (0 ns) and reach the most that one operation of the run
    can have; those over bytes are `latency_ns + bytes / rate`.
    """

    expert_gpu_ns: IntArray
    """(precisions, tokens + 1): one whole expert whose weights are in GPU memory."""
    expert_cpu_ns: IntArray
    """(precisions, tokens + 1): one whole expert on the CPU, weights in host memory."""
    attention_ns: IntArray
    """(tokens + 1,): norms and projections of one layer for so many new tokens."""
    context_fp: IntArray
    """(phases,): attention over the context, per attended token of one layer, in ns / 2**20.

    The tokens attended to are summed over the new tokens: a prompt of n attends to n (n + 1) / 2.
    """
    dense_ns: IntArray
    """(tokens + 1,): the FFN of one layer without experts."""
    dense_before: IntArray
    """(layers,): layers without experts just before each MoE layer."""
    gate_ns: IntArray
    """(tokens + 1,): one router, or one guess of a router's choice."""
    shared_ns: IntArray
    """(tokens + 1,): the shared experts of one layer; 0 where there are none."""
    combine_ns: IntArray
    """(tokens + 1,): weighted sum of the experts' outputs."""
    head_ns: IntArray
    """(tokens + 1,): last norm, logits and sampling, for so many sequences; layers without experts
    after the last MoE layer are counted here."""
    rate: IntArray
    """(lanes, 2): latency in ns and bytes per ms of copies; the row of `gpu` is GPU memory."""
    expert_bytes: IntArray
    """(layers, precisions)."""
    attention_bytes: IntArray
    """(layers,): weights outside the experts, streamed when they are offloaded (DENSE_IN)."""
    kv_bytes: IntArray
    """(layers,): keys and values of one token, of the layer and the dense ones before it."""
    token_bytes: int
    """One token's hidden state, as it travels to the CPU and back."""
    kind_source: IntArray
    """(kinds,): `types.SOURCES` code of each kind's numbers; experts have tables of their own."""
    expert_gpu_source: IntArray
    """(precisions, tokens + 1)."""
    expert_cpu_source: IntArray
    """(precisions, tokens + 1)."""


def copy_ns(costs: Costs, lane: int, size_bytes: int) -> int:
    """Return the time of one copy on a lane at full speed, rounded up; nothing takes no time."""
    if size_bytes <= 0:
        return 0
    rate = costs.rate[lane, 1]
    return costs.rate[lane, 0] + (size_bytes * 1_000_000 + rate - 1) // rate


def part_bytes(costs: Costs, layer: int, precision: int, start: int, part: int) -> int:
    """Return the bytes of the `part`/1024 of an expert from `start`; parts sum to the whole."""
    whole = costs.expert_bytes[layer, precision]
    return whole * (start + part) // WHOLE - whole * start // WHOLE


def duration_ns(  # noqa: PLR0911  one answer per kind
    costs: Costs, phase: int, kind: int, layer: int, amount: int, context: int, part: int, precision: int
) -> int:
    """Return how long an operation takes when nothing else is busy.

    `amount` is tokens (sequences for HEAD) or bytes, by kind; `context` is the tokens attended to
    (ATTENTION) or where the part of an expert starts (EXPERT_GPU). Pieces of an expert sum exactly.
    """
    if kind == EXPERT_GPU:
        whole = costs.expert_gpu_ns[precision, amount]
        return whole * (context + part) // WHOLE - whole * context // WHOLE
    if kind == EXPERT_CPU:
        return costs.expert_cpu_ns[precision, amount]
    if kind in (GATE, PREDICT):
        return costs.gate_ns[amount]
    if kind == ATTENTION:
        before = costs.dense_before[layer]
        attended = (context * costs.context_fp[phase] + CONTEXT_UNIT - 1) // CONTEXT_UNIT
        return (before + 1) * (costs.attention_ns[amount] + attended) + before * costs.dense_ns[amount]
    if kind == COMBINE:
        return costs.combine_ns[amount]
    if kind == SHARED:
        return costs.shared_ns[amount]
    if kind == HEAD:
        return costs.head_ns[amount]
    if kind == MOVE:
        return copy_ns(costs, GPU, amount)
    if kind in (SEND, KV_OUT):
        return copy_ns(costs, D2H, amount)
    if kind == DISK_READ:
        return copy_ns(costs, DISK, amount)
    return copy_ns(costs, H2D, amount)


def source_of(costs: Costs, kind: int, amount: int, precision: int) -> int:
    """Return the `types.SOURCES` code of the number behind an operation's duration."""
    if kind == EXPERT_GPU:
        return costs.expert_gpu_source[precision, amount]
    if kind == EXPERT_CPU:
        return costs.expert_cpu_source[precision, amount]
    return costs.kind_source[kind]
