"""The host's store of experts: an image of each in every precision, in memory or on disk."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from moesim.errors import AuditError, InputError
from moesim.real.device import Device
from moesim.real.devices import host_memory_bytes
from moesim.real.weights import Shape, image_bytes, pack

Source = Callable[[int, int], tuple[Any, Any, Any]]
"""Of (layer, expert): gate, up, down."""

BLOCK_BYTES = 1 << 30
"""Pinned memory is taken in blocks: PyTorch rounds every request up to a power of two."""
ALIGNMENT = 64
HEADER_BYTES = 4096
"""Of our safetensors files, padded so that weights begin with a page."""
SPARE = 2
"""Free space on a disk must be so many times what is written: filling it would harm others."""


class Experts:
    """The host's store: an image of every (layer, expert) per precision, pinned.

    `source` makes weights, and is asked again for every further precision. Experts of which
    `on_disk`, (layers, experts), is not 0 have their image of `bits` in a file of a temporary
    folder inside `folder`, and in memory only between `reserve` and `forget`; their copies of other
    precisions stay in memory. `close` removes the files.

    Raises InputError for what neither memory nor disk has room for.
    """

    def __init__(
        self, device: Device, shape: Shape, layers: int, experts: int, source: Source,
        bits: int = 16, *, on_disk: Any = None, folder: Path | None = None,
    ) -> None:  # fmt: skip
        """Make the images of `bits`, all of them."""
        self.device = device
        self.shape = shape
        self.bits = bits
        self.reservations = 0
        """How many buffers were reserved so far."""
        self._source = source
        self._all = [(layer, expert) for layer in range(layers) for expert in range(experts)]
        self._prepared = [bits]
        self._images: dict[tuple[int, int, int], Any] = {}
        self._reserved: dict[tuple[int, int], tuple[int, Any]] = {}
        self._files: dict[tuple[int, int], Path] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        named = [key for key in self._all if on_disk is not None and on_disk[key]]
        try:
            if named:
                self._write(named, folder)
            self._make(bits, [key for key in self._all if key not in self._files])
        except BaseException:
            self.close()
            raise

    def prepare(self, precisions: Iterable[int]) -> None:
        """Make the images of further precisions that are not there yet, in memory."""
        for bits in precisions:
            if bits not in self._prepared:
                self._make(bits, self._all)
                self._prepared.append(bits)

    def image(self, layer: int, expert: int, bits: int) -> Any:
        """Return an expert's bytes; for one on disk those of its latest `reserve`, read or not.

        To be asked for when an operation is submitted: what it holds then stays, whatever is
        forgotten meanwhile. Raises InputError for a precision that was not prepared, AuditError for
        an expert on disk without a buffer.
        """
        if bits == self.bits and (layer, expert) in self._files:
            if (layer, expert) not in self._reserved:
                raise AuditError(
                    f"expert {expert} of layer {layer} is on disk, and was not read before its use"
                )
            return self._reserved[layer, expert][1]
        if (layer, expert, bits) not in self._images:
            layers, experts = (last + 1 for last in self._all[-1])
            raise InputError(
                f"no expert {expert} of layer {layer} at {bits} bits; there are {experts} in each "
                f"of {layers} layers, prepared at: {', '.join(map(str, self._prepared))} bits"
            )
        return self._images[layer, expert, bits]

    def image_at_once(self, layer: int, expert: int, bits: int) -> Any:
        """Return an expert's bytes before a run; what lies on disk is read, and not kept.

        Raises InputError as `image` and `read_from_disk` do.
        """
        import torch

        if bits != self.bits or (layer, expert) not in self._files:
            return self.image(layer, expert, bits)
        buffer = self.device.host(image_bytes(self.shape, self.bits), dtype=torch.uint8)
        self.read_from_disk(layer, expert, buffer)
        return buffer

    def reserve(self, layer: int, expert: int) -> Any:
        """Return a buffer for an expert on disk to be read into, and let `image` return it."""
        import torch

        buffer = self.device.host(image_bytes(self.shape, self.bits), dtype=torch.uint8)
        self._reserved[layer, expert] = self.reservations, buffer
        self.reservations += 1
        return buffer

    def read_from_disk(self, layer: int, expert: int, buffer: Any) -> None:
        """Fill a reserved buffer from the file, past the page cache where the system lets us.

        To be submitted to lane `disk`. Raises InputError if the file cannot be read.
        """
        path = self._files[layer, expert]
        try:
            with path.open("rb") as file:
                uncache(file.fileno())
                file.seek(HEADER_BYTES)
                count = file.readinto(memoryview(buffer.numpy()))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        if count != len(buffer):
            raise InputError(f"{path} has {count} of the {len(buffer)} bytes of its expert")

    def forget(self, layer: int, before: int) -> None:
        """Let go of a layer's buffers that were reserved before `reservations` had this value.

        Not before the layer's last hook, which comes after COMBINE and may still copy them.
        """
        for key, (number, _) in list(self._reserved.items()):
            if key[0] == layer and number < before:
                del self._reserved[key]

    def close(self) -> None:
        """Remove the files and let go of the memory."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        self._files.clear()
        self._images.clear()
        self._reserved.clear()

    def _packed(self, layer: int, expert: int, bits: int) -> Any:
        gate, up, down = self._source(layer, expert)
        expected = (self.shape.width, self.shape.hidden)
        if gate.shape != expected or up.shape != expected or down.t().shape != expected:
            raise InputError(
                f"expert {expert} of layer {layer} has matrices {tuple(gate.shape)}, "
                f"{tuple(up.shape)}, {tuple(down.shape)}; legal is (width, hidden) = {expected} "
                "twice, and once the other way round"
            )
        return pack(gate, up, down, bits, self.shape.by_neuron)

    def _make(self, bits: int, keys: Sequence[tuple[int, int]]) -> None:
        images = blocks(self.device, len(keys), image_bytes(self.shape, bits))
        for key, image in zip(keys, images, strict=True):
            image.copy_(self._packed(*key, bits))
            self._images[*key, bits] = image

    def _write(self, keys: Sequence[tuple[int, int]], folder: Path | None) -> None:
        if folder is None or not folder.is_dir():
            raise InputError(f"experts on disk need a folder to be written to, not {folder}")
        needed_bytes = SPARE * len(keys) * image_bytes(self.shape, self.bits)
        free_bytes = shutil.disk_usage(folder).free
        if free_bytes < needed_bytes:
            raise InputError(
                f"{folder} has {free_bytes} bytes free; {needed_bytes} are needed to write "
                f"{len(keys)} experts"
            )
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="moesim-experts-", dir=folder)
            for layer, expert in keys:
                path = Path(self._folder.name) / f"{layer}-{expert}-{self.bits}.safetensors"
                write_image(path, self._packed(layer, expert, self.bits))
                self._files[layer, expert] = path
        except OSError as error:
            raise InputError(f"cannot write experts to {folder}: {error.strerror}") from None


def blocks(device: Device, count: int, size_bytes: int) -> list[Any]:
    """Return so many aligned tensors of so many bytes in the host's memory, pinned.

    Raises InputError if there is no room for them.
    """
    import torch

    stride = -(-size_bytes // ALIGNMENT) * ALIGNMENT
    memory_bytes = host_memory_bytes()
    if memory_bytes and count * stride > memory_bytes:
        raise InputError(
            f"{count} experts of {size_bytes} bytes do not fit into the host's {memory_bytes}; "
            "fewer layers, fewer bits or experts on disk do"
        )
    made: list[Any] = []
    try:
        while len(made) < count:
            each = min(count - len(made), max(1, BLOCK_BYTES // stride))
            block = device.host(each * stride, dtype=torch.uint8)
            made += [block[i * stride : i * stride + size_bytes] for i in range(each)]
    except RuntimeError as error:
        raise InputError(
            f"no memory for {count} experts of {size_bytes} bytes: {str(error).splitlines()[0]}"
        ) from None
    return made


def write_image(path: Path, image: Any) -> None:
    """Write an image as a safetensors file, and let no cache keep it."""
    size_bytes = image.numel()
    entry = {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes]}
    header = json.dumps({"image": entry}).encode().ljust(HEADER_BYTES - 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(memoryview(image.numpy()))
        file.flush()
        os.fsync(file.fileno())
        uncache(file.fileno())


def uncache(handle: int) -> None:
    """Drop a file's pages from the system's cache, where there is a way to."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
