from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moesim.policies.testing as lab
from moesim.policies.api import COMMANDS, Setting
from moesim.policies.ktransformers import protect
from moesim.policies.registry import choose
from moesim.sim.replay import Replayed
from moesim.traces.format import Trace
from moesim.types import COPY_IN, EXPERT_CPU, NONE, WHOLE

MakeSetting = Callable[..., Setting]
MakeDesk = Callable[[Setting], Any]
Run = Callable[..., Replayed]


class TestKTransformers(lab.PolicyConformance):
    policy = "ktransformers"
    needs_gpu = False


class TestKTransformersDeferring(lab.PolicyConformance):
    policy = "ktransformers:mask=random,deferred=1"
    needs_gpu = False


class TestKTransformersDeferringAll(lab.PolicyConformance):
    policy = "ktransformers:mask=frequency,deferred=7"
    needs_gpu = False


# Masks.


def on_gpu(spec: str, setting: Setting) -> list[list[int]]:
    """Return the experts of each layer that are resident; no slot is left or lent to staging."""
    placement = choose(spec).make(setting).place(setting)
    assert set(placement.cached.ravel().tolist()) <= {0, WHOLE}
    found = [np.flatnonzero(layer).tolist() for layer in placement.cached]
    assert placement.cache_slots.tolist() == [len(layer) for layer in found]
    assert placement.staging_slots == 0
    return found


@pytest.mark.parametrize(
    ("slots", "counts"),
    [(0, [0, 0, 0]), (1, [1, 0, 0]), (11, [4, 4, 3]), (24, [8] * 3), (99, [8] * 3)],
)
def test_uniform_gives_each_layer_equally_many(
    make_setting: MakeSetting, slots: int, counts: list[int]
) -> None:
    setting = make_setting(slots, layers=3)
    assert on_gpu("ktransformers", setting) == [list(range(n)) for n in counts]
    assert on_gpu("ktransformers:mask=uniform", setting) == on_gpu("static:by=expert", setting)


@pytest.mark.parametrize(
    ("slots", "counts"), [(0, [0, 0, 0]), (5, [5, 0, 0]), (11, [8, 3, 0]), (24, [8] * 3)]
)
def test_front_loading_fills_layer_after_layer(
    make_setting: MakeSetting, slots: int, counts: list[int]
) -> None:
    setting = make_setting(slots, layers=3)
    assert on_gpu("ktransformers:mask=front-loading", setting) == [list(range(n)) for n in counts]


def test_frequency_takes_the_most_used_pairs_of_all_layers(make_setting: MakeSetting) -> None:
    """3 slots: 9 uses, 6 uses, and of the pairs used 4 times that of the lower layer."""
    counts = np.zeros((3, 8), np.int64)
    counts[2, [5, 1]] = 9, 4
    counts[1, 7] = 6
    counts[0, 3] = 4
    setting = make_setting(3, layers=3)._replace(popularity=counts)
    assert on_gpu("ktransformers:mask=frequency", setting) == [[3], [7], [5]]
    assert on_gpu("ktransformers:mask=frequency", setting) == on_gpu(
        "static:by=expert,order=popularity", setting
    )
    assert on_gpu("ktransformers", setting) == [[0], [0], [0]]


def test_frequency_counts_what_is_not_replayed(run: Run, trace: Trace) -> None:
    done = run("ktransformers:mask=frequency", 7)
    other = trace.experts[trace.sequence != trace.sequence[0]]
    counts = np.array([np.bincount(other[:, la].ravel(), minlength=8) for la in range(3)])
    pairs = sorted(np.ndindex(3, 8), key=lambda at: (-counts[at], at))[:7]
    assert sorted(map(tuple, np.argwhere(done.prepared.placement.cached))) == sorted(pairs)
    assert done.prepared.placement.notices == ()


def test_frequency_says_so_if_nothing_is_left_to_count(run: Run) -> None:
    done = run("ktransformers:mask=frequency", 4, batch=4)
    assert np.argwhere(done.prepared.placement.cached).tolist() == [[0, 0], [0, 1], [1, 0], [2, 0]]
    assert any("nothing is left" in notice for notice in done.prepared.notices)


def test_random_is_the_same_for_every_seed_of_the_run(make_setting: MakeSetting) -> None:
    spec = "ktransformers:mask=random"
    found = on_gpu(spec, make_setting(7, layers=3, seed=1))
    assert sum(map(len, found)) == 7
    assert found == on_gpu(spec, make_setting(7, layers=3, seed=2))
    assert found != on_gpu("ktransformers", make_setting(7, layers=3))
    more = on_gpu(spec, make_setting(8, layers=3))
    assert sum(map(len, more)) == 8
    assert all(set(few) <= set(many) for few, many in zip(found, more, strict=True))


# Deferral.


def orders(
    spec: str, setting: Setting, desk: Any, tokens: list[list[int]], **at: Any
) -> list[tuple[Any, ...]]:
    """Return the orders for these choices, best first, in order: (cpu, expert, late), (gpu, expert)
    and (shared,)."""
    policy: Any = choose(spec).make(setting)
    desk.view.ids[:] = NONE
    loads: dict[int, int] = {}
    for row, chosen in enumerate(tokens):
        desk.view.ids[row, : len(chosen)] = chosen
        for expert in chosen:
            loads[expert] = loads.get(expert, 0) + 1
    policy.dispatch(desk.routed(loads, **at)._replace(tokens=len(tokens)), desk.plan)
    found: list[tuple[Any, ...]] = []
    for row in desk.take():
        name = COMMANDS[row[0]].removeprefix("run_").removeprefix("on_")
        found.append({"cpu": (name, row[2], row[3]), "gpu": (name, row[2])}.get(name, (name,)))
    return found


@pytest.fixture
def setting(make_setting: MakeSetting) -> Setting:
    """Return three layers of 8 experts, top 4, without a budget."""
    return make_setting(0, layers=3, top_k=4)


def test_the_cpu_comes_first_then_shared_experts_then_the_gpu(
    setting: Setting, make_desk: MakeDesk
) -> None:
    desk = make_desk(setting)
    desk.view.cached[0, [2, 6]] = WHOLE
    assert orders("ktransformers", setting, desk, [[6, 5, 2, 1]]) == [
        ("cpu", 5, 0), ("cpu", 1, 0), ("shared",), ("gpu", 6), ("gpu", 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("deferred", "late"), [(0, ""), (1, "1"), (2, "21"), (3, "521"), (4, "6521"), (9, "6521")]
)
def test_the_last_ranks_of_a_token_are_deferred(
    setting: Setting, make_desk: MakeDesk, deferred: int, late: str
) -> None:
    """6, 5, 2, 1 in order of their weights: the late ones queue behind the others."""
    found = orders(
        f"ktransformers:deferred={deferred}", setting, make_desk(setting), [[6, 5, 2, 1]]
    )
    chosen = [e for e in (6, 5, 2, 1) if str(e) not in late]
    behind = [e for e in (6, 5, 2, 1) if str(e) in late]
    expected = [("cpu", e, 0) for e in chosen] + [("cpu", e, 1) for e in behind]
    assert found == [*expected, ("shared",)]


def test_what_any_token_protects_no_token_defers(setting: Setting, make_desk: MakeDesk) -> None:
    """Two are protected of each token: 0 1, and 2 0. 3 is deferred by both, 2 by neither."""
    found = orders(
        "ktransformers:deferred=2", setting, make_desk(setting), [[0, 1, 2, 3], [2, 0, 3, 4]]
    )
    assert found == [
        ("cpu", 0, 0), ("cpu", 1, 0), ("cpu", 2, 0), ("cpu", 3, 1), ("cpu", 4, 1), ("shared",),
    ]  # fmt: skip


def test_experts_on_the_gpu_are_never_late_and_take_up_a_rank(
    setting: Setting, make_desk: MakeDesk
) -> None:
    """3 ranks are protected, the two on the GPU among them: the CPU has one now and one later."""
    desk = make_desk(setting)
    desk.view.cached[0, [6, 2]] = WHOLE
    assert orders("ktransformers:deferred=1", setting, desk, [[6, 5, 2, 1]]) == [
        ("cpu", 5, 0), ("cpu", 1, 1), ("shared",), ("gpu", 6), ("gpu", 2),
    ]  # fmt: skip
    desk.view.cached[0, [6, 2]] = 0
    desk.view.cached[0, 1] = WHOLE
    assert orders("ktransformers:deferred=1", setting, desk, [[6, 5, 2, 1]]) == [
        ("cpu", 6, 0), ("cpu", 5, 0), ("cpu", 2, 0), ("shared",), ("gpu", 1),
    ]  # fmt: skip


def test_the_last_layer_defers_nothing(setting: Setting, make_desk: MakeDesk) -> None:
    for layer, late in ((0, 1), (1, 1), (2, 0)):
        found = orders("ktransformers:deferred=4", setting, make_desk(setting), [[3]], layer=layer)
        assert found == [("cpu", 3, late), ("shared",)]


@given(
    tokens=st.lists(
        st.lists(st.integers(0, 7), unique=True, min_size=1, max_size=4), min_size=1, max_size=6
    ),
    deferred=st.integers(0, 5),
)
def test_protected_is_the_union_over_tokens(
    make_setting: MakeSetting, make_desk: MakeDesk, tokens: list[list[int]], deferred: int
) -> None:
    desk = make_desk(make_setting(0, top_k=4))
    desk.view.ids[:] = NONE
    for row, chosen in enumerate(tokens):
        desk.view.ids[row, : len(chosen)] = chosen
    immediate = np.ones(8, np.int64)
    protect(desk.view._replace(tokens=len(tokens)), deferred, immediate)
    union = {e for chosen in tokens for e in chosen[: max(0, 4 - deferred)]}
    assert set(np.flatnonzero(immediate).tolist()) == union


def test_a_run_says_that_deferral_changes_results(run: Run) -> None:
    assert run("ktransformers", 4).prepared.placement.notices == ()
    (notice,) = run("ktransformers:deferred=5", 4).prepared.placement.notices
    assert "up to 2 of each token's 2 experts" in notice
    assert "changes the model's results" in notice


# What it takes.


def timed(spec: str, **costs: int) -> Replayed:
    """Return one token through two layers without a budget: 0 1, then 2 3, each 70 on the CPU."""
    plain = {"attention": 100, "gate": 10, "gpu": 40, "cpu": 70, "combine": 5, "head": 7}
    made = lab.make_costs(2, **(plain | costs))
    return lab.run(choose(spec), [[[0, 1], [2, 3]]], made, slots=0)


def test_without_deferral_each_layer_waits_for_both() -> None:
    done = timed("ktransformers")
    layer = 100 + 10 + 2 * 70 + 5
    assert lab.makespan_ns(done) == 2 * layer + 7


def test_a_deferred_expert_overlaps_the_next_layers_attention_and_gate() -> None:
    """Layer 0 ends after expert 0, at 185; expert 1 ends at 250, before layer 1's gate at 295.

    Its result joins layer 1, which defers nothing: 295 + 2 * 70 + 5 + 7.
    """
    done = timed("ktransformers:deferred=1")
    assert lab.spans(done, "expert_cpu", "combine") == [
        ("cpu", "expert_cpu", 0, 0, 110, 180),
        ("gpu", "combine", 0, NONE, 180, 185),
        ("cpu", "expert_cpu", 0, 1, 180, 250),
        ("cpu", "expert_cpu", 1, 2, 295, 365),
        ("cpu", "expert_cpu", 1, 3, 365, 435),
        ("gpu", "combine", 1, NONE, 435, 440),
    ]
    assert lab.makespan_ns(done) == 447


def test_the_next_layers_experts_queue_behind_deferred_ones() -> None:
    """Attention and gate of 10 are over at 95, when expert 1 is still at work, until 150."""
    done = timed("ktransformers:deferred=1", attention=8, gate=2)
    assert [span[3:] for span in lab.spans(done, "expert_cpu")] == [
        (0, 10, 80), (1, 80, 150), (2, 150, 220), (3, 220, 290),
    ]  # fmt: skip


def test_no_weights_move_and_only_the_last_layer_is_on_time(run: Run) -> None:
    done = run("ktransformers:deferred=2", 7, batch=2)
    assert done.log is not None
    rows = done.log.operations
    assert not (rows["kind"] == COPY_IN).any()
    on_cpu = rows[rows["kind"] == EXPERT_CPU]
    assert set(on_cpu[on_cpu["layer"] == 2]["context"].tolist()) == {0}
    assert set(on_cpu[on_cpu["layer"] < 2]["context"].tolist()) == {1}


def test_deferral_is_faster_the_more_is_deferred(run: Run) -> None:
    """Not a law (the queue is one), but here: nothing else changes."""
    ends = [lab.makespan_ns(run(f"ktransformers:deferred={late}", 6)) for late in (0, 1, 2)]
    assert ends == sorted(ends, reverse=True)
    assert len(set(ends)) == 3


def test_whole_layers_are_what_static_places_by_layer(run: Run) -> None:
    """DALI's KTransformers: a layer's experts are all on one device; front to back or reverse."""
    done = run("static", 8)
    cached = done.prepared.placement.cached
    assert sorted((cached > 0).sum(axis=1).tolist()) == [0, 0, 8]
    front = run("ktransformers:mask=front-loading", 8).prepared.placement.cached
    assert (front == cached[::-1]).all()
