"""The operations of one layer, as plain functions on the tensors that they are given.

They run wherever those tensors lie, keep nothing and choose no device. Activations are rows, one
per token, in the precision of the weights that are no packed ones. Positions are not rotated: that
is one more pass over queries and keys, small beside the projections.
"""

from typing import Any, NamedTuple

EPSILON = 1e-6
GROUP = 64
"""Inputs of a 4-bit weight that share a scale and a zero point, as in `moesim.model`."""


class Int8(NamedTuple):
    """Weights of 8 bits, (outputs, inputs), with a scale per output (outputs,)."""

    values: Any
    scales: Any


class Int4(NamedTuple):
    """Weights of 4 bits as PyTorch's kernel for processors packs them.

    `scales_zeros` is (inputs / GROUP, outputs, 2): a weight q of 0..15 is `(q - 8) scale + zero`.
    """

    packed: Any
    scales_zeros: Any


class Attention(NamedTuple):
    """Weights of grouped-query attention and of the norms before and behind it."""

    norm: Any
    """(hidden,)."""
    qkv: Any
    """((heads + 2 kv_heads) head_dim, hidden): queries, keys, values."""
    out: Any
    """(hidden, heads head_dim)."""
    next_norm: Any
    """(hidden,): of what router and experts read."""
    heads: int
    kv_heads: int
    head_dim: int


class Attended(NamedTuple):
    """What attention leaves behind."""

    residual: Any
    """(tokens, hidden): the stream that later results are added to."""
    normed: Any
    """(tokens, hidden): the same, normalised, for router and experts."""
    keys: Any
    """(sequences, kv_heads, tokens of each, head_dim), of the new tokens; likewise `values`."""
    values: Any


def int8(weight: Any) -> Int8:
    """Return a weight (outputs, inputs) rounded to 8 bits, symmetric about 0.

    Raises RuntimeError unless `inputs` is a multiple of 16: PyTorch's kernel for processors does
    not refuse others, it reads beyond their end.
    """
    import torch

    if weight.shape[1] % 16:
        raise RuntimeError(
            f"rows of {weight.shape[1]} weights of 8 bits; multiples of 16 are legal"
        )
    scales = (weight.float().abs().amax(1).clamp(min=1e-12) / 127).to(torch.bfloat16)
    values = (weight.float() / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return Int8(values, scales)


def int4(weight: Any) -> Int4:
    """Return a weight (outputs, inputs) rounded to 4 bits, in groups of `GROUP` inputs.

    Raises RuntimeError where the kernel takes no such shape: `outputs` is a multiple of 16.
    """
    import torch

    outputs, inputs = weight.shape
    groups = weight.float().reshape(outputs, inputs // GROUP, GROUP)
    low, high = groups.amin(2), groups.amax(2)
    scales = ((high - low).clamp(min=1e-12) / 15).to(torch.bfloat16)
    zeros = (low + 8 * scales.float()).to(torch.bfloat16)
    # Rounded with the scales and zero points that the kernel will read, not with exact ones.
    steps = (groups - zeros.float()[..., None]) / scales.float()[..., None]
    whole = (steps + 8).round().clamp(0, 15).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole.reshape(outputs, inputs), 1)
    return Int4(packed, torch.stack([scales, zeros], dim=2).transpose(0, 1).contiguous())


def linear(rows: Any, weight: Any) -> Any:
    """Return (tokens, outputs): rows times a weight (outputs, inputs), plain or packed.

    Packed weights need PyTorch's own kernel on their device; RuntimeError where there is none.
    """
    import torch

    if isinstance(weight, Int8):
        return torch._weight_int8pack_mm(rows, weight.values, weight.scales)
    if isinstance(weight, Int4):
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, weight.packed, GROUP, weight.scales_zeros
        )
    return torch.nn.functional.linear(rows, weight)


def expert(rows: Any, gate_up: Any, down: Any) -> Any:
    """Return (tokens, hidden): a SwiGLU FFN, `down (silu(gate x) * up x)`.

    `gate_up` is (2 width, hidden), the gate first, and `down` (hidden, width). A shared expert is
    one of another width.
    """
    import torch

    gate, up = linear(rows, gate_up).chunk(2, dim=-1)
    return linear(torch.nn.functional.silu(gate) * up, down)


def rms_norm(rows: Any, weight: Any) -> Any:
    """Return (tokens, hidden): rows of mean square 1, times the weight (hidden,)."""
    import torch

    return torch.nn.functional.rms_norm(rows, weight.shape, weight, EPSILON)


def prefill(hidden: Any, sequences: int, weights: Attention) -> Attended:
    """Return what attention makes of prompts of one length, each token seeing those before it.

    `hidden` is (sequences x tokens of each, hidden), one prompt after the other.
    """
    import torch

    queries, keys, values = (part.transpose(1, 2) for part in projected(hidden, sequences, weights))
    seen = torch.nn.functional.scaled_dot_product_attention(
        queries, keys, values, is_causal=True, enable_gqa=weights.heads > weights.kv_heads
    )
    return finished(hidden, seen.transpose(1, 2), keys, values, weights)


def decode(hidden: Any, keys: Any, values: Any, past: int, weights: Attention) -> Attended:
    """Return what attention makes of one new token per sequence, `hidden` (sequences, hidden).

    `keys` and `values`, (sequences, kv_heads, at least past + 1, head_dim), hold `past` tokens;
    those of the new token are written behind them, and it sees past + 1.
    """
    import torch

    sequences = len(hidden)
    queries, own_keys, own_values = projected(hidden, sequences, weights)
    keys[:, :, past] = own_keys[:, 0]
    values[:, :, past] = own_values[:, 0]
    # The heads of a group read the same keys: to the kernel they are queries of one head.
    grouped = queries.view(sequences, weights.kv_heads, -1, weights.head_dim)
    seen = torch.nn.functional.scaled_dot_product_attention(
        grouped, keys[:, :, : past + 1], values[:, :, : past + 1]
    )
    new_keys, new_values = own_keys.transpose(1, 2), own_values.transpose(1, 2)
    return finished(hidden, seen, new_keys, new_values, weights)


def projected(hidden: Any, sequences: int, weights: Attention) -> tuple[Any, Any, Any]:
    """Return queries, keys and values, each (sequences, tokens of each, heads, head_dim)."""
    rows = linear(rms_norm(hidden, weights.norm), weights.qkv)
    heads = rows.view(sequences, -1, weights.heads + 2 * weights.kv_heads, weights.head_dim)
    queries, keys, values = heads.split([weights.heads, weights.kv_heads, weights.kv_heads], dim=2)
    return queries.contiguous(), keys, values


def finished(hidden: Any, seen: Any, keys: Any, values: Any, weights: Attention) -> Attended:
    """Return the output projection of what was attended to, added to the stream, and its norm."""
    residual = hidden + linear(seen.reshape(len(hidden), -1), weights.out)
    return Attended(residual, rms_norm(residual, weights.next_norm), keys, values)


def gate(rows: Any, weight: Any, top_k: int) -> tuple[Any, Any]:
    """Return weights that sum to 1, and ids, (tokens, top_k) each, of the likeliest experts.

    `weight` is the router's, (experts, hidden); probabilities are computed in 32 bits.
    """
    import torch

    likely = torch.softmax(linear(rows, weight), dim=-1, dtype=torch.float32)
    chosen, ids = likely.topk(top_k, dim=-1)
    return chosen / chosen.sum(-1, keepdim=True), ids


def combine(residual: Any, results: Any, weights: Any) -> Any:
    """Return (tokens, hidden): the stream and the weighted sum of its experts' results.

    `results` is (tokens, top_k, hidden) and `weights` (tokens, top_k), in the same precision.
    """
    import torch

    return torch.baddbmm(residual[:, None], weights[:, None], results)[:, 0]


def add_up(sums: Any, rounded: Any, index: Any, results: Any, weights: Any) -> None:
    """Add an expert's results (its tokens, hidden), weighed, to rows of sums, and round these.

    `index` are the rows (its tokens,), `weights` (its tokens,); `sums` is (tokens, hidden) in 32
    bits and `rounded` the same in the precision of activations.
    """
    sums.index_add_(0, index, results.float() * weights.float()[:, None])
    rounded.index_copy_(0, index, sums.index_select(0, index).to(rounded.dtype))


def head(hidden: Any, norm: Any, weight: Any) -> Any:
    """Return (sequences,): the likeliest next token; `weight` is (vocabulary, hidden)."""
    return linear(rms_norm(hidden, norm), weight).argmax(-1)
