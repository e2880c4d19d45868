"""How fast memory is read: the host's by the lane `cpu`, the device's by the lane `gpu`.

A long stream is summed up, from a stretch of memory that is larger than the caches. These rates are
what other measurements are held against (`plausible`).
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from moesim.calibrate.series import Bench, Point, Series, Task, point
from moesim.calibrate.timing import calls_for, measure
from moesim.errors import CalibrationError
from moesim.real.devices import available_bytes
from moesim.real.lanes import Lane

LEAST_ARENA_BYTES = 128 << 20
"""What buffers rotate through at least, where there is room: more than most caches hold."""
LINE_BYTES = 64
"""Buffers begin at multiples of it."""
PAGE_BYTES = 4096
ROUNDS = 3
"""Each point is measured so often, the others in between, and the fastest counts: what all else is
held against must not come from one bad moment."""
SIZES = (1 << 20, 4 << 20, 16 << 20, 64 << 20)


@cache
def cache_bytes(cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """Return the size of all caches of the level that holds most, of the cores that may be used.

    There are several of the last level where cores come in groups or sockets, and the threads of a
    lane fill all of them. 0 where the system does not tell.
    """
    if not hasattr(os, "sched_getaffinity"):
        return 0
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found: dict[str, dict[str, int]] = {}
    threads = os.sched_getaffinity(0)
    for folder in (own for cpu in threads for own in cpus.glob(f"cpu{cpu}/cache/index*")):
        try:
            level, kind, size, shared = (
                (folder / name).read_text(encoding="ascii").strip()
                for name in ("level", "type", "size", "shared_cpu_list")
            )
        except OSError:
            continue
        if kind != "Instruction" and size[:-1].isdigit() and size[-1] in units:
            found.setdefault(level, {})[shared] = int(size[:-1]) * units[size[-1]]
    return max((sum(level.values()) for level in found.values()), default=0)


def arena_bytes(bench: Bench, largest: int, *, on_device: bool) -> int:
    """Return how much memory buffers of at most `largest` bytes rotate through.

    At least two of them and twice the largest cache, but no more than half of the device's memory,
    and a quarter of what is free on the host.
    """
    room = available_bytes() // 4
    if on_device:
        room = min(room, bench.device.memory_bytes // 2)
    wanted = max(2 * largest, 2 * cache_bytes(), LEAST_ARENA_BYTES)
    return min(wanted, room) // PAGE_BYTES * PAGE_BYTES


def host_arena(bench: Bench, size_bytes: int, *, pinned: bool = True) -> Any:
    """Return host memory in which every page has been written to.

    Pages that nobody wrote to are all the same one, which every cache holds.
    """
    import torch

    arena = bench.device.host(size_bytes, dtype=torch.uint8, pinned=pinned)
    arena.fill_(1)
    return arena


def device_arena(bench: Bench, size_bytes: int) -> Any:
    """Return device memory in which every page has been written to; `free_all` gives it back."""
    import torch

    arena = bench.device.empty(size_bytes, dtype=torch.uint8)
    bench.device.lanes["gpu"].submit(lambda: arena.fill_(1)).wait()
    return arena


def rotating(arena: Any, size_bytes: int) -> Iterator[Any]:
    """Give one stretch of the arena after the other, for ever; none twice before all others.

    Raises CalibrationError if the arena is smaller than one.
    """
    if not 0 < size_bytes <= len(arena):
        raise CalibrationError(
            f"buffers of {size_bytes} bytes do not fit into memory of {len(arena)} bytes"
        )
    step = -(-size_bytes // LINE_BYTES) * LINE_BYTES
    starts = range(0, len(arena) - size_bytes + 1, step)
    return (arena[start : start + size_bytes] for start in itertools.cycle(starts))


def stream(lane: Lane, arena: Any, size_bytes: int) -> Callable[[], int]:
    """Return an operation that reads so many bytes on a lane, and how long it took in ns.

    A device reads 64 MiB in less time than it takes to begin; as many such stretches as `calls_for`
    says are one ticket, and their mean is what one takes.
    """
    import torch

    buffers = rotating(arena, size_bytes)

    def timed(calls: int) -> int:
        parts = [next(buffers).view(torch.float32) for _ in range(calls)]

        def work() -> None:
            for part in parts:
                part.sum()

        return max(1, lane.submit(work).wait().ns // calls)

    calls = calls_for(min(timed(1), timed(1)))
    return lambda: timed(calls)


def thread_counts(most: int, *, quick: bool) -> list[int]:
    """Return 1, 2, 4 and so on up to `most`, which is among them; quick: the ends only."""
    counts = {1, most}
    if not quick:
        counts |= {1 << k for k in range(most.bit_length()) if 1 << k <= most}
    return sorted(counts)


def host_series(bench: Bench) -> Series:
    """Return how long the lane `cpu` takes to read a stretch of host memory, by threads."""
    import torch

    lane = bench.device.lanes["cpu"]
    most = lane.threads
    whole = arena_bytes(bench, SIZES[-1], on_device=False)
    size = min(SIZES[-1], whole // 2)
    arena = host_arena(bench, whole, pinned=False)
    once = stream(lane, arena, size)
    counts = thread_counts(most, quick=bench.quick)
    found: list[Point] = []
    try:
        for threads in counts * ROUNDS:
            lane.submit(partial(torch.set_num_threads, threads)).wait()
            found.append(point(threads, measure(once, bench.limits)))
    finally:
        lane.submit(lambda: torch.set_num_threads(most)).wait()
    return Series(
        name="memory/host/read",
        unit="threads",
        points=fastest(found),
        facts={
            "bytes": size,
            "arena_bytes": whole,
            "cache_bytes": cache_bytes(),
            "kernel": "sum",
            "rounds": ROUNDS,
        },
    )


def fastest(found: Sequence[Point]) -> tuple[Point, ...]:
    """Return the fastest of the points that are at the same place."""
    places = sorted({p.at for p in found})
    return tuple(min((p for p in found if p.at == at), key=lambda p: p.ns) for at in places)


def device_series(bench: Bench) -> Series:
    """Return how long the lane `gpu` takes to read device memory, by bytes.

    Raises CalibrationError for a device without room for two of the smallest stretches.
    """
    lane = bench.device.lanes["gpu"]
    whole = arena_bytes(bench, SIZES[-1], on_device=True)
    sizes = [size for size in SIZES if size <= whole // 2]
    if not sizes:
        raise CalibrationError(
            f"memory of {bench.device.memory_bytes} bytes is too little to be read in stretches; "
            f"{4 * SIZES[0]} is the least"
        )
    arena = device_arena(bench, whole)
    found = [
        point(size, measure(stream(lane, arena, size), bench.limits)) for size in sizes * ROUNDS
    ]
    return Series(
        name="memory/device/read",
        unit="bytes",
        points=fastest(found),
        facts={
            "arena_bytes": whole,
            "threads": lane.threads,
            "kernel": "sum",
            "rounds": ROUNDS,
        },
    )


def read_rate(series: Series) -> float:
    """Return the highest rate of a series above in bytes/s.

    Raises CalibrationError for a series without points.
    """
    if not series.points:
        raise CalibrationError(f"{series.name} has no points")
    if series.unit == "bytes":
        return max(p.at / p.ns for p in series.points) * 1e9
    size = series.facts["bytes"]
    assert isinstance(size, int | float)
    return max(size / p.ns for p in series.points) * 1e9


def tasks(bench: Bench) -> list[Task]:
    """Return what is to be measured on this device."""
    seconds = bench.limits.seconds
    found = []
    if "cpu" in bench.device.lanes:
        counts = thread_counts(bench.device.lanes["cpu"].threads, quick=bench.quick)
        found.append(Task("memory/host/read", ROUNDS * seconds * len(counts), host_series))
    if "gpu" in bench.device.lanes:
        found.append(Task("memory/device/read", ROUNDS * seconds * len(SIZES), device_series))
    return found


def is_virtual() -> bool:
    """Return whether this processor says that it is a virtual machine's."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return os.name == "posix" and " hypervisor" in text
