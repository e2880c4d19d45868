from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim.policies.testing as lab
from moesim.audit import audit
from moesim.errors import PolicyError
from moesim.jit.store import disabled
from moesim.model import ModelSpec, expert_bytes, load_model, spec_from_dict
from moesim.policies import moe_infinity
from moesim.policies.api import CACHE, COMMANDS, Offline, Setting, transfer_ns
from moesim.policies.moe_infinity import (
    MoeInfinity,
    most_similar,
    new_collection,
    note_routing,
    past_requests,
)
from moesim.policies.registry import choose
from moesim.profile import load_profile
from moesim.run import Prepared, prepare
from moesim.sim.metrics import summarize
from moesim.sim.replay import Replayed, replay
from moesim.traces.bundled import example_path
from moesim.traces.format import Trace, read_trace
from moesim.traces.predictors import guess
from moesim.traces.synthetic import synthesize
from moesim.traces.workload import cut, steps_of
from moesim.types import (
    COPY_IN,
    DEMAND,
    GPU,
    H2D,
    H2D_BACKGROUND,
    NONE,
    PREFETCH,
    WHOLE,
    IntArray,
)

MakeSetting = Callable[..., Setting]
MakeDesk = Callable[[Setting], Any]
Run = Callable[..., Replayed]

SPECS = (
    "moe-infinity",
    "moe-infinity:match=code,evict=code,staging=1",
    "moe-infinity:evict=request",
    "moe-infinity:evict=code,prefetch=false",
    "moe-infinity:entries=1",
)


@pytest.mark.parametrize("spec", SPECS)
class TestMoeInfinity(lab.PolicyConformance):
    """The laws of all policies, under the rules in turn; these runs know no past request."""

    @pytest.fixture(autouse=True)
    def choose_rules(self, spec: str) -> None:
        self.policy = spec


# With past requests.


def served(
    spec: str,
    now: Any,
    past: Sequence[Any],
    costs: Any,
    *,
    experts: int = 4,
    slots: int = 8,
    prompt: int = 1,
) -> Prepared:
    """Return a run of one request; past ones have as many tokens."""
    choices = np.concatenate([now, *past])
    trace = lab.make_trace(choices, experts, (prompt,) * (1 + len(past)))
    return prepare(
        trace, cut(trace, 1), lab.make_model(trace.layers, experts, trace.top_k),
        lab.quiet_machine(), choose(spec), budget_bytes=slots * lab.EXPERT_BYTES, costs=costs,
    )  # fmt: skip


def run_served(spec: str, now: Any, past: Sequence[Any], costs: Any, **options: Any) -> Replayed:
    done = replay(served(spec, now, past, costs, **options), record=True)
    assert done.log is not None
    audit(done.log)
    return done


def copies(done: Replayed) -> list[tuple[int, int, int, int]]:
    """Return (step, layer, expert, cause) of each copy, in the order in which they were ordered."""
    assert done.log is not None
    rows = done.log.operations[done.log.operations["kind"] == COPY_IN]
    return [tuple(row) for row in rows[["step", "layer", "expert", "cause"]].tolist()]


def random_requests(rng: Any, n: int, *shape: int, experts: int) -> list[IntArray]:
    tokens, layers, top_k = shape
    return [
        np.array([[rng.permutation(experts)[:top_k] for _ in range(layers)] for _ in range(tokens)])
        for _ in range(n)
    ]


WILD = {"attention": 90, "gate": 10, "gpu": 40, "combine": 5, "head": 9}


@given(
    spec=st.sampled_from(SPECS),
    experts=st.integers(1, 6),
    layers=st.integers(1, 4),
    tokens=st.integers(1, 5),
    past=st.integers(1, 4),
    slots=st.integers(1, 20),
    copy=st.sampled_from([16, 64, 320]),
    seed=st.integers(0, 999),
)
@settings(max_examples=80)
def test_every_order_is_legal_whatever_the_past(
    spec: str, experts: int, layers: int, tokens: int, past: int, slots: int, copy: int, seed: int
) -> None:
    """And what it believes to be cached is cached."""
    rng = np.random.default_rng(seed)
    shape = (tokens, layers, int(rng.integers(1, experts + 1)))
    requests = random_requests(rng, 1 + past, *shape, experts=experts)
    done = run_served(
        spec, requests[0], requests[1:], lab.make_costs(layers, **WILD, copy_ns_per_kib=copy),
        experts=experts, slots=slots, prompt=int(rng.integers(1, tokens + 1)),
    )  # fmt: skip
    policy = done.prepared.policy
    held = policy.pool.cells[: policy.pool.kept[0]]
    assert sorted(held.tolist()) == np.flatnonzero(done.prepared.host.res.cached).tolist()
    assert (policy.pool.at[held] == np.arange(len(held))).all()
    assert (policy.pool.at >= 0).sum() == len(held)


@pytest.mark.skipif(disabled(), reason="nothing compiles")
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("slots", [3, 9, 20])
def test_both_machines_do_the_same(spec: str, slots: int) -> None:
    rng = np.random.default_rng(slots)
    requests = random_requests(rng, 6, 12, 4, 2, experts=8)
    costs = lab.make_costs(4, **WILD, copy_ns_per_kib=64)
    logs = [
        replay(
            served(spec, requests[0], requests[1:], costs, experts=8, slots=slots, prompt=3),
            machine=machine, record=True,
        ).log
        for machine in ("simpy", "compiled")
    ]  # fmt: skip
    simpy, compiled = logs
    assert simpy is not None
    assert compiled is not None
    assert (simpy.operations == compiled.operations).all()
    assert (simpy.segments == compiled.segments).all()


def test_a_token_that_repeats_a_past_one_finds_everything_there() -> None:
    """Layer 0 is copied on demand, from 110 to 235, while the host orders what comes after it.

    Until the next gate, 140 after that copy, two more can start: for layer 1 at 235, for layer 2
    at 360. Their gates are at 280 + 110 and 435 + 110.
    """
    token = [[[0], [1], [2]]]
    costs = lab.make_costs(
        3, attention=100, gate=10, gpu=40, combine=5, head=7, copy_ns_per_kib=125
    )
    done = run_served("moe-infinity", token, [token], costs)
    assert lab.spans(done, "copy_in") == [
        ("h2d", "copy_in", 0, 0, 110, 235),
        ("h2d", "copy_in", 1, 1, 235, 360),
        ("h2d", "copy_in", 2, 2, 360, 485),
    ]
    assert lab.makespan_ns(done) == 110 + 125 + 45 + 2 * (110 + 45) + 7
    assert done.prepared.host.counts.sum(axis=0)[0, :, 0].tolist() == [0, 2, 0, 1, 0]  # two arrived

    alone = run_served("moe-infinity:prefetch=false", token, [token], costs)
    assert lab.makespan_ns(alone) == 3 * (110 + 125 + 45) + 7


def test_demand_overtakes_a_prefetch_at_its_next_chunk() -> None:
    """The past speaks for expert 1 in layer 1, whose copy of 400 runs from 510; 3 is chosen.

    The gate of layer 1 is at 665; of four chunks the second ends at 710.
    """
    costs = lab.make_costs(
        2, attention=100, gate=10, gpu=40, combine=5, head=7, copy_ns_per_kib=400
    )
    done = run_served("moe-infinity", [[[0], [3]]], [[[[0], [1]]]], costs)
    assert lab.spans(done, "copy_in") == [
        ("h2d", "copy_in", 0, 0, 110, 510),
        ("h2d", "copy_in", 1, 1, 510, 710),
        ("h2d", "copy_in", 1, 3, 710, 1110),
        ("h2d", "copy_in", 1, 1, 1110, 1310),
    ]


def test_without_a_past_the_run_says_so_and_loads_on_demand(run: Run, trace: Trace) -> None:
    done = run("moe-infinity", 9, batch=4)
    assert any("knows no past request" in notice for notice in done.prepared.notices)
    assert not any(cause == PREFETCH for *_, cause in copies(done))
    assert copies(done) == copies(run("moe-infinity:evict=request,prefetch=false", 9, batch=4))
    done = run("moe-infinity", 9)
    assert not any("knows no past request" in notice for notice in done.prepared.notices)


def test_it_needs_one_slot() -> None:
    with pytest.raises(PolicyError, match=r"needs 1 slots of 1024 bytes .* budget is 0 bytes"):
        lab.run(choose("moe-infinity"), [[[0, 1]]], lab.make_costs(), slots=0)


# The collection.


def observed(*requests: Any) -> Callable[..., Offline]:
    """Return what an offline observation of these (tokens, layers, top_k) would be."""
    ids = np.concatenate([np.array(request) for request in requests]).astype(np.int64)
    sequence = np.repeat(np.arange(len(requests)), [len(request) for request in requests])
    return lambda *_: Offline(ids, sequence, np.zeros((0, 0, 0), np.int64))


def test_a_past_request_s_matrix_counts_its_tokens(make_setting: MakeSetting) -> None:
    """A missing choice counts nowhere."""
    setting = make_setting(9, layers=2, experts=4)._replace(
        offline=observed([[[0, 1], [2, 3]], [[0, 2], [3, NONE]]], [[[3, 2], [1, 0]]])
    )
    assert past_requests(setting).tolist() == [
        [[2, 1, 1, 0], [0, 0, 1, 2]],
        [[0, 0, 1, 1], [1, 1, 0, 0]],
    ]
    assert len(past_requests(make_setting(9))) == 0


def test_one_request_too_many_replaces_the_most_similar() -> None:
    """The third is nearer to the second, [[0, 4]] against [[1, 3]], than to [[5, 0]]."""
    three = np.array([[[5, 0], [1, 1]], [[0, 4], [1, 1]], [[1, 3], [1, 1]]])
    assert new_collection(three, 3).tokens.tolist() == three.tolist()
    assert new_collection(three, 2).tokens.tolist() == three[[0, 2]].tolist()
    assert new_collection(three[[1, 0, 2]], 2).tokens.tolist() == three[[2, 0]].tolist()
    assert new_collection(three, 0).tokens.tolist() == [[[0, 0], [0, 0]]]


def test_the_collection_stays_within_its_memory(
    make_setting: MakeSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = observed(*(random_requests(np.random.default_rng(0), 9, 2, 2, 2, experts=8)))
    setting = make_setting(9)._replace(offline=many)

    def held(**parameters: Any) -> int:
        return len(MoeInfinity.new(setting, **parameters).outlook.past.tokens)

    assert held() == 9
    assert held(entries=4) == 4
    monkeypatch.setattr(moe_infinity, "MOST_CELLS", 6 * 2 * 8 + 1)
    assert held() == 6
    monkeypatch.setattr(moe_infinity, "MOST_CELLS", 1)
    assert held() == 1


# The match.


def similarity(request: IntArray, past: IntArray, rows: Sequence[int]) -> float:
    """Return the mean cosine of some rows, which is 0 where a row is empty."""
    cosines = []
    for row in rows:
        a, b = request[row].astype(float), past[row].astype(float)
        lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
        cosines.append(float(a @ b) / lengths if lengths else 0.0)
    return sum(cosines) / len(cosines) if cosines else 0.0


@given(seed=st.integers(0, 9999), code=st.booleans(), steps=st.integers(1, 4))
@settings(max_examples=60)
def test_the_match_is_the_most_similar_of_all_rows_seen_or_of_all_to_come(
    make_setting: MakeSetting, make_desk: MakeDesk, seed: int, code: bool, steps: int
) -> None:
    """Against matrices compared whole, after every gate."""
    rng = np.random.default_rng(seed)
    layers, experts = 3, 5
    desk = make_desk(make_setting(4, layers=layers, experts=experts))
    past = rng.integers(0, 4, (6, layers, experts)) * rng.integers(0, 2, (6, layers, experts))
    policy = MoeInfinity.new(make_setting(4, layers=layers, experts=experts))
    collection = new_collection(past, 6)
    request = policy.outlook.request._replace(
        product=np.zeros((layers, 6), np.int64),
        cosine=np.zeros((layers, 6), np.int64),
        seen=np.zeros(6, np.int64),
        passed=np.zeros(6, np.int64),
    )
    counts = np.zeros((layers, experts), np.int64)
    for _ in range(steps):
        for layer in range(layers):
            chosen = rng.permutation(experts)[: rng.integers(0, experts + 1)]
            loads = {int(expert): int(rng.integers(1, 4)) for expert in chosen}
            for expert, load in loads.items():
                counts[layer, expert] += load
            note_routing(desk.routed(loads, layer=layer), collection, request)
            cosines = [similarity(counts, one, [layer]) for one in past]
            assert request.cosine[layer] / moe_infinity.ONE == pytest.approx(cosines, abs=1e-8)
            match = most_similar(request, int(code))
            rows = range(layer + 1, layers) if code else range(layers)
            of = [similarity(counts, one, rows) for one in past]
            assert of[match] == pytest.approx(max(of), abs=1e-8)
            assert match <= int(np.argmax(np.array(of) > max(of) - 1e-12))
    assert (request.tokens == counts).all()
    assert request.routed[0] == counts[0].sum()


def test_equal_matches_are_the_first_and_the_code_s_is_that_in_a_first_prompt(
    make_setting: MakeSetting, make_desk: MakeDesk
) -> None:
    """Entries 1 and 2 have the same directions as what is chosen; the code sees no row to come yet.

    At the next token it does: that of layer 1, which speaks for entry 1.
    """
    setting = make_setting(4, layers=2, experts=4)._replace(
        offline=observed([[[0, 1], [0, 1]]], [[[2, 3], [2, 3]]], [[[2, 3], [2, 3]]] * 3)
    )
    desk = make_desk(setting)
    found: dict[str, list[int]] = {}
    for rule in ("paper", "code"):
        policy = MoeInfinity.new(setting, match=rule)
        found[rule] = []
        for layer in (0, 1, 0):
            policy.dispatch(desk.routed({2: 1, 3: 1}, layer=layer), desk.plan)
            desk.take()
            found[rule].append(int(policy.outlook.match[0]))
    assert found == {"paper": [1, 1, 1], "code": [0, 0, 1]}


def test_in_a_prompt_the_match_is_that_of_the_predictor_activation() -> None:
    """Which compares rows up to the layer where the guess is made; in a prompt no others are seen.

    Its guess for the next layer is what the match used most there.
    """
    layers, experts = 6, 16
    trace = synthesize(
        layers=layers, experts=experts, top_k=2, sequences=9, prompt=20, generate=1, domains=3,
        seed=5,
    )  # fmt: skip
    workload = cut(trace, 1)
    model = lab.make_model(layers, experts, 2)
    prepared = prepare(
        trace, workload, model, lab.quiet_machine(), choose("moe-infinity"),
        budget_bytes=20 * expert_bytes(model),
    )  # fmt: skip
    guesses, _ = guess(trace, steps_of(workload), "activation", 1, 3)
    past, request = prepared.policy.outlook.past, prepared.policy.outlook.request
    assert len(past.tokens) == 8
    matches = set()
    for layer in range(layers - 1):
        loads = np.bincount(trace.experts[workload.rows, layer].ravel(), minlength=experts)
        active = np.flatnonzero(loads)
        note_routing(
            prepared.host.seen._replace(
                layer=layer, n_active=len(active), active=active, loads=loads
            ),
            past, request,
        )  # fmt: skip
        match = most_similar(request, 0)
        matches.add(match)
        assert (guesses[:, layer + 1] == past.ranked[match, layer + 1, :3]).all()
    assert len(matches) > 1


# What is ordered.


def orders(desk: Any) -> list[tuple[Any, ...]]:
    """Return the plan; `load` is an urgent fetch into the cache, `ahead` one that is not."""
    read: list[tuple[Any, ...]] = []
    for code, layer, expert, a, b, c, d, e in desk.take():
        name = COMMANDS[code]
        if name == "fetch":
            assert (a, b, c, e) == (WHOLE, NONE, CACHE, 0)
            read.append(("load" if d else "ahead", layer, expert))
        elif name == "run_on_gpu":
            read.append(("gpu", expert))
        else:
            read.append((name, layer, expert))
    return read


LAYERS, EXPERTS = 4, 6


class Table:
    """A policy that knows one past request, given by its tokens, and a desk for its view."""

    def __init__(
        self, make_setting: MakeSetting, make_desk: MakeDesk, tokens: dict[tuple[int, int], int],
        slots: int, **parameters: Any,
    ) -> None:  # fmt: skip
        matrix = np.zeros((LAYERS, EXPERTS), np.int64)
        for (layer, expert), count in tokens.items():
            matrix[layer, expert] = count
        # A token per unit: as many as the largest row needs, missing where others have fewer.
        rows = [np.repeat(np.arange(EXPERTS), row) for row in matrix]
        past = np.full((max(1, *map(len, rows)), LAYERS, 1), NONE)
        for layer, row in enumerate(rows):
            past[: len(row), layer, 0] = row
        self.setting = make_setting(slots + 1, layers=LAYERS, experts=EXPERTS)._replace(
            offline=observed(past)
        )
        self.policy = MoeInfinity.new(self.setting, staging=1, **parameters)
        self.desk = make_desk(self.setting)
        self.copy_ns = transfer_ns(self.desk.view)

    def cache(self, *cells: tuple[int, int], arriving_copies: float = 0) -> None:
        """Let experts be cached, or on their way for as long as so many copies take."""
        for layer, expert in cells:
            self.desk.view.cached[layer, expert] = WHOLE
            if self.policy.pool.at[layer * EXPERTS + expert] == NONE:
                moe_infinity.enter(self.policy.pool, layer * EXPERTS + expert)
            if arriving_copies:
                ticket = 1 + layer * EXPERTS + expert
                self.desk.view.cached_ticket[layer, expert] = ticket
                self.desk.view.forecast.ends[ticket] = (ticket, arriving_copies * self.copy_ns)

    def ask(
        self, layer: int, *experts: int, copies: float = 0, **changes: Any
    ) -> list[tuple[Any, ...]]:
        """Dispatch; `copies` is how many take the time until the next gate."""
        view = self.desk.routed(
            dict.fromkeys(experts, 1), layer=layer, window_ns=int(copies * self.copy_ns), **changes
        )
        self.policy.dispatch(view, self.desk.plan)
        return orders(self.desk)


@pytest.fixture
def table(make_setting: MakeSetting, make_desk: MakeDesk) -> Callable[..., Table]:
    def make(tokens: dict[tuple[int, int], int], slots: int = 20, **parameters: Any) -> Table:
        return Table(make_setting, make_desk, tokens, slots, **parameters)

    return make


PAST = {(0, 0): 1, (1, 0): 3, (1, 1): 1, (2, 2): 4, (3, 3): 9, (3, 4): 2}
"""From layer 0: 3 x 3/4, 1 x 3/4, 4 x 2/4, 9 x 1/4, 2 x 1/4; in quarters 9, 3, 8, 9, 2."""


def test_the_queue_is_all_layers_to_come_by_tokens_and_nearness(table: Any) -> None:
    """Of (1, 0) and (3, 3), 9 quarters each, the nearer; nothing that the match never used."""
    desk = table(PAST)
    desk.cache((0, 0))
    queue = [("ahead", 1, 0), ("ahead", 3, 3), ("ahead", 2, 2), ("ahead", 1, 1), ("ahead", 3, 4)]
    assert desk.ask(0, 0, copies=99) == [("promote", 0, 0), ("gpu", 0), *queue]


def test_equal_tokens_go_by_layer_and_then_by_id(table: Any) -> None:
    desk = table({(0, 0): 1, (2, 5): 2, (2, 1): 2, (1, 4): 1, (1, 2): 1, (3, 0): 4})
    desk.cache((0, 0))
    queue = [("ahead", 2, 1), ("ahead", 2, 5), ("ahead", 3, 0), ("ahead", 1, 2), ("ahead", 1, 4)]
    assert desk.ask(0, 0, copies=99)[2:] == queue


def test_what_is_cached_or_behind_is_not_prefetched(table: Any) -> None:
    """After layer 1 those of layer 2 and 3: 4 x 3/4, 9 x 2/4, 2 x 2/4; (3, 3) is there."""
    desk = table(PAST)
    desk.cache((1, 5), (3, 3))
    assert desk.ask(1, 5, copies=99)[2:] == [("ahead", 2, 2), ("ahead", 3, 4)]
    assert desk.ask(3, 3, copies=99) == [("promote", 3, 3), ("gpu", 3)]


@pytest.mark.parametrize(
    ("copies", "ordered"), [(0, 0), (0.01, 1), (1, 1), (1.01, 2), (3, 3), (99, 5)]
)
def test_as_much_is_ordered_as_can_start_before_the_next_gate(
    table: Any, copies: float, ordered: int
) -> None:
    desk = table(PAST)
    desk.cache((0, 0))
    assert len(desk.ask(0, 0, copies=copies)) == 2 + ordered


def test_demands_go_first_and_the_gate_waits_for_them(table: Any) -> None:
    """Two copies on demand, then the gate, one copy later: so long, one more can start."""
    desk = table(PAST)
    assert desk.ask(0, 3, 4, copies=1) == [
        ("load", 0, 3), ("gpu", 3), ("load", 0, 4), ("gpu", 4), ("ahead", 1, 0),
    ]  # fmt: skip


@pytest.mark.parametrize("queue", [H2D, H2D_BACKGROUND])
def test_what_the_link_has_to_do_already_leaves_less(table: Any, queue: int) -> None:
    """Of 3 copies' time, the link is busy for 2.5."""
    desk = table(PAST)
    desk.cache((0, 0))
    desk.desk.view.forecast.free[queue] = 2.5 * desk.copy_ns
    assert desk.ask(0, 0, copies=3)[2:] == [("ahead", 1, 0)]


def test_a_demand_delays_what_is_behind_it(table: Any) -> None:
    """The gate is 3 copies after the demand, which the background's copy is behind: from 2 to 4."""
    desk = table(PAST)
    desk.desk.view.forecast.free[H2D_BACKGROUND] = desk.copy_ns
    assert desk.ask(0, 3, copies=3)[2:] == [("ahead", 1, 0), ("ahead", 3, 3)]


def test_work_in_the_gpu_s_queue_leaves_time_for_more(table: Any) -> None:
    desk = table(PAST)
    desk.cache((0, 0))
    desk.desk.view.forecast.free[GPU] = 2 * desk.copy_ns
    assert len(desk.ask(0, 0, copies=1)[2:]) == 3


def test_no_more_is_ordered_than_a_layer_has_experts(table: Any) -> None:
    tokens = {(layer, expert): 1 for layer in range(LAYERS) for expert in range(EXPERTS)}
    desk = table(tokens)
    desk.cache((0, 0))
    assert len(desk.ask(0, 0, copies=99)) == 2 + EXPERTS


def test_what_waits_counts_among_them(table: Any) -> None:
    """Four wait, each as good as the next one: two more make as many as a layer has experts."""
    many = {(layer, expert): 2 for layer in (2, 3) for expert in range(EXPERTS)}
    desk = table(many | {(0, 0): 1})
    queued(desk, (2, 0), (2, 1), (2, 2), (2, 3), copies=2)
    desk.cache((1, 1))
    assert desk.ask(1, 1, copies=99)[2:] == [("ahead", 2, 4), ("ahead", 2, 5)]


def test_prefetching_can_be_left_out(table: Any) -> None:
    desk = table(PAST, prefetch=False)
    assert desk.ask(0, 0, copies=99) == [("load", 0, 0), ("gpu", 0)]


# Who leaves.


def test_the_least_expected_reuse_leaves(table: Any) -> None:
    """In layer 1, in quarters: (0, 1), (1, 2) behind 2 x 4, 3 x 3; (2, 0), (3, 0) 2 x 3, 4 x 2."""
    desk = table({(0, 1): 2, (1, 2): 3, (2, 0): 2, (3, 0): 4}, 4, prefetch=False)
    desk.cache((0, 1), (1, 2), (2, 0), (3, 0))
    assert desk.ask(1, 5) == [("evict", 2, 0), ("load", 1, 5), ("gpu", 5)]
    # (1, 5) is worth 0; it is not active any more.
    assert desk.ask(1, 4) == [("evict", 1, 5), ("load", 1, 4), ("gpu", 4)]
    # From layer 3: (0, 1) 8, (1, 2) 9, (3, 0) 4 x 1, and (1, 4), which is active in no way, 0.
    assert desk.ask(3, 1, 2) == [
        ("evict", 1, 4), ("load", 3, 1), ("gpu", 1), ("evict", 3, 0), ("load", 3, 2), ("gpu", 2),
    ]  # fmt: skip


def test_of_what_the_match_never_used_the_last_layers_leave_first(table: Any) -> None:
    desk = table({(0, 0): 1}, 4, prefetch=False)
    desk.cache((0, 4), (1, 4), (2, 4), (3, 4))
    assert [order for order in desk.ask(0, 1, 2, 3) if order[0] == "evict"] == [
        ("evict", 3, 4), ("evict", 2, 4), ("evict", 1, 4),
    ]  # fmt: skip


def test_experts_of_this_layer_step_stay_and_others_pass_through_staging(table: Any) -> None:
    """Two places, of which one holds an active expert; 2 takes the other, 3 none."""
    desk = table({(1, 5): 9}, 2, prefetch=False)
    desk.cache((0, 0), (1, 5))
    assert desk.ask(0, 3, 0, 2) == [
        ("promote", 0, 0), ("gpu", 0),
        ("evict", 1, 5), ("load", 0, 3), ("gpu", 3),
        ("gpu", 2),
    ]  # fmt: skip


def test_the_code_evicts_the_fewest_visits_by_expert_and_layer(table: Any) -> None:
    """(2, 1) and (1, 1) have none: of the same expert, the lower layer; then expert 3 of layer 0.

    (0, 0) was used twice, left, and came back: that counts.
    """
    desk = table({(1, 1): 9, (2, 1): 9}, 4, prefetch=False, evict="code")
    desk.cache((0, 0), (2, 1), (1, 1), (0, 3))
    desk.ask(0, 0)
    desk.ask(0, 0)
    assert desk.ask(3, 5) == [("evict", 1, 1), ("load", 3, 5), ("gpu", 5)]
    assert desk.ask(3, 4) == [("evict", 2, 1), ("load", 3, 4), ("gpu", 4)]
    assert desk.ask(3, 3) == [("evict", 0, 3), ("load", 3, 3), ("gpu", 3)]
    # 3, 4 and 5 of layer 3 have one visit each; 0 has two.
    assert desk.ask(1, 2, 0, 1) == [
        ("evict", 3, 3), ("load", 1, 2), ("gpu", 2),
        ("evict", 3, 4), ("load", 1, 0), ("gpu", 0),
        ("evict", 3, 5), ("load", 1, 1), ("gpu", 1),
    ]  # fmt: skip
    # One visit each but (0, 0)'s two: (1, 0) is the first by expert. It comes back with its visit.
    assert desk.ask(2, 5) == [("evict", 1, 0), ("load", 2, 5), ("gpu", 5)]
    assert desk.ask(1, 0) == [("evict", 1, 1), ("load", 1, 0), ("gpu", 0)]
    assert desk.policy.pool.visits[EXPERTS] == 2


def test_a_visit_is_a_step_however_many_tokens(table: Any) -> None:
    """Three tokens use (0, 0) in one step, then one (0, 1) in each of two."""
    desk = table({(0, 0): 1}, 2, prefetch=False, evict="code")
    desk.cache((0, 0), (0, 1))
    desk.policy.dispatch(desk.desk.routed({0: 3}), desk.desk.plan)
    desk.desk.take()
    desk.ask(0, 1)
    desk.ask(0, 1)
    assert desk.ask(1, 5) == [("evict", 0, 0), ("load", 1, 5), ("gpu", 5)]


def test_the_request_s_own_tokens_decide_if_asked_for(table: Any) -> None:
    """The match speaks for (0, 1); the request has used (0, 2) twice and (0, 1) once."""
    past = {(0, 1): 9, (0, 2): 1}
    for rule, victim in (("paper", 2), ("request", 1)):
        desk = table(past, 2, prefetch=False, evict=rule)
        desk.cache((0, 1), (0, 2))
        desk.ask(0, 1, 2)
        desk.ask(0, 2)
        assert desk.ask(1, 5) == [("evict", 0, victim), ("load", 1, 5), ("gpu", 5)]


def test_a_match_without_tokens_in_the_first_layer_decides_as_well(table: Any) -> None:
    """It speaks for (1, 1), the request has used (1, 2)."""
    desk = table({(1, 1): 9}, 2, prefetch=False)
    desk.cache((1, 1), (1, 2))
    desk.ask(1, 2)
    assert desk.ask(2, 5) == [("evict", 1, 2), ("load", 2, 5), ("gpu", 5)]


def test_a_prefetch_takes_the_place_of_what_is_expected_less_only(table: Any) -> None:
    """From layer 0, in quarters: (1, 0) 9, (3, 3) 9, (2, 2) 8, (1, 1) 3, (3, 4) 2.

    Cached and worth 2 x 4 = 8 and 1 x 4 = 4, of layer 0, besides the active one: 9 and 9 take
    their places, in the order 4, 8; 8 would need a place that is worth less.
    """
    desk = table(PAST | {(0, 1): 2, (0, 2): 1}, 3)
    desk.cache((0, 0), (0, 1), (0, 2))
    assert desk.ask(0, 0, copies=99)[2:] == [
        ("evict", 0, 2), ("ahead", 1, 0), ("evict", 0, 1), ("ahead", 3, 3),
    ]  # fmt: skip
    desk = table(PAST | {(0, 1): 2, (0, 2): 3}, 3)
    desk.cache((0, 0), (0, 1), (0, 2))  # 8 and 12
    assert desk.ask(0, 0, copies=99)[2:] == [("evict", 0, 1), ("ahead", 1, 0)]


def test_a_prefetch_displaces_nobody_who_is_expected_just_as_much(table: Any) -> None:
    """(1, 0) scores 9 and takes the place worth 4; (1, 1) and the cached (1, 2) have 6 each."""
    desk = table({(0, 0): 1, (0, 1): 1, (1, 0): 3, (1, 1): 2, (1, 2): 2}, 3)
    desk.cache((0, 0), (0, 1), (1, 2))
    assert desk.ask(0, 0, copies=99)[2:] == [("evict", 0, 1), ("ahead", 1, 0)]


def test_layers_behind_are_worth_less_the_later_they_are(table: Any) -> None:
    """From layer 2, in quarters: (3, 0) 9, (3, 1) 6; behind, (0, 1) 1 x 4 and (1, 1) 2 x 3."""
    desk = table({(0, 1): 1, (1, 1): 2, (2, 0): 1, (3, 0): 3, (3, 1): 2}, 3)
    desk.cache((2, 0), (0, 1), (1, 1))
    assert desk.ask(2, 0, copies=99)[2:] == [("evict", 0, 1), ("ahead", 3, 0)]


def test_the_code_s_prefetch_passes_over_who_is_expected_more(table: Any) -> None:
    """(0, 1) has no visit and is worth 20; (0, 2) has one and is worth 4, less than (1, 0)'s 9."""
    desk = table(PAST | {(0, 1): 5, (0, 2): 1}, 3, evict="code")
    desk.cache((0, 0), (0, 1), (0, 2))
    desk.ask(0, 2)
    assert desk.ask(0, 0, copies=1)[2:] == [("evict", 0, 2), ("ahead", 1, 0)]


def test_shares_are_compared_where_the_request_s_tokens_decide(table: Any) -> None:
    """(1, 0) has a quarter of the match's tokens, x 3/4; (0, 1) one of 3 to 6 of the request's."""
    desk = table({(0, 0): 3, (0, 3): 1, (1, 0): 1}, 2, evict="request")
    desk.cache((0, 0), (0, 1))
    desk.ask(0, 0, 1)
    for _ in range(3):
        assert desk.ask(0, 0, copies=99)[2:] == []
    assert desk.ask(0, 0, copies=99)[2:] == [("evict", 0, 1), ("ahead", 1, 0)]


def test_shares_are_compared_for_every_prefetch(table: Any) -> None:
    """In shares x 28: (1, 0) 3/2 x 3/4 is 31.5, (2, 1) 1/2 x 2/4 is 7; (0, 1), (0, 2) 2/7 are 8."""
    desk = table({(0, 0): 2, (1, 0): 3, (2, 1): 1}, 3, evict="request")
    desk.cache((0, 0), (0, 1), (0, 2))
    desk.ask(0, 0, 1, 2)
    desk.ask(0, 0, 1, 2)
    assert desk.ask(0, 0, copies=99)[2:] == [("evict", 0, 1), ("ahead", 1, 0)]


def test_a_prefetch_stays_until_its_layer_has_run(table: Any) -> None:
    """(3, 4), worth least of all, is prefetched at layer 0; demands evict others before layer 3.

    They evict it in layer 3, where it is not active, and in the next step.
    """
    tokens = {(0, 0): 1, (0, 1): 9, (3, 4): 1}
    for layer, step, evicted in ((2, 1, (0, 1)), (3, 1, (3, 4)), (0, 2, (3, 4))):
        desk = table(tokens, 3)
        desk.cache((0, 0), (0, 1))
        assert desk.ask(0, 0, copies=1)[2:] == [("ahead", 3, 4)]
        desk.cache((3, 4))
        evicts = [order[1:] for order in desk.ask(layer, 0, 5, 2, step=step) if order[0] == "evict"]
        assert (3, 4) not in evicts if evicted != (3, 4) else evicts[0] == (3, 4)


# The queue is replaced.


def queued(desk: Any, *cells: tuple[int, int], copies: float) -> None:
    """Order prefetches and let them take so long until they are there."""
    desk.cache((0, 0))
    asked = desk.ask(0, 0, copies=len(cells))
    assert asked[2:] == [("ahead", *cell) for cell in cells]
    desk.cache(*cells, arriving_copies=copies)


def test_what_has_not_begun_and_is_not_first_any_more_is_taken_back(table: Any) -> None:
    """(1, 0) and (3, 3) wait. In layer 1, 1 is chosen and in the cache: 0 is of no use any more.

    (3, 3), now 9 x 2/4, still comes before (2, 2), 4 x 3/4.
    """
    desk = table(PAST)
    queued(desk, (1, 0), (3, 3), copies=2)
    desk.cache((1, 1))
    assert desk.ask(1, 1) == [("evict", 1, 0), ("promote", 1, 1), ("gpu", 1)]
    assert desk.policy.queue.cells[: desk.policy.queue.length[0]].tolist() == [3 * EXPERTS + 3]


def test_a_better_one_takes_the_place_in_the_queue(table: Any) -> None:
    """(3, 3) waits, 9 x 2/4; the match changes to one with 7 x 3/4 for (2, 5)."""
    desk = table(PAST)
    queued(desk, (1, 0), (3, 3), copies=2)
    desk.policy.outlook.past.tokens[0, 2] = [0, 0, 0, 0, 0, 7]
    desk.policy.outlook.past.ranked[0, 2] = [5, 0, 1, 2, 3, 4]
    assert desk.ask(1, 0, copies=99) == [
        ("evict", 3, 3), ("promote", 1, 0), ("gpu", 0),
        ("ahead", 2, 5), ("ahead", 3, 3), ("ahead", 3, 4),
    ]  # fmt: skip


def test_what_waits_stays_in_the_queue_before_its_equals(table: Any) -> None:
    desk = table({(0, 0): 1, (3, 3): 2, (3, 4): 2})
    queued(desk, (3, 3), copies=2)
    desk.cache((1, 1))
    assert desk.ask(1, 1) == [("promote", 1, 1), ("gpu", 1)]
    assert desk.policy.queue.cells[: desk.policy.queue.length[0]].tolist() == [3 * EXPERTS + 3]


@pytest.mark.parametrize("copies", [0, 0.5, 1])
def test_what_is_under_way_or_there_is_left_alone(table: Any, copies: float) -> None:
    desk = table(PAST)
    queued(desk, (1, 0), (3, 3), copies=copies)
    desk.cache((1, 1))
    assert desk.ask(1, 1) == [("promote", 1, 1), ("gpu", 1)]
    assert desk.policy.queue.length[0] == 0


def test_what_is_chosen_while_it_waits_becomes_urgent_and_runs_after_what_is_there(
    table: Any,
) -> None:
    desk = table(PAST)
    queued(desk, (1, 0), copies=2)
    desk.cache((1, 4))
    assert desk.ask(1, 0, 4) == [("promote", 1, 4), ("gpu", 4), ("promote", 1, 0), ("gpu", 0)]
    assert desk.policy.queue.length[0] == 0


# Against a cache written anew.


def reference(
    choices: Any, past: IntArray, capacity: int, rule: str, experts: int
) -> list[tuple[int, int, int]]:
    """Return what one token at a time copies (step, layer, expert), without prefetching."""
    layers = len(choices[0])
    inside: set[tuple[int, int]] = set()
    visits: dict[tuple[int, int], int] = {}
    own = np.zeros((layers, experts))
    copied = []

    def worth(cell: tuple[int, int], now: int) -> tuple[Any, ...]:
        layer, expert = cell
        if rule == "code":
            return (visits.get(cell, 0), expert, layer)
        tokens = own[cell] if rule == "request" else past[cell]
        factor = 1 - (layer - now if layer > now else layer) / layers
        return ((tokens + 1e-8) * factor, cell)

    for step, token in enumerate(choices):
        for layer, chosen in enumerate(token):
            for expert in chosen:
                own[layer, expert] += 1
            active = {(layer, int(expert)) for expert in chosen}
            missing = [int(expert) for expert in chosen if (layer, int(expert)) not in inside]
            leaving = sorted(inside - active, key=lambda cell: worth(cell, layer))
            for expert in missing:
                if len(inside) == capacity and leaving:
                    inside.remove(leaving.pop(0))
                if len(inside) < capacity:
                    inside.add((layer, expert))
                copied.append((step, layer, expert))
            for cell in active:
                visits[cell] = visits.get(cell, 0) + 1
    return copied


@pytest.mark.parametrize("rule", ["paper", "request", "code"])
@given(slots=st.integers(2, 14), top_k=st.integers(1, 3), seed=st.integers(0, 999))
@settings(max_examples=40)
def test_without_prefetches_copies_are_those_of_one_cache_for_all_layers(
    rule: str, slots: int, top_k: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    now, before = random_requests(rng, 2, 10, 3, top_k, experts=5)
    done = run_served(
        f"moe-infinity:prefetch=false,evict={rule},staging=1", now, [before],
        lab.make_costs(3, **WILD, copy_ns_per_kib=64), experts=5, slots=slots,
    )  # fmt: skip
    past = np.stack([np.bincount(before[:, layer].ravel(), minlength=5) for layer in range(3)])
    found = [copy[:3] for copy in copies(done)]
    assert found == reference(now, past, min(slots - 1, 15), rule, 5)
    assert all(cause == DEMAND for *_, cause in copies(done))


# What was published.


def tpot_ms(trace: Trace, model: ModelSpec, hardware: str, ratio: float, spec: str) -> float:
    prepared = prepare(
        trace, cut(trace, 1), model, load_profile(hardware)[0], choose(spec),
        budget_bytes=int(ratio * model.layers * model.experts) * expert_bytes(model),
    )  # fmt: skip
    milliseconds: float = summarize(replay(prepared))["tpot_ms"]
    return milliseconds


def test_it_is_much_faster_than_loads_on_demand() -> None:
    """The paper has 3.1 to 16.7 times, against systems of which none caches experts so."""
    model = load_model("deepseek-v2-lite")
    trace = synthesize(
        layers=model.layers, experts=model.experts, top_k=model.top_k, sequences=6, prompt=32,
        generate=12, seed=3,
    )  # fmt: skip
    slow, fast = (
        tpot_ms(trace, model, "a6000-pcie4", 0.5, spec) for spec in ("on-demand", "moe-infinity")
    )
    assert slow / fast > 2


def test_with_a_real_router_it_is_faster_than_an_lru_cache() -> None:
    """The bundled trace; most of the gain is that of prefetching, where the link is fast enough."""
    trace = read_trace(example_path())
    model = spec_from_dict(trace.meta["spec"])
    lru, without, whole = (
        tpot_ms(trace, model, "rtx3090-pcie4-ddr4", 0.25, spec)
        for spec in ("lru", "moe-infinity:prefetch=false", "moe-infinity")
    )
    assert whole < without < lru
