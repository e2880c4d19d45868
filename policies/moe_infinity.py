"""MoE-Infinity, arXiv 2401.14361: the most similar past request says what to prefetch and keep."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np

from moesim.policies.api import (
    CACHE,
    Placement,
    Plan,
    Setting,
    View,
    arriving_ns,
    evict,
    fetch,
    promote,
    queued_ns,
    run_on_gpu,
    transfer_ns,
)
from moesim.types import GPU, H2D, H2D_BACKGROUND, NONE, FloatArray, IntArray

MOST_CELLS = 1 << 23
"""Of the collection: three tables of 64 MiB at most."""

ONE = float(1 << 30)
"""A cosine of 1: similarities are rounded to integers, so that equal ones are and stay equal."""

ANY = 1 << 62
"""Above any expected reuse."""


class Collection(NamedTuple):
    """The activation matrices of past requests (EAMC): tokens that each expert had."""

    tokens: IntArray
    """(entries, layers, experts)."""
    ranked: IntArray
    """(entries, layers, experts): experts, most tokens first, equal ones by id."""
    by_expert: IntArray
    """(layers, experts, entries): `tokens` again."""
    inverse: FloatArray
    """(layers, entries): 1 / length of each row, 0 for a row without tokens."""
    routed: IntArray
    """(entries,): sum of the first row."""


class Request(NamedTuple):
    """The activation matrix of what is being served (EAM), and how similar each past one is."""

    tokens: IntArray
    """(layers, experts)."""
    routed: IntArray
    """(1,): sum of the first row."""
    square: IntArray
    """(layers,): squared length of each row."""
    product: IntArray
    """(layers, entries): scalar product with the row of each entry."""
    cosine: IntArray
    """(layers, entries): in units of 1 / ONE; 0 while either row is empty."""
    seen: IntArray
    """(entries,): summed cosine of all rows."""
    passed: IntArray
    """(entries,): of the rows that this step has come through, this layer's included."""


class Pool(NamedTuple):
    """What the one cache of all layers holds. A cell is layer * experts + expert."""

    cells: IntArray
    """(capacity,): the first `kept` are cached, in any order."""
    at: IntArray
    """(layers * experts,): where each cell is in `cells`, or NONE."""
    kept: IntArray
    """(1,)."""
    visits: IntArray
    """(layers * experts,): layer steps that used an expert, whether it stayed meanwhile or not."""
    ahead_of: IntArray
    """(layers * experts,): the step for which a cell was prefetched last, or NONE."""
    victims: IntArray
    worth: IntArray
    """(experts,): scratch space, of who leaves and what use is expected of it."""


class Outlook(NamedTuple):
    """What is expected after a gate."""

    past: Collection
    request: Request
    match: IntArray
    """(1,): the most similar entry."""
    by_request: int
    """1: cached experts are kept by the tokens of the request, and not of the match."""
    by_visits: int
    """1: of those that may leave, who has the fewest visits leaves."""


class Queue(NamedTuple):
    """Prefetches whose copies may not have begun, and what is next for each layer."""

    cells: IntArray
    """(experts,)."""
    length: IntArray
    """(1,)."""
    rank: IntArray
    """(layers,): of the best expert of each layer to come that is not cached."""


class MoeInfinity(NamedTuple):
    """GPU only: one cache for all layers, filled ahead with what a similar past request used.

    P: the paper; C: the released code (EfficientMoE/MoE-Infinity); I: inferred.

    * State: how many tokens each expert of each layer had, in this request so far (EAM) and in each
      past one (EAMC). Past requests are the sequences of the part of the trace that is not replayed
      [I]. If there are more than `entries`, each replaces the most similar one [P]; in the code,
      the one used least. The requests of a batch share one matrix [I]; the paper has one for each.
    * Match, after each gate: the past request with the highest mean cosine, row by row, over all
      rows seen so far [P]; the first of equals [C]. `match=code`: over the rows of layers to come,
      which earlier tokens of the request have filled, since the code blanks the others. While there
      are none, in a prompt, the answer is the first entry [C].
    * Score of an expert d layers ahead: its tokens in the match x (1 - d/L) [P]; L + 1 for L [C].
    * Prefetch: what is not cached and scores above 0, highest first, in all layers to come; the
      queue is replaced at every layer, and demand copies overtake it [P, C]. The code adds 1e-8 to
      all tokens, and so at last prefetches experts that the match never used; they are left out
      here [I]. Equal scores: the lower layer, then the lower id [I]. A prefetch goes straight into
      the cache, in place of an expert whose expected reuse is lower than its score, or not at all;
      it stays until its layer has run [I].
    * Who leaves: the lowest expected reuse [P], which is the match's tokens x (1 - d/L) for layers
      to come, x (1 - layer/L) for those behind, since the first layers are hardest to prefetch [P;
      that either factor has its place, I]. `evict=request`: the request's own tokens, as in one of
      the code's scores. `evict=code`: the fewest visits, of equals the first by (expert, layer);
      visits of an expert that leaves are not forgotten. Experts of this layer step stay [I].
    * Order: what is there, what is on its way, what must be copied [I]. Every demanded expert is
      admitted, or passes through staging where nobody may leave [I]. The cache begins empty [I].

    The queue is replaced too soon to be written out: of its head, as many copies are ordered as can
    start before the next gate, at most one for each expert of a layer. At that gate those that have
    not begun and that no longer come first are taken back.
    """

    outlook: Outlook
    pool: Pool
    queue: Queue
    alone: int
    """1 where nothing was observed beforehand."""
    prefetches: int
    match_ahead: int
    staging: int

    @classmethod
    def new(
        cls,
        setting: Setting,
        match: Literal["paper", "code"] = "paper",
        evict: Literal["paper", "request", "code"] = "paper",
        prefetch: bool = True,
        entries: int = 1000,
        staging: int = 2,
    ) -> "MoeInfinity":
        """`entries`: past requests remembered; `prefetch=false`: the code for Mixtral and others.

        `staging`: slots for experts that find no place in the cache.
        """
        layers, experts = setting.layers, setting.experts
        cells = layers * experts
        staging = max(1, min(staging, setting.slots))
        matrices = past_requests(setting)
        past = new_collection(matrices, min(entries, max(1, MOST_CELLS // cells)))
        held = len(past.tokens)
        request = Request(
            tokens=np.zeros((layers, experts), np.int64),
            routed=np.zeros(1, np.int64),
            square=np.zeros(layers, np.int64),
            product=np.zeros((layers, held), np.int64),
            cosine=np.zeros((layers, held), np.int64),
            seen=np.zeros(held, np.int64),
            passed=np.zeros(held, np.int64),
        )
        by_request = evict == "request" or not past.tokens.any()
        return cls(
            outlook=Outlook(
                past, request, np.zeros(1, np.int64), int(by_request), int(evict == "code")
            ),
            pool=Pool(
                cells=np.zeros(min(max(0, setting.slots - staging), cells), np.int64),
                at=np.full(cells, NONE),
                kept=np.zeros(1, np.int64),
                visits=np.zeros(cells, np.int64),
                ahead_of=np.full(cells, NONE),
                victims=np.zeros(experts, np.int64),
                worth=np.zeros(experts, np.int64),
            ),
            queue=Queue(
                cells=np.zeros(experts, np.int64),
                length=np.zeros(1, np.int64),
                rank=np.zeros(layers, np.int64),
            ),
            alone=int(len(matrices) == 0),
            prefetches=int(prefetch),
            match_ahead=int(match == "code"),
            staging=staging,
        )

    def place(self, setting: Setting) -> Placement:
        """Give all layers one pool, which is empty."""
        notice = (
            "moe-infinity knows no past request, since nothing of the trace is left beside what is "
            "replayed: it prefetches nothing, and keeps experts by the request's own tokens"
        )
        return Placement(
            cached=np.zeros((setting.layers, setting.experts), np.int64),
            cache_slots=np.array([len(self.pool.cells)]),
            cache_slot_bytes=np.array([setting.expert_bytes]),
            pool_of_layer=np.zeros(setting.layers, np.int64),
            staging_slots=self.staging,
            notices=(notice,) if self.alone else (),
        )

    def dispatch(self, view: View, plan: Plan) -> None:
        """Find the match; replace the queue; run what was chosen; prefetch."""
        note_routing(view, self.outlook.past, self.outlook.request)
        self.outlook.match[0] = most_similar(self.outlook.request, self.match_ahead)
        if self.prefetches:
            for layer in range(view.layer + 1, len(view.cached)):
                seek(self.outlook, self.pool, self.queue, layer)
            take_back(view, plan, self.outlook, self.pool, self.queue)
        missing = run_all(view, plan, self.outlook, self.pool)
        if self.prefetches:
            copy_ahead(view, plan, self.outlook, self.pool, self.queue, missing)


def past_requests(setting: Setting) -> IntArray:
    """Return the matrices of what was observed beforehand (requests, layers, experts)."""
    ids, sequence, _ = setting.offline()
    starts = np.flatnonzero(np.diff(sequence, prepend=NONE))
    ends = np.append(starts, len(ids))[1:]
    cells = setting.layers * setting.experts
    layer = np.arange(setting.layers)[:, np.newaxis] * setting.experts
    matrices = np.zeros((len(starts), cells), np.int64)
    for matrix, start, end in zip(matrices, starts, ends, strict=True):
        part = ids[start:end].astype(np.int64)
        matrix[:] = np.bincount((part + layer)[part != NONE], minlength=cells)
    return matrices.reshape(-1, setting.layers, setting.experts)


def new_collection(matrices: IntArray, most: int) -> Collection:
    """Return up to `most` matrices, each that is too many in place of the most similar one.

    One without tokens stands for none.
    """
    tokens = matrices[:most].copy()
    for matrix in matrices[most:] if most > 0 else ():
        cosine = (unit_rows(tokens) * unit_rows(matrix)).sum(axis=(1, 2))
        tokens[np.argmax(cosine)] = matrix
    if len(tokens) == 0:
        tokens = np.zeros((1, *matrices.shape[1:]), np.int64)
    length = np.sqrt((tokens**2).sum(axis=2))
    inverse = np.divide(1.0, length, out=np.zeros_like(length), where=length > 0)
    return Collection(
        tokens=tokens,
        ranked=np.argsort(-tokens, axis=2, kind="stable"),
        by_expert=np.ascontiguousarray(tokens.transpose(1, 2, 0)),
        inverse=np.ascontiguousarray(inverse.T),
        routed=tokens[:, 0].sum(axis=1),
    )


def unit_rows(tokens: IntArray) -> FloatArray:
    """Return rows scaled to length 1; zeros stay zeros."""
    unit: FloatArray = tokens / np.maximum(np.sqrt((tokens**2).sum(axis=-1, keepdims=True)), 1)
    return unit


def note_routing(view: View, past: Collection, request: Request) -> None:
    """Add what this layer's gate has chosen, and how similar that makes each past request."""
    layer = view.layer
    if layer == 0:
        request.passed[:] = 0
    for i in range(view.n_active):
        expert = view.active[i]
        load = view.loads[expert]
        if layer == 0:
            request.routed[0] += load
        request.square[layer] += load * (2 * request.tokens[layer, expert] + load)
        request.tokens[layer, expert] += load
        for entry in range(len(request.seen)):
            request.product[layer, entry] += load * past.by_expert[layer, expert, entry]
    scale = 0.0
    if request.square[layer] > 0:
        scale = ONE / math.sqrt(request.square[layer])
    for entry in range(len(request.seen)):
        cosine = int(request.product[layer, entry] * past.inverse[layer, entry] * scale + 0.5)
        request.seen[entry] += cosine - request.cosine[layer, entry]
        request.passed[entry] += cosine
        request.cosine[layer, entry] = cosine


def most_similar(request: Request, ahead: int) -> int:
    """Return the first past request with the highest similarity; `ahead`: of layers to come."""
    best = 0
    highest = -1
    for entry in range(len(request.seen)):
        similarity = request.seen[entry]
        if ahead:
            similarity -= request.passed[entry]
        if similarity > highest:
            best = entry
            highest = similarity
    return best


def score(outlook: Outlook, now: int, cell: int) -> int:
    """Return how much the match's tokens speak for prefetching a cell after layer `now`."""
    past = outlook.past
    layers, experts = past.tokens.shape[1:]
    layer = cell // experts
    tokens = past.tokens[outlook.match[0], layer, cell % experts]
    value: int = weighted(tokens, layers, layer - now)
    return value


def kept_by(outlook: Outlook) -> IntArray:
    """Return the tokens by which cached experts are kept (layers, experts)."""
    if outlook.by_request:
        return outlook.request.tokens
    tokens: IntArray = outlook.past.tokens[outlook.match[0]]
    return tokens


def weighted(tokens: Any, layers: int, distance: Any) -> Any:
    """Return tokens x (L - distance), so that of those that have none the nearest come first.

    Of numbers or of arrays.
    """
    return (tokens * (layers + 1) + 1) * (layers - distance)


def comparable(outlook: Outlook, value: int, kept: int) -> int:
    """Return a score, or with `kept` a reuse, as a share of all tokens times the same for both."""
    if outlook.by_request and kept:
        value *= outlook.past.routed[outlook.match[0]]
    elif outlook.by_request:
        value *= outlook.request.routed[0]
    return value


def enter(pool: Pool, cell: int) -> None:
    """Note that an expert takes a free place."""
    at = pool.kept[0]
    pool.cells[at] = cell
    pool.at[cell] = at
    pool.kept[0] = at + 1


def give_up(plan: Plan, pool: Pool, cell: int, experts: int) -> None:
    """Evict an expert, or take back its copy if that has not begun."""
    last = pool.cells[pool.kept[0] - 1]
    pool.cells[pool.at[cell]] = last
    pool.at[last] = pool.at[cell]
    pool.at[cell] = NONE
    pool.kept[0] -= 1
    evict(plan, cell // experts, cell % experts)


def list_victims(view: View, outlook: Outlook, pool: Pool, below: int, most: int) -> int:
    """List up to `most` cached experts, who leaves first being first, and return how many.

    Experts of this layer step stay, what was prefetched for a layer to come does, and whatever is
    expected to be reused `below` or more.
    """
    tokens = kept_by(outlook)
    layers, experts = tokens.shape
    cells = pool.cells[: pool.kept[0]]
    layer = cells // experts
    expert = cells % experts
    now = view.layer
    expected = weighted(tokens.ravel()[cells], layers, np.where(layer > now, layer - now, layer))
    stays = (layer == now) & (view.loads[expert] > 0)
    stays = stays | ((layer > now) & (pool.ahead_of[cells] == view.step))
    worth = expected * comparable(outlook, 1, 1)
    stays = stays | (worth >= below)
    key = expected * layers * experts + cells
    if outlook.by_visits:
        key = pool.visits[cells] * layers * experts + expert * layers + layer
    key = np.where(stays, ANY, key)
    for n in range(min(most, len(cells))):
        first = np.argmin(key)
        if key[first] == ANY:
            return n
        pool.victims[n] = cells[first]
        pool.worth[n] = worth[first]
        key[first] = ANY
    return min(most, len(cells))


def run_all(view: View, plan: Plan, outlook: Outlook, pool: Pool) -> int:
    """Run every active expert: what is there, what is on its way, what must be copied.

    Return how many must be copied.
    """
    layer = view.layer
    experts = view.cached.shape[1]
    missing = 0
    for turn in range(2):
        for i in range(view.n_active):
            expert = view.active[i]
            if pool.at[layer * experts + expert] == NONE:
                missing += turn
            elif (arriving_ns(view, layer, expert) > 0) == (turn == 1):
                promote(plan, layer, expert)
                run_on_gpu(plan, expert)
    free = len(pool.cells) - pool.kept[0]
    victims = list_victims(view, outlook, pool, ANY, missing - free)
    used = 0
    for i in range(view.n_active):
        expert = view.active[i]
        cell = layer * experts + expert
        pool.visits[cell] += 1
        if pool.at[cell] == NONE:
            if pool.kept[0] == len(pool.cells) and used < victims:
                give_up(plan, pool, pool.victims[used], experts)
                used += 1
            if pool.kept[0] < len(pool.cells):
                enter(pool, cell)
                fetch(plan, layer, expert, into=CACHE, urgent=1)
            run_on_gpu(plan, expert)
    return missing


def seek(outlook: Outlook, pool: Pool, queue: Queue, layer: int) -> None:
    """Find the best expert of a layer that is not cached; rank `experts` stands for none."""
    match = outlook.match[0]
    ranked = outlook.past.ranked
    experts = ranked.shape[2]
    rank = 0
    while rank < experts and outlook.past.tokens[match, layer, ranked[match, layer, rank]] > 0:
        if pool.at[layer * experts + ranked[match, layer, rank]] == NONE:
            queue.rank[layer] = rank
            return
        rank += 1
    queue.rank[layer] = experts


def first_of_queue(view: View, outlook: Outlook, queue: Queue) -> int:
    """Return the cell with the highest score that is not cached, or NONE."""
    ranked = outlook.past.ranked
    _, layers, experts = ranked.shape
    best = NONE
    highest = 0
    for layer in range(view.layer + 1, layers):
        if queue.rank[layer] < experts:
            cell = layer * experts + ranked[outlook.match[0], layer, queue.rank[layer]]
            value = score(outlook, view.layer, cell)
            if value > highest:
                best = cell
                highest = value
    return best


def take_back(view: View, plan: Plan, outlook: Outlook, pool: Pool, queue: Queue) -> None:
    """Take back what has not begun and is no longer first; what is needed now is a demand."""
    experts = view.cached.shape[1]
    first = first_of_queue(view, outlook, queue)
    highest = 0 if first == NONE else score(outlook, view.layer, first)
    copy_ns = transfer_ns(view)
    n = 0
    for i in range(queue.length[0]):
        cell = queue.cells[i]
        layer = cell // experts
        expert = cell % experts
        needed = layer == view.layer and view.loads[expert] > 0
        if needed or arriving_ns(view, layer, expert) <= copy_ns:
            continue
        if layer > view.layer and score(outlook, view.layer, cell) >= highest:
            queue.cells[n] = cell
            n += 1
        else:
            give_up(plan, pool, cell, experts)
            if layer > view.layer:
                seek(outlook, pool, queue, layer)
    queue.length[0] = n


def copy_ahead(
    view: View, plan: Plan, outlook: Outlook, pool: Pool, queue: Queue, missing: int
) -> None:
    """Order the first copies of the queue, as many as can start before the next gate."""
    experts = view.cached.shape[1]
    most = min(copies_before_gate(view, missing), experts - queue.length[0])
    victims = NONE
    used = 0
    for _ in range(most):
        cell = first_of_queue(view, outlook, queue)
        if cell == NONE:
            return
        if pool.kept[0] == len(pool.cells):
            value = comparable(outlook, score(outlook, view.layer, cell), 0)
            if victims == NONE:
                victims = list_victims(view, outlook, pool, value, most)
            # Scores fall from one prefetch to the next: who stays for one stays for all others.
            while used < victims and value <= pool.worth[used]:
                used += 1
            if used == victims:
                return
            give_up(plan, pool, pool.victims[used], experts)
            used += 1
        enter(pool, cell)
        pool.ahead_of[cell] = view.step
        fetch(plan, cell // experts, cell % experts, into=CACHE)
        queue.cells[queue.length[0]] = cell
        queue.length[0] += 1
        seek(outlook, pool, queue, cell // experts)


def copies_before_gate(view: View, missing: int) -> int:
    """Return how many copies can start before the next layer's gate, behind those on demand."""
    copy_ns = transfer_ns(view)
    demanded_ns = queued_ns(view, H2D) + missing * copy_ns
    start_ns = max(demanded_ns, queued_ns(view, H2D_BACKGROUND) + missing * copy_ns)
    gate_ns = queued_ns(view, GPU)
    if missing > 0:
        gate_ns = max(gate_ns, demanded_ns)
    gate_ns += view.window_ns
    return max(0, (gate_ns - start_ns + copy_ns - 1) // copy_ns)
