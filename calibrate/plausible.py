"""What cannot be true: rates beyond what the machine's own memory or a stated link allows.

Nothing moves more bytes than memory gives. A measurement that says so has timed something else: a
cache, a kernel that had not ended, a copy that was not made. Operations are held to nothing, since
no system tells its processor's peak.
"""

from moesim.calibrate.series import Series
from moesim.errors import CalibrationError

MEMORY_TOLERANCE = 0.25
"""Against a measured memory bandwidth. That is itself a low quartile, taken with one kernel at one
moment; on a machine that others use two runs of it differ by about a fifth. What a cache feigns is
a factor of two and more."""
THROTTLE_TOLERANCE = 0.001
"""Against a link's stated throttle, which is kept by the same clock that measures it."""


def hold(what: str, value: float, limit: float, unit: str, why: str, tolerance: float) -> None:
    """Raise CalibrationError if a value lies above its limit by more than the tolerance."""
    if not 0 < value <= limit * (1 + tolerance):
        raise CalibrationError(
            f"{what}: {value:.4g} {unit} cannot be true; {why} is {limit:.4g} {unit} "
            f"(tolerance {tolerance:g})"
        )


def hold_bytes(
    what: str, size_bytes: float, ns: float, limit_bytes_per_s: float, why: str,
    tolerance: float = MEMORY_TOLERANCE,
) -> None:  # fmt: skip
    """Raise CalibrationError if so many bytes were moved faster than the limit."""
    hold(what, per_second(what, size_bytes, ns), limit_bytes_per_s, "bytes/s", why, tolerance)


def per_second(what: str, amount: float, ns: float) -> float:
    """Return a rate; raise CalibrationError for times that are none."""
    if not 0 < ns < float("inf"):
        raise CalibrationError(f"{what}: {ns} ns cannot be true; above 0 is")
    return amount / ns * 1e9


def hold_copies(series: Series, memory_bytes_per_s: float) -> None:
    """Raise CalibrationError if a copy was faster than memory is read."""
    for point in series.points:
        size = moved_bytes(series, point.at)
        what = f"{series.name} at {point.at:.0f} bytes"
        hold_bytes(what, size, point.ns, memory_bytes_per_s, "the rate at which memory is read")


def hold_throttle(series: Series, latency_ns: float, bytes_per_s: float) -> None:
    """Raise CalibrationError if an emulated link was faster than what it is throttled to.

    In a queue, and in chunks, each copy pays the latency; there and back are two copies.
    """
    for point in series.points:
        size = moved_bytes(series, point.at)
        copies = size / point.at
        least_ns = copies * latency_ns + size / bytes_per_s * 1e9
        if point.ns < least_ns * (1 - THROTTLE_TOLERANCE):
            raise CalibrationError(
                f"{series.name} at {point.at:.0f} bytes: {point.ns:.4g} ns cannot be true; the "
                f"link is throttled to {least_ns:.4g} ns (tolerance {THROTTLE_TOLERANCE:g})"
            )


def moved_bytes(series: Series, at: float) -> float:
    """Return how many bytes one measurement of a series of copies moves."""
    total = series.facts.get("total_bytes")
    if isinstance(total, int | float):
        return float(total) // at * at
    return 2 * at if "/roundtrip/" in series.name else at


def hold_weights(
    what: str, weight_bytes: float, ns: float, memory_bytes_per_s: float, *, rotating_bytes: float,
    cache_bytes: float,
) -> None:  # fmt: skip
    """Raise CalibrationError if something was computed faster than its weights are read.

    Where the buffers that rotate fit into the caches nothing is known, and nothing is held: the
    weights may have come from there.
    """
    if rotating_bytes > cache_bytes:
        why = "the rate at which memory is read"
        hold_bytes(what, weight_bytes, ns, memory_bytes_per_s, why)


def hold_disk(series: Series, memory_bytes_per_s: float) -> None:
    """Raise CalibrationError if a disk was read faster than memory is: it was not the disk."""
    for point in series.points:
        what = f"{series.name} at {point.at:.0f} bytes"
        why = "the rate at which memory is read"
        hold_bytes(what, point.at, point.ns, memory_bytes_per_s, why)
