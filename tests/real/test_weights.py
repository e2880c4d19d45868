"""How experts lie in memory: nothing lost in packing, copying, growing, moving or reading."""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch as safetensors_torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moesim.errors import AuditError, InputError
from moesim.model import packed_bytes
from moesim.real import store, weights
from moesim.real.emulated import Emulated, Throttle
from moesim.real.operations import expert as ffn
from moesim.real.store import ALIGNMENT, Experts
from moesim.real.weights import (
    Held,
    Shape,
    Slot,
    begin_copy,
    copy_in,
    end_copy,
    expert_piece,
    expert_whole,
    image_bytes,
    neuron_bytes,
    neurons,
    pack,
    random_expert,
    slot_memory_bytes,
    slot_neurons,
    unpack,
)
from moesim.types import WHOLE, FloatArray

HIDDEN = 64
LAYOUTS = [(16, False), (16, True), (8, False), (4, False), (2, False)]
layouts = pytest.mark.parametrize(("bits", "by_neuron"), LAYOUTS)
parts = st.integers(0, WHOLE)
U = 2.0**-8
"""bfloat16 keeps 8 bits: rounding is off by this share of a number at most."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Let small kernels not wait for each other's threads: with two they took thrice as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def slot_for(shape: Shape, bits: int, size_bytes: int | None = None, number: int = 0) -> Slot:
    """Make a slot full of NaN, for a whole expert unless its size is given."""
    size = image_bytes(shape, bits) if size_bytes is None else size_bytes
    memory = torch.full((slot_memory_bytes(shape, size, [bits]),), 0xFF, dtype=torch.uint8)
    return Slot(number, memory, size)


def part_bytes(shape: Shape, bits: int, start: int, part: int) -> int:
    """Count the bytes of a part as the simulator does."""
    whole = image_bytes(shape, bits)
    return whole * (start + part) // WHOLE - whole * start // WHOLE


def some_rows(tokens: int, hidden: int = HIDDEN) -> Any:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(tokens)).bfloat16()


def marked(shape: Shape, bits: int) -> tuple[Any, Any, Any]:
    """Return an expert whose neuron i adds to output i alone, another amount for each."""
    most = (1 << min(bits, 8)) - 1
    gate, up = torch.zeros(shape.width, shape.hidden), torch.zeros(shape.width, shape.hidden)
    gate[:, 0] = most
    up[:, 0] = 1.0 + torch.arange(shape.width) % most
    down = torch.diag(torch.full((shape.hidden,), float(most)))[:, : shape.width].clone()
    return gate, up, down


def copy(target: Any, source: Any) -> None:
    target.copy_(source)


def cuts(drawn: set[int]) -> list[tuple[int, int]]:
    """Return start and length of the pieces between these cuts."""
    ends = sorted({0, WHOLE} | drawn)
    return [(start, end - start) for start, end in itertools.pairwise(ends)]


class TestSizes:
    @given(width=st.integers(1, 4096), drawn=st.sets(parts, max_size=8))
    def test_pieces_have_every_neuron_once(self, width: int, drawn: set[int]) -> None:
        found: list[int] = []
        for start, part in cuts(drawn):
            found.extend(range(*neurons(width, start, part)))
        assert found == list(range(width))

    @layouts
    @pytest.mark.parametrize("width", [1, 3, 48])
    def test_an_image_has_the_bytes_that_the_simulator_counts(
        self, bits: int, by_neuron: bool, width: int
    ) -> None:
        for hidden in (64, 192, 320):
            image = pack(*random_expert(hidden, width, 0, 0, 0), bits, by_neuron)
            assert image.dtype == torch.uint8
            assert image.shape == (packed_bytes(3 * hidden * width, bits),)
            assert len(image) == image_bytes(Shape(hidden, width, by_neuron), bits)

    def test_rows_that_are_no_groups_are_refused_below_16_bits(self) -> None:
        made = random_expert(96, 4, 0, 0, 0)
        assert len(pack(*made, 16)) == 6 * 96 * 4
        with pytest.raises(InputError, match=r"8 bits.*groups of 64.*hidden=96"):
            pack(*made, 8)

    @given(
        layout=st.sampled_from(LAYOUTS),
        hidden=st.sampled_from([64, 128, 2048]),
        width=st.integers(1, 3000),
        start=parts,
        end=parts,
    )
    def test_a_part_always_fits_a_slot_of_its_bytes(
        self, layout: tuple[int, bool], hidden: int, width: int, start: int, end: int
    ) -> None:
        bits, by_neuron = layout
        shape = Shape(hidden, width, by_neuron)
        start, end = min(start, end), max(start, end)
        first, last = neurons(width, start, end - start)
        size_bytes = part_bytes(shape, bits, start, end - start)
        room = slot_neurons(shape, bits, size_bytes)
        assert last - first <= room <= width
        assert slot_memory_bytes(shape, size_bytes, [bits]) == room * neuron_bytes(shape, bits)
        assert room * neuron_bytes(shape, bits) < size_bytes + neuron_bytes(shape, bits)

    def test_a_slot_has_memory_for_the_largest_of_its_precisions(self) -> None:
        shape = Shape(64, 8)
        size_bytes = image_bytes(shape, 4)
        needed = {bits: slot_memory_bytes(shape, size_bytes, [bits]) for bits in (16, 4)}
        assert slot_memory_bytes(shape, size_bytes, [4, 16]) == max(needed.values())


class TestPacking:
    @pytest.mark.parametrize("by_neuron", [False, True])
    def test_16_bits_are_as_they_were(self, by_neuron: bool) -> None:
        made = random_expert(80, 12, 3, 0, 0)
        found = unpack(pack(*made, 16, by_neuron), Shape(80, 12, by_neuron), 16)
        for matrix, same in zip(made, found, strict=True):
            assert torch.equal(matrix, same)

    def test_matrices_lie_one_behind_the_other(self) -> None:
        made = random_expert(HIDDEN, 12, 3, 0, 0)
        flat = pack(*made, 16).view(torch.bfloat16)
        assert torch.equal(flat, torch.cat([matrix.reshape(-1) for matrix in made]))

    def test_neurons_lie_one_behind_the_other(self) -> None:
        gate, up, down = random_expert(HIDDEN, 12, 3, 0, 0)
        rows = pack(gate, up, down, 16, by_neuron=True).view(torch.bfloat16).view(12, 3, HIDDEN)
        for neuron in range(12):
            wanted = (gate[neuron], up[neuron], down[:, neuron])
            assert torch.equal(rows[neuron], torch.stack(wanted))

    @given(
        bits=st.sampled_from([8, 4, 2]),
        log_scale=st.floats(-7, 3),
        shift=st.floats(-4, 4),
        seed=st.integers(0, 99),
    )
    def test_a_weight_is_half_a_step_off_at_most(
        self, bits: int, log_scale: float, shift: float, seed: int
    ) -> None:
        """The step is a share of the range of its 64 weights, rounded up to 16 bits (11 of them).

        The zero point, rounded too, may lie above the least weight, which is then as far off; and
        what is computed with is bfloat16.
        """
        drawn = torch.randn(5, 3, HIDDEN, generator=torch.Generator().manual_seed(seed)) + shift
        rows = drawn * 10**log_scale
        gate, up, down = rows[:, 0], rows[:, 1], rows[:, 2].t()
        image = pack(gate, up, down, bits)
        found = torch.stack([m if i < 2 else m.t() for i, m in enumerate(
            unpack(image, Shape(HIDDEN, 5), bits))], dim=1)  # fmt: skip
        truth = rows.double().numpy()
        low, high = truth.min(-1, keepdims=True), truth.max(-1, keepdims=True)
        zero_off = 2.0**-11 * np.abs(low) + 2.0**-25
        step = (high - low + zero_off) / ((1 << bits) - 1) * (1 + 2.0**-10) + 2.0**-24
        off = np.abs(found.double().numpy() - truth)
        legal = np.maximum(step / 2 * (1 + 1e-5), zero_off)
        assert (off <= legal + U * (np.abs(truth) + legal)).all()

    @pytest.mark.parametrize("bits", [8, 4, 2])
    def test_what_steps_reach_is_exact(self, bits: int) -> None:
        levels = (1 << bits) - 1
        matrix = (torch.arange(3 * HIDDEN) % (levels + 1)).view(3, HIDDEN) * 0.25 - 8
        matrix[:, 0], matrix[:, 1] = -8, levels * 0.25 - 8
        found = unpack(pack(matrix, -matrix, matrix.t(), bits), Shape(HIDDEN, 3), bits)
        for wanted, got in zip((matrix, -matrix, matrix.t()), found, strict=True):
            assert torch.equal(wanted, got.float())

    @pytest.mark.parametrize("value", [0.0, 1.0, -0.375, 3e-8])
    def test_weights_that_are_all_the_same(self, value: float) -> None:
        same = torch.full((2, HIDDEN), value)
        for found in unpack(pack(same, same, same.t(), 4), Shape(HIDDEN, 2), 4):
            assert found.float().sub(value).abs().max() <= 2.0**-25

    @pytest.mark.parametrize("value", [1e6, math.inf, math.nan])
    def test_weights_beyond_16_bits_are_refused(self, value: float) -> None:
        made = torch.zeros(2, HIDDEN)
        made[0, 0] = value
        with pytest.raises(InputError, match="cannot be packed to 4 bits"):
            pack(made, made, made.t(), 4)

    @pytest.mark.parametrize("bits", [8, 4, 2])
    def test_large_experts_are_packed_and_restored_in_blocks(
        self, bits: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made, shape = random_expert(HIDDEN, 37, 0, 0, 0), Shape(HIDDEN, 37)
        at_once = pack(*made, bits)
        restored = unpack(at_once, shape, bits)
        monkeypatch.setattr(weights, "CACHED_WEIGHTS", 8 * 3 * HIDDEN)
        assert torch.equal(pack(*made, bits), at_once)
        for matrix, same in zip(restored, unpack(at_once, shape, bits), strict=True):
            assert torch.equal(matrix, same)


class TestComputing:
    @layouts
    @pytest.mark.parametrize("tokens", [1, 5])
    def test_an_image_computes_what_its_matrices_do(
        self, bits: int, by_neuron: bool, tokens: int
    ) -> None:
        shape = Shape(HIDDEN, 24, by_neuron)
        image = pack(*random_expert(HIDDEN, 24, 0, 0, 0), bits, by_neuron)
        found = expert_whole(some_rows(tokens), image, shape, bits)
        gate, up, down = unpack(image, shape, bits)
        assert found.shape == (tokens, HIDDEN)
        assert found.dtype == torch.bfloat16
        truth, off = exact(some_rows(tokens), gate, up, down)
        assert (np.abs(found.double().numpy() - truth) <= off + U * np.abs(truth)).all()
        if len(weights.matrices(image, shape, bits, 24, 0, 24)) == 2:
            assert torch.equal(found, ffn(some_rows(tokens), torch.cat([gate, up]), down))

    @layouts
    @pytest.mark.parametrize("tokens", [1, 5])
    def test_one_piece_is_the_whole(self, bits: int, by_neuron: bool, tokens: int) -> None:
        shape = Shape(HIDDEN, 24, by_neuron)
        image = pack(*random_expert(HIDDEN, 24, 0, 0, 0), bits, by_neuron)
        slot = slot_for(shape, bits)
        copy_in(copy, image, slot, shape, Held(0, 0, bits))
        found = expert_piece(some_rows(tokens), slot, shape, Held(0, 0, bits))
        assert torch.equal(found, expert_whole(some_rows(tokens), image, shape, bits))

    @given(
        layout=st.sampled_from(LAYOUTS),
        width=st.integers(1, 40),
        tokens=st.integers(1, 6),
        drawn=st.sets(parts, max_size=4),
    )
    @settings(max_examples=60)
    def test_pieces_sum_to_the_whole(
        self, layout: tuple[int, bool], width: int, tokens: int, drawn: set[int]
    ) -> None:
        """See `exact` for how far off each sum may be; every piece is rounded once more."""
        bits, by_neuron = layout
        shape = Shape(HIDDEN, width, by_neuron)
        image = pack(*random_expert(HIDDEN, width, 0, 0, 0), bits, by_neuron)
        slot = slot_for(shape, bits)
        copy_in(copy, image, slot, shape, Held(0, 0, bits))
        truth, off = exact(some_rows(tokens), *unpack(image, shape, bits))
        total = np.zeros_like(truth)
        for start, part in cuts(drawn):
            piece = expert_piece(some_rows(tokens), slot, shape, Held(0, 0, bits, start, part))
            total += piece.double().numpy()
            off += U * np.abs(piece.double().numpy())
        assert (np.abs(total - truth) <= off).all()

    @given(
        layout=st.sampled_from(LAYOUTS),
        width=st.integers(1, HIDDEN),
        drawn=st.sets(parts, max_size=4),
    )
    @settings(max_examples=60)
    def test_every_neuron_is_in_one_piece(
        self, layout: tuple[int, bool], width: int, drawn: set[int]
    ) -> None:
        """Each adds to an output of its own, so that sums are exact."""
        bits, by_neuron = layout
        shape = Shape(HIDDEN, width, by_neuron)
        image = pack(*marked(shape, bits), bits, by_neuron)
        rows = torch.zeros(2, HIDDEN, dtype=torch.bfloat16)
        rows[:, 0] = torch.tensor([16.0, 32.0])
        whole = expert_whole(rows, image, shape, bits)
        assert (whole[:, :width] > 0).all()
        total = torch.zeros(2, HIDDEN, dtype=torch.bfloat16)
        for start, part in cuts(drawn):
            slot = slot_for(shape, bits, part_bytes(shape, bits, start, part))
            wanted = Held(1, 2, bits, start, part)
            copy_in(copy, image, slot, shape, wanted)
            total += expert_piece(rows, slot, shape, wanted)
        assert torch.equal(total, whole)


def exact(rows: Any, gate: Any, up: Any, down: Any) -> tuple[FloatArray, FloatArray]:
    """Return what an expert adds, in float64, and how far off it may be before its last rounding.

    bfloat16 rounds gate g, silu(g), up u and their product. silu' is below 1.1 everywhere, so that
    a product is off by U |u| (1.1 |g| + 3 |silu(g)|) at most, and the result by the sum of |down|
    times that; a tenth more is for squares of U and for sums in float32.
    """
    x, g, u, d = (tensor.double().numpy() for tensor in (rows, gate, up, down))
    gates, ups = x @ g.T, x @ u.T
    silus = gates / (1 + np.exp(-gates))
    off = U * np.abs(ups) * (1.1 * np.abs(gates) + 3 * np.abs(silus))
    return (silus * ups) @ d.T, 1.1 * off @ np.abs(d).T + 1e-30


def check_part(slot: Slot, image: Any, shape: Shape, wanted: Held, tokens: int = 3) -> None:
    """Compare what a slot makes of a part with what the same neurons alone would add."""
    rows = some_rows(tokens)
    found = expert_piece(rows, slot, shape, wanted).double().numpy()
    gate, up, down = unpack(image, shape, wanted.bits)
    mine = slice(*neurons(shape.width, wanted.start, wanted.part))
    truth, off = exact(rows, gate[mine], up[mine], down[:, mine])
    assert (np.abs(found - truth) <= off + U * np.abs(truth)).all()


class TestCopying:
    @layouts
    def test_a_whole_expert_is_one_stretch_of_bytes(self, bits: int, by_neuron: bool) -> None:
        shape = Shape(HIDDEN, 24, by_neuron)
        image = pack(*random_expert(HIDDEN, 24, 0, 0, 0), bits, by_neuron)
        slot = slot_for(shape, bits)
        ((pair,),) = begin_copy(image, slot, shape, Held(0, 0, bits))
        assert [len(side) for side in pair] == [len(image)] * 2
        copy(*pair)
        assert torch.equal(slot.memory, image)

    @given(
        layout=st.sampled_from(LAYOUTS),
        width=st.integers(1, 40),
        start=parts,
        end=parts,
        chunk_bytes=st.sampled_from([0, 1, 100, 1000, 5000, 1 << 20]),
        whole_slot=st.booleans(),
    )
    @example((16, False), 33, 0, 512, 1000, True)  # rows of down that a chunk has no room for
    @settings(max_examples=60)
    def test_chunks_have_every_byte_once_and_in_order(
        self, layout: tuple[int, bool], width: int, start: int, end: int, chunk_bytes: int,
        whole_slot: bool,
    ) -> None:  # fmt: skip
        bits, by_neuron = layout
        shape = Shape(HIDDEN, width, by_neuron)
        start, part = min(start, end), abs(end - start)
        image = pack(*random_expert(HIDDEN, width, 0, 0, 0), bits, by_neuron)
        size_bytes = None if whole_slot else part_bytes(shape, bits, start, part)
        wanted = Held(0, 0, bits, start, part)
        slot = slot_for(shape, bits, size_bytes)
        at_once = begin_copy(image, slot, shape, wanted)
        chunks = begin_copy(image, slot, shape, wanted, chunk_bytes)
        first, last = neurons(width, start, part)
        part_size = (last - first) * neuron_bytes(shape, bits)
        for side in (0, 1):
            found = addresses(chunks, side)
            assert found == addresses(at_once, side)
            assert len(found) == len(set(found)) == part_size
            memory = (slot.memory, image)[side]
            assert all(0 <= at - memory.data_ptr() < len(memory) for at in found)
        sizes = [sum(source.nbytes for _, source in chunk) for chunk in chunks]
        longest_row = max((source[0].nbytes for c in chunks for _, source in c), default=0)
        assert all(0 < size <= max(chunk_bytes, longest_row) or not chunk_bytes for size in sizes)
        assert all(size > chunk_bytes - longest_row for size in sizes[:-1])
        assert len(chunks) == (0 if part_size == 0 else 1) or chunk_bytes

    @given(
        layout=st.sampled_from(LAYOUTS), width=st.integers(1, 40), start=parts, end=parts,
        tokens=st.integers(1, 3), whole_slot=st.booleans(),
    )  # fmt: skip
    @settings(max_examples=60)
    def test_a_part_is_computed_without_what_lies_around_it(
        self, layout: tuple[int, bool], width: int, start: int, end: int, tokens: int,
        whole_slot: bool,
    ) -> None:  # fmt: skip
        """The slot was full of NaN."""
        bits, by_neuron = layout
        shape = Shape(HIDDEN, width, by_neuron)
        start, part = min(start, end), abs(end - start)
        image = pack(*random_expert(HIDDEN, width, 0, 0, 0), bits, by_neuron)
        slot = slot_for(shape, bits, None if whole_slot else part_bytes(shape, bits, start, part))
        wanted = Held(0, 0, bits, start, part)
        for chunk in begin_copy(image, slot, shape, wanted, 777):
            for target, source in chunk:
                copy(target, source)
        end_copy(slot, shape, wanted)
        check_part(slot, image, shape, wanted, tokens)

    @layouts
    def test_a_part_grows_where_it_is(self, bits: int, by_neuron: bool) -> None:
        shape = Shape(HIDDEN, 24, by_neuron)
        image = pack(*random_expert(HIDDEN, 24, 0, 0, 0), bits, by_neuron)
        slot = slot_for(shape, bits)
        for start, part in cuts({100, 101, 410, 900}):
            before, wanted = slot.held, Held(0, 5, bits, start, part)
            chunks = begin_copy(image, slot, shape, wanted)
            assert slot.held == before
            if before is not None:  # what is there may be read meanwhile, and no more than that
                check_part(slot, image, shape, before)
                with pytest.raises(AuditError):
                    expert_piece(some_rows(1), slot, shape, Held(0, 5, bits, 0, start + part))
            for chunk in chunks:
                for target, source in chunk:
                    copy(target, source)
            end_copy(slot, shape, wanted)
            check_part(slot, image, shape, Held(0, 5, bits, 0, start + part))
        assert slot.held == Held(0, 5, bits)
        assert torch.equal(slot.memory, image)

    @layouts
    def test_a_rest_lies_at_the_beginning_of_its_slot(self, bits: int, by_neuron: bool) -> None:
        shape = Shape(HIDDEN, 24, by_neuron)
        image = pack(*random_expert(HIDDEN, 24, 0, 0, 0), bits, by_neuron)
        slot = slot_for(shape, bits, part_bytes(shape, bits, 410, 614))
        copy_in(copy, image, slot, shape, Held(0, 0, bits, 410, 614))
        assert slot.held == Held(0, 0, bits, 410, 614)
        assert not slot.memory[: neuron_bytes(shape, bits)].eq(0xFF).all()
        for start, part in ((410, 614), (410, 100), (700, 324)):
            check_part(slot, image, shape, Held(0, 0, bits, start, part))

    @layouts
    def test_a_rest_grows_where_it_is(self, bits: int, by_neuron: bool) -> None:
        shape = Shape(HIDDEN, 24, by_neuron)
        image = pack(*random_expert(HIDDEN, 24, 0, 0, 0), bits, by_neuron)
        slot = slot_for(shape, bits)
        copy_in(copy, image, slot, shape, Held(0, 0, bits, 410, 200))
        copy_in(copy, image, slot, shape, Held(0, 0, bits, 610, 414))
        assert slot.held == Held(0, 0, bits, 410, 614)
        for start, part in ((410, 614), (610, 414), (500, 300)):
            check_part(slot, image, shape, Held(0, 0, bits, start, part))

    def test_a_part_does_not_go_on_in_another_precision(self) -> None:
        shape = Shape(HIDDEN, 24)
        slot = slot_for(shape, 16)
        for bits, start in ((8, 0), (4, 512)):
            image = pack(*random_expert(HIDDEN, 24, 0, 0, 0), bits)
            wanted = Held(0, 0, bits, start, 512)
            copy_in(copy, image, slot, shape, wanted)
            assert slot.held == wanted
            check_part(slot, image, shape, wanted)

    @layouts
    def test_what_does_not_go_on_begins_anew(self, bits: int, by_neuron: bool) -> None:
        """The same expert from the start, another one, and a rest without room behind the top."""
        shape = Shape(HIDDEN, 24, by_neuron)
        image = pack(*random_expert(HIDDEN, 24, 0, 0, 0), bits, by_neuron)
        half = part_bytes(shape, bits, 0, 512)
        top = Held(0, 0, bits, 0, 512)
        for wanted in (top, Held(0, 1, bits, 512, 512), Held(0, 0, bits, 512, 512)):
            slot = slot_for(shape, bits, half)
            copy_in(copy, image, slot, shape, top)
            chunks = begin_copy(image, slot, shape, wanted)
            assert slot.held is None
            assert min(addresses(chunks, 0)) == slot.memory.data_ptr()
            with pytest.raises(AuditError, match="holds nothing"):
                expert_piece(some_rows(1), slot, shape, top)

    def test_what_has_no_room_is_refused(self) -> None:
        shape = Shape(HIDDEN, 24)
        image = pack(*random_expert(HIDDEN, 24, 0, 0, 0), 16)
        slot = slot_for(shape, 16, part_bytes(shape, 16, 0, 300))
        with pytest.raises(AuditError, match=r"slot 0 has room for 8 neurons, not for the 24 of"):
            begin_copy(image, slot, shape, Held(3, 4, 16))

    @pytest.mark.parametrize(
        "wanted",
        [
            Held(1, 3, 16, 100, 300), Held(2, 2, 16, 100, 300), Held(1, 2, 8, 100, 300),
            Held(1, 2, 16, 99, 300), Held(1, 2, 16, 101, 300), Held(1, 2, 16),
        ],
    )  # fmt: skip
    def test_reading_what_is_not_there_is_an_error(self, wanted: Held) -> None:
        shape = Shape(HIDDEN, 24)
        image = pack(*random_expert(HIDDEN, 24, 0, 0, 0), 16)
        slot = slot_for(shape, 16, number=7)
        with pytest.raises(AuditError, match=r"slot 7 is to be read for .*, and holds nothing"):
            expert_piece(some_rows(1), slot, shape, wanted)
        copy_in(copy, image, slot, shape, Held(1, 2, 16, 100, 300))
        with pytest.raises(
            AuditError, match="holds 300/1024 from 100 of expert 2 of layer 1 at 16"
        ):
            expert_piece(some_rows(1), slot, shape, wanted)
        with pytest.raises(AuditError):
            weights.move(slot_for(shape, 16), slot, shape, wanted)

    @given(
        layout=st.sampled_from(LAYOUTS),
        width=st.integers(1, 40),
        part=st.integers(1, WHOLE),
        small=st.booleans(),
    )
    @settings(max_examples=60)
    def test_moving_to_another_slot(
        self, layout: tuple[int, bool], width: int, part: int, small: bool
    ) -> None:
        bits, by_neuron = layout
        shape = Shape(HIDDEN, width, by_neuron)
        image = pack(*random_expert(HIDDEN, width, 0, 0, 0), bits, by_neuron)
        source = slot_for(shape, bits)
        copy_in(copy, image, source, shape, Held(4, 5, bits))
        target = slot_for(shape, bits, part_bytes(shape, bits, 0, part) if small else None)
        wanted = Held(4, 5, bits, 0, part)
        weights.move(target, source, shape, wanted)
        assert (target.held, source.held) == (wanted, Held(4, 5, bits))
        check_part(target, image, shape, wanted)

    @layouts
    def test_moving_from_the_middle(self, bits: int, by_neuron: bool) -> None:
        shape = Shape(HIDDEN, 24, by_neuron)
        image = pack(*random_expert(HIDDEN, 24, 0, 0, 0), bits, by_neuron)
        source, target = slot_for(shape, bits), slot_for(shape, bits)
        copy_in(copy, image, source, shape, Held(4, 5, bits, 300, 700))
        weights.move(target, source, shape, Held(4, 5, bits, 500, 400))
        check_part(target, image, shape, Held(4, 5, bits, 500, 400))

    def test_moving_what_has_no_room_is_refused(self) -> None:
        shape = Shape(HIDDEN, 24)
        image = pack(*random_expert(HIDDEN, 24, 0, 0, 0), 16)
        source, target = slot_for(shape, 16), slot_for(shape, 16, 1000, number=1)
        copy_in(copy, image, source, shape, Held(0, 0, 16))
        with pytest.raises(AuditError, match="slot 1 has room for 3 neurons, not for the 24 of"):
            weights.move(target, source, shape, Held(0, 0, 16))

    def test_one_slot_serves_all_precisions(self) -> None:
        shape = Shape(HIDDEN, 24)
        precisions = (16, 8, 4, 2)
        size_bytes = image_bytes(shape, 16)
        memory = torch.full(
            (slot_memory_bytes(shape, size_bytes, precisions),), 0xFF, dtype=torch.uint8
        )
        slot = Slot(0, memory, size_bytes)
        for bits in precisions:
            image = pack(*random_expert(HIDDEN, 24, 0, 0, 0), bits)
            copy_in(copy, image, slot, shape, Held(0, 0, bits))
            assert slot.held == Held(0, 0, bits)
            found = expert_piece(some_rows(2), slot, shape, Held(0, 0, bits))
            assert torch.equal(found, expert_whole(some_rows(2), image, shape, bits))

    def test_a_slot_says_what_it_holds(self) -> None:
        slot = slot_for(Shape(HIDDEN, 24), 16, 1000)
        assert repr(slot) == "slot 0 of 1000 bytes with None"


def addresses(chunks: list[list[tuple[Any, Any]]], side: int) -> list[int]:
    """Return where every byte of one side of copies lies, in their order."""
    found: list[int] = []
    for chunk in chunks:
        for pair in chunk:
            view = pair[side]
            places = np.zeros((), np.int64)
            for length, stride in zip(view.shape, view.stride(), strict=True):
                places = np.add.outer(places, np.arange(length) * stride * view.element_size())
            places = np.add.outer(places, np.arange(view.element_size()))
            found.extend((places.ravel() + view.data_ptr()).tolist())
    return found


class TestRandomExperts:
    def test_the_same_every_time_and_of_the_right_size(self) -> None:
        gate, up, down = random_expert(256, 96, 1, 2, 3)
        assert (gate.shape, up.shape, down.shape) == ((96, 256), (96, 256), (256, 96))
        for matrix, inputs in ((gate, 256), (up, 256), (down, 96)):
            assert matrix.dtype == torch.bfloat16
            assert matrix.is_contiguous()
            # 24,576 numbers: a standard error of 0.5 % of their spread
            assert matrix.float().std().item() == pytest.approx(inputs**-0.5, rel=0.03)
            assert abs(matrix.float().mean().item()) < 0.03 * inputs**-0.5
        for matrix, again in zip((gate, up, down), random_expert(256, 96, 1, 2, 3), strict=True):
            assert torch.equal(matrix, again)
        assert not torch.equal(gate, random_expert(256, 96, 2, 2, 3)[0])

    def test_no_two_are_equal(self) -> None:
        seen = {
            torch.cat([m.reshape(-1) for m in random_expert(16, 8, 0, layer, expert)])
            .view(torch.uint8)
            .numpy()
            .tobytes()
            for layer in (0, 1, 15, 16, 17, 61)
            for expert in range(100)
        }
        assert len(seen) == 600

    @given(one=st.tuples(st.integers(0, 1023), st.integers(0, 65535)), other=st.tuples(
        st.integers(0, 1023), st.integers(0, 65535)))  # fmt: skip
    def test_no_two_read_the_same_stretches(
        self, one: tuple[int, int], other: tuple[int, int]
    ) -> None:
        """Were the pool the numbers 0, 1, 2 and so on, a matrix would begin with its place."""
        assert (begins(*one) == begins(*other)) == (one == other)

    def test_the_pool_is_a_prime(self) -> None:
        """Else steps would come back before all of it was used."""
        assert all(weights.POOL % divisor for divisor in range(2, math.isqrt(weights.POOL) + 1))

    @given(size=st.integers(1, 9), first=st.integers(0, 30), count=st.integers(0, 40))
    def test_a_stretch_begins_anew_at_the_end(self, size: int, first: int, count: int) -> None:
        found = weights.stretch(torch.arange(size), first, count)
        assert found.tolist() == [(first + i) % size for i in range(count)]


def begins(layer: int, expert: int) -> tuple[int, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "pool", lambda seed, inputs: None)
        patch.setattr(
            weights, "stretch", lambda numbers, first, count: torch.tensor([first % weights.POOL])
        )
        return tuple(int(matrix.item()) for matrix in random_expert(1, 1, 0, layer, expert))


SHAPE = Shape(HIDDEN, 8)


def source(layer: int, expert: int) -> tuple[Any, Any, Any]:
    gate, up, down = random_expert(SHAPE.hidden, SHAPE.width, 5, layer, expert)
    return gate, up, down


@pytest.fixture
def device() -> Iterator[Emulated]:
    made = Emulated(1 << 20, Throttle(0, 1e12))
    yield made
    made.close()


@pytest.fixture
def on_disk() -> Any:
    """Name experts 1 of layer 0, and 0 and 2 of layer 1."""
    named = np.zeros((2, 3), np.int64)
    named[0, 1] = named[1, 0] = named[1, 2] = 1
    return named


class TestExperts:
    def test_every_image_is_its_own(self, device: Emulated) -> None:
        store = Experts(device, SHAPE, 2, 3, source)
        for layer, expert in itertools.product(range(2), range(3)):
            image = store.image(layer, expert, 16)
            assert image.data_ptr() % ALIGNMENT == 0
            assert torch.equal(image, pack(*source(layer, expert), 16))
        store.close()

    def test_it_is_pinned_in_blocks(
        self, device: Emulated, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of at most a stated size, if one expert is no more than that."""
        asked: list[int] = []
        host: Callable[..., Any] = device.host

        def counted(*shape: int, dtype: Any, pinned: bool = True) -> Any:
            assert pinned
            asked.append(*shape)
            return host(*shape, dtype=dtype)

        monkeypatch.setattr(device, "host", counted)
        size_bytes = image_bytes(SHAPE, 16)
        for limit, blocks in ((1 << 30, [6]), (4 * size_bytes, [4, 2]), (1, [1] * 6)):
            asked.clear()
            monkeypatch.setattr(store, "BLOCK_BYTES", limit)
            Experts(device, SHAPE, 2, 3, source).close()
            assert asked == [count * size_bytes for count in blocks]

    def test_images_of_odd_sizes_are_aligned(self, device: Emulated) -> None:
        made = store.blocks(device, 3, 300)
        assert [image.data_ptr() - made[0].data_ptr() for image in made] == [0, 320, 640]
        assert {len(image) for image in made} == {300}

    def test_precisions_are_made_from_the_weights_when_first_asked_for(
        self, device: Emulated
    ) -> None:
        made: list[tuple[int, int]] = []

        def noted(layer: int, expert: int) -> tuple[Any, Any, Any]:
            made.append((layer, expert))
            return source(layer, expert)

        store = Experts(device, SHAPE, 2, 3, noted, 8)
        with pytest.raises(InputError, match=r"expert 2 of layer 1 at 4 bits;.*at: 8 bits"):
            store.image(1, 2, 4)
        store.prepare([8, 4])
        store.prepare([4])
        assert len(made) == 12
        assert torch.equal(store.image(1, 2, 4), pack(*source(1, 2), 4))
        assert torch.equal(store.image(1, 2, 8), pack(*source(1, 2), 8))
        with pytest.raises(InputError, match="expert 3 of layer 1 at 4 bits; there are 3 in each"):
            store.image(1, 3, 4)
        store.close()

    def test_experts_on_disk_are_read_before_use(
        self, device: Emulated, on_disk: Any, tmp_path: Path
    ) -> None:
        store = Experts(device, SHAPE, 2, 3, source, 4, on_disk=on_disk, folder=tmp_path)
        assert torch.equal(store.image(0, 0, 4), pack(*source(0, 0), 4))
        with pytest.raises(AuditError, match="expert 2 of layer 1 is on disk, and was not read"):
            store.image(1, 2, 4)
        buffer = store.reserve(1, 2)
        image = store.image(1, 2, 4)
        device.lanes["disk"].submit(lambda: store.read_from_disk(1, 2, buffer)).wait()
        assert torch.equal(image, pack(*source(1, 2), 4))
        store.prepare([2])
        assert torch.equal(store.image(1, 2, 2), pack(*source(1, 2), 2))
        store.close()
        assert list(tmp_path.iterdir()) == []

    def test_the_system_keeps_no_copy_of_files(
        self, device: Emulated, on_disk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else a disk would be as fast as memory. What is not yet written cannot be dropped."""
        calls: list[str] = []
        fsync = os.fsync

        def synced(handle: int) -> None:
            fsync(handle)
            calls.append("fsync")

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "posix_fadvise", lambda *_: calls.append("drop"), raising=False)
        store = Experts(device, SHAPE, 2, 3, source, on_disk=on_disk, folder=tmp_path)
        assert calls == ["fsync", "drop"] * 3
        store.read_from_disk(0, 1, store.reserve(0, 1))
        assert calls == [*["fsync", "drop"] * 3, "drop"]
        monkeypatch.delattr(os, "posix_fadvise")
        store.read_from_disk(0, 1, store.reserve(0, 1))
        assert torch.equal(store.image(0, 1, 16), pack(*source(0, 1), 16))
        store.close()

    def test_files_are_safetensors(self, device: Emulated, on_disk: Any, tmp_path: Path) -> None:
        safetensors = safetensors_torch
        store = Experts(device, SHAPE, 2, 3, source, on_disk=on_disk, folder=tmp_path)
        (folder,) = tmp_path.iterdir()
        assert sorted(path.name for path in folder.iterdir()) == [
            "0-1-16.safetensors", "1-0-16.safetensors", "1-2-16.safetensors",
        ]  # fmt: skip
        found = safetensors.load_file(folder / "1-0-16.safetensors")
        assert found.keys() == {"image"}
        assert torch.equal(found["image"], pack(*source(1, 0), 16))
        store.close()

    def test_forgetting_leaves_what_was_reserved_later_and_what_is_held(
        self, device: Emulated, on_disk: Any, tmp_path: Path
    ) -> None:
        store = Experts(device, SHAPE, 2, 3, source, on_disk=on_disk, folder=tmp_path)
        store.reserve(0, 1)
        buffer = store.reserve(1, 0)
        held = store.image(1, 0, 16)
        mark = store.reservations
        later = store.reserve(1, 2)
        store.forget(1, mark)
        store.read_from_disk(1, 0, buffer)
        assert torch.equal(held, pack(*source(1, 0), 16))
        assert store.image(1, 2, 16) is later
        store.image(0, 1, 16)
        with pytest.raises(AuditError, match="was not read before its use"):
            store.image(1, 0, 16)
        again = store.reserve(1, 0)
        assert store.image(1, 0, 16) is again
        store.close()

    def test_a_file_that_was_cut_or_is_gone_is_told(
        self, device: Emulated, on_disk: Any, tmp_path: Path
    ) -> None:
        store = Experts(device, SHAPE, 2, 3, source, on_disk=on_disk, folder=tmp_path)
        (folder,) = tmp_path.iterdir()
        path = folder / "0-1-16.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(InputError, match=r"0-1-16.safetensors has 3071 of the 3072 bytes"):
            store.read_from_disk(0, 1, store.reserve(0, 1))
        path.unlink()
        with pytest.raises(InputError, match=r"cannot read .*0-1-16"):
            store.read_from_disk(0, 1, store.reserve(0, 1))
        store.close()

    def test_a_disk_without_a_folder_or_without_room(
        self, device: Emulated, on_disk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for folder in (None, tmp_path / "none"):
            with pytest.raises(InputError, match=f"need a folder to be written to, not {folder}"):
                Experts(device, SHAPE, 2, 3, source, on_disk=on_disk, folder=folder)
        monkeypatch.setattr(store, "SPARE", 1 << 50)
        with pytest.raises(InputError, match=r"bytes free; \d+ are needed to write 3 experts"):
            Experts(device, SHAPE, 2, 3, source, on_disk=on_disk, folder=tmp_path)

    def test_a_failure_leaves_no_files(
        self, device: Emulated, on_disk: Any, tmp_path: Path
    ) -> None:
        def broken(layer: int, expert: int) -> tuple[Any, Any, Any]:
            gate, up, down = source(layer, expert)
            return gate, up, down.t() if layer else down

        with pytest.raises(InputError, match=r"expert 0 of layer 1 has matrices \(8, 64\), "):
            Experts(device, SHAPE, 2, 3, broken, on_disk=on_disk, folder=tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_more_than_there_is_memory(
        self, device: Emulated, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(store, "host_memory_bytes", lambda: 10_000)
        with pytest.raises(
            InputError, match="6 experts of 3072 bytes do not fit into the host's 10"
        ):
            Experts(device, SHAPE, 2, 3, source)
        monkeypatch.setattr(store, "host_memory_bytes", lambda: 0)

        def full(*shape: int, dtype: Any, pinned: bool = True) -> Any:
            raise RuntimeError("out of memory\nand a trace")

        monkeypatch.setattr(device, "host", full)
        with pytest.raises(
            InputError, match=r"no memory for 6 experts of 3072 bytes: out of memory$"
        ):
            Experts(device, SHAPE, 2, 3, source)

    def test_a_run_through_lanes(self, device: Emulated) -> None:
        """Copied in chunks over the link, computed on the device: as the processor computes it."""
        store = Experts(device, SHAPE, 2, 3, source)
        size_bytes = image_bytes(SHAPE, 16)
        slot = Slot(
            0, device.empty(slot_memory_bytes(SHAPE, size_bytes), dtype=torch.uint8), size_bytes
        )
        wanted = Held(1, 2, 16)
        image, rows = store.image(1, 2, 16), some_rows(4)

        def fill() -> None:
            for chunk in begin_copy(image, slot, SHAPE, wanted, 1000):
                for target, part in chunk:
                    device.copy(target, part)
            end_copy(slot, SHAPE, wanted)

        results: dict[str, Any] = {}
        copied = device.lanes["h2d"].submit(fill)
        done = [
            device.lanes["gpu"].submit(
                lambda: results.update(gpu=expert_piece(rows, slot, SHAPE, wanted)), [copied]
            ),
            device.lanes["cpu"].submit(
                lambda: results.update(cpu=expert_whole(rows, image, SHAPE, 16))
            ),
        ]
        for ticket in done:
            ticket.wait()
        assert torch.equal(results["gpu"], results["cpu"])
        store.close()
