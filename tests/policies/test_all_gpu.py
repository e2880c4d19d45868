from typing import Any

import numpy as np
import pytest

import moesim.policies.testing as lab
from moesim.errors import PolicyError
from moesim.jit.store import disabled
from moesim.policies.api import Setting
from moesim.policies.registry import choose
from moesim.run import Prepared

COSTS = lab.make_costs(
    2, attention=100, gate=10, gpu=40, cpu=70, combine=5, head=7, copy_ns_per_kib=200
)
ENOUGH = 2 * 4


class TestAllGpu(lab.PolicyConformance):
    """With a budget that is always enough, since it refuses a smaller one."""

    policy = "all-gpu"

    def prepare(self, **changes: Any) -> Prepared:
        if changes.get("slots") != 0:
            changes["slots"] = 100
        return super().prepare(**changes)


class TestAllGpuWithTheRestOnDemand(lab.PolicyConformance):
    policy = "all-gpu:rest=on-demand"


@pytest.mark.parametrize("rest", ["refuse", "on-demand"])
def test_everything_is_resident_if_it_just_fits(rest: str) -> None:
    """No copy: each layer is 100 + 10 + 2 * 40 + 5."""
    done = lab.run(choose(f"all-gpu:rest={rest}"), [[[0, 1], [2, 3]]] * 3, COSTS, slots=ENOUGH)
    assert lab.spans(done, "copy_in", "expert_cpu") == []
    assert lab.makespan_ns(done) == 3 * (2 * (100 + 10 + 2 * 40 + 5) + 7)
    assert done.prepared.placement.staging_slots == 0


def test_less_is_refused_with_both_numbers() -> None:
    with pytest.raises(PolicyError) as refused:
        lab.run(choose("all-gpu"), [[[0, 1], [2, 3]]], COSTS, slots=ENOUGH - 1)
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith(
        "policy 'all-gpu': the 8 experts take 8192 bytes on the GPU, and the budget is 7168 bytes"
    )


def test_layers_of_different_sizes_take_what_each_needs(make_setting: Any) -> None:
    """4 experts of 1000 bytes and 4 of 600 fit into 6400, though 8 of 1000 do not."""
    setting: Setting = make_setting(1, layers=2, experts=4)
    sizes = np.array([[1000] * 4, [600] * 4])
    setting = setting._replace(budget_bytes=6400, costs=setting.costs._replace(expert_bytes=sizes))
    placement = choose("all-gpu").make(setting).place(setting)
    assert (placement.cache_slots * placement.cache_slot_bytes).sum() == 6400
    with pytest.raises(PolicyError, match="take 6400 bytes on the GPU, and the budget is 6399"):
        choose("all-gpu").make(setting._replace(budget_bytes=6399))


def test_the_rest_is_streamed_through_one_slot() -> None:
    """Of 6 slots one is for streaming: layer 0 and expert 0 of layer 1 stay."""
    choices = [[[0, 3], [3, 0]]]
    done = lab.run(choose("all-gpu:rest=on-demand"), choices, COSTS, slots=6)
    assert done.prepared.placement.cached.tolist() == [[1024] * 4, [1024, 0, 0, 0]]
    known = (100 + 10 + 2 * 40 + 5) + 100 + 10
    assert lab.spans(done, "copy_in", "expert_gpu")[2:] == [
        ("gpu", "expert_gpu", 1, 0, known, known + 40),
        ("h2d", "copy_in", 1, 3, known, known + 200),
        ("gpu", "expert_gpu", 1, 3, known + 200, known + 240),
    ]


@pytest.mark.skipif(disabled(), reason="nothing compiles")
def test_both_machines_agree() -> None:
    rng = np.random.default_rng(0)
    choices = [[rng.permutation(4)[:2] for _ in range(2)] for _ in range(6)]
    logs = [
        lab.run(choose("all-gpu"), choices, COSTS, slots=ENOUGH, on=on, prompts=(1, 2)).log
        for on in ("simpy", "compiled")
    ]
    assert logs[0] is not None
    assert logs[1] is not None
    assert (logs[0].operations == logs[1].operations).all()
    assert (logs[0].segments == logs[1].segments).all()
