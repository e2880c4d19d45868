"""Pictures of results for a browser: figures of plotly's, made of plain values.

Texts of plotly's may hold tags, so that names from files are escaped by `plain`.
"""

import html
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from moesim.answers.documents import Advised, Event, Point, Row, Validated
from moesim.answers.plots import ROOM
from moesim.colours import kind_colour, look_of
from moesim.sim.metrics import TIMES
from moesim.sizes import size_in_words
from moesim.types import CAUSES

MOST_SEGMENTS = 20_000
"""Of a timeline: what a browser zooms in half a second."""
LANE_PX, LEGEND_PX = 36, 65
"""Height of a timeline's lane, and where its legend stands below the lowest one."""
MOST_POINTS = 5_000
"""Of a sweep."""
MOST_BARS = 40
MOST_TICKS = 16
MOST_KINDS = 40
"""Of a timeline's operations; no run of moesim has as many."""
LONGEST = 80
"""Characters of a name."""
BAND = 0.1
"""Errors inside the band of the picture of a validation."""


BOUND = "no policy that keeps results exceeds"


class Plot(NamedTuple):
    """A figure, and what is to be said below it."""

    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    note: str = ""


def distinct(names: Sequence[str]) -> list[str]:
    """Return names of which no two are the same: plotly would draw those as one.

    Those that are cut, or of runs that are told apart by something else, may be.
    """
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def cut(text: object) -> str:
    """Return a name, a long one cut."""
    whole = str(text)
    return whole if len(whole) <= LONGEST else whole[: LONGEST - 1] + "…"


def plain(text: object) -> str:
    """Return a name for plotly, in which nothing is a tag; long ones are cut."""
    return html.escape(cut(text), quote=False)


def said(text: object) -> str:
    """Return a code name in words."""
    return plain(str(text).replace("_", " "))


def time_in_words(time_ns: float) -> str:
    """Return a time with its unit, to four digits."""
    for unit, name in ((1e9, "s"), (1e6, "ms"), (1e3, "µs")):
        if abs(time_ns) >= unit:
            return f"{time_ns / unit:.4g} {name}"
    return f"{time_ns:.0f} ns"


def bytes_in_words(amount: int) -> str:
    """Return bytes, and how many MB they are if that is one or more."""
    return f"{amount} bytes" + (f" ({amount / 1e6:.4g} MB)" if amount >= 10**6 else "")


def percent(value: float | None) -> str:
    """Return a share in per cent; `-` for none."""
    return "-" if value is None else f"{value:.1%}"


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Return an axis with a title that says the unit."""
    return {"title": {"text": title}, "automargin": True, **more}


def names_axis(names: Sequence[str], **more: Any) -> dict[str, Any]:
    """Return an axis of names in their order, the first at the bottom."""
    return axis("", categoryorder="array", categoryarray=names, ticksuffix=" ", **more)


def labels(rows: Sequence[Row], shown: Sequence[Row]) -> list[str]:
    """Return the names of some rows for plotly; see `names_of`."""
    return [html.escape(name, quote=False) for name in names_of(rows, shown)]


def names_of(rows: Sequence[Row], shown: Sequence[Row]) -> list[str]:
    """Return a name for each row shown: its policy, and budget and batch where rows differ in them.

    A row has the same name in all pictures of the same rows.
    """
    budgets = len({row.budget_bytes for row in rows}) > 1
    batches = len({row.batch for row in rows}) > 1
    names = distinct(
        [
            cut(row.policy)
            + (f", {size_in_words(row.budget_bytes)}" if budgets else "")
            + (f", batch {row.batch}" if batches else "")
            for row in rows
        ]
    )
    name_of = {id(row): name for row, name in zip(rows, names, strict=True)}
    return [name_of[id(row)] for row in shown]


def speeds(rows: Sequence[Row]) -> Plot:
    """Draw tokens/s: over the budget or the batch if there are several, else a bar per policy."""
    if len({row.budget_bytes for row in rows}) > 1:
        return lines(rows, "budget")
    if len({row.batch for row in rows}) > 1:
        return lines(rows, "batch")
    shown = sorted(rows, key=lambda row: row.tokens_per_s)[-MOST_BARS:]
    names = labels(rows, shown)
    bars: dict[str, Any] = {
        "type": "bar", "orientation": "h", "name": "tokens/s",
        "x": [row.tokens_per_s for row in shown], "y": names,
        "marker": {"color": [look_of(row.policy).colour for row in shown]},
        "hovertext": [speed_in_words(row) for row in shown],
        "hovertemplate": "%{hovertext}<extra></extra>", "showlegend": False,
    }  # fmt: skip
    if any(row.low is not None and row.high is not None for row in shown):
        bars["error_x"] = error_bars(shown)
    data = [bars]
    bounds = [row.bound_tokens_per_s for row in shown if row.bound_tokens_per_s is not None]
    best = min(bounds, default=0.0)
    if 0 < best <= ROOM * shown[-1].tokens_per_s:
        data.append(
            {
                "type": "scatter", "mode": "lines", "name": "bound",
                "x": [best, best], "y": [names[0], names[-1]],
                "line": {"color": "#555555", "dash": "dash"},
                "hovertemplate": f"{BOUND} {best:.2f} tokens/s<extra></extra>",
            }
        )  # fmt: skip
    layout = {
        "xaxis": axis("generated tokens per second", rangemode="tozero"),
        "yaxis": names_axis(names),
        "height": 130 + 26 * len(shown),
    }
    return Plot("Throughput", data, layout, cut_note(len(shown), len(rows)))


def lines(rows: Sequence[Row], over: str) -> Plot:
    """Draw a line per policy over `budget` or `batch`, and the bound."""
    by_budget = over == "budget"
    several = by_budget and len({row.batch for row in rows}) > 1
    unit = unit_of(rows)

    def place(row: Row) -> float:
        return row.budget_bytes / unit[0] if by_budget else row.batch

    series: dict[str, list[Row]] = {}
    bounds: dict[str, dict[float, float]] = {}
    for row in rows:
        batch = f", batch {row.batch}" if several else ""
        series.setdefault(row.policy + batch, []).append(row)
        if row.bound_tokens_per_s is not None:
            own = bounds.setdefault("bound" + batch, {})
            at = place(row)
            own[at] = min(own.get(at, row.bound_tokens_per_s), row.bound_tokens_per_s)
    data = []
    for name, mine in series.items():
        mine.sort(key=place)
        look = look_of(mine[0].policy)
        trace: dict[str, Any] = {
            "type": "scatter", "mode": "lines+markers", "name": plain(name),
            "x": [place(row) for row in mine],
            "y": [row.tokens_per_s for row in mine],
            "line": {"color": look.colour, "dash": look.dash()},
            "marker": {"symbol": look.symbol, "size": 8},
            "hovertext": [speed_in_words(row) for row in mine],
            "hovertemplate": "%{hovertext}<extra></extra>",
        }  # fmt: skip
        data.append(trace)
    data += [
        {
            # What holds with more memory holds with less; between batches nothing is known.
            "type": "scatter", "mode": "lines" if by_budget else "markers", "name": plain(name),
            "x": sorted(own), "y": [own[at] for at in sorted(own)],
            "line": {"color": "#555555", "dash": "dash", "shape": "vh"},
            "marker": {"color": "#555555", "symbol": "line-ew-open", "size": 16},
            "hovertemplate": f"{BOUND} %{{y:.2f}} tokens/s<extra></extra>",
        }
        for name, own in bounds.items()
    ]  # fmt: skip
    title = f"GPU memory for experts in {unit[1]}" if by_budget else "sequences at once"
    layout = {
        "xaxis": axis(title),
        "yaxis": axis("generated tokens per second", rangemode="tozero"),
        "height": 460,
    }
    return Plot(f"Throughput over {over}", data, layout, "Point at a marker for how certain it is.")


def unit_of(rows: Sequence[Row]) -> tuple[int, str]:
    """Return the unit that suits budgets, in bytes, and its name."""
    whole = max((row.budget_bytes for row in rows), default=0) >= 2**30
    return (2**30, "GiB") if whole else (2**20, "MiB")


def error_bars(rows: Sequence[Row]) -> dict[str, Any]:
    """Return how far each row's speed may be off, both ways."""
    return {
        "type": "data", "symmetric": False, "color": "#333333", "thickness": 1,
        "array": [0 if row.high is None else row.high - row.tokens_per_s for row in rows],
        "arrayminus": [0 if row.low is None else row.tokens_per_s - row.low for row in rows],
    }  # fmt: skip


def speed_in_words(row: Row) -> str:
    """Return what is shown where the pointer is over a policy's speed."""
    text = f"<b>{plain(row.policy)}</b><br>{row.tokens_per_s:.2f} tokens/s"
    if row.low is not None and row.high is not None:
        text += f", within {row.low:.2f} to {row.high:.2f}"
    if row.bound_tokens_per_s is not None:
        text += f"<br>its bound is {row.bound_tokens_per_s:.2f} tokens/s"
    text += f"<br>TTFT {row.ttft_ms:.4g} ms"
    if row.tpot_ms is not None:
        text += f", TPOT {row.tpot_ms:.4g} ms"
    return f"{text}<br>budget {size_in_words(row.budget_bytes)}, batch {row.batch}"


def cut_note(shown: int, count: int) -> str:
    """Say that only some rows are drawn, if so."""
    return f"The fastest {shown} of {count} are drawn." if shown < count else ""


def times(rows: Sequence[Row]) -> Plot:
    """Draw what the GPU did or waited for, as bars that are stacked to the whole run."""
    shown = sorted(rows, key=lambda row: -row.tokens_per_s)[:MOST_BARS]
    shown.sort(key=lambda row: (row.budget_bytes, row.batch, row.tokens_per_s))
    names = labels(rows, shown)
    named = list(zip(shown, names, strict=True))
    data = [
        {
            "type": "bar", "orientation": "h", "name": said(cause), "y": names,
            "x": [per_token_ms(row, cause) for row in shown],
            "marker": {"color": kind_colour(cause)},
            "hovertext": [time_share(row, cause, name) for row, name in named],
            "hovertemplate": "%{hovertext}<extra></extra>",
        }
        for cause in causes_of(shown)
    ]  # fmt: skip
    layout = {
        "barmode": "stack",
        "xaxis": axis("ms per generated token"),
        "yaxis": names_axis(names),
        "legend": {"traceorder": "normal"},
        "height": max(300, 130 + 26 * len(shown)),
    }
    return Plot("Where the time went", data, layout, cut_note(len(shown), len(rows)))


def causes_of(rows: Sequence[Row]) -> list[str]:
    """Return what the GPU did or waited for in some row, in the order of `TIMES`."""
    seen = {cause for row in rows for cause, ns in row.time_ns.items() if ns}
    return [cause for cause in TIMES if cause in seen] + sorted(seen - set(TIMES))


def per_token_ms(row: Row, cause: str) -> float:
    """Return what a cause takes of a generated token; over all causes that is 1000 / tokens/s."""
    return row.time_ns.get(cause, 0) / row.makespan_ns * 1e3 / row.tokens_per_s


def time_share(row: Row, cause: str, name: str) -> str:
    """Return what is shown where the pointer is over a cause."""
    ns = row.time_ns.get(cause, 0)
    return (
        f"<b>{name}</b><br>{said(cause)}: {per_token_ms(row, cause):.4g} ms per token,"
        f" {ns / row.makespan_ns:.1%} of the time<br>{time_in_words(ns)} in all"
    )


def hits(rows: Sequence[Row]) -> Plot | None:
    """Draw the hit rate of each layer in decode; None if no row has one."""
    shown = sorted(
        (row for row in rows if any(rate is not None for rate in row.hit_rate_by_layer or ())),
        key=lambda row: -row.tokens_per_s,
    )[:MOST_BARS]
    if not shown:
        return None
    layers = max(len(row.hit_rate_by_layer or ()) for row in shown)
    data = []
    for row, name in zip(shown, labels(rows, shown), strict=True):
        look = look_of(row.policy)
        rates = row.hit_rate_by_layer or []
        data.append(
            {
                "type": "scatter", "mode": "lines+markers", "name": name,
                "x": list(range(len(rates))),
                "y": [None if rate is None else 100 * rate for rate in rates],
                "line": {"color": look.colour, "dash": look.dash()},
                "marker": {"symbol": look.symbol, "size": 6},
                "hovertemplate": f"<b>{name}</b><br>layer %{{x}}: %{{y:.1f}} %<extra></extra>",
            }
        )  # fmt: skip
    layout = {
        "xaxis": axis("MoE layer", zeroline=False, dtick=-(-layers // MOST_TICKS)),
        "yaxis": axis("hit rate in decode in %", range=[-3, 103], zeroline=False),
        "height": 420,
    }
    return Plot("Hit rate by layer", data, layout, cut_note(len(shown), len(rows)))


def sweep(points: Sequence[Point]) -> Plot:
    """Draw each point of a sweep: tokens/s over the budget, a colour and marker per policy."""
    every = [(point, point.row) for point in points if point.row is not None]
    shown = sorted(every, key=lambda one: -one[1].tokens_per_s)[:MOST_POINTS]
    unit, name = unit_of([row for _, row in shown])
    by_policy: dict[str, list[tuple[Point, Row]]] = {}
    for point, row in shown:
        by_policy.setdefault(row.policy, []).append((point, row))
    data = []
    for policy, mine in by_policy.items():
        look = look_of(policy)
        data.append(
            {
                "type": "scatter", "mode": "markers", "name": plain(policy),
                "x": [row.budget_bytes / unit for _, row in mine],
                "y": [row.tokens_per_s for _, row in mine],
                "marker": {"color": look.colour, "symbol": look.symbol, "size": 8},
                "hovertext": [
                    f"{speed_in_words(row)}<br>{plain(setting(point))}" for point, row in mine
                ],
                "hovertemplate": "%{hovertext}<extra></extra>",
            }
        )  # fmt: skip
    layout = {
        "xaxis": axis(f"GPU memory for experts in {name}"),
        "yaxis": axis("generated tokens per second", rangemode="tozero"),
        "height": 480,
    }
    return Plot("Every point", data, layout, cut_note(len(shown), len(every)))


def setting(point: Point) -> str:
    """Return the swept values of a point, but for its policy."""
    return ", ".join(f"{key} {value}" for key, value in point.swept.items() if key != "policy")


def advice(found: Advised) -> Plot:
    """Draw what each policy decodes, in tokens/s, the recommended one with its range."""
    rows = list(reversed(found.candidates))
    names = distinct([plain(row.policy) for row in rows])
    best = found.recommended
    data = [
        {
            "type": "bar", "orientation": "h", "y": names, "showlegend": False,
            "x": [row.decode_tokens_per_s for row in rows],
            "marker": {"color": [look_of(row.policy).colour for row in rows]},
            "error_x": {
                "type": "data", "symmetric": False, "color": "#333333", "thickness": 1,
                "array": [
                    best.decode_high - best.decode_tokens_per_s
                    if best is not None and row.policy == best.policy
                    else None
                    for row in rows
                ],
                "arrayminus": [
                    best.decode_tokens_per_s - best.decode_low
                    if best is not None and row.policy == best.policy
                    else None
                    for row in rows
                ],
            },
            "hovertext": [
                f"<b>{name}</b><br>decode {row.decode_tokens_per_s:.2f} tokens/s<br>prefill"
                f" {row.prefill_tokens_per_s:.1f} tokens/s"
                for row, name in zip(rows, names, strict=True)
            ],
            "hovertemplate": "%{hovertext}<extra></extra>",
        }
    ]  # fmt: skip
    layout = {
        "xaxis": axis("tokens per second in decode", rangemode="tozero"),
        "yaxis": names_axis(names),
        "height": 130 + 26 * len(rows),
    }
    return Plot("Decode", data, layout)


def validation(found: Validated) -> Plot:
    """Draw measured against simulated time per token, or the makespan where nothing is decoded."""
    whole = found.ranked_by == "makespan_ns"
    unit, name = (1e6, "makespan") if whole else (1.0, "time per token")
    data: list[dict[str, Any]] = []
    every: list[float] = []
    for row in found.policies:
        own = row.makespan_ns if whole else row.tpot_ms
        if own.measured is None or own.simulated is None:
            continue
        x, y = own.measured / unit, own.simulated / unit
        repeats = [value / unit for value in own.repeats if value is not None] or [x]
        every += [*repeats, x, y]
        look = look_of(row.policy)
        error = f", {y / x - 1:+.1%}" if x else ""
        data.append(
            {
                "type": "scatter", "mode": "markers", "name": f"{plain(row.policy)}{error}",
                "x": [x], "y": [y],
                "marker": {"color": look.colour, "symbol": look.symbol, "size": 11},
                "error_x": {
                    "type": "data", "symmetric": False, "color": look.colour,
                    "array": [max(repeats) - x], "arrayminus": [x - min(repeats)],
                },
                "hovertemplate": f"<b>{plain(row.policy)}</b><br>measured {x:.4g} ms"
                f" ({min(repeats):.4g} to {max(repeats):.4g})<br>simulated {y:.4g} ms{error}"
                "<extra></extra>",
            }
        )  # fmt: skip
    positive = [value for value in every if value > 0] or [1.0]
    ends = [min(positive) / 1.25, max(positive) * 1.25]
    band: list[dict[str, Any]] = [
        {
            "type": "scatter", "mode": "lines", "x": [*ends, *reversed(ends)],
            "y": [ends[0] * (1 - BAND), ends[1] * (1 - BAND), ends[1] * (1 + BAND),
                  ends[0] * (1 + BAND)],
            "fill": "toself", "fillcolor": "#E8E8E8", "line": {"width": 0}, "hoverinfo": "skip",
            "name": f"within {BAND:.0%}",
        },
        {
            "type": "scatter", "mode": "lines", "x": ends, "y": ends, "hoverinfo": "skip",
            "line": {"color": "#888888", "width": 1}, "name": "simulated = measured",
        },
    ]  # fmt: skip
    layout = {
        "xaxis": axis(f"measured {name} in ms", **log_axis(ends)),
        "yaxis": axis(f"simulated {name} in ms", **log_axis(ends)),
        "height": 560,
    }
    return Plot("Simulated against measured", band + data, layout)


def log_axis(ends: Sequence[float]) -> dict[str, Any]:
    """Return a logarithmic axis with ticks at 1, 2 and 5 times powers of ten."""
    low, high = (math.log10(end) for end in ends)
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    return {
        "type": "log", "range": [low, high], "tickmode": "array", "tickvals": ticks,
        "ticktext": [f"{tick:g}" for tick in ticks], "showgrid": True,
    }  # fmt: skip


def errors(found: Validated) -> Plot:
    """Draw what each policy's error consists of: bars left of 0 are too short when simulated."""
    rows = list(reversed(found.policies))
    names = distinct([plain(row.policy) for row in rows])
    seen = {cause for row in rows for cause, part in row.time_ns.items() if part.part}
    order = [cause for cause in TIMES if cause in seen] + sorted(seen - set(TIMES))
    data = []
    for cause in order:
        parts = [row.time_ns[cause].part if cause in row.time_ns else None for row in rows]
        data.append(
            {
                "type": "bar", "orientation": "h", "name": said(cause), "y": names,
                "x": [100 * (part or 0.0) for part in parts],
                "marker": {"color": kind_colour(cause)},
                "hovertemplate": f"<b>%{{y}}</b><br>{said(cause)}: %{{x:+.2f}} % of the measured"
                " makespan<extra></extra>",
            }
        )  # fmt: skip
    layout = {
        "barmode": "relative",
        "xaxis": axis("simulated - measured, in % of the measured makespan"),
        "yaxis": names_axis(names),
        "height": max(300, 130 + 26 * len(rows)),
    }
    return Plot("What the errors consist of", data, layout)


class Lane(NamedTuple):
    """What an event of a timeline belongs to; lanes are drawn in this order."""

    group: int
    rank: int
    thread: int
    name: str


SPANS = ("steps", "layers")
"""Lanes of what is no operation: spans around many."""


def lanes_of(events: Sequence[Event]) -> list[Lane]:
    """Return the lane of each event: a thread; steps and layers, which enclose, have their own.

    Where processes have threads of the same name, as in two runs one above the other, a lane has
    its process's name, too.
    """
    threads: dict[tuple[int | str, int | str], tuple[int, str]] = {}
    processes: dict[int | str, tuple[int, str]] = {}
    for event in events:
        if event.ph != "M":
            continue
        name = str(event.args.get("name", ""))
        if event.name == "thread_name":
            threads.setdefault((event.pid, event.tid), (len(threads), thread_name(name)))
        elif event.name == "process_name":
            processes.setdefault(event.pid, (len(processes), name.partition(":")[0]))
    names = [name for _, name in threads.values()]
    several = len(set(names)) < len(names)

    def lane_of(event: Event) -> Lane:
        place, name = threads.get((event.pid, event.tid), (len(threads), str(event.tid)))
        rank = len(SPANS)
        if event.cat == "user_annotation":
            rank = int("layer" in event.args)
            name = SPANS[rank]
        group, process = processes.get(event.pid, (len(processes), str(event.pid)))
        if several:
            return Lane(group, rank, place, plain(f"{process}: {name}"))
        return Lane(0, rank, place, plain(name))

    return [lane_of(event) for event in events]


def thread_name(name: str) -> str:
    """Return what a stream is for, where its name says so."""
    match = re.fullmatch(r"stream \d+ \((.+)\)", name)
    return match[1] if match else name


def kind_of(event: Event) -> str:
    """Return the kind of an operation, the cause of a copy, the phase of a step."""
    if event.cat == "user_annotation":
        return "layer" if "layer" in event.args else str(event.args.get("phase", "step"))
    cause = event.args.get("cause")
    return cause if isinstance(cause, str) and cause else event.name.rpartition("::")[2]


SPAN_COLOURS = {"prefill": "#8A8A8A", "decode": "#B9B9B9", "step": "#B9B9B9", "layer": "#DADADA"}


def timeline(events: Sequence[Event]) -> Plot:
    """Draw what each lane did when; of a long run its first steps, as the note says."""
    found = [
        (event, lane)
        for event, lane in zip(events, lanes_of(events), strict=True)
        if event.ph == "X"
    ]
    found.sort(key=lambda one: one[0].ts)
    shown, note = first_steps(found)
    lanes = sorted({lane for _, lane in shown})
    names = list(dict.fromkeys(lane.name for lane in lanes))
    kinds: dict[str, list[tuple[Event, Lane]]] = {}
    for event, lane in shown:
        kind = kind_of(event)
        if kind not in kinds and len(kinds) == MOST_KINDS:
            kind = "other"
        kinds.setdefault(kind, []).append((event, lane))
    data = [
        {
            "type": "bar", "orientation": "h", "name": said(kind),
            "base": [round(event.ts / 1e3, 6) for event, _ in mine],
            "x": [round(event.dur / 1e3, 6) for event, _ in mine],
            "y": [lane.name for _, lane in mine],
            "hovertext": [event_in_words(event, lane, kind) for event, lane in mine],
            "hovertemplate": "%{hovertext}<extra></extra>",
            "marker": {
                "color": SPAN_COLOURS.get(kind) or kind_colour(kind),
                "line": {"width": 1 if kind in SPAN_COLOURS else 0, "color": "#FFFFFF"},
            },
            "showlegend": kind not in SPAN_COLOURS,
        }
        for kind, mine in sorted(kinds.items(), key=lambda one: -len(one[1]))
    ]  # fmt: skip
    layout = {
        "barmode": "overlay",
        "bargap": 0.15,
        "xaxis": axis("time in ms"),
        "yaxis": names_axis(names, autorange="reversed", fixedrange=True),
        "height": 180 + LANE_PX * len(names),
        # In pixels below the axis: what counts is the height of the lanes.
        "legend": {"orientation": "h", "y": -LEGEND_PX / (LANE_PX * len(names)), "yanchor": "top"},
    }
    return Plot("", data, layout, note)


def first_steps(found: list[tuple[Event, Lane]]) -> tuple[list[tuple[Event, Lane]], str]:
    """Return as many whole steps, from the first, as are drawn fluently, and a note if not all."""
    if len(found) <= MOST_SEGMENTS:
        return found, ""
    steps = [event for event, lane in found if lane.rank == 0]
    cut_us = found[MOST_SEGMENTS][0].ts
    whole = [event for event in steps if event.ts + event.dur <= cut_us]
    if whole:
        end_us = max(event.ts + event.dur for event in whole)
        shown = [one for one in found if one[0].ts < end_us][:MOST_SEGMENTS]
        what = f"the first {len(whole)} of {len(steps)} steps"
    else:
        shown = found[:MOST_SEGMENTS]
        what = "the beginning"
    return shown, f"Drawn: {what}, {len(shown)} of {len(found)} events; Perfetto shows all."


def event_in_words(event: Event, lane: Lane, kind: str) -> str:
    """Return what is shown where the pointer is over an event, with units."""
    args = event.args
    title = kind if lane.rank == len(SPANS) else event.name
    if kind in CAUSES:
        title = f"copy of an expert, {kind}"
    text = f"<b>{said(title)}</b> on {lane.name}<br>"
    places = [f"{key} {plain(args[key])}" for key in ("step", "layer", "expert") if key in args]
    amounts = []
    if isinstance(args.get("bytes"), int):
        amounts.append(bytes_in_words(args["bytes"]))
    if "tokens" in args:
        amounts.append(f"{plain(args['tokens'])} token{'' if args['tokens'] == 1 else 's'}")
    took = time_in_words(event.dur * 1e3)
    when = f"starts at {round(event.ts / 1e3, 6):.12g} ms, takes {took}"
    rest = filter(None, (", ".join(places), when, ", ".join(amounts)))
    return text + "<br>".join(rest)


def figure_json(plot: Plot) -> str:
    """Return a figure as JSON that may stand inside a script element.

    plotly checks every key and value, and raises ValueError for what it does not know.
    """
    import plotly.graph_objects as go

    layout = {
        "margin": {"l": 10, "r": 10, "t": 20, "b": 40},
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "hoverlabel": {"align": "left"},
        "template": "none",
        **plot.layout,
    }
    text: str = go.Figure(plot.data, layout).to_json(engine="json")
    return text.replace("<", "\\u003c")
