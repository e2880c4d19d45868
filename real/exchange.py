"""Activations on their way to the CPU's experts, and what these bring back."""

from typing import Any

from moesim.real.device import Device
from moesim.real.operations import add_up


class Exchange:
    """Buffers on both sides, for so many tokens.

    Those on the host are two each, by parity of the layer: what is deferred may be computed until
    the next layer's COMBINE. A moment is (step, layer).
    """

    def __init__(self, device: Device, tokens: int, hidden: int, dtype: Any) -> None:
        """Take the memory."""
        import torch

        def host(kind: Any, pinned: bool = True) -> Any:
            return device.host(tokens, hidden, dtype=kind, pinned=pinned)

        self.device = device
        self._inputs = [host(dtype) for _ in range(2)]
        # By parity of the layer, and by whether it is deferred; each sum is of a moment.
        self._sums = [[host(torch.float32, False) for _ in range(2)] for _ in range(2)]
        self._rounded = [[host(dtype) for _ in range(2)] for _ in range(2)]
        self._moments: list[list[tuple[int, int] | None]] = [[None, None], [None, None]]
        self._returned = [device.empty(tokens, hidden, dtype=dtype) for _ in range(2)]
        self._returned_of: list[tuple[int, int] | None] = [None, None]

    def send(self, layer: int, rows: Any) -> None:
        """Copy all rows (tokens, hidden) to the host; lane `d2h`."""
        self.device.copy(self._inputs[layer % 2][: len(rows)], rows)

    def sent(self, layer: int, tokens: int) -> Any:
        """Return the rows that were sent (tokens, hidden); lane `cpu`."""
        return self._inputs[layer % 2][:tokens]

    def add(
        self, moment: tuple[int, int], tokens: int, rows: Any, result: Any, weights: Any,
        deferred: bool,
    ) -> None:  # fmt: skip
        """Add a result (rows, hidden) by its weights to its rows of all tokens; lane `cpu`."""
        parity = moment[1] % 2
        sums = self._sums[parity][deferred][:tokens]
        rounded = self._rounded[parity][deferred][:tokens]
        if self._moments[parity][deferred] != moment:
            self._moments[parity][deferred] = moment
            sums.zero_()
            rounded.zero_()
        add_up(sums, rounded, rows, result, weights)

    def bring_back(self, moment: tuple[int, int], tokens: int, deferred: bool) -> None:
        """Copy what was added up, rounded as activations are, to the device; lane `h2d`."""
        source = self._rounded[moment[1] % 2][deferred][:tokens]
        self.device.copy(self._returned[deferred][:tokens], source)
        self._returned_of[deferred] = moment

    def returned(self, moment: tuple[int, int], tokens: int) -> list[Any]:
        """Return what came back for COMBINE: this layer's, and the last one's deferred."""
        step, layer = moment
        due = ((False, (step, layer)), (True, (step, layer - 1)))
        return [
            self._returned[deferred][:tokens]
            for deferred, own in due
            if self._returned_of[deferred] == own
        ]
