"""MoEpic, arXiv 2509.08342: experts split in two, of which the GPU caches the tops of many."""

from typing import Literal, NamedTuple

import numpy as np

from moesim.costs import Costs, copy_ns, duration_ns, part_bytes
from moesim.errors import InputError, PolicyError
from moesim.forecast import left_ns
from moesim.policies.api import (
    BOTH,
    CACHE,
    FIRST,
    REST,
    Placement,
    Plan,
    Prediction,
    Setting,
    Table,
    View,
    admit,
    arriving_ns,
    cancel,
    evict,
    fetch,
    promote,
    resize,
    run_on_gpu,
)
from moesim.policies.dali import rank_guesses
from moesim.policies.parts.cache import (
    Lcp,
    lcp_count,
    lcp_enter,
    lcp_priority,
    lcp_victim,
    new_lcp,
)
from moesim.policies.parts.split import (
    Behaviour,
    Layout,
    Moves,
    Times,
    configure,
    forget,
    new_behaviour,
    new_moves,
    observe,
    observed,
    outcomes,
    place_of,
    waiting_ns,
)
from moesim.types import (
    ATTENTION,
    COMBINE,
    DECODE,
    GATE,
    H2D,
    HEAD,
    NONE,
    PREFILL,
    SHARED,
    WHOLE,
    FloatArray,
    IntArray,
)

MOST_OBSERVED = 2_000
"""Tokens that the configurator looks at beforehand."""

LEAST_EPSILON = 0.001
"""With smaller steps `MOST_MOVES` would end the search early."""


class Moepic(NamedTuple):
    """Caches the first part, the top, of more experts than would fit whole; the rest comes in time.

    Secondary sources on the paper, whose text is not public: an expert is cut in two at `theta` of
    its bytes; only tops are cached, per layer, by least cache priority (`parts.cache.Lcp`); after
    attention the next layer's router is applied to what this layer's is, and the likeliest top_k
    experts are fetched in that order into a buffer of top_k whole experts: the bottom where the top
    is cached, else all; after the last layer the same for layer 0 of the next token. Active experts
    run as far as they are there, and what is missing is copied on demand; on a miss the top is
    admitted. The configurator (`parts.split`, a reconstruction) finds theta and how many tops per
    layer, from what was seen, at the start and every 5,000 tokens.

    Inferred: everything that is complete runs first, then the tops of the others, then the rest in
    the order of arrival; wrong guesses are given up when the router has chosen; demands overtake
    copies that have not begun; active experts stay, and only they are admitted; uses count on after
    an expert has left; what the configurator sees beforehand is the part of the trace that is not
    replayed, and later what was decoded since it last ran; the most popular tops are cached at the
    start, the least popular of them first; a new layout begins empty in each layer that changes,
    and its tops of the highest priority are copied as the layers come, with the run going on.

    Deviates: the buffer holds twice top_k; with top_k, demands take the place of guesses.

    With several tokens at once guesses are ranked by the tokens that have them, an expert counts
    for each of its tokens, and the configurator still plans for one sequence.
    """

    fixed: int
    """1: theta is given; no configurator."""
    period: int
    prefetch: int
    buffer: int
    even_bytes: int
    """Of the cache for each layer, before the configurator moves `unit_bytes` at a time."""
    unit_bytes: int
    expert_bytes: IntArray
    """(layers,)."""
    lcp: Lcp
    layout: Layout
    fresh: Layout
    """What the configurator finds next."""
    seen: Behaviour
    times: Times
    moves: Moves
    tokens: IntArray
    """(1,): routed since the configurator last ran."""
    refill: IntArray
    """(layers,): 1 where a new layout is to be filled."""
    guesses: IntArray
    """(2, experts): for layers of even and odd number, best first."""
    n_guesses: IntArray
    """(2,)."""
    listed: IntArray
    """(experts,): scratch space, as are the next three."""
    named: IntArray
    priorities: FloatArray
    trial: FloatArray
    """(3, layers)."""
    prediction: Prediction
    link: str

    @classmethod
    def new(
        cls,
        setting: Setting,
        theta: str = "auto",
        prefetch: bool = True,
        epsilon: float = 0.01,
        period: int = 5000,
        buffer: int = 0,
        predictor: str = "auto",
        recall: float = 0.9,
        link: Literal["priority", "fifo"] = "priority",
    ) -> "Moepic":
        """`theta` from 0 (nothing is cached) to 1 (whole experts), the same for every layer; auto:
        as the configurator finds it, which moves `epsilon` of the cache at a time, and runs again
        after `period` tokens (0: never).

        `buffer` whole experts for what is not cached; 0: twice top_k, at most half of the budget.
        `recall` is of predictor=noisy-oracle; link=fifo lets demands queue behind everything.
        """
        layers, experts, ranks = setting.layers, setting.experts, setting.top_k
        if setting.slots == 0:
            raise PolicyError(
                f"a budget of {setting.budget_bytes} bytes holds no expert of "
                f"{setting.expert_bytes} bytes, and MoEpic computes none on the CPU"
            )
        if not LEAST_EPSILON <= epsilon <= 1:
            raise InputError(
                f"policy moepic: epsilon={epsilon} is not legal; {LEAST_EPSILON} to 1 is"
            )
        buffer = min(buffer, setting.slots) or min(2 * ranks, max(1, setting.slots // 2))
        cache_bytes = setting.budget_bytes - buffer * setting.expert_bytes
        prediction = Prediction(predictor, after_gate=False, recall=recall, wraps=True)
        part = part_of(theta)
        layout = even(setting, cache_bytes, WHOLE // 2 if part == NONE else part)
        policy = cls(
            fixed=int(part != NONE),
            period=period,
            prefetch=int(prefetch),
            buffer=buffer,
            even_bytes=cache_bytes // layers,
            unit_bytes=int(cache_bytes * epsilon),
            expert_bytes=setting.costs.expert_bytes[:, setting.precision].copy(),
            lcp=new_lcp(layers, experts),
            layout=layout,
            fresh=new_layout(layers),
            seen=new_behaviour(layers, ranks, experts),
            times=times_of(setting, prefetch),
            moves=new_moves(),
            tokens=np.zeros(1, np.int64),
            refill=np.zeros(layers, np.int64),
            guesses=np.zeros((2, experts), np.int64),
            n_guesses=np.zeros(2, np.int64),
            listed=np.zeros(experts, np.int64),
            named=np.zeros(experts, np.int64),
            priorities=np.zeros(experts),
            trial=np.zeros((3, layers)),
            prediction=prediction,
            link=link,
        )
        seen = beforehand(policy, setting)
        if part == NONE and seen.steps.all():
            find_layout(policy, seen)
            layout.tops[:], layout.part[:] = policy.fresh.tops, policy.fresh.part
        return policy

    def place(self, setting: Setting) -> Placement:
        """Cache the most popular tops of each layer, as many as its layout says."""
        cached = np.zeros((setting.layers, setting.experts), np.int64)
        by_use = np.argsort(-setting.popularity, axis=1, kind="stable")
        for layer, tops in enumerate(self.layout.tops):
            # Of experts that were never used, the one cached first leaves first.
            for expert in by_use[layer, :tops][::-1]:
                cached[layer, expert] = self.layout.part[layer]
                lcp_enter(self.lcp, layer, int(expert))
        slot_bytes = [
            part_bytes(setting.costs, layer, setting.precision, 0, int(part))
            for layer, part in enumerate(self.layout.part)
        ]
        again = self.fixed == 0 and self.period > 0
        notices = []
        if self.fixed == 0 and len(setting.offline().ids) == 0:
            notices.append(
                "moepic's configurator looks at the part of the trace that is not replayed, and "
                "nothing is left of it: half of each expert is cached"
                + (f" for the first {self.period} tokens" if again else "")
            )
        return Placement(
            cached=cached,
            cache_slots=self.layout.tops.copy(),
            cache_slot_bytes=np.array(slot_bytes),
            pool_of_layer=np.arange(setting.layers),
            spare_slots=cached.size - int(self.layout.tops.sum()) if again else 0,
            staging_slots=self.buffer,
            predictions=(self.prediction,) if self.prefetch else (),
            link=self.link,  # type: ignore[arg-type]
            # Copies are not interrupted; what has not begun may be overtaken.
            chunk_bytes=setting.expert_bytes,
            notices=tuple(notices),
        )

    def plan(self, setting: Setting) -> tuple[Table, ...]:
        """Show what the configurator predicts, layout by layout and move by move."""
        return explained(self, setting)

    def before_attention(self, view: View, plan: Plan) -> None:
        """Between two steps, divide the cache anew if it is time; then fill the new layers."""
        due = self.fixed == 0 and 0 < self.period <= self.tokens[0]
        if view.layer == 0 and due and self.seen.steps[0] > 0:
            self.tokens[0] = 0
            configure(
                self.seen, self.times, self.even_bytes, self.unit_bytes, self.expert_bytes,
                self.fresh, self.moves, self.trial,
            )  # fmt: skip
            forget(self.seen)
            change_layout(view, plan, self.lcp, self.layout, self.fresh, self.refill)
        if self.refill[view.layer] == 1:
            self.refill[view.layer] = 0
            fill(view, plan, self.lcp, self.layout, self.priorities)

    def before_gate(self, view: View, plan: Plan) -> None:
        """Fetch what the next layer is guessed to need, of cached experts the bottoms."""
        layers = len(view.cached)
        now = (view.step * layers + view.layer) % 2
        self.n_guesses[1 - now] = 0
        if self.prefetch == 0 or view.predicted_tokens[0] == 0:
            return
        guesses = self.guesses[1 - now]
        n = min(rank_guesses(view, guesses, self.listed), self.seen.right.shape[1])
        self.n_guesses[1 - now] = n
        target = (view.layer + 1) % layers
        for i in range(n):
            expert = guesses[i]
            if view.cached[target, expert] < WHOLE:
                fetch(plan, view.layer + 1, expert)

    def dispatch(self, view: View, plan: Plan) -> None:
        """Give up wrong guesses, demand what is missing, and run whatever is there first."""
        layer = view.layer
        now = (view.step * len(view.cached) + layer) % 2
        guesses, n = self.guesses[now], self.n_guesses[now]
        if layer == 0:
            self.tokens[0] += view.tokens
        if self.fixed == 0 and self.period > 0 and view.phase == DECODE:
            prioritise(self.lcp, layer, self.priorities)
            observe(
                self.seen, layer, guesses, n, view.active, view.n_active, self.priorities,
                self.named,
            )  # fmt: skip
        lcp_count(self.lcp, layer, view.ids, view.tokens, int(view.phase == PREFILL))
        for i in range(n):
            if view.loads[guesses[i]] == 0:
                cancel(plan, layer, guesses[i])
            elif view.staged[layer, guesses[i]] > 0:
                promote(plan, layer, guesses[i])
        for i in range(view.n_active):
            demand(view, plan, self.lcp, self.layout.part[layer], view.active[i])
        run_in_order(view, plan, guesses, n, self.named)

    def after_layer(self, view: View, plan: Plan) -> None:
        """Admit the tops of what came whole into the buffer and was needed."""
        layer = view.layer
        for i in range(view.n_active):
            expert = view.active[i]
            came_whole = view.cached[layer, expert] == 0 and view.staged[layer, expert] == WHOLE
            if came_whole and replace_one(view, plan, self.lcp, expert):
                admit(plan, layer, expert, self.layout.part[layer])


# What a layer does.


def prioritise(lcp: Lcp, layer: int, priorities: FloatArray) -> None:
    """Fill in every expert's priority (experts,)."""
    for expert in range(len(priorities)):
        priorities[expert] = lcp_priority(lcp, layer, expert)


def replace_one(view: View, plan: Plan, lcp: Lcp, expert: int) -> bool:
    """Give up the victim for an expert that is to be cached; say whether there was one."""
    victim = lcp_victim(lcp, view.layer, view.loads)
    if victim == NONE:
        return False
    lcp.held[view.layer, victim] = 0
    evict(plan, view.layer, victim)
    lcp_enter(lcp, view.layer, expert)
    return True


def demand(view: View, plan: Plan, lcp: Lcp, part: int, expert: int) -> None:
    """Copy what is missing of an active expert, the top into the cache."""
    layer = view.layer
    there = view.cached[layer, expert] + view.staged[layer, expert]
    if there >= WHOLE:
        return
    if there == 0 and replace_one(view, plan, lcp, expert):
        fetch(plan, layer, expert, part, into=CACHE, urgent=1)
    fetch(plan, layer, expert, urgent=1)


DONE, TOP_RUN = 1, 2


def run_in_order(view: View, plan: Plan, guesses: IntArray, n: int, state: IntArray) -> None:
    """Run what is complete, then the tops that are there, then the rest in the order of arrival.

    `state` is scratch space (experts,), zero before and after.
    """
    layer = view.layer
    for i in range(view.n_active):
        expert = view.active[i]
        there = view.cached[layer, expert] + view.staged[layer, expert]
        if there >= WHOLE and arriving_ns(view, layer, expert) == 0:
            run_on_gpu(plan, expert)
            state[expert] = DONE
    for i in range(view.n_active):
        expert = view.active[i]
        top = view.cached[layer, expert]
        if (
            0 < top < WHOLE
            and state[expert] == 0
            and view.staged[layer, expert] < WHOLE
            and left_ns(view.forecast, view.cached_ticket[layer, expert]) == 0
        ):
            run_on_gpu(plan, expert, FIRST)
            state[expert] = TOP_RUN
    for i in range(n):
        if view.loads[guesses[i]] > 0 and view.staged[layer, guesses[i]] > 0:
            run_rest(plan, guesses[i], state)
    for i in range(view.n_active):
        run_rest(plan, view.active[i], state)
    for i in range(view.n_active):
        state[view.active[i]] = 0


def run_rest(plan: Plan, expert: int, state: IntArray) -> None:
    """Run what is left of an expert."""
    if state[expert] != DONE:
        run_on_gpu(plan, expert, REST if state[expert] == TOP_RUN else BOTH)
        state[expert] = DONE


# A new layout.


def change_layout(
    view: View, plan: Plan, lcp: Lcp, layout: Layout, fresh: Layout, refill: IntArray
) -> None:
    """Divide the cache as `fresh` says, first where it shrinks; layers that change begin empty."""
    for grows in range(2):
        for layer in range(len(layout.tops)):
            tops, part = fresh.tops[layer], fresh.part[layer]
            more = tops * part - layout.tops[layer] * layout.part[layer]
            if (tops != layout.tops[layer] or part != layout.part[layer]) and (
                (more > 0) == (grows == 1)
            ):
                slot_bytes = part_bytes(view.costs, layer, view.precision, 0, part)
                resize(plan, layer, tops, slot_bytes)
                for expert in range(lcp.held.shape[1]):
                    lcp.held[layer, expert] = 0
                layout.tops[layer] = tops
                layout.part[layer] = part
                refill[layer] = 1


def fill(view: View, plan: Plan, lcp: Lcp, layout: Layout, priorities: FloatArray) -> None:
    """Copy the tops of the highest priority into a layer that is empty."""
    prioritise(lcp, view.layer, priorities)
    for expert in range(len(priorities)):
        if place_of(priorities, expert) < layout.tops[view.layer]:
            lcp_enter(lcp, view.layer, expert)
            fetch(plan, view.layer, expert, layout.part[view.layer], into=CACHE)


# What is known beforehand.


def part_of(theta: str) -> int:
    """Return a split ratio in 1/1024, NONE for auto; raise InputError for anything else."""
    if theta == "auto":
        return NONE
    try:
        value = float(theta)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise InputError(f"policy moepic: theta={theta} is not legal; auto or 0 to 1 is")
    return round(value * WHOLE)


def new_layout(layers: int) -> Layout:
    """Return the layout of an empty cache."""
    units, tops, part = np.zeros((3, layers), np.int64)
    return Layout(units, tops, part, np.zeros(layers))


def even(setting: Setting, cache_bytes: int, part: int) -> Layout:
    """Return the layout in which every layer has as many bytes, and this part of its experts.

    Of what is left over, the first layers cache one more.
    """
    layout = new_layout(setting.layers)
    sizes = [
        part_bytes(setting.costs, layer, setting.precision, 0, part)
        for layer in range(setting.layers)
    ]
    for layer, top_bytes in enumerate(sizes):
        if top_bytes > 0:
            fitting = cache_bytes // setting.layers // top_bytes
            layout.tops[layer] = min(fitting, setting.experts)
    left_bytes = cache_bytes - int(layout.tops @ np.array(sizes))
    for layer, top_bytes in enumerate(sizes):
        if 0 < top_bytes <= left_bytes and layout.tops[layer] < setting.experts:
            layout.tops[layer] += 1
            left_bytes -= top_bytes
    layout.part[:] = np.where(layout.tops > 0, part, 0)
    return layout


def times_of(setting: Setting, prefetch: bool) -> Times:
    """Return what a token of one sequence takes, with the context that the run ends with."""
    costs, layers = setting.costs, setting.layers
    context = setting.kv_tokens // max(1, setting.sequences)
    attention = np.array([duration(costs, ATTENTION, la, context) for la in range(layers)])
    gate = duration(costs, GATE, 0)
    gpu = int(costs.expert_gpu_ns[setting.precision, 1])
    experts = setting.top_k * gpu + duration(costs, SHARED, 0) + duration(costs, COMBINE, 0)
    head = duration(costs, HEAD, 0)
    window = attention + float(experts + gate)
    window[0] += head
    copies = [copy_ns(costs, H2D, int(b)) for b in costs.expert_bytes[:, setting.precision]]
    # A guess costs what a gate costs.
    rest = attention.sum() + layers * (experts + (1 + prefetch) * gate) + head
    return Times(window, np.array(copies, np.float64), float(gpu), float(rest))


def duration(costs: Costs, kind: int, layer: int, context: int = 0) -> int:
    """Return what an operation takes for one token of decoding."""
    return duration_ns(costs, DECODE, kind, layer, 1, context, WHOLE, 0)


def beforehand(policy: Moepic, setting: Setting) -> Behaviour:
    """Return what the part of the trace that is not replayed shows."""
    offline = setting.offline(policy.prediction if policy.prefetch else None)
    ids, guesses = offline.ids[:MOST_OBSERVED], offline.guesses[:MOST_OBSERVED, :, : setting.top_k]
    if len(ids) == 0:
        return new_behaviour(setting.layers, setting.top_k, setting.experts)
    if not policy.prefetch:
        guesses = np.full_like(ids, NONE)
    return observed(ids, guesses, policy.lcp.decay, setting.experts)


def find_layout(policy: Moepic, seen: Behaviour) -> int:
    """Let the configurator fill in `policy.fresh` and `policy.moves`, and return the moves made."""
    return configure(
        seen, policy.times, policy.even_bytes, policy.unit_bytes, policy.expert_bytes,
        policy.fresh, policy.moves, policy.trial,
    )  # fmt: skip


# What `moesim plan` shows.

MOST_ROWS = 20


def explained(policy: Moepic, setting: Setting) -> tuple[Table, ...]:
    """Return the layout, what it is predicted to be worth, and how it was found."""
    seen = beforehand(policy, setting)
    if not seen.steps.all():
        return (layers_of(policy, None),)
    cache_bytes = setting.budget_bytes - policy.buffer * setting.expert_bytes
    rows = []
    for theta in (0, 0.5, 1):
        layout = even(setting, cache_bytes, round(theta * WHOLE))
        rows.append(predicted(policy, seen, f"theta={theta:g} in every layer", layout))
    label = "theta as given" if policy.fixed else "as configured"
    rows.insert(0, predicted(policy, seen, label, policy.layout))
    guessed = "nothing is fetched ahead"
    if policy.prefetch:
        share = seen.right.sum() / max(1, seen.guessed.sum())
        guessed = f"{share:.1%} of the guesses (predictor={policy.prediction.predictor}) are right"
    tables = [
        Table(
            "Predicted for one sequence",
            ("layout", "waiting for weights, ms/token", "TPOT, ms"),
            tuple(rows),
            f"A copy takes {policy.times.copy.mean() / 1e6:.3f} ms, and {guessed}, over "
            f"{seen.steps[0]} tokens that are not replayed. The host's own time is not counted.",
        )
    ]
    if not policy.fixed:
        made = find_layout(policy, seen)
        shown = sorted({*np.linspace(0, made, min(made + 1, MOST_ROWS)).round().astype(int)})
        tables.append(
            Table(
                f"The configurator's {made} moves of {policy.unit_bytes / 2**20:.3g} MiB",
                ("move", "from layer", "to layer", "waiting, ms/token", "TPOT, ms"),
                tuple(moved(policy, int(at)) for at in shown),
                "" if len(shown) > made else f"{len(shown)} of {made + 1} rows are shown.",
            )
        )
    return (*tables, layers_of(policy, seen))


def predicted(
    policy: Moepic, seen: Behaviour, name: str, layout: Layout
) -> tuple[str, float, float]:
    """Return what a layout lets a token wait, and its TPOT, in ms."""
    waits = 0.0
    for layer, tops in enumerate(layout.tops):
        part = int(layout.part[layer])
        _, late_ns = outcomes(seen, policy.times, layer, np.array([tops]), np.array([part]))
        missed = int(seen.missed[layer, :tops].sum())
        waits += waiting_ns(seen, policy.times, layer, float(late_ns[0]), part, missed)
    return name, waits / 1e6, (waits + policy.times.rest) / 1e6


def moved(policy: Moepic, at: int) -> tuple[int, object, object, float, float]:
    """Return the row of a move; number 0 is the start."""
    waits = policy.moves.total_ns[at]
    if at == 0:
        return at, "", "", float(waits / 1e6), float((waits + policy.times.rest) / 1e6)
    giver, taker = int(policy.moves.giver[at - 1]), int(policy.moves.taker[at - 1])
    return at, giver, taker, float(waits / 1e6), float((waits + policy.times.rest) / 1e6)


def layers_of(policy: Moepic, seen: Behaviour | None) -> Table:
    """Return what each layer caches, and what was seen there."""
    columns = ["layer", "tops", "theta", "whole experts"]
    layout = policy.layout
    rows = [
        [layer, int(tops), float(part / WHOLE), float(tops * part / WHOLE)]
        for layer, (tops, part) in enumerate(zip(layout.tops, layout.part, strict=True))
    ]
    if seen is not None:
        columns += ["window, ms", "guesses right", "guesses cached"]
        for layer, row in enumerate(rows):
            guessed = max(1, int(seen.guessed[layer]))
            cached = int(seen.held[layer, layout.tops[layer]] @ np.arange(seen.right.shape[1] + 1))
            right = int(seen.right[layer].sum())
            row += [float(policy.times.window[layer] / 1e6), right / guessed, cached / guessed]
    return Table("Cached per layer", tuple(columns), tuple(map(tuple, rows)))
