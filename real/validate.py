"""Hold simulated runs against measured ones of the same workload: how far off, and because of what.

Errors are simulated / measured - 1: below 0 the simulator promises too little time, or too little
speed. Of several measured runs of a policy the median counts; where the time went is told of the
run whose makespan is the median, so that it adds up.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from moesim.costs import stretched
from moesim.log import Log
from moesim.run import Prepared
from moesim.sim.metrics import TIMES, link_bytes, summarize
from moesim.sim.replay import Replayed, SimpyRun, replay
from moesim.sim.simpy_machine import SimpyMachine
from moesim.sim.timeline import timeline
from moesim.state import OK, host_error
from moesim.types import (
    GPU,
    KINDS,
    LANE_OF_QUEUE,
    as_scalars,
)

METRICS = {
    "tpot": "tpot_ms",
    "ttft": "ttft_ms",
    "tokens_per_s": "tokens_per_s",
    "makespan": "makespan_ns",
}
"""What errors are told of, and its key in the results of a run."""
TIMELY = ("arrived", "late")
"""Outcomes that depend on when a copy arrives; only their sum is the policy's."""
COPIED = {"demand", "prefetch"}
"""Causes of copies that move bytes to each other when a prefetch is taken back in time."""
MEASURED, SIMULATED = 0, 1
"""Process ids of a timeline of both."""


class Spent(NamedTuple):
    """Operations of one kind, and the time that lanes worked on them, slowed down or not."""

    operations: int
    ns: int

    @property
    def mean_ns(self) -> float | None:
        """Mean of one operation; None without any."""
        return self.ns / self.operations if self.operations else None


class Observed(NamedTuple):
    """What is kept of a run, measured or simulated."""

    result: dict[str, Any]
    """See `metrics.summarize`."""
    copied: dict[str, int]
    """Bytes by cause, copies still under way at the end included."""
    kinds: dict[str, Spent]
    handing_over_ns: int
    """In which the GPU did nothing although what it was to do next waited for nothing any more: a
    thread had yet to wake up. Part of `wait_host`; 0 where it is simulated."""


def observe(run: Replayed) -> Observed:
    """Return what is compared of a run, which must have a log."""
    log = run.log
    if log is None:
        raise ValueError("a comparison needs a recorded run")
    segments = log.segments[log.segments["ticket"] > 0]  # 0: the host's own pauses
    rows = segments["ticket"] - 1
    ns = np.bincount(rows, segments["end_ns"] - segments["start_ns"], len(log.operations))
    over = np.zeros(len(log.operations), bool)
    over[rows[segments["done"] == 1]] = True
    kinds = {}
    for kind, name in enumerate(KINDS):
        own = over & (log.operations["kind"] == kind)
        if own.any():
            kinds[name] = Spent(int(own.sum()), int(ns[own].sum()))
    return Observed(summarize(run), link_bytes(run.drained), kinds, handing_over_ns(log))


def handing_over_ns(log: Log) -> int:
    """Add up how long operations of the GPU began after they could; see `Observed`."""
    operations = log.operations
    lanes = np.array(LANE_OF_QUEUE)[operations["queue"]]
    segments = [row for row in log.segments.tolist() if row[0] > 0]
    over_ns = {ticket: end for ticket, _, end, done in segments if done}
    late_ns = before_ns = 0
    for ticket, start, end, _ in sorted(segments, key=lambda row: int(row[1])):
        if lanes[ticket - 1] == GPU:
            own = operations[ticket - 1]
            after = [over_ns.get(int(other), 0) for other in own["after"]]
            late_ns += max(0, start - max(before_ns, int(own["submit_ns"]), *after))
            before_ns = end
    return late_ns


class Compared(NamedTuple):
    """What came of a validation."""

    rows: tuple[dict[str, Any], ...]
    """One per policy; see `compare`."""
    ranking: dict[str, Any]
    """See `ranking`."""
    measured: Replayed
    """Of the first policy, the run whose makespan is the median; and the simulated one."""
    simulated: Replayed


def validate(
    makes: Mapping[str, Callable[[], Prepared]], run: Callable[[str], Replayed], repeats: int
) -> Compared:
    """Run each policy so often, and compare it with its simulation.

    `makes` prepare a run by policy, anew each time; `run` carries out one on the machine. Repeats
    of the policies are interleaved, so that the machine's drift hits all alike.
    """
    first = next(iter(makes))
    simulated_first = replay(makes[first](), record=True)
    simulated = {first: observe(simulated_first)}
    for name, make in makes.items():
        if name != first:
            simulated[name] = observe(replay(make(), record=True))
    measured: dict[str, list[Observed]] = {name: [] for name in makes}
    kept = []
    for _ in range(repeats):
        for name in makes:
            one = run(name)
            measured[name].append(observe(one))
            if name == first:
                kept.append(one)
    rows = []
    for name, make in makes.items():
        what_if = alternatives(make, typical(measured[name]), simulated[name])
        rows.append(compare(measured[name], simulated[name], what_if))
    return Compared(
        tuple(rows),
        ranking(rows),
        kept[measured[first].index(typical(measured[first]))],
        simulated_first,
    )


def error(simulated: float | None, measured: float | None) -> float | None:
    """Return simulated / measured - 1; None where there is nothing to compare."""
    return simulated / measured - 1 if simulated is not None and measured else None


def typical(measured: Sequence[Observed]) -> Observed:
    """Return the run whose makespan is the median; of an even number, the faster one."""
    ordered = sorted(measured, key=lambda run: run.result["makespan_ns"])
    return ordered[(len(ordered) - 1) // 2]


def compare(
    measured: Sequence[Observed], simulated: Observed, what_if: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Return one policy's row, ready for JSON.

    `what_if` are simulated makespans in ns by kind of operation, had that kind taken as long as it
    did when measured, and by `all` for all kinds at once; see `alternatives`.
    """
    own = typical(measured)
    row: dict[str, Any] = {"policy": simulated.result["policy"]}
    numbers = {}
    for metric, key in METRICS.items():
        repeats = [run.result[key] for run in measured]
        middle = None if None in repeats else median(repeats)
        simulated_one = simulated.result[key]
        row[f"{metric}_error"] = error(simulated_one, middle)
        numbers[key] = {
            "measured": middle,
            "simulated": simulated_one,
            "spread": (max(repeats) - min(repeats)) / middle if middle else None,
            "repeats": repeats,
        }
    off = Off(own.result["makespan_ns"], simulated.result["makespan_ns"])
    row |= numbers
    row["time_ns"] = causes(own, simulated, off)
    row["handing_over_ns"] = {
        "measured": own.handing_over_ns,
        "simulated": simulated.handing_over_ns,
        **off.of(simulated.handing_over_ns - own.handing_over_ns),
    }
    row["kinds"] = kinds_of(own, simulated, off, what_if or {})
    # What no operation's length explains: the host program, handing over, their order.
    row["rest"] = off.of(what_if["all"] - off.measured_ns) if what_if else None
    row["link_bytes"] = {
        cause: {"measured": own.copied[cause], "simulated": simulated.copied[cause]}
        for cause in simulated.copied
    }
    row["activations"] = {
        outcome: {"measured": own.result["activations"][outcome], "simulated": count}
        for outcome, count in simulated.result["activations"].items()
    }
    row["differences"] = list(differences(measured, simulated))
    row["explains"] = explained(row)
    return row


class Off(NamedTuple):
    """Makespans of a measured and a simulated run."""

    measured_ns: int
    simulated_ns: int

    def of(self, part_ns: int) -> dict[str, Any]:
        """Return what a part of the difference is, of the measured makespan and of the error.

        The latter is None where there is no error.
        """
        whole_ns = self.simulated_ns - self.measured_ns
        return {
            "part": part_ns / self.measured_ns,
            "share": part_ns / whole_ns if whole_ns else None,
        }


def causes(own: Observed, simulated: Observed, off: Off) -> dict[str, Any]:
    """Return what the GPU did or waited for in both, and how much of the error each is; the parts
    sum to it, and the shares to 1."""
    found = {}
    for what in TIMES:
        mine, theirs = own.result["time_ns"][what], simulated.result["time_ns"][what]
        found[what] = {"measured": mine, "simulated": theirs, **off.of(theirs - mine)}
    return found


def kinds_of(
    own: Observed, simulated: Observed, off: Off, what_if: Mapping[str, int]
) -> dict[str, Any]:
    """Return how long operations of each kind take in both, and what of the error vanishes when
    they are simulated as long as measured; None where that is not known."""
    found: dict[str, Any] = {}
    for name in KINDS:
        if name not in own.kinds and name not in simulated.kinds:
            continue
        mine, theirs = (run.kinds.get(name, Spent(0, 0)) for run in (own, simulated))
        found[name] = {
            "measured_count": mine.operations,
            "simulated_count": theirs.operations,
            "measured_ns": mine.mean_ns,
            "simulated_ns": theirs.mean_ns,
            "error": error(theirs.mean_ns, mine.mean_ns),
            "part": None,
            "share": None,
        }
        if name in what_if:
            found[name] |= off.of(off.simulated_ns - what_if[name])
    return found


def differences(measured: Sequence[Observed], simulated: Observed) -> Iterator[dict[str, Any]]:
    """Give bytes and outcomes in which any measured run differs from the simulated one.

    `timing` says that the moment at which something arrives may be the reason: prefetches that
    were taken back before they began, and what was on its way. Others ought not to be.
    """
    prefetches = any(run.copied["prefetch"] for run in (*measured, simulated))
    for cause, wanted in simulated.copied.items():
        found = [run.copied[cause] for run in measured]
        if set(found) != {wanted}:
            timing = prefetches and cause in COPIED
            yield {
                "what": f"{cause} bytes", "measured": found, "simulated": wanted, "timing": timing
            }  # fmt: skip
    for outcome, wanted in simulated.result["activations"].items():
        found = [run.result["activations"][outcome] for run in measured]
        if set(found) != {wanted}:
            timing = outcome in TIMELY or (prefetches and outcome == "fetched")
            yield {"what": outcome, "measured": found, "simulated": wanted, "timing": timing}


def explained(row: Mapping[str, Any]) -> str:
    """Return in a line what the largest part of a row's error in makespan is, and what operations
    have most to do with it."""
    what, own = max(row["time_ns"].items(), key=lambda item: abs(item[1]["part"]))
    if own["part"] == 0:
        return "simulated and measured times are the same"
    line = (
        f"{sum(one['part'] for one in row['time_ns'].values()):+.1%} of the makespan, most by "
        f"{in_words(what)}: {own['part']:+.1%} (measured {own['measured'] / 1e6:.1f} ms, simulated "
        f"{own['simulated'] / 1e6:.1f})"
    )
    parts = {name: kind["part"] for name, kind in row["kinds"].items() if kind["part"]}
    if not parts or row["rest"] is None:
        return line
    name = max(parts, key=lambda name: abs(parts[name]))
    if abs(row["rest"]["part"]) > abs(parts[name]):
        return (
            f"{line}; {row['rest']['part']:+.1%} is in no operation's length; handing over makes "
            f"{row['handing_over_ns']['part']:+.1%}"
        )
    return (
        f"{line}; {parts[name]:+.1%} is in the length of {in_words(name)}, simulated "
        f"{row['kinds'][name]['error']:+.1%}"
    )


def in_words(name: str) -> str:
    """Return a kind or a cause as one says it."""
    return name.replace("_", " ")


def ranking(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return whether policies are in the same order: Kendall's tau of their TPOT, and which pairs
    are swapped.

    By the makespan where nothing is decoded. Tau is that of the medians; `kendall_tau_spread` is
    that of the taus of the single repeats. None for fewer than two policies, or if all are equal.
    """
    key = METRICS["tpot" if all(row["tpot_ms"]["measured"] for row in rows) else "makespan"]
    simulated = [row[key]["simulated"] for row in rows]
    repeats = list(zip(*(row[key]["repeats"] for row in rows), strict=True))
    by_repeat = [tau(simulated, one) for one in repeats]
    known = [one for one in by_repeat if one is not None]
    return {
        "ranked_by": key,
        "kendall_tau": tau(simulated, [row[key]["measured"] for row in rows]),
        "kendall_tau_by_repeat": by_repeat,
        "kendall_tau_spread": max(known) - min(known) if known else None,
        "swapped": [
            {
                "faster": first["policy"],
                "slower": second["policy"],
                "measured": [first[key]["measured"], second[key]["measured"]],
                "simulated": [first[key]["simulated"], second[key]["simulated"]],
                "within_spread": max(first[key]["repeats"]) >= min(second[key]["repeats"]),
            }
            for one, other in combinations(rows, 2)
            for first, second in [sorted((one, other), key=lambda row: row[key]["measured"])]
            if first[key]["measured"] < second[key]["measured"]
            and first[key]["simulated"] > second[key]["simulated"]
        ],
    }


def tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Kendall's tau-b of two lists; None where it is not defined."""
    from scipy.stats import kendalltau

    if len(first) < 2:
        return None
    found = float(kendalltau(first, second).statistic)
    return None if np.isnan(found) else found


class Altered(SimpyMachine):
    """A machine on which operations of some kinds take another time; the host does not know."""

    def __init__(self, prepared: Prepared, factors: Mapping[int, float]) -> None:
        """Stretch each kind by its factor."""
        costs = prepared.setting.costs
        super().__init__(costs, prepared.feed, prepared.profile.rates(), prepared.chunk_bytes)
        self.plain = as_scalars(costs)
        self.altered = {kind: as_scalars(stretched(costs, kind, f)) for kind, f in factors.items()}

    def submit(self, queue: int, kind: int, *rest: int) -> int:
        """See `Machine.submit`."""
        self.costs = self.altered.get(kind, self.plain)
        return super().submit(queue, kind, *rest)


def alternatives(
    make: Callable[[], Prepared], measured: Observed, simulated: Observed
) -> dict[str, int]:
    """Return simulated makespans in ns, had operations taken what they took when measured.

    By each kind that is in both, and by `all` for all kinds at once; `make` prepares the run anew.
    """
    factors = {}
    for kind, name in enumerate(KINDS):
        if name in measured.kinds and name in simulated.kinds:
            mine, theirs = measured.kinds[name].mean_ns, simulated.kinds[name].mean_ns
            if mine and theirs:
                factors[kind] = mine / theirs
    found = {KINDS[kind]: makespan_ns(make(), {kind: factor}) for kind, factor in factors.items()}
    found["all"] = makespan_ns(make(), factors)
    return found


def makespan_ns(prepared: Prepared, factors: Mapping[int, float]) -> int:
    """Return the simulated makespan with other lengths of operations."""
    host = prepared.host
    run = SimpyRun(prepared, seed=0, jitter=0, record=False)
    run.machine = Altered(prepared, factors)
    if run.steps(0, len(host.steps.phase)) != OK:
        raise host_error(host, prepared.chosen.name)
    return run.heads()[-1].now_ns


def timelines(measured: Replayed, simulated: Replayed) -> dict[str, Any]:
    """Return one Chrome trace of two runs, each a process whose threads are its lanes."""
    merged: dict[str, Any] = {}
    events = []
    for pid, name, run in ((MEASURED, "measured", measured), (SIMULATED, "simulated", simulated)):
        own = timeline(run)
        merged = merged or own
        title = f"{name}: {run.prepared.chosen.spec} on {run.machine}"
        events += [
            {"ph": "M", "name": what, "pid": pid, "tid": 0, "ts": 0, "args": {key: value}}
            for what, key, value in (
                ("process_name", "name", title), ("process_sort_index", "sort_index", pid)
            )
        ]  # fmt: skip
        events += [
            event | {"pid": pid} for event in own["traceEvents"] if event["name"] != "process_name"
        ]
    return merged | {"traceEvents": events}
