from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.costs import copy_ns
from moesim.policies.api import CACHE, COMMANDS, STAGING, Setting, View
from moesim.policies.dali import Dali, estimate_costs, swap
from moesim.policies.parts.cache import new_window, window_count, window_due
from moesim.policies.registry import Parameter, choose, parameters_of
from moesim.sim.metrics import summarize
from moesim.sim.replay import Replayed
from moesim.traces.format import Trace
from moesim.traces.synthetic import synthesize
from moesim.types import CAUSES, COPY_IN, H2D, NONE, PREFILL, WHOLE

MakeSetting = Callable[..., Setting]
MakeDesk = Callable[[Setting], Any]
Run = Callable[..., Replayed]

Order = tuple[str | int, ...]


def orders(rows: list[tuple[int, ...]]) -> list[Order]:
    """Return a plan's rows as (command, expert), or (command, layer, expert, ...) for other layers.

    Fetches are (fetch, layer, expert, where to, urgent or not).
    """
    read: list[Order] = []
    for code, layer, expert, a, b, c, d, e in rows:
        name = COMMANDS[code]
        if name == "fetch":
            assert (a, b, e) == (WHOLE, NONE, 0)
            read.append((name, layer, expert, {STAGING: "staging", CACHE: "cache"}[c], d))
        elif name == "evict":
            assert (a, b, c, d, e) == (0, 0, 0, 0, 0)
            read.append((name, layer, expert))
        else:
            assert (layer, a, b, c, d, e) == (NONE, 0, 0, 0, 0, 0)
            read.append((name, expert))
    return read


def exchanges(layer: int, *pairs: tuple[int, int]) -> list[Order]:
    """Return the orders that replace each `out` by its `in` in the cache."""
    found: list[Order] = []
    for out, into in pairs:
        found += [("evict", layer, out), ("fetch", layer, into, "cache", 0)]
    return found


def made(spec: str, setting: Setting) -> Dali:
    policy = choose(spec).make(setting)
    assert isinstance(policy, Dali)
    return policy


def count_and_maybe_swap(policy: Dali, desk: Any, loads: dict[int, int], **at: Any) -> list[Order]:
    """Return what the policy orders after a layer that had these loads."""
    policy.after_layer(desk.routed(loads, **at), desk.plan)
    return orders(desk.take())


def test_window_counts_loads_of_its_layer_until_it_is_cleared() -> None:
    window = new_window(2, 4)
    active = np.array([3, 1, 0, 0])
    loads = np.array([9, 2, 0, 5])

    window_count(window, 1, active, 2, loads)
    window_count(window, 1, active, 1, loads)

    assert window.score.tolist() == [[0, 0, 0, 0], [0, 2, 0, 10]]
    assert window.steps.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("size", "early", "due"),
    [
        (4, 0, [4, 8, 12]),
        (3, 0, [3, 6, 9, 12]),
        (1, 0, list(range(1, 13))),
        (4, 1, [1, 5, 9]),
        (3, 1, [1, 4, 7, 10]),
        (1, 1, list(range(1, 13))),
    ],
)
def test_window_is_due_after_each_full_one_or_from_step_0_on(
    size: int, early: int, due: list[int]
) -> None:
    window = new_window(1, 2)
    nobody = np.zeros(2, np.int64)
    found = []
    for step in range(1, 13):
        window_count(window, 0, nobody, 0, nobody)
        if window_due(window, 0, size, early):
            found.append(step)
    assert found == due


def swapped(
    desk: Any, score: list[int], resident: set[int], size: int, guarded: int = 0, literal: int = 0
) -> list[Order]:
    """Return the orders of one swap in layer 1."""
    window = new_window(2, len(score))
    window.score[1] = score
    desk.view.cached[:] = 0
    desk.view.cached[1, list(resident)] = WHOLE
    absent, rest = np.zeros((2, len(score)), np.int64)
    swap(desk.view._replace(layer=1), desk.plan, window, size, guarded, literal, absent, rest)
    assert window.score[1].tolist() == score
    return orders(desk.take())


@pytest.fixture
def desk(make_desk: MakeDesk, make_setting: MakeSetting) -> Any:
    return make_desk(make_setting(10))


def test_swap_brings_in_the_highest_and_gives_up_the_lowest(desk: Any) -> None:
    score = [5, 0, 3, 9, 7, 1, 8, 2]
    assert swapped(desk, score, {0, 2, 3, 5}, 1) == exchanges(1, (5, 6))
    assert swapped(desk, score, {0, 2, 3, 5}, 2) == exchanges(1, (5, 6), (2, 4))


def test_swap_breaks_ties_by_ascending_id(desk: Any) -> None:
    assert swapped(desk, [4] * 8, {1, 4, 6}, 2) == exchanges(1, (1, 0), (4, 2))
    assert swapped(desk, [4] * 8, {1, 4, 6}, 2, literal=1) == exchanges(1, (1, 0), (4, 2))


def test_swap_asks_for_no_gain(desk: Any) -> None:
    """Nothing was used: an exchange without a use, as nothing in the paper forbids."""
    assert swapped(desk, [0] * 8, {0, 1}, 1) == exchanges(1, (0, 2))
    assert swapped(desk, [9, 8, 1, 0, 0, 0, 0, 0], {0, 1}, 2) == exchanges(1, (1, 2), (0, 3))


def test_swap_is_clamped_to_what_is_there_and_what_is_not(desk: Any) -> None:
    score = [8, 7, 6, 5, 4, 3, 2, 1]
    assert swapped(desk, score, {0, 3}, 8) == exchanges(1, (3, 1), (0, 2))
    assert swapped(desk, score, set(range(7)), 8) == exchanges(1, (6, 7))
    assert swapped(desk, score, set(range(8)), 8) == []
    assert swapped(desk, score, set(), 8) == []


def test_guarded_swap_leaves_out_pairs_without_a_gain(desk: Any) -> None:
    score = [5, 4, 3, 3, 6, 0, 0, 0]
    assert swapped(desk, score, {0, 1, 2}, 3) == exchanges(1, (2, 4), (1, 3), (0, 5))
    assert swapped(desk, score, {0, 1, 2}, 3, guarded=1) == exchanges(1, (2, 4))
    assert swapped(desk, [3, 3, 3, 3], {0, 1}, 2, guarded=1) == []


def test_literal_swap_gives_up_the_highest(desk: Any) -> None:
    score = [5, 4, 3, 3, 6, 0, 0, 1]
    assert swapped(desk, score, {0, 1, 2}, 2, literal=1) == exchanges(1, (0, 4), (1, 3))


def test_literal_guarded_swap_judges_each_pair(desk: Any) -> None:
    """Pairs are (9, 6), which gains nothing, and (1, 5), which does."""
    assert swapped(desk, [9, 1, 6, 5], {0, 1}, 2, guarded=1, literal=1) == exchanges(1, (1, 3))


def test_swap_follows_each_full_window_and_scores_begin_anew(
    make_desk: MakeDesk, make_setting: MakeSetting
) -> None:
    """In the second window expert 7 leads, though expert 6 does over both."""
    setting = make_setting(8)
    policy = made("dali:w_size=3,u_size=1", setting)
    desk = make_desk(setting)
    desk.view.cached[0, [0, 1]] = WHOLE
    desk.view.cached[1, [0, 1]] = WHOLE

    assert count_and_maybe_swap(policy, desk, {0: 2, 6: 9}) == []
    assert count_and_maybe_swap(policy, desk, {6: 1}) == []
    assert policy.window.score[0].tolist() == [2, 0, 0, 0, 0, 0, 10, 0]
    assert count_and_maybe_swap(policy, desk, {5: 1}) == exchanges(0, (1, 6))
    assert not policy.window.score.any()

    desk.view.cached[0] = [WHOLE, 0, 0, 0, 0, 0, WHOLE, 0]
    assert count_and_maybe_swap(policy, desk, {7: 3, 6: 1}) == []
    assert count_and_maybe_swap(policy, desk, {5: 2}) == []
    assert count_and_maybe_swap(policy, desk, {4: 1}, layer=1) == []
    assert count_and_maybe_swap(policy, desk, {6: 1}) == exchanges(0, (0, 7))
    assert policy.window.score.tolist() == [[0] * 8, [0, 0, 0, 0, 1, 0, 0, 0]]


def test_first_swap_after_step_0_changes_when_and_nothing_else(
    make_desk: MakeDesk, make_setting: MakeSetting
) -> None:
    setting = make_setting(8)
    late, early = (
        made(f"dali:w_size=3,u_size=1,first_swap={when}", setting)
        for when in ("after_window", "after_step0")
    )
    desk = make_desk(setting)
    desk.view.cached[0, 0] = WHOLE
    seen: dict[str, list[int]] = {"late": [], "early": []}
    for step in range(9):
        for name, policy in (("late", late), ("early", early)):
            if found := count_and_maybe_swap(policy, desk, {6: 1}):
                assert found == exchanges(0, (0, 6))
                seen[name].append(step)
    assert seen == {"late": [2, 5, 8], "early": [0, 3, 6]}


@pytest.mark.parametrize(
    ("spec", "due"),
    [
        ("dali:w_size=2,u_size=1", [2, 4]),
        ("dali:w_size=2,u_size=1,count_prefill=true", [1, 3]),
        ("dali:w_size=2,u_size=1,count_prefill=true,first_swap=after_step0", [0, 2, 4]),
        ("dali:w_size=2,u_size=1,cache=static", []),
        ("dali:w_size=2,u_size=1,cache=lru", []),
    ],
)
def test_prompt_counts_only_on_request(
    make_desk: MakeDesk, make_setting: MakeSetting, spec: str, due: list[int]
) -> None:
    """Step 0 is the prefill, in which expert 6 is used most."""
    setting = make_setting(8)
    policy = made(spec, setting)
    desk = make_desk(setting)
    desk.view.cached[0, 0] = WHOLE
    found = {
        step: ordered
        for step in range(5)
        if (
            ordered := count_and_maybe_swap(
                policy, desk, {7: 1} if step else {6: 50}, **({} if step else {"phase": PREFILL})
            )
        )
    }

    assert list(found) == due
    with_prompt = "count_prefill=true" in spec
    for step, ordered in found.items():
        into = 6 if with_prompt and step == due[0] else 7
        assert ordered == exchanges(0, (0, into))


EXPERTS = 6


@settings(deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.booleans(),
            st.integers(0, 1),
            st.dictionaries(st.integers(0, EXPERTS - 1), st.integers(1, 3), max_size=EXPERTS),
        ),
        max_size=24,
    ),
    resident=st.tuples(*[st.sets(st.integers(0, EXPERTS - 1))] * 2),
    w_size=st.integers(1, 4),
    u_size=st.integers(1, 7),
    literal=st.booleans(),
    guarded=st.booleans(),
    early=st.booleans(),
    prefill=st.booleans(),
)
def test_cache_is_algorithm_2(
    make_desk: MakeDesk,
    make_setting: MakeSetting,
    steps: list[tuple[bool, int, dict[int, int]]],
    resident: tuple[set[int], set[int]],
    w_size: int,
    u_size: int,
    literal: bool,
    guarded: bool,
    early: bool,
    prefill: bool,
) -> None:
    setting = make_setting(8, experts=EXPERTS)
    policy = made(
        f"dali:w_size={w_size},u_size={u_size},evict={'literal' if literal else 'lowest'},"
        f"swap={'guarded' if guarded else 'strict'},count_prefill={str(prefill).lower()},"
        f"first_swap={'after_step0' if early else 'after_window'}",
        setting,
    )
    desk = make_desk(setting)
    cached = [set(layer) for layer in resident]
    scores = [[0] * EXPERTS, [0] * EXPERTS]
    i = [0, 0]
    for decode, layer, loads in steps:
        desk.view.cached[:] = 0
        for at in (0, 1):
            desk.view.cached[at, list(cached[at])] = WHOLE
        at_phase = {} if decode else {"phase": PREFILL}
        found = count_and_maybe_swap(policy, desk, loads, layer=layer, **at_phase)

        expected: list[Order] = []
        if decode or prefill:
            s, inside = scores[layer], cached[layer]
            for expert, load in loads.items():
                s[expert] += load
            if (i[layer] if early else i[layer] + 1) % w_size == 0:
                absent = set(range(EXPERTS)) - inside
                n = min(u_size, len(inside), len(absent))
                sign = -1 if literal else 1
                into = sorted(absent, key=lambda e, s=s: (-s[e], e))[:n]  # type: ignore[misc]
                out = sorted(inside, key=lambda e, s=s: (sign * s[e], e))[:n]  # type: ignore[misc]
                pairs = [
                    (o, e) for o, e in zip(out, into, strict=True) if not guarded or s[e] > s[o]
                ]
                expected = exchanges(layer, *pairs)
                cached[layer] = inside - {o for o, _ in pairs} | {e for _, e in pairs}
                scores[layer] = [0] * EXPERTS
            i[layer] += 1
        assert found == expected


def prefetches(policy: Dali, view: View, desk: Any) -> list[tuple[int, int]]:
    """Return (layer, expert) of each background fetch into staging, in order."""
    policy.dispatch(view, desk.plan)
    rows = [order for order in orders(desk.take()) if order[0] == "fetch"]
    assert all(order[3:] == ("staging", 0) for order in rows)
    return [(int(order[1]), int(order[2])) for order in rows]


def test_prefetches_the_experts_of_most_tokens_and_skips_what_is_there(
    make_desk: MakeDesk, make_setting: MakeSetting
) -> None:
    setting = make_setting(8)
    desk = make_desk(setting)
    desk.guessed((7, 2), (2, 5), (7, 3), (7, 2), (5, 7))
    view = desk.routed({})

    assert prefetches(made("dali:prefetch_size=1", setting), view, desk) == [(1, 7)]
    assert prefetches(made("dali:prefetch_size=3", setting), view, desk) == [(1, 7), (1, 2), (1, 5)]
    most = made("dali:prefetch_size=8", setting)
    assert prefetches(most, view, desk) == [(1, 7), (1, 2), (1, 5), (1, 3)]

    desk.view.cached[1, 7] = WHOLE
    desk.view.staged[1, 5] = WHOLE
    desk.view.cached[0, 2] = WHOLE
    two = made("dali:prefetch_size=2", setting)
    assert prefetches(two, view, desk) == [(1, 2), (1, 3)]
    assert prefetches(made("dali:prefetch_size=2,prefetch=none", setting), view, desk) == []


def test_equally_many_tokens_prefetch_the_better_guess(
    make_desk: MakeDesk, make_setting: MakeSetting
) -> None:
    setting = make_setting(8)
    desk = make_desk(setting)
    desk.guessed((6, 1), (4, 1), (6, 4))

    found = prefetches(made("dali:prefetch_size=3", setting), desk.routed({}), desk)

    assert found == [(1, 6), (1, 4), (1, 1)]


@pytest.mark.parametrize("rule", ["predicted", "random"])
def test_prefetches_wrap_into_the_next_step_and_end_with_the_last(
    make_desk: MakeDesk, make_setting: MakeSetting, rule: str
) -> None:
    setting = make_setting(8)
    desk = make_desk(setting)
    desk.guessed((5, 2))
    policy = made(f"dali:prefetch_size=2,prefetch={rule}", setting)

    def layers(**at: int) -> list[int]:
        return [layer for layer, _ in prefetches(policy, desk.routed({}, **at), desk)]

    assert layers(layer=0, last_step=0) == [1, 1]
    assert layers(layer=1, last_step=0) == [0, 0]
    assert layers(layer=0, last_step=1) == [1, 1]
    assert layers(layer=1, last_step=1) == []


def test_random_prefetch_takes_different_absent_experts(
    make_desk: MakeDesk, make_setting: MakeSetting
) -> None:
    setting = make_setting(8)
    desk = make_desk(setting)
    desk.view.cached[1, [0, 3]] = WHOLE
    policy = made("dali:prefetch_size=4,prefetch=random", setting)
    drawn = []
    for step in range(20):
        found = prefetches(policy, desk.routed({}, step=step), desk)
        assert len({expert for _, expert in found} - {0, 3}) == len(found) == 4
        drawn.append(found)
    assert len({tuple(found) for found in drawn}) > 3


def test_dispatch_starts_cpu_then_residents_then_demand_copies_then_prefetches(
    make_desk: MakeDesk, make_setting: MakeSetting
) -> None:
    """Experts 0 and 5 are resident, 4 is staged; the CPU is faster for 3 and for the resident 5."""
    setting = make_setting(8)
    desk = make_desk(setting)
    desk.view.cached[0, [0, 5]] = WHOLE
    desk.view.staged[0, 4] = WHOLE
    desk.view.gpu_ns[:] = 1000
    desk.view.cpu_ns[:] = 1 << 40
    desk.view.cpu_ns[[3, 5]] = 10
    desk.guessed((6, 2))
    view = desk.routed({1: 1, 4: 2, 3: 1, 0: 1, 7: 1, 5: 1})
    policy = made("dali:prefetch_size=2,assign=threshold", setting)

    policy.dispatch(view, desk.plan)

    assert orders(desk.take()) == [
        ("run_on_cpu", 3),
        ("run_on_cpu", 5),
        ("run_on_gpu", 0),
        ("run_on_gpu", 1),
        ("run_on_gpu", 4),
        ("run_on_gpu", 7),
        ("fetch", 1, 6, "staging", 0),
        ("fetch", 1, 2, "staging", 0),
    ]


@pytest.mark.parametrize(
    ("assign", "on_gpu"),
    [
        ("greedy", {0, 1}),
        ("threshold", {0, 1, 2, 4}),
        ("hss", {0, 1, 4}),
        ("resident", {0, 4}),
        ("gpu", {0, 1, 2, 3, 4}),
    ],
)
def test_assignment_rules_decide_by_their_own_measure(
    make_desk: MakeDesk, make_setting: MakeSetting, assign: str, on_gpu: set[int]
) -> None:
    """Costs on the GPU are 8, one copy for 1, 2 and 3, and 1; in copies on the CPU as below.

    Greedy visits 0 (8 against 20), 1 (1 against 6), 2 (1 against 2), 3 (1 against 0.5), 4 (1
    against 1.25) and has the GPU busy for 9 copies after 1: all others go to the CPU. HSS lets the
    CPU have 3 and 2 until 2.5, then the GPU 0 until 8, 4 until 9, and 1, copied meanwhile.
    """
    setting = make_setting(8)
    desk = make_desk(setting)
    copy = copy_ns(setting.costs, H2D, setting.expert_bytes)
    desk.view.cached[0, [0, 4]] = WHOLE
    desk.view.gpu_ns[:5] = [8 * copy, 10, 10, 10, copy]
    desk.view.cpu_ns[:5] = [20 * copy, 10 * copy, 2 * copy, copy // 2, copy * 5 // 4]
    view = desk.routed(dict.fromkeys(range(5), 1))

    made(f"dali:assign={assign},prefetch=none", setting).dispatch(view, desk.plan)

    ran = orders(desk.take())
    assert {expert for name, expert in ran if name == "run_on_gpu"} == on_gpu
    assert {expert for name, expert in ran if name == "run_on_cpu"} == set(range(5)) - on_gpu


def test_hss_copies_while_it_computes_over_a_link_that_counts_as_free(
    make_desk: MakeDesk, make_setting: MakeSetting
) -> None:
    """0 is there and takes as long as the copy of 1, which is over when 0 is: 1 against 1.5 copies.

    Copy and computation as one cost would be 2, and the queue would make it 3.
    """
    setting = make_setting(8)
    desk = make_desk(setting)
    copy = copy_ns(setting.costs, H2D, setting.expert_bytes)
    desk.view.cached[0, 0] = WHOLE
    desk.view.gpu_ns[:2] = [copy, 10]
    desk.view.cpu_ns[:2] = [9 * copy, copy * 3 // 2]
    desk.view.forecast.free[H2D] = copy
    made("dali:assign=hss,prefetch=none", setting).dispatch(desk.routed({1: 1, 0: 1}), desk.plan)
    assert orders(desk.take()) == [("run_on_gpu", 0), ("run_on_gpu", 1)]


def test_costs_are_a_copy_or_the_rest_of_it_or_the_computation(
    make_desk: MakeDesk, make_setting: MakeSetting
) -> None:
    """Absent 0; cached 1; on their way 2 (staged, 700 ns) and 3 (cached, 40 ns); absent, slow 4."""
    setting = make_setting(8)
    desk = make_desk(setting)
    view = desk.routed(dict.fromkeys(range(5), 1))
    copy = copy_ns(setting.costs, H2D, setting.expert_bytes)
    view.gpu_ns[:5] = [100, 100, 100, 100, copy + 5]
    view.cpu_ns[:5] = [1, 2, 3, 4, 5]
    view.cached[0, [1, 3]] = WHOLE
    view.staged[0, 2] = WHOLE
    view.staged_ticket[0, 2] = 11
    view.cached_ticket[0, 3] = 12
    view.forecast.clock[0] = 1000
    view.forecast.ends[11] = (11, 1700)
    view.forecast.ends[12] = (12, 1040)
    cpu_ns, gpu_ns = np.zeros(8, np.int64), np.zeros(8, np.int64)

    estimate_costs(view, cpu_ns, gpu_ns)

    assert copy > 700
    assert gpu_ns[:5].tolist() == [copy, 100, 700, 100, copy + 5]
    assert cpu_ns[:5].tolist() == [1, 2, 3, 4, 5]


def test_lru_cache_loads_what_the_gpu_misses(
    make_desk: MakeDesk, make_setting: MakeSetting
) -> None:
    """Two places: 3 and 5 enter, 3 is used again, so that 6 takes the place of 5.

    What was prefetched runs from where it is; then 6 and 3 are active, and 7 finds no place.
    """
    setting = make_setting(6)
    policy = made("dali:cache=lru,assign=gpu,prefetch=none", setting)
    assert policy.demand.capacity.tolist() == [2, 2]
    assert not policy.resident.any()
    desk = make_desk(setting)

    def dispatched(loads: dict[int, int]) -> list[Order]:
        policy.dispatch(desk.routed(loads), desk.plan)
        return orders(desk.take())

    def loaded(expert: int) -> list[Order]:
        return [("fetch", 0, expert, "cache", 1), ("run_on_gpu", expert)]

    assert dispatched({3: 1, 5: 1}) == loaded(3) + loaded(5)
    desk.view.cached[0, [3, 5]] = WHOLE
    assert dispatched({3: 1}) == [("run_on_gpu", 3)]
    assert dispatched({6: 1}) == [("evict", 0, 5), *loaded(6)]
    desk.view.cached[0, 5] = 0
    desk.view.cached[0, 6] = WHOLE
    desk.view.staged[0, 4] = WHOLE
    assert dispatched({4: 1}) == [("run_on_gpu", 4)]
    assert dispatched({7: 1, 6: 1, 3: 1}) == [("run_on_gpu", e) for e in (6, 3, 7)]


@pytest.mark.parametrize(("experts", "sizes"), [(8, (1, 4, 1)), (16, (1, 4, 1)), (17, (4, 4, 8))])
def test_defaults_are_the_papers_for_coarse_and_for_fine_experts(
    make_setting: MakeSetting, experts: int, sizes: tuple[int, int, int]
) -> None:
    setting = make_setting(12, experts=experts)
    policy = made("dali", setting)
    assert (policy.prefetch_size, policy.w_size, policy.u_size) == sizes
    policy = made("dali:prefetch_size=0,w_size=0,u_size=0", setting)
    assert (policy.prefetch_size, policy.w_size, policy.u_size) == sizes
    policy = made("dali:prefetch_size=2,w_size=5,u_size=3", setting)
    assert (policy.prefetch_size, policy.w_size, policy.u_size) == (2, 5, 3)


@pytest.mark.parametrize("slots", [1, 4, 5, 11, 18, 19, 40])
def test_cache_starts_with_equally_many_random_experts_per_layer(
    make_setting: MakeSetting, slots: int
) -> None:
    """Two slots for demand copies and one per prefetch, as far as the budget goes."""
    setting = make_setting(slots, layers=3)
    policy = made("dali", setting)
    placement = policy.place(setting)
    staging = min(3, slots)
    each, more = divmod(slots - staging, 3)
    counts = [min(8, each + (layer < more)) for layer in range(3)]

    assert placement.staging_slots == staging
    assert placement.cache_slots.tolist() == counts
    assert set(placement.cached.ravel().tolist()) <= {0, WHOLE}
    assert (placement.cached == WHOLE).sum(axis=1).tolist() == counts
    assert placement.link == "fifo"
    again = made("dali", setting).place(setting)
    assert (again.cached == placement.cached).all()


def test_cache_start_depends_on_the_seed_and_differs_between_layers(
    make_setting: MakeSetting,
) -> None:
    starts = [
        made("dali", setting).place(setting).cached.tolist()
        for setting in (make_setting(19, layers=4, seed=seed) for seed in range(6))
    ]
    assert len({str(start) for start in starts}) == 6
    assert any(len({str(layer) for layer in start}) > 1 for start in starts)


def test_two_policies_share_no_state(make_desk: MakeDesk, make_setting: MakeSetting) -> None:
    setting = make_setting(8)
    chosen = choose("dali:w_size=2")
    first, second = chosen.make(setting), chosen.make(setting)
    assert isinstance(first, Dali)
    assert isinstance(second, Dali)
    count_and_maybe_swap(first, make_desk(setting), {3: 2})
    assert first.window.score.any()
    assert not second.window.score.any()


@pytest.fixture(scope="module")
def busy() -> Trace:
    """Return a trace on which the variants of DALI differ: 4 sequences, 4 layers, 12 experts."""
    return synthesize(
        layers=4, experts=12, top_k=2, sequences=4, prompt=3, generate=16, seed=5, recall=0.8
    )


def causes(run: Replayed) -> dict[str, list[tuple[int, int, int]]]:
    """Return (step, layer, expert) of every copy, by cause."""
    assert run.log is not None
    rows = run.log.operations
    rows = rows[rows["kind"] == COPY_IN]
    found: dict[str, list[tuple[int, int, int]]] = {cause: [] for cause in CAUSES[1:]}
    for row in rows:
        found[CAUSES[row["cause"]]].append((row["step"], row["layer"], row["expert"]))
    return found


@pytest.fixture(scope="module")
def plain(run: Run, busy: Trace) -> dict[int, dict[str, Any]]:
    """Return the results of DALI as it is, by batch."""
    return {batch: summarize(run("dali", 28, of=busy, batch=batch)) for batch in (1, 4)}


def legal_values(parameter: Parameter) -> tuple[str, ...]:
    if parameter.type is bool:
        return ("true", "false")
    return get_args(parameter.type) if get_origin(parameter.type) is Literal else ()


@pytest.mark.parametrize("name", [p.name for p in parameters_of(Dali) if legal_values(p)])
def test_every_ablation_runs_from_its_text_and_makes_a_difference(
    run: Run, busy: Trace, plain: dict[int, dict[str, Any]], name: str
) -> None:
    parameter = next(p for p in parameters_of(Dali) if p.name == name)
    makespans = set()
    for value in legal_values(parameter):
        text = f"{name}={value}"
        chosen = choose(f"dali:{text}")
        ends = []
        for batch, default in plain.items():
            replayed = run(f"dali:{text}", 28, of=busy, batch=batch)
            result = summarize(replayed)
            activations = result["activations"]
            assert activations["total"] == default["activations"]["total"] > 0
            assert sum(result["time_ns"].values()) == result["makespan_ns"]
            ends.append(result["makespan_ns"])
            if chosen.parameters[name] == parameter.default:
                assert result["makespan_ns"] == default["makespan_ns"]
                assert result["policy"] == "dali"
            else:
                assert result["policy"] == f"dali:{text}"

            copied = causes(replayed)
            guesses = text not in ("prefetch=none", "prefetch=random")
            assert bool(copied["swap"]) == (name != "cache" or text == "cache=window")
            assert bool(copied["prefetch"]) == (text != "prefetch=none")
            assert bool(result["prefetch"]["predictors"]) == guesses
            assert (activations["cpu"] == 0) == (text == "assign=gpu")
            if text in ("assign=resident", "assign=gpu"):
                assert bool(copied["demand"]) == (text == "assign=gpu")
        makespans.add(tuple(ends))
    assert len(makespans) == len(legal_values(parameter)) > 1


@pytest.mark.parametrize("predictor", ["gate1", "oracle", "noisy-oracle", "previous", "popularity"])
def test_predictors_are_chosen_by_name(run: Run, busy: Trace, predictor: str) -> None:
    replayed = run(f"dali:predictor={predictor}", 28, of=busy, batch=2)
    assert replayed.prepared.predictors == (predictor,)
    assert summarize(replayed)["prefetch"]["fetched"] > 0


@pytest.mark.parametrize(
    ("spec", "first", "every"),
    [
        ("dali", 4, 4),
        ("dali:w_size=3", 3, 3),
        ("dali:first_swap=after_step0", 1, 4),
        ("dali:count_prefill=true", 3, 4),
        ("dali:count_prefill=true,first_swap=after_step0", 0, 4),
    ],
)
def test_swaps_of_a_replay_come_in_the_steps_of_full_windows(
    run: Run, busy: Trace, spec: str, first: int, every: int
) -> None:
    """Step 0 is the prefill; with u_size 1 every layer swaps once each time."""
    replayed = run(spec, 28, of=busy, batch=2)

    swaps = [(step, layer) for step, layer, _ in causes(replayed)["swap"]]

    due = range(first, 16, every)
    assert swaps == [(step, layer) for step in due for layer in range(4)]


def test_experts_swapped_out_are_those_with_the_lowest_scores(run: Run, busy: Trace) -> None:
    """The experts that a replay copies at each swap, recounted from the trace alone."""
    replayed = run("dali:u_size=2,assign=resident,prefetch=none", 28, of=busy, batch=2)
    prepared = replayed.prepared
    loads = np.zeros((16, 4, 12), np.int64)
    for sequence in range(2):
        for at, row in enumerate(prepared.workload.decode_rows(sequence)):
            for layer in range(4):
                loads[at + 1, layer, busy.experts[row, layer]] += 1
    cached = [set(np.flatnonzero(layer).tolist()) for layer in prepared.placement.cached]
    expected = []
    for step in (4, 8, 12):
        for layer, inside in enumerate(cached):
            score = loads[step - 3 : step + 1, layer].sum(axis=0)
            absent = set(range(12)) - inside
            into = sorted(absent, key=lambda e, s=score: (-s[e], e))[:2]  # type: ignore[misc]
            out = sorted(inside, key=lambda e, s=score: (s[e], e))[:2]  # type: ignore[misc]
            expected += [(step, layer, expert) for expert in into]
            cached[layer] = inside - set(out) | set(into)

    assert causes(replayed) == {"demand": [], "prefetch": [], "swap": expected}
    assert {(layer, expert) for layer, inside in enumerate(cached) for expert in inside} == {
        tuple(map(int, at)) for at in np.argwhere(np.asarray(prepared.host.res.cached) > 0)
    }
