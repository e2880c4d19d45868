"""The forward pass of a Hugging Face model beside its experts, one method per kind of operation.

Everything is computed by the model's own modules, on the device, with its own cache. Sequences of a
batch that are alike are computed in one call and others in groups, so that nothing is ever padded.
What a decoder layer is called with, the model itself says: in each step its own forward is called
with layers that only listen.
"""

import inspect
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np

from moesim.errors import RealError
from moesim.real.device import Device
from moesim.real.modules import Parts, stands_in
from moesim.real.sequences import Share
from moesim.real.stream import Stream, written
from moesim.traces.recorder.routers import Router
from moesim.traces.workload import Steps, Workload, steps_of
from moesim.types import IntArray

SHARED = ("shared_experts", "shared_expert", "shared_mlp")
"""What transformers calls them."""


class ModelForward(Stream):
    """Everything of a model but its experts; `parts` are placed on the device.

    `ids` are the tokens of step 0, in the order of its rows. The lanes of the device must be idle.
    Tokens are drawn at a `temperature` by `seed`; at 0 they are the likeliest. Methods are called
    as those of `forward.Forward`.
    """

    def __init__(
        self, parts: Parts, device: Device, steps: Steps, ids: IntArray, *,
        temperature: float = 0.0, seed: int = 0,
    ) -> None:  # fmt: skip
        """Take the memory."""
        import torch

        spec = parts.spec
        super().__init__(
            device, steps, spec.hidden, spec.top_k, spec.experts, parts.dtype, torch.float32
        )
        self.parts = parts
        self.temperature = temperature
        self.seed = seed
        self.prompts = device.empty(len(ids), dtype=torch.int64)
        source = torch.from_numpy(np.ascontiguousarray(ids, np.int64))
        device.lanes["h2d"].submit(partial(device.copy, self.prompts, source)).wait()
        forward = inspect.signature(parts.base.forward).parameters
        self.cache_name = "cache" if "cache" in forward else "past_key_values"
        self._caches: dict[int, Any] = {}
        """By group."""
        self._given: dict[tuple[int, int], dict[str, Any]] = {}
        """By group and decoder layer: with what the layer is called in this step."""
        self._shared: Any = None
        self._random: Any = None

    def begin(self, step: int) -> None:
        """Take up a step's tokens: their embeddings are the stream; lane `gpu`."""
        self.now = self.nows[step]
        self.residual = self._stream[: self.now.tokens]
        tokens = self.prompts if step == 0 else self.tokens
        for share in (share for shares in self.now.shares for share in shares):
            rows = self.on_device(share.rows)
            ids = tokens[rows].view(share.sequences, share.new)
            embedded = self._listen(share, ids).flatten(0, 1)
            self.residual = written(self.residual, rows, embedded)

    def attention(self, layer: int, batch: int) -> None:
        """Attend, and pass the layers without experts before; lane `gpu`."""
        *before, own = self.parts.span(layer)
        decoder = self.parts.layers[own]
        for share in self.now.shares[batch]:
            rows = self.on_device(share.rows)
            stream = self._pass(before, share, self._sequences(share))
            attended = decoder.self_attn(
                hidden_states=decoder.input_layernorm(stream), **self._given[share.group, own]
            )
            stream = stream + attended[0]
            normed = decoder.post_attention_layernorm(stream)
            self._leave(layer, rows, stream.flatten(0, 1), normed.flatten(0, 1))

    def gate(self, layer: int, batch: int) -> None:
        """Route a batch; lane `gpu`."""
        rows = self.normed(layer)[self.now.rows_of(batch)]
        found = self.parts.routers[layer].apply(rows, 0, self.parts.spec.top_k)
        self.choice[batch] = found.ids, found.weights

    def chosen(self, batch: int) -> tuple[Any, Any]:
        """Return ids and weights (tokens, top_k) on the host, best first; behind the GATE."""
        ids, weights = self.choice[batch]
        return ids.cpu().numpy(), weights.cpu().numpy()

    def shared(self, layer: int) -> None:
        """Compute the shared experts; lane `gpu`."""
        block, rows = self.parts.blocks[layer], self.normed(layer)
        own = next(getattr(block, name) for name in SHARED if hasattr(block, name))
        self._shared = own(rows)
        if hasattr(block, "shared_expert_gate"):
            self._shared = block.shared_expert_gate(rows).sigmoid() * self._shared

    def combine(self, layer: int) -> None:
        """Add all results to the stream, with what came back of this layer and, deferred, of the
        last one; lane `gpu`.
        """
        results, weights = self.take_results(layer)
        total = (results * weights[..., None]).sum(1).to(results.dtype)
        if self.parts.spec.shared_width:
            total += self._shared
        for returned in self.returned(layer):
            total += returned
        self.residual = self.residual + total

    def head(self) -> None:
        """Pass the layers without experts behind the last MoE layer, and find the next tokens.

        Lane `gpu`; leaves `logits` and `tokens`, in the order of the step's sequences.
        """
        import torch

        behind = self.parts.span(self.parts.spec.layers)
        for share in (share for shares in self.now.shares for share in shares if behind):
            stream = self._pass(behind, share, self._sequences(share)).flatten(0, 1)
            self.residual = written(self.residual, self.on_device(share.rows), stream)
        last = self.parts.base.norm(self.residual[self.on_device(self.now.last)])
        self.logits = self.parts.net.get_output_embeddings()(last)
        if self.temperature == 0:
            self.tokens = self.logits.argmax(-1)
            return
        if self._random is None:
            self._random = torch.Generator(self.logits.device).manual_seed(self.seed)
        likely = torch.softmax(self.logits.float() / self.temperature, dim=-1)
        self.tokens = torch.multinomial(likely, 1, generator=self._random)[:, 0]

    def _sequences(self, share: Share) -> Any:
        """Return the stream of a group (sequences, tokens of each, hidden)."""
        return self.residual[self.on_device(share.rows)].view(share.sequences, share.new, -1)

    def _pass(self, numbers: Iterable[int], share: Share, stream: Any) -> Any:
        """Return the stream behind decoder layers without experts."""
        for number in numbers:
            stream = self.parts.layers[number](stream, **self._given[share.group, number])
        return stream

    def _listen(self, share: Share, ids: Any) -> Any:
        """Return the embeddings of a group, and note with what layers are called."""
        import transformers

        if share.past == 0:
            config = self.parts.base.config
            self._caches[share.group] = transformers.DynamicCache(config=config)
        embedded = []

        def note(number: int, stream: Any, *others: Any, **given: Any) -> Any:
            if others:
                kind = type(self.parts.layers[number]).__name__
                raise RealError(
                    f"{kind} is called with more than the stream, and cannot be divided"
                )
            self._given[share.group, number] = given
            embedded.append(stream)
            return stream

        layers = self.parts.layers
        with stands_in(layers, [partial(note, number) for number in range(len(layers))]):
            cache = {self.cache_name: self._caches[share.group]}
            self.parts.base(input_ids=ids, use_cache=True, **cache)
        return embedded[0]


def check_parts(parts: Parts, device: Device) -> None:
    """Raise RealError unless a model taken apart computes what it does as a whole.

    Three tokens pass through both, two of them at once. In the place of its experts is what returns
    their inputs, weighed: those are compared by `modules.check_experts`.
    """
    import torch

    workload = Workload(rows=np.arange(3), starts=np.array([0, 3]), prompts=np.array([2]))
    forward = ModelForward(parts, device, steps_of(workload), np.array([1, 2]))

    def compare() -> None:
        limit = max(1e-3, 8 * torch.finfo(parts.dtype).eps)
        for step, truth in enumerate(whole(forward)):
            mine = apart(forward, step)
            off = float((mine - truth).float().norm() / truth.float().norm())
            if not off < limit:
                raise RealError(
                    f"{type(parts.net).__name__} computes otherwise than by norm, attention, norm "
                    f"and experts in each layer: logits are {off:.2g} off, and up to {limit:.2g} is"
                    " legal"
                )
            forward.tokens = truth.argmax(-1)

    device.lanes["gpu"].submit(compare).wait()


def whole(forward: ModelForward) -> list[Any]:
    """Return the logits (sequences, vocabulary) of each of two steps, as the model computes them.

    Routers note what else they are called with.
    """
    parts, name = forward.parts, forward.cache_name

    def weighed(rows: Any, ids: Any, weights: Any) -> Any:
        return (rows * weights.sum(-1, keepdim=True)).to(rows.dtype)

    def note(router: Router, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, *router.extra = *args, *kwargs.values()

    handles = [
        router.module.register_forward_pre_hook(partial(note, router), with_kwargs=True)
        for router in parts.routers
    ]
    try:
        with stands_in([e.module for e in parts.experts], [weighed] * len(parts.experts)):
            first = parts.net(input_ids=forward.prompts[None], use_cache=True)
            ids = first.logits[:, -1:].argmax(-1)
            second = parts.net(input_ids=ids, use_cache=True, **{name: first[name]})
    finally:
        for handle in handles:
            handle.remove()
    return [out.logits[:, -1] for out in (first, second)]


def apart(forward: ModelForward, step: int) -> Any:
    """Return the same of one step, as the parts compute them."""
    forward.begin(step)
    for layer in range(forward.parts.spec.layers):
        forward.attention(layer, 0)
        forward.gate(layer, 0)
        forward.route(layer, 0, *forward.chosen(0))
        if forward.parts.spec.shared_width:
            forward.shared(layer)
        for expert in forward.choices.of(layer).active:
            forward.put(layer, expert, 0, forward.inputs(layer, expert))
        forward.combine(layer)
    forward.head()
    return forward.logits
