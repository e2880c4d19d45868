"""How long the attention of one layer takes on the lane `gpu`, by tokens and by context.

There is a series for each number of new tokens, over the tokens attended to, summed over the new
ones: `attention/gpu/prefill/<shape>/<tokens>` divides the same tokens among prompts of different
lengths (n tokens attend to n (n + 1) / 2), `attention/gpu/decode/<shape>/<sequences>` has caches of
different lengths. The shape is `<hidden>-<heads>-<kv_heads>-<head_dim>`. Together they say what
norms and projections take, and what each token takes that is attended to (`split`).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from moesim.calibrate.fit import MISSES, USUAL, worst
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
)
from moesim.errors import CalibrationError
from moesim.model import GroupedQuery, ModelSpec
from moesim.profile import AttentionTable
from moesim.real.operations import Attention, decode, prefill
from moesim.types import FloatArray

PROMPTS = {16: (1,), 64: (1,), 256: (1, 4), 1024: (1, 4, 16), 4096: (1, 4, 16)}
"""New tokens of a prefill, and among how many prompts they are divided."""
QUICK_PROMPTS = {32: (1,), 512: (1, 4)}
APART = 2
"""Prompts among which tokens are divided for a held-out point, where there is more than one."""
SEQUENCES = (1, 4, 16, 64)
QUICK_SEQUENCES = (1, 8)
CONTEXTS = {128: False, 512: False, 1024: True, 2048: False, 4096: False}
"""Tokens that a sequence attends to in decode, its own included, and whether that is held out."""
QUICK_CONTEXTS = {128: False, 1024: True, 2048: False}


LONGEST = 3.0
"""As `sweeps.LONGEST`, for prompts: a series of one point says nothing of the context."""


class Split(NamedTuple):
    """Times as a base by tokens, and a rate per token attended to, for each phase."""

    tokens: FloatArray
    """Ascending."""
    base_ns: FloatArray
    """(tokens,): norms and projections."""
    prefill_ns_per_attended: float
    decode_ns_per_attended: float
    residuals: FloatArray
    """(fitted points,): (fitted - measured) / measured."""
    held_out: FloatArray
    """(held-out points,): likewise."""

    @property
    def error(self) -> float:
        """The largest relative error of a held-out point; of a fitted one if none was held out."""
        return worst(self.residuals, self.held_out)

    @property
    def misses(self) -> bool:
        """Whether it is farther off than a fit may be."""
        return self.error > MISSES


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
            run = partial(prefill_series, shape=shape, tokens=tokens, divided=divided)
            name = series_name("prefill", shape, tokens)
            found.append(Task(name, bench.limits.seconds * points, run))
        for count in sequences:
            run = partial(decode_series, shape=shape, sequences=count, contexts=contexts)
            name = series_name("decode", shape, count)
            found.append(Task(name, bench.limits.seconds * len(contexts), run))
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
    bench: Bench, shape: tuple[int, int, int, int], tokens: int, divided: Sequence[int]
) -> Series:
    """Return the times of a prefill of so many tokens, divided among different numbers of prompts.

    `divided` holds those that are fitted; if there are several, `APART` is held out.
    """
    import torch

    rows = placed(bench, "gpu", noise(tokens, shape[0], dtype=torch.bfloat16))
    buffers = copies(bench, "gpu", made(shape))
    apart = (APART,) if len(divided) > 1 else ()
    prompts = {prompt_pairs(tokens, count): count for count in (*divided, *apart)}
    sizes = sorted(Size(pairs, count in apart) for pairs, count in prompts.items())

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
    cache = noise(sequences, shape[2], wanted[-1], shape[3], dtype=dtype)
    kept = copies(bench, "gpu", (cache, cache), taken)
    sizes = [Size(sequences * context, contexts[context]) for context in wanted]

    def prepare(attended: int) -> Call:
        past = attended // sequences - 1

        def call(k: int) -> object:
            keys, values = kept(k)
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


def split(found: Sequence[Series]) -> Split:
    """Fit `base(tokens) + rate of the phase * attended` to the series of one shape.

    By relative error, and linearly beyond a few percent, as `fit` does. Held-out points are only
    judged.

    Raises CalibrationError if a phase has no number of tokens with two different contexts, without
    which its rate cannot be told from the base.
    """
    from scipy.optimize import least_squares

    for phase in ("prefill", "decode"):
        own = [one for one in found if one.facts["phase"] == phase]
        if not any(len({p.at for p in one.points if not p.held_out}) > 1 for one in own):
            raise CalibrationError(f"in {phase} no number of tokens was measured with two contexts")
    tokens = np.unique([tokens_of(one) for one in found if any(not p.held_out for p in one.points)])

    def rows(held_out: bool) -> tuple[FloatArray, FloatArray]:
        """Return what multiplies bases and rates, (points, tokens + 2), and times."""
        lines, ns = [], []
        for one in found:
            for point in one.points:
                if point.held_out == held_out and tokens_of(one) in tokens:
                    line = np.zeros(len(tokens) + 2)
                    line[np.searchsorted(tokens, tokens_of(one))] = 1
                    line[-2 if one.facts["phase"] == "prefill" else -1] = point.at
                    lines.append(line)
                    ns.append(point.ns)
        return np.array(lines).reshape(-1, len(tokens) + 2), np.array(ns, np.float64)

    at, ns = rows(held_out=False)
    start = np.maximum(np.linalg.lstsq(at / ns[:, None], np.ones(len(ns)), rcond=None)[0], 0)
    # Each is searched for in units of what it alone would make of the smallest time that it is in.
    alone = np.min(np.divide(ns[:, None], at, out=np.full(at.shape, np.inf), where=at > 0), axis=0)
    scaled = at * alone / ns[:, None]
    best = least_squares(
        lambda values: scaled @ values - 1,
        np.clip(start / alone, 1e-6, 1e6),
        jac=lambda _: scaled,
        bounds=(0, np.inf),
        loss="soft_l1",
        f_scale=USUAL,
        xtol=1e-12,
        ftol=1e-12,
    )
    values = best.x * alone
    apart, truth = rows(held_out=True)
    return Split(
        tokens=tokens,
        base_ns=values[:-2],
        prefill_ns_per_attended=float(values[-2]),
        decode_ns_per_attended=float(values[-1]),
        residuals=at @ values / ns - 1,
        held_out=apart @ values / truth - 1,
    )


def tokens_of(series: Series) -> float:
    """Return how many new tokens a series has."""
    return float(series.facts["tokens"])


def table(
    found: Sequence[Series], date: str = "", versions: Mapping[str, str] | None = None
) -> tuple[AttentionTable, Split]:
    """Return the table of one shape for a profile, and the fit that it is.

    A base that is nothing beside the shortest time of its tokens is left out: there attending
    takes it all.

    Raises CalibrationError as `split` does, and where a phase's times hardly grow with the context,
    so that its rate would be noise.
    """
    own = split(found)
    rates = own.prefill_ns_per_attended, own.decode_ns_per_attended
    for phase, rate in zip(("prefill", "decode"), rates, strict=True):
        if max(growth(one, rate) for one in found if one.facts["phase"] == phase) < USUAL:
            raise CalibrationError(
                f"times of {phase} hardly grow with the context; {rate:.3g} ns per token is noise"
            )
    least_ns = {
        tokens: min(p.ns for one in found if tokens_of(one) == tokens for p in one.points)
        for tokens in own.tokens
    }
    points = tuple(
        (int(tokens), float(ns))
        for tokens, ns in zip(own.tokens, own.base_ns, strict=True)
        if ns > USUAL * least_ns[tokens]
    )
    if not points:
        raise CalibrationError("attending takes all of the time; nothing is left for projections")
    facts = found[0].facts
    note = (
        f"attention of one layer, bfloat16, positions not rotated; base and rates fitted, "
        f"{100 * own.error:.1f} % off at {'held-out' if len(own.held_out) else 'fitted'} points"
    )
    return AttentionTable(
        hidden=int(facts["hidden"]),
        heads=int(facts["heads"]),
        kv_heads=int(facts["kv_heads"]),
        head_dim=int(facts["head_dim"]),
        points=points,
        prefill_ns_per_attended=rates[0],
        decode_ns_per_attended=rates[1],
        provenance=provenance(found, note, date, versions or {}),
    ), own


def growth(series: Series, rate: float) -> float:
    """Return how much of a series' longest time it has above its shortest, by a rate."""
    at = [point.at for point in series.points if not point.held_out]
    if not at:
        return 0.0
    return rate * (max(at) - min(at)) / max(point.ns for point in series.points)
