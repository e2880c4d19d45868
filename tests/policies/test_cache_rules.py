import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.model import expert_bytes, load_model
from moesim.policies.parts.cache import (
    Order,
    fifo_use,
    lru_use,
    new_order,
    order_append,
    order_leave,
    order_oldest,
)
from moesim.policies.registry import choose
from moesim.profile import HardwareProfile
from moesim.run import prepare
from moesim.sim.replay import Replayed, replay
from moesim.traces.format import MISSING, Trace
from moesim.traces.importers import load_trace
from moesim.traces.synthetic import synthesize
from moesim.traces.workload import Workload, cut
from moesim.types import CAUSES, COPY_IN, DEMAND, EXPERT_GPU, NONE, OUTCOMES, RESIDENT

GENERAL = Path(__file__).resolve().parents[2].parent / "shared/traces/qwen3-30b-a3b-general.npz"
LAYER = 24
RULES = {"LRU": lru_use, "FIFO": fifo_use}

Step = dict[int, list[list[int]]]
"""By layer: the experts of each token in rank order."""

Outcome = dict[tuple[int, int], tuple[set[int], set[int]]]
"""By step and layer: the experts that were cached, and all others that were active."""


def own_hits(rule: str, accesses: list[int], capacity: int, experts: int) -> list[bool]:
    """Return hit or miss of each access to a cache of one layer, kept with the rule functions."""
    order = new_order(1, experts)
    nobody = np.zeros(experts, np.int64)
    inside: set[int] = set()
    hits = []
    for expert in accesses:
        hits.append(expert in inside)
        if expert in inside:
            RULES[rule](order, 0, expert)
            continue
        if len(inside) == capacity:
            victim = order_oldest(order, 0, nobody)
            order_leave(order, 0, victim)
            inside.remove(victim)
        order_append(order, 0, expert)
        inside.add(expert)
    return hits


def libcachesim_hits(rule: str, accesses: list[int], capacity: int) -> list[bool]:
    import libcachesim

    cache = getattr(libcachesim, rule)(cache_size=capacity)
    return [bool(cache.get(libcachesim.Request(obj_id=e, obj_size=1))) for e in accesses]


def accesses_of(trace: Trace, layer: int) -> list[int]:
    """Return the experts of each token in rank order, one by one."""
    ids = trace.experts[:, layer].ravel()
    return [int(expert) for expert in ids[ids != MISSING]]


@pytest.mark.skipif(sys.platform != "linux", reason="libcachesim is for Linux")
@pytest.mark.parametrize("capacity", [1, 3, 8, 20, 31, 32])
@pytest.mark.parametrize("rule", list(RULES))
def test_rules_equal_libcachesim_access_by_access(rule: str, capacity: int) -> None:
    trace = synthesize(layers=2, experts=32, top_k=4, sequences=3, prompt=50, generate=150, seed=3)
    accesses = accesses_of(trace, 1)
    assert len(accesses) == 3 * 199 * 4

    hits = own_hits(rule, accesses, capacity, 32)

    assert hits == libcachesim_hits(rule, accesses, capacity)
    assert sum(hits) > 0 or capacity == 1


@pytest.mark.skipif(sys.platform != "linux", reason="libcachesim is for Linux")
@pytest.mark.skipif(not GENERAL.is_file(), reason="needs the recorded trace")
@pytest.mark.parametrize("rule", list(RULES))
def test_rules_equal_libcachesim_on_a_recorded_trace(rule: str) -> None:
    accesses = accesses_of(load_trace(GENERAL), LAYER)
    rates = []
    for capacity in (1, 8, 20, 64, 120):
        hits = own_hits(rule, accesses, capacity, 128)
        assert hits == libcachesim_hits(rule, accesses, capacity)
        rates.append(sum(hits) / len(hits))
    assert rates == sorted(rates)
    assert rates[0] < 0.1
    assert rates[-1] > 0.9


def test_lru_and_fifo_differ_after_a_hit() -> None:
    """With 2 places: 1 2 1 3 leaves {1, 3} under LRU and {2, 3} under FIFO."""
    assert own_hits("LRU", [1, 2, 1, 3, 1], 2, 4) == [False, False, True, False, True]
    assert own_hits("FIFO", [1, 2, 1, 3, 1], 2, 4) == [False, False, True, False, False]


EXPERTS = 6
LAYERS = 2
places = st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1))
commands = st.one_of(
    st.tuples(st.just("append"), places),
    st.tuples(st.just("leave"), places),
    st.tuples(st.just("lru"), places),
    st.tuples(st.just("fifo"), places),
)


def contents(order: Order, layer: int) -> list[int]:
    """Return a layer's experts, oldest first, by asking for the oldest of those not yet named."""
    seen = np.zeros(EXPERTS, np.int64)
    found: list[int] = []
    for _ in range(EXPERTS + 1):
        oldest = order_oldest(order, layer, seen)
        if oldest == NONE:
            break
        found.append(int(oldest))
        seen[oldest] = 1
    return found


@settings(deadline=None)
@given(
    st.lists(st.tuples(commands, st.lists(st.integers(0, EXPERTS - 1), max_size=EXPERTS))),
)
def test_order_is_a_list_per_layer(script: list[Any]) -> None:
    order = new_order(LAYERS, EXPERTS)
    model: list[list[int]] = [[] for _ in range(LAYERS)]
    for (command, (layer, expert)), guarded in script:
        if command == "leave":
            order_leave(order, layer, expert)
        elif command == "append":
            order_append(order, layer, expert)
        elif command == "lru":
            lru_use(order, layer, expert)
        else:
            fifo_use(order, layer, expert)
        if command != "fifo" and expert in model[layer]:
            model[layer].remove(expert)
        if command in ("append", "lru"):
            model[layer].append(expert)
        protected = np.zeros(EXPERTS, np.int64)
        protected[guarded] = 3
        for at in range(LAYERS):
            assert contents(order, at) == model[at]
            free = [e for e in model[at] if e not in guarded]
            assert order_oldest(order, at, protected) == (free[0] if free else NONE)


def steps_of_trace(trace: Trace, workload: Workload) -> list[Step]:
    """Return the routing of each forward pass: all prompts first, then token by token."""
    prompts = [workload.prompt_rows(i) for i in range(workload.sequences)]
    decodes = [workload.decode_rows(i) for i in range(workload.sequences)]
    passes = [np.concatenate(prompts)]
    longest = max(len(rows) for rows in decodes)
    passes += [np.array([r[at] for r in decodes if at < len(r)]) for at in range(longest)]
    return [{la: trace.experts[rows, la].tolist() for la in range(trace.layers)} for rows in passes]


def protected_lru(steps: list[Step], capacity: list[int]) -> Outcome:
    """Return who hits and who misses in caches that never evict an expert active in the step."""
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in capacity]
    outcome: Outcome = {}
    for number, step in enumerate(steps):
        for layer, tokens in step.items():
            cache = caches[layer]
            active = list(dict.fromkeys(expert for token in tokens for expert in token))
            hits = [expert for expert in active if expert in cache]
            misses = [expert for expert in active if expert not in cache]
            outcome[number, layer] = (set(hits), set(misses))
            for expert in hits:
                cache.move_to_end(expert)
            for expert in misses:
                if len(cache) == capacity[layer]:
                    victim = next((old for old in cache if old not in active), None)
                    if victim is None:
                        continue
                    del cache[victim]
                cache[expert] = None
    return outcome


def logged(run: Replayed) -> Outcome:
    """Return who ran from the cache and who was copied first, from the log."""
    assert run.log is not None
    rows = run.log.operations
    ran = rows[rows["kind"] == EXPERT_GPU]
    copied = rows[rows["kind"] == COPY_IN]
    assert {CAUSES[cause] for cause in copied["cause"]} == {CAUSES[DEMAND]}
    missed = {tuple(map(int, row)) for row in copied[["step", "layer", "expert"]]}
    outcome: Outcome = {}
    for row in ran:
        step, layer, expert = int(row["step"]), int(row["layer"]), int(row["expert"])
        hits, misses = outcome.setdefault((step, layer), (set(), set()))
        (misses if (step, layer, expert) in missed else hits).add(expert)
    assert len(missed) == sum(len(misses) for _, misses in outcome.values())
    return outcome


def assert_same_hits(run: Replayed, trace: Trace) -> int:
    """Compare a run with the independent cache, step by step; return its hits."""
    steps = steps_of_trace(trace, run.prepared.workload)
    expected = protected_lru(steps, run.prepared.policy.cache.capacity.tolist())
    assert logged(run) == expected
    hits = sum(len(hits) for hits, _ in expected.values())
    counts = np.asarray(run.prepared.host.counts)[:, :, 0]
    assert counts[:, RESIDENT].sum() == hits
    prefill = sum(len(hits) for (step, _), (hits, _) in expected.items() if step == 0)
    assert counts[0, RESIDENT] == prefill
    assert counts.sum() == sum(len(a) + len(b) for a, b in expected.values())
    assert counts[:, OUTCOMES.index("cpu")].sum() == 0
    return hits


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("spec", ["lru", "lru:staging=1", "lru:staging=5"])
def test_replayed_hits_equal_a_cache_that_protects_active_experts(
    run: Callable[..., Replayed], trace: Trace, spec: str, batch: int
) -> None:
    hits = [
        assert_same_hits(run(spec, slots, batch=batch), trace) for slots in (1, 5, 9, 13, 17, 30)
    ]

    assert hits[0] == 0
    assert hits[-1] > hits[2] > 0


@pytest.mark.skipif(not GENERAL.is_file(), reason="needs the recorded trace")
def test_replayed_hits_equal_it_on_a_recorded_trace(profile: HardwareProfile) -> None:
    trace = load_trace(GENERAL)
    model = load_model("qwen3-30b-a3b")
    workload = cut(trace, batch=2, prompt=8, generate=12)
    budget_bytes = 48 * 32 * expert_bytes(model)
    prepared = prepare(trace, workload, model, profile, choose("lru"), budget_bytes=budget_bytes)

    assert assert_same_hits(replay(prepared, record=True), trace) > 0
