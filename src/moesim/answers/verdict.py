"""A comparison in words and tables: what `moesim compare` prints, and notebooks show."""

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moesim.sizes import size_in_words

FEW = 3
"""So many of a tie are named."""
FUTURE = "sees the future"
"""What notices say of predictors and policies that do."""
LONG = 8
"""Letters of a baseline that is the title of a column."""


class Cell(NamedTuple):
    """What was found for one budget and batch."""

    baseline: str
    about: Mapping[str, Any]
    """One of `cells` of `Comparison.data`."""
    rows: Sequence[Mapping[str, Any]]
    refused: Sequence[Mapping[str, Any]]


def cells(data: Mapping[str, Any]) -> list[Cell]:
    """Return what is in `Comparison.data` for each budget and batch."""

    def of(key: str, about: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        where = about["budget_bytes"], about["batch"]
        return [one for one in data[key] if (one["budget_bytes"], one["batch"]) == where]

    return [
        Cell(data["baseline"], about, of("rows", about), of("refused", about))
        for about in data["cells"]
    ]


def digits(value: float | None) -> str:
    """Return a number with three digits, or all before the point; `-` for none."""
    if value is None:
        return "-"
    if abs(value) < 100:
        return f"{value:#.3g}"
    return f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def per_cent(share: float | None) -> str:
    """Return a share in per cent; `-` for none."""
    return "-" if share is None else f"{share:.0%}"


def remarks(row: Mapping[str, Any]) -> list[str]:
    """Return what a policy does that others may not: it changes results, or sees the future."""
    return [*row["changes"], *(line for line in row["notices"] if FUTURE in line)]


def name_of(row: Mapping[str, Any]) -> str:
    """Return a policy's name, with a star if there are `remarks`."""
    name: str = row["policy"]
    return f"{name}*" if remarks(row) else name


def heading(cell: Cell) -> str:
    """Return what the cell is about."""
    about = cell.about
    ratio = about["cache_ratio"]
    share = f"{ratio:.0%} of all" if ratio < 1 else "room for all"
    return f"{size_in_words(about['budget_bytes'])} for experts ({share}), batch {about['batch']}"


def answer(cell: Cell) -> str:
    """Return one line: the fastest policy, by how much, and whether that is certain."""
    if not cell.rows:
        return "no policy can run"
    best, *others = cell.rows
    line = f"{name_of(best)} is fastest: {digits(best['tokens_per_s'])} tokens/s"
    if best["policy"] != cell.baseline and best["speedup"] is not None:
        line += f", {best['speedup']:.2f} times {cell.baseline}"
        if cell.baseline not in best["tied"]:
            line += f" ({best['speedup_low']:.2f} to {best['speedup_high']:.2f})"
    if best["tied"]:
        shown = {row["policy"]: name_of(row) for row in cell.rows}
        tied = sorted(best["tied"], key=lambda name: name != cell.baseline)
        return f"{line}; a tie with {listed([shown[name] for name in tied])}"
    if others:
        behind = 1 - others[0]["tokens_per_s"] / best["tokens_per_s"]
        share = f"{behind:.0%}" if behind >= 0.01 else "less than 1%"
        line += f"; {name_of(others[0])} is second, {share} slower"
    return line


def listed(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = len(names) - FEW
    return ", ".join(names[:FEW]) + (f" and {more} more" if more > 0 else "")


def reasons(cell: Cell) -> Iterator[str]:
    """Give lines: why the fastest is not faster, and what no policy can exceed."""
    if not cell.rows:
        return
    best = cell.rows[0]
    yield f"{name_of(best)}: {best['why']}"
    limit = cell.about["bound_tokens_per_s"]
    plain = next((row for row in cell.rows if not remarks(row)), None)
    line = f"No policy that keeps results can exceed {digits(limit)} tokens/s"
    if plain is not None:
        speed = plain["tokens_per_s"]
        line += f"; {plain['policy']} reaches {speed / limit:.0%} of that"
        if plain is not best:
            line += f", {digits(speed)}: the fastest without *"
    yield line


class Column(NamedTuple):
    """A column of the table."""

    title: str
    """In two lines at most."""
    cell: Any
    """Returns the text of a row."""


def columns(baseline: str) -> list[Column]:
    """Return the columns of the table; the second one holds names."""
    base = baseline if len(baseline) <= LONG else "base"
    return [
        Column("", lambda row: str(row["rank"])),
        Column("policy", name_of),
        Column("tok/s", lambda row: digits(row["tokens_per_s"])),
        Column("±", lambda row: per_cent(row["high"] / row["tokens_per_s"] - 1)),
        Column(f"times\n{base}", lambda row: times(row["speedup"])),
        Column("TTFT\nms", lambda row: digits(row["ttft_ms"])),
        Column("TPOT\nms", lambda row: digits(row["tpot_ms"])),
        Column("\nhits", lambda row: per_cent(row["hit_rate"])),
        Column("MB per\ntoken", lambda row: digits(row["link_bytes"] / row["output_tokens"] / 1e6)),
        Column("on\ncopies", lambda row: per_cent(row["exposed_ns"] / row["makespan_ns"])),
        Column("of\ngain", lambda row: per_cent(row["gain"])),
    ]


def times(ratio: float | None) -> str:
    """Return a speed-up; `-` for none."""
    return "-" if ratio is None else f"{ratio:.2f}"


def below(cell: Cell) -> Iterator[str]:
    """Give the lines that belong below a table."""
    for row in cell.rows:
        if remarks(row):
            yield f"{name_of(row)}: {', '.join(remarks(row))}"
    for one in cell.refused:
        yield f"cannot run: {one['error']}"
    slow, fast = (cell.about[f"{name}_tokens_per_s"] for name in ("on_demand", "oracle"))
    if slow is not None and fast is not None:
        yield f"gain: from on-demand (0%, {digits(slow)} tokens/s) to oracle (100%, {digits(fast)})"


def rule(data: Mapping[str, Any]) -> Iterator[str]:
    """Give the lines that say what the numbers are, and how far they can be trusted."""
    windows = {about["windows"] for about in data["cells"]}
    count = " to ".join(map(str, sorted({min(windows), max(windows)})))
    if max(windows) > 1:
        yield f"Speeds are those of {count} windows of the trace together."
    yield (
        "hits: experts in decode whose weights were there in time; on copies: the time in which the"
        " GPU waits for some."
    )
    deviations = f"{data['uncertainty']['certain_from_deviations']:g} standard deviations"
    by_origin: dict[tuple[float, str], list[str]] = {}
    for name, one in data["uncertainty"]["sections"].items():
        by_origin.setdefault((one["share"], one["source"]), []).append(name)
    sections = "; ".join(
        f"{', '.join(names)} {share:.0%}, {meaning(source)}"
        for (share, source), names in by_origin.items()
    )
    varies = (
        "the spread over windows is added"
        if min(windows) > 1
        else "the spread over windows of the trace is not known from one"
    )
    yield (
        f"± is {deviations} of a speed, for what is uncertain about the machine: {sections}. That"
        f" is the same for all policies; {varies}. The simulator's own error is not in it: see"
        " moesim validate."
    )
    yield (
        f"Rank is 1 + the number of policies that are certainly faster: by {deviations} of the"
        " difference. All others are a tie."
    )


def meaning(source: str) -> str:
    """Return what stands behind the uncertainty of a section's numbers."""
    if source == "measured":
        return "as measured"
    return f"assumed of {source} numbers"


def page(data: Mapping[str, Any]) -> str:
    """Return everything as HTML."""
    made = []
    for cell in cells(data):
        first = f"<b>{html.escape(f'{heading(cell)}: {answer(cell)}')}</b>"
        made.append(f"<p>{'<br>'.join([first, *map(html.escape, reasons(cell))])}</p>")
        shown = columns(cell.baseline)
        head = "".join(f"<th>{html.escape(one.title)}</th>" for one in shown)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(one.cell(row))}</td>" for one in shown) + "</tr>"
            for row in cell.rows
        )
        made.append(f"<table><tr>{head}</tr>{body}</table>")
        made.append(f"<p>{'<br>'.join(map(html.escape, below(cell)))}</p>")
    made.append(f"<p>{'<br>'.join(map(html.escape, rule(data)))}</p>")
    return "".join(made)
