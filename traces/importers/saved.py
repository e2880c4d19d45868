"""Files that torch.save wrote: containers of tensors, loaded without running what they hold."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

from moesim.errors import InputError, TraceError
from moesim.traces.format import AnyArray

MAX_PICKLE_BYTES = 64 << 20
"""The largest description of what a file holds: it unpacks to up to 100 times as much."""


def read_saved(path: Path) -> Any:
    """Return what torch.save wrote: tensors in plain containers, their data left in the file.

    Raises InputError if torch is not installed, TraceError, without the path, for a damaged file,
    and what torch raises for a hostile one: it loads weights only, so nothing in it is run.
    """
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{path}: was written by torch.save; reading it takes pip install 'moesim[torch]'"
        ) from None
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            # torch.save compresses nothing, so that what is unpacked is as large as the file.
            if info.compress_type != zipfile.ZIP_STORED:
                raise TraceError(f"{info.filename[:80]!r} is compressed, as torch.save never does")
            if info.filename.endswith("data.pkl") and info.file_size > MAX_PICKLE_BYTES:
                raise TraceError(
                    f"{info.filename[:80]!r} has {info.file_size} bytes; "
                    f"legal are {MAX_PICKLE_BYTES}"
                )
        if (damaged := archive.testzip()) is not None:
            raise TraceError(f"{damaged[:80]!r} is damaged: its checksum is wrong")
    # Mapped, a tensor reaches to the end of the file at most, whatever size it states; read, it
    # would reach beyond its buffer.
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        # torch's own words advise to load it all the same.
        raise TraceError("holds more than tensors in plain containers: not loaded") from None


def array_of(name: str, value: Any) -> AnyArray:
    """Return a tensor's integers, no more of them than it holds; raise TraceError for others."""
    # Duck-typed, so that torch need not be imported here again.
    if not hasattr(value, "untyped_storage"):
        raise TraceError(f"{name} is {type(value).__name__}; it must be a tensor of whole numbers")
    needed_bytes = value.numel() * value.element_size()
    if needed_bytes > (held_bytes := value.untyped_storage().nbytes()):
        # Strides of 0 make terabytes of one number.
        raise TraceError(f"{name} states {needed_bytes} bytes; it has {held_bytes}")
    array: AnyArray = value.numpy()
    if array.dtype.kind not in "iu":
        raise TraceError(f"{name} is {array.dtype}; it must be whole numbers")
    return array
