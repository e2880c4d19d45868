"""Carry out what a policy ordered, and refuse what it may not order."""

from moesim.costs import part_bytes
from moesim.forecast import PHASE, await_ticket, launch, launch_expert
from moesim.machine import Machine, promote
from moesim.policies.api import (
    ADMIT,
    AFTER_LAYER,
    BEFORE_ATTENTION,
    BEFORE_GATE,
    BOTH,
    CACHE,
    CANCEL,
    DISPATCH,
    EVICT,
    FETCH,
    FIRST,
    GATE_AFTER,
    PROMOTE,
    RESIZE,
    REST,
    RUN_ON_CPU,
    RUN_ON_GPU,
    RUN_SHARED,
    STAGING,
)
from moesim.residency import (
    BACKGROUND,
    FOR_A_RUN,
    PENDING_FIRST,
    PENDING_LAST,
    PREFETCHED,
    SPARE,
    URGENT,
    USED,
    copy_in,
    exchange,
    forget_cached,
    forget_staged,
    free_slot,
    move_in,
    occupy,
    queue_pending,
    read_from_disk,
    renew,
    resize_pool,
    stage,
    staging_pool,
    staging_slot,
    start_pending,
    take_slot,
)
from moesim.state import (
    ACTIVE,
    ATTENTION_1,
    BAD_HOOK,
    BAD_PART,
    BAD_PRECISION,
    BAD_SLOTS,
    BAD_STEP,
    COMPUTED,
    COMPUTED_DEFERRED,
    EVICTS_ACTIVE,
    FORGOTTEN,
    FULL_PLAN,
    GATE_AFTER_1,
    GATE_AFTER_2,
    GATE_AFTER_3,
    GATED,
    GROWS_PRECISION,
    INACTIVE,
    LAST_DEFERS,
    NO_SLOT,
    NO_STAGING,
    NOT_CACHED,
    NOT_NOW,
    NOT_STAGED,
    NOTHING_FIRST,
    OK,
    OVER_BUDGET,
    RESIZES_LATE,
    SENT,
    SHARED_TWICE,
    STAGES_PART,
    TOKENS,
    TOO_BIG,
    TOO_MANY_GATES,
    TOO_MANY_PENDING,
    TWICE,
    UNKNOWN,
    Host,
    fail,
)
from moesim.types import (
    CPU,
    D2H,
    DEMAND,
    EXPERT_CPU,
    EXPERT_GPU,
    FETCHED,
    GPU,
    NO_CAUSE,
    NONE,
    ON_CPU,
    PREFETCH,
    SEND,
    SHARED,
    SWAP,
    WHOLE,
)


def carry_out(machine: Machine, host: Host, hook: int, step: int, layer: int) -> int:
    """Carry out the commands of one hook, strictly in order; stop at the first illegal one."""
    s = host.state
    s[BAD_HOOK] = hook
    s[BAD_STEP] = step
    rows = host.plan.rows
    n = host.plan.length[0]
    if n > len(rows):
        return fail(host, FULL_PLAN, layer, NONE)
    shared = 0
    for i in range(n):
        if rows[i, 0] == RUN_SHARED:
            shared += 1
    if shared > (1 if hook == DISPATCH else 0):
        return fail(host, SHARED_TWICE, layer, NONE)
    if hook == DISPATCH and shared == 0:
        run_shared(machine, host, layer)
    for i in range(n):
        if rows[i, 0] == RUN_SHARED:
            run_shared(machine, host, layer)
            continue
        about_this = rows[i, 0] in (RUN_ON_GPU, RUN_ON_CPU, GATE_AFTER)
        target = layer if about_this else rows[i, 1] % host.layers
        expert = rows[i, 2]
        rule = UNKNOWN
        if (about_this or 0 <= rows[i, 1] < 2 * host.layers) and 0 <= expert < host.experts:
            rule = carry_out_one(machine, host, hook, layer, target, i)
        if rule != OK:
            return fail(host, rule, target, expert)
    if hook == DISPATCH:
        for i in range(s[ACTIVE]):
            if host.ran[host.active[i]] != WHOLE:
                return fail(host, FORGOTTEN, layer, host.active[i])
    return OK


def carry_out_one(  # noqa: PLR0911  one answer per command
    machine: Machine, host: Host, hook: int, layer: int, target: int, at: int
) -> int:
    """Carry out row `at` of the plan; return the rule that it breaks, or OK."""
    rows = host.plan.rows
    code = rows[at, 0]
    expert = rows[at, 2]
    if code == RUN_ON_GPU:
        return run_on_gpu(machine, host, hook, layer, expert, rows[at, 3])
    if code == RUN_ON_CPU:
        return run_on_cpu(machine, host, hook, layer, expert, rows[at, 3])
    if code == FETCH:
        return fetch(
            machine, host, hook, layer, target, expert, rows[at, 3], rows[at, 4], rows[at, 5],
            rows[at, 6], rows[at, 7],
        )  # fmt: skip
    if code == EVICT:
        return evict(machine, host, layer, target, expert)
    if code == ADMIT:
        return admit(machine, host, target, expert, rows[at, 3])
    if code == CANCEL:
        return cancel(machine, host, target, expert)
    if code == PROMOTE:
        if host.res.staged[target, expert] > 0:
            promote(machine, host.res.staged_ticket[target, expert])
        if host.res.cached[target, expert] > 0:
            promote(machine, host.res.cached_ticket[target, expert])
        return OK
    if code == GATE_AFTER:
        return gate_after(host, hook, layer, expert)
    if code == RESIZE:
        return resize(machine, host, hook, layer, target, rows[at, 3], rows[at, 4])
    read_from_disk(machine, host.forecast, host.res, target, expert)
    return OK


def run_shared(machine: Machine, host: Host, layer: int) -> None:
    """Submit the shared experts, if the model has any."""
    if host.has_shared:
        launch(machine, host.forecast, GPU, SHARED, layer, NONE, host.state[TOKENS], 0, 0, 0, 0)


def runnable(host: Host, hook: int, expert: int) -> int:
    """Return the rule against running an expert now, or OK."""
    if hook != DISPATCH:
        return NOT_NOW
    if host.loads[expert] == 0:
        return INACTIVE
    if host.ran[expert] == WHOLE:
        return TWICE
    return OK


def count_outcome(host: Host, layer: int, expert: int, outcome: int) -> None:
    """Count an activation, once by expert and once for each of its tokens."""
    phase = host.forecast.clock[PHASE]
    host.counts[layer, phase, outcome, 0] += 1
    host.counts[layer, phase, outcome, 1] += host.loads[expert]


def launch_piece(
    machine: Machine, host: Host, layer: int, expert: int, slot: int, start: int, part: int,
    precision: int, arrival: int,
) -> None:  # fmt: skip
    """Submit one piece of an expert on the GPU, which reads one slot; or one piece per batch."""
    first, last = (0, host.batches) if host.gemm_per_batch else (NONE, 0)
    for batch in range(first, last):
        load = host.loads[expert] if batch == NONE else host.loads_by_batch[batch, expert]
        if load > 0:
            host.res.slot_unused[slot] = 0
            host.res.slot_ticket[slot] = launch_expert(
                machine, host.forecast, GPU, EXPERT_GPU, layer, expert, batch, load, start, part,
                precision, slot, NO_CAUSE, arrival, 0, 0,
            )  # fmt: skip
    host.ran[expert] += part


def run_on_gpu(machine: Machine, host: Host, hook: int, layer: int, expert: int, piece: int) -> int:
    """Run an expert, or a piece of it, on the GPU; copy in on demand what is missing."""
    rule = runnable(host, hook, expert)
    if rule != OK:
        return rule
    res = host.res
    cached = res.cached[layer, expert]
    if piece == BOTH and cached < WHOLE and res.staged[layer, expert] == WHOLE:
        cached = 0
    start = host.ran[expert]
    if piece not in (BOTH, FIRST, REST):
        return BAD_PART
    if (piece == FIRST and start >= cached) or (piece == REST and start == 0 and cached > 0):
        return NOTHING_FIRST
    if start < cached:
        cause = res.cached_cause[layer, expert]
        if cause == DEMAND:
            host.outcome[expert] = FETCHED
        elif cause == PREFETCH:
            res.counters[USED] += 1
        res.cached_cause[layer, expert] = NO_CAUSE
        launch_piece(
            machine, host, layer, expert, res.cached_slot[layer, expert], start, cached - start,
            res.cached_precision[layer, expert], res.cached_ticket[layer, expert],
        )  # fmt: skip
    if piece != FIRST and host.ran[expert] < WHOLE:
        rule = run_rest(machine, host, layer, expert)
    if host.ran[expert] == WHOLE:
        count_outcome(host, layer, expert, host.outcome[expert])
    return rule


def run_rest(machine: Machine, host: Host, layer: int, expert: int) -> int:
    """Run what is left of an expert from its staging slot, where it is copied first if missing."""
    res = host.res
    start = host.ran[expert]
    if res.staged[layer, expert] < WHOLE - start:
        host.outcome[expert] = FETCHED
        res.pending[layer, expert] = 0
        if res.staged[layer, expert] > 0:
            slot = forget_staged(machine, host.forecast, res, layer, expert)
            free_slot(res, slot, staging_pool(res))
        precision = res.cached_precision[layer, expert] if start > 0 else res.precision
        slot = staging_slot(machine, host.forecast, res, layer, host.loads, FOR_A_RUN)
        if slot == NONE:
            return NO_STAGING
        if part_bytes(host.costs, layer, precision, start, WHOLE - start) > res.slot_bytes[slot]:
            return TOO_BIG
        stage(machine, host.forecast, res, layer, expert, slot, precision, 1, DEMAND, 0, start)
    elif res.staged_cause[layer, expert] == DEMAND:
        host.outcome[expert] = FETCHED
    elif res.staged_cause[layer, expert] == PREFETCH:
        res.counters[USED] += 1
    slot = res.staged_slot[layer, expert]
    launch_piece(
        machine, host, layer, expert, slot, start, WHOLE - start,
        res.staged_precision[layer, expert], res.staged_ticket[layer, expert],
    )  # fmt: skip
    res.slot_run[slot] = 1
    start_pending(machine, host.forecast, res, layer, host.loads)
    return OK


def send(machine: Machine, host: Host, layer: int) -> None:
    """Copy the layer's activations to the host, once."""
    s = host.state
    if s[SENT] == 0:
        size_bytes = host.first_token[host.batches] * host.costs.token_bytes
        s[SENT] = launch(
            machine, host.forecast, D2H, SEND, layer, NONE, size_bytes, 0, s[ATTENTION_1], 0, 0
        )


def run_on_cpu(machine: Machine, host: Host, hook: int, layer: int, expert: int, defer: int) -> int:
    """Run an expert on the CPU, after the layer's activations were sent there."""
    rule = runnable(host, hook, expert)
    if rule != OK:
        return rule
    if host.ran[expert] > 0:
        return TWICE
    if defer and layer == host.layers - 1:
        return LAST_DEFERS
    s = host.state
    send(machine, host, layer)
    deferred = 1 if defer else 0
    ticket = launch_expert(
        machine, host.forecast, CPU, EXPERT_CPU, layer, expert, NONE, host.loads[expert], deferred,
        WHOLE, host.res.precision, NONE, NO_CAUSE, s[SENT],
        read_from_disk(machine, host.forecast, host.res, layer, expert), 0,
    )  # fmt: skip
    s[COMPUTED_DEFERRED if deferred else COMPUTED] = ticket
    host.computed[expert] = ticket
    host.ran[expert] = WHOLE
    count_outcome(host, layer, expert, ON_CPU)
    if host.host_computes:
        await_ticket(machine, host.forecast, ticket)
    return OK


def needed_now(host: Host, layer: int, target: int, expert: int) -> bool:
    """Say whether an expert is active in this layer step and its run is not ordered yet."""
    return target == layer and host.loads[expert] > 0 and host.ran[expert] < WHOLE


def fetch(
    machine: Machine, host: Host, hook: int, layer: int, target: int, expert: int, part: int,
    precision: int, into: int, urgent: int, after_compute: int,
) -> int:  # fmt: skip
    """Copy to the GPU what is missing of an expert."""
    if not 1 <= part <= WHOLE or into not in (CACHE, STAGING):
        return BAD_PART
    if precision == NONE:
        precision = host.res.precision
    if not 0 <= precision < host.costs.expert_bytes.shape[1]:
        return BAD_PRECISION
    cause = PREFETCH
    if needed_now(host, layer, target, expert):
        cause = DEMAND
    elif target == layer and hook in (DISPATCH, AFTER_LAYER):
        cause = SWAP
    after = host.computed[expert] if after_compute and target == layer else 0
    if into == CACHE:
        return fetch_into_cache(
            machine, host, target, expert, part, precision, urgent, cause, after
        )
    if part != WHOLE:
        return STAGES_PART
    return fetch_into_staging(machine, host, layer, target, expert, precision, urgent, cause, after)


def fetch_into_cache(
    machine: Machine, host: Host, target: int, expert: int, part: int, precision: int, urgent: int,
    cause: int, after: int,
) -> int:  # fmt: skip
    """Fill a free slot of the layer's cache, or let a cached part grow where it is."""
    res = host.res
    cached = res.cached[target, expert]
    if cached >= part:
        return OK
    pool = res.pool_of_layer[target]
    if cached > 0 and res.cached_precision[target, expert] != precision:
        return GROWS_PRECISION
    if cached == 0 and res.free_count[pool] == 0:
        return NO_SLOT
    slot = res.cached_slot[target, expert] if cached > 0 else res.free_first[pool]
    if part_bytes(host.costs, target, precision, 0, part) > res.slot_bytes[slot]:
        return TOO_BIG
    if cached == 0:
        take_slot(res, pool)
        occupy(res, slot, target, expert)
    res.pending[target, expert] = 0
    if cause == PREFETCH and (cached == 0 or res.cached_cause[target, expert] != PREFETCH):
        res.counters[PREFETCHED] += 1
    res.cached[target, expert] = part
    res.cached_slot[target, expert] = slot
    res.cached_precision[target, expert] = precision
    res.cached_cause[target, expert] = cause
    res.cached_ticket[target, expert] = copy_in(
        machine, host.forecast, res, target, expert, slot, cached, part - cached, precision, urgent,
        cause, after,
    )  # fmt: skip
    return OK


def fetch_into_staging(
    machine: Machine, host: Host, layer: int, target: int, expert: int, precision: int, urgent: int,
    cause: int, after: int,
) -> int:  # fmt: skip
    """Copy the rest of an expert into a staging slot, or let it wait for one."""
    res = host.res
    if res.staged[target, expert] > 0 and cause == SWAP:
        renew(res, res.staged_slot[target, expert])
    if res.cached[target, expert] == WHOLE or res.staged[target, expert] > 0:
        return OK
    if len(res.staging) == 0:
        return NO_STAGING
    start = res.cached[target, expert]
    if res.cached_precision[target, expert] != precision:
        start = 0
    size_bytes = part_bytes(host.costs, target, precision, start, WHOLE - start)
    if size_bytes > res.slot_bytes[res.staging[0]]:
        return TOO_BIG
    slot = NONE
    if urgent or res.counters[PENDING_FIRST] == res.counters[PENDING_LAST]:
        might = URGENT if urgent else BACKGROUND
        slot = staging_slot(machine, host.forecast, res, layer, host.loads, might)
    if slot != NONE:
        res.pending[target, expert] = 0
        stage(machine, host.forecast, res, target, expert, slot, precision, urgent, cause, after, 0)
        return OK
    if res.pending[target, expert] == 0:
        if res.counters[PENDING_LAST] - res.counters[PENDING_FIRST] == len(res.queue):
            return TOO_MANY_PENDING
        queue_pending(res, target, expert, precision, cause, after)
        start_pending(machine, host.forecast, res, layer, host.loads)
    return OK


def admit(machine: Machine, host: Host, target: int, expert: int, part: int) -> int:
    """Make a staged expert cached, by exchanging slots or by a MOVE within GPU memory."""
    res = host.res
    if not 1 <= part <= WHOLE:
        return BAD_PART
    if res.staged[target, expert] != WHOLE or res.cached[target, expert] > 0:
        return NOT_STAGED
    pool = res.pool_of_layer[target]
    if res.free_count[pool] == 0:
        return NO_SLOT
    slot = res.free_first[pool]
    precision = res.staged_precision[target, expert]
    if part_bytes(host.costs, target, precision, 0, part) > res.slot_bytes[slot]:
        return TOO_BIG
    take_slot(res, pool)
    source = res.staged_slot[target, expert]
    res.cached_cause[target, expert] = NO_CAUSE
    if res.slot_run[source] == 0:
        res.cached_cause[target, expert] = res.staged_cause[target, expert]
    if part == WHOLE and res.slot_bytes[slot] == res.slot_bytes[source]:
        exchange(res, target, expert, slot)
        start_pending(machine, host.forecast, res, target, host.loads)
    else:
        move_in(machine, host.forecast, res, target, expert, slot, part)
    return OK


def evict(machine: Machine, host: Host, layer: int, target: int, expert: int) -> int:
    """Give up a cached expert."""
    if host.res.cached[target, expert] == 0:
        return NOT_CACHED
    if needed_now(host, layer, target, expert):
        return EVICTS_ACTIVE
    forget_cached(machine, host.forecast, host.res, target, expert)
    return OK


def cancel(machine: Machine, host: Host, target: int, expert: int) -> int:
    """Give up a fetch into staging whose expert has not run."""
    res = host.res
    if res.pending[target, expert] > 0:
        res.pending[target, expert] = 0
    elif res.staged[target, expert] > 0:
        slot = res.staged_slot[target, expert]
        if res.slot_run[slot] == 0:
            forget_staged(machine, host.forecast, res, target, expert)
            free_slot(res, slot, staging_pool(res))
            start_pending(machine, host.forecast, res, target, host.loads)
    return OK


def gate_after(host: Host, hook: int, layer: int, expert: int) -> int:
    """Let this layer's gates wait for an expert on its way."""
    if hook not in (BEFORE_ATTENTION, BEFORE_GATE):
        return GATED
    if host.res.staged[layer, expert] == 0 and host.res.cached[layer, expert] == 0:
        return TOO_MANY_GATES
    for place in (GATE_AFTER_1, GATE_AFTER_2, GATE_AFTER_3):
        if place == GATE_AFTER_3 and host.attention_on_cpu:
            break
        if host.state[place] in (0, expert + 1):
            host.state[place] = expert + 1
            return OK
    return TOO_MANY_GATES


def resize(
    machine: Machine, host: Host, hook: int, layer: int, target: int, slots: int, slot_bytes: int
) -> int:
    """Give a layer's pool other slots, between two steps."""
    if hook != BEFORE_ATTENTION or layer != 0:
        return RESIZES_LATE
    res = host.res
    pool = res.pool_of_layer[target]
    total_bytes = slots * slot_bytes
    held = 0
    for slot in range(len(res.slot_bytes)):
        total_bytes += res.slot_bytes[slot]
    for other in range(host.layers):
        if res.pool_of_layer[other] == pool:
            for expert in range(host.experts):
                if res.cached[other, expert] > 0:
                    held += 1
                    total_bytes -= res.slot_bytes[res.cached_slot[other, expert]]
    slot = res.free_first[pool]
    for _ in range(res.free_count[pool]):
        held += 1
        total_bytes -= res.slot_bytes[slot]
        slot = res.slot_next[slot]
    if slots < 0 or slot_bytes < 0 or slots > held + res.counters[SPARE]:
        return BAD_SLOTS
    if slot_bytes > res.budget_bytes or total_bytes > res.budget_bytes:
        return OVER_BUDGET
    resize_pool(machine, host.forecast, res, target, slots, slot_bytes)
    return OK
