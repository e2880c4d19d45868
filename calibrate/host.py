"""What the host itself costs: handing work to a lane, waiting for it, walking a layer, deciding.

These are times of the thread that runs the host program, so its own clock takes them. The host
program and the hooks run here as plain Python, since that is how they run beside a real machine; a
compiled simulation takes the same decisions faster, which is no time of the machine it simulates.

For layers and decisions the host program walks a made-up trace on a machine without time: every
operation is over when it is submitted. What the policy sees is realistic, since estimates come from
cost tables and never from the machine. A layer's time is split into what each submission adds and
what is left for a layer without any; a decision is all hooks of one layer step, since a simulation
charges it once per layer step.
"""

import threading
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import msgspec
import numpy as np

from moesim.calibrate.series import Bench, Series, Task, point
from moesim.calibrate.timing import Limits, measure, summary
from moesim.errors import CalibrationError, MoesimError
from moesim.host import run_steps
from moesim.model import ModelSpec, expert_bytes, load_model
from moesim.policies.api import HOOKS
from moesim.policies.registry import BUILTIN, choose
from moesim.profile import DEFAULT_PRESET, HardwareProfile, Host, load_profile
from moesim.real.lanes import Lane
from moesim.run import Feed, Prepared, prepare
from moesim.state import OK, host_error
from moesim.traces.format import MISSING, Trace
from moesim.traces.synthetic import synthesize
from moesim.traces.workload import cut
from moesim.types import FloatArray, IntArray, as_scalars

Clock = Callable[[], int]
"""As `time.perf_counter_ns`, which tickets use too."""

QUEUED = 200
"""Submissions in a row."""
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
WALKED = "lru"
"""The policy with which a layer's own time is measured."""


# Submitting and waiting.


def nothing() -> None:
    """Do nothing, on a lane."""


def launch_once(lane: Lane, count: int, clock: Clock = time.perf_counter_ns) -> Callable[[], int]:
    """Return an operation that submits work to a lane that is busy, and the ns that one takes."""

    def once() -> int:
        go = threading.Event()
        lane.submit(go.wait)
        try:
            start = clock()
            for _ in range(count):
                last = lane.submit(nothing)
            spent = clock() - start
        finally:
            go.set()
        last.wait()
        return max(1, spent // count)

    return once


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


def lane_series(bench: Bench, name: str) -> Series:
    """Return `host/launch/queued` or `host/sync/short`."""
    lanes = bench.device.lanes
    lane = lanes["gpu"] if "gpu" in lanes else lanes["cpu"]
    ways: dict[str, tuple[int, Callable[[], int]]] = {
        "host/launch/queued": (QUEUED, launch_once(lane, QUEUED)),
        "host/sync/short": (1, sync_once(lane)),
    }
    count, once = ways[name]
    timed = measure(once, bench.limits)
    return Series(
        name=name, unit="in a row", points=(point(count, timed),), facts={"lane": lane.name}
    )


# Walking and deciding.


class Timeless:
    """A machine on which everything is over when it is submitted; see `moesim.machine.Machine`."""

    def __init__(self, feed: Feed) -> None:
        """Take what routers choose and predictors guess."""
        self.feed = feed
        self.tickets = 0

    def begin(self, step: int, phase: int) -> None:
        """Do nothing."""

    def submit(self, *operation: int) -> int:
        """Return the next ticket."""
        self.tickets += 1
        return self.tickets

    def wait(self, ticket: int) -> None:
        """Do nothing."""

    def done(self, ticket: int) -> bool:
        """Return True."""
        return True

    def pause(self, ns: int) -> None:
        """Do nothing."""

    def cancel(self, ticket: int) -> bool:
        """Return False: it is over."""
        return False

    def promote(self, ticket: int) -> bool:
        """Return False: it is over."""
        return False

    def route(
        self, step: int, layer: int, batch: int, first: int, ids: IntArray, weights: FloatArray
    ) -> int:
        """Write what the router chose."""
        begin, end = self.feed.steps.offset[step, batch : batch + 2]
        n = int(end - begin)
        np.asarray(ids)[first : first + n] = self.feed.chosen[begin:end, layer]
        if self.feed.weights is not None:
            np.asarray(weights)[first : first + n] = self.feed.weights[begin:end, layer]
        return n

    def predict(self, guess: int, step: int, layer: int, ids: IntArray, scores: FloatArray) -> int:
        """Write a guess."""
        guessed, score = self.feed.guesses[guess]
        begin, end = self.feed.steps.offset[step][0], self.feed.steps.offset[step][-1]
        n, width = int(end - begin), guessed.shape[2]
        np.asarray(ids)[guess, :n, :width] = guessed[begin:end, layer]
        if score is not None:
            np.asarray(scores)[guess, :n, :width] = score[begin:end, layer]
        return n


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
    """(steps,): without the hooks."""
    decision_ns: FloatArray
    """(steps,): all hooks."""
    launches: float
    """Submissions of one layer step, on average; a step's last operation is shared out."""


@cache
def walked_model() -> ModelSpec:
    """Return the model, with fewer layers."""
    changes: dict[str, Any] = {"hidden_layers": LAYERS, "layer_ids": tuple(range(LAYERS))}
    return msgspec.structs.replace(load_model(MODEL), **changes)


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


def walk(run: Prepared, clock: Clock = time.perf_counter_ns) -> Walked:
    """Run a prepared run on a machine without time.

    Prefill and the first decode steps do not count. Raises PolicyError for a broken rule.
    """
    machine, policy = Timeless(run.feed), Watched(run.policy, clock)
    host = as_scalars(run.host)._replace(seen=run.host.seen)
    layers = run.host.layers
    rows = []
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        for step in range(len(run.host.steps.phase)):
            policy.ns, launches, start = 0, machine.tickets, clock()
            rule = run_steps(machine, policy, host, step, step + 1)
            spent = clock() - start
            if rule != OK:
                raise host_error(run.host, run.chosen.name)
            rows.append((spent - policy.ns, policy.ns, machine.tickets - launches))
    counted = np.array(rows[1 + WARM_UPS :], np.float64) / layers
    return Walked(counted[:, 0], counted[:, 1], float(counted[:, 2].mean()))


def steps_for(bench: Bench) -> int:
    """Return how many decode steps count."""
    return QUICK_STEPS if bench.quick else STEPS


def walk_facts(model: ModelSpec) -> dict[str, float | str]:
    """Return what is to be known of a walk."""
    return {
        "how": "plain Python, on a machine without time",
        "model": f"{model.name}, {model.layers} layers",
        "estimates": f"of the preset {DEFAULT_PRESET}",
        "sequences": 1,
    }


def layer_series(bench: Bench) -> Series:
    """Return what a layer step takes the host program, by submissions: without and with experts."""
    profile, trace = load_profile(DEFAULT_PRESET)[0], walked_trace(steps_for(bench))
    points = []
    for routed in (without_choices(trace), trace):
        walked = walk(prepared(WALKED, routed, profile))
        timed = summary(np.maximum(walked.host_ns, 1), bench.limits)
        points.append(point(walked.launches, timed))
    facts = walk_facts(walked_model()) | {"policy": WALKED}
    return Series(name="host/layer", unit="submissions", points=tuple(points), facts=facts)


def decision_series(bench: Bench, policy: str) -> Series:
    """Return what all hooks of one layer step take, of one sequence in decode."""
    profile, trace = load_profile(DEFAULT_PRESET)[0], walked_trace(steps_for(bench))
    run = prepared(policy, trace, profile)
    walked = walk(run)
    timed = decision_timed(walked.decision_ns, bench.limits)
    facts = walk_facts(walked_model()) | {
        "budget_bytes": run.setting.budget_bytes,
        "mean_ns": float(walked.decision_ns.mean()),
    }
    return Series(name=f"host/decision/{policy}", unit="sequences", points=(timed,), facts=facts)


def decision_timed(samples: FloatArray, limits: Limits) -> Any:
    """Return a point of decisions; what a clock cannot tell from nothing counts as 1 ns."""
    return point(1, summary(np.maximum(samples, 1), limits))


def split_layer(series: Series) -> tuple[int, int]:
    """Return ns of a layer without submissions, and of what each submission adds to the host.

    Together they give the time of a layer with experts. Those of a layer without any are cheaper
    than an expert's: where a line through both would begin below 0, it begins at 0.

    Raises CalibrationError unless two numbers of submissions were measured.
    """
    at = {p.at for p in series.points}
    if len(at) != 2:
        raise CalibrationError(f"{series.name}: needs 2 numbers of submissions, not {len(at)}")
    few, many = sorted(series.points, key=lambda p: p.at)
    each = max(0.0, (many.ns - few.ns) / (many.at - few.at))
    layer = many.ns - each * many.at
    return (0, round(many.ns / many.at)) if layer < 0 else (round(layer), round(each))


def host_section(found: Sequence[Series]) -> Host:
    """Return the section of a profile from series of this module.

    A launch is the lane's own part and the host program's. Of a policy's decisions it is the
    median, since it is the work that differs from step to step; what a policy that was not measured
    takes is the median of those that were.

    Raises CalibrationError naming a series that is missing.
    """
    by_name = {series.name: series for series in found}
    for name in ("host/launch/queued", "host/sync/short", "host/layer"):
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
    layer_ns, each_ns = split_layer(by_name["host/layer"])
    return Host(
        per_layer_ns=layer_ns,
        per_launch_ns=each_ns + round(by_name["host/launch/queued"].points[0].ns),
        per_sync_ns=round(by_name["host/sync/short"].points[0].ns),
        decision_ns=round(float(np.median(list(decisions.values())))),
        decision_ns_by_policy=decisions,
    )


def tasks(bench: Bench, policies: Sequence[str] = tuple(BUILTIN)) -> list[Task]:
    """Return what is to be measured."""
    names = ("host/launch/queued", "host/sync/short")
    seconds = bench.limits.seconds
    found = [Task(name, seconds, partial(lane_series, name=name)) for name in names]
    found.append(Task("host/layer", 1.0, layer_series))
    walks = (Task(f"host/decision/{p}", 0.5, partial(decision_series, policy=p)) for p in policies)
    return [*found, *walks]
