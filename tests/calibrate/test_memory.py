"""Streams through memory: what is read, from where, with how many threads."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from moesim.calibrate import memory
from moesim.calibrate.memory import (
    ROUNDS,
    arena_bytes,
    device_series,
    fastest,
    host_series,
    read_rate,
    rotating,
    stream,
    tasks,
    thread_counts,
)
from moesim.calibrate.series import Bench, Point, Series
from moesim.calibrate.timing import Limits, measure
from moesim.errors import CalibrationError
from moesim.real.devices import Processor
from moesim.real.emulated import Emulated, Throttle
from moesim.real.lanes import Lane, Ticket

MIB = 1 << 20
LIMITS = Limits(warm_ups=0, least=2, most=2, seconds=0.1)


@pytest.fixture
def bench() -> Iterator[Bench]:
    device = Emulated(16 * MIB, Throttle(1000, 1e9), cpu_threads=2)
    yield Bench(device, LIMITS, False)
    device.close()


def test_buffers_rotate_and_are_aligned() -> None:
    """Of 1,000 bytes three stretches of 300 can be had that begin at multiples of 64."""
    arena = torch.zeros(1000, dtype=torch.uint8)
    starts = [b.storage_offset() for b in islice(rotating(arena, 300), 5)]
    assert starts == [0, 320, 640, 0, 320]
    assert next(rotating(arena, 1000)).shape == (1000,)
    with pytest.raises(CalibrationError, match="1001 bytes do not fit into memory of 1000"):
        rotating(arena, 1001)


class Noting(Lane):
    """A lane whose operations are done at once, take 200,000 ns per sum, and note these."""

    def __init__(self) -> None:
        self.name = "gpu"
        self.sums: list[list[float]] = []

    def submit(self, work: Any, after: Any = (), queue: int = 0) -> Ticket:
        own: list[float] = []
        total = torch.Tensor.sum

        def noted(values: torch.Tensor) -> torch.Tensor:
            own.append(float(total(values)))
            return total(values)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "sum", noted)
            work()
        self.sums.append(own)
        ticket = Ticket(self.name)
        ticket.end_ns = 200_000 * len(own)
        ticket._over.set()
        return ticket


def test_a_stream_reads_every_byte_of_the_next_stretches() -> None:
    """Sums of 16 values each: 0+...+15, 16+...+31, and again.

    Two trials of one say 200 us, so that two are a ticket: half a millisecond would be 2.5.
    """
    arena = torch.arange(32, dtype=torch.float32).view(torch.uint8)
    lane = Noting()
    once = stream(lane, arena, 64)
    assert [once(), once()] == [200_000, 200_000]
    assert lane.sums == [[120.0], [376.0], [120.0, 376.0], [120.0, 376.0]]


def test_caches_of_the_same_level_are_counted_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of two cores have 32 MiB each, of which two groups and half of a third may be used.

    A core's own are 1 MiB, and those of instructions do not count.
    """
    for cpu in range(8):
        group = f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}"
        for index, told in enumerate(
            (
                ("1", "Data", "48K", str(cpu)),
                ("1", "Instruction", "64M", str(cpu)),
                ("2", "Unified", "1024K", str(cpu)),
                ("3", "Unified", "32M", group),
            )
        ):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, text in zip(("level", "type", "size", "shared_cpu_list"), told, strict=True):
                (folder / name).write_text(f"{text}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 5}, raising=False)
    assert memory.cache_bytes(tmp_path) == 96 * MIB
    assert memory.cache_bytes(tmp_path / "none") == 0


def test_threads_go_up_to_those_of_the_lane() -> None:
    assert thread_counts(6, quick=False) == [1, 2, 4, 6]
    assert thread_counts(8, quick=True) == [1, 8]
    assert thread_counts(1, quick=False) == [1]


def test_the_lane_has_its_threads_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number of threads is really used, and the lane's own comes back."""
    monkeypatch.setattr(memory, "LEAST_ARENA_BYTES", MIB)
    monkeypatch.setattr(memory, "cache_bytes", lambda: 0)
    monkeypatch.setattr(memory, "SIZES", (1 << 16, 1 << 18))
    seen: list[int] = []

    def watched(once: object, limits: Limits) -> object:
        bench.device.lanes["cpu"].submit(lambda: seen.append(torch.get_num_threads())).wait()
        return measure(once, limits)  # type: ignore[arg-type]

    monkeypatch.setattr(memory, "measure", watched)
    found = host_series(bench)
    bench.device.lanes["cpu"].submit(lambda: seen.append(torch.get_num_threads())).wait()
    assert seen == [1, 2] * ROUNDS + [2]
    assert [p.at for p in found.points] == [1, 2]
    assert found.facts["bytes"] == 1 << 18


def test_device_memory_is_read_by_sizes(bench: Bench) -> None:
    """Half of 16 MiB is the arena, of which two stretches must fit: 1 and 4 MiB."""
    found = device_series(bench)
    assert [p.at for p in found.points] == [MIB, 4 * MIB]
    assert found.facts["arena_bytes"] == 8 * MIB


def test_a_device_without_room_is_refused() -> None:
    device = Emulated(3 * MIB, Throttle(1000, 1e9))
    with pytest.raises(CalibrationError, match=r"3145728 bytes is too little .* 4194304 is the"):
        device_series(Bench(device, LIMITS, True))
    device.close()


def test_an_arena_is_larger_than_the_caches_where_there_is_room(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 32)
    monkeypatch.setattr(memory, "cache_bytes", lambda: 100 * MIB)
    assert arena_bytes(bench, MIB, on_device=False) == 200 * MIB
    assert arena_bytes(bench, 150 * MIB, on_device=False) == 300 * MIB
    assert arena_bytes(bench, MIB, on_device=True) == 8 * MIB
    monkeypatch.setattr(memory, "available_bytes", lambda: 8 * MIB)
    assert arena_bytes(bench, MIB, on_device=False) == 2 * MIB


def test_the_fastest_of_all_rounds_counts() -> None:
    made = [
        Point(at=at, ns=ns, median_ns=ns, spread=0, repetitions=1, settled=True, outliers=0)
        for at, ns in ((1, 50), (2, 30), (1, 40), (2, 60))
    ]
    assert [(p.at, p.ns) for p in fastest(made)] == [(1, 40), (2, 30)]


def test_the_rate_is_the_highest() -> None:
    def made(unit: str, *points: tuple[float, float]) -> Series:
        rows = tuple(
            Point(
                at=at, ns=ns, median_ns=ns, spread=0, repetitions=1, settled=True, outliers=0
            )
            for at, ns in points
        )  # fmt: skip
        return Series(name="memory/x/read", unit=unit, points=rows, facts={"bytes": 8000})

    assert read_rate(made("bytes", (1000, 200), (4000, 400))) == pytest.approx(10e9)
    assert read_rate(made("threads", (1, 2000), (2, 1000))) == pytest.approx(8e9)
    with pytest.raises(CalibrationError, match="no points"):
        read_rate(made("bytes"))


def test_a_processor_alone_has_the_host_memory_only(bench: Bench) -> None:
    device = Processor(1)
    assert [t.name for t in tasks(Bench(device, LIMITS, True))] == ["memory/host/read"]
    device.close()
    assert [t.name for t in tasks(bench)] == ["memory/host/read", "memory/device/read"]
