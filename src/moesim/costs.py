"""What operations cost: a model on a machine, as dense tables of integer nanoseconds.

`duration_ns` is the one place that says how long an operation takes; every simulated machine calls
it, and the host's own forecast does. Calibrated floats become ns here, once, rounded up.
"""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from moesim.errors import InputError
from moesim.model import (
    GroupedQuery,
    ModelSpec,
    attention_params,
    dense_params,
    expert_bytes,
    expert_params,
    kv_bytes_per_token,
    layer_kv_bytes,
    packed_bytes,
    pair_flops,
    router_params,
    shared_params,
    streamed_params,
)
from moesim.profile import (
    AttentionTable,
    Channel,
    ExpertTable,
    HardwareProfile,
    LayerTable,
    Provenance,
)
from moesim.types import (
    ATTENTION,
    ATTENTION_CPU,
    BITS,
    COMBINE,
    COPY_IN,
    D2H,
    DATASHEET,
    DECODE,
    DENSE_IN,
    DISK,
    DISK_READ,
    EXPERT_CPU,
    EXPERT_GPU,
    EXTRAPOLATED,
    GATE,
    GPU,
    H2D,
    HEAD,
    INTERPOLATED,
    KINDS,
    KV_IN,
    KV_OUT,
    MEASURED,
    MOVE,
    PAUSE,
    PHASES,
    PREDICT,
    PREFILL,
    RESIZE,
    RETURN,
    SEND,
    SHARED,
    WHOLE,
    FloatArray,
    IntArray,
)

CONTEXT_UNIT = 1 << 20
"""Time per attended token is kept in ns / 2**20."""
NO_LINE = 1 << 62
"""More bytes than any copy has."""
MAX_BYTES_PER_MS = 1 << 50
MAX_TOKENS = 1 << 22
"""The most that one operation may have: a bound on memory, not on machines."""


COPY_LANES = {
    COPY_IN: H2D,
    RETURN: H2D,
    KV_IN: H2D,
    DENSE_IN: H2D,
    SEND: D2H,
    KV_OUT: D2H,
    DISK_READ: DISK,
    MOVE: GPU,
    RESIZE: GPU,
}
TABLES_OF = {
    ATTENTION: ("attention_ns", "context_fp", "dense_ns"),
    GATE: ("gate_ns",),
    PREDICT: ("gate_ns",),
    SHARED: ("shared_ns",),
    EXPERT_GPU: ("expert_gpu_ns",),
    COMBINE: ("combine_ns",),
    HEAD: ("head_ns",),
    EXPERT_CPU: ("expert_cpu_ns",),
    ATTENTION_CPU: ("cpu_attention_ns", "cpu_context_fp"),
}
"""Fields of `Costs` that say how long a kind takes that copies nothing."""


class Costs(NamedTuple):
    """Cost tables of one model on one machine; precisions are indices into `types.BITS`.

    Tables over tokens start at 0 tokens (0 ns) and reach the most that one operation of the run
    can have; those over bytes are lines, one behind the other.
    """

    expert_gpu_ns: IntArray
    """(precisions, tokens + 1): one whole expert whose weights are in GPU memory."""
    expert_cpu_ns: IntArray
    """(precisions, tokens + 1): one whole expert on the CPU, weights in host memory."""
    attention_ns: IntArray
    """(phases, tokens + 1): norms and projections of one layer for so many new tokens."""
    context_fp: IntArray
    """(phases, tokens + 1): what so many new tokens of one layer take per token that they attend
    to, in ns / 2**20.

    The tokens attended to are summed over the new tokens: a prompt of n attends to n (n + 1) / 2.
    """
    cpu_attention_ns: int
    """Handing one batch's attention over the context to the CPU and collecting it."""
    cpu_context_fp: int
    """As one entry of `context_fp`, on the CPU, in decode."""
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
    copies: IntArray
    """(lanes, lines, 3): from so many bytes on a copy takes so many ns, and from there on so many
    bytes per ms. The first line begins at 0 bytes, with the latency; `NO_LINE` bytes begin none.
    The row of `gpu` is GPU memory."""
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
    kind_most: IntArray
    """(kinds,): the amount up to which that holds; more is extrapolated from what was measured."""
    expert_gpu_source: IntArray
    """(precisions, tokens + 1)."""
    expert_cpu_source: IntArray
    """(precisions, tokens + 1)."""


def copy_ns(costs: Costs, lane: int, size_bytes: int) -> int:
    """Return the time of one copy on a lane at full speed, rounded up; nothing takes no time."""
    if size_bytes <= 0:
        return 0
    k = 0
    while k + 1 < costs.copies.shape[1] and costs.copies[lane, k + 1, 0] <= size_bytes:
        k += 1
    start: int = costs.copies[lane, k, 0]
    ns: int = costs.copies[lane, k, 1]
    rate: int = costs.copies[lane, k, 2]
    return ns + ((size_bytes - start) * 1_000_000 + rate - 1) // rate


def part_bytes(costs: Costs, layer: int, precision: int, start: int, part: int) -> int:
    """Return the bytes of the `part`/1024 of an expert from `start`; parts sum to the whole."""
    whole: int = costs.expert_bytes[layer, precision]
    return whole * (start + part) // WHOLE - whole * start // WHOLE


def duration_ns(  # noqa: PLR0912  one branch per kind
    costs: Costs,
    phase: int,
    kind: int,
    layer: int,
    amount: int,
    context: int,
    part: int,
    precision: int,
) -> int:
    """Return how long an operation takes when nothing else is busy.

    `amount` is tokens (sequences for HEAD) or bytes, by kind; `context` is the tokens attended to
    (ATTENTION, ATTENTION_CPU) or where the part of an expert starts (EXPERT_GPU). Pieces of an
    expert sum exactly.
    """
    ns: int
    if kind == EXPERT_GPU:
        whole: int = costs.expert_gpu_ns[precision, amount]
        ns = whole * (context + part) // WHOLE - whole * context // WHOLE
    elif kind == EXPERT_CPU:
        ns = costs.expert_cpu_ns[precision, amount]
    elif kind in (GATE, PREDICT):
        ns = costs.gate_ns[amount]
    elif kind == ATTENTION:
        before: int = costs.dense_before[layer]
        attended = (context * costs.context_fp[phase, amount] + CONTEXT_UNIT - 1) // CONTEXT_UNIT
        ns = (before + 1) * (costs.attention_ns[phase, amount] + attended)
        ns += before * costs.dense_ns[amount]
    elif kind == ATTENTION_CPU:
        layers: int = costs.dense_before[layer] + 1
        attended = (context * costs.cpu_context_fp + CONTEXT_UNIT - 1) // CONTEXT_UNIT
        ns = layers * (costs.cpu_attention_ns + attended)
    elif kind == COMBINE:
        ns = costs.combine_ns[amount]
    elif kind == SHARED:
        ns = costs.shared_ns[amount]
    elif kind == HEAD:
        ns = costs.head_ns[amount]
    elif kind == MOVE:
        ns = copy_ns(costs, GPU, amount)
    elif kind == RESIZE:
        ns = 0
    elif kind in (SEND, KV_OUT):
        ns = copy_ns(costs, D2H, amount)
    elif kind == DISK_READ:
        ns = copy_ns(costs, DISK, amount)
    else:
        ns = copy_ns(costs, H2D, amount)
    return ns


def source_of(costs: Costs, kind: int, amount: int, precision: int) -> int:
    """Return the `types.SOURCES` code of the number behind an operation's duration."""
    source: int = costs.kind_source[kind]
    if source == INTERPOLATED and amount > costs.kind_most[kind]:
        source = EXTRAPOLATED
    if kind == EXPERT_GPU:
        source = costs.expert_gpu_source[precision, amount]
    elif kind == EXPERT_CPU:
        source = costs.expert_cpu_source[precision, amount]
    return source


def build_costs(
    model: ModelSpec,
    profile: HardwareProfile,
    tokens: int,
    sequences: int,
    *,
    dense_bits: int = 16,
) -> Costs:
    """Return the costs of a model on a machine, for at most so many tokens and sequences at once.

    What was measured for this shape and precision wins, interpolated linearly in tokens; beyond
    its last point it grows as fast as at its end or as the roofline, whichever is faster. The rest
    is a roofline: kernels and the larger of weights over bandwidth and operations over their rate.
    `dense_bits` is the precision of the weights outside the routed experts.

    Raises InputError for no or too many tokens, ModelError for a precision that does not exist.
    """
    for name, most in (("tokens", tokens), ("sequences", sequences)):
        if not 1 <= most <= MAX_TOKENS:
            raise InputError(f"{name} must be from 1 to {MAX_TOKENS}, not {most}")
    gpu, cpu, link = profile.gpu, profile.cpu, profile.link
    hidden, tables, origin = model.hidden, profile.tables, profile.provenance
    sizes = [expert_bytes(model, bits) for bits in BITS]
    flops = 2.0 * expert_params(model)
    launch_ns = float(gpu.launch_ns)

    def on_gpu(kernels: int, params: int) -> _Roofline:
        moved = packed_bytes(params, dense_bits)
        ns = moved / gpu.memory_bytes_per_s * 1e9
        return _Roofline(kernels * launch_ns, ns, 2.0 * params / gpu.flops_per_s * 1e9)

    gpu_experts = [
        _curve(
            _Roofline(
                gpu.kernels.expert * launch_ns,
                size / gpu.memory_bytes_per_s * 1e9,
                flops / gpu.flops_per_s * 1e9,
            ),
            _expert_table(tables.expert_gpu, model, bits),
            tokens,
            _derived(origin.gpu),
        )
        for size, bits in zip(sizes, BITS, strict=True)
    ]
    cpu_experts = [
        _curve(
            _Roofline(
                float(cpu.overhead_ns),
                size / cpu.expert_bytes_per_s * 1e9,
                flops / cpu.flops_per_s * 1e9,
            ),
            _expert_table(tables.expert_cpu, model, bits),
            tokens,
            _derived(origin.cpu),
        )
        for size, bits in zip(sizes, BITS, strict=True)
    ]
    most = max(tokens, sequences)
    kind_source = np.full(len(KINDS), _derived(origin.gpu), np.int64)
    kind_source[[EXPERT_CPU, ATTENTION_CPU]] = _derived(origin.cpu)
    kind_most = np.full(len(KINDS), NO_LINE, np.int64)

    def of_layer(kinds: list[int], name: str, size: int, roof: _Roofline, most: int) -> IntArray:
        table = _layer_table(tables.layer, name, hidden, size) if dense_bits == 16 else None
        if table is not None:
            kind_source[kinds] = _between(table.provenance)
            kind_most[kinds] = table.points[-1][0]
        return _curve(roof, table, most, 0)[0]

    attention = on_gpu(gpu.kernels.attention, attention_params(model))
    attention_table = _attention_table(tables.attention, model)
    attention_ns = np.stack([_curve(attention, None, most, 0)[0]] * len(PHASES))
    context_fp = np.repeat(_context_fp(model, _per_attended(model, profile))[:, None], most + 1, 1)
    if attention_table:
        kind_source[ATTENTION] = _between(attention_table.provenance)
        kind_most[ATTENTION] = max(row[0] for row in attention_table.prefill)
        for phase, rows in ((PREFILL, attention_table.prefill), (DECODE, attention_table.decode)):
            at, ns, rates = np.array(rows, np.float64).T * [
                [1],
                *[[model.attentions_per_layer]] * 2,
            ]
            attention_ns[phase] = _rounded_up(_through(attention, at, ns, np.arange(most + 1.0)))
            context_fp[phase] = _context_fp(model, np.interp(np.arange(most + 1), at, rates))
    ffn = gpu.kernels.expert
    dense = on_gpu(ffn, dense_params(model)) if model.dense_width else _NOTHING
    shared = on_gpu(ffn, shared_params(model)) if model.shared_width else _NOTHING
    dense_ns = of_layer([], "ffn", model.dense_width, dense, most)
    # Reads top_k results and the residual of every token, and writes one row.
    moved_ns = 2 * hidden * (model.top_k + 2) / gpu.memory_bytes_per_s * 1e9
    combine = _Roofline(gpu.kernels.combine * launch_ns, 0.0, moved_ns)
    head = on_gpu(gpu.kernels.head, hidden * model.vocab)
    head_ns = of_layer([HEAD], "head", model.vocab, head, sequences)
    head_ns += model.dense_after * (attention_ns[DECODE] + dense_ns)[: sequences + 1]
    routed = model.experts + model.weightless_experts
    gate = on_gpu(gpu.kernels.gate, router_params(model))

    copies = _measured(origin.link)
    kind_source[[COPY_IN, RETURN, KV_IN, DENSE_IN, SEND, KV_OUT]] = copies
    kind_source[DISK_READ] = _measured(origin.disk)
    kind_source[PAUSE] = _measured(origin.host)

    # Moving bytes inside a memory reads and writes them: half its rate. The CPU's row is unused.
    channels = (
        Channel(latency_ns=gpu.launch_ns, bytes_per_s=gpu.memory_bytes_per_s / 2),
        Channel(latency_ns=0, bytes_per_s=cpu.memory_bytes_per_s / 2),
        link.h2d,
        link.d2h,
        profile.disk,
    )
    return Costs(
        expert_gpu_ns=np.stack([ns for ns, _ in gpu_experts]),
        expert_cpu_ns=np.stack([ns for ns, _ in cpu_experts]),
        attention_ns=attention_ns[:, : tokens + 1].copy(),
        context_fp=context_fp[:, : tokens + 1].copy(),
        cpu_attention_ns=int(cpu.overhead_ns),
        cpu_context_fp=_cpu_context_fp(model, profile),
        dense_ns=dense_ns[: tokens + 1].copy(),
        dense_before=np.array(model.dense_before, np.int64),
        gate_ns=of_layer([GATE, PREDICT], "gate", routed, gate, tokens),
        shared_ns=of_layer([SHARED], "ffn", model.shared_width, shared, tokens),
        combine_ns=of_layer([COMBINE], "combine", model.top_k, combine, tokens),
        head_ns=head_ns,
        copies=_lines(channels),
        expert_bytes=np.tile(np.array(sizes, np.int64), (model.layers, 1)),
        attention_bytes=np.array(
            [packed_bytes(params, dense_bits) for params in streamed_params(model)], np.int64
        ),
        kv_bytes=np.array(kv_bytes_per_token(model), np.int64),
        token_bytes=2 * hidden,
        kind_source=kind_source,
        kind_most=kind_most,
        expert_gpu_source=np.stack([source for _, source in gpu_experts]),
        expert_cpu_source=np.stack([source for _, source in cpu_experts]),
    )


class _Roofline(NamedTuple):
    """`fixed_ns` and the larger of `memory_ns`, once, and `token_ns`, for every token."""

    fixed_ns: float
    memory_ns: float
    token_ns: float


_NOTHING = _Roofline(0.0, 0.0, 0.0)


def _roofline_ns(roof: _Roofline, counts: FloatArray) -> FloatArray:
    ns: FloatArray = roof.fixed_ns + np.maximum(roof.memory_ns, roof.token_ns * counts)
    return ns


def _rounded_up(ns: FloatArray) -> IntArray:
    """Return whole ns, never falling, from 0 for no tokens; 1e-6 ns is noise of the division."""
    whole = np.ceil(np.round(ns, 6)).astype(np.int64)
    whole[0] = 0
    return np.ascontiguousarray(np.maximum.accumulate(whole))


def _curve(
    roof: _Roofline, table: ExpertTable | LayerTable | None, tokens: int, otherwise: int
) -> tuple[IntArray, IntArray]:
    """Return (tokens + 1,) ns and sources: the table where there is one, else the roofline."""
    counts = np.arange(tokens + 1, dtype=np.float64)
    if table is None:
        return _rounded_up(_roofline_ns(roof, counts)), np.full(tokens + 1, otherwise, np.int64)
    at, ns = np.array(table.points, np.float64).T
    between = np.where(counts > at[-1], EXTRAPOLATED, INTERPOLATED)
    source = np.where(np.isin(counts, at), MEASURED, between)
    source[0] = MEASURED
    if table.provenance.source != "measured":
        source = np.full(tokens + 1, DATASHEET)
    return _rounded_up(_through(roof, at, ns, counts)), source.astype(np.int64)


def _through(roof: _Roofline, at: FloatArray, ns: FloatArray, counts: FloatArray) -> FloatArray:
    """Return times at token counts on the lines through points, and beyond them.

    A time below that of fewer tokens is noise and is raised to it. Below the first point the line
    starts at one token with the roofline's time, or the first point's if that is less. Beyond the
    last one it grows as it did at its end or as the roofline, whichever is faster.
    """
    ns = np.maximum.accumulate(ns)
    slope = (ns[-1] - ns[-2]) / (at[-1] - at[-2]) if len(at) > 1 else 0.0
    if at[0] > 1:
        floor_ns = min(ns[0], float(_roofline_ns(roof, np.ones(1))[0]))
        at, ns = np.concatenate(([1.0], at)), np.concatenate(([floor_ns], ns))
    growth = _roofline_ns(roof, counts) - _roofline_ns(roof, at[-1:])
    beyond = ns[-1] + np.maximum(slope * (counts - at[-1]), growth)
    found: FloatArray = np.where(counts > at[-1], beyond, np.interp(counts, at, ns))
    return found


def _lines(channels: tuple[Channel, ...]) -> IntArray:
    """Return (lanes, lines, 3): see `Costs.copies`."""
    found = []
    for channel in channels:
        rows = [(0, channel.latency_ns)]
        for size, ns in channel.points if channel.interpolated else ():
            rows.append((size, max(rows[-1][1], math.ceil(ns))))
        rates = [
            MAX_BYTES_PER_MS if after == ns else max(1, (end - start) * 1_000_000 // (after - ns))
            for (start, ns), (end, after) in itertools.pairwise(rows)
        ]
        rates.append(max(1, int(channel.bytes_per_s // 1000)))
        found.append([(*row, rate) for row, rate in zip(rows, rates, strict=True)])
    most = max(map(len, found))
    padded = [rows + [(NO_LINE, 0, 1)] * (most - len(rows)) for rows in found]
    return np.array(padded, np.int64)


def _expert_table(
    tables: tuple[ExpertTable, ...], model: ModelSpec, bits: int
) -> ExpertTable | None:
    shape = (model.hidden, model.expert_width, bits)
    return next((t for t in tables if (t.hidden, t.width, t.bits) == shape), None)


def _attention_table(tables: tuple[AttentionTable, ...], model: ModelSpec) -> AttentionTable | None:
    own = model.attention
    if isinstance(own, GroupedQuery):
        shape = (model.hidden, own.heads, own.kv_heads, own.head_dim)
    else:
        width = own.qk_nope_head_dim + own.qk_rope_head_dim
        shape = (model.hidden, own.heads, own.heads, width)
    return next((t for t in tables if (t.hidden, t.heads, t.kv_heads, t.head_dim) == shape), None)


def _layer_table(
    tables: tuple[LayerTable, ...], kind: str, hidden: int, size: int
) -> LayerTable | None:
    shape = (kind, hidden, size)
    return next((t for t in tables if (t.kind, t.hidden, t.size) == shape), None)


def _per_attended(model: ModelSpec, profile: HardwareProfile) -> FloatArray:
    """Return (phases,) ns: prefill computes every pair, decode reads every key and value once."""
    compute_ns = pair_flops(model) / profile.gpu.flops_per_s * 1e9
    read_ns = layer_kv_bytes(model) / profile.gpu.memory_bytes_per_s * 1e9
    return np.array([compute_ns, max(compute_ns, read_ns)])


def _context_fp(model: ModelSpec, per_attended_ns: FloatArray) -> IntArray:
    """Return times per token attended to in ns / 2**20.

    Layers without a cache attend to nothing; their share is taken off all layers alike.
    """
    whole: IntArray = np.ceil(
        per_attended_ns * CONTEXT_UNIT * _with_cache(model) / model.hidden_layers
    ).astype(np.int64)
    return whole


def _cpu_context_fp(model: ModelSpec, profile: HardwareProfile) -> int:
    """Return what reading one token's keys and values takes the CPU, or computing with them."""
    compute_ns = pair_flops(model) / profile.cpu.flops_per_s * 1e9
    read_ns = layer_kv_bytes(model) / profile.cpu.memory_bytes_per_s * 1e9
    ns = max(compute_ns, read_ns) * _with_cache(model) / model.hidden_layers
    return int(np.ceil(ns * CONTEXT_UNIT))


def _with_cache(model: ModelSpec) -> int:
    """Count the layers that have a cache."""
    return model.hidden_layers - len(model.cacheless_layer_ids)


def _derived(origin: Provenance) -> int:
    """Return the source of a roofline over a section's rates."""
    return EXTRAPOLATED if origin.source == "measured" else DATASHEET


def _between(origin: Provenance) -> int:
    """Return the source of a number between those of a table."""
    return INTERPOLATED if origin.source == "measured" else DATASHEET


def _measured(origin: Provenance) -> int:
    """Return the source of a number that is the section's own."""
    return MEASURED if origin.source == "measured" else DATASHEET


def stretched(costs: Costs, kind: int, factor: float) -> Costs:
    """Return costs with the numbers of one kind stretched; of a copy, those of its lane."""

    def scaled(values: IntArray | int) -> Any:
        found = np.round(np.asarray(values) * factor).astype(np.int64)
        return int(found) if isinstance(values, int) else np.ascontiguousarray(found)

    if kind in COPY_LANES:
        copies = costs.copies.copy()
        lane = COPY_LANES[kind]
        copies[lane, :, 1] = scaled(copies[lane, :, 1])
        copies[lane, :, 2] = np.maximum(1, np.round(copies[lane, :, 2] / factor))
        return costs._replace(copies=copies)
    return costs._replace(**{name: scaled(getattr(costs, name)) for name in TABLES_OF[kind]})
