"""Weights outside the routed experts, a layer's in one piece of memory, so that one copy moves it.

A MoE layer's piece begins with the layers without experts just before it. Values are random: rows
are normal with variance 1 / inputs, so that what passes through them keeps its size.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from moesim.errors import RealError
from moesim.model import (
    GroupedQuery,
    ModelSpec,
    attention_params,
    dense_params,
    streamed_params,
)
from moesim.real.device import Device
from moesim.real.operations import Attention

POOL = 1_048_573
"""Random numbers that are drawn; all weights are stretches of them. A prime, so that rows of a
matrix begin at different places."""


class Block(NamedTuple):
    """Weights of one layer outside its routed experts."""

    attention: Attention
    router: Any
    """(experts + weightless experts, hidden), or None in a layer without experts."""
    gate_up: Any
    """(2 width, hidden) of the shared experts, or of the FFN of a layer without experts; None
    where there are none, as `down` (hidden, width)."""
    down: Any


class Ends(NamedTuple):
    """Weights before the first layer and behind the last one."""

    embedding: Any
    """(vocabulary, hidden)."""
    norm: Any
    """(hidden,)."""
    head: Any
    """(vocabulary, hidden)."""


def grouped_query(model: ModelSpec) -> GroupedQuery:
    """Return the model's attention; raise RealError if a layer is not what can be computed."""
    own = model.attention
    if not isinstance(own, GroupedQuery):
        raise RealError(f"{model.name} has latent attention, only grouped-query can be computed")
    if model.attentions_per_layer > 1:
        raise RealError(
            f"{model.name} has {model.attentions_per_layer} attentions per layer; 1 can be computed"
        )
    if model.cacheless_layer_ids:
        raise RealError(
            f"{model.name} has {len(model.cacheless_layer_ids)} layers with a mixer that keeps no "
            "keys and values; only attention can be computed"
        )
    return own


def dense_layers(model: ModelSpec, layer: int) -> int:
    """Count the layers without experts just before a MoE layer, or behind the last one."""
    return model.dense_before[layer] if layer < model.layers else model.dense_after


def params_of(model: ModelSpec, layer: int) -> int:
    """Return the weights in a MoE layer's piece; behind the last layer, those of `dense_after`."""
    if layer < model.layers:
        return streamed_params(model)[layer]
    return model.dense_after * (attention_params(model) + dense_params(model))


def blocks_of(model: ModelSpec, layer: int, piece: Any) -> tuple[Block, ...]:
    """Return views of a layer's piece (params,), those without experts first; see `params_of`."""
    routed = layer < model.layers
    before = dense_layers(model, layer)
    taken = 0

    def take(*shape: int) -> Any:
        nonlocal taken
        size = 1
        for side in shape:
            size *= side
        view = piece[taken : taken + size].view(shape)
        taken += size
        return view

    own = grouped_query(model)
    found = []
    for at in range(before + routed):
        last = routed and at == before
        width = model.shared_width if last else model.dense_width
        attention = Attention(
            norm=take(model.hidden),
            next_norm=take(model.hidden),
            qkv=take((own.heads + 2 * own.kv_heads) * own.head_dim, model.hidden),
            out=take(model.hidden, own.heads * own.head_dim),
            heads=own.heads,
            kv_heads=own.kv_heads,
            head_dim=own.head_dim,
        )
        router = take(model.experts + model.weightless_experts, model.hidden) if last else None
        gate_up = take(2 * width, model.hidden) if width else None
        found.append(
            Block(attention, router, gate_up, take(model.hidden, width) if width else None)
        )
    return tuple(found)


def draw_layer(model: ModelSpec, layer: int, seed: int, piece: Any) -> Any:
    """Fill a layer's piece (params,) in host memory with its random weights, and return it."""
    numbers = Numbers(seed, layer, piece.dtype)
    for block in blocks_of(model, layer, piece):
        numbers.norm(block.attention.norm)
        numbers.norm(block.attention.next_norm)
        numbers.matrices([block.attention.qkv, block.attention.out])
        numbers.matrices([block.router, block.gate_up, block.down])
    return piece


def draw_ends(model: ModelSpec, seed: int, dtype: Any) -> Ends:
    """Return random weights before the first layer and behind the last one, in host memory."""
    import torch

    numbers = Numbers(seed, model.layers + 1, dtype)
    embedding = torch.empty(model.vocab, model.hidden, dtype=dtype)
    numbers.fill(embedding, 1.0)
    norm = torch.empty(model.hidden, dtype=dtype)
    numbers.norm(norm)
    head = embedding
    if not model.tied_embeddings:
        head = torch.empty_like(embedding)
        numbers.matrices([head])
    return Ends(embedding, norm, head)


@lru_cache(maxsize=1)
def pool(seed: int, dtype: Any) -> Any:
    """Return normal numbers (POOL,)."""
    import torch

    return torch.randn(POOL, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Numbers:
    """Random numbers of one layer, the same ones each time."""

    def __init__(self, seed: int, layer: int, dtype: Any) -> None:
        """Take the pool, and a place to begin with."""
        import torch

        self._pool = pool(seed, dtype)
        self._starts = torch.Generator().manual_seed(seed * 1024 + layer + 1)

    def fill(self, target: Any, scale: float) -> None:
        """Fill a tensor with a stretch of the pool, from a random place and around its end."""
        import torch

        flat = target.view(-1)
        start = int(torch.randint(POOL, (1,), generator=self._starts))
        done = 0
        while done < len(flat):
            part = self._pool[start : start + len(flat) - done]
            torch.mul(part, scale, out=flat[done : done + len(part)])
            done += len(part)
            start = 0

    def norm(self, target: Any) -> None:
        """Fill the weights of a norm with numbers about 1."""
        self.fill(target, 0.1)
        target.add_(1.0)

    def matrices(self, targets: Sequence[Any]) -> None:
        """Fill matrices (outputs, inputs), leaving out those that are None."""
        for target in targets:
            if target is not None:
                self.fill(target, target.shape[1] ** -0.5)


class Dense:
    """Weights outside the experts, on the device, or on the host with two buffers on the device."""

    def __init__(
        self, device: Device, model: ModelSpec, on_host: bool, dtype: Any, seed: int
    ) -> None:
        """Draw them and put them where they stay."""
        self.device = device
        self.images: list[Any] = []
        """By layer (params,), on the host; empty if they stay on the device."""
        sizes = [params_of(model, layer) for layer in range(model.layers + 1)]
        staging = device.host(max(sizes), dtype=dtype)

        def settle(layer: int, target: Any) -> Any:
            source = draw_layer(model, layer, seed, staging[: len(target)])
            self._copy(target, source)
            return target

        if on_host:
            for layer, size in enumerate(sizes[:-1]):
                image = device.host(size, dtype=dtype)
                self.images.append(draw_layer(model, layer, seed, image))
            rooms = [device.empty(max(sizes[:-1]), dtype=dtype) for _ in range(2)]
            self.pieces = [rooms[layer % 2][:size] for layer, size in enumerate(sizes[:-1])]
            """By layer, on the device."""
            self.routers = [blocks_of(model, i, im)[-1].router for i, im in enumerate(self.images)]
            """By layer, on the host."""
        else:
            self.pieces, self.routers = [], []
            for layer, size in enumerate(sizes[:-1]):
                self.pieces.append(settle(layer, device.empty(size, dtype=dtype)))
                self.routers.append(blocks_of(model, layer, staging)[-1].router.clone())
        self.blocks = [blocks_of(model, i, piece) for i, piece in enumerate(self.pieces)]
        """By layer, on the device."""
        self.last: tuple[Block, ...] = ()
        """Behind the last MoE layer, on the device."""
        if sizes[-1]:
            piece = settle(model.layers, device.empty(sizes[-1], dtype=dtype))
            self.last = blocks_of(model, model.layers, piece)
        ends = draw_ends(model, seed, dtype)
        self.embedding = ends.embedding
        """On the host."""
        self.norm = device.empty(*ends.norm.shape, dtype=dtype)
        self.head = device.empty(*ends.head.shape, dtype=dtype)
        self._copy(self.norm, ends.norm)
        self._copy(self.head, ends.head)

    def load(self, layer: int) -> None:
        """Copy a layer's piece to the device."""
        self.device.copy(self.pieces[layer], self.images[layer])

    def _copy(self, target: Any, source: Any) -> None:
        """Copy on the lane, and wait for it."""
        self.device.lanes["h2d"].submit(lambda: self.device.copy(target, source)).wait()
