"""What a policy sees, what it may order, and what it decides before the run.

A policy is a `typing.NamedTuple` of parameters and state arrays with plain methods:

* `new(cls, setting, **parameters)`, a classmethod: make the policy for one run;
* `place(self, setting) -> Placement`: what is where before the first step;
* the hooks, in the order of a layer step, of which only `dispatch` is required:
  `before_attention`, `before_gate`, `routed` (once per batch), `dispatch`, `after_layer`, each
  called with `(self, view: View, plan: Plan)`.

A policy that computes its settings may show how: `plan(self, setting) -> tuple[Table, ...]` is what
`moesim plan` prints.

A hook reads the view, which does not change meanwhile, and calls the command functions of this
module on the plan; they are carried out after the hook returns, strictly in the order of the calls.
A policy sees no clock and moves no bytes itself. It sees no future either, unless its class is
decorated with `sees_future`: then `Setting.future` holds what the routers will choose, and the run
says so.
"""

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np

from moesim.costs import Costs, copy_ns, part_bytes
from moesim.forecast import NOW, Forecast, left_ns
from moesim.model import ModelSpec
from moesim.profile import HardwareProfile
from moesim.types import GPU, H2D, NONE, WHOLE, FloatArray, IntArray

AnyPolicy = TypeVar("AnyPolicy")

CACHE, STAGING = 0, 1
"""Where a fetched expert goes: to stay until it is evicted, or until after its layer's next run."""

BOTH, FIRST, REST = 0, 1, 2
"""Which piece of an expert that is resident in part: all, what is cached, what is not."""

HOOKS = ("before_attention", "before_gate", "routed", "dispatch", "after_layer")
BEFORE_ATTENTION, BEFORE_GATE, ROUTED, DISPATCH, AFTER_LAYER = range(5)


class View(NamedTuple):
    """One layer step as a policy sees it; `(L, E)` stands for layers and experts.

    Estimates (`..._ns`) come from the cost tables and from what was submitted, at full speed.
    """

    layer: int
    step: int
    phase: int
    """`types.PREFILL` or `types.DECODE`."""
    last_step: int
    """1 in the last step of the run, after which no layer follows."""
    precision: int
    """Index into `types.BITS` of the weights as they are stored on the host."""
    batches: int
    """Batches of the group."""
    batch: int
    """The batch that `routed` reports; -1 in every other hook."""
    tokens: int
    """Tokens routed so far in this layer step, over all batches."""
    n_active: int
    free_slots: int
    """Staging slots that a fetch would find free."""
    window_ns: int
    """From this hook to the next layer's gate if all weights were resident."""
    ids: IntArray
    """(tokens, top_k): chosen experts, largest router weight first; -1: missing."""
    weights: FloatArray
    """(tokens, top_k): router weights; equal where the trace has none."""
    active: IntArray
    """(E,): the first `n_active` are the active experts in order of first appearance."""
    loads: IntArray
    """(E,): tokens routed to each expert, over all batches."""
    loads_by_batch: IntArray
    """(batches, E)."""
    scores: FloatArray
    """(E,): summed router weights."""
    cached: IntArray
    """(L, E): cached part, 0..1024, from the moment its copy is submitted."""
    staged: IntArray
    """(L, E): staged part, likewise."""
    pending: IntArray
    """(L, E): above 0 where a background fetch waits for a staging slot."""
    cached_ticket: IntArray
    staged_ticket: IntArray
    """(L, E): arrivals; ask `arriving_ns`."""
    gpu_ns: IntArray
    """(E,): GPU time of each active expert for its load, weights being there."""
    cpu_ns: IntArray
    """(E,): CPU time of each active expert for its load."""
    predicted_tokens: IntArray
    """(predictions,): rows filled in; 0 where the prediction is not made now."""
    predicted_ids: IntArray
    """(predictions, tokens, width): guesses for the target layer, best first; -1: none."""
    predicted_scores: FloatArray
    """(predictions, tokens, width); 0 where the predictor gives none."""
    predicted_loads: IntArray
    """(predictions, E): tokens that are guessed to choose each expert, by their first top_k ids."""
    costs: Costs
    forecast: Forecast
    """The host's reckoning; ask `arriving_ns` and `queued_ns`."""


class Plan(NamedTuple):
    """Orders of one hook; written by the command functions only."""

    rows: IntArray
    """(capacity, 8): code, layer, expert and the command's own arguments."""
    length: IntArray
    """(1,): orders given."""


COMMANDS = (
    "run_on_gpu", "run_on_cpu", "run_shared", "fetch", "admit", "evict", "cancel", "promote",
    "gate_after", "read", "resize",
)  # fmt: skip
(
    RUN_ON_GPU, RUN_ON_CPU, RUN_SHARED, FETCH, ADMIT, EVICT, CANCEL, PROMOTE, GATE_AFTER, READ,
    RESIZE,
) = range(11)  # fmt: skip


def _order(
    plan: Plan, code: int, layer: int, expert: int, a: int, b: int, c: int, d: int, e: int
) -> None:
    at = plan.length[0]
    plan.length[0] = at + 1
    if at < len(plan.rows):
        plan.rows[at, 0] = code
        plan.rows[at, 1] = layer
        plan.rows[at, 2] = expert
        plan.rows[at, 3] = a
        plan.rows[at, 4] = b
        plan.rows[at, 5] = c
        plan.rows[at, 6] = d
        plan.rows[at, 7] = e


def run_on_gpu(plan: Plan, expert: int, piece: int = BOTH) -> None:
    """Run an active expert on the GPU; what is missing of it is copied on demand into staging.

    An expert cached in part runs in two pieces, `FIRST` what is cached, `REST` the rest when it is
    there; their times sum to the whole. Legal in `dispatch`.
    """
    _order(plan, RUN_ON_GPU, NONE, expert, piece, 0, 0, 0, 0)


def run_on_cpu(plan: Plan, expert: int, defer: int = 0) -> None:
    """Run an active expert on the CPU. Legal in `dispatch`.

    A deferred result joins the next layer's COMBINE (KTransformers' expert deferral, which changes
    the model's output); the last layer cannot defer.
    """
    _order(plan, RUN_ON_CPU, NONE, expert, defer, 0, 0, 0, 0)


def run_shared(plan: Plan) -> None:
    """Run the shared experts now; without this order they run first. Legal in `dispatch`."""
    _order(plan, RUN_SHARED, NONE, NONE, 0, 0, 0, 0, 0)


def fetch(
    plan: Plan, layer: int, expert: int, part: int = WHOLE, precision: int = NONE,
    into: int = STAGING, urgent: int = 0, after_compute: int = 0,
) -> None:  # fmt: skip
    """Copy to the GPU what is missing of an expert's first `part`/1024. Legal in every hook.

    It is for the next run of that layer, in this step or the next; a number beyond the last layer
    counts on from the first one. Into the cache there must be a free slot (`evict` first). Into
    staging always all of the rest is copied; without a free slot a background fetch is pending
    until there is one, an urgent one takes the slot of the youngest fetch for another layer.
    `precision` is an index into `types.BITS` (-1: as stored); `after_compute` makes the copy wait
    for this expert's run on the CPU in this layer step.
    """
    _order(plan, FETCH, layer, expert, part, precision, into, urgent, after_compute)


def admit(plan: Plan, layer: int, expert: int, part: int = WHOLE) -> None:
    """Make the first `part`/1024 of a wholly staged expert cached, without a copy over the link.

    The cache must have a free slot. A slot of the staging size changes its role; another size costs
    a MOVE within GPU memory.
    """
    _order(plan, ADMIT, layer, expert, part, 0, 0, 0, 0)


def evict(plan: Plan, layer: int, expert: int) -> None:
    """Give up a cached expert; its slot is overwritten only after its last use.

    Refused while the expert is active in this layer step and its run is not ordered yet.
    """
    _order(plan, EVICT, layer, expert, 0, 0, 0, 0, 0)


def cancel(plan: Plan, layer: int, expert: int) -> None:
    """Give up a fetch into staging whose expert has not run; it never starts if it has not."""
    _order(plan, CANCEL, layer, expert, 0, 0, 0, 0, 0)


def promote(plan: Plan, layer: int, expert: int) -> None:
    """Make an expert's waiting background copy urgent; no effect on a copy under way."""
    _order(plan, PROMOTE, layer, expert, 0, 0, 0, 0, 0)


def gate_after(plan: Plan, expert: int) -> None:
    """Let this layer's gates wait for an expert that is on its way (at most three of them).

    Klotski's released code does so. Legal in `before_attention` and `before_gate`.
    """
    _order(plan, GATE_AFTER, NONE, expert, 0, 0, 0, 0, 0)


def read(plan: Plan, layer: int, expert: int) -> None:
    """Read an expert from disk into host memory ahead of its use; it leaves after its layer."""
    _order(plan, READ, layer, expert, 0, 0, 0, 0, 0)


def resize(plan: Plan, layer: int, slots: int, slot_bytes: int) -> None:
    """Give a layer's pool other slots; whatever is cached there is given up.

    Slots are taken from those that other pools gave up before, and from `Placement.spare_slots`;
    all together must stay within the budget. Legal in `before_attention` of layer 0, when nothing
    runs: memory is divided anew between two steps.
    """
    _order(plan, RESIZE, layer, 0, slots, slot_bytes, 0, 0, 0)


def arriving_ns(view: View, layer: int, expert: int) -> int:
    """Return how long an expert's weights on their way will still take; 0: all there, or absent."""
    ns = 0
    if view.cached[layer, expert] > 0:
        ns = left_ns(view.forecast, view.cached_ticket[layer, expert])
    if view.staged[layer, expert] > 0:
        ns = max(ns, left_ns(view.forecast, view.staged_ticket[layer, expert]))
    return ns


def queued_ns(view: View, queue: int) -> int:
    """Return the work queued or running on one of `types.QUEUES`."""
    ns: int = view.forecast.free[queue] - view.forecast.clock[NOW]
    return max(0, ns)


def transfer_ns(view: View, part: int = WHOLE, precision: int = NONE) -> int:
    """Return the time of copying the first `part`/1024 of an expert of this layer to the GPU."""
    stored = view.precision if precision == NONE else precision
    return copy_ns(view.costs, H2D, part_bytes(view.costs, view.layer, stored, 0, part))


class Prediction(NamedTuple):
    """A guess that the host has made in every layer step, and waits for as a real engine must."""

    predictor: str
    """A name that `moesim.traces.predictors` knows; `auto` takes the best that the trace has."""
    after_gate: bool = True
    """Ready for `dispatch` instead of `before_gate`."""
    distance: int = 1
    """Layers ahead."""
    lane: int = GPU
    """`types.GPU` or `types.CPU`."""
    width: int = 0
    """Ids per token; 0: top_k."""
    recall: float = 0.9
    """Of the predictor `noisy-oracle`."""
    wraps: bool = False
    """For the next step's first layers, which a recorded guess leaves out, take that of
    `wrap<distance>` if the trace holds it: the same router applied to what the last layers saw."""


class Offline(NamedTuple):
    """What was observed beforehand: the part of the trace that is not replayed.

    That is the sequences of which nothing is replayed; if there are none, the rest of the others. A
    sequence's tokens follow one another, as they were forwarded.
    """

    ids: IntArray
    """(tokens, L, top_k): chosen experts, largest router weight first; -1: missing."""
    sequence: IntArray
    """(tokens,)."""
    guesses: IntArray
    """(tokens, L, width): guesses for each layer, best first; -1: none. Empty if none was asked
    for."""


def nothing_observed(prediction: Prediction | None = None) -> Offline:
    """Observe nothing, as where the whole trace is replayed."""
    none = np.zeros((0, 0, 0), np.int64)
    return Offline(none, np.zeros(0, np.int64), none)


class Setting(NamedTuple):
    """What is known before the run: all that `new` and `place` may look at."""

    layers: int
    experts: int
    top_k: int
    budget_bytes: int
    precision: int
    """Index into `types.BITS` of the weights as they are stored on the host."""
    costs: Costs
    sequences: int
    """Sequences of the whole run, which a grouping policy may split into batches."""
    step_tokens: int
    """Most tokens of one step."""
    popularity: IntArray
    """(L, E): how often each expert was chosen in the part of the trace that is not replayed, which
    is that of `offline`."""
    seed: int
    future: IntArray = np.zeros((0, 4), np.int64)
    """(activations, 4): step, layer, expert and tokens of each, in this order, of the whole run;
    none but for a policy whose class is decorated with `sees_future`."""
    gpu_memory_bytes: int = 1 << 60
    """All of the GPU's memory, of which the budget is a part."""
    host_memory_bytes: int = 1 << 60
    model: ModelSpec | None = None
    machine: HardwareProfile | None = None
    """For planners, which may need what the costs do not say; None where they are not known."""
    kv_tokens: int = 0
    """Tokens whose keys and values are kept at the end of the run, over all sequences."""
    offline: Callable[..., Offline] = nothing_observed
    """Given a Prediction or nothing, what was observed beforehand and what would have been guessed;
    a predictor that learns offline guesses here as it would online."""

    @property
    def expert_bytes(self) -> int:
        """Bytes of the largest expert as stored: the size of a slot that any of them fits."""
        return int(self.costs.expert_bytes[:, self.precision].max())

    @property
    def slots(self) -> int:
        """How many whole experts the budget holds, staging included."""
        return self.budget_bytes // self.expert_bytes


class Placement(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What a policy decides before the first step.

    Slots of the cache come in pools of equal size: one per layer, or shared by several.
    """

    cached: IntArray
    """(L, E): parts resident at the start, 0..1024."""
    cache_slots: IntArray
    """(pools,): slots of each pool."""
    cache_slot_bytes: IntArray
    """(pools,)."""
    pool_of_layer: IntArray
    """(L,)."""
    cached_precision: int = NONE
    """Of what is resident at the start; -1: as stored."""
    spare_slots: int = 0
    """Slots without a size, for pools that `resize` gives more than they have."""
    staging_slots: int = 0
    staging_slot_bytes: int = 0
    """0: one whole expert as stored."""
    batches: int = 1
    """Into how many batches the sequences are split, which walk through each layer together."""
    predictions: tuple[Prediction, ...] = ()
    link: Literal["priority", "fifo"] = "priority"
    chunk_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Where a background copy may be preempted; 0: the machine's own."""
    host_computes: bool = False
    """The host waits for each expert on the CPU (Huang et al.)."""
    gemm_per_batch: bool = False
    """An expert runs once per batch (Klotski's port) instead of once for all."""
    kv_on_host: bool = False
    dense_on_host: bool = False
    attention_on_cpu: bool = False
    """In decode the CPU attends to the keys and values, which are on the host and stay there; the
    projections remain on the GPU (MoE-Lightning)."""
    sync_batches: bool = False
    """The host waits for everything, copies included, after the attention of each batch and after
    each layer, while the next batch's keys and values, or the next layer's weights outside the
    experts, are on their way (FlexGen's released code)."""
    on_disk: IntArray | None = None
    """(L, E): 1 where an expert's home is the disk; none: all are in host memory."""
    notices: tuple[str, ...] = ()
    """What the user should know about this placement."""


class Table(NamedTuple):
    """A part of how a policy came to its settings, for people to read."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    note: str = ""


class Policy(Protocol):
    """What every policy has; the other hooks are found by name."""

    def place(self, setting: Setting) -> Placement:
        """Decide what is where before the first step."""

    def dispatch(self, view: View, plan: Plan) -> None:
        """Give every active expert a device; weights that are missing get demand copies."""


def sees_future(cls: type[AnyPolicy]) -> type[AnyPolicy]:
    """Declare that a policy is a reference that knows the future, and get it `Setting.future`."""
    cls.declares_future = True  # type: ignore[attr-defined]
    return cls


def even_split(total: int, parts: int) -> IntArray:
    """Return `total` split over `parts` as evenly as possible, the first ones getting one more."""
    return np.array([total // parts + (i < total % parts) for i in range(parts)], np.int64)


def layer_caches(
    setting: Setting, cached: IntArray, slots: IntArray, staging_slots: int, **options: object
) -> Placement:
    """Return a placement with one pool of `slots[layer]` whole experts per layer."""
    return Placement(
        cached=cached,
        cache_slots=slots,
        cache_slot_bytes=np.full(setting.layers, setting.expert_bytes),
        pool_of_layer=np.arange(setting.layers),
        staging_slots=staging_slots,
        **options,  # type: ignore[arg-type]
    )
