"""Pictures of comparisons and of single runs.

Rows are those of `compare` or of `points.row_of`; see `read`. Figures belong to whoever asked for
them: nothing is shown, and matplotlib's global state is left alone.
"""

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moesim.answers.points import flat
from moesim.answers.window import Window, expert_in_words, shown_lanes, window_of
from moesim.colours import kind_colour, look_of
from moesim.errors import InputError
from moesim.real.plots import DPI, check_picture, save
from moesim.sim.metrics import TIMES, summarize
from moesim.sim.replay import Replayed
from moesim.sizes import size_in_words
from moesim.types import CAUSES, COPY_IN, KINDS, PHASES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moesim.answers.compare import Comparison

Rows = Sequence[Mapping[str, Any]]

FONT = 11
"""Points; half of it can still be read."""
LIMIT = "0.45"
"""The grey of what nobody can exceed."""
SMALL = 0.015
"""Causes that take less of the longest bar everywhere are drawn as one."""
ROOM = 1.6
"""A bound that is further above the best than this is written, not drawn."""
MOST_LINES = 8
"""More of them cannot be told apart where they cross."""
HITS = "experts there in time (decode)"
OTHERS = "other work", "other waits"
WORDS = {
    "expert_gpu": "experts on GPU",
    "expert_cpu": "experts on CPU",
    "attention_cpu": "attention on CPU",
    "send": "tokens to CPU",
    "return": "tokens from CPU",
    "pause": "host program",
    "wait_cpu": "wait: CPU",
    "wait_kv": "wait: keys, values",
    "wait_dense": "wait: other weights",
}
"""What operations and waits are called where that is not their name."""


class Row(NamedTuple):
    """What pictures need of a policy's results at one budget and batch."""

    policy: str
    batch: int
    budget_bytes: int
    tokens_per_s: float
    low: float
    high: float
    speedup: float | None
    bound: float | None
    """Tokens/s that nobody can exceed."""
    ms: dict[str, float]
    """Per generated token, by what the GPU did or waited for; their sum is 1000 / tokens_per_s."""
    hit_rates: list[float]
    """By MoE layer, nan where no expert was needed; empty where nothing was decoded."""


def draw_comparison(comparison: "Comparison", folder: str | Path) -> list[Path]:
    """Draw a comparison, and return the pictures' paths.

    They are throughput.png and, for each budget and batch, time.png and hit_rate.png; where there
    are several, their names say which. The folder is made if there is none.

    Raises InputError without matplotlib, or for a folder that cannot be made.
    """
    folder = Path(folder)
    check_picture(folder / "throughput.png")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; pictures need a folder") from None
    if not comparison.rows:
        return []
    data = comparison.data
    most = max(data["cells"], key=lambda cell: cell["budget_bytes"])
    every_bytes = round(most["budget_bytes"] / most["cache_ratio"]) if most["cache_ratio"] else None
    about = f"{data['model']} on {data['hardware']}"
    figures = {
        "throughput": throughput(
            comparison.rows, baseline=data["baseline"], experts_bytes=every_bytes
        )
    }
    figures["throughput"].suptitle(about, fontsize=FONT)
    groups = grouped(comparison.rows)
    for number, ((budget_bytes, batch), rows) in enumerate(sorted(groups.items()), 1):
        place = f"-{number}-{size_in_words(budget_bytes).replace(' ', '')}-batch{batch}"
        end = place if len(groups) > 1 else ""
        own = {f"time{end}": time_breakdown(rows)}
        if any(read(row).hit_rates for row in rows):
            own[f"hit_rate{end}"] = hit_rates(rows)
        for figure in own.values():
            figure.suptitle(f"{about}, {setup(budget_bytes, batch)}", fontsize=FONT)
        figures |= own
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        save(figure, paths[-1])
    return paths


def draw_run(run: Replayed, path: Path) -> None:
    """Draw one run as `run_figure` does; the file appears whole or not.

    Raises InputError without matplotlib, or for a file name that is no picture's.
    """
    check_picture(path)
    save(run_figure(run), path)


def run_figure(run: Replayed) -> "Figure":
    """Return where a run's time went and, if it was recorded, what its lanes did in some layers."""
    result = summarize(run)
    if run.log is None:
        figure = time_breakdown([result])
    else:
        window = window_of(run)
        height = lanes_height(window)
        figure = new_figure(10, 2 + height)
        above, below = figure.subplots(2, 1, height_ratios=(2, height))
        draw_times(above, [result])
        draw_lanes(below, run, window)
        legend(figure)
    about = result["run"]
    said = setup(about["budget_bytes"], result["sequences"])
    simulated = run.log is None or run.log.exact
    where = about["hardware" if simulated else "machine"]
    figure.suptitle(f"{about['model']} on {where}, {said}", fontsize=FONT)
    return figure


def throughput(
    rows: Rows, *, baseline: str | None = None, experts_bytes: int | None = None
) -> "Figure":
    """Return tokens/s over the budget, a line per policy; of one budget, sorted bars.

    There is a panel for each batch. Bands and error bars reach from `low` to `high`, and grey is
    what nobody can exceed. `experts_bytes` of all experts give the budget a second axis, as a share
    of them; bars say which policy is the `baseline` of speed-ups.
    """
    read_rows = [read(row) for row in some(rows)]
    batches = sorted({row.batch for row in read_rows})
    panels = [[row for row in read_rows if row.batch == batch] for batch in batches]
    lines = len({row.budget_bytes for row in read_rows}) > 1
    if lines:
        figure = new_figure(2.8 + 5.4 * len(panels), 5)
        every = figure.subplots(1, len(panels), squeeze=False)[0]
    else:
        heights = [1.3 + 0.36 * len(panel) for panel in panels]
        figure = new_figure(6.6 + inches([row.policy for row in read_rows]), sum(heights))
        every = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel, batch in zip(every, panels, batches, strict=True):
        if lines:
            draw_speed_lines(axes, panel, experts_bytes)
        else:
            draw_speed_bars(axes, panel, baseline)
        if len(panels) > 1:
            axes.set_title(f"batch {batch}", fontsize=FONT, loc="left")
    if lines:
        best = {row.policy: row.tokens_per_s for row in sorted(read_rows, key=by_speed)}
        legend(figure, lambda name: -best.get(name, math.inf))
    return figure


def time_breakdown(rows: Rows) -> "Figure":
    """Return a bar for each row, in their order: ms per generated token, by cause.

    What the GPU waited for is hatched. The time of the prompts is part of it: a bar is as long as
    1000 / tokens_per_s.
    """
    figure = new_figure(9.2 + inches(labels(some(rows))), 1.6 + 0.42 * len(rows))
    draw_times(figure.subplots(), rows)
    legend(figure)
    return figure


def hit_rates(rows: Rows) -> "Figure":
    """Return the share of experts whose weights were there in time, over MoE layers, in decode.

    Up to `MOST_LINES` rows are lines; more of them are a map, a row each, in their order.
    """
    decoded = [
        (row, name)
        for row, name in zip(map(read, some(rows)), labels(rows), strict=True)
        if row.hit_rates
    ]
    if len(decoded) > MOST_LINES:
        figure = new_figure(8 + inches(labels(rows)), 1.4 + 0.32 * len(decoded))
        draw_hit_map(figure.subplots(), decoded)
    else:
        figure = new_figure(9, 4.8)
        draw_hit_lines(figure.subplots(), decoded)
        legend(figure)
    return figure


def lanes(
    run: Replayed, step: int | None = None, first_layer: int = 0, layers: int = 4
) -> "Figure":
    """Return what each lane of a recorded run did in some MoE layers of one step, over time.

    By default they are the first layers of the step in the middle of decode. Bars are labelled with
    the expert where there is room, and with its layer if that is not the one in progress.

    Raises InputError for a run that was not recorded, or without such a step and layers.
    """
    window = window_of(run, step, first_layer, layers)
    figure = new_figure(10, lanes_height(window))
    draw_lanes(figure.subplots(), run, window)
    legend(figure)
    return figure


def read(row: Mapping[str, Any]) -> Row:
    """Return what pictures need of a row of `compare`, of `points.row_of` or of `summarize`."""
    plain = flat(dict(row))
    speed = float(plain["tokens_per_s"])
    per_token = 1e3 / (speed * plain["makespan_ns"])
    rates = plain.get("hit_rate_by_layer") or []
    decoded = any(rate is not None for rate in rates)
    return Row(
        policy=plain["policy"],
        batch=plain["batch"] if "batch" in plain else plain["sequences"],
        budget_bytes=plain["budget_bytes" if "budget_bytes" in plain else "run.budget_bytes"],
        tokens_per_s=speed,
        low=speed if plain.get("low") is None else plain["low"],
        high=speed if plain.get("high") is None else plain["high"],
        speedup=plain.get("speedup"),
        bound=plain.get("bound_tokens_per_s"),
        ms={name: plain.get(f"time_ns.{name}", 0) * per_token for name in TIMES},
        hit_rates=[math.nan if rate is None else rate for rate in rates] if decoded else [],
    )


def by_speed(row: Row) -> float:
    """Return what sorts rows, the slowest first."""
    return row.tokens_per_s


def some(rows: Rows) -> Rows:
    """Return the rows; raise InputError if there are none."""
    if not rows:
        raise InputError("there are no rows to draw")
    return rows


def grouped(rows: Rows) -> dict[tuple[int, int], list[Mapping[str, Any]]]:
    """Return rows by budget and batch, in their order."""
    groups: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        plain = read(row)
        groups.setdefault((plain.budget_bytes, plain.batch), []).append(row)
    return groups


def labels(rows: Rows) -> list[str]:
    """Return what to call each row: its policy, and the budget and batch where they differ."""
    every = [read(row) for row in rows]
    several = [len({getattr(row, key) for row in every}) > 1 for key in ("budget_bytes", "batch")]
    return [
        row.policy
        + (f", {size_in_words(row.budget_bytes)}" if several[0] else "")
        + (f", batch {row.batch}" if several[1] else "")
        for row in every
    ]


def setup(budget_bytes: int, batch: int) -> str:
    """Return a budget and a batch in words."""
    return f"{size_in_words(budget_bytes)} for experts, batch {batch}"


def unit_of(most_bytes: int) -> tuple[int, str]:
    """Return the unit to write sizes in."""
    return (1 << 30, "GiB") if most_bytes >= 1 << 30 else (1 << 20, "MiB")


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of so many inches, which notebooks show as a picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib: pip install 'moesim[plots]'") from None

    figure = Figure(figsize=(width, height), layout="constrained")
    vars(figure)["_repr_png_"] = partial(png, figure)  # notebooks know only pyplot's by themselves
    return figure


def inches(names: Iterable[str]) -> float:
    """Return the room that names beside a panel need."""
    return 0.09 * max(map(len, names))


def png(figure: "Figure") -> bytes:
    """Return a figure as the bytes of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def legend(figure: Any, key: Callable[[str], float] | None = None) -> None:
    """Say beside all panels what is drawn in them, each thing once, in order of the key.

    The figure grows if it is not as high as that.
    """
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    names = sorted(handles, key=key) if key else list(handles)
    if names:
        figure.set_figheight(max(figure.get_figheight(), 0.27 * len(names) + 0.2))
        figure.legend(
            [handles[name] for name in names], names,
            loc="outside right upper", fontsize=FONT, handlelength=2.6, frameon=False,
        )  # fmt: skip


def dress(axes: Any, *, xlabel: str = "", ylabel: str = "", grid: str = "both") -> None:
    """Give axes their labels, a grid behind the data, and no frame."""
    axes.set_xlabel(xlabel, fontsize=FONT)
    axes.set_ylabel(ylabel, fontsize=FONT)
    axes.tick_params(labelsize=FONT)
    axes.grid(axis=grid, alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def digits(number: float) -> str:
    """Return a number above 0 with three digits, or all of those before the point."""
    return f"{number:.{max(0, 2 - math.floor(math.log10(number)))}f}"


def in_words(kind: str) -> str:
    """Return what to call an operation, a copy by its cause, or a wait."""
    if kind in CAUSES:
        return f"copy: {kind}"
    return WORDS.get(kind, kind.replace("wait_", "wait: ").replace("_", " "))


def draw_speed_lines(axes: Any, rows: list[Row], experts_bytes: int | None) -> None:
    """Draw tokens/s over the budget."""
    unit, name = unit_of(max(row.budget_bytes for row in rows))
    policies = dict.fromkeys(row.policy for row in rows)
    for policy in policies:
        own = sorted((row for row in rows if row.policy == policy), key=lambda r: r.budget_bytes)
        look = look_of(policy)
        at = [row.budget_bytes / unit for row in own]
        axes.fill_between(
            at, [row.low for row in own], [row.high for row in own],
            color=look.colour, alpha=min(0.12, 0.8 / len(policies)), linewidth=0,
        )  # fmt: skip
        axes.plot(
            at, [row.tokens_per_s for row in own],
            color=look.colour, linestyle=look.line, marker=look.marker, label=policy,
        )  # fmt: skip
    speed = speed_in_words(rows, "bands")
    dress(axes, xlabel=f"GPU memory for experts in {name}", ylabel=speed)
    best = max(row.high for row in rows)
    bounds = bounds_of(rows)
    at = [budget / unit for budget in bounds]
    top = 1.2 * best
    if bounds and min(bounds.values()) < ROOM * best:
        top = max(top, min(1.05 * max(bounds.values()), ROOM * best))
        highest = list(bounds.values())
        # Between two budgets nothing exceeds the bound of the larger one; less is not known.
        axes.fill_between(at, highest, max(top, *highest), step="pre", color="0.92")
        axes.plot(
            at, highest,
            color=LIMIT, linewidth=3, drawstyle="steps-pre", label="no policy exceeds",
        )  # fmt: skip
    elif bounds:
        low, high = digits(min(bounds.values())), digits(max(bounds.values()))
        span = low if low == high else f"{low} to {high}"
        axes.text(
            0.02, 0.98, f"no policy can exceed {span}", transform=axes.transAxes,
            va="top", color=LIMIT, fontsize=FONT,
        )  # fmt: skip
    axes.set_ylim(0, top)
    budgets = sorted({row.budget_bytes for row in rows})
    mark_budgets(axes, budgets, unit)
    if experts_bytes:
        share = unit * 100 / experts_bytes
        second = axes.secondary_xaxis(
            "top", functions=(lambda value: value * share, lambda value: value / share)
        )
        second.set_xlabel("% of all experts", fontsize=FONT)
        second.tick_params(labelsize=FONT)
        mark_budgets(second, budgets, experts_bytes / 100)


def mark_budgets(axes: Any, budgets: list[int], unit: float) -> None:
    """Put the marks of an axis in that unit at the budgets, unless they are too close together."""
    apart = min((high - low for low, high in pairwise(budgets)), default=0)
    if apart > 0.08 * (budgets[-1] - budgets[0]):
        at = [budget / unit for budget in budgets]
        axes.set_xticks(at, [f"{value:.3g}" for value in at])


def speed_in_words(rows: list[Row], marks: str, where: str = "") -> str:
    """Return what an axis of speeds says, with what marks their uncertainty if anything does."""
    uncertain = any(row.low < row.high for row in rows)
    return f"generated tokens/s{where}" + (f" ({marks}: uncertainty)" if uncertain else "")


def bounds_of(rows: Iterable[Row]) -> dict[int, float]:
    """Return what nobody can exceed by budget: policies that change results may have more."""
    bounds: dict[int, float] = {}
    for row in sorted(rows, key=lambda row: row.budget_bytes):
        if row.bound is not None and math.isfinite(row.bound):
            bounds[row.budget_bytes] = max(row.bound, bounds.get(row.budget_bytes, 0.0))
    return bounds


def draw_speed_bars(axes: Any, rows: list[Row], baseline: str | None) -> None:
    """Draw tokens/s of one budget as bars, the fastest on top."""
    rows = sorted(rows, key=by_speed, reverse=True)
    best = max(row.high for row in rows)
    right = 1.3 * best
    bounds = bounds_of(rows)
    bound = max(bounds.values(), default=math.inf)
    if bound < ROOM * best:
        right = max(right, 1.04 * bound)
        axes.axvspan(bound, right, color="0.92", zorder=0)
        axes.axvline(bound, color=LIMIT, linewidth=3, zorder=0.5)
    if bounds:
        arrow = " \N{RIGHTWARDS ARROW}" if bound > right else ""
        axes.text(
            min(bound, right), -0.65,
            f"no policy can exceed {digits(bound)}{arrow}",
            ha="right", va="bottom", color=LIMIT, fontsize=FONT,
        )  # fmt: skip
    for place, row in enumerate(rows):
        certain = row.low == row.high
        axes.barh(
            place, row.tokens_per_s, color=look_of(row.policy).colour, height=0.7,
            xerr=None if certain else [[row.tokens_per_s - row.low], [row.high - row.tokens_per_s]],
            error_kw={"ecolor": "0.5", "capsize": 4},
        )  # fmt: skip
        speedup = row.speedup
        times = "" if speedup is None else f"  {speedup:.{1 if speedup >= 10 else 2}f}x"
        axes.text(
            row.high + 0.015 * right, place, f"{digits(row.tokens_per_s)}{times}",
            va="center", fontsize=FONT, fontweight="bold" if row.policy == baseline else None,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    name_bars(axes, [r.policy + (" (baseline)" if r.policy == baseline else "") for r in rows])
    where = f" with {size_in_words(rows[0].budget_bytes)} for experts"
    dress(axes, xlabel=speed_in_words(rows, "error bars", where), grid="x")
    axes.set_xlim(0, right)


def draw_hit_lines(axes: Any, rows: list[tuple[Row, str]]) -> None:
    """Draw hit rates over layers as lines."""
    from matplotlib.ticker import MaxNLocator

    for row, name in rows:
        look = look_of(row.policy)
        layers = len(row.hit_rates)
        axes.plot(
            range(layers), [100 * rate for rate in row.hit_rates],
            color=look.colour, linestyle=look.line, marker=look.marker, label=name,
            markevery=-(-layers // 12),
        )  # fmt: skip
    dress(axes, xlabel="MoE layer", ylabel=f"{HITS}, in %")
    axes.set_ylim(-3, 103)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_hit_map(axes: Any, rows: list[tuple[Row, str]]) -> None:
    """Draw hit rates over layers as a map."""
    from matplotlib.ticker import MaxNLocator

    rates = [[100 * rate for rate in row.hit_rates] for row, _ in rows]
    drawn = axes.imshow(rates, aspect="auto", cmap="cividis", vmin=0, vmax=100)
    bar = axes.figure.colorbar(drawn, ax=axes, pad=0.01)
    bar.set_label(f"{HITS}, in %", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    name_bars(axes, [name for _, name in rows])
    dress(axes, xlabel="MoE layer")
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def name_bars(axes: Any, names: list[str]) -> None:
    """Name horizontal bars, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)


def draw_times(axes: Any, rows: Rows) -> None:
    """Draw ms per generated token by cause."""
    every = [read(row) for row in rows]
    parts = merged([row.ms for row in every])
    totals = [sum(row.ms.values()) for row in every]
    left = [0.0] * len(every)
    longest = max(totals)
    for cause in parts[0]:
        waits = cause.startswith("wait_") or cause == OTHERS[1]
        colour = kind_colour(cause)
        dark = is_dark(colour)
        widths = [part[cause] for part in parts]
        axes.barh(
            range(len(every)), widths, left=left, height=0.74, color=colour,
            edgecolor="white" if dark else "0.4", linewidth=0.5, hatch="///" if waits else None,
            label=in_words(cause),
        )  # fmt: skip
        for place, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width > 0.08 * longest:
                axes.text(
                    start + width / 2, place, f"{width / totals[place]:.0%}", ha="center",
                    va="center", fontsize=FONT, color="white" if dark else "black",
                    bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.5},
                )  # fmt: skip
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, row in enumerate(every):
        axes.text(
            left[place] + 0.01 * longest, place,
            f"{digits(totals[place])} ms  ({digits(row.tokens_per_s)} tokens/s)",
            va="center", fontsize=FONT,
        )  # fmt: skip
    name_bars(axes, labels(rows))
    dress(axes, xlabel="ms per generated token, prompts included; hatched: the GPU waits", grid="x")
    axes.set_xlim(0, 1.42 * longest)


def merged(times: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return times by cause, those that are small in every bar as two: work and waits."""
    longest = max(sum(time.values()) for time in times)
    drawn = [name for name in TIMES if max(time[name] for time in times) > SMALL * longest]
    found = []
    for time in times:
        rest = dict.fromkeys(OTHERS, 0.0)
        for name in TIMES:
            if name not in drawn:
                rest[OTHERS[name.startswith("wait_")]] += time[name]
        work = {name: time[name] for name in drawn if not name.startswith("wait_")}
        waits = {name: time[name] for name in drawn if name.startswith("wait_")}
        found.append({**work, OTHERS[0]: rest[OTHERS[0]], **waits, OTHERS[1]: rest[OTHERS[1]]})
    unused = [name for name in OTHERS if not any(part[name] for part in found)]
    return [{name: ms for name, ms in part.items() if name not in unused} for part in found]


def is_dark(colour: str) -> bool:
    """Say whether white text is easier to read than black on a colour."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue < 140


def lanes_height(window: Window) -> float:
    """Return how many inches the lanes need."""
    return 2.1 + 0.45 * len(shown_lanes(window))


def draw_lanes(axes: Any, run: Replayed, window: Window) -> None:
    """Draw what lanes did in a window of a run."""
    shown = shown_lanes(window)
    length_ns = window.end_ns - window.begin_ns
    unit, name = (1e6, "ms") if length_ns >= 10**6 else (1e3, "\N{MICRO SIGN}s")
    length = length_ns / unit
    kinds = sorted({stretch.kind for stretch in window.work}, key=kind_order)
    for kind in kinds:
        own = [stretch for stretch in window.work if stretch.kind == kind]
        colour = kind_colour(kind)
        widths = [(s.end_ns - s.begin_ns) / unit for s in own]
        # White edges would bleach the narrow ones.
        edges = ["white" if width > 0.006 * length else colour for width in widths]
        axes.barh(
            [shown.index(s.lane) for s in own], widths,
            left=[(s.begin_ns - window.begin_ns) / unit for s in own], height=0.74, color=colour,
            edgecolor=edges, linewidth=0.4, label=in_words(kind),
        )  # fmt: skip
        for s, width in zip(own, widths, strict=True):
            text = expert_in_words(s, window)
            if text and width > length * 0.012 * len(text):
                axes.text(
                    ((s.begin_ns + s.end_ns) / 2 - window.begin_ns) / unit, shown.index(s.lane),
                    text, ha="center", va="center", fontsize=FONT - 2, clip_on=True,
                    color="white" if is_dark(colour) else "black",
                )  # fmt: skip
    for layer, (begin_ns, end_ns) in window.layers.items():
        for border in (begin_ns, end_ns):
            axes.axvline((border - window.begin_ns) / unit, color="0.3", linewidth=1, zorder=0.5)
        axes.text(
            ((begin_ns + end_ns) / 2 - window.begin_ns) / unit, -0.62, f"layer {layer}",
            ha="center", va="bottom", fontsize=FONT,
        )  # fmt: skip
    name_bars(axes, shown)
    phase = PHASES[run.prepared.feed.steps.phase[window.step]]
    dress(
        axes, grid="x",
        xlabel=f"{run.prepared.chosen.spec}: {name} since layer {min(window.layers)} of step "
        f"{window.step} ({phase}) began\nnumbers are experts, as layer:expert if of another layer",
    )  # fmt: skip
    axes.set_xlim(0, length)


def kind_order(kind: str) -> tuple[int, str]:
    """Return where a kind, or a cause of copies, stands in a legend."""
    return KINDS.index(kind) if kind in KINDS else COPY_IN, kind
