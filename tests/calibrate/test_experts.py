"""What is measured of an expert, on lanes whose clock is counted, and the tables made of it."""

import math
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from moesim.calibrate import experts, sweeps
from moesim.calibrate.experts import (
    PRECISIONS,
    QUICK_TOKENS,
    TOKENS,
    judged,
    remarks,
    series,
    tasks,
)
from moesim.calibrate.memory import cache_bytes
from moesim.calibrate.series import Bench, Point, Series
from moesim.calibrate.sweeps import Size, copies, grid, merged, noise, provenance, sweep
from moesim.calibrate.timing import MOST_CALLS, Limits, Timed
from moesim.errors import CalibrationError
from moesim.model import load_model
from moesim.real import operations
from moesim.real.devices import Processor
from moesim.real.emulated import Emulated, Throttle
from moesim.real.lanes import Lane, Ticket

LIMITS = Limits(warm_ups=1, least=3, most=5, seconds=1.0)


class Counted(Lane):
    """A lane without a thread: operations take what they add to `now_ns`, and wait for nobody."""

    def __init__(self, name: str, threads: int = 1) -> None:
        self.name, self.threads, self.now_ns = name, threads, 0
        self.calls_of_tickets: list[int] = []

    def submit(self, work: Any, after: Any = (), queue: int = 0) -> Ticket:
        ticket = Ticket(self.name)
        ticket.start_ns = self.now_ns
        try:
            if not isinstance(getattr(work, "__self__", None), threading.Event):
                work()
        except Exception as error:
            ticket.error = error
        ticket.end_ns = self.now_ns
        ticket.finish()
        return ticket

    def close(self) -> None:
        pass


class Counting(Processor):
    """A device in host memory, with counted lanes."""

    label = "emulated"
    memory_bytes = 1 << 22

    def __init__(self) -> None:
        self.name = "a clock that is counted"
        self.lanes: dict[str, Lane] = {name: Counted(name) for name in ("gpu", "cpu")}
        self.allocated: list[int] = []

    def empty(self, *shape: int, dtype: Any) -> Any:
        self.allocated.append(math.prod(shape) * dtype.itemsize)
        return torch.empty(shape, dtype=dtype)


@pytest.fixture
def bench() -> Bench:
    return Bench(Counting(), LIMITS, quick=True)


def spend(bench: Bench, lane: str, ns: int) -> None:
    queue = bench.device.lanes[lane]
    assert isinstance(queue, Counted)
    queue.now_ns += ns


def taking(bench: Bench, ns: Callable[[int], int], seen: list[Any] | None = None) -> Any:
    """Return a preparation of calls that take these times by size, and note which copy they use."""

    def prepare(at: int) -> Callable[[int], object]:
        def call(k: int) -> None:
            if seen is not None:
                seen.append((at, k))
            spend(bench, "gpu", ns(at))

        return call

    return prepare


# Sweeps.


def test_a_sweep_times_every_size_in_order(bench: Bench) -> None:
    """2 ms for a token: three in a row, but for four tokens, which take 8 ms.

    Of each two trials, a warm-up, three repetitions; then all over again, without the trials.
    """
    seen: list[Any] = []
    sizes = grid([1, 4], [2])
    points, facts = sweep(bench, "gpu", sizes, taking(bench, lambda n: 2_000_000 * n, seen))
    assert [(p.at, p.ns, p.held_out) for p in points] == [
        (1, 2e6, False), (2, 4e6, True), (4, 8e6, False)
    ]  # fmt: skip
    assert all(p.settled and p.repetitions == 6 and p.spread == 0 for p in points)
    first, again = [1] * 14 + [2] * 14 + [4] * 6, [1] * 12 + [2] * 12 + [4] * 4
    assert [at for at, _ in seen] == first + again
    assert [k for _, k in seen] == list(range(62))  # the copies go on from size to size
    assert facts["device"] == "emulated"
    assert facts["threads"] == 1
    assert "stopped" not in facts


@pytest.mark.parametrize(
    ("ns", "calls"),
    [(1, MOST_CALLS), (100_000, 5), (300_000, 3), (900_000, 3), (5_000_000, 1), (0, MOST_CALLS)],
)
def test_short_operations_are_done_in_a_row(bench: Bench, ns: int, calls: int) -> None:
    """Half a millisecond of them, 3 to 16; the time is that of one, 1 ns at least."""
    seen: list[Any] = []
    points, _ = sweep(bench, "gpu", [Size(1)], taking(bench, lambda _: ns, seen))
    assert len(seen) == 2 + 2 * (1 + 3) * calls
    assert points[0].ns == max(1, ns)


def test_it_stops_where_one_call_takes_too_long(bench: Bench) -> None:
    """1 s is the limit: 4 tokens take 1.2 s, and are not among the points, nor is what follows."""
    seen: list[Any] = []
    points, facts = sweep(
        bench, "gpu", [Size(1), Size(2), Size(4), Size(8)],
        taking(bench, lambda n: 300_000_000 * n, seen),
    )  # fmt: skip
    assert [p.at for p in points] == [1, 2]
    assert facts["stopped"] == "at 4, where one call takes 1.2 s, more than 1"
    assert [at for at, _ in seen if at >= 4] == [4, 4]


def test_the_first_size_is_measured_however_long_it_takes(bench: Bench) -> None:
    """With fewer repetitions: two trials, one warm-up and three that count, of 10 and 50."""
    seen: list[Any] = []
    patient = bench._replace(limits=Limits(warm_ups=10, least=50, seconds=1.0))
    points, facts = sweep(
        patient, "gpu", [Size(3), Size(4)], taking(bench, lambda n: 10**9 * n, seen)
    )
    assert [(p.at, p.ns, p.repetitions) for p in points] == [(3, 3e9, 3)]
    assert facts["stopped"] == "at 3, where one call takes 3 s, more than 1"
    assert [at for at, _ in seen] == [3] * 6


def test_a_disturbance_that_lasts_is_seen_by_the_second_pass(bench: Bench) -> None:
    """Of two sizes, each takes 14 calls in the first pass: those of the first take half as long
    again, one like the other. Its time is that of the second pass; its spread spans both.
    """
    calls = iter(range(1000))
    points, _ = sweep(
        bench, "gpu", [Size(1), Size(2)],
        taking(bench, lambda n: 3_000_000 if next(calls) < 14 else 2_000_000),
    )  # fmt: skip
    assert [(p.ns, p.median_ns, p.repetitions) for p in points] == [(2e6, 2e6, 6)] * 2
    assert [p.settled for p in points] == [False, True]
    assert [p.spread for p in points] == pytest.approx([0.5, 0])


def test_merging_by_hand() -> None:
    """100 to 110 and 105 to 125: 100, with a spread to 125."""
    one = Timed(100, 110, 0.1, 7, False, 1)
    other = Timed(105, 125, 0.19, 9, False, 2)
    for pair in ((one, other), (other, one)):
        found = merged(*pair, LIMITS._replace(spread=0.3))
        assert found._replace(spread=0) == Timed(100, 110, 0, 16, True, 3)
        assert found.spread == pytest.approx(0.25)
        assert not merged(*pair, LIMITS._replace(spread=0.2)).settled
        assert not merged(*pair, LIMITS._replace(spread=0.3, least=17)).settled


def test_a_first_call_that_sets_something_up_stops_nothing(bench: Bench) -> None:
    first = iter([5 * 10**9])
    points, facts = sweep(
        bench, "gpu", [Size(1), Size(2)], taking(bench, lambda n: next(first, 1_000_000 * n))
    )
    assert [p.ns for p in points] == [1e6, 2e6]
    assert "stopped" not in facts


def test_a_lane_that_is_not_there_is_named(bench: Bench) -> None:
    with pytest.raises(CalibrationError, match="emulated has no lane 'npu', only: gpu, cpu"):
        sweep(bench, "npu", [Size(1)], taking(bench, lambda _: 1))


def test_noise_is_the_same_each_time_and_not_all_the_same() -> None:
    one, other = (noise(3, 50, dtype=torch.float32) for _ in range(2))
    assert torch.equal(one, other)
    assert one.unique().numel() > 100
    large = noise(3, 1 << 20, dtype=torch.float16, scale=2.0)
    assert large.shape == (3, 1 << 20)
    assert large.float().std() == pytest.approx(2, rel=0.01)


def test_copies_rotate_through_more_than_the_caches(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1,000 bytes in 4,500: four; equal, and none shares memory with another."""
    monkeypatch.setattr(sweeps, "arena_bytes", lambda *_, **__: 4500)
    value = (noise(250, dtype=torch.float16), noise(125, dtype=torch.float32))
    made = copies(bench, "gpu", value)
    assert len(made.sets) == made.facts["buffers"] == 4
    assert made.facts["weight_bytes"] == 1000
    assert made.facts["buffer_bytes"] == 4000
    assert len({one.data_ptr() for own in made.sets for one in own}) == 8
    for own in made.sets:
        assert all(torch.equal(*pair) for pair in zip(own, value, strict=True))
    assert [made(k) is made.sets[k % 4] for k in range(9)] == [True] * 9


def test_what_does_not_fit_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "arena_bytes", lambda *_, **__: 900)
    with pytest.raises(CalibrationError, match="1000 bytes do not fit into the 900 that lane cpu"):
        copies(bench, "cpu", (noise(250, dtype=torch.float32),))
    # Three quarters of 4 MiB, of which all but 500 bytes are taken.
    beside = 3 * (1 << 20) - 500
    with pytest.raises(CalibrationError, match="fit into the 500"):
        copies(bench, "gpu", (noise(250, dtype=torch.float32),), beside)


def test_the_arena_is_larger_than_the_largest_cache() -> None:
    """On a device with room: what rotates is twice the cache that the system tells."""
    device = Counting()
    device.memory_bytes = 1 << 40
    found = sweeps.room_bytes(Bench(device, LIMITS, quick=True), "gpu", 1000)
    assert found >= 2 * cache_bytes() // 4096 * 4096


# Experts.


def test_grids_hold_out_tokens_between_the_others() -> None:
    for sizes, last in ((TOKENS, 4096), (QUICK_TOKENS, 256)):
        fitted = [size.at for size in sizes if not size.held_out]
        apart = [size.at for size in sizes if size.held_out]
        assert fitted[0] == 1
        assert fitted[-1] == last
        assert not set(fitted) & set(apart)
        assert all(1 < at < last for at in apart)
        assert [size.at for size in sizes] == sorted({*fitted, *apart})
        assert apart


def test_tasks_are_one_per_lane_shape_and_precision(bench: Bench) -> None:
    models = [load_model(name) for name in ("qwen3-30b-a3b", "mixtral-8x7b", "qwen3-30b-a3b")]
    found = tasks(bench, models, ("bf16", "fp16", "fp32", "int8"))
    names = [task.name for task in found]
    assert names == [
        f"expert/{lane}/{shape}/{precision}"
        for lane in ("gpu", "cpu")
        for shape in ("2048x768", "4096x14336")
        for precision in ("16", "16-fp16", "32", "8")
    ]
    assert all(task.seconds == sweeps.PASSES * LIMITS.seconds * len(QUICK_TOKENS) for task in found)
    full = tasks(bench._replace(quick=False), models)
    assert full[0].seconds == sweeps.PASSES * LIMITS.seconds * len(TOKENS)


def test_a_machine_without_a_device_measures_its_processor_only() -> None:
    device = Processor(1)
    found = tasks(Bench(device, LIMITS, quick=True), [load_model("qwen3-30b-a3b")])
    assert [task.name for task in found] == ["expert/cpu/2048x768/16"]
    device.close()


def test_an_unknown_precision_is_refused(bench: Bench) -> None:
    with pytest.raises(CalibrationError, match="no precision 'int3'; there are: bf16, fp16"):
        tasks(bench, [], ("int3",))


@pytest.fixture
def watched(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return what experts were called with; each takes max(1 ms, 100 us a token) on its lane."""
    calls: list[Any] = []

    def expert(rows: Any, gate_up: Any, down: Any) -> Any:
        calls.append((rows, gate_up, down))
        for lane in ("gpu", "cpu"):
            spend(bench, lane, max(1_000_000, 100_000 * len(rows)))
        return operations.expert(rows, gate_up, down)

    monkeypatch.setattr(experts, "expert", expert)
    # Room for three experts in bfloat16: 3 x 64 x 32 x 2 = 12,288 bytes each.
    monkeypatch.setattr(sweeps, "arena_bytes", lambda *_, **__: 40_000)
    return calls


@pytest.mark.parametrize("lane", ["gpu", "cpu"])
def test_an_expert_is_measured_on_cold_weights(bench: Bench, watched: list[Any], lane: str) -> None:
    found = series(bench, lane, 64, 32, "bf16")
    assert found.name == f"expert/{lane}/64x32/16"
    assert found.unit == "tokens"
    assert [(p.at, p.held_out) for p in found.points] == [tuple(size) for size in QUICK_TOKENS]
    assert [p.ns for p in found.points] == [max(1e6, 1e5 * n.at) for n in QUICK_TOKENS]
    assert found.facts["dtype"] == "bfloat16"
    assert found.facts["weight_bytes"] == 12_288
    assert found.facts["buffers"] == 3
    assert found.facts["flops_per_token"] == 2 * 3 * 64 * 32
    pointers = [gate_up.data_ptr() for _, gate_up, _ in watched[1:]]  # the first was a trial
    assert len(set(pointers)) == 3
    assert all(pointers[k] == pointers[k % 3] for k in range(len(pointers)))
    assert {tuple(gate_up.shape) for _, gate_up, _ in watched} == {(64, 64)}
    assert {tuple(down.shape) for _, _, down in watched} == {(64, 32)}
    device = bench.device
    assert isinstance(device, Counting)
    assert bool(device.allocated) == (lane == "gpu")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_computes_or_says_that_it_cannot(
    bench: Bench, watched: list[Any], precision: str
) -> None:
    found = series(bench, "cpu", 64, 32, precision, [Size(1), Size(2)])
    assert found.name == f"expert/cpu/64x32/{PRECISIONS[precision]}"
    assert bool(found.points) != ("unsupported" in found.facts)
    sizes = {"fp32": 4, "int8": 1, "int4": 0.5, "packed8": 1, "packed4": 0.5, "packed2": 0.25}
    size = sizes.get(precision, 2)
    if precision.startswith("packed"):
        size += 4 / 64
    if found.points:
        assert 1 <= float(found.facts["weight_bytes"]) / (3 * 64 * 32 * size) < 1.2
    if precision == "int4":
        # An expert of 32 inputs to the second matrix has no whole group of 64.
        assert "unsupported" in found.facts


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_packed_experts_make_the_table_of_their_bits(bench: Bench, bits: int) -> None:
    made = judged(series(bench, "cpu", 64, 64, f"packed{bits}", [Size(1), Size(2), Size(4)]))
    assert made.table is not None
    assert made.table.bits == bits
    assert f"weights packed{bits}" in made.table.provenance.note


def test_four_bits_where_the_shape_allows_them(
    bench: Bench, watched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = series(bench, "cpu", 64, 64, "int4", [Size(1), Size(2)])
    if found.points:  # the kernel is there since PyTorch 2.6
        assert isinstance(watched[-1][1], operations.Int4)
        # Half a byte a weight, and 4 bytes of scale and zero point for 64 of them.
        assert found.facts["weight_bytes"] == 3 * 64 * 64 * (0.5 + 4 / 64)


def test_a_kernel_that_is_not_there_is_no_error_and_no_number(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise NotImplementedError("Could not run\n 'aten::_weight_int8pack_mm'")

    monkeypatch.setattr(experts, "expert", refuse)
    found = series(bench, "cpu", 64, 32, "int8")
    assert found.points == ()
    assert (
        found.facts["unsupported"]
        == "NotImplementedError: Could not run 'aten::_weight_int8pack_mm'"
    )
    with pytest.raises(CalibrationError, match="64x32/8 has no points: NotImplementedError"):
        judged(found)


def test_lack_of_memory_is_not_taken_for_lack_of_a_kernel(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(experts, "expert", refuse)
    with pytest.raises(RuntimeError, match="out of memory"):
        series(bench, "cpu", 64, 32, "bf16")


def test_on_lanes_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Structure only: real operations on an emulated device."""
    monkeypatch.setattr(sweeps, "arena_bytes", lambda *_, **__: 40_000)
    device = Emulated(1 << 22, Throttle(0, 1e9))
    limits = LIMITS._replace(seconds=0.01)
    found = series(Bench(device, limits, quick=True), "gpu", 64, 32, "bf16")
    device.close()
    assert [p.at for p in found.points] == [size.at for size in QUICK_TOKENS]
    assert all(0 < p.ns <= p.median_ns and p.repetitions >= 3 for p in found.points)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Series) == found


# Tables.


def measured(
    ns: Callable[[float], float], name: str = "expert/cpu/64x32/16", **facts: Any
) -> Series:
    """Return a series of the full grid that takes these times."""
    points = tuple(
        Point(
            at=size.at, ns=ns(size.at), median_ns=ns(size.at), spread=0.001 * k, repetitions=20 - k,
            settled=k != 3, outliers=0, held_out=size.held_out,
        )
        for k, size in enumerate(QUICK_TOKENS)
    )  # fmt: skip
    own: dict[str, Any] = {"hidden": 64, "width": 32, "precision": "bf16", "dtype": "bfloat16"}
    return Series(
        name=name, unit="tokens", points=points,
        facts={**own, "device": "emulated", "threads": 2, **facts},
    )  # fmt: skip


def floor(tokens: float) -> float:
    return max(1000.0, 200 + 50 * tokens)


def test_a_table_has_the_fitted_points_and_where_they_come_from() -> None:
    found = judged(measured(floor), "2031-01-02", {"torch": "2.9"})
    table = found.table
    assert table is not None
    assert (table.hidden, table.width, table.bits) == (64, 32, 16)
    assert table.points == tuple((n, floor(n)) for n in (1, 4, 16, 64, 256))
    own = table.provenance
    assert own.source == "measured"
    assert (own.date, own.versions) == ("2031-01-02", {"torch": "2.9"})
    assert own.repetitions == 20 - 6
    assert own.spread_pct == pytest.approx(0.6)
    assert "device emulated, 2 threads; 1 of 7 points did not settle" in own.note
    assert "lane cpu" in own.note


def test_fit_and_table_are_judged_by_points_held_out() -> None:
    """The table is exact on the slope, where 128 is, and 8 lies between 1,000 at 4 and 16."""
    found = judged(measured(floor))
    assert found.fit is not None
    assert found.fit.parameters == pytest.approx([1000, 200, 50], rel=0.02)
    assert not found.fit.misses
    assert found.table_error == pytest.approx(0, abs=1e-9)
    bent = judged(measured(lambda n: 1000 * n**0.5))
    # From 4 to 16 tokens 2,000 to 4,000: 2,667 at 8, of which 2,828 are true.
    assert bent.table_error == pytest.approx(1 - (2000 + 2000 * 4 / 12) / (1000 * 8**0.5), abs=0.02)
    assert bent.fit is not None
    assert bent.fit.misses
    assert bent.table is not None
    assert bent.table.points[-1] == (256, 16000)


@pytest.mark.parametrize(
    ("precision", "bits"), [("16", 16), ("16-fp16", 16), ("8", 8), ("4", 4), ("32", None)]
)
def test_profiles_know_16_8_and_4_bits(precision: str, bits: int | None) -> None:
    table = judged(measured(floor, f"expert/gpu/64x32/{precision}")).table
    assert (table.bits if table else None) == bits


def test_a_series_that_stopped_has_a_table_and_perhaps_no_fit() -> None:
    whole = measured(floor, stopped="at 8, where one call takes 9 s, more than 1")
    found = judged(msgspec.structs.replace(whole, points=whole.points[:2]))
    assert found.fit is None
    assert found.table_error is None
    assert found.table is not None
    assert found.table.points == ((1, 1000.0), (4, 1000.0))
    assert "stopped at 8" in found.table.provenance.note


def test_a_point_held_out_beyond_the_last_is_not_judged() -> None:
    """It would be extrapolated: nothing that a table of these points is used for."""
    whole = measured(lambda n: 1e6 if n == 128 else floor(n))
    cut = judged(msgspec.structs.replace(whole, points=whole.points[:-1]))
    assert cut.fit is not None
    assert cut.fit.held_out.size == 1
    assert cut.table_error is not None
    assert cut.table_error < 0.01


def test_what_makes_no_table_is_said_in_a_line_each() -> None:
    def named(precision: str, **facts: Any) -> Series:
        name = f"expert/gpu/64x32/{PRECISIONS[precision]}"
        return measured(lambda n: 1e6 * n, name, precision=precision, **facts)

    none = msgspec.structs.replace(named("int4", unsupported="RuntimeError: no"), points=())
    single, half = named("fp32"), named("fp16")
    assert remarks([named("bf16"), named("int8"), none, single, half]) == [
        "expert/gpu/64x32/4: no kernel for it: RuntimeError: no",
        "expert/gpu/64x32/32: 1 ms at n = 1, 256 ms at n = 256; profiles have no table of 32 bits",
        "expert/gpu/64x32/16-fp16: 1 ms at n = 1, 256 ms at n = 256;"
        " the table of 16 bits is that of bf16",
    ]
    assert remarks([half, measured(floor, "gate/gpu/64x8")]) == []
    short = msgspec.structs.replace(single, points=single.points[:1])
    assert remarks([short])[0].startswith("expert/gpu/64x32/32: 1 ms at n = 1; profiles")


def test_provenance_takes_the_worst_of_all_series() -> None:
    one, other = measured(floor), measured(floor, threads=9)
    short = msgspec.structs.replace(other, points=other.points[-1:])
    own = provenance([one, short], "a note", "", {})
    assert own.repetitions == 14
    assert own.note == "a note; device emulated, 2 threads; 1 of 8 points did not settle"
    assert np.isclose(own.spread_pct, 0.6)
