"""Fate, arXiv 2502.12224: cross-layer gate, ARC, full shallow layers, two precisions."""

from typing import Literal, NamedTuple

import numpy as np

from moesim.costs import copy_ns, duration_ns
from moesim.errors import InputError, PolicyError
from moesim.policies.api import (
    CACHE,
    Placement,
    Plan,
    Prediction,
    Setting,
    View,
    admit,
    cancel,
    evict,
    fetch,
    run_on_gpu,
    run_shared,
    transfer_ns,
)
from moesim.policies.parts.arc import Arc, arc_access, arc_holds, new_arc
from moesim.policies.parts.order import sort_by
from moesim.types import (
    ATTENTION,
    BITS,
    CPU,
    DECODE,
    GPU,
    H2D,
    NONE,
    PREFILL,
    WHOLE,
    IntArray,
)

ABSENT, CACHED, STAGED, RAN = range(4)
"""Where an active expert's weights are, or are on their way to, while its layer is dispatched."""

(
    SLOTS,  # staging slots
    HELD,  # of them, those with what this layer has not run yet, which nobody else takes
    FREE,  # of them, those that can be had without taking them from a fetch
    FREE_CACHE,  # slots of the layer's cache
    NEXT_WRONG,  # from which expert on to look for wrong guesses
    ROOMS,
) = range(6)


class Split(NamedTuple):
    """How a budget is spent on layers."""

    experts: IntArray
    """(layers,): how many each layer holds."""
    all_stored: bool
    """All fit in the precision in which they are stored; otherwise they are kept at 4 bits."""
    stored_layers: int
    """All fit at 4 bits, and in so many layers, the first ones, even as stored."""


class Fate(NamedTuple):
    """All on the GPU at 4 bits; the next layer's experts are copied ahead as its gate guesses them.

    P: the paper; C: the released code (FFFzy/Fate_open); I: inferred.

    * Prediction: the next layer's gate on this layer's gate input [C, P], ready before this gate.
      A layer without a next one, or before one that is all cached, asks for nothing [C]; neither
      does layer 0, which in the code is all cached [C]; where it is not, it is like others [I].
    * Prefetch, prefill: what tokens are guessed to choose, most tokens first [C]. Decode: as many
      of the best guesses as copies fit into a layer's time [C], reckoned anew each time [I], or a
      fixed number [C], or a percentile [P]. With several tokens the guesses are ranked by how many
      tokens have them among so many [I]. Equals: the better rank, then the earlier token [I].
    * Precision: the cache and copies have 4 bits; in prefill the least wanted guesses, up to
      `int2_rate` of all guessed tokens, have 2 [C]. An expert is kept in the form in which it came
      [I, as everything demanded is admitted].
    * Cache: 4 shallow layers whole, equally many experts in deeper ones [C], at first the lowest
      ids; ARC per layer over each token's choices one by one [C]. Everything demanded is admitted,
      a guess that was wrong never; a victim that is needed in this step runs first [C].
    * Order: prefetches leave before the gate, demands behind them on the same queue [C] (`link=
      priority`: ahead of them), most demanded first; guessed experts run first, in the order of
      the guess, then the others by demand [C]. Equal demand: lower id [I].

    The code plans no memory for copies under way. Here `staging` slots are part of the budget; if
    they are few, a demand waits for one, takes that of a wrong guess, or of a fetch for the next
    layer [I]; an admitted expert whose slot is lost meanwhile is copied when it is next wanted.
    """

    width: int
    percentile: int
    rate_permille: int
    demand_precision: int
    precision: int
    """Of the cache and of normal copies; a weight stored with fewer bits does not get more."""
    small_precision: int
    arc: Arc
    partly: IntArray
    """(layers,): 1 where some experts are cached, and not all."""
    staging: int
    guessed: IntArray
    """(2, experts): what was guessed for even and odd layers, in order."""
    n_guessed: IntArray
    """(2,)."""
    order: IntArray
    named: IntArray
    small: IntArray
    place_of: IntArray
    """(experts,): scratch space of one decision."""
    room: IntArray
    """(ROOMS,): what a layer step has left while it is dispatched."""
    prediction: Prediction
    link: str
    stored_layers: int
    """Layers that the code would keep as stored, and the simulator keeps at 4 bits."""

    @classmethod
    def new(
        cls,
        setting: Setting,
        width: int = 0,
        percentile: int = 0,
        int2_rate: float = 0.3,
        demand: Literal["int4", "int2"] = "int4",
        shallow: int = 4,
        arc: Literal["fate", "textbook"] = "fate",
        predictor: str = "auto",
        recall: float = 0.9,
        gate: Literal["gpu", "cpu"] = "gpu",
        link: Literal["fifo", "priority"] = "fifo",
        staging: int = 0,
    ) -> "Fate":
        """`width` is of the prefetch in decode; 0: measured, or from `percentile` if that is given.

        `staging` slots, 0: two prefetches and one token's demand, at most a quarter of the budget.
        `gate` computes the prediction; `recall` is of predictor=noisy-oracle.
        """
        check(percentile, int2_rate)
        layers, experts = setting.layers, setting.experts
        sizes = setting.costs.expert_bytes
        small = BITS.index(2)
        precision = max(setting.precision, BITS.index(4))
        one = int(sizes[:, precision].max())
        if setting.budget_bytes < one:
            raise PolicyError(
                f"a budget of {setting.budget_bytes} bytes holds no expert: one takes {one} bytes "
                f"at {BITS[precision]} bits, and Fate computes none on the CPU"
            )
        split = cache_split(
            setting.budget_bytes, layers, experts, setting.expert_bytes, one, shallow
        )
        expected = expected_width(setting, precision)
        guesses = min(2 * expected, experts)
        if width or percentile:
            guesses = expected = decode_width(width, percentile, 0, 1, experts)
        if split.experts.min() == experts:
            staging = 0
        else:
            slots = setting.budget_bytes // one
            staging = staging or min(2 * expected + setting.top_k, slots // 4)
            staging = max(1, min(staging, slots))
            rest = setting.budget_bytes - staging * one
            split = cache_split(rest, layers, experts, setting.expert_bytes, one, shallow)
        rules = new_arc(layers, experts, split.experts, int(arc == "textbook"))
        for layer in range(layers):
            for expert in range(split.experts[layer]):
                arc_access(rules, layer, expert)
        return cls(
            width=width,
            percentile=percentile,
            rate_permille=round(int2_rate * 1000),
            demand_precision=small if demand == "int2" else precision,
            precision=setting.precision if split.all_stored else precision,
            small_precision=small,
            arc=rules,
            partly=((split.experts > 0) & (split.experts < experts)).astype(np.int64),
            staging=staging,
            guessed=np.zeros((2, experts), np.int64),
            n_guessed=np.zeros(2, np.int64),
            order=np.zeros(experts, np.int64),
            named=np.zeros(experts, np.int64),
            small=np.zeros(experts, np.int64),
            place_of=np.zeros(experts, np.int64),
            room=np.zeros(ROOMS, np.int64),
            prediction=Prediction(
                predictor, after_gate=False, lane=GPU if gate == "gpu" else CPU,
                width=max(setting.top_k, guesses), recall=recall,
            ),
            link=link,
            stored_layers=0 if split.all_stored else split.stored_layers,
        )  # fmt: skip

    def place(self, setting: Setting) -> Placement:
        """Cache the experts with the lowest ids, as many per layer as the split says."""
        ids = np.arange(setting.experts)
        cached = np.where(ids < self.arc.capacity[:, np.newaxis], WHOLE, 0)
        one = int(setting.costs.expert_bytes[:, self.precision].max())
        return Placement(
            cached=cached,
            cache_slots=self.arc.capacity,
            cache_slot_bytes=np.full(setting.layers, one),
            pool_of_layer=np.arange(setting.layers),
            cached_precision=self.precision,
            staging_slots=self.staging,
            staging_slot_bytes=one,
            predictions=(self.prediction,) if self.staging > 0 else (),
            link=self.link,  # type: ignore[arg-type]
            notices=(
                f"Fate would keep {self.stored_layers} layers at {BITS[setting.precision]} bits; "
                f"they are kept at {BITS[self.precision]}",
            )
            if self.stored_layers > 0
            else (),
        )

    def before_gate(self, view: View, plan: Plan) -> None:
        """Prefetch what the next layer is guessed to need."""
        target = view.layer + 1
        self.n_guessed[target % 2] = 0
        experts = len(self.order)
        if (
            target == len(view.cached)
            or self.arc.capacity[target] == experts
            or (view.layer == 0 and self.arc.capacity[0] == experts)
        ):
            return
        ranks = view.ids.shape[1]
        if view.phase == DECODE:
            ns = transfer_ns(view, precision=self.precision)
            ranks = decode_width(self.width, self.percentile, view.window_ns, ns, experts)
        guessed = self.guessed[target % 2]
        n = rank_guesses(view, ranks, guessed, self.named, self.order)
        if view.phase == DECODE:
            n = min(n, ranks)
        self.n_guessed[target % 2] = n
        self.small[:] = 0
        if view.phase == PREFILL:
            mark_small(guessed, n, self.named, self.rate_permille, self.small)
        for i in range(n):
            expert = guessed[i]
            if view.cached[target, expert] == 0 and view.staged[target, expert] == 0:
                precision = self.small_precision if self.small[expert] == 1 else self.precision
                fetch(plan, target, expert, precision=precision)

    def dispatch(self, view: View, plan: Plan) -> None:
        """Copy what is missing, update the cache, and run everything."""
        layer = view.layer
        if self.partly[layer] == 1:
            for token in range(view.tokens):
                for k in range(view.ids.shape[1]):
                    if view.ids[token, k] != NONE:
                        arc_access(self.arc, layer, view.ids[token, k])
        for i in range(view.n_active):
            self.order[i] = view.active[i]
        sort_by(self.order, view.n_active, view.n_active, view.loads, -1)
        precision = self.demand_precision
        self.room[SLOTS] = self.staging
        make_room(view, plan, self.arc, self.room)
        load_ahead(view, plan, self.arc, precision, self.order, self.place_of, self.room)
        if layer > 0:
            run_all(
                view, plan, self.arc, precision, self.guessed[layer % 2],
                self.n_guessed[layer % 2], self.place_of, self.room,
            )  # fmt: skip
        # Whatever found no slot at its turn finds one when all others have run.
        for _ in range(2):
            run_all(
                view, plan, self.arc, precision, self.order, view.n_active, self.place_of,
                self.room,
            )  # fmt: skip
        run_shared(plan)

    def after_layer(self, view: View, plan: Plan) -> None:
        """Keep what was admitted and found no place while a victim was still to run."""
        layer = view.layer
        if self.partly[layer] == 0:
            return
        for i in range(view.n_active):
            expert = view.active[i]
            if (
                arc_holds(self.arc, layer, expert)
                and view.cached[layer, expert] == 0
                and view.staged[layer, expert] == WHOLE
            ):
                admit(plan, layer, expert)


def check(percentile: int, int2_rate: float) -> None:
    """Raise InputError for shares that are none."""
    if percentile >= 100:
        raise InputError(
            f"policy fate: percentile={percentile} is not legal; 0 (not used) to 99 is"
        )
    if int2_rate > 1:
        raise InputError(f"policy fate: int2_rate={int2_rate} is not legal; 0 to 1 is")


def cache_split(
    avail_bytes: int,
    layers: int,
    experts: int,
    stored_bytes: int,
    int4_bytes: int,
    shallow: int = 4,
) -> Split:
    """Split a budget over the layers, shallow ones first (released code, `utils/memory_cost.py`).

    `stored_bytes` is one expert at 16 bits in the code. Where not all experts fit at 4 bits the
    first `shallow` layers hold all of them and deeper ones equally many, rounded down; if that is
    too much, layers are filled one after the other as far as it goes.
    """
    total = layers * experts
    if avail_bytes >= total * stored_bytes:
        return Split(np.full(layers, experts), True, layers)
    if avail_bytes >= total * int4_bytes:
        gain = experts * (stored_bytes - int4_bytes)
        rest = avail_bytes - total * int4_bytes
        return Split(np.full(layers, experts), False, rest // gain if gain > 0 else 0)
    n = avail_bytes // int4_bytes
    if n // experts < shallow:
        held = [min(experts, max(0, n - experts * layer)) for layer in range(layers)]
    else:
        deep = (n - shallow * experts) // (layers - shallow)
        held = [experts if layer < shallow else deep for layer in range(layers)]
    return Split(np.array(held, np.int64), False, 0)


def decode_width(width: int, percentile: int, window_ns: int, copy_ns: int, experts: int) -> int:
    """Return k', how many experts are prefetched in decode.

    As many copies as a layer's time holds, rounded down [C]; a fixed number (5 in the MindSpore
    port [C]); or those above a percentile of one token's guesses [P; with 60 experts and 75 these
    are 15, I].
    """
    ranks = window_ns // copy_ns
    if width > 0:
        ranks = width
    elif percentile > 0:
        ranks = experts * (100 - percentile) // 100
    return min(ranks, experts)


def expected_width(setting: Setting, precision: int) -> int:
    """Return about what the measured width will be: that with the longest prompt as context."""
    costs, tokens, last = setting.costs, setting.sequences, setting.layers - 1
    routed = tokens * setting.top_k
    experts = min(setting.experts, routed)
    window_ns = int(
        duration_ns(costs, DECODE, ATTENTION, last, tokens, setting.step_tokens, WHOLE, 0)
        + costs.gate_ns[tokens]
        + experts * costs.expert_gpu_ns[setting.precision, -(-routed // experts)]
        + costs.shared_ns[tokens]
        + costs.combine_ns[tokens]
    )
    size_bytes = int(costs.expert_bytes[:, precision].min())
    return decode_width(0, 0, window_ns, int(copy_ns(costs, H2D, size_bytes)), setting.experts)


def rank_guesses(view: View, ranks: int, guessed: IntArray, count: IntArray, key: IntArray) -> int:
    """List the experts among the first `ranks` guesses of any token; return how many.

    Most tokens first, `count` says how many; then the better rank, then the earlier token. `key` is
    scratch space (experts,).
    """
    count[:] = 0
    n = 0
    for rank in range(min(ranks, view.predicted_ids.shape[2])):
        for token in range(view.predicted_tokens[0]):
            expert = view.predicted_ids[0, token, rank]
            if expert != NONE:
                if count[expert] == 0:
                    guessed[n] = expert
                    key[expert] = n
                    n += 1
                count[expert] += 1
    for i in range(n):  # each token more counts for more than all places in the list
        key[guessed[i]] -= count[guessed[i]] * len(key)
    sort_by(guessed, n, n, key, 1)
    return n


def mark_small(
    guessed: IntArray, n: int, count: IntArray, rate_permille: int, small: IntArray
) -> None:
    """Mark what travels at 2 bits: from the end of the list, up to a share of all tokens [C].

    The first that would be too much ends it, whatever comes after.
    """
    total = 0
    for i in range(n):
        total += count[guessed[i]]
    marked = 0
    for i in range(n - 1, -1, -1):
        marked += count[guessed[i]]
        if marked * 1000 > rate_permille * total:
            return
        small[guessed[i]] = 1


def stays(arc: Arc, layer: int, expert: int) -> bool:
    """Say whether a cached expert is kept: in a layer that is all cached, always."""
    full: bool = arc.capacity[layer] == arc.where.shape[1]
    return full or arc_holds(arc, layer, expert)


def make_room(view: View, plan: Plan, arc: Arc, room: IntArray) -> None:
    """Evict what the cache has given up and nobody needs now; count what is free.

    A guess that still waits for a slot is taken back: it has become a demand.
    """
    layer = view.layer
    room[FREE_CACHE] = arc.capacity[layer]
    room[FREE] = view.free_slots
    room[HELD] = 0
    room[NEXT_WRONG] = 0
    for expert in range(view.cached.shape[1]):
        if view.pending[layer, expert] > 0:
            cancel(plan, layer, expert)
        if view.cached[layer, expert] > 0:
            if view.loads[expert] > 0 or stays(arc, layer, expert):
                room[FREE_CACHE] -= 1
            else:
                evict(plan, layer, expert)
        elif view.staged[layer, expert] > 0:
            room[HELD] += 1


def load_ahead(
    view: View, plan: Plan, arc: Arc, precision: int, order: IntArray, place_of: IntArray,
    room: IntArray,
) -> None:  # fmt: skip
    """Find every active expert's weights, and copy missing ones while there are free slots.

    Slots of the cache go to what it has admitted: what is there already, then by demand.
    """
    layer = view.layer
    for i in range(view.n_active):
        expert = order[i]
        place_of[expert] = ABSENT
        if view.cached[layer, expert] > 0:
            place_of[expert] = CACHED
        elif view.staged[layer, expert] > 0:
            place_of[expert] = STAGED
            if arc_holds(arc, layer, expert) and room[FREE_CACHE] > 0:
                admit(plan, layer, expert)
                place_of[expert] = CACHED
                room[FREE_CACHE] -= 1
                room[HELD] -= 1
                room[FREE] += 1
    for i in range(view.n_active):
        expert = order[i]
        if place_of[expert] == ABSENT:
            to_cache = arc_holds(arc, layer, expert) and room[FREE_CACHE] > 0
            if to_cache or room[FREE] > 0:
                load(view, plan, arc, precision, expert, place_of, room)


def load(
    view: View, plan: Plan, arc: Arc, precision: int, expert: int, place_of: IntArray,
    room: IntArray,
) -> bool:  # fmt: skip
    """Copy an active expert to where it stays, or into staging; say whether there was a slot.

    An urgent copy takes any staging slot but those that hold what this layer has not run yet: if
    these are all, a wrong guess gives its own up.
    """
    layer = view.layer
    if arc_holds(arc, layer, expert) and room[FREE_CACHE] > 0:
        fetch(plan, layer, expert, precision=precision, into=CACHE, urgent=1)
        place_of[expert] = CACHED
        room[FREE_CACHE] -= 1
        return True
    experts = view.cached.shape[1]
    while room[HELD] == room[SLOTS] and room[NEXT_WRONG] < experts:
        guess = room[NEXT_WRONG]
        room[NEXT_WRONG] += 1
        if view.loads[guess] == 0 and view.staged[layer, guess] > 0:
            cancel(plan, layer, guess)
            room[HELD] -= 1
    if room[HELD] == room[SLOTS]:
        return False
    fetch(plan, layer, expert, precision=precision, urgent=1)
    place_of[expert] = STAGED
    room[HELD] += 1
    room[FREE] -= 1
    return True


def run_all(
    view: View, plan: Plan, arc: Arc, precision: int, order: IntArray, n: int, place_of: IntArray,
    room: IntArray,
) -> None:  # fmt: skip
    """Run those of a list that are active, have not run, and find a slot if they have none yet.

    A victim of the cache leaves it as soon as its run is ordered.
    """
    layer = view.layer
    for i in range(n):
        expert = order[i]
        if view.loads[expert] == 0 or place_of[expert] == RAN:
            continue
        if place_of[expert] == ABSENT and not load(
            view, plan, arc, precision, expert, place_of, room
        ):
            continue
        run_on_gpu(plan, expert)
        if place_of[expert] == STAGED:
            room[HELD] -= 1
        elif not stays(arc, layer, expert):
            evict(plan, layer, expert)
            room[FREE_CACHE] += 1
        place_of[expert] = RAN
