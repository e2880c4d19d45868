"""How long the rest of a layer takes on the lane `gpu`: router, FFN, combining, head.

Series are named `gate/gpu/<hidden>x<experts>`, `ffn/gpu/<hidden>x<width>`,
`combine/gpu/<hidden>x<top_k>` and `head/gpu/<hidden>x<vocabulary>`, all in bfloat16. Attention has
a file of its own, and its tasks are among those of this one.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from moesim.calibrate import attention, experts
from moesim.calibrate.series import Bench, Series, Task
from moesim.calibrate.sweeps import Call, Size, copies, grid, noise, placed, sweep, sweep_seconds
from moesim.model import ModelSpec
from moesim.real import operations

QUICK_TOKENS = grid([1 << k for k in range(9)], [12, 48, 192])
"""Closer than those of experts: small operations change their kernels in between."""
SEQUENCES = grid([1, 4, 16, 64], [8, 32])
QUICK_SEQUENCES = grid([1, 8, 32], [16])


def tasks(bench: Bench, models: Sequence[ModelSpec]) -> list[Task]:
    """Return what is to be measured for these models, each shape once; nothing without a device.

    Of routers that differ in top_k only, the first model's is measured.
    """
    if "gpu" not in bench.device.lanes:
        return []
    tokens = QUICK_TOKENS if bench.quick else experts.TOKENS
    sequences = QUICK_SEQUENCES if bench.quick else SEQUENCES
    found: dict[str, Task] = {}

    def add(name: str, run: Callable[..., Series], sizes: Sequence[Size], **shape: int) -> None:
        seconds = sweep_seconds(bench, len(sizes))
        task = Task(name, seconds, partial(run, name=name, sizes=sizes, **shape))
        found.setdefault(name, task)

    for model in models:
        hidden, top_k = model.hidden, model.top_k
        routed = model.experts + model.weightless_experts
        name = f"gate/gpu/{hidden}x{routed}"
        add(name, gate, tokens, hidden=hidden, experts=routed, top_k=top_k)
        for width in {model.shared_width, model.dense_width} - {0}:
            add(f"ffn/gpu/{hidden}x{width}", ffn, tokens, hidden=hidden, width=width)
        add(f"combine/gpu/{hidden}x{top_k}", combine, tokens, hidden=hidden, top_k=top_k)
        add(f"head/gpu/{hidden}x{model.vocab}", head, sequences, hidden=hidden, vocab=model.vocab)
    return [*attention.tasks(bench, models), *(found[name] for name in sorted(found))]


def gate(
    bench: Bench, name: str, sizes: Sequence[Size], hidden: int, experts: int, top_k: int
) -> Series:
    """Return the times of a router by tokens."""
    return by_tokens(
        bench, name, sizes, [(hidden,)], [(experts, hidden)],
        lambda rows, weights: operations.gate(rows[0], weights[0], top_k),
        {"hidden": hidden, "experts": experts, "top_k": top_k},
    )  # fmt: skip


def ffn(bench: Bench, name: str, sizes: Sequence[Size], hidden: int, width: int) -> Series:
    """Return the times of a layer's shared experts together, or of a dense layer, by tokens."""
    return by_tokens(
        bench, name, sizes, [(hidden,)], [(2 * width, hidden), (hidden, width)],
        lambda rows, weights: operations.expert(rows[0], weights[0], weights[1]),
        {"hidden": hidden, "width": width},
    )  # fmt: skip


def combine(bench: Bench, name: str, sizes: Sequence[Size], hidden: int, top_k: int) -> Series:
    """Return the times of adding up the experts' results, by tokens; these were just written."""
    return by_tokens(
        bench, name, sizes, [(hidden,), (top_k, hidden), (top_k,)], [],
        lambda rows, _: operations.combine(rows[0], rows[1], rows[2]),
        {"hidden": hidden, "top_k": top_k},
    )  # fmt: skip


def head(bench: Bench, name: str, sizes: Sequence[Size], hidden: int, vocab: int) -> Series:
    """Return the times of the last norm, the logits and their largest, by sequences."""
    return by_tokens(
        bench, name, sizes, [(hidden,)], [(hidden,), (vocab, hidden)],
        lambda rows, weights: operations.head(rows[0], weights[0], weights[1]),
        {"hidden": hidden, "vocab": vocab},
    )  # fmt: skip


def by_tokens(
    bench: Bench,
    name: str,
    sizes: Sequence[Size],
    rows: Sequence[tuple[int, ...]],
    weights: Sequence[tuple[int, ...]],
    operation: Callable[[Sequence[Any], Sequence[Any]], object],
    shape: dict[str, float | str],
) -> Series:
    """Return the times of an operation by tokens: on so many rows, and on rotating weights.

    `rows` are the shapes of what it reads per token, `weights` those of its weights.
    """
    import torch

    most = max(size.at for size in sizes)
    given = placed(bench, "gpu", tuple(noise(most, *row, dtype=torch.bfloat16) for row in rows))
    own = tuple(noise(*one, dtype=torch.bfloat16, scale=one[-1] ** -0.5) for one in weights)
    buffers = copies(bench, "gpu", own)

    def prepare(tokens: int) -> Call:
        first = [row[:tokens] for row in given]
        return lambda k: operation(first, buffers(k))

    points, facts = sweep(bench, "gpu", sizes, prepare)
    return Series(
        name=name,
        unit="tokens",
        points=points,
        facts={**shape, "dtype": "bfloat16", **buffers.facts, **facts},
    )
