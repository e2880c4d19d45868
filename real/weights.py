"""How an expert's weights lie in memory: in images on the host, and in slots of the device.

An expert has the matrices gate (width, hidden), up (width, hidden) and down (hidden, width). A row
of gate, the same row of up and the same column of down are a *neuron*: what a part of an expert
is counted in, since the result is a sum over neurons. There are two layouts:

* *matrices*, of 16 bits only: gate, up and down as they are, one behind the other. Two GEMMs make
  an expert, and a whole one is one stretch of bytes; the columns of down in a part are not.
* *by neuron*, (width, bytes of a neuron): gate's row, up's row, down's column. Any part is one
  stretch, for which gate and up are GEMMs of their own. Below 16 bits it is the only layout: first
  a neuron's values, packed, then the scales of its groups, then their zero points.

Images and slots are 1-dimensional tensors of bytes. What the device computes with is bfloat16.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from moesim.errors import AuditError, InputError
from moesim.model import GROUP, packed_bytes
from moesim.real import operations
from moesim.types import WHOLE

Pair = tuple[Any, Any]
"""Target and source of a copy: views of the same shape."""

CACHED_WEIGHTS = 1 << 18
"""What a processor packs or restores at a time; a large expert at once took four times as long."""
POOL = (1 << 20) + 7
"""Random numbers that experts share. A prime: steps of any length visit them all."""
MOST_EXPERTS = 1 << 16
"""Of a layer, as in traces."""


class Shape(NamedTuple):
    """The form of a model's experts."""

    hidden: int
    width: int
    by_neuron: bool = False
    """Whether 16 bits are laid out by neuron, too. For runs that copy parts: PyTorch brings columns
    to a CUDA device by way of memory that is not pinned, and makes the lane's thread wait."""


class Activation(NamedTuple):
    """What an expert does beside its matrices, where that is not SwiGLU without biases."""

    between: Callable[[Any, Any], Any]
    """Makes of gate and up, (tokens, neurons) each, what down is multiplied with."""
    gate_bias: Any = None
    """(width,), or None where there are no biases; likewise `up_bias`."""
    up_bias: Any = None
    down_bias: Any = None
    """(hidden,): added with the part that starts at 0."""


class Held(NamedTuple):
    """What a slot holds, or an operation wants: `part`/1024 of an expert, from `start` on."""

    layer: int
    expert: int
    bits: int
    start: int = 0
    part: int = WHOLE


class Slot:
    """A place for an expert, or a part of one, in device memory.

    `size_bytes` is what the host program counts; `memory` has at least `slot_memory_bytes`, and
    begins where 16-bit numbers may. Whoever changes either lets it hold nothing.
    """

    __slots__ = ("held", "memory", "number", "size_bytes")

    def __init__(self, number: int, memory: Any, size_bytes: int) -> None:
        """Hold nothing."""
        self.number = number
        self.memory = memory
        self.size_bytes = size_bytes
        self.held: Held | None = None

    def __repr__(self) -> str:
        return f"slot {self.number} of {self.size_bytes} bytes with {self.held}"


def neurons(width: int, start: int, part: int) -> tuple[int, int]:
    """Return the first neuron of a part, and the first behind it."""
    return width * start // WHOLE, width * (start + part) // WHOLE


def neuron_bytes(shape: Shape, bits: int) -> int:
    """Return the bytes of one neuron, scales and zero points included.

    Raises InputError below 16 bits where rows are no whole groups.
    """
    if bits < 16 and shape.hidden % GROUP:
        raise InputError(
            f"experts of {bits} bits are packed in groups of {GROUP} weights along hidden, of which"
            f" hidden={shape.hidden} is no multiple"
        )
    return packed_bytes(3 * shape.hidden, bits)


def image_bytes(shape: Shape, bits: int) -> int:
    """Return the bytes of a whole expert: those of `moesim.model.expert_bytes`."""
    return shape.width * neuron_bytes(shape, bits)


def slot_neurons(shape: Shape, bits: int, size_bytes: int) -> int:
    """Return how many neurons a slot of so many bytes has room for: rounded up, as bytes are.

    Parts of no more bytes have no more neurons, wherever they start.
    """
    return min(shape.width, -(-size_bytes // neuron_bytes(shape, bits)))


def slot_memory_bytes(shape: Shape, size_bytes: int, precisions: Iterable[int] = (16,)) -> int:
    """Return the memory that a slot needs for parts of any of these precisions."""
    return max(
        slot_neurons(shape, bits, size_bytes) * neuron_bytes(shape, bits) for bits in precisions
    )


def is_by_neuron(shape: Shape, bits: int) -> bool:
    """Say which layout experts of a precision have."""
    return shape.by_neuron or bits < 16


def pack(gate: Any, up: Any, down: Any, bits: int, by_neuron: bool = False) -> Any:
    """Return the image of an expert, bytes in host memory.

    Raises InputError where rows are no whole groups, and for weights that no 16-bit scale reaches.
    """
    import torch

    width, hidden = gate.shape
    shape = Shape(hidden, width, by_neuron)
    neuron_bytes(shape, bits)
    if not is_by_neuron(shape, bits):
        parts = [matrix.to(torch.bfloat16).reshape(-1) for matrix in (gate, up, down)]
        return torch.cat(parts).view(torch.uint8)
    rows = torch.stack([gate, up, down.t()], dim=1)
    if bits < 16:
        each = block_neurons(shape, rows)
        return torch.cat([quantised(block.float(), bits) for block in rows.split(each)]).view(-1)
    return rows.to(torch.bfloat16).view(-1).view(torch.uint8)


def unpack(image: Any, shape: Shape, bits: int) -> tuple[Any, Any, Any]:
    """Return gate, up and down as the machine computes with them, in bfloat16."""
    *inputs, down = matrices(image, shape, bits, shape.width, 0, shape.width)
    gate, up = inputs if len(inputs) > 1 else inputs[0].chunk(2)
    return gate, up, down


def quantised(rows: Any, bits: int) -> Any:
    """Return (neurons, bytes of one): float32 (neurons, 3, hidden) rounded to steps of its groups.

    A group's zero point is its least weight and its scale a 255th, 15th or third of its range, both
    rounded to 16 bits, the scale upwards: a weight is at most half a step off, or as far as the
    zero point from the least one.
    """
    import torch

    levels = (1 << bits) - 1
    count, each = len(rows), 3 * rows.shape[-1]
    groups = rows.reshape(count, each // GROUP, GROUP)
    low, high = torch.aminmax(groups, dim=-1)
    zeros = low.to(torch.float16)
    steps = (high - zeros.float()).clamp(min=0) / levels
    scales = steps.to(torch.float16)
    scales = (scales.view(torch.int16) + (scales.float() < steps)).view(torch.float16)
    if not (scales.isfinite().all() and zeros.isfinite().all()):
        raise InputError(
            f"weights from {low.min().item():.4g} to {high.max().item():.4g} cannot be packed to "
            f"{bits} bits; what 16-bit floating point reaches is legal, up to 65504"
        )
    divisor = torch.where(scales > 0, scales, 1).float()
    places = (groups - zeros.float()[..., None]) / divisor[..., None]
    planes = places.round().clamp(0, levels).to(torch.uint8).view(count, 8 // bits, -1)
    packed = planes[:, 0].clone()
    for plane in range(1, 8 // bits):
        packed |= planes[:, plane] << bits * plane
    return torch.cat([packed, scales.view(torch.uint8), zeros.view(torch.uint8)], dim=1)


def block_neurons(shape: Shape, rows: Any) -> int:
    """Return how many neurons to pack or restore at a time: few on a processor, for its caches."""
    few = CACHED_WEIGHTS // (3 * shape.hidden) if rows.device.type == "cpu" else len(rows)
    return max(1, few)


def restored(rows: Any, hidden: int, bits: int) -> Any:
    """Return float32 (neurons, 3, hidden): what `quantised` packed, on the device of `rows`.

    A value times its scale is exact in float32, so that every device rounds to the same.
    """
    import torch

    each = 3 * hidden
    size, groups = each * bits // 8, each // GROUP
    values = rows[:, :size]
    scales, zeros = rows[:, size:].view(torch.float16).float().split(groups, dim=1)
    places = torch.empty(len(rows), 8 // bits, size, dtype=torch.uint8, device=rows.device)
    for plane in range(8 // bits):
        places[:, plane] = (values >> bits * plane) & ((1 << bits) - 1)
    grouped = places.view(len(rows), groups, GROUP).float()
    weights = torch.addcmul(zeros[..., None], grouped, scales[..., None])
    return weights.view(len(rows), 3, hidden)


def plain(memory: Any, hidden: int, room: int) -> tuple[Any, Any, Any]:
    """Return gate, up and down of the layout of matrices, as views, with room for so many neurons.

    They are (room, hidden), (room, hidden) and (hidden, room).
    """
    import torch

    size = room * hidden
    flat = memory[: 6 * size].view(torch.bfloat16)
    gate, up, down = (flat[i * size : (i + 1) * size] for i in range(3))
    return gate.view(room, hidden), up.view(room, hidden), down.view(hidden, room)


def matrices(
    memory: Any, shape: Shape, bits: int, room: int, first: int, last: int
) -> tuple[Any, ...]:
    """Return gate_up (2 neurons, hidden) and down (hidden, neurons), or gate, up and down.

    Of the neurons from `first` to before `last` in memory that has `room` for so many. Two where
    gate and up lie, or are restored, one behind the other. Views, except of packed weights.
    """
    import torch

    hidden = shape.hidden
    if bits < 16:
        size_bytes, count = neuron_bytes(shape, bits), last - first
        rows = memory[first * size_bytes : last * size_bytes].view(count, size_bytes)
        made = torch.empty(3, count, hidden, dtype=torch.bfloat16, device=memory.device)
        each = block_neurons(shape, rows)
        for block, target in zip(rows.split(each), made.split(each, dim=1), strict=True):
            target.transpose(0, 1).copy_(restored(block, hidden, bits))
        return made[:2].view(2 * count, hidden), made[2].t()
    if shape.by_neuron:
        wanted = memory[first * 6 * hidden : last * 6 * hidden]
        rows = wanted.view(torch.bfloat16).view(last - first, 3, hidden)
        return rows[:, 0], rows[:, 1], rows[:, 2].t()
    gate, up, down = plain(memory, hidden, room)
    if last - first == room:
        return memory[: 4 * room * hidden].view(torch.bfloat16).view(2 * room, hidden), down
    return gate[first:last], up[first:last], down[:, first:last]


def computed(
    rows: Any, weights: Sequence[Any], activation: Activation | None = None,
    part: slice = slice(None), begins: bool = True,
) -> Any:  # fmt: skip
    """Return (tokens, hidden): the FFN with weights as `matrices` returns them.

    They are taken to the precision of the rows, if that is another. `part` are their neurons among
    all, of which biases are; `begins` says that it is the part that starts at 0.
    """
    import torch

    weights = [weight.to(rows.dtype) for weight in weights]
    if len(weights) == 2 and activation is None:
        return operations.expert(rows, *weights)
    *inputs, down = weights
    products = [operations.linear(rows, weight) for weight in inputs]
    gate, up = products if len(products) == 2 else products[0].chunk(2, dim=-1)
    if activation is None:
        return operations.linear(torch.nn.functional.silu(gate) * up, down)
    if activation.gate_bias is not None:
        gate, up = gate + activation.gate_bias[part], up + activation.up_bias[part]
    result = operations.linear(activation.between(gate, up), down)
    return result + activation.down_bias if begins and activation.down_bias is not None else result


def expert_whole(
    rows: Any, image: Any, shape: Shape, bits: int, activation: Activation | None = None
) -> Any:
    """Return (tokens, hidden): an expert computed from its image; `rows` are where that is."""
    whole = matrices(image, shape, bits, shape.width, 0, shape.width)
    return computed(rows, whole, activation)


def expert_piece(
    rows: Any, slot: Slot, shape: Shape, wanted: Held, activation: Activation | None = None
) -> Any:
    """Return (tokens, hidden): what the wanted part of an expert, which a slot holds, adds.

    Parts sum to the expert. One without a neuron adds zeros.

    Raises AuditError if the slot does not hold that.
    """
    held = check_held(slot, wanted)
    offset, _ = neurons(shape.width, held.start, 0)
    first, last = neurons(shape.width, wanted.start, wanted.part)
    room = slot_neurons(shape, wanted.bits, slot.size_bytes)
    part = matrices(slot.memory, shape, wanted.bits, room, first - offset, last - offset)
    return computed(rows, part, activation, slice(first, last), wanted.start == 0)


def check_held(slot: Slot, wanted: Held) -> Held:
    """Return what a slot holds; raise AuditError if what is wanted is not in it."""
    held = slot.held
    if (
        held is None
        or held[:3] != wanted[:3]
        or wanted.start < held.start
        or wanted.start + wanted.part > held.start + held.part
    ):
        raise AuditError(
            f"slot {slot.number} is to be read for {described(wanted)}, and holds "
            + ("nothing" if held is None else described(held))
        )
    return held


def described(held: Held) -> str:
    """Return it in words."""
    return (
        f"{held.part}/{WHOLE} from {held.start} of expert {held.expert} of layer {held.layer} at "
        f"{held.bits} bits"
    )


def begin_copy(
    image: Any, slot: Slot, shape: Shape, wanted: Held, chunk_bytes: int = 0
) -> list[list[Pair]]:
    """Return the copies that bring a part of an expert into a slot, in chunks, in order.

    To be called when the copy begins. The slot then holds nothing, until `end_copy`; unless it
    holds just what comes before, and has room: then the part is put behind that, which may still be
    read. Chunks have about `chunk_bytes`, all in one if that is 0; there is none without a neuron.
    Views are contiguous but for columns of down, in parts of 16 bits that are not by neuron.

    Raises AuditError for a part that does not fit the slot.
    """
    first, last = neurons(shape.width, wanted.start, wanted.part)
    room = slot_neurons(shape, wanted.bits, slot.size_bytes)
    at = 0
    if continues(slot.held, wanted, shape, room):
        assert slot.held is not None
        at = first - neurons(shape.width, slot.held.start, 0)[0]
    elif last - first > room:
        raise AuditError(
            f"slot {slot.number} has room for {room} neurons, not for the {last - first} of "
            + described(wanted)
        )
    else:
        slot.held = None
    pairs = neuron_pairs(
        slot.memory, room, at, image, shape.width, first, last - first, shape, wanted.bits
    )
    return chunked(pairs, chunk_bytes)


def continues(held: Held | None, wanted: Held, shape: Shape, room: int) -> bool:
    """Say whether a part goes on where what is held ends, and fits behind it."""
    if held is None or held[:3] != wanted[:3] or held.start + held.part != wanted.start:
        return False
    first, last = neurons(shape.width, held.start, held.part + wanted.part)
    return last - first <= room


def end_copy(slot: Slot, shape: Shape, wanted: Held) -> None:
    """Note that what `begin_copy` began is there, or on its way before whatever reads it."""
    room = slot_neurons(shape, wanted.bits, slot.size_bytes)
    held = slot.held
    if held is not None and continues(held, wanted, shape, room):
        slot.held = held._replace(part=held.part + wanted.part)
    else:
        slot.held = wanted


def copy_in(
    copy: Callable[[Any, Any], None], image: Any, slot: Slot, shape: Shape, wanted: Held
) -> None:
    """Bring a part of an expert into a slot by calling `copy(target, source)`, all at once."""
    for chunk in begin_copy(image, slot, shape, wanted):
        for target, source in chunk:
            copy(target, source)
    end_copy(slot, shape, wanted)


def move(target: Slot, source: Slot, shape: Shape, wanted: Held) -> None:
    """Copy a part of an expert from one slot to another; to be done on the device's own lane.

    Raises AuditError if the source does not hold it, or the target has no room for it.
    """
    held = check_held(source, wanted)
    first, last = neurons(shape.width, wanted.start, wanted.part)
    room = slot_neurons(shape, wanted.bits, target.size_bytes)
    if last - first > room:
        raise AuditError(
            f"slot {target.number} has room for {room} neurons, not for the {last - first} of "
            + described(wanted)
        )
    target.held = None
    for new, old in neuron_pairs(
        target.memory, room, 0,
        source.memory, slot_neurons(shape, wanted.bits, source.size_bytes),
        first - neurons(shape.width, held.start, 0)[0], last - first, shape, wanted.bits,
    ):  # fmt: skip
        new.copy_(old)
    target.held = wanted


def neuron_pairs(
    target: Any, target_room: int, target_first: int, source: Any, source_room: int,
    source_first: int, count: int, shape: Shape, bits: int,
) -> list[Pair]:  # fmt: skip
    """Return the views to copy for so many neurons, from one memory into another."""
    if count == 0:
        return []
    size_bytes = neuron_bytes(shape, bits)
    ends = ((target, target_first), (source, source_first))
    if is_by_neuron(shape, bits) or count == target_room == source_room:
        new, old = (
            memory[first * size_bytes : (first + count) * size_bytes] for memory, first in ends
        )
        return [(new, old)]
    pairs = []
    for matrix in range(3):
        rows = 2 * shape.hidden
        if matrix == 2:
            new = plain(target, shape.hidden, target_room)[2]
            old = plain(source, shape.hidden, source_room)[2]
            pairs.append(
                (
                    new[:, target_first : target_first + count],
                    old[:, source_first : source_first + count],
                )
            )
            continue
        new_at = (matrix * target_room + target_first) * rows
        old_at = (matrix * source_room + source_first) * rows
        pairs.append(
            (target[new_at : new_at + count * rows], source[old_at : old_at + count * rows])
        )
    return pairs


def chunked(pairs: Sequence[Pair], chunk_bytes: int) -> list[list[Pair]]:
    """Divide copies along their first dimension into chunks of about so many bytes; 0: one chunk.

    A chunk has less only where it is the last or rows do not fit, and more only if one row has.
    """
    if not pairs:
        return []
    if chunk_bytes == 0:
        return [list(pairs)]
    chunks: list[list[Pair]] = [[]]
    left = chunk_bytes
    for target, source in pairs:
        row_bytes = target[0].numel() * target.element_size()
        at = 0
        while at < len(target):
            if left < row_bytes and chunks[-1]:
                chunks.append([])
                left = chunk_bytes
            count = min(len(target) - at, max(1, left // row_bytes))
            chunks[-1].append((target[at : at + count], source[at : at + count]))
            at += count
            left -= count * row_bytes
    return chunks


def random_expert(
    hidden: int, width: int, seed: int, layer: int, expert: int
) -> tuple[Any, Any, Any]:
    """Return gate, up and down in bfloat16, normal, with variance 1 / inputs.

    They are stretches of one pool of random numbers, which is cheap; no two experts have the same.
    """
    # Remainder and quotient tell experts apart; POOL being prime, either may be stretched.
    quotient, remainder = divmod(layer * MOST_EXPERTS + expert, POOL)
    by_hidden, by_width = pool(seed, hidden), pool(seed, width)
    gate = stretch(by_hidden, remainder * 7919, width * hidden)
    up = stretch(by_hidden, remainder * 104_729 + quotient * 1_299_709 + POOL // 3, width * hidden)
    down = stretch(by_width, remainder * 15_485_863 + 2 * POOL // 3, width * hidden)
    return gate.view(width, hidden), up.view(width, hidden), down.view(hidden, width)


@functools.lru_cache(maxsize=4)
def pool(seed: int, inputs: int) -> Any:
    """Return the random numbers of a seed for weights of so many inputs; not to be changed."""
    import torch

    drawn = torch.randn(POOL, generator=torch.Generator().manual_seed(seed))
    return (drawn * inputs**-0.5).to(torch.bfloat16)


def stretch(numbers: Any, first: int, count: int) -> Any:
    """Return so many of the numbers, from the first on, beginning anew at their end."""
    import torch

    first %= len(numbers)
    ends = numbers[first : first + count]
    turns, rest = divmod(count - len(ends), len(numbers))
    return torch.cat([ends, *[numbers] * turns, numbers[:rest]])
