import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim.policies.testing as lab
from moesim.policies.api import CACHE, COMMANDS, STAGING, Setting
from moesim.policies.registry import choose
from moesim.sim.replay import Replayed
from moesim.types import COPY_IN, NONE, WHOLE

MakeSetting = Callable[..., Setting]
MakeDesk = Callable[[Setting], Any]

ORDINARY = {"attention": 100, "gate": 10, "gpu": 40, "cpu": 70, "combine": 5, "head": 7}


class TestMixtralOffloading(lab.PolicyConformance):
    policy = "mixtral-offloading"


class TestMixtralOffloadingWithAnOracle(lab.PolicyConformance):
    policy = "mixtral-offloading:cached=1,speculative=3,predictor=oracle"


class TestMixtralOffloadingAsReleased(lab.PolicyConformance):
    policy = "mixtral-offloading:speculative=0"


# What is where.


@pytest.mark.parametrize(
    ("slots", "spec", "capacity", "staging"),
    [
        (2 * 4 + 2, "", [4, 4], 2),  # 16 GB: four of eight experts
        (2 * 4 + 2, ":cached=2", [2, 2], 2),  # 12 GB: two
        (9, "", [4, 3], 2),
        (9, ":speculative=0", [5, 4], 0),
        (9, ":speculative=1", [4, 4], 1),
        (3, "", [1, 0], 2),
        (2, ":speculative=0", [1, 1], 0),
        (1, ":speculative=0", [0, 0], 1),
        (1, "", [0, 0], 1),
        (99, "", [8, 8], 2),
        (99, ":cached=9", [8, 8], 2),
    ],
)
def test_each_layer_begins_with_its_first_experts(
    make_setting: MakeSetting, slots: int, spec: str, capacity: list[int], staging: int
) -> None:
    setting = make_setting(slots)
    placement = choose("mixtral-offloading" + spec).make(setting).place(setting)
    assert placement.cache_slots.tolist() == capacity
    assert placement.staging_slots == staging
    inside = [np.flatnonzero(layer).tolist() for layer in placement.cached]
    assert inside == [list(range(n)) for n in capacity]
    assert len(placement.predictions) == (0 if "speculative=0" in spec else 1)


# What is ordered.


def orders(desk: Any) -> list[tuple[Any, ...]]:
    """Return the plan as (command, expert); `load` is an urgent fetch into the cache."""
    read: list[tuple[Any, ...]] = []
    for code, layer, expert, a, b, c, d, e in desk.take():
        name = COMMANDS[code]
        if name == "fetch":
            assert (a, b, e) == (WHOLE, NONE, 0)
            assert (c, d) in ((CACHE, 1), (STAGING, 0))
            read.append(("load", expert) if c == CACHE else ("guess", layer, expert))
        else:
            read.append((name.removeprefix("run_on_"), expert))
    return read


@pytest.fixture
def desk(make_desk: MakeDesk, make_setting: MakeSetting) -> Any:
    return make_desk(make_setting(6))


@pytest.fixture
def ask(desk: Any, make_setting: MakeSetting) -> Callable[..., list[tuple[Any, ...]]]:
    """Return a function that dispatches in a layer; 0 and 1 are cached in each of two."""
    policy: Any = choose("mixtral-offloading").make(make_setting(6))
    desk.view.cached[:, :2] = WHOLE

    def dispatch(*experts: int, layer: int = 0) -> list[tuple[Any, ...]]:
        policy.dispatch(desk.routed(dict.fromkeys(experts, 1), layer=layer), desk.plan)
        return orders(desk)

    return dispatch


def test_cached_experts_run_before_loads_and_the_oldest_leaves(ask: Any, desk: Any) -> None:
    """0 is the oldest, but was just used; then 1 is."""
    assert ask(5, 0) == [("gpu", 0), ("evict", 1), ("load", 5), ("gpu", 5)]
    desk.view.cached[0] = [WHOLE, 0, 0, 0, 0, WHOLE, 0, 0]
    assert ask(6, 7) == [
        ("evict", 0), ("load", 6), ("gpu", 6), ("evict", 5), ("load", 7), ("gpu", 7),
    ]  # fmt: skip


def test_a_step_may_evict_what_it_has_just_used(ask: Any) -> None:
    """Three loads and two slots: 0 ran, 1 leaves, then 0, then the first of the three."""
    assert ask(0, 5, 6, 7) == [
        ("gpu", 0), ("evict", 1), ("load", 5), ("gpu", 5), ("evict", 0), ("load", 6), ("gpu", 6),
        ("evict", 5), ("load", 7), ("gpu", 7),
    ]  # fmt: skip


def test_a_guess_that_is_used_takes_the_oldest_one_s_place(ask: Any, desk: Any) -> None:
    """4 is in a buffer, 5 is not; what arrived early runs first."""
    desk.view.staged[0, 4] = WHOLE
    assert ask(5, 4, 1) == [
        ("gpu", 1), ("evict", 0), ("admit", 4), ("gpu", 4), ("evict", 1), ("load", 5), ("gpu", 5),
    ]  # fmt: skip


def test_a_guess_that_is_not_used_displaces_nothing(ask: Any, desk: Any) -> None:
    desk.view.staged[0, 4] = WHOLE
    assert ask(1, 0) == [("gpu", 1), ("gpu", 0)]


def test_the_two_likeliest_are_loaded_unless_cached(ask: Any, desk: Any) -> None:
    desk.guessed((6, 3))
    assert ask(0) == [("gpu", 0), ("guess", 1, 6), ("guess", 1, 3)]
    desk.guessed((1, 3))
    assert ask(0) == [("gpu", 0), ("guess", 1, 3)]
    # Of three tokens two are guessed to choose 7, and 5 is the better of the other guesses.
    desk.guessed((5, 7), (4, 3), (2, 7))
    assert ask(0) == [("gpu", 0), ("guess", 1, 7), ("guess", 1, 5)]
    assert ask(0, layer=1) == [("gpu", 0)]


# Against caches written anew.


def reference(choices: Any, capacity: int, experts: int) -> list[tuple[int, int, int]]:
    """Return the copies (step, layer, expert) of one token at a time without guesses."""
    layers = len(choices[0])
    caches = [OrderedDict.fromkeys(range(min(capacity, experts))) for _ in range(layers)]
    copies = []
    for step, token in enumerate(choices):
        for layer, chosen in enumerate(token):
            cache = caches[layer]
            missing = [expert for expert in chosen if expert not in cache]
            for expert in chosen:
                if expert in cache:
                    cache.move_to_end(expert)
            for expert in missing:
                cache.popitem(last=False)
                cache[expert] = None
                copies.append((step, layer, expert))
    return copies


def copies_of(done: Replayed) -> list[tuple[int, int, int]]:
    assert done.log is not None
    rows = done.log.operations
    rows = rows[rows["kind"] == COPY_IN]
    return [tuple(row) for row in rows[["step", "layer", "expert"]].tolist()]


@given(capacity=st.integers(1, 5), top_k=st.integers(1, 4), seed=st.integers(0, 999))
@settings(max_examples=40)
def test_loads_are_those_of_an_lru_cache_that_marks_all_active_ones_first(
    capacity: int, top_k: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    choices = np.array([[rng.permutation(5)[:top_k] for _ in range(3)] for _ in range(10)])
    done = lab.run(
        choose("mixtral-offloading:speculative=0"), choices,
        lab.make_costs(3, **ORDINARY, copy_ns_per_kib=64), experts=5, slots=3 * capacity,
    )  # fmt: skip
    assert copies_of(done) == reference(choices.tolist(), capacity, 5)


@pytest.mark.skipif(sys.platform != "linux", reason="libcachesim is for Linux")
@pytest.mark.parametrize("capacity", [1, 2, 4, 7])
def test_with_one_expert_per_token_misses_are_libcachesim_s(capacity: int) -> None:
    """Marking all active experts first makes no difference then; it begins with the first ones."""
    import libcachesim

    rng = np.random.default_rng(capacity)
    accesses = (rng.integers(0, 8, 300) * rng.integers(0, 2, 300)).tolist()
    done = lab.run(
        choose("mixtral-offloading:speculative=0"), [[[e]] for e in accesses],
        lab.make_costs(1, **ORDINARY), experts=8, slots=capacity,
    )  # fmt: skip
    cache = libcachesim.LRU(cache_size=capacity)
    hits = [
        bool(cache.get(libcachesim.Request(obj_id=e, obj_size=1)))
        for e in [*range(capacity), *accesses]
    ]
    expected = [(at, 0, e) for at, e in enumerate(accesses) if not hits[capacity + at]]
    assert copies_of(done) == expected


# What it takes.


def timed(predictor: str, choices: Any) -> Replayed:
    """Return a run of two layers with two cached experts each, a buffer, copies of 125."""
    costs = lab.make_costs(2, **ORDINARY, copy_ns_per_kib=125)
    return lab.run(
        choose(f"mixtral-offloading:speculative=1,predictor={predictor}"), choices, costs, slots=5
    )


def test_a_right_guess_hides_its_copy_behind_the_next_attention() -> None:
    """The guess takes 10, then come expert 0 (40), COMBINE (5), attention (100) and gate (10).

    The copy of 125 begins with the first of them, and is over before the last, of 155 in all.
    """
    done = timed("oracle", [[[0], [3]]])
    asked = 100 + 10 + 10
    assert lab.spans(done, "copy_in") == [("h2d", "copy_in", 1, 3, asked, asked + 125)]
    gate = asked + 40 + 5 + 100 + 10
    assert lab.spans(done, "expert_gpu")[1] == ("gpu", "expert_gpu", 1, 3, gate, gate + 40)
    assert lab.makespan_ns(done) == gate + 40 + 5 + 7
    counts = done.prepared.host.counts.sum(axis=0)
    assert counts[0, :, 0].tolist() == [
        1,
        1,
        0,
        0,
        0,
    ]  # resident, arrived


def test_without_a_guess_the_copy_is_waited_for() -> None:
    done = timed("previous", [[[0], [3]]])
    known = (100 + 10 + 10 + 40 + 5) + 100 + 10
    assert lab.spans(done, "copy_in") == [("h2d", "copy_in", 1, 3, known, known + 125)]
    assert lab.makespan_ns(done) == known + 125 + 40 + 5 + 7


def test_a_used_guess_stays() -> None:
    """The oracle has 3 loaded for the first token; the second finds it cached."""
    done = timed("oracle", [[[0], [3]], [[0], [3]]])
    assert copies_of(done) == [(0, 1, 3)]
    counts = done.prepared.host.counts.sum(axis=0)
    assert counts[1, :, 0].tolist() == [2, 0, 0, 0, 0]


def test_a_guess_that_is_not_used_leaves() -> None:
    """One place per layer. 3 is the most popular of layer 1 so far, from the second token on.

    2 is loaded in its stead for the fourth token; for each later one 3 is guessed, copied and not
    used, and 2 stays.
    """
    choices = [[[0], [e]] for e in (3, 3, 3, 2, 2, 2)]
    costs = lab.make_costs(2, **ORDINARY, copy_ns_per_kib=125)
    done = lab.run(
        choose("mixtral-offloading:cached=1,speculative=1,predictor=popularity"), choices, costs,
        slots=3,
    )  # fmt: skip
    assert copies_of(done) == [(0, 1, 3), (3, 1, 2), (4, 1, 3), (5, 1, 3)]
