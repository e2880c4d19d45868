"""One replay by plain values: what comparisons, sweeps and advice are made of.

A point can be written down, sent to another process, and recognised by its digest. What it names is
loaded once per process. The same point gives the same row wherever it is evaluated, but for
`run.wall_s`.
"""

import hashlib
import inspect
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import msgspec

from moesim import __version__
from moesim.answers.inputs import Inputs, model_of
from moesim.answers.stretch import stretched_costs, stretched_host
from moesim.costs import build_costs
from moesim.errors import InputError
from moesim.model import ModelSpec, load_model, model_digest
from moesim.policies.registry import BUILTIN, choose, load_class
from moesim.profile import HardwareProfile, load_profile, profile_digest
from moesim.run import Prepared
from moesim.sim.engine import machine_for
from moesim.sim.metrics import summarize
from moesim.sim.replay import Replayed, replay
from moesim.traces.bundled import example_path
from moesim.traces.format import Trace
from moesim.traces.importers import load_trace
from moesim.traces.synthetic import synthesize

DECIDING = (
    "*.py", "answers/inputs.py", "answers/points.py", "answers/stretch.py", "policies/**/*.py",
    "sim/**/*.py", "traces/**/*.py",
)  # fmt: skip
"""The code of moesim that decides results."""
KEPT = 8
"""Traces, models and profiles of each kind that a process keeps."""
KEPT_DIGESTS = 4096
"""Digests of each kind that a process keeps."""


class Point(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """One replay; fields mean what the options of `moesim replay` mean."""

    policy: str = "dali"
    trace: str | None = None
    """Path of a trace; None is the one that ships with moesim."""
    synth: dict[str, Any] = {}
    """Or a trace that is made up: arguments of `traces.synthetic.synthesize`."""
    model: str | None = None
    hardware: str | None = None
    settings: dict[str, str] = {}
    """Numbers of the hardware profile that are changed; see `profile.with_overrides`."""
    stretch: dict[str, float] = {}
    """Factors on what a section of the machine takes; see `stretch.SECTIONS`."""
    budget: int | str | None = None
    cache_ratio: float | None = None
    bits: int = 16
    batch: int = 1
    prompt: int | None = None
    generate: int | None = None
    start: int = 0
    layers: int | None = None
    repeat: bool = False
    context: int = 0
    """Tokens that each sequence has before its prompt."""
    seed: int = 0
    jitter: float = 0.0
    """Operations are stretched at random by up to this share."""
    machine: str = "auto"
    """Which of the simulated machines, which give the same result."""


class Named(msgspec.Struct, frozen=True):
    """What a point names, loaded."""

    trace: Trace
    model: ModelSpec
    profile: HardwareProfile


def named(point: Point) -> Named:
    """Load what a point names, or take it from what this process keeps.

    Raises MoesimError for what is not there.
    """
    model = None if point.model is None else kept_model(point.model, changed(point.model))
    if point.synth and point.trace is not None:
        raise InputError(f"trace {point.trace} and one that is made up exclude each other")
    if point.synth:
        trace = kept_synthetic(tuple(sorted(point.synth.items())))
    else:
        path = Path(point.trace) if point.trace is not None else example_path()
        trace = kept_trace(path, changed(path), point.model)
    profile = kept_profile(point.hardware, changed(point.hardware or ""))
    return Named(trace, model_of(trace) if model is None else model, profile)


def changed(path: Path | str) -> int:
    """Return when a file was changed, in ns; 0 for what is none."""
    file = Path(path)
    return file.stat().st_mtime_ns if file.is_file() else 0


@lru_cache(KEPT)
def kept_trace(path: Path, at_ns: int, model: str | None) -> Trace:
    """Return the trace of a file as it was at that time."""
    return load_trace(path, spec=None if model is None else kept_model(model, changed(model)))


@lru_cache(KEPT)
def kept_synthetic(arguments: tuple[tuple[str, Any], ...]) -> Trace:
    """Return the trace that is made up of these arguments."""
    return synthesize(**dict(arguments))


@lru_cache(KEPT)
def kept_model(name: str, at_ns: int) -> ModelSpec:
    """Return a model by name or path."""
    return load_model(name)


@lru_cache(KEPT)
def kept_profile(name: str | None, at_ns: int) -> HardwareProfile:
    """Return a machine by name or path; None is this machine's."""
    return load_profile(name)[0]


def digest(point: Point) -> str:
    """Return 16 hex digits that change with whatever may change the point's row.

    Files count by what they hold, code of moesim and policies included; what is made up, by what
    it is made of. Raises MoesimError for what is not there.
    """
    path = Path(point.trace) if point.trace is not None else example_path()
    plain = msgspec.structs.replace(
        point,
        trace=None if point.synth else trace_digest(path, changed(path), point.model),
        model=point.model and named_model_digest(point.model, changed(point.model)),
        hardware=named_profile_digest(point.hardware, changed(point.hardware or "")),
        machine="auto",
    )
    source = source_of(point.policy.partition(":")[0])
    sources = own_sources(), source and source_digest(source, changed(source))
    # Not the struct itself: it leaves out what *is* its default, which a copy of it is not.
    fields = msgspec.structs.asdict(plain)
    text = msgspec.json.encode((__version__, sources, fields), order="deterministic")
    return hashlib.sha256(text).hexdigest()[:16]


@lru_cache(KEPT_DIGESTS)
def trace_digest(path: Path, at_ns: int, model: str | None) -> str:
    """Return the digest of `kept_trace`, and of what it says about itself, as its model."""
    trace = kept_trace(path, at_ns, model)
    meta = msgspec.json.encode(trace.meta, order="deterministic", enc_hook=str)
    return f"{trace.digest()} {hashlib.sha256(meta).hexdigest()}"


@lru_cache(KEPT_DIGESTS)
def named_model_digest(name: str, at_ns: int) -> str:
    """Return the digest of `kept_model`."""
    return model_digest(kept_model(name, at_ns))


@lru_cache(KEPT_DIGESTS)
def named_profile_digest(name: str | None, at_ns: int) -> str:
    """Return the digest of `kept_profile`."""
    return profile_digest(kept_profile(name, at_ns))


@cache
def own_sources() -> str:
    """Return the digest of the code of moesim that decides what a point's row is."""
    root = Path(__file__).parent.parent
    sha = hashlib.sha256()
    for path in sorted(path for pattern in DECIDING for path in root.glob(pattern)):
        sha.update(f"{path.relative_to(root).as_posix()} ".encode() + path.read_bytes())
    return sha.hexdigest()


@cache
def source_of(policy: str) -> str:
    """Return the file that a policy's code is in; "" for one that ships with moesim.

    Raises InputError if there is no such policy.
    """
    if policy in BUILTIN:
        return ""
    return policy if policy.endswith(".py") else inspect.getsourcefile(load_class(policy)) or ""


@lru_cache(KEPT_DIGESTS)
def source_digest(path: str, at_ns: int) -> str:
    """Return the digest of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def inputs_of(point: Point, found: Named | None = None) -> Inputs:
    """Load what a point is about, or take what it names as `found`.

    Raises MoesimError for what is not there or does not fit.
    """
    found = found or named(point)
    return Inputs.load(
        found.trace, model=found.model, hardware=stretched_host(found.profile, point.stretch),
        settings=point.settings, budget=point.budget, cache_ratio=point.cache_ratio,
        bits=point.bits, batch=point.batch, prompt=point.prompt, generate=point.generate,
        start=point.start, layers=point.layers, repeat=point.repeat, context=point.context,
    )  # fmt: skip


def prepared_of(point: Point, found: Named | None = None) -> Prepared:
    """Return a point's run, ready to start; see `inputs_of` for `found` and what is raised."""
    chosen = choose(point.policy)
    given = inputs_of(point, found)
    costs = None
    if point.stretch:
        work = given.workload
        costs = build_costs(given.model, given.profile, work.step_tokens, work.sequences)
        costs = stretched_costs(costs, point.stretch)
    return given.prepare(chosen, point.seed, costs)


def run_point(point: Point, record: bool = False) -> Replayed:
    """Replay a point, and `record` its log; raise MoesimError for one that cannot be."""
    prepared = prepared_of(point)
    machine = machine_for(prepared, point.machine, lambda _: None)
    jitter = round(point.jitter * 1024)
    return replay(prepared, machine=machine, seed=point.seed, jitter=jitter, record=record)


def row_of(point: Point) -> dict[str, Any]:
    """Replay a point, and return its results as one flat row; see `flat`."""
    return flat(summarize(run_point(point)))


def flat(result: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested results as one row: `time_ns.wait_cpu`, `run.budget_bytes` and so on."""
    row: dict[str, Any] = {}
    for key, value in result.items():
        if isinstance(value, dict):
            row |= flat(value, f"{prefix}{key}.")
        else:
            row[prefix + key] = value
    return row
