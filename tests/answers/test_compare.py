"""Comparisons: the rule of ties by hand, and every number against single replays."""

import math
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import pytest

import moesim
from moesim.answers import ties, verdict
from moesim.answers.compare import Comparison, comparable, compare, names_in
from moesim.answers.inputs import Inputs
from moesim.answers.points import Named, Point, prepared_of
from moesim.answers.ties import Timed
from moesim.errors import InputError
from moesim.model import GroupedQuery, ModelSpec, spec_to_dict
from moesim.policies.registry import choose
from moesim.profile import HardwareProfile, load_profile
from moesim.sim.bound import bound
from moesim.sim.metrics import share_of_gain
from moesim.sim.replay import replay
from moesim.traces.format import Trace
from moesim.traces.synthetic import synthesize

HARDWARE = "rtx3090-pcie4-ddr4"
ONE = 6 * 512 * 256
"""Bytes of an expert."""


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Return a trace of 4 sequences of 6 + 4 rows, 3 layers of 16 experts, with its model."""
    spec = ModelSpec(
        name="small",
        model_type="mixtral",
        hidden_layers=3,
        layer_ids=(0, 1, 2),
        experts=16,
        top_k=2,
        hidden=512,
        expert_width=256,
        shared_width=0,
        dense_width=0,
        vocab=1000,
        attention=GroupedQuery(heads=4, kv_heads=4, head_dim=64),
    )
    made = synthesize(
        "qwen3-30b", layers=3, experts=16, top_k=2, sequences=4, prompt=6, generate=5, distances=1
    )
    meta = {**made.meta, "model": "small", "spec": spec_to_dict(spec)}
    return msgspec.structs.replace(made, meta=meta)


def side_by_side(trace: Trace, policies: Any = ("lru", "static"), **options: Any) -> Comparison:
    """Compare in this process, on SimPy, with a quarter of the experts cached unless said."""
    if not {"budget", "budgets", "cache_ratios"} & options.keys():
        options.setdefault("cache_ratio", 0.25)
    given = {"hardware": HARDWARE, "machine": "simpy", "jobs": 1, **options}
    return compare(trace, policies=policies, **given)


def by_policy(found: Comparison) -> dict[str, dict[str, Any]]:
    return {row["policy"]: row for row in found.rows}


# The rule of ties.


def timed(*ns: int, **shifts: float) -> Timed:
    return Timed(ns, tuple(100 for _ in ns), shifts)


def test_what_shifts_both_alike_leaves_no_doubt() -> None:
    a, b = timed(1000, 2000, gpu=0.1, link=0.02), timed(1010, 2020, gpu=0.1, link=0.02)

    assert ties.doubt(a, b) == pytest.approx(0, abs=1e-12)
    assert ties.faster(a, b)
    assert not ties.faster(b, a)


def test_sections_that_shift_policies_apart_add_up_in_squares() -> None:
    a, b = timed(1000, gpu=0.1), timed(1000, cpu=0.07, gpu=0.06)

    assert ties.doubt(a, b) == pytest.approx(math.hypot(0.04, 0.07))
    assert ties.own_doubt(b) == pytest.approx(math.hypot(0.06, 0.07))


def test_the_spread_over_windows_is_that_of_paired_differences() -> None:
    # Windows differ tenfold, policies by factors of e^.1, e^.2 and e^.3.
    ns = (10**9, 10**10, 10**8)
    slower = tuple(round(n * math.exp(f)) for n, f in zip(ns, (0.1, 0.2, 0.3), strict=True))

    assert ties.doubt(timed(*ns), timed(*slower)) == pytest.approx(0.1 / math.sqrt(3))


def test_one_window_tells_no_spread() -> None:
    assert ties.doubt(timed(1000), timed(1300)) == 0


@pytest.mark.parametrize(("ns", "certain"), [(1221, False), (1222, True)])
def test_a_difference_is_certain_beyond_two_standard_deviations(ns: int, certain: bool) -> None:
    # 2 x 0.1: e^0.2 is 1.2214.
    assert ties.faster(timed(1000, gpu=0.1), timed(ns, gpu=0.2)) is certain


def test_ranks_count_those_that_are_certainly_faster() -> None:
    places = ties.places({"slow": timed(1300), "fast": timed(1000), "even": timed(1000)})

    assert list(places) == ["even", "fast", "slow"]
    assert [place.rank for place in places.values()] == [1, 1, 3]
    assert [place.tied for place in places.values()] == [("fast",), ("even",), ()]


def test_ties_are_not_transitive() -> None:
    # In logarithms b is 0.14 behind a and 0.12 before c, with a doubt of 0.08.
    places = ties.places({"a": timed(1000), "b": timed(1150, gpu=0.08), "c": timed(1300)})

    assert [place.rank for place in places.values()] == [1, 1, 2]
    assert [place.tied for place in places.values()] == [("b",), ("a", "c"), ("b",)]


# Rows against single replays.


@pytest.mark.parametrize("policy", ["dali", "lru"])
def test_a_row_of_one_window_is_a_replay(policy: str, trace: Trace) -> None:
    row = by_policy(side_by_side(trace, [policy], windows=1, start=1, batch=2))[policy]
    alone = moesim.replay(
        trace, policy=policy, hardware=HARDWARE, cache_ratio=0.25, batch=2, start=1,
        machine="simpy",
    )  # fmt: skip

    keys = (
        "tokens_per_s", "ttft_ms", "tpot_ms", "makespan_ns", "time_ns", "hit_rate",
        "hit_rate_by_layer", "output_tokens",
    )  # fmt: skip
    assert {key: row[key] for key in keys} == {
        key: pytest.approx(alone.data[key]) for key in keys if key != "hit_rate_by_layer"
    } | {"hit_rate_by_layer": alone.data["hit_rate_by_layer"]}
    assert row["why"] == alone.why
    assert row["link_bytes"] == sum(alone.data["link_bytes"].values())
    assert row["budget_bytes"] == alone.data["run"]["budget_bytes"] == 12 * ONE
    assert row["batch"] == 2


def test_windows_follow_each_other_and_count_together(trace: Trace) -> None:
    found = side_by_side(trace, ["dali"], windows=3)
    row = by_policy(found)["dali"]
    alone = [
        moesim.replay(
            trace, policy="dali", hardware=HARDWARE, cache_ratio=0.25, start=start, machine="simpy"
        )
        for start in range(3)
    ]

    total_ns = sum(one.makespan_ns for one in alone)
    assert found.data["cells"][0]["windows"] == 3
    assert row["makespan_ns"] == total_ns == sum(row["time_ns"].values())
    assert row["tokens_per_s"] == pytest.approx(
        sum(one.data["output_tokens"] for one in alone) * 1e9 / total_ns
    )
    assert row["ttft_ms"] == pytest.approx(np.mean([one.ttft_ms for one in alone]))
    decode = [one.data["activations_by_phase"]["decode"] for one in alone]
    in_time = sum(one["resident"] + one["arrived"] for one in decode)
    assert row["hit_rate"] == pytest.approx(in_time / sum(sum(one.values()) for one in decode))
    waits = ("wait_weights", "wait_kv", "wait_dense", "wait_disk")
    assert row["exposed_ns"] == sum(one.data["time_ns"][w] for one in alone for w in waits)


def test_why_is_said_of_all_windows_together(trace: Trace) -> None:
    row = by_policy(side_by_side(trace, ["all-cpu"], budget=0, windows=4))["all-cpu"]
    alone = [
        moesim.replay(
            trace, policy="all-cpu", hardware=HARDWARE, budget=0, start=start, machine="simpy"
        )
        for start in range(4)
    ]

    busy_ns = sum(one.data["lanes"]["cpu"] * one.makespan_ns for one in alone)
    waited = row["time_ns"]["wait_cpu"] / row["makespan_ns"]
    assert row["why"] == (
        f"{waited:.0%} of the time the GPU waits for results of the CPU,"
        f" which is {busy_ns / row['makespan_ns']:.0%} busy"
    )


@pytest.mark.parametrize(("batch", "asked", "held"), [(1, 9, 4), (2, 9, 2), (3, 9, 1), (1, 2, 2)])
def test_there_are_as_many_windows_as_the_trace_holds(
    batch: int, asked: int, held: int, trace: Trace
) -> None:
    found = side_by_side(trace, ["static"], batch=batch, windows=asked)

    assert found.data["cells"][0]["windows"] == held


def test_shifts_are_those_of_replays_on_slower_machines(trace: Trace) -> None:
    found = side_by_side(trace, ["lru"], windows=1)
    row = by_policy(found)["lru"]
    given = Inputs.load(trace, hardware=HARDWARE, cache_ratio=0.25)
    named = Named(given.trace, given.model, given.profile)

    def ns(**stretch: float) -> int:
        point = Point(policy="lru", cache_ratio=0.25, stretch=stretch)
        return replay(prepared_of(point, named)).heads[-1].now_ns

    sections = found.data["uncertainty"]["sections"]
    assert set(row["shifts"]) == {"gpu", "cpu", "link", "host"}
    for name, shift in row["shifts"].items():
        assert sections[name] == {"share": 0.15, "source": "datasheet"}
        assert shift == pytest.approx(math.log(ns(**{name: 1.15}) / ns()))
    deviation = math.hypot(*row["shifts"].values())
    assert row["high"] == pytest.approx(row["tokens_per_s"] * math.exp(2 * deviation))
    assert row["low"] == pytest.approx(row["tokens_per_s"] * math.exp(-2 * deviation))


def test_gain_is_the_share_between_on_demand_and_oracle(trace: Trace) -> None:
    found = side_by_side(trace, ["lru", "on-demand", "oracle"], windows=2)
    ns = {name: row["makespan_ns"] for name, row in by_policy(found).items()}
    rows = by_policy(found)

    for name, row in rows.items():
        assert row["gain"] == share_of_gain(ns[name], ns["on-demand"], ns["oracle"])
    about = found.data["cells"][0]
    assert about["oracle_tokens_per_s"] == rows["oracle"]["tokens_per_s"]
    assert about["on_demand_tokens_per_s"] == rows["on-demand"]["tokens_per_s"]
    # They need not be among the rows.
    alone = by_policy(side_by_side(trace, ["lru"], windows=2))["lru"]
    assert alone == {**rows["lru"], "tied": alone["tied"], "rank": alone["rank"]}


def test_no_policy_that_keeps_results_exceeds_the_bound(trace: Trace) -> None:
    found = side_by_side(trace, "all", windows=1)
    given = Inputs.load(trace, hardware=HARDWARE, cache_ratio=0.25)
    limit = bound(given.prepare(choose("static"))).tokens_per_s

    assert {row["policy"] for row in found.rows + found.refused} == set(comparable())
    for row in found.rows:
        assert row["tokens_per_s"] <= row["bound_tokens_per_s"]
        if not row["changes"]:
            assert row["bound_tokens_per_s"] == pytest.approx(limit)
    assert found.data["cells"][0]["bound_tokens_per_s"] == pytest.approx(limit)


# What is compared with what.


def test_rows_are_sorted_and_the_baseline_is_added(trace: Trace) -> None:
    found = side_by_side(trace, ["lru", "dali", "lru"], baseline="static:by=expert", windows=1)
    rows = by_policy(found)
    speeds = [row["tokens_per_s"] for row in found.rows]

    assert set(rows) == {"lru", "dali", "static:by=expert"}
    assert speeds == sorted(speeds, reverse=True)
    base = rows["static:by=expert"]
    assert base["speedup"] == base["speedup_low"] == base["speedup_high"] == 1
    for row in found.rows:
        assert row["speedup"] == pytest.approx(row["tokens_per_s"] / base["tokens_per_s"])
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    assert found.data["baseline"] == "static:by=expert"


def test_ranks_and_ties_agree_with_each_other(trace: Trace) -> None:
    found = side_by_side(trace, ["lru", "dali", "fiddler", "all-cpu", "hybrimoe"], windows=2)
    rows = by_policy(found)

    assert found.rows[0]["rank"] == 1
    for row in found.rows:
        assert all(row["policy"] in rows[other]["tied"] for other in row["tied"])
        faster = sum(
            other["tokens_per_s"] > row["tokens_per_s"] and other["policy"] not in row["tied"]
            for other in found.rows
        )
        assert row["rank"] == 1 + faster


def test_what_cannot_run_does_not_stop_the_others(trace: Trace) -> None:
    found = side_by_side(trace, ["lru", "all-gpu"], windows=1)

    assert set(by_policy(found)) == {"lru", "static"}
    (refused,) = found.refused
    assert refused["policy"] == "all-gpu"
    assert refused["budget_bytes"] == 12 * ONE
    assert refused["error"].startswith("policy 'all-gpu': ")
    assert "\n" not in refused["error"]


def test_a_baseline_that_cannot_run_leaves_no_speedups(trace: Trace) -> None:
    found = side_by_side(trace, ["lru"], baseline="all-gpu", windows=1)

    assert [row["speedup"] for row in found.rows] == [None]
    assert "tokens/s" in repr(found)


def test_nothing_that_runs_is_an_error(trace: Trace) -> None:
    with pytest.raises(InputError, match="no policy can run: policy 'all-gpu'"):
        side_by_side(trace, ["all-gpu"], baseline="all-gpu")


def test_one_budget_may_be_too_small_for_all(trace: Trace) -> None:
    found = side_by_side(
        trace, ["all-gpu"], baseline="all-gpu", cache_ratios=(0.25, 1.0), windows=1
    )

    assert [row["budget_bytes"] for row in found.rows] == [48 * ONE]
    assert [one["budget_bytes"] for one in found.refused] == [12 * ONE]
    assert "no policy can run" in repr(found)


def test_policies_that_change_results_are_told(trace: Trace) -> None:
    late = "ktransformers:deferred=1"
    found = side_by_side(trace, ["fate", late, "lru"], windows=1)
    rows = by_policy(found)

    assert rows["lru"]["changes"] == rows["static"]["changes"] == []
    assert "bits" in rows["fate"]["changes"][0]
    assert rows[late]["changes"] == ["adds results of the CPU a layer later"]
    limit = found.data["cells"][0]["bound_tokens_per_s"]
    assert rows["lru"]["bound_tokens_per_s"] == limit
    assert rows[late]["bound_tokens_per_s"] >= limit
    assert rows["fate"]["bound_tokens_per_s"] > limit
    assert verdict.name_of(rows["fate"]) == "fate*"
    assert verdict.name_of(rows["lru"]) == "lru"


def test_a_table_for_each_budget_and_batch(trace: Trace) -> None:
    found = side_by_side(trace, budgets=["4MiB", 8 << 20, "4096KiB"], batches=(1, 2), windows=1)
    cells = [(one["budget_bytes"] >> 20, one["batch"]) for one in found.data["cells"]]

    assert cells == [(4, 1), (4, 2), (8, 1), (8, 2)]
    assert [(row["budget_bytes"] >> 20, row["batch"]) for row in found.rows] == [
        cell for cell in cells for _ in range(2)
    ]
    single = side_by_side(trace, budget="8MiB", batch=2, windows=1)
    assert found.rows[-2:] == single.rows


def test_notices_of_any_policy_are_those_of_the_comparison(trace: Trace) -> None:
    large = side_by_side(trace, budgets=["100GiB", "1GiB"], prompt=20).data
    assert [line for line in large["notices"] if "more than the 24.00 GiB" in line] == [
        "the budget of 100.00 GiB is more than the 24.00 GiB of NVIDIA GeForce RTX 3090"
    ]
    assert any("longer than any sequence" in line for line in large["notices"])
    assert not side_by_side(trace, budget="1GiB").data["notices"]


def test_loaded_objects_and_settings_do_as_names_do(trace: Trace) -> None:
    profile = load_profile(HARDWARE)[0]
    slow = msgspec.structs.replace(
        profile, link=msgspec.structs.replace(
            profile.link, h2d=msgspec.structs.replace(profile.link.h2d, bytes_per_s=2e9)
        )
    )  # fmt: skip
    one = side_by_side(trace, hardware=slow, windows=1)
    other = side_by_side(trace, settings={"link.h2d.bytes_per_s": 2e9}, windows=1)

    assert one.rows == other.rows
    assert one.rows != side_by_side(trace, windows=1).rows


def test_processes_change_nothing(trace: Trace) -> None:
    policies = ["lru", "dali", "fiddler", "all-gpu"]
    one, two = (side_by_side(trace, policies, windows=2, jobs=jobs) for jobs in (1, 2))

    assert one.data == two.data


@pytest.mark.parametrize(("layer_steps_per_s", "worth"), [(1e9, False), (1.0, True)])
def test_the_host_program_is_compiled_if_all_replays_repay_it(
    layer_steps_per_s: float, worth: bool, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def machine_for(prepared: Any, wanted: str, say: Any, runs: int = 1) -> str:
        asked.append(wanted)
        return "simpy"

    monkeypatch.setattr("moesim.answers.compare.machine_for", machine_for)
    monkeypatch.setattr("moesim.answers.compare.LAYER_STEPS_PER_S", layer_steps_per_s)
    monkeypatch.setattr("moesim.answers.compare.record_of", lambda stored: None)
    side_by_side(trace, machine="auto", windows=1)

    assert asked == ["compiled"] * worth + ["auto"] * 4


def test_progress_counts_policies(trace: Trace) -> None:
    seen: list[tuple[int, int]] = []
    side_by_side(trace, windows=1, progress=lambda done, total: seen.append((done, total)))

    assert seen == [(number, 4) for number in range(1, 5)]


def test_all_are_those_that_do_not_see_the_future() -> None:
    found = comparable()

    assert {"dali", "lru", "static", "on-demand"} <= set(found)
    assert not {"oracle", "belady"} & set(found)
    assert names_in("lru, dali") == ["lru", "dali"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policies": "lru:x=1,dali"}, "takes names alone"),
        ({"policies": ","}, "names no policy"),
        ({"policies": []}, "none are given"),
        ({"policies": ["nope"]}, "no policy named 'nope'"),
        ({"baseline": "nope"}, "no policy named 'nope'"),
        ({"windows": 0}, "windows is 0; it must be at least 1"),
        ({"jobs": 0}, "jobs is 0; it must be at least 1"),
        ({"jitter": 2.0}, "jitter 2.0 is not in 0..1"),
        ({"batches": []}, "batches: none are given"),
        ({"batches": [0]}, "batch is 0; it must be at least 1"),
        ({"batch": 5}, "more than the trace holds: 4 sequences"),
        ({"budgets": []}, "budgets: none are given"),
        ({"budgets": ["4XB"]}, "budget 4XB"),
        ({"budgets": [100]}, "holds no expert"),
        ({"cache_ratios": [1.5]}, "cache ratio 1.5 is not in 0..1"),
        ({"cache_ratios": [math.nan]}, "cache ratio nan is not in 0..1"),
        ({"cache_ratios": [0.5], "budget": 0}, "exclude each other"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    options: Mapping[str, Any], said: str, trace: Trace
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        side_by_side(trace, **{"policies": ["lru"], **options})

    assert "\n" not in str(caught.value)


# In words.


def row_like(policy: str, speed: float, **others: Any) -> dict[str, Any]:
    given = {
        "policy": policy, "tokens_per_s": speed, "speedup": speed / 10, "speedup_low": speed / 11,
        "speedup_high": speed / 9, "tied": [], "changes": [], "notices": [], "why": "because",
    }  # fmt: skip
    return given | others


def cell_like(*rows: dict[str, Any]) -> verdict.Cell:
    about = {
        "budget_bytes": 3 << 30, "cache_ratio": 0.25, "batch": 2, "bound_tokens_per_s": 40.0,
        "on_demand_tokens_per_s": None, "oracle_tokens_per_s": 30.0,
    }  # fmt: skip
    return verdict.Cell("static", about, rows, [])


def test_the_answer_names_the_fastest_by_how_much_and_the_second() -> None:
    cell = cell_like(row_like("lru", 20.0), row_like("dali", 15.0), row_like("static", 10.0))

    assert verdict.answer(cell) == (
        "lru is fastest: 20.0 tokens/s, 2.00 times static (1.82 to 2.22);"
        " dali is second, 25% slower"
    )
    assert list(verdict.reasons(cell)) == [
        "lru: because",
        "No policy that keeps results can exceed 40.0 tokens/s; lru reaches 50% of that",
    ]
    assert verdict.heading(cell) == "3.00 GiB for experts (25% of all), batch 2"


def test_a_difference_that_is_small_but_certain_is_not_called_none() -> None:
    cell = cell_like(row_like("lru", 20.0), row_like("dali", 19.99))
    assert verdict.answer(cell).endswith("dali is second, less than 1% slower")


def test_the_answer_tells_a_tie() -> None:
    tied = ["a", "b", "c", "d", "static"]
    others = [row_like(name, 11.0, changes=["4 bits"] * (name == "b")) for name in tied]
    cell = cell_like(row_like("lru", 12.0, tied=tied), *others)

    assert verdict.answer(cell) == (
        "lru is fastest: 12.0 tokens/s, 1.20 times static; a tie with static, a, b* and 2 more"
    )


def test_the_fastest_that_changes_results_is_marked() -> None:
    cell = cell_like(row_like("fate", 50.0, changes=["4 bits"]), row_like("lru", 20.0))

    assert verdict.answer(cell).startswith("fate* is fastest")
    assert list(verdict.reasons(cell))[1].endswith(
        "; lru reaches 50% of that, 20.0: the fastest without *"
    )
    assert list(verdict.below(cell)) == ["fate*: 4 bits"]


def test_the_baseline_alone_is_no_comparison() -> None:
    assert verdict.answer(cell_like(row_like("static", 10.0))) == (
        "static is fastest: 10.0 tokens/s"
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0.01234, "0.0123"), (9.999, "10.0"), (123.45, "123.5"), (12345.6, "12346")],
)
def test_numbers_of_the_table(value: float | None, shown: str) -> None:
    assert verdict.digits(value) == shown


def test_frames_and_notebooks_have_all_rows(trace: Trace) -> None:
    found = side_by_side(trace, ["lru", "fate", "all-gpu"], windows=1)
    frame, page = found.frame(), found._repr_html_()

    assert list(frame["policy"]) == [row["policy"] for row in found.rows]
    assert frame["time_ns.wait_cpu"].sum() == sum(row["time_ns"]["wait_cpu"] for row in found.rows)
    for word in ("lru", "fate*", "static", "cannot run", "standard deviations", "<table>"):
        assert word in page
    assert repr(found) in page.replace("&#x27;", "'")


def test_a_profile_that_is_measured_is_more_certain(trace: Trace) -> None:
    datasheet = load_profile(HARDWARE)[0]
    origins = datasheet.provenance
    measured = {
        name: msgspec.structs.replace(
            getattr(origins, name), source="measured", spread_pct=5.0
        )
        for name in ("gpu", "cpu", "link", "disk", "host")
    }  # fmt: skip
    profile: HardwareProfile = msgspec.structs.replace(
        datasheet, provenance=msgspec.structs.replace(origins, **measured)
    )
    rough, fine = (side_by_side(trace, hardware=one, windows=1) for one in (datasheet, profile))

    assert fine.data["uncertainty"]["sections"]["gpu"] == {"share": 0.05, "source": "measured"}
    for one, other in zip(rough.rows, fine.rows, strict=True):
        assert other["high"] / other["low"] < one["high"] / one["low"]
    assert "as measured" in fine._repr_html_()
    assert "assumed of datasheet numbers" in rough._repr_html_()
