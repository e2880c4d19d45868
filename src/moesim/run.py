"""Prepare a run: a trace, a model, a machine's costs and a policy become a host program's state."""

from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from moesim.costs import Costs, build_costs
from moesim.errors import InputError, MoesimError, PolicyError
from moesim.forecast import new_forecast
from moesim.model import ModelSpec
from moesim.policies.api import (
    Offline,
    Placement,
    Plan,
    Prediction,
    Setting,
    View,
    nothing_observed,
)
from moesim.policies.registry import Chosen
from moesim.profile import HardwareProfile, decision_ns
from moesim.residency import Residency, new_residency
from moesim.state import STATES, Host
from moesim.traces.format import Trace, rows_by_sequence
from moesim.traces.predictors import SEES_FUTURE, guess, resolve
from moesim.traces.stats import popularity
from moesim.traces.workload import Steps, Workload, steps_of
from moesim.types import BITS, NONE, OUTCOMES, PHASES, PREFILL, IntArray

MAX_BUDGET_BYTES = 1 << 50
MAX_SEED = (1 << 31) - 1


class Feed(NamedTuple):
    """What the router chose and what predictors guess, for the rows of a workload."""

    steps: Steps
    chosen: Any
    """(rows, layers, top_k) int16: ids in rank order, -1 for missing."""
    weights: Any
    """(rows, layers, top_k) float16, or None for equal weights."""
    guesses: tuple[tuple[Any, Any], ...]
    """Per prediction (rows, layers, width) ids int16, -1 for none, and scores or None."""


class Prepared(NamedTuple):
    """Everything but the machine: it may be run on any, once."""

    model: ModelSpec
    profile: HardwareProfile
    chosen: Chosen
    workload: Workload
    setting: Setting
    policy: Any
    placement: Placement
    feed: Feed
    host: Host
    predictors: tuple[str, ...]
    """Names of the predictors used, one per prediction."""
    notices: tuple[str, ...]
    trace_digest: str

    @property
    def chunk_bytes(self) -> int:
        """The chunk size that the placement asks for, else the machine's."""
        return self.placement.chunk_bytes or self.profile.link.chunk_bytes


def check_budget(budget_bytes: int, model: ModelSpec, bits: int, one: int) -> None:
    """Raise InputError for a budget that no policy can use; `one` expert has so many bytes."""
    if not 0 <= budget_bytes <= MAX_BUDGET_BYTES:
        raise InputError(f"a budget of {budget_bytes} bytes is not in 0..{MAX_BUDGET_BYTES}")
    if 0 < budget_bytes < one:
        raise InputError(
            f"a budget of {budget_bytes} bytes holds no expert: one of {model.name} takes {one} "
            f"bytes at {bits} bits (0 is legal where everything runs on the CPU)"
        )


def check_fit(trace: Trace, model: ModelSpec) -> None:
    """Raise InputError if the trace is of another model than the one described."""
    has = (trace.layers, trace.top_k)
    most = model.experts + model.weightless_experts
    if has != (model.layers, model.top_k) or trace.n_experts > most:
        raise InputError(
            f"the trace has {trace.layers} MoE layers of {trace.n_experts} experts, "
            f"top-{trace.top_k}; {model.name} has {model.layers} of {most}, "
            f"top-{model.top_k}"
        )


def prepare(
    trace: Trace, workload: Workload, model: ModelSpec, profile: HardwareProfile, chosen: Chosen, *,
    budget_bytes: int, bits: int = 16, seed: int = 0, costs: Costs | None = None,
) -> Prepared:  # fmt: skip
    """Return a run that is ready to start.

    `budget_bytes` is GPU memory for expert weights, staging included; `bits` the precision in which
    experts are stored on the host; `costs` replace those of the model on the machine. Raises
    InputError or PolicyError for what does not fit together.
    """
    check_fit(trace, model)
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f"seed {seed} is not in 0..{MAX_SEED}")
    if costs is None:
        costs = build_costs(model, profile, workload.step_tokens, workload.sequences)
    precision = BITS.index(bits)
    check_budget(budget_bytes, model, bits, int(costs.expert_bytes[:, precision].max()))
    counts = np.zeros((model.layers, model.experts), np.int64)
    seen = popularity(trace, workload.unused_rows(trace))
    counts[:, : seen.shape[1]] = seen[:, : model.experts]
    setting = Setting(
        layers=model.layers,
        experts=model.experts,
        top_k=model.top_k,
        budget_bytes=budget_bytes,
        precision=precision,
        costs=costs,
        sequences=workload.sequences,
        step_tokens=workload.step_tokens,
        popularity=counts,
        seed=seed,
        gpu_memory_bytes=profile.gpu.memory_bytes,
        host_memory_bytes=profile.cpu.memory_bytes,
        model=model,
        machine=profile,
        kv_tokens=workload.kv_tokens,
        offline=cache(partial(offline_of, trace, workload, model, seed)),
    )
    sees_future = getattr(chosen.cls, "declares_future", False)
    if sees_future:
        setting = setting._replace(future=future_of(trace, workload, model))
    try:
        policy = chosen.make(setting)
        placement = policy.place(setting)
        fifo = placement.link == "fifo"
        res = new_residency(placement, setting, fifo)
    except PolicyError as error:
        raise PolicyError(f"policy '{chosen.name}': {error}") from None
    except MoesimError:
        raise
    except Exception as error:
        raise PolicyError(f"policy '{chosen.name}': {type(error).__name__}: {error}") from error
    steps = steps_of(workload, placement.batches)
    predictors = tuple(
        resolve(trace, p.predictor, p.distance, after_gate=p.after_gate)
        for p in placement.predictions
    )
    feed = Feed(
        steps=steps,
        chosen=signed(trace.experts[steps.rows], model.experts),
        weights=None if trace.weights is None else trace.weights[steps.rows],
        guesses=tuple(
            guess_signed(trace, steps, name, p, model, seed)
            for name, p in zip(predictors, placement.predictions, strict=True)
        ),
    )
    notices = [*workload.notices, *placement.notices]
    if sees_future:
        notices.append(f"policy {chosen.name} sees the future")
    notices += [f"predictor {name} sees the future" for name in predictors if name in SEES_FUTURE]
    if trace.meta.get("has_rank_order") is False:
        notices.append("a token's experts are in no order; policies take them as they come")
    if trace.weights is None:
        notices.append("the trace has no router weights; they count as equal")
    if budget_bytes > profile.gpu.memory_bytes:
        notices.append(
            f"the budget of {budget_bytes / 2**30:.2f} GiB is more than the "
            f"{profile.gpu.memory_bytes / 2**30:.2f} GiB of {profile.gpu.name}"
        )
    return Prepared(
        model=model,
        profile=profile,
        chosen=chosen,
        workload=workload,
        setting=setting,
        policy=policy,
        placement=placement,
        feed=feed,
        host=new_host(setting, placement, profile, chosen, steps, res),
        predictors=predictors,
        notices=tuple(dict.fromkeys(notices)),
        trace_digest=trace.digest(),
    )


def future_of(trace: Trace, workload: Workload, model: ModelSpec) -> IntArray:
    """Return every activation of the run, as `Setting.future` has them."""
    steps = steps_of(workload)
    ids = signed(trace.experts[steps.rows], model.experts)
    shape = (len(steps.phase), model.layers, model.experts)
    step = np.repeat(np.arange(len(steps.phase)), np.diff(steps.offset[:, [0, -1]]).ravel())
    layer = np.arange(model.layers)[:, None]
    cells = (step[:, None, None] * model.layers + layer) * model.experts + ids
    found, tokens = np.unique(cells[ids >= 0], return_counts=True)
    return np.stack([*np.unravel_index(found, shape), tokens], axis=1).astype(np.int64)


def offline_of(
    trace: Trace, workload: Workload, model: ModelSpec, seed: int,
    prediction: Prediction | None = None,
) -> Offline:  # fmt: skip
    """Return what was observed beforehand, and what a predictor would have guessed then."""
    rows, starts = rows_by_sequence(trace)
    unused = workload.unused_rows(trace)[rows]
    before = np.concatenate([[0], np.cumsum(unused)])[starts]
    rows, starts = rows[unused], np.unique(before)
    if len(rows) == 0:
        return nothing_observed()
    part = trace.at(rows)
    guesses = np.zeros((0, 0, 0), np.int64)
    if prediction is not None:
        # Nothing of this part may be learned from what is replayed, so that it must learn online.
        distance = prediction.distance
        wanted = prediction.predictor.removesuffix("-offline")
        name = resolve(part, wanted, distance, after_gate=prediction.after_gate)
        found, _ = guess_signed(part, one_by_one(part, starts), name, prediction, model, seed)
        guesses = found.astype(np.int64)
    sequence = part.sequence.astype(np.int64)
    return Offline(signed(part.experts, model.experts), sequence, guesses)


def one_by_one(trace: Trace, starts: IntArray) -> Steps:
    """Return the steps of a trace's sequences, served one after the other; no costs are known."""
    ends: list[int] = []
    for first, last in pairwise(starts.tolist()):
        prompt = max(1, int((trace.phase[first:last] == PREFILL).sum()))
        ends += range(first + prompt, last + 1)
    offset: IntArray = np.stack([[0, *ends[:-1]], ends], axis=1).astype(np.int64)
    nothing = np.zeros((len(ends), 1), np.int64)
    return Steps(
        phase=np.zeros(len(ends), np.int64),
        rows=np.arange(trace.tokens),
        offset=offset,
        context=nothing,
        kept=nothing,
        sequences=nothing,
        sequence=np.repeat(np.arange(len(starts) - 1), np.diff(starts)),
    )


def signed(ids: Any, experts: int) -> Any:
    """Return uint16 ids as int16, with -1 for missing ones, and for experts without weights.

    Those have the ids from `experts` on; they pass a token on, and cost neither bytes nor time.
    """
    return np.where(ids >= experts, NONE, ids).astype(np.int16)


def guess_signed(
    trace: Trace, steps: Steps, name: str, p: Any, model: ModelSpec, seed: int
) -> tuple[Any, Any]:
    """Return one prediction's guesses for all rows, as a Feed has them."""
    width = max(p.width, model.top_k)
    ids, scores = guess(trace, steps, name, p.distance, width, recall=p.recall, seed=seed)
    wrapped = f"wrap{p.distance}"
    if p.wraps and name in trace.candidates and wrapped in trace.candidates:
        first = slice(0, p.distance)
        others, other_scores = guess(trace, steps, wrapped, p.distance, width)
        ids[:, first] = others[:, first]
        if scores is not None and other_scores is not None:
            scores[:, first] = other_scores[:, first]
    return signed(ids, model.experts), scores


def new_host(
    setting: Setting, placement: Placement, profile: HardwareProfile, chosen: Chosen, steps: Steps,
    res: Residency,
) -> Host:  # fmt: skip
    """Return a host program before its first step."""
    layers, experts, batches = setting.layers, setting.experts, placement.batches
    predictions = placement.predictions
    width = max([p.width for p in predictions] + [setting.top_k])
    tokens = setting.step_tokens
    costs = setting.costs
    host_costs = profile.host
    forecast = new_forecast(
        costs, host_costs.per_launch_ns, host_costs.per_sync_ns, len(res.slot_bytes)
    )

    def zeros(*shape: int) -> Any:
        return np.zeros(shape, np.int64)

    view = View(
        layer=0, step=0, phase=0, last_step=0, precision=setting.precision, batches=batches,
        batch=NONE, tokens=0, n_active=0, free_slots=0, window_ns=0,
        ids=np.full((tokens, setting.top_k), NONE, np.int64),
        weights=np.full((tokens, setting.top_k), 1 / setting.top_k),
        active=zeros(experts), loads=zeros(experts), loads_by_batch=zeros(batches, experts),
        scores=np.zeros(experts),
        cached=res.cached, staged=res.staged, pending=res.pending,
        cached_ticket=res.cached_ticket, staged_ticket=res.staged_ticket,
        gpu_ns=zeros(experts), cpu_ns=zeros(experts),
        predicted_tokens=zeros(len(predictions)),
        predicted_ids=np.full((len(predictions), tokens, width), NONE, np.int64),
        predicted_scores=np.zeros((len(predictions), tokens, width)),
        predicted_loads=zeros(len(predictions), experts),
        costs=costs, forecast=forecast,
    )  # fmt: skip
    return Host(
        costs=costs,
        forecast=forecast,
        res=res,
        plan=Plan(zeros(8 * experts + 256, 8), zeros(1)),
        steps=steps,
        state=zeros(STATES),
        layers=layers,
        experts=experts,
        top_k=setting.top_k,
        batches=batches,
        hooks=chosen.hooks,
        has_shared=int(costs.shared_ns.any()),
        host_computes=int(placement.host_computes),
        gemm_per_batch=int(placement.gemm_per_batch),
        kv_on_host=int(placement.kv_on_host),
        dense_on_host=int(placement.dense_on_host),
        attention_on_cpu=int(placement.attention_on_cpu),
        sync_batches=int(placement.sync_batches),
        per_layer_ns=profile.host.per_layer_ns,
        decision_ns=decision_ns(profile, chosen.name),
        predictions=np.array(
            [(int(p.after_gate), p.distance, p.lane) for p in predictions], np.int64
        ).reshape(-1, 3),
        first_token=zeros(batches + 1),
        gates=zeros(batches),
        kv_out=zeros(layers, batches),
        attended=zeros(batches),
        ran=zeros(experts),
        computed=zeros(experts),
        outcome=zeros(experts),
        counts=zeros(layers, len(PHASES), len(OUTCOMES), 2),
        ids=view.ids,
        weights=view.weights,
        active=view.active,
        loads=view.loads,
        loads_by_batch=view.loads_by_batch,
        scores=view.scores,
        gpu_ns=view.gpu_ns,
        cpu_ns=view.cpu_ns,
        predicted_tokens=view.predicted_tokens,
        predicted_ids=view.predicted_ids,
        predicted_scores=view.predicted_scores,
        predicted_loads=view.predicted_loads,
        seen=read_only(view),
    )


def read_only(arrays: Any) -> Any:
    """Return the same NamedTuple with views of its arrays that nobody can write to."""
    if isinstance(arrays, np.ndarray):
        seen = arrays.view()
        seen.flags.writeable = False
        return seen
    if hasattr(arrays, "_fields"):
        return type(arrays)(*map(read_only, arrays))
    return arrays
