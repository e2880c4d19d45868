"""What the host costs: who is timed, on which clock, and what a profile is told."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from moesim.calibrate import host as host_module
from moesim.calibrate.host import (
    LAYERS,
    MODEL,
    WALKED,
    WARM_UPS,
    Standing,
    Watched,
    all_lanes,
    decision_series,
    fit_walk,
    host_section,
    prepared,
    sync_once,
    sync_series,
    tasks,
    walk,
    walk_series,
    walked_model,
    walked_trace,
    without_choices,
)
from moesim.calibrate.series import Bench, Point, Series
from moesim.calibrate.timing import Limits
from moesim.errors import CalibrationError, PolicyError, RealError
from moesim.model import expert_bytes
from moesim.policies.registry import BUILTIN
from moesim.profile import load_profile
from moesim.real.devices import Processor
from moesim.real.emulated import Emulated, Throttle
from moesim.real.lanes import Lane
from moesim.types import DECODE, LANES

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


def test_waiting_counts_from_the_end_of_the_operation_by_the_hosts_own_clock() -> None:
    """It ends at 300 and is known to be over at 1,000; the lane's clock is far away from that."""
    slept: list[float] = []
    moments = iter([300, 1_000])
    with Lane("gpu") as lane:
        assert sync_once(lane, slept.append, lambda: next(moments))() == 700
    assert slept == [100e-6]


def test_series_of_waits(bench: Bench) -> None:
    found = sync_series(bench)
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


def test_a_walk_counts_decode_steps_and_what_they_submit(bench: Bench) -> None:
    """A policy with `dispatch` alone. A layer has attention, gate, the experts' SEND and RETURN, an
    expert for each choice, COMBINE; a step has its HEAD.
    """
    run = prepared("all-cpu", walked_trace(STEPS), PROFILE)
    with all_lanes(bench) as standing:
        walked = walk(run, standing)
    assert len(walked.host_ns) == (run.host.steps.phase == DECODE).sum() - WARM_UPS
    assert (walked.host_ns > 0).all()
    assert (walked.decision_ns > 0).all()
    assert walked.launches == 2 + 2 + walked_model().top_k + 1 + 1 / LAYERS


def test_time_in_hooks_is_no_time_of_the_host(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that only hooks move on: each takes 1,000 of it, and the rest of a step nothing."""
    now = [0]
    monkeypatch.setattr("moesim.calibrate.host.time.perf_counter_ns", lambda: now[0])
    run = prepared("all-cpu", walked_trace(STEPS), PROFILE)
    dispatch = run.policy.dispatch

    class Slow:
        def dispatch(self, view: Any, plan: Any) -> None:
            now[0] += 1_000
            dispatch(view, plan)

    with all_lanes(bench) as standing:
        walked = walk(run._replace(policy=Slow()), standing)
    assert (walked.decision_ns == 1_000).all()
    assert (walked.host_ns == 0).all()


def test_lanes_are_the_device_s_or_others_for_as_long(bench: Bench) -> None:
    emulated = Emulated(1 << 20, Throttle(0, 1e12))
    with all_lanes(bench._replace(device=emulated)) as standing:
        assert standing.lanes is emulated.lanes
    emulated.close()
    with all_lanes(bench) as standing:
        assert list(standing.lanes) == list(LANES)
        standing.lanes["gpu"].submit(lambda: None).wait()
    with pytest.raises(RealError, match="lane gpu is closed"):
        standing.lanes["gpu"].submit(lambda: None)


@pytest.mark.parametrize("policy", sorted(BUILTIN))
def test_every_policy_can_be_timed(bench: Bench, policy: str) -> None:
    found = decision_series(bench, policy)
    assert found.name == f"host/decision/{policy}"
    assert found.facts["how"] == "plain Python, on lanes that do nothing"
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
        walk(run._replace(policy=Idle()), Standing({name: Lane(name) for name in LANES}))


def test_policies_walk_and_one_walks_without_experts(bench: Bench) -> None:
    """Attention, gate and combine of each layer and a head per step; with experts far more."""
    found = walk_series(bench)
    assert len(found.points) == len(WALKED) + 1
    assert found.points[0].at == 3 + 1 / LAYERS
    assert found.points[1].at >= 3 + walked_model().top_k
    assert sum(p.held_out for p in found.points) == 1
    assert fit_walk(found).parameters[1] > 0


def test_a_trace_without_choices_has_no_activations(bench: Bench) -> None:
    trace = walked_trace(STEPS)
    run = prepared("on-demand", without_choices(trace), PROFILE)
    with all_lanes(bench) as standing:
        walk(run, standing)
    assert not run.host.counts.any()
    assert trace.layers == LAYERS
    assert walked_model().name == MODEL


# What a profile is told.


def test_a_walk_is_a_base_and_so_much_per_submission() -> None:
    """3 submissions in 15 us and 13 in 55: 4 us each and 3 us for the layer; 23 are to take 95."""
    own = series("host/walk", (3, 15e3, 0), (13, 55e3, 0), (23, 190e3, 0))
    *fitted, apart = own.points
    judged = (*fitted, msgspec.structs.replace(apart, held_out=True))
    fit = fit_walk(msgspec.structs.replace(own, points=judged))
    assert fit.parameters == pytest.approx([3000, 4000], rel=1e-3)
    assert fit.error == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(CalibrationError, match="host/walk: a fit needs 2 different sizes, not 1"):
        fit_walk(series("host/walk", (3, 15e3, 0)))


def test_the_section_by_hand() -> None:
    found = [
        series("host/sync/short", (1, 6000, 6500)),
        series("host/walk", (3, 15e3, 0), (13, 55e3, 0)),
        series("host/decision/lru", (1, 100, 110)),
        series("host/decision/dali", (1, 200, 220)),
        series("host/decision/static", (1, 10, 12)),
    ]
    section = host_section(found)
    assert section.per_layer_ns == 3000
    assert section.per_launch_ns == 4000
    assert section.per_sync_ns == 6000
    assert section.decision_ns == 110
    assert section.decision_ns_by_policy == {"lru": 110, "dali": 220, "static": 12}
    for missing in (0, 1):
        with pytest.raises(CalibrationError, match=f"{found[missing].name} was not measured"):
            host_section(found[:missing] + found[missing + 1 :])
    with pytest.raises(CalibrationError, match="no policy's decisions"):
        host_section(found[:2])


def test_tasks_are_named_as_their_series(bench: Bench) -> None:
    named = tasks(bench, ["static"])
    assert [task.name for task in named] == [
        "host/sync/short", "host/walk", "host/decision/static",
    ]  # fmt: skip
    for task in named:
        assert task.run(bench).name == task.name
    assert len(tasks(bench)) == 2 + len(BUILTIN)
