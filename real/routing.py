"""The router's choice, sorted: which rows and which places of theirs belong to an expert."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moesim.errors import RealError
from moesim.real.device import Device
from moesim.real.sequences import Now
from moesim.types import NONE, FloatArray, IntArray


class Routing(NamedTuple):
    """The choice of a layer step, in host memory; a place is `row * top_k + rank`.

    Within an expert, places ascend: those of a batch are neighbours.
    """

    places: Any
    """(chosen,) int64, sorted by expert."""
    rows: Any
    """(chosen,) int64: their rows."""
    weights: Any
    """(tokens, top_k), in the precision of the activations; 0 where nothing was chosen."""
    first: tuple[int, ...]
    """(experts + 1,): where each expert's places begin."""
    bounds: tuple[int, ...]
    """(batches + 1,): where each batch's rows begin."""

    @property
    def active(self) -> tuple[int, ...]:
        """The experts that were chosen."""
        return tuple(e for e in range(len(self.first) - 1) if self.first[e] < self.first[e + 1])

    def span(self, expert: int, batch: int = NONE) -> slice:
        """Return which of the places are an expert's; of one batch, or of all for NONE."""
        first, last = self.first[expert], self.first[expert + 1]
        if batch != NONE:
            own = self.rows[first:last].numpy()
            low, high = np.searchsorted(own, self.bounds[batch : batch + 2]).tolist()
            first, last = first + low, first + high
        return slice(first, last)


def routing_of(
    ids: IntArray, weights: FloatArray, experts: int, bounds: Sequence[int], dtype: Any
) -> Routing:
    """Sort ids and weights (tokens, top_k); what is no expert's id is nobody's."""
    import torch

    top_k = ids.shape[1]
    nobody = (ids < 0) | (ids >= experts)
    flat = np.where(nobody, experts, ids).ravel()
    order = np.argsort(flat, kind="stable")
    first = np.searchsorted(flat[order], np.arange(experts + 1))
    places = np.ascontiguousarray(order[: first[-1]], np.int64)
    return Routing(
        places=torch.from_numpy(places),
        rows=torch.from_numpy(places // top_k),
        weights=torch.from_numpy(np.where(nobody, 0.0, weights)).to(dtype),
        first=tuple(first.tolist()),
        bounds=tuple(bounds),
    )


class Choices:
    """The routing of two layers, by parity, on the host, and of the last of them on the device.

    A layer's choice is used until the next one's COMBINE where results are deferred, on the device
    until its own.
    """

    def __init__(self, device: Device, tokens: int, top_k: int, experts: int, dtype: Any) -> None:
        """Take the memory for so many tokens."""
        import torch

        self.device = device
        self.experts = experts
        self.dtype = dtype
        self._ids = [np.full((tokens, top_k), NONE, np.int64) for _ in range(2)]
        self._weights = [np.zeros((tokens, top_k)) for _ in range(2)]
        self._batches: list[set[tuple[int, int, int]]] = [set(), set()]
        self._found: list[Routing | None] = [None, None]
        size_bytes = tokens * top_k * (8 + 8 + dtype.itemsize)
        self._host = device.host(size_bytes, dtype=torch.uint8)
        self._device = device.empty(size_bytes, dtype=torch.uint8)
        self._placed: tuple[Routing, list[Any], Any] | None = None
        """What is on the device, as views there, and the weights in the memory copied from."""

    def take(
        self, now: Now, layer: int, batch: int, ids: IntArray, weights: FloatArray | None
    ) -> None:
        """Take the choice of a batch; with the last one of a layer, all is sorted. Any thread."""
        parity = layer % 2
        rows = now.rows_of(batch)
        self._ids[parity][rows] = ids
        self._weights[parity][rows] = 1 / ids.shape[1] if weights is None else weights
        known = {one for one in self._batches[parity] if one[:2] == (now.step, layer)}
        self._batches[parity] = known | {(now.step, layer, batch)}
        self._found[parity] = None
        if len(self._batches[parity]) == len(now.filled):
            all_ids, all_weights = self._ids[parity], self._weights[parity]
            self._found[parity] = routing_of(
                all_ids[: now.tokens], all_weights[: now.tokens], self.experts, now.bounds,
                self.dtype,
            )  # fmt: skip

    def of(self, layer: int) -> Routing:
        """Return a layer's routing, on the host; any thread."""
        found = self._found[layer % 2]
        if found is None:
            raise RealError(f"layer {layer} is not routed yet")
        return found

    def on_device(self, layer: int) -> tuple[Any, Any, Any]:
        """Return places, rows and weights of a layer, copied when first asked for; lane `gpu`.

        The memory copied from is free again: the host has waited for a gate behind the last copy.
        """
        routing = self.of(layer)
        if self._placed is None or self._placed[0] is not routing:
            taken = 0
            views = []
            for part in (routing.places, routing.rows, routing.weights):
                own = slice(taken, taken + part.numel() * part.element_size())
                source = self._host[own].view(part.dtype).view(part.shape)
                source.copy_(part)
                views.append(self._device[own].view(part.dtype).view(part.shape))
                taken = own.stop
            # Not over the link: an engine's router leaves its choice on the device.
            self._device[:taken].copy_(self._host[:taken], non_blocking=True)
            self._placed = routing, views, source
        places, rows, weights = self._placed[1]
        return places, rows, weights

    def silence(self, experts: Sequence[int]) -> None:
        """Set the weights of experts to 0 on the device, by one copy; lane `gpu`."""
        import torch

        assert self._placed is not None
        routing, (_, _, weights), source = self._placed
        places = torch.cat([routing.places[routing.span(expert)] for expert in experts])
        source.view(-1).index_fill_(0, places, 0)
        weights.copy_(source, non_blocking=True)
