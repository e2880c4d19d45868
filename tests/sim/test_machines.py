"""Both simulated machines do the same, operation by operation, to the nanosecond.

The compiled machine is tried in two ways: its source as plain Python, and compiled together with
the host program. Policies that do not compile, such as the one that orders anything legal, are
called back from the compiled host.
"""

import ctypes
import random
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim.policies.testing as lab
import moesim.sim.replay
from moesim.errors import DeadlockError, InputError, PolicyError
from moesim.jit.store import disabled
from moesim.jit.structs import Block
from moesim.policies import api
from moesim.policies.api import HOOKS, Placement, Plan, Setting, View
from moesim.policies.registry import BUILTIN, Chosen, choose
from moesim.run import Feed, Prepared
from moesim.sim import engine
from moesim.sim.compiled_machine import (
    END,
    NEVER,
    TICKETS,
    Lanes,
    deadlock,
    logged,
    new_lanes,
    totals_now,
)
from moesim.sim.engine import (
    CompiledRun,
    Machinery,
    compiled_engine,
    lanes_of,
    machine_for,
    run_range,
)
from moesim.sim.metrics import summarize
from moesim.sim.replay import Replayed
from moesim.sim.rules import Totals
from moesim.sim.simpy_machine import SimpyMachine
from moesim.traces.workload import Steps
from moesim.types import (
    COPY_IN,
    EXPERT_GPU,
    GATE,
    GPU,
    H2D,
    H2D_BACKGROUND,
    HEAD,
    MOVE,
    NONE,
    QUEUES,
    WHOLE,
    IntArray,
)
from wild import VARIANTS, Case, Wild, cases

compiles = pytest.mark.skipif(disabled(), reason="nothing compiles")


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
    kind = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3)

    def answer(name: str) -> Callable[..., int]:
        def call(result: Any, error: Any, policy: int, view: int, plan: int) -> int:
            words = (ctypes.c_int64 * seen.type.words).from_address(view)
            scalars: dict[str, Any] = {}
            for field, value in zip(View._fields, host.seen, strict=True):
                at = seen.type.offsets[field]
                if isinstance(value, np.ndarray):
                    assert words[at : at + 1 + value.ndim] == [value.ctypes.data, *value.shape]
                elif isinstance(value, int):
                    scalars[field] = words[at]
            getattr(prepared.policy, name)(host.seen._replace(**scalars), host.plan)
            return 0

        return call

    functions = [kind(answer(name)) if hasattr(prepared.policy, name) else None for name in HOOKS]
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
        assert_same_totals(left, right)
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
    for mine, theirs in zip(one.prepared.host.res, other.prepared.host.res, strict=True):
        assert np.array_equal(np.asarray(mine), np.asarray(theirs))


def test_every_policy_is_compared() -> None:
    assert {spec.partition(":")[0] for spec in VARIANTS} == set(BUILTIN)


@compiles
@pytest.mark.parametrize("policy", [Wild, *VARIANTS], ids=str)
@given(case=cases())
@settings(max_examples=100)
def test_compiled_and_simpy_give_the_same_log(policy: Any, case: Case) -> None:
    same(run_on("simpy", case, policy), run_on("compiled", case, policy))


@pytest.mark.parametrize("policy", [Wild, "dali"], ids=str)
@given(case=cases())
@settings(max_examples=50)
def test_its_source_gives_the_same_log_as_plain_python(policy: Any, case: Case) -> None:
    same(run_on("simpy", case, policy), run_on("plain", case, policy))


@compiles
@given(case=cases(), cut=st.integers(1, 3))
@settings(max_examples=30)
def test_a_compiled_run_cut_into_ranges_is_the_same_run(case: Case, cut: int) -> None:
    whole = run_on("compiled", case, "dali")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledRun, "stride", cut)
        same(whole, run_on("compiled", case, "dali"))


# The machines alone, by their verbs.

COSTS = lab.make_costs(gate=10, gpu=40, head=7, copy_ns_per_kib=320, latency=3)
RATES = lab.quiet_machine(
    "interference=[{busy: [gpu, h2d], slow: {gpu: 0.5, h2d: 0.333}}, "
    "{busy: [h2d, d2h], slow: {h2d: 0.9, d2h: 0.01}}]"
).rates()


def machines(chunk_bytes: int, jitter: int, seed: int) -> tuple[SimpyMachine, Lanes]:
    """Return both machines at time 0, without a trace."""
    offset = np.zeros((40, 2), np.int64)
    steps = Steps(offset[:, 0], *[offset] * 6)
    feed = Feed(steps, np.zeros((0, 1, 1), np.int16), None, ())
    simpy = SimpyMachine(COSTS, feed, RATES, chunk_bytes, jitter=jitter, seed=seed, record=True)
    lanes = new_lanes(COSTS, feed, RATES, chunk_bytes, jitter=jitter, seed=seed, record=True)
    return simpy, lanes


def wait(machine: Any, ticket: int, lanes: Lanes) -> Any:
    """Return what the wait without end waits for, None if it has an end."""
    try:
        machine.wait(ticket)
    except DeadlockError as error:
        return str(error)
    except RuntimeError:
        return str(deadlock(lanes))
    return None


@given(
    seed=st.integers(0, 2**32 - 1), chunk_bytes=st.sampled_from((0, 1, 100, 256)),
    jitter=st.sampled_from((0, 0, 500)), orders=st.integers(1, 60),
)  # fmt: skip
@settings(max_examples=300)
def test_any_orders_to_the_machines_have_the_same_effect(
    seed: int, chunk_bytes: int, jitter: int, orders: int
) -> None:
    """Submissions that wait for any earlier ones, in any queue, taken back and promoted at random.

    What can never run, as behind a copy that waits for it, is reported in the same words.
    """
    rng = random.Random(seed)
    simpy, lanes = machines(chunk_bytes, jitter, seed)
    verbs: list[Any] = [simpy, lanes]
    tickets = 0
    heads = 0
    for _ in range(orders):
        ticket = rng.randint(0, tickets + 1)
        match rng.randint(0, 9):
            case 0:
                done = [machine.cancel(ticket) for machine in verbs]
            case 1 | 2:
                done = [machine.promote(ticket) for machine in verbs]
            case 3:
                ns = rng.choice((0, 1, 40, 500))
                done = [machine.pause(ns) for machine in verbs]
            case 4:
                done = [wait(machine, ticket, lanes) for machine in verbs]
            case _:
                queue = rng.randrange(len(QUEUES))
                kind = COPY_IN if queue != GPU else rng.choice((HEAD, MOVE, EXPERT_GPU, GATE))
                if kind == HEAD and heads == 40:
                    kind = GATE
                heads += kind == HEAD
                amount = rng.choice((0, 1, 7, 64)) if queue == GPU else rng.choice((0, 256, 1024))
                after = [rng.choice((0, rng.randint(0, tickets))) for _ in range(3)]
                row = (queue, kind, 0, 1, NONE, amount, 0, WHOLE, 0, NONE, 0, *after)
                done = [machine.submit(*row) for machine in verbs]
                tickets += 1
        assert done[0] == done[1]
        assert [simpy.done(t) for t in range(tickets + 2)] == [
            lanes.done(t) for t in range(tickets + 2)
        ]
        assert_same_totals(simpy.totals(), totals_now(lanes))
    for mine, theirs in zip(simpy.logged(), logged(lanes), strict=True):
        assert (mine == theirs).all()


def assert_same_totals(one: Totals, other: Totals) -> None:
    assert one._replace(copied_bytes=0) == other._replace(copied_bytes=0)  # type: ignore[arg-type]
    assert (one.copied_bytes == other.copied_bytes).all()


def test_a_chunk_of_one_byte_in_a_copy_of_hours_does_not_overflow() -> None:
    """64 bits hold the work times the chunks: chunks are merged until they do."""
    for machine in machines(1, 0, 0):
        slow, urgent = [
            machine.submit(queue, COPY_IN, 0, 0, NONE, amount, 0, WHOLE, 0, NONE, 0, 0, 0, 0)
            for queue, amount in ((H2D_BACKGROUND, 1 << 36), (H2D, 1024))
        ]
        machine.wait(urgent)
        assert not machine.done(slow)


def test_a_wait_without_end_says_what_it_waits_for() -> None:
    """Ticket 2 waits for ticket 1, which is made to wait for something that never comes."""
    _, lanes = machines(0, 0, 0)
    for after in (0, 1):
        lanes.submit(H2D_BACKGROUND, COPY_IN, 0, 3, NONE, 0, 0, WHOLE, 0, NONE, 0, after, 0, 0)
    lanes.lanes[H2D, END] = NEVER
    with pytest.raises(RuntimeError):
        lanes.wait(2)
    assert str(deadlock(lanes)) == (
        "ticket 2 (copy_in, layer 0, expert 3) on queue h2d_background can never end: "
        "it waits for tickets [1]"
    )
    with pytest.raises(RuntimeError):
        lanes.wait(3)
    assert str(deadlock(lanes)) == "ticket 3 was never submitted, and cannot end"


# What goes wrong in a policy.


class Wrong(NamedTuple):
    """Runs every expert on the CPU, apart from its fault."""

    fault: int
    few: IntArray

    @classmethod
    def new(cls, setting: Setting, fault: int = 0) -> "Wrong":
        return cls(fault, np.zeros(2, np.int64))

    def place(self, setting: Setting) -> Placement:
        return lab.placement(setting)

    def dispatch(self, view: View, plan: Plan) -> None:
        for i in range(view.n_active):
            api.run_on_cpu(plan, view.active[i])
        if view.step == 1 and self.fault == FORGETS:
            plan.length[0] -= 1
        if view.step == 1 and self.fault == BEYOND:
            self.few[0] = self.few[view.n_active + 5]
        if view.step == 1 and self.fault == DIVIDES:
            self.few[0] = view.n_active // (view.step - 1)
        if view.step == 1 and self.fault == DIVIDES_ELEMENTS:
            self.few[0] = self.few[1] // self.few[0]


class Writes(NamedTuple):
    """Changes what it may only look at."""

    @classmethod
    def new(cls, setting: Setting) -> "Writes":
        return cls()

    def place(self, setting: Setting) -> Placement:
        return lab.placement(setting)

    def dispatch(self, view: View, plan: Plan) -> None:
        view.active[0] = 1 << 36


class Halves(NamedTuple):
    """Numbers of 32 bits add up differently when they are compiled."""

    table: Any

    @classmethod
    def new(cls, setting: Setting, kind: str = "float32") -> "Halves":
        table = np.zeros((3, 4), "int64" if kind == "fortran" else kind)
        return cls(np.asfortranarray(table) if kind == "fortran" else table)

    def place(self, setting: Setting) -> Placement:
        return lab.placement(setting)

    def dispatch(self, view: View, plan: Plan) -> None:
        for i in range(view.n_active):
            api.run_on_cpu(plan, view.active[i])


FORGETS, BEYOND, DIVIDES, DIVIDES_ELEMENTS = 1, 2, 3, 4


@compiles
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (FORGETS, "hook dispatch, step 1, layer 0, expert 2: an active expert was left"),
        (BEYOND, "IndexError: "),
        (DIVIDES, "ZeroDivisionError: "),
        (DIVIDES_ELEMENTS, "ZeroDivisionError: |FloatingPointError: divide by zero"),
    ],
)
def test_a_policy_that_errs_is_told_so_wherever_it_runs(fault: int, message: str) -> None:
    for machine in ("simpy", "compiled"):
        with pytest.raises(PolicyError, match=message):
            lab.run(
                Chosen("wrong", Wrong, {"fault": fault}), [[[0, 2]]] * 2,
                lab.make_costs(cpu=5, head=1), on=machine,
            )  # fmt: skip


@compiles
def test_ordinary_python_runs_on_simpy_and_is_refused_compiled() -> None:
    said: list[str] = []
    choices, costs = [[[0, 2]]] * 2, lab.make_costs(cpu=5, head=1)
    with pytest.raises(InputError, match=r"policy 'wild' does not compile: .*--machine simpy"):
        lab.run(Wild, choices, costs, on="compiled")
    prepared = lab.prepared(Chosen("wild", Wild, {}), choices, costs)
    assert machine_for(prepared, "auto", said.append) == "simpy"
    assert len(said) == 1
    assert said[0].startswith("machine simpy: policy 'wild' does not compile")


@compiles
def test_a_view_cannot_be_written_to() -> None:
    choices, costs = [[[0, 2]]] * 2, lab.make_costs(cpu=5, head=1)
    with pytest.raises(PolicyError, match="assignment destination is read-only"):
        lab.run(Writes, choices, costs)
    with pytest.raises(InputError, match="policy 'writes' does not compile: "):
        lab.run(Writes, choices, costs, on="compiled")


@compiles
def test_what_one_instance_holds_does_not_decide_for_another() -> None:
    choices, costs = [[[0, 2]]] * 2, lab.make_costs(cpu=5, head=1)
    for kind, legal in (("int64", True), ("float32", False), ("fortran", False), ("int64", True)):
        chosen = Chosen("halves", Halves, {"kind": kind})
        if legal:
            same(lab.run(chosen, choices, costs), lab.run(chosen, choices, costs, on="compiled"))
        else:
            with pytest.raises(InputError, match=r"table is an array of .*; arrays of int64"):
                lab.run(chosen, choices, costs, on="compiled")


@compiles
def test_tables_may_grow_while_others_use_the_memory() -> None:
    """Blocks that compiled code has the address of stay where they are."""
    rng = np.random.default_rng(0)
    choices = np.array([[rng.permutation(32)[:4] for _ in range(8)] for _ in range(400)])
    costs = lab.make_costs(8, attention=90, gate=10, gpu=40, head=9, copy_ns_per_kib=320)
    rubbish: list[Any] = []

    def use_memory(done: int, total: int) -> None:
        rubbish.extend(np.full(size, -1) for size in range(10, 60) for _ in range(20))

    plain = lab.run(choose("lru"), choices, costs, experts=32, slots=99)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledRun, "stride", 1)
        same(
            plain,
            lab.run(
                choose("lru"), choices, costs, experts=32, slots=99, on="compiled",
                progress=use_memory,
            ),
        )  # fmt: skip


# Threads.


@compiles
def test_threads_share_a_trace_and_run_at_the_same_time() -> None:
    """While compiled code runs, the main thread sees how far it is: the GIL is free.

    Each run is one call. Were the GIL held, only its beginning, its end and its few calls back, for
    tables that grow, could ever be seen. A busy machine may not let the main thread look; it gets
    several chances.
    """
    rng = np.random.default_rng(0)
    choices = np.array([[rng.permutation(64)[:8] for _ in range(24)] for _ in range(600)])
    costs = lab.make_costs(24, attention=90, gate=10, gpu=40, cpu=70, head=9, copy_ns_per_kib=320)

    def prepared() -> Prepared:
        return lab.prepared(choose("lru"), choices, costs, experts=64, slots=300)

    alone = moesim.sim.replay.replay(prepared(), machine="compiled")
    most_seen = 0
    for _ in range(60):
        runs = [CompiledRun(prepared(), seed=0, jitter=0, record=False) for _ in range(2)]
        steps = len(runs[0].prepared.host.steps.phase)
        threads = [threading.Thread(target=run.steps, args=(0, steps)) for run in runs]
        for thread in threads:
            thread.start()
        seen: list[set[int]] = [set(), set()]
        while any(thread.is_alive() for thread in threads):
            for run, found in zip(runs, seen, strict=True):
                found.add(int(run.lanes.state[TICKETS]))
        for thread in threads:
            thread.join()
        for run in runs:
            assert run.counts()[0] == alone.operations
            for mine, theirs in zip(run.heads(), alone.heads, strict=True):
                assert_same_totals(mine, theirs)
        most_seen = max(most_seen, *map(len, seen))
        if most_seen > 20:
            break
    assert most_seen > 20
