"""What cannot be true is refused by name, value and limit; what can be is not."""

from typing import Any

import pytest

from moesim.calibrate.plausible import (
    MEMORY_TOLERANCE,
    hold_bytes,
    hold_copies,
    hold_disk,
    hold_throttle,
    hold_weights,
)
from moesim.calibrate.series import Point, Series
from moesim.errors import CalibrationError


def series(name: str, *points: tuple[float, float], **facts: Any) -> Series:
    made = tuple(
        Point(at=at, ns=ns, median_ns=ns, spread=0, repetitions=7, settled=True, outliers=0)
        for at, ns in points
    )
    return Series(name=name, unit="bytes", points=made, facts=facts)


def test_bytes_up_to_the_limit_and_its_tolerance() -> None:
    """1,000 bytes at 1 byte per ns; 800 ns are 25 % faster."""
    assert MEMORY_TOLERANCE == 0.25
    for ns in (2000, 1000, 801):
        hold_bytes("a copy", 1000, ns, 1e9, "memory")
    with pytest.raises(CalibrationError) as caught:
        hold_bytes("a copy", 1000, 799, 1e9, "memory")
    assert str(caught.value) == (
        "a copy: 1.252e+09 bytes/s cannot be true; memory is 1e+09 bytes/s (tolerance 0.25)"
    )


@pytest.mark.parametrize("ns", [0, -1, float("nan"), float("inf")])
def test_times_that_are_none(ns: float) -> None:
    with pytest.raises(CalibrationError, match="above 0 is"):
        hold_bytes("x", 1, ns, 1e9, "memory")


def test_rates_that_are_none() -> None:
    for bytes_moved in (0, float("nan")):
        with pytest.raises(CalibrationError, match="cannot be true"):
            hold_bytes("x", bytes_moved, 1, 1e9, "memory")


def test_a_copy_is_not_faster_than_memory() -> None:
    """The second point says 2 bytes per ns."""
    good = series("copy/h2d/pinned/single", (1000, 1000), (4000, 3600))
    hold_copies(good, 1e9)
    with pytest.raises(CalibrationError, match=r"copy/h2d/pinned/single at 4000 bytes: 2e\+09"):
        hold_copies(series("copy/h2d/pinned/single", (1000, 1000), (4000, 2000)), 1e9)


def test_there_and_back_and_chunks_move_more_than_one_size() -> None:
    hold_copies(series("copy/roundtrip/pinned/single", (1000, 2000)), 1e9)
    with pytest.raises(CalibrationError, match="roundtrip"):
        hold_copies(series("copy/roundtrip/pinned/single", (1000, 1000)), 1e9)
    hold_copies(series("copy/h2d/pinned/chunked", (100, 1000), total_bytes=1000), 1e9)
    with pytest.raises(CalibrationError, match="chunked at 100 bytes"):
        hold_copies(series("copy/h2d/pinned/chunked", (100, 500), total_bytes=1000), 1e9)


@pytest.mark.parametrize(
    ("name", "at", "least_ns", "facts"),
    [
        ("copy/h2d/pinned/single", 1000, 1100, {}),
        ("copy/h2d/pinned/queued", 1000, 1100, {"queue": 20}),
        ("copy/roundtrip/pinned/single", 1000, 2200, {}),
        ("copy/h2d/pinned/chunked", 100, 2000, {"total_bytes": 1000}),
        ("copy/h2d/pinned/chunked", 300, 1200, {"total_bytes": 1000}),
    ],
)
def test_a_throttle_is_held_to_a_thousandth(
    name: str, at: float, least_ns: float, facts: dict[str, float]
) -> None:
    """100 ns per copy and 1 ns per byte; three chunks of 300 are 900 bytes."""
    for ns in (least_ns, 2 * least_ns, least_ns * 0.9995):
        hold_throttle(series(name, (at, ns), **facts), 100, 1e9)
    with pytest.raises(CalibrationError, match=f"{name} at .* is throttled to"):
        hold_throttle(series(name, (at, least_ns * 0.998), **facts), 100, 1e9)


def test_an_expert_is_not_faster_than_its_weights_are_read() -> None:
    fast: Any = ("expert/cpu/2048x768/16 at 1 token", 9.4e6, 1e5, 16e9)
    with pytest.raises(CalibrationError, match=r"expert/cpu/2048x768/16 at 1 token: 9\.4e\+10"):
        hold_weights(*fast, rotating_bytes=128e6, cache_bytes=32e6)
    hold_weights(*fast, rotating_bytes=9.4e6, cache_bytes=32e6)  # they may lie in the cache
    hold_weights("slow", 9.4e6, 6e5, 16e9, rotating_bytes=128e6, cache_bytes=32e6)


def test_a_disk_is_not_faster_than_memory() -> None:
    hold_disk(series("disk/read", (1 << 20, 500_000)), 10e9)
    with pytest.raises(CalibrationError, match="disk/read at 1048576 bytes"):
        hold_disk(series("disk/read", (1 << 20, 50_000)), 10e9)
