"""What importers share: options, popularity, ids, layers, and the facts kept in meta."""

from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from moesim.errors import TraceError
from moesim.model import ModelSpec, load_model, model_names, normalised, spec_to_dict
from moesim.traces.format import MISSING, MOST_EXPERTS, AnyArray, Ids, Ints, Trace, refuse
from moesim.types import IntArray

_UNSORTED = ("deepseek", "glm4_moe", "dots1", "minimax_m2", "mistral4", "kimi_k2")
"""Families whose routers take the top k unsorted: slot 0 is not the largest weight."""


Count = Annotated[int, Meta(ge=0, lt=1 << 31)]


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the user adds to a file that does not say everything; None where nothing was said.

    spec: the model. experts, top_k: per layer and per token. prompt_tokens: length of every prompt.
    start: positions before the first row. cached: drop (default) or keep rows that a prefix cache
    served, which are ids of an earlier request. last_layer: fill (default) or drop it where
    llama.cpp computed it for the last tokens only. first_token: keep (default) or drop those of
    windows.
    """

    spec: ModelSpec | None = None
    experts: Annotated[int, Meta(ge=1, lt=MISSING)] | None = None
    top_k: Annotated[int, Meta(ge=1, lt=MISSING)] | None = None
    prompt_tokens: Annotated[int, Meta(ge=1, lt=1 << 31)] | None = None
    start: Count | None = None
    cached: Literal["drop", "keep"] | None = None
    last_layer: Literal["fill", "drop"] | None = None
    first_token: Literal["keep", "drop"] | None = None


class Popularity(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """How often each expert was chosen, where no more is known or asked: (layers, experts).

    layer_ids: the model's own number of each layer (layers,). granularity: token, layer_order (the
    order within a layer was recorded, but no border between tokens) or counts.
    """

    counts: IntArray
    layer_ids: Ints
    granularity: str
    meta: dict[str, Any] = {}


class Part(NamedTuple):
    """The rows of one sequence, in order of position, the first at position `start`.

    ids: (rows, layers, top_k). Positions below `prompt` are its prompt. token_id: (rows,).
    """

    ids: Ids
    start: int
    prompt: int
    token_id: Ints | None = None


def join(parts: list[Part], spec: ModelSpec, meta: dict[str, Any]) -> Trace:
    """Return the trace of whole sequences, numbered as they come."""
    lengths = [len(part.ids) for part in parts]
    position = np.concatenate([part.start + np.arange(len(part.ids)) for part in parts])
    tokens = [part.token_id for part in parts if part.token_id is not None]
    return Trace(
        experts=np.concatenate([part.ids for part in parts]),
        layer_ids=np.array(spec.layer_ids, np.int32),
        phase=(position >= np.repeat([part.prompt for part in parts], lengths)).astype(np.uint8),
        sequence=np.repeat(np.arange(len(parts)), lengths).astype(np.int32),
        position=position.astype(np.int32),
        token_id=np.concatenate(tokens) if len(tokens) == len(parts) else None,
        meta=meta,
    )


def without_first(trace: Trace) -> Trace:
    """Return the trace without the first token of every sequence, an attention sink."""
    later = trace.position > 0
    if not later.any():
        raise TraceError("nothing is left without the first token of every sequence")
    return trace.at(later)


def spec_for(options: Options, stated: str | None = None) -> ModelSpec:
    """Return the model given, else the shipped one that the file names.

    What a file states is compared as a name only: it must not lead to another file.
    """
    if options.spec is not None:
        return options.spec
    if stated is not None and (plain := normalised(stated)) in model_names():
        return load_model(plain)
    whose = "does not name its model" if stated is None else f"is of unknown model {stated[:80]!r}"
    raise TraceError(
        f"{whose}, which tells the layers that have experts; moesim trace import takes --model, a "
        "name or a config.json"
    )


def experts_for(options: Options) -> int | None:
    """Return the experts per layer that the user or the model states, weightless ones included."""
    spec = options.spec
    stated = None if spec is None else spec.experts + spec.weightless_experts
    return agreed("experts per layer", "--experts", options.experts, stated)


def agreed(what: str, option: str, given: int | None, stated: int | None) -> int | None:
    """Return the one number that is known, None if neither is; raise TraceError if they differ."""
    if given is not None and stated is not None and given != stated:
        raise TraceError(f"{what}: {stated}, and {option} says {given}")
    return stated if given is None else given


def ids_of(name: str, array: AnyArray) -> Ids:
    """Return ids (rows, layers, top_k) as uint16, -1 as MISSING; raise TraceError for others."""
    if array.dtype.kind not in "iu" or array.ndim != 3 or 0 in array.shape:
        raise TraceError(
            f"{name} is {array.dtype} of shape {array.shape}; it must be whole numbers of shape "
            "(tokens, layers, top_k), each at least 1"
        )
    refuse(name, array, (array < -1) | (array > MISSING), f"0..{MISSING - 1}, and -1 (missing)")
    return array.astype(np.uint16)


def moe_layers(name: str, ids: Ids, spec: ModelSpec) -> Ids:
    """Return the layers with experts of ids (rows, layers, top_k) of all layers, or of those alone.

    By the model and never by value: a layer without experts reads as expert 0 chosen always.
    """
    layers, top_k = ids.shape[1:]
    if layers not in (spec.hidden_layers, spec.layers):
        raise TraceError(
            f"{name} has {layers} layers; {spec.name} has {spec.hidden_layers}, "
            f"{spec.layers} of them with experts"
        )
    if top_k != spec.top_k:
        raise TraceError(f"{name} has {top_k} slots; {spec.name} is top-{spec.top_k}")
    return ids if layers == spec.layers else ids[:, list(spec.layer_ids)]


def facts(importer: str, experts: int, spec: ModelSpec | None, **more: Any) -> dict[str, Any]:
    """Return the meta of an imported trace; `importer` is its kind and what was found."""
    meta = {"num_experts": experts, "granularity": "token", "importer": importer, **more}
    if spec is not None:
        meta = {"model": spec.name, "spec": spec_to_dict(spec), **meta}
    return meta


def has_rank_order(spec: ModelSpec) -> bool:
    """Tell whether ids as an engine executed them are in order of weight."""
    return not spec.model_type.startswith(_UNSORTED)


def zero_counts(layers: int, experts: int) -> IntArray:
    """Return counts of 0 (layers, experts); raise TraceError for more than any model has."""
    if not 0 < layers * experts <= MOST_EXPERTS:
        raise TraceError(f"{layers} layers of {experts} experts; legal are 1..{MOST_EXPERTS}")
    return np.zeros((layers, experts), np.int64)


def counts_by_layer(
    counts: npt.NDArray[Any], spec: ModelSpec | None, granularity: str, importer: str
) -> Popularity:
    """Return the popularity of counts (layers, experts), without the layers known to be dense."""
    layer_ids = np.arange(len(counts), dtype=np.int32)
    if spec is not None:
        if len(counts) not in (spec.hidden_layers, spec.layers):
            raise TraceError(
                f"has {len(counts)} layers; {spec.name} has {spec.hidden_layers}, "
                f"{spec.layers} of them with experts"
            )
        layer_ids = np.array(spec.layer_ids, np.int32)
        counts = counts if len(counts) == spec.layers else counts[layer_ids]
    return Popularity(
        counts=np.ascontiguousarray(counts, np.int64),
        layer_ids=layer_ids,
        granularity=granularity,
        meta=facts(importer, counts.shape[1], spec, granularity=granularity),
    )
