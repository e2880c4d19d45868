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
from functools import cache
from types import ModuleType
from typing import NamedTuple

import numpy as np

from moesim.errors import InputError
from moesim.jit.flatten import flatten
from moesim.jit.store import Stored, disabled, load, place, record_of
from moesim.traces.format import MISSING, Trace
from moesim.types import NONE, FloatArray, IntArray

RULES = ("lru", "lfu", "fifo", "belady")
LRU, LFU, FIFO, BELADY = range(4)
CLOCKS = ("token", "access")
BY_TOKEN, BY_ACCESS = range(2)

EMPTY = -(1 << 62)
"""What an empty place is worth: less than any expert."""

COMPILE_S = 3
"""About what compiling takes, once."""
PATIENCE_S = 2
"""Plain Python does what takes less, unless the compiled rules are there already."""
LOOKUPS_PER_S = 1_000_000
"""About what plain Python does, in one cache per layer."""

MODULE = """\
from moesim.jit.structs import entry, inner

jit = inner()

{functions}

@entry()
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
    stored = place("curves", text())
    ready = record_of(stored) is not None
    work = trace.experts.size * len(rules) * len(sizes)
    if compiled is None:
        compiled = ready or work > PATIENCE_S * LOOKUPS_PER_S
    compiled = compiled and not disabled()
    if compiled and not ready and say is not None:
        say(f"compiling the cache rules, about {COMPILE_S} s, once")
    count: Rules = compiled_rules(stored) if compiled else count_hits
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
    ids = trace.experts[:, layer].astype(np.int64).ravel()
    tokens = np.arange(trace.tokens).repeat(trace.top_k)
    recorded = ids != MISSING
    return (ids, tokens) if recorded.all() else (ids[recorded], tokens[recorded])


@cache
def text() -> str:
    """Return the module of the compiled rules."""
    flat = flatten([count_hits])
    return MODULE.format(functions=flat.text, name=flat.names[count_hits])


@cache
def compiled_rules(stored: Stored) -> Rules:
    """Return `count_hits`, compiled."""

    def entry(module: ModuleType) -> Rules:
        module.count_hits.compile(SIGNATURE)
        rules: Rules = module.count_hits
        return rules

    rules: Rules = load(stored, entry)
    return rules


def count_hits(
    rule: int, clock: int, ids: IntArray, times: IntArray, experts: int, sizes: IntArray,
    hits: IntArray,
) -> None:  # fmt: skip
    """Write the hits of one layer's caches (sizes,). `times`, of each lookup, never fall."""
    later = next_times(ids, times, experts) if rule == BELADY else ids
    for i in range(len(sizes)):
        hits[i] = hits_of_cache(rule, clock, ids, times, later, experts, sizes[i])


def hits_of_cache(
    rule: int, clock: int, ids: IntArray, times: IntArray, later: IntArray, experts: int, size: int
) -> int:
    """Return the hits of one cache, of which the expert worth least leaves."""
    places = np.full(experts, NONE)
    inside = np.full(size, NONE)
    worth = np.full(size, EMPTY)
    uses = np.zeros(experts, np.int64)
    told = 0  # lookups that Belady's rule has seen
    hits = 0
    for i in range(len(ids)):
        expert = ids[i]
        if rule == BELADY and told == i:
            told = look_ahead(i, ids, times, later, experts, places, worth)
        at = places[expert]
        hit = at != NONE
        if hit:
            hits += 1
        else:
            at = worth.argmin()
            if worth[at] != EMPTY:
                places[inside[at]] = NONE
                if clock == BY_ACCESS:
                    uses[inside[at]] = 0
            inside[at] = expert
            places[expert] = at
        uses[expert] += 1
        if rule == LRU:
            worth[at] = times[i] * experts + expert
        elif rule == LFU and clock == BY_TOKEN:
            worth[at] = uses[expert] * experts + expert
        elif rule == LFU:
            worth[at] = uses[expert] * len(ids) + i
        elif rule == BELADY:
            worth[at] = expert - later[i] * experts
        elif not hit:
            worth[at] = i
    return hits


def look_ahead(
    first: int, ids: IntArray, times: IntArray, later: IntArray, experts: int, places: IntArray,
    worth: IntArray,
) -> int:  # fmt: skip
    """Let Belady's rule see beyond a token all of whose lookups are to come; return their end.

    What the token has yet to look up goes by its use in a later one, too.
    """
    end = first
    while end < len(ids) and times[end] == times[first]:
        at = places[ids[end]]
        if at != NONE:
            worth[at] = ids[end] - later[end] * experts
        end += 1
    return end


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
