"""Advice: its numbers are those of plain replays, and it says what does not fit."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from moesim.answers.advise import Advice, advise, upgrades_of
from moesim.answers.engines import layers_on_cpu
from moesim.answers.inputs import RESERVE_BYTES
from moesim.answers.memory import LEAST_CONTEXT, Question, ways_out
from moesim.answers.phases import DECODE, WARM, made_up
from moesim.answers.points import Point, inputs_of, run_point
from moesim.answers.uncertainty import LEAST, UNMEASURED, combined, uncertainty_of
from moesim.answers.verdict import FUTURE
from moesim.costs import build_costs, duration_ns
from moesim.errors import InputError, MoesimError
from moesim.model import (
    GroupedQuery,
    ModelSpec,
    expert_bytes,
    kv_bytes_per_token,
    load_model,
    spec_to_dict,
)
from moesim.profile import ExpertTable, load_profile
from moesim.traces.format import Trace, write_trace
from moesim.traces.synthetic import synthesize
from moesim.types import ATTENTION, NONE, WHOLE

SPEC = ModelSpec(
    name="small", model_type="mixtral", hidden_layers=4, layer_ids=(0, 1, 2, 3), experts=16,
    top_k=2, hidden=512, expert_width=256, shared_width=0, dense_width=0, vocab=1000,
    attention=GroupedQuery(heads=4, kv_heads=4, head_dim=64),
)  # fmt: skip
ONE = expert_bytes(SPEC)
CONTEXT = 200
HARDWARE = "rtx3090-pcie4-ddr4"
OTHER = 2 * (2 * 1000 * 512 + 4 * (2 * 512 * 64 * 8 + 2 * 512 + 512 * 16) + 512)
"""Bytes of embeddings, attention, norms and routers, by hand."""
KEPT = CONTEXT * sum(kv_bytes_per_token(SPEC))
POLICIES = ["lru", "hybrimoe", "ktransformers:deferred=1", "all-gpu"]


def memory(experts: float) -> dict[str, int]:
    """Return the setting of a GPU on which so many experts have room."""
    return {"gpu.memory_bytes": OTHER + KEPT + RESERVE_BYTES + int(experts * ONE)}


@pytest.fixture(scope="module")
def trace() -> Trace:
    found = synthesize(
        "qwen3-30b", layers=4, experts=16, top_k=2, sequences=3, prompt=40, generate=41,
        distances=1,
    )  # fmt: skip
    return msgspec.structs.replace(found, meta={**found.meta, "spec": spec_to_dict(SPEC)})


def ask(trace: Trace, experts: float, **options: Any) -> Advice:
    """Ask about a GPU on which so many experts have room."""
    usual = {"policies": POLICIES, "hardware": HARDWARE, "context": CONTEXT, "jobs": 1}
    options = {**usual, **options}
    return advise(SPEC, trace=trace, settings=memory(experts), machine="simpy", **options)


@pytest.fixture(scope="module")
def advice(trace: Trace) -> Advice:
    """Room for 40.5 of 64 experts: for two of four layers, and a bit."""
    return ask(trace, 40.5)


def plain(trace: Trace, tmp_path: Path, experts: float, policy: str, **changes: Any) -> Point:
    """Return the replay behind a decode speed, made by hand."""
    path = tmp_path / "trace.npz"
    write_trace(trace, path)
    return Point(
        policy=policy, trace=str(path), hardware=HARDWARE, machine="simpy",
        prompt=80 - DECODE, generate=DECODE + 1, context=CONTEXT - 80, budget=int(experts) * ONE,
        settings={key: str(value) for key, value in memory(experts).items()}
        | changes.pop("settings", {}),
        **changes,
    )  # fmt: skip


def decode_speed(point: Point) -> float:
    """Return tokens per second of the later half of the decode steps."""
    ends = [head.now_ns for head in run_point(point).heads]
    later = DECODE - DECODE // 2
    return point.batch * later * 1e9 / (ends[-1] - ends[-1 - later])


def test_memory_adds_up(advice: Advice) -> None:
    found = advice.data["memory"]
    gpu = found["gpu"]
    assert gpu["other_weights"] == OTHER
    assert gpu["kv_cache"] == KEPT
    assert gpu["reserve"] == RESERVE_BYTES
    assert gpu["experts"] == 40 * ONE == found["budget_bytes"]
    assert gpu["free"] == ONE // 2
    assert sum(gpu.values()) == found["gpu_bytes"] == memory(40.5)["gpu.memory_bytes"]
    assert (found["experts"], found["all_experts"]) == (40, 64)
    assert [one["share"] for one in found["by_bits"]] == [40 / 64, 1, 1]
    assert found["by_bits"][0]["share"] == found["share"]
    assert advice.fits == "partly"


def test_the_longest_context_leaves_nothing_for_experts(trace: Trace) -> None:
    most = ask(trace, 40.5).data["memory"]["most_context"]
    assert ask(trace, 40.5, policies=["all-cpu"], context=most).fits == "partly"
    assert ask(trace, 40.5, policies=["all-cpu"], context=most + 1).fits == "no"


def test_the_answer_is_the_fastest_exact_policy(advice: Advice) -> None:
    rows = advice.data["candidates"]
    speeds = [row["decode_tokens_per_s"] for row in rows]
    assert speeds == sorted(speeds, reverse=True)
    assert {row["policy"] for row in rows} == {*POLICIES, "static"} - {"all-gpu"}
    exact = [row for row in rows if not row["changes"]]
    assert [row["policy"] for row in rows if row["changes"]] == ["ktransformers:deferred=1"]
    assert advice.policy == exact[0]["policy"]
    assert advice.tokens_per_s == exact[0]["decode_tokens_per_s"]
    [refused] = advice.data["refused"]
    assert refused["policy"] == "all-gpu"
    assert "\n" not in refused["error"]
    assert len(advice.frame()) == len(rows)
    assert f" with {advice.policy}, " in repr(advice)
    assert str(advice.policy) in advice._repr_html_()


def test_speeds_are_those_of_plain_replays(trace: Trace, advice: Advice, tmp_path: Path) -> None:
    for row in advice.data["candidates"]:
        point = plain(trace, tmp_path, 40.5, row["policy"])
        assert row["decode_tokens_per_s"] == decode_speed(point)
        prompt = msgspec.structs.replace(point, prompt=80, generate=1, context=(CONTEXT - 80) // 2)
        ended_ns = run_point(prompt).heads[0].now_ns
        assert row["prefill_tokens_per_s"] == 80 * 1e9 / ended_ns


def test_upgrades_are_plain_replays_with_other_settings(
    trace: Trace, advice: Advice, tmp_path: Path
) -> None:
    rows = advice.data["upgrades"]
    sizes = [memory(40.5)["gpu.memory_bytes"] + (8 << 30), 2 * memory(40.5)["gpu.memory_bytes"]]
    settings = [
        {"link.h2d.bytes_per_s": "50e9", "link.d2h.bytes_per_s": "50e9"},
        {"cpu.memory_bytes_per_s": "80e9", "cpu.expert_bytes_per_s": "56e9"},
        *({"gpu.memory_bytes": str(size)} for size in sizes),
    ]
    room = [40, 40, 64, 64]
    for row, changed, experts in zip(rows, settings, room, strict=True):
        point = plain(trace, tmp_path, 40.5, row["policy"], settings=changed)
        point = msgspec.structs.replace(point, budget=experts * ONE)
        assert row["budget_bytes"] == experts * ONE
        assert row["decode_tokens_per_s"] == decode_speed(point)
        assert row["gain"] == pytest.approx(row["decode_tokens_per_s"] / advice.tokens_per_s - 1)
    assert [row["policy"] for row in rows[2:]] == ["all-gpu"] * 2


def test_what_was_measured_is_faster_as_a_whole() -> None:
    """Rates change nothing where the points of a table or of copies are what counts."""
    profile, _ = load_profile(HARDWARE)
    asked = Question(SPEC, profile, CONTEXT, 16, 1)
    table = ExpertTable(
        hidden=512, width=256, bits=16, points=((1, 1e5),), provenance=profile.provenance.cpu
    )
    h2d = msgspec.structs.replace(profile.link.h2d, points=((1000, 2e4),), interpolated=True)
    measured = msgspec.structs.replace(
        profile,
        link=msgspec.structs.replace(profile.link, h2d=h2d),
        tables=msgspec.structs.replace(profile.tables, expert_cpu=(table,)),
    )

    def changes(asked: Question) -> list[tuple[bool, dict[str, float]]]:
        found = upgrades_of(asked, whole=False)[:2]
        return [(bool(one.settings), dict(one.stretch)) for one in found]

    assert changes(asked) == [(True, {}), (True, {})]
    by_section = [(False, {"link": 0.5}), (False, {"cpu": 0.5})]
    assert changes(asked._replace(profile=measured)) == by_section


def test_a_range_is_what_slower_sections_make(trace: Trace, advice: Advice, tmp_path: Path) -> None:
    """Two standard deviations of four independent sections, each 15 % slower."""
    found = advice.data["recommended"]
    point = plain(trace, tmp_path, 40.5, found["policy"])
    speed = decode_speed(point)
    shifts = {
        name: np.log(speed / decode_speed(msgspec.structs.replace(point, stretch={name: 1.15})))
        for name in ("gpu", "cpu", "link", "host")
    }
    factor = np.exp(2 * np.sqrt(sum(shift**2 for shift in shifts.values())))
    assert found["decode_low"] == pytest.approx(speed / factor)
    assert found["decode_high"] == pytest.approx(speed * factor)
    assert advice.data["uncertainty"] == dict.fromkeys(shifts, 0.15)
    costs = advice.data["limits"]["slower_by_10_percent"]
    assert advice.data["limits"]["section"] == max(costs, key=lambda name: shifts[name])
    for name, shift in shifts.items():
        assert costs[name] == pytest.approx(1.1 ** (shift / np.log(1.15)) - 1)


def test_time_and_memory_of_the_baseline_are_the_layers_that_fit(advice: Advice) -> None:
    [llama] = [row for row in advice.data["engines"] if row["engine"] == "llama.cpp"]
    assert layers_on_cpu(SPEC, 16, 40 * ONE) == 2
    assert "--n-cpu-moe 2" in llama["flags"]
    assert llama["decode_tokens_per_s"] == advice.data["baseline"]["decode_tokens_per_s"]
    best = advice.data["recommended"]
    assert best["speedup"] == pytest.approx(
        best["decode_tokens_per_s"] / llama["decode_tokens_per_s"]
    )
    assert best["speedup_low"] < best["speedup"] < best["speedup_high"]


def test_engines_are_simulated_with_the_budget_their_flags_give(
    trace: Trace, advice: Advice, tmp_path: Path
) -> None:
    rows = [row for row in advice.data["engines"] if row["engine"] == "ktransformers"]
    assert rows
    for row in rows:
        assert "--kt-num-gpu-experts 10" in row["flags"]
        assert row["budget_bytes"] == 40 * ONE
        point = plain(trace, tmp_path, 40.5, row["policy"])
        assert row["decode_tokens_per_s"] == decode_speed(point)
        assert row["loss"] == pytest.approx(1 - row["decode_tokens_per_s"] / advice.tokens_per_s)


def test_policies_that_change_results_must_be_allowed(trace: Trace) -> None:
    late = "ktransformers:mask=frequency,deferred=1"
    assert ask(trace, 40.5, policies=[late]).policy == "static"
    allowed = ask(trace, 40.5, policies=[late], allow_changes=True)
    assert allowed.policy == allowed.data["candidates"][0]["policy"]


def test_what_sees_the_future_is_never_recommended(trace: Trace) -> None:
    guesses = "dali:predictor=oracle"
    found = ask(trace, 40.5, policies=["oracle", guesses], allow_changes=True)
    changes = {row["policy"]: row["changes"] for row in found.data["candidates"]}
    assert changes == {"oracle": FUTURE, guesses: FUTURE, "static": ""}
    assert found.policy == "static"


@pytest.mark.parametrize(
    ("policy", "bits", "said"),
    [
        ("fate", 16, "fewer bits"),
        ("fate:int2_rate=0.0", 4, ""),
        ("ktransformers:deferred=1", 16, "experts late"),
        ("pregated", 16, "retrained gates"),
    ],
)
def test_changes_are_those_that_a_run_shows(
    policy: str, bits: int, said: str, trace: Trace
) -> None:
    found = ask(trace, 40.5 * bits / 16, policies=[policy], bits=bits)
    [row] = [row for row in found.data["candidates"] if row["policy"] == policy]
    assert row["changes"] == said


def test_an_engine_that_is_faster_says_so(trace: Trace) -> None:
    found = ask(trace, 40.5, policies=["on-demand"]).data
    best = found["recommended"]["decode_tokens_per_s"]
    faster = [
        row
        for row in found["engines"]
        if row["decode_tokens_per_s"] > 1.01 * best and not row["changes"]
    ]
    assert faster
    for row in found["engines"]:
        told = any(note.startswith("faster than") for note in row["notes"])
        assert told == (row in faster)


def test_what_fits_wholly_needs_no_offloading(trace: Trace) -> None:
    found = ask(trace, 64)
    assert found.fits == "wholly"
    assert found.policy == "all-gpu"
    assert "the whole model fits" in repr(found)
    assert found.data["memory"]["gpu"]["free"] == 0
    assert found.data["memory"]["most_context_wholly"] == CONTEXT
    assert [row["engine"] for row in found.data["engines"]] == ["llama.cpp"]
    assert found.data["engines"][0]["flags"] == f"-ngl 99 -c {CONTEXT}"
    assert any("all-gpu stands for them all" in line for line in found.data["notices"])
    assert not any("stands for" in n for n in ask(trace, 64, policies=None).data["notices"])
    assert ask(trace, 63.9).fits == "partly"


def test_without_room_for_an_expert_the_cpu_computes_them_all(trace: Trace) -> None:
    found = ask(trace, 0.5, policies=["lru", "all-cpu"])
    assert found.fits == "partly"
    assert found.data["memory"]["experts"] == 0
    assert found.policy in ("static", "all-cpu")
    assert "--n-cpu-moe 4" in found.data["engines"][0]["flags"]


def test_what_does_not_fit_is_an_answer(trace: Trace) -> None:
    found = ask(trace, -0.25)
    assert (found.fits, found.policy, found.tokens_per_s) == ("no", None, None)
    assert found.data["memory"]["missing"] == ONE // 4
    assert sum(found.data["memory"]["gpu"].values()) == found.data["memory"]["gpu_bytes"]
    [line] = ways_out(found.data)
    assert f"at most {found.data['memory']['most_context']} tokens" in line
    assert found.data["memory"]["most_context"] == CONTEXT - ONE // 4 // (KEPT // CONTEXT)
    [line] = ways_out(ask(trace, -1).data)
    assert f"{LEAST_CONTEXT} tokens" in line


def test_what_the_host_cannot_hold_does_not_fit() -> None:
    found = advise("deepseek-v3", hardware="h100-pcie5", jobs=1)
    assert found.fits == "no"
    assert "the host lacks" in repr(found)
    assert any("4 bit" in line for line in ways_out(found.data))


def test_a_batch_has_a_context_for_each_sequence(trace: Trace) -> None:
    found = ask(trace, 40.5, batch=2, policies=["lru"])
    assert found.data["memory"]["gpu"]["kv_cache"] == 2 * KEPT
    assert "tokens/s in all (" in repr(found)
    with pytest.raises(InputError, match="a batch of 4"):
        ask(trace, 60, batch=4)


def test_naive_speed_is_bandwidth_over_active_bytes() -> None:
    profile, _ = load_profile(HARDWARE)
    model = load_model("deepseek-v3")
    found = advise(model, hardware=profile).data["naive"]
    active = model.layers * model.top_k * expert_bytes(model)
    assert found["active_bytes"] == active
    assert found["dram_tokens_per_s"] == pytest.approx(40e9 / active)
    assert found["link_tokens_per_s"] == pytest.approx(25e9 / active)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context": LEAST_CONTEXT - 1}, "context"),
        ({"context": 1 << 30}, "context"),
        ({"bits": 3}, "bits"),
        ({"batch": 0}, "batch"),
        ({"batch": 513}, "batch 513 is not in 1..512"),
        ({"jobs": 0}, "jobs is 0"),
        ({"policies": ["lruu"]}, "lruu"),
        ({"policies": "lru,lruu"}, "'lruu'"),
        ({"hardware": "abacus"}, "abacus"),
    ],
)
def test_bad_questions_end_in_one_line(trace: Trace, options: dict[str, Any], said: str) -> None:
    with pytest.raises(MoesimError, match=said) as caught:
        ask(trace, 40.5, **options)
    assert "\n" not in str(caught.value)


def test_a_trace_of_another_model_is_refused(trace: Trace) -> None:
    with pytest.raises(InputError, match="4 MoE layers of 16 experts"):
        advise("mixtral-8x7b", trace=trace, hardware=HARDWARE, jobs=1, policies=["lru"])


def test_routing_is_made_up_after_the_nearest_model() -> None:
    own, said = made_up(SPEC, 128, 2)
    assert (own.layers, own.top_k, len(set(own.sequence))) == (4, 2, 4)
    assert "phi-3.5-moe, the nearest to small" in said
    assert own.tokens >= 4 * LEAST_CONTEXT == 4 * (WARM + DECODE)


def test_a_context_of_nothing_is_no_context() -> None:
    point = Point(policy="all-cpu", cache_ratio=0.0, prompt=4, generate=4, machine="simpy")
    found = msgspec.structs.replace(point, context=0)
    assert inputs_of(point).workload.kv_tokens == 7
    assert inputs_of(msgspec.structs.replace(point, context=100)).workload.kv_tokens == 107
    assert [h.now_ns for h in run_point(point).heads] == [h.now_ns for h in run_point(found).heads]
    with pytest.raises(InputError, match="context -1"):
        inputs_of(msgspec.structs.replace(point, context=-1))


def test_attention_takes_as_long_as_its_context_says() -> None:
    """Nothing else of a run changes where the CPU computes all experts."""

    def attention_ns(context: int) -> list[int]:
        point = Point(
            policy="all-cpu", budget=0, prompt=4, generate=4, batch=2, machine="simpy",
            hardware=HARDWARE, context=context,
        )  # fmt: skip
        ends = [head.time_ns[ATTENTION] for head in run_point(point).heads]
        return [end - begin for begin, end in pairwise([0, *ends])]

    given = inputs_of(Point(prompt=4, generate=4, batch=2, hardware=HARDWARE, budget=0))
    costs = build_costs(given.model, given.profile, 8, 2)
    for context in (0, 1000, 100_000):
        # Two sequences: 4 prompt tokens attend to 1 + 2 + 3 + 4 and the context each; then one.
        amounts = [(0, 8, 2 * (10 + 4 * context))]
        amounts += [(1, 2, 2 * (4 + step + context)) for step in (1, 2, 3)]
        expected = [
            sum(
                duration_ns(costs, phase, ATTENTION, layer, tokens, attended, WHOLE, NONE)
                for layer in range(given.model.layers)
            )
            for phase, tokens, attended in amounts
        ]
        assert attention_ns(context) == expected


def test_numbers_that_were_measured_are_less_uncertain() -> None:
    profile, _ = load_profile(HARDWARE)
    assert set(uncertainty_of(profile).values()) == {UNMEASURED}
    origin = profile.provenance
    measured = msgspec.structs.replace(
        origin,
        gpu=msgspec.structs.replace(origin.gpu, source="measured", spread_pct=0.5),
        cpu=msgspec.structs.replace(origin.cpu, source="measured", spread_pct=8.0),
        link=msgspec.structs.replace(origin.link, source="measured", spread_pct=60.0),
    )
    found = uncertainty_of(msgspec.structs.replace(profile, provenance=measured))
    assert found == {
        "gpu": LEAST, "cpu": 0.08, "link": UNMEASURED, "disk": UNMEASURED, "host": UNMEASURED,
    }  # fmt: skip
    assert combined([3.0, -4.0]) == 5.0
