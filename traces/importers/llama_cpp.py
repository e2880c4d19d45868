"""llama.cpp's top-k tensors `ffn_moe_topk-<layer>`, as four tools write them from a callback.

pairs: `layer,expert`, one line per activation; no border between tokens. rows: `pos,layer,id,...`,
positions of the prompt negative. ranks: `phase,token,layer,rank,expert` under that header. chunks:
binary int32 `layer, n_tokens, k` and n_tokens * k ids, a record per layer and chunk of text.

All but the first write one layer of a forward pass after the other.
"""

import io
import re
import struct

import numpy as np

from moesim.errors import TraceError
from moesim.model import ModelSpec
from moesim.traces.format import MISSING, Trace, refuse
from moesim.traces.importers.batches import Rows, Tokens, by_token, refuse_stride_bug
from moesim.traces.importers.common import (
    Options,
    Popularity,
    agreed,
    experts_for,
    facts,
    without_first,
    zero_counts,
)
from moesim.traces.importers.source import Source
from moesim.types import DECODE, PREFILL, IntArray

_PAIRS, _RANKS = b"layer,expert", b"phase,token,layer,rank,expert"
_NUMBERS = re.compile(rb"-?\d+(,-?\d+)*")
_MOST_LAYERS = 1024


def detect_pairs(source: Source) -> bool:
    """Tell by two columns of numbers, or by the header."""
    line = _first_line(source)
    return line == _PAIRS or (_NUMBERS.fullmatch(line) is not None and line.count(b",") == 1)


def detect_rows(source: Source) -> bool:
    """Tell by three or more columns of numbers, without a header."""
    line = _first_line(source)
    return _NUMBERS.fullmatch(line) is not None and line.count(b",") >= 2


def detect_ranks(source: Source) -> bool:
    """Tell by the header."""
    return _first_line(source) == _RANKS


def detect_chunks(source: Source) -> bool:
    """Tell by a first record that fits into the file and holds ids."""
    if source.form != "binary" or len(source.value) < 16:
        return False
    layer, tokens, k = struct.unpack_from("<iii", source.value)
    if not (0 <= layer < _MOST_LAYERS and tokens > 0 and 0 < k < MISSING):
        return False
    if 12 + 4 * tokens * k > len(source.value):
        return False
    ids = np.frombuffer(source.value, "<i4", tokens * k, offset=12)
    return bool(((ids >= 0) & (ids < MISSING)).all())


def read_pairs(source: Source, options: Options) -> Popularity:
    """Return how often each expert was chosen; of tokens, only their number is checked."""
    spec = options.spec
    top_k = agreed("top-k", "--top-k", options.top_k, None if spec is None else spec.top_k)
    if top_k is None:
        raise TraceError("has no border between tokens; say top_k or the model")
    text = source.value.removeprefix(_PAIRS)
    table = _table(text, 2)
    layer, expert = table[:, 0], table[:, 1]
    _check_rows(layer, table[:, 1:])
    layer_ids, column, rows = np.unique(layer, return_inverse=True, return_counts=True)
    for own, count in zip(layer_ids, rows, strict=True):
        if count % top_k:
            raise TraceError(f"layer {own} has {count} rows, which are no tokens of {top_k} each")
    counts = zero_counts(len(layer_ids), experts_for(options) or int(expert.max()) + 1)
    refuse("expert", expert, expert >= counts.shape[1], f"0..{counts.shape[1] - 1}")
    np.add.at(counts, (column, expert), 1)
    return Popularity(
        counts=counts,
        layer_ids=layer_ids.astype(np.int32),
        granularity="layer_order",
        meta=facts(
            f"llama-pairs: layer,expert, top-{top_k}", counts.shape[1], spec,
            granularity="layer_order",
        ),
    )  # fmt: skip


def read_rows(source: Source, options: Options) -> Trace:
    """Return the trace, one sequence per prompt and what is decoded after it.

    Tokens keep their order in the file: their negative positions count back from the end of what
    is done so far, so that a later batch of the prompt has the smaller numbers.
    """
    table = _table(source.value, None)
    layer, ids = table[:, 1], table[:, 2:]
    _check_rows(layer, ids)
    rows = Rows(ids, layer, _steps(layer), table[:, 0])
    tokens = by_token(rows, options.last_layer or "fill")
    label = tokens.label
    phase = np.where(label < 0, PREFILL, DECODE)
    before = np.concatenate([[-1], label[:-1]])
    begins = (label <= 0) & (before >= 0)
    begins[0] = True
    jumps = (label >= 0) & ~begins & (label != np.maximum(before, -1) + 1)
    refuse("pos", label, jumps, "negative for the prompt, then 0, 1, 2, ...")
    return _trace("llama-rows: pos,layer,id,...", tokens, phase, np.cumsum(begins) - 1, options)


def read_ranks(source: Source, options: Options) -> Trace:
    """Return the trace, one sequence; ranks are slots, tokens are positions."""
    _, _, text = source.value.partition(b"\n")
    words = {b"prefill": b"%d" % PREFILL, b"decode": b"%d" % DECODE}
    lines = sum(text.count(word + b",") for word in words)
    for word, number in words.items():
        text = text.replace(word + b",", number + b",")
    table = _table(text, 5)
    if lines != len(table):
        raise TraceError(f"{lines} of {len(table)} rows begin with prefill or decode; all must")
    top_k = int(table[:, 3].max()) + 1
    if not 0 < top_k < MISSING or len(table) % top_k:
        raise TraceError(f"{len(table)} rows are no tokens of ranks 0..{top_k - 1}")
    refuse(
        "rank", table[:, 3], table[:, 3] != np.arange(len(table)) % top_k, "0, 1, 2, ... in turn"
    )
    grouped = table.reshape(-1, top_k, 5)
    mixed = (grouped[:, :, :3] != grouped[:, :1, :3]).any(axis=2).ravel()
    refuse("token", table[:, 1], mixed, "those of one phase, token and layer for all ranks")
    phase, token, layer = grouped[:, 0, :3].T
    _check_rows(layer, grouped[:, :, 4])
    refuse("token", token, (token < 0) | (token >= 1 << 31), f"0..{(1 << 31) - 1}")
    rows = Rows(grouped[:, :, 4], layer, _steps(layer), 2 * token + phase)
    tokens = by_token(rows, options.last_layer or "fill")
    position = tokens.label // 2
    refuse("token", position, position != np.arange(len(position)), "0, 1, 2, ...")
    name = f"llama-ranks: {_RANKS.decode()}"
    return _trace(name, tokens, tokens.label % 2, np.zeros_like(position), options)


def read_chunks(source: Source, options: Options) -> Trace:
    """Return the trace, one sequence per chunk of text, all of it prefill.

    The memory was cleared before every chunk: this is no routing of a server.
    """
    data = source.value
    layers, lengths, top_k, headers, at = [], [], 0, [], 0
    while at < len(data):
        if at + 12 > len(data):
            raise TraceError(f"byte {at}: {len(data) - at} bytes are no record")
        layer, tokens, k = struct.unpack_from("<iii", data, at)
        size = 12 + 4 * tokens * k
        if tokens < 1 or k < 1 or k != (top_k or k) or at + size > len(data):
            raise TraceError(
                f"byte {at}: a record of {tokens} tokens of {k} experts, {size} bytes; legal are "
                f"{top_k or 'any number of'} experts and {len(data) - at} bytes"
            )
        layers.append(layer)
        lengths.append(tokens)
        headers.append(at // 4)
        top_k, at = k, at + size
    is_id = np.ones(len(data) // 4, np.bool_)
    is_id[np.add.outer(headers, np.arange(3))] = False
    ids = np.frombuffer(data, "<i4")[is_id].reshape(-1, top_k).astype(np.int64)
    record = np.array(layers)
    begins = np.diff(record, prepend=record[0]) <= 0
    begins[0] = False
    layer = np.repeat(record, lengths)
    _check_rows(layer, ids)
    step = np.repeat(np.cumsum(begins, dtype=np.int64), lengths)
    rows = Rows(ids, layer, step, np.zeros_like(step))
    tokens = by_token(rows, options.last_layer or "fill")
    name = "llama-chunks: int32 layer, n_tokens, k, ids"
    phase = np.full(len(tokens.ids), PREFILL)
    trace = _trace(
        name, tokens, phase, tokens.step, options, memory="cleared before every sequence"
    )
    return without_first(trace) if options.first_token == "drop" else trace


def _first_line(source: Source) -> bytes:
    if source.form != "text":
        return b""
    return bytes(source.value[:4096].partition(b"\n")[0].rstrip(b"\r"))


def _table(text: bytes, columns: int | None) -> IntArray:
    """Return the numbers of a CSV without header (rows, columns)."""
    if (odd := re.search(rb"[^0-9,\r\n-]", text)) is not None:
        line = text.count(b"\n", 0, odd.start()) + 1
        shown = text[odd.start() : odd.start() + 20].decode("utf-8", "replace").split("\n")[0]
        raise TraceError(f"line {line} below any header: {shown!r} is no whole number")
    if not text.strip():
        raise TraceError("holds no rows")
    try:
        table = np.loadtxt(io.BytesIO(text), np.int64, comments=None, delimiter=",", ndmin=2)
    except ValueError as error:
        raise TraceError(f"is no table of whole numbers: {error}") from None
    if table.shape[1] != (columns or table.shape[1]):
        raise TraceError(f"has {table.shape[1]} columns; it must have {columns}")
    return table


def _check_rows(layer: IntArray, ids: IntArray) -> None:
    refuse("layer", layer, (layer < 0) | (layer >= _MOST_LAYERS), f"0..{_MOST_LAYERS - 1}")
    refuse("expert", ids, (ids < 0) | (ids >= MISSING), f"0..{MISSING - 1}")


def _steps(layer: IntArray) -> IntArray:
    """Return the forward pass of each row: a new one begins where layers start again."""
    return np.cumsum(np.diff(layer, prepend=layer[0]) < 0)


def _trace(
    name: str, tokens: Tokens, phase: IntArray, sequence: IntArray, options: Options, **more: str
) -> Trace:
    """Return the trace of tokens in order of their sequences; check it against the model."""
    experts = experts_for(options)
    if experts is None:
        raise TraceError(
            "does not say how many experts a layer has; moesim trace import takes --experts or "
            "--model"
        )
    top_k = tokens.ids.shape[2]
    agreed("top-k", "--top-k", options.top_k, top_k)
    spec = options.spec
    if spec is not None:
        _check_fit(tokens, spec, options)
    refuse_stride_bug(tokens, experts)
    starts = np.searchsorted(sequence, sequence)
    if tokens.pruned:
        more["last_layer"] = "computed for the last tokens of a batch only"
    if spec is not None and len(tokens.layer_ids) < spec.layers:
        spec = None  # the last layer was dropped: it describes another model
    return Trace(
        experts=tokens.ids,
        layer_ids=tokens.layer_ids,
        phase=phase.astype(np.uint8),
        sequence=sequence.astype(np.int32),
        position=(np.arange(len(sequence)) - starts).astype(np.int32),
        meta=facts(name, experts, spec, has_rank_order=True, **more),
    )


def _check_fit(tokens: Tokens, spec: ModelSpec, options: Options) -> None:
    layers, top_k = tuple(tokens.layer_ids.tolist()), tokens.ids.shape[2]
    wanted = spec.layer_ids
    if options.last_layer == "drop" and len(layers) < spec.layers:
        wanted = wanted[:-1]
    if layers != wanted or top_k != spec.top_k:
        raise TraceError(
            f"has {len(layers)} layers from {layers[0]} to {layers[-1]}, top-{top_k}; {spec.name} "
            f"has {len(wanted)} with experts from {wanted[0]} to {wanted[-1]}, top-{spec.top_k}"
        )
