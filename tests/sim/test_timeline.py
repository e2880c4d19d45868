"""The Chrome trace of a run: in the profiler's words, and the same times to the nanosecond."""

import gzip
import json
from collections import defaultdict
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import moesim.policies.testing as lab
from moesim.errors import InputError
from moesim.policies.api import Placement, Plan, Setting, View, run_on_cpu, run_on_gpu
from moesim.policies.registry import choose
from moesim.sim.metrics import link_bytes
from moesim.sim.replay import Replayed
from moesim.sim.timeline import microseconds, timeline, write_timeline
from moesim.types import LANES

LAYERS, EXPERTS, TOP_K, TOKENS, PROMPT = 4, 8, 2, 20, 6


class Offloaded(NamedTuple):
    """Keys, values and attention weights on the host, half of the experts on disk."""

    @classmethod
    def new(cls, setting: Setting) -> "Offloaded":
        return cls()

    def place(self, setting: Setting) -> Placement:
        on_disk = np.zeros((setting.layers, setting.experts), np.int64)
        on_disk[:, ::2] = 1
        return lab.placement(
            setting,
            [(layer, 1) for layer in range(setting.layers)],
            kv_on_host=True,
            dense_on_host=True,
            on_disk=on_disk,
        )

    def dispatch(self, view: View, plan: Plan) -> None:
        for i, expert in enumerate(view.active[: view.n_active]):
            if i % 2 and view.cached[view.layer, expert] == 0:
                run_on_cpu(plan, expert)
            else:
                run_on_gpu(plan, expert)


POLICIES = ["lru", "static:by=expert", "dali", "dali:link=priority", "offloaded"]


@pytest.fixture(scope="module", params=POLICIES)
def run(request: pytest.FixtureRequest) -> Replayed:
    """Replay a little of everything, with a host that takes its time."""
    rng = np.random.default_rng(7)
    ids = rng.permuted(np.tile(np.arange(EXPERTS), (TOKENS, LAYERS, 1)), axis=2)[:, :, :TOP_K]
    return lab.run(
        Offloaded if request.param == "offloaded" else choose(request.param),
        ids,
        lab.make_costs(
            LAYERS, attention=1001, gate=103, gpu=207, cpu=2009, combine=51, head=401,
            copy_ns_per_kib=3200, latency=17, token_bytes=96, kv_bytes=64, dense_bytes=512,
        ),
        experts=EXPERTS,
        slots=20,
        prompts=[PROMPT],
        machine=lab.quiet_machine(
            "host.per_layer_ns=90", "host.per_launch_ns=7", "host.per_sync_ns=31",
            "host.decision_ns=55",
            "interference=[{busy: [cpu, h2d], slow: {cpu: 0.7, h2d: 0.9}}]",
        ),
    )  # fmt: skip


@pytest.fixture
def trace(run: Replayed, tmp_path: Path) -> dict[str, Any]:
    """Write the timeline and read it as a tool does, times as decimals."""
    write_timeline(run, tmp_path / "run.pt.trace.json")
    text = (tmp_path / "run.pt.trace.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text, parse_float=Decimal)
    return found


def complete(trace: dict[str, Any], *categories: str) -> list[dict[str, Any]]:
    return [e for e in trace["traceEvents"] if e["ph"] == "X" and e["cat"] in categories]


def ns(time_us: Decimal) -> int:
    exact = time_us * 1000
    assert exact == int(exact)
    return int(exact)


def lane_of(event: dict[str, Any]) -> str:
    return {(0, 7): "gpu", (0, 20): "h2d", (0, 21): "d2h", (1, 2): "cpu", (1, 3): "disk"}.get(
        (event["pid"], event["tid"]), "host"
    )


def test_the_head_of_the_file(run: Replayed, trace: dict[str, Any]) -> None:
    gpu = run.prepared.profile.gpu

    assert list(trace) == [
        *("schemaVersion", "displayTimeUnit", "baseTimeNanoseconds", "deviceProperties"),
        "traceEvents",
    ]
    assert trace["schemaVersion"] == 1
    assert trace["displayTimeUnit"] == "ms"
    assert trace["baseTimeNanoseconds"] == 0
    assert trace["deviceProperties"] == [
        {"id": 0, "name": gpu.name, "totalGlobalMem": gpu.memory_bytes}
    ]


def test_every_event_is_complete(trace: dict[str, Any]) -> None:
    for event in trace["traceEvents"]:
        assert event["ph"] in "MX"
        if event["ph"] == "X":
            assert set(event) == {"ph", "cat", "name", "pid", "tid", "ts", "dur", "args"}
            assert ns(event["ts"]) >= 0
            assert ns(event["dur"]) >= 0
        else:
            assert event["name"] in ("process_name", "thread_name")
            assert event["args"]["name"]


def test_every_thread_has_a_name(trace: dict[str, Any]) -> None:
    events = trace["traceEvents"]
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}

    assert {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} <= named
    assert {e["pid"] for e in events if e["name"] == "process_name"} == {0, 1}


def test_names_are_those_of_the_profiler(trace: dict[str, Any]) -> None:
    kernels = {"attention", "gate", "predict", "shared", "expert_gpu", "combine", "head", "move"}
    names = {
        "gpu": ("kernel", {f"moesim::{kind}" for kind in kernels}),
        "h2d": ("gpu_memcpy", {"Memcpy HtoD (Pinned -> Device)"}),
        "d2h": ("gpu_memcpy", {"Memcpy DtoH (Device -> Pinned)"}),
        "cpu": ("cpu_op", {"moesim::expert_cpu"}),
        "disk": ("cpu_op", {"moesim::disk_read"}),
        "host": ("cpu_op", {"moesim::pause"}),
    }
    for event in complete(trace, "kernel", "gpu_memcpy", "cpu_op"):
        category, legal = names[lane_of(event)]
        assert event["cat"] == category
        assert event["name"] in legal


def test_arguments_say_what_an_event_is(run: Replayed, trace: dict[str, Any]) -> None:
    for event in complete(trace, "kernel", "gpu_memcpy"):
        args = event["args"]
        assert args["device"] == event["pid"] == 0
        assert args["stream"] == event["tid"]
        assert 1 <= args["correlation"] <= run.operations
    for event in complete(trace, "kernel"):
        assert event["args"]["tokens"] > 0
    for event in complete(trace, "gpu_memcpy"):
        assert event["args"]["bytes"] > 0
        assert event["args"]["cause"] in (
            *("demand", "prefetch", "swap", "return", "kv_in", "dense_in", "send", "kv_out"),
        )
    for event in complete(trace, "kernel", "cpu_op"):
        if "expert" in event["name"]:
            assert 0 <= event["args"]["layer"] < LAYERS
            assert 0 <= event["args"]["expert"] < EXPERTS
            assert event["args"]["tokens"] > 0


def test_busy_time_is_the_machines_to_the_nanosecond(run: Replayed, trace: dict[str, Any]) -> None:
    busy = dict.fromkeys((*LANES, "host"), 0)
    for event in complete(trace, "kernel", "gpu_memcpy", "cpu_op"):
        busy[lane_of(event)] += ns(event["dur"])

    assert busy.pop("host") == run.paused_ns > 0
    assert busy == dict(zip(LANES, run.drained.busy_ns, strict=True))


def test_bytes_by_cause_are_the_machines(run: Replayed, trace: dict[str, Any]) -> None:
    """A preempted copy is several events, which share its bytes."""
    causes = {"kv_in": "kv_in", "kv_out": "kv_out", "dense_in": "dense"}
    causes |= {"send": "activations_out", "return": "activations_in"}
    moved = dict.fromkeys(link_bytes(run.drained), 0)
    for event in complete(trace, "gpu_memcpy"):
        cause = event["args"]["cause"]
        moved[causes.get(cause, cause)] += event["args"]["bytes"]
    for event in complete(trace, "cpu_op"):
        if lane_of(event) == "disk":
            moved["disk"] += event["args"]["bytes"]

    assert moved == link_bytes(run.drained)


def test_no_two_operations_overlap_on_a_thread(trace: dict[str, Any]) -> None:
    threads = defaultdict(list)
    for event in complete(trace, "kernel", "gpu_memcpy", "cpu_op"):
        threads[event["pid"], event["tid"]].append(event)
    spans = {(e["pid"], e["tid"]) for e in complete(trace, "user_annotation")}

    assert spans.isdisjoint(threads)
    assert len(threads) >= 3
    for events in threads.values():
        ordered = sorted(events, key=lambda event: (event["ts"], event["dur"]))
        for one, next_one in pairwise(ordered):
            assert one["ts"] + one["dur"] <= next_one["ts"]


def test_steps_tile_the_run_and_layers_the_steps(run: Replayed, trace: dict[str, Any]) -> None:
    spans = complete(trace, "user_annotation")
    steps = [span for span in spans if "layer" not in span["args"]]

    assert [step["name"] for step in steps] == ["step 0 prefill"] + [
        f"step {number} decode" for number in range(1, TOKENS - PROMPT + 1)
    ]
    end = 0
    for number, step in enumerate(steps):
        assert step["args"] == {"step": number, "phase": "decode" if number else "prefill"}
        assert ns(step["ts"]) == end
        end += ns(step["dur"])
        assert end == run.heads[number].now_ns
        inside = [s for s in spans if "layer" in s["args"] and s["args"]["step"] == number]
        assert [layer["name"] for layer in inside] == [f"layer {n}" for n in range(LAYERS)]
        at = step["ts"]
        for layer in inside:
            assert layer["ts"] == at
            at += layer["dur"]
        assert at <= step["ts"] + step["dur"]
    assert end == lab.makespan_ns(run)


def test_what_ran_in_a_step_says_so(run: Replayed, trace: dict[str, Any]) -> None:
    """The GPU's work of a step lies in it, since the head is the step's end."""
    ends = [0, *(head.now_ns for head in run.heads)]
    for event in complete(trace, "kernel"):
        step = event["args"]["step"]
        assert ends[step] <= ns(event["ts"])
        assert ns(event["ts"] + event["dur"]) <= ends[step + 1]


def test_the_compressed_file_holds_the_same(run: Replayed, tmp_path: Path) -> None:
    write_timeline(run, tmp_path / "t.json")
    write_timeline(run, tmp_path / "t.json.gz")
    write_timeline(run, tmp_path / "again.json.gz")
    packed = (tmp_path / "t.json.gz").read_bytes()

    assert gzip.decompress(packed) == (tmp_path / "t.json").read_bytes()
    assert packed == (tmp_path / "again.json.gz").read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


def test_preempted_copies_were_among_them() -> None:
    """Else the tests above would not show that their bytes are split."""
    rng = np.random.default_rng(7)
    ids = rng.permuted(np.tile(np.arange(EXPERTS), (TOKENS, LAYERS, 1)), axis=2)[:, :, :TOP_K]
    done = lab.run(
        choose("dali:link=priority"),
        ids,
        lab.make_costs(LAYERS, gpu=207, cpu=20_009, copy_ns_per_kib=3200),
        experts=EXPERTS,
        slots=20,
        prompts=[PROMPT],
    )
    parts = defaultdict(list)
    for event in timeline(done)["traceEvents"]:
        if event.get("cat") == "gpu_memcpy":
            parts[event["args"]["correlation"]].append(event["args"]["bytes"])

    assert done.preemptions > 0
    split = [sizes for sizes in parts.values() if len(sizes) > 1]
    assert split
    assert all(sum(sizes) == lab.EXPERT_BYTES and min(sizes) > 0 for sizes in split)


def test_a_run_that_was_not_recorded_has_no_timeline(run: Replayed) -> None:
    with pytest.raises(InputError, match="recorded"):
        timeline(run._replace(log=None))


@pytest.mark.parametrize("time_ns", [0, 1, 999, 1001, 2**43 - 1, 10**14 + 1])
def test_microseconds_lose_no_nanosecond(time_ns: int) -> None:
    text = json.dumps(microseconds(time_ns))

    assert Decimal(text) * 1000 == time_ns
