"""Fit the generator to a trace, so that a copy of any length repeats itself as the trace does.

Layer by layer: each expert's mean comes from how often it was chosen; how often a token's experts
are used again, at many lags, says how much of the logits drifts, and how fast. A curve simulated
for the layer turns such overlaps into correlations, those of predictors, too. The layers of a copy
are independent: what one tells about the next is in the predictors only.
"""

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from moesim.errors import TraceError
from moesim.traces.format import MISSING, Ints, Trace, rows_by_sequence
from moesim.traces.recall import recall
from moesim.traces.stats import (
    LAGS,
    MOST_CELLS,
    SPANS,
    active,
    cache_sizes,
    lru_hits,
    popularity,
    reuse,
    skew,
)
from moesim.traces.synthetic import Guesser, Router, Singles, choose, top, within
from moesim.types import DECODE, PREFILL, FloatArray, IntArray

LEAST_PAIRS = 32
"""Tokens followed by another one of their sequence: with fewer there is nothing to fit."""

MOST_FAVOURITES = 2**24
"""Means (sequences x layers x experts) kept: 64 MB. Further sequences share those of the first."""

_LAGS = sorted({round(2 ** (half / 2)) for half in range(28)})

_FASTEST = 0.25
"""Memory of the part that drifts fastest; each further one remembers four times as long."""

_ANGLES = np.linspace(0, np.pi / 2, 13, dtype=np.float32)
"""Between logits, at which curves are simulated: their correlation is the cosine. Overlap falls
about linearly with it, at both ends."""

_LEAST_OPENINGS = 8
"""Sequences, and tokens of each, from which on first tokens are looked at by themselves."""

Draws = tuple[Singles, Singles, Singles]
Phases = npt.NDArray[np.uint8]


class Fitted(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """What `copy` needs of a trace: its routers and predictors, and which tokens came when.

    phase, sequence, position: the trace's own (tokens,). weights: whether it has some.
    """

    router: Router
    guessers: dict[str, Guesser]
    layer_ids: Ints
    phase: Phases
    sequence: Ints
    position: Ints
    weights: bool
    meta: dict[str, Any]


class Comparison(NamedTuple):
    """A statistic of a trace and of its copy, mean over layers; None where one is too short."""

    statistic: str
    of: str
    trace: float | None
    copy: float | None


def fit(trace: Trace) -> Fitted:
    """Return the generator's parameters for a trace.

    Every sequence keeps favourites of its own, as far as its tokens agree more than those of
    different sequences do. Beyond MOST_CELLS (tokens x layers x experts) the first sequences stand
    for all. Prefill and decode are taken as one. Missing experts and guesses are left out, and
    filled in in a copy.

    Raises TraceError for a trace with fewer than LEAST_PAIRS tokens that have a successor, or with
    a layer of which nothing was recorded.
    """
    sample = _first(trace)
    unknown = (sample.experts == MISSING).all(axis=(0, 2))
    if unknown.any():
        raise TraceError(f"layer {unknown.argmax()} has no expert recorded: nothing to fit there")
    numbers = _numbers(sample)
    opening = _opening(sample, numbers)
    if opening is not None:  # these tokens are alike for a reason of their own
        later = np.flatnonzero(np.diff(numbers, prepend=-1) == 0)
        sample, numbers = sample.at(later), numbers[later]
    lags, pairs = _lags(sample)
    again = np.nan_to_num(_reuse(sample, lags))  # NaN: nothing was recorded so far apart
    typical = np.flatnonzero(pairs >= min(pairs[0], sample.tokens / 2))[-1]
    far = again[typical]  # as far apart as two tokens of a sequence often are
    favourites, odds = _favourites(sample, numbers, far)

    rng = np.random.default_rng(0)
    recalls = {name: _recall(sample, name) for name in sorted(sample.candidates)}
    widths = {n: min(sample.candidates[n].shape[2], sample.n_experts) for n in recalls}
    guesses = {name: np.full(sample.layers, np.nan, np.float32) for name in recalls}
    correlations = np.empty(again.shape)
    sharpness, weight_sum = np.ones((2, sample.layers, 1), np.float32)
    for layer in range(sample.layers):
        draws = _draw(favourites[:, layer], odds, rng)
        correlations[:, layer] = _correlations(_drift_curve(draws, trace.top_k), again[:, layer])
        known = [name for name in recalls if not np.isnan(recalls[name][layer])]
        named = {name: min(widths[name], trace.top_k) for name in known}
        curves = {count: _guess_curve(draws, trace.top_k, count) for count in set(named.values())}
        for name in known:
            guesses[name][layer] = _correlations(curves[named[name]], recalls[name][layer])
        if sample.weights is not None:
            weights = sample.weights[:, layer].astype(np.float32)
            weight_sum[layer] = weights.sum(axis=1).mean()
            sharpness[layer] = _sharpness(draws[0] + draws[1], weights)

    memories, variances = _parts(lags, pairs, correlations)
    router = Router(
        top_k=trace.top_k,
        favourites=favourites,
        memories=memories[1:],
        variances=variances[1:],
        noise=variances[0],
        opening=opening,
        sharpness=sharpness,
        weight_sum=weight_sum,
    )
    kept = ("model", "spec", "id_space")
    return Fitted(
        router=router,
        guessers={name: Guesser(guesses[name], widths[name]) for name in guesses},
        layer_ids=trace.layer_ids,
        phase=trace.phase,
        sequence=trace.sequence,
        position=trace.position,
        weights=trace.weights is not None,
        meta={
            **{key: trace.meta[key] for key in kept if key in trace.meta},
            "num_experts": trace.n_experts,
            "has_rank_order": trace.meta.get("has_rank_order") is not False,
            "importer": "synthetic",
            "generator": "gaussian-logits",
            "like": trace.digest(),
        },
    )


def copy(
    fitted: Fitted,
    *,
    sequences: int | None = None,
    prompt: int | None = None,
    generate: int | None = None,
    seed: int = 0,
) -> Trace:
    """Return a made-up trace that is statistically like the one that was fitted.

    Row by row it has that trace's sequences, positions and phases, unless told otherwise. Then
    there are `sequences` of them (by default as many), one after another, each like the trace's of
    the same number, which begin again after the last; `prompt` prefill rows and `generate` - 1
    decode rows replace those of each. Scores of candidates are not made up.

    The same arguments give the same trace. Raises TraceError for what cannot be made.
    """
    phase, sequence, position = _layout(fitted, sequences, prompt, generate)
    within("seed", seed, 0, 2**63 - 1)
    blank = Trace(
        experts=np.empty((len(phase), 0, 0), np.uint16),
        layer_ids=fitted.layer_ids,
        phase=phase,
        sequence=sequence,
        position=position,
        meta={
            **fitted.meta,
            "parameters": {"sequences": sequences, "prompt": prompt, "generate": generate},
            "seed": seed,
        },
    )
    rng, noise = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    choices = choose(fitted.router, fitted.guessers, *rows_by_sequence(blank), rng, noise)
    return msgspec.structs.replace(
        blank,
        experts=choices.experts,
        weights=choices.weights if fitted.weights else None,
        candidates=choices.candidates,
    )


def compare(trace: Trace, copied: Trace) -> list[Comparison]:
    """Return what a copy should share with its trace, statistic by statistic.

    reuse by lag, lru (hit ratio) by cache size, active (experts) by span of tokens, skew by name,
    recall by predictor. Of large traces the first sequences are looked at, as in `fit`.
    """
    both = (_first(trace), _first(copied))
    skews, names = [skew(one) for one in both], ("entropy", "cov90", "top25")
    sizes, predictors = cache_sizes(trace), sorted(trace.candidates)
    found: dict[str, tuple[Sequence[object], list[list[FloatArray]]]] = {
        "reuse": (LAGS, [list(_reuse(one, LAGS)) for one in both]),
        "lru": (sizes, [list(lru_hits(one, sizes)) for one in both]),
        "active": (SPANS, [list(active(one, SPANS)) for one in both]),
        "skew": (names, [[of[name] for name in names] for of in skews]),
        "recall": (predictors, [[_recall(one, name) for name in predictors] for one in both]),
    }
    return [
        Comparison(statistic, str(of), _mean(one), _mean(other))
        for statistic, (keys, (ones, others)) in found.items()
        for of, one, other in zip(keys, ones, others, strict=True)
    ]


def _recall(trace: Trace, name: str) -> FloatArray:
    """Return the recall of a predictor's first top_k candidates (layers,), NaN without any."""
    ids = trace.candidates[name]
    (shares,) = recall(ids, trace.experts, [min(trace.top_k, ids.shape[2])])
    known = ~np.isnan(shares)
    counts = known.sum(axis=0)
    means = np.full(trace.layers, np.nan)
    np.divide(shares.sum(axis=0, where=known), counts, out=means, where=counts > 0)
    return means


def _mean(by_layer: FloatArray) -> float | None:
    known = by_layer[~np.isnan(by_layer)]
    return float(known.mean()) if len(known) else None


def _layout(
    fitted: Fitted, sequences: int | None, prompt: int | None, generate: int | None
) -> tuple[Phases, Ints, Ints]:
    """Return phase, sequence and position of every row (tokens,)."""
    if sequences is prompt is generate is None:
        return fitted.phase, fitted.sequence, fitted.position
    within("sequences", 1 if sequences is None else sequences, 1, 2**20)
    within("prompt", 1 if prompt is None else prompt, 1, 2**24)
    within("generate", 1 if generate is None else generate, 1, 2**24)
    _, first, inverse = np.unique(fitted.sequence, return_index=True, return_inverse=True)
    own = np.stack([np.bincount(inverse, fitted.phase == phase) for phase in (PREFILL, DECODE)])
    own = own[:, np.argsort(first)].astype(np.int64)
    count = sequences or len(first)
    rows = own[:, np.arange(count) % len(first)]
    if prompt is not None:
        rows[0] = prompt
    if generate is not None:
        rows[1] = generate - 1
    lengths = rows.sum(axis=0)
    tokens, choices = int(lengths.sum()), len(fitted.layer_ids) * fitted.router.top_k
    within("tokens of the shortest sequence", int(lengths.min()), 1, 2**30)
    within("tokens x layers x top_k", tokens * choices, 1, 2**30)
    return (
        np.repeat(np.tile(np.array([PREFILL, DECODE], np.uint8), count), rows.T.ravel()),
        np.repeat(np.arange(count, dtype=np.int32), lengths),
        (np.arange(tokens) - np.repeat(np.cumsum(lengths) - lengths, lengths)).astype(np.int32),
    )


def _first(trace: Trace) -> Trace:
    """Return a trace sequence by sequence, cut where it becomes too much to look at."""
    most = max(1, MOST_CELLS // (trace.layers * trace.n_experts))
    return trace.at(rows_by_sequence(trace)[0][:most])


def _numbers(sample: Trace) -> IntArray:
    """Return the number of every row's sequence (tokens,), counted from 0."""
    _, starts = rows_by_sequence(sample)
    return np.repeat(np.arange(len(starts) - 1), np.diff(starts))


def _reuse(trace: Trace, lags: Sequence[int]) -> FloatArray:
    """Return `reuse`, taken layer by layer, which needs less memory."""
    by_layer = [
        Trace(
            experts=trace.experts[:, layer : layer + 1],
            layer_ids=trace.layer_ids[layer : layer + 1],
            phase=trace.phase,
            sequence=trace.sequence,
            position=trace.position,
            meta={"num_experts": trace.n_experts},
        )
        for layer in range(trace.layers)
    ]
    return np.hstack([reuse(one, lags) for one in by_layer])


def _lags(sample: Trace) -> tuple[list[int], IntArray]:
    """Return the lags at which enough tokens have a partner, and how many do."""
    lengths = np.diff(rows_by_sequence(sample)[1])
    pairs = np.array([np.maximum(lengths - lag, 0).sum() for lag in _LAGS])
    if pairs[0] < LEAST_PAIRS:
        raise TraceError(
            f"{pairs[0]} tokens have a successor in their sequence; "
            f"a fit needs at least {LEAST_PAIRS}"
        )
    enough = pairs >= min(pairs[0], max(LEAST_PAIRS, sample.tokens / 8))
    return [lag for lag, kept in zip(_LAGS, enough, strict=True) if kept], pairs[enough]


def _opening(sample: Trace, numbers: IntArray) -> Singles | None:
    """Return the means of first tokens (layers, experts), None if they are like others.

    Models park attention on the first token: it then chooses the same experts whatever it is.
    """
    first = np.flatnonzero(np.diff(numbers, prepend=-1))
    count = len(first)
    if count < _LEAST_OPENINGS or count * _LEAST_OPENINGS > sample.tokens:
        return None
    counts = popularity(sample.at(first))
    agree = (counts * (counts - 1)).sum(axis=1) / (count * (count - 1) * sample.top_k)
    if agree.mean() < (1 + skew(sample)["chance"].mean()) / 2:
        return None
    return _probit((counts + _shares(popularity(sample), sample.top_k)) / (count + 1))


def _favourites(sample: Trace, numbers: IntArray, far: FloatArray) -> tuple[Singles, FloatArray]:
    """Return means by sequence (topics, layers, experts), and the sequences' shares of tokens.

    A sequence's popularity is drawn towards that of all until independent tokens of a sequence
    agree as often as tokens far apart do, `far` (layers,): the rest of it was chance and drift.
    """
    experts, top_k = sample.n_experts, sample.top_k
    topics = max(1, min(int(numbers.max()) + 1, MOST_FAVOURITES // (sample.layers * experts)))
    early = numbers < topics
    tokens = np.bincount(numbers[early], minlength=topics)
    means = np.empty((topics, sample.layers, experts), np.float32)
    for layer, shared in enumerate(_shares(popularity(sample), top_k)):
        known = np.minimum(sample.experts[early, layer], experts).astype(np.int64)
        cells = numbers[early, None] * (experts + 1) + known
        counts = np.bincount(cells.ravel(), minlength=topics * (experts + 1))
        counts = counts.reshape(topics, experts + 1)[:, :experts]
        seen = counts.sum(axis=1, keepdims=True) / top_k  # tokens, less what is missing
        own = counts / np.maximum(seen, 1 / top_k) - shared
        weight = _weight(seen, own, shared, top_k * far[layer])
        means[:, layer] = _probit(shared + weight * own)
    return means, tokens / tokens.sum()


def _weight(seen: FloatArray, own: FloatArray, shared: FloatArray, agreement: float) -> FloatArray:
    """Return how far each sequence keeps its own popularity (topics, 1), 0..1: n / (n + m).

    Bisection for m, so that the mean over tokens of the expected overlap is `agreement`.
    """
    lowest, highest = 2.0**-10, 2.0**30
    for _ in range(50):
        m = np.sqrt(lowest * highest)
        weight = seen / (seen + m)
        expected = ((shared + weight * own) ** 2).sum(axis=1)
        if np.average(expected, weights=seen[:, 0]) > agreement:
            lowest = m
        else:
            highest = m
    return seen / (seen + highest)


def _shares(counts: IntArray, top_k: int) -> FloatArray:
    """Return the probability that a token chooses an expert (layers, experts); none is 0."""
    raised = counts + 0.5
    shares: FloatArray = raised * (top_k / raised.sum(axis=1, keepdims=True))
    return shares


def _probit(shares: FloatArray) -> Singles:
    """Return the means of unit Gaussians that exceed 0 with these probabilities."""
    points = np.linspace(-5, 5, 4097)
    below = [NormalDist().cdf(point) for point in points]
    means: Singles = np.interp(shares, below, points).astype(np.float32)
    return means


def _draw(means: Singles, odds: FloatArray, rng: np.random.Generator) -> Draws:
    """Return means, of topics by their odds, and two independent draws, each (pairs, experts)."""
    experts = means.shape[1]
    pairs = min(max(64, 2**18 // experts), 4096)
    picked = means[rng.choice(len(means), pairs, p=odds)]
    draws = rng.standard_normal((2, pairs, experts), np.float32)
    return picked, draws[0], draws[1]


def _drift_curve(draws: Draws, top_k: int) -> FloatArray:
    """Return the overlap of two tokens' experts by the angle between them (angles,)."""
    mean, draw, other = draws
    first = top(mean + draw, top_k)
    later = (mean + np.cos(angle) * draw + np.sin(angle) * other for angle in _ANGLES)
    return np.array([(first & top(z, top_k)).sum() / (len(mean) * top_k) for z in later])


def _guess_curve(draws: Draws, top_k: int, named: int) -> FloatArray:
    """Return the recall of so many guesses by the predictor's angle to the logits (angles,)."""
    mean, draw, other = draws
    truth = top(mean + draw, top_k)
    guesses = (np.cos(angle) * (mean + draw) + np.sin(angle) * other for angle in _ANGLES)
    return np.array([(truth & top(z, named)).sum() / (len(mean) * top_k) for z in guesses])


def _correlations(curve: FloatArray, overlaps: FloatArray) -> FloatArray:
    """Return the correlations at which a curve has such overlaps, 0 where it is never so low."""
    falling = np.minimum.accumulate(curve)
    correlations: FloatArray = np.cos(np.interp(overlaps, falling[::-1], _ANGLES[::-1]))
    return correlations


def _parts(lags: list[int], pairs: IntArray, correlations: FloatArray) -> tuple[Singles, Singles]:
    """Return memories and variances (parts, layers, 1) of the parts that logits are a sum of.

    The first is noise, the last lasts for a sequence, and in between each remembers four times as
    long as the one before. Their variances sum to 1 and are the best that are not negative, by
    least squares over all subsets of the parts, which are few. Parts of no layer are left out.
    """
    slower = (_FASTEST ** (0.25**i) for i in range(16))
    memories = [0.0, *(m for m in slower if m ** lags[-1] < np.exp(-1)), 1.0]
    importance = np.sqrt([100 * pairs.max(), *pairs])[:, None]
    columns = np.array(memories) ** np.array([0, *lags])[:, None] * importance
    wanted = np.vstack([np.ones(correlations.shape[1]), correlations]) * importance
    variances = np.zeros((len(memories), wanted.shape[1]))
    least = np.full(wanted.shape[1], np.inf)
    for subset in range(1, 2 ** len(memories)):
        part = np.flatnonzero(subset >> np.arange(len(memories)) & 1)
        solved = np.linalg.pinv(columns[:, part]) @ wanted
        errors = ((columns[:, part] @ solved - wanted) ** 2).sum(axis=0)
        better = (solved >= 0).all(axis=0) & (errors < least)
        least[better] = errors[better]
        variances[:, better] = 0
        variances[np.ix_(part, better)] = solved[:, better]
    variances /= variances.sum(axis=0)
    used = variances.any(axis=1) | (np.array(memories) == 0)
    shape = (*variances[used].shape, 1)
    repeated = np.broadcast_to(np.array(memories)[used, None, None], shape)
    return repeated.astype(np.float32), variances[used, :, None].astype(np.float32)


def _sharpness(logits: Singles, weights: Singles) -> float:
    """Return the factor on logits at which softmax gives the first expert its share of weight."""
    top_k = weights.shape[1]
    share = float((weights.max(axis=1) / np.maximum(weights.sum(axis=1), 1e-9)).mean())
    chosen = np.partition(logits, -top_k, axis=1)[:, -top_k:]
    below = chosen - chosen.max(axis=1, keepdims=True)
    low, high = 0.0, 64.0
    for _ in range(24):
        middle = (low + high) / 2
        if (1 / np.exp(middle * below).sum(axis=1)).mean() < share:
            low = middle
        else:
            high = middle
    return high
