"""Pre-gated MoE, arXiv 2308.12066: each block chooses the next one's experts, copied meanwhile."""

from typing import NamedTuple

import numpy as np

from moesim.errors import InputError
from moesim.policies.api import (
    Placement,
    Plan,
    Prediction,
    Setting,
    View,
    fetch,
    layer_caches,
    run_on_gpu,
)


class Pregated(NamedTuple):
    """GPU only: a block's experts are copied, in the order of their ids, while the one before runs.

    Secondary sources of the paper: the gate of block N+1 is trained into block N, so that what is
    copied is exact; the first block has two gates, and its own experts are copied on demand; the
    last one has none; nothing is kept once it was used; the buffer holds the active experts of two
    blocks. The model changes with its gates: here the retrained gates are taken to choose what the
    trace's own gates chose, one block earlier. Looking further ahead, the paper loses accuracy;
    `ahead` of 2 or 3 says what it would gain in time.

    Inferred: the first `ahead` blocks are copied on demand; experts run by id, each as soon as it
    is there, where the paper's model of time waits for all copies; in batches, what any token needs
    is copied once; a budget below the buffer streams through its slots.

    Deviations: a pre-gate stands beside the block's own gate and costs as much; the last blocks
    compute one, too, unless no token follows, and nothing is copied for it.
    """

    ahead: int
    staging: int

    @classmethod
    def new(cls, setting: Setting, ahead: int = 1) -> "Pregated":
        """`ahead`: how many blocks before its own an expert is chosen, 1 to 3."""
        if not 1 <= ahead <= 3:
            raise InputError(f"policy pregated: ahead={ahead} is not legal; 1 to 3 is")
        active = min(setting.experts, setting.top_k * setting.step_tokens)
        return cls(ahead, max(1, min((1 + ahead) * active, setting.slots)))

    def place(self, setting: Setting) -> Placement:
        """Cache nothing, and keep a buffer for what is used and what arrives."""
        nothing = np.zeros((setting.layers, setting.experts), np.int64)
        return layer_caches(
            setting,
            nothing,
            nothing.sum(axis=1),
            staging_slots=self.staging,
            predictions=(Prediction("oracle", distance=self.ahead),),
            notices=(
                "pregated needs a model with retrained gates, which are taken to choose what the "
                "trace's gates chose",
            ),
        )

    def dispatch(self, view: View, plan: Plan) -> None:
        """Run every expert, then copy what the pre-gate has chosen."""
        for expert in range(len(view.loads)):
            if view.loads[expert] > 0:
                run_on_gpu(plan, expert)
        target = view.layer + self.ahead
        if target < len(view.cached):
            for expert in range(len(view.loads)):
                if view.predicted_loads[0, expert] > 0:
                    fetch(plan, target, expert)
