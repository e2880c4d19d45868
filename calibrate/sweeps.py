"""Time an operation of a lane over tokens or contexts, on weights that no cache holds.

An expert's weights were last read many experts ago: its copies here rotate through more memory than
the largest cache has. Operations that are short are queued, as a run has them, each behind a read
of other memory: those before it have left little of what it needs in the caches. Its time counts
from the end of that, since taking up the next operation takes a lane its time, too.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from moesim.calibrate.copies import shortened
from moesim.calibrate.memory import arena_bytes, cache_bytes
from moesim.calibrate.series import Bench, Point, Series, point
from moesim.calibrate.timing import MOST_CALLS, Limits, Timed, calls_for, measure
from moesim.errors import CalibrationError
from moesim.profile import Provenance
from moesim.real.lanes import Lane, back_to_back

LONGEST = 1.0
"""What a single call may take, in units of the time for a point; a longer one ends a series."""
PASSES = 2
"""Sizes are gone through so often; see `sweep`."""
SHORT_NS = 5_000_000
"""Operations that take less are queued, `FEWEST` at least; beside others it is nothing."""
FEWEST = 3
OTHER_BYTES = 16 << 20
"""What is read before an operation: about an expert."""
NOISE = 1 << 20
"""Random numbers that are drawn; larger tensors repeat them."""

Call = Callable[[int], object]
"""An operation on the k-th of the copies of its weights, k counting on for ever."""


class Size(NamedTuple):
    """A point to be measured."""

    at: int
    held_out: bool = False


class Copies(NamedTuple):
    """The same weights several times, and what is to be known of them."""

    sets: tuple[Any, ...]
    facts: dict[str, float | str]

    def __call__(self, k: int) -> Any:
        """Return the k-th, beginning anew behind the last."""
        return self.sets[k % len(self.sets)]


def lane_of(bench: Bench, name: str) -> Lane:
    """Return a lane; raise CalibrationError if the device has none of this name."""
    if name not in bench.device.lanes:
        there = ", ".join(bench.device.lanes)
        raise CalibrationError(f"device {bench.device.label} has no lane {name!r}, only: {there}")
    return bench.device.lanes[name]


def grid(fitted: Sequence[int], apart: Sequence[int]) -> tuple[Size, ...]:
    """Return points in ascending order, those `apart` held out."""
    return tuple(sorted([*map(Size, fitted), *(Size(at, True) for at in apart)]))


def noise(*shape: int, dtype: Any, scale: float = 1.0) -> Any:
    """Return a tensor in host memory of normal numbers, the same ones each time."""
    import torch

    count = 1
    for side in shape:
        count *= side
    drawn = torch.randn(min(count, NOISE), generator=torch.Generator().manual_seed(count)) * scale
    times = -(-count // len(drawn))
    return drawn.to(dtype).repeat(times)[:count].view(shape)


def leaves(value: Any) -> list[Any]:
    """Return the tensors of nested tuples."""
    if isinstance(value, tuple):
        return [leaf for part in value for leaf in leaves(part)]
    return [value] if hasattr(value, "element_size") else []


def set_bytes(value: Any) -> int:
    """Return how much memory the tensors of nested tuples take."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(value))


def placed(bench: Bench, lane: str, value: Any) -> Any:
    """Return the same nested tuples, every tensor copied to where the lane computes.

    That is device memory for lane `gpu`, plain host memory for `cpu`.
    """
    if isinstance(value, tuple):
        parts = [placed(bench, lane, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if not hasattr(value, "element_size"):
        return value
    if lane == "gpu":
        target = bench.device.empty(*value.shape, dtype=value.dtype)
    else:
        target = bench.device.host(*value.shape, dtype=value.dtype, pinned=False)
    lane_of(bench, lane).submit(lambda: target.copy_(value)).wait()
    return target


def room_bytes(bench: Bench, lane: str, size_bytes: int, beside: int = 0) -> int:
    """Return how much memory copies of so many bytes may rotate through: see `arena_bytes`.

    `beside` bytes are taken already; together it is no more than three quarters of the device's.
    """
    room = arena_bytes(bench, size_bytes, on_device=lane == "gpu")
    if lane == "gpu":
        room = min(room, 3 * bench.device.memory_bytes // 4 - beside)
    return max(0, room)


def copies(bench: Bench, lane: str, value: Any, beside: int = 0) -> Copies:
    """Return enough copies to rotate through more memory than caches have, or as many as fit.

    Raises CalibrationError if there is no room for one; `beside` is that of `room_bytes`.
    """
    size = set_bytes(value)
    if not size:
        return Copies((value,), {})
    room = room_bytes(bench, lane, size, beside)
    count = room // size
    if count < 1:
        raise CalibrationError(
            f"tensors of {size} bytes do not fit into the {room} that lane {lane} has for them"
        )
    sets = tuple(placed(bench, lane, value) for _ in range(count))
    facts: dict[str, float | str] = {
        "weight_bytes": size,
        "buffers": count,
        "buffer_bytes": count * size,
        "cache_bytes": cache_bytes() or "not told",
    }
    return Copies(sets, facts)


def sweep_seconds(bench: Bench, sizes: int) -> float:
    """Return about how long so many sizes take, if their times do not agree before."""
    return PASSES * bench.limits.seconds * sizes


def sweep(
    bench: Bench,
    lane: str,
    sizes: Sequence[Size],
    prepare: Callable[[int], Call],
    longest: float = LONGEST,
) -> tuple[tuple[Point, ...], dict[str, float | str]]:
    """Return the times by size, and facts; sizes ascend, and each is prepared on its own.

    Sizes are gone through twice: what else the machine does for a while disturbs one pass, whose
    own repetitions agree with each other, and not the other.

    When one call takes longer than `longest` allows, this size and larger ones are left out, which
    a fact says. The first size is measured in any case, once.
    """
    import torch

    queue = lane_of(bench, lane)
    turn = itertools.count()
    longest_ns = longest * 1e9 * bench.limits.seconds
    facts: dict[str, float | str] = {
        "device": bench.device.label,
        "threads": queue.threads,
        "in_a_row": f"1 to {MOST_CALLS}",
    }

    room = bench.device.memory_bytes // 16 if lane == "gpu" else OTHER_BYTES
    other = placed(bench, lane, noise(min(OTHER_BYTES, room) // 4, dtype=torch.float32))

    def timed(call: Call, calls: int) -> int:
        if calls == 1:
            return max(1, queue.submit(partial(call, next(turn))).wait().ns)
        works = [work for _ in range(calls) for work in (other.sum, partial(call, next(turn)))]
        tickets = back_to_back(queue, works)
        taken = (b.end_ns - a.end_ns for a, b in zip(tickets[::2], tickets[1::2], strict=True))
        return max(1, sum(taken) // calls)

    first: list[tuple[Size, Callable[[], int], Limits, Timed]] = []
    points: list[Point] = []
    for size in sizes:
        call = prepare(size.at)
        # The first call of a size may have something to set up, or a kernel to load.
        trial_ns = min(timed(call, 1), timed(call, 1))
        if trial_ns > longest_ns:
            facts["stopped"] = (
                f"at {size.at}, where one call takes {trial_ns / 1e9:.3g} s,"
                f" more than {longest_ns / 1e9:.3g}"
            )
            if first:
                break
        calls = max(FEWEST, calls_for(trial_ns)) if trial_ns < SHORT_NS else 1
        limits = shortened(bench.limits, trial_ns)
        once = partial(timed, call, calls)
        found = measure(once, limits)
        if "stopped" in facts:
            points.append(point(size.at, found, held_out=size.held_out))
            break
        first.append((size, once, limits, found))
    for size, again, limits, found in first:
        both = merged(found, measure(again, limits), bench.limits)
        points.append(point(size.at, both, held_out=size.held_out))
    return tuple(points), facts


def merged(one: Timed, other: Timed, limits: Limits) -> Timed:
    """Return two measurements of the same as one: the lower time, and a spread that spans both."""
    ns = min(one.ns, other.ns)
    median_ns = one.median_ns if one.ns <= other.ns else other.median_ns
    spread = max(one.median_ns, other.median_ns) / ns - 1
    return Timed(
        ns=ns,
        median_ns=median_ns,
        spread=spread,
        repetitions=one.repetitions + other.repetitions,
        settled=one.repetitions + other.repetitions >= limits.least and spread <= limits.spread,
        outliers=one.outliers + other.outliers,
    )


def provenance(
    series: Sequence[Series], note: str, date: str, versions: Mapping[str, str]
) -> Provenance:
    """Return where a table comes from: the fewest repetitions and the largest spread of all points.

    The note also says on what device, with how many threads, and how many points did not settle.
    """
    points = [point for one in series for point in one.points]
    loose = sum(not point.settled for point in points)
    facts = series[0].facts
    where = f"device {facts.get('device', '?')}, {facts.get('threads', '?')} threads"
    return Provenance(
        source="measured",
        note=f"{note}; {where}; {loose} of {len(points)} points did not settle",
        date=date,
        script="moesim calibrate",
        versions=dict(versions),
        repetitions=min(point.repetitions for point in points),
        spread_pct=round(100 * max(point.spread for point in points), 2),
    )
