"""A trace as other programs read it: engines, cache simulators, and whatever reads tables.

The access order of all of them is that of the rows: token by token in file order, inside a token
layer by layer, inside a layer by rank. Files appear whole or not at all.
"""

import contextlib
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.model import ModelSpec, expert_bytes
from moesim.traces.edit import listed
from moesim.traces.format import MISSING, Trace
from moesim.traces.stats import popularity
from moesim.types import PHASES, IntArray

ACCESS = np.dtype([("time", "<u4"), ("object", "<u8"), ("size", "<u4"), ("next", "<i8")])
"""A record of libCacheSim's oracleGeneral: packed, 24 bytes."""

NEVER = -1
"""In place of the next access: there is none."""

CHUNK = 1 << 18
"""Accesses handled at once: bounds the memory of a long trace."""


def layer_counts(trace: Trace, spec: ModelSpec | None = None) -> IntArray:
    """Return how many tokens used each expert of every hidden layer (hidden layers, experts).

    Layers without experts have zeros. Without a specification, the trace has to say that all
    layers have experts, by numbers 0, 1, 2, ... of layers none of which was cut away.

    Raises InputError if it does not, if it is no trace of that model, or if a layer with experts
    was never recorded: engines refuse such counts, and made up ones would place experts by chance.
    """
    if spec is None:
        numbers = trace.layer_ids.tolist()
        if numbers != list(range(trace.layers)) or {"cut", "sources"} & trace.meta.keys():
            raise InputError("the trace does not say how many layers the model has; say --model")
        if "num_experts" not in trace.meta:
            raise InputError("the trace does not say how many experts a layer has; say --model")
        hidden_layers, experts = trace.layers, trace.n_experts
    else:
        if trace.layers != spec.layers:
            raise InputError(
                f"the trace has {trace.layers} MoE layers, {spec.name} has {spec.layers}; counts "
                "are needed of all of them"
            )
        _check_experts(trace, spec)
        # By order, as in a replay: layouts that do not know the numbers count MoE layers only.
        numbers = list(spec.layer_ids)
        hidden_layers, experts = spec.hidden_layers, spec.experts
    used = popularity(trace)[:, :experts]
    unseen = [number for number, row in zip(numbers, used, strict=True) if not row.any()]
    if unseen:
        raise InputError(
            f"the trace has no counts of layer {unseen[0]}; placement by frequency needs some of "
            "every MoE layer"
        )
    counts = np.zeros((hidden_layers, experts), np.int64)
    counts[numbers, : used.shape[1]] = used
    return counts


def export_sglang(trace: Trace, path: Path, spec: ModelSpec | None = None) -> tuple[str, ...]:
    """Write `layer_counts` for `--init-expert-location`; return the command lines that take it.

    `.json` is {"logical_count": [layers, experts]}, which SGLang reads (eplb/expert_location.py,
    commit 01fec5c). `.pt` holds int32 (1, layers, experts) under the same name: SGLang reads it,
    and KTransformers, whose placement by frequency takes that suffix and three axes alone
    (kvcache-ai/sglang, layers/moe/kt_ep_wrapper.py). Both go by the suffix.

    Raises InputError for another suffix, without torch for `.pt`, and as `layer_counts`.
    """
    if path.suffix not in (".json", ".pt"):
        raise InputError(f"{path}: the engines go by the suffix; legal are .json and .pt")
    counts = layer_counts(trace, spec)
    if path.suffix == ".json":
        with _whole(path) as unfinished:
            unfinished.write_text(json.dumps({"logical_count": counts.tolist()}), encoding="utf-8")
    else:
        torch = _torch()
        saved = {"logical_count": torch.from_numpy(counts[None].astype(np.int32))}
        # To a stream: torch keeps the name of a file inside of it.
        with _whole(path) as unfinished, unfinished.open("wb") as stream:
            torch.save(saved, stream)
    launch = "python -m sglang.launch_server --model MODEL"
    location = f"--init-expert-location {shlex.quote(str(path))}"
    frequency = (
        f"{launch} --kt-weight-path MODEL --kt-num-gpu-experts N "
        f"--kt-expert-placement-strategy frequency {location}"
    )
    plain = f"{launch} {location}"
    return (plain, frequency) if path.suffix == ".pt" else (plain,)


def export_libcachesim(
    trace: Trace,
    path: Path,
    spec: ModelSpec | None = None,
    *,
    bits: int = 16,
    layer: int | None = None,
) -> int:
    """Write the accesses for libCacheSim (oracleGeneral); return how many there are.

    time: the token's row. object: layer * experts per layer + expert, layer being the model's own
    number. size: bytes of an expert at that precision, 1 without a specification. next: the number,
    counted from 1 as libCacheSim's traceConv does, of the next access to the same object, or -1.
    What is missing, and experts without weights, are no accesses.

    `layer` takes one layer alone, by the model's own number. Raises InputError for one that the
    trace does not have, for another model's specification, and for sizes beyond 32 bits.
    """
    size = 1 if spec is None else expert_bytes(spec, bits)
    if size > np.iinfo(np.uint32).max:
        raise InputError(f"an expert of {size} bytes; libCacheSim's records hold up to 4294967295")
    experts = held = trace.n_experts
    if spec is not None:
        _check_experts(trace, spec)
        held = min(experts, spec.experts)
    numbers = trace.layer_ids
    ids = trace.experts
    if layer is not None:
        if layer not in numbers:
            raise InputError(f"no MoE layer {layer} in the trace; there are: {listed(numbers)}")
        index = int(np.flatnonzero(numbers == layer)[0])
        numbers, ids = numbers[index : index + 1], ids[:, index : index + 1]

    step = _rows_at_once(ids[0].size)
    count = sum(int((ids[a : a + step] < held).sum()) for a in range(0, trace.tokens, step))
    upcoming = np.full(len(numbers) * experts, NEVER, np.int64)
    before = count
    with _whole(path) as unfinished, unfinished.open("wb") as stream:
        # Backwards, since each access names the next one.
        for first in reversed(range(0, trace.tokens, step)):
            part = ids[first : first + step]
            token, at, rank = (part < held).nonzero()
            expert = part[token, at, rank].astype(np.int64)
            before -= len(token)
            records = np.empty(len(token), ACCESS)
            records["time"] = first + token
            records["object"] = numbers[at].astype(np.int64) * experts + expert
            records["size"] = size
            records["next"] = _next_accesses(at * experts + expert, before + 1, upcoming)
            stream.seek(before * ACCESS.itemsize)
            stream.write(records.tobytes())
    return count


def _next_accesses(objects: IntArray, first: int, upcoming: IntArray) -> IntArray:
    """Return the number of each access's successor; the accesses are numbered from `first`.

    `upcoming` holds, of every object, its first access after these, and then its first from here.
    """
    order = np.argsort(objects, kind="stable")
    alike = objects[order]
    numbers = first + order
    starts = np.ones(len(order), np.bool_)
    starts[1:] = alike[1:] != alike[:-1]
    later = np.empty(len(order), np.int64)
    later[order[:-1]] = numbers[1:]
    ends = np.roll(starts, -1)
    later[order[ends]] = upcoming[alike[ends]]
    upcoming[alike[starts]] = numbers[starts]
    return later


def export_table(trace: Trace, path: Path, kind: str) -> int:
    """Write one row per token, layer and rank, as `csv` or `parquet`; return how many there are.

    Columns: row, sequence, position, phase (prefill or decode), layer (the model's own number),
    rank (empty where experts are in no order), expert, weight (empty where not recorded). What is
    missing has no row.

    Raises InputError without pyarrow.
    """
    written = 0
    with _whole(path) as unfinished, _table(unfinished, kind) as writer:
        for batch in _batches(trace):
            writer.write_batch(batch)
            written += batch.num_rows
    return written


def _table(path: Path, kind: str) -> Any:
    _pyarrow()
    if kind == "parquet":
        from pyarrow.parquet import ParquetWriter

        return ParquetWriter(path, _schema())
    from pyarrow.csv import CSVWriter, WriteOptions

    return CSVWriter(path, _schema(), write_options=WriteOptions(quoting_style="none"))


def _schema() -> Any:
    import pyarrow as pa

    integers = ("sequence", "position", "layer", "rank", "expert")
    types = {
        "row": pa.int64(),
        **dict.fromkeys(integers, pa.int32()),
        "phase": pa.string(),
        "weight": pa.float32(),
    }
    order = ("row", "sequence", "position", "phase", "layer", "rank", "expert", "weight")
    return pa.schema([(name, types[name]) for name in order])


def _batches(trace: Trace) -> Iterator[Any]:
    import pyarrow as pa

    phases = pa.array(PHASES)
    ordered = trace.meta.get("has_rank_order") is not False
    step = _rows_at_once(trace.experts[0].size)
    for first in range(0, trace.tokens, step):
        ids = trace.experts[first : first + step]
        token, layer, rank = (ids != MISSING).nonzero()
        row = first + token
        weight = None if trace.weights is None else trace.weights[row, layer, rank]
        columns = [
            row,
            trace.sequence[row],
            trace.position[row],
            phases.take(pa.array(trace.phase[row])),
            trace.layer_ids[layer],
            rank.astype(np.int32) if ordered else pa.nulls(len(row), pa.int32()),
            ids[token, layer, rank].astype(np.int32),
            pa.nulls(len(row), pa.float32()) if weight is None else weight.astype(np.float32),
        ]
        yield pa.record_batch([pa.array(column) for column in columns], schema=_schema())


def _check_experts(trace: Trace, spec: ModelSpec) -> None:
    legal = spec.experts + spec.weightless_experts
    if trace.n_experts > legal:
        raise InputError(
            f"the trace has {trace.n_experts} experts per layer, {spec.name} has {legal}; say "
            "another --model"
        )


def _rows_at_once(accesses: int) -> int:
    return max(1, CHUNK // accesses)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to, which becomes `path` if all went well."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise InputError(".pt needs torch: pip install 'moesim[torch]', or write .json") from None
    return torch


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise InputError("csv and parquet need pyarrow: pip install 'moesim[parquet]'") from None
    return pyarrow
