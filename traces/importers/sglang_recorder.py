"""SGLang's expert-distribution recorder: what `--expert-distribution-recorder-mode` dumps.

`per_token`: `records`, one per forward pass, with `topk_ids_of_layer` int32 (hidden layers, tokens,
8): physical ids, -1 in slots beyond top_k and in layers without experts. `per_pass`: counts per
physical expert instead. `stat`, `stat_approx`: `logical_count` (steps, hidden layers, experts).
"""

from typing import Any

import msgspec
import numpy as np

from moesim.errors import TraceError
from moesim.model import ModelSpec
from moesim.traces.format import MISSING, AnyArray, Ids, Trace, refuse
from moesim.traces.importers.carriers import converted
from moesim.traces.importers.common import (
    Count,
    Options,
    Popularity,
    counts_by_layer,
    facts,
    has_rank_order,
    moe_layers,
    spec_for,
    zero_counts,
)
from moesim.traces.importers.passes import DECODING, IDLE, MODES, VERIFY, Pass, follow
from moesim.traces.importers.saved import array_of
from moesim.traces.importers.source import Source
from moesim.types import IntArray

SLOTS = 8
"""Slots recorded per token, whatever top_k is."""


class Record(msgspec.Struct):
    """One forward pass of one rank; lists are per token, `extend_seq_lens` per sequence."""

    topk_ids_of_layer: Any = None
    global_physical_count: Any = None
    input_ids: list[Count] | None = None
    positions: list[Count] | None = None
    extend_seq_lens: list[Count] | None = None
    forward_mode: int = 0


def detect_tokens(source: Source) -> bool:
    """Tell by records that hold ids."""
    return "topk_ids_of_layer" in _first_record(source)


def detect_passes(source: Source) -> bool:
    """Tell by records that hold counts and no ids."""
    first = _first_record(source)
    return "global_physical_count" in first and "topk_ids_of_layer" not in first


def detect_stat(source: Source) -> bool:
    """Tell by `logical_count`."""
    return (
        source.form == "saved"
        and isinstance(source.value, dict)
        and "logical_count" in source.value
    )


def read_stat(source: Source, options: Options) -> Popularity:
    """Return the counts of all steps together, in logical experts."""
    counts = array_of("logical_count", source.value["logical_count"])
    if counts.ndim not in (2, 3):
        raise TraceError(f"logical_count has shape {counts.shape}; it must be ([steps,] layers, E)")
    _refuse_negative("logical_count", counts)
    if counts.ndim == 3:
        counts = counts.sum(axis=0, dtype=np.int64)
    zero_counts(*counts.shape)
    return counts_by_layer(counts, options.spec, "counts", "sglang-stat: logical_count")


def read_passes(source: Source, options: Options) -> Popularity:
    """Return the counts of all passes together, mapped from physical to logical experts."""
    to_logical = _map(source.value)
    total = np.zeros(to_logical.shape, np.int64)
    for name, record in _records(source):
        counts = array_of(f"{name}.global_physical_count", record.global_physical_count)
        if counts.shape != total.shape:
            raise TraceError(
                f"{name}.global_physical_count has shape {counts.shape}, the map {total.shape}"
            )
        _refuse_negative(f"{name}.global_physical_count", counts)
        total += counts
    counts = zero_counts(len(total), int(to_logical.max()) + 1)
    np.add.at(counts, (np.arange(len(total))[:, None], to_logical), total)
    return counts_by_layer(counts, options.spec, "counts", "sglang-passes: global_physical_count")


def read_tokens(source: Source, options: Options) -> Trace:
    """Return the trace, its sequences rebuilt from positions, its ids logical.

    Request ids are not recorded: a sequence goes on where its next position is computed, and two
    with the same next position are told apart by their order in the batch. The map from physical
    experts is the last one: what was recorded before a rebalancing is mapped by it, too.
    """
    spec = spec_for(options)
    if spec.top_k > SLOTS:
        raise TraceError(
            f"topk_ids_of_layer holds {SLOTS} slots; {spec.name} is top-{spec.top_k}, of which the "
            "rest was not recorded"
        )
    to_logical = _map(source.value)
    left_bytes = source.path.stat().st_size
    passes, ids, token_ids = [], [], []
    for name, record in _records(source):
        one = _pass(name, record)
        if one.mode == IDLE or not one.positions:
            continue
        found = array_of(f"{name}.topk_ids_of_layer", record.topk_ids_of_layer)
        shape = (len(to_logical), len(one.positions), SLOTS)
        if found.shape != shape:
            raise TraceError(
                f"{name}.topk_ids_of_layer has shape {found.shape}; the layers of the map and the "
                f"positions of the pass make {shape}"
            )
        left_bytes -= found.nbytes
        if left_bytes < 0:  # a hostile file may name one tensor a million times
            raise TraceError(f"{name}: the records hold more ids than the file has bytes")
        passes.append(one)
        ids.append(_logical(f"{name}.topk_ids_of_layer", found, to_logical, spec))
        if record.input_ids is not None and len(record.input_ids) == len(one.positions):
            token_ids += record.input_ids
    if not passes:
        raise TraceError("records hold no tokens")
    rows, sequence, phase = follow(passes)
    position = np.concatenate([one.positions for one in passes])
    meta = facts(
        f"sglang-tokens: topk_ids_of_layer, {len(to_logical)} hidden layers, "
        f"{to_logical.shape[1]} physical experts",
        spec.experts + spec.weightless_experts,
        spec,
        has_rank_order=has_rank_order(spec),
        id_space="logical",
    )
    return Trace(
        experts=np.concatenate(ids)[rows],
        layer_ids=np.array(spec.layer_ids, np.int32),
        phase=phase.astype(np.uint8),
        sequence=sequence.astype(np.int32),
        position=position[rows].astype(np.int32),
        token_id=np.array(token_ids, np.int32)[rows] if len(token_ids) == len(position) else None,
        meta=meta,
    )


def _pass(name: str, record: Record) -> Pass:
    mode, positions = record.forward_mode, record.positions or []
    if mode not in MODES:
        legal = ", ".join(f"{number} {what}" for number, what in MODES.items())
        raise TraceError(f"{name}.forward_mode is {mode}; legal are {legal}")
    if mode in (DECODING, VERIFY, IDLE):
        return Pass(name, mode, positions, [])
    lengths = record.extend_seq_lens or []
    if sum(lengths) != len(positions) or 0 in lengths:
        raise TraceError(
            f"{name}.extend_seq_lens is {str(lengths)[:80]}; they must be at least 1 and sum to "
            f"{len(positions)} tokens"
        )
    return Pass(name, mode, positions, lengths)


def _first_record(source: Source) -> dict[str, Any]:
    records = source.value.get("records") if isinstance(source.value, dict) else None
    first = records[0] if isinstance(records, list) and records else None
    return first if source.form == "saved" and isinstance(first, dict) else {}


def _records(source: Source) -> list[tuple[str, Record]]:
    records = source.value["records"]
    return [
        (f"records[{i}]", converted(f"records[{i}]", record, Record))
        for i, record in enumerate(records)
    ]


def _map(saved: dict[str, Any]) -> IntArray:
    """Return the logical expert of each physical one (layers, physical)."""
    name = "last_physical_to_logical_map"
    to_logical = array_of(name, saved.get(name))
    if to_logical.ndim != 2 or 0 in to_logical.shape:
        raise TraceError(f"{name} has shape {to_logical.shape}; it must be (layers, physical)")
    refuse(name, to_logical, (to_logical < 0) | (to_logical >= MISSING), f"0..{MISSING - 1}")
    return to_logical.astype(np.int64)


def _logical(name: str, found: AnyArray, to_logical: IntArray, spec: ModelSpec) -> Ids:
    """Return logical ids (tokens, MoE layers, top_k) of physical ones (layers, tokens, 8)."""
    physical = to_logical.shape[1]
    refuse(name, found, (found < -1) | (found >= physical), f"-1..{physical - 1}")
    flat = found.reshape(len(found), -1)
    mapped = np.where(flat < 0, MISSING, np.take_along_axis(to_logical, np.maximum(flat, 0), 1))
    by_token = mapped.astype(np.uint16).reshape(found.shape).transpose(1, 0, 2)
    kept = moe_layers(name, by_token[:, :, : spec.top_k], spec)
    recorded = (kept != MISSING).any(axis=(0, 2)).sum()
    if recorded < spec.layers:
        raise TraceError(
            f"{name} holds ids in {recorded} of {spec.layers} layers with experts: fused kernels, "
            "a captured graph or a pipeline stage kept them from the recorder"
        )
    beyond = moe_layers(name, by_token, msgspec.structs.replace(spec, top_k=SLOTS))
    if (beyond[:, :, spec.top_k :] != MISSING).any():
        raise TraceError(f"{name} holds ids beyond slot {spec.top_k}; {spec.name} is no such model")
    return kept


def _refuse_negative(name: str, counts: AnyArray) -> None:
    refuse(name, counts, counts < 0, "numbers from 0")
