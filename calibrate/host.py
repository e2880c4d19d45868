"""What the host itself costs: walking a layer, handing work to lanes, waiting for it, deciding.

These are times of the thread that runs the host program, so its own clock takes them. The host
program and the hooks run here as plain Python, since that is how they run beside a real machine; a
compiled simulation takes the same decisions faster, which is no time of the machine it simulates.

The host program walks a made-up trace on the lanes of the device, on which every operation does
nothing. What is left of a layer step without its hooks, and without the time in which the host
waits, is a base and so much for every submission: a line through walks of several policies. A
decision is all hooks of one layer step, since a simulation charges it once per layer step.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from moesim.calibrate.fit import Fit, fit_line
from moesim.calibrate.series import Bench, Series, Task, point
from moesim.calibrate.timing import Limits, measure, summary
from moesim.errors import CalibrationError, MoesimError
from moesim.host import run_steps
from moesim.model import ModelSpec, expert_bytes, first_layers, load_model
from moesim.policies.api import HOOKS
from moesim.policies.registry import BUILTIN, choose
from moesim.profile import DEFAULT_PRESET, HardwareProfile, Host, load_profile
from moesim.real.lanes import Lane, Work
from moesim.real.routing import routing_of
from moesim.real.torch_machine import Operation, TorchMachine
from moesim.run import Prepared, prepare
from moesim.state import OK, host_error
from moesim.traces.format import MISSING, Trace
from moesim.traces.synthetic import synthesize
from moesim.traces.workload import cut
from moesim.types import LANES, FloatArray, as_scalars

Clock = Callable[[], int]
"""As `time.perf_counter_ns`, which tickets use too."""

SHORT_S = 100e-6
"""An operation that is waited for; it sleeps, and so leaves Python to the host as kernels do."""
MODEL = "qwen3-30b-a3b"
"""Whose experts the policies decide about, in fewer layers."""
LAYERS = 8
STEPS = 48
QUICK_STEPS = 16
PROMPT = 8
WARM_UPS = 3
"""Decode steps that do not count."""
WALKED = ("all-cpu", "static", "lru", "on-demand", "dali", "fate", "pregated")
"""Policies with which a layer's own time is measured: they submit different numbers of operations.
"""
APART = "dali"
"""Of these, the one that is held out."""


# Submitting and waiting.


def nothing() -> None:
    """Do nothing, on a lane."""


def sync_once(
    lane: Lane, sleep: Callable[[float], None] = time.sleep, clock: Clock = time.perf_counter_ns
) -> Callable[[], int]:
    """Return an operation that waits for a short one, and the ns from its end until it is known.

    The end is taken by the host's own clock: a device's is known to some µs only, as much as this.
    """

    def once() -> int:
        ended: list[int] = []

        def work() -> None:
            sleep(SHORT_S)
            ended.append(clock())

        lane.submit(work).wait()
        return max(1, clock() - ended[0])

    return once


def sync_series(bench: Bench) -> Series:
    """Return `host/sync/short`."""
    lanes = bench.device.lanes
    lane = lanes["gpu"] if "gpu" in lanes else lanes["cpu"]
    timed = measure(sync_once(lane), bench.limits)
    facts: dict[str, float | str] = {"lane": lane.name}
    return Series(name="host/sync/short", unit="waits", points=(point(1, timed),), facts=facts)


# Walking and deciding.


class Idle:
    """What operations do when they do nothing; see `torch_machine.Doer`. Routing is sorted, as the
    host does it for experts that are really computed."""

    def __init__(self, experts: int) -> None:
        """Take the number of experts."""
        self.experts = experts

    def begin(self, step: int) -> None:
        """Do nothing."""

    def pieces(self, operation: Operation) -> Sequence[Work]:
        """Return nothing to do."""
        return [nothing]

    def choice(self, step: int, layer: int, batch: int) -> None:
        """Return None: the trace's choice counts."""

    def guess(self, guess: int, layer: int) -> None:
        """Return None: the trace's guess counts."""

    def route(self, layer: int, batch: int, ids: Any, weights: Any) -> None:
        """Sort a batch's choice."""
        import torch

        routing_of(ids, weights, self.experts, [0, len(ids)], torch.bfloat16)


class Standing(NamedTuple):
    """Lanes that a device without all of them stands on."""

    lanes: Mapping[str, Lane]


@contextmanager
def all_lanes(bench: Bench) -> Iterator[Standing]:
    """Give the lanes of the device, or others for as long where it has not all of them."""
    if set(LANES) <= bench.device.lanes.keys():
        yield Standing(bench.device.lanes)
        return
    lanes = {name: Lane(name) for name in LANES}
    try:
        yield Standing(lanes)
    finally:
        for lane in lanes.values():
            lane.close()


class Watched:
    """A policy whose hooks are timed."""

    def __init__(self, policy: Any, clock: Clock) -> None:
        """Wrap the hooks that it has."""
        self.ns = 0
        for hook in HOOKS:
            if hasattr(policy, hook):
                setattr(self, hook, partial(self.timed, getattr(policy, hook), clock))

    def timed(self, hook: Callable[[Any, Any], None], clock: Clock, view: Any, plan: Any) -> None:
        """Call a hook and add its time."""
        start = clock()
        hook(view, plan)
        self.ns += clock() - start


class Walked(NamedTuple):
    """The steps of a run that count, per layer step."""

    host_ns: FloatArray
    """(steps,): without hooks and waits."""
    decision_ns: FloatArray
    """(steps,): all hooks."""
    launches: float
    """Submissions of one layer step, on average; a step's last operation is shared out."""


@cache
def walked_model() -> ModelSpec:
    """Return the model, with fewer layers."""
    return first_layers(load_model(MODEL), LAYERS)


@cache
def walked_trace(steps: int) -> Trace:
    """Return two sequences: one to be replayed, and one that was observed beforehand."""
    model = walked_model()
    return synthesize(
        layers=LAYERS, experts=model.experts, top_k=model.top_k, sequences=2, prompt=PROMPT,
        generate=steps + WARM_UPS + 1,
    )  # fmt: skip


def without_choices(trace: Trace) -> Trace:
    """Return the trace of a model whose routers choose nothing."""
    experts = np.full_like(trace.experts, MISSING)
    return Trace(
        experts=experts, layer_ids=trace.layer_ids, phase=trace.phase, sequence=trace.sequence,
        position=trace.position, meta=trace.meta,
    )  # fmt: skip


def prepared(policy: str, trace: Trace, profile: HardwareProfile) -> Prepared:
    """Return a run of one sequence, with room for a quarter of the experts, or for all if need be.

    Raises CalibrationError if the policy refuses both.
    """
    model = walked_model()
    all_bytes = model.experts * model.layers * expert_bytes(model)
    refusal = ""
    for budget_bytes in (all_bytes // 4, 2 * all_bytes):
        try:
            return prepare(
                trace, cut(trace), model, profile, choose(policy), budget_bytes=budget_bytes
            )
        except MoesimError as error:
            refusal = str(error)
    raise CalibrationError(f"policy {policy} cannot be timed: {refusal}")


def walk(run: Prepared, standing: Any) -> Walked:
    """Run a prepared run on lanes on which every operation does nothing.

    Prefill and the first decode steps do not count. Raises PolicyError for a broken rule.
    """
    policy = Watched(run.policy, time.perf_counter_ns)
    machine = TorchMachine(standing, run.feed, Idle(run.setting.experts))
    host = as_scalars(run.host)._replace(seen=run.host.seen)
    rows = []
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        for step in range(len(run.host.steps.phase)):
            policy.ns, launches, waits = 0, len(machine.tickets), len(machine.waited)
            start = time.perf_counter_ns()
            rule = run_steps(machine, policy, host, step, step + 1)
            spent = time.perf_counter_ns() - start
            if rule != OK:
                raise host_error(run.host, run.chosen.name)
            waited = sum(one.end_ns - one.start_ns for one in machine.waited[waits:])
            rows.append((spent - policy.ns - waited, policy.ns, len(machine.tickets) - launches))
        machine.drain()
    counted = np.array(rows[1 + WARM_UPS :], np.float64) / run.host.layers
    return Walked(counted[:, 0], counted[:, 1], float(counted[:, 2].mean()))


def steps_for(bench: Bench) -> int:
    """Return how many decode steps count."""
    return QUICK_STEPS if bench.quick else STEPS


def walk_facts(model: ModelSpec) -> dict[str, float | str]:
    """Return what is to be known of a walk."""
    return {
        "how": "plain Python, on lanes that do nothing",
        "model": f"{model.name}, {model.layers} layers",
        "estimates": f"of the preset {DEFAULT_PRESET}",
        "sequences": 1,
    }


def walk_series(bench: Bench) -> Series:
    """Return what a layer step takes the host program, by submissions: a policy is a point."""
    profile, trace = load_profile(DEFAULT_PRESET)[0], walked_trace(steps_for(bench))
    walks = [(name, trace) for name in WALKED] + [(WALKED[0], without_choices(trace))]
    points = []
    with all_lanes(bench) as standing:
        for name, routed in walks:
            walked = walk(prepared(name, routed, profile), standing)
            timed = summary(np.maximum(walked.host_ns, 1), bench.limits)
            points.append(point(walked.launches, timed, held_out=name == APART))
    facts = walk_facts(walked_model()) | {"policies": ", ".join(WALKED)}
    ordered = tuple(sorted(points, key=lambda p: p.at))
    return Series(name="host/walk", unit="submissions", points=ordered, facts=facts)


def decision_series(bench: Bench, policy: str) -> Series:
    """Return what all hooks of one layer step take, of one sequence in decode."""
    profile, trace = load_profile(DEFAULT_PRESET)[0], walked_trace(steps_for(bench))
    run = prepared(policy, trace, profile)
    with all_lanes(bench) as standing:
        walked = walk(run, standing)
    timed = decision_timed(walked.decision_ns, bench.limits)
    facts = walk_facts(walked_model()) | {
        "budget_bytes": run.setting.budget_bytes,
        "mean_ns": float(walked.decision_ns.mean()),
    }
    return Series(name=f"host/decision/{policy}", unit="sequences", points=(timed,), facts=facts)


def decision_timed(samples: FloatArray, limits: Limits) -> Any:
    """Return a point of decisions; what a clock cannot tell from nothing counts as 1 ns."""
    return point(1, summary(np.maximum(samples, 1), limits))


def fit_walk(series: Series) -> Fit:
    """Fit `per layer + per launch * submissions` to walks; that of one policy judges it.

    Raises CalibrationError for fewer than two numbers of submissions.
    """
    own, apart = (
        np.array([(p.at, p.ns) for p in series.points if p.held_out == held_out]).reshape(-1, 2).T
        for held_out in (False, True)
    )
    try:
        return fit_line(own[0], own[1], (apart[0], apart[1]) if apart.size else None)
    except CalibrationError as error:
        raise CalibrationError(f"{series.name}: {error}") from None


def host_section(found: Sequence[Series]) -> Host:
    """Return the section of a profile from series of this module.

    Of a policy's decisions it is the median, since it is the work that differs from step to step;
    what a policy that was not measured takes is the median of those that were.

    Raises CalibrationError naming a series that is missing.
    """
    by_name = {series.name: series for series in found}
    for name in ("host/sync/short", "host/walk"):
        if name not in by_name:
            raise CalibrationError(f"{name} was not measured")
    prefix = "host/decision/"
    decisions = {
        name.removeprefix(prefix): round(series.points[0].median_ns)
        for name, series in sorted(by_name.items())
        if name.startswith(prefix)
    }
    if not decisions:
        raise CalibrationError("no policy's decisions were measured")
    layer_ns, launch_ns = fit_walk(by_name["host/walk"]).parameters
    return Host(
        per_layer_ns=round(float(layer_ns)),
        per_launch_ns=round(float(launch_ns)),
        per_sync_ns=round(by_name["host/sync/short"].points[0].ns),
        decision_ns=round(float(np.median(list(decisions.values())))),
        decision_ns_by_policy=decisions,
    )


def tasks(bench: Bench, policies: Sequence[str] = tuple(BUILTIN)) -> list[Task]:
    """Return what is to be measured."""
    walks = (Task(f"host/decision/{p}", 0.5, partial(decision_series, policy=p)) for p in policies)
    return [
        Task("host/sync/short", bench.limits.seconds, sync_series),
        Task("host/walk", 0.5 * len(WALKED), walk_series),
        *walks,
    ]
