import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import TraceError
from moesim.traces.format import MISSING, Trace
from moesim.traces.importers import load_trace
from moesim.traces.stats import (
    active,
    belady_hits,
    cache_sizes,
    lru_hits,
    popularity,
    reuse,
    skew,
    srp,
    static_hits,
    summary,
)

MakeTrace = Callable[..., Trace]
SHARED = Path(__file__).resolve().parents[2].parent / "shared/traces"

recorded = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the recorded traces")


def of(ids: list[list[int]], experts: int, lengths: list[int] | None = None) -> Trace:
    """Return a trace of one layer with these ids [token][rank]."""
    lengths = lengths or [len(ids)]
    return Trace(
        experts=np.array(ids, np.uint16)[:, None, :],
        layer_ids=np.zeros(1, np.int32),
        phase=np.zeros(len(ids), np.uint8),
        sequence=np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        position=np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
        meta={"num_experts": experts},
    )


def test_reuse_by_hand() -> None:
    """0,1 | 1,2 | 2,1: one of two, then two of two; two apart, one of two."""
    ids = [[0, 1], [1, 2], [2, 1]]

    assert reuse(of(ids, 4), [1, 2, 3])[:2, 0].tolist() == [0.75, 0.5]
    assert np.isnan(reuse(of(ids, 4), [3])[0, 0])
    assert reuse(of(ids, 4, [1, 2]), [1])[0, 0] == 1.0  # not across the border
    assert reuse(of([[0, 1], [1, MISSING]], 4), [1])[0, 0] == 0.5


def test_skew_by_hand() -> None:
    """Experts 0..3 are used 4, 2, 1, 1 times by 8 tokens with one expert each."""
    found = skew(of([[0], [0], [0], [0], [1], [1], [2], [3]], 4))

    assert popularity(of([[0], [0], [1], [MISSING]], 3)).tolist() == [[2, 1, 0]]
    assert found["chance"][0] == pytest.approx((16 + 4 + 1 + 1) / 64)
    assert found["entropy"][0] == pytest.approx(1.75 * np.log(2) / np.log(4))
    assert found["top25"][0] == 0.5
    assert found["cov90"][0] == 1.0
    assert found["max_over_mean"][0] == 2.0


def test_windows_by_hand() -> None:
    """Windows of two: {0:2, 1:2} and {2:1, 3:1, 0:2}."""
    trace = of([[0, 1], [1, 0], [0, 2], [3, 0], [1, 2]], 4)

    assert active(trace, [2, 9])[0, 0] == 2.5
    assert np.isnan(active(trace, [2, 9])[1, 0])
    # At least twice: 6 of 8 uses are named with 6 guesses; at least once: 8 uses with 10 guesses.
    assert srp(trace, [2])[0, 0] == pytest.approx(max(2 * 6 / (6 + 8), 2 * 8 / (10 + 8)))
    assert np.isnan(srp(trace, [9])[0, 0])


def test_caches_by_hand() -> None:
    """Capacity 2, one expert per token: 0 1 2 0 1 2 starves LRU; the ideal keeps one for later."""
    trace = of([[0], [1], [2], [0], [1], [2]], 3)

    assert lru_hits(trace, [1, 2, 3])[:, 0].tolist() == [0, 0, 0.5]
    assert belady_hits(trace, [1, 2, 3])[:, 0] == pytest.approx([0, 2 / 6, 0.5])
    assert static_hits(trace, [1, 3], learn=0.5)[:, 0] == pytest.approx([1 / 3, 1])
    with pytest.raises(TraceError, match="cache of 1 experts is too small"):
        lru_hits(of([[0, 1]], 3), [1])
    with pytest.raises(TraceError, match="legal are at least 2"):
        belady_hits(of([[0, 1]], 3), [1])


def count_lru(ids: list[list[int]], size: int, protect: bool) -> int:
    """Return the hits of an LRU cache, the plain way."""
    cache: list[int] = []  # least recently used first
    hits = 0
    for chosen in ids:
        if protect:
            hits += len(set(cache) & set(chosen))
        for expert in chosen:
            hits += not protect and expert in cache
            cache = [e for e in cache if e != expert] + [expert]
            cache = cache[-size:]
    return hits


def count_belady(ids: list[list[int]], size: int) -> int:
    """Return the most hits any cache can have that holds all experts of a token at once."""
    states = {frozenset[int](): 0}  # every cache content there can be, with its best count
    for chosen in ids:
        following: dict[frozenset[int], int] = {}
        for cache, hits in states.items():
            now = hits + len(cache & set(chosen))
            held = [e for e in cache if e not in chosen]
            for mask in range(1 << len(held)):
                kept = frozenset(e for i, e in enumerate(held) if mask >> i & 1) | set(chosen)
                if len(kept) <= size:
                    following[kept] = max(now, following.get(kept, -1))
        states = following
    return max(states.values())


@given(tokens=st.integers(1, 12), experts=st.integers(2, 6), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=60)
def test_caches_count_like_plain_ones(
    make_trace: MakeTrace, tokens: int, experts: int, seed: int
) -> None:
    trace = make_trace([tokens], [tokens], layers=2, experts=experts, seed=seed, full=False)
    sizes = list(range(2, experts + 1))
    lru, strict = lru_hits(trace, sizes), lru_hits(trace, sizes, protect=False)
    ideal = belady_hits(trace, sizes)
    for layer in range(2):
        ids = trace.experts[:, layer].tolist()
        asked = tokens * 2
        assert (lru[:, layer] * asked).round().tolist() == [count_lru(ids, s, True) for s in sizes]
        assert (strict[:, layer] * asked).round().tolist() == [
            count_lru(ids, s, False) for s in sizes
        ]
        if experts < 6:
            assert (ideal[:, layer] * asked).round().tolist() == [
                count_belady(ids, s) for s in sizes
            ]
    assert (ideal >= lru).all()
    assert (np.diff(lru, axis=0) >= 0).all()


def test_missing_ids_never_hit() -> None:
    trace = of([[0, MISSING], [0, MISSING], [MISSING, MISSING]], 3)

    assert lru_hits(trace, [2])[0, 0] == belady_hits(trace, [2])[0, 0] == 0.5
    assert lru_hits(trace, [2], protect=False)[0, 0] == 0.5


def test_rows_that_are_missing_change_no_statistic_of_the_others(make_trace: MakeTrace) -> None:
    trace = make_trace((12, 12), (4, 4), experts=6)
    gap = msgspec.structs.replace(
        trace, experts=np.concatenate([np.full_like(trace.experts, MISSING), trace.experts]),
        **{
            name: np.concatenate([getattr(trace, name), getattr(trace, name)])
            for name in ("phase", "position")
        },
        sequence=np.concatenate([trace.sequence, trace.sequence + 2]),
        weights=None, token_id=None, candidates={}, candidate_scores={},
    )  # fmt: skip

    for found, expected in (
        (lru_hits(gap, [3]), lru_hits(trace, [3])),
        (belady_hits(gap, [3]), belady_hits(trace, [3])),
        (static_hits(gap, [3], 1.0), static_hits(trace, [3], 1.0)),
        (active(gap, [4]), active(trace, [4])),
        (srp(gap, [4]), srp(trace, [4])),
        (reuse(gap, [1, 2]), reuse(trace, [1, 2])),
    ):
        assert (found == expected).all()
    assert summary(gap)["missing"] == 0.5
    assert np.isnan(lru_hits(gap.at(gap.sequence < 2), [3])).all()


def test_a_summary_is_plain_and_complete(make_trace: MakeTrace) -> None:
    trace = make_trace((20, 3), (5, 2), experts=12)
    found = summary(trace)

    assert msgspec.json.decode(msgspec.json.encode(found)) == found
    assert (found["tokens"], found["prefill_tokens"], found["sequences"]) == (23, 7, 2)
    assert found["reuse"]["256"] is None
    assert (
        list(found["hit_ratio"]["lru"])
        == ["2", "3", "6", "9"]
        == [str(size) for size in cache_sizes(trace)]
    )
    assert len(found["reuse_by_layer"]) == 3


def test_a_summary_of_much_looks_at_the_first_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = of([[0], [1]] * 4500, 2)
    assert summary(trace)["tokens_examined"] == 8000

    monkeypatch.setattr("moesim.traces.stats.MOST_CELLS", 100)
    assert summary(trace)["tokens_examined"] == 50
    assert summary(trace)["reuse"] == summary(of([[0], [1]] * 25, 2))["reuse"]


@pytest.fixture(scope="module")
def general() -> Trace:
    return load_trace(SHARED / "qwen3-30b-a3b-general.npz")


@pytest.fixture(scope="module")
def code() -> Trace:
    return load_trace(SHARED / "qwen3-30b-a3b-code.npz")


@recorded
def test_recorded_traces_have_their_published_skew(general: Trace, code: Trace) -> None:
    names = ("entropy", "chance", "max_over_mean", "top25", "cov90", "cov95")
    found = {name: (skew(general)[name].mean(), skew(code)[name].mean()) for name in names}

    assert found["entropy"] == pytest.approx((0.853, 0.790), abs=0.001)
    assert found["chance"] == pytest.approx((0.190, 0.276), abs=0.001)
    assert found["max_over_mean"] == pytest.approx((8.6, 10.4), abs=0.05)
    assert found["top25"] == pytest.approx((0.691, 0.811), abs=0.001)
    assert found["cov90"] == pytest.approx((0.46, 0.38), abs=0.006)
    assert found["cov95"] == pytest.approx((0.56, 0.49), abs=0.006)


@recorded
def test_recorded_traces_have_their_published_locality(general: Trace, code: Trace) -> None:
    """The published lags run across borders of windows, which lowers them a little."""
    lags = (1, 2, 4, 8, 16, 64, 256)
    spans = (4, 16, 64)

    assert reuse(general, lags).mean(axis=1) == pytest.approx(
        [0.446, 0.361, 0.332, 0.302, 0.278, 0.245, 0.219], abs=0.007
    )
    assert reuse(code, lags).mean(axis=1) == pytest.approx(
        [0.474, 0.407, 0.392, 0.370, 0.354, 0.322, 0.303], abs=0.009
    )
    assert srp(general, spans).mean(axis=1) == pytest.approx([0.650, 0.512, 0.438], abs=0.001)
    assert srp(code, spans).mean(axis=1) == pytest.approx([0.676, 0.565, 0.515], abs=0.002)
    assert active(general, spans).mean(axis=1) == pytest.approx([19.5, 41.7, 67.3], rel=0.03)


@recorded
def test_caches_agree_with_an_independent_simulation(general: Trace) -> None:
    """Misses per token of layer 24, by another project, under rules that differ a little."""
    with (SHARED / "reference-cache-general.csv").open(encoding="utf-8") as file:
        misses = {
            (row["policy"], int(row["capacity"])): float(row["demand_miss_per_tok"])
            for row in csv.DictReader(file)
        }
    sizes = [8, 17, 25, 64]
    layer = msgspec.structs.replace(
        general, experts=general.experts[:, 24:25].copy(), layer_ids=general.layer_ids[:1]
    )

    def missed(ratios: np.ndarray) -> list[float]:
        return list(8 * (1 - ratios[:, 0]))

    for size, found in zip(sizes, missed(static_hits(layer, sizes)), strict=True):
        assert found == pytest.approx(misses["static", size], abs=1e-9)
    # It lets the experts of one token tie and leaves the order to Python's sets.
    strict = missed(lru_hits(layer, sizes, protect=False))
    for size, found, tolerance in zip(sizes, strict, (0.05, 0.015, 0.01, 0.01), strict=True):
        assert found == pytest.approx(misses["lru", size], rel=tolerance)
    # It lets an expert leave right after its use; protected ones cost these misses.
    assert missed(belady_hits(layer, sizes)) == pytest.approx(
        [4.165, 1.738, 1.067, 0.1473], abs=0.0005
    )


@recorded
def test_lru_hits_are_as_published(general: Trace, code: Trace) -> None:
    sizes = (8, 16, 32, 64, 96)
    for trace, published in (
        (general, [0.32, 0.57, 0.76, 0.94, 0.99]),
        (code, [0.36, 0.64, 0.83, 0.96, 0.99]),
    ):
        found = lru_hits(trace, sizes, protect=False).mean(axis=1)
        assert found == pytest.approx(published, abs=0.025)


def test_static_sets_are_the_hottest(make_trace: MakeTrace) -> None:
    trace = make_trace([30], [30], layers=1, experts=8, full=False)
    ids = trace.experts[:, 0].tolist()
    first = Counter(e for chosen in ids[:15] for e in sorted(chosen))
    hottest = sorted(range(8), key=lambda e: (-first[e], e))[:3]

    found = static_hits(trace, [3], learn=0.5)[0, 0]

    assert found == sum(e in hottest for chosen in ids for e in chosen) / 60
