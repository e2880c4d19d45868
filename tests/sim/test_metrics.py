"""What is reported, against numbers computed by hand."""

from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest

import moesim.policies.testing as lab
from moesim.policies.api import Placement, Plan, Setting, View, run_on_cpu, run_on_gpu
from moesim.policies.registry import choose
from moesim.run import prepare
from moesim.sim.metrics import TIMES, by_step, explain, hit_rate, recall, shares, summarize
from moesim.sim.replay import Replayed, replay
from moesim.traces.synthetic import FIRST_GUESS, synthesize
from moesim.traces.workload import Workload, cut
from moesim.types import OUTCOMES


class Split(NamedTuple):
    """Expert 0 is resident, expert 1 runs on the CPU, the others are copied on demand."""

    @classmethod
    def new(cls, setting: Setting) -> "Split":
        return cls()

    def place(self, setting: Setting) -> Placement:
        return lab.placement(setting, [(layer, 0) for layer in range(setting.layers)])

    def dispatch(self, view: View, plan: Plan) -> None:
        for expert in view.active[: view.n_active]:
            if expert == 1:
                run_on_cpu(plan, expert)
            else:
                run_on_gpu(plan, expert)


COSTS = lab.make_costs(
    attention=100, gate=10, gpu=50, cpu=2000, combine=5, head=1, copy_ns_per_kib=1000
)
RESIDENT_NS = 100 + 10 + 50 + 5 + 1
"""A step whose one expert is resident."""


def ended_at(run: Replayed, *ends_ns: int) -> Replayed:
    """Return the run with other ends of its steps."""
    heads = zip(run.heads, ends_ns, strict=True)
    return run._replace(heads=tuple(head._replace(now_ns=end) for head, end in heads))


# Latencies.


def test_a_token_is_finished_when_its_step_is() -> None:
    run = lab.run(Split, [[[0]]] * 5, COSTS, prompts=[2])
    found = summarize(run)

    assert found["makespan_ns"] == 4 * RESIDENT_NS
    assert found["ttft_ms"] == RESIDENT_NS / 1e6
    assert found["tpot_ms"] == RESIDENT_NS / 1e6
    assert found["itl_ms"] == dict.fromkeys(("p50", "p90", "p99"), RESIDENT_NS / 1e6)
    assert found["tokens_per_s"] == pytest.approx(1e9 / RESIDENT_NS)
    assert (found["prompt_tokens"], found["output_tokens"]) == (2, 4)


def test_latencies_of_uneven_steps() -> None:
    """Ends at 100, 150, 250 and 450 ns: gaps of 50, 100 and 200."""
    run = ended_at(lab.run(Split, [[[0]]] * 4, COSTS), 100, 150, 250, 450)
    found = summarize(run)

    assert found["ttft_ms"] == pytest.approx(100e-6)
    assert found["tpot_ms"] == pytest.approx(350e-6 / 3)
    assert found["itl_ms"]["p50"] == pytest.approx(100e-6)
    assert found["itl_ms"]["p90"] == pytest.approx(180e-6)
    assert found["itl_ms"]["p99"] == pytest.approx(198e-6)
    assert found["tokens_per_s"] == pytest.approx(4 / 450e-9)


def test_tpot_is_the_mean_over_sequences_of_their_own() -> None:
    """One sequence of 4 tokens, one of 2 and one of 1, which has no gap to count."""
    run = ended_at(lab.run(Split, [[[0]]] * 4, COSTS), 100, 150, 250, 450)
    workload = Workload(
        rows=np.arange(7), starts=np.array([0, 4, 6, 7]), prompts=np.array([1, 1, 1])
    )
    found = summarize(run._replace(prepared=run.prepared._replace(workload=workload)))

    assert found["sequences"] == 3
    assert found["output_tokens"] == 4 + 2 + 1
    assert found["tpot_ms"] == pytest.approx((350 / 3 + 50) / 2 * 1e-6)
    assert found["itl_ms"]["p50"] == pytest.approx(np.median([50, 100, 200, 50]) * 1e-6)
    assert found["tokens_per_s"] == pytest.approx(7 / 450e-9)


def test_a_prefill_alone_has_a_first_token_only() -> None:
    found = summarize(lab.run(Split, [[[0]]] * 2, COSTS, prompts=[2]))

    assert found["ttft_ms"] == RESIDENT_NS / 1e6
    assert found["tpot_ms"] is None
    assert found["itl_ms"] == dict.fromkeys(("p50", "p90", "p99"))
    assert found["hit_rate"] is None
    assert found["hit_rate_prefill"] == 1.0


# Activations.


@pytest.mark.parametrize(
    ("counts", "rate"),
    [
        ([3, 1, 0, 0, 0], 1.0),
        ([3, 1, 2, 1, 1], 0.5),
        ([0, 0, 5, 0, 0], 0.0),
        ([0, 0, 0, 0, 7], 0.0),
        ([0, 0, 0, 0, 0], None),
    ],
)
def test_hit_rate_is_resident_and_arrived_over_all(counts: list[int], rate: float | None) -> None:
    assert OUTCOMES == ("resident", "arrived", "late", "fetched", "cpu")
    assert hit_rate(np.array(counts)) == rate


def test_activations_by_phase_and_by_token() -> None:
    """Two sequences with a prompt of 2: in the prefill 3 tokens choose expert 0 and one expert 1,
    then one token each experts 0 and 2, then both expert 1.
    """
    first, second = [[[0]], [[0]], [[0]], [[1]]], [[[0]], [[1]], [[2]], [[1]]]
    found = summarize(lab.run(Split, first + second, COSTS, prompts=[2, 2]))

    none = dict.fromkeys(OUTCOMES, 0)
    assert found["activations"] == none | {"resident": 2, "cpu": 2, "fetched": 1, "total": 5}
    assert found["activations_by_phase"] == {
        "prefill": none | {"resident": 1, "cpu": 1},
        "decode": none | {"resident": 1, "cpu": 1, "fetched": 1},
    }
    assert found["activations_by_token"] == none | {"resident": 4, "cpu": 3, "fetched": 1}
    assert found["hit_rate"] == pytest.approx(1 / 3)
    assert found["hit_rate_by_token"] == pytest.approx(1 / 4)
    assert found["hit_rate_prefill"] == pytest.approx(1 / 2)


def test_a_demand_copy_is_waited_for_and_counted() -> None:
    """Expert 2 takes 1,000 ns to arrive, all of it after the gate."""
    found = summarize(lab.run(Split, [[[2]], [[0]]], COSTS))

    assert found["time_ns"] == dict.fromkeys(TIMES, 0) | {
        "attention": 200, "gate": 20, "expert_gpu": 100, "combine": 10, "head": 2,
        "wait_weights": 1000,
    }  # fmt: skip
    assert found["link_bytes"]["demand"] == lab.EXPERT_BYTES
    assert sum(found["link_bytes"].values()) == lab.EXPERT_BYTES
    assert found["lanes"]["h2d"] == pytest.approx(1000 / (2 * RESIDENT_NS + 1000))
    assert found["provenance"]["datasheet"] == 1.0


def test_steps_split_what_the_run_adds_up() -> None:
    rows = by_step(lab.run(Split, [[[2]], [[0]], [[1]]], COSTS))

    assert [row["duration_ns"] for row in rows] == [
        RESIDENT_NS + 1000,
        RESIDENT_NS,
        rows[2]["end_ns"] - rows[1]["end_ns"],
    ]
    assert [row["wait_weights_ns"] for row in rows] == [1000, 0, 0]
    assert [row["demand_bytes"] for row in rows] == [lab.EXPERT_BYTES, 0, 0]
    assert [row["expert_gpu_ns"] for row in rows] == [50, 50, 0]
    assert rows[2]["wait_cpu_ns"] >= 2000
    assert [row["phase"] for row in rows] == ["prefill", "decode", "decode"]


def test_shares_of_nothing_are_none() -> None:
    assert shares({"a": 1, "b": 3}) == {"a": 0.25, "b": 0.75}
    assert shares({"a": 0, "b": 0}) == {"a": 0.0, "b": 0.0}


# Predictors.


def guessed(policy: str) -> Replayed:
    """Replay a trace of 4 layers of 32 experts, top-4, through a policy that predicts."""
    trace = synthesize(
        "qwen3-30b", layers=4, experts=32, top_k=4, sequences=2, prompt=60, generate=200, recall=0.8
    )
    prepared = prepare(
        trace,
        cut(trace, batch=2),
        lab.make_model(4, 32, 4),
        lab.quiet_machine(),
        choose(policy),
        budget_bytes=64 * 6 * 8 * 8,
        seed=3,
    )
    return replay(prepared)


def test_the_oracle_is_never_wrong() -> None:
    found = summarize(guessed("dali:predictor=oracle"))

    assert found["prefetch"]["predictors"] == ["oracle"]
    assert found["prefetch"]["recall"] == [1.0]
    assert "predictor oracle sees the future" in found["notices"]


@pytest.mark.parametrize("asked", [0.5, 0.7, 0.9])
def test_a_noisy_oracle_is_as_wrong_as_it_was_asked_to_be(asked: float) -> None:
    run = guessed(f"dali:predictor=noisy-oracle,recall={asked}")

    assert recall(run, 0) == pytest.approx(asked, abs=0.04)


def test_recall_counts_where_there_is_a_guess() -> None:
    """Two tokens, top-2; the second has no guess, and the first one's third id does not count."""
    run = guessed("dali:predictor=oracle")
    missing = -1
    feed = run.prepared.feed._replace(
        chosen=np.array([[[1, 2]], [[3, 4]], [[5, missing]]], np.int16),
        guesses=((np.array([[[2, 7, 1]], [[missing] * 3], [[6, 5, 0]]], np.int16), None),),
    )
    setting = run.prepared.setting._replace(top_k=2)
    altered = run._replace(prepared=run.prepared._replace(feed=feed, setting=setting))

    assert recall(altered, 0) == pytest.approx((1 + 1) / (2 + 1))


def test_prefetches_used_are_some_of_those_made() -> None:
    """Recorded guesses exist for layers 1 to 3, and those for layer 1 are worse."""
    found = summarize(guessed("dali"))["prefetch"]

    assert found["predictors"] == ["gate1"]
    assert found["recall"] == [pytest.approx(0.8 * (FIRST_GUESS + 2) / 3, abs=0.03)]
    assert 0 < found["used"] < found["fetched"]
    assert found["precision"] == found["used"] / found["fetched"]


# The line that explains.


def result(**times: int) -> dict[str, Any]:
    """Return as much of a result as `explain` reads: 100 ns, most of it spent as given."""
    time_ns = dict.fromkeys(TIMES, 0) | times
    rest = 100 - sum(times.values())
    time_ns["combine"] += rest
    return {
        "makespan_ns": 100,
        "time_ns": time_ns,
        "lanes": {"gpu": 0.3, "cpu": 0.4, "h2d": 0.2, "d2h": 0.0, "disk": 0.0},
        "link_bytes": {"demand": 30, "prefetch": 10, "swap": 0, "kv_in": 500},
        "prefetch": {"wasted_bytes": 0},
    }


def test_weights_are_named_with_their_causes() -> None:
    assert explain(result(wait_weights=70)) == (
        "70% of the time the GPU waits for weights on the link, which is 20% busy "
        "(75% demand, 25% prefetch)"
    )
    wasteful = result(wait_weights=70) | {"prefetch": {"wasted_bytes": 8}}
    assert explain(wasteful).endswith("; 20% of what is copied is never used")


def test_the_cpu_is_named_with_how_busy_it_is() -> None:
    assert explain(result(wait_cpu=60)) == (
        "60% of the time the GPU waits for results of the CPU, which is 40% busy"
    )


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("wait_host", "the GPU waits for the host program"),
        ("wait_kv", "the GPU waits for keys and values on the link"),
        ("wait_dense", "the GPU waits for weights outside the experts on the link"),
        ("wait_disk", "the GPU waits for the disk"),
    ],
)
def test_every_other_cause_is_named(what: str, words: str) -> None:
    assert explain(result(**{what: 55})).startswith(f"55% of the time {words}")


def test_work_counts_as_one_thing_against_each_wait() -> None:
    """45 of attention and 15 of combining against 30 and 10 of waiting; then less than a tenth."""
    assert explain(result(attention=45, wait_host=30, wait_cpu=10)) == (
        "60% of the time the GPU computes, most of it attention; it waits most for the host program"
    )
    assert explain(result(expert_gpu=60, wait_cpu=9)) == (
        "91% of the time the GPU computes, most of it expert_gpu; "
        "little is left for a policy to gain"
    )


def test_every_cause_has_words() -> None:
    for what in TIMES:
        assert f"most of it {what};" in explain(result(**{what: 90})) or what.startswith("wait_")
        assert "wait_" not in explain(result(**{what: 90}))


def test_explain_reads_a_real_result() -> None:
    weights = summarize(lab.run(Split, [[[2]], [[0]], [[2]]], COSTS))
    cpu = summarize(lab.run(Split, [[[1]], [[1]]], COSTS))
    compute = summarize(lab.run(Split, [[[0]], [[0]]], COSTS))

    assert "waits for weights on the link" in explain(weights)
    assert "(100% demand)" in explain(weights)
    assert "waits for results of the CPU" in explain(cpu)
    assert "computes, most of it attention" in explain(compute)


# The identity.


def test_the_identity_changes_with_every_input() -> None:
    def identity(**changes: Any) -> dict[str, Any]:
        trace = synthesize("qwen3-30b", layers=2, experts=8, top_k=2, sequences=1, prompt=4)
        if "trace" in changes:
            experts = trace.experts.copy()
            experts[0, 0] = experts[0, 0, ::-1]
            trace = msgspec.structs.replace(trace, experts=experts)
        model = lab.make_model(2, 8, 2)
        if "model" in changes:
            model = msgspec.structs.replace(model, vocab=9)
        machine = lab.quiet_machine(*changes.get("machine", ()))
        workload = cut(trace)
        if "workload" in changes:
            workload = msgspec.structs.replace(workload, earlier=1)
        prepared = prepare(
            trace, workload, model, machine, choose("lru"), budget_bytes=8 * 6 * 8 * 8
        )
        found: dict[str, Any] = summarize(replay(prepared))["run"]
        return found

    plain = identity()
    cases: dict[str, dict[str, Any]] = {
        "trace": {"trace": True},
        "model_digest": {"model": True},
        "hardware_digest": {"machine": ("disk.latency_ns=1",)},
        "workload": {"workload": True},
    }
    for key, changes in cases.items():
        changed = identity(**changes)
        digests = ("trace", "model_digest", "hardware_digest", "workload")
        assert [name for name in digests if changed[name] != plain[name]] == [key]
    assert plain["layer_steps"] == plain["steps"] * 2
    assert plain["parameters"] == {"staging": 2, "rule": "lru"}
