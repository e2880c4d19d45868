"""The parts of a Hugging Face MoE that are computed apart: decoder layers, routers, experts."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from moesim.errors import MoesimError, RealError
from moesim.model import ModelSpec
from moesim.real.device import Device
from moesim.real.weights import Activation, computed
from moesim.traces.recorder.hooks import spec_of
from moesim.traces.recorder.routers import Router, find_routers

DECODER = ("input_layernorm", "self_attn", "post_attention_layernorm")
"""What a decoder layer has beside its FFN, in the order in which it computes."""


class Fused:
    """A layer's experts, which transformers keeps in two tensors with one row per expert."""

    def __init__(self, path: str, module: Any, spec: ModelSpec) -> None:
        """Take the module; raises RealError for one that is made differently."""
        self.module = module
        known = ("gate_up_proj", "down_proj", "_apply_gate", "is_concatenated", "is_transposed")
        whole = all(hasattr(module, name) for name in known) and module.has_gate
        if not whole or module.gate_up_proj.dtype.itemsize < 2:
            raise RealError(
                f"{path} ({type(module).__name__}): its experts are not the fused gate_up_proj and "
                "down_proj of transformers that can be run one by one"
            )
        self.path = path
        self.biases = {
            name: value.detach().clone()
            for name in ("gate_up_proj_bias", "down_proj_bias")
            if (value := getattr(module, name, None)) is not None
        }
        """On the host; the module has those on the device."""
        expected = [(spec.expert_width, spec.hidden)] * 2 + [(spec.hidden, spec.expert_width)]
        found = [tuple(matrix.shape) for matrix in self.matrices(0)]
        if found != expected:
            raise RealError(f"{path}: experts have matrices {found}; {expected} were expected")
        silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
        swiglu = silu and type(module)._apply_gate.__name__ == "_default_apply_gate"
        self.plain = swiglu and not self.biases

    def matrices(self, expert: int) -> tuple[Any, Any, Any]:
        """Return gate (width, hidden), up, and down (hidden, width), as views."""
        own = self.module
        gate_up, down = own.gate_up_proj[expert].detach(), own.down_proj[expert].detach()
        if own.is_transposed:
            gate_up, down = gate_up.t(), down.t()
        gate, up = self.apart(gate_up)
        return gate, up, down

    def apart(self, gate_up: Any) -> tuple[Any, Any]:
        """Return gate and up of what has both along its first axis."""
        if self.module.is_concatenated:
            gate, up = gate_up.chunk(2)
            return gate, up
        gate, up = gate_up.unflatten(0, (-1, 2)).unbind(1)
        return gate, up

    def between(self, gate: Any, up: Any) -> Any:
        """Return what the module makes of gate and up (tokens, neurons)."""
        import torch

        if self.module.is_concatenated:
            return self.module._apply_gate(torch.cat([gate, up], dim=-1))
        return self.module._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))

    def activation(self, expert: int, on_device: bool) -> Activation | None:
        """Return what an expert does beside its matrices; None where that is plain SwiGLU."""
        if self.plain:
            return None
        if not self.biases:
            return Activation(self.between)
        gate_up, down = (
            (getattr(self.module, name) if on_device else value)[expert]
            for name, value in self.biases.items()
        )
        return Activation(self.between, *self.apart(gate_up), down)

    def release(self) -> None:
        """Let go of the weights; the module cannot be called any more."""
        for own in (self.module.gate_up_proj, self.module.down_proj):
            own.data = own.data.new_empty(0)


class Parts(NamedTuple):
    """A causal language model, taken apart."""

    net: Any
    base: Any
    """What computes the last hidden states: embedding, `layers`, norm."""
    spec: ModelSpec
    routers: tuple[Router, ...]
    """By MoE layer; likewise `blocks`, which own router and experts, and `experts`."""
    blocks: tuple[Any, ...]
    experts: tuple[Fused, ...]

    @property
    def layers(self) -> Any:
        """The decoder layers, those without experts among them."""
        return self.base.layers

    @property
    def dtype(self) -> Any:
        """That of the activations."""
        return self.net.get_input_embeddings().weight.dtype

    @property
    def bfloat16(self) -> bool:
        """Whether that is what experts are kept in at 16 bits."""
        return str(self.dtype) == "torch.bfloat16"

    def activation(self, layer: int, expert: int, on_device: bool) -> Activation | None:
        """Return what an expert does beside its matrices, None for plain SwiGLU."""
        return self.experts[layer].activation(expert, on_device)

    def span(self, layer: int) -> range:
        """Return the decoder layers that belong to a MoE layer, itself the last; those behind all
        MoE layers for the number after the last."""
        ids = (-1, *self.spec.layer_ids, self.spec.hidden_layers - 1)
        return range(ids[layer] + 1, ids[layer + 1] + 1)


def parts_of(net: Any) -> Parts:
    """Take a model apart; it is not to be trained any more.

    Raises RecordError where its routers are not found, RealError where the rest is not understood.
    """
    name = type(net).__name__
    routers = tuple(find_routers(net))
    spec = spec_of(net, list(routers))
    base = net.base_model
    known = hasattr(base, "layers") and hasattr(base, "norm")
    if spec is None or not known or len(base.layers) != spec.hidden_layers:
        raise RealError(f"{name}: its config and its layers do not say what it is made of")
    if spec.weightless_experts:
        raise RealError(f"{name} has experts without weights, which cannot be run")
    for router in routers:
        layer = base.layers[router.layer]
        missing = [part for part in DECODER if not hasattr(layer, part)]
        if missing:
            raise RealError(f"{type(layer).__name__} has no {missing[0]}, and cannot be divided")
    net.requires_grad_(False)
    return Parts(
        net=net,
        base=base,
        spec=spec,
        routers=routers,
        blocks=tuple(net.get_submodule(router.path) for router in routers),
        experts=tuple(Fused(router.path, router.experts, spec) for router in routers),
    )


@contextmanager
def understood(parts: Parts) -> Iterator[None]:
    """Turn what modules raise that are called otherwise than they expect into one line."""
    try:
        yield
    except MoesimError:
        raise
    except Exception as error:  # other people's modules raise what they like
        text = " ".join(str(error).split())[:200]
        raise RealError(
            f"{type(parts.net).__name__} cannot be run in parts: {type(error).__name__}: {text}"
        ) from error


def check_experts(parts: Parts) -> None:
    """Raise RealError unless an expert of each layer computes what its module does with it."""
    import torch

    random = torch.Generator().manual_seed(0)
    rows = torch.randn(2, parts.spec.hidden, generator=random).to(parts.dtype)
    ids = torch.zeros(2, 1, dtype=torch.int64)
    limit = max(1e-3, 8 * torch.finfo(parts.dtype).eps)
    for own in parts.experts:
        truth = own.module(rows, ids, torch.ones(2, 1, dtype=parts.dtype))
        mine = computed(rows, own.matrices(0), own.activation(0, on_device=False))
        off = float((mine - truth).float().norm() / truth.float().norm())
        if not off < limit:
            raise RealError(
                f"{own.path}: its experts do otherwise than two products and what "
                f"{type(own.module).__name__} has between: {off:.2g} off, and up to {limit:.2g} is "
                "legal"
            )


@contextmanager
def placed(parts: Parts, device: Device) -> Iterator[None]:
    """Have all but the experts' matrices in device memory; afterwards on the host again."""
    fused = [(e.module.gate_up_proj, e.module.down_proj) for e in parts.experts]
    stay = {id(tensor) for pair in fused for tensor in pair}
    tensors = [*parts.net.parameters(), *parts.net.buffers()]
    home = [(tensor, tensor.data) for tensor in tensors if id(tensor) not in stay]
    try:
        for tensor, source in home:
            target = device.empty(*source.shape, dtype=source.dtype)
            device.lanes["h2d"].submit(partial(device.copy, target, source)).wait()
            tensor.data = target
        yield
    finally:
        for lane in device.lanes.values():  # what is under way may still read what is on the device
            lane.drop()
        for tensor, source in home:
            tensor.data = source


@contextmanager
def stands_in(modules: Any, calls: Any) -> Iterator[None]:
    """Let other functions be called in the place of modules' own `forward`."""
    with ExitStack() as stack:
        for module, call in zip(modules, calls, strict=True):
            module.forward = call
            stack.callback(delattr, module, "forward")
        yield
