"""How long the attention of one layer takes on the lane `gpu`, by tokens and by context.

There is a series for each number of new tokens, over the tokens attended to, summed over the new
ones: `attention/gpu/prefill/<shape>/<tokens>` divides the same tokens among prompts of different
lengths (n tokens attend to n (n + 1) / 2), `attention/gpu/decode/<shape>/<sequences>` has caches of
different lengths. The shape is `<hidden>-<heads>-<kv_heads>-<head_dim>`. A line through each says
what norms and projections take, and what each token takes that is attended to (`rows`).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from moesim.calibrate.fit import fit_line, worst
from moesim.calibrate.series import Bench, Series, Task
from moesim.calibrate.sweeps import (
    Call,
    Size,
    copies,
    noise,
    placed,
    provenance,
    room_bytes,
    set_bytes,
    sweep,
    sweep_seconds,
)
from moesim.errors import CalibrationError
from moesim.model import GroupedQuery, ModelSpec
from moesim.profile import AttentionTable
from moesim.real.caches import heads_first
from moesim.real.operations import Attention, decode, prefill
from moesim.types import FloatArray

PHASES = ("prefill", "decode")
PROMPTS = {16: (1,), 64: (1,), 256: (1, 4), 512: (1, 4), 1024: (1, 4, 16), 4096: (1, 4, 16)}
"""New tokens of a prefill, and among how many prompts they are divided."""
QUICK_PROMPTS = {32: (1,), 512: (1, 4)}
APART = 2
"""Prompts among which tokens are divided for a held-out point, where there is more than one."""
SEQUENCES = (1, 4, 8, 16, 64)
QUICK_SEQUENCES = (1, 8)
APART_TOKENS = 512
APART_SEQUENCES = 8
"""Numbers of tokens that lie between the others: all of their points are held out."""
CONTEXTS = {128: False, 512: False, 1024: True, 2048: False, 4096: False}
"""Tokens that a sequence attends to in decode, its own included, and whether that is held out."""
QUICK_CONTEXTS = {128: False, 1024: True, 2048: False}


LONGEST = 3.0
"""As `sweeps.LONGEST`, for prompts: a series of one point says nothing of the context."""


class Row(NamedTuple):
    """What so many new tokens take: `ns`, and `per_attended_ns` for each token attended to."""

    tokens: int
    ns: float
    per_attended_ns: float


class Judged(NamedTuple):
    """A table for a profile, and how far it is off."""

    table: AttentionTable
    residuals: dict[str, FloatArray]
    """By phase, (fitted points,): (fitted - measured) / measured."""
    held_out: dict[str, FloatArray]
    """By phase, (held-out points,): likewise."""
    off: dict[str, float]
    """By phase, the largest relative error at a held-out point, or at a fitted one without any."""


def shape_of(model: ModelSpec) -> tuple[int, int, int, int]:
    """Return hidden, heads, kv_heads and head_dim.

    Raises CalibrationError for latent attention, which is not measured.
    """
    own = model.attention
    if not isinstance(own, GroupedQuery):
        raise CalibrationError(
            f"{model.name} has latent attention, which is not measured; only grouped-query is"
        )
    return model.hidden, own.heads, own.kv_heads, own.head_dim


def tasks(bench: Bench, models: Sequence[ModelSpec]) -> list[Task]:
    """Return what is to be measured for these models, each shape once; nothing without a device.

    Models with latent attention are left out: see `shape_of`.
    """
    if "gpu" not in bench.device.lanes:
        return []
    prompts = QUICK_PROMPTS if bench.quick else PROMPTS
    sequences = QUICK_SEQUENCES if bench.quick else SEQUENCES
    contexts = QUICK_CONTEXTS if bench.quick else CONTEXTS
    shapes = {shape_of(m) for m in models if isinstance(m.attention, GroupedQuery)}
    found = []
    for shape in sorted(shapes):
        for tokens, divided in prompts.items():
            points = len(divided) + (len(divided) > 1)
            apart = not bench.quick and tokens == APART_TOKENS
            run = partial(
                prefill_series, shape=shape, tokens=tokens, divided=divided, held_out=apart
            )
            name = series_name("prefill", shape, tokens)
            found.append(Task(name, sweep_seconds(bench, points), run))
        for count in sequences:
            apart = not bench.quick and count == APART_SEQUENCES
            own = {context: apart or held_out for context, held_out in contexts.items()}
            run = partial(decode_series, shape=shape, sequences=count, contexts=own)
            name = series_name("decode", shape, count)
            found.append(Task(name, sweep_seconds(bench, len(contexts)), run))
    return found


def series_name(phase: str, shape: tuple[int, int, int, int], tokens: int) -> str:
    """Return the name of a series."""
    return f"attention/gpu/{phase}/{'-'.join(map(str, shape))}/{tokens}"


def made(shape: tuple[int, int, int, int]) -> Attention:
    """Return weights of a shape in host memory."""
    import torch

    hidden, heads, kv_heads, head_dim = shape
    inner, dtype = heads * head_dim, torch.bfloat16
    return Attention(
        norm=torch.ones(hidden, dtype=dtype),
        qkv=noise((heads + 2 * kv_heads) * head_dim, hidden, dtype=dtype, scale=hidden**-0.5),
        out=noise(hidden, inner, dtype=dtype, scale=inner**-0.5),
        next_norm=torch.ones(hidden, dtype=dtype),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )


def prefill_series(
    bench: Bench, shape: tuple[int, int, int, int], tokens: int, divided: Sequence[int],
    held_out: bool = False,
) -> Series:  # fmt: skip
    """Return the times of a prefill of so many tokens, divided among different numbers of prompts.

    `divided` holds those that are fitted, unless all are held out; if there are several, `APART`
    is held out, too.
    """
    import torch

    rows = placed(bench, "gpu", noise(tokens, shape[0], dtype=torch.bfloat16))
    buffers = copies(bench, "gpu", made(shape))
    apart = (APART,) if len(divided) > 1 else ()
    prompts = {prompt_pairs(tokens, count): count for count in (*divided, *apart)}
    sizes = sorted(Size(pairs, held_out or count in apart) for pairs, count in prompts.items())

    def prepare(pairs: int) -> Call:
        return lambda k: prefill(rows, prompts[pairs], buffers(k))

    points, facts = sweep(bench, "gpu", sizes, prepare, LONGEST)
    return Series(
        name=series_name("prefill", shape, tokens),
        unit="attended",
        points=points,
        facts={**described("prefill", shape, tokens), **buffers.facts, **facts},
    )


def prompt_pairs(tokens: int, prompts: int) -> int:
    """Return how many tokens are attended to in prompts of one length that have `tokens` in all."""
    if tokens % prompts:
        raise CalibrationError(f"{tokens} tokens are not prompts of one length, {prompts} of them")
    length = tokens // prompts
    return prompts * length * (length + 1) // 2


def decode_series(
    bench: Bench, shape: tuple[int, int, int, int], sequences: int, contexts: Mapping[int, bool]
) -> Series:
    """Return the times of one token of each of so many sequences, by what they attend to together.

    `contexts` are what one attends to, itself included. Those whose cache has no room are left
    out, which a fact says.

    Raises CalibrationError if there is room for none.
    """
    import torch

    dtype = torch.bfloat16
    rows = placed(bench, "gpu", noise(sequences, shape[0], dtype=dtype))
    buffers = copies(bench, "gpu", made(shape))
    taken = set_bytes(buffers.sets) + set_bytes((rows,))
    token_bytes = 2 * 2 * shape[2] * shape[3]

    def fits(context: int) -> bool:
        size = sequences * context * token_bytes
        return size <= room_bytes(bench, "gpu", size, taken)

    wanted = [context for context in sorted(contexts) if fits(context)]
    left_out = [str(context) for context in sorted(contexts) if not fits(context)]
    if not wanted:
        raise CalibrationError(
            f"no room for keys and values of {sequences} sequences of {left_out[0]} tokens"
        )
    # Tokens first, as a run keeps them: the new ones are then one stretch.
    cache = noise(wanted[-1], 2, sequences, shape[2], shape[3], dtype=dtype)
    kept = copies(bench, "gpu", cache, taken)
    sizes = [Size(sequences * context, contexts[context]) for context in wanted]

    def prepare(attended: int) -> Call:
        past = attended // sequences - 1

        def call(k: int) -> object:
            keys, values = heads_first(kept(k))
            return decode(rows, keys, values, past, buffers(k))

        return call

    points, facts = sweep(bench, "gpu", sizes, prepare)
    if left_out:
        facts["left_out"] = f"contexts {', '.join(left_out)}: no room"
    return Series(
        name=series_name("decode", shape, sequences),
        unit="attended",
        points=points,
        facts={
            **described("decode", shape, sequences),
            **buffers.facts,
            "kv_bytes": set_bytes(kept.sets),
            "kv_buffers": len(kept.sets),
            **facts,
        },
    )


def described(phase: str, shape: tuple[int, int, int, int], tokens: int) -> dict[str, float | str]:
    """Return the facts that tell series apart."""
    hidden, heads, kv_heads, head_dim = shape
    return {
        "phase": phase,
        "tokens": tokens,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "dtype": "bfloat16",
    }


def rows(found: Sequence[Series]) -> tuple[Row, ...]:
    """Fit `ns + per attended token * tokens attended to` to each number of new tokens of a phase.

    Where only one context was measured, as for prompts that are too short to be divided, attending
    takes what it takes for the nearest number of tokens, and the rest is left for `ns`.

    Raises CalibrationError if no number of tokens has two contexts that are not held out.
    """
    lines, single = [], []
    for one in found:
        own = [p for p in one.points if not p.held_out]
        if len({p.at for p in own}) > 1:
            at, ns = np.array([(p.at, p.ns) for p in own], np.float64).T
            lines.append(Row(tokens_of(one), *map(float, fit_line(at, ns).parameters)))
        elif own:
            single.append((tokens_of(one), own[0]))
    if not lines:
        phase = found[0].facts["phase"] if found else "one phase"
        raise CalibrationError(f"in {phase} no number of tokens was measured with two contexts")
    for tokens, own_point in single:
        nearest = min(lines, key=lambda row: abs(np.log(row.tokens / tokens)))
        rate = min(nearest.per_attended_ns, own_point.ns / own_point.at)
        lines.append(Row(tokens, own_point.ns - rate * own_point.at, rate))
    return tuple(sorted(lines))


def tokens_of(series: Series) -> int:
    """Return how many new tokens a series has."""
    return int(series.facts["tokens"])


def judged(
    found: Sequence[Series], date: str = "", versions: Mapping[str, str] | None = None
) -> Judged:
    """Return the table of one shape for a profile, and how far it is from all that was measured.

    Raises CalibrationError as `rows` does, for either phase.
    """
    by_phase, residuals, held_out = {}, {}, {}
    for phase in PHASES:
        own = [one for one in found if one.facts["phase"] == phase]
        by_phase[phase] = rows(own)
        residuals[phase], held_out[phase] = (errors(own, by_phase[phase], a) for a in (False, True))
    off = {phase: worst(residuals[phase], held_out[phase]) for phase in PHASES}
    note = (
        "attention of one layer, bfloat16, positions not rotated; a line by context for each number"
        " of tokens, off at points held out by"
        f" {', '.join(f'{100 * error:.1f} % in {phase}' for phase, error in off.items())}"
    )
    facts = found[0].facts
    table = AttentionTable(
        hidden=int(facts["hidden"]),
        heads=int(facts["heads"]),
        kv_heads=int(facts["kv_heads"]),
        head_dim=int(facts["head_dim"]),
        prefill=by_phase["prefill"],
        decode=by_phase["decode"],
        provenance=provenance(found, note, date, versions or {}),
    )
    return Judged(table, residuals, held_out, off)


def errors(found: Sequence[Series], fitted: Sequence[Row], held_out: bool) -> FloatArray:
    """Return (points,): how far lines between rows are from points, relative to these."""
    tokens, ns, rates = np.array(fitted).T
    own = []
    for one in found:
        own_ns, rate = (np.interp(tokens_of(one), tokens, column) for column in (ns, rates))
        own += [
            float(own_ns + rate * point.at) / point.ns - 1
            for point in one.points
            if point.held_out == held_out
        ]
    return np.array(own)
