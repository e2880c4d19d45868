"""Copies: what is copied, how often, through which buffers, and what is made of the times."""

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from moesim.calibrate.copies import (
    QUEUE,
    chunk_bytes,
    chunked_series,
    copy_once,
    copy_series,
    fit_channel,
    held_out,
    ladder,
    roundtrip_series,
    shortened,
    tasks,
    timed_copy,
)
from moesim.calibrate.memory import device_arena, host_arena
from moesim.calibrate.series import Bench, Point, Series
from moesim.calibrate.timing import Limits
from moesim.errors import CalibrationError
from moesim.real.devices import Processor
from moesim.real.emulated import Emulated, Throttle
from moesim.real.lanes import Lane, back_to_back

MIB = 1 << 20
LIMITS = Limits(warm_ups=1, least=3, most=3, seconds=1.0)
LATENCY_NS, RATE = 20_000, 10e9


class Clock:
    """Goes on by 50 ns at each reading, and by what is slept."""

    def __init__(self) -> None:
        self.now = 0

    def perf_counter_ns(self) -> int:
        self.now += 50
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Give an emulated device whose lanes tell the time by a clock that only they advance."""
    clock = Clock()
    monkeypatch.setattr("moesim.real.lanes.time", clock)
    monkeypatch.setattr("moesim.real.emulated.time", clock)
    monkeypatch.setattr("moesim.real.emulated.SPIN_NS", 0)
    device = Emulated(16 * MIB, Throttle(LATENCY_NS, RATE))
    yield Bench(device, LIMITS, True)
    device.close()


def series(*points: tuple[float, float], apart: tuple[float, ...] = (), **facts: Any) -> Series:
    made = tuple(
        Point(
            at=at, ns=ns, median_ns=ns, spread=0, repetitions=7, settled=True, outliers=0,
            held_out=at in apart,
        )
        for at, ns in points
    )  # fmt: skip
    return Series(name="copy/h2d/pinned/single", unit="bytes", points=made, facts=facts)


@pytest.mark.parametrize("lane", ["h2d", "d2h"])
@pytest.mark.parametrize("how", ["single", "queued"])
def test_a_throttled_link_is_fitted_as_what_it_is(bench: Bench, lane: str, how: str) -> None:
    """10 GB/s and 20 us, to 5 %, on a clock that does not depend on this machine."""
    found = copy_series(bench, lane, pinned=True, how=how)
    fitted = fit_channel(found)
    assert found.name == f"copy/{lane}/pinned/{how}"
    assert fitted.channel.bytes_per_s == pytest.approx(RATE, rel=0.05)
    assert fitted.channel.latency_ns == pytest.approx(LATENCY_NS, rel=0.05)
    assert fitted.fit.error < 0.05
    assert len(fitted.fit.held_out) == sum(p.held_out for p in found.points) > 0
    assert found.facts["queue"] == (QUEUE if how == "queued" else 1)


@pytest.mark.parametrize("lane", ["h2d", "d2h"])
def test_bytes_arrive_and_buffers_rotate(bench: Bench, lane: str) -> None:
    """Four buffers of 64 KiB on both sides; each is copied once before any is copied again."""
    import torch

    size = 1 << 16
    host, device = host_arena(bench, 4 * size), device_arena(bench, 4 * size)
    source, target = (host, device) if lane == "h2d" else (device, host)
    truth = torch.arange(4 * size) % 251
    source.copy_(truth)
    seen: list[tuple[int, int]] = []
    copy = bench.device.copy

    def watched(target: Any, source: Any) -> None:
        seen.append((target.data_ptr(), source.data_ptr()))
        copy(target, source)

    bench.device.copy = watched  # type: ignore[method-assign]
    once = copy_once(bench, lane, host, device, size, 1)
    for _ in range(4):
        once()
    assert (target == truth).all()
    assert len(set(seen)) == 4
    once()
    assert seen[4] == seen[0]


def test_a_queue_is_full_before_it_begins() -> None:
    """The lane, given time, does nothing until all is submitted, then all of it in order."""
    seen: list[int] = []
    early: list[int] = []
    with Lane("h2d") as lane:
        submit = lane.submit
        submit(lambda: None).wait()  # its thread imports torch first

        def slowly(work: Any) -> Any:
            ticket = submit(work)
            time.sleep(0.001)
            early.append(len(seen))
            return ticket

        lane.submit = slowly  # type: ignore[method-assign, assignment]
        tickets = back_to_back(lane, [lambda i=i: seen.append(i) for i in range(QUEUE)])  # type: ignore[misc]
    assert early == [0] * (1 + QUEUE)
    assert seen == list(range(QUEUE))
    assert all(ticket.done for ticket in tickets)


def test_a_lane_goes_on_if_submitting_fails() -> None:
    """Else the gate would block the lane, and whoever closes it, for ever."""

    class Failing:
        def __init__(self, lane: Lane) -> None:
            self.lane, self.calls = lane, 0

        def submit(self, work: Any) -> Any:
            self.calls += 1
            if self.calls > 1:
                raise KeyboardInterrupt
            return self.lane.submit(work)

    lane = Lane("h2d")
    with pytest.raises(KeyboardInterrupt):
        back_to_back(Failing(lane), [lambda: None])  # type: ignore[arg-type]
    closing = threading.Thread(target=lane.close)
    closing.start()
    closing.join(timeout=10)
    assert not closing.is_alive()


def test_a_copy_in_a_queue_takes_its_share(bench: Bench) -> None:
    """20 copies of 1 MiB at 20 us and 10 GB/s each."""
    host, device = host_arena(bench, 4 * MIB), device_arena(bench, 4 * MIB)
    one = copy_once(bench, "h2d", host, device, MIB, QUEUE)()
    assert one == pytest.approx(LATENCY_NS + MIB / RATE * 1e9, rel=0.01)


def test_chunks_pay_the_latency_each(bench: Bench) -> None:
    """4 MiB take 419 us and 20 us per chunk: 64 chunks, 8, and 1."""
    found = chunked_series(bench, "h2d")
    total = 4 * MIB
    assert found.facts["total_bytes"] == total
    assert [p.at for p in found.points] == [1 << 16, 1 << 19, total]
    for p in found.points:
        ns = total / p.at * LATENCY_NS + total / RATE * 1e9
        assert p.ns == pytest.approx(ns, rel=0.02)


def test_there_and_back_are_two_copies(bench: Bench) -> None:
    found = roundtrip_series(bench)
    for p in found.points:
        assert p.ns == pytest.approx(2 * (LATENCY_NS + p.at / RATE * 1e9), rel=0.02)


def test_sizes_are_spaced_by_factors_and_others_lie_between() -> None:
    assert ladder(4096, 1 << 15, quick=False) == [1 << 12, 1 << 13, 1 << 14, 1 << 15]
    assert ladder(4096, 1 << 17, quick=True) == [1 << 12, 1 << 15, 1 << 17]
    sizes = ladder(4096, 1 << 30, quick=False)
    apart = held_out(sizes)
    assert len(sizes) == 19
    assert len(apart) == 5
    assert set(apart).isdisjoint(sizes)
    assert held_out(sizes[:1]) == []


def test_the_smallest_chunk_within_five_percent_is_taken() -> None:
    found = series((1, 110.0), (2, 104.0), (4, 101.0), (8, 100.0))
    assert chunk_bytes(found) == 2
    with pytest.raises(CalibrationError, match="no points"):
        chunk_bytes(series())


def test_held_out_points_judge_and_are_not_fitted() -> None:
    """1,000 ns and 1 ns per byte; the point between says twice as much."""
    found = series((1e3, 2e3), (1e4, 11e3), (1e6, 1001e3), (1e5, 202e3), apart=(1e5,))
    fitted = fit_channel(found)
    assert fitted.channel.latency_ns == pytest.approx(1000, abs=5)
    assert fitted.channel.bytes_per_s == pytest.approx(1e9, rel=0.01)
    assert fitted.fit.error == pytest.approx(0.5, abs=0.01)


def test_what_is_no_channel_is_refused() -> None:
    with pytest.raises(CalibrationError, match="copy/h2d/pinned/single: a fit needs 2 different"):
        fit_channel(series((1e3, 2e3)))
    with pytest.raises(CalibrationError, match="is no rate; 1e-9 to"):
        fit_channel(series((1e3, 2e3), (1e6, 2e3)))


def test_long_copies_are_repeated_less_and_have_not_settled() -> None:
    limits = Limits(warm_ups=3, least=7, seconds=1.0)
    assert shortened(limits, 1e6) == limits
    few = shortened(limits, 1e9)
    assert (few.warm_ups, few.least) == (1, 3)
    timed = timed_copy(lambda: 10**9, limits, 1e9)
    assert (timed.repetitions, timed.settled) == (3, False)
    assert timed_copy(lambda: 10**9, limits, 0.0).settled


def test_copies_that_take_too_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 1 MB/s the largest would take seconds; the series says where it ends."""
    clock = Clock()
    monkeypatch.setattr("moesim.real.lanes.time", clock)
    monkeypatch.setattr("moesim.real.emulated.time", clock)
    monkeypatch.setattr("moesim.real.emulated.SPIN_NS", 0)
    device = Emulated(16 * MIB, Throttle(1000, 1e6))
    found = copy_series(Bench(device, LIMITS, True), "h2d", pinned=True, how="single")
    device.close()
    assert found.points[-1].at < 4 * MIB
    assert "take too long" in str(found.facts["left_out"])


def test_a_device_without_room_is_refused() -> None:
    device = Emulated(4096, Throttle(1000, 1e9))
    with pytest.raises(CalibrationError, match="memory of 4096 bytes is too little"):
        copy_series(Bench(device, LIMITS, True), "h2d", pinned=True, how="single")
    device.close()


def test_tasks_are_named_as_their_series(bench: Bench) -> None:
    named = tasks(bench)
    assert [task.name for task in named] == [
        "copy/h2d/pinned/single", "copy/h2d/pinned/queued", "copy/d2h/pinned/single",
        "copy/d2h/pinned/queued", "copy/h2d/pinned/chunked", "copy/roundtrip/pinned/single",
    ]  # fmt: skip
    for task in named:
        assert task.run(bench).name == task.name
        bench.device.free_all()


def test_pageable_memory_is_measured_where_it_is_something_of_its_own() -> None:
    lanes = {"h2d": None, "d2h": None}
    device: Any = SimpleNamespace(label="cuda", lanes=lanes, memory_bytes=1 << 30)
    names = {task.name for task in tasks(Bench(device, LIMITS, True))}
    assert {"copy/h2d/pageable/single", "copy/d2h/pageable/queued"} <= names


def test_without_a_device_there_is_nothing_to_copy() -> None:
    device = Processor(1)
    assert tasks(Bench(device, LIMITS, True)) == []
    device.close()
