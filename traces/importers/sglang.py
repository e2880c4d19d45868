"""SGLang's routed experts: `--enable-return-routed-experts` and `return_routed_experts: true`.

`meta_info["routed_experts"]` is base64 of int32 for the positions from `routed_experts_start_len`
to the last token but one, all hidden layers, (rows, layers, top_k). Rows are kept by slot of the
KV cache: those that the prefix cache served are ids of an earlier request.
"""

from typing import Any

import msgspec

from moesim.errors import TraceError
from moesim.traces.format import Trace
from moesim.traces.importers.carriers import carried, converted
from moesim.traces.importers.common import (
    Count,
    Options,
    facts,
    has_rank_order,
    ids_of,
    join,
    moe_layers,
    spec_for,
)
from moesim.traces.importers.served import Request, part_of
from moesim.traces.importers.source import Source


class MetaInfo(msgspec.Struct):
    """What the server says of a response."""

    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    cached_tokens: Count | None = None
    routed_experts: Any = None


class Response(msgspec.Struct):
    """A response of `/generate`."""

    meta_info: MetaInfo


def detect(source: Source) -> bool:
    """Tell by `meta_info`."""
    first = source.value[0] if source.form == "json" else None
    if isinstance(first, list) and first:
        first = first[0]
    return isinstance(first, dict) and "meta_info" in first


def read(source: Source, options: Options) -> Trace:
    """Return the trace, one sequence per response; cached rows are dropped unless asked for."""
    spec = spec_for(options)
    parts, form = [], ""
    for place, response in _responses(source.value):
        info, name = response.meta_info, f"{place}meta_info.routed_experts"
        if info.routed_experts is None:
            raise TraceError(
                f"{name} is missing: the request did not ask for it, or the server started without "
                "--enable-return-routed-experts"
            )
        array, form = carried(name, info.routed_experts, (spec.hidden_layers, spec.top_k))
        ids = moe_layers(name, ids_of(name, array), spec)
        request = Request(name, ids, info.prompt_tokens, info.completion_tokens, info.cached_tokens)
        parts.append(part_of(request, options))
    if not parts:
        raise TraceError("holds no response")
    meta = facts(
        f"sglang: meta_info.routed_experts as {form}, {spec.hidden_layers} hidden layers",
        spec.experts + spec.weightless_experts,
        spec,
        has_rank_order=has_rank_order(spec),
        cached=options.cached or "drop",
    )
    return join(parts, spec, meta)


def _responses(documents: list[Any]) -> list[tuple[str, Response]]:
    found = []
    for i, document in enumerate(documents, 1):
        place = f"line {i}: " if len(documents) > 1 else ""
        if isinstance(document, list):
            responses = converted(place or "the responses", document, list[Response])
            found += [(f"{place}[{j}].", response) for j, response in enumerate(responses)]
        else:
            found.append((place, converted(place or "the response", document, Response)))
    return found
