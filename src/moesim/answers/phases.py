"""How fast prefill and decode are with a context, each by a replay of its own.

**Decode**: `WARM` tokens of prompt and `DECODE` tokens behind a context that makes the tokens asked
for in all; the speed is that of the later half of these tokens, when caches have settled.
**Prefill**: one step of up to `PROMPT` tokens of all sequences together in the middle of the
context, whose speed is that of all such steps together, since attention grows evenly from the first
to the last.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from moesim.answers.compare import changes
from moesim.answers.memory import Question
from moesim.answers.parallel import spread
from moesim.answers.points import Point, run_point
from moesim.answers.verdict import FUTURE
from moesim.errors import InputError, MoesimError
from moesim.model import ModelSpec, spec_to_dict
from moesim.sim.metrics import TIMES, explain, link_bytes, summarize
from moesim.sim.replay import Replayed
from moesim.traces.format import Trace, rows_by_sequence, write_trace
from moesim.traces.importers import load_trace
from moesim.traces.synthetic import PRESETS, synthesize

PROMPT = 512
WARM, DECODE = 64, 24
OTHERS = 2
"""Texts beside those that are served, for policies that count beforehand what is popular."""

Progress = Callable[[int, int], None]
Kind = Literal["decode", "prefill"]


class Measured(NamedTuple):
    """Part of a run: its time, the tokens of it, and what explains it; or why there is none."""

    ns: int = 0
    tokens: int = 0
    detail: Mapping[str, Any] = {}
    error: str = ""

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together."""
        return self.tokens * 1e9 / self.ns


class Task(NamedTuple):
    """A replay of which one part is wanted."""

    kind: Kind
    point: Point


class Scene(NamedTuple):
    """The routing and the machine, in files, for replays in any process."""

    trace: Path
    hardware: Path
    asked: Question
    prompt: int
    """Tokens of a sequence in a prefill step."""
    warm: int
    """Tokens of the prompt before decoding."""
    machine: str

    def task(
        self, kind: Kind, policy: str, budget_bytes: int,
        settings: Mapping[str, str] | None = None, stretch: Mapping[str, float] | None = None,
    ) -> Task:  # fmt: skip
        """Return one replay; `settings` and `stretch` change the machine."""
        asked = self.asked
        if kind == "decode":
            prompt, generate = self.warm, DECODE + 1
            earlier = max(0, asked.context - prompt - DECODE)
        else:
            prompt, generate = self.prompt, 1
            earlier = max(0, asked.context - prompt) // 2
        point = Point(
            policy=policy, trace=str(self.trace), hardware=str(self.hardware),
            budget=budget_bytes, bits=asked.bits, batch=asked.batch, prompt=prompt,
            generate=generate, context=earlier, machine=self.machine,
            settings=dict(settings or {}), stretch=dict(stretch or {}),
        )  # fmt: skip
        return Task(kind, point)


class Clock:
    """Evaluates tasks in all processes, each once, and counts them."""

    def __init__(self, jobs: int | None, progress: Progress | None) -> None:
        """Take how many processes, and whom to tell of progress."""
        self.jobs, self.progress = jobs, progress
        self.found: dict[bytes, Measured] = {}
        self.planned = 0

    def run(self, tasks: Sequence[Task]) -> list[Measured]:
        """Return what each task measures, in their order."""
        keys = [msgspec.json.encode(task, order="deterministic") for task in tasks]
        new = {key: task for key, task in zip(keys, tasks, strict=True) if key not in self.found}
        self.planned += len(new)
        for index, measured in spread(measure, list(new.values()), self.jobs):
            self.found[list(new)[index]] = measured
            if self.progress is not None:
                self.progress(len(self.found), self.planned)
        return [self.found[key] for key in keys]


def measure(task: Task) -> Measured:
    """Replay a task's point, and return the part of it that is wanted."""
    changed = task.point.stretch or task.point.settings
    try:
        # A log is kept to see what a policy does with results: the same on every machine.
        run = run_point(task.point, record=task.kind == "decode" and not changed)
    except MoesimError as error:
        return Measured(error=" ".join(str(error).split()))
    return settled(run) if task.kind == "decode" else prompt_step(run)


def prompt_step(run: Replayed) -> Measured:
    """Return the step of the prompts."""
    return Measured(run.heads[0].now_ns, int(run.prepared.workload.prompts.sum()))


def settled(run: Replayed) -> Measured:
    """Return the later half of the tokens decoded."""
    steps = len(run.heads) - 1
    begin, end = run.heads[steps // 2], run.heads[-1]
    ns = end.now_ns - begin.now_ns
    spent = [b - a for a, b in zip(begin.time_ns, end.time_ns, strict=True)]
    busy = [b - a for a, b in zip(begin.busy_ns, end.busy_ns, strict=True)]
    earlier, copied = link_bytes(begin), link_bytes(end)
    whole = summarize(run)
    part = {
        "makespan_ns": ns,
        "time_ns": dict(zip(TIMES, spent, strict=True)),
        "lanes": {name: amount / ns for name, amount in zip(whole["lanes"], busy, strict=True)},
        "link_bytes": {name: copied[name] - earlier[name] for name in copied},
        # Counted over the whole run only; explain() is not to say it of this part.
        "prefetch": {"wasted_bytes": 0},
    }
    detail = {
        **{key: part[key] for key in ("time_ns", "lanes", "link_bytes")},
        "why": explain(part),
        "changes": changes_of(run),
        "notices": list(run.prepared.notices),
    }
    return Measured(ns, (steps - steps // 2) * run.prepared.workload.sequences, detail)


def changes_of(run: Replayed) -> str:
    """Say in a few words what a run did that the model does not, or that nobody can.

    Of a run that was not recorded, nothing.
    """
    if run.log is None:
        return ""
    if run.prepared.chosen.name == "pregated":  # the future that it sees is that of other gates
        return "retrained gates"
    bits, late = changes(run.log, run.prepared.setting.precision)
    said = [FUTURE] * any(FUTURE in line for line in run.prepared.notices)
    return ", ".join([*said, *["fewer bits"] * bool(bits), *["experts late"] * late])


def made_up(spec: ModelSpec, context: int, batch: int) -> tuple[Trace, str]:
    """Return routing made up for a model, after the preset that is most like it, and a note."""
    own = [name for name, preset in PRESETS.items() if preset.model == spec.name]

    def distance(name: str) -> float:
        preset = PRESETS[name]
        return abs(math.log(preset.experts / spec.experts)) + abs(
            math.log(preset.top_k / spec.top_k)
        )

    name = own[0] if own else min(PRESETS, key=distance)
    longest = min(PROMPT // batch, context)
    trace = synthesize(
        name, layers=spec.layers, experts=spec.experts, top_k=min(spec.top_k, spec.experts),
        sequences=batch + OTHERS, prompt=max(WARM, longest), generate=DECODE + 1,
        width=min(spec.top_k, spec.experts),
    )  # fmt: skip
    meta = {**trace.meta, "model": spec.name, "spec": spec_to_dict(spec)}
    said = f"routing is made up after statistics of {PRESETS[name].model}"
    if not own:
        said += f", the nearest to {spec.name} of which there are some"
    said += (
        f"; what is popular was counted on {OTHERS} other texts, one on the same subject; "
        "--trace takes your own"
    )
    return msgspec.structs.replace(trace, meta=meta), said


def loaded(trace: Trace | Path | str, spec: ModelSpec) -> Trace:
    """Return a trace that carries the model it is asked about."""
    found = trace if isinstance(trace, Trace) else load_trace(Path(trace), spec=spec)
    meta = {**found.meta, "model": spec.name, "spec": spec_to_dict(spec)}
    return msgspec.structs.replace(found, meta=meta)


def scene_of(asked: Question, routing: Trace, folder: Path, machine: str) -> Scene:
    """Write routing and machine to files; prompts are as long as the trace has sequences for."""
    from moesim.calibrate.assembly import profile_text

    trace, hardware = folder / "trace.npz", folder / "hardware.yaml"
    write_trace(routing, trace)
    hardware.write_text(profile_text(asked.profile), encoding="utf-8")
    _, starts = rows_by_sequence(routing)
    lengths = np.sort(np.diff(starts))[::-1]
    if len(lengths) < asked.batch:
        raise InputError(
            f"a batch of {asked.batch} is more than the trace holds: {len(lengths)} sequences"
        )
    longest = int(lengths[asked.batch - 1])
    if longest <= DECODE:
        raise InputError(
            f"{asked.batch} sequences of the trace have {longest} tokens; more than {DECODE} are "
            "needed"
        )
    prompt = min(max(1, PROMPT // asked.batch), asked.context, longest)
    return Scene(
        trace=trace, hardware=hardware, asked=asked, prompt=prompt,
        warm=min(WARM, longest - DECODE), machine=machine,
    )  # fmt: skip
