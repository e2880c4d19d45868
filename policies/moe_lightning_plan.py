"""MoE-Lightning's policy solver: how many sequences, in how many micro-batches, with which share.

The formulas of the released `fastmoe/backend/optimizer.py` and `utils.py`, in bytes, operations and
seconds. Its linear program has one free variable, the share of the experts on the GPU, of which
more is never worse: so the largest share that fits is its optimum.
"""

from collections.abc import Iterator
from typing import NamedTuple

GPU_SHARE, HOST_SHARE = 0.86, 0.80
"""How much of either memory may be filled."""
WORKSPACE = 1.2
"""What the fused kernel needs over its operands."""
FINE, STRIDE = 4, 32
"""Micro-batches of 1, 2, 3 and 4 sequences are tried, and then every 32nd size."""
MOST = 1 << 18
"""Larger micro-batches are not tried, which small models on large machines could have."""


class Problem(NamedTuple):
    """A model on a machine, the length of its prompts, and how much is generated."""

    layers: int
    experts: int
    top_k: int
    hidden: int
    width: int
    heads: int
    kv_width: int
    """Elements of one token's keys in one layer; its values have as many."""
    layer_bytes: int
    """All experts of one layer."""
    dense_bytes: int
    """All weights outside the experts, which are on the GPU."""
    prompt: float
    generate: float
    gpu_bytes: float
    host_bytes: float
    link_bytes_per_s: float
    gpu_bytes_per_s: float
    host_bytes_per_s: float
    gpu_flops_per_s: float
    host_flops_per_s: float


class Solution(NamedTuple):
    """A policy, and what one layer of a decode step takes each device."""

    size: int
    """Sequences of a micro-batch."""
    batches: int
    """Micro-batches."""
    share: float
    """Of every layer's experts on the GPU."""
    copy_s: float
    gpu_s: float
    host_s: float

    @property
    def sequences(self) -> int:
        """Sequences served at once."""
        return self.size * self.batches

    @property
    def layer_s(self) -> float:
        """All three run side by side."""
        return max(self.copy_s, self.gpu_s, self.host_s)


def attention_bytes(problem: Problem, sequences: int, queries: float, context: float) -> float:
    """Return what attention reads and writes: queries and results, keys and values."""
    return sequences * (4 * queries * problem.hidden + 4 * context * problem.kv_width)


def attention_flops(problem: Problem, sequences: int, queries: float, context: float) -> float:
    """Return the operations of one product over the context, and of the softmax."""
    return 2 * sequences * queries * context * (problem.hidden + problem.heads)


def experts_s(problem: Problem, tokens: float) -> float:
    """Return what one layer's experts take the GPU for a micro-batch of tokens."""
    flops = 6 * tokens * problem.hidden * problem.width * problem.top_k
    moved = 2 * tokens * (problem.hidden + problem.width) + problem.layer_bytes
    return max(flops / problem.gpu_flops_per_s, moved / problem.gpu_bytes_per_s)


def workspace_bytes(problem: Problem, size: int, sequences: int) -> float:
    """Return the GPU memory for activations: of a prefill, if its micro-batches need more.

    The residual of all sequences stays on the GPU; keys and values have two buffers.
    """
    tokens = size * problem.prompt
    decode = 4 * problem.hidden * sequences
    prefill = 4 * problem.hidden * tokens + 2 * problem.hidden * sequences * problem.prompt
    prefill += 8 * problem.kv_width * tokens
    kernel = 2 * WORKSPACE * tokens * problem.top_k * (problem.hidden + 3 * problem.width)
    return max(decode, prefill) + kernel


def largest_share(problem: Problem, room_bytes: float) -> float | None:
    """Return the share of the experts that fits, with two layers of buffers for the rest."""
    resident = problem.layer_bytes * problem.layers
    buffers = 2 * problem.layer_bytes
    if resident <= room_bytes:
        return 1.0
    if buffers > room_bytes:
        return None
    return (room_bytes - buffers) / (resident - buffers)


def evaluate(problem: Problem, size: int, batches: int) -> Solution | None:
    """Return what `batches` micro-batches of `size` sequences take, or None if they do not fit."""
    sequences = size * batches
    context = problem.prompt + problem.generate
    room = GPU_SHARE * problem.gpu_bytes - problem.dense_bytes
    share = largest_share(problem, room - workspace_bytes(problem, size, sequences))
    if share is None:
        return None
    pinned_layers = problem.layers + 2
    home = problem.layer_bytes * (1 - share) * pinned_layers
    home += 4 * context * problem.kv_width * sequences * problem.layers
    home += 2 * problem.hidden * sequences * problem.prompt
    if home > HOST_SHARE * problem.host_bytes:
        return None
    flops = attention_flops(problem, size, 1, context) / problem.host_flops_per_s
    moved = attention_bytes(problem, size, 1, context) / problem.host_bytes_per_s
    return Solution(
        size=size,
        batches=batches,
        share=share,
        copy_s=problem.layer_bytes * (1 - share) / problem.link_bytes_per_s,
        gpu_s=batches * experts_s(problem, size),
        host_s=batches * max(flops, moved),
    )


def tokens_per_s(problem: Problem, solution: Solution) -> float:
    """Return what the solver maximises: all generated tokens over the time of the decode steps."""
    steps = max(1.0, problem.generate - 1)
    return solution.sequences * problem.generate / (solution.layer_s * steps * problem.layers)


def prefill_s(problem: Problem, solution: Solution) -> float:
    """Return what one layer of the prefill takes, all of it computed on the GPU."""
    prompt, hidden = problem.prompt, problem.hidden
    moved = problem.layer_bytes * (1 - solution.share)
    moved += 2 * solution.sequences * prompt * hidden
    flops = attention_flops(problem, solution.size, prompt, prompt) / problem.gpu_flops_per_s
    read = attention_bytes(problem, solution.size, prompt, prompt) / problem.gpu_bytes_per_s
    one = experts_s(problem, solution.size * prompt) + max(flops, read)
    return max(moved / problem.link_bytes_per_s, solution.batches * one)


def improving(problem: Problem, size: int) -> Iterator[Solution]:
    """Yield ever more micro-batches of a size while they fit and the throughput does not fall."""
    batches, before = 1, 0.0
    while (found := evaluate(problem, size, batches)) is not None:
        if tokens_per_s(problem, found) < before:
            return
        before = tokens_per_s(problem, found)
        yield found
        batches += 1


def solve(problem: Problem) -> Solution | None:
    """Return the best policy of the released search, or None if nothing fits.

    Of equally good ones the last found, with the larger micro-batches, as there.
    """
    best: Solution | None = None
    size = 1
    while size <= MOST and evaluate(problem, size, 1) is not None:
        for found in improving(problem, size):
            if best is None or tokens_per_s(problem, found) >= tokens_per_s(problem, best):
                best = found
        size += 1 if size < FINE else STRIDE
    return best
