"""Statistics of a trace that decide between policies: locality, skew, working set, cache hits.

Every function returns float64 with one column per layer; rows are what was asked for. Pairs and
windows of tokens lie inside one sequence: across a border the overlap is chance. Missing ids match
nothing. Token and row mean the same.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import TraceError
from moesim.traces.format import MISSING, Trace, rows_by_sequence
from moesim.traces.recall import recalls
from moesim.types import DECODE, FloatArray, IntArray

Mask = npt.NDArray[np.bool_]

LAGS = (1, 2, 4, 8, 16, 64, 256)
SPANS = (4, 16, 64)
CACHE_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)

MOST_TOKENS, MOST_CELLS = 8_000, 2**27
"""`summary` looks at the first tokens only of a trace with more of them, or with more cells
(tokens x layers x experts): seconds, and 0.4 GB at most."""


def reuse(trace: Trace, lags: Sequence[int]) -> FloatArray:
    """Return the share of a token's experts that the token `lag` later uses too (lags, layers).

    NaN where no sequence is that long. Chance is in `skew`.
    """
    used, sequence = _used(trace)
    ratios = np.full((len(lags), trace.layers), np.nan)
    for i, lag in enumerate(lags):
        same = sequence[lag:] == sequence[:-lag]
        asked = used[:-lag][same].sum(axis=(0, 2))
        found = (used[:-lag][same] & used[lag:][same]).sum(axis=(0, 2))
        np.divide(found, asked, out=ratios[i], where=asked > 0)
    return ratios


def popularity(trace: Trace, rows: Mask | None = None) -> IntArray:
    """Return how many tokens use each expert (layers, experts), of the rows of a mask if given."""
    ids = trace.experts if rows is None else trace.experts[rows]
    experts = trace.n_experts
    counts = np.zeros((trace.layers, experts + 1), np.int64)
    for layer in range(trace.layers):
        known = np.minimum(ids[:, layer], experts).ravel()
        counts[layer] = np.bincount(known, minlength=experts + 1)
    return np.ascontiguousarray(counts[:, :experts])


def skew(trace: Trace) -> dict[str, FloatArray]:
    """Return how unequal the experts of a layer are, by name (layers,).

    chance: reuse between unrelated tokens. entropy: of popularity, over ln E. cov90, cov95: the
    share of experts that holds 90 or 95 % of the traffic. top25: what the hottest quarter holds.
    max_over_mean: the hottest expert's traffic over the mean.
    """
    counts = popularity(trace)
    experts = counts.shape[1]
    total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    share = counts / total
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    held = np.cumsum(-np.sort(-share, axis=1), axis=1)
    quarter = max(1, round(experts / 4))
    tokens = total / trace.top_k
    return {
        "chance": ((counts / tokens) ** 2).sum(axis=1) / trace.top_k,
        "entropy": -(share * logs).sum(axis=1) / np.log(max(experts, 2)),
        "cov90": ((held < 0.90 - 1e-12).sum(axis=1) + 1) / experts,
        "cov95": ((held < 0.95 - 1e-12).sum(axis=1) + 1) / experts,
        "top25": held[:, quarter - 1],
        "max_over_mean": share.max(axis=1) * experts,
    }


def active(trace: Trace, spans: Sequence[int]) -> FloatArray:
    """Return the distinct experts of `span` consecutive tokens (spans, layers), NaN if too long."""
    distinct = np.full((len(spans), trace.layers), np.nan)
    for i, span in enumerate(spans):
        counts, whole = _window_counts(trace, span)
        found = ((counts > 0).sum(axis=2) * whole).sum(axis=0)
        np.divide(found, whole.sum(axis=0), out=distinct[i], where=whole.any(axis=0))
    return distinct


def srp(trace: Trace, spans: Sequence[int]) -> FloatArray:
    """Return the segment routing best performance (spans, layers), 0..1 (arXiv 2505.16056).

    The best F1, over thresholds, of guessing for a whole window of `span` tokens the experts that
    it uses at least so often: 1 if all its tokens choose the same.
    """
    best = np.full((len(spans), trace.layers), np.nan)
    for i, span in enumerate(spans):
        counts, whole = _window_counts(trace, span)
        for layer in np.flatnonzero(whole.any(axis=0)):
            of_count = np.bincount(counts[whole[:, layer], layer].ravel(), minlength=span + 1)
            uses = of_count * np.arange(span + 1)
            hit = np.cumsum(uses[:0:-1])  # thresholds span, span - 1, ..., 1
            guessed = span * np.cumsum(of_count[:0:-1])
            best[i, layer] = (2 * hit / np.maximum(guessed + uses.sum(), 1)).max()
    return best


def static_hits(trace: Trace, sizes: Sequence[int], learn: float = 0.2) -> FloatArray:
    """Return the hit ratio of the experts most used in the first tokens (sizes, layers).

    `learn` is the share of tokens that choose the set; hits are counted over all of them.
    """
    counts = popularity(trace)
    first = np.arange(trace.tokens) < int(trace.tokens * learn)
    hottest = np.argsort(-popularity(trace, first), axis=1, kind="stable")
    held = np.cumsum(np.take_along_axis(counts, hottest, axis=1), axis=1)
    total = np.maximum(counts.sum(axis=1), 1)
    return np.stack([held[:, min(size, trace.n_experts) - 1] / total for size in sizes])


def lru_hits(trace: Trace, sizes: Sequence[int], *, protect: bool = True) -> FloatArray:
    """Return the hit ratio of least-recently-used caches (sizes, layers), one cache per layer.

    Protected, all experts of a token are looked up before any is brought in, and none of them
    leaves while it is computed, as on a real GPU: a hit is one of the `size` experts used last.
    Unprotected, they are looked up one after another and may push each other out: the convention
    of most published numbers, which are lower. In both, a later rank counts as used later.
    Caches start empty and rows come in the order of the file.

    Raises TraceError for a protected size below top_k.
    """
    if protect:
        _check_sizes(trace, sizes)
    experts, top_k = trace.n_experts, trace.top_k
    ids = np.minimum(trace.experts, experts).astype(np.int64)
    layer = np.arange(trace.layers)[:, None]
    last = np.full((trace.layers, experts + 1), -1, np.int64)
    depths = np.zeros((trace.layers, experts + 1), np.int64)
    ranks = np.arange(top_k)
    earlier = ranks[:, None] > ranks
    for token, chosen in enumerate(ids):
        used = last[layer, chosen]
        newer = (last[:, None, :experts] > used[:, :, None]).sum(axis=2)
        if not protect:  # experts looked up before in this token, and not counted as newer yet
            fresh = (used[:, None, :] < used[:, :, None]) & (chosen < experts)[:, None, :]
            newer += (fresh & earlier).sum(axis=2)
        newer[(used < 0) | (chosen == experts)] = experts
        np.add.at(depths, (layer, newer), 1)
        last[layer, chosen] = token * top_k + ranks
    return _ratios(
        np.cumsum(depths, axis=1)[:, [min(s, experts) - 1 for s in sizes]].T, ids, experts
    )


def belady_hits(trace: Trace, sizes: Sequence[int]) -> FloatArray:
    """Return the hit ratio of caches that know the future (sizes, layers), one cache per layer.

    Belady's rule by token: the experts of a token are all needed at once and none of them leaves
    while it is computed; of the others, those used again latest leave (lowest id on ties). Rules
    that may drop an expert right after its use hit more often. Otherwise as `lru_hits`.
    """
    _check_sizes(trace, sizes)
    layers, experts = trace.layers, trace.n_experts
    ids = np.minimum(trace.experts, experts).astype(np.int64)
    layer = np.arange(layers)[:, None]
    # Keys order experts by their next use, and differ; an absent expert's is the largest.
    never, absent = trace.tokens, np.int64(trace.tokens + 1) * experts
    upcoming = np.empty(ids.shape, np.int64)
    next_use = np.full((layers, experts + 1), never, np.int64)
    for token in range(trace.tokens - 1, -1, -1):
        upcoming[token] = next_use[layer, ids[token]]
        next_use[layer, ids[token]] = token
    upcoming = upcoming * experts + experts - 1 - ids
    hits = np.zeros((len(sizes), layers), np.int64)
    for i, size in enumerate(sizes):
        keys = np.full((layers, experts + 1), absent)
        for chosen, later in zip(ids, upcoming, strict=True):
            hits[i] += (keys[layer, chosen] < absent).sum(axis=1)
            keys[layer, chosen] = -1
            keys[:, experts] = absent
            if size < experts:
                border = np.partition(keys[:, :experts], size, axis=1)[:, size, None]
                keys[keys >= border] = absent
            keys[layer, chosen] = later
            keys[:, experts] = absent
    return _ratios(hits, ids, experts)


def summary(trace: Trace) -> dict[str, Any]:
    """Return what `moesim trace info` shows, as plain numbers and lists, means over layers first.

    Of a trace beyond MOST_TOKENS or MOST_CELLS, the first rows; `tokens_examined` says how many.
    `recall` is bounded by itself.
    """
    most = max(1, MOST_CELLS // (trace.layers * trace.n_experts))
    examined = min(trace.tokens, MOST_TOKENS, most)
    part = trace.at(np.arange(examined))
    _, starts = rows_by_sequence(trace)
    lengths = np.diff(starts)
    decode = int((trace.phase == DECODE).sum())
    sizes = cache_sizes(trace)
    by_lag = reuse(part, LAGS)
    caches = {
        "static": static_hits(part, sizes),
        "lru": lru_hits(part, sizes),
        "belady": belady_hits(part, sizes),
    }
    return {
        "model": trace.meta.get("model"),
        "digest": trace.digest(),
        "tokens": trace.tokens,
        "tokens_examined": examined,
        "prefill_tokens": trace.tokens - decode,
        "decode_tokens": decode,
        "sequences": len(lengths),
        "sequence_tokens": {"min": int(lengths.min()), "max": int(lengths.max())},
        "layers": trace.layers,
        "experts": trace.n_experts,
        "top_k": trace.top_k,
        "missing": round(float((trace.experts == MISSING).mean()), 4),
        "rank_order": trace.meta.get("has_rank_order") is not False,
        "weights": trace.weights is not None,
        "predictors": sorted(trace.candidates),
        "recall": recalls(trace),
        "reuse": {str(lag): _mean(row) for lag, row in zip(LAGS, by_lag, strict=True)},
        "reuse_by_layer": [_number(x) for x in by_lag[0]],
        "skew": {name: _mean(row) for name, row in skew(part).items()},
        "active": {str(b): _mean(row) for b, row in zip(SPANS, active(part, SPANS), strict=True)},
        "srp": {str(m): _mean(row) for m, row in zip(SPANS, srp(part, SPANS), strict=True)},
        "hit_ratio": {
            name: {str(size): _mean(row) for size, row in zip(sizes, ratios, strict=True)}
            for name, ratios in caches.items()
        },
        "lru_hit_ratio_by_layer": {
            str(size): [_number(x) for x in row]
            for size, row in zip(sizes, caches["lru"], strict=True)
        },
    }


def cache_sizes(trace: Trace) -> list[int]:
    """Return the cache sizes worth a look, experts per layer: fixed shares, at least top_k."""
    shares = [round(trace.n_experts * share) for share in CACHE_SHARES]
    return sorted({max(size, trace.top_k) for size in shares})


def _used(trace: Trace) -> tuple[Mask, npt.NDArray[np.int32]]:
    """Return which experts each token uses (tokens, layers, experts), by sequence, and that."""
    rows, _ = rows_by_sequence(trace)
    experts = trace.n_experts
    used = np.zeros((trace.tokens, trace.layers, experts + 1), np.bool_)
    known = np.minimum(trace.experts[rows], experts).astype(np.int64)
    np.put_along_axis(used, known, True, axis=2)
    return used[:, :, :experts], trace.sequence[rows]


def _window_counts(trace: Trace, span: int) -> tuple[npt.NDArray[np.int32], Mask]:
    """Return how many tokens of each window of `span` use each expert (windows, layers, experts).

    And where all tokens of a window are known (windows, layers). Windows follow one another inside
    a sequence; what remains at its end is left out.
    """
    rows, starts = rows_by_sequence(trace)
    experts = trace.n_experts
    windows = [
        rows[first : first + span]
        for a, b in pairwise(starts)
        for first in range(a, b - span + 1, span)
    ]
    counts = np.zeros((len(windows), trace.layers, experts + 1), np.int32)
    whole = np.ones((len(windows), trace.layers), np.bool_)
    layer = np.arange(trace.layers)[:, None]
    for i, token_rows in enumerate(windows):
        known = np.minimum(trace.experts[token_rows], experts).astype(np.int64)
        np.add.at(counts[i], (layer, known), 1)
        whole[i] = ~(known == experts).all(axis=2).any(axis=0)
    return counts[:, :, :experts], whole


def _check_sizes(trace: Trace, sizes: Sequence[int]) -> None:
    for size in sizes:
        if size < trace.top_k:
            raise TraceError(
                f"a cache of {size} experts is too small for a token; legal are at least "
                f"{trace.top_k}"
            )


def _ratios(hits: IntArray, ids: IntArray, experts: int) -> FloatArray:
    """Return hits (sizes, layers) over the known ids of each layer; NaN where there are none."""
    asked = (ids < experts).sum(axis=(0, 2))
    ratios = np.full(hits.shape, np.nan)
    np.divide(hits, asked, out=ratios, where=asked > 0)
    return ratios


def _mean(row: FloatArray) -> float | None:
    return _number(row.mean())


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)
