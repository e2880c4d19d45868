"""What lies in a file, read by its first bytes and not yet understood.

No carrier may make more of itself than a factor of the file's size: sizes are compared before
anything is allocated, and nothing is unpickled.
"""

import io
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from moesim.errors import TraceError
from moesim.traces.format import check_file, read_npy, read_npz
from moesim.traces.importers.saved import read_saved

MAX_JSON_BYTES = 64 << 20
"""The largest JSON file; what a hostile one decodes to takes up to 70 times as much."""

_HEAD_BYTES = 4096
_ANY_NAME = re.compile(r"[A-Za-z0-9_]+")
_OLD_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_UNUSED = frozenset({"hidden"})  # the router's inputs: legal beside experts, large, of no use here


class Source(NamedTuple):
    """A file's content in the form it was carried in.

    form: moesim (value None: not read), npz (arrays by name), npy (one array), json (a list of
    documents: one, or one per line), saved (what torch.save wrote), text or binary (bytes).
    """

    path: Path
    form: str
    value: Any


def open_source(path: Path) -> Source:
    """Return what lies in a file.

    Raises TraceError, without the path, for what cannot be read, and whatever zipfile, torch and
    NumPy raise on hostile bytes.
    """
    check_file(path)
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(b"PK"):
        return _open_zip(path)
    if head.startswith(b"\x93NUMPY"):
        with path.open("rb") as file:
            return Source(path, "npy", read_npy(file, "the array", path.stat().st_size))
    if head.startswith(_OLD_TORCH):
        raise TraceError("was written by torch before 1.6; load it there and save it again")
    if head.startswith(b"\x80"):
        raise TraceError("is a Python pickle, which is never loaded")
    if b"\0" in head:
        return Source(path, "binary", path.read_bytes())
    if head.lstrip()[:1] in (b"{", b"["):
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise TraceError(f"has {size} bytes; JSON is read up to {MAX_JSON_BYTES}")
        return Source(path, "json", _documents(path.read_bytes()))
    return Source(path, "text", path.read_bytes())


def npy_from_bytes(name: str, data: bytes) -> Any:
    """Return the array of an npy file held in memory; see `read_npy` for what it raises."""
    return read_npy(io.BytesIO(data), name, len(data))


def _open_zip(path: Path) -> Source:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("data.pkl") for name in names):
        return Source(path, "saved", read_saved(path))
    if "schema.npy" in names:
        return Source(path, "moesim", None)
    skip = _UNUSED if "experts.npy" in names else frozenset()
    return Source(path, "npz", read_npz(path, _ANY_NAME, skip))


def _documents(data: bytes) -> list[Any]:
    """Return the one document, or those of a file that has one on every line."""
    try:
        return [_json(data)]
    except msgspec.DecodeError as error:
        lines = [(n, line) for n, line in enumerate(data.splitlines(), 1) if line.strip()]
        try:
            first = [_json(lines[0][1])]
        except msgspec.DecodeError:
            raise TraceError(f"is no JSON: {error}") from None
    for n, line in lines[1:]:
        try:
            first.append(_json(line))
        except msgspec.DecodeError as error:
            raise TraceError(f"line {n} is no JSON: {error}") from None
    return first


def _json(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except RecursionError:
        raise TraceError("is JSON nested too deeply") from None
