"""Requests that an engine served: which rows of a request were computed, and what they are."""

from typing import NamedTuple

import numpy as np

from moesim.errors import TraceError
from moesim.traces.format import Ids
from moesim.traces.importers.common import Options, Part, agreed


class Request(NamedTuple):
    """One sequence as an engine reports it; None for what it does not say.

    ids: (rows, layers, top_k). prompt, generated, cached: tokens. token_ids: of prompt and answer.
    """

    place: str
    ids: Ids
    prompt: int | None
    generated: int | None
    cached: int | None = None
    token_ids: list[int] | None = None


def part_of(request: Request, options: Options) -> Part:
    """Return the rows of a request that were computed for it.

    n prompt and generated tokens have n - 1 rows: the last one sampled was never forwarded. A row
    in its place is a filler of some wrappers, or a rejected draft, and is dropped.
    """
    place, ids = request.place, request.ids
    start = options.start or 0
    prompt = agreed(f"{place}: prompt", "--prompt-tokens", options.prompt_tokens, request.prompt)
    if prompt is None:
        raise TraceError(
            f"{place} does not say how long its prompt is; moesim trace import takes "
            "--prompt-tokens"
        )
    if request.generated is not None:
        rows = prompt + request.generated - 1 - start
        if rows < 1 or len(ids) not in (rows, rows + 1):
            raise TraceError(
                f"{place} has {len(ids)} rows; {prompt} prompt and {request.generated} generated "
                f"tokens have {rows} from position {start} on (--start), as the last one is never "
                "forwarded"
            )
        ids = ids[:rows]
    elif start + len(ids) < prompt:
        raise TraceError(
            f"{place} has {len(ids)} rows from position {start} on (--start); the prompt has "
            f"{prompt} tokens"
        )
    elif (ids[-1] == ids[-1, 0, 0]).all() and ids.shape[2] > 1:
        ids = ids[:-1]  # one expert in every slot is no routing but a filler
    cached = request.cached or 0
    if cached > prompt:
        raise TraceError(f"{place}: {cached} cached tokens of a prompt of {prompt}")
    if options.cached != "keep" and cached > start:
        ids, start = ids[cached - start :], cached
    if not len(ids):
        raise TraceError(f"{place}: no row is left of {len(request.ids)}")
    tokens = request.token_ids
    if tokens is None or len(tokens) < start + len(ids):
        return Part(ids, start, prompt)
    return Part(ids, start, prompt, np.array(tokens[start : start + len(ids)], np.int32))
