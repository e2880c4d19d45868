from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim.policies.testing as lab
from moesim.policies.api import COMMANDS, Setting
from moesim.policies.registry import choose
from moesim.sim.replay import Replayed
from moesim.traces.format import Trace
from moesim.types import WHOLE

MakeSetting = Callable[..., Setting]
MakeDesk = Callable[[Setting], Any]

Orders = list[tuple[str, int]]


class TestFiddler(lab.PolicyConformance):
    policy = "fiddler"
    needs_gpu = False


class TestFiddlerByItsCode(lab.PolicyConformance):
    policy = "fiddler:cost=code,order=overlap"
    needs_gpu = False


def orders(spec: str, desk: Any, setting: Setting, loads: dict[int, int]) -> Orders:
    """Return what is ordered for these loads in layer 0, as (device, expert)."""
    policy: Any = choose(spec).make(setting)
    policy.dispatch(desk.routed(loads), desk.plan)
    return [(COMMANDS[row[0]].removeprefix("run_on_"), row[2]) for row in desk.take()]


# What is resident.


def test_the_most_used_pairs_of_all_layers_are_resident(make_setting: MakeSetting) -> None:
    """One of four slots is the placeholder; of the pairs used 4 times layer 0 comes first."""
    counts = np.zeros((3, 8), np.int64)
    counts[2, 5] = 9
    counts[0, [3, 6]] = 4
    counts[1, 1] = 4
    setting = make_setting(4, layers=3)._replace(popularity=counts)
    placement = choose("fiddler").make(setting).place(setting)
    assert np.argwhere(placement.cached == WHOLE).tolist() == [[0, 3], [0, 6], [2, 5]]
    assert placement.cache_slots.tolist() == [2, 0, 1]
    assert placement.staging_slots == 1
    assert placement.notices == ()


def test_popularity_is_of_what_is_not_replayed(run: Callable[..., Replayed], trace: Trace) -> None:
    done = run("fiddler", 7)
    other = trace.experts[trace.sequence != trace.sequence[0]]
    counts = np.array([np.bincount(other[:, la].ravel(), minlength=8) for la in range(3)])
    pairs = sorted(np.ndindex(3, 8), key=lambda at: (-counts[at], at))[:6]
    assert sorted(map(tuple, np.argwhere(done.prepared.placement.cached))) == sorted(pairs)
    assert not any("popularity" in notice for notice in done.prepared.notices)


def test_it_says_so_if_nothing_is_left_to_count(run: Callable[..., Replayed]) -> None:
    done = run("fiddler", 4, batch=4)
    assert np.argwhere(done.prepared.placement.cached).tolist() == [[0, 0], [0, 1], [0, 2]]
    assert any("nothing is left" in notice for notice in done.prepared.notices)


@pytest.mark.parametrize(("slots", "resident"), [(0, 0), (1, 0), (2, 1), (99, 16)])
def test_the_placeholder_comes_first(make_setting: MakeSetting, slots: int, resident: int) -> None:
    setting = make_setting(slots)
    placement = choose("fiddler").make(setting).place(setting)
    assert placement.staging_slots == min(1, slots)
    assert (placement.cached > 0).sum() == resident


# Where experts run.


@pytest.mark.parametrize(("load", "device"), [(1, "cpu"), (9, "cpu"), (10, "gpu"), (64, "gpu")])
def test_the_code_copies_from_10_tokens_on(
    make_setting: MakeSetting, make_desk: MakeDesk, load: int, device: str
) -> None:
    """7 per token against 70: 9 tokens cost 63 on the CPU; 10 cost 70, which goes to the GPU."""
    setting = make_setting(1)
    found = orders("fiddler:cost=code", make_desk(setting), setting, {3: load})
    assert found == [(device, 3)]


@pytest.mark.parametrize(("load", "device"), [(1, "cpu"), (9, "cpu"), (10, "gpu"), (64, "gpu")])
def test_measured_times_have_the_same_threshold_where_they_are_those_of_the_code(
    make_setting: MakeSetting, make_desk: MakeDesk, load: int, device: str
) -> None:
    """A copy of 66 and 4 on the GPU against 7 per token on the CPU."""
    costs = lab.make_costs(2, gpu=4, copy_ns_per_kib=64, latency=2)
    setting = make_setting(1)._replace(costs=costs)
    desk = make_desk(setting)
    desk.view.gpu_ns[3] = 4
    desk.view.cpu_ns[3] = 7 * load
    assert orders("fiddler", desk, setting, {3: load}) == [(device, 3)]


def test_resident_experts_run_on_the_gpu_whatever_that_costs(
    make_setting: MakeSetting, make_desk: MakeDesk
) -> None:
    for spec in ("fiddler", "fiddler:cost=code"):
        setting = make_setting(1)
        desk = make_desk(setting)
        desk.view.cached[0, 3] = WHOLE
        desk.view.gpu_ns[3] = 10**9
        assert orders(spec, desk, setting, {3: 1}) == [("gpu", 3)]


def test_experts_run_by_id_on_either_device(make_setting: MakeSetting, make_desk: MakeDesk) -> None:
    """Loads of 10 and more on the GPU; 6 is resident."""
    setting = make_setting(2)
    desk = make_desk(setting)
    desk.view.cached[0, 6] = WHOLE
    loads = {7: 2, 4: 10, 6: 1, 1: 12, 0: 9}
    assert orders("fiddler:cost=code", desk, setting, loads) == [
        ("cpu", 0), ("cpu", 7), ("gpu", 1), ("gpu", 4), ("gpu", 6),
    ]  # fmt: skip


def test_without_a_placeholder_nothing_is_copied(
    make_setting: MakeSetting, make_desk: MakeDesk
) -> None:
    setting = make_setting(0)
    found = orders("fiddler:cost=code", make_desk(setting), setting, {3: 64, 1: 64})
    assert found == [("cpu", 1), ("cpu", 3)]


@given(
    loads=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    resident=st.sets(st.integers(0, 5)),
)
@settings(max_examples=60)
def test_expert_by_expert_is_the_smallest_sum_of_all_assignments(
    make_setting: MakeSetting, make_desk: MakeDesk, loads: list[int], resident: set[int]
) -> None:
    """The code tries all 2^E and keeps the smallest sum; ties may be broken either way."""
    setting = make_setting(1)
    desk = make_desk(setting)
    desk.view.cached[0, :] = 0
    desk.view.cached[0, list(resident)] = WHOLE
    active = {expert: load for expert, load in enumerate(loads) if load > 0}
    found = {e: where for where, e in orders("fiddler:cost=code", desk, setting, active)}

    def cost(expert: int, where: str) -> int:
        if where == "cpu":
            return 7 * active[expert]
        return 0 if expert in resident else 70

    sums = [
        sum(cost(e, where) for e, where in zip(active, assignment, strict=True))
        for assignment in product(("gpu", "cpu"), repeat=len(active))
    ]
    assert sum(cost(e, where) for e, where in found.items()) == min(sums)


# What it takes.


def timed(order: str) -> Replayed:
    """Return a prompt of 3 tokens: expert 0 is resident, 1 and 2 are not, 2 has all three tokens.

    Copy and GPU are 100 + 40; the CPU takes 50 per token, 50 for 1 and 150 for 2.
    """
    costs = lab.make_costs(attention=100, gate=10, gpu=40, combine=5, head=7, copy_ns_per_kib=100)
    per_token = np.arange(lab.TOKENS + 1) * 50
    costs = costs._replace(expert_cpu_ns=np.array([per_token] * 4))
    return lab.run(
        choose(f"fiddler:order={order}"), [[[2, 0]], [[0, 2]], [[2, 1]]], costs, slots=2,
        prompts=(3,),
    )  # fmt: skip


def test_serial_devices_take_the_sum_of_all() -> None:
    """CPU 50, then resident expert 0 and, behind its copy, expert 2 on the GPU."""
    done = timed("serial")
    known = 100 + 10
    computed = known + 50
    end = computed + 100 + 40
    assert lab.spans(done, "expert_cpu", "copy_in", "expert_gpu") == [
        ("cpu", "expert_cpu", 0, 1, known, computed),
        ("gpu", "expert_gpu", 0, 0, computed, computed + 40),
        ("h2d", "copy_in", 0, 2, computed, computed + 100),
        ("gpu", "expert_gpu", 0, 2, computed + 100, end),
    ]
    assert lab.makespan_ns(done) == end + 5 + 7


def test_overlapped_devices_take_the_longer_one() -> None:
    done = timed("overlap")
    known = 100 + 10
    assert lab.spans(done, "expert_cpu")[0][4:] == (known, known + 50)
    assert lab.makespan_ns(done) == known + 100 + 40 + 5 + 7
