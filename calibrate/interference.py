"""How far lanes slow down while others are busy: what each of them measured alone gets wrong.

Every set of lanes works together for a while, each lane on operations of real sizes: experts on
`gpu` and `cpu`, copies of one expert on `h2d` and `d2h`, reads past the page cache on `disk`. Of
those only operations count that lie wholly inside the time in which all lanes of the set were busy.
Before and after, each lane works alone, and the mean of the two is what it is compared with, so
that a drift of the machine cancels. A factor is the mean time alone over the mean time together:
with more busy lanes than cores most operations run as ever, and a few stand still for long.

Series are named `interference/<hidden>x<width>/<lanes>`, the lanes joined by `+`.
"""

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import msgspec
import numpy as np

from moesim.calibrate import disk
from moesim.calibrate.memory import (
    LEAST_ARENA_BYTES,
    PAGE_BYTES,
    arena_bytes,
    cache_bytes,
    device_arena,
    host_arena,
)
from moesim.calibrate.series import Bench, Point, Series, Task, point
from moesim.calibrate.timing import Limits, summary
from moesim.errors import CalibrationError
from moesim.profile import Contention
from moesim.real.lanes import Ticket, Work, overlap_ns
from moesim.real.operations import expert
from moesim.types import LANES, FloatArray

ROUNDS = 4
QUICK_ROUNDS = 2
LEAST_INSIDE = 3
"""Operations of each lane that must lie inside the time in which all were busy."""
LEAST_OVERLAP = 0.8
"""Share of that time in which any two lanes must have been at work at once. Between two operations
a lane thread needs a moment; a lower share means that a lane stood still."""
ALONE_AROUND = 1.5
"""Work is queued for so many times the time that is asked for, so that no lane ends early."""
TOKENS = 4
"""That an expert computes: few, as in decode, so that it is memory that lanes compete for."""
CHUNK_BYTES = 1 << 20
"""That copies are made of."""
READ_BYTES = 4 << 20
"""Of one read, unless an expert is smaller: a larger one is many of these in a row."""

Jobs = Mapping[str, Callable[[], Work]]
"""By lane, what gives its next operation."""


class Slowed(NamedTuple):
    """What working together did to one lane."""

    factor: float
    """Alone over together, the median of the rounds; above 0 and at most 1."""
    raw: float
    """The same before it was clipped to 1."""
    spread: float
    """How far the rounds' factors lie apart, relative to the median."""


def together(phase: Sequence[Sequence[Ticket]]) -> tuple[int, int]:
    """Return from when to when all lanes were busy; raise CalibrationError if they never were."""
    if not all(phase):
        raise CalibrationError("interference: a lane did nothing")
    start = max(tickets[0].start_ns for tickets in phase)
    end = min(tickets[-1].end_ns for tickets in phase)
    if end <= start:
        names = "+".join(tickets[0].lane for tickets in phase)
        raise CalibrationError(f"interference: lanes {names} were never busy at once")
    return start, end


def inside(tickets: Sequence[Ticket], start_ns: int, end_ns: int) -> list[int]:
    """Return the times in ns of the operations that lie wholly inside a stretch of time."""
    found = [t.ns for t in tickets if start_ns <= t.start_ns and t.end_ns <= end_ns]
    if len(found) < LEAST_INSIDE:
        raise CalibrationError(
            f"interference: lane {tickets[0].lane} did {len(found)} operations while all were "
            f"busy; at least {LEAST_INSIDE} are needed"
        )
    return found


def overlap_share(phase: Sequence[Sequence[Ticket]], start_ns: int, end_ns: int) -> float:
    """Return the least share of a stretch of time in which two of the lanes were busy at once."""
    cut = [
        [clipped(t, start_ns, end_ns) for t in tickets if t.end_ns > start_ns] for tickets in phase
    ]
    return min(
        overlap_ns(one, other) / (end_ns - start_ns)
        for one, other in itertools.combinations(cut, 2)
    )


def clipped(ticket: Ticket, start_ns: int, end_ns: int) -> Ticket:
    """Return what of an operation lies inside a stretch of time."""
    part = Ticket(ticket.lane)
    part.start_ns = min(max(ticket.start_ns, start_ns), end_ns)
    part.end_ns = min(max(ticket.end_ns, start_ns), end_ns)
    return part


def slowed(before: Sequence[float], between: Sequence[float], after: Sequence[float]) -> Slowed:
    """Return the factor of a lane from its times per operation, one of each per round.

    `before` and `after` are alone, `between` is together.
    """
    alone = (np.asarray(before, np.float64) + np.asarray(after, np.float64)) / 2
    factors: FloatArray = alone / np.asarray(between, np.float64)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise CalibrationError("interference: operations must take more than 0 ns")
    raw = float(np.median(factors))
    return Slowed(min(1.0, raw), raw, float((factors.max() - factors.min()) / raw))


def keep_busy(
    bench: Bench, jobs: Jobs, lanes: Sequence[str], counts: Mapping[str, int]
) -> list[list[Ticket]]:
    """Do so many operations on each of these lanes, all beginning together."""
    go = threading.Event()
    works = {lane: [jobs[lane]() for _ in range(counts[lane])] for lane in lanes}
    for lane in lanes:
        bench.device.lanes[lane].submit(go.wait)
    try:
        phase = [[bench.device.lanes[lane].submit(work) for work in works[lane]] for lane in lanes]
    finally:
        go.set()
    # The last ones first: a thread that woke up after each operation would disturb the lanes.
    for tickets in phase:
        tickets[-1].wait()
    return [[ticket.wait() for ticket in tickets] for tickets in phase]


def count_for(ns: float, seconds: float) -> int:
    """Return how many operations of so many ns fill the time, within reason."""
    return int(min(100_000, max(LEAST_INSIDE, seconds * 1e9 / max(1.0, ns))))


def measure_set(
    bench: Bench, jobs: Jobs, lanes: Sequence[str], name: str, seconds: float
) -> Series:
    """Return what these lanes do to each other, `seconds` being the time for one phase.

    It is longer where operations take so long that too few of them would lie inside.

    One point per lane, `at` being its index in `types.LANES`: its operations together with the
    others. Facts hold, by lane, the time alone (`alone_ns/cpu`), `factor/cpu` and so on.

    Raises CalibrationError where the lanes cannot be shown to have worked at once.
    """
    rounds = QUICK_ROUNDS if bench.quick else ROUNDS
    warm = {lane: keep_busy(bench, jobs, [lane], {lane: LEAST_INSIDE}) for lane in lanes}
    paces = {lane: float(np.median([t.ns for t in warm[lane][0]])) for lane in lanes}
    alone: dict[str, list[float]] = {lane: [] for lane in lanes}
    mixed: dict[str, list[int]] = {lane: [] for lane in lanes}
    means: dict[str, list[float]] = {lane: [] for lane in lanes}
    shares = []

    def each_alone() -> None:
        for lane in lanes:
            counts = {lane: count_for(paces[lane], seconds / 2)}
            tickets = keep_busy(bench, jobs, [lane], counts)[0]
            alone[lane].append(float(np.mean([t.ns for t in tickets])))
            paces[lane] = alone[lane][-1]

    each_alone()
    for _ in range(rounds):
        # Three times what is needed: the slowest may be slowed down most, and its first one begins
        # before the others.
        longest = max(seconds * ALONE_AROUND, 3 * LEAST_INSIDE * max(paces.values()) / 1e9)
        counts = {lane: count_for(paces[lane], longest) for lane in lanes}
        phase = keep_busy(bench, jobs, lanes, counts)
        start, end = together(phase)
        shares.append(overlap_share(phase, start, end))
        if shares[-1] < LEAST_OVERLAP:
            raise CalibrationError(
                f"interference: lanes {'+'.join(lanes)} were busy at once in {shares[-1]:.2f} of "
                f"the time; at least {LEAST_OVERLAP} is legal"
            )
        for lane, tickets in zip(lanes, phase, strict=True):
            times = inside(tickets, start, end)
            mixed[lane] += times
            means[lane].append(float(np.mean(times)))
        each_alone()
    found = {lane: slowed(alone[lane][:-1], means[lane], alone[lane][1:]) for lane in lanes}
    return set_series(name, lanes, found, alone, mixed, shares, bench.limits)


def set_series(
    name: str, lanes: Sequence[str], found: Mapping[str, Slowed],
    alone: Mapping[str, Sequence[float]], mixed: Mapping[str, Sequence[int]],
    shares: Sequence[float], limits: Limits,
) -> Series:  # fmt: skip
    """Return a set's measurements as a series."""
    facts: dict[str, float | str] = {"overlap_share": min(shares), "rounds": len(shares)}
    points: list[Point] = []
    for lane in lanes:
        slow = found[lane]
        facts[f"factor/{lane}"] = slow.factor
        facts[f"spread/{lane}"] = slow.spread
        facts[f"alone_ns/{lane}"] = float(np.median(alone[lane]))
        if slow.raw > 1:
            facts[f"clipped/{lane}"] = f"{slow.raw:.4f} was measured; 1 is the most that is legal"
        points.append(point(LANES.index(lane), summary(np.array(mixed[lane], np.float64), limits)))
    return Series(name=name, unit="lane", points=tuple(points), facts=facts)


def contention(series: Series) -> Contention:
    """Return a series of this module as an entry of a profile.

    Raises CalibrationError if it is none.
    """
    lanes = [lane for lane in LANES if f"factor/{lane}" in series.facts]
    if len(lanes) < 2:
        raise CalibrationError(f"{series.name}: no factors of at least two lanes")
    slow: dict[Any, float] = {}
    for lane in lanes:
        factor = series.facts[f"factor/{lane}"]
        if isinstance(factor, str) or not 0 < factor <= 1:
            raise CalibrationError(
                f"{series.name}: factor/{lane} is {factor}; above 0 and at most 1 is legal"
            )
        slow[lane] = factor
    busy: Any = tuple(lanes)
    return Contention(busy=busy, slow=slow)


# What keeps lanes busy.


def expert_job(arena: Any, rows: Any, hidden: int, width: int) -> Callable[[], Work]:
    """Return what gives the next expert of those whose weights lie in an arena of bytes."""
    import torch

    params = 3 * hidden * width
    weights = arena.view(torch.bfloat16)
    experts = itertools.cycle(range(len(weights) // params))

    def parts(start: int) -> list[Any]:
        own = weights[start : start + params]
        gate_up, down = own.split([2 * hidden * width, hidden * width])
        return [gate_up.view(2 * width, hidden), down.view(hidden, width)]

    return lambda: partial(expert, rows, *parts(next(experts) * params))


def copy_job(
    bench: Bench, lane: str, host: Any, device: Any, size_bytes: int
) -> Callable[[], Work]:
    """Return what gives the next copy of one expert's bytes over a lane, from slot to slot.

    It consists of chunks, as that of a background queue does: each of them wakes the lane, which
    takes processor and Python from the others.
    """
    of_host = itertools.cycle(range(len(host) // size_bytes))
    of_device = itertools.cycle(range(len(device) // size_bytes))

    def following() -> Work:
        here, there = next(of_host) * size_bytes, next(of_device) * size_bytes
        on_host, on_device = host[here : here + size_bytes], device[there : there + size_bytes]
        pair = (on_device, on_host) if lane == "h2d" else (on_host, on_device)
        chunks = zip(*(end.split(CHUNK_BYTES) for end in pair), strict=True)
        return lambda: [partial(bench.device.copy, *chunk) for chunk in chunks]

    return following


def real_jobs(bench: Bench, lanes: Sequence[str], hidden: int, width: int) -> Jobs:
    """Return work of a model's sizes for each of these lanes but `disk`.

    Experts and copies rotate through memory larger than the caches, and no two lanes write to the
    same place.

    Raises CalibrationError if the device's memory does not hold four experts.
    """
    import torch

    size = 6 * hidden * width
    jobs: dict[str, Callable[[], Work]] = {}
    if "cpu" in lanes:
        whole = max(1, arena_bytes(bench, size, on_device=False) // size) * size
        rows = torch.ones(TOKENS, hidden, dtype=torch.bfloat16)
        jobs["cpu"] = expert_job(weights_like(host_arena(bench, whole)), rows, hidden, width)
    wanted = -(-max(2 * cache_bytes(), LEAST_ARENA_BYTES) // size)
    slots = min(wanted, bench.device.memory_bytes // 4 // size)
    if slots < 1 and not {"gpu", "h2d", "d2h"}.isdisjoint(lanes):
        raise CalibrationError(
            f"interference: {bench.device.memory_bytes} bytes of device memory are too little "
            f"for experts of {size}; {4 * size} are needed"
        )
    if "gpu" in lanes:
        weights = bench.device.empty(slots * size, dtype=torch.uint8)
        rows = bench.device.empty(TOKENS, hidden, dtype=torch.bfloat16)
        bench.device.lanes["gpu"].submit(lambda: (weights_like(weights), rows.fill_(1))).wait()
        jobs["gpu"] = expert_job(weights, rows, hidden, width)
    for lane in ("h2d", "d2h"):
        if lane in lanes:
            host = host_arena(bench, slots * size)
            device = device_arena(bench, slots * size)
            jobs[lane] = copy_job(bench, lane, host, device, size)
    return jobs


def weights_like(arena: Any) -> Any:
    """Fill bytes with small weights: neither zeros nor denormal numbers, which take other times."""
    import torch

    arena.view(torch.bfloat16).fill_(0.01)
    return arena


def lane_sets(lanes: Sequence[str], *, quick: bool) -> list[tuple[str, ...]]:
    """Return every pair of lanes, and all larger sets without `disk`.

    If it is to be quick, only the pairs without it.
    """
    known = [lane for lane in LANES if lane in lanes and lane != "disk"]
    most = min(2, len(known)) if quick else len(known)
    sets = [s for n in range(2, most + 1) for s in itertools.combinations(known, n)]
    with_disk = [(lane, "disk") for lane in known if "disk" in lanes and not quick]
    return [*sets, *with_disk]


def series(bench: Bench, lanes: Sequence[str], hidden: int, width: int) -> Series:
    """Return what these lanes do to each other at work on experts of a shape.

    Raises CalibrationError as `measure_set` and `real_jobs` do, and where a disk cannot be read.
    """
    jobs = dict(real_jobs(bench, lanes, hidden, width))
    facts: dict[str, float | str] = {"hidden": hidden, "width": width, "tokens": TOKENS}
    facts["chunk_bytes"] = CHUNK_BYTES
    name = series_name(lanes, hidden, width)
    with ExitStack() as stack:
        if "disk" in lanes:
            folder = disk.usual_folder()
            file = stack.enter_context(disk.temporary_file(folder, disk.file_bytes(bench)))
            size = min(READ_BYTES, -(-6 * hidden * width // PAGE_BYTES) * PAGE_BYTES)
            jobs["disk"] = disk.read_job(file, size)
            facts |= {"read_bytes": size, **disk.described(file, folder)}
        found = measure_set(bench, jobs, lanes, name, bench.limits.seconds)
    return msgspec.structs.replace(found, facts={**facts, **found.facts})


def series_name(lanes: Sequence[str], hidden: int, width: int) -> str:
    """Return the name of a series."""
    return f"interference/{hidden}x{width}/{'+'.join(lanes)}"


def tasks(bench: Bench, hidden: int, width: int) -> list[Task]:
    """Return what is to be measured on this device, for experts of a shape."""
    rounds = QUICK_ROUNDS if bench.quick else ROUNDS
    return [
        Task(
            series_name(lanes, hidden, width),
            bench.limits.seconds * ((rounds + 1) * len(lanes) / 2 + 2 * rounds)
            + ("disk" in lanes) * disk.write_seconds(bench),
            partial(series, lanes=lanes, hidden=hidden, width=width),
        )
        for lanes in lane_sets(list(bench.device.lanes), quick=bench.quick)
    ]
