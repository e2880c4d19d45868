"""The forward pass beside the experts: what is kept of it, and one method per kind of operation.

A method is called by the thread of the lane that its docstring names, when everything that the host
program lets the operation wait for is over. Experts are computed elsewhere, from the rows that
`inputs` and `cpu_inputs` return, to results that `put` and `cpu_put` take.

How long a buffer must last decides how many there are of it:

* an EXPERT_CPU whose result is deferred may run until COMBINE of the next layer, so that what SEND
  brought, the routing and the sums on the host are two each, by parity of the layer. SEND of the
  layer after next is behind its attention, and that is behind this COMBINE;
* SEND may still read the normed stream while the next layer attends: two, by parity of the layer;
* KV_IN waits for the attention before the last one: two buffers, by parity of the attention in the
  order of a step's layers and batches. DENSE_IN likewise, by parity of the layer; router and shared
  experts of the layer before the last one are done when it is submitted, since the host has waited
  for a gate behind them;
* KV_OUT may come late, even in the next step: it copies tensors of its own;
* a RETURN is added up before the next one of its sort comes: one buffer on the device for each;
* queries, keys, values and results of attention on the CPU are used up by their batch's GATE, and
  the routing on the device by COMBINE: one.
"""

from typing import Any

import numpy as np

from moesim.errors import RealError
from moesim.model import ModelSpec
from moesim.real import operations as ops
from moesim.real.caches import Caches, Key, heads_first
from moesim.real.dense import Block, Dense, grouped_query
from moesim.real.device import Device
from moesim.real.exchange import Exchange
from moesim.real.routing import Choices
from moesim.real.sequences import Now, Share, groups_of, now_of
from moesim.traces.workload import Steps
from moesim.types import DECODE, NONE, FloatArray, IntArray


class Forward:
    """Everything of a run but its experts.

    The lanes of the device must be idle. Raises RealError for a model that cannot be computed,
    CalibrationError if device memory does not suffice.
    """

    def __init__(
        self, model: ModelSpec, device: Device, steps: Steps, *, kv_on_host: bool = False,
        dense_on_host: bool = False, attention_on_cpu: bool = False, dtype: Any = None,
        seed: int = 0,
    ) -> None:  # fmt: skip
        """Draw the weights and take the memory; `dtype` is bfloat16 by default."""
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
        self.model = model
        self.device = device
        self.steps = steps
        self.attention_on_cpu = attention_on_cpu
        self.groups = groups_of(steps)
        self.ids = token_ids(model, steps, seed)
        """(rows,): the token of each row of `steps`."""
        self._nows = [now_of(steps, self.groups, step) for step in range(len(steps.phase))]
        self.now: Now = self._nows[0]
        """The step under way."""
        self.residual: Any = None
        """(tokens, hidden): the stream; behind COMBINE, what a layer leaves behind."""
        self.choice: dict[int, tuple[Any, Any]] = {}
        """By batch: ids and weights (tokens, top_k) that the router chose, on the device."""
        self.logits: Any = None
        """(sequences, vocabulary) of the last HEAD, on the device."""
        self.tokens: Any = None
        """(sequences,): the likeliest of them."""

        self.dense = Dense(device, model, dense_on_host, dtype, seed)
        self.caches = Caches(device, model, self.groups, kv_on_host, attention_on_cpu, dtype)
        tokens = int((steps.offset[:, -1] - steps.offset[:, 0]).max())
        hidden, top_k = model.hidden, model.top_k
        self.exchange = Exchange(device, tokens, hidden, dtype)
        self.choices = Choices(device, tokens, top_k, model.experts, dtype)
        self._embedded = device.host(tokens, hidden, dtype=dtype)
        self._stream = device.empty(tokens, hidden, dtype=dtype)
        self._normed_rooms = [device.empty(tokens, hidden, dtype=dtype) for _ in range(2)]
        self._normed = list(self._normed_rooms)
        self._results = device.empty(tokens, top_k, hidden, dtype=dtype)
        # What no expert writes is multiplied by 0, and must be finite.
        device.lanes["gpu"].submit(self._results.zero_).wait()
        self._shared: Any = None
        self._indices: dict[bytes, Any] = {}
        for now in self._nows:
            for rows in (now.last, *(share.rows for shares in now.shares for share in shares)):
                self._place_rows(rows)
        self._written: dict[int, set[int]] = {}
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

        self.now = self._nows[step]
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
            rows = self._on_device(share.rows)
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
        weights, ids = ops.gate(self._normed[layer % 2][rows], block.router, self.model.top_k)
        self.choice[batch] = ids, weights

    def predict(self, layer: int) -> None:
        """Do what a prediction takes, a gate of all tokens; lane `gpu`."""
        ops.gate(self.residual, self.dense.blocks[layer][-1].router, self.model.top_k)

    def predict_on_cpu(self, layer: int) -> None:
        """Do the same with the rows that were sent; lane `cpu`."""
        rows = self.exchange.sent(layer, self.now.tokens)
        ops.gate(rows, self.dense.routers[layer], self.model.top_k)

    def route(self, layer: int, batch: int, ids: IntArray, weights: FloatArray | None) -> None:
        """Take the choice that counts, (tokens, top_k) of a batch; any thread, behind the GATE.

        Other ids than those of experts are no choice; no weights are equal ones. The experts' rows
        are known once all batches of the step have come.
        """
        self.choices.take(self.now, layer, batch, ids, weights)

    def shared(self, layer: int) -> None:
        """Compute the shared experts; lane `gpu`."""
        block = self.dense.blocks[layer][-1]
        self._shared = ops.expert(self._normed[layer % 2], block.gate_up, block.down)

    def inputs(self, layer: int, expert: int, batch: int = NONE) -> Any:
        """Return an expert's rows (its tokens, hidden); lane `gpu`."""
        _, rows, _ = self.choices.on_device(layer)
        own = rows[self.choices.of(layer).span(expert, batch)]
        return self._normed[layer % 2].index_select(0, own)

    def put(self, layer: int, expert: int, batch: int, result: Any) -> None:
        """Take an expert's result (its tokens, hidden), or a further piece of it; lane `gpu`."""
        places, _, _ = self.choices.on_device(layer)
        own = places[self.choices.of(layer).span(expert, batch)]
        results = self._results.view(-1, self.model.hidden)
        batches = self._written.setdefault(expert, set())
        if batch in batches:
            results.index_add_(0, own, result)
        else:
            results.index_copy_(0, own, result)
            batches.add(batch)

    def combine(self, layer: int) -> None:
        """Add all results to the stream, with what came back of this layer and, deferred, of the
        last one; lane `gpu`.
        """
        tokens = self.now.tokens
        places, _, weights = self.choices.on_device(layer)
        routing = self.choices.of(layer)
        for expert in routing.active:
            if expert not in self._written:
                weights.view(-1).index_fill_(0, places[routing.span(expert)], 0)
        self._written = {}
        stream = ops.combine(self.residual, self._results[:tokens], weights)
        if self.model.shared_width:
            stream += self._shared
        for returned in self.exchange.returned((self.now.step, layer), tokens):
            stream += returned
        self.residual = stream

    def head(self) -> None:
        """Pass the layers without experts behind the last MoE layer, and find the next tokens.

        Lane `gpu`; leaves `logits` and `tokens`, in the order of the step's sequences.
        """
        for shares in self.now.shares if self.dense.last else ():
            for share in shares:
                rows = self._on_device(share.rows)
                stream, _ = self._pass_blocks(
                    self.dense.last, self.model.layers, share, self.residual[rows]
                )
                self.residual = written(self.residual, rows, stream)
        last = self.residual[self._on_device(self.now.last)]
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
            self.exchange.send(layer, self._normed[layer % 2][: self.now.tokens])
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

    def cpu_inputs(self, layer: int, expert: int) -> Any:
        """Return an expert's rows (its tokens, hidden), as sent; lane `cpu`."""
        routing = self.choices.of(layer)
        rows = routing.rows[routing.span(expert)]
        return self.exchange.sent(layer, self.now.tokens).index_select(0, rows)

    def cpu_put(self, layer: int, expert: int, result: Any, deferred: bool = False) -> None:
        """Take an expert's result (its tokens, hidden), weigh it and add it up; lane `cpu`."""
        routing = self.choices.of(layer)
        span = routing.span(expert)
        weights = routing.weights.view(-1)[routing.places[span]]
        weighted = result.float() * weights.float()[:, None]
        moment = (self.now.step, layer)
        self.exchange.add(moment, self.now.tokens, routing.rows[span], weighted, deferred)

    def return_(self, layer: int, batch: int = NONE, deferred: bool = False) -> None:
        """Copy to the device what the CPU added up, or for one batch what it attended; lane `h2d`.

        `layer` is the one whose experts were computed, the last one's where they are deferred.
        """
        if batch == NONE:
            self.exchange.bring_back((self.now.step, layer), self.now.tokens, deferred)
        else:
            rows = self.now.rows_of(batch)
            self.device.copy(self._seen[rows], self._seen_host[rows])

    def _place_rows(self, rows: slice | IntArray) -> None:
        """Copy rows that are no slice to the device, once."""
        import torch

        if isinstance(rows, slice) or rows.tobytes() in self._indices:
            return
        index = self.device.empty(len(rows), dtype=torch.int64)
        source = torch.from_numpy(rows)
        self.device.lanes["h2d"].submit(lambda: self.device.copy(index, source)).wait()
        self._indices[rows.tobytes()] = index

    def _on_device(self, rows: slice | IntArray) -> Any:
        """Return rows as an index on the device."""
        return rows if isinstance(rows, slice) else self._indices[rows.tobytes()]

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

    def _leave(self, layer: int, rows: Any, residual: Any, normed: Any) -> None:
        """Write what attention left to its rows."""
        parity = layer % 2
        self.residual = written(self.residual, rows, residual)
        room = self._normed_rooms[parity][: self.now.tokens]
        self._normed[parity] = written(room, rows, normed)


def token_ids(model: ModelSpec, steps: Steps, seed: int) -> IntArray:
    """Return the token of each row of `steps`, random ones: routing does not depend on them."""
    return np.random.default_rng(seed).integers(model.vocab, size=len(steps.rows))


def written(target: Any, rows: Any, values: Any) -> Any:
    """Return a tensor with some of its rows replaced: the values themselves if these are all."""
    if len(values) == len(target):
        return values
    target[rows] = values
    return target
