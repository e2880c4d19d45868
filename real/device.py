"""What a device must offer: memory, lanes that work, and copies between host and device."""

from collections.abc import Mapping
from typing import Any, Protocol

from moesim.real.lanes import Lane


class Device(Protocol):
    """A machine that computes and copies; `label` is what results say it is."""

    label: str
    """`cuda`, `emulated`, or `cpu` for a machine without a device, with lanes `cpu` and `disk`."""
    name: str
    """As the machine calls it."""
    memory_bytes: int
    """Of the device; 0 without one."""

    @property
    def lanes(self) -> Mapping[str, Lane]:
        """By the names of `types.LANES`."""

    def empty(self, *shape: int, dtype: Any) -> Any:
        """Return a tensor in device memory; raise CalibrationError if there is no room."""

    def host(self, *shape: int, dtype: Any, pinned: bool = True) -> Any:
        """Return a tensor in host memory, pinned if that means anything here."""

    def copy(self, target: Any, source: Any) -> None:
        """Copy between host and device memory; to be submitted to lane `h2d` or `d2h`."""

    def free(self, tensor: Any) -> None:
        """Give back a tensor that `empty` returned and that nobody uses any more."""

    @property
    def taken_bytes(self) -> int:
        """What `empty` has handed out, where the device itself counts it; else 0."""

    def free_all(self, but: int = 0) -> None:
        """Give back all device memory but the first so many bytes that were taken.

        Tensors handed out after these must not be used any more.
        """

    def close(self) -> None:
        """Finish what is queued, and end the lanes."""
