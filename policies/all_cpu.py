"""All on the CPU: no expert is ever on the GPU."""

from typing import NamedTuple

import numpy as np

from moesim.policies.api import Placement, Plan, Setting, View, layer_caches, run_on_cpu


class AllCpu(NamedTuple):
    """The CPU computes every expert in the order of the router; the budget stays unused.

    The baseline `CPU only` of Huang et al. (arXiv 2512.16473, its code without a cache), in which
    the host waits for each expert; llama.cpp's `--cpu-moe`.
    """

    host_computes: int

    @classmethod
    def new(cls, setting: Setting, host_computes: bool = False) -> "AllCpu":
        """`host_computes`: the host itself computes, and waits for each expert (Huang et al.)."""
        return cls(int(host_computes))

    def place(self, setting: Setting) -> Placement:
        """Ask for no slot at all."""
        nothing = np.zeros((setting.layers, setting.experts), np.int64)
        return layer_caches(
            setting,
            cached=nothing,
            slots=nothing.sum(axis=1),
            staging_slots=0,
            host_computes=self.host_computes == 1,
        )

    def dispatch(self, view: View, plan: Plan) -> None:
        """Run every expert in the order in which tokens ask for them."""
        for i in range(view.n_active):
            run_on_cpu(plan, view.active[i])
