"""Replay a prepared run on the SimPy machine."""

import time
from collections.abc import Callable
from traceback import walk_tb
from typing import NamedTuple

import numpy as np

from moesim.errors import MoesimError, PolicyError
from moesim.host import run_steps
from moesim.log import Log
from moesim.residency import contents
from moesim.run import Prepared
from moesim.sim.simpy_machine import SimpyMachine, Totals
from moesim.state import OK, host_error
from moesim.types import IntArray, as_scalars

RANGE = 16
"""Steps between two reports of progress."""


class Replayed(NamedTuple):
    """A finished run: what the machine added up, and where the host and its tables ended."""

    prepared: Prepared
    heads: tuple[Totals, ...]
    """One per step, at the end of its HEAD."""
    drained: Totals
    """When what was still under way then had ended."""
    operations: int
    preemptions: int
    paused_ns: int
    wall_s: float
    log: Log | None


def replay(
    prepared: Prepared, *, seed: int = 0, jitter: int = 0, record: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Replayed:  # fmt: skip
    """Run every step of a prepared run, which must not have been run before.

    `jitter` stretches operations by up to so many 1024ths; `record` keeps the full log; `progress`
    is called with the steps done and the steps in all. Raises PolicyError for an illegal decision.
    """
    host = prepared.host
    initial = contents(host.res) if record else ()
    machine = SimpyMachine(
        prepared.setting.costs, prepared.feed, prepared.profile.rates(), chunk_bytes(prepared),
        jitter=jitter, seed=seed, record=record,
    )  # fmt: skip
    fast = as_scalars(host)._replace(seen=host.seen)
    machine.costs = fast.costs
    steps = len(host.steps.phase)
    started = time.perf_counter()
    for first in range(0, steps, RANGE):
        last = min(first + RANGE, steps)
        try:
            rule = run_steps(machine, prepared.policy, fast, first, last)
        except MoesimError:
            raise
        except Exception as error:
            raise policy_failure(prepared.chosen.name, error) from error
        if rule != OK:
            raise host_error(host, prepared.chosen.name)
        if progress is not None:
            progress(last, steps)
    wall_s = time.perf_counter() - started
    machine.drain()
    log = None
    if record:
        operations, segments = machine.logged()
        log = Log(
            operations=operations,
            segments=segments,
            initial=initial,
            slot_bytes=host.res.slot_bytes,
            budget_bytes=prepared.setting.budget_bytes,
            loads=loads_of(prepared),
            batch_tokens=np.diff(host.steps.offset, axis=1),
            expert_bytes=prepared.setting.costs.expert_bytes,
            kv_on_host=prepared.placement.kv_on_host,
            dense_on_host=prepared.placement.dense_on_host,
            on_disk=host.res.on_disk,
            fifo_link=prepared.placement.link == "fifo",
            chunk_bytes=chunk_bytes(prepared),
            rates=prepared.profile.rates(),
            exact=True,
        )
    return Replayed(
        prepared=prepared,
        heads=tuple(machine.heads),
        drained=machine.totals(),
        operations=machine.tickets,
        preemptions=machine.preemptions,
        paused_ns=machine.paused_ns,
        wall_s=wall_s,
        log=log,
    )


def chunk_bytes(prepared: Prepared) -> int:
    """Return the chunk size that the placement asks for, else the machine's."""
    return prepared.placement.chunk_bytes or prepared.profile.link.chunk_bytes


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
