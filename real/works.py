"""What each operation of a run does: forward pass and experts, as work for lanes.

Routing is forced: routers and guesses are computed, and take their time, but what counts is what
the trace says.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from moesim.real.device import Device
from moesim.real.forward import Forward
from moesim.real.lanes import Work
from moesim.real.store import Experts
from moesim.real.torch_machine import Operation
from moesim.real.weights import (
    Activation,
    Held,
    Slot,
    begin_copy,
    end_copy,
    expert_piece,
    expert_whole,
    move,
    slot_memory_bytes,
)
from moesim.residency import Residency
from moesim.types import (
    ATTENTION,
    ATTENTION_CPU,
    BITS,
    COMBINE,
    COPY_IN,
    CPU,
    DENSE_IN,
    DISK_READ,
    EXPERT_CPU,
    EXPERT_GPU,
    GATE,
    H2D_BACKGROUND,
    HEAD,
    KV_IN,
    KV_OUT,
    MOVE,
    NONE,
    PREDICT,
    RESIZE,
    RETURN,
    SEND,
    SHARED,
)


class Works:
    """Turns operations into work; see `torch_machine.Doer`."""

    def __init__(
        self, device: Device, experts: Experts, forward: Forward, slots: Sequence[Slot],
        res: Residency, chunk_bytes: int, precisions: Sequence[int],
        activation: Callable[[int, int, bool], Activation | None] = lambda *_: None,
    ) -> None:  # fmt: skip
        """Take the parts of a run; `precisions` are the bits that copies may have.

        `activation` tells that of (layer, expert), with biases on the device or not.
        """
        self.device = device
        self.experts = experts
        self.shape = experts.shape
        self.forward = forward
        self.slots = slots
        self.res = res
        self.chunk_bytes = chunk_bytes
        self.precisions = precisions
        self.activation = activation
        self.combined = (NONE, 0)
        """The layer added up last, and how many reads from disk had been ordered by then."""
        self.kinds: dict[int, Callable[[Operation], Sequence[Work]]] = {
            ATTENTION: self.attention,
            GATE: lambda o: [partial(forward.gate, o.layer, o.batch)],
            PREDICT: lambda o: [
                partial(forward.predict_on_cpu if o.queue == CPU else forward.predict, o.layer)
            ],
            SHARED: lambda o: [partial(forward.shared, o.layer)],
            EXPERT_GPU: self.expert_gpu,
            EXPERT_CPU: self.expert_cpu,
            COMBINE: self.combine,
            HEAD: lambda _: [forward.head],
            MOVE: self.move,
            RESIZE: lambda o: [partial(self.resize, o.slot, o.amount)],
            COPY_IN: self.copy_in,
            SEND: lambda o: [partial(forward.send, o.layer, o.batch)],
            RETURN: lambda o: [partial(forward.return_, o.layer, o.batch, bool(o.context))],
            KV_IN: lambda o: [partial(forward.kv_in, o.layer, o.batch)],
            KV_OUT: lambda o: [partial(forward.kv_out, o.layer, o.batch)],
            DENSE_IN: lambda o: [partial(forward.dense_in, o.layer)],
            ATTENTION_CPU: lambda o: [partial(forward.attention_on_host, o.layer, o.batch)],
            DISK_READ: self.disk_read,
        }

    def begin(self, step: int) -> None:
        """See `Doer.begin`."""
        self.forward.begin(step)

    def pieces(self, operation: Operation) -> Sequence[Work]:
        """See `Doer.pieces`."""
        return self.kinds[operation.kind](operation)

    def choice(self, step: int, layer: int, batch: int) -> tuple[Any, Any] | None:
        """Return None: the trace's choice counts."""
        return None

    def guess(self, guess: int, layer: int) -> tuple[Any, Any] | None:
        """Return None: the trace's guess counts."""
        return None

    def route(self, layer: int, batch: int, ids: Any, weights: Any) -> None:
        """See `Doer.route`."""
        self.forward.route(layer, batch, ids, weights)

    def expert_gpu(self, o: Operation) -> Sequence[Work]:
        """Compute the part of an expert that a slot holds."""
        wanted = Held(o.layer, o.expert, BITS[o.precision], o.context, o.part)

        def compute() -> None:
            rows = self.forward.inputs(o.layer, o.expert, o.batch)
            activation = self.activation(o.layer, o.expert, True)
            result = expert_piece(rows, self.slots[o.slot], self.shape, wanted, activation)
            self.forward.put(o.layer, o.expert, o.batch, result)

        return [compute]

    def expert_cpu(self, o: Operation) -> Sequence[Work]:
        """Compute an expert from the host's image; `context` is 1 if its result is deferred."""
        bits = BITS[o.precision]
        image = self.experts.image(o.layer, o.expert, bits)

        def compute() -> None:
            rows = self.forward.cpu_inputs(o.layer, o.expert)
            activation = self.activation(o.layer, o.expert, False)
            result = expert_whole(rows, image, self.shape, bits, activation)
            self.forward.cpu_put(o.layer, o.expert, result, bool(o.context))

        return [compute]

    def attention(self, o: Operation) -> Sequence[Work]:
        """Attend; what was read from disk for the layer before is then of no use any more.

        Not so behind its COMBINE: in the last hook the policy may still fetch of that layer.
        """
        self.experts.forget(*self.combined)
        return [partial(self.forward.attention, o.layer, o.batch)]

    def combine(self, o: Operation) -> Sequence[Work]:
        """Add up a layer."""
        self.combined = o.layer, self.experts.reservations
        return [partial(self.forward.combine, o.layer)]

    def copy_in(self, o: Operation) -> Sequence[Work]:
        """Bring a part of an expert into a slot, in chunks if others may go between them."""
        bits = BITS[o.precision]
        wanted = Held(o.layer, o.expert, bits, o.context, o.part)
        image, slot = self.experts.image(o.layer, o.expert, bits), self.slots[o.slot]
        chunk_bytes = self.chunk_bytes if o.queue == H2D_BACKGROUND else 0

        def copy(pairs: Sequence[tuple[Any, Any]]) -> None:
            for target, source in pairs:
                self.device.copy(target, source)

        def begin() -> list[Work]:
            chunks = begin_copy(image, slot, self.shape, wanted, chunk_bytes)
            # The last chunk and the tag are one piece: none is interrupted with nothing left to do.
            *first, last = chunks or [[]]

            def end() -> None:
                copy(last)
                end_copy(slot, self.shape, wanted)

            return [*(partial(copy, chunk) for chunk in first), end]

        return [begin]

    def move(self, o: Operation) -> Sequence[Work]:
        """Copy the first part of a staged expert to another slot."""
        source = self.slots[int(self.res.staged_slot[o.layer, o.expert])]
        wanted = Held(o.layer, o.expert, BITS[o.precision], 0, o.part)
        return [partial(move, self.slots[o.slot], source, self.shape, wanted)]

    def resize(self, number: int, size_bytes: int) -> None:
        """Give a slot other memory."""
        slot = self.slots[number]
        slot.held = None
        if slot.memory is not None:
            self.device.free(slot.memory)
        slot.memory = None
        slot.size_bytes = size_bytes
        slot.memory = slot_memory(self.device, self.experts, size_bytes, self.precisions)

    def disk_read(self, o: Operation) -> Sequence[Work]:
        """Read an expert whose home is the disk."""
        buffer = self.experts.reserve(o.layer, o.expert)
        return [partial(self.experts.read_from_disk, o.layer, o.expert, buffer)]


def slot_memory(
    device: Device, experts: Experts, size_bytes: int, precisions: Sequence[int]
) -> Any:
    """Return device memory for a slot of a size; none for 0 bytes."""
    import torch

    if size_bytes == 0:
        return None
    return device.empty(slot_memory_bytes(experts.shape, size_bytes, precisions), dtype=torch.uint8)
