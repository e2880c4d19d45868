"""What is measured of a layer beside its experts, and how attention's times are taken apart."""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.calibrate import attention, layers, sweeps
from moesim.calibrate.attention import judged, prompt_pairs
from moesim.calibrate.series import Bench, Point, Series
from moesim.calibrate.sweeps import Size
from moesim.calibrate.timing import Limits
from moesim.errors import CalibrationError
from moesim.model import GroupedQuery, ModelSpec, load_model
from moesim.profile import AttentionTable
from moesim.real import operations
from moesim.real.devices import Processor
from moesim.real.emulated import Emulated, Throttle

LIMITS = Limits(warm_ups=1, least=3, most=4, seconds=0.01)
SHAPE = (32, 4, 2, 8)


def tiny(**changed: Any) -> ModelSpec:
    plain = load_model("qwen3-30b-a3b")
    small: dict[str, Any] = {
        "hidden": 32, "experts": 8, "top_k": 2, "expert_width": 16, "shared_width": 24,
        "vocab": 100, "attention": GroupedQuery(4, 2, 8),
    }  # fmt: skip
    return msgspec.structs.replace(plain, **{**small, **changed})


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return an emulated device of 4 MiB, with little to rotate through."""
    monkeypatch.setattr(sweeps, "arena_bytes", lambda *_, **__: 100_000)
    device = Emulated(1 << 22, Throttle(0, 1e9))
    yield Bench(device, LIMITS, quick=True)
    device.close()


def test_tasks_are_one_per_shape(bench: Bench) -> None:
    models = [tiny(), tiny(name="another"), tiny(vocab=200), tiny(shared_width=0)]
    names = [task.name for task in layers.tasks(bench, models)]
    assert names == [
        "attention/gpu/prefill/32-4-2-8/32",
        "attention/gpu/prefill/32-4-2-8/512",
        "attention/gpu/decode/32-4-2-8/1",
        "attention/gpu/decode/32-4-2-8/8",
        "combine/gpu/32x2",
        "ffn/gpu/32x24",
        "gate/gpu/32x8",
        "head/gpu/32x100",
        "head/gpu/32x200",
    ]


def test_every_task_measures_what_its_name_says(bench: Bench) -> None:
    """Structure only: the real operations of a small layer, on lanes that work."""
    for task in layers.tasks(bench, [tiny()]):
        found = task.run(bench)
        bench.device.free_all()
        assert found.name == task.name
        assert all(0 < p.ns <= p.median_ns for p in found.points)
        assert [p.at for p in found.points] == sorted({p.at for p in found.points})
        assert any(not p.held_out for p in found.points)
        if found.unit == "tokens" and "stopped" not in found.facts:
            sizes = layers.QUICK_SEQUENCES if "head" in task.name else layers.QUICK_TOKENS
            assert [(p.at, p.held_out) for p in found.points] == [tuple(size) for size in sizes]
            assert task.seconds == sweeps.PASSES * LIMITS.seconds * len(sizes)
        if "combine" not in task.name:
            assert float(found.facts["buffers"]) >= 2
        assert found.facts["device"] == "emulated"


def test_without_a_device_there_is_nothing_to_measure() -> None:
    device = Processor(1)
    assert layers.tasks(Bench(device, LIMITS, quick=True), [tiny()]) == []
    device.close()


def test_operations_get_so_many_rows_and_one_copy_of_the_weights_after_the_other(
    bench: Bench,
) -> None:
    """Two shapes of rows and one of weights; 2,560 bytes of weights in 100,000 are 39 copies."""
    seen: list[Any] = []
    found = layers.by_tokens(
        bench, "some/thing", [Size(2), Size(5, True)], [(8,), (3, 8)], [(160, 8)],
        lambda rows, weights: seen.append((rows, weights)), {"shape": "yes"},
    )  # fmt: skip
    assert {tuple(len(row) for row in rows) for rows, _ in seen} == {(2, 2), (5, 5)}
    assert {tuple(row.shape[1:] for row in rows) for rows, _ in seen} == {((8,), (3, 8))}
    pointers = [weights[0].data_ptr() for _, weights in seen]
    assert len(set(pointers)) == 39
    assert all(pointers[k] == pointers[k % 39] for k in range(len(pointers)))
    assert [(p.at, p.held_out) for p in found.points] == [(2, False), (5, True)]
    assert found.facts["shape"] == "yes"


@pytest.mark.parametrize(
    ("run", "operation", "shapes", "extra"),
    [
        (layers.gate, "gate", [(2, 32), (8, 32)], {"experts": 8, "top_k": 3}),
        (layers.ffn, "expert", [(2, 32), (48, 32), (32, 24)], {"width": 24}),
        (layers.combine, "combine", [(2, 32), (2, 3, 32), (2, 3)], {"top_k": 3}),
        (layers.head, "head", [(2, 32), (32,), (100, 32)], {"vocab": 100}),
    ],
)
def test_shapes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Series], operation: str,
    shapes: list[Any], extra: dict[str, int],
) -> None:  # fmt: skip
    seen: list[Any] = []
    plain = getattr(operations, operation)

    def note(*tensors: Any) -> Any:
        seen.append([tuple(t.shape) for t in tensors if isinstance(t, torch.Tensor)])
        return plain(*tensors)

    monkeypatch.setattr(operations, operation, note)
    run(bench, "name", [Size(2)], hidden=32, **extra)
    assert seen
    assert all(own == shapes for own in seen)


# Attention.


@pytest.mark.parametrize(
    ("tokens", "prompts", "pairs"), [(1, 1, 1), (4, 1, 10), (4, 2, 6), (4, 4, 4), (512, 1, 131328)]
)
def test_tokens_attended_to_by_hand(tokens: int, prompts: int, pairs: int) -> None:
    """Four tokens at once: 1 + 2 + 3 + 4; as two prompts: twice 1 + 2."""
    assert prompt_pairs(tokens, prompts) == pairs


def test_prompts_have_one_length() -> None:
    with pytest.raises(CalibrationError, match="5 tokens are not prompts of one length, 2 of them"):
        prompt_pairs(5, 2)


def test_a_prefill_is_divided_among_prompts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight tokens as 4, 2 and 1 prompts attend to 12, 20 and 36; two prompts are held out."""
    seen: list[Any] = []

    def prefill(hidden: Any, sequences: int, weights: Any) -> Any:
        seen.append((tuple(hidden.shape), sequences, weights.qkv.data_ptr()))
        return operations.prefill(hidden, sequences, weights)

    monkeypatch.setattr(attention, "prefill", prefill)
    found = attention.prefill_series(bench, SHAPE, 8, (1, 4))
    assert found.name == "attention/gpu/prefill/32-4-2-8/8"
    assert [(p.at, p.held_out) for p in found.points] == [(12, False), (20, True), (36, False)]
    assert list(dict.fromkeys((shape, count) for shape, count, _ in seen)) == [
        ((8, 32), 4), ((8, 32), 2), ((8, 32), 1)
    ]  # fmt: skip
    assert len({pointer for _, _, pointer in seen}) == found.facts["buffers"]
    assert found.facts["tokens"] == 8


def test_decode_attends_to_caches_of_different_lengths(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three sequences; a context of 5 is 4 in the cache and the token itself, of each."""
    seen: list[Any] = []

    def decode(hidden: Any, keys: Any, values: Any, past: int, weights: Any) -> Any:
        seen.append((tuple(hidden.shape), tuple(keys.shape), tuple(values.shape), past))
        return operations.decode(hidden, keys, values, past, weights)

    monkeypatch.setattr(attention, "decode", decode)
    found = attention.decode_series(bench, SHAPE, 3, {9: True, 5: False, 17: False})
    assert found.name == "attention/gpu/decode/32-4-2-8/3"
    assert [(p.at, p.held_out) for p in found.points] == [(15, False), (27, True), (51, False)]
    assert list(dict.fromkeys(seen)) == [
        ((3, 32), (3, 2, 17, 8), (3, 2, 17, 8), past) for past in (4, 8, 16)
    ]
    assert float(found.facts["kv_buffers"]) >= 2
    assert "left_out" not in found.facts


def test_contexts_without_room_are_left_out_and_said(bench: Bench) -> None:
    """100,000 bytes: a token of 8 sequences has 8 x 2 x 2 x 2 x 8 = 512, so 195 of them fit."""
    found = attention.decode_series(bench, SHAPE, 8, {16: False, 195: False, 196: False, 500: True})
    assert [p.at for p in found.points] == [8 * 16, 8 * 195]
    assert found.facts["left_out"] == "contexts 196, 500: no room"
    with pytest.raises(CalibrationError, match="values of 8 sequences of 200 tokens"):
        attention.decode_series(bench, SHAPE, 8, {200: False})


def test_latent_attention_is_not_measured_as_something_else(bench: Bench) -> None:
    latent = load_model("deepseek-v2-lite")
    with pytest.raises(CalibrationError, match="deepseek-v2-lite has latent attention"):
        attention.shape_of(latent)
    assert attention.tasks(bench, [latent]) == []


def taken(
    phase: str, tokens: int, ns: dict[float, float], *held_out: float, shape: str = "32-4-2-8"
) -> Series:
    """Return a series of attention: ns by tokens attended to."""
    numbers = [int(part) for part in shape.split("-")]
    points = tuple(
        Point(
            at=at, ns=took, median_ns=took, spread=0.01, repetitions=9, settled=True, outliers=0,
            held_out=at in held_out,
        )
        for at, took in ns.items()
    )  # fmt: skip
    facts = dict(zip(("hidden", "heads", "kv_heads", "head_dim"), numbers, strict=True))
    return Series(
        name=f"attention/gpu/{phase}/{shape}/{tokens}", unit="attended", points=points,
        facts={"phase": phase, "tokens": tokens, "device": "emulated", "threads": 1, **facts},
    )  # fmt: skip


def made(
    base: Callable[[float], float], prefill_ns: float, decode_ns: float, noise: float = 0.0,
    seed: int = 0,
) -> list[Series]:  # fmt: skip
    """Return the series of the full grid, true but for noise."""
    random = np.random.default_rng(seed)
    found = []
    for tokens, divided in attention.PROMPTS.items():
        apart = [prompt_pairs(tokens, 2)] if len(divided) > 1 else []
        pairs = sorted(prompt_pairs(tokens, n) for n in {*divided, *([2] if apart else [])})
        apart = pairs if tokens == attention.APART_TOKENS else apart
        ns = {
            at: (base(tokens) + prefill_ns * at) * (1 + noise * abs(random.normal()))
            for at in map(float, pairs)
        }
        found.append(taken("prefill", tokens, ns, *apart))
    for tokens in attention.SEQUENCES:
        contexts = [float(tokens * context) for context in sorted(attention.CONTEXTS)]
        ns = {
            at: (base(tokens) + decode_ns * at) * (1 + noise * abs(random.normal()))
            for at in contexts
        }
        every = tokens == attention.APART_SEQUENCES
        held_out = [tokens * c for c, apart in attention.CONTEXTS.items() if apart or every]
        found.append(taken("decode", tokens, ns, *held_out))
    return found


@given(
    memory_ns=st.floats(1e4, 5e6), token_ns=st.floats(1e2, 1e5), pair_ns=st.floats(0.05, 20),
    context_ns=st.floats(10, 500), seed=st.integers(0, 1 << 30),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_bases_and_rates_are_recovered(
    memory_ns: float, token_ns: float, pair_ns: float, context_ns: float, seed: int
) -> None:
    """Without noise, exactly; with one percent of it, every time that was fitted to 5 %."""

    def base(tokens: float) -> float:
        return memory_ns + token_ns * tokens

    found = judged(made(base, pair_ns, context_ns))
    for rows, grid, rate in (
        (found.table.prefill, set(attention.PROMPTS) - {attention.APART_TOKENS}, pair_ns),
        (found.table.decode, set(attention.SEQUENCES) - {attention.APART_SEQUENCES}, context_ns),
    ):
        assert [tokens for tokens, _, _ in rows] == sorted(grid)
        for tokens, ns, per_attended_ns in rows:
            alone = base(tokens) + rate * tokens
            assert ns == pytest.approx(base(tokens), abs=1e-2 * alone)
            assert per_attended_ns == pytest.approx(rate, rel=1e-2)
    assert max(found.off.values()) < 1e-2

    rough = judged(made(base, pair_ns, context_ns, 0.01, seed))
    assert all(np.abs(residuals).max() < 0.05 for residuals in rough.residuals.values())


def by_hand() -> list[Series]:
    """Return times of 100 + 2 a (4 tokens, prefill) and 50 + 3 a (1 sequence, decode)."""
    return [
        taken("prefill", 4, {4: 108, 6: 112, 10: 120}, 6),
        taken("decode", 1, {10: 80, 20: 110, 30: 140}, 20),
    ]


def test_a_table_by_hand() -> None:
    found = judged(by_hand(), "2031-01-02", {"torch": "2.9"})
    own = found.table
    assert (own.hidden, own.heads, own.kv_heads, own.head_dim) == (32, 4, 2, 8)
    assert np.array(own.prefill) == pytest.approx(np.array([[4, 100, 2]]), rel=1e-3)
    assert np.array(own.decode) == pytest.approx(np.array([[1, 50, 3]]), rel=1e-3)
    for phase in attention.PHASES:
        assert len(found.residuals[phase]) == 2
        assert found.held_out[phase] == pytest.approx([0], abs=1e-3)
    assert own.provenance.source == "measured"
    assert own.provenance.date == "2031-01-02"
    assert "device emulated" in own.provenance.note
    assert "off at points held out by 0.0 % in prefill, 0.0 % in decode" in own.provenance.note
    plain = msgspec.to_builtins(own)
    assert msgspec.convert(plain, AttentionTable) == own


def test_what_is_held_out_judges_and_bends_nothing() -> None:
    own = by_hand()
    own[1] = taken("decode", 1, {10: 80, 20: 220, 30: 140}, 20)
    found = judged(own)
    assert np.array(found.table.decode) == pytest.approx(np.array([[1, 50, 3]]), rel=1e-3)
    assert found.off == pytest.approx({"prefill": 0, "decode": 0.5}, abs=1e-3)


def test_tokens_between_others_are_judged_by_the_line_through_these() -> None:
    """1 and 3 sequences take 50 + 3 a and 70 + a; two take 60 + 2 a, and 220 at 20 is far off."""
    own = [*by_hand(), taken("decode", 3, {10: 80, 20: 90, 30: 100})]
    found = judged([*own, taken("decode", 2, {10: 80, 20: 100, 40: 70}, 10, 20, 40)])
    assert [tokens for tokens, _, _ in found.table.decode] == [1, 3]
    assert found.held_out["decode"][-3:] == pytest.approx([0, 0, 1], abs=1e-2)


def test_a_prompt_too_short_to_be_divided_attends_as_its_neighbour_does() -> None:
    """Of 60 ns one token takes 2 for itself; at 1 ns in all, nothing is left for the rest."""
    found = judged([*by_hand(), taken("prefill", 1, {1: 60}), taken("prefill", 2, {3: 3})])
    assert found.table.prefill[0] == pytest.approx((1, 58, 2), rel=1e-3)
    assert found.table.prefill[1] == pytest.approx((2, 0, 1), abs=1e-3)
    assert found.residuals["prefill"][-2:] == pytest.approx([0, 0], abs=1e-6)


def test_times_that_do_not_grow_with_the_context_have_no_rate() -> None:
    own = judged([by_hand()[0], taken("decode", 1, {10: 80, 30: 80})]).table
    assert np.array(own.decode) == pytest.approx(np.array([[1, 80, 0]]), abs=0.1)


def test_a_phase_with_one_context_cannot_be_taken_apart() -> None:
    own = by_hand()
    with pytest.raises(CalibrationError, match="in decode no number of tokens"):
        judged([own[0], taken("decode", 1, {10: 80}), taken("decode", 4, {10: 80})])
    with pytest.raises(CalibrationError, match="in one phase no number of tokens"):
        judged([own[1]])
