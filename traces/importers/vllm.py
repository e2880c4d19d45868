"""vLLM's routed experts: `--enable-return-routed-experts`, in the three forms that are in use.

1: `CompletionOutput.routed_experts`, int32 (n - 1, hidden layers, top_k). 2 (v0.21): the prompt's
rows at the response and the answer's at each choice, int16, MoE layers only, -1 where a prefix
cache served. 3: `choices[i].routed_experts`, base64 of npy, uint8 or uint16, all hidden layers.
Python objects are no files: arrays are taken from npy and npz files and from JSON.
"""

import re
from typing import Any

import msgspec
import numpy as np

from moesim.errors import TraceError
from moesim.traces.format import Ids, Trace
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

_KEYS = ("choices", "outputs", "routed_experts", "prompt_routed_experts")
_MEMBER = re.compile(r"((?:prompt_)?(?:routed_experts|token_ids))(?:_(\d{1,6}))?")


class Details(msgspec.Struct):
    """Of `usage`: what a prefix cache served."""

    cached_tokens: Count | None = None


class Usage(msgspec.Struct):
    """Token counts of a response."""

    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    prompt_tokens_details: Details | None = None


class Choice(msgspec.Struct):
    """One answer to a prompt."""

    routed_experts: Any = None
    token_ids: list[Count] | None = None
    prompt_token_ids: list[Count] | None = None


class Response(msgspec.Struct):
    """A response of the server (`choices`), or a RequestOutput's own fields (`outputs`)."""

    choices: list[Choice] | None = None
    outputs: list[Choice] | None = None
    routed_experts: Any = None
    token_ids: list[Count] | None = None
    prompt_routed_experts: Any = None
    prompt_token_ids: list[Count] | None = None
    num_cached_tokens: Count | None = None
    usage: Usage | None = None
    model: str | None = None


def detect(source: Source) -> bool:
    """Tell by integers of three axes, or by the names that hold them."""
    if source.form == "npy":
        return source.value.dtype.kind in "iu" and source.value.ndim == 3
    if source.form == "npz":
        return any("routed_experts" in name for name in source.value)
    if source.form != "json":
        return False
    first = source.value[0]
    if isinstance(first, list) and first:
        first = first[0]
        if isinstance(first, list):
            return True
    return isinstance(first, dict) and any(key in first for key in _KEYS)


def read(source: Source, options: Options) -> Trace:
    """Return the trace, one sequence per choice, each with a prompt of its own.

    Rows that a prefix cache served are missing in form 2; in form 3 they are ids of an earlier
    request, and dropped unless asked for.
    """
    found = _responses(source)
    models = {response.model for _, response in found}
    if len(models) > 1:
        raise TraceError(f"has answers of {', '.join(sorted(map(repr, models)))}; one is legal")
    spec = spec_for(options, found[0][1].model)
    forms: list[str] = []
    requests = [
        request
        for place, response in found
        for request in _requests(place, response, (spec.hidden_layers, spec.top_k), forms)
    ]
    if not requests:
        raise TraceError("holds no answer")
    layers = requests[0].ids.shape[1]
    parts = [
        part_of(request._replace(ids=moe_layers(request.place, request.ids, spec)), options)
        for request in requests
    ]
    which = "hidden" if layers == spec.hidden_layers else "MoE"
    meta = facts(
        f"vllm: routed experts as {forms[0]}, {layers} {which} layers",
        spec.experts + spec.weightless_experts,
        spec,
        has_rank_order=has_rank_order(spec),
        cached=options.cached or "drop",
    )
    stated = found[0][1].model
    return join(parts, spec, meta if stated is None else {**meta, "model": stated})


def _responses(source: Source) -> list[tuple[str, Response]]:
    if source.form == "npy":
        return [("", Response(routed_experts=source.value))]
    if source.form == "npz":
        return _from_arrays(source.value)
    documents: list[tuple[str, object]] = [("", source.value[0])]
    if len(source.value) > 1:
        documents = [(f"line {i}: ", document) for i, document in enumerate(source.value, 1)]
    found = []
    for place, document in documents:
        if isinstance(document, dict):
            found.append((place, converted(place or "the response", document, Response)))
        elif isinstance(document, list) and document and isinstance(document[0], list):
            found.append((place, Response(routed_experts=document)))
        elif isinstance(document, list):
            responses = converted(place or "the responses", document, list[Response])
            found += [(f"{place}[{i}].", response) for i, response in enumerate(responses)]
        else:
            raise TraceError(f"{place}{str(document)[:40]} is no response")
    return found


def _from_arrays(arrays: dict[str, Any]) -> list[tuple[str, Response]]:
    """Return one response per number at the end of the arrays' names."""
    fields: dict[int, dict[str, Any]] = {}
    for name, array in arrays.items():
        match = _MEMBER.fullmatch(name)
        if match is None:
            raise TraceError(
                f"there is no array called {name[:80]!r} in such a file; there are "
                "[prompt_]routed_experts and [prompt_]token_ids, also with _0, _1, ..."
            )
        value = array.tolist() if "token_ids" in name else array
        fields.setdefault(int(match[2] or 0), {})[match[1]] = value
    return [("", converted("the arrays", fields[i], Response)) for i in sorted(fields)]


def _answers(response: Response) -> list[tuple[str, Choice]]:
    """Return the choices, each with its place; that of a flat dump is the response itself."""
    for name, choices in (("choices", response.choices), ("outputs", response.outputs)):
        if choices is not None:
            return [(f"{name}[{i}].", choice) for i, choice in enumerate(choices)]
    return [("", Choice(response.routed_experts, response.token_ids))]


def _requests(
    place: str, response: Response, raw: tuple[int, int], forms: list[str]
) -> list[Request]:
    """Return a response's answers; `forms` collects how their ids were carried."""
    usage = response.usage or Usage()
    details = usage.prompt_tokens_details or Details()
    cached = details.cached_tokens
    if cached is None:
        cached = response.num_cached_tokens
    prompt_ids = None
    if response.prompt_routed_experts is not None:
        prompt_ids = _ids(
            f"{place}prompt_routed_experts", response.prompt_routed_experts, raw, forms
        )
        cached = None  # marked by -1
    answers = _answers(response)
    if len(answers) > 1 and cached:
        raise TraceError(
            f"{place}usage counts {cached} cached tokens for {len(answers)} answers together; "
            f"record one answer per response"
        )
    requests = []
    for own, choice in answers:
        name = f"{place}{own}routed_experts"
        if choice.routed_experts is None:
            raise TraceError(
                f"{name} is missing: the request was aborted or preempted, or the server started "
                "without --enable-return-routed-experts"
            )
        value = choice.routed_experts
        if prompt_ids is not None and isinstance(value, (list, np.ndarray)) and not len(value):
            ids = prompt_ids[:0]  # one token was generated, and never forwarded
        else:
            ids = _ids(name, value, raw, forms)
        before = choice.prompt_token_ids or response.prompt_token_ids
        # Of several answers, `usage` says only the sums.
        prompt = usage.prompt_tokens if len(answers) == 1 else None
        prompt = prompt if before is None else len(before)
        if prompt_ids is not None:
            if prompt_ids.shape[1:] != ids.shape[1:] or prompt not in (None, len(prompt_ids)):
                raise TraceError(
                    f"{place}prompt_routed_experts has shape {prompt_ids.shape}, {name} "
                    f"{ids.shape}, and the prompt {prompt} tokens; they must agree"
                )
            prompt, ids = len(prompt_ids), np.concatenate([prompt_ids, ids])
        after = choice.token_ids
        generated = usage.completion_tokens if len(answers) == 1 else None
        token_ids = None if before is None or after is None else before + after
        generated = generated if after is None else len(after)
        requests.append(Request(name, ids, prompt, generated, cached, token_ids))
    return requests


def _ids(name: str, value: object, raw: tuple[int, int], forms: list[str]) -> Ids:
    array, form = carried(name, value, raw)
    forms.append(form)
    return ids_of(name, array)
