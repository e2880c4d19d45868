from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moesim.policies.testing as lab
from moesim.costs import copy_ns
from moesim.errors import InputError
from moesim.policies.api import CACHE, COMMANDS, Setting
from moesim.policies.hybrimoe import HybriMoE
from moesim.policies.parts.cache import lowest, mrs_update
from moesim.policies.registry import choose
from moesim.sim.metrics import summarize
from moesim.sim.replay import Replayed
from moesim.traces.format import Trace
from moesim.traces.synthetic import synthesize
from moesim.types import (
    CAUSES,
    COPY_IN,
    D2H,
    EXPERT_CPU,
    EXPERT_GPU,
    H2D,
    H2D_BACKGROUND,
    NONE,
    PREFILL,
    WHOLE,
)

MakeSetting = Callable[..., Setting]
MakeDesk = Callable[[Setting], Any]
Run = Callable[..., Replayed]

Orders = list[tuple[Any, ...]]


class TestHybriMoE(lab.PolicyConformance):
    policy = "hybrimoe"
    needs_gpu = False


class TestHybriMoEByItsCode(lab.PolicyConformance):
    policy = "hybrimoe:when=one-row,prefetch=score,prefetch_size=3,rows=first,cost=mixtral"
    needs_gpu = False


class TestHybriMoEOtherwise(lab.PolicyConformance):
    policy = "hybrimoe:assign=threshold,cache=lru,link=fifo,predictor=oracle,ahead=1,staging=1"
    needs_gpu = False


# Scores.


def rows_of(tokens: list[list[tuple[int, float]]]) -> tuple[Any, Any]:
    """Return ids and weights (tokens, top_k) of (expert, weight) pairs; short rows end in -1."""
    width = max(map(len, tokens))
    ids = np.full((len(tokens), width), NONE, np.int64)
    weights = np.zeros((len(tokens), width))
    for row, pairs in enumerate(tokens):
        for rank, (expert, weight) in enumerate(pairs):
            ids[row, rank], weights[row, rank] = expert, weight
    return ids, weights


def test_scores_fade_by_half_and_gain_half_of_what_is_chosen() -> None:
    """a = 0.5: 0.6 gives 0.3, then 0.15, then 0.075 + 0.5 * 0.5; the other layer is untouched."""
    score = np.zeros((2, 3))
    for tokens, expected in (
        ([[(1, 0.6), (0, 0.4)]], [0.2, 0.3, 0.0]),
        ([[(2, 1.0)]], [0.1, 0.15, 0.5]),
        ([[(1, 0.5)]], [0.05, 0.325, 0.25]),
    ):
        mrs_update(score, 1, *rows_of(tokens), 1, 0.5)
        assert score[1].tolist() == pytest.approx(expected)
    assert not score[0].any()


def test_alpha_is_the_share_of_the_new_score() -> None:
    score = np.array([[8.0, 4.0]])
    mrs_update(score, 0, *rows_of([[(1, 1.0)]]), 1, 0.25)
    assert score.tolist() == [[6.0, 3.25]]


def test_rows_are_averaged_or_only_the_first_counts() -> None:
    """Two rows of 0.8 and 0.2: half of the mean 0.4, or half of 0.8 and nothing of the second."""
    tokens = [[(0, 0.8), (1, 0.2)], [(2, 0.8), (1, 0.2)]]
    both, first = np.zeros((1, 3)), np.zeros((1, 3))
    mrs_update(both, 0, *rows_of(tokens), 2, 0.5)
    mrs_update(first, 0, *rows_of(tokens), 1, 0.5)
    assert both[0].tolist() == pytest.approx([0.2, 0.1, 0.2])
    assert first[0].tolist() == pytest.approx([0.4, 0.1, 0.0])


def test_the_lowest_score_of_those_kept_and_not_protected_leaves() -> None:
    score = np.array([[0.0] * 5, [0.3, 0.1, 0.2, 0.1, 0.0]])
    kept = np.array([[1] * 5, [1, 1, 1, 1, 0]])
    nobody = np.zeros(5, np.int64)
    assert lowest(score, kept, 1, nobody) == 1
    assert lowest(score, kept, 1, np.array([0, 2, 0, 0, 0])) == 3
    assert lowest(score, kept, 1, np.array([0, 2, 0, 1, 0])) == 2
    assert lowest(score, kept, 1, np.ones(5, np.int64)) == NONE
    assert lowest(score, kept, 0, nobody) == 0


@given(st.lists(st.lists(st.integers(0, 4), unique=True, max_size=3), min_size=1, max_size=30))
def test_scores_are_the_faded_sum_of_all_that_was_chosen(steps: list[list[int]]) -> None:
    """S = sum over steps of a (1 - a)^age s, computed at once."""
    score = np.zeros((1, 5))
    for chosen in steps:
        mrs_update(score, 0, *rows_of([[(e, 1 / len(chosen)) for e in chosen]]), 1, 0.5)
    for expert in range(5):
        ages = [len(steps) - i for i, chosen in enumerate(steps) if expert in chosen]
        shares = [1 / len(chosen) for chosen in steps if expert in chosen]
        expected = sum(0.5**age * s for age, s in zip(ages, shares, strict=True))
        assert score[0, expert] == pytest.approx(expected)


# One decision.


def made(spec: str, setting: Setting) -> HybriMoE:
    policy = choose(spec).make(setting)
    assert isinstance(policy, HybriMoE)
    return policy


def read(rows: list[tuple[int, ...]]) -> Orders:
    """Return orders as (cpu, e), (gpu, e), (shared,), (promote, e) and, with their layers,
    (evict, la, e), (demand, la, e) or (fetch, la, e): into the cache, urgent or not."""
    found: Orders = []
    for code, layer, expert, a, b, c, d, e in rows:
        name = COMMANDS[code]
        if name == "fetch":
            assert (a, b, c, e) == (WHOLE, NONE, CACHE, 0)
            found.append(("demand" if d else "fetch", layer, expert))
        elif name == "evict":
            found.append((name, layer, expert))
        elif name == "run_shared":
            found.append(("shared",))
        else:
            found.append((name.removeprefix("run_on_"), expert))
    return found


class Table:
    """A policy at a desk with three predictions; an expert takes `cpu` ns per token there, `gpu`
    here, and a copy 100."""

    def __init__(
        self, spec: str, setting: Setting, desk: Any, *, cpu: int = 70, gpu: int = 40
    ) -> None:
        self.policy: Any = made(spec, setting)
        self.cpu, self.gpu = cpu, gpu
        view = desk.view
        per_token = np.array([np.arange(lab.TOKENS + 1) * cpu] * 4)
        self.desk = desk._replace(
            view=view._replace(
                predicted_tokens=np.zeros(3, np.int64),
                predicted_ids=np.full((3, *view.predicted_ids.shape[1:]), NONE),
                predicted_loads=np.zeros((3, setting.experts), np.int64),
                costs=setting.costs._replace(expert_cpu_ns=per_token),
            )
        )
        view.cached[:] = self.policy.resident

    def dispatch(self, tokens: list[list[int]], **at: Any) -> Orders:
        """Return what is ordered for these choices, best first, with weights 0.6 and 0.4."""
        view = self.desk.view
        view.ids[:] = NONE
        view.weights[:] = 0
        loads: dict[int, int] = {}
        for row, chosen in enumerate(tokens):
            for rank, expert in enumerate(chosen):
                view.ids[row, rank], view.weights[row, rank] = expert, (0.6, 0.4)[rank]
                loads[expert] = loads.get(expert, 0) + 1
        for expert, load in loads.items():
            view.cpu_ns[expert] = self.cpu * load
            view.gpu_ns[expert] = self.gpu
        routed = self.desk.routed(loads, **at)
        self.policy.dispatch(routed._replace(tokens=len(tokens)), self.desk.plan)
        found = read(self.desk.take())
        for order in found:
            if order[0] in ("evict", "demand", "fetch"):
                view.cached[order[1], order[2]] = 0 if order[0] == "evict" else WHOLE
        return found


@pytest.fixture
def setting(make_setting: MakeSetting) -> Setting:
    """Return 4 layers of 6 experts, 2 cached in each; a copy takes 100, activations nothing."""
    costs = lab.make_costs(4, gpu=40, cpu=70, copy_ns_per_kib=100)
    return make_setting(10, layers=4, experts=6)._replace(
        costs=costs, budget_bytes=10 * lab.EXPERT_BYTES
    )


@pytest.fixture
def table(setting: Setting, make_desk: MakeDesk) -> Callable[..., Table]:
    def make(spec: str, **costs: int) -> Table:
        return Table(spec, setting, make_desk(setting), **costs)

    return make


def test_the_first_experts_of_each_layer_are_cached(make_setting: MakeSetting) -> None:
    """12 slots, 2 for staging: 10 over 4 layers are 3 3 2 2."""
    setting = make_setting(12, layers=4, experts=6)
    placement = choose("hybrimoe").make(setting).place(setting)
    assert (placement.cached > 0).astype(int).tolist() == [
        [1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0],
    ]  # fmt: skip
    assert placement.cache_slots.tolist() == [3, 3, 2, 2]
    assert placement.staging_slots == 2
    assert placement.link == "priority"


@pytest.mark.parametrize(("slots", "staging"), [(0, 0), (1, 1), (2, 2), (9, 2)])
def test_staging_comes_first(make_setting: MakeSetting, slots: int, staging: int) -> None:
    setting = make_setting(slots, layers=4, experts=6)
    placement = choose("hybrimoe").make(setting).place(setting)
    assert placement.staging_slots == staging
    assert placement.cache_slots.sum() == slots - staging


def test_devices_share_by_the_timeline(table: Callable[..., Table]) -> None:
    """0 is cached: 40 on the GPU. 3 is not: 140 on the GPU, 70 on the CPU."""
    at = table("hybrimoe:prefetch=none")
    assert at.dispatch([[3, 0]]) == [("cpu", 3), ("shared",), ("gpu", 0)]
    # 3, 4: the CPU takes the last one until 70, then 140 or 140: the GPU, for which 1 leaves; S
    # of both is 0 after two steps without them, but 0 has 0.2 from before.
    assert at.dispatch([[3, 4]]) == [
        ("cpu", 4), ("shared",), ("evict", 0, 1), ("demand", 0, 3), ("gpu", 3),
    ]  # fmt: skip


def test_what_is_loaded_stays_and_the_lowest_score_leaves(table: Callable[..., Table]) -> None:
    """A slow CPU: everything is loaded. Scores after each step, a = 0.5 and 0.6, 0.4 chosen:

    0: .3 1: .2 | 2: .3 0: .35 1: .1, 1 leaves | 3: .3 2: .35 0: .175, 0 leaves."""
    at = table("hybrimoe:prefetch=none", cpu=10**6)
    assert at.dispatch([[0, 1]]) == [("shared",), ("gpu", 0), ("gpu", 1)]
    assert at.dispatch([[2, 0]]) == [
        ("shared",), ("gpu", 0), ("evict", 0, 1), ("demand", 0, 2), ("gpu", 2),
    ]  # fmt: skip
    assert at.dispatch([[3, 2]]) == [
        ("shared",), ("gpu", 2), ("evict", 0, 0), ("demand", 0, 3), ("gpu", 3),
    ]  # fmt: skip


def test_recency_is_another_rule(table: Callable[..., Table]) -> None:
    """1 was chosen twice and then 0: by recency 1 leaves. The scores are .45 halved, and .3, but a
    router that is surer of 1 makes it 0 that leaves."""
    for cache, victim in (("mrs", 0), ("lru", 1)):
        at = table(f"hybrimoe:prefetch=none,cache={cache}", cpu=10**6)
        for step, chosen in enumerate(([1], [1], [0])):
            at.dispatch([chosen], step=step)
        if cache == "mrs":
            assert at.policy.score[0, :2].tolist() == pytest.approx([0.3, 0.225])
            at.policy.score[0, 1] += 0.5
        assert ("evict", 0, victim) in at.dispatch([[4]], step=3)


def test_whatever_leaves_has_been_ordered_to_run(table: Callable[..., Table]) -> None:
    """1 is active and leaves after its run; 3 comes in, and leaves at once for 4.

    Means over three rows, halved: 0 has .2, 1 .133, 3 .1, and 4 .067.
    """
    at = table("hybrimoe:prefetch=none", cpu=10**6)
    assert at.dispatch([[0, 1], [0, 1], [3, 4]]) == [
        ("shared",), ("gpu", 0), ("gpu", 1),
        ("evict", 0, 1), ("demand", 0, 3), ("gpu", 3),
        ("evict", 0, 3), ("demand", 0, 4), ("gpu", 4),
    ]  # fmt: skip


def test_heavy_experts_run_first_and_light_ones_on_the_cpu(table: Callable[..., Table]) -> None:
    """Loads 3 of 2, 2 of 4, 1 of 5, nothing cached of them: GPU 140, 240, 340; CPU 70, 210, 420.

    5 on the CPU (70), 2 on the GPU (140 against 210), 4 on the CPU (240 against 210)."""
    at = table("hybrimoe:prefetch=none")
    found = at.dispatch([[4, 2], [5, 2], [4, 2]])
    assert [o for o in found if o[0] in ("cpu", "gpu")] == [("cpu", 5), ("cpu", 4), ("gpu", 2)]


def test_activations_that_travel_are_paid_by_the_first_on_the_cpu(
    setting: Setting, make_desk: MakeDesk
) -> None:
    """64 bytes there and back take 14 at 100 per 1024: 2 * 7. An expert on the CPU takes 130.

    A copy and a run take 140; 130 is less, 130 + 14 is more."""
    for token_bytes, device in ((0, "cpu"), (64, "gpu")):
        costs = setting.costs._replace(token_bytes=token_bytes)
        assert copy_ns(costs, D2H, token_bytes) + copy_ns(costs, H2D, token_bytes) in (0, 14)
        here = setting._replace(costs=costs)
        at = Table("hybrimoe:prefetch=none", here, make_desk(here), cpu=130)
        assert (device, 3) in at.dispatch([[3]])


def test_every_row_of_activations_travels(setting: Setting, make_desk: MakeDesk) -> None:
    """Two rows of 32 bytes take 7 each way: 130 + 14 on the CPU; one row, 130 + 8. A copy: 140."""
    here = setting._replace(costs=setting.costs._replace(token_bytes=32))
    for rows, cpu, device in ((1, 130, "cpu"), (2, 65, "gpu")):
        at = Table("hybrimoe:prefetch=none", here, make_desk(here), cpu=cpu)
        assert (device, 3) in at.dispatch([[3]] * rows)


def test_copies_in_the_queue_delay_the_link(table: Callable[..., Table]) -> None:
    """140 on the GPU against 145 on the CPU; 150 if the link is busy for 10."""
    for busy, device in ((0, "gpu"), (10, "cpu")):
        at = table("hybrimoe:prefetch=none", cpu=145)
        at.desk.view.forecast.free[H2D] = busy
        assert (device, 3) in at.dispatch([[3]])
    # The code has no such thing: 0.918 ms and 0.99 ms.
    at = table("hybrimoe:prefetch=none,cost=mixtral")
    at.desk.view.forecast.free[H2D] = 10**6
    assert ("gpu", 3) in at.dispatch([[3]])


@pytest.mark.parametrize(
    ("model", "on_cpu"), [("deepseek", []), ("qwen2", [5]), ("mixtral", [5, 4])]
)
def test_the_codes_constants(table: Callable[..., Table], model: str, on_cpu: list[int]) -> None:
    """Four absent ones of 2 tokens end on the GPU at .918, 1.418, 1.918, 2.418 ms.

    The first one on the CPU ends at 2.79, 2.39 or 1.19, a second one for Mixtral at 1.59."""
    at = table(f"hybrimoe:prefetch=none,cost={model}", cpu=1, gpu=10**9)
    found = at.dispatch([[2, 3], [2, 3], [4, 5], [4, 5]])
    assert [order[1] for order in found if order[0] == "cpu"] == on_cpu


@pytest.mark.parametrize(
    ("assign", "cpu", "device"),
    [("threshold", 139, "cpu"), ("threshold", 140, "gpu"), ("resident", 10**9, "cpu")],
)
def test_other_assignments(table: Callable[..., Table], assign: str, cpu: int, device: str) -> None:
    """A copy and a run take 140, as long as the CPU in the second row."""
    found = table(f"hybrimoe:prefetch=none,assign={assign}", cpu=cpu).dispatch([[3, 0]])
    assert {o for o in found if o[0] in ("cpu", "gpu")} == {(device, 3), ("gpu", 0)}


def test_without_a_slot_the_cpu_does_everything(
    make_setting: MakeSetting, make_desk: MakeDesk
) -> None:
    setting = make_setting(0, layers=4, experts=6)
    at = Table("hybrimoe", setting, make_desk(setting), cpu=10**9)
    assert at.dispatch([[3, 0]]) == [("cpu", 0), ("cpu", 3), ("shared",)]


@pytest.mark.parametrize("rows", [1, 2])
def test_by_its_code_more_than_one_row_streams_through_the_gpu(
    table: Callable[..., Table], rows: int
) -> None:
    """Nothing is kept, and a CPU of 1 ns is not asked."""
    at = table("hybrimoe:when=one-row,prefetch=none", cpu=1)
    found = at.dispatch([[3, 0]] * rows)
    if rows == 1:
        assert found == [("cpu", 3), ("cpu", 0), ("shared",)]
    else:
        assert found == [("shared",), ("gpu", 0), ("gpu", 3)]


# Prefetch.


def guess(at: Table, layer: int, *guesses: tuple[int, ...]) -> None:
    """Fill in the guesses for the next layers, one token each: best first."""
    view = at.desk.view
    for which, ids in enumerate(guesses):
        view.predicted_ids[which] = NONE
        view.predicted_ids[which, 0, : len(ids)] = ids
        view.predicted_tokens[which] = 1
        view.predicted_loads[which] = 0
        view.predicted_loads[which, list(ids)] = 1


def fetches(found: Orders) -> Orders:
    return [order for order in found if order[0] in ("evict", "fetch")]


def test_the_layer_that_gains_most_comes_first(table: Callable[..., Table]) -> None:
    """Two cached: 80. One absent, 2: CPU 70 beside 40, 70. Two absent: CPU 70, then 140 or 140.

    With one of two there: 70, so that layer 3 gains 70, and layer 2 nothing in the first round:
    40 + 40 are 80 with both there and 70 with one. Layer 1 has all it wants.
    """
    at = table("hybrimoe")
    guess(at, 0, (0, 1), (0, 2), (4, 5))
    # Cached 0 and 1 keep this layer busy until 70: time for one copy.
    assert fetches(at.dispatch([[0, 1]])) == [("evict", 3, 0), ("fetch", 3, 4)]


def test_rounds_end_when_a_copy_would_begin_too_late(table: Callable[..., Table]) -> None:
    """Each layer ahead has one absent, and takes 140 with it, or 80: the nearest comes first."""
    guesses = ((0, 2), (0, 3), (0, 4))
    # 0 and 1 take 80: one copy begins before that, at 0.
    at = table("hybrimoe", cpu=250)
    guess(at, 0, *guesses)
    assert fetches(at.dispatch([[0, 1]])) == [("evict", 1, 1), ("fetch", 1, 2)]
    # 0 and 3 take 140, the copy of 3 the first 100: one more.
    at = table("hybrimoe", cpu=250)
    guess(at, 0, *guesses)
    found = [order for order in at.dispatch([[0, 3]]) if order[0] in ("demand", "fetch")]
    assert found == [("demand", 0, 3), ("fetch", 1, 2)]
    # 3 on the CPU takes 250: at 0, 100 and 200, if so many are wanted.
    for size, n in ((0, 3), (1, 1), (2, 2), (9, 3)):
        at = table(f"hybrimoe:assign=resident,prefetch_size={size}", cpu=250)
        guess(at, 0, *guesses)
        found = [order for order in at.dispatch([[0, 3]]) if order[0] == "fetch"]
        assert found == [("fetch", 1, 2), ("fetch", 2, 3), ("fetch", 3, 4)][:n]


def test_rounds_end_behind_copies_that_are_queued(table: Callable[..., Table]) -> None:
    """Of the 80 that 0 and 1 take, the link is busy for 79 or 80, with either kind of copy."""
    for queue in (H2D, H2D_BACKGROUND):
        for busy, n in ((79, 1), (80, 0)):
            at = table("hybrimoe:assign=resident", cpu=250)
            at.desk.view.forecast.free[queue] = busy
            guess(at, 0, (0, 2))
            found = at.dispatch([[0, 1]])
            assert [order[0] for order in found].count("fetch") == n


def test_rounds_by_the_codes_constants(table: Callable[..., Table]) -> None:
    """0 on the GPU takes .5 ms, 1 on the CPU .99; copies begin at .2, where the link is free, .618
    and 1.036."""
    at = table("hybrimoe:cost=mixtral")
    at.desk.view.forecast.free[H2D_BACKGROUND] = 200_000
    guess(at, 0, (2,), (3,), (4,))
    found = [order for order in at.dispatch([[0, 1]]) if order[0] == "fetch"]
    assert found == [("fetch", 1, 2), ("fetch", 2, 3)]


def test_what_is_guessed_is_not_evicted(table: Callable[..., Table]) -> None:
    """0 is guessed: 1 leaves although its score is higher; if both are, nothing is fetched."""
    at = table("hybrimoe:ahead=1", cpu=10**6)
    at.policy.score[1, 1] = 9.0
    guess(at, 0, (0, 2))
    assert fetches(at.dispatch([[0, 1]])) == [("evict", 1, 1), ("fetch", 1, 2)]
    at = table("hybrimoe:ahead=1", cpu=10**6)
    view = at.desk.view
    guess(at, 0, (0, 2))
    view.predicted_loads[0, 1] = 1
    assert fetches(at.dispatch([[0, 1]])) == []


def test_nothing_is_fetched_without_a_gain_or_a_layer_to_come(
    table: Callable[..., Table],
) -> None:
    """A CPU of 1 ns gains nothing; layer 2 has one layer ahead of it, and layer 3 none."""
    for layer, cpu, layers in ((0, 1, set()), (2, 10**6, {3}), (3, 10**6, set())):
        at = table("hybrimoe", cpu=cpu)
        guess(at, layer, (2, 3), (2, 3), (2, 3))
        found = at.dispatch([[0, 1]], layer=layer)
        assert {order[1] for order in fetches(found)} == layers


def two_guesses(at: Table) -> None:
    """Guess for layer 1 that two tokens choose 4, and one of them 3; both are absent."""
    guess(at, 0, (3, 4))
    view = at.desk.view
    view.predicted_ids[0, 1, :2] = (4, NONE)
    view.predicted_tokens[0] = 2
    view.predicted_loads[0, 4] = 2


def test_heavier_guesses_come_first(table: Callable[..., Table]) -> None:
    """CPU of 70 per token: 70 with 4 there; 140 with 3 there, as now. CPU of 1000: 140, or 240 as
    now, whichever comes."""
    for cpu in (70, 1000):
        at = table("hybrimoe:ahead=1", cpu=cpu)
        two_guesses(at)
        assert fetches(at.dispatch([[0, 1]]))[:2] == [("evict", 1, 0), ("fetch", 1, 4)]


def test_what_is_fetched_saves_the_guessed_rows_their_way(
    setting: Setting, make_desk: MakeDesk
) -> None:
    """2 takes 40 on either device; only the way there and back of its two rows is to be gained."""
    for token_bytes, fetched in ((0, False), (32, True)):
        here = setting._replace(costs=setting.costs._replace(token_bytes=token_bytes))
        at = Table("hybrimoe:ahead=1", here, make_desk(here), cpu=20)
        guess(at, 0, (2,))
        at.desk.view.predicted_tokens[0] = at.desk.view.predicted_loads[0, 2] = 2
        assert bool(fetches(at.dispatch([[0, 1]]))) == fetched


def test_a_guessed_layer_finds_its_link_free(table: Callable[..., Table]) -> None:
    """Of one token in layer 1 and two in layer 2 each takes 140 now, and 40 if fetched: the nearer.

    Behind the 50 that the link is busy, they would take 145, on the CPU, and 190: the other.
    """
    at = table("hybrimoe:ahead=2,prefetch_size=1", cpu=145)
    at.desk.view.forecast.free[H2D] = 50
    guess(at, 0, (2,), (3,))
    at.desk.view.predicted_loads[1, 3] = 2
    assert fetches(at.dispatch([[0, 1]])) == [("evict", 1, 0), ("fetch", 1, 2)]


def test_a_lighter_guess_comes_first_if_it_gains_more(table: Callable[..., Table]) -> None:
    """A CPU that takes 500 for one token and 20 for two: 240 as now, on the GPU; with 4 there 140;
    with 3 there 40 and the CPU has 4."""
    at = table("hybrimoe:ahead=1", cpu=1000)
    at.desk.view.costs.expert_cpu_ns[:, 1:3] = 500, 20
    two_guesses(at)
    assert fetches(at.dispatch([[0, 1]]))[:2] == [("evict", 1, 0), ("fetch", 1, 3)]


def test_by_its_code_more_than_one_row_fetches_nothing_ahead(table: Callable[..., Table]) -> None:
    for rows in (1, 2):
        at = table("hybrimoe:when=one-row", cpu=1000)
        guess(at, 0, (3, 4))
        assert bool(fetches(at.dispatch([[0, 1]] * rows))) == (rows == 1)


def test_by_score_the_highest_of_the_next_layer_come_in(table: Callable[..., Table]) -> None:
    """Of the two highest 0 is there, 4 is not; the lowest that is kept leaves: 1."""
    at = table("hybrimoe:prefetch=score,prefetch_size=2")
    at.policy.score[1] = [0.5, 0.1, 0.2, 0.3, 0.4, 0.0]
    assert fetches(at.dispatch([[0, 1]])) == [("evict", 1, 1), ("fetch", 1, 4)]
    # In the next layer the gate waits for it, once.
    for expected in ([("gate_after", 4)], []):
        at.policy.before_gate(at.desk.view._replace(layer=1), at.desk.plan)
        assert read(at.desk.take()) == expected


def test_by_score_equals_go_by_id_and_half_of_k_is_the_default(
    table: Callable[..., Table], make_setting: MakeSetting, make_desk: MakeDesk
) -> None:
    """Without scores yet: 0 and 1 are there, 2 is the third; k = 2 makes 1, k = 6 makes 3."""
    assert fetches(table("hybrimoe:prefetch=score").dispatch([[0, 1]])) == []
    found = fetches(table("hybrimoe:prefetch=score,prefetch_size=3").dispatch([[0, 1]]))
    assert found == [("evict", 1, 0), ("fetch", 1, 2)]
    for top_k, size in ((1, 1), (2, 1), (3, 1), (6, 3)):
        setting = make_setting(10, layers=4, experts=6, top_k=top_k)
        assert made("hybrimoe:prefetch=score", setting).prefetch_size == size
    # A plan holds no more than this beside everything else.
    assert made("hybrimoe:prefetch_size=99", setting).prefetch_size == 12


@pytest.mark.parametrize(
    ("cached", "at", "fetched"),
    [
        (True, {}, True),
        (True, {"layer": 3}, False),
        (True, {"phase": PREFILL}, False),
        (False, {}, False),
    ],
)
def test_by_score_only_in_decode_and_if_the_gpu_computes_an_expert(
    table: Callable[..., Table], cached: bool, at: dict[str, int], fetched: bool
) -> None:
    on = table("hybrimoe:prefetch=score,prefetch_size=3,assign=resident")
    found = on.dispatch([[0, 1] if cached else [4, 5]], **at)
    assert bool(fetches(found)) == fetched


def test_what_is_on_its_way_is_made_urgent_and_runs_before_copies(
    table: Callable[..., Table],
) -> None:
    """1 arrives in 30 and would be done at 110, behind 0; the CPU takes 10**6."""
    at = table("hybrimoe:prefetch=none", cpu=10**6)
    view = at.desk.view
    view.cached_ticket[0, 1] = 7
    view.forecast.ends[7] = (7, 30)
    assert at.dispatch([[1, 0]]) == [("shared",), ("gpu", 0), ("promote", 1), ("gpu", 1)]


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("hybrimoe", [("auto", 1), ("auto", 2), ("auto", 3)]),
        ("hybrimoe:predictor=gate", [("gate1", 1), ("gate2", 2), ("gate3", 3)]),
        ("hybrimoe:predictor=residual,ahead=1", [("residual1", 1)]),
        ("hybrimoe:ahead=9", [("auto", i) for i in (1, 2, 3)]),
        ("hybrimoe:prefetch=none", []),
        ("hybrimoe:prefetch=score", []),
    ],
)
def test_three_layers_are_guessed(
    setting: Setting, spec: str, names: list[tuple[str, int]]
) -> None:
    placement = choose(spec).make(setting).place(setting)
    assert [(p.predictor, p.distance) for p in placement.predictions] == names
    assert all(p.after_gate for p in placement.predictions)


def test_alpha_is_a_share(setting: Setting) -> None:
    with pytest.raises(InputError, match=r"alpha=1\.5 is not legal; 0 to 1 is"):
        made("hybrimoe:alpha=1.5", setting)


# Whole runs.


@pytest.fixture(scope="module")
def busy() -> Trace:
    """Return 4 sequences through 4 layers of 12 experts, top 2, with guesses 3 layers ahead."""
    return synthesize(
        layers=4, experts=12, top_k=2, sequences=4, prompt=3, generate=16, seed=5, recall=0.8
    )


def copies(done: Replayed) -> dict[str, int]:
    """Return the number of copies by cause."""
    assert done.log is not None
    rows = done.log.operations
    rows = rows[rows["kind"] == COPY_IN]
    return {cause: int((rows["cause"] == i).sum()) for i, cause in enumerate(CAUSES) if i}


@pytest.mark.parametrize(
    "text",
    [
        "when=one-row", "prefetch=none", "prefetch=score", "assign=threshold", "assign=resident",
        "cache=lru", "rows=first", "alpha=0.1", "ahead=1", "cost=mixtral", "link=fifo",
        "staging=1", "predictor=oracle",
    ],
)  # fmt: skip
def test_every_variant_makes_a_difference(run: Run, busy: Trace, text: str) -> None:
    plain, other = (
        [lab.makespan_ns(run(spec, 26, of=busy, batch=batch)) for batch in (1, 4)]
        for spec in ("hybrimoe", f"hybrimoe:{text}")
    )
    assert plain != other


def test_a_prompt_by_the_code_uses_the_gpu_alone_and_keeps_the_cache(run: Run, busy: Trace) -> None:
    done = run("hybrimoe:when=one-row,prefetch=none", 26, of=busy, generate=1)
    assert done.log is not None
    rows = done.log.operations
    assert not (rows["kind"] == EXPERT_CPU).any()
    assert (rows["kind"] == EXPERT_GPU).any()
    held = np.asarray(done.prepared.host.res.cached)
    assert (held == done.prepared.placement.cached).all()


def test_the_policys_table_is_what_is_cached(run: Run, busy: Trace) -> None:
    for text in ("", ":prefetch=score,prefetch_size=4", ":link=fifo,ahead=2"):
        done = run(f"hybrimoe{text}", 26, of=busy, batch=3)
        prepared = done.prepared
        policy: Any = prepared.policy
        held = np.asarray(prepared.host.res.cached) > 0
        assert (np.asarray(policy.kept) > 0).tolist() == held.tolist()
        assert held.sum(axis=1).tolist() == prepared.placement.cache_slots.tolist()


def test_impact_copies_ahead_and_resident_only_so(run: Run, busy: Trace) -> None:
    found = copies(run("hybrimoe:assign=resident", 26, of=busy))
    assert found["prefetch"] > 0
    assert found["demand"] == found["swap"] == 0
    assert copies(run("hybrimoe:prefetch=none", 26, of=busy))["prefetch"] == 0


def test_a_timeline_beats_a_threshold(run: Run, busy: Trace) -> None:
    """What DALI's paper takes HybriMoE for is slower than its released rule."""
    ends = [
        lab.makespan_ns(run(f"hybrimoe:prefetch=none,assign={rule}", 26, of=busy, batch=4))
        for rule in ("hss", "threshold")
    ]
    assert ends[0] < ends[1]


def test_a_prompt_of_one_token_is_one_row(run: Run, busy: Trace) -> None:
    assert summarize(run("hybrimoe:when=one-row", 26, of=busy, prompt=1))["activations"]["cpu"] > 0
