import numpy as np
import pytest

import moesim.policies.testing as lab
from moesim.policies.registry import choose

COSTS = lab.make_costs(
    attention=100, gate=10, gpu=40, cpu=70, combine=5, head=7, copy_ns_per_kib=1024, token_bytes=8
)


class TestAllCpu(lab.PolicyConformance):
    policy = "all-cpu"
    needs_gpu = False


class TestAllCpuByTheHost(lab.PolicyConformance):
    policy = "all-cpu:host_computes=true"
    needs_gpu = False


@pytest.mark.parametrize("slots", [0, 99])
def test_the_cpu_computes_everything_in_the_router_s_order(slots: int) -> None:
    """8 bytes there and back at 1 ns per byte; the budget changes nothing."""
    done = lab.run(choose("all-cpu"), [[[3, 1]]], COSTS, slots=slots)

    known = 100 + 10
    end = known + 70 + 70
    assert lab.spans(done) == [
        ("gpu", "attention", 0, -1, 0, 100),
        ("gpu", "gate", 0, -1, 100, known),
        ("d2h", "send", 0, -1, known, known + 8),
        ("cpu", "expert_cpu", 0, 3, known + 8, known + 78),
        ("cpu", "expert_cpu", 0, 1, known + 78, end + 8),
        ("h2d", "return", 0, -1, end + 8, end + 16),
        ("gpu", "combine", 0, -1, end + 16, end + 21),
        ("gpu", "head", -1, -1, end + 21, end + 28),
    ]


def test_a_host_that_computes_synchronises_after_each_expert() -> None:
    """5 after the gate, 5 after each expert, 5 after the head; here nothing else costs the host."""
    machine = lab.quiet_machine("host.per_sync_ns=5")
    done = lab.run(choose("all-cpu:host_computes=true"), [[[3, 1]]], COSTS, machine=machine)
    known = 100 + 10 + 5
    assert [span[4:] for span in lab.spans(done, "expert_cpu")] == [
        (known + 8, known + 78),
        (known + 83, known + 153),
    ]
    assert lab.spans(done, "return")[0].start_ns == known + 158


def test_no_weights_move() -> None:
    rng = np.random.default_rng(0)
    choices = [[rng.permutation(6)[:3]] for _ in range(9)]
    done = lab.run(choose("all-cpu"), choices, COSTS, experts=6, prompts=(1, 2, 3))
    assert lab.spans(done, "copy_in", "expert_gpu") == []
    counts = done.prepared.host.counts.sum(axis=0)[:, :, 1].sum(axis=0)
    assert counts.tolist() == [0, 0, 0, 0, 27]
