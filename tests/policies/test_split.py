"""MoEpic's configurator: its parts by hand, and twice computed."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.policies.parts.cache import lcp_count, lcp_priority, new_lcp
from moesim.policies.parts.split import (
    Behaviour,
    Layout,
    Times,
    configure,
    forget,
    new_behaviour,
    new_moves,
    observe,
    observed,
    solve,
    solve_compiled,
)
from moesim.types import NONE, WHOLE


def new_layout(layers: int) -> Layout:
    units, tops, part = np.zeros((3, layers), np.int64)
    return Layout(units, tops, part, np.zeros(layers))


def times(layers: int, window: float, copy: float, gpu: float = 0.0) -> Times:
    return Times(np.full(layers, window), np.full(layers, copy), gpu, 0.0)


def binomial(ranks: int, experts: int) -> Behaviour:
    """Every guess is right; each of 4 is among n of N cached with n / N, for itself (x 60^4)."""
    seen = new_behaviour(1, ranks, experts)
    shares = np.arange(experts + 1)
    ways = [1, 4, 6, 4, 1]
    for among in range(ranks + 1):
        held = shares**among * (experts - shares) ** (ranks - among)
        seen.held[0, :, among] = ways[among] * held
    steps = experts**ranks
    seen.steps[0] = seen.guessing[0] = steps
    seen.guessed[0] = ranks * steps
    seen.right[0] = steps
    return seen


# One layer.


def test_a_window_of_2_4_copies_makes_0_4_the_best_ratio() -> None:
    """4 (1 - 0.4) = 2.4: with the tops of all 60 cached all four guesses come in time, always."""
    layout = new_layout(1)
    assert solve(binomial(4, 60), times(1, 2.4, 1.0), 0, 60 * 410, layout) == 0
    assert (layout.tops[0], layout.part[0]) == (60, 410)


def test_without_a_window_the_ratio_is_whole() -> None:
    """n theta = 24 of 60: 4 (1 - 24 / 60) copies whatever theta is; of equals the fewest tops."""
    layout = new_layout(1)
    waits = solve(binomial(4, 60), times(1, 0.0, 1.0), 0, 24 * WHOLE, layout)
    assert (layout.tops[0], layout.part[0]) == (24, WHOLE)
    assert waits == pytest.approx(4 * (1 - 24 / 60))


def test_what_is_waited_for_is_late_guesses_and_misses_less_the_tops() -> None:
    """10 steps with 2 guesses each; the one expert that is cached is among them in 4, half of it.

    A copy is 10, the window 12: 6 x (20 - 12) + 4 x (15 - 12) = 60 late. Nobody guessed 6 experts,
    2 of them with tops: 10 x (6 - 0.5 x 2) = 50, during which 2 x 0.5 x 2 is computed.
    """
    seen = new_behaviour(1, 2, 3)
    seen.steps[0] = seen.guessing[0] = 10
    seen.guessed[0] = 20
    seen.right[0] = 8, 1
    seen.held[0, 1] = 6, 4, 0
    seen.missed[0] = 2, 4, 0
    layout = new_layout(1)
    waits = solve(seen, times(1, 12.0, 10.0, 2.0), 0, 512, layout)
    assert (layout.tops[0], layout.part[0]) == (1, 512)
    assert waits == pytest.approx((60 + 50 - 2) / 10)


@st.composite
def behaviours(draw: st.DrawFn) -> Behaviour:
    """Draw what might be seen: whatever `observe` counts of random guesses and choices."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    layers, experts, steps = (draw(st.integers(1, most)) for most in (4, 7, 9))
    ranks = min(draw(st.integers(1, 3)), experts)
    seen = new_behaviour(layers, ranks, experts)
    for layer, _ in np.ndindex(layers, steps):
        guesses, active = rng.permutation(experts), rng.permutation(experts)
        observe(
            seen, layer, guesses, int(rng.integers(0, ranks + 1)), active,
            int(rng.integers(1, ranks + 1)), rng.integers(0, 4, experts).astype(float),
            np.zeros(experts, np.int64),
        )  # fmt: skip
    return seen


@given(
    seen=behaviours(), budget=st.integers(0, 9 * WHOLE),
    window=st.floats(0, 9), copy=st.floats(0.1, 3),
)  # fmt: skip
@settings(max_examples=300)
def test_loops_and_arrays_find_the_same(
    seen: Behaviour, budget: int, window: float, copy: float
) -> None:
    """To the last bit; and what they find fits the budget."""
    layers, experts = seen.missed.shape
    for layer in range(layers):
        found: list[Any] = []
        for way in (solve, solve_compiled):
            layout = new_layout(layers)
            ns = way(seen, times(layers, window, copy, 0.1), layer, budget, layout)
            found.append((layout.tops[layer], layout.part[layer], ns))
        assert found[0] == found[1]
        tops, part, ns = found[0]
        assert tops * part <= budget
        assert 0 <= tops <= experts
        assert (part > 0) == (tops > 0) == (budget > 0)
        assert ns >= 0


def slowly(seen: Behaviour, window: float, budget: int) -> list[tuple[int, float, int]]:
    """Return (-experts complete, lateness, tops) of all legal pairs, step by step; a copy is 1."""
    ranks, experts = seen.right.shape[1], seen.missed.shape[1]
    mean = seen.guessed[0] / max(1, seen.guessing[0])
    found = []
    for tops in range(1, experts + 1):
        theta = min(WHOLE, budget // tops) / WHOLE
        if theta > 0 and (tops * WHOLE >= budget or tops == experts):
            complete, late = 0, 0.0
            for among, times_seen in enumerate(seen.held[0, tops]):
                cost = max(0, mean - theta * among)
                fits = [m for m in range(ranks + 1) if m * cost <= mean * window]
                complete += times_seen * seen.right[0, : max(fits)].sum()
                late += times_seen * max(0.0, cost - window)
            found.append((-int(complete), round(late, 6), tops))
    return found


@given(seen=behaviours(), budget=st.integers(1, 8 * WHOLE), window=st.integers(0, 9))
@settings(max_examples=200)
def test_no_other_pair_completes_more(seen: Behaviour, budget: int, window: int) -> None:
    layout = new_layout(len(seen.steps))
    limit = window / 3 + 1e-7  # no cost is that near to it
    solve(seen, times(len(seen.steps), limit, 1.0), 0, budget, layout)
    found = slowly(seen, limit, budget)
    mine = next(pair for pair in found if pair[2] == layout.tops[0])
    assert mine[:2] == min(found)[:2]


# All layers.


def configured(
    seen: Behaviour, window: float, even: int, unit: int
) -> tuple[Layout, list[tuple[int, int]], list[float]]:
    layers = len(seen.steps)
    layout, moves = new_layout(layers), new_moves()
    made = configure(
        seen, times(layers, window, 1.0), even, unit, np.full(layers, WHOLE), layout, moves,
        np.zeros((3, layers)),
    )  # fmt: skip
    pairs = list(zip(moves.giver[:made].tolist(), moves.taker[:made].tolist(), strict=True))
    return layout, pairs, moves.total_ns[: made + 1].tolist()


@given(
    seen=behaviours(), window=st.integers(0, 6), even=st.integers(0, 5000), unit=st.integers(1, 900)
)
@settings(max_examples=150)
def test_every_move_gains_and_none_is_left(
    seen: Behaviour, window: int, even: int, unit: int
) -> None:
    """The whole budget stays in use, the total falls with each move, and no other move would."""
    layers = len(seen.steps)
    layout, moves, totals = configured(seen, window / 2, even, unit)
    assert layout.units.sum() == 0
    assert (even + layout.units * unit >= 0).all()
    assert (layout.tops * layout.part <= even + layout.units * unit).all()
    if not moves:
        assert not layout.units.any()
    assert all(after < before + 1e-12 for before, after in pairwise(totals))
    assert totals[-1] == pytest.approx(layout.exposed.sum())

    def waits(layer: int, held: Any) -> float:
        given_times = times(layers, window / 2, 1.0)
        return solve(seen, given_times, layer, even + held * unit, new_layout(layers))

    here = [waits(layer, layout.units[layer]) for layer in range(layers)]
    for taker, giver in np.ndindex(layers, layers):
        if taker != giver and even + (layout.units[giver] - 1) * unit >= 0:
            gain = here[taker] - waits(taker, layout.units[taker] + 1)
            loss = waits(giver, layout.units[giver] - 1) - here[giver]
            assert gain <= loss + 1e-9


def test_budget_goes_from_where_nothing_is_gained_to_where_misses_are() -> None:
    """Layer 0 has no guesses and no misses; layer 1 misses its two first experts in each step."""
    seen = new_behaviour(2, 1, 4)
    seen.steps[:] = 10
    seen.missed[1] = 10, 10, 0, 0
    layout, pairs, totals = configured(seen, 0.0, WHOLE, WHOLE // 2)
    assert pairs == [(0, 1), (0, 1)]
    assert layout.units.tolist() == [-2, 2]
    assert (layout.tops[1], layout.part[1]) == (2, WHOLE)
    assert totals == [1.0, 0.5, 0.0]


def test_no_layer_gives_more_than_it_has() -> None:
    """Each has less than a unit: nothing moves, and all of an uneven budget stays in use."""
    seen = new_behaviour(2, 1, 4)
    seen.steps[:] = 10
    seen.missed[1] = 10, 10, 0, 0
    layout, pairs, _ = configured(seen, 0.0, 700, 701)
    assert pairs == []
    assert (layout.tops * layout.part).tolist() == [700, 700]


def test_larger_experts_get_less_of_the_same_bytes() -> None:
    """Layers of 1000 and 4000 bytes an expert, 2000 each: both need two experts all the time.

    A unit of 1000 bytes brings layer 0, which has all it needs, nothing, and layer 1 a quarter.
    """
    seen = new_behaviour(2, 1, 4)
    seen.steps[:] = 10
    seen.missed[:, :2] = 10
    layout, moves = new_layout(2), new_moves()
    configure(
        seen, times(2, 0.0, 1.0), 2000, 1000, np.array([1000, 4000]), layout, moves,
        np.zeros((3, 2)),
    )  # fmt: skip
    assert layout.tops.tolist() == [2, 1]
    assert layout.part.tolist() == [WHOLE, WHOLE // 2]
    assert layout.exposed.tolist() == [0.0, 1.5]


# What is seen.


def test_a_step_is_counted_by_the_places_of_its_guesses() -> None:
    """Priorities put 2 first, then 0, 3 and 1. Guessed are 3 and 2, active are 2 and 1."""
    seen = new_behaviour(1, 2, 4)
    priorities = np.array([5.0, 0.0, 7.0, 5.0])
    scratch = np.zeros(4, np.int64)
    observe(seen, 0, np.array([3, 2]), 2, np.array([2, 1]), 2, priorities, scratch)
    assert (seen.steps[0], seen.guessing[0], seen.guessed[0]) == (1, 1, 2)
    assert seen.right[0].tolist() == [0, 1]
    # none is cached | 2 | 2 and 0 | 2, 0 and 3 | all
    assert seen.held[0].argmax(axis=1).tolist() == [0, 1, 1, 2, 2]
    assert seen.held[0].sum(axis=1).tolist() == [1] * 5
    assert seen.missed[0].tolist() == [0, 0, 0, 1]
    assert not scratch.any()


@given(seen=behaviours())
@settings(max_examples=20)
def test_nothing_is_left_of_what_is_forgotten(seen: Behaviour) -> None:
    forget(seen)
    assert not any(field.any() for field in seen)


@given(seed=st.integers(0, 1 << 30), experts=st.integers(1, 6), ranks=st.integers(1, 3))
@settings(max_examples=60)
def test_counting_by_layer_and_by_array_is_the_same(seed: int, experts: int, ranks: int) -> None:
    rng = np.random.default_rng(seed)
    tokens, layers, top_k = 12, 2, min(2, experts)
    ids = np.array(
        [[rng.permutation(experts)[:top_k] for _ in range(layers)] for _ in range(tokens)]
    )
    ids[rng.random(ids.shape) < 0.1] = NONE
    ranks = min(ranks, experts)
    guesses = np.array(
        [[rng.permutation(experts)[:ranks] for _ in range(layers)] for _ in range(tokens)]
    )
    guesses[rng.random((tokens, layers)) < 0.2] = NONE

    lcp, slow = new_lcp(layers, experts), new_behaviour(layers, ranks, experts)
    for token, layer in np.ndindex(tokens, layers):
        priorities = np.array([lcp_priority(lcp, layer, e) for e in range(experts)])
        active = ids[token, layer][ids[token, layer] != NONE]
        made = guesses[token, layer][guesses[token, layer] != NONE]
        observe(
            slow, layer, made, len(made), active, len(active), priorities,
            np.zeros(experts, np.int64),
        )  # fmt: skip
        lcp_count(lcp, layer, ids[token, layer][np.newaxis], 1, 0)

    fast = observed(ids, guesses, lcp.decay, experts)
    for name, expected, found in zip(Behaviour._fields, slow, fast, strict=True):
        assert (expected == found).all(), name
