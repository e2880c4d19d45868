from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.policies.parts import assign
from moesim.policies.parts.assign import all_on, exact, greedy, hss, line_up, threshold
from moesim.types import NONE, IntArray

UNTOUCHED = 7

Costs = list[tuple[int, int]]
"""(CPU, GPU) cost of each expert, all of them active."""


def by_algorithm_1(cpu: Sequence[int], gpu: Sequence[int]) -> tuple[list[str], int, int]:
    """Return the visits and choices of DALI's Algorithm 1, and the ends of GPU and CPU."""
    choices = []
    gpu_end = cpu_end = 0
    for e in sorted(range(len(cpu)), key=lambda e: (-abs(gpu[e] - cpu[e]), e)):
        if cpu[e] == 0 and gpu[e] == 0:
            continue
        if gpu_end + gpu[e] <= cpu_end + cpu[e]:
            gpu_end += gpu[e]
            choices.append(f"{e}G")
        else:
            cpu_end += cpu[e]
            choices.append(f"{e}C")
    return choices, gpu_end, cpu_end


def arrays(cpu: Sequence[int], gpu: Sequence[int]) -> tuple[IntArray, IntArray, IntArray]:
    return (
        np.array(cpu, np.int64),
        np.array(gpu, np.int64),
        np.full(len(cpu), UNTOUCHED, np.int64),
    )


def ends(on_gpu: IntArray, cpu: Sequence[int], gpu: Sequence[int]) -> tuple[int, int]:
    """Return when GPU and CPU are done under an assignment of every expert."""
    assert set(on_gpu.tolist()) <= {0, 1}
    return (
        sum(g for on, g in zip(on_gpu, gpu, strict=True) if on),
        sum(c for on, c in zip(on_gpu, cpu, strict=True) if not on),
    )


def ms(value: float) -> int:
    return round(value * 1_000_000)


@pytest.mark.parametrize(
    ("loads", "resident", "visits", "gpu_ms", "cpu_ms", "optimum_ms"),
    [
        ((6, 4, 3, 2, 1), (), "0G 1C 2G 4C 3G", 15.0, 12.75, 15.0),
        ((6, 4, 3, 2, 1), (1, 3), "1G 0G 3C 2G 4C", 10.5, 9.25, 10.5),
        ((4, 4, 2, 1), (), "0G 1C 3G 2C", 10.0, 14.5, 10.0),
        ((2, 2, 2, 2), (), "0G 1C 2G 3C", 10.0, 11.0, 11.0),
    ],
)
def test_vectors(
    loads: tuple[int, ...],
    resident: tuple[int, ...],
    visits: str,
    gpu_ms: float,
    cpu_ms: float,
    optimum_ms: float,
) -> None:
    """A copy takes 5 ms, an expert 0.5 ms on the GPU and 2 + 1.75 w ms on the CPU."""
    cpu = [ms(2 + 1.75 * load) for load in loads]
    gpu = [ms(0.5 if e in resident else max(5.0, 0.5)) for e in range(len(loads))]
    active = np.arange(len(loads))[::-1].copy()
    cpu_ns, gpu_ns, on_gpu = arrays(cpu, gpu)

    assert greedy(active, len(loads), cpu_ns, gpu_ns, on_gpu) == (ms(gpu_ms), ms(cpu_ms))

    choices = visits.split()
    assert {f"{e}{'CG'[on]}" for e, on in enumerate(on_gpu)} == set(choices)
    assert by_algorithm_1(cpu, gpu) == (choices, ms(gpu_ms), ms(cpu_ms))
    assert exact(active, len(loads), cpu_ns, gpu_ns, on_gpu) == ms(optimum_ms)
    assert max(ends(on_gpu, cpu, gpu)) == ms(optimum_ms)


def test_equal_differences_are_visited_by_ascending_id_whatever_the_order_of_arrival() -> None:
    cpu_ns, gpu_ns, on_gpu = arrays([9, 9, 9], [5, 5, 5])
    for active in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        greedy(np.array(active), 3, cpu_ns, gpu_ns, on_gpu)
        assert on_gpu.tolist() == [1, 0, 1]


def test_equal_ends_go_to_the_gpu() -> None:
    cpu_ns, gpu_ns, on_gpu = arrays([4], [4])
    assert greedy(np.array([0]), 1, cpu_ns, gpu_ns, on_gpu) == (4, 0)
    assert on_gpu.tolist() == [1]

    cpu_ns, gpu_ns, on_gpu = arrays([4], [5])
    assert greedy(np.array([0]), 1, cpu_ns, gpu_ns, on_gpu) == (0, 4)
    assert on_gpu.tolist() == [0]


def test_ends_are_compared_and_not_costs() -> None:
    """The second expert is cheaper on the GPU, which is busy for longer, and goes to the CPU."""
    cpu_ns, gpu_ns, on_gpu = arrays([30, 8], [10, 6])

    assert greedy(np.array([0, 1]), 2, cpu_ns, gpu_ns, on_gpu) == (10, 8)
    assert on_gpu.tolist() == [1, 0]


def test_inactive_experts_are_left_alone() -> None:
    """Entries of `active` beyond the count are left over from other steps."""
    cpu, gpu = [3, 1, 9, 1, 5], [4, 100, 2, 100, 4]
    active = np.array([4, 2, 1, 0, 3])
    for rule in (greedy, exact, threshold):
        cpu_ns, gpu_ns, on_gpu = arrays(cpu, gpu)
        rule(active, 2, cpu_ns, gpu_ns, on_gpu)
        assert on_gpu[[0, 1, 3]].tolist() == [UNTOUCHED] * 3
        assert set(on_gpu[[2, 4]].tolist()) <= {0, 1}
        assert on_gpu[2] == 1
        rule(active, 0, cpu_ns, gpu_ns, on_gpu)
    for gpu_or_not in (0, 1):
        on_gpu = np.full(5, UNTOUCHED)
        all_on(active, 2, on_gpu, gpu_or_not)
        assert on_gpu.tolist() == [7, 7, gpu_or_not, 7, gpu_or_not]


costs = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=9)
wide_costs = st.lists(
    st.tuples(st.integers(1, 1 << 40), st.integers(1, 1 << 40)), min_size=1, max_size=9
)


@settings(deadline=None)
@given(costs | wide_costs, st.randoms(use_true_random=False))
def test_greedy_is_algorithm_1(pairs: Costs, random: object) -> None:
    cpu, gpu = [c for c, _ in pairs], [g for _, g in pairs]
    active = list(range(len(pairs)))
    random.shuffle(active)  # type: ignore[attr-defined]
    cpu_ns, gpu_ns, on_gpu = arrays(cpu, gpu)

    found = greedy(np.array(active, np.int64), len(active), cpu_ns, gpu_ns, on_gpu)

    choices, gpu_end, cpu_end = by_algorithm_1(cpu, gpu)
    assert found == (gpu_end, cpu_end) == ends(on_gpu, cpu, gpu)
    assert {f"{e}{'CG'[on]}" for e, on in enumerate(on_gpu)} == set(choices)


@settings(deadline=None)
@given(costs | wide_costs)
def test_exact_equals_brute_force_and_greedy_is_never_better(pairs: Costs) -> None:
    cpu, gpu = [c for c, _ in pairs], [g for _, g in pairs]
    active = np.arange(len(pairs), dtype=np.int64)
    cpu_ns, gpu_ns, on_gpu = arrays(cpu, gpu)

    end = exact(active, len(active), cpu_ns, gpu_ns, on_gpu)

    assert end == max(ends(on_gpu, cpu, gpu))
    assert end == min(
        max(
            sum(g for on, g in zip(plan, gpu, strict=True) if on),
            sum(c for on, c in zip(plan, cpu, strict=True) if not on),
        )
        for plan in product((0, 1), repeat=len(pairs))
    )
    assert max(greedy(active, len(active), cpu_ns, gpu_ns, on_gpu)) >= end


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=64), st.integers(1, 300))
def test_exact_where_every_expert_costs_the_same_on_the_gpu(cpu: list[int], gpu: int) -> None:
    """Some prefix of the experts, the slowest on the CPU first, is then best on the GPU."""
    cpu_ns, gpu_ns, on_gpu = arrays(cpu, [gpu] * len(cpu))

    end = exact(np.arange(len(cpu)), len(cpu), cpu_ns, gpu_ns, on_gpu)

    slowest = sorted(cpu, reverse=True)
    assert end == min(max(n * gpu, sum(slowest[n:])) for n in range(len(cpu) + 1))
    assert end == max(ends(on_gpu, cpu, [gpu] * len(cpu)))


def test_exact_returns_the_end_of_its_own_plan_where_it_has_to_forget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(4)
    cpu, gpu = random.integers(1, 1000, (2, 20)).tolist()
    cpu_ns, gpu_ns, on_gpu = arrays(cpu, gpu)
    best = exact(np.arange(20), 20, cpu_ns, gpu_ns, on_gpu)
    monkeypatch.setattr(assign, "EXACT_STATES", 3)

    end = exact(np.arange(20), 20, cpu_ns, gpu_ns, on_gpu)

    assert end == max(ends(on_gpu, cpu, gpu))
    assert end > best


def test_threshold_takes_the_cheaper_device_of_each_expert_alone() -> None:
    cpu_ns, gpu_ns, on_gpu = arrays([4, 4, 4, 90], [3, 4, 5, 1])

    threshold(np.array([3, 2, 1, 0]), 4, cpu_ns, gpu_ns, on_gpu)

    assert on_gpu.tolist() == [1, 1, 0, 1]


def two_lanes(
    model: tuple[int, int, int],
    batch: int,
    skew: float,
    gpu_ms: float,
    cpu_ms: float,
    cpu_ms_per_token: float,
) -> tuple[float, float]:
    """Return the summed ends (s) of exact and greedy plans: layers x 32 decode steps.

    `model` is layers, experts, top_k. A layer's popularity is skew x Normal(0, 1) on the router's
    logits, and each of `batch` tokens draws its experts by them (Gumbel, without replacement).
    """
    layers, experts, top_k = model
    random = np.random.default_rng(7)
    best_ns = greedy_ns = 0
    gpu_ns = np.full(experts, ms(gpu_ms))
    on_gpu = np.zeros(experts, np.int64)
    for _ in range(layers):
        popularity = skew * random.standard_normal(experts)
        for _ in range(32):
            drawn = popularity + random.gumbel(size=(batch, experts))
            chosen = np.argsort(-drawn, axis=1)[:, :top_k]
            loads = np.bincount(chosen.ravel(), minlength=experts)
            active = np.flatnonzero(loads)
            cpu_ns = ms(cpu_ms) + ms(cpu_ms_per_token) * loads
            best_ns += exact(active, len(active), cpu_ns, gpu_ns, on_gpu)
            greedy_ns += int(max(greedy(active, len(active), cpu_ns, gpu_ns, on_gpu)))
    return best_ns / 1e9, greedy_ns / 1e9


MIXTRAL = (32, 8, 2)
DEEPSEEK = (26, 64, 6)


@pytest.mark.parametrize(
    ("model", "batch", "fit", "best_s", "greedy_s"),
    [
        (MIXTRAL, 16, (0.5, 5.0, 2.0, 1.75), 23.1, 25.1),
        (MIXTRAL, 32, (0.5, 5.0, 2.0, 1.75), 28.5, 30.2),
        (DEEPSEEK, 16, (0.5, 1.1, 0.0, 0.3), 12.3, 14.4),
        (DEEPSEEK, 32, (0.5, 1.1, 0.0, 0.3), 19.5, 22.8),
    ],
)
def test_fitted_two_lane_model_gives_the_modelled_times(
    model: tuple[int, int, int],
    batch: int,
    fit: tuple[float, float, float, float],
    best_s: float,
    greedy_s: float,
) -> None:
    assert two_lanes(model, batch, *fit) == pytest.approx((best_s, greedy_s), rel=0.015)


def ratios(mixtral: tuple[float, float, float, float]) -> dict[tuple[str, int], float]:
    """Return exact over greedy at Table 4's four points, for a fit of Mixtral."""
    points = (("mixtral", MIXTRAL, mixtral), ("deepseek", DEEPSEEK, (0.5, 1.1, 0.0, 0.3)))
    return {
        (name, batch): best / greedily
        for name, model, fit in points
        for batch in (16, 32)
        for best, greedily in [two_lanes(model, batch, *fit)]
    }


def test_exact_over_greedy_is_in_the_range_of_dali_table_4() -> None:
    """0.846 and 0.921 for Mixtral, 0.861 and 0.879 for DeepSeek, at batch 16 and 32.

    Of the published fits of Mixtral this is the one that stays in the range; the one with half its
    skew has 28.5 / 30.2 = 0.94 at batch 32 by its own figures, which the test above reproduces.
    """
    found = ratios((1.0, 6.5, 3.0, 1.0))
    assert all(0.84 <= value <= 0.93 for value in found.values()), found


def test_greedy_is_best_for_mixtral_at_batch_32() -> None:
    """As in Table 4, by the fit whose order does not hang on the seed."""
    found = ratios((0.5, 5.0, 2.0, 1.75))
    assert max(found, key=found.__getitem__) == ("mixtral", 32)


# HybriMoE's timeline.


class Layer(NamedTuple):
    """A layer step with every expert active; `arrival` is NONE where a copy is needed."""

    loads: list[int]
    cpu: list[int]
    gpu: list[int]
    arrival: list[int]
    copy: int
    link: int = 0
    first: int = 0


def by_hss(layer: Layer, order: Sequence[int]) -> tuple[IntArray, list[int], int, int]:
    """Return the devices, the queue, and the ends of GPU and CPU."""
    n = len(layer.loads)
    cpu_ns, gpu_ns, on_gpu = arrays(layer.cpu, layer.gpu)
    queue, key = np.full(n, NONE), np.zeros(n, np.int64)
    arrival = np.array(layer.arrival, np.int64)
    line_up(np.array(order, np.int64), n, np.array(layer.loads, np.int64), arrival, key, queue)
    ends_ns = hss(queue, n, cpu_ns, gpu_ns, arrival, layer.copy, layer.link, layer.first, on_gpu)
    return on_gpu, queue.tolist(), *ends_ns


def as_released(layer: Layer, order: Sequence[int]) -> tuple[set[int], int, int]:
    """Return what the GPU takes, and both ends, by lists as in HybriMoE's code, which waits for
    nothing that is on its way."""
    by_load = sorted(order, key=lambda e: -layer.loads[e])
    absent = [e for e in by_load if layer.arrival[e] == NONE]
    todo = [e for e in by_load if e not in absent] + absent
    gpu = cpu = 0
    link = layer.link
    on_gpu: list[int] = []
    on_cpu: list[int] = []
    while todo:
        f, z = todo[0], todo[-1]
        g, c = layer.gpu[f], layer.cpu[z] + (0 if on_cpu else layer.first)
        if f in absent:
            g += max(0, link + layer.copy - gpu)
        if gpu + g <= cpu + c:
            link += layer.copy if f in absent else 0
            gpu += g
            on_gpu.append(todo.pop(0))
        else:
            cpu += c
            on_cpu.append(todo.pop())
    return set(on_gpu), gpu, cpu


@pytest.mark.parametrize(
    ("resident", "queue", "on_gpu", "gpu_ms", "cpu_ms"),
    [((), [0, 1, 2, 3, 4], {0, 1}, 10.5, 12.5), ((1, 3), [1, 3, 0, 2, 4], {0, 1, 3}, 5.5, 9.0)],
)
def test_hss_vectors(
    resident: tuple[int, ...], queue: list[int], on_gpu: set[int], gpu_ms: float, cpu_ms: float
) -> None:
    """An expert takes 0.5 ms on the GPU, 5 ms to copy, 1.75 w on the CPU, the first one 2 more.

    Without residents: 4 on the CPU until 3.75, 0 on the GPU until 5.5, 3 on the CPU until 7.25; 1
    on the GPU would end at 10.5, 2 on the CPU at 12.5: the GPU; then 2 at 15.5 or 12.5: the CPU.
    """
    loads = [6, 4, 3, 2, 1]
    layer = Layer(
        loads, [ms(1.75 * w) for w in loads], [ms(0.5)] * 5,
        [0 if e in resident else NONE for e in range(5)], ms(5), first=ms(2),
    )  # fmt: skip
    devices, order, gpu_ns, cpu_ns = by_hss(layer, range(5))
    assert order == queue
    assert set(np.flatnonzero(devices).tolist()) == on_gpu
    assert (gpu_ns, cpu_ns) == (ms(gpu_ms), ms(cpu_ms))
    assert as_released(layer, range(5)) == (on_gpu, gpu_ns, cpu_ns)


def test_hss_gives_equal_ends_to_the_gpu_and_idle_cpus_the_last_resident() -> None:
    """Both resident, 4 on either device: the GPU takes the first, the CPU the last at 4, not 8."""
    layer = Layer([1, 1], [4, 4], [4, 4], [0, 0], copy=9)
    assert by_hss(layer, [1, 0])[0].tolist() == [0, 1]
    assert by_hss(layer._replace(cpu=[8, 8]), [1, 0])[0].tolist() == [1, 1]
    assert by_hss(layer._replace(cpu=[7, 8]), [1, 0])[0].tolist() == [0, 1]


def test_hss_lines_up_equal_loads_in_order_of_arrival_behind_what_is_there() -> None:
    """0 and 5 are there, 3 is coming, the others are absent; 2, 3 and 4 have most tokens."""
    layer = Layer([1, 1, 7, 9, 7, 2], [9] * 6, [1] * 6, [0, NONE, NONE, 8, NONE, 0], copy=9)
    assert by_hss(layer, [4, 1, 0, 3, 2, 5])[1] == [5, 0, 3, 4, 2, 1]


def test_hss_waits_for_the_link_and_for_what_is_coming() -> None:
    """A copy of 10 begins at 4 and ends at 14; what arrives at 6 needs no copy."""
    absent = Layer([1, 1], [17, 30], [2, 2], [NONE, NONE], copy=10, link=4)
    assert by_hss(absent, [1, 0])[2:] == (16, 17)  # the other would end at 26 on the GPU
    coming = absent._replace(arrival=[NONE, 6], cpu=[15, 30])
    assert by_hss(coming, [1, 0])[2:] == (8, 15)  # 8; then 14 + 2 = 16 against 15


timelines = st.lists(
    st.tuples(
        st.integers(1, 9), st.integers(1, 30), st.integers(1, 9), st.sampled_from((0, NONE, NONE))
    ),
    min_size=1,
    max_size=9,
)


@given(timelines, st.integers(1, 20), st.integers(0, 9), st.integers(0, 9), st.randoms())
def test_hss_is_the_released_code(
    rows: list[tuple[int, int, int, int]], copy: int, link: int, first: int, random: object
) -> None:
    loads, cpu, gpu, arrival = (list(column) for column in zip(*rows, strict=True))
    layer = Layer(loads, cpu, gpu, arrival, copy, link, first)
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    devices, _, gpu_ns, cpu_ns = by_hss(layer, order)
    assert as_released(layer, order) == (
        set(np.flatnonzero(devices == 1).tolist()), gpu_ns, cpu_ns,
    )  # fmt: skip
    assert set(devices.tolist()) <= {0, 1}


@given(st.lists(st.integers(1, 90), min_size=1, max_size=20), st.integers(1, 99))
def test_hss_is_exact_where_nothing_is_there_and_copies_are_all_that_counts(
    loads: list[int], copy: int
) -> None:
    """Equal costs on the GPU, and on the CPU more for more tokens: some prefix is optimal."""
    n = len(loads)
    layer = Layer(loads, loads, [0] * n, [NONE] * n, copy)
    cpu_ns, gpu_ns, on_gpu = arrays(loads, [copy] * n)
    assert max(by_hss(layer, range(n))[2:]) == exact(np.arange(n), n, cpu_ns, gpu_ns, on_gpu)


def test_hss_beats_greedy_by_about_a_seventh_on_the_fit_of_deepseek() -> None:
    """14 to 17 %, by the batch, as it is exact there: 1.1 ms per copy, 0.3 w on the CPU."""
    random = np.random.default_rng(7)
    for batch in (8, 32):
        greedy_ns = hss_ns = 0
        for _ in range(200):
            drawn = 0.5 * random.standard_normal(64) + random.gumbel(size=(batch, 64))
            chosen = np.argsort(-drawn, axis=1)[:, :6]
            loads = np.bincount(chosen.ravel(), minlength=64)
            loads = loads[loads > 0]
            n = len(loads)
            cpu = (ms(0.3) * loads).tolist()
            cpu_ns, gpu_ns, on_gpu = arrays(cpu, [ms(1.1)] * n)
            greedy_ns += max(greedy(np.arange(n), n, cpu_ns, gpu_ns, on_gpu))
            layer = Layer(loads.tolist(), cpu, [0] * n, [NONE] * n, ms(1.1))
            hss_ns += max(by_hss(layer, range(n))[2:])
        assert 1.13 < greedy_ns / hss_ns < 1.18
