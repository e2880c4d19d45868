"""Guesses of the experts a layer will choose, recorded or derived, computed before a run.

A guess never depends on the policy, and never on what is not known yet: the derived ones learn a
step only after it is over, or beforehand from other sequences: those of the trace of which the run
serves no token. The two that do see the future are listed in SEES_FUTURE.

Guesses made of a layer's input or choice leave out the first `distance` layers. For layer 0 alone,
a trace may hold `wrap1`: its router's choice on what the last one saw of the token before (MoEPic).
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from moesim.errors import TraceError
from moesim.traces.format import MISSING, Ids, Trace, rows_by_sequence
from moesim.traces.synthetic import best_first, blur, correlation_for
from moesim.traces.workload import Steps
from moesim.types import FloatArray, IntArray

Scores = npt.NDArray[np.float32]
T = TypeVar("T", bound=np.generic)

DERIVED = (
    "activation",
    "noisy-oracle",
    "oracle",
    "popularity",
    "popularity-offline",
    "previous",
    "transition",
    "transition-offline",
)
"""Guesses that need nothing but the routing itself."""

SEES_FUTURE = frozenset({"oracle", "noisy-oracle"})

NEEDS_CHOICE = frozenset({"activation", "transition", "transition-offline"})
"""Guesses from what the layer has chosen where they are made."""

OFFLINE = frozenset({"popularity-offline", "transition-offline"})
"""Learned beforehand, from other sequences of the trace; without them there is no guess."""

MOST_MATRICES = 1_000
"""Past sequences that `activation` remembers (the size that MoE-Infinity is run with)."""

_MOST_CELLS = 2**28
_CHUNK = 128
"""Tokens handled at once: bounds the memory of a long prefill."""


def recorded(trace: Trace) -> list[str]:
    """Return the predictors whose guesses the trace holds, `router` (its own choice) left out."""
    return sorted(name for name in trace.candidates if name != "router")


def resolve(trace: Trace, wanted: str, distance: int, *, after_gate: bool = True) -> str:
    """Return the predictor that `wanted` means for guesses `distance` layers ahead.

    `auto` is the best there is: `residual<distance>`, else `gate<distance>`, else `transition`, or
    `popularity` if the guess is made before the gate.

    Raises TraceError if there is no such predictor, or if its guess would not exist yet: it was
    recorded fewer layers ahead, or needs what the gate is still to choose.
    """
    there = recorded(trace)
    if wanted == "auto":
        names = (f"residual{distance}", f"gate{distance}")
        derived = "transition" if after_gate else "popularity"
        return next((name for name in names if name in there), derived)
    if wanted in NEEDS_CHOICE and not after_gate:
        legal = ", ".join([*there, *(name for name in DERIVED if name not in NEEDS_CHOICE)])
        raise TraceError(
            f"predictor {wanted!r} needs the layer's choice and cannot guess before the gate; "
            f"those that can: {legal}"
        )
    if wanted in DERIVED:
        return wanted
    if wanted not in there:
        raise TraceError(f"no predictor {wanted!r}; there are: {', '.join([*there, *DERIVED])}")
    made = re.search(r"\d+$", wanted)
    if made and int(made[0]) < distance:
        raise TraceError(
            f"predictor {wanted!r} guesses {made[0]} layers ahead; {distance} were asked for"
        )
    return wanted


def guess(
    trace: Trace,
    steps: Steps,
    name: str,
    distance: int,
    width: int,
    *,
    recall: float = 0.9,
    seed: int = 0,
) -> tuple[Ids, Scores | None]:
    """Return a predictor's guesses (R, layers, width) for the rows of `steps`, and their scores.

    Indexed by the layer guessed, `distance` layers after the one where the guess is made; best
    first, MISSING where there is none, scored 0 there. Scores are comparable inside one (row,
    layer) only; None if the predictor has none. `recall` and `seed` belong to `noisy-oracle`.

    transition: the experts that most often followed this token's, `distance` layers before
    (Klotski's correlation table). transition-offline: the same, learned beforehand.
    activation: what the most similar of past sequences used (MoE-Infinity, arXiv 2401.14361): of
    the matrices of their token counts (layers, experts), the one whose rows up to the layer where
    the guess is made have the highest mean cosine similarity to those of this sequence so far, this
    step included. Scores are shares of the guessed layer's tokens x (1 - distance / layers). Past
    are other sequences, in file order, then those of the run as they end; beyond MOST_MATRICES, one
    replaces the most similar.
    previous: what the sequence's token before chose, if that was in an earlier step.
    popularity: the experts most often chosen so far in the run. popularity-offline: beforehand.
    oracle: the truth. noisy-oracle: the truth through noise on made-up logits, so that its first
    top_k candidates name `recall` of the experts on average (Gaussian noise, since a real gate errs
    where the margin is thin; random flips would not).

    Raises TraceError for an unknown name, values out of range, tables too large to keep, or an
    offline predictor where the run leaves no other sequence to learn from.
    """
    if width < 1 or distance < 1:
        raise TraceError(f"width {width} and distance {distance} must both be at least 1")
    name = resolve(trace, name, distance)
    truth, experts = trace.experts[steps.rows], trace.n_experts
    taught = _taught(trace, steps, name) if name in OFFLINE else None
    match name:
        case "oracle" | "previous":
            ids = truth if name == "oracle" else _previous(truth, steps)
            return _fit(ids, width, MISSING), None
        case "noisy-oracle":
            correlation = correlation_for(experts, trace.top_k, recall)
            return _noisy(truth, experts, correlation, width, seed)
        case "popularity" | "popularity-offline":
            return _popularity(truth, taught, steps, experts, width)
        case "transition" | "transition-offline":
            return _transition(truth, taught, steps, experts, distance, width)
        case "activation":
            return _activation(trace, steps, distance, width)
    return _recorded(trace, steps, name, width)


def _step_ranges(steps: Steps) -> Iterator[slice]:
    for start, end in zip(steps.offset[:, 0], steps.offset[:, -1], strict=True):
        yield slice(int(start), int(end))


def _chunks(part: slice) -> Iterator[slice]:
    for start in range(part.start, part.stop, _CHUNK):
        yield slice(start, min(start + _CHUNK, part.stop))


def _fit(array: npt.NDArray[T], width: int, fill: int) -> npt.NDArray[T]:
    """Return the array cut or padded to `width` along its last axis."""
    fitted = np.full((*array.shape[:-1], width), fill, array.dtype)
    kept = min(width, array.shape[-1])
    fitted[..., :kept] = array[..., :kept]
    return fitted


def _recorded(trace: Trace, steps: Steps, name: str, width: int) -> tuple[Ids, Scores | None]:
    ids = _fit(trace.candidates[name][steps.rows], width, MISSING)
    if name not in trace.candidate_scores:
        return ids, None
    scores = _fit(trace.candidate_scores[name][steps.rows].astype(np.float32), width, 0)
    return ids, np.where(ids == MISSING, np.float32(0), scores)


def _others(trace: Trace, steps: Steps) -> Iterator[Ids]:
    """Yield the truth of each sequence of the trace of which no row is in `steps`."""
    rows, starts = rows_by_sequence(trace)
    served = np.isin(trace.sequence, trace.sequence[steps.rows])
    for start, end in pairwise(starts):
        if not served[rows[start]]:
            yield trace.experts[rows[start:end]]


def _taught(trace: Trace, steps: Steps, name: str) -> Ids:
    """Return the truth that an offline predictor learns from (tokens, layers, top_k)."""
    others = list(_others(trace, steps))
    if not others:
        raise TraceError(
            f"predictor {name!r} learns from sequences of the trace that the run does not serve, "
            f"and it serves all of them; serve fewer, or take {name.removesuffix('-offline')!r}"
        )
    return np.concatenate(others)


def _known(ids: Ids, experts: int) -> IntArray:
    """Return ids as indices, what is missing as `experts`, one past the last."""
    return np.minimum(ids, experts).astype(np.int64)


def _counts(truth: Ids, experts: int) -> IntArray:
    """Return how many tokens use each expert (layers, experts)."""
    layers = truth.shape[1]
    cells = _known(truth, experts) + np.arange(layers)[:, None] * (experts + 1)
    counts = np.bincount(cells.ravel(), minlength=layers * (experts + 1))
    return counts.reshape(layers, experts + 1)[:, :experts]


def _check_cells(name: str, what: str, cells: int) -> None:
    if cells > _MOST_CELLS:
        raise TraceError(
            f"predictor {name!r} needs {what}, which is too large; legal are {_MOST_CELLS} cells"
        )


def _most_counted(counts: IntArray, width: int) -> tuple[Ids, Scores]:
    """Return the largest counts along the last axis, lowest id first among equals, no zeros."""
    experts = counts.shape[-1]
    kept = min(width, experts)
    keys = counts * experts + np.arange(experts - 1, -1, -1)
    keys = -np.sort(-np.partition(keys, experts - kept, axis=-1)[..., experts - kept :], axis=-1)
    found = keys // experts
    ids = np.where(found > 0, experts - 1 - keys % experts, MISSING).astype(np.uint16)
    return _fit(ids, width, MISSING), _fit(found.astype(np.float32), width, 0)


def rows_before(steps: Steps) -> IntArray:
    """Return the row of the token before each (R,), if that is of an earlier step; else -1.

    Inside a prefill, the token before is routed at the same time and tells nothing.
    """
    rows = np.full(len(steps.rows), -1, np.int64)
    order = np.argsort(steps.sequence, kind="stable")
    before, after = order[:-1], order[1:]
    step = np.searchsorted(steps.offset[:, -1], np.arange(len(rows)), side="right")
    known = (step[before] < step[after]) & (steps.sequence[before] == steps.sequence[after])
    rows[after[known]] = before[known]
    return rows


def _previous(truth: Ids, steps: Steps) -> Ids:
    rows = rows_before(steps)
    return np.where((rows < 0)[:, None, None], np.uint16(MISSING), truth[rows])


def _popularity(
    truth: Ids, taught: Ids | None, steps: Steps, experts: int, width: int
) -> tuple[Ids, Scores]:
    """Guess from what was `taught` beforehand; if that is None, from what the run itself shows."""
    rows, layers, _ = truth.shape
    ids, scores = np.empty((rows, layers, width), np.uint16), np.empty((rows, layers, width), "f4")
    counts = _counts(truth[:0] if taught is None else taught, experts)
    for step in _step_ranges(steps) if taught is None else [slice(0, rows)]:
        ids[step], scores[step] = _most_counted(counts, width)
        if taught is None:
            counts += _counts(truth[step], experts)
    return ids, scores


def _transition(
    truth: Ids, taught: Ids | None, steps: Steps, experts: int, distance: int, width: int
) -> tuple[Ids, Scores]:
    """Guess as `_popularity` does, from pairs of a layer and one `distance` after it."""
    rows, layers, top_k = truth.shape
    ids = np.full((rows, layers, width), MISSING, np.uint16)
    scores = np.zeros((rows, layers, width), np.float32)
    pairs = layers - distance
    if pairs < 1:
        return ids, scores
    what = f"a table of {experts} x {experts} for {pairs} layers"
    _check_cells("transition", what, pairs * (experts + 1) ** 2)
    followed = np.zeros((pairs, experts + 1, experts + 1), np.int32)
    if taught is not None:
        _count_followers(followed, taught, distance)
    layer = np.arange(pairs)
    for step in _step_ranges(steps) if taught is None else [slice(0, rows)]:
        for part in _chunks(step):
            source = _known(truth[part, :pairs], experts)
            counts = np.zeros((len(source), pairs, experts + 1), np.int64)
            for slot in range(top_k):
                counts += followed[layer, source[:, :, slot]]
            counts[source.min(axis=-1) == experts] = 0
            guessed = _most_counted(counts[..., :experts], width)
            ids[part, distance:], scores[part, distance:] = guessed
        if taught is None:
            _count_followers(followed, truth[step], distance)
    return ids, scores


def _count_followers(followed: npt.NDArray[np.int32], truth: Ids, distance: int) -> None:
    """Add which experts followed which to a table (layers, experts + 1, experts + 1)."""
    pairs, side, _ = followed.shape
    flat = followed.reshape(-1)
    layer = np.arange(pairs)[:, None]
    for part in _chunks(slice(0, len(truth))):
        source = _known(truth[part, :pairs], side - 1)
        target = _known(truth[part, distance:], side - 1)
        cells = (layer * side + source)[..., :, None] * side + target[..., None, :]
        known = (source < side - 1)[..., :, None] & (target < side - 1)[..., None, :]
        for one, there in zip(cells, known, strict=True):
            flat[one[there]] += 1  # a token's pairs all differ; np.add.at takes ten times as long


class _Past(NamedTuple):
    """What `activation` remembers of up to N sequences."""

    used: FloatArray
    """(N, layers, experts): counts of tokens, those of each layer scaled to length 1."""
    ids: Ids
    """(N, layers, width): the experts of each layer, most used first."""
    shares: Scores
    """(N, layers, width): what share of the layer's choices they were."""


def _activation(trace: Trace, steps: Steps, distance: int, width: int) -> tuple[Ids, Scores]:
    truth, experts = trace.experts[steps.rows], trace.n_experts
    rows, layers, _ = truth.shape
    ids = np.full((rows, layers, width), MISSING, np.uint16)
    scores = np.zeros((rows, layers, width), np.float32)
    if distance >= layers:
        return ids, scores
    others = list(_others(trace, steps))
    last = dict(zip(steps.sequence.tolist(), range(rows), strict=True))
    size = min(len(others) + len(last), MOST_MATRICES)
    what = f"{size + len(last)} matrices of {layers} layers x {experts} experts"
    _check_cells("activation", what, (size + len(last)) * layers * experts)
    past = _Past(
        np.zeros((size, layers, experts)),
        np.full((size, layers, width), MISSING, np.uint16),
        np.zeros((size, layers, width), np.float32),
    )
    held = 0
    for other in others:
        held = _remember(past, held, _counts(other, experts))
    so_far = {sequence: np.zeros((layers, experts), np.int64) for sequence in last}
    layer = np.arange(distance, layers)
    for step in _step_ranges(steps):
        sequences, first = np.unique(steps.sequence[step], return_index=True)
        for part in _parts(step, first):
            counts = so_far[int(steps.sequence[part.start])]
            counts += _counts(truth[part], experts)
            if held:
                nearest = _nearest(past, held, counts)[:-distance]
                ids[part, distance:] = past.ids[nearest, layer]
                scores[part, distance:] = past.shares[nearest, layer] * (1 - distance / layers)
        for sequence in sequences.tolist():
            if last[sequence] < step.stop:
                held = _remember(past, held, so_far.pop(sequence))
    return ids, scores


def _parts(step: slice, first: IntArray) -> Iterator[slice]:
    """Yield the rows of each sequence of a step, given where each one starts inside it."""
    for start, end in pairwise([*np.sort(first).tolist(), step.stop - step.start]):
        yield slice(step.start + start, step.start + end)


def _nearest(past: _Past, held: int, counts: IntArray) -> IntArray:
    """Return, for each layer, the past sequence most alike in the layers up to it (layers,)."""
    alike = np.einsum("nle,le->nl", past.used[:held], _unit(counts))
    nearest: IntArray = np.argmax(np.cumsum(alike, axis=1), axis=0)
    return nearest


def _unit(counts: IntArray) -> FloatArray:
    """Return each row scaled to length 1; zeros stay zeros, and are like nothing."""
    length = np.sqrt((counts**2).sum(axis=1, keepdims=True))
    unit: FloatArray = counts / np.maximum(length, 1)
    return unit


def _remember(past: _Past, held: int, counts: IntArray) -> int:
    """Add a sequence's counts (layers, experts), and return how many sequences are held."""
    full = held == len(past.used)
    at = int(_nearest(past, held, counts)[-1]) if full else held
    past.used[at] = _unit(counts)
    past.ids[at], most = _most_counted(counts, past.ids.shape[-1])
    past.shares[at] = most / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return held if full else held + 1


def _noisy(
    truth: Ids, experts: int, correlation: float, width: int, seed: int
) -> tuple[Ids, Scores]:
    rows, layers, _ = truth.shape
    kept = min(width, experts)
    ids = np.full((rows, layers, width), MISSING, np.uint16)
    scores = np.zeros((rows, layers, width), np.float32)
    rng = np.random.default_rng(seed)
    for part in _chunks(slice(0, rows)):
        guessed = blur(_logits_of(truth[part], experts, rng), correlation, rng)
        best = best_first(guessed, kept)
        ids[part, :, :kept] = best
        scores[part, :, :kept] = np.take_along_axis(guessed, best.astype(np.int64), axis=-1)
    return ids, scores


def _logits_of(chosen: Ids, experts: int, rng: np.random.Generator) -> Scores:
    """Return Gaussian logits whose largest are the chosen experts', in rank order.

    Draws stay where they fell, except that chosen experts get the largest: those that had them
    get the draws of the chosen in return, which keeps the others in random order.
    """
    draws = rng.standard_normal((*chosen.shape[:-1], experts), np.float32)
    top_k = chosen.shape[-1]
    largest = -np.sort(-np.partition(draws, -top_k, axis=-1)[..., -top_k:], axis=-1)
    known = (chosen != MISSING).sum(axis=-1, keepdims=True)
    least = np.take_along_axis(largest, np.maximum(known - 1, 0), axis=-1)
    lucky = (draws >= least) & (known > 0)
    wanted = np.zeros((*chosen.shape[:-1], experts + 1), np.bool_)
    np.put_along_axis(wanted, _known(chosen, experts), True, axis=-1)
    wanted = wanted[..., :experts]
    logits = draws.copy()
    logits[lucky & ~wanted] = draws[wanted & ~lucky]
    row, layer, slot = np.nonzero(chosen != MISSING)
    rank = np.cumsum(chosen != MISSING, axis=-1)[row, layer, slot] - 1
    logits[row, layer, chosen[row, layer, slot]] = largest[row, layer, rank]
    return logits
