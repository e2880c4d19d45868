"""Cases that a reviewer can check with a pencil: every time is computed in the test, from round
numbers, and compared with ==.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest

import moesim.policies.testing as lab
from moesim.policies.api import (
    CACHE,
    FIRST,
    REST,
    Placement,
    Plan,
    Setting,
    View,
    evict,
    fetch,
    resize,
    run_on_cpu,
    run_on_gpu,
)
from moesim.sim.metrics import TIMES
from moesim.sim.rules import WAIT_WEIGHTS
from moesim.traces.format import MISSING
from moesim.types import WHOLE


class Plain(NamedTuple):
    """Expert 0 is resident, everything runs on the GPU in the order of the router."""

    @classmethod
    def new(cls, setting: Setting) -> "Plain":
        return cls()

    def place(self, setting: Setting) -> Placement:
        return lab.placement(setting, [(layer, 0) for layer in range(setting.layers)])

    def dispatch(self, view: View, plan: Plan) -> None:
        for expert in view.active[: view.n_active]:
            run_on_gpu(plan, expert)


def test_one_layer_two_experts_one_miss() -> None:
    """attention 100, gate 10, then expert 0 (resident) runs 40 while expert 1 is copied for 200."""
    costs = lab.make_costs(attention=100, gate=10, gpu=40, combine=5, head=7, copy_ns_per_kib=200)
    done = lab.run(Plain, [[[0, 1]]], costs)

    known = 100 + 10
    arrived = known + 200
    end = arrived + 40 + 5 + 7
    assert lab.spans(done) == [
        ("gpu", "attention", 0, -1, 0, 100),
        ("gpu", "gate", 0, -1, 100, known),
        ("gpu", "expert_gpu", 0, 0, known, known + 40),
        ("h2d", "copy_in", 0, 1, known, arrived),
        ("gpu", "expert_gpu", 0, 1, arrived, arrived + 40),
        ("gpu", "combine", 0, -1, arrived + 40, arrived + 45),
        ("gpu", "head", -1, -1, arrived + 45, end),
    ]
    assert lab.makespan_ns(done) == end
    time_ns = done.heads[-1].time_ns
    waited = arrived - (known + 40)
    assert time_ns[WAIT_WEIGHTS] == waited == 160  # for weights
    assert sum(time_ns) == end


def test_the_host_s_own_costs_are_charged_where_they_arise() -> None:
    """3 per layer, 2 per launch, 5 per wait; the GPU idles until its first launch."""
    costs = lab.make_costs(attention=100, gate=10, gpu=40, combine=5, head=7)
    machine = lab.quiet_machine(
        "host.per_layer_ns=3", "host.per_launch_ns=2", "host.per_sync_ns=5", "host.decision_ns=11"
    )
    done = lab.run(Plain, [[[0, 1]]], costs, machine=machine)

    attention = 3 + 2
    gate_done = attention + 100 + 10
    dispatched = gate_done + 5 + 11
    first = dispatched + 2
    # Launches go on while expert 0 runs: the copy (0 ns), expert 1, COMBINE.
    combine = first + 40 + 40
    assert lab.spans(done, "attention")[0].start_ns == attention
    assert [span.start_ns for span in lab.spans(done, "expert_gpu")] == [first, first + 40]
    assert lab.spans(done, "combine")[0].start_ns == combine
    assert lab.makespan_ns(done) == combine + 5 + 7


class Ahead(NamedTuple):
    """In layer 0 expert 1 of layer 1 is fetched, which nobody needs before its gate."""

    @classmethod
    def new(cls, setting: Setting) -> "Ahead":
        return cls()

    def place(self, setting: Setting) -> Placement:
        return lab.placement(setting, [(0, 0), (1, 0)])

    def dispatch(self, view: View, plan: Plan) -> None:
        for expert in view.active[: view.n_active]:
            run_on_gpu(plan, expert)
        if view.layer == 0:
            fetch(plan, 1, 1)


def test_a_prefetch_is_fully_hidden() -> None:
    """It takes 125, of which expert 0 of layer 0 (40) and the next attention (100) hide all."""
    costs = lab.make_costs(
        2, attention=100, gate=10, gpu=40, combine=5, head=7, copy_ns_per_kib=125
    )
    done = lab.run(Ahead, [[[0], [1]]], costs)

    no_copy = 2 * (100 + 10 + 40 + 5) + 7
    assert lab.makespan_ns(done) == no_copy
    assert done.heads[-1].time_ns[WAIT_WEIGHTS] == 0
    assert lab.spans(done, "copy_in") == [("h2d", "copy_in", 1, 1, 110, 235)]
    counts = done.prepared.host.counts.sum(axis=0)
    assert counts[0, :, 0].tolist() == [1, 1, 0, 0, 0]  # resident, arrived


def test_a_prefetch_that_is_late_costs_its_remaining_time() -> None:
    """It takes 320 from 110 on, and the gate of layer 1 is done at 265."""
    costs = lab.make_costs(
        2, attention=100, gate=10, gpu=40, combine=5, head=7, copy_ns_per_kib=320
    )
    done = lab.run(Ahead, [[[0], [1]]], costs)

    gate_done = 110 + 45 + 110
    arrived = 110 + 320
    assert lab.makespan_ns(done) == arrived + 40 + 5 + 7
    assert done.heads[-1].time_ns[WAIT_WEIGHTS] == arrived - gate_done
    counts = done.prepared.host.counts.sum(axis=0)
    assert counts[0, :, 0].tolist() == [1, 0, 1, 0, 0]  # resident, late


class Both(NamedTuple):
    """A background fetch is under way when a demand copy becomes ready."""

    @classmethod
    def new(cls, setting: Setting) -> "Both":
        return cls()

    def place(self, setting: Setting) -> Placement:
        return lab.placement(setting, staging=3)

    def before_attention(self, view: View, plan: Plan) -> None:
        if view.layer == 0:
            fetch(plan, 1, 2)

    def dispatch(self, view: View, plan: Plan) -> None:
        for expert in view.active[: view.n_active]:
            run_on_gpu(plan, expert)


def test_a_demand_copy_overtakes_a_chunked_prefetch() -> None:
    """The prefetch (400, four chunks of 100) starts at 0; the demand is ready at 150."""
    costs = lab.make_costs(2, attention=140, gate=10, gpu=40, combine=5, copy_ns_per_kib=400)
    done = lab.run(Both, [[[0], [0]]], costs)

    border = 200
    demand_done = border + 400
    copies = lab.spans(done, "copy_in")
    assert copies[:3] == [
        ("h2d", "copy_in", 1, 2, 0, border),
        ("h2d", "copy_in", 0, 0, border, demand_done),
        ("h2d", "copy_in", 1, 2, demand_done, demand_done + 200),
    ]
    assert done.preemptions == 1


def test_on_a_fifo_link_nothing_overtakes() -> None:
    """The same copies, one after the other."""
    costs = lab.make_costs(2, attention=140, gate=10, gpu=40, combine=5, copy_ns_per_kib=400)

    class Fifo(Both):
        def place(self, setting: Setting) -> Placement:
            return lab.placement(setting, staging=3, link="fifo")

    done = lab.run(Fifo, [[[0], [0]]], costs)

    assert lab.spans(done, "copy_in")[:2] == [
        ("h2d", "copy_in", 1, 2, 0, 400),
        ("h2d", "copy_in", 0, 0, 400, 800),
    ]


class Split(NamedTuple):
    """The CPU computes expert 1 while expert 0, which is absent, is copied."""

    @classmethod
    def new(cls, setting: Setting) -> "Split":
        return cls()

    def place(self, setting: Setting) -> Placement:
        return lab.placement(setting)

    def dispatch(self, view: View, plan: Plan) -> None:
        run_on_cpu(plan, 1)
        run_on_gpu(plan, 0)


def test_two_lanes_slow_each_other_down() -> None:
    """Alone: CPU 100, copy 320. Together the CPU does 1/2 and the copy 3/4 of its speed."""
    costs = lab.make_costs(gpu=40, cpu=100, copy_ns_per_kib=320)
    machine = lab.quiet_machine("interference=[{busy: [cpu, h2d], slow: {cpu: 0.5, h2d: 0.75}}]")
    done = lab.run(Split, [[[0, 1]]], costs, machine=machine)

    cpu_done = 2 * 100
    copied_by_then = cpu_done * 3 // 4
    copy_done = cpu_done + (320 - copied_by_then)
    assert lab.spans(done, "expert_cpu", "copy_in") == [
        ("cpu", "expert_cpu", 0, 1, 0, cpu_done),
        ("h2d", "copy_in", 0, 0, 0, copy_done),
    ]
    assert copy_done == 370


def test_time_is_rounded_up_at_the_end_only() -> None:
    """At a third of its speed (341/1024) the CPU needs 100 x 1024 / 341 = 300.29: 301."""
    costs = lab.make_costs(gpu=40, cpu=100, copy_ns_per_kib=3200)
    machine = lab.quiet_machine("interference=[{busy: [cpu, h2d], slow: {cpu: 0.333}}]")
    done = lab.run(Split, [[[0, 1]]], costs, machine=machine)

    assert lab.spans(done, "expert_cpu")[0].end_ns == -(-100 * 1024 // 341) == 301


class Partial(NamedTuple):
    """The first 256/1024 of expert 0 are cached."""

    @classmethod
    def new(cls, setting: Setting) -> "Partial":
        return cls()

    def place(self, setting: Setting) -> Placement:
        cached = np.zeros((setting.layers, setting.experts), np.int64)
        cached[0, 0] = 256
        return lab.placement(
            setting, parts=cached, cache_slots=np.array([1]), cache_slot_bytes=np.array([256])
        )

    def dispatch(self, view: View, plan: Plan) -> None:
        run_on_gpu(plan, 0)


def test_a_partial_expert_runs_in_two_pieces() -> None:
    """A quarter (25 of 101) runs while three quarters are copied (300), then the rest (76)."""
    costs = lab.make_costs(gate=10, gpu=101, copy_ns_per_kib=400)
    done = lab.run(Partial, [[[0]]], costs)

    first, rest = 101 * 256 // 1024, 101 - 101 * 256 // 1024
    assert (first, rest) == (25, 76)
    assert lab.spans(done, "expert_gpu", "copy_in") == [
        ("gpu", "expert_gpu", 0, 0, 10, 10 + first),
        ("h2d", "copy_in", 0, 0, 10, 10 + 300),
        ("gpu", "expert_gpu", 0, 0, 310, 310 + rest),
    ]


class Tops(NamedTuple):
    """Half of experts 0 and 1 is cached; both tops run before the first rest."""

    @classmethod
    def new(cls, setting: Setting) -> "Tops":
        return cls()

    def place(self, setting: Setting) -> Placement:
        cached = np.zeros((setting.layers, setting.experts), np.int64)
        cached[0, :2] = 512
        return lab.placement(
            setting, parts=cached, cache_slots=np.array([2]), cache_slot_bytes=np.array([512])
        )

    def dispatch(self, view: View, plan: Plan) -> None:
        for piece in (FIRST, REST):
            for expert in (0, 1):
                run_on_gpu(plan, expert, piece)


def test_a_policy_orders_the_pieces() -> None:
    costs = lab.make_costs(gpu=100, copy_ns_per_kib=400)
    done = lab.run(Tops, [[[0, 1]]], costs)

    assert lab.spans(done, "expert_gpu") == [
        ("gpu", "expert_gpu", 0, 0, 0, 50),
        ("gpu", "expert_gpu", 0, 1, 50, 100),
        ("gpu", "expert_gpu", 0, 0, 200, 250),
        ("gpu", "expert_gpu", 0, 1, 400, 450),
    ]


class Replace(NamedTuple):
    """One cache slot: expert 0 runs from it and makes room for expert 1 at once."""

    @classmethod
    def new(cls, setting: Setting) -> "Replace":
        return cls()

    def place(self, setting: Setting) -> Placement:
        return lab.placement(setting, [(0, 0)])

    def dispatch(self, view: View, plan: Plan) -> None:
        run_on_gpu(plan, 0)
        evict(plan, 0, 0)
        fetch(plan, 0, 1, into=CACHE, urgent=1)
        run_on_gpu(plan, 1)


def test_a_slot_is_overwritten_only_after_its_last_use() -> None:
    costs = lab.make_costs(gpu=100, copy_ns_per_kib=32)
    done = lab.run(Replace, [[[0, 1]]], costs)

    assert lab.spans(done, "expert_gpu", "copy_in") == [
        ("gpu", "expert_gpu", 0, 0, 0, 100),
        ("h2d", "copy_in", 0, 1, 100, 132),
        ("gpu", "expert_gpu", 0, 1, 132, 232),
    ]


class Offloaded(NamedTuple):
    """Keys, values and attention weights are on the host, two sequences are two batches."""

    @classmethod
    def new(cls, setting: Setting) -> "Offloaded":
        return cls()

    def place(self, setting: Setting) -> Placement:
        return lab.placement(setting, [(0, 0)], batches=2, kv_on_host=True, dense_on_host=True)

    def dispatch(self, view: View, plan: Plan) -> None:
        run_on_gpu(plan, 0)


def test_keys_values_and_dense_weights_come_and_go() -> None:
    """One prompt token each, then one decode token each; KV 1024 bytes a token, 100 per KiB."""
    costs = lab.make_costs(
        attention=50, gpu=10, copy_ns_per_kib=100, kv_bytes=1024, dense_bytes=2048
    )
    done = lab.run(Offloaded, [[[0]]] * 4, costs, prompts=(1, 1))

    prefill = [
        ("h2d", "dense_in", 0, -1, 0, 200),
        ("gpu", "attention", 0, -1, 200, 250),
        ("gpu", "attention", 0, -1, 250, 300),
        ("d2h", "kv_out", 0, -1, 250, 350),
        ("d2h", "kv_out", 0, -1, 350, 450),
    ]
    head = 300 + 10
    # The decode step starts at 310; the weights' other buffer is free, keys wait for their KV_OUT.
    decode = [
        ("h2d", "dense_in", 0, -1, head, head + 200),
        ("h2d", "kv_in", 0, -1, 510, 610),
        ("h2d", "kv_in", 0, -1, 610, 710),
        ("gpu", "attention", 0, -1, 610, 660),
        ("gpu", "attention", 0, -1, 710, 760),
        ("d2h", "kv_out", 0, -1, 660, 760),
        ("d2h", "kv_out", 0, -1, 760, 860),
    ]
    found = lab.spans(done, "dense_in", "kv_in", "kv_out", "attention")
    assert sorted(found) == sorted(prefill + decode)
    assert lab.makespan_ns(done) == 760 + 10
    assert done.drained.now_ns == 860


class FromDisk(NamedTuple):
    """Both experts live on disk; one is copied to the GPU, the other runs on the CPU."""

    @classmethod
    def new(cls, setting: Setting) -> "FromDisk":
        return cls()

    def place(self, setting: Setting) -> Placement:
        on_disk = np.ones((setting.layers, setting.experts), np.int64)
        return lab.placement(setting, on_disk=on_disk)

    def dispatch(self, view: View, plan: Plan) -> None:
        run_on_gpu(plan, 0)
        run_on_cpu(plan, 1)


def test_what_lives_on_disk_is_read_first() -> None:
    costs = lab.make_costs(gpu=10, cpu=30, copy_ns_per_kib=100, latency=1, token_bytes=1024)
    done = lab.run(FromDisk, [[[0, 1]]], costs)

    assert lab.spans(done, "disk_read", "copy_in", "expert_gpu", "send", "expert_cpu") == [
        ("d2h", "send", 0, -1, 0, 101),
        ("disk", "disk_read", 0, 0, 0, 101),
        ("disk", "disk_read", 0, 1, 101, 202),
        ("h2d", "copy_in", 0, 0, 101, 202),
        ("gpu", "expert_gpu", 0, 0, 202, 212),
        ("cpu", "expert_cpu", 0, 1, 202, 232),
    ]
    assert lab.spans(done, "return")[0] == ("h2d", "return", 0, -1, 232, 333)


class Crowded(NamedTuple):
    """The CPU computes expert 1 while the link is busy with a fetch for layer 1."""

    @classmethod
    def new(cls, setting: Setting) -> "Crowded":
        return cls()

    def place(self, setting: Setting) -> Placement:
        return lab.placement(setting, [(0, 0), (1, 0)])

    def dispatch(self, view: View, plan: Plan) -> None:
        run_on_gpu(plan, 0)
        if view.layer == 0:
            fetch(plan, 1, 2, urgent=1)
            run_on_cpu(plan, 1)


def test_results_that_queue_behind_weights_wait_for_weights() -> None:
    """Expert 0 ends at 5, the CPU at 50, the fetch at 200: 45 for the CPU, 150 for the link."""
    costs = lab.make_costs(2, gpu=5, cpu=50, copy_ns_per_kib=200)
    done = lab.run(Crowded, [[[0, 1], [0, MISSING]]], costs)

    assert lab.spans(done, "return") == [("h2d", "return", 0, -1, 200, 200)]
    time_ns = dict(zip(TIMES, done.heads[-1].time_ns, strict=True))
    assert (time_ns["wait_cpu"], time_ns["wait_weights"]) == (45, 150)


class Deferring(NamedTuple):
    """In layer 0 expert 1 runs on the CPU and its result may come one layer late."""

    @classmethod
    def new(cls, setting: Setting) -> "Deferring":
        return cls()

    def place(self, setting: Setting) -> Placement:
        return lab.placement(setting, [(0, 0), (1, 0)])

    def dispatch(self, view: View, plan: Plan) -> None:
        run_on_gpu(plan, 0)
        if view.layer == 0:
            run_on_cpu(plan, 1, defer=1)


def test_a_deferred_expert_overlaps_the_next_layer() -> None:
    """The CPU needs 500: layer 0 does not wait for it, the COMBINE of layer 1 does."""
    costs = lab.make_costs(2, attention=100, gate=10, gpu=40, cpu=500, combine=5)
    done = lab.run(Deferring, [[[0, 1], [0, MISSING]]], costs)

    combines = lab.spans(done, "combine")
    assert combines[0].start_ns == 110 + 40
    assert combines[1].start_ns == 110 + 500


@pytest.mark.parametrize("chunk", [0, 1])
def test_small_copies_are_not_cut(chunk: int) -> None:
    """A copy of one chunk cannot be preempted: the demand waits for its end."""
    costs = lab.make_costs(2, attention=140, gate=10, gpu=40, combine=5, copy_ns_per_kib=400)
    machine = lab.quiet_machine(f"link.chunk_bytes={1024 + chunk}")
    done = lab.run(Both, [[[0], [0]]], costs, machine=machine)

    assert done.preemptions == 0
    assert lab.spans(done, "copy_in")[1] == ("h2d", "copy_in", 0, 0, 400, 800)


def test_whole_is_the_sum_of_its_parts() -> None:
    """Telescoping: pieces at any borders sum to the whole, in time and in bytes."""
    from moesim.costs import duration_ns, part_bytes
    from moesim.types import EXPERT_GPU

    costs = lab.make_costs(gpu=997)
    borders = [0, 1, 300, 301, 1023, WHOLE]
    pieces = list(pairwise(borders))
    ns = [duration_ns(costs, 0, EXPERT_GPU, 0, 1, a, b - a, 0) for a, b in pieces]
    size = [part_bytes(costs, 0, 0, a, b - a) for a, b in pieces]
    assert (sum(ns), sum(size)) == (997, lab.EXPERT_BYTES)


class Dividing(NamedTuple):
    """In step 0 layer 0 has two whole experts; in step 1 their memory becomes four halves of it."""

    @classmethod
    def new(cls, setting: Setting) -> "Dividing":
        return cls()

    def place(self, setting: Setting) -> Placement:
        return lab.placement(setting, [(0, 0), (0, 1)], staging=1, spare_slots=2)

    def before_attention(self, view: View, plan: Plan) -> None:
        if view.step == 1:
            resize(plan, 0, 4, 512)
            for expert in range(4):
                fetch(plan, 0, expert, 512, into=CACHE)

    def dispatch(self, view: View, plan: Plan) -> None:
        for expert in view.active[: view.n_active]:
            run_on_gpu(plan, expert)


def test_memory_is_divided_anew_between_two_steps() -> None:
    """Step 0 takes 100 + 10 + 2 x 40 + 5 + 9 = 204. Then four halves of 128 each are copied.

    At 314 the rest of expert 2 is demanded, and overtakes all but the first: its run of 2 x 20
    begins when its own half is there.
    """
    costs = lab.make_costs(attention=100, gate=10, gpu=40, combine=5, head=9, copy_ns_per_kib=256)
    machine = lab.quiet_machine("link.chunk_bytes=4096")
    done = lab.run(Dividing, [[[0, 1]], [[2, MISSING]]], costs, slots=3, machine=machine)

    resizes = lab.spans(done, "resize")
    assert [(s.start_ns, s.end_ns) for s in resizes] == [(204, 204)] * 6
    copies = [(s.expert, s.start_ns, s.end_ns) for s in lab.spans(done, "copy_in")]
    assert copies == [(e, 204 + 128 * i, 332 + 128 * i) for i, e in enumerate((0, 2, 1, 2, 3))]
    ran = [(s.start_ns, s.end_ns) for s in lab.spans(done, "expert_gpu") if s.expert == 2]
    assert ran == [(716, 736), (736, 756)]
    assert lab.makespan_ns(done) == 756 + 5 + 9
