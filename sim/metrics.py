"""What a run is measured by: every number that moesim reports is defined here.

TTFT: the end of the step that forwards the prompts. ITL: every gap between two tokens of one
sequence; TPOT: (last - first token) / (tokens - 1) of a sequence. An activation is one (layer
step, expert) with at least one token, and has exactly one outcome (`types.OUTCOMES`). `hit_rate`
is (resident + arrived) / all, by expert, in decode. The makespan ends with the last token; copies
still under way then are reported as drained.
"""

import hashlib
from typing import Any

import numpy as np

from moesim import __version__
from moesim.model import model_digest
from moesim.profile import profile_digest
from moesim.residency import DROPPED, PREFETCHED, USED, WASTED_BYTES
from moesim.sim.replay import Replayed
from moesim.sim.rules import WAITS, Totals
from moesim.traces.workload import Workload
from moesim.types import (
    BITS,
    CAUSES,
    COPY_IN,
    DEMAND,
    DENSE_IN,
    DISK_READ,
    KINDS,
    KV_IN,
    KV_OUT,
    LANES,
    OUTCOMES,
    PHASES,
    PREFETCH,
    RESIZE,
    RETURN,
    SEND,
    SOURCES,
    SWAP,
)

TIMES = (*KINDS[: RESIZE + 1], *(f"wait_{what}" for what in WAITS))
"""Keys of `time_ns`: what the GPU does, and what it waits for when it does nothing."""

LITTLE = 0.1
"""A share of the time that is not worth another policy."""

WAITS_IN_WORDS = {
    "wait_weights": "weights on the link",
    "wait_cpu": "results of the CPU",
    "wait_host": "the host program",
    "wait_kv": "keys and values on the link",
    "wait_dense": "weights outside the experts on the link",
    "wait_disk": "the disk",
}


def summarize(run: Replayed) -> dict[str, Any]:
    """Return all results of a run, ready for JSON; the same inputs give the same values.

    Only `run.wall_s` differs from one execution to the next.
    """
    prepared = run.prepared
    last = run.heads[-1]
    latency = latencies(run)
    by_layer = np.asarray(prepared.host.counts)
    counts = by_layer.sum(axis=0)
    counters = np.asarray(prepared.host.res.counters)
    outcomes = {name: int(counts[:, i, 0].sum()) for i, name in enumerate(OUTCOMES)}
    prefetched = int(counters[PREFETCHED])
    return {
        "policy": prepared.chosen.spec,
        **latency,
        "makespan_ns": last.now_ns,
        "time_ns": dict(zip(TIMES, map(int, last.time_ns), strict=True)),
        "activations": {**outcomes, "total": sum(outcomes.values())},
        "activations_by_phase": {
            phase: {name: int(counts[p, i, 0]) for i, name in enumerate(OUTCOMES)}
            for p, phase in enumerate(PHASES)
        },
        "activations_by_token": {
            name: int(counts[:, i, 1].sum()) for i, name in enumerate(OUTCOMES)
        },
        "hit_rate": hit_rate(counts[1, :, 0]),
        "hit_rate_by_token": hit_rate(counts[1, :, 1]),
        "hit_rate_by_layer": [hit_rate(row) for row in by_layer[:, 1, :, 0]],
        "hit_rate_prefill": hit_rate(counts[0, :, 0]),
        "link_bytes": link_bytes(last),
        "drained_bytes": sum(link_bytes(run.drained).values()) - sum(link_bytes(last).values()),
        "prefetch": {
            "fetched": prefetched,
            "used": int(counters[USED]),
            "precision": int(counters[USED]) / prefetched if prefetched else None,
            "dropped": int(counters[DROPPED]),
            "wasted_bytes": int(counters[WASTED_BYTES]),
            "predictors": list(prepared.predictors),
            "recall": [recall(run, at) for at in range(len(prepared.predictors))],
        },
        "lanes": {name: last.busy_ns[i] / last.now_ns for i, name in enumerate(LANES)},
        "provenance": shares(dict(zip(SOURCES, last.source_ns, strict=True))),
        "notices": list(prepared.notices),
        "run": identity(run),
    }


def latencies(run: Replayed) -> dict[str, Any]:
    """Return tokens per second, TTFT, TPOT and ITL, over all sequences."""
    ends = np.array([head.now_ns for head in run.heads])
    tokens = run.prepared.workload.generated
    gaps = np.concatenate([np.diff(ends[:n]) for n in tokens])
    tpot = [(ends[n - 1] - ends[0]) / (n - 1) for n in tokens if n > 1]
    return {
        "tokens_per_s": int(tokens.sum()) * 1e9 / int(ends[-1]),
        "ttft_ms": float(ends[0]) / 1e6,
        "tpot_ms": float(np.mean(tpot)) / 1e6 if tpot else None,
        "itl_ms": {
            f"p{q}": float(np.percentile(gaps, q)) / 1e6 if len(gaps) else None
            for q in (50, 90, 99)
        },
        "sequences": len(tokens),
        "prompt_tokens": int(run.prepared.workload.prompts.sum()),
        "output_tokens": int(tokens.sum()),
    }


def share_of_gain(makespan_ns: int, on_demand_ns: int, oracle_ns: int) -> float | None:
    """Return the share of the achievable gain in time that a policy reached.

    0 is the time of `on-demand` and 1 that of `oracle`. Neither is a bound, so that the share may
    lie outside; None if they take equally long.
    """
    gain = on_demand_ns - oracle_ns
    return (on_demand_ns - makespan_ns) / gain if gain else None


def hit_rate(counts: Any) -> float | None:
    """Return (resident + arrived) / all of one row of counts; None without activations."""
    total = int(counts.sum())
    return int(counts[0] + counts[1]) / total if total else None


def link_bytes(totals: Totals) -> dict[str, int]:
    """Return what was copied between host and GPU, and from disk, by cause."""
    copied = totals.copied_bytes
    return {
        **{CAUSES[cause]: int(copied[COPY_IN, cause]) for cause in (DEMAND, PREFETCH, SWAP)},
        "kv_in": int(copied[KV_IN].sum()),
        "kv_out": int(copied[KV_OUT].sum()),
        "dense": int(copied[DENSE_IN].sum()),
        "activations_out": int(copied[SEND].sum()),
        "activations_in": int(copied[RETURN].sum()),
        "disk": int(copied[DISK_READ].sum()),
    }


def shares(amounts: dict[str, int]) -> dict[str, float]:
    """Return each amount's share of their sum."""
    total = sum(amounts.values())
    return {name: amount / total if total else 0.0 for name, amount in amounts.items()}


def recall(run: Replayed, at: int) -> float | None:
    """Return predicted and needed / needed of a predictor's first top_k ids, where it guesses."""
    prepared = run.prepared
    truth = prepared.feed.chosen
    top_k = prepared.setting.top_k
    hit = needed = 0
    for begin in range(0, len(truth), 512):
        rows = slice(begin, begin + 512)
        guessed = prepared.feed.guesses[at][0][rows, :, :top_k]
        known = (truth[rows] >= 0) & (guessed[..., :1] >= 0)
        found = (truth[rows][..., :, None] == guessed[..., None, :]).any(axis=-1)
        hit += int((found & known).sum())
        needed += int(known.sum())
    return hit / needed if needed else None


def identity(run: Replayed) -> dict[str, Any]:
    """Return what identifies a run: hashes of its inputs, and how it was carried out."""
    prepared = run.prepared
    steps = len(run.heads)
    return {
        "moesim": __version__,
        "machine": run.machine,
        "trace": prepared.trace_digest,
        "workload": workload_digest(prepared.workload),
        "model": prepared.model.name,
        "model_digest": model_digest(prepared.model),
        "hardware": prepared.profile.name,
        "hardware_digest": profile_digest(prepared.profile),
        "parameters": prepared.chosen.parameters,
        "budget_bytes": prepared.setting.budget_bytes,
        "bits": BITS[prepared.setting.precision],
        "seed": prepared.setting.seed,
        "jitter": run.jitter / 1024,
        "steps": steps,
        "layer_steps": steps * prepared.setting.layers,
        "operations": run.operations,
        "preemptions": run.preemptions,
        "wall_s": run.wall_s,
    }


def workload_digest(workload: Workload) -> str:
    """Return 16 hex digits that change with the rows of a trace that are served, and how."""
    sha = hashlib.sha256(f"{workload.earlier}".encode())
    for array in (workload.rows, workload.starts, workload.prompts):
        sha.update(f" {len(array)} ".encode() + np.asarray(array, np.int64).tobytes())
    return sha.hexdigest()[:16]


def explain(result: dict[str, Any]) -> str:
    """Return one line that says where most of the time went, and what that points to.

    If the GPU computes for longer than it waits for any one thing, its work is one thing, too.
    """
    time_ns = result["time_ns"]
    waits = {name: ns for name, ns in time_ns.items() if name in WAITS_IN_WORDS}
    work = {name: ns for name, ns in time_ns.items() if name not in WAITS_IN_WORDS}
    worked_ns, waited_ns = sum(work.values()), sum(waits.values())
    what = max(waits, key=lambda name: waits[name])
    ns = max(worked_ns, waits[what])
    line = f"{ns / result['makespan_ns']:.0%} of the time the GPU "
    if worked_ns >= waits[what]:
        most = max(work, key=lambda name: work[name])
        line += f"computes, most of it {most}; "
        if waited_ns < LITTLE * result["makespan_ns"]:
            return line + "little is left for a policy to gain"
        return line + f"it waits most for {WAITS_IN_WORDS[what]}"
    lanes = {name: f"{share:.0%} busy" for name, share in result["lanes"].items()}
    copied = {cause: result["link_bytes"][cause] for cause in CAUSES[1:]}
    causes = ", ".join(f"{share:.0%} {name}" for name, share in shares(copied).items() if share)
    line += f"waits for {WAITS_IN_WORDS[what]}"
    if what == "wait_weights":
        line += f", which is {lanes['h2d']} ({causes})"
        wasted = result["prefetch"]["wasted_bytes"] / max(1, sum(copied.values()))
        if wasted > 0.1:
            line += f"; {wasted:.0%} of what is copied is never used"
    elif what == "wait_cpu":
        line += f", which is {lanes['cpu']}"
    return line


def by_step(run: Replayed) -> list[dict[str, Any]]:
    """Return one row per step: its tokens, its time split by cause, what it copied."""
    steps = run.prepared.feed.steps
    rows = []
    before: Totals | None = None
    for step, head in enumerate(run.heads):
        begin = before.now_ns if before else 0
        copied = link_bytes(head)
        earlier = link_bytes(before) if before else dict.fromkeys(copied, 0)
        spent = [t - (before.time_ns[i] if before else 0) for i, t in enumerate(head.time_ns)]
        rows.append(
            {
                "step": step,
                "phase": PHASES[steps.phase[step]],
                "tokens": int(steps.offset[step, -1] - steps.offset[step, 0]),
                "begin_ns": begin,
                "end_ns": head.now_ns,
                "duration_ns": head.now_ns - begin,
                **{f"{name}_ns": ns for name, ns in zip(TIMES, spent, strict=True)},
                **{f"{name}_bytes": copied[name] - earlier[name] for name in copied},
            }
        )
        before = head
    return rows
