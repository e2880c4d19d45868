"""Cost tables: rooflines and measured points by hand, laws that hold on every machine."""

import itertools
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim import types
from moesim.costs import (
    CONTEXT_UNIT,
    Costs,
    build_costs,
    copy_ns,
    duration_ns,
    part_bytes,
    source_of,
)
from moesim.errors import InputError, ModelError
from moesim.model import ModelSpec, expert_bytes, load_model, model_names, streamed_params
from moesim.profile import HardwareProfile, load_profile, profile_names, with_overrides

TABLES = (
    "expert_gpu_ns",
    "expert_cpu_ns",
    "attention_ns",
    "dense_ns",
    "gate_ns",
    "shared_ns",
    "combine_ns",
    "head_ns",
)

ROUND = {
    "gpu.memory_bytes_per_s": "1e12",
    "gpu.flops_per_s": "1e14",
    "gpu.launch_ns": "1000",
    "cpu.expert_bytes_per_s": "5e10",
    "cpu.flops_per_s": "1e12",
    "cpu.overhead_ns": "500",
    "link.h2d.bytes_per_s": "25e9",
    "link.h2d.latency_ns": "10000",
}
"""Numbers that a pencil can divide by."""


def machine(**tables: Any) -> HardwareProfile:
    profile = with_overrides(load_profile("rtx3090-pcie4-ddr4")[0], ROUND)
    plain = msgspec.to_builtins(profile)
    return msgspec.convert({**plain, "tables": {**plain["tables"], **tables}}, HardwareProfile)


def model(name: str = "qwen3-30b-a3b", **changes: Any) -> ModelSpec:
    return msgspec.structs.replace(load_model(name), **changes)


def points(*pairs: tuple[int, float], source: str = "measured", **shape: int) -> dict[str, Any]:
    return {
        "hidden": 2048,
        "width": 768,
        "bits": 16,
        **shape,
        "points": [list(pair) for pair in pairs],
        "provenance": {"source": source, "note": "a test"},
    }


def ask(costs: Costs, kind: int, amount: int, **rest: int) -> int:
    asked = {"phase": 1, "layer": 0, "context": 0, "part": 1024, "precision": 0, **rest}
    return int(
        duration_ns(
            costs,
            asked["phase"],
            kind,
            asked["layer"],
            amount,
            asked["context"],
            asked["part"],
            asked["precision"],
        )
    )


def test_an_expert_by_hand() -> None:
    """3 x 2048 x 768 weights: 9,437,184 bytes, 9,437,184 operations per token."""
    costs = build_costs(model(), machine(), tokens=2048, sequences=4)

    # Three kernels of 1,000 ns; 9,437,184 bytes at 1 byte/ps; 94.37184 ns of work per token.
    assert costs.expert_gpu_ns[0, 1] == 3000 + 9438
    assert costs.expert_gpu_ns[0, 100] == 3000 + 9438
    assert costs.expert_gpu_ns[0, 200] == 3000 + math.ceil(200 * 94.37184)
    # 500 ns; 188,743.68 ns of reading; 9,437.184 ns of work per token.
    assert costs.expert_cpu_ns[0, 1] == math.ceil(500 + 188_743.68)
    assert costs.expert_cpu_ns[0, 20] == math.ceil(500 + 188_743.68)
    assert costs.expert_cpu_ns[0, 30] == math.ceil(500 + 30 * 9437.184)
    # At 4 bits 4.5/16 of the bytes, and the same work.
    assert costs.expert_cpu_ns[2, 1] == math.ceil(500 + 188_743.68 * 4.5 / 16)
    assert costs.expert_cpu_ns[2, 30] == costs.expert_cpu_ns[0, 30]


def test_the_rest_by_hand() -> None:
    costs = build_costs(model(), machine(), tokens=64, sequences=4)
    attention = 2 * 2048 * 128 * (32 + 4) + 2 * 2048

    assert costs.attention_ns[0, 1] == 8000 + math.ceil(2 * attention / 1000)
    assert costs.gate_ns[1] == 2000 + math.ceil(2 * 2048 * 128 / 1000)
    assert costs.combine_ns[1] == 1000 + math.ceil(2 * 2048 * 10 / 1000)
    assert costs.combine_ns[64] == 1000 + math.ceil(64 * 2 * 2048 * 10 / 1000)
    assert costs.head_ns[4] == 3000 + math.ceil(2 * 2048 * 151_936 / 1000)
    assert costs.attention_bytes.tolist() == [2 * (attention + 2048 * 128)] * 48
    assert costs.kv_bytes.tolist() == [2048] * 48
    assert costs.token_bytes == 4096
    assert not costs.shared_ns.any()
    assert not costs.dense_ns.any()
    # 4 x 32 x 128 operations at 1e14/s; 2,048 bytes at 1e12/s.
    assert costs.context_fp[:, 1].tolist() == [
        math.ceil(16_384 / 1e5 * CONTEXT_UNIT),
        math.ceil(2.048 * CONTEXT_UNIT),
    ]


def test_rates_are_bytes_per_ms() -> None:
    costs = build_costs(model(), machine(), tokens=1, sequences=1)

    assert costs.copies[types.H2D].tolist() == [[0, 10_000, 25_000_000]]
    assert costs.copies[types.GPU].tolist() == [[0, 1000, 500_000_000]]  # a move reads and writes
    assert copy_ns(costs, types.H2D, 9_437_184) == 10_000 + math.ceil(9_437_184 / 25)
    assert copy_ns(costs, types.H2D, 0) == 0
    assert copy_ns(costs, types.H2D, 1) == 10_001


@pytest.mark.parametrize(
    ("name", "gen3", "gen4", "gen5"),
    [
        ("mixtral-8x7b", 29, 14, 6.4),
        ("phi-3.5-moe", 13, 6.3, 2.9),
        ("deepseek-v3", 7.3, 3.5, 1.6),
        ("qwen2-57b-a14b", 4.6, 2.2, 1.0),
        ("gpt-oss-20b", 4.1, 2.0, 0.9),
        ("qwen3-235b-a22b", 3.1, 1.5, 0.69),
        ("deepseek-v2-lite", 1.4, 0.69, 0.31),
        ("olmoe-1b-7b", 1.05, 0.5, 0.23),
        ("qwen3-30b-a3b", 0.79, 0.38, 0.17),
    ],
)
def test_copies_take_the_published_time(name: str, gen3: float, gen4: float, gen5: float) -> None:
    spec = load_model(name)
    for rate, ms in (("12e9", gen3), ("25e9", gen4), ("55e9", gen5)):
        profile = with_overrides(machine(), {"link.h2d.bytes_per_s": rate})
        costs = build_costs(spec, profile, tokens=1, sequences=1)
        without_setup = copy_ns(costs, types.H2D, expert_bytes(spec)) - 10_000
        assert without_setup / 1e6 == pytest.approx(ms, rel=0.04)


def test_huang_s_cpu_only_speed_comes_out() -> None:
    """Two experts of Mixtral in turn on the CPU: 704.6 MB at 95-101 GB/s."""
    costs = build_costs(load_model("mixtral-8x7b"), load_profile("huang-4090")[0], 1, 1)

    assert 2 * costs.expert_cpu_ns[0, 1] / 1e6 == pytest.approx(704.6 / 98, rel=0.01)


@pytest.mark.parametrize("name", model_names())
@pytest.mark.parametrize("hardware", ["rtx3090-pcie4-ddr4", "h200-pcie5", "fate-1080ti"])
def test_laws_of_the_tables(name: str, hardware: str) -> None:
    costs = build_costs(load_model(name), load_profile(hardware)[0], tokens=4096, sequences=32)

    for field in TABLES:
        table = getattr(costs, field)
        assert table.shape[-1] == (33 if field == "head_ns" else 4097)
        assert (table[..., 0] == 0).all()
        assert (np.diff(table) >= 0).all()
    for own in costs:
        if isinstance(own, np.ndarray):
            assert own.dtype == np.int64
            assert own.flags.c_contiguous
            assert own.flags.writeable
            assert (own >= 0).all()
    # Fewer bits are never slower, and never more bytes.
    assert (np.diff(costs.expert_gpu_ns, axis=0) <= 0).all()
    assert (np.diff(costs.expert_bytes, axis=1) < 0).all()


@pytest.mark.parametrize("hardware", profile_names())
def test_datasheet_machines_say_so(hardware: str) -> None:
    costs = build_costs(load_model("qwen3-30b-a3b"), load_profile(hardware)[0], 8, 1)

    assert set(costs.kind_source.tolist()) == {types.DATASHEET}
    assert (costs.expert_gpu_source == types.DATASHEET).all()


def test_a_calibrated_machine_extrapolates_its_rooflines() -> None:
    plain = msgspec.to_builtins(machine())
    for origin in plain["provenance"].values():
        origin["source"] = "measured"
    costs = build_costs(model(), msgspec.convert(plain, HardwareProfile), 8, 1)

    assert source_of(costs, types.COPY_IN, 1, 0) == types.MEASURED
    assert source_of(costs, types.DISK_READ, 1, 0) == types.MEASURED
    assert source_of(costs, types.GATE, 1, 0) == types.EXTRAPOLATED
    assert source_of(costs, types.EXPERT_CPU, 1, 0) == types.EXTRAPOLATED
    assert source_of(costs, types.EXPERT_GPU, 1, 0) == types.EXTRAPOLATED


def test_measured_points_win_and_are_joined_by_lines() -> None:
    profile = machine(expert_cpu=[points((2, 1000.2), (6, 3000), (10, 11_000))])
    costs = build_costs(model(), profile, tokens=12, sequences=1)
    table, source = costs.expert_cpu_ns[0], costs.expert_cpu_source[0]

    # The roofline has 189,244 ns for one token: more than was measured for two.
    assert table[1] == 1001
    assert table[2] == 1001
    assert table[3] == math.ceil(1000.2 + 1999.8 / 4)
    assert table[6] == 3000
    assert table[8] == 7000
    assert table[10] == 11_000
    assert table[12] == 15_000  # 2,000 ns per token, as at the end
    assert source[1] == types.INTERPOLATED
    assert source[[2, 6, 10]].tolist() == [types.MEASURED] * 3
    assert source[[3, 8]].tolist() == [types.INTERPOLATED] * 2
    assert source[[11, 12]].tolist() == [types.EXTRAPOLATED] * 2
    # Only this precision was measured.
    assert (costs.expert_cpu_source[1:] == types.DATASHEET).all()


def test_beyond_flat_points_the_roofline_s_growth_counts() -> None:
    profile = machine(expert_cpu=[points((1, 200_000), (8, 200_000))])
    costs = build_costs(model(), profile, tokens=100, sequences=1)

    assert costs.expert_cpu_ns[0, 20] == 200_000  # bound by memory up to 20 tokens
    grown = 100 * 9437.184 - 188_743.68
    assert costs.expert_cpu_ns[0, 100] == math.ceil(200_000 + grown)


def test_below_the_first_point_the_line_starts_at_the_roofline() -> None:
    profile = machine(expert_gpu=[points((3, 20_000))])
    costs = build_costs(model(), profile, tokens=4, sequences=1)

    floor_ns = 3000 + 9437.184
    assert costs.expert_gpu_ns[0, 1] == math.ceil(floor_ns)
    assert costs.expert_gpu_ns[0, 2] == math.ceil((floor_ns + 20_000) / 2)
    assert costs.expert_gpu_ns[0, 4] == 20_000  # one point has no slope, the roofline is flat


def test_noise_does_not_make_more_tokens_cheaper() -> None:
    """The project's own CPU measurement: .63, .62, .63 ms for 1, 2, 4 tokens."""
    profile = machine(expert_cpu=[points((1, 630_000), (2, 620_000), (4, 630_000), (8, 700_000))])
    costs = build_costs(model(), profile, tokens=8, sequences=1)

    assert costs.expert_cpu_ns[0, [1, 2, 4, 8]].tolist() == [630_000] * 3 + [700_000]


def test_a_table_of_another_shape_is_not_used() -> None:
    tables = [points((1, 5), hidden=4096), points((1, 5), width=8), points((1, 5), bits=4)]
    with_them = build_costs(model(), machine(expert_gpu=tables), 8, 1)
    without = build_costs(model(), machine(), 8, 1)

    assert (with_them.expert_gpu_ns[0] == without.expert_gpu_ns[0]).all()
    assert with_them.expert_gpu_ns[2, 1] == 5


def test_a_table_that_was_not_measured_says_so() -> None:
    profile = machine(expert_gpu=[points((1, 5), (2, 6), source="scaled")])
    costs = build_costs(model(), profile, 8, 1)

    assert costs.expert_gpu_ns[0, 2] == 6
    assert (costs.expert_gpu_source[0] == types.DATASHEET).all()


def test_measured_attention_wins() -> None:
    table = {
        "hidden": 2048,
        "heads": 32,
        "kv_heads": 4,
        "head_dim": 128,
        "prefill": [[1, 70_000, 0.5], [8, 70_700, 0.5]],
        "decode": [[2, 80_000, 6.0], [6, 80_400, 4.0]],
        "provenance": {"source": "measured", "note": "a test"},
    }
    costs = build_costs(model(), machine(attention=[table]), tokens=8, sequences=1)

    assert costs.attention_ns[types.PREFILL, [1, 8]].tolist() == [70_000, 70_700]
    assert costs.attention_ns[types.DECODE, [2, 4, 6]].tolist() == [80_000, 80_200, 80_400]
    # A token fewer than measured takes the roofline's time; one more grows as at the end.
    roof = build_costs(model(), machine(), 8, 1).attention_ns[types.DECODE, 1]
    assert costs.attention_ns[types.DECODE, [1, 8]].tolist() == [roof, 80_600]
    assert (costs.context_fp[types.PREFILL] == CONTEXT_UNIT // 2).all()
    per_attended = costs.context_fp[types.DECODE] / CONTEXT_UNIT
    assert per_attended[1:].tolist() == [6, 6, 5.5, 5, 4.5, 4, 4, 4]
    assert costs.kind_source[types.ATTENTION] == types.INTERPOLATED


def test_measured_layers_win_at_the_precision_that_was_measured() -> None:
    """Gates, shared experts (2 x 1408 wide) and dense layers (10944), combining, the head."""
    spec = model("deepseek-v2-lite")
    provenance = {"source": "measured", "note": "a test"}
    tables = [
        {"kind": kind, "hidden": 2048, "size": size, "points": [[1, ns], [5, 5 * ns]],
         "provenance": provenance}
        for kind, size, ns in (("gate", 64, 100), ("ffn", 2816, 200), ("ffn", 10_944, 300),
                               ("combine", 6, 400), ("head", 102_400, 500), ("gate", 65, 9))
    ]  # fmt: skip
    costs = build_costs(spec, machine(layer=tables), 8, 2)
    assert costs.gate_ns[[1, 3]].tolist() == [100, 300]
    assert costs.shared_ns[[1, 3]].tolist() == [200, 600]
    assert costs.dense_ns[[1, 3]].tolist() == [300, 900]
    assert costs.combine_ns[[1, 3]].tolist() == [400, 1200]
    assert costs.head_ns.tolist() == [0, 500, 1000]
    for kind in (types.GATE, types.PREDICT, types.SHARED, types.COMBINE, types.HEAD):
        assert costs.kind_source[kind] == types.INTERPOLATED
    plain, packed = (
        build_costs(spec, machine(**tables), 8, 2, dense_bits=4)
        for tables in ({}, {"layer": tables})
    )
    assert (packed.gate_ns == plain.gate_ns).all()
    assert packed.kind_source[types.GATE] == types.DATASHEET
    sources = [source_of(costs, types.GATE, tokens, 0) for tokens in (1, 5, 6)]
    assert sources == [types.INTERPOLATED, types.INTERPOLATED, types.EXTRAPOLATED]
    assert source_of(plain, types.GATE, 6, 0) == types.DATASHEET


def test_measured_copies_lie_between_their_points_and_beyond_at_the_rate() -> None:
    """From 100 ns: 1000 bytes in 300 ns, 5000 in 700, no more for 6000; then 1 byte per ns."""
    channel = {
        "latency_ns": 100, "bytes_per_s": 1e9, "points": [[1000, 300], [5000, 700], [6000, 690]],
        "interpolated": True,
    }  # fmt: skip
    profile = machine()
    plain = msgspec.to_builtins(profile)
    plain["disk"] = channel
    costs = build_costs(model(), msgspec.convert(plain, HardwareProfile), 1, 1)
    sizes = [1, 500, 999, 1000, 3000, 5000, 5500, 6000, 6001, 10_000]
    expected = [101, 200, 300, 300, 500, 700, 701, 700, 701, 4700]
    assert [copy_ns(costs, types.DISK, size) for size in sizes] == expected
    shown = build_costs(
        model(),
        msgspec.convert({**plain, "disk": {**channel, "interpolated": False}}, HardwareProfile),
        1,
        1,
    )
    assert [copy_ns(shown, types.DISK, size) for size in (1, 3000, 10_000)] == [101, 3100, 10_100]
    own = profile.link.h2d
    for size in (1, 4096, 1 << 30):
        line = own.latency_ns + math.ceil(size * 1e9 / (own.bytes_per_s // 1000 * 1000))
        assert copy_ns(costs, types.H2D, size) == line


@given(st.lists(st.tuples(st.integers(1, 200), st.floats(1, 1e9)), min_size=1, max_size=8))
def test_any_measured_table_gives_a_rising_curve(pairs: list[tuple[int, float]]) -> None:
    profile = machine(expert_gpu=[points(*sorted(dict(pairs).items()))])
    costs = build_costs(model(), profile, tokens=256, sequences=1)

    assert (np.diff(costs.expert_gpu_ns[0]) >= 0).all()
    assert costs.expert_gpu_ns[0, 1] >= 1


@given(st.integers(1, 64), st.lists(st.integers(0, 1024), max_size=4))
def test_pieces_of_an_expert_sum_to_the_whole(tokens: int, cuts: list[int]) -> None:
    costs = build_costs(model(), machine(), tokens=64, sequences=1)
    ends = [0, *sorted(cuts), 1024]
    pieces = list(itertools.pairwise(ends))

    ns = [ask(costs, types.EXPERT_GPU, tokens, context=a, part=b - a) for a, b in pieces]
    sizes = [part_bytes(costs, 0, 2, a, b - a) for a, b in pieces]
    assert sum(ns) == costs.expert_gpu_ns[0, tokens]
    assert sum(sizes) == costs.expert_bytes[0, 2]


def test_every_kind_has_its_table() -> None:
    spec = model("deepseek-v2-lite")
    costs = build_costs(spec, machine(), tokens=16, sequences=4)

    assert ask(costs, types.EXPERT_CPU, 3, precision=1) == costs.expert_cpu_ns[1, 3]
    assert ask(costs, types.GATE, 3) == ask(costs, types.PREDICT, 3) == costs.gate_ns[3]
    assert ask(costs, types.SHARED, 3) == costs.shared_ns[3] > 0
    assert ask(costs, types.COMBINE, 3) == costs.combine_ns[3]
    assert ask(costs, types.HEAD, 3) == costs.head_ns[3]
    for kind in (types.COPY_IN, types.RETURN, types.KV_IN, types.DENSE_IN):
        assert ask(costs, kind, 999) == copy_ns(costs, types.H2D, 999)
    for kind in (types.SEND, types.KV_OUT):
        assert ask(costs, kind, 999) == copy_ns(costs, types.D2H, 999)
    assert ask(costs, types.MOVE, 999) == copy_ns(costs, types.GPU, 999)
    assert ask(costs, types.DISK_READ, 999) == copy_ns(costs, types.DISK, 999)
    # Layer 0 of the MoE layers has one dense layer before it, layer 1 has none.
    attended = math.ceil(1000 * costs.context_fp[1, 3] / CONTEXT_UNIT)
    one = costs.attention_ns[1, 3] + attended
    assert ask(costs, types.ATTENTION, 3, layer=1, context=1000) == one
    assert ask(costs, types.ATTENTION, 3, layer=0, context=1000) == 2 * one + costs.dense_ns[3]


def test_dense_layers_at_the_end_are_counted_in_the_head() -> None:
    plain = build_costs(model(), machine(), 8, 8)
    spec = model(hidden_layers=50, dense_width=6144)
    costs = build_costs(spec, machine(), 8, 8)

    extra = 2 * (costs.attention_ns[1, 8] + costs.dense_ns[8])
    assert costs.head_ns[8] == plain.head_ns[8] + extra


def test_layers_without_a_cache_attend_to_nothing() -> None:
    full = build_costs(model(), machine(), 1, 1)
    half = build_costs(model(cacheless_layer_ids=tuple(range(24))), machine(), 1, 1)

    assert half.context_fp.tolist() == np.ceil(full.context_fp / 2).tolist()
    assert half.kv_bytes.tolist() == [0] * 24 + [2048] * 24


def test_dense_weights_may_have_a_precision_of_their_own() -> None:
    spec = model("qwen1.5-moe-a2.7b")
    full = build_costs(spec, machine(), 4, 1)
    packed = build_costs(spec, machine(), 4, 1, dense_bits=4)

    assert (packed.expert_gpu_ns == full.expert_gpu_ns).all()
    assert packed.shared_ns[1] < full.shared_ns[1]
    assert full.attention_bytes[0] == 2 * streamed_params(spec)[0]
    assert packed.attention_bytes[0] == math.ceil(full.attention_bytes[0] * 4.5 / 16)


@pytest.mark.parametrize(("tokens", "sequences"), [(0, 1), (-1, 1), (1, 0), (1 << 23, 1)])
def test_absurd_sizes_are_refused(tokens: int, sequences: int) -> None:
    with pytest.raises(InputError, match="must be from 1 to 4194304, not"):
        build_costs(model(), machine(), tokens, sequences)


def test_absurd_bits_are_refused() -> None:
    with pytest.raises(ModelError, match="no precision of 5 bits"):
        build_costs(model(), machine(), 1, 1, dense_bits=5)
