"""Laws that hold for every trace, model, budget, policy and interference matrix.

Each run is audited (`lab.run`), which covers what a log can show: every routed token is computed
once, nothing runs before its weights arrived or after they left, the budget, the lanes, the queues.
"""

import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim.policies.testing as lab
from moesim.audit import audit
from moesim.model import expert_bytes
from moesim.policies.registry import choose
from moesim.residency import SPARE, Residency
from moesim.run import prepare
from moesim.sim.metrics import by_step, link_bytes, summarize
from moesim.sim.replay import Replayed, SimpyRun
from moesim.sim.replay import replay as run_on
from moesim.traces.format import MISSING
from moesim.traces.workload import cut
from moesim.types import LANES, NONE, WHOLE
from wild import VARIANTS, Case, Wild, cases

POLICIES: tuple[Any, ...] = (Wild, *VARIANTS)


def replay(case: Case, policy: Any, **changes: Any) -> Replayed:
    done: Replayed = case.run(choose(policy) if isinstance(policy, str) else policy, **changes)
    return done


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@given(case=cases())
@settings(max_examples=60)
def test_what_is_reported_adds_up(policy: Any, case: Case) -> None:
    done = replay(case, policy)
    log = done.log
    assert log is not None
    result = summarize(done)
    makespan = result["makespan_ns"]

    assert sum(result["time_ns"].values()) == makespan
    assert all(ns >= 0 for ns in result["time_ns"].values())
    activations = int((log.loads.sum(axis=2) > 0).sum())
    assert result["activations"]["total"] == activations
    assert sum(result["activations_by_token"].values()) == int(log.loads.sum())
    assert all(0 <= share <= 1 for share in result["lanes"].values())
    assert sum(row["duration_ns"] for row in by_step(done)) == makespan
    in_all = sum(link_bytes(done.drained).values())
    assert in_all == sum(result["link_bytes"].values()) + result["drained_bytes"]
    check_tables(done.prepared.host.res)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@given(case=cases(calm=True))
@settings(max_examples=30)
def test_the_makespan_lies_between_its_bounds(policy: Any, case: Case) -> None:
    """At least the work of any lane before it; at most all work and pauses one after another."""
    machine = lab.quiet_machine("host.per_launch_ns=3", "host.per_sync_ns=5")
    done = replay(case, policy, machine=machine)
    log = done.log
    assert log is not None
    makespan = lab.makespan_ns(done)
    ran = log.operations[log.operations["cancel_ns"] < 0]

    work = int(ran["duration_ns"].sum()) + done.paused_ns + done.preemptions
    assert max(done.heads[-1].busy_ns) <= makespan <= work
    for lane in range(len(LANES)):
        in_time = sum(
            min(int(end), makespan) - int(start)
            for ticket, start, end, _ in log.segments
            if ticket and start < makespan and lab.lane_of(log, int(ticket)) == lane
        )
        assert in_time == done.heads[-1].busy_ns[lane]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@given(case=cases(calm=True), k=st.sampled_from((2, 4, 5)))
@settings(max_examples=25)
def test_k_times_the_costs_is_k_times_the_makespan(policy: Any, case: Case, k: int) -> None:
    once = replay(case, policy)
    slow = replay(case, policy, costs=lab.times(case.costs, k))
    # A policy that cuts copies into pages of its own has borders between whole ns, rounded up.
    if once.preemptions == 0 or once.prepared.placement.chunk_bytes == 0:
        assert lab.makespan_ns(slow) == k * lab.makespan_ns(once)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@given(case=cases())
@settings(max_examples=10)
def test_the_same_inputs_give_the_same_bytes(policy: Any, case: Case) -> None:
    def text() -> str:
        result = summarize(replay(case, policy))
        del result["run"]["wall_s"]
        return json.dumps(result)

    assert text() == text()


@given(case=cases(), cut=st.integers(1, 3))
@settings(max_examples=30)
def test_reading_progress_changes_nothing(case: Case, cut: int) -> None:
    """The host keeps its state in arrays: a run cut into ranges of steps is the same run."""
    whole = case.run(Wild)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimpyRun, "stride", cut)
        pieces = case.run(Wild)
    assert (whole.log.operations == pieces.log.operations).all()
    assert (whole.log.segments == pieces.log.segments).all()


@given(case=cases())
@settings(max_examples=30)
def test_jitter_stretches_and_repeats(case: Case) -> None:
    """Each operation takes between once and (1 + jitter) times its time, the same every time."""
    calm, shaken, again = (case.run(Wild, jitter=jitter) for jitter in (0, 512, 512))
    assert (shaken.log.segments == again.log.segments).all()
    short, long = calm.log.operations, shaken.log.operations
    for column in ("kind", "layer", "expert", "amount", "context", "part", "precision"):
        assert (short[column] == long[column]).all()
    assert (short["duration_ns"] <= long["duration_ns"]).all()
    assert (long["duration_ns"] <= short["duration_ns"] * 1.5).all()


def test_a_copy_of_no_time_costs_what_full_residency_costs() -> None:
    """With free copies, loading on demand is as fast as having everything there.

    Free is 1 ns, since times are rounded up: each copy delays the run by at most that.
    """
    rng = np.random.default_rng(1)
    choices = np.array([[rng.permutation(4)[:2] for _ in range(2)] for _ in range(6)])
    costs = lab.make_costs(2, attention=50, gate=10, gpu=40, combine=5, head=7)
    loaded = lab.run(choose("lru"), choices, costs, slots=3)
    resident = lab.run(choose("static"), choices, costs, slots=8)
    copies = len(lab.spans(loaded, "copy_in"))
    assert copies > 0
    assert 0 <= lab.makespan_ns(loaded) - lab.makespan_ns(resident) <= copies


def check_tables(res: Residency) -> None:
    """Every slot is in exactly one place, and the tables tell the same story from both ends."""
    slots = len(res.slot_bytes)
    pools = len(res.free_first) - 1
    places: list[int] = []
    for pool in range(pools + 1):
        slot, count = int(res.free_first[pool]), int(res.free_count[pool])
        for _ in range(count):
            places.append(slot)
            assert res.slot_layer[slot] == NONE
            slot = int(res.slot_next[slot])
    for table, slot_table in ((res.cached, res.cached_slot), (res.staged, res.staged_slot)):
        for layer, expert in np.argwhere(table > 0).tolist():
            slot = int(slot_table[layer, expert])
            assert (res.slot_layer[slot], res.slot_expert[slot]) == (layer, expert)
            places.append(slot)
    spare = res.spare[: res.counters[SPARE]].tolist()
    assert (res.slot_bytes[spare] == 0).all()
    assert sorted(places + spare) == list(range(slots))
    assert (res.cached <= WHOLE).all()
    assert (res.staged <= WHOLE).all()
    assert set(res.staging.tolist()).isdisjoint(res.cached_slot[res.cached > 0].tolist())


@pytest.mark.parametrize("policy", VARIANTS)
def test_experts_without_weights_cost_what_missing_ones_do(policy: str) -> None:
    """LongCat's identity experts have the ids after all others; a token may have nothing else."""
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(8), (24, 3, 1)), axis=2)[:, :, :2]
    assert (ids >= 6).all(axis=2).any()
    model = lab.make_model(3, 6, 2)
    idle = msgspec.structs.replace(model, weightless_experts=2)
    found = []
    for choices, experts, spec in ((ids, 8, idle), (np.where(ids < 6, ids, MISSING), 6, model)):
        trace = lab.make_trace(choices, experts, (12,))
        made = prepare(
            trace, cut(trace, 1), spec, lab.quiet_machine(), choose(policy),
            budget_bytes=6 * expert_bytes(spec),
        )  # fmt: skip
        done = run_on(made, record=True)
        assert done.log is not None
        audit(done.log)
        found.append((done.log.loads.tolist(), by_step(done)))

    (loads, steps), (other_loads, other_steps) = found
    assert loads == other_loads
    if not policy.startswith("dali"):  # a guess from idle experts is one; from missing ids, none
        assert steps == other_steps
