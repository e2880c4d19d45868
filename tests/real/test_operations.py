"""What the operations compute, against the same written out in float64 NumPy."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.real import operations as ops
from moesim.types import FloatArray


def some(*shape: int, seed: int = 0, scale: float = 1.0) -> Any:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return made * scale


def exact(tensor: Any) -> FloatArray:
    array: FloatArray = tensor.detach().double().numpy()
    return array


def same(found: Any, truth: FloatArray) -> None:
    """Compare float32 with float64."""
    np.testing.assert_allclose(exact(found), truth, rtol=1e-4, atol=1e-5)


def swiglu(rows: FloatArray, gate_up: FloatArray, down: FloatArray) -> FloatArray:
    gate, up = np.split(rows @ gate_up.T, 2, axis=1)
    made: FloatArray = (gate / (1 + np.exp(-gate)) * up) @ down.T
    return made


def normed(rows: FloatArray, weight: FloatArray) -> FloatArray:
    made: FloatArray = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + ops.EPSILON) * weight
    return made


def softmax(rows: FloatArray) -> FloatArray:
    powers = np.exp(rows - rows.max(-1, keepdims=True))
    made: FloatArray = powers / powers.sum(-1, keepdims=True)
    return made


def attended(
    hidden: FloatArray, before: list[FloatArray], weights: ops.Attention
) -> tuple[FloatArray, FloatArray]:
    """Attend token by token and head by head, (tokens, hidden) behind keys and values `before`.

    Those are (tokens, kv_heads, head_dim). Returns the stream, and its norm.
    """
    width, group = weights.head_dim, weights.heads // weights.kv_heads
    rows = normed(hidden, exact(weights.norm)) @ exact(weights.qkv).T
    heads = rows.reshape(len(hidden), -1, width)
    queries, keys, values = np.split(heads, [weights.heads, weights.heads + weights.kv_heads], 1)
    all_keys, all_values = np.concatenate([before[0], keys]), np.concatenate([before[1], values])
    seen = np.zeros((len(hidden), weights.heads, width))
    for token in range(len(hidden)):
        last = len(before[0]) + token + 1
        for head in range(weights.heads):
            scores = all_keys[:last, head // group] @ queries[token, head] / np.sqrt(width)
            seen[token, head] = softmax(scores) @ all_values[:last, head // group]
    residual = hidden + seen.reshape(len(hidden), -1) @ exact(weights.out).T
    return residual, normed(residual, exact(weights.next_norm))


def attention(hidden: int, heads: int, kv_heads: int, head_dim: int) -> ops.Attention:
    return ops.Attention(
        norm=1 + some(hidden, scale=0.1),
        qkv=some((heads + 2 * kv_heads) * head_dim, hidden, scale=hidden**-0.5),
        out=some(hidden, heads * head_dim, scale=hidden**-0.5),
        next_norm=1 + some(hidden, seed=1, scale=0.1),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )


@given(tokens=st.integers(1, 9), hidden=st.integers(1, 40), width=st.integers(1, 40))
@settings(max_examples=20)
def test_an_expert(tokens: int, hidden: int, width: int) -> None:
    rows, gate_up, down = some(tokens, hidden), some(2 * width, hidden), some(hidden, width)
    found = ops.expert(rows, gate_up, down)
    assert found.shape == (tokens, hidden)
    truth = swiglu(exact(rows), exact(gate_up), exact(down))
    assert np.abs(exact(found) - truth).max() <= 1e-4 * (1 + np.abs(truth).max())


def test_the_gate_comes_first_and_up_is_not_squashed() -> None:
    """silu(1) = 0.7311; times 3 is 2.193. The other way round it would be 2.858."""
    found = ops.expert(torch.ones(1, 1), torch.tensor([[1.0], [3.0]]), torch.ones(1, 1))
    assert found.item() == pytest.approx(2.1932, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_expert_of_16_bits_is_as_good_as_16_bits(dtype: Any) -> None:
    rows, gate_up, down = some(5, 64), some(64, 64, scale=0.1), some(64, 32, scale=0.1)
    found = ops.expert(rows.to(dtype), gate_up.to(dtype), down.to(dtype))
    truth = swiglu(*(exact(tensor.to(dtype)) for tensor in (rows, gate_up, down)))
    assert found.dtype == dtype
    assert np.abs(exact(found) - truth).max() < 0.02 * np.abs(truth).max()


def meant(weight: Any, packed: ops.Int8 | ops.Int4) -> tuple[FloatArray, FloatArray]:
    """Return the nearest weights that the form can hold, and their steps, as its class writes."""
    if isinstance(packed, ops.Int8):
        step = exact(packed.scales)[:, None]
        return np.round(exact(weight) / step).clip(-127, 127) * step, step
    pairs = exact(packed.scales_zeros).repeat(ops.GROUP, axis=0)
    step, zero = pairs[..., 0].T, pairs[..., 1].T
    return (np.round((exact(weight) - zero) / step + 8).clip(0, 15) - 8) * step + zero, step


@pytest.mark.parametrize(("pack", "steps"), [(ops.int8, 254), (ops.int4, 15)])
def test_packed_weights_are_the_nearest_that_there_are(pack: Any, steps: int) -> None:
    """The kernel computes with them; a step is the range over the number of steps."""
    weight, rows = some(48, 128, scale=0.1), some(3, 128).bfloat16()
    packed = pack(weight)
    stored, step = meant(weight, packed)
    span = np.ptp(exact(weight), axis=1).max()
    assert step.max() <= 1.01 * span / steps * (2 if steps == 254 else 1)
    assert (np.abs(stored - exact(weight)) <= 0.75 * step).all()
    found, truth = exact(ops.linear(rows, packed)), exact(rows) @ stored.T
    assert np.abs(found - truth).max() < 0.01 * np.abs(truth).max()


@pytest.mark.parametrize("pack", [ops.int8, ops.int4])
def test_an_expert_of_packed_weights(pack: Any) -> None:
    rows, gate_up, down = some(4, 128), some(256, 128, scale=0.1), some(128, 128, scale=0.1)
    packed = pack(gate_up), pack(down)
    stored = [meant(weight, form)[0] for weight, form in zip((gate_up, down), packed, strict=True)]
    truth = swiglu(exact(rows.bfloat16()), *stored)
    found = exact(ops.expert(rows.bfloat16(), *packed))
    assert np.abs(found - truth).max() < 0.02 * np.abs(truth).max()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("sequences", "tokens"), [(1, 1), (1, 7), (3, 5)])
def test_prefill(heads: int, kv_heads: int, sequences: int, tokens: int) -> None:
    weights = attention(24, heads, kv_heads, 8)
    hidden = some(sequences * tokens, 24)
    found = ops.prefill(hidden, sequences, weights)
    nothing = [np.zeros((0, kv_heads, 8))] * 2
    assert found.keys.shape == found.values.shape == (sequences, kv_heads, tokens, 8)
    for one in range(sequences):
        own = slice(one * tokens, (one + 1) * tokens)
        residual, norm = attended(exact(hidden[own]), nothing, weights)
        same(found.residual[own], residual)
        same(found.normed[own], norm)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("sequences", "past"), [(1, 0), (1, 6), (3, 4)])
def test_decode(heads: int, kv_heads: int, sequences: int, past: int) -> None:
    """The cache has room for two more than it holds; what lies there is not looked at."""
    weights = attention(24, heads, kv_heads, 8)
    hidden = some(sequences, 24)
    keys, values = (some(sequences, kv_heads, past + 3, 8, seed=seed) for seed in (1, 2))
    keys[:, :, past:] = torch.nan
    values[:, :, past:] = torch.nan
    found = ops.decode(hidden, keys, values, past, weights)
    for one in range(sequences):
        before = [exact(kept[one, :, :past].transpose(0, 1)) for kept in (keys, values)]
        residual, norm = attended(exact(hidden[one : one + 1]), before, weights)
        same(found.residual[one : one + 1], residual)
        same(found.normed[one : one + 1], norm)
    assert torch.equal(keys[:, :, past : past + 1], found.keys)
    assert torch.equal(values[:, :, past : past + 1], found.values)
    assert torch.isnan(keys[:, :, past + 1 :]).all()


def test_a_prompt_is_the_same_at_once_and_token_by_token() -> None:
    weights, hidden = attention(24, 4, 2, 8), some(6, 24)
    whole = ops.prefill(hidden, 1, weights)
    keys, values = torch.zeros(1, 2, 6, 8), torch.zeros(1, 2, 6, 8)
    for token in range(6):
        one = ops.decode(hidden[token : token + 1], keys, values, token, weights)
        same(one.residual, exact(whole.residual[token : token + 1]))
    same(keys, exact(whole.keys))


@given(tokens=st.integers(1, 9), experts=st.integers(1, 20), data=st.data())
@settings(max_examples=20)
def test_the_gate(tokens: int, experts: int, data: Any) -> None:
    top_k = data.draw(st.integers(1, experts))
    rows, weight = some(tokens, 16), some(experts, 16, seed=3)
    weights, ids = ops.gate(rows, weight, top_k)
    likely = softmax(exact(rows) @ exact(weight).T)
    order = np.argsort(-likely, axis=1)[:, :top_k]
    assert ids.tolist() == order.tolist()
    chosen = np.take_along_axis(likely, order, axis=1)
    same(weights, chosen / chosen.sum(1, keepdims=True))


@given(tokens=st.integers(1, 9), top_k=st.integers(1, 8))
@settings(max_examples=20)
def test_combining(tokens: int, top_k: int) -> None:
    residual, results, weights = some(tokens, 16), some(tokens, top_k, 16), some(tokens, top_k)
    truth = exact(residual) + (exact(weights)[..., None] * exact(results)).sum(1)
    same(ops.combine(residual, results, weights), truth)


def test_the_head() -> None:
    hidden, norm, weight = some(7, 16), some(16), some(50, 16)
    truth = (normed(exact(hidden), exact(norm)) @ exact(weight).T).argmax(1)
    assert ops.head(hidden, norm, weight).tolist() == truth.tolist()


def test_eight_bits_take_rows_that_the_kernel_reads_to_their_end_only() -> None:
    with pytest.raises(RuntimeError, match="rows of 100 weights of 8 bits; multiples of 16 are"):
        ops.int8(torch.ones(4, 100))
    assert ops.int8(torch.ones(4, 112)).values.shape == (4, 112)
