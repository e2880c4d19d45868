"""What a run must compute: the same layers in a straight line, without lanes, slots or buffers."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np

from moesim.model import ModelSpec
from moesim.real import operations as ops
from moesim.real.dense import Block, Ends
from moesim.traces.workload import Steps
from moesim.types import FloatArray, IntArray

ExpertOf = Callable[[int, int, int], tuple[Any, Any]]
"""Of a step, a layer and an expert: `gate_up` (2 width, hidden) and `down` (hidden, width)."""


class Reference(NamedTuple):
    """What was computed."""

    streams: list[list[Any]]
    """By step and layer, (tokens, hidden): what COMBINE leaves behind."""
    logits: list[Any]
    """By step, (sequences, vocabulary)."""


def reference(
    model: ModelSpec, steps: Steps, ids: IntArray, blocks: list[tuple[Block, ...]],
    last: tuple[Block, ...], ends: Ends, expert_of: ExpertOf, chosen: IntArray,
    weights: FloatArray, deferred: Collection[tuple[int, int, int]] = (),
) -> Reference:  # fmt: skip
    """Compute all steps.

    `ids` are the tokens of all rows (rows,); `blocks` the weights outside the experts by MoE layer
    and `last` those behind the last one; `chosen` and `weights` (rows, layers, top_k) the routing,
    -1 being none; `deferred` holds the (step, layer, expert) whose results join the next layer.
    """
    import torch

    dtype = ends.embedding.dtype
    caches: dict[Any, tuple[Any, Any]] = {}
    found = Reference([], [])
    for step, offset in enumerate(steps.offset):
        rows = slice(int(offset[0]), int(offset[-1]))
        alike = together(steps, step)
        stream = ends.embedding[torch.from_numpy(ids[rows])]
        late = None
        found.streams.append([])
        for layer, own in enumerate(blocks):
            stream, normed = attended(stream, alike, caches, layer, own)
            results = torch.zeros(len(stream), model.top_k, model.hidden, dtype=dtype)
            later = torch.zeros_like(results)
            for expert in np.unique(chosen[rows, layer]).tolist():
                if expert >= 0:
                    at, rank = map(torch.from_numpy, np.nonzero(chosen[rows, layer] == expert))
                    result = ops.expert(normed[at], *expert_of(step, layer, expert))
                    target = later if (step, layer, expert) in deferred else results
                    target[at, rank] = result
            scale = torch.from_numpy(weights[rows, layer]).to(dtype)
            stream = ops.combine(stream, results, scale)
            if own[-1].gate_up is not None:
                stream = stream + ops.expert(normed, own[-1].gate_up, own[-1].down)
            stream = stream if late is None else stream + late
            late = ops.combine(torch.zeros_like(stream), later, scale) if deferred else None
            found.streams[-1].append(stream)
        stream, _ = attended(stream, alike, caches, len(blocks), last)
        ending = np.flatnonzero(np.diff(steps.sequence[rows], append=-1))
        final = ops.rms_norm(stream[torch.from_numpy(ending)], ends.norm)
        found.logits.append(ops.linear(final, ends.head))
    return found


def together(steps: Steps, step: int) -> list[tuple[tuple[int, ...], Any]]:
    """Return which sequences are computed at once, and their rows of the step (sequences, new).

    They are in one batch and have equally many tokens at first and in the end: the number of rows
    of a matrix product may change its last bits.
    """
    import torch

    offset = steps.offset[step]
    sequence = steps.sequence[offset[0] : offset[-1]]
    found: dict[tuple[int, int, int], list[int]] = {}
    for batch in range(len(offset) - 1):
        for one in np.unique(steps.sequence[offset[batch] : offset[batch + 1]]).tolist():
            prompt = int((steps.sequence[: steps.offset[0, -1]] == one).sum())
            key = (batch, prompt, int((steps.sequence == one).sum()))
            found.setdefault(key, []).append(one)
    return [
        (
            tuple(alike),
            torch.from_numpy(np.stack([np.flatnonzero(sequence == one) for one in alike])),
        )
        for alike in found.values()
    ]


def attended(
    stream: Any,
    alike: list[tuple[tuple[int, ...], Any]],
    caches: dict[Any, tuple[Any, Any]],
    layer: int,
    blocks: tuple[Block, ...],
) -> tuple[Any, Any]:
    """Return stream and normed stream (tokens, hidden) behind a layer's attention, and that of the
    layers without experts before it, with their FFN.
    """
    import torch

    normed = torch.zeros_like(stream)
    for at, block in enumerate(blocks):
        after = stream.clone()
        for sequences, rows in alike:
            before = stream[rows.flatten()]
            key = layer, at, sequences
            if key not in caches:
                own = ops.prefill(before, len(sequences), block.attention)
                caches[key] = own.keys, own.values
            else:
                # One more token in a longer tensor, which the operation fills.
                longer = [torch.cat([kept, kept[:, :, :1]], 2) for kept in caches[key]]
                past = longer[0].shape[2] - 1
                own = ops.decode(before, longer[0], longer[1], past, block.attention)
                caches[key] = longer[0], longer[1]
            then = own.residual
            if block.router is None:
                then = then + ops.expert(own.normed, block.gate_up, block.down)
            after[rows.flatten()] = then
            normed[rows.flatten()] = own.normed
        stream = after
    return stream, normed
