"""Policies side by side: how fast each is with a budget and a batch, and how certain that is.

Each policy is replayed over some windows of the trace: the same workload, beginning at further
sequences of it. All that a row says is about these windows together. Over the first one it is
replayed again on machines of which one section after the other takes longer by as much as it may be
off (`uncertainty`); `ties` says what is made of both.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import product
from math import exp, log
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from moesim import __version__
from moesim.answers import verdict
from moesim.answers.inputs import Inputs, check_ratio
from moesim.answers.parallel import processes, spread
from moesim.answers.points import Named, Point, flat, prepared_of
from moesim.answers.result import frame_of
from moesim.answers.ties import CERTAIN, Timed, doubt, own_doubt, places
from moesim.answers.uncertainty import uncertainty_of
from moesim.errors import InputError, MoesimError, TraceError
from moesim.jit.store import record_of
from moesim.log import Log
from moesim.model import expert_bytes, model_digest
from moesim.policies.registry import BUILTIN, Chosen, choose
from moesim.profile import profile_digest
from moesim.run import Prepared
from moesim.sim.bound import bound
from moesim.sim.engine import (
    ENGINE_S,
    HOOKS_S,
    LAYER_STEPS_PER_S,
    engine_module,
    machine_for,
)
from moesim.sim.metrics import explain, hit_rate, share_of_gain, summarize
from moesim.sim.replay import Replayed, replay
from moesim.traces.workload import cut
from moesim.types import BITS, EXPERT_CPU, EXPERT_GPU

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from moesim.model import ModelSpec
    from moesim.profile import HardwareProfile
    from moesim.traces.format import Trace

BASELINE = "static"
ON_DEMAND, ORACLE = "on-demand", "oracle"
"""They stand for 0 % and 100 % of what can be gained, and are always replayed."""
ON_COPIES = ("wait_weights", "wait_kv", "wait_dense", "wait_disk")
"""Causes of time in which the GPU waits for a copy."""
DISK = "disk"
ANY = "static"
"""A policy that is prepared for every budget, where all that is asked is the same for any."""


class Comparison:
    """Policies side by side. `data` holds everything that `moesim compare --json` prints."""

    def __init__(self, data: dict[str, Any]) -> None:
        """Take what was found."""
        self.data = data

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One per policy, budget and batch: budgets and batches as given, the fastest first.

        Times and bytes are sums over all windows, `ttft_ms` and `tpot_ms` means. `low` and `high`
        are tokens/s within the policy's own uncertainty; `tied` are the policies with the same
        budget and batch that are certainly neither faster nor slower; `shifts` says by section of
        the machine what the logarithm of the time grows by if the section takes longer by as much
        as it may be off.
        """
        rows: list[dict[str, Any]] = self.data["rows"]
        return rows

    @property
    def refused(self) -> list[dict[str, Any]]:
        """What cannot run: policy, batch, budget, and the reason in one line."""
        refused: list[dict[str, Any]] = self.data["refused"]
        return refused

    def frame(self) -> "pd.DataFrame":
        """Return `rows` as a table; raise InputError without pandas."""
        return frame_of([flat(row) for row in self.rows])

    def __repr__(self) -> str:
        """Return the answer for each budget and batch."""
        return "\n".join(
            f"{verdict.heading(cell)}: {verdict.answer(cell)}" for cell in verdict.cells(self.data)
        )

    def _repr_html_(self) -> str:
        """Return the answers and their tables, for notebooks."""
        return verdict.page(self.data)


class Task(msgspec.Struct, frozen=True):
    """One policy with one budget and batch."""

    named: Named
    points: tuple[Point, ...]
    """One per window."""
    row: bool
    """Or else only its time counts."""
    uncertain: dict[str, float]
    """By section of the machine: by what share of their times they may be off."""
    replays: int
    """Of this policy with all budgets and batches, which compiling it may repay."""


class Measured(msgspec.Struct, frozen=True):
    """What a task found."""

    windows: tuple[dict[str, Any], ...]
    """Results of each, as `metrics.summarize` gives them."""
    decoded: Any = None
    """(layers, outcomes): activations in decode of all windows."""
    shifts: dict[str, float] = {}
    """See `ties.Timed`."""
    bits: tuple[int, ...] = ()
    """In which experts are computed beside the stored one."""
    deferral: bool = False
    """Results of the CPU are added a layer later than the model does."""
    bound_ns: int | None = None
    """Of what such a policy may do; None for one that changes no results."""
    error: str = ""
    """Why it cannot run; then there is nothing else."""

    @property
    def timed(self) -> Timed:
        """What is compared."""
        return Timed(
            tuple(one["makespan_ns"] for one in self.windows),
            tuple(one["output_tokens"] for one in self.windows),
            self.shifts,
        )


class Cell(NamedTuple):
    """A budget and a batch."""

    given: Inputs
    points: tuple[Point, ...]
    """Of any policy, one per window."""
    bound_ns: int
    """Of all windows, for policies that keep results."""
    tokens: int
    """Generated in all windows."""

    @property
    def named(self) -> Named:
        """What is loaded."""
        return Named(self.given.trace, self.given.model, self.given.profile)

    def points_of(self, policy: str) -> tuple[Point, ...]:
        """Return the replays of a policy."""
        return tuple(msgspec.structs.replace(point, policy=policy) for point in self.points)


def compare(
    trace: "Trace | Path | str | None" = None, *, policies: str | Iterable[str] = "all",
    baseline: str = BASELINE, budgets: Iterable[int | str] | None = None,
    cache_ratios: Iterable[float] | None = None, batches: Iterable[int] | None = None,
    windows: int = 3, jobs: int | None = None,
    model: "ModelSpec | str | None" = None, hardware: "HardwareProfile | str | None" = None,
    settings: Mapping[str, Any] | None = None, budget: int | str | None = None,
    cache_ratio: float | None = None, bits: int | str = 16, batch: int = 1,
    prompt: int | None = None, generate: int | None = None, start: int = 0,
    layers: int | None = None, repeat: bool = False, context: int = 0, machine: str = "auto",
    jitter: float = 0.0, seed: int = 0, progress: Callable[[int, int], None] | None = None,
) -> Comparison:  # fmt: skip
    """Replay policies with each budget and batch, and say which is fastest: `moesim compare`.

    `policies` are names or texts such as "dali:cache=lru"; one text may hold several names, with
    commas. "all" are those that ship with moesim and do not see the future. `baseline` is added to
    them. `windows` is how often the workload is cut from the trace, as far as that holds so much;
    `jobs` how many processes work, by default one per core. `progress` is called with how many
    policies are done, and how many there are. All else is as in `moesim.replay`.

    What one policy cannot do is in `Comparison.refused`. Raises MoesimError, in one line, for
    whatever else is not there, not legal or does not fit, and if no policy can run at all.
    """
    specs = [one.spec for one in policies_of(policies)]
    base = choose(baseline).spec
    specs += [base] * (base not in specs)
    sizes = [batch] if batches is None else list(batches)
    check(windows, jobs, sizes, jitter)
    same: dict[str, Any] = {
        "bits": int(bits), "prompt": prompt, "generate": generate, "start": start,
        "repeat": repeat, "context": context,
    }  # fmt: skip
    cells = cells_of(
        Inputs.load(
            trace, model=model, hardware=hardware, layers=layers, batch=sizes[0], budget=0,
            settings={key: str(value) for key, value in (settings or {}).items()}, **same,
        ),
        budgets_of(budgets, cache_ratios, budget, cache_ratio), sizes, windows, same,
        {"seed": seed, "jitter": jitter, "machine": machine},
    )  # fmt: skip
    given = cells[0].given
    uncertain = uncertainty_of(given.profile)
    replayed = [*specs, *(name for name in (ON_DEMAND, ORACLE) if name not in specs)]
    tasks = tasks_of(cells, replayed, specs, uncertain)
    if machine == "auto":
        prepare_engine(cells, tasks, jobs)
    results = [Measured(())] * len(tasks)
    for done, (index, measured) in enumerate(spread(measure, tasks, jobs), 1):
        results[index] = measured
        if progress is not None:
            progress(done, len(tasks))
    by_cell = [
        dict(zip(replayed, results[at : at + len(replayed)], strict=True))
        for at in range(0, len(results), len(replayed))
    ]
    return Comparison(
        {
            "baseline": base,
            **answers_of(cells, by_cell, specs, base),
            "notices": list(dict.fromkeys(line for one in cells for line in one.given.notices)),
            "model": given.model.name,
            "hardware": given.profile.name,
            "workload": identity(given) | same | {"seed": seed, "jitter": jitter},
            "uncertainty": {
                "certain_from_deviations": CERTAIN,
                "sections": sections_of(given.profile, uncertain),
            },
            "simulated": work_of(results),
        }
    )


def check(windows: int, jobs: int | None, batches: Sequence[int], jitter: float) -> None:
    """Raise InputError for what is not legal."""
    for name, value in (("windows", windows), ("jobs", jobs)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    if not batches:
        raise InputError("batches: none are given; write one or more, as 1,8")
    if not 0 <= jitter <= 1:
        raise InputError(f"jitter {jitter} is not in 0..1")


def names_in(text: str) -> list[str]:
    """Return the policies of a list with commas, all without parameters.

    Raises InputError for parameters, whose commas would be taken for others.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if "=" in name or ":" in name:
            raise InputError(
                f"policies {text!r}: a list takes names alone; parameters, as in"
                f" {name.partition(':')[0]}:KEY=VALUE, are given one policy at a time"
            )
    if not names:
        raise InputError(f"policies {text!r}: names no policy; write all, or static,lru,dali")
    return names


def policies_of(policies: str | Iterable[str]) -> list[Chosen]:
    """Return the policies that are asked for, each once; `all` stands for `comparable`.

    Raises InputError for one that is not there.
    """
    texts = names_in(policies) if isinstance(policies, str) else list(policies)
    specs = [spec for text in texts for spec in (comparable() if text == "all" else [text])]
    if not specs:
        raise InputError("policies: none are given; write all, or static,lru,dali")
    return list({one.spec: one for one in map(choose, specs)}.values())


def comparable() -> list[str]:
    """Return the policies that ship with moesim, but for those that see the future."""
    return [name for name in BUILTIN if not getattr(choose(name).cls, "declares_future", False)]


def budgets_of(
    budgets: Iterable[int | str] | None, cache_ratios: Iterable[float] | None,
    budget: int | str | None, cache_ratio: float | None,
) -> list[tuple[int | str | None, float | None]]:  # fmt: skip
    """Return each budget as a size or a share of all experts; both None is what the GPU has left.

    Raises InputError if several ways to say it are taken at once.
    """
    if sum(way is not None for way in (budgets, cache_ratios, budget, cache_ratio)) > 1:
        raise InputError("budgets and cache ratios, one or several, exclude each other: give one")
    sizes = [budget] if budgets is None else list(budgets)
    ratios = [cache_ratio] if cache_ratios is None else list(cache_ratios)
    for ratio in ratios:
        if ratio is not None:
            check_ratio(ratio)
    if not sizes or not ratios:
        raise InputError("budgets: none are given; write one or more, as 4GiB,8GiB")
    return [(size, ratio) for size in sizes for ratio in ratios]


def cells_of(
    loaded: Inputs, budgets: Sequence[tuple[int | str | None, float | None]],
    batches: Sequence[int], windows: int, same: Mapping[str, Any], simulated: Mapping[str, Any],
) -> list[Cell]:  # fmt: skip
    """Return each budget and batch once; `same` and `simulated` are fields of all points."""
    cells: dict[tuple[int, int], Cell] = {}
    for (budget, ratio), batch in product(budgets, batches):
        given = Inputs.load(
            loaded.trace, model=loaded.model, hardware=loaded.profile, budget=budget,
            cache_ratio=ratio, batch=batch, **same,
        )  # fmt: skip
        given = given._replace(notices=(*loaded.notices, *given.notices))
        point = Point(budget=given.budget_bytes, batch=batch, **same, **simulated)
        if (given.budget_bytes, batch) not in cells:
            cells[given.budget_bytes, batch] = cell_of(given, point, windows)
    return list(cells.values())


def cell_of(given: Inputs, first: Point, windows: int) -> Cell:
    """Return a cell: as many windows as the trace holds, and what no policy can beat in them."""
    points, works = [first], [given.workload]
    for number in range(1, windows):
        start = first.start + number * first.batch
        try:
            works.append(cut(given.trace, first.batch, first.prompt, first.generate, start))
        except TraceError:
            break
        points.append(msgspec.structs.replace(first, start=start, repeat=False))
    tokens = sum(int(work.generated.sum()) for work in works)
    cell = Cell(given, tuple(points), 0, tokens)
    prepared = [prepared_of(one, cell.named) for one in cell.points_of(ANY)]
    said = (line for one in prepared for line in one.notices)
    return cell._replace(
        given=given._replace(notices=(*given.notices, *said)),
        bound_ns=sum(bound(one).makespan_ns for one in prepared),
    )


def tasks_of(
    cells: Sequence[Cell], policies: Sequence[str], rows: Sequence[str],
    uncertain: Mapping[str, float],
) -> list[Task]:  # fmt: skip
    """Return what is to be done, cell by cell and policy by policy."""
    made = []
    windows = sum(len(cell.points) for cell in cells)
    for cell in cells:
        for policy in policies:
            row = policy in rows
            sections = dict(uncertain) if row else {}
            replays = windows + len(cells) * len(sections)
            made.append(Task(cell.named, cell.points_of(policy), row, sections, replays))
    return made


def prepare_engine(cells: Sequence[Cell], tasks: Sequence[Task], jobs: int | None) -> None:
    """Compile the host program, once and for all processes, if all replays together repay it."""
    if record_of(engine_module()):
        return
    prepared = prepared_of(cells[0].points_of(ANY)[0], cells[0].named)
    layer_steps = len(prepared.host.steps.phase) * prepared.setting.layers
    spared_s = 0.0
    for task in tasks[: len(tasks) // len(cells)]:
        simpy_s = task.replays * layer_steps / LAYER_STEPS_PER_S
        spared_s += max(0.0, simpy_s - HOOKS_S)
    if spared_s > ENGINE_S * processes(len(tasks), jobs):
        with suppress(InputError):
            machine_for(prepared, "compiled", lambda _: None)


def measure(task: Task) -> Measured:
    """Replay a policy over all windows and, for a row, on machines of which a section is slower."""
    try:
        return replayed_over(task)
    except MoesimError as error:
        return Measured((), error=str(error))


def replayed_over(task: Task) -> Measured:
    """Do what `measure` does; raise MoesimError for what cannot be done."""
    first, *others = task.points
    prepared = prepared_of(first, task.named)
    machine = machine_for(prepared, first.machine, lambda _: None, task.replays)

    def run(prepared: Prepared, record: bool = False) -> Replayed:
        jitter = round(first.jitter * 1024)
        return replay(prepared, machine=machine, seed=first.seed, jitter=jitter, record=record)

    runs = [run(prepared, record=task.row)]
    runs += [run(prepared_of(point, task.named)) for point in others]
    windows = tuple(map(summarize, runs))
    if not task.row:
        return Measured(windows)
    assert runs[0].log is not None
    bits, deferral = changes(runs[0].log, prepared.setting.precision)
    bound_ns = None
    if bits or deferral:
        bounds = [bound(one.prepared, bits=bits, deferral=deferral) for one in runs]
        bound_ns = sum(one.makespan_ns for one in bounds)
    shifts = {}
    for section, share in task.uncertain.items():
        if section != DISK or windows[0]["link_bytes"][DISK]:
            slower = msgspec.structs.replace(first, stretch={section: 1 + share})
            ns = run(prepared_of(slower, task.named)).heads[-1].now_ns
            shifts[section] = log(ns / windows[0]["makespan_ns"])
    decoded = sum(np.asarray(one.prepared.host.counts)[:, 1, :, 0] for one in runs)
    return Measured(windows, decoded, shifts, bits, deferral, bound_ns)


def changes(log: Log, stored: int) -> tuple[tuple[int, ...], bool]:
    """Return in which other precisions experts were computed, and whether results came late."""
    ran = log.operations[np.isin(log.operations["kind"], (EXPERT_GPU, EXPERT_CPU))]
    others = sorted({int(code) for code in np.unique(ran["precision"])} - {stored})
    late = bool(((ran["kind"] == EXPERT_CPU) & (ran["context"] == 1)).any())
    return tuple(BITS[code] for code in others), late


def rows_of(
    cell: Cell, able: Sequence[str], measured: Mapping[str, Measured], base: str
) -> list[dict[str, Any]]:
    """Return the rows of a cell, the fastest first; `able` are the policies that can run."""
    timed = {name: measured[name].timed for name in able}
    rows = []
    for name, place in places(timed).items():
        own, total = timed[name], together(measured[name])
        deviation = CERTAIN * own_doubt(own)
        bound_ns = measured[name].bound_ns or cell.bound_ns
        rows.append(
            {
                "policy": name,
                "batch": cell.given.workload.sequences,
                "budget_bytes": cell.given.budget_bytes,
                "rank": place.rank,
                "tokens_per_s": own.tokens_per_s,
                "low": own.tokens_per_s * exp(-deviation),
                "high": own.tokens_per_s * exp(deviation),
                **speedup(own, timed.get(base)),
                **total,
                "gain": gain(own, measured),
                "bound_tokens_per_s": cell.tokens * 1e9 / bound_ns,
                "changes": changes_in_words(measured[name]),
                "shifts": measured[name].shifts,
                "tied": list(place.tied),
                "notices": measured[name].windows[0]["notices"],
            }
        )
    return rows


def speedup(own: Timed, base: Timed | None) -> dict[str, float | None]:
    """Return how many times as fast a policy is as the baseline, and within what limits."""
    if base is None:
        return dict.fromkeys(("speedup", "speedup_low", "speedup_high"))
    ratio, deviation = sum(base.ns) / sum(own.ns), CERTAIN * doubt(own, base)
    return {
        "speedup": ratio,
        "speedup_low": ratio * exp(-deviation),
        "speedup_high": ratio * exp(deviation),
    }


def gain(own: Timed, references: Mapping[str, Measured]) -> float | None:
    """Return the share of what an oracle gains over on-demand; None if one of them cannot run."""
    slow, fast = references[ON_DEMAND], references[ORACLE]
    if slow.error or fast.error:
        return None
    return share_of_gain(sum(own.ns), sum(slow.timed.ns), sum(fast.timed.ns))


def together(measured: Measured) -> dict[str, Any]:
    """Return the results of all windows as those of one run."""
    windows = measured.windows
    makespan_ns = sum(one["makespan_ns"] for one in windows)
    time_ns, link_bytes = (
        {key: sum(one[what][key] for one in windows) for key in windows[0][what]}
        for what in ("time_ns", "link_bytes")
    )
    lanes = {
        name: sum(one["lanes"][name] * one["makespan_ns"] for one in windows) / makespan_ns
        for name in windows[0]["lanes"]
    }
    wasted = sum(one["prefetch"]["wasted_bytes"] for one in windows)
    why = explain(
        {
            "time_ns": time_ns,
            "makespan_ns": makespan_ns,
            "lanes": lanes,
            "link_bytes": link_bytes,
            "prefetch": {"wasted_bytes": wasted},
        }
    )
    tpot = [one["tpot_ms"] for one in windows if one["tpot_ms"] is not None]
    rate = hit_rate(measured.decoded.sum(axis=0))
    by_layer = None if rate is None else [hit_rate(row) for row in measured.decoded]
    return {
        "ttft_ms": float(np.mean([one["ttft_ms"] for one in windows])),
        "tpot_ms": float(np.mean(tpot)) if tpot else None,
        "makespan_ns": makespan_ns,
        "output_tokens": sum(one["output_tokens"] for one in windows),
        "hit_rate": rate,
        "link_bytes": sum(size for cause, size in link_bytes.items() if cause != DISK),
        "exposed_ns": sum(time_ns[cause] for cause in ON_COPIES),
        "why": why,
        "time_ns": time_ns,
        "hit_rate_by_layer": by_layer,
    }


def changes_in_words(measured: Measured) -> list[str]:
    """Return what a policy does to results that the model itself does not."""
    bits = " and ".join(map(str, measured.bits))
    said = [f"computes experts from {bits} bits"] if bits else []
    return said + ["adds results of the CPU a layer later"] * measured.deferral


def refusal(cell: Cell, policy: str, error: str) -> dict[str, Any]:
    """Return what `Comparison.refused` says of a policy."""
    return {
        "policy": policy,
        "batch": cell.given.workload.sequences,
        "budget_bytes": cell.given.budget_bytes,
        "error": error,
    }


def answers_of(
    cells: Sequence[Cell], by_cell: Sequence[Mapping[str, Measured]], specs: Sequence[str],
    base: str,
) -> dict[str, Any]:  # fmt: skip
    """Return cells, rows and what was refused; raise InputError if that is all."""
    rows, refused = [], []
    for cell, measured in zip(cells, by_cell, strict=True):
        able = [name for name in specs if not measured[name].error]
        rows += rows_of(cell, able, measured, base)
        refused += [refusal(cell, name, measured[name].error) for name in specs if name not in able]
    if not rows:
        raise InputError(f"no policy can run: {refused[0]['error']}")
    summaries = list(map(summary_of, cells, by_cell))
    return {"cells": summaries, "rows": rows, "refused": refused}


def summary_of(cell: Cell, measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Return what holds for all policies of a cell."""
    spec, given = cell.given.model, cell.given
    all_bytes = spec.layers * spec.experts * expert_bytes(spec, given.bits)
    speeds = {
        f"{name.replace('-', '_')}_tokens_per_s": None if own.error else own.timed.tokens_per_s
        for name, own in ((name, measured[name]) for name in (ON_DEMAND, ORACLE))
    }
    return {
        "batch": given.workload.sequences,
        "budget_bytes": given.budget_bytes,
        "cache_ratio": given.budget_bytes / all_bytes,
        "windows": len(cell.points),
        "prompt_tokens": int(given.workload.prompts.sum()),
        "output_tokens": int(given.workload.generated.sum()),
        "bound_tokens_per_s": cell.tokens * 1e9 / cell.bound_ns,
        **speeds,
    }


def identity(given: Inputs) -> dict[str, Any]:
    """Return what identifies trace, model and machine."""
    return {
        "moesim": __version__,
        "trace": given.trace.digest(),
        "model_digest": model_digest(given.model),
        "hardware_digest": profile_digest(given.profile),
        "layers": given.model.layers,
        "experts": given.model.experts,
    }


def sections_of(profile: "HardwareProfile", uncertain: Mapping[str, float]) -> dict[str, Any]:
    """Return by how much the sections of a machine may be off, and where their numbers are from."""
    return {
        name: {"share": share, "source": getattr(profile.provenance, name).source}
        for name, share in uncertain.items()
    }


def work_of(results: Sequence[Measured]) -> dict[str, Any]:
    """Return how many replays there were, and on which machines."""
    runs = [one["run"] for found in results for one in found.windows]
    return {
        "replays": len(runs) + sum(len(found.shifts) for found in results),
        "machines": sorted({run["machine"] for run in runs}),
    }
