"""`moesim report`: files of other commands in, one HTML file out."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

Cli = Callable[..., CompletedProcess[str]]


@pytest.fixture
def results(cli: Cli, small: Path, tmp_path: Path) -> list[Path]:
    """Return what `moesim replay` has written of two policies, and a timeline."""
    paths = [tmp_path / "lru.json", tmp_path / "static.json", tmp_path / "t.json.gz"]
    for path in paths[:2]:
        options = ("--policy", path.stem, "--cache-ratio", 0.25, "--machine", "simpy")
        ended = cli("replay", small, "--json", *options, "--timeline", paths[2])
        path.write_text(ended.stdout)
    return paths


def test_files_become_one_page(cli: Cli, results: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    ended = cli("report", *results, "-o", page, "--title", "Ours & theirs")
    text = page.read_text(encoding="utf-8")
    speeds = {path.stem: json.loads(path.read_text())["tokens_per_s"] for path in results[:2]}
    best = max(speeds, key=lambda name: speeds[name])

    assert ended.returncode == 0, ended.stderr
    assert str(page) in ended.stdout
    assert f"{best} is fastest, {speeds[best]:.2f} tokens/s" in text
    assert "<h1>Ours &amp; theirs</h1>" in text
    assert "Timeline t.json.gz" in text
    again = tmp_path / "again.html"
    assert cli("report", *results, "-o", again, "--title", "Ours & theirs").returncode == 0
    assert again.read_bytes() == page.read_bytes()


def test_without_a_name_it_is_report_html(
    cli: Cli, results: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    assert cli("report", results[0]).returncode == 0
    assert [path.name for path in Path.cwd().iterdir()] == ["report.html"]
    assert "<title>Expert offloading of small on " in Path("report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Missing argument"),
        (("absent.json",), "does not exist"),
        (("other.json",), "other.json: is not known; a report takes"),
        (("other.json", "-o", "other.json"), "is one of the files to report on"),
        (("other.json", "-o", "no/where.html"), "there is no folder"),
        (("other.json", "-o", "."), "is a directory"),
    ],
)
def test_bad_input_is_one_line(
    words: tuple[str, ...], said: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text('{"some": "thing"}')
    ended = cli("report", *words)

    assert ended.returncode == 2
    assert said in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]
