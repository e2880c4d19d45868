"""MoEpic's cache configurator: how many experts each layer caches, and how much of each of them.

arXiv 2509.08342 says what it looks at and how it proceeds; equations are not public, so that those
here are a reconstruction. A layer is given a budget `v`. It may hold the first `theta` of `n`
experts, `n * theta = v`. If tops of h of the g experts guessed are cached, fetching the rest takes

    cost(h) = copy * (g - theta * h)

and is hidden by a window that lasts from the guess to the layer's gate. A step then waits

    max(0, cost(h) - window) + copy * (missed - theta * missed with a cached top)
    less the time in which those tops are computed meanwhile

for its weights, the second part being experts that nobody guessed. How often h of the guesses, and
how many of the missed, have cached tops is counted for every n. That it is counted, and not only
averaged, matters: the split evens out what steps wait, and an average shows none of that.

Of all pairs (n, theta) that one is taken with which most active experts are complete when the
window ends; guesses are copied in their order. Then, from an even division on, one unit (`epsilon`
of the whole budget) goes again and again from the layer that loses least by it to the one that
gains most, until no such move gains anything.

With n tops cached these are taken to be the n experts of the highest priority (`parts.cache.Lcp`).
"""

from typing import NamedTuple

import numpy as np

from moesim.jit import compiled_as
from moesim.types import NONE, WHOLE, FloatArray, IntArray


class Behaviour(NamedTuple):
    """What was seen, layer by layer, counted in steps; ranks are places in a guess."""

    steps: IntArray
    """(layers,)."""
    guessing: IntArray
    """(layers,): steps with a guess."""
    guessed: IntArray
    """(layers,): experts guessed in all of them."""
    right: IntArray
    """(layers, ranks): how often the expert of this rank was active."""
    held: IntArray
    """(layers, experts + 1, ranks + 1): how often, with so many tops cached, so many of the guesses
    were among them."""
    missed: IntArray
    """(layers, experts): how often an active expert that was not guessed had this place in the
    order of priority."""


class Times(NamedTuple):
    """What a token takes, in ns."""

    window: FloatArray
    """(layers,): from the hook that guesses a layer's experts to that layer's gate."""
    copy: FloatArray
    """(layers,): one whole expert over the link."""
    gpu: float
    """One expert on the GPU."""
    rest: float
    """Everything of a token but waiting for weights."""


class Layout(NamedTuple):
    """What each layer caches, and what it waits (layers,)."""

    units: IntArray
    """Got from other layers, less those given."""
    tops: IntArray
    part: IntArray
    """How much of each, of 1024."""
    exposed: FloatArray
    """ns that a token waits for weights."""


def new_behaviour(layers: int, ranks: int, experts: int) -> Behaviour:
    """Return nothing seen."""
    return Behaviour(
        steps=np.zeros(layers, np.int64),
        guessing=np.zeros(layers, np.int64),
        guessed=np.zeros(layers, np.int64),
        right=np.zeros((layers, ranks), np.int64),
        held=np.zeros((layers, experts + 1, ranks + 1), np.int64),
        missed=np.zeros((layers, experts), np.int64),
    )


def forget(seen: Behaviour) -> None:
    """Begin to count anew."""
    seen.steps[:] = 0
    seen.guessing[:] = 0
    seen.guessed[:] = 0
    seen.right[:] = 0
    seen.held[:] = 0
    seen.missed[:] = 0


def place_of(priorities: FloatArray, expert: int) -> int:
    """Return how many experts have a higher priority, or the same and a lower id."""
    place = 0
    for other in range(len(priorities)):
        if priorities[other] > priorities[expert] or (
            priorities[other] == priorities[expert] and other < expert
        ):
            place += 1
    return place


def observe(
    seen: Behaviour, layer: int, guesses: IntArray, n_guesses: int, active: IntArray,
    n_active: int, priorities: FloatArray, named: IntArray,
) -> None:  # fmt: skip
    """Count a step: what was guessed for it, best first, and what was active.

    `priorities` are those before the step; `named` is scratch space (experts,), zero before and
    after.
    """
    experts = len(priorities)
    seen.steps[layer] += 1
    n_guesses = min(n_guesses, seen.right.shape[1])
    if n_guesses > 0:
        seen.guessing[layer] += 1
        seen.guessed[layer] += n_guesses
        for rank in range(n_guesses):
            named[place_of(priorities, guesses[rank])] = 1
        among = 0
        for tops in range(experts + 1):
            seen.held[layer, tops, among] += 1
            if tops < experts:
                among += named[tops]
                named[tops] = 0
    for i in range(n_active):
        named[active[i]] = 1
    for rank in range(n_guesses):
        seen.right[layer, rank] += named[guesses[rank]]
        named[guesses[rank]] = 0
    for i in range(n_active):
        if named[active[i]] == 1:
            seen.missed[layer, place_of(priorities, active[i])] += 1
            named[active[i]] = 0


def observed(ids: IntArray, guesses: IntArray, decay: FloatArray, experts: int) -> Behaviour:
    """Return what `observe` counts, for tokens (tokens, layers, top_k) that follow one another.

    `guesses` is (tokens, layers, ranks), `decay` that of `parts.cache.Lcp`. All layers at once,
    which is faster in Python.
    """
    tokens, layers, _ = ids.shape
    ranks = guesses.shape[2]
    seen = new_behaviour(layers, ranks, experts)
    uses = np.zeros((layers, experts))
    last = np.zeros((layers, experts), np.int64)
    layer = np.arange(layers)[:, np.newaxis]
    tops = np.arange(experts + 1)
    for token in range(tokens):
        priorities = uses * decay[np.minimum(token - last, len(decay) - 1)]
        order = np.argsort(-priorities, axis=1, kind="stable")
        place = np.empty_like(order)
        np.put_along_axis(place, order, np.arange(experts)[np.newaxis], axis=1)
        active = np.zeros((layers, experts + 1), np.int64)
        active[layer, ids[token]] = 1
        active[:, experts] = 0  # where -1, a missing expert, has written

        guess = guesses[token]
        there = guess != NONE
        seen.guessing[:] += there.any(axis=1)
        seen.guessed[:] += there.sum(axis=1)
        seen.right[:] += active[layer, guess] * there
        places = np.where(there, place[layer, guess], experts)
        among = (places[:, :, np.newaxis] < tops).sum(axis=1)
        seen.held[layer, tops, among] += there.any(axis=1)[:, np.newaxis]
        at, rank = np.nonzero(there)
        missed = active.copy()
        missed[at, guess[at, rank]] = 0
        at, expert = np.nonzero(missed)
        seen.missed[at, place[at, expert]] += 1

        at, expert = np.nonzero(active)
        uses[at, expert] += 1
        last[at, expert] = token + 1
    seen.steps[:] = tokens
    return seen


def waiting_ns(
    seen: Behaviour, times: Times, layer: int, late_ns: float, part: int, cached_missed: int
) -> float:
    """Return what a token waits for weights in a layer.

    `late_ns` is what all steps wait for guesses, and `cached_missed` how many of the experts that
    nobody guessed had their tops cached.
    """
    missed = 0
    for place in range(seen.missed.shape[1]):
        missed += seen.missed[layer, place]
    theta = part / WHOLE
    ns = late_ns + (missed - theta * cached_missed) * times.copy[layer]
    waited: float = max(0.0, ns - cached_missed * theta * times.gpu) / max(1, seen.steps[layer])
    return waited


def solve_compiled(seen: Behaviour, times: Times, layer: int, budget: int, layout: Layout) -> float:
    """Do what `solve` does, in loops."""
    ranks, experts = seen.right.shape[1], seen.missed.shape[1]
    guesses = seen.guessed[layer] / max(1, seen.guessing[layer])
    window_ns = times.window[layer]
    cached_missed = 0
    best = -1
    best_late_ns = 0.0
    best_ns = 0.0
    for tops in range(experts + 1):
        if tops > 0:
            cached_missed += seen.missed[layer, tops - 1]
        part = min(WHOLE, budget // tops) if tops > 0 else 0
        if (part == 0) != (budget == 0 and tops == 0):
            continue
        if tops * WHOLE < budget and tops < experts:
            continue
        complete = 0
        late_ns = 0.0
        for among in range(ranks + 1):
            cost_ns = max(0.0, (guesses - part / WHOLE * among) * times.copy[layer])
            in_time = ranks
            if cost_ns > 0:
                in_time = int(min(float(ranks), guesses * window_ns / cost_ns))
            right = 0
            for rank in range(in_time):
                right += seen.right[layer, rank]
            complete += seen.held[layer, tops, among] * right
            late_ns += seen.held[layer, tops, among] * max(0.0, cost_ns - window_ns)
        if complete > best or (complete == best and late_ns < best_late_ns):
            best = complete
            best_late_ns = late_ns
            best_ns = waiting_ns(seen, times, layer, late_ns, part, cached_missed)
            layout.tops[layer] = tops
            layout.part[layer] = part
    return best_ns


@compiled_as(solve_compiled)
def solve(seen: Behaviour, times: Times, layer: int, budget: int, layout: Layout) -> float:
    """Divide a layer's budget, in 1/1024 of an expert, and return what a token then waits there.

    Of all numbers of tops, and the largest part of each that the budget allows, the one with which
    most active experts are complete when the window ends; of equals the one that waits least for
    guesses, then the smallest number. Written to `layout`.
    """
    experts = seen.missed.shape[1]
    tops = np.arange(experts + 1)
    part = np.minimum(WHOLE, budget // np.maximum(tops, 1)) * (tops > 0)
    legal = (part > 0) & ((tops * WHOLE >= budget) | (tops == experts))
    if budget == 0:
        legal = tops == 0
    tops, part = tops[legal], part[legal]
    complete, late_ns = outcomes(seen, times, layer, tops, part)
    best = np.lexsort((tops, late_ns, -complete))[0]
    layout.tops[layer], layout.part[layer] = tops[best], part[best]
    cached_missed = int(seen.missed[layer, : tops[best]].sum())
    return waiting_ns(seen, times, layer, float(late_ns[best]), int(part[best]), cached_missed)


def outcomes(
    seen: Behaviour, times: Times, layer: int, tops: IntArray, part: IntArray
) -> tuple[IntArray, FloatArray]:
    """Return, for layouts (n,), how many active experts are complete in time, and what all steps
    wait for guesses.
    """
    ranks = seen.right.shape[1]
    guesses = seen.guessed[layer] / max(1, seen.guessing[layer])
    window_ns = times.window[layer]
    among = np.arange(ranks + 1)
    held = seen.held[layer, tops]
    theta = (part / WHOLE)[:, np.newaxis]
    cost_ns = np.maximum(0.0, (guesses - theta * among) * times.copy[layer])
    with np.errstate(divide="ignore", invalid="ignore"):
        fit = np.where(cost_ns > 0, guesses * window_ns / cost_ns, ranks)
    right = np.append(0, np.cumsum(seen.right[layer]))
    complete = (held * right[np.minimum(ranks, fit).astype(np.int64)]).sum(axis=1)
    # One after the other, as loops add up: the last bits must be the same.
    late_ns = np.cumsum(held * np.maximum(0.0, cost_ns - window_ns), axis=1)[:, -1]
    return complete, late_ns


class Moves(NamedTuple):
    """How the configurator came to its layout."""

    giver: IntArray
    taker: IntArray
    total_ns: FloatArray
    """What a token waits for weights in all layers: at the start, and after each move."""


MOST_MOVES = 2_000


def new_moves() -> Moves:
    """Return room for moves."""
    return Moves(
        np.zeros(MOST_MOVES, np.int64), np.zeros(MOST_MOVES, np.int64), np.zeros(MOST_MOVES + 1)
    )


LESS, HERE, MORE = range(3)


def try_layer(
    seen: Behaviour, times: Times, layer: int, even_bytes: int, unit_bytes: int,
    expert_bytes: IntArray, layout: Layout, trial: FloatArray,
) -> None:  # fmt: skip
    """Find what a token waits in a layer, with one unit less, as it is, and with one more."""
    for change in (LESS, MORE, HERE):  # the last one stays in the layout
        budget_bytes = even_bytes + (layout.units[layer] + change - HERE) * unit_bytes
        if budget_bytes >= 0:
            budget = budget_bytes * WHOLE // expert_bytes[layer]
            trial[change, layer] = solve(seen, times, layer, budget, layout)
    layout.exposed[layer] = trial[HERE, layer]


def configure(
    seen: Behaviour, times: Times, even_bytes: int, unit_bytes: int, expert_bytes: IntArray,
    layout: Layout, moves: Moves, trial: FloatArray,
) -> int:  # fmt: skip
    """Divide a budget, `even_bytes` for each layer, fill in `layout`, and return the moves made.

    `expert_bytes` is (layers,); `trial` (3, layers) is scratch space. A layer that was never seen
    waits for nothing, and gives what it has. There are at most as many moves as `moves` has room
    for.
    """
    layers = len(layout.units)
    for layer in range(layers):
        layout.units[layer] = 0
        try_layer(seen, times, layer, even_bytes, unit_bytes, expert_bytes, layout, trial)
    made = 0
    while True:
        total_ns = 0.0
        for layer in range(layers):
            total_ns += layout.exposed[layer]
        moves.total_ns[made] = total_ns
        if made == len(moves.giver):
            return made
        taker = NONE
        giver = NONE
        most_ns = 0.0
        for gaining in range(layers):
            gain_ns = trial[HERE, gaining] - trial[MORE, gaining]
            if gain_ns > most_ns:
                for losing in range(layers):
                    left_bytes = even_bytes + (layout.units[losing] - 1) * unit_bytes
                    if losing != gaining and left_bytes >= 0:
                        ns = gain_ns - (trial[LESS, losing] - trial[HERE, losing])
                        if ns > most_ns:
                            most_ns = ns
                            taker = gaining
                            giver = losing
        if taker == NONE:
            return made
        moves.giver[made] = giver
        moves.taker[made] = taker
        made += 1
        layout.units[giver] -= 1
        layout.units[taker] += 1
        try_layer(seen, times, giver, even_bytes, unit_bytes, expert_bytes, layout, trial)
        try_layer(seen, times, taker, even_bytes, unit_bytes, expert_bytes, layout, trial)
