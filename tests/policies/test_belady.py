"""Belady's rule as a policy: hits counted by hand and by the caches without time; the oracle."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim.policies.testing as lab
from moesim.policies.api import Setting
from moesim.policies.belady import NEVER, latest, new_future_cache, new_next_use
from moesim.policies.oracle import FEW
from moesim.policies.registry import choose
from moesim.sim.curves import curves
from moesim.sim.metrics import summarize
from moesim.sim.replay import Replayed
from moesim.traces.stats import belady_hits
from moesim.types import COPY_IN

COSTS = {"attention": 90, "gate": 10, "gpu": 40, "cpu": 70, "combine": 5, "head": 9}


def costs_of(layers: int, copy_ns_per_kib: int = 200) -> Any:
    return lab.make_costs(layers, **COSTS, copy_ns_per_kib=copy_ns_per_kib)


def copied(choices: Any, slots: int, spec: str = "belady:staging=1", **options: Any) -> list[int]:
    """Return the experts in the order in which they are copied."""
    layers = np.array(choices).shape[1]
    log = lab.run(choose(spec), choices, costs_of(layers), slots=slots, **options).log
    assert log is not None
    return [int(op["expert"]) for op in log.operations if op["kind"] == COPY_IN]


def tokens(*experts: int) -> list[list[list[int]]]:
    return [[[expert]] for expert in experts]


def test_the_one_used_again_latest_leaves() -> None:
    # Two places. For 2, 0 leaves, since 1 comes first; for 0, 2 leaves, which never comes again.
    assert copied(tokens(0, 1, 2, 1, 0), slots=3) == [0, 1, 2, 0]
    assert copied(tokens(0, 1, 2, 1, 0), slots=3, spec="lru:staging=1") == [0, 1, 2, 0]
    assert copied(tokens(0, 1, 2, 0, 1), slots=3) == [0, 1, 2, 1]
    assert copied(tokens(0, 1, 2, 0, 1), slots=3, spec="lru:staging=1") == [0, 1, 2, 0, 1]


def test_of_those_never_used_again_the_lowest_leaves_and_active_ones_stay() -> None:
    # 0 and 1 leave in this order; then 2, which is active, stays though it never comes again.
    assert copied([[[1, 0]], [[2, 1]], [[2, 3]], [[3, 1]]], slots=3) == [1, 0, 2, 3, 1]


def test_the_future_is_every_activation_in_order() -> None:
    done = lab.prepared(choose("belady"), [[[0, 3]], [[3, 1]], [[3, 2]]], costs_of(1), prompts=(2,))
    assert done.setting.future.tolist() == [
        [0, 0, 0, 1],
        [0, 0, 1, 1],
        [0, 0, 3, 2],
        [1, 0, 2, 1],
        [1, 0, 3, 1],
    ]
    assert "policy belady sees the future" in done.notices


def test_no_other_policy_is_given_the_future() -> None:
    done = lab.prepared(choose("lru"), tokens(0, 1), costs_of(1))
    assert done.setting.future.shape == (0, 4)
    assert not any("future" in notice for notice in done.notices)


def test_next_uses_are_listed_by_expert(make_setting: Callable[..., Setting]) -> None:
    future = np.array([[0, 1, 2, 1], [3, 0, 1, 5], [4, 1, 2, 1]])
    uses = new_next_use(future, layers=2, experts=3)
    found = [uses.steps[at:].tolist() for at in uses.at.ravel()]
    assert [later[: later.index(NEVER)] for later in found] == [[], [3], [], [], [], [0, 4]]

    setting = make_setting(4, layers=2, experts=3)._replace(future=future)
    cache = new_future_cache(setting, staging=1)
    assert cache.capacity.tolist() == [2, 1]
    cache.inside[0] = 1
    assert latest(cache, 0, np.zeros(3, np.int64)) == 0
    assert latest(cache, 0, np.array([1, 0, 1])) == 1
    assert latest(cache, 0, np.ones(3, np.int64)) == -1


def choices_of(seed: int, layers: int, experts: int, top_k: int, count: int) -> Any:
    rng = np.random.default_rng(seed)
    return np.array(
        [[rng.permutation(experts)[:top_k] for _ in range(layers)] for _ in range(count)]
    )


@given(
    seed=st.integers(0, 999), experts=st.integers(2, 7), top_k=st.integers(1, 2),
    more=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=40)
def test_hits_are_those_of_the_cache_without_time(
    seed: int, experts: int, top_k: int, more: int
) -> None:
    """One sequence, one token per step, a cache that holds a token's experts: then all agree."""
    size = min(top_k + more, experts)
    choices = choices_of(seed, 1, experts, top_k, 25)
    done = lab.run(
        choose("belady:staging=1"), choices, costs_of(1), experts=experts, slots=size + 1
    )
    hits = summarize(done)["activations"]["resident"]

    trace = lab.make_trace(choices, experts)
    assert hits == round(float(belady_hits(trace, [size])[0, 0]) * choices.size)
    if top_k == 1:
        assert hits == curves(trace, ["belady"], [size], compiled=False).hits[0, 0, 0]


@given(seed=st.integers(0, 999), layers=st.integers(1, 3), each=st.integers(2, 5))
@settings(max_examples=40)
def test_it_never_copies_more_than_lru(seed: int, layers: int, each: int) -> None:
    choices = choices_of(seed, layers, 6, 2, 20)
    slots = layers * each + 1
    found = [
        len(copied(choices, slots, spec=f"{name}:staging=1", experts=6))
        for name in ("belady", "lru")
    ]
    assert found[0] <= found[1]


@pytest.mark.parametrize("name", ["belady"])
def test_it_plans_the_same_however_the_batch_is_seeded(name: str) -> None:
    choices = choices_of(1, 2, 6, 2, 12)
    first, second = (
        copied(choices, 7, spec=name, experts=6, prompts=(2, 3), seed=seed) for seed in (0, 5)
    )
    assert first == second


class TestBelady(lab.PolicyConformance):
    policy = "belady"


class TestOracle(lab.PolicyConformance):
    policy = "oracle"


def placed(choices: Any, slots: int, **costs: int) -> Replayed:
    layers = np.array(choices).shape[1]
    made = lab.make_costs(layers, **(COSTS | {"copy_ns_per_kib": 200} | costs))
    return lab.run(choose("oracle:staging=1"), choices, made, slots=slots)


def test_the_oracle_starts_with_the_experts_used_first() -> None:
    done = placed(tokens(3, 1, 2), slots=3)
    assert (done.prepared.placement.cached[0] > 0).tolist() == [False, True, False, True]


def test_the_oracle_copies_ahead_what_the_next_step_needs() -> None:
    # 3 and 1 are there. Of them neither comes again: 0 enters for the lower one, in time.
    done = placed(tokens(3, 1, 0), slots=3, copy_ns_per_kib=64)
    assert summarize(done)["activations"] == {
        "resident": 2, "arrived": 1, "late": 0, "fetched": 0, "cpu": 0, "total": 3,
    }  # fmt: skip
    assert [span.expert for span in lab.spans(done, "copy_in")] == [0]


def test_the_oracle_divides_experts_between_the_devices() -> None:
    # All resident: of three experts of 40 ns (GPU) and 70 ns (CPU), one goes to the CPU.
    done = placed([[[0, 1, 2]]], slots=5)
    assert len(lab.spans(done, "expert_cpu")) == 1
    assert lab.makespan_ns(done) == 90 + 10 + 80 + 5 + 9


@pytest.mark.parametrize("active", [3, 14])
def test_the_oracle_assigns_few_experts_exactly_and_many_greedily(active: int) -> None:
    choices = [[list(range(active))]]
    made = lab.make_costs(1, **COSTS, copy_ns_per_kib=1600)
    done = lab.run(choose("oracle:staging=1"), choices, made, experts=16, slots=17)
    on_cpu = len(lab.spans(done, "expert_cpu"))
    best = min(max(40 * (active - n), 70 * n) for n in range(active + 1))
    end = max(40 * (active - on_cpu), 70 * on_cpu)
    assert best <= end <= best + 40
    assert end == best or active > FEW


@given(seed=st.integers(0, 999), slots=st.integers(3, 12))
@settings(max_examples=30)
def test_the_oracle_beats_the_same_cache_without_its_other_rules(seed: int, slots: int) -> None:
    """On average: no rule of its promises it for a single run."""
    found = np.zeros(2, np.int64)
    for i in range(4):
        choices = choices_of(4 * seed + i, 2, 6, 2, 20)
        for at, name in enumerate(("oracle", "belady")):
            done = lab.run(choose(name), choices, costs_of(2), experts=6, slots=slots)
            found[at] += lab.makespan_ns(done)
    assert found[0] <= found[1]
