"""LRU curves next to libCacheSim's own run over the same accesses, in turn in one process."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moesim.sim.curves import curves, looked_up
from moesim.traces.format import Trace
from moesim.traces.importers import load_trace

pytestmark = [
    pytest.mark.bench,
    pytest.mark.skipif(sys.platform != "linux", reason="libcachesim is for Linux"),
]

RECORDED = Path(__file__).resolve().parents[2] / "shared/traces/qwen3-30b-a3b-general.npz"
SIZES = (8, 16, 32, 64, 96)
ROUNDS = 5
REQUEST = np.dtype([("time", "<u4"), ("id", "<u8"), ("bytes", "<u4"), ("next", "<i8")])


def written(trace: Trace, folder: Path) -> list[str]:
    """Write the accesses of each layer in the fastest of libCacheSim's formats."""
    paths = []
    for layer in range(trace.layers):
        ids, _ = looked_up(trace, layer)
        requests = np.zeros(len(ids), REQUEST)
        requests["time"] = np.arange(len(ids))
        requests["id"] = ids + 1
        requests["bytes"] = 1
        requests["next"] = np.iinfo(np.int64).max
        paths.append(str(folder / f"{layer}.oracleGeneral.bin"))
        requests.tofile(paths[-1])
    return paths


def libcachesim(paths: list[str], size: int) -> tuple[float, list[float]]:
    """Return the seconds that it spends on the trace itself, and the miss ratio of each layer.

    With a small hash table it is three times as fast as with its default of 2^24 buckets.
    """
    from libcachesim import LRU, TraceReader, TraceType

    spent_s, misses = 0.0, []
    for path in paths:
        reader = TraceReader(path, TraceType.ORACLE_GENERAL_TRACE)
        cache = LRU(cache_size=size, hashpower=10)
        began = time.perf_counter()
        miss_ratio, _ = cache.process_trace(reader)
        spent_s += time.perf_counter() - began
        misses.append(miss_ratio)
    return spent_s, misses


@pytest.mark.parametrize("sizes", [SIZES, *((size,) for size in SIZES)], ids=str)
@pytest.mark.parametrize(
    ("name", "hits"),
    [
        ("made", {8: 79_084}),
        pytest.param(
            *("recorded", {8: 991_548}),
            marks=pytest.mark.skipif(not RECORDED.exists(), reason="not part of moesim"),
        ),
    ],
)
def test_lru(
    request: pytest.FixtureRequest, name: str, hits: dict[int, int], sizes: tuple[int, ...],
    tmp_path: Path,
) -> None:  # fmt: skip
    trace = load_trace(RECORDED if name == "recorded" else request.getfixturevalue("made"))
    paths = written(trace, tmp_path)
    curves(trace, ["lru"], sizes, compiled=True)
    ours_s: dict[str, list[float]] = {"access": [], "token": []}
    theirs_s = []
    for _ in range(ROUNDS):
        theirs = [libcachesim(paths, size) for size in sizes]
        theirs_s.append(sum(spent_s for spent_s, _ in theirs))
        for clock, spent in ours_s.items():
            began = time.perf_counter()
            made = curves(trace, ["lru"], sizes, clock, compiled=True)
            spent.append(time.perf_counter() - began)
            if clock == "access":
                strict = made
    misses = 1 - strict.hit_rates()[0]
    assert np.allclose(misses, [by_layer for _, by_layer in theirs], rtol=0, atol=1e-12)
    best = min(theirs_s)
    counts = dict(zip(sizes, strict.hits[0].sum(axis=1).tolist(), strict=True))
    print(
        f"\nlru at {sizes}, {strict.lookups.sum()} lookups, hits {counts}: libCacheSim "
        f"{best * 1e3:.0f} ms; "
        + "; ".join(
            f"by {clock} {min(spent) * 1e3:.0f} ms, {best / min(spent):.1f} times as fast"
            for clock, spent in ours_s.items()
        )
    )
    for size in hits.keys() & counts.keys():
        assert counts[size] == hits[size]
