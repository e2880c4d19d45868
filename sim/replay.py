"""Replay a prepared run on a simulated machine."""

import time
from collections.abc import Callable
from traceback import walk_tb
from typing import Any, NamedTuple, Protocol

import numpy as np

from moesim.errors import MoesimError, PolicyError
from moesim.host import run_steps
from moesim.log import Contents, Log
from moesim.residency import contents
from moesim.run import Prepared
from moesim.sim.rules import Totals
from moesim.sim.simpy_machine import SimpyMachine
from moesim.state import OK, host_error
from moesim.types import IntArray, as_scalars


class Replayed(NamedTuple):
    """A finished run: what the machine added up, and where the host and its tables ended."""

    prepared: Prepared
    machine: str
    heads: tuple[Totals, ...]
    """One per step, at the end of its HEAD."""
    drained: Totals
    """When what was still under way then had ended."""
    operations: int
    preemptions: int
    paused_ns: int
    wall_s: float
    log: Log | None
    jitter: int = 0
    """Operations were stretched by up to so many 1024ths."""


class Run(Protocol):
    """A run under way on one of the simulated machines."""

    stride: int
    """Steps between two reports of progress."""

    def steps(self, first: int, last: int) -> int:
        """Run steps, the last excluded, and drain after the very last; return the rule broken."""

    def heads(self) -> tuple[Totals, ...]:
        """Return the totals at the end of each step."""

    def drained(self) -> Totals:
        """Return the totals at the end of everything."""

    def counts(self) -> tuple[int, int, int]:
        """Return operations, preemptions and paused ns."""

    def logged(self) -> tuple[Any, Any]:
        """Return operations and segments as `log.Log` has them."""


class SimpyRun:
    """A run on the SimPy machine; see `Run`."""

    stride = 16

    def __init__(self, prepared: Prepared, *, seed: int, jitter: int, record: bool) -> None:
        """Make the machine."""
        self.prepared = prepared
        host = prepared.host
        self.machine = SimpyMachine(
            prepared.setting.costs, prepared.feed, prepared.profile.rates(), prepared.chunk_bytes,
            jitter=jitter, seed=seed, record=record,
        )  # fmt: skip
        self.fast = as_scalars(host)._replace(seen=host.seen)
        self.machine.costs = self.fast.costs

    def steps(self, first: int, last: int) -> int:
        """See `Run.steps`."""
        try:
            with np.errstate(divide="raise", over="raise", invalid="raise"):
                rule = run_steps(self.machine, self.prepared.policy, self.fast, first, last)
        except MoesimError:
            raise
        except Exception as error:
            raise policy_failure(self.prepared.chosen.name, error) from error
        if rule == OK and last == len(self.prepared.host.steps.phase):
            self.machine.drain()
        return rule

    def heads(self) -> tuple[Totals, ...]:
        """See `Run.heads`."""
        return tuple(self.machine.heads)

    def drained(self) -> Totals:
        """See `Run.drained`."""
        return self.machine.totals()

    def counts(self) -> tuple[int, int, int]:
        """See `Run.counts`."""
        return self.machine.tickets, self.machine.preemptions, self.machine.paused_ns

    def logged(self) -> tuple[Any, Any]:
        """See `Run.logged`."""
        return self.machine.logged()


def start(prepared: Prepared, machine: str, *, seed: int, jitter: int, record: bool) -> Run:
    """Return a run on a machine by its name, `simpy` or `compiled`."""
    if machine == "compiled":
        from moesim.sim.engine import CompiledRun

        return CompiledRun(prepared, seed=seed, jitter=jitter, record=record)
    return SimpyRun(prepared, seed=seed, jitter=jitter, record=record)


def replay(
    prepared: Prepared, *, machine: str = "simpy", seed: int = 0, jitter: int = 0,
    record: bool = False, progress: Callable[[int, int], None] | None = None,
) -> Replayed:  # fmt: skip
    """Run every step of a prepared run, which must not have been run before.

    `machine` is `simpy` or `compiled`, which give the same results to the nanosecond; the latter
    releases the GIL. `jitter` stretches operations by up to so many 1024ths; `record` keeps the
    full log; `progress` is called with the steps done and the steps in all. Raises PolicyError for
    an illegal decision, InputError for a policy that cannot be compiled.
    """
    host = prepared.host
    initial = contents(host.res) if record else ()
    slot_bytes = host.res.slot_bytes.copy()
    run = start(prepared, machine, seed=seed, jitter=jitter, record=record)
    steps = len(host.steps.phase)
    started = time.perf_counter()
    for first in range(0, steps, run.stride):
        last = min(first + run.stride, steps)
        if run.steps(first, last) != OK:
            raise host_error(host, prepared.chosen.name)
        if progress is not None:
            progress(last, steps)
    wall_s = time.perf_counter() - started
    log = None
    if record:
        log = log_of(prepared, *run.logged(), initial, slot_bytes, exact=True)
    tickets, preemptions, paused_ns = run.counts()
    return Replayed(
        prepared=prepared,
        machine=machine,
        heads=run.heads(),
        drained=run.drained(),
        operations=tickets,
        preemptions=preemptions,
        paused_ns=paused_ns,
        wall_s=wall_s,
        log=log,
        jitter=jitter,
    )


def log_of(
    prepared: Prepared, operations: Any, segments: Any, initial: tuple[Contents, ...],
    slot_bytes: IntArray, *, exact: bool,
) -> Log:  # fmt: skip
    """Return what a machine wrote down, with the rules that the run had to obey.

    `initial` and `slot_bytes` are those before the run; `exact` says that a simulation wrote it.
    """
    placement, setting = prepared.placement, prepared.setting
    return Log(
        operations=operations,
        segments=segments,
        initial=initial,
        slot_bytes=slot_bytes,
        budget_bytes=setting.budget_bytes,
        loads=loads_of(prepared),
        batch_tokens=np.diff(prepared.host.steps.offset, axis=1),
        expert_bytes=setting.costs.expert_bytes,
        kv_on_host=placement.kv_on_host,
        dense_on_host=placement.dense_on_host,
        on_disk=prepared.host.res.on_disk,
        fifo_link=placement.link == "fifo",
        chunk_bytes=prepared.chunk_bytes,
        rates=prepared.profile.rates(),
        exact=exact,
        attention_on_cpu=placement.attention_on_cpu,
        sync_batches=placement.sync_batches,
    )


def policy_failure(name: str, error: Exception) -> PolicyError:
    """Return an error of a policy's own code as one line that says where it happened."""
    frame = error.__traceback__
    if not any(f.f_code.co_name == "call_hook" for f, _ in walk_tb(frame)):
        raise error  # not the policy's fault
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = f" ({frame.tb_frame.f_code.co_filename}:{frame.tb_lineno})" if frame else ""
    return PolicyError(f"policy '{name}': {type(error).__name__}: {error}{where}")


def loads_of(prepared: Prepared) -> IntArray:
    """Count the routed tokens (steps, layers, batches, experts) from the trace itself."""
    steps, chosen = prepared.feed.steps, prepared.feed.chosen
    layers, experts = prepared.setting.layers, prepared.setting.experts
    count, batches = steps.context.shape
    loads = np.zeros((count, layers, batches, experts), np.int64)
    for step in range(count):
        for batch in range(batches):
            ids = chosen[steps.offset[step, batch] : steps.offset[step, batch + 1]]
            for layer in range(layers):
                known = ids[:, layer][ids[:, layer] >= 0]
                loads[step, layer, batch] = np.bincount(known, minlength=experts)
    return loads
