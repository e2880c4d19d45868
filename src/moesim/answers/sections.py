"""What a report says about each kind of result: answers, tables and pictures, ready to be shown."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from moesim.answers import interactive, swept, verdict
from moesim.answers.advise import headline
from moesim.answers.documents import (
    Advised,
    Both,
    Compared,
    Document,
    Point,
    Ranked,
    Row,
    Run,
    Swept,
    Timed,
    Validated,
)
from moesim.answers.interactive import Plot, percent
from moesim.answers.memory import ways_out
from moesim.answers.points import flat
from moesim.sim import metrics
from moesim.sizes import size_in_words
from moesim.types import OUTCOMES

SIMULATORS = ("simpy", "compiled")
"""Machines that give the same results; any other is a real one."""


MOST_ROWS = 50
"""Of a sweep's tables."""


class Cell(NamedTuple):
    """A number of a table, rounded, and exact for those who point at it."""

    text: str
    exact: str = ""


class Head(NamedTuple):
    """The title of a column."""

    text: str
    number: bool = True


class Table(NamedTuple):
    """Rows of texts and numbers."""

    title: str
    heads: list[Head]
    rows: list[list[str | Cell]]


class Section(NamedTuple):
    """What a report says about one thing."""

    title: str
    answers: list[str]
    """What the reader came for; all sections' answers open the page."""
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    lines: Sequence[str] = ()
    notes: Sequence[str] = ()
    identity: Sequence[Table] = ()
    about: tuple[str, str] | None = None
    """Model and hardware."""


def sections_of(documents: Sequence[Document]) -> list[Section]:
    """Return the sections of a page: those of single runs first, which are read side by side."""
    runs = [one for one in documents if isinstance(one.content, Run)]
    sections = of_runs(runs)
    for form, write in WRITERS.items():
        sections += [write(one) for one in documents if isinstance(one.content, form)]
    return sections


def of_runs(documents: Sequence[Document]) -> list[Section]:
    """Return a section for each question that was asked: runs of one workload on one machine."""
    groups: dict[tuple[Any, ...], list[Document]] = {}
    for one in documents:
        groups.setdefault(question(one.content), []).append(one)
    sections: list[Section] = []
    for group in groups.values():
        mine = sorted(
            group, key=lambda one: (one.content.run.budget_bytes, -one.content.tokens_per_s)
        )
        first: Run = mine[0].content
        measured = first.run.machine not in SIMULATORS
        where = f"device {first.run.machine}" if measured else first.run.hardware
        title = (
            f"{first.run.model} {'measured ' if measured else ''}on {where}: "
            f"{in_all(first.sequences, first.prompt_tokens, first.output_tokens)}"
        )
        if first.run.jitter:
            title += f", operations up to {first.run.jitter:.1%} longer"
        if title in (section.title for section in sections):
            title += f", workload {first.run.workload or 'unknown'}"
        rows = [row_of(one.content) for one in mine]
        tables = [
            speed_table(f"{size_in_words(some[0].budget_bytes)} for experts", some)
            for some in by_budget(rows)
        ]
        notes = dict.fromkeys(line for one in mine for line in one.content.notices)
        sources = dict.fromkeys(sources_in_words(one.content.provenance) for one in mine)
        lines = [f"The durations rest on {one} numbers." for one in sources]
        if measured:
            lines = [f"Policies decided by the profile {first.run.hardware}."]
        if len(groups) > 1:
            lines.append("Runs of other workloads, models or machines have sections of their own.")
        sections.append(
            Section(
                title,
                answers_of(rows),
                [*tables, *run_tables([one.content for one in mine]), time_table(rows)],
                pictures(rows),
                lines=lines,
                notes=list(notes),
                identity=run_identity(title, mine),
                about=(first.run.model, where),
            )
        )
    return sections


def question(run: Run) -> tuple[Any, ...]:
    """Return what must be equal for runs to be compared; policy and budget may differ."""
    about = run.run
    real = None if about.machine in SIMULATORS else about.machine
    return (
        about.trace, about.workload, about.model_digest, about.hardware_digest, about.bits,
        about.seed, about.jitter, run.sequences, run.prompt_tokens, run.output_tokens, real,
    )  # fmt: skip


def row_of(run: Run) -> Row:
    """Return a run as a row of a comparison."""
    return Row(
        policy=run.policy, batch=run.sequences, budget_bytes=run.run.budget_bytes,
        tokens_per_s=run.tokens_per_s, ttft_ms=run.ttft_ms, tpot_ms=run.tpot_ms,
        makespan_ns=run.makespan_ns, hit_rate=run.hit_rate, time_ns=run.time_ns,
        hit_rate_by_layer=run.hit_rate_by_layer,
        why=metrics.explain(msgspec.to_builtins(run)),
    )  # fmt: skip


def of_comparison(document: Document) -> Section:
    """Return the section of a comparison, in the words of `moesim compare`."""
    found: Compared = document.content
    data = msgspec.to_builtins(found)
    cells = verdict.cells(data)
    answers = [f"{verdict.heading(one)}: {verdict.answer(one)}" for one in cells]
    if len(cells) == 1:
        answers += verdict.reasons(cells[0])
    tables = []
    for one in cells:
        rows = [row for row in found.rows if of_cell(row, one.about)]
        tables.append(comparison_table(verdict.heading(one), rows, found.baseline))
    if found.rows:
        tables.append(time_table(found.rows))
    notes = [line for one in cells for line in verdict.below(one)]
    about = {
        "file": document.name, "digest of the file": document.digest, "model": found.model,
        "hardware": found.hardware, "baseline": found.baseline, "workload": found.workload,
    }  # fmt: skip
    return Section(
        f"{found.model} on {found.hardware}: policies compared{named(document)}",
        answers,
        tables,
        pictures(found.rows),
        notes=[*dict.fromkeys(notes), *verdict.rule(data), *found.notices],
        identity=[facts(f"Comparison {document.name}", about)],
        about=(found.model, found.hardware),
    )


def of_cell(row: Row, about: Mapping[str, Any]) -> bool:
    """Say whether a row is of a cell's budget and batch."""
    return (row.budget_bytes, row.batch) == (about["budget_bytes"], about["batch"])


def of_sweep(document: Document) -> Section:
    """Return the section of a sweep: the best point, of each policy, and for each budget."""
    found: Swept = document.content
    good = [(point, point.row) for point in found.points if point.row is not None]
    good.sort(key=lambda one: -one[1].tokens_per_s)
    failed = [point for point in found.points if point.row is None]
    keys = list(found.points[0].swept)
    by_policy: dict[str, tuple[Point, Row]] = {}
    for one in good:
        by_policy.setdefault(one[1].policy, one)
    best = list(by_policy.values())
    plain = [
        {swept.SPEED: row.tokens_per_s, swept.MEMORY: row.budget_bytes, "at": at}
        for at, (_, row) in enumerate(good)
    ]
    pareto = [good[one["at"]] for one in swept.front(plain)]
    tables = [
        sweep_table("The best point of each policy", keys, best),
        sweep_table("What is worth its memory: faster than all with less", keys, pareto),
        *([time_table([row for _, row in best])] if best else []),
    ]
    if failed:
        heads = [Head(key, False) for key in (*keys, "cannot run")]
        rows: list[list[str | Cell]] = [
            [*map(str, point.swept.values()), str(point.error)] for point in failed[:MOST_ROWS]
        ]
        tables.append(Table(f"{len(failed)} points cannot run", heads, rows))
    answers = ["No point can run"]
    if best:
        point, row = best[0]
        speed = f"{row.tokens_per_s:.2f} tokens/s"
        line = f"{row.policy} is fastest of {len(found.points)} points: {speed}"
        if len(best) > 1:
            other = best[1][1]
            line += (
                f", {row.tokens_per_s / other.tokens_per_s:.2f} times the best of {other.policy}, "
                f"the next, with {other.tokens_per_s:.2f}"
            )
        answers = [line, f"Fastest at {interactive.setting(point)}"]
        answers += [f"{row.policy}: {row.why}"] if row.why else []
    top = [row for _, row in best]
    about = {"file": document.name, "digest of the file": document.digest, **found.shared}
    model, hardware = (found.shared.get(key) for key in ("model", "hardware"))
    return Section(
        f"Sweep {document.name}",
        answers,
        tables,
        [interactive.sweep(found.points), interactive.times(top)] if top else [],
        identity=[facts(f"Sweep {document.name}", about)],
        about=(str(model), str(hardware)) if model and hardware else None,
    )


def sweep_table(
    title: str, keys: Sequence[str], points: Sequence[tuple[Point, Row]]
) -> Table:  # fmt: skip
    """Return a table of points of a sweep."""
    heads = [Head("policy", False), Head("tokens/s"), Head("budget")]
    heads += [Head("TTFT ms"), Head("TPOT ms"), Head("hit rate")]
    own = [key for key in keys if key != "policy"]
    heads += [Head(key, False) for key in own]
    rows: list[list[str | Cell]] = [
        [
            row.policy, cell(row.tokens_per_s), size_cell(row.budget_bytes), cell(row.ttft_ms),
            cell(row.tpot_ms), share_cell(row.hit_rate), *(str(point.swept[key]) for key in own),
        ]
        for point, row in points[:MOST_ROWS]
    ]  # fmt: skip
    more = f", {MOST_ROWS} of {len(points)}" if len(points) > MOST_ROWS else ""
    return Table(title + more, heads, rows)


def of_advice(document: Document) -> Section:
    """Return the section of an advice: the policy, what limits it, and what would help."""
    found: Advised = document.content
    tables = []
    heads = [Head("policy", False), Head("decode tokens/s"), Head("prefill tokens/s")]
    heads += [Head("changes results", False), Head("why", False)]
    if found.candidates:
        rows: list[list[str | Cell]] = [
            [row.policy, cell(row.decode_tokens_per_s), cell(row.prefill_tokens_per_s),
             row.changes, row.why]
            for row in found.candidates
        ]  # fmt: skip
        tables.append(Table("Policies", heads, rows))
    memory: list[list[str | Cell]] = [
        [name.replace("_", " "), size_cell(size)] for name, size in found.memory.gpu.items()
    ]
    tables.append(Table("GPU memory", [Head("", False), Head("")], memory))
    if found.limits is not None:
        slower: list[list[str | Cell]] = [
            [name, share_cell(cost)] for name, cost in found.limits.slower_by_10_percent.items()
        ]
        heads = [Head("if this takes 10 % longer", False), Head("all takes longer by")]
        tables.append(Table("What limits it", heads, slower))
    if found.upgrades:
        better: list[list[str | Cell]] = [
            [row.upgrade, cell(row.decode_tokens_per_s), Cell(f"{row.gain:+.1%}", repr(row.gain)),
             row.policy]
            for row in found.upgrades
        ]  # fmt: skip
        heads = [Head("upgrade", False), Head("decode tokens/s"), Head("gain")]
        tables.append(Table("What would help", [*heads, Head("with", False)], better))
    if found.engines:
        engines: list[list[str | Cell]] = [
            [row.engine, row.flags, cell(row.decode_tokens_per_s), cell(row.prefill_tokens_per_s),
             share_cell(row.loss), "; ".join(row.notes)]
            for row in found.engines
        ]  # fmt: skip
        heads = [Head("engine", False), Head("flags", False), Head("decode tokens/s")]
        heads += [Head("prefill tokens/s"), Head("lost"), Head("notes", False)]
        tables.append(Table("How engines are set for it", heads, engines))
    refused = [f"{one.policy} cannot run: {one.error}" for one in found.refused]
    about = {
        "file": document.name, "digest of the file": document.digest, "model": found.model,
        "model digest": found.model_digest, "hardware": found.hardware,
        "hardware digest": found.hardware_digest, "context": found.context, "bits": found.bits,
        "batch": found.batch, "workload": found.workload or {}, "moesim": found.moesim,
    }  # fmt: skip
    data = msgspec.to_builtins(found)
    answers = [headline(data), *([found.limits.why] if found.limits else ways_out(data))]
    return Section(
        f"{found.model} on {found.hardware}: what to do{named(document)}",
        answers,
        tables,
        [interactive.advice(found)] if found.candidates else [],
        notes=[*refused, *found.notices],
        identity=[facts(f"Advice {document.name}", about)],
        about=(found.model, found.hardware),
    )


def of_validation(document: Document) -> Section:
    """Return the section of a validation: how far simulated runs are from measured ones."""
    found: Validated = document.content
    whole = found.ranked_by == "makespan_ns"
    name = "makespan" if whole else "TPOT"
    off = [row.tpot_error for row in found.policies if row.tpot_error is not None and not whole]
    if whole:
        off = [
            both.simulated / both.measured - 1
            for both in (row.makespan_ns for row in found.policies)
            if both.measured and both.simulated is not None
        ]
    answers = []
    if off:
        answers.append(
            f"Simulated {name} is off by {min(off):+.1%} to {max(off):+.1%} from what was measured "
            f"on the {found.device} device ({found.device_name}), {found.model}"
        )
    if found.kendall_tau is not None:
        same = "the same" if not found.swapped and found.kendall_tau > 0.999 else "not the same"
        answers.append(
            f"The order of {len(found.policies)} policies is {same}: Kendall's tau "
            f"{found.kendall_tau:.2f}"
        )
    heads = [Head("policy", False)]
    for what in ("TPOT ms", "TTFT ms", "tokens/s"):
        heads += [Head(f"{what} measured"), Head("simulated"), Head("error")]
    heads.insert(4, Head("spread"))
    rows: list[list[str | Cell]] = [
        [
            row.policy,
            *both_cells(row.tpot_ms, row.tpot_error),
            share_cell(row.tpot_ms.spread),
            *both_cells(row.ttft_ms, row.ttft_error),
            *both_cells(row.tokens_per_s, row.tokens_per_s_error),
        ]
        for row in found.policies
    ]
    reasons: list[list[str | Cell]] = [[row.policy, row.explains] for row in found.policies]
    about = {
        "file": document.name, "digest of the file": document.digest, "device": found.device,
        "device name": found.device_name, "hardware": found.hardware,
        "hardware digest": found.hardware_digest, "model": found.model,
        "workload": found.workload, "repeats": found.repeats, "machine": found.machine,
        "simulated durations": sources_in_words(found.provenance),
    }  # fmt: skip
    return Section(
        f"{found.model} on {found.hardware}: simulated against measured{named(document)}",
        answers,
        [
            Table("", heads, rows),
            Table(
                "What the errors consist of",
                [Head("policy", False), Head("simulated - measured", False)],
                reasons,
            ),
        ],
        [interactive.validation(found), interactive.errors(found)],
        lines=[
            "Errors are simulated / measured - 1; the spread is that of the "
            f"{found.repeats} measurements."
        ],
        notes=found.notices,
        identity=[facts(f"Validation {document.name}", about)],
        about=(found.model, found.hardware),
    )


def of_timeline(document: Document) -> Section:
    """Return the section of a timeline."""
    found: Timed = document.content
    plot = interactive.timeline(found.traceEvents)
    about = {"file": document.name, "digest of the file": document.digest}
    return Section(
        f"Timeline {document.name}",
        [],
        plots=[plot],
        lines=[
            "What each lane did when. Drag over a range to zoom into it, double-click for all; "
            "point at a bar for what it is."
        ],
        identity=[facts(f"Timeline {document.name}", about)],
    )


WRITERS: dict[type, Callable[[Document], Section]] = {
    Advised: of_advice,
    Compared: of_comparison,
    Swept: of_sweep,
    Validated: of_validation,
    Timed: of_timeline,
}
"""What writes the section of each kind of document but single runs."""


def by_budget(rows: Sequence[Row]) -> list[list[Row]]:
    """Return rows of the same budget together, the fastest first."""
    groups: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.budget_bytes, -row.tokens_per_s)):
        groups.setdefault(row.budget_bytes, []).append(row)
    return list(groups.values())


def answers_of(rows: Sequence[Row]) -> list[str]:
    """Return who is fastest, and by how much, for each budget; of a single one why, too."""
    groups = by_budget(rows)
    lines = [fastest(mine) for mine in groups]
    if len(groups) == 1:
        best = groups[0][0]
        tpot = "" if best.tpot_ms is None else f", TPOT {number(best.tpot_ms)} ms"
        lines.append(f"{best.policy}: TTFT {number(best.ttft_ms)} ms{tpot}; {best.why}")
    return lines


def fastest(rows: Sequence[Row]) -> str:
    """Return in a line which policy is fastest, in tokens/s, and compared with what."""
    best, *others = rows
    line = f"{size_in_words(best.budget_bytes)} for experts: {best.policy}"
    if not others:
        return f"{line} makes {best.tokens_per_s:.2f} tokens/s"
    other = others[0]
    return (
        f"{line} is fastest, {best.tokens_per_s:.2f} tokens/s, "
        f"{best.tokens_per_s / other.tokens_per_s:.2f} times {other.policy}, the next of "
        f"{len(rows)}, with {other.tokens_per_s:.2f}"
    )


def number(value: float | None) -> str:
    """Return a number to four digits, `-` for none."""
    if value is None:
        return "-"
    if not value or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def cell(value: float | None) -> Cell:
    """Return a number to four digits, exact where it is pointed at."""
    return Cell(number(value), "" if value is None else repr(value))


def share_cell(value: float | None) -> Cell:
    """Return a share in per cent."""
    return Cell(percent(value), "" if value is None else repr(value))


def size_cell(size_bytes: int) -> Cell:
    """Return a size in the unit that suits it."""
    return Cell(size_in_words(size_bytes), f"{size_bytes} bytes")


def both_cells(both: Both, error: float | None) -> list[Cell]:
    """Return what was measured and simulated, and how far they are apart."""
    off = Cell("-") if error is None else Cell(f"{error:+.1%}", repr(error))
    return [cell(both.measured), cell(both.simulated), off]


def speed_table(title: str, rows: Sequence[Row]) -> Table:
    """Return a table of single runs, and why each is as fast as it is."""
    slowest = min(row.tokens_per_s for row in rows)
    several = len(rows) > 1
    heads = [Head("policy", False), Head("tokens/s")]
    heads += [Head("times slowest")] if several else []
    heads += [Head("TTFT ms"), Head("TPOT ms"), Head("hit rate"), Head("why", False)]
    body: list[list[str | Cell]] = [
        [
            row.policy, cell(row.tokens_per_s),
            *([times_cell(row.tokens_per_s / slowest)] if several else []),
            cell(row.ttft_ms), cell(row.tpot_ms), share_cell(row.hit_rate), row.why,
        ]
        for row in rows
    ]  # fmt: skip
    return Table(title, heads, body)


def comparison_table(title: str, rows: Sequence[Ranked], baseline: str) -> Table:
    """Return the table of `moesim compare`, and why each policy is as fast as it is."""
    heads = [Head("rank"), Head("policy", False), Head("tokens/s"), Head("±")]
    heads += [Head(f"times {baseline}"), Head("of bound"), Head("of gain"), Head("TTFT ms")]
    heads += [Head("TPOT ms"), Head("hits"), Head("on copies"), Head("why", False)]
    body: list[list[str | Cell]] = [
        [
            Cell(str(row.rank)), verdict.name_of(msgspec.to_builtins(row)),
            cell(row.tokens_per_s),
            Cell(f"{row.high / row.tokens_per_s - 1:.0%}", f"{row.low!r} to {row.high!r}"),
            times_cell(row.speedup), share_cell(row.tokens_per_s / row.bound_tokens_per_s),
            share_cell(row.gain), cell(row.ttft_ms), cell(row.tpot_ms), share_cell(row.hit_rate),
            share_cell(row.exposed_ns / row.makespan_ns), row.why,
        ]
        for row in rows
    ]  # fmt: skip
    return Table(title, heads, body)


def times_cell(ratio: float | None) -> Cell:
    """Return how many times as fast."""
    return Cell("-") if ratio is None else Cell(f"{ratio:.2f}", repr(ratio))


def run_tables(runs: Sequence[Run]) -> list[Table]:
    """Return how experts met their weights, and what was copied why."""
    outcomes: list[list[str | Cell]] = []
    for run in runs:
        total = max(1, sum(run.activations.get(name, 0) for name in OUTCOMES))
        shares = [
            Cell(percent(run.activations.get(name, 0) / total), str(run.activations.get(name, 0)))
            for name in OUTCOMES
        ]
        outcomes.append([run.policy, *shares])
    causes = [name for name in runs[0].link_bytes if any(run.link_bytes.get(name) for run in runs)]
    copied: list[list[str | Cell]] = [
        [
            run.policy,
            *(
                Cell(number(run.link_bytes.get(name, 0) / 1e6), str(run.link_bytes.get(name, 0)))
                for name in causes
            ),
        ]
        for run in runs
    ]
    return [
        Table(
            "How experts met their weights",
            [Head("policy", False), *(Head(name) for name in OUTCOMES)],
            outcomes,
        ),
        Table(
            "Copied, in MB",
            [Head("policy", False), *(Head(name.replace("_", " ")) for name in causes)],
            copied,
        ),
    ]


def time_table(rows: Sequence[Row]) -> Table:
    """Return where the time of a token went: the numbers of the picture of that."""
    shown = sorted(rows, key=lambda row: -row.tokens_per_s)[:MOST_ROWS]
    causes = interactive.causes_of(shown)
    body: list[list[str | Cell]] = [
        [name, *(cell(interactive.per_token_ms(row, cause)) for cause in causes)]
        for row, name in zip(shown, interactive.names_of(rows, shown), strict=True)
    ]
    heads = [Head("policy", False), *(Head(cause.replace("_", " ")) for cause in causes)]
    return Table("Where the time went, in ms per generated token", heads, body)


def pictures(rows: Sequence[Row]) -> list[Plot]:
    """Return the pictures of rows: speed, time by cause, hit rates by layer."""
    if not rows:
        return []
    hits = interactive.hits(rows)
    speeds = [interactive.speeds(rows)] if len(rows) > 1 else []
    return [*speeds, interactive.times(rows), *([hits] if hits else [])]


def run_identity(title: str, documents: Sequence[Document]) -> list[Table]:
    """Return what identifies runs of one question: what they share, and a row for each."""
    first: Run = documents[0].content
    shared = {
        "trace": first.run.trace, "workload": first.run.workload, "model": first.run.model,
        "model digest": first.run.model_digest, "hardware": first.run.hardware,
        "hardware digest": first.run.hardware_digest, "bits": first.run.bits,
        "seed": first.run.seed, "jitter": first.run.jitter,
    }  # fmt: skip
    names = ("policy", "budget", "operations", "machine", "moesim", "file", "digest of the file")
    rows: list[list[str | Cell]] = []
    for one in documents:
        run: Run = one.content
        rows.append(
            [
                run.policy, size_cell(run.run.budget_bytes), Cell(str(run.run.operations)),
                run.run.machine, run.run.moesim, one.name, one.digest,
            ]
        )  # fmt: skip
    heads = [Head(name, name in ("budget", "operations")) for name in names]
    return [facts(title, shared), Table("", heads, rows)]


def facts(title: str, about: Mapping[str, Any]) -> Table:
    """Return plain values by name, those of dictionaries inside included."""
    rows: list[list[str | Cell]] = [
        [key.replace("_", " "), str(value)]
        for key, value in flat(dict(about)).items()
        if isinstance(value, str | int | float) and value != ""
    ]
    return Table(title, [Head("", False), Head("", False)], rows)


def named(document: Document) -> str:
    """Return the name of the file that a section is about, for its title."""
    return f" ({document.name})" if document.digest else ""


def sources_in_words(provenance: Mapping[str, float]) -> str:
    """Return what durations rest on."""
    return ", ".join(f"{share:.0%} {name}" for name, share in provenance.items() if share)


def in_all(sequences: int, prompt: int, output: int) -> str:
    """Return a workload in words."""
    many = f"{sequences} sequence{'s' if sequences > 1 else ''}"
    return f"{many}, {prompt} prompt + {output} generated tokens"
