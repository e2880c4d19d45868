"""What the host costs: who is timed, on which clock, and what a profile is told."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from moesim.calibrate import host as host_module
from moesim.calibrate.host import (
    LAYERS,
    MODEL,
    QUEUED,
    WARM_UPS,
    Timeless,
    Watched,
    decision_series,
    host_section,
    lane_series,
    launch_once,
    layer_series,
    prepared,
    split_layer,
    sync_once,
    tasks,
    walk,
    walked_model,
    walked_trace,
    without_choices,
)
from moesim.calibrate.series import Bench, Point, Series
from moesim.calibrate.timing import Limits
from moesim.errors import CalibrationError, PolicyError
from moesim.model import expert_bytes
from moesim.policies.registry import BUILTIN
from moesim.profile import load_profile
from moesim.real.devices import Processor
from moesim.real.lanes import Lane
from moesim.sim.replay import SimpyRun
from moesim.types import DECODE, H2D

LIMITS = Limits(warm_ups=0, least=2, most=2, seconds=0.1)
PROFILE = load_profile("rtx3090-pcie4-ddr4")[0]
STEPS = 6


def ticking(step: int = 10) -> Callable[[], int]:
    """Return a clock that goes on by `step` ns at each reading."""
    count = itertools.count(0, step)
    return lambda: next(count)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(host_module, "QUICK_STEPS", STEPS)
    device = Processor(1)
    yield Bench(device, LIMITS, True)
    device.close()


def series(name: str, *points: tuple[float, float, float]) -> Series:
    """Return a series of (at, ns, median_ns)."""
    made = tuple(
        Point(at=at, ns=ns, median_ns=median, spread=0, repetitions=7, settled=True, outliers=0)
        for at, ns, median in points
    )
    return Series(name=name, unit="x", points=made)


# Submitting and waiting.


def test_work_is_submitted_to_a_busy_lane() -> None:
    """Given time for it, nothing of them is done when the clock is read before and after them."""
    with Lane("gpu") as lane:
        undone: list[bool] = []
        tickets: list[Any] = []
        submit = lane.submit
        submit(lambda: None).wait()  # its thread imports torch first

        def watched(work: Any, after: Any = ()) -> Any:
            tickets.append(submit(work, after))
            time.sleep(0.0005)
            return tickets[-1]

        lane.submit = watched  # type: ignore[assignment, method-assign]
        tick = ticking(1000)

        def clock() -> int:
            undone.append(not any(ticket.done for ticket in tickets))
            return tick()

        assert launch_once(lane, 50, clock)() == 1000 // 50
        assert undone == [True, True]
        assert len(tickets) == 51


def test_waiting_counts_from_the_end_of_the_operation_by_the_hosts_own_clock() -> None:
    """It ends at 300 and is known to be over at 1,000; the lane's clock is far away from that."""
    slept: list[float] = []
    moments = iter([300, 1_000])
    with Lane("gpu") as lane:
        assert sync_once(lane, slept.append, lambda: next(moments))() == 700
    assert slept == [100e-6]


def test_a_lane_goes_on_if_a_submission_fails() -> None:
    """Else whoever closes it would wait for ever."""
    lane = Lane("gpu")
    with pytest.raises(ZeroDivisionError):
        launch_once(lane, 5, lambda: 1 // 0)()
    closing = threading.Thread(target=lane.close)
    closing.start()
    closing.join(timeout=10)
    assert not closing.is_alive()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("host/launch/queued", QUEUED),
        ("host/sync/short", 1),
    ],
)
def test_series_of_lanes(bench: Bench, name: str, count: int) -> None:
    found = lane_series(bench, name)
    assert (found.name, found.points[0].at) == (name, count)
    assert found.facts["lane"] == "cpu"
    assert found.points[0].ns >= 1


# Walking and deciding.


def test_hooks_are_timed_and_only_those_that_are_there() -> None:
    calls: list[tuple[Any, Any]] = []

    class OneHook:
        def dispatch(self, view: Any, plan: Any) -> None:
            calls.append((view, plan))

    policy = Watched(OneHook(), ticking(10))
    policy.dispatch("view", "plan")  # type: ignore[attr-defined]
    policy.dispatch("view", "plan")  # type: ignore[attr-defined]
    assert policy.ns == 20
    assert calls == [("view", "plan")] * 2
    assert not hasattr(policy, "after_layer")


def test_a_clock_that_ticks_is_divided_between_host_and_hooks() -> None:
    """A policy with `dispatch` alone: its hook takes one tick of 10 in each layer step.

    Of a step the host's thread reads the clock twice, and each hook twice: between the first and
    the last of the step's readings lie 2 LAYERS + 1 ticks, of which LAYERS are the hooks'.
    """
    run = prepared("all-cpu", walked_trace(STEPS), PROFILE)
    walked = walk(run, ticking(10))
    assert len(walked.host_ns) == (run.host.steps.phase == DECODE).sum() - WARM_UPS
    assert walked.decision_ns == pytest.approx(np.full(len(walked.host_ns), 10.0))
    assert walked.host_ns == pytest.approx(walked.decision_ns + 10 / LAYERS)


def watch(machine: Any) -> list[tuple[int, ...]]:
    """Return what will have been submitted, but for what it waits for."""
    submitted: list[tuple[int, ...]] = []
    submit = machine.submit

    def watched(*operation: int) -> int:
        submitted.append(tuple(map(int, operation[:-3])))
        ticket: int = submit(*operation)
        return ticket

    machine.submit = watched
    return submitted


@pytest.mark.parametrize("policy", ["dali", "lru"])
def test_policies_decide_as_on_a_simulated_machine(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same submissions, one by one: decisions hang on no machine."""
    seen: list[list[tuple[int, ...]]] = []

    class Seen(Timeless):
        def __init__(self, feed: Any) -> None:
            super().__init__(feed)
            seen.append(watch(self))

    monkeypatch.setattr(host_module, "Timeless", Seen)
    walk(prepared(policy, walked_trace(STEPS), PROFILE))
    ready = prepared(policy, walked_trace(STEPS), PROFILE)
    simulated = SimpyRun(ready, seed=0, jitter=0, record=False)
    seen.append(watch(simulated.machine))
    simulated.steps(0, len(ready.host.steps.phase))
    assert any(operation[0] == H2D for operation in seen[0])
    assert seen[0] == seen[1]


@pytest.mark.parametrize("policy", sorted(BUILTIN))
def test_every_policy_can_be_timed(bench: Bench, policy: str) -> None:
    found = decision_series(bench, policy)
    assert found.name == f"host/decision/{policy}"
    assert found.facts["how"] == "plain Python, on a machine without time"
    assert found.points[0].repetitions == STEPS
    assert found.points[0].ns >= 1


@pytest.mark.parametrize(("policy", "share"), [("lru", 0.25), ("all-gpu", 2)])
def test_policies_have_room_for_a_quarter_or_for_all(policy: str, share: float) -> None:
    model = walked_model()
    whole = model.experts * model.layers * expert_bytes(model)
    assert prepared(policy, walked_trace(STEPS), PROFILE).setting.budget_bytes == share * whole


def test_a_policy_that_refuses_is_named() -> None:
    with pytest.raises(CalibrationError, match="policy nosuch cannot be timed: no policy named"):
        prepared("nosuch", walked_trace(STEPS), PROFILE)


def test_a_policy_that_breaks_a_rule_is_named() -> None:
    """It gives no expert a device."""
    run = prepared("all-cpu", walked_trace(STEPS), PROFILE)

    class Idle:
        def dispatch(self, view: Any, plan: Any) -> None:
            pass

    with pytest.raises(PolicyError, match="policy 'all-cpu', hook dispatch"):
        walk(run._replace(policy=Idle()))


def test_layers_with_and_without_experts(bench: Bench) -> None:
    """Attention, gate and combine of each layer and a head per step; with experts far more."""
    found = layer_series(bench)
    few, many = found.points
    assert few.at == pytest.approx(3 + 1 / LAYERS)
    assert many.at >= few.at + walked_model().top_k
    assert found.facts["policy"] == "lru"


def test_a_trace_without_choices_has_no_activations() -> None:
    trace = walked_trace(STEPS)
    run = prepared("on-demand", without_choices(trace), PROFILE)
    walk(run)
    assert not run.host.counts.any()
    assert trace.layers == LAYERS
    assert walked_model().name == MODEL


# What a profile is told.


def test_a_layer_is_split_into_itself_and_its_submissions() -> None:
    """3 submissions in 15 us and 13 in 55: 4 us each and 3 us for the layer."""
    assert split_layer(series("host/layer", (3, 15e3, 0), (13, 55e3, 0))) == (3000, 4000)


def test_a_layer_that_would_take_less_than_nothing_takes_nothing() -> None:
    """3 in 15 us and 13 in 78: what they take on average, so that a layer with experts is right."""
    assert split_layer(series("host/layer", (3, 15e3, 0), (13, 78e3, 0))) == (0, 6000)
    assert split_layer(series("host/layer", (3, 15e3, 0), (13, 14e3, 0))) == (14000, 0)
    with pytest.raises(CalibrationError, match="host/layer: needs 2 numbers of submissions, not 1"):
        split_layer(series("host/layer", (3, 15e3, 0)))


def test_the_section_by_hand() -> None:
    found = [
        series("host/launch/queued", (200, 1500, 1600)),
        series("host/sync/short", (1, 6000, 6500)),
        series("host/layer", (3, 15e3, 0), (13, 55e3, 0)),
        series("host/decision/lru", (1, 100, 110)),
        series("host/decision/dali", (1, 200, 220)),
        series("host/decision/static", (1, 10, 12)),
    ]
    section = host_section(found)
    assert section.per_layer_ns == 3000
    assert section.per_launch_ns == 4000 + 1500
    assert section.per_sync_ns == 6000
    assert section.decision_ns == 110
    assert section.decision_ns_by_policy == {"lru": 110, "dali": 220, "static": 12}
    for missing in (0, 1, 2):
        with pytest.raises(CalibrationError, match=f"{found[missing].name} was not measured"):
            host_section(found[:missing] + found[missing + 1 :])
    with pytest.raises(CalibrationError, match="no policy's decisions"):
        host_section(found[:3])


def test_tasks_are_named_as_their_series(bench: Bench) -> None:
    named = tasks(bench, ["static"])
    assert [task.name for task in named] == [
        "host/launch/queued", "host/sync/short", "host/layer",
        "host/decision/static",
    ]  # fmt: skip
    for task in named:
        assert task.run(bench).name == task.name
    assert len(tasks(bench)) == 3 + len(BUILTIN)
