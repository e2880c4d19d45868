"""For authors of policies: small runs with round numbers, each audited, and laws to inherit.

    from moesim.policies.testing import PolicyConformance

    class TestMine(PolicyConformance):
        policy = "path/to/mine.py"

runs every law below on a policy, by its name, its file, or any text that `--policy` takes.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from moesim.audit import audit
from moesim.costs import CONTEXT_UNIT, Costs
from moesim.errors import PolicyError
from moesim.log import Log
from moesim.model import GroupedQuery, ModelSpec
from moesim.policies.api import Placement, Setting
from moesim.policies.registry import Chosen, choose
from moesim.profile import HardwareProfile, load_profile, with_overrides
from moesim.run import Prepared, prepare
from moesim.sim.replay import Replayed, replay
from moesim.traces.format import MISSING, Trace
from moesim.traces.workload import cut
from moesim.types import DATASHEET, KINDS, LANE_OF_QUEUE, LANES, PHASES, IntArray

EXPERT_BYTES = 1024
TOKENS = 64


def flat(ns: int, tokens: int = TOKENS) -> IntArray:
    """Return a table in which any work takes the same time, and none takes none."""
    return np.array([0] + [ns] * tokens)


def make_costs(
    layers: int = 1, *, attention: int = 0, gate: int = 0, gpu: int = 0, cpu: int = 0,
    combine: int = 0, head: int = 0, shared: int = 0, copy_ns_per_kib: int = 0, latency: int = 0,
    token_bytes: int = 0, kv_bytes: int = 0, dense_bytes: int = 0, cpu_context: int = 0,
    tokens: int = TOKENS,
) -> Costs:  # fmt: skip
    """Return costs in round numbers: an expert has 1024 bytes at 16 bits, 512 at 8, and so on.

    Copies take `latency` and `copy_ns_per_kib` for each 1024 bytes, in both directions and from
    disk; with 0 they take the latency and 1 ns. The CPU takes `cpu_context` for each token that it
    attends to. Numbers that do not divide evenly are refused.
    """
    bytes_per_ms = 1024 * 1_000_000 // copy_ns_per_kib if copy_ns_per_kib else 1 << 50
    assert copy_ns_per_kib == 0 or 1024 * 1_000_000 % copy_ns_per_kib == 0
    experts = np.tile([EXPERT_BYTES >> precision for precision in range(4)], (layers, 1))
    per_precision = [flat(gpu, tokens)] * 4
    return Costs(
        expert_gpu_ns=np.array(per_precision),
        expert_cpu_ns=np.array([flat(cpu, tokens)] * 4),
        attention_ns=np.stack([flat(attention, tokens)] * len(PHASES)),
        context_fp=per_attended(0, 0, tokens),
        cpu_attention_ns=0,
        cpu_context_fp=cpu_context * CONTEXT_UNIT,
        dense_ns=flat(0, tokens),
        dense_before=np.zeros(layers, np.int64),
        gate_ns=flat(gate, tokens),
        shared_ns=flat(shared, tokens),
        combine_ns=flat(combine, tokens),
        head_ns=flat(head, tokens),
        copies=np.array([[[0, latency, bytes_per_ms]]] * len(LANES)),
        expert_bytes=experts,
        attention_bytes=np.full(layers, dense_bytes),
        kv_bytes=np.full(layers, kv_bytes),
        token_bytes=token_bytes,
        kind_source=np.full(len(KINDS), DATASHEET),
        kind_most=np.full(len(KINDS), 1 << 62),
        expert_gpu_source=np.full((4, tokens + 1), DATASHEET),
        expert_cpu_source=np.full((4, tokens + 1), DATASHEET),
    )


def per_attended(prefill_ns: int, decode_ns: int, tokens: int = TOKENS) -> IntArray:
    """Return `Costs.context_fp`: what a token attended to takes in each phase."""
    return np.repeat([[prefill_ns], [decode_ns]], tokens + 1, axis=1) * CONTEXT_UNIT


def times(costs: Costs, k: int) -> Costs:
    """Return costs in which everything takes k times as long, for rates that k divides."""
    scaled = {
        name: getattr(costs, name) * k for name in costs._fields if name.endswith(("_ns", "_fp"))
    }
    copies = costs.copies.copy()
    copies[..., 1] *= k
    assert (copies[..., 2] % k == 0).all()
    copies[..., 2] //= k
    return costs._replace(**scaled, copies=copies)


def make_model(
    layers: int, experts: int, top_k: int, *, hidden: int = 8, expert_width: int = 8
) -> ModelSpec:
    """Return a model without anything but attention and experts."""
    return ModelSpec(
        name="small",
        model_type="mixtral",
        hidden_layers=layers,
        layer_ids=tuple(range(layers)),
        experts=experts,
        top_k=top_k,
        hidden=hidden,
        expert_width=expert_width,
        shared_width=0,
        dense_width=0,
        vocab=8,
        attention=GroupedQuery(heads=1, kv_heads=1, head_dim=8),
    )


@cache
def quiet_machine(*settings: str) -> HardwareProfile:
    """Return a machine whose host costs nothing and whose lanes do not disturb each other."""
    calm = {
        "host.per_layer_ns": "0", "host.per_launch_ns": "0", "host.per_sync_ns": "0",
        "host.decision_ns": "0", "interference": "[]", "link.chunk_bytes": "256",
    }  # fmt: skip
    given = dict(setting.split("=", 1) for setting in settings)
    return with_overrides(load_profile("rtx3090-pcie4-ddr4")[0], calm | given)


def make_trace(choices: Any, experts: int, prompts: Sequence[int] = (1,)) -> Trace:
    """Return a trace of sequences, one after the other.

    `choices` is (tokens, layers, top_k); `prompts` has one prompt length per sequence, and the
    tokens are dealt out evenly.
    """
    ids = np.array(choices, np.uint16)
    tokens = len(ids)
    each = tokens // len(prompts)
    sequence = np.repeat(np.arange(len(prompts)), each).astype(np.int32)
    position = np.tile(np.arange(each), len(prompts)).astype(np.int32)
    phase = (position >= np.repeat(prompts, each)).astype(np.uint8)
    return Trace(
        experts=ids,
        layer_ids=np.arange(ids.shape[1], dtype=np.int32),
        phase=phase,
        sequence=sequence,
        position=position,
        meta={"model": "small", "num_experts": experts},
    )


def prepared(
    policy: type | Chosen, choices: Any, costs: Costs, *, experts: int = 4, slots: int = 8,
    prompts: Sequence[int] = (1,), machine: HardwareProfile | None = None, seed: int = 0,
    bits: int = 16,
) -> Prepared:  # fmt: skip
    """Return a run of choices through a policy, which a machine may replay once."""
    trace = make_trace(choices, experts, prompts)
    chosen = policy if isinstance(policy, Chosen) else Chosen(policy.__name__.lower(), policy, {})
    return prepare(
        trace,
        cut(trace, batch=len(prompts)),
        make_model(trace.layers, experts, trace.top_k),
        machine or quiet_machine(),
        chosen,
        budget_bytes=slots * EXPERT_BYTES,
        bits=bits,
        seed=seed,
        costs=costs,
    )


def run(
    policy: type | Chosen, choices: Any, costs: Costs, *, on: str = "simpy", seed: int = 0,
    jitter: int = 0, progress: Callable[[int, int], None] | None = None, **options: Any,
) -> Replayed:  # fmt: skip
    """Replay choices through a policy, `on` a simulated machine, and audit the log.

    `options` are those of `prepared`.
    """
    ready = prepared(policy, choices, costs, seed=seed, **options)
    return audited(ready, machine=on, seed=seed, jitter=jitter, progress=progress)


def audited(ready: Prepared, **options: Any) -> Replayed:
    """Replay a prepared run and audit its log; `options` are those of `sim.replay.replay`."""
    done = replay(ready, record=True, **options)
    assert done.log is not None
    audit(done.log)
    return done


def with_another_tail(before: Prepared, step: int, seed: int = 0) -> Prepared:
    """Return a run in which routers choose differently from a step on, and guesses are the same."""
    feed = before.feed
    chosen = feed.chosen.copy()
    tail = chosen[feed.steps.offset[step, 0] :]
    rng = np.random.default_rng(seed)
    for choice in tail.reshape(-1, tail.shape[-1]):
        choice[:] = rng.permutation(before.setting.experts)[: len(choice)]
    return before._replace(feed=feed._replace(chosen=chosen))


def placement(
    setting: Setting, cached: Sequence[tuple[int, int]] = (), *, parts: IntArray | None = None,
    slots: int | None = None, staging: int = 2, **options: Any,
) -> Placement:  # fmt: skip
    """Return a placement with whole (layer, expert) pairs or parts cached, and slots per layer."""
    if parts is None:
        parts = np.zeros((setting.layers, setting.experts), np.int64)
        for layer, expert in cached:
            parts[layer, expert] = 1024
    fitting = (parts > 0).sum(axis=1) if slots is None else np.full(setting.layers, slots)
    filled: dict[str, Any] = {
        "cached": parts,
        "cache_slots": fitting,
        "cache_slot_bytes": np.full(setting.layers, setting.expert_bytes),
        "pool_of_layer": np.arange(setting.layers),
        "staging_slots": staging,
    }
    return Placement(**(filled | options))


class Span(NamedTuple):
    """One stretch of work, by names."""

    lane: str
    kind: str
    layer: int
    expert: int
    start_ns: int
    end_ns: int


def spans(done: Replayed, *kinds: str) -> list[Span]:
    """Return what the lanes did, in order of its beginning, of the named kinds or all."""
    log = done.log
    assert log is not None
    found = []
    for ticket, start, end, _ in log.segments.tolist():
        if ticket:
            op = log.operations[ticket - 1]
            lane = LANES[LANE_OF_QUEUE[op["queue"]]]
            kind = KINDS[op["kind"]]
            if not kinds or kind in kinds:
                found.append(
                    Span(lane, kind, int(op["layer"]), int(op["expert"]), int(start), int(end))
                )
    return sorted(found, key=lambda span: (span.start_ns, span.end_ns, span.lane))


def makespan_ns(done: Replayed) -> int:
    """Return the end of the last token."""
    return done.heads[-1].now_ns


def lane_of(log: Log, ticket: int) -> int:
    """Return the lane that works on an operation."""
    return LANE_OF_QUEUE[log.operations[ticket - 1]["queue"]]


ORDERED = (
    "ticket", "step", "queue", "kind", "layer", "expert", "batch", "amount", "context", "part",
    "precision", "cause", "slot", "after", "submit_ns",
)  # fmt: skip
"""What an order is, as a log has it; whatever may still happen to it left out."""


class PolicyConformance:
    """Laws of every policy, as tests to inherit: set `policy` to what `--policy` would be given.

    Each run is audited, so that legality, budgets, order and completeness are checked throughout.
    """

    policy = ""
    needs_gpu = True
    """False for a policy that must work without any expert on the GPU, too."""

    def prepare(
        self, *, layers: int = 2, experts: int = 6, top_k: int = 2, tokens: int = 6,
        prompts: Sequence[int] = (2,), slots: int = 8, seed: int = 0, choices: Any = None,
    ) -> Prepared:  # fmt: skip
        """Return a run of choices (tokens, layers, top_k), by default random, through a policy."""
        rng = np.random.default_rng(seed)
        if choices is None:
            cells = range(tokens * layers)
            drawn = np.array([rng.permutation(experts)[:top_k] for _ in cells])
            choices = drawn.reshape(tokens, layers, top_k)
        layers = np.shape(choices)[1]
        costs = make_costs(
            layers, attention=90, gate=10, gpu=40, cpu=70, combine=5, head=9, copy_ns_per_kib=200,
            kv_bytes=64, dense_bytes=512, cpu_context=20,
        )  # fmt: skip
        machine = quiet_machine("interference=[{busy: [cpu, h2d], slow: {cpu: 0.5, h2d: 0.8}}]")
        return prepared(
            choose(self.policy), choices, costs, experts=experts, slots=slots, prompts=prompts,
            machine=machine, seed=seed,
        )  # fmt: skip

    def replay(self, **options: Any) -> Replayed:
        """Replay random choices; `options` are those of `prepare`."""
        return audited(self.prepare(**options), seed=options.get("seed", 0))

    def test_random_choices(self) -> None:
        """Every order is legal, whatever the router chooses."""
        for seed in range(20):
            self.replay(seed=seed, experts=2 + seed % 7, slots=2 + seed % 9)

    def test_the_same_seed_gives_the_same_log(self) -> None:
        """Nothing is kept from one run to the next, and nothing is drawn unseeded."""
        first, second = self.replay(seed=3).log, self.replay(seed=3).log
        assert first is not None
        assert second is not None
        assert (first.operations == second.operations).all()
        assert (first.segments == second.segments).all()

    def test_nothing_depends_on_what_comes_later(self) -> None:
        """Let routers choose differently from a step on: all that was ordered before is the same.

        Policies that declare to see the future are excepted.
        """
        if getattr(choose(self.policy).cls, "declares_future", False):
            return
        for seed in range(8):
            options = {"seed": seed, "tokens": 9, "prompts": (1 + seed % 3,), "layers": 3}
            cut = 2 + seed % 4
            first = audited(self.prepare(**options))  # type: ignore[arg-type]
            other = with_another_tail(self.prepare(**options), cut, seed)  # type: ignore[arg-type]
            second = audited(other)
            assert first.log is not None
            assert second.log is not None
            # What is cancelled or promoted later was ordered before all the same.
            before = [
                log.operations[log.operations["step"] < cut][list(ORDERED)]
                for log in (first.log, second.log)
            ]
            assert len(before[0]) > 0
            assert (before[0] == before[1]).all()

    def test_one_slot(self) -> None:
        """The smallest budget that holds an expert is enough."""
        self.replay(slots=1)

    def test_no_slot(self) -> None:
        """A budget of nothing is refused by a PolicyError, or works; `needs_gpu` says which."""
        try:
            self.replay(slots=0)
        except PolicyError:
            assert self.needs_gpu, "refuses to work without a GPU slot, though needs_gpu = False"
        else:
            assert not self.needs_gpu, "works without a GPU slot: say needs_gpu = False"

    def test_one_expert(self) -> None:
        """A layer with a single expert."""
        self.replay(experts=1, top_k=1)

    def test_all_experts_resident(self) -> None:
        """More room than experts."""
        self.replay(slots=100)

    def test_every_expert_active(self) -> None:
        """All experts are needed at once, and few fit."""
        self.replay(top_k=6, slots=4)

    def test_a_layer_that_needs_no_expert(self) -> None:
        """Nothing was routed in one layer, now and then, nor in a whole step."""
        choices = np.full((7, 3, 2), MISSING)
        choices[[0, 2, 3, 6]] = [[0, 3], [1, MISSING], [2, 5]]
        choices[3, 0] = choices[6, 2] = MISSING
        self.replay(choices=choices)

    def test_all_tokens_on_one_expert(self) -> None:
        """The same expert in every layer, for every token of prompts and decoding."""
        self.replay(choices=np.full((9, 3, 1), 4), prompts=(4, 2, 1))

    def test_decoding_alone(self) -> None:
        """A prompt of a single token, and many steps."""
        self.replay(tokens=16, prompts=(1,))

    def test_a_group(self) -> None:
        """As many sequences as a policy may want to split into batches."""
        self.replay(tokens=24, prompts=(1, 2, 1, 3, 1, 2, 1, 1), slots=5)

    def test_a_prompt_alone(self) -> None:
        """Nothing is decoded."""
        self.replay(tokens=5, prompts=(5,))

    def test_several_sequences(self) -> None:
        """Sequences of unequal prompts end at different steps."""
        self.replay(tokens=12, prompts=(1, 2, 3), slots=5)
