"""Interference: the arithmetic on made-up tickets, and what keeps lanes busy."""

import os
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesim.calibrate import disk, interference, memory
from moesim.calibrate.calibration import run_tasks
from moesim.calibrate.interference import (
    LEAST_INSIDE,
    TOKENS,
    contention,
    count_for,
    expert_job,
    inside,
    keep_busy,
    lane_sets,
    measure_set,
    overlap_share,
    real_jobs,
    series,
    set_series,
    slowed,
    tasks,
    together,
)
from moesim.calibrate.series import Bench, Series
from moesim.calibrate.timing import Limits
from moesim.errors import CalibrationError
from moesim.profile import load_profile, with_overrides
from moesim.real.devices import Processor
from moesim.real.emulated import Emulated, Throttle
from moesim.real.lanes import Lane, Ticket
from moesim.types import LANES

LIMITS = Limits(warm_ups=0, least=2, most=2, seconds=0.01)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    for module in (interference, memory):
        monkeypatch.setattr(module, "LEAST_ARENA_BYTES", 1 << 16)
        monkeypatch.setattr(module, "cache_bytes", lambda: 0)
    device = Emulated(4 << 20, Throttle(1000, 1e9))
    yield Bench(device, LIMITS, True)
    device.close()


def ran(lane: str, *spans: tuple[int, int]) -> list[Ticket]:
    tickets = []
    for start, end in spans:
        ticket = Ticket(lane)
        ticket.start_ns, ticket.end_ns = start, end
        tickets.append(ticket)
    return tickets


def steady(lane: str, first: int, each: int, count: int, gap: int = 0) -> list[Ticket]:
    """Return operations one after the other."""
    starts = [first + k * (each + gap) for k in range(count)]
    return ran(lane, *((start, start + each) for start in starts))


# The arithmetic.


def test_all_are_busy_from_the_last_start_to_the_first_end() -> None:
    phase = [steady("gpu", 0, 10, 10), steady("cpu", 25, 30, 2), steady("h2d", 5, 100, 1)]
    assert together(phase) == (25, 85)


def test_lanes_that_never_met_are_no_measurement() -> None:
    with pytest.raises(CalibrationError, match=r"gpu\+cpu were never busy at once"):
        together([steady("gpu", 0, 10, 3), steady("cpu", 30, 10, 3)])
    with pytest.raises(CalibrationError, match="did nothing"):
        together([steady("gpu", 0, 10, 3), []])


def test_only_what_lies_wholly_inside_counts() -> None:
    """From 15 to 55, of ten operations of 10 those from 20 to 50."""
    tickets = steady("gpu", 0, 10, 10)
    assert inside(tickets, 15, 55) == [10, 10, 10]
    assert inside(tickets, 20, 50) == [10, 10, 10]
    with pytest.raises(CalibrationError, match=f"gpu did 2 .* at least {LEAST_INSIDE}"):
        inside(tickets, 21, 50)


def test_the_share_of_overlap_by_hand() -> None:
    """Within 100 to 200: gpu is busy throughout, cpu 9 of every 10, h2d 5 of every 10.

    The pair of cpu and h2d meets in 4 of every 10, since h2d begins with cpu's pause.
    """
    gpu = steady("gpu", 0, 1000, 1)
    cpu = steady("cpu", 100, 9, 20, gap=1)
    h2d = steady("h2d", 109, 5, 20, gap=5)
    assert overlap_share([gpu, cpu], 100, 200) == pytest.approx(0.9)
    assert overlap_share([gpu, h2d], 109, 209) == pytest.approx(0.5)
    assert overlap_share([gpu, cpu, h2d], 109, 209) == pytest.approx(0.4)


def test_a_drift_of_the_machine_cancels() -> None:
    """It slows down steadily, and together everything takes twice as long: the factor is 1/2."""
    before, after = [100.0, 120.0, 140.0], [120.0, 140.0, 160.0]
    between = [220.0, 260.0, 300.0]
    found = slowed(before, between, after)
    assert found == pytest.approx((0.5, 0.5, 0.0))


def test_the_factor_is_the_median_and_keeps_its_spread() -> None:
    found = slowed([100.0] * 3, [200.0, 125.0, 160.0], [100.0] * 3)
    assert found.factor == pytest.approx(0.625)
    assert found.spread == pytest.approx((0.8 - 0.5) / 0.625)


def test_a_factor_above_one_is_clipped_and_said() -> None:
    found = slowed([110.0, 110.0], [100.0, 100.0], [110.0, 110.0])
    assert (found.factor, found.raw) == pytest.approx((1.0, 1.1))
    made = set_series(
        "both", ["gpu", "cpu"], {"gpu": found, "cpu": slowed([1.0], [2.0], [1.0])},
        {"gpu": [110.0], "cpu": [1.0]}, {"gpu": [100, 100], "cpu": [2, 2]}, [0.9, 0.95], LIMITS,
    )  # fmt: skip
    assert made.name == "both"
    assert made.facts["clipped/gpu"] == "1.1000 was measured; 1 is the most that is legal"
    assert "clipped/cpu" not in made.facts
    assert made.facts["overlap_share"] == 0.9
    assert [(p.at, p.ns) for p in made.points] == [(0, 100), (1, 2)]
    assert contention(made).slow == pytest.approx({"gpu": 1.0, "cpu": 0.5})


def test_times_of_nothing_are_refused() -> None:
    for times in (([0.0], [1.0], [0.0]), ([1.0], [0.0], [1.0])):
        with (
            np.errstate(divide="ignore"),
            pytest.raises(CalibrationError, match="more than 0 ns"),
        ):
            slowed(*times)


@pytest.mark.parametrize("lanes", [("gpu", "cpu"), ("gpu", "cpu", "h2d"), ("gpu", "disk")])
def test_a_profile_takes_the_entry(lanes: tuple[str, ...]) -> None:
    facts: dict[str, float | str] = {f"factor/{lane}": 0.5 for lane in lanes}
    entry = contention(Series(name="interference/x", unit="lane", points=(), facts=facts))
    assert entry.busy == lanes
    profile = load_profile("rtx3090-pcie4-ddr4")[0]
    text = f"[{{busy: [{', '.join(lanes)}], slow: {{gpu: {entry.slow['gpu']}}}}}]"
    rates = with_overrides(profile, {"interference": text}).rates()
    assert rates[sum(1 << LANES.index(lane) for lane in lanes), 0] == 512


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"factor/gpu": 0.5}, "no factors of at least two lanes"),
        ({"factor/gpu": 0.5, "factor/cpu": 1.5}, "factor/cpu is 1.5; above 0 and at most 1"),
        ({"factor/gpu": 0.0, "factor/cpu": 1.0}, r"factor/gpu is 0.0; above 0"),
    ],
)
def test_what_is_no_entry_is_refused(facts: dict[str, float | str], why: str) -> None:
    with pytest.raises(CalibrationError, match=why):
        contention(Series(name="interference/x", unit="lane", points=(), facts=facts))


def made_up(each: dict[str, int], slow: dict[str, float]) -> Any:
    """Return a `keep_busy` of lanes that take these ns, and `slow` of their speed together.

    All of it takes a tenth longer from one round to the next: together half of that.
    """
    now = rounds = 0

    def busy(_: Bench, __: object, lanes: Any, counts: Any) -> list[list[Ticket]]:
        nonlocal now, rounds
        phase = []
        for lane in lanes:
            alone = len(lanes) == 1
            drift = 1 + 0.1 * (rounds if alone else rounds + 0.5)
            ns = round(each[lane] * drift / (1 if alone else slow[lane]))
            phase.append(steady(lane, now, ns, counts[lane]))
        rounds += len(lanes) > 1
        now = max(tickets[-1].end_ns for tickets in phase) + 100
        return phase

    return busy


def test_a_set_is_measured_as_it_was_made(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpu at 0.8 of its speed, h2d at 0.5, cpu as alone."""
    slow = {"gpu": 0.8, "cpu": 1.0, "h2d": 0.5}
    each = {"gpu": 20_000, "cpu": 60_000, "h2d": 100_000}
    monkeypatch.setattr(interference, "keep_busy", made_up(each, slow))
    found = measure_set(bench, {}, ["gpu", "cpu", "h2d"], "all three", 0.01)
    assert found.name == "all three"
    assert contention(found).slow == pytest.approx(slow, rel=1e-3)
    assert found.facts["overlap_share"] == pytest.approx(1.0)
    each_median = [p.median_ns for p in found.points]
    assert each_median == pytest.approx([25_000 * 1.05, 60_000 * 1.05, 200_000 * 1.05], rel=0.06)
    assert found.facts["alone_ns/h2d"] == 110_000


def test_lanes_that_stand_still_are_no_measurement(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copies leave gaps as long as themselves."""

    def busy(_: Bench, __: object, lanes: Any, counts: Any) -> list[list[Ticket]]:
        return [steady(lane, 0, 1000, 100, gap=1000 * (lane == "h2d")) for lane in lanes]

    monkeypatch.setattr(interference, "keep_busy", busy)
    with pytest.raises(CalibrationError, match=r"gpu\+h2d were busy at once in 0.5\d of the time"):
        measure_set(bench, {}, ["gpu", "h2d"], "both", 0.01)


def test_slow_operations_are_done_often_enough_all_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One copy takes ten times the time for a phase, and three times that beside the experts."""
    slow = {"gpu": 1.0, "h2d": 1 / 3}
    monkeypatch.setattr(
        interference, "keep_busy", made_up({"gpu": 1_000_000, "h2d": 100_000_000}, slow)
    )
    found = measure_set(bench, {}, ["gpu", "h2d"], "both", 0.01)
    assert contention(found).slow == pytest.approx(slow, rel=1e-3)
    assert found.points[1].repetitions == 2 * LEAST_INSIDE


def test_operations_fill_the_time_within_reason() -> None:
    assert count_for(1000, 0.01) == 10_000
    assert count_for(1e9, 0.01) == LEAST_INSIDE
    assert count_for(0, 1.0) == 100_000


# Keeping lanes busy.


def test_all_lanes_begin_when_all_is_queued(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given time for it, no lane does anything before all lanes have all of their work."""
    seen: list[str] = []
    early: list[int] = []
    plain = Lane.submit
    for lane in bench.device.lanes.values():
        lane.submit(lambda: None).wait()  # their threads import torch first

    def slowly(self: Lane, work: Any) -> Ticket:
        ticket = plain(self, work)
        time.sleep(0.001)
        early.append(len(seen))
        return ticket

    monkeypatch.setattr(Lane, "submit", slowly)
    jobs = {lane: lambda lane=lane: lambda: seen.append(lane) for lane in ("gpu", "cpu")}
    phase = keep_busy(bench, jobs, ["gpu", "cpu"], {"gpu": 4, "cpu": 7})
    assert early == [0] * (2 + 4 + 7)
    assert [len(tickets) for tickets in phase] == [4, 7]
    assert sorted(seen) == ["cpu"] * 7 + ["gpu"] * 4
    for tickets in phase:
        assert all(a.end_ns <= b.start_ns for a, b in pairwise(tickets))


def test_experts_rotate() -> None:
    """Three experts of one value each give three results, and the fourth call the first one."""
    hidden, width = 4, 2
    size = 6 * hidden * width
    arena = torch.empty(3 * size, dtype=torch.uint8)
    for k in range(3):
        arena[k * size : (k + 1) * size].view(torch.bfloat16).fill_(1 + k)
    job = expert_job(arena, torch.ones(1, hidden, dtype=torch.bfloat16), hidden, width)
    results = [float(job()().sum()) for _ in range(4)]  # type: ignore[attr-defined]
    assert len(set(results)) == 3
    assert results[3] == results[0]


def test_every_lane_has_work_of_an_experts_size(bench: Bench) -> None:
    """8 x 8 x 3 weights of 2 bytes; copies write nowhere that another lane reads."""
    seen: list[tuple[str, int, int, int]] = []
    own: list[Any] = []
    empty = bench.device.empty

    def noted(*shape: int, dtype: Any) -> Any:
        own.append(empty(*shape, dtype=dtype))
        return own[-1]

    bench.device.empty = noted  # type: ignore[method-assign]
    bench.device.copy = lambda target, source: seen.append(  # type: ignore[method-assign]
        ("copy", target.data_ptr(), source.data_ptr(), len(target))
    )
    jobs = real_jobs(bench, LANES, hidden=8, width=8)
    assert set(jobs) == {"gpu", "cpu", "h2d", "d2h"}
    assert jobs["gpu"]()().shape == jobs["cpu"]()().shape == (TOKENS, 8)  # type: ignore[attr-defined]
    assert set(real_jobs(bench, ("cpu", "d2h", "disk"), hidden=8, width=8)) == {"cpu", "d2h"}
    for lane in ("h2d", "h2d", "d2h"):
        for chunk in jobs[lane]()():  # type: ignore[attr-defined]
            chunk()
    assert {size for *_, size in seen} == {6 * 8 * 8}
    targets, sources = {t for _, t, _, _ in seen}, {s for _, _, s, _ in seen}
    assert len(targets) == len(sources) == 3
    assert targets.isdisjoint(sources)
    on_device = [
        any(0 <= target - one.data_ptr() < one.numel() * one.element_size() for one in own)
        for _, target, _, _ in seen
    ]
    assert on_device == [True, True, False]


def test_too_little_memory_is_refused() -> None:
    """An expert of 6 x 64 x 64 bytes: there must be four."""
    device = Emulated(4 * 24576 - 1, Throttle(1000, 1e9))
    own = Bench(device, LIMITS, True)
    with pytest.raises(
        CalibrationError, match=r"98303 bytes of device memory are too .*; 98304 are needed"
    ):
        real_jobs(own, ("cpu", "h2d"), hidden=64, width=64)
    assert set(real_jobs(own, ("cpu", "disk"), hidden=64, width=64)) == {"cpu"}
    device.close()


def test_a_device_with_room_for_four_experts_is_enough() -> None:
    device = Emulated(4 * 24576, Throttle(1000, 1e9))
    assert len(real_jobs(Bench(device, LIMITS, True), LANES, hidden=64, width=64)) == 4
    device.close()


def test_sets_of_lanes() -> None:
    lanes = ["cpu", "d2h", "disk", "gpu", "h2d"]
    """Of four: 6 pairs, 4 of three, and all; the disk is in pairs only, and not if quick."""
    pairs = lane_sets(lanes, quick=True)
    assert len(pairs) == 6
    assert ("gpu", "cpu") in pairs
    every = lane_sets(lanes, quick=False)
    assert len(every) == len(set(every)) == 6 + 4 + 1 + 4
    assert [s[0] for s in every if "disk" in s] == ["gpu", "cpu", "h2d", "d2h"]
    assert lane_sets(["cpu"], quick=False) == lane_sets(["cpu", "disk"], quick=True) == []
    assert lane_sets(["cpu", "disk"], quick=False) == [("cpu", "disk")]


def test_tasks_are_named_as_their_series(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """With lanes that take round times, since how much real ones meet is not for a test."""
    each = dict.fromkeys(LANES, 10_000)
    monkeypatch.setattr(interference, "keep_busy", made_up(each, dict.fromkeys(LANES, 0.5)))
    found = tasks(bench, hidden=8, width=16)
    assert found[0].name == "interference/8x16/gpu+cpu"
    for task in found:
        made = task.run(bench)
        assert made.name == task.name
        assert (made.facts["hidden"], made.facts["width"]) == (8, 16)
        bench.device.free_all()
    device = Processor(1)
    assert tasks(Bench(device, LIMITS, True), 8, 16) == []
    (one,) = tasks(Bench(device, LIMITS, False), 8, 16)
    assert one.name == "interference/8x16/cpu+disk"
    device.close()


# The disk.


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs Linux")
def test_a_lane_reads_the_disk_beside_another(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert of 6 x 32 x 32 bytes is two pages: the reads go through the file in order."""
    monkeypatch.setattr(disk, "IN_MEMORY", ())
    monkeypatch.setattr(disk, "usual_folder", lambda: tmp_path)
    monkeypatch.setattr(disk, "file_bytes", lambda _: 4 * 8192)
    starts: list[int] = []
    read = os.preadv

    def watched(handle: int, buffers: Any, start: int) -> int:
        starts.append(start)
        return read(handle, buffers, start)

    made = made_up(dict.fromkeys(LANES, 10_000), dict.fromkeys(LANES, 0.5))

    def busy(own: Bench, jobs: Any, lanes: Any, counts: Any) -> list[list[Ticket]]:
        if lanes == ["disk"]:
            keep_busy(own, jobs, lanes, {"disk": 3})
        found: list[list[Ticket]] = made(own, jobs, lanes, counts)
        return found

    monkeypatch.setattr(os, "preadv", watched)
    monkeypatch.setattr(interference, "keep_busy", busy)
    found = series(bench, ("h2d", "disk"), 32, 32)
    assert found.name == "interference/32x32/h2d+disk"
    assert contention(found).slow == pytest.approx({"h2d": 0.5, "disk": 0.5}, rel=1e-3)
    assert (found.facts["read_bytes"], found.facts["file_bytes"]) == (8192, 4 * 8192)
    assert len(starts) >= 9
    assert starts == [8192 * (k % 4) for k in range(len(starts))]
    assert list(tmp_path.iterdir()) == []


def test_without_a_disk_only_the_sets_with_it_fail(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = dict.fromkeys(LANES, 10_000)
    monkeypatch.setattr(interference, "keep_busy", made_up(each, dict.fromkeys(LANES, 0.5)))
    monkeypatch.setattr(disk, "usual_folder", lambda: tmp_path / "nowhere")
    wanted = tasks(bench._replace(quick=False), 8, 16)
    found = run_tasks(wanted, bench, folder=tmp_path / "kept")
    failed = {outcome.task: outcome.error for outcome in found.outcomes if outcome.error}
    assert list(failed) == [f"interference/8x16/{lane}+disk" for lane in LANES[:4]]
    assert set(failed.values()) == {f"disk: {tmp_path / 'nowhere'} is no folder"}
    assert len(found.series) == 6 + 4 + 1
