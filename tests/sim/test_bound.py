"""The lower bound: hand-computed cases, and no policy ever beats it."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim.policies.testing as lab
from moesim.policies.registry import choose
from moesim.run import Prepared
from moesim.sim.bound import Bound, Work, bound, crossing_ns, fractional_ns, least
from moesim.sim.replay import Replayed
from moesim.traces.synthetic import synthesize
from moesim.types import BITS, EXPERT_CPU, EXPERT_GPU
from wild import VARIANTS, Case, Wild, cases

QUIET = {
    "attention": 90, "gate": 10, "gpu": 40, "cpu": 70, "combine": 5, "head": 9,
    "copy_ns_per_kib": 200,
}  # fmt: skip


def prepared(
    choices: Any, slots: int = 8, costs: dict[str, int] | None = None, **options: Any
) -> Prepared:
    layers = np.array(choices).shape[1]
    made = lab.make_costs(layers, **(QUIET | (costs or {})))
    return lab.prepared(choose("static"), choices, made, slots=slots, **options)


def allowed(done: Replayed) -> tuple[list[int], bool]:
    """Return which precisions a run used, and whether it deferred: what its bound must allow."""
    assert done.log is not None
    ran = done.log.operations
    on_gpu, on_cpu = (ran[ran["kind"] == kind] for kind in (EXPERT_GPU, EXPERT_CPU))
    bits = [BITS[precision] for precision in np.unique(on_gpu["precision"])]
    return bits, bool((on_cpu["context"] == 1).any())


@pytest.mark.parametrize("policy", [Wild, *VARIANTS], ids=str)
@given(case=cases())
@settings(max_examples=60)
def test_no_policy_beats_it(policy: Any, case: Case) -> None:
    done: Replayed = case.run(choose(policy) if isinstance(policy, str) else policy)
    bits, deferral = allowed(done)

    found = bound(done.prepared, bits=bits, deferral=deferral)

    assert found.makespan_ns <= lab.makespan_ns(done)
    assert found.makespan_ns == found.fixed_ns + found.experts_ns + found.weights_ns
    assert min(found.fixed_ns, found.experts_ns, found.weights_ns) >= 0


def test_one_expert_runs_where_it_is_faster() -> None:
    # 90 + 10 + 40 + 5 + 9, and nothing needs to be copied
    found = bound(prepared([[[0]]]))
    assert found == Bound(
        makespan_ns=154, tokens_per_s=1e9 / 154, fixed_ns=114, experts_ns=40, weights_ns=0,
        bits=(16,), deferral=False,
    )  # fmt: skip
    assert found.binds == "fixed"
    assert bound(prepared([[[0]]], costs={"cpu": 30})).experts_ns == 30


def test_two_lanes_share_the_experts() -> None:
    # in fractions: g experts on the GPU, 3 - g on the CPU, 40 g = 70 (3 - g): 76.4 ns
    assert bound(prepared([[[0, 1, 2]]])).experts_ns == 77


def test_what_the_cpu_returns_crosses_the_link() -> None:
    # sending takes 16 ns, 6 more than the gate, and returning 16: 52 on the CPU against 60
    costs = {"copy_ns_per_kib": 256, "token_bytes": 64, "cpu": 30, "gpu": 60}
    assert bound(prepared([[[0]]], costs=costs)).experts_ns == 30 + 6 + 16
    # beyond that the GPU is faster
    assert bound(prepared([[[0]]], costs=costs | {"gpu": 50})).experts_ns == 50


def test_the_host_must_wait_and_launch() -> None:
    machine = lab.quiet_machine(
        "host.per_layer_ns=100", "host.per_launch_ns=3", "host.per_sync_ns=5"
    )
    # each step begins with a layer and a launch, all but the first with a wait; each gate has both
    fixed = (103 + 114 + 8) + (5 + 103 + 114 + 8)
    assert bound(prepared([[[0]], [[0]]], machine=machine)).fixed_ns == fixed


def test_what_the_budget_does_not_hold_is_copied_or_computed_on_the_cpu() -> None:
    # A slow CPU: 4 experts, one after the other, of which 1 is there. 3 copies of 2000 ns.
    costs = {"copy_ns_per_kib": 2000, "cpu": 1_000_000}
    choices = [[[0]], [[1]], [[2]], [[3]]]
    found = bound(prepared(choices, slots=1, costs=costs))
    # The fourth may run on the CPU in fractions, 6000 less x on the link, x of 500 experts.
    share = (4 * 114 + 1_000_000 - 2000 * 2) / (2000 + 1_000_000)
    assert found.makespan_ns == np.ceil(2000 * 2 + 2000 * share)
    assert found.binds == "weights"
    assert bound(prepared(choices, slots=4, costs=costs)).weights_ns == 0


def test_a_lower_precision_and_deferral_are_allowed_more() -> None:
    costs = {"copy_ns_per_kib": 2000, "cpu": 500}
    choices = [[[i % 4, (i + 1) % 4], [(i + 2) % 4, i % 4]] for i in range(6)]
    run = prepared(choices, slots=2, costs=costs)
    strict = bound(run).makespan_ns
    fewer_bits = bound(run, bits=[4])
    assert fewer_bits.makespan_ns < strict
    assert fewer_bits.bits == (16, 4)
    assert bound(run, deferral=True).makespan_ns < strict


def test_without_a_budget_the_cpu_does_everything() -> None:
    assert bound(prepared([[[0, 1]]], slots=0)).experts_ns == 140


@given(
    gpu=st.lists(st.integers(0, 50), min_size=1, max_size=7),
    cpu=st.lists(st.integers(0, 50), min_size=7, max_size=7),
    a=st.integers(0, 40), b=st.integers(0, 40),
)  # fmt: skip
def test_the_division_in_fractions_is_below_every_real_one(
    gpu: list[int], cpu: list[int], a: int, b: int
) -> None:
    n = len(gpu)
    best = min(
        max(
            a + sum(g for g, on in zip(gpu, way, strict=True) if on),
            b + sum(c for c, on in zip(cpu, way, strict=False) if not on),
        )
        for way in product((False, True), repeat=n)
    )
    found = fractional_ns(np.array(gpu), np.array(cpu[:n]), a, b)
    assert found <= best + 1e-9
    # Rounding one expert of a fractional optimum to either device costs no more than that expert.
    assert best <= max(a, b, found) + max(max(g, c) for g, c in zip(gpu, cpu, strict=False))


@given(
    ns=st.lists(st.integers(0, 100), min_size=1, max_size=8),
    parts=st.lists(st.integers(1, 4), min_size=1, max_size=2),
)
def test_batches_take_at_least_that_long(ns: list[int], parts: list[int]) -> None:
    table = np.concatenate(([0], np.maximum.accumulate([*ns, *[ns[-1]] * 8])))
    found = least(table, split=True)
    assert found[sum(parts)] <= sum(table[part] for part in parts)
    assert (found <= table).all()
    assert (least(table, split=False) == table).all()


@given(
    uses=st.lists(st.integers(1, 90), min_size=1, max_size=6), fixed=st.integers(0, 90),
    one=st.integers(1, 90), slots=st.integers(0, 4),
)  # fmt: skip
def test_no_choice_of_experts_is_below_the_window(
    uses: list[int], fixed: int, one: int, slots: int
) -> None:
    none = np.zeros(1, np.int64)
    work = Work(none, none, none, none, none, [], float(one), float(one * slots), True)
    found = crossing_ns(work, np.array(uses, np.float64), fixed)
    for way in product((False, True), repeat=len(uses)):
        on_cpu = sum(ns for ns, on in zip(uses, way, strict=True) if not on)
        assert found <= max(one * (sum(way) - slots), fixed + on_cpu) + 1e-9


@pytest.mark.parametrize("policy", ["lru", "dali"])
def test_more_budget_never_raises_it(policy: str) -> None:
    trace = synthesize(layers=3, experts=8, top_k=2, sequences=1, prompt=4, generate=30, seed=1)
    choices = trace.experts
    found = []
    for slots in (3, 6, 12, 24, 40):
        costs = lab.make_costs(3, **QUIET)
        done = lab.run(choose(policy), choices, costs, experts=8, slots=slots, prompts=(4,))
        found.append(bound(done.prepared).makespan_ns)
        assert found[-1] <= lab.makespan_ns(done)
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]
