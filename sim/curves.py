"""Hit rates of caches without any notion of time: one cache per layer, all rules, all sizes.

Every row counts, whatever its phase or sequence. Caches start empty. A token's experts are looked
up one after another in rank order, and one that is absent is admitted at once: in place of another
if the cache is full, which may be an expert that this very token has used or is about to use.
(`traces.stats` has caches that protect a token's experts.)

By token, the clock of LRU and Belady counts tokens, and of experts that tie the lowest id leaves.
Belady goes by the next use in a later token. LFU counts for ever.

By access, the clock counts lookups, and all rules hit whenever libCacheSim's do. Its LFU is another
one: it counts from an expert's admission on, and of equals the one used longest ago leaves. Experts
that are never used again tie under Belady, and which of them leaves makes no difference.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np

from moesim.errors import InputError
from moesim.jit.flatten import flatten
from moesim.jit.store import Stored, load, place, record_of
from moesim.traces.format import MISSING, Trace
from moesim.types import FloatArray, IntArray

RULES = ("lru", "lfu", "fifo", "belady")
LRU, LFU, FIFO, BELADY = range(4)
CLOCKS = ("token", "access")
BY_TOKEN, BY_ACCESS = range(2)

MOST = (1 << 63) - 1

COMPILE_S = 4
"""About what compiling takes, once."""
PATIENCE_S = 2
"""Plain Python does what takes less, unless the compiled rules are there already."""
LOOKUPS_PER_S = 150_000
"""About what plain Python does, of one rule."""

MODULE = """\
import numba

jit = numba.njit
entry = numba.njit(nogil=True, cache=True)

{functions}

@entry
def count_hits(rule, clock, ids, times, experts, sizes, hits):
    {name}(rule, clock, ids, times, experts, sizes, hits)
"""
SIGNATURE = "void(int64, int64, int64[::1], int64[::1], int64, int64[::1], int64[::1])"

Rules = Callable[[int, int, IntArray, IntArray, int, IntArray, IntArray], None]


class Curves(NamedTuple):
    """How often each cache of each layer hits."""

    rules: tuple[str, ...]
    sizes: tuple[int, ...]
    """In experts per layer."""
    hits: IntArray
    """(rules, sizes, layers)."""
    lookups: IntArray
    """(layers,)."""

    def hit_rates(self) -> FloatArray:
        """Return the share of lookups that hit (rules, sizes, layers); NaN for a layer of none."""
        rates: FloatArray = np.full(self.hits.shape, np.nan)
        np.divide(self.hits, self.lookups, out=rates, where=self.lookups > 0)
        return rates


def curves(
    trace: Trace,
    rules: Sequence[str],
    sizes: Sequence[int],
    clock: str = "token",
    *,
    compiled: bool | None = None,
    say: Callable[[str], None] | None = None,
) -> Curves:
    """Return the hits of caches of these rules and sizes, in experts, in each layer.

    Compiled, unless that would take longer than to do without; `say` is told before it is done for
    the first time.

    Raises InputError for an unknown rule or clock, and for a size that no cache has.
    """
    experts = trace.n_experts
    check(rules, sizes, clock, experts)
    stored = module()
    ready = record_of(stored) is not None
    if compiled is None:
        compiled = ready or trace.experts.size * len(rules) > PATIENCE_S * LOOKUPS_PER_S
    if compiled and not ready and say is not None:
        say(f"compiling the cache rules, about {COMPILE_S} s, once")
    count: Rules = load(stored, compiled_rules) if compiled else count_hits
    hits = np.zeros((trace.layers, len(rules), len(sizes)), np.int64)
    lookups = np.zeros(trace.layers, np.int64)
    for layer in range(trace.layers):
        ids, tokens = looked_up(trace, layer)
        lookups[layer] = len(ids)
        times = tokens if clock == "token" else np.arange(len(ids))
        for rule, found in zip(rules, hits[layer], strict=True):
            count(
                RULES.index(rule), CLOCKS.index(clock), ids, times, experts,
                np.array(sizes, np.int64), found,
            )  # fmt: skip
    return Curves(tuple(rules), tuple(sizes), np.moveaxis(hits, 0, 2), lookups)


def check(rules: Sequence[str], sizes: Sequence[int], clock: str, experts: int) -> None:
    """Raise InputError for an unknown rule or clock, and for a size that no cache has."""
    for kind, names, known in (("cache rule", rules, RULES), ("clock", [clock], CLOCKS)):
        for name in names:
            if name not in known:
                raise InputError(f"no {kind} named {name!r}; there are: {', '.join(known)}")
    for size in sizes:
        if not 1 <= size <= experts:
            raise InputError(f"a cache of {size} experts; legal are 1..{experts}, a layer's own")


def looked_up(trace: Trace, layer: int) -> tuple[IntArray, IntArray]:
    """Return the experts that a layer looks up, one after another, and the token of each."""
    ids = trace.experts[:, layer]
    recorded = ids != MISSING
    tokens = np.arange(trace.tokens).repeat(recorded.sum(axis=1))
    return ids[recorded].astype(np.int64), tokens


def module() -> Stored:
    """Return the module of the compiled rules."""
    flat = flatten([count_hits])
    return place("curves", MODULE.format(functions=flat.text, name=flat.names[count_hits]))


def compiled_rules(module: ModuleType) -> Rules:
    """Return the entry of the compiled module."""
    module.count_hits.compile(SIGNATURE)
    rules: Rules = module.count_hits
    return rules


def count_hits(
    rule: int, clock: int, ids: IntArray, times: IntArray, experts: int, sizes: IntArray,
    hits: IntArray,
) -> None:  # fmt: skip
    """Write the hits of one layer's caches (sizes,). `times`, of each lookup, never fall."""
    if rule == FIFO or (rule == LFU and clock == BY_ACCESS):
        for i in range(len(sizes)):
            hits[i] = one_size(rule, ids, experts, sizes[i])
        return
    at_depth = all_sizes(rule, ids, times, experts, sizes.max())
    for i in range(len(sizes)):
        hits[i] = at_depth[: sizes[i]].sum()


def all_sizes(rule: int, ids: IntArray, times: IntArray, experts: int, largest: int) -> IntArray:
    """Return how many lookups hit in caches of more than so many experts, and in no smaller one.

    Where the expert worth least leaves, and its worth does not depend on the cache, a cache holds
    all that a smaller one does: a stack, of which a cache of n experts holds the first n. What is
    looked up goes on top. Every cache between there and where it was loses what it holds of least
    worth: from place to place, the lesser of what lay there and what comes from above goes on down
    (Mattson et al., Evaluation techniques for storage hierarchies, 1970).
    """
    later = next_times(ids, times, experts) if rule == BELADY else ids
    worth = np.arange(experts)  # of equals, the lowest id is worth least
    stack = np.zeros(largest, np.int64)
    at_depth = np.zeros(largest, np.int64)
    held = 0
    told = 0
    for i in range(len(ids)):
        expert = ids[i]
        if rule == LRU:
            worth[expert] = times[i] * experts + expert
        elif rule == LFU:
            worth[expert] += experts
        else:
            # What this token still looks up has its next use in a later one, too.
            while told < len(ids) and times[told] == times[i]:
                worth[ids[told]] = ids[told] - later[told] * experts
                told += 1
        falling = expert
        least = MOST
        for depth in range(held):
            lying = stack[depth]
            if lying == expert:
                stack[depth] = falling
                at_depth[depth] += 1
                break
            if worth[lying] < least:
                stack[depth] = falling
                falling = lying
                least = worth[lying]
        else:
            if held < largest:
                stack[held] = falling
                held += 1
    return at_depth


def next_times(ids: IntArray, times: IntArray, experts: int) -> IntArray:
    """Return of each lookup the next later time at which its expert is looked up again."""
    never = times[-1] + 1 if len(ids) else 0
    next_use = np.full(experts, never)
    later = np.empty(len(ids), np.int64)
    end = len(ids)
    for first in range(len(ids) - 1, -1, -1):
        later[first] = next_use[ids[first]]
        if first == 0 or times[first - 1] != times[first]:
            next_use[ids[first:end]] = times[first]
            end = first
    return later


def one_size(rule: int, ids: IntArray, experts: int, size: int) -> int:
    """Return the hits of one cache whose rule looks at nothing before an expert's admission.

    What such a cache holds says nothing about other sizes: FIFO, and LFU by access.
    """
    worth = np.zeros(experts, np.int64)  # 0: not in the cache
    uses = np.zeros(experts, np.int64)
    places = np.zeros(size, np.int64)
    held = 0
    hits = 0
    for i in range(len(ids)):
        expert = ids[i]
        if worth[expert] > 0:
            hits += 1
            if rule == FIFO:
                continue
        elif held < size:
            places[held] = expert
            held += 1
        else:
            least = 0
            for at in range(1, size):
                if worth[places[at]] < worth[places[least]]:
                    least = at
            worth[places[least]] = 0
            uses[places[least]] = 0
            places[least] = expert
        uses[expert] += 1
        worth[expert] = uses[expert] * len(ids) + i
    return hits
