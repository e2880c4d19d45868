"""What a placement may ask for where a group has several batches: full synchronisations, and the
CPU attending to the context. Every time is computed by hand from round numbers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest

import moesim.forecast
import moesim.host
import moesim.policies.testing as lab
from moesim.audit import audit
from moesim.costs import CONTEXT_UNIT, build_costs, duration_ns
from moesim.errors import AuditError, PolicyError
from moesim.model import layer_kv_bytes, load_model, pair_flops
from moesim.policies.api import (
    Placement,
    Plan,
    Prediction,
    Setting,
    View,
    fetch,
    gate_after,
    run_on_gpu,
)
from moesim.profile import HardwareProfile, load_profile, with_overrides
from moesim.sim.bound import bound
from moesim.sim.metrics import TIMES
from moesim.sim.replay import Replayed
from moesim.state import SETTLED
from moesim.types import (
    ATTENTION,
    ATTENTION_CPU,
    CPU,
    DATASHEET,
    DECODE,
    EXTRAPOLATED,
    GATE,
    GPU,
    NONE,
    RETURN,
    SEND,
    WHOLE,
    IntArray,
)

TWO_TOKENS_EACH = [[[0]]] * 4
"""Two sequences: a prompt of one token, then one more; one layer, expert 0."""


class OnCpu(NamedTuple):
    """Expert 0 is resident, the CPU attends, two sequences are two batches."""

    @classmethod
    def new(cls, setting: Setting) -> "OnCpu":
        return cls()

    def place(self, setting: Setting) -> Placement:
        resident = [(layer, 0) for layer in range(setting.layers)]
        return lab.placement(setting, resident, batches=2, kv_on_host=True, attention_on_cpu=True)

    def dispatch(self, view: View, plan: Plan) -> None:
        run_on_gpu(plan, 0)


def on_cpu(policy: type = OnCpu, choices: Any = TWO_TOKENS_EACH) -> Replayed:
    costs = {
        "attention": 50, "gate": 10, "gpu": 10, "copy_ns_per_kib": 100, "token_bytes": 512,
        "kv_bytes": 512, "cpu_context": 20,
    }  # fmt: skip
    # What the GPU would take for it does not matter.
    made = lab.make_costs(**costs)._replace(context_fp=lab.per_attended(0, 1000))
    return lab.run(policy, choices, made, prompts=(1, 1))


def test_the_cpu_attends_between_projections_and_gate() -> None:
    """In decode: queries, keys and values go out (100), the CPU reads two tokens (40), the result
    comes back (50), and then only the gate can run. The prompt is computed on the GPU.
    """
    done = on_cpu()
    start = 2 * 50 + 2 * 10 + 10
    assert lab.spans(done, "kv_out") == [
        ("d2h", "kv_out", 0, -1, 50, 100),
        ("d2h", "kv_out", 0, -1, 100, 150),
    ]
    sent = start + 50 + 100
    sent_2 = sent + 100
    assert lab.spans(done, "send", "attention_cpu", "return", "kv_in") == [
        ("d2h", "send", 0, -1, start + 50, sent),
        ("cpu", "attention_cpu", 0, -1, sent, sent + 40),
        ("d2h", "send", 0, -1, sent, sent_2),
        ("h2d", "return", 0, -1, sent + 40, sent + 90),
        ("cpu", "attention_cpu", 0, -1, sent_2, sent_2 + 40),
        ("h2d", "return", 0, -1, sent_2 + 40, sent_2 + 90),
    ]
    gates = [span.start_ns for span in lab.spans(done, "gate")[2:]]
    assert gates == [sent + 90, sent_2 + 90]
    assert lab.makespan_ns(done) == sent_2 + 90 + 10 + 10
    time_ns = dict(zip(TIMES, done.heads[-1].time_ns, strict=True))
    assert time_ns["wait_cpu"] == (sent + 90 - (start + 100)) + (sent_2 + 90 - (sent + 100))


def test_the_window_counts_attention_where_it_runs() -> None:
    """From dispatch to the next gates: an expert of 10, and the attention of two batches, 50 each.

    Of the prompts the GPU attends to 2 tokens, of 3 each; in the step after it the CPU to 4, of 20.
    """

    class Watching(NamedTuple):
        seen: IntArray

        @classmethod
        def new(cls, setting: Setting) -> "Watching":
            return cls(np.zeros(2, np.int64))

        def place(self, setting: Setting) -> Placement:
            return OnCpu().place(setting)

        def dispatch(self, view: View, plan: Plan) -> None:
            self.seen[view.step] = view.window_ns
            run_on_gpu(plan, 0)

    costs = lab.make_costs(attention=50, gate=10, gpu=10, cpu_context=20)
    costs = costs._replace(context_fp=lab.per_attended(3, 1000))
    done = lab.run(Watching, TWO_TOKENS_EACH, costs, prompts=(1, 1))
    policy: Any = done.prepared.policy
    assert policy.seen.tolist() == [10 + 2 * 50 + 2 * 3, 10 + 2 * 50 + 4 * 20]


def test_keys_and_values_come_back_only_when_they_have_left() -> None:
    """Eight tokens go out in 800 behind their attention, long after their step has ended."""

    class OnGpu(OnCpu):
        def place(self, setting: Setting) -> Placement:
            placement = super().place(setting)
            return msgspec.structs.replace(placement, batches=1, attention_on_cpu=False)

    costs = lab.make_costs(attention=50, gpu=10, copy_ns_per_kib=100, kv_bytes=1024)
    done = lab.run(OnGpu, [[[0]]] * 9, costs, prompts=(8,))
    assert lab.spans(done, "kv_out", "kv_in")[:2] == [
        ("d2h", "kv_out", 0, -1, 50, 850),
        ("h2d", "kv_in", 0, -1, 850, 1650),
    ]


def test_there_are_two_buffers_for_keys_and_values() -> None:
    """Those of the third batch are copied in when the first one has attended."""

    class OnGpu(OnCpu):
        def place(self, setting: Setting) -> Placement:
            placement = super().place(setting)
            return msgspec.structs.replace(placement, batches=3, attention_on_cpu=False)

    costs = lab.make_costs(attention=50, copy_ns_per_kib=10, kv_bytes=1024)
    done = lab.run(OnGpu, [[[0]]] * 6, costs, prompts=(1, 1, 1))
    start = 3 * 50
    copied = [span.start_ns for span in lab.spans(done, "kv_in")]
    assert copied == [start, start + 10, (start + 10) + 50]


def test_reading_keys_and_values_is_what_the_cpu_takes() -> None:
    """Mixtral-8x7B: 4096 bytes for a token and layer, 4 operations for 32 heads of 128."""
    model = load_model("mixtral-8x7b")
    machine = load_profile("klotski-env1")[0]
    for flops, expected in (
        ("2.5e12", layer_kv_bytes(model) / 134.0),
        ("2.5e9", pair_flops(model) / 2.5),
    ):
        profile = with_overrides(machine, {"cpu.flops_per_s": flops})
        costs = build_costs(model, profile, 8, 8)
        assert costs.cpu_context_fp == np.ceil(expected * CONTEXT_UNIT)
        ns = duration_ns(costs, DECODE, ATTENTION_CPU, 0, 4, 1000, WHOLE, 0)
        assert ns - 20_000 == pytest.approx(1000 * expected, abs=1)


def test_its_numbers_come_from_what_is_known_of_the_cpu() -> None:
    plain = msgspec.to_builtins(load_profile("klotski-env1")[0])
    plain["provenance"]["cpu"]["source"] = "measured"
    profile = msgspec.convert(plain, HardwareProfile)
    costs = build_costs(load_model("mixtral-8x7b"), profile, 8, 8)
    assert costs.kind_source[ATTENTION_CPU] == EXTRAPOLATED
    assert costs.kind_source[ATTENTION] == DATASHEET


def test_the_layers_without_experts_attend_too() -> None:
    costs = build_costs(load_model("deepseek-v3"), load_profile("h100-pcie5")[0], 8, 8)
    one, four = (duration_ns(costs, DECODE, ATTENTION_CPU, at, 4, 1000, WHOLE, 0) for at in (1, 0))
    assert four == 4 * one


def test_what_the_cpu_cannot_reach_it_cannot_attend_to() -> None:
    class Unreachable(OnCpu):
        def place(self, setting: Setting) -> Placement:
            return msgspec.structs.replace(super().place(setting), kv_on_host=False)

    with pytest.raises(PolicyError, match="attention_on_cpu=True must be false while the keys"):
        lab.run(Unreachable, TWO_TOKENS_EACH, lab.make_costs(), prompts=(1, 1))


@pytest.mark.parametrize("lane", [GPU, CPU])
def test_a_guess_needs_what_the_cpu_has_attended_to(lane: int) -> None:
    class Guessing(OnCpu):
        def place(self, setting: Setting) -> Placement:
            guess = Prediction("previous", after_gate=False, lane=lane)
            return msgspec.structs.replace(super().place(setting), predictions=(guess,))

    done = on_cpu(Guessing, TWO_TOKENS_EACH + TWO_TOKENS_EACH[:2])
    guesses = lab.spans(done, "predict")
    assert len(guesses) == 2  # about the second and third step
    assert guesses[1].start_ns >= lab.spans(done, "return")[1].end_ns


class Gated(NamedTuple):
    """The gates wait for three resident experts."""

    @classmethod
    def new(cls, setting: Setting) -> "Gated":
        return cls()

    def place(self, setting: Setting) -> Placement:
        resident = [(0, expert) for expert in range(3)]
        return lab.placement(setting, resident, kv_on_host=True, attention_on_cpu=True)

    def before_gate(self, view: View, plan: Plan) -> None:
        for expert in range(3):
            gate_after(plan, expert)

    def dispatch(self, view: View, plan: Plan) -> None:
        run_on_gpu(plan, 0)


def test_a_gate_that_waits_for_the_cpu_waits_for_two_experts_at_most() -> None:
    with pytest.raises(
        PolicyError, match=r"expert 2: gates wait for at most three experts \(two if"
    ):
        lab.run(Gated, [[[0]]] * 2, lab.make_costs())


def rewired(kind: int, change: Callable[[list[Any]], None]) -> Callable[..., int]:
    """Return a `launch` that changes the operations of a kind which are about a batch."""

    def launch(*operation: Any) -> int:
        changed = list(operation)
        if changed[3] == kind and changed[5] != NONE:
            change(changed)
        return original(*changed)

    original = moesim.forecast.launch
    return launch


def start_at_once(operation: list[Any]) -> None:
    operation[8:] = [0, 0, 0]


def attend_for_all(operation: list[Any]) -> None:
    operation[6] += 1


def forget_the_batch(operation: list[Any]) -> None:
    operation[5] = NONE


def attend_here(operation: list[Any]) -> None:
    operation[7] = 1


@pytest.mark.parametrize(
    ("kind", "change", "law"),
    [
        (ATTENTION_CPU, start_at_once, "attention_cpu starts after send"),
        (RETURN, start_at_once, "return starts after attention_cpu"),
        (SEND, start_at_once, "send starts after attention"),
        (GATE, start_at_once, "gate starts after return"),
        (ATTENTION_CPU, attend_for_all, "the CPU attends for 2 tokens"),
        (RETURN, forget_the_batch, "0 return of an ATTENTION whose rest the CPU does"),
        (ATTENTION, attend_here, "the GPU attends to a context that is the CPU's"),
    ],
)
def test_the_audit_catches_faults(
    monkeypatch: pytest.MonkeyPatch, kind: int, change: Callable[[list[Any]], None], law: str
) -> None:
    monkeypatch.setattr(moesim.host, "launch", rewired(kind, change))
    with pytest.raises(AuditError, match=law):
        on_cpu()


def test_attention_on_the_cpu_for_no_batch_breaks_a_law(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*operation: Any) -> int:
        if operation[3] == ATTENTION_CPU:
            stray = list(operation)
            forget_the_batch(stray)
            original(*stray)
        return original(*operation)

    original = moesim.forecast.launch
    monkeypatch.setattr(moesim.host, "launch", launch)
    with pytest.raises(AuditError, match="has 4 attention_cpu of batches"):
        on_cpu()


def test_what_is_sent_for_attention_on_the_gpu_breaks_a_law() -> None:
    done = on_cpu()
    assert done.log is not None

    with pytest.raises(AuditError, match="has 2 send of batches"):
        audit(done.log._replace(attention_on_cpu=False))


@pytest.mark.parametrize("cpu_context", [1, 30, 400])
def test_the_bound_allows_attention_on_either_device(cpu_context: int) -> None:
    """The decode step attends to 4 tokens: 800 on the GPU behind 100 of projections, or on the CPU
    beside them. The prompts attend to 2, on the GPU in any case.
    """
    costs = lab.make_costs(
        attention=50, gate=10, gpu=10, copy_ns_per_kib=1, cpu_context=cpu_context
    )
    costs = costs._replace(context_fp=lab.per_attended(300, 200))
    done = lab.run(OnCpu, TWO_TOKENS_EACH, costs, prompts=(1, 1))
    # One gate and one attention for two tokens would do, as far as the tables say.
    prefill, projected = 25 * 2 + 300 * 2 + 5 * 2, 25 * 2
    expected = prefill + 5 * 2 + min(projected + 800, max(projected, 4 * cpu_context))
    found = bound(done.prepared)
    assert found.fixed_ns == expected
    assert found.makespan_ns <= lab.makespan_ns(done)


@pytest.mark.parametrize("batches", [1, 2])
def test_the_bound_lets_gates_run_beside_attention_on_the_cpu(batches: int) -> None:
    """The CPU attends for 800. Of two batches, each with a gate of 300, the second one's follows;
    one batch has a gate of 600.
    """

    class Divided(OnCpu):
        def place(self, setting: Setting) -> Placement:
            return msgspec.structs.replace(super().place(setting), batches=batches)

    costs = lab.make_costs(copy_ns_per_kib=1, cpu_context=200)
    costs = costs._replace(
        context_fp=lab.per_attended(0, 1000),
        gate_ns=300 * np.arange(lab.TOKENS + 1),
    )
    done = lab.run(Divided, TWO_TOKENS_EACH, costs, prompts=(1, 1))
    prefill, decode = 600, 800 + 300
    assert bound(done.prepared).makespan_ns == prefill + decode
    assert lab.makespan_ns(done) == prefill + decode + (300 if batches == 1 else 0)


class Synchronised(NamedTuple):
    """The host waits after each batch; expert 1, which is not needed, is fetched for each layer."""

    @classmethod
    def new(cls, setting: Setting) -> "Synchronised":
        return cls()

    def place(self, setting: Setting) -> Placement:
        resident = [(layer, 0) for layer in range(setting.layers)]
        return lab.placement(
            setting, resident, batches=3, sync_batches=True, dense_on_host=True, kv_on_host=True
        )

    def before_attention(self, view: View, plan: Plan) -> None:
        fetch(plan, view.layer, 1)

    def dispatch(self, view: View, plan: Plan) -> None:
        run_on_gpu(plan, 0)


@pytest.mark.parametrize("copy", [10, 40, 200])
def test_each_batch_and_each_layer_ends_with_everything_done(copy: int) -> None:
    """A prompt of one token for each of three batches. The first attention runs beside the copy of
    expert 1, the others beside what the batch before stores.
    """
    costs = lab.make_costs(
        2, attention=50, gate=10, gpu=100, combine=5, copy_ns_per_kib=copy, kv_bytes=2048,
        dense_bytes=1024,
    )  # fmt: skip
    done = lab.run(Synchronised, [[[0], [0]]] * 3, costs, prompts=(1, 1, 1), slots=8)

    store = 2 * copy
    # The first weights outside the experts have nothing to hide behind.
    first = copy
    stored = first + 50 + store
    second = first + max(50, copy)
    third = max(second + 50, stored)
    stored = max(second + 50, stored) + store
    gates = max(third + 50, stored)
    stored = max(third + 50, stored) + store
    starts = [span.start_ns for span in lab.spans(done, "attention")]
    assert starts[:3] == [first, second, third]
    computed = gates + 3 * 10 + 100 + 5
    # Those of the next layer are copied beside the experts.
    next_layer = max(computed, stored, gates + 3 * 10 + copy)
    assert starts[3] == next_layer
    assert [span.start_ns for span in lab.spans(done, "copy_in")] == [first, next_layer]


@pytest.mark.parametrize("forgotten", range(1, 9))
def test_the_audit_notices_a_missing_synchronisation(
    monkeypatch: pytest.MonkeyPatch, forgotten: int
) -> None:
    """Each layer has one for the layer before, one after each of three batches."""
    asked: list[int] = []

    def settle(machine: Any, host: Any, ticket: int) -> None:
        if ticket <= host.state[SETTLED]:
            return
        asked.append(ticket)
        if len(asked) != forgotten:
            original(machine, host, ticket)

    original = moesim.host.settle
    monkeypatch.setattr(moesim.host, "settle", settle)
    costs = lab.make_costs(
        3, attention=50, gate=10, gpu=100, combine=5, copy_ns_per_kib=200, kv_bytes=2048
    )
    with pytest.raises(AuditError, match="synchronisation: ATTENTION and GATE are submitted when"):
        lab.run(Synchronised, [[[0], [0], [0]]] * 3, costs, prompts=(1, 1, 1), slots=8)


def test_without_synchronisations_batches_follow_one_another() -> None:
    class Free(Synchronised):
        def place(self, setting: Setting) -> Placement:
            return msgspec.structs.replace(super().place(setting), sync_batches=False)

    costs = lab.make_costs(attention=50, copy_ns_per_kib=200, dense_bytes=1024)
    done = lab.run(Free, [[[0]]] * 3, costs, prompts=(1, 1, 1))
    assert [span.start_ns for span in lab.spans(done, "attention")] == [200, 250, 300]


def test_one_synchronisation_is_charged_each_time() -> None:
    """Per layer: one after each of three batches, one after it; and as ever for gates and HEAD."""
    machine = lab.quiet_machine("host.per_sync_ns=7")
    costs = lab.make_costs(2, attention=50, gate=10, gpu=100, copy_ns_per_kib=16, kv_bytes=64)
    done = lab.run(
        Synchronised, [[[0], [0]]] * 6, costs, prompts=(1, 1, 1), slots=8, machine=machine
    )
    steps, layers = 2, 2
    # What ends a step is waited for by its HEAD alone, before the first layer of all and the last.
    syncs = steps * layers * (3 + 3) + steps + (steps * layers - 1)
    assert done.paused_ns == 7 * syncs
