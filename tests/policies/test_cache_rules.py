import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim.policies.testing as lab
from moesim.model import expert_bytes, load_model
from moesim.policies.parts.cache import (
    Order,
    fifo_use,
    lfu_use,
    lru_use,
    new_order,
    order_append,
    order_least,
    order_leave,
    order_oldest,
)
from moesim.policies.parts.loading import full_demand_cache
from moesim.policies.registry import choose
from moesim.profile import HardwareProfile
from moesim.run import prepare
from moesim.sim.replay import Replayed, replay
from moesim.traces.format import MISSING, Trace
from moesim.traces.importers import load_trace
from moesim.traces.synthetic import synthesize
from moesim.traces.workload import Workload, cut
from moesim.types import CAUSES, COPY_IN, DEMAND, EXPERT_GPU, NONE, OUTCOMES, RESIDENT, WHOLE

GENERAL = Path(__file__).resolve().parents[2].parent / "shared/traces/qwen3-30b-a3b-general.npz"
LAYER = 24
NEVER = (1 << 63) - 1
RULES = ("LRU", "FIFO", "LFU")

Step = dict[int, list[list[int]]]
"""By layer: the experts of each token in rank order."""

Outcome = dict[tuple[int, int], tuple[set[int], set[int]]]
"""By step and layer: the experts that were cached, and all others that were active."""


def own_hits(rule: str, accesses: list[int], capacity: int, experts: int) -> list[bool]:
    """Return hit or miss of each access to a cache of one layer, kept with the rule functions."""
    order = new_order(1, experts)
    uses = np.zeros((1, experts), np.int64)
    nobody = np.zeros(experts, np.int64)
    inside: set[int] = set()
    hits = []
    for expert in accesses:
        hits.append(expert in inside)
        if expert not in inside:
            if len(inside) == capacity:
                victim = order_least(order, uses, 0, nobody)
                order_leave(order, 0, victim)
                uses[0, victim] = 0
                inside.remove(victim)
            order_append(order, 0, expert)
            inside.add(expert)
        if rule == "LFU":
            lfu_use(order, uses, 0, expert)
        else:
            {"LRU": lru_use, "FIFO": fifo_use}[rule](order, 0, expert)
    return hits


def libcachesim_hits(rule: str, accesses: list[int], capacity: int) -> list[bool]:
    """Return its hits and misses; Belady's rule is told when each is accessed next."""
    import libcachesim

    cache = getattr(libcachesim, rule)(cache_size=capacity)
    hits = []
    next_use: dict[int, int] = {}
    later = []
    for at, expert in reversed([*enumerate(accesses)]):
        later.append(next_use.get(expert, NEVER))
        next_use[expert] = at
    for expert, then in zip(accesses, reversed(later), strict=True):
        request = libcachesim.Request(obj_id=expert, obj_size=1, next_access_vtime=then)
        hits.append(bool(cache.get(request)))
    return hits


def accesses_of(trace: Trace, layer: int) -> list[int]:
    """Return the experts of each token in rank order, one by one."""
    ids = trace.experts[:, layer].ravel()
    return [int(expert) for expert in ids[ids != MISSING]]


@pytest.mark.skipif(sys.platform != "linux", reason="libcachesim is for Linux")
@pytest.mark.parametrize("capacity", [1, 3, 8, 20, 31, 32])
@pytest.mark.parametrize("rule", RULES)
def test_rules_equal_libcachesim_access_by_access(rule: str, capacity: int) -> None:
    trace = synthesize(layers=2, experts=32, top_k=4, sequences=3, prompt=50, generate=150, seed=3)
    accesses = accesses_of(trace, 1)
    assert len(accesses) == 3 * 199 * 4

    hits = own_hits(rule, accesses, capacity, 32)

    assert hits == libcachesim_hits(rule, accesses, capacity)
    assert sum(hits) > 0 or capacity == 1


@pytest.mark.skipif(sys.platform != "linux", reason="libcachesim is for Linux")
@pytest.mark.skipif(not GENERAL.is_file(), reason="needs the recorded trace")
@pytest.mark.parametrize("rule", RULES)
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


def test_lfu_keeps_what_is_used_most_and_of_equals_what_was_used_last() -> None:
    """With 2 places: 3 replaces 2, for 1 has two uses. At three each, 1 is older and 2 replaces it.

    What 1 was used before it left no longer counts: it replaces 2, and 3 hits.
    """
    accesses = [1, 1, 2, 3, 1, 3, 3, 2, 1, 3]
    assert own_hits("LFU", accesses, 2, 4) == [
        False, True, False, False, True, True, True, False, False, True,
    ]  # fmt: skip
    assert own_hits("LRU", accesses, 2, 4)[4] is False


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


def protected(rule: str, steps: list[Step], capacity: list[int]) -> Outcome:
    """Return who hits and who misses in caches that never evict an expert active in the step."""
    caches: list[list[int]] = [[] for _ in capacity]  # the oldest first
    uses: list[Counter[int]] = [Counter() for _ in capacity]
    outcome: Outcome = {}
    for number, step in enumerate(steps):
        for layer, tokens in step.items():
            inside, used = caches[layer], uses[layer]
            active = list(dict.fromkeys(expert for token in tokens for expert in token))
            hits = [expert for expert in active if expert in inside]
            misses = [expert for expert in active if expert not in inside]
            outcome[number, layer] = (set(hits), set(misses))
            for expert in hits:
                used[expert] += 1
                if rule != "fifo":
                    inside.remove(expert)
                    inside.append(expert)
            for expert in misses:
                if len(inside) == capacity[layer]:
                    others = [old for old in inside if old not in active]
                    if not others:
                        continue
                    victim = min(others, key=used.__getitem__) if rule == "lfu" else others[0]
                    inside.remove(victim)
                    del used[victim]
                inside.append(expert)
                used[expert] = 1
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
    rule = run.prepared.chosen.parameters["rule"]
    expected = protected(rule, steps, run.prepared.policy.cache.capacity.tolist())
    assert logged(run) == expected
    hits = sum(len(hits) for hits, _ in expected.values())
    counts = np.asarray(run.prepared.host.counts).sum(axis=0)[:, :, 0]
    assert counts[:, RESIDENT].sum() == hits
    prefill = sum(len(hits) for (step, _), (hits, _) in expected.items() if step == 0)
    assert counts[0, RESIDENT] == prefill
    assert counts.sum() == sum(len(a) + len(b) for a, b in expected.values())
    assert counts[:, OUTCOMES.index("cpu")].sum() == 0
    return hits


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    "spec", ["lru", "lru:staging=1", "lru:staging=5", "lru:rule=fifo", "lru:rule=lfu"]
)
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
    hits = set()
    for rule in ("lru", "fifo", "lfu"):
        chosen = choose(f"lru:rule={rule}")
        prepared = prepare(trace, workload, model, profile, chosen, budget_bytes=budget_bytes)
        hits.add(assert_same_hits(replay(prepared, record=True), trace))
    assert len(hits) == 3


def missed(
    spec: str, tokens: list[list[list[int]]], slots: int, **options: Any
) -> list[tuple[int, int]]:
    """Return step and expert of each copy in a model of one layer of 8 experts."""
    costs = lab.make_costs(1, attention=9, gpu=4)
    done = lab.run(choose(spec), tokens, costs, experts=8, slots=slots, **options)
    assert done.log is not None
    rows = done.log.operations
    return [(int(r["step"]), int(r["expert"])) for r in rows[rows["kind"] == COPY_IN]]


@pytest.mark.skipif(sys.platform != "linux", reason="libcachesim is for Linux")
@pytest.mark.parametrize("capacity", [1, 2, 4, 7])
@pytest.mark.parametrize("rule", [*RULES, "Belady"])
def test_policies_miss_when_libcachesim_does_with_one_expert_per_token(
    rule: str, capacity: int
) -> None:
    rng = np.random.default_rng(capacity)
    accesses = (rng.integers(0, 8, 300) * rng.integers(0, 2, 300)).tolist()
    spec = "belady:staging=1" if rule == "Belady" else f"lru:staging=1,rule={rule.lower()}"

    found = missed(spec, [[[e]] for e in accesses], capacity + 1)

    hits = libcachesim_hits(rule, accesses, capacity)
    assert found == [(at, e) for at, e in enumerate(accesses) if not hits[at]]


@pytest.mark.skipif(sys.platform != "linux", reason="libcachesim is for Linux")
@pytest.mark.parametrize("rule", RULES)
def test_where_policies_and_libcachesim_part(rule: str) -> None:
    """2 and 0 are needed together, and 0 is there: a policy uses it before it loads 2 for 1.

    libCacheSim looks 2 up first, in place of 0, which it then lacks.
    """
    tokens = [[0, 1], [2, 0]]
    assert libcachesim_hits(rule, [0, 1, 2, 0], 2) == [False] * 4
    assert missed(f"lru:staging=1,rule={rule.lower()}", [[t] for t in tokens], 3) == [
        (0, 0), (0, 1), (1, 2),
    ]  # fmt: skip


def test_a_cache_that_is_full_at_first_gives_up_the_lowest_id() -> None:
    cache = full_demand_cache(np.array([[0, WHOLE, 0, WHOLE], [0] * 4, [WHOLE] * 4]))
    assert cache.capacity.tolist() == cache.kept.tolist() == [2, 0, 4]
    for layer, inside in enumerate(([1, 3], [], [0, 1, 2, 3])):
        left = []
        while (victim := order_oldest(cache.order, layer, np.zeros(4, np.int64))) != NONE:
            order_leave(cache.order, layer, victim)
            left.append(victim)
        assert left == inside


def test_several_tokens_of_a_step_count_as_one_use() -> None:
    """Three tokens of a prompt use 1, two steps use 0: 1 leaves for 2, having one use."""
    tokens = [[[1]], [[1]], [[1]], [[0]], [[0]], [[2]], [[1]]]
    found = missed("lru:staging=1,rule=lfu", tokens, 3, prompts=(3,))
    assert found == [(0, 1), (1, 0), (3, 2), (4, 1)]
