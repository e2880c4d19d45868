"""Reports in a browser without a network: pictures are drawn, tooltips shown, timelines zoomed."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Request, sync_playwright

import moesim
from moesim.answers.interactive import MOST_SEGMENTS
from moesim.answers.report import report
from moesim.sim.timeline import write_trace

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    assert path is not None, "chromium is not on the PATH; -m 'not browser' leaves these tests out"
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a report of two runs, one of them recorded."""
    runs = [
        moesim.replay(
            policy=policy, cache_ratio=0.25, prompt=8, generate=6, machine="simpy",
            hardware="rtx3090-pcie4-ddr4", record=policy == "dali",
        )
        for policy in ("dali", "lru")
    ]  # fmt: skip
    return report(runs, tmp_path_factory.mktemp("report") / "report.html")


class Opened:
    """A page, and what went wrong in it."""

    def __init__(self, browser: Browser, path: Path, *, scripts: bool = True) -> None:
        self.wrong: list[str] = []
        self.context = browser.new_context(
            offline=True, java_script_enabled=scripts, viewport={"width": 1200, "height": 900}
        )
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.page.on("request", self.asked)
        self.page.on("console", lambda one: self.wrong.append(f"{one.type}: {one.text}"))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.goto(path.as_uri())

    def asked(self, request: Request) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.wrong.append(f"asks for {request.url}")

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def plot(self, number: int) -> Any:
        """Return a picture once it is drawn, in sight."""
        found = self.page.locator(f"#plot-{number}")
        found.locator(".main-svg").first.wait_for()
        found.scroll_into_view_if_needed()
        return found

    def span(self, number: int) -> tuple[float, float]:
        """Return the range of a picture's horizontal axis."""
        low, high = self.page.evaluate(
            f"document.getElementById('plot-{number}')._fullLayout.xaxis.range"
        )
        return low, high

    def point_at(self, number: int, bar: int = 0) -> str:
        """Move to the middle of a bar, and return the tooltip."""
        box = self.plot(number).locator(".bars .point path").nth(bar).bounding_box()
        assert box is not None
        self.page.mouse.move(1, 1)
        self.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
        label = self.page.locator(f"#plot-{number} .hoverlayer .hovertext")
        label.first.wait_for()
        return label.first.text_content() or ""


def test_it_opens_without_a_network_or_an_error(
    browser: Browser, path: Path, tmp_path: Path
) -> None:
    with Opened(browser, path) as opened:
        count = opened.page.locator(".plot").count()
        for number in range(1, count + 1):
            opened.plot(number)
        opened.page.screenshot(path=tmp_path / "report.png", full_page=True)

        assert count == 4
        assert opened.page.locator(".plot .bars .point").count() > 100
        assert opened.wrong == []
        wide = opened.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert wide, "the page is wider than the window"
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_no_button_leads_out_of_the_page(browser: Browser, path: Path) -> None:
    with Opened(browser, path) as opened:
        opened.plot(1)
        titles = opened.page.evaluate(
            "[...document.querySelectorAll('.modebar-btn')].map(one => one.dataset.title)"
        )
        links = opened.page.evaluate("[...document.links].map(one => one.getAttribute('href'))")

    assert {"Zoom", "Pan"} <= set(titles)
    assert not [one for one in titles if re.search("share|cloud|edit|plotly", one, re.IGNORECASE)]
    assert all(one.startswith("#") for one in links)


def test_tooltips_have_units(browser: Browser, path: Path) -> None:
    with Opened(browser, path) as opened:
        assert "tokens/s" in opened.point_at(1)
        assert "ms per token" in opened.point_at(2)


def test_dragging_zooms_a_timeline_and_bars_say_what_they_are(
    browser: Browser, path: Path, tmp_path: Path
) -> None:
    with Opened(browser, path) as opened:
        area = opened.plot(4).locator(".nsewdrag").bounding_box()
        assert area is not None
        before = opened.span(4)
        left, right = area["x"] + 0.40 * area["width"], area["x"] + 0.45 * area["width"]
        middle = area["y"] + area["height"] / 2
        opened.page.mouse.move(left, middle)
        opened.page.mouse.down()
        opened.page.mouse.move(right, middle, steps=5)
        opened.page.mouse.up()
        opened.page.wait_for_function(
            "before => document.getElementById('plot-4')._fullLayout.xaxis.range[1] < before",
            arg=before[1],
        )
        after = opened.span(4)
        length = before[1] - before[0]
        assert after[0] == pytest.approx(before[0] + 0.40 * length, abs=0.02 * length)
        assert after[1] - after[0] == pytest.approx(0.05 * length, abs=0.01 * length)

        boxes = opened.page.evaluate(
            """() => [...document.querySelectorAll("#plot-4 .bars .point path")].map((bar, n) => {
                 const box = bar.getBoundingClientRect();
                 return [n, box.left, box.right];
               })"""
        )
        inside = area["x"], area["x"] + area["width"]
        wide = [
            n for n, low, high in boxes if low > inside[0] and high < inside[1] and high - low > 8
        ]
        text = opened.point_at(4, wide[0])
        opened.page.screenshot(path=tmp_path / "zoomed.png")

        assert "starts at" in text
        assert "takes" in text
        assert "ms" in text
        assert opened.wrong == []
        opened.page.mouse.dblclick(left, middle)
        opened.page.wait_for_function(
            "before => document.getElementById('plot-4')._fullLayout.xaxis.range[1] >= before",
            arg=before[1],
        )


def test_texts_and_tables_need_no_scripts(browser: Browser, path: Path) -> None:
    with Opened(browser, path, scripts=False) as opened:
        text = opened.page.locator("body").inner_text()

    assert "is fastest" in text
    assert "The pictures need JavaScript" in text
    for word in ("tokens/s", "TTFT ms", "hit rate", "dali", "lru", "rtx3090-pcie4-ddr4"):
        assert word in text


def test_a_timeline_of_the_most_segments_is_drawn(browser: Browser, tmp_path: Path) -> None:
    events = [
        {"ph": "X", "name": f"moesim::kind{at % 7}", "pid": 0, "tid": at % 5, "ts": at, "dur": 1}
        for at in range(MOST_SEGMENTS)
    ]
    write_trace({"traceEvents": events}, tmp_path / "t.json")
    with Opened(browser, report(tmp_path / "t.json", tmp_path / "r.html")) as opened:
        opened.plot(1)
        assert opened.page.locator("#plot-1 .bars .point").count() == MOST_SEGMENTS
        assert opened.wrong == []


def test_names_from_files_run_no_script(browser: Browser, tmp_path: Path) -> None:
    hostile = "</script><script>document.title = 'run'</script><img src=x onerror=alert(1)>"
    events = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": 0, "args": {"name": hostile}},
        {"ph": "X", "name": hostile, "pid": 0, "tid": 0, "ts": 0, "dur": 1000, "args": {}},
    ]
    write_trace({"traceEvents": events}, tmp_path / "t.json")
    page = report(tmp_path / "t.json", tmp_path / "r.html", title=hostile)
    with Opened(browser, page) as opened:
        opened.point_at(1)
        assert opened.page.title() == hostile
        assert opened.page.locator("img").count() == 0
        assert opened.page.locator("h1").inner_text() == hostile
        assert opened.wrong == []
