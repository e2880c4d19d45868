"""The same policy takes the same decisions on every machine: timing never reaches what it sees.

Machines differ in how long things take, and so in whether a copy can still be taken back. None of
that may change a view or a plan; only times and bytes may differ.
"""

from typing import Any

import pytest
from hypothesis import given, settings

import moesim.host
import moesim.sim.replay
from moesim.policies.api import Plan, View, arriving_ns, queued_ns
from moesim.policies.registry import choose
from moesim.sim.simpy_machine import SimpyMachine
from moesim.types import QUEUES
from wild import Case, Wild, cases


class NeverCancels(SimpyMachine):
    """Every copy has started already when it is to be taken back."""

    def cancel(self, ticket: int) -> bool:
        return False


class NeverPromotes(SimpyMachine):
    """No copy is ever made urgent."""

    def promote(self, ticket: int) -> bool:
        return False


def decisions(case: Case, policy: Any, machine: type[SimpyMachine], jitter: int) -> list[Any]:
    """Return all that a policy saw and ordered, hook by hook."""
    seen: list[Any] = []
    call_hook = moesim.host.call_hook

    def watch(policy: Any, hook: int, view: View, plan: Plan) -> None:
        call_hook(policy, hook, view, plan)
        layers, experts = view.cached.shape
        estimates = [
            arriving_ns(view, layer, expert) for layer in range(layers) for expert in range(experts)
        ]
        estimates += [queued_ns(view, queue) for queue in range(len(QUEUES))]
        tables = (view.cached, view.staged, view.pending, view.loads, view.gpu_ns, view.cpu_ns)
        place = (hook, view.step, view.layer, view.batch, view.free_slots, view.window_ns)
        seen.append((place, estimates, [table.tolist() for table in tables], orders(plan)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moesim.host, "call_hook", watch)
        patch.setattr(moesim.sim.replay, "SimpyMachine", machine)
        case.run(policy, jitter=jitter)
    return seen


def orders(plan: Plan) -> list[list[int]]:
    """Return the orders of a plan."""
    rows: Any = plan.rows
    return [[rows[i, j] for j in range(8)] for i in range(plan.length[0])]


@pytest.mark.parametrize("policy", ["wild", "dali:w_size=1,link=priority", "lru"])
@given(case=cases())
@settings(max_examples=40)
def test_timing_never_reaches_a_policy(policy: str, case: Case) -> None:
    chosen = Wild if policy == "wild" else choose(policy)
    calm = decisions(case, chosen, SimpyMachine, 0)
    assert calm
    assert calm == decisions(case, chosen, SimpyMachine, 900)
    assert calm == decisions(case, chosen, NeverCancels, 0)
    assert calm == decisions(case, chosen, NeverPromotes, 0)
