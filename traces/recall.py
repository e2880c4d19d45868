"""How much of what the router chose each predictor names, of those a trace holds or can derive.

Derived ones guess as in a run that serves the sequences one after another: each prompt in one step,
then token by token; all of it token by token where a trace has no decode rows. The offline ones
learn from the other of FOLDS groups of sequences.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import TraceError
from moesim.traces.format import MISSING, Ids, Trace, rows_by_sequence
from moesim.traces.predictors import DERIVED, OFFLINE, SEES_FUTURE, guess, recorded
from moesim.traces.workload import Steps
from moesim.types import DECODE, PHASES, FloatArray

Mask = npt.NDArray[np.bool_]

DISTANCES = (1, 2, 3)
"""How many layers ahead derived predictors are tried."""

FOLDS = 4

MOST_TOKENS, MOST_CELLS = 2_000, 2**25
"""`recalls` looks at the first sequences only of a trace with more tokens to judge, or with more
cells (tokens x layers x experts): some seconds."""

_AT_ANY_DISTANCE = frozenset({"popularity", "popularity-offline", "previous"})


def recall(ids: Ids, truth: Ids, widths: Sequence[int]) -> FloatArray:
    """Return the share of the truth among the first candidates (widths, tokens, layers).

    ids: candidates (tokens, layers, M), best first. truth: (tokens, layers, top_k). widths: how
    many candidates count, at most M. NaN where there is no candidate, or no truth.
    """
    found = np.zeros(ids.shape, np.bool_)
    for slot in range(truth.shape[-1]):
        found |= ids == truth[..., slot, None]
    guessed, known = ids != MISSING, (truth != MISSING).sum(axis=-1)
    named = np.cumsum(found & guessed, axis=-1)
    shares = np.full((len(widths), *known.shape), np.nan)
    both = (known > 0) & guessed.any(axis=-1)
    for share, width in zip(shares, widths, strict=True):
        np.divide(named[..., width - 1], known, out=share, where=both)
    return shares


def recalls(trace: Trace) -> dict[str, Any]:
    """Return the recall of every predictor, as plain numbers and lists, None where unknown.

    tokens, phase: how many tokens are judged, and which: those of decode, unless there are none.
    widths: how many candidates count: top_k, 1.5, 2 and 3 times as many.
    chance: by width, if experts were named at random. router: of the router's own candidates, if
    recorded; anything but 1 is a fault of the recording.
    predictors: by name without its distance, then by distance: `at`, by width, the mean over tokens
    and layers where something is guessed, None where guesses are narrower; `by_layer`, at top_k.
    left_out: what cannot be derived, and why.
    """
    part = _first(trace)
    top_k, experts = part.top_k, part.n_experts
    judged = _judged(part)
    truth = part.experts[judged]
    sizes = (top_k, -(-3 * top_k // 2), 2 * top_k, 3 * top_k)
    widths = sorted({size for size in sizes if size <= experts})
    predictors: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for name in recorded(part):
        stem = name.rstrip("0123456789") or name
        by_distance = predictors.setdefault(stem, {})
        by_distance[name[len(stem) :] or "1"] = _judge(part.candidates[name][judged], truth, widths)
    for name in sorted(set(DERIVED) - SEES_FUTURE):
        width = top_k if name == "previous" else widths[-1]
        try:
            found = [
                _judge(_guesses(part, name, distance, width)[judged], truth, widths)
                for distance in (DISTANCES[:1] if name in _AT_ANY_DISTANCE else DISTANCES)
            ]
        except TraceError as error:
            left_out[name] = str(error)
            continue
        predictors[name] = {str(d): found[min(d, len(found)) - 1] for d in DISTANCES}
    router = None
    if "router" in part.candidates:
        router = _judge(part.candidates["router"][judged], truth, widths)["at"][str(top_k)]
    return {
        "tokens": len(truth),
        "phase": PHASES[part.phase[judged][0]],
        "widths": widths,
        "chance": {str(width): round(width / experts, 4) for width in widths},
        "router": router,
        "predictors": predictors,
        "left_out": left_out,
    }


def _judged(trace: Trace) -> Mask:
    decode: Mask = trace.phase == DECODE
    return decode if decode.any() else ~decode


def _judge(ids: Ids, truth: Ids, widths: list[int]) -> dict[str, Any]:
    there = [width for width in widths if width <= ids.shape[-1]]
    shares = dict(zip(there, recall(ids, truth, there), strict=True))
    layers = shares[widths[0]].T if there else np.full((truth.shape[1], 0), np.nan)
    return {
        "at": {str(width): _mean(shares[width]) if width in shares else None for width in widths},
        "by_layer": [_mean(layer) for layer in layers],
    }


def _guesses(trace: Trace, name: str, distance: int, width: int) -> Ids:
    """Return what a derived predictor guesses for every row of a trace (tokens, layers, width)."""
    ids = np.full((trace.tokens, trace.layers, width), MISSING, np.uint16)
    _, starts = rows_by_sequence(trace)
    folds = min(FOLDS, len(starts) - 1) if name in OFFLINE else 1
    if name in OFFLINE and folds == 1:
        raise TraceError("learns from other sequences, of which there are none")
    for fold in range(folds):
        steps = one_by_one(trace, fold, folds)
        ids[steps.rows], _ = guess(trace, steps, name, distance, width)
    return ids


def one_by_one(trace: Trace, first: int = 0, stride: int = 1) -> Steps:
    """Return the forward passes that serve one sequence after another, from number `first` on.

    A step is a decode row, or the prefill rows between two of them; if the trace has no decode
    rows, it is any row. Only every `stride`-th sequence is served.
    """
    rows, starts = rows_by_sequence(trace)
    number = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    position = np.arange(trace.tokens) - starts[number]
    served = number % stride == first
    rows, number, position = rows[served], number[served], position[served]
    phase = trace.phase[rows].astype(np.int64)
    alone = (phase == DECODE) | ~(trace.phase == DECODE).any()
    start = np.flatnonzero(alone | np.roll(alone, 1) | (position == 0))
    return Steps(
        phase=phase[start],
        rows=rows,
        offset=np.stack([start, np.append(start[1:], len(rows))], axis=1),
        context=np.add.reduceat(position + 1, start)[:, None],
        kept=position[start][:, None],
        sequences=np.ones((len(start), 1), np.int64),
        sequence=number,
    )


def _first(trace: Trace) -> Trace:
    """Return the first sequences of a trace, the last of them cut, one after another."""
    rows, _ = rows_by_sequence(trace)
    rows = rows[np.cumsum(_judged(trace)[rows]) <= MOST_TOKENS]
    rows = rows[: max(1, MOST_CELLS // (trace.layers * trace.n_experts))]
    return trace.at(rows)


def _mean(shares: FloatArray) -> float | None:
    known = shares[~np.isnan(shares)]
    return round(float(known.mean()), 4) if known.size else None
