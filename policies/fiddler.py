"""Fiddler, arXiv 2402.07033: popular experts stay on the GPU, others run where it is cheaper."""

from typing import Literal, NamedTuple

import numpy as np

from moesim.policies.api import (
    Placement,
    Plan,
    Setting,
    View,
    layer_caches,
    run_on_cpu,
    run_on_gpu,
    transfer_ns,
)
from moesim.policies.parts.assign import threshold
from moesim.policies.parts.placement import by_popularity, resident
from moesim.types import WHOLE, IntArray

CODE_CPU, CODE_GPU = 7, 70
"""What the released code takes a token to cost on the CPU, and an absent expert on the GPU."""


class Fiddler(NamedTuple):
    """A fixed popular set; each other expert is copied to the GPU if that beats the CPU, or not.

    Paper: resident experts run on the GPU; another one is copied and runs there if
    t_cpu(w) > t_gpu(w) + t_copy for its w tokens, else the CPU computes it. Released code
    (`src/fiddler/mixtral.py`): the most used (layer, expert) pairs are resident, in one global
    order, for good; fixed costs of 7 w and 70 in place of times (`cost=code`), hence the GPU from
    10 tokens on; equal costs go to the GPU; its enumeration of all assignments finds the smallest
    sum of costs, which is the cheaper device for each expert alone; absent experts pass through one
    placeholder; experts run by id; the GPU's and the CPU's one after the other.

    Inferred: the costs are those of the machine by default; counts are of the part of the trace
    that is not replayed, equal ones go to the lower layer and id. Deviation: the CPU's experts come
    before the GPU's, and not after them; the sum is the same. `order=overlap` runs both at once, as
    what the DALI paper calls a static workload threshold.
    """

    resident: IntArray
    """(layers, experts)."""
    staging: int
    serial: int
    by_code: int
    counted: int
    """1 if there was anything to count popularity on."""
    cpu_cost: IntArray
    gpu_cost: IntArray
    on_gpu: IntArray
    """(experts,): scratch space of one decision."""

    @classmethod
    def new(
        cls,
        setting: Setting,
        cost: Literal["measured", "code"] = "measured",
        order: Literal["serial", "overlap"] = "serial",
    ) -> "Fiddler":
        """Fill the budget, less the placeholder, with the most popular experts."""
        staging = min(1, setting.slots)
        return cls(
            resident=resident(setting, by_popularity(setting)[: setting.slots - staging]),
            staging=staging,
            serial=int(order == "serial"),
            by_code=int(cost == "code"),
            counted=int(setting.popularity.any()),
            cpu_cost=np.zeros(setting.experts, np.int64),
            gpu_cost=np.zeros(setting.experts, np.int64),
            on_gpu=np.zeros(setting.experts, np.int64),
        )

    def place(self, setting: Setting) -> Placement:
        """Fill exactly the slots that are used, and one more."""
        notice = (
            "fiddler counts popularity on the part of the trace that is not replayed, and nothing "
            "is left of it: the first layers' experts are resident"
        )
        return layer_caches(
            setting,
            cached=self.resident,
            slots=(self.resident > 0).sum(axis=1),
            staging_slots=self.staging,
            host_computes=self.serial == 1,
            notices=() if self.counted else (notice,),
        )

    def dispatch(self, view: View, plan: Plan) -> None:
        """Compare costs expert by expert; run the CPU's by id, then the GPU's."""
        estimate(view, self.by_code, self.cpu_cost, self.gpu_cost)
        threshold(view.active, view.n_active, self.cpu_cost, self.gpu_cost, self.on_gpu)
        for expert in range(len(self.on_gpu)):
            if view.loads[expert] > 0:
                if self.staging == 0:
                    self.on_gpu[expert] = 0
                if self.on_gpu[expert] == 0:
                    run_on_cpu(plan, expert)
        for expert in range(len(self.on_gpu)):
            if view.loads[expert] > 0 and self.on_gpu[expert] == 1:
                run_on_gpu(plan, expert)


def estimate(view: View, by_code: int, cpu_cost: IntArray, gpu_cost: IntArray) -> None:
    """Fill in what each active expert costs on either device; resident ones cost the GPU nothing.

    Copy and computation follow each other, so that their times add up.
    """
    copy_ns = transfer_ns(view)
    for i in range(view.n_active):
        expert = view.active[i]
        cpu_cost[expert] = CODE_CPU * view.loads[expert] if by_code else view.cpu_ns[expert]
        if view.cached[view.layer, expert] == WHOLE:
            gpu_cost[expert] = 0
        else:
            gpu_cost[expert] = CODE_GPU if by_code else view.gpu_ns[expert] + copy_ns
