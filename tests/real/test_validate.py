"""Errors, their parts and the order of policies, of runs whose times are known."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moesim.costs import stretched
from moesim.log import OPERATION, SEGMENT
from moesim.model import GroupedQuery, ModelSpec, expert_bytes
from moesim.policies.registry import choose
from moesim.profile import HardwareProfile, load_profile, with_overrides
from moesim.real import validate
from moesim.real.plots import check_picture, draw_validation
from moesim.real.validate import (
    Observed,
    Spent,
    alternatives,
    compare,
    handing_over_ns,
    makespan_ns,
    observe,
    ranking,
    timelines,
    typical,
)
from moesim.run import Prepared, prepare
from moesim.sim.metrics import TIMES
from moesim.sim.replay import Replayed, replay
from moesim.sim.timeline import write_trace
from moesim.traces.format import Trace
from moesim.traces.synthetic import synthesize
from moesim.traces.workload import cut
from moesim.types import (
    ATTENTION,
    CAUSES,
    COPY_IN,
    EXPERT_GPU,
    GATE,
    GPU,
    H2D,
    HEAD,
    KINDS,
    OUTCOMES,
)

MODEL = ModelSpec(
    name="tiny", model_type="mixtral", hidden_layers=4, layer_ids=(0, 1, 2, 3), experts=8, top_k=2,
    hidden=512, expert_width=256, shared_width=128, dense_width=0, vocab=1000,
    attention=GroupedQuery(heads=4, kv_heads=2, head_dim=64),
)  # fmt: skip
MS = 1_000_000
POLICIES = ("on-demand", "lru", "static", "dali", "all-cpu")


@pytest.fixture(scope="module")
def trace() -> Trace:
    return synthesize(
        layers=4, experts=8, top_k=2, sequences=2, prompt=5, generate=7, seed=1, distances=1
    )


@pytest.fixture(scope="module")
def profile() -> HardwareProfile:
    return load_profile("rtx3090-pcie4-ddr4")[0]


Make = Callable[[str, HardwareProfile], Callable[[], Prepared]]


@pytest.fixture
def make(trace: Trace) -> Make:
    def of(spec: str, profile: HardwareProfile) -> Callable[[], Prepared]:
        return lambda: prepare(
            trace, cut(trace, batch=2), MODEL, profile, choose(spec),
            budget_bytes=10 * expert_bytes(MODEL),
        )  # fmt: skip

    return of


def observed(
    makespan_ns: int, *, tpot_ms: float | None = 1.0, time_ns: dict[str, int] | None = None,
    kinds: dict[str, Spent] | None = None, copied: dict[str, int] | None = None,
    outcomes: dict[str, int] | None = None, policy: str = "some", late_ns: int = 0,
) -> Observed:  # fmt: skip
    """Return a run that is said to have been like that."""
    result = {
        "policy": policy,
        "tpot_ms": tpot_ms,
        "ttft_ms": makespan_ns / 4e6,
        "tokens_per_s": 8e9 / makespan_ns,
        "makespan_ns": makespan_ns,
        "time_ns": dict.fromkeys(TIMES, 0) | (time_ns or {}),
        "activations": dict.fromkeys(OUTCOMES, 0) | (outcomes or {}),
    }
    return Observed(result, dict.fromkeys(CAUSES[1:], 0) | (copied or {}), kinds or {}, late_ns)


def test_errors_are_of_the_median_of_repeats() -> None:
    repeats = [observed(ms * MS, tpot_ms=tpot) for ms, tpot in ((40, 2.0), (20, 1.0), (25, 4.0))]
    row = compare(repeats, observed(30 * MS, tpot_ms=3.0))

    assert row["tpot_error"] == pytest.approx(3 / 2 - 1)
    assert row["tpot_ms"]["measured"] == 2.0
    assert row["tpot_ms"]["simulated"] == 3.0
    assert row["tpot_ms"]["spread"] == pytest.approx((4 - 1) / 2)
    assert row["tpot_ms"]["repeats"] == [2.0, 1.0, 4.0]
    assert row["makespan_error"] == pytest.approx(30 / 25 - 1)
    assert row["ttft_error"] == pytest.approx(30 / 25 - 1)
    assert row["tokens_per_s_error"] == pytest.approx(25 / 30 - 1)


def test_without_decode_there_is_no_time_per_token() -> None:
    row = compare([observed(MS, tpot_ms=None)], observed(2 * MS, tpot_ms=None))
    assert row["tpot_error"] is None
    assert row["tpot_ms"]["measured"] is row["tpot_ms"]["spread"] is None
    other = compare([observed(3 * MS, tpot_ms=None)], observed(MS, tpot_ms=None))
    assert ranking([row, other])["ranked_by"] == "makespan_ns"
    assert ranking([row, other])["kendall_tau"] == -1


def test_the_typical_run_is_the_median_or_the_faster_of_two() -> None:
    runs = [observed(ns) for ns in (5, 1, 3, 2)]
    assert typical(runs).result["makespan_ns"] == 2
    assert typical(runs[:3]).result["makespan_ns"] == 3


def test_causes_sum_to_the_error() -> None:
    """Measured 100 ms, simulated 80: the CPU makes 25 of the 20 that are missing, the GPU -5."""
    mine = observed(100 * MS, time_ns={"expert_gpu": 40 * MS, "wait_cpu": 60 * MS})
    theirs = observed(80 * MS, time_ns={"expert_gpu": 45 * MS, "wait_cpu": 35 * MS})
    row = compare([mine], theirs)
    causes = row["time_ns"]

    assert causes["wait_cpu"] == {
        "measured": 60 * MS, "simulated": 35 * MS, "part": -0.25, "share": 1.25
    }  # fmt: skip
    assert causes["expert_gpu"]["part"] == pytest.approx(0.05)
    assert causes["expert_gpu"]["share"] == pytest.approx(-0.25)
    assert sum(one["part"] for one in causes.values()) == pytest.approx(row["makespan_error"])
    assert sum(one["share"] for one in causes.values()) == pytest.approx(1)
    assert row["explains"] == (
        "-20.0% of the makespan, most by wait cpu: -25.0% (measured 60.0 ms, simulated 35.0)"
    )


def test_kinds_have_means_and_what_their_length_makes_of_the_error() -> None:
    """Simulated 80 ms would be 95 with copies as long as measured, and 98 with all that is."""
    mine = observed(
        100 * MS, time_ns={"wait_weights": 100 * MS},
        kinds={"copy_in": Spent(4, 40 * MS), "gate": Spent(2, 2 * MS)},
    )  # fmt: skip
    theirs = observed(
        80 * MS, time_ns={"wait_weights": 80 * MS},
        kinds={"copy_in": Spent(4, 30 * MS), "move": Spent(1, MS)},
    )  # fmt: skip
    row = compare([mine], theirs, {"copy_in": 95 * MS, "all": 98 * MS})
    copies, gate, move = (row["kinds"][kind] for kind in ("copy_in", "gate", "move"))

    assert copies["measured_ns"] == 10 * MS
    assert copies["simulated_ns"] == 7.5 * MS
    assert copies["error"] == pytest.approx(-0.25)
    assert copies["part"] == pytest.approx(-0.15)
    assert copies["share"] == pytest.approx(0.75)
    assert gate["simulated_count"] == move["measured_count"] == 0
    assert gate["simulated_ns"] is gate["error"] is gate["share"] is None
    assert row["rest"] == {"part": pytest.approx(-0.02), "share": pytest.approx(0.1)}
    assert row["explains"].endswith("; -15.0% is in the length of copy in, simulated -25.0%")


def test_what_no_length_explains_may_be_handing_over() -> None:
    mine = observed(
        100 * MS, time_ns={"wait_host": 100 * MS}, kinds={"gate": Spent(1, MS)}, late_ns=15 * MS
    )
    theirs = observed(80 * MS, time_ns={"wait_host": 80 * MS}, kinds={"gate": Spent(1, 2 * MS)})
    row = compare([mine], theirs, {"gate": 79 * MS, "all": 79 * MS})
    assert row["handing_over_ns"] == {
        "measured": 15 * MS, "simulated": 0, "part": -0.15, "share": 0.75
    }  # fmt: skip
    assert row["explains"].endswith(
        "; -21.0% is in no operation's length; handing over makes -15.0%"
    )


def test_handing_over_by_hand() -> None:
    """The gate begins 2 ns after attention, 1 ns after it was submitted; the expert 5 ns after its
    copy; the head at once when it is submitted."""
    operations = np.zeros(5, OPERATION)
    operations["ticket"] = range(1, 6)
    operations["kind"] = ATTENTION, GATE, COPY_IN, EXPERT_GPU, HEAD
    operations["queue"] = GPU, GPU, H2D, GPU, GPU
    operations["submit_ns"] = 0, 11, 0, 20, 70
    operations["after"][3] = 3, 0, 0
    segments = np.array(
        [
            (0, 0, 5, 1),
            (1, 0, 10, 1),
            (2, 12, 15, 1),
            (3, 14, 40, 1),
            (4, 45, 60, 1),
            (5, 70, 71, 1),
        ],
        SEGMENT,
    )
    log: Any = SimpleNamespace(operations=operations, segments=segments)
    assert handing_over_ns(log) == 1 + 5


@pytest.mark.parametrize("spec", POLICIES)
def test_a_simulated_machine_hands_over_in_no_time(
    make: Make, profile: HardwareProfile, spec: str
) -> None:
    assert observe(replay(make(spec, profile)(), record=True)).handing_over_ns == 0


def test_without_an_error_there_are_no_shares() -> None:
    row = compare([observed(MS)], observed(MS), {"all": MS})
    assert row["makespan_error"] == 0
    assert row["time_ns"]["head"] == {"measured": 0, "simulated": 0, "part": 0.0, "share": None}
    assert row["explains"] == "simulated and measured times are the same"


def test_what_differs_is_told_apart_from_what_comes_with_timing() -> None:
    def differences(*runs: Observed) -> dict[str, bool]:
        *mine, theirs = runs
        return {one["what"]: one["timing"] for one in compare(mine, theirs)["differences"]}

    same = observed(MS, copied={"demand": 3}, outcomes={"fetched": 1})
    assert differences(same, same, same) == {}
    more = observed(MS, copied={"demand": 6}, outcomes={"fetched": 2})
    assert differences(same, more, same) == {"demand bytes": False, "fetched": False}
    late = observed(MS, copied={"prefetch": 3, "swap": 1}, outcomes={"late": 1})
    early = observed(MS, copied={"prefetch": 3}, outcomes={"arrived": 1})
    assert differences(late, early) == {"swap bytes": False, "arrived": True, "late": True}
    taken_back = observed(MS, copied={"prefetch": 2, "demand": 1}, outcomes={"fetched": 1})
    found = differences(taken_back, early)
    assert found == {
        "prefetch bytes": True, "demand bytes": True, "arrived": True, "fetched": True
    }  # fmt: skip


def rows(*policies: tuple[str, list[float], float]) -> list[dict[str, Any]]:
    return [
        compare(
            [observed(MS, tpot_ms=one) for one in measured],
            observed(MS, tpot_ms=simulated, policy=name),
        )
        for name, measured, simulated in policies
    ]


def test_the_order_is_told_by_repeat_and_by_pair() -> None:
    """Of three pairs b and c are swapped, and in the second repeat they are not: tau 1/3 and 1."""
    found = ranking(
        rows(("a", [1.0, 1.0, 1.0], 1.0), ("b", [2.0, 5.0, 2.0], 4.0), ("c", [3.0, 3.0, 3.0], 3.0))
    )
    assert found["ranked_by"] == "tpot_ms"
    assert found["kendall_tau"] == pytest.approx(1 / 3)
    assert found["kendall_tau_by_repeat"] == pytest.approx([1 / 3, 1, 1 / 3])
    assert found["kendall_tau_spread"] == pytest.approx(2 / 3)
    assert found["swapped"] == [
        {
            "faster": "b", "slower": "c", "measured": [2.0, 3.0], "simulated": [4.0, 3.0],
            "within_spread": True,
        }
    ]  # fmt: skip


def test_one_policy_has_no_order() -> None:
    found = ranking(rows(("a", [1.0], 1.0)))
    assert found["kendall_tau"] is found["kendall_tau_spread"] is None
    assert found["swapped"] == []


@pytest.mark.parametrize("spec", POLICIES)
def test_an_unaltered_machine_is_the_simulator(
    make: Make, profile: HardwareProfile, spec: str
) -> None:
    plain = replay(make(spec, profile)()).heads[-1].now_ns
    assert makespan_ns(make(spec, profile)(), {}) == plain
    assert makespan_ns(make(spec, profile)(), dict.fromkeys(range(len(KINDS) - 2), 1.0)) == plain


def test_a_stretched_kind_takes_so_much_longer(make: Make, profile: HardwareProfile) -> None:
    costs = make("lru", profile)().setting.costs
    for kind, name in enumerate(KINDS):
        if name != "pause":
            double = stretched(costs, kind, 2.0)
            changed = [
                f
                for f in costs._fields
                if not np.array_equal(*(getattr(c, f) for c in (costs, double)))
            ]
            assert changed or name == "shared", name
    twice = stretched(costs, COPY_IN, 2.0).copies
    assert (twice[H2D, 0, 1] == 2 * costs.copies[H2D, 0, 1]).all()
    assert abs(twice[H2D, 0, 2] - costs.copies[H2D, 0, 2] / 2) <= 1
    others = [lane for lane in range(len(twice)) if lane != H2D]
    assert (twice[others] == costs.copies[others]).all()


Fake = Callable[[str], Replayed]


def fake(make: Make, profile: HardwareProfile, seen: list[str]) -> Fake:
    """Return an engine whose machine is a simulated one."""

    def run(spec: str) -> Replayed:
        seen.append(spec)
        return replay(make(spec, profile)(), record=True)

    return run


def test_with_the_right_profile_nothing_is_off(make: Make, profile: HardwareProfile) -> None:
    seen: list[str] = []
    makes = {spec: make(spec, profile) for spec in POLICIES}
    found = validate.validate(makes, fake(make, profile, seen), 2)

    assert seen == [*POLICIES, *POLICIES]
    assert [row["policy"] for row in found.rows] == list(POLICIES)
    for row in found.rows:
        assert row["tpot_error"] == row["ttft_error"] == row["makespan_error"] == 0
        assert row["tokens_per_s_error"] == 0
        assert row["tpot_ms"]["spread"] == 0
        assert row["differences"] == []
        assert all(kind["error"] == 0 for kind in row["kinds"].values())
    assert found.ranking["kendall_tau"] == pytest.approx(1)
    assert found.ranking["swapped"] == []


def test_with_a_link_of_half_the_rate_errors_grow_where_weights_are_copied(
    make: Make, profile: HardwareProfile
) -> None:
    """Policies that decide by no estimate: what the machine does stays the same."""
    channel = profile.link.h2d
    wrong = with_overrides(
        profile,
        {
            "link.h2d.bytes_per_s": str(channel.bytes_per_s / 2),
            "link.h2d.latency_ns": str(2 * channel.latency_ns),
        },
    )
    names = ("on-demand", "lru", "all-cpu")
    makes = {spec: make(spec, wrong) for spec in names}
    on_demand, lru, all_cpu = validate.validate(makes, fake(make, profile, []), 1).rows

    assert on_demand["tpot_error"] > lru["tpot_error"] > 0.05
    assert on_demand["tokens_per_s_error"] < -0.05
    for row in (on_demand, lru):
        assert row["differences"] == []
        assert row["kinds"]["copy_in"]["error"] == pytest.approx(1, rel=1e-3)
        # With copies as long as measured the simulator is right again.
        assert row["kinds"]["copy_in"]["share"] == pytest.approx(1, rel=1e-2)
        assert row["rest"]["part"] == pytest.approx(0, abs=1e-3)
        assert row["time_ns"]["wait_weights"]["share"] > 0.9
        assert "wait weights" in row["explains"]
        assert "length of copy in, simulated +100.0%" in row["explains"]
    assert all_cpu["kinds"]["return"]["error"] == pytest.approx(1, rel=1e-3)
    assert abs(all_cpu["tpot_error"]) < lru["tpot_error"]


def test_alternatives_name_each_kind_that_both_have(make: Make, profile: HardwareProfile) -> None:
    own = observe(replay(make("dali", profile)(), record=True))
    found = alternatives(make("dali", profile), own, own)
    assert set(found) == {*own.kinds, "all"}
    assert set(found.values()) == {own.result["makespan_ns"]}


def test_a_run_without_a_log_is_refused(make: Make, profile: HardwareProfile) -> None:
    with pytest.raises(ValueError, match="recorded"):
        observe(replay(make("lru", profile)()))


def test_observed_times_are_those_of_the_lanes(make: Make, profile: HardwareProfile) -> None:
    run = replay(make("dali", profile)(), record=True)
    own = observe(run)
    assert sum(spent.ns for spent in own.kinds.values()) == sum(run.drained.busy_ns)
    assert run.log is not None
    cancelled = int((run.log.operations["cancel_ns"] >= 0).sum())
    assert sum(s.operations for s in own.kinds.values()) == run.operations - cancelled


def test_the_timelines_of_both_are_two_processes(
    make: Make, profile: HardwareProfile, tmp_path: Path
) -> None:
    run = replay(make("dali", profile)(), record=True)
    path = tmp_path / "both.json"
    write_trace(timelines(run, run), path)
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]

    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == ["measured: dali on simpy", "simulated: dali on simpy"]
    first, second = (
        [{**event, "pid": 0} for event in events if event["pid"] == pid and event["ph"] == "X"]
        for pid in (0, 1)
    )
    assert first
    assert first == second
    threads = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} <= threads


def test_the_picture_appears_whole(make: Make, profile: HardwareProfile, tmp_path: Path) -> None:
    makes = {spec: make(spec, profile) for spec in POLICIES}
    found = validate.validate(makes, fake(make, profile, []), 2)
    result = {
        "policies": list(found.rows), **found.ranking, "device": "emulated", "model": "tiny",
        "repeats": 2,
    }  # fmt: skip
    for suffix in (".png", ".svg", ".pdf"):
        path = tmp_path / f"tpot{suffix}"
        check_picture(path)
        draw_validation(result, path)
        assert path.stat().st_size > 1000
    assert len(list(tmp_path.iterdir())) == 3
