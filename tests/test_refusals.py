"""Orders that cannot be carried out are refused, by a message that names where and the rule."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import moesim.policies.testing as lab
from moesim.errors import DeadlockError, PolicyError
from moesim.policies import api
from moesim.policies.api import CACHE, FIRST, REST, Placement, Plan, Setting, View
from moesim.run import Feed
from moesim.sim.simpy_machine import SimpyMachine
from moesim.state import RULES
from moesim.traces.workload import Steps
from moesim.types import COPY_IN, H2D, WHOLE

Order = Callable[[View, Plan], object]


def policy(hook: str, order: Order, *, cached: int = 2, run: bool = True, **options: Any) -> type:
    """Return a policy with experts 0 to `cached` - 1 of 4 resident, which orders this in a hook."""

    class Wrong(NamedTuple):
        @classmethod
        def new(cls, setting: Setting) -> "Wrong":
            return cls()

        def place(self, setting: Setting) -> Placement:
            there = [(layer, e) for layer in range(setting.layers) for e in range(cached)]
            return lab.placement(setting, there, **options)

        def dispatch(self, view: View, plan: Plan) -> None:
            if hook == "dispatch":
                order(view, plan)
            if run:
                for expert in view.active[: view.n_active]:
                    api.run_on_gpu(plan, expert)

    if hook != "dispatch":
        setattr(Wrong, hook, lambda self, view, plan: order(view, plan))
    return Wrong


def over(view: View, plan: Plan) -> None:
    for _ in range(len(plan.rows) + 1):
        api.promote(plan, 0, 0)


def twice(view: View, plan: Plan) -> None:
    api.run_shared(plan)
    api.run_shared(plan)


def gates(view: View, plan: Plan) -> None:
    for expert in range(4):
        api.gate_after(plan, expert)


def fill(view: View, plan: Plan) -> None:
    for expert in range(4):
        api.fetch(plan, 0, expert, into=CACHE)


# Experts 0 and 2 are active in both layers; 0 and 1 are cached.
CASES: list[tuple[str, Order, str, dict[str, Any]]] = [
    ("dispatch", over, "the plan holds at most", {}),
    ("after_layer", lambda v, p: api.run_on_gpu(p, 0), "experts run in dispatch only", {}),
    ("before_gate", lambda v, p: api.run_on_cpu(p, 0), "experts run in dispatch only", {}),
    ("dispatch", lambda v, p: api.fetch(p, 0, 4), "no such layer or expert", {}),
    ("dispatch", lambda v, p: api.fetch(p, -1, 0), "no such layer or expert", {}),
    ("dispatch", lambda v, p: api.fetch(p, 4, 0), "no such layer or expert", {}),
    ("dispatch", lambda v, p: api.run_on_gpu(p, 1), "an inactive expert cannot run", {}),
    ("dispatch", lambda v, p: api.run_on_cpu(p, 0), "an expert runs once", {}),
    ("dispatch", lambda v, p: api.run_on_gpu(p, 2, FIRST), "FIRST runs once", {}),
    ("dispatch", lambda v, p: api.run_on_gpu(p, 0, REST), "REST after it", {}),
    ("dispatch", lambda v, p: None, "needs a staging slot, and the placement has none",
     {"staging": 0}),
    ("dispatch", lambda v, p: api.run_on_cpu(p, 0, v.layer), "the last layer cannot defer",
     {"run": False, "only": 1}),
    ("dispatch", lambda v, p: None, "an active expert was left without a device", {"run": False}),
    ("dispatch", lambda v, p: api.evict(p, v.layer, 0), "cannot be evicted before its run", {}),
    ("dispatch", lambda v, p: api.evict(p, v.layer, 3), "what is not cached cannot be evicted", {}),
    ("dispatch", fill, "the layer's cache has no free slot", {}),
    ("dispatch", lambda v, p: api.fetch(p, 1, 3, into=CACHE), "do not fit into a slot of that size",
     {"cached": 0, "cache_slots": np.array([1, 1]), "cache_slot_bytes": np.array([9, 9])}),
    ("dispatch", lambda v, p: api.fetch(p, 1, 3, 512), "staging takes whole experts", {}),
    ("after_layer", lambda v, p: api.fetch(p, 0, 0, WHOLE, 1, CACHE), "grows in its own precision",
     {"cached": 0, "parts": np.array([[512, 0, 0, 0], [0, 0, 0, 0]])}),
    ("dispatch", lambda v, p: api.admit(p, 0, 3), "only a wholly staged, uncached expert", {}),
    ("dispatch", lambda v, p: api.gate_after(p, 0), "gate_after is too late", {}),
    ("before_attention", gates, "gates wait for at most three experts", {"cached": 4}),
    ("before_gate", lambda v, p: api.gate_after(p, 3), "gates wait for at most three experts", {}),
    ("dispatch", lambda v, p: api.fetch(p, 1, 3, 0), "part must be 1..1024", {}),
    ("dispatch", lambda v, p: api.fetch(p, 1, 3, into=7), "into CACHE or STAGING", {}),
    ("dispatch", lambda v, p: api.run_on_gpu(p, 0, 7), "piece BOTH, FIRST or REST", {}),
    ("dispatch", lambda v, p: api.fetch(p, 1, 3, WHOLE, 4), "no such precision", {}),
    ("dispatch", twice, "shared experts run once, in dispatch", {}),
    ("before_gate", lambda v, p: api.resize(p, 0, 1, 9), "before the attention of layer 0", {}),
    ("before_attention", lambda v, p: api.resize(p, 1, 3, 9) if v.layer else None,
     "before the attention of layer 0", {}),
    ("before_attention", lambda v, p: api.resize(p, 1, 4, 9), "as many slots as it has",
     {"spare_slots": 1}),
    ("before_attention", lambda v, p: api.resize(p, 1, 1, -9), "of 0 bytes or more", {}),
    ("before_attention", lambda v, p: api.resize(p, 1, 1, 17 * 1024), "larger than the budget", {}),
    ("before_attention", lambda v, p: api.resize(p, 1, 2, 1 << 62), "larger than the budget", {}),
    ("routed", lambda v, p: api.run_shared(p), "shared experts run once, in dispatch", {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("hook", "order", "rule", "options"), CASES, ids=[f"{c[0]}-{c[2][:32]}" for c in CASES]
)
def test_an_illegal_order_names_where_and_why(
    hook: str, order: Order, rule: str, options: dict[str, Any]
) -> None:
    chosen = options.copy()
    active = [[0, 2]] * 2 if "only" not in options else [[0, 0xFFFF]] * 2
    chosen.pop("only", None)
    if rule == "an expert runs once":
        chosen["run"] = True
    wrong = policy(hook, order, **chosen)
    with pytest.raises(PolicyError) as refused:
        lab.run(wrong, [active], lab.make_costs(2, gpu=5, cpu=5), slots=20)
    message = str(refused.value)
    assert message.startswith(f"policy 'wrong', hook {hook}, step 0, layer ")
    assert rule in message
    assert "\n" not in message


def test_every_rule_is_tried() -> None:
    """All but the last: a queue of pending fetches has two places for every expert there is."""
    tried = " ".join(rule for _, _, rule, _ in CASES)
    for rule in RULES[1:-1]:
        assert any(words in rule for _, _, words, _ in CASES), f"{rule} is not among {tried}"


PLACEMENTS: list[tuple[dict[str, Any], str]] = [
    ({"parts": np.full((2, 4), 1025)}, "cached="),
    ({"parts": np.zeros((2, 5), np.int64)}, "cached="),
    ({"cache_slots": np.array([-1, 1])}, "cache_slots="),
    ({"cache_slot_bytes": np.array([1024])}, "cache_slot_bytes="),
    ({"pool_of_layer": np.array([0, 2])}, "pool_of_layer="),
    ({"pool_of_layer": np.array([0])}, "pool_of_layer="),
    ({"spare_slots": -1}, "spare_slots="),
    ({"staging": -1}, "staging_slots="),
    ({"staging_slot_bytes": -1}, "staging_slot_bytes="),
    ({"cached_precision": 4}, "cached_precision="),
    ({"batches": 2}, "batches="),
    ({"batches": 0}, "batches="),
    ({"link": "bogus"}, "link="),
    ({"chunk_bytes": -1}, "chunk_bytes="),
    ({"on_disk": np.zeros((1, 4), np.int64)}, "on_disk="),
    ({"predictions": (api.Prediction("oracle", lane=H2D),)}, "predictions="),
    ({"predictions": (api.Prediction("oracle", distance=0),)}, "predictions="),
    ({"staging": 30}, "the budget is"),
    ({"cache_slots": np.array([1, 1])}, "more resident experts than slots"),
    ({"cache_slot_bytes": np.array([9, 9])}, "does not fit its slot"),
]


@pytest.mark.parametrize(("options", "named"), PLACEMENTS, ids=lambda value: str(value)[:40])
def test_a_placement_that_cannot_work_is_refused(options: dict[str, Any], named: str) -> None:
    wrong = policy("dispatch", lambda view, plan: None, **options)
    with pytest.raises(PolicyError, match=r"^policy 'wrong': ") as refused:
        lab.run(wrong, [[[0, 2]] * 2], lab.make_costs(2, gpu=5), slots=20)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_policy_s_own_fault_names_file_and_line() -> None:
    def stumble(view: View, plan: Plan) -> None:
        api.run_on_cpu(plan, view.loads[99])

    with pytest.raises(PolicyError, match=r"policy 'wrong': IndexError: .*test_refusals.py:\d+"):
        lab.run(policy("dispatch", stumble), [[[0, 2]] * 2], lab.make_costs(2), slots=20)


def test_a_wait_without_end_is_a_deadlock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that forgets to release what waits for a copy: the host names what is stuck."""
    complete = SimpyMachine.complete

    def forgetful(self: SimpyMachine, lane: int, op: Any) -> None:
        if op.kind == COPY_IN:
            op.dependents = []
        complete(self, lane, op)

    monkeypatch.setattr(SimpyMachine, "complete", forgetful)
    with pytest.raises(DeadlockError) as stuck:
        lab.run(policy("before_gate", lambda v, p: None), [[[0, 2]] * 2], lab.make_costs(2, gpu=5))
    assert str(stuck.value) == (
        "ticket 8 (gate, layer 1, expert -1) on queue gpu can never end: it waits for tickets [], "
        "behind ticket 5 (expert_gpu)"
    )


def test_waiting_for_what_was_never_submitted_is_a_deadlock() -> None:
    steps = Steps(*[np.zeros((0, 1), np.int64)] * len(Steps._fields))
    feed = Feed(steps, np.zeros((0, 1, 1), np.int16), None, ())
    machine = SimpyMachine(lab.make_costs(), feed, lab.quiet_machine().rates(), 256)
    machine.wait(0)
    with pytest.raises(DeadlockError, match="ticket 1 was never submitted"):
        machine.wait(1)
