"""Copies between host and device memory: alone, in a queue, in chunks, and there and back.

Series are named `copy/<lane>/<pinned|pageable>/<single|queued|chunked>` and
`copy/roundtrip/pinned/single`. Buffers rotate through memory that is larger than the caches, as far
as there is room. Sizes between the others are held out: they judge the fit.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from moesim.calibrate.fit import Fit, fit_line
from moesim.calibrate.memory import arena_bytes, device_arena, host_arena, rotating
from moesim.calibrate.series import Bench, Point, Series, Task, point, tabled
from moesim.calibrate.timing import Limits, Timed, measure
from moesim.errors import CalibrationError
from moesim.profile import Channel
from moesim.real.lanes import Work, back_to_back

SMALLEST_BYTES = 4096
LARGEST_BYTES = {"single": 1 << 30, "queued": 64 << 20, "chunked": 64 << 20}
QUICK_BYTES = {"single": 64 << 20, "queued": 4 << 20, "chunked": 16 << 20}
QUEUE = 20
"""Copies in a queue, at least."""
FEW = 3
"""Repetitions of a copy that takes a good part of the time limit, after one for warming up."""
CHUNK_LOSS = 0.05
"""Chunks are small enough to be overtaken at, and cost at most this share of the whole."""


class FittedChannel(NamedTuple):
    """A channel of a profile, and how well it describes the copies."""

    channel: Channel
    """Interpolated if the fit misses, and lines between its points do not miss as far."""
    fit: Fit
    error: float
    """The largest relative error at a point held out, of what is used."""


def ladder(smallest: int, largest: int, *, quick: bool) -> list[int]:
    """Return sizes, each twice the one before (quick: eight times), within the limits."""
    step = 3 if quick else 1
    sizes = [smallest << k for k in range(0, 64, step) if smallest << k <= largest]
    return sizes if sizes and sizes[-1] == largest else [*sizes, largest]


def held_out(sizes: Sequence[int]) -> list[int]:
    """Return sizes that lie between the others: up to five, spread over all of them."""
    between = [3 * low // 2 for low, high in itertools.pairwise(sizes) if high > low]
    return between[:: max(1, len(between) // 5)][:5]


def copy_once(
    bench: Bench, lane: str, host: Any, device: Any, size_bytes: int, queue: int
) -> Callable[[], int]:
    """Return an operation that makes `queue` copies and gives the ns of one.

    One alone takes what its ticket says; in a queue, the time from the first start to the last end
    is divided by their number.
    """
    pairs = zip(rotating(device, size_bytes), rotating(host, size_bytes), strict=True)
    queue_of = bench.device.lanes[lane]

    def copy() -> Work:
        on_device, on_host = next(pairs)
        if lane == "h2d":
            return partial(bench.device.copy, on_device, on_host)
        return partial(bench.device.copy, on_host, on_device)

    def once() -> int:
        if queue == 1:
            return queue_of.submit(copy()).wait().ns
        tickets = back_to_back(queue_of, [copy() for _ in range(queue)])
        return max(1, (tickets[-1].end_ns - tickets[0].start_ns) // queue)

    return once


def shortened(limits: Limits, expected_ns: float) -> Limits:
    """Return limits with fewer repetitions where all of them would take far too long."""
    if expected_ns * (limits.warm_ups + limits.least) <= 2e9 * limits.seconds:
        return limits
    return limits._replace(warm_ups=1, least=min(limits.least, FEW))


def timed_copy(once: Callable[[], int], limits: Limits, expected_ns: float) -> Timed:
    """Measure a copy; one with fewer repetitions than the limits ask for has not settled."""
    timed = measure(once, shortened(limits, expected_ns))
    return timed._replace(settled=timed.settled and timed.repetitions >= limits.least)


def largest_bytes(bench: Bench, how: str) -> int:
    """Return the largest copy that there is room for: a power of two, 4 KiB at least."""
    wanted = (QUICK_BYTES if bench.quick else LARGEST_BYTES)[how]
    room = arena_bytes(bench, wanted, on_device=True) // 2
    if room < SMALLEST_BYTES:
        raise CalibrationError(
            f"memory of {bench.device.memory_bytes} bytes is too little to measure copies; "
            f"{4 * SMALLEST_BYTES} is the least"
        )
    return min(wanted, 1 << room.bit_length() - 1)


def copy_series(bench: Bench, lane: str, *, pinned: bool, how: str) -> Series:
    """Return the times of copies by bytes; `how` is `single` or `queued`."""
    largest = largest_bytes(bench, how)
    whole = arena_bytes(bench, largest, on_device=True)
    host, device = host_arena(bench, whole, pinned=pinned), device_arena(bench, whole)
    queue = 1 if how == "single" else QUEUE
    sizes = ladder(SMALLEST_BYTES, largest, quick=bench.quick)
    apart = set(held_out(sizes))
    points: list[Point] = []
    facts: dict[str, float | str] = {"queue": queue, "arena_bytes": whole}
    for size in sorted({*sizes, *apart}):
        expected_ns = points[-1].ns * size / points[-1].at * queue if points else 0.0
        if len(points) >= 3 and expected_ns > 2e9 * bench.limits.seconds:
            facts["left_out"] = f"{size} bytes and more take too long"
            break
        once = copy_once(bench, lane, host, device, size, queue)
        timed = timed_copy(once, bench.limits, expected_ns)
        points.append(point(size, timed, held_out=size in apart))
    name = f"copy/{lane}/{'pinned' if pinned else 'pageable'}/{how}"
    return Series(name=name, unit="bytes", points=tuple(points), facts=facts)


def chunked_series(bench: Bench, lane: str) -> Series:
    """Return how long one large copy takes in chunks queued back to back, by bytes of a chunk."""
    total = largest_bytes(bench, "chunked")
    whole = arena_bytes(bench, total, on_device=True)
    host, device = host_arena(bench, whole), device_arena(bench, whole)
    points: list[Point] = []
    for size in ladder(min(total, 64 << 10), total, quick=bench.quick):
        count = total // size
        once = copy_once(bench, lane, host, device, size, count)
        of_all = (lambda one=once, n=count: one() * n) if count > 1 else once
        expected_ns = points[-1].ns if points else 0.0
        points.append(point(size, timed_copy(of_all, bench.limits, expected_ns)))
    facts: dict[str, float | str] = {"total_bytes": total, "arena_bytes": whole}
    return Series(
        name=f"copy/{lane}/pinned/chunked", unit="bytes", points=tuple(points), facts=facts
    )


def roundtrip_series(bench: Bench) -> Series:
    """Return how long activations of a few tokens take to the host and back, by bytes.

    From the start of the copy to the host until the end of the copy back, which waits for it.
    """
    sizes = ladder(SMALLEST_BYTES, 256 * SMALLEST_BYTES, quick=bench.quick)
    whole = arena_bytes(bench, sizes[-1], on_device=True)
    host, device = host_arena(bench, whole), device_arena(bench, whole)
    lanes, copy = bench.device.lanes, bench.device.copy
    points = []
    for size in sizes:
        pairs = zip(rotating(device, size), rotating(host, size), strict=True)

        def once(pairs: Any = pairs) -> int:
            on_device, on_host = next(pairs)
            send = lanes["d2h"].submit(partial(copy, on_host, on_device))
            back = lanes["h2d"].submit(partial(copy, on_device, on_host), after=[send]).wait()
            return back.end_ns - send.wait().start_ns

        points.append(point(size, measure(once, bench.limits)))
    return Series(
        name="copy/roundtrip/pinned/single", unit="bytes", points=tuple(points),
        facts={"arena_bytes": whole},
    )  # fmt: skip


def fit_channel(series: Series) -> FittedChannel:
    """Fit latency and rate to copies; points held out judge them.

    Raises CalibrationError for too few points, or if larger copies take no longer.
    """
    own = [p for p in series.points if not p.held_out]
    apart = [p for p in series.points if p.held_out]
    try:
        fit = fit_line(
            np.array([p.at for p in own]),
            np.array([p.ns for p in own]),
            (np.array([p.at for p in apart]), np.array([p.ns for p in apart])) if apart else None,
        )
    except CalibrationError as problem:
        raise CalibrationError(f"{series.name}: {problem}") from None
    latency_ns, ns_per_byte = map(float, fit.parameters)
    if not 1e-9 <= ns_per_byte <= 1e6:
        raise CalibrationError(
            f"{series.name}: {ns_per_byte:g} ns per byte is no rate; 1e-9 to 1e+6 are legal"
        )
    points, error = tabled(series)
    better = fit.misses and error is not None and error < fit.error
    channel = Channel(
        latency_ns=round(latency_ns), bytes_per_s=1e9 / ns_per_byte, points=points,
        interpolated=better,
    )  # fmt: skip
    return FittedChannel(channel, fit, error if better and error is not None else fit.error)


def chunk_bytes(series: Series) -> int:
    """Return the smallest chunk that costs at most `CHUNK_LOSS` more than one copy of the whole.

    Raises CalibrationError for a series without points.
    """
    if not series.points:
        raise CalibrationError(f"{series.name} has no points")
    whole = max(series.points, key=lambda p: p.at)
    return int(min(p.at for p in series.points if p.ns <= (1 + CHUNK_LOSS) * whole.ns))


def tasks(bench: Bench) -> list[Task]:
    """Return what is to be measured on this device; nothing where there is no link.

    Pageable memory is measured where it is something of its own.
    """
    found: list[Task] = []
    directions = [lane for lane in ("h2d", "d2h") if lane in bench.device.lanes]
    for lane in directions:
        for pinned in (True, False) if bench.device.label == "cuda" else (True,):
            for how in ("single", "queued"):
                sizes = ladder(SMALLEST_BYTES, largest_bytes(bench, how), quick=bench.quick)
                found.append(
                    Task(
                        f"copy/{lane}/{'pinned' if pinned else 'pageable'}/{how}",
                        bench.limits.seconds * (len(sizes) + len(held_out(sizes))),
                        partial(copy_series, lane=lane, pinned=pinned, how=how),
                    )
                )
    if "h2d" in directions:
        chunked = partial(chunked_series, lane="h2d")
        found.append(Task("copy/h2d/pinned/chunked", 5 * bench.limits.seconds, chunked))
    if len(directions) == 2:
        seconds = 5 * bench.limits.seconds
        found.append(Task("copy/roundtrip/pinned/single", seconds, roundtrip_series))
    return found
