"""Klotski's planner (arXiv 2502.06888, sections 6.1 and 7): how many batches, and what is where."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moesim.costs import copy_ns, duration_ns
from moesim.errors import InputError
from moesim.policies.api import Setting, Table
from moesim.types import ATTENTION, DECODE, H2D, WHOLE, FloatArray

MOST_BATCHES = 1024
"""Larger groups are not looked for."""

LARGEST_BATCH = 64
"""Sequences of a batch unless the user says otherwise: the most that the paper uses."""

RESERVE_BYTES = 1 << 30
"""Of the GPU's memory, for activations and the runtime."""


class Block(NamedTuple):
    """What one block of one step takes with n batches, in any unit of time."""

    n: int
    attention: float
    """t_A, of one batch."""
    gate: float
    """t_G, of one batch."""
    copy: float
    """t_copy, of one expert."""
    gate_copy: float
    """io_G, of the gate's weights."""
    attention_copy: float
    """io_A, of the next attention's weights."""
    experts: int
    """Experts of the layer."""
    hot: int
    """K, the experts prefetched."""
    others: float
    """|Q|, the other active ones."""
    hot_compute: float
    """t_hot, of all hot experts over the whole group."""
    others_compute: float
    """The sum of t_q over the others, likewise."""


class Inequality(NamedTuple):
    """Computation on the left side, which hides the copies on the right side, or not."""

    name: str
    """As the paper numbers it."""
    copies: str
    """What it hides, in words."""
    left: float
    right: float
    required: bool

    @property
    def holds(self) -> bool:
        """Whether the copies are hidden."""
        return bool(self.left >= self.right)


def inequalities(block: Block, waits: bool) -> tuple[Inequality, ...]:
    """Return (1), (2) and (4) to (7) for one block.

    (1) is what prefetching the whole layer would take, for comparison only. (2) is required where
    the gate `waits` for the hot experts, as in the released code.
    """
    attention = block.n * block.attention
    gated = attention + block.n * block.gate
    computed = gated + block.hot_compute
    whole = block.gate_copy + block.experts * block.copy
    hot = block.gate_copy + block.hot * block.copy
    last = hot + block.others * block.copy + block.attention_copy
    return (
        Inequality("(1)", "the whole layer", attention, whole, False),
        Inequality("(2)", "hot ones, until attention ends", attention, hot, waits),
        Inequality("(4)", "the gate", attention, block.gate_copy, True),
        Inequality("(5)", "hot ones, until the gate ends", gated, hot, True),
        Inequality("(6)", "one more expert", computed, hot + block.copy, block.others > 0),
        Inequality(
            "(7)", "all, and the next attention", computed + block.others_compute, last, True
        ),
    )


def smallest(block_at: Callable[[int], Block], waits: bool, most: int) -> int:
    """Return the smallest n of 1 to `most` for which all that is required holds, or 0."""
    for n in range(1, most + 1):
        if all(one.holds for one in inequalities(block_at(n), waits) if one.required):
            return n
    return 0


class Home(NamedTuple):
    """What is where."""

    resident_layers: int
    """The first layers, whose experts are on the GPU for good."""
    staging: int
    """Slots for experts of the other layers."""
    host_layers: int
    """The first layers, whose experts are on the GPU or in host memory; the others are on disk."""
    dense_on_host: bool
    kv_on_host: bool


class Group(NamedTuple):
    """How the sequences of a run are split, and how many batches would hide all copies."""

    n: int
    """Batches of the run."""
    bs: int
    """Sequences of the largest of them."""
    hiding: int
    """The smallest n that hides all copies with batches of `bs`; 0: none up to MOST_BATCHES."""
    fitting: int
    """The most batches of `bs` that fit in memory."""

    @property
    def wanted(self) -> int:
        """What hides all copies, lowered to what fits: the n that Klotski takes; 0: unknown."""
        return min(self.hiding, self.fitting)


class Planner(NamedTuple):
    """All that the planner reckons with."""

    setting: Setting
    home: Home
    hot: int
    merge_gemm: bool
    waits: bool
    """The gate waits for the hot experts."""
    share: FloatArray
    """(experts,): how likely a token chooses a layer's most popular expert, its second, ..."""


def mean_shares(setting: Setting) -> FloatArray:
    """Return `Planner.share`, averaged over layers; alike for all if nothing was observed."""
    counts = np.sort(setting.popularity, axis=1)[:, ::-1]
    tokens = counts.sum(axis=1, keepdims=True) / setting.top_k
    share = np.full(counts.shape, setting.top_k / setting.experts)
    np.divide(counts, tokens, out=share, where=tokens > 0)
    mean: FloatArray = np.minimum(share, 1.0).mean(axis=0)
    return mean


def block_of(planner: Planner, n: int, bs: int) -> Block:
    """Return what a block of a decode step takes with n batches of `bs` sequences.

    Each attends to as many tokens as the prompts have on average. Which experts will be active
    follows from their popularity. The gate's weights travel with those of attention: io_G is 0.
    """
    setting, hot = planner.setting, planner.hot
    costs, last = setting.costs, setting.layers - 1
    context = bs * -(-setting.step_tokens // setting.sequences)
    active = 1 - (1 - planner.share) ** (n * bs)
    compute = expert_ns(planner, n, bs)
    streamed = int(costs.attention_bytes[last]) if planner.home.dense_on_host else 0
    return Block(
        n=n,
        attention=duration_ns(costs, DECODE, ATTENTION, last, bs, context, WHOLE, 0),
        gate=int(costs.gate_ns[bs]),
        copy=copy_ns(costs, H2D, setting.expert_bytes),
        gate_copy=0,
        attention_copy=copy_ns(costs, H2D, streamed),
        experts=setting.experts,
        hot=hot,
        others=float(active[hot:].sum()),
        hot_compute=float(compute[:hot].sum()),
        others_compute=float(compute[hot:].sum()),
    )


def expert_ns(planner: Planner, n: int, bs: int) -> FloatArray:
    """Return (experts,): the expected time of each over a group, from the most popular one on.

    One GEMM in each batch that has tokens for it, or one for all. Beyond the cost table time grows
    with tokens.
    """
    runs, size = (1, n * bs) if planner.merge_gemm else (n, bs)
    active = 1 - (1 - planner.share) ** size
    table = planner.setting.costs.expert_gpu_ns[planner.setting.precision]
    tokens = np.maximum(1, np.rint(size * planner.share / np.maximum(active, 1e-12)))
    known = np.minimum(tokens, len(table) - 1).astype(np.int64)
    ns: FloatArray = runs * active * table[known] * (tokens / known)
    return ns


def group(planner: Planner, n: int, bs: int) -> Group:
    """Split the sequences of the run into n batches, or batches of `bs`; 0: not given.

    Their number being what it is, smaller batches only read the same weights more often and hide no
    more; hence the largest usual ones by default. How many would hide all is the planner's answer.
    """
    there = planner.setting.sequences
    if n > 0 and bs > 0 and n != -(-there // bs):
        raise InputError(
            f"policy klotski: n={n} batches of bs={bs} are not the {there} sequences of the run; "
            f"give one of both"
        )
    n = min(n or -(-there // (bs or LARGEST_BATCH)), there)
    bs = -(-there // n)
    hiding = smallest(lambda n: block_of(planner, n, bs), planner.waits, MOST_BATCHES)
    return Group(n, bs, hiding, fitting_batches(planner.setting, bs))


def dense_bytes(setting: Setting) -> int:
    """Return the weights outside the experts, without embeddings."""
    return int(setting.costs.attention_bytes.sum())


def kv_bytes(setting: Setting) -> int:
    """Return the keys and values of all sequences at the end of the run."""
    return setting.kv_tokens * int(setting.costs.kv_bytes.sum())


def layer_bytes(setting: Setting) -> int:
    """Return the experts of the largest layer."""
    return setting.expert_bytes * setting.experts


def fitting_batches(setting: Setting, bs: int) -> int:
    """Return the most batches whose keys and values fit in both memories beside all weights.

    Where not even one does, experts leave their room to them and go to disk.
    """
    experts = layer_bytes(setting) * setting.layers
    left = setting.gpu_memory_bytes + setting.host_memory_bytes - RESERVE_BYTES
    left -= dense_bytes(setting)
    one = max(1, -(-kv_bytes(setting) * bs // setting.sequences))
    if left - experts >= one:
        left -= experts
    return max(1, left // one)


def home(setting: Setting, dense: str, kv: str, window: int) -> Home:
    """Place whole layers, in the order of the released code.

    The budget holds the experts of one layer under way, and then the first layers' for good. Of the
    GPU's memory outside the budget, weights outside the experts come first, then keys and values.
    What does not fit goes to host memory, where experts come last, layer by layer; if not all fit,
    there is room for a window of the others, which are on disk.
    """
    layers, experts, slots = setting.layers, setting.experts, setting.slots
    resident = layers if slots >= layers * experts else max(0, slots // experts - 1)
    room = setting.gpu_memory_bytes - setting.budget_bytes - RESERVE_BYTES
    weights, kept = dense_bytes(setting), kv_bytes(setting)
    dense_on_host = dense == "host" or (dense == "auto" and weights > room)
    kv_room = 0 if dense_on_host else room - weights
    kv_on_host = kv == "host" or (kv == "auto" and kept > kv_room)
    left = setting.host_memory_bytes - weights * dense_on_host - kept * kv_on_host
    there, one = layers - resident, layer_bytes(setting)
    if there * one > left:
        there = max(0, min(there, left // one - window - 1))
    return Home(
        resident_layers=resident,
        staging=0 if resident == layers else slots - resident * experts,
        host_layers=resident + there,
        dense_on_host=dense_on_host,
        kv_on_host=kv_on_host,
    )


def notices(planner: Planner, split: Group) -> tuple[str, ...]:
    """Return what the user should know of group and placement."""
    setting, at = planner.setting, planner.home
    found = group_notices(split) if at.resident_layers < setting.layers else []
    if not setting.popularity.any():
        found.append(
            "klotski learns beforehand from the part of the trace that is not replayed, and "
            "nothing is left of it: its table starts empty"
        )
    if at.host_layers < setting.layers:
        size = (setting.layers - at.host_layers) * layer_bytes(setting)
        found.append(
            f"klotski: {size / 2**30:.1f} GiB of experts find no room in host memory and are read "
            f"from disk in every step"
        )
    if at.kv_on_host and kv_bytes(setting) > setting.host_memory_bytes:
        found.append(
            f"klotski: {kv_bytes(setting) / 2**30:.1f} GiB of keys and values are more than host "
            f"memory, and are taken to be there"
        )
    return tuple(found)


def group_notices(split: Group) -> list[str]:
    """Say if the run's group is not the one that Klotski would take."""
    found = []
    if split.hiding == 0:
        found.append(f"klotski: {MOST_BATCHES} batches of {split.bs} do not hide all copies yet")
    elif split.wanted > split.n:
        found.append(
            f"klotski would group {split.wanted} batches of {split.bs}; the run has {split.n}"
        )
    elif split.wanted < split.n:
        found.append(
            f"klotski would serve {split.wanted} batches of {split.bs} at a time; here all "
            f"{split.n} are one group"
        )
    return found


def tables(planner: Planner, split: Group) -> tuple[Table, ...]:
    """Show group and placement, and how they came about."""
    return (
        _result(planner, split),
        *_conditions(planner, split),
        _times(planner, split),
        _places(planner),
    )


def _result(planner: Planner, split: Group) -> Table:
    wanted = split.wanted
    served = f"sequences: {wanted * split.bs}" if wanted else ""
    rows: tuple[tuple[object, ...], ...] = (
        ("n, batches of the run", split.n, f"sequences: {planner.setting.sequences}"),
        ("bs, sequences of a batch", split.bs, "the last ones may have one fewer"),
        (
            "n that hides all copies", split.hiding or f"over {MOST_BATCHES}",
            f"with batches of {split.bs}",
        ),
        ("n that fits in memory", split.fitting, "GPU and host, all weights and the group's KV"),
        ("n that klotski would take", wanted or "unknown", served),
    )  # fmt: skip
    resident, layers = planner.home.resident_layers, planner.setting.layers
    note = f"{resident} of {layers} layers stay on the GPU: they have no copies to hide."
    return Table("How klotski groups the sequences", ("quantity", "value", "why"), rows, note)


def _conditions(planner: Planner, split: Group) -> list[Table]:
    """Return a table for the n of the run, the n that hides all copies, and one batch fewer."""
    titles = {split.n: "as in the run"}
    if split.hiding > 0:
        titles.setdefault(split.hiding - 1, "one fewer than it takes")
        titles[split.hiding] = "the fewest that hide all copies"
    found = []
    for n in sorted(titles):
        if n == 0:
            continue
        conditions = inequalities(block_of(planner, n, split.bs), planner.waits)
        failing = [one.name for one in conditions if one.required and not one.holds]
        verdict = f"not hidden: {', '.join(failing)}" if failing else "all that is required holds"
        rows = tuple(
            (
                one.name if one.required else f"{one.name} not needed",
                one.copies, one.left / 1e6, one.right / 1e6, one.holds,
            )
            for one in conditions
        )  # fmt: skip
        found.append(
            Table(
                f"n = {n}, bs = {split.bs}, {titles[n]}; {verdict}",
                ("condition", "copies", "computing ms", "copying ms", "hidden"),
                rows,
            )
        )
    return found


def _times(planner: Planner, split: Group) -> Table:
    one = block_of(planner, split.n, split.bs)
    rows = (
        ("t_A", one.attention / 1e6, "attention of one batch"),
        ("t_G", one.gate / 1e6, "gate of one batch"),
        ("t_hot", one.hot_compute / 1e6, f"the K = {one.hot} hot experts over the group"),
        ("sum of t_q", one.others_compute / 1e6, f"the |Q| = {one.others:.2f} others likewise"),
        ("t_copy", one.copy / 1e6, "one expert to the GPU"),
        ("io_G", one.gate_copy / 1e6, "the gate, which travels with attention"),
        ("io_A", one.attention_copy / 1e6, "attention; 0 if it is on the GPU"),
    )
    gemm = "one GEMM for all batches" if planner.merge_gemm else "one GEMM per batch"
    return Table(
        f"What a block of a decode step takes, n = {split.n}", ("time", "ms", "of"), rows,
        f"Experts: {gemm}; which are active is expected from their popularity beforehand.",
    )  # fmt: skip


def _places(planner: Planner) -> Table:
    setting, at = planner.setting, planner.home
    one = layer_bytes(setting) / 2**30
    rows = (
        ("experts, for good", at.resident_layers * one, "GPU"),
        ("experts, under way", at.staging * setting.expert_bytes / 2**30, "GPU"),
        ("experts", (at.host_layers - at.resident_layers) * one, "host"),
        ("experts", (setting.layers - at.host_layers) * one, "disk"),
        ("other weights", dense_bytes(setting) / 2**30, "host" if at.dense_on_host else "GPU"),
        ("keys and values", kv_bytes(setting) / 2**30, "host" if at.kv_on_host else "GPU"),
    )
    return Table("What is where", ("what", "GiB", "home"), rows)
