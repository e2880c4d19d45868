"""What a log adds up to is what the machine that wrote it has added up itself."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wild
from moesim.log import OPERATION, SEGMENT
from moesim.policies.registry import choose
from moesim.real.account import totals
from moesim.real.torch_machine import Waited
from moesim.sim.replay import Replayed
from moesim.sim.rules import WAIT_CPU, WAIT_HOST, WAIT_WEIGHTS
from moesim.sim.simpy_machine import SimpyMachine
from moesim.types import ATTENTION, COPY_IN, D2H, GPU, H2D, SEND


def watched(run: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Replayed, list[Waited]]:
    """Return a run and the stretches in which its host waited."""
    waited: list[Waited] = []
    wait = SimpyMachine.wait

    def watching(self: SimpyMachine, ticket: int) -> None:
        start_ns = self.env.now
        wait(self, ticket)
        waited.append(Waited(ticket, start_ns, self.env.now))

    with monkeypatch.context() as patch:
        patch.setattr(SimpyMachine, "wait", watching)
        return run(), waited


@given(case=wild.cases(), spec=st.sampled_from(wild.VARIANTS))
@settings(max_examples=100, deadline=None)
def test_the_log_adds_up_to_the_simulator_s_own_sums(case: wild.Case, spec: str) -> None:
    """Everything but where the numbers rest, which a log does not hold.

    What ends in the instant of a HEAD may count or not; after the last one the host may pause.
    """
    done, waited = watched(lambda: case.run(choose(spec)), pytest.MonkeyPatch())
    assert done.log is not None
    segments = done.log.segments[done.log.segments["ticket"] > 0]
    *heads, drained = totals(done.log.operations, segments, waited)
    assert len(heads) == len(done.heads)
    for mine, theirs in zip(heads, done.heads, strict=True):
        assert mine.now_ns == theirs.now_ns
        assert mine.busy_ns == theirs.busy_ns
        assert mine.time_ns == theirs.time_ns
        assert sum(mine.time_ns) == mine.now_ns
        if (segments["end_ns"] == mine.now_ns).sum() == 1:
            assert (mine.copied_bytes == theirs.copied_bytes).all()
    assert (drained.copied_bytes == done.drained.copied_bytes).all()
    assert drained.busy_ns == done.drained.busy_ns


def test_a_gap_by_hand() -> None:
    """The host waits 10-30 for a SEND, submits at 35, what it submits waits for a copy until 60
    and for its lane's thread until 62.
    """
    operations = np.zeros(3, OPERATION)
    operations["ticket"] = 1, 2, 3
    operations["kind"] = SEND, COPY_IN, ATTENTION
    operations["queue"] = D2H, H2D, GPU
    operations["submit_ns"] = 0, 0, 35
    operations["cancel_ns"] = -1
    operations["after"][2] = 2, 0, 0
    segments = np.array([(1, 10, 30, 1), (2, 40, 60, 1), (3, 62, 70, 1)], SEGMENT)
    (drained,) = totals(operations, segments, [Waited(1, 10, 30)])
    assert drained.time_ns[WAIT_HOST] == 10 + 5 + 2
    assert drained.time_ns[WAIT_CPU] == 20
    assert drained.time_ns[WAIT_WEIGHTS] == 25
    assert drained.time_ns[ATTENTION] == 8
