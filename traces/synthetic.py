"""A generator of routing that repeats itself as real routing does.

The router's logits of a layer are Gaussians made of a part that never changes, parts that drift
from token to token, some slowly and some fast, and noise; the experts are their top k. Presets are
fitted to recorded traces of Qwen3-30B-A3B and, for other models, to published statistics;
`moesim.traces.fit` makes a `Router` of any trace. Independent draws would halve the hit rate of
small caches, even with the right popularity.
"""

import functools
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from moesim.errors import TraceError
from moesim.traces.format import MISSING, MOST_EXPERTS, Halves, Ids, Trace
from moesim.types import DECODE, PREFILL, FloatArray, IntArray

Singles = npt.NDArray[np.float32]

FIRST_GUESS = 0.72
"""Recall of the guess for layer 1, over that for deeper ones: the embedding says little yet.
A small trained model had .634 against .868 to .891."""


class Router(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """What the logits of each layer are made of: all that the generator knows of a model.

    favourites: means (topics, layers, experts); sequence i has the topic i modulo topics.
    memories, variances: of the drifting parts (parts, layers, 1); a memory is what is left of a
    part after a token. noise: variance of what is new with each token (layers, 1).
    opening: means of the first token of a sequence (layers, experts), where it has its own: many
    models park attention on it, whatever it is.
    sharpness: of logits inside the softmax that gives weights, weight_sum: their sum (layers, 1).
    """

    top_k: int
    favourites: Singles
    memories: Singles
    variances: Singles
    noise: Singles
    opening: Singles | None = None
    sharpness: Singles
    weight_sum: Singles


class Guesser(msgspec.Struct, frozen=True, eq=False):
    """A predictor: noisy copies of the logits so correlated (layers,), of which it keeps `width`.

    NaN for the layers that it does not guess.
    """

    correlations: Singles
    width: int


class Choices(NamedTuple):
    """Generated routing: ids and weights (tokens, layers, top_k), guesses by predictor."""

    experts: Ids
    weights: Halves
    candidates: dict[str, Ids]


class Drift(msgspec.Struct, frozen=True):
    """Variances of the drifting parts, and how much of the fast one survives a token."""

    domain: float
    slow: float
    fast: float
    fast_memory: float = 0.5


class Preset(msgspec.Struct, frozen=True):
    """A model's shape and the variances of its logits; what is left to 1 is noise.

    depth: exceptions, each from that layer on until the next one.
    """

    model: str
    layers: int
    experts: int
    top_k: int
    drift: Drift
    base: float = 0.02
    slow_memory: float = 0.996
    depth: tuple[tuple[int, Drift], ...] = ()


def _implied(
    same_domain: float, lag256: float, lag16: float, lag1: float, memory: float = 0.487
) -> Drift:
    """Return the variances behind logit correlations at a lag; they were read off overlaps.

    Where so short a memory asks for more fast variance than is left, it is all that is left, and
    remembered for longer: lag 1 is met in any case.
    """
    slow = lag16 + 0.15 * (lag16 - lag256) - same_domain
    shared = max(0.0, lag1 - same_domain - slow)
    fast = min(shared / memory, 1 - same_domain - slow)
    return Drift(same_domain, slow, fast, shared / fast if fast else 0.0)


_QWEN3 = (
    (0, _implied(0.16, 0.17, 0.23, 0.22)),
    (1, _implied(0.20, 0.22, 0.29, 0.50, 0.12)),
    (2, _implied(0.36, 0.38, 0.44, 0.61, 0.12)),
    (3, _implied(0.32, 0.36, 0.43, 0.67)),
    (4, _implied(0.44, 0.49, 0.57, 0.77)),
    (16, _implied(0.48, 0.54, 0.63, 0.79)),
    (32, _implied(0.46, 0.51, 0.59, 0.77)),
    (46, _implied(0.46, 0.49, 0.57, 0.70)),
    (47, _implied(0.30, 0.32, 0.40, 0.51, 0.12)),
)

PRESETS = {
    "qwen3-30b": Preset(
        *("qwen3-30b-a3b", 48, 128, 8, Drift(0.450, 0.147, 0.326, 0.487)),
        base=0.0,
        slow_memory=0.9967,
        depth=_QWEN3,
    ),
    "mixtral": Preset(
        *("mixtral-8x7b", 32, 8, 2, Drift(0.06, 0.018, 0.30)),
        depth=((0, Drift(0.02, 0.02, 0.02)), (1, Drift(0.06, 0.018, 0.30))),
    ),
    "deepseek-v2-lite": Preset("deepseek-v2-lite", 26, 64, 6, Drift(0.15, 0.045, 0.30)),
    "olmoe": Preset("olmoe-1b-7b", 16, 64, 8, Drift(0.30, 0.09, 0.20)),
    "phi-3.5": Preset("phi-3.5-moe", 32, 16, 2, Drift(0.30, 0.09, 0.20)),
    "qwen1.5-moe": Preset("qwen1.5-moe-a2.7b", 24, 60, 4, Drift(0.06, 0.018, 0.20)),
    "qwen2-57b": Preset("qwen2-57b-a14b", 28, 64, 8, Drift(0.15, 0.045, 0.30)),
}
"""Fitted variances. All but qwen3-30b rest on one or two published statistics each."""


def synthesize(
    preset: str = "qwen3-30b",
    *,
    layers: int | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    sequences: int = 8,
    prompt: int = 64,
    generate: int = 64,
    domains: int = 2,
    seed: int = 0,
    recall: float = 0.9,
    distances: int = 3,
    residual_recall: float | None = None,
    width: int | None = None,
) -> Trace:
    """Return a made-up trace: `prompt` prefill and `generate` - 1 decode rows per sequence.

    Every sequence is a document of its own, and the domains take turns. Predictors `gate1` to
    `gate<distances>` are noisy copies of the logits: `recall` is the share of the experts that
    gate1's first top_k candidates name, further ones are worse as noise adds up from layer to
    layer. `residual_recall` adds `residual1`. `width` candidates are kept, 3 x top_k unless given.
    Weights are a softmax over the chosen in steps of 1/256. The shape is the preset's unless
    given; its variation with depth is stretched to the number of layers.

    The same arguments give the same trace; how many predictors there are does not change routing.
    Raises TraceError for what cannot be made.
    """
    if preset not in PRESETS:
        raise TraceError(f"no preset named {preset!r}; there are: {', '.join(sorted(PRESETS))}")
    model = PRESETS[preset]
    shape = (layers or model.layers, experts or model.experts, top_k or model.top_k)
    layers, experts, top_k = shape
    width = min(3 * top_k, experts) if width is None else width
    within("layers", layers, 1, 4096)
    within("experts", experts, 2, MISSING - 1)
    within("top_k", top_k, 1, experts)
    within("width", width, 1, experts)
    within("sequences", sequences, 1, 2**20)
    within("prompt", prompt, 1, 2**24)
    within("generate", generate, 1, 2**24)
    within("domains", domains, 1, 2**16)
    within("distances", distances, 0, 64)
    within("seed", seed, 0, 2**63 - 1)
    rows = prompt + generate - 1
    within("layers x experts", layers * experts, 1, MOST_EXPERTS)
    within("tokens x layers x top_k", sequences * rows * layers * top_k, 1, 2**30)

    clean = _path_correlations(experts, top_k, recall, layers)
    correlations = {f"gate{d}": _ahead(clean, d) for d in range(1, min(distances, layers - 1) + 1)}
    if residual_recall is not None:
        path = _path_correlations(experts, top_k, residual_recall, layers)
        correlations["residual1"] = _ahead(path, 1)
    guessers = {name: Guesser(by_layer, width) for name, by_layer in correlations.items()}

    rng = np.random.default_rng([seed, 0])
    router = _router(model, layers, experts, top_k, min(domains, sequences), rng)
    tokens = np.arange(sequences * rows)
    starts = np.arange(sequences + 1) * rows
    choices = choose(router, guessers, tokens, starts, rng, np.random.default_rng([seed, 1]))

    per_sequence = np.arange(rows)
    parameters = {
        "layers": layers,
        "experts": experts,
        "top_k": top_k,
        "sequences": sequences,
        "prompt": prompt,
        "generate": generate,
        "domains": domains,
        "recall": recall,
        "distances": distances,
        "residual_recall": residual_recall,
        "width": width,
    }
    return Trace(
        experts=choices.experts,
        weights=choices.weights,
        layer_ids=np.arange(layers, dtype=np.int32),
        phase=np.tile(np.where(per_sequence < prompt, PREFILL, DECODE), sequences).astype(np.uint8),
        sequence=np.repeat(np.arange(sequences, dtype=np.int32), rows),
        position=np.tile(per_sequence, sequences).astype(np.int32),
        candidates=choices.candidates,
        meta={
            "model": model.model,
            "num_experts": experts,
            "id_space": "logical",
            "has_rank_order": True,
            "importer": "synthetic",
            "generator": "gaussian-logits",
            "preset": preset,
            "parameters": parameters,
            "seed": seed,
        },
    )


def choose(
    router: Router,
    guessers: dict[str, Guesser],
    rows: IntArray,
    starts: IntArray,
    rng: np.random.Generator,
    noise: np.random.Generator,
) -> Choices:
    """Return the routing of as many tokens as there are rows, and what predictors guess of it.

    Sequence i is computed to the rows `rows[starts[i]:starts[i + 1]]`, as `rows_by_sequence` has
    them. `rng` draws logits, `noise` the errors of predictors, which so change no routing.
    """
    layers = router.favourites.shape[1]
    ids = np.empty((len(rows), layers, router.top_k), np.uint16)
    weights = np.empty(ids.shape, np.float16)
    candidates = {
        name: np.full((len(rows), layers, guesser.width), MISSING, np.uint16)
        for name, guesser in guessers.items()
    }
    for first, logits in _logits(router, starts, rng):
        part = rows[first : first + len(logits)]
        best = best_first(logits, router.top_k)
        chosen = router.sharpness * np.take_along_axis(logits, best.astype(np.int64), axis=-1)
        ids[part], weights[part] = best, router.weight_sum * _softmax(chosen)
        for name, guesser in guessers.items():
            made = np.flatnonzero(~np.isnan(guesser.correlations))
            guess = blur(logits[:, made], guesser.correlations[made, None], noise)
            candidates[name][part[:, None], made] = best_first(guess, guesser.width)
    return Choices(ids, weights, candidates)


def overlap(
    experts: int, top_k: int, correlation: float, pairs: int = 20_000, seed: int = 0
) -> float:
    """Return E |top-k of x and top-k of y| / k for unit Gaussian vectors so correlated.

    A Monte Carlo mean over `pairs`; 20,000 of them are within .003 of the truth.
    """
    rng = np.random.default_rng(seed)
    found = 0
    for count in _blocks(pairs, 2**20 // experts + 1):
        x = rng.standard_normal((count, experts), np.float32)
        y = blur(x, np.float32(correlation), rng)
        found += int((top(x, top_k) & top(y, top_k)).sum())
    return found / (pairs * top_k)


@functools.cache
def correlation_for(experts: int, top_k: int, recall: float) -> float:
    """Return the correlation of logits at which two top-k choices share `recall` of their experts.

    Bisection over `overlap` with the same draws; 0 for a recall below chance.
    Raises TraceError for a recall outside 0..1.
    """
    if not 0 <= recall <= 1:
        raise TraceError(f"a recall of {recall} is impossible; legal are 0..1")
    if recall == 1:
        return 1.0
    pairs = max(2_000, 2**19 // experts)
    low, high = 0.0, 1.0
    for _ in range(14):
        middle = (low + high) / 2
        if overlap(experts, top_k, middle, pairs) < recall:
            low = middle
        else:
            high = middle
    return low if low == 0 else (low + high) / 2


def blur(
    logits: Singles, correlation: float | np.float32 | Singles, rng: np.random.Generator
) -> Singles:
    """Return unit Gaussian logits so correlated with the given ones: r z + sqrt(1 - r^2) noise."""
    r = np.asarray(correlation, np.float32)
    noise = rng.standard_normal(logits.shape, np.float32)
    blurred: Singles = r * logits + np.sqrt(1 - r * r) * noise
    return blurred


def best_first(scores: Singles, width: int) -> Ids:
    """Return the ids of the `width` largest scores along the last axis, largest first."""
    largest = np.argpartition(scores, -width, axis=-1)[..., -width:]
    order = np.argsort(-np.take_along_axis(scores, largest, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(largest, order, axis=-1).astype(np.uint16)


def top(scores: Singles, top_k: int) -> npt.NDArray[np.bool_]:
    """Return which scores are the `top_k` largest along the last axis."""
    least = np.partition(scores, -top_k, axis=-1)[..., -top_k, None]
    return scores >= least


def _softmax(logits: Singles) -> Halves:
    powers = np.exp((logits - logits.max(axis=-1, keepdims=True)).astype(np.float64))
    steps = np.round(256 * powers / powers.sum(axis=-1, keepdims=True))
    weights: Halves = (np.maximum(steps, 1) / 256).astype(np.float16)
    return weights


def within(name: str, value: int, least: int, most: int) -> None:
    """Raise TraceError, naming what is legal, unless least <= value <= most."""
    if not least <= value <= most:
        raise TraceError(f"{name} is {value}; legal are {least}..{most}")


def _blocks(total: int, size: int) -> Iterator[int]:
    for first in range(0, total, size):
        yield min(size, total - first)


def _path_correlations(experts: int, top_k: int, recall: float, layers: int) -> FloatArray:
    """Return the correlation of a guess one layer ahead, by the layer guessed (layers,)."""
    correlations = np.full(layers, correlation_for(experts, top_k, recall))
    correlations[:2] = correlation_for(experts, top_k, recall * FIRST_GUESS)
    return correlations


def _ahead(path: FloatArray, distance: int) -> Singles:
    """Return the correlation of guesses `distance` ahead (layers,), NaN for the first layers."""
    hops = [path[distance - hop : len(path) - hop] for hop in range(distance)]
    correlations = np.full(len(path), np.nan, np.float32)
    correlations[distance:] = np.prod(hops, axis=0)
    return correlations


def _by_layer(model: Preset, layers: int) -> tuple[Singles, ...]:
    """Return domain, slow and fast variance and fast memory, each (layers, 1)."""
    drifts = [model.drift] * model.layers
    for first, drift in model.depth:
        drifts[first:] = [drift] * (model.layers - first)
    stretch = (model.layers - 1) / max(layers - 1, 1)
    chosen = [drifts[round(layer * stretch)] for layer in range(layers)]
    fields = [[d.domain, d.slow, d.fast, d.fast_memory] for d in chosen]
    return tuple(np.array(column, np.float32)[:, None] for column in zip(*fields, strict=True))


def _router(
    model: Preset, layers: int, experts: int, top_k: int, topics: int, rng: np.random.Generator
) -> Router:
    domain, slow, fast, fast_memory = _by_layer(model, layers)
    lasting = np.sqrt(np.float32(model.base)) * rng.standard_normal((layers, experts), np.float32)
    own = np.sqrt(domain) * rng.standard_normal((topics, layers, experts), np.float32)
    return Router(
        top_k=top_k,
        favourites=lasting + own,
        memories=np.stack([np.full_like(fast_memory, model.slow_memory), fast_memory]),
        variances=np.stack([slow, fast]),
        noise=np.maximum(0, 1 - model.base - domain - slow - fast),
        sharpness=np.ones((layers, 1), np.float32),
        weight_sum=np.ones((layers, 1), np.float32),
    )


def _logits(
    router: Router, starts: IntArray, rng: np.random.Generator
) -> Iterator[tuple[int, Singles]]:
    """Yield the first token and the logits (tokens, layers, experts) of one block after another."""
    topics, layers, experts = router.favourites.shape

    def draw(*shape: int) -> Singles:
        return rng.standard_normal((*shape, layers, experts), np.float32)

    noise, amplitudes = np.sqrt(router.noise), np.sqrt(router.variances)
    renewed = np.sqrt(1 - router.memories**2)
    block = max(1, 2**20 // (layers * experts))
    for sequence, (start, end) in enumerate(pairwise(starts.tolist())):
        fixed = router.favourites[sequence % topics]
        parts = [draw() for _ in amplitudes]
        first = start
        for count in _blocks(end - start, block):
            steps = [step * draw(count) for step in renewed]
            logits = noise * draw(count)
            for token in range(count):
                mean = fixed
                if router.opening is not None and first + token == start:
                    mean = router.opening
                for i, memory in enumerate(router.memories):
                    parts[i] = memory * parts[i] + steps[i][token]
                    mean = mean + amplitudes[i] * parts[i]
                logits[token] += mean
            yield first, logits
            first += count
