"""What is where on the GPU: slots, what is cached, staged, arriving or waiting for a slot.

Only the functions of this module change these tables. They are written once for every machine, in
the subset that compiles: arrays, integers, free functions.
"""

from typing import NamedTuple

import numpy as np

from moesim.costs import part_bytes
from moesim.errors import PolicyError
from moesim.forecast import Forecast, launch_expert
from moesim.log import Contents
from moesim.machine import Machine, cancel, done
from moesim.policies.api import Placement, Setting
from moesim.types import (
    BITS,
    COPY_IN,
    CPU,
    DISK,
    DISK_READ,
    GPU,
    H2D,
    H2D_BACKGROUND,
    MOVE,
    NO_CAUSE,
    NONE,
    PREFETCH,
    RESIZE,
    WHOLE,
    IntArray,
)

WASTED_BYTES, DROPPED, PREFETCHED, USED, ORDER, PENDING_FIRST, PENDING_LAST, SPARE = range(8)


class Residency(NamedTuple):
    """Tables over (layers, experts), over slots, and over pools; the last pool is staging."""

    cached: IntArray
    staged: IntArray
    pending: IntArray
    """0, or the place in the pending queue plus 1."""
    cached_slot: IntArray
    staged_slot: IntArray
    cached_ticket: IntArray
    staged_ticket: IntArray
    """Arrival of the (latest) copy; 0: there since before the run."""
    cached_precision: IntArray
    staged_precision: IntArray
    cached_cause: IntArray
    staged_cause: IntArray
    """Why the copy was made; forgotten at the first use, so that later uses count as resident."""
    on_disk: IntArray
    read_ticket: IntArray
    """DISK_READ of this step; 0: not read yet."""
    slot_layer: IntArray
    slot_expert: IntArray
    slot_ticket: IntArray
    """The last operation that touches a slot; whatever fills it next waits for that."""
    slot_before: IntArray
    """What `slot_ticket` was before the copy under way: what it is again if that is cancelled.
    NONE where a MOVE fills the slot, which is not cancelled: its source waits for it."""
    slot_run: IntArray
    """1: the run of what is staged here has been submitted, the slot can be had."""
    slot_order: IntArray
    """Age of what is staged here: higher is younger."""
    slot_unused: IntArray
    """Bytes that were copied in and that no run has used."""
    slot_latest: IntArray
    """Bytes of the latest copy into a slot."""
    slot_bytes: IntArray
    slot_next: IntArray
    """Links of the free lists."""
    free_first: IntArray
    free_last: IntArray
    free_count: IntArray
    """(pools + 1,): first in, first out, so that the slot given up longest ago is filled first."""
    pool_of_layer: IntArray
    staging: IntArray
    """(staging slots,): their slot numbers; admission exchanges them."""
    spare: IntArray
    """(slots,): the first `counters[SPARE]` are in no pool and have no size."""
    queue: IntArray
    """(places, 5): pending fetches, a ring: layer, expert, precision, cause, ticket to wait for."""
    counters: IntArray
    budget_bytes: int
    has_disk: int
    fifo: int
    precision: int
    """Of the weights as stored on the host."""


def staging_pool(res: Residency) -> int:
    """Return the number of the staging pool."""
    return len(res.free_first) - 1


def free_slot(res: Residency, slot: int, pool: int) -> None:
    """Put a slot at the end of its pool's free list."""
    res.slot_layer[slot] = NONE
    res.slot_expert[slot] = NONE
    res.slot_next[slot] = NONE
    if res.free_count[pool] == 0:
        res.free_first[pool] = slot
    else:
        res.slot_next[res.free_last[pool]] = slot
    res.free_last[pool] = slot
    res.free_count[pool] += 1


def take_slot(res: Residency, pool: int) -> int:
    """Take the first free slot of a pool, or return NONE."""
    if res.free_count[pool] == 0:
        return NONE
    slot: int = res.free_first[pool]
    res.free_first[pool] = res.slot_next[slot]
    res.free_count[pool] -= 1
    return slot


def occupy(res: Residency, slot: int, layer: int, expert: int) -> None:
    """Note whose weights a slot holds, or will hold."""
    res.slot_layer[slot] = layer
    res.slot_expert[slot] = expert
    res.slot_unused[slot] = 0
    renew(res, slot)


def renew(res: Residency, slot: int) -> None:
    """Note that a staging slot's weights are wanted for a run to come, younger than all others."""
    res.slot_run[slot] = 0
    res.slot_order[slot] = res.counters[ORDER]
    res.counters[ORDER] += 1


def read_from_disk(
    machine: Machine, forecast: Forecast, res: Residency, layer: int, expert: int
) -> int:
    """Return the ticket of this step's read of an expert; 0 for one whose home is host memory."""
    if res.on_disk[layer, expert] == 0:
        return 0
    if res.read_ticket[layer, expert] == 0:
        size_bytes = part_bytes(forecast.costs, layer, res.precision, 0, WHOLE)
        res.read_ticket[layer, expert] = launch_expert(
            machine, forecast, DISK, DISK_READ, layer, expert, NONE, size_bytes, 0, WHOLE,
            res.precision, NONE, NO_CAUSE, 0, 0, 0,
        )  # fmt: skip
    ticket: int = res.read_ticket[layer, expert]
    return ticket


def copy_in(
    machine: Machine, forecast: Forecast, res: Residency, layer: int, expert: int, slot: int,
    start: int, part: int, precision: int, urgent: int, cause: int, after: int,
) -> int:  # fmt: skip
    """Submit the copy of a part into a slot, after whatever touches that slot last."""
    size_bytes = part_bytes(forecast.costs, layer, precision, start, part)
    read = read_from_disk(machine, forecast, res, layer, expert)
    before = res.slot_ticket[slot]
    queue = H2D if urgent or res.fifo else H2D_BACKGROUND
    ticket = launch_expert(
        machine, forecast, queue, COPY_IN, layer, expert, NONE,
        size_bytes, start, part, precision, slot, cause, before, read, after,
    )  # fmt: skip
    res.slot_before[slot] = before
    res.slot_ticket[slot] = ticket
    res.slot_latest[slot] = size_bytes
    res.slot_unused[slot] += size_bytes
    return ticket


def take_back(machine: Machine, res: Residency, slot: int, ticket: int) -> bool:
    """Cancel the copy into a slot if it has not started; the slot then waits as it did before."""
    if res.slot_before[slot] == NONE or done(machine, ticket) or not cancel(machine, ticket):
        return False
    res.slot_ticket[slot] = res.slot_before[slot]
    res.slot_unused[slot] -= res.slot_latest[slot]
    return True


def forget_staged(
    machine: Machine, forecast: Forecast, res: Residency, layer: int, expert: int
) -> int:
    """Let go of what is staged of an expert and return its slot, which is in no free list."""
    slot: int = res.staged_slot[layer, expert]
    if res.slot_run[slot] == 0:
        take_back(machine, res, slot, res.staged_ticket[layer, expert])
    res.counters[WASTED_BYTES] += res.slot_unused[slot]
    res.staged[layer, expert] = 0
    res.staged_slot[layer, expert] = NONE
    res.staged_ticket[layer, expert] = 0
    return slot


def forget_cached(
    machine: Machine, forecast: Forecast, res: Residency, layer: int, expert: int
) -> None:
    """Give up a cached expert, and what is staged beside a cached part of it: useless alone."""
    slot = res.cached_slot[layer, expert]
    take_back(machine, res, slot, res.cached_ticket[layer, expert])
    res.counters[WASTED_BYTES] += res.slot_unused[slot]
    if 0 < res.staged[layer, expert] < WHOLE:
        free_slot(res, forget_staged(machine, forecast, res, layer, expert), staging_pool(res))
    res.cached[layer, expert] = 0
    res.cached_slot[layer, expert] = NONE
    res.cached_ticket[layer, expert] = 0
    res.cached_cause[layer, expert] = NO_CAUSE
    free_slot(res, slot, res.pool_of_layer[layer])


def oldest_run(res: Residency) -> int:
    """Return the staging slot whose run was submitted and that was filled first, or NONE."""
    best = NONE
    for i in range(len(res.staging)):
        slot = res.staging[i]
        if (
            res.slot_layer[slot] != NONE
            and res.slot_run[slot] == 1
            and (best == NONE or res.slot_order[slot] < res.slot_order[best])
        ):
            best = slot
    return best


def youngest_unrun(res: Residency, layer: int, elsewhere: int) -> int:
    """Return the youngest staging slot that holds what has not run, of this or of other layers."""
    best = NONE
    for i in range(len(res.staging)):
        slot = res.staging[i]
        if (
            res.slot_layer[slot] != NONE
            and res.slot_run[slot] == 0
            and (res.slot_layer[slot] != layer) == (elsewhere == 1)
            and (best == NONE or res.slot_order[slot] > res.slot_order[best])
        ):
            best = slot
    return best


def wrong_guess(res: Residency, layer: int, loads: IntArray) -> int:
    """Return a staging slot that holds an inactive expert of the layer being run, or NONE."""
    for i in range(len(res.staging)):
        slot: int = res.staging[i]
        if res.slot_layer[slot] == layer and loads[res.slot_expert[slot]] == 0:
            return slot
    return NONE


BACKGROUND, URGENT, FOR_A_RUN = range(3)
"""How much a copy may take from others for a staging slot."""


def staging_slot(
    machine: Machine, forecast: Forecast, res: Residency, layer: int, loads: IntArray, might: int
) -> int:
    """Return a staging slot for a copy, or NONE.

    A free one, else that of the oldest expert whose run is submitted (the copy waits for it). An
    urgent copy goes on to the youngest fetch for another layer; one for a run of this layer, whose
    routing is known, first takes a wrong guess for it, and at last the youngest expert of this
    layer that has not run yet, which must be copied again.
    """
    slot = take_slot(res, staging_pool(res))
    if slot != NONE:
        return slot
    slot = oldest_run(res)
    if slot == NONE and might == FOR_A_RUN:
        slot = wrong_guess(res, layer, loads)
    if slot == NONE and might >= URGENT:
        slot = youngest_unrun(res, layer, 1)
    if slot == NONE and might == FOR_A_RUN:
        slot = youngest_unrun(res, layer, 0)
    if slot != NONE:
        forget_staged(machine, forecast, res, res.slot_layer[slot], res.slot_expert[slot])
    return slot


def stage(
    machine: Machine, forecast: Forecast, res: Residency, layer: int, expert: int, slot: int,
    precision: int, urgent: int, cause: int, after: int, done_part: int,
) -> None:  # fmt: skip
    """Copy into a staging slot all of an expert that is neither cached nor computed already."""
    start = done_part
    if res.cached_precision[layer, expert] == precision:
        start = max(start, res.cached[layer, expert])
    occupy(res, slot, layer, expert)
    res.staged_ticket[layer, expert] = copy_in(
        machine, forecast, res, layer, expert, slot, start, WHOLE - start, precision, urgent, cause,
        after,
    )  # fmt: skip
    res.staged[layer, expert] = WHOLE - start
    res.staged_slot[layer, expert] = slot
    res.staged_precision[layer, expert] = precision
    res.staged_cause[layer, expert] = cause
    if cause == PREFETCH:
        res.counters[PREFETCHED] += 1


def queue_pending(
    res: Residency, layer: int, expert: int, precision: int, cause: int, after: int
) -> None:
    """Let a background fetch wait for a staging slot: first come, first served."""
    at = res.counters[PENDING_LAST] % len(res.queue)
    res.queue[at, 0] = layer
    res.queue[at, 1] = expert
    res.queue[at, 2] = precision
    res.queue[at, 3] = cause
    res.queue[at, 4] = after
    res.counters[PENDING_LAST] += 1
    res.pending[layer, expert] = at + 1


def start_pending(
    machine: Machine, forecast: Forecast, res: Residency, layer: int, loads: IntArray
) -> None:
    """Submit pending fetches while there are slots."""
    while res.counters[PENDING_FIRST] < res.counters[PENDING_LAST]:
        at = res.counters[PENDING_FIRST] % len(res.queue)
        target = res.queue[at, 0]
        expert = res.queue[at, 1]
        if res.pending[target, expert] == at + 1:
            slot = staging_slot(machine, forecast, res, layer, loads, BACKGROUND)
            if slot == NONE:
                return
            res.pending[target, expert] = 0
            stage(
                machine, forecast, res, target, expert, slot, res.queue[at, 2], 0,
                res.queue[at, 3], res.queue[at, 4], 0,
            )  # fmt: skip
        res.counters[PENDING_FIRST] += 1


def drop_pending(res: Residency, layer: int, before: int, loads: IntArray, load: int) -> None:
    """Forget the layer's fetches that were pending before a place, of experts with at most `load`.

    With 0 tokens those that turned out inactive; with any number, once the layer has run, all.
    """
    for i in range(res.counters[PENDING_FIRST], before):
        at = i % len(res.queue)
        expert = res.queue[at, 1]
        if (
            res.queue[at, 0] == layer
            and loads[expert] <= load
            and res.pending[layer, expert] == at + 1
        ):
            res.pending[layer, expert] = 0
            res.counters[DROPPED] += 1


def move_in(
    machine: Machine,
    forecast: Forecast,
    res: Residency,
    layer: int,
    expert: int,
    slot: int,
    part: int,
) -> None:
    """Copy the first part of a staged expert into a cache slot, within GPU memory."""
    source = res.staged_slot[layer, expert]
    precision = res.staged_precision[layer, expert]
    ticket = launch_expert(
        machine, forecast, GPU, MOVE, layer, expert, NONE,
        part_bytes(forecast.costs, layer, precision, 0, part), 0, part, precision, slot,
        NO_CAUSE, res.slot_ticket[slot], res.staged_ticket[layer, expert], 0,
    )  # fmt: skip
    res.slot_before[slot] = NONE
    res.slot_ticket[slot] = ticket
    res.slot_ticket[source] = ticket
    forecast.slots[source] = max(forecast.slots[source], forecast.slots[slot])
    occupy(res, slot, layer, expert)
    res.slot_unused[slot] = res.slot_unused[source]
    res.slot_unused[source] = 0
    res.cached[layer, expert] = part
    res.cached_slot[layer, expert] = slot
    res.cached_ticket[layer, expert] = ticket
    res.cached_precision[layer, expert] = precision


def exchange(res: Residency, layer: int, expert: int, slot: int) -> None:
    """Make a staging slot a cache slot, and the free cache slot a staging one."""
    source = res.staged_slot[layer, expert]
    for i in range(len(res.staging)):
        if res.staging[i] == source:
            res.staging[i] = slot
    res.cached[layer, expert] = WHOLE
    res.cached_slot[layer, expert] = source
    res.cached_ticket[layer, expert] = res.staged_ticket[layer, expert]
    res.cached_precision[layer, expert] = res.staged_precision[layer, expert]
    res.staged[layer, expert] = 0
    res.staged_slot[layer, expert] = NONE
    res.staged_ticket[layer, expert] = 0
    free_slot(res, slot, staging_pool(res))


def release_layer(
    machine: Machine, forecast: Forecast, res: Residency, layer: int, before: int, combined: int
) -> None:
    """Let leave what was staged for a layer before a given age, used or not, and its disk reads,
    which were submitted before the layer's COMBINE.

    What is staged later, in the layer's own last hook, is meant for the next step.
    """
    for i in range(len(res.staging)):
        slot = res.staging[i]
        if res.slot_layer[slot] == layer and res.slot_order[slot] < before:
            forget_staged(machine, forecast, res, layer, res.slot_expert[slot])
            free_slot(res, slot, staging_pool(res))
    if res.has_disk:
        for expert in range(res.read_ticket.shape[1]):
            if res.read_ticket[layer, expert] < combined:
                res.read_ticket[layer, expert] = 0


def set_size(
    machine: Machine, forecast: Forecast, res: Residency, layer: int, slot: int, size_bytes: int
) -> None:
    """Give a slot a size, after whatever touches it last, and after all that shrank before."""
    res.slot_ticket[slot] = launch_expert(
        machine, forecast, GPU, RESIZE, layer, NONE, NONE, size_bytes, 0, WHOLE, 0, slot,
        NO_CAUSE, res.slot_ticket[slot], 0, 0,
    )  # fmt: skip
    res.slot_before[slot] = NONE
    res.slot_bytes[slot] = size_bytes


def resize_pool(
    machine: Machine, forecast: Forecast, res: Residency, layer: int, slots: int, size_bytes: int
) -> None:
    """Give up all that a layer's pool caches, and its slots, and take others from the spare ones.

    The GPU lane is in order, so that a slot grows only after all those given up before are unused.
    """
    pool = res.pool_of_layer[layer]
    for other in range(len(res.pool_of_layer)):
        if res.pool_of_layer[other] == pool:
            for expert in range(res.cached.shape[1]):
                if res.cached[other, expert] > 0:
                    forget_cached(machine, forecast, res, other, expert)
    while res.free_count[pool] > 0:
        slot = take_slot(res, pool)
        set_size(machine, forecast, res, layer, slot, 0)
        res.spare[res.counters[SPARE]] = slot
        res.counters[SPARE] += 1
    for _ in range(slots):
        res.counters[SPARE] -= 1
        slot = res.spare[res.counters[SPARE]]
        set_size(machine, forecast, res, layer, slot, size_bytes)
        free_slot(res, slot, pool)


def check_placement(placement: Placement, setting: Setting) -> None:
    """Raise PolicyError, naming field, value and what would be legal, for what cannot be placed."""
    layers, experts = setting.layers, setting.experts
    pools = len(placement.cache_slots)

    def legal(field: str, holds: object, what: str) -> None:
        if not holds:
            value = getattr(placement, field)
            if isinstance(value, np.ndarray):
                value = f"an array {value.shape} of {value.min()}..{value.max()}"
            raise PolicyError(f"place: {field}={value} must be {what}")

    shape = f"of shape ({layers}, {experts}) with parts 0..{WHOLE}"
    cached, on_disk = placement.cached, placement.on_disk
    legal("cached", cached.shape == (layers, experts), shape)
    legal("cached", cached.min() >= 0 and cached.max() <= WHOLE, shape)
    legal("cache_slots", placement.cache_slots.min() >= 0, "0 or more")
    legal("cache_slot_bytes", placement.cache_slot_bytes.shape == (pools,), f"of shape ({pools},)")
    pool_of_layer = placement.pool_of_layer
    legal("pool_of_layer", pool_of_layer.shape == (layers,), f"of shape ({layers},)")
    in_range = pool_of_layer.min() >= 0 and pool_of_layer.max() < pools
    legal("pool_of_layer", in_range, f"0..{pools - 1}")
    legal("spare_slots", placement.spare_slots >= 0, "0 or more")
    legal("staging_slots", placement.staging_slots >= 0, "0 or more")
    legal("staging_slot_bytes", placement.staging_slot_bytes >= 0, "0 or more")
    legal(
        "cached_precision", NONE <= placement.cached_precision < len(BITS), f"-1..{len(BITS) - 1}"
    )
    legal("batches", 1 <= placement.batches <= setting.sequences, f"1..{setting.sequences}")
    legal("link", placement.link in ("priority", "fifo"), "priority or fifo")
    legal("chunk_bytes", placement.chunk_bytes >= 0, "0 or more")
    reachable = placement.kv_on_host or not placement.attention_on_cpu
    legal("attention_on_cpu", reachable, "false while the keys and values are on the GPU")
    legal(
        "on_disk", on_disk is None or on_disk.shape == (layers, experts), f"({layers}, {experts})"
    )
    for guess in placement.predictions:
        on_a_processor = guess.lane in (GPU, CPU) and guess.distance >= 1 and guess.width >= 0
        legal("predictions", on_a_processor, "on lane GPU or CPU, with a distance of 1 or more")


def new_residency(placement: Placement, setting: Setting, fifo: bool) -> Residency:
    """Return the tables as the placement has them before the first step.

    Raises PolicyError for a placement that cannot work: more than the budget, more resident than
    there are slots, or arrays of the wrong shape.
    """
    layers, experts = setting.layers, setting.experts
    shape = (layers, experts)
    precision = (
        setting.precision if placement.cached_precision == NONE else placement.cached_precision
    )
    check_placement(placement, setting)
    pools = len(placement.cache_slots)
    counts = np.append(placement.cache_slots, placement.staging_slots).astype(np.int64)
    sizes = np.append(
        placement.cache_slot_bytes, placement.staging_slot_bytes or setting.expert_bytes
    ).astype(np.int64)
    total_bytes = int((counts * sizes).sum())
    if total_bytes > setting.budget_bytes:
        raise PolicyError(
            f"it needs {int(counts.sum())} slots of {total_bytes} bytes together on the GPU, and "
            f"the budget is {setting.budget_bytes} bytes"
        )
    sized = int(counts.sum())
    slots = sized + placement.spare_slots
    on_disk = np.zeros(shape, np.int64) if placement.on_disk is None else placement.on_disk
    res = Residency(
        **{name: np.zeros(shape, np.int64) for name in _TABLES},
        cached_slot=np.full(shape, NONE),
        staged_slot=np.full(shape, NONE),
        on_disk=np.ascontiguousarray(on_disk, np.int64),
        slot_layer=np.full(slots, NONE),
        slot_expert=np.full(slots, NONE),
        slot_ticket=np.zeros(slots, np.int64),
        slot_before=np.zeros(slots, np.int64),
        slot_run=np.zeros(slots, np.int64),
        slot_order=np.zeros(slots, np.int64),
        slot_unused=np.zeros(slots, np.int64),
        slot_latest=np.zeros(slots, np.int64),
        slot_bytes=np.append(np.repeat(sizes, counts), np.zeros(placement.spare_slots, np.int64)),
        slot_next=np.full(slots, NONE),
        free_first=np.full(pools + 1, NONE),
        free_last=np.full(pools + 1, NONE),
        free_count=np.zeros(pools + 1, np.int64),
        pool_of_layer=placement.pool_of_layer.astype(np.int64),
        staging=np.arange(sized - placement.staging_slots, sized),
        spare=np.append(np.arange(sized, slots), np.zeros(sized, np.int64)),
        queue=np.zeros((2 * layers * experts, 5), np.int64),
        counters=np.zeros(8, np.int64),
        budget_bytes=setting.budget_bytes,
        has_disk=int(on_disk.any()),
        fifo=int(fifo),
        precision=setting.precision,
    )
    res.counters[SPARE] = placement.spare_slots
    for slot, pool in enumerate(np.repeat(np.arange(pools + 1), counts)):
        free_slot(res, slot, int(pool))
    for layer, expert in np.argwhere(placement.cached > 0).tolist():
        slot = take_slot(res, res.pool_of_layer[layer])
        part = int(placement.cached[layer, expert])
        if slot == NONE:
            raise PolicyError(f"place: layer {layer} has more resident experts than slots")
        if part_bytes(setting.costs, layer, precision, 0, part) > res.slot_bytes[slot]:
            raise PolicyError(f"place: expert {expert} of layer {layer} does not fit its slot")
        occupy(res, int(slot), layer, expert)
        res.cached[layer, expert] = part
        res.cached_slot[layer, expert] = slot
        res.cached_precision[layer, expert] = precision
    return res


_TABLES = (
    "cached", "staged", "pending", "cached_ticket", "staged_ticket", "cached_precision",
    "staged_precision", "cached_cause", "staged_cause", "read_ticket",
)  # fmt: skip


def contents(res: Residency) -> tuple[Contents, ...]:
    """Return what is cached, as a log has it at its start."""
    return tuple(
        Contents(
            layer, expert, int(res.cached_slot[layer, expert]), int(res.cached[layer, expert]),
            int(res.cached_precision[layer, expert]),
        )
        for layer, expert in np.argwhere(np.asarray(res.cached) > 0).tolist()
    )  # fmt: skip
