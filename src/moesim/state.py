"""What the host program knows during a run, and the rules that policies must keep."""

from typing import NamedTuple

from moesim.costs import Costs
from moesim.errors import PolicyError
from moesim.forecast import Forecast
from moesim.policies.api import HOOKS, Plan, View
from moesim.residency import Residency
from moesim.traces.workload import Steps
from moesim.types import NONE, FloatArray, IntArray

(
    COMBINED,  # the last COMBINE
    DEFERRED,  # the last EXPERT_CPU whose result is deferred to this layer
    ATTENTION_1,  # the last ATTENTION (its RETURN if the CPU attends), and the one before it
    ATTENTION_2,
    DENSE_1,  # the last ATTENTION of the last layer, and of the one before it
    DENSE_2,
    SENT,  # SEND of this layer
    COMPUTED,  # the last EXPERT_CPU of this layer, and the last deferred one
    COMPUTED_DEFERRED,
    GATE_AFTER_1,  # experts that this layer's gates wait for, plus 1
    GATE_AFTER_2,
    GATE_AFTER_3,
    TOKENS,  # of this layer step, routed so far
    ACTIVE,  # experts with tokens so far
    ATTENTION_NS,  # one layer's attention, gates and experts in this step, all weights resident
    GATE_NS,
    EXPERT_NS,
    SETTLED,  # the last ticket that a full synchronisation has waited for
    BAD_RULE,  # what a policy did wrong, and where
    BAD_HOOK,
    BAD_STEP,
    BAD_LAYER,
    BAD_EXPERT,
    STATES,
) = range(24)

RULES = (
    "",
    "the plan holds at most {capacity} commands",
    "experts run in dispatch only",
    "no such layer or expert",
    "an inactive expert cannot run",
    "an expert runs once",
    "FIRST runs once, what is cached, and REST after it",
    "a demand copy needs a staging slot, and the placement has none",
    "the last layer cannot defer",
    "an active expert was left without a device",
    "an active expert cannot be evicted before its run is ordered",
    "what is not cached cannot be evicted",
    "the layer's cache has no free slot: evict first",
    "the weights do not fit into a slot of that size",
    "staging takes whole experts, or the rest of a cached one",
    "a cached part grows in its own precision",
    "only a wholly staged, uncached expert can be admitted",
    "gate_after is too late once the gates are submitted",
    "gates wait for at most three experts (two if the CPU attends), cached or on their way",
    "part must be 1..1024, piece BOTH, FIRST or REST, into CACHE or STAGING",
    "no such precision",
    "shared experts run once, in dispatch",
    "slots are resized before the attention of layer 0 only",
    "a pool takes as many slots as it has and as there are spare ones, of 0 bytes or more",
    "all slots together would be larger than the budget",
    "too many fetches are pending",
)
(
    OK, FULL_PLAN, NOT_NOW, UNKNOWN, INACTIVE, TWICE, NOTHING_FIRST, NO_STAGING, LAST_DEFERS,
    FORGOTTEN, EVICTS_ACTIVE, NOT_CACHED, NO_SLOT, TOO_BIG, STAGES_PART, GROWS_PRECISION,
    NOT_STAGED, GATED, TOO_MANY_GATES, BAD_PART, BAD_PRECISION, SHARED_TWICE, RESIZES_LATE,
    BAD_SLOTS, OVER_BUDGET, TOO_MANY_PENDING,
) = range(26)  # fmt: skip


class Host(NamedTuple):
    """All that the host program knows; the scalars never change, the arrays do."""

    costs: Costs
    forecast: Forecast
    res: Residency
    plan: Plan
    steps: Steps
    state: IntArray
    """(STATES,)"""
    layers: int
    experts: int
    top_k: int
    batches: int
    hooks: int
    """Bit h is set where the policy has hook h."""
    has_shared: int
    host_computes: int
    gemm_per_batch: int
    kv_on_host: int
    dense_on_host: int
    attention_on_cpu: int
    sync_batches: int
    per_layer_ns: int
    decision_ns: int
    predictions: IntArray
    """(predictions, 3): after the gate or before it, distance, lane."""
    first_token: IntArray
    """(batches + 1,): rows of each batch in `ids`."""
    gates: IntArray
    """(batches,): tickets."""
    kv_out: IntArray
    """(layers, batches): last KV_OUT."""
    attended: IntArray
    """(batches,): RETURN of the attention on the CPU in this layer step; 0 for none."""
    ran: IntArray
    """(experts,): part computed in this layer step."""
    computed: IntArray
    """(experts,): EXPERT_CPU of this layer step, 0 for none."""
    outcome: IntArray
    """(experts,): of the active experts, when the router's choice was known."""
    counts: IntArray
    """(layers, phases, outcomes, 2): activations by expert and by token."""
    ids: IntArray
    weights: FloatArray
    active: IntArray
    loads: IntArray
    loads_by_batch: IntArray
    scores: FloatArray
    gpu_ns: IntArray
    cpu_ns: IntArray
    predicted_tokens: IntArray
    predicted_ids: IntArray
    predicted_scores: FloatArray
    predicted_loads: IntArray
    seen: View
    """The arrays of a view, as the policy is handed them: the same memory as the fields above."""


def fail(host: Host, rule: int, layer: int, expert: int) -> int:
    """Note the first broken rule."""
    if host.state[BAD_RULE] == OK:
        host.state[BAD_RULE] = rule
        host.state[BAD_LAYER] = layer
        host.state[BAD_EXPERT] = expert
    return rule


def host_error(host: Host, policy_name: str) -> PolicyError:
    """Return the broken rule as an error that names policy, hook, step, layer and expert."""
    s = host.state
    expert = "" if s[BAD_EXPERT] == NONE else f", expert {s[BAD_EXPERT]}"
    rule = RULES[s[BAD_RULE]].format(capacity=len(host.plan.rows))
    where = f"step {s[BAD_STEP]}, layer {s[BAD_LAYER]}{expert}"
    return PolicyError(f"policy '{policy_name}', hook {HOOKS[s[BAD_HOOK]]}, {where}: {rule}")
