"""Forward passes that wrote one layer after the other, turned into tokens.

Each layer has a row per token, in the order of the batch: how callbacks of llama.cpp see a pass.
"""

import math
from typing import NamedTuple

import numpy as np

from moesim.errors import TraceError
from moesim.traces.format import MISSING, Ids, Ints, refuse
from moesim.types import IntArray

_CHANCE = 1e-6
"""Chance of disjoint experts below which they are taken for the stride bug."""


class Rows(NamedTuple):
    """Experts of one token in one layer per row, in the order they were written.

    ids: (rows, top_k). layer, label: (rows,); the label is what the tool says of the token. step:
    the forward pass of each row (rows,), counted from 0.
    """

    ids: IntArray
    layer: IntArray
    step: IntArray
    label: IntArray


class Tokens(NamedTuple):
    """Rows turned into tokens: ids (tokens, layers, top_k); label and step (tokens,)."""

    ids: Ids
    layer_ids: Ints
    label: IntArray
    step: IntArray
    pruned: bool


def by_token(rows: Rows, last_layer: str) -> Tokens:
    """Pivot rows into tokens; every layer must have as many as the first, in every pass.

    But for the last layer: llama.cpp computes it only for tokens whose logits are asked for, by
    default the last of a batch. What it lacks is MISSING, or the layer is dropped.
    """
    layer_ids, column = np.unique(rows.layer, return_inverse=True)
    n, steps = len(layer_ids), int(rows.step[-1]) + 1
    if steps * (n - 1) > len(rows.layer):
        raise TraceError(
            f"{len(rows.layer)} rows are too few for {steps} passes through {n} layers; fused "
            "kernels, a captured graph or a file cut short would leave some out"
        )
    cell = rows.step * n + column
    counts = np.bincount(cell, minlength=steps * n).reshape(steps, n)
    full, last = counts[:, 0], counts[:, -1]
    uneven = counts != full[:, None]
    uneven[:, -1] = last > full
    if uneven.any():
        step, own = np.unravel_index(int(uneven.argmax()), uneven.shape)
        raise TraceError(
            f"pass {step}: layer {layer_ids[own]} has {counts[step, own]} rows, layer "
            f"{layer_ids[0]} has {full[step]}; fused kernels, a captured graph or a file cut short "
            "would leave some out"
        )
    starts = np.cumsum(counts) - counts.ravel()
    within = np.arange(len(cell)) - starts[cell]
    lacking = column == n - 1
    within[lacking] += (full - last)[rows.step[lacking]]
    token = (np.cumsum(full) - full)[rows.step] + within
    ids = np.full((int(full.sum()), n, rows.ids.shape[1]), MISSING, np.uint16)
    ids[token, column] = rows.ids
    first = rows.label[column == 0]
    differ = (rows.label != first[token]) & ~(lacking & (last < full)[rows.step])
    refuse("token", rows.label, differ, "those of the first layer in every layer")
    pruned = bool((last < full).any())
    if pruned and last_layer == "drop":
        ids, layer_ids, pruned = np.ascontiguousarray(ids[:, :-1]), layer_ids[:-1], False
    return Tokens(ids, layer_ids.astype(np.int32), first, np.repeat(np.arange(steps), full), pruned)


def refuse_stride_bug(tokens: Tokens, experts: int) -> None:
    """Raise TraceError where rows are slices of a sorted list of all experts.

    The top k is a view into that list. Read as if contiguous, the first experts / k rows of a batch
    are the first row's own list, cut up: no expert occurs twice in them, in any layer. A batch of
    one token is read rightly. True routing repeats itself more than chance does.
    """
    top_k = tokens.ids.shape[2]
    starts = np.searchsorted(tokens.step, np.arange(int(tokens.step[-1]) + 1))
    lengths = np.diff(np.append(starts, len(tokens.step)))
    for start, length in zip(starts, np.minimum(lengths, experts // top_k), strict=True):
        if length < 2:
            continue
        batch = tokens.ids[start : start + length]
        batch = batch[:, (batch != MISSING).all(axis=(0, 2))]
        flat = np.sort(batch.transpose(1, 0, 2).reshape(batch.shape[1], -1), axis=1)
        if (flat[:, 1:] == flat[:, :-1]).any():
            continue
        one = math.comb(experts, top_k)
        chance = math.prod(math.comb(experts - i * top_k, top_k) / one for i in range(length))
        if chance ** batch.shape[1] < _CHANCE:
            raise TraceError(
                f"tokens {start}..{start + length - 1} share no expert in any layer: the tool read "
                "ffn_moe_topk as contiguous (stride bug) and wrote the first token's sorted "
                "experts, cut into rows"
            )
