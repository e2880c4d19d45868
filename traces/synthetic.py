"""A generator of routing that repeats itself as real routing does.

The router's logits of a layer are unit Gaussians made of a part that never changes, one per domain,
a slow and a fast one that drift from token to token, and noise; the experts are their top k. Fitted
to recorded traces of Qwen3-30B-A3B and, for other models, to published statistics. Independent
draws would halve the hit rate of small caches, even with the right popularity.
"""

import functools
from collections.abc import Iterator

import msgspec
import numpy as np
import numpy.typing as npt

from moesim.errors import TraceError
from moesim.traces.format import MISSING, MOST_EXPERTS, Halves, Ids, Trace
from moesim.types import DECODE, PREFILL, FloatArray

Singles = npt.NDArray[np.float32]

FIRST_GUESS = 0.72
"""Recall of the guess for layer 1, over that for deeper ones: the embedding says little yet.
A small trained model had .634 against .868 to .891."""


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
    _within("layers", layers, 1, 4096)
    _within("experts", experts, 2, MISSING - 1)
    _within("top_k", top_k, 1, experts)
    _within("width", width, 1, experts)
    _within("sequences", sequences, 1, 2**20)
    _within("prompt", prompt, 1, 2**24)
    _within("generate", generate, 1, 2**24)
    _within("domains", domains, 1, 2**16)
    _within("distances", distances, 0, 64)
    _within("seed", seed, 0, 2**63 - 1)
    rows = prompt + generate - 1
    _within("layers x experts", layers * experts, 1, MOST_EXPERTS)
    _within("tokens x layers x top_k", sequences * rows * layers * top_k, 1, 2**30)

    clean = _path_correlations(experts, top_k, recall, layers)
    correlations = {f"gate{d}": _ahead(clean, d) for d in range(1, min(distances, layers - 1) + 1)}
    if residual_recall is not None:
        path = _path_correlations(experts, top_k, residual_recall, layers)
        correlations["residual1"] = _ahead(path, 1)

    noise = np.random.default_rng([seed, 1])
    ids = np.empty((sequences * rows, layers, top_k), np.uint16)
    weights = np.empty(ids.shape, np.float16)
    guesses = {n: np.full((len(ids), layers, width), MISSING, np.uint16) for n in correlations}
    drawn = _logits(model, layers, experts, sequences, rows, domains, seed)
    for first, logits in drawn:
        part = slice(first, first + len(logits))
        ids[part] = best_first(logits, top_k)
        weights[part] = _softmax(np.take_along_axis(logits, ids[part].astype(np.int64), axis=-1))
        for name, by_layer in correlations.items():
            start = layers - len(by_layer)  # nothing can be guessed for the first layers
            guess = blur(logits[:, start:], by_layer[:, None], noise)
            guesses[name][part, start:] = best_first(guess, width)

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
        experts=ids,
        weights=weights,
        layer_ids=np.arange(layers, dtype=np.int32),
        phase=np.tile(np.where(per_sequence < prompt, PREFILL, DECODE), sequences).astype(np.uint8),
        sequence=np.repeat(np.arange(sequences, dtype=np.int32), rows),
        position=np.tile(per_sequence, sequences).astype(np.int32),
        candidates=guesses,
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
        found += int((_top(x, top_k) & _top(y, top_k)).sum())
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


def _top(scores: Singles, top_k: int) -> npt.NDArray[np.bool_]:
    least = np.partition(scores, -top_k, axis=-1)[..., -top_k, None]
    return scores >= least


def _softmax(logits: Singles) -> Halves:
    powers = np.exp((logits - logits.max(axis=-1, keepdims=True)).astype(np.float64))
    steps = np.round(256 * powers / powers.sum(axis=-1, keepdims=True))
    weights: Halves = (np.maximum(steps, 1) / 256).astype(np.float16)
    return weights


def _within(name: str, value: int, least: int, most: int) -> None:
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
    """Return the correlation of guesses `distance` ahead, for layers `distance` and deeper."""
    hops = [path[distance - hop : len(path) - hop] for hop in range(distance)]
    correlations: Singles = np.prod(hops, axis=0).astype(np.float32)
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


def _logits(
    model: Preset, layers: int, experts: int, sequences: int, rows: int, domains: int, seed: int
) -> Iterator[tuple[int, Singles]]:
    """Yield the first row and the logits (tokens, layers, experts) of one block after another."""
    rng = np.random.default_rng([seed, 0])

    def draw(*shape: int) -> Singles:
        return rng.standard_normal((*shape, layers, experts), np.float32)

    domain, slow, fast, fast_memory = _by_layer(model, layers)
    noise = np.sqrt(np.maximum(0, 1 - model.base - domain - slow - fast))
    lasting = np.sqrt(np.float32(model.base)) * draw()
    topics = np.sqrt(domain) * draw(min(domains, sequences))
    slow_memory = np.float32(model.slow_memory)
    block = max(1, 2**20 // (layers * experts))
    for sequence in range(sequences):
        fixed = lasting + topics[sequence % domains]
        slow_part, fast_part = draw(), draw()
        done = 0
        for count in _blocks(rows, block):
            slow_steps = np.sqrt(1 - slow_memory**2) * draw(count)
            fast_steps = np.sqrt(1 - fast_memory**2) * draw(count)
            logits = noise * draw(count)
            for token in range(count):
                slow_part = slow_memory * slow_part + slow_steps[token]
                fast_part = fast_memory * fast_part + fast_steps[token]
                logits[token] += fixed + np.sqrt(slow) * slow_part + np.sqrt(fast) * fast_part
            yield sequence * rows + done, logits
            done += count
