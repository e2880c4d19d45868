"""What is drawn is what the rows say; pictures are whole, readable, and leave no state behind."""

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from moesim.answers import plots
from moesim.answers.api import replay
from moesim.answers.compare import Comparison
from moesim.answers.points import Point, flat, row_of
from moesim.answers.result import Result
from moesim.answers.window import Stretch, Window, expert_in_words, shown_lanes
from moesim.colours import look_of
from moesim.errors import InputError
from moesim.policies.registry import BUILTIN
from moesim.sim.metrics import TIMES, by_step
from moesim.sim.timeline import timeline
from moesim.types import LANES

GIB = 1 << 30
SPEEDS = {"lru": 40.0, "dali": 25.0, "static": 10.0}


def made(policy: str, speed: float, gib: float = 8, batch: int = 1, **more: Any) -> dict[str, Any]:
    """Return a row of a comparison: 100 tokens, whose time grows from cause to cause."""
    makespan_ns = round(100e9 / speed)
    weight = np.arange(1.0, len(TIMES) + 1) ** 3
    time_ns = dict(zip(TIMES, map(int, makespan_ns * weight / weight.sum()), strict=True))
    time_ns["attention"] += makespan_ns - sum(time_ns.values())
    return {
        "policy": policy, "batch": batch, "budget_bytes": int(gib * GIB), "tokens_per_s": speed,
        "low": 0.9 * speed, "high": 1.2 * speed, "speedup": speed / 10, "makespan_ns": makespan_ns,
        "bound_tokens_per_s": 60.0, "time_ns": time_ns, "hit_rate_by_layer": [0.25, None, 0.75],
        **more,
    }  # fmt: skip


def compared(rows: list[dict[str, Any]]) -> Comparison:
    """Return a comparison of a model whose experts take 32 GiB."""
    budgets = {row["budget_bytes"] for row in rows}
    cells = [{"budget_bytes": size, "cache_ratio": size / (32 * GIB)} for size in budgets]
    return Comparison(
        {"rows": rows, "baseline": "static", "cells": cells, "model": "m", "hardware": "h"}
    )


@pytest.fixture(scope="module")
def recorded() -> Result:
    return replay(
        policy="dali", cache_ratio=0.25, prompt=4, generate=6, machine="simpy", record=True
    )


def panel_of(figure: Any, panel: int = 0) -> Any:
    """Return a panel, whose artists are of many types."""
    return figure.axes[panel]


def bars(figure: Figure, panel: int = 0) -> list[tuple[str, Any]]:
    """Return the label of the container and the rectangle of each bar."""
    axes = panel_of(figure, panel)
    found = [c for c in axes.containers if hasattr(c, "patches")]
    return [(c.get_label(), patch) for c in found for patch in c.patches]


def texts(figure: Figure) -> list[str]:
    """Return what is written inside panels."""
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_bars_of_time_sum_to_the_time_of_a_token() -> None:
    rows = [
        row_of(Point(policy=policy, prompt=4, generate=4, cache_ratio=0.25, machine="simpy"))
        for policy in ("dali", "all-cpu")
    ]
    drawn = bars(plots.time_breakdown(rows))
    for place, row in enumerate(rows):
        own = {label: bar.get_width() for label, bar in drawn if round(bar.get_y() + 0.4) == place}
        assert sum(own.values()) == pytest.approx(1000 / row["tokens_per_s"])
        assert own["attention"] == pytest.approx(
            row["time_ns.attention"] / 1e6 / row["output_tokens"]
        )
        assert own["wait: CPU"] == pytest.approx(
            row["time_ns.wait_cpu"] / 1e6 / row["output_tokens"]
        )


def test_small_causes_are_one_and_nothing_is_lost() -> None:
    row = made("lru", 40)
    drawn = dict(bars(plots.time_breakdown([row])))
    assert sum(bar.get_width() for bar in drawn.values()) == pytest.approx(25)
    small = [ns for key, ns in row["time_ns"].items() if ns <= 0.015 * row["makespan_ns"]]
    assert drawn["other work"].get_width() == pytest.approx(sum(small) / 1e6 / 100)
    assert "other waits" not in drawn
    starts = [bar.get_x() for bar in drawn.values()]
    ends = [bar.get_x() + bar.get_width() for bar in drawn.values()]
    assert starts == pytest.approx([0, *ends[:-1]])


def test_a_wait_is_small_beside_other_waits() -> None:
    row = made("lru", 40)
    row["time_ns"] = {**dict.fromkeys(TIMES, 0), "attention": 98, "wait_kv": 1, "wait_disk": 1}
    row["makespan_ns"] = 100
    drawn = {label: bar.get_width() for label, bar in bars(plots.time_breakdown([row]))}
    assert drawn == pytest.approx({"attention": 24.5, "other waits": 0.5})


def test_only_waits_are_hatched() -> None:
    hatched = {label: bar.get_hatch() is not None for label, bar in bars(
        plots.time_breakdown([made("lru", 40)])
    )}  # fmt: skip
    assert hatched == {label: "wait" in label for label in hatched}
    assert set(hatched.values()) == {True, False}


def test_bars_of_several_budgets_say_which() -> None:
    rows = [made("lru", 40, gib) for gib in (8, 16)]
    ticks = panel_of(plots.time_breakdown(rows)).get_yticklabels()
    assert [tick.get_text() for tick in ticks] == ["lru, 8.00 GiB", "lru, 16.00 GiB"]


def test_speed_over_budget_is_a_line_with_a_band_per_policy() -> None:
    rows = [
        made(policy, speed * gib / 8, gib)
        for gib in (16, 8, 12)
        for policy, speed in SPEEDS.items()
    ]
    figure = plots.throughput(rows, experts_bytes=32 * GIB)
    axes = panel_of(figure)
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {*SPEEDS, "no policy exceeds"}
    for number, (policy, speed) in enumerate(SPEEDS.items()):
        assert lines[policy].get_xdata().tolist() == [8, 12, 16]
        assert lines[policy].get_ydata().tolist() == [speed, speed * 1.5, speed * 2]
        look = look_of(policy)
        assert (lines[policy].get_color(), lines[policy].get_marker()) == look[:2]
        band = np.unique(axes.collections[number].get_paths()[0].vertices, axis=0)
        assert band == pytest.approx(
            np.array([[8 * n, edge * speed * n] for n in (1, 1.5, 2) for edge in (0.9, 1.2)])
        )
    second = axes.child_axes[0]
    figure.draw_without_rendering()
    assert [text.get_text() for text in second.get_xticklabels()] == ["25", "37.5", "50"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["8", "12", "16"]
    assert second.get_xlim() == pytest.approx(np.array(axes.get_xlim()) / 32 * 100)
    assert [text.get_text() for text in figure.legends[0].texts] == ["no policy exceeds", *SPEEDS]


def test_the_bound_is_what_the_most_that_is_allowed_can_reach() -> None:
    rows = [made("lru", 40, gib, bound_tokens_per_s=50.0 + gib) for gib in (8, 16)]
    rows += [made("dali", 30, gib, bound_tokens_per_s=48.0 + gib) for gib in (8, 16)]
    rows += [made("static", 30, 4, bound_tokens_per_s=None)]
    (line,) = (
        line for line in panel_of(plots.throughput(rows)).lines if "exceeds" in line.get_label()
    )
    assert line.get_drawstyle() == "steps-pre"  # between two budgets, that of the larger one
    assert line.get_xdata().tolist() == [8, 16]
    assert line.get_ydata().tolist() == [58, 66]


def test_a_bound_far_above_is_written_and_not_drawn() -> None:
    rows = [made("lru", 40, gib, bound_tokens_per_s=gib * 100.0) for gib in (8, 16)]
    figure = plots.throughput(rows)
    assert "no policy can exceed 800 to 1600" in texts(figure)
    assert panel_of(figure).get_ylim()[1] < 60
    figure = plots.throughput(rows[:1])
    assert "no policy can exceed 800 \N{RIGHTWARDS ARROW}" in texts(figure)
    assert panel_of(figure).get_xlim()[1] < 80


def test_one_budget_is_bars_from_fast_to_slow() -> None:
    rows = [made(policy, SPEEDS[policy]) for policy in ("static", "lru", "dali")]
    figure = plots.throughput(rows, baseline="static")
    axes = panel_of(figure)
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    assert names == ["lru", "dali", "static (baseline)"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top
    drawn = [bar for _, bar in bars(figure)]
    assert [bar.get_width() for bar in drawn] == list(SPEEDS.values())
    assert [to_hex(bar.get_facecolor()).upper() for bar in drawn] == [
        look_of(policy).colour for policy in SPEEDS
    ]
    whiskers = [c.get_segments()[0][:, 0].tolist() for c in axes.collections]
    assert whiskers == [pytest.approx([0.9 * v, 1.2 * v]) for v in SPEEDS.values()]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linewidth() == 3] == [60]
    assert {"40.0  4.00x", "25.0  2.50x", "10.0  1.00x"} <= set(texts(figure))
    assert "8.00 GiB" in axes.get_xlabel()


def test_there_is_a_panel_for_each_batch() -> None:
    rows = [made("lru", 40 * batch, 8, batch) for batch in (4, 1)]
    figure = plots.throughput(rows)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["batch 1", "batch 4"]
    assert [bars(figure, panel)[0][1].get_width() for panel in (0, 1)] == [40, 160]


def test_without_uncertainty_nothing_is_said_of_it() -> None:
    row = made("lru", 40)
    certain = {key: value for key, value in row.items() if key not in ("low", "high", "speedup")}
    axes = panel_of(plots.throughput([certain]))
    assert "uncertainty" not in axes.get_xlabel()
    assert not axes.collections
    assert "uncertainty" in panel_of(plots.throughput([row])).get_xlabel()


def test_hit_rates_are_lines_with_gaps_over_layers() -> None:
    rows = [made("lru", 40), made("dali", 25, hit_rate_by_layer=None)]
    rows.append(made("static", 10, hit_rate_by_layer=[None, None, None]))
    (line,) = panel_of(plots.hit_rates(rows)).lines
    assert line.get_label() == "lru"
    np.testing.assert_array_equal(line.get_xdata(), [0, 1, 2])
    np.testing.assert_array_equal(line.get_ydata(), [25, math.nan, 75])


def test_hit_rates_of_many_policies_are_a_map() -> None:
    rates = np.random.default_rng(1).random((len(BUILTIN), 6))
    rows = [
        made(name, 40, hit_rate_by_layer=own.tolist())
        for name, own in zip(BUILTIN, rates, strict=True)
    ]
    axes = panel_of(plots.hit_rates(rows))
    (drawn,) = axes.images
    assert np.asarray(drawn.get_array()) == pytest.approx(100 * rates)
    assert drawn.get_clim() == (0, 100)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(BUILTIN)
    assert not axes.lines


def test_rows_of_a_replay_and_of_a_comparison_are_read_alike(recorded: Result) -> None:
    data = recorded.data
    plain = plots.read(flat(data))
    assert plain == plots.read(data)
    assert (plain.policy, plain.batch) == ("dali", 1)
    assert plain.budget_bytes == data["run"]["budget_bytes"]
    assert plain.low == plain.high == recorded.tokens_per_s
    assert plain.hit_rates == data["hit_rate_by_layer"]
    own = {key: data[key] for key in ("policy", "tokens_per_s", "makespan_ns", "time_ns")}
    assert plots.read({**own, "batch": 1, "budget_bytes": 1}).ms == plain.ms


@pytest.mark.parametrize("draw", [plots.throughput, plots.time_breakdown, plots.hit_rates])
def test_nothing_to_draw_is_an_error(draw: Any) -> None:
    with pytest.raises(InputError, match="no rows"):
        draw([])


def drawn_lanes(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """Return begin and end of the bars of each lane, in the picture's unit."""
    names = [tick.get_text() for tick in panel_of(figure).get_yticklabels()]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _, bar in bars(figure):
        lane = names[round(bar.get_y() + bar.get_height() / 2)]
        found[lane].append((bar.get_x(), bar.get_x() + bar.get_width()))
    return {name: sorted(own) for name, own in found.items()}


def test_lanes_of_a_whole_step_add_up_to_its_time(recorded: Result) -> None:
    run = recorded.run
    row = by_step(run)[3]
    layers = run.prepared.setting.layers
    figure = plots.lanes(run, step=3, layers=layers)
    worked = sum(ns for key, ns in row.items() if key[:-3] in TIMES and "wait" not in key)
    scale = row["duration_ns"] / panel_of(figure).get_xlim()[1]
    shown = drawn_lanes(figure)
    assert list(shown) == ["host", *LANES[:4]]
    assert sum(end - begin for begin, end in shown["gpu"]) * scale == pytest.approx(worked)


def test_lanes_are_those_of_the_timeline(recorded: Result) -> None:
    run = recorded.run
    events = [event for event in timeline(run)["traceEvents"] if event["ph"] == "X"]
    spans = {
        event["args"]["layer"]: (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event["cat"] == "user_annotation" and event["args"]["step"] == 3
        and "layer" in event["args"]
    }  # fmt: skip
    begin, end = spans[2][0], spans[4][1]
    copies = [
        (max(e["ts"], begin) - begin, min(e["ts"] + e["dur"], end) - begin)
        for e in events
        if e["name"].startswith("Memcpy HtoD") and e["ts"] < end and e["ts"] + e["dur"] > begin
    ]
    figure = plots.lanes(run, step=3, first_layer=2, layers=3)
    assert copies
    assert np.array(drawn_lanes(figure)["h2d"]) == pytest.approx(np.array(sorted(copies)))
    borders = sorted({line.get_xdata()[0] for line in panel_of(figure).lines})
    expected = sorted({at - begin for layer in (2, 3, 4) for at in spans[layer]})
    assert borders == pytest.approx(expected)
    assert {"layer 2", "layer 3", "layer 4"} <= set(texts(figure))


def test_host_and_disk_are_lanes_where_they_are_used() -> None:
    def shown(*used: str) -> list[str]:
        work = [Stretch(lane, "pause", 0, 1, 0, -1) for lane in used]
        return shown_lanes(Window(0, 0, 1, {0: (0, 1)}, work))

    assert shown("gpu") == list(LANES[:4])
    assert shown("disk", "host") == ["host", *LANES]


def test_a_picture_says_where_it_ran(recorded: Result) -> None:
    run = recorded.run
    assert run.log is not None
    machine = run._replace(machine="emulated", log=run.log._replace(exact=False))
    titles = [plots.run_figure(one).get_suptitle() for one in (run, machine)]
    setup = "12.00 MiB for experts, batch 1"
    assert titles == [
        f"tiny-mixtral on {run.prepared.profile.name}, {setup}",
        f"tiny-mixtral on emulated, {setup}",
    ]


def test_lanes_default_to_the_middle_of_decode(recorded: Result) -> None:
    figure = plots.lanes(recorded.run)
    assert "step 3 (decode)" in panel_of(figure).get_xlabel()
    assert [text for text in texts(figure) if "layer" in text] == [
        f"layer {number}" for number in range(4)
    ]


def test_an_expert_of_another_layer_says_which() -> None:
    layers = {0: (0, 10), 1: (10, 20)}
    window = Window(0, 0, 20, layers, [])
    for layer, begin_ns, text in ((1, 10, "7"), (1, 5, "1:7"), (2, 15, "2:7"), (0, 12, "0:7")):
        stretch = Stretch("h2d", "prefetch", begin_ns, begin_ns + 3, layer, 7)
        assert expert_in_words(stretch, window) == text
    nothing = Stretch("gpu", "attention", 0, 3, 0, -1)
    assert expert_in_words(nothing, window) == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"step": 6}, "step 6 is not in 0..5"),
        ({"step": -1}, "step -1 is not in 0..5"),
        ({"first_layer": 8}, "first layer 8, 4 layers: the run has layers 0..7"),
        ({"layers": 0}, "first layer 0, 0 layers: the run has layers 0..7"),
    ],
)
def test_lanes_that_are_not_there(recorded: Result, arguments: Any, said: str) -> None:
    with pytest.raises(InputError) as error:
        plots.lanes(recorded.run, **arguments)
    assert str(error.value) == said


def test_a_run_that_was_not_recorded_has_no_lanes(recorded: Result, tmp_path: Path) -> None:
    run = recorded.run._replace(log=None)
    with pytest.raises(InputError, match="record=True"):
        plots.lanes(run)
    with pytest.raises(InputError, match="record=True"):
        Result(run).timeline(tmp_path / "run.json")
    assert len(Result(run).plot().axes) == 1
    assert len(recorded.plot().axes) == 2


def test_notebooks_show_figures(recorded: Result) -> None:
    from IPython.core.formatters import DisplayFormatter

    formatter: Any = DisplayFormatter()
    shown, _ = formatter.format(recorded.plot())
    assert shown["image/png"].startswith(b"\x89PNG")


def test_a_comparison_is_three_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "pictures"
    rows = [made(policy, speed) for policy, speed in SPEEDS.items()]
    paths = plots.draw_comparison(compared(rows), folder)
    assert [path.name for path in paths] == ["throughput.png", "time.png", "hit_rate.png"]
    assert sorted(folder.iterdir()) == sorted(paths)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_pictures_of_several_budgets_say_which(tmp_path: Path) -> None:
    rows = [
        made(policy, speed, gib, batch, hit_rate_by_layer=None)
        for policy, speed in SPEEDS.items()
        for gib, batch in ((8, 1), (4, 1), (4, 2))
    ]
    assert [path.name for path in plots.draw_comparison(compared(rows), tmp_path)] == [
        "throughput.png",
        "time-1-4.00GiB-batch1.png",
        "time-2-4.00GiB-batch2.png",
        "time-3-8.00GiB-batch1.png",
    ]


def test_a_comparison_needs_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError, match="pictures need a folder"):
        plots.draw_comparison(compared([made("lru", 40)]), file)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_run_is_drawn_whole_or_not_at_all(
    recorded: Result, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"run{suffix}"
    plots.draw_run(recorded.run, path)
    before = path.read_bytes()
    assert len(before) > 1000

    def broken(self: Figure, file: Path, **_: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(Figure, "savefig", broken)
    with pytest.raises(OSError, match="full"):
        plots.draw_run(recorded.run, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_no_picture_is_refused_in_one_line(recorded: Result, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        plots.draw_run(recorded.run, tmp_path / "run.jpeg")
    assert str(error.value) == f"{tmp_path}/run.jpeg: a picture's name ends in .png, .svg, .pdf"
    assert not list(tmp_path.iterdir())


def test_matplotlib_keeps_no_state() -> None:
    code = f"""
import sys
from moesim.answers import plots
rows = [{made("lru", 40)!r}, {made("dali", 25, 16)!r}]
for draw in (plots.throughput, plots.time_breakdown, plots.hit_rates):
    draw(rows)._repr_png_()
print("matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
    assert done.stdout.strip() == b"False"


@pytest.mark.parametrize("budgets", [(8,), (4, 8, 16)])
@pytest.mark.parametrize("draw", [plots.throughput, plots.time_breakdown, plots.hit_rates])
def test_nothing_hides_behind_the_legend_or_beyond_the_edge(
    draw: Any, budgets: tuple[int, ...]
) -> None:
    """With every policy there is, and one of a long name."""
    names = [*BUILTIN, "dali:cache=lru,prefetch_size=4"]
    rows = [made(n, 40 - at, gib) for gib in budgets for at, n in enumerate(names)]
    figure = draw(rows)
    FigureCanvasAgg(figure).draw()
    renderer = figure.canvas.get_renderer()
    boxes = [legend.get_window_extent(renderer) for legend in figure.legends]
    boxes += [axes.get_tightbbox(renderer) for axes in figure.axes]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
