"""Tables of a profile: times as they were measured, and how far lines between them are off.

A table holds for its shape and precision only. What has none is simulated from the rates of a
section (`sections`); `rates_alone` says what that is worth.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from moesim.calibrate import attention, experts, plausible
from moesim.calibrate.calibration import Kept
from moesim.calibrate.fit import MISSES
from moesim.calibrate.memory import read_rate
from moesim.calibrate.series import Series, tabled
from moesim.calibrate.sweeps import provenance
from moesim.costs import build_costs
from moesim.errors import CalibrationError
from moesim.model import ModelSpec, packed_bytes
from moesim.profile import AttentionTable, ExpertTable, HardwareProfile, LayerTable, Tables
from moesim.types import BITS

VARIANTS = ("packed", "", "fp16")
"""What a series' name may end in: of one shape and precision, the first one makes the table."""
LAYER_KINDS = ("gate", "ffn", "combine", "head")


class Finding(NamedTuple):
    """One number of the new profile."""

    section: str
    what: str
    value: float
    unit: str
    """`ns`, `bytes`, `bytes_per_s`, `flops_per_s`, or `factor`."""
    spread: float | None = None
    """Of times: how far medians are above low quartiles; of factors: how far rounds lie apart."""
    error: float | None = None
    """The largest relative error of its fit at points held out."""
    points: int = 0


class Made(NamedTuple):
    """Tables, and what there is to say about them."""

    tables: Tables
    findings: tuple[Finding, ...]
    misses: tuple[str, ...]
    """Tables that are too far off between their points."""


class Expert(NamedTuple):
    """The times of one expert on one lane."""

    kept: Kept
    lane: str
    hidden: int
    width: int
    bits: int
    variant: str
    """How it was computed, of `VARIANTS`."""
    judged: experts.Judged

    @property
    def flops(self) -> float:
        """Operations per token."""
        return 6.0 * self.hidden * self.width

    @property
    def bytes(self) -> int:
        """Bytes of its weights."""
        return packed_bytes(3 * self.hidden * self.width, self.bits)


def spread_of(*series: Series) -> float:
    """Return the median of the points' spreads."""
    return float(np.median([p.spread for s in series for p in s.points]))


def fitted_experts(kept: Mapping[str, Kept], notices: list[str]) -> Iterator[Expert]:
    """Give every expert that was measured and can be true; what cannot is noticed."""
    for name, one in kept.items():
        parts = re.fullmatch(r"expert/(gpu|cpu)/(\d+)x(\d+)/(16|8|4|2)-?(fp16|packed|)", name)
        if parts is None or not one.series.points:
            continue
        try:
            made = experts.judged(one.series, one.date, one.versions)
            if made.table is None:
                continue
            hidden, width, bits = (int(parts[i]) for i in (2, 3, 4))
            own = Expert(one, parts[1], hidden, width, bits, parts[5], made)
            hold_weights(one.series, own.lane, kept)
        except CalibrationError as error:
            notices.append(f"{name} is not used: {error}")
            continue
        yield own


def hold_weights(series: Series, lane: str, kept: Mapping[str, Kept]) -> None:
    """Raise CalibrationError for what was done faster than its weights can be read."""
    limit = kept.get("memory/device/read" if lane == "gpu" else "memory/host/read")
    sizes = [series.facts.get(key) for key in ("weight_bytes", "buffer_bytes", "cache_bytes")]
    if limit is None or not all(isinstance(size, int | float) for size in sizes):
        return
    weights, rotating, cache = (float(size) for size in sizes)  # type: ignore[arg-type]
    for p in series.points:
        plausible.hold_weights(
            f"{series.name} at {p.at:.0f} {series.unit}", weights, p.ns, read_rate(limit.series),
            rotating_bytes=rotating, cache_bytes=cache,
        )  # fmt: skip


def tables_of(kept: Mapping[str, Kept], found: Sequence[Expert], notices: list[str]) -> Made:
    """Return the tables of all that was measured; what cannot be one is noticed."""
    expert, of_experts = expert_tables(found)
    attentions, of_attention = attention_tables(kept, notices)
    layers, of_layers = layer_tables(kept, notices)
    findings = [*of_experts, *of_attention, *of_layers]
    misses = dict.fromkeys(
        f"{one.what.partition(',')[0]}: lines between what was measured are off by"
        f" {100 * one.error:.0f} % at points held out"
        for one in findings
        if one.error is not None and one.error > MISSES
    )
    tables = Tables(
        expert_gpu=expert["gpu"], expert_cpu=expert["cpu"], attention=attentions, layer=layers
    )
    return Made(tables, tuple(findings), tuple(misses))


def ends(
    what: str, points: Sequence[tuple[int, float]], series: Sequence[Series], error: float | None
) -> list[Finding]:
    """Return the first and the last time of a table as findings."""
    spread, count = spread_of(*series), sum(len(one.points) for one in series)
    return [
        Finding("tables", f"{what} {counted(tokens)}", ns, "ns", spread, error, count)
        for tokens, ns in dict.fromkeys((points[0], points[-1]))
    ]


def expert_tables(
    found: Sequence[Expert],
) -> tuple[dict[str, tuple[ExpertTable, ...]], list[Finding]]:
    """Return tables by lane, of bfloat16 where both kinds of 16 bits were measured."""
    best: dict[tuple[str, int, int, int], Expert] = {}
    for one in sorted(found, key=lambda e: VARIANTS.index(e.variant)):
        best.setdefault((one.lane, one.hidden, one.width, one.bits), one)
    made: dict[str, list[ExpertTable]] = {"gpu": [], "cpu": []}
    findings = []
    for (lane, hidden, width, bits), one in sorted(best.items()):
        own = one.judged
        assert own.table is not None
        made[lane].append(own.table)
        what = f"expert {hidden}x{width}/{bits} {lane},"
        findings += ends(what, own.table.points, [one.kept.series], own.table_error)
    return {lane: tuple(own) for lane, own in made.items()}, findings


def attention_tables(
    kept: Mapping[str, Kept], notices: list[str]
) -> tuple[tuple[AttentionTable, ...], list[Finding]]:
    """Return a table for each shape of attention that was measured.

    Found are the times of its own tokens, attending to nothing else.
    """
    shapes: dict[str, list[Kept]] = {}
    for name, one in kept.items():
        if name.startswith("attention/gpu/") and one.series.points:
            shapes.setdefault(name.split("/")[3], []).append(one)
    made: list[AttentionTable] = []
    findings: list[Finding] = []
    for shape, used in sorted(shapes.items()):
        series = [one.series for one in used]
        try:
            for measured in series:
                hold_weights(measured, "gpu", kept)
            own = attention.judged(series, used[0].date, used[0].versions)
        except CalibrationError as error:
            notices.append(f"attention {shape} is not used: {error}")
            continue
        made.append(own.table)
        for phase, rows in (("prefill", own.table.prefill), ("decode", own.table.decode)):
            points = [(tokens, ns) for tokens, ns, _ in rows]
            of_phase = [one for one in series if one.facts["phase"] == phase]
            findings += ends(f"{phase} {shape},", points, of_phase, own.off[phase])
    return tuple(made), findings


def layer_tables(
    kept: Mapping[str, Kept], notices: list[str]
) -> tuple[tuple[LayerTable, ...], list[Finding]]:
    """Return a table for all that was measured of a layer beside attention and experts."""
    made, findings = [], []
    for name, one in sorted(kept.items()):
        parts = re.fullmatch(rf"({'|'.join(LAYER_KINDS)})/gpu/(\d+)x(\d+)", name)
        if parts is None or not any(not p.held_out for p in one.series.points):
            continue
        try:
            hold_weights(one.series, "gpu", kept)
        except CalibrationError as problem:
            notices.append(f"{name} is not used: {problem}")
            continue
        kind: Any = parts[1]
        points, error = tabled(one.series)
        note = f"{kind} on lane gpu, bfloat16"
        made.append(
            LayerTable(
                kind=kind,
                hidden=int(parts[2]),
                size=int(parts[3]),
                points=points,
                provenance=provenance([one.series], note, one.date, one.versions),
            )
        )
        findings += ends(f"{kind} {parts[2]}x{parts[3]},", points, [one.series], error)
    return tuple(made), findings


def counted(tokens: int) -> str:
    """Return a number of tokens in words."""
    return f"{tokens} token{'s' if tokens > 1 else ''}"


def rates_alone(profile: HardwareProfile, models: Sequence[ModelSpec]) -> dict[str, float]:
    """Return by kind how far times from rates alone are from these models' tables, at most.

    It is what other shapes and models have to expect, whose times come from rates.
    """
    plain = msgspec.structs.replace(profile, tables=Tables())
    worst: dict[str, float] = {}

    def compare(kind: str, points: Sequence[tuple[int, float]], curve: Any) -> None:
        errors = [abs(float(curve[tokens]) / ns - 1) for tokens, ns in points]
        worst[kind] = max(worst.get(kind, 0.0), *errors)

    own = profile.tables
    every = [t.points[-1][0] for t in (*own.expert_gpu, *own.expert_cpu)]
    every += [t.points[-1][0] for t in own.layer]
    for model in models:
        costs = build_costs(model, plain, max([1, *every]), max([1, *every]))
        for kind, tables, curves in (
            ("experts on the GPU", own.expert_gpu, costs.expert_gpu_ns),
            ("experts on the CPU", own.expert_cpu, costs.expert_cpu_ns),
        ):
            for table in tables:
                if (table.hidden, table.width) == (model.hidden, model.expert_width):
                    compare(kind, table.points, curves[BITS.index(table.bits)])
        curves_of = {
            ("gate", model.experts + model.weightless_experts): costs.gate_ns,
            ("ffn", model.shared_width): costs.shared_ns,
            ("ffn", model.dense_width): costs.dense_ns,
            ("combine", model.top_k): costs.combine_ns,
            ("head", model.vocab): costs.head_ns,
        }
        for one in own.layer:
            curve = curves_of.get((one.kind, one.size))
            if one.hidden == model.hidden and curve is not None:
                compare(one.kind, one.points, curve)
    return worst
