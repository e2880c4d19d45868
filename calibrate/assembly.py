"""Put measured series together to a hardware profile; the rest comes from another one."""

import re
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import msgspec
import yaml

from moesim.calibrate.attention import shape_of as attention_shape
from moesim.calibrate.calibration import Calibration
from moesim.calibrate.fit import MISSES
from moesim.calibrate.sections import KINDS, SCRIPT, made_of, provenance
from moesim.calibrate.tables import Finding, fitted_experts, rates_alone, tables_of
from moesim.errors import CalibrationError
from moesim.model import ModelSpec
from moesim.profile import HardwareProfile, Origins, Provenance, Tables


class Assembled(NamedTuple):
    """A profile, and what there is to say about it."""

    profile: HardwareProfile
    findings: tuple[Finding, ...]
    misses: tuple[str, ...]
    """Fits that are too far off, and what is used instead."""
    notices: tuple[str, ...]
    absent: tuple[str, ...]
    """Sections that were not measured, wholly or in part, and where their numbers come from."""


def assemble(found: Calibration, models: Sequence[ModelSpec], base: HardwareProfile) -> Assembled:
    """Return the profile of a calibration; `base` gives what was not measured.

    Raises CalibrationError if nothing was measured.
    """
    kept = {o.kept.series.name: o.kept for o in found.outcomes if o.kept is not None}
    if not kept:
        errors = [f"{o.task}: {o.error}" for o in found.outcomes if o.error]
        raise CalibrationError("; ".join(["nothing was measured", *errors[:1]]))
    notices = list(warnings(found))
    measured = list(fitted_experts(kept, notices))
    sections: dict[str, Any] = {}
    origins: dict[str, Provenance] = {}
    findings: list[Finding] = []
    misses: list[str] = []
    absent: list[str] = []
    for name, kind in KINDS.items():
        sections[name] = getattr(base, name)
        origins[name] = borrowed(base, name)
        try:
            part = made_of(name, kept, measured, found, base)
            if part is not None:
                sections[name] = valid(part.section, kind)
        except CalibrationError as error:
            notices.append(f"{name} is not used: {error}")
            part = None
        if part is None:
            absent.append(f"{name}, from {base.name} ({getattr(base.provenance, name).source})")
            continue
        origins[name] = msgspec.structs.replace(
            provenance(part.used, part.note), source=part.source
        )
        if part.source != "measured":
            absent.append(f"{name}, some of it, from {base.name} ({part.source})")
        findings += part.findings
        misses += part.misses
    tables = tables_of(kept, measured, notices)
    for model in models:
        notices += lacking(model, tables.tables, device=found.device["label"] != "cpu")
    profile = HardwareProfile(
        schema="moesim.hardware/1",
        name=name_of(found, base),
        description=description_of(found, base),
        **sections,
        tables=tables.tables,
        provenance=Origins(**origins),
    )
    alone = {k: e for k, e in rates_alone(profile, models).items() if e > MISSES}
    if alone:
        notices.append(
            "shapes that have no table are simulated from rates, which miss those measured here by"
            " up to " + ", ".join(f"{100 * error:.0f} % ({kind})" for kind, error in alone.items())
        )
    return Assembled(
        profile,
        (*findings, *tables.findings),
        (*misses, *tables.misses),
        tuple(notices),
        tuple(absent),
    )


def valid(section: Any, kind: Any) -> Any:
    """Return a section, rates to six digits, which is more than anything is known to.

    Raises CalibrationError for numbers that no profile may have.
    """
    try:
        return msgspec.convert(six_digits(msgspec.to_builtins(section)), kind)
    except msgspec.ValidationError as error:
        raise CalibrationError(str(error)) from None


def six_digits(plain: Any) -> Any:
    """Return plain values with their floats rounded."""
    if isinstance(plain, dict):
        return {key: six_digits(value) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [six_digits(value) for value in plain]
    return float(f"{plain:.6g}") if isinstance(plain, float) else plain


def lacking(model: ModelSpec, tables: Tables, *, device: bool) -> Iterator[str]:
    """Give a line for what of a model has no table and is simulated from rates.

    Without a device nothing is expected of the GPU.
    """
    shape = model.hidden, model.expert_width
    places = [("CPU", tables.expert_cpu)] + [("GPU", tables.expert_gpu)] * device
    for place, own in places:
        if shape not in {(table.hidden, table.width) for table in own}:
            yield f"{model.name}: there is no table of its experts on the {place}"
    if not device:
        return
    try:
        wanted = attention_shape(model)
    except CalibrationError as error:
        yield f"{error}: its attention is simulated from rates"
        return
    if wanted not in {(t.hidden, t.heads, t.kv_heads, t.head_dim) for t in tables.attention}:
        yield f"{model.name}: there is no table of its attention"


def name_of(found: Calibration, base: HardwareProfile) -> str:
    """Return a name that says what the device was."""
    own, gpu = (
        re.sub(r"[^a-z0-9]+", "-", name.lower().split("@")[0]).strip("-")[:40].rstrip("-")
        for name in (found.before.cpu, found.device["name"])
    )
    names = {"cpu": f"{own}-with-{base.name}", "emulated": f"emulated-{own}"}
    return names.get(found.device["label"], f"{gpu}-{own}")


def description_of(found: Calibration, base: HardwareProfile) -> str:
    """Return in a few sentences what was measured on what."""
    device, facts = found.device, found.before
    threads = ", ".join(f"{n} for lane {lane}" for lane, n in device["threads"].items())
    text = (
        f"{facts.cpu}, {facts.cores} cores, {facts.threads} threads,"
        f" {facts.memory_bytes / 2**30:.1f} GiB;"
        f" threads: {threads}."
    )
    if device["label"] == "emulated":
        link = device.get("link")
        stated = (
            f" and a link stated as {link['latency_ns']} ns and {link['bytes_per_s']:g} bytes/s"
            if link
            else ""
        )
        text = (
            f"EMULATED device: the host's processor in the place of a GPU, with"
            f" {device['memory_bytes'] / 2**30:.4g} GiB of its own{stated}; no GPU was measured."
            f" {text} Lanes gpu and cpu share the host's cores."
        )
    if device["label"] == "cpu":
        text += f" No device: GPU and link are those of {base.name}, not measured."
    load = f" Load average {facts.load:.1f} before, {found.after.load:.1f} after."
    if facts.mhz > 0:
        load += f" Clock {facts.mhz:.0f} MHz before, {found.after.mhz:.0f} after."
    return text + load + (" Measured quickly." if found.quick else "")


def warnings(found: Calibration) -> Iterator[str]:
    """Give what a reader of the numbers must know."""
    if found.device["label"] == "emulated":
        yield (
            "the device is emulated: processor and copies are real, the link is throttled to what"
            " it was told, and nothing is said about any GPU"
        )
    busy = [o.kept.load for o in found.outcomes if o.kept is not None and not o.reused]
    if found.before.busy:
        yield (
            f"the machine was busy (load {found.before.load:.1f} on {found.before.threads} threads"
            " before anything was measured): the numbers are those of a loaded machine"
        )
    elif busy and max(busy) > 2 * found.before.threads:
        yield f"the load rose to {max(busy):.1f} meanwhile: something else ran, too"
    kept_busy = sum(o.reused and o.kept is not None and o.kept.busy for o in found.outcomes)
    if kept_busy:
        yield (
            f"{kept_busy} series that were kept had been measured on a busy machine;"
            " --fresh measures them again"
        )
    if power := power_of(found):
        yield f"mean power: {power}"
    series = [o.kept.series for o in found.outcomes if o.kept is not None]
    for one in series:
        for fact, what in (("stopped", "stopped"), ("left_out", "without")):
            if fact in one.facts:
                yield f"{one.name}: {what} {one.facts[fact]}"
    restless = sum(not p.settled for s in series for p in s.points)
    every = sum(len(s.points) for s in series)
    if restless > every / 10:
        yield f"{restless} of {every} points did not settle in their time; they are used anyway"


def power_of(found: Calibration) -> str:
    """Return the mean power in watts of each kind of task, in one line; empty if none is told."""
    told: dict[tuple[str, str], list[float]] = {}
    for outcome in found.outcomes:
        for source, watts in outcome.kept.watts.items() if outcome.kept is not None else ():
            kind = "/".join(outcome.task.split("/")[:2])
            told.setdefault((kind, source), []).append(watts)
    means = (f"{kind} {source} {fmean(watts):.0f} W" for (kind, source), watts in told.items())
    return ", ".join(means)


def borrowed(base: HardwareProfile, section: str) -> Provenance:
    """Return the provenance of a section that another profile gave."""
    own: Provenance = getattr(base.provenance, section)
    return msgspec.structs.replace(own, note=f"not measured here; from {base.name}: {own.note}")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def profile_text(profile: HardwareProfile) -> str:
    """Return a profile as the YAML that `parse_profile` reads to the same one."""
    text: str = yaml.dump(
        msgspec.to_builtins(profile),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=100,
    )
    return f"# Made by {SCRIPT}. Edit it as you like, or start it again.\n{text}"
