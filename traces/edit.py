"""Traces taken apart and put together: parts of one, and one of several of the same model."""

from collections.abc import Collection, Sequence
from typing import Any

import msgspec
import numpy as np

from moesim.errors import TraceError
from moesim.model import normalised
from moesim.traces.format import Ints, Trace, rows_by_sequence
from moesim.types import PHASES, IntArray

Range = tuple[int, int | None]
"""The first, and the one after the last; None is the end."""


def take(
    trace: Trace,
    *,
    sequences: Range = (0, None),
    tokens: int | None = None,
    layers: Range = (0, None),
    phase: str | None = None,
    drop: Collection[str] = (),
) -> Trace:
    """Return part of a trace: the tokens, layers and guesses that meet every condition given.

    sequences: by their number in order of first appearance, from 0. layers: by the model's own
    numbers. phase: `prefill` or `decode`. tokens: the first so many of each sequence, of those that
    are left. drop: predictors. Sequences and positions keep their numbers, rows their order, and
    meta says under `cut` what was taken.

    Raises TraceError for ranges beyond the trace, for unknown names, and if nothing is left.
    """
    rows, starts = rows_by_sequence(trace)
    first, end = _checked("sequences", sequences, len(starts) - 1)
    if phase is not None and phase not in PHASES:
        raise TraceError(f"no phase {phase!r}; there are: {', '.join(PHASES)}")
    if tokens is not None and tokens < 1:
        raise TraceError(f"tokens is {tokens}; it must be at least 1")
    number = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    kept = (number >= first) & (number < end)
    if phase is not None:
        kept &= trace.phase[rows] == PHASES.index(phase)
    if tokens is not None:
        before: IntArray = np.cumsum(kept) - kept
        kept &= before - before[starts[number]] < tokens
    if not kept.any():
        raise TraceError(f"sequences {first}..{end - 1} have no {phase} tokens; nothing is left")

    ids = trace.layer_ids
    low, high = _checked("layers", layers, int(ids[-1]) + 1)
    in_range = (ids >= low) & (ids < high)
    if not in_range.any():
        raise TraceError(f"layers {low}:{high} have no experts; those that do: {listed(ids)}")
    unknown = sorted(set(drop) - trace.candidates.keys())
    if unknown:
        there = ", ".join(sorted(trace.candidates)) or "none"
        raise TraceError(f"no predictor {unknown[0]!r} in the trace; there are: {there}")

    asked: dict[str, Any] = {}
    if sequences != (0, None):
        asked["sequences"] = [first, end]
    if phase is not None:
        asked["phase"] = phase
    if tokens is not None:
        asked["tokens"] = tokens
    if layers != (0, None):
        asked["layers"] = [low, high]
    if drop:
        asked["drop"] = sorted(drop)
    return _part(trace, np.sort(rows[kept]), np.flatnonzero(in_range), drop, asked)


def _checked(what: str, wanted: Range, length: int) -> tuple[int, int]:
    """Return both ends of a range, of which there are `length`."""
    first, end = wanted[0], length if wanted[1] is None else wanted[1]
    if not 0 <= first < end <= length:
        last = "" if wanted[1] is None else wanted[1]
        raise TraceError(f"{what} {first}:{last} is no range of the trace; legal are 0:{length}")
    return first, end


def _part(
    trace: Trace, rows: IntArray, layers: IntArray, drop: Collection[str], asked: dict[str, Any]
) -> Trace:
    cells = np.ix_(rows, layers)
    # A part may not use the expert of the highest id.
    meta = {**trace.meta, "num_experts": trace.n_experts}
    if asked:
        cuts = trace.meta.get("cut")
        meta["cut"] = [*(cuts if isinstance(cuts, list) else []), asked]
    return msgspec.structs.replace(
        trace,
        experts=trace.experts[cells],
        layer_ids=trace.layer_ids[layers],
        phase=trace.phase[rows],
        sequence=trace.sequence[rows],
        position=trace.position[rows],
        weights=None if trace.weights is None else trace.weights[cells],
        token_id=None if trace.token_id is None else trace.token_id[rows],
        candidates={n: ids[cells] for n, ids in trace.candidates.items() if n not in drop},
        candidate_scores={n: s[cells] for n, s in trace.candidate_scores.items() if n not in drop},
        meta=meta,
    )


def join(traces: Sequence[Trace], names: Sequence[str]) -> tuple[Trace, tuple[str, ...]]:
    """Return the traces as one, one after the other, and notes of what was lost.

    Sequences are numbered anew, from 0 in order of first appearance. Weights, token ids and
    guesses stay where all traces have them, of guesses as many as all have. Of meta stays what all
    agree on; `sources` lists each trace by name with its digest, its size and what it says beyond.

    Raises TraceError for traces of different models, naming what differs.
    """
    first = traces[0]
    for what, values in (
        ("layers", [listed(t.layer_ids) for t in traces]),
        ("experts per layer", [t.n_experts for t in traces]),
        ("top_k", [t.top_k for t in traces]),
        ("model", [_model(t) for t in traces]),
    ):
        said = [(name, value) for name, value in zip(names, values, strict=True) if value]
        for name, value in said:
            if value != said[0][1]:
                raise TraceError(
                    f"{name} has {what} {value}, {said[0][0]} has {said[0][1]}; only traces of one "
                    "model can be joined"
                )
    notes: list[str] = []

    def kept(what: str, there: Sequence[bool]) -> bool:
        if any(there) and not all(there):
            notes.append(f"{what} dropped: {names[list(there).index(False)]} has none")
        return all(there)

    candidates, scores = {}, {}
    for predictor in sorted({name for trace in traces for name in trace.candidates}):
        if not kept(f"guesses of {predictor} are", [predictor in t.candidates for t in traces]):
            continue
        widths = [t.candidates[predictor].shape[2] for t in traces]
        width = min(widths)
        if width < max(widths):
            notes.append(f"guesses of {predictor} are cut to the first {width}")
        candidates[predictor] = np.concatenate(
            [t.candidates[predictor][:, :, :width] for t in traces]
        )
        if kept(f"scores of {predictor} are", [predictor in t.candidate_scores for t in traces]):
            scores[predictor] = np.concatenate(
                [t.candidate_scores[predictor][:, :, :width] for t in traces]
            )
    weights = [t.weights for t in traces if t.weights is not None]
    token_id = [t.token_id for t in traces if t.token_id is not None]
    has_weights = kept("weights are", [t.weights is not None for t in traces])
    has_token_id = kept("token ids are", [t.token_id is not None for t in traces])
    joined = Trace(
        experts=np.concatenate([t.experts for t in traces]),
        layer_ids=first.layer_ids,
        phase=np.concatenate([t.phase for t in traces]),
        sequence=_numbered(traces),
        position=np.concatenate([t.position for t in traces]),
        weights=np.concatenate(weights) if has_weights else None,
        token_id=np.concatenate(token_id) if has_token_id else None,
        candidates=candidates,
        candidate_scores=scores,
        meta=_merged(traces, names),
    )
    return joined, tuple(notes)


def listed(numbers: Ints) -> str:
    """Return ascending numbers as text, in short where they follow one another."""
    first, last = int(numbers[0]), int(numbers[-1])
    if last - first + 1 == len(numbers):
        return f"{first}..{last}" if last > first else str(first)
    return ", ".join(str(number) for number in numbers)


def _model(trace: Trace) -> str | None:
    """Return the plain name of the model; quantised files are of the same one."""
    name = trace.meta.get("model")
    return normalised(name) if isinstance(name, str) else None


def _numbered(traces: Sequence[Trace]) -> Ints:
    numbers, before = [], 0
    for trace in traces:
        rows, starts = rows_by_sequence(trace)
        number = np.empty(trace.tokens, np.int32)
        number[rows] = np.repeat(np.arange(before, before + len(starts) - 1), np.diff(starts))
        numbers.append(number)
        before += len(starts) - 1
    return np.concatenate(numbers)


def _merged(traces: Sequence[Trace], names: Sequence[str]) -> dict[str, Any]:
    metas = [trace.meta for trace in traces]
    common = {
        key: value
        for key, value in metas[0].items()
        if key != "sources" and all(key in meta and meta[key] == value for meta in metas[1:])
    }
    sources = [
        {
            "name": name,
            "digest": trace.digest(),
            "tokens": trace.tokens,
            "sequences": len(rows_by_sequence(trace)[1]) - 1,
            "meta": {k: v for k, v in trace.meta.items() if k not in common},
        }
        for trace, name in zip(traces, names, strict=True)
    ]
    merged = {**common, "num_experts": traces[0].n_experts, "sources": sources}
    merged.pop("topics", None)  # by number of the sequence, which is new
    if any("topics" in meta for meta in metas):
        merged["topics"] = [topic for trace in traces for topic in _topics(trace)]
    # Ranks mean nothing where one trace lacks them.
    if any(meta.get("has_rank_order") is False for meta in metas):
        merged["has_rank_order"] = False
    return merged


def _topics(trace: Trace) -> list[Any]:
    """Return the topic of each sequence, in order of first appearance."""
    stated = trace.meta.get("topics")
    known = stated if isinstance(stated, list) else []
    rows, starts = rows_by_sequence(trace)
    numbers = trace.sequence[rows[starts[:-1]]].tolist()
    return [known[number] if number < len(known) else None for number in numbers]
