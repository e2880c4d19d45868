"""The host's own reckoning: what has been submitted takes what the cost tables say, at full speed.

Policies see these estimates and never the machine's clock, so that the same policy takes the same
decisions on every machine, also where a real link is slower than the table.
"""

from typing import NamedTuple

import numpy as np

from moesim.costs import Costs, duration_ns
from moesim.machine import Machine, pause, submit, wait
from moesim.types import (
    H2D,
    H2D_BACKGROUND,
    NO_CAUSE,
    NONE,
    PREFILL,
    QUEUES,
    WHOLE,
    IntArray,
)

RING = 1 << 14
"""Ends of so many operations are remembered; older ones count as over."""

NOW, PHASE = 0, 1


class Forecast(NamedTuple):
    """An estimated timeline beside the real one."""

    costs: Costs
    launch_ns: int
    sync_ns: int
    clock: IntArray
    """(2,): the estimated present, and the phase of the step."""
    free: IntArray
    """(queues,): when the work submitted to each queue will be over."""
    ends: IntArray
    """(RING, 2): ticket and its estimated end."""
    slots: IntArray
    """(slots,): when all that touches each slot is over, as if no copy were ever taken back."""


def new_forecast(costs: Costs, launch_ns: int, sync_ns: int, slots: int) -> Forecast:
    """Return the reckoning of a host that has not started."""
    return Forecast(
        costs=costs,
        launch_ns=launch_ns,
        sync_ns=sync_ns,
        clock=np.array([0, PREFILL]),
        free=np.zeros(len(QUEUES), np.int64),
        ends=np.zeros((RING, 2), np.int64),
        slots=np.zeros(slots, np.int64),
    )


def end_ns(forecast: Forecast, ticket: int) -> int:
    """Return when an operation is expected to end; 0 for one long over."""
    at = ticket % RING
    end: int = forecast.ends[at, 1]
    return end if forecast.ends[at, 0] == ticket else 0


def left_ns(forecast: Forecast, ticket: int) -> int:
    """Return how long an operation is still expected to take, waiting included."""
    left: int = end_ns(forecast, ticket) - forecast.clock[NOW]
    return max(0, left)


def busy(machine: Machine, forecast: Forecast, ns: int) -> None:
    """Charge the host's own time."""
    if ns > 0:
        pause(machine, ns)
        forecast.clock[NOW] += ns


def launch(
    machine: Machine, forecast: Forecast, queue: int, kind: int, layer: int, batch: int,
    amount: int, context: int, after0: int, after1: int, after2: int,
) -> int:  # fmt: skip
    """Submit an operation that is about no single expert; see `launch_expert`."""
    return launch_expert(
        machine, forecast, queue, kind, layer, NONE, batch, amount, context, WHOLE, 0, NONE,
        NO_CAUSE, after0, after1, after2,
    )  # fmt: skip


def launch_expert(
    machine: Machine, forecast: Forecast, queue: int, kind: int, layer: int, expert: int,
    batch: int, amount: int, context: int, part: int, precision: int, slot: int, cause: int,
    after0: int, after1: int, after2: int,
) -> int:  # fmt: skip
    """Submit an operation (`Machine.submit`), charge the launch and note its expected end."""
    busy(machine, forecast, forecast.launch_ns)
    ticket = submit(
        machine, queue, kind, layer, expert, batch, amount, context, part, precision, slot, cause,
        after0, after1, after2,
    )  # fmt: skip
    phase = forecast.clock[PHASE]
    ns = duration_ns(forecast.costs, phase, kind, layer, amount, context, part, precision)
    start = forecast.free[queue]
    for moment in (
        forecast.clock[NOW],
        end_ns(forecast, after0) if after0 > 0 else 0,
        end_ns(forecast, after1) if after1 > 0 else 0,
        end_ns(forecast, after2) if after2 > 0 else 0,
        forecast.slots[slot] if slot != NONE else 0,
        forecast.free[H2D] if queue == H2D_BACKGROUND else 0,
    ):
        if moment > start:  # noqa: PLR1730  runs five times for every operation; max is slower
            start = moment
    if queue == H2D and forecast.free[H2D_BACKGROUND] > start:
        forecast.free[H2D_BACKGROUND] += ns
    forecast.free[queue] = start + ns
    if slot != NONE:
        forecast.slots[slot] = start + ns
    at = ticket % RING
    forecast.ends[at, 0] = ticket
    forecast.ends[at, 1] = start + ns
    return ticket


def await_ticket(machine: Machine, forecast: Forecast, ticket: int) -> None:
    """Block the host until an operation is done, and charge the synchronisation."""
    wait(machine, ticket)
    forecast.clock[NOW] = max(forecast.clock[NOW], end_ns(forecast, ticket))
    busy(machine, forecast, forecast.sync_ns)
