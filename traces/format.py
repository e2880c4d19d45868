"""The trace: which experts the router chose for every token, read from and written to npz files.

One layout, `moesim.trace/1`; `moesim.traces.importers` reads what engines and tools write. Nothing
is ever unpickled, and nothing is allocated before the sizes stated in the file agree with each
other and with the file's own size.
"""

import contextlib
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import msgspec
import numpy as np
import numpy.typing as npt

from moesim.errors import MoesimError, TraceError
from moesim.types import IntArray

Ids = npt.NDArray[np.uint16]
Halves = npt.NDArray[np.float16]
Ints = npt.NDArray[np.int32]
AnyArray = npt.NDArray[Any]

SCHEMA = "moesim.trace/1"

MISSING = 65535
"""In place of an expert id: nothing was recorded, or nothing was guessed."""

MOST_EXPERTS = 2**24
"""Experts of all layers; no model comes near, and what is kept per expert stays affordable."""

_CHECKED_AT_ONCE = 1024

_CANDIDATES, _SCORES = "candidates_", "candidate_scores_"
_REQUIRED = ("schema", "meta", "experts", "layer_ids", "phase", "sequence", "position")
_NAME = re.compile(
    rf"{'|'.join(_REQUIRED)}|weights|token_id|(?:{_CANDIDATES}|{_SCORES})[A-Za-z0-9_-]+"
)


class Trace(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """What the router of one model chose, one row per token, as the sequences were computed.

    experts: ids (tokens, layers, top_k), largest weight first, MISSING where not recorded.
    weights: executed gate weights, same shape; they need not sum to 1. None: not recorded.
    layer_ids: the model's own number of each MoE layer (layers,), counted from 0.
    phase: PREFILL or DECODE (tokens,). sequence, position: (tokens,); rows of one sequence are in
    order of position, rows of several may interleave.
    candidates: a predictor's guess for that layer (tokens, layers, M), best first, by predictor;
    candidate_scores: its scores, same shape, for some of them.
    """

    experts: Ids
    layer_ids: Ints
    phase: npt.NDArray[np.uint8]
    sequence: Ints
    position: Ints
    weights: Halves | None = None
    token_id: Ints | None = None
    candidates: dict[str, Ids] = {}
    candidate_scores: dict[str, Halves] = {}
    meta: dict[str, Any] = {}

    @property
    def tokens(self) -> int:
        """Rows of the trace."""
        return int(self.experts.shape[0])

    @property
    def layers(self) -> int:
        """MoE layers."""
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        """Experts per token and layer."""
        return int(self.experts.shape[2])

    @property
    def n_experts(self) -> int:
        """Experts per layer: what meta states, else the largest id plus 1."""
        stated = _stated_experts(self.meta)
        if stated is not None:
            return int(stated)
        ids = self.experts[self.experts != MISSING]
        return int(ids.max()) + 1 if ids.size else 1

    def at(self, rows: IntArray | npt.NDArray[np.bool_]) -> "Trace":
        """Return the trace of some rows, which keeps the number of experts."""
        return msgspec.structs.replace(
            self,
            experts=self.experts[rows],
            weights=None if self.weights is None else self.weights[rows],
            phase=self.phase[rows],
            sequence=self.sequence[rows],
            position=self.position[rows],
            token_id=None if self.token_id is None else self.token_id[rows],
            candidates={name: ids[rows] for name, ids in self.candidates.items()},
            candidate_scores={name: s[rows] for name, s in self.candidate_scores.items()},
            meta={**self.meta, "num_experts": self.n_experts},
        )

    def digest(self) -> str:
        """Return 16 hex digits that name the content, for a run's identity."""
        sha = hashlib.sha256()
        for name, array in sorted(_arrays_of(self).items()):
            sha.update(f"{name} {array.dtype.str} {array.shape} ".encode())
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()[:16]


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Return the trace of a `moesim.trace/1` file, every value checked.

    Raises TraceError, in one line, naming file, array, index and value of what is wrong first.
    """
    path = Path(path)
    with naming(path, "npz file"):
        trace = unchecked(path)
        check(trace)
    return trace


def unchecked(path: Path) -> Trace:
    """Return what an npz file holds, to be checked; raises what `read_npz` does."""
    arrays = read_npz(path, _NAME)
    for name in _REQUIRED:
        if name not in arrays:
            raise TraceError(f"array {name} is missing")
    schema = _text("schema", arrays["schema"])
    if schema != SCHEMA:
        raise TraceError(f"schema is {schema[:80]!r}; legal is {SCHEMA!r}")
    named = {n: a for n, a in arrays.items() if n not in ("schema", "meta")}
    return Trace(
        **{n: a for n, a in named.items() if not n.startswith("candidate")},
        candidates={
            n[len(_CANDIDATES) :]: a for n, a in named.items() if n.startswith(_CANDIDATES)
        },
        candidate_scores={n[len(_SCORES) :]: a for n, a in named.items() if n.startswith(_SCORES)},
        meta=meta_of(arrays["meta"]),
    )


@contextlib.contextmanager
def naming(path: Path, what: str) -> Iterator[None]:
    """Turn any error of a reader into a TraceError of one line that names the file."""
    try:
        yield
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from error.__cause__
    except MoesimError:
        raise
    except Exception as error:
        # Hostile bytes make zipfile, zlib, ast and NumPy raise a dozen types, some undocumented.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TraceError(f"{path}: no readable {what}: {reason}") from error


def write_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a checked trace as a compressed npz; equal traces give equal bytes.

    The file appears whole or not at all. Raises TraceError if the trace is broken or the place
    cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        check(trace)
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, array in _arrays_of(trace).items():
                info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
                info.compress_type = zipfile.ZIP_DEFLATED
                info.external_attr = 0o644 << 16
                with archive.open(info, "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, array, allow_pickle=False)
        temporary.replace(path)
    except (TraceError, OSError) as error:
        raise TraceError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def rows_by_sequence(trace: Trace) -> tuple[IntArray, IntArray]:
    """Return the rows, sequence by sequence in order of first appearance, and where each starts.

    Sequence i is `rows[starts[i]:starts[i + 1]]`, in order of position.
    """
    _, first, inverse = np.unique(trace.sequence, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first, kind="stable"), kind="stable")[inverse]
    rows = np.argsort(rank, kind="stable").astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rank))]).astype(np.int64)
    return rows, starts


def check(trace: Trace) -> None:
    """Raise TraceError naming array, index and value of the first thing wrong with a trace."""
    demand("experts", trace.experts, np.uint16, (None, None, None))
    tokens, layers, top_k = trace.experts.shape
    if 0 in trace.experts.shape:
        raise TraceError(f"experts has shape {trace.experts.shape}; every axis must be at least 1")
    _check_meta(trace.meta)
    n_experts = trace.n_experts
    if layers * n_experts > MOST_EXPERTS:
        raise TraceError(
            f"meta or experts: {layers} layers of {n_experts} experts; legal are {MOST_EXPERTS}"
        )

    demand("layer_ids", trace.layer_ids, np.int32, (layers,))
    refuse("layer_ids", trace.layer_ids, trace.layer_ids < 0, "numbers from 0")
    falling = np.diff(trace.layer_ids, prepend=np.int32(-1)) <= 0
    refuse("layer_ids", trace.layer_ids, falling, "numbers larger than the one before")

    demand("phase", trace.phase, np.uint8, (tokens,))
    refuse("phase", trace.phase, trace.phase > 1, "0 (prefill) and 1 (decode)")
    for name, column in (("sequence", trace.sequence), ("position", trace.position)):
        demand(name, column, np.int32, (tokens,))
        refuse(name, column, column < 0, "numbers from 0")
    rows, starts = rows_by_sequence(trace)
    stuck = np.diff(trace.position[rows], prepend=np.int32(-1)) <= 0
    stuck[starts[:-1]] = False
    by_row = np.zeros(tokens, np.bool_)
    by_row[rows] = stuck
    refuse("position", trace.position, by_row, "positions counting up inside a sequence")
    if trace.token_id is not None:
        demand("token_id", trace.token_id, np.int32, (tokens,))

    _check_ids("experts", trace.experts, n_experts)
    if trace.weights is not None:
        demand("weights", trace.weights, np.float16, (tokens, layers, top_k))
        refuse("weights", trace.weights, ~np.isfinite(trace.weights), "finite numbers")
    for name, ids in trace.candidates.items():
        demand(_CANDIDATES + name, ids, np.uint16, (tokens, layers, None))
        _check_ids(_CANDIDATES + name, ids, n_experts)
    for name, scores in trace.candidate_scores.items():
        if name not in trace.candidates:
            raise TraceError(f"{_SCORES}{name} is there without {_CANDIDATES}{name}")
        demand(_SCORES + name, scores, np.float16, trace.candidates[name].shape)
        refuse(_SCORES + name, scores, ~np.isfinite(scores), "finite numbers")


def _stated_experts(meta: dict[str, Any]) -> Any:
    spec = meta.get("spec")
    for place in (meta, spec if isinstance(spec, dict) else {}):
        for key in ("num_experts", "experts"):
            if key in place:
                return place[key]
    return None


def _check_meta(meta: dict[str, Any]) -> None:
    if not isinstance(meta, dict):
        raise TraceError(f"meta is a JSON {type(meta).__name__}; it must be an object")
    stated = _stated_experts(meta)
    if stated is not None and not (type(stated) is int and 1 <= stated < MISSING):
        raise TraceError(f"meta: num_experts is {stated!r:.80}; legal are 1..{MISSING - 1}")
    model = meta.get("model", "")
    if not isinstance(model, str):
        raise TraceError(f"meta: model is {model!r:.80}; it must be a string")


def _check_ids(name: str, ids: Ids, n_experts: int) -> None:
    # Some rows at a time: a trace may be mapped from disk and larger than memory.
    for first in range(0, len(ids), _CHECKED_AT_ONCE):
        part = ids[first : first + _CHECKED_AT_ONCE]
        beyond = (part >= n_experts) & (part != MISSING)
        if beyond.any():
            whole = np.zeros(ids.shape, np.bool_)
            whole[first : first + len(part)] = beyond
            refuse(name, ids, whole, f"0..{n_experts - 1} and {MISSING} (missing)")
        part = np.sort(part, axis=-1)
        twice = ((part[..., 1:] == part[..., :-1]) & (part[..., 1:] != MISSING)).any(axis=-1)
        if twice.any():
            token, *rest = (int(i) for i in np.unravel_index(int(twice.argmax()), twice.shape))
            row = (first + token, *rest)
            where = ", ".join(map(str, row))
            raise TraceError(
                f"{name}[{where}] is {ids[row].tolist()}; an expert may occur only once"
            )


def demand(
    name: str, array: AnyArray, dtype: type[np.generic], shape: tuple[int | None, ...]
) -> None:
    """Raise TraceError unless an array has that dtype and shape; None is any length."""
    if array.dtype != np.dtype(dtype):
        raise TraceError(f"{name} is {array.dtype}; it must be {np.dtype(dtype)}")
    if len(array.shape) != len(shape) or any(
        want not in (None, got) for want, got in zip(shape, array.shape, strict=True)
    ):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise TraceError(f"{name} has shape {array.shape}; it must be ({wanted})")


def refuse(name: str, array: AnyArray, bad: npt.NDArray[np.bool_], legal: str) -> None:
    """Raise TraceError naming the first element that is bad, its value and the legal ones."""
    if bad.any():
        index = np.unravel_index(int(bad.argmax()), bad.shape)
        where = ", ".join(str(i) for i in index)
        raise TraceError(f"{name}[{where}] is {array[index]}; legal are {legal}")


def _arrays_of(trace: Trace) -> dict[str, AnyArray]:
    try:
        meta = json.dumps(trace.meta, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TraceError(f"meta cannot be written as JSON: {error}") from error
    arrays: dict[str, AnyArray | None] = {
        "schema": np.array(SCHEMA),
        "meta": np.array(meta),
        "experts": trace.experts,
        "weights": trace.weights,
        "layer_ids": trace.layer_ids,
        "phase": trace.phase,
        "sequence": trace.sequence,
        "position": trace.position,
        "token_id": trace.token_id,
        **{_CANDIDATES + name: ids for name, ids in sorted(trace.candidates.items())},
        **{_SCORES + name: scores for name, scores in sorted(trace.candidate_scores.items())},
    }
    return {name: array for name, array in arrays.items() if array is not None}


def _text(name: str, array: AnyArray) -> str:
    if array.dtype.kind != "U" or array.shape != ():
        raise TraceError(f"{name} is {array.dtype} {array.shape}; it must be one string")
    return str(array)


def meta_of(array: AnyArray) -> dict[str, Any]:
    """Return the JSON object in an array of one string; raise TraceError for anything else."""
    try:
        meta = json.loads(_text("meta", array), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"meta is no JSON: {error}") from error
    if not isinstance(meta, dict):
        raise TraceError(f"meta is a JSON {type(meta).__name__}; it must be an object")
    return meta


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def check_file(path: Path) -> None:
    """Raise TraceError for what is no file, or none that can be read from start to end."""
    if path.is_dir():
        raise TraceError("is a directory; a trace is a file, as trace.npz")
    if not path.exists():
        raise TraceError("no such file")
    if not path.is_file():
        raise TraceError("is no regular file; a trace is a file, as trace.npz")


def read_npz(
    path: Path, legal: re.Pattern[str], skip: frozenset[str] = frozenset()
) -> dict[str, AnyArray]:
    """Return the arrays of an npz file by name, those to skip left unread.

    What is allocated is at most 64 MiB or 64 times the file. Raises TraceError, without the path,
    for a name that is not legal, and a dozen types, some undocumented, for hostile bytes.
    """
    check_file(path)
    file_bytes = path.stat().st_size
    limit_bytes = max(64 * 2**20, 64 * file_bytes)
    with zipfile.ZipFile(path) as archive:
        members: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name == info.filename or name in members:
                raise TraceError(f"member {info.filename[:80]!r} is no array of its own")
            members[name] = info
        unpacked_bytes = sum(info.file_size for info in members.values())
        if unpacked_bytes > limit_bytes:
            raise TraceError(
                f"unpacks from {file_bytes} to {unpacked_bytes} bytes; legal are {limit_bytes}"
            )
        for name in members.keys() - skip:
            if not legal.fullmatch(name):
                raise TraceError(f"there is no array called {name[:80]!r} in such a file")
        return {
            name: _read_member(archive, name, info)
            for name, info in members.items()
            if name not in skip
        }


def _read_member(archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo) -> AnyArray:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise TraceError(f"{name} is compressed by method {info.compress_type}; legal are 0 and 8")
    with archive.open(info) as stream:
        return read_npy(stream, name, info.file_size)


def read_npy(stream: IO[bytes], name: str, stream_bytes: int) -> AnyArray:
    """Return the array of an npy stream of so many bytes, C-contiguous and read-only.

    Raises TraceError calling it `name` where header and size disagree, before anything is
    allocated; ValueError or worse where there is no header.
    """
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise TraceError(f"{name} is npy version {version}; legal are (1, 0) and (2, 0)")
    if dtype.hasobject:
        raise TraceError(f"{name} holds Python objects, which are never loaded")
    size = dtype.itemsize
    for length in shape:
        size *= length
    held = stream_bytes - stream.tell()
    if size != held or any(length < 0 for length in shape):
        raise TraceError(f"{name} states shape {shape} of {dtype}, {size} bytes; it has {held}")
    data = stream.read(size)
    if len(data) != size:
        raise TraceError(f"{name} ends after {len(data)} of {size} bytes")
    array = np.frombuffer(data, dtype)
    return np.asarray(array.reshape(shape, order="F" if fortran else "C"), order="C")
