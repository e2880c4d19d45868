"""Hit rates of caches without any notion of time: one cache per layer, every rule, every size.

All rows count, whatever their phase or sequence. Caches start empty. A token's experts are looked up
one after another in rank order; one that is absent is admitted at once, when the cache is full in
place of another, which may be an expert that this very token used or is about to use. (Rules that
protect the current token's experts are in `traces.stats`.)

The clock of LRU and Belady counts tokens, so that the experts of one token tie, or single lookups.
Of experts that tie, the lowest id leaves. By token LFU counts for ever and has ties by id, too; by
lookup it is that of libCacheSim, as all four then are: it counts from an expert's admission on, and
of equals the one used longest ago leaves.

The functions run as plain Python and, for more than a few lookups, compiled.
"""

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import NamedTuple

import numpy as np

from moesim.errors import InputError
from moesim.jit.flatten import flatten
from moesim.jit.store import Stored, load, place, record_of
from moesim.traces.format import MISSING, Trace
from moesim.types import IntArray

RULES = ("lru", "lfu", "fifo", "belady")
LRU, LFU, FIFO, BELADY = range(4)
CLOCKS = ("token", "access")

MOST = (1 << 63) - 1

COMPILE_S = 5
"""About what compiling takes, once."""
PLAIN_LOOKUPS_PER_S = 100_000
"""About what plain Python does for one rule."""
PATIENCE_S = 2
"""What is never compiled for: plain Python takes less."""

MODULE = """\
import numba
from moesim.jit.structs import inner

jit = inner()
entry = numba.njit(nogil=True, cache=True)

{functions}

@entry
def count_hits(rule, clock, ids, times, experts, sizes, hits):
    {name}(rule, clock, ids, times, experts, sizes, hits)
"""
SIGNATURE = "void(int64, int64, int64[::1], int64[::1], int64, int64[::1], int64[::1])"

Kernel = Callable[[int, int, IntArray, IntArray, int, IntArray, IntArray], None]


class Curves(NamedTuple):
    """What each cache of each layer hits."""

    rules: tuple[str, ...]
    sizes: tuple[int, ...]
    """In experts per layer."""
    hits: IntArray
    """(rules, sizes, layers)."""
    lookups: IntArray
    """(layers,)."""


def curves(
    trace: Trace,
    rules: Sequence[str],
    sizes: Sequence[int],
    clock: str = "token",
    say: Callable[[str], None] | None = None,
    compiled: bool | None = None,
) -> Curves:
    """Return the hits of caches of these rules and sizes, in every layer.

    Compiled if it was compiled before or is worth it, or as asked; `say` is told when that starts.
    Raises InputError for what `check` refuses.
    """
    check(rules, sizes, clock, trace.n_experts)
    stored = module()
    known = record_of(stored)
    work = trace.experts.size * len(rules)
    if compiled is None:
        compiled = work > PLAIN_LOOKUPS_PER_S * PATIENCE_S or (known is not None)
    if compiled and known is None and say is not None:
        say(f"compiling the cache rules, about {COMPILE_S} s, once")
    kernel: Kernel = load(stored, _prepared) if compiled else count_hits
    hits = np.zeros((trace.layers, len(rules), len(sizes)), np.int64)
    lookups = np.zeros(trace.layers, np.int64)
    wanted = np.array(sizes, np.int64)
    for layer in range(trace.layers):
        ids, tokens = accesses(trace, layer)
        lookups[layer] = len(ids)
        times = tokens if clock == "token" else np.arange(len(ids))
        for rule, found in zip(rules, hits[layer], strict=True):
            code = RULES.index(rule), CLOCKS.index(clock)
            kernel(*code, ids, times, trace.n_experts, wanted, found)
    return Curves(tuple(rules), tuple(sizes), np.moveaxis(hits, 0, 2), lookups)


def check(rules: Sequence[str], sizes: Sequence[int], clock: str, experts: int) -> None:
    """Raise InputError for an unknown rule or clock, and for a size that no cache can have."""
    for rule in rules:
        if rule not in RULES:
            raise InputError(f"no cache rule named {rule!r}; there are: {', '.join(RULES)}")
    if clock not in CLOCKS:
        raise InputError(f"no clock named {clock!r}; there are: {', '.join(CLOCKS)}")
    for size in sizes:
        if not 1 <= size <= experts:
            raise InputError(f"a cache of {size} experts; legal are 1..{experts}, the trace's own")


def accesses(trace: Trace, layer: int) -> tuple[IntArray, IntArray]:
    """Return the experts that a layer looks up, one by one, and the token of each."""
    ids = trace.experts[:, layer]
    there = ids != MISSING
    tokens = np.arange(len(ids)).repeat(there.sum(axis=1))
    return ids[there].astype(np.int64), tokens


@cache
def module() -> Stored:
    """Return the module of the compiled rules."""
    flat = flatten([count_hits])
    return place("curves", MODULE.format(functions=flat.text, name=flat.names[count_hits]))


def _prepared(module: ModuleType) -> Kernel:
    module.count_hits.compile(SIGNATURE)
    kernel: Kernel = module.count_hits
    return kernel


def count_hits(
    rule: int, clock: int, ids: IntArray, times: IntArray, experts: int, sizes: IntArray,
    hits: IntArray,
) -> None:  # fmt: skip
    """Write the hits of a layer's caches (sizes,); `times` never fall."""
    if rule == FIFO or (rule == LFU and clock == 1):
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
    looked up goes on top. Every cache between there and where it was loses what is worth least: from
    place to place, the lesser of what lay there and what comes from above goes on down (Mattson et
    al., Evaluation techniques for storage hierarchies, 1970).
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
    """Return the next time after its own at which each lookup's expert is looked up again."""
    never = times[-1] + 1 if len(ids) else 0
    later = np.empty(len(ids), np.int64)
    next_use = np.full(experts, never, np.int64)
    first = len(ids)
    for i in range(len(ids) - 1, -1, -1):
        later[i] = next_use[ids[i]]
        if i == 0 or times[i - 1] != times[i]:
            for j in range(i, first):
                next_use[ids[j]] = times[i]
            first = i
    return later


def one_size(rule: int, ids: IntArray, experts: int, size: int) -> int:
    """Return the hits of one cache, of FIFO or of libCacheSim's LFU.

    Whose worth begins with an expert's admission, so that a cache says nothing about another size.
    """
    worth = np.zeros(experts, np.int64)  # 0: not in the cache
    places = np.zeros(size, np.int64)
    uses = np.zeros(experts, np.int64)
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
        # Fewer uses first, and of equals the one used longest ago.
        worth[expert] = uses[expert] * len(ids) + i
    return hits
