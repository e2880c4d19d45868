"""Guesses of the experts a layer will choose, recorded or derived, computed before a run.

A guess never depends on the policy, and never on what is not known yet: the derived ones learn a
step only after it is over. The two that do see the future are listed in SEES_FUTURE.
"""

import re
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from moesim.errors import TraceError
from moesim.traces.format import MISSING, Ids, Trace
from moesim.traces.synthetic import best_first, blur, correlation_for
from moesim.traces.workload import Steps
from moesim.types import IntArray

Scores = npt.NDArray[np.float32]
T = TypeVar("T", bound=np.generic)

DERIVED = ("noisy-oracle", "oracle", "popularity", "previous", "transition")
"""Guesses that need nothing but the routing itself."""

SEES_FUTURE = frozenset({"oracle", "noisy-oracle"})

_MOST_CELLS = 2**28
_CHUNK = 128
"""Tokens handled at once: bounds the memory of a long prefill."""


def recorded(trace: Trace) -> list[str]:
    """Return the predictors whose guesses the trace holds, `router` (its own choice) left out."""
    return sorted(name for name in trace.candidates if name != "router")


def resolve(trace: Trace, wanted: str, distance: int) -> str:
    """Return the predictor that `wanted` means for guesses `distance` layers ahead.

    `auto` is the best there is: `residual<distance>`, else `gate<distance>`, else `transition`.
    Raises TraceError if there is no such predictor, or if it was recorded fewer layers ahead: its
    guess would not exist yet.
    """
    there = recorded(trace)
    if wanted == "auto":
        names = (f"residual{distance}", f"gate{distance}")
        return next((name for name in names if name in there), "transition")
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

    transition: the experts that most often followed this token's, `distance` layers before.
    previous: what the sequence's token before chose, if that was in an earlier step.
    popularity: the experts most often chosen so far in the run. oracle: the truth.
    noisy-oracle: the truth through noise on made-up logits, so that its first top_k candidates
    name `recall` of the experts on average (Gaussian noise, since a real gate errs where the
    margin is thin; random flips would not).

    Raises TraceError for an unknown name, or values out of range.
    """
    if width < 1 or distance < 1:
        raise TraceError(f"width {width} and distance {distance} must both be at least 1")
    name = resolve(trace, name, distance)
    truth, experts = trace.experts[steps.rows], trace.n_experts
    match name:
        case "oracle":
            return _fit(truth, width, MISSING), None
        case "noisy-oracle":
            correlation = correlation_for(experts, trace.top_k, recall)
            return _noisy(truth, experts, correlation, width, seed)
        case "previous":
            return _previous(truth, steps, width), None
        case "popularity":
            return _popularity(truth, steps, experts, width)
        case "transition":
            return _transition(truth, steps, experts, distance, width)
        case _:
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


def _known(ids: Ids, experts: int) -> IntArray:
    """Return ids as indices, what is missing as `experts`, one past the last."""
    return np.minimum(ids, experts).astype(np.int64)


def _most_counted(counts: IntArray, width: int) -> tuple[Ids, Scores]:
    """Return the largest counts along the last axis, lowest id first among equals, no zeros."""
    experts = counts.shape[-1]
    kept = min(width, experts)
    keys = counts * experts + np.arange(experts - 1, -1, -1)
    keys = -np.sort(-np.partition(keys, experts - kept, axis=-1)[..., experts - kept :], axis=-1)
    found = keys // experts
    ids = np.where(found > 0, experts - 1 - keys % experts, MISSING).astype(np.uint16)
    return _fit(ids, width, MISSING), _fit(found.astype(np.float32), width, 0)


def _previous(truth: Ids, steps: Steps, width: int) -> Ids:
    # Inside a prefill, the token before is routed at the same time and tells nothing.
    order = np.argsort(steps.sequence, kind="stable")
    before, after = order[:-1], order[1:]
    decoding = after >= steps.offset[0, -1]
    known = decoding & (steps.sequence[before] == steps.sequence[after])
    ids = np.full_like(truth, MISSING)
    ids[after[known]] = truth[before[known]]
    return _fit(ids, width, MISSING)


def _popularity(truth: Ids, steps: Steps, experts: int, width: int) -> tuple[Ids, Scores]:
    rows, layers, _ = truth.shape
    ids, scores = np.empty((rows, layers, width), np.uint16), np.empty((rows, layers, width), "f4")
    counts = np.zeros((layers, experts + 1), np.int64)
    layer = np.arange(layers)[:, None]
    for step in _step_ranges(steps):
        ids[step], scores[step] = _most_counted(counts[:, :experts], width)
        np.add.at(counts, (layer, _known(truth[step], experts)), 1)
    return ids, scores


def _transition(
    truth: Ids, steps: Steps, experts: int, distance: int, width: int
) -> tuple[Ids, Scores]:
    rows, layers, top_k = truth.shape
    ids = np.full((rows, layers, width), MISSING, np.uint16)
    scores = np.zeros((rows, layers, width), np.float32)
    pairs = layers - distance
    if pairs < 1:
        return ids, scores
    if pairs * (experts + 1) ** 2 > _MOST_CELLS:
        raise TraceError(
            f"predictor 'transition' needs a table of {experts} x {experts} for {pairs} layers, "
            f"which is too large; legal are {_MOST_CELLS} cells"
        )
    followed = np.zeros((pairs, experts + 1, experts + 1), np.int32)
    flat = followed.reshape(-1)  # np.add.at is fast along one axis only
    layer = np.arange(pairs)
    for step in _step_ranges(steps):
        for part in _chunks(step):
            source = _known(truth[part, :pairs], experts)
            counts = np.zeros((len(source), pairs, experts + 1), np.int64)
            for slot in range(top_k):
                counts += followed[layer, source[:, :, slot]]
            counts[source.min(axis=-1) == experts] = 0
            guessed = _most_counted(counts[..., :experts], width)
            ids[part, distance:], scores[part, distance:] = guessed
        for part in _chunks(step):
            source = _known(truth[part, :pairs], experts)
            target = _known(truth[part, distance:], experts)
            row = layer[:, None] * (experts + 1) + source
            cells = row[..., :, None] * (experts + 1) + target[..., None, :]
            known = (source < experts)[..., :, None] & (target < experts)[..., None, :]
            np.add.at(flat, cells[known], 1)
    return ids, scores


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
