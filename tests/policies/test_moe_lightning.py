from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim.policies.testing as lab
from moesim.costs import build_costs
from moesim.errors import PolicyError
from moesim.model import load_model
from moesim.policies.api import Setting
from moesim.policies.moe_lightning import fewest_batches, problem_of, resident_part
from moesim.policies.moe_lightning_plan import (
    Problem,
    Solution,
    evaluate,
    improving,
    largest_share,
    prefill_s,
    solve,
    tokens_per_s,
    workspace_bytes,
)
from moesim.policies.registry import choose
from moesim.profile import load_profile
from moesim.sim.replay import Replayed
from moesim.types import WHOLE

MakeSetting = Callable[..., Setting]


class TestMoeLightning(lab.PolicyConformance):
    policy = "moe-lightning"


class TestMoeLightningOnTheGpu(lab.PolicyConformance):
    policy = "moe-lightning:attention=gpu,batches=2"


class TestMoeLightningWithoutPages(lab.PolicyConformance):
    policy = "moe-lightning:pages=false"


# The released solver.

GIB = 1 << 30

L4 = Problem(
    layers=32,
    experts=8,
    top_k=2,
    hidden=4096,
    width=14336,
    heads=32,
    kv_width=8 * 128,
    layer_bytes=2 * 3 * 4096 * 14336 * 8,
    dense_bytes=32 * (4 * 4096**2 + 4096**2),
    prompt=77,
    generate=32,
    gpu_bytes=24 * GIB,
    host_bytes=197880360960,
    link_bytes_per_s=16 * GIB,
    gpu_bytes_per_s=285 * GIB,
    host_bytes_per_s=76 * GIB,
    gpu_flops_per_s=104e12,
    host_flops_per_s=1.6e12,
)
"""Mixtral-8x7B on one L4, as the artifact's README (branch asplos25, in a fork's copy) has it."""


def test_the_published_policy() -> None:
    """README: 324 x 14, wg=0.055884688, link 0.1549 s per layer, 944.66 tokens/s; 2.5 GiB of
    weights outside the experts.
    """
    assert L4.dense_bytes == 2.5 * GIB
    found = solve(L4)
    assert found is not None
    assert (found.size, found.batches) == (324, 14)
    assert found.share == pytest.approx(0.055884688, abs=5e-10)
    assert found.layer_s == found.copy_s == pytest.approx(0.1549, abs=5e-5)
    assert found.layer_s * L4.layers == pytest.approx(4.957, abs=5e-4)
    assert tokens_per_s(L4, found) == pytest.approx(944.66, abs=5e-3)


@pytest.mark.parametrize(
    ("generate", "host_gib", "size", "batches"),
    [(64, 184.29, 228, 16), (128, 184.29, 164, 16), (256, 182, 132, 12)],
)
def test_the_other_published_policies(
    generate: int, host_gib: float, size: int, batches: int
) -> None:
    """Of the same table in the README. The solver takes the host memory that is free when it is
    started; with that of the first row the last one would be 164 x 10, and it is 132 x 12 where
    1.2 to 4.4 GiB less are free.
    """
    problem = L4._replace(generate=generate, host_bytes=host_gib * GIB)
    found = solve(problem)
    assert found is not None
    assert (found.size, found.batches) == (size, batches)


def test_the_published_memory() -> None:
    """README: 147.282 of 147.432 GiB of host memory are filled; 15 micro-batches are too many."""
    found = evaluate(L4, 324, 14)
    assert found is not None
    context = 4 * (77 + 32) * 1024 * 4536 * 32
    home = L4.layer_bytes * 34 * (1 - found.share) + context + 2 * 4096 * 4536 * 77
    assert home / GIB == pytest.approx(147.282, abs=5e-4)
    assert 0.8 * L4.host_bytes / GIB == pytest.approx(147.432, abs=5e-4)
    assert evaluate(L4, 324, 15) is None


def test_the_workspace_by_hand() -> None:
    """Prompts of 2 tokens, micro-batches of 3 of 6 sequences; width 10, hidden 4, keys 2."""
    problem = L4._replace(prompt=2, hidden=4, width=10, kv_width=2, top_k=2)
    inputs = 4 * 4 * 6 + 2 * 4 * 6 * 2  # of a micro-batch, and what stays of all sequences
    buffers = 2 * 2 * 2 * 2 * 6 / 2  # two of keys and values at 2 bytes, for 6 tokens
    kernel = 2.4 * 6 * 2 * (4 + 3 * 10)
    assert workspace_bytes(problem, 3, 6) == pytest.approx(inputs + 2 * buffers + kernel)
    # With prompts of nothing, decoding needs more: two states for each sequence.
    assert workspace_bytes(problem._replace(prompt=0), 3, 6) == 4 * 4 * 6


SMALL = Problem(
    layers=4, experts=2, top_k=1, hidden=2, width=3, heads=1, kv_width=1, layer_bytes=100,
    dense_bytes=14, prompt=0, generate=5, gpu_bytes=(14 + 16 + 320) / 0.86, host_bytes=1e9,
    link_bytes_per_s=10, gpu_bytes_per_s=60, host_bytes_per_s=7, gpu_flops_per_s=36,
    host_flops_per_s=1.5,
)  # fmt: skip
"""Round numbers: 4 layers of 100 bytes."""


def test_a_small_case_by_hand() -> None:
    """One micro-batch of two sequences."""
    problem = SMALL
    found = evaluate(problem, 2, 1)
    # 320 bytes are left of which 200 would be buffers: (320 - 200) / (400 - 200)
    gpu = max(6 * 2 * 2 * 3 * 1 / 36, (2 * 2 * 5 + 100) / 60)
    host = max(2 * 2 * 5 * (2 + 1) / 1.5, 2 * (4 * 2 + 4 * 5) / 7)
    assert found is not None
    assert found.share == pytest.approx(0.6)
    assert found.copy_s == pytest.approx(4)
    assert (found.gpu_s, found.host_s) == (gpu, host)
    assert (gpu, host) == (2, 40)
    # two sequences, five tokens each, in four steps of four layers
    assert tokens_per_s(problem, found) == pytest.approx(10 / (40 * 4 * 4))
    # a prefill without tokens only copies
    assert prefill_s(problem, found) == pytest.approx(max(4, 100 / 60))


def test_of_equally_good_policies_the_last_one_is_taken() -> None:
    """The CPU needs 30 s for a sequence, in whatever micro-batch. Each has a workspace of 8 bytes,
    which leaves room for two layers of buffers up to 17; four micro-batches of 4 are tried last.
    """
    problem = SMALL._replace(host_flops_per_s=1)
    tried = [found for size in (1, 2, 3, 4) for found in improving(problem, size)]
    assert {tokens_per_s(problem, found) for found in tried} == {5 / (30 * 4 * 4)}
    assert [found.size for found in tried] == [1] * 17 + [2] * 8 + [3] * 5 + [4] * 4
    assert evaluate(problem, 36, 1) is None
    assert solve(problem) == tried[-1]


@pytest.mark.parametrize(
    ("layers", "room", "share"),
    [
        (4, 19, None),
        (4, 20, 0.0),
        (4, 30, 0.5),
        (4, 40, 1.0),
        (2, 20, 1.0),
        (2, 19, None),
        (1, 10, 1.0),
    ],
)
def test_the_share_at_its_limits(layers: int, room: int, share: float | None) -> None:
    """Layers of 10 bytes: 20 for the buffers alone, 10 for each layer that is resident."""
    assert largest_share(L4._replace(layers=layers, layer_bytes=10), room) == share


def test_a_prefill_by_hand() -> None:
    """Two micro-batches of 2 sequences, 3 tokens each; hidden 2, width 3, one head, keys of 1."""
    problem = L4._replace(
        top_k=1, hidden=2, width=3, heads=1, kv_width=1, layer_bytes=100, prompt=3,
        link_bytes_per_s=10, gpu_bytes_per_s=60, gpu_flops_per_s=36,
    )  # fmt: skip
    found = Solution(size=2, batches=2, share=0.5, copy_s=0, gpu_s=0, host_s=0)
    experts = max(6 * 6 * 2 * 3 / 36, (2 * 6 * 5 + 100) / 60)
    attention = max(2 * 2 * 3 * 3 * (2 + 1) / 36, 2 * (4 * 3 * 2 + 4 * 3 * 1) / 60)
    assert (experts, attention) == (6, 3)
    # 50 bytes of weights and 2 for each element of 12 hidden states take 9.8 s
    assert prefill_s(problem, found) == 2 * (6 + 3)
    assert prefill_s(problem._replace(link_bytes_per_s=5), found) == (50 + 2 * 12 * 2) / 5


@given(
    layers=st.integers(1, 6), layer_bytes=st.integers(1, 50), room=st.integers(-10, 400),
)  # fmt: skip
def test_the_largest_share_is_what_fits(layers: int, layer_bytes: int, room: int) -> None:
    """The linear program's optimum, against trying shares out."""
    problem = L4._replace(layers=layers, layer_bytes=layer_bytes)

    def fits(share: float) -> bool:
        return layer_bytes * (layers * share + 2 * (1 - share)) <= room + 1e-9

    fitting = [k / 1000 for k in range(1001) if fits(k / 1000)]
    found = largest_share(problem, room)
    if layers > 2 or not fitting:
        assert (found is None) == (not fitting)
    if found is not None:
        assert fits(found)
        assert max(fitting, default=found) <= found + 1e-3


@given(
    host=st.integers(60, 400), gpu=st.integers(12, 40), prompt=st.integers(1, 800),
    generate=st.integers(2, 200),
)  # fmt: skip
@settings(max_examples=25)
def test_no_pair_that_is_tried_is_better(host: int, gpu: int, prompt: int, generate: int) -> None:
    problem = L4._replace(
        prompt=prompt, generate=generate, host_bytes=host * GIB, gpu_bytes=gpu * GIB
    )
    best = solve(problem)
    tried = [
        tokens_per_s(problem, found)
        for size in (1, 2, 3, 4, *range(36, 8000, 32))
        for found in improving(problem, size)
    ]
    assert (best is None) == (not tried)
    if best is not None:
        assert tokens_per_s(problem, best) == max(tried)


@given(st.integers(8, 128), st.integers(1, 77))
def test_few_sequences_with_short_prompts_wait_for_the_link_alone(
    sequences: int, prompt: int
) -> None:
    """From 8 to 128 sequences in at most 14 micro-batches: T = wi wc / B_link."""
    problem = L4._replace(prompt=prompt)
    for batches in (1, 3, 14):
        found = evaluate(problem, max(1, sequences // batches), batches)
        assert found is not None
        assert found.layer_s == problem.layer_bytes * (1 - found.share) / problem.link_bytes_per_s


# What is where.


def small(make_setting: MakeSetting, budget_bytes: int, **changes: Any) -> Setting:
    """Return a setting of experts of 1024 bytes, in 4 layers of 8."""
    costs = lab.make_costs(4, attention=50, gate=10, gpu=20, combine=5, copy_ns_per_kib=100)
    setting = make_setting(1, layers=4)
    return setting._replace(costs=costs, budget_bytes=budget_bytes, **changes)


@pytest.mark.parametrize(
    ("experts", "part"),
    [
        (0.99 + 16, 63), (1 + 16, 64), (16, 0), (24, 512), (31, 960), (31.99, 1023), (32, 1024),
        (15, 0), (3, 0),
    ],
)  # fmt: skip
def test_the_same_part_of_every_expert_is_resident(
    make_setting: MakeSetting, experts: float, part: int
) -> None:
    """A budget of e experts: 32 p + 16 (1 - p) = e, in 1024ths."""
    setting = small(make_setting, int(experts * 1024))
    placement = choose("moe-lightning").make(setting).place(setting)
    assert (placement.cached == part).all()
    assert resident_part(setting) == part
    assert placement.staging_slots == (0 if part == WHOLE else min(16, int(experts)))
    assert placement.staging_slots == 0 or placement.staging_slot_bytes == 1024 - part
    assert placement.kv_on_host
    assert placement.attention_on_cpu


def test_a_smaller_buffer_than_a_layer_is_announced(make_setting: MakeSetting) -> None:
    for experts, said in ((8, False), (7, True)):
        setting = small(make_setting, experts * 1024)
        placement = choose("moe-lightning").make(setting).place(setting)
        assert bool(placement.notices) == said


@pytest.mark.parametrize(
    ("spec", "sequences", "batches"),
    [("", 8, 3), ("", 2, 2), ("batches=5", 8, 5), ("batches=9", 8, 8), ("batches=1", 8, 1)],
)
def test_there_are_three_micro_batches_or_as_told(
    make_setting: MakeSetting, spec: str, sequences: int, batches: int
) -> None:
    setting = small(make_setting, 16 * 1024, sequences=sequences)
    placement = choose(f"moe-lightning:{spec}").make(setting).place(setting)
    assert placement.batches == batches
    # Eight experts of 1024 bytes in as many pages.
    assert placement.chunk_bytes == -(-8 * 1024 // batches)
    assert placement.link == "priority"


def test_more_micro_batches_where_the_workspace_asks_for_them() -> None:
    """Mixtral-8x7B on 24 GiB with 12 GiB of experts: the largest prefill that fits beside them."""
    model, machine = load_model("mixtral-8x7b"), load_profile("rtx3090-pcie4-ddr4")[0]
    sequences, prompt = 400, 512
    setting = Setting(
        layers=32, experts=8, top_k=2, budget_bytes=12 * GIB, precision=0,
        costs=build_costs(model, machine, 400, 400), sequences=sequences,
        step_tokens=sequences * prompt, popularity=np.zeros((32, 8), np.int64), seed=0,
        model=model, machine=machine, kv_tokens=sequences * (prompt + 31),
    )  # fmt: skip
    problem = problem_of(setting)
    assert problem is not None
    assert (problem.prompt, problem.generate) == (512, 32)
    assert (problem.hidden, problem.width, problem.kv_width) == (4096, 14336, 1024)
    batches = fewest_batches(setting)
    assert 3 < batches < sequences
    room = machine.gpu.memory_bytes - 12 * GIB - problem.dense_bytes
    fits = [
        workspace_bytes(problem, -(-sequences // count), sequences) <= room
        for count in (batches - 1, batches)
    ]
    assert fits == [False, True]
    for spec, said in (("", 0), (f"batches={batches - 1}", 1)):
        notices = choose(f"moe-lightning:{spec}").make(setting).place(setting).notices
        assert len([n for n in notices if "GiB more GPU memory" in n]) == said
    # Nothing fits: three, which is said.
    full = setting._replace(budget_bytes=20 * GIB)
    placement = choose("moe-lightning").make(full).place(full)
    assert placement.batches == fewest_batches(full) == 3
    assert "prompts in 3 micro-batches need" in placement.notices[0]


def test_it_refuses_to_do_without_a_gpu(make_setting: MakeSetting) -> None:
    with pytest.raises(
        PolicyError, match=r"holds no expert: one takes .* and MoE-Lightning computes none"
    ):
        choose("moe-lightning").make(make_setting(0))


# What it takes.


def replay(
    spec: str, *, copy: int = 64, layers: int = 3, sequences: int = 3, steps: int = 4,
    slots: int = 8, **costs: Any,
) -> Replayed:  # fmt: skip
    """Return a run of prompts of one token each; every token chooses experts 2 and 0 of 4."""
    quiet = {
        "attention": 50,
        "gate": 10,
        "gpu": 20,
        "combine": 5,
        "token_bytes": 64,
        "kv_bytes": 64,
    }
    made = lab.make_costs(layers, copy_ns_per_kib=copy, **(quiet | costs))
    return lab.run(
        choose(spec), [[[2, 0]] * layers] * (sequences * steps), made, slots=slots,
        prompts=(1,) * sequences,
    )  # fmt: skip


def steps_of(done: Replayed) -> list[int]:
    """Return how long each step took."""
    ends = [0, *(head.now_ns for head in done.heads)]
    return [end - start for start, end in pairwise(ends)]


@pytest.mark.parametrize("slots", [8, 10])
@pytest.mark.parametrize("sequences", [8, 12])
def test_short_prompts_degenerate_to_the_link(slots: int, sequences: int) -> None:
    """T = wi wc / B_link for each layer: copies of 1280 ns per expert hide everything else.

    A layer has 4 experts, and 12 are all; 8 slots are buffers, and of 10 the half is resident.
    """
    made: dict[str, Any] = {"slots": slots, "sequences": sequences, "steps": 5}
    done = replay("moe-lightning", copy=1280, token_bytes=0, cpu_context=1, **made)
    share = (slots - 8) / (12 - 8)
    layer = 4 * (1 - share) * 1280
    assert done.prepared.policy.part == share * WHOLE
    # No copies are ahead of the first step, and none follow the last.
    assert steps_of(done)[2:-1] == [3 * layer] * 2


def test_a_layer_takes_the_gpu_and_the_cpu_in_turn() -> None:
    """Three micro-batches: projections and what the CPU attends to, gates, two experts each, read
    by every micro-batch, and a COMBINE. Queries, keys and values of a batch go out in 8, its result
    comes back in 4; a token attends to what came before, 100 each.
    """
    done = replay("moe-lightning", copy=64, cpu_context=100, slots=12, steps=3)
    for step, context in ((1, 2), (2, 3)):
        attended = 50 + 8 + 3 * 100 * context + 4
        layer = attended + 10 + 3 * 2 * 20 + 5
        assert steps_of(done)[step] == 3 * layer


@pytest.mark.parametrize(("pages", "waits"), [("true", 1), ("false", 2)])
def test_a_hidden_state_waits_for_a_page_or_for_all_before_it(pages: str, waits: int) -> None:
    """All copies of the next layer are ordered when the CPU has attended for the first batch."""
    made: dict[str, Any] = {"copy": 1024, "steps": 2, "sequences": 8, "cpu_context": 1}
    done = replay(f"moe-lightning:pages={pages},batches=8", **made)
    page = 4 * 1024 // 8
    returned = [span for span in lab.spans(done, "return") if span.layer == 1]
    attended = [span for span in lab.spans(done, "attention_cpu") if span.layer == 1]
    delays = [b.start_ns - a.end_ns for a, b in zip(attended, returned, strict=True)]
    if waits == 1:
        assert 0 < max(delays) <= page
    else:
        assert max(delays) > 1024


def test_pages_never_make_it_slower() -> None:
    for copy in (64, 320, 1024):
        made: dict[str, Any] = {"copy": copy, "sequences": 8, "cpu_context": 20}
        paged, plain = (
            lab.makespan_ns(replay(f"moe-lightning:pages={pages}", **made))
            for pages in ("true", "false")
        )
        assert paged <= plain


@pytest.mark.parametrize("attention", ["cpu", "gpu"])
def test_all_that_is_not_resident_is_copied_whatever_is_chosen(attention: str) -> None:
    done = replay(f"moe-lightning:attention={attention}", slots=10, steps=3)
    copies = lab.spans(done, "copy_in")
    assert len({(span.layer, span.expert) for span in copies}) == 12
    assert len(copies) == 3 * 12
    assert done.prepared.host.counts.sum(axis=0)[1, :, 0].tolist()[3:] == [0, 0]


def test_keys_and_values_cross_the_link_for_the_gpu_only() -> None:
    """With 512 bytes, a token that is kept costs the link 32 ns in every layer and step."""
    made: dict[str, Any] = {"kv_bytes": 512, "slots": 12, "steps": 3}
    on_cpu, on_gpu = (
        replay(f"moe-lightning:attention={where}", **made) for where in ("cpu", "gpu")
    )
    assert lab.spans(on_cpu, "kv_in") == []
    brought = lab.spans(on_gpu, "kv_in")
    assert len(brought) == 2 * 3 * 3
    assert {span.end_ns - span.start_ns for span in brought} == {32, 64}
    assert lab.spans(on_gpu, "attention_cpu") == []


# What `moesim plan` shows.


def test_the_plan_counts_by_the_cost_tables(make_setting: MakeSetting) -> None:
    """Three micro-batches of 3 sequences at most, 16 of 32 experts are buffers; 8 of a layer are
    streamed, 12 ns each, and 6 are active, of 3 tokens with two choices each.
    """
    setting = small(make_setting, 16 * 1024, kv_tokens=90)
    costs = lab.make_costs(
        4, attention=50, gate=10, gpu=20, combine=5, shared=30, copy_ns_per_kib=64, cpu_context=7
    )
    setting = setting._replace(costs=costs)
    policy: Any = choose("moe-lightning").make(setting)
    (table,) = policy.plan(setting)
    shown = dict(table.rows)
    gpu, cpu = 3 * (50 + 10 + 6 * 20) + 5 + 30, 3 * 30 * 7
    assert shown["layer: link, ms"] == pytest.approx(8 * 64 / 1e6)
    assert shown["layer: GPU, ms"] == pytest.approx(gpu / 1e6)
    assert shown["layer: CPU, ms"] == pytest.approx(cpu / 1e6)
    assert shown["step side by side, s"] == pytest.approx(4 * 630 / 1e9)
    # The first projection and the last gate have nothing of the CPU beside them, nor have experts.
    in_turn = 50 + 630 + 10 + 3 * 6 * 20 + 30 + 5
    assert shown["step in lock-step, s"] == pytest.approx(4 * in_turn / 1e9)
    assert shown["tokens/s in lock-step"] == pytest.approx(8e9 / (4 * in_turn))


def test_the_plan_counts_attention_on_the_gpu(make_setting: MakeSetting) -> None:
    """Each of 3 micro-batches attends to 30 tokens at most, for 9 each; 64 bytes of a token."""
    costs = lab.make_costs(4, attention=50, gate=10, gpu=20, copy_ns_per_kib=64, kv_bytes=64)
    costs = costs._replace(context_fp=lab.per_attended(0, 9))
    setting = small(make_setting, 16 * 1024, kv_tokens=90)._replace(costs=costs)
    policy: Any = choose("moe-lightning:attention=gpu").make(setting)
    shown = dict(policy.plan(setting)[0].rows)
    gpu = 3 * (50 + 30 * 9 + 10 + 6 * 20)
    assert shown["layer: link, ms"] == pytest.approx((8 * 64 + 3 * 30 * 4) / 1e6)
    assert shown["layer: GPU, ms"] == pytest.approx(gpu / 1e6)
    assert shown["layer: CPU, ms"] == 0
    assert shown["step in lock-step, s"] == shown["step side by side, s"]
    assert shown["step in lock-step, s"] == pytest.approx(4 * gpu / 1e9)


def test_the_plan_shows_the_solver_for_a_known_machine(run: Callable[..., Replayed]) -> None:
    done = run("moe-lightning", 8, batch=4)
    policy: Any = done.prepared.policy
    tables = policy.plan(done.prepared.setting)
    problem = problem_of(done.prepared.setting)
    assert problem is not None
    found = solve(problem)
    assert found is not None
    shown = dict(tables[1].rows)
    assert shown["sequences"] == found.size * found.batches
    assert shown["tokens/s as it counts them"] == tokens_per_s(problem, found)


def test_the_plan_says_if_nothing_fits(run: Callable[..., Replayed]) -> None:
    setting = run("moe-lightning", 8, batch=4).prepared.setting
    assert setting.machine is not None
    gpu = msgspec.structs.replace(setting.machine.gpu, memory_bytes=1 << 20)
    machine = msgspec.structs.replace(setting.machine, gpu=gpu)
    setting = setting._replace(machine=machine)
    policy: Any = choose("moe-lightning").make(setting)
    tables = policy.plan(setting)
    assert tables[1].rows == ()
    assert "Nothing fits" in tables[1].note
