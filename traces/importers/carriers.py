"""The forms in which engines carry ids through JSON: lists, base64 of npy or of raw integers."""

import base64
import math
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from moesim.errors import TraceError
from moesim.traces.format import MISSING, AnyArray
from moesim.traces.importers.common import Count
from moesim.traces.importers.source import npy_from_bytes

Rows = list[list[list[Annotated[int, Meta(ge=-1, le=MISSING)]]]]


class Shaped(msgspec.Struct):
    """Raw integers in base64 and their shape, as wrappers of vLLM send them."""

    shape: tuple[Count, Count, Count]
    data: str


def converted(place: str, value: object, kind: Any) -> Any:
    """Return JSON values as a type; raise TraceError saying where they differ from it."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise TraceError(f"{place}: {error}") from None


def carried(place: str, value: object, raw: tuple[int, int]) -> tuple[AnyArray, str]:
    """Return integers (rows, layers, top_k), and the name of the form they came in.

    Base64 without a shape is int32 of `raw` = (layers, top_k).
    """
    if isinstance(value, np.ndarray):
        return value, f"npy {value.dtype}"
    if isinstance(value, list):
        rows = converted(place, value, Rows)
        try:
            return np.array(rows, np.int64), "nested lists"
        except ValueError:
            raise TraceError(f"{place}: tokens and layers must all hold equally many") from None
    if isinstance(value, dict):
        shaped = converted(place, value, Shaped)
        data = _decoded(place, shaped.data)
        kinds = {math.prod(shaped.shape) * np.dtype(kind).itemsize: kind for kind in ("u1", "i2")}
        dtype = np.dtype(kinds.get(len(data), "<i4"))
        return _raw(place, data, shaped.shape, dtype), f"shape and base64 {dtype}"
    if isinstance(value, str):
        data = _decoded(place, value)
        if data.startswith(b"\x93NUMPY"):
            array = npy_from_bytes(place, data)
            return array, f"base64 npy {array.dtype}"
        rows = len(data) // (4 * raw[0] * raw[1])
        return _raw(place, data, (rows, *raw), np.dtype("<i4")), "base64 int32"
    raise TraceError(f"{place} is {str(value)[:40]}; it must be lists, base64, or shape and data")


def _decoded(place: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise TraceError(f"{place} is no base64: {error}") from None


def _raw(place: str, data: bytes, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> AnyArray:
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise TraceError(f"{place} has {len(data)} bytes, which are no {dtype} of shape {shape}")
    return np.frombuffer(data, dtype).reshape(shape)
