"""All on the GPU: every expert is resident, or the run is refused."""

from typing import Literal, NamedTuple

import numpy as np

from moesim.errors import PolicyError
from moesim.policies.api import Placement, Plan, Setting, View, run_on_gpu
from moesim.types import WHOLE


class AllGpu(NamedTuple):
    """Every expert lives on the GPU: what a machine would do that needs no offloading.

    No paper's policy but the reference that all of them are measured against (inferred throughout).
    With `rest=on-demand` a smaller budget is filled with the first layers' experts, one slot apart,
    through which every other expert is streamed whenever it is needed.
    """

    resident: int
    """How many experts are resident, layer by layer."""
    staging: int

    @classmethod
    def new(cls, setting: Setting, rest: Literal["refuse", "on-demand"] = "refuse") -> "AllGpu":
        """`rest`: what is done if the budget does not hold all experts."""
        needed_bytes = int(setting.costs.expert_bytes[:, setting.precision].sum()) * setting.experts
        if needed_bytes <= setting.budget_bytes:
            return cls(setting.layers * setting.experts, 0)
        if rest == "refuse":
            raise PolicyError(
                f"the {setting.layers * setting.experts} experts take {needed_bytes} bytes on the "
                f"GPU, and the budget is {setting.budget_bytes} bytes; rest=on-demand streams what "
                "does not fit"
            )
        return cls(max(0, setting.slots - 1), 1)

    def place(self, setting: Setting) -> Placement:
        """Give each layer slots of the size of its own experts."""
        cached = np.zeros((setting.layers, setting.experts), np.int64)
        cached.ravel()[: self.resident] = WHOLE
        return Placement(
            cached=cached,
            cache_slots=(cached > 0).sum(axis=1),
            cache_slot_bytes=setting.costs.expert_bytes[:, setting.precision].copy(),
            pool_of_layer=np.arange(setting.layers),
            staging_slots=self.staging,
        )

    def dispatch(self, view: View, plan: Plan) -> None:
        """Run what is resident, then copy and run what is not."""
        for i in range(view.n_active):
            if view.cached[view.layer, view.active[i]] == WHOLE:
                run_on_gpu(plan, view.active[i])
        for i in range(view.n_active):
            if view.cached[view.layer, view.active[i]] < WHOLE:
                run_on_gpu(plan, view.active[i])
