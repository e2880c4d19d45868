"""On demand: every expert is copied when its gate has chosen it, and nothing is kept."""

from typing import NamedTuple

import numpy as np

from moesim.policies.api import Placement, Plan, Setting, View, layer_caches, run_on_gpu


class OnDemand(NamedTuple):
    """GPU only: a layer's experts are copied once its gate has chosen them, run, and are dropped.

    The baseline `on-demand` of Huang et al. (arXiv 2512.16473), whose code copies and computes one
    expert after the other: with one slot, a token takes L * (attention + 2 * (copy + expert)) for
    two experts per layer. The order is the router's (inferred). In batches above one, which the
    paper has not, an expert is copied once for all tokens that chose it (inferred).
    """

    staging: int

    @classmethod
    def new(cls, setting: Setting, staging: int = 1) -> "OnDemand":
        """`staging`: slots; 1 is the paper's, 2 copy the next expert while one is computed."""
        return cls(max(1, min(staging, setting.slots)))

    def place(self, setting: Setting) -> Placement:
        """Cache nothing."""
        nothing = np.zeros((setting.layers, setting.experts), np.int64)
        return layer_caches(setting, nothing, nothing.sum(axis=1), staging_slots=self.staging)

    def dispatch(self, view: View, plan: Plan) -> None:
        """Copy and run every expert in the order in which tokens ask for them."""
        for i in range(view.n_active):
            run_on_gpu(plan, view.active[i])
