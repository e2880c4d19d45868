from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim.policies.testing as lab
from moesim.costs import copy_ns
from moesim.errors import InputError, PolicyError
from moesim.jit.store import disabled
from moesim.policies.api import CACHE, COMMANDS, Setting
from moesim.policies.fate import Fate, cache_split, decode_width, mark_small, stays
from moesim.policies.parts.arc import arc_holds
from moesim.policies.registry import choose
from moesim.sim.metrics import summarize
from moesim.sim.replay import Replayed
from moesim.traces.synthetic import synthesize
from moesim.types import COPY_IN, EXPERT_CPU, EXPERT_GPU, H2D, PREFETCH, PREFILL, WHOLE
from wild import Case, cases

MakeSetting = Callable[..., Setting]
MakeDesk = Callable[[Setting], Any]
Run = Callable[..., Replayed]

INT4, INT2 = 2, 3
SPECS = (
    "fate",
    "fate:shallow=0,staging=1,width=5",
    "fate:shallow=1,predictor=noisy-oracle,width=4,link=priority",
    "fate:shallow=0,demand=int2,int2_rate=1,arc=textbook,percentile=1",
)


@pytest.mark.parametrize("spec", SPECS)
class TestFate(lab.PolicyConformance):
    """The laws of all policies, under the rules in turn."""

    @pytest.fixture(autouse=True)
    def choose_rules(self, spec: str) -> None:
        self.policy = spec


# Cache split.

MIB = 1 << 20
QWEN_E16 = 3 * 2048 * 1408 * 2
QWEN_E4 = QWEN_E16 // 4 + 3 * 2 * (1408 // 64) * 2048 * 4
QWEN_FIXED_MIB = 5329


@pytest.mark.parametrize(
    ("hidden", "width", "mib"), [(2048, 1408, (16.5, 5.16)), (4096, 14336, (336, 105))]
)
def test_expert_sizes_are_those_of_the_code(hidden: int, width: int, mib: Any) -> None:
    """Groups of 64 with a scale and a zero point in fp32: 5.16 MiB for Qwen1.5-MoE, 105 Mixtral."""
    e16 = 3 * hidden * width * 2
    e4 = e16 / 4 + 3 * 2 * (width // 64) * hidden * 4
    assert (round(e16 / MIB, 2), round(e4 / MIB, 2)) == mib


@pytest.mark.parametrize(
    ("budget", "n", "full", "deeper"),
    [
        (6, 158, 2, 38),
        (7, 356, 4, 5),
        (8, 555, 4, 15),
        (9, 753, 4, 25),
        (10, 952, 4, 35),
        (11, 1151, 4, 45),
        (12, 1349, 4, 55),
    ],
)
def test_split_of_qwen15_moe_is_the_published_table(
    budget: int, n: int, full: int, deeper: int
) -> None:
    """24 layers of 60 experts; with 6 GB two layers are full, and the third takes what is left."""
    avail = (1024 * budget - QWEN_FIXED_MIB) * MIB
    assert avail // QWEN_E4 == n

    split = cache_split(avail, 24, 60, QWEN_E16, QWEN_E4)

    rest = [deeper] * 20 if full == 4 else [deeper] + [0] * 21
    assert split.experts.tolist() == [60] * full + rest
    assert not split.all_stored
    assert split.stored_layers == 0


@pytest.mark.parametrize(("budget", "layers"), [(13, 0), (14, 2), (15, 3)])
def test_what_4_bit_experts_leave_goes_to_layers_at_16(budget: int, layers: int) -> None:
    split = cache_split((1024 * budget - QWEN_FIXED_MIB) * MIB, 24, 60, QWEN_E16, QWEN_E4)
    assert split.experts.tolist() == [60] * 24
    assert (split.all_stored, split.stored_layers) == (False, layers)


def test_all_at_16_bits_if_all_fit() -> None:
    """24 * 60 experts of 16.5 MiB."""
    for missing, all_stored in ((0, True), (1, False)):
        split = cache_split(24 * 60 * QWEN_E16 - missing, 24, 60, QWEN_E16, QWEN_E4)
        assert split.all_stored == all_stored
        assert split.experts.tolist() == [60] * 24


@given(
    avail=st.integers(0, 4000),
    layers=st.integers(1, 8),
    experts=st.integers(1, 9),
    shallow=st.integers(0, 10),
)
@settings(max_examples=300)
def test_split_laws(avail: int, layers: int, experts: int, shallow: int) -> None:
    """Shallow layers hold no less than deep ones; no more is spent than there is.

    What is left is less than one expert for each layer that could hold one more.
    """
    split = cache_split(avail, layers, experts, 40, 10, shallow)
    held = split.experts.tolist()
    assert held == sorted(held, reverse=True)
    assert 0 <= held[-1] <= held[0] <= experts
    if not split.all_stored:
        assert sum(held) * 10 + split.stored_layers * experts * 30 <= avail
    assert (min(held) == experts) == (avail >= layers * experts * 10)
    left = min(avail // 10, layers * experts) - sum(held)
    assert 0 <= left < max(1, sum(count < experts for count in held))


def test_a_run_splits_the_budget_that_staging_leaves(make_setting: MakeSetting) -> None:
    """Not quite 33 experts at 4 bits, 7 for staging: 2 layers of 8, 3 for each of 3 deeper ones."""
    setting = make_setting(100, layers=5)
    one = int(setting.costs.expert_bytes[0, INT4])
    setting = setting._replace(budget_bytes=33 * one - 8)
    policy = choose("fate:staging=7,shallow=2").make(setting)
    placed = policy.place(setting)

    assert placed.cache_slots.tolist() == [8, 8, 3, 3, 3]
    for layer, slots in enumerate(placed.cache_slots.tolist()):
        assert placed.cached[layer].tolist() == [WHOLE] * slots + [0] * (8 - slots)
    assert placed.cache_slot_bytes.tolist() == [one] * 5
    assert (placed.staging_slots, placed.staging_slot_bytes) == (7, one)
    assert placed.cached_precision == INT4
    assert placed.link == "fifo"
    (guess,) = placed.predictions
    assert (guess.predictor, guess.after_gate, guess.distance) == ("auto", False, 1)


@pytest.mark.parametrize(
    ("bytes_per_expert", "precision", "notices"),
    [("all16", 0, 0), ("some16", INT4, 1), ("all4", INT4, 0)],
)
def test_nothing_moves_if_all_fit(
    make_setting: MakeSetting, bytes_per_expert: str, precision: int, notices: int
) -> None:
    setting = make_setting(16)
    e16, e4 = setting.costs.expert_bytes[0, [0, INT4]].tolist()
    budget = {"all16": 16 * e16, "some16": 16 * e4 + 8 * (e16 - e4), "all4": 16 * e4}
    setting = setting._replace(budget_bytes=budget[bytes_per_expert])
    placed = choose("fate").make(setting).place(setting)
    assert (placed.cached == WHOLE).all()
    assert placed.cached_precision == precision
    assert (placed.staging_slots, placed.predictions) == (0, ())
    assert len(placed.notices) == notices
    if notices:
        assert placed.notices == ("Fate would keep 1 layers at 16 bits; they are kept at 4",)


def test_a_budget_below_one_expert_is_refused_in_a_line(make_setting: MakeSetting) -> None:
    setting = make_setting(8)
    one = int(setting.costs.expert_bytes[0, INT4])
    choose("fate").make(setting._replace(budget_bytes=one))
    message = f"a budget of {one - 1} bytes holds no expert: one takes {one} bytes at 4 bits"
    with pytest.raises(PolicyError, match=message):
        choose("fate").make(setting._replace(budget_bytes=one - 1))


@pytest.mark.parametrize("given", ["percentile=100", "int2_rate=1.1"])
def test_shares_that_are_none_are_refused(make_setting: MakeSetting, given: str) -> None:
    with pytest.raises(InputError, match=f"policy fate: {given} is not legal"):
        choose(f"fate:{given}").make(make_setting(8))


# How many, and at which precision.


def test_as_many_copies_as_fit_into_a_layer() -> None:
    """14 tokens/s are 2.98 ms for each of 24 layers; a copy takes 0.45 ms."""
    assert decode_width(0, 0, 2_980_000, 450_000, 60) == 6
    assert decode_width(0, 0, 2_699_999, 450_000, 60) == 5
    assert decode_width(0, 0, 449_999, 450_000, 60) == 0
    assert decode_width(0, 0, 1 << 40, 1, 60) == 60


@pytest.mark.parametrize(
    ("spec", "guesses"),
    [("width=5", 5), ("width=1", 2), ("percentile=50", 4), ("percentile=99", 2), ("width=9", 8)],
)
def test_as_many_guesses_are_asked_for(make_setting: MakeSetting, spec: str, guesses: int) -> None:
    """Of 8 experts; prefill needs top_k = 2."""
    setting = make_setting(3, layers=3)
    (guess,) = choose(f"fate:{spec}").make(setting).place(setting).predictions
    assert guess.width == guesses


def test_a_fixed_width_and_a_percentile_measure_nothing() -> None:
    assert decode_width(5, 0, 2_980_000, 450_000, 60) == 5
    assert decode_width(0, 75, 2_980_000, 450_000, 60) == 15
    assert decode_width(5, 75, 2_980_000, 450_000, 60) == 5


@pytest.mark.parametrize(
    ("tokens", "permille", "marked"),
    [
        # 1 and 1 + 3 are within 6 of 20; 4 + 6 is not.
        ([10, 6, 3, 1], 300, [0, 0, 1, 1]),
        ([10, 6, 3, 1], 250, [0, 0, 1, 1]),
        ([10, 6, 3, 1], 199, [0, 0, 0, 1]),
        ([10, 6, 3, 1], 500, [0, 1, 1, 1]),
        ([10, 6, 3, 1], 0, [0, 0, 0, 0]),
        ([10, 6, 3, 1], 1000, [1, 1, 1, 1]),
        # Exactly 3 of 10.
        ([7, 3], 300, [0, 1]),
        ([7, 3], 299, [0, 0]),
        # 2 do not fit into 1.8 of 6, whoever is asked.
        ([2, 2, 2], 300, [0, 0, 0]),
        ([], 300, []),
    ],
)
def test_the_least_wanted_travel_small(tokens: list[int], permille: int, marked: list[int]) -> None:
    n = len(tokens)
    guessed = np.arange(n)[::-1].copy()
    small = np.zeros(n, np.int64)
    mark_small(guessed, n, np.array(tokens[::-1], np.int64), permille, small)
    assert small[guessed].tolist() == marked


# Orders.

Order = tuple[str | int, ...]


def orders(desk: Any) -> list[Order]:
    """Return the plan as (command, expert); fetches as (fetch, layer, expert, bits, where, how)."""
    found: list[Order] = []
    for code, layer, expert, a, b, c, d, e in desk.take():
        name = COMMANDS[code]
        if name == "fetch":
            assert (a, e) == (WHOLE, 0)
            where = "cache" if c == CACHE else "staging"
            found.append((name, layer, expert, {INT4: 4, INT2: 2}[b], where, d))
        elif name == "run_shared":
            found.append((name,))
        else:
            found.append((name, expert))
    return found


def made(spec: str, setting: Setting) -> Fate:
    policy = choose(spec).make(setting)
    assert isinstance(policy, Fate)
    return policy


class Table:
    """A policy, and a desk on which its placement lies."""

    def __init__(self, spec: str, setting: Setting, desk: Any) -> None:
        self.policy = made(spec, setting)
        self.desk = desk
        desk.view.cached[:] = self.policy.place(setting).cached
        desk.view.staged[:] = 0
        desk.view.pending[:] = 0

    def guess(self, *tokens: tuple[int, ...], **changes: Any) -> list[Order]:
        self.desk.guessed(*tokens)
        self.policy.before_gate(self.desk.view._replace(**changes), self.desk.plan)
        return orders(self.desk)

    def dispatch(self, *tokens: tuple[int, ...], **changes: Any) -> list[Order]:
        loads: dict[int, int] = {}
        for at, chosen in enumerate(tokens):
            self.desk.view.ids[at] = chosen
            for expert in chosen:
                loads[expert] = loads.get(expert, 0) + 1
        view = self.desk.routed(loads, **changes)._replace(tokens=len(tokens))
        self.policy.dispatch(view, self.desk.plan)
        self.view = view
        return orders(self.desk)

    def after(self) -> list[Order]:
        self.policy.after_layer(self.view, self.desk.plan)
        return orders(self.desk)


@pytest.fixture
def table(make_desk: MakeDesk, make_setting: MakeSetting) -> Callable[..., Table]:
    """Return a maker of tables: 3 layers of 8 experts, top 2, room for `slots` at 4 bits."""

    def make(spec: str, slots: int, **shape: int) -> Table:
        setting = make_setting(100, **({"layers": 3} | shape))
        one = int(setting.costs.expert_bytes[0, INT4])
        setting = setting._replace(budget_bytes=slots * one)
        return Table(spec, setting, make_desk(setting))

    return make


def prefetch(layer: int, expert: int, bits: int = 4) -> Order:
    return ("fetch", layer, expert, bits, "staging", 0)


def demand(layer: int, expert: int, where: str = "staging", bits: int = 4) -> Order:
    return ("fetch", layer, expert, bits, where, 1)


def test_prefill_prefetches_all_guesses_most_tokens_first(table: Callable[..., Table]) -> None:
    """Tokens guess 7 three times, 5 twice, 3, 6 and 1 once; 1 has the better rank, then 3 is first.

    Up to 2.4 of 8 tokens' experts travel small: 6 and 3, not 1 too.
    """
    t = table("fate:shallow=0,staging=3", 6)
    guesses = ((7, 3), (1, 7), (5, 7), (5, 6))
    expected = [prefetch(1, 7), prefetch(1, 5), prefetch(1, 1), prefetch(1, 3, 2)]
    assert t.guess(*guesses, phase=PREFILL) == [*expected, prefetch(1, 6, 2)]

    t.desk.view.cached[1, 5] = WHOLE
    t.desk.view.staged[1, 6] = WHOLE
    assert t.guess(*guesses, phase=PREFILL) == [
        prefetch(1, 7), prefetch(1, 1), prefetch(1, 3, 2),
    ]  # fmt: skip


def test_decode_prefetches_as_many_guesses_as_copies_fit(table: Callable[..., Table]) -> None:
    """Guesses that are cached count among the k', and are not copied."""
    t = table("fate:shallow=0,staging=3", 6)
    costs = t.desk.view.costs
    one = int(copy_ns(costs, H2D, int(costs.expert_bytes[1, INT4])))
    assert t.guess((6, 4), layer=1, window_ns=2 * one) == [prefetch(2, 6), prefetch(2, 4)]
    assert t.guess((6, 4), layer=1, window_ns=2 * one - 1) == [prefetch(2, 6)]
    assert t.guess((6, 4), layer=1, window_ns=one - 1) == []
    t.desk.view.cached[2, 6] = WHOLE
    assert t.guess((6, 4), layer=1, window_ns=one) == []


def test_several_sequences_share_one_width(table: Callable[..., Table]) -> None:
    t = table("fate:shallow=0,staging=3,width=2", 6)
    assert t.guess((6, 4), (3, 4), (5, 3)) == [prefetch(1, 3), prefetch(1, 4)]


def test_nothing_is_asked_for_a_full_layer_nor_after_the_last(table: Callable[..., Table]) -> None:
    """31 slots, 6 for staging: layers 0, 1 and 2 of 4 are full."""
    t = table("fate:staging=6,width=2", 31, layers=4)
    assert t.policy.arc.capacity.tolist() == [8, 8, 8, 1]
    assert t.guess((6, 7), layer=1) == []
    assert t.guess((6, 7), layer=2) == [prefetch(3, 6), prefetch(3, 7)]
    assert t.guess((6, 7), layer=3) == []


def test_a_full_first_layer_asks_for_nothing(table: Callable[..., Table]) -> None:
    """As in the code, where layer 0 is all cached; one that is not is like others."""
    t = table("fate:staging=2,shallow=1,width=2", 12)
    assert t.policy.arc.capacity.tolist() == [8, 1, 1]
    assert t.guess((6, 7), layer=0) == []
    assert t.guess((6, 7), layer=1) == [prefetch(2, 6), prefetch(2, 7)]
    t = table("fate:staging=2,shallow=0,width=2", 12)
    assert t.guess((6, 7), layer=0) == [prefetch(1, 6), prefetch(1, 7)]


def test_order_inside_a_layer(table: Callable[..., Table]) -> None:
    """Layer 1 caches 0, 1 and 2. Guessed were 6, 2, 5, 7: 6 and 7 are there, 5 was wrong.

    Tokens choose 4 three times, 6 twice, 2, 3, 0, 1 and 7 once, in an order in which ARC, which
    has 3 slots, ends up with T1 = 7 and T2 = 6, 4; see below. Demands leave first, the most
    demanded ahead; the guesses run in their order, then the others by demand, and the shared
    expert at last.
    """
    t = table("fate:shallow=0,staging=6,width=4", 15)
    assert t.policy.arc.capacity.tolist() == [3, 3, 3]
    t.policy.n_guessed[1] = 4
    t.policy.guessed[1, :4] = [6, 2, 5, 7]
    t.desk.view.staged[1, [5, 6, 7]] = WHOLE
    found = t.dispatch(
        (6, 4), (4, 2), (3, 0), (1, 6), (4, 7), layer=1, free_slots=3,
    )  # fmt: skip

    arc = t.policy.arc
    kept = [expert for expert in range(8) if arc_holds(arc, 1, expert)]
    # T1 = 0 1 2; 6: T1 = 1 2 6; 4: T1 = 2 6 4; 4: T2 = 4; 2: T2 = 4 2; 3: 6 leaves, B1 = 6;
    # T1 = 3; 0: 3 leaves, B1 = 6 3, T1 = 0; 1: |T1| + |B1| = 3, 6 forgotten, 0 leaves, B1 = 3 0,
    # T1 = 1; 6: 3 forgotten, 1 leaves, B1 = 0 1, T1 = 6; 4: T2 = 2 4; 7: 0 forgotten, 6 leaves.
    assert kept == [2, 4, 7]
    assert found == [
        demand(1, 4),
        demand(1, 3),
        # Slots of the cache become free when 0 and 1 have run.
        ("run_on_gpu", 6),
        ("run_on_gpu", 2),
        ("run_on_gpu", 7),
        ("run_on_gpu", 4),
        ("run_on_gpu", 0),
        ("evict", 0),
        ("run_on_gpu", 1),
        ("evict", 1),
        ("run_on_gpu", 3),
        ("run_shared",),
    ]
    # 4 and 7 were admitted and stay; 6 was admitted and given up again, 5 never asked for.
    t.desk.view.cached[1] = np.array([0, 0, 1, 0, 0, 0, 0, 0]) * WHOLE
    t.desk.view.staged[1] = np.array([0, 0, 0, 1, 1, 1, 1, 1]) * WHOLE
    assert t.after() == [("admit", 4), ("admit", 7)]


def test_victims_that_nobody_needs_leave_first(table: Callable[..., Table]) -> None:
    """Of 0, 1, 2 the first two make room for 5, which is there, and for 7, which is copied."""
    t = table("fate:shallow=0,staging=6,width=4", 15)
    t.desk.view.staged[1, 5] = WHOLE
    assert t.dispatch((7, 5), layer=1, free_slots=5) == [
        ("evict", 0),
        ("evict", 1),
        ("admit", 5),
        demand(1, 7, "cache"),
        ("run_on_gpu", 5),
        ("run_on_gpu", 7),
        ("run_shared",),
    ]


@pytest.mark.parametrize(("form", "bits"), [("int4", 4), ("int2", 2)])
def test_demands_have_4_bits_or_as_in_the_deepseek_code_2(
    table: Callable[..., Table], form: str, bits: int
) -> None:
    t = table(f"fate:shallow=0,staging=2,demand={form}", 2)
    assert t.dispatch((7, 5), layer=1, free_slots=2)[:2] == [
        demand(1, 5, bits=bits), demand(1, 7, bits=bits),
    ]  # fmt: skip


def test_with_few_slots_a_demand_waits_its_turn(table: Callable[..., Table]) -> None:
    """One staging slot, which a wrong guess holds; a guess still waiting for one becomes a demand.

    3 runs before it was copied ahead of others, since it has most tokens.
    """
    t = table("fate:shallow=0,staging=1,width=4", 1)
    t.policy.n_guessed[1] = 2
    t.policy.guessed[1, :2] = [5, 6]
    t.desk.view.staged[1, 5] = WHOLE
    t.desk.view.pending[1, 6] = 1
    assert t.dispatch((3, 6), (3, 2), layer=1, free_slots=0) == [
        ("cancel", 6),
        ("cancel", 5),
        demand(1, 6),
        ("run_on_gpu", 6),
        demand(1, 3),
        ("run_on_gpu", 3),
        demand(1, 2),
        ("run_on_gpu", 2),
        ("run_shared",),
    ]


def test_what_finds_no_slot_runs_last(table: Callable[..., Table]) -> None:
    """Two slots hold 4 and 7, which were staged; 3 was guessed first and must wait for either."""
    t = table("fate:shallow=0,staging=2,width=4", 2)
    t.policy.n_guessed[1] = 1
    t.policy.guessed[1, 0] = 3
    t.desk.view.staged[1, [4, 7]] = WHOLE
    assert t.dispatch((3, 4), (7, 3), layer=1, free_slots=0) == [
        ("run_on_gpu", 4),
        ("run_on_gpu", 7),
        demand(1, 3),
        ("run_on_gpu", 3),
        ("run_shared",),
    ]


# Runs.


@pytest.mark.parametrize(
    ("link", "copies", "makespan"),
    [
        ("fifo", [(1, 0), (1, 1), (0, 2), (0, 3)], 1149),
        ("priority", [(1, 0), (0, 2), (0, 3), (1, 1)], 959),
    ],
)
def test_demands_wait_for_prefetches_on_one_queue(
    link: str, copies: list[tuple[int, int]], makespan: int
) -> None:
    """Copies take 200. The guess for layer 1 is ready at 110, the choice of layer 0 at 120.

    fifo: copies end at 310 to 910; layer 0 runs 710-750 and 910-950, layer 1's gate is done at
    1060, its experts at 1140. priority: layer 0's copies end at 510 and 710, so that layer 1 is
    past its gate at 860; its second expert arrived at 910 after the first ran, 860-900.
    """
    costs = lab.make_costs(2, attention=100, gate=10, gpu=40, head=9, copy_ns_per_kib=800)
    done = lab.run(
        choose(f"fate:shallow=0,staging=4,predictor=oracle,link={link}"), [[[2, 3], [0, 1]]],
        costs, slots=1,
    )  # fmt: skip
    assert [(s.layer, s.expert) for s in lab.spans(done, "copy_in")] == copies
    assert lab.makespan_ns(done) == makespan


def run_tight(case: Case, spec: str, bits: int, on: str = "simpy") -> Replayed:
    """Replay with room for as many experts at 4 bits as the case has at 16, at most half of all."""
    costs = case.costs._replace(expert_bytes=case.costs.expert_bytes * 4)
    some = case.experts * case.choices.shape[1] // 2
    slots = min(case.slots, max(1, some))
    return lab.run(
        choose(spec), case.choices, costs, experts=case.experts,
        slots=slots if bits == 4 else max(slots, 4), prompts=case.prompts, machine=case.machine,
        seed=case.seed, jitter=case.jitter, bits=bits, on=on,
    )  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
@given(case=cases(), bits=st.sampled_from((4, 16)))
@settings(max_examples=80)
def test_laws_of_the_rules(spec: str, case: Case, bits: int) -> None:
    """No expert runs on the CPU, none moves at 16 bits, and the cache holds what ARC admitted.

    What is cached was there at first, or was needed: a guess that was wrong is never kept.
    """
    done = run_tight(case, spec, bits)
    policy: Any = done.prepared.policy
    log = done.log
    assert log is not None
    ops = log.operations
    assert not (ops["kind"] == EXPERT_CPU).any()
    moved = ops["precision"][np.isin(ops["kind"], (COPY_IN, EXPERT_GPU))]
    assert (moved >= policy.precision).all()
    assert policy.precision == INT4 or (np.asarray(done.prepared.placement.cached) == WHOLE).all()
    at_first = done.prepared.placement.cached > 0
    needed = log.loads.sum(axis=(0, 2)) > 0
    cached = np.asarray(done.prepared.host.res.cached) > 0
    assert not (cached & ~at_first & ~needed).any()
    for layer, expert in np.argwhere(cached).tolist():
        assert stays(policy.arc, layer, expert)


@pytest.mark.skipif(disabled(), reason="nothing compiles")
@pytest.mark.parametrize("spec", SPECS)
@given(case=cases(), bits=st.sampled_from((4, 16)))
@settings(max_examples=60)
def test_machines_agree_on_a_tight_budget(spec: str, case: Case, bits: int) -> None:
    one, other = (run_tight(case, spec, bits, on).log for on in ("simpy", "compiled"))
    assert one is not None
    assert other is not None
    assert (one.operations == other.operations).all()
    assert (one.segments == other.segments).all()


@pytest.mark.parametrize("generate", [2, 5, 9, 16])
def test_with_room_for_copies_the_cache_is_what_arc_says(run: Run, generate: int) -> None:
    """6 experts at 16 bits are 21 at 4, of which 12 are copies' and 3 each layer's."""
    done = run("fate:shallow=0,staging=12,predictor=gate1,width=5", 6, generate=generate)
    policy: Any = done.prepared.policy
    cached = np.asarray(done.prepared.host.res.cached)
    assert policy.arc.capacity.tolist() == [3, 3, 3]
    for layer in range(3):
        kept = [e for e in range(8) if arc_holds(policy.arc, layer, e)]
        assert np.flatnonzero(cached[layer]).tolist() == kept
        assert len(kept) == 3


@pytest.mark.parametrize("rate", [0, 0.5])
def test_prefetches_in_prefill_travel_small_and_no_others(run: Run, rate: float) -> None:
    done = run(f"fate:shallow=0,predictor=gate1,width=3,int2_rate={rate}", 4)
    assert done.log is not None
    ops = done.log.operations
    copies = ops[ops["kind"] == COPY_IN]
    small = copies[copies["precision"] == INT2]
    assert (len(small) > 0) == (rate > 0)
    assert len(small) < len(copies)
    assert set(small["cause"].tolist()) <= {PREFETCH}
    assert set(done.prepared.host.steps.phase[small["step"]].tolist()) <= {PREFILL}


def test_widening_raises_hits_and_traffic_together(run: Run) -> None:
    """At equal budget; the guesses are a gate's, and get worse with their rank."""
    trace = synthesize(
        layers=4, experts=16, top_k=2, sequences=2, prompt=4, generate=40, seed=2, recall=0.7,
        distances=1, width=12,
    )  # fmt: skip
    found = []
    for width in (1, 2, 4, 8):
        spec = f"fate:shallow=0,predictor=gate1,staging=20,width={width}"
        result = summarize(run(spec, 16, of=trace))
        used = result["prefetch"]["used"]
        fetched = result["activations_by_phase"]["decode"]["fetched"]
        found.append((used, -fetched, sum(result["link_bytes"].values())))
    for less, more in pairwise(found):
        assert all(a < b for a, b in zip(less, more, strict=True))
