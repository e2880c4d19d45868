"""Reports: one file that needs nothing else, holds the numbers it was given, and trusts no text."""

import gzip
import html
import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import pytest

import moesim
from moesim.answers.advise import headline
from moesim.answers.compare import Comparison, compare
from moesim.answers.documents import KINDS, MOST_BYTES, Event, read_document
from moesim.answers.inputs import model_of
from moesim.answers.interactive import (
    MOST_SEGMENTS,
    Plot,
    figure_json,
    first_steps,
    lanes_of,
    timeline,
)
from moesim.answers.report import definitions, documents_of, page, report
from moesim.answers.result import Result
from moesim.answers.sections import number
from moesim.answers.sweep import sweep
from moesim.errors import InputError
from moesim.sim import metrics
from moesim.sim.metrics import by_step
from moesim.sim.timeline import timeline as chrome_trace
from moesim.traces.bundled import example_path
from moesim.traces.format import read_trace
from moesim.types import KINDS as OPERATIONS

HARDWARE = "rtx3090-pcie4-ddr4"
WORK: dict[str, Any] = {"prompt": 8, "generate": 4, "machine": "simpy"}


@pytest.fixture(autouse=True)
def _not_calibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def run_of(policy: str, **more: Any) -> Result:
    options: dict[str, Any] = {"cache_ratio": 0.25, **WORK, **more}
    return moesim.replay(policy=policy, **options)


class Page(HTMLParser):
    """What a browser would see: texts, cells with their titles, figures, links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[tuple[str, str]]] = []
        self.figures: list[dict[str, Any]] = []
        self.texts: list[str] = []
        self.within = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        self.tags.append((tag, own))
        self.within = str(own.get("type", tag)) if tag == "script" else tag
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(("", own.get("title") or ""))

    def handle_endtag(self, tag: str) -> None:
        self.within = ""

    def handle_data(self, data: str) -> None:
        if self.within == "application/json":
            self.figures.append(json.loads(data))
        elif self.within in ("td", "th"):
            text, title = self.rows[-1][-1]
            self.rows[-1][-1] = (text + data, title)
        if self.within not in ("application/json", "script", "style"):
            self.texts.append(data)

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def cells(self, first: str) -> list[list[tuple[str, str]]]:
        """Return the rows that hold a text."""
        return [row for row in self.rows if any(text == first for text, _ in row)]


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def written(data: Any, path: Path) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def compared() -> Comparison:
    return compare(
        policies="lru,static,fate", cache_ratios=[0.1, 0.25], windows=2, jobs=1, hardware=
        HARDWARE, **WORK,
    )  # fmt: skip


@pytest.fixture
def validated() -> dict[str, Any]:
    """Return what `moesim validate --json` may print, of two policies."""

    def both(measured: float, simulated: float) -> dict[str, Any]:
        return {
            "measured": measured, "simulated": simulated, "spread": 0.02,
            "repeats": [measured * 0.99, measured, measured * 1.01],
        }  # fmt: skip

    def row(policy: str, tpot_ms: float, off: float) -> dict[str, Any]:
        return {
            "policy": policy, "tpot_error": off, "ttft_error": off, "tokens_per_s_error": -off,
            "tpot_ms": both(tpot_ms, tpot_ms * (1 + off)), "ttft_ms": both(20, 20 * (1 + off)),
            "tokens_per_s": both(1e3 / tpot_ms, 1e3 / tpot_ms * (1 - off)),
            "makespan_ns": both(1e9, 1e9 * (1 + off)),
            "time_ns": {"attention": {"measured": 5, "simulated": 4, "part": off}},
            "explains": "-5% of the makespan",
        }  # fmt: skip

    return {
        "policies": [row("lru", 40.0, -0.1), row("dali", 30.0, 0.05)], "ranked_by": "tpot_ms",
        "kendall_tau": 1.0, "swapped": [], "device": "emulated", "device_name": "a processor",
        "hardware": "emulated-x", "hardware_digest": "0" * 16,
        "provenance": {"measured": 0.5, "interpolated": 0.5}, "model": "tiny", "repeats": 3,
        "workload": {"trace": "1" * 16, "bits": 16}, "machine": {"busy": False}, "notices": [],
    }  # fmt: skip


# One file, and nothing else.


def test_the_file_needs_nothing_else(tmp_path: Path) -> None:
    path = report([run_of("lru", record=True), run_of("static")], tmp_path / "r.html")
    text = path.read_text(encoding="utf-8")
    found = Page(text)

    for tag, attributes in found.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "img")
        for name in ("src", "srcset", "data", "action", "poster", "style"):
            assert not re.search(r"https?:|//|url\(", attributes.get(name) or ""), (tag, attributes)
        assert not (attributes.get("href") or "#").lower().startswith(("http", "//", "javascript"))
    styles = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert len(styles) == 2
    assert not [style for style in styles if "url(" in style or "@import" in style]
    assert text.count("plotly.js v") == 1
    policy = next(a for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert (policy["content"] or "").startswith("default-src 'none';")
    assert "http" not in (policy["content"] or "")
    assert [one.name for one in tmp_path.iterdir() if one.name != "config"] == ["r.html"]


def test_same_files_give_the_same_bytes(tmp_path: Path, compared: Comparison) -> None:
    given = [
        written(run_of("lru").data, tmp_path / "lru.json"),
        written(compared.data, tmp_path / "compare.json"),
    ]
    first, second = (report(given, tmp_path / f"{n}.html").read_bytes() for n in (1, 2))

    assert first == second


def test_a_run_is_the_same_page_whenever_it_was_made() -> None:
    """Only `run.wall_s` differs from one execution to the next, and it is not shown."""
    pages = []
    for wall_s in (0.125, 99.5):
        data = run_of("lru").data
        data["run"] |= {"wall_s": wall_s}
        result = run_of("lru")
        result.data = data
        pages.append(result)
    texts = [page_of(one) for one in pages]

    assert texts[0] == texts[1]


def page_of(result: Result) -> str:
    return page(documents_of(result))


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    path.write_text("what was there before")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(InputError, match="is no JSON"):
        report(broken, path)

    def fails(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        report(run_of("lru"), path)

    assert path.read_text() == "what was there before"
    assert {one.name for one in tmp_path.iterdir()} <= {"r.html", "broken.json", "config"}


# What it says.


def test_the_fastest_comes_first_and_numbers_are_those_of_the_runs(tmp_path: Path) -> None:
    runs = {name: run_of(name) for name in ("lru", "static", "dali")}
    files = [written(run.data, tmp_path / f"{name}.json") for name, run in runs.items()]
    found = read(report(files, tmp_path / "r.html"))
    order = sorted(runs, key=lambda name: -runs[name].tokens_per_s)
    best, second = (runs[name] for name in order[:2])
    times = best.tokens_per_s / second.tokens_per_s

    answer = (
        f"12.00 MiB for experts: {order[0]} is fastest, {best.tokens_per_s:.2f} tokens/s, "
        f"{times:.2f} times {order[1]}, the next of 3, with {second.tokens_per_s:.2f}"
    )
    assert found.said.index(answer) < found.said.index("hit rate")
    assert best.why in found.said
    table = [row for row in found.rows if row[0][0] in runs and len(row) > 6][:3]
    assert [row[0][0] for row in table] == order
    for row, name in zip(table, order, strict=True):
        data = runs[name].data
        for value in (data["tokens_per_s"], data["ttft_ms"], data["tpot_ms"], data["hit_rate"]):
            assert repr(value) in {title for _, title in row}
        assert number(data["tokens_per_s"]) == row[1][0]


def test_pictures_show_the_same_numbers(tmp_path: Path) -> None:
    runs = {name: run_of(name) for name in ("lru", "static")}
    page = read(report(list(runs.values()), tmp_path / "r.html"))
    speeds, times, hits = page.figures

    assert dict(zip(speeds["data"][0]["y"], speeds["data"][0]["x"], strict=True)) == {
        name: run.tokens_per_s for name, run in runs.items()
    }
    assert "tokens per second" in speeds["layout"]["xaxis"]["title"]["text"]
    for name, run in runs.items():
        bars = {one["name"]: one["x"][one["y"].index(name)] for one in times["data"]}
        per_token = 1e-6 / run.data["output_tokens"]
        for cause, ns in run.data["time_ns"].items():
            assert bars.get(cause.replace("_", " "), 0) == pytest.approx(ns * per_token)
        assert sum(bars.values()) == pytest.approx(1e3 / run.tokens_per_s)
        (cells,) = [row for row in page.rows if row[0][0] == name and len(row) == 1 + len(bars)]
        assert [title for _, title in cells[1:]] == [repr(bar) for bar in bars.values()]
        rates = next(one["y"] for one in hits["data"] if one["name"] == name)
        assert rates == pytest.approx([100 * rate for rate in run.data["hit_rate_by_layer"]])


@pytest.mark.parametrize(
    "other", [{"generate": 5}, {"start": 1}, {"jitter": 0.5}, {"seed": 1}, {"layers": 7}]
)
def test_runs_of_two_questions_are_not_compared(tmp_path: Path, other: dict[str, Any]) -> None:
    runs = [run_of("lru"), run_of("static", **other)]
    found = read(report(runs, tmp_path / "r.html"))

    assert "is fastest" not in found.said
    assert found.said.count("have sections of their own") == 2
    assert "times slowest" not in found.said
    for run in runs:
        assert f"{run.data['policy']} makes {run.tokens_per_s:.2f} tokens/s" in found.said


def test_runs_of_one_name_are_not_drawn_as_one(tmp_path: Path) -> None:
    """Bars of one name would be stacked; long names are cut."""
    slower = run_of("lru")
    slower.data |= {"tokens_per_s": slower.tokens_per_s / 2}
    long = [run_of(f"dali:prefetch_size={size}") for size in (1, 2)]
    for run in long:
        run.data["policy"] = "x" * 100 + run.data["policy"]
    runs = [run_of("lru"), slower, *long]
    speeds, times, hits = read(report(runs, tmp_path / "r.html")).figures

    assert len(set(speeds["data"][0]["y"])) == len(set(times["data"][0]["y"])) == 4
    assert {one["name"] for one in hits["data"]} == set(times["data"][0]["y"])
    shown = dict(zip(speeds["data"][0]["y"], speeds["data"][0]["x"], strict=True))
    assert shown["lru (2)"] == slower.data["tokens_per_s"] < shown["lru"]


def test_a_measured_run_is_not_said_to_be_of_the_machine_that_it_was_decided_by(
    tmp_path: Path,
) -> None:
    data = json.loads(json.dumps(run_of("lru", hardware=HARDWARE).data))
    data["run"]["machine"] = "emulated"
    simulated = run_of("static", hardware=HARDWARE)
    path = report([written(data, tmp_path / "real.json"), simulated], tmp_path / "r.html")
    found = read(path)

    assert "tiny-mixtral measured on device emulated: 1 sequence" in found.said
    assert f"Policies decided by the profile {HARDWARE}" in found.said
    assert "is fastest" not in found.said


def test_a_comparison_is_a_line_per_policy_and_a_bound(
    tmp_path: Path, compared: Comparison
) -> None:
    found = read(report(compared, tmp_path / "r.html"))
    rows = compared.rows

    for row in rows:
        cells = [{title for _, title in own} for own in found.rows if row["policy"] in own[1][0]]
        assert any({repr(row["tokens_per_s"]), repr(row["ttft_ms"])} <= own for own in cells)
    lines = {one["name"]: one for one in found.figures[0]["data"]}
    assert set(lines) == {"lru", "static", "fate", "bound"}
    for name in ("lru", "static", "fate"):
        mine = sorted((r["budget_bytes"], r["tokens_per_s"]) for r in rows if r["policy"] == name)
        assert lines[name]["x"] == [size / 2**20 for size, _ in mine]
        assert lines[name]["y"] == [speed for _, speed in mine]
        assert all("tokens/s" in text for text in lines[name]["hovertext"])
    limits = [cell["bound_tokens_per_s"] for cell in compared.data["cells"]]
    assert lines["bound"]["y"] == pytest.approx(limits)
    assert lines["bound"]["line"]["shape"] == "vh"  # the next larger budget's, up to there
    assert "MiB" in found.figures[0]["layout"]["xaxis"]["title"]["text"]


def test_a_policy_that_cannot_run_says_why(tmp_path: Path, compared: Comparison) -> None:
    data = json.loads(json.dumps(compared.data))
    own = data["cells"][0]
    data["refused"] = [
        {"policy": "all-gpu", "batch": 1, "budget_bytes": own["budget_bytes"], "error": "no room"}
    ]
    found = read(report(written(data, tmp_path / "c.json"), tmp_path / "r.html"))

    assert "no room" in found.said


def test_a_validation_says_how_far_off_and_draws_it(
    tmp_path: Path, validated: dict[str, Any]
) -> None:
    found = read(report(written(validated, tmp_path / "v.json"), tmp_path / "r.html"))

    assert "off by -10.0% to +5.0%" in found.said
    assert "Kendall's tau 1.00" in found.said
    for row in validated["policies"]:
        cells = found.cells(row["policy"])[0]
        assert {repr(row["tpot_ms"]["measured"]), repr(row["tpot_error"])} <= {t for _, t in cells}
    points = [one for one in found.figures[0]["data"] if one.get("mode") == "markers"]
    assert [(one["x"], one["y"]) for one in points] == [([40.0], [36.0]), ([30.0], [31.5])]
    assert points[0]["error_x"]["array"] == pytest.approx([0.4])
    assert found.figures[0]["layout"]["xaxis"]["title"]["text"].endswith("in ms")


def test_a_sweep_says_its_best_point_and_what_is_worth_its_memory(tmp_path: Path) -> None:
    grid = {**WORK, "grid": {"policy": ["lru", "static", "all-gpu"], "cache_ratio": [0.1, 0.3]}}
    swept = sweep(grid, tmp_path / "s.parquet", jobs=1)
    found = read(report(tmp_path / "s.parquet", tmp_path / "r.html"))
    same = read(report(swept, tmp_path / "same.html"))
    best = swept.best()

    assert best is not None
    assert len(swept.failed) == 2
    assert (
        f"{best['run.policy']} is fastest of 6 points: {best['tokens_per_s']:.2f} tokens/s"
        in found.said
    )
    assert f"cache_ratio {best['cache_ratio']}" in found.said
    for row in swept.by_policy():
        cells = found.cells(row["run.policy"])[0]
        assert repr(row["tokens_per_s"]) in {title for _, title in cells}
    assert "2 points cannot run" in found.said
    assert sum(len(one["x"]) for one in found.figures[0]["data"]) == 4
    assert found.figures == same.figures
    assert "tiny-mixtral" in found.said


def test_an_advice_says_what_to_do(tmp_path: Path) -> None:
    model = model_of(read_trace(example_path()))
    room = {"gpu.memory_bytes": (1 << 30) + (40 << 20)}
    advice = moesim.advise(
        model, hardware=HARDWARE, context=96, policies=["lru"], jobs=1, machine="simpy",
        settings=room,
    )  # fmt: skip
    found = read(report(advice, tmp_path / "r.html"))
    data = advice.data

    assert advice.fits == "partly"
    assert found.said.index(headline(data)) < found.said.index("GPU memory")
    speeds = {row["policy"]: row["decode_tokens_per_s"] for row in data["candidates"]}
    titles = {title for row in found.rows for _, title in row}
    for row in (*data["candidates"], *data["upgrades"], *data["engines"]):
        assert repr(row["decode_tokens_per_s"]) in titles
    for size in data["memory"]["gpu"].values():
        assert f"{size} bytes" in titles
    for line in (*data["notices"], *(row["flags"] for row in data["engines"])):
        assert line in found.said
    bars = found.figures[0]["data"][0]
    assert dict(zip(bars["y"], bars["x"], strict=True)) == speeds
    best = bars["y"].index(advice.policy)
    high = data["recommended"]["decode_high"]
    assert speeds[advice.policy] + bars["error_x"]["array"][best] == pytest.approx(high)


def test_an_advice_says_what_does_not_fit(tmp_path: Path) -> None:
    advice = moesim.advise("deepseek-v3", hardware=HARDWARE)
    found = read(report(advice, tmp_path / "r.html"))

    assert "does not fit" in headline(advice.data)
    assert headline(advice.data) in found.said
    assert "in 4 bit" in found.said
    assert found.figures == []
    assert not [tag for tag, _ in found.tags if tag == "script"]


def test_terms_are_defined_in_the_words_of_the_module_that_computes_them() -> None:
    words = " ".join((metrics.__doc__ or "").replace("`", "").split())

    for line in definitions()[:5]:
        beginning = line.partition(" (")[0]
        assert beginning in words
    for term in ("TTFT:", "TPOT:", "hit_rate is", "makespan"):
        assert any(term in line for line in definitions())


# Timelines.


def bars_of(figure: dict[str, Any]) -> dict[tuple[str, float, float], str]:
    """Return what is shown of each bar, by its lane, start and length in ms."""
    return {
        (lane, base, length): text
        for one in figure["data"]
        for lane, base, length, text in zip(
            one["y"], one["base"], one["x"], one["hovertext"], strict=True
        )
    }


def test_every_segment_of_a_recorded_run_is_a_bar(tmp_path: Path) -> None:
    run = run_of("dali", record=True)
    run.timeline(tmp_path / "t.json.gz")
    from_file, from_run = (
        read(report(one, tmp_path / "r.html")).figures[-1] for one in (tmp_path / "t.json.gz", run)
    )
    bars = bars_of(from_file)
    log = run.run.log

    assert from_file == from_run
    assert log is not None
    assert set(from_file["layout"]["yaxis"]["categoryarray"]) == {
        "steps", "layers", "gpu", "h2d", "d2h", "host program", "cpu experts",
    }  # fmt: skip
    operations = 0
    for ticket, start, end, _ in log.segments.tolist():
        if not ticket:
            continue
        operations += 1
        op = log.operations[ticket - 1]
        text = next(
            text
            for (lane, base, length), text in bars.items()
            if base == start / 1e6 and length == pytest.approx((end - start) / 1e6)
            and lane not in ("steps", "layers", "host program")
            and f"layer {op['layer']}" in text + "layer -1"
        )  # fmt: skip
        assert f"step {op['step']}" in text
        assert OPERATIONS[op["kind"]].replace("_", " ") in text or "copy of an expert" in text
        assert f"starts at {start / 1e6:.12g} ms" in text
        assert op["expert"] < 0 or f"expert {op['expert']}" in text
    assert operations > 300
    steps = sorted((base, length) for lane, base, length in bars if lane == "steps")
    assert [length for _, length in steps] == pytest.approx(
        [row["duration_ns"] / 1e6 for row in by_step(run.run)]
    )


def test_two_runs_one_above_the_other_have_lanes_of_their_own() -> None:
    trace = chrome_trace(run_of("lru", record=True).run)
    twice = []
    for pid, name in ((0, "measured: lru on x"), (1, "simulated: lru on y")):
        twice.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}})
        twice += [
            {**event, "pid": pid}
            for event in trace["traceEvents"]
            if event["name"] != "process_name"
        ]
    names = timeline(events_of(twice)).layout["yaxis"]["categoryarray"]

    assert names[0] == "measured: steps"
    assert names[len(names) // 2] == "simulated: steps"
    assert [one.removeprefix("measured: ") for one in names[: len(names) // 2]] == [
        one.removeprefix("simulated: ") for one in names[len(names) // 2 :]
    ]


def events_of(found: list[dict[str, Any]]) -> list[Event]:
    return msgspec.convert(found, list[Event])


def made(steps: int, each: int) -> list[Event]:
    """Return steps of so many operations of 1 µs each."""
    spans = [
        Event("X", f"step {n} decode", "user_annotation", 1, 1, n * each, each, {"step": n})
        for n in range(steps)
    ]
    operations = [
        Event("X", "moesim::gate", "kernel", 0, 7, at, 1, {"step": at // each})
        for at in range(steps * each)
    ]
    return spans + operations


def test_of_a_long_run_whole_steps_are_drawn_and_the_page_says_so() -> None:
    events = made(30, 1000)
    plot = timeline(events)
    shown = sum(len(one["x"]) for one in plot.data)

    assert shown <= MOST_SEGMENTS
    assert shown == 19 * 1001
    assert plot.note.startswith("Drawn: the first 19 of 30 steps, 19019 of 30030 events")

    one_step = timeline(made(1, MOST_SEGMENTS + 10))
    assert sum(len(one["x"]) for one in one_step.data) == MOST_SEGMENTS
    assert one_step.note.startswith("Drawn: the beginning, 20000 of 20011 events")
    lanes = lanes_of(events[:10])
    assert first_steps(list(zip(events[:10], lanes, strict=True)))[1] == ""


# What is not from moesim.


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&</td><a href='//x'>"


def test_texts_from_files_are_only_texts(tmp_path: Path, compared: Comparison) -> None:
    data = json.loads(json.dumps(run_of("lru").data))
    data["policy"] = data["run"]["model"] = data["run"]["hardware"] = HOSTILE
    data["notices"] = [HOSTILE]
    other = json.loads(json.dumps(compared.data))
    other["rows"][0]["policy"] = other["model"] = other["baseline"] = HOSTILE
    other["rows"][0]["why"] = HOSTILE
    other["workload"][HOSTILE] = HOSTILE
    events = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": 7, "args": {"name": HOSTILE}},
        {"ph": "X", "name": HOSTILE, "pid": 0, "tid": 7, "ts": 0, "dur": 3,
         "args": {"layer": HOSTILE, "expert": HOSTILE, "cause": HOSTILE, "tokens": HOSTILE}},
    ]  # fmt: skip
    given = [
        written(one, tmp_path / f"{number}.json")
        for number, one in enumerate((data, other, {"traceEvents": events}))
    ]
    clean = read(report([run_of("lru"), compared], tmp_path / "clean.html"))
    text = report(given, tmp_path / "r.html", HOSTILE).read_text(encoding="utf-8")
    found = Page(text)

    assert {tag for tag, _ in found.tags} == {tag for tag, _ in clean.tags}
    assert HOSTILE in html.unescape(text)
    assert HOSTILE not in text
    figures = json.dumps(found.figures)
    assert "<script" not in figures
    assert "<img" not in figures
    assert "<a " not in figures
    assert "&lt;script&gt;" in figures


def test_a_figure_cannot_end_the_script_that_holds_it() -> None:
    plot = Plot("", [{"type": "bar", "y": ["</script><!--"], "x": [1]}], {})

    assert "<" not in figure_json(plot)
    assert json.loads(figure_json(plot))["data"][0]["y"] == ["</script><!--"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no JSON"),
        (b"not json", "is no JSON"),
        (b"[1, 2", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b'{"policy": "\xff"}', "is no JSON"),
        (b"{}", "is not known; a report takes what `moesim replay --json`"),
        (b"[1]", "is not known"),
        (b"null", "is not known"),
        (b'{"traceEvents": 3}', "is not from `moesim replay --timeline`: Expected `array`"),
        (b'{"traceEvents": [{"ph": "X", "dur": -1}]}', "Expected `float` >= 0"),
        (b'{"traceEvents": [{"ph": "X", "ts": NaN}]}', "is no JSON"),
        (b'{"traceEvents": [{"ph": "X", "ts": 1e999}]}', "is no JSON"),
        (b"\x1f\x8b\x08 cut off", "cannot be read"),
        (b"PAR1 and no more", "cannot be read"),
    ],
)
def test_other_files_are_refused_in_one_line(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        read_document(path)

    assert said in str(raised.value)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_what_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MOST_BYTES >= 1 << 28
    monkeypatch.setattr("moesim.answers.documents.MOST_BYTES", 1 << 20)
    (tmp_path / "bomb.json.gz").write_bytes(gzip.compress(b" " * (2 << 20)))
    (tmp_path / "big.json").write_bytes(b" " * (2 << 20))

    for name in ("bomb.json.gz", "big.json"):
        with pytest.raises(InputError, match=f"{name}: has more than 1 MiB"):
            read_document(tmp_path / name)


def test_a_number_that_is_missing_or_none_is_named(
    tmp_path: Path, validated: dict[str, Any], compared: Comparison
) -> None:
    documents = {"run": run_of("lru").data, "compare": compared.data, "validate": validated}
    for name, data in documents.items():
        plain = json.loads(json.dumps(data))
        kind = next(kind for kind in KINDS if kind.keys <= plain.keys())
        for key in plain:
            if key not in kind.form.__struct_fields__ or key in kind.keys:
                continue
            path = written({k: v for k, v in plain.items() if k != key}, tmp_path / name)
            with pytest.raises(InputError, match=f"{name}: .*`{key}`"):
                read_document(path)
            path = written({**plain, key: [[]]}, tmp_path / name)
            with pytest.raises(InputError, match=rf"{name}: .*`\$.*{key}"):
                read_document(path)


def test_a_run_of_another_version_says_what_it_lacks(tmp_path: Path) -> None:
    data = json.loads(json.dumps(run_of("lru").data))
    del data["time_ns"]["wait_host"]
    with pytest.raises(InputError, match="time_ns lacks wait_host"):
        read_document(written(data, tmp_path / "r.json"))


def test_a_table_that_is_no_sweep_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"is no table of `moesim sweep`; a report takes"):
        read_document(tmp_path / "a.parquet")
    pq.write_table(
        pa.table({"policy": ["lru"], "point": ["1"], "error": [None], "tokens_per_s": [1.0]}),
        tmp_path / "b.parquet",
    )
    with pytest.raises(InputError, match=r"is no table of `moesim sweep`: .*policy"):
        read_document(tmp_path / "b.parquet")


def test_nothing_and_no_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs results"):
        report([], tmp_path / "r.html")
    with pytest.raises(InputError, match="3 is no result"):
        report(3, tmp_path / "r.html")  # type: ignore[arg-type]


def test_the_template_ships() -> None:
    assert files("moesim.answers").joinpath("report.html.j2").is_file()


def test_numbers_have_four_digits() -> None:
    shown = {
        1234.56: "1235", 123.456: "123.5", 1.23456: "1.235", 0.0123456: "0.01235", 0: "0",
        -5.5: "-5.500", 99999.9: "100000",
    }  # fmt: skip
    assert {value: number(value) for value in shown} == shown
    assert number(None) == "-"
    assert number(float("inf")) == "inf"
