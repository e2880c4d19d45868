"""A lower bound on the makespan: what no policy can beat with this budget, model and machine.

It is the time of a relaxed run, in which more is allowed than on any machine of moesim. Copies and
computations run at full speed, lanes do not disturb each other, nothing jitters, the weights that
cross the link do so without a gap, the future is known, and experts may be divided between the
devices in fractions. What is left are these four arguments; times are those of `costs.Costs`.

**Fixed.** The GPU does one thing at a time, and the layers follow one another: a layer's attention
waits for the COMBINE before it, its gates for its attention, and its experts for the host, which
must have waited for the gates (one synchronisation) and launches at least one operation after
that. A step begins when the host has waited for the HEAD before it. Whatever the policy, the
makespan contains attention, gates, COMBINE and HEAD of every layer and step, and these pauses.
Several batches compute as much in pieces: n tokens take at least n times the least time per token
of any number up to n. In decode the CPU may attend to the context instead, for one batch beside the
GPU's projections and gates for others, of which only the last batch's gate, of one token at least,
must follow: then the longer of the two counts, if that is less.

**Experts.** Between these pauses and the COMBINE, each active expert is computed on the GPU, in
sequence with the shared experts, or on the CPU, before and after which the activations cross the
link. With all weights free, the shortest time is a fractional division of work between two lanes:
for every weight w from 0 to 1, a time that is at least the end of both lanes is at least
`w * gpu_end + (1 - w) * cpu_end`, and the sum over experts of the lesser of `w * gpu` and
`(1 - w) * cpu` is the least that an assignment can make of that. The largest such number is the
optimum of the fractional division, and no more than that of a real one. Besides, each expert takes
at least what it takes on the device that is faster for it.

**Weights.** Take any window of consecutive steps. What the GPU holds when it begins is at most the
budget. An expert that the GPU computes in it, whenever and how often, was held then or crosses the
link in it, in whole or in part; an expert that it does not compute costs the CPU all its uses. So
with k experts on the GPU the window takes at least the copies of k experts less a budget, and at
least the fixed part (during which no expert is computed) and the CPU's work for the others. The
least of the larger of both over all k, fractions included and the experts that would cost the CPU
most chosen first, bounds the window. Windows that follow one another add up. Of all ways to cut
the run into windows those are tried that halve it again and again; each half counts with the
larger of its own bound and the sum of its halves'.

**What is allowed.** Policies that change results are allowed more, which must be said: `bits` are
the precisions that experts may have on the GPU beside the stored one, and with `deferral` results
of the CPU may join the next layer's COMBINE, so that its work has the whole step (the last layer
may not defer).

All times are whole nanoseconds, so that bounds of parts of the run may be rounded up.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from moesim.costs import CONTEXT_UNIT, Costs, copy_ns
from moesim.run import Prepared
from moesim.types import BITS, D2H, DECODE, H2D, FloatArray, IntArray


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """A lower bound on a run's makespan, and what it is made of: the three terms sum to it."""

    makespan_ns: int
    tokens_per_s: float
    """An upper bound."""
    fixed_ns: int
    """Attention, gates, COMBINE, HEAD, and the pauses of the host between them."""
    experts_ns: int
    """What the experts add where all weights are on the GPU for nothing."""
    weights_ns: int
    """What the budget and the link add to that."""
    bits: tuple[int, ...]
    """Precisions allowed on the GPU."""
    deferral: bool

    @property
    def binds(self) -> str:
        """The largest of the terms: `fixed`, `experts` or `weights`."""
        terms = {
            "fixed": self.fixed_ns,
            "experts": self.experts_ns,
            "weights": self.weights_ns,
        }
        return max(terms, key=lambda name: terms[name])


class Work(NamedTuple):
    """What every policy has to do, in ns, as little as the tables allow."""

    fixed_ns: IntArray
    """(steps,): see the module."""
    shared_ns: IntArray
    """(steps,): shared experts of one layer."""
    around_ns: IntArray
    """(steps,): of one layer, to send activations to the CPU, beyond the gate, and bring them
    back."""
    gpu_ns: IntArray
    """(tokens + 1,): an expert on the GPU for so many tokens."""
    cpu_ns: IntArray
    """(tokens + 1,)."""
    loads: list[list[tuple[IntArray, IntArray]]]
    """Per step and layer: the active experts, and how many tokens each has."""
    copy_ns: float
    """One expert over the link."""
    held_ns: float
    """What the budget spares the link at most, once per window."""
    gpu: bool
    """The budget holds an expert."""


def bound(prepared: Prepared, *, bits: Sequence[int] = (), deferral: bool = False) -> Bound:
    """Return a time that no policy can beat, whatever the one that the run was prepared for.

    `bits` and `deferral` say what policies that change results are allowed; see the module.
    """
    stored = prepared.setting.precision
    allowed = sorted({stored, *(BITS.index(b) for b in bits)})
    work = work_of(prepared, allowed)
    experts = prepared.setting.experts
    fixed_ns = int(work.fixed_ns.sum())
    free = [division_ns(work, step, deferral=deferral) for step in range(len(work.fixed_ns))]
    makespan_ns, _, _ = window_ns(
        work, free, 0, len(free), prepared.setting.layers * experts, experts, deferral=deferral
    )
    generated = int(prepared.workload.generated.sum())
    return Bound(
        makespan_ns=makespan_ns,
        tokens_per_s=generated * 1e9 / makespan_ns if makespan_ns else math.inf,
        fixed_ns=fixed_ns,
        experts_ns=sum(free) - fixed_ns,
        weights_ns=makespan_ns - sum(free),
        bits=tuple(BITS[precision] for precision in allowed),
        deferral=deferral,
    )


def work_of(prepared: Prepared, allowed: Sequence[int]) -> Work:
    """Return what every policy has to do that may use these precisions on the GPU."""
    setting, host, steps = prepared.setting, prepared.profile.host, prepared.feed.steps
    costs = setting.costs
    split = setting.sequences > 1
    begin, end = steps.offset[:, 0], steps.offset[:, -1]
    tokens = end - begin
    dense_ns = least(costs.dense_ns, split)[tokens]
    projected_ns = np.stack([least(ns, split) for ns in costs.attention_ns])[steps.phase, tokens]
    context_fp = np.minimum.accumulate(costs.context_fp, axis=1) if split else costs.context_fp
    attended = -(-steps.context.sum(axis=1) * context_fp[steps.phase, tokens] // CONTEXT_UNIT)
    before = costs.dense_before[:, None]
    attention = (before + 1) * (projected_ns + attended) + before * dense_ns
    by_cpu = -(-steps.context.sum(axis=1) * costs.cpu_context_fp // CONTEXT_UNIT)
    by_cpu = (before + 1) * (costs.cpu_attention_ns + by_cpu)
    gate = least(costs.gate_ns, split)[tokens]
    projected = attention - (before + 1) * attended
    divided = np.minimum(attention + gate, np.maximum(projected + gate, by_cpu + costs.gate_ns[1]))
    gated = np.where(steps.phase == DECODE, divided, attention + gate)
    pause = host.per_sync_ns + host.per_launch_ns
    layer_ns = gated.sum(axis=0) + setting.layers * (pause + costs.combine_ns[tokens])
    start_ns = np.full(len(tokens), host.per_sync_ns + host.per_layer_ns + host.per_launch_ns)
    start_ns[0] -= host.per_sync_ns
    fixed = start_ns + layer_ns + costs.head_ns[steps.sequences.sum(axis=1)]
    sizes = [int(n) * costs.token_bytes for n in tokens]
    send = np.array([copy_ns(costs, D2H, size) for size in sizes])
    back = np.array([copy_ns(costs, H2D, size) for size in sizes])
    gpu = np.stack([least(costs.expert_gpu_ns[precision], split) for precision in allowed])
    one_ns, held_ns = copies(costs, allowed, setting.budget_bytes)
    return Work(
        fixed_ns=fixed,
        shared_ns=costs.shared_ns[tokens],
        around_ns=np.maximum(0, send - gate - pause) + back,
        gpu_ns=gpu.min(axis=0),
        cpu_ns=costs.expert_cpu_ns[setting.precision],
        loads=[loads_of(prepared.feed.chosen[a:b]) for a, b in zip(begin, end, strict=True)],
        copy_ns=one_ns,
        held_ns=held_ns,
        gpu=setting.budget_bytes >= int(costs.expert_bytes[:, list(allowed)].min()),
    )


def least(ns: IntArray, split: bool) -> IntArray:
    """Return the least time for n tokens if they may be split: n times the least per token."""
    if not split:
        return ns
    found = ns.copy()
    best, at = int(ns[1]), 1
    for n in range(1, len(ns)):
        if int(ns[n]) * at < best * n:
            best, at = int(ns[n]), n
        found[n] = -(-best * n // at)
    return found


def copies(costs: Costs, allowed: Sequence[int], budget_bytes: int) -> tuple[float, float]:
    """Return the time of one expert's copy, the fastest, and what a full budget spares at most.

    Of an expert of which a part is there, the rest is copied: part of the bytes, and an operation.
    """
    size = costs.expert_bytes[:, list(allowed)].min(axis=1)
    start, at_ns, rate = costs.copies[H2D].T
    line = np.searchsorted(start, size, side="right") - 1
    ns = at_ns[line] + (size - start[line]) * 1e6 / rate[line]
    spared = np.concatenate((ns / size, 1e6 / rate[start < size.max()]))
    return float(ns.min()), budget_bytes * float(spared.max())


def loads_of(chosen: Any) -> list[tuple[IntArray, IntArray]]:
    """Return the active experts of each layer and their tokens, from ids (tokens, layers, k)."""
    found = []
    for layer in range(chosen.shape[1]):
        ids = chosen[:, layer]
        experts, tokens = np.unique(ids[ids >= 0], return_counts=True)
        found.append((experts.astype(np.int64), tokens.astype(np.int64)))
    return found


def up(ns: float) -> int:
    """Return whole ns: rounded up, but for what may be an error of the arithmetic."""
    return math.ceil(ns - 1e-9 * max(1.0, ns))


def division_ns(work: Work, step: int, *, deferral: bool) -> int:
    """Return the least time of a step in which all weights are on the GPU for nothing."""
    fixed = int(work.fixed_ns[step])
    shared = int(work.shared_ns[step])
    loads = work.loads[step]
    if deferral:
        tokens = np.concatenate([n for _, n in loads])
        on_gpu = fixed + shared * len(loads)
        return max(on_gpu, divided_ns(work, tokens, on_gpu, 0))
    around = int(work.around_ns[step])
    total = fixed
    for _, tokens in loads:
        ns = divided_ns(work, tokens, shared, around) if len(tokens) else shared
        if work.gpu and len(tokens):
            ns = min(ns, shared + int(work.gpu_ns[tokens].sum()))
        total += ns
    return total


def divided_ns(work: Work, tokens: IntArray, gpu_ns: int, cpu_ns: int) -> int:
    """Return the least time in which two lanes do these experts, if the CPU does any of them.

    `gpu_ns` and `cpu_ns` are what the lanes do besides.
    """
    cpu = work.cpu_ns[tokens]
    if not work.gpu:
        return max(gpu_ns, cpu_ns + int(cpu.sum()))
    gpu = work.gpu_ns[tokens]
    longest = int(np.minimum(gpu + gpu_ns, cpu + cpu_ns).max(initial=0))
    return max(gpu_ns, cpu_ns, longest, up(fractional_ns(gpu, cpu, gpu_ns, cpu_ns)))


def fractional_ns(gpu: IntArray, cpu: IntArray, gpu_ns: int, cpu_ns: int) -> float:
    """Return the shortest time of two lanes that share work in fractions, by its dual."""
    both = gpu + cpu
    weight: FloatArray = np.full(len(both), 0.5)
    np.divide(cpu, both, out=weight, where=both > 0)
    order = np.argsort(weight)
    weight, gpu, cpu = weight[order], gpu[order], cpu[order]
    on_gpu = gpu[::-1].cumsum()[::-1] + gpu_ns
    on_cpu = cpu.cumsum() - cpu + cpu_ns
    return float((weight * on_gpu + (1 - weight) * on_cpu).max(initial=0.0))


def window_ns(
    work: Work, free: list[int], first: int, last: int, pairs: int, experts: int, *, deferral: bool
) -> tuple[int, int, FloatArray]:
    """Return the least time of steps `first` to `last`, the last excluded, and what it rests on:

    the fixed part, and (pairs,) what the CPU needs for all uses of each expert of each layer.
    """
    if last - first == 1:
        uses = np.zeros(pairs)
        for layer, (ids, tokens) in enumerate(work.loads[first]):
            uses[layer * experts + ids] = work.cpu_ns[tokens]
        ns, fixed = free[first], int(work.fixed_ns[first])
    else:
        middle = (first + last) // 2
        ns, fixed, uses = window_ns(work, free, first, middle, pairs, experts, deferral=deferral)
        later = window_ns(work, free, middle, last, pairs, experts, deferral=deferral)
        ns, fixed = ns + later[0], fixed + later[1]
        uses += later[2]
    if work.gpu:
        ns = max(ns, up(crossing_ns(work, uses, 0 if deferral else fixed)))
    return ns, fixed, uses


def crossing_ns(work: Work, uses: FloatArray, fixed_ns: int) -> float:
    """Return the least of the larger of link and CPU, over all numbers of experts on the GPU."""
    costly = -np.sort(-uses[uses > 0])
    cpu = fixed_ns + np.concatenate(([0.0], costly[::-1].cumsum()))[::-1]
    link = work.copy_ns * np.arange(len(costly) + 1) - work.held_ns
    k = int((link < cpu).sum())  # the link's rises, the CPU's falls
    if k in (0, len(link)):
        return float(cpu[0] if k == 0 else cpu[-1])
    share = (cpu[k - 1] - link[k - 1]) / (work.copy_ns + costly[k - 1])
    return float(link[k - 1] + share * work.copy_ns)
