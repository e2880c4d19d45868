"""A machine that is known exactly, as a calibration would find it: series without any measuring."""

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from moesim.calibrate.attention import described, series_name
from moesim.calibrate.series import Bench, Point, Series, Task
from moesim.calibrate.timing import Limits
from moesim.real.lanes import Lane

HIDDEN, WIDTH, EXPERTS, TOP_K = 512, 256, 16, 2
"""Of the model of tests/cli/conftest.py."""
LAUNCH_NS = 10_000
GPU_BYTES_PER_NS, GPU_FLOPS_PER_NS = 100.0, 1_000.0
CPU_BYTES_PER_NS, CPU_FLOPS_PER_NS = 20.0, 100.0
LINK_NS, LINK_BYTES_PER_NS = 20_000, 2.0
TOTAL_BYTES = 16 << 20
"""Of what is copied in chunks."""
DISK_NS, DISK_BYTES_PER_NS = 100_000, 1.0


class Fake:
    """A device on which nothing is ever done; its one lane is there for its threads."""

    def __init__(self, label: str = "emulated") -> None:
        self.label = label
        self.name = "abacus"
        self.memory_bytes = 0 if label == "cpu" else 1 << 30
        self.lanes = {"cpu": Lane("cpu", 3)}
        self.freed = self.closed = 0

    def empty(self, *shape: int, dtype: Any) -> Any:
        raise NotImplementedError

    def host(self, *shape: int, dtype: Any, pinned: bool = True) -> Any:
        raise NotImplementedError

    def copy(self, target: Any, source: Any) -> None:
        raise NotImplementedError

    def free(self, tensor: Any) -> None:
        raise NotImplementedError

    taken_bytes = 0

    def free_all(self, but: int = 0) -> None:
        self.freed += 1

    def close(self) -> None:
        self.closed += 1
        for lane in self.lanes.values():
            lane.close()


def fake_bench(label: str = "emulated", quick: bool = False) -> Bench:
    return Bench(Fake(label), Limits(), quick)


def made(
    name: str,
    unit: str,
    ns: Callable[[float], float],
    at: Iterable[float],
    apart: Iterable[float] = (),
    **facts: float | str,
) -> Series:
    """Return a series of a function's values; those `apart` are held out."""
    fitted, held = list(at), list(apart)
    points = tuple(
        Point(
            at=x,
            ns=ns(x),
            median_ns=1.01 * ns(x),
            spread=0.01,
            repetitions=7,
            settled=True,
            outliers=0,
            held_out=x in held,
        )
        for x in sorted([*fitted, *held])
    )
    return Series(name=name, unit=unit, points=points, facts=facts)


TOKENS = [1.0, 4.0, 16.0, 64.0, 256.0, 1024.0]
SIZES = [4096.0 * 8**k for k in range(6)]


def expert_ns(lane: str, width: int) -> Callable[[float], float]:
    """Return three launches, or a hand-over of 5 us, and a roofline."""
    fixed, rate, flops = (
        (3 * LAUNCH_NS, GPU_BYTES_PER_NS, GPU_FLOPS_PER_NS)
        if lane == "gpu"
        else (5_000, CPU_BYTES_PER_NS, CPU_FLOPS_PER_NS)
    )
    return lambda n: (
        fixed
        + max(
            6 * HIDDEN * width / rate,
            n * 6 * HIDDEN * width / flops,
        )
    )


def expert(lane: str, width: int = WIDTH, bits: int = 16) -> Series:
    return made(
        f"expert/{lane}/{HIDDEN}x{width}/{bits}",
        "tokens",
        expert_ns(lane, width),
        TOKENS,
        [32.0, 512.0],
        hidden=HIDDEN,
        width=width,
        precision="bf16",
        dtype="bfloat16",
        weight_bytes=6 * HIDDEN * width,
        buffer_bytes=1 << 30,
        cache_bytes=1 << 20,
        device="emulated",
        threads=1,
    )


def copies(lane: str, how: str) -> Series:
    """Return copies of latency and rate; one alone waits for twice the latency."""
    latency_ns = LINK_NS if how == "queued" else 2 * LINK_NS
    return made(
        f"copy/{lane}/pinned/{how}",
        "bytes",
        lambda size: latency_ns + size / LINK_BYTES_PER_NS,
        SIZES,
        [6 * 4096.0],
    )


def set_of(*lanes: str) -> Series:
    """Return lanes that slow each other down to 0.8."""
    name = f"interference/{HIDDEN}x{WIDTH}/{'+'.join(lanes)}"
    own = made(name, "lane", lambda _: 1e6, range(len(lanes)))
    facts: dict[str, float | str] = {f"factor/{lane}": 0.8 for lane in lanes}
    facts |= {f"spread/{lane}": 0.02 for lane in lanes}
    return msgspec.structs.replace(own, facts=facts)


def host() -> list[Series]:
    """Return 1 us for each layer, 5 for each launch, 4 for each wait, 5 and 7 for decisions."""
    return [
        made("host/sync/short", "in a row", lambda _: 4_000, [1.0]),
        made("host/walk", "submissions", lambda n: 1_000 + 5_000 * n, [3.0, 13.0, 20.0], [10.0]),
        made("host/decision/lru", "sequences", lambda _: 5_000, [1.0]),
        made("host/decision/dali", "sequences", lambda _: 7_000, [1.0]),
    ]


def attention() -> list[Series]:
    """Return 50 us and 100 ns per new token; 0.5 and 2 ns per token attended to."""

    def one(phase: str, tokens: int, rate: float) -> Series:
        shape = (HIDDEN, 4, 4, 64)
        own = made(
            series_name(phase, shape, tokens),
            "attended",
            lambda at: 50_000 + 100 * tokens + rate * at,
            [tokens * 1e3, tokens * 1e4],
            [tokens * 5e3],
        )
        return msgspec.structs.replace(own, facts=described(phase, shape, tokens))

    prefills = [one("prefill", tokens, 0.5) for tokens in (64, 256)]
    return prefills + [one("decode", tokens, 2.0) for tokens in (1, 8)]


def machine() -> list[Series]:
    """Return everything that a calibration measures."""
    return [
        made("memory/host/read", "threads", lambda n: 1e6 / n, [1.0, 2.0], bytes=2e7),
        made("memory/device/read", "bytes", lambda size: size / 150, [1e6, 1e7]),
        expert("gpu"),
        expert("cpu"),
        made(f"combine/gpu/{HIDDEN}x{TOP_K}", "tokens", lambda n: LAUNCH_NS + 0.1 * n, TOKENS),
        made(
            f"gate/gpu/{HIDDEN}x{EXPERTS}",
            "tokens",
            lambda n: (
                4 * LAUNCH_NS
                + 2 * HIDDEN * EXPERTS * max(1 / GPU_BYTES_PER_NS, n / GPU_FLOPS_PER_NS)
            ),
            TOKENS,
        ),
        *(copies(lane, how) for lane in ("h2d", "d2h") for how in ("single", "queued")),
        made(
            "copy/h2d/pinned/chunked",
            "bytes",
            lambda size: TOTAL_BYTES / size * LINK_NS + TOTAL_BYTES / LINK_BYTES_PER_NS,
            [65536.0 * 4**k for k in range(5)],
            total_bytes=TOTAL_BYTES,
        ),
        set_of("gpu", "cpu"),
        set_of("cpu", "h2d"),
        made(
            "disk/read",
            "bytes",
            lambda size: DISK_NS + size / DISK_BYTES_PER_NS,
            SIZES,
            [6 * 4096.0],
        ),
        *attention(),
        *host(),
    ]


def tasks(found: Iterable[Series]) -> list[Task]:
    """Return tasks that give these series."""
    return [Task(series.name, 1.0, lambda _, own=series: own) for series in found]  # type: ignore[misc]
