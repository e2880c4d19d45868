"""Both simulated machines do the same, operation by operation, to the nanosecond.

The compiled machine is tried in two ways: its source as plain Python, and compiled together with
the host program. Policies that do not compile, such as the one that orders anything legal, are
called back from the compiled host.
"""

import ctypes
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim.sim.engine as engine
import moesim.sim.replay
import moesim.testing as lab
from moesim.errors import DeadlockError, PolicyError
from moesim.jit.structs import Block
from moesim.policies.api import HOOKS, Plan, View
from moesim.policies.registry import BUILTIN, choose
from moesim.run import Feed, Prepared
from moesim.sim.compiled_machine import RING, Lanes, deadlock, grow, logged, new_lanes, totals_now
from moesim.sim.engine import CompiledRun, Machinery, compiled_engine, lanes_of, run_range
from moesim.sim.metrics import summarize
from moesim.sim.replay import Replayed
from moesim.sim.simpy_machine import SimpyMachine
from moesim.types import (
    COPY_IN,
    GPU,
    H2D,
    H2D_BACKGROUND,
    HEAD,
    KINDS,
    LANES,
    MOVE,
    NONE,
    QUEUES,
    WHOLE,
)
from wild import Case, Wild, cases

COMPILED = [
    "lru",
    "static",
    "static:by=expert",
    "dali",
    "dali:cache=lru,prefetch_size=2",
    "dali:assign=exact,swap=guarded,link=priority,w_size=1",
    "dali:predictor=noisy-oracle,prefetch_size=3,w_size=2,u_size=2,link=priority",
]


class PlainRun(CompiledRun):
    """The source of the compiled machine, not compiled; its tables start as small as they can."""

    def __init__(self, prepared: Prepared, *, seed: int, jitter: int, record: bool) -> None:
        self.prepared = prepared
        lanes = lanes_of(prepared, seed, jitter, record)
        self.lanes = lanes._replace(
            ops=np.zeros((2, lanes.ops.shape[1]), np.int64), ring=np.zeros(2, np.int64)
        )

    def steps(self, first: int, last: int) -> int:
        return run_range(self.lanes, self.prepared.policy, self.prepared.host, first, last)


def called_back(prepared: Prepared) -> Machinery:
    """Return the compiled host, and for each hook a function that calls the policy's own.

    It is handed the address of a view and must find there what plain Python would be given.
    """
    host = prepared.host
    seen = Block(host.seen)
    machine = Block(lanes_of(prepared, 0, 0, False))
    run = compiled_engine(machine.type, Block(host).type)
    kind = ctypes.CFUNCTYPE(
        ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3
    )

    def answer(name: str) -> Callable[..., int]:
        def call(result: Any, error: Any, policy: int, view: int, plan: int) -> int:
            words = (ctypes.c_int64 * seen.type.words).from_address(view)
            scalars = {}
            for field, value in zip(View._fields, host.seen, strict=True):
                at = seen.type.offsets[field]
                if isinstance(value, np.ndarray):
                    assert words[at : at + 1 + value.ndim] == [value.ctypes.data, *value.shape]
                elif isinstance(value, int):
                    scalars[field] = words[at]
            getattr(prepared.policy, name)(host.seen._replace(**scalars), host.plan)
            return 0

        return call

    functions = [
        kind(answer(name)) if hasattr(prepared.policy, name) else None for name in HOOKS
    ]
    KEPT.append(functions)
    return Machinery(
        run, tuple(ctypes.cast(f, ctypes.c_void_p).value or 0 if f else 0 for f in functions)
    )


KEPT: list[Any] = []
"""Callbacks, which must live as long as compiled code may call them."""


def run_on(machine: str, case: Case, policy: Any, **changes: Any) -> Replayed:
    """Replay on `simpy`, `compiled` or `plain`."""
    chosen = choose(policy) if isinstance(policy, str) else policy
    done: Replayed
    with pytest.MonkeyPatch.context() as patch:
        if machine == "plain":
            patch.setattr(moesim.sim.engine, "CompiledRun", PlainRun)
        elif policy is Wild:
            patch.setattr(engine, "compile_for", called_back)
        done = case.run(chosen, "simpy" if machine == "simpy" else "compiled", **changes)
    KEPT.clear()
    return done


def same(one: Replayed, other: Replayed) -> None:
    """Check that two runs are the same in all but the machine and the time they took."""
    assert one.log is not None
    assert other.log is not None
    assert (one.log.operations == other.log.operations).all()
    assert len(one.log.segments) == len(other.log.segments)
    assert (one.log.segments == other.log.segments).all()
    for name in ("operations", "preemptions", "paused_ns"):
        assert getattr(one, name) == getattr(other, name)
    for left, right in zip((*one.heads, one.drained), (*other.heads, other.drained), strict=True):
        assert (left.now_ns, left.time_ns, left.busy_ns) == (
            right.now_ns, right.time_ns, right.busy_ns
        )  # fmt: skip
        assert (left.copied_bytes == right.copied_bytes).all()
        assert left.source_ns == right.source_ns
    results = []
    for done in (one, other):
        result = summarize(done)
        del result["run"]["wall_s"], result["run"]["machine"]
        results.append(result)
    assert results[0] == results[1]
    for name in ("state", "counts", "kv_out"):
        assert (
            np.asarray(getattr(one.prepared.host, name))
            == np.asarray(getattr(other.prepared.host, name))
        ).all()
    for left, right in zip(one.prepared.host.res, other.prepared.host.res, strict=True):
        assert np.array_equal(left, right)


def test_every_policy_is_compared() -> None:
    assert {spec.partition(":")[0] for spec in COMPILED} == set(BUILTIN)


@pytest.mark.parametrize("policy", [Wild, *COMPILED], ids=str)
@given(case=cases())
@settings(max_examples=100)
def test_compiled_and_simpy_give_the_same_log(policy: Any, case: Case) -> None:
    same(run_on("simpy", case, policy), run_on("compiled", case, policy))


@pytest.mark.parametrize("policy", [Wild, "dali"], ids=str)
@given(case=cases())
@settings(max_examples=50)
def test_its_source_gives_the_same_log_as_plain_python(policy: Any, case: Case) -> None:
    same(run_on("simpy", case, policy), run_on("plain", case, policy))
