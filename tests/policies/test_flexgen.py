from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moesim.policies.testing as lab
from moesim.costs import CONTEXT_UNIT
from moesim.errors import InputError, PolicyError
from moesim.policies.api import Setting
from moesim.policies.flexgen import buffer_experts, resident_experts, total_ns
from moesim.policies.parts.streaming import pass_ns
from moesim.policies.registry import choose
from moesim.sim.replay import Replayed
from moesim.types import WHOLE

MakeSetting = Callable[..., Setting]


class TestFlexGen(lab.PolicyConformance):
    policy = "flexgen"


class TestFlexGenOfBatches(lab.PolicyConformance):
    policy = "flexgen:batches=2,kv=host,dense=host"


class TestReleasedFlexGen(lab.PolicyConformance):
    policy = "flexgen:form=released,batches=3,kv=host"


class TestReleasedFlexGenOnTheCpu(lab.PolicyConformance):
    policy = "flexgen:form=released,batches=2,kv=host,cpu_attention=true,dense=host"


EXPERTS, ATTENTION, GATE, EXPERT, COMBINE = 4, 50, 10, 20, 5


def replay(
    spec: str, *, copy: int, sequences: int = 3, steps: int = 1, layers: int = 3, slots: int = 8,
    **costs: Any,
) -> Replayed:  # fmt: skip
    """Return a run of prompts of one token each, which all choose experts 0 and 2 of 4."""
    made = lab.make_costs(
        layers, attention=ATTENTION, gate=GATE, gpu=EXPERT, combine=COMBINE, copy_ns_per_kib=copy,
        **costs,
    )  # fmt: skip
    choices = [[[2, 0]] * layers] * (sequences * steps)
    prompts = (1,) * sequences
    return lab.run(
        choose(spec), choices, made, experts=EXPERTS, slots=slots, prompts=prompts,
        machine=lab.quiet_machine("link.chunk_bytes=64"),
    )  # fmt: skip


def batch_ns() -> int:
    """Return what one batch computes in one layer, in all: two experts, each read once."""
    return ATTENTION + GATE + 2 * EXPERT


# What it takes.


@pytest.mark.parametrize("copy", [1, 16, 80, 100, 128, 320])
@pytest.mark.parametrize("batches", [1, 2, 3])
def test_ideally_a_layer_takes_the_longer_of_copies_and_computation(
    copy: int, batches: int
) -> None:
    """max(io_W, m t_c): four copies against m batches and a COMBINE, whatever the router chose.

    At the end of a run nothing is copied ahead, so that its length is compared for 4 and 5 layers.
    """
    spec = f"flexgen:batches={batches}"
    lengths = [lab.makespan_ns(replay(spec, copy=copy, layers=layers)) for layers in (4, 5)]
    period = max(EXPERTS * copy, batches * batch_ns() + COMBINE)
    assert lengths[1] - lengths[0] == period


@pytest.mark.parametrize("copy", [16, 40, 80, 128])
def test_the_ideal_form_by_hand(copy: int) -> None:
    """Two batches, three layers of 4 experts, of which 0 and 2 run; buffers for two layers.

    A layer's gates wait for its copies. Layer 2 goes where layer 0 was, whose experts 1 and 3 leave
    at once, 0 and 2 when both batches have run.
    """
    done = replay("flexgen:batches=2", copy=copy)
    copies = lab.spans(done, "copy_in")
    assert [(span.layer, span.expert) for span in copies] == [
        (layer, expert) for layer in range(3) for expert in range(4)
    ]
    gates = max(2 * ATTENTION, 4 * copy)
    ran = gates + 2 * GATE + 4 * EXPERT
    copied = 8 * copy
    gates = max(ran + COMBINE + 2 * ATTENTION, copied)
    last_ran = gates + 2 * GATE + 4 * EXPERT
    # The slots given up first are those of the layer's first run.
    copied = max(copied, ran - 2 * EXPERT) + copy
    copied = max(copied, ran) + 3 * copy if copies[9].start_ns >= ran else copied + 3 * copy
    gates = max(last_ran + COMBINE + 2 * ATTENTION, copied)
    assert lab.makespan_ns(done) == gates + 2 * GATE + 4 * EXPERT + COMBINE
    assert copies[8].start_ns >= ran - 2 * EXPERT


@pytest.mark.parametrize("copy", [1, 10, 16, 20, 64])
@pytest.mark.parametrize("batches", [1, 2, 3])
def test_the_released_form_waits_for_the_copies_with_its_first_batch(
    copy: int, batches: int
) -> None:
    """max(io_W, t_c) + (m - 1) t_c for the attentions, then what the experts' layer computes."""
    done = replay(f"flexgen:form=released,batches={batches}", copy=copy, slots=4)
    attended = max(EXPERTS * copy, ATTENTION) + (batches - 1) * ATTENTION
    computed = batches * (GATE + 2 * EXPERT) + COMBINE
    assert lab.makespan_ns(done) == 3 * (attended + computed)


def test_the_released_form_is_slower_by_what_it_does_not_hide() -> None:
    """Four copies of 64 hide behind three batches of 100, but not behind one attention of 50."""
    ideal, released = (
        lab.makespan_ns(replay(f"flexgen:batches=3,form={form}", copy=64, layers=9, slots=slots))
        for form, slots in (("ideal", 8), ("released", 4))
    )
    hidden = 3 * batch_ns() + COMBINE
    # In the ideal form only the first layer's copies show.
    assert ideal == 9 * hidden + (4 * 64 - 3 * ATTENTION)
    assert released == 9 * (hidden + 4 * 64 - ATTENTION)


@pytest.mark.parametrize(("copy", "kv"), [(16, 1024), (16, 4096), (64, 2048)])
def test_keys_and_values_hide_behind_the_batch_before(copy: int, kv: int) -> None:
    """max(t_c, io_KV) for each batch but the last, the first one's being loaded a layer ahead.

    One token of each of three sequences is kept when the second step begins.
    """
    made: dict[str, Any] = {"copy": copy, "steps": 2, "slots": 4, "layers": 4, "kv_bytes": kv}
    done = replay("flexgen:form=released,batches=3,kv=host", **made)
    starts = [span.start_ns for span in lab.spans(done, "attention")][3 * 4 :]
    io_w, io_kv = EXPERTS * copy, copy * kv // 1024
    for layer in (1, 2, 3):
        batch = starts[3 * layer : 3 * layer + 3]
        assert batch[1] - batch[0] == max(ATTENTION, io_w + io_kv)
        # The first one's stores, of as many bytes, began when it ended.
        stored = batch[0] + ATTENTION + io_kv
        assert batch[2] == max(batch[1] + max(ATTENTION, io_kv), stored)


@pytest.mark.parametrize("form", ["ideal", "released"])
def test_attention_weights_are_copied_beside_the_experts(form: str) -> None:
    """They are under way when the layer before ends."""
    spec = f"flexgen:form={form},dense=host,batches=2"
    done = replay(spec, copy=16, dense_bytes=1024)
    ends = [span.end_ns for span in lab.spans(done, "combine")]
    starts = [span.start_ns for span in lab.spans(done, "dense_in")]
    assert len(starts) == 3
    assert all(start < end for start, end in zip(starts[1:], ends, strict=False))


def test_each_batch_reads_the_experts_anew() -> None:
    done = replay("flexgen:batches=3", copy=1)
    runs = lab.spans(done, "expert_gpu")
    assert [(span.layer, span.expert) for span in runs[:6]] == [(0, 0)] * 3 + [(0, 2)] * 3


# What is copied.


@pytest.mark.parametrize("form", ["ideal", "released"])
def test_all_experts_of_a_layer_are_copied_once_per_step(form: str) -> None:
    """Those that nobody chose, too; nothing on demand."""
    done = replay(f"flexgen:form={form},batches=2", copy=16, steps=3, sequences=2)
    copied: dict[tuple[int, int], int] = {}
    resident = done.prepared.placement.cached
    for span in lab.spans(done, "copy_in"):
        copied[span.layer, span.expert] = copied.get((span.layer, span.expert), 0) + 1
    expected = {at: 3 for at in np.ndindex(3, 4) if resident[at] == 0}
    assert copied == expected


def test_a_copy_begins_when_the_layer_that_it_replaces_is_over() -> None:
    """With buffers for two layers, an expert of layer l + 2 fills the slot of one of layer l."""
    done = replay("flexgen:batches=2", copy=1, layers=5)
    ends = {(span.layer, span.expert): span.end_ns for span in lab.spans(done, "expert_gpu")}
    for span in lab.spans(done, "copy_in"):
        if span.layer >= 2 and span.expert in (0, 2):
            assert span.start_ns >= ends[span.layer - 2, span.expert]


def test_released_copies_wait_for_the_whole_layer_before() -> None:
    done = replay("flexgen:form=released,batches=2", copy=1, layers=4, slots=4)
    ends = [span.end_ns for span in lab.spans(done, "combine")]
    for layer, (end, copies) in enumerate(
        zip(
            ends,
            [lab.spans(done, "copy_in")[4 * at : 4 * at + 4] for at in (1, 2, 3)],
            strict=False,
        )
    ):
        assert {span.layer for span in copies} == {layer + 1}
        assert copies[0].start_ns == end


@pytest.mark.parametrize("slots", range(4, 12))
@pytest.mark.parametrize("form", ["ideal", "released"])
def test_fewer_slots_never_make_it_faster(form: str, slots: int) -> None:
    """From the experts of one layer on, all of each layer are copied."""
    spec = f"flexgen:form={form},batches=2"
    fewer, more = (
        lab.makespan_ns(replay(spec, copy=100, slots=count)) for count in (slots, slots + 4)
    )
    assert fewer >= more


# What is where.


@pytest.mark.parametrize(
    ("slots", "depth", "counts", "buffers"),
    [
        (1, 2, [0, 0, 0], 16),
        (16, 2, [0, 0, 0], 16),
        (17, 2, [1, 1, 1], 14),
        (18, 2, [2, 2, 2], 12),
        (19, 2, [3, 3, 3], 10),
        (23, 2, [7, 7, 7], 2),
        (24, 2, [8, 8, 8], 0),
        (8, 1, [0, 0, 0], 8),
        (10, 1, [1, 1, 1], 7),
        (15, 1, [4, 3, 3], 5),
        (24, 1, [8, 8, 8], 0),
    ],
)
def test_what_the_buffers_leave_is_shared_by_all_layers(
    slots: int, depth: int, counts: list[int], buffers: int
) -> None:
    """Three layers of eight: `depth` in a row must find room for all that is not resident."""
    found = resident_experts(slots, 3, 8, depth)
    assert found.tolist() == counts
    assert buffer_experts(8 - found, depth) == buffers


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 8), st.integers(1, 2))
def test_no_larger_share_would_fit(slots: int, layers: int, experts: int, depth: int) -> None:
    counts = resident_experts(slots, layers, experts, depth)
    held = int(counts.sum())
    assert counts.max() - counts.min() <= 1
    assert held == 0 or held + buffer_experts(experts - counts, depth) <= slots
    for total in range(held + 1, min(slots, layers * experts) + 1):
        more = np.array([total // layers + (at < total % layers) for at in range(layers)])
        assert total + buffer_experts(experts - more, depth) > slots


@pytest.mark.parametrize(
    ("spec", "batches"),
    [("", 2), ("batches=3", 3), ("batches=8", 8), ("batches=99", 8), ("batches=1", 1)],
)
def test_batches_have_four_sequences_at_least_unless_told_otherwise(
    make_setting: MakeSetting, spec: str, batches: int
) -> None:
    setting = make_setting(16)
    assert setting.sequences == 8
    assert choose(f"flexgen:{spec}").make(setting).place(setting).batches == batches


@pytest.mark.parametrize(
    ("sequences", "batches"), [(1, 1), (3, 1), (7, 1), (8, 2), (79, 19), (400, 19)]
)
def test_a_block_has_fewer_than_twenty_batches(
    make_setting: MakeSetting, sequences: int, batches: int
) -> None:
    setting = make_setting(16)._replace(sequences=sequences)
    assert choose("flexgen").make(setting).place(setting).batches == batches


def test_it_refuses_what_it_cannot_do(make_setting: MakeSetting) -> None:
    with pytest.raises(
        PolicyError, match=r"holds no expert: one takes .* and FlexGen computes none"
    ):
        choose("flexgen").make(make_setting(0))
    with pytest.raises(InputError, match="cpu_attention=true is not legal with kv=gpu"):
        choose("flexgen:cpu_attention=true").make(make_setting(4))


# The cost model.


@pytest.mark.parametrize(
    ("to_gpu", "to_host", "compute", "paper", "code"),
    [
        ((7, 5), (2, 1), (3, 4), 7 + 9 * 5, 7 + 9 * (5 + 4)),
        ((1, 5), (2, 6), (3, 4), 3 + 9 * 6, 3 + 9 * (5 + 6)),
        ((1, 2), (8, 1), (3, 4), 8 + 9 * 4, 8 + 9 * (2 + 4)),
    ],
)
def test_the_two_forms_of_the_cost_model(
    to_gpu: tuple[float, float], to_host: tuple[float, float], compute: tuple[float, float],
    paper: int, code: int,
) -> None:  # fmt: skip
    """Ten tokens: one prefill and nine decode steps, for each of 3 layers."""
    terms = {"to_gpu": to_gpu, "to_host": to_host, "compute": compute}
    assert total_ns(terms, 3, 10, by_code=False) == 3 * paper
    assert total_ns(terms, 3, 10, by_code=True) == 3 * code


@pytest.mark.parametrize(("tokens", "active", "load"), [(1, 2, 1), (2, 4, 1), (3, 4, 2), (4, 4, 2)])
def test_routing_that_is_even_meets_as_many_experts_as_it_can(
    tokens: int, active: int, load: int
) -> None:
    """Top 2 of 4 experts, which take 20 per token: two choices of each token."""
    costs = lab.make_costs()
    costs = costs._replace(expert_gpu_ns=np.tile(20 * np.arange(lab.TOKENS + 1), (4, 1)))
    assert pass_ns(costs, 0, 4, 2, tokens) == active * load * 20


def test_the_plan_shows_the_terms_of_the_cost_tables(make_setting: MakeSetting) -> None:
    """Two batches of 4 sequences with prompts of 4 tokens, of which 5 are generated.

    Of 17 slots 14 are buffers, so that one expert of each layer is resident and 7 are copied.
    """
    costs = lab.make_costs(
        3, attention=50, gate=10, gpu=20, combine=5, copy_ns_per_kib=100, kv_bytes=1024
    )
    costs = costs._replace(expert_gpu_ns=np.tile(20 * np.arange(lab.TOKENS + 1), (4, 1)))
    setting = make_setting(17, layers=3)._replace(
        costs=costs, budget_bytes=17 * 1024, sequences=8, step_tokens=32, kv_tokens=64
    )
    policy: Any = choose("flexgen:kv=host").make(setting)
    placement, terms = policy.plan(setting)
    shown = dict(placement.rows)
    assert shown["batches of a block"] == 2
    assert shown["experts on the GPU"] == 3
    # 7 experts, in decode also the keys and values of 8 sequences of 4 + 5 / 2 tokens
    to_gpu = (700, 700 + 8 * 650)
    to_host = (32 * 100, 8 * 100)
    # 8 experts are active: of 16 tokens with two choices each 4 meet each of them, of 4 just 1
    compute = (2 * (50 + 10 + 8 * 80) + 5, 2 * (50 + 10 + 8 * 20) + 5)
    expected = {"to_gpu": to_gpu, "to_host": to_host, "compute": compute}
    assert {name: (a * 1e6, b * 1e6) for name, a, b in terms.rows} == {
        name: pytest.approx(pair) for name, pair in expected.items()
    }
    # Or the CPU attends, for 3 each, to those of 26 in either batch; results of 512 bytes return.
    made = costs._replace(cpu_context_fp=3 * CONTEXT_UNIT, token_bytes=512)
    stays: Any = choose("flexgen:kv=host,cpu_attention=true").make(setting._replace(costs=made))
    decode = [row[2] * 1e6 for row in stays.plan(setting._replace(costs=made))[1].rows]
    assert decode == pytest.approx([700 + 8 * 50, 8 * 150, compute[1] + 2 * 26 * 3])
    paper = 3 * (3200 + 4 * 5900)
    code = 3 * (3200 + 4 * (5900 + 800))
    assert shown["s, paper"] == pytest.approx(paper / 1e9)
    assert shown["tokens/s, released code"] == pytest.approx(8 * 5 / (code / 1e9))


def test_attention_on_the_cpu_leaves_keys_and_values_where_they_are(
    run: Callable[..., Replayed],
) -> None:
    there, back = (
        run(f"flexgen:kv=host,cpu_attention={flag}", 8, batch=4) for flag in ("true", "false")
    )
    assert lab.spans(there, "kv_in") == []
    assert len(lab.spans(there, "attention_cpu")) == len(lab.spans(back, "kv_in"))
    assert (there.prepared.placement.cached == back.prepared.placement.cached).all()


def test_the_released_form_has_buffers_for_one_layer_of_experts(make_setting: MakeSetting) -> None:
    """12 slots for three layers of eight: 6 + 6 that are resident, against 12 buffers."""
    setting = make_setting(12, layers=3)
    for form, resident, buffers in (("ideal", 0, 12), ("released", 6, 6)):
        placement = choose(f"flexgen:form={form}").make(setting).place(setting)
        assert (placement.cached > 0).sum() == resident
        assert placement.staging_slots == buffers


def test_buffers_for_less_than_a_layer_are_announced(make_setting: MakeSetting) -> None:
    for slots, said in ((8, False), (7, True)):
        setting = make_setting(slots, layers=3)
        placement = choose("flexgen").make(setting).place(setting)
        assert bool(placement.notices) == said


def test_residents_are_the_first_ids(make_setting: MakeSetting) -> None:
    setting = make_setting(17, layers=3)
    cached = choose("flexgen").make(setting).place(setting).cached
    assert np.argwhere(cached == WHOLE).tolist() == [[0, 0], [1, 0], [2, 0]]
    assert all(a >= b for row in cached.tolist() for a, b in pairwise(row))
