from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim.policies.testing as lab
from moesim.errors import InputError
from moesim.policies.adapmoe import (
    MIXTRAL_ACCURACY,
    UNIT,
    accuracy_of,
    best_split,
    expected_loads,
)
from moesim.policies.api import CACHE, COMMANDS, STAGING, Offline, Prediction, Setting
from moesim.policies.api import even_split as even
from moesim.policies.registry import choose
from moesim.sim.replay import Replayed
from moesim.traces.format import Trace
from moesim.types import COPY_IN, NONE, PREFILL, WHOLE

MakeSetting = Callable[..., Setting]
MakeDesk = Callable[[Setting], Any]

ORDINARY = {"attention": 100, "gate": 10, "gpu": 40, "cpu": 70, "combine": 5, "head": 7}


class TestAdapMoe(lab.PolicyConformance):
    policy = "adapmoe"


class TestAdapMoeFarAhead(lab.PolicyConformance):
    policy = "adapmoe:ahead=3,predictor=oracle"


class TestAdapMoeWithoutLoadsAhead(lab.PolicyConformance):
    policy = "adapmoe:ahead=0,split=even"


# What a layer is expected to load.


def loads_of(experts: int, top_k: int, *accuracy: float) -> Any:
    return expected_loads(experts, top_k, np.array(accuracy)) / UNIT


@pytest.mark.parametrize("b", [0.0, *MIXTRAL_ACCURACY[1:4], 1.0])
def test_for_mixtral_it_is_the_published_formula(b: float) -> None:
    found = loads_of(8, 2, b)[0]
    single = loads_of(8, 1, b)[0]
    for t in range(9):
        u = max(0, (8 - t) * (7 - t) / 56)
        expected = 2 * u * (1 - b) + u * b + 2 * (8 - t) * t / 56 * (1 - b)
        assert found[t] == pytest.approx(expected, abs=1e-9)
        assert single[t] == pytest.approx((1 - t / 8) * (1 - b), abs=1e-9)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1), (5, 2), (6, 3), (4, 4)])
def test_it_is_the_mean_over_all_choices(experts: int, top_k: int) -> None:
    """One of the experts missing, if any is, has been loaded ahead with probability 1/4."""
    found = loads_of(experts, top_k, 0.25)[0]
    for size in range(experts + 1):
        missing = [sum(e >= size for e in c) for c in combinations(range(experts), top_k)]
        mean = sum(m - Fraction(1, 4) * (m > 0) for m in missing) / len(missing)
        assert found[size] == pytest.approx(float(mean), abs=1e-9)


# Whom it gives places.


def test_a_split_by_hand() -> None:
    """4 experts, top-2: a place is worth 1/2 without guesses; with perfect ones 1/2, 1/3, 1/6, 0.

    Of 4 places the last layer gets one rather than the first layer its fourth: both are worth 1/2,
    and the last layer, which chooses first, has at least one.
    """
    loads = expected_loads(4, 2, np.array([0.0, 1.0]))
    assert (loads / UNIT).round(9).tolist() == [
        [2, 1.5, 1, 0.5, 0], [1, 0.5, round(1 / 6, 9), 0, 0],
    ]  # fmt: skip
    splits = [best_split(loads, slots).tolist() for slots in range(10)]
    assert splits == [
        [0, 0], [0, 1], [1, 1], [2, 1], [3, 1], [4, 1], [4, 2], [4, 3], [4, 3], [4, 3],
    ]  # fmt: skip


def test_with_one_expert_per_token_the_least_predictable_layer_is_filled_first() -> None:
    loads = expected_loads(3, 1, np.array([0.5, 0.2, 0.9]))
    assert best_split(loads, 4).tolist() == [1, 3, 0]


rates = st.lists(st.sampled_from((0.0, 0.3, 0.57, 0.85, 0.9, 1.0)), min_size=1, max_size=4)
shapes = st.integers(1, 6).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, min(3, e))))


def total(loads: Any, split: Any) -> int:
    return sum(int(loads[layer, size]) for layer, size in enumerate(split))


@given(shape=shapes, accuracy=rates, slots=st.integers(0, 26))
@settings(max_examples=150)
def test_no_split_has_less(shape: tuple[int, int], accuracy: list[float], slots: int) -> None:
    experts, top_k = shape
    layers = len(accuracy)
    loads = expected_loads(experts, top_k, np.array(accuracy))
    found = best_split(loads, slots)
    all_splits = [s for s in product(range(experts + 1), repeat=layers) if sum(s) <= slots]
    assert sum(found) <= slots
    assert found.max() <= experts
    assert total(loads, found) == min(total(loads, split) for split in all_splits)
    if top_k > 1 and slots >= layers:
        assert found.min() >= 1
    uniform = np.minimum(even(slots, layers), experts)
    assert total(loads, found) <= total(loads, uniform)


@given(
    experts=st.integers(1, 40), top_k=st.integers(1, 8),
    accuracy=st.lists(st.floats(0, 1), min_size=1, max_size=12), share=st.floats(0, 1),
)  # fmt: skip
@settings(max_examples=60)
def test_each_place_goes_where_it_is_worth_most(
    experts: int, top_k: int, accuracy: list[float], share: float
) -> None:
    """Places are worth less and less, so that handing them out one by one does as well."""
    loads = expected_loads(experts, min(top_k, experts), np.array(accuracy))
    worth = loads[:, :-1] - loads[:, 1:]
    assert (np.diff(worth, axis=1) <= 0).all()
    assert (worth >= 0).all()
    slots = round(share * worth.size)
    best = loads[:, 0].sum() - np.sort(worth, axis=None)[::-1][:slots].sum()
    assert total(loads, best_split(loads, slots)) == best


@pytest.mark.parametrize("slots", [1, 20, 32, 64, 100, 128, 200, 256])
def test_for_mixtral_it_is_worth_what_the_published_recursion_finds(slots: int) -> None:
    """That gives each layer at least one place as long as there are any."""
    f = loads_of(8, 2, *MIXTRAL_ACCURACY)

    @cache
    def dp(i: int, j: int) -> float:
        if i == 0:
            return 0.0
        if j == 0:
            return float(dp(i - 1, 0) + f[i - 1, 0])
        return min(float(dp(i - 1, j - k) + f[i - 1, min(k, 8)]) for k in range(1, j + 1))

    loads = expected_loads(8, 2, np.array(MIXTRAL_ACCURACY))
    found = best_split(loads, slots)
    assert total(loads, found) / UNIT == pytest.approx(dp(32, slots), abs=1e-9)
    if slots < 32:
        assert found.tolist() == [0] * (32 - slots) + [1] * slots
    if 64 <= slots < 256:
        # Without guesses all of the first layer's places are worth as much as anyone's first.
        assert found[0] == 8
        assert found[1] == found.tolist()[1:][0] >= found[17]  # .566 against .939


# How good guesses are.


def offline(ids: Any, guesses: Any) -> Callable[..., Offline]:
    def observed(prediction: Prediction | None = None) -> Offline:
        assert prediction is not None
        return Offline(np.array(ids), np.zeros(len(ids), np.int64), np.array(guesses))

    return observed


def test_accuracy_is_the_share_of_the_chosen_that_are_named(make_setting: MakeSetting) -> None:
    """Layer 1: 1 of 2, 0 of 2, and 1 of the one that was recorded. Layer 0 has no guess at all."""
    ids = [[[0, 1], [2, 3]], [[0, 1], [4, 5]], [[0, 1], [6, NONE]]]
    guesses = [
        [[0, 1, 2], [3, 7, 2]],  # the third guess does not count
        [[0, 1, 2], [NONE, NONE, NONE]],
        [[0, 1, 2], [NONE, 6, NONE]],
    ]
    setting = make_setting(9)._replace(offline=offline(ids, guesses))
    found, notice = accuracy_of(setting, "measured", Prediction("auto"))
    assert found.tolist() == [0, 2 / 5]
    assert notice == ""
    placement = choose("adapmoe").make(setting).place(setting)
    assert placement.cache_slots.tolist() == [7, 1]
    assert placement.notices == ()


def test_without_an_observation_mixtral_has_the_published_list(make_setting: MakeSetting) -> None:
    setting = make_setting(65, layers=32)
    policy: Any = choose("adapmoe").make(setting)
    assert policy.accuracy.tolist() == list(MIXTRAL_ACCURACY)
    assert "nothing is left of it: the released code's" in policy.place(setting).notices[0]
    asked: Any = choose("adapmoe:accuracy=mixtral").make(setting)
    assert asked.place(setting).notices == ()
    assert (asked.cache.capacity == policy.cache.capacity).all()
    assert policy.cache.capacity.sum() == 64


@pytest.mark.parametrize("seen", [False, True])
def test_otherwise_caches_are_of_equal_size(make_setting: MakeSetting, seen: bool) -> None:
    setting = make_setting(8)
    if seen:
        ids, wrong = [[[0, 1], [2, 3]]], [[[0, 1], [0, 1]]]
        setting = setting._replace(offline=offline(ids, wrong))
    placement = choose("adapmoe").make(setting).place(setting)
    assert placement.cache_slots.tolist() == [4, 3]
    why = "no guess was right" if seen else "nothing is left"
    assert why in placement.notices[0]
    assert placement.notices[0].endswith("the caches are of equal size")


@pytest.mark.parametrize("spec", ["adapmoe:split=even", "adapmoe:ahead=0"])
def test_an_even_split_needs_no_accuracy(make_setting: MakeSetting, spec: str) -> None:
    """Nor is there anything to choose if nothing is loaded ahead: any place is worth k / N."""
    setting = make_setting(8)._replace(offline=offline([[[0, 1], [2, 3]]], [[[0, 1], [2, 3]]]))
    placement = choose(spec).make(setting).place(setting)
    assert placement.cache_slots.tolist() == [4, 3]
    assert placement.notices == ()


def test_refusals(make_setting: MakeSetting) -> None:
    setting = make_setting(8)
    with pytest.raises(InputError, match=r"ahead=4 is not legal; 0\.\.3 is"):
        choose("adapmoe:ahead=4").make(setting)
    with pytest.raises(InputError, match="this model has 2 of 8, top-2"):
        choose("adapmoe:accuracy=mixtral").make(setting)


def test_the_accuracy_is_that_of_the_part_that_is_not_replayed(
    run: Callable[..., Replayed], trace: Trace
) -> None:
    done = run("adapmoe:predictor=gate1", 9)
    others = trace.sequence != trace.sequence[0]
    truth, guesses = trace.experts[others], trace.candidates["gate1"][others][:, :, :2]
    named = (truth[..., None] == guesses[..., None, :]).any(axis=3).mean(axis=(0, 2))
    policy = done.prepared.policy
    assert policy.accuracy.tolist() == [0, *named[1:].tolist()]
    (table,) = policy.plan(done.prepared.setting)
    rows = np.array(table.rows)
    assert rows[:, 2].tolist() == policy.cache.capacity.tolist()
    assert rows[:, 2].sum() == rows[:, 4].sum() == 8
    assert rows[:, 3].sum() <= rows[:, 5].sum()
    assert f"Loads per token: {rows[:, 3].sum():.3f}" in table.note


# What is where.


@pytest.mark.parametrize(
    ("slots", "spec", "capacity", "staging"),
    [
        (8, "", [4, 3], 1),
        (8, ":ahead=3", [3, 2], 3),
        (8, ":ahead=0", [4, 3], 1),
        (2, "", [1, 0], 1),
        (2, ":ahead=3", [0, 0], 2),
        (1, "", [0, 0], 1),
        (99, "", [8, 8], 1),
    ],
)
def test_each_layer_begins_with_its_last_experts(
    make_setting: MakeSetting, slots: int, spec: str, capacity: list[int], staging: int
) -> None:
    setting = make_setting(slots)
    placement = choose("adapmoe" + spec).make(setting).place(setting)
    assert placement.cache_slots.tolist() == capacity
    assert placement.staging_slots == staging
    inside = [np.flatnonzero(layer).tolist() for layer in placement.cached]
    assert inside == [list(range(8 - n, 8)) for n in capacity]
    assert placement.link == "fifo"


def test_a_gate_for_each_layer_that_is_looked_ahead(make_setting: MakeSetting) -> None:
    setting = make_setting(8)
    for ahead in range(4):
        placement = choose(f"adapmoe:ahead={ahead}").make(setting).place(setting)
        distances = [prediction.distance for prediction in placement.predictions]
        assert distances == list(range(1, ahead + 1))


@pytest.mark.parametrize(
    ("predictor", "names"),
    [
        ("gate", ["gate1", "gate2", "gate3"]),
        ("residual", ["residual1", "residual2", "residual3"]),
        ("oracle", ["oracle"] * 3),
    ],
)
def test_each_layer_ahead_has_the_guess_made_for_it(
    make_setting: MakeSetting, predictor: str, names: list[str]
) -> None:
    """The first of them says how good guesses are."""
    asked_for: list[Prediction] = []

    def observed(prediction: Prediction) -> Offline:
        asked_for.append(prediction)
        return offline([[[0, 1], [2, 3]]], [[[0, 1], [2, 3]]])(prediction)

    setting = make_setting(8)._replace(offline=observed)
    policy = choose(f"adapmoe:ahead=3,recall=0.7,predictor={predictor}").make(setting)
    placement = policy.place(setting)
    assert [prediction.predictor for prediction in placement.predictions] == names
    assert [prediction.recall for prediction in placement.predictions] == [0.7] * 3
    assert asked_for == [placement.predictions[0]]


# What is ordered.


def orders(desk: Any) -> list[tuple[Any, ...]]:
    """Return the plan as (command, expert); `load` is an urgent fetch into the cache."""
    read: list[tuple[Any, ...]] = []
    for code, layer, expert, a, b, c, d, e in desk.take():
        name = COMMANDS[code]
        if name == "fetch":
            assert (a, b, e) == (WHOLE, NONE, 0)
            assert (c, d) in ((CACHE, 1), (STAGING, 0))
            read.append(("load", expert) if c == CACHE else ("ahead", layer, expert))
        elif name == "run_on_gpu":
            read.append(("gpu", expert))
        else:
            read.append((name, expert))
    return read


class Asked:
    """A policy for 3 layers, of which each caches 6 and 7."""

    def __init__(self, setting: Setting, desk: Any, spec: str) -> None:
        self.policy: Any = choose(spec).make(setting)
        self.desk = desk
        desk.view.cached[:] = [0] * 6 + [WHOLE] * 2

    def __call__(self, *experts: int, layer: int = 0, **changes: Any) -> list[tuple[Any, ...]]:
        view = self.desk.routed(dict.fromkeys(experts, 1), layer=layer, **changes)
        self.policy.dispatch(view, self.desk.plan)
        return orders(self.desk)


@pytest.fixture
def asked(make_desk: MakeDesk, make_setting: MakeSetting) -> Callable[..., Asked]:
    def make(spec: str = "adapmoe") -> Asked:
        setting = make_setting(7, layers=3)
        return Asked(setting, make_desk(setting), spec)

    return make


def test_cached_experts_run_before_loads_and_the_oldest_leaves(asked: Any) -> None:
    """6 is the oldest, but was just used; then 7 is, and with two loads 6 after all."""
    assert asked()(1, 6) == [("gpu", 6), ("evict", 7), ("load", 1), ("gpu", 1)]
    assert asked()(1, 0, 6) == [
        ("gpu", 6), ("evict", 7), ("load", 1), ("gpu", 1), ("evict", 6), ("load", 0),
        ("gpu", 0),
    ]  # fmt: skip


def test_the_expert_loaded_ahead_takes_the_oldest_one_s_place_if_it_is_used(asked: Any) -> None:
    ask = asked()
    ask.desk.view.staged[0, 3] = WHOLE
    assert ask(3, 6) == [("gpu", 6), ("evict", 7), ("admit", 3), ("gpu", 3)]
    ask = asked()
    ask.desk.view.staged[0, 3] = WHOLE
    assert ask(7, 6) == [("gpu", 7), ("gpu", 6)]


def test_the_first_of_two_guesses_that_is_absent_is_loaded_behind_the_layer_s_own(
    asked: Any,
) -> None:
    ask = asked()
    ask.desk.guessed((4, 5))
    assert ask(1)[-2:] == [("gpu", 1), ("ahead", 1, 4)]
    ask = asked()
    ask.desk.guessed((7, 5))
    assert ask(6) == [("gpu", 6), ("ahead", 1, 5)]
    ask.desk.guessed((7, 6))
    assert ask(6) == [("gpu", 6)]
    ask.desk.guessed((4, 5))
    ask.desk.view.pending[1, 4] = 1
    assert ask(6) == [("gpu", 6), ("ahead", 1, 5)]
    ask.desk.view.staged[1, 5] = WHOLE
    assert ask(6) == [("gpu", 6)]


def test_of_several_sequences_two_experts_count(asked: Any) -> None:
    """7 and 6 are guessed twice, and cached; 4, of one token, is the third."""
    ask = asked()
    ask.desk.guessed((7, 4), (6, 7), (5, 6))
    assert ask(6) == [("gpu", 6)]
    ask.desk.guessed((7, 4), (4, 7), (5, 6))
    assert ask(6) == [("gpu", 6), ("ahead", 1, 4)]


def test_nothing_is_loaded_ahead_in_prefill_and_from_the_last_layer(asked: Any) -> None:
    ask = asked()
    ask.desk.guessed((4, 5))
    assert ask(6, phase=PREFILL) == [("gpu", 6)]
    assert ask(6, layer=2) == [("gpu", 6)]
    assert ask(6, layer=1) == [("gpu", 6), ("ahead", 2, 4)]


def test_the_paper_looks_further_where_all_is_cached(asked: Any) -> None:
    ask = asked("adapmoe:ahead=2")
    ids = np.full((2, 64, 2), NONE)
    ids[:, 0] = [[7, 6], [6, 2]]
    loads = np.zeros((2, 8), np.int64)
    loads[0, [7, 6]] = 1
    loads[1, [6, 2]] = 1
    view = {"predicted_ids": ids, "predicted_loads": loads, "predicted_tokens": np.array([1, 1])}
    assert ask(6, **view) == [("gpu", 6), ("ahead", 2, 2)]
    assert ask(6, layer=1, **view) == [("gpu", 6)]
    ids[0, 0, 1] = 3
    assert ask(6, **view) == [("gpu", 6), ("ahead", 1, 3)]


def test_a_layer_s_gate_waits_for_what_was_loaded_ahead_for_it(asked: Any) -> None:
    ask = asked()
    ask.desk.view.staged[1, 4] = WHOLE
    for layer, expected in ((0, []), (1, [("gate_after", 4)])):
        ask.policy.before_gate(ask.desk.view._replace(layer=layer), ask.desk.plan)
        assert orders(ask.desk) == expected


# Against caches written anew.


def copies_of(done: Replayed) -> list[tuple[int, int, int]]:
    assert done.log is not None
    rows = done.log.operations
    rows = rows[rows["kind"] == COPY_IN]
    return [tuple(row) for row in rows[["step", "layer", "expert"]].tolist()]


@given(capacity=st.integers(1, 5), top_k=st.integers(1, 4), seed=st.integers(0, 999))
@settings(max_examples=30)
def test_loads_are_those_of_an_lru_cache_that_marks_all_active_ones_first(
    capacity: int, top_k: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    choices = np.array([[rng.permutation(5)[:top_k] for _ in range(3)] for _ in range(10)])
    done = lab.run(
        choose("adapmoe:ahead=0"), choices,
        lab.make_costs(3, **ORDINARY, copy_ns_per_kib=64), experts=5, slots=3 * capacity + 1,
    )  # fmt: skip
    caches = [OrderedDict.fromkeys(range(5 - capacity, 5)) for _ in range(3)]
    expected = []
    for step, token in enumerate(choices.tolist()):
        for layer, chosen in enumerate(token):
            inside = caches[layer]
            missing = [expert for expert in chosen if expert not in inside]
            for expert in chosen:
                if expert in inside:
                    inside.move_to_end(expert)
            for expert in missing:
                inside.popitem(last=False)
                inside[expert] = None
                expected.append((step, layer, expert))
    assert copies_of(done) == expected


# What it takes.


def ahead(choices: Any, predictor: str, copy_ns: int) -> Replayed:
    """Return a run of two layers with one cached expert each, 3 at first, after a prompt of one."""
    costs = lab.make_costs(2, **ORDINARY, copy_ns_per_kib=copy_ns)
    return lab.run(choose(f"adapmoe:predictor={predictor}"), choices, costs, slots=3)


def test_a_right_guess_hides_its_copy() -> None:
    """Of the second token the guess takes 10; then the copy, beside expert, COMBINE and attention.

    The second layer's gate is ready 40 + 5 + 100 after the copy began, before its end at 200.
    """
    done = ahead([[[3], [3]], [[3], [2]]], "oracle", 200)
    first = 2 * (100 + 10 + 40 + 5) + 7 + 10 + 10  # two guesses, for layer 1 and for layer 0
    begins = first + 100 + 10 + 10
    assert lab.spans(done, "copy_in") == [("h2d", "copy_in", 1, 2, begins, begins + 200)]
    gate = lab.spans(done, "gate")[-1]
    assert gate.start_ns == begins + 200
    assert lab.makespan_ns(done) == begins + 200 + 10 + 40 + 5 + 7
    counts = done.prepared.host.counts.sum(axis=0)
    assert counts[1, :, 0].tolist() == [
        1,
        1,
        0,
        0,
        0,
    ]  # resident, arrived


def test_a_wrong_guess_is_waited_for_too_and_leaves() -> None:
    """Layer 1: 2 is loaded in place of 3 and used three times, then 1. Then 2 is guessed."""
    choices = [[[3], [e]] for e in (2, 2, 2, 1, 1)]
    done = ahead(choices, "popularity", 500)
    assert copies_of(done) == [(0, 1, 2), (3, 1, 1), (4, 1, 2)]
    last = lab.spans(done, "copy_in")[-1]
    gate = lab.spans(done, "gate")[-1]
    assert gate.start_ns == last.end_ns == last.start_ns + 500
    assert lab.makespan_ns(done) == last.end_ns + 10 + 40 + 5 + 7


def test_the_copy_ahead_is_behind_the_layer_s_own() -> None:
    done = ahead([[[3], [3]], [[0], [2]]], "oracle", 200)
    spans = lab.spans(done, "copy_in")
    assert [(s.layer, s.expert) for s in spans] == [(0, 0), (1, 2)]
    assert spans[1].start_ns == spans[0].end_ns
