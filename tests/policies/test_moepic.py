"""MoEpic: what is cached, fetched and run, by hand; and its layouts from one step to another."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import moesim.policies.testing as lab
from moesim.costs import part_bytes
from moesim.errors import InputError, PolicyError
from moesim.policies.api import COMMANDS, FIRST, REST, Offline, Setting
from moesim.policies.moepic import duration
from moesim.policies.parts.cache import lcp_count, lcp_enter, lcp_priority, lcp_victim, new_lcp
from moesim.policies.registry import choose
from moesim.sim.replay import Replayed
from moesim.traces.format import MISSING, Trace
from moesim.types import (
    COPY_IN,
    DECODE,
    DEMAND,
    GATE,
    NONE,
    PREFETCH,
    RESIDENT,
    RESIZE,
    WHOLE,
)

MakeSetting = Callable[..., Setting]
MakeDesk = Callable[[Setting], Any]
Run = Callable[..., Replayed]

HALF = WHOLE // 2


class TestMoepic(lab.PolicyConformance):
    policy = "moepic"


class TestMoepicThatChangesItsLayout(lab.PolicyConformance):
    policy = "moepic:period=3,predictor=previous,epsilon=0.05"


class TestMoepicOfWholeExperts(lab.PolicyConformance):
    policy = "moepic:theta=1,prefetch=false,link=fifo"


class TestMoepicWithoutACache(lab.PolicyConformance):
    policy = "moepic:theta=0,predictor=oracle"


# Least cache priority.


def test_a_use_counts_a_quarter_after_128_tokens() -> None:
    """(uses, idle): a (10, 128), b (3, 0), c (40, 256): 2.5, 3 and 2.5; a was cached before c."""
    lcp = new_lcp(1, 4)
    lcp.clock[0] = 256
    for expert, (uses, idle) in enumerate([(10, 128), (3, 0), (40, 256)]):
        lcp.uses[0, expert] = uses
        lcp.last[0, expert] = 256 - idle
        lcp_enter(lcp, 0, expert)
    assert [lcp_priority(lcp, 0, e) for e in range(4)] == [2.5, 3.0, 2.5, 0.0]
    nobody = np.zeros(4, np.int64)
    assert lcp_victim(lcp, 0, nobody) == 0
    # with c idle for 255: 2.527
    lcp.last[0, 2] = 1
    assert lcp_priority(lcp, 0, 2) == pytest.approx(2.527, abs=1e-3)
    assert lcp_victim(lcp, 0, nobody) == 0
    assert lcp_victim(lcp, 0, np.array([1, 0, 0, 0])) == 2
    assert lcp_victim(lcp, 0, np.ones(4, np.int64)) == NONE


def test_of_equals_the_one_cached_first_leaves() -> None:
    lcp = new_lcp(1, 3)
    for expert in (2, 0):
        lcp_enter(lcp, 0, expert)
    assert lcp_victim(lcp, 0, np.zeros(3, np.int64)) == 2


def test_a_prompt_counts_token_by_token_and_a_step_once() -> None:
    """Three prompt tokens: 0 is idle for two of them at the end; then one step of three tokens."""
    lcp = new_lcp(1, 3)
    ids = np.array([[0, NONE], [1, 2], [2, NONE]])
    lcp_count(lcp, 0, ids, 3, 1)
    assert (lcp.clock[0] - lcp.last[0]).tolist() == [2, 1, 0]
    assert lcp.uses[0].tolist() == [1, 1, 2]
    lcp_count(lcp, 0, np.array([[0], [0], [0]]), 3, 0)
    assert (lcp.clock[0] - lcp.last[0]).tolist() == [0, 2, 1]
    assert lcp.uses[0].tolist() == [4, 1, 2]


def test_what_was_idle_for_ever_has_no_priority() -> None:
    lcp = new_lcp(1, 1)
    lcp.uses[0, 0] = 5
    lcp.clock[0] = 1 << 20
    assert lcp_priority(lcp, 0, 0) == 0.0


# Where experts are at the start.


@pytest.mark.parametrize(
    ("theta", "tops", "part"), [("0", 0, 0), ("0.5", 6, HALF), ("1", 3, WHOLE), ("0.25", 8, 256)]
)
def test_a_given_ratio_divides_every_layer_s_share(
    make_setting: MakeSetting, theta: str, tops: int, part: int
) -> None:
    """8 slots of 2 layers, 2 in the buffer: 3 whole experts per layer, 6 halves, or all 8."""
    setting = make_setting(8)
    placement: Any = choose(f"moepic:theta={theta},buffer=2").make(setting).place(setting)
    assert placement.cache_slots.tolist() == [tops, tops]
    assert placement.cached.max() == part
    assert placement.staging_slots == 2
    assert placement.spare_slots == 0
    if tops:
        size = part_bytes(setting.costs, 0, setting.precision, 0, part)
        assert placement.cache_slot_bytes.tolist() == [size, size]


@pytest.mark.parametrize(
    ("slots", "tops"), [(3, [1, 0, 0]), (5, [1, 1, 1]), (6, [2, 1, 1]), (40, [8, 8, 8])]
)
def test_the_first_layers_get_what_is_left_over(
    make_setting: MakeSetting, slots: int, tops: list[int]
) -> None:
    """3 layers, whole experts, 2 in the buffer: none of the budget is left unused."""
    setting = make_setting(slots, layers=3)
    placement: Any = choose("moepic:theta=1,buffer=2").make(setting).place(setting)
    assert placement.cache_slots.tolist() == tops
    assert (placement.cached == WHOLE).sum(axis=1).tolist() == tops


def test_the_most_popular_tops_are_cached_and_leave_last(make_setting: MakeSetting) -> None:
    counts = np.zeros((2, 8), np.int64)
    counts[0, [6, 2]] = 5, 9
    setting = make_setting(3)._replace(popularity=counts)
    policy: Any = choose("moepic:theta=0.5,buffer=1").make(setting)
    cached = policy.place(setting).cached
    assert np.argwhere(cached == HALF).tolist() == [[0, 2], [0, 6], [1, 0], [1, 1]]
    assert lcp_victim(policy.lcp, 0, np.zeros(8, np.int64)) == 6


def test_without_prefetch_nothing_is_guessed(make_setting: MakeSetting) -> None:
    """The configurator then sees misses alone, for which the fewest tops are best."""
    seen = offline(50, 3, 8)
    setting = make_setting(11, layers=3)._replace(offline=lambda *_: seen)
    policy: Any = choose("moepic:prefetch=false,buffer=2").make(setting)
    placement = policy.place(setting)
    worth = policy.plan(setting)[0]
    assert "nothing is fetched ahead" in worth.note
    # Where nothing is cached, each token waits for two experts in each of three layers.
    assert worth.rows[1][1] == pytest.approx(3 * 2 * policy.times.copy[0] / 1e6)
    assert placement.predictions == ()
    tops, part = policy.layout.tops, policy.layout.part
    assert ((tops - 1) * WHOLE < tops * (part + 1)).all()
    with_guesses: Any = choose("moepic:buffer=2").make(setting)
    assert with_guesses.place(setting).predictions == (with_guesses.prediction,)
    gates = with_guesses.times.rest - policy.times.rest
    assert gates == 3 * duration(setting.costs, GATE, 0)


@pytest.mark.parametrize(
    ("slots", "buffer", "staged"), [(1, 0, 1), (2, 0, 1), (5, 0, 2), (20, 0, 4), (5, 9, 5)]
)
def test_the_buffer_is_twice_top_k_or_half_of_the_budget(
    make_setting: MakeSetting, slots: int, buffer: int, staged: int
) -> None:
    setting = make_setting(slots)
    placement: Any = choose(f"moepic:buffer={buffer}").make(setting).place(setting)
    assert placement.staging_slots == staged


def test_bad_parameters_are_refused(make_setting: MakeSetting) -> None:
    for theta in ("1.1", "-1", "half", "nan"):
        with pytest.raises(InputError, match=f"theta={theta} is not legal; auto or 0 to 1 is"):
            choose(f"moepic:theta={theta}").make(make_setting(4))
    for epsilon in ("0", "1e-9", "1e-300", "1.5"):
        with pytest.raises(InputError, match=r"epsilon=.* is not legal; 0.001 to 1 is"):
            choose(f"moepic:epsilon={epsilon}").make(make_setting(4))
    with pytest.raises(PolicyError, match="holds no expert"):
        choose("moepic").make(make_setting(0))


# What is fetched.


def orders(desk: Any) -> list[tuple[Any, ...]]:
    """Return what was ordered: the command, layer or -1, expert, and what else matters."""
    found = []
    for row in desk.take():
        name = COMMANDS[row[0]]
        more = {"fetch": row[3:4] + row[5:7], "run_on_gpu": row[3:4]}.get(name, ())
        found.append((name, row[1], row[2], *more))
    return found


def at_the_desk(make_setting: MakeSetting, make_desk: MakeDesk) -> tuple[Any, Any]:
    """Return a policy with halves of experts 0..5 of each layer cached, and a desk showing it."""
    setting = make_setting(8)
    policy: Any = choose("moepic:theta=0.5,buffer=2").make(setting)
    placement = policy.place(setting)
    desk = make_desk(setting)
    desk.view.cached[:] = placement.cached
    return policy, desk


def test_guesses_are_fetched_in_their_order(make_setting: MakeSetting, make_desk: MakeDesk) -> None:
    """One token guesses 7, whose top is not cached, then 3: both go to the buffer."""
    policy, desk = at_the_desk(make_setting, make_desk)
    desk.guessed((7, 3))
    policy.before_gate(desk.view, desk.plan)
    assert orders(desk) == [("fetch", 1, 7, WHOLE, 1, 0), ("fetch", 1, 3, WHOLE, 1, 0)]
    # from the last layer the first one of the next step is meant
    policy.before_gate(desk.view._replace(layer=1), desk.plan)
    assert [order[1] for order in orders(desk)] == [2, 2]


def test_whole_experts_are_not_fetched_again(
    make_setting: MakeSetting, make_desk: MakeDesk
) -> None:
    policy, desk = at_the_desk(make_setting, make_desk)
    desk.view.cached[1, 3] = WHOLE
    desk.guessed((3, 4))
    policy.before_gate(desk.view, desk.plan)
    assert [order[2] for order in orders(desk)] == [4]


def test_missing_parts_are_demanded_and_tops_run_first(
    make_setting: MakeSetting, make_desk: MakeDesk
) -> None:
    """Active are 7, of which nothing is there, and 2, whose top is: 7 takes the place of 5, the
    one that was cached first of those never used; the top of 2 runs before anything arrives.
    """
    policy, desk = at_the_desk(make_setting, make_desk)
    view = desk.routed({7: 1, 2: 1}, layer=0)
    view.ids[0] = 7, 2
    policy.dispatch(view, desk.plan)
    assert orders(desk) == [
        ("evict", 0, 5), ("fetch", 0, 7, HALF, 0, 1), ("fetch", 0, 7, WHOLE, 1, 1),
        ("fetch", 0, 2, WHOLE, 1, 1),
        ("run_on_gpu", -1, 2, FIRST), ("run_on_gpu", -1, 7, 0), ("run_on_gpu", -1, 2, REST),
    ]  # fmt: skip


def test_complete_experts_run_first_then_tops_then_what_was_guessed(
    make_setting: MakeSetting, make_desk: MakeDesk
) -> None:
    """5 is complete, the rest of 1 is on its way, that of 3 was not asked for, and 4 was guessed
    in vain: its fetch is given up.
    """
    policy, desk = at_the_desk(make_setting, make_desk)
    desk.guessed((4, 1))
    policy.before_gate(desk.view, desk.plan)
    desk.take()
    view = desk.routed({3: 1, 1: 1, 5: 1}, layer=1)
    view.staged[1, [1, 4]] = HALF
    view.cached[1, 5] = WHOLE
    # what is submitted ends at 99, and it is 0 now
    view.staged_ticket[1, [1, 4]] = 5
    view.forecast.ends[5] = 5, 99
    policy.dispatch(view, desk.plan)
    assert orders(desk) == [
        ("cancel", 1, 4), ("promote", 1, 1), ("fetch", 1, 3, WHOLE, 1, 1),
        ("run_on_gpu", -1, 5, 0), ("run_on_gpu", -1, 3, FIRST), ("run_on_gpu", -1, 1, FIRST),
        ("run_on_gpu", -1, 1, REST), ("run_on_gpu", -1, 3, REST),
    ]  # fmt: skip


def test_what_came_whole_is_admitted_if_it_was_needed(
    make_setting: MakeSetting, make_desk: MakeDesk
) -> None:
    policy, desk = at_the_desk(make_setting, make_desk)
    view = desk.routed({7: 1}, layer=0)
    view.staged[0, [6, 7]] = WHOLE
    policy.after_layer(view, desk.plan)
    assert orders(desk) == [("evict", 0, 5), ("admit", 0, 7)]


def test_an_active_expert_is_never_the_victim(
    make_setting: MakeSetting, make_desk: MakeDesk
) -> None:
    policy, desk = at_the_desk(make_setting, make_desk)
    loads = dict.fromkeys((0, 1, 2, 3, 4, 5, 7), 1)
    view = desk.routed(loads, layer=0)
    policy.dispatch(view, desk.plan)
    found = orders(desk)
    assert not any(order[0] == "evict" for order in found)
    assert ("run_on_gpu", -1, 7, 0) in found


def test_a_correct_guess_moves_the_bottom_or_all(run: Run) -> None:
    """Whatever is fetched of an expert at a time is a top, a bottom, or all of it."""
    done = run("moepic:theta=0.4,predictor=oracle", 9)
    assert done.log is not None
    copies = done.log.operations[done.log.operations["kind"] == COPY_IN]
    top = round(0.4 * WHOLE)
    fetched = {(int(c["context"]), int(c["part"])) for c in copies}
    assert fetched == {(0, top), (top, WHOLE - top), (0, WHOLE)}
    whole = done.prepared.setting.expert_bytes
    for copy in copies[copies["cause"] == PREFETCH]:
        bottom = whole - whole * top // WHOLE
        assert copy["amount"] == (bottom if copy["context"] else whole)
    # What a run demands of an expert has a top that is cached, or comes into the cache.
    assert set(copies["cause"].tolist()) == {DEMAND, PREFETCH}


def test_without_a_ratio_nothing_is_cached(run: Run) -> None:
    done = run("moepic:theta=0,predictor=oracle", 9)
    assert done.log is not None
    assert done.prepared.host.counts.sum(axis=0)[:, RESIDENT].sum() == 0
    copies = done.log.operations[done.log.operations["kind"] == COPY_IN]
    assert (copies["part"] == WHOLE).all()
    assert not done.prepared.host.res.cached.any()


@pytest.mark.parametrize("slots", [6, 12])
def test_whole_experts_without_prefetch_are_a_cache_of_least_priority(
    run: Run, trace: Trace, slots: int
) -> None:
    """Hits counted a second time: per layer a dictionary, the formula, and no table of it."""
    done = run("moepic:theta=1,prefetch=false,buffer=3", slots)
    placement, feed = done.prepared.placement, done.prepared.feed
    hits = 0
    for layer in range(3):
        held = dict.fromkeys(np.flatnonzero(placement.cached[layer]).tolist(), -1)
        order = {expert: i for i, expert in enumerate(held)}
        uses, last, clock = np.zeros(8), np.zeros(8), 0

        def priority(expert: int, now: int, uses: Any = uses, last: Any = last) -> float:
            return float(uses[expert] * 0.25 ** ((now - last[expert]) / 128))

        for step, phase in enumerate(feed.steps.phase):
            rows = feed.chosen[feed.steps.offset[step, 0] : feed.steps.offset[step, -1], layer]
            active = list(dict.fromkeys(rows.ravel().tolist()))
            hits += sum(expert in held for expert in active) if phase == DECODE else 0
            for row in rows:
                clock += 1
                uses[row] += 1
                last[row] = clock
            for expert in active:
                if expert not in held:
                    rest = [e for e in held if e not in active]
                    if rest:
                        victim = min(rest, key=lambda e: (priority(e, clock), order[e]))
                        del held[victim]
                        held[expert] = step
                        order[expert] = max(order.values()) + 1
    assert done.prepared.host.counts.sum(axis=0)[DECODE, RESIDENT, 0] == hits > 0


def test_a_split_expert_by_hand() -> None:
    """Halves of 0 and 1 are cached; 1 was not guessed; a copy of a half takes 100.

    The top of 1 is computed, 20, while its bottom is on its way from 100 (the gate's end) to 200.
    """
    costs = lab.make_costs(attention=90, gate=10, gpu=40, combine=5, head=9, copy_ns_per_kib=200)
    done = lab.run(
        choose("moepic:theta=0.5,buffer=1,prefetch=false"), [[[1, MISSING]]], costs, slots=2
    )
    assert [(s.expert, s.start_ns, s.end_ns) for s in lab.spans(done, "copy_in")] == [(1, 100, 200)]
    assert [(s.start_ns, s.end_ns) for s in lab.spans(done, "expert_gpu")] == [
        (100, 120), (200, 220),
    ]  # fmt: skip
    assert lab.makespan_ns(done) == 220 + 5 + 9


# Layouts.


def offline(tokens: int, layers: int, experts: int) -> Offline:
    """Layer 0 always needs the same two experts, and nobody guesses; others take turns, guessed."""
    ids = np.zeros((tokens, layers, 2), np.int64)
    ids[:, 0] = 0, 1
    turn = np.arange(tokens)[:, np.newaxis]
    for layer in range(1, layers):
        ids[:, layer] = (2 * turn + np.arange(2)) % experts
    guesses = ids.copy()
    guesses[:, 0] = NONE
    return Offline(ids, np.zeros(tokens, np.int64), guesses)


def test_the_configurator_starts_from_what_is_not_replayed(make_setting: MakeSetting) -> None:
    """Six units of one expert each: layer 0 gets the two that it needs, since nobody guesses."""
    setting = make_setting(8, layers=3)
    seen = offline(50, 3, 8)
    setting = setting._replace(offline=lambda *_: seen)
    policy: Any = choose("moepic:buffer=2,epsilon=0.16").make(setting)
    placement = policy.place(setting)
    assert (placement.cache_slots[0], placement.cache_slot_bytes[0]) == (2, setting.expert_bytes)
    assert (placement.cache_slots * placement.cache_slot_bytes).sum() <= 6 * setting.expert_bytes
    assert placement.spare_slots == 3 * 8 - placement.cache_slots.sum()
    assert placement.notices == ()


def test_a_token_s_times_by_hand(make_setting: MakeSetting) -> None:
    """Attention 90 and 2 per token attended to, of which there are 30 / 3; gate 10, experts 40.

    From the guess to the next gate: 10 + 2 x 40 + 5 + 7 + 90 + 20, for layer 0 the head, too.
    """
    costs = lab.make_costs(
        2, attention=90, gate=10, gpu=40, combine=5, head=9, shared=7, copy_ns_per_kib=200
    )
    costs = costs._replace(context_fp=lab.per_attended(0, 2))
    setting = make_setting(8)._replace(costs=costs, sequences=3, kv_tokens=30, budget_bytes=8192)
    times = choose("moepic").make(setting).times  # type: ignore[attr-defined]
    assert times.window.tolist() == [212 + 9, 212]
    assert times.copy.tolist() == [200, 200]
    assert times.gpu == 40
    # a guess costs what a gate costs
    assert times.rest == 2 * (110 + 2 * 10 + 2 * 40 + 5 + 7) + 9


def test_with_nothing_seen_it_says_so_and_splits_in_half(make_setting: MakeSetting) -> None:
    setting = make_setting(8)
    placement: Any = choose("moepic").make(setting).place(setting)
    assert placement.cached.max() == HALF
    assert "nothing is left of it" in placement.notices[0]


def test_a_new_layout_comes_between_two_steps(run: Run) -> None:
    """4 prompt tokens and 15 steps: after 8 tokens there is a new layout, after 16 another one.

    Layers that change are emptied and filled again; the audit has checked every slot.
    """
    done = run("moepic:period=8,predictor=oracle,buffer=2", 7)
    assert done.log is not None
    resized = done.log.operations[done.log.operations["kind"] == RESIZE]
    assert len(resized) > 0
    assert set(resized["step"].tolist()) <= {5, 13}
    res = done.prepared.host.res
    assert int(res.slot_bytes.sum()) <= done.prepared.setting.budget_bytes
    policy: Any = done.prepared.policy
    for layer, (tops, part) in enumerate(zip(policy.layout.tops, policy.layout.part, strict=True)):
        cached = res.cached[layer][res.cached[layer] > 0]
        assert cached.tolist() == [part] * tops
        slots = res.cached_slot[layer][res.cached[layer] > 0]
        assert len(set(res.slot_bytes[slots].tolist())) <= 1


def test_a_period_of_zero_keeps_the_layout(run: Run) -> None:
    assert lab.spans(run("moepic:period=0,predictor=oracle", 7), "resize") == []
    assert lab.spans(run("moepic:theta=0.5,period=1,predictor=oracle", 7), "resize") == []


def test_the_plan_shows_what_was_found(make_setting: MakeSetting) -> None:
    setting = make_setting(8, layers=3)
    seen = offline(50, 3, 8)
    setting = setting._replace(offline=lambda *_: seen)
    policy: Any = choose("moepic:buffer=2").make(setting)
    policy.place(setting)
    worth, moves, layers = policy.plan(setting)
    tpot = {row[0]: row[2] for row in worth.rows}
    for table, waiting in ((worth, 1), (moves, 3)):
        for row in table.rows:
            assert row[waiting + 1] == pytest.approx(row[waiting] + policy.times.rest / 1e6)
    # Every layer waits for 2 copies where nothing is cached, and layer 0 for all of them.
    copy_ms, window_ms = policy.times.copy[0] / 1e6, policy.times.window / 1e6
    late = sum(max(0, 2 * copy_ms - window) for window in window_ms[1:])
    assert worth.rows[1][:2] == ("theta=0 in every layer", pytest.approx(2 * copy_ms + late))
    other: Any = choose("moepic:buffer=2,theta=1").make(setting)
    other.place(setting)
    given = other.plan(setting)[0].rows[0]
    assert given == ("theta as given", *worth.rows[3][1:])
    assert moves.rows[0][1:3] == ("", "")
    assert moves.rows[1][1:3] == (policy.moves.giver[0], policy.moves.taker[0])
    assert tpot["as configured"] <= min(tpot.values())
    assert [row[0] for row in moves.rows] == sorted(row[0] for row in moves.rows)
    waits = [row[3] for row in moves.rows]
    assert waits == sorted(waits, reverse=True)
    # The last move is where the layout of the run came from.
    assert waits[-1] == pytest.approx(worth.rows[0][1])
    assert [row[1] for row in layers.rows] == policy.layout.tops.tolist()
    assert layers.rows[1][5:] == (1.0, pytest.approx(layers.rows[1][6]))


def test_the_plan_of_a_given_ratio_has_no_moves(make_setting: MakeSetting) -> None:
    setting = make_setting(8)
    policy: Any = choose("moepic:theta=0.5").make(setting)
    assert [table.title for table in policy.plan(setting)] == ["Cached per layer"]
