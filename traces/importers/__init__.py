"""Importers: routing as engines and tools wrote it, turned into a trace.

A file's kind is detected by shape, dtype and content, never by a version it states: engines change
their formats without notice. What was found is written into `meta["importer"]`.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from moesim.errors import InputError, TraceError
from moesim.model import ModelSpec
from moesim.traces.format import Trace, check, naming, unchecked
from moesim.traces.importers import llama_cpp, sglang, sglang_recorder, vllm, windows
from moesim.traces.importers.common import Options, Popularity
from moesim.traces.importers.source import Source, open_source
from moesim.traces.stats import popularity

__all__ = [
    "IMPORTERS",
    "Importer",
    "Popularity",
    "import_trace",
    "load_popularity",
    "load_trace",
]


class Importer(NamedTuple):
    """One kind of file. `uses` names the options that mean something for it, beside the model."""

    about: str
    granularity: str
    """token: a trace. layer_order, counts: a Popularity."""
    uses: tuple[str, ...]
    detect: Callable[[Source], bool]
    read: Callable[[Source, Options], Trace | Popularity]


def _is_ours(source: Source) -> bool:
    return source.form == "moesim"


def _read_ours(source: Source, options: Options) -> Trace:
    return unchecked(source.path)


_SERVED = ("prompt_tokens", "start", "cached")
_LLAMA = ("experts", "top_k", "last_layer")

# Another source is a module with detect and read, and a line here.
IMPORTERS: dict[str, Importer] = {
    "moesim": Importer("npz in the format moesim.trace/1", "token", (), _is_ours, _read_ours),
    "windows": Importer(
        "npz with experts [layers, tokens, top_k] and meta",
        "token", ("first_token",), windows.detect, windows.read,
    ),
    "vllm": Importer(
        "JSON, npy or npz with vLLM's routed_experts", "token", _SERVED, vllm.detect, vllm.read
    ),
    "sglang": Importer(
        "JSON with SGLang's meta_info.routed_experts", "token", _SERVED, sglang.detect, sglang.read
    ),
    "sglang-tokens": Importer(
        "pt of SGLang's recorder, mode per_token",
        "token", (), sglang_recorder.detect_tokens, sglang_recorder.read_tokens,
    ),
    "sglang-passes": Importer(
        "pt of SGLang's recorder, mode per_pass",
        "counts", (), sglang_recorder.detect_passes, sglang_recorder.read_passes,
    ),
    "sglang-stat": Importer(
        "pt of SGLang's recorder, modes stat and stat_approx",
        "counts", (), sglang_recorder.detect_stat, sglang_recorder.read_stat,
    ),
    "llama-ranks": Importer(
        "llama.cpp, CSV phase,token,layer,rank,expert",
        "token", _LLAMA, llama_cpp.detect_ranks, llama_cpp.read_ranks,
    ),
    "llama-rows": Importer(
        "llama.cpp, CSV pos,layer,id,id,...",
        "token", _LLAMA, llama_cpp.detect_rows, llama_cpp.read_rows,
    ),
    "llama-chunks": Importer(
        "llama.cpp, binary int32 layer,n_tokens,k,ids",
        "token", (*_LLAMA, "first_token"), llama_cpp.detect_chunks, llama_cpp.read_chunks,
    ),
    "llama-pairs": Importer(
        "llama.cpp, CSV layer,expert",
        "layer_order", ("experts", "top_k"), llama_cpp.detect_pairs, llama_cpp.read_pairs,
    ),
}  # fmt: skip

_ONLY = {
    "counts": "counts of experts, without tokens",
    "layer_order": "the order of experts in each layer, without borders between tokens",
}


def load_trace(
    path: str | os.PathLike[str],
    *,
    kind: str = "auto",
    spec: ModelSpec | None = None,
    **options: Any,
) -> Trace:
    """Return the checked trace of a file of any kind in IMPORTERS.

    `spec` says which of the recorded layers have experts, where the file does not; `options` are
    the other fields of `Options`. Raises TraceError or InputError, in one line, naming file, place
    and value of what is wrong, or the option that is missing; also for files that hold less than a
    trace, which `load_popularity` reads.
    """
    return import_trace(path, kind=kind, spec=spec, **options)[1]


def import_trace(
    path: str | os.PathLike[str],
    *,
    kind: str = "auto",
    spec: ModelSpec | None = None,
    **options: Any,
) -> tuple[str, Trace]:
    """Return the kind that a file was taken for, too; see `load_trace`."""
    kind, content = _import(Path(path), kind, _options(spec, options), traces_only=True)
    assert isinstance(content, Trace)
    return kind, content


def load_popularity(
    path: str | os.PathLike[str],
    *,
    kind: str = "auto",
    spec: ModelSpec | None = None,
    **options: Any,
) -> Popularity:
    """Return how often each expert was chosen, of a file of any kind in IMPORTERS.

    Arguments and errors are those of `load_trace`.
    """
    _, found = _import(Path(path), kind, _options(spec, options), traces_only=False)
    if isinstance(found, Popularity):
        return found
    return Popularity(
        counts=popularity(found),
        layer_ids=found.layer_ids,
        granularity="token",
        meta=found.meta,
    )


def _import(
    path: Path, kind: str, options: Options, traces_only: bool
) -> tuple[str, Trace | Popularity]:
    if kind not in ("auto", *IMPORTERS):
        names = ", ".join(IMPORTERS)
        raise InputError(f"no kind of trace named {kind!r}; there are: auto, {names}")
    with naming(path, "file"):
        source = open_source(path)
    with naming(path, f"{source.form} file"):
        kind = _detect(source, kind)
        importer = IMPORTERS[kind]
        if traces_only and importer.granularity != "token":
            raise TraceError(
                f"{kind} holds {_ONLY[importer.granularity]}: a popularity (load_popularity), but "
                "no trace"
            )
        _refuse_unused(kind, importer, options)
        content = importer.read(source, options)
        if isinstance(content, Trace):
            check(content)
    return kind, content


def _options(spec: ModelSpec | None, options: dict[str, Any]) -> Options:
    try:
        return msgspec.structs.replace(msgspec.convert(options, Options), spec=spec)
    except msgspec.ValidationError as error:
        raise InputError(f"options of an importer: {error}") from None


def _detect(source: Source, wanted: str) -> str:
    if wanted != "auto":
        if not IMPORTERS[wanted].detect(source):
            raise TraceError(f"is no file of kind {wanted} ({IMPORTERS[wanted].about})")
        return wanted
    for kind, importer in IMPORTERS.items():
        if importer.detect(source):
            return kind
    known = "; ".join(f"{kind} ({importer.about})" for kind, importer in IMPORTERS.items())
    raise TraceError(f"is no kind of trace that is known; there are: {known}")


def _refuse_unused(kind: str, importer: Importer, options: Options) -> None:
    for name in Options.__struct_fields__:
        if name not in ("spec", *importer.uses) and getattr(options, name) is not None:
            legal = ", ".join(_flag(one) for one in importer.uses) or "none"
            raise TraceError(
                f"{_flag(name)} says nothing of a file of kind {kind}; its options are: {legal}"
            )


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"
