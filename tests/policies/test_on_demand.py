import numpy as np
import pytest

import moesim.policies.testing as lab
from moesim.errors import PolicyError
from moesim.model import expert_bytes, load_model
from moesim.policies.registry import choose
from moesim.profile import load_profile
from moesim.run import prepare
from moesim.sim.metrics import link_bytes, summarize
from moesim.sim.replay import replay
from moesim.traces.synthetic import synthesize
from moesim.traces.workload import cut

COSTS = lab.make_costs(
    2, attention=100, gate=10, gpu=40, cpu=70, combine=5, head=7, copy_ns_per_kib=200
)


class TestOnDemand(lab.PolicyConformance):
    policy = "on-demand"


class TestOnDemandOverlapped(lab.PolicyConformance):
    policy = "on-demand:staging=3"


def test_one_slot_copies_and_computes_in_turn() -> None:
    """Attention 100, gate 10, then copy 200 and run 40 for each; the second copy needs the slot."""
    done = lab.run(choose("on-demand"), [[[2, 0]]], COSTS, slots=4)

    known = 100 + 10
    first = known + 200 + 40
    second = first + 200 + 40
    assert lab.spans(done, "copy_in", "expert_gpu") == [
        ("h2d", "copy_in", 0, 2, known, known + 200),
        ("gpu", "expert_gpu", 0, 2, known + 200, first),
        ("h2d", "copy_in", 0, 0, first, first + 200),
        ("gpu", "expert_gpu", 0, 0, first + 200, second),
    ]
    assert lab.makespan_ns(done) == second + 5 + 7


def test_a_token_takes_what_the_paper_s_formula_says() -> None:
    """L * (t_attn + 2 * (t_copy + t_gpu)), with gate and combine in t_attn, and the head."""
    tokens = 5
    choices = [[[0, 1], [2, 1]]] * tokens
    done = lab.run(choose("on-demand"), choices, COSTS, slots=4)
    token = 2 * (100 + 10 + 5 + 2 * (200 + 40)) + 7
    assert lab.makespan_ns(done) == tokens * token


def test_two_slots_copy_while_the_other_is_computed() -> None:
    done = lab.run(choose("on-demand:staging=2"), [[[2, 0]]], COSTS, slots=4)
    known = 100 + 10
    assert lab.spans(done, "copy_in", "expert_gpu") == [
        ("h2d", "copy_in", 0, 2, known, known + 200),
        ("gpu", "expert_gpu", 0, 2, known + 200, known + 240),
        ("h2d", "copy_in", 0, 0, known + 200, known + 400),
        ("gpu", "expert_gpu", 0, 0, known + 400, known + 440),
    ]


@pytest.mark.parametrize("batch", [1, 3])
def test_nothing_is_kept_and_everything_is_copied_once_per_step(batch: int) -> None:
    """Each active expert costs one copy in each layer step, however many tokens chose it."""
    rng = np.random.default_rng(0)
    choices = np.array([[rng.permutation(5)[:2] for _ in range(2)] for _ in range(12)])
    done = lab.run(
        choose("on-demand:staging=2"), choices, COSTS, experts=5, slots=9, prompts=(2,) * batch
    )

    each = 12 // batch
    by_step = [[at + sequence * each for sequence in range(batch)] for at in range(2, each)]
    by_step.insert(0, [at + sequence * each for sequence in range(batch) for at in (0, 1)])
    active = sum(len(set(choices[rows, la].ravel())) for rows in by_step for la in range(2))
    assert len(lab.spans(done, "copy_in")) == active
    counts = done.prepared.host.counts.sum(axis=0)
    assert counts[:, :, 0].sum(axis=0).tolist() == [
        0,
        0,
        0,
        active,
        0,
    ]
    assert link_bytes(done.heads[-1])["demand"] == active * lab.EXPERT_BYTES


def test_it_needs_one_slot() -> None:
    with pytest.raises(PolicyError, match=r"needs 1 slots of 1024 bytes .* budget is 0 bytes"):
        lab.run(choose("on-demand"), [[[0, 1]]], COSTS, slots=0)


def test_huang_s_measurement_of_it() -> None:
    """Huang et al., Fig. 5: 1.1 tokens/s for Mixtral-8x7B, of 28.27 ms per layer."""
    model = load_model("mixtral-8x7b")
    trace = synthesize(layers=32, experts=8, top_k=2, sequences=1, prompt=2, generate=6, seed=1)
    profile = load_profile("huang-4090")[0]
    prepared = prepare(
        trace, cut(trace, 1), model, profile, choose("on-demand"), budget_bytes=expert_bytes(model)
    )
    tpot_ms = summarize(replay(prepared))["tpot_ms"]
    assert tpot_ms == pytest.approx(32 * 28.27, rel=0.04)
    assert round(1e3 / tpot_ms, 1) == 1.1
