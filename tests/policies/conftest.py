from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from moesim.audit import audit
from moesim.costs import build_costs
from moesim.forecast import new_forecast
from moesim.model import expert_bytes
from moesim.policies.api import Plan, Setting, View
from moesim.policies.registry import choose
from moesim.policies.testing import make_model
from moesim.profile import HardwareProfile, load_profile
from moesim.run import prepare
from moesim.sim.replay import Replayed, replay
from moesim.traces.format import Trace
from moesim.traces.synthetic import synthesize
from moesim.traces.workload import cut
from moesim.types import BITS, DECODE, NONE


@pytest.fixture(scope="session")
def profile() -> HardwareProfile:
    return load_profile("rtx3090-pcie4-ddr4")[0]


@pytest.fixture(scope="session")
def trace() -> Trace:
    """Return 4 sequences of 4 prompt and 15 decode rows, 3 layers of 8 experts, top 2."""
    return synthesize(layers=3, experts=8, top_k=2, sequences=4, prompt=4, generate=16, seed=1)


@pytest.fixture(scope="session")
def run(trace: Trace, profile: HardwareProfile) -> Callable[..., Replayed]:
    """Return a function that replays a trace under a policy, audits the log and returns the run."""

    def replay_one(
        spec: str,
        slots: int,
        *,
        of: Trace = trace,
        batch: int = 1,
        prompt: int | None = None,
        generate: int | None = None,
        seed: int = 0,
    ) -> Replayed:
        model = make_model(of.layers, of.n_experts, of.top_k, hidden=1024, expert_width=2048)
        prepared = prepare(
            *(of, cut(of, batch, prompt, generate), model, profile, choose(spec)),
            budget_bytes=slots * expert_bytes(model),
            seed=seed,
        )
        replayed = replay(prepared, record=True)
        assert replayed.log is not None
        audit(replayed.log)
        return replayed

    return replay_one


@pytest.fixture(scope="session")
def make_setting(profile: HardwareProfile) -> Callable[..., Setting]:
    """Return a maker of what is known before a run, for a budget in whole experts."""

    def make(
        slots: int, *, layers: int = 2, experts: int = 8, top_k: int = 2, seed: int = 0
    ) -> Setting:
        model = make_model(layers, experts, top_k, hidden=1024, expert_width=2048)
        return Setting(
            layers=layers,
            experts=experts,
            top_k=top_k,
            budget_bytes=slots * expert_bytes(model),
            precision=BITS.index(16),
            costs=build_costs(model, profile, 64, 8),
            sequences=8,
            step_tokens=64,
            popularity=np.zeros((layers, experts), np.int64),
            seed=seed,
        )

    return make


class Desk(NamedTuple):
    """A view of zeros to be filled in by hand, and the plan that a hook writes."""

    view: View
    plan: Plan

    def routed(self, loads: dict[int, int], **changes: Any) -> View:
        """Return the view with these experts active, in the order given."""
        self.view.loads[:] = 0
        self.view.active[:] = 0
        for at, (expert, load) in enumerate(loads.items()):
            self.view.active[at] = expert
            self.view.loads[expert] = load
        tokens = sum(loads.values())
        return self.view._replace(n_active=len(loads), tokens=tokens, **changes)

    def guessed(self, *tokens: tuple[int, ...]) -> None:
        """Fill in the first prediction: the ids guessed for each token, best first."""
        self.view.predicted_ids[:] = NONE
        self.view.predicted_loads[:] = 0
        self.view.predicted_tokens[0] = len(tokens)
        top_k = self.view.ids.shape[1]
        for at, guess in enumerate(tokens):
            self.view.predicted_ids[0, at, : len(guess)] = guess
            for expert in guess[:top_k]:
                self.view.predicted_loads[0, expert] += 1

    def take(self) -> list[tuple[int, ...]]:
        """Return the plan's rows and clear it."""
        n = int(self.plan.length[0])
        self.plan.length[0] = 0
        return [tuple(map(int, row)) for row in self.plan.rows[:n]]


@pytest.fixture(scope="session")
def make_desk() -> Callable[[Setting], Desk]:
    def make(setting: Setting) -> Desk:
        layers, experts, tokens = setting.layers, setting.experts, setting.step_tokens

        def zeros(*shape: int) -> Any:
            return np.zeros(shape, np.int64)

        view = View(
            layer=0,
            step=1,
            phase=DECODE,
            last_step=0,
            precision=setting.precision,
            batches=1,
            batch=NONE,
            tokens=0,
            n_active=0,
            free_slots=0,
            window_ns=0,
            ids=np.full((tokens, setting.top_k), NONE, np.int64),
            weights=np.zeros((tokens, setting.top_k)),
            active=zeros(experts),
            loads=zeros(experts),
            loads_by_batch=zeros(1, experts),
            scores=np.zeros(experts),
            cached=zeros(layers, experts),
            staged=zeros(layers, experts),
            pending=zeros(layers, experts),
            cached_ticket=zeros(layers, experts),
            staged_ticket=zeros(layers, experts),
            gpu_ns=zeros(experts),
            cpu_ns=zeros(experts),
            predicted_tokens=zeros(1),
            predicted_ids=np.full((1, tokens, setting.top_k), NONE, np.int64),
            predicted_scores=np.zeros((1, tokens, setting.top_k)),
            predicted_loads=zeros(1, experts),
            costs=setting.costs,
            forecast=new_forecast(setting.costs, 0, 0, setting.slots),
        )
        return Desk(view, Plan(zeros(8 * experts + 256, 8), zeros(1)))

    return make
