from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim.policies.testing as lab
from moesim.errors import InputError, PolicyError
from moesim.policies.api import Setting
from moesim.policies.registry import choose
from moesim.sim.metrics import summarize
from moesim.sim.replay import Replayed
from moesim.types import COPY_IN, DEMAND, PREFETCH

MakeSetting = Callable[..., Setting]
Run = Callable[..., Replayed]


class TestPregated(lab.PolicyConformance):
    policy = "pregated"


class TestPregatedLookingFurther(lab.PolicyConformance):
    policy = "pregated:ahead=3"


def copies(done: Replayed) -> list[tuple[int, int, int, int]]:
    """Return (step, layer, expert, cause) of each copy, in the order in which they were ordered."""
    assert done.log is not None
    rows = done.log.operations[done.log.operations["kind"] == COPY_IN]
    return [tuple(row) for row in rows[["step", "layer", "expert", "cause"]].tolist()]


# What it takes: T = load(1) + sum_N max(t_attn(N) + experts(N), copies(N+1)).


def formula(layers: int, attention: int, experts: int, copy: int) -> int:
    """Return the time of a token; nothing is copied while the last block runs."""
    total = copy
    for block in range(layers):
        total += max(attention + experts, copy if block < layers - 1 else 0)
    return total


@given(
    layers=st.integers(1, 5),
    attention=st.integers(0, 300),
    gpu=st.integers(1, 300),
    copy=st.sampled_from([16, 64, 125, 320]),
    tokens=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_one_expert_per_token_takes_what_the_formula_says(
    layers: int, attention: int, gpu: int, copy: int, tokens: int, seed: int
) -> None:
    choices = np.random.default_rng(seed).integers(0, 4, (tokens, layers, 1))
    costs = lab.make_costs(layers, attention=attention, gpu=gpu, head=7, copy_ns_per_kib=copy)
    done = lab.run(choose("pregated"), choices, costs)
    assert lab.makespan_ns(done) == tokens * (formula(layers, attention, gpu, copy) + 7)


@given(
    top_k=st.integers(2, 3),
    layers=st.integers(1, 4),
    attention=st.integers(0, 300),
    gpu=st.integers(1, 100),
    copy=st.sampled_from([16, 64, 125, 320]),
)
@settings(max_examples=60)
def test_with_more_the_formula_is_the_most(
    top_k: int, layers: int, attention: int, gpu: int, copy: int
) -> None:
    """It waits for all copies of a block; here all experts but the last may run before."""
    choices = [[list(range(top_k))] * layers]
    costs = lab.make_costs(layers, attention=attention, gpu=gpu, copy_ns_per_kib=copy)
    most = formula(layers, attention, top_k * gpu, top_k * copy)
    done = lab.run(choose("pregated"), choices, costs)
    assert most - layers * (top_k - 1) * gpu <= lab.makespan_ns(done) <= most


def test_copies_that_are_hidden_cost_nothing() -> None:
    """Blocks of 100 + 2 * 60 hide two copies of 64; the first block waits for its own.

    There the first expert arrives after 100 + 64, and runs as long as the second arrives.
    """
    costs = lab.make_costs(3, attention=100, gpu=64, copy_ns_per_kib=64)
    done = lab.run(choose("pregated"), [[[3, 1], [2, 0], [1, 3]]], costs)
    first = 100 + 64 + 2 * 64
    assert lab.makespan_ns(done) == first + 2 * (100 + 2 * 64)
    assert lab.spans(done, "copy_in") == [
        ("h2d", "copy_in", 0, 1, 100, 164),
        ("h2d", "copy_in", 0, 3, 164, 228),
        ("h2d", "copy_in", 1, 0, 228, 292),
        ("h2d", "copy_in", 1, 2, 292, 356),
        ("h2d", "copy_in", 2, 1, first + 100, first + 164),
        ("h2d", "copy_in", 2, 3, first + 164, first + 228),
    ]


def test_the_gain_over_loads_on_demand_is_the_published_one_where_the_formula_gives_it() -> None:
    """1.7x: while a block is copied for 200, the one before computes for 140, 0.7 of that.

    It cannot be more than 2x: each of copies and computation is hidden behind the other at most.
    """
    layers = 40
    choices = [[[layer % 4] for layer in range(layers)]] * 3
    costs = lab.make_costs(layers, attention=100, gpu=40, copy_ns_per_kib=200)
    times = {
        spec: lab.makespan_ns(lab.run(choose(spec), choices, costs))
        for spec in ("on-demand", "pregated")
    }
    assert times["on-demand"] == 3 * layers * (100 + 200 + 40)
    assert times["on-demand"] / times["pregated"] == pytest.approx(1.7, rel=0.02)


@pytest.mark.parametrize("slots", [4, 8, 24])
def test_it_is_faster_than_loads_on_demand_on_a_real_machine_s_costs(run: Run, slots: int) -> None:
    tpot = {
        spec: summarize(run(spec, slots))["tpot_ms"]
        for spec in ("on-demand", "on-demand:staging=2", "pregated")
    }
    assert tpot["pregated"] < tpot["on-demand:staging=2"] < tpot["on-demand"]
    assert tpot["on-demand"] / tpot["pregated"] < 2


# What is copied, and when.


def test_a_block_s_experts_are_copied_in_the_order_of_ids_while_the_one_before_runs() -> None:
    """Block 0 on demand, every other one ahead; nothing is kept for the second token."""
    token = [[3, 1], [2, 0], [3, 2]]
    costs = lab.make_costs(3, attention=90, gate=10, gpu=40, copy_ns_per_kib=64)
    done = lab.run(choose("pregated"), [token, token], costs)
    assert copies(done) == [
        (step, layer, expert, DEMAND if layer == 0 else PREFETCH)
        for step in (0, 1)
        for layer, expert in ((0, 1), (0, 3), (1, 0), (1, 2), (2, 2), (2, 3))
    ]
    runs = lab.spans(done, "expert_gpu")
    assert [span.expert for span in runs] == [1, 3, 0, 2, 2, 3] * 2


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_the_first_blocks_are_copied_on_demand(ahead: int) -> None:
    """And what is copied ahead is ordered in the block `ahead` before."""
    layers = 4
    choices = [[[layer] for layer in range(layers)]] * 2
    costs = lab.make_costs(layers, attention=90, gate=10, gpu=40, copy_ns_per_kib=64)
    done = lab.run(choose(f"pregated:ahead={ahead}"), choices, costs)
    assert sorted(copies(done)) == [
        (step, layer, layer, DEMAND if layer < ahead else PREFETCH)
        for step in range(2)
        for layer in range(layers)
    ]
    started = {span.layer: span.start_ns for span in lab.spans(done, "copy_in")[:layers]}
    gates = {span.layer: span.end_ns for span in lab.spans(done, "gate")[:layers]}
    for layer in range(ahead, layers):
        before = gates[layer - ahead]
        assert started[layer] >= before
        assert layer - ahead == layers - 1 or started[layer] < gates[layer - ahead + 1]


def test_looking_further_ahead_gains_where_a_block_has_more_to_copy_than_one_hides() -> None:
    """Blocks of one, one and three experts, copies of 100, blocks of 140 and 10 per expert.

    One ahead: block 0 ends at 140 + 100 + 10, block 1 (copied by 340) at 400; since its gate, at
    390, block 2 is copied until 690. Two ahead: block 2 is copied from 240 on; block 1 asks for its
    own at 390 and has it at 490, a copy and a half being done; the rest is there at 640, just as
    block 2's gate, 140 after the end of block 1 at 500.
    """
    choices = np.array([[[0, -1, -1], [1, -1, -1], [1, 2, 3]]])
    costs = lab.make_costs(3, attention=140, gpu=10, copy_ns_per_kib=100)
    times = [
        lab.makespan_ns(lab.run(choose(f"pregated:ahead={ahead}"), choices, costs))
        for ahead in (1, 2)
    ]
    assert times == [690 + 10, 640 + 3 * 10]


def test_a_batch_copies_the_union_of_what_its_tokens_choose() -> None:
    choices = [[[0, 1], [4, 2]], [[1, 5], [2, 3]], [[0, 5], [0, 3]]]
    costs = lab.make_costs(2, attention=90, gate=10, gpu=40, copy_ns_per_kib=64)
    done = lab.run(choose("pregated"), choices, costs, experts=6, slots=20, prompts=(1, 1, 1))
    assert [copy[1:] for copy in copies(done)] == [
        (0, 0, DEMAND), (0, 1, DEMAND), (0, 5, DEMAND),
        (1, 0, PREFETCH), (1, 2, PREFETCH), (1, 3, PREFETCH), (1, 4, PREFETCH),
    ]  # fmt: skip


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_a_budget_below_two_blocks_streams(slots: int) -> None:
    """Every activation is copied once, and no copy is wasted, even through a single slot."""
    rng = np.random.default_rng(slots)
    choices = np.array([[rng.permutation(6)[:3] for _ in range(3)] for _ in range(5)])
    costs = lab.make_costs(3, attention=90, gate=10, gpu=40, combine=5, copy_ns_per_kib=64)
    done = lab.run(choose("pregated"), choices, costs, experts=6, slots=slots)
    assert len(copies(done)) == 5 * 3 * 3
    ahead = [copy for copy in copies(done) if copy[3] == PREFETCH]
    assert {copy[1] for copy in ahead} == {1, 2}
    assert len(ahead) >= 5 * 2 * min(slots, 3)
    assert summarize(done)["prefetch"]["wasted_bytes"] == 0


@pytest.mark.parametrize(
    ("ahead", "slots", "staging"),
    [(1, 99, 2 * 8), (1, 7, 7), (2, 99, 3 * 8), (3, 99, 4 * 8), (3, 1, 1)],
)
def test_the_buffer_holds_the_blocks_between_gate_and_use(
    make_setting: MakeSetting, ahead: int, slots: int, staging: int
) -> None:
    setting = make_setting(slots, experts=8)  # steps of up to 64 tokens: all experts are active
    placement = choose(f"pregated:ahead={ahead}").make(setting).place(setting)
    assert placement.staging_slots == staging
    assert placement.cached.sum() == placement.cache_slots.sum() == 0
    alone = setting._replace(step_tokens=1, top_k=3)
    expected = min(slots, (1 + ahead) * 3)
    assert choose(f"pregated:ahead={ahead}").make(alone).place(alone).staging_slots == expected


def test_the_run_says_that_the_model_is_another(run: Run) -> None:
    notices = run("pregated", 8).prepared.notices
    assert any("retrained gates" in notice for notice in notices)
    assert "predictor oracle sees the future" in notices


def test_it_needs_one_slot() -> None:
    with pytest.raises(PolicyError, match=r"needs 1 slots of 1024 bytes .* budget is 0 bytes"):
        lab.run(choose("pregated"), [[[0, 1]]], lab.make_costs(), slots=0)


@pytest.mark.parametrize("ahead", [0, 4])
def test_it_looks_one_to_three_blocks_ahead(make_setting: MakeSetting, ahead: int) -> None:
    with pytest.raises(InputError, match=rf"ahead={ahead} is not legal; 1 to 3 is"):
        choose(f"pregated:ahead={ahead}").make(make_setting(8))
