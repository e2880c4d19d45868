"""Every policy on real lanes: audited logs, and the outputs of a plain computation."""

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import wild
from moesim.audit import audit
from moesim.errors import DeadlockError, PolicyError, RealError
from moesim.model import GroupedQuery, ModelSpec, expert_bytes
from moesim.policies.registry import Chosen, choose
from moesim.profile import HardwareProfile, load_profile, with_overrides
from moesim.real.dense import blocks_of, draw_ends, draw_layer, params_of
from moesim.real.emulated import Emulated, Throttle
from moesim.real.engine import Engine
from moesim.real.forward import Forward
from moesim.real.reference import Reference, reference
from moesim.real.torch_machine import TorchMachine
from moesim.real.weights import Slot, neurons, unpack
from moesim.residency import Residency, free_slot
from moesim.run import Prepared, prepare
from moesim.sim.replay import Replayed
from moesim.traces.format import Trace
from moesim.traces.synthetic import synthesize
from moesim.traces.workload import cut
from moesim.types import BITS, CPU, EXPERT_CPU, EXPERT_GPU, WHOLE

MODEL = ModelSpec(
    name="tiny", model_type="mixtral", hidden_layers=4, layer_ids=(0, 1, 2, 3), experts=8, top_k=2,
    hidden=64, expert_width=48, shared_width=32, dense_width=0, vocab=100,
    attention=GroupedQuery(heads=4, kv_heads=2, head_dim=16),
)  # fmt: skip
SEQUENCES = 3
SEED = 7


@pytest.fixture(scope="module")
def trace() -> Trace:
    return synthesize(layers=4, experts=8, top_k=2, sequences=5, prompt=5, generate=7, seed=1)


@pytest.fixture(scope="module")
def profile() -> HardwareProfile:
    """Chunks of a few neurons, so that copies are interrupted."""
    return with_overrides(load_profile("rtx3090-pcie4-ddr4")[0], {"link.chunk_bytes": "4000"})


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(Emulated(64 << 20, Throttle(2_000, 1e9)), seed=SEED)
    yield made
    made.close()


class Seen:
    """What a run left behind after each step: the stream, and the logits."""

    def __init__(self) -> None:
        self.streams: list[Any] = []
        self.logits: list[Any] = []

    def __call__(self, step: int, forward: Forward) -> None:
        del self.streams[step:], self.logits[step:]
        self.streams.append(forward.residual.clone())
        self.logits.append(forward.logits.clone())


def prepared(trace: Trace, profile: HardwareProfile, spec: str, slots: int = 12) -> Prepared:
    return prepare(
        trace, cut(trace, batch=SEQUENCES), MODEL, profile, choose(spec),
        budget_bytes=slots * expert_bytes(MODEL), seed=SEED,
    )  # fmt: skip


def expected(engine: Engine, run: Replayed, forward: Any) -> Reference:
    """Compute a run's steps plainly, with the weights and deferrals that its log names."""
    log, feed = run.log, run.prepared.feed
    assert log is not None
    assert engine.experts is not None
    experts = engine.experts
    ran = log.operations[np.isin(log.operations["kind"], (EXPERT_GPU, EXPERT_CPU))]
    pieces: dict[tuple[int, int, int], set[tuple[int, int, int]]] = {}
    for o in ran:
        start = int(o["context"]) if o["kind"] == EXPERT_GPU else 0
        key = int(o["step"]), int(o["layer"]), int(o["expert"])
        pieces.setdefault(key, set()).add((start, int(o["part"]), BITS[o["precision"]]))
    deferred = {
        (int(o["step"]), int(o["layer"]), int(o["expert"]))
        for o in ran
        if o["kind"] == EXPERT_CPU and o["context"]
    }

    def expert_of(step: int, layer: int, expert: int) -> tuple[Any, Any]:
        """Return the neurons of each piece in the precision in which it ran."""
        found = []
        for start, part, bits in sorted(pieces[step, layer, expert]):
            image = experts.image_at_once(layer, expert, bits)
            own = slice(*neurons(MODEL.expert_width, start, part))
            gate, up, down = unpack(image, experts.shape, bits)
            found.append((gate[own], up[own], down[:, own]))
        gates, ups, downs = zip(*found, strict=True)
        return torch.cat([*gates, *ups]), torch.cat(downs, 1)

    blocks = [
        blocks_of(MODEL, i, draw_layer(MODEL, i, SEED, torch.empty(params_of(MODEL, i)).bfloat16()))
        for i in range(MODEL.layers)
    ]
    weights = np.full(feed.chosen.shape, 1 / MODEL.top_k)
    if feed.weights is not None:
        weights = feed.weights.astype(np.float64)
    return reference(
        MODEL, feed.steps, forward.ids, blocks, (), draw_ends(MODEL, SEED, torch.bfloat16),
        expert_of, feed.chosen.astype(np.int64), weights, deferred,
    )  # fmt: skip


PLAIN = [v for v in wild.VARIANTS if "oracle" not in v and "belady" not in v]


def compared(
    engine: Engine, trace: Trace, profile: HardwareProfile, spec: str, slots: int = 12
) -> tuple[Replayed, list[float]]:
    """Run a policy, audit the log, and return how far its streams are from the plain ones."""
    seen = Seen()
    forwards: list[Forward] = []

    def watch(step: int, forward: Forward) -> None:
        seen(step, forward)
        forwards[:] = [forward]

    run = engine.run(lambda: prepared(trace, profile, spec, slots), warm_up=0, watch=watch)
    assert run.log is not None
    audit(run.log)
    truth = expected(engine, run, forwards[0])
    assert len(seen.streams) == len(truth.streams) == 7
    return run, [
        float((mine.float() - theirs[-1].float()).norm() / theirs[-1].float().norm())
        for mine, theirs in zip(seen.streams, truth.streams, strict=True)
    ]


# Two roundings to 8 bits of mantissa, of half a unit each, in every layer: of what the CPU has
# summed up, and of the sum with what the GPU has. Layers pass them on about as they are.
ROUNDED = MODEL.layers * 2 * 2**-8


@pytest.mark.parametrize("spec", PLAIN)
def test_outputs_are_those_of_a_plain_computation(
    engine: Engine, trace: Trace, profile: HardwareProfile, spec: str
) -> None:
    """To the bit where whole experts ran on the GPU; else sums are rounded in another order."""
    run, off = compared(engine, trace, profile, spec)
    assert run.log is not None
    operations = run.log.operations
    split = (operations["kind"] == EXPERT_GPU) & (operations["part"] < WHOLE)
    if split.any() or (operations["kind"] == EXPERT_CPU).any():
        assert max(off) < ROUNDED
    else:
        assert max(off) == 0


def test_a_lost_expert_would_be_seen(
    engine: Engine, trace: Trace, profile: HardwareProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 8 experts of one layer adds nothing: more than what is put down to rounding."""
    put = Forward.put

    def losing(self: Forward, layer: int, expert: int, batch: int, result: Any) -> None:
        put(self, layer, expert, batch, result * (layer != 1 or expert != 3))

    monkeypatch.setattr(Forward, "put", losing)
    _, off = compared(engine, trace, profile, "lru")
    assert max(off) > 2 * ROUNDED


class Poisoner:
    """Fills a slot with what is no number as soon as the host program gives it up.

    It waits for the last operation that touches the slot, as whatever is copied there must.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.machine: Any = None
        self.slots: list[Slot] = []
        self.count = 0
        made = self

        class Watched(TorchMachine):
            def __init__(self, device: Any, feed: Any, doer: Any) -> None:
                super().__init__(device, feed, doer)
                made.machine, made.slots = self, doer.slots

        monkeypatch.setattr("moesim.real.engine.TorchMachine", Watched)
        for module in ("moesim.residency", "moesim.commands"):
            monkeypatch.setattr(f"{module}.free_slot", self.free_slot)

    def free_slot(self, res: Residency, slot: int, pool: int) -> None:
        free_slot(res, slot, pool)
        if self.machine is not None and self.slots[slot].memory is not None:
            if ticket := int(res.slot_ticket[slot]):
                self.machine.await_over(ticket)
            self.slots[slot].memory.fill_(255)
            self.count += 1


@pytest.mark.parametrize("spec", PLAIN)
@pytest.mark.parametrize("slots", [5, 9])
def test_nothing_is_read_that_was_given_up(
    engine: Engine, trace: Trace, profile: HardwareProfile, spec: str, slots: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Slots given up are full of what is no number, and the outputs stay right."""
    poisoner = Poisoner(monkeypatch)
    _, off = compared(engine, trace, profile, spec, slots)
    assert max(off) < ROUNDED
    if spec == "lru":
        assert poisoner.count > 50


def test_nothing_is_collected_in_a_run(
    engine: Engine, trace: Trace, profile: HardwareProfile
) -> None:
    seen: set[bool] = set()
    engine.run(lambda: prepared(trace, profile, "lru"), watch=lambda *_: seen.add(gc.isenabled()))
    assert seen == {False}
    assert gc.isenabled()


# Failing.


def test_what_goes_wrong_on_a_lane_ends_the_run_and_frees_the_memory(
    engine: Engine, trace: Trace, profile: HardwareProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Forward, layer: int) -> None:
        raise RuntimeError("out of memory:\nno such room")

    with monkeypatch.context() as patch:
        patch.setattr(Forward, "combine", fail)
        with pytest.raises(RealError, match="lane gpu: RuntimeError: out of memory: no such room"):
            engine.run(lambda: prepared(trace, profile, "lru"), warm_up=0)
    assert engine.device.empty(60 << 20, dtype=torch.uint8) is not None
    engine.device.free_all()
    compared(engine, trace, profile, "lru")


@pytest.mark.parametrize("error", [KeyboardInterrupt, PolicyError])
def test_an_interrupted_run_leaves_nothing_behind(
    engine: Engine, trace: Trace, profile: HardwareProfile, error: type[BaseException]
) -> None:
    def watch(step: int, forward: Forward) -> None:
        if step == 2:
            raise error

    with pytest.raises(error):
        engine.run(lambda: prepared(trace, profile, "dali"), warm_up=0, watch=watch)
    assert not any(lane.busy for lane in engine.device.lanes.values())
    compared(engine, trace, profile, "dali")


@pytest.fixture
def stuck(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Give what lets the lane of copies stand still from the second step on."""
    monkeypatch.setattr("moesim.real.torch_machine.PATIENCE_S", 0.2)
    lane = engine.device.lanes["h2d"]
    go = threading.Event()

    def watch(step: int, forward: Forward) -> None:
        if step == 1:
            monkeypatch.setattr(lane, "_next", lambda: go.wait() and None)

    yield watch
    go.set()


def test_what_never_comes_is_named(
    engine: Engine, trace: Trace, profile: HardwareProfile, stuck: Callable[..., None]
) -> None:
    with pytest.raises(DeadlockError, match=r"ticket \d+ \(\w+, layer \d.*never came"):
        engine.run(lambda: prepared(trace, profile, "on-demand"), warm_up=0, watch=stuck)


# Whatever is legal.


@pytest.mark.parametrize("seed", range(300))
def test_a_policy_that_orders_anything_legal(
    engine: Engine, trace: Trace, profile: HardwareProfile, seed: int
) -> None:
    """Parts, precisions, groups of batches, disk, keys and values on the host, cancelled copies.

    With attention on the CPU nothing can be predicted there before the gate, and some order that.
    """
    chosen = Chosen("wild", wild.Wild, {})
    forwards: list[Forward] = []
    seen = Seen()

    def watch(step: int, forward: Forward) -> None:
        seen(step, forward)
        forwards[:] = [forward]

    def make() -> Prepared:
        return prepare(
            trace, cut(trace, batch=SEQUENCES), MODEL, profile, chosen,
            budget_bytes=14 * expert_bytes(MODEL), seed=seed,
        )  # fmt: skip

    placement = make().placement
    early = any(p.lane == CPU and not p.after_gate for p in placement.predictions)
    if placement.attention_on_cpu and early:
        with pytest.raises(RealError, match="nothing can be predicted there before the gate"):
            engine.run(make, warm_up=0)
        return
    run = engine.run(make, warm_up=0, watch=watch)
    assert run.log is not None
    audit(run.log)
    truth = expected(engine, run, forwards[0])
    for mine, theirs in zip(seen.streams, truth.streams, strict=True):
        off = (mine.float() - theirs[-1].float()).norm() / theirs[-1].float().norm()
        assert off < ROUNDED
