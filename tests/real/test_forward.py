"""The methods of a forward pass, called in a legal order by hand, against a straight computation.

What can be late is late: KV_OUT comes just before the KV_IN that needs it, that is before the
attention of the batch before; deferred experts are computed behind the next layer's routing.
"""

from collections.abc import Collection, Iterator
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import CalibrationError, RealError
from moesim.model import (
    GroupedQuery,
    Latent,
    ModelSpec,
    kv_bytes_per_token,
    streamed_params,
)
from moesim.real import operations as ops
from moesim.real.dense import blocks_of, draw_ends, draw_layer, params_of
from moesim.real.emulated import Emulated, Throttle
from moesim.real.forward import Forward
from moesim.real.reference import Reference, reference
from moesim.real.sequences import groups_of, now_of
from moesim.traces.workload import Steps, Workload, steps_of
from moesim.types import DECODE, NONE, FloatArray, IntArray

Places = Collection[tuple[int, int, int]]
"""(step, layer, expert)."""


class Poisoned(Emulated):
    """A device whose memory is full of what is no number, as is the host's; it copies at once."""

    def __init__(self, memory_bytes: int = 32 << 20) -> None:
        super().__init__(memory_bytes, Throttle(0, 1e18))

    def empty(self, *shape: int, dtype: Any) -> Any:
        return poisoned(super().empty(*shape, dtype=dtype))

    def host(self, *shape: int, dtype: Any, pinned: bool = True) -> Any:
        return poisoned(super().host(*shape, dtype=dtype, pinned=pinned))


def poisoned(tensor: Any) -> Any:
    tensor.view(-1).view(torch.uint8).fill_(255)
    return tensor


@pytest.fixture
def device() -> Iterator[Poisoned]:
    made = Poisoned()
    yield made
    made.close()


def spec(
    hidden_layers: int = 3, layer_ids: tuple[int, ...] = (0, 1, 2), **changed: Any
) -> ModelSpec:
    sizes: dict[str, Any] = {
        "experts": 6,
        "top_k": 2,
        "hidden": 48,
        "expert_width": 40,
        "shared_width": 0,
        "dense_width": 56,
        "vocab": 101,
        "attention": GroupedQuery(heads=4, kv_heads=2, head_dim=16),
    }
    return ModelSpec(
        name="tiny",
        model_type="test",
        hidden_layers=hidden_layers,
        layer_ids=layer_ids,
        **sizes | changed,
    )


def served(*sequences: tuple[int, int], batches: int = 1) -> Steps:
    """Return the steps of sequences of so many prompt rows and rows decoded behind them."""
    starts = np.cumsum([0, *(prompt + decoded for prompt, decoded in sequences)])
    prompts = np.array([prompt for prompt, _ in sequences], np.int64)
    workload = Workload(rows=np.arange(starts[-1]), starts=starts.astype(np.int64), prompts=prompts)
    return steps_of(workload, batches)


RAGGED = ((4, 3), (7, 1), (4, 3), (1, 2), (4, 0))
"""Prompts of different lengths, of which some end early; the first and the third are alike."""


class Routed(NamedTuple):
    """Ids and weights (rows, layers, top_k)."""

    ids: IntArray
    weights: FloatArray


def routed(model: ModelSpec, steps: Steps, missing: float = 0.0) -> Routed:
    random = np.random.default_rng(1)
    shape = (len(steps.rows), model.layers)
    ids = random.random((*shape, model.experts)).argsort(-1)[..., : model.top_k]
    weights = random.random(ids.shape) + 0.1
    ids = np.where(random.random(ids.shape) < missing, NONE, ids)
    return Routed(ids, weights / weights.sum(-1, keepdims=True))


class Experts:
    """Gate and up, and down, of every expert."""

    def __init__(self, model: ModelSpec, dtype: Any) -> None:
        self.model, self.dtype = model, dtype

    def __call__(self, step: int, layer: int, expert: int) -> tuple[Any, Any]:
        random = torch.Generator().manual_seed(layer * 100 + expert)
        hidden, width = self.model.hidden, self.model.expert_width
        gate_up = torch.randn(2 * width, hidden, generator=random) * hidden**-0.5
        down = torch.randn(hidden, width, generator=random) * width**-0.5
        return gate_up.to(self.dtype), down.to(self.dtype)


def piece(rows: Any, weights: tuple[Any, Any], first: int, last: int) -> Any:
    gate, up = weights[0].chunk(2)
    return ops.expert(
        rows, torch.cat([gate[first:last], up[first:last]]), weights[1][:, first:last]
    )


class Run(NamedTuple):
    """How a forward pass is walked; places are (step, layer, expert)."""

    forward: Forward
    routed: Routed
    experts: Experts
    on_cpu: Places = ()
    deferred: Places = ()
    eager: bool = False
    """Deferred experts are computed at once; else as late as possible, as their rows are sent."""
    pieces: bool = False
    per_batch: bool = False


def walk(run: Run) -> Reference:
    """Call everything in order, and return what there is behind every layer and step."""
    forward = run.forward
    found = Reference([], [])
    outs: set[tuple[int, int]] = set()
    for step in range(len(forward.steps.phase)):
        forward.begin(step)
        found.streams.append([])
        late = Late([], True)
        load_dense(forward, 0)
        for layer in range(forward.model.layers):
            attend(forward, layer, outs)
            for batch in forward.now.filled:
                forward.gate(layer, batch)
            for batch in forward.now.filled:
                rows = slice(*forward.steps.offset[step, batch : batch + 2])
                forward.route(
                    layer, batch, run.routed.ids[rows, layer], run.routed.weights[rows, layer]
                )
            late = run_experts(run, step, layer, late)
            forward.combine(layer)
            found.streams[-1].append(forward.residual.clone())
        assert not late.experts
        forward.head()
        found.logits.append(forward.logits.clone())
        assert torch.equal(forward.tokens, forward.logits.argmax(-1))
    for layer, batch in outs:
        forward.kv_out(layer, batch)
    return found


def load_dense(forward: Forward, layer: int) -> None:
    if forward.dense.images and layer < forward.model.layers:
        forward.dense_in(layer)


def attend(forward: Forward, layer: int, outs: set[tuple[int, int]]) -> None:
    decodes = forward.now.phase == DECODE
    loads = forward.caches.on_host and decodes and not forward.attention_on_cpu

    def load(batch: int) -> None:
        if (layer, batch) in outs:
            outs.remove((layer, batch))
            forward.kv_out(layer, batch)
        if loads:
            forward.kv_in(layer, batch)

    filled = forward.now.filled
    load(filled[0])
    for number, batch in enumerate(filled):
        if number + 1 < len(filled):
            load(filled[number + 1])
        forward.attention(layer, batch)
        if forward.attends_on_cpu():
            forward.send(layer, batch)
            forward.attention_on_host(layer, batch)
            forward.return_(layer, batch)
        elif forward.caches.on_host:
            outs.add((layer, batch))


class Late(NamedTuple):
    """What a layer leaves to the next one: experts, and whether their rows were sent."""

    experts: list[int]
    sent: bool


def run_experts(run: Run, step: int, layer: int, late: Late) -> Late:
    """Compute the experts that are due.

    The next layer's weights come as early as they can: they are asked for behind this gate.
    """
    forward = run.forward
    load_dense(forward, layer + 1)
    active = forward.choices.of(layer).active
    on_host = [e for e in active if (step, layer, e) in run.on_cpu]
    deferred = [e for e in active if (step, layer, e) in run.deferred]
    forward.predict(layer)
    sent = bool(on_host or (run.eager and deferred))
    if sent:
        forward.send(layer)
        forward.predict_on_cpu(layer)
    if forward.model.shared_width:
        forward.shared(layer)
    run_on_gpu(run, step, layer, sorted(set(active) - set(on_host) - set(deferred), reverse=True))
    run_on_cpu(run, step, layer, on_host, deferred=False)
    if on_host:
        forward.return_(layer)
    if run.eager:
        run_on_cpu(run, step, layer, deferred, deferred=True)
    elif late.experts:
        if not late.sent:
            forward.send(layer - 1)
        run_on_cpu(run, step, layer - 1, late.experts, deferred=True)
    if late.experts:
        forward.return_(layer - 1, NONE, deferred=True)
    return Late(deferred, sent)


def run_on_gpu(run: Run, step: int, layer: int, experts: list[int]) -> None:
    forward = run.forward
    batches = forward.now.filled if run.per_batch else (NONE,)
    width = forward.model.expert_width
    for expert in experts:
        weights = run.experts(step, layer, expert)
        for first, last in pairwise([0, width // 3, width] if run.pieces else [0, width]):
            for batch in batches:
                rows = forward.inputs(layer, expert, batch)
                if len(rows):
                    forward.put(layer, expert, batch, piece(rows, weights, first, last))


def run_on_cpu(run: Run, step: int, layer: int, experts: list[int], deferred: bool) -> None:
    for expert in experts:
        rows = run.forward.cpu_inputs(layer, expert)
        result = ops.expert(rows, *run.experts(step, layer, expert))
        run.forward.cpu_put(layer, expert, result, deferred)


def truth(run: Run) -> Reference:
    """Compute the same, with weights drawn anew."""
    model, steps = run.forward.model, run.forward.steps
    dtype = run.experts.dtype

    def drawn(layer: int) -> Any:
        size = params_of(model, layer)
        return blocks_of(model, layer, draw_layer(model, layer, 0, torch.empty(size, dtype=dtype)))

    return reference(
        model, steps, run.forward.ids, [drawn(layer) for layer in range(model.layers)],
        drawn(model.layers), draw_ends(model, 0, dtype), run.experts, *run.routed, run.deferred,
    )  # fmt: skip


def same(found: Reference, expected: Reference) -> None:
    for one, other in zip(found.streams, expected.streams, strict=True):
        for stream, exact in zip(one, other, strict=True):
            assert torch.equal(stream, exact)
    for one, other in zip(found.logits, expected.logits, strict=True):
        assert torch.equal(one, other)


IN_ANOTHER_ORDER = 3 * 8
"""Roundings where sums of up to 56 terms, three in a row, add up in another order: as errors have
random signs, those of n terms are as large as sqrt(n) of them."""


def close(found: Reference, expected: Reference, roundings: int) -> None:
    """Compare within what so many roundings in a layer can make of the largest number.

    A rounding changes a number x by at most u |x|, u being half of the step behind 1. What a layer
    adds up is at most twice as large as what comes out, so that roundings in one layer change its
    stream by r = 2 u |x| times their number. A layer hands on a change of its input as its own
    terms hand it on: the stream itself, attention, and experts behind both, which are norms and
    random matrices that leave the size of most vectors as it is: within 4. Layers then sum to
    r (1 + 4 + 16 ...); a single one has nothing to hand on.
    """
    depth = len(found.streams[0])
    gain = sum(4**layer for layer in range(depth))
    for one, other in zip(found.streams, expected.streams, strict=True):
        for stream, exact in zip(one, other, strict=True):
            unit = torch.finfo(stream.dtype).eps / 2
            bound = 2 * unit * roundings * gain * exact.abs().max()
            assert (stream - exact).abs().max() <= bound


def everything(run: Run, share: float, seed: int = 0) -> Places:
    """Return a share of all places."""
    forward, random = run.forward, np.random.default_rng(seed)
    steps = len(forward.steps.phase)
    places = product(range(steps), range(forward.model.layers), range(forward.model.experts))
    return {place for place in places if random.random() < share}


@given(
    sequences=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=6),
    data=st.data(),
)
@settings(max_examples=30)
def test_every_token_is_computed_once_behind_its_own_past(
    sequences: list[tuple[int, int]], data: Any
) -> None:
    batches = data.draw(st.integers(1, len(sequences)))
    steps = served(*sequences, batches=batches)
    groups = groups_of(steps)
    past = np.zeros(len(sequences), np.int64)
    for step in range(len(steps.phase)):
        now = now_of(steps, groups, step)
        served_now = steps.sequence[now.rows]
        seen = []
        for batch, shares in enumerate(now.shares):
            for share in shares:
                rows = np.arange(now.tokens)[share.rows]
                own = rows.reshape(share.sequences, share.new)
                assert (now.bounds[batch] <= own).all()
                assert (own < now.bounds[batch + 1]).all()
                assert (np.diff(own, axis=1) == 1).all()
                assert (served_now[own] == groups[share.group].sequences[:, None]).all()
                assert (past[served_now[own]] == share.past).all()
                seen += rows.tolist()
        assert sorted(seen) == list(range(now.tokens))
        assert served_now[now.last].tolist() == np.unique(served_now).tolist()
        past += np.bincount(served_now, minlength=len(past))
    assert past.tolist() == [prompt + decoded for prompt, decoded in sequences]


MODELS = {
    "plain": spec(),
    "shared": spec(shared_width=24),
    "dense before": spec(4, (2, 3)),
    "dense around": spec(6, (1, 3, 4), shared_width=24),
    "dense behind, tied": spec(4, (0, 1), tied_embeddings=True),
    "many heads, one choice": spec(
        top_k=1, attention=GroupedQuery(heads=3, kv_heads=3, head_dim=8)
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batches", [1, 2, 5])
@pytest.mark.parametrize("hosted", [{}, {"kv_on_host": True}, {"dense_on_host": True}])
def test_on_the_device_all_is_equal_to_the_last_bit(
    device: Poisoned, name: str, batches: int, hosted: dict[str, Any]
) -> None:
    model, steps = MODELS[name], served(*RAGGED, batches=batches)
    forward = Forward(model, device, steps, **hosted)
    run = Run(forward, routed(model, steps, missing=0.2), Experts(model, torch.bfloat16))
    same(walk(run), truth(run))


@pytest.mark.parametrize("sequences", [((5, 4),), ((3, 2),) * 4, ((1, 3),), ((6, 0), (6, 0))])
def test_sequences_that_are_alike(device: Poisoned, sequences: tuple[tuple[int, int], ...]) -> None:
    model, steps = MODELS["plain"], served(*sequences)
    forward = Forward(model, device, steps, kv_on_host=True, dense_on_host=True)
    run = Run(forward, routed(model, steps), Experts(model, torch.bfloat16))
    same(walk(run), truth(run))


@pytest.mark.parametrize("batches", [1, 2])
def test_a_gemm_per_batch(device: Poisoned, batches: int) -> None:
    """In 32 bits, where a product of fewer rows may add up in another order."""
    model, steps = MODELS["shared"], served(*RAGGED, batches=batches)
    forward = Forward(model, device, steps, dtype=torch.float32)
    run = Run(forward, routed(model, steps, 0.2), Experts(model, torch.float32), per_batch=True)
    close(walk(run), truth(run), roundings=IN_ANOTHER_ORDER)


WAYS: dict[str, dict[str, Any]] = {
    "device": {},
    "kv": {"kv_on_host": True},
    "cpu": {"kv_on_host": True, "attention_on_cpu": True},
    "all": {"kv_on_host": True, "attention_on_cpu": True, "dense_on_host": True},
}


@pytest.mark.parametrize("name", ["plain", "shared", "many heads, one choice"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("eager", [False, True])
def test_wherever_it_is_computed_it_is_the_same(
    device: Poisoned, name: str, way: str, batches: int, eager: bool
) -> None:
    """In 32 bits, where only the order of sums differs."""
    model, steps = MODELS[name], served(*RAGGED, batches=batches)
    forward = Forward(model, device, steps, dtype=torch.float32, **WAYS[way])
    run = Run(forward, routed(model, steps, 0.2), Experts(model, torch.float32), eager=eager)
    deferred = {place for place in everything(run, 0.4) if place[1] + 1 < model.layers}
    on_cpu = {place for place in everything(run, 0.3, seed=1) if place[0] % 2} - deferred
    run = run._replace(on_cpu=on_cpu, deferred=deferred, pieces=batches == 2)
    close(walk(run), truth(run), roundings=IN_ANOTHER_ORDER)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_experts_on_the_cpu_cost_few_roundings(device: Poisoned, share: float) -> None:
    """The sums of GPU and CPU are rounded, and that of both, instead of one sum. One layer."""
    model, steps = spec(1, (0,), shared_width=24), served(*RAGGED)
    run = Run(Forward(model, device, steps), routed(model, steps), Experts(model, torch.bfloat16))
    run = run._replace(on_cpu=everything(run, share))
    close(walk(run), truth(run), roundings=4)


def test_a_prompt_is_the_same_at_once_and_token_by_token(device: Poisoned) -> None:
    model = MODELS["dense around"]
    table = np.random.default_rng(3).integers(model.vocab, size=16)
    whole, parts = served((8, 0), (8, 0)), served((3, 5), (5, 3))
    chosen = routed(model, whole)
    found = []
    for steps in (whole, parts):
        forward = Forward(model, device, steps, dtype=torch.float32)
        forward.ids = table[steps.rows]
        own = Routed(chosen.ids[steps.rows], chosen.weights[steps.rows])
        found.append((steps, walk(Run(forward, own, Experts(model, torch.float32)))))
    rows = [torch.zeros(16, model.hidden) for _ in found]
    for target, (steps, made) in zip(rows, found, strict=True):
        for offset, streams in zip(steps.offset, made.streams, strict=True):
            target[steps.rows[offset[0] : offset[-1]]] = streams[-1]
    every = [Reference([[one] * model.layers], []) for one in rows]
    close(every[0], every[1], roundings=IN_ANOTHER_ORDER)


def test_the_router_chooses_for_itself(device: Poisoned) -> None:
    """What it chose is kept for who asks, and what it is told counts."""
    model, steps = MODELS["plain"], served((5, 0))
    forward = Forward(model, device, steps, dtype=torch.float32)
    forward.begin(0)
    forward.attention(0, 0)
    forward.gate(0, 0)
    ids, weights = forward.choice[0]
    assert ids.shape == weights.shape == (5, model.top_k)
    torch.testing.assert_close(weights.sum(1), torch.ones(5))
    with pytest.raises(RealError, match="layer 0 is not routed yet"):
        forward.inputs(0, 0)
    forward.route(0, 0, np.array([[0, 1], [3, NONE], [1, 0], [NONE, NONE], [0, 9]]), None)
    routing = forward.choices.of(0)
    assert routing.active == (0, 1, 3)
    assert routing.rows[routing.span(0)].tolist() == [0, 2, 4]
    assert routing.places[routing.span(0)].tolist() == [0, 5, 8]
    assert routing.weights.tolist() == [[0.5, 0.5], [0.5, 0], [0.5, 0.5], [0, 0], [0.5, 0]]
    assert routing.span(2) == slice(5, 5)
    assert forward.inputs(0, 3).shape == (1, model.hidden)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_moved_has_the_bytes_that_are_counted(device: Poisoned, name: str) -> None:
    model, steps = MODELS[name], served(*RAGGED)
    copied: list[int] = []
    plain_copy = device.copy

    def copy(target: Any, source: Any) -> None:
        copied.append(source.numel() * source.element_size())
        plain_copy(target, source)

    forward = Forward(model, device, steps, kv_on_host=True, dense_on_host=True)
    device.copy = copy  # type: ignore[method-assign]
    forward.begin(0)
    for layer in range(model.layers):
        copied.clear()
        forward.dense_in(layer)
        assert copied == [2 * streamed_params(model)[layer]]
        forward.attention(layer, 0)
        copied.clear()
        forward.kv_out(layer, 0)
        assert sum(copied) == kv_bytes_per_token(model)[layer] * forward.now.tokens
        copied.clear()
        forward.send(layer)
        assert copied == [2 * model.hidden * forward.now.tokens]
    forward.begin(1)
    copied.clear()
    forward.kv_in(0, 0)
    assert sum(copied) == kv_bytes_per_token(model)[0] * steps.kept[1, 0]


def test_nothing_is_predicted_on_the_cpu_while_it_attends(device: Poisoned) -> None:
    model, steps = MODELS["plain"], served((3, 1))
    forward = Forward(model, device, steps, **WAYS["cpu"])
    forward.begin(1)
    forward.attention(0, 0)
    with pytest.raises(RealError, match="layer 0: with attention on the CPU nothing can be"):
        forward.send(0)


LATENT = Latent(
    heads=2, kv_lora_rank=8, q_lora_rank=0, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (spec(attention=LATENT), {}, "tiny has latent attention"),
        (spec(attentions_per_layer=2), {}, "tiny has 2 attentions per layer; 1 can be"),
        (spec(cacheless_layer_ids=(1,)), {}, "tiny has 1 layers with a mixer"),
        (spec(), {"attention_on_cpu": True}, "needs keys and values on the host"),
        (spec(4, (2, 3)), WAYS["cpu"], "tiny has layers without experts before MoE layers"),
    ],
)
def test_what_cannot_be_computed_is_refused(
    device: Poisoned, model: ModelSpec, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RealError, match=message) as refused:
        Forward(model, device, served((3, 1)), **options)
    assert "\n" not in str(refused.value)


def test_a_device_that_is_too_small_says_so() -> None:
    model = spec(hidden=1024)
    device = Poisoned(1 << 20)
    assert 2 * sum(streamed_params(model)) > device.memory_bytes
    try:
        with pytest.raises(CalibrationError, match="do not fit"):
            Forward(model, device, served((3, 1)))
    finally:
        device.close()
