"""How far lanes slow down while others are busy: what each of them measured alone gets wrong.

Every set of lanes works together for a while, each lane on operations of real sizes: experts on
`gpu` and `cpu`, copies of one expert on `h2d` and `d2h`. Of those only operations count that lie
wholly inside the time in which all lanes of the set were busy. Before and after, each lane works
alone for as long, and the mean of the two is what it is compared with, so that a drift of the
machine cancels. A factor is the time alone over the time together.
"""

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from moesim.calibrate.memory import (
    LEAST_ARENA_BYTES,
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
HIDDEN, WIDTH = 2048, 768
"""An expert of Qwen3-30B-A3B, unless another shape is given."""

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
    return int(min(100_000, max(3 * LEAST_INSIDE, seconds * 1e9 / max(1.0, ns))))


def measure_set(bench: Bench, jobs: Jobs, lanes: Sequence[str], seconds: float) -> Series:
    """Return what these lanes do to each other, `seconds` being the time for one phase.

    One point per lane, `at` being its index in `types.LANES`: its operations together with the
    others. Facts hold, by lane, the time alone (`alone_ns/cpu`), `factor/cpu` and so on.

    Raises CalibrationError where the lanes cannot be shown to have worked at once.
    """
    rounds = QUICK_ROUNDS if bench.quick else ROUNDS
    name = "+".join(lanes)
    warm = {lane: keep_busy(bench, jobs, [lane], {lane: LEAST_INSIDE}) for lane in lanes}
    paces = {lane: float(np.median([t.ns for t in warm[lane][0]])) for lane in lanes}
    alone: dict[str, list[float]] = {lane: [] for lane in lanes}
    mixed: dict[str, list[int]] = {lane: [] for lane in lanes}
    medians: dict[str, list[float]] = {lane: [] for lane in lanes}
    shares = []

    def each_alone() -> None:
        for lane in lanes:
            counts = {lane: count_for(paces[lane], seconds / 2)}
            tickets = keep_busy(bench, jobs, [lane], counts)[0]
            alone[lane].append(float(np.median([t.ns for t in tickets])))
            paces[lane] = alone[lane][-1]

    each_alone()
    for _ in range(rounds):
        counts = {lane: count_for(paces[lane], seconds * ALONE_AROUND) for lane in lanes}
        phase = keep_busy(bench, jobs, lanes, counts)
        start, end = together(phase)
        shares.append(overlap_share(phase, start, end))
        if shares[-1] < LEAST_OVERLAP:
            raise CalibrationError(
                f"interference: lanes {name} were busy at once in {shares[-1]:.2f} of the time; "
                f"at least {LEAST_OVERLAP} is legal"
            )
        for lane, tickets in zip(lanes, phase, strict=True):
            times = inside(tickets, start, end)
            mixed[lane] += times
            medians[lane].append(float(np.median(times)))
        each_alone()
    found = {lane: slowed(alone[lane][:-1], medians[lane], alone[lane][1:]) for lane in lanes}
    return set_series(lanes, found, alone, mixed, shares, bench.limits)


def set_series(
    lanes: Sequence[str], found: Mapping[str, Slowed], alone: Mapping[str, Sequence[float]],
    mixed: Mapping[str, Sequence[int]], shares: Sequence[float], limits: Limits,
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
    return Series(
        name="interference/" + "+".join(lanes), unit="lane", points=tuple(points), facts=facts
    )


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


def expert(x: Any, up: Any, gate: Any, down: Any) -> Any:
    """Compute a gated FFN: (tokens, hidden) in and out."""
    import torch

    return torch.nn.functional.silu(x @ gate.T) * (x @ up.T) @ down.T


def expert_job(arena: Any, x: Any, hidden: int, width: int) -> Callable[[], Work]:
    """Return what gives the next expert of those whose weights lie in an arena of bytes."""
    import torch

    params = 3 * hidden * width
    weights = arena.view(torch.bfloat16)
    experts = itertools.cycle(range(len(weights) // params))

    def parts(start: int) -> list[Any]:
        up, gate, down = weights[start : start + params].split(hidden * width)
        return [up.view(width, hidden), gate.view(width, hidden), down.view(hidden, width)]

    return lambda: partial(expert, x, *parts(next(experts) * params))


def copy_job(
    bench: Bench, lane: str, host: Any, device: Any, size_bytes: int
) -> Callable[[], Work]:
    """Return what gives the next copy of one expert's bytes over a lane, from slot to slot."""
    of_host = itertools.cycle(range(len(host) // size_bytes))
    of_device = itertools.cycle(range(len(device) // size_bytes))

    def following() -> Work:
        here, there = next(of_host) * size_bytes, next(of_device) * size_bytes
        on_host, on_device = host[here : here + size_bytes], device[there : there + size_bytes]
        pair = (on_device, on_host) if lane == "h2d" else (on_host, on_device)
        return partial(bench.device.copy, *pair)

    return following


def real_jobs(bench: Bench, hidden: int = HIDDEN, width: int = WIDTH, tokens: int = 4) -> Jobs:
    """Return work of a model's sizes for each lane that the device has.

    Experts and copies rotate through memory larger than the caches, and no two lanes write to the
    same place.

    Raises CalibrationError if the device's memory does not hold three pairs of experts.
    """
    import torch

    lanes, size = bench.device.lanes, 6 * hidden * width
    jobs: dict[str, Callable[[], Work]] = {}
    if "cpu" in lanes:
        wanted = arena_bytes(bench, size, on_device=False)
        whole = max(2, wanted // size) * size
        x = torch.ones(tokens, hidden, dtype=torch.bfloat16)
        jobs["cpu"] = expert_job(weights_like(host_arena(bench, whole)), x, hidden, width)
    if "gpu" in lanes:
        each = max(2 * cache_bytes(), LEAST_ARENA_BYTES) // size
        slots = min(max(2, each), bench.device.memory_bytes // 4 // size)
        if slots < 2:
            raise CalibrationError(
                f"interference: {bench.device.memory_bytes} bytes of device memory are too little "
                f"for experts of {size}; {8 * size} are needed"
            )
        weights = bench.device.empty(slots * size, dtype=torch.uint8)
        x = bench.device.empty(tokens, hidden, dtype=torch.bfloat16)
        lanes["gpu"].submit(lambda: (weights_like(weights), x.fill_(1))).wait()
        jobs["gpu"] = expert_job(weights, x, hidden, width)
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
    """Return every pair of lanes, and all larger sets too unless it is to be quick."""
    known = [lane for lane in LANES if lane in lanes and lane != "disk"]
    most = min(2, len(known)) if quick else len(known)
    return [s for n in range(2, most + 1) for s in itertools.combinations(known, n)]


def tasks(bench: Bench, hidden: int = HIDDEN, width: int = WIDTH) -> list[Task]:
    """Return what is to be measured on this device, for experts of a shape."""

    def run(bench: Bench, lanes: tuple[str, ...]) -> Series:
        jobs = real_jobs(bench, hidden, width)
        return measure_set(bench, jobs, lanes, bench.limits.seconds)

    rounds = QUICK_ROUNDS if bench.quick else ROUNDS
    return [
        Task(
            "interference/" + "+".join(lanes),
            bench.limits.seconds * ((rounds + 1) * len(lanes) / 2 + 2 * rounds),
            partial(run, lanes=lanes),
        )
        for lanes in lane_sets(list(bench.device.lanes), quick=bench.quick)
    ]
