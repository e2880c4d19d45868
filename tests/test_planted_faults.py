"""The audit catches a host program or a machine that does wrong: faults planted on purpose."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

import moesim.commands
import moesim.forecast
import moesim.host
import moesim.policies.testing as lab
import moesim.residency
from moesim.errors import AuditError
from moesim.policies.api import (
    CACHE,
    Placement,
    Plan,
    Setting,
    View,
    evict,
    fetch,
    run_on_cpu,
    run_on_gpu,
)
from moesim.sim.simpy_machine import SimpyMachine
from moesim.types import COMBINE, COPY_IN, EXPERT_GPU, GPU, H2D, RETURN

COSTS = lab.make_costs(
    2, attention=50, gate=10, gpu=40, cpu=600, combine=5, head=7, copy_ns_per_kib=200, latency=2
)
CHOICES = [[[0, 1], [2, 3]], [[1, 2], [3, 0]]]


class Churn(NamedTuple):
    """Two slots per layer, always refilled; one expert in each layer goes to the CPU."""

    @classmethod
    def new(cls, setting: Setting) -> "Churn":
        return cls()

    def place(self, setting: Setting) -> Placement:
        return lab.placement(setting, [(0, 0), (1, 0)], slots=1)

    def before_attention(self, view: View, plan: Plan) -> None:
        fetch(plan, 1 - view.layer, 1)

    def dispatch(self, view: View, plan: Plan) -> None:
        run_on_cpu(plan, view.active[0])
        expert = view.active[1]
        for other in range(len(view.loads)):
            if view.cached[view.layer, other] and other != expert:
                evict(plan, view.layer, other)
        fetch(plan, view.layer, expert, into=CACHE, urgent=1)
        run_on_gpu(plan, expert)
        evict(plan, view.layer, expert)
        fetch(plan, view.layer, (int(expert) + 1) % 4, into=CACHE)


def churn() -> None:
    lab.run(Churn, CHOICES, COSTS, slots=4)


def test_without_a_fault_all_is_well() -> None:
    churn()


def cancel_what_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    original = SimpyMachine.cancel

    def cancel(self: SimpyMachine, ticket: int) -> bool:
        op = self.open.get(ticket)
        if op is not None:
            for dependent in op.dependents:
                dependent.blockers -= 1
            op.dependents = []
        return original(self, ticket)

    monkeypatch.setattr(SimpyMachine, "cancel", cancel)


def launched(change: Callable[[list[Any]], None]) -> Callable[..., int]:
    """Return a `launch_expert` or `launch` whose arguments are changed first."""

    def launch(*operation: Any) -> int:
        changed = list(operation)
        change(changed)
        return original(*changed)

    original = moesim.forecast.launch_expert
    return launch


def reuse_a_slot_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_last_use(operation: list[Any]) -> None:
        if operation[3] == COPY_IN:
            operation[13] = 0

    monkeypatch.setattr(moesim.residency, "launch_expert", launched(forget_last_use))


def run_before_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_arrival(operation: list[Any]) -> None:
        if operation[3] == EXPERT_GPU:
            operation[13] = 0

    monkeypatch.setattr(moesim.commands, "launch_expert", launched(forget_arrival))


def read_another_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    def swap_slot(operation: list[Any]) -> None:
        if operation[3] == EXPERT_GPU:
            operation[11] ^= 1

    monkeypatch.setattr(moesim.commands, "launch_expert", launched(swap_slot))


def forget_an_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(_: Any, host: Any, layer: int, expert: int, *rest: Any) -> None:
        host.ran[expert] = 1024

    monkeypatch.setattr(moesim.commands, "launch_piece", pretend)


def run_an_expert_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    original = moesim.commands.launch_piece

    def twice(*piece: Any) -> None:
        original(*piece)
        host, expert = piece[1], piece[3]
        ran = host.ran[expert]
        original(*piece)
        host.ran[expert] = ran

    monkeypatch.setattr(moesim.commands, "launch_piece", twice)


def lose_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_less(operation: list[Any]) -> None:
        if operation[3] == EXPERT_GPU:
            operation[7] -= 1

    monkeypatch.setattr(moesim.commands, "launch_expert", launched(one_less))


def combine_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    original = moesim.forecast.launch

    def launch(*operation: Any) -> int:
        changed = list(operation)
        if changed[3] == COMBINE:
            changed[8:] = [0, 0, 0]
        return original(*changed)

    monkeypatch.setattr(moesim.host, "launch", launch)


def forget_to_return(monkeypatch: pytest.MonkeyPatch) -> None:
    original = moesim.forecast.launch

    def launch(*operation: Any) -> int:
        return 0 if operation[3] == RETURN else original(*operation)

    monkeypatch.setattr(moesim.host, "launch", launch)


def reorder_a_queue(queue: int) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        original = SimpyMachine.submit

        def submit(self: SimpyMachine, *operation: Any) -> int:
            ticket = original(self, *operation)
            waiting = self.queues[queue]
            if len(waiting) > 1 and waiting[-1].ticket == ticket:
                waiting.appendleft(waiting.pop())
                self.start_what_can(queue)
            return ticket

        monkeypatch.setattr(SimpyMachine, "submit", submit)

    return plant


def start_before_the_lane_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    original = SimpyMachine.start

    def early(self: SimpyMachine, lane: int, op: Any) -> None:
        original(self, lane, op)
        if lane == H2D:
            self.started[lane] = max(0, self.started[lane] - 5)

    monkeypatch.setattr(SimpyMachine, "start", early)


def work_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    original = SimpyMachine.start

    def lazy(self: SimpyMachine, lane: int, op: Any) -> None:
        if lane == GPU and op.kind == EXPERT_GPU:
            op.left -= 1024
        original(self, lane, op)

    monkeypatch.setattr(SimpyMachine, "start", lazy)


FAULTS = [
    (cancel_what_is_waited_for, "^form: nothing waits for what was cancelled"),
    (reuse_a_slot_too_early, "^weights: a slot is reused"),
    (run_before_arrival, "^weights: "),
    (read_another_slot, "^weights: the slot does not hold"),
    (forget_an_expert, "^completeness: .* has tokens, but"),
    (run_an_expert_twice, "^completeness: "),
    (lose_a_token, "^completeness: a run over"),
    (combine_too_early, "^completeness: .*COMBINE"),
    (forget_to_return, "^completeness: .*0 RETURNs"),
    (reorder_a_queue(H2D), "^queues: a queue is served in order"),
    (start_before_the_lane_is_free, "^form: |^lanes: "),
    (work_too_little, "^work: too little"),
]


@pytest.mark.parametrize(
    ("fault", "named"), FAULTS, ids=lambda value: getattr(value, "__name__", None)
)
def test_a_planted_fault_is_caught(
    fault: Callable[[pytest.MonkeyPatch], None], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises(AuditError, match=named):
        churn()
