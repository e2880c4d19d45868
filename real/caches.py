"""Keys and values of the sequences, on the device or on the host."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from moesim.model import ModelSpec
from moesim.real.dense import dense_layers, grouped_query
from moesim.real.device import Device
from moesim.real.operations import Attended
from moesim.real.sequences import Group, Now, Share


class Key(NamedTuple):
    """Names a cache: a layer of a MoE layer's piece (see `dense.blocks_of`), and a group."""

    layer: int
    at: int
    group: int


class Caches:
    """A tensor (tokens, 2, sequences, kv_heads, head_dim) for every layer and group.

    Tokens come first, so that the past is one contiguous piece and the new ones another behind it,
    and each is moved by one copy. Those of layers behind the last MoE layer stay on the device.
    """

    def __init__(
        self, device: Device, model: ModelSpec, groups: Sequence[Group], on_host: bool,
        read_there: bool, dtype: Any,
    ) -> None:  # fmt: skip
        """Take the memory for all tokens that will be kept, and two buffers on the device if they
        are on the host and not `read_there`."""
        own = grouped_query(model)
        self.device = device
        self.on_host = on_host
        self.groups = groups
        self.held: dict[Key, Any] = {}
        self.depth = [dense_layers(model, layer) + 1 for layer in range(model.layers)]
        for number, group in enumerate(groups):
            shape = (group.length, 2, len(group.sequences), own.kv_heads, own.head_dim)
            take = device.host if on_host else device.empty
            for layer, depth in enumerate(self.depth):
                for at in range(depth):
                    self.held[Key(layer, at, number)] = take(*shape, dtype=dtype)
            for at in range(model.dense_after):
                key = Key(model.layers, at, number)
                self.held[key] = device.empty(*shape, dtype=dtype)
        room: dict[int, int] = {}
        for group in groups:
            tokens = group.length * len(group.sequences)
            room[group.batch] = room.get(group.batch, 0) + tokens * 2 * own.kv_heads * own.head_dim
        self.rooms = (
            [device.empty(max(room.values()) * max(self.depth), dtype=dtype) for _ in range(2)]
            if on_host and not read_there
            else []
        )
        self._new: dict[tuple[int, int], list[tuple[Any, Any]]] = {}

    def seen(self, now: Now, key: Key) -> Any:
        """Return the tensor that attention on the device reads and adds its new token to."""
        if self._stays(key):
            return self.held[key]
        return self._staged(now, key.layer, self.groups[key.group].batch)[key]

    def load(self, now: Now, layer: int, batch: int) -> None:
        """Copy a batch's past to the device."""
        for key, room in self._staged(now, layer, batch).items():
            past = len(room) - 1
            self.device.copy(room[:past], self.held[key][:past])

    def keep(self, key: Key, share: Share, attended: Attended) -> None:
        """Keep the new tokens of a group; where caches are on the host, until `store` is called."""
        import torch

        cache = self.held[key]
        tokens_first = [part.permute(2, 0, 1, 3) for part in (attended.keys, attended.values)]
        place = cache[share.past : share.past + share.new]
        if self._stays(key):
            if share.past == 0:  # operations.decode has written it itself
                torch.stack(tokens_first, 1, out=place)
            return
        new = self._new.setdefault((key.layer, self.groups[key.group].batch), [])
        new.append((place, torch.stack(tokens_first, 1)))

    def store(self, layer: int, batch: int) -> None:
        """Copy a batch's new tokens to the host."""
        for place, new in self._new.pop((layer, batch)):
            self.device.copy(place, new)
            lend(new)

    def _stays(self, key: Key) -> bool:
        return not self.on_host or key.layer >= len(self.depth)

    def _staged(self, now: Now, layer: int, batch: int) -> dict[Key, Any]:
        """Return a batch's caches in one of the buffers, with room for one token more."""
        attention = layer * len(now.filled) + now.filled.index(batch)
        room = self.rooms[attention % 2]
        found = {}
        taken = 0
        for share in now.shares[batch]:
            for at in range(self.depth[layer]):
                key = Key(layer, at, share.group)
                shape = (share.past + 1, *self.held[key].shape[1:])
                size = math.prod(shape)
                found[key] = room[taken : taken + size].view(shape)
                taken += size
        return found


def heads_first(cache: Any) -> tuple[Any, Any]:
    """Return keys and values of a cache as views (sequences, kv_heads, tokens, head_dim)."""
    return cache[:, 0].permute(1, 2, 0, 3), cache[:, 1].permute(1, 2, 0, 3)


def lend(tensor: Any) -> None:
    """Keep CUDA from giving away a tensor's memory before this lane has read it."""
    import torch

    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream())
