"""Generate text with a Hugging Face MoE whose experts a policy offloads, on real lanes."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from moesim.errors import InputError, PolicyError, TraceError
from moesim.model import ModelSpec, spec_to_dict
from moesim.real.device import Device
from moesim.real.engine import (
    WARM_UP_STEPS,
    Demands,
    cleared,
    demands,
    filled_slots,
    replayed,
    uncollected,
    walk,
)
from moesim.real.guesses import Guesses, check_live
from moesim.real.model_forward import ModelForward, check_parts
from moesim.real.modules import Parts, check_experts, placed, understood
from moesim.real.store import Experts
from moesim.real.torch_machine import Operation, TorchMachine
from moesim.real.weights import Shape
from moesim.real.works import Works
from moesim.residency import contents
from moesim.run import Prepared
from moesim.sim.replay import Replayed
from moesim.traces.edit import join
from moesim.traces.format import MISSING, Trace
from moesim.traces.recorder.hooks import MeanInputs
from moesim.traces.workload import Steps, Workload
from moesim.types import BITS, DECODE, EXPERT_CPU, EXPERT_GPU, PREDICT, PREFILL, as_scalars

SHORT = 8
"""Tokens of the simulated run that says what a policy asks of the weights."""

Make = Callable[[Trace, Workload], Prepared]
"""Prepares a run; see `run.prepare`."""
OnToken = Callable[[int, int, bool], None]
"""Called with the number of a sequence, its next token, and whether that is its last one."""
Watch = Callable[[int, ModelForward], None]
"""Called after each step."""


class Request(NamedTuple):
    """What is to be generated: from each prompt up to `tokens`, or to one of the `stop` ids."""

    prompts: Sequence[Sequence[int]]
    tokens: int
    stop: Sequence[int] = ()
    temperature: float = 0.0
    """0 takes the likeliest token."""
    seed: int = 0


class Observed(NamedTuple):
    """What is known of the model from other text."""

    profile: Trace | None = None
    """What policies learn from beforehand."""
    mean_inputs: MeanInputs | None = None
    """(layers, hidden): of the routers, for guesses corrected by residuals."""


NOTHING = Observed()


class Generated(NamedTuple):
    """What came of it."""

    run: Replayed
    tokens: tuple[tuple[int, ...], ...]
    """Of each sequence; the last may be a stop id."""
    trace: Trace
    """What the routers chose for the tokens that count."""


def generate(
    parts: Parts, device: Device, make: Make, request: Request, *, observed: Observed = NOTHING,
    on_token: OnToken | None = None, watch: Watch | None = None, warm_up: int = WARM_UP_STEPS,
    folder: Path | None = None,
) -> Generated:  # fmt: skip
    """Generate what is requested, the routed experts being where the policy has them.

    Experts are taken from the model, which cannot be called any more afterwards. A sequence that
    has ended is computed on until all have; its tokens no longer count. First `warm_up` steps are
    run without counting. The lanes of the device must be idle; its memory is given back.

    Raises RealError or RecordError for a model that cannot be run, InputError or PolicyError for a
    policy that cannot run it, and what goes wrong on a lane.
    """
    trace, workload = unrouted(parts.spec, request, observed)
    try:
        first = make(trace, workload)
    except TraceError as error:
        known = observed.mean_inputs is not None or "residual" not in str(error)
        missing = "" if known else " (residual1, ... need mean router inputs)"
        raise InputError(f"{error}{missing}") from None
    check_policy(first)
    with understood(parts):
        check_experts(parts)
        with cleared(device), placed(parts, device):
            check_parts(parts, device)
    short = request._replace(tokens=min(request.tokens, SHORT))
    asked = demands(make(*at_random(*unrouted(parts.spec, short, observed), first)))
    experts = store(parts, device, first, asked, folder)
    try:
        if warm_up:
            once = request._replace(stop=())
            _run(parts, device, make(trace, workload), once, observed, experts, asked, warm_up)
        return _run(
            parts, device, make(trace, workload), request, observed, experts, asked, request.tokens,
            on_token, watch,
        )  # fmt: skip
    finally:
        experts.close()


def check_policy(prepared: Prepared) -> None:
    """Raise InputError or PolicyError for what a policy wants and a model that runs has not."""
    name, placement = prepared.chosen.name, prepared.placement
    if getattr(prepared.chosen.cls, "declares_future", False):
        raise PolicyError(f"policy {name} sees the future, which nobody does while a model runs")
    check_live(name, prepared.predictors)
    for what, wanted in (
        ("keys and values on the host", placement.kv_on_host),
        ("weights outside the experts on the host", placement.dense_on_host),
        ("attention on the CPU", placement.attention_on_cpu),
    ):
        if wanted:
            raise PolicyError(
                f"policy {name} wants {what}; in a model that runs, all but the experts stays on "
                "the device"
            )


def unrouted(spec: ModelSpec, request: Request, observed: Observed) -> tuple[Trace, Workload]:
    """Return a trace of what will be computed, without any choice, and the profile behind it.

    It names the predictors that there will be.

    Raises InputError for what was observed of another model.
    """
    profile, means = observed
    if means is not None and means.shape != (spec.layers, spec.hidden):
        raise InputError(
            f"mean router inputs are {means.shape}; {spec.name} needs {(spec.layers, spec.hidden)}"
        )
    prompts = np.array([len(prompt) for prompt in request.prompts], np.int64)
    lengths = prompts + request.tokens - 1
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    position = np.concatenate([np.arange(n) for n in lengths])
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    shape = (len(position), spec.layers, spec.top_k)
    trace = Trace(
        experts=np.full(shape, MISSING, np.uint16),
        weights=np.zeros(shape, np.float16),
        layer_ids=np.array(spec.layer_ids, np.int32),
        phase=np.where(position < prompts[sequence], PREFILL, DECODE).astype(np.uint8),
        sequence=sequence.astype(np.int32),
        position=position.astype(np.int32),
        meta={"model": spec.name, "num_experts": spec.experts, "spec": spec_to_dict(spec)},
    )
    if profile is not None:
        trace, _ = join([trace, profile], ["the model", "the profile"])
    known = {} if profile is None else profile.candidates
    kinds = ["gate"] if means is None else ["gate", "residual"]
    names = [f"{kind}{distance}" for kind in kinds for distance in range(1, spec.layers + 1)]
    trace = msgspec.structs.replace(
        trace,
        weights=np.zeros(trace.experts.shape, np.float16),
        candidates={name: behind(known.get(name), trace) for name in names},
        candidate_scores={},
    )
    return trace, Workload(rows=np.arange(starts[-1]), starts=starts, prompts=prompts)


def behind(known: Any, trace: Trace) -> Any:
    """Return guesses (tokens, layers, width) for the last rows of a trace, none for the others."""
    width = 1 if known is None else known.shape[2]
    ids = np.full((trace.tokens, trace.layers, width), MISSING, np.uint16)
    if known is not None:
        ids[-len(known) :] = known
    return ids


def at_random(trace: Trace, workload: Workload, first: Prepared) -> tuple[Trace, Workload]:
    """Return the same with choices at random, which are guessed rightly, too."""
    random = np.random.default_rng(first.setting.seed)
    ids = trace.experts.copy()
    experts = first.model.experts
    drawn = random.integers(experts, size=(len(workload.rows), trace.layers, 1))
    ids[workload.rows] = (drawn + np.arange(trace.top_k)) % experts
    return msgspec.structs.replace(
        trace, experts=ids, candidates=dict.fromkeys(trace.candidates, ids)
    ), workload


def store(
    parts: Parts, device: Device, prepared: Prepared, asked: Demands, folder: Path | None
) -> Experts:
    """Move the experts' weights from the model to a store, in all precisions asked for.

    A layer's are let go as soon as they are there, unless they are needed again: then the host has
    both at once.
    """
    spec, on_disk = parts.spec, prepared.placement.on_disk
    once = on_disk is None and len(asked.precisions) == 1

    def take(layer: int, expert: int) -> tuple[Any, Any, Any]:
        found = parts.experts[layer].matrices(expert)
        if once and expert == spec.experts - 1:
            parts.experts[layer].release()
        return found

    shape = Shape(spec.hidden, spec.expert_width, asked.parts)
    bits = BITS[prepared.setting.precision]
    experts = Experts(
        device, shape, spec.layers, spec.experts, take, bits, on_disk=on_disk, folder=folder
    )
    try:
        experts.prepare(asked.precisions)
    except BaseException:
        experts.close()
        raise
    for own in parts.experts:
        own.release()
    return experts


class LiveWorks(Works):
    """Works whose routing and guesses are what the model makes them; see `Works`."""

    def __init__(self, guesses: Guesses, *parts: Any) -> None:
        """Take what guesses, and the same."""
        super().__init__(*parts)
        self.guesses = guesses
        self.kinds[PREDICT] = self.predict

    def predict(self, o: Operation) -> Sequence[Any]:
        """Guess."""
        return [self.guesses.work(o)]

    def choice(self, step: int, layer: int, batch: int) -> tuple[Any, Any]:
        """See `Doer.choice`."""
        return self.guesses.forward.chosen(batch)

    def guess(self, guess: int, layer: int) -> tuple[Any, Any] | None:
        """See `Doer.guess`."""
        return self.guesses.of(guess, layer)


def _run(
    parts: Parts, device: Device, prepared: Prepared, request: Request, observed: Observed,
    experts: Experts, asked: Demands, most: int, on_token: OnToken | None = None,
    watch: Watch | None = None,
) -> Generated:  # fmt: skip
    """Run at most so many steps."""
    host, feed = prepared.host, prepared.feed
    initial, slot_bytes = contents(host.res), host.res.slot_bytes.copy()
    said: list[list[int]] = [[] for _ in request.prompts]
    with cleared(device), placed(parts, device), uncollected():
        forward = ModelForward(
            parts, device, feed.steps, np.concatenate([np.asarray(p) for p in request.prompts]),
            temperature=request.temperature, seed=request.seed,
        )  # fmt: skip
        guesses = Guesses(
            forward, prepared.placement.predictions, prepared.predictors, feed, observed.mean_inputs
        )
        slots = filled_slots(device, experts, slot_bytes, initial, asked.precisions)
        works = LiveWorks(
            guesses, device, experts, forward, slots, host.res, prepared.chunk_bytes,
            asked.precisions, parts.activation,
        )  # fmt: skip
        fast = as_scalars(host)._replace(seen=host.seen)
        machine = TorchMachine(device, feed, works)
        started = time.perf_counter()
        steps = 0
        while steps < most and not all(over(own, request) for own in said):
            walk(machine, prepared, fast, steps)
            if watch is not None:
                watch(steps, forward)
            steps += 1
            for sequence, token in enumerate(forward.tokens.tolist()):
                if not over(said[sequence], request):
                    said[sequence].append(token)
                    if on_token is not None:
                        on_token(sequence, token, over(said[sequence], request))
        machine.drain()
        wall_s = time.perf_counter() - started
        served = cut_off(prepared, steps, [len(own) for own in said])
        run = replayed(served, machine, device.label, initial, slot_bytes, wall_s)
    return Generated(run, tuple(map(tuple, said)), routing(served, request, said))


def changes(run: Replayed) -> list[str]:
    """Say what the policy did that the model itself does not: then what is generated differs."""
    assert run.log is not None
    ran = run.log.operations[np.isin(run.log.operations["kind"], (EXPERT_GPU, EXPERT_CPU))]
    said = []
    for precision, bits in enumerate(BITS):
        share = float((ran["precision"] == precision).mean())
        if bits < BITS[0] and share:
            said.append(f"{share:.1%} of the experts' runs were computed from {bits} bits")
    late = float(((ran["kind"] == EXPERT_CPU) & (ran["context"] == 1)).mean())
    if late:
        said.append(f"{late:.1%} of the experts' results were added a layer later")
    return said


def over(tokens: Sequence[int], request: Request) -> bool:
    """Say whether a sequence has ended."""
    return bool(tokens) and (len(tokens) == request.tokens or tokens[-1] in request.stop)


def cut_off(prepared: Prepared, count: int, tokens: Sequence[int]) -> Prepared:
    """Return a run that ended after so many steps, in which sequences count so many tokens."""
    feed, whole = prepared.feed, prepared.feed.steps
    rows = int(whole.offset[count - 1, -1])
    steps = Steps(
        phase=whole.phase[:count],
        rows=whole.rows[:rows],
        offset=whole.offset[:count],
        context=whole.context[:count],
        kept=whole.kept[:count],
        sequences=whole.sequences[:count],
        sequence=whole.sequence[:rows],
    )
    served = prepared.workload
    lengths = served.prompts + np.asarray(tokens) - 1
    own = [served.rows[a : a + n] for a, n in zip(served.starts[:-1], lengths, strict=True)]
    return prepared._replace(
        workload=msgspec.structs.replace(
            served, rows=np.concatenate(own), starts=np.concatenate([[0], np.cumsum(lengths)])
        ),
        feed=feed._replace(
            steps=steps,
            chosen=feed.chosen[:rows],
            weights=feed.weights[:rows],
            guesses=tuple(
                (ids[:rows], None if scores is None else scores[:rows])
                for ids, scores in feed.guesses
            ),
        ),
        host=prepared.host._replace(steps=steps),
    )


def routing(prepared: Prepared, request: Request, said: Sequence[Sequence[int]]) -> Trace:
    """Return what was chosen for the tokens that count, in the order in which they came."""
    feed, spec = prepared.feed, prepared.model
    sequence, prompts = feed.steps.sequence, prepared.workload.prompts
    order = np.argsort(sequence, kind="stable")
    position = np.empty_like(order)
    position[order] = np.arange(len(order)) - np.searchsorted(sequence[order], sequence[order])
    lengths = np.diff(prepared.workload.starts)
    counts = position < lengths[sequence]
    read = [[*prompt, *own] for prompt, own in zip(request.prompts, said, strict=True)]
    places = np.stack([sequence, position], axis=1)[counts].tolist()
    return Trace(
        experts=feed.chosen[counts].astype(np.uint16),
        weights=feed.weights[counts],
        layer_ids=np.array(spec.layer_ids, np.int32),
        phase=np.where(position < prompts[sequence], PREFILL, DECODE)[counts].astype(np.uint8),
        sequence=sequence[counts].astype(np.int32),
        position=position[counts].astype(np.int32),
        token_id=np.array([read[own][at] for own, at in places], np.int32),
        meta={
            "model": spec.name,
            "num_experts": spec.experts,
            "spec": spec_to_dict(spec),
            "importer": "generate",
            "has_rank_order": True,
        },
    )
