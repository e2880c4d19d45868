"""`experts [layers, tokens, top_k]` int16 and `meta` in an npz: text fed in windows."""

from typing import Any

import numpy as np

from moesim.errors import TraceError
from moesim.model import spec_to_dict
from moesim.traces.format import Trace, demand, meta_of, refuse
from moesim.traces.importers.common import Options, without_first
from moesim.traces.importers.source import Source
from moesim.types import PREFILL

WINDOW = 512
"""Tokens after which a recording in windows starts from an empty memory, unless its meta says."""


def detect(source: Source) -> bool:
    """Tell by the name of its one large array."""
    return source.form == "npz" and "experts" in source.value


def read(source: Source, options: Options) -> Trace:
    """Return the trace, one sequence per window.

    The text was fed in windows with a cleared memory, so overlap across a border is chance:
    nothing may be counted across it. Its layers are those with experts; the file does not say
    their numbers, and they count from 0 unless the model is given.
    """
    arrays = source.value
    for name in arrays:
        if name not in ("experts", "meta"):
            raise TraceError(f"there is no array called {name[:80]!r} in such a file")
    for name in ("experts", "meta"):
        if name not in arrays:
            raise TraceError(f"array {name} is missing")
    by_layer, meta = arrays["experts"], meta_of(arrays["meta"])
    demand("experts", by_layer, np.int16, (None, None, None))
    refuse("experts", by_layer, by_layer < -1, "expert ids, and -1 (missing)")
    window = meta.get("window", WINDOW)
    if type(window) is not int or not 1 <= window < 1 << 31:
        raise TraceError(f"meta: window is {window!r:.80}; legal are 1..2147483647 tokens")
    layers, tokens, _ = by_layer.shape
    token = np.arange(tokens)
    added: dict[str, Any] = {
        "window": window,
        "granularity": "token",
        "has_rank_order": True,
        "memory": "cleared before every sequence",
        "importer": "windows: npz experts [layers, tokens, top_k] int16",
    }
    spec = options.spec
    layer_ids = np.arange(layers, dtype=np.int32)
    if spec is not None:
        if layers != spec.layers:
            raise TraceError(f"has {layers} layers; {spec.name} has {spec.layers} with experts")
        layer_ids = np.array(spec.layer_ids, np.int32)
        meta = {"model": spec.name, **meta, "spec": spec_to_dict(spec)}
    trace = Trace(
        experts=np.ascontiguousarray(by_layer.transpose(1, 0, 2)).view(np.uint16),  # -1 is MISSING
        layer_ids=layer_ids,
        phase=np.full(tokens, PREFILL, np.uint8),
        sequence=(token // window).astype(np.int32),
        position=(token % window).astype(np.int32),
        meta={**meta, **added},
    )
    return without_first(trace) if options.first_token == "drop" else trace
