"""The host program: walks a forward pass layer by layer and asks the policy what to do.

Written once for every machine. It knows a machine by the verbs of `moesim.machine` only, keeps all
state in arrays, and stays in the subset that compiles. A command that cannot be carried out leaves
a rule's number in the state, which `state.host_error` turns into a PolicyError.

One layer step: copies that the first attention needs; hook before_attention; attention of each
batch; guesses before the gate and hook before_gate; the gates, whose choice the host waits for
batch by batch (hook routed); guesses after the gate; hook dispatch, which runs every active expert;
returns, combine; hook after_layer.
"""

from typing import Any

from moesim.commands import carry_out, send
from moesim.costs import duration_ns
from moesim.forecast import NOW, PHASE, await_ticket, busy, end_ns, launch
from moesim.machine import Machine, begin, done, predict, route, wait
from moesim.policies.api import (
    AFTER_LAYER,
    BEFORE_ATTENTION,
    BEFORE_GATE,
    DISPATCH,
    ROUTED,
    Plan,
    View,
)
from moesim.residency import (
    ORDER,
    PENDING_LAST,
    drop_pending,
    oldest_run,
    release_layer,
    staging_pool,
    start_pending,
)
from moesim.state import (
    ACTIVE,
    ATTENTION_1,
    ATTENTION_2,
    ATTENTION_NS,
    COMBINED,
    COMPUTED,
    COMPUTED_DEFERRED,
    DEFERRED,
    DENSE_1,
    DENSE_2,
    EXPERT_NS,
    GATE_AFTER_1,
    GATE_AFTER_2,
    GATE_AFTER_3,
    GATE_NS,
    OK,
    SENT,
    SETTLED,
    TOKENS,
    Host,
)
from moesim.types import (
    ARRIVED,
    ATTENTION,
    ATTENTION_CPU,
    COMBINE,
    CPU,
    D2H,
    DECODE,
    DENSE_IN,
    FETCHED,
    GATE,
    GPU,
    H2D,
    HEAD,
    KV_IN,
    KV_OUT,
    LATE,
    NONE,
    PREDICT,
    PREFETCH,
    RESIDENT,
    RETURN,
    SEND,
    WHOLE,
)


def run_steps(machine: Machine, policy: Any, host: Host, first: int, last: int) -> int:
    """Run steps `first` to `last`, the last one excluded; return the rule broken, or OK.

    All state is in the arrays of `host` and in the machine, so that a run may be cut into ranges of
    steps anywhere without changing a result.
    """
    for step in range(first, last):
        start_step(machine, host, step)
        for layer in range(host.layers):
            rule = run_layer(machine, policy, host, step, layer)
            if rule != OK:
                return rule
        sequences = 0
        for batch in range(host.batches):
            sequences += host.steps.sequences[step, batch]
        combined = host.state[COMBINED]
        head = launch(machine, host.forecast, GPU, HEAD, NONE, NONE, sequences, 0, combined, 0, 0)
        await_ticket(machine, host.forecast, head)
    return OK


def start_step(machine: Machine, host: Host, step: int) -> None:
    """Begin a forward pass: where each batch's tokens are, and how long a layer would take."""
    costs = host.costs
    phase = host.steps.phase[step]
    begin(machine, step, phase)
    host.forecast.clock[PHASE] = phase
    attention_ns = 0
    gate_ns = 0
    on_cpu = attends_on_cpu(host, step)
    for batch in range(host.batches):
        tokens = host.steps.offset[step, batch + 1] - host.steps.offset[step, batch]
        host.first_token[batch + 1] = host.first_token[batch] + tokens
        context = host.steps.context[step, batch]
        # The last layer stands for all: others may have layers without experts before them.
        attention_ns += duration_ns(
            costs, phase, ATTENTION, host.layers - 1, tokens, 0 if on_cpu else context, WHOLE, 0
        )
        if on_cpu:
            attention_ns += duration_ns(
                costs, phase, ATTENTION_CPU, host.layers - 1, tokens, context, WHOLE, 0
            )
        gate_ns += costs.gate_ns[tokens]
    tokens = host.first_token[host.batches]
    routed = tokens * host.top_k
    experts = min(host.experts, routed)
    load = (routed + experts - 1) // experts
    experts_ns = experts * costs.expert_gpu_ns[host.res.precision, load]
    host.state[ATTENTION_NS] = attention_ns
    host.state[GATE_NS] = gate_ns
    host.state[EXPERT_NS] = experts_ns + costs.shared_ns[tokens] + costs.combine_ns[tokens]


def run_layer(machine: Machine, policy: Any, host: Host, step: int, layer: int) -> int:
    """Walk one layer step; return the rule that the policy broke, or OK."""
    res = host.res
    clear_layer(host)
    busy(machine, host.forecast, host.per_layer_ns)
    dense = load_dense(machine, host, layer)
    kv = load_kv(machine, host, step, layer, 0)
    if host.sync_batches:
        settle(machine, host, host.state[COMBINED])
    rule = ask(machine, policy, host, BEFORE_ATTENTION, step, layer, NONE)
    if rule != OK:
        return rule
    attend(machine, host, step, layer, dense, kv)
    guess(machine, host, step, layer, 0)
    rule = ask(machine, policy, host, BEFORE_GATE, step, layer, NONE)
    if rule != OK:
        return rule
    rule = pass_gates(machine, policy, host, step, layer)
    if rule != OK:
        return rule
    judge(machine, host, layer)
    guess(machine, host, step, layer, 1)
    drop_pending(res, layer, res.counters[PENDING_LAST], host.loads, 0)
    rule = ask(machine, policy, host, DISPATCH, step, layer, NONE)
    if rule != OK:
        return rule
    combine(machine, host, layer)
    before = res.counters[ORDER]
    pending = res.counters[PENDING_LAST]
    rule = ask(machine, policy, host, AFTER_LAYER, step, layer, NONE)
    if rule != OK:
        return rule
    release_layer(machine, host.forecast, res, layer, before, host.state[COMBINED])
    drop_pending(res, layer, pending, host.loads, host.state[TOKENS])
    start_pending(machine, host.forecast, res, layer, host.loads)
    return OK


def clear_layer(host: Host) -> None:
    """Forget the last layer step's routing."""
    s = host.state
    for i in range(s[ACTIVE]):
        expert = host.active[i]
        host.loads[expert] = 0
        host.scores[expert] = 0.0
        host.ran[expert] = 0
        host.computed[expert] = 0
        host.gpu_ns[expert] = 0
        host.cpu_ns[expert] = 0
        for batch in range(host.batches):
            host.loads_by_batch[batch, expert] = 0
    for p in range(len(host.predictions)):
        count_guessed(host, p, -1)
        host.predicted_tokens[p] = 0
    s[TOKENS] = 0
    s[ACTIVE] = 0
    s[SENT] = 0
    s[COMPUTED] = 0
    s[COMPUTED_DEFERRED] = 0
    s[GATE_AFTER_1] = 0
    s[GATE_AFTER_2] = 0
    s[GATE_AFTER_3] = 0


def ask(
    machine: Machine, policy: Any, host: Host, hook: int, step: int, layer: int, batch: int
) -> int:
    """Let the policy decide at a hook, if it has it, and carry out its commands."""
    if host.hooks & (1 << hook) == 0:
        return OK
    s = host.state
    res = host.res
    seen = host.seen
    free_slots = res.free_count[staging_pool(res)] + (0 if oldest_run(res) == NONE else 1)
    view = View(
        layer, step, host.steps.phase[step], 1 if step == len(host.steps.phase) - 1 else 0,
        res.precision, host.batches, batch, s[TOKENS], s[ACTIVE], free_slots,
        window_ns(host, hook), seen.ids, seen.weights, seen.active, seen.loads,
        seen.loads_by_batch, seen.scores, seen.cached, seen.staged, seen.pending,
        seen.cached_ticket, seen.staged_ticket, seen.gpu_ns, seen.cpu_ns, seen.predicted_tokens,
        seen.predicted_ids, seen.predicted_scores, seen.predicted_loads, seen.costs, seen.forecast,
    )  # fmt: skip
    host.plan.length[0] = 0
    call_hook(policy, hook, view, host.plan)
    if hook == DISPATCH:
        busy(machine, host.forecast, host.decision_ns)
    return carry_out(machine, host, hook, step, layer)


def call_hook(policy: Any, hook: int, view: View, plan: Plan) -> None:
    """Call one hook of the policy."""
    if hook == DISPATCH:
        policy.dispatch(view, plan)
    elif hook == AFTER_LAYER:
        policy.after_layer(view, plan)
    elif hook == BEFORE_GATE:
        policy.before_gate(view, plan)
    elif hook == ROUTED:
        policy.routed(view, plan)
    else:
        policy.before_attention(view, plan)


def window_ns(host: Host, hook: int) -> int:
    """Return the time from a hook to the next layer's gate if all weights were resident."""
    s = host.state
    ns: int = s[ATTENTION_NS]
    if hook == BEFORE_ATTENTION:
        ns += s[ATTENTION_NS] + s[GATE_NS] + s[EXPERT_NS]
    elif hook == BEFORE_GATE:
        ns += s[GATE_NS] + s[EXPERT_NS]
    elif hook == ROUTED:
        ns += s[EXPERT_NS]
    elif hook == DISPATCH:
        for i in range(s[ACTIVE]):
            ns += host.gpu_ns[host.active[i]]
    return ns


def load_dense(machine: Machine, host: Host, layer: int) -> int:
    """Copy in a layer's weights outside the experts, if they are on the host: two buffers."""
    if host.dense_on_host == 0:
        return 0
    return launch(
        machine, host.forecast, H2D, DENSE_IN, layer, NONE, host.costs.attention_bytes[layer], 0,
        host.state[DENSE_2], 0, 0,
    )  # fmt: skip


def load_kv(machine: Machine, host: Host, step: int, layer: int, batch: int) -> int:
    """Copy in a batch's keys and values, if they are on the host and needed here: two buffers."""
    kept_bytes = host.steps.kept[step, batch] * host.costs.kv_bytes[layer]
    if host.kv_on_host == 0 or kept_bytes == 0 or attends_on_cpu(host, step):
        return 0
    return launch(
        machine, host.forecast, H2D, KV_IN, layer, batch, kept_bytes, 0, host.state[ATTENTION_2],
        host.kv_out[layer, batch], 0,
    )  # fmt: skip


def attends_on_cpu(host: Host, step: int) -> bool:
    """Say whether the CPU attends to the context in a step."""
    on_cpu: bool = host.attention_on_cpu == 1 and host.steps.phase[step] == DECODE
    return on_cpu


def settle(machine: Machine, host: Host, ticket: int) -> None:
    """Wait for everything submitted up to a ticket, and charge one synchronisation."""
    s = host.state
    clock = host.forecast.clock
    if ticket <= s[SETTLED]:
        return
    for earlier in range(s[SETTLED] + 1, ticket + 1):
        wait(machine, earlier)
        clock[NOW] = max(clock[NOW], end_ns(host.forecast, earlier))
    s[SETTLED] = ticket
    busy(machine, host.forecast, host.forecast.sync_ns)


def attend(machine: Machine, host: Host, step: int, layer: int, dense: int, kv: int) -> None:
    """Submit the attention of every batch, and the transfers that it needs.

    `dense` and `kv` are what the first one waits for. The next batch's keys and values are under
    way while a synchronisation waits for the batch before.
    """
    s = host.state
    forecast = host.forecast
    on_cpu = attends_on_cpu(host, step)
    for batch in range(host.batches):
        host.attended[batch] = 0
        tokens = host.first_token[batch + 1] - host.first_token[batch]
        if tokens == 0:
            continue
        if batch > 0:
            kv = load_kv(machine, host, step, layer, batch)
        if host.sync_batches:
            settle(machine, host, s[ATTENTION_1])
        context = 0 if on_cpu else host.steps.context[step, batch]
        ticket = launch(
            machine, forecast, GPU, ATTENTION, layer, batch, tokens, context, kv, dense, s[COMBINED]
        )
        if on_cpu:
            host.attended[batch] = attend_on_cpu(machine, host, step, layer, batch, tokens, ticket)
        elif host.kv_on_host:
            new_bytes = tokens * host.costs.kv_bytes[layer]
            host.kv_out[layer, batch] = launch(
                machine, forecast, D2H, KV_OUT, layer, batch, new_bytes, 0, ticket, 0, 0
            )
        s[ATTENTION_2] = s[ATTENTION_1]
        s[ATTENTION_1] = host.attended[batch] if on_cpu else ticket
    if host.sync_batches:
        settle(machine, host, s[ATTENTION_1])
    s[DENSE_2] = s[DENSE_1]
    s[DENSE_1] = s[ATTENTION_1]


def attend_on_cpu(
    machine: Machine, host: Host, step: int, layer: int, batch: int, tokens: int, projected: int
) -> int:
    """Let the CPU attend for a batch, whose queries, keys and values are sent; return the RETURN.

    The output projection is counted with the others, before.
    """
    costs = host.costs
    forecast = host.forecast
    sent_bytes = tokens * (costs.token_bytes + costs.kv_bytes[layer])
    sent = launch(machine, forecast, D2H, SEND, layer, batch, sent_bytes, 0, projected, 0, 0)
    context = host.steps.context[step, batch]
    computed = launch(
        machine, forecast, CPU, ATTENTION_CPU, layer, batch, tokens, context, sent, 0, 0
    )
    size_bytes = tokens * costs.token_bytes
    return launch(machine, forecast, H2D, RETURN, layer, batch, size_bytes, 0, computed, 0, 0)


def guess(machine: Machine, host: Host, step: int, layer: int, after_gate: int) -> None:
    """Make the guesses that are due before or after the gate, and wait for them."""
    for p in range(len(host.predictions)):
        if host.predictions[p, 0] != after_gate:
            continue
        target = layer + host.predictions[p, 1]
        target_step = step + target // host.layers
        if target_step >= len(host.steps.phase):
            continue
        lane = host.predictions[p, 2]
        if lane == CPU:
            send(machine, host, layer)
        ticket = launch(
            machine, host.forecast, lane, PREDICT, layer, NONE, host.first_token[host.batches], 0,
            host.state[SENT] if lane == CPU else host.state[ATTENTION_1], 0, 0,
        )  # fmt: skip
        await_ticket(machine, host.forecast, ticket)
        host.predicted_tokens[p] = predict(
            machine, p, target_step, target % host.layers, host.predicted_ids, host.predicted_scores
        )
        count_guessed(host, p, 1)


def count_guessed(host: Host, p: int, sign: int) -> None:
    """Add a guess's tokens to the predicted loads, or take them away again."""
    for t in range(host.predicted_tokens[p]):
        for k in range(host.top_k):
            expert = host.predicted_ids[p, t, k]
            if expert != NONE:
                host.predicted_loads[p, expert] += sign


def pass_gates(machine: Machine, policy: Any, host: Host, step: int, layer: int) -> int:
    """Submit the gates, then wait for each batch's choice and tell the policy."""
    s = host.state
    arrival1 = arrival(host, layer, s[GATE_AFTER_1] - 1)
    arrival2 = arrival(host, layer, s[GATE_AFTER_2] - 1)
    arrival3 = arrival(host, layer, s[GATE_AFTER_3] - 1)
    for batch in range(host.batches):
        tokens = host.first_token[batch + 1] - host.first_token[batch]
        host.gates[batch] = 0
        if tokens > 0:
            last = host.attended[batch] if host.attention_on_cpu else arrival3
            host.gates[batch] = launch(
                machine, host.forecast, GPU, GATE, layer, batch, tokens, 0,
                arrival1, arrival2, last,
            )  # fmt: skip
    for batch in range(host.batches):
        if host.gates[batch] > 0:
            await_ticket(machine, host.forecast, host.gates[batch])
            take_routing(machine, host, step, layer, batch)
            rule = ask(machine, policy, host, ROUTED, step, layer, batch)
            if rule != OK:
                return rule
    return OK


def arrival(host: Host, layer: int, expert: int) -> int:
    """Return the ticket of an expert's arrival; 0 for none, and for one given up meanwhile."""
    ticket = 0
    if expert != NONE and host.res.cached[layer, expert] > 0:
        ticket = host.res.cached_ticket[layer, expert]
    if expert != NONE and host.res.staged[layer, expert] > 0:
        ticket = host.res.staged_ticket[layer, expert]
    return ticket


def take_routing(machine: Machine, host: Host, step: int, layer: int, batch: int) -> None:
    """Read what the router chose for one batch, and add it to the loads."""
    s = host.state
    first = host.first_token[batch]
    n = route(machine, step, layer, batch, first, host.ids, host.weights)
    for t in range(first, first + n):
        for k in range(host.top_k):
            expert = host.ids[t, k]
            if expert != NONE:
                if host.loads[expert] == 0:
                    host.active[s[ACTIVE]] = expert
                    s[ACTIVE] += 1
                host.loads[expert] += 1
                host.loads_by_batch[batch, expert] += 1
                host.scores[expert] += host.weights[t, k]
    s[TOKENS] += n


def judge(machine: Machine, host: Host, layer: int) -> None:
    """Note how each active expert meets its weights, and what it would cost on either device."""
    res = host.res
    for i in range(host.state[ACTIVE]):
        expert = host.active[i]
        cached = res.cached[layer, expert]
        staged = res.staged[layer, expert]
        outcome = FETCHED
        if cached + staged >= WHOLE:
            outcome = RESIDENT
            if cached < WHOLE or res.cached_cause[layer, expert] == PREFETCH:
                outcome = ARRIVED
            if cached > 0 and not done(machine, res.cached_ticket[layer, expert]):
                outcome = LATE
            if staged > 0 and not done(machine, res.staged_ticket[layer, expert]):
                outcome = LATE
        host.outcome[expert] = outcome
        precision = res.cached_precision[layer, expert] if cached > 0 else res.precision
        host.gpu_ns[expert] = host.costs.expert_gpu_ns[precision, host.loads[expert]]
        host.cpu_ns[expert] = host.costs.expert_cpu_ns[res.precision, host.loads[expert]]


def combine(machine: Machine, host: Host, layer: int) -> None:
    """Bring back what the CPU computed and add everything up."""
    s = host.state
    forecast = host.forecast
    size_bytes = s[TOKENS] * host.costs.token_bytes
    returned = 0
    deferred = 0
    if s[DEFERRED] > 0:
        deferred = launch(
            machine, forecast, H2D, RETURN, layer - 1, NONE, size_bytes, 1, s[DEFERRED], 0, 0
        )
    if s[COMPUTED] > 0:
        returned = launch(
            machine, forecast, H2D, RETURN, layer, NONE, size_bytes, 0, s[COMPUTED], 0, 0
        )
    s[COMBINED] = launch(
        machine, forecast, GPU, COMBINE, layer, NONE, s[TOKENS], 0, returned, deferred, 0
    )
    s[DEFERRED] = s[COMPUTED_DEFERRED]
