"""A real run told again: given its durations, the simulated machine decides as the real one did."""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import wild
from moesim.errors import PolicyError
from moesim.host import run_steps
from moesim.model import GroupedQuery, ModelSpec, expert_bytes
from moesim.policies.registry import choose
from moesim.profile import load_profile, with_overrides
from moesim.real.emulated import Emulated, Throttle
from moesim.real.engine import Engine
from moesim.real.torch_machine import TorchMachine
from moesim.run import Prepared, prepare
from moesim.sim.simpy_machine import SimpyMachine
from moesim.state import OK
from moesim.traces.synthetic import synthesize
from moesim.traces.workload import cut
from moesim.types import LANES, as_scalars

Answers = list[tuple[int, str, int, bool]]
"""After how many submissions what was asked of a machine, about which ticket, and what it said."""


class Asked(TorchMachine):
    """A real machine that notes its answers; `said` holds those of the latest."""

    said: ClassVar[Answers] = []

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.answers: Answers = []
        Asked.said = self.answers

    def done(self, ticket: int) -> bool:
        return noted(self, "done", ticket, super().done(ticket))

    def cancel(self, ticket: int) -> bool:
        return noted(self, "cancel", ticket, super().cancel(ticket))

    def promote(self, ticket: int) -> bool:
        return noted(self, "promote", ticket, super().promote(ticket))


class Again(SimpyMachine):
    """The simulated machine, with the durations of a log and its moments of submission."""

    def __init__(self, prepared: Prepared, operations: Any) -> None:
        rates = np.full((1 << len(LANES), len(LANES)), 1024)
        super().__init__(
            prepared.setting.costs, prepared.feed, rates, prepared.chunk_bytes, record=True
        )
        self.logged_ns = operations["duration_ns"].tolist()
        self.submit_ns = operations["submit_ns"].tolist()
        self.answers: Answers = []

    def alone_ns(self, ticket: int, *_: int) -> int:
        return int(self.logged_ns[ticket - 1]) if ticket <= len(self.logged_ns) else 0

    def submit(self, *operation: int) -> int:
        if self.tickets < len(self.submit_ns):
            super().pause(max(0, self.submit_ns[self.tickets] - self.env.now))
        return super().submit(*operation)

    def pause(self, ns: int) -> None:
        """The log knows when the host was ready."""

    def done(self, ticket: int) -> bool:
        return noted(self, "done", ticket, super().done(ticket))

    def cancel(self, ticket: int) -> bool:
        return noted(self, "cancel", ticket, super().cancel(ticket))

    def promote(self, ticket: int) -> bool:
        return noted(self, "promote", ticket, super().promote(ticket))


def noted(machine: Any, what: str, ticket: int, answer: bool) -> bool:
    count = machine.tickets if isinstance(machine, Again) else len(machine.tickets)
    machine.answers.append((count, what, ticket, answer))
    return answer


MODEL = ModelSpec(
    name="tiny", model_type="mixtral", hidden_layers=3, layer_ids=(0, 1, 2), experts=8, top_k=2,
    hidden=64, expert_width=32, shared_width=0, dense_width=0, vocab=50,
    attention=GroupedQuery(heads=2, kv_heads=2, head_dim=16),
)  # fmt: skip
PROFILE = with_overrides(load_profile("rtx3090-pcie4-ddr4")[0], {"link.chunk_bytes": "4000"})
PLAIN = [v for v in wild.VARIANTS if "oracle" not in v and "belady" not in v]
DECIDED = ("ticket", "queue", "kind", "layer", "expert", "batch", "amount", "context", "part",
           "precision", "slot", "cause", "after")  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine(Emulated(64 << 20, Throttle(20_000, 2e8)))
    yield made
    made.close()


@given(
    spec=st.sampled_from(PLAIN), slots=st.integers(3, 20), sequences=st.integers(1, 3),
    seed=st.integers(0, 1000),
)  # fmt: skip
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_the_simulator_decides_as_the_real_machine_did(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, spec: str, slots: int, sequences: int,
    seed: int,
) -> None:  # fmt: skip
    """As long as both give the same answers to what depends on time, all else is the same, too."""
    trace = synthesize(
        layers=3, experts=8, top_k=2, sequences=4, prompt=3, generate=5, seed=seed, distances=2
    )

    def make() -> Prepared:
        return prepare(
            trace, cut(trace, batch=sequences), MODEL, PROFILE, choose(spec),
            budget_bytes=slots * expert_bytes(MODEL), seed=seed,
        )  # fmt: skip

    try:
        again = make()
    except PolicyError:
        return
    monkeypatch.setattr("moesim.real.engine.TorchMachine", Asked)
    run = engine.run(make, warm_up=0)
    assert run.log is not None
    real = run.log.operations
    machine = Again(again, real)
    host = as_scalars(again.host)._replace(seen=again.host.seen)
    assert run_steps(machine, again.policy, host, 0, len(again.host.steps.phase)) == OK
    machine.drain()
    told, _ = machine.logged()
    differ = (a[0] for a, b in zip(machine.answers, Asked.said, strict=False) if a != b)
    until = next(differ, None)
    event("the answers differ" if until is not None else "the answers are the same")
    if until is None:
        assert machine.answers == Asked.said
        assert len(told) == len(real)
    for field in DECIDED:
        assert (told[field][:until] == real[field][:until]).all(), field
