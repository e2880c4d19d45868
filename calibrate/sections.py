"""Sections of a profile: rates, latencies and factors that measured series stand for.

A section counts as measured when its rates are. A fit that misses the points held out of it is
reported, and points are used instead of it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from moesim.calibrate import host, plausible
from moesim.calibrate.calibration import Calibration, Kept
from moesim.calibrate.copies import FittedChannel, chunk_bytes, fit_channel
from moesim.calibrate.fit import MISSES, fit_line
from moesim.calibrate.interference import TOKENS, contention
from moesim.calibrate.memory import read_rate
from moesim.calibrate.series import Series
from moesim.calibrate.tables import Expert, Finding, spread_of
from moesim.errors import CalibrationError
from moesim.profile import Channel, Contention, Cpu, Gpu, HardwareProfile, Host, Link, Provenance

SCRIPT = "moesim calibrate"
KINDS: dict[str, Any] = {
    "gpu": Gpu,
    "cpu": Cpu,
    "link": Link,
    "disk": Channel,
    "host": Host,
    "interference": tuple[Contention, ...],
}
"""Sections, and what they are."""


class Part(NamedTuple):
    """What one group of series makes of a section."""

    section: Any
    note: str
    used: tuple[Kept, ...]
    findings: tuple[Finding, ...]
    misses: tuple[str, ...] = ()
    source: Literal["measured", "datasheet", "scaled"] = "measured"
    """That of the part which is known worst."""


def provenance(used: Sequence[Kept], note: str) -> Provenance:
    """Return where a section's numbers come from."""
    points = [p for kept in used for p in kept.series.points]
    spreads = np.array([p.spread for p in points])
    restless = sum(not p.settled for p in points)
    outliers, all_of_them = sum(p.outliers for p in points), sum(p.repetitions for p in points)
    ratio = max(p.median_ns / p.ns for p in points if p.ns > 0) - 1
    text = (
        f"{note}; times are low quartiles, medians up to {100 * ratio:.1f} % above;"
        f" {len(points)} points of {all_of_them} repetitions, {restless} of them did not settle,"
        f" {outliers} repetitions took more than twice the median"
    )
    return Provenance(
        source="measured",
        note=text,
        date=max(kept.date for kept in used),
        script=SCRIPT,
        versions=used[-1].versions,
        repetitions=int(np.median([p.repetitions for p in points])),
        spread_pct=round(100 * float(np.median(spreads)), 2),
    )


def made_of(
    section: str,
    kept: Mapping[str, Kept],
    found: Sequence[Expert],
    calibration: Calibration,
    base: HardwareProfile,
) -> Part | None:
    """Return what was measured of a section of `KINDS`, or None if nothing was.

    Raises CalibrationError for what cannot be true.
    """
    makers: dict[str, Callable[[], Part | None]] = {
        "gpu": lambda: gpu_part(kept, found, calibration, base.gpu),
        "cpu": lambda: cpu_part(kept, found, calibration, base.cpu),
        "link": lambda: link_part(kept, calibration, base.link),
        "disk": lambda: disk_part(kept),
        "host": lambda: host_part(kept),
        "interference": lambda: interference_part(kept, calibration, base),
    }
    return makers[section]()


class Rates(NamedTuple):
    """What experts say about a processor."""

    fixed_ns: float
    """0 where it cannot be told from reading the weights."""
    bytes_per_s: float
    flops_per_s: float
    error: float
    """The largest error of a fit."""
    note: str


def rates_of(
    own: Sequence[Expert], stream: Kept | None = None, fixed_ns: float | None = None
) -> Rates:
    """Return a processor's rates from experts of one precision, whose fits there must be.

    The floor of an expert is a fixed time, given or not, and its bytes over a rate. Where it is not
    given, experts of two sizes tell one from the other; those of one size do not, and all of it is
    put down to the rate, which is at most that of one stream. The slope is operations over a rate:
    the median of the experts.

    Raises CalibrationError if no slope was seen.
    """
    fits = [e.judged.fit for e in own]
    assert all(fit is not None for fit in fits)
    sizes = np.array([e.bytes for e in own], np.float64)
    floors = np.array([float(fit(np.ones(1))[0]) for fit in fits if fit is not None])
    note = "rate of weights from the floor of experts"
    if fixed_ns is None:
        fixed_ns, note = 0.0, "experts of one size: their fixed time is in the rate of weights"
        if sizes.max() > 1.5 * sizes.min():
            fixed_ns = float(fit_line(sizes, floors).parameters[0])
            note = f"fixed time and rate of weights from experts of {len(set(sizes))} sizes"
    least_ns = floors / 10 if stream is None else sizes / read_rate(stream.series) * 1e9
    if (floors - fixed_ns < least_ns).any():
        note += "; fixed times leave less than reading the weights takes at best, which is taken"
    rate = float(np.median(sizes / np.maximum(floors - fixed_ns, least_ns)))
    slopes = [float(fit.parameters[2]) for fit in fits if fit is not None]
    flops = [e.flops / slope for e, slope in zip(own, slopes, strict=True) if slope > 0]
    if not flops:
        raise CalibrationError("experts of more tokens take no longer: their rate is not known")
    error = max(fit.error for fit in fits if fit is not None)
    note += f"; max(floor, a + b n) off by at most {100 * error:.1f} % at points held out"
    return Rates(fixed_ns, rate * 1e9, float(np.median(flops)) * 1e9, error, note)


def judgements(own: Sequence[Expert]) -> tuple[str, ...]:
    """Return a line for each fit that misses."""
    return tuple(
        f"{e.kept.series.name}: max(floor, a + b n) is off by {100 * e.judged.fit.error:.0f} % at"
        f" points held out, more than {100 * MISSES:.0f} %; this shape uses its points instead"
        + (f", off by {100 * e.judged.table_error:.0f} %" if e.judged.table_error else "")
        for e in own
        if e.judged.fit is not None and e.judged.fit.misses
    )


def plain(found: Sequence[Expert], lane: str) -> list[Expert]:
    """Return the experts of a lane at 16 bits that have a fit; bfloat16 if there are any."""
    own = [e for e in found if e.lane == lane and e.bits == 16 and e.judged.fit is not None]
    return [e for e in own if not e.variant] or own


def of_experts(section: str, own: Sequence[Expert], rates: Rates) -> list[Finding]:
    """Return the rates of a processor as findings."""
    series = [e.kept.series for e in own]
    spread, points = spread_of(*series), sum(len(one.points) for one in series)
    return [
        Finding(section, what, value, unit, spread, rates.error, points)
        for what, value, unit in (
            ("experts, reading weights", rates.bytes_per_s, "bytes_per_s"),
            ("experts, computing", rates.flops_per_s, "flops_per_s"),
        )
    ]


def least_times(kept: Mapping[str, Kept], kind: str) -> list[tuple[Kept, list[int], float]]:
    """Return every series of a kind on the device, the two sizes of its name, its least time.

    That is the time of the fewest tokens, or of more where these met with a disturbance.
    """
    found = []
    for name, one in kept.items():
        parts = re.fullmatch(rf"{kind}/gpu/(\d+)x(\d+)", name)
        if parts and one.series.points:
            sizes = [int(parts[1]), int(parts[2])]
            found.append((one, sizes, min(p.ns for p in one.series.points)))
    return found


def gpu_part(
    kept: Mapping[str, Kept], found: Sequence[Expert], calibration: Calibration, base: Gpu
) -> Part | None:
    """Return the section `gpu`.

    A launch is what combining few tokens takes, by the kernels assumed for it; then router and head
    have as many kernels as their least times leave beside reading their weights, if it is most of
    these times: otherwise it says more about that reading.
    """
    own = plain(found, "gpu")
    if not own:
        return None
    used = [e.kept for e in own]
    kernels, launch_ns = base.kernels, None
    notes = [
        f"kernels are assumed: {kernels.expert} per expert, {kernels.combine} to combine,"
        f" {kernels.attention} for attention"
    ]
    smallest = min(least_times(kept, "combine"), key=lambda c: c[2], default=None)
    if smallest is not None:
        launch_ns = smallest[2] / kernels.combine
        used.append(smallest[0])
        notes.append("launch: combining few tokens")
    fixed_ns = None if launch_ns is None else kernels.expert * launch_ns
    stream = kept.get("memory/device/read")
    rates = rates_of(own, stream, fixed_ns)
    if launch_ns is None:
        launch_ns = rates.fixed_ns / kernels.expert
    for kind in ("gate", "head"):
        counts = []
        for one, (hidden, outputs), ns in least_times(kept, kind):
            used.append(one)
            left_ns = ns - 2 * hidden * outputs / rates.bytes_per_s * 1e9
            if left_ns > ns / 2:
                counts.append(left_ns / max(1.0, launch_ns))
        if counts:
            count = min(1 << 20, max(1, round(float(np.median(counts)))))
            kernels = msgspec.structs.replace(kernels, **{kind: count})
            notes.append(f"{kind}: {count} kernels make its least time right")
    device = calibration.device
    emulated = " (emulated)" if device["label"] == "emulated" else ""
    section = Gpu(
        name=f"{device['name']}{emulated}",
        memory_bytes=device["memory_bytes"],
        memory_bytes_per_s=rates.bytes_per_s,
        flops_per_s=rates.flops_per_s,
        launch_ns=round(launch_ns),
        kernels=kernels,
    )
    findings = of_experts("gpu", own, rates)
    findings.append(Finding("gpu", "each kernel", launch_ns, "ns"))
    if stream is not None:
        findings.append(stream_finding("gpu", "memory, one stream", stream.series))
        used.append(stream)
        notes.append(f"one stream reads {read_rate(stream.series):.4g} bytes/s")
    first = "emulated device, no GPU; " if emulated else ""
    note = first + "; ".join([rates.note, *notes])
    return Part(section, note, tuple(used), tuple(findings), judgements(own))


def stream_finding(section: str, what: str, series: Series) -> Finding:
    """Return the rate of a stream."""
    return Finding(
        section, what, read_rate(series), "bytes_per_s", spread_of(series),
        points=len(series.points),
    )  # fmt: skip


def cpu_part(
    kept: Mapping[str, Kept], found: Sequence[Expert], calibration: Calibration, base: Cpu
) -> Part | None:
    """Return the section `cpu`: rates of experts, of one stream, and the host's facts."""
    own, stream = plain(found, "cpu"), kept.get("memory/host/read")
    if not own:
        return None
    rates = rates_of(own, stream)
    used = [e.kept for e in own]
    findings = of_experts("cpu", own, rates)
    if round(rates.fixed_ns):
        findings.append(Finding("cpu", "each expert", rates.fixed_ns, "ns"))
    note, whole = rates.note, base.memory_bytes_per_s
    if stream is not None:
        whole = read_rate(stream.series)
        used.append(stream)
        findings.append(stream_finding("cpu", "memory, one stream", stream.series))
    else:
        note += f"; one stream was not measured, {whole:g} bytes/s is another machine's"
    facts = calibration.before
    section = Cpu(
        name=facts.cpu,
        threads=calibration.device["threads"]["cpu"],
        memory_bytes=facts.memory_bytes or base.memory_bytes,
        memory_bytes_per_s=whole,
        expert_bytes_per_s=rates.bytes_per_s,
        flops_per_s=rates.flops_per_s,
        overhead_ns=round(rates.fixed_ns),
    )
    return Part(section, note, tuple(used), tuple(findings), judgements(own))


def hold_link(kept: Mapping[str, Kept], calibration: Calibration) -> None:
    """Raise CalibrationError for copies faster than memory is read, or than a stated throttle.

    A few threads do not read the host's memory as fast as a real device does by itself, which is
    held to its own memory only.
    """
    names = ["memory/device/read"]
    if calibration.device["label"] != "cuda":
        names.append("memory/host/read")
    memories = [read_rate(kept[name].series) for name in names if name in kept]
    stated = calibration.device.get("link")
    for name, one in kept.items():
        if name.startswith("copy/"):
            if memories:
                plausible.hold_copies(one.series, min(memories))
            if stated:
                plausible.hold_throttle(one.series, stated["latency_ns"], stated["bytes_per_s"])


def link_part(kept: Mapping[str, Kept], calibration: Calibration, base: Link) -> Part | None:
    """Return the section `link`: copies that follow each other, or single ones for lack of them."""
    hold_link(kept, calibration)
    channels: dict[str, Any] = {}
    used: list[Kept] = []
    findings: list[Finding] = []
    misses: list[str] = []
    notes = []
    for key, way in (
        ("h2d", "h2d/pinned"),
        ("d2h", "d2h/pinned"),
        ("h2d_pageable", "h2d/pageable"),
    ):
        one = kept.get(f"copy/{way}/queued") or kept.get(f"copy/{way}/single")
        if one is None:
            continue
        made = fit_channel(one.series)
        channels[key] = made.channel
        used.append(one)
        what = {"h2d": "to the device", "d2h": "from it", "h2d_pageable": "to it, pageable"}[key]
        findings += [
            Finding(
                "link", what, made.channel.bytes_per_s, "bytes_per_s", spread_of(one.series),
                made.error, len(one.series.points),
            ),
            Finding("link", f"{what}, each copy", made.channel.latency_ns, "ns"),
        ]  # fmt: skip
        notes.append(f"{one.series.name} off by {100 * made.error:.1f} % at points held out")
        misses += judgement(one.series.name, made)
        alone = kept.get(f"copy/{way}/single")
        if alone is not None and alone is not one:
            single = fit_channel(alone.series).channel
            used.append(alone)
            notes.append(f"alone {single.latency_ns} ns and {single.bytes_per_s:.4g} bytes/s")
    if not {"h2d", "d2h"} <= channels.keys():
        return None
    chunk = base.chunk_bytes
    if (chunked := kept.get("copy/h2d/pinned/chunked")) is not None:
        chunk = chunk_bytes(chunked.series)
        used.append(chunked)
        findings.append(
            Finding("link", "chunks", chunk, "bytes", spread_of(chunked.series),
                    points=len(chunked.series.points))
        )  # fmt: skip
    else:
        notes.append("chunks are not measured")
    section = Link(**channels, chunk_bytes=chunk)
    return Part(section, "; ".join(notes), tuple(used), tuple(findings), tuple(misses))


def judgement(name: str, made: FittedChannel) -> tuple[str, ...]:
    """Return a line if a channel's fit misses."""
    if not made.fit.misses:
        return ()
    instead = (
        f"its points are used instead, off by {100 * made.error:.0f} %"
        if made.channel.interpolated
        else "lines between its points are no better, so it is used"
    )
    return (
        f"{name}: t0 + bytes / rate is off by {100 * made.fit.error:.0f} % at points held out, more"
        f" than {100 * MISSES:.0f} %; {instead}",
    )


def disk_part(kept: Mapping[str, Kept]) -> Part | None:
    """Return the section `disk`."""
    one = kept.get("disk/read")
    if one is None:
        return None
    if (memory := kept.get("memory/host/read")) is not None:
        plausible.hold_disk(one.series, read_rate(memory.series))
    made = fit_channel(one.series)
    findings = (
        Finding("disk", "reading", made.channel.bytes_per_s, "bytes_per_s",
                spread_of(one.series), made.error, len(one.series.points)),
        Finding("disk", "each read", made.channel.latency_ns, "ns"),
    )  # fmt: skip
    facts = ", ".join(f"{key} {value}" for key, value in one.series.facts.items())
    note = f"off by {100 * made.error:.1f} % at points held out; {facts}"
    return Part(made.channel, note, (one,), findings, judgement("disk/read", made))


def number(fact: float | str | None) -> float | None:
    """Return a fact if it is a number."""
    return float(fact) if isinstance(fact, int | float) else None


def interference_part(
    kept: Mapping[str, Kept], calibration: Calibration, base: HardwareProfile
) -> Part | None:
    """Return the section `interference`.

    Without a device, what its lanes do to others is that of `base`, as these lanes are.
    """
    used = [one for name, one in kept.items() if name.startswith("interference/")]
    if not used:
        return None
    entries: list[Contention] = [contention(one.series) for one in used]
    findings = [
        Finding("interference", f"{' + '.join(entry.busy)}: {lane}", factor, "factor",
                number(one.series.facts.get(f"spread/{lane}")))
        for one, entry in zip(used, entries, strict=True)
        for lane, factor in entry.slow.items()
    ]  # fmt: skip
    note = f"{len(entries)} sets of lanes, experts of {TOKENS} tokens; medians, alone by together"
    others = []
    if calibration.device["label"] == "cpu":
        measured = {frozenset(entry.busy) for entry in entries}
        others = [entry for entry in base.interference if frozenset(entry.busy) not in measured]
    if not others:
        return Part(tuple(entries), note, tuple(used), tuple(findings))
    origin = base.provenance.interference
    note = (
        f"measured: {note}; {len(others)} sets with lanes of a device are those of {base.name}"
        f" ({origin.source})"
    )
    return Part((*entries, *others), note, tuple(used), tuple(findings), source=origin.source)


def host_part(kept: Mapping[str, Kept]) -> Part | None:
    """Return the section `host`."""
    used = [one for name, one in kept.items() if name.startswith("host/")]
    if not used:
        return None
    series = {one.series.name: one.series for one in used}
    section = host.host_section(list(series.values()))
    policies = sorted(section.decision_ns_by_policy.items(), key=lambda item: item[1])
    walk, wait = series["host/walk"], series["host/sync/short"]
    error, spread = host.fit_walk(walk).error, spread_of(walk)
    findings = (
        Finding("host", "each layer", section.per_layer_ns, "ns", spread, error, len(walk.points)),
        Finding("host", "each launch", section.per_launch_ns, "ns", spread, error),
        Finding("host", "each wait", section.per_sync_ns, "ns", spread_of(wait)),
        Finding("host", f"deciding, fastest: {policies[0][0]}", policies[0][1], "ns"),
        Finding("host", f"deciding, slowest: {policies[-1][0]}", policies[-1][1], "ns"),
    )
    misses = (
        f"host/walk: a base and so much per submission are off by {100 * error:.0f} % for the"
        f" policy held out, {host.APART}; they are used all the same",
    )
    facts = walk.facts
    note = f"host program; {len(policies)} policies, each its median; {facts.get('how', '')}"
    return Part(section, note, tuple(used), findings, misses if error > MISSES else ())
