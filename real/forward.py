"""The forward pass beside the experts: what is kept of it, and one method per kind of operation.

What experts read and leave behind is in `stream`. Of other buffers there are:

* KV_IN waits for the attention before the last one: two buffers, by parity of the attention in the
  order of a step's layers and batches. DENSE_IN likewise, by parity of the layer; router and shared
  experts of the layer before the last one are done when it is submitted, since the host has waited
  for a gate behind them;
* KV_OUT may come late, even in the next step: it copies tensors of its own;
* queries, keys, values and results of attention on the CPU are used up by their batch's GATE: one.
"""

from typing import Any

import numpy as np

from moesim.errors import RealError
from moesim.model import ModelSpec
from moesim.real import operations as ops
from moesim.real.caches import Caches, Key, heads_first
from moesim.real.dense import Block, Dense, grouped_query
from moesim.real.device import Device
from moesim.real.sequences import Share
from moesim.real.stream import Stream, written
from moesim.traces.workload import Steps
from moesim.types import DECODE, NONE, IntArray


class Forward(Stream):
    """Everything of a run but its experts.

    The lanes of the device must be idle. Raises RealError for a model that cannot be computed,
    CalibrationError if device memory does not suffice.
    """

    def __init__(
        self, model: ModelSpec, device: Device, steps: Steps, *, kv_on_host: bool = False,
        dense_on_host: bool = False, attention_on_cpu: bool = False, dtype: Any = None,
        seed: int = 0, dense: Dense | None = None,
    ) -> None:  # fmt: skip
        """Take the memory, and draw the weights unless they are given, which takes long.

        `dtype` is bfloat16 by default.
        """
        import torch

        own = grouped_query(model)
        if attention_on_cpu and not kv_on_host:
            raise RealError("attention on the CPU needs keys and values on the host")
        if attention_on_cpu and any(model.dense_before):
            raise RealError(
                f"{model.name} has layers without experts before MoE layers; with attention on the "
                "CPU they cannot be computed"
            )
        dtype = dtype or torch.bfloat16
        super().__init__(device, steps, model.hidden, model.top_k, model.experts, dtype)
        self.model = model
        self.attention_on_cpu = attention_on_cpu
        self.ids = token_ids(model, steps, seed)
        """(rows,): the token of each row of `steps`."""
        self.dense = dense or Dense(device, model, dense_on_host, dtype, seed)
        self.caches = Caches(device, model, self.groups, kv_on_host, attention_on_cpu, dtype)
        tokens = len(self._stream)
        self._embedded = device.host(tokens, model.hidden, dtype=dtype)
        self._shared: Any = None
        self._projected: dict[int, Any] = {}
        self._finished = (NONE, NONE)
        if attention_on_cpu:
            seen, all_heads = own.heads * own.head_dim, own.heads + 2 * own.kv_heads
            self._projected_host = device.host(tokens, all_heads, own.head_dim, dtype=dtype)
            self._seen_host = device.host(tokens, seen, dtype=dtype)
            self._seen = device.empty(tokens, seen, dtype=dtype)

    def begin(self, step: int) -> None:
        """Take up a step's tokens: their embeddings are the stream.

        Lane `gpu`, when the HEAD before is over, and with it all but KV_OUT and copies of experts.
        """
        import torch

        self.now = self.nows[step]
        tokens = self.now.tokens
        ids = torch.from_numpy(self.ids[self.now.rows])
        torch.index_select(self.dense.embedding, 0, ids, out=self._embedded[:tokens])
        # Not over the link: an engine looks them up on the device.
        self._stream[:tokens].copy_(self._embedded[:tokens], non_blocking=True)
        self.residual = self._stream[:tokens]

    def attends_on_cpu(self) -> bool:
        """Say whether the CPU attends to the context in this step."""
        return self.attention_on_cpu and self.now.phase == DECODE

    def attention(self, layer: int, batch: int) -> None:
        """Attend, and pass the layers without experts before; lane `gpu`.

        Where the CPU attends, project to queries, keys and values only.
        """
        blocks = self.dense.blocks[layer]
        if self.attends_on_cpu():
            own = blocks[-1].attention
            rows = ops.rms_norm(self.residual[self.now.rows_of(batch)], own.norm)
            projected = ops.linear(rows, own.qkv)
            self._projected[batch] = projected.view(len(rows), -1, own.head_dim)
            return
        for share in self.now.shares[batch]:
            rows = self.on_device(share.rows)
            residual, normed = self._pass_blocks(blocks, layer, share, self.residual[rows])
            self._leave(layer, rows, residual, normed)

    def gate(self, layer: int, batch: int) -> None:
        """Route; the choice is in `choice`, until another one is given to `route`. Lane `gpu`.

        Where the CPU attended, the output projection and the norm behind it come first.
        """
        block = self.dense.blocks[layer][-1]
        rows = self.now.rows_of(batch)
        if self.attends_on_cpu():
            attended = ops.finished(
                self.residual[rows], self._seen[rows], None, None, block.attention
            )
            self._leave(layer, rows, attended.residual, attended.normed)
            self._finished = self.now.step, layer
        weights, ids = ops.gate(self.normed(layer)[rows], block.router, self.model.top_k)
        self.choice[batch] = ids, weights

    def predict(self, layer: int) -> None:
        """Do what a prediction takes, a gate of all tokens; lane `gpu`."""
        ops.gate(self.residual, self.dense.blocks[layer][-1].router, self.model.top_k)

    def predict_on_cpu(self, layer: int) -> None:
        """Do the same with the rows that were sent; lane `cpu`."""
        rows = self.exchange.sent(layer, self.now.tokens)
        ops.gate(rows, self.dense.routers[layer], self.model.top_k)

    def shared(self, layer: int) -> None:
        """Compute the shared experts; lane `gpu`."""
        block = self.dense.blocks[layer][-1]
        self._shared = ops.expert(self.normed(layer), block.gate_up, block.down)

    def combine(self, layer: int) -> None:
        """Add all results to the stream, with what came back of this layer and, deferred, of the
        last one; lane `gpu`.
        """
        stream = ops.combine(self.residual, *self.take_results(layer))
        if self.model.shared_width:
            stream += self._shared
        for returned in self.returned(layer):
            stream += returned
        self.residual = stream

    def head(self) -> None:
        """Pass the layers without experts behind the last MoE layer, and find the next tokens.

        Lane `gpu`; leaves `logits` and `tokens`, in the order of the step's sequences.
        """
        for shares in self.now.shares if self.dense.last else ():
            for share in shares:
                rows = self.on_device(share.rows)
                stream, _ = self._pass_blocks(
                    self.dense.last, self.model.layers, share, self.residual[rows]
                )
                self.residual = written(self.residual, rows, stream)
        last = self.residual[self.on_device(self.now.last)]
        self.logits = ops.linear(ops.rms_norm(last, self.dense.norm), self.dense.head)
        self.tokens = self.logits.argmax(-1)

    def kv_in(self, layer: int, batch: int) -> None:
        """Copy a batch's keys and values to the device; lane `h2d`."""
        self.caches.load(self.now, layer, batch)

    def kv_out(self, layer: int, batch: int) -> None:
        """Copy those of a batch's new tokens to the host, whatever step it is; lane `d2h`."""
        self.caches.store(layer, batch)

    def dense_in(self, layer: int) -> None:
        """Copy a layer's weights outside the experts to the device; lane `h2d`."""
        self.dense.load(layer)

    def send(self, layer: int, batch: int = NONE) -> None:
        """Copy the normed stream of all tokens to the host; lane `d2h`.

        Of one batch: queries, keys and values for attention on the CPU. With that the normed stream
        is there behind the GATEs only: RealError before, which a prediction on the CPU may ask for.
        """
        if batch == NONE:
            if self.attends_on_cpu() and self._finished < (self.now.step, layer):
                raise RealError(
                    f"layer {layer}: with attention on the CPU nothing can be predicted there "
                    "before the gate"
                )
            super().send(layer)
        else:
            self.device.copy(self._projected_host[self.now.rows_of(batch)], self._projected[batch])

    def attention_on_host(self, layer: int, batch: int) -> None:
        """Attend to what is in the caches on the host, and write to them; lane `cpu`."""
        import torch

        own = self.dense.blocks[layer][-1].attention
        for share in self.now.shares[batch]:
            heads = self._projected_host[share.rows]
            queries, keys, values = heads.split([own.heads, own.kv_heads, own.kv_heads], dim=1)
            cache = self.caches.held[Key(layer, 0, share.group)]
            cache[share.past, 0] = keys
            cache[share.past, 1] = values
            all_keys, all_values = heads_first(cache[: share.past + 1])
            # The heads of a group read the same keys: to the kernel they are queries of one head.
            grouped = queries.reshape(share.sequences, own.kv_heads, -1, own.head_dim)
            seen = torch.nn.functional.scaled_dot_product_attention(grouped, all_keys, all_values)
            self._seen_host[share.rows] = seen.reshape(share.sequences, -1)

    def return_(self, layer: int, batch: int = NONE, deferred: bool = False) -> None:
        """Copy to the device what the CPU added up, or for one batch what it attended; lane `h2d`.

        `layer` is the one whose experts were computed, the last one's where they are deferred.
        """
        if batch == NONE:
            super().return_(layer, batch, deferred)
        else:
            rows = self.now.rows_of(batch)
            self.device.copy(self._seen[rows], self._seen_host[rows])

    def _pass_blocks(
        self, blocks: tuple[Block, ...], layer: int, share: Share, stream: Any
    ) -> tuple[Any, Any]:
        """Return stream and normed stream behind the attention of the last block, or behind the
        FFN of one without experts."""
        normed = None
        for at, block in enumerate(blocks):
            key = Key(layer, at, share.group)
            if share.past == 0:
                attended = ops.prefill(stream, share.sequences, block.attention)
            else:
                keys, values = heads_first(self.caches.seen(self.now, key))
                attended = ops.decode(stream, keys, values, share.past, block.attention)
            self.caches.keep(key, share, attended)
            stream, normed = attended.residual, attended.normed
            if block.router is None:
                stream = stream + ops.expert(normed, block.gate_up, block.down)
        return stream, normed


def token_ids(model: ModelSpec, steps: Steps, seed: int) -> IntArray:
    """Return the token of each row of `steps`, random ones: routing does not depend on them."""
    return np.random.default_rng(seed).integers(model.vocab, size=len(steps.rows))
